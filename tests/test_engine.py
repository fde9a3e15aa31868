"""Which engine is chosen, and what each can differentiate."""

import logging
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from conftest import TinyViT, at_a_time, conv_batchnorm, flat, make_case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ella import fit_ella
from lightning_ella.engine import Linearization
from lightning_ella.linearize import as_function

IMAGE = (3, 8, 8)


class Tied(nn.Module):
    """One parameter in two layers, one in a layer and by hand, and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.b.weight, self.head = self.a.weight, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh()).tanh()
        x = self.c(self.c(x).tanh()).tanh()
        return self.head((self.d(x) @ self.d.weight).tanh())


class SequenceFirst(nn.Module):
    """A layer whose samples are along the second axis."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.transpose(0, 1)).tanh().transpose(0, 1).mean(1))


class Windows(nn.Module):
    """Layers that see several pieces of each sample along the first axis."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.cat(x.unsqueeze(1).split(4, 3), 1).flatten(0, 1)  # (2 B, 3, 4, 8)
        return self.head(self.linear(self.conv(pieces).tanh().mean((2, 3))).view(len(x), 2, -1).sum(1))


class Attention(nn.Module):
    """Functional use of weights, a raw parameter with no axis to expand, and integer inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head((x + self.scale * self.attention(x, x, x, need_weights=False)[0]).mean(1))


class ResidualInPlace(nn.Module):
    """A layer's output is overwritten before the backward pass."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.inner(x.relu())
        return self.head(x)


class BufferedScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


class Recurrent(nn.Module):
    """A layer that vmap does not know."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[1][0])


