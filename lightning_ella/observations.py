"""From a batch's outputs, features and targets to rows: one for each position that counts, with its weight."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batches import rows
from .data import Batch
from .engine import Linearization
from .likelihoods import Likelihood
from .linearize import Basis
from .top import without_channel


class Observations(NamedTuple):
    """What a likelihood is asked about: n rows with C outputs each."""

    logits: Tensor  # (n, C)
    features: Tensor  # (n, C, K)
    targets: Tensor  # (n,) or (n, C)
    weights: Tensor | None = None  # (n,), or all one

    def rows(self, which: Tensor | slice) -> "Observations":
        """Some of them."""
        return Observations(*(None if part is None else part[which] for part in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Observations":
        """On a device."""
        return Observations(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]


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
    """
    inputs, targets, weights = batch
    for part in linearization.affordable(inputs, len(next(iter(basis.values())))):
        logits, features, kept = linearization.look(rows(inputs, part), basis, top, temperature=temperature)
        labels = targets[part]
        if kept is not None:
            labels = kept.labels(checked(likelihood, _as_whole(logits, linearization), labels, linearization.axis))
        some = None if weights is None else weights[part]
        yield observe(likelihood, logits, features, labels, some, linearization.axis, most, seeds[part])


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
    if weights.shape != seen.shape[: weights.ndim] or (len(weights) and not weights.min() >= 0):
        raise ValueError(
            f"weights of the shape {tuple(weights.shape)} do not belong to {tuple(seen.shape)} targets, or are "
            "negative: let unpack= return (inputs, targets, weights), one of at least 0 for each sample or position."
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
    return Observations(outputs[kept], features[kept], targets[kept], weights[kept])
