"""Learning from labelled points after the fit, against dense Bayesian regression and dense optima."""

import logging
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import ListDataset, at_a_time, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from test_other_likelihoods import problem
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.data import DataLoader, Dataset

from lightning_ella import LIKELIHOODS, ELLAPredictor, artefact, fit_ella
from lightning_ella.distributed import World
from lightning_ella.learning import Problem, _choice
from lightning_ella.likelihoods import Classification, Regression
from lightning_ella.observations import Observations
from lightning_ella.posterior import Posterior
from lightning_ella.predictor import FORMAT

OPTIONS = {"num_landmarks": 40, "rank": 4, "num_samples": 64}


def fitted(name: str = "classification", **options) -> tuple[ELLAPredictor, Tensor, Tensor]:
    """A predictor, and 60 other inputs with targets that a network with another bias draws."""
    model, x, _, loader = problem(name)
    known = {"prior_variance": 1.0, "covariance_scale": 1.0, "residual_scale": 0.1, "temperature": 1.0, "residual": 3}
    known |= {"noise_variance": 0.3} if name == "regression" else {}
    predictor = fit_ella(model, loader, likelihood=name, **OPTIONS | known | options)
    changed = deepcopy(model)
    with torch.no_grad():
        changed[-1].bias += torch.linspace(2.0, -2.0, len(changed[-1].bias))
        y = predictor.likelihood.sample(changed(x), torch.Generator().manual_seed(2))
    return predictor, x, y


def loader(x: Tensor, y: Tensor, size: int = 16, *weights: Tensor) -> DataLoader:
    return DataLoader(ListDataset(list(zip(x, y, *weights, strict=True))), size)


