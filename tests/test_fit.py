"""The whole pipeline against dense linear algebra, and its invariances."""

import logging

import pytest
import torch
from conftest import Case, flat, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ella import ELLAPredictor, Settings, fit_ella
from lightning_ella.engine import Linearization
from lightning_ella.landmarks import LANDMARKS, Landmarks
from lightning_ella.linearize import as_function

GIVEN = {"prior_variance": 0.7, "covariance_scale": 1.0, "num_curvature": None}


def every_output(points, num_landmarks, num_outputs, generator) -> Landmarks:
    numbers = [n for n in range(len(points)) for _ in range(num_outputs)]
    return Landmarks(numbers, torch.arange(num_outputs).repeat(len(points)))


@pytest.fixture
def _every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LANDMARKS, "every-output", every_output)


def dense_covariance(case: Case, jacobian: Tensor, prior_variance: float) -> Tensor:
    """J (Σ JᵀΛJ + I/σ₀²)⁻¹ Jᵀ of each point, (N, C, C)."""
    precision = case.ggn(jacobian) + torch.eye(jacobian.shape[-1]).double() / prior_variance
    return jacobian @ torch.linalg.inv(precision) @ jacobian.mT


def test_parts_equal_the_dense_computation_with_the_same_basis(case: Case):
    predictor = fit_ella(case.model, case.loader(), num_landmarks=40, rank=8, **GIVEN)
    V, J = flat(predictor.basis), case.jacobian()
    torch.testing.assert_close(V.T @ V, torch.eye(8).double(), rtol=0, atol=1e-9)
    with as_function():
        _, features = Linearization(case.model).features(case.inputs, predictor.basis)
    torch.testing.assert_close(features, J @ V, rtol=1e-6, atol=1e-9)
    H = V.T @ case.ggn(J) @ V
    torch.testing.assert_close(predictor.curvature, H, rtol=1e-6, atol=1e-9)
    covariance = J @ V @ torch.linalg.inv(H + torch.eye(8).double() / 0.7) @ V.T @ J.mT
    out = predictor(case.inputs)
    torch.testing.assert_close(out.logits_covariance, covariance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out.logits_mean, case.logits())


