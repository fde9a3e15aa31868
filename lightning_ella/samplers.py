"""Which points of a dataset a DataLoader visits, without a change to what it gives next."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from .state import State

SLACK = 1000  # indices that a sampler of a tiny dataset may repeat before it counts as one without end
REPEATS = 100  # passes over the dataset that a sampler may announce by its length
LARGEST = 10**7  # points of a dataset that does not say how many it has
BLOCK = 256  # of what a sampler gives are taken at a time


class Visited(NamedTuple):
    """Keys of the points that a loader visits, each once."""

    keys: Sequence[Any]  # into the dataset
    bulk: bool  # whether the dataset is asked for a batch by a list of them


def visited(loader: DataLoader) -> Visited:
    """Keys of the points that `loader` visits: shuffling, `drop_last` and what is drawn by weight are set aside.

    Points whose sampling weight is zero are not visited.

    Raises:
        TypeError: if neither the dataset nor the sampler says how many points there are.
        ValueError: for a sampler without an end.
    """
    source: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    batched = loader.batch_sampler is not None
    if type(source).__iter__ is BatchSampler.__iter__:
        return Visited(_keys(source.sampler, loader.dataset, batched=False)[0], bulk=not batched)
    keys, lists = _keys(source, loader.dataset, batched=batched)
    return Visited(keys, bulk=lists and not batched)


@contextmanager
def undisturbed(loader: Any) -> Iterator[None]:
    """Put back what iterating changes in a loader, its samplers, its collate function and its dataset: see `State`.

    What the dataset has loaded meanwhile stays. Workers that persist, and may be in the middle of an epoch, are left
    alone.
    """
    state = State(loader)
    for found in state.found:
        if isinstance(found, DataLoader):
            vars(found).update(persistent_workers=False, _iterator=None)
    try:
        yield
    finally:
        state.put_back()


def _keys(sampler: Any, dataset: Any, *, batched: bool) -> tuple[Sequence[Any], bool]:
    """What a sampler gives, each once, and whether it gives lists."""
    if isinstance(sampler, DistributedSampler):  # the user's own may be inside, as Lightning and others wrap it
        sampler = getattr(sampler.dataset, "_sampler", getattr(sampler.dataset, "sampler", sampler))
    kind = getattr(type(sampler), "__iter__", None)
    if (weighted := _with_weight(sampler, len_of(dataset))) is not None:
        return weighted, False
    if kind is SubsetRandomSampler.__iter__:
        return sorted(set(sampler.indices)), False  # what it leaves out stays held out
    whole = sampler.dataset if isinstance(sampler, DistributedSampler) else getattr(sampler, "data_source", None)
    if isinstance(sampler, DistributedSampler) or kind in (SequentialSampler.__iter__, RandomSampler.__iter__):
        if len_of(whole) is None:
            raise TypeError(
                f"ELLA visits points by number, but a {type(dataset).__name__} has no length: give it a __len__, or "
                "the DataLoader a sampler over its indices."
            )
        return range(len(whole)), False  # type: ignore[arg-type] - it has a length
    return _given_by(sampler, len_of(dataset), batched=batched)


def _with_weight(sampler: Any, size: int | None) -> list[Any] | None:
    """The points whose weight is not zero, if the sampler has a weight for each."""
    weights = getattr(sampler, "weights", None)
    if not isinstance(weights, (Tensor, np.ndarray, list, tuple)):
        return None
    weights = torch.as_tensor(weights)
    indices = getattr(sampler, "indices", None)
    exact = type(sampler).__iter__ is WeightedRandomSampler.__iter__
    if not exact and len(weights) != (size if indices is None else len(indices)):
        return None  # they are of classes, say
    kept = weights.nonzero().flatten().tolist()
    return kept if indices is None or exact else sorted({int(indices[i]) for i in kept})


def _given_by(source: Iterable[Any], size: int | None, *, batched: bool) -> tuple[Sequence[Any], bool]:
    """What iterating gives, each once, in order, and whether it comes in lists."""
    found: set[Any] = set()
    announced = len_of(source) or 0
    announced = announced if announced <= REPEATS * (size or LARGEST) else 0
    count, stale, items, lists = 0, 0, iter(source), batched
    while block := list(islice(items, BLOCK)):
        lists = (
            lists or isinstance(block[0], list) or (isinstance(block[0], (Tensor, np.ndarray)) and block[0].ndim > 0)
        )
        keys = [key for item in block for key in item] if lists else block
        before = len(found)
        found.update(keys if set(map(type, keys)) <= {int, str} else map(_plain_key, keys))
        count, stale = count + len(block), 0 if len(found) > before else stale + max(len(block), len(keys))
        nothing_new = stale > 2 * max(size or 0, len(found)) + SLACK and count > announced
        if nothing_new or len(found) > 2 * (size or LARGEST) + SLACK:
            raise ValueError(
                f"the loader's {type(source).__name__} gives indices without an end, so ELLA cannot know the points: "
                "pass train_loader= or calibration_loader= a DataLoader of the same dataset without it."
            )
    try:
        return sorted(found), lists
    except TypeError:  # keys of several kinds
        return sorted(found, key=repr), lists


def _plain_key(key: Any) -> Any:
    return key.item() if isinstance(key, (Tensor, np.generic)) else key


def len_of(thing: Any) -> int | None:
    """Its length, or None if it has none."""
    try:
        return len(thing)
    except (TypeError, ValueError, NotImplementedError):
        return None
