"""Reverse mode, layer by layer: products with J that never hold more than one layer's rows of it.

One forward pass keeps each layer's input, one backward pass for each cotangent brings the gradient of each layer's
output, and a rule contracts the two with the layer's part of the basis. Autograd computes no gradient of a
parameter. What that earns: the cost hardly depends on K, and rows of J come a batch at a time.

B samples, S cotangents each (S = C for all of J), K columns of the basis.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import vjp, vmap
from torch.utils._pytree import tree_map

from .data import Inputs
from .folding import UNFOLDED, Folding
from .forward_mode import Reduce
from .linearize import Basis, Network, hooked, is_plain, num_samples, rows
from .rules import RULES, Rows, Rule, with_shift

log = logging.getLogger(__name__)

Cotangents = Callable[[Tensor], Tensor]  # logits (B, C) -> (B, S, C)

MAX_COTANGENTS = 64  # that are pulled back from one forward pass for features: nothing grows as C²


@dataclass
class Call:
    """A call of a layer: its input, and where in the graph its output is (an in-place operation may follow)."""

    layer: nn.Module
    rule: Rule
    inputs: Tensor
    output: Any
    length: int  # of the output's first axis


def pull_back(logits: Tensor, targets: list, cotangents: Tensor) -> list[Tensor | None]:
    """Gradients (n, S, *) of each target (n, *) for cotangents (B, S, C); None where the logits do not depend on it."""
    S = cotangents.shape[1]
    stacked: list[Tensor | None] = [None] * len(targets)
    for s, v in enumerate(cotangents.unbind(1) if targets else ()):
        found = torch.autograd.grad(logits, targets, v, retain_graph=s < S - 1, allow_unused=True)
        if S == 1:
            return [None if gradient is None else gradient.unsqueeze(1) for gradient in found]
        for i, gradient in enumerate(found):
            if gradient is not None:
                if stacked[i] is None:
                    stacked[i] = gradient.new_empty(len(gradient), S, *gradient.shape[1:])
                stacked[i][:, s] = gradient  # type: ignore[index] - not None by now
    return stacked


def one_hot(num_outputs: int, start: int) -> Tensor:
    """Rows of the identity matrix (C, C) from `start`, `MAX_COTANGENTS` at most."""
    numbers = torch.arange(start, min(start + MAX_COTANGENTS, num_outputs))
    return nn.functional.one_hot(numbers, num_outputs).float()


class Layerwise:
    """Products with the Jacobian of a network in reverse mode.

    Each parameter takes one of three routes, found out once from two samples:
    a rule for its layer; where it has a first axis of length 1 (class tokens, position embeddings), a copy for each
    sample; else, a backward pass for each sample, which is slow: of all samples at once by vmap where that is right
    (it is not for every layer), else in a loop.
    """

    def __init__(self, network: Network):
        self.network = network
        self._by_rule: frozenset[str] | None = None
        self._expanded: frozenset[str] = frozenset()
        self._loop = False
        self._subclasses = True  # whether the rules are for subclasses of their layers, too
        self._lengths: set[tuple[nn.Module, Fraction]] | None = None  # of each layer's output, in samples

    def products(
        self, inputs: Inputs, cotangents: Cotangents, basis: Basis, folding: Folding = UNFOLDED
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, C), and cotangents times J V, (B, S, K), from V or its folded tangents."""
        logits, terms = self._terms(inputs, cotangents, folding)
        return logits, sum(term.times(basis[name].reshape(len(basis[name]), -1)) for name, term in terms)  # type: ignore[return-value]

    def features(
        self, inputs: Inputs, basis: Basis, folding: Folding = UNFOLDED, reduce: Reduce | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, C) and Ψ = J V, (B, C, K), from V or its folded tangents; as `reduce(outputs, Ψ)` if given."""
        found, C = [], MAX_COTANGENTS
        while sum(part.shape[1] for part in found) < C:  # a pass for so many outputs at a time
            start = len(found) * MAX_COTANGENTS
            some: Cotangents = lambda f, start=start: one_hot(f.shape[1], start).expand(len(f), -1, -1)  # noqa: E731
            logits, products = self.products(inputs, some, basis, folding)
            found.append(products)
            C = logits.shape[1]
        products = torch.cat(found, 1) if len(found) > 1 else found[0]
        return logits, products if reduce is None else reduce(logits, products)  # type: ignore[possibly-undefined]

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

        def record(layer: nn.Module, args: tuple, output: Tensor) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
                calls.append(Call(layer, rules[layer], args[0].detach(), get_gradient_edge(output), len(output)))

        rules: dict[nn.Module, Rule] = {
            layer: rule
            for layer in self.network.model.modules()
            if any(self._has_rule(p) for p in layer.parameters(recurse=False)) and (rule := self._rule(layer))
        }
        for pair in folding.pairs:
            del rules[pair.norm]
            rules[pair.conv] = partial(with_shift, pair.norm)
        taken = self.network.parameters_taken
        expanded = {
            n: taken[n].expand(num_samples(inputs), *taken[n].shape[1:]).requires_grad_() for n in self._expanded
        }
        values = {name: value.requires_grad_() for name, value in folding.values().items()}
        with hooked(rules, record), torch.enable_grad(), folding.applied():
            logits = self.network.at(values | expanded, inputs)
        irregular = _lengths(calls, len(logits)) - self._lengths if self._lengths is not None else ()
        if irregular:  # its number of rows depends on the data, so they cannot be told apart by sample
            taken_back = {self.network.names.get(p) for layer, _ in irregular for p in layer.parameters(recurse=False)}
            self._by_rule, self._loop = self._by_rule - taken_back, True  # type: ignore[operator]
            return self._forward(inputs, folding)
        return logits, calls, expanded

    def _backward(
        self, inputs: Inputs, logits: Tensor, calls: list[Call], expanded: dict[str, Tensor], cotangents: Tensor
    ) -> Iterator[tuple[str, Rows]]:
        gradients_of = pull_back(logits, [call.output for call in calls] + list(expanded.values()), cotangents)
        B = len(logits)
        del logits
        for name in reversed(expanded):
            if (gradients := gradients_of.pop()) is not None:
                yield name, Rows(gradients)
        while calls:  # let go of each layer's gradients as soon as they are contracted
            layer_call, gradients = calls.pop(), gradients_of.pop()
            if gradients is not None:
                for parameter, term in layer_call.rule(layer_call.layer, layer_call.inputs, gradients, B):
                    if parameter is not None and self._has_rule(parameter):
                        yield self.network.names[parameter], term
        yield from self._one_by_one(inputs, cotangents)

    def _without_autocast(self) -> AbstractContextManager:
        return torch.autocast(self.network.device.type, enabled=False)

    def _rule(self, layer: nn.Module) -> Rule | None:
        fits = isinstance if self._subclasses else is_plain
        return next((rule for kind, rule in RULES.items() if fits(layer, kind)), None)

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
        cotangents = cotangents.to(next(iter(rest.values())))
        with self._without_autocast():  # vmap knows no layer of mixed precision
            found = (self._in_a_loop if self._loop else self._by_vmap)(inputs, cotangents, rest)
        for name, gradients in found.items():
            yield name, Rows(gradients)

    def _by_vmap(self, inputs: Inputs, cotangents: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        def pull_back(sample: Inputs, v: Tensor) -> dict[str, Tensor]:
            one = tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, sample)
            pull = vjp(lambda values: self.network.at(values, one).squeeze(0), parameters)[1]
            return vmap(pull)(v)[0]

        axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, inputs)
        return vmap(pull_back, in_dims=(axes, 0))(inputs, cotangents)

    def _in_a_loop(self, inputs: Inputs, cotangents: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = [weight for weight, name in self.network.names.items() if name in parameters]
        found = []
        for b, vs in enumerate(cotangents):
            with torch.enable_grad():
                output = self.network(rows(inputs, slice(b, b + 1)))[0]
            found += [torch.autograd.grad(output, weights, v, retain_graph=True, materialize_grads=True) for v in vs]
        return {
            self.network.names[weight]: torch.stack(gradients).unflatten(0, cotangents.shape[:2])
            for weight, gradients in zip(weights, zip(*found, strict=True), strict=True)
        }

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
        for self._subclasses in (True, False):  # one that is called in another way spoils the check for all
            self._by_rule = frozenset(taken)
            self._by_rule = self._agreeing(two)
            if self._by_rule:
                break
        self._expanded = frozenset(
            name for name, value in taken.items() if name not in self._by_rule and value.ndim > 1 and len(value) == 1
        )
        if self._expanded:
            self._expanded &= self._agreeing(two)
        if rest := self._uncovered():
            self._loop = not rest.keys() <= self._agreeing(two)
            log.info(
                "ELLA: %d of %d parameters have no rule (%s, …): their gradients take a backward pass a sample%s.",
                *(len(rest), len(taken), next(iter(rest)), ", one after the other" if self._loop else ""),
            )
        self._lengths = _lengths(self._forward(two, UNFOLDED)[1], num_samples(two))

    def _agreeing(self, inputs: Inputs) -> frozenset[str]:
        """Names of the parameters whose rows for two samples are what autograd gives for each."""
        with torch.enable_grad():
            logits = self.network(inputs)  # of both at once: a ReLU at its kink must fall on the same side
            outputs = logits.unbind()
        v = torch.randn(2, 1, logits.shape[1], generator=torch.Generator().manual_seed(0)).to(logits)
        try:
            found = self.rows(inputs, lambda _: v)
        except (RuntimeError, TypeError, ValueError):  # a shape that is not one of B samples, or beyond vmap
            return frozenset()
        agreeing = set(found)
        for b, output in enumerate(outputs):
            weights = list(self.network.names)
            exact = torch.autograd.grad(output, weights, v[b, 0], retain_graph=True, materialize_grads=True)
            whole = torch.stack([gradient.norm() for gradient in exact]).norm()
            rounding = 10 * torch.finfo(logits.dtype).eps * whole + 1e-12  # all there is of an attention's key bias
            for name, gradient in zip(self.network.names.values(), exact, strict=True):
                row = found[name][b, 0]
                fits = row.numel() == gradient.numel()  # not where a layer is called without a batch
                if not fits or not (row - gradient.flatten()).norm() <= 1e-3 * gradient.norm() + rounding:
                    agreeing.discard(name)
        return frozenset(agreeing)


def _lengths(calls: list[Call], num_samples: int) -> set[tuple[nn.Module, Fraction]]:
    return {(call.layer, Fraction(call.length, num_samples)) for call in calls}
