"""Many outputs, as a vocabulary: the k likeliest at each position, and all others as one class."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

TEMPERATURES = [2 ** (i / 4) for i in range(-4, 13)]  # that the others may have
IGNORED = -100  # the class index of a position that counts for nothing, as in torch's cross entropy


class Selection(NamedTuple):
    """Which of C outputs are kept at each position, and how the others become one.

    At the temperature T the others have the logit T log Σ exp(f / T), whose derivative is their mean under their own
    probabilities. So the softmax of the k + 1 outputs, divided by T, has the network's own probabilities at T, and the
    features are exact to first order. Among themselves the others keep the network's probabilities, so that a whole
    distribution is left.

    A target is never put among those that are kept: chosen for being right, it would be told from the others by its
    variance, and calibration would find that the largest is best.
    """

    indices: Tensor  # (B, *, k)
    others: Tensor  # (B, *, C), log-probabilities among the others, −∞ for those that are kept
    temperature: float = 1.0  # T

    @classmethod
    def of(cls, logits: Tensor, count: int, temperature: float = 1.0) -> "Selection":
        """Choose the likeliest."""
        indices = logits.topk(min(count, logits.shape[-1] - 1)).indices
        return cls(indices, (logits / temperature).scatter(-1, indices, -torch.inf).log_softmax(-1), temperature)

    def logits(self, logits: Tensor) -> Tensor:
        """(B, *, C) to (B, *, k + 1)."""
        tempered = (logits / self.temperature).scatter(-1, self.indices, -torch.inf)
        rest = self.temperature * tempered.logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, self.indices), rest], -1)

    def differences(self) -> Tensor:
        """What the C outputs are multiplied with for the derivatives of k minus that of the last, (B, k, C)."""
        return one_hot(self.indices, self.others.shape[-1]).to(self.others) - self.others.exp().unsqueeze(-2)

    def products(self, products: Tensor) -> Tensor:
        """Products with the Jacobian, (B, *, C, t) to (B, *, k + 1, t)."""
        kept = products.gather(-2, self.indices.unsqueeze(-1).expand(*self.indices.shape, products.shape[-1]))
        return torch.cat([kept, self.others.exp().unsqueeze(-2).to(products) @ products], -2)

    def labels(self, targets: Tensor) -> Tensor:
        """Which of the k + 1 classes each target (B, *) is of; −100 stays."""
        targets = without_channel(targets, self.indices.shape[:-1])
        found = self.indices == targets.unsqueeze(-1)
        places = torch.where(found.any(-1), found.int().argmax(-1), self.indices.shape[-1])
        return torch.where(targets == IGNORED, IGNORED, places)

    def log_prob_within(self, targets: Tensor) -> Tensor:
        """Log p(target | others) where it is one of them, else 0, (B, *)."""
        targets = without_channel(targets, self.indices.shape[:-1])
        logs = self.others.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(logs.isfinite() & (targets != IGNORED), logs, 0)


def without_channel(targets: Tensor, shape: torch.Size) -> Tensor:
    """Targets or weights of `shape` (B, *) that come as (B, 1, *) or (B, *, 1); others as they are."""
    if targets.ndim == len(shape) + 1:
        for axis in (1, -1):
            if targets.shape[axis] == 1 and targets.squeeze(axis).shape == shape:
                return targets.squeeze(axis)
    return targets


def sharpness(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Summed −log p of the targets (*), by their weights (*), at each of `TEMPERATURES`, from logits (*, C)."""
    counts = weights > 0
    flat, known, weights = logits[counts], targets[counts], weights[counts].to(logits)
    losses = (cross_entropy(flat / t, known, ignore_index=IGNORED, reduction="none") for t in TEMPERATURES)
    return torch.stack([weights @ loss for loss in losses])
