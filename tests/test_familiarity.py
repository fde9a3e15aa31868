"""Familiarity: a p-value that is one, of parts that are what they are called; in every file, program and process."""

import logging
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import ListDataset, TinyViT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast import program
from test_other_likelihoods import problem
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ella import LIKELIHOODS, ELLAPredictor, FastPredictor, Settings, familiarity, fit, fit_ella
from lightning_ella.activations import Place, both, chosen
from lightning_ella.familiarity import DIRECTIONS, PARTS, Distance, Familiarity

OPTIONS: dict[str, Any] = {"num_landmarks": 40, "rank": 4, "num_samples": 64, "residual": 8}
OPTIONS |= {"prior_variance": 1.0, "covariance_scale": 1.0, "residual_scale": 0.1, "temperature": 1.0}


def loader(*columns: Any, size: int = 50) -> DataLoader:
    return DataLoader(ListDataset(list(zip(*columns, strict=True))), size)


# The p-value ---------------------------------------------------------------------------------------------------------


def ranks_among(scores: Tensor) -> Tensor:
    """p of each of n + 1 points among all of them, by the definition: of each score, and of Fisher's sum of these."""
    p = torch.stack([(scores >= one).double().mean(0) for one in scores])  # (n + 1, J)
    sums = -p.log().sum(1)
    return torch.stack([(sums >= one - 1e-6).double().mean() for one in sums])


tables = st.integers(0, 10**6).map(lambda seed: torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)))


