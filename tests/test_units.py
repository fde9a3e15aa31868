"""Regression in any unit: targets and last layer times c give means and deviations times c, and the NLL plus log c."""

import logging
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Case
from torch import Tensor, nn

from lightning_ella import fit_ella
from lightning_ella.likelihoods import Regression
from lightning_ella.posterior import Posterior, prior_by_evidence

OUTPUTS, COUNT = 2, 120
UNITS = [1e-12, 1e-6, 1e12]


class Said(NamedTuple):
    """Lengths are divided by the unit, and the NLL is that of targets that are."""

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor
    crps: Tensor
    nll: Tensor
    coverage: Tensor


def network(likelihood: str, units: Tensor) -> nn.Sequential:
    """Its last layer gives means times the units, and log-variances that are shifted."""
    torch.manual_seed(0)
    heads = 2 if likelihood == "heteroscedastic" else 1
    built = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, heads * OUTPUTS)).double()
    with torch.no_grad():
        built[2].weight[:OUTPUTS] *= units.unsqueeze(1)
        built[2].bias[:OUTPUTS] *= units
        if heads == 2:
            built[2].weight[OUTPUTS:] *= 0.3
            built[2].bias[OUTPUTS:] = 2 * (0.3 * units).log()
    return built


@cache
def said(
    lengths: tuple[float, ...], dtype: torch.dtype, unseen: bool, likelihood: str = "regression", **options
) -> Said:
    """What a predictor says in these units, of targets that are in them."""
    units, one = torch.tensor(lengths, dtype=torch.float64), torch.ones(OUTPUTS).double()
    inputs = torch.randn(3 * COUNT, 3, generator=torch.Generator().manual_seed(1)).double()
    means = network(likelihood, one)(inputs).detach()[:, :OUTPUTS]
    noise = torch.randn(3 * COUNT, OUTPUTS, generator=torch.Generator().manual_seed(2)).double()
    targets = (means + 0.3 * noise + 0.2 * inputs[:, :1].sin()) * units
    model = network(likelihood, units).to(dtype)
    train, held_out, test = (
        Case(model, x.to(dtype), y.to(dtype)) for x, y in zip(*split(inputs, targets), strict=True)
    )
    predictor = fit_ella(
        *(model, train.loader(60), held_out.loader(60) if unseen else None),
        likelihood=likelihood,
        parameters="2.*",
        num_landmarks=80,
        rank=10,
        **options,
    )
    out = predictor(test.inputs)
    low, high = out.interval(0.9)
    inside = ((test.targets >= low) & (test.targets <= high)).double().mean()
    parts = (out.mean, out.variance.double().sqrt(), low, high, out.crps(test.targets))
    nll = -out.log_prob(test.targets).double() - units.log().sum()
    return Said(*(part.double() / units for part in parts), nll, inside)


