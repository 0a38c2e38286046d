"""Saving and loading: `CheckpointConfig`, with every documented field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridge.training.config.errors import ConfigError
from bridge.training.config.validation import checkpoint_violations


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is saved when and where, what is loaded, and how both are done.

    A field that this version does not carry out is refused when it is set (see `availability`).
    """

    save: str | None = None
    """Directory that receives the checkpoints, or place in object storage as `s3://bucket/prefix`; None saves
    nothing."""

    save_interval: int | None = None
    """Iterations between persistent saves. None saves at the end only, 0 not even then."""

    save_interval_minutes: float | None = None
    """Minutes of training after a persistent save until the next, by rank 0's clock. It adds to `save_interval`."""

    save_signal: Literal["SIGUSR1", "SIGUSR2"] | None = None
    """A signal upon which, received by any rank, a persistent checkpoint is saved after the running iteration."""

    save_optim: bool = True
    """Whether optimizer and parameter scheduler are saved."""

    save_rng: bool = True
    """Whether the random number generators are saved."""

    save_tokenizer_assets: bool = True
    """Whether the tokenizer's files are copied into each checkpoint."""

    async_save: bool = False
    """Whether training goes on while a checkpoint is written. Needs `save` and the format `torch_dist`."""

    async_when_busy: Literal["wait", "skip"] = "wait"
    """What becomes of a save that is due while the one before is still being written: `wait` lets training wait for
    it, `skip` leaves the new one out, with a warning. The last save of a run always waits, and so does one that a
    signal or the file `SAVE_NOW` asks for. A persistent save is never left out because of a non-persistent one."""

    on_save_failure: Literal["raise", "warn"] = "raise"
    """What follows a failed save: `raise` ends the run with the error, `warn` logs it and lets training go on."""

    max_save_failures: int = 3
    """Saves that may fail one after the other under `on_save_failure` `warn`; the next failure is raised."""

    save_retries: int = 3
    """Further tries of a step of a save that failed in storage, unless the error is of a lasting kind."""

    save_retry_seconds: float = 5.0
    """Seconds before the first of these tries; the wait doubles with each, up to a minute or this."""

    check_free_space: bool = True
    """Whether a save is begun only where the file system has room for it."""

    checksum: Literal["xxh3", "crc32", "sha256"] = "xxh3"
    """Kind of the checksums that a checkpoint's manifest gets. Loading reads all kinds."""

    wait_timeout_minutes: float = 120.0
    """Minutes that ranks wait for one another at one point of a save or load before it fails. What writes or reads the
    longest decides; a rank that died is noticed at once."""

    writer_stall_seconds: float = 600.0
    """Seconds after which a background writer that neither computes nor writes is ended, and its save has failed."""

    load: str | None = None
    """Directory of checkpoints to start from, or place in object storage: the base directory, not an `iter_N` inside
    it."""

    integrity: Literal["off", "sizes", "full"] = "sizes"
    """What is checked before a checkpoint is loaded: `sizes` compares the sizes of all files, the contents of the small
    ones and samples of the large ones with the manifest; `full` reads every file."""

    fallback: bool = True
    """Whether the newest good checkpoint is loaded where the newest is damaged; otherwise that is an error."""

    load_optim: bool = True
    """Whether optimizer and parameter scheduler are loaded."""

    load_rng: bool = True
    """Whether the random number generators are loaded."""

    load_dataloader_state: Literal["auto", "require", "ignore"] = "auto"
    """Whether data iterators are put back to their saved position: `auto` where the checkpoint holds one, `require`
    makes its absence an error, `ignore` starts them from what the train state counts. A position that the data
    iterator cannot take, because the data-parallel size has changed for one, is an error but with `ignore`."""

    load_main_params_from_ckpt: bool = False
    """Whether the optimizer's main parameters come from the checkpoint's; use with `load_optim` false."""

    ckpt_step: int | None = None
    """Iteration to load instead of the one that the tracker names. It must exist."""

    exit_on_missing_checkpoint: bool = False
    """Whether an empty `load` is an error; otherwise training starts afresh, with a warning."""

    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = "assume_ok_unexpected"
    """What happens when the checkpoint's keys and the requested keys differ."""

    safe_globals: list[str] | None = None
    """Classes, as dotted paths, that files of a checkpoint may hold beside those that torch allows."""

    pretrained_checkpoint: str | None = None
    """Directory of a checkpoint whose model fine-tuning starts from."""

    finetune: bool = False
    """Whether only the model is loaded, and training counts from zero."""

    ckpt_format: Literal["torch_dist", "zarr", "fsdp_dtensor"] | str = "torch_dist"
    """How sharded state is stored. Beside these formats: the backend of a save strategy that is registered with
    megatron-core, or the dotted path of one."""

    io_backend: Literal["direct", "stock"] = "direct"
    """Who reads and writes `torch_dist` and `fsdp_dtensor` files: `direct` moves tensors straight between memory and
    files, `stock` leaves it to torch. Both read each other's files."""

    fully_parallel_save: bool = True
    """Whether data-parallel ranks share the writing."""

    fully_parallel_load: bool | Literal["auto"] = False
    """Whether data-parallel ranks share the reading and exchange what they read; `auto` measures and chooses."""

    ckpt_assume_constant_structure: bool = False
    """Whether it is worth a warning that what is saved has another structure than in the save before.

    A save reuses the plan of the one before it in any case, if nothing has changed on any rank, and that is checked."""

    storage_writers_per_rank: int = 1
    """Files that each rank writes at the same time."""

    strict_fsdp_dtensor_load: bool = False
    """Whether a `fsdp_dtensor` checkpoint must hold everything that is requested."""

    most_recent_k: int = -1
    """Checkpoints to keep, the newest first; -1 keeps all, unless another retention setting lets some go. What any
    of the retention settings keeps stays, and the newest checkpoint always does."""

    save_retain_interval: int | None = None
    """Keep the checkpoints of every so many iterations for ever. A multiple of `save_interval`."""

    retain_every_hours: float | None = None
    """Keep the first checkpoint of every so many hours for ever."""

    retain_best_k: int | None = None
    """Checkpoints to keep that have the best values of `retain_best_metric`."""

    retain_best_metric: str | None = None
    """Metric that `retain_best_k` judges by: `loss`, `grad_norm`, or another that is in the run's state."""

    retain_best_mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest values of `retain_best_metric` are the best."""

    retain_iterations: list[int] | None = None
    """Iterations whose checkpoints are kept whatever the other retention settings let go."""

    non_persistent_save_interval: int | None = None
    """Iterations between non-persistent saves."""

    non_persistent_ckpt_type: Literal["global", "local", "in_memory", "None"] | None = None
    """Kind of non-persistent checkpoint; the text "None" means None."""

    non_persistent_global_ckpt_dir: str | None = None
    """Directory of global non-persistent checkpoints; None is `non_persistent` inside `save`."""

    non_persistent_local_ckpt_dir: str | None = None
    """Directory, on each node, of local checkpoints."""

    non_persistent_local_ckpt_algo: Literal["fully_parallel", "atomic"] = "fully_parallel"
    """How the state is divided among ranks in local checkpoints."""

    in_memory_limit_gib: float | None = None
    """GiB of host memory that each rank's in-memory checkpoints may take: room for two, and for two more of every
    rank whose copies it holds. None is half of what is available, divided among the ranks of the machine, when the
    first is saved."""

    in_memory_release_minutes: float = 60.0
    """Minutes after which in-memory checkpoints are given up, and their memory with them, if the trainer is gone and
    no other has come for them."""

    replication: bool = False
    """Whether local checkpoints are replicated to other ranks."""

    replication_jump: int | None = None
    """Distance between ranks that hold copies of one another's state."""

    replication_factor: int = 2
    """Ranks that hold each rank's state, itself included."""

    dist_ckpt_optim_fully_reshardable: bool = False
    """Whether optimizer state can be loaded under other TP, PP and EP sizes too, not only other DP sizes."""

    distrib_optim_fully_reshardable_mem_efficient: bool = False
    """Whether a fully reshardable save and load spare memory at the cost of time."""

    mirror: str | None = None
    """Place in object storage, as `s3://bucket/prefix`, that every persistent checkpoint is copied to in the background
    once it is published in `save`."""

    mirror_required: bool = False
    """Whether copies that cannot be made count as failed saves; otherwise they are tried again, and never end a run."""

    staging_dir: str | None = None
    """Directory, the same for all ranks, where a checkpoint is written before it is uploaded. For a `save` in object
    storage, as `s3://bucket/prefix`."""

    staging_keep: int = 2
    """Checkpoints that stay in `staging_dir`, the newest first."""

    upload_threads: int = 4
    """Requests to object storage at the same time; each has up to 32 MiB in memory."""

    upload_wait_minutes: float = 30.0
    """Minutes that the planned end of a run waits for uploads under way; below `wait_timeout_minutes`."""

    custom_manager_class: str | None = None
    """Dotted path of a class that implements the `CheckpointManager` protocol; None is the built-in one."""

    def __post_init__(self) -> None:
        # The documented Literal spells "no type" in two ways; everything else needs to know only one.
        if self.non_persistent_ckpt_type == "None":
            self.non_persistent_ckpt_type = None

    def violations(self) -> list[str]:
        """What is wrong with this section alone, one line for each problem, empty when all is well."""
        return checkpoint_violations(self)

    def check(self) -> None:
        """Refuse this section if anything is wrong with it.

        Raises:
            ConfigError: it has violations; the message lists all of them.
        """
        if problems := self.violations():
            raise ConfigError(problems)