@given(table=tables, ties=st.booleans())
@settings(max_examples=20, deadline=None)
def test_it_is_the_rank_among_familiar_points_and_the_new_one(table: Tensor, ties: bool):
    table = table.mul(2).round() if ties else table
    known, new = table[:30], table[30:]
    found = Familiarity([], None, PARTS, known)(new)
    expected = torch.stack([ranks_among(torch.cat([known, one.unsqueeze(0)]))[-1] for one in new])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@given(table=tables, correlated=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_of_exchangeable_points_no_more_are_foreign_than_it_says(table: Tensor, correlated: float):
    table = table + 10 * correlated * table[:, :1]  # however the scores depend on each other
    left_out = torch.arange(len(table))
    p = torch.stack([Familiarity([], None, PARTS, table[left_out != i])(table[i : i + 1])[0] for i in left_out])
    for level in torch.arange(1, 41) / 40:
        assert (p <= level + 1e-6).sum() <= level * 40 + 1e-4


@given(table=tables, seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_neither_order_nor_batch_nor_scale_matters(table: Tensor, seed: int):
    known, new = table[:30], table[30:]
    found = Familiarity([], None, PARTS, known)(new)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(Familiarity([], None, PARTS, known[order])(new), found)
    torch.testing.assert_close(torch.cat([Familiarity([], None, PARTS, known)(one) for one in new.split(3)]), found)
    torch.testing.assert_close(Familiarity([], None, PARTS, 1e3 * known)(1e3 * new), found)


def test_what_is_more_foreign_than_all_has_the_least_and_what_is_not_known_has_none():
    known = torch.rand(99, 2)
    new = torch.tensor([[2.0, 2.0], [-1.0, -1.0], [torch.nan, 0.5], [torch.inf, torch.inf]])
    found = Familiarity([], None, PARTS[:2], known)(new)
    assert found[0] == found[3] == pytest.approx(0.01)
    assert found[1] == 1
    assert found[2].isnan()


# Its parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 40, 2 * DIRECTIONS])
def test_the_distance_is_mahalanobis_s(width: int):
    torch.manual_seed(0)
    mixing = torch.randn(width, width) / width**0.5
    known, new = torch.randn(500, width) @ mixing + 3, 2 * torch.randn(10, width) @ mixing
    distance = Distance.of(known)
    assert distance is not None
    rank = distance.directions.shape[1]
    assert rank == min(DIRECTIONS, width - 1)
    values, deviation = known.double(), known.double().std(0)
    values = (values - values.mean(0)) / deviation
    variances, directions = torch.linalg.eigh(values.T @ values / len(values))
    variances[: width - rank] = variances[: width - rank].mean()
    precision = directions @ torch.diag(1 / variances) @ directions.T
    away = (new.double() - known.double().mean(0)) / deviation
    torch.testing.assert_close(
        distance(new).double(), torch.einsum("bi,ij,bj->b", away, precision, away) / width, rtol=1e-4, atol=0
    )
    assert float(distance(known).mean()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_few_points_or_dead_activations_have_a_distance_or_none(count: int):
    known = torch.randn(count, 5)
    known[:, 2] = 7.0
    distance = Distance.of(known)
    assert (distance is None) == (count < 2)
    if distance is not None:
        far = torch.full((1, 5), 100.0)
        assert distance(known).isfinite().all()
        assert distance(far) > 10 * distance(known).max()
    assert Distance.of(torch.ones(10, 4)) is None


class Tokens(nn.Module):
    """A small transformer on tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def vectors(y: Tensor) -> Tensor:
    return torch.randn(len(y), 6) + nn.functional.one_hot(y, 6) * 3


def images(y: Tensor) -> Tensor:
    return torch.randn(len(y), 3, 8, 8) + y.view(-1, 1, 1, 1)


def series(y: Tensor) -> Tensor:
    return torch.randn(len(y), 7, 3).cumsum(1) + y.view(-1, 1, 1)


def tokens(y: Tensor) -> Tensor:
    return (torch.randint(0, 6, (len(y), 7)) + 5 * y.unsqueeze(1)).clamp_max(19)


def cnn() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, outputs))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], str]] = {
    "perceptron": (lambda: mlp(3), vectors, "classification"),
    "numbers": (lambda: mlp(1), vectors, "regression"),
    "convolutions": (cnn, images, "classification"),
    "recurrent": (Recurrent, series, "classification"),
    "tokens": (Tokens, tokens, "classification"),
    "vision transformer": (TinyViT, lambda y: images(y)[:, :1], "classification"),
}


def trained(name: str) -> tuple[nn.Module, DataLoader, DataLoader, Callable[[int], Tensor], str]:
    """A network after a few steps, its training points, unseen ones, and a source of more."""
    torch.manual_seed(0)
    build, inputs, likelihood = NETWORKS[name]
    model, many = build(), 3

    def draw(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(many, (count,))
        return inputs(y), (y if likelihood == "classification" else y.float().unsqueeze(1) + torch.randn(count, 1))

    x, y = draw(400)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy if likelihood == "classification" else nn.functional.mse_loss
        loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), loader(x, y), loader(*draw(300)), lambda count: draw(count)[0], likelihood


@pytest.mark.parametrize("name", NETWORKS)
def test_of_fresh_points_one_in_twenty_is_called_foreign(name: str):
    model, train, unseen, fresh, likelihood = trained(name)
    options = {"num_landmarks": 100, "rank": 5, "residual": 10}
    predictor = fit_ella(model, train, unseen, likelihood=likelihood, **options)
    x = fresh(1500)
    for ask, count in ((predictor, 300), (predictor.distil(unseen), 100)):
        assert len(ask.familiarity.scores) == count  # a student goes by what it says itself
        found = torch.cat([ask(part).familiarity for part in x.split(500)])
        assert found.min() > 0
        assert found.max() <= 1
        for level in (0.05, 0.2):
            error = (level * (1 - level) * (1 / count + 1 / len(x))) ** 0.5
            assert abs(float((found <= level).double().mean()) - level) < 3.5 * error + 1 / count
        if x.is_floating_point():
            assert ask(30 * torch.randn_like(x[:200])).familiarity.median() < 0.05


# Where it is, and where it is not ------------------------------------------------------------------------------------


def small(name: str = "classification", **options: Any) -> tuple[ELLAPredictor, Tensor, DataLoader]:
    model, x, _, points = problem(name)
    options = OPTIONS | ({"noise_variance": 0.3} if name == "regression" else {}) | options
    return fit_ella(model, points, points, likelihood=name, **options), x, points


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_says_what_it_can(name: str):
    predictor, x, points = small(name)
    has_energy = name in ("classification", "multilabel", "binary")
    for ask in (predictor, predictor.distil(points)):
        out = ask(x)
        assert out.novelty.shape == out.distance.shape == out.familiarity.shape == (60,)
        assert (out.energy is not None) == has_energy
        assert ask.familiarity.parts == tuple(PARTS[: 2 + has_energy])
    assert (small(name, residual=0)[0].familiarity.parts) == tuple(PARTS[1 : 2 + has_energy])


def test_energies_are_those_of_the_literature():
    f = torch.randn(5, 4, dtype=torch.float64)
    energies = {name: LIKELIHOODS[name]().energy(f) for name in ("classification", "multilabel")}
    torch.testing.assert_close(energies["classification"], -f.exp().sum(1).log())
    torch.testing.assert_close(energies["multilabel"], -(1 + f.exp()).log().sum(1))
    one = f[:, :1]
    torch.testing.assert_close(LIKELIHOODS["binary"]().energy(one), LIKELIHOODS["binary"]().energy(-one))


def test_through_views_scores_are_averages():
    views = [lambda x: x.flip(1), lambda x: -x]
    predictor, x, points = small(views=views)
    plain = fit_ella(predictor.model, points, points, **OPTIONS)
    for name in ("novelty", "distance", "energy"):
        alone = [getattr(plain(seen), name) for seen in (x, x.flip(1), -x)]
        torch.testing.assert_close(getattr(predictor(x), name), torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)
    assert predictor.familiarity is not None
    known = torch.stack([getattr(predictor(x), name) for name in PARTS], 1).float()
    torch.testing.assert_close(predictor.familiarity.scores.sort(0).values, known.sort(0).values, rtol=1e-4, atol=1e-5)


def test_it_is_calibrated_on_points_apart_where_there_are_enough(monkeypatch: pytest.MonkeyPatch):
    model, train, unseen, _, _ = trained("perceptron")
    visits, cached = [], fit._cached

    def watched(linearization: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        batches = list(batches)
        visits.append({tuple(x.tolist()) for inputs, *_ in batches for x in inputs})
        return cached(linearization, batches, *args, **kwargs)

    monkeypatch.setattr(fit, "_cached", watched)
    options = {"num_landmarks": 50, "rank": 4}
    predictor = fit_ella(model, train, unseen, num_calibration=100, num_apart=60, **options)
    tuned, apart = visits
    assert len(tuned) == 100
    assert len(apart) == len(predictor.familiarity.scores) == 60
    assert not tuned & apart
    for none_apart in ({"num_calibration": 290}, {"num_apart": 0, "num_calibration": 100}):
        visits.clear()
        assert fit_ella(model, train, unseen, **none_apart, **options)(next(iter(unseen))[0]).familiarity is not None
        assert len(visits) == 1
    with pytest.raises(ValueError, match="num_apart=-1 must be a whole number of at least 0"):
        Settings(num_apart=-1)


def test_there_is_none_where_it_could_not_be_right():
    model, x, _, points = problem("classification")
    assert fit_ella(model, points, **OPTIONS)(x).familiarity is None  # no unseen points
    positions = zoo.CASES["segmentation"]
    inputs = positions.inputs(24, 0)
    y = torch.randint(3, positions.build().eval()(inputs)[:, 0].shape)
    options = OPTIONS | {"num_landmarks": 20}
    out = fit_ella(positions.build(), loader(inputs, y), loader(inputs, y), **options)(inputs[:3])
    assert out.novelty is not None
    assert out.familiarity is None


class Skips(nn.Module):
    """A branch that some inputs do not take."""

    def __init__(self):
        super().__init__()
        self.body, self.branch, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).tanh()
        return self.head(self.branch(x) if (x[:, 0] > -2).all() and len(x) < 50 else x)


def test_where_a_branch_is_not_taken_there_is_nothing_to_say_and_predictions_are_as_before():
    torch.manual_seed(0)
    x, y = torch.randn(120, 3), torch.randint(3, (120,))
    predictor = fit_ella(Skips(), loader(x, y, size=20), loader(x, y, size=20), **OPTIONS)
    assert predictor(x[:40]).familiarity.isfinite().all()
    out = predictor(x)  # many at once go another way
    assert out.familiarity.isnan().all()
    assert out.probs.isfinite().all()


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.filterwarnings("ignore")
def test_files_pickles_copies_and_programs_say_the_same(tmp_path: Path, kind: str):
    model, train, unseen, fresh, _ = trained("convolutions")
    predictor = fit_ella(model, train, unseen, num_landmarks=50, rank=4)
    fast, x = predictor.distil(unseen, layers=["3"]), fresh(20)
    assert [place.module for place in fast.places] == ["3"]
    for head, kind_of_head in ((predictor, ELLAPredictor), (fast, FastPredictor)):
        expected = head(x)
        loaded = kind_of_head.load(head.save(tmp_path / "head"), model)
        for other in (loaded, pickle.loads(pickle.dumps(head)), deepcopy(head)):
            for name in ("familiarity", *PARTS):
                torch.testing.assert_close(getattr(other(x), name), getattr(expected, name), rtol=0, atol=0)
    said = program(fast.export(tmp_path / f"program.{kind}", x[:2]), x)
    torch.testing.assert_close(said["familiarity"], fast(x).familiarity, rtol=0, atol=0.01)
    assert predictor.double()(x.double()).familiarity.isfinite().all()


def test_activations_are_found_among_those_of_more_places():
    places = [Place("a", 0, 0, 1, 2, True), Place("b", 0, 0, 1, 3, False), Place("c", 0, 0, 1, 1, True)]
    pooled = torch.arange(9.0).view(1, 9)  # means of a, b and c, deviations of a and c
    assert chosen(pooled, places[2:], places).tolist() == [[5, 8]]
    assert chosen(pooled, [places[1], places[0]], places).tolist() == [[2, 3, 4, 0, 1, 6, 7]]
    assert chosen(pooled, [], places).shape == (1, 0)
    assert both(places[:2], places[1:]) == places


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scores", torch.zeros(3, 2)),
        ("scores", torch.zeros(0, 3)),
        ("distance.mean", torch.zeros(1)),
        ("distance.mean", None),
        ("scores", torch.zeros(())),
        ("distance.directions", torch.zeros(2, 2)),
        ("more", torch.zeros(1)),
    ],
)
def test_a_file_with_odd_tensors_is_refused(tmp_path: Path, part: str, value: Tensor | None):
    from safetensors.torch import load_file
    from test_artefact import FORMAT, artefact

    predictor, *_ = small()
    path = predictor.save(tmp_path / "posterior")
    tensors, (_, metadata) = load_file(path), artefact.read(path, FORMAT)
    tensors.pop(f"familiarity.{part}", None)
    artefact.write(path, tensors | ({} if value is None else {f"familiarity.{part}": value}), metadata)
    with pytest.raises(ValueError, match=r"cannot be read as a posterior|not those of a posterior"):
        ELLAPredictor.load(path, predictor.model)


def test_predictions_can_be_moved_field_by_field():
    predictor, x, _ = small()
    names = {field.name for field in fields(predictor(x))}
    assert {"familiarity", *PARTS} <= names


# What is no score, and what is far -----------------------------------------------------------------------------------


def test_what_is_farther_than_all_training_points_is_more_foreign_the_farther():
    torch.manual_seed(0)
    distance = Distance.of(torch.randn(200, 5))
    known = torch.stack([torch.rand(99), distance(torch.randn(99, 5)), torch.rand(99)], 1)
    made = Familiarity([Place("a", 0, 0, 1, 5, False)], distance, PARTS, known)
    far = torch.tensor([[0.0, float(distance.farthest) * by, 0.0] for by in (1, 100, 1e6)])  # by one score alone
    found = made(far)
    assert found[0] > 0.05
    assert found[0] > found[1] >= found[2] == pytest.approx(0.01)
    torch.testing.assert_close(distance.beyond(distance.farthest * torch.tensor([0.5, 1, torch.e])), torch.eye(3)[2])


@pytest.mark.parametrize("size", [1e10, 1e18, 1e30])
def test_what_is_very_far_has_the_least_and_not_nothing(size: float):
    model, train, unseen, fresh, _ = trained("perceptron")
    predictor = fit_ella(model, train, unseen, num_landmarks=50, rank=4)
    for ask in (predictor, predictor.distil(unseen)):
        assert ask(size * fresh(10)).familiarity.max() < 0.05


def test_rounding_is_no_score():
    model, train, unseen, fresh, _ = trained("perceptron")
    certain = nn.Sequential(model, nn.LogSoftmax(-1))  # whose energy is 0
    predictor, x = fit_ella(certain, train, unseen, num_landmarks=50, rank=4), fresh(40)
    assert predictor.familiarity.parts == PARTS[:2]
    alone = torch.cat([predictor(one).familiarity for one in x.split(1)])
    assert (alone - predictor(x).familiarity).abs().max() < 3 / 300
    points = loader(torch.randn(100, 3), torch.randn(100, 1))
    spanned = fit_ella(nn.Linear(3, 1), points, points, likelihood="regression", num_landmarks=40, rank=4, residual=4)
    assert spanned(torch.randn(5, 3)).familiarity is None  # the directions span all parameters


class Words(nn.Module):
    """A reader that leaves padding out by itself."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens != 0).unsqueeze(-1)
        return self.head((self.body(self.embed(tokens)).relu() * there).sum(1) / there.sum(1).clamp_min(1))


def test_padding_that_the_outputs_do_not_see_is_not_seen():
    torch.manual_seed(0)
    lengths = torch.randint(2, 13, (200, 1))
    x = torch.randint(1, 20, (200, 12)) * (torch.arange(12) < lengths)
    points = loader(x, torch.randint(3, (200,)))
    predictor = fit_ella(Words(), points, points, num_landmarks=50, rank=4)
    assert predictor.familiarity.distance is None
    short = x[lengths.squeeze() <= 6]
    for ask in (predictor, predictor.distil(points)):
        assert (ask(short).familiarity - ask(short[:, :6]).familiarity).abs().max() < 3 / 50


def test_a_branch_that_a_student_does_not_look_at_costs_it_nothing_else():
    torch.manual_seed(0)
    x, y = torch.randn(120, 3), torch.randint(3, (120,))
    points = loader(x, y, size=20)
    predictor = fit_ella(Skips(), points, points, **OPTIONS)
    fast = predictor.distil(points, layers=["body"])
    assert fast(x[:40]).familiarity.isfinite().all()
    assert fast(x).familiarity.isnan().all()
    assert fast(x).probs.isfinite().all()


class PickyAboutNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 7:
            raise RuntimeError("no seven")
        return self.body(x)


def test_a_network_that_cannot_be_looked_at_is_fitted_as_before(caplog: pytest.LogCaptureFixture):
    points = loader(vectors(torch.arange(60) % 3), torch.arange(60) % 3)
    with caplog.at_level(logging.INFO, "lightning_ella"):
        predictor = fit_ella(PickyAboutNumbers(), points, points, num_landmarks=40, rank=4)
    assert "goes without the distance of activations, which cannot be looked at: no seven" in caplog.text
    assert predictor.familiarity.parts == ("novelty", "energy")


def test_few_points_are_named_and_those_without_labels_are_not_counted(caplog: pytest.LogCaptureFixture):
    model, train, unseen, _, _ = trained("perceptron")
    x, y = (torch.cat(part) for part in zip(*unseen, strict=True))
    y[30:] = -100
    options = {"num_landmarks": 50, "rank": 4}
    predictor = fit_ella(model, train, loader(x, y), num_calibration=250, num_apart=20, **options)
    assert predictor.guaranteed is None
    assert len(predictor.familiarity.scores) > 20
    with caplog.at_level(logging.INFO, "lightning_ella"):
        fit_ella(model, train, loader(x[:9], y[:9]), **options)
    assert "9 familiar points are few: familiarity is never below 0.1" in caplog.text


def test_with_the_likeliest_outputs_it_goes_without_what_hangs_on_the_temperature():
    model, train, unseen, fresh, _ = trained("perceptron")
    predictor = fit_ella(model, train, unseen, num_landmarks=50, rank=4, top_outputs=1)
    assert predictor.familiarity.parts == ("distance", "energy")
    out = predictor(fresh(500))
    assert out.novelty is not None
    assert abs(float((out.familiarity <= 0.2).double().mean()) - 0.2) < 0.08


class Named(nn.Module):
    def __init__(self, named: bool):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        if named:
            self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self, "act", torch.tanh)(self.body(x)))


def test_a_module_that_lost_its_name_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    model, other = Named(True), Named(False)
    other.load_state_dict(model.state_dict())
    points = loader(vectors(torch.arange(60) % 3), torch.arange(60) % 3)
    predictor = fit_ella(model, points, points, num_landmarks=40, rank=4)
    path, x = predictor.save(tmp_path / "posterior"), next(iter(points))[0]
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        loaded = ELLAPredictor.load(path, other)
    assert "looks at 'act', which the network has not" in caplog.text
    assert loaded(x).familiarity is None
    torch.testing.assert_close(loaded(x).probs, predictor(x).probs)


def test_many_inputs_are_ranked_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch):
    predictor, x, _ = small()
    expected = predictor(x).familiarity
    monkeypatch.setattr(familiarity, "AT_ONCE", 7)
    torch.testing.assert_close(predictor(x).familiarity, expected, rtol=0, atol=0)
