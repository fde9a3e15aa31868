"""Guarantees: what other libraries say, what simulations show, and refused where nothing can be promised."""

import logging
import math
import pickle
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from conftest import ListDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from test_familiarity import NETWORKS, OPTIONS, loader, trained
from test_other_likelihoods import problem
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ella import LIKELIHOODS, ELLAPredictor, FastPredictor, Settings, distil, fit, fit_ella
from lightning_ella.data import points_of
from lightning_ella.guarantee import Guarantee, Judged, binomial
from lightning_ella.predictions import ClassPrediction, Gaussian, NormalPrediction

ALL = torch.ones(400, dtype=torch.bool)


def guarantee(
    scores: Tensor, confidence: Tensor | None = None, wrong: Tensor | None = None, **options: Any
) -> Guarantee:
    none = scores[:0].flatten()
    return Guarantee.of(
        Judged(scores, none if confidence is None else confidence, none > 0 if wrong is None else wrong), **options
    )


def certain(logits: Tensor) -> Gaussian:
    return Gaussian(logits, torch.zeros(*logits.shape, 1), torch.zeros(1, 1))


# Sets and intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_sets_are_those_of_mapie(level: float):
    from mapie.classification import SplitConformalClassifier
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    y = generator.integers(4, size=700)
    x = generator.normal(size=(700, 4)) + 1.5 * np.eye(4)[y]
    model = LogisticRegression().fit(x[:200], y[:200])
    theirs = SplitConformalClassifier(model, confidence_level=level, conformity_score="lac", prefit=True)
    theirs.conformalize(x[200:500], y[200:500])
    expected = torch.from_numpy(theirs.predict_set(x[500:])[1][..., 0])
    likelihood, one = LIKELIHOODS["classification"](), torch.ones(())
    known, new = (torch.from_numpy(model.predict_log_proba(part)) for part in (x[200:500], x[500:]))
    judged = Judged.of(
        likelihood, likelihood.predict(certain(known), "mc", one), torch.from_numpy(y[200:500]), ALL[:300]
    )
    prediction = likelihood.predict(certain(new), "mc", one)
    prediction.guarantee = Guarantee.of(judged)
    assert torch.equal(prediction.prediction_set(level), expected)


