"""Reverse mode, layer by layer: products with J that never hold more than one layer's rows of it.

One forward pass keeps each layer's input, one backward pass for each cotangent brings the gradient of each layer's
output, and a rule contracts the two with the layer's part of the basis. Autograd computes no gradient of a
parameter. What that earns: the cost hardly depends on K, and rows of J come a batch at a time.

B samples, S cotangents each (S = C for all of J), T positions or tokens, K columns of the basis.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import vjp, vmap
from torch.nn.functional import batch_norm as normalize_batch
from torch.nn.functional import group_norm as normalize_groups
from torch.nn.functional import layer_norm as normalize_layer
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

from .data import Inputs
from .folding import UNFOLDED, Folding
from .linearize import Basis, Network, num_samples, rows

Cotangents = Callable[[Tensor], Tensor]  # logits (B, C) -> (B, S, C)
Gradients = Sequence[Tensor]  # S gradients of a layer's output, each of its shape

MAX_ELEMENTS = 2**22  # of J, for one layer, held at a time: what stays in a cache


class Rows:
    """Rows of J for one parameter, (B, S, p)."""

    def __init__(self, values: Tensor):
        self.values = values.flatten(2)

    def dense(self) -> Tensor:
        """(B, S, p)."""
        return self.values

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K) from a basis (K, p)."""
        B, S, _ = self.values.shape  # BLAS is up to three times faster with the few rows first, in bf16
        return (basis.to(self.values.dtype) @ self.values.flatten(0, 1).T).T.view(B, S, -1)


class OuterProducts(Rows):
    """Rows of J for the weights of G groups, each a sum of T outer products.

    Args:
        gradients: of the outputs, (B, G, S * o, T).
        patches: inputs that each output sees, (B, G, d, T).
        num_cotangents: S.
    """

    def __init__(self, gradients: Tensor, patches: Tensor, num_cotangents: int):
        self.gradients, self.patches, self.num_cotangents = gradients, patches, num_cotangents

    def dense(self) -> Tensor:
        """(B, S, G * o * d)."""
        B, G, _, _ = self.gradients.shape
        products = (self.gradients @ self.patches.mT).view(B, G, self.num_cotangents, -1)
        return products.transpose(1, 2).reshape(B, self.num_cotangents, -1)

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K), by way of the rows or of the layer's response to the basis, whichever is less work."""
        _, G, So, T = self.gradients.shape
        S, d, K = self.num_cotangents, self.patches.shape[2], len(basis)
        basis = basis.to(self.patches.dtype)
        if K * T * (d + S) < S * d * (T + K):  # multiply-adds for an output channel
            tangents = basis.view(K, G, -1, d)
            responses = torch.einsum("bgdt,kgod->bgotk", self.patches, tangents)
            return torch.einsum("bgsot,bgotk->bsk", self.gradients.unflatten(2, (S, -1)), responses)
        size = max(1, MAX_ELEMENTS // (G * So * d))
        parts = zip(self.gradients.split(size), self.patches.split(size), strict=True)
        return torch.cat([Rows(OuterProducts(g, a, S).dense()).times(basis) for g, a in parts])


Terms = Iterator[tuple[Tensor | None, Rows]]  # a parameter, and what this call of its layer adds to its rows


def linear(layer: nn.Linear, inputs: Tensor, gradients: Gradients, B: int) -> Terms:
    """(B, *, in) to (B, *, out)."""
    patches = inputs.reshape(B, 1, -1, layer.in_features).mT
    g = torch.stack([gradient.reshape(B, -1, layer.out_features) for gradient in gradients], 1)  # (B, S, T, o)
    yield layer.weight, OuterProducts(g.mT.flatten(1, 2).unsqueeze(1), patches, len(gradients))
    if layer.bias is not None:
        yield layer.bias, Rows(g.sum(2))


def conv2d(layer: nn.Conv2d, inputs: Tensor, gradients: Gradients, B: int) -> Terms:
    """(B, in, H, W) to (B, out, H', W')."""
    G, S = layer.groups, len(gradients)
    g = torch.stack(list(gradients), 1).flatten(3)  # (B, S, out, T)
    grouped = g.unflatten(2, (G, -1)).transpose(1, 2).flatten(2, 3)  # (B, G, S * o, T)
    yield layer.weight, OuterProducts(grouped, sliding_windows(layer, inputs).unflatten(1, (G, -1)), S)
    if layer.bias is not None:
        yield layer.bias, Rows(g.sum(3))


def sliding_windows(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What `F.unfold` gives, (B, in * kernel, T), by one strided copy: many times faster on a CPU."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = pad(inputs, layer._reversed_padding_repeated_twice, mode)
    for axis, size, stride, dilation in zip((2, 3), layer.kernel_size, layer.stride, layer.dilation, strict=True):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)
    windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]]  # (B, in, H', W', kernel, kernel)
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(1, 3).flatten(2)


