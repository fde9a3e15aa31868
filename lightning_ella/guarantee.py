"""Sets and intervals that hold the truth as often as they say, and answers that are wrong no more often than they say.

Whatever the network: by split conformal prediction (Vovk, Gammerman and Shafer 2005; Angelopoulos and Bates 2023) and
by learn then test (Angelopoulos, Bates, Candès, Jordan and Lei 2025), from labelled points that nothing else has seen.
The better the predictions, the smaller the sets and the more answers.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .likelihoods import Likelihood

log = logging.getLogger(__name__)

FEWEST = 20  # points: with fewer, nothing is in the last twentieth
PLANNED = 5  # one of so many points plans which thresholds are tested
STEPS = 50  # thresholds that are tested
ROUNDING = 1e-9  # of a rank that may be a whole number
ROUNDED = 1e-5  # of 1 − p, in a batch of another size
MISSING = (
    "needs labelled points that nothing else has seen: pass some to predictor.guarantee(loader), or fit with at least "
    "40 more unseen points than num_calibration=."
)


class Spent(NamedTuple):
    """Points that cannot guarantee anything any more: a fit has looked at them."""

    identity: str  # of all points of the loader
    numbers: Tensor  # of those among them


@dataclass
class Judged:
    """How right a predictor was about n points."""

    scores: Tensor  # (n,) or (n, C): how far each target is from what was said
    confidence: Tensor  # (n,), of the answer; (0,) where there is no one answer
    wrong: Tensor  # (n,) bool, whether it was wrong; (0,)

    @classmethod
    def of(cls, likelihood: "Likelihood", prediction: Any, targets: Tensor, counts: Tensor) -> Self:
        """Of targets (n, …) as the likelihood takes them, those that count, (n,) bool."""
        scores = likelihood.conformity(prediction, targets)[counts]
        answers = likelihood.answers(prediction, targets)
        return cls(
            scores, *(scores.new_zeros(0), counts[:0]) if answers is None else (part[counts] for part in answers)
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Of all of their points."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass
class Guarantee:
    """What n points that nothing else has seen say about any that come.

    Attributes:
        scores: (n,) or (n, C), in ascending order.
        confidence: (n,), of the answers.
        wrong: (n,).
        planned: (p,), confidences of other points.
    """

    scores: Tensor
    confidence: Tensor
    wrong: Tensor
    planned: Tensor

    @classmethod
    def of(cls, judged: Judged, planned: Tensor | None = None) -> Self:
        """From points apart, and confidences of others, or of a fifth of them."""
        scores, confidence = (part.detach().cpu().double() for part in (judged.scores, judged.confidence))
        wrong = judged.wrong.detach().cpu()
        if planned is None:
            order = torch.randperm(len(confidence), generator=torch.Generator().manual_seed(0))
            some, others = order.tensor_split([len(order) // PLANNED])
            planned, confidence, wrong = confidence[some], confidence[others], wrong[others]
        return cls(scores.sort(0).values, confidence, wrong, planned.detach().cpu().double())

    @classmethod
    def promised(cls, judged: Judged, weights: Tensor, planned: Tensor | None = None) -> Self | None:
        """As `of`; None for fewer points than `FEWEST`, or for those that have other weights (n,) than each other."""
        if len(weights) >= FEWEST and weights.min() < weights.max():
            log.info("ELLA: nothing is guaranteed, since the unseen points have different weights.")
        return cls.of(judged, planned) if len(weights) >= FEWEST and weights.min() == weights.max() else None

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """From those of a file, if it has any."""
        return cls(**{name: value.cpu() for name, value in tensors.items()}) if tensors else None

    def quantile(self, level: float) -> Tensor:
        """The score, () or (C,), that a new point's is at most with probability `level`: infinite where n is too small.

        The ⌈(n + 1) level⌉-th smallest.

        Raises:
            ValueError: if the level is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level!r} must be a number between 0 and 1.")
        rank = math.ceil((len(self.scores) + 1) * level - ROUNDING)
        return self.scores[rank - 1] if rank <= len(self.scores) else torch.full_like(self.scores[0], torch.inf)

    def threshold(self, risk: float, certainty: float) -> float:
        """The least confidence that may be answered at so that no more than `risk` of the answers are wrong.

        That holds with probability `certainty` over the points that it was found with. Thresholds are tested from the
        most confident on, each by the exact binomial test of its answers, until one fails: fixed sequence testing.

        Returns:
            the threshold, infinite if none passes.

        Raises:
            ValueError: if there is no one answer to an input, or a number is not in (0, 1).
        """
        for name, value in {"risk": risk, "certainty": certainty}.items():
            if not 0 < value < 1:
                raise ValueError(f"{name}={value!r} must be a number between 0 and 1.")
        if not len(self.confidence) or not len(self.planned):
            raise ValueError("threshold() is for classes: there is no one answer here, that is right or wrong.")
        fewest = math.log(1 - certainty) / math.log(1 - risk)  # answers, all right, that pass
        first = min(1.0, 2 * fewest / len(self.confidence))
        shares, found = torch.linspace(first, 1, STEPS, dtype=torch.float64), math.inf
        cuts = gaps(self.planned)
        for value in self.planned.quantile(1 - shares, interpolation="lower").tolist():
            threshold = float(cuts[cuts <= value].max())
            answered = self.confidence >= threshold
            if binomial(int(self.wrong[answered].sum()), int(answered.sum()), risk) > 1 - certainty:
                break
            found = threshold
        if found == math.inf:
            log.warning(
                "ELLA: no confidence is known to keep the share of wrong answers below %g with certainty %g, from %d "
                "points: nothing is answered. Pass more points to guarantee(), or allow a higher risk.",
                *(risk, certainty, len(self.confidence)),
            )
        return found

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @staticmethod
    def check(found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Raise a ValueError unless tensors of a file are of the types and shapes of one."""
        kinds = {name: kind for name, (kind, _) in found.items()}
        expected = dict.fromkeys(("scores", "confidence", "wrong", "planned"), "F64") | {"wrong": "BOOL"}
        if kinds != expected or not found["scores"][1][0] or found["confidence"][1] != found["wrong"][1]:
            raise ValueError(f"no tensors of a guarantee: {dict(found)}")
        if len(found["scores"][1]) not in (1, 2) or not len(found["wrong"][1]) == len(found["planned"][1]) == 1:
            raise ValueError(f"no tensors of a guarantee: {dict(found)}")


def gaps(values: Tensor) -> Tensor:
    """0, and the middles between confidences (n,) that are more than rounding apart: no answer is by chance there."""
    ordered = values.unique()
    eps = 2.0**-22 if torch.equal(values.float().double(), values) else 2.0**-48  # of the type that they come from
    apart = ordered.diff() > eps + ROUNDED * (1 - ordered[:-1])
    return torch.cat([ordered.new_zeros(1), ((ordered[1:] + ordered[:-1]) / 2)[apart]])


def binomial(successes: int, trials: int, chance: float) -> float:
    """P(X ≤ successes) of a binomial variable: by the logarithms of its terms."""
    numbers = torch.arange(successes + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    logs = (n + 1).lgamma() - (numbers + 1).lgamma() - (n - numbers + 1).lgamma()
    logs = logs + numbers * math.log(chance) + (n - numbers) * math.log(1 - chance)
    return min(1.0, float(logs.logsumexp(0).exp()))
