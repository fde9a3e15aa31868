"""What a network thinks on the way to its outputs: activations at a few places, pooled over positions."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map

from .batches import Inputs, Picked, num_samples, rows
from .folding import StaleError, find_folding
from .linearize import Network, hooked

ENOUGH = 6  # places: modules are opened until there are as many
WIDEST = 4096  # channels that a place may have: those of an image laid flat are no summary
MOST = 8  # places that are looked at; of more, as many at equal distances
ROUNDING = 1e-4  # of the mean: a standard deviation below it is one of rounding
TINY = 1e-30  # beside a variance
SAME = 1e-3  # of the largest, that pooled activations of a sample may differ by in another batch
Layers = str | Collection[str] | None


class Place(NamedTuple):
    """A tensor that a module puts out, and which axes of it are what."""

    module: str
    leaf: int  # which tensor of the output it is
    batch: int  # the axis of the samples
    channel: int  # and of the channels; all others are positions
    width: int  # channels
    positions: bool  # whether there are any

    @classmethod
    def checked(cls, module: str, leaf: int, batch: int, channel: int, width: int, positions: bool) -> "Place":
        """One as it is in a file.

        Raises:
            ValueError: if it is none.
        """
        numbers = leaf, batch, channel, width
        if not all(isinstance(number, int) and 0 <= number < 2**20 for number in numbers):
            raise ValueError(f"no place: {module}, {numbers}")
        return cls(str(module), *numbers, positions=bool(positions))


def pooled_width(places: Sequence[Place]) -> int:
    """A: a mean for each channel, and a standard deviation where there are positions."""
    return sum(place.width * (1 + place.positions) for place in places)


def both(places: Sequence[Place], others: Sequence[Place]) -> list[Place]:
    """Each once."""
    return [*dict.fromkeys([*places, *others])]


def chosen(pooled: Tensor, some: Sequence[Place], places: Sequence[Place]) -> Tensor:
    """Of the pooled activations of `places`, (B, A), those of some of them."""
    if list(some) == list(places):
        return pooled
    owners = [(place, False) for place in places] + [(place, True) for place in places if place.positions]
    wanted = [(place, False) for place in some] + [(place, True) for place in some if place.positions]
    parts = dict(zip(owners, pooled.split([place.width for place, _ in owners], 1), strict=True))
    return torch.cat([pooled[:, :0], *(parts[owner] for owner in wanted)], 1)


class Recorder:
    """Evaluates a network once, and keeps what its modules put out at some places.

    Args:
        network: the network, settled, whose view is this recorder's own.
        places: where.
        needed: those of them that must be called with all inputs; all by default. Others are then NaN.

    `num_folded` BatchNorms are done by the convolutions before them.
    """

    def __init__(self, network: Network, places: Sequence[Place], needed: Collection[Place] | None = None):
        self.network, self.places = network, list(places)
        self.needed = places if needed is None else needed
        modules = dict(network.view.root.named_modules())
        self._kept: dict[str, Any] = {}
        self._folded, self.num_folded = ExitStack(), 0
        self._refused: list[str] = []  # uses of what is folded that were refused
        for name in dict.fromkeys(place.module for place in places):
            modules[name].register_forward_hook(partial(self._keep, name))

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Outputs (B, D), and the pooled activations of all places, (B, A).

        Raises:
            ValueError: if a module that is needed was not called.
        """
        self._kept.clear()
        try:
            outputs = self.network.own(inputs)
            pooled = self.pooled(inputs, outputs)
        except StaleError:  # these inputs go another way
            if not self.num_folded:
                raise
            return self._unfold()(inputs)
        self._kept.clear()
        if self.num_folded and (self._refused or (outputs.sum() + pooled.sum()).isnan()):
            return self._unfold()(inputs)
        return outputs, pooled

    def _unfold(self) -> "Recorder":
        self._folded.close()
        self.num_folded, self._refused = 0, []
        return self

    def fold(self, inputs: Inputs) -> "Recorder":
        """Let convolutions do the work of the BatchNorms after them, where these inputs show that they can."""
        few = rows(inputs, slice(0, 2))
        expected = self(few)
        folding = find_folding(self.network, few, frozenset(self.network.names.values()))
        self._refused = self._folded.enter_context(folding.fused(self.network))
        self.num_folded = len(folding.pairs)
        # Not all uses can be seen, as those in what is compiled, but that the numbers are the same can.
        return self if all(map(_same, expected, self(few))) else self._unfold()

    def pooled(self, inputs: Inputs, outputs: Tensor) -> Tensor:
        """Those of the last evaluation, which was with these inputs."""
        return _pooled(self.places, self._kept, inputs, outputs, self.needed)

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._kept[name] = output


