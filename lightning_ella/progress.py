"""How far a stage is: what goes through batches, and shows it."""

from collections.abc import Callable, Iterable
from typing import Any

from tqdm.auto import tqdm

from .batches import num_samples

Progress = Callable[[Iterable, str, int], Iterable]  # (batches, what is done, how many points) -> batches


def bar(batches: Iterable, description: str, total: int) -> Iterable:
    """Show a bar of points: the first part of each batch has them."""
    with tqdm(total=total, desc=description, unit="point") as line:
        for batch in batches:
            yield batch
            line.update(num_samples(batch[0]))


def silent(batches: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    """Show no progress."""
    return batches
