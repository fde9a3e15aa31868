"""Few unseen points that stand for many: those that the scales are chosen on.

Features of a point cost as much as ten or fifty looks at it, so the network looks at five times as many points as the
scales are chosen on, and these are taken evenly from all in the order of what the network loses on each. The scales
are then nearly those of all points: what they hang on most is how many points the network is surely wrong about.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

from .batches import Batch
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
    """`count` of the points `numbers`, one from each of as many strata in the order of their losses.

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
    places = None if gathered is None else strata(gathered.cpu(), count, generator)
    generator.set_state(world.from_first(generator.get_state()))
    return [numbers[place] for place in world.object_from_first(places) or ()]


def losses(linearization: Linearization, likelihood: Likelihood, batches: Iterable[Batch]) -> Tensor:
    """−log p(y|f) of each point, (n,), nats: the weighted mean of its positions, NaN where none of them counts."""
    found = [torch.empty(0, device=linearization.device)]
    for inputs, targets, weights in batches:
        outputs = linearization.at_positions(linearization.logits(inputs))  # (B, *, C)
        known = checked(likelihood, outputs, targets, linearization.axis)
        weighted = weights_of(likelihood, known, weights)  # (B, *)
        counts = weighted > 0
        each = torch.zeros_like(weighted)
        each[counts] = -likelihood.log_prob(outputs[counts], known[counts]).to(each)
        sums = (part.reshape(len(part), -1).sum(1) for part in (weighted * each, weighted))
        found.append(torch.div(*sums))
    return torch.cat(found)


def strata(losses: Tensor, count: int, generator: Generator) -> list[int]:
    """Places of `count` losses (n,), one from each of as many strata of those that are there, in the order of n."""
    order = losses.argsort(stable=True)[: int((~losses.isnan()).sum())].tolist()
    if len(order) <= count:
        return sorted(order)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    places = (torch.arange(count) + within) * len(order) / count
    return sorted(order[place] for place in places.long().tolist())
