"""Metrics that torchmetrics does not have, and the set that is reported."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryCalibrationError,
    MulticlassAccuracy,
    MulticlassCalibrationError,
)
from torchmetrics.utilities import dim_zero_cat

from .predictions import entropy


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


class Entropy(_MeanScore):
    """Mean entropy of the probabilities, nats: the total uncertainty."""

    higher_is_better = None

    def update(self, probs: Tensor, targets: Tensor | None = None) -> None:
        """Add a batch: probabilities (B, C)."""
        self.total += entropy(probs.double()).sum()
        self.count += len(probs)


class MutualInformation(_MeanScore):
    """Mean of H(E[p]) − E[H(p)] over draws of the network, nats: the epistemic uncertainty (Houlsby et al. 2011)."""

    higher_is_better = None

    def update(self, probs: Tensor, targets: Tensor | None = None) -> None:
        """Add a batch: probabilities (S, B, C) of S draws, as of `predictor.sample_functions(S)`."""
        draws = probs.double()
        self.total += (entropy(draws.mean(0)) - entropy(draws).mean(0)).sum()
        self.count += probs.shape[1]


class _Collected(Metric):
    """A figure of all samples at once: what `update` appends to the named lists is gathered over the processes."""

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, *lists: str, **kwargs: Any):
        super().__init__(**kwargs)
        for name in lists:
            self.add_state(name, [], dist_reduce_fx="cat")


class AdaptiveCalibrationError(_Collected):
    """Mean |confidence − accuracy| of the top label over bins of equally many samples, in [0, 1].

    The bins are those of Nguyen & O'Connor (2015, "adaptive binning"; see also Nixon et al. 2019): samples in the order
    of their confidence, split as evenly as they can be. As in the ECE, a bin weighs what its samples do. Samples of one
    confidence share their mean correctness, so that their order does not matter.

    Args:
        num_bins: at most; with fewer samples each is a bin.
        **kwargs: of every Metric.
    """

    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, num_bins: int = 15, **kwargs: Any):
        super().__init__("confidence", "correct", **kwargs)
        self.num_bins = num_bins

    def update(self, probs: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities (B, C) and class indices (B,)."""
        confidence, predicted = probs.double().max(1)
        self.confidence.append(confidence)
        self.correct.append(predicted == targets)

    def compute(self) -> Tensor:
        """Σ_bins |Σ_bin confidence − correct| / n."""
        confidence, correct = _sorted_with_ties_shared(dim_zero_cat(self.confidence), dim_zero_cat(self.correct))
        bins = (confidence - correct).tensor_split(self.num_bins)
        return (torch.stack([gaps.sum().abs() for gaps in bins]).sum() / len(correct)).float()