def dense_features(predictor: ELLAPredictor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and features (n, C, K) of the network, by autograd, one sample at a time."""
    model = predictor.model
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    rows = [jacrev(lambda p, s=sample: functional_call(model, p, (s.unsqueeze(0),))[0])(parameters) for sample in x]
    jacobian = torch.stack([torch.cat([block.flatten(1) for block in row.values()], 1) for row in rows])
    return model(x).detach(), jacobian @ flat(predictor.basis)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_regression_is_dense_bayesian_linear_regression_in_any_order_and_parts(drift: float):
    predictor, x, y = fitted("regression")
    before = predictor.posterior.covariance() + drift * torch.eye(4).double()
    f, features = dense_features(predictor, x)
    rows, residuals = features.flatten(0, 1), (y - f).flatten()
    precision = torch.linalg.inv(before) + rows.T @ rows / 0.3
    mean = torch.linalg.solve(precision, rows.T @ residuals / 0.3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    for part in order.split(23):
        predictor.update(loader(x[part], y[part], 5), drift=drift)
    torch.testing.assert_close(predictor.posterior.mean, mean, rtol=1e-8, atol=1e-10)
    out = predictor(x)
    torch.testing.assert_close(out.logits_mean, f + features @ mean, rtol=1e-8, atol=1e-10)
    covariance = features @ torch.linalg.inv(precision) @ features.mT
    outside = predictor.features(x)[1][..., 4:].square().sum(-1) * predictor.residual_scale
    expected = covariance.diagonal(dim1=1, dim2=2) + outside
    torch.testing.assert_close(out.logits_variance, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(out.variance, expected + 0.3, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_other_likelihoods_end_where_the_dense_objective_has_its_minimum(name: str):
    predictor, x, y = fitted(name)
    prior = torch.linalg.inv(predictor.posterior.covariance() + 0.3 * torch.eye(4).double())
    f, features = dense_features(predictor, x)
    predictor.update(loader(x, y), drift=0.3)
    mean, likelihood = predictor.posterior.mean, predictor.likelihood
    targets = likelihood.check(f, y)

    def objective(w: Tensor) -> Tensor:
        return -likelihood.log_prob(f + features @ w, targets).sum() + w @ prior @ w / 2

    gradient = jacrev(objective)(mean)
    near = 1e-5 if name == "ordinal" else 1e-7  # logits that change places make a kink
    assert gradient.norm() < near * jacrev(objective)(torch.zeros_like(mean)).norm()
    expected = prior + likelihood.curvature(f + features @ mean, features)
    torch.testing.assert_close(torch.linalg.inv(predictor.posterior.covariance()), expected, rtol=1e-6, atol=1e-8)
    if name in ("classification", "preference", "multilabel", "binary", "poisson", "regression"):  # canonical links
        torch.testing.assert_close(expected, hessian(objective)(mean), rtol=1e-6, atol=1e-8)


@settings(max_examples=2, deadline=None)
@given(st.permutations(range(60)), st.integers(1, 59), st.integers(1, 30))
def test_order_parts_and_batches_change_nothing(order: list[int], cut: int, size: int):
    predictor, x, y = fitted()
    whole = deepcopy(predictor).update(loader(x, y))
    parts = deepcopy(predictor)
    for some in (order[:cut], order[cut:]):
        parts.update(loader(x[some], y[some], size))
    assert whole.learnt.drift == parts.learnt.drift > 0
    torch.testing.assert_close(parts(x).probs, whole(x).probs, rtol=1e-6, atol=1e-8)
    parts.forget(loader(x[order[cut:]], y[order[cut:]], 7))
    first = deepcopy(predictor).update(loader(x[order[:cut]], y[order[:cut]]))
    torch.testing.assert_close(parts(x).probs, first(x).probs, rtol=1e-6, atol=1e-8)


def test_forgetting_everything_leaves_no_trace_and_the_weights_are_untouched():
    predictor, x, y = fitted()
    weights, before = deepcopy(predictor.model.state_dict()), predictor(x).probs
    moved = predictor.update(loader(x, y))(x).probs
    assert (moved - before).abs().max() > 0.05
    torch.testing.assert_close(predictor.model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(predictor.forget(loader(x, y, 7))(x).probs, before, rtol=0, atol=0)
    assert predictor.learnt is None


def test_points_of_the_same_kind_do_not_make_the_weights_drift_and_those_of_another_do(caplog):
    predictor, x, y = fitted()
    with torch.no_grad():
        f = predictor.model(x)
    drifts = []
    for seed in range(6):
        own = Classification().sample(f, torch.Generator().manual_seed(seed))
        drifts.append(deepcopy(predictor).update(loader(x, own)).learnt.drift)
    assert sum(drift > 0 for drift in drifts) <= 1
    with caplog.at_level(logging.INFO, "lightning_ella"):
        learnt = predictor.update(loader(x, y)).learnt
    assert learnt.drift > 0
    assert learnt.figures["after/nll"] < learnt.figures["before/nll"]
    assert "a drift of" in caplog.text
    assert "chosen by leaving points out" in caplog.text


def test_few_points_do_not_choose_a_drift():
    predictor, x, y = fitted()
    assert predictor.update(loader(x[:29], y[:29])).learnt.drift == 0


@pytest.mark.parametrize("features", [1, 2**24])
@pytest.mark.parametrize("positions", [1, 3])
def test_a_sample_left_out_is_a_fit_without_it(positions: int, features: int, monkeypatch: pytest.MonkeyPatch):
    at_a_time(monkeypatch, features=features)
    torch.manual_seed(0)
    rows = 12 * positions
    samples = torch.arange(rows) // positions
    points = Observations(
        *(torch.randn(shape).double() for shape in ((rows, 2), (rows, 2, 3), (rows, 2))),
        torch.rand(rows) + 0.5,
        samples,
    )
    one = torch.ones(()).double()

    def solved(some: Observations) -> tuple[Problem, Tensor]:
        of = Problem(
            some, Regression(0.4), torch.zeros(3).double(), torch.eye(3).double(), one, free=False, world=World()
        )
        return of, of.minimum(of.centre)

    of, z = solved(points)
    found = of.left_out(z, of.information(z)[1])
    for sample in range(12):
        expected = solved(points.rows(samples != sample))[1]
        torch.testing.assert_close(found[samples == sample], expected.expand(positions, 3), rtol=1e-9, atol=1e-11)


def test_it_is_saved_and_loaded_and_goes_on_from_there(tmp_path: Path):
    predictor, x, y = fitted()
    predictor.update(loader(x[:40], y[:40]))
    loaded = ELLAPredictor.load(predictor.save(tmp_path / "ella.safetensors"), predictor.model)
    torch.testing.assert_close(loaded(x).probs, predictor(x).probs, rtol=0, atol=0)
    assert loaded.learnt.figures == predictor.learnt.figures
    assert loaded.learnt.drift == predictor.learnt.drift
    for each in (predictor, loaded):
        each.update(loader(x[40:], y[40:])).forget(loader(x[:10], y[:10]))
    torch.testing.assert_close(loaded(x).probs, predictor(x).probs, rtol=0, atol=0)


def test_weights_count_as_copies():
    predictor, x, y = fitted()
    twice = loader(torch.cat([x, x[:20]]), torch.cat([y, y[:20]]))
    weights = torch.ones(60) + (torch.arange(60) < 20)
    weighted = deepcopy(predictor).update(loader(x, y, 16, weights), tuple, drift=0.3)
    torch.testing.assert_close(weighted(x).probs, predictor.update(twice, drift=0.3)(x).probs, rtol=1e-7, atol=1e-9)


def test_functions_and_differences_of_outputs_move_with_the_mean():
    predictor, x, y = fitted()
    predictor.update(loader(x, y))
    out = predictor(x)
    torch.testing.assert_close(predictor.outputs(x).mean, out.logits_mean)
    drawn = predictor.sample_functions(4000)(x).mean(0)
    torch.testing.assert_close(drawn, out.logits_mean / predictor.posterior.temperature, rtol=0.1, atol=0.05)
    assert (out.logits_mean - predictor.features(x)[0]).abs().max() > 0.1


BAD = {
    "a class that is not there": (lambda x, y: loader(x, y + 2), "labels must lie in"),
    "no label": (lambda x, y: loader(x, torch.full_like(y, -100)), "no point of the loader has a target that counts"),
    "no point": (lambda x, y: DataLoader(ListDataset([])), "has no points"),
    "an input that is NaN": (
        lambda x, y: loader(x * torch.where(torch.arange(60) == 9, torch.nan, 1)[:, None], y),
        "NaN",
    ),
    "numbers for classes": (lambda x, y: loader(x, y.double()), "class indices"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_learnt_from_is_refused_and_changes_nothing(what: str):
    predictor, x, y = fitted()
    predictor.update(loader(x, y))
    before, learnt = predictor(x).probs, predictor.learnt
    make, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        predictor.update(make(x, y))
    assert predictor.learnt is learnt
    torch.testing.assert_close(predictor(x).probs, before, rtol=0, atol=0)


def test_points_that_were_not_learnt_cannot_be_forgotten():
    predictor, x, y = fitted()
    predictor.update(loader(x[:40], y[:40]))
    before = predictor(x).probs
    others = {"inputs": (x[30:], y[30:]), "labels": (x[:5], (y[:5] + 1) % 3), "twice": (x[[0, 0]], y[[0, 0]])}
    for inputs, targets in others.values():
        with pytest.raises(ValueError, match="not among those that the posterior has learnt"):
            predictor.forget(loader(inputs, targets))
    torch.testing.assert_close(predictor(x).probs, before, rtol=0, atol=0)


@pytest.mark.parametrize("drift", [-1.0, float("nan"), float("inf")])
def test_a_drift_is_a_number_of_at_least_zero(drift: float):
    predictor, x, y = fitted()
    with pytest.raises(ValueError, match="drift="):
        predictor.update(loader(x, y), drift=drift)


def test_more_than_the_memory_budget_is_refused():
    predictor, x, y = fitted()
    predictor._linearization.memory_budget = 4000
    with pytest.raises(ValueError, match="memory_budget"):
        predictor.update(loader(x, y))


def test_a_type_and_a_device_are_followed():
    predictor, x, y = fitted()
    expected = predictor.update(loader(x, y))(x).probs
    torch.testing.assert_close(predictor.float()(x.float()).probs.double(), expected, rtol=1e-4, atol=1e-5)
    predictor.update(loader(x[:5].float(), y[:5]))  # and goes on in the other type
    assert predictor.learnt.num_points == 65


class Pixels(nn.Module):
    """Logits of three classes at four positions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.tanh()).unflatten(1, (3, 2, 2))