def batch_norm(layer: nn.BatchNorm2d, inputs: Tensor, gradients: Gradients, B: int) -> Terms:
    """(B, channels, *), with the running statistics."""
    return scaled_channels(
        layer, normalize_batch(inputs, layer.running_mean, layer.running_var, eps=layer.eps), gradients
    )


def folded_norm(layer: nn.BatchNorm2d, inputs: Tensor, gradients: Gradients, B: int) -> Terms:
    """(B, channels, *), with all but the shift folded into the convolution before."""
    yield layer.bias, Rows(torch.stack([g.sum((2, 3)) for g in gradients], 1))


def group_norm(layer: nn.GroupNorm, inputs: Tensor, gradients: Gradients, B: int) -> Terms:
    """(B, channels, *)."""
    return scaled_channels(layer, normalize_groups(inputs, layer.num_groups, eps=layer.eps), gradients)


def scaled_channels(layer: Any, normalized: Tensor, gradients: Gradients) -> Terms:
    """Scale and shift of the second axis of (B, channels, *)."""
    shape = (*normalized.shape[:2], -1)
    yield layer.weight, Rows(torch.stack([(g * normalized).reshape(shape).sum(2) for g in gradients], 1))
    yield layer.bias, Rows(torch.stack([g.reshape(shape).sum(2) for g in gradients], 1))


def layer_norm(layer: nn.LayerNorm, inputs: Tensor, gradients: Gradients, B: int) -> Terms:
    """(B, *, normalized shape)."""
    shape = (B, -1, layer.weight.numel())
    normalized = normalize_layer(inputs, layer.normalized_shape, eps=layer.eps)
    yield layer.weight, Rows(torch.stack([(g * normalized).reshape(shape).sum(1) for g in gradients], 1))
    yield layer.bias, Rows(torch.stack([g.reshape(shape).sum(1) for g in gradients], 1))


Rule = Callable[[Any, Tensor, Gradients, int], Terms]
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
}


@dataclass
class Call:
    """A call of a layer: its input, and where in the graph its output is (an in-place operation may follow)."""

    layer: nn.Module
    rule: Rule
    inputs: Tensor
    output: Any


