"""Reverse mode, layer by layer: products with J that never hold more than one layer's rows of it.

One forward pass keeps each layer's input, one backward pass for each cotangent brings the gradient of each layer's
output, and a rule contracts the two with the layer's part of the basis. Autograd computes no gradient of a
parameter. What that earns: the cost hardly depends on K, and rows of J come a batch at a time.

B samples, S cotangents each (S = C for all of J), K columns of the basis.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from .batches import Picked, num_samples, rows
from .data import Inputs
from .folding import UNFOLDED, Folding, StaleError
from .forward_mode import Reduce
from .linearize import Basis, Network, check_finite, hooked, version
from .numerics import BROKEN, exact
from .rules import Rows, Rule, by_vjp, rule_of, with_shift

log = logging.getLogger(__name__)

Cotangents = Callable[[Tensor], Tensor]  # logits (B, C) -> (B, S, C)

MAX_COTANGENTS = 64  # that are pulled back from one forward pass for features: nothing grows as C²
MAX_PROVEN = 1000  # graphs that are remembered
SCALES = 64  # powers of two that cotangents are multiplied by
DIRECTIONS = 3  # along which sums of rows are compared
TOLERANCE, BY_AUTOCAST = 1e-3, 0.1  # of a gradient that is taken for the same, in the weights' precision and in bf16
PASSES_BY_VMAP, PASSES_IN_A_LOOP = 3, 10  # what a cotangent takes without a rule, in those of one with a rule: measured


@dataclass
class Call:
    """A call of a layer: its input, and where in the graph its output is (an in-place operation may follow)."""

    layer: nn.Module
    rule: Rule
    inputs: Tensor
    version: int  # of the input: it may be overwritten
    output: Any
    length: int  # of the output's first axis
    nbytes: int  # of the output


@dataclass
class Pass:
    """A forward pass of B samples that can be pulled back."""

    logits: Tensor  # (B, C), with a graph
    calls: list[Call]
    expanded: dict[str, Tensor]  # parameters of which each sample has its own, (B, *)
    leaves: dict[str, Tensor]  # what stands for each parameter in the graph

    @property
    def targets(self) -> list[Any]:
        """What gradients are asked of."""
        return [*(call.output for call in self.calls), *self.expanded.values()]

    @property
    def ends(self) -> dict[Any, int]:
        """Where in the graph a layer's output is, and which layer it is of."""
        return {call.output.node: id(call.layer) for call in self.calls}

    @property
    def lengths(self) -> tuple[Fraction, ...]:
        """Rows of each call's output, in samples."""
        return tuple(Fraction(call.length, len(self.logits)) for call in self.calls)


class Footprint(NamedTuple):
    """Bytes of a forward pass, tensor by tensor."""

    num_outputs: int  # C
    held: list[int]  # until the pass back
    outputs: list[int]  # of layers, wherever they are held
    cotangents: list[int]  # outputs of layers with a rule, of which each cotangent adds a gradient


def pull_back(logits: Tensor, targets: list, cotangents: Tensor, *, keep: bool = False) -> list[Tensor | None]:
    """Gradients (n, S, *) of each target (n, *) for cotangents (B, S, C); None where the logits do not depend on it.

    The graph is let go of with the last cotangent, unless it is to be kept.
    """
    S = cotangents.shape[1]
    stacked: list[Tensor | None] = [None] * len(targets)
    for s, v in enumerate(cotangents.unbind(1) if targets and logits.requires_grad else ()):
        found = torch.autograd.grad(logits, targets, v, retain_graph=keep or s < S - 1, allow_unused=True)
        if S == 1:
            return [None if gradient is None else gradient.unsqueeze(1) for gradient in found]
        for i, gradient in enumerate(found):
            if gradient is not None:
                if stacked[i] is None:
                    stacked[i] = gradient.new_empty(len(gradient), S, *gradient.shape[1:])
                stacked[i][:, s] = gradient  # type: ignore[index] - not None by now
    return stacked


def one_hot(outputs: Tensor, start: int) -> Tensor:
    """Rows of the identity matrix from `start`, `MAX_COTANGENTS` at most, for each sample of (B, C): (B, S, C)."""
    B, C = outputs.shape
    numbers = torch.arange(start, min(start + MAX_COTANGENTS, C), device=outputs.device)
    return nn.functional.one_hot(numbers, C).to(outputs.dtype).expand(B, -1, -1)


