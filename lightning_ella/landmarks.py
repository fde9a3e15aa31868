"""Which training inputs, and which output of each, the kernel is approximated from.

A rule is a function `(points, num_landmarks, num_outputs, generator) -> Landmarks`; to add one, write it and
name it in `LANDMARKS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .data import Points


class Landmarks(NamedTuple):
    """M pairs of a training point and one of the network's outputs."""

    numbers: list[int]  # M, into the training points
    outputs: Tensor  # (M,), in [0, C)


def uniform(points: Points, num_landmarks: int, num_outputs: int, generator: Generator) -> Landmarks:
    """Draw inputs uniformly without replacement; the output of each uniformly."""
    numbers = torch.randperm(len(points.numbers), generator=generator)[:num_landmarks]
    return _landmarks(points, numbers, num_outputs, generator)


def class_balanced(points: Points, num_landmarks: int, num_outputs: int, generator: Generator) -> Landmarks:
    """Draw equally many inputs of every class; the output of each uniformly, as in Deng et al. (2022).

    Classes take turns until there are enough; one that runs out leaves its turns to the others. Where the dataset has
    no `.targets`, only four times as many points as landmarks are read for their labels.
    """
    order = torch.randperm(len(points.numbers), generator=generator)
    candidates = order if points.targets is not None else order[: 4 * num_landmarks]
    labels = points.labels(candidates.tolist())
    labels = labels.long() if labels.dtype == torch.bool else labels
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            "landmarks='uniform-class' needs one class index a point, but the targets have the shape "
            f"{tuple(labels.shape)} and the type {labels.dtype}: pass landmarks='uniform'."
        )
    turn = torch.empty_like(labels)  # how many earlier candidates are of the same class
    for label in labels.unique():
        same = labels == label
        turn[same] = torch.arange(int(same.sum()), dtype=turn.dtype)
    numbers = candidates[torch.argsort(turn, stable=True)[:num_landmarks]]
    return _landmarks(points, numbers, num_outputs, generator)


def automatic(points: Points, num_landmarks: int, num_outputs: int, generator: Generator) -> Landmarks:
    """As "uniform-class" where every point has a class, else as "uniform"."""
    label = points.labels([0])
    classes = label.ndim == 1 and not label.is_floating_point()
    return (class_balanced if classes else uniform)(points, num_landmarks, num_outputs, generator)


Rule = Callable[[Points, int, int, Generator], Landmarks]

LANDMARKS: dict[str, Rule] = {
    "auto": automatic,
    "uniform-class": class_balanced,
    "uniform": uniform,
}


def _landmarks(points: Points, numbers: Tensor, num_outputs: int, generator: Generator) -> Landmarks:
    outputs = torch.randint(num_outputs, (len(numbers),), generator=generator)
    return Landmarks(points.arranged(numbers.tolist()), outputs)
