"""What is free, and whether pages are kept."""

import ctypes
import os
import platform
import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress

import pytest
import torch
from conftest import flat, make_case
from torch import Tensor, nn

from lightning_ella.batches import call
from lightning_ella.engine import Linearization, Sizes
from lightning_ella.forward_mode import ForwardMode
from lightning_ella.linearize import Network, as_function
from lightning_ella.look import no_probabilities, same_alone, same_each_time
from lightning_ella.memory import TUNED, UNKNOWN, free_memory, give_back, keeping_pages

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep pages")
CPU = torch.device("cpu")
FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch):
    for name in {*TUNED, "GLIBC_TUNABLES"}:
        monkeypatch.delenv(name, raising=False)


class Account(ctypes.Structure):
    """Glibc's `struct mallinfo2`: bytes in `arena` and, mapped on their own, in `hblkhd`; `fordblks` are free."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def account() -> Account:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except UNKNOWN:
        pytest.skip("glibc is older than 2.33")
    function.restype = Account
    return function()


def is_mapped(size: int) -> bool:
    """Whether a block gets pages of its own, which go back to the system with it."""
    before = account()
    block = torch.empty(size + before.fordblks, dtype=torch.uint8)  # more than the heap has a place for
    mapped = account().hblkhd - before.hblkhd > size
    del block
    return mapped


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_some_memory_is_free():
    assert 2**20 < free_memory(CPU) < 2**50


def test_what_torch_keeps_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch):
    figures = {"mem_get_info": (5, 80), "memory_reserved": 70, "memory_allocated": 10}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda", 0)) == 5 + 70 - 10


@glibc
def test_large_blocks_are_kept_inside_and_mapped_outside():
    with keeping_pages(CPU):
        assert not is_mapped(2**26)
    assert is_mapped(2**26)


@glibc
def test_what_was_kept_can_be_given_back():
    with keeping_pages(CPU):
        torch.empty(2**28, dtype=torch.uint8).fill_(1)
    before = resident()
    give_back()
    assert resident() < before - 2**27


def test_whatever_is_set_is_set_again(monkeypatch: pytest.MonkeyPatch):
    done: list[set[int]] = []
    monkeypatch.setattr("lightning_ella.memory._set", lambda options: done.append(set(options)))
    with keeping_pages(CPU):
        inside = set(done[0])
    assert inside <= done[1]


@glibc
def test_they_are_no_longer_kept_after_an_error():
    with suppress(ZeroDivisionError), keeping_pages(CPU):
        raise ZeroDivisionError
    assert is_mapped(2**26)


@glibc
@pytest.mark.parametrize("name", sorted({*TUNED, "GLIBC_TUNABLES"}))
def test_who_has_tuned_the_allocator_keeps_that(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1")
    with keeping_pages(CPU):
        assert is_mapped(2**26)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # a C library without mallopt
    with keeping_pages(CPU):
        give_back()


@pytest.mark.parametrize("product", ["features", "top", "gradients", "projections"])
def test_all_products_keep_pages(product: str, monkeypatch: pytest.MonkeyPatch):
    entered = []

    @contextmanager
    def recorded(device: torch.device):
        entered.append(device)
        yield

    monkeypatch.setattr("lightning_ella.engine.keeping_pages", recorded)
    case = make_case("mlp")
    with as_function():
        linearization = Linearization(case.model)
        basis = {name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in linearization.parameters.items()}
        calls = {
            "features": lambda: linearization.features(case.inputs, basis),
            "top": lambda: linearization.look(case.inputs, basis, top=1),
            "gradients": lambda: next(linearization.gradients(case.inputs, torch.zeros(len(case.inputs)).long())),
            "projections": lambda: linearization.projections(case.inputs, lambda f, _: f, basis),
        }
        calls[product]()
    assert set(entered) == {CPU}


class Attention(nn.Module):
    """One head over T positions, written out; and layers that return their input."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 2)
        self.idle, self.act = nn.Sequential(nn.Identity(), nn.Dropout()), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.idle(x)).chunk(3, -1)
        return self.head(self.act((q @ k.mT).softmax(-1) @ v).mean(1))


def test_what_a_pass_holds_is_what_autograd_saves():
    T, width, b = 64, 8, 4
    linearization = Linearization(Attention(width))
    with as_function():
        sizes = linearization.sizes(torch.randn(5, T, width))  # of a batch: one sample counts
    assert sizes.largest == T * T * b  # no layer's output
    # The input, q, k and v as one, the softmax, the activation and its mean; weights are none of it.
    assert sizes.held == (T * width + 3 * T * width + T * T + T * width + width) * b + 2 * sizes.largest
    assert sizes.cotangent == (3 * T * width + 2) * b  # of the outputs of layers with weights alone


def test_a_look_at_a_network_keeps_no_activations():
    kept: list[int] = []

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))

        def forward(self, x: Tensor) -> Tensor:
            alive = [weakref.ref(x)]
            for layer in self.layers:
                x = layer(x).relu()
                alive.append(weakref.ref(x))
            if len(x) > 1:  # the graph of one sample may be looked at
                kept.append(sum(each() is not None for each in alive))
            return x

    network, x = Network(Deep(), call), torch.randn(8, 64)
    with as_function():
        network.settle(x)
        kept.clear()
        same_each_time(network, x)
        same_alone(network, x)
        no_probabilities(network, x, "Softmax", True, ".log()")
    assert max(kept) <= 4  # of 21


