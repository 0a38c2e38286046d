"""Running a step again whose loss is not a number, to find out whether the hardware is to blame.

megatron-core's rerun state machine decides; here it is configured, fed with losses, and its verdict is put into
words. It repeats the step at once with the same random states and micro-batches. If the loss comes out
differently, the fault was transient; if not, it asks for a checkpoint and an exit, so that the next start repeats
the step on another device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunDiagnostic,
    RerunErrorInjector,
    RerunMode,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from bridge.training.config.training import RerunStateMachineConfig

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepFailed:
    """The machine's verdict that training must stop before the optimizer takes this step."""

    save: bool
    """Whether to save a checkpoint of the last good state first."""
    exit_code: int
    """megatron-core's: 16 to resume and repeat the step, 17 if the result is known to be wrong."""

    @property
    def reason(self) -> str:
        """For the log."""
        return (
            "the loss of the next step is not a number, and the rerun state machine asks to repeat that step after a "
            "restart on another device"
            if self.exit_code == 16
            else "the loss of the next step is not a number, and repeating the step gave another result or the same "
            "one on another device"
        )


@dataclass(frozen=True)
class Position:
    """Stands for a data iterator in a save: where it was before the micro-batches of a failed step."""

    state: Any

    def save_state(self) -> Any:
        """As the iterator gave it."""
        return self.state


def position_of(data: Any) -> Position | None:
    """Where a data iterator is now; None if it cannot tell."""
    save_state = getattr(data, "save_state", None)
    return None if save_state is None else Position(save_state())


def configure_reruns(config: RerunStateMachineConfig) -> None:
    """Start this process's rerun state machine anew; a disabled one only when somebody asks for it."""
    destroy_rerun_state_machine()
    mode = RerunMode(config.rerun_mode)
    if mode == RerunMode.DISABLED:
        return
    injector = RerunErrorInjector(config.error_injection_rate, RerunDiagnostic(config.error_injection_type))
    initialize_rerun_state_machine(
        mode=mode,
        state_save_func=lambda: get_cuda_rng_tracker().get_states(),
        # The tracker works on what it is given, and the same states are restored twice.
        state_restore_func=lambda states: get_cuda_rng_tracker().set_states(dict(states)),
        error_injector=injector,
    )


def set_rerun_iteration(iteration: int) -> None:
    """Tell the machine how many iterations are completed, for its reports."""
    get_rerun_state_machine().current_iteration = iteration


def run_validated(
    data: Iterator[Batch] | None, forward_backward: Callable[[Any], list[Any]]
) -> tuple[list[Any], StepFailed | None]:
    """Run a step's passes under the machine, as often as it asks for. Collective over all ranks.

    Args:
        data: this rank's micro-batches; None on pipeline stages that need none.
        forward_backward: zeroes the gradients and runs all micro-batches of one step from the iterator it is given.

    Returns:
        What the last run returned, and the verdict if the step must not be taken.
    """
    machine = get_rerun_state_machine()
    replayable = None if data is None else RerunDataIterator(data)
    results: list[Any] = []
    while machine.should_run_forward_backward(replayable):
        results = forward_backward(replayable)
    save, leave, exit_code = machine.should_checkpoint_and_exit()
    return results, StepFailed(save, exit_code) if leave else None


def validate_loss(loss: torch.Tensor) -> None:
    """Report the loss of a micro-batch, a tensor without dimensions, to an enabled machine."""
    machine = get_rerun_state_machine()
    if machine.get_mode() == RerunMode.DISABLED:
        return
    for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
        machine.validate_result(loss.detach(), lambda value, test=rejected: bool(test(value)), f"found {name} in loss")
