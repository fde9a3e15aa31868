"""Likelihoods where numbers are large, sure, unordered or missing, against exact values."""

import pytest
import torch
from conftest import Case, ListDataset, flat
from lightning.pytorch import LightningModule, Trainer
from test_other_likelihoods import SCALES, regression_case
from torch import Tensor, nn
from torch.func import jacrev
from torch.utils.data import DataLoader

from lightning_ella import LIKELIHOODS, ELLACallback, ELLAPredictor, Settings, fit_ella
from lightning_ella.fit import run
from lightning_ella.likelihoods import Binary, Heteroscedastic, Likelihood, MultiLabel, Ordinal, Poisson
from lightning_ella.predictions import Gaussian
from lightning_ella.stages import Stages

ONE = torch.ones(())


def certain(outputs: Tensor) -> Gaussian:
    return Gaussian(outputs, torch.zeros(*outputs.shape, 1), torch.zeros(1, 1))


def test_ordered_logits_do_not_cancel_where_both_are_large():
    f = torch.tensor([[20.0, 18.0]])
    exact = (f.double()[:, 0].neg().exp() - f.double()[:, 1].neg().exp()).abs().log()  # σ(a) − σ(b) ≈ e^−b − e^−a
    torch.testing.assert_close(Ordinal().log_prob(f, torch.tensor([1])).double(), exact, rtol=1e-6, atol=0)
    f = torch.tensor([[50.0, 45.0, 5.0, 0.0, -5.0, -45.0]])
    found, precise = (
        Ordinal().curvature(f, torch.eye(6)[None]),
        Ordinal().curvature(f.double(), torch.eye(6)[None].double()),
    )
    torch.testing.assert_close(found.double(), precise, rtol=1e-4, atol=1e-9)
    assert precise.max() < 1  # no more than the largest σ'


def test_ordered_logits_that_cross_are_a_distribution_with_a_bounded_curvature():
    f = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    f = torch.cat([f, torch.zeros(1, 3)]).double()  # equal ones, too
    ordinal = Ordinal()
    torch.testing.assert_close(ordinal.probs(f).sum(-1), torch.ones(501).double())
    assert ordinal.information(f).max() < 1e3
    plain = f[:500].sort(-1, descending=True).values.sigmoid()
    expected = torch.stack([1 - plain[:, 0], plain[:, 0] - plain[:, 1], plain[:, 1] - plain[:, 2], plain[:, 2]], -1)
    torch.testing.assert_close(ordinal.probs(f[:500]), expected, rtol=0, atol=1e-3)
    case = regression_case(3, count=60)
    case.targets = torch.randint(4, (60,))
    predictor = fit_ella(case.model, case.loader(), case.loader(), likelihood="ordinal", num_landmarks=40, rank=4)
    out = predictor(case.inputs)
    assert out.log_prob(case.targets).isfinite().all()
    assert out.mean.shape == (60,)  # one target for all logits
    assert out.quantile([0.1, 0.9]).shape == (2, 60)


@pytest.mark.parametrize("f", [17.0, 20.0, 40.0, -20.0])
@pytest.mark.parametrize("kind", [Binary, MultiLabel])
def test_a_sure_label_that_is_wrong_costs_its_logit(kind: type[MultiLabel], f: float):
    likelihood = kind()
    target = torch.tensor([[0.0 if f > 0 else 1.0]])
    prediction = likelihood.predict(certain(torch.tensor([[f]])), "mc", ONE)
    torch.testing.assert_close(prediction.log_prob(target), torch.tensor([-abs(f)]))
    metrics = likelihood.metrics(1)
    metrics.update(likelihood.summary(prediction, target), target)
    assert float(metrics.compute()["nll"]) == pytest.approx(
        min(abs(f), 36.7), rel=0.02
    )  # 1 − p, float64, as ε at least


@pytest.mark.parametrize("mean", [1.0, 1000.0])
def test_the_variance_of_large_means_does_not_cancel(mean: float):
    outputs, draws = torch.tensor([[mean, -4.6]]), torch.randn(4096, 1)
    logits = Gaussian(outputs, torch.tensor([[[0.05], [0.0]]]), (draws - draws.mean()) / draws.std(correction=0))
    prediction = Heteroscedastic().predict(logits, "mc", ONE)
    expected = torch.tensor([[-4.6]]).exp() + 0.05**2
    torch.testing.assert_close(prediction.variance, expected, rtol=0.02, atol=0)
    normal = 0.1125 * (2 * 0.3989 - 0.5642)  # CRPS at the mean, of the deviation √.01255
    torch.testing.assert_close(prediction.crps(torch.tensor([[mean]])), torch.tensor([[normal]]), rtol=0.1, atol=0)