class Odd(nn.Module):
    """As it is told."""

    def __init__(self, kind: str):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(6, 6), nn.Linear(6, 3), kind
        self.graph = torch.eye(6).to_sparse()
        if kind == "frozen":
            self.a.requires_grad_(False)
        if kind == "normed":
            self.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 600))
            self.b = nn.Linear(600, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "derivative within":
            x = x + torch.func.vmap(torch.func.grad(lambda row: self.a(row).tanh().sum()))(x)
        if self.kind == "sparse":
            x = torch.sparse.mm(self.graph.to(x), x.T).T
        if self.kind == "checkpointed":
            return torch.utils.checkpoint.checkpoint(lambda x: self.b(self.a(x).tanh()), x, use_reentrant=False)
        if self.kind == "unhooked":
            with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
                return self.b(self.a(x).tanh())
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("engine", ["forward", "layerwise"])
@pytest.mark.parametrize("kind", ["derivative within", "sparse", "unhooked", "checkpointed", "frozen", "normed"])
def test_whatever_a_network_does_its_size_is_found(kind: str, engine: str):
    torch.manual_seed(0)
    model, x = Odd(kind), torch.randn(7, 6)
    with as_function():
        linearization = Linearization(model, engine=engine)
        sizes = linearization.sizes(x)
        basis = {name: torch.randn(2, *p.shape) for name, p in linearization.parameters.items()}
        assert linearization.features(x, basis)[1].isfinite().all()
    outputs = 600 if kind == "normed" else 6  # of the largest layer; no weight that is made of others counts
    assert sizes.largest == outputs * 4
    assert 2 * sizes.largest <= sizes.held <= 8 * sizes.largest
    with as_function(), pytest.raises(ValueError, match="the batch has no inputs"):
        Linearization(model, engine=engine).features(x[:0], basis)


class Branching(nn.Module):
    """Goes another way for bright images."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = h * 0.5 if bool(x.amax() > 5) else h
        return self.head(self.norm(h).relu().mean((2, 3)))


def test_a_folding_that_does_not_fit_is_taken_back_where_sizes_are_measured():
    torch.manual_seed(0)
    model, x = Branching().double(), torch.randn(6, 1, 5, 5).double()
    bright = x.clone()
    bright[:, 0, 0, 0] = 9
    basis = {name: torch.randn(2, *p.shape).double() for name, p in model.named_parameters()}
    with as_function():
        linearization = Linearization(model, engine="forward")
        linearization.features(x, basis)  # finds the folding
        found = linearization.projections(bright, lambda f, _: f.sin(), basis)
        expected = Linearization(model, engine="forward").projections(bright, lambda f, _: f.sin(), basis)
    torch.testing.assert_close(found, expected)


class Greedy(nn.Module):
    """Has a place for so many samples."""

    most = 60

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 1 and len(x) > type(self).most:
            raise torch.OutOfMemoryError("tried to allocate 80 GB")
        return self.body(x)


PRODUCTS: dict[str, Callable[[Linearization, Tensor, dict[str, Tensor]], Tensor]] = {
    "features": lambda seen, x, basis: seen.features(x, basis)[1],
    "gradients": lambda seen, x, _: torch.cat([flat(c) for c in seen.gradients(x, torch.zeros(60).long())], 1),
    "projections": lambda seen, x, basis: seen.projections(x, lambda f, _: f, basis)[1],
}


@pytest.mark.parametrize("engine", ["forward", "layerwise"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_fewer_samples_are_tried_where_so_many_do_not_fit(
    engine: str, product: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    torch.manual_seed(0)
    model, x = Greedy().double(), torch.randn(60, 3).double()
    seen = Linearization(model, engine=engine, memory_budget=10**9)
    basis = {name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in seen.parameters.items()}
    with as_function():
        expected = PRODUCTS[product](seen, x, basis)
        monkeypatch.setattr(Greedy, "most", 4)
        torch.testing.assert_close(PRODUCTS[product](seen, x, basis), expected)
        assert len(seen.layerwise.by_rule(x)) == 4  # none is taken for a missing rule
        assert [record.args[0] for record in caplog.records if "do not fit" in record.msg] == [60, 30, 15, 7]
        monkeypatch.setattr(Greedy, "most", 0)
        with pytest.raises(torch.OutOfMemoryError, match="80 GB") as caught:
            PRODUCTS[product](seen, x, basis)
        assert "one sample at a time" in caught.value.__notes__[0]


@pytest.mark.parametrize(("budget", "expected"), [(4 * 2 * 3000 - 4, 1), (4 * 2 * 3000, 2), (10**9, 2)])
def test_two_samples_are_taken_beyond_the_working_set_if_the_budget_allows(budget: int, expected: int):
    linearization = Linearization(make_case("mlp").model, memory_budget=budget)
    assert linearization._fitting(1000, 3000, least=2) == expected
    assert linearization._fitting(1000, 3000) == 1


def test_forward_mode_takes_two_samples_at_least():
    case = make_case("mlp")
    with as_function():
        linearization = Linearization(case.model, engine="forward", memory_budget=2**31)
        linearization.sizes(case.inputs)
        linearization._sizes = {False: Sizes(3, 10**8, 10**7, 2**26)}
        assert linearization._samples_for_features(case.inputs, ForwardMode(linearization.network, 1), {}) == 2
