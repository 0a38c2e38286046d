"""Training time that an asynchronous save costs, on a real training loop: this project beside the others.

    .venv/bin/python -m scripts.benchmarks.training [--layers N] [--hidden-size N] [--rounds N]
        [--warm-up N] [--saves N] [--peer-saves N] [--directory DIR] [--json FILE] [--markdown FILE]

For each way to save, a process trains a GPT of megatron-core's with Adam, which writes to all parameters and moments in
every step. The processes take turns, and only one works at a time. "Lost" is what the time from the beginning of a save
to the end of the step in which it is found complete exceeds that of the same number of undisturbed steps: the save
itself, and all that slows down the steps beside it, copies of pages after a fork included.

    copy             one copy of what is saved, into memory that was touched before; nothing is written
    copy and write   the same, and another process writes as many bytes past the page cache: what no save does without
    direct           this project's manager
    stock            the same with `io_backend: stock`: a fork writes
    megatron         megatron-core's, with its plan cached: a fork writes
    dcp thread       torch.distributed.checkpoint.async_save
    dcp process      the same in another process

"Looks" are questions after each step whether the save is complete, and, for this project, the publication of the
checkpoint. "Noise" is what the steps after the copy lose, which is nothing but the machine's unrest. "Extra memory" is
how much more than training alone at its start a way holds at most, with all processes that it has started, divided by
the size of the state; for the second half of the saves it is given again, and should be the same. The last save of each
way is read back with torch's and megatron-core's readers and compared with what the state was when it began.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks import _gpt, _ranks, _ways
from scripts.benchmarks._command import add_directory, command, hand_out
from scripts.benchmarks._processes import PeakMemory, processor_seconds

WAYS = ("copy", "copy and write", "direct", "stock", "megatron", "dcp thread", "dcp process")
STEPS = 3
"""Beside a save, at least; and undisturbed ones before it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all ways and write the table."""
    parser = command(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not counted: megatron-core plans twice")
    parser.add_argument("--saves", type=int, default=100, help="of this project's, for the memory; at least 2")
    parser.add_argument("--peer-saves", type=int, default=6, help="of each other way, for the memory; at least 2")
    add_directory(parser)
    options = parser.parse_args(arguments)
    if min(options.saves, options.peer_saves) < 2:
        parser.error("--saves and --peer-saves must be at least 2")
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.directory, ignore_cleanup_errors=True) as directory:
        report = _measure(Path(directory), options)
    hand_out(report, markdown(report), options)
    return 0 if all(way["is what it was"] for way in report["ways"].values()) else 1


def _measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    from bridge import accelerator

    accelerator.enable()
    import megatron.core  # noqa: F401  (imported here so that the processes need not)
    import torch.distributed.checkpoint  # noqa: F401

    import bridge.training.train  # noqa: F401

    trainers = {way: _Trainer(way, directory / way.replace(" ", "-"), options) for way in WAYS}
    found: dict[str, dict[str, Any]] = {}
    try:
        for way, trainer in trainers.items():
            found[way] = {"state": trainer.state, "first": trainer.save(), "rounds": []}
        for number in range(options.warm_up + options.rounds):
            for way, trainer in trainers.items():
                measured = trainer.save()
                if number >= options.warm_up:
                    found[way]["rounds"].append(measured)
        for way, trainer in trainers.items():
            saves = options.saves if way == "direct" else options.peer_saves
            peaks = [trainer.peak_of_a_save() / trainer.state for _ in range(saves)]
            found[way]["saves"] = saves
            found[way]["extra memory"] = max(peaks)
            found[way]["extra memory, second half"] = max(peaks[saves // 2 :])
            found[way]["is what it was"] = trainer.ask("check")
    finally:
        for trainer in trainers.values():
            trainer.close()
    return {"rounds": options.rounds, "state": found["copy"]["state"], "ways": found, "ratios": ratios(found)}


def ratios(ways: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as much training time as this project's ways the others lose: of the medians, by pair."""
    lost = {way: statistics.median(each["lost"] for each in found["rounds"]) for way, found in ways.items()}
    copy = statistics.median(each["stall"] for each in ways["copy"]["rounds"])
    found = {"direct / copy": lost["direct"] / copy}
    found["direct / copy and write"] = lost["direct"] / max(lost["copy and write"], 1e-9)
    for way in WAYS[3:]:
        found[f"{way} / direct"] = lost[way] / max(lost["direct"], 1e-9)
    return found


