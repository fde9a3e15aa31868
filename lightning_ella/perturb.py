"""Copies of inputs that are more or less like the data: a student learns from them what lies off the data.

To add a change of real inputs, write a function `(values, strength, generator) -> values` and name it in `CHANGES`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from torch.utils._pytree import keystr, tree_map_with_path

from .batches import Inputs, as_tree
from .linearize import described

Perturb = Callable[[Inputs], Inputs]
FEW, MANY = 3, 4  # different numbers: what has no more of them, and so many times as many in all, is a mask or a type
MASKS = ("mask", "type")  # what is in the names of such
LEAST = 0.1  # share of the tokens of a text that are changed


def perturbed(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """A copy of a batch, each sample changed in one way: real numbers by `CHANGES`, tokens by those of other samples.

    What is no tensor, and what looks like a mask, stays.

    Raises:
        ValueError: if there is nothing to change.
    """
    changed: list[bool] = []

    def change(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or any(word in keystr(path).lower() for word in MASKS):
            return leaf
        changed.append(leaf.is_floating_point() or leaf.is_complex() or (leaf.dtype != torch.bool and leaf.ndim > 1))
        return _changed(leaf, generator)

    made = tree_map_with_path(change, as_tree(inputs))
    if not any(changed):
        raise ValueError(
            f"a student learns from changed inputs, but nothing in {described(inputs)} can be changed: pass perturb=."
        )
    return made


def _changed(values: Tensor, generator: torch.Generator) -> Tensor:
    """A changed copy; the tensor itself where it is none of real numbers or tokens."""
    if not values.ndim:
        return values
    if values.is_complex():
        return torch.complex(_changed(values.real, generator), _changed(values.imag, generator))
    is_mask = values.numel() > MANY * FEW and len(values.unique()) <= FEW
    if values.dtype == torch.bool or is_mask or values.isinf().any():
        return values
    if not values.is_floating_point():
        return _other_tokens(values, generator) if values.ndim > 1 else values
    if values.ndim == 1:
        return _changed(values.unsqueeze(1), generator).squeeze(1)
    count, wide = len(values), [-1] + [1] * (values.ndim - 1)
    changes = [change for change in CHANGES if values.ndim > 2 or change not in OF_POSITIONS]
    which = torch.arange(count) % len(changes)
    which = which[torch.randperm(count, generator=generator)].to(values.device)
    strength = torch.rand(count, generator=generator).view(wide).to(values)
    made = values.clone()
    for number, change in enumerate(changes):
        chosen = (which == number).view(wide)
        made = torch.where(chosen, change(values, strength, generator), made)
    return torch.where(values.isfinite() & made.isfinite(), made, values)  # what is missing stays so


def _other_tokens(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """A share of each sample's tokens, at least a tenth, replaced by those of other samples at the same place."""
    share = LEAST + (1 - LEAST) * torch.rand(len(tokens), generator=generator)
    replaced = torch.rand(tokens.shape, generator=generator) < share.view(-1, *[1] * (tokens.ndim - 1))
    others = torch.randint(len(tokens), tokens.shape, generator=generator).to(tokens.device)
    return torch.where(replaced.to(tokens.device), tokens.gather(0, others), tokens)


def _spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel (the first axis after the samples), over all that is not missing."""
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    mean = values.nanmean(axes, keepdim=True)
    deviation = (values - mean).square().nanmean(axes, keepdim=True).sqrt()
    return mean, torch.where(deviation > 0, deviation, 1)


def _normal(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(values.shape, generator=generator).to(values)


def noise(values: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise, up to what the channel varies by."""
    return values + strength * _spread(values)[1] * _normal(values, generator)


def contrast(values: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch or shrink about the mean, and shift."""
    mean, deviation = _spread(values)
    shift = torch.randn(strength.shape, generator=generator).to(values)
    return mean + (values - mean) * (0.2 + 1.3 * strength) + 0.7 * shift * deviation


def mixture(values: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Mix with another sample, up to a little more than half of it."""
    other = values[torch.randperm(len(values), generator=generator).to(values.device)]
    return values.lerp(other, 0.6 * strength)


def blur(values: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Average over three or five neighbours along each axis of positions."""
    return torch.where(strength < 0.5, _averaged(values, 3), _averaged(values, 5))


def shuffle(values: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Put a share of the positions in another order."""
    axes = _positions(values)
    last = list(range(-len(axes), 0))
    apart = values.movedim(axes, last)
    flat = apart.flatten(-len(axes))  # (B, channels, L)
    length = flat.shape[-1]
    order = torch.randperm(length, generator=generator).to(values.device)
    chosen = torch.rand(len(values), length, generator=generator).to(values) < strength.view(-1, 1)
    mixed = torch.where(chosen.unsqueeze(1), flat[..., order], flat)
    return mixed.view(apart.shape).movedim(last, axes)


def _positions(values: Tensor) -> list[int]:
    """The axes that are no channels: all after the first, or the longer of two."""
    return list(range(2, values.ndim)) if values.ndim > 3 else [max((1, 2), key=values.shape.__getitem__)]


def _averaged(values: Tensor, size: int) -> Tensor:
    """A moving average along each axis of positions."""
    for axis in _positions(values):
        if values.shape[axis] > 1:
            last = values.movedim(axis, -1)
            rows = last.reshape(-1, 1, last.shape[-1])
            rows = avg_pool1d(rows, size, 1, size // 2, count_include_pad=False)
            values = rows.view(last.shape).movedim(-1, axis)
    return values


CHANGES: list[Callable[[Tensor, Tensor, torch.Generator], Tensor]] = [noise, contrast, mixture, blur, shuffle]
OF_POSITIONS: set[Any] = {blur, shuffle}  # which need axes of positions
