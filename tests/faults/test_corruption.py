"""Every kind of damage to every kind of file of a checkpoint: found before anything of a run has changed, and survived.

One trained run is copied for each case, and damaged from outside. A load with `fallback: false` has to say which file
it is and leave the run bit for bit as it was; a load with the fallback has to end where a load of the checkpoint before
it ends. Then our own parsers are given anything: whatever it is, they return or raise an error of ours, in bounded
memory.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.training.checkpointing import CheckpointError, load_checkpoint, marks
from bridge.training.checkpointing.contents.run_config import read_run_config
from bridge.training.checkpointing.detection import get_checkpoint_format, read_metadata
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.io.stored import open_stored
from bridge.training.checkpointing.layout import list_checkpoints
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata
from bridge.training.checkpointing.starts import STARTS
from bridge.training.checkpointing.trackers import read_tracker, sound_tracker
from bridge.training.setup import Run, setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, run_to_end, tiny_config

NEWEST, OLDER = "iter_0000004", "iter_0000002"
TRACKER, LEGACY_TRACKER = "latest_train_state.pt", "latest_checkpointed_iteration.txt"
FILES = (
    *("__0_0.distcp", ".metadata", ".metadata.bridge", "common.pt", "metadata.json", "train_state.pt"),
    *("run_config.yaml", "manifest.json", "tokenizer/vocab.txt", "dataloader_state/train_dataloader_dprank000.pt"),
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(250))]


def config(directory: Path, **checkpoint: Any) -> Any:
    tokenizer = {
        "tokenizer_type": "BertWordPieceCase",
        "vocab_size": None,
        "vocab_file": str(directory.parent / "vocab.txt"),
    }
    return tiny_config(train_iters=4, tokenizer=tokenizer, checkpoint={"save_interval": 2, **checkpoint})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By world size: checkpoints of iterations 2 and 4."""
    directories = {}
    for ranks in (1, 2):
        save = tmp_path_factory.mktemp(f"saved-by-{ranks}") / "save"
        (save.parent / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
        run_ranks(run_to_end, ranks, config(save, save=str(save)))
        directories[ranks] = save
    return directories


# The damage. Each function is given a file and the same file of the other iteration.


def flip(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    # Of a large file, a byte that no sample reads.
    data[len(data) // 30 if len(data) > 100_000 else len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def extend(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def zero_the_end(file: Path, other: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))


def delete(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes())


def make_a_directory(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


def make_a_link_to_nothing(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to("gone")


DAMAGE: tuple[Callable[[Path, Path], None], ...] = (
    *(flip, truncate, empty, extend, zero_the_end, delete, swap, make_a_directory, make_a_link_to_nothing),
)


@dataclass(frozen=True)
class Outcome:
    """What came of one load."""

    name: str
    error: str
    """Empty where it succeeded."""
    loaded: str
    """The directory that was loaded."""
    state: dict[str, str]
    """Digests of the run afterwards."""
    marked: tuple[str, ...]
    damaged: bool
    """Whether the damage changed anything at all."""


def load(run: Run, directory: Path, **settings: Any) -> tuple[str, str]:
    """Load into a run whatever it is; the error and what was loaded."""
    for name, value in {"integrity": "sizes", "fallback": True, "ckpt_step": None, "save": None, **settings}.items():
        setattr(run.cfg.checkpoint, name, value)
    run.cfg.checkpoint.load = str(directory)
    run.state.loaded_from = None
    try:
        load_checkpoint(run.state, run.model, run.optimizer, run.scheduler)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}", ""
    return "", Path(run.state.loaded_from or "").name


def outcomes(
    saved: Path, scratch: Path, cases: list[tuple[str, Callable[[Path], None]]], **settings: Any
) -> tuple[dict[str, dict[str, str]], list[Outcome]]:
    """In one process: what the run is before, after each whole checkpoint, and after the load of each damaged copy."""
    run = setup(config(saved))
    whole = {"before": digests(run)}
    for step in (2, 4):
        assert load(run, saved, ckpt_step=step) == ("", f"iter_000000{step}")
        whole[f"iter_000000{step}"] = digests(run)
    found: list[Outcome] = []
    state = whole[NEWEST]
    for number, (name, inflict) in enumerate(cases):
        copy = scratch / str(number)
        if state != whole[NEWEST]:
            load(run, saved, ckpt_step=4)
            assert digests(run) == whole[NEWEST]
        shutil.copytree(saved, copy)
        before = contents(copy)
        inflict(copy)
        changed = contents(copy) != before
        save = {"save": str(copy)} if settings.get("fallback", True) else {}
        error, loaded = load(run, copy, **settings, **save)
        marked = tuple(path.name for path in sorted(copy.glob("iter_*")) if marks.is_marked(path))
        state = digests(run)
        found.append(Outcome(name, error, loaded, state, marked, changed))
        shutil.rmtree(copy)
    return whole, found


def contents(directory: Path) -> dict[str, Any]:
    return {str(path): path.read_bytes() if path.is_file() else path.is_dir() for path in directory.rglob("*")}


def in_newest(damage: Callable[[Path, Path], None], name: str) -> Callable[[Path], None]:
    return lambda copy: damage(copy / NEWEST / name, copy / OLDER / name)


CASES = [(f"{damage.__name__} {name}", in_newest(damage, name)) for name in FILES for damage in DAMAGE]


@pytest.mark.parametrize("integrity", ["sizes", "full"])
def test_damage_is_found_before_anything_has_changed(saved: dict[int, Path], tmp_path: Path, integrity: str) -> None:
    ((whole, found),) = run_ranks(lambda: outcomes(saved[1], tmp_path, CASES, integrity=integrity, fallback=False), 1)
    for outcome in found:
        if not outcome.damaged:  # both iterations have the same file
            assert outcome.name.startswith("swap "), outcome.name
            assert (outcome.error, outcome.loaded) == ("", NEWEST), outcome.name
        elif integrity == "sizes" and outcome.name == "flip __0_0.distcp":
            assert outcome.error == ""
        else:
            assert outcome.error.startswith("CheckpointDamagedError: "), outcome
            assert outcome.name.split()[1].split("/")[-1] in outcome.error, outcome
            assert outcome.state == whole[NEWEST], f"{outcome.name} changed the run: {outcome.error}"
    assert sum(outcome.damaged for outcome in found) >= len(CASES) - 4


def test_the_fallback_ends_where_a_load_of_the_older_checkpoint_ends(saved: dict[int, Path], tmp_path: Path) -> None:
    # All damage to the shards, and each other file with two kinds of it.
    cases = [case for number, case in enumerate(CASES) if case[0].endswith(".distcp") or number % 4 == 0]
    assert {name.split()[1] for name, _ in cases} == set(FILES)
    ((whole, found),) = run_ranks(lambda: outcomes(saved[1], tmp_path, cases, integrity="full"), 1)
    for outcome in found:
        expected = OLDER if outcome.damaged else NEWEST
        assert (outcome.error, outcome.loaded) == ("", expected), outcome
        assert outcome.state == whole[expected], outcome.name
        assert outcome.marked == ((NEWEST,) if outcome.damaged else ()), outcome.name


def in_place(name: str, damage: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """Damage to a tracker; the other iteration's is a copy of its train state, or its number."""

    def inflict(copy: Path) -> None:
        other = copy / "other"
        other.write_bytes((copy / OLDER / "train_state.pt").read_bytes() if name == TRACKER else b"2")
        damage(copy / name, other)
        other.unlink()

    return inflict


TRACKER_CASES = [(f"{d.__name__} {name}", in_place(name, d)) for name in (TRACKER, LEGACY_TRACKER) for d in DAMAGE]


def test_a_damaged_tracker_loses_nothing(saved: dict[int, Path], tmp_path: Path) -> None:
    """Either of them is enough to find the newest checkpoint."""
    ((whole, found),) = run_ranks(outcomes, 1, saved[1], tmp_path, TRACKER_CASES)
    for outcome in found:
        assert (outcome.error, outcome.loaded, outcome.marked) == ("", NEWEST, ()), outcome
        assert outcome.state == whole[NEWEST], outcome.name


def test_a_damaged_tracker_is_an_error_without_the_fallback(saved: dict[int, Path], tmp_path: Path) -> None:
    ((whole, found),) = run_ranks(lambda: outcomes(saved[1], tmp_path, TRACKER_CASES, fallback=False), 1)
    for outcome in found:
        # Ours leads; Megatron-LM's is only warned of, because a crash between the two leaves it behind.
        if outcome.name == f"delete {TRACKER}" or outcome.name.endswith(LEGACY_TRACKER):
            assert (outcome.error, outcome.loaded) == ("", NEWEST), outcome
        else:
            assert outcome.error.startswith("CheckpointDamagedError: "), outcome
            assert TRACKER in outcome.error, outcome
            assert outcome.state == whole[NEWEST], outcome.name


def both_trackers(damage: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    def inflict(copy: Path) -> None:
        in_place(TRACKER, damage)(copy)
        in_place(LEGACY_TRACKER, damage)(copy)

    return inflict


def the_starts(damage: Callable[[Path, Path], None], *, without_trackers: bool) -> Callable[[Path], None]:
    """Damage to what the run has noted of its starts; where no tracker helps, they are all that orders checkpoints."""

    def inflict(copy: Path) -> None:
        other = copy / "other"
        other.write_text("[[1, 2, 0]]")
        damage(copy / STARTS, other)
        other.unlink()
        for tracker in (TRACKER, LEGACY_TRACKER) if without_trackers else ():
            (copy / tracker).unlink()

    return inflict


STARTS_CASES = [
    (f"{damage.__name__} {without}", the_starts(damage, without_trackers=without))
    for damage in DAMAGE
    for without in (False, True)
]


def test_damaged_or_lost_notes_of_the_starts_lose_nothing(saved: dict[int, Path], tmp_path: Path) -> None:
    ((whole, found),) = run_ranks(outcomes, 1, saved[1], tmp_path, STARTS_CASES)
    for outcome in found:
        if outcome.name.startswith("make_a_directory "):  # somebody has to look: it may be readable later
            assert "what it knows of the run's starts cannot be read: [Errno 21] Is a directory" in outcome.error
            assert outcome.error.endswith(".bridge-starts readable, or move it away if it is no file")
        else:
            assert (outcome.error, outcome.loaded, outcome.marked) == ("", NEWEST, ()), outcome
        assert outcome.state == whole[NEWEST], outcome.name


def whole_directory(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda copy: change(copy / NEWEST)


def replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def replace_by_a_link_to_nothing(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("gone")


def keep_nothing(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DIRECTORY_CASES = [
    *((f"both trackers: {damage.__name__}", both_trackers(damage)) for damage in (empty, delete, make_a_directory)),
    *(
        (change.__name__, whole_directory(change))
        for change in (shutil.rmtree, keep_nothing, replace_by_a_file, replace_by_a_link_to_nothing)
    ),
]


def test_lost_trackers_and_lost_directories_are_survived(saved: dict[int, Path], tmp_path: Path) -> None:
    ((whole, found),) = run_ranks(outcomes, 1, saved[1], tmp_path, DIRECTORY_CASES)
    for outcome in found:
        expected = NEWEST if outcome.name.startswith("both") else OLDER
        assert (outcome.error, outcome.loaded) == ("", expected), outcome
        assert outcome.state == whole[expected], outcome.name


def link_out_of_it(copy: Path) -> None:
    (copy / NEWEST / "common.pt").unlink()
    (copy / NEWEST / "common.pt").symlink_to("/etc/passwd")


def test_what_is_unsafe_is_never_passed_over(saved: dict[int, Path], tmp_path: Path) -> None:
    ((whole, (outcome,)),) = run_ranks(outcomes, 1, saved[1], tmp_path, [("link", link_out_of_it)])
    assert outcome.error.startswith("UnsafeCheckpointError: "), outcome
    assert (outcome.state, outcome.marked) == (whole[NEWEST], ())


SHARED_CASES = [
    ("flip", in_newest(flip, "__1_0.distcp")),
    ("swap", in_newest(swap, "__0_0.distcp")),
    ("delete", in_newest(delete, "__1_0.distcp")),
    ("manifest", in_newest(flip, "manifest.json")),
]


def test_two_ranks_agree_on_what_is_damaged_and_on_what_to_load(saved: dict[int, Path], tmp_path: Path) -> None:
    def both(scratch: Path, **settings: Any) -> list[Any]:
        """The damage is inflicted once, on rank 0, in copies that both ranks load."""
        import torch.distributed as dist

        run = setup(config(saved[2]))
        found = []
        for name, inflict in SHARED_CASES:
            load(run, saved[2], ckpt_step=4)
            before = digests(run)
            if dist.get_rank() == 0:
                shutil.copytree(saved[2], scratch / name)
                inflict(scratch / name)
            dist.barrier()
            save = {"save": str(scratch / name)} if settings.get("fallback", True) else {}
            error, loaded = load(run, scratch / name, **settings, **save)
            found.append((error, loaded, digests(run) == before, marks.problem_of(scratch / name / NEWEST)))
        load(run, saved[2], ckpt_step=2)
        return [*found, digests(run)]

    (*refused, _), (*refused_too, _) = run_ranks(
        lambda: both(tmp_path / "refused", integrity="full", fallback=False), 2
    )
    assert refused == refused_too
    assert [(loaded, unchanged, problem) for _, loaded, unchanged, problem in refused] == [("", True, None)] * 4
    record = next(r for r in read_manifest(saved[2] / NEWEST).files if r.name == "__1_0.distcp")  # type: ignore[union-attr]
    flipped = refused[0][0]
    assert flipped.startswith(
        f"CheckpointDamagedError: {tmp_path / 'refused' / 'flip' / NEWEST} is damaged: __1_0.distcp has xxh3 "
    )
    assert flipped.endswith(f" instead of {record.checksum}")
    assert "__0_0.distcp has " in refused[1][0]
    assert "__1_0.distcp is missing" in refused[2][0]
    assert "manifest.json is not a readable manifest" in refused[3][0]

    (*went_back, _), (*went_back_too, _) = run_ranks(lambda: both(tmp_path / "back", integrity="full"), 2)
    assert went_back == went_back_too
    assert [(error, loaded) for error, loaded, _, _ in went_back] == [("", OLDER)] * 4
    assert all(
        problem.replace("/back/", "/refused/") in error
        for (_, _, _, problem), (error, *_) in zip(went_back, refused, strict=True)
    )


# Our own parsers


@dataclass(frozen=True)
class Parser:
    """One reader of ours, and a good file for it."""

    file: str
    read: Callable[[Path], Any]
    seal: Callable[[bytes], bytes] = bytes
    """Makes its own checksum fit again, so that what it holds is looked at."""


def seal_compact(data: bytes) -> bytes:
    return data[:-8] + xxhash.xxh3_64_digest(data[:-8])


PARSERS = {
    "manifest": Parser(f"{NEWEST}/manifest.json", lambda base: read_manifest(base / NEWEST)),
    "run_config": Parser(f"{NEWEST}/run_config.yaml", lambda base: read_run_config(base / NEWEST)),
    "payload metadata": Parser(f"{NEWEST}/.metadata", lambda base: read_payload_metadata(base / NEWEST)),
    "compact metadata": Parser(f"{NEWEST}/.metadata.bridge", lambda base: open_stored(base / NEWEST).metadata()),
    "compact metadata, sealed": Parser(
        f"{NEWEST}/.metadata.bridge", lambda base: open_stored(base / NEWEST).metadata(), seal_compact
    ),
    "metadata.json": Parser(f"{NEWEST}/metadata.json", lambda base: get_checkpoint_format(base / NEWEST)),
    "tracker": Parser(TRACKER, lambda base: read_tracker(list_checkpoints(base))),
    "legacy tracker": Parser(LEGACY_TRACKER, lambda base: read_metadata(base / LEGACY_TRACKER)),
    "both trackers": Parser(TRACKER, lambda base: sound_tracker(list_checkpoints(base), fallback=True)),
    "mark": Parser(f"{NEWEST}/.bridge-damaged", lambda base: marks.problem_of(base / NEWEST)),
}


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bytes from anywhere, or a few changes of a good file: bits, cuts, repetitions and pieces of other places."""
    if draw(st.integers(0, 4)) == 0:
        data = draw(st.binary(max_size=300))
        return lambda good: data
    seed, count = draw(st.integers(0, 2**32)), draw(st.integers(1, 8))

    def mutate(good: bytes) -> bytes:
        source, data = random.Random(seed), bytearray(good)
        for _ in range(count):
            start = source.randrange(len(data) + 1)
            end = min(len(data), start + source.choice([1, 2, 8, 100]))
            kind = source.randrange(5)
            if kind == 0 and start < len(data):
                data[start] ^= 1 << source.randrange(8)
            elif kind == 1:
                del data[start:end]
            elif kind == 2:
                data[start:end] = source.randbytes(end - start)
            elif kind == 3:
                data[start:start] = data[start:end] * source.choice([1, 3, 50])
            else:
                data[start:end] = source.choice([b"9" * 30, b"[" * 400, b"{" * 400, b"&a [*a, *a]", b"\xff" * 8])
        return bytes(data)

    return mutate


@pytest.fixture(scope="module")
def fuzzed(saved: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the small files, to overwrite again and again."""
    directory = tmp_path_factory.mktemp("fuzzed") / "save"
    shutil.copytree(saved[1], directory, ignore=shutil.ignore_patterns("*.distcp"))
    marks.mark(directory / NEWEST, "x is missing")
    yield directory


MEMORY = 64 << 20
"""Bytes that reading a file of a few hundred kilobytes may take at once."""


@pytest.mark.parametrize("name", PARSERS)
@settings(
    max_examples=int(os.environ.get("BRIDGE_FUZZ_EXAMPLES", "120")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutate=mutations())
def test_parsers_of_ours_return_or_raise_errors_of_ours(
    fuzzed: Path, name: str, mutate: Callable[[bytes], bytes]
) -> None:
    parser = PARSERS[name]
    file = fuzzed / parser.file
    good = file.read_bytes()
    file.write_bytes(parser.seal(mutate(good)))
    tracemalloc.start()
    try:
        parser.read(fuzzed)
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        file.write_bytes(good)
    assert peak < MEMORY


BOMBS = {
    "deep lists": ("manifest", b"[" * 1_000_000),
    "deep mappings": ("run_config", b"{" * 50_000),
    "doubling aliases": (
        "run_config",
        b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 60)),
    ),
    "a long number": ("legacy tracker", b"9" * 100_000),
    "a long number in the manifest": ("manifest", b'{"format_version": ' + b"9" * 100_000 + b"}"),
    "a pickle that repeats itself": ("payload metadata", pickle.dumps([[0] * 1000] * 1000)),
    "a pickle that claims to be long": ("payload metadata", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f"),
    "a memo far out": ("payload metadata", b"\x80\x04Nr\xff\xff\xff\x7f."),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_would_unfold_do_not(fuzzed: Path, name: str) -> None:
    parser, data = PARSERS[BOMBS[name][0]], BOMBS[name][1]
    file = fuzzed / parser.file
    good = file.read_bytes()
    file.write_bytes(data)
    tracemalloc.start()
    try:
        parser.read(fuzzed)
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        file.write_bytes(good)
    assert peak < MEMORY
