"""States of the whole process: set while they are needed, put back afterwards, by whichever interface they were set."""

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_case
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ella import fit_ella, layerwise
from lightning_ella.data import seeded
from lightning_ella.linearize import Network, as_function
from lightning_ella.numerics import exact, native_recurrence, repeatable


def flags() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32


def by_the_newer_interface() -> tuple[str, ...]:
    backends: Any = torch.backends
    return tuple(part.fp32_precision for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn))


@pytest.mark.usefixtures("as_set_by_a_user")
def test_flags_are_set_and_put_back():
    before = flags()
    with exact(), repeatable(), native_recurrence(), exact():
        cudnn = torch.backends.cudnn
        assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == (False, False, True)
        if hasattr(torch.backends, "fp32_precision"):
            assert set(by_the_newer_interface()) == {"ieee"}
        else:
            assert torch.get_float32_matmul_precision() == "highest"
    assert flags() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has the older interface only")
def test_flags_that_were_set_by_the_newer_interface_are_put_back():
    code = """
import torch
from lightning_ella.numerics import exact
torch.backends.cudnn.conv.fp32_precision = "tf32"
torch.backends.cuda.matmul.fp32_precision = "tf32"
with exact():
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("as_set_by_a_user")
def test_the_last_thread_puts_back_what_the_first_found():
    before, inside, leave = flags(), threading.Event(), threading.Event()

    def other() -> None:
        with repeatable():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with repeatable():
        thread.start()
        inside.wait()
    assert not torch.backends.cudnn.benchmark  # the other is still in it
    leave.set()
    thread.join()
    assert flags() == before


@pytest.mark.usefixtures("as_set_by_a_user")
def test_networks_are_evaluated_by_kernels_that_are_not_chosen_by_the_clock(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with as_function():
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark


def test_recurrent_networks_leave_cudnn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.enabled)
        return model(x)[0][:, -1]

    Network(nn.GRU(3, 4, batch_first=True), forward)(torch.randn(2, 5, 3))
    Network(nn.Linear(3, 4), lambda model, x: seen.append(torch.backends.cudnn.enabled) or model(x))(torch.randn(2, 3))
    assert seen == [False, True]


@pytest.mark.parametrize("part", ["pull_back", "structure"])
def test_memory_that_runs_out_is_no_missing_rule(part: str, monkeypatch: pytest.MonkeyPatch):
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = make_case("mlp")
    loader = DataLoader(TensorDataset(case.inputs, torch.randint(2, (len(case.inputs),))), 8)
    monkeypatch.setattr(layerwise, part, fails)
    with pytest.raises(torch.OutOfMemoryError):
        fit_ella(case.model, loader, num_landmarks=4, rank=2)


@pytest.mark.parametrize("begun", [False, True])
def test_random_states_of_cuda_are_left_alone(begun: bool, monkeypatch: pytest.MonkeyPatch):
    """Nothing begins CUDA in a process that has not, and no seed waits for it to begin."""
    seeded_all: list[int] = []
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: begun)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_all.append)
    fork: Callable = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(list(devices)) or fork([]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with seeded(3):
        drawn = torch.rand(())
    assert drawn == torch.rand((), generator=torch.Generator().manual_seed(3))
    assert asked == [[0, 1] if begun else []]
    assert begun or not seeded_all
