"""BatchNorms that are taken into the convolutions before them, and those that must not be."""

from collections.abc import Callable

import pytest
import torch
from conftest import make_case
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lightning_ella.activations import Recorder, find_places
from lightning_ella.engine import Linearization
from lightning_ella.folding import find_folding
from lightning_ella.linearize import Network, as_function, as_values


class Net(nn.Module):
    """Convolutions with and without biases and groups, each before a BatchNorm; `forward` may be replaced."""

    def __init__(self, forward: "Callable[[Net, Tensor], Tensor] | None" = None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.head, self.gate = nn.Linear(4, 3), Gated()
        self.replaced = forward
        for norm in (self.bn1, self.bn2):
            for value in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(value)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.replaced is not None:
            return self.replaced(self, x)
        x = self.bn1(self.conv1(x)).relu_()
        return self.head((x + self.bn2(self.conv2(x))).tanh().mean((2, 3)))


class Gated(nn.Module):
    """Multiplied by zero, so that its value says nothing about its derivative."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x


class Doubling(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def output_used_twice(net: Net, x: Tensor) -> Tensor:
    y = net.conv1(x)
    return net.head((net.bn1(y) + y).tanh().mean((2, 3)))


def called_twice(net: Net, x: Tensor) -> Tensor:
    y = net.bn1(net.conv1(x)).tanh()
    return net.head(net.bn2(net.conv2(net.bn2(net.conv2(y)).tanh())).mean((2, 3)))


def changed_in_place(net: Net, x: Tensor) -> Tensor:
    return net.head(net.bn1(nn.functional.hardtanh_(net.conv1(x))).tanh().mean((2, 3)))


def used_again_behind_a_gate(net: Net, x: Tensor) -> Tensor:
    y = net.conv1(x)
    return net.head((net.bn1(y.clone()) + net.gate(y * net.bn1(y))).tanh().mean((2, 3)))


def called_by_keyword(net: Net, x: Tensor) -> Tensor:
    return net.head(net.bn1(input=net.conv1(x)).tanh().mean((2, 3)))


def weight_used_again(net: Net, x: Tensor) -> Tensor:
    return net.head((net.bn1(net.conv1(x)) * net.conv1.weight.sum()).tanh().mean((2, 3)))


def scale_used_again(net: Net, x: Tensor) -> Tensor:
    return net.head((net.bn1(net.conv1(x)) * net.bn1.weight.sum()).tanh().mean((2, 3)))


def frozen(name: str) -> Net:
    net = Net()
    net.get_parameter(name).requires_grad_(False)
    return net


def patched() -> Net:
    net = Net()
    net.bn1.forward = lambda x, forward=net.bn1.forward: 2 * forward(x)
    return net


def hooked() -> Net:
    net = Net()
    net.conv1.register_forward_hook(lambda layer, args, output: output.tanh())
    return net


def subclassed() -> Net:
    net = Net()
    norm, net.bn1 = net.bn1, Doubling(4)
    net.bn1.load_state_dict(norm.state_dict())
    return net


NETWORKS: dict[str, tuple[Callable[[], Net], int]] = {  # and how many of its BatchNorms can be folded
    "plain": (Net, 2),
    "channels_last": (lambda: Net().to(memory_format=torch.channels_last), 2),
    "synchronised": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Net()), 2),
    "frozen weight": (lambda: frozen("conv1.weight"), 1),
    "frozen scale": (lambda: frozen("bn2.weight"), 1),
    "another kind of BatchNorm": (subclassed, 1),
    "patched": (patched, 1),
    "hooked": (hooked, 1),
    "changed in place": (lambda: Net(changed_in_place), 0),
    "used again behind a gate": (lambda: Net(used_again_behind_a_gate), 0),
    "called by keyword": (lambda: Net(called_by_keyword), 0),
    "output used twice": (lambda: Net(output_used_twice), 0),
    "called twice": (lambda: Net(called_twice), 1),
    "weight used again": (lambda: Net(weight_used_again), 0),
    "scale used again": (lambda: Net(scale_used_again), 0),
}


@pytest.fixture
def images() -> Tensor:
    """The first of them so small that nothing saturates."""
    scale = torch.tensor([1e-3, 1, 2, 3, 4], dtype=torch.float64).view(-1, 1, 1, 1)
    return scale * torch.randn(5, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("engine", ["forward", "layerwise"])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_exact_whether_or_not_it_folds(name: str, engine: str, images: Tensor):
    make, expected = NETWORKS[name]
    net = make().double().eval()
    taken = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    jacobian = jacrev(lambda p: functional_call(net, p, (images,)))(taken)
    basis = {n: torch.randn(4, *p.shape, dtype=torch.float64) for n, p in taken.items()}
    exact = sum(torch.einsum("bcp,kp->bck", jacobian[n].reshape(5, 3, -1), v.view(4, -1)) for n, v in basis.items())
    with as_function():
        linearization = Linearization(net, engine=engine)
        logits, features = linearization.features(images, basis)
        _, projections = linearization.projections(images, lambda f, _: f.sin(), basis)
    assert linearization._folding is not None
    assert len(linearization._folding.pairs) == expected
    assert ("forward" in vars(net.bn1)) == (name == "patched")
    torch.testing.assert_close(logits, net(images).detach())
    torch.testing.assert_close(features, exact)
    torch.testing.assert_close(projections, torch.einsum("bc,bck->bk", logits.sin(), features))


def test_it_does_not_fold_where_the_tangents_have_no_room(images: Tensor):
    net = Net().double().eval()
    basis = {n: torch.randn(4, *p.shape, dtype=torch.float64) for n, p in net.named_parameters()}
    with as_function():
        roomy, tight = Linearization(net), Linearization(net, memory_budget=2**12)
        assert roomy._fold(images, basis)[0].pairs
        assert not tight._fold(images, basis)[0].pairs
        torch.testing.assert_close(roomy.features(images, basis), tight.features(images, basis))


def test_the_network_is_as_before_even_after_an_error(images: Tensor):
    net = Net().double().eval()
    before = net(images)
    network = Network(net)
    with as_function():
        folding = find_folding(network, images, network.names.values())
        with pytest.raises(RuntimeError, match="broken"), folding.applied(network):
            raise RuntimeError("broken")
    assert "forward" not in vars(net.bn1)
    assert "forward" not in vars(network.model.bn1)
    assert torch.equal(net(images), before)


def test_what_is_folded_once_is_not_taken_for_another_basis():
    case = make_case("conv_batchnorm")
    with torch.inference_mode():  # as where a predictor is loaded in a test step
        basis = {name: torch.randn(3, *value.shape).double() for name, value in case.model.named_parameters()}
    kept = {name: value.clone() for name, value in basis.items()}
    with as_function():
        linearization = Linearization(case.model)
        assert linearization.features(case.inputs, basis)[1].equal(linearization.features(case.inputs, basis)[1])
        for factor in (2, 3):
            tangents = {name: factor * value for name, value in kept.items()}
            expected = Linearization(case.model).features(case.inputs, tangents)[1]
            torch.testing.assert_close(linearization.features(case.inputs, tangents)[1], expected)
            tangents["0.weight"].mul_(0)
            expected = Linearization(case.model).features(case.inputs, tangents)[1]
            torch.testing.assert_close(linearization.features(case.inputs, tangents)[1], expected)
            del tangents


def recorder(net: nn.Module, images: Tensor, layers: str | None = None) -> Recorder:
    """One that looks at a layer, which is then not folded."""
    network = Network(net, names=[name for name, _ in net.named_parameters()])
    network.settle(images)
    places = find_places(network, images, layers) if layers else []
    return Recorder(network, places)


@pytest.mark.parametrize("layers", [None, "conv1"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_activations_are_the_same_whether_or_not_it_folds(name: str, layers: str | None, images: Tensor):
    make, expected = NETWORKS[name]
    net = make().double().eval().requires_grad_(True)
    with as_values():
        plain, folded = recorder(net, images, layers), recorder(net, images, layers).fold(images)
        for some in (images, images[:1], images.flip(0)):
            torch.testing.assert_close(folded(some), plain(some))
    torch.testing.assert_close(folded(images)[0], net(images))
    assert ("forward" in vars(net.bn1)) == (name == "patched")
    if layers is None and not name.startswith("frozen"):  # which is folded, too: there are no tangents
        assert folded.num_folded == expected


def or_its_convolution_again(net: Net, x: Tensor) -> Tensor:
    """What is big takes another way."""
    y = net.conv1(x)
    z = net.bn1(y) if len(x) > 1 else net.bn1(y) + y
    return net.head(z.tanh().mean((2, 3)))


def or_without_its_norm(net: Net, x: Tensor) -> Tensor:
    y = net.conv1(x)
    return net.head((net.bn1(y) if len(x) > 1 else y).tanh().mean((2, 3)))


def or_its_norm_twice(net: Net, x: Tensor) -> Tensor:
    y = net.conv1(x)
    z = net.bn1(y)
    return net.head((z if len(x) > 1 else net.bn1(z)).tanh().mean((2, 3)))


def or_by_a_number_of_it(net: Net, x: Tensor) -> Tensor:
    y = net.conv1(x)
    z = net.bn1(y)
    return net.head((z if len(x) > 1 or y[0, 0, 0, 0].item() > 9 else z + 1).tanh().mean((2, 3)))


def or_after_it_was_written_to(net: Net, x: Tensor) -> Tensor:
    y = net.conv1(x)
    if len(x) == 1:
        y += 1
    return net.head(net.bn1(y).tanh().mean((2, 3)))


def or_again_unless_that_fails(net: Net, x: Tensor) -> Tensor:
    y = net.conv1(x)
    z = net.bn1(y)
    try:
        z = z + y if len(x) == 1 else z
    except Exception:
        z = z + 1
    return net.head(z.tanh().mean((2, 3)))


@torch.jit.script
def scripted(y: Tensor) -> Tensor:
    return y.sin()


def or_again_in_what_is_compiled(net: Net, x: Tensor) -> Tensor:
    y = net.conv1(x)
    z = net.bn1(y)
    return net.head((z if len(x) > 1 else z + scripted(y)).tanh().mean((2, 3)))


WAYS = [or_its_convolution_again, or_without_its_norm, or_its_norm_twice, or_by_a_number_of_it]
WAYS += [or_after_it_was_written_to, or_again_unless_that_fails, or_again_in_what_is_compiled]


@pytest.mark.parametrize("forward", WAYS)
def test_inputs_that_go_another_way_are_not_folded(forward: Callable[[Net, Tensor], Tensor], images: Tensor):
    net = Net(forward).double().eval()
    with as_values():
        folded = recorder(net, images).fold(images)
        assert folded.num_folded == 1
        torch.testing.assert_close(folded(images)[0], net(images))
        assert folded.num_folded == 1
        for some in (images[:1], images):
            torch.testing.assert_close(folded(some)[0], net(some))
        assert folded.num_folded == 0


@pytest.mark.parametrize("kind", ["scripted", "type"])
def test_uses_that_cannot_be_seen_are_not_folded(kind: str, images: Tensor):
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv1(x)
        z = net.bn1(y)
        z = z + scripted(y) if kind == "scripted" else z if type(y) is Tensor else 2 * z
        return net.head(z.tanh().mean((2, 3)))

    net = Net(forward).double().eval()
    with as_values():
        folded = recorder(net, images).fold(images)
        torch.testing.assert_close(folded(images)[0], net(images))


def test_an_error_on_the_way_leaves_it_folded(images: Tensor):
    def fails_for_one(net: Net, x: Tensor) -> Tensor:
        y = net.conv1(x)
        if len(x) == 1:
            raise RuntimeError("one is not enough")
        return net.head(net.bn1(y).tanh().mean((2, 3)))

    net = Net(fails_for_one).double().eval()
    with as_values():
        folded = recorder(net, images).fold(images)
        with pytest.raises(RuntimeError, match="not enough"):
            folded(images[:1])
        torch.testing.assert_close(folded(images)[0], net(images))
        assert folded.num_folded == 1
