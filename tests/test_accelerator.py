"""Megatron-Core's view of the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from bridge import accelerator
from tests.distributed.launch import run_ranks

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, enable() changes nothing")

PATCHED = (
    "torch.cuda.current_device, torch.cuda.device_count, torch.cuda.set_device, torch.cuda.synchronize, "
    "torch.cuda.Stream, torch.cuda.get_rng_state, torch.cuda.set_rng_state, torch.cuda.manual_seed, "
    "torch.tensor, torch.empty, torch.zeros, torch.ones, torch.Tensor.cuda, torch.Tensor.type"
)


def _in_fresh_python(code: str) -> Any:
    """Run a program that prints one JSON value last, and return that."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_patches_nothing_and_leaves_megatron_alone() -> None:
    loaded, unchanged = _in_fresh_python(
        f"""
import json, sys, torch
before = ({PATCHED})
import bridge.accelerator
after = ({PATCHED})
print(json.dumps([[m for m in sys.modules if m.startswith("megatron")], before == after]))
"""
    )
    assert loaded == []
    assert unchanged


def test_with_cuda_enable_changes_nothing() -> None:
    """CUDA is only claimed here; what is asserted is that nothing of torch was replaced and nothing imported."""
    result, loaded, unchanged, dynamo = _in_fresh_python(
        f"""
import json, os, sys, torch
os.environ.pop("TORCHDYNAMO_DISABLE", None)
torch.cuda.is_available = lambda: True
from bridge import accelerator
before = ({PATCHED})
result = accelerator.enable()
after = ({PATCHED})
print(json.dumps([result, [m for m in sys.modules if m.startswith("megatron")], before == after,
                  os.environ.get("TORCHDYNAMO_DISABLE")]))
"""
    )
    assert (result, loaded, unchanged, dynamo) == (False, [], True, None)


@cpu_only
def test_enable_is_idempotent() -> None:
    assert accelerator.enable() is True
    first = (torch.zeros, torch.Tensor.type, torch.cuda.current_device)
    assert accelerator.enable() is True
    assert (torch.zeros, torch.Tensor.type, torch.cuda.current_device) == first


@cpu_only
def test_a_spawned_process_enables_itself() -> None:
    def spawn() -> list[str]:
        context = torch.multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            return pool.apply(_device_names)

    [names] = run_ranks(spawn, 1)
    assert names == ["cpu", "cpu", "torch.cuda.FloatTensor"]


def _device_names() -> list[str]:
    accelerator.enable()
    tensor = torch.zeros(1, device="cuda")
    return [str(torch.cuda.current_device()), str(tensor.device), tensor.type()]


@cpu_only
def test_the_cpu_answers_for_cuda() -> None:
    accelerator.enable()
    assert accelerator.device() == torch.device("cpu")
    assert accelerator.process_group_backend() == "gloo"
    assert not accelerator.is_cuda() and not torch.cuda.is_available()
    made = [
        torch.tensor([1], device="cuda"),
        torch.empty(2, device=torch.device("cuda", 0)),
        torch.empty_like(torch.zeros(2), device="cuda:0"),
        torch.ones(2, device=torch.cuda.current_device()),
        torch.zeros(2).cuda(),
    ]
    assert {str(tensor.device) for tensor in made} == {"cpu"}
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.int64).dtype is torch.int64
    assert torch.zeros(1, device="meta").device.type == "meta"
    with torch.cuda.stream(torch.cuda.Stream()) as nothing:
        torch.cuda.current_stream().record_event().synchronize()
    assert nothing is None


def test_the_devices_random_state_can_be_taken_and_put_back() -> None:
    accelerator.enable()
    accelerator.seed(7)
    state = accelerator.get_rng_state()
    first = torch.rand(3, device=accelerator.device())
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=accelerator.device()), first)
    accelerator.seed(7)
    assert torch.equal(accelerator.get_rng_state(), state)
    accelerator.synchronize()


@cpu_only
def test_megatrons_tracker_and_recomputation_draw_reproducible_numbers() -> None:
    def draw() -> bool:
        from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker

        from tests.distributed.launch import init_model_parallel

        init_model_parallel()
        weights = torch.ones(1000, requires_grad=True)
        seen = []

        def dropped(values: torch.Tensor) -> torch.Tensor:
            with get_cuda_rng_tracker().fork():
                result = torch.nn.functional.dropout(values, 0.5)
            seen.append(result.detach().clone())
            return result

        checkpoint(dropped, False, weights).sum().backward()
        return len(seen) == 2 and torch.equal(seen[0], seen[1]) and torch.equal(weights.grad, seen[0])

    assert run_ranks(draw, 1) == [True]
