"""From a batch's outputs, features and targets to rows: one for each position that counts, with its weight."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .augmentation import OneView, seen
from .batches import rows
from .data import Batch
from .engine import Linearization
from .familiarity import Judge
from .likelihoods import Likelihood
from .linearize import Basis
from .predictions import Gaussian, Outputs, mixed
from .top import without_channel

SAME = 1e-3  # of its outputs and features, that those of one sample may differ by in another batch


class Observations(NamedTuple):
    """What a likelihood is asked about: n rows with C outputs each."""

    logits: Tensor  # (n, C)
    features: Tensor  # (n, C, K)
    targets: Tensor  # (n,) or (n, C)
    weights: Tensor | None = None  # (n,), or all one
    samples: Tensor | None = None  # (n,), which sample each is a position of; or each row is one
    view_logits: Tensor | None = None  # (n, V, C), of other views of the same samples
    view_features: Tensor | None = None  # (n, V, C, K)
    foreign: Tensor | None = None  # (n, J), how foreign each sample looks, by each of J scores

    def rows(self, which: Tensor | slice) -> "Observations":
        """Some of them."""
        return Observations(*(None if part is None else part[which] for part in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Observations":
        """On a device."""
        return Observations(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def outputs(self, make: Callable[[Tensor, Tensor], Gaussian]) -> Outputs:
        """What `make` makes of outputs and features: of those of each view, if there are several."""
        parts = [make(self.logits, self.features)]
        if self.view_logits is not None and self.view_features is not None:
            parts += map(make, self.view_logits.unbind(1), self.view_features.unbind(1))
        return mixed(parts)

    @property
    def num_views(self) -> int:
        """Of each sample, with the one as it is."""
        return 1 if self.view_logits is None else 1 + self.view_logits.shape[1]


def joined(parts: Sequence[Observations]) -> Observations:
    """Rows of several, whose samples are others; at least one of `parts`."""
    samples, total = [], 0
    for part in parts:
        own = torch.arange(len(part.logits)) if part.samples is None else part.samples
        samples.append(own + total)
        total += int(own.max()) + 1 if len(own) else 0
    columns = zip(*(part._replace(samples=number) for part, number in zip(parts, samples, strict=True)), strict=True)
    return Observations(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def matched(some: Observations, all_of_them: Observations) -> Observations | None:
    """The rows of samples that are left when `some` are taken out; None where one of them is not there."""
    left, labels, numbers = _signatures(all_of_them)
    there = torch.ones(len(left), dtype=torch.bool)
    for signature, label in zip(*_signatures(some)[:2], strict=True):
        away = (left - signature).norm(dim=1).masked_fill(~there | ~labels.isclose(label, 1e-5, 1e-6).all(1), torch.inf)
        nearest = int(away.argmin())
        if not away[nearest] <= SAME * signature.norm():
            return None
        there[nearest] = False
    return all_of_them.rows(there[numbers])


def _signatures(points: Observations) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample outputs and features, and targets, summed over its positions; and which sample a row is of."""
    assert points.samples is not None
    assert points.weights is not None
    names, numbers = points.samples.unique(return_inverse=True)
    weights = points.weights.double().unsqueeze(1)
    logits, features = points.logits.double(), points.features.double().flatten(1)
    features = features * (logits.norm(dim=1) / features.norm(dim=1).clamp_min(1e-30)).unsqueeze(1)  # count as much
    targets = points.targets.double().flatten(1) if points.targets.ndim > 1 else points.targets.double().unsqueeze(1)
    seen, labels = torch.cat([logits, features], 1) * weights, torch.cat([weights, targets * weights], 1)
    seen, labels = (v.new_zeros(len(names), v.shape[1]).index_add_(0, numbers, v) for v in (seen, labels))
    return seen, labels, numbers