def split(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(COUNT) for tensor in tensors]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("unseen", [True, False])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {}),
        (torch.float32, {"noise": "per-output"}),
        (torch.float32, {"noise_variance": 0.1}),
    ],
)
def test_all_that_is_said_follows_the_unit(unit: float, unseen: bool, dtype: torch.dtype, options: dict):
    scaled = {name: value * unit**2 if name == "noise_variance" else value for name, value in options.items()}
    plain = said((1.0, 1.0), dtype, unseen, **options)
    found = said((unit, unit), dtype, unseen, **scaled)
    tolerance = torch.finfo(dtype).eps ** 0.4
    for name, part, expected in zip(Said._fields, found, plain, strict=True):
        torch.testing.assert_close(
            part, expected, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("unseen", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_each_output_may_have_a_unit_of_its_own(given: bool, unseen: bool):
    def options(*lengths: float) -> dict[str, Any]:
        return {"noise_variance": tuple(0.1 * unit**2 for unit in lengths)} if given else {"noise": "per-output"}

    plain = said((1.0, 1.0), torch.float32, unseen, **options(1.0, 1.0))
    found = said((1e-6, 1e6), torch.float32, unseen, **options(1e-6, 1e6))
    torch.testing.assert_close(found.mean, plain.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(found.deviation.mean(0), plain.deviation.mean(0), rtol=0.1, atol=0)  # one prior for both
    torch.testing.assert_close(found.crps.mean(0), plain.crps.mean(0), rtol=0.05, atol=0)
    assert abs(found.nll.mean() - plain.nll.mean()) < 0.05
    assert abs(found.coverage - plain.coverage) < 0.05


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("unseen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_that_the_network_knows_follows_the_unit(dtype: torch.dtype, unseen: bool, unit: float):
    plain = said((1.0, 1.0), dtype, unseen, "heteroscedastic")
    found = said((unit, unit), dtype, unseen, "heteroscedastic")
    torch.testing.assert_close(found.mean, plain.mean, rtol=0, atol=0.05)  # of the draws
    torch.testing.assert_close(
        found.deviation.mean(0), plain.deviation.mean(0), rtol=0.15, atol=0
    )  # one prior for both
    assert abs(found.nll.mean() - plain.nll.mean()) < 0.05
    assert abs(found.coverage - plain.coverage) < 0.05


@pytest.mark.parametrize("unit", UNITS)
def test_the_prior_with_the_highest_evidence_follows_the_unit(unit: float):
    half = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    weights, outside = torch.ones(40).double(), torch.tensor(12.0).double()
    plain = prior_by_evidence(half @ half.T, outside, 40, [weights])
    found = prior_by_evidence(half @ half.T / unit**2, outside / unit**2, 40, [unit * weights])
    assert found / unit**2 == pytest.approx(plain)


def test_a_prior_is_found_for_weights_or_curvatures_of_zero():
    one, zero = torch.eye(3).double(), torch.zeros(()).double()
    assert 0 < prior_by_evidence(one, zero, 0, [torch.zeros(4)]) < 1e-6  # the data are sure that nothing is there
    assert prior_by_evidence(0 * one, zero, 0, [torch.ones(4)]) > 0


@pytest.mark.parametrize("seed", range(8))
def test_what_rounding_hides_makes_no_direction_free(seed: int):
    one, curvature = torch.ones(()).double(), torch.diag(torch.tensor([1e26, 1.0, 1.0, 1.0])).double()
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double())[0]
    root = Posterior(turned @ curvature @ turned.T, 1e6 * one, one, one, one).root()
    assert root.norm() < 1e-3  # of a prior with the deviation 1e3


def noise_of(outputs: Tensor, targets: Tensor, noise: str = "shared") -> Tensor:
    likelihood = Regression(noise=noise)
    found = likelihood.completed(likelihood.statistics(outputs, targets, torch.ones(len(targets))))
    return torch.as_tensor(found.noise_variance)


def test_the_noise_is_no_less_than_the_rounding_of_the_targets():
    targets, expected = 1e-9 * torch.ones(5, 1), (1e-9 * torch.finfo(torch.float32).eps) ** 2
    assert noise_of(targets, targets) == pytest.approx(expected, rel=1e-6, abs=0)
    assert noise_of(0 * targets, 0 * targets) > 0


def test_an_output_that_is_always_zero_has_the_noise_of_the_others():
    targets = torch.tensor([[1e-9, 0.0], [-1e-9, 0.0]])
    assert noise_of(torch.zeros(2, 2), targets, "per-output").tolist() == pytest.approx(
        [1e-18, 0.5e-18], rel=1e-6, abs=0
    )


def test_noise_needs_a_target():
    with pytest.raises(ValueError, match="no point has a target that counts"):
        noise_of(torch.zeros(0, 1), torch.zeros(0, 1))


def test_outputs_of_other_units_that_share_their_noise_are_named(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        noise_of(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
        assert not caplog.messages
        noise_of(torch.zeros(2, 2), torch.tensor([[1e-3, 2.0], [1e-3, 2.0]]))
    assert "noise='per-output'" in caplog.messages[0]
