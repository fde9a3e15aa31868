"""What the package is compared with, on a small task."""

import copy
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("laplace")
sys.path.insert(0, str(ROOT / "recipes"))
import rivals
from models import CifarResNet
from rivals import RIVALS, NotApplicable, Task, ensemble


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SUBNETWORK": 20, "LANDMARKS": 20, "RANK": 5, "INDUCING": 4, "ITERATIONS": 3}.items():
        monkeypatch.setattr(rivals, name, value)


def loader(count: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(count, 3, 8, 8), torch.randint(3, (count,))), 10)


@pytest.fixture
def task() -> Task:
    """A residual network that is too sure of noise; `num_train` is less than the training set."""
    torch.manual_seed(0)
    model = nn.Sequential(CifarResNet(8, num_classes=8, width=4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    with torch.no_grad():
        model(torch.randn(64, 3, 8, 8) * 2 + 1)  # statistics that are not the initial ones
        model[-1].weight.mul_(10)
    return Task(model.eval(), loader(45), loader(37), num_train=30)


def nll(task: Task, predict: rivals.Predict) -> float:
    inputs, targets = task.held_out.dataset.tensors
    probs = predict(inputs)
    assert probs.shape == (len(inputs), 3)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(inputs)))
    return float(nn.functional.nll_loss(probs.log(), targets))


@pytest.mark.parametrize("name", RIVALS)
def test_tuned_it_is_not_worse_than_the_network_which_stays_as_it_was(name: str, task: Task):
    before, gradients = copy.deepcopy(task.model.state_dict()), [p.requires_grad for p in task.model.parameters()]
    predict = RIVALS[name](task)
    found = nll(task, predict)
    assert torch.equal(predict(next(iter(task.held_out))[0]), predict(next(iter(task.held_out))[0]))
    torch.testing.assert_close(task.model.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in task.model.modules())
    assert [p.requires_grad for p in task.model.parameters()] == gradients
    assert not hasattr(task.model, "output_size")
    if name != "MC dropout":  # which has nothing to tune
        assert found <= nll(task, RIVALS["MAP"](task)) + 1e-3


def test_temperature_scaling_finds_the_factor_that_logits_were_multiplied_by():
    torch.manual_seed(0)
    logits = torch.randn(20_000, 3) * 2
    targets = torch.distributions.Categorical(logits=logits).sample()
    points = DataLoader(TensorDataset(logits * 3, targets), 1000)
    predict = RIVALS["temperature scaling"](Task(nn.Identity(), points, points))
    torch.testing.assert_close(predict(logits * 3), logits.softmax(1), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["all layers, KFAC", "VaLLA"])
def test_a_cheaper_form_of_the_functional_variance_is_the_same(name: str, task: Task, monkeypatch: pytest.MonkeyPatch):
    posteriors, fitted = [], rivals.fitted
    monkeypatch.setattr(rivals, "fitted", lambda *a, **o: posteriors.append(fitted(*a, **o)) or posteriors[0])
    monkeypatch.setattr(rivals, "tuned", lambda task, look, covariance: (look, covariance))
    look, covariance = RIVALS[name](task)
    (posterior,), inputs = posteriors, torch.randn(4, 3, 8, 8)
    posterior.prior_precision = 0.3
    expected = posterior.functional_variance(rivals.jacobians(posterior.model, inputs)[0])
    torch.testing.assert_close(covariance(look(inputs)[0], 0.3), expected, rtol=1e-3, atol=1e-4)


def test_jacobians_are_those_of_laplace_torch(task: Task):
    inputs, outputs = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 1])
    ours = rivals.PerSample(task.model, "classification")
    theirs = rivals.CurvlinopsGGN(task.model, "classification")
    torch.testing.assert_close(ours.jacobians(inputs), theirs.jacobians(inputs), rtol=1e-4, atol=1e-5)
    for found, expected in zip(
        ours.selected_output_jacobians(inputs, outputs),
        theirs.selected_output_jacobians(inputs, outputs),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_jacobians_of_the_same_inputs_are_computed_once(task: Task):
    inputs = torch.randn(4, 3, 8, 8)
    first = task.jacobians(inputs)
    assert task.jacobians(inputs) is first
    inputs.mul_(2)
    torch.testing.assert_close(task.jacobians(inputs), rivals.jacobians(task.model, inputs))


def test_dropout_is_for_networks_that_have_it(task: Task):
    task.model[2] = nn.Identity()
    with pytest.raises(NotApplicable, match="has no nn"):
        RIVALS["MC dropout"](task)


def test_an_ensemble_averages_probabilities():
    predict = ensemble([nn.Identity(), nn.Softplus()])
    inputs = torch.randn(5, 3)
    torch.testing.assert_close(predict(inputs), (inputs.softmax(1) + nn.functional.softplus(inputs).softmax(1)) / 2)
