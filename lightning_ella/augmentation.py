"""Views: other looks at an input that mean the same, over which predictions average (test-time augmentation).

To add one by name, write a function from a batch of images to a batch of images and name it in `VIEWS`.
"""

import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .batches import Inputs, as_tree, num_samples, rows
from .linearize import described
from .pickling import portable

OneView = str | Callable[[Inputs], Inputs]
Views = OneView | Iterable[OneView]

ALONE = 3  # samples that are looked at one by one
ROUNDING = 1e-4  # that another batch size may bring
FEW_CHANNELS = 4  # with as many in the last axis, and more in the first, images have their channels last


def shifted(images: Tensor, by: int) -> Tensor:
    """Images (B, C, H, W) moved right and down by so many pixels; what comes in at the edge is the edge repeated."""
    for axis in (-2, -1):
        size = images.shape[axis]
        places = (torch.arange(size, device=images.device) - by).clamp(0, size - 1)
        images = images.index_select(axis, places)
    return images


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "hflip": lambda images: images.flip(-1),
    "vflip": lambda images: images.flip(-2),
    **{f"shift{by}": lambda images, by=by: shifted(images, by) for by in (-4, -2, -1, 1, 2, 4)},
}


def listed(views: Views | None) -> tuple[OneView, ...]:
    """Names and functions as a tuple; None has none.

    Raises:
        ValueError: if there is no such name.
    """
    if not (views is None or isinstance(views, str | Iterable) or callable(views)):
        raise ValueError(f"views={views!r} is neither a name, nor a function, nor a list of them.")
    found = (views,) if isinstance(views, str) or callable(views) else tuple(views or ())
    for view in found:
        if unknown := [] if callable(view) else [name for name in str(view).split("+") if name not in VIEWS]:
            raise ValueError(
                f"views= has no {unknown[0]!r}: pass some of {', '.join(map(repr, VIEWS))}, several of them in a row "
                "as in 'hflip+shift2', or functions of a batch of inputs."
            )
    return found


def names_of(views: Iterable[OneView]) -> list[str]:
    """As they are written to a file; functions are not, but their names are."""
    kinds = [view if isinstance(view, str) or hasattr(view, "__qualname__") else type(view) for view in views]
    return [kind if isinstance(kind, str) else f"function {kind.__qualname__}" for kind in kinds]


def restored(names: Any, given: Views | None) -> tuple[OneView, ...]:
    """The views of a file, from the names in it and from what the user passes again.

    Raises:
        ValueError: if they are functions, and others or none are passed.
    """
    names = [str(name) for name in names]
    if given is None:
        if lost := [name for name in names if name.startswith("function ")]:
            raise ValueError(f"a file keeps no functions: pass views= the same as in the fit, with {lost[0]}.")
        return listed(names)
    found = listed(given)
    kinds = ["function" if callable(view) else view for view in found]
    if kinds != ["function" if name.startswith("function ") else name for name in names]:
        raise ValueError(f"the scales were chosen for the views {names}: pass views= the same, in their order.")
    return found


def seen(inputs: Inputs, view: OneView | None) -> Inputs:
    """Inputs through a view, as a copy; None leaves them as they are.

    Raises:
        ValueError: if a view by name finds no images, or if one gives another number of samples.
    """
    if view is None:
        return inputs
    found = through(inputs, view)
    if num_samples(found) != num_samples(inputs):
        raise ValueError(
            f"views= must give as many samples as it gets, but {names_of([view])[0]} makes {num_samples(found)} of "
            f"{num_samples(inputs)}."
        )
    return found


def through(inputs: Inputs, view: OneView | None) -> Inputs:
    """The same, with nothing that a program could not be."""
    if view is None:
        return inputs
    if callable(view):  # which may write to them
        return as_tree(view(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)))
    for name in view.split("+"):
        inputs = tree_map(lambda leaf, name=name: VIEWS[name](leaf) if _are_images(leaf) else leaf, inputs)
    return inputs


def portable_views(views: Iterable[OneView]) -> tuple[OneView, ...]:
    """Those that a pickle keeps, and what stands for the others; see `pickling.portable`."""
    instead = "load the posterior from its file with views="
    return tuple(view if isinstance(view, str) else portable("views", view, instead) for view in views)


def refuse_unusable(inputs: Inputs, views: Iterable[OneView]) -> None:
    """Raise a ValueError unless each view gives a batch like `inputs`: of each sample alone, the same each time."""
    for view, name in zip(views := list(views), names_of(views), strict=True):
        if isinstance(view, str):
            _refuse_other_than_images(inputs, view)
        before = _random_states()
        one, other = seen(inputs, view), seen(inputs, view)
        if _random_states() != before or not _same(one, other):
            raise ValueError(
                f"views= must give the same each time, but {name} does not: pass what it may do as several views."
            )
        for b in range(min(ALONE, num_samples(inputs))):
            part = slice(b, b + 1)
            if not _same(seen(rows(inputs, part), view), rows(one, part), ROUNDING):
                raise ValueError(
                    f"views= must look at each sample alone, but what {name} makes of one depends on the others of "
                    "its batch, or on its place there."
                )


def _refuse_other_than_images(inputs: Inputs, view: str) -> None:
    images = [leaf for leaf in tree_leaves(inputs) if _are_images(leaf)]
    sizes = {tuple(image.shape[-2:]) for image in images}
    channels_last = any(image.shape[-1] <= FEW_CHANNELS < image.shape[1] for image in images)
    if len(sizes) != 1 or channels_last:
        raise ValueError(
            f"views={view!r} is for images (B, C, H, W) of one size, but the inputs are {described(inputs)}: pass a "
            "function of a batch of inputs."
        )


def _random_states() -> bytes:
    """Those of the generators that everybody shares."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    return pickle.dumps((random.getstate(), np.random.get_state(), states))  # noqa: NPY002


def _same(one: Inputs, other: Inputs, tolerance: float = 0.0) -> bool:
    """Whether two trees have the same tensors, NaN where the other has it."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) for a, b in tensors
    )


def _are_images(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim == 4
