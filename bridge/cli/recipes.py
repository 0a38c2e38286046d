"""Options by which commands take the settings of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer

F = TypeVar("F", bound=Callable[..., Any])


def recipe_options(*, required: bool) -> Callable[[F], F]:
    """Adds `--recipe`, `--overlay` and `--set`, which a command takes as `recipe`, `overlays` and `overrides`."""

    def add(command: F) -> F:
        options = (
            click.option("--recipe", type=click.Path(path_type=Path), required=required, help="YAML recipe of the run"),
            click.option(
                "--overlay",
                "overlays",
                type=click.Path(path_type=Path),
                multiple=True,
                metavar="FILE",
                help="YAML file laid over the recipe; may be given several times",
            ),
            click.option(
                "--set",
                "overrides",
                multiple=True,
                metavar="SECTION.KEY=VALUE",
                help="a setting that replaces the recipe's; may be given several times",
            ),
        )
        for option in reversed(options):
            command = option(command)
        return command

    return add


def load_recipe(recipe: Path | None, overlays: tuple[Path, ...], overrides: tuple[str, ...]) -> ConfigContainer | None:
    """The configuration; None without a recipe.

    Raises:
        click.UsageError: there is something to lay over a recipe, and no recipe.
        ConfigError: it is wrong.
    """
    if recipe is None:
        if overlays or overrides:
            raise click.UsageError("--overlay and --set change a recipe: give --recipe FILE too.")
        return None
    from bridge.training.config import load_config

    return load_config(recipe, overlays, overrides)
