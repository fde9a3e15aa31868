"""From a batch's outputs, features and targets to rows: one for each position that counts, with its weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from .likelihoods import Likelihood


class Observations(NamedTuple):
    """What a likelihood is asked about: n rows with C outputs each."""

    logits: Tensor  # (n, C)
    features: Tensor  # (n, C, K)
    targets: Tensor  # (n,) or (n, C)
    weights: Tensor | None = None  # (n,), or all one

    def rows(self, which: Tensor | slice) -> "Observations":
        """Some of them."""
        weights = None if self.weights is None else self.weights[which]
        return Observations(self.logits[which], self.features[which], self.targets[which], weights)


def checked(likelihood: Likelihood, outputs: Tensor, targets: Tensor, axis: int | None) -> Tensor:
    """Targets as they come from the loader, (B, …), to those of outputs (B, *, C)."""
    if likelihood.per_output and axis is not None and targets.ndim == outputs.ndim:
        targets = targets.movedim(axis, -1)
    return likelihood.check(outputs, targets)


def weights_of(likelihood: Likelihood, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The weight of each position, (*), from checked targets: zero where there is nothing to see.

    Raises:
        ValueError: if weights do not belong to samples or positions, or are negative.
    """
    seen = likelihood.observed(targets)
    if weights is None:
        return seen.float()
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
    generator: torch.Generator | None = None,
) -> Observations:
    """Rows of a batch.

    Args:
        likelihood: says which targets count.
        outputs: (B, *, C).
        features: (B, *, C, K).
        targets: as the loader gives them.
        weights: (B,), or one for each position (B, *).
        axis: where the network's outputs have their C.
        most: rows to keep of each sample, drawn with `generator`; None keeps all.
        generator: of the choice.
    """
    targets = checked(likelihood, outputs, targets, axis)
    weights = weights_of(likelihood, targets, weights)
    positions = weights[0].numel()
    if most is not None and most < positions:
        order = torch.rand(len(weights), positions, generator=generator).to(weights.device)
        order = order.masked_fill(weights.flatten(1) == 0, -1)  # those that count come first
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order.topk(most).indices, True)
        weights = weights * chosen.view_as(weights)
    kept = weights > 0
    return Observations(outputs[kept], features[kept], targets[kept], weights[kept])
