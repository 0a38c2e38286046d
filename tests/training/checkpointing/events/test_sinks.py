"""Events in the programs that they are brought to, each read back with that program's own means.

Every case runs in a process of its own, because some of the libraries leave threads and processes behind.
"""

from __future__ import annotations

import json
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import EventSinkError
from bridge.training.checkpointing.events.configured import add_configured
from bridge.training.checkpointing.events.kinds import (
    CheckpointLoaded,
    Event,
    LoadResolved,
    RunEnded,
    SaveFailed,
    SaveStarted,
    SnapshotTaken,
)
from bridge.training.checkpointing.events.sinks.late import LateSink
from bridge.training.checkpointing.events.sinks.requiring import require
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.config import LoggerConfig
from tests.distributed.launch import run_ranks
from tests.training.checkpointing.events.samples import COMMON, committed

EVENTS: list[Event] = [
    LoadResolved(time=1000.0, path="runs/mine/iter_0000010", iteration=10, reason="it is the newest"),
    CheckpointLoaded(time=1004.0, iteration=10, blocking_seconds=4.0, phases={"reading": 3.0, "applying": 1.0}),
    SaveStarted(time=1100.0, iteration=20, **COMMON),
    SnapshotTaken(time=1101.0, iteration=20, **COMMON, blocking_seconds=1.0),
    committed(20, 1108.0, "runs/mine", background_seconds=6.0, write_seconds=1.5, since_seconds=100.0, metrics={}),
    SaveFailed(time=1200.0, iteration=30, **COMMON, error="CheckpointSaveError", message="no room"),
]
END = RunEnded(time=1300.0, iteration=30, reason="train.train_iters (30) reached")
NUMBERS = {
    ("checkpoint/load_seconds", 10): 4.0,
    ("checkpoint/stall_seconds", 20): 2.0,
    ("checkpoint/background_seconds", 20): 6.0,
    ("checkpoint/gigabytes", 20): 3.0,
    ("checkpoint/gigabytes_per_second", 20): 2.0,
    ("checkpoint/stall_share", 20): 0.02,
    ("checkpoint/failed", 30): 1.0,
}


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"the package {module} is not installed")


def in_process(action: Callable[..., Any], *arguments: Any) -> Any:
    (found,) = run_ranks(action, 1, *arguments)
    return found


def bring(logger: LoggerConfig, *more: Event) -> None:
    """Bring the events to what a logger section asks for, as a run does."""
    stream = EventStream()
    add_configured(stream, logger, Ranks.current())
    for event in [*EVENTS, *more]:
        stream.emit(event)
    stream.close(60.0)
    assert (stream.dropped, stream.failed) == (0, 0)


def to_tensorboard(directory: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stream = EventStream()
    add_configured(stream, LoggerConfig(tensorboard_dir=str(directory)), Ranks.current())
    for event in EVENTS:
        stream.emit(event)
    stream.close(60.0)
    reader = EventAccumulator(str(directory))
    reader.Reload()
    found: dict[str, Any] = {
        f"{name} {point.step}": (round(point.value, 6), point.wall_time)
        for name in reader.Tags()["scalars"]
        for point in reader.Scalars(name)
    }
    (tag,) = [name for name in reader.Tags()["tensors"] if "trouble" in name]
    found["trouble"] = reader.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    return found


@needs("tensorboard")
def test_tensorboard_has_scalars_at_their_iterations_and_times(tmp_path: Path) -> None:
    found = in_process(to_tensorboard, tmp_path)
    trouble = found.pop("trouble")
    assert trouble == "saving the persistent checkpoint of iteration 30 failed: CheckpointSaveError: no room"
    times = {10: 1004.0, 20: 1108.0, 30: 1200.0}
    assert found == {f"{name} {step}": (value, times[step]) for (name, step), value in NUMBERS.items()}


def to_mlflow(directory: Path) -> dict[str, Any]:
    import os

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    uri = directory.as_uri()
    logger = LoggerConfig(
        mlflow_experiment="mine", mlflow_run_name="first", mlflow_tracking_uri=uri, mlflow_tags={"team": "a"}
    )
    bring(logger, END)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    bring(logger)
    runs = client.search_runs([experiment.experiment_id])
    (broken_off,) = [other.info.status for other in runs if other.info.run_id != run.info.run_id]
    points = [point for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)]
    return {
        "metrics": {(point.key, point.step): point.value for point in points},
        "moment": next(point.timestamp for point in points if point.step == 20),
        "name": run.info.run_name,
        "status": run.info.status,
        "status without an end": broken_off,
        "tags": {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")},
    }


@needs("mlflow")
def test_mlflow_has_metrics_in_a_run_of_its_own(tmp_path: Path) -> None:
    assert in_process(to_mlflow, tmp_path / "mlruns") == {
        "metrics": NUMBERS,
        "moment": 1_108_000,
        "name": "first",
        "status": "FINISHED",
        "status without an end": "FAILED",
        "tags": {
            "team": "a",
            "checkpoint.started_from": "runs/mine/iter_0000010",
            "checkpoint.trouble": (
                "saving the persistent checkpoint of iteration 30 failed: CheckpointSaveError: no room"
            ),
        },
    }


def to_wandb(directory: Path) -> list[dict[str, str]]:
    import os

    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off", WANDB_DISABLE_GIT="true")
    bring(LoggerConfig(wandb_project="mine", wandb_exp_name="first", wandb_save_dir=str(directory)))
    (file,) = directory.rglob("run-*.wandb")
    records = _finished(file)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    kinds = {record.WhichOneof("record_type") for record in records}
    files = {path.name for path in file.parent.joinpath("files").rglob("*") if path.is_file()}
    return [
        {"project": run.project, "name": run.display_name, "kinds": kinds, "files": files},
        *_history(records),
    ]


def beside_a_run_of_training(directory: Path) -> dict[str, Any]:
    """Training logs to a run of its own, by steps; its number is set in the environment."""
    import os

    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off", WANDB_DISABLE_GIT="true")
    os.environ.update(WANDB_RUN_ID="training", WANDB_RESUME="allow")
    import wandb

    training = wandb.init(project="mine", dir=str(directory))
    stream = EventStream()
    logger = LoggerConfig(wandb_project="mine", wandb_exp_name="checkpoints", wandb_save_dir=str(directory))
    add_configured(stream, logger, Ranks.current())
    for step in range(6):
        training.log({"loss": float(step)}, step=step)
        for event in EVENTS if step == 2 else []:
            stream.emit(event)
        assert stream.flush(60.0)
    stream.close(60.0)
    assert wandb.run is training
    training.finish()
    histories = {}
    for file in directory.rglob("run-*.wandb"):
        records = _finished(file)
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        histories[run.display_name or "training"] = _history(records)
    return histories


def _history(records: list[Any]) -> list[dict[str, str]]:
    histories = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): item.value_json for item in items} for items in histories]


