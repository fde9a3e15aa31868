"""What is free, and whether pages are kept."""

import platform
import resource
from contextlib import suppress

import pytest
import torch

from lightning_ella.memory import TUNED, free_memory, give_back, keeping_pages

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep pages")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch):
    for name in TUNED:
        monkeypatch.delenv(name, raising=False)


def kept(size: int) -> bool:
    """Whether most of a block stays in memory when it is freed."""
    give_back()
    before = resident()
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return resident() - before > size / 2


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_some_memory_is_free():
    assert 2**20 < free_memory(CPU) < 2**50


@glibc
def test_large_blocks_are_kept_inside_and_freed_outside():
    with keeping_pages(CPU):
        assert kept(2**28)
    before = resident()
    give_back()
    assert before - resident() > 2**27
    assert not kept(2**29)  # more than the heap has a place for


@glibc
def test_they_are_no_longer_kept_after_an_error():
    with suppress(ZeroDivisionError), keeping_pages(CPU):
        raise ZeroDivisionError
    assert not kept(2**29)


@glibc
@pytest.mark.parametrize("name", sorted(TUNED))
def test_who_has_tuned_the_allocator_keeps_that(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "1")
    with keeping_pages(CPU):
        assert not kept(2**29)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # a C library without mallopt
    with keeping_pages(CPU):
        give_back()
