"""A structural copy of what belongs to a network: modules, containers, functions and objects, each thing once."""

import copy
import functools
import itertools
import operator
import pickle
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from .state import ATOMS, CONTAINERS, FOREIGN, GENERATORS, content_of, packages_of, slots_of

Cast = Callable[[str, Tensor], Tensor]  # name of a parameter or buffer ("" for other tensors), and its value
Table = dict[str, Any]

WEAK = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)
STATES = (*CONTAINERS, *WEAK, *GENERATORS, np.ndarray, bytearray, itertools.count, functools._lru_cache_wrapper)
LARGE = 10**4  # entries of a container or array that is copied for good reason only, as objects are
UNSEEN = ("_backward_hooks", "_backward_pre_hooks")  # change no outputs, and might keep gradients for their owner
SILENT = ("log", "log_dict")  # a LightningModule may log in `forward`; what ELLA asks is nobody's metric


class _Eager(nn.Module):
    """A network that was compiled, as it was."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["_orig_mod"], name)


class Copier:
    """Copies what belongs to a network, each thing once."""

    def __init__(self, model: nn.Module, taken: Collection[str] | None, cast: Cast, changing: Collection[int] | None):
        self._taken, self._cast, self._changing = taken, cast, changing
        self.copies_objects = False  # which may have to be shared
        named = [*model.named_buffers(), *model.named_parameters()]
        self.originals: dict[int, tuple[str, Tensor]] = {id(value): (name, value) for name, value in named}
        self.aliases: list[Tensor] = []
        self.states: list[tuple[Any, Any]] = []  # what a forward pass may leave something in, and its copy
        self._modules = {id(module) for module in model.modules()}
        self._packages = packages_of(model.modules())
        self._made: dict[int, Any] = {}  # by the original's id
        self._known: dict[int, bool] = {}  # whether something reaches the network
        self._kept: list[Any] = []  # ids are not used again meanwhile

    def __call__(self, value: Any) -> Any:
        """The copy, or the value itself where it knows nothing of the network."""
        if type(value) in _PLAIN or isinstance(value, ATOMS):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, Tensor):
            return self._done(value, self._tensor(value))
        if isinstance(value, nn.Module):
            if type(value) in weakref.ProxyTypes:  # whose methods are those of what it stands for
                return self._done(value, weakref.proxy(self(value.parameters.__self__)))  # type: ignore[attr-defined]
            return self._module(value)
        if type(value) in CONTAINERS and len(value) <= LARGE:
            return self._container(value)
        if not self._reaches(value) and not self._keeps(value):
            return value
        return self._container(value) if type(value) in CONTAINERS else self._other(value)

    def following(self, function: Any) -> Any:
        """A copy of a function of the user's for ELLA if it knows something of the network; else it may do anything."""
        return self(function) if self._reaches(function) else function

    def shares(self, alias: Tensor) -> bool:
        """Whether a tensor of the view has the user's storage."""
        return storage_of(alias) in self.storages

    @functools.cached_property
    def storages(self) -> dict[int, str]:
        """The user's."""
        return {storage_of(value): name for name, value in self.originals.values()}

    def _done(self, value: Any, made: Any) -> Any:
        self._made[id(value)] = made
        self._kept.append(value)
        return made

    def _tensor(self, value: Tensor) -> Tensor:
        name = self.originals.get(id(value), ("", value))[0]
        with torch.inference_mode(False), torch.no_grad():
            alias = self._cast(name, value.clone() if value.is_inference() else value.detach())
        if isinstance(value, nn.Parameter):
            wanted = value.requires_grad if self._taken is None else name in self._taken
            alias = nn.Parameter(alias, wanted) if type(alias) is Tensor else alias.requires_grad_(wanted)
        for attribute, content in vars(value).items():
            vars(alias).setdefault(attribute, content)  # subclasses keep their values in attributes
        self.originals.setdefault(id(value), ("a tensor", value))
        self.aliases.append(alias)
        return alias

    def _module(self, module: nn.Module) -> Any:
        if getattr(module, "is_head_of_a_network", False):  # a predictor that was put on its own network
            return None
        if isinstance(module, torch.jit.ScriptModule):
            return self._scripted(module)
        made = self._done(module, _blank(_Eager if isinstance(module, OptimizedModule) else type(module)))
        attributes = vars(module) if not isinstance(made, _Eager) else vars(nn.Module()) | {"_modules": module._modules}
        found = {n: OrderedDict() if n in UNSEEN else self(value) for n, value in attributes.items()}
        found |= {"training": False, "_compiled_call_impl": None}
        heads = {name for name, child in module._modules.items() if child is not None and self(child) is None}
        found["_modules"] = {name: child for name, child in found["_modules"].items() if name not in heads}
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):  # how gradients come, not what is computed
            found |= {"sparse": False, "scale_grad_by_freq": False}
        found |= {name: _say_nothing for name in SILENT if hasattr(module, "_trainer") and hasattr(module, name)}
        vars(made).update(found)
        self._fill_slots(made, module)
        return made

    def _fill_slots(self, made: Any, value: Any) -> None:
        for slot, held in slots_of(value).items():
            with suppress(AttributeError):  # of a kind that is not written in Python
                object.__setattr__(made, slot, self(held))

    def _scripted(self, module: torch.jit.ScriptModule) -> Any:
        """A script cannot be taken apart: it is copied with its tensors."""
        made = self._done(module, copy.deepcopy(module).eval())
        for ours, theirs in (
            *zip(made.parameters(), module.parameters(), strict=True),
            *zip(made.buffers(), module.buffers(), strict=True),
        ):
            name = self.originals[id(theirs)][0]
            if isinstance(theirs, nn.Parameter):
                ours.requires_grad_(theirs.requires_grad if self._taken is None else name in self._taken)
            ours.data = self._cast(name, ours.data)
            self._done(theirs, ours)
        return made

    def _container(self, value: Any) -> Any:
        made = self._state(value, copy.copy(value))
        if isinstance(value, Mapping):
            made.clear()
            for key, item in value.items():
                made[self._key(key)] = self(item)
        elif isinstance(value, set):
            made.clear()
            made.update(self(item) for item in value)
        else:
            for place, item in enumerate(value):
                made[place] = self(item)
        return made

    def _key(self, key: Any) -> Any:
        return self(key) if isinstance(key, (nn.Module, Tensor)) else key

    def _state(self, value: Any, made: Any) -> Any:
        """A copy of what a forward pass may leave something in."""
        self.states.append((value, made))
        self.copies_objects |= isinstance(value, (*CONTAINERS, np.ndarray)) and len(value) > LARGE
        return self._done(value, made)

    def _other(self, value: Any) -> Any:
        """A copy of something that holds a module or tensor of the network, or a state of the user's, somewhere."""
        if isinstance(value, types.MethodType):
            return self._done(value, types.MethodType(self(value.__func__), self(value.__self__)))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, (staticmethod, classmethod)):
            return self._done(value, type(value)(self(value.__func__)))
        if isinstance(value, functools._lru_cache_wrapper):
            return self._done(value, functools.lru_cache(**value.cache_parameters())(self(value.__wrapped__)))
        if isinstance(value, weakref.ref):
            return self._done(value, weakref.ref(self(value())))
        if isinstance(value, WEAK):
            return self._done(value, type(value)({self._key(key): self(item) for key, item in value.items()}))
        if isinstance(value, types.MappingProxyType):
            return self._done(value, types.MappingProxyType(self(dict(value))))
        if isinstance(value, tuple):
            return self._tuple(value)
        if isinstance(value, frozenset):
            return self._done(value, frozenset(map(self, value)))
        if isinstance(value, functools.partial):
            made = type(value)(self(value.func), *self(value.args), **self(value.keywords))
            vars(made).update(self(vars(value)))
            return self._done(value, made)
        if isinstance(value, np.ndarray):
            return self._state(value, value.copy())
        if isinstance(value, GENERATORS):
            return self._state(value, self._copy(value))
        return self._object(value)

    def _tuple(self, value: tuple) -> tuple:
        items = [self(item) for item in value]
        try:
            made = tuple.__new__(type(value), items)  # which a class of the user's may make in another way
        except TypeError:  # of a kind that is not written in Python, as torch.return_types
            made = type(value)(items)
        if hasattr(made, "__dict__"):
            vars(made).update(self(vars(value)))
        return self._done(value, made)

    def _object(self, value: Any) -> Any:
        """A copy of an object, made from its attributes whatever it says of copies: a singleton would be shared."""
        try:
            made = _blank(type(value))
        except TypeError:  # of a kind that is not written in Python
            made = self._copy(value)
        self._done(value, made)
        if made is value:
            return made
        if isinstance(value, dict):
            for key, item in value.items():
                dict.__setitem__(made, key, self(item))
        elif isinstance(value, list):
            for place, item in enumerate(value):
                list.__setitem__(made, place, self(item))
        if hasattr(value, "__dict__"):
            vars(made).update({name: self(item) for name, item in vars(value).items()})
            self.states.append((value, made))
            self.copies_objects = True
        elif isinstance(value, bytearray):
            self.states.append((value, made))
        self._fill_slots(made, value)
        return made

    def _copy(self, value: Any) -> Any:
        try:
            made = copy.deepcopy(value) if isinstance(value, GENERATORS[1:]) else _copied(value)
            trouble = "its copy is itself"
        except Exception as error:
            made, trouble = value, str(error)
        if made is value and self._reaches(value):
            kind = type(value).__qualname__
            raise ValueError(
                f"the network holds modules or tensors in a {kind}, which cannot be copied ({trouble}), and ELLA works "
                "on a copy: keep them in attributes, lists or dicts of its modules."
            )
        return made

    def _function(self, function: types.FunctionType) -> Any:
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        named = {n: v for n in function.__code__.co_names if id(v := function.__globals__.get(n)) in self._modules}
        known = function.__globals__ | {name: self(module) for name, module in named.items()}
        made = types.FunctionType(
            function.__code__, known if named else function.__globals__, function.__name__, function.__defaults__, cells
        )
        self._done(function, made)
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            if (held := content_of(original)) is not cell:
                cell.cell_contents = self(held)
        made.__kwdefaults__ = self(function.__kwdefaults__)
        made.__defaults__ = self(function.__defaults__)
        vars(made).update(self(vars(function)))
        return made

    def _reaches(self, value: Any) -> bool:
        """Whether something holds a module or tensor of the network, at any depth that belongs to the user."""
        if id(value) not in self._known:
            self._survey(value)
        return self._known[id(value)]

    def _survey(self, value: Any) -> None:
        """Find out for something, and for all that it leads to, whether it reaches the network."""
        holders: dict[int, list[int]] = {id(value): []}
        reaching, stack = [], [value]
        while stack:
            item = stack.pop()
            self._kept.append(item)
            if self._known.setdefault(id(item), id(item) in self._modules or id(item) in self.originals):
                reaching.append(id(item))
            elif not isinstance(item, (nn.Module, Tensor)):
                for part in _parts(item):
                    if type(part) not in _PLAIN and not isinstance(part, ATOMS):
                        stack += [part] if id(part) not in holders and id(part) not in self._known else []
                        reaching += [id(part)] if self._known.get(id(part)) else []
                        holders.setdefault(id(part), []).append(id(item))
        while reaching:
            for holder in holders.get(reaching.pop(), ()):
                if not self._known[holder]:
                    self._known[holder] = True
                    reaching.append(holder)

    def _keeps(self, value: Any) -> bool:
        """Whether something of the user's holds what a forward pass changes, or might, where that is not known."""
        seen: set[int] = set()
        stack = [value]
        while stack:
            item = stack.pop()
            if id(item) in seen or isinstance(item, (*ATOMS, nn.Module, Tensor)):
                continue
            seen.add(id(item))
            shared = self._is_users(item) or (isinstance(item, (*CONTAINERS, np.ndarray)) and len(item) > LARGE)
            if (isinstance(item, STATES) or shared) and (not shared or self._changing is None):
                return True
            if self._changing and id(item) in self._changing:
                return True
            stack += self._parts_of_users(item, shared)
        return False

    def _parts_of_users(self, item: Any, shared: bool) -> list[Any]:
        """What an object, function, method or tuple holds that is not of a library."""
        if isinstance(item, types.FunctionType) and (item.__module__ or "").partition(".")[0] not in self._packages:
            return []
        looked_into = shared and bool(self._changing)
        known = isinstance(item, (types.FunctionType, types.MethodType, functools.partial, tuple))
        return _parts(item) if known or looked_into else []

    def _is_users(self, item: Any) -> bool:
        """Whether it is an object with attributes, of a class from where the network's modules are from."""
        kind = type(item)
        known = kind is types.SimpleNamespace or kind.__module__.partition(".")[0] in self._packages
        return known and bool(_attributes(item))