def record(network: Network, places: Sequence[Place], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs (B, D) and pooled activations (B, A) of a network that nobody else records.

    NaN at a place that is not called with all of these inputs: what is for some may not be for others.
    """
    modules, wanted = dict(network.view.root.named_modules()), {place.module for place in places}
    with keeping({name: module for name, module in modules.items() if name in wanted}) as kept:
        outputs = network.own(inputs)
    return outputs, _pooled(places, kept, inputs, outputs)


def _pooled(
    places: Sequence[Place], kept: Mapping[str, Any], inputs: Inputs, outputs: Tensor, needed: Collection[Place] = ()
) -> Tensor:
    """Means over the positions of all places, and then standard deviations, (B, A).

    Raises:
        ValueError: if the network did not call one of those that are needed with all inputs.
    """
    mask, nothing, means, deviations = mask_of(inputs), outputs[:, :0], [], []
    for place in places:
        mean, variance = _moments(place, kept[place.module], mask) if place.module in kept else (nothing, nothing)
        if mean.shape != (outputs.shape[0], place.width):
            if place in needed:
                raise ValueError(f"the network does not call {place.module} for all inputs: pass layers= without it.")
            mean = variance = outputs.new_full((outputs.shape[0], place.width), torch.nan)
        means.append(mean)
        if place.positions and variance is not None:
            deviations.append((mean, variance))
    pooled = torch.cat([nothing, *means], 1)
    if not deviations:
        return pooled
    own, variances = (torch.cat(parts, 1) for parts in zip(*deviations, strict=True))
    return torch.cat([pooled, torch.where(variances < (ROUNDING * own).square(), 0, variances).sqrt()], 1)


@contextmanager
def keeping(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Keep the output of each module, by name; of one that is called several times, the last."""
    kept: dict[str, Any] = {}
    names = {module: name for name, module in modules.items()}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        kept[names[module]] = output

    with hooked(modules.values(), keep):
        yield kept


def find_places(network: Network, inputs: Inputs, layers: Layers = None) -> list[Place]:
    """Where to look: the outputs of the modules in the network, opened one level after another until they are enough.

    So it is stem and stages of a ResNet, the blocks of a transformer, the layers of a small network.

    Args:
        network: the network.
        inputs: two samples or more.
        layers: names or patterns of modules, if others are wanted.

    Raises:
        ValueError: if there are no such modules, or if none puts out a tensor with samples.
    """
    if isinstance(inputs, Picked) or num_samples(inputs) < 2:
        raise ValueError("samples cannot be told apart in such inputs, so there is nothing to learn of each of them.")
    modules = dict(network.view.root.named_modules())
    wanted = modules if layers is None else _named(modules, layers)
    seen = _seen(network, wanted, inputs)
    if layers is None:
        level = _opened(network.view.root, {place.module: tensor.data_ptr() for place, tensor in seen.items()})
        seen = {place: tensor for place, tensor in seen.items() if place.module in level}
    places = list({tensor.data_ptr(): place for place, tensor in reversed(seen.items())}.values())[::-1]  # each once
    if layers is None and len(places) > MOST:
        places = [places[round(i * (len(places) - 1) / (MOST - 1))] for i in range(MOST)]
    if not places and layers is not None:
        raise ValueError(f"layers={layers!r} chooses modules that put out no tensor with a row for each sample.")
    return places


def mask_of(inputs: Inputs) -> Tensor | None:
    """Which positions count, (B, L): the `attention_mask` of Hugging Face."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _named(modules: Mapping[str, nn.Module], layers: str | Collection[str]) -> dict[str, nn.Module]:
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            some = ", ".join(name for name in list(modules)[1:6])
            raise ValueError(f"layers={pattern!r} chooses none of the network's modules ({some}, …).")
    return {name: module for name, module in modules.items() if any(fnmatchcase(name, p) for p in patterns)}


def _seen(network: Network, modules: Mapping[str, nn.Module], inputs: Inputs) -> dict[Place, Tensor]:
    """Every tensor with a row for each sample, in the order in which modules end, but for the network's outputs.

    The rows must be those of the samples: with fewer of them, in another order, and alone.
    """
    count = num_samples(inputs)
    orders = torch.arange(count), torch.arange(count - 1), torch.arange(count).flip(0), torch.tensor([count // 2])
    looks, outputs, asked = [], [], [rows(inputs, order) for order in orders]
    for some in asked:
        with keeping(modules) as kept:
            outputs.append(network.own(some))
        looks.append(kept)
    given = {leaf.data_ptr() for leaf in tree_leaves(asked[0]) if isinstance(leaf, Tensor)}
    found = {}
    for name in looks[0]:
        for leaf, several in enumerate(zip(*(tree_leaves(look.get(name)) for look in looks), strict=False)):
            place = _place(name, leaf, modules[name], several, orders)
            if place is None or several[0].data_ptr() in given | {outputs[0].data_ptr()}:
                continue
            pairs = zip(looks, asked, strict=True)
            means = [_moments(place, look[name], mask_of(some))[0] for look, some in pairs]
            if all(_same(means[0][order], each) for order, each in zip(orders, means, strict=True)):
                found[place] = several[0]
    moved = _moved_by_padding(network, found, inputs)
    return {place: tensor for place, tensor in found.items() if place not in moved}


def _moved_by_padding(network: Network, places: Collection[Place], inputs: Inputs) -> set[Place]:
    """Places that tell how far token ids (B, L) are padded, in a network whose outputs do not, and without a mask."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if len(leaves) != 1 or leaves[0].is_floating_point() or leaves[0].ndim != 2 or mask_of(inputs) is not None:
        return set()
    longer = tree_map(lambda leaf: pad(leaf, (0, leaf.shape[1])) if isinstance(leaf, Tensor) else leaf, inputs)
    try:
        plain, padded = (record(network, [*places], each) for each in (inputs, longer))
    except Exception:  # it takes no others
        return set()
    if not _same(plain[0], padded[0]):
        return set()
    return {
        place for place in places if not _same(*(chosen(pooled, [place], [*places]) for _, pooled in (plain, padded)))
    }


def _place(name: str, leaf: int, module: nn.Module, several: Sequence[Any], orders: Sequence[Tensor]) -> Place | None:
    """Where a tensor has its samples and channels, from what it is for so many of them; None if it has no samples."""
    first = several[0]
    if not all(map(_is_plain, several)) or first.ndim < 2 or not first.numel():
        return None
    counts = [len(order) for order in orders]
    lengths = [[one.shape[axis] if axis < one.ndim else -1 for one in several] for axis in range(first.ndim)]
    if lengths.count(counts) != 1:
        return None
    batch = lengths.index(counts)
    channel = _channel_axis(module, first, batch)
    if first.shape[channel] > WIDEST:
        return None
    return Place(name, leaf, batch, channel, first.shape[channel], positions=first.ndim > 2)


def _is_plain(leaf: Any) -> bool:
    is_dense = isinstance(leaf, Tensor) and not leaf.is_nested and leaf.layout == torch.strided
    return is_dense and leaf.is_floating_point()


def _same(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or not expected.numel():
        return expected.shape == found.shape
    return bool((expected - found).abs().max() <= SAME * expected.abs().max())


def _channel_axis(module: nn.Module, output: Tensor, batch: int) -> int:
    """The axis that is as long as the module's last bias; or the first of four and more axes, the last of fewer."""
    vectors = [len(parameter) for parameter in module.parameters() if parameter.ndim == 1]
    others = [axis for axis in range(output.ndim) if axis != batch]
    usual = others[0] if output.ndim > 3 else others[-1]
    if vectors and output.shape[usual] != vectors[-1]:
        return next((axis for axis in others if output.shape[axis] == vectors[-1]), usual)
    return usual


def _opened(root: nn.Module, usable: Mapping[str, int]) -> set[str]:
    """Names of modules, none within another, that together put out enough tensors; a level deeper until they do."""
    level = {"": root}
    while True:
        deeper: dict[str, nn.Module] = {}
        for name, module in level.items():
            children = {f"{name}.{child}".lstrip("."): part for child, part in module.named_children()}
            inside = [each for each in usable if each != name and each.startswith(f"{name}." if name else "")]
            deeper |= children if children and inside else {name: module}
        here = usable.keys() & level.keys()
        if deeper.keys() == level.keys() or len({usable[name] for name in here}) >= ENOUGH:
            return here
        level = deeper


def _moments(place: Place, output: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mean and variance of one place, (B, width) each.

    `torch.var` is thirty times slower on a CPU than what normalises groups, here channels, and tells their moments.
    """
    values = tree_leaves(output)[place.leaf]
    if place.positions and (place.batch, place.channel) == (0, 1) and mask is None:
        b, c = values.shape[:2]
        flat = values.flatten(2)  # (B, C, positions)
        _, mean, deviation = torch.native_group_norm(flat, None, None, b, c, flat.shape[2], c, TINY)
        return mean, deviation.reciprocal().square()
    values = values.movedim((place.batch, place.channel), (0, -1))  # (B, *, C)
    if not place.positions:
        return values, None
    if mask is not None and values.ndim == 3 and mask.shape[1] == values.shape[1]:
        weights = mask.to(values).unsqueeze(-1)  # (B, L, 1)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        mean = (weights * values).sum(1, keepdim=True)
        return mean.squeeze(1), (weights * (values - mean).square()).sum(1)
    positions = tuple(range(1, values.ndim - 1))
    mean = values.mean(positions, keepdim=True)
    return mean.flatten(1), (values - mean).square().mean(positions)
