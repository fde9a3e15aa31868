"""What is free, and what the C library does with memory that is no longer used."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
TUNED = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
UNKNOWN = (OSError, TypeError, AttributeError)  # another system, another C library


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`, what torch keeps there for later included. Untested on GPUs."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def give_back() -> None:
    """Return freed memory to the system between the steps of a fit; else heap and cache keep what each step needed."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(*UNKNOWN):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def keeping_pages(device: torch.device) -> Iterator[None]:
    """Let glibc use freed memory again, however large the piece, instead of asking the system for fresh pages.

    Fresh pages for every large activation may take a quarter of the time of features (ResNet-18, 224 x 224). In threads
    other than the main one, pieces beyond 64 MB still get them. What was kept is used again by later calls, or
    returned by `give_back`; from then on the process maps and trims as after it has freed a piece of 32 MB, which is as
    far as glibc's own rule goes. On GPUs, and where the environment sets these options, nothing is done.
    """
    tuned = TUNED & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if device.type != "cpu" or tuned:
        yield
        return
    try:
        _set({MMAP_MAX: 0, TRIM_THRESHOLD: -1})
        yield
    finally:
        _set({MMAP_MAX: 2**16, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26})


def _set(options: dict[int, int]) -> None:
    with suppress(*UNKNOWN):
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)