class Layerwise:
    """Products with the Jacobian of a network in reverse mode.

    Each parameter takes one of three routes, found out once from two samples:
    a rule for its layer; where it has a first axis of length 1 (class tokens, position embeddings), a copy for each
    sample; else, a backward pass for each sample, which is slow but always right.
    """

    def __init__(self, network: Network):
        self.network = network
        self._by_rule: frozenset[str] | None = None
        self._expanded: frozenset[str] = frozenset()

    def products(
        self, inputs: Inputs, cotangents: Cotangents, basis: Basis, folding: Folding = UNFOLDED
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, C), and cotangents times J V, (B, S, K), from V or its folded tangents."""
        logits, terms = self._terms(inputs, cotangents, folding)
        return logits, sum(term.times(basis[name].flatten(1)) for name, term in terms)  # type: ignore[return-value]

    def features(self, inputs: Inputs, basis: Basis, folding: Folding = UNFOLDED) -> tuple[Tensor, Tensor]:
        """Outputs (B, C) and Ψ = J V, (B, C, K), from V or its folded tangents."""
        one_hot: Cotangents = lambda logits: torch.eye(logits.shape[1]).expand(len(logits), -1, -1)  # noqa: E731
        return self.products(inputs, one_hot, basis, folding)

    def rows(self, inputs: Inputs, cotangents: Cotangents) -> dict[str, Tensor]:
        """Cotangents times J: parameter name -> (B, S, p)."""
        total: dict[str, Tensor] = {}
        logits, terms = self._terms(inputs, cotangents, UNFOLDED)
        for name, term in terms:
            total[name] = total[name] + term.dense() if name in total else term.dense()
        for parameter, name in self.network.names.items():
            if name not in total:  # the outputs do not depend on it
                total[name] = parameter.new_zeros(len(logits), cotangents(logits).shape[1], parameter.numel())
        return total

    def bytes_held(self, inputs: Inputs) -> int:
        """Bytes that a cotangent of a sample takes for parameters whose rows of J cannot be had layer by layer."""
        self.by_rule(inputs)
        return sum(value.nbytes for value in self._uncovered().values())

    def by_rule(self, inputs: Inputs) -> Collection[str]:
        """Names of the parameters that only their layer uses, and in the way that its rule says."""
        if self._by_rule is None:
            with self._without_autocast():  # its rounding would look like an error
                self._find_routes(inputs)
        return self._by_rule or ()

    def _terms(
        self, inputs: Inputs, cotangents: Cotangents, folding: Folding
    ) -> tuple[Tensor, Iterator[tuple[str, Rows]]]:
        """Outputs (B, C) and, by and by, what adds up to the cotangents' products with J."""
        self.by_rule(inputs)
        logits, calls, expanded = self._forward(inputs, folding)
        v = cotangents(logits.detach()).to(logits)
        return logits.detach(), self._backward(inputs, logits, calls, expanded, v)

    def _forward(self, inputs: Inputs, folding: Folding) -> tuple[Tensor, list[Call], dict[str, Tensor]]:
        """Outputs with a graph, the calls of layers, and the parameters of which each sample has its own."""
        calls: list[Call] = []

        def record(rule: Rule) -> Callable[[nn.Module, tuple, Tensor], None]:
            def hook(layer: nn.Module, args: tuple, output: Tensor) -> None:
                if args and output.requires_grad:
                    calls.append(Call(layer, rule, args[0].detach(), get_gradient_edge(output)))

            return hook

        folded = {pair.norm: folded_norm for pair in folding.pairs}
        hooks = [
            layer.register_forward_hook(record(folded.get(layer, rule)))  # type: ignore[arg-type]
            for layer in self.network.model.modules()
            if any(self._has_rule(p) for p in layer.parameters(recurse=False))
            for kind, rule in RULES.items()
            if isinstance(layer, kind)
        ]
        taken = self.network.parameters_taken
        expanded = {
            n: taken[n].expand(num_samples(inputs), *taken[n].shape[1:]).requires_grad_() for n in self._expanded
        }
        values = {name: value.requires_grad_() for name, value in folding.values().items()}
        try:
            with torch.enable_grad(), folding.applied():
                logits = self.network.at(values | expanded, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, calls, expanded

    def _backward(
        self, inputs: Inputs, logits: Tensor, calls: list[Call], expanded: dict[str, Tensor], cotangents: Tensor
    ) -> Iterator[tuple[str, Rows]]:
        targets = [call.output for call in calls] + list(expanded.values())
        passes = [
            list(torch.autograd.grad(logits, targets, v, retain_graph=True, allow_unused=True))
            for v in (cotangents.unbind(1) if targets else ())
        ]
        B = len(logits)
        del logits
        for name in reversed(expanded):
            if (gradients := [p.pop() for p in passes])[0] is not None:
                yield name, Rows(torch.stack(gradients, 1))
        while calls:  # let go of each layer's gradients as soon as they are contracted
            layer_call, gradients = calls.pop(), [p.pop() for p in passes]
            if gradients[0] is not None:
                for parameter, term in layer_call.rule(layer_call.layer, layer_call.inputs, gradients, B):
                    if parameter is not None and self._has_rule(parameter):
                        yield self.network.names[parameter], term
        yield from self._one_by_one(inputs, cotangents)

    def _without_autocast(self) -> AbstractContextManager:
        return torch.autocast(self.network.device.type, enabled=False)

    def _has_rule(self, parameter: Tensor) -> bool:
        return self.network.names.get(parameter) in (self._by_rule or ())

    def _uncovered(self) -> dict[str, Tensor]:
        covered = (self._by_rule or frozenset()) | self._expanded
        return {name: value for name, value in self.network.parameters_taken.items() if name not in covered}

    def _one_by_one(self, inputs: Inputs, cotangents: Tensor) -> Iterator[tuple[str, Rows]]:
        """Rows of the parameters that no rule covers, by a backward pass for each sample."""
        rest = self._uncovered()
        if not rest:
            return

        def pull_back(sample: Inputs, v: Tensor) -> dict[str, Tensor]:
            one = tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, sample)
            pull = vjp(lambda values: self.network.at(values, one).squeeze(0), rest)[1]
            return vmap(pull)(v)[0]

        axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, inputs)
        with self._without_autocast():  # vmap knows no layer of mixed precision
            found = vmap(pull_back, in_dims=(axes, 0))(inputs, cotangents.to(next(iter(rest.values()))))
        for name, gradients in found.items():
            yield name, Rows(gradients)

    def _find_routes(self, inputs: Inputs) -> None:
        """Find out which parameters the rules give the right gradients of.

        They do not where a weight is used other than by calling its layer (functional attention, tying by hand),
        where a subclass computes something else, where a layer's input is overwritten, or where samples are not along
        its first axis. None of this can be seen from outside, so two samples are compared with plain autograd.
        """
        last = num_samples(inputs) - 1
        two = tree_map(
            lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a,
            *(rows(inputs, slice(i, i + 1)) for i in (0, last)),
        )
        taken = self.network.parameters_taken
        self._by_rule = frozenset(taken)
        self._by_rule = self._agreeing(two)
        self._expanded = frozenset(
            name for name, value in taken.items() if name not in self._by_rule and value.ndim > 1 and len(value) == 1
        )
        if self._expanded:
            self._expanded &= self._agreeing(two)

    def _agreeing(self, inputs: Inputs) -> frozenset[str]:
        """Names of the parameters whose rows for two samples are what autograd gives for each."""
        with torch.enable_grad():
            logits = self.network(inputs)  # of both at once: a ReLU at its kink must fall on the same side
            outputs = logits.unbind()
        v = torch.randn(2, 1, logits.shape[1], generator=torch.Generator().manual_seed(0)).to(logits)
        try:
            found = self.rows(inputs, lambda _: v)
        except RuntimeError:  # a shape that is not one of B samples
            return frozenset()
        agreeing = set(found)
        for b, output in enumerate(outputs):
            weights = list(self.network.names)
            exact = torch.autograd.grad(output, weights, v[b, 0], retain_graph=True, materialize_grads=True)
            for name, gradient in zip(self.network.names.values(), exact, strict=True):
                error = (found[name][b, 0] - gradient.flatten()).norm()
                if not error <= 1e-3 * gradient.norm() + 1e-12:
                    agreeing.discard(name)
        return frozenset(agreeing)
