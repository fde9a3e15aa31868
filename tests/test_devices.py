"""Networks, data and predictors on another device than the CPU: a pretend one, which raises where devices meet."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Case, ListDataset, make_case
from pretend import KNOWN, Pretend, device, in_use, strategy
from test_callback import Net, blobs
from test_other_likelihoods import problem
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ella import LIKELIHOODS, ELLACallback, ELLAPredictor, FastPredictor, fit_ella
from lightning_ella.numerics import WITHOUT_FLOAT64
from lightning_ella.posterior import calibrate

SMALL: dict[str, Any] = {"num_landmarks": 30, "rank": 4, "num_curvature": 20, "memory_budget": 10**8}

pytestmark = [
    pytest.mark.skipif(not KNOWN, reason="this torch has no backends in Python"),
    pytest.mark.usefixtures("elsewhere"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture
def elsewhere() -> Iterator[None]:
    with in_use():
        yield


def to(value: Any, place: torch.device | str) -> Any:
    return {name: leaf.to(place) for name, leaf in value.items()} if isinstance(value, dict) else value.to(place)


HOST = torch.arange(9.0).view(3, 3)
MEETINGS: dict[str, Callable[[Tensor], Any]] = {
    "a sum": lambda there: HOST + there,
    "a product": lambda there: nn.functional.linear(HOST, there),
    "in place": lambda there: there.add_(HOST),
    "concatenation": lambda there: torch.cat([there, HOST]),
    "numbers put together": lambda there: torch.stack([there.sum(), HOST.sum()]),
    "indices from there": lambda there: HOST[there[0].long()],
    "values from the CPU": lambda there: there.index_put_((torch.tensor([0]),), HOST[:1]),
    "random numbers": lambda there: torch.rand(3, generator=torch.Generator(), device=there.device),
    "numpy": lambda there: there.numpy(),
    "forward mode": lambda there: torch.func.jvp(lambda x: x * HOST, (there,), (there,)),
    "vmap": lambda there: torch.func.vmap(lambda x: x + HOST)(there),
}


@pytest.mark.parametrize("what", MEETINGS)
def test_devices_do_not_meet(what: str):
    with pytest.raises((RuntimeError, TypeError), match=r"same device|device type|host memory"):
        MEETINGS[what](HOST.to(device()))


def test_devices_meet_where_they_may():
    there = HOST.to(device())
    assert (there + torch.ones(())).device == there[torch.tensor([0])].device == device()
    assert torch.zeros(2, device=device()).device == there.new_ones(3).device == device()
    assert type(there.cpu()) is Tensor
    assert there.cpu().equal(HOST)
    assert HOST.clone().copy_(there + 1).equal(HOST + 1)


def test_a_module_that_moves_keeps_its_parameters_and_trains_as_on_the_cpu():
    trained = []
    for place in ("cpu", device()):
        torch.manual_seed(0)
        network, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(8, 3)
        parameters = list(network.parameters())
        assert all(one is other for one, other in zip(parameters, network.to(place).parameters(), strict=True))
        optimizer = torch.optim.Adam(network.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(x.to(place)).square().sum().backward()
            optimizer.step()
        assert isinstance(parameters[0], Pretend) == (place != "cpu")
        trained.append(copy.deepcopy(network).cpu().state_dict())
    assert all(value.equal(trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("engine", ["forward", "layerwise"])
def test_a_fit_elsewhere_is_the_one_on_the_cpu(case: Case, engine: str):
    found = []
    for place in ("cpu", device()):
        predictor = fit_ella(case.model.to(place), case.loader(), case.loader(13), engine=engine, **SMALL)
        out = predictor(to(case.rows(slice(5)), place))
        assert out.probs.device == predictor.draws.device == torch.device(place)
        found.append([out.probs, out.novelty, out.logits_covariance, out.mutual_information, predictor.curvature])
    assert all(one.equal(other.cpu()) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("memory_budget", [10**5, 10**8])
@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_whatever_the_settings(memory_budget: int, precision: str):
    case, found = make_case("mlp"), []
    settings = SMALL | {"memory_budget": memory_budget, "num_landmarks": 60, "rank": 2}
    for place in ("cpu", device()):
        model = copy.deepcopy(case.model).float().to(place)
        data = ListDataset([(x.float(), y) for x, y in case.dataset.items])
        few = {"top_outputs": 2, "basis_precision": precision, "curvature": "sampled"}
        found.append(fit_ella(model, DataLoader(data, 7), DataLoader(data, 7), **settings, **few))
    x = data[0][0].unsqueeze(0)
    assert found[0](x).probs.equal(found[1](x).probs.cpu())


@pytest.mark.parametrize("how", ["exact", "sampled"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood(name: str, how: str):
    model, x, y, loader = problem(name)
    found = []
    for place in ("cpu", device()):
        predictor = fit_ella(model.to(place), loader, loader, name, curvature=how, **SMALL)
        out, targets = predictor(x[:6].to(place)), y[:6].to(place)
        asked = [out.log_prob(targets), predictor.log_prob(x[:6].to(place), targets), out.logits_variance, out.novelty]
        if predictor.likelihood.has_moments:
            asked += [out.mean, out.variance, out.quantile(0.3), *out.interval(0.9), out.crps(targets), out.sample(3)]
        else:
            asked += [out.probs, out.entropy, out.mutual_information]
        asked += [predictor.sample_functions(2)(x[:6].to(place))]
        assert all(value.device == torch.device(place) for value in asked)
        found.append([value.cpu() for value in asked])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


FIRST: dict[str, Callable[[ELLAPredictor, Case, Any], Any]] = {
    "call": lambda p, _, x: p(x).probs,
    "log_prob": lambda p, _, x: p.log_prob(x, torch.zeros(5, dtype=torch.long, device=p.device)),
    "features": lambda p, _, x: p.features(x)[1],
    "outputs": lambda p, _, x: p.outputs(x, lambda model, x: model(x)[:, :2]).covariance,
    "update": lambda p, case, x: p.update(case.loader())(x).probs,
    "forget": lambda p, case, x: p.forget(DataLoader(case.dataset, sampler=[3]))(x).probs,
    "evidence": lambda p, case, _: p.evidence(case.loader())(p.prior_variance).detach(),
    "sample_functions": lambda p, _, x: p.sample_functions(3)(x),
    "posterior": lambda p, _, x: p.to(p.device).posterior.root(),
}


@pytest.mark.parametrize("way", ["there", "back", "loaded there"])
@pytest.mark.parametrize("what", FIRST)
def test_whatever_is_asked_first_after_a_move(what: str, way: str, tmp_path: Path):
    case = make_case("conv_batchnorm")
    start, end = (device(), "cpu") if way == "back" else ("cpu", device())
    fitted = fit_ella(case.model.to(start), case.loader(), prior_variance=0.5, residual=4, **SMALL)
    file = fitted.save(tmp_path / "ella.safetensors")
    place = end if way == "loaded there" else start
    predictor = ELLAPredictor.load(file, copy.deepcopy(case.model).to(place))
    predictor.model.to(end)
    found = FIRST[what](predictor, case, to(case.rows(slice(5)), end))
    case.model.cpu()
    expected = FIRST[what](ELLAPredictor.load(file, case.model), case, case.rows(slice(5)))
    assert found.device == torch.device(end)
    torch.testing.assert_close(found.cpu(), expected)
    file = predictor.save(tmp_path / "moved.safetensors")
    assert ELLAPredictor.load(file, case.model).rank == predictor.rank


@pytest.mark.parametrize("way", ["taught there", "moved", "moved back", "loaded there"])
def test_a_student_goes_where_the_network_goes(way: str, tmp_path: Path):
    case = make_case("conv_batchnorm")
    settings = SMALL | {"residual": 4, "prior_variance": 0.5, "residual_scale": 1.0}
    expected = fit_ella(copy.deepcopy(case.model), case.loader(), **settings).distil(case.loader())
    start, end = {"taught there": (device(), device()), "moved back": (device(), "cpu")}.get(way, ("cpu", device()))
    predictor = fit_ella(case.model.to(start), case.loader(), **settings)
    fast = predictor.distil(case.loader())
    if way == "loaded there":
        path = fast.save(tmp_path / "fast.safetensors")
        predictor = fit_ella(case.model.to(end), case.loader(), **settings)
        fast = predictor.adopt(FastPredictor.load(path, case.model))
    case.model.to(end)
    found, right = fast(to(case.rows(slice(5)), end)), expected(case.rows(slice(5)))
    assert found.probs.device == torch.device(end)
    torch.testing.assert_close(found.probs.cpu(), right.probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.novelty.cpu(), right.novelty, rtol=1e-4, atol=1e-5)
    predictor.update(case.loader(), drift=0.1)
    assert found.probs.device == fast(to(case.rows(slice(5)), end)).probs.device


def test_its_type_may_be_changed_there():
    case = make_case("conv_batchnorm")
    predictor = fit_ella(case.model, case.loader(), prior_variance=0.5, **SMALL)
    expected = predictor.float()(case.inputs.float()).probs
    case.model.to(device())
    found = predictor.double().float()(case.inputs.float()).probs
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected)


def test_inputs_come_from_anywhere():
    case = make_case("dict")
    predictor = fit_ella(case.model, case.loader(), prior_variance=0.5, **SMALL)
    expected = predictor(case.inputs).probs
    case.model.to(device())
    assert predictor(case.inputs).probs.cpu().equal(expected)
    assert predictor.features(to(case.inputs, device()))[0].device == device()


@pytest.mark.parametrize("landmarks", ["uniform-class", "uniform"])
@pytest.mark.parametrize("source", ["targets", "batches", "tensors"])
def test_labels_and_data_that_lie_there(landmarks: str, source: str):
    case, found = make_case("mlp"), []
    for place in ("cpu", device()):
        model = case.model.to(place)
        data: Any = ListDataset([(x.to(place), y.to(place)) for x, y in case.dataset.items])
        if source == "targets":
            data.targets = case.targets.to(place)
        if source == "tensors":
            data = torch.utils.data.TensorDataset(case.inputs.to(place), case.targets.to(place))
        predictor = fit_ella(model, DataLoader(data, 7), DataLoader(data, 7), landmarks=landmarks, **SMALL)
        found.append(predictor.eigenvalues.cpu())
    assert found[0].equal(found[1])


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_calibration_features_beyond_a_quarter_of_the_budget_stay_on_the_cpu(
    likelihood: str, monkeypatch: pytest.MonkeyPatch
):
    case, found, places = make_case("mlp"), [], []

    def noted(points: Any, *args: Any, **kwargs: Any) -> Any:
        places.append(points.features.device.type)
        return calibrate(points, *args, **kwargs)

    monkeypatch.setattr("lightning_ella.fit.calibrate", noted)
    targets = case.targets if likelihood == "classification" else case.logits() + torch.randn(60, 3)
    data = ListDataset(list(zip(case.inputs, targets, strict=True)))
    numbers = 60 * 3 * (4 + 10) * 8  # of features, along 4 directions and 10 probes, in bytes
    for place, budget in (("cpu", 10**8), (device(), 4 * numbers), (device(), 4 * numbers - 8)):
        loader = DataLoader(data, 7)
        settings = SMALL | {"memory_budget": budget}
        predictor = fit_ella(case.model.to(place), loader, loader, likelihood, **settings)
        found.append([predictor.covariance_scale.cpu(), predictor(to(case.inputs, place)).logits_variance.cpu()])
    assert places == ["cpu", "pretend", "cpu"]
    for values in zip(*found, strict=True):
        torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(values[0], values[2], rtol=1e-9, atol=1e-9)


@pytest.fixture
def without_float64() -> Iterator[None]:
    WITHOUT_FLOAT64.add("pretend")
    yield
    WITHOUT_FLOAT64.discard("pretend")


def test_where_there_is_no_float64_one_is_told_what_to_do(without_float64: None, tmp_path: Path):
    case = make_case("mlp")
    predictor = fit_ella(case.model, case.loader(), prior_variance=0.5, **SMALL)
    file = predictor.save(tmp_path / "ella.safetensors")
    case.model.to(device())
    attempts = (
        lambda: fit_ella(case.model, case.loader(), prior_variance=0.5, **SMALL),
        lambda: ELLAPredictor.load(file, case.model),
        lambda: predictor(case.inputs),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"needs float64, which PRETEND does not have: .* model\.cpu\(\)"):
            attempt()


def test_a_network_on_several_devices_is_refused():
    case = make_case("mlp")
    case.model[0].to(device())  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"on several devices \(cpu, pretend:0\).*without device_map="):
        fit_ella(case.model, case.loader(), **SMALL)


class Noted(Net):
    """Asks its head within its own steps."""

    def test_step(self, batch, batch_idx):
        out = self.ella(batch[0])
        assert out.probs.device == self.device
        self.log("test_nll", -out.log_prob(batch[1]).mean())


@pytest.mark.parametrize("has_float64", [True, False])
@pytest.mark.parametrize("labels", ["batches", "targets"])
@pytest.mark.parametrize("weights", ["last", "best"])
def test_the_callback_in_a_trainer_of_another_device(
    tmp_path: Path, weights: str, labels: str, has_float64: bool, request: pytest.FixtureRequest
):
    if not has_float64:
        request.getfixturevalue("without_float64")
    found = []
    for place in ("cpu", "pretend"):
        torch.manual_seed(0)
        module, data = Noted(), blobs(60, 0)
        if labels == "targets":
            data.targets = torch.stack([y for _, y in data.items])  # type: ignore[attr-defined]
            data.targets = data.targets if place == "cpu" else data.targets.to(device())  # type: ignore[attr-defined]
        ella = ELLACallback(weights=weights, on_error="raise", **SMALL)
        best = pl.callbacks.ModelCheckpoint(tmp_path / place, monitor="val_loss")
        trainer = pl.Trainer(
            accelerator="cpu" if place == "cpu" else "auto",
            strategy="auto" if place == "cpu" else strategy(),
            max_epochs=2,
            callbacks=[ella, best],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path / place,
        )
        trainer.fit(module, DataLoader(data, 16), DataLoader(blobs(40, 1), 16))
        assert module.device == torch.device("cpu")  # where Lightning leaves it
        x = torch.stack([row for row, _ in blobs(20, 2).items])
        predictor = ella.predictor
        assert predictor is not None
        held = [*predictor.basis.values(), predictor.curvature, predictor.draws, predictor.prior_variance]
        assert not any(isinstance(tensor, Pretend) for tensor in held)  # nothing stays behind there
        out = predictor(x)
        found.append([out.probs, out.novelty, predictor.curvature])
        if weights == "last" and has_float64:
            nll = trainer.test(module, DataLoader(blobs(40, 3), 16), verbose=False)[0]["test_nll"]
            found[-1].append(torch.tensor(nll))
            found[-1].append(predictor(x).probs.cpu())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
