"""Few unseen points that stand for many."""

from statistics import mean

import pytest
import torch
from conftest import make_case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_ella import fit_ella
from lightning_ella.batches import Batch
from lightning_ella.engine import Linearization
from lightning_ella.fit import _sized
from lightning_ella.likelihoods import LIKELIHOODS, Classification
from lightning_ella.settings import Settings
from lightning_ella.typical import losses, systematic


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    st.lists(st.one_of(st.floats(0, 1e6), st.just(float("nan"))), max_size=60), st.integers(1, 70), st.integers(0, 9)
)
def test_as_many_of_the_chosen_lose_more_than_any_loss_as_of_all(values: list[float], count: int, seed: int):
    given = torch.tensor(values, dtype=torch.float64)
    known = given[~given.isnan()]
    places = systematic(given, count, generator(seed))
    assert places == sorted(set(places))
    assert len(places) == min(count, len(known))
    chosen = given[places]
    assert not chosen.isnan().any()
    # Whatever a loss is compared with, the share above it is that of all, to within one of those chosen.
    for loss in known:
        share, of_all = (float((some > loss).double().mean()) for some in (chosen, known))
        assert abs(share - of_all) <= 1 / len(chosen) + 1e-9


def test_every_point_is_as_likely_as_another():
    given = torch.rand(10, dtype=torch.float64, generator=generator())
    times = torch.zeros(10)
    for seed in range(2000):
        times[systematic(given, 3, generator(seed))] += 1 / 2000
    torch.testing.assert_close(times, torch.full((10,), 0.3), rtol=0, atol=0.05)


def test_their_mean_loss_varies_less_than_that_of_random_points():
    given = torch.randn(500, generator=generator()).abs().double()
    order = [torch.randperm(500, generator=generator(seed))[:50] for seed in range(50)]
    random = [float((given[some].mean() - given.mean()).abs()) for some in order]
    chosen = [float((given[systematic(given, 50, generator(seed))].mean() - given.mean()).abs()) for seed in range(50)]
    assert mean(chosen) < mean(random) / 2


def test_the_loss_of_a_point_is_the_weighted_mean_of_its_positions():
    model, images = nn.Conv2d(1, 3, 1), torch.randn(5, 1, 2, 4)
    labels, weights = torch.randint(3, (5, 2, 4)), torch.rand(5, 2, 4)
    labels[0] = -100
    labels[1, 0] = -100
    found = losses(Linearization(model), LIKELIHOODS["classification"](), [Batch(images, labels, weights)])
    each = cross_entropy(model(images), labels, reduction="none") * weights  # 0 where nothing counts
    expected = each.sum((1, 2)) / (weights * (labels != -100)).sum((1, 2))
    assert expected[0].isnan()
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_the_scales_are_chosen_on_points_that_count(caplog: pytest.LogCaptureFixture):
    case = make_case("mlp", 40)
    case.targets[:10] = -100
    options = {"num_landmarks": 20, "rank": 4, "num_curvature": 20}
    with caplog.at_level("INFO"):
        fit_ella(case.model, case.loader(7), case.loader(7), num_calibration=8, **options)
    assert "chosen on" in caplog.text
    assert "8 unseen points" in caplog.text
    few = fit_ella(case.model, case.loader(7), case.loader(7), num_calibration=30, **options)
    every = fit_ella(case.model, case.loader(7), case.loader(7), num_calibration=None, **options)
    torch.testing.assert_close(few.temperature, every.temperature)  # the thirty that count are all that there are


def test_where_no_point_counts_the_fix_is_named():
    case = make_case("mlp", 40)
    unseen = case.loader(7)
    unseen.dataset.items = [(x, torch.tensor(-100)) for x, _ in unseen.dataset.items]
    for most in (None, 10):
        with pytest.raises(ValueError, match="no calibration point has a target"):
            fit_ella(case.model, case.loader(7), unseen, num_landmarks=20, rank=4, num_calibration=most)


class Holed(Classification):
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.where(targets == 1, torch.nan, super().log_prob(outputs, targets))


def test_a_loss_that_is_no_number_is_the_worst():
    batch = Batch(torch.randn(3, 4), torch.tensor([0, 1, -100]), None)
    found = losses(Linearization(nn.Linear(4, 2)), Holed(), [batch])
    assert found[0] < found[1] == torch.inf
    assert found[2].isnan()


@pytest.mark.parametrize(
    ("points", "rank", "expected"), [(60, 20, 60), (300, 20, 200), (600, 20, 300), (600, 250, 500), (40_000, 20, 1000)]
)
def test_half_of_the_points_are_landmarks(points: int, rank: int, expected: int):
    assert _sized(Settings(rank=rank), points).num_landmarks == expected
    assert _sized(Settings(rank=rank), points).rank == rank
