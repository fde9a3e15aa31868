"""The Gaussian in K dimensions, and the search for its scales."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ella.likelihoods import Classification
from lightning_ella.posterior import Posterior, calibrate, compass_search
from lightning_ella.predictor import standard_normal


@settings(deadline=None)
@given(st.integers(1, 8), st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 99))
def test_root_squares_to_the_covariance(rank: int, log_prior: float, log_scale: float, seed: int):
    half = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)).double()
    curvature, prior, scale = half @ half.T, torch.tensor(10.0**log_prior), torch.tensor(10.0**log_scale)
    root = Posterior(curvature, prior.double(), scale.double()).root()
    expected = scale.double() * torch.linalg.inv(curvature + torch.eye(rank).double() / prior.double())
    torch.testing.assert_close(root @ root.T, expected, rtol=1e-6, atol=1e-9)


def test_compass_search_finds_the_bottom():
    loss = lambda p: (p[0] - 1.3) ** 2 + 3 * (p[1] + 0.4 + 0.2 * p[0]) ** 2  # noqa: E731
    best = compass_search(loss, [(0.0, 0.0), (5.0, 5.0)], (True, True))
    assert abs(best[0] - 1.3) < 0.1
    assert abs(best[1] + 0.66) < 0.1


def test_compass_search_leaves_fixed_axes_alone():
    best = compass_search(lambda p: p[0] ** 2 + p[1] ** 2, [(3.0, 0.7), (1.0, 0.7)], (True, False))
    assert best[1] == 0.7
    assert abs(best[0]) < 0.05


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
    logits, features, targets = labelled(scale, num_points)
    options = {"predictive": "mc", "draws": standard_normal(512, 4, 0), **options}
    return calibrate(logits, features, targets, torch.eye(4).double(), Classification(), **options)


def test_calibration_recovers_the_scale_that_made_the_labels():
    posterior = calibrated(4.0, 1500, prior_variance=1e8)
    assert posterior.prior_variance == 1e8
    assert 2.0 < posterior.covariance_scale < 8.0


def test_calibration_keeps_what_is_given():
    posterior = calibrated(1.0, 50, predictive="probit", prior_variance=0.3, covariance_scale=2.5)
    torch.testing.assert_close(posterior.prior_variance, torch.tensor(0.3).double())
    torch.testing.assert_close(posterior.covariance_scale, torch.tensor(2.5).double())
