"""A loader as numbered points: any of them, in any order, each exactly once."""

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import IOBase
from itertools import accumulate, groupby, islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_structure
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from .batches import (
    Batch,
    Inputs,
    Picked,
    Unpack,
    as_tree,
    describe,
    has_rows,
    inputs_and_targets,
    is_rowwise,
    plain,
    rows,
    telling,
    tensors,
)
from .samplers import len_of, undisturbed, visited

__all__ = [
    "Batch",
    "Inputs",
    "Points",
    "Unpack",
    "as_tree",
    "beginning",
    "draw",
    "inputs_and_targets",
    "points_of",
    "seeded",
]

log = logging.getLogger(__name__)

KEEP = 5000  # points of a stream that are held in memory
LONGEST = 10  # times as many are read of one that does not end before
LOOKED_AT = (1, 2, 3)  # points that are collated together to see what their number changes


class Points:
    """The points that a loader visits, each with a number.

    `len` is N, how many there are. `numbers` are those that can be visited: all of them, or those that are held.
    """

    loader: Any
    unpack: Unpack
    shareable: bool  # whether several processes have the same points

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """`Points(loader, unpack)` are those of a map-style dataset."""
        return object.__new__(Indexed if cls is Points else cls)  # type: ignore[return-value]

    def __init__(self, loader: Any, unpack: Unpack = inputs_and_targets):
        self.loader, self.unpack = loader, unpack

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def opaque(self) -> bool:
        """Whether inputs are `Picked`, since samples are not their rows."""
        raise NotImplementedError

    @property
    def numbers(self) -> range:
        """What `batches` takes."""
        return range(len(self))

    @property
    def targets(self) -> Tensor | None:
        """The target of every point in `numbers`, where they are known without loading inputs."""
        raise NotImplementedError

    def batches(self, numbers: Sequence[int], device: torch.device | str) -> Iterator[Batch]:
        """Yield inputs, targets and weights on `device` for the points `numbers`, in that order."""
        raise NotImplementedError

    def arranged(self, numbers: Iterable[int]) -> list[int]:
        """The same numbers in the order in which they are visited at the least cost."""
        return list(numbers)

    def labels(self, numbers: Sequence[int]) -> Tensor:
        """Targets of the points `numbers`; inputs are loaded only where `targets` are not known."""
        if self.targets is not None:
            return self.targets[torch.as_tensor(numbers)]
        return torch.cat([batch.targets for batch in self.batches(numbers, "cpu")])

    def at_once(self, numbers: Sequence[int], device: torch.device | str) -> list[Batch]:
        """Points as one batch, whatever the loader's batch size; as several only where their shapes differ."""
        return merged(list(self.batches(numbers, device)))

    def digest(self) -> str:
        """SHA-256 of which points these are."""
        raise NotImplementedError

    def identity(self, count: int = 8) -> str:
        """SHA-256 of which points these are, and of what some of them hold."""
        found = hashlib.sha256(self.digest().encode())
        with seeded(0):
            for batch in self.batches(self.numbers[:: max(1, len(self.numbers) // count)], "cpu"):
                for leaf in tree_leaves(batch):
                    found.update(str(leaf.tolist() if isinstance(leaf, Tensor) else leaf).encode())
        return found.hexdigest()

    def is_repeatable(self, count: int = 4) -> bool:
        """Whether the first points look the same when they are asked for twice (no augmentation)."""
        return True


def points_of(loader: Any, unpack: Unpack = inputs_and_targets, keep: int = KEEP) -> Points:
    """Number the points of a loader, and say in the log what is taken for inputs and targets.

    Points of a map-style dataset are loaded when they are asked for, by the loader's own collate function, workers and
    batch size; its sampler decides which points there are. What can only be iterated (a DataLoader that makes its
    batches itself, an `IterableDataset`, a list of batches), or has several targets in each item of a dataset, is read
    once, and `keep` of its points, drawn at random, stay in memory; of what does not end before, `LONGEST * keep`
    points are read. The loader gives next what it would have given.

    Raises:
        TypeError: for what is no loader of batches, or a batch that `unpack` does not understand.
        ValueError: for an iterator, which would be used up, or a sampler without an end.
    """
    _check_loader(loader)
    with seeded(0):
        if _makes_own_batches(loader):
            return Held(loader, loader, unpack, keep)
        points = Indexed(loader, unpack)
        if points.one_target_each:
            return points
        return Held(loader, points.loaded(points.numbers), unpack, keep)


class Beginning:
    """The first batches of what can only be read from its beginning; for a look."""

    def __init__(self, loader: Any, count: int = 2):
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[Any]:
        with undisturbed(self.loader):
            yield from islice(self.loader, self.count)


def beginning(loader: Any) -> Any:
    """A loader itself where its points have numbers, else its first batches."""
    if loader is None or not _makes_own_batches(loader):
        return loader
    _check_loader(loader)
    return Beginning(loader)


class Indexed(Points):
    """Points of a map-style dataset.

    Raises:
        TypeError: for an `IterableDataset`, or for what is not a DataLoader.
        ValueError: for a sampler without an end.
    """

    shareable = True

    def __init__(self, loader: DataLoader, unpack: Unpack = inputs_and_targets):
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise TypeError(
                f"ELLA needs one DataLoader of a map-style dataset, not {describe(loader)}: pass train_loader= or "
                "calibration_loader=."
            )
        super().__init__(loader, unpack)
        with seeded(0), undisturbed(loader):
            self.keys, self._bulk = visited(loader)
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._batch_size = loader.batch_size or getattr(sampler, "batch_size", None) or (32 if self.is_batching else 1)

    @property
    def is_batching(self) -> bool:
        """Whether an item of the dataset is a point, not a batch of them."""
        return self.loader.batch_sampler is not None or self._bulk

    def __len__(self) -> int:
        return len(self.keys)

    def batches(self, numbers: Sequence[int], device: torch.device | str) -> Iterator[Batch]:
        """Yield inputs, targets and weights on `device` for the points `numbers`, in that order."""
        with undisturbed(self.loader):
            for raw in self.loaded(numbers):
                batch = unpacked(self.unpack, raw)
                by_rows = not self.opaque and has_rows(batch.inputs, len(batch.targets))
                yield plain(batch if by_rows else _with_picked(batch), device)

    def loaded(self, numbers: Sequence[int], batch_size: int | None = None) -> DataLoader:
        """Batches of the points `numbers` as the loader makes them, in order and completely."""
        keys, loader = [self.keys[i] for i in numbers], self.loader
        size = batch_size or self._batch_size
        workers = {}
        if loader.num_workers > 0 and len(keys) > size:  # starting workers takes longer than one batch
            workers = {
                "num_workers": loader.num_workers,
                "multiprocessing_context": loader.multiprocessing_context,
                "prefetch_factor": loader.prefetch_factor,
                "worker_init_fn": loader.worker_init_fn,
            }
        common = {"collate_fn": loader.collate_fn, "pin_memory": loader.pin_memory, **workers}
        if self._bulk:
            lists = [keys[start : start + size] for start in range(0, len(keys), size)]
            return DataLoader(loader.dataset, batch_size=None, sampler=lists, **common)
        return DataLoader(Subset(loader.dataset, keys), batch_size=size if self.is_batching else None, **common)

    @property
    def opaque(self) -> bool:
        """Whether samples cannot be told apart by rows of the inputs."""
        return self._look[0]

    @property
    def one_target_each(self) -> bool:
        """Whether an item of the dataset is a point."""
        return self._look[1]

    @cached_property
    def _look(self) -> tuple[bool, bool]:
        """Collate one, two and three points, from all over: do the rows of inputs and targets follow?"""
        seen: list[tuple[int, Batch]] = []
        spread = iter([i * (len(self) - 1) // (sum(LOOKED_AT) - 1) for i in range(sum(LOOKED_AT))])
        with seeded(0), undisturbed(self.loader):
            for count in LOOKED_AT[: min(len(self), self._batch_size)]:
                try:
                    collated = list(self.loaded(list(islice(spread, count)), count))
                except RuntimeError as error:  # a batch sampler may know which of them can be stacked
                    if count == 1 or self.loader.batch_size is not None:
                        raise
                    self._batch_size = 1
                    log.info(
                        "ELLA: these points do not go into one batch in any order (%s): one is loaded at a time.", error
                    )
                    break
                except Exception as error:
                    error.add_note(
                        f"ELLA asked the loader's dataset and collate function for {count} of its points: it needs "
                        "batches of any of them. Pass train_loader= or calibration_loader= a DataLoader of a Subset of "
                        "the points that can be loaded."
                    )
                    raise
                with telling(not seen):
                    seen += [(count, unpacked(self.unpack, raw)) for raw in collated]
        one_each = all(len(batch.targets) == count for count, batch in seen)
        structures = [tree_structure(as_tree(batch.inputs)) for _, batch in seen]
        by_rows = all(has_rows(batch.inputs, count) for count, batch in seen)
        return not (by_rows and all(one == structures[0] for one in structures)), one_each

    @property
    def targets(self) -> Tensor | None:
        """The label of every point, where the dataset carries them as `.targets`."""
        return self._targets

    @cached_property
    def _targets(self) -> Tensor | None:
        known = _known_targets(self.loader.dataset)
        return None if known is None else known[torch.as_tensor(self.keys)]

    def digest(self) -> str:
        """SHA-256 of which points these are, and of their labels where the dataset carries them."""
        targets = [] if self.targets is None else self.targets.tolist()
        return hashlib.sha256(repr((list(self.keys), targets)).encode()).hexdigest()

    def is_repeatable(self, count: int = 4) -> bool:
        """Whether the first points look the same when they are asked for twice (no augmentation)."""
        first = range(min(count, len(self)))
        with undisturbed(self.loader):
            looks = [[leaf for raw in self.loaded(first) for leaf in tensors(self.unpack(raw))] for _ in range(2)]
        return len(looks[0]) == len(looks[1]) and all(map(_same, *looks))


@dataclass
class Chunk:
    """Some of the points of a stream, and a random number for each: those with the smallest stay."""

    batch: Batch
    order: Tensor  # (n,) float64

    def __len__(self) -> int:
        return len(self.order)

    def take(self, which: Tensor) -> "Chunk":
        """Some of them."""
        return Chunk(_take(self.batch, which), self.order[which])


class Held(Points):
    """Points that can only be iterated: one pass, from which `keep` of them, drawn at random, are held on the CPU.

    Where samples are not rows of the inputs, batches are held whole, and drawn whole as far as that goes.

    Args:
        loader: what the points belong to.
        source: gives the batches.
        unpack: maps a batch to inputs, targets and perhaps weights; what has the weight zero is no point.
        keep: how many to hold.
    """

    shareable = False

    def __init__(self, loader: Any, source: Iterable[Any], unpack: Unpack, keep: int):
        super().__init__(loader, unpack)
        self._keep = keep
        self._generator = torch.Generator().manual_seed(0)
        self._waiting: list[tuple[Batch, bool]] = []  # batches, and whether samples may be their rows
        self._chunks: list[Chunk] = []
        self._opaque = False
        self._batch_size = 1
        with undisturbed(loader):
            self._count = self._read(source)
        self._chunks = self._chunks if self._opaque else _merged(self._chunks)
        self._starts = list(accumulate(map(len, self._chunks), initial=0))

    def __len__(self) -> int:
        return self._count

    @property
    def numbers(self) -> range:
        """Those that are held."""
        return range(self._starts[-1])

    def batches(self, numbers: Sequence[int], device: torch.device | str) -> Iterator[Batch]:
        """Yield inputs, targets and weights on `device` for the points `numbers`, in that order.

        Raises:
            ValueError: for a point that is not held.
        """
        if any(number not in self.numbers for number in numbers):
            raise ValueError(f"of {len(self)} points {len(self.numbers)} are held: take their numbers from `numbers`.")
        places = torch.searchsorted(torch.tensor(self._starts), torch.as_tensor(numbers, dtype=torch.long), right=True)
        for place, run in groupby(zip(places.sub(1).tolist(), numbers, strict=True), key=lambda pair: pair[0]):
            which = torch.tensor([number - self._starts[place] for _, number in run])
            # Each part of a whole batch takes a pass of the network over all of it.
            for part in which.split(len(which) if self._opaque else self._batch_size):
                yield plain(_take(self._chunks[place].batch, part), device)

    def arranged(self, numbers: Iterable[int]) -> list[int]:
        """By batch, so that the network sees each of them once."""
        return sorted(numbers)

    @property
    def opaque(self) -> bool:
        """Whether samples cannot be told apart by rows of the inputs."""
        return self._opaque

    @property
    def targets(self) -> Tensor | None:
        """The targets of the points that are held, unless their shapes differ."""
        return self._targets

    @cached_property
    def _targets(self) -> Tensor | None:
        found = [chunk.batch.targets for chunk in self._chunks]
        return torch.cat(found) if len({part.shape[1:] for part in found}) == 1 else None

    def digest(self) -> str:
        """SHA-256 of the points that are held."""
        found = hashlib.sha256(str(len(self)).encode())
        for leaf in tensors([chunk.batch for chunk in self._chunks]):
            found.update(str(tuple(leaf.shape)).encode())
            found.update(leaf.detach().to_dense().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _read(self, source: Iterable[Any]) -> int:
        """Make the pass, and return N."""
        most, points, batches = LONGEST * self._keep, 0, 0
        whole = True
        # As Lightning does: some loaders fail when they are asked for more batches than their length.
        for batches, raw in enumerate(islice(source, len_of(source)), 1):
            with telling(batches == 1):
                batch = plain(unpacked(self.unpack, raw), "cpu")
            points += self._add(batch)
            if points >= most or batches >= most:
                whole = False
                break
        self._prune()
        held, total = sum(map(len, self._chunks)), points
        name = type(self.loader.loader if isinstance(self.loader, Beginning) else self.loader).__name__
        if whole:
            log.info("ELLA: a %s has no numbered points, so it was read once: %d points, %d held.", name, points, held)
        else:
            total = max(points, round((len_of(self.loader) or 0) * points / batches))
            log.warning(
                "ELLA: a %s goes on after %d points, of which %d are held; it is taken to have %d. Pass train_loader= "
                "a DataLoader of a map-style dataset to draw from all of them.",
                *(name, points, held, total),
            )
        return total

    def _add(self, batch: Batch) -> int:
        """Take in the points of a batch that count, and return how many there are."""
        self._batch_size = max(self._batch_size, len(batch.targets))
        by_rows, whole = is_rowwise(batch.inputs, len(batch.targets)), _with_picked(batch)
        if (weights := batch.weights) is not None:
            counts = weights.flatten(1).any(1) if weights.ndim > 1 else weights
            whole = _take(whole, counts.nonzero().flatten())
        if count := len(whole.targets):
            self._waiting.append((whole, by_rows))
        if sum(map(len, self._chunks)) + sum(len(batch.targets) for batch, _ in self._waiting) > 2 * self._keep:
            self._prune()
        return count

    def _prune(self) -> None:
        """Keep the points with the smallest numbers, so that each of those seen has had the same chance."""
        # One batch may have as many rows as targets by chance: all that are there are looked at.
        self._opaque = self._opaque or not all(by_rows for _, by_rows in self._waiting)
        self._chunks += [self._chunk(batch) for batch, _ in self._waiting]
        self._waiting = []
        if sum(map(len, self._chunks)) <= self._keep:
            return
        last = torch.cat([chunk.order for chunk in self._chunks]).kthvalue(self._keep).values
        taken = (chunk.take((chunk.order <= last).nonzero().flatten()) for chunk in self._chunks)
        self._chunks = [chunk for chunk in taken if len(chunk)]

    def _chunk(self, batch: Batch) -> Chunk:
        """A batch with random numbers, which are close to each other for one that stays whole."""
        each = torch.rand(len(batch.targets), generator=self._generator, dtype=torch.float64)
        if self._opaque:
            return Chunk(batch, torch.rand(1, generator=self._generator, dtype=torch.float64) + 1e-9 * each)
        return Chunk(batch._replace(inputs=rows(batch.inputs.whole, batch.inputs.rows)), each)


def unpacked(unpack: Unpack, raw: Any) -> Batch:
    """Inputs, targets and weights of a batch.

    Raises:
        TypeError: if `unpack` gives something else.
    """
    found: Any = unpack(raw)
    pair = isinstance(found, (tuple, list)) and len(found) in (2, 3)
    if not pair or not isinstance(found[1], Tensor) or not isinstance(found[-1], Tensor | None):
        raise TypeError(
            "unpack= must return (inputs, targets) or (inputs, targets, weights), the last two as tensors, not "
            f"{describe(found)}."
        )
    inputs, targets, weights = found if len(found) == 3 else (*found, None)
    targets = targets.reshape(1) if targets.ndim == 0 else targets  # squeezed, of one point
    weights = weights.float() if weights is not None and weights.dtype == torch.bool else weights
    return Batch(inputs, targets, weights)


def draw(count: int | None, among: int | Sequence[int], generator: torch.Generator) -> list[int]:
    """`count` numbers below a total, or of those given, drawn without replacement; all of them for None."""
    numbers = range(among) if isinstance(among, int) else among
    if count is None or count >= len(numbers):
        return list(numbers)
    return [numbers[i] for i in torch.randperm(len(numbers), generator=generator)[:count].tolist()]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with the random number generators of torch, NumPy and Python at `seed`, and put them back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        # Where CUDA has not begun, it must not begin here, nor get a seed for when it does.
        (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _check_loader(loader: Any) -> None:
    """Raise an error that names the fix for what is no loader, or would be used up by being looked at."""
    fix = "pass train_loader= or calibration_loader="
    several = isinstance(loader, (list, tuple)) and any(isinstance(one, DataLoader) for one in loader)
    if several or isinstance(loader, Mapping):
        raise TypeError(f"ELLA needs one DataLoader, not {describe(loader)}: {fix} with one of them.")
    if isinstance(loader, Dataset):
        raise TypeError(f"ELLA needs a DataLoader, not the dataset itself: {fix} DataLoader(dataset, batch_size=…).")
    if isinstance(loader, (str, bytes, Tensor)) or not isinstance(loader, Iterable):
        raise TypeError(f"ELLA needs a DataLoader, or another iterable of batches, not {describe(loader)}: {fix}.")
    streams: list[Any] = [loader]
    if isinstance(loader, DataLoader):
        streams = [loader] if _makes_own_batches(loader) else []
        if isinstance(loader.dataset, IterableDataset) and loader.num_workers == 0:  # else each worker has a copy
            streams.append(loader.dataset)
    for stream in streams:
        if _goes_on(stream):
            raise ValueError(
                f"a {type(stream).__name__} is an iterator or keeps one, which a look at its points would move on: "
                f"{fix} what starts anew each time, such as a DataLoader or a list of batches."
            )


def _goes_on(stream: Any) -> bool:
    """Whether iterating `stream` goes on where it stopped, instead of starting anew."""
    kept = [part for name, part in getattr(stream, "__dict__", {}).items() if name != "_iterator"]  # torch resets it
    if isinstance(stream, Iterator) or any(
        isinstance(part, Iterator) and not isinstance(part, IOBase) for part in kept
    ):
        return True
    with seeded(0), undisturbed(stream):
        return not isinstance(stream, DataLoader) and iter(stream) is iter(stream)


def _makes_own_batches(loader: Any) -> bool:
    """Whether batches are not simply those of the dataset and the collate function."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return True
    return any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in ("__iter__", "_get_iterator"))


def _with_picked(batch: Batch) -> Batch:
    """A batch whose samples are the rows of the network's outputs, one for each target."""
    return batch._replace(inputs=Picked(batch.inputs, torch.arange(len(batch.targets))))


def _take(batch: Batch, which: Tensor) -> Batch:
    return Batch(
        rows(batch.inputs, which),
        batch.targets[which],
        None if batch.weights is None else batch.weights[which],
    )


def _merged(chunks: list[Chunk]) -> list[Chunk]:
    return [Chunk(batch, torch.zeros(len(batch.targets))) for batch in merged([chunk.batch for chunk in chunks])]


def merged(batches: Iterable[Batch]) -> list[Batch]:
    """Put together the points whose tensors have the same shapes, and whose constants are the same."""
    alike: dict[Any, list[Batch]] = {}
    for batch in batches:
        leaves, structure = tree_flatten(as_tree(batch))
        kinds = [
            (leaf.dtype, leaf.shape[1:]) if isinstance(leaf, Tensor) and leaf.ndim else str(leaf) for leaf in leaves
        ]
        alike.setdefault((str(structure), *kinds), []).append(batch)
    return [tree_map(_concatenated, *some) for some in alike.values()]


def _concatenated(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) and leaves[0].ndim else leaves[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # NaN, too


def _known_targets(dataset: Any) -> Tensor | None:
    """The labels that a torchvision-like dataset, or a Subset of one, carries as `.targets`."""
    if isinstance(dataset, Subset):
        inner = _known_targets(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices, dtype=torch.long)]
    targets = getattr(dataset, "targets", None)
    if isinstance(targets, (list, tuple, np.ndarray, Tensor)) and len(targets) == len_of(dataset):
        try:
            labels = torch.as_tensor(targets).cpu()
        except (TypeError, ValueError):  # names of classes
            return None
        return labels if labels.ndim == 1 else None
    return None
