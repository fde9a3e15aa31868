"""What a batch is: inputs and targets, and the samples in them."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from math import ceil
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import (
    SUPPORTED_NODES,
    GetAttrKey,
    MappingKey,
    register_pytree_node,
    tree_leaves,
    tree_map,
)

log = logging.getLogger(__name__)

Inputs = Any
# A batch to (inputs, targets), or (inputs, targets, weights): a weight for each sample, or each position of it.
Unpack = Callable[[Any], tuple[Inputs, Tensor] | tuple[Inputs, Tensor, Tensor]]

# Names of the parts of a batch, in upper or lower case.
TARGETS = ("label", "labels", "target", "targets", "mask", "y")
INPUTS = ("image", "images", "img", "imgs", "input", "inputs", "x")
# How the names of parts end that a network takes beside its first input: with one of them a batch stays together.
COMPANIONS = ("_mask", "_ids", "length", "lengths", "edge_index", "edge_attr", "adj", "pos", "batch", "ptr")
SPLITS = ("train_mask", "val_mask", "test_mask")  # of one graph: which nodes are whose
WHOLE = ("batch", "data")  # an argument of this name, if it is the only one, is for all of a batch
SHOWN = 6  # parts of a batch that a message names


class Batch(NamedTuple):
    """What the package takes from one batch of a loader."""

    inputs: Inputs
    targets: Tensor
    weights: Tensor | None = None


@dataclass
class Picked:
    """Inputs whose samples are not along the first axis of each tensor, as in a batched graph.

    The network sees all of `whole`, and its outputs at `rows` are those of the samples.
    """

    whole: Inputs
    rows: Tensor  # (B,) int64, into the network's outputs


register_pytree_node(Picked, lambda picked: ([picked.whole, picked.rows], None), lambda parts, _: Picked(*parts))


def num_samples(inputs: Inputs) -> int:
    """B, the length of the first axis of the tensors in `inputs`; those without axes are constants.

    Raises:
        TypeError: if there is no tensor with axes in them, or a sparse one.
    """
    if isinstance(inputs, Picked):
        return len(inputs.rows)
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(_dense(leaf))
    raise TypeError(
        f"ELLA finds no tensor with samples along its first axis in inputs that are {describe(inputs)}: pass unpack= "
        "that gives a tensor, or a dict, list or tuple of them."
    )


def rows(inputs: Inputs, part: slice | Tensor) -> Inputs:
    """Some of the samples of a batch.

    Raises:
        TypeError: if a tensor in them is sparse.
    """
    if isinstance(inputs, Picked):
        return Picked(inputs.whole, inputs.rows[part])
    return tree_map(lambda leaf: _dense(leaf)[part] if isinstance(leaf, Tensor) and leaf.ndim else leaf, inputs)


def slices(total: int, size: int) -> list[slice]:
    """0 … total in pieces of about the same size, `size` at most."""
    size = max(1, ceil(total / max(1, ceil(total / max(1, size)))))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def is_rowwise(inputs: Inputs, count: int) -> bool:
    """Whether each tensor with axes in `inputs` has `count` rows, so that samples are told apart by slicing it.

    False where there is no such tensor, or what may belong to samples but cannot be sliced: objects, and lists of
    `count` things.
    """
    return has_rows(inputs, count) and count not in map(len, _lists_of_constants(inputs))


def has_rows(inputs: Inputs, count: int) -> bool:
    """As `is_rowwise`, but lists are taken for constants."""
    leaves = [leaf for leaf in _leaves(inputs) if not _is_constant(leaf)]
    return bool(leaves) and all(isinstance(leaf, Tensor) and len(leaf) == count for leaf in leaves)


def plain(tree: Any, device: torch.device | str) -> Any:
    """Move to `device`; subclasses of tensors become plain ones, and objects move by their own `.to`, as copies."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if type(leaf) is not Tensor and not is_traceable_wrapper_subclass(leaf):
                leaf = leaf.as_subclass(Tensor)
            return leaf.to(
                device, non_blocking=torch.device(device).type != "cpu"
            )  # a copy from there must be waited for
        if _moves_itself(leaf):
            moved = copy.copy(leaf)  # what it is made of is replaced in place
            result = moved.to(device)
            return moved if result is None else result
        return leaf

    return tree_map(move, as_tree(tree), is_leaf=_moves_itself)


