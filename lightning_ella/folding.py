"""A BatchNorm in eval mode is an affine map of each channel, so the convolution before it can take it in.

The folded network has the same outputs with fewer layers to push tangents or cotangents through. Its weights are a
function of the original ones, so by the chain rule J V is the folded network's Jacobian times that function's
derivative along V: the folded tangents.
"""

import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .batches import Inputs
from .linearize import Basis, Network, hooked, is_plain

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Pair:
    """A convolution whose output goes into a BatchNorm and nowhere else."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | nn.SyncBatchNorm

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that training may have changed."""
        return [*self.conv.parameters(), *self.norm.parameters()]


class Folding:
    """The network with each pair of convolution and BatchNorm W, b, γ, β, μ, σ as W γ/σ, b γ/σ and β - μ γ/σ."""

    def __init__(self, names: Mapping[Tensor, str], pairs: Collection[Pair] = ()):
        self.names, self.pairs = names, pairs
        self._ways: list[_Way] = []

    @property
    def numel(self) -> int:
        """How many weights are folded: numbers that each folded tangent takes beside the original one."""
        return sum(parameter.numel() for pair in self.pairs for parameter in pair.conv.parameters())

    def values(self) -> dict[str, Tensor]:
        """What stands in for the original parameters: name -> value."""
        found = {}
        for pair in self.pairs:
            gamma, beta, deviation = pair.norm.weight.detach(), pair.norm.bias.detach(), _deviation(pair.norm)
            for parameter in pair.conv.parameters():
                found[self.names[parameter]] = parameter.detach() * _along(gamma / deviation, parameter)
            found[self.names[pair.norm.bias]] = beta - _mean(pair.norm) * gamma / deviation
        return found

    def tangents(self, basis: Basis) -> Basis:
        """The derivative of `values` along the basis, with nothing for γ: name -> (K, *shape)."""
        found = dict(basis)
        for pair in self.pairs:
            deviation = _deviation(pair.norm)
            scale = pair.norm.weight.detach() / deviation
            change = found.pop(self.names[pair.norm.weight]) / deviation  # (K, channels)
            for parameter in pair.conv.parameters():
                name = self.names[parameter]
                found[name] = torch.addcmul(
                    basis[name] * _along(scale, parameter), _along(change, parameter), parameter.detach()
                ).to(basis[name].dtype)
            name = self.names[pair.norm.bias]
            found[name] = (basis[name] - change * _mean(pair.norm)).to(basis[name].dtype)
        return found

    @contextmanager
    def applied(self, network: Network) -> Iterator[None]:
        """Let the BatchNorms only add what is left of them; `values` must stand in for the parameters meanwhile.

        Evaluations raise a `StaleError` where a convolution's output or a weight has another use than was found.
        """
        with ExitStack() as stack:
            for pair in self.pairs:
                way = _Way()
                self._ways.append(way)
                stack.enter_context(network.view.patched(pair.conv, forward=partial(way.convolve, pair.conv)))
                stack.enter_context(network.view.patched(pair.norm, forward=partial(way.shift, pair.norm)))
            stack.callback(self._ways.clear)
            if self.pairs:
                network.watch = partial(_Once, self._ways)
                stack.callback(setattr, network, "watch", nullcontext)
            yield

    @contextmanager
    def fused(self, network: Network) -> Iterator[list[str]]:
        """For outputs alone: let each convolution do the work of its BatchNorm, with weights and a bias of its own.

        Where a convolution's output has another use than was found, evaluations raise a `StaleError`, which the list
        tells as well (who called may swallow it), or see NaN (what is compiled asks no Python).
        """
        refused: list[str] = []
        with ExitStack() as stack:
            for pair in self.pairs:
                way = _Fused(pair, refused)
                stack.enter_context(network.view.patched(pair.conv, forward=partial(way.convolve, pair.conv)))
                stack.enter_context(network.view.patched(pair.norm, forward=way.shift))
            yield refused

    def check(self) -> None:
        """After a forward pass: raise a `StaleError` if a convolution's output did not go into its BatchNorm."""
        if any(way.output is not None for way in self._ways):
            raise StaleError


class StaleError(Exception):
    """For these inputs the network goes another way than that on which the folding was found."""


