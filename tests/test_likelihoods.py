"""Curvature and predictives against dense formulas and brute force."""

import pytest
import torch
from conftest import at_a_time
from torch import Tensor

from lightning_ella.likelihoods import Binary, Classification
from lightning_ella.numerics import standard_normal
from lightning_ella.predictions import ClassPrediction, Gaussian, entropy, laplace_bridge, probit

CLASSES, RANK = 4, 3

ONE = torch.ones(())


def monte_carlo(logits: Gaussian) -> Tensor:
    return logits.expectation(lambda f: f.softmax(-1))


def gaussian(scale: float = 1.0, batch_size: int = 5, num_samples: int = 4096) -> Gaussian:
    generator = torch.Generator().manual_seed(0)
    mean = 2 * torch.randn(batch_size, CLASSES, generator=generator).double()
    factor = scale * torch.randn(batch_size, CLASSES, RANK, generator=generator).double()
    return Gaussian(mean, factor, standard_normal(num_samples, RANK, 1).double())


def brute_force(logits: Gaussian, count: int = 10**6) -> Tensor:
    """Class probabilities by sampling all C logits from their dense covariance."""
    torch.manual_seed(2)
    root = torch.linalg.cholesky(logits.covariance + 1e-9 * torch.eye(CLASSES))
    noise = torch.randn(count, CLASSES, dtype=torch.float64)
    return torch.stack([(m + noise @ r.T).softmax(-1).mean(0) for m, r in zip(logits.mean, root, strict=True)])


def test_curvature_is_the_dense_hessian_between_features():
    torch.manual_seed(0)
    logits, features = 9 * torch.randn(6, CLASSES).double(), torch.randn(6, CLASSES, RANK).double()
    nll = lambda f: torch.nn.functional.cross_entropy(f, torch.tensor(1))  # noqa: E731
    hessian = torch.stack([torch.autograd.functional.hessian(nll, f) for f in logits])  # (B, C, C)
    expected = torch.einsum("bck,bcd,bdl->kl", features, hessian, features)
    torch.testing.assert_close(Classification().curvature(logits, features), expected)


def test_curvature_keeps_its_digits_where_the_network_is_sure():
    logits = torch.tensor([[40.0, 0.0]]).double()
    features = torch.tensor([[1e3, 1e3 + 1]]).double().unsqueeze(-1)
    exact = torch.exp(logits[:, 1] - logits[:, 0])  # p(1 − p), to the last digit
    torch.testing.assert_close(Classification().curvature(logits, features)[0], exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_monte_carlo_agrees_with_dense_sampling(scale: float):
    logits = gaussian(scale)
    error = (monte_carlo(logits) - brute_force(logits)).abs().max()
    assert error < 4 * 0.5 / len(logits.draws) ** 0.5  # a probability's deviation is at most 1/2


def independent(scale: float) -> Gaussian:
    """Logits of one variance each, which is all that the closed forms look at."""
    logits = gaussian()
    factor = torch.diag_embed(torch.full((5, CLASSES), scale).double())
    return Gaussian(logits.mean, factor, standard_normal(4096, CLASSES, 1).double())


@pytest.mark.parametrize(("scale", "tolerance"), [(0.1, 1e-3), (0.5, 0.02), (1.0, 0.06), (3.0, 0.2)])
def test_probit_agrees_with_dense_sampling_within_its_error(scale: float, tolerance: float):
    logits = independent(scale)
    assert (probit(logits) - brute_force(logits)).abs().max() < tolerance


def test_probit_is_the_formula():
    logits = gaussian()
    variance = logits.covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(probit(logits), (logits.mean / (1 + torch.pi / 8 * variance).sqrt()).softmax(-1))


def test_bridge_is_exact_for_the_gaussian_of_a_dirichlet():
    concentration = torch.tensor([[2.0, 5.0, 1.0, 3.0]]).double()
    mean = concentration.log() - concentration.log().mean()
    inverse = 1 / concentration[0]
    share = inverse.sum() / CLASSES**2 - (inverse[:, None] + inverse) / CLASSES
    covariance = torch.diag(inverse) + share  # of the softmax basis: MacKay (1998), singular along (1, …, 1)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    factor = (eigenvectors * eigenvalues.clamp_min(0).sqrt())[None]
    logits = Gaussian(mean, factor, standard_normal(8, CLASSES, 0).double())
    torch.testing.assert_close(laplace_bridge(logits), concentration / concentration.sum(), rtol=1e-6, atol=1e-6)
    shifted = Gaussian(mean + 7, factor + torch.randn(1, 1, CLASSES), logits.draws)  # the softmax sees no shift
    torch.testing.assert_close(laplace_bridge(shifted), laplace_bridge(logits), rtol=1e-6, atol=1e-6)


def test_bridge_agrees_with_dense_sampling_within_its_error():
    logits = independent(1.0)
    assert (laplace_bridge(logits) - brute_force(logits)).abs().max() < 0.15


@pytest.mark.parametrize("predictive", Classification.predictives)
def test_probabilities_add_up_and_ignore_nothing(predictive: str):
    for scale in (0.0, 1e-8, 1.0, 1e4):
        probs = ClassPrediction(gaussian(scale), predictive, ONE).probs
        assert probs.isfinite().all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(5).double())


