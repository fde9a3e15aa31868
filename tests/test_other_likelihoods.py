"""Likelihoods other than classification, and outputs of several positions, against dense float64 computations."""

from math import pi

import pytest
import torch
from conftest import Case, ListDataset, flat, make_case
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.data import DataLoader

from lightning_ella import LIKELIHOODS, ELLAPredictor, fit_ella
from lightning_ella.batches import inputs_and_targets
from lightning_ella.curvature import way
from lightning_ella.fit import check
from lightning_ella.likelihoods import Classification, Likelihood, Regression
from lightning_ella.numerics import standard_normal
from lightning_ella.observations import Observations
from lightning_ella.posterior import SCALES as SCALE_NAMES
from lightning_ella.posterior import Posterior, calibrate
from lightning_ella.predictions import Gaussian
from lightning_ella.settings import Settings

OUTPUTS = dict.fromkeys(LIKELIHOODS, 3) | {"binary": 1, "heteroscedastic": 4, "ordinal": 3}
SCALES = {"covariance_scale": 1.0, "residual": "none", "temperature": 1.0}


def made(name: str) -> Likelihood:
    return Regression((0.5, 1.0, 2.0)) if name == "regression" else LIKELIHOODS[name]()


def outputs_of(name: str, count: int) -> Tensor:
    torch.manual_seed(0)
    outputs = torch.randn(count, OUTPUTS[name]).double()
    return outputs.sort(-1, descending=True).values if name == "ordinal" else outputs


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, DataLoader]:
    """A network, 60 inputs, targets that it draws itself, and their loader."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, OUTPUTS[name])).double()
    x = torch.randn(60, 3).double()
    with torch.no_grad():
        y = made(name).sample(model(x), torch.Generator().manual_seed(1))
    return model, x, y, DataLoader(ListDataset([(a.clone(), b.clone()) for a, b in zip(x, y, strict=True)]), 16)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_curvature_is_the_covariance_of_the_score_of_targets_that_it_draws(name: str):
    likelihood, outputs = made(name), outputs_of(name, 4)
    features = torch.randn(4, OUTPUTS[name], 3).double()
    many = outputs.expand(200_000, 4, -1)
    scores = likelihood.score(many, likelihood.sample(many, torch.Generator().manual_seed(0)))
    fisher = torch.einsum("sbc,sbd->bcd", scores, scores) / len(many)
    expected = torch.einsum("bck,bcd,bdl->kl", features, fisher, features)
    found = likelihood.curvature(outputs, features)
    assert (found - expected).norm() < 0.02 * expected.norm()
    diagonal = fisher.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(likelihood.information(outputs), diagonal, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_random_signs_have_the_curvature_as_their_mean(name: str):
    model, x, y, _ = problem(name)
    options = {"likelihood": name, "num_landmarks": 40, "rank": 4, "num_curvature": None, "seed": 1, **SCALES}
    options |= {"prior_variance": 1.0} | ({"noise_variance": (0.5, 1.0, 2.0)} if name == "regression" else {})
    items = [(a.clone(), b.clone()) for a, b in zip(x, y, strict=True)]
    many, once = (DataLoader(ListDataset(items * times), 600) for times in (300, 1))
    sampled = fit_ella(model, many, **options, curvature="sampled")
    exact = ELLAPredictor(
        model,
        basis=sampled.basis,
        **{part: getattr(sampled, part) for part in ("eigenvalues", "curvature", *SCALE_NAMES)},
        settings=sampled.settings,
    )._curvature_of(once, inputs_and_targets)
    assert (sampled.curvature / 300 - exact).norm() < 0.05 * exact.norm()


class Shared(Classification):
    """Of a user who wrote the curvature anew, and not its root."""

    def curvature(self, outputs: Tensor, features: Tensor) -> Tensor:
        return super().curvature(outputs, features)


def test_a_curvature_of_ones_own_is_not_sampled_without_its_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LIKELIHOODS, "shared", Shared)
    case = make_case("mlp", 300)
    options = {"num_landmarks": 40, "rank": 4, "num_curvature": None, **SCALES}
    own = fit_ella(case.model, case.loader(), case.loader(), "shared", **options)
    exact = fit_ella(case.model, case.loader(), case.loader(), curvature="exact", **options)
    torch.testing.assert_close(own.curvature, exact.curvature)
    with pytest.raises(ValueError, match="override rooted"):
        fit_ella(case.model, case.loader(), case.loader(), "shared", curvature="sampled", **options)
    with pytest.raises(ValueError, match="override rooted"):
        check(case.model, case.loader(), case.loader(), Settings(likelihood="shared", curvature="sampled"))


class Rootless(Classification):
    """Whose root has no derivative."""

    def rooted(self, outputs: Tensor, features: Tensor) -> Tensor:
        return super().rooted(outputs, features).detach()


def test_what_fails_in_the_fit_fails_in_its_rehearsal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LIKELIHOODS, "rootless", Rootless)
    case = make_case("mlp", 700)
    with pytest.raises(RuntimeError, match="grad"):
        check(case.model, case.loader(), case.loader(), Settings(likelihood="rootless"))


@pytest.mark.parametrize(
    ("how", "num_points", "rank", "tuned", "expected"),
    [
        ("auto", 1000, 20, True, "sampled"),
        ("auto", 500, 20, True, "exact"),  # 25 points a direction
        ("auto", 1000, 100, True, "exact"),
        ("auto", 100, 1, True, "exact"),
        ("auto", 10_000, 20, False, "exact"),  # nothing evens its noise out
        ("sampled", 10, 20, False, "sampled"),
        ("exact", 10_000, 1, True, "exact"),
    ],
)
def test_the_curvature_is_sampled_where_its_noise_does_no_harm(how, num_points, rank, tuned, expected):
    assert way(how, num_points, rank, LIKELIHOODS["classification"](), tuned=tuned) == expected


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_predictive_is_that_of_dense_sampling(name: str):
    likelihood, mean = made(name), outputs_of(name, 2)
    factor = 0.4 * torch.randn(2, OUTPUTS[name], 2).double()
    gaussian = Gaussian(mean, factor, standard_normal(20_000, 2, 1).double())
    one = torch.ones(()).double()
    prediction = likelihood.predict(gaussian, likelihood.predictives[0], one)
    targets = likelihood.sample(mean, torch.Generator().manual_seed(3))
    root = torch.linalg.cholesky(gaussian.covariance + 1e-9 * torch.eye(OUTPUTS[name]))
    f = mean + (root @ torch.randn(300_000, 2, OUTPUTS[name], 1).double()).squeeze(-1)
    if likelihood.per_output and name in ("multilabel", "binary", "regression"):  # as if outputs were independent
        one_by_one = [
            type(likelihood)() if name != "regression" else Regression(likelihood.noise_variance[c])
            for c in range(OUTPUTS[name])
        ]
        logs = [
            kind.log_prob(f[..., c : c + 1], targets[:, c : c + 1].expand(len(f), -1, -1)).exp().mean(0).log()
            for c, kind in enumerate(one_by_one)
        ]
        expected = torch.stack(logs).sum(0)
    else:
        expected = likelihood.log_prob(f, targets.expand(len(f), *targets.shape)).exp().mean(0).log()
    torch.testing.assert_close(-likelihood.nll(prediction, targets), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(prediction.log_prob(targets), -likelihood.nll(prediction, targets))
    if likelihood.per_output:
        drawn = likelihood.sample(f, torch.Generator().manual_seed(4))
        torch.testing.assert_close(prediction.mean, drawn.mean(0), rtol=0.02, atol=0.02)
        torch.testing.assert_close(prediction.variance, drawn.var(0), rtol=0.05, atol=0.02)


def test_quantiles_and_crps_of_samples_are_those_of_the_closed_form():
    mean, factor = torch.tensor([[0.3, -2.0]]).double(), torch.tensor([[[0.5, 0.2], [0.1, 2.0]]]).double()
    gaussian = Gaussian(mean, factor, standard_normal(40_000, 2, 0).double())
    closed = Regression((0.25, 1.0)).predict(gaussian, "exact", torch.ones(()).double())
    sampled = LIKELIHOODS["heteroscedastic"]().predict(
        Gaussian(
            torch.cat([mean, torch.tensor([[0.25, 1.0]]).double().log()], -1),
            torch.cat([factor, torch.zeros(1, 2, 2)], 1),
            gaussian.draws,
        ),
        "mc",
        torch.ones(()).double(),
    )
    targets = torch.tensor([[1.0, -1.0]]).double()
    for q in (0.05, 0.5, [0.1, 0.9]):
        torch.testing.assert_close(closed.quantile(q), sampled.quantile(q), rtol=0, atol=0.08)
    torch.testing.assert_close(closed.crps(targets), sampled.crps(targets), rtol=0, atol=0.02)
    low, high = closed.interval(0.9)
    normal = torch.distributions.Normal(closed.mean, closed.variance.sqrt())
    torch.testing.assert_close(normal.cdf(high) - normal.cdf(low), torch.full((1, 2), 0.9).double())


def regression_case(outputs: int = 1, count: int = 40) -> Case:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
    x = torch.randn(count, 2).double()
    return Case(model, x, x @ torch.randn(2, outputs).double() + 0.3 * torch.randn(count, outputs).double())


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_is_the_gaussian_process_of_the_neural_tangent_kernel(outputs: int):
    case, noise, prior = regression_case(outputs), 0.09, 2.0
    predictor = fit_ella(
        *(case.model, case.loader()),
        likelihood="regression",
        num_landmarks=40,
        rank=40 if outputs == 1 else 33,
        noise_variance=noise,
        prior_variance=prior,
        **SCALES,
    )
    new = Case(case.model, torch.randn(9, 2).double(), torch.zeros(9, outputs))
    J, Jnew = case.jacobian().flatten(0, 1), new.jacobian()
    V = flat(predictor.basis)
    J, Jnew = J @ V @ V.T, Jnew @ V @ V.T  # the kernel that the directions hold; with one output it is all there is
    gram = prior * J @ J.T + noise * torch.eye(len(J))
    cross = prior * Jnew @ J.T  # (9, C, NC)
    expected = prior * Jnew @ Jnew.mT - cross @ torch.linalg.solve(gram, cross.mT)
    out = predictor(new.inputs)
    torch.testing.assert_close(out.logits_covariance, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out.mean, new.logits())
    torch.testing.assert_close(out.variance, expected.diagonal(dim1=1, dim2=2) + noise, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["binary", "multilabel", "poisson", "regression", "preference"])
def test_parts_are_those_of_the_dense_hessian(name: str):
    case = regression_case(OUTPUTS[name])
    likelihood = made(name)
    case.targets = likelihood.sample(case.logits(), torch.Generator().manual_seed(0))
    noise = {"noise_variance": (0.5, 1.0, 2.0)} if name == "regression" else {}
    predictor = fit_ella(
        *(case.model, case.loader()), likelihood=name, num_landmarks=40, rank=10, prior_variance=1.0, **SCALES, **noise
    )
    nll = lambda f, y: -likelihood.log_prob(f, y)  # noqa: E731
    dense = torch.stack([hessian(nll)(f, y) for f, y in zip(case.logits(), case.targets, strict=True)])
    features = case.jacobian() @ flat(predictor.basis)
    expected = torch.einsum("bck,bcd,bdl->kl", features, dense, features)
    torch.testing.assert_close(predictor.curvature, expected)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_each_is_calibrated_saved_and_loaded(name: str, tmp_path):
    case = regression_case(OUTPUTS[name], count=80)
    with torch.no_grad():
        if name == "ordinal":
            case.model[2].bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
            case.model[2].weight.copy_(case.model[2].weight[:1].expand(3, -1))
    case.targets = LIKELIHOODS[name]().sample(case.logits(), torch.Generator().manual_seed(0))
    predictor = fit_ella(case.model, case.loader(), case.loader(), likelihood=name, num_landmarks=40, rank=5)
    loaded = type(predictor).load(predictor.save(tmp_path / "ella.safetensors"), case.model)
    ours, theirs = predictor(case.inputs), loaded(case.inputs)
    torch.testing.assert_close(ours.log_prob(case.targets), theirs.log_prob(case.targets), rtol=0, atol=0)
    assert ours.log_prob(case.targets).isfinite().all()
    assert predictor.sample_functions(4)(case.inputs).shape == (4, *case.logits().shape)


@pytest.mark.parametrize("noise", ["shared", "per-output"])
def test_the_noise_is_found(noise: str):
    case = regression_case(2, count=2000)
    with torch.no_grad():
        deviations = torch.tensor([0.3, 0.3]) if noise == "shared" else torch.tensor([0.2, 1.5])
        case.targets = case.logits() + deviations * torch.randn(2000, 2).double()
    options = {"likelihood": "regression", "num_landmarks": 40, "rank": 5, "noise": noise, "curvature": "exact"}
    predictor = fit_ella(case.model, case.loader(50), case.loader(50), num_curvature=None, **options)
    found = torch.atleast_1d(torch.as_tensor(predictor.settings["noise_variance"]))
    torch.testing.assert_close(found.sqrt().expand(2), deviations, rtol=0.06, atol=0)
    assert predictor.temperature == 1
    weighted = case.jacobian() @ flat(predictor.basis) / found.sqrt().unsqueeze(-1).double()
    expected = torch.einsum("bck,bcl->kl", weighted, weighted)
    # Of the noise that was tuned, not of the first guess.
    torch.testing.assert_close(predictor.curvature, expected, rtol=1e-6, atol=0)
    covered = (case.targets - predictor(case.inputs).mean).square() < 1.645**2 * predictor(case.inputs).variance
    assert abs(covered.double().mean() - 0.9) < 0.02


class Segmenter(nn.Module):
    """(B, 1, 6, 6) to (B, 3, 4, 4)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Tagger(nn.Module):
    """(B, L) token numbers to (B, L, 3)."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x).cumsum(1)))


def dense_case(kind: str) -> tuple[Case, Tensor]:
    """A case with several positions, and its Jacobian, (N, positions, C, P)."""
    torch.manual_seed(0)
    if kind == "segmenter":
        case = Case(Segmenter().double(), torch.randn(12, 1, 6, 6).double(), torch.randint(3, (12, 4, 4)))
    else:
        case = Case(Tagger().double(), torch.randint(7, (12, 5)), torch.randint(3, (12, 5)))
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}
    blocks = jacrev(lambda p: functional_call(case.model, p, (case.inputs,)))(parameters)
    axis = 1 if kind == "segmenter" else 2
    parts = [block.flatten(case.logits().ndim).movedim(axis, -2).flatten(1, -3) for block in blocks.values()]
    return case, torch.cat(parts, -1).detach()


@pytest.mark.parametrize("curvature", ["exact", "sampled"])
@pytest.mark.parametrize("kind", ["segmenter", "tagger"])
def test_every_position_counts_but_those_that_are_ignored(kind: str, curvature: str):
    case, jacobian = dense_case(kind)
    case.targets.flatten()[::5] = -100
    loader = case.loader(5)
    if curvature == "sampled":
        loader.dataset.items *= 100
    options = {"num_landmarks": 12, "rank": 4, "prior_variance": 1.0, "curvature": curvature, **SCALES}
    predictor = fit_ella(case.model, loader, **options)
    logits = case.logits().movedim(1 if kind == "segmenter" else 2, -1).flatten(1, -2)
    features = jacobian @ flat(predictor.basis)  # (N, positions, C, K)
    p = logits.softmax(-1)
    dense = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    seen = (case.targets.flatten(1) != -100).double()
    expected = torch.einsum("bpck,bpcd,bpdl,bp->kl", features, dense, features, seen)
    tolerance = {} if curvature == "exact" else {"rtol": 0.2, "atol": 0.1 * float(expected.diagonal().mean())}
    torch.testing.assert_close(predictor.curvature / len(loader.dataset) * 12, expected, **tolerance)
    out = predictor(case.inputs)
    assert out.probs.shape == out.logits_variance.shape == case.logits().shape
    torch.testing.assert_close(out.probs.sum(1 if kind == "segmenter" else 2), torch.ones(case.targets.shape).double())
    assert out.entropy.shape == out.mutual_information.shape == case.targets.shape
    A = predictor.curvature + torch.eye(4)
    everything = features.flatten(0, 2) @ torch.linalg.solve(A, features.flatten(0, 2).T)
    v = torch.randn(len(everything)).double()
    torch.testing.assert_close(out.logits.joint @ v, everything @ v)
    torch.testing.assert_close(out.logits.joint.diagonal(), everything.diagonal())
    torch.testing.assert_close(out.logits.joint[2:9, [1, 50]], everything[2:9, [1, 50]])


def test_an_image_to_image_regression_has_a_variance_for_each_pixel():
    case, jacobian = dense_case("segmenter")
    case.targets = case.logits() + 0.1
    options = {"likelihood": "regression", "noise_variance": 0.5, "prior_variance": 1.0}
    predictor = fit_ella(case.model, case.loader(), num_landmarks=12, rank=4, **options, **SCALES)
    features = jacobian @ flat(predictor.basis)
    expected = torch.einsum("bpck,bpcl->kl", features, features) / 0.5
    torch.testing.assert_close(predictor.curvature, expected)
    out = predictor(case.inputs)
    assert out.mean.shape == out.variance.shape == out.crps(case.targets).shape == (12, 3, 4, 4)
    inverse = torch.linalg.inv(expected + torch.eye(4))
    variance = torch.einsum("bpck,kl,bpcl->bpc", features, inverse, features).movedim(-1, 1).unflatten(2, (4, 4))
    torch.testing.assert_close(out.variance, variance + 0.5)


def test_calibration_takes_some_positions_of_each_point(monkeypatch: pytest.MonkeyPatch):
    case, _ = dense_case("segmenter")
    monkeypatch.setattr("lightning_ella.fit.ROWS", 40)
    case.targets[:, 0] = -100
    seen = []

    def watched(points: Observations, *args, **options) -> Posterior:
        seen.append(points)
        return calibrate(points, *args, **options)

    monkeypatch.setattr("lightning_ella.fit.calibrate", watched)
    fit_ella(case.model, case.loader(), case.loader(), num_landmarks=12, rank=4)
    assert len(seen[0].logits) == 12 * 3  # 40 // 12 of each, of those that count
    assert (seen[0].targets >= 0).all()


@pytest.mark.parametrize("curvature", ["exact", "sampled"])
def test_a_point_counts_as_often_as_its_weight_says(curvature: str):
    case = make_case("mlp", 20)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0]).repeat(5)
    weighted = DataLoader(ListDataset([(*case.dataset[i], weights[i]) for i in range(20)]), 7)
    weighted.dataset.items *= 1 if curvature == "exact" else 200
    options = {"num_landmarks": 20, "rank": 4, "curvature": curvature, "num_curvature": None, "prior_variance": 1.0}
    one = fit_ella(case.model, weighted, unpack=lambda batch: tuple(batch), **options, **SCALES)
    features = case.jacobian() @ flat(one.basis)
    probs = case.logits().softmax(-1)
    dense = torch.diag_embed(probs) - probs.unsqueeze(2) * probs.unsqueeze(1)
    expected = torch.einsum("bck,bcd,bdl,b->kl", features, dense, features, weights.double())
    scale = len(weighted.dataset) / 20
    tolerance = 1e-6 if curvature == "exact" else 0.1
    assert (one.curvature / scale - expected).norm() < tolerance * expected.norm()


def test_the_difference_of_two_rewards_has_the_variance_of_their_covariance():
    torch.manual_seed(0)
    reward = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    pairs, preferred = torch.randn(50, 2, 3).double(), torch.randint(2, (50,))
    loader = DataLoader(ListDataset(list(zip(pairs, preferred, strict=True))), 10)
    scores = lambda model, pair: model(pair).squeeze(-1)  # (B, 2)  # noqa: E731
    predictor = fit_ella(
        *(reward, loader),
        likelihood="preference",
        forward=scores,
        num_landmarks=50,
        rank=10,
        prior_variance=1.0,
        **SCALES,
    )
    a, b = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    one = lambda model, x: model(x)  # noqa: E731
    difference = predictor.outputs(a, one) - predictor.outputs(b, one)
    J = Case(reward, torch.cat([a, b]), torch.zeros(8)).jacobian()[:, 0] @ flat(predictor.basis)
    p = (reward(pairs[:, 0]) - reward(pairs[:, 1])).detach().sigmoid()
    features = Case(reward, pairs.flatten(0, 1), torch.zeros(100)).jacobian().view(50, 2, -1) @ flat(predictor.basis)
    deltas = features[:, 0] - features[:, 1]
    curvature = deltas.T @ (p * (1 - p) * deltas)  # Bradley and Terry: the Hessian of −log σ(r(a) − r(b))
    torch.testing.assert_close(predictor.curvature, curvature)
    covariance = J @ torch.linalg.inv(curvature + torch.eye(10)) @ J.T
    expected = covariance.diagonal()[:4] + covariance.diagonal()[4:] - 2 * covariance[:4, 4:].diagonal()
    torch.testing.assert_close(difference.variance[:, 0], expected)
    torch.testing.assert_close(difference.mean, (reward(a) - reward(b)).detach())
    both = predictor(torch.stack([a, b], 1))
    chosen = difference.expectation(torch.sigmoid)[:, 0]
    torch.testing.assert_close(both.probs[:, 0], chosen)


def test_the_log_probability_of_regression_is_the_normal_one():
    case = regression_case(1)
    predictor = fit_ella(
        *(case.model, case.loader()),
        likelihood="regression",
        num_landmarks=20,
        rank=5,
        noise_variance=0.1,
        prior_variance=1.0,
        **SCALES,
    )
    out = predictor(case.inputs)
    variance = out.variance[:, 0]
    expected = -0.5 * ((case.targets[:, 0] - out.mean[:, 0]) ** 2 / variance + (2 * pi * variance).log())
    torch.testing.assert_close(out.log_prob(case.targets), expected)
    torch.testing.assert_close(out.log_prob(case.targets[:, 0]), expected)  # (B,) for (B, 1)
    assert out.crps(case.targets[:, 0]).shape == (40, 1)


def test_a_network_may_leave_out_the_axis_of_its_one_output():
    case = regression_case(1)
    squeezed = nn.Sequential(case.model, nn.Flatten(0))
    options = {"likelihood": "regression", "num_landmarks": 20, "rank": 5}
    predictor = fit_ella(squeezed, Case(squeezed, case.inputs, case.targets[:, 0]).loader(), case.loader(), **options)
    out = predictor(case.inputs)
    assert out.mean.shape == out.variance.shape == out.logits_variance.shape == (40,)
    assert out.quantile([0.1, 0.9]).shape == (2, 40)
    assert predictor.sample_functions(3)(case.inputs).shape == (3, 40)


@pytest.mark.parametrize(
    ("outputs", "options", "targets", "message"),
    [
        (1, {}, torch.zeros(40).long(), "pass likelihood='binary'"),
        (2, {"likelihood": "binary"}, torch.zeros(40, 2), "one logit, but it has 2"),
        (2, {"likelihood": "multilabel"}, 2 * torch.ones(40, 2), r"targets in \[0, 1\], but they reach from 2 to 2"),
        (2, {"likelihood": "multilabel"}, torch.ones(40, 3), r"the shape \(7, 2\), but they have the shape \(7, 3\)"),
        (2, {"likelihood": "poisson"}, -torch.ones(40, 2), "needs counts, but the targets go down to -1"),
        (2, {"likelihood": "regression"}, torch.full((40, 2), torch.nan), "needs finite targets"),
        (2, {"likelihood": "regression", "noise_variance": (1.0, 1.0, 1.0)}, torch.zeros(40, 2), "has 3 numbers"),
        (2, {"likelihood": "regression", "noise_variance": -1.0}, torch.zeros(40, 2), "must be positive"),
        (3, {"likelihood": "heteroscedastic"}, torch.zeros(40, 2), "an even number, not 3"),
    ],
)
def test_what_does_not_fit_is_refused(outputs: int, options: dict, targets: Tensor, message: str):
    case = regression_case(outputs)
    case.targets = targets
    with pytest.raises(ValueError, match=message):
        fit_ella(case.model, case.loader(), num_landmarks=10, rank=3, prior_variance=1.0, **options)
