"""Few unseen points that stand for many: those that the scales are chosen on.

Features of a point cost as much as ten or fifty looks at it, so the network looks at five times as many points as the
scales are chosen on, and these are taken evenly from all in the order of what the network loses on each. The scales
are then nearly those of all points: what they hang on most is how many points the network is surely wrong about.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

from .batches import Batch, rows
from .distributed import World
from .engine import Linearization
from .likelihoods import Likelihood
from .observations import checked, weights_of

LOOKS = 5  # points that the network looks at for each that the scales are chosen on


def typical(
    linearization: Linearization,
    likelihood: Likelihood,
    batches: Iterable[Batch],
    numbers: Sequence[int],
    count: int,
    generator: Generator,
    world: World,
) -> list[int]:
    """`count` of the points `numbers`, at equal distances in the order of their losses.

    Args:
        linearization: of the network.
        likelihood: gives the losses.
        batches: the points, or this process's share of them.
        numbers: of all points.
        count: how many to choose; all that have a target are there where they are no more.
        generator: of the choice.
        world: the processes that share the points.
    """
    with world.together("a look at the calibration points"):
        mine = losses(linearization, likelihood, batches)
    gathered = world.gather_rows(mine, len(numbers))
    places = None if gathered is None else systematic(gathered.cpu(), count, generator)
    generator.set_state(world.from_first(generator.get_state()))
    return [numbers[place] for place in world.object_from_first(places) or ()]


def losses(linearization: Linearization, likelihood: Likelihood, batches: Iterable[Batch]) -> Tensor:
    """−log p(y|f) of each point, (n,), nats: the weighted mean of its positions, NaN where none of them counts."""
    found = [torch.empty(0, device=linearization.device)]
    for batch in (Batch(*batch) for batch in batches):
        for part in linearization.affordable(batch.inputs, 1):
            outputs = linearization.at_positions(linearization.logits(rows(batch.inputs, part)))  # (b, *, C)
            known = checked(likelihood, outputs, batch.targets[part], linearization.axis)
            weights = None if batch.weights is None else batch.weights[part]
            weights = weights_of(likelihood, known, weights)  # (b, *)
            counts = weights > 0
            each = torch.zeros_like(weights)
            loss = -likelihood.log_prob(outputs[counts], known[counts]).to(each)
            each[counts] = torch.where(loss.isnan(), torch.inf, loss)
            total, count = (values.reshape(len(values), -1).sum(1) for values in (weights * each, weights))
            found.append(total / count)
    return torch.cat(found)


def systematic(losses: Tensor, count: int, generator: Generator) -> list[int]:
    """Places of `count` losses (n,), at equal distances in their order (Madow and Madow 1944); none that is NaN."""
    order = losses.argsort(stable=True)[: int((~losses.isnan()).sum())].tolist()
    if len(order) <= count:
        return sorted(order)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    places = (torch.arange(count) + start) * len(order) / count
    return sorted(order[place] for place in places.long().tolist())
