"""States of the whole process that derivatives need: which kernels are used, and how exactly they multiply.

Each is entered by the first thread that needs it, and put back by the last: each on its own would put back what another
had set.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.quasirandom import SobolEngine

WITHOUT_FLOAT64 = {"mps"}  # kinds of devices

# What is no fault of the network's, and no reason to try another way.
BROKEN = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class Shared:
    """A state of the whole process that some threads need."""

    def __init__(self, enter: Callable[[], AbstractContextManager]):
        self._enter, self._lock, self._count = enter, threading.Lock(), 0
        self._entered: AbstractContextManager | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter it."""
        with self._lock:
            if self._count == 0:
                self._entered = self._enter()
                self._entered.__enter__()
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0 and self._entered is not None:
                    self._entered.__exit__(None, None, None)


@contextmanager
def _set(**flags: bool) -> Iterator[None]:
    """Set flags of cuDNN, and leave the others as they are: `cudnn.flags` has defaults of its own for them."""
    before = {name: getattr(cudnn, name) for name in flags}
    try:
        for name, value in flags.items():
            setattr(cudnn, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(cudnn, name, value)


@contextmanager
def _ieee() -> Iterator[None]:
    """Let float32 be multiplied as such, by whichever of torch's two interfaces the user has set it."""
    with ExitStack() as stack:
        if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9; reading the older flags may raise then
            backends: Any = torch.backends
            for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul):
                stack.callback(setattr, part, "fp32_precision", part.fp32_precision)
                part.fp32_precision = "ieee"
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            stack.enter_context(_set(allow_tf32=False))
        yield


def in_full(tensor: Tensor) -> AbstractContextManager:
    """Compute in a tensor's own precision, whatever autocast there is around it."""
    return torch.autocast(tensor.device.type, enabled=False)


eager = Shared(lambda: torch.compiler.set_stance("force_eager"))  # what was compiled runs as it was
plain_attention = Shared(lambda: sdpa_kernel(SDPBackend.MATH))  # fused kernels have no rule for forward mode
repeatable = Shared(lambda: _set(benchmark=False, deterministic=True))  # no kernel is chosen by a clock
exact = Shared(_ieee)  # TF32 has three digits: too few to compare gradients by, or for a Gram matrix
native_recurrence = Shared(lambda: _set(enabled=False))  # cuDNN's has no backward pass in eval mode


def centred(features: Tensor) -> Tensor:
    """Features (*, C, K) of the outputs minus their mean."""
    return features - features.mean(-2, keepdim=True)


def standard_normal(num_samples: int, rank: int, seed: int) -> Tensor:
    """(S, K) draws, the same on every device."""
    return torch.randn(num_samples, rank, generator=torch.Generator().manual_seed(seed))


def spread_normal(num_samples: int, rank: int, seed: int) -> Tensor:
    """(S, K) draws that are spread more evenly than random ones are: quasi-Monte Carlo (Sobol, scrambled).

    It has 21,201 dimensions; what is beyond them is random.
    """
    most = min(rank, SobolEngine.MAXDIM)
    uniform = SobolEngine(most, scramble=True, seed=seed).draw(num_samples, dtype=torch.float64)
    even = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).float()
    return torch.cat([even, standard_normal(num_samples, rank - most, seed)], 1)
