"""The main job in one command: train, save, be killed, resume, and compare with a run that never stopped.

Run A trains on two ranks to its end. Run B is the same run, but after its second checkpoint all of its
processes get SIGKILL, between two saves. Run B is then started again with the same command: it finds its
checkpoint through the tracker and goes on. The table at the end holds every loss of both runs.

Both runs are watched from outside only: through the metrics file and the checkpoint directory.
The ranks train on the CPU, also where there is a GPU, so that every machine does the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

ROOT = Path(__file__).resolve().parent.parent
PREPARE_DATA = shlex.split("scripts/prepare_data.py --stdlib --output data/quickstart --vocab-size 4096")
TRAIN = shlex.split(
    "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2"
    " scripts/pretrain.py --recipe recipes/quickstart.yaml --overlay configs/checkpoint/async.yaml"
)
OWNER_MARK = ".made-by-quickstart"
"""The file that tells a directory which quickstart may delete from one that it may not."""
RUN_VARIABLE = "BRIDGE_QUICKSTART_RUN"
"""Environment variable by which every process of a run is found, whoever its parent is by now."""
POLL_SECONDS = 0.05
REPORT_SECONDS = 2.0
STALL_SECONDS = 300.0


class StepFailedError(Exception):
    """A step did not do what it had to. `log` holds the output of its processes, if it had any."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


