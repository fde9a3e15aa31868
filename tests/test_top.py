"""Vocabularies: the likeliest outputs, and the others as one."""

import pytest
import torch
from conftest import Case, flat
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from lightning_ella import ELLAPredictor, fit_ella
from lightning_ella.engine import Linearization
from lightning_ella.top import Selection, sharpness

GIVEN = {"prior_variance": 1.0, "covariance_scale": 1.0, "residual": "none", "temperature": 1.0}
WORDS = 9


class Language(nn.Module):
    """(B, L) tokens to (B, L, 9) logits of the next."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x).cumsum(1)))


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    targets = torch.randint(WORDS, (30, 4))
    targets[:, 0] = -100
    return Case(Language().double(), torch.randint(WORDS, (30, 4)), targets)


def test_features_of_the_top_are_the_centred_jacobian_of_their_logits_and_of_the_rest(case: Case):
    predictor = fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, top_outputs=3, **GIVEN)
    out = predictor(case.inputs)
    assert out.probs.shape == (30, 4, 4)
    assert out.indices.shape == (30, 4, 3)

    def reduced(parameters: dict) -> Tensor:
        logits = functional_call(case.model, parameters, (case.inputs,))
        rest = logits.scatter(-1, out.indices, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, out.indices), rest], -1)

    blocks = jacrev(reduced)({name: p.detach() for name, p in case.model.named_parameters()})
    jacobian = torch.cat([block.flatten(3) for block in blocks.values()], -1).detach()
    features = jacobian @ flat(predictor.basis)
    features = features - features.mean(-2, keepdim=True)
    torch.testing.assert_close(predictor.features(case.inputs)[1], features)
    inverse = torch.linalg.inv(predictor.curvature + torch.eye(4))
    torch.testing.assert_close(out.logits_covariance, features @ inverse @ features.mT)


def test_with_all_words_but_one_nothing_is_lost(case: Case):
    options = {"num_landmarks": 30, "rank": 4, "seed": 3}
    whole = fit_ella(case.model, case.loader(), case.loader(), **options)
    top = fit_ella(case.model, case.loader(), case.loader(), top_outputs=WORDS - 1, **options)
    torch.testing.assert_close(top.curvature, whole.curvature)
    torch.testing.assert_close(top.temperature, whole.temperature)
    probs, out = whole(case.inputs).probs, top(case.inputs)
    torch.testing.assert_close(out.probs[..., :-1], probs.gather(-1, out.indices))
    words = torch.randint(WORDS, (30, 4))
    expected = probs.gather(-1, words.unsqueeze(-1)).squeeze(-1).log()
    torch.testing.assert_close(top.log_prob(case.inputs, words), expected)
    torch.testing.assert_close(out.log_prob(words), expected)


def test_what_is_left_is_a_distribution_over_all_words(case: Case):
    predictor = fit_ella(case.model, case.loader(), case.loader(), num_landmarks=30, rank=4, top_outputs=3)
    each = [predictor.log_prob(case.inputs, torch.full((30, 4), word)) for word in range(WORDS)]
    torch.testing.assert_close(torch.stack(each).exp().sum(0), torch.ones(30, 4).double())
    certain = Selection.of(case.logits(), 3)
    targets = torch.randint(WORDS, (30, 4))
    reduced = (
        certain.logits(case.logits()).log_softmax(-1).gather(-1, certain.labels(targets).unsqueeze(-1)).squeeze(-1)
    )
    whole = case.logits().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(reduced + certain.log_prob_within(targets), whole)
    assert (certain.labels(case.targets)[:, 0] == -100).all()


def test_the_temperature_is_that_of_all_words_that_count_not_of_the_top_alone(case: Case):
    case = Case(case.model, case.inputs.repeat(40, 1), case.targets)
    with torch.no_grad():
        case.model.out.weight.mul_(12)
    case.targets = torch.distributions.Categorical(logits=case.logits() / 3).sample()
    sure, counts = case.logits().argmax(-1), torch.arange(1200) % 4 == 0  # the others have the weight 0
    labels = torch.where(counts.unsqueeze(1), case.targets, sure)
    unseen = DataLoader(TensorDataset(case.inputs, labels, counts.double()), batch_size=50)
    options = {"num_landmarks": 30, "rank": 4, "top_outputs": 2, "unpack": tuple}
    predictor = fit_ella(case.model, case.loader(), unseen, **options)
    nll = lambda t: -(case.logits() / t).log_softmax(-1).gather(-1, case.targets.unsqueeze(-1)).mean()  # noqa: E731
    best = min(float(nll(t)) for t in torch.linspace(1, 5, 41))
    assert best < 0.8 * nll(1.0)
    assert -predictor.log_prob(case.inputs, case.targets).mean() < 1.01 * best


def test_sampled_curvature_is_that_of_all_words_and_needs_no_features(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path
):
    monkeypatch.setattr("lightning_ella.engine.Linearization.features", None)
    loader = case.loader()
    loader.dataset.items *= 200
    options = {"num_landmarks": 30, "rank": 4, "top_outputs": 2, "num_curvature": None}
    predictor = fit_ella(case.model, loader, curvature="sampled", **options, **GIVEN)
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}
    blocks = jacrev(lambda p: functional_call(case.model, p, (case.inputs,)))(parameters)
    features = torch.cat([block.flatten(3) for block in blocks.values()], -1).detach() @ flat(predictor.basis)
    p = case.logits().softmax(-1)
    dense = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    seen = (case.targets != -100).double()
    expected = torch.einsum("blck,blcd,bldm,bl->km", features, dense, features, seen)
    assert (predictor.curvature / 200 - expected).norm() < 0.1 * expected.norm()
    loaded = ELLAPredictor.load(predictor.save(tmp_path / "e.safetensors"), case.model)
    assert loaded(case.inputs).indices.shape == (30, 4, 2)


class Pixels(nn.Module):
    """(B, 1, 3, 3) to (B, 5, 3, 3)."""

    def __init__(self):
        super().__init__()
        self.out = nn.Conv2d(1, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


def test_masks_may_have_a_channel_of_one():
    torch.manual_seed(0)
    case = Case(Pixels().double(), torch.randn(12, 1, 3, 3).double(), torch.randint(5, (12, 3, 3)))
    channel = Case(case.model, case.inputs, case.targets.unsqueeze(1))
    options = {"num_landmarks": 12, "rank": 3}
    for top in (None, 2):
        plain, found = (fit_ella(c.model, c.loader(), c.loader(), top_outputs=top, **options) for c in (case, channel))
        expected = plain.log_prob(case.inputs, case.targets)
        torch.testing.assert_close(found.log_prob(case.inputs, channel.targets), expected, rtol=0, atol=0)
        out = found(case.inputs)
        torch.testing.assert_close(out.log_prob(channel.targets), out.log_prob(case.targets), rtol=0, atol=0)


def test_weights_may_have_a_channel_of_one_too():
    case = Case(Pixels().double(), torch.randn(12, 1, 3, 3).double(), torch.randint(5, (12, 1, 3, 3)))
    weights = torch.rand(12, 3, 3)
    curvatures = []
    for each in (weights, weights.unsqueeze(1)):
        loader = DataLoader(TensorDataset(case.inputs, case.targets, each), 5)
        curvatures.append(fit_ella(case.model, loader, unpack=tuple, num_landmarks=12, rank=3, **GIVEN).curvature)
    torch.testing.assert_close(*curvatures)


def test_labels_that_no_output_is_for_are_refused(case: Case):
    case.targets[-1, -1] = WORDS  # not among the first, which are looked at before the fit
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\)"):
        fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, num_curvature=None, top_outputs=3, **GIVEN)


def test_a_point_of_weight_zero_does_not_sharpen_nor_spoil_the_temperature():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    logits[3] = torch.inf
    found = sharpness(logits, targets, torch.tensor([1.0, 2.0, 1.0, 0.0]))
    torch.testing.assert_close(found, sharpness(logits[:3], targets[:3], torch.tensor([1.0, 2.0, 1.0])))


def test_it_is_for_classes_only():
    with pytest.raises(ValueError, match="top_outputs= is for likelihood='classification', not for 'regression'"):
        fit_ella(nn.Linear(1, 1), None, likelihood="regression", top_outputs=3)  # type: ignore[arg-type]


class Wide(nn.Module):
    """(B, 3) to 9 classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, WORDS))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.body(x)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_cotangents_of_the_top_are_the_reduced_rows_of_the_jacobian(temperature: float):
    torch.manual_seed(0)
    model, x = Wide().double(), torch.randn(20, 3).double()
    case = Case(model, x, torch.randint(WORDS, (20,)))
    options = {"num_landmarks": 20, "rank": 12, "num_samples": 32, "residual": 2}
    given = GIVEN | {"residual_scale": 0.3, "temperature": temperature}
    found = []
    for engine in ("layerwise", "forward"):
        predictor = fit_ella(model, case.loader(), engine=engine, top_outputs=2, **given | options)
        linearization = predictor._linearization
        assert linearization._pulls_back(x, 2, 14) == (engine == "layerwise")
        out = predictor(x)
        found.append([out.probs, out.indices, out.novelty, predictor.log_prob(x, case.targets), predictor.curvature])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_few_cotangents_are_pulled_back_and_many_are_not():
    model, x = Wide().double(), torch.randn(20, 3).double()
    linearization = Linearization(model)
    linearization.logits(x)
    assert linearization._pulls_back(x, 2, 20)
    assert not linearization._pulls_back(x, 8, 20)  # all outputs
    assert not linearization._pulls_back(x, 4, 3)  # tangents are fewer
    words = Linearization(Language().double())
    tokens = torch.randint(WORDS, (20, 4))
    words.logits(tokens)
    assert not words._pulls_back(tokens, 2, 1000)
