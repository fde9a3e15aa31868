"""A module that was written to is put back, and what differed is named."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_ella.untouched import Remembered, remembered


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
        self.head = self.body[3]  # a module with two names
        self.history: list[int] = [1, 2]
        self.options = {"scale": 1.0}
        self.scale, self.calls = torch.tensor([2.0, 3.0]), 0
        self.body[0].weight.grad = torch.ones(3, 2)

    def forward(self, x: Any) -> Any:
        return self.body(x)


def facts(module: nn.Module) -> list[Any]:
    """Everything that should be as it was, by identity and by value."""
    found: list[Any] = []
    for name, part in module.named_modules(remove_duplicate=False):
        found += [name, id(part), type(part), list(vars(part)), {k: id(v) for k, v in vars(part).items()}]
        for value in vars(part).values():
            if isinstance(value, dict):
                found.append([(key, id(item)) for key, item in value.items()])
            elif isinstance(value, list):
                found.append(list(map(id, value)))
    tensors = [*module.parameters(), *module.buffers(), module.scale, module.body[0].weight.grad]
    found += [(id(t), t.data_ptr(), t.dtype, t.shape, t.tolist(), t.requires_grad, t.is_leaf) for t in tensors]
    return [*found, [id(p.grad) for p in module.parameters()]]


def half(net: Net) -> None:
    net.half()


def functional(net: Net) -> None:
    net.body[0]._parameters["weight"] = torch.zeros(3, 2)


def reorder(net: Net) -> None:
    net.body[0]._parameters["weight"] = net.body[0]._parameters.pop("weight")


SABOTAGE: dict[str, tuple[Callable[[Net], Any], str]] = {
    "a weight is written to": (lambda net: net.body[0].weight.data.mul_(2), "body.0.weight"),
    "a weight is written to behind the counter": (lambda net: net.body[0].weight.detach().numpy().fill(1), "body.0.w"),
    "a weight is of another storage": (lambda net: setattr(net.body[0].weight, "data", torch.ones(3, 2)), "body.0.w"),
    "a weight is another parameter": (
        lambda net: setattr(net.body[0], "weight", nn.Parameter(torch.ones(3, 2))),
        "0.w",
    ),
    "a weight is no parameter": (functional, "body.0.weight"),
    "a weight of two names": (lambda net: net.head.weight.data.zero_(), "weight"),
    "a weight is gone": (lambda net: delattr(net.body[0], "bias"), "body.0.bias"),
    "the order of the weights": (reorder, "body.0.weight"),
    "a bias appears": (lambda net: net.body[2].register_parameter("bias", nn.Parameter(torch.ones(1))), "body.2.bias"),
    "statistics are counted": (lambda net: net.train()(torch.randn(4, 2)), "body.1.running_mean"),
    "a buffer is another": (lambda net: setattr(net.body[1], "running_var", torch.zeros(3)), "body.1.running_var"),
    "a mode": (lambda net: net.body[2].eval(), "body.2.training"),
    "a frozen weight": (lambda net: net.head.requires_grad_(False), "requires_grad"),
    "a gradient appears": (lambda net: net(torch.randn(4, 2)).sum().backward(), "grad"),
    "a gradient is gone": (lambda net: net.zero_grad(), "body.0.weight.grad"),
    "a gradient is added to": (lambda net: net.body[0].weight.grad.add_(1), "body.0.weight.grad"),
    "a submodule is another": (lambda net: net.body.__setitem__(0, nn.Linear(2, 3)), "body.0"),
    "a submodule appears": (lambda net: net.add_module("extra", nn.Linear(1, 1)), "extra"),
    "a hook": (lambda net: net.body[0].register_forward_hook(print), "body.0._forward_hooks"),
    "a patched forward": (lambda net: setattr(net.body[0], "forward", print), "body.0.forward"),
    "a tensor that is no buffer": (lambda net: net.scale.add_(1), "scale"),
    "an attribute": (lambda net: setattr(net, "calls", 7), "calls"),
    "an attribute appears": (lambda net: setattr(net, "cache", torch.ones(2)), "cache"),
    "an attribute is gone": (lambda net: delattr(net, "options"), "options"),
    "a list": (lambda net: net.history.append(3), "history"),
    "a dict": (lambda net: net.options.update(scale=2.0), "options"),
    "another type": (half, "body.0.bias"),
    "another class": (lambda net: weight_norm(net.body[0]), "body.0"),
}


def sabotage_and_fail(net: Net, sabotage: Callable[[Net], Any]) -> None:
    with remembered(net, "a test was run"):
        sabotage(net)
        _ = 1 / 0


@pytest.mark.parametrize("what", SABOTAGE)
@pytest.mark.parametrize("fails", [False, True])
def test_what_differs_is_put_back_and_named(what: str, fails: bool, caplog: pytest.LogCaptureFixture):
    sabotage, named = SABOTAGE[what]
    net = Net()
    net(torch.randn(4, 2)).sum().backward()
    before = facts(net)
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        if fails:
            with pytest.raises(ZeroDivisionError):
                sabotage_and_fail(net, sabotage)
        else:
            with remembered(net, "a test was run") as memory:
                sabotage(net)
            assert memory.verdict == "is as it would be without ELLA"
    assert facts(net) == before
    assert "while a test was run, something" in caplog.text
    assert named in caplog.text
    assert "which has been put back; the network is as it would be without ELLA" in caplog.text


def test_nothing_is_said_where_nothing_differs(caplog: pytest.LogCaptureFixture):
    net = Net()
    before = facts(net)
    with remembered(net, "a test was run") as memory:
        net.eval()
        net(torch.randn(4, 2))
        net.train()
        net.calls = int("0")
        net.double().float()  # as on the way to another device and back: parameters of another storage, other buffers
    assert facts(net) == before
    assert (memory.changed, memory.lost, caplog.text) == ([], [], "")


def test_what_was_too_large_to_copy_is_noticed_and_named(caplog: pytest.LogCaptureFixture):
    net = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    small = sum(t.nbytes for t in [*net.parameters(), *net.buffers()]) - net[0].weight.nbytes
    with remembered(net, "a test was run", budget=small) as memory:
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.data.add_(1)
    assert memory.lost == ["0.weight"]
    assert "was written to, and 0.weight could not be put back: load the checkpoint" in memory.verdict
    assert memory.verdict in caplog.text
    assert net[1].running_mean.eq(0).all()
    assert net[1].num_batches_tracked == 0
    with remembered(net, "a test was run", budget=0) as memory:
        pass
    assert memory.lost == []


def test_tensors_of_every_kind_are_left_alone(caplog: pytest.LogCaptureFixture):
    net = nn.Module()
    net.lazy, net.meta = nn.LazyLinear(3), nn.Linear(2, 2, device="meta")
    net.sparse = nn.Parameter(torch.eye(3).to_sparse())
    net.empty, net.bools = nn.Parameter(torch.empty(0, 3)), nn.Buffer(torch.tensor([True, False]))
    net.complex, net.short = nn.Parameter(torch.ones(2) * 1j), nn.Buffer(torch.ones(3).bfloat16())
    net.scalar, net.wide = nn.Parameter(torch.tensor(1.0)), torch.ones(1).expand(1000)
    net.transposed = nn.Parameter(torch.randn(3, 4).T)
    net.loss = (net.transposed * 2).sum()
    net.tied = net.transposed
    with torch.inference_mode():
        net.inferred = torch.ones(3)
    net.script = torch.jit.script(nn.Linear(2, 2))
    before = [{name: id(value) for name, value in vars(module).items()} for module in net.modules()]
    with remembered(net, "a test was run"):
        pass
    assert [{name: id(value) for name, value in vars(module).items()} for module in net.modules()] == before
    assert caplog.text == ""


def test_weights_that_share_a_storage_share_it_still():
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    net[1].weight = net[0].weight
    view = nn.Parameter(net[0].bias.detach().view(3, 1))
    net.register_parameter("view", view)
    memory = Remembered(net)
    for parameter in net.parameters():
        parameter.data = torch.zeros_like(parameter)
    memory.put_back()
    assert net[1].weight is net[0].weight
    assert view.data_ptr() == net[0].bias.data_ptr()
    assert memory.lost == []
