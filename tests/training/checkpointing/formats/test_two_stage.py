"""Two-stage loading on four real ranks: the same as a plain load, each byte read once, and failures known to all."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint.api import CheckpointException

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.formats import torch_dist
from bridge.training.checkpointing.formats.failures import load_error
from bridge.training.checkpointing.formats.options import LoadOptions
from bridge.training.checkpointing.formats.read_choice import Measured
from bridge.training.checkpointing.formats.read_rounds import LoadTimes, summary
from bridge.training.checkpointing.formats.strategies import load_strategy
from bridge.training.checkpointing.formats.two_stage import TwoStageDataParallelLoadShardedStrategy, two_stage
from bridge.training.checkpointing.formats.zarr import ZarrSaveShardedStrategy
from bridge.training.checkpointing.formats.zarr_reading import ZarrLoadShardedStrategy
from tests.distributed.launch import init_ranks, run_ranks

COUNTERS, RESET, STATUS = Path("/proc/self/io"), Path("/proc/self/clear_refs"), Path("/proc/self/status")
needs_counters = pytest.mark.skipif(not COUNTERS.exists(), reason="the system does not count what a process reads")
needs_peak = pytest.mark.skipif(not RESET.exists(), reason="the system does not tell the peak of a process's memory")
SMALL_ROUNDS = {"round_bytes": 4096, "message_bytes": 1024}
"""Several rounds, and tensors that go in pieces, with tensors of some kilobytes."""


@dataclass(frozen=True)
class Place:
    """A rank of a layout of four ranks."""

    tp: int
    """Tensor-parallel size; the data-parallel size is 4 // tp."""
    rank: int

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    def group(self) -> Any:
        """This rank's data-parallel group. Collective."""
        groups = [dist.new_group(range(first, 4, self.tp)) for first in range(self.tp)]
        return groups[self.tp_rank]


