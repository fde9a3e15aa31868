"""A safety net: whatever is done with a user's module, afterwards it is as it was found, and what differed is said."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .memory import free_memory
from .state import ATOMS, CONTAINERS, FOREIGN, LOOKED_INTO, OWN, State, packages_of

log = logging.getLogger(__name__)

PLAIN = (bool, int, float, complex, str, bytes, torch.device, torch.dtype, torch.Size)  # compared by value
AS_BEFORE = "is as it would be without ELLA"
REGISTERED = ("_parameters", "_buffers", "_modules")  # containers whose entries are attributes
NAMED = 5  # of the places that differ


class Remembered:
    """A module as it is now: every attribute of every submodule by identity, every tensor by its bytes.

    Args:
        module: what to remember.
        others: objects of the user's, by name, of which to remember what is in `State`: a datamodule.
        budget: bytes of copies that the tensors are put back from, the small ones first; None takes a quarter of the
            free memory. Of the others a digest is kept: a change is noticed, but cannot be mended.
    """

    def __init__(self, module: nn.Module, others: Mapping[str, Any] = MappingProxyType({}), budget: int | None = None):
        self.changed: list[str] = []  # what was put back
        self.lost: list[str] = []  # what could not be
        packages = packages_of(module.modules())
        self._places = [_Place(name, part, packages) for name, part in module.named_modules()]
        self._states = {name: State(other) for name, other in others.items()}
        left = free_memory(torch.device("cpu")) // 4 if budget is None else budget
        self._tensors = []
        for size, name, tensor in sorted(self._found(), key=lambda found: found[0]):
            left -= size
            self._tensors.append(_Content(name, tensor, copied=left >= 0))

    def put_back(self) -> None:
        """Make the module what it was; `changed` and `lost` then name what was not."""
        for part in (*self._places, *self._tensors):
            try:
                self.changed += part.put_back()
            except _LostError as error:
                self.lost.append(str(error))
        self.changed += [name for name, state in self._states.items() if state.put_back()]

    @property
    def verdict(self) -> str:
        """What to say of the module now."""
        if self.lost:
            return f"was written to, and {_some(self.lost)} could not be put back: load the checkpoint"
        return AS_BEFORE

    def _found(self) -> Iterator[tuple[int, str, Tensor]]:
        """Bytes and one name of each tensor of the module, gradients among them; each tensor once."""
        seen: set[int] = set()
        for place in self._places:
            for name, tensor in place.tensors():
                gradient = [(f"{name}.grad", tensor.grad)] if tensor.is_leaf and tensor.grad is not None else []
                for called, each in ((name, tensor), *gradient):
                    if id(each) not in seen:
                        seen.add(id(each))
                        yield each.numel() * each.element_size(), called, each


@contextmanager
def remembered(
    module: nn.Module, while_: str, others: Mapping[str, Any] = MappingProxyType({}), budget: int | None = None
) -> Iterator[Remembered]:
    """Leave `module` as it is found, after an error, too; say what was put back.

    Args:
        module: the user's.
        while_: what is being done, for the log: "the posterior was fitted".
        others: see `Remembered`.
        budget: see `Remembered`.
    """
    memory = Remembered(module, others, budget)
    try:
        yield memory
    finally:
        memory.put_back()
        if memory.changed or memory.lost:
            log.warning(
                "ELLA: while %s, something (forward=, unpack=, a hook, the network) wrote to the network's %s%s; "
                "the network %s.",
                *(while_, _some([*memory.changed, *memory.lost]), "" if memory.lost else ", which has been put back"),
                memory.verdict,
            )


class _LostError(Exception):
    """Something cannot be put back; the message is its name."""


class _Place:
    """The attributes of one submodule."""

    def __init__(self, name: str, module: nn.Module, packages: Collection[str]):
        self.name, self.module, self.kind = name, module, type(module)
        self.attributes = dict(vars(module))
        own = {key: value for key, value in self.attributes.items() if key not in OWN and not isinstance(value, Tensor)}
        self.states = {key: State(*_within(value), packages=packages) for key, value in own.items()}
        self.containers = {key: _entries(v) for key, v in self.attributes.items() if type(v) in CONTAINERS}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, buffers, and tensors kept as attributes or in containers that are."""
        entries = ((key or name, value) for name, found in self.containers.items() for key, value in found)
        parameters, buffers = self.module.named_parameters(recurse=False), self.module.named_buffers(recurse=False)
        for key, value in chain(parameters, buffers, self.attributes.items(), entries):
            if isinstance(value, Tensor) and not is_lazy(value):
                yield self._called(key), value

    def put_back(self) -> list[str]:
        """Restore identities; return the names of what differed."""
        changed = []
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
            changed.append("__class__")
        for name, before in self.containers.items():
            container = self.attributes[name]
            if not _agree(now := _entries(container), before):
                differing = _differing(now, before)
                changed += differing if name in REGISTERED else [name] * bool(differing)
                _refill(container, before)
        now, before = list(vars(self.module).items()), list(self.attributes.items())
        if not _agree(now, before):
            changed += _differing(now, before)
            vars(self.module).clear()
            vars(self.module).update(self.attributes)
        changed += [name for name, state in self.states.items() if state.put_back() and name not in changed]
        return [self._called(key) for key in changed]

    def _called(self, attribute: Any) -> str:
        return f"{self.name}.{attribute}" if self.name else str(attribute)


