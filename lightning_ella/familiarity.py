"""How familiar an input looks: a conformal p-value of what the kernel, the activations and the outputs say of it.

Each of them sees another kind of foreign input. Novelty is the kernel's word (`residual.py`), the distance that of the
pooled activations, and the energy that of the outputs. Their ranks among unseen points are combined by Fisher's rule,
and the rank of that sum is the answer: full conformal prediction (Vovk, Gammerman and Shafer 2005), which is exact for
any number of points, however the scores depend on each other. Ranks do not tell far from very far: what is farther away
than any training point gets an addition for that.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from . import artefact
from .activations import Place, find_places, pooled_width, record
from .augmentation import OneView, seen
from .batches import Inputs, Picked, num_samples, rows
from .engine import Linearization
from .guarantee import FEWEST
from .likelihoods import Likelihood
from .predictions import Prediction
from .residual import novelty

log = logging.getLogger(__name__)

PARTS = ("novelty", "distance", "energy")
NUM_POINTS = 1000  # training points that the distance is learnt from
MOST = 500  # unseen points that calibrate
DIRECTIONS = 100  # of the activations' covariance; the others share one variance
LOOKS = 4  # at some points, when the places are chosen
FLOOR = 0.01  # of the mean standard deviation, that every activation counts as at least
TINY = 1e-4  # of the largest variance, that every direction has at least
FAR = 3.0  # added to Fisher's sum for each e-fold that an input is farther away than all training points
FARTHEST = 1e15  # standard deviations; the square of more is none in float32
# By how much scores of familiar points differ that are rounding alone: energies of log-probabilities are 0, as is
# novelty where the directions span everything.
NOTHING = {"novelty": 1e-9, "distance": 1e-3, "energy": 1e-3}
AT_ONCE = 4096  # inputs whose ranks are found at once
ROUNDING = 1e-5  # of a sum of logarithms


class Look(NamedTuple):
    """What is known of B inputs, through one view."""

    outputs: Tensor  # (B, D)
    pooled: Tensor  # (B, A)
    novelty: Tensor | None  # (B,)


class Distance(nn.Module):
    """Mahalanobis' distance from the training points' pooled activations, squared, as a share of their number.

    It is that of Lee et al. (2018), of one class. The covariance is that of probabilistic principal components (Tipping
    and Bishop 1999): DIRECTIONS of it are as they were found, and all others have one variance.

    Args:
        width: A, of the pooled activations.
        rank: q, directions.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor
    farthest: Tensor

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("directions", torch.zeros(width, rank))
        self.register_buffer("variances", torch.ones(rank))
        self.register_buffer("rest", torch.ones(()))
        self.register_buffer("farthest", torch.ones(()))  # of the training points

    @classmethod
    def of(cls, pooled: Tensor) -> Self | None:
        """Learn from activations (n, A); None where there are too few of them, or none vary."""
        pooled = pooled[pooled.isfinite().all(1)].double()
        if len(pooled) < 2 or not (deviation := pooled.std(0)).sum() > 0:
            return None
        deviation = deviation.clamp_min(FLOOR * deviation.mean())
        values = (pooled - pooled.mean(0)) / deviation
        # Of the smaller of the two matrices that have the same eigenvalues.
        wide = values.shape[1] > len(values)
        variances, vectors = torch.linalg.eigh((values @ values.T if wide else values.T @ values) / len(values))
        variances, vectors = variances.flip(0).clamp_min(0), vectors.flip(1)
        rank = max(1, min(DIRECTIONS, len(values) // 2, values.shape[1] - 1))
        directions = nn.functional.normalize(values.T @ vectors[:, :rank], dim=0) if wide else vectors[:, :rank]
        others, floor = values.shape[1] - rank, TINY * variances[0]
        made = cls(values.shape[1], rank)
        parts = {"mean": pooled.mean(0), "scale": 1 / deviation, "directions": directions}
        parts |= {"variances": variances[:rank].clamp_min(floor)}
        parts |= {"rest": (variances[rank:].sum() / max(1, others)).clamp_min(floor)}
        parts |= {"farthest": made.farthest}
        made.load_state_dict({name: part.float().contiguous() for name, part in parts.items()})
        made.farthest = made(pooled).amax()
        return made

    def forward(self, pooled: Tensor) -> Tensor:
        """Of activations (B, A), (B,): 1 is as far as training points are on average."""
        values = ((pooled.to(self.mean) - self.mean) * self.scale).clamp(-FARTHEST, FARTHEST)
        inside = (values @ self.directions).square()  # (B, q)
        outside = (values.square().sum(1) - inside.sum(1)).clamp_min(0)
        return ((inside / self.variances).sum(1) + outside / self.rest) / values.shape[1]

    def beyond(self, distance: Tensor) -> Tensor:
        """How many e-folds distances are larger than those of all training points; 0 if they are not."""
        return (distance / self.farthest).log().clamp_min(0)


class Familiarity(nn.Module):
    """Parts of what makes an input look foreign, and their ranks among unseen points.

    Args:
        places: where the activations are, in the order of the network's.
        distance: from those of the training points, if there are any.
        parts: names of the scores that there are, some of `PARTS`, in this order.
        scores: (n, J), those of n unseen points, higher for what is more foreign.
    """

    scores: Tensor
    without: Tensor
    steps: Tensor

    def __init__(self, places: Sequence[Place], distance: Distance | None, parts: Sequence[str], scores: Tensor):
        super().__init__()
        self.places, self.parts = [Place(*place) for place in places], tuple(parts)
        self.distance = distance
        self.register_buffer("scores", scores.float())
        n = len(scores)
        above = (self.scores.unsqueeze(1) >= self.scores).sum(0)  # (n, J): how many are as foreign, each itself, too
        before, after = (above / (n + 1)).log(), ((above + 1) / (n + 1)).log()
        # Fisher's sum of each known point, (n,), where a new one is less foreign by all scores.
        self.register_buffer("without", self._far(self.scores) - before.sum(1))
        self.register_buffer("steps", before - after)  # (n, J), what a new one adds to it that is as foreign by a score

    @classmethod
    def calibrated(cls, places: Sequence[Place], distance: Distance | None, scores: Tensor) -> Self | None:
        """With ranks among n points of scores (n, 3), those of `PARTS`; None if there is none to go by."""
        known = _some(scores[:, ~scores.isnan().all(0)])
        there = (~scores.isnan()).any(0)
        if len(known):
            spread = known.amax(0) - known.amin(0)
            there[there.clone()] = spread > torch.tensor([NOTHING[name] for name in _of(PARTS, there)]).to(known)
        parts = _of(PARTS, there)
        places, distance = (places, distance) if "distance" in parts else ([], None)
        known = _some(scores[:, there])
        return cls(places, distance, parts, known).told() if known.numel() else None

    def told(self) -> Self:
        """Say so if there are too few points."""
        if (count := len(self.scores)) < FEWEST:
            log.info("ELLA: %d familiar points are few: familiarity is never below %.2g.", count, 1 / (count + 1))
        return self

    def among(self, scores: Tensor) -> Self:
        """The same parts, with ranks among other points, of scores (n, J); as it is if there are none."""
        known = _some(scores)
        return type(self)(self.places, self.distance, self.parts, known).told() if len(known) else self

    def forward(self, scores: Tensor) -> Tensor:
        """The share of familiar points that look at least as foreign, (B,) in (0, 1]; NaN where a score (B, J) is."""
        given, n = scores.to(self.scores), len(self.scores)
        new, others = self._far(given), self.without
        for part, known, step in zip(given.unbind(1), self.scores.unbind(1), self.steps.unbind(1), strict=True):
            part = part.unsqueeze(1)
            others = torch.addcmul(others, part >= known, step)  # (B, n)
            new = new - ((1 + (part <= known).sum(1)) / (n + 1)).log()
        p = (1 + (others >= new.unsqueeze(1) - ROUNDING).sum(1)) / (n + 1)
        return torch.where(given.isnan().any(1), torch.nan, p)

    def _far(self, scores: Tensor) -> Tensor:
        """What is added to sums of logarithms for being far away, of scores (n, J)."""
        if self.distance is None:
            return torch.zeros_like(scores[:, 0])
        return FAR * self.distance.beyond(scores[:, self.parts.index("distance")])

    def columns(self, known: Mapping[str, Tensor]) -> Tensor:
        """(B, J), of scores by name, those that count here."""
        return torch.stack([known[name] for name in self.parts], 1)

    def tell(self, prediction: Prediction, looks: Sequence[Look], likelihood: Likelihood) -> None:
        """Have a prediction say how familiar its inputs look, from V looks at them."""
        known = scores(looks, self.distance, likelihood)
        for name, score in known.items():
            setattr(prediction, name, score)
        foreign = self.columns(known)
        if isinstance(foreign.shape[0], int) and len(foreign) > AT_ONCE:  # not where a program is written
            prediction.familiarity = torch.cat([self(part) for part in foreign.split(AT_ONCE)])
        else:
            prediction.familiarity = self(foreign)

    def described(self) -> dict[str, Any]:
        """What a file says of it, beside its tensors."""
        return {"places": self.places, "parts": self.parts}

    def tensors(self) -> dict[str, Tensor]:
        """Those that make it again, by name."""
        found = {} if self.distance is None else {f"distance.{n}": v for n, v in self.distance.state_dict().items()}
        return found | {"scores": self.scores}

    @staticmethod
    def check(described: Mapping[str, Any], found: artefact.Shapes) -> None:
        """Raise an error unless tensors of a file are of the types and shapes of one that is described so.

        Raises:
            KeyError, TypeError, ValueError: if they are not.
        """
        parts, width = described["parts"], pooled_width([Place.checked(*place) for place in described["places"]])
        sizes: dict[str, tuple[int, ...]] = {"scores": (found["scores"][1][0], len(parts))}
        if "distance" in parts:
            rank = found["distance.directions"][1][1]
            sizes |= {"distance.mean": (width,), "distance.scale": (width,), "distance.directions": (width, rank)}
            sizes |= {"distance.variances": (rank,), "distance.rest": (), "distance.farthest": ()}
        ordered = [name for name in PARTS if name in parts] == list(parts)
        expected = {name: ("F32", size) for name, size in sizes.items()}
        if not (parts and ordered and sizes["scores"][0] and found == expected):
            raise ValueError(f"no tensors of a familiarity of {parts}: {found}")

    @classmethod
    def restored(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make it again, from tensors of these shapes."""
        places = [Place.checked(*place) for place in described["places"]]
        kept = {n.removeprefix("distance."): v for n, v in tensors.items() if n.startswith("distance.")}
        distance = Distance(pooled_width(places), kept["directions"].shape[1]) if kept else None
        if distance is not None:
            distance.load_state_dict(kept)
            distance = distance.to(tensors["scores"].device)
        return cls(places, distance, described["parts"], tensors["scores"])


@dataclass(frozen=True)
class Judge:
    """Says how foreign inputs look, before anything says how foreign that is.

    Attributes:
        places: where the activations are.
        distance: from those of the training points, if there are any.
        likelihood: what the outputs mean.
        views: through which the inputs are looked at.
        has_novelty: whether novelty is what it will be in a prediction.
    """

    places: Sequence[Place]
    distance: Distance | None
    likelihood: Likelihood
    views: Sequence[OneView | None]
    has_novelty: bool = True

    def __call__(self, linearization: Linearization, inputs: Inputs, features: Sequence[Tensor], rank: int) -> Tensor:
        """Scores (B, 3) in the order of `PARTS`, NaN for one that there is not, from features of each view."""
        looks = look_at(linearization, self.places, inputs, self.views, features, rank, self.likelihood)
        known = scores(looks, self.distance, self.likelihood)
        missing = features[0].new_full((len(features[0]),), torch.nan)
        known |= {} if self.has_novelty else {"novelty": missing}
        return torch.stack([known.get(name, missing) for name in PARTS], 1)


def _of(names: Sequence[str], there: Tensor) -> list[str]:
    return [name for name, is_there in zip(names, there.tolist(), strict=True) if is_there]


def mean_of(parts: Sequence[Tensor]) -> Tensor:
    """Over the views."""
    return parts[0] if len(parts) == 1 else torch.stack([*parts]).mean(0)


def _some(scores: Tensor) -> Tensor:
    """As many as are needed of those that are known, at random."""
    scores = scores[~scores.isnan().any(1)]
    chosen = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))[:MOST]
    return scores[chosen.to(scores.device)]


def scores(looks: Sequence[Look], distance: Distance | None, likelihood: Likelihood) -> dict[str, Tensor]:
    """How foreign B inputs look, (B,) each by name, on average over the views."""
    found: dict[str, list[Tensor]] = {name: [] for name in PARTS}
    for look in looks:
        found["novelty"] += [] if look.novelty is None else [look.novelty]
        found["distance"] += [] if distance is None else [distance(look.pooled)]
        energy = likelihood.energy(look.outputs)
        found["energy"] += [] if energy is None else [energy]
    return {name: mean_of(each) for name, each in found.items() if each}


def some_places(linearization: Linearization, inputs: Inputs) -> list[Place]:
    """Where the activations are; none where samples cannot be told apart, or cannot be looked at in other numbers."""
    few = rows(inputs, linearization.recordable(inputs, LOOKS)[0])
    if isinstance(few, Picked) or num_samples(few) < 2:
        return []
    try:
        return find_places(linearization.network, few)
    except Exception as error:
        log.info("ELLA: familiarity goes without the distance of activations, which cannot be looked at: %s", error)
        return []


def activations(linearization: Linearization, places: Sequence[Place], inputs: Inputs) -> list[Tensor]:
    """Pooled, (b, A) each, of as many inputs at a time as the memory budget allows, on the CPU."""
    parts = linearization.recordable(inputs)
    return [record(linearization.network, places, rows(inputs, part))[1].float().cpu() for part in parts]


def look_at(
    linearization: Linearization,
    places: Sequence[Place],
    inputs: Inputs,
    views: Sequence[OneView | None],
    features: Sequence[Tensor],
    rank: int,
    likelihood: Likelihood,
) -> list[Look]:
    """Look at inputs through V views, whose features (B, *, C, K + m) the exact engine gave already."""
    looks = []
    for view, along in zip(views, features, strict=True):
        own, network = seen(inputs, view), linearization.network
        parts = [record(network, places, rows(own, part)) for part in linearization.recordable(own)]
        outputs, pooled = (torch.cat(part) for part in zip(*parts, strict=True))
        told = novelty(along, rank, centred=likelihood.invariant) if along.shape[-1] > rank else None
        looks.append(Look(outputs, pooled, told))
    return looks
