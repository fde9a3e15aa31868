"""Small networks with odd habits, each seen in other people's projects; a case is a few lines.

`@case(inputs)` adds a class or a function that builds a network to `CASES`, under its own name. All networks are cast
to float64 and given weights and statistics that are not the initial ones, unless the case says otherwise.
"""

import contextlib
import functools
import io
import itertools
import random
import threading
import types
import warnings
import weakref
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
import torchmetrics
import torchvision
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def call(model: nn.Module, inputs: Any) -> Tensor:
    return model(inputs)


@dataclass(frozen=True)
class Case:
    """How to build a network and inputs of n samples, each the same whenever it is asked for."""

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[int], Any]
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    likelihood: str = "classification"
    tolerance: float = 1e-8  # relative
    dtype: torch.dtype | None = torch.float64

    def build(self) -> nn.Module:
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(0)
            model = self.make()
            model = model if self.dtype is None else model.to(self.dtype)
            unsettle(model)
        return model.train()

    def inputs(self, count: int, seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make_inputs(count)

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """What a user would call the outputs: (B, …)."""
        outputs = (self.forward or call)(model, inputs)
        outputs = getattr(outputs, "logits", outputs)
        count = next(len(leaf) for leaf in leaves(inputs) if leaf.ndim)
        # What `.squeeze()` took away.
        return outputs if outputs.ndim > 1 and len(outputs) == count else outputs.reshape(count, -1)


CASES: dict[str, Case] = {}


def case(inputs: Callable[[int], Any], **options: Any) -> Callable:
    def add(make: Callable) -> Callable:
        assert make.__name__ not in CASES
        CASES[make.__name__] = Case(make.__name__, make, inputs, **options)
        return make

    return add


@contextlib.contextmanager
def quiet():
    """Leave out the warnings of constructors that are old, but in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Move weights and running statistics away from what they start at: ones and zeros hide mistakes."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64).to(parameter.dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape))
        elif name.endswith("running_var"):
            buffer.copy_(0.2 + torch.rand(buffer.shape))


# Inputs --------------------------------------------------------------------------------------------------------------


def leaves(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, dict):
        children = inputs.values()
    elif is_dataclass(inputs):
        children = (getattr(inputs, field.name) for field in fields(inputs))
    else:
        children = inputs if isinstance(inputs, list | tuple) else ()
    return [leaf for child in children for leaf in leaves(child)]


def pick(inputs: Any, index: Any) -> Any:
    """The samples `index` of a batch; what has no first axis belongs to all of them."""
    if isinstance(inputs, Tensor):
        return inputs[index] if inputs.ndim else inputs
    if isinstance(inputs, dict):
        return {name: pick(value, index) for name, value in inputs.items()}
    if is_dataclass(inputs):
        return type(inputs)(*(pick(getattr(inputs, field.name), index) for field in fields(inputs)))
    if isinstance(inputs, list | tuple):
        parts = [pick(value, index) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def vectors(count: int) -> Tensor:
    return randn(count, 4)


def singles(count: int) -> Tensor:
    return torch.randn(count, 4)


def repeated(count: int) -> Tensor:
    """(B, 4), of which many are the same."""
    return randn(5, 4)[torch.randint(5, (count,))]


def sequences(count: int) -> Tensor:
    return randn(count, 5, 4)


def pairs(count: int) -> Tensor:
    return randn(count, 2, 4)


def padded(count: int) -> Tensor:
    """(B, 5, 4), from 1 to 5 of them, then zeros."""
    lengths = torch.randint(1, 6, (count,))
    lengths[0], lengths[-1] = 5, 1
    return randn(count, 5, 4) * (torch.arange(5) < lengths.unsqueeze(1)).unsqueeze(-1)


def tokens(count: int) -> Tensor:
    """(B, 6) of 1 … 8, from 2 to 6 of them, then zeros."""
    lengths = torch.randint(2, 7, (count,))
    return torch.randint(1, 9, (count, 6)) * (torch.arange(6) < lengths.unsqueeze(1))


def images(count: int) -> Tensor:
    return randn(count, 2, 8, 8)


def series(count: int) -> Tensor:
    return randn(count, 2, 9)


def volumes(count: int) -> Tensor:
    return randn(count, 1, 4, 4, 4)


def lengths_of(x: Tensor) -> Tensor:
    return (x != 0).any(-1).sum(1)


def mean_over(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean of (B, T, D) over the first so many of T."""
    mask = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
    return (x * mask.unsqueeze(-1)).sum(1) / lengths.unsqueeze(1)


# What most cases are made of -----------------------------------------------------------------------------------------


class Net(nn.Module):
    """4 -> 6 -> 6 -> 3."""

    def __init__(self):
        super().__init__()
        self.f, self.g, self.h = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.g(self.f(x).tanh()).tanh())


class ConvNet(nn.Module):
    """Two convolutions with a BatchNorm each, (B, 2, 8, 8) -> 3."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.m, self.n = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def body(self, x: Tensor) -> Tensor:
        return self.n(self.b(self.m(self.a(x)).relu())).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.body(x).mean((2, 3)))


def head(*layers: nn.Module, width: int, flatten: bool = True) -> nn.Sequential:
    return nn.Sequential(*layers, *([nn.Flatten()] if flatten else []), nn.Tanh(), nn.Linear(width, 3))


case(vectors)(Net)
case(images)(ConvNet)

# States and layers in other things than modules and lists ------------------------------------------------------------


class Registry:
    """Its copies are itself."""

    def __copy__(self):
        return self


@case(vectors)
class LayerInARegistry(Net):
    def __init__(self):
        super().__init__()
        self.one = Registry()
        self.one.body = self.g

    def forward(self, x):
        return self.h(self.one.body(self.f(x).tanh()).tanh())


@dataclass(slots=True)
class Branch:
    layer: nn.Module
    calls: int = 0


@case(vectors)
class LayersInSlotsProxiesAndWeakTables(Net):
    def __init__(self):
        super().__init__()
        self.branch, self.proxy = [Branch(self.f)], types.MappingProxyType({"g": self.g})
        self.weak, self.scales = weakref.WeakValueDictionary({"h": self.h}), weakref.WeakKeyDictionary({self.g: 2.0})

    def forward(self, x):
        self.branch[0].calls += 1
        return self.weak["h"](self.scales[self.g] * self.proxy["g"](self.branch[0].layer(x).tanh()).tanh())


@case(vectors)
class FeaturesByTheNamesOfModules(Net):
    def __init__(self):
        super().__init__()
        self.named, self.found = {child: name for name, child in self.named_children()}, {}
        for child in self.named:
            child.register_forward_hook(lambda child, args, out: self.found.update({self.named[child]: out}))

    def forward(self, x):
        super().forward(x)
        return self.h(self.found["f"].tanh() * self.found["g"])


class Option:
    def __init__(self, name):
        self.name = name


SINE, TANH = Option("sine"), Option("tanh")


@case(vectors)
class ChoosesByIdentity(Net):
    """Constants are objects with attributes, compared by identity and looked up."""

    def __init__(self):
        super().__init__()
        self.option, self.ways = TANH, {SINE: torch.sin, TANH: torch.tanh}

    def forward(self, x):
        z = self.ways[self.option](self.f(x))
        return self.h(self.g(z.tanh() if self.option is TANH else z).tanh())


class Watcher:
    """Takes its hook away at its end."""

    def __init__(self, owner, layer):
        self.owner, self.handle = owner, layer.register_forward_hook(lambda layer, args, out: 1.5 * out)

    def __del__(self):
        self.handle.remove()


@case(vectors)
class HookThatAnObjectTakesAway(Net):
    def __init__(self):
        super().__init__()
        self.watcher = Watcher(self, self.g)


class Meter:
    def __init__(self):
        self.count, self.seen = 0, []


@case(vectors)
class CountsInManyWays(Net):
    """What it counts does not change what it says."""

    def __init__(self):
        super().__init__()
        self.counter, self.array, self.bytes = Counter(), np.zeros(2), bytearray(4)
        self.meters, self.number, self.simple = (Meter(), [Meter()]), itertools.count(), types.SimpleNamespace(n=0)
        self.drawn, self.random = torch.Generator(), random.Random(0)
        self.power = functools.lru_cache(self.power)

    def power(self, exponent):
        return 1.0 / (1 + exponent)

    def forward(self, x):
        self.counter["samples"] += len(x)
        self.array += 1
        self.bytes[0] = (self.bytes[0] + 1) % 256
        for meter in (self.meters[0], *self.meters[1]):
            meter.count += 1
            meter.seen.append(x)
        self.simple.n += next(self.number)
        torch.rand(1, generator=self.drawn)
        self.random.random()
        return super().forward(x * self.power(2))


# Samples sorted, and put back ----------------------------------------------------------------------------------------


@case(padded)
class SortedByLength(Net):
    def forward(self, x):
        order = lengths_of(x).argsort(descending=True, stable=True)
        return super().forward(x[order]).mean(1)[order.argsort()]


@case(padded)
class SortedAndScattered(Net):
    def forward(self, x):
        _, order = lengths_of(x).sort(descending=True, stable=True)
        z = super().forward(x.index_select(0, order)).mean(1)
        return torch.zeros_like(z).scatter(0, order.unsqueeze(1).expand_as(z), z)


@case(padded)
class SortedAndGathered(Net):
    def forward(self, x):
        z, order = x.flatten(1), x[:, :, 0].sum(1).argsort()
        z = z.gather(0, order.unsqueeze(1).expand_as(z)).view_as(x)
        return self.h(self.g(self.f(z).tanh()).tanh().sum(1))[order.argsort()]


@case(vectors)
class SortedByWhatItLearnt(Net):
    def forward(self, x):
        z = self.f(x).tanh()
        order = z.detach().sum(1).argsort()
        out = torch.empty(len(x), 3, dtype=x.dtype)
        out[order] = self.h(self.g(z[order]).tanh())
        return out


@case(padded)
class SortedForSomeOutputs(Net):
    """The first output sees the samples as they come."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 1)

    def forward(self, x):
        order = lengths_of(x).argsort(descending=True, stable=True)
        z = self.f(x.sum(1)).tanh()
        return torch.cat([self.first(z), self.h(self.g(z[order]).tanh())[order.argsort()][:, 1:]], 1)


