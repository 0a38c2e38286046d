"""`bridge-ckpt estimate`: what the checkpoints of a recipe will come to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.cli.output import Output, PositiveFloat, count_text, output_options, size_text
from bridge.cli.recipes import load_recipe, recipe_options

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer

DESCRIPTION = """Work out from a recipe how large its checkpoints will be, in how many files, how long one takes to
write, and how much the run keeps at most. Nothing is trained, no model is built, and no GPU is needed: it is
counted from the configuration.

The bytes of the tensors' values are exact. What lies beside them is not: headers, random states and small files, a
part that matters for toy models only."""


@click.command("estimate", help=DESCRIPTION, short_help="work out size, files and time of a recipe's checkpoints")
@recipe_options(required=True)
@click.option("--world-size", type=click.IntRange(1), metavar="N", help="ranks (default: as few as the recipe needs)")
@click.option("--vocab-size", type=click.IntRange(1), metavar="N", help="ids of the tokenizer, instead of loading it")
@click.option(
    "--gib-per-second",
    type=PositiveFloat(),
    default=1.0,
    metavar="RATE",
    help="at which the storage takes data, from all ranks together (default: 1)",
)
@output_options
def command(
    recipe: Path,
    overlays: tuple[Path, ...],
    overrides: tuple[str, ...],
    world_size: int | None,
    vocab_size: int | None,
    gib_per_second: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry it out."""
    from bridge.training.checkpointing.catalog import estimate

    cfg = load_recipe(recipe, overlays, overrides)
    if cfg is None:
        raise click.UsageError("give --recipe FILE.")
    size = world_size or _fewest_ranks(cfg)
    cfg.validate(size)
    found = estimate(cfg, size, _rows(cfg, vocab_size), gib_per_second=gib_per_second)
    output = Output(as_json, quiet)
    extra = ("payload_bytes", "total_bytes", "seconds", "most_bytes")
    output.result({**vars(found), **{name: getattr(found, name) for name in extra}})
    ranks = f"{count_text(size, 'rank')}, {found.data_parallel_size} of them data parallel"
    output.line(f"{recipe}: {found.parameters:,} parameters on {ranks}")
    rows = [
        ("model", size_text(found.model_bytes)),
        ("optimizer", size_text(found.optimizer_bytes)),
        ("beside them, about", size_text(found.other_bytes)),
        ("one checkpoint", size_text(found.total_bytes)),
        ("files, without the tokenizer's", f"{found.files:,}"),
        ("the most that one rank writes", size_text(found.largest_rank_bytes)),
        (f"time at {gib_per_second:g} GiB/s", f"{found.seconds:.1f} s"),
        ("saves in the whole run", f"{found.saves:,}"),
    ]
    if found.most_bytes is not None:
        rows.append((f"space for {count_text(found.most_kept or 0, 'checkpoint')}", size_text(found.most_bytes)))
    output.table(("", ""), rows, frozenset())
    if found.most_bytes is None:
        output.line("how many are kept depends on time or on metrics")
    output.hint("The time is to storage; with checkpoint.async_save training goes on meanwhile.")


def _fewest_ranks(cfg: ConfigContainer) -> int:
    model = cfg.model
    dense = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    experts = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or model.tensor_model_parallel_size)
    return math.lcm(dense, experts * model.pipeline_model_parallel_size)


def _rows(cfg: ConfigContainer, vocab_size: int | None) -> int:
    """Rows of the embedding."""
    from bridge.training.gpt import padded_vocab_size

    if vocab_size is None and cfg.model.vocab_size is None:
        vocab_size = _ids(cfg)
    return padded_vocab_size(cfg.model, vocab_size or 0)


def _ids(cfg: ConfigContainer) -> int:
    """Of the recipe's tokenizer.

    Raises:
        ConfigError: it cannot be loaded here.
    """
    from bridge.training.config import ConfigError
    from bridge.training.tokenizers import TokenizerError, build_tokenizer

    try:
        return int(build_tokenizer(cfg.tokenizer).vocab_size)
    except (TokenizerError, OSError) as error:
        raise ConfigError(
            f"the recipe's tokenizer cannot be loaded: {error}; give --vocab-size, or set model.vocab_size"
        ) from error