def observations(
    linearization: Linearization,
    likelihood: Likelihood,
    batch: Batch,
    basis: Basis,
    *,
    top: int | None = None,
    most: int | None = None,
    seeds: Sequence[int] = (),
    temperature: float = 1.0,
    views: Sequence[OneView] = (),
    judge: Judge | None = None,
    rank: int = 0,
) -> Iterator[Observations]:
    """Run the network over a batch: its rows, of so many samples at a time as the memory budget allows.

    Args:
        linearization: of the network.
        likelihood: says which targets count.
        batch: inputs, targets as the loader gives them, and weights or None.
        basis: what features are along.
        top: how many outputs are kept at each position, the others as one; None keeps all.
        most: rows to keep of each sample, drawn at random; None keeps all.
        seeds: of the choice, one for each sample.
        temperature: at which the outputs that `top` does not keep are put together.
        views: through which the inputs are looked at as well.
        judge: says how foreign samples look, where each has one row.
        rank: K, of the K + m columns of the basis, which it asks for.
    """
    inputs, targets, weights = batch
    for part in linearization.affordable(inputs, (1 + len(views)) * len(next(iter(basis.values())))):
        looks = [
            linearization.look(seen(rows(inputs, part), view), basis, top, temperature=temperature)
            for view in (None, *views)
        ]
        logits, features, kept = looks[0]
        labels = targets[part]
        if kept is not None:
            labels = kept.labels(checked(likelihood, _as_whole(logits, linearization), labels, linearization.axis))
        some = None if weights is None else weights[part]
        found = observe(likelihood, logits, features, labels, some, linearization.axis, most, seeds[part])
        if views:  # of one row of outputs a sample
            others = (torch.stack(each, 1)[found.samples] for each in list(zip(*looks[1:], strict=True))[:2])
            found = found._replace(**dict(zip(("view_logits", "view_features"), others, strict=True)))
        if judge is not None:
            foreign = judge(linearization, rows(inputs, part), [along for _, along, _ in looks], rank)
            found = found._replace(foreign=foreign[found.samples])
        yield found


def _as_whole(logits: Tensor, linearization: Linearization) -> Tensor:
    """Something in the shape of all outputs, (B, *, C), where some are kept, (B, *, k + 1)."""
    shape, axis = linearization.network.output_shape, linearization.axis
    assert shape is not None
    assert axis is not None  # of several classes
    return logits[..., :1].expand(*logits.shape[:-1], shape[axis if axis < 0 else axis - 1])


def checked(likelihood: Likelihood, outputs: Tensor, targets: Tensor, axis: int | None) -> Tensor:
    """Targets as they come from the loader, (B, …), to those of outputs (B, *, C)."""
    if likelihood.per_output and axis is not None and targets.ndim == outputs.ndim:
        targets = targets.movedim(axis, -1)
    return likelihood.check(outputs, targets)


def weights_of(likelihood: Likelihood, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The weight of each position, (*), from checked targets: zero where there is nothing to see.

    Raises:
        ValueError: if weights do not belong to samples or positions, or are negative, or if a target that counts is not
            finite.
    """
    seen = likelihood.observed(targets)
    weights = seen.float() if weights is None else _spread(weights, seen)
    if likelihood.per_output and not targets[weights > 0].isfinite().all():
        raise ValueError(
            "likelihood= needs finite targets, but some are NaN or infinite: leave those points out, or give them the "
            "weight 0."
        )
    return weights


def _spread(weights: Tensor, seen: Tensor) -> Tensor:
    """Weights of samples or positions to all positions (*)."""
    weights = without_channel(weights, seen.shape)
    if weights.shape != seen.shape[: weights.ndim] or (
        len(weights) and not (weights.min() >= 0 and weights.max() < torch.inf)
    ):
        raise ValueError(
            f"weights of the shape {tuple(weights.shape)} do not belong to {tuple(seen.shape)} targets, or are "
            "negative or infinite: let unpack= return (inputs, targets, weights), one of at least 0 for each sample or "
            "position."
        )
    return weights.view(*weights.shape, *[1] * (seen.ndim - weights.ndim)) * seen.float()


def observe(
    likelihood: Likelihood,
    outputs: Tensor,
    features: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    axis: int | None,
    most: int | None = None,
    seeds: Sequence[int] = (),
) -> Observations:
    """Rows of a batch.

    Args:
        likelihood: says which targets count.
        outputs: (B, *, C).
        features: (B, *, C, K).
        targets: as the loader gives them.
        weights: (B,), or one for each position (B, *).
        axis: where the network's outputs have their C.
        most: rows to keep of each sample, drawn at random; None keeps all.
        seeds: of the choice, one for each sample.
    """
    targets = checked(likelihood, outputs, targets, axis)
    weights = weights_of(likelihood, targets, weights)
    positions = weights[0].numel()
    if most is not None and most < positions:
        drawn = [torch.rand(positions, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        order = torch.stack(drawn).to(weights.device)
        order = order.masked_fill(weights.flatten(1) == 0, -1)  # those that count come first
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order.topk(most).indices, True)
        weights = weights * chosen.view_as(weights)
    kept = weights > 0
    samples = kept.nonzero()[:, 0]
    return Observations(outputs[kept], features[kept], targets[kept], weights[kept], samples)