@case(vectors)
class SortedByFirst(Net):
    def forward(self, x):
        order = x[:, 0].argsort()
        return self.h(self.g(self.f(x).tanh()[order]).tanh())[order.argsort()]


@case(vectors)
class SortedByAMatrix(Net):
    def forward(self, x):
        places = F.one_hot(x[:, 0].argsort(), len(x)).to(x)
        return places.T @ self.h(self.g(places @ self.f(x).tanh()).tanh())


@case(vectors)
class SortedAlongTheSecondAxis(Net):
    def forward(self, x):
        order = x[:, 0].argsort()
        z = self.f(x).tanh().unsqueeze(0).index_select(1, order)
        return self.h(self.g(z).tanh()).index_select(1, order.argsort()).squeeze(0)


@case(vectors)
class SortedByAnEmbedding(Net):
    def forward(self, x):
        order = x[:, 0].argsort()
        return F.embedding(order.argsort(), self.h(self.g(F.embedding(order, self.f(x).tanh())).tanh()))


class Permute(torch.autograd.Function):
    """Called like an operation of torch's."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x[order]

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.order.argsort()], None


@case(vectors)
class SortedByAFunctionOfItsOwn(Net):
    def forward(self, x):
        order = x[:, 0].argsort()
        return Permute.apply(self.h(self.g(Permute.apply(self.f(x).tanh(), order)).tanh()), order.argsort())


@case(vectors)
class SortedAsColumns(Net):
    def forward(self, x):
        order = x[:, 0].argsort()
        columns = self.f(x).tanh().t().unbind(1)
        z = self.h(self.g(torch.stack([columns[i] for i in order], 1).t()).tanh())
        return torch.stack([z.t().unbind(1)[i] for i in order.argsort()], 1).t()


@case(vectors)
class LayerOrItsFunction(Net):
    """For some batches a weight is used without its layer, in a graph of the same operations."""

    def forward(self, x):
        z = self.f(x).tanh()
        return self.h((self.g(z) if x.mean() > 0 else F.linear(z, self.g.weight, self.g.bias)).tanh())


@case(padded)
class PackedLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.h = nn.LSTM(4, 3, bidirectional=True, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        packed = pack_padded_sequence(x, lengths_of(x).cpu(), batch_first=True, enforce_sorted=False)
        z, lengths = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.h(mean_over(z, lengths))


@case(padded)
class PackedGRUSortedByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.gru, self.h = nn.Linear(4, 4), nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        lengths, order = lengths_of(x).sort(descending=True, stable=True)
        packed = pack_padded_sequence(self.f(x[order]), lengths.cpu(), batch_first=True)
        return self.h(self.gru(packed)[1][-1])[order.argsort()]


@case(padded)
class PackedLinear(Net):
    def forward(self, x):
        packed = pack_padded_sequence(x, lengths_of(x).cpu(), batch_first=True, enforce_sorted=False)
        z, lengths = pad_packed_sequence(PackedSequence(self.f(packed.data).tanh(), *packed[1:]), batch_first=True)
        return self.h(self.g(mean_over(z, lengths)).tanh())


@case(padded)
class RowsWithoutPadding(Net):
    """Now and then there are as many rows as samples."""

    def forward(self, x):
        sample, _ = keep = (x != 0).any(-1).nonzero(as_tuple=True)
        z = self.g(self.f(x[keep]).tanh()).tanh()
        return self.h(z.new_zeros(len(x), 6).index_add(0, sample, z))


@case(padded)
class Nested(Net):
    def forward(self, x):
        lengths = lengths_of(x)
        values = x[torch.arange(5) < lengths.unsqueeze(1)]
        ends = F.pad(lengths.cumsum(0), (1, 0))
        z = self.f(torch.nested.nested_tensor_from_jagged(values, ends)).values().tanh()
        return self.h(torch.stack([z[a:b].mean(0) for a, b in itertools.pairwise(ends.tolist())]))


@case(padded)
class ListsOfSequences(Net):
    def forward(self, x):
        parts = [self.f(row[:n]).tanh() for row, n in zip(x, lengths_of(x).tolist(), strict=True)]
        return self.h(self.g(pad_sequence(parts, batch_first=True).sum(1)).tanh())


@case(vectors)
class StackedInAnotherOrder(Net):
    def forward(self, x):
        order = sorted(range(len(x)), key=lambda i: float(x[i, 0]))
        z = self.g(torch.stack([self.f(x[i]).tanh() for i in order])).tanh()
        return self.h(torch.stack([z[order.index(i)] for i in range(len(x))]))


@case(padded)
class GroupedByLength(Net):
    def forward(self, x):
        lengths, out = lengths_of(x), x.new_empty(len(x), 3)
        for n in lengths.unique().tolist():
            out[lengths == n] = self.h(self.g(self.f(x[lengths == n, :n]).tanh().mean(1)).tanh())
        return out


@case(vectors)
class FlippedOnCondition(Net):
    def forward(self, x):
        turned = bool(x[0, 0] > x[-1, 0])
        z = super().forward(x.flip(0) if turned else x)
        return z.flip(0) if turned else z


@case(vectors)
class RolledByWhatItSees(Net):
    def forward(self, x):
        by = int(x[:, 0].argmax())
        return super().forward(x.roll(by, 0)).roll(-by, 0)


# Samples regrouped ---------------------------------------------------------------------------------------------------


@case(vectors)
class EvenThenOdd(Net):
    def forward(self, x):
        order = torch.cat([torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)])
        return super().forward(torch.cat([x[::2], x[1::2]]))[order.argsort()]


@case(vectors)
class HalvesSwapped(Net):
    def forward(self, x):
        half = len(x) // 2
        z = super().forward(torch.cat([x[half:], x[:half]]))
        return torch.cat([z[len(x) - half :], z[: len(x) - half]])


@case(vectors)
class TwoViewsInOneBatch(Net):
    def forward(self, x):
        a, b = super().forward(torch.cat([x, x.flip(1)])).chunk(2)
        return a + b.tanh()


@case(vectors)
class MembersOfAnEnsembleInOneBatch(Net):
    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):  # the samples of one member after those of another
        return super().forward((x * self.scales.unsqueeze(1)).flatten(0, 1)).view(3, len(x), 3).mean(0)


@case(vectors)
class BeamsBesideEachOther(Net):
    def forward(self, x):
        z = self.f(x).repeat_interleave(2, 0) * torch.arange(1.0, 3).to(x).repeat(len(x)).unsqueeze(1)
        return self.h(self.g(z.tanh()).tanh()).view(len(x), 2, 3).logsumexp(1)


@case(sequences)
class SequenceFirst(Net):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).mean(0)


@case(sequences)
class TimeMajorRows(Net):
    def forward(self, x):
        z = self.f(x.transpose(0, 1).flatten(0, 1)).tanh().view(5, len(x), 6)
        return self.h(self.g(z.sum(0)).tanh())


@case(vectors)
class BatchAsTokens(Net):
    def forward(self, x):
        return super().forward(x.unsqueeze(0)).squeeze(0)


@case(images)
class SideBySide(nn.Module):
    """All samples in one picture, below each other."""

    def __init__(self):
        super().__init__()
        self.conv, self.h = nn.Conv2d(2, 4, (1, 3)), nn.Linear(4, 3)

    def forward(self, x):
        z = self.conv(x.transpose(0, 1).flatten(1, 2).unsqueeze(0)).tanh()  # (1, 4, B * 8, 6)
        return self.h(z.view(4, len(x), 8, 6).mean((2, 3)).T)


@case(images)
class BatchInChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        z = self.a(x).tanh().flatten(0, 1).unsqueeze(0)  # (1, B * 4, 6, 6)
        z = F.conv2d(z, self.b.weight.repeat(len(x), 1, 1, 1), self.b.bias.repeat(len(x)), groups=len(x))
        return self.h(z.view(len(x), 4, -1).tanh().mean(-1))


@case(images)
class ShiftedWindows(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.norm, self.h = nn.Conv2d(2, 4, 1), nn.LayerNorm(4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        z = self.f(x).roll((2, 2), (2, 3)).unfold(2, 4, 4).unfold(3, 4, 4)  # (B, 4, 2, 2, 4, 4)
        z = self.norm(z.permute(2, 3, 0, 4, 5, 1).flatten(3, 4).flatten(0, 2))  # windows first, then samples
        return self.h(self.attention(z, z, z, need_weights=False)[0].view(4, len(x), 16, 4).mean((0, 2)))


@case(vectors)
class ThreeAtATime(Net):
    def forward(self, x):
        return torch.cat([super(ThreeAtATime, self).forward(part) for part in x.split(3)])


@case(vectors)
class OneAtATime(Net):
    def forward(self, x):
        return torch.stack([super(OneAtATime, self).forward(row) for row in x])


@case(vectors)
class CutWhereItSays(Net):
    def forward(self, x):
        at = int((x[:, 0] > 0).sum())
        return torch.cat([super(CutWhereItSays, self).forward(part) for part in (x[:at], x[at:])])


# Samples routed ------------------------------------------------------------------------------------------------------


@case(pairs)
class Mixture(nn.Module):
    """Two tokens a sample, two experts: as often as not an expert gets as many rows as there are samples."""

    def __init__(self):
        super().__init__()
        self.gate, self.h = nn.Linear(4, 2), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))

    def forward(self, x):
        rows = x.flatten(0, 1)
        weight, choice = self.gate(rows).softmax(1).max(1)
        z = rows.new_zeros(len(rows), 6)
        for i, expert in enumerate(self.experts):
            z = z.index_add(0, at := (choice == i).nonzero()[:, 0], weight[at, None] * expert(rows[at]).tanh())
        return self.h(z.view(len(x), 2, 6).sum(1))


@case(sequences)
class MixtureOfTwoEach(Mixture):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 5), nn.ModuleList(nn.Linear(4, 6) for _ in range(5))

    def forward(self, x):  # five tokens, five experts, two for each token
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(1).topk(2)
        order = chosen.flatten().argsort(stable=True)
        parts = rows.repeat_interleave(2, 0)[order].split(chosen.flatten().bincount(minlength=5).tolist())
        z = torch.cat([expert(part).tanh() for expert, part in zip(self.experts, parts, strict=True)])
        z = z[order.argsort()].view(len(rows), 2, 6) * weights.unsqueeze(-1)
        return self.h(z.view(len(x), 10, 6).sum(1))


@case(lambda count: {"x": vectors(count), "domain": torch.randint(3, (count,))})
class HeadForEachDomain(Net):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, batch):
        z, out = self.f(batch["x"]).tanh(), batch["x"].new_zeros(len(batch["x"]), 3)
        for i, head in enumerate(self.heads):
            if (mine := batch["domain"] == i).any():
                out[mine] = head(z[mine])
        return out


@case(vectors)
class EarlyExit(Net):
    def forward(self, x):
        out = self.h(z := self.f(x).tanh())
        unsure = out.softmax(1).amax(1) < 0.45
        return out.index_put((unsure,), self.h(self.g(z[unsure]).tanh())) if unsure.any() else out


@case(vectors)
class OneByOneThroughItsOwnLayers(Net):
    def forward(self, x):
        rows = [self.g(z).tanh() if float(z.detach().sum()) > 0 else z for z in self.f(x).tanh().split(1)]
        return self.h(torch.cat(rows))


@case(vectors)
class SomeRowsAdapted(Net):
    def forward(self, x):
        z, some = self.f(x).tanh(), x[:, 0] > 0
        return self.h(z.masked_scatter(some.unsqueeze(1), self.g(z[some])))


@case(vectors)
class BothSidesOfWhere(Net):
    def forward(self, x):
        return self.h(torch.where(x[:, :1] > 0, self.f(x).tanh(), self.g(self.f(x).sin())))


# Computed for several samples at once --------------------------------------------------------------------------------


@case(repeated)
class UniqueRows(Net):
    def forward(self, x):
        rows, inverse = x.unique(dim=0, return_inverse=True)
        return super().forward(rows)[inverse]


@case(vectors)
class Prototypes(Net):
    """The layers see the three prototypes, too: as many as a batch may have samples."""

    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(3, 4))

    def embed(self, x):
        return self.g(self.f(x).tanh())

    def forward(self, x):
        return -(self.embed(x).unsqueeze(1) - self.embed(self.prototypes)).square().sum(-1)


@case(sequences)
class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.attention, self.h = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 6, 4))

    def forward(self, x):
        x = torch.cat([self.f(self.token).expand(len(x), -1, -1), self.f(x)], 1) + self.position
        return self.h(self.attention(x, x, x, need_weights=False)[0][:, 0])


@case(vectors)
class HyperNetwork(Net):
    def __init__(self):
        super().__init__()
        self.code, self.hyper = nn.Parameter(torch.randn(2)), nn.Linear(2, 36)

    def forward(self, x):
        return self.h(F.linear(self.f(x).tanh(), self.hyper(self.code).view(6, 6)).tanh())


@case(vectors)
class HyperNetworkOfEachSample(Net):
    def __init__(self):
        super().__init__()
        self.hyper = nn.Linear(4, 36)

    def forward(self, x):
        return self.h(torch.bmm(self.hyper(x).view(-1, 6, 6), self.f(x).tanh().unsqueeze(2)).squeeze(2).tanh())


@case(sequences)
class NetworkOfPositions(Net):
    def __init__(self):
        super().__init__()
        self.of_position = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x):
        bias = self.of_position(torch.linspace(0, 1, x.shape[1], dtype=x.dtype).unsqueeze(1))
        return self.h(self.g((self.f(x) + bias).tanh()).tanh().mean(1))


@case(vectors)
class TextTower(Net):
    """Three prompts, computed once and compared with each sample, as CLIP does."""

    def __init__(self):
        super().__init__()
        self.prompts, self.text = nn.Embedding(9, 5), nn.Linear(5, 6)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        text = self.text(self.prompts(torch.arange(6).view(3, 2)).sum(1)).tanh()
        return self.logit_scale.exp() * F.normalize(self.f(x), dim=1) @ F.normalize(text, dim=1).T


@case(tokens)
class LearnedPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.p, self.h = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, t):
        return self.h((self.e(t) * self.p(torch.arange(6))).tanh().sum(1))


# Recomputed in the backward pass -------------------------------------------------------------------------------------


@case(vectors)
class ReentrantCheckpoint(Net):
    def forward(self, x):
        x = x.detach().requires_grad_()  # without it, nothing before the head would be trained
        return self.h(checkpoint(lambda z: self.g(self.f(z).tanh()).tanh(), x, use_reentrant=True))


@case(vectors)
class ReentrantCheckpointInside(Net):
    def forward(self, x):
        return self.h(checkpoint(self.g, self.f(x).tanh(), use_reentrant=True).tanh())


@case(vectors)
class Checkpoint(Net):
    def forward(self, x):
        return self.h(checkpoint(lambda z: self.g(self.f(z).tanh()).tanh(), x, use_reentrant=False))


@case(images)
class CheckpointOfOneNorm(ConvNet):
    def forward(self, x):
        z = checkpoint(lambda z: self.n(self.b(z)), self.m(self.a(x)).relu(), use_reentrant=False)
        return self.h(z.tanh().mean((2, 3)))


@case(images)
class CheckpointOfTwoNorms(ConvNet):
    def forward(self, x):
        return self.h(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))


@case(images)
class ReentrantCheckpointOfTwoNorms(ConvNet):
    def forward(self, x):
        return self.h(checkpoint(self.body, x.detach().requires_grad_(), use_reentrant=True).mean((2, 3)))


@case(vectors)
class CheckpointedSegments(Net):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(self.f, nn.Tanh(), self.g, nn.Tanh())

    def forward(self, x):
        return self.h(checkpoint_sequential(self.layers, 2, x, use_reentrant=False))


@case(images)
def timm_transformer_with_checkpoints() -> nn.Module:
    model = VisionTransformer(8, 4, in_chans=2, num_classes=3, embed_dim=8, depth=2, num_heads=2, mlp_ratio=1)
    model.set_grad_checkpointing()
    return model


@case(images)
def timm_resnet_with_checkpoints() -> nn.Module:
    block = timm.models.resnet.BasicBlock
    model = timm.models.ResNet(block, (1, 1, 1, 1), 3, in_chans=2, stem_width=4, channels=(4, 4, 4, 4))
    model.set_grad_checkpointing()
    return model


class Recomputed(torch.autograd.Function):
    """x * sigmoid(x), which keeps x alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        s = ctx.saved_tensors[0].sigmoid()
        return g * s * (1 + ctx.saved_tensors[0] * (1 - s))