def as_tree(value: Any) -> Any:
    """Return `value`, after making torch's pytrees know the dataclasses and mappings in it, at any depth."""
    kind = type(value)
    if kind not in SUPPORTED_NODES and not _moves_itself(value):
        if isinstance(value, Mapping):  # as a BatchEncoding of Hugging Face
            register_pytree_node(
                kind,
                lambda mapping: (list(mapping.values()), list(mapping)),
                lambda values, keys: kind(dict(zip(keys, values, strict=True))),  # type: ignore[call-arg]
                flatten_with_keys_fn=lambda mapping: (  # type: ignore[arg-type]
                    [(MappingKey(key), value) for key, value in mapping.items()],
                    list(mapping),
                ),
            )
        elif is_dataclass(value) and not isinstance(value, type):
            register_pytree_node(
                kind,
                lambda parts: ([getattr(parts, field.name) for field in fields(parts)], None),
                lambda values, _: _dataclass_of(kind, values),
                flatten_with_keys_fn=lambda parts: (  # type: ignore[arg-type]
                    [(GetAttrKey(field.name), getattr(parts, field.name)) for field in fields(parts)],
                    None,
                ),
            )
    for child in _children(value):
        as_tree(child)
    return value


def constant(leaf: Any) -> Any:
    """A tensor without a graph that may be saved for a backward pass, whatever mode it was made in."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach()


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in `value`, those in objects included."""
    for leaf in _leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif _moves_itself(leaf):
            yield from tensors(_entries(leaf))


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Evaluate `model(inputs)`: how a network is called unless the user says otherwise.

    Where `forward` takes the entries of a dict or the attributes of an object by name, it gets them so; where it needs
    several arguments and `inputs` are a tuple, one by one. Inputs that are `Picked` are passed on whole.
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Picked):
        return call(model, inputs.whole)
    parameters = _parameters(model)
    if _is_sequence(inputs):
        return model(*inputs) if len(_needed(parameters)) > 1 else model(inputs)
    keywords = (_entries_for if isinstance(inputs, Mapping) else _attributes_for)(parameters, inputs)
    return model(**keywords) if keywords else model(inputs)


def inputs_and_targets(batch: Any) -> tuple[Inputs, Tensor]:
    """Take inputs and targets from a batch `(x, y)` or `(x, y, …)`, or from one whose parts have the usual names.

    A dict, named tuple, dataclass or object needs exactly one tensor under a name of `TARGETS`. Its inputs are the part
    under a name of `INPUTS`, if there is one and nothing that a network takes beside it; else all other entries of a
    dict, or the object itself.

    Raises:
        TypeError: for other batches; the message has the `unpack=` to pass.
    """
    if _is_sequence(batch):
        if len(batch) < 2 or not isinstance(batch[1], Tensor):
            raise _not_understood(batch)
        if len(batch) > 2:
            doubtful = any(_looks_like(part, batch[1]) for part in batch[2:])
            advice = " Pass unpack=lambda batch: (batch[0], batch[2]), say, if another part has them." * doubtful
            _tell(
                f"of {describe(batch)} the first two are taken for inputs and targets; the rest is not used.{advice}",
                logging.WARNING if doubtful else logging.INFO,
            )
        return batch[0], batch[1]
    entries = _entries(batch)
    targets = _names(entries, TARGETS)
    if len(targets) != 1 or _which_count(entries, "batch", targets[0]):
        raise _not_understood(batch)
    others = [name for name in entries if name != targets[0]]
    usual = [name for name in others if str(name).lower() in INPUTS]
    companions = [name for name in others if str(name).lower().endswith(COMPANIONS)]
    if len(usual) != 1 or companions or _moves_itself(batch):
        usual = others if len(others) == 1 or isinstance(batch, Mapping) else []
    left = [name for name in others if name not in usual] if usual else []
    _tell(
        f"{_quoted(usual) if usual else describe(batch)} {'are' if len(usual) > 1 else 'is'} taken for the inputs and "
        f"{targets[0]!r} for the targets{f'; {_quoted(left)} not used' if left else ''}."
    )
    inputs = {name: entries[name] for name in usual} if len(usual) > 1 else entries[usual[0]] if usual else batch
    return inputs, entries[targets[0]]