class Layerwise:
    """Products with the Jacobian of a network in reverse mode.

    Each parameter takes one of three routes, found out from the first two samples: a rule for its layer; where it has a
    first axis of length 1 (class tokens, position embeddings), a copy for each sample; else, a backward pass for each
    sample, which is slow: of all samples at once by vmap where that is right, else in a loop.

    The first two are right only where row b of what a layer computes belongs to sample b, and where its weights are
    used by calling it. Both can change with the data (samples sorted by length, tokens sent to experts, a branch). So
    every forward pass is compared with those for which it was proven, and proven itself where it differs.
    """

    def __init__(self, network: Network):
        self.network = network
        self.quiet = False
        self._by_rule: frozenset[str] | None = None
        self._expanded: frozenset[str] = frozenset()
        self._loop = False
        self._other: set[nn.Module] = set()  # layers that do something else than those that they are derived from
        self._widens = True  # whether what a layer computes once for all samples is repeated for each
        self._by_backward = False  # whether `.backward()` finds gradients that `autograd.grad` does not
        self._structures: set[Any] = set()  # of graphs in which weights are used as the rules say
        self._proven: set[Any] = set()  # and in which rows are in their place, by the number of samples

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
            some: Cotangents = lambda f, start=start: one_hot(f, start)  # noqa: E731
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

    def footprint(self, inputs: Inputs, folding: Folding, *, watched: bool = True) -> Footprint:
        """What a pass of these samples holds, and what a pass back makes again (checkpoints).

        If autograd is not to be watched, what layers give is taken for what is held.
        """
        produced: list[int] = []
        saved: dict[int, int] = {}  # storages

        def save(tensor: Tensor) -> Tensor:
            with suppress(RuntimeError, NotImplementedError):  # what is sparse has none
                storage = tensor.untyped_storage()
                saved[storage._cdata] = storage.nbytes()
            return tensor

        def record(layer: nn.Module, args: tuple, output: Any) -> None:
            produced.extend(leaf.nbytes for leaf in tree_leaves(output) if type(leaf) is Tensor and not leaf.is_sparse)

        leaves = [module for module in self.network.model.modules() if not list(module.children())]
        with ExitStack() as stack:
            if watched:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept))
            stack.enter_context(hooked(leaves, record))
            run = stack.enter_context(self._forward(inputs, folding))
            for call in run.calls:
                save(call.inputs)
            for weight in [*run.leaves.values(), *self.network.view.tensors.values()]:
                with suppress(RuntimeError, NotImplementedError):
                    saved.pop(weight.untyped_storage()._cdata, None)
            forward, logits = [*produced, run.logits.nbytes], check_finite(run.logits.detach())
            pull_back(run.logits, run.targets, torch.ones_like(logits).unsqueeze(1), keep=True)
            again = produced[len(forward) - 1 :]
            held = [*saved.values(), *again] if watched else forward
            return Footprint(logits.shape[1], held, forward, [call.nbytes for call in run.calls])

    def bytes_held(self, inputs: Inputs) -> int:
        """Bytes that a cotangent of a sample takes for parameters whose rows of J cannot be had layer by layer."""
        self.by_rule(inputs)
        return sum(value.nbytes for value in self._uncovered().values())

    def slowness(self, inputs: Inputs) -> float:
        """Backward passes that a cotangent takes beside its own, for the parameters that no rule covers."""
        self.by_rule(inputs)
        return 0.0 if not self._uncovered() else PASSES_IN_A_LOOP if self._loop else PASSES_BY_VMAP

    def by_rule(self, inputs: Inputs) -> Collection[str]:
        """Names of the parameters that only their layer uses, and in the way that its rule says."""
        if self._by_rule is None:
            with self._without_autocast(), exact():  # rounding would look like an error
                self._find_routes(inputs)
        return self._by_rule or ()

    def _terms(
        self, inputs: Inputs, cotangents: Cotangents, folding: Folding
    ) -> tuple[Tensor, Iterator[tuple[str, Rows]]]:
        """Outputs (B, C) and, by and by, what adds up to the cotangents' products with J."""
        self.by_rule(inputs)
        while True:
            try:
                with self._forward(inputs, folding) as run:  # a checkpoint calls layers again on the way back
                    v = cotangents(run.logits.detach()).to(run.logits)
                    signature, moves = structure(run.logits, run.leaves, run.ends)
                    key, shown = (signature, run.lengths, len(v)), not moves
                    new = signature not in self._structures
                    wrong = self._overwritten(run)
                    if new:
                        with exact():
                            wrong |= self._misused(run)
                    if not wrong:
                        once = key not in self._proven and not moves
                        gradients = pull_back(run.logits, run.targets, v, keep=moves or once)
                        if moves:  # what holds for these samples and cotangents holds for no others
                            wrong = self._misplaced(run, gradients, v)[0]
                        elif once:
                            wrong, shown = self._misplaced_ever(run)
            except BROKEN:
                raise
            except (RuntimeError, TypeError, ValueError, IndexError):
                if not self._widens:
                    raise
                self._widens = False  # a layer that is called with one of many samples may be no layer for all of them
                continue
            if new and self._widens and not _are_close(run.logits, self.network(inputs)):
                self._widens = False
                continue
            wrong = wrong or (self._misused_alone(inputs) if new else wrong)
            if not wrong:
                break
            self._take_back(wrong)
            if folding.pairs:
                raise StaleError
        if len(self._proven) > MAX_PROVEN:
            self._proven.clear()
            self._structures.clear()
        self._structures.add(signature)
        if shown:
            self._proven.add(key)
        return run.logits.detach(), self._backward(inputs, run, gradients, v)  # type: ignore[possibly-undefined]

    @contextmanager
    def _forward(self, inputs: Inputs, folding: Folding) -> Iterator[Pass]:
        """Evaluate the network with a graph; values that stand in for parameters stay until the end."""
        calls: list[Call] = []

        B = num_samples(inputs)

        def record(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            first, *others = [*args, *kwargs.values()] or [None]
            known = isinstance(first, Tensor) and isinstance(output, Tensor) and output.requires_grad and output.ndim
            if not known or any(isinstance(leaf, Tensor) for leaf in tree_leaves(others)):
                return None
            if rules[layer] is by_vjp and others:
                return None
            shared = self._widens and len(output) == 1 < B and len(first) == 1  # by all samples, as positions are
            if shared:
                output = output.expand(B, *output.shape[1:])
            seen = first.detach().expand(B, *first.shape[1:]) if shared else first.detach()
            calls.append(
                Call(layer, rules[layer], seen, version(first), get_gradient_edge(output), len(output), output.nbytes)
            )
            return output if shared else None

        rules: dict[nn.Module, Rule] = {
            layer: rule
            for layer in self.network.model.modules()
            if any(self._has_rule(p) for p in layer.parameters(recurse=False))
            and (rule := rule_of(layer, subclasses=layer not in self._other))
        }
        for pair in folding.pairs:
            del rules[pair.norm]
            rules[pair.conv] = partial(with_shift, pair.norm)
        taken = self.network.parameters_taken
        expanded = {n: taken[n].expand(B, *taken[n].shape[1:]).requires_grad_() for n in self._expanded}
        values = {name: value.requires_grad_() for name, value in folding.values().items()} | expanded
        leaves = {name: parameter for parameter, name in self.network.names.items()} | values
        with folding.applied(self.network), self.network.view.replaced(values):
            with hooked(rules, record, with_kwargs=True), torch.enable_grad():
                logits = self.network(inputs)
            folding.check()
            yield Pass(logits, calls, expanded, leaves)

    def _backward(
        self, inputs: Inputs, run: Pass, gradients_of: list[Tensor | None], cotangents: Tensor
    ) -> Iterator[tuple[str, Rows]]:
        B, calls = len(run.logits), run.calls
        run.logits = run.logits.detach()
        for name in reversed(run.expanded):
            if (gradients := gradients_of.pop()) is not None:
                yield name, Rows(gradients)
        while calls:  # let go of each layer's gradients as soon as they are contracted
            layer_call, gradients = calls.pop(), gradients_of.pop()
            if gradients is not None:
                for parameter, term in layer_call.rule(layer_call.layer, layer_call.inputs, gradients, B):
                    if parameter is not None and self._has_rule(parameter):
                        yield self.network.names[parameter], term
        yield from self._one_by_one(inputs, cotangents)

    # The proof of the fast routes

    @property
    def _fast(self) -> frozenset[str]:
        return (self._by_rule or frozenset()) | self._expanded

    def _misused_alone(self, inputs: Inputs) -> frozenset[str]:
        """Names of parameters whose rows for two of the samples are not what autograd gives for each."""
        if not self._fast:
            return frozenset()
        with self._without_autocast(), exact():
            return self._fast - self._agreeing(_two(inputs))

    def _misused(self, run: Pass) -> frozenset[str]:
        """Names of parameters whose rows, summed over all samples, are not autograd's gradient along some directions.

        They are not where a weight is used otherwise than by calling its layer.
        """
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(run.logits.shape, generator=generator).to(run.logits)
        names = [name for name in run.leaves if name in (self._by_rule or ())]
        leaves = [run.leaves[name] for name in names]
        if not run.logits.requires_grad or not names:
            return frozenset()
        exact = torch.autograd.grad(run.logits, leaves, v, retain_graph=True, materialize_grads=True)
        directions = {
            name: torch.randn(DIRECTIONS, leaf.numel(), generator=generator).to(leaf)
            for name, leaf in zip(names, leaves, strict=True)
        }
        gradients = pull_back(run.logits, run.targets, v.unsqueeze(1), keep=True)
        found, broken = self._by_calls(run, gradients, lambda name, term: term.times(directions[name]).sum((0, 1)))
        autocast = torch.is_autocast_enabled(run.logits.device.type)
        whole = torch.stack([gradient.norm() for gradient in exact]).norm()
        rounding = 100 * torch.finfo(run.logits.dtype).eps * whole + 1e-12
        wrong = set(broken)
        for name, gradient in zip(names, exact, strict=True):
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            gap = found.get(name, 0) - directions[name] @ gradient.flatten()
            if not gap.norm() <= (BY_AUTOCAST if autocast else TOLERANCE) * gradient.norm() + rounding:
                wrong.add(name)
        return frozenset(wrong)

    def _overwritten(self, run: Pass) -> frozenset[str]:
        """Names of parameters of layers whose input is not there any more."""
        return self._fast & frozenset().union(
            *(self._names_of(c.layer) for c in run.calls if version(c.inputs) != c.version)
        )

    def _misplaced_ever(self, run: Pass) -> tuple[frozenset[str], bool]:
        """As `_misplaced`, for cotangents of all outputs, so that it holds for any."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(len(run.logits), 1, run.logits.shape[1], generator=generator).to(run.logits)
        return self._misplaced(run, pull_back(run.logits, run.targets, v, keep=True), v)

    def _misplaced(self, run: Pass, found: list[Tensor | None], cotangents: Tensor) -> tuple[frozenset[str], bool]:
        """Names of parameters of layers of which row b is not that of sample b alone, and whether all have been seen.

        With the cotangents of sample b times α_b, so must be the gradient at row b of every layer's output. The α are
        powers of two, which change no rounding, and no two of them are the same. So one more backward pass shows it,
        of a mixture of the cotangents: where the graph or the number of samples is new, and always where operations may
        place rows by the data. Of a layer whose gradient is zero nothing is seen.
        """
        B, S = cotangents.shape[:2]
        order = torch.randperm(B, generator=torch.Generator().manual_seed(B)) % SCALES - min(B, SCALES) // 2
        alphas = torch.exp2(order.to(cotangents))
        mixture = torch.randn(S, generator=torch.Generator().manual_seed(S)).to(cotangents)
        mixed = torch.einsum("bsc,s->bc", cotangents, mixture)
        scaled = pull_back(run.logits, run.targets, (mixed * alphas.unsqueeze(1)).unsqueeze(1))
        layers = [self._names_of(call.layer) for call in run.calls] + [{name} for name in run.expanded]
        known, checks = [], []
        for names, one, other in zip(layers, found, scaled, strict=True):
            if one is not None and other is not None:
                one = torch.einsum("ns...,s->n...", one, mixture.to(one))
                known.append(names)
                checks.append(torch.stack([_follows(one, other[:, 0], alphas), one.any()]))
        answers = torch.stack(checks).tolist() if checks else []  # at once: a device is waited for
        wrong = frozenset().union(*(names for names, (follows, _) in zip(known, answers, strict=True) if not follows))
        return self._fast & wrong, all(seen for _, seen in answers)

    def _by_calls(
        self, run: Pass, gradients: list[Tensor | None], part: Callable[[str, Rows], Tensor]
    ) -> tuple[dict[str, Any], set[str]]:
        """By name, the sum over the calls of a part of each term; and the names of layers whose rule cannot be used."""
        found: dict[str, Any] = {}
        broken: set[str] = set()
        names: dict[Tensor | None, str] = {run.leaves[name]: name for name in self._by_rule or () if name in run.leaves}
        names |= {parameter: name for parameter, name in self.network.names.items() if self._has_rule(parameter)}
        for call, gradient in zip(run.calls, gradients, strict=False):
            if gradient is None:
                continue
            try:
                for parameter, term in call.rule(call.layer, call.inputs, gradient, len(run.logits)):
                    if (name := names.get(parameter)) is not None:  # its own, or what stands in for it
                        found[name] = found.get(name, 0) + part(name, term)
            except BROKEN:
                raise
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # not a shape of B samples
                broken |= self._names_of(call.layer)
        return found, broken

    def _take_back(self, names: frozenset[str]) -> None:
        """From now on parameters take the slow route, one sample at a time."""
        self._by_rule, self._expanded = (self._by_rule or frozenset()) - names, self._expanded - names
        self._loop = True
        self._say()

    def _names_of(self, layer: nn.Module) -> frozenset[str]:
        return frozenset(self.network.names[p] for p in layer.parameters(recurse=False) if p in self.network.names)

    def _without_autocast(self) -> AbstractContextManager:
        return torch.autocast(self.network.device.type, enabled=False)

    def _has_rule(self, parameter: Tensor) -> bool:
        return self.network.names.get(parameter) in (self._by_rule or ())

    def _uncovered(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.network.parameters_taken.items() if name not in self._fast}

    # The slow route

    def _one_by_one(self, inputs: Inputs, cotangents: Tensor) -> Iterator[tuple[str, Rows]]:
        """Rows of the parameters that no rule covers, by a backward pass for each sample."""
        rest = self._uncovered()
        if not rest:
            return
        cotangents = cotangents.to(next(iter(rest.values())))
        with self._without_autocast():  # vmap knows no layer of mixed precision
            found = None if self._loop else self._by_vmap(inputs, cotangents, rest)
            found = self._in_a_loop(inputs, cotangents, rest) if found is None else found
        for name, gradients in found.items():
            yield name, Rows(gradients)

    def _by_vmap(self, inputs: Inputs, cotangents: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Rows of all samples at once; None where the network cannot be evaluated so (it branches on the data)."""

        def pull_back(sample: Inputs, v: Tensor) -> dict[str, Tensor]:
            one = tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) and leaf.ndim else leaf, sample)
            pull = vjp(lambda values: self.network.at(values, one).squeeze(0), parameters)[1]
            return vmap(pull)(v)[0]

        if isinstance(inputs, Picked):
            return None
        axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.ndim else None, inputs)
        try:
            return vmap(pull_back, in_dims=(axes, 0))(inputs, cotangents)
        except BROKEN:
            raise
        except Exception as error:
            log.debug("ELLA: samples one after the other, because of %s: %s", type(error).__name__, error)
            self._loop = True
            return None

    def _in_a_loop(self, inputs: Inputs, cotangents: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = [weight for weight, name in self.network.names.items() if name in parameters]
        found = []
        for output, vs in zip(self._outputs(inputs), cotangents, strict=True):
            found += [self._gradients(output, weights, v) for v in vs]
        return {
            self.network.names[weight]: torch.stack(gradients).unflatten(0, cotangents.shape[:2])
            for weight, gradients in zip(weights, zip(*found, strict=True), strict=True)
        }

    def _outputs(self, inputs: Inputs) -> Iterator[Tensor]:
        """Outputs (C,) of one sample after the other, with a graph; of those that come together, from one pass."""
        parts = [slice(None)] if isinstance(inputs, Picked) else [slice(b, b + 1) for b in range(num_samples(inputs))]
        for part in parts:
            with torch.enable_grad():
                outputs = self.network(rows(inputs, part)).unbind()
            yield from outputs

    def _gradients(self, output: Tensor, weights: list[Tensor], v: Tensor) -> list[Tensor]:
        """Gradients of v · output, by `.backward()` where a checkpoint hides weights from `autograd.grad`."""
        if not output.requires_grad:
            return [torch.zeros_like(weight) for weight in weights]
        if self._by_backward:
            with self._without_gradients():
                torch.autograd.backward(output, v, retain_graph=True)
                found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        else:
            found = torch.autograd.grad(output, weights, v, retain_graph=True, materialize_grads=True)
        return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        try:
            yield
        finally:
            for weight in self.network.names:
                weight.grad = None

    # Which route

    def _find_routes(self, inputs: Inputs) -> None:
        """Find out which parameters the rules give the right gradients of.

        They do not where a weight is used other than by calling its layer (functional attention, tying by hand),
        where a subclass computes something else, where a layer's input is overwritten, or where samples are not along
        its first axis. None of this can be seen from outside, so two samples are compared with plain autograd.
        """
        two = _two(inputs)
        self._by_backward = self._hides_weights(two)
        taken = self.network.parameters_taken
        self._by_rule = self._agreeing_of(taken, two)
        if taken.keys() - self._by_rule:
            layers = self.network.model.modules()
            self._other = {layer for layer in layers if self._names_of(layer) - self._by_rule}
            self._by_rule = self._agreeing_of(taken, two)
        self._expanded = frozenset(
            name for name, value in taken.items() if name not in self._by_rule and value.ndim > 1 and len(value) == 1
        )
        if self._expanded:
            self._expanded &= self._agreeing(two)
        if rest := self._uncovered():
            self._loop = self._by_backward or not rest.keys() <= self._agreeing(two)
            self._say()

    def _agreeing_of(self, names: Collection[str], two: Inputs) -> frozenset[str]:
        """Those of the names that agree if all of them take the route of the rules."""
        self._by_rule = frozenset(names)
        return self._agreeing(two)

    def _hides_weights(self, two: Inputs) -> bool:
        """Whether `.backward()`, which trains, has gradients that `autograd.grad` has not (reentrant checkpoints)."""
        with torch.enable_grad():
            logits = self.network(two)
        weights, v = list(self.network.names), torch.ones_like(logits)
        with self._without_gradients():
            if logits.requires_grad:
                torch.autograd.backward(logits, v, retain_graph=True)
            trained = [weight.grad for weight in weights]
        if all(gradient is None for gradient in trained):
            raise ValueError(
                "the outputs have no gradient in any parameter taken into account: forward= must not run under "
                "torch.no_grad(), nor detach() or convert its outputs, and parameters= must choose some that they use."
            )
        try:
            seen = torch.autograd.grad(logits, weights, v, allow_unused=True)
        except BROKEN:
            raise
        except RuntimeError:
            return True
        return any((one is None) != (other is None) for one, other in zip(trained, seen, strict=True))

    def _agreeing(self, two: Inputs) -> frozenset[str]:
        """Names of the parameters whose rows for two samples are what autograd gives for each."""
        with torch.enable_grad():
            logits = self.network(two)  # of both at once: a ReLU at its kink must fall on the same side
            outputs = logits.unbind()
        v = torch.randn(2, 1, logits.shape[1], generator=torch.Generator().manual_seed(0)).to(logits)
        exact = [self._gradients(output, list(self.network.names), v[b, 0]) for b, output in enumerate(outputs)]
        found, broken = self._rows_of(two, v)
        agreeing = set(self.network.names.values()) - broken
        for b, gradients in enumerate(exact):
            whole = torch.stack([gradient.norm() for gradient in gradients]).norm()
            rounding = 10 * torch.finfo(logits.dtype).eps * whole + 1e-12  # all there is of an attention's key bias
            for name, gradient in zip(self.network.names.values(), gradients, strict=True):
                row = found[name][b, 0] if name in found else torch.zeros_like(gradient).flatten()
                fits = row.numel() == gradient.numel()  # not where a layer is called without a batch
                if not fits or not (row - gradient.flatten()).norm() <= TOLERANCE * gradient.norm() + rounding:
                    agreeing.discard(name)
        return frozenset(agreeing)

    def _rows_of(self, two: Inputs, v: Tensor) -> tuple[dict[str, Tensor], set[str]]:
        """Rows by the routes as they are, not proven: name -> (2, 1, p); and names whose route cannot be used."""
        everything = set(self.network.names.values())
        try:
            with self._forward(two, UNFOLDED) as run:
                gradients = pull_back(run.logits, run.targets, v)
        except BROKEN:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError):  # for what was expanded, or by a checkpoint
            if not self._widens:
                return {}, everything
            self._widens = False
            return self._rows_of(two, v)
        found, broken = self._by_calls(run, gradients, lambda _, term: term.dense())
        for name, gradient in zip(run.expanded, gradients[len(run.calls) :], strict=True):
            if gradient is not None:
                found[name] = Rows(gradient).dense()
        broken |= {
            name for call in run.calls if version(call.inputs) != call.version for name in self._names_of(call.layer)
        }
        try:
            return found | {name: term.dense() for name, term in self._one_by_one(two, v)}, broken
        except BROKEN:
            raise
        except (RuntimeError, TypeError, ValueError):
            return found, broken | self._uncovered().keys()

    def _say(self) -> None:
        """How many parameters are slow, how slow, and what would leave them out."""
        rest = self._uncovered()
        if self.quiet or not rest:
            return
        log.info(
            "ELLA: %d of %d parameters have no rule (%s, …), so their gradients take a backward pass a sample%s: "
            "about %d times as long as those of the others. %s",
            *(len(rest), len(self.network.names), next(iter(rest)), ", one after the other" if self._loop else ""),
            PASSES_IN_A_LOOP if self._loop else PASSES_BY_VMAP,
            _leaving_out(rest, self.network.names.values()),
        )