@case(vectors)
class OwnBackward(Net):
    def forward(self, x):
        return self.h(Recomputed.apply(self.g(Recomputed.apply(self.f(x)))))


@case(vectors)
class StraightThrough(Net):
    def forward(self, x):
        z = self.f(x)
        return self.h(self.g(z + (z.round() - z).detach()).tanh())


# Under two names, and tied -------------------------------------------------------------------------------------------


@case(vectors)
class ModuleWithTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Net()
        self.encoder, self.last = self.model, self.model.h

    def forward(self, x):
        return self.model(x)


@case(images)
class NormWithTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = ConvNet()
        self.layers = nn.ModuleList([self.backbone.a, self.backbone.m])

    def forward(self, x):
        return self.backbone(x)


@case(images)
def timm_transformer_with_two_names() -> nn.Module:
    inner = VisionTransformer(8, 4, in_chans=2, num_classes=3, embed_dim=8, depth=1, num_heads=2, mlp_ratio=1)
    model = nn.Sequential(inner)
    model.encoder, model.classifier = inner, inner.get_classifier()
    model.forward = inner.forward
    return model


@case(vectors)
def same_layer_twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


@case(vectors)
class SameThetas(Net):
    def __init__(self):
        super().__init__()
        self.theta_f = self.theta_b = nn.Linear(6, 3)

    def forward(self, x):
        z = self.f(x).tanh()
        return self.theta_f(z) + self.theta_b(self.g(z).tanh())


