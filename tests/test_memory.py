"""What is free, and whether pages are kept."""

import ctypes
import os
import platform
from contextlib import contextmanager, suppress

import pytest
import torch
from conftest import make_case

from lightning_ella.engine import Linearization, Sizes
from lightning_ella.forward_mode import ForwardMode
from lightning_ella.linearize import as_function
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


@pytest.mark.parametrize(("budget", "expected"), [(4 * 2 * 3000 - 4, 1), (4 * 2 * 3000, 2), (10**9, 2)])
def test_two_samples_are_taken_beyond_the_working_set_if_the_budget_allows(budget: int, expected: int):
    linearization = Linearization(make_case("mlp").model, memory_budget=budget)
    assert linearization._fitting({"cpu": 1000}, 3000, least=2) == expected
    assert linearization._fitting({"cpu": 1000}, 3000) == 1


def test_forward_mode_takes_two_samples_at_least():
    case = make_case("mlp")
    with as_function():
        linearization = Linearization(case.model, engine="forward", memory_budget=2**31)
        linearization.sizes(case.inputs)
        linearization._sizes = Sizes(3, 10**8, 2**26)
        assert linearization._samples_for_features(case.inputs, ForwardMode(linearization.network, 1)) == 2
