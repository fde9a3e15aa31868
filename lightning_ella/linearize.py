"""The network as a function of its trainable parameters: gradients of its outputs, and products with tangents."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from .data import Inputs

Basis = Mapping[str, Tensor]  # parameter name -> (K, *shape)
Forward = Callable[[nn.Module, Inputs], Tensor]


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """Evaluate `model(inputs)`: how a network is called unless the user says otherwise."""
    return model(inputs)


@contextmanager
def as_function(model: nn.Module) -> Iterator[None]:
    """Make `model` a plain function of its parameters and inputs; afterwards it is as it was.

    Every submodule is in eval mode, no graph is recorded, inference mode is off (forward-mode products are silently
    zero there in some releases of torch), attention takes the kernel that has a forward-mode rule, and what
    was compiled runs eagerly.
    """
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def num_samples(inputs: Inputs) -> int:
    """B, the length of the first axis of every tensor in `inputs`."""
    return next(leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


class Linearization:
    """First-order view of a network around its weights, over the parameters with `requires_grad`.

    Use it inside `as_function(model)`.

    Args:
        model: the network; `forward(model, inputs)` must give (B, C) outputs, each row of its own input alone.
        forward: how to call it.
        samples_per_chunk: inputs that go through the network at a time.
        tangents_per_chunk: tangents that go through it at a time.

    Raises:
        ValueError: if no parameter of `model` requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward = call,
        *,
        samples_per_chunk: int = 16,
        tangents_per_chunk: int = 20,
    ):
        self.model, self.forward = model, forward
        self.samples_per_chunk, self.tangents_per_chunk = samples_per_chunk, tangents_per_chunk
        self.parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                "no parameter of the network has requires_grad=True, so there is nothing to be uncertain about: "
                "set requires_grad=True on the ones that ELLA should take into account."
            )
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"ELLA needs float32 or float64 weights, but {name} is {parameter.dtype}: call model.float(), "
                    "or train with precision='bf16-mixed'."
                )

    def logits(self, inputs: Inputs) -> Tensor:
        """Outputs (B, C) of the network as it is.

        Raises:
            ValueError: if the output is not (B, C) with C >= 2 or not finite.
        """
        return check_logits(self.forward(self.model, inputs), num_samples(inputs))

    def gradients(self, inputs: Inputs, outputs: Tensor) -> Tensor:
        """Rows ∇_θ f_c(x), (B, P), with c = `outputs[b]` at the b-th input; parameters in their order, flat."""
        num_outputs = self.logits(_rows(inputs, slice(0, 1))).shape[1]
        chosen = nn.functional.one_hot(outputs.to(self.device), num_outputs)  # (B, C)

        def output(parameters, sample, chosen):
            logits = self._apply(parameters, tree_map(_unsqueeze, sample))  # (1, C)
            return (logits.squeeze(0) * chosen).sum()

        rows = []
        for part in _chunks(num_samples(inputs), self.samples_per_chunk):
            gradients = vmap(grad(output), in_dims=(None, 0, 0))(self.parameters, _rows(inputs, part), chosen[part])
            rows.append(torch.cat([gradients[name].flatten(1) for name in self.parameters], dim=1))
        return torch.cat(rows)

    def features(self, inputs: Inputs, basis: Basis) -> tuple[Tensor, Tensor]:
        """Outputs f(x), (B, C), and features Ψ(x) = J(x) V, (B, C, K), by forward-mode products."""
        rank = len(next(iter(basis.values())))
        logits, features = [], []
        for part in _chunks(num_samples(inputs), self.samples_per_chunk):
            chunk = _rows(inputs, part)
            products = [
                self._products(chunk, {name: tangent[ks] for name, tangent in basis.items()})
                for ks in _chunks(rank, self.tangents_per_chunk)
            ]
            logits.append(products[0][0])
            features.append(torch.cat([product for _, product in products], dim=-1))
        return check_logits(torch.cat(logits), num_samples(inputs)), torch.cat(features)

    def _products(self, inputs: Inputs, tangents: Basis) -> tuple[Tensor, Tensor]:
        """(B, C) outputs and their (B, C, K') derivatives along K' tangents, from one primal pass."""

        def product(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return jvp(lambda parameters: self._apply(parameters, inputs), (self.parameters,), (tangent,))[:2]

        out_dims: Any = (None, -1)  # vmap's annotation does not know None for "the same for all tangents"
        return vmap(product, out_dims=out_dims)({name: tangents[name] for name in self.parameters})

    def _apply(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        bound = _Bound(self.model, self.forward)
        return functional_call(bound, {f"model.{name}": value for name, value in parameters.items()}, (inputs,))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device


class _Bound(nn.Module):
    """`forward(model, ·)` as a module, so that `functional_call` reaches the model's parameters."""

    def __init__(self, model: nn.Module, forward: Forward):
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, inputs: Inputs) -> Tensor:
        return self._forward(self.model, inputs)


def check_logits(logits: Any, batch_size: int) -> Tensor:
    """Return `logits` if they are finite and (B, C) with C >= 2; raise a ValueError that names the fix if not."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch_size or logits.shape[1] < 2:
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


def _unsqueeze(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf


def _rows(inputs: Inputs, part: slice) -> Inputs:
    return tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) else leaf, inputs)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]