def _leaving_out(slow: Collection[str], names: Collection[str]) -> str:
    """The `parameters=` that keeps all that is fast."""
    kept = [name for name in names if name not in slow]
    if not kept:
        return "None of the parameters is fast."
    tops = list(dict.fromkeys(name.rpartition(".")[0].split(".")[0] for name in slow))
    listed = ", ".join(map(repr, tops[:3])) + ", …" * (len(tops) > 3)
    if any(name.split(".")[0] in tops for name in kept):
        return f"parameters=[{', '.join(map(repr, kept[:3]))}, …] would take the others alone."
    return f"parameters=lambda name, _: not name.startswith(({listed},)) would leave them out."


def _two(inputs: Inputs) -> Inputs:
    """The first and the last sample of a batch."""
    return rows(inputs, torch.tensor([0, num_samples(inputs) - 1]))


def _are_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= BY_AUTOCAST / 10 * other.norm())


def _follows(one: Tensor, other: Tensor, alphas: Tensor) -> Tensor:
    """Whether the gradient at each sample's rows is scaled as its cotangents are, (), from two (n, *) and (B,)."""
    if len(one) % len(alphas):
        return torch.zeros((), dtype=torch.bool, device=one.device)
    one, other = (gradient.reshape(len(alphas), -1).float() for gradient in (one, other))
    sizes = one.norm(dim=1)
    gaps = (other / alphas.float().unsqueeze(1) - one).norm(dim=1)
    return (gaps <= BY_AUTOCAST / 2 * sizes + 1e-6 * sizes.max()).all()