def test_the_bridge_survives_confident_logits():
    logits = Gaussian(torch.tensor([[60.0, -60.0, 0.0]]), torch.ones(1, 3, 2), standard_normal(8, 2, 0))
    torch.testing.assert_close(laplace_bridge(logits)[0], torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_may_be_of_any_integer_type(dtype: torch.dtype):
    assert Classification().check(torch.zeros(2, 3), torch.tensor([0, 2], dtype=dtype)).dtype == torch.int64


@pytest.mark.parametrize("cached", [1, 2**19])
def test_the_log_probability_of_a_label_and_its_gradients_are_those_of_autograd(
    cached: int, monkeypatch: pytest.MonkeyPatch
):
    at_a_time(monkeypatch, reused_outputs=cached)
    logits, labels = gaussian(num_samples=6), torch.tensor([0, 3, 1, 1, 2])
    temperature = torch.tensor(1.7).double()
    arguments = [part.requires_grad_() for part in (logits.mean, logits.factor, logits.draws, temperature)]
    weights = torch.randn(6, 5).double()
    found = logits.label_log_probs(labels, temperature)
    expected = (logits.samples() / temperature).log_softmax(-1).gather(-1, labels.expand(6, 5).unsqueeze(-1))[..., 0]
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad((weights * logs).sum(), arguments) for logs in (found, expected))
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_the_nll_is_that_of_the_mean_probability():
    prediction = ClassPrediction(gaussian(), "mc", torch.tensor(1.3).double())
    labels = torch.tensor([0, 3, -100, 1, 2])
    expected = -prediction.probs.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1).log()
    expected[2] = 0
    torch.testing.assert_close(Classification().nll(prediction, labels), expected)


def test_uncertainties_add_up():
    prediction = ClassPrediction(gaussian(2.0), "mc", ONE)
    sampled = (prediction.logits.mean + (prediction.logits.factor @ prediction.logits.draws.T).movedim(-1, 0)).softmax(
        -1
    )
    expected = entropy(sampled.mean(0)) - entropy(sampled).mean(0)
    torch.testing.assert_close(prediction.mutual_information, expected)
    torch.testing.assert_close(prediction.entropy, entropy(sampled.mean(0)))
    assert ClassPrediction(gaussian(0.0), "mc", ONE).mutual_information.max() < 1e-12


def test_covariance_and_variance_match():
    prediction = ClassPrediction(gaussian(), "mc", ONE)
    diagonal = prediction.logits_covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(prediction.logits_variance, diagonal)


