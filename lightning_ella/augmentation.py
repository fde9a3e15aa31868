"""Views: other looks at an input that mean the same, over which predictions average (test-time augmentation).

To add one by name, write a function from a batch of images to a batch of images and name it in `VIEWS`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map

from .batches import Inputs, as_tree, num_samples
from .linearize import described
from .pickling import portable

OneView = str | Callable[[Inputs], Inputs]
Views = OneView | Iterable[OneView]


def shifted(images: Tensor, by: int) -> Tensor:
    """Images (B, C, H, W) moved right and down by so many pixels; what comes in at the edge is the edge repeated."""
    height, width = images.shape[-2:]
    before, after = max(by, 0), max(-by, 0)
    wide = pad(images, (before, after, before, after), mode="replicate")
    return wide[..., after : after + height, after : after + width]


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
    return [view if isinstance(view, str) else f"function {getattr(view, '__qualname__', view)}" for view in views]


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
        ValueError: if a view by name finds no images.
    """
    if view is None:
        return inputs
    if callable(view):  # which may write to them
        return as_tree(view(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)))
    if not any(map(_are_images, tree_leaves(inputs))):
        raise ValueError(
            f"views={view!r} is for images (B, C, H, W), but the inputs are {described(inputs)}: pass a function of "
            "a batch of inputs."
        )
    for name in view.split("+"):
        inputs = tree_map(lambda leaf, name=name: VIEWS[name](leaf) if _are_images(leaf) else leaf, inputs)
    return inputs


def portable_views(views: Iterable[OneView]) -> tuple[OneView, ...]:
    """Those that a pickle keeps, and what stands for the others; see `pickling.portable`."""
    return tuple(view if isinstance(view, str) else portable("views", view) for view in views)


def refuse_unusable(inputs: Inputs, views: Iterable[OneView]) -> None:
    """Raise a ValueError unless each view gives a batch like `inputs`, and the same one each time."""
    for view, name in zip(views := list(views), names_of(views), strict=True):
        one, other = seen(inputs, view), seen(inputs, view)
        if num_samples(one) != num_samples(inputs):
            raise ValueError(
                f"views= must give as many samples as it gets, but {name} makes {num_samples(one)} of "
                f"{num_samples(inputs)}."
            )
        pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
            raise ValueError(
                f"views= must give the same each time, but {name} is random: pass what it may do as several views."
            )


def _are_images(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim == 4 and leaf.is_floating_point()