def test_positions_of_one_sample_are_left_out_together():
    torch.manual_seed(0)
    model, x = Pixels().double(), torch.randn(40, 3).double()
    y = torch.randint(3, (40, 2, 2))
    y[:, 0, 0] = -100
    predictor = fit_ella(model, loader(x, y.clamp_min(0)), **OPTIONS, prior_variance=1.0, residual="none")
    predictor.update(loader(x, y))
    assert predictor.learnt.num_points == 40
    assert len(predictor.learnt.points.logits) == 120
    assert predictor.forget(loader(x, y, 3)).learnt is None


def test_a_posterior_without_anything_learnt_is_that_of_the_fit():
    one = torch.ones(()).double()
    posterior = Posterior(torch.eye(2).double(), one, one, one, one)
    torch.testing.assert_close(posterior.covariance(), torch.eye(2).double() / 2)


def test_a_fit_moves_the_mean_by_unseen_points_only_where_each_is_predicted_better_without_itself(caplog):
    model, x, _, train = problem("classification")
    torch.manual_seed(1)
    inputs = torch.randn(600, 3).double()
    with torch.no_grad():
        f = model(inputs)
        like_it = Classification().sample(f, torch.Generator().manual_seed(5))
        shifted = Classification().sample(f + torch.tensor([2.0, 0.0, -2.0]), torch.Generator().manual_seed(5))
    options = {**OPTIONS, "learn": True, "residual": 3, "num_samples": 256}
    still = fit_ella(model, train, loader(inputs[:300], like_it[:300]), **options)
    torch.testing.assert_close(still(x).logits_mean, model(x).detach(), rtol=0, atol=0)
    moved, left = (
        fit_ella(model, train, loader(inputs[:300], shifted[:300]), **options | {"learn": learn})
        for learn in (True, False)
    )
    torch.testing.assert_close(left(x).logits_mean, model(x).detach(), rtol=0, atol=0)
    tested, truth = inputs[300:], shifted[300:]
    assert moved.log_prob(tested, truth).mean() > left.log_prob(tested, truth).mean() + 0.003
    assert moved.mean.norm() > 0


