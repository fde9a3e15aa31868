"""The network as a function of its trainable parameters, and what is said about batches."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
                raise ValueError(
                    f"ELLA needs float32 or float64 weights, but {name} is {parameter.dtype}: call model.float(), "
                    "or train with precision='bf16-mixed'."
                )

    def forward(self, inputs: Inputs) -> Tensor:
        """Call the network as it is."""
        return self._forward(self.model, inputs)

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


def check_logits(logits: Any, batch_size: int) -> Tensor:
    """Return `logits` if they are finite and (B, C) with C >= 2; raise a ValueError that names the fix if not."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch_size or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the network must map {batch_size} inputs to ({batch_size}, C) logits with C >= 2, but it gives {found}: "
            "pass forward=lambda model, inputs: logits."
        )
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
    """0 … total in pieces of `size`."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
