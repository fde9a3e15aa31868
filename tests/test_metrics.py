"""Metrics against NumPy and brute force, whatever the order of the samples and however they are split into batches."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinarySpecificityAtSensitivity

from lightning_ella.likelihoods import Classification
from lightning_ella.metrics import (
    AdaptiveCalibrationError,
    AreaUnderRiskCoverage,
    Entropy,
    FalsePositiveRate,
    MutualInformation,
    classification_metrics,
)
from lightning_ella.predictions import Gaussian

CLASSES = 3


def predictions(count: int, seed: int, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities (count, 3) and labels; with `levels`, of few different confidences."""
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(count, CLASSES, generator=generator)).softmax(1)
    if levels is not None:
        confidence = 0.4 + 0.6 * torch.randint(1, levels + 1, (count, 1), generator=generator) / levels
        others = (1 - confidence).expand(-1, CLASSES - 1) / (CLASSES - 1)
        probs = torch.cat([confidence, others], 1)
    return probs, torch.randint(CLASSES, (count,), generator=generator)


def scores(count: int, seed: int, levels: int) -> tuple[Tensor, Tensor]:
    """Scores of few different values, and whether each point is foreign; at least one is and one is not."""
    generator = torch.Generator().manual_seed(seed)
    is_foreign = torch.rand(count, generator=generator) < 0.5
    is_foreign[:2] = torch.tensor([True, False])
    return torch.randint(levels, (count,), generator=generator) / 4, is_foreign


def value(metric: Metric, *batch: Tensor) -> float:
    metric.update(*batch)
    return float(metric.compute())


@pytest.mark.parametrize(("count", "num_bins"), [(200, 15), (100, 10), (16, 15), (7, 15), (1, 15), (50, 1)])
def test_adaptive_ece_is_that_of_numpys_even_split(count: int, num_bins: int):
    probs, targets = predictions(count, seed=count)
    order = probs.max(1).values.argsort().numpy()
    confidence = probs.max(1).values.double().numpy()[order]
    correct = (probs.argmax(1) == targets).double().numpy()[order]
    bins = [part for part in np.array_split(np.arange(count), num_bins) if len(part)]
    expected = sum(len(part) / count * abs(confidence[part].mean() - correct[part].mean()) for part in bins)
    assert value(AdaptiveCalibrationError(num_bins), probs, targets) == pytest.approx(expected, abs=1e-6)


def test_adaptive_ece_of_one_confidence_is_its_distance_from_the_accuracy():
    probs = torch.tensor([[0.7, 0.2, 0.1]]).expand(10, -1)
    targets = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 0, 2])
    assert value(AdaptiveCalibrationError(3), probs, targets) == pytest.approx(0, abs=1e-6)
    assert value(AdaptiveCalibrationError(3), probs, torch.ones(10).long()) == pytest.approx(0.7)


def curve_area(uncertainty: list[float], wrong: list[bool]) -> float:
    """Mean over all orders of the samples that sort by uncertainty, (n!) of them tried."""
    areas = []
    for order in permutations(range(len(wrong))):
        ranked = [uncertainty[i] for i in order]
        if ranked == sorted(ranked):
            areas.append(np.mean([np.mean([wrong[i] for i in order[: k + 1]]) for k in range(len(order))]))
    return float(np.mean(areas))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_all_orders_of_ties(samples: list[tuple[int, bool]]):
    uncertainty, wrong = [float(u) for u, _ in samples], [w for _, w in samples]
    probs, targets = torch.eye(2)[[0] * len(wrong)], torch.tensor(wrong).long()
    found = value(AreaUnderRiskCoverage(), probs, targets, torch.tensor(uncertainty))
    assert found == pytest.approx(curve_area(uncertainty, wrong), abs=1e-6)


def test_aurc_ranks_by_the_largest_probability_unless_told_otherwise():
    probs, targets = predictions(50, seed=0)
    default = value(AreaUnderRiskCoverage(), probs, targets)
    assert default == value(AreaUnderRiskCoverage(), probs, targets, -probs.max(1).values)
    assert default != value(AreaUnderRiskCoverage(), probs, targets, probs.max(1).values)