@contextmanager
def telling(on: bool = True) -> Iterator[None]:
    """Log what `inputs_and_targets` takes for what."""
    token = _TELLING.set(on)
    try:
        yield
    finally:
        _TELLING.reset(token)


_TELLING: ContextVar[bool] = ContextVar("telling", default=False)


def _tell(message: str, level: int = logging.INFO) -> None:
    if _TELLING.get():
        log.log(level, "ELLA: %s", message)


def _looks_like(part: Any, targets: Tensor) -> bool:
    """Whether a part of a batch may be its labels just as well: lengths of sequences and labels are (B,) counts."""
    counts = not targets.is_floating_point() and targets.ndim == 1
    return counts and isinstance(part, Tensor) and part.shape == targets.shape and part.dtype == targets.dtype


def describe(value: Any) -> str:
    """Say what a batch is: "a tuple (dict of 12, tuple of 2)", "a dict with 'image', 'label'"."""
    name = type(value).__name__
    article = "an" if name[0] in "AEIOUaeiou" else "a"
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if _is_sequence(value):
        parts = ", ".join(_briefly(part) for part in value[:SHOWN]) + (", …" if len(value) > SHOWN else "")
        return f"{article} {name} of {len(value)} ({parts})" if len(value) > SHOWN else f"{article} {name} ({parts})"
    entries = _entries(value)
    return f"{article} {name} with {_quoted(entries)}" if entries else f"{article} {name}"