class Packed(nn.Module):
    """A layer that sees only the tokens that are not zero: how many depends on the data."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        real = x[..., 0] != 0
        y = torch.zeros_like(x).index_put(real.nonzero(as_tuple=True), self.inner(x[real]).tanh())
        return self.head(y.sum(1))


class Tuple(nn.Linear):
    """Called like a Linear, but gives something else."""

    def forward(self, input: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(input).tanh(), None


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Tuple(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


def tokens(lengths: list[int]) -> Tensor:
    x = torch.randn(5, 4, 4)
    for sample, length in zip(x, lengths, strict=True):
        sample[length:] = 0
    return x


def dense_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(B, C, P), an output at a time."""
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(x)
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(f, weights, retain_graph=True, materialize_grads=True) for f in outputs.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients]).unflatten(0, outputs.shape)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, (3, 2), padding=(2, 1), dilation=(2, 1), groups=4), nn.ReLU(inplace=True),
        nn.Conv2d(12, 6, 2, padding="same", padding_mode="circular", dilation=3), nn.GroupNorm(2, 6),
        nn.SiLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=(1, 2), padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.BatchNorm1d(6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutions": (convolutions, lambda: torch.randn(5, *IMAGE)),
    "channels_last": (
        lambda: convolutions().to(memory_format=torch.channels_last),
        lambda: torch.randn(5, *IMAGE).to(memory_format=torch.channels_last),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.LayerNorm(7), nn.Flatten(), nn.Linear(21, 3)),
        lambda: torch.randn(5, 3, 4),
    ),
    "vit": (TinyViT, lambda: torch.randn(5, 1, 8, 8)),
    "attention": (Attention, lambda: torch.randint(9, (5, 4))),
    "tied": (Tied, lambda: torch.randn(5, 6)),
    "sequence_first": (SequenceFirst, lambda: torch.randn(5, 3, 4)),
    "windows": (Windows, lambda: torch.randn(5, *IMAGE)),
    "residual_in_place": (ResidualInPlace, lambda: torch.randn(5, 4)),
    "buffer": (BufferedScale, lambda: torch.randn(5, 4)),
    "prelu": (lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(), nn.Linear(4, 3)), lambda: torch.randn(5, 6)),
    "recurrent": (Recurrent, lambda: torch.randn(5, 6, 4)),
    "packed": (Packed, lambda: tokens([4, 2, 2, 3, 4])),
    "packed, not a multiple": (Packed, lambda: tokens([4, 4, 2, 3, 4])),
    "subclass": (Odd, lambda: torch.randn(5, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", ["forward", "layerwise"])
@pytest.mark.parametrize("rank", [2, 23])
def test_every_kind_of_layer_gives_the_dense_jacobian(name: str, engine: str, rank: int):
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model, x = make().double().eval(), inputs()
    x = x.double() if x.is_floating_point() else x
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    J = dense_jacobian(model, x)
    basis = {name: torch.randn(rank, *p.shape, dtype=torch.float64) for name, p in parameters.items()}
    with as_function():
        linearization = Linearization(model, engine=engine, samples_per_chunk=2)
        logits, features = linearization.features(x, basis)
        outputs = torch.arange(5) % 3
        rows = torch.cat([torch.cat(list(c.values()), 1) for c in linearization.gradients(x, outputs)])
    torch.testing.assert_close(features, J @ flat(basis), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rows, J[torch.arange(5), outputs], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, model(x).detach())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["convolutions", "channels_last"])
@pytest.mark.parametrize("most", [0, 2000, 2**22])  # windows, a direction at a time; groups of some samples; of all
def test_rows_of_convolutions_in_float32_are_those_of_the_dense_jacobian(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    at_a_time(monkeypatch, rows_in_groups=most, directions=most)
    make, inputs = NETWORKS[name]
    model, x = make().eval(), inputs()
    basis = {name: torch.randn(23, *p.shape) for name, p in model.named_parameters()}
    with as_function():
        linearization = Linearization(model, engine="layerwise")
        _, features = linearization.features(x, basis)
        outputs = torch.arange(5) % 3
        rows = torch.cat([torch.cat(list(c.values()), 1) for c in linearization.gradients(x, outputs)])
        assert linearization.layerwise.by_rule(x) == basis.keys()  # else a slower route would hide what is wrong
    J = dense_jacobian(model.double(), x.double())
    expected = J @ flat({name: part.double() for name, part in basis.items()})
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert (rows - J[torch.arange(5), outputs]).norm() < 1e-5 * rows.norm()


class Unbatched(nn.Module):
    """A convolution that is called with one sample at a time."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
        self.inner.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([self.inner(image) for image in x]).tanh().mean((2, 3)))


def test_a_convolution_without_a_batch_takes_the_slow_route():
    torch.manual_seed(0)
    model, x = Unbatched().double(), torch.randn(5, *IMAGE).double()
    basis = {name: torch.randn(4, *p.shape).double() for name, p in model.named_parameters() if p.requires_grad}
    with as_function():
        _, features = Linearization(model, engine="layerwise").features(x, basis)
    model.inner.weight.requires_grad_(True)
    J = dense_jacobian(model, x)[..., model.inner.weight.numel() :]
    torch.testing.assert_close(features, J @ flat(basis), rtol=1e-9, atol=1e-9)


def test_common_layers_take_the_fast_route():
    for make, x in ((conv_batchnorm, torch.randn(3, 1, 8, 8).double()), (TinyViT, torch.randn(3, 1, 8, 8).double())):
        model = make().double()
        with as_function():
            assert Linearization(model).layerwise.bytes_held(x) == 0
    vit = timm.create_model("test_vit", pretrained=False, img_size=32).double()  # its LayerNorm is a class of its own
    with as_function():
        assert Linearization(vit).layerwise.bytes_held(torch.randn(3, 3, 32, 32).double()) == 0


class NoForwardRule(torch.autograd.Function):
    """As people write them: no jvp, no vmap."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoForwardRule.apply(x)


def test_a_layer_without_a_forward_rule_falls_back_with_one_line(caplog: pytest.LogCaptureFixture):
    case = make_case("mlp")
    model = nn.Sequential(nn.Linear(3, 5), Square(), nn.Linear(5, 3)).double()
    exact = nn.Sequential(model[0], *(nn.Identity(),), model[2])
    exact[1].forward = lambda x: x * x
    with caplog.at_level(logging.INFO, "lightning_ella"):
        predictor = fit_ella(model, case.loader(), num_landmarks=30, rank=2, prior_variance=1.0, covariance_scale=1.0)
        predictor(case.inputs)
    expected = fit_ella(exact, case.loader(), num_landmarks=30, rank=2, prior_variance=1.0, covariance_scale=1.0)
    torch.testing.assert_close(predictor(case.inputs).probs, expected(case.inputs).probs)
    lines = [r.message for r in caplog.records if "no forward mode" in r.message and "layerwise reverse" in r.message]
    assert len(lines) == 1


def test_the_cheaper_engine_is_chosen_and_said(caplog: pytest.LogCaptureFixture):
    case = make_case("mlp")
    with caplog.at_level(logging.INFO, "lightning_ella"), as_function():
        linearization = Linearization(case.model)
        for rank in (2, 3):
            basis = {name: torch.randn(rank, *p.shape).double() for name, p in linearization.parameters.items()}
            linearization.features(case.inputs, basis)
    assert "features by forward mode (C = 3 outputs, 2 directions)" in caplog.text
    assert "features by layerwise reverse mode (C = 3 outputs, 3 directions)" in caplog.text


@pytest.mark.parametrize("outputs", [3, 30])
def test_bf16_knows_tied_weights_and_buffers_that_are_not_saved(outputs: int):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, outputs))
    model[1].weight = model[0].weight
    model.register_buffer("shift", torch.ones(6), persistent=False)
    model.get_extra_state = lambda: {"a": 1}  # type: ignore[method-assign]
    basis = {name: torch.randn(4, *p.shape) for name, p in model.named_parameters()}
    x = torch.randn(5, 6)
    with as_function():
        half, full = (
            Linearization(model, lambda m, x: m(x + m.shift), precision=precision).features(x, basis)[1]
            for precision in ("bf16", "full")
        )
    assert 0 < (half - full).norm() < 0.05 * full.norm()


