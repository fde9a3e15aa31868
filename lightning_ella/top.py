"""Many outputs, as a vocabulary: the k likeliest at each position, and all others as one class."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # the class index of a position that counts for nothing, as in torch's cross entropy


class Selection(NamedTuple):
    """Which of C outputs are kept at each position, and how the others become one.

    The others have the logit log Σ exp f, whose derivative is their mean under their own probabilities. So the softmax
    over k + 1 outputs has the network's own probabilities, and features that are exact to first order. Among
    themselves the others keep the network's probabilities, so that a whole distribution is left.

    A target is never put among those that are kept: chosen for being right, it would be told from the others by its
    variance, and calibration would find that the largest is best.
    """

    indices: Tensor  # (B, *, k)
    others: Tensor  # (B, *, C), log-probabilities among the others, −∞ for those that are kept

    @classmethod
    def of(cls, logits: Tensor, count: int) -> "Selection":
        """Choose the likeliest."""
        indices = logits.topk(min(count, logits.shape[-1] - 1)).indices
        return cls(indices, logits.scatter(-1, indices, -torch.inf).log_softmax(-1))

    def logits(self, logits: Tensor) -> Tensor:
        """(B, *, C) to (B, *, k + 1)."""
        rest = logits.scatter(-1, self.indices, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, self.indices), rest], -1)

    def products(self, products: Tensor) -> Tensor:
        """Products with the Jacobian, (B, *, C, t) to (B, *, k + 1, t)."""
        kept = products.gather(-2, self.indices.unsqueeze(-1).expand(*self.indices.shape, products.shape[-1]))
        return torch.cat([kept, self.others.exp().unsqueeze(-2).to(products) @ products], -2)

    def labels(self, targets: Tensor) -> Tensor:
        """Which of the k + 1 classes each target (B, *) is of; −100 stays."""
        found = self.indices == targets.unsqueeze(-1)
        places = torch.where(found.any(-1), found.int().argmax(-1), self.indices.shape[-1])
        return torch.where(targets == IGNORED, IGNORED, places)

    def log_prob_within(self, targets: Tensor) -> Tensor:
        """Log p(target | others) where it is one of them, else 0, (B, *)."""
        logs = self.others.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(logs.isfinite() & (targets != IGNORED), logs, 0)
