"""A pretend accelerator: tensors on "pretend:0" have their values in a tensor on the CPU, and cannot meet others.

What mixes devices raises as CUDA does, so that tests without a GPU find it. Each operation on such tensors is taken at
the bottom of torch's dispatcher, below autograd, vmap and forward mode, and done on the CPU: results are the same to
the last bit. It does not know: fused recurrent cells, nested tensors, gradients of complex numbers, scripted modules.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from lightning.pytorch.accelerators.accelerator import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

KNOWN = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # not in older torch
CPU = torch.device("cpu")
BETWEEN = {"aten::_to_copy", "aten::copy_", "aten::copy"}  # devices: what copies
STRICT = {"aten::cat", "aten::stack"}  # which take not even a number from the CPU
# Whose second argument may be on the CPU: indices, lengths.
INDEXING = {
    "aten::index",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
    "aten::_pack_padded_sequence",
}


class Pretend(Tensor):
    """A tensor on the pretend device."""

    host: Tensor  # its values

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> Self:
        """Put values on the device, without copying them."""
        layout = host.shape, host.stride(), host.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, *layout, dtype=host.dtype, device=device(), requires_grad=requires_grad
        )
        made.host = host
        return made

    def __init__(self, host: Tensor, requires_grad: bool = False):
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Do an operation."""
        return _do(op, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Pretend({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretend":
        if id(self) not in memo:
            memo[id(self)] = made = Pretend(copy.deepcopy(self.host.detach()), self.requires_grad)
            vars(made).update(vars(self) | {"host": made.host})  # it may be a parameter
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Pretend, (self.host, self.requires_grad)

    @property
    def data(self) -> Tensor:
        """Without a graph."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError("the pretend device cannot take other .data: copy_() them")

    def untyped_storage(self) -> Any:
        """Where the values are, so that it can be told who shares them."""
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        """Where they begin."""
        return self.host.data_ptr()

    def tolist(self) -> Any:
        """What C++ would read from memory."""
        return self.host.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """As on a GPU, there is none."""
        raise TypeError("can't convert pretend:0 device type tensor to numpy: copy it to host memory first.")

    __array__ = numpy


def device() -> torch.device:
    """The device; torch knows its name from `register` on."""
    return torch.device("pretend", 0)


def register() -> None:
    """Make the device known to torch, for good: before the first backward pass, which counts the devices."""
    if KNOWN and not _libraries:
        backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
        _libraries.append(_library())


@contextmanager
def in_use() -> Iterator[None]:
    """Let `module.to` keep its parameters, as it does on the way to other devices."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


_libraries: list[torch.library.Library] = []


class _Backend:
    """What torch asks of a device's module. It is not available: nobody is to choose it by himself."""

    def __getattr__(self, name: str) -> Any:
        answers = {
            "is_initialized": True,
            "is_available": False,
            "current_device": 0,
            "device_count": 1,
            "_is_in_bad_fork": False,
            "manual_seed_all": None,
            "get_rng_state": torch.zeros(1, dtype=torch.uint8),
            "set_rng_state": None,
            "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
        }
        if name not in answers:
            raise AttributeError(name)
        return lambda *args, **kwargs: answers[name]


def _library() -> torch.library.Library:
    """Operations that make tensors from nothing, for the pretend device."""
    library = torch.library.Library("aten", "IMPL")
    for full in torch._C._dispatch_get_all_op_names():
        name, _, overload = full.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
        if not full.startswith("aten::") or op is None or all(a.name != "device" for a in op._schema.arguments):
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
            library.impl(full[6:], lambda *args, op=op, **kwargs: _do(op, args, kwargs), "PrivateUse1")
    return library


def _do(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU's values, if its arguments are on one device; its results on that, or where they go."""
    name, leaves = op._schema.name, tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    here = any(isinstance(tensor, Pretend) for tensor in tensors)
    target = kwargs.get("device")
    on_cpu = not here if target is None else torch.device(target).type == "cpu"
    if name not in BETWEEN:
        _check(name, _compared(name, args, tensors) if here else [], leaves, on_cpu)
    if name == "aten::_efficientzerotensor":  # which has no memory, and a dispatch key of its own to know it by
        op = torch.ops.aten.zeros.default
    wrapped: dict[int, Tensor] = {}

    def host(leaf: Any) -> Any:
        inner = leaf.host if isinstance(leaf, Pretend) else leaf
        if isinstance(leaf, Tensor):
            wrapped[id(inner)] = leaf
        return CPU if isinstance(leaf, torch.device) else inner

    found = op(*tree_map(host, args), **tree_map(host, kwargs))
    seen = op.is_view and not tensors[0].is_inference()  # a view of a tensor that is none of inference is none, too
    place = lambda leaf: wrapped.get(id(leaf), leaf if on_cpu else Pretend(leaf)) if isinstance(leaf, Tensor) else leaf  # noqa: E731
    with torch.inference_mode(torch.is_inference_mode_enabled() and not seen):
        return tree_map(place, found)


def _compared(name: str, args: tuple, tensors: list[Tensor]) -> list[Tensor]:
    """Tensors that have to be on one device: a tensor on the device takes indices from either."""
    if name in INDEXING and isinstance(args[0], Pretend):
        return [leaf for leaf in (args[0], *args[2:]) if isinstance(leaf, Tensor)]
    return tensors


def _check(name: str, tensors: list[Tensor], leaves: list[Any], on_cpu: bool) -> None:
    """Raise what CUDA raises."""
    if any(not isinstance(tensor, Pretend) and (tensor.ndim or name in STRICT) for tensor in tensors):
        found = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {found}")
    if not on_cpu and any(isinstance(leaf, torch.Generator) for leaf in leaves):  # all there are are the CPU's
        raise RuntimeError("Expected a 'pretend' device type for generator but found 'cpu'")


class PretendAccelerator(Accelerator):
    """For a Trainer."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""

    def teardown(self) -> None:
        """Nothing to take down."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """One."""
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """That one."""
        return [device()]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """In a test."""
        return True

    @staticmethod
    def name() -> str:
        """Name of it."""
        return "pretend"


def strategy() -> SingleDeviceStrategy:
    """For a Trainer whose root device is the pretend one."""
    return SingleDeviceStrategy(device=device(), accelerator=PretendAccelerator())