def test_a_scripted_layer_is_differentiated_without_hooks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    scripted = nn.Sequential(model[0], model[1], _scripted(model[2]))
    x, basis = torch.randn(5, 4).double(), {n: torch.randn(2, *p.shape).double() for n, p in model.named_parameters()}
    found = []
    for network in (model, scripted):
        with as_function():
            found.append(Linearization(network, engine="layerwise").features(x, basis)[1])
        assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(*found)


def _scripted(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(layer)


def test_chunks_shrink_with_the_memory_budget():
    case = make_case("conv_batchnorm")
    with as_function():
        sizes = [Linearization(case.model, memory_budget=b)._samples(case.inputs, 3) for b in (10**4, 10**5, 10**9)]
    assert sizes[0] < sizes[1] < sizes[2] == 64


class SeparateKeys(nn.Module):
    """Attention with a key bias, which the softmax ignores: its gradient is nothing but rounding."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(mixed.mean(1))


def test_a_parameter_of_no_influence_does_not_lose_the_fast_route(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    model, x = SeparateKeys(), torch.randn(4, 9, 16)
    with as_function(), caplog.at_level("INFO", "lightning_ella"):
        list(Linearization(model).gradients(x, torch.zeros(4, dtype=torch.long)))
    assert "have no rule" not in caplog.text


def test_inputs_without_a_tensor_are_refused_with_what_to_pass():
    from collections import UserDict

    model = nn.Linear(2, 3)
    with (
        as_function(),
        pytest.raises(TypeError, match=r"no tensor with samples along its first axis in inputs that are an UserDict"),
    ):
        Linearization(model, lambda module, inputs: module(inputs["x"])).logits(UserDict(x=torch.zeros(2, 2)))
