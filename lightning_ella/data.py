"""A DataLoader as numbered points: any of them, in any order, each exactly once."""

import hashlib
import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from .batches import Batch, Inputs, Unpack, as_tree, describe, inputs_and_targets, plain

__all__ = ["Batch", "Inputs", "Points", "Unpack", "as_tree", "draw", "inputs_and_targets", "seeded"]


class Points:
    """The points that a DataLoader visits, addressed by number.

    The loader's own sampler decides which points there are; shuffling, `drop_last` and sampling weights
    are set aside. Its collate function, batch size and workers are kept.

    Raises:
        TypeError: for an `IterableDataset`, or for what is not a DataLoader.
        ValueError: for a DataLoader that does not batch (`batch_size=None`).
    """

    def __init__(self, loader: DataLoader, unpack: Unpack = inputs_and_targets):
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"ELLA needs one torch DataLoader, not {describe(loader)}: pass train_loader= or calibration_loader=."
            )
        if isinstance(loader.dataset, IterableDataset):
            raise TypeError(
                "ELLA visits points by number, which an IterableDataset does not allow: pass train_loader= or "
                "calibration_loader= a loader of a map-style dataset (a few thousand of the points are enough)."
            )
        if loader.batch_sampler is None:
            raise ValueError("ELLA needs a DataLoader that makes batches: pass one with batch_size=….")
        self.loader, self.unpack = loader, unpack
        self.indices = _visited(loader)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, numbers: Sequence[int], device: torch.device | str) -> Iterator[Batch]:
        """Yield inputs, targets and weights on `device` for the points `numbers`, in that order."""
        chosen = Subset(self.loader.dataset, [self.indices[i] for i in numbers])
        for batch in _like(self.loader, chosen):
            yield plain(Batch(*self.unpack(batch)), device)

    def labels(self, numbers: Sequence[int]) -> Tensor:
        """Targets of the points `numbers`, read from the dataset only where it has no `.targets`."""
        if self.targets is not None:
            return self.targets[torch.as_tensor(numbers)]
        return torch.cat([batch.targets for batch in self.batches(numbers, "cpu")])

    @cached_property
    def targets(self) -> Tensor | None:
        """The label of every point, where the dataset carries them as `.targets`."""
        known = _known_targets(self.loader.dataset)
        return None if known is None else known[torch.as_tensor(self.indices)]

    def digest(self) -> str:
        """SHA-256 of which points these are, and of their labels where the dataset carries them."""
        targets = [] if self.targets is None else self.targets.tolist()
        return hashlib.sha256(repr((list(self.indices), targets)).encode()).hexdigest()

    def is_repeatable(self, count: int = 4) -> bool:
        """Whether the first points look the same when they are asked for twice (no augmentation)."""
        first, second = (
            [leaf for batch in self.batches(range(min(count, len(self))), "cpu") for leaf in tree_leaves(batch)]
            for _ in range(2)
        )
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, Tensor)]
        return all(a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)  # NaN, too


def draw(count: int | None, total: int, generator: torch.Generator) -> list[int]:
    """Numbers of `count` of `total` points, drawn without replacement; all of them for None."""
    if count is None or count >= total:
        return list(range(total))
    return torch.randperm(total, generator=generator)[:count].tolist()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with the random number generators of torch, NumPy and Python at `seed`, and put them back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _visited(loader: DataLoader) -> Sequence[int]:
    """Indices into the dataset of the points that `loader` visits, each once."""
    size = len(cast(Sized, loader.dataset))
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler) and type(sampler) is not DistributedSampler:
        sampler = getattr(sampler.dataset, "_sampler", sampler)  # Lightning has wrapped the user's own
    whole = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)
    if isinstance(sampler, whole):
        return range(size)
    if isinstance(sampler, SubsetRandomSampler):
        return sorted(set(sampler.indices))  # what it leaves out stays held out
    generator = getattr(sampler, "generator", None)
    state = generator.get_state() if generator is not None else None
    with seeded(0):  # looking must not change what the user's sampler gives next
        indices = sampler if sampler is not None else (i for batch in cast(Any, loader.batch_sampler) for i in batch)
        visited = sorted(set(indices))
    if generator is not None:
        generator.set_state(state)
    return visited


def _like(loader: DataLoader, dataset: Subset) -> DataLoader:
    """Load `dataset` as `loader` does, in order and completely."""
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
    workers = {}
    if loader.num_workers > 0 and len(dataset) > batch_size:  # starting workers takes longer than one batch
        workers = {
            "num_workers": loader.num_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "worker_init_fn": loader.worker_init_fn,
        }
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        **workers,
    )


def _known_targets(dataset: Any) -> Tensor | None:
    """The labels that a torchvision-like dataset, or a Subset of one, carries as `.targets`."""
    if isinstance(dataset, Subset):
        inner = _known_targets(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices, dtype=torch.long)]
    targets = getattr(dataset, "targets", None)
    if isinstance(targets, (list, tuple, np.ndarray, Tensor)) and len(targets) == len(dataset):
        try:
            labels = torch.as_tensor(targets)
        except (TypeError, ValueError):  # names of classes
            return None
        return labels if labels.ndim == 1 else None
    return None
