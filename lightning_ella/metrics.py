"""Metrics that torchmetrics does not have, and the set that is reported."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


class _MeanScore(Metric):
    """The mean of a score of each sample."""

    full_state_update = False
    higher_is_better = False
    is_differentiable = True
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, probs: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities (B, C) and class indices (B,)."""
        self.total += self.score(probs.double(), targets).sum()
        self.count += len(targets)

    def compute(self) -> Tensor:
        """The mean over all samples."""
        return (self.total / self.count).float()


class NegativeLogLikelihood(_MeanScore):
    """Mean −log p(target), nats; probabilities below 1e-38 count as that."""

    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        """−log p(target), (B,)."""
        tiny = torch.finfo(torch.float32).tiny
        return -probs.gather(1, targets.unsqueeze(1)).squeeze(1).clamp_min(tiny).log()


class BrierScore(_MeanScore):
    """Mean squared distance between the probabilities and the one-hot target, in [0, 2] (Brier 1950)."""

    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Σ_c (p_c − 1[c = target])², (B,)."""
        return (probs - torch.nn.functional.one_hot(targets, probs.shape[1])).square().sum(1)


def classification_metrics(num_classes: int, **options: Any) -> MetricCollection:
    """Accuracy, NLL, ECE (15 bins, top label) and Brier score of probabilities (B, C) and labels (B,).

    Args:
        num_classes: C.
        **options: of every Metric, as `sync_on_compute=False` where one process of several computes alone.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", **options),
            "nll": NegativeLogLikelihood(**options),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", **options),
            "brier": BrierScore(**options),
        },
        compute_groups=False,
    )