@pytest.mark.usefixtures("_every_output")
@pytest.mark.parametrize(
    ("name", "count"), [("mlp", 60), ("conv_batchnorm", 120), ("vit", 280), ("dict", 60), ("frozen", 60)]
)
def test_with_every_landmark_the_posterior_is_the_exact_one_at_the_training_points(name: str, count: int):
    case = make_case(name, count)
    options = {"num_landmarks": count, "rank": count, "landmarks": "every-output", "curvature": "exact"}
    predictor = fit_ella(case.model, case.loader(), **options, **GIVEN)
    J = case.jacobian()
    assert predictor.rank < count  # no direction was left out
    covariance = predictor(case.inputs).logits_covariance
    torch.testing.assert_close(covariance, dense_covariance(case, J, 0.7), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("_every_output")
@pytest.mark.parametrize("name", ["mlp", "frozen"])
def test_with_all_directions_the_posterior_is_the_exact_one_everywhere(name: str):
    case, elsewhere = make_case(name), make_case(name, count=11)
    elsewhere.inputs = 3 * elsewhere.inputs + 1
    predictor = fit_ella(case.model, case.loader(), num_landmarks=60, rank=60, landmarks="every-output", **GIVEN)
    J = elsewhere.jacobian()
    assert predictor.rank == J.shape[-1]
    precision = case.ggn(case.jacobian()) + torch.eye(J.shape[-1]).double() / 0.7
    covariance = J @ torch.linalg.inv(precision) @ J.mT
    torch.testing.assert_close(predictor(elsewhere.inputs).logits_covariance, covariance, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("_every_output")
def test_with_fewer_directions_it_is_the_dense_nystrom_formula(case: Case):
    predictor = fit_ella(case.model, case.loader(), num_landmarks=60, rank=6, landmarks="every-output", **GIVEN)
    J = case.jacobian()
    _, singular, right = torch.linalg.svd(J.flatten(0, 1), full_matrices=False)
    V = right[:6].T
    torch.testing.assert_close(predictor.eigenvalues, singular[:6].square() / (3 * len(case)))
    H = V.T @ case.ggn(J) @ V
    covariance = J @ V @ torch.linalg.inv(H + torch.eye(6).double() / 0.7) @ V.T @ J.mT
    torch.testing.assert_close(predictor(case.inputs).logits_covariance, covariance, rtol=1e-6, atol=1e-9)


def test_curvature_of_some_points_is_scaled_to_all():
    case = make_case("mlp")
    whole, half = (
        fit_ella(case.model, case.loader(), num_landmarks=40, rank=4, **GIVEN | {"num_curvature": n})
        for n in (None, 30)
    )
    ratio = half.curvature.trace() / whole.curvature.trace()
    assert 0.7 < ratio < 1.4
    assert ratio != 1


def test_random_signs_give_the_same_curvature_on_average():
    case = make_case("mlp")
    exact = fit_ella(case.model, case.loader(), num_landmarks=40, rank=4, **GIVEN)
    big = case.loader()
    big.dataset.items *= 200
    predictor = fit_ella(case.model, big, num_landmarks=40, rank=4, curvature="sampled", **GIVEN)
    V, W = flat(exact.basis), flat(predictor.basis)
    expected = 200 * W.T @ case.ggn(case.jacobian()) @ W
    assert (predictor.curvature - expected).norm() < 0.05 * expected.norm()
    assert V.shape == W.shape


@pytest.mark.parametrize("engine", ["forward", "layerwise"])
def test_reduced_precision_changes_little(engine: str):
    case = make_case("conv_batchnorm")
    case.model, case.inputs = case.model.float(), case.inputs.float()
    options = {"num_landmarks": 40, "rank": 6, "engine": engine, **GIVEN}
    full = fit_ella(case.model, case.loader(), **options)(case.inputs)
    half = fit_ella(case.model, case.loader(), precision="bf16", basis_precision="bf16", **options)
    out = half(case.inputs)
    assert {tangents.dtype for tangents in half.basis.values()} == {torch.bfloat16}
    torch.testing.assert_close(out.logits_mean, full.logits_mean)
    error = (out.logits_variance - full.logits_variance).norm() / full.logits_variance.norm()
    assert 0 < error < 0.1


def test_a_small_memory_budget_gives_nearly_the_same_posterior(caplog: pytest.LogCaptureFixture):
    case = make_case("vit", 200)
    options = {"num_landmarks": 150, "rank": 10, **GIVEN}
    size = sum(parameter.numel() for parameter in case.model.parameters())
    exact = fit_ella(case.model, case.loader(), **options)(case.inputs).logits_variance
    with caplog.at_level(logging.INFO, "lightning_ella"):
        streamed = fit_ella(case.model, case.loader(), memory_budget=2 * 150 * size * 8 - 16, **options)
    assert "do not fit the memory budget" in caplog.text
    ratio = streamed(case.inputs).logits_variance / exact
    assert 0.8 < ratio.median() < 1.2


def test_a_memory_budget_that_is_too_small_is_refused_with_the_smallest_that_is_not():
    case = make_case("vit", 60)
    options = {"num_landmarks": 40, "rank": 10, **GIVEN}
    with pytest.raises(ValueError, match="pass at least memory_budget=128000,"):
        fit_ella(case.model, case.loader(), memory_budget=1000, **options)
    assert fit_ella(case.model, case.loader(), memory_budget=128_000, **options).rank == 10


def test_a_seed_fixes_the_posterior_to_the_last_bit(case: Case):
    def fit(seed: int) -> ELLAPredictor:
        torch.rand(1)  # the global state does not matter
        return fit_ella(case.model, case.loader(), case.loader(), num_landmarks=30, rank=4, num_curvature=20, seed=seed)

    first, second, other = fit(0), fit(0), fit(1)
    for name in ("curvature", "eigenvalues", "prior_variance", "covariance_scale"):
        assert getattr(first, name).equal(getattr(second, name))
    assert all(first.basis[name].equal(second.basis[name]) for name in first.basis)
    assert first(case.inputs).probs.equal(second(case.inputs).probs)
    assert not first.curvature.equal(other.curvature)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9), st.booleans())
def test_batches_and_chunks_do_not_matter(batch_size: int, samples: int, tangents: int, shuffle: bool):
    case = make_case("mlp")
    expected = fit_ella(case.model, case.loader(), num_landmarks=30, rank=6, **GIVEN)
    predictor = fit_ella(
        case.model,
        case.loader(batch_size, shuffle=shuffle, drop_last=True),
        num_landmarks=30,
        rank=6,
        samples_per_chunk=samples,
        tangents_per_chunk=tangents,
        **GIVEN,
    )
    torch.testing.assert_close(predictor.curvature.diagonal(), expected.curvature.diagonal())
    torch.testing.assert_close(predictor(case.inputs).probs, expected(case.inputs).probs)


@settings(deadline=None, max_examples=12)
@given(st.permutations(range(20)))
def test_the_order_of_samples_does_not_matter_to_a_prediction(order: list[int]):
    case = make_case("mlp")
    predictor = fit_ella(case.model, case.loader(), num_landmarks=30, rank=6, **GIVEN)
    torch.testing.assert_close(predictor(case.inputs[order]).probs, predictor(case.inputs[:20]).probs[order])


def test_without_calibration_data_the_given_values_are_used_and_said(caplog: pytest.LogCaptureFixture):
    case = make_case("mlp")
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        predictor = fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, prior_variance=0.2)
    assert predictor.prior_variance.item() == pytest.approx(0.2)
    assert predictor.covariance_scale == 1
    assert "no validation data, so nothing is tuned: prior_variance=0.2, covariance_scale=1" in caplog.text