def structure(
    logits: Tensor, leaves: Mapping[str, Tensor], ends: Mapping[Any, int] = MappingProxyType({})
) -> tuple[tuple, bool]:
    """The graph of the outputs as a value: operations, their arguments, parameters by name; and whether rows may move.

    Where layers are called is a part of it, from `ends`: a weight may be used without calling its layer. Of two
    forward passes with the same structure, where no operation places rows by the data, one shows what holds for the
    other.
    """
    named = {id(leaf): name for name, leaf in leaves.items()}
    numbers: dict[Any, int] = {logits.grad_fn: 0}
    todo, found, moves = [node for node in numbers if node is not None], [], False
    while todo:
        node = todo.pop()
        following = [(after, output) for after, output in node.next_functions if after is not None]
        todo += [after for after, _ in following if after not in numbers]
        edges = [(numbers.setdefault(after, len(numbers)), output) for after, output in following]
        which = tuple(getattr(node, part, None) for part in PLACES.get(_operation(node), ()))
        found.append((node.name(), named.get(id(getattr(node, "variable", None))), ends.get(node), which, *edges))
        moves = moves or not _keeps_places(node, _operation(node), len(logits))
    return tuple(found), moves


def _operation(node: Any) -> str:
    """Torch's own have a number at the end; what others have written keeps its name as it is."""
    name = node.name().rpartition("::")[2]
    return name.rstrip("0123456789").removesuffix("Backward") if name[-1:].isdigit() else name