_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))


def _blank(kind: type) -> Any:
    """An object of a class without attributes; what the class does at the end of one is not done for a copy."""
    if callable(getattr(kind, "__del__", None)):
        names = {"__del__": lambda _: None, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        kind = type(kind)(kind.__name__, (kind,), names)
    return object.__new__(kind)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        made = torch.Generator(value.device)
        made.set_state(value.get_state())
        return made
    return copy.copy(value)


def _attributes(value: Any) -> Table:
    try:
        return dict(getattr(value, "__dict__", {})) | slots_of(value)
    except Exception:  # of whatever a property of the user's raises
        return {}


def _parts(item: Any) -> list[Any]:
    """What an object holds, as far as it is the user's own."""
    if isinstance(item, types.MethodType):
        return [item.__func__, item.__self__]
    if isinstance(item, types.FunctionType):
        named = [item.__globals__.get(name) for name in item.__code__.co_names]
        held = [content_of(cell) for cell in item.__closure__ or ()]
        modules = [value for value in named if isinstance(value, nn.Module)]
        defaults = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
        return [*held, *modules, *defaults, *vars(item).values()]
    if isinstance(item, (staticmethod, classmethod)):
        return [item.__func__]
    if isinstance(item, weakref.ref):
        return [item()]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values(), *vars(item).values()]
    if type(item) in (list, tuple, set, frozenset):
        return list(item)
    if isinstance(item, (dict, types.MappingProxyType, *WEAK)):  # others may compute or read what they give
        return [*item.values(), *item, *(_attributes(item).values() if type(item) is not dict else ())]
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        return [*item, *_attributes(item).values()]
    foreign = any(base.__module__.split(".")[0] in FOREIGN for base in type(item).__mro__)
    return [] if foreign else list(_attributes(item).values())


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def storage_of(tensor: Tensor) -> int:
    """Where its numbers are; 0 for tensors without."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or of a kind that hides it
        return 0


def contents_of(made: Any) -> Any:
    """What is in a container, an array, a random state or an object now."""
    if isinstance(made, GENERATORS):
        return pickle.dumps(made.get_state() if isinstance(made, torch.Generator) else made)
    if isinstance(made, (np.ndarray, bytearray, set)):
        return made.copy()
    return dict(_table(made)) if isinstance(_table(made), dict) else list(made)


def _table(made: Any) -> Any:
    """What holds the contents: of an object, its attributes."""
    return made if isinstance(made, CONTAINERS) else vars(made)


def differs(made: Any, contents: Any) -> bool:
    """Whether something else is in it than `contents_of` found."""
    if isinstance(made, GENERATORS):
        return contents_of(made) != contents
    if isinstance(made, np.ndarray):
        return made.tobytes() != contents.tobytes()
    if isinstance(made, bytearray):
        return made != contents
    table = _table(made)
    return len(table) != len(contents) or not all(map(operator.is_, *map(_values, (table, contents))))


def refill(made: Any, contents: Any) -> None:
    """Put back what was in it. A random state goes on: a network that draws must not seem to be one that does not."""
    if isinstance(made, GENERATORS) or not differs(made, contents):
        return
    if isinstance(made, np.ndarray):
        np.copyto(made, contents)
    elif isinstance(made, bytearray):
        made[:] = contents
    else:
        table = _table(made)
        table.clear()
        (table.update if isinstance(table, (dict, set)) else table.extend)(contents)


def _values(table: Any) -> Any:
    return table.values() if isinstance(table, dict) else table
