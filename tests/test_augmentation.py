"""Views: predictions are averages over them, by the same draws of the weights; refused where that is not right."""

import logging
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ListDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_callback import Data, Net, make_trainer
from test_fast import program
from test_other_likelihoods import problem
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_ella import LIKELIHOODS, ELLACallback, ELLAPredictor, FastPredictor, Settings, fit_ella
from lightning_ella.augmentation import VIEWS, refuse_unusable, seen, shifted
from lightning_ella.predictions import Mixture

OPTIONS: dict[str, Any] = {"num_landmarks": 40, "rank": 4, "num_samples": 64, "residual": 3}
GIVEN = {"prior_variance": 1.0, "covariance_scale": 1.0, "residual_scale": 0.1, "temperature": 1.5}


def flipped(x: Tensor) -> Tensor:
    return x.flip(1)


def halved(x: Tensor) -> Tensor:
    return x.mul_(0.5)  # which writes to what it gets


def opposite(x: Tensor) -> Tensor:
    return -3 * x


def same(x: Tensor) -> Tensor:
    return x


VIEWING = [flipped, halved]


def fitted(name: str = "classification", **options: Any) -> tuple[ELLAPredictor, Tensor, Tensor, DataLoader]:
    model, x, y, points = problem(name)
    options = OPTIONS | ({"noise_variance": 0.3} if name == "regression" else {}) | options
    return fit_ella(model, points, points, likelihood=name, **options), x, y, points


def at_each_view(predictor: ELLAPredictor, x: Tensor) -> list[Tensor]:
    """Samples (S, B, C) of the outputs, at each view, by the posterior's formula."""
    found = []
    for inputs in (x, x.flip(1), x * 0.5):
        logits, features = predictor.features(inputs)
        factor = predictor.posterior.factor(features)
        found.append(logits + torch.einsum("sk,bck->sbc", predictor.draws.to(factor), factor))
    return found


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def test_probabilities_are_averages_over_the_posterior_and_the_views():
    predictor, x, y, _ = fitted(views=VIEWING, **GIVEN)
    before = x.clone()
    out = predictor(x)
    probs = torch.cat([(samples / 1.5).softmax(-1) for samples in at_each_view(predictor, x)])
    torch.testing.assert_close(out.probs, probs.mean(0))
    torch.testing.assert_close(out.entropy, entropy(probs.mean(0)))
    torch.testing.assert_close(out.mutual_information, entropy(probs.mean(0)) - entropy(probs).mean(0))
    torch.testing.assert_close(out.log_prob(y), probs.mean(0).gather(1, y[:, None]).log().squeeze(1))
    assert len(out.sample()) == 4 * 3 * 64  # a few of each draw and view
    assert x.equal(before)


def test_covariances_are_those_within_the_views_and_between_them():
    predictor, x, _, _ = fitted(views=VIEWING, **GIVEN)
    out, means, within = predictor(x), [], []
    for inputs in (x, x.flip(1), x * 0.5):
        gaussian = predictor.outputs(inputs)
        means.append(gaussian.mean)
        within.append(gaussian.covariance)
    means = torch.stack(means)
    away = means - means.mean(0)
    expected = torch.stack(within).mean(0) + torch.einsum("vbc,vbd->bcd", away, away) / 3
    torch.testing.assert_close(out.logits_mean, means.mean(0))
    torch.testing.assert_close(out.logits_covariance, expected)
    torch.testing.assert_close(out.logits_variance, expected.diagonal(dim1=1, dim2=2))


def test_the_novelty_is_the_mean_of_those_of_the_views():
    predictor, x, _, _ = fitted(views=VIEWING, **GIVEN)
    alone = fitted(**GIVEN)[0]
    expected = torch.stack([alone(inputs).novelty for inputs in (x, x.flip(1), x * 0.5)]).mean(0)
    torch.testing.assert_close(predictor(x).novelty, expected)


