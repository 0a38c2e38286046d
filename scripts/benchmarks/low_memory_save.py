"""Peak memory of saving a model: the ordinary way, and with the model let go of before it is saved.

    .venv/bin/python -m scripts.benchmarks.low_memory_save [--layers N] [--hidden-size N]

Each way runs in a process of its own, from the same random model with its gradient buffers and without an
optimizer. "Peak" is the highest resident memory during the save, less that before the model was built; what is
compared is its ratio to the size of the parameters. The two payloads are compared byte for byte.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAYS = ("ordinary", "low memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.way:
        print(json.dumps(measure(options.way, options.layers, options.hidden_size, options.directory)))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        found = {way: _run(way, options, Path(directory) / way.replace(" ", "-")) for way in WAYS}
    print(f"{'way':<12} {'model':>9} {'peak':>9} {'peak / model':>13}")
    for way, result in found.items():
        print(
            f"{way:<12} {result['model_mb']:>6.0f} MB {result['peak_mb']:>6.0f} MB "
            f"{result['peak_mb'] / result['model_mb']:>13.2f}"
        )
    same = found[WAYS[0]]["payload"] == found[WAYS[1]]["payload"]
    print(f"the saved tensors are {'the same' if same else 'DIFFERENT'}")
    return 0 if same else 1


def _run(way: str, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--way", way, "--directory", str(directory)]
    command += ["--layers", str(options.layers), "--hidden-size", str(options.hidden_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class PeakMemory:
    """The highest resident memory of this process while it is entered, sampled every millisecond."""

    def __enter__(self) -> PeakMemory:
        self.bytes = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, resident_bytes())
            time.sleep(0.001)

    def __exit__(self, *details: object) -> None:
        self._done.set()
        self._thread.join()


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def detach(value: Any) -> Any:
    """Without the parameter object, which holds its gradient buffer."""
    if getattr(value, "data", None) is not None and hasattr(value.data, "detach"):
        value.data = value.data.detach()
    return value


def measure(way: str, layers: int, hidden_size: int, directory: Path) -> dict[str, object]:
    """Build the model, save it the given way in this process, and report its size and the peak."""
    import logging

    from bridge import accelerator

    accelerator.enable()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import torch
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge.training.checkpointing import generate_state_dict, save_checkpoint
    from bridge.training.config import CheckpointConfig, ConfigContainer, GPTModelConfig
    from bridge.training.gpt import build_model
    from bridge.training.initialize import LaunchEnvironment, initialize_distributed, set_seeds
    from bridge.training.state import GlobalState

    cfg = ConfigContainer(
        model=GPTModelConfig(num_layers=layers, hidden_size=hidden_size, num_attention_heads=8, activation="swiglu"),
        checkpoint=CheckpointConfig(save=str(directory), save_optim=False, save_rng=False, save_tokenizer_assets=False),
    )
    cfg.ddp.use_distributed_optimizer = False
    initialize_distributed(cfg, LaunchEnvironment())
    set_seeds(cfg)
    state = GlobalState(cfg=cfg)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    before = resident_bytes()
    model = build_model(cfg, 1024)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model[0].parameters())
    state_dict = None
    if way == "low memory":
        building = {"metadata": {"dp_cp_group": groups.dp_cp}}
        state_dict = generate_state_dict(cfg.checkpoint, model, None, None, None, 0, model_sd_kwargs=building)
        apply_factories(state_dict)
        dict_list_map_inplace(detach, state_dict)
        model.clear()
    gc.collect()
    with PeakMemory() as peak:
        save_checkpoint(state, model, None, None, 0, prebuilt_state_dict=state_dict, pg_collection=groups)
    payload = hashlib.sha256()
    for file in sorted((directory / "iter_0000000").glob("*.distcp")):
        payload.update(file.read_bytes())
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return {"model_mb": size / 1e6, "peak_mb": (peak.bytes - before) / 1e6, "payload": payload.hexdigest()}


if __name__ == "__main__":
    sys.exit(main())