@case(vectors)
class TiedLayers(Net):
    def __init__(self):
        super().__init__()
        self.k = nn.Linear(6, 6, bias=False)
        self.k.weight = self.g.weight

    def forward(self, x):
        return self.h(self.k(self.g(self.f(x).tanh()).tanh()).tanh())


@case(vectors)
class OneOfTwoTiedLayers(TiedLayers):
    def forward(self, x):
        z = self.f(x).tanh()
        return self.h((self.k(z) + self.g.bias if x.mean() > 0 else self.g(z)).tanh())


@case(vectors)
class TiedTransposed(Net):
    def forward(self, x):
        return self.h(self.f(F.linear(self.f(x).tanh(), self.f.weight.T)).tanh())


@case(vectors)
class ParameterWithTwoNames(Net):
    def __init__(self):
        super().__init__()
        self.w = self.g.weight

    def forward(self, x):
        return self.h((self.g(self.f(x)).tanh() @ self.w).tanh())


@case(tokens)
class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.out, self.h = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(9, 3)
        self.out.weight = self.e.weight

    def forward(self, t):
        return self.h(self.out(self.e(t).mean(1).tanh()).tanh())


@case(tokens)
class EmbeddingTiedByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.h = nn.Embedding(9, 4), nn.Linear(9, 3)

    def forward(self, t):
        return self.h(F.linear(self.e(t).mean(1).tanh(), self.e.weight).tanh())


@case(sequences)
class TiedWithinAnLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.h = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)
        self.lstm.weight_hh_l0 = self.lstm.weight_ih_l0

    def forward(self, x):
        return self.h(self.lstm(x)[0][:, -1])


# Kept in odd places --------------------------------------------------------------------------------------------------


@case(vectors)
class PlainList(Net):
    def __init__(self):
        super().__init__()
        self.layers = [self.f, nn.Tanh(), self.g, torch.tanh, self.h]

    def forward(self, x):
        return functools.reduce(lambda z, layer: layer(z), self.layers, x)