def test_aurc_of_the_best_the_worst_and_no_ranking():
    probs, targets = torch.eye(2)[[0] * 4], torch.tensor([0, 0, 0, 1])
    best, worst = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert value(AreaUnderRiskCoverage(), probs, targets, best) == pytest.approx(1 / 16)
    assert value(AreaUnderRiskCoverage(), probs, targets, worst) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert value(AreaUnderRiskCoverage(), probs, targets, torch.zeros(4)) == pytest.approx(1 / 4)
    assert value(AreaUnderRiskCoverage(), probs, torch.zeros(4).long()) == 0


def least_false_positives(scores: Tensor, is_foreign: Tensor, percent: int) -> float:
    """The smallest share of familiar points at or above a threshold that finds enough of the foreign ones."""
    foreign, familiar = scores[is_foreign], scores[~is_foreign]
    enough = [t for t in scores if 100 * int((foreign >= t).sum()) >= percent * len(foreign)]
    return min(float((familiar >= t).float().mean()) for t in enough)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.integers(0, 99), st.integers(1, 20), st.sampled_from([7, 50, 80, 95, 100]))
def test_false_positive_rate_is_the_least_of_all_thresholds(count: int, seed: int, levels: int, percent: int):
    batch = scores(count, seed, levels)
    expected = least_false_positives(*batch, percent)
    assert value(FalsePositiveRate(percent / 100), *batch) == pytest.approx(expected)


def test_false_positive_rate_of_perfect_constant_and_reversed_scores():
    is_foreign = torch.tensor([False] * 5 + [True] * 5)
    assert value(FalsePositiveRate(), is_foreign.float(), is_foreign) == 0
    assert value(FalsePositiveRate(), torch.zeros(10), is_foreign) == 1
    assert value(FalsePositiveRate(), -is_foreign.float(), is_foreign) == 1


def test_false_positive_rate_is_torchmetrics_within_its_range():
    generator = torch.Generator().manual_seed(0)
    numbers, is_foreign = torch.rand(300, generator=generator), torch.rand(300, generator=generator) < 0.4
    theirs = BinarySpecificityAtSensitivity(min_sensitivity=0.95)
    theirs.update(numbers, is_foreign.long())
    assert value(FalsePositiveRate(), numbers, is_foreign) == pytest.approx(1 - float(theirs.compute()[0]), abs=1e-6)


def test_false_positive_rate_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"at=95 .* pass a number"):
        FalsePositiveRate(at=95)
    with pytest.raises(ValueError, match="needs familiar and foreign points"):
        value(FalsePositiveRate(), torch.ones(3), torch.ones(3).bool())


METRICS: dict[str, tuple[Callable[[], Metric], Callable[[int, int, int], tuple[Tensor, Tensor]]]] = {
    "adaptive_ece": (lambda: AdaptiveCalibrationError(4), predictions),
    "aurc": (AreaUnderRiskCoverage, predictions),
    "fpr": (FalsePositiveRate, scores),
}


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=30)
@given(count=st.integers(2, 40), seed=st.integers(0, 99), levels=st.integers(1, 5), batch_size=st.integers(1, 40))
def test_neither_the_order_nor_the_batches_matter(name: str, count: int, seed: int, levels: int, batch_size: int):
    make, draw = METRICS[name]
    batch = draw(count, seed, levels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    shuffled = make()
    for rows in order.split(batch_size):
        shuffled.update(*(part[rows] for part in batch))
    assert float(shuffled.compute()) == value(make(), *batch)


def test_the_reported_set():
    probs, targets = predictions(100, seed=1)
    metrics = classification_metrics(CLASSES)
    metrics.update(probs, targets)
    found = metrics.compute()
    assert set(found) == {"accuracy", "nll", "ece", "adaptive_ece", "brier", "aurc"}
    assert float(found["aurc"]) == value(AreaUnderRiskCoverage(), probs, targets)
    assert float(found["adaptive_ece"]) == value(AdaptiveCalibrationError(15), probs, targets)


def test_entropy_and_mutual_information_are_those_of_a_prediction():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(40, 2, generator=generator)
    logits = Gaussian(
        torch.randn(9, CLASSES, generator=generator), torch.randn(9, CLASSES, 2, generator=generator), draws
    )
    prediction = Classification().predict(logits, "mc", torch.ones(()))
    total, epistemic = Entropy(), MutualInformation()
    for part in (slice(0, 4), slice(4, 9)):
        total.update(prediction.probs[part])
        epistemic.update(logits.samples().softmax(-1)[:, part])
    torch.testing.assert_close(total.compute(), prediction.entropy.mean())
    torch.testing.assert_close(epistemic.compute(), prediction.mutual_information.mean())
