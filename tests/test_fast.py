"""The student: right where it is exact, close where it learns, refused where it cannot; its files and programs."""

import json
import logging
import pickle
import random
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import zoo
from conftest import ListDataset, TinyViT, at_a_time
from hypothesis import given, settings
from hypothesis import strategies as st
from test_callback import Data, Net, make_trainer
from test_other_likelihoods import problem
from test_zoo import fit, outputs_of, targets
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ella import LIKELIHOODS, ELLACallback, ELLAPredictor, FastPredictor, artefact, fit_ella, student
from lightning_ella.activations import find_places
from lightning_ella.fast import _DESCRIBED, FORMAT
from lightning_ella.likelihoods import Classification
from lightning_ella.linearize import Network
from lightning_ella.numerics import spread_normal
from lightning_ella.perturb import perturbed
from lightning_ella.posterior import Posterior
from lightning_ella.predictions import CLOSED_FORMS, Gaussian, Spread
from lightning_ella.student import Said, Translation, lesson

OPTIONS = {"num_landmarks": 40, "rank": 4, "num_samples": 64, "residual": 3}
OPTIONS |= {"prior_variance": 1.0, "covariance_scale": 1.0, "residual_scale": 0.1, "temperature": 1.0}


def loader(*columns: Any, size: int = 16) -> DataLoader:
    return DataLoader(ListDataset(list(zip(*columns, strict=True))), size)


def taught(name: str = "classification", **options: Any) -> tuple[ELLAPredictor, FastPredictor, Tensor, Tensor]:
    """An exact predictor, its student, and 60 inputs with targets that it learnt from."""
    model, x, y, points = problem(name)
    options = OPTIONS | ({"noise_variance": 0.3} if name == "regression" else {}) | options
    predictor = fit_ella(model, points, likelihood=name, **options)
    return predictor, predictor.distil(points), x, y


# What needs no learning ----------------------------------------------------------------------------------------------


def spread(num_samples: int = 40_000) -> Spread:
    torch.manual_seed(0)
    mean, factor, own = torch.randn(5, 3), torch.randn(5, 3, 2), torch.rand(5, 3)
    return Spread(mean, factor, spread_normal(num_samples, 5, 0), own=own)