class _Way:
    """From a convolution to its BatchNorm."""

    def __init__(self):
        self.output: Tensor | None = None
        self.once: _Once | None = None  # of the evaluation that is going on

    def convolve(self, conv: nn.Conv2d, input: Tensor) -> Tensor:
        """As the convolution does, once for each BatchNorm."""
        if self.output is not None:
            raise StaleError
        self.output = nn.Conv2d.forward(conv, input)
        self._watch(self.output, conv.weight, conv.bias)
        return self.output

    def shift(self, norm: nn.BatchNorm2d | nn.SyncBatchNorm, input: Tensor) -> Tensor:
        """All that is left of the BatchNorm."""
        if input is not self.output or self.once is None:
            raise StaleError
        self.once.used_up.pop(id(input), None)
        self.output = None
        assert norm.bias is not None
        output = input + norm.bias.to(input.dtype).view(-1, 1, 1)
        self._watch(input, norm.bias)
        return output

    def _watch(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and self.once is not None:
                self.once.used_up[id(tensor)] = weakref.ref(tensor)


class _Fused:
    """From a convolution that does the work of its BatchNorm to where that would have been."""

    def __init__(self, pair: Pair, refused: list[str]):
        assert pair.norm.weight is not None
        self.refused = refused
        scale = pair.norm.weight.detach() / _deviation(pair.norm)
        self.weight = pair.conv.weight.detach() * _along(scale, pair.conv.weight)
        before = 0 if pair.conv.bias is None else pair.conv.bias.detach()
        self.bias = (before - _mean(pair.norm)) * scale + pair.norm.bias.detach()
        self.nothing = self.bias.new_full((), torch.nan)
        self.output: tuple[Tensor, Tensor] | None = None  # the last one, and as it is shown

    def convolve(self, conv: nn.Conv2d, input: Tensor) -> Tensor:
        """With the BatchNorm in its weights; nobody but that can read the output."""
        output = conv._conv_forward(input, self.weight, self.bias)
        sealed = self.nothing.to(output.dtype).expand(output.shape).as_subclass(_Sealed)
        sealed.refused = self.refused  # type: ignore[attr-defined]
        self.output = output, sealed
        return sealed

    def shift(self, input: Tensor) -> Tensor:
        """Nothing is left to do."""
        output, self.output = self.output, None
        if output is None or input is not output[1]:
            self.refused.append("shift")
            raise StaleError(SEALED)
        return output[0]


SEALED = (
    "this is the output of a convolution that does the work of its BatchNorm, too, in ELLA's view of the network: "
    "hooks may keep it, but not read it."
)


class _Sealed(Tensor):
    """What a convolution shows that has done more than it should: a shape, and NaN, whose use is noted and refused."""

    refused: list[str]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `function` if it only asks what kind of tensor this is."""
        if function in PLAIN:
            return super().__torch_function__(function, types, args, kwargs or {})
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, cls):
                leaf.refused.append(str(function))
        raise StaleError(SEALED)


class _Once(TorchFunctionMode):
    """Raises a `StaleError` where what has had its use in a folded network is used again."""

    def __init__(self, ways: Collection[_Way]):
        super().__init__()
        self.used_up: dict[int, weakref.ref] = {}
        for way in ways:
            way.once, way.output = self, None

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `function`: asking for a shape is no use."""
        result = function(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)) and self.used_up:
            for leaf in (*args, *(kwargs or {}).values()):
                known = self.used_up.get(id(leaf))
                if known is not None and known() is leaf and function not in PLAIN | {Tensor.stride}:
                    raise StaleError
        return result


KIND = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
PLAIN = {Tensor.size, Tensor.dim, Tensor.numel, *(getattr(Tensor, name).__get__ for name in KIND)}


UNFOLDED = Folding({})


def find_folding(network: Network, inputs: Inputs, names: Collection[str]) -> Folding:
    """Find what can be folded, by a forward pass that looks at who uses what.

    In a pair the convolution's output goes into the BatchNorm and nowhere else, no parameter of either is used twice,
    and all of them are among `names`. Comparing outputs instead would not do: networks with equal outputs at these
    weights and inputs can differ in their derivatives.
    """
    produced: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[Pair] = []

    def record(layer: nn.Module, args: tuple, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            produced[id(output)] = layer, output
        elif isinstance(layer, NORMS) and args and id(args[0]) in produced:
            pairs.append(Pair(produced[id(args[0])][0], layer))

    layers = [m for m in network.model.modules() if not m._forward_hooks and not m._forward_pre_hooks]
    convolutions = [layer for layer in layers if is_plain(layer, nn.Conv2d)]
    norms = [n for n in layers if any(is_plain(n, k) for k in NORMS) and n.affine and n.track_running_stats]
    with hooked([*convolutions, *norms], record), Uses() as uses:
        network(inputs)
    outputs = {id(conv): output for conv, output in produced.values()}
    return Folding(
        network.names,
        [
            pair
            for pair in pairs
            if all(network.names.get(parameter) in names for parameter in pair.parameters)
            and all(uses.count[id(tensor)] == 1 for tensor in (outputs[id(pair.conv)], *pair.parameters))
        ],
    )


class Uses(TorchFunctionMode):
    """Counts how many tensors were made from each tensor, by the tensor's id; ids are not reused meanwhile."""

    def __init__(self):
        super().__init__()
        self.count: Counter[int] = Counter()
        self._kept: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `function`, and count its arguments if it gives tensors: asking for a shape is no use."""
        result = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._kept.append((args, kwargs))
            self.count.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
        return result


def _mean(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _deviation(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Tensor:
    assert norm.running_var is not None
    return (norm.running_var + norm.eps).sqrt()


def _along(values: Tensor, parameter: Tensor) -> Tensor:
    """Reshape (*, channels) to multiply (*, channels, …) of a parameter of the convolution."""
    return values.view(*values.shape, *(1,) * (parameter.ndim - 1))
