"""What a user's objects know (counts, buffers, orders, random states), remembered so that it can be put back."""

import io
import pickle
import random
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)  # by exact type: of a kind that can be made again
ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.dtype, torch.device, Enum)
FOREIGN = {"lightning", "pytorch_lightning", "lightning_fabric"}  # trainers and loggers, which know the whole program
LIBRARIES = FOREIGN | {"torch", "numpy", "builtins"}
OWN = frozenset(vars(nn.Module()))  # tables of every module
CHAIN = ("sampler", "batch_sampler", "_sampler", "loader", "dataset", "data_source", "datasets", "collate_fn")
DATA = ("dataset", "data_source", "datasets")
SEARCHED = 2000  # objects that are looked through
ENTRIES = 10**5  # of a container that are remembered
LOOKED_INTO = 1000  # entries of one that are looked through
BYTES = 2**26  # of arrays and tensors that are remembered, small enough each to be no data set
LARGEST = 2**24


def packages_of(modules: Iterable[nn.Module]) -> set[str]:
    """The packages that modules are from, without those that everybody's are derived from."""
    return {type(module).__module__.partition(".")[0] for module in modules} - LIBRARIES


class Part(NamedTuple):
    """Something that is reached from what is to be remembered."""

    thing: Any
    own: bool = False  # an object whose attributes are remembered, whatever its class
    loaded: bool = False  # a data set: what it has loaded meanwhile may stay
    foreign: bool = False  # within an object of a library: only its random states are put back


class State:
    """What can change in some objects and in what they hold, as it is now.

    Objects of the packages that the roots and their samplers and data sets are from are remembered by their attributes,
    all others looked through for random states alone: a queue, a file that is written to or a connection is nobody's to
    put back. Closures, bound methods and the random states and containers among the globals of a function are followed,
    too; no module of torch, and no large array, is copied.

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
                    for held in self._look(part):  # own ones first: they may be found by other ways, too
                        (waiting.appendleft if held.own else waiting.append)(held)
        self.found = list(seen.values())

    def put_back(self) -> bool:
        """Make everything what it was; return whether anything was not."""
        return sum(map(_quietly, self._memories)) > 0

    def _look(self, part: Part) -> Iterator[Part]:
        """Remember something, and give what it holds."""
        thing = part.thing
        if isinstance(thing, GENERATORS):
            self._memories.append(_random_state(thing))
        elif isinstance(thing, CONTAINERS):
            if len(thing) <= ENTRIES and not part.foreign:
                self._memories.append(_contents(thing))
            if len(thing) <= LOOKED_INTO:
                values = thing.values() if isinstance(thing, dict) else thing
                yield from (part._replace(thing=value, own=part.own and isinstance(thing, list)) for value in values)
        elif isinstance(thing, (tuple, frozenset)):
            entries = thing if len(thing) <= LOOKED_INTO else ()
            yield from (part._replace(thing=entry, own=False) for entry in entries)
        elif isinstance(thing, types.MethodType):
            yield from (part._replace(thing=thing.__self__), part._replace(thing=thing.__func__, own=False))
        elif isinstance(thing, partial):
            parts = thing.func, *thing.args, *thing.keywords.values()
            yield from (part._replace(thing=each, own=False) for each in parts)
        elif isinstance(thing, (np.ndarray, Tensor)):
            self._remember_numbers(thing, part)
        elif isinstance(thing, io.IOBase):
            self._remember_position(thing, part)
        elif isinstance(thing, types.FunctionType):
            yield from self._look_at_function(thing, part)
        elif hasattr(thing, "__dict__") or hasattr(type(thing), "__slots__"):
            yield from self._look_at_object(part)

    def _look_at_function(self, function: types.FunctionType, part: Part) -> Iterator[Part]:
        for cell in function.__closure__ or ():
            if (held := content_of(cell)) is not cell:
                self._memories += [] if part.foreign else [_held(cell, held)]
                yield part._replace(thing=held, own=False)
        known = (function.__globals__.get(name) for name in function.__code__.co_names)
        wanted = GENERATORS if part.foreign else (*GENERATORS, *CONTAINERS, np.ndarray)
        yield from (part._replace(thing=value, own=False) for value in known if isinstance(value, wanted))

    def _look_at_object(self, part: Part) -> Iterator[Part]:
        thing, kind = part.thing, type(part.thing)
        package = kind.__module__.partition(".")[0]
        if part.own and package not in LIBRARIES:
            self._packages.add(package)
        if package in FOREIGN and not part.own:
            return
        known = package in self._packages or (kind is types.SimpleNamespace and not part.foreign)
        remembered = (part.own or known) and not isinstance(thing, nn.Module)
        if remembered:
            self._memories += _attributes(thing, loaded=part.loaded)
            for base in kind.__mro__:
                if base.__module__.partition(".")[0] in self._packages:
                    yield from self._look_at_class(base)
        for name, value in (getattr(thing, "__dict__", {}) | slots_of(thing)).items():
            yield Part(value, name in CHAIN and not part.foreign, part.loaded or name in DATA, not remembered)

    def _look_at_class(self, kind: type) -> Iterator[Part]:
        for name, value in list(vars(kind).items()):
            kept = isinstance(value, (*CONTAINERS, *GENERATORS)) and not name.startswith("__")
            if kept or isinstance(value, types.FunctionType):
                yield Part(value)
            elif type(value) in (int, float):  # a count of all objects
                self._memories.append(partial(_reset, kind, name, value))

    def _remember_numbers(self, values: Any, part: Part) -> None:
        is_array = isinstance(values, np.ndarray)
        plain = values.flags.writeable and not values.dtype.hasobject if is_array else _is_plain(values)
        if plain and not part.foreign and values.nbytes <= min(LARGEST, self._left):
            self._memories.append(_numbers(values))
            self._left -= values.nbytes

    def _remember_position(self, file: Any, part: Part) -> None:
        if not part.foreign and not file.closed and file.seekable() and not file.writable():
            with suppress(OSError):  # a text file that is iterated does not tell
                self._memories.append(_position(file))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an array of numbers with a place of its own for each."""
    kinds = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    odd = tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg() or tensor.is_inference()
    return kinds and not odd and not (0 in tensor.stride() and tensor.numel() > 1)