def test_intervals_are_those_of_mapie_on_the_same_scores():
    from mapie.regression import SplitConformalRegressor
    from sklearn.dummy import DummyRegressor

    generator = torch.Generator().manual_seed(0)
    mean, y = (torch.randn(400, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    likelihood = LIKELIHOODS["regression"](0.3)
    prediction = likelihood.predict(certain(mean), "exact", torch.ones(()))
    assert isinstance(prediction, NormalPrediction)
    prediction.guarantee = Guarantee.of(Judged.of(likelihood, prediction, y, ALL))
    zero = DummyRegressor(strategy="constant", constant=0.0).fit(np.zeros((2, 1)), np.zeros(2))
    theirs = SplitConformalRegressor(zero, confidence_level=0.8, prefit=True)
    theirs.conformalize(np.zeros((400, 1)), ((y - mean) / 0.3**0.5).flatten().numpy())
    away = theirs.predict_interval(np.zeros((1, 1)))[1][0, 1, 0]
    low, high = prediction.interval(0.8, guaranteed=True)
    torch.testing.assert_close(high - mean, torch.full_like(mean, away * 0.3**0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean - low, torch.full_like(mean, away * 0.3**0.5), rtol=0, atol=1e-5)


@given(seed=st.integers(0, 10**6), count=st.integers(2, 40), level=st.floats(0.01, 0.99), ties=st.booleans())
@settings(max_examples=50, deadline=None)
def test_each_point_left_out_is_covered_as_often_as_is_said(seed: int, count: int, level: float, ties: bool):
    scores = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    scores = scores.mul(2).round() if ties else scores
    rest = [scores[torch.arange(count) != i] for i in range(count)]
    covered = [bool(one <= guarantee(others).quantile(level)) for one, others in zip(scores, rest, strict=True)]
    assert sum(covered) / count >= level - 1e-9
    if not ties:
        assert sum(covered) == min(count, math.ceil(count * level - 1e-9))


def test_rounding_leaves_nobody_out():
    sets, intervals = (torch.tensor([[0.3, 0.7]]) for _ in range(2))
    out = ClassPrediction(certain(sets.log()), "mc", torch.ones(()), LIKELIHOODS["classification"]())
    out.guarantee = guarantee((1 - out.probs[0, :1]).repeat(40) - 2e-7)  # one input many times, in another batch
    assert out.prediction_set(0.9)[0].tolist() == [True, True]
    numbers = LIKELIHOODS["regression"](1.0).predict(certain(100 * intervals), "exact", torch.ones(()))
    numbers.guarantee = guarantee(torch.full((40, 2), 0.5))
    low, high = numbers.interval(0.9, guaranteed=True)
    assert (low <= 100 * intervals - 0.5 - 1e-5).all()
    assert (high >= 100 * intervals + 0.5 + 1e-5).all()


def test_too_few_points_promise_by_saying_everything():
    few = guarantee(torch.rand(5, 2))
    assert few.quantile(0.5).isfinite().all()
    assert few.quantile(0.9).tolist() == [torch.inf] * 2
    for level in (0, 1, -0.1, 90):
        with pytest.raises(ValueError, match="must be a number between 0 and 1"):
            few.quantile(level)


# Answers -------------------------------------------------------------------------------------------------------------


@given(trials=st.integers(0, 300), chance=st.floats(0.01, 0.99), share=st.floats(0, 1))
def test_the_binomial_test_is_scipy_s(trials: int, chance: float, share: float):
    successes = round(share * trials)
    assert binomial(successes, trials, chance) == pytest.approx(
        binom.cdf(successes, trials, chance), rel=1e-6, abs=1e-12
    )


def answers(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Confidences, and which answers are wrong: more of those that are less confident, but not 1 minus that."""
    confidence = torch.rand(count, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(count, generator=generator, dtype=torch.float64) < (1 - confidence) ** 2


def test_no_more_than_the_risk_is_wrong_among_answers_as_often_as_is_certain():
    generator, exceeded, answered = torch.Generator().manual_seed(0), 0, []
    for _ in range(400):
        found = guarantee(torch.zeros(1), *answers(500, generator), planned=answers(100, generator)[0])
        threshold = found.threshold(risk=0.1, certainty=0.9)
        exceeded += (
            1 - min(threshold, 1.0)
        ) ** 2 / 3 > 0.1  # the share that is wrong from there on: ∫ (1 − c)² / (1 − t)
        answered.append(1 - min(threshold, 1.0))
    assert exceeded / 400 < 0.1 + 3 * (0.1 * 0.9 / 400) ** 0.5
    assert 0.35 < sum(answered) / 400 < 0.3**0.5  # of at most so many


def test_testing_ends_at_the_first_threshold_that_fails():
    generator, exceeded = torch.Generator().manual_seed(0), 0
    for _ in range(300):  # a little too many are wrong, whatever the threshold: each of fifty tests may pass by chance
        confidence = torch.rand(400, generator=generator, dtype=torch.float64)
        wrong = torch.rand(400, generator=generator) < 0.101
        found = guarantee(torch.zeros(1), confidence, wrong, planned=torch.rand(100, generator=generator).double())
        exceeded += found.threshold(0.1, 0.9) < math.inf
    assert exceeded / 300 < 0.1 + 3 * (0.1 * 0.9 / 300) ** 0.5


def test_thresholds_lie_between_confidences_that_differ():
    atoms = torch.tensor([0.6, 0.8, 0.95], dtype=torch.float64).repeat_interleave(100)
    jitter = 1e-8 * torch.randn(300, generator=torch.Generator().manual_seed(0)).double()
    found = guarantee(torch.zeros(1), atoms, atoms < 0.7, planned=(atoms + jitter).float().double())
    assert found.threshold(0.1, 0.9) == pytest.approx(0.7, abs=1e-6)
    sure = 1 - torch.tensor([1e-9, 1e-10, 1e-11], dtype=torch.float64).repeat_interleave(100)
    assert 1e-10 < 1 - guarantee(torch.zeros(1), sure, sure < 1 - 5e-10, planned=sure).threshold(0.1, 0.9) < 1e-9


def test_a_binary_classifier_that_is_surer_than_float32_can_tell_keeps_its_risk():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model, generator = Two(), torch.Generator().manual_seed(0)
    nn.init.ones_(model.layer.weight)
    nn.init.zeros_(model.layer.bias)
    x = torch.where(torch.arange(1000) % 2 == 0, 30.0, 21.0).unsqueeze(1)
    y = ((x > 25) | (torch.rand(1000, 1, generator=generator) > 0.3)).float()
    options = OPTIONS | {"prior_variance": 1e-12, "rank": 2, "residual": 0}
    predictor = fit_ella(model, loader(x[:40], y[:40]), likelihood="binary", **options).guarantee(loader(x, y))
    out = predictor(x)
    answered = (out.confidence >= predictor.threshold(0.05)).flatten()
    assert answered.sum() == 500
    assert y[answered].all()


def test_what_cannot_be_promised_is_not_answered_and_numbers_have_no_answers(caplog: pytest.LogCaptureFixture):
    hopeless = guarantee(torch.zeros(1), torch.rand(100), torch.arange(100) % 2 == 0)
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        assert hopeless.threshold(0.05, 0.9) == math.inf
    assert "nothing is answered" in caplog.text
    with pytest.raises(ValueError, match="is for classes"):
        guarantee(torch.rand(100)).threshold(0.05, 0.9)
    for options in ((0, 0.9), (0.05, 1.0)):
        with pytest.raises(ValueError, match="must be a number between 0 and 1"):
            hopeless.threshold(*options)


# Predictors ----------------------------------------------------------------------------------------------------------


def split(name: str, count: int) -> tuple[nn.Module, DataLoader, DataLoader, DataLoader, str]:
    """A trained network, its points, unseen ones, and as many others."""
    model, train, _, fresh, likelihood = trained(name)
    x = fresh(2 * count)
    with torch.no_grad():  # labels by the network, so that some answers are right
        generator = torch.Generator().manual_seed(0)
        y = LIKELIHOODS[likelihood]().sample(model(x), generator)
    return model, train, loader(x[:count], y[:count]), loader(x[count:], y[count:]), likelihood


@pytest.mark.parametrize("name", NETWORKS)
def test_coverage_is_what_is_said_on_every_network_through_predictor_and_student(name: str):
    model, train, unseen, new, likelihood = split(name, 1200)
    options = {"num_landmarks": 60, "rank": 4, "residual": 4, "num_calibration": 100, "num_apart": 200}
    predictor = fit_ella(model, train, unseen, likelihood=likelihood, **options)
    x, y = (torch.cat(part) for part in zip(*new, strict=True))
    for ask in (predictor, predictor.distil(unseen)):
        assert len(ask.guaranteed.scores) >= 200
        out = ask(x)
        for level in (0.8, 0.95):
            if likelihood == "classification":
                covered = out.prediction_set(level).gather(1, y.unsqueeze(1))
            else:
                low, high = out.interval(level, guaranteed=True)
                covered = (low <= y) & (y <= high)
            error = (level * (1 - level) * (1 / len(ask.guaranteed.scores) + 1 / len(x))) ** 0.5
            assert abs(float(covered.double().mean()) - level) < 3.5 * error + 1 / len(ask.guaranteed.scores)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_promises_what_it_can_in_the_shape_of_its_targets(name: str):
    model, x, y, points = problem(name)
    options = OPTIONS | ({"noise_variance": 0.3} if name == "regression" else {})
    predictor = fit_ella(model, points, points, likelihood=name, **options)
    for ask in (predictor, predictor.distil(points)):
        out = ask.guarantee(points)(x)
        if isinstance(out, ClassPrediction):
            sets = out.prediction_set(0.8)
            assert sets.shape == out.probs.shape
            assert sets.gather(1, y.unsqueeze(1)).double().mean() >= 0.8  # of the points themselves
            assert out.confidence.shape == (60,)
        elif name in ("multilabel", "binary"):
            sets = out.prediction_set(0.8)
            assert sets.shape == (*out.probs.shape, 2)
            assert (sets.gather(-1, y.long().unsqueeze(-1)).double().mean(0) >= 0.8).all()
        else:
            low, high = out.interval(0.8, guaranteed=True)
            assert low.shape == high.shape == out.mean.shape
            assert ((low <= y) & (y <= high)).double().mean(0).min() >= 0.8
            assert name != "poisson" or low.min() >= 0
        if name in ("classification", "preference", "ordinal", "binary"):
            threshold = ask.threshold(risk=0.99, certainty=0.5)
            assert threshold <= out.confidence.max()
        else:
            with pytest.raises(ValueError, match="is for classes"):
                ask.threshold()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *product(LIKELIHOODS, ({}, {"learn": True}, {"views": [torch.neg]})),
        *((name, {"predictive": "probit"}) for name in ("classification", "binary")),
    ],
)
def test_what_a_fit_promises_is_of_its_own_predictions(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fit, "SURE", -math.inf)  # so that the mean is moved
    model, x, y, _ = problem(name)
    model = nn.Sequential(*model[:2], nn.Linear(5, model[2].out_features)).double()  # which knows nothing
    options = options | {"num_calibration": 20, "num_apart": 25, "num_landmarks": 40, "rank": 4, "num_samples": 64}
    predictor = fit_ella(model, loader(x, y), loader(x, y), likelihood=name, **options)
    assert predictor.mean.norm() > 0 or name not in ("classification", "regression") or not options.get("learn")
    apart = sorted(fit._apart(range(60), Settings(likelihood=name, **options)))
    known = predictor.likelihood.check(predictor(x[apart]).logits.mean, y[apart])
    expected = Judged.of(predictor.likelihood, predictor(x[apart]), known, torch.ones(20, dtype=torch.bool))
    found, rounding = predictor.guaranteed, {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(found.scores, expected.scores.double().sort(0).values, **rounding)
    torch.testing.assert_close(found.confidence.sort().values, expected.confidence.double().sort().values, **rounding)
    assert found.wrong.sum() == expected.wrong.sum()


def test_noise_is_not_estimated_where_something_is_promised(monkeypatch: pytest.MonkeyPatch):
    model, train, unseen, _, _ = split("numbers", 400)
    looked, completed = set(), fit._completed

    def watched(likelihood: Any, linearization: Any, batches: Any, world: Any) -> Any:
        batches = list(batches)
        looked.update(tuple(x.tolist()) for inputs, *_ in batches for x in inputs)
        return completed(likelihood, linearization, batches, world)

    monkeypatch.setattr(fit, "_completed", watched)
    options = {"num_calibration": 50, "num_apart": 100, "num_landmarks": 60, "rank": 4}
    predictor = fit_ella(model, train, unseen, likelihood="regression", **options)
    points = [tuple(x.tolist()) for x, _ in unseen.dataset]
    apart = {points[i] for i in fit._apart(range(400), Settings(likelihood="regression", **options))}
    assert len(apart) == 100
    assert len(looked) == 250
    assert not looked & apart
    assert looked <= {points[i] for i in predictor.spent.numbers}


def test_points_that_guarantee_have_not_been_seen_by_anything_else(monkeypatch: pytest.MonkeyPatch):
    model, train, unseen, _, _ = split("perceptron", 400)
    every = {tuple(x.tolist()): i for i, (x, _) in enumerate(unseen.dataset)}
    taught, tuned, apart = set(), set(), set()
    lecture, tune, guaranteed = distil._lecture, distil._tune, distil._guaranteed

    def numbers(batch: Any) -> set[int]:
        return {every[tuple(x.tolist())] for x in batch.inputs}

    def lecturing(predictor: Any, recorder: Any, places: Any, batch: Any, *args: Any) -> Any:
        taught.update(numbers(batch))
        return lecture(predictor, recorder, places, batch, *args)

    def tuning(fast: Any, recorder: Any, points: Any, chosen: list[int]) -> None:
        tuned.update(chosen)
        tune(fast, recorder, points, chosen)

    def guaranteeing(fast: Any, recorder: Any, batches: Any) -> Any:
        batches = list(batches)
        apart.update(*map(numbers, batches))
        return guaranteed(fast, recorder, batches)

    for name, spy in {"_lecture": lecturing, "_tune": tuning, "_guaranteed": guaranteeing}.items():
        monkeypatch.setattr(distil, name, spy)
    predictor = fit_ella(model, train, unseen, num_calibration=150, num_landmarks=60, rank=4)
    spent = set(predictor.spent.numbers.tolist())
    assert len(predictor.guaranteed.scores) == 125
    assert len(spent) == 275  # looked at, to choose those that the scales are chosen on
    fast = predictor.distil(unseen, num_points=50)
    assert len(apart) == len(fast.guaranteed.scores) == 80
    assert not apart & (spent | taught | tuned)
    assert len(taught) == 50
    assert predictor.distil(loader(*zip(*list(unseen.dataset)[:300], strict=True))).guaranteed is None  # who knows


def test_without_points_left_alone_it_says_how_to_get_them_and_update_ends_a_promise(tmp_path: Path):
    model, train, unseen, new, _ = split("perceptron", 300)
    predictor = fit_ella(model, train, unseen, num_landmarks=60, rank=4)  # all chose the scales
    fast, (x, _) = predictor.distil(unseen), next(iter(new))
    for ask in (predictor, fast):
        with pytest.raises(ValueError, match=r"prediction_set\(\) needs labelled points that nothing else has seen"):
            ask(x).prediction_set()
        with pytest.raises(ValueError, match=r"threshold\(\) needs labelled points"):
            ask.threshold()
        assert ask.guarantee(new)(x).prediction_set().any()
    predictor.update(unseen, drift=0.01)
    assert predictor.spent is None  # who knows what it has learnt from
    for ask in (predictor, fast):
        with pytest.raises(ValueError, match="needs labelled points that nothing else has seen"):
            ask(x).prediction_set()
    fast.guarantee(new)
    predictor.adopt(FastPredictor.load(fast.save(tmp_path / "fast"), model))
    assert predictor.fast(x).prediction_set().any()  # of the same posterior
    predictor.forget(unseen)
    with pytest.raises(ValueError, match="needs labelled points"):
        predictor.fast(x).prediction_set()


def test_what_nothing_can_be_promised_of_is_refused():
    model, x, y, points = problem("classification")
    predictor = fit_ella(model, points, points, **OPTIONS)
    with pytest.raises(ValueError, match="no point of the loader has a target that counts"):
        predictor.guarantee(loader(x, torch.full((60,), -100)))
    some = y.clone()
    some[:20] = -100
    assert len(predictor.guarantee(loader(x, some)).guaranteed.scores) == 40
    few = fit_ella(model, points, points, top_outputs=2, **OPTIONS)
    with pytest.raises(ValueError, match="with top_outputs="):
        few.guarantee(points)
    positions = zoo.CASES["segmentation"]
    inputs = positions.inputs(24, 0)
    labels = torch.randint(3, positions.build().eval()(inputs)[:, 0].shape)
    pixels = fit_ella(positions.build(), loader(inputs, labels), **OPTIONS | {"num_landmarks": 20})
    with pytest.raises(ValueError, match="one row of outputs an input"):
        pixels.guarantee(loader(inputs, labels))
    weighted = DataLoader(ListDataset([*zip(x, y, torch.rand(60), strict=True)]), 16)
    with pytest.raises(ValueError, match="points that count alike"):
        predictor.guarantee(weighted, lambda batch: batch)
    assert ELLAPredictor.guarantee is FastPredictor.guarantee


def test_unequal_weights_and_missing_labels_promise_nothing(tmp_path: Path):
    model, train, unseen, _, _ = split("perceptron", 400)
    x, y = (torch.cat(part) for part in zip(*unseen, strict=True))
    options = {"num_calibration": 100, "num_landmarks": 60, "rank": 4}
    weighted = DataLoader(ListDataset([*zip(x, y, 0.5 + torch.rand(400), strict=True)]), 50)
    ones = DataLoader(ListDataset([(*point, torch.tensor(1.0)) for point in train.dataset]), 50)
    predictor = fit_ella(model, ones, weighted, unpack=lambda batch: batch, **options)
    assert predictor.guaranteed is None
    assert predictor.familiarity is not None
    assert predictor.distil(weighted, lambda batch: batch).guaranteed is None
    predictor = fit_ella(model, train, unseen, **options)
    hidden = y.clone()
    hidden[sorted({*range(400)} - {*predictor.spent.numbers.tolist()})] = -100  # all that were left alone
    predictor.spent = predictor.spent._replace(identity=points_of(loader(x, hidden)).identity())
    fast = predictor.distil(loader(x, hidden))
    assert fast.guaranteed is None
    assert FastPredictor.load(fast.save(tmp_path / "fast"), model)(x).familiarity is not None


def test_forgetting_training_points_ends_a_promise():
    model, train, unseen, new, _ = split("perceptron", 300)
    predictor = fit_ella(model, train, unseen, num_landmarks=60, rank=4, curvature="exact", num_curvature=None)
    predictor.guarantee(new)
    few = loader(*(torch.stack(part[:5]) for part in zip(*list(train.dataset), strict=True)))
    predictor.forget(few)
    with pytest.raises(ValueError, match="needs labelled points"):
        predictor(next(iter(new))[0]).prediction_set()


def test_files_pickles_and_copies_promise_the_same(tmp_path: Path):
    model, train, unseen, new, _ = split("perceptron", 400)
    predictor = fit_ella(model, train, unseen, num_calibration=100, num_landmarks=60, rank=4)
    x, _ = next(iter(new))
    for head, kind in ((predictor, ELLAPredictor), (predictor.distil(unseen), FastPredictor)):
        loaded = kind.load(head.save(tmp_path / "head"), model)
        for other in (loaded, pickle.loads(pickle.dumps(head)), deepcopy(head)):
            assert torch.equal(other(x).prediction_set(0.7), head(x).prediction_set(0.7))
            assert other.threshold(0.5) == head.threshold(0.5)
        if kind is ELLAPredictor:
            again, expected = loaded.distil(unseen).guaranteed, head.distil(unseen).guaranteed
            assert torch.equal(again.scores, expected.scores)  # it knows which points are spent


def test_loaders_without_numbers_have_their_points_apart_too():
    model, train, unseen, new, _ = split("perceptron", 300)
    batches = [*unseen]
    predictor = fit_ella(model, train, batches, num_calibration=100, num_landmarks=60, rank=4)  # type: ignore[arg-type]
    assert len(predictor.guaranteed.scores) == len(predictor.familiarity.scores)
    x, y = next(iter(new))
    assert predictor(x).prediction_set(0.8).gather(1, y.unsqueeze(1)).double().mean() > 0.5


def test_ten_thousand_classes_and_one_are_no_problem():
    out = ClassPrediction(certain(torch.randn(3, 10_000)), "mc", torch.ones(()), LIKELIHOODS["classification"]())
    out.guarantee = guarantee(torch.rand(100))
    assert out.prediction_set(0.9).shape == (3, 10_000)
