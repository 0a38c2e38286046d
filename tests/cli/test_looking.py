"""ls, doctor, inspect and diff: what they say of a run's directory is what a run does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.catalog import list_all, read_head, recorded_settings
from bridge.training.checkpointing.catalog.choosing import recorded_doubts
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.integrity import FileRecord, Manifest, read_manifest, write_manifest
from bridge.training.checkpointing.layout import (
    COMPACT_METADATA,
    LEGACY_TRACKER,
    MANIFEST,
    RUN_CONFIG,
    TRACKER,
    TRAIN_STATE,
    iteration_name,
)
from bridge.training.checkpointing.marks import mark
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.starts import Start, Starts, write_starts
from bridge.training.checkpointing.tiers.session import SESSION, session_of
from bridge.training.config import CheckpointConfig
from tests.cli.commands import commit_small, copied, flip, run, run_all, write_recipe
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config


def rewrite(checkpoint: Path, manifest: Manifest) -> None:
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, manifest)


def test_ls_tells_what_there_is_and_what_a_run_resumes_from(trained: Path) -> None:
    text, data = run_all(["ls", trained], ["ls", trained, "--json"])
    assert (text.status, text.err) == (0, "")
    lines = text.out.splitlines()
    assert lines[0].startswith(f"{trained}: 3 checkpoints, ")
    assert lines[1].split() == ["ITERATION", "TIER", "FORMAT", "SIZE", "FILES", "AGE", "RANKS", "LAYOUT", "STATE"]
    assert [line.split()[:3] for line in lines[2:5]] == [[str(n), "persistent", "torch_dist"] for n in (2, 4, 6)]
    assert [line.endswith("<- a run resumes here") for line in lines[2:5]] == [False, False, True]
    assert lines[5:] == [
        f"A run that loads {trained} resumes from iteration 6: latest_train_state.pt names it.",
        "To go back to an earlier one, start the run with checkpoint.ckpt_step=4",
        f"To check that all are sound: bridge-ckpt verify {trained}",
    ]
    found = data.json
    assert found["resume"]["iteration"] == 6
    assert found["resume"]["path"] == str(trained / "iter_0000006")
    assert [each["iteration"] for each in found["checkpoints"]] == [2, 4, 6]
    for each in found["checkpoints"]:
        manifest = read_manifest(Path(each["path"]))
        assert manifest is not None
        assert each["total_bytes"] == manifest.total_bytes
        assert each["files"] == len(manifest.files)
        assert each["parallel_sizes"] == manifest.parallel_sizes
        assert (each["state"], each["origin"], each["world_size"]) == ("committed", "bridge", 2)
        assert each["is_loaded"] is (each["iteration"] == 6)


def test_what_they_say_is_what_a_run_does(trained: Path, tmp_path: Path) -> None:
    """A damaged newest checkpoint: both pass over it for the same reason, and load the same."""
    save_dir = copied(trained, tmp_path / "run")
    flip(save_dir / "iter_0000006" / "common.pt")
    listed, doctor = run_all(["ls", save_dir, "--json"], ["doctor", save_dir, "--json"])
    for found in (listed.json["resume"], doctor.json["resume"]):
        assert (found["outcome"], found["iteration"]) == ("resume", 4)
        (reason,) = found["passed_over"]
        assert f"{save_dir}/iter_0000006 is damaged: common.pt has xxh3 " in reason
    assert not list(save_dir.glob("*/.bridge-damaged"))  # looking marks nothing
    text = run("ls", save_dir)
    assert f"passed over: {save_dir}/iter_0000006 is damaged: common.pt has xxh3 " in text.out
    assert f"To see what is wrong: bridge-ckpt doctor {save_dir}" in text.out
    cfg = tiny_config(train_iters=4, checkpoint={"load": str(save_dir)})
    assert [each["started at"] for each in run_ranks(run_to_end, 2, cfg)] == [4, 4]


def test_ls_where_there_is_nothing_or_something_else(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    (tmp_path / "file").write_text("")
    missing, file, empty, other, above, one = run_all(
        ["ls", tmp_path / "missing"],
        ["ls", tmp_path / "file"],
        ["ls", tmp_path / "empty"],
        ["ls", tmp_path / "other"],
        ["ls", trained.parent],
        ["ls", trained / "iter_0000004", "--quiet"],
    )
    assert missing == (1, "", f"error: {tmp_path}/missing does not exist; name the checkpoint.save of a run\n")
    assert file == (1, "", f"error: {tmp_path}/file is not a directory; name a directory of checkpoints\n")
    assert empty.status == 0
    assert f"A run that loads {tmp_path}/empty starts FROM SCRATCH: there is no checkpoint." in empty.out
    assert f"A run that loads {tmp_path}/other FAILS: checkpoint.load: {tmp_path}/other holds no ch" in other.out
    assert f"There are checkpoints in {trained}: bridge-ckpt ls {trained}\n" in above.out
    path = trained / "iter_0000004"
    assert one.out.splitlines()[-1] == (
        f"A run that loads {path} resumes from iteration 4: checkpoint.load names this one checkpoint."
    )


def test_ls_knows_other_tiers_and_other_programs(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    ours = (TRAIN_STATE, COMPACT_METADATA)
    for name, files in (("iter_0000002", (MANIFEST, RUN_CONFIG, *ours)), ("iter_0000004", (MANIFEST,))):
        for file in files:
            (save_dir / name / file).unlink()
    shutil.copytree(save_dir / "iter_0000006", save_dir / "non_persistent" / "iter_0000006")
    commit.move_trackers(save_dir / "non_persistent", 6, (save_dir / TRACKER).read_bytes())
    mark(save_dir / "iter_0000006", "a bit was wrong")
    found = run("ls", save_dir, "--json").json["checkpoints"]
    assert [(each["iteration"], each["kind"], each["state"], each["origin"]) for each in found] == [
        (2, "persistent", "foreign", "Megatron-LM"),
        (4, "persistent", "damaged", "bridge"),
        (6, "persistent", "marked", "bridge"),
        (6, "non_persistent_global", "committed", "bridge"),
    ]
    assert found[0]["format"] == "torch_dist"
    assert found[2]["problem"] == "a bit was wrong"


def test_ls_finds_local_checkpoints_that_a_run_would_take(trained: Path, tmp_path: Path) -> None:
    save_dir, local = copied(trained, tmp_path / "run"), tmp_path / "local"
    cfg = CheckpointConfig(
        load=str(save_dir),
        save=str(save_dir),
        non_persistent_ckpt_type="local",
        non_persistent_local_ckpt_dir=str(local),
    )
    place = local / session_of(save_dir)
    for iteration, rank in ((7, 0), (7, 1), (8, 0)):
        snapshot = place / str(rank) / f"iter_{iteration:07d}_{rank}_local.pt"
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.write_bytes(b"0123")
    listed = list_all(save_dir, cfg)
    rows = [(row.iteration, row.total_bytes, row.problem) for row in listed.rows if row.kind == "local"]
    assert rows == [(7, 8, ""), (8, 4, "on this machine are those of rank 0")]
    assert listed.choice.source == Source(
        place / "iter_0000007", False, "it is the newest complete local checkpoint", "local"
    )
    assert listed.choice.iteration == 7


def test_ls_of_many(tmp_path: Path) -> None:
    for iteration in range(1, 41):
        commit_small(tmp_path, iteration)
    found = run("ls", tmp_path, "--json").json
    assert [each["iteration"] for each in found["checkpoints"]] == list(range(1, 41))
    assert found["checkpoints"][0]["created"] == 1_700_000_001.0


@pytest.mark.parametrize("version", [1, 2])
def test_the_head_of_a_manifest_is_what_the_manifest_says(trained: Path, tmp_path: Path, version: int) -> None:
    manifest = read_manifest(trained / "iter_0000004")
    assert manifest is not None
    if version == 1:  # as another layout on the page: nothing can be cut out
        text = json.dumps(json.loads((trained / "iter_0000004" / MANIFEST).read_text()), sort_keys=True)
        (tmp_path / MANIFEST).write_text(text.replace("}", "}", 1) + "\n")
    else:
        shutil.copy(trained / "iter_0000004" / MANIFEST, tmp_path)
    head = read_head(tmp_path)
    assert head is not None
    assert (head.iteration, head.total_bytes, head.files) == (4, manifest.total_bytes, len(manifest.files))
    assert (head.layout.sizes(), head.created, head.metrics) == (
        manifest.parallel_sizes,
        manifest.created,
        manifest.metrics,
    )


def test_doctor_says_what_a_run_would_restore(trained: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    same, recipe_2, recipe_tp, no_optim, bad = run_all(
        ["doctor", trained],
        ["doctor", trained, "--recipe", recipe, "--world-size", 4, "--json"],
        ["doctor", trained, "--recipe", recipe, "--set", "model.tensor_model_parallel_size=2", "--json"],
        ["doctor", trained, "--recipe", recipe, "--set", "checkpoint.load_optim=false", "--json"],
        ["doctor", trained, "--set", "model.num_layers=2"],
    )
    assert same.status == 0
    assert "ok      latest_train_state.pt names iter_0000006\n" in same.out
    assert "iter_0000004 is next" in same.out
    assert "  optimizer      restored  saved and wanted\n" in same.out
    plan = recipe_2.json["plan"]
    assert plan["data_iterator"]["reason"] == "saved by 2 data-parallel ranks and divided anew among 4"
    assert recipe_tp.status == 1
    (problem,) = (each["text"] for each in recipe_tp.json["findings"] if each["grade"] == "problem")
    assert "dist_ckpt_optim_fully_reshardable: true" in problem
    assert no_optim.json["plan"]["optimizer"] == {
        "restore": False,
        "reason": "checkpoint.load_optim is false",
        "partly": False,
    }
    assert bad.status == 2
    assert bad.err == (
        "error: --overlay and --set change a recipe: give --recipe FILE too. See: bridge-ckpt doctor --help\n"
    )


def test_doctor_knows_what_a_run_itself_writes(tmp_path: Path) -> None:
    recipe, save_dir = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    save_dir.mkdir()
    (save_dir / "metrics.jsonl").write_text("")
    alone, with_recipe = run_all(
        ["doctor", save_dir],
        ["doctor", save_dir, "--recipe", recipe, "--set", f"logger.metrics_path={save_dir}/metrics.jsonl"],
    )
    assert (alone.status, with_recipe.status) == (0, 0)
    taken = "metrics.jsonl: taken for the run's own, as logger.metrics_path; the start of another run fails"
    begun = f"A run that loads {save_dir} starts FROM SCRATCH: there is no checkpoint.\n"
    assert alone.out == f"note    {taken}\n{begun}"
    assert with_recipe.out == begun


def test_doctor_finds_what_accidents_have_left(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    (save_dir / ".saving-iter_0000008-0123abcd").mkdir()
    (save_dir / LEGACY_TRACKER).write_text("99")
    shutil.rmtree(save_dir / "iter_0000006")
    found = run("doctor", save_dir)
    assert found.status == 1
    assert f"PROBLEM {TRACKER} names iter_0000006, which does not exist\n" in found.out
    assert f"PROBLEM {LEGACY_TRACKER} names iter_0000099, which does not exist\n" in found.out
    assert "note    .saving-iter_0000008-0123abcd: the remains of a save\n" in found.out
    assert f"A run that loads {save_dir} resumes from iteration 4: " in found.out


def test_doctor_understands_what_megatron_lm_left(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    (save_dir / TRACKER).unlink()
    for name in (MANIFEST, RUN_CONFIG, TRAIN_STATE, COMPACT_METADATA):
        (save_dir / "iter_0000006" / name).unlink()
    found = run("doctor", save_dir, "--json").json
    texts = [each["text"] for each in found["findings"]]
    assert any("it was written by Megatron-LM: it has no manifest" in text for text in texts)
    assert "understood of it: iteration 6, its parallel sizes are unknown" in texts


def test_doctor_understands_what_megatron_bridge_left(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    path = save_dir / "iter_0000006"
    (path / MANIFEST).unlink()
    config = (path / RUN_CONFIG).read_text().replace("_target_: bridge.", "_target_: megatron.bridge.")
    (path / RUN_CONFIG).write_text(config)
    recipe = write_recipe(tmp_path / "recipe.yaml")
    alone, with_recipe = run_all(
        ["doctor", save_dir, "--json"], ["doctor", save_dir, "--recipe", recipe, "--world-size", 2, "--json"]
    )
    texts = [each["text"] for each in alone.json["findings"]]
    assert any("it was written by Megatron Bridge: it has no manifest" in text for text in texts)
    assert any(text.startswith("understood of it: iteration 6, parallel sizes TP1 PP1 ") for text in texts)
    assert alone.json["resume"]["iteration"] == 6
    assert with_recipe.json["plan"]["optimizer"]["restore"] is True


def test_inspect_shows_tensors_from_metadata_alone(trained: Path) -> None:
    path = trained / "iter_0000004"
    everything, some, text = run_all(
        ["inspect", trained, "--step", 4, "--json"],
        ["inspect", path, "--pattern", "embedding.*", "--json"],
        ["inspect", path, "--config"],
    )
    found = everything.json
    assert found["entry"]["path"] == str(path)
    (embedding,) = some.json["tensors"]
    assert embedding in found["tensors"]
    assert (embedding["shape"], embedding["dtype"], embedding["part"]) == ([256, 64], "float32", "model")
    assert sum(each["total_bytes"] for each in found["tensors"]) == sum(
        part["total_bytes"] for part in found["parts"].values()
    ) - sum(each["total_bytes"] for each in found["objects"])
    assert set(found["parts"]) == {"model", "optimizer", "random states"}
    assert {name for name in found["files"] if name.endswith(".distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert found["config"]["model"]["hidden_size"] == 64
    assert "hidden_size: 64" in text.out


def test_diff_counts_what_differs(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    cfg = tiny_config(train_iters=2, optimizer={"lr": 0.02}, checkpoint={"save": str(other), "save_interval": 2})
    run_ranks(run_to_end, 2, cfg)
    itself, steps, frugal, settings, structure = run_all(
        ["diff", trained, trained],
        ["diff", trained, trained, "--step-b", 4, "--json"],
        ["diff", trained, trained, "--step-b", 4, "--json", "--memory-gib", 1 / 4096],
        ["diff", trained, other, "--step-a", 2, "--pattern", "decoder.*", "--json"],
        ["diff", trained, other, "--step-a", 2, "--no-values", "--pattern", "embedding.*"],
    )
    assert itself.status == 0
    assert itself.out.splitlines()[-1].endswith("tensors, all the same")
    found = steps.json
    assert (steps.status, found["are_equal"], found["config"]) == (1, False, [])
    assert found["structure"] == found["only_first"] == found["only_second"] == []
    (embedding,) = (each for each in found["values"] if each["key"] == "embedding.word_embeddings.weight")
    first, second = (values_of(trained / iteration_name(n), embedding["key"]) for n in (6, 4))
    divided = {each["key"]: each for each in frugal.json["values"]}
    assert len(divided) == len(found["values"])
    for whole in found["values"]:
        same = divided[whole["key"]]
        for name in ("elements", "different", "largest", "not_finite"):
            assert same[name] == whole[name]
        for name in ("mean", "relative"):
            assert same[name] == pytest.approx(whole[name], rel=1e-9)
    delta = (first.double() - second.double()).abs()
    assert embedding["elements"] == first.numel()
    assert embedding["different"] == int((first != second).sum())
    assert embedding["largest"] == pytest.approx(float(delta.max()), rel=1e-12)
    assert embedding["mean"] == pytest.approx(float(delta.mean()), rel=1e-9)
    assert embedding["relative"] == pytest.approx(float(delta.norm() / first.double().norm()), rel=1e-9)
    changed = {each["key"]: (each["first"], each["second"]) for each in settings.json["config"]}
    assert changed["optimizer.lr"] == (0.01, 0.02)
    assert all(each["key"].startswith("decoder.") for each in settings.json["values"])
    assert (structure.status, structure.out.splitlines()[-1]) == (0, "the structure is the same")


def values_of(path: Path, key: str) -> torch.Tensor:
    """A tensor as stock torch DCP reads it, in another process."""
    import torch.distributed.checkpoint as dcp

    def read() -> torch.Tensor:
        entry = dcp.FileSystemReader(path).read_metadata().state_dict_metadata[key]
        values = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        dcp.load(values, checkpoint_id=path, no_dist=True)
        return values[key]

    return run_ranks(read, 1)[0]


def test_the_program_itself(trained: Path) -> None:
    command = [sys.executable, "-m", "bridge.cli"]
    listed = subprocess.run([*command, "ls", trained, "--json"], capture_output=True, text=True, timeout=300)
    assert listed.returncode == 0
    assert json.loads(listed.stdout)["resume"]["iteration"] == 6
    wrong = subprocess.run([*command, "ls"], capture_output=True, text=True, timeout=300)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: Missing argument 'DIR'. See: bridge-ckpt ls --help\n",
    )


def test_a_shell_can_complete_commands() -> None:
    command = [sys.executable, "-m", "bridge.cli"]
    environment = {
        **os.environ,
        "_BRIDGE_CKPT_COMPLETE": "bash_complete",
        "COMP_WORDS": "bridge-ckpt ver",
        "COMP_CWORD": "1",
    }
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert found.stdout == "plain,verify\n"


def test_without_its_packages_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['click'] = None; from bridge.cli.main import main; sys.exit(main(['ls', '.']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == (
        "error: bridge-ckpt needs the package click, which is not installed; install it with: "
        "pip install 'bridge[cli]'\n"
    )


def test_ls_looks_at_a_run_that_has_only_non_persistent_checkpoints(trained: Path, tmp_path: Path) -> None:
    """What that run has recorded lies there, and nowhere else."""
    save_dir = tmp_path / "run"
    save_dir.mkdir()
    beside = copied(trained, save_dir / "non_persistent")
    unknown = run("ls", save_dir)
    assert "there is no checkpoint" not in unknown.out
    assert "starts FROM SCRATCH by its settings, as far as what is recorded of it tell: it takes none of the 3" in (
        unknown.out
    )
    assert run("doctor", save_dir).status == 1
    for iteration in (2, 4, 6):
        config = beside / f"iter_000000{iteration}" / RUN_CONFIG
        text = config.read_text()
        assert "  non_persistent_ckpt_type: null\n" in text
        config.write_text(text.replace("  non_persistent_ckpt_type: null\n", "  non_persistent_ckpt_type: global\n"))
        manifest = read_manifest(config.parent)
        assert manifest is not None
        files = (each for each in manifest.files if each.name != RUN_CONFIG)
        rewrite(config.parent, replace(manifest, files=(*files, FileRecord.of(config.parent, RUN_CONFIG))))
    found = run("ls", save_dir, "--json").json["resume"]
    assert (found["outcome"], found["iteration"], found["kind"]) == ("resume", 6, "non_persistent_global")


def test_what_is_cut_short_is_passed_over_without_a_manifest_too(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    for name in (MANIFEST, RUN_CONFIG):
        (save_dir / "iter_0000006" / name).unlink()
    with (save_dir / "iter_0000006" / "__1_0.distcp").open("r+b") as stream:
        stream.truncate(1000)
    listed, doctor, text = run_all(
        ["ls", save_dir, "--json"], ["doctor", save_dir, "--json"], ["doctor", save_dir, "--quiet"]
    )
    for found in (listed.json["resume"], doctor.json["resume"]):
        assert found["iteration"] == 4
        assert "__1_0.distcp has 1000 bytes, and at least " in found["passed_over"][0]
    # It is a problem that a run starts from something older, and nothing to recommend.
    assert (doctor.status, doctor.json["is_well"]) == (1, False)
    assert f"PROBLEM would be passed over: {save_dir}/iter_0000006 is damaged: " in text.out
    assert "ckpt_step=6" not in text.out


def test_nothing_is_recommended_that_cannot_be_loaded(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    commit.move_trackers(save_dir, 2, (save_dir / "iter_0000002" / "train_state.pt").read_bytes())
    flip(save_dir / "iter_0000006" / "common.pt")
    doctor = run("doctor", save_dir)
    assert (
        "newer than what would be loaded: iteration 4, 6\n        to load the newest of them: checkpoint.ckpt_step=4\n"
        in (doctor.out)
    )
    assert "bridge-ckpt doctor" not in doctor.out
    for iteration in (2, 4):
        flip(save_dir / f"iter_000000{iteration}" / "common.pt")
    listed = run("ls", save_dir)
    assert " FAILS: " in listed.out
    assert "ckpt_step" not in listed.out.partition(" FAILS: ")[2].partition("\n")[2]


def test_what_a_rollback_has_left_behind_is_said(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        path = commit_small(tmp_path, iteration)
        manifest = read_manifest(path)
        assert manifest is not None
        rewrite(path, replace(manifest, start=1 if iteration < 3 else 2))
    write_starts(tmp_path, Starts((Start(1, 0), Start(2, 1, 1))))
    found = run("ls", tmp_path, "--json").json["checkpoints"]
    assert [(each["iteration"], each["left_behind"]) for each in found] == [(1, False), (2, True), (3, False)]
    assert "committed, left behind by a rollback\n" in run("ls", tmp_path).out


GARBLED = [
    ("metrics", [1]),
    ("versions", []),
    ("parallel_sizes", []),
    ("created", int("9" * 400)),
    ("created", float("-inf")),
    ("iteration", float("inf")),
]


@pytest.mark.parametrize(("key", "value"), GARBLED)
def test_a_garbled_manifest_is_a_damaged_checkpoint(tmp_path: Path, key: str, value: object) -> None:
    path = commit_small(tmp_path, 1)
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(content | {key: value}, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointDamagedError, match=f"its '{key}' is "):
        read_head(path)


def test_a_pipe_is_no_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(CheckpointDamagedError, match="it is not a file"):
        read_head(tmp_path)


def test_what_is_recorded_counts_only_if_its_type_is_right(tmp_path: Path) -> None:
    (tmp_path / RUN_CONFIG).write_text(
        "checkpoint: {non_persistent_global_ckpt_dir: 5, non_persistent_ckpt_type: [], fallback: 1, integrity: full,"
        " non_persistent_local_ckpt_dir: local, ckpt_step: 4}\n"
    )
    cfg = recorded_settings(tmp_path, tmp_path)
    assert (cfg.non_persistent_global_ckpt_dir, cfg.non_persistent_ckpt_type, cfg.fallback, cfg.integrity) == (
        *(None, None, True, "full"),
    )
    place, step = recorded_doubts(tmp_path)
    assert place.startswith("the run has recorded checkpoint.non_persistent_local_ckpt_dir: local, which leads ")
    assert step.startswith("the run that saved last had checkpoint.ckpt_step=4")


def test_doctor_knows_the_pretrained_checkpoint(trained: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    empty = tmp_path / "run"
    empty.mkdir()
    line = ["doctor", empty, "--recipe", recipe, "--set"]
    there, missing = run_all(
        [*line, f"checkpoint.pretrained_checkpoint={trained}"],
        [*line, f"checkpoint.pretrained_checkpoint={tmp_path}/missing"],
    )
    assert there.status == 0
    assert f"note    the run takes its model, and only that, from {trained}/iter_0000006 (checkpoint.pretr" in there.out
    assert missing.status == 1
    assert " FAILS: checkpoint.pretrained_checkpoint: " in missing.out


def test_what_is_no_directory(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    typo, to_begin, url, garbage = run_all(
        ["doctor", tmp_path / "typo"],
        ["doctor", tmp_path / "typo", "--recipe", recipe],
        ["repair", "s3://bucket/run"],
        ["ls", tmp_path / "typo", "--recipe", recipe],
    )
    assert typo == (1, "", f"error: {tmp_path}/typo does not exist; name the checkpoint.save of a run\n")
    assert to_begin.status == 0
    assert f"note    {tmp_path}/typo does not exist\n" in to_begin.out
    assert url.status == 2
    assert "s3://bucket/run is a place in object storage, and repair works with directories: the next run" in url.err
    assert garbage.status == 1


def test_ls_by_a_recipe(trained: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    found = run("ls", trained, "--recipe", recipe, "--set", "checkpoint.ckpt_step=2", "--json")
    assert (found.json["resume"]["iteration"], found.json["resume"]["reason"]) == (2, "checkpoint.ckpt_step is 2")


def test_looking_makes_no_session(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    (save_dir / SESSION).write_bytes(b"")
    assert run("ls", save_dir).status == 0
    assert (save_dir / SESSION).read_bytes() == b""


def test_names_that_a_terminal_cannot_show(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bridge.cli", "ls", os.fsencode(tmp_path) + b"/caf\xe9"]
    os.mkdir(command[-1])  # noqa: PTH102 (no Path could be written down)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    found = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    assert (found.returncode, found.stderr) == (0, b"")
    assert b"/caf\\udce9: 0 checkpoints, 0 B\n" in found.stdout


def test_torch_gives_no_advice_to_run_code(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    (save_dir / TRACKER).write_bytes(b"garbage")
    found = run("doctor", save_dir)
    assert (
        f"{save_dir / TRACKER} is not a readable train state: UnpicklingError: Weights only load failed." in found.out
    )
    assert "weights_only" not in found.out
