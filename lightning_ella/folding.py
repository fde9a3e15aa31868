"""A BatchNorm in eval mode is an affine map of each channel, so the convolution before it can take it in.

The folded network has the same outputs with fewer layers to push tangents or cotangents through. Its weights are a
function of the original ones, so by the chain rule J V is the folded network's Jacobian times that function's
derivative along V: the folded tangents.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .data import Inputs
from .linearize import Basis, Network


@dataclass(frozen=True)
class Pair:
    """A convolution whose output goes into a BatchNorm and nowhere else."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that training may have changed."""
        return [*self.conv.parameters(), *self.norm.parameters()]


class Folding:
    """The network with each pair of convolution and BatchNorm W, b, γ, β, μ, σ as W γ/σ, b γ/σ and β - μ γ/σ."""

    def __init__(self, names: Mapping[Tensor, str], pairs: Collection[Pair] = ()):
        self.names, self.pairs = names, pairs

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
    def applied(self) -> Iterator[None]:
        """Let the BatchNorms only add what is left of them; `values` must stand in for the parameters meanwhile."""
        for pair in self.pairs:
            pair.norm.forward = partial(_shift, pair.norm)
        try:
            yield
        finally:
            for pair in self.pairs:
                del pair.norm.forward


UNFOLDED = Folding({})


def find_folding(network: Network, inputs: Inputs, names: Collection[str]) -> Folding:
    """Find what can be folded, by a forward pass: pairs whose parameters are all among `names`, if outputs agree."""
    produced: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[Pair] = []

    def record(layer: nn.Module, args: tuple, output: Tensor) -> None:
        if type(layer) is nn.Conv2d:
            produced[id(output)] = layer, output
        elif type(layer) is nn.BatchNorm2d and layer.affine and layer.track_running_stats and id(args[0]) in produced:
            pair = Pair(produced[id(args[0])][0], layer)
            if all(network.names.get(parameter) in names for parameter in pair.parameters):
                pairs.append(pair)

    hooks = [layer.register_forward_hook(record) for layer in network.model.modules()]
    try:
        expected = network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if len({id(pair.conv) for pair in pairs}) < len(pairs) or len({id(pair.norm) for pair in pairs}) < len(pairs):
        return UNFOLDED  # a layer that is called twice
    folding = Folding(network.names, pairs)
    with folding.applied():
        found = network.at(folding.values(), inputs)
    same = (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    return folding if same else UNFOLDED


def _mean(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _deviation(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return (norm.running_var + norm.eps).sqrt()


def _along(values: Tensor, parameter: Tensor) -> Tensor:
    """Reshape (*, channels) to multiply (*, channels, …) of a parameter of the convolution."""
    return values.view(*values.shape, *(1,) * (parameter.ndim - 1))


def _shift(norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    return input + norm.bias.to(input.dtype).view(-1, 1, 1)
