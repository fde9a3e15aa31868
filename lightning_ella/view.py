"""The network as a value: modules of our own that share the user's storage.

Whatever a derivative needs for a moment (other weights, hooks, folded layers, eval mode) happens to the view. The
user's module is only read, so that other threads may call it, move it and train it meanwhile.
"""

import operator
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .copies import Cast, Copier, Table, contents_of, differs, refill, storage_of
from .state import OWN

FRAMES = 20  # of a module within another
ROUNDS = 10  # of looking for what a forward pass writes to: one write may lead to another


class View:
    """A structural copy of a network: its own modules, in eval mode, over tensors that share the user's storage.

    It is made by place: a module or tensor that is found under two names is one in the copy, too. Modules in plain
    lists, closures, partials, bound methods, hooks and objects of the user's are followed.

    Args:
        model: the network.
        taken: names of the parameters that require gradients in the view; None for those that do in the network.
        cast: what becomes of each tensor, such as a move to another device.
        changing: ids of what a forward pass changes, as `changed_by` finds them; objects of the user's that neither
            change nor hold a part of the network are shared, since code may compare them by identity. None copies all.
    """

    def __init__(
        self,
        model: nn.Module,
        taken: Collection[str] | None = None,
        cast: Cast = lambda _, value: value,
        changing: Collection[int] | None = None,
    ):
        self.copied = Copier(model, taken, cast, changing)
        with _deep_recursion(model):
            self.root: nn.Module = self.copied(model)
        modules = list(self.root.modules())
        named = [*self.root.named_buffers(), *self.root.named_parameters()]
        names = {id(value): name for name, value in named}
        # What each table of a module should hold: its attributes, parameters and buffers.
        self._tables = [(vars(module), dict(vars(module))) for module in modules]
        self._attributes = {module: held for module, (_, held) in zip(modules, self._tables, strict=True)}
        self._places: dict[str, list[tuple[Table, str, Table]]] = {}
        for module in modules:
            for table in (module._parameters, module._buffers):
                held = dict(table)
                if not isinstance(module, torch.jit.ScriptModule):
                    self._tables.append((table, held))
                for attribute, value in held.items():
                    if value is not None:
                        self._places.setdefault(names[id(value)], []).append((table, attribute, held))
        self.written: frozenset[str] = frozenset()  # names of what a forward pass writes to
        self.counted: frozenset[str] = frozenset()  # and of what it changes: no weights
        self._counters: list[tuple[Tensor, Tensor]] = []
        own = {id(held[name]) for held in self._attributes.values() for name in OWN & held.keys()}
        states = [(value, made) for value, made in self.copied.states if id(made) not in own]
        self._states = [(value, made, contents_of(made)) for value, made in states]
        self._tables += [(made, held) for _, made, held in self._states if type(made) is dict]
        self._others = [(made, held) for _, made, held in self._states if type(made) is not dict]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, by name."""
        return {name: places[0][2][places[0][1]] for name, places in self._places.items()}

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let other tensors stand in for parameters and buffers, by name."""
        places = [(*place, value) for name, value in values.items() for place in self._places[name]]
        originals = [held[attribute] for _, attribute, held, _ in places]
        try:
            for table, attribute, held, value in places:
                table[attribute] = held[attribute] = value
            yield
        finally:
            for (table, attribute, held, _), original in zip(places, originals, strict=True):
                table[attribute] = held[attribute] = original

    @contextmanager
    def patched(self, module: nn.Module, **attributes: Any) -> Iterator[None]:
        """Give a module of the view other attributes."""
        table, held = vars(module), self._attributes[module]
        originals = {name: table[name] for name in attributes if name in table}
        table.update(attributes)
        held.update(attributes)
        try:
            yield
        finally:
            for name in attributes:
                table.pop(name, None)
                held.pop(name)
            table.update(originals)
            held.update(originals)

    def restore(self) -> None:
        """Forget what a forward pass left on the modules: caches, states, counts, values of a transformation."""
        for table, held in self._tables:
            if len(table) != len(held) or (held and not all(map(operator.is_, table.values(), held.values()))):
                table.clear()
                table.update(held)
        for made, contents in self._others:
            refill(made, contents)
        for value, before in self._counters:
            value.data.copy_(before)

    def changed_by(self, evaluate: Callable[[], Any]) -> set[int]:
        """Ids of the user's objects, containers, arrays and random states that a forward pass changes."""
        with _Watch(self.copied), suppress(Exception):  # which may miss the identity of what is copied here
            evaluate()
        return {id(value) for value, made, contents in self._states if differs(made, contents)}

    def settle(self, evaluate: Callable[[], Any]) -> None:
        """Find out, by forward passes that are thrown away, what they write to, and give the view copies of its own.

        Raises:
            ValueError: if the network reaches tensors of its own in a way that the view does not follow.
        """
        for _ in range(ROUNDS):
            with _Watch(self.copied) as watch:
                evaluate()
            self.restore()
            if watch.leaked:
                raise ValueError(
                    f"the network reaches its {watch.leaked} in a way that ELLA cannot follow (a global variable?): "
                    "let forward= use the module that it is given, and make the modules that it needs attributes of it."
                )
            if not watch.written:
                return
            self.written |= {name for name, value in self.tensors.items() if storage_of(value) in watch.written}
            for alias in self.copied.aliases:
                if storage_of(alias) in watch.written:
                    alias.data = alias.data.clone()
            self._count(evaluate)

    def _count(self, evaluate: Callable[[], Any]) -> None:
        """Find the parameters and buffers whose values a forward pass changes, and put them back."""
        before = {name: value.detach().clone() for name, value in self.tensors.items() if not self.copied.shares(value)}
        with _Watch(self.copied):
            evaluate()
        changed = {name for name, value in before.items() if not torch.equal(self.tensors[name], value)}
        self.counted |= changed
        for name in changed:
            self.tensors[name].data.copy_(before[name])
        self._counters = [
            (value, before[name])
            for name, value in self.tensors.items()
            if name in changed and not isinstance(value, nn.Parameter)
        ]
        self.restore()