def _briefly(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    sized = isinstance(value, (Mapping, tuple, list))
    return f"{type(value).__name__} of {len(value)}" if sized else type(value).__name__


def _quoted(names: Iterable[Any]) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _not_understood(batch: Any) -> TypeError:
    return TypeError(
        "ELLA expects batches (x, y) with a tensor y, or with one tensor that is called label, target, mask or y, but "
        f"the loader gives {describe(batch)}: pass unpack=lambda batch: {_suggestion(batch)}."
    )


def _suggestion(batch: Any) -> str:
    """What `unpack` might return, in the names of this batch."""
    entries = dict(enumerate(batch)) if _is_sequence(batch) else _entries(batch)
    part = "batch[{!r}]" if _is_sequence(batch) or isinstance(batch, Mapping) else "batch.{}"
    found = {name: path for name, value in entries.items() if (path := _path_to_tensor(value)) is not None}
    named = _names(entries, TARGETS)
    last = named[0] if named else next((name for name in reversed(found) if name != next(iter(found))), None)
    if last is None:
        return "(inputs, targets), or (inputs, targets, weights)"
    target = part.format(last) + found[last]
    if counting := _which_count(entries, part, last):
        return f"(batch, {target}, {counting})"
    first = [name for name in _names(entries, INPUTS) if name != last] or [name for name in entries if name != last]
    return f"({part.format(first[0])}, {target})" + "".join(f", or {part.format(name)}" for name in named[1:])


def _which_count(entries: Mapping[Any, Any], part: str, target: Any) -> str | None:
    """Weights of the nodes of one graph, as an expression, where not all of them are points: it has a mask or seeds."""
    for name in SPLITS:
        if name in entries:
            return part.format(name)
    seeds = entries.get("batch_size")
    if isinstance(seeds, int) and isinstance(entries[target], Tensor) and seeds < len(entries[target]):
        return f"torch.arange(len({part.format(target)})) < {part.format('batch_size')}"
    return None


def _path_to_tensor(value: Any) -> str | None:
    """How to get from `value` to the targets in it: "" if it is a tensor."""
    if isinstance(value, Tensor):
        return ""
    if _is_sequence(value):
        return "[0]" if value and isinstance(value[0], Tensor) else None
    if isinstance(value, Mapping):
        tensors = [name for name, part in value.items() if isinstance(part, Tensor)]
        return next((f"[{name!r}]" for name in [*_names(value, TARGETS), *tensors]), None)
    return None


def _names(entries: Mapping[Any, Any], wanted: Iterable[str]) -> list[Any]:
    """Names of the tensors that have one of the names `wanted`."""
    return [name for name, part in entries.items() if str(name).lower() in wanted and isinstance(part, Tensor)]


def _entries(value: Any) -> dict[Any, Any]:
    """The parts of a dict, named tuple, dataclass or object by name."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "_fields"):
        return {name: getattr(value, name) for name in value._fields}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if callable(getattr(value, "to_dict", None)):  # as torch-geometric's Data, which keeps its parts elsewhere
        return dict(value.to_dict())
    return {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_")}


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """What `forward` takes; that of the network inside for a wrapper that passes on whatever it gets."""
    try:
        found = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # it was compiled, and has none
        return []
    children = list(model.children())
    if {parameter.kind for parameter in found} == {_ARGS, _KEYWORDS} and len(children) == 1:
        return _parameters(children[0])
    return found


_ARGS, _KEYWORDS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def _needed(parameters: Iterable[inspect.Parameter]) -> list[inspect.Parameter]:
    return [each for each in parameters if each.default is each.empty and each.kind not in (_ARGS, _KEYWORDS)]


def _entries_for(parameters: list[inspect.Parameter], inputs: Mapping[Any, Any]) -> dict[str, Any] | None:
    """The entries of a dict that `forward` takes by name; None where it wants the dict."""
    if not _by_name(parameters, lambda name: name in inputs):
        return None
    if any(each.kind is _KEYWORDS for each in parameters):
        return dict(inputs)
    return {each.name: inputs[each.name] for each in parameters if each.name in inputs}


def _attributes_for(parameters: list[inspect.Parameter], inputs: Any) -> dict[str, Any] | None:
    """The attributes of an object that `forward` takes by name; None where it wants the object."""

    def has(name: str) -> bool:
        return hasattr(inputs, name) and not inspect.isroutine(getattr(inputs, name))

    if not _by_name(parameters, has):
        return None
    needed = {each.name for each in _needed(parameters)}
    offered = {each.name for each in parameters if has(each.name) and each.name.lower() not in TARGETS}
    taken = {name: getattr(inputs, name) for name in needed | offered}
    taken = {name: value for name, value in taken.items() if name in needed or value is not None}
    return None if taken.keys() <= set(WHOLE) else taken


def _by_name(parameters: list[inspect.Parameter], has: Callable[[str], bool]) -> bool:
    """Whether all arguments that `forward` needs can be had by name, so that it wants no other."""
    needed = _needed(parameters)
    if not needed and any(each.kind is _ARGS for each in parameters):  # it may want anything
        return False
    named = all(each.kind is not each.POSITIONAL_ONLY and has(each.name) for each in needed)
    return named and not any("dict" in str(each.annotation).lower() for each in needed)


def _is_sequence(value: Any) -> bool:
    """Whether it is a tuple or list whose parts have no names."""
    return isinstance(value, (tuple, list)) and not hasattr(value, "_fields")


def _moves_itself(value: Any) -> bool:
    """Whether it is an object of tensors that knows how to move to a device, as a batched graph does."""
    no_object = isinstance(value, (Tensor, Mapping, Picked, nn.Module, type))
    return not no_object and callable(getattr(value, "to", None))


def _is_constant(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.ndim == 0
    return leaf is None or isinstance(leaf, (Number, str, bytes, torch.dtype, torch.device))


def _leaves(tree: Any) -> list[Any]:
    return tree_leaves(as_tree(tree), is_leaf=_moves_itself)


def _lists_of_constants(value: Any) -> Iterator[Any]:
    """Lists and tuples of numbers or texts in a batch, at any depth: they may have one for each sample."""
    if _is_sequence(value) and value and all(isinstance(part, (Number, str, bytes)) for part in value):
        yield value
    else:
        for child in _children(value):
            yield from _lists_of_constants(child)


def _children(value: Any) -> Iterable[Any]:
    if _moves_itself(value):
        return ()
    if isinstance(value, Mapping):
        return value.values()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return value if isinstance(value, (list, tuple)) else ()


def _dense(leaf: Tensor) -> Tensor:
    if leaf.layout is not torch.strided and leaf.layout is not torch.jagged:
        raise TypeError(
            "ELLA cannot differentiate a network for samples of a sparse tensor: pass unpack=lambda batch: "
            "(inputs.to_dense(), targets)."
        )
    return leaf


def _dataclass_of(kind: Any, values: Iterable[Any]) -> Any:
    """Make a dataclass without calling its constructor, which might refuse what transformations put in."""
    made = object.__new__(kind)
    for field, value in zip(fields(kind), values, strict=True):
        object.__setattr__(made, field.name, value)
    return made