def test_chunks_of_draws_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    whole = monte_carlo(gaussian())
    at_a_time(monkeypatch, outputs=7)
    torch.testing.assert_close(monte_carlo(gaussian(num_samples=4096)), whole)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 4]), r"labels must lie in \[0, 4\).* from 0 to 4"),
        (torch.tensor([-1, 0]), "from -1 to 0"),
        (torch.tensor([0.0, 1.0]), "torch.float32: pass unpack="),
        (torch.eye(2, 4).long(), r"the shape \(2, 4\)"),
    ],
)
def test_targets_that_are_no_labels_are_refused(targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        Classification().check(torch.zeros(2, CLASSES), targets)


SOFT = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (SOFT, r"mixup, CutMix or smoothing, so pass train_loader="),
        (0.9 * torch.eye(2, 4) + 0.025, r"smoothing, so pass train_loader="),
        (torch.eye(2, 4), r"one-hot, so pass unpack=lambda batch: \(batch\[0\], batch\[1\].argmax\(-1\)\)"),
        (torch.eye(2, 4).long(), r"argmax\(-1\)"),
        (torch.eye(2, 4).bool(), r"argmax\(-1\)"),
        (torch.rand(2, 4), "pass unpack=lambda batch: \\(x, labels\\)"),
        (torch.tensor([0.0, 3.0]), r"batch\[1\].long\(\)"),
        (torch.tensor([0.5, 3.0]), r"\(x, labels\)"),
        (torch.tensor([2, 255]), r"from 2 to 255: .* map it to -100, .*masked_fill\(batch\[1\] == 255, -100\)"),
        (torch.tensor([2, 255], dtype=torch.uint8), r"masked_fill\(batch\[1\] == 255, -100\)"),
        (torch.tensor([-1, 3]), r"from -1 to 3: .*masked_fill\(batch\[1\] == -1, -100\)"),
        (torch.tensor([1, 4]), r"count from 1, so pass .*batch\[1\] - 1\)"),
        (torch.tensor([0, 4]), "pass an unpack= that maps them there"),
        (torch.tensor([-1, 255]), "pass an unpack= that maps them there"),
    ],
)
def test_targets_that_are_no_labels_are_refused_with_what_mends_them(targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        Classification().check(torch.zeros(2, CLASSES), targets)


def test_images_of_one_hot_or_soft_labels_are_known_by_their_channels():
    outputs, hard = torch.zeros(2, 3, 5, CLASSES), torch.zeros(2, CLASSES, 3, 5)
    hard[:, 1] = 1
    with pytest.raises(ValueError, match=r"argmax\(1\)"):
        Classification().check(outputs, hard)
    with pytest.raises(ValueError, match="without them"):
        Classification().check(outputs, torch.full_like(hard, 0.25))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([-1, 1]), r"\(batch\[1\] \+ 1\) // 2"),
        (torch.tensor([0, 255]), r"batch\[1\] // 255.* map it to -100"),
        (torch.tensor([1, 2]), r"batch\[1\] - 1"),
    ],
)
def test_two_classes_may_be_named_otherwise(targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        Classification().check(torch.zeros(2, 2), targets)
    with pytest.raises(ValueError, match=message):
        Binary().check(torch.zeros(2, 1), targets)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 5)])
@pytest.mark.parametrize("axis", [1, -1])
def test_labels_may_have_a_channel_of_one(shape: tuple[int, ...], axis: int):
    labels = torch.randint(CLASSES, shape)
    outputs = torch.zeros(*shape, CLASSES)
    assert (Classification().check(outputs, labels.unsqueeze(axis)) == labels).all()
    checked = Binary().check(outputs[..., :1], (labels > 1).unsqueeze(axis))
    assert (checked == (labels > 1).unsqueeze(-1)).all()


def test_a_binary_network_without_a_channel_is_told_to_add_one():
    with pytest.raises(ValueError, match=r"forward=lambda model, x: model\(x\).unsqueeze\(1\)"):
        Binary().check(torch.zeros(2, 3, 5), torch.zeros(2, 1, 3, 5))
    with pytest.raises(ValueError, match="likelihood='classification' or 'multilabel'"):
        Binary().check(torch.zeros(2, 5), torch.zeros(2, 5))
