"""Safe loading: torch files are read with `weights_only`, and the user says which further classes may appear.

torch refuses a file that holds an object of a class it does not know, because such an object could run code. Numpy's
arrays and numbers, which random states are made of, and the classes that a user's own recipe names in
`checkpoint.safe_globals` are allowed beside torch's; a checkpoint cannot add any.
"""

from __future__ import annotations

import importlib
import io
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError, UnsafeCheckpointError
from bridge.training.config.errors import ConfigError

_REFUSED = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")
_BLOCKED = re.compile(r"unsupported GLOBAL ([\w.]+) whose module")
"""torch's words for what can never be allowed, such as os.system."""
_MISUSED = re.compile(r"reduce for unrecognized|Can only (?:build|create)|Only persistent_load of storage")
"""torch's words for what no file that torch wrote does."""
_RUNNING = frozenset({"os", "posix", "nt", "sys", "subprocess", "pty", "runpy", "importlib"})
"""Modules of functions that files name to run something."""
_RUNNING_BUILTINS = frozenset({"__import__", "compile", "delattr", "eval", "exec", "getattr", "open", "setattr"})

_LONGEST_NAME = 200  # characters

_Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]
"""As torch takes it: a class or function, or one with the name by which files know it."""
_NUMBERS = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_MAKERS: tuple[Any, ...] = (np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0])
"""What arrays and numbers are made with when they are read."""
NUMPY: tuple[_Allowed, ...] = (
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in _NUMBERS),
    # Numpy 2 moved these; files know them by the name that they had when the file was written.
    *((make, f"numpy.{core}.multiarray.{make.__name__}") for make in _MAKERS for core in ("core", "_core")),
)
"""Numpy's arrays and scalars of booleans, integers and floating-point numbers."""


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


def names_allowed_by_user() -> frozenset[tuple[str, str]]:
    """Module and name of everything that is allowed beside what torch allows by itself."""
    names = set()
    for allowed in torch.serialization.get_safe_globals():
        full = allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"
        module, _, name = full.rpartition(".")
        names.add((module, name))
    return frozenset(names)


@contextmanager
def _permitted(classes: Sequence[_Allowed]) -> Iterator[None]:
    # torch's own context manager would take away on leaving what was allowed before it was entered.
    known = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([entry for entry in (*NUMPY, *classes) if entry not in known]):
        yield


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
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise CheckpointDamagedError(f"{path} is not a file")
        with _permitted(()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, CheckpointError):
        raise
    except Exception as error:  # there is no error that unpickling a garbled file may not raise
        raise load_error(error, str(path), what) from error


def load_torch_bytes(data: bytes, place: str, what: str, classes: Sequence[type] = ()) -> Any:
    """As `load_torch_file`, from memory.

    Args:
        data: what `torch.save` wrote.
        place: where it comes from, for messages.
        what: what it should be, for messages.
        classes: what it may hold beside what every file may.

    Raises:
        UnsafeCheckpointError: it holds an object of a class that is not allowed; the message says how to allow it.
        CheckpointDamagedError: it cannot be read.
    """
    try:
        with _permitted(classes):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # there is no error that unpickling garbled bytes may not raise
        raise load_error(error, place, what) from error


def load_error(error: Exception, place: str, what: str) -> CheckpointError:
    """The error to raise for one that `torch.load` raised with `weights_only`."""
    if found := _REFUSED.search(str(error)) or _BLOCKED.search(str(error)):
        # torch leaves out the module of what is built in.
        return not_allowed(place, found[1] if "." in found[1] else f"builtins.{found[1]}")
    if _MISUSED.search(str(error)):
        return UnsafeCheckpointError(
            f"{place} does what no file of a {what} does, and could run code: {describe(error)}"
        )
    return CheckpointDamagedError(f"{place} is not a readable {what}: {describe(error)}")


def not_allowed(place: str, name: str) -> UnsafeCheckpointError:
    """The error for a file that holds an object of a class, by its full name, that is not allowed."""
    module, _, function = name.rpartition(".")
    if module.split(".")[0] in _RUNNING or (module in ("builtins", "__builtin__") and function in _RUNNING_BUILTINS):
        return UnsafeCheckpointError(f"{place} tries to run code when it is loaded ({name}); delete it")
    shown = name if len(name) <= _LONGEST_NAME and name.isprintable() else repr(name[:_LONGEST_NAME])
    return UnsafeCheckpointError(
        f"{place} holds an object of the class {shown}, which loading does not allow, because it could run "
        f"code. If you trust the file, name the class in your recipe, checkpoint.safe_globals: [{shown}], "
        f"or call torch.serialization.add_safe_globals([{shown}]) before the load"
    )


def describe(error: BaseException) -> str:
    """An error's type and the first sentence of its message; torch appends advice that does not apply here."""
    text = str(error).split("\n", 1)[0].split("(1) In PyTorch", 1)[0].split("In PyTorch 2.", 1)[0].strip()
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