class _Trainer:
    """A process that trains and saves when it is told to."""

    def __init__(self, way: str, directory: Path, options: argparse.Namespace) -> None:
        directory.mkdir(parents=True)
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, way, directory, options.layers, options.hidden_size)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        theirs.close()
        self.state = int(self.ask("size"))
        """Bytes of what is saved."""
        assert self._process.pid is not None  # noqa: S101
        self._pid = self._process.pid
        with PeakMemory(self._pid) as peak:
            self.ask("steps")
        self._memory = peak.bytes

    def ask(self, what: str) -> Any:
        """Have something done; what comes of it."""
        self._pipe.send(what)
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def save(self) -> dict[str, float]:
        """Save, beside training; seconds."""
        a_step = self.ask("steps")
        begun = processor_seconds(self._pid)
        measured: dict[str, float] = self.ask("save")
        measured["processor"] = processor_seconds(self._pid) - begun - measured.pop("steps") * a_step
        return measured

    def peak_of_a_save(self) -> int:
        """Save; the most bytes that are held meanwhile, beside the most that training alone held at the start."""
        with PeakMemory(self._pid) as peak:
            self.ask("save_briefly")
        return max(0, peak.bytes - self._memory)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # it has ended by itself
            self._pipe.send("close")
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Any, way: str, directory: Path, layers: int, hidden: int) -> None:
    import torch

    torch.set_num_threads(1)
    _ranks.become_rank(0, 1, _ranks.free_port())
    try:
        work = _Work(way, directory, layers, hidden)
    except BaseException as error:
        pipe.recv()
        pipe.send(RuntimeError(f"{way}: {error!r}"))
        raise
    while True:
        asked = pipe.recv()
        if asked == "close":
            break
        try:
            pipe.send(getattr(work, asked)())
        except BaseException as error:
            pipe.send(RuntimeError(f"{way}, {asked}: {error!r}"))
            raise
    work.close()


class _Work:
    """One way to save, in its process."""

    def __init__(self, way: str, directory: Path, layers: int, hidden: int) -> None:
        ways: dict[str, Callable[[Any, Path], Any]] = {
            "copy": _ways.Copy,
            "copy and write": _ways.CopyAndWrite,
            "megatron": _ways.Megatron,
            "dcp thread": lambda run, place: _ways.Dcp(run, place, process=False),
            "dcp process": lambda run, place: _ways.Dcp(run, place, process=True),
        }
        settings = {"async_save": True, "io_backend": "stock" if way == "stock" else "direct"}
        self._run = _gpt.gpt_run(directory / "run", layers, hidden, **settings)
        for _ in range(2):
            _gpt.step(self._run)
        self._way = ways.get(way, _ways.Manager)(self._run, directory)
        self._undisturbed = 0.0

    def size(self) -> int:
        """Bytes of the tensors that are saved."""
        return sum(tensor.nbytes for tensor in _gpt.tensors_of(_gpt.sharded_state(self._run)).values())

    def steps(self) -> float:
        """Train undisturbed; seconds of the processor of one step."""
        gc.collect()
        seconds, processor = [], time.process_time()
        for _ in range(STEPS):
            begun = time.perf_counter()
            _gpt.step(self._run)
            seconds.append(time.perf_counter() - begun)
        self._undisturbed = statistics.median(seconds)
        return (time.process_time() - processor) / STEPS

    def save_briefly(self) -> None:
        """Save, and train until that is complete."""
        self._save(1)

    def save(self) -> dict[str, float]:
        """Save while training goes on."""
        return self._save(STEPS)

    def _save(self, least: int) -> dict[str, float]:
        self._way.prepare()
        begun = time.perf_counter()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self._way.save()
        stall = time.perf_counter() - begun
        steps, complete, looks = 0, 0.0, 0.0
        while steps < least or not complete:
            _gpt.step(self._run)
            steps += 1
            if not complete:
                looked = time.perf_counter()
                is_saved = self._way.is_saved()
                ended = time.perf_counter()
                looks += ended - looked
                complete = ended - begun if is_saved else 0.0
        whole = time.perf_counter() - begun
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        self._way.clean()
        lost = whole - steps * self._undisturbed
        found = {"stall": stall, "looks": looks, "lost": lost, "complete": complete, "page faults": faults}
        return {**found, "steps": steps}

    def check(self) -> bool:
        """Save once more, and compare what is read back by others' readers with what the state was."""
        import torch

        before = {name: tensor.clone() for name, tensor in _gpt.live_tensors(self._run).items()}
        self._way.prepare()
        self._way.save()
        _gpt.step(self._run)
        while not self._way.is_saved():
            time.sleep(0.01)
        loaded = self._way.read()
        self._way.clean()
        return before.keys() <= loaded.keys() and all(torch.equal(loaded[name], before[name]) for name in before)

    def close(self) -> None:
        """End everything."""
        self._way.close()
        _ranks.leave()


def markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    size = report["state"] / 2**20
    lines = [
        f"{size:,.0f} MiB of state, median of {report['rounds']} rounds, seconds",
        "",
        "| way | lost | of that in the save | in looks and publication | complete | processor | page faults "
        "| first save | extra memory | in the second half |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way, found in report["ways"].items():
        peaks = found["extra memory"], found["extra memory, second half"]
        middle = {
            name: statistics.median(each[name] for each in found["rounds"])
            for name in ("lost", "stall", "looks", "complete", "processor", "page faults")
        }
        lines.append(
            f"| {way} | {middle['lost']:.3f} | {middle['stall']:.3f} | {middle['looks']:.3f} "
            f"| {middle['complete']:.2f} | {middle['processor']:.2f} | {middle['page faults']:,.0f} "
            f"| {found['first']['stall']:.2f} | {peaks[0]:.2f} | {peaks[1]:.2f} |"
        )
    noise = [each["lost"] - each["stall"] for each in report["ways"]["copy"]["rounds"]]
    lines += ["", f"Noise: from {min(noise):+.3f} to {max(noise):+.3f} s.", "", "| ratio | |", "|---|---|"]
    lines += [f"| {pair} | {ratio:.2f} |" for pair, ratio in report["ratios"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
