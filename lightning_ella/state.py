"""What a user's objects know (counts, buffers, orders, random states), remembered so that it can be put back."""

import io
import pickle
import random
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
CONTAINERS = (dict, list, set, deque)
ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.dtype, torch.device, Enum)
FOREIGN = {"lightning", "pytorch_lightning", "lightning_fabric"}  # trainers and loggers, which know the whole program
LIBRARIES = FOREIGN | {"torch", "numpy", "builtins"}
CHAIN = ("sampler", "batch_sampler", "_sampler", "loader", "dataset", "data_source", "datasets", "collate_fn")
DATA = ("dataset", "data_source", "datasets")
SEARCHED = 2000  # objects that are looked through
ENTRIES = 10**5  # of a container that are remembered
LOOKED_INTO = 1000  # entries of one that are looked through
BYTES = 2**26  # of arrays and tensors that are remembered, small enough each to be no data set
LARGEST = 2**24


class Part(NamedTuple):
    """Something that is reached from what is to be remembered."""

    thing: Any
    own: bool = False  # an object whose attributes are remembered, whatever its class
    loaded: bool = False  # a data set: what it has loaded meanwhile may stay


class State:
    """What can change in some objects and in what they hold, as it is now.

    Objects of the packages that the roots and their samplers and data sets are from are remembered by their attributes,
    all others looked through for random states alone. Closures, bound methods and the random states and containers
    among the globals of a function are followed, too; no module of torch, and no large array, is copied.

    Args:
        roots: the objects.
        packages: whose objects are to be remembered beside those of the roots'.
    """

    def __init__(self, *roots: Any, packages: Collection[str] = ()):
        self._packages = set(packages)
        self._memories: list[Callable[[], bool]] = []  # each puts something back, and says whether it had changed
        self._left = BYTES
        seen: dict[int, Any] = {}  # by id
        waiting = deque(Part(root, own=True) for root in roots)
        while waiting and len(seen) < SEARCHED:
            part = waiting.popleft()
            if id(part.thing) not in seen and not isinstance(part.thing, ATOMS):
                seen[id(part.thing)] = part.thing
                with suppress(Exception):  # of whatever kind it is: nothing of it is used
                    waiting.extend(self._look(part))
        self.found = list(seen.values())

    def put_back(self) -> bool:
        """Make everything what it was; return whether anything was not."""
        return sum(map(_quietly, self._memories)) > 0

    def _look(self, part: Part) -> Iterator[Part]:
        """Remember something, and give what it holds."""
        thing = part.thing
        if isinstance(thing, GENERATORS):
            self._memories.append(_random_state(thing))
        elif isinstance(thing, (np.ndarray, Tensor)):
            self._remember_numbers(thing)
        elif isinstance(thing, io.IOBase):
            self._memories += [_position(thing)] if not thing.closed and thing.seekable() else []
        elif isinstance(thing, CONTAINERS):
            if len(thing) <= ENTRIES:
                self._memories.append(_contents(thing))
            if len(thing) <= LOOKED_INTO:
                values = thing.values() if isinstance(thing, dict) else thing
                yield from (Part(value, part.own and isinstance(thing, list), part.loaded) for value in values)
        elif isinstance(thing, (tuple, frozenset)):
            yield from map(Part, thing if len(thing) <= LOOKED_INTO else ())
        elif isinstance(thing, types.MethodType):
            yield from (Part(thing.__self__, part.own), Part(thing.__func__))
        elif isinstance(thing, partial):
            yield from map(Part, (thing.func, *thing.args, *thing.keywords.values()))
        elif isinstance(thing, types.FunctionType):
            yield from self._look_at_function(thing)
        elif hasattr(thing, "__dict__"):
            yield from self._look_at_object(part)

    def _look_at_function(self, function: types.FunctionType) -> Iterator[Part]:
        for cell in function.__closure__ or ():
            if (held := _content(cell)) is not cell:
                self._memories.append(_held(cell, held))
                yield Part(held)
        known = (function.__globals__.get(name) for name in function.__code__.co_names)
        yield from (Part(value) for value in known if isinstance(value, (*GENERATORS, *CONTAINERS, np.ndarray)))

    def _look_at_object(self, part: Part) -> Iterator[Part]:
        thing, kind = part.thing, type(part.thing)
        package = kind.__module__.partition(".")[0]
        if part.own and package not in LIBRARIES:
            self._packages.add(package)
        if package in FOREIGN and not part.own:
            return
        if (part.own or package in self._packages or kind is types.SimpleNamespace) and not isinstance(
            thing, nn.Module
        ):
            self._memories.append(_attributes(thing, loaded=part.loaded))
            for base in kind.__mro__:
                if base.__module__.partition(".")[0] in self._packages:
                    yield from (Part(value) for value in vars(base).values() if isinstance(value, types.FunctionType))
        for name, value in list(vars(thing).items()):
            yield Part(value, name in CHAIN, part.loaded or name in DATA)

    def _remember_numbers(self, values: Any) -> None:
        fixed = isinstance(values, np.ndarray) and (values.dtype.hasobject or not values.flags.writeable)
        if not fixed and values.nbytes <= min(LARGEST, self._left):
            with suppress(RuntimeError):  # of a kind that has no plain numbers
                self._memories.append(_numbers(values))
                self._left -= values.nbytes


