"""The Gaussian in K dimensions, and the search for its scales."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_ella.likelihoods import Classification
from lightning_ella.numerics import standard_normal
from lightning_ella.observations import Observations
from lightning_ella.posterior import SCALES, Posterior, calibrate, largest, minimise, prior_by_evidence
from lightning_ella.predictions import Gaussian


@settings(deadline=None)
@given(st.integers(1, 8), st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 99))
def test_root_squares_to_the_covariance(rank: int, log_prior: float, log_scale: float, seed: int):
    half = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)).double()
    curvature, prior, scale = half @ half.T, torch.tensor(10.0**log_prior), torch.tensor(10.0**log_scale)
    one = torch.ones(()).double()
    root = Posterior(curvature, prior.double(), scale.double(), one, one).root()
    expected = scale.double() * torch.linalg.inv(curvature + torch.eye(rank).double() / prior.double())
    torch.testing.assert_close(root @ root.T, expected, rtol=1e-6, atol=1e-9)


def test_the_factor_has_the_variance_of_the_span_and_that_of_the_probes():
    torch.manual_seed(0)
    features, scales = torch.randn(7, 3, 4 + 5).double(), torch.tensor([0.5, 2.0, 3.0, 1.5]).double()
    posterior = Posterior(torch.eye(4).double(), *scales)
    factor = posterior.factor(features)
    inside, outside = features.split([4, 5], dim=-1)
    expected = 2.0 / (1 + 1 / 0.5) * inside @ inside.mT + 3.0 * outside @ outside.mT
    torch.testing.assert_close(factor @ factor.mT, expected)


def test_minimise_finds_the_bottom():
    def loss_and_gradient(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = p.detach().requires_grad_()
        with torch.enable_grad():
            loss = (p[0] - 1.3) ** 2 + 3 * (p[1] + 0.4 + 0.2 * p[0]) ** 2
        return loss.detach(), torch.autograd.grad(loss, p)[0]

    best = minimise(loss_and_gradient, torch.zeros(2).double())
    torch.testing.assert_close(best, torch.tensor([1.3, -0.66]).double(), rtol=0, atol=1e-2)


def test_largest_halves_the_interval():
    assert abs(largest(lambda x: x <= 3.7, 20.0) - 3.7) < 0.01
    assert largest(lambda x: False, 20.0) == 0.0


def test_the_evidence_is_that_of_the_dense_determinant():
    torch.manual_seed(0)
    half = torch.randn(6, 6).double()
    ggn, weights = torch.block_diag(half @ half.T, 0.3 * torch.eye(40).double()), [torch.ones(2), torch.full((2,), 0.5)]
    variances = torch.logspace(-8, 4, 1201, dtype=torch.float64)
    dense = [2.5 / v + torch.logdet(torch.eye(46).double() + v * ggn) for v in variances]
    found = prior_by_evidence(half @ half.T, torch.tensor(0.3 * 40).double(), 40, weights)
    assert abs(found / float(variances[torch.stack(dense).argmin()]) - 1) < 1e-6


def labelled(scale: float, num_points: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and features at points whose labels come from logits with a covariance that is `scale` times too wide."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_points, 3, generator=generator)
    features = torch.randn(num_points, 3, 4, generator=generator)
    noise = torch.randn(num_points, 4, 1, generator=generator) * scale**0.5
    targets = torch.distributions.Categorical(logits=logits + (features @ noise).squeeze(-1))
    torch.manual_seed(1)
    return logits, features, targets.sample()


def calibrated(scale: float, num_points: int, **options) -> Posterior:
    points = Observations(*labelled(scale, num_points))
    options = {"predictive": "mc", "draws": standard_normal(512, 4, 0), **options}
    return calibrate(points, torch.eye(options.pop("rank", 4)).double(), Classification(), **options)


def test_calibration_recovers_the_scale_that_made_the_labels():
    posterior = calibrated(4.0, 1500, given={"prior_variance": 1e8, "temperature": 1.0})
    assert posterior.prior_variance == 1e8
    assert posterior.temperature == 1
    assert 2.0 < posterior.covariance_scale < 8.0


def test_the_curvature_is_decomposed_once(monkeypatch: pytest.MonkeyPatch):
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    calibrated(4.0, 200, given={})
    assert len(calls) == 1


def test_calibration_recovers_the_temperature_that_made_the_labels():
    logits, features, _ = labelled(1.0, 3000)
    targets = torch.distributions.Categorical(logits=logits / 2.0).sample()
    draws = standard_normal(64, 4, 0)
    posterior = calibrate(
        *(Observations(logits, features, targets), torch.eye(4).double(), Classification()),
        predictive="mc",
        draws=draws,
        given={},
    )
    gaussian = Gaussian(logits, posterior.factor(features), draws)
    probs = Classification().predict(gaussian, "mc", posterior.temperature.float()).probs
    truth = (logits / 2.0).softmax(-1)
    assert (probs - truth).abs().mean() < 0.02 < (logits.softmax(-1) - truth).abs().mean()


def test_as_much_variance_outside_the_span_is_taken_as_the_points_allow():
    given = {"prior_variance": 1.0, "covariance_scale": 1.0, "temperature": 1.0}
    little, more = (calibrated(1.0, n, rank=2, given=given).residual_scale for n in (3000, 100))
    assert 1.0 < little < more  # of labels made with the scale one; fewer points refuse less


def test_calibration_keeps_what_is_given():
    given = {"prior_variance": 0.3, "covariance_scale": 2.5, "residual_scale": 0.1, "temperature": 1.2}
    posterior = calibrated(1.0, 50, predictive="probit", given=given)
    assert {name: round(float(getattr(posterior, name)), 6) for name in given} == given


@pytest.mark.parametrize("predictive", ["mc", "probit", "bridge"])
def test_every_predictive_can_be_calibrated(predictive: str):
    posterior = calibrated(1.0, 200, rank=3, predictive=predictive, given={})
    assert all(float(getattr(posterior, name)) > 0 for name in SCALES)


@pytest.mark.parametrize("count", [2, 10, 30])
def test_a_few_points_do_no_great_harm(count: int):
    logits, features, _ = labelled(1.0, 1000)
    distribution = torch.distributions.Categorical(logits=logits)
    for _ in range(5):
        targets = distribution.sample()
        few = (values[:count] for values in (logits, features, targets))
        draws = standard_normal(64, 4, 0)
        posterior = calibrate(
            Observations(*few), torch.eye(2).double(), Classification(), predictive="mc", draws=draws, given={}
        )
        gaussian = Gaussian(logits, posterior.factor(features), draws)
        prediction = Classification().predict(gaussian, "mc", posterior.temperature.float())
        loss = Classification().nll(prediction, targets).mean()
        assert loss < 1.6 * nn.functional.cross_entropy(logits, targets)


def test_points_of_weight_zero_count_for_nothing():
    logits, features, targets = labelled(1.0, 80)
    options = {"predictive": "mc", "draws": standard_normal(64, 4, 0), "given": {}}
    weights = torch.ones(80)
    weights[40:] = 0
    few = Observations(logits, features, targets).rows(slice(40))
    spoilt = logits.clone()
    spoilt[40:] = torch.nan
    curvature = torch.eye(2).double()
    with_them = calibrate(Observations(spoilt, features, targets, weights), curvature, Classification(), **options)
    without = calibrate(few, curvature, Classification(), **options)
    assert [getattr(with_them, name) for name in SCALES] == [getattr(without, name) for name in SCALES]


def test_many_outputs_are_calibrated_as_well_in_float32(monkeypatch: pytest.MonkeyPatch):
    exact = calibrated(1.0, 200, rank=3, given={})
    monkeypatch.setattr("lightning_ella.posterior.MANY", 3)
    rough = calibrated(1.0, 200, rank=3, given={})
    for name in SCALES:
        assert float(getattr(rough, name)) == pytest.approx(float(getattr(exact, name)), rel=0.05)


def test_what_takes_long_is_said_with_the_way_to_shorten_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    given = {"prior_variance": 1.0, "covariance_scale": 1.0}
    with caplog.at_level(logging.INFO):
        calibrated(1.0, 20, given=given)
        assert not caplog.messages
        monkeypatch.setattr("lightning_ella.posterior.LONG", 1)
        monkeypatch.setattr("lightning_ella.posterior.TOP", 2)
        calibrated(1.0, 20, given=given)
    assert "choosing the scales on 20 points of 3 outputs, which is faster with top_outputs=2" in caplog.messages[0]
