"""Random directions outside the span of the basis."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, flat, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_ella import ELLAPredictor, fit_ella
from lightning_ella.residual import num_probes, random_signs, with_probes

SMALL = {"num_landmarks": 30, "rank": 4, "prior_variance": 0.5, "covariance_scale": 2.0, "residual_scale": 3.0}


def fitted(case: Case, **settings) -> ELLAPredictor:
    return fit_ella(case.model, case.loader(), **{**SMALL, **settings})


def test_probes_are_orthogonal_to_the_basis_and_leave_it_alone(case: Case):
    plain, probed = (fitted(case, residual=m) for m in (0, 9))
    basis, tangents = flat(plain.basis), flat(probed._tangents)
    assert tangents.shape == (len(basis), 13)
    assert flat(probed.basis).equal(basis)
    torch.testing.assert_close(basis.T @ tangents[:, 4:], torch.zeros(4, 9).double(), rtol=0, atol=1e-9)


def test_the_variance_outside_the_span_is_unbiased(case: Case):
    probes = 1000
    predictor = fitted(case, residual=probes, num_samples=2)
    jacobian, basis = case.jacobian(), flat(predictor.basis)
    inside = jacobian @ basis
    outside = jacobian @ jacobian.mT - inside @ inside.mT  # (N, C, C)
    inverse = torch.linalg.inv(predictor.curvature + torch.eye(4).double() / 0.5)
    expected = 2.0 * inside @ inverse @ inside.mT + 3.0 * outside
    error = (predictor(case.inputs).logits_covariance - expected).norm() / outside.norm()
    assert error < 3.0 * 3 / probes**0.5  # two standard deviations of the mean over probes, √(2 / m)


def test_novelty_is_the_share_of_the_kernel_outside():
    case = make_case("mlp")
    predictor = fitted(case, residual=1000, num_samples=2)
    jacobian = case.jacobian()
    jacobian = jacobian - jacobian.mean(1, keepdim=True)  # centred over the outputs
    total, inside = (x.square().sum((1, 2)) for x in (jacobian, jacobian @ flat(predictor.basis)))
    torch.testing.assert_close(predictor(case.inputs).novelty, 1 - inside / total, rtol=0, atol=0.05)
    assert fitted(case, residual="none")(case.inputs).novelty is None


def test_probes_are_made_again_from_the_seed_and_not_written(tmp_path: Path):
    case = make_case("vit")
    few, many = (fitted(case, residual=m) for m in (1, 100))
    sizes = [predictor.save(tmp_path / "ella.safetensors").stat().st_size for predictor in (few, many)]
    assert sizes[1] - sizes[0] < 10
    loaded = ELLAPredictor.load(tmp_path / "ella.safetensors", case.model)
    assert loaded(case.inputs).logits_covariance.equal(many(case.inputs).logits_covariance)


@pytest.mark.parametrize(
    ("residual", "rank", "reverse", "expected"),
    [
        ("auto", 40, False, 20),
        ("auto", 40, True, 80),
        ("auto", 5, False, 10),
        ("auto", 2, True, 10),
        ("none", 20, True, 0),
        (7, 20, True, 7),
    ],
)
def test_as_many_probes_as_are_cheap_but_not_so_few_that_they_say_nothing(
    residual: str | int, rank: int, reverse: bool, expected: int
):
    assert num_probes(residual, rank, reverse=reverse) == expected


def test_no_more_probes_are_made_than_the_memory_has_a_place_for(caplog: pytest.LogCaptureFixture):
    assert [num_probes("auto", 20, reverse=True, most=most) for most in (100, 30, 3)] == [40, 30, 10]
    assert num_probes(50, 20, reverse=True, most=3) == 50  # as many as are asked for
    case, kinds = make_case("mlp"), {"full": 8, "bf16": 2}
    case.model = nn.Sequential(nn.Linear(3, 200), nn.Tanh(), nn.Linear(200, 3)).double()
    size = sum(p.numel() for p in case.model.parameters())
    for kind, nbytes in kinds.items():
        for budget, expected, said in ((13 * size * nbytes, 13, True), (10**6, 16, False)):
            options = {"rank": 8, "basis_precision": kind, "memory_budget": budget, "num_landmarks": 10}
            caplog.clear()
            predictor = fit_ella(case.model, case.loader(), case.loader(), engine="layerwise", **options)
            assert predictor.settings["residual"] == expected
            assert any("as many as fit the memory budget" in record.message for record in caplog.records) == said


def test_a_want_of_memory_for_them_names_what_takes_less(monkeypatch: pytest.MonkeyPatch):
    case = make_case("mlp")

    def greedy(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GB")

    monkeypatch.setattr("lightning_ella.residual.random_signs", greedy)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fitted(case, residual=5)
    assert "basis_precision='bf16'" in caught.value.__notes__[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31))
def test_signs_are_balanced_independent_and_the_start_of_longer_ones(count: int, seed: int):
    signs = [random_signs(n, torch.Generator().manual_seed(seed), "cpu") for n in (count, 100_000)]
    assert signs[0].unique().tolist() in ([-1, 1], [-1], [1])
    assert signs[1][:count].equal(signs[0])
    values = signs[1].double()
    for lag in (1, 8, 63, 64):
        assert (values[lag:] * values[:-lag]).mean().abs() < 0.02
    assert values.mean().abs() < 0.02


def test_the_engine_decides_how_many_are_cheap():
    case, calibrated = make_case("mlp"), {"num_landmarks": 30, "rank": 6}
    for engine, expected in (("forward", 10), ("layerwise", 12), ("auto", 12)):
        predictor = fit_ella(case.model, case.loader(), case.loader(), engine=engine, **calibrated)
        assert predictor.settings["residual"] == expected


def test_a_calibrated_posterior_without_residual_is_saved_and_loaded(tmp_path: Path):
    case = make_case("mlp")
    predictor = fit_ella(case.model, case.loader(), case.loader(), residual="none", num_landmarks=30, rank=4)
    loaded = ELLAPredictor.load(predictor.save(tmp_path / "ella.safetensors"), case.model)
    assert loaded(case.inputs).probs.equal(predictor(case.inputs).probs)


def test_probes_of_a_basis_in_bf16_are_nearly_orthogonal():
    basis = {"w": torch.linalg.qr(torch.randn(500, 4))[0].T.bfloat16()}
    tangents = with_probes(basis, 20, seed=0)["w"].float()
    assert (tangents[:4] @ tangents[4:].T).abs().max() < 0.01 * tangents[4:].norm(dim=1).max()


def test_sampled_functions_have_the_posteriors_moments_and_belong_together():
    case = make_case("mlp")
    predictor = fitted(case, residual=5, temperature=2.0)
    functions = predictor.sample_functions(20_000, seed=1)
    samples, out = functions(case.inputs), predictor(case.inputs)  # (S, N, C)
    assert len(functions) == 20_000
    torch.testing.assert_close(samples.mean(0), out.logits_mean / 2, rtol=0, atol=0.1)
    covariance = torch.einsum("snc,snd->ncd", samples - samples.mean(0), samples - samples.mean(0)) / 20_000
    torch.testing.assert_close(covariance, out.logits_covariance / 4, rtol=0.1, atol=0.05)
    torch.testing.assert_close(samples.softmax(-1).mean(0), out.probs, rtol=0, atol=0.05)
    torch.testing.assert_close(functions[3](case.inputs[7:9]), samples[3, 7:9])  # whatever it is evaluated with
    assert predictor.sample_functions(3, seed=1)(case.inputs).equal(predictor.sample_functions(3, seed=1)(case.inputs))