def _keeps_places(node: Any, operation: str, B: int) -> bool:
    """Whether an operation leaves the rows of a sample where they were, whatever the data."""
    if operation in TIMES_WEIGHTS:  # the rows are those of the other factor
        return _is_weight(node.next_functions[TIMES_WEIGHTS[operation]][0])
    if operation not in ALONG | BATCHED:
        return operation in STILL or operation in PLACES
    shape = node._input_metadata[0].shape  # of the output
    if operation in BATCHED:
        return bool(shape) and shape[0] % B == 0
    axis = getattr(node, "_saved_dim", 0)
    if axis >= 2**63:  # counted from the end
        axis += len(shape) - 2**64
    return axis > 0


def _is_weight(node: Any) -> bool:
    """Whether a factor is a parameter, perhaps transposed, and nothing that was computed from the inputs."""
    while node is not None and _operation(node) in RESHAPED:
        node = node.next_functions[0][0]
    return node is not None and _operation(node) == "AccumulateGrad"


# Names of operations in autograd's graph. What is in none of these may move rows (indexing, sorting, packing).
STILL = frozenset(
    """
    AccumulateGrad Abs Acos Add Addcdiv Addcmul AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D
    AdaptiveMaxPool3D Alias Amax Amin Asin Atan AvgPool2D AvgPool3D Celu Clamp ClampMax ClampMin Clone ConstantPadNd
    Convolution Cos Cosh CudnnBatchNorm CudnnConvolution Detach Div Dot Elu Erf Exp Expand Expm1 Fill Floor
    FusedRmsNorm Gelu Glu Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp LinalgVectorNorm Log Log1P LogSigmoid
    LogSoftmax Logaddexp Logsumexp MaskedFill Max MaxPool2DWithIndices MaxPool3DWithIndices Maximum Mean Min Minimum
    Mish MkldnnConvolution Mul NativeBatchNorm NativeGroupNorm NativeLayerNorm Neg Norm Permute PixelShuffle
    PixelUnshuffle Pow Prelu PreluKernel Prod Reciprocal ReflectionPad1D ReflectionPad2D Relu Repeat
    ReplicationPad1D ReplicationPad2D ReshapeAlias Rsqrt Rsub SafeSoftmax ScaledDotProductEfficientAttention
    ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu Selu Sigmoid Sign Silu Sin Sinh Softmax
    Softplus Sqrt Squeeze Std StdMean Sub Sum T Tan Tanh Threshold ToCopy Transpose Tril Triu UnsafeView Unsqueeze
    UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D Var VarMean View Where
    """.split()  # noqa: SIM905 - a list of so many is no better to read
)
# Which do so where a factor is a weight: number of that argument.
TIMES_WEIGHTS = {"Addmm": 2, "Addmv": 2, "Embedding": 0, "EmbeddingBag": 0, "Linear": 1, "Mm": 1, "Mv": 1}
RESHAPED = {
    "Expand",
    "Permute",
    "ReshapeAlias",
    "Squeeze",
    "T",
    "ToCopy",
    "Transpose",
    "UnsafeView",
    "Unsqueeze",
    "View",
}
ALONG = {"Cat", "Cumsum", "Unfold"}  # but the first axis
# Which take the rows that these numbers say: they are a part of the structure.
PLACES = {
    "Select": ("_saved_dim", "_saved_index"),
    "Slice": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "Split": ("_saved_dim", "_saved_split_size"),
    "SplitWithSizes": ("_saved_dim", "_saved_split_sizes"),
    "Stack": ("_saved_dim",),
    "Unbind": ("_saved_dim",),
}
BATCHED = {"Baddbmm", "Bmm"}  # matrices along the first axis