def _quietly(memory: Callable[[], bool]) -> bool:
    try:
        return memory()
    except Exception:  # it cannot be written to any more
        return True


def _attributes(thing: Any, *, loaded: bool) -> Callable[[], bool]:
    table, before = vars(thing), dict(vars(thing))

    def put_back() -> bool:
        wanted = before
        if loaded:  # what was not there, or None, has been loaded since
            wanted = table | {name: value for name, value in before.items() if value is not None}
        if _same(table, wanted):
            return False
        table.clear()
        table.update(wanted)
        return True

    return put_back


def _contents(container: Any) -> Callable[[], bool]:
    before = dict(container) if isinstance(container, dict) else list(container)

    def put_back() -> bool:
        if _same(container, before):
            return False
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(before)
        return True

    return put_back


def _same(some: Any, others: Any) -> bool:
    if len(some) != len(others):
        return False
    if isinstance(some, dict):
        return all(
            a is b for pair in zip(some.items(), others.items(), strict=True) for a, b in zip(*pair, strict=True)
        )
    return some == set(others) if isinstance(some, set) else all(a is b for a, b in zip(some, others, strict=True))


def _numbers(values: Any) -> Callable[[], bool]:
    is_array = isinstance(values, np.ndarray)
    now: Any = values if is_array else values.detach()
    before: Any = now.copy() if is_array else now.clone()
    as_bytes: Callable[[Any], bytes] = np.ndarray.tobytes if is_array else _bytes
    remembered = as_bytes(before)

    def put_back() -> bool:
        if as_bytes(now) == remembered:
            return False
        now[...] = before
        return True

    return put_back


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


def _held(cell: types.CellType, before: Any) -> Callable[[], bool]:
    def put_back() -> bool:
        changed = _content(cell) is not before
        cell.cell_contents = before
        return changed

    return put_back


def _content(cell: types.CellType) -> Any:
    """What a cell holds; the cell itself where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _position(file: Any) -> Callable[[], bool]:
    before = file.tell()

    def put_back() -> bool:
        if file.closed or file.tell() == before:
            return False
        file.seek(before)
        return True

    return put_back


def _random_state(generator: Any) -> Callable[[], bool]:
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    if isinstance(generator, np.random.Generator):
        read = lambda: generator.bit_generator.state  # noqa: E731
        write = lambda state: setattr(generator.bit_generator, "state", state)  # noqa: E731
    elif isinstance(generator, random.Random):
        read, write = generator.getstate, generator.setstate
    else:
        read, write = generator.get_state, generator.set_state
    before = read()

    def put_back() -> bool:
        changed = pickle.dumps(read()) != pickle.dumps(before)
        write(before)
        return changed

    return put_back
