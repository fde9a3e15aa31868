"""The network as a function of its trainable parameters, and its derivatives in chunks that fit the memory."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
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


class ForwardMode:
    """Features by forward-mode products: tangents of all parameters go through the network, many at a time.

    Args:
        network: what is differentiated.
        tangents_per_chunk: how many at a time.
        dtype: of the arithmetic, if not that of the weights.
    """

    def __init__(self, network: Network, tangents_per_chunk: int, dtype: torch.dtype | None = None):
        self.network, self.tangents_per_chunk, self.dtype = network, tangents_per_chunk, dtype

    def features(self, inputs: Inputs, basis: Basis) -> tuple[Tensor, Tensor]:
        """Outputs (B, C) and Ψ = J V (B, C, K), one primal pass for each chunk of tangents."""
        # Forward mode is slow where a weight and its tangent differ in layout: channels_last is undone here.
        parameters = {name: self._cast(value).contiguous() for name, value in self.network.parameters_taken.items()}
        others = {}
        if self.dtype is not None:  # autocast does not work under vmap and jvp
            state = self.network.model.state_dict()
            others = {name: self._cast(value) for name, value in state.items() if name not in parameters}
            inputs = tree_map(self._cast, inputs)

        def product(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return jvp(lambda at: self.network.at(others | at, inputs), (parameters,), (tangent,))[:2]

        out_dims: Any = (None, -1)  # vmap's annotation does not know None for "the same for all tangents"
        products = []
        for part in slices(len(next(iter(basis.values()))), self.tangents_per_chunk):
            tangents = {name: basis[name][part].to(value.dtype) for name, value in parameters.items()}
            products.append(vmap(product, out_dims=out_dims)(tangents))
        return products[0][0], torch.cat([features for _, features in products], dim=-1)

    def _cast(self, leaf: Any) -> Any:
        if self.dtype is None or not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.to(self.dtype)


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


def num_samples(inputs: Inputs) -> int:
    """B, the length of the first axis of every tensor in `inputs`."""
    return next(leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def rows(inputs: Inputs, part: slice) -> Inputs:
    """Some of the samples of a batch."""
    return tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) else leaf, inputs)


def slices(total: int, size: int) -> list[slice]:
    """0 … total in pieces of `size`."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
