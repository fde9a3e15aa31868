"""What can be done with a posterior later: more data, fewer data, the evidence, other parameters and inputs."""

from dataclasses import dataclass

import pytest
import torch
from conftest import Case, ListDataset, flat, make_case
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ella import ELLAPredictor, fit_ella

GIVEN = {"prior_variance": 1.0, "covariance_scale": 1.0, "residual": "none", "temperature": 1.0}


def part(case: Case, which: slice) -> DataLoader:
    return DataLoader(ListDataset(case.dataset.items[which]), 7)


def test_forgetting_training_points_takes_out_their_curvature(case: Case):
    predictor = fit_ella(case.model, part(case, slice(60)), num_landmarks=40, rank=5, num_curvature=None, **GIVEN)
    before = predictor(case.inputs).logits_variance.sum()
    predictor.forget(part(case, slice(40, 60)))
    features = case.jacobian()[:40] @ flat(predictor.basis)
    p = case.logits()[:40].softmax(-1)
    dense = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    torch.testing.assert_close(predictor.curvature, torch.einsum("bck,bcd,bdl->kl", features, dense, features))
    assert predictor(case.inputs).logits_variance.sum() > before


def test_points_that_were_never_seen_cannot_be_forgotten():
    case = make_case("mlp")
    predictor = fit_ella(case.model, part(case, slice(10)), num_landmarks=10, rank=4, **GIVEN)
    before = predictor.curvature.clone()
    with pytest.raises(ValueError, match="not among those"):
        predictor.forget(part(case, slice(10, 60)))
    torch.testing.assert_close(predictor.curvature, before, rtol=0, atol=0)


def test_a_curvature_that_was_sampled_does_not_know_its_points():
    case = make_case("mlp")
    options = {"num_landmarks": 40, "rank": 5, "num_curvature": None, "curvature": "sampled"}
    predictor = fit_ella(case.model, part(case, slice(60)), **options, **GIVEN)
    with pytest.raises(ValueError, match="fit with curvature='exact', num_curvature=None"):
        predictor.forget(part(case, slice(10)))


def bayesian_line(count: int = 30) -> tuple[nn.Module, Tensor, Tensor, float, float]:
    """A linear network at the posterior mean of Bayesian linear regression, the one case with an exact evidence."""
    torch.manual_seed(0)
    noise, prior = 0.2, 1.5
    x = torch.randn(count, 4).double()
    y = x @ torch.randn(4, 1).double() + noise**0.5 * torch.randn(count, 1).double()
    model = nn.Linear(4, 1, bias=False).double()
    gram = x.T @ x / noise + torch.eye(4) / prior
    model.weight.data.copy_(torch.linalg.solve(gram, x.T @ y / noise).T)
    return model, x, y, noise, prior


def exact_evidence(x: Tensor, y: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
    covariance = prior * x @ x.T + noise * torch.eye(len(x))
    return torch.distributions.MultivariateNormal(torch.zeros(len(x)).double(), covariance).log_prob(y[:, 0])


def test_the_evidence_of_a_linear_network_is_the_exact_one_and_so_are_its_gradients():
    model, x, y, noise, prior = bayesian_line()
    loader = Case(model, x, y).loader()
    predictor = fit_ella(
        model, loader, likelihood="regression", noise_variance=noise, num_landmarks=30, rank=4, **GIVEN
    )
    evidence = predictor.evidence(loader)
    s, n = torch.tensor([prior, noise]).double().requires_grad_().unbind()
    torch.testing.assert_close(evidence(s, n), exact_evidence(x, y, s, n))
    torch.testing.assert_close(evidence(s), evidence(s, noise))
    found = torch.autograd.grad(evidence(s, n), (s, n))
    # At the best weights for this prior and noise, moving them along changes nothing to first order.
    torch.testing.assert_close(found, torch.autograd.grad(exact_evidence(x, y, s, n), (s, n)))


def test_the_evidence_of_classes_is_the_dense_determinant():
    case = make_case("mlp")
    predictor = fit_ella(case.model, case.loader(), num_landmarks=60, rank=12, **GIVEN)
    evidence = predictor.evidence(case.loader())
    V = flat(predictor.basis)
    ggn = V.T @ case.ggn(case.jacobian()) @ V
    loss = nn.functional.cross_entropy(case.logits(), case.targets, reduction="sum")
    squares = sum(p.detach().square().sum() for p in case.model.parameters())
    for prior in (0.1, 3.0):
        expected = -loss - 0.5 * squares / prior - 0.5 * torch.logdet(torch.eye(12) + prior * ggn)
        torch.testing.assert_close(evidence(prior), expected)
    with pytest.raises(ValueError, match="noise_variance= is for likelihood='regression'"):
        evidence(1.0, 1.0)


def test_with_probes_the_evidence_knows_what_is_outside_the_span():
    case = make_case("mlp")
    options = {**GIVEN, "residual": 500, "residual_scale": 1.0}
    predictor = fit_ella(case.model, case.loader(), num_landmarks=60, rank=6, **options)
    trace = case.ggn(case.jacobian()).trace() - predictor.curvature.trace()
    assert abs(predictor.evidence(case.loader()).outside / trace - 1) < 0.2


@pytest.mark.parametrize(
    "parameters",
    ["2.*", ["2.weight", "2.bias"], lambda name, parameter: parameter.shape[0] == 3],
    ids=["pattern", "patterns", "predicate"],
)
def test_parameters_can_be_chosen_by_pattern_or_predicate(parameters, tmp_path):
    case = make_case("mlp")
    chosen = fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, parameters=parameters, **GIVEN)
    assert set(chosen.basis) == {"2.weight", "2.bias"}
    case.model[0].requires_grad_(False)
    expected = fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, **GIVEN)
    torch.testing.assert_close(chosen(case.inputs).probs, expected(case.inputs).probs)
    loaded = ELLAPredictor.load(chosen.save(tmp_path / "e.safetensors"), case.model)
    torch.testing.assert_close(loaded(case.inputs).probs, expected(case.inputs).probs)