def _finished(file: Path) -> list[Any]:
    """The records of W&B's file of a run, once it is whole: its own process writes it."""
    from wandb.proto.wandb_internal_pb2 import Record

    records: list[Any] = []
    deadline = time.monotonic() + 60.0
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        assert time.monotonic() < deadline, "the run's file has no end"
        time.sleep(0.05)
        records = [Record.FromString(data) for data in _log_records(file.read_bytes())]
    return records


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file: the log format of LevelDB, in blocks of 32 KiB, after 7 bytes."""
    block, at, parts = 32 * 1024, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@needs("wandb")
def test_wandb_offline_has_the_history(tmp_path: Path) -> None:
    first, *history = in_process(to_wandb, tmp_path)
    assert (first["project"], first["name"]) == ("mine", "first")
    assert not first["kinds"] & {"stats", "output", "output_raw", "environment"}
    assert not first["files"] & {"wandb-metadata.json", "requirements.txt", "output.log"}
    assert _numbers_in(history) == NUMBERS


@needs("wandb")
def test_wandb_leaves_the_run_of_training_alone(tmp_path: Path) -> None:
    found = in_process(beside_a_run_of_training, tmp_path)
    assert [json.loads(row["loss"]) for row in found["training"]] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert not any("checkpoint" in name for row in found["training"] for name in row)
    assert _numbers_in(found["checkpoints"]) == NUMBERS


def _numbers_in(history: list[dict[str, str]]) -> dict[tuple[str, int], float]:
    found = {}
    for row in history:
        step = json.loads(row["checkpoint/iteration"])
        found |= {(n, step): json.loads(v) for n, v in row.items() if n in {name for name, _ in NUMBERS}}
    return found


def to_comet(directory: Path) -> list[Any]:
    bring(
        LoggerConfig(
            comet_project="mine",
            comet_experiment_name="first",
            comet_workspace="team",
            comet_tags=["a"],
            comet_offline_dir=str(directory),
        )
    )
    (archive,) = directory.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        messages = files.read("messages.json").decode().splitlines()
        experiment = json.loads(files.read("experiment.json"))
    return [experiment["project_name"], experiment["workspace"], *map(json.loads, messages)]


@needs("comet_ml")
def test_comet_offline_has_the_metrics(tmp_path: Path) -> None:
    project, workspace, *messages = in_process(to_comet, tmp_path)
    assert (project, workspace) == ("mine", "team")
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    found = {(metric["metricName"], metric["step"]): float(metric["metricValue"]) for metric in metrics}
    assert found == NUMBERS


class Collector(HTTPServer):
    """A collector that keeps the requests for traces."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Collect)
        self.bodies: list[bytes] = []
        self.status = 200