def test_shared_and_own_deviations_have_the_covariance_of_their_samples():
    gaussian = spread()
    samples = gaussian.samples()
    away = samples - samples.mean(0)
    found = torch.einsum("sbc,sbd->bcd", away, away) / len(away)
    torch.testing.assert_close(samples.mean(0), gaussian.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(found, gaussian.covariance, rtol=0.02, atol=0.02)
    torch.testing.assert_close(gaussian.variance, gaussian.covariance.diagonal(dim1=1, dim2=2))
    centre = torch.eye(3) - 1 / 3
    dense = (centre @ gaussian.covariance @ centre).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(gaussian.centred_variance, dense)
    torch.testing.assert_close((gaussian / torch.tensor(2.0)).covariance, gaussian.covariance / 4)


@pytest.mark.parametrize("closed", CLOSED_FORMS)
def test_closed_forms_know_the_own_deviations(closed: str):
    gaussian = spread(8)
    as_one = Gaussian(
        gaussian.mean, torch.cat([gaussian.factor, torch.diag_embed(gaussian.own)], -1), torch.zeros(1, 5)
    )
    torch.testing.assert_close(CLOSED_FORMS[closed](gaussian), CLOSED_FORMS[closed](as_one))


def test_what_is_done_in_parts_is_what_is_done_at_once(monkeypatch: pytest.MonkeyPatch):
    gaussian = spread(64)
    whole, likelihood = gaussian.samples(), Classification()
    labels = torch.tensor([0, 1, 2, -100, 1])
    expected = likelihood.nll(likelihood.predict(gaussian, "mc", torch.ones(())), labels)
    at_a_time(monkeypatch, outputs=7)
    torch.testing.assert_close(torch.cat(list(gaussian.in_parts())), whole)
    torch.testing.assert_close(torch.cat([part.samples() for part in gaussian.rows()], 1), whole)
    found = likelihood.nll(likelihood.predict(gaussian, "mc", torch.ones(())), labels)
    torch.testing.assert_close(found, expected)
    dense = -(whole.softmax(-1).mean(0)[torch.arange(5), labels.clamp_min(0)]).log()
    torch.testing.assert_close(found, torch.where(labels >= 0, dense, 0))


@pytest.mark.parametrize("invariant", [True, False])
def test_a_student_that_is_right_has_the_posterior_s_mean_and_covariance_wherever_it_moves(invariant: bool):
    torch.manual_seed(0)

    logits, features = torch.randn(6, 3).double(), torch.randn(6, 3, 4 + 5).double()
    one, curvature = torch.ones(()).double(), torch.randn(4, 4).double()
    before = Posterior(curvature @ curvature.T, one, one, one / 2, one)
    factor = torch.randn(4, 4).double()
    moved = replace(before, mean=torch.randn(4).double(), precision=factor @ factor.T + 0.1 * torch.eye(4))
    exact = lesson(torch.zeros(6, 0), logits, features, before.root(), invariant=invariant)
    said = Said(*(part.double() for part in exact[2:]))
    translation = Translation(before.root(), torch.zeros(1, 7)).double()
    centred = features - features.mean(1, keepdim=True) if invariant else features
    for posterior in (before, moved, before):
        found = translation.follow(posterior)(logits, said)
        mean = torch.zeros(4).double() if posterior.mean is None else posterior.mean
        torch.testing.assert_close(found.mean, logits + centred[..., :4] @ mean, rtol=1e-5, atol=1e-5)
        inside = centred[..., :4] @ posterior.root()
        torch.testing.assert_close(found.factor @ found.factor.mT, inside @ inside.mT, rtol=1e-5, atol=1e-5)
        outside = centred[..., 4:].square().sum(-1) / 2
        torch.testing.assert_close(found.variance, inside.square().sum(-1) + outside, rtol=1e-5, atol=1e-5)


def test_evenly_spread_draws_are_normal_and_the_same_each_time():
    draws = spread_normal(4096, 6, 3)
    assert torch.equal(draws, spread_normal(4096, 6, 3))
    torch.testing.assert_close(draws.mean(0), torch.zeros(6), rtol=0, atol=0.01)
    torch.testing.assert_close(draws.T @ draws / 4096, torch.eye(6), rtol=0, atol=0.03)


# What it learns ------------------------------------------------------------------------------------------------------


class Rings(nn.Module):
    """Points in the plane, three classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def rings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    angle = 6.3 * torch.rand(count, generator=generator)
    radius = 1 + y + 0.35 * torch.randn(count, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


@pytest.fixture(scope="module")
def learned() -> tuple[ELLAPredictor, FastPredictor]:
    torch.manual_seed(0)
    model, (x, y) = Rings(), rings(300, 0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    predictor = fit_ella(model, loader(x, y), loader(*rings(300, 1)), num_landmarks=300, rank=10)
    return predictor, predictor.distil(loader(*rings(600, 2)), num_points=400)


def nll(predictor: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(predictor.likelihood.nll(predictor(x), y).mean())


def test_a_student_says_nearly_what_its_teacher_does(learned):
    predictor, fast = learned
    x, y = rings(1000, 5)
    a, b = predictor(x), fast(x)
    torch.testing.assert_close(b.logits_mean, a.logits_mean)
    assert (a.probs - b.probs).abs().mean() < 0.03
    assert abs(nll(fast, x, y) - nll(predictor, x, y)) < 0.02 * nll(predictor, x, y)
    assert float(torch.corrcoef(torch.stack([a.novelty.logit(), b.novelty.logit()]))[0, 1]) > 0.9
    assert float(torch.corrcoef(torch.stack([a.mutual_information, b.mutual_information]))[0, 1]) > 0.9


def test_its_figures_are_what_can_be_measured_and_it_warns_where_they_are_poor(learned, caplog, monkeypatch):
    predictor, fast = learned
    assert {"variance_correlation", "novelty_correlation", "variance_correlation_changed"} <= fast.figures.keys()
    assert 0.8 < fast.figures["variance_correlation"] < 1
    assert fast.figures["nll"] == pytest.approx(fast.figures["nll_exact"], abs=2 * fast.figures["nll_error"])
    with caplog.at_level(logging.INFO, "lightning_ella"):
        predictor.distil(loader(*rings(200, 2)))
        assert "a student was taught on" in caplog.text
        assert "follows the exact predictor loosely" not in caplog.text
        monkeypatch.setattr(student, "EPOCHS", 1)
        predictor.distil(loader(*rings(200, 2)))
        assert "follows the exact predictor loosely (variance_correlation" in caplog.text
    predictor.adopt(fast)


def test_a_student_follows_what_is_learnt_afterwards_and_forgets_it(learned):
    predictor, fast = learned
    x, y = rings(200, 6)
    points = loader(x[:60] + 0.4, y[:60])
    before, first = predictor(x + 0.4), fast(x + 0.4)
    predictor.update(points, drift=0.05)
    exact, close = ((p(x + 0.4).logits.mean - q.logits.mean) for p, q in ((predictor, before), (fast, first)))
    exact, close = (moved - moved.mean(1, keepdim=True) for moved in (exact, close))
    assert exact.norm() > 1  # it moves
    assert (exact - close).norm() < 0.4 * exact.norm()
    predictor.forget(points)
    torch.testing.assert_close(fast(x + 0.4).logits.samples(), first.logits.samples(), rtol=0, atol=0)


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_neither_order_nor_batch_changes_an_answer(learned, data: st.DataObject):
    fast, (x, _) = learned[1], rings(20, 7)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=20)))
    whole, part = fast(x), fast(x[chosen])
    torch.testing.assert_close(part.probs, whole.probs[chosen], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(part.novelty, whole.novelty[chosen], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_has_a_student_with_the_same_names(name: str):
    predictor, fast, x, y = taught(name)
    exact, close = predictor(x), fast(x)
    assert type(exact) is type(close)
    names = [each for each in dir(type(exact)) if not each.startswith("_") and each not in ("logits_covariance",)]
    for each in names:
        if isinstance(getattr(type(exact), each), property) or hasattr(getattr(type(exact), each), "func"):
            if each == "tempered":
                continue
            a, b = getattr(exact, each), getattr(close, each)
            for one, other in zip(a if isinstance(a, tuple) else [a], b if isinstance(b, tuple) else [b], strict=True):
                assert one.shape == other.shape, each
                assert other.isfinite().all(), each
    assert exact.log_prob(y).shape == close.log_prob(y).shape
    assert exact.sample().shape[1:] == close.sample().shape[1:]
    if name not in ("classification", "binary", "multilabel", "preference", "ordinal"):
        assert (close.interval(0.5)[0] <= close.interval(0.5)[1]).all()
    for ask in (lambda: close.logits.joint, lambda: close.logits - close.logits):
        with pytest.raises(ValueError, match="ask the exact predictor"):
            ask()


@pytest.mark.parametrize("options", [{"residual": 0}, {"predictive": "probit"}, {"predictive": "bridge"}])
def test_other_settings_have_students(options: dict[str, Any]):
    predictor, fast, x, _ = taught(**options)
    assert (fast(x).novelty is None) == (predictor(x).novelty is None)
    assert fast(x).probs.sum(-1).allclose(torch.ones(60).double())


def test_networks_and_random_numbers_are_as_before(learned):
    predictor, _ = learned
    model = predictor.model.train()
    state, keep = deepcopy(model.state_dict()), predictor.fast
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    fast = predictor.distil(loader(*rings(40, 2)))
    fast(rings(4, 0)[0])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(numbers[0], after[0])
    assert numbers[1:] == after[1:]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    predictor.adopt(keep)
    model.eval()


def test_the_same_student_twice(learned):
    predictor, fast = learned
    x = rings(10, 8)[0]
    again = predictor.distil(loader(*rings(600, 2)), num_points=400)
    torch.testing.assert_close(again(x).logits.samples(), fast(x).logits.samples(), rtol=0, atol=0)
    predictor.adopt(fast)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_a_pickle_and_a_copy_say_the_same(learned, tmp_path: Path):
    predictor, fast = learned
    x = rings(10, 8)[0]
    path = fast.save(tmp_path / "fast.safetensors")
    copies = FastPredictor.load(path, predictor.model), pickle.loads(pickle.dumps(fast)), deepcopy(predictor).fast
    for other in copies:
        assert torch.equal(other(x).probs, fast(x).probs)
        assert other.figures == fast.figures


def test_files_of_other_things_are_refused(learned, tmp_path: Path):
    predictor, fast = learned
    path, exact = fast.save(tmp_path / "fast.safetensors"), predictor.save(tmp_path / "ella.safetensors")
    with pytest.raises(ValueError, match="not a file of the format"):
        FastPredictor.load(exact, predictor.model)
    with pytest.raises(ValueError, match="other layers"):
        FastPredictor.load(path, nn.Linear(2, 3))
    other = deepcopy(predictor.model)
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(ValueError, match="was fitted at other weights"):
        FastPredictor.load(path, other)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        FastPredictor.load(path, predictor.model)


@pytest.mark.parametrize("change", ["write", "replace", "module"])
def test_weights_that_change_are_refused(change: str):
    _, fast, x, _ = taught()
    last = fast.model[-1]
    with torch.no_grad():
        if change == "write":
            last.bias.add_(1)
        elif change == "replace":
            last.bias = nn.Parameter(last.bias + 1)
        else:
            fast.model[-1] = nn.Linear(5, last.out_features).double()
    with pytest.raises(ValueError, match="fitted at other weights"):
        fast(x)


# Networks ------------------------------------------------------------------------------------------------------------


WITHOUT = dict.fromkeys(("segmentation", "OutputsOfEachToken"), "one row of outputs an input")
WITHOUT |= {"NormOnlyForSome": "pass layers= without it"}


@pytest.mark.parametrize("name", zoo.CASES)
@pytest.mark.filterwarnings("ignore")
def test_every_network_of_the_zoo_has_a_student_or_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(student, "EPOCHS", 1)
    case = zoo.CASES[name]
    model, x = case.build(), case.inputs(12, 3)
    predictor = fit(case, model, case.inputs(24, 0), "auto")
    state = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    points = [(x, targets(case, outputs_of(case, case.build(), x)))]
    if name in WITHOUT:
        with pytest.raises(ValueError, match=WITHOUT[name]):
            predictor.distil(points)
        return
    fast = predictor.distil(points)
    exact, close, alone = predictor(x), fast(x), fast(zoo.pick(x, slice(3, 4)))
    torch.testing.assert_close(close.logits_mean, exact.logits_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.logits_variance, close.logits_variance[3:4], rtol=1e-3, atol=1e-5)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


class Encoder(nn.Module):
    """As Hugging Face's: tokens with a mask, averaged where it is 1."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(50, 8)
        layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0) for _ in range(2)]
        self.layer = nn.ModuleList(layers)
        self.classifier = nn.Linear(8, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"].bool()
        x = self.embeddings(inputs["input_ids"])
        for layer in self.layer:
            x = layer(x, src_key_padding_mask=~mask)
        weights = mask.to(x).unsqueeze(-1)
        return self.classifier((weights * x).sum(1) / weights.sum(1))


def texts(count: int, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(length) < torch.randint(3, length - 2, (count, 1), generator=generator)
    tokens = torch.randint(1, 50, (count, length), generator=generator)
    return {"input_ids": tokens * mask, "attention_mask": mask.long()}


@pytest.fixture(scope="module")
def reader() -> tuple[Encoder, FastPredictor]:
    torch.manual_seed(0)
    model, x = Encoder(), texts(80)
    points = [(x, torch.randint(3, (80,)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = fit_ella(model, points, points, num_landmarks=40, rank=4)
        return model, predictor.distil(points)


def test_padding_changes_nothing(reader):
    _, fast = reader
    x = texts(6)
    longer = {name: nn.functional.pad(value, (0, 4)) for name, value in x.items()}
    torch.testing.assert_close(fast(longer).probs, fast(x).probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast(longer).novelty, fast(x).novelty, rtol=1e-4, atol=1e-5)
    assert {place.module for place in fast.places} >= {"embeddings", "layer.1.norm2"}


def test_tokens_are_changed_and_masks_are_not():
    x = texts(30)
    before = deepcopy(x)
    changed = perturbed(x, torch.Generator().manual_seed(0))
    assert torch.equal(changed["attention_mask"], x["attention_mask"])
    assert 0.1 < (changed["input_ids"] != x["input_ids"]).float().mean() < 0.9
    for column in range(9):  # those of other samples at the same place, so that categories stay in range
        assert set(changed["input_ids"][:, column].tolist()) <= set(x["input_ids"][:, column].tolist())
    assert all(torch.equal(x[name], before[name]) for name in x)


@pytest.mark.parametrize("shape", [(40, 3), (40, 7, 5), (40, 3, 8, 6), (40, 2, 4, 4, 4)])
def test_real_inputs_are_changed_each_in_one_way_and_the_same_each_time(shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    changed = perturbed([x, "text", (x[:, :2], 3)], torch.Generator().manual_seed(0))
    assert changed[1] == "text"
    assert changed[2][1] == 3
    assert torch.equal(x, before)
    assert changed[0].shape == x.shape
    assert changed[0].isfinite().all()
    assert ((changed[0] != x).flatten(1).any(1)).float().mean() > 0.8
    assert torch.equal(changed[0], perturbed(x, torch.Generator().manual_seed(0)))


def test_places_are_stem_and_stages_blocks_or_layers():
    def places(model: nn.Module, x: Tensor, layers: Any = None) -> list[str]:
        network = Network(model.eval())
        network.settle(x)
        return [place.module for place in find_places(network, x, layers)]

    pictures = torch.randn(3, 3, 32, 32)
    resnet = torchvision.models.resnet18(weights=None, num_classes=3)
    assert places(resnet, pictures)[-4:] == ["layer2", "layer3", "layer4", "avgpool"]
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=12)
    assert sum(name.startswith("blocks.") for name in places(vit, pictures)) >= 6
    assert places(resnet, pictures, ["layer4*", "bn1"])[0] == "bn1"
    with pytest.raises(ValueError, match=r"layers='stage' chooses none of the network's modules \(conv1, "):
        places(resnet, pictures, "stage")


@dataclass
class Parts:
    values: Tensor
    padding_mask: Tensor
    name: str = "x"


def test_inputs_of_every_kind_are_changed_but_masks_and_what_is_missing():
    torch.manual_seed(0)
    mask = torch.where(torch.rand(30, 4) < 0.5, 0.0, -torch.inf)
    values = torch.randn(30, 4).index_fill(1, torch.tensor([2]), torch.nan)
    inputs = {
        "numbers": torch.randn(30),
        "parts": Parts(values, torch.rand(30, 4)),
        "bias": mask,
        "seen": (torch.rand(30, 4) < 0.5).float(),
        "wave": torch.randn(30, 4, dtype=torch.cfloat),
        "lengths": torch.arange(30),
    }
    changed = perturbed(inputs, torch.Generator().manual_seed(0))
    assert isinstance(changed["parts"], Parts)
    assert not torch.equal(changed["numbers"], inputs["numbers"])
    assert not torch.equal(changed["wave"], inputs["wave"])
    assert not torch.equal(changed["parts"].values[:, 0], values[:, 0])
    assert torch.equal(changed["parts"].values.isnan(), values.isnan())
    assert torch.equal(changed["parts"].padding_mask, inputs["parts"].padding_mask)
    for name in ("bias", "seen", "lengths"):
        assert torch.equal(changed[name], inputs[name])
    with pytest.raises(ValueError, match=r"nothing in \(30,\) int64 can be changed: pass perturb="):
        perturbed(torch.arange(30), torch.Generator())


def test_far_from_the_data_a_student_is_as_unsure_as_its_teacher():
    torch.manual_seed(0)
    x = 6 * torch.rand(200)
    points = loader(x, x.sin() + 0.1 * torch.randn(200), size=50)
    body = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1), nn.Flatten(0))
    optimizer = torch.optim.Adam(body.parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(body(x), x.sin()).backward()
        optimizer.step()
    predictor = fit_ella(body, points, points, "regression", num_landmarks=100, rank=8)
    fast, far = predictor.distil(points), torch.tensor([9.0, 10.0])
    ratio = (fast(far).logits_variance / predictor(far).logits_variance).log()
    assert (fast(far).logits_variance > 100 * fast(x).logits_variance.mean()).all()
    assert ratio.abs().max() < 3
    assert fast(far[:1]).mean.shape == (1,)  # and a first batch of one


def test_what_is_far_away_counts_as_less_far():
    one = student.Student(5, 3, 2, has_outside=True, invariant=True)
    near, far, farther = (one.standardised(torch.full((1, 5), value), torch.zeros(1, 3)) for value in (0.1, 1e3, 1e6))
    assert torch.equal(far, farther)
    torch.testing.assert_close(near[:, :5], torch.full((1, 5), 0.1), rtol=1e-2, atol=0)


class Squeezed(nn.Module):
    """One number, without an axis of its own; and of one input, without any."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).squeeze()


def test_a_network_that_squeezes_its_outputs(tmp_path: Path):
    torch.manual_seed(0)
    model, x = Squeezed(), torch.randn(60, 3)
    points = loader(x, x.sum(1))
    fast = fit_ella(model, points, points, "regression", num_landmarks=40, rank=3).distil(points)
    again = FastPredictor.load(fast.save(tmp_path / "fast.safetensors"), model)
    assert again(x[:1]).mean.shape == (1,)
    torch.testing.assert_close(again(x[:1]).variance, fast(x[:4]).variance[:1])
    path = fast.export(tmp_path / "model.pt2", x[:4])
    torch.testing.assert_close(program(path, x[:9])["variance"], fast(x[:9]).variance)


def test_neither_the_loader_s_batches_nor_a_change_in_place_matter():
    predictor, fast, x, y = taught()
    for size in (1, 7):
        other = predictor.distil(loader(x, y, size=size))
        torch.testing.assert_close(other(x).probs, fast(x).probs, rtol=1e-3, atol=1e-4)
    exact = predictor.distil(loader(x, y), perturb=lambda inputs: inputs.add_(1)).figures["nll_exact"]
    assert exact == pytest.approx(fast.figures["nll_exact"])


def test_a_student_is_of_one_posterior_and_follows_that():
    predictor, fast, x, y = taught()
    other = fit_ella(predictor.model, loader(x, y), **OPTIONS | {"seed": 1})
    with pytest.raises(ValueError, match="taught by another posterior"):
        other.adopt(fast)
    before = fast(x).logits.covariance
    predictor.forget(loader(x[:30], y[:30]))  # training points: the covariance grows
    assert (fast(x).logits.covariance.diagonal(dim1=1, dim2=2) > before.diagonal(dim1=1, dim2=2)).all()


def test_in_a_module_that_trains_it_still_predicts(learned):
    fast, x = learned[1], rings(5, 0)[0]
    numbers = torch.get_rng_state()
    expected = fast(x).probs
    nn.ModuleList([fast]).train()
    assert torch.equal(fast(x).probs, expected)
    assert torch.equal(numbers, torch.get_rng_state())


def test_on_its_network_it_is_no_part_of_it(learned):
    predictor, fast = learned
    x, names = rings(5, 0)[0], list(predictor.model.state_dict())
    predictor.model.fast = fast
    assert list(predictor.model.state_dict()) == names
    assert fast(x).probs.shape == predictor(x).probs.shape
    del predictor.model.fast


def test_a_network_whose_type_changed_and_came_back(learned):
    predictor, fast = learned
    x = rings(5, 0)[0]
    expected = fast(x).probs
    predictor.model.double()
    torch.testing.assert_close(fast(x.double()).probs, expected.double(), rtol=1e-4, atol=1e-5)
    predictor.model.float()
    torch.testing.assert_close(fast(x).probs, expected)


def test_inputs_laid_flat_and_wide_layers_are_no_places():
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 24 * 24, 3)).eval()
    network, x = Network(model), torch.randn(4, 1, 24, 24)
    network.settle(x)
    assert [place.module for place in find_places(network, x)] == ["0", "1"]
    for model in (nn.Linear(576, 3), nn.Sequential(nn.Linear(576, 5000), nn.Linear(5000, 3))):
        network = Network(nn.Sequential(nn.Flatten(), model).eval())
        network.settle(x)
        assert find_places(network, x) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("places", [["body", 0, 0, 1, "24", False]]),
        ("places", [["elsewhere", 0, 0, 1, 24, False]]),
        ("places", [["body", 0, 0, 1, 10**10, False]]),
        ("fingerprint", []),
        ("counted", 5),
        ("figures", {"nll": "low"}),
        ("settings", {"likelihood": "none"}),
    ],
)
def test_a_file_that_says_odd_things_is_refused(learned, name: str, value: Any, tmp_path: Path):
    predictor, fast = learned
    described = {n: getattr(fast, n) for n in _DESCRIBED} | {"counted": []} | {name: value}
    metadata = {n: json.dumps(v) for n, v in described.items()} | {"format": FORMAT}
    path = artefact.write(tmp_path / "fast.safetensors", fast.tensors(), metadata)
    with pytest.raises(ValueError, match=r"write it again|teach again"):
        FastPredictor.load(path, predictor.model)


@pytest.mark.parametrize("change", ["missing", "negative", "wider", "nan"])
def test_a_file_with_odd_tensors_is_refused(learned, change: str, tmp_path: Path):
    predictor, fast = learned
    tensors = {name: value.clone() for name, value in fast.tensors().items()}
    if change == "missing":
        del tensors["student.seen_mean"]
    elif change == "wider":
        tensors["student.layers.0.bias"] = torch.zeros(300)
    else:
        tensors["translation.temperature"].fill_(-1.0 if change == "negative" else torch.nan)
    metadata = {n: json.dumps(getattr(fast, n)) for n in _DESCRIBED if n != "counted"}
    path = artefact.write(tmp_path / "fast.safetensors", tensors, metadata | {"counted": "[]", "format": FORMAT})
    with pytest.raises(ValueError, match=r"write it again|teach again"):
        FastPredictor.load(path, predictor.model)


def test_what_no_student_can_learn_is_refused():
    predictor, _, x, y = taught()
    with pytest.raises(ValueError, match="needs 10 points or more"):
        predictor.distil(loader(x[:3], y[:3]))
    with pytest.raises(ValueError, match=r"perturb= must give as many samples as it gets, 12, not 11"):
        predictor.distil(loader(x, y), perturb=lambda inputs: inputs[:11])
    with pytest.raises(ValueError, match="num_points=0 must be a whole number"):
        predictor.distil(loader(x, y), num_points=0)
    kept = fit_ella(predictor.model, loader(x, y), **OPTIONS | {"top_outputs": 1})
    with pytest.raises(ValueError, match="top_outputs"):
        kept.distil(loader(x, y))


def test_an_own_change_of_the_inputs_is_used():
    seen = []

    def own(inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return inputs + 1

    predictor, _, x, y = taught()
    predictor.distil(loader(x, y), perturb=own)
    assert sum(seen) == 60


# In a fit ------------------------------------------------------------------------------------------------------------


def test_the_callback_teaches_a_student(tmp_path: Path):
    ella = ELLACallback(num_landmarks=20, rank=3, num_curvature=20, distil=True)
    trainer, module = make_trainer(tmp_path, ella), Net()
    trainer.fit(module, datamodule=Data())
    x = torch.randn(5, 2)
    fast = module.ella.fast
    assert ella.predictor is not None
    assert ella.predictor.fast is fast
    assert trainer.callback_metrics["fast/nll"] == pytest.approx(fast.figures["nll"])
    [path] = tmp_path.rglob("ella-fast.safetensors")
    assert torch.equal(FastPredictor.load(path, module)(x).probs, fast(x).probs)
    assert not any("student" in name for name in module.state_dict())


def test_a_student_that_fails_costs_no_posterior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    def broken(self: Any, lessons: Any, *_: Any) -> None:
        if len(lessons.outputs) > 8:  # beyond the rehearsal
            raise RuntimeError("no chalk")

    monkeypatch.setattr(student.Student, "learn", broken)
    ella = ELLACallback(num_landmarks=20, rank=3, num_curvature=20, distil=True)
    module = Net()
    make_trainer(tmp_path, ella).fit(module, datamodule=Data())
    assert "no chalk" in caplog.text
    assert module.ella(torch.randn(5, 2)).probs.shape == (5, 3)
    assert len(list(tmp_path.rglob("ella.safetensors"))) == 1


def test_what_a_student_cannot_learn_is_told_before_training(tmp_path: Path):
    class Dense(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).unsqueeze(1).expand(-1, 2, -1)

        def training_step(self, batch, batch_idx):
            raise AssertionError("training has begun")

        def validation_step(self, batch, batch_idx):
            pass

    class Positions(Data):
        def train_dataloader(self):
            return loader(torch.randn(24, 2), torch.randint(2, (24, 2)))

        val_dataloader = train_dataloader

    class Unseen(Net):
        validation_step = None  # type: ignore[assignment]

    ella = ELLACallback(num_landmarks=20, rank=3, distil=True)
    with pytest.raises(ValueError, match="one row of outputs an input"):
        make_trainer(tmp_path, ella, num_sanity_val_steps=0).fit(Dense(), datamodule=Positions())
    with pytest.raises(ValueError, match="a student learns from unseen points, and there are none"):
        make_trainer(tmp_path, ella).fit(Unseen(), Data().train_dataloader())


# Programs ------------------------------------------------------------------------------------------------------------


def small(make: Any, inputs: Any, count: int = 24) -> tuple[FastPredictor, Any]:
    torch.manual_seed(0)
    x = inputs(count)
    points = [(x, torch.randint(3, (count,)))]
    return fit_ella(make(), points, points, num_landmarks=20, rank=3).distil(points), inputs(5)


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16)


def resnet() -> nn.Module:
    block = timm.models.resnet.BasicBlock
    return timm.models.resnet.ResNet(block, [1, 1, 1, 1], num_classes=3, channels=(4, 4, 8, 8))


def vit() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(16, 4, num_classes=3, embed_dim=8, depth=2, num_heads=2)


class NamedAsItsAnswers(nn.Module):
    """Its input and its operations have the names of what a program says."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        x = inputs["variance"]
        return self.head(x - x.mean(1, keepdim=True))


def named() -> tuple[FastPredictor, dict[str, Tensor]]:
    torch.manual_seed(0)
    points = [({"variance": torch.randn(30, 4)}, torch.randn(30, 2))]
    predictor = fit_ella(NamedAsItsAnswers(), points, points, likelihood="regression", num_landmarks=20, rank=3)
    return predictor.distil(points), {"variance": torch.randn(5, 4)}


PROGRAMS = {
    "names": named,
    "resnet": lambda: small(resnet, pictures),
    "vit": lambda: small(vit, pictures),
    "regression": lambda: (taught("regression")[1], torch.randn(5, 3).double()),
    "multilabel": lambda: (taught("multilabel")[1], torch.randn(5, 3).double()),
    "ordinal": lambda: (taught("ordinal")[1], torch.randn(5, 3).double()),
}


def program(path: Path, x: Any) -> dict[str, Tensor]:
    """What a program says, by name."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    columns = list(x.values()) if isinstance(x, dict) else [x]
    given = {node.name: column.numpy() for node, column in zip(session.get_inputs(), columns, strict=True)}
    return {
        node.name: torch.as_tensor(value)
        for node, value in zip(session.get_outputs(), session.run(None, given), strict=True)
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "onnx") for name in ("resnet", "vit", "texts", "regression", "names")),
        *((name, "pt2") for name in ("vit", "texts", "multilabel", "ordinal")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_program_says_what_the_student_does(name: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    fast, x = (request.getfixturevalue("reader")[1], texts(5)) if name == "texts" else PROGRAMS[name]()
    path = fast.export(tmp_path / f"model.{kind}", zoo.pick(x, slice(0, 1)))
    for count in (1, 5):
        some = zoo.pick(x, slice(0, count))
        found, expected = program(path, some), fast(some)
        assert {"novelty", "logits_mean", "logits_variance"} <= found.keys()
        for each, value in found.items():
            wanted = {"lower": 0, "upper": 1}
            right = expected.interval(0.9)[wanted[each]] if each in wanted else getattr(expected, each)
            torch.testing.assert_close(value, right.to(value), rtol=1e-4, atol=1e-4)


def test_batchnorms_are_folded_as_long_as_that_is_right():
    fast, x = small(resnet, pictures)
    expected = deepcopy(fast.model).eval()(x).detach()
    norms = [module for module in fast.model.modules() if isinstance(module, nn.BatchNorm2d)]
    looked_at = [place.module for place in fast.places if isinstance(fast.model.get_submodule(place.module), nn.Conv2d)]
    for _ in range(3):
        torch.testing.assert_close(fast(x).logits_mean, expected, rtol=1e-4, atol=1e-4)
        assert fast._recorder is not None
        assert fast._recorder.num_folded == len(norms) - len(looked_at) > 0


def test_other_endings_are_refused(learned):
    with pytest.raises(ValueError, match=r"model.pb ends neither in .onnx nor in .pt2"):
        learned[1].export("model.pb", rings(2, 0)[0])


def test_what_fixes_the_number_of_samples_is_named(tmp_path: Path):
    fast, x = small(TinyViT, lambda count: torch.randn(count, 1, 8, 8))  # which asks for len(x)
    with pytest.raises(ValueError, match=r"fixes the number of samples, as len\(x\) does: use x.shape\[0\]"):
        fast.export(tmp_path / "model.pt2", x)