def _quietly(memory: Callable[[], bool]) -> bool:
    try:
        return memory()
    except Exception:  # it cannot be written to any more
        return True


def _attributes(thing: Any, *, loaded: bool) -> list[Callable[[], bool]]:
    slots = slots_of(thing)
    found = [partial(_reset, thing, name, value) for name, value in slots.items()]
    return [*found, _table(vars(thing), loaded=loaded)] if hasattr(thing, "__dict__") else found


def _reset(thing: Any, name: str, before: Any) -> bool:
    changed = getattr(thing, name, None) is not before
    if changed:
        (setattr if isinstance(thing, type) else object.__setattr__)(thing, name, before)
    return changed


def _table(table: dict[str, Any], *, loaded: bool) -> Callable[[], bool]:
    before = dict(table)

    def put_back() -> bool:
        wanted = before
        if loaded:  # what was not there, or None, has been loaded since, unless it was moved on
            new = {name: value for name, value in table.items() if before.get(name) is None and _stays(value)}
            wanted = before | new
        if _same(table, wanted):
            return False
        table.clear()
        table.update(wanted)
        return True

    return put_back


def _stays(value: Any) -> bool:
    return not isinstance(value, (*GENERATORS, Iterator, io.IOBase))


def slots_of(thing: Any) -> dict[str, Any]:
    """Attributes that are in slots, by name."""
    found = {}
    for base in type(thing).__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{base.__name__.lstrip('_')}{slot}" if private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(thing, name):
                found[name] = getattr(thing, name)
    return found


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
        changed = content_of(cell) is not before
        cell.cell_contents = before
        return changed

    return put_back


def content_of(cell: types.CellType) -> Any:
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