def test_a_mean_that_a_fit_moved_is_saved_and_is_where_an_update_begins(tmp_path: Path):
    predictor, x, y = fitted()
    predictor.mean = torch.tensor([0.3, -0.2, 0.1, 0.5]).double()
    loaded = ELLAPredictor.load(predictor.save(tmp_path / "ella.safetensors"), predictor.model)
    torch.testing.assert_close(loaded(x).probs, predictor(x).probs, rtol=0, atol=0)
    f, features = dense_features(predictor, x)
    torch.testing.assert_close(loaded(x).logits_mean, f + features @ predictor.mean)
    narrow = predictor.posterior.covariance() * 1e-12
    predictor.curvature = torch.linalg.inv(narrow)
    mean = predictor.update(loader(x, y), drift=0.0).posterior.mean
    torch.testing.assert_close(mean, predictor.mean, rtol=1e-6, atol=0)


def test_forgetting_twice_is_refused_and_does_not_reach_for_the_training_points():
    predictor, x, y = fitted()
    before = predictor(x).probs
    predictor.update(loader(x, y)).forget(loader(x, y))
    with pytest.raises(ValueError, match="not among those that the posterior has learnt"):
        predictor.forget(loader(x, y))
    torch.testing.assert_close(predictor(x).probs, before, rtol=0, atol=0)


def test_all_points_have_one_drift():
    predictor, x, y = fitted()
    predictor.update(loader(x[:30], y[:30]), drift=0.1)
    for other in (None, 0.2):
        with pytest.raises(ValueError, match="points learnt before have"):
            predictor.update(loader(x[30:], y[30:]), drift=other)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_any_likelihood_chooses_learns_and_forgets(name: str, tmp_path: Path):
    predictor, x, y = fitted(name)
    before = predictor(x).log_prob(y).mean()
    predictor.update(loader(x, y)).save(tmp_path / "ella.safetensors")
    assert predictor(x).log_prob(y).mean() > before
    kept = deepcopy(predictor).forget(loader(x[:20], y[:20], 7))
    assert kept.learnt.num_points == 40
    assert predictor.forget(loader(x, y, 7)).learnt is None


