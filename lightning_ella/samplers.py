"""Which points of a dataset a DataLoader visits, without a change to what it gives next."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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

SLACK = 1000  # indices that a sampler of a tiny dataset may repeat before it counts as one without end
REPEATS = 100  # passes over the dataset that a sampler may announce by its length
LARGEST = 10**7  # points of a dataset that does not say how many it has
BLOCK = 256  # of what a sampler gives are taken at a time
SEARCHED = 2000  # objects that are looked through for generators


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
    """Put back what iterating changes in a loader, its samplers and its dataset.

    These are the states of random number generators, and in loaders and samplers all attributes and what is in their
    lists and arrays; in a dataset numbers such as that of the epoch, but nothing that it may have loaded.
    """
    saved = [_state_of(generator) for generator in _generators(loader)]
    for thing, is_data in _parts(loader):
        saved += [_numbers_of(thing)] if is_data else [_attributes_of(thing), *_contents_of(thing)]
    try:
        yield
    finally:
        for put_back in saved:
            put_back()


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


def _parts(loader: Any) -> Iterator[tuple[Any, bool]]:
    """The loader, samplers and datasets in it, and whether each is a dataset."""
    seen: set[int] = set()
    waiting = [(loader, False)]
    while waiting:
        thing, is_data = waiting.pop()
        if id(thing) in seen or not hasattr(thing, "__dict__"):
            continue
        seen.add(id(thing))
        yield thing, is_data
        for name, part in vars(thing).items():
            if name in ("sampler", "batch_sampler", "_sampler", "loader"):
                waiting.append((part, is_data))
            elif name in ("dataset", "data_source"):
                waiting.append((part, True))


PutBack = Callable[[], Any]


def _attributes_of(thing: Any) -> PutBack:
    before = dict(vars(thing))

    def put_back() -> None:
        vars(thing).clear()
        vars(thing).update(before)

    return put_back


def _numbers_of(thing: Any) -> PutBack:
    before = {name: value for name, value in vars(thing).items() if type(value) in (int, float, str)}

    def put_back() -> None:
        now = vars(thing)
        now.update({name: value for name, value in before.items() if type(now.get(name)) is type(value)})

    return put_back


def _contents_of(thing: Any) -> Iterator[PutBack]:
    for name, value in vars(thing).items():
        if name in ("dataset", "data_source"):
            continue
        if isinstance(value, (list, deque)):
            yield _refilled(value, list(value), value.extend)
        elif isinstance(value, (dict, set)):
            yield _refilled(value, value.copy(), value.update)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "iu":  # an order, not the data themselves
            yield partial(np.copyto, value, value.copy())
        elif isinstance(value, Tensor) and not value.is_floating_point():
            yield partial(value.copy_, value.clone())


def _refilled(container: Any, before: Any, fill: Callable[[Any], None]) -> PutBack:
    def put_back() -> None:
        container.clear()
        fill(before)

    return put_back


def _state_of(generator: Any) -> PutBack:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        numbers = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", numbers)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    own = generator.getstate()
    return lambda: generator.setstate(own)


def _generators(thing: Any) -> Iterator[Any]:
    """The random number generators in an object, at any depth: those of samplers, of datasets and their transforms."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    seen: set[int] = set()
    waiting = deque([thing])
    while waiting and len(seen) < SEARCHED:
        part = waiting.popleft()
        if id(part) in seen or isinstance(part, (Tensor, np.ndarray, str, bytes, type)):
            continue
        seen.add(id(part))
        if isinstance(part, kinds):
            yield part
        elif isinstance(part, dict):
            waiting.extend(part.values() if len(part) <= SLACK else ())
        elif isinstance(part, (list, tuple)):
            waiting.extend(part if len(part) <= SLACK else ())
        else:
            waiting.extend(getattr(part, "__dict__", {}).values())