def shown(path: Path) -> Path:
    """`path` as commands and messages name it: relative to the repository where it lies inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def read_losses(metrics: Path) -> list[tuple[int, float]]:
    """(iteration, loss) of every line of a metrics file, in file order.

    A line that is not complete, because it is being written or its writer was killed, is left out.
    """
    losses = []
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            losses.append((int(record["iteration"]), float(record["loss"])))
    return losses


def published_iterations(save_dir: Path) -> list[int]:
    """Iterations of the published checkpoints, oldest first."""
    names = [path.name for path in save_dir.iterdir()] if save_dir.exists() else []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"iter_(\d{7,})", name)))


def save_in_progress(save_dir: Path) -> bool:
    """Whether a save is under way, or was cut off."""
    return any(save_dir.glob(".saving-*"))


def tracked_iteration(save_dir: Path) -> int:
    """The iteration that the tracker names: the next start of the run continues from there."""
    return int((save_dir / "latest_checkpointed_iteration.txt").read_text())


def is_between_saves(iteration: int, published: Sequence[int], saving: bool, save_interval: int) -> bool:
    """Whether a run that completed `iteration` is to be killed now: two checkpoints, and no save near."""
    if saving or len(published) < 2:
        return False
    return 3 <= iteration - published[-1] <= save_interval - 2


def processes_of(run_id: str) -> list[int]:
    """Process ids of everything that a job started, directly or not, and that still lives."""
    mark = f"{RUN_VARIABLE}={run_id}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or somebody else's
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def show_command(command: Sequence[str]) -> None:
    """Print a command as one could type it."""
    lines = textwrap.wrap(shlex.join(command), 100, break_long_words=False, break_on_hyphens=False)
    print("  $ " + " \\\n      ".join(lines), flush=True)


class Job:
    """A Python command in a session of its own, its output in a log file; leaving a `with` block kills it.

    torchrun starts every rank in a session of its own, and a rank its background writers, so the
    processes are found by a variable in their environment, not by their process group.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        show_command([str(shown(Path(sys.executable))), *arguments])
        self.log = log
        self._run_id = uuid.uuid4().hex
        environment = os.environ | {
            RUN_VARIABLE: self._run_id,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        # All ranks are on this machine. Left alone, gloo takes the host name's address, which may be a VPN's.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def exit_status(self) -> int | None:
        """The exit status, or None while the command runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL to every process of the job; returns when none is left.

        Raises:
            StepFailedError: some process was still there after 10 seconds.
        """
        deadline = time.monotonic() + 10
        while pids := processes_of(self._run_id):
            if time.monotonic() > deadline:
                raise StepFailedError(f"processes {pids} survive SIGKILL", self.log)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self._process.wait()


class Progress:
    """One line about the current step, renewed in place on a terminal, repeated now and then elsewhere."""

    def __init__(self) -> None:
        self._in_place = sys.stdout.isatty()
        self._last_text = ""
        self._last_time = 0.0

    def show(self, text: str, final: bool = False) -> None:
        """Show `text` if it is new and the last one is old enough; a `final` text is always shown."""
        now = time.monotonic()
        if not final and (text == self._last_text or now - self._last_time < REPORT_SECONDS):
            return
        self._last_text, self._last_time = text, now
        if self._in_place:
            print(f"\r\033[K  {text}", end="\n" if final else "", flush=True)
        else:
            print(f"  {text}", flush=True)


@dataclass(frozen=True)
class Run:
    """A training run: where its files lie, how long it is and how often it saves."""

    directory: Path
    iterations: int
    save_interval: int

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.directory / "log.txt"

    def arguments(self) -> list[str]:
        """What follows `python`. `load` is `save`: the first start finds nothing, the second resumes."""
        return [
            *TRAIN,
            f"train.train_iters={self.iterations}",
            f"checkpoint.save={shown(self.checkpoints)}",
            f"checkpoint.load={shown(self.checkpoints)}",
            f"checkpoint.save_interval={self.save_interval}",
            f"logger.metrics_path={shown(self.metrics)}",
        ]

    def start(self) -> Job:
        """Start the run, or start it again."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return Job(self.arguments(), self.log)


def train(run: Run, kill_between_saves: bool) -> None:
    """Start `run` and watch it to its end, or kill it at the first moment that suits.

    Raises:
        StepFailedError: the run failed, stalled, or ended where it was to be killed.
    """
    progress = Progress()
    known = len(read_losses(run.metrics))
    last_news = time.monotonic()
    with run.start() as job:
        progress.show("starting")
        while True:
            status = job.exit_status()
            losses = read_losses(run.metrics)
            if len(losses) > known:
                known, last_news = len(losses), time.monotonic()
                iteration, loss = losses[-1]
                text = f"iteration {iteration}/{run.iterations}  loss {loss:.4f}"
                published = published_iterations(run.checkpoints)
                saving = save_in_progress(run.checkpoints)
                if kill_between_saves and is_between_saves(iteration, published, saving, run.save_interval):
                    job.kill()
                    progress.show(f"{text}  SIGKILL to all processes", final=True)
                    return
                progress.show(text, final=iteration == run.iterations)
            if status is not None:
                break
            if time.monotonic() - last_news > STALL_SECONDS:
                raise StepFailedError(f"no iteration was completed for {STALL_SECONDS:.0f} seconds", run.log)
            time.sleep(POLL_SECONDS)
    if status != 0:
        raise StepFailedError(f"training ended with exit status {status}", run.log)
    if kill_between_saves:
        raise StepFailedError("training ended before a moment between two saves was found to kill it", run.log)


def prepare_data(log: Path) -> None:
    """Make the training data, or find that it is there.

    Raises:
        StepFailedError: the program that does it failed.
    """
    progress, began = Progress(), time.monotonic()
    with Job(PREPARE_DATA, log) as job:
        while (status := job.exit_status()) is None:
            progress.show(f"working, {time.monotonic() - began:.0f} s")
            time.sleep(POLL_SECONDS)
    if status != 0:
        raise StepFailedError(f"preparing the data ended with exit status {status}", log)
    progress.show(f"ready after {time.monotonic() - began:.0f} s", final=True)


@dataclass(frozen=True)
class Comparison:
    """The losses by iteration of the two runs; those of the killed run before and after it was resumed."""

    uninterrupted: dict[int, float]
    before_kill: dict[int, float]
    after_resume: dict[int, float]

    def is_equal(self, iteration: int) -> bool:
        """Whether all losses of this iteration are the same; the killed run has two of what it repeated."""
        parts = (self.before_kill, self.after_resume)
        return all(part[iteration] == self.uninterrupted[iteration] for part in parts if iteration in part)

    def differing(self) -> list[int]:
        """The iterations whose losses are not equal."""
        return [iteration for iteration in self.uninterrupted if not self.is_equal(iteration)]

    def note(self, iteration: int) -> str:
        """What happened at this iteration, if anything."""
        resumed_from, killed_after = min(self.after_resume) - 1, max(self.before_kill)
        if iteration == resumed_from:
            return "<- resumed from this checkpoint"
        if iteration == killed_after:
            return "<- killed here; trained again"
        return "trained again" if resumed_from < iteration < killed_after else ""

    def table(self) -> str:
        """One line an iteration: both losses with all their digits, whether they are equal, and a note."""
        lines = [f"{'iteration':>9}  {'uninterrupted run':<20}  {'resumed run':<20}  equal"]
        resumed = self.before_kill | self.after_resume
        for iteration, loss in self.uninterrupted.items():
            equal = "yes" if self.is_equal(iteration) else "NO"
            line = f"{iteration:>9}  {loss!r:<20}  {resumed[iteration]!r:<20}  {equal:<5}"
            lines.append(f"{line}  {self.note(iteration)}".rstrip())
        return "\n".join(lines)

    def verdict(self) -> str:
        """One line that says how much was compared and whether it is equal."""
        total, resumed = len(self.uninterrupted), len(self.after_resume)
        head = f"{total} iterations, {resumed} of them resumed from iteration {total - resumed}"
        differing = self.differing()
        if not differing:
            return f"{head}: every loss is equal bit for bit"
        return f"{head}: losses that differ: {len(differing)}, the first at iteration {differing[0]}"


def losses_of(run: Run, first: int, last: int, skip_lines: int = 0) -> dict[int, float]:
    """The losses of `run` by iteration, from its metrics file without the first `skip_lines` lines.

    Raises:
        StepFailedError: the file does not hold every iteration from `first` to `last` once and in order.
    """
    losses = read_losses(run.metrics)[skip_lines:]
    found = [iteration for iteration, _ in losses]
    if found != list(range(first, last + 1)):
        raise StepFailedError(f"expected the iterations {first} to {last}, but the run made {found}", run.log)
    return dict(losses)


def make_fresh(work_dir: Path) -> None:
    """An empty `work_dir`, deleting what an earlier quickstart left in it.

    Raises:
        StepFailedError: the directory holds something that no quickstart made.
    """
    if work_dir.exists() and any(work_dir.iterdir()):
        if not (work_dir / OWNER_MARK).exists():
            raise StepFailedError(f"{work_dir} holds files that are not quickstart's; name another with --work-dir")
        shutil.rmtree(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / OWNER_MARK).touch()


def quickstart(work_dir: Path, iterations: int) -> Comparison:
    """The four steps.

    Raises:
        StepFailedError: a step failed.
    """
    make_fresh(work_dir)
    save_interval = max(8, iterations // 5)
    uninterrupted = Run(work_dir / "uninterrupted", iterations, save_interval)
    interrupted = Run(work_dir / "interrupted", iterations, save_interval)
    print("Step 1/4  Data: the sources of Python's standard library, tokenized")
    prepare_data(work_dir / "data.log")
    print(f"\nStep 2/4  Run A, never interrupted: {iterations} iterations, a save every {save_interval}")
    train(uninterrupted, kill_between_saves=False)
    losses = losses_of(uninterrupted, 1, iterations)
    print("\nStep 3/4  Run B, to be killed between two saves")
    train(interrupted, kill_between_saves=True)
    killed_after, _ = read_losses(interrupted.metrics)[-1]
    before_kill = losses_of(interrupted, 1, killed_after)
    resumed_from = tracked_iteration(interrupted.checkpoints)
    print(f"\nStep 4/4  Run B again, with the same command: its tracker names iteration {resumed_from}")
    train(interrupted, kill_between_saves=False)
    after_resume = losses_of(interrupted, resumed_from + 1, iterations, skip_lines=killed_after)
    return Comparison(losses, before_kill, after_resume)


def report_failure(error: StepFailedError) -> None:
    """What went wrong, and the end of the log of the step in which it did."""
    print(f"\nquickstart: {error}", file=sys.stderr)
    if error.log is not None and error.log.exists():
        print(f"--- the end of {shown(error.log)}", file=sys.stderr)
        for line in error.log.read_text(errors="replace").splitlines()[-80:]:
            print(line, file=sys.stderr)
        print(f"--- all of it: {error.log}", file=sys.stderr)


def stop(number: int, frame: FrameType | None) -> None:
    """On SIGTERM, leave as an exception does, so that no job outlives this program."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every loss is equal, 1 if not or if a step failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=40, help="length of each run, at least 24")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs/quickstart", help="where the runs go")
    options = parser.parse_args(arguments)
    if options.iterations < 24:
        parser.error("--iterations: two saves, a kill and a resume need at least 24")
    if not Path("/proc/self/environ").exists():
        parser.error("quickstart runs on Linux only: it finds the processes that it kills through /proc")
    signal.signal(signal.SIGTERM, stop)
    work_dir = options.work_dir.resolve()
    try:
        comparison = quickstart(work_dir, options.iterations)
    except StepFailedError as error:
        report_failure(error)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; all of its processes were stopped", file=sys.stderr)
        return 130
    print(f"\nCheckpoints, metrics and logs: {shown(work_dir)}\n")
    print(comparison.table())
    print(f"\n{comparison.verdict()}")
    return 1 if comparison.differing() else 0


if __name__ == "__main__":
    sys.exit(main())