class _Collect(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            self.server.bodies.append(body)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def to_collector() -> list[dict[str, Any]]:
    import gzip

    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        bring(LoggerConfig(otlp_endpoint=f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
        bodies = [gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body for body in server.bodies]
    found = []
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            spans = [span for scope in resource.scope_spans for span in scope.spans]
            names = {span.span_id: span.name for span in spans}
            for span in spans:
                found.append(
                    {
                        "service": service,
                        "name": span.name,
                        "parent": names.get(span.parent_span_id),
                        "seconds": (span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9),
                        "error": span.status.message if span.status.code == 2 else None,
                        "iteration": {a.key: a.value.int_value for a in span.attributes}.get("checkpoint.iteration"),
                    }
                )
    return found


@needs("opentelemetry.sdk")
def test_a_collector_gets_saves_and_loads_as_spans() -> None:
    found = in_process(to_collector)
    rows = [
        ("checkpoint.reading", "checkpoint.load", (1000.0, 1003.0), None, None),
        ("checkpoint.applying", "checkpoint.load", (1003.0, 1004.0), None, None),
        ("checkpoint.load", None, (1000.0, 1004.0), None, 10),
        ("checkpoint.snapshot", "checkpoint.save", (1100.0, 1101.0), None, None),
        ("checkpoint.publish", "checkpoint.save", (1101.0, 1108.0), None, None),
        ("checkpoint.save", None, (1100.0, 1108.0), None, 20),
        ("checkpoint.save", None, (1200.0, 1200.0), "CheckpointSaveError: no room", 30),
    ]
    keys = ("name", "parent", "seconds", "error", "iteration")
    assert found == [{"service": "bridge", **dict(zip(keys, row, strict=True))} for row in rows]


def unreachable() -> tuple[int, int]:
    stream = EventStream()
    add_configured(stream, LoggerConfig(otlp_endpoint="http://127.0.0.1:9"), Ranks.current())
    stream.emit(EVENTS[1])
    stream.close(30.0)
    return stream.dropped, stream.failed


@needs("opentelemetry.sdk")
def test_a_collector_that_is_not_there_costs_events_and_nothing_else() -> None:
    assert in_process(unreachable) == (0, 1)


class Flaky:
    """Cannot be made at first."""

    def __init__(self) -> None:
        self.tries = 0
        self.taken: list[Event] = []
        self.closed = 0

    def make(self) -> Flaky:
        self.tries += 1
        if self.tries < 3:
            raise ConnectionError("GET https://bob:se@cret@tracking.example/api: refused")
        return self

    def take(self, event: Event) -> None:
        self.taken.append(event)

    def close(self) -> None:
        self.closed += 1


def test_a_program_that_is_down_is_tried_again_with_every_event(caplog: pytest.LogCaptureFixture) -> None:
    stream, flaky = EventStream(), Flaky()
    with caplog.at_level("WARNING"):
        stream.add("tracking", lambda: LateSink(flaky.make))
        for event in EVENTS[:4]:
            stream.emit(event)
        stream.close()
    assert (flaky.taken, flaky.closed, stream.failed) == (EVENTS[2:4], 1, 2)
    assert caplog.messages[0] == (
        "CHECKPOINT EVENTS DO NOT REACH tracking (said once; saves go on): ConnectionError: "
        "GET https://tracking.example/api: refused"
    )


def tracking_is_down(directory: Path) -> tuple[str, int, bool]:
    """A run whose server of MLflow does not answer, with another sink beside it."""
    import os

    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    stream = EventStream()
    logger = LoggerConfig(mlflow_experiment="mine", mlflow_tracking_uri="http://127.0.0.1:9")
    add_configured(stream, logger, Ranks.current())
    stream.emit(EVENTS[0])
    stream.close(30.0)
    return "went on", stream.failed, stream.has("MLflow")


@needs("mlflow")
def test_a_server_of_mlflow_that_is_down_does_not_stop_a_start(tmp_path: Path) -> None:
    assert in_process(tracking_is_down, tmp_path) == ("went on", 1, False)


def refused() -> str:
    """A library that is missing, on two ranks."""
    try:
        Ranks.current().first("preparing", lambda: require("no_such_library.part", "logger.x", "x") and None)
    except EventSinkError as error:
        return str(error)
    return "made"


def unusable() -> str:
    file, stream, before = Path("/dev/null/tensorboard"), EventStream(), Flaky()
    stream.add("before", lambda: before)
    try:
        add_configured(stream, LoggerConfig(tensorboard_dir=str(file)), Ranks.current())
    except EventSinkError as error:
        return f"{error!s} ({before.closed} closed)"
    return "made"


def test_a_missing_library_is_one_error_on_every_rank() -> None:
    message = (
        "logger.x needs the package no_such_library, which cannot be imported (No module named 'no_such_library'); "
        "install it with: pip install 'bridge[x]', or leave logger.x out"
    )
    assert run_ranks(refused, 2) == [message] * 2


@needs("tensorboard")
def test_a_program_that_cannot_be_used_is_an_error_at_the_start() -> None:
    for message in run_ranks(unusable, 2):
        assert message.startswith("logger.tensorboard_dir: TensorBoard cannot be used: NotADirectoryError: ")
        assert message.endswith("; check the settings around it, or leave them out (1 closed)")