def _within(value: Any) -> list[Any]:
    """What is in a container that is compared entry by entry, or a value itself; no tensors, modules and trainers."""
    entries = [entry for _, entry in _entries(value)] if type(value) in CONTAINERS else [value]
    found = [entry for entry in entries if not isinstance(entry, (*ATOMS, Tensor, nn.Module))][:LOOKED_INTO]
    return [entry for entry in found if type(entry).__module__.partition(".")[0] not in FOREIGN]


class _Content:
    """The bytes of one tensor, whether it requires gradients, and the gradient that it has."""

    def __init__(self, name: str, tensor: Tensor, *, copied: bool):
        self.name, self.tensor = name, tensor
        self.alias = tensor.detach()  # has the same storage, whatever storage the tensor is given
        self.requires_grad = tensor.requires_grad
        self.gradient = tensor.grad if tensor.is_leaf else None
        self.bytes: Tensor | str | None = None
        if (found := _bytes_of(tensor)) is not None:
            self.bytes = found.clone() if copied else digest(tensor)

    def put_back(self) -> list[str]:
        changed = []
        if not self._is_as_before(self.tensor):
            changed.append(self.name)
        if changed or _place_in_memory(self.tensor) != _place_in_memory(self.alias):
            self._restore()
        if self.tensor.is_leaf and self.tensor.requires_grad is not self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
            changed.append(f"{self.name}.requires_grad")
        if self.tensor.is_leaf and self.tensor.grad is not self.gradient:
            self.tensor.grad = self.gradient
            changed.append(f"{self.name}.grad")
        return changed

    def _restore(self) -> None:
        with suppress(RuntimeError), torch.inference_mode(self.alias.is_inference()), torch.no_grad():
            self.tensor.data = self.alias  # a tensor that was moved and came back has another storage
            if isinstance(self.bytes, Tensor) and not self._is_as_before(self.alias):
                self.alias.copy_(self.bytes.view(self.alias.dtype).reshape(self.alias.shape))
        if not self._is_as_before(self.tensor):
            raise _LostError(self.name)

    def _is_as_before(self, tensor: Tensor) -> bool:
        if (tensor.shape, tensor.dtype, tensor.device) != (self.alias.shape, self.alias.dtype, self.alias.device):
            return False
        if isinstance(self.bytes, str):
            return digest(tensor) == self.bytes
        found = _bytes_of(tensor)  # None if it is of a kind that has no plain bytes: sparse, without data
        return found is None or self.bytes is None or torch.equal(found, self.bytes)


def _bytes_of(tensor: Tensor) -> Tensor | None:
    """The values as bytes on the CPU, perhaps the tensor's own; None where it has no plain bytes."""
    try:
        return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    except Exception:  # sparse, nested, without data, or a subclass with rules of its own
        return None


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values; empty where the tensor has no plain bytes."""
    found = _bytes_of(tensor)
    return "" if found is None else hashlib.sha256(found.numpy().data).hexdigest()


def _place_in_memory(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # it has no storage
        return 0


Entries = list[tuple[Any, Any]]


def _entries(container: Any) -> Entries:
    """What is in a container, with its keys; those of a list are None."""
    return list(container.items()) if isinstance(container, dict) else [(None, value) for value in container]


def _refill(container: Any, entries: Entries) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(entries)
    else:
        (container.update if isinstance(container, set) else container.extend)(value for _, value in entries)


def _agree(some: Entries, others: Entries) -> bool:
    """Whether entries are the same, in the same order."""
    return len(some) == len(others) and all(
        _same(key, other_key) and _same(value, other)
        for (key, value), (other_key, other) in zip(some, others, strict=True)
    )


def _differing(now: Entries, before: Entries) -> list[Any]:
    """Keys of entries that vanished, appeared, or have another value or order; an equal tensor is no other value."""
    if any(key is None for key, _ in [*now, *before]):
        return [None]
    old, new, absent = dict(before), dict(now), object()
    if old.keys() == new.keys() and list(old) != list(new):
        return list(old)
    pairs = {key: (old.get(key, absent), new.get(key, absent)) for key in old | new}
    return [key for key, (value, other) in pairs.items() if not _same(value, other) and not _equal(value, other)]


def _equal(value: Any, other: Any) -> bool:
    """Whether these are tensors with the same bytes, as after a move to another device and back."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return False
    alike = all(getattr(value, what) == getattr(other, what) for what in ("shape", "dtype", "device"))
    some, others = _bytes_of(value), _bytes_of(other)
    return alike and some is not None and others is not None and torch.equal(some, others)


def _same(value: Any, other: Any) -> bool:
    return value is other or (type(value) is type(other) and isinstance(value, PLAIN) and value == other)


def _some(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