@contextmanager
def _deep_recursion(model: nn.Module) -> Iterator[None]:
    """Let a network be copied that is nested as deeply as it has modules."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + FRAMES * sum(1 for _ in model.modules()))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


class _Watch(TorchDispatchMode):
    """Sees, in forward passes whose outputs nobody needs, which of the user's storage would be written to.

    The write goes to a copy. What reaches a tensor of the user's own, instead of the view's, is `leaked`.
    """

    supports_higher_order_operators = True

    def __init__(self, copied: Copier):
        super().__init__()
        self._copied, self._leaks = copied, _Leaks(copied)
        self.written: set[int] = set()

    def __enter__(self) -> "_Watch":
        super().__enter__()
        self._leaks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._leaks.__exit__(*error)
        super().__exit__(*error)

    @property
    def leaked(self) -> str:
        """Its name."""
        return self._leaks.found

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `function` with copies of what it would write to."""
        schema = getattr(function, "_schema", None)  # an operator of higher order has none
        values: dict[Any, Any] = dict(enumerate(args)) | (kwargs or {})
        for place, argument in enumerate(schema.arguments if schema else ()):
            key = place if place < len(args) else argument.name
            if key in values and _writes(argument, args):
                values[key] = tree_map(self._own, values[key])
        positional = [values.pop(place) for place in range(len(args))]
        return function(*positional, **values)

    def _own(self, value: Any) -> Any:
        if isinstance(value, Tensor) and (place := storage_of(value)) in self._copied.storages and place:
            self.written.add(place)
            return value.clone()
        return value


def _writes(argument: Any, args: tuple) -> bool:
    """Whether an operation writes to an argument; a BatchNorm that trains does not say so."""
    statistics = argument.name in ("running_mean", "running_var") and len(args) > 5 and args[5] is True
    return statistics or (argument.alias_info is not None and argument.alias_info.is_write)


class _Leaks(TorchFunctionMode):
    """Sees which of the user's own tensors are used."""

    def __init__(self, copied: Copier):
        super().__init__()
        self._copied, self.found = copied, ""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `function`."""
        for leaf in tree_leaves((args, kwargs)):
            name, original = self._copied.originals.get(id(leaf), ("", None))
            if original is leaf and isinstance(leaf, Tensor) and name and name != "a tensor":
                self.found = name
        return function(*args, **(kwargs or {}))


class NoShortcuts(TorchFunctionMode):
    """While a mode is active, `nn.TransformerEncoder` computes what it did in training, for this thread alone."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `function`."""
        return function(*args, **(kwargs or {}))