def whole(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The values of a tensor: any bits, and others for each key."""
    generator = torch.Generator().manual_seed(sum(ord(letter) * place for place, letter in enumerate(key, 1)))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    bits = torch.randint(0, 256, (prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape)


def shard(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, part: int = 0, parts: int = 1, replica: Any = 0
) -> ShardedTensor:
    """The part of a tensor, divided along its first axis, that a rank holds."""
    values = whole(key, shape, dtype)
    if parts == 1:
        return ShardedTensor.from_rank_offsets(key, values, replica_id=replica)
    data = values.chunk(parts)[part].clone()
    return ShardedTensor.from_rank_offsets(key, data, (0, part, parts), replica_id=replica)


TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
    "float64": torch.float64,
    "int64": torch.int64,
    "int8": torch.int8,
    "bool": torch.bool,
}


def every_form(place: Place) -> dict[str, Any]:
    """A state with tensors and objects of every form, as one rank saves it."""
    everywhere = (place.tp_rank, place.dp_rank)
    layers = [
        ShardedTensor.from_rank_offsets(
            "layers",
            whole("layers", (2, 6, 50), torch.float32)[layer].clone(),
            (0, layer, 2),
            replica_id=everywhere,
            prepend_axis_num=1,
        )
        for layer in range(2)
    ]
    return {
        "divided": shard("divided", (64, 33), torch.float32, place.tp_rank, place.tp, place.dp_rank),
        "types": {name: shard(name, (7, 11), dtype, replica=everywhere) for name, dtype in TYPES.items()},
        "scalar": shard("scalar", (), torch.float64, replica=everywhere),
        "empty": shard("empty", (0, 3), torch.float32, replica=everywhere),
        "own": shard("own", (40, 50), torch.bfloat16, place.rank, 4),
        "of some": shard("of some", (8, 301), torch.float32, place.rank % 2, 2, place.rank // 2),
        "layers": layers,
        "twice": [shard("twice", (9,), torch.int64, replica=everywhere) for _ in range(1)],
        "strided": shard("strided", (20, 30), torch.float32, replica=everywhere),
        "without memory": shard("without memory", (20, 30), torch.bfloat16, replica=everywhere),
        "padded": replace(shard("padded", (10, 4), torch.float32, replica=everywhere), allow_shape_mismatch=True),
        "objects": [
            ShardedObject("shared", {"seed": [1, place.tp_rank]}, (place.tp,), (place.tp_rank,), place.dp_rank),
            ShardedObject("mine", torch.arange(place.rank + 1), (4,), (place.rank,), 0),
        ],
    }


def forgotten(item: Any) -> Any:
    """What was saved, with other values in its place."""
    if isinstance(item, dict):
        return {key: forgotten(value) for key, value in item.items()}
    if isinstance(item, list):
        return [forgotten(value) for value in item]
    if isinstance(item, ShardedObject):
        return replace(item, data=None)
    return replace(item, data=torch.ones(item.local_shape).to(item.dtype))


def wanted(place: Place) -> dict[str, Any]:
    """The state as one rank asks for it."""
    template = forgotten(every_form(place))
    template["twice"] = [template["twice"][0], replace(template["twice"][0], data=torch.zeros(9, dtype=torch.int64))]
    template["strided"].data = torch.ones(30, 20).t()
    template["without memory"].data = None
    template["without memory, again"] = replace(template["without memory"])
    template["padded"] = replace(
        template["padded"],
        data=torch.ones(12, 4),
        local_shape=(12, 4),
        global_shape=(12, 4),
    )
    return template  # type: ignore[no-any-return]


def save(state: dict[str, Any], directory: Path, strategy: Any | None = None) -> None:
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    filesystem_async._results_queue = queue.Queue()  # or it starts a server process, which takes seconds
    strategy = strategy or TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    # Its validation divides by the size of an empty tensor.
    dist_checkpointing.save(state, str(directory), strategy, validate_access_integrity=False)


def reading(directory: Path) -> Any:
    return load_strategy(directory)


def bits(value: Any) -> Any:
    """A loaded value in a form that can be compared bit for bit."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return value


BASES: dict[str, tuple[Callable[[], Any], Callable[[Path], Any]]] = {
    "torch_dist": (lambda: None, reading),
    "torch_dist by torch's reader": (lambda: None, lambda directory: load_strategy(directory, "stock")),
    "torch_dist by a collective strategy": (lambda: None, lambda directory: TorchDistLoadShardedStrategy()),
    "zarr": (ZarrSaveShardedStrategy, lambda directory: ZarrLoadShardedStrategy()),
}
"""What saves, and what reads."""


def load_in_both_ways(base: Path) -> dict[str, Any]:
    init_ranks()
    found: dict[str, Any] = {}
    for tp in (1, 2):
        place = Place(tp, dist.get_rank())
        group = place.group()
        for name, (saving, make) in BASES.items():
            directory = base / f"tp{tp} {name}"
            save(every_form(place), directory, saving())
            plain = bits(make(directory).load(wanted(place), directory))
            saved = bits(every_form(place)["divided"].data)
            found[f"tp{tp}, {name}: plain is what was saved"] = plain["divided"] == saved
            template = wanted(place)
            memory = {key: item.data_ptr() for key, item in tensors_of(template).items()}
            two = TwoStageDataParallelLoadShardedStrategy(group, base_strategy=make(directory), **SMALL_ROUNDS)
            loaded = two.load(template, directory)
            found[f"tp{tp}, {name}: equal"] = bits(loaded) == plain
            found[f"tp{tp}, {name}: in place"] = [
                key for key, tensor in flat(loaded).items() if key in memory and tensor.data_ptr() != memory[key]
            ]
            again = [loaded[key].data_ptr() for key in ("without memory", "without memory, again")]
            found[f"tp{tp}, {name}: memory of its own"] = again[0] != again[1]
            found[f"tp{tp}, {name}: read once"] = (
                sum(t.bytes_read for t in two.times),
                two.summarize_load_times() == summary(two.times),
            )
    return found


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {name: leaf for key, item in enumerate(value) for name, leaf in flat(item, f"{path}/{key}").items()}
    return {path: value}


def tensors_of(template: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The memory in which a load is wanted, of what has any and is not empty."""
    leaves = {path: item.data for path, item in flat(template).items() if isinstance(item, ShardedTensor)}
    return {path: data for path, data in leaves.items() if data is not None and data.numel()}


def bytes_once(tp: int) -> int:
    """What of `every_form` is to be read, with one replica of each shard in each data-parallel group."""
    groups = [[Place(tp, rank) for rank in range(first, 4, tp)] for first in range(tp)]
    total = 0
    for group in groups:
        leaves = [leaf for place in group for leaf in flat(wanted(place)).values() if isinstance(leaf, ShardedTensor)]
        sizes = {(leaf.key, leaf.global_offset): prod(leaf.local_shape) * leaf.dtype.itemsize for leaf in leaves}
        total += sum(sizes.values())
    return total


def test_it_loads_what_a_plain_load_does_and_reads_one_replica(tmp_path: Path) -> None:
    for found in run_ranks(load_in_both_ways, 4, tmp_path):
        for tp in (1, 2):
            for name in BASES:
                assert found.pop(f"tp{tp}, {name}: plain is what was saved")
                assert found.pop(f"tp{tp}, {name}: equal")
                assert found.pop(f"tp{tp}, {name}: in place") == []
                assert found.pop(f"tp{tp}, {name}: memory of its own")
                assert found.pop(f"tp{tp}, {name}: read once") == (bytes_once(tp), True)
        assert not found


MIB = 1 << 20


def plain_state(place: Place, sizes: list[int]) -> dict[str, Any]:
    """Tensors of so many MiB, each divided among the tensor-parallel ranks."""
    return {
        str(n): shard(f"tensor {n}", (size * 1024, 256), torch.float32, place.tp_rank, place.tp, place.dp_rank)
        for n, size in enumerate(sizes)
    }


def bytes_read_by(action: Callable[[], Any]) -> int:
    """What this process reads through system calls while `action` runs, as the kernel counts it."""

    def count() -> int:
        return int(COUNTERS.read_text().split()[1])

    before = count()
    action()
    return count() - before


def count_reads(base: Path) -> dict[str, int]:
    init_ranks()
    counted = {}
    for tp in (1, 2):
        place, directory = Place(tp, dist.get_rank()), base / f"tp{tp}"
        group = place.group()
        state = plain_state(place, [2] * 9 + [6])
        save(state, directory)
        for name, ranks_that_share in (("plain", None), ("two-stage", group)):
            strategy = two_stage(reading(directory), ranks_that_share, Ranks.current())
            counted[f"tp{tp} {name}"] = bytes_read_by(lambda: strategy.load(forgotten(state), directory))  # noqa: B023
    return counted


@needs_counters
def test_each_byte_is_read_from_storage_once(tmp_path: Path) -> None:
    counted = run_ranks(count_reads, 4, tmp_path)
    payload = 24 * MIB
    for tp in (1, 2):
        # Beside the values, each tensor's file format has some kilobytes, which are read in blocks.
        once = [rank[f"tp{tp} two-stage"] for rank in counted]
        assert payload <= sum(once) < 1.05 * payload
        assert all(4 * MIB < read < 8 * MIB for read in once)
        everywhere = sum(rank[f"tp{tp} plain"] for rank in counted)
        assert everywhere >= 4 // tp * payload


def peak_growth(base: Path) -> tuple[int, int]:
    """By how much the memory of this process grows during a load, at most, in bytes."""
    init_ranks()
    place = Place(1, dist.get_rank())
    group = place.group()
    state = plain_state(place, [2] * 40)
    save(state, base / "saved")
    template = forgotten(state)
    del state
    limits = {"round_bytes": 8 * MIB, "message_bytes": MIB}

    def load() -> None:
        two = TwoStageDataParallelLoadShardedStrategy(group, base_strategy=reading(base / "saved"), **limits)
        two.load(template, base / "saved")

    load()  # the first one makes connections and imports
    RESET.write_text("5")
    before = status("VmRSS")
    load()
    return status("VmHWM") - before, 80 * MIB


def status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@needs_peak
def test_no_second_copy_of_the_state_is_held(tmp_path: Path) -> None:
    for growth, size in run_ranks(peak_growth, 4, tmp_path):
        assert growth < size / 5


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


@dataclass
class Interrupted:
    """A strategy that reads alone, until something happens on one rank."""

    base: Any
    happens: Callable[[str, int], None]
    """Called with what is about to be done, and how often that was done before."""
    planned: int = 0
    read: int = 0

    def prepare_alone(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Callable[[], Any]:
        self.happens("plan", self.planned)
        self.planned += 1
        read = self.base.prepare_alone(sharded_state_dict, checkpoint_dir)

        def interrupted() -> Any:
            self.happens("read", self.read)
            self.read += 1
            return read()

        return interrupted


FAILURES: dict[str, tuple[str, int, Exception, str]] = {
    "a later round": ("read", 3, OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
    "the first round": ("read", 0, EOFError("Ran out of input"), "EOFError: Ran out of input"),
    "the planning": ("plan", 2, OSError(2, "No such file or directory"), "FileNotFoundError: [Errno 2]"),
    "what cannot be sent to others": ("read", 2, Unpicklable("of its own"), "RuntimeError: Unpicklable: of its own"),
    "an error of ours": ("read", 2, CheckpointDamagedError("the file is short"), "the file is short (rank 2)"),
}


def fail_on_rank_2(base: Path) -> dict[str, Any]:
    init_ranks()
    place = Place(1, dist.get_rank())
    group, directory = place.group(), base / "saved"
    state = {str(n): shard(f"tensor {n}", (2048,), torch.int8, replica=place.rank) for n in range(16)}
    save(state, directory)
    outcomes = {}
    for name, (step, number, error, _) in FAILURES.items():

        def happens(doing: str, times: int, failing: Any = (step, number), error: Exception = error) -> None:
            if (doing, times) == failing and place.rank == 2:
                raise error

        template = forgotten(state)
        strategy = TwoStageDataParallelLoadShardedStrategy(
            group, base_strategy=Interrupted(reading(directory), happens), round_bytes=2048
        )
        try:
            strategy.load(template, directory)
        except CheckpointException as caught:
            typed = load_error(caught, directory, "assume_ok_unexpected")
            untouched = all(bool((item.data == 1).all()) for item in template.values())
            outcomes[name] = (sorted(caught.failures), type(typed).__name__, str(typed), untouched)
    two = TwoStageDataParallelLoadShardedStrategy(group, base_strategy=reading(directory), round_bytes=2048)
    plain = reading(directory).load(forgotten(state), directory)
    outcomes["afterwards"] = bits(two.load(forgotten(state), directory)) == bits(plain)
    return outcomes


def test_what_fails_on_one_rank_fails_alike_on_all(tmp_path: Path) -> None:
    first, *others = run_ranks(fail_on_rank_2, 4, tmp_path, timeout=60)
    for other in others:
        assert {name: outcome[:3] for name, outcome in other.items() if name in FAILURES} == {
            name: outcome[:3] for name, outcome in first.items() if name in FAILURES
        }
    for name, (step, _, error, text) in FAILURES.items():
        ranks, kind, message, untouched = first[name]
        assert ranks == [2]
        assert text in message and "(rank 2)" in message
        assert kind == ("CheckpointMismatchError" if isinstance(error, Unpicklable) else "CheckpointDamagedError")
        assert untouched or step == "read"
    assert first["afterwards"] and all(other["afterwards"] for other in others)


def read_ahead(base: Path) -> bool:
    init_ranks()
    place = Place(1, dist.get_rank())
    group, directory, ahead = place.group(), base / "saved", base / "rank 0 reads its second round"
    state = {str(n): shard(f"tensor {n}", (2048,), torch.int8, replica=place.rank) for n in range(8)}
    save(state, directory)
    template = forgotten(state)

    def happens(doing: str, times: int) -> None:
        if (place.rank, doing, times) == (1, "read", 0):
            wait_for(ahead.exists)
        if (place.rank, doing, times) == (0, "read", 1):
            ahead.touch()
            wait_for(lambda: any(bool((item.data != 1).any()) for item in template.values() if item.key in received))

    received = {f"tensor {n}" for n in (1, 2, 3)}  # of the first round, by the others
    base_strategy = Interrupted(reading(directory), happens)
    two = TwoStageDataParallelLoadShardedStrategy(group, base_strategy=base_strategy, round_bytes=2048)
    return bool(bits(two.load(template, directory)) == bits({key: item.data for key, item in state.items()}))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what was to overlap does not")
        time.sleep(0.01)


def test_the_next_round_is_read_while_others_still_read_and_exchange(tmp_path: Path) -> None:
    """Rank 1 ends its first round only when rank 0 has begun its second, and that only ends when the first arrives."""
    assert run_ranks(read_ahead, 4, tmp_path, timeout=90) == [True] * 4


def measure(base: Path) -> dict[str, Any]:
    init_ranks()
    place = Place(1, dist.get_rank())
    group, ranks = dist.new_group(), Ranks.current()
    outcomes: dict[str, Any] = {}
    sizes = {"small": [2] * 4, "large": [2] * 5}
    for name, tensors in sizes.items():
        state = plain_state(place, tensors)
        save(state, base / name)
        strategy = two_stage(reading(base / name), Measured(group, small_bytes=8 * MIB), ranks)
        loaded = strategy.load(forgotten(state), base / name)
        equal = bits(loaded) == bits({key: item.data for key, item in state.items()})
        outcomes[name] = (equal, strategy.choice.once, strategy.choice.reason, bool(strategy.times))
    return outcomes


def test_auto_measures_and_all_ranks_choose_alike(tmp_path: Path) -> None:
    first, second = run_ranks(measure, 2, tmp_path)
    assert first == second
    equal, once, reason, in_two_stages = first["small"]
    assert (equal, once, in_two_stages) == (True, False, False)
    assert reason == "no rank loads more than 8 MiB"
    equal, once, reason, in_two_stages = first["large"]
    assert equal and once is in_two_stages
    assert reason.startswith("with 2 replicas, ")


def load_by_the_format(base: Path) -> list[bool]:
    init_ranks()
    place = Place(2, dist.get_rank())
    group, ranks, directory = place.group(), Ranks.current(), base / "saved"
    save({**every_form(place), "common": {"iteration": 7}}, directory)

    def load(shared: Any) -> Any:
        loaded = torch_dist.load(
            wanted(place),
            directory,
            ranks,
            LoadOptions(strictness="raise_all", parallelization_group=shared, validate_access=False),
        )
        return bits(loaded.state_dict)

    plain = load(None)
    return [plain["common"] == {"iteration": 7}, load(group) == plain, load(Measured(group, 0)) == plain]


def test_the_format_loads_in_two_stages_where_it_is_given_a_group(tmp_path: Path) -> None:
    assert run_ranks(load_by_the_format, 4, tmp_path) == [[True, True, True]] * 4


def test_the_summary_tells_the_slowest_ranks_times() -> None:
    times = [
        LoadTimes(reading=1.0, exchanging=0.5, waiting=0.25, total=2.0, bytes_read=15 * 10**8, bytes_wanted=2 * 10**9),
        LoadTimes(reading=0.5, exchanging=1.5, total=1.5, bytes_read=5 * 10**8, bytes_wanted=2 * 10**9),
    ]
    assert summary(times) == (
        "two-stage load: 2 ranks read 2,000,000,000 bytes for the 4,000,000,000 that they load, in 2.00 s (1.00 GB/s); "
        "the slowest took 1.00 s reading, 1.50 s exchanging, 0.25 s waiting"
    )