@case(vectors)
class PlainDict(Net):
    def __init__(self):
        super().__init__()
        self.layers = {"inner": (self.f, self.g), "outer": {"head": self.h}}

    def forward(self, x):
        f, g = self.layers["inner"]
        return self.layers["outer"]["head"](g(f(x).tanh()).tanh())


@case(vectors)
class PartialOfLayer(Net):
    def __init__(self):
        super().__init__()
        self.first = functools.partial(torch.Tensor.tanh)
        self.second = functools.partial(self._scaled, self.g, scale=2.0)

    @staticmethod
    def _scaled(layer, x, scale):
        return layer(x) * scale

    def forward(self, x):
        return self.h(self.second(self.first(self.f(x))).tanh())


@case(vectors)
def closure_as_forward() -> nn.Module:
    model, inner = Net(), nn.Linear(6, 6)
    model.adapter, old = inner, model.g.forward
    model.g.forward = lambda x: old(x) + inner(x.sin())
    return model


@case(images)
def wrapped_norm_forward() -> nn.Module:
    model = ConvNet()

    def wrap(layer, old):
        @functools.wraps(old)
        def forward(*args, **kwargs):
            layer.times = getattr(layer, "times", 0) + 1
            return 2 * old(*args, **kwargs)

        return forward

    for layer in (model.m, model.b):
        layer.forward = wrap(layer, layer.forward)
    return model


@case(vectors)
def patched_as_accelerate_does() -> nn.Module:
    model = Net()
    for layer in (model.f, model.g):
        layer._old_forward = layer.forward
        layer.forward = functools.update_wrapper(functools.partial(_scaled_forward, layer), layer._old_forward)
    return model


def _scaled_forward(module: nn.Module, *args: Any) -> Tensor:
    return 1.5 * module._old_forward(*args)


@case(vectors)
class BoundMethods(Net):
    def __init__(self):
        super().__init__()
        self.steps = [self._first, self._second]
        self.last = self.h.forward

    def _first(self, x):
        return self.f(x).tanh()

    def _second(self, x):
        return self.g(x).tanh()

    def forward(self, x):
        return self.last(self.steps[1](self.steps[0](x)))


@case(vectors)
class ListOfLambdas(Net):
    def __init__(self):
        super().__init__()
        self.steps = [lambda x: self.f(x).tanh(), lambda x: self.g(x).tanh(), lambda x: self.h(x)]

    def forward(self, x):
        return functools.reduce(lambda z, step: step(z), self.steps, x)


class Child(nn.Module):
    def __init__(self, parent: nn.Module):
        super().__init__()
        self.parent, self.owner = weakref.ref(parent), [parent, weakref.proxy(parent)]


@case(vectors)
class ChildKnowsItsParent(Net):
    def __init__(self):
        super().__init__()
        self.child = Child(self)
        self.child.k = nn.Linear(6, 6)

    def forward(self, x):
        child = self.child
        return child.owner[1].h(child.k(child.owner[0].g(child.parent().f(x).tanh()).tanh()).tanh())


class Helper:
    """Not a module, but it has some."""

    def __init__(self, *layers: nn.Module):
        self.layers, self.calls = layers, 0

    def __call__(self, x):
        self.calls += 1
        return functools.reduce(lambda z, layer: layer(z).tanh(), self.layers, x)


@case(vectors)
class PlainHelper(Net):
    def __init__(self):
        super().__init__()
        self.helper = Helper(self.f, self.g)

    def forward(self, x):
        return self.h(self.helper(x))


# Hooks ---------------------------------------------------------------------------------------------------------------


@case(vectors)
class HookChangesOutput(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.g.register_forward_hook(self._double)

    def _double(self, module, args, output):
        return self.scale * output + args[0]


@case(vectors)
class HookKeepsActivations(Net):
    def __init__(self):
        super().__init__()
        self.kept = {}
        self.f.register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.kept["f"] = module.seen = output

    def forward(self, x):
        return self.h(self.g(self.f(x).tanh()) + self.kept["f"])


@case(vectors)
class HookKeepsThroughClosure(Net):
    def __init__(self):
        super().__init__()
        self.kept = []
        self.f.register_forward_hook(lambda module, args, output: self.kept.append(output))

    def forward(self, x):
        self.kept.clear()
        return self.h(self.g(self.f(x).tanh()) + self.kept[-1])


@case(vectors)
class PreHookChangesInput(Net):
    def __init__(self):
        super().__init__()
        self.g.register_forward_pre_hook(lambda module, args: (args[0] ** 2,))


@case(vectors)
class HookWithKeywords(Net):
    def __init__(self):
        super().__init__()
        self.g.register_forward_pre_hook(self._before, with_kwargs=True)
        self.g.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def _before(self, module, args, kwargs):
        return (), {"input": args[0].sin()}

    def _after(self, module, args, kwargs, output):
        return output * kwargs["input"]


@case(images)
class HookOnNorm(ConvNet):
    def __init__(self):
        super().__init__()
        self.m.register_forward_hook(lambda module, args, output: output * 2 + args[0])


@case(vectors)
class BackwardHookCounts(Net):
    def __init__(self):
        super().__init__()
        self.seen = 0
        self.g.register_full_backward_hook(self._count)

    def _count(self, module, before, after):
        self.seen += 1


@case(vectors)
class OldWeightNorm(Net):
    def __init__(self):
        super().__init__()
        nn.utils.weight_norm(self.f)
        nn.utils.weight_norm(self.g, dim=None)


@case(images)
class OldSpectralNorm(ConvNet):
    def __init__(self):
        super().__init__()
        nn.utils.spectral_norm(self.a)
        nn.utils.spectral_norm(self.h)


@case(vectors)
class Parametrized(Net):
    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.f)
        parametrizations.orthogonal(self.g)
        parametrizations.spectral_norm(self.h)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


@case(vectors)
class ParametrizedByHandAndCached(Net):
    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.g, "weight", Symmetric())

    def forward(self, x):
        with parametrize.cached():
            return self.h(self.g(self.g(self.f(x).tanh()).tanh()).tanh())


@case(vectors)
class Pruned(Net):
    def __init__(self):
        super().__init__()
        prune.l1_unstructured(self.f, "weight", 0.5)
        prune.ln_structured(self.g, "weight", 0.5, 2, 0)