def test_augmented_training_data_are_noticed(caplog: pytest.LogCaptureFixture):
    case = make_case("mlp")
    noisy = lambda batch: (batch[0] + torch.randn_like(batch[0]), batch[1])  # noqa: E731
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, unpack=noisy, **GIVEN)
    assert "look different each time" in caplog.text


def test_other_batches_and_calls_work_through_their_hooks():
    case = make_case("mlp")
    loader = torch.utils.data.DataLoader([{"in": x, "label": y} for x, y in case.dataset], 9)
    predictor = fit_ella(
        case.model,
        loader,
        num_landmarks=30,
        rank=4,
        unpack=lambda batch: ({"x": batch["in"]}, batch["label"]),
        forward=lambda model, inputs: model(**{"input": inputs["x"]}),
        **GIVEN,
    )
    expected = fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, **GIVEN)
    torch.testing.assert_close(predictor({"x": case.inputs}).probs, expected(case.inputs).probs)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 30, "num_landmarks": 20}, "rank=30 is more than num_landmarks=20 can span: pass rank=20"),
        ({"rank": 0}, "rank=0 must be a whole number"),
        ({"num_landmarks": 2.5}, "num_landmarks=2.5 must be a whole number"),
        ({"num_curvature": 0}, "num_curvature=0"),
        ({"prior_variance": -1.0}, "prior_variance=-1.0 must be a positive number"),
        ({"covariance_scale": float("nan")}, "covariance_scale=nan must be"),
        ({"likelihood": "gamma"}, "likelihood='gamma' is not one of 'classification'"),
        ({"landmarks": "best"}, "landmarks='best' is not one of 'auto', 'uniform-class', 'uniform'"),
        ({"predictive": "exact"}, "predictive='exact' is not one of 'mc', 'probit', 'bridge'"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**setting)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranc'"):
        Settings(ranc=3)


@pytest.mark.parametrize(
    ("change", "setting", "message"),
    [
        (lambda case: None, {"num_landmarks": 61}, "only 60 training points: pass num_landmarks=60 or less"),
        (lambda case: case.model.requires_grad_(False), {}, "requires_grad=True"),
        (lambda case: case.targets.fill_(3), {}, r"labels must lie in \[0, 3\)"),
        (lambda case: case.model[2].weight.data.fill_(torch.nan), {}, "outputs are NaN or infinite"),
        (lambda case: case.inputs[7].fill_(torch.nan), {}, "NaN or infinite"),
    ],
)
def test_bad_input_is_refused_and_costs_nothing(change, setting: dict, message: str):
    case = make_case("mlp")
    change(case)
    case.model.train()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit_ella(case.model, case.loader(), **{"num_landmarks": 60, "rank": 4, **GIVEN, **setting})
    assert case.model.training
    torch.testing.assert_close(case.model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_without_calibration_data_or_a_prior_the_evidence_chooses_it(caplog: pytest.LogCaptureFixture):
    case = make_case("mlp")
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        predictor = fit_ella(case.model, case.loader(), num_landmarks=60, rank=20, num_curvature=None)
    assert "the prior is the one with the highest marginal likelihood" in caplog.text
    ggn, size = case.ggn(case.jacobian()), sum(float(p.detach().square().sum()) for p in case.model.parameters())
    variances = torch.logspace(-8, 4, 1201).double()
    exact = torch.stack([size / v + torch.logdet(torch.eye(len(ggn)).double() + v * ggn) for v in variances])
    assert float(predictor.prior_variance) == pytest.approx(float(variances[exact.argmin()]), rel=0.2)
    assert predictor(case.inputs).novelty is None


def test_the_log_says_what_was_tuned_and_on_what(caplog: pytest.LogCaptureFixture):
    case = make_case("mlp")
    with caplog.at_level(logging.INFO, "lightning_ella"):
        fit_ella(case.model, case.loader(), case.loader(), num_landmarks=30, rank=4, temperature=1.5)
    (line,) = (record.getMessage() for record in caplog.records if "chosen on 60 unseen points: NLL" in record.message)
    assert "residual_scale" in line
    assert "temperature" not in line
    assert "60 calibration points are few" in caplog.text


def test_points_that_the_network_was_trained_on_are_noticed(caplog: pytest.LogCaptureFixture):
    case = make_case("mlp")
    with torch.no_grad():
        case.targets = case.logits().argmax(1)  # a network that is right on all of them, and not sure enough
        with caplog.at_level(logging.WARNING, "lightning_ella"):
            fit_ella(case.model, case.loader(), case.loader(), num_landmarks=30, rank=4)
    assert "the calibration points ask for no uncertainty (accuracy 100.0 %)" in caplog.text
