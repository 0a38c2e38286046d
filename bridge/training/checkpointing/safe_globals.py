"""Safe loading: torch files are read with `weights_only`, and the user says which further classes may appear.

torch refuses a file that holds an object of a class it does not know, because such an object could run code. The
classes that a user's own recipe names in `checkpoint.safe_globals` are allowed beside torch's; a checkpoint cannot
add any.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.errors import CheckpointDamagedError, UnsafeCheckpointError
from bridge.training.config.errors import ConfigError

_REFUSED = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")


def allow(names: Sequence[str] | None) -> None:
    """Let torch files hold objects of these classes, in this process, from now on.

    Args:
        names: dotted paths, `module.Class`, from the user's own configuration.

    Raises:
        ConfigError: one cannot be imported.
    """
    classes = []
    for name in names or ():
        module, _, attribute = name.rpartition(".")
        try:
            classes.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.safe_globals: {name!r} cannot be imported ({error}); write module.Class"
            ) from error
    torch.serialization.add_safe_globals(classes)


def load_torch_file(path: Path, what: str) -> Any:
    """`torch.load` of a file with `weights_only`, on the CPU.

    Args:
        path: the file.
        what: what it should be, for messages: "train state", say.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeCheckpointError: it holds an object of a class that is not allowed; the message says how to allow it.
        CheckpointDamagedError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # there is no error that unpickling a garbled file may not raise
        refused = _REFUSED.search(str(error))
        if refused:
            name = refused[1]
            raise UnsafeCheckpointError(
                f"{path} holds an object of the class {name}, which loading does not allow, because it could run "
                f"code. If you trust the file, name the class in your recipe, checkpoint.safe_globals: [{name}], "
                f"or call torch.serialization.add_safe_globals([{name}]) before the load"
            ) from error
        raise CheckpointDamagedError(f"{path} is not a readable {what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An error's type and the first sentence of its message; torch appends advice that does not apply here."""
    text = str(error).split("\n", 1)[0].split("(1) In PyTorch", 1)[0].strip()
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
