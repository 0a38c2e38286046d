"""The program of the uploader's process. It leaves out the package's own `__init__`.

That imports torch and Megatron-Core for the documented names: seconds of work and hundreds of MiB that an upload has
no use for.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path


def _start() -> None:
    name = "bridge.training.checkpointing"
    package = types.ModuleType(name)
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules[name] = package
    from bridge.training.checkpointing.objects.uploader import main

    main()


if __name__ == "__main__":
    _start()
