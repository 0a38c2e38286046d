"""Save under one layout, load under another: what is saved, what it is compared with, and how many at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bridge.training.callbacks import CallbackManager
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.config import ConfigContainer
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.consolidated import consolidate
from tests.training.context_parallel import supply_context_parallel_attention
from tests.training.tiny import tiny_config

SAVED_AT, CONTINUED_TO = 2, 4
"""Iterations: where the checkpoint is, and how far training goes on for the comparison of losses."""

_CASES_PER_LAUNCH = 24
"""Each case leaves threads of its gloo groups behind in its process; with hundreds of cases they take over."""

_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
}

OPTIMIZERS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"ddp": {"use_distributed_optimizer": False}},
    "dp_reshardable": {},
    "fully_reshardable": {"checkpoint": {"dist_ckpt_optim_fully_reshardable": True}},
    "memory-efficient": {
        "checkpoint": {
            "dist_ckpt_optim_fully_reshardable": True,
            "distrib_optim_fully_reshardable_mem_efficient": True,
        }
    },
}
"""How a run keeps and saves its optimizer's state."""


@dataclass(frozen=True)
class Layout:
    """A layout by name, such as `TP2 PP2`; what is not named is 1, and data parallelism takes the rest."""

    name: str
    world_size: int

    @property
    def sizes(self) -> dict[str, int]:
        """The settings of `model` that make it."""
        parts = [part for part in self.name.split() if part.rstrip("0123456789") in _SIZES]
        return {_SIZES[part.rstrip("0123456789")]: int(part.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")) for part in parts}


DENSE = [
    Layout("one rank", 1),
    Layout("TP2", 2),
    Layout("PP2", 2),
    Layout("PP2 VPP2", 2),
    Layout("CP2", 2),
    Layout("DP2", 2),
    Layout("TP4", 4),
    Layout("TP2 PP2", 4),
    Layout("PP2 DP2", 4),
    Layout("DP4", 4),
]
MOE = [
    Layout("one rank", 1),
    Layout("DP2", 2),
    Layout("EP2", 2),
    Layout("PP2", 2),
    Layout("EP4", 4),
    Layout("EP2 DP4", 4),
    Layout("PP2 EP2", 4),
]
"""Data parallelism contains expert parallelism: `EP2 DP4` holds the experts twice, `EP2` once."""


@dataclass(frozen=True)
class Model:
    """What is trained, apart from the layout."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def loss_tolerance(self) -> float:
        """Largest relative difference of the losses after a change of layout; see `docs/resharding.md`."""
        return 1e-6 if self.settings.get("precision", "fp32") == "fp32" else 1e-3


_EXPERTS = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.0, "add_bias_linear": False}
MODELS = {
    model.name: model
    for model in (
        Model("tied fp32"),
        Model("tied bf16", {"precision": "bf16"}),
        Model("untied fp32", {"share_embeddings_and_output_weights": False}),
        Model("untied bf16", {"share_embeddings_and_output_weights": False, "precision": "bf16"}),
        Model("swiglu bf16", {"activation": "swiglu", "add_bias_linear": False, "precision": "bf16"}),
        Model("MoE fp32", _EXPERTS),
        Model("MoE bf16", {**_EXPERTS, "precision": "bf16"}),
    )
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint that a test makes and the runs that load it compare themselves with."""

    model: Model
    layout: Layout
    optimizer: str
    format: str = "torch_dist"

    def directory(self, root: Path) -> Path:
        """Where it is saved."""
        return root / f"{self.model.name} {self.layout.name} {self.optimizer} {self.format}".replace(" ", "_")


@dataclass(frozen=True)
class Cell:
    """A checkpoint and the run that loads it."""

    saved: Saved
    layout: Layout
    optimizer: str
    model: Model | None = None
    """Another model than the saved one; None is the same."""
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further settings of `checkpoint`."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell, or of a saved run."""

    state: dict[str, str] | None
    """Everything after the load (or at the save), consolidated."""
    losses: dict[int, float] = field(default_factory=dict)
    """By iteration, after it."""
    refusal: str | None = None
    """Type and message of the error on each rank, where the load was refused."""


def config(model: Model, layout: Layout, optimizer: str, metrics: Path, **checkpoint: Any) -> ConfigContainer:
    """A tiny run without dropout, whose random numbers would depend on the layout."""
    sections = OPTIMIZERS[optimizer]
    return tiny_config(
        train_iters=CONTINUED_TO,
        model={
            # The positions' 5 * 64 elements leave padding between the buckets of a first stage with tied embeddings.
            "hidden_size": 16,
            "seq_length": 20,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            # Megatron-Core's rotary embedding pins memory when it shares a sequence, which takes CUDA.
            "position_embedding_type": "learned_absolute",
            **model.settings,
            **layout.sizes,
        },
        ddp=sections.get("ddp", {}),
        checkpoint={**sections.get("checkpoint", {}), **checkpoint},
        logger={"metrics_path": str(metrics)},
    )


def save_all(wanted: list[Saved], root: Path) -> list[Outcome]:
    """Train and save each of them in this rank; all have this world size. The outcomes are rank 0's."""
    _start()
    return [_save(saved, root) for saved in wanted]


def load_all(cells: list[tuple[int, Cell]], root: Path) -> list[Outcome]:
    """Load each numbered cell in this rank and train on; all have this world size. The outcomes are rank 0's."""
    _start()
    return [_load(cell, root, number) for number, cell in cells]


def _start() -> None:
    supply_context_parallel_attention()
    init_ranks()


def _save(saved: Saved, root: Path) -> Outcome:
    directory = saved.directory(root)
    directory.parent.mkdir(parents=True, exist_ok=True)
    metrics = directory.with_suffix(".jsonl")
    state: list[dict[str, str] | None] = []
    saving = {"save": str(directory), "save_interval": SAVED_AT, "ckpt_format": saved.format}
    cfg = config(saved.model, saved.layout, saved.optimizer, metrics, **saving)
    run = setup(cfg)
    save = run.manager.save

    def save_once(context: Any, callbacks: CallbackManager | None) -> None:
        if run.state.train_state.step == SAVED_AT:  # and not at the end
            save(context, callbacks)
            state.append(consolidate(run))

    run.manager.save = save_once  # type: ignore[method-assign]
    train(run)
    return Outcome(state[0], _losses(metrics))


def _load(cell: Cell, root: Path, number: int) -> Outcome:
    model = cell.model or cell.saved.model
    metrics = root / f"loaded-{torch.distributed.get_world_size()}-{number}.jsonl"
    cfg = config(model, cell.layout, cell.optimizer, metrics, load=str(cell.saved.directory(root)), **cell.more)
    try:
        run = setup(cfg)
    except CheckpointError as error:
        refusals: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(refusals, f"{type(error).__name__}: {error}")
        assert len(set(refusals)) == 1, refusals
        return Outcome(None, refusal=refusals[0])
    state = consolidate(run)
    train(run)
    return Outcome(state, _losses(metrics))


def _losses(metrics: Path) -> dict[int, float]:
    torch.distributed.barrier()
    entries = map(json.loads, metrics.read_text().splitlines())
    return {entry["iteration"]: entry["loss"] for entry in entries if entry["iteration"] > SAVED_AT}


@dataclass(frozen=True)
class Table:
    """One table of the documentation: what was saved with each layout, loaded with each."""

    title: str
    optimizer: str
    model: str
    layouts: tuple[Layout, ...]

    def cells(self) -> list[Cell]:
        """Every pair of layouts, row by row."""
        return [
            Cell(Saved(MODELS[self.model], saved, self.optimizer), loaded, self.optimizer)
            for saved in self.layouts
            for loaded in self.layouts
        ]


_FEW_DENSE = tuple(layout for layout in DENSE if layout.name in ("one rank", "TP2", "PP2", "DP2", "TP2 PP2"))
_FEW_MOE = tuple(layout for layout in MOE if layout.name in ("one rank", "EP2", "EP4", "PP2 EP2"))
TABLES = [
    Table("`fully_reshardable`, tied embeddings, bf16", "fully_reshardable", "tied bf16", tuple(DENSE)),
    Table("`fully_reshardable`, untied embeddings, fp32", "fully_reshardable", "untied fp32", _FEW_DENSE),
    Table("`fully_reshardable`, memory-efficient, tied embeddings, fp32", "memory-efficient", "tied fp32", _FEW_DENSE),
    Table("`fully_reshardable`, experts, bf16", "fully_reshardable", "MoE bf16", tuple(MOE)),
    Table("`fully_reshardable`, memory-efficient, experts, fp32", "memory-efficient", "MoE fp32", _FEW_MOE),
    Table("`dp_reshardable`, tied embeddings, bf16", "dp_reshardable", "tied bf16", tuple(DENSE)),
    Table("`dp_reshardable`, experts, fp32", "dp_reshardable", "MoE fp32", tuple(MOE)),
    Table("Not distributed, untied embeddings, bf16", "plain", "untied bf16", _FEW_DENSE),
    Table("Not distributed, experts, fp32", "plain", "MoE fp32", _FEW_MOE),
]

_FORMS_SAVED = [
    (optimizer, model)
    for optimizer in ("plain", "dp_reshardable", "fully_reshardable")
    for model in ("untied fp32", "untied bf16")
]
_FORMS_LOADED = [
    (optimizer, model) for optimizer in ("plain", "dp_reshardable") for model in ("untied fp32", "untied bf16")
]
FORMS_TITLE = "Between forms and precisions, TP2 to DP2"


def form_cells() -> list[Cell]:
    """Changes of the optimizer and the precision, together with one of the layout.

    `dp_reshardable` is also loaded with its own layout: what keeps it from being loaded then is the form.
    """
    tp2, dp2 = DENSE[1], DENSE[5]
    return [
        Cell(
            Saved(MODELS[saved_model], dp2 if saved == "dp_reshardable" else tp2, saved), dp2, optimizer, MODELS[model]
        )
        for saved, saved_model in _FORMS_SAVED
        for optimizer, model in _FORMS_LOADED
    ]


def form_names() -> list[tuple[str, str]]:
    """Row and column of each of `form_cells` in the documentation."""
    return [(row, column) for row in _names(_FORMS_SAVED) for column in _names(_FORMS_LOADED, loaded=True)]


def run_matrix(cells: list[Cell], root: Path) -> list[str]:
    """Save what the cells need, load them all, and compare.

    Returns:
        For each cell the message with which it was refused; empty where everything was equal.

    Raises:
        AssertionError: a cell loaded something else than what was saved, or went on with other losses.
    """
    wanted = list(dict.fromkeys(cell.saved for cell in cells))
    saved = _by_world_size(save_all, wanted, [each.layout.world_size for each in wanted], root)
    loaded = _by_world_size(load_all, list(enumerate(cells)), [cell.layout.world_size for cell in cells], root)
    of_saved = dict(zip(wanted, saved, strict=True))
    return [
        outcome.refusal or _require_equal(cell, of_saved[cell.saved], outcome)
        for cell, outcome in zip(cells, loaded, strict=True)
    ]


def _by_world_size(act: Callable[..., list[Outcome]], items: list[Any], sizes: list[int], root: Path) -> list[Outcome]:
    """Each item's outcome, in order; items of one world size share a launch, up to a limit."""
    outcomes: dict[int, Outcome] = {}
    for world_size in sorted(set(sizes)):
        positions = [position for position, size in enumerate(sizes) if size == world_size]
        for first in range(0, len(positions), _CASES_PER_LAUNCH):
            batch = positions[first : first + _CASES_PER_LAUNCH]
            given = [items[position] for position in batch]
            found = run_ranks(act, world_size, given, root, timeout=60 + 10 * len(batch))[0]
            outcomes |= zip(batch, found, strict=True)
    return [outcomes[position] for position in range(len(items))]


def _require_equal(cell: Cell, saved: Outcome, loaded: Outcome) -> str:
    assert saved.state is not None
    assert loaded.state is not None
    models = (cell.saved.model, cell.model or cell.saved.model)
    # Another precision rounds the model's tensors, and only those.
    same_precision = models[0] == models[1]
    compared = {name for name in saved.state if same_precision or not name.startswith("model ")}
    assert len(compared) > 20
    different = [name for name in compared if saved.state[name] != loaded.state.get(name)]
    assert not different, f"{cell}: {different} differ"
    assert not same_precision or saved.state.keys() == loaded.state.keys()
    tolerance = max(model.loss_tolerance for model in models)
    for iteration, loss in saved.losses.items():
        difference = abs(loaded.losses[iteration] / loss - 1)
        assert difference <= tolerance, f"{cell}: the loss of iteration {iteration} differs by {difference:.1e}"
    assert len(saved.losses) == CONTINUED_TO - SAVED_AT
    return ""


BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->\n"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "resharding.md"


def markdown(title: str, rows: list[str], columns: list[str], texts: list[str]) -> str:
    """A table with `texts` row by row."""
    lines = [f"### {title}\n", f"| saved, loaded → | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for index, row in enumerate(rows):
        lines.append(f"| {row} | {' | '.join(texts[index * len(columns) :][: len(columns)])} |")
    return "\n".join(lines) + "\n"


def generate(root: Path) -> str:
    """Run every cell of the matrix and return its tables."""
    tables = []
    for number, table in enumerate(TABLES):
        answers = [answer(text) for text in run_matrix(table.cells(), root / str(number))]
        names = [layout.name for layout in table.layouts]
        tables.append(markdown(table.title, names, names, answers))
    answers = [answer(text) for text in run_matrix(form_cells(), root / "forms")]
    tables.append(markdown(FORMS_TITLE, _names(_FORMS_SAVED), _names(_FORMS_LOADED, loaded=True), answers))
    return "\n".join(tables)


def answer(refusal: str) -> str:
    """What the table says of a cell."""
    return "no" if refusal else "yes"


def _names(forms: list[tuple[str, str]], *, loaded: bool = False) -> list[str]:
    kinds = {"dp_reshardable": "distributed"} if loaded else {}
    return [f"{kinds.get(optimizer, optimizer)}, {model.split()[1]}" for optimizer, model in forms]


def documented() -> dict[tuple[str, str, str], str]:
    """The documentation's tables: (title, row, column) → cell."""
    found = {}
    for part in DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].split("### ")[1:]:
        title, _, table = part.partition("\n")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in _lines(table)]
        columns = rows[0][1:]
        for row in rows[2:]:
            found |= {(title, row[0], column): text for column, text in zip(columns, row[1:], strict=True)}
    return found


def _lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("|")]