@case(vectors)
class GeneratedWeight(Net):
    """Sets a weight of a layer in every forward pass."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(self.g.weight.detach().clone())
        del self.g.weight

    def forward(self, x):
        self.g.weight = self.raw.tanh()
        return super().forward(x)


# Parameters ----------------------------------------------------------------------------------------------------------


@case(vectors)
class LogitScale(Net):
    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.logit_scale.exp() * super().forward(x)


@case(vectors)
class ReZero(Net):
    def __init__(self):
        super().__init__()
        self.alpha = nn.ParameterList(nn.Parameter(torch.tensor(0.1)) for _ in range(2))

    def forward(self, x):
        z = self.f(x)
        for a in self.alpha:
            z = z + a * self.g(z).tanh()
        return self.h(z)


@case(series)
class ComplexFilter(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter, self.h = nn.Parameter(torch.randn(2, 5, 2)), nn.Linear(18, 3)

    def forward(self, x):
        z = torch.fft.rfft(x, norm="ortho") * torch.view_as_complex(self.filter)
        return self.h(torch.fft.irfft(z, 9, norm="ortho").tanh().flatten(1))


@case(vectors)
class UsedFunctionally(Net):
    def forward(self, x):
        return self.h(F.linear(self.f(x).tanh(), self.g.weight, self.g.bias).tanh())


@case(vectors)
class CalledAndUsedFunctionally(Net):
    def forward(self, x):
        return self.h(F.linear(self.g(self.f(x).tanh()).tanh(), self.g.weight).tanh())


@case(vectors)
class SometimesUsedFunctionally(Net):
    def forward(self, x):
        z = self.f(x).tanh()
        return self.h((F.linear(z, self.g.weight, self.g.bias) if x.mean() > 0 else self.g(z)).tanh())


@case(vectors)
class SomeSamplesUseItFunctionally(Net):
    def forward(self, x):
        z, some = self.g(self.f(x).tanh()).tanh(), x[:, :1] > 0.5
        return self.h(z + F.linear(z, self.g.weight) * some if some.any() else z)


@case(vectors)
class CalledTwice(Net):
    def forward(self, x):
        return self.h(self.g(self.g(self.f(x).tanh()).tanh()).tanh())


@case(sequences)
class CalledWithOtherLengths(Net):
    def forward(self, x):
        z = self.f(x).tanh()
        return self.h(self.g(z).tanh().mean(1) + self.g(z[:, 0]) * self.g(z[:1, 0].detach() * 0 + 1))


@case(vectors)
class CalledByKeyword(Net):
    def forward(self, x):
        return self.h(input=self.g(input=self.f(x).tanh()).tanh())


@case(vectors)
class CalledPastItsCall(Net):
    def forward(self, x):
        return self.h(nn.Linear.forward(self.g, self.f.forward(x).tanh()).tanh())


@case(images)
class InputOverwritten(nn.Module):
    """The convolution pads a copy, so its input may be written to afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.h = nn.Linear(4, 3)

    def forward(self, x):
        z = self.a(x)
        y = self.b(z)
        return self.h((z.add_(3) * y.tanh()).mean((2, 3)))


class Copying(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


@case(vectors)
class SubclassOfLinear(Net):
    def __init__(self):
        super().__init__()
        self.g = Copying(6, 6)

    def forward(self, x):
        z = self.f(x)
        y = self.g(z)
        return self.h(z.mul_(0.5) + y)


@case(vectors)
class InPlaceEverywhere(Net):
    def forward(self, x):
        z = self.f(x).relu_()
        z = self.g(z).mul_(2).add_(z)
        return self.h(F.relu(z, inplace=True)).div_(2)


@case(images)
def in_place_relu() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(True)
    return head(*layers, width=4)


@case(images)
class NormOfTwoConvolutions(ConvNet):
    def forward(self, x):
        return self.h(self.n(self.b(self.m(self.a(x)).relu()) + self.a(x)).tanh().mean((2, 3)))


@case(images)
class NormCalledTwice(ConvNet):
    def forward(self, x):
        return self.h(self.m(self.b(self.m(self.a(x)).relu())).tanh().mean((2, 3)))


@case(images)
class ConvolutionUsedTwiceForSome(ConvNet):
    def forward(self, x):
        y = self.a(x)
        z, some = self.m(y), (x.amax((1, 2, 3)) > 2.9).view(-1, 1, 1, 1)
        if some.any():
            z = z + some * y
        return self.h(self.n(self.b(z.relu())).tanh().mean((2, 3)))


@case(images)
class KernelUsedTwiceForSome(ConvNet):
    def forward(self, x):
        z, some = self.m(self.a(x)), x.amax((1, 2, 3)) > 2.9
        if some.any():
            z = z.index_put((some,), F.conv2d(x[some], self.a.weight, padding=1), accumulate=True)
        return self.h(self.n(self.b(z.relu())).tanh().mean((2, 3)))


@case(images)
class NormOnlyForSome(ConvNet):
    def forward(self, x):
        y, some = self.a(x), x.mean((1, 2, 3)) > 0
        return self.h(torch.where(some.view(-1, 1, 1, 1), self.m(y) if some.any() else y, y).tanh().mean((2, 3)))


# Norms and other layers ----------------------------------------------------------------------------------------------


@case(sequences)
class NormOfTokens(Net):
    def __init__(self):
        super().__init__()
        self.m, self.n = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x):
        z = self.m(self.f(x).mT).mT.tanh()
        return self.h(self.n(self.g(z).flatten(0, 1)).view(len(x), 5, 6).tanh().mean(1))


@case(images)
def norms_of_groups_and_instances() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4)
    return head(*layers, nn.AdaptiveAvgPool2d(2), width=16)


@case(images)
class NormOverChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.m, self.n, self.h = nn.Conv2d(2, 4, 3), nn.LayerNorm(4), LayerNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.h(self.n(self.m(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).sin()).tanh().mean((2, 3)))


@case(sequences)
def norms_of_features() -> nn.Module:
    return head(nn.Linear(4, 6), nn.RMSNorm(6), nn.Tanh(), nn.LayerNorm([5, 6]), width=30)


@case(images)
def frozen_norm() -> nn.Module:
    norm = torchvision.ops.FrozenBatchNorm2d(4)
    return head(nn.Conv2d(2, 4, 3, 2), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), width=4)


@case(tokens)
def embedding() -> nn.Module:
    return head(nn.Embedding(9, 4, padding_idx=0), width=24)


@case(tokens)
def sparse_embedding() -> nn.Module:
    return head(nn.Embedding(9, 4, sparse=True, padding_idx=0), width=24)


@case(tokens)
def embedding_and_convolution() -> nn.Module:
    return head(nn.Embedding(9, 4), nn.Conv1d(6, 3, 3), width=6)


@case(tokens)
def renormalised_embedding() -> nn.Module:
    return head(nn.Embedding(9, 4, max_norm=1.0), width=24)


@case(tokens)
def embedding_bag() -> nn.Module:
    return head(nn.EmbeddingBag(9, 6, mode="mean", padding_idx=0), width=6)


@case(tokens)
def sparse_embedding_bag() -> nn.Module:
    return head(nn.EmbeddingBag(9, 6, mode="sum", sparse=True), width=6)


@case(tokens)
class BagsWithOffsets(nn.Module):
    """Words of all samples in one row, and where each sample begins."""

    def __init__(self):
        super().__init__()
        self.e, self.h = nn.EmbeddingBag(9, 6, mode="sum"), nn.Linear(6, 3)

    def forward(self, t):
        starts = F.pad((t > 0).sum(1).cumsum(0), (1, 0))[:-1]
        return self.h(self.e(t[t > 0], starts).tanh())