@pytest.mark.parametrize("predictive", ["probit", "bridge"])
def test_closed_forms_are_averages_too(predictive: str):
    predictor, x, _, _ = fitted(views=VIEWING, predictive=predictive, **GIVEN)
    alone = fitted(predictive=predictive, **GIVEN)[0]
    expected = torch.stack([alone(inputs).probs for inputs in (x, x.flip(1), x * 0.5)]).mean(0)
    torch.testing.assert_close(predictor(x).probs, expected)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_views_that_change_nothing_change_nothing(name: str):
    """Scales are chosen for the average, so with the same input three times they are the ones without."""
    one, x, y, _ = fitted(name)
    several, *_ = fitted(name, views=[same, same])
    for scale in ("prior_variance", "covariance_scale", "residual_scale", "temperature"):
        torch.testing.assert_close(getattr(several, scale), getattr(one, scale), rtol=1e-3, atol=1e-9)
    out, expected = several(x), one(x)
    torch.testing.assert_close(out.log_prob(y), expected.log_prob(y), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out.logits_variance, expected.logits_variance, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_any_likelihood_takes_views(name: str):
    predictor, x, y, _ = fitted(name, views=flipped, **{k: v for k, v in GIVEN.items() if k != "temperature"})
    out, parts = predictor(x), [predictor.outputs(x), predictor.outputs(x.flip(1))]
    likelihood, temperature = predictor.likelihood, predictor.posterior.temperature
    log_probs = [
        -likelihood.nll(likelihood.predict(g, predictor.settings["predictive"], temperature), y) for g in parts
    ]
    if name in ("classification", "preference", "ordinal", "binary", "poisson", "heteroscedastic"):
        torch.testing.assert_close(out.log_prob(y), torch.stack(log_probs).exp().mean(0).log())
    if name == "regression":  # the normal distribution with the moments of both
        means = torch.stack([g.mean for g in parts])
        variance = torch.stack([g.variance for g in parts]).mean(0) + means.var(0, correction=0)
        torch.testing.assert_close(out.mean, means.mean(0))
        torch.testing.assert_close(out.variance, variance + predictor.settings["noise_variance"])
    if name == "multilabel":
        alone = [likelihood.predict(g, "mc", temperature).probs for g in parts]
        torch.testing.assert_close(out.probs, torch.stack(alone).mean(0))


def test_the_temperature_is_the_best_for_the_average_over_the_views():
    scales = {"prior_variance": 1.0, "covariance_scale": 1e-4, "residual_scale": 1e-4}
    predictor, x, y, _ = fitted(views=opposite, **scales)
    chosen, losses = predictor.temperature, []
    for factor in (0.8, 1.0, 1.25):
        predictor.temperature = chosen * factor
        losses.append(float(-predictor(x).log_prob(y).mean()))
    assert min(losses) == losses[1]
    assert abs(float(chosen) - float(fitted(**scales)[0].temperature)) > 0.05


def test_a_student_s_temperature_is_for_the_average_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning_ella.distil.WIDTHS", {"variance": 0.1, "temperature": 10.0})
    found = []
    for views in ([], [opposite]):
        predictor, _, _, points = fitted(views=views, **GIVEN)
        found.append(float(predictor.distil(points).translation.temperature))
    assert abs(found[0] - found[1]) > 0.1


@given(order=st.permutations([flipped, halved, same]), size=st.integers(1, 60))
@settings(max_examples=5, deadline=None)
def test_neither_the_order_of_the_views_nor_the_batches_matter(order: list[Callable], size: int):
    model, x, y, _ = problem("classification")
    points = DataLoader(ListDataset([(a.clone(), b.clone()) for a, b in zip(x, y, strict=True)]), size)
    found = fit_ella(model, points, points, views=order, **OPTIONS)
    expected = fitted(views=[flipped, halved, same])[0]
    torch.testing.assert_close(found.temperature, expected.temperature, rtol=1e-4, atol=0)
    torch.testing.assert_close(found(x).probs, expected(x).probs, rtol=1e-4, atol=1e-6)


# Names ---------------------------------------------------------------------------------------------------------------


def test_images_are_flipped_and_shifted():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    assert seen(x, "hflip").equal(x.flip(-1))
    assert seen(x, "vflip").equal(x.flip(-2))
    assert shifted(x, 1)[0, 0].tolist() == [[0, 0, 1, 2], [0, 0, 1, 2], [4, 4, 5, 6]]
    assert shifted(x, -1)[0, 0].tolist() == [[5, 6, 7, 7], [9, 10, 11, 11], [9, 10, 11, 11]]
    assert seen(x, "hflip+shift1").equal(shifted(x.flip(-1), 1))
    pair = {"image": x, "label": torch.zeros(1)}
    assert seen(pair, "hflip")["image"].equal(x.flip(-1))
    assert seen(pair, "hflip")["label"] is pair["label"]


@pytest.mark.parametrize("name", VIEWS)
def test_every_name_leaves_shape_and_type(name: str):
    x = torch.randn(2, 3, 9, 7).double()
    found = seen(x, name)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert not found.equal(x)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": "hflop"}, "views= has no 'hflop': pass some of 'hflip'"),
        ({"views": ["hflip", "hflip+spin"]}, "views= has no 'spin'"),
        ({"views": "hflip", "top_outputs": 2}, "views= and top_outputs= do not go together"),
        ({"views": "hflip", "learn": True}, "views= and learn= do not go together"),
    ],
)
def test_settings_are_refused_at_once(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


class Counting:
    """Gives something else each time, without a random number."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


def rarely(x: Tensor) -> Tensor:
    return x.flip(1) if random.random() < 0.01 else x


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ("hflip", "'hflip' is for images"),
        (lambda x: x[:1], "must give as many samples as it gets"),
        (lambda x: x + torch.randn_like(x), "must give the same each time"),
        (rarely, "must give the same each time, but function rarely does not"),
        (lambda x: x * (1 + np.random.rand()), "must give the same each time"),  # noqa: NPY002
        (Counting(), "must give the same each time, but function Counting does not"),
        (lambda x: x.flip(0), "must look at each sample alone"),
        (lambda x: x - x.mean(0), "must look at each sample alone"),
        (5, "neither a name, nor a function, nor a list"),
    ],
)
def test_views_that_cannot_be_used_are_refused(view: Any, message: str):
    with pytest.raises(ValueError, match=message):
        fitted(views=view)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_random_transforms_are_refused_whatever_they_draw(p: float):
    with pytest.raises(ValueError, match="but function RandomHorizontalFlip does not"):
        pictures(views=v2.RandomHorizontalFlip(p))


def test_inputs_with_nan_are_not_taken_for_random():
    inputs = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    refuse_unusable(inputs, [flipped])


@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(2, 8, 8, 3),  # channels last
        {"image": torch.randn(2, 3, 8, 8), "mask": torch.ones(2, 1, 4, 4)},
        torch.randn(2, 8),
    ],
)
def test_names_are_for_images_of_one_size(inputs: Any):
    with pytest.raises(ValueError, match=r"is for images \(B, C, H, W\) of one size"):
        refuse_unusable(inputs, ["hflip"])


def test_whole_numbers_are_images_too():
    inputs = {"image": torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), "mask": torch.rand(2, 1, 8, 8)}
    refuse_unusable(inputs, ["hflip+shift2"])
    found = seen(inputs, "hflip")
    assert found["image"].equal(inputs["image"].flip(-1))
    assert found["mask"].equal(inputs["mask"].flip(-1))


def test_errors_of_points_are_those_of_their_likelihood():
    probs, labels = torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([1, 1])
    assert LIKELIHOODS["classification"]().errors(probs, labels).tolist() == [1, 0]
    there = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert LIKELIHOODS["multilabel"]().errors(probs, there).tolist() == [0.5, 0.5]
    predictor, x, y, _ = fitted("poisson", **{n: v for n, v in GIVEN.items() if n != "temperature"})
    out = predictor(x)
    found = predictor.likelihood.errors(predictor.likelihood.summary(out, y), y)
    torch.testing.assert_close(found, (out.mean - y).square().mean(1))


def test_a_view_that_the_network_cannot_take_is_named():
    with pytest.raises(RuntimeError) as caught:
        fitted(views=lambda x: x.float())
    assert any("with the view function" in note for note in caught.value.__notes__)


def test_a_view_is_the_user_s_own_object():
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, x: Tensor) -> Tensor:
            with self.lock:
                return -x

    view = Locked()
    predictor = fitted(views=[view], **GIVEN)[0]
    assert predictor.settings["views"][0] is view


def test_outputs_that_move_with_the_input_are_refused():
    model = nn.Conv2d(1, 3, 3, padding=1).double()
    points = [(torch.randn(1, 6, 6).double(), torch.randint(3, (6, 6))) for _ in range(20)]
    loader = DataLoader(ListDataset(points), 10)
    with pytest.raises(ValueError, match="one row of outputs an input"):
        fit_ella(model, loader, loader, views="hflip", num_landmarks=10, rank=2)


def test_what_is_not_known_of_views_says_who_knows_it():
    predictor, x, _, points = fitted(views=flipped, **GIVEN)
    with pytest.raises(ValueError, match=r"ask predictor.outputs\(inputs\)"):
        _ = predictor(x).logits.joint
    with pytest.raises(ValueError, match=r"ask predictor.outputs\(inputs\)"):
        _ = predictor(x).logits - predictor(x).logits
    with pytest.raises(ValueError, match=r"ask predictor.outputs\(inputs\)"):
        _ = predictor.outputs(x) - predictor(x).logits
    with pytest.raises(ValueError, match="fit without views="):
        predictor.update(points)


def test_a_view_that_costs_accuracy_is_told(caplog: pytest.LogCaptureFixture):
    def negated(x: Tensor) -> Tensor:
        return -2 * x

    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x = torch.randn(80, 5).double()
    loader = DataLoader(ListDataset([(a, b) for a, b in zip(x, model(x).argmax(1).detach(), strict=True)]), 20)
    with caplog.at_level(logging.WARNING):
        fit_ella(model, loader, loader, views=negated, **OPTIONS)
    assert any("the error on unseen points rises" in message for message in caplog.messages)
    caplog.clear()
    fit_ella(model, loader, loader, views=same, **OPTIONS)
    assert not any("the error on unseen points rises" in message for message in caplog.messages)


# Files, pickles, the callback and the student ------------------------------------------------------------------------


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().amax((2, 3)))


def pictures(**options: Any) -> tuple[nn.Module, ELLAPredictor, Tensor, DataLoader]:
    torch.manual_seed(0)
    model, x, y = Pictures(), torch.randn(60, 1, 6, 6), torch.randint(3, (60,))
    points = DataLoader(ListDataset(list(zip(x, y, strict=True))), 20)
    return model, fit_ella(model, points, points, **OPTIONS | options), x, points


def test_files_keep_names_and_ask_for_functions(tmp_path: Path):
    model, predictor, x, _ = pictures(views=["hflip", "vflip+shift1"])
    path = predictor.save(tmp_path / "names.safetensors")
    torch.testing.assert_close(ELLAPredictor.load(path, model)(x).probs, predictor(x).probs)

    model, predictor, x, _ = pictures(views=["hflip", halved])
    path = predictor.save(tmp_path / "functions.safetensors")
    with pytest.raises(ValueError, match="pass views= the same as in the fit, with function halved"):
        ELLAPredictor.load(path, model)
    for others in (halved, ["vflip", halved], [halved, "hflip"]):
        with pytest.raises(ValueError, match="pass views= the same, in their order"):
            ELLAPredictor.load(path, model, views=others)
    loaded = ELLAPredictor.load(path, model, views=["hflip", halved])
    torch.testing.assert_close(loaded(x).probs, predictor(x).probs)
    restored = pickle.loads(pickle.dumps(predictor))
    torch.testing.assert_close(restored(x).probs, predictor(x).probs)


def test_a_pickle_leaves_out_functions_that_it_cannot_keep():
    predictor, x = pictures(views=lambda x: x.flip(-1))[1:3]
    restored = pickle.loads(pickle.dumps(predictor))
    with pytest.raises(ValueError, match="views= was left out of the pickle"):
        restored(x)


def test_the_callback_takes_views(tmp_path: Path):
    module, data = Net(), Data()
    ella = ELLACallback(views=lambda x: 0.9 * x, distil=True, **OPTIONS)
    make_trainer(tmp_path, ella).fit(module, data)
    x = torch.randn(8, 2)
    assert ella.predictor is not None
    assert isinstance(ella.predictor(x).logits, Mixture)
    assert isinstance(module.ella.fast(x).logits, Mixture)
    again = pickle.loads(pickle.dumps(ella))
    with pytest.raises(ValueError, match="views= was left out of the pickle"):
        make_trainer(tmp_path, again).fit(Net(), data)


def test_a_student_of_other_views_is_refused():
    model, predictor, _, points = pictures(views=["hflip"])
    fast = fit_ella(model, points, points, **OPTIONS).distil(points)
    with pytest.raises(ValueError, match="taught by another posterior"):
        predictor.adopt(fast)


def test_a_student_is_tested_through_the_views():
    def huge(x: Tensor) -> Tensor:
        return 20 * x

    found = [pictures(views=views, **GIVEN) for views in ([], [huge])]
    one, other = (predictor.distil(points).figures["nll_exact"] for _, predictor, _, points in found)
    assert abs(one - other) > 0.01


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_student_averages_over_the_views_in_files_and_programs_too(kind: str, tmp_path: Path):
    model, predictor, x, points = pictures(views=["hflip", "shift1"])
    fast = predictor.distil(points)
    out, recorder = fast(x), fast._here(x)
    alone = [fast.predict([recorder(seen(x, view))]) for view in (None, "hflip", "shift1")]
    torch.testing.assert_close(out.probs, torch.stack([one.probs for one in alone]).mean(0))
    torch.testing.assert_close(out.novelty, torch.stack([one.novelty for one in alone]).mean(0))
    path = fast.save(tmp_path / "fast.safetensors")
    torch.testing.assert_close(FastPredictor.load(path, model)(x).probs, out.probs)
    said = program(fast.export(tmp_path / f"model.{kind}", x[:2]), x[:5])
    for name, value in said.items():
        torch.testing.assert_close(value, getattr(fast(x[:5]), name).to(value), rtol=1e-4, atol=1e-4)
