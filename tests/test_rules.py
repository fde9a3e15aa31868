"""Rules of layers, each alone, against the dense Jacobian of one sample after the other."""

import warnings
from collections.abc import Callable

import pytest
import timm.layers
import torch
from conftest import at_a_time
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.swin_transformer import ShiftedWindowAttention
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from lightning_ella import rules
from lightning_ella.rules import rule_of
from lightning_ella.terms import NoRuleError, SparseRows

SAMPLES, COTANGENTS = 3, 2


class Scale(nn.Module):
    """A layer that nobody has a rule for."""

    def __init__(self, width: int):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_parameter("unused", None)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift).tanh() * self.log_scale.exp()


class Residual(nn.Module):
    """A block with a parameter of its own beside those of its layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.gamma = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.inner(x)


class Merging(nn.Module):
    """Has fewer rows of outputs than of inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 8) @ self.weight


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


class Standardized(nn.Conv2d):
    """A convolution whose weights are not its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def with_parts_frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


def floats(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, *size, dtype=torch.float64)


def tokens(*size: int, length: int = 7) -> Callable[[], Tensor]:
    return lambda: torch.randint(length, (SAMPLES, *size))


def many(rows: int, *size: int) -> Callable[[], Tensor]:
    """Rows for each sample along the first axis: frames of a video, windows of an image."""
    return lambda: torch.randn(SAMPLES * rows, *size, dtype=torch.float64)


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], str]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(4, 3), floats(4), "linear"),
    "linear of tokens, without a bias": (lambda: nn.Linear(4, 3, bias=False), floats(2, 5, 4), "linear"),
    "linear of windows": (lambda: nn.Linear(4, 3), many(2, 5, 4), "linear"),
    "linear, frozen bias": (lambda: with_parts_frozen(nn.Linear(4, 3), "bias"), floats(4), "linear"),
    "linear, frozen weight": (lambda: with_parts_frozen(nn.Linear(4, 3), "weight"), floats(4), "linear"),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), floats(4, 9), "conv"),
    "conv1d, all options": (
        lambda: nn.Conv1d(4, 6, 3, 2, 2, dilation=2, groups=2, bias=False, padding_mode="reflect"),
        floats(4, 9),
        "conv",
    ),
    "conv1d, as long as before": (lambda: nn.Conv1d(4, 4, 2, padding="same", groups=4), floats(4, 6), "conv"),
    "conv1d of frames": (lambda: nn.Conv1d(4, 6, 3), many(4, 4, 5), "conv"),
    "conv2d, all options": (
        lambda: nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 1), (2, 1), groups=2, padding_mode="replicate"),
        floats(4, 7, 6),
        "conv",
    ),
    "conv2d of frames": (lambda: nn.Conv2d(2, 3, 2), many(3, 2, 4, 4), "conv"),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), floats(2, 3, 4, 3), "conv"),
    "conv3d, all options": (
        lambda: nn.Conv3d(4, 2, (1, 2, 3), (2, 1, 1), (0, 1, 2), (1, 1, 2), groups=2, padding_mode="circular"),
        floats(4, 3, 3, 4),
        "conv",
    ),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3), floats(4, 5), "conv_transposed"),
    "transposed conv1d, all options": (
        lambda: nn.ConvTranspose1d(4, 6, 3, 3, 2, 2, groups=2, bias=False, dilation=2),
        floats(4, 5),
        "conv_transposed",
    ),
    "transposed conv1d, more padding out than stride": (
        lambda: nn.ConvTranspose1d(4, 6, 3, 1, 1, 2, dilation=3),
        floats(4, 5),
        "conv_transposed",
    ),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), floats(4, 3, 2), "conv_transposed"),
    "transposed conv2d, all options": (
        lambda: nn.ConvTranspose2d(4, 2, (3, 2), (2, 1), (2, 0), (1, 0), 2, dilation=(1, 2)),
        floats(4, 4, 3),
        "conv_transposed",
    ),
    "transposed conv2d of frames": (lambda: nn.ConvTranspose2d(2, 3, 2), many(2, 2, 3, 3), "conv_transposed"),
    "transposed conv3d": (
        lambda: nn.ConvTranspose3d(2, 4, (1, 2, 3), (1, 2, 1), (0, 1, 0), groups=2),
        floats(2, 2, 3, 2),
        "conv_transposed",
    ),
    "embedding": (lambda: nn.Embedding(7, 3), tokens(4), "embedding"),
    "embedding of one token": (lambda: nn.Embedding(7, 3), tokens(), "embedding"),
    "embedding of tables": (lambda: nn.Embedding(7, 3), tokens(2, 5), "embedding"),
    "embedding of few letters": (lambda: nn.Embedding(3, 2), tokens(9, length=3), "embedding"),
    "embedding in int32": (lambda: nn.Embedding(7, 3), lambda: tokens(4)().int(), "embedding"),
    "sparse embedding": (lambda: nn.Embedding(7, 3, sparse=True), tokens(4), "embedding"),
    "embedding with padding": (lambda: nn.Embedding(7, 3, padding_idx=2), tokens(9), "embedding"),
    "embedding with padding at the end": (lambda: nn.Embedding(4, 3, padding_idx=-1), tokens(9, length=4), "embedding"),
    "embedding of windows": (lambda: nn.Embedding(7, 3), lambda: torch.randint(7, (2 * SAMPLES, 4)), "embedding"),
    "bag": (lambda: nn.EmbeddingBag(7, 3), tokens(4), "embedding_bag"),
    "sum of a bag": (lambda: nn.EmbeddingBag(7, 3, mode="sum", padding_idx=1), tokens(6), "embedding_bag"),
    "mean of a bag with padding": (lambda: nn.EmbeddingBag(4, 3, padding_idx=1), tokens(6, length=4), "embedding_bag"),
    "greatest of a bag": (lambda: nn.EmbeddingBag(7, 3, mode="max"), tokens(4), "embedding_bag"),
    "greatest of a bag with padding": (
        lambda: nn.EmbeddingBag(4, 20, mode="max", padding_idx=1),
        tokens(6, length=4),
        "embedding_bag",
    ),
    "sparse bag": (lambda: nn.EmbeddingBag(7, 3, sparse=True), tokens(4), "embedding_bag"),
    "bag of padding": (lambda: nn.EmbeddingBag(3, 2, padding_idx=0), tokens(2, length=1), "embedding_bag"),
    "batch norm": (lambda: nn.BatchNorm1d(4), floats(4), "batch_norm"),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), floats(4, 2, 3, 2), "batch_norm"),
    "batch norm of frames": (lambda: nn.BatchNorm2d(4), many(2, 4, 3, 2), "batch_norm"),
    "batch norm, frozen scale": (lambda: with_parts_frozen(nn.BatchNorm2d(4), "weight"), floats(4, 3, 2), "batch_norm"),
    "group norm": (lambda: nn.GroupNorm(2, 4), floats(4, 3), "group_norm"),
    "group norm of frames": (lambda: nn.GroupNorm(2, 4), many(2, 4, 3), "group_norm"),
    "layer norm": (lambda: nn.LayerNorm(4), floats(3, 4), "layer_norm"),
    "layer norm over several axes": (lambda: nn.LayerNorm((4, 3, 2)), floats(4, 3, 2), "layer_norm"),
    "layer norm without a bias": (lambda: nn.LayerNorm(4, bias=False), floats(2, 3, 4), "layer_norm"),
    "layer norm of windows": (lambda: nn.LayerNorm(4), many(2, 3, 4), "layer_norm"),
    "timm's layer norm": (lambda: timm.layers.LayerNorm(4), floats(3, 4), "layer_norm"),
    "rms norm": (lambda: nn.RMSNorm(4), floats(3, 4), "rms_norm"),
    "rms norm over several axes": (lambda: nn.RMSNorm((3, 4), eps=0.1), floats(2, 3, 4), "rms_norm"),
    "prelu": (nn.PReLU, floats(4, 3), "prelu"),
    "prelu of channels": (lambda: nn.PReLU(4), floats(4, 3, 2), "prelu"),
    "prelu of features": (lambda: nn.PReLU(4), floats(4), "prelu"),
    "prelu of frames": (lambda: nn.PReLU(4), many(2, 4, 3), "prelu"),
    "GPT-2's linear": (lambda: Conv1D(3, 4), floats(5, 4), "transposed_linear"),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), floats(4, 5), "by_vjp"),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(4, affine=True), floats(4, 3, 2), "by_vjp"),
    "instance norm 3d with statistics": (
        lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
        floats(4, 2, 3, 2),
        "by_vjp",
    ),
    "timm's norm of channels": (lambda: timm.layers.LayerNorm2d(4), floats(4, 3, 2), "by_vjp"),
    "torchvision's norm of channels": (lambda: LayerNorm2d(4), floats(4, 3, 2), "by_vjp"),
    "batch norm and activation": (lambda: timm.layers.BatchNormAct2d(4), floats(4, 3, 2), "by_vjp"),
    "batch norm and another activation": (
        lambda: timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU, inplace=False),
        floats(4, 3, 2),
        "by_vjp",
    ),
    "group norm and activation": (lambda: timm.layers.GroupNormAct(4, 2), floats(4, 3, 2), "by_vjp"),
    "norm of channels and activation": (lambda: timm.layers.LayerNormAct2d(4), floats(4, 3, 2), "by_vjp"),
    "layer scale": (lambda: timm.layers.LayerScale(4), floats(3, 4), "by_vjp"),
    "layer scale of windows": (lambda: timm.layers.LayerScale(4), many(2, 3, 4), "by_vjp"),
    "layer scale of channels": (lambda: timm.layers.LayerScale2d(4), floats(4, 3, 2), "by_vjp"),
    "root mean square of channels": (lambda: timm.layers.RmsNorm2d(4), floats(4, 3, 2), "by_vjp"),
    "Llama's norm": (lambda: LlamaRMSNorm(4), floats(3, 4), "by_vjp"),
    "Gemma's norm": (lambda: GemmaRMSNorm(4), floats(3, 4), "by_vjp"),
    "batch norm that is synchronised": (lambda: nn.SyncBatchNorm(4), floats(4, 3), "batch_norm"),
    "padding of its own": (lambda: timm.layers.Conv2dSame(2, 3, 3, 2), floats(2, 5, 4), "by_vjp"),
    "standardized weights": (lambda: Standardized(2, 3, 3), floats(2, 5, 4), "by_vjp"),
    "an own layer": (lambda: Scale(4), floats(3, 4), "by_vjp"),
    "an own layer, a part frozen": (lambda: with_parts_frozen(Scale(4), "shift"), floats(3, 4), "by_vjp"),
    "an own layer of windows": (lambda: Scale(4), many(2, 3, 4), "by_vjp"),
    "a block": (Residual, floats(3, 4), "by_vjp"),
    "fewer rows of outputs": (Merging, many(4, 4), "by_vjp"),
    "an own embedding": (Lookup, tokens(4, length=5), "by_vjp"),
}  # fmt: skip


def randomized(layer: nn.Module) -> nn.Module:
    """In float64 and eval mode, with no parameter or statistic that is still its initial one."""
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for name, buffer in layer.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2) if "var" in name else buffer.normal_()
    return layer


def dense_rows(layer: nn.Module, inputs: Tensor, gradients: Tensor, *, recurse: bool = False) -> dict[str, Tensor]:
    """Name -> (B, S, p), from the Jacobian of one sample after the other."""
    own = {name: value.detach().requires_grad_() for name, value in layer.named_parameters(recurse=recurse)}
    found: dict[str, list[Tensor]] = {name: [] for name in own}
    for x, g in zip(inputs.unflatten(0, (SAMPLES, -1)), gradients.unflatten(0, (SAMPLES, -1)), strict=True):
        outputs = functional_call(layer, own, (x.clone(),)).flatten()
        one_by_one = [
            torch.autograd.grad(y, list(own.values()), retain_graph=True, materialize_grads=True) for y in outputs
        ]
        for name, derivatives in zip(own, zip(*one_by_one, strict=True), strict=True):
            jacobian = torch.stack([derivative.to_dense().flatten() for derivative in derivatives])
            found[name].append(g.transpose(0, 1).flatten(1) @ jacobian)
    return {name: torch.stack(rows) for name, rows in found.items()}


def gradients_for(layer: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output = layer(inputs.clone())
    return torch.randn(len(output), COTANGENTS, *output.shape[1:], dtype=output.dtype)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("most", [0, 2**24])  # a sample at a time, and all
def test_a_rule_gives_the_rows_of_the_dense_jacobian(name: str, most: int, monkeypatch: pytest.MonkeyPatch):
    at_a_time(monkeypatch, rows=most, windows=most, directions=most)
    torch.manual_seed(0)
    make, make_inputs, expected_rule = CASES[name]
    layer, inputs = randomized(make()), make_inputs()
    gradients, before = gradients_for(layer, inputs), inputs.clone()
    expected = dense_rows(layer, inputs, gradients)
    rule = rule_of(layer, subclasses=False)
    assert rule is getattr(rules, expected_rule)
    rounding = 1e-4 if isinstance(layer, GemmaRMSNorm) else 1e-10  # it computes in float32, whatever it is given
    names = {value: name for name, value in layer.named_parameters(recurse=False)}
    with torch.no_grad():
        found = [(names[value], rows) for value, rows in rule(layer, inputs, gradients, SAMPLES) if value is not None]
        assert {name for name, _ in found} == expected.keys()
        for parameter, rows in found:
            torch.testing.assert_close(rows.dense(), expected[parameter], rtol=rounding, atol=rounding)
            for K in (1, 2, 70):  # few directions go through the layer, many meet the rows
                basis = torch.randn(K, expected[parameter].shape[2], dtype=torch.float64)
                products = expected[parameter] @ basis.T
                torch.testing.assert_close(rows.times(basis), products, rtol=rounding, atol=rounding)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("most", [0, 2**14, 2**24])  # no groups; some samples in groups; all of them
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("conv")])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions_in_float32_give_the_rows_of_the_dense_jacobian(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    at_a_time(monkeypatch, rows_in_groups=most)
    torch.manual_seed(0)
    make, make_inputs, _ = CASES[name]
    layer, inputs = randomized(make()), make_inputs()
    gradients = gradients_for(layer, inputs)
    expected = dense_rows(layer, inputs, gradients)["weight"]
    layer, basis = layer.float(), torch.randn(70, expected.shape[2])
    with torch.no_grad():
        _, rows = next(rules.conv(layer, inputs.float(), gradients.float(), SAMPLES))
        for found, wanted in ((rows.dense(), expected), (rows.times(basis), expected @ basis.double().T)):
            assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_rule_may_be_used_under_autocast(name: str):
    torch.manual_seed(0)
    make, make_inputs, rule = CASES[name]
    layer, inputs = randomized(make()).float(), make_inputs()
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        gradients = gradients_for(layer, inputs)
        rows = {id(value): rows.dense() for value, rows in getattr(rules, rule)(layer, inputs, gradients, SAMPLES)}
    expected = dense_rows(layer.double(), inputs.double() if inputs.is_floating_point() else inputs, gradients.double())
    for parameter, value in layer.named_parameters(recurse=False):
        assert (rows[id(value)] - expected[parameter]).norm() <= 0.05 * expected[parameter].norm()


def test_products_with_an_embedding_never_hold_its_vocabulary(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SparseRows, "dense", None)
    layer, inputs, gradients = nn.Embedding(9000, 4), torch.randint(9000, (3, 5)), torch.randn(3, 2, 5, 4)
    ((weight, rows),) = rules.embedding(layer, inputs, gradients, 3)
    assert weight is layer.weight
    basis = torch.randn(6, 9000 * 4)
    expected = torch.einsum("bstd,kbtd->bsk", gradients, basis.view(6, 9000, 4)[:, inputs])
    torch.testing.assert_close(rows.times(basis), expected)


def test_an_output_of_a_size_that_was_asked_for_is_no_other_rule():
    torch.manual_seed(0)
    layer, inputs = nn.ConvTranspose2d(2, 3, 3, stride=3).double(), torch.randn(SAMPLES, 2, 3, 2).double()
    output = layer(inputs, output_size=[10, 8])
    gradients = torch.randn(SAMPLES, COTANGENTS, *output.shape[1:], dtype=torch.float64)
    ((_, rows), _) = rules.conv_transposed(layer, inputs, gradients, SAMPLES)
    exact = [torch.autograd.grad(output, layer.weight, g, retain_graph=True)[0] for g in gradients.transpose(0, 1)]
    basis = torch.randn(2, exact[0].numel(), dtype=torch.float64)
    for found in (rows.dense() @ basis.T, rows.times(basis)):
        torch.testing.assert_close(found.sum(0), torch.stack(exact).flatten(1) @ basis.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Conv1d(SAMPLES, SAMPLES, 1), torch.randn(SAMPLES, 4)),
        (nn.Conv2d(SAMPLES, SAMPLES, 1), torch.randn(SAMPLES, 4, 4)),
        (nn.ConvTranspose3d(SAMPLES, SAMPLES, 1), torch.randn(SAMPLES, 2, 2, 2)),
        (nn.Linear(4, 3), torch.randn(4, 4)),
        (nn.BatchNorm2d(4), torch.randn(2, 4, 2, 2)),
        (nn.Embedding(4, 3), torch.arange(4)),
        (nn.LayerNorm(4), torch.randn(1, 4)),
        (Scale(4), torch.randn(4, 4)),
    ],
)
def test_a_call_that_a_rule_does_not_know_is_refused(layer: nn.Module, inputs: Tensor):
    layer = layer.eval()
    gradients = gradients_for(layer, inputs)
    rule = rule_of(layer, subclasses=False)
    assert rule is not None
    with pytest.raises(NoRuleError), torch.no_grad():
        list(rule(layer, inputs, gradients, SAMPLES))


class Noisy(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Branching(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (timm.layers.LayerScale(4, inplace=True), (4,)),
        (timm.layers.LayerScale2d(4, inplace=True), (4, 2, 2)),
        (Noisy(4), (4,)),
        (Branching(4), (4,)),
    ],
)
def test_a_module_that_is_no_function_of_its_input_is_refused(layer: nn.Module, size: tuple[int, ...]):
    inputs, gradients = torch.randn(SAMPLES, *size), torch.randn(SAMPLES, COTANGENTS, *size)
    before = inputs.clone()
    with pytest.raises(RuntimeError), torch.no_grad():
        list(rules.by_vjp(layer, inputs, gradients, SAMPLES))
    assert torch.equal(inputs, before)


def test_a_bag_with_offsets_is_refused():
    layer, tokens = nn.EmbeddingBag(7, 3), torch.tensor([1, 2, 3, 4])
    with pytest.raises(NoRuleError, match="offsets"):
        list(rules.embedding_bag(layer, tokens, torch.randn(2, 1, 3), 2))


class Patched(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.forward = super().forward


class Token(nn.Module):
    """Its parameter is copied for each sample, which costs less than a backward pass through its layers."""

    def __init__(self):
        super().__init__()
        self.token, self.layers = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + self.token)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(nn.Linear(4, 3)),
        nn.Bilinear(4, 3, 2),
        nn.MultiheadAttention(4, 2),
        nn.BatchNorm2d(4, affine=False),
        nn.LayerNorm(4, elementwise_affine=False),
        Token(),
        Patched(),
    ],
)
def test_what_cannot_be_told_from_one_input_has_no_rule(layer: nn.Module):
    assert rule_of(layer, subclasses=False) is None


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.randn(2, 4))])
def test_a_scripted_layer_has_no_rule(compiled: Callable[[nn.Module], nn.Module]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its name and category change with torch
        scripted = compiled(nn.Linear(4, 3))
    assert rule_of(scripted, subclasses=True) is None


def test_the_rule_of_a_class_is_tried_for_classes_derived_from_it():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Renamed(nn.Linear):
        pass

    assert rule_of(Own(4, 3), subclasses=True) is rules.linear
    assert rule_of(Own(4, 3), subclasses=False) is rules.by_vjp
    assert rule_of(Renamed(4, 3), subclasses=False) is rules.linear
    assert rule_of(timm.layers.LayerNorm2d(4), subclasses=True) is rules.by_vjp  # not that of its base, nn.LayerNorm


WITHIN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "weights by a parametrization": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)),
        (4, 5),
        ["parametrizations.weight.original0", "parametrizations.weight.original1", "bias"],
    ),
    "an attention's weights": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
        (3, 4),
        ["self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight"],
    ),
    "weights that are used without calling their layer": (
        lambda: ShiftedWindowAttention(4, [2, 2], [1, 1], 2),
        (4, 4, 4),
        ["relative_position_bias_table", "qkv.weight", "proj.bias"],
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # weight_norm has no batching rule
@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("most", [0, 2**24])
def test_a_module_may_be_differentiated_for_those_within_it(name: str, most: int, monkeypatch: pytest.MonkeyPatch):
    at_a_time(monkeypatch, rows=most)
    torch.manual_seed(0)
    make, size, names = WITHIN[name]
    module, inputs = randomized(make()), torch.randn(SAMPLES, *size, dtype=torch.float64)
    gradients = gradients_for(module, inputs)
    expected = dense_rows(module, inputs, gradients, recurse=True)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = [(value, rows.dense()) for value, rows in rules.by_vjp(module, inputs, gradients, SAMPLES, names)]
    for name, (value, rows) in zip(names, found, strict=True):
        assert value is module.get_parameter(name)
        torch.testing.assert_close(rows, expected[name], rtol=1e-10, atol=1e-10)


def test_a_module_is_only_read_while_it_is_differentiated():
    class Remembering(Scale):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = super().forward(x)
            return self.seen

    layer = Remembering(4)
    inputs, gradients = torch.randn(SAMPLES, 4), torch.randn(SAMPLES, 1, 4)
    before, values = dict(vars(layer)), dict(layer._parameters)
    list(rules.by_vjp(layer, inputs, gradients, SAMPLES))
    assert vars(layer) == before
    assert not hasattr(layer, "seen")
    assert all(layer._parameters[name] is value for name, value in values.items())