def test_parameters_that_are_none_are_refused():
    case = make_case("mlp")
    with pytest.raises(ValueError, match=r"parameters='head.*' chooses none of the network's parameters \(…, .*2.bias"):
        fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, parameters="head.*", **GIVEN)


@dataclass(frozen=True)
class Sides:
    left: Tensor
    right: Tensor
    name: str = "unchanged"


class Nested(nn.Module):
    """Takes {"sides": Sides, "extra": [tensor]}."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, inputs: dict) -> Tensor:
        assert inputs["sides"].name == "unchanged"
        return self.inner({"left": inputs["sides"].left, "right": inputs["extra"][0]})


def test_inputs_may_be_dataclasses_in_dicts_with_lists():
    case = make_case("dict")
    nested = Nested(case.model)

    def collate(items: list) -> tuple:
        left, right = (torch.stack([x[side] for x, _ in items]) for side in ("left", "right"))
        return {"sides": Sides(left, left), "extra": [right]}, torch.stack([y for _, y in items])

    loader = DataLoader(case.dataset, 7, collate_fn=collate)
    predictor = fit_ella(nested, loader, num_landmarks=30, rank=4, **GIVEN)
    expected = fit_ella(case.model, case.loader(), num_landmarks=30, rank=4, **GIVEN)
    whole = collate(case.dataset.items)[0]
    torch.testing.assert_close(predictor(whole).probs, expected(case.inputs).probs)


def transformer(**config) -> tuple[nn.Module, DataLoader]:
    """A classifier of Hugging Face, and batches as its tokenizers give them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **small, **config))
    tokens, lengths = torch.randint(1, 20, (24, 7)), torch.randint(3, 8, (24,))
    mask = (torch.arange(7) < lengths.unsqueeze(1)).long()

    def collate(items: list) -> object:
        longest = int(lengths[items].max())
        data = {"input_ids": tokens[items, :longest], "attention_mask": mask[items, :longest]}
        return transformers.BatchEncoding({**data, "labels": items[0] % 2 + torch.tensor(items) % 2})

    return model.eval(), DataLoader(range(24), 5, collate_fn=collate)  # type: ignore[arg-type]


def without_labels(batch) -> tuple:
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"].clamp_max(1)


def test_a_transformer_takes_its_own_batches_of_any_length():
    model, loader = transformer()
    predictor = fit_ella(
        *(model, loader, loader), unpack=without_labels, forward=lambda m, x: m(**x), num_landmarks=24, rank=4
    )
    for batch in loader:
        inputs, _ = without_labels(batch)
        torch.testing.assert_close(predictor(inputs).logits_mean, model(**inputs).logits.detach())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft under the latest transformers
def test_lora_counts_its_own_weights_only(tmp_path):
    peft = pytest.importorskip("peft")
    model, loader = transformer()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"])).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # LoRA starts at zero
    hooks = {"unpack": without_labels, "forward": lambda m, x: m(**x)}
    predictor = fit_ella(tuned, loader, num_landmarks=24, rank=6, **hooks, **GIVEN)
    assert predictor.basis
    assert all("lora" in name for name in predictor.basis)
    inputs, _ = without_labels(next(iter(loader)))
    outputs = tuned(**inputs).logits
    weights = [tuned.get_parameter(name) for name in predictor.basis]
    grads = [torch.autograd.grad(f, weights, retain_graph=True) for f in outputs.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
    factor = jacobian @ flat(predictor.basis)
    expected = factor @ torch.linalg.solve(predictor.curvature.to(factor) + torch.eye(6), factor.T)
    found = predictor(inputs).logits.joint
    torch.testing.assert_close(found[:, :], expected, rtol=1e-3, atol=1e-6)


class Int8Linear(nn.Module):
    """A frozen weight of 8 bits, made float when it is used."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.register_buffer("weight", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("bias", layer.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x) * self.scale, self.bias.to(x))


def test_a_quantised_backbone_may_be_frozen_below_the_head():
    case = make_case("mlp")
    quantised = nn.Sequential(Int8Linear(case.model[0]), nn.Tanh(), case.model[2])
    plain = nn.Sequential(nn.Linear(3, 5).double().requires_grad_(False), nn.Tanh(), case.model[2])
    plain[0].weight.data.copy_(quantised[0].weight * quantised[0].scale)
    plain[0].bias.data.copy_(quantised[0].bias)
    found, expected = (
        fit_ella(model, case.loader(), num_landmarks=30, rank=4, **GIVEN) for model in (quantised, plain)
    )
    torch.testing.assert_close(found(case.inputs).probs, expected(case.inputs).probs)
