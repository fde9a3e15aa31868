"""The network as a function of its trainable parameters, and what is said about batches."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from .data import Inputs

log = logging.getLogger(__name__)

Basis = Mapping[str, Tensor]  # parameter name -> (K, *shape)
Forward = Callable[[nn.Module, Inputs], Tensor]


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """Evaluate `model(inputs)`: how a network is called unless the user says otherwise."""
    return model(inputs)


Parameters = str | Collection[str] | Callable[[str, nn.Parameter], bool] | None


def chosen_names(model: nn.Module, parameters: Parameters) -> list[str] | None:
    """Names of the parameters that a pattern (as of files), several patterns or a predicate choose; None for None.

    Raises:
        ValueError: if they choose none.
    """
    if parameters is None:
        return None
    patterns = [parameters] if isinstance(parameters, str) else parameters

    def wanted(name: str, parameter: nn.Parameter) -> bool:
        return patterns(name, parameter) if callable(patterns) else any(fnmatchcase(name, one) for one in patterns)

    named = list(model.named_parameters())
    first = {parameter: name for name, parameter in named}  # tied ones may be called by any of their names
    names = [
        *dict.fromkeys(
            first[parameter]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if wanted(name, parameter) and (parameter.is_floating_point() or parameter.is_complex())
        )
    ]
    if not names:
        some = ", ".join(name for name, _ in named[-3:])
        raise ValueError(f"parameters={parameters!r} chooses none of the network's parameters (…, {some}).")
    return names


@contextmanager
def as_function(model: nn.Module, names: Collection[str] = ()) -> Iterator[None]:
    """Make `model` a plain function of its parameters and inputs; afterwards it is as it was.

    Every submodule is in eval mode, no graph is recorded, inference mode is off (forward-mode products are silently
    zero there in some releases of torch), and so is autocast; attention takes the kernel that has a forward-mode rule,
    and what was compiled runs eagerly. The parameters `names` require gradients, whoever froze them meanwhile.
    """
    training = [module for module in model.modules() if module.training]
    frozen = [
        parameter for name, parameter in model.named_parameters() if name in names and not parameter.requires_grad
    ]
    kinds = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in training:
            module.training = False
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for module in training:
                module.training = True


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, tuple, Any], None]) -> Iterator[None]:
    """Call `hook(module, args, output)` after each call of a module; scripted ones take no hooks."""
    handles = []
    try:
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what a `kind` does, its hooks aside."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module)


class Network(nn.Module):
    """`forward(model, ·)` as a function of some parameters of `model`: `names`, or those that require gradients.

    Raises:
        ValueError: if there are none, or if they are neither float32 nor float64.
    """

    def __init__(self, model: nn.Module, forward: Forward = call, names: Collection[str] | None = None):
        super().__init__()
        self.model, self._forward = model, forward
        self.output_shape: tuple[int, ...] = ()  # of the last outputs, without B
        self.names: dict[Tensor, str] = {
            parameter: name
            for name, parameter in model.named_parameters()
            if (parameter.requires_grad if names is None else name in names)
        }
        if not self.names:
            raise ValueError(
                "no parameter of the network has requires_grad=True, so there is nothing to be uncertain about: "
                "set requires_grad=True on the ones that ELLA should take into account."
            )
        for parameter, name in self.names.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                fix = "call model.float(), or train with precision='bf16-mixed'"
                if parameter.is_complex():
                    fix = "keep its real and imaginary parts, and use torch.view_as_complex(weight) in forward()"
                raise ValueError(f"ELLA needs float32 or float64 weights, but {name} is {parameter.dtype}: {fix}.")

    def forward(self, inputs: Inputs) -> Tensor:
        """Outputs (B, C) of the network as it is; those of several positions one after the other."""
        outputs = self._forward(self.model, inputs)
        outputs = check_outputs(getattr(outputs, "logits", outputs), num_samples(inputs))  # as Hugging Face has them
        if outputs.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(outputs.device.type):
            outputs = outputs.float()  # of a frozen part in half precision
        self.output_shape = tuple(outputs.shape[1:])
        return outputs.flatten(1) if outputs.ndim > 1 else outputs.unsqueeze(1)

    def at_positions(self, flat: Tensor, axis: int | None) -> Tensor:
        """What belongs to the outputs of the last call, (B, D, …), as (B, *, C, …): the C are at `axis`."""
        if axis is None:
            return flat
        last = len(self.output_shape)
        return flat.unflatten(1, self.output_shape).movedim(last if axis == -1 else axis, last)

    def at(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Outputs (B, C) with some `parameters` replaced."""
        return functional_call(self, {f"model.{name}": value for name, value in parameters.items()}, (inputs,))

    @property
    def parameters_taken(self) -> dict[str, Tensor]:
        """The parameters taken into account, by name, without their graph."""
        return {name: parameter.detach() for parameter, name in self.names.items()}

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(parameter.numel() for parameter in self.names)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.names)).device


def check_outputs(outputs: Any, batch_size: int) -> Tensor:
    """Return `outputs` if they are (B, …) real numbers; raise a ValueError that names the fix if not."""
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != batch_size or not outputs.numel():
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the network must map {batch_size} inputs to ({batch_size}, …) outputs, but it gives {found}: "
            "pass forward=lambda model, inputs: outputs."
        )
    return outputs


def channel_axis(outputs: tuple[int, ...], channels: str) -> int | None:
    """Where the network's outputs (B, *outputs) have their C; None for (B,).

    "auto" takes the last axis of (B, C) and (B, L, C), and the first after B of (B, C, H, W).
    """
    if not outputs:
        return None
    return {"auto": 1 if len(outputs) > 2 else -1, "first": 1, "last": -1}[channels]


def check_finite(logits: Tensor) -> Tensor:
    """Return `logits` if they are finite; raise a ValueError that names the fix if not."""
    if not logits.isfinite().all():
        raise ValueError(
            "the network's outputs are NaN or infinite: check its weights (a diverged training?) and the inputs."
        )
    return logits


def version(tensor: Tensor) -> int:
    """Changes whenever `tensor` is written to; an inference tensor does not count that."""
    return 0 if tensor.is_inference() else tensor._version


def num_samples(inputs: Inputs) -> int:
    """B, the length of the first axis of every tensor in `inputs`.

    Raises:
        TypeError: if there is no tensor in them.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            return leaf.shape[0]
    raise TypeError(
        f"ELLA finds no tensor in inputs that are a {type(inputs).__name__}: pass unpack= that gives a tensor, or a "
        "dict, list or tuple of them, such as dict(batch)."
    )


def rows(inputs: Inputs, part: slice) -> Inputs:
    """Some of the samples of a batch."""
    return tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) else leaf, inputs)


def slices(total: int, size: int) -> list[slice]:
    """0 … total in pieces of about the same size, `size` at most."""
    size = max(1, ceil(total / max(1, ceil(total / size))))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