@case(series)
def convolutions_of_series() -> nn.Module:
    layers = nn.Conv1d(2, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.GELU(), nn.Conv1d(4, 4, 3, 2, dilation=2)
    return head(*layers, nn.ConvTranspose1d(4, 2, 3, 2), width=14)


@case(volumes)
def convolutions_of_volumes() -> nn.Module:
    layers = nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.SiLU(), nn.ConvTranspose3d(2, 1, 2, 2), nn.AdaptiveAvgPool3d(2)
    return head(*layers, width=8)


@case(images)
def convolutions_of_all_kinds() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh(), nn.ConvTranspose2d(4, 4, 2, 2, groups=2)
    return head(*layers, nn.PixelUnshuffle(4), nn.Conv2d(64, 2, 2, stride=2), width=8)


@case(sequences)
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LSTM(4, 3, batch_first=True, bidirectional=True), nn.GRU(6, 5)
        self.c, self.h = nn.LSTMCell(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        z, state = self.b(self.a(x[:, :2])[0].transpose(0, 1))[0], None
        for step in z:
            state = self.c(step, state)
        return self.h(state[0])


@case(sequences)
class ProjectedLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.h = nn.LSTM(4, 5, proj_size=3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.h(self.lstm(x)[1][0][-1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.h = nn.Embedding(9, 4), nn.Linear(4, 3)
        layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        with quiet():
            self.t = nn.TransformerEncoder(layer, 1)

    def encode(self, t):
        return self.t(self.e(t), src_key_padding_mask=t == 0)


@case(tokens)
class EncoderWithPadding(Encoder):
    def forward(self, t):
        return self.h(mean_over(self.encode(t), (t > 0).sum(1)))


@case(tokens)
class EncoderThatAveragesPadding(Encoder):
    """Its fast path, under no_grad, has zeros where the slow one has numbers."""

    def forward(self, t):
        return self.h(self.encode(t).mean(1))


@case(sequences)
class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(4, 2, 4, batch_first=True, norm_first=True)
        self.queries, self.t, self.h = nn.Embedding(3, 4), nn.TransformerDecoder(layer, 1), nn.Linear(4, 1)

    def forward(self, x):
        return self.h(self.t(self.queries.weight.expand(len(x), -1, -1), x)).squeeze(-1)


@case(padded)
class AttentionWithPadding(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 1, kdim=4, vdim=4, batch_first=True)
        self.h = nn.Linear(4, 3)

    def forward(self, x):
        mask, z = ~(x != 0).any(-1), x.transpose(0, 1)
        z = self.a(z, z, z, key_padding_mask=mask)[0].transpose(0, 1)
        return self.h(
            self.b(z, x, x, key_padding_mask=mask, need_weights=False)[0].masked_fill(mask[..., None], 0).sum(1)
        )


@case(padded)
class ScaledDotProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.h = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), 5, 3, 2, 2).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, (x != 0).any(-1)[:, None, None])
        return self.h(z.transpose(1, 2).flatten(2).tanh().mean(1))


@case(images)
class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        down = nn.Sequential(nn.Conv2d(2, 4, 1, 2, bias=False), nn.BatchNorm2d(4))
        self.block = torchvision.models.resnet.BasicBlock(2, 4, 2, down)
        self.se, self.h = torchvision.ops.SqueezeExcitation(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.h(self.se(self.block(x)).mean((2, 3)))


@case(images)
def inverted_residual() -> nn.Module:
    conf = torchvision.models.mobilenetv3.InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1.0)
    block = torchvision.models.mobilenetv3.InvertedResidual(conf, nn.BatchNorm2d)
    return head(nn.Conv2d(2, 8, 3, 2), block, nn.AdaptiveAvgPool2d(1), width=8)


@case(images)
def dense_block() -> nn.Module:
    block = torchvision.models.densenet._DenseBlock(2, 2, 2, 2, 0.1)
    return head(block, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), width=6)


@case(images)
def timm_convnext() -> nn.Module:
    return ConvNeXt(2, 3, depths=(1, 1, 1, 1), dims=(4, 4, 6, 6), patch_size=1, drop_path_rate=0.2)


@case(images)
def timm_mobilenet_block() -> nn.Module:
    block = timm.models._efficientnet_blocks.InvertedResidual(4, 4, se_layer=timm.layers.SqueezeExcite)
    return head(nn.Conv2d(2, 4, 3, 2), block, nn.AdaptiveAvgPool2d(1), width=4)


# What is written in a forward pass -----------------------------------------------------------------------------------


@case(vectors)
class CountsInPlace(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@case(vectors)
class CountsByAssignment(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.steps = 0

    def forward(self, x):
        self.calls, self.steps = self.calls + 1, self.steps + 1
        return super().forward(x)


@case(images)
class NormCountsBatches(ConvNet):
    def forward(self, x):
        self.m.num_batches_tracked.add_(len(x))
        return super().forward(x)


@case(vectors)
class RunningMeanOfActivations(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(6))

    def forward(self, x):
        z = self.f(x).tanh()
        self.ema.lerp_(z.detach().mean(0), 0.1)
        return self.h(self.g(z).tanh())


@case(sequences)
class CachesMasks(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None, persistent=False)
        self.tables = {}

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
        table = self.tables.setdefault((x.shape[1], x.dtype), torch.arange(x.shape[1]).to(x).cos())
        return self.h(self.g((self.f(x) * (self.mask + table).unsqueeze(1)).tanh()).mean(1))


@case(vectors)
class KeepsWhatItSaw(Net):
    def __init__(self):
        super().__init__()
        self.history, self.last = [], None

    def forward(self, x):
        self.last = self.f(x).tanh()
        self.history.append(self.last)
        return self.h(self.g(self.last).tanh())


@case(vectors)
class CachedProperty(Net):
    @functools.cached_property
    def mask(self):
        return torch.linspace(0, 1, 6, dtype=torch.float64)

    def forward(self, x):
        return self.h((self.g(self.f(x).tanh()) * self.mask).tanh())


@case(vectors)
class CachedMethod(Net):
    def __init__(self):
        super().__init__()
        self.grid = functools.lru_cache(self._grid)

    def _grid(self, size):
        return torch.linspace(0, 1, size, dtype=torch.float64)

    def forward(self, x):
        return self.h((self.g(self.f(x).tanh()) * self.grid(6)).tanh())


@case(vectors)
class ClampsItsParameter(Net):
    def forward(self, x):
        with torch.no_grad():
            self.g.weight.clamp_(min=0)
        return super().forward(x)


@case(vectors)
class NormalisesItsWeight(Net):
    def forward(self, x):
        self.g.weight.data = F.normalize(self.g.weight.data, dim=1)
        return super().forward(x)


@case(vectors)
class MetricInside(Net):
    def __init__(self):
        super().__init__()
        self.size = torchmetrics.MeanMetric()

    def forward(self, x):
        out = super().forward(x)
        self.size.update(out.detach())
        return out


@case(vectors)
class FreezesInForward(Net):
    def forward(self, x):
        for parameter in self.f.parameters():
            parameter.requires_grad_(True)
        self.g.train(False)
        return super().forward(x)


# Compiled, scripted, traced, generated -------------------------------------------------------------------------------


def _body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())


@case(vectors)
def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(_body()), nn.Linear(6, 3))


@case(vectors)
def traced() -> nn.Module:
    return nn.Sequential(torch.jit.trace(_body().double(), vectors(2)), nn.Linear(6, 3))


@case(vectors)
def compiled_within() -> nn.Module:
    return nn.Sequential(torch.compile(_body(), backend="eager"), nn.Linear(6, 3))


@case(images)
def compiled() -> nn.Module:
    return torch.compile(ConvNet(), backend="eager")


@case(vectors)
def compiled_in_place() -> nn.Module:
    model = Net()
    model.g.compile(backend="eager")
    return model


@case(vectors)
def graph_module() -> nn.Module:
    return torch.fx.symbolic_trace(Net())


@case(images)
def exported() -> nn.Module:
    model = ConvNet().double().eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    module = torch.export.export(model, (images(4),), dynamic_shapes=({0: batch},)).module()
    module.train = module.eval = lambda mode=True: module  # it refuses to be set to a mode
    return module


@case(vectors)
class CallsItselfFunctionally(Net):
    def forward(self, x):
        weights = {"weight": self.g.weight * 2, "bias": self.g.bias}
        return self.h(functional_call(self.g, weights, self.f(x).tanh()).tanh())


@case(vectors)
class StackedEnsemble(nn.Module):
    def __init__(self):
        super().__init__()
        stacked = stack_module_state([Net() for _ in range(3)])[0]
        self.weights = nn.ParameterDict({name.replace(".", "_"): value for name, value in stacked.items()})
        self.skeleton = [Net().to("meta")]

    def forward(self, x):
        weights = {name.replace("_", "."): value for name, value in self.weights.items()}
        run = torch.vmap(lambda w: functional_call(self.skeleton[0], w, x))
        return run(weights).mean(0)


@case(vectors)
class GradientInside(Net):
    """The outputs have the derivative of an energy in them."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.g(self.f(x).tanh()).tanh().sum()
            return self.h(F.pad(torch.autograd.grad(energy, x, create_graph=True)[0], (0, 2)))


class Link(nn.Module):
    def __init__(self, rest: nn.Module):
        super().__init__()
        self.layer, self.rest = nn.Tanh(), rest

    def forward(self, x):
        return self.rest(self.layer(x) + x)


@case(vectors)
def deeply_nested() -> nn.Module:
    chain: nn.Module = nn.Linear(4, 3)
    for _ in range(150):
        chain = Link(chain)
    return nn.Sequential(nn.Linear(4, 4), chain)


# Outputs -------------------------------------------------------------------------------------------------------------


@case(vectors, likelihood="regression")
class SqueezedToNothing(Net):
    def __init__(self):
        super().__init__()
        self.h = nn.Linear(6, 1)

    def forward(self, x):
        return super().forward(x).squeeze()


@case(vectors, likelihood="binary")
class SqueezedLastAxis(Net):
    def __init__(self):
        super().__init__()
        self.h = nn.Linear(6, 1)

    def forward(self, x):
        return super().forward(x).squeeze(-1)


@case(vectors)
class SqueezedSample(Net):
    def forward(self, x):
        return super().forward(x).squeeze()


@case(vectors, forward=lambda model, x: model(x)["logits"])
class DictOfOutputs(Net):
    def forward(self, x):
        return {"logits": (z := super().forward(x)), "probs": z.softmax(1)}


@case(vectors, forward=lambda model, x: model(x)[0])
class TupleOfOutputs(Net):
    def forward(self, x):
        return super().forward(x), self.f(x)


Output = namedtuple("Output", ["loss", "logits"])


@case(vectors)
class OutputsWithLogits(Net):
    def forward(self, x):
        return Output(None, super().forward(x))


@case(vectors, forward=lambda model, x: model.score(x))
class AnotherMethod(Net):
    def score(self, x):
        return self.h(self.f(x).tanh())

    def forward(self, x):
        raise AssertionError("not what was asked for")


@case(images)
def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))


@case(sequences)
class OutputsOfEachToken(Net):
    pass


# Inputs of all kinds -------------------------------------------------------------------------------------------------


@case(lambda count: {"x": vectors(count), "scale": torch.tensor(2.0), "name": "some", "none": None})
class DictWithConstants(Net):
    def forward(self, batch):
        return super().forward(batch["x"] * batch["scale"])


@case(lambda count: {"a": {"x": vectors(count)}, "b": [tokens(count)]})
class NestedInputs(Net):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(9, 6)

    def forward(self, batch):
        return self.h(self.f(batch["a"]["x"]).tanh() + self.e(batch["b"][0]).mean(1))


@case(lambda count: [vectors(count), vectors(count)])
class ListOfInputs(Net):
    def forward(self, both):
        return self.h(self.f(both[0]).tanh() * self.f(both[1]))


Pair = namedtuple("Pair", ["left", "right"])


@case(lambda count: Pair(vectors(count), vectors(count)))
class NamedTupleOfInputs(Net):
    def forward(self, both):
        return self.h(self.f(both.left).tanh() * self.f(both.right))


@dataclass
class Sample:
    x: Tensor
    length: Tensor
    note: str = "kept"


@case(lambda count: Sample(sequences(count), torch.randint(1, 6, (count,))))
class DataclassOfInputs(Net):
    def forward(self, sample):
        assert sample.note == "kept"
        return self.h(self.g(mean_over(self.f(sample.x).tanh(), sample.length)).tanh())


@case(lambda count: (vectors(count), torch.randint(2, (count,)).bool(), torch.rand(count) > 0.5))
class MixedTypes(Net):
    def forward(self, parts):
        x, a, b = parts
        return super().forward(x * (a ^ b).unsqueeze(1))


# Frozen parts, types, formats ----------------------------------------------------------------------------------------


@case(vectors)
class BackboneWithoutGradient(Net):
    def forward(self, x):
        with torch.no_grad():
            z = self.f(x).tanh()
        return self.h(self.g(z).tanh())


@case(vectors)
class Detached(Net):
    def forward(self, x):
        return self.h(self.g(self.f(x).tanh().detach()).tanh())


@case(images)
def frozen_backbone() -> nn.Module:
    model = ConvNet()
    model.a.requires_grad_(False)
    model.m.requires_grad_(False)
    return model


@case(images)
def frozen_bias_only() -> nn.Module:
    model = ConvNet()
    model.a.bias.requires_grad_(False)
    model.n.weight.requires_grad_(False)
    return model


@case(singles, dtype=torch.float32, tolerance=1e-4)
class SinglePrecision(Net):
    pass


@case(singles, dtype=torch.float32, tolerance=0.05)
class AutocastInside(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            z = self.g(self.f(x).tanh()).tanh()
        return self.h(z.float())


@case(singles, dtype=None, tolerance=1e-4)
class MixedPrecision(Net):
    def __init__(self):
        super().__init__()
        self.f.double()

    def forward(self, x):
        return self.h(self.g(self.f(x.double()).float().tanh()).tanh())


@case(lambda count: images(count).to(memory_format=torch.channels_last))
def channels_last() -> nn.Module:
    return ConvNet().to(memory_format=torch.channels_last)


# Modules that are hard to copy ---------------------------------------------------------------------------------------


@case(vectors)
class HasALock(Net):
    def __init__(self):
        super().__init__()
        self.lock = threading.RLock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


@case(vectors)
class HasAFile(Net):
    def __init__(self):
        super().__init__()
        self.file = io.TextIOWrapper(io.BytesIO())
        self.numbers = (i for i in range(9))
        self.local = threading.local()


@case(vectors)
class RefusesToBeCopied(Net):
    def __deepcopy__(self, memo):
        raise TypeError("there can be only one")

    def __reduce_ex__(self, protocol):
        raise TypeError("there can be only one")


@case(vectors)
class LightningLogs(pl.LightningModule):
    def __init__(self, width: int = 6):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.example_input_array = Net(), torch.zeros(1, 4)

    def forward(self, x):
        out = self.net(x)
        self.log("size", out.detach().abs().mean())
        return out


@case(vectors)
class Slots(Net):
    __slots__ = ("scale",)

    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def forward(self, x):
        return self.scale * super().forward(x)


@case(vectors)
class LooksInside(nn.Module):
    """Attributes that it does not have are those of the network within."""

    def __init__(self):
        super().__init__()
        self.module = Net()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x):
        return self.h(self.g(self.f(x).tanh()).tanh())


@case(vectors)
class RefusesToBeChanged(Net):
    def __init__(self):
        super().__init__()
        self.done = True

    def __setattr__(self, name, value):
        if "done" in self.__dict__ and name != "training":
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)


@case(images)
class StaysInEvalMode(ConvNet):
    def train(self, mode=True):
        super().train(mode)
        self.m.eval()
        return self


@case(vectors)
class OwnCall(Net):
    def __call__(self, x):
        return 2 * super().__call__(x)


@case(images)
def data_parallel() -> nn.Module:
    return nn.DataParallel(ConvNet())


@case(vectors)
def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Dropout(0.5), nn.LazyLinear(3))
    model(torch.zeros(2, 4))
    return model


@case(vectors)
class ParametersInContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lists = nn.ParameterList([torch.randn(4, 6), torch.randn(6)])
        self.dicts = nn.ParameterDict({"h": torch.randn(6, 3)})
        self.modules_of = nn.ModuleDict({"act": nn.ModuleList([nn.PReLU()])})

    def forward(self, x):
        return self.modules_of["act"][0](x @ self.lists[0] + self.lists[1]).tanh() @ self.dicts["h"]