@pytest.mark.parametrize("what", ["target", "weight"])
def test_numbers_that_are_too_large_are_refused_in_a_sentence(what: str):
    predictor, x, y = fitted("regression")
    weights = torch.ones(60).index_fill(0, torch.tensor([3]), torch.inf if what == "weight" else 1)
    y = y.index_fill(0, torch.tensor([3]), 1e300) if what == "target" else y
    with pytest.raises(ValueError, match="extreme targets" if what == "target" else "infinite"):
        predictor.update(loader(x, y, 16, weights), tuple)
    assert predictor.learnt is None


def test_points_are_known_again_in_another_type():
    predictor, x, y = fitted("regression")
    predictor.update(loader(x, y)).float()
    assert predictor.forget(loader(x.float(), y.float(), 7)).learnt is None


def test_a_file_whose_learnt_part_is_not_whole_is_refused(tmp_path: Path):
    predictor, x, y = fitted()
    path = predictor.update(loader(x, y)).save(tmp_path / "ella.safetensors")
    tensors, metadata = artefact.read(path, FORMAT)
    without = {name: value for name, value in metadata.items() if name != "learnt"}
    fewer = {name: value for name, value in tensors.items() if name != "learnt.weights"}
    other = tensors | {"learnt.features": tensors["learnt.features"][..., 1:].clone()}
    for parts, described in ((tensors, without), (fewer, metadata), (other, metadata)):
        artefact.write(path, parts, described)
        with pytest.raises(ValueError, match=r"cannot be read as a posterior|are not those of a posterior"):
            ELLAPredictor.load(path, predictor.model)


def test_a_mean_that_moves_less_than_by_bayes_rule_keeps_the_covariance_of_bayes_rule():
    predictor, x, _ = fitted("regression")
    f, features = dense_features(predictor, x)
    prior, rows = torch.linalg.inv(predictor.posterior.covariance()), features.flatten(0, 1)
    own = predictor.likelihood.sample(f, torch.Generator().manual_seed(4))
    assert predictor.update(loader(x, own)).learnt.reach < 1
    torch.testing.assert_close(torch.linalg.inv(predictor.posterior.covariance()), prior + rows.T @ rows / 0.3)


@pytest.mark.parametrize(("errors", "best"), [(0.0, 0), (1.0, 0), (2.0, 2)])
def test_a_drift_must_predict_better_by_more_than_a_standard_error(errors: float, best: int):
    gains = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    gains = (gains - gains.mean()) / gains.std(correction=0) + errors / 10  # the mean of 100, in standard errors
    plain = torch.rand(100, generator=torch.Generator().manual_seed(1)).double()
    points = Observations(plain.unsqueeze(1), plain.view(-1, 1, 1), plain)
    assert _choice([plain, plain, plain - gains], 2, points, 100, World()) == best


class Augmented(Dataset):
    """Inputs with noise, as transforms draw it."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.x[number] + 0.1 * torch.randn(3).double(), self.y[number]

    def __len__(self) -> int:
        return len(self.x)


@pytest.mark.parametrize("what", ["update", "forget", "evidence"])
@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_gradients_and_modes_of_the_user_are_untouched(what: str, fails: bool):
    predictor, x, y = fitted()
    if what == "forget":
        predictor.update(DataLoader(Augmented(x, y), 16))
    y = y + 5 if fails else y
    predictor.model.train()
    state, weights = torch.get_rng_state(), deepcopy(predictor.model.state_dict())
    with pytest.raises(ValueError, match="labels must lie in") if fails else nullcontext():
        getattr(predictor, what)(DataLoader(Augmented(x, y), 16, shuffle=what == "update"))
    assert state.equal(torch.get_rng_state())
    assert predictor.model.training
    assert all(parameter.grad is None for parameter in predictor.model.parameters())
    torch.testing.assert_close(predictor.model.state_dict(), weights, rtol=0, atol=0)
