"""From a configuration to everything that a run is made of, the checkpoint loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge import accelerator
from bridge.peft import build_peft
from bridge.training.callbacks import CallbackManager
from bridge.training.checkpointing import (
    CheckpointLoadContext,
    CheckpointManager,
    create_checkpoint_manager,
)
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.events.configured import add_configured
from bridge.training.checkpointing.loading import load_pretrained
from bridge.training.checkpointing.restoring import LiveState
from bridge.training.config import ConfigContainer
from bridge.training.data import (
    IteratorBuilder,
    IteratorRequest,
    build_train_dataset,
    build_train_iterator,
    restore_position,
)
from bridge.training.data.agreement import on_every_rank
from bridge.training.data.iterator import Batch
from bridge.training.flops import flops_per_sequence
from bridge.training.gpt import build_model, padded_vocab_size
from bridge.training.initialize import (
    LaunchEnvironment,
    initialize_distributed,
    initialize_microbatches,
    set_seeds,
)
from bridge.training.logs import configure_logging
from bridge.training.optimizer import (
    apply_configured_learning_rates,
    build_optimizer,
    build_scheduler,
    required_train_iters,
    samples_after,
)
from bridge.training.rerun import configure_reruns, set_rerun_iteration
from bridge.training.state import GlobalState
from bridge.training.tokenizers import MegatronTokenizer, build_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What `setup` made and `train` works with."""

    state: GlobalState
    model: list[Any]
    """This rank's DDP-wrapped chunks: one, or one for each virtual pipeline stage."""
    optimizer: Any
    scheduler: Any
    train_data_iterator: Any | None
    """Iterates over this rank's micro-batches; None on pipeline stages that read no data."""
    manager: CheckpointManager
    callback_manager: CallbackManager
    pg_collection: Any
    """Megatron-Core's process groups."""
    flops_per_sequence: float

    @property
    def cfg(self) -> ConfigContainer:
        """The run's configuration."""
        return self.state.cfg


def setup(
    cfg: ConfigContainer,
    callbacks: CallbackManager | None = None,
    iterator_builder: IteratorBuilder = build_train_iterator,
) -> Run:
    """Build a run and load its checkpoint. Collective over all ranks.

    Torch.distributed is started from torchrun's variables, or used as it is if it runs already.

    Args:
        cfg: the run's configuration.
        callbacks: hear what happens.
        iterator_builder: makes the data iterator of each rank that reads data, in place of our own.

    Raises:
        ConfigError: the configuration is wrong, alone or for this number of ranks.
        ImportError, AttributeError, ValueError, TypeError: `checkpoint.custom_manager_class` cannot be used.
        TokenizerError, DatasetError, CheckpointError: see the packages of these names.
    """
    launch = LaunchEnvironment.from_environ()
    cfg.validate(world_size=launch.world_size)
    configure_logging(cfg.logger.log_level, launch.rank, launch.world_size)
    accelerator.enable()
    initialize_distributed(cfg, launch)
    set_seeds(cfg)
    initialize_microbatches(cfg)
    configure_reruns(cfg.rerun_state_machine)
    _log_layout(cfg)

    tokenizer = build_tokenizer(cfg.tokenizer)
    state = GlobalState(cfg=cfg, tokenizer=tokenizer)
    add_configured(state.events, cfg.logger, Ranks.current())
    try:
        return _build(state, tokenizer, callbacks or CallbackManager(), iterator_builder)
    except BaseException:
        state.events.close()
        raise


def _build(
    state: GlobalState, tokenizer: MegatronTokenizer, callbacks: CallbackManager, iterator_builder: IteratorBuilder
) -> Run:
    """Build what the state's configuration asks for, and load into it. Collective over all ranks."""
    cfg = state.cfg
    manager = create_checkpoint_manager(cfg.checkpoint)
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = build_model(
        cfg, tokenizer.vocab_size, before_wrapping=lambda chunks: _adapt_pretrained_model(state, chunks, groups)
    )
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer, data_parallel_size)
    run = Run(
        state=state,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_data_iterator=None,
        manager=manager,
        callback_manager=callbacks,
        pg_collection=groups,
        flops_per_sequence=flops_per_sequence(cfg.model, padded_vocab_size(cfg.model, tokenizer.vocab_size)),
    )
    _load_checkpoint(run)
    run.train_data_iterator = _build_data_iterator(run, tokenizer, data_parallel_size, iterator_builder)
    return run


def _log_layout(cfg: ConfigContainer) -> None:
    model = cfg.model
    logger.info(
        "world size %d on %s: tensor %d x pipeline %d x context %d x data %d parallel",
        dist.get_world_size(),
        accelerator.device_name(),
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
        parallel_state.get_data_parallel_world_size(),
    )
    if cfg.checkpoint.save is None and dist.get_rank() == 0:
        logger.warning("checkpoint.save IS NOT SET: NOTHING OF THIS RUN WILL BE SAVED")


def _adapt_pretrained_model(state: GlobalState, chunks: list[Any], groups: Any) -> None:
    """Load the base model and add what `peft` asks for to it; without `peft`, do nothing.

    The base comes first: its checkpoint knows nothing of adapters. The run's own checkpoint, of adapters, is
    loaded when everything is built.
    """
    peft = build_peft(state.cfg.peft)
    if peft is None:
        return
    load_pretrained(LiveState(state, chunks, None, None, groups, None), Ranks.current())
    peft(chunks)
    state.peft, state.base_checkpoint = peft, state.loaded_from
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    logger.info(
        "training %d of the %d parameters on this rank",
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        sum(parameter.numel() for parameter in parameters),
    )


def _load_checkpoint(run: Run) -> None:
    context = CheckpointLoadContext(
        state=run.state,
        model=run.model,
        optimizer=run.optimizer,
        opt_param_scheduler=run.scheduler,
        strict=True,
        pg_collection=run.pg_collection,
    )
    run.manager.load(context)
    progress = run.state.train_state
    update_num_microbatches(progress.consumed_train_samples)
    set_rerun_iteration(progress.step)
    if progress.step:
        apply_configured_learning_rates(run.cfg, run.optimizer, run.scheduler)
        logger.info("continuing after iteration %d", progress.step)


def _build_data_iterator(
    run: Run, tokenizer: MegatronTokenizer, data_parallel_size: int, build: IteratorBuilder
) -> Iterator[Batch] | None:
    """The micro-batches of this rank from where the checkpoint left off.

    Every rank builds the dataset, because ranks build its indices together; only those of the first and the
    last pipeline stage read it. Tensor- and context-parallel ranks read the same samples, each by itself.
    """
    cfg, state = run.cfg, run.state
    samples = samples_after(cfg, required_train_iters(cfg), data_parallel_size)
    dataset = build_train_dataset(cfg, tokenizer, samples)
    saved, state.dataloader_state = state.dataloader_state, None
    request = IteratorRequest(
        dataset=dataset,
        micro_batch_size=cfg.train.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=data_parallel_size,
        consumed_samples=state.train_state.consumed_train_samples,
        num_workers=cfg.dataset.num_workers,
    )
    reads_data = parallel_state.is_pipeline_first_stage(ignore_virtual=True) or parallel_state.is_pipeline_last_stage(
        ignore_virtual=True
    )

    def build_and_restore() -> Iterator[Batch] | None:
        if not reads_data:
            return None
        # Loaders draw seeds when they are made. The loaded random states must not notice.
        with torch.random.fork_rng(devices=[]):
            iterator = build(request)
            restore_position(iterator, saved)
        return iterator

    iterator: Iterator[Batch] | None = on_every_rank(build_and_restore, "the data iterator could not be built")
    return iterator