def test_large_rates_stay_counts():
    generator = torch.Generator().manual_seed(0)
    drawn = Poisson().sample(torch.full((2000, 1), 20.0), generator)
    rate = torch.tensor(20.0).exp()
    assert abs(drawn.mean() / rate - 1) < 1e-5
    assert abs(drawn.std() / rate.sqrt() - 1) < 0.1
    assert (Poisson().sample(torch.tensor([[300.0]]), generator) > 0).all()
    y = torch.tensor([[1e6]])
    exact = torch.distributions.Poisson(y.double()).log_prob(y.double())[:, 0]
    torch.testing.assert_close(Poisson().log_prob(y.log().double(), y.double()), exact)


def test_targets_that_are_ignored_have_no_log_probability():
    case = regression_case(3, count=30)
    case.targets = torch.randint(3, (30,))
    case.targets[::3] = -100
    predictor = fit_ella(case.model, case.loader(), num_landmarks=20, rank=3, prior_variance=1.0, **SCALES)
    found = predictor.log_prob(case.inputs, case.targets)
    assert (found[::3] == 0).all()
    assert (found[case.targets >= 0] < 0).all()


def test_labels_may_be_missing_and_fields_may_have_holes():
    torch.manual_seed(0)
    x, network = torch.randn(20, 1, 4, 4).double(), nn.Conv2d(1, 1, 3, padding=1).double()
    labels, values = torch.randint(2, (20, 1, 4, 4)).double(), torch.randn(20, 1, 4, 4).double()
    labels[:, :, 0], values[:, :, 0] = -100, torch.nan
    weights = torch.ones(20, 4, 4)
    weights[:, 0] = 0
    options = {"num_landmarks": 20, "rank": 3, "prior_variance": 1.0, "num_curvature": None, **SCALES}
    binary = fit_ella(network, Case(network, x, labels).loader(), likelihood="binary", **options)
    p = network(x).detach().sigmoid()
    J = jacobian(network, x)[:, 1:].flatten(0, 2) @ flat(binary.basis)  # rows 1 to 3 of each image
    information = (p * (1 - p))[:, 0, 1:].flatten()
    torch.testing.assert_close(binary.curvature, J.T @ (information.unsqueeze(1) * J))
    holes = DataLoader(ListDataset(list(zip(x, values, weights, strict=True))), 7)
    ocean = fit_ella(network, holes, likelihood="regression", unpack=tuple, noise_variance=0.5, **options)
    J = jacobian(network, x)[:, 1:].flatten(0, 2) @ flat(ocean.basis)
    torch.testing.assert_close(ocean.curvature, J.T @ J / 0.5)