class AreaUnderRiskCoverage(_Collected):
    """AURC: the error rate of the k most certain samples, averaged over k = 1 … n, in [0, 1].

    The curve is that of Geifman & El-Yaniv (2017), its area as a figure of Geifman et al. (2019). Samples of one
    uncertainty may come in any order with equal chance: the value is the expected one.
    """

    uncertainty: list[Tensor]
    wrong: list[Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__("uncertainty", "wrong", **kwargs)

    def update(self, probs: Tensor, targets: Tensor, uncertainty: Tensor | None = None) -> None:
        """Add a batch: probabilities (B, C), class indices (B,) and what to rank by, (B,); by default 1 − max p."""
        confidence, predicted = probs.double().max(1)
        self.uncertainty.append(1 - confidence if uncertainty is None else uncertainty.double())
        self.wrong.append(predicted != targets)

    def compute(self) -> Tensor:
        """1/n Σ_k (errors among the k most certain) / k."""
        _, wrong = _sorted_with_ties_shared(dim_zero_cat(self.uncertainty), dim_zero_cat(self.wrong))
        counts = torch.arange(1, len(wrong) + 1, device=wrong.device)
        return (wrong.cumsum(0) / counts).mean().float()


class FalsePositiveRate(_Collected):
    """Share of familiar points taken for foreign where `at` of the foreign ones are found ("FPR95"), in [0, 1].

    Foreign is positive, and a higher score is more foreign, as in Hendrycks et al. (2019); Liang et al. (2018) take the
    familiar as positive, which is another figure. The threshold is the highest at which at least `at` are found; points
    at or above it are taken for foreign, all that tie with it included. torchmetrics' BinarySpecificityAtSensitivity is
    one minus this for scores in [0, 1], but squashes every batch that leaves them by a sigmoid, as entropies may.

    Args:
        at: share of the foreign points to be found, in (0, 1].
        **kwargs: of every Metric.
    """

    scores: list[Tensor]
    is_foreign: list[Tensor]

    def __init__(self, at: float = 0.95, **kwargs: Any):
        super().__init__("scores", "is_foreign", **kwargs)
        if not 0 < at <= 1:
            raise ValueError(f"at={at} is not a share of the foreign points: pass a number in (0, 1].")
        self.at = at

    def update(self, scores: Tensor, is_foreign: Tensor) -> None:
        """Add a batch: scores (B,) and whether each point is foreign, (B,) bool."""
        self.scores.append(scores.double())
        self.is_foreign.append(is_foreign.bool())

    def compute(self) -> Tensor:
        """Share of the familiar points at or above the threshold, ()."""
        scores, is_foreign = dim_zero_cat(self.scores), dim_zero_cat(self.is_foreign)
        foreign, familiar = scores[is_foreign].sort(descending=True).values, scores[~is_foreign]
        if not len(foreign) or not len(familiar):
            raise ValueError("FalsePositiveRate needs familiar and foreign points, but has seen only one of the two.")
        found = torch.arange(1, len(foreign) + 1, device=scores.device).double() / len(foreign)
        return (familiar >= foreign[(found < self.at).sum()]).float().mean()


def _sorted_with_ties_shared(keys: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (n,) in ascending order, and with each the mean outcome (float64) of all samples of that key."""
    values, which, counts = keys.unique(return_inverse=True, return_counts=True)
    means = torch.zeros_like(values).index_add(0, which, outcomes.to(values)) / counts
    return values.repeat_interleave(counts), means.repeat_interleave(counts)


def classification_metrics(num_classes: int, **options: Any) -> MetricCollection:
    """Accuracy, NLL, ECE and adaptive ECE (15 bins, top label), Brier score and AURC of probabilities and labels.

    Args:
        num_classes: C.
        **options: of every Metric, as `sync_on_compute=False` where one process of several computes alone.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", **options),
            "nll": NegativeLogLikelihood(**options),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", **options),
            "adaptive_ece": AdaptiveCalibrationError(num_bins=15, **options),
            "brier": BrierScore(**options),
            "aurc": AreaUnderRiskCoverage(**options),
        },
        compute_groups=False,
    )


class LabelNegativeLogLikelihood(_MeanScore):
    """Mean of Σ_c −log p(y_c) over C labels, nats."""

    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Summed over the labels, (n,)."""
        numbers = torch.finfo(probs.dtype)
        there, absent = probs.clamp_min(numbers.tiny).log(), (1 - probs).clamp_min(numbers.eps).log()
        return -(targets * there + (1 - targets) * absent).sum(-1)


class LabelBrierScore(_MeanScore):
    """Mean squared distance between probability and target, over all labels, in [0, 1] (Brier 1950)."""

    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the labels, (n,)."""
        return (probs - targets).square().mean(-1)


class LabelAccuracy(BinaryAccuracy):
    """Share of labels on the right side of ½; targets may be soft."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: probabilities and targets in [0, 1], (n, C)."""
        super().update(preds, (target > 0.5).long())


class LabelCalibrationError(BinaryCalibrationError):
    """|p − frequency| over bins of equal width; targets may be soft."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: probabilities and targets in [0, 1], (n, C)."""
        super().update(preds, (target > 0.5).long())


def label_metrics(**options: Any) -> MetricCollection:
    """Accuracy, NLL (of all labels of a point), ECE (15 bins) and Brier score of probabilities (n, C) and labels.

    Args:
        **options: of every Metric.
    """
    return MetricCollection(
        {
            "accuracy": LabelAccuracy(**options),
            "nll": LabelNegativeLogLikelihood(**options),
            "ece": LabelCalibrationError(n_bins=15, norm="l1", **options),
            "brier": LabelBrierScore(**options),
        },
        compute_groups=False,
    )


class MeanColumn(_MeanScore):
    """The mean of one column of scores that a likelihood has worked out, (n, S).

    Args:
        column: which.
        root: take the root of the mean.
        **kwargs: of every Metric.
    """

    def __init__(self, column: int, root: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.column, self.root = column, root

    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        """The column, (n,)."""
        return probs[:, self.column]

    def compute(self) -> Tensor:
        """The mean, or its root."""
        mean = self.total / self.count  # of squares in float64: they leave the range of float32 sooner
        return (mean.sqrt() if self.root else mean).float()


def regression_metrics(**options: Any) -> MetricCollection:
    """NLL, RMSE, CRPS and coverage of the 90 % interval, from `Likelihood.summary`, (n, 4), and targets.

    Args:
        **options: of every Metric.
    """
    return MetricCollection(
        {
            "nll": MeanColumn(0, **options),
            "rmse": MeanColumn(1, root=True, **options),
            "crps": MeanColumn(2, **options),
            "coverage_90": MeanColumn(3, **options),
        },
        compute_groups=False,
    )