def jacobian(network: nn.Module, x: Tensor) -> Tensor:
    """(B, *, P) of the one output channel of a network, (B, 1, *)."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    rows = jacrev(lambda at: torch.func.functional_call(network, at, (x,))[:, 0])(parameters)
    return torch.cat([part.flatten(x.ndim - 1) for part in rows.values()], -1).detach()


class Waiting(Likelihood):
    """Without moments."""

    per_output = True

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - outputs.exp() * targets).sum(-1)

    def information(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return -torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype).log() / outputs.exp()


class Shared(Likelihood):
    """One count from two outputs: log-mean, and one that only adds to the variance."""

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets * outputs[..., 0] - outputs[..., 0].exp() - outputs[..., 1].square()

    def information(self, outputs: Tensor) -> Tensor:
        return torch.stack([outputs[..., 0].exp(), torch.full_like(outputs[..., 1], 2)], -1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(outputs[..., 0].exp(), generator=generator)

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return outputs[..., 0].exp(), outputs[..., 0].exp()


@pytest.mark.parametrize("kind", [Waiting, Shared])
def test_a_likelihood_needs_three_methods_only(kind: type[Likelihood], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LIKELIHOODS, "mine", kind)
    case = regression_case(2, count=300)
    likelihood = kind()
    case.targets = likelihood.sample(case.logits(), torch.Generator().manual_seed(0))
    predictor = fit_ella(case.model, case.loader(), case.loader(50), likelihood="mine", num_landmarks=40, rank=5)
    out = predictor(case.inputs)
    assert out.mean.shape == out.variance.shape == out.crps(case.targets).shape == case.targets.shape
    low, high = out.interval(0.9)
    inside = ((case.targets >= low) & (case.targets <= high)).double().mean()
    assert 0.8 < inside <= 0.99
    certain_mean = likelihood.moments(case.logits())[0] if likelihood.has_moments else (-case.logits()).exp()
    assert ((out.mean - certain_mean).abs() / certain_mean).median() < 0.2


def test_one_target_for_the_only_output_may_have_its_axis_or_not():
    case = regression_case(1)
    squeezed = nn.Sequential(case.model, nn.Flatten(0))
    options = {"likelihood": "regression", "num_landmarks": 20, "rank": 5, "noise_variance": torch.tensor(0.1)}
    predictor = fit_ella(squeezed, case.loader(), **options)
    out = predictor(case.inputs)
    assert out.crps(case.targets).shape == out.crps(case.targets[:, 0]).shape == (40,)
    torch.testing.assert_close(out.log_prob(case.targets), out.log_prob(case.targets[:, 0]))
    with pytest.raises(ValueError, match="needs targets of the shape"):
        fit_ella(case.model, case.loader(), **options)(case.inputs).crps(torch.zeros(40, 2))
    with pytest.raises(ValueError, match=r"quantiles are of numbers in \[0, 1\]"):
        out.quantile(1.5)
    assert out.quantile(torch.tensor(0.5)).shape == (40,)


def test_resuming_with_other_points_held_out_measures_the_noise_again(tmp_path):
    case = regression_case(1, count=60)
    settings = Settings(likelihood="regression", num_landmarks=30, rank=4, prior_variance=1.0, **SCALES)
    noisy = Case(case.model, case.inputs, case.targets + 10 * torch.randn(60, 1).double())
    fit = lambda unseen, stages: run(case.model, case.loader(), unseen.loader(), settings, stages=stages).predictor  # noqa: E731
    fit(noisy, Stages(tmp_path))
    resumed = fit(case, Stages(tmp_path, [tmp_path]))
    torch.testing.assert_close(resumed.curvature, fit(case, None).curvature)


def test_the_noise_is_that_of_points_drawn_from_all():
    x = torch.linspace(-1, 1, 2000).unsqueeze(1)
    y = torch.where(x < 0, 0.1, 2.0) * torch.randn(2000, 1)
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight), nn.init.zeros_(network.bias)
    loader = Case(network, x, y).loader(100)
    predictor = fit_ella(network, loader, likelihood="regression", num_landmarks=20, rank=2, num_calibration=500)
    assert predictor.settings["noise_variance"] == pytest.approx(float(y.square().mean()), rel=0.3)


def test_a_temperature_that_is_given_is_noise_without_unseen_points_too():
    case = regression_case(1)
    options = {"likelihood": "regression", "num_landmarks": 20, "rank": 4, "prior_variance": 1.0}
    twice = fit_ella(case.model, case.loader(), noise_variance=0.1, **options, **(SCALES | {"temperature": 2.0}))
    plain = fit_ella(case.model, case.loader(), noise_variance=0.2, **options, **SCALES)
    torch.testing.assert_close(twice.curvature, plain.curvature)
    torch.testing.assert_close(twice(case.inputs).variance, plain(case.inputs).variance)


def test_sequences_of_any_length_need_no_unseen_points():
    words = [torch.randint(5, (length,)) for length in (4, 4, 4, 4, 7, 7, 7, 7, 2, 2, 2, 2)]
    tagger = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()
    padded = lambda samples: tuple(  # noqa: E731
        nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=value)
        for part, value in zip(zip(*samples, strict=True), (0, -100), strict=True)
    )
    loader = DataLoader(ListDataset([(w, w % 3) for w in words]), 4, collate_fn=padded)
    predictor = fit_ella(tagger, loader, num_landmarks=12, rank=4, num_curvature=None)
    assert predictor(words[4].unsqueeze(0)).probs.shape == (1, 7, 3)


def test_all_points_can_be_forgotten_whatever_their_batches():
    case = regression_case(2)
    options = {"likelihood": "regression", "num_landmarks": 20, "rank": 4, "noise_variance": 0.1, "prior_variance": 1.0}
    predictor = fit_ella(case.model, case.loader(), **options, **SCALES)
    before = predictor.curvature.norm()
    predictor.forget(case.loader(3))
    assert predictor.curvature.norm() < 1e-6 * before
    with pytest.raises(ValueError, match="no points"):
        predictor.update(DataLoader(ListDataset([])))


def test_blocks_of_the_joint_covariance_may_be_single_numbers():
    case = regression_case(2)
    options = {"likelihood": "regression", "num_landmarks": 20, "rank": 4, "noise_variance": 0.1}
    joint = fit_ella(case.model, case.loader(), **options)(case.inputs).logits.joint
    dense = joint.factor @ joint.factor.T
    torch.testing.assert_close(joint[3, 4], dense[3, 4])
    torch.testing.assert_close(joint[3, 2:5], dense[3, 2:5])
    torch.testing.assert_close(joint[torch.tensor([1, 5]), :4], dense[[1, 5], :4])


class Operator(nn.Module):
    """A Fourier layer of a neural operator, (B, 1, L) to the same; its complex weights are pairs of real numbers."""

    def __init__(self):
        super().__init__()
        self.lift, self.project = nn.Conv1d(1, 3, 1), nn.Conv1d(3, 1, 1)
        self.spectrum = nn.Parameter(torch.randn(3, 3, 4, 2) / 3)

    def forward(self, x: Tensor) -> Tensor:
        v = self.lift(x)
        modes = torch.einsum("bil,iol->bol", torch.fft.rfft(v)[..., :4], torch.view_as_complex(self.spectrum))
        return self.project(nn.functional.gelu(torch.fft.irfft(modes, n=x.shape[-1]) + v))


def test_a_neural_operator_has_a_variance_at_each_point_of_its_field():
    torch.manual_seed(0)
    network, x = Operator().double(), torch.randn(20, 1, 16).double()
    loader = Case(network, x, torch.randn(20, 1, 16).double()).loader()
    options = {"likelihood": "regression", "channels": "first", "noise_variance": 0.1, "prior_variance": 0.5}
    predictor = fit_ella(network, loader, num_landmarks=20, rank=5, num_curvature=None, **options, **SCALES)
    features = jacobian(network, x) @ flat(predictor.basis)  # (B, L, K)
    H = torch.einsum("blk,blm->km", features, features) / 0.1
    covariance = features @ torch.linalg.inv(H + torch.eye(5) / 0.5) @ features.mT
    torch.testing.assert_close(predictor.curvature, H)
    torch.testing.assert_close(predictor(x).variance[:, 0], covariance.diagonal(dim1=1, dim2=2) + 0.1)


def test_complex_weights_are_refused_with_the_way_out():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.cfloat) @ self.weight).real

    network = Complex()
    with pytest.raises(ValueError, match=r"torch\.view_as_complex"):
        fit_ella(network, Case(network, torch.randn(20, 2), torch.randint(2, (20,))).loader(), num_landmarks=5, rank=2)


def test_tied_parameters_go_by_any_of_their_names():
    network = nn.ModuleDict({"embed": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)}).double()
    network["head"].weight = network["embed"].weight
    twice = lambda model, x: model["head"](model["embed"](x).tanh())  # noqa: E731
    loader = Case(network, torch.randn(20, 2).double(), torch.randint(2, (20,))).loader()
    predictor = fit_ella(network, loader, forward=twice, parameters="head.*", num_landmarks=10, rank=2)
    assert list(predictor.basis) == ["embed.weight"]


def test_layers_in_half_precision_that_are_frozen_give_full_precision():
    torch.manual_seed(0)
    frozen = nn.Linear(3, 2).bfloat16().requires_grad_(False)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapter, self.frozen = nn.Linear(3, 3), frozen

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen((x + self.adapter(x)).bfloat16())

    network = Adapted()
    loader = Case(network, torch.randn(30, 3), torch.randn(30, 2)).loader()
    out = fit_ella(network, loader, likelihood="regression", num_landmarks=10, rank=3)(torch.randn(4, 3))
    assert out.variance.dtype == out.quantile(0.9).dtype == torch.float32


@pytest.mark.parametrize("likelihood", ["regression", "heteroscedastic", "poisson", "multilabel", "ordinal"])
def test_the_callback_takes_any_likelihood(likelihood: str, tmp_path):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return -LIKELIHOODS[likelihood]().log_prob(self(batch[0]), batch[1]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    module, x = Module(), torch.randn(80, 3)
    y = LIKELIHOODS[likelihood]().sample(module(x).detach(), torch.Generator().manual_seed(0))
    train, unseen = (DataLoader(ListDataset(list(zip(x[p], y[p], strict=True))), 8) for p in (slice(40), slice(40, 80)))
    ella = ELLACallback(likelihood=likelihood, num_landmarks=20, rank=3, calibration_loader=unseen, on_error="raise")
    trainer = Trainer(max_epochs=1, callbacks=[ella], default_root_dir=tmp_path, accelerator="cpu", logger=False)
    trainer.fit(module, train)
    out = ella.predictor(x)
    assert trainer.callback_metrics["ella/nll"].isfinite()
    assert out.log_prob(y).isfinite().all()
    loaded = ELLAPredictor.load(ella.predictor.save(tmp_path / "ella.safetensors"), module)
    torch.testing.assert_close(loaded(x).log_prob(y), out.log_prob(y))
