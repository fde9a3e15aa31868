"""From labelled points to where the linearised network's mean goes, and how far it may go: learning in K directions."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, floor, log10
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from .batches import slices
from .chunks import chunks
from .distributed import World
from .likelihoods import Likelihood
from .observations import Observations
from .posterior import CAUTION, ENOUGH, MIN_DRAWS, TUNING_BUDGET, Posterior, minimise
from .predictions import Gaussian

log = logging.getLogger(__name__)

WIDTH = 0.5  # e-folds: the standard deviation of a prior on the temperature, around the one that it had
EVIDENT = 1.5  # standard errors by which points must be predicted better for the weights to have drifted at all
REACHES = (1e-12, 1e-3, 1e-2, 0.1, 0.3, 1.0)  # times S₀, that are tried as the prior; with the first nothing moves
WEAKEST, STRONGEST, EACH = -5.0, 2.0, 2  # decades of the drifts that are tried, around a change of one nat; steps each
MOST_STEPS = 200  # of Newton's method
DONE = 1e-22  # the change of the loss that a step promises, of its size: nothing that float64 could show
ROUNDING = 1e-12  # of the loss, that a step may add to it


@dataclass(frozen=True)
class Learnt:
    """What labelled points have taught a posterior after its fit: w ~ N(m, P⁻¹), and a temperature."""

    mean: Tensor  # m, (K,)
    precision: Tensor  # P, (K, K)
    temperature: Tensor  # ()
    reach: float  # λ
    drift: float  # τ
    points: Observations  # with features along the K directions and the probes; on the CPU
    given: bool = False  # whether τ was
    figures: dict[str, float] = field(default_factory=dict)  # "before/nll", "after/nll", …: points left out in turn

    DESCRIBED = ("reach", "drift", "given", "figures")  # what a file has beside the tensors

    @property
    def given_drift(self) -> float | None:
        """τ, if it was given."""
        return self.drift if self.given else None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], **described: Any) -> "Learnt":
        """From what `tensors` and `described` gave."""
        own = {name: tensors[name] for name in _OWN}
        points = {name: value.cpu() for name, value in tensors.items() if name not in _OWN}
        return cls(**own, points=Observations(**points), **described)

    def tensors(self) -> dict[str, Tensor]:
        """By name, to be stored."""
        own = {name: getattr(self, name).clone() for name in _OWN}  # a file holds no tensor under two names
        return own | {name: value for name, value in self.points._asdict().items() if value is not None}

    def described(self) -> dict[str, Any]:
        """The rest, to be stored."""
        return {name: getattr(self, name) for name in self.DESCRIBED}

    @property
    def num_points(self) -> int:
        """How many samples were learnt from."""
        return num_samples(self.points)

    def tell(self) -> None:
        """Log what was chosen and gained."""
        names = {"nll": "NLL", "accuracy": "accuracy", "rmse": "RMSE"}
        gains = [
            f"{title} {self.figures[f'before/{name}']:.4g} -> {self.figures[f'after/{name}']:.4g}"
            for name, title in names.items()
            if f"before/{name}" in self.figures
        ]
        how = "Bayes' rule" if self.drift == 0 else f"a drift of {self.drift:.3g} a parameter"
        how = how if self.reach == 1 else f"a prior of {self.reach:.3g} times the posterior's covariance"
        how = f"the mean moves by {how}" if self.reach > REACHES[0] else "the mean stays, as no move helps"
        log.info(
            "ELLA: learnt from %d points: %s (%s), temperature %.3g. Each point predicted without itself: %s.",
            *(self.num_points, how, "given" if self.given else "chosen by leaving points out"),
            *(float(self.temperature), ", ".join(gains)),
        )

    def to(self, move: Callable[[Tensor], Tensor]) -> "Learnt":
        """With what `move` makes of all but the points."""
        return replace(self, **{name: move(getattr(self, name)) for name in _OWN})


_OWN = ("mean", "precision", "temperature")


class Problem:
    """−log p(y|w, T) of labelled points and the prior of w and log T, as a function of both: z = (w, log T), (k,).

    Args:
        points: rows, with features along the K directions; this process's share of them.
        likelihood: gives log p.
        centre: the mean of w, (K,).
        precision: of w, (K, K).
        temperature: T; the mean of its logarithm where it is free.
        free: whether it is, with the standard deviation `WIDTH`.
        world: the processes that share the points.
    """

    def __init__(
        self,
        points: Observations,
        likelihood: Likelihood,
        centre: Tensor,
        precision: Tensor,
        temperature: Tensor,
        *,
        free: bool,
        world: World,
    ):
        self.points, self.likelihood, self.free, self.world = points, likelihood, free, world
        self.rank = len(centre)
        log_temperature = temperature.log().view(1)
        self.centre = torch.cat([centre, log_temperature]) if free else centre
        self.fixed = log_temperature
        width = precision.new_full((1, 1), WIDTH**-2)
        self.precision = torch.block_diag(precision, width) if free else precision
        one = (self.rank + 1) * (4 * points.logits.shape[1] + self.rank + 1)  # numbers that are made of a row
        self.parts = _whole_samples(points, chunks(points.logits).features // one)

    def near(self, z: Tensor) -> Tensor:
        """Coordinates of another problem as this one's: it may have another idea of what is free."""
        return torch.cat([z[: self.rank], self.fixed if len(z) == self.rank else z[self.rank :]])[: len(self.centre)]

    def outputs(self, z: Tensor, part: slice | Tensor) -> tuple[Observations, Tensor, Tensor]:
        """Some rows in float64; outputs f + Ψ w and those at the temperature, (n, C), where z is (k,) or (n, k)."""
        some = self.points.rows(part)
        some = some._replace(logits=some.logits.double(), features=some.features.double())
        away = torch.einsum("nck,...k->nc" if z.ndim == 1 else "nck,nk->nc", some.features, z[..., : self.rank])
        logits = some.logits + away
        log_temperature = z[..., self.rank :] if self.free else self.fixed
        return some, logits, self._tempered(logits, log_temperature)

    def loss(self, z: Tensor) -> float:
        """Of all points."""
        total = z.new_zeros(())
        for part in self.parts:
            some, _, outputs = self.outputs(z, part)
            total += self._losses(some, outputs).sum()
        away = z - self.centre
        return float(self.world.sum(total) + away @ self.precision @ away / 2)

    def expanded(self, z: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Of some rows: gradients of their losses, (n, k), and square roots of their curvatures, (n, ·, k)."""
        some, logits, outputs = self.outputs(z, part)
        assert some.weights is not None
        derivative = self._derivative(some, logits, z)  # (n, C, k)
        weights = some.weights.double().view(-1, 1, 1)
        scores = self.likelihood.score(outputs, some.targets).unsqueeze(-1)  # (n, C, 1)
        return -(weights * derivative * scores).sum(1), weights.sqrt() * self.likelihood.rooted(outputs, derivative)

    def information(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (k,) and curvature (k, k) of the loss of all points, without the prior."""
        gradient, curvature = torch.zeros_like(self.centre), torch.zeros_like(self.precision)
        for part in self.parts:
            gradients, roots = self.expanded(z, part)
            gradient += gradients.sum(0)
            curvature += roots.flatten(0, 1).T @ roots.flatten(0, 1)
        both = self.world.sum(torch.cat([gradient.unsqueeze(0), curvature]))
        return both[0], both[1:]

    def minimum(self, z: Tensor) -> Tensor:
        """From z downhill by Newton's method, with the Fisher information as the curvature."""
        loss = self.loss(z)
        if not abs(loss) < float("inf"):
            raise ValueError(
                "the likelihood of these points is no finite number: leave out those with extreme targets or weights."
            )
        for _ in range(MOST_STEPS):
            gradient, curvature = self.information(z)
            gradient = gradient + self.precision @ (z - self.centre)
            step = torch.linalg.solve(curvature + self.precision, gradient)
            promised = float(gradient @ step)
            if not promised > DONE * max(1.0, abs(loss)):
                break
            size = 1.0
            while (new := self.loss(z - size * step)) > loss + ROUNDING * abs(loss) or new != new:
                size /= 2
                if size < 1e-9:
                    return z
            z, loss = z - size * step, new
        return z

    def left_out(self, z: Tensor, information: Tensor) -> Tensor:
        """What z would be without the sample of each row, (n, k): one step of Newton's method from the minimum.

        For a Gaussian likelihood it is exact (compare Beirami et al. 2017; Rad and Maleki 2020). `information` is the
        curvature at z, (k, k).
        """
        curvature = information + self.precision
        found = [z.new_zeros(0, len(z))]
        for part in self.parts:
            gradients, roots = self.expanded(z, part)
            samples = _numbered(self.points.rows(part))
            count = int(samples[-1]) + 1
            gradient = z.new_zeros(count, len(z)).index_add_(0, samples, gradients)
            squares = torch.einsum("nck,ncl->nkl", roots, roots)
            square = z.new_zeros(count, len(z), len(z)).index_add_(0, samples, squares)
            step = torch.linalg.solve(curvature - square, gradient.unsqueeze(-1)).squeeze(-1)
            found.append((z + step)[samples])
        return torch.cat(found)

    def outputs_left_out(self, z: Tensor, information: Tensor) -> Tensor:
        """Outputs before the temperature, (n, C), where the sample of each row has been left out."""
        everywhere = self.left_out(z, information)
        found = [self.outputs(everywhere[part], part)[1] for part in self.parts]
        return torch.cat([self.points.logits[:0].double(), *found])

    def _losses(self, some: Observations, outputs: Tensor) -> Tensor:
        assert some.weights is not None
        return -some.weights.double() * self.likelihood.log_prob(outputs, some.targets)

    def _tempered(self, logits: Tensor, log_temperature: Tensor) -> Tensor:
        nothing = logits.new_zeros(1)
        return self.likelihood.tempered(Gaussian(logits, nothing, nothing), log_temperature.exp()).mean

    def _derivative(self, some: Observations, logits: Tensor, z: Tensor) -> Tensor:
        """Of the outputs at the temperature in z, (n, C, k)."""
        log_temperature = z[self.rank :] if self.free else self.fixed
        along = Gaussian(logits, some.features, some.features)
        tempered = self.likelihood.tempered(along, log_temperature.exp())
        assert isinstance(tempered, Gaussian)
        inside = tempered.factor
        if not self.free:
            return inside
        tangent = torch.ones_like(log_temperature)
        by_temperature = jvp(lambda t: self._tempered(logits, t), (log_temperature,), (tangent,))[1]
        return torch.cat([inside, by_temperature.unsqueeze(-1)], -1)


def learn(
    points: Observations,
    prior: Posterior,
    likelihood: Likelihood,
    *,
    predictive: str,
    draws: Tensor,
    drift: float | None = None,
    drifts: bool = True,
    world: World | None = None,
) -> tuple[Posterior, float, float, Observations]:
    """Update w ~ N(m₀, S₀) by labelled points, after it has drifted: with the prior N(m₀, λ S₀ + τ I).

    The drift τ is the variance by which every parameter may have moved between the data of the fit and the points, as
    the process noise of a Kalman filter. With τ = 0 and λ = 1 this is Bayes' rule. S₀ is what suits the variance of
    predictions, which may be too much for a mean to move by: with λ < 1 it moves less, while the covariance is as with
    λ = 1. If τ is not given, the priors of `REACHES` and drifts from small to large are tried. The first is taken with
    which the points, each without its sample (`Problem.left_out`), are predicted as well as with the best, but for
    `CAUTION` standard errors; and a drift only if it predicts better by `EVIDENT` of them than all that have none.
    The temperature is chosen again, too: together with w for each prior, so that no drift is taken for the sake of a
    temperature, and at last for the predictive that is used. Of fewer than `ENOUGH` points neither of them is.

    Args:
        points: rows, with features along the K directions and the m probes.
        prior: the posterior before them.
        likelihood: of the points.
        predictive: how the posterior is integrated over.
        draws: (S, K + m) standard normal numbers.
        drift: τ, or None to choose it.
        drifts: whether there may be one at all, if it is not given.
        world: the processes that share the points; these are then this one's share.

    Returns:
        the posterior after them, λ, τ, and the points with outputs as they are predicted without their sample.
    """
    world, rank = world or World(), len(prior.curvature)
    points = points if points.weights is not None else points._replace(weights=torch.ones_like(points.logits[:, 0]))
    inside = points._replace(features=points.features[..., :rank])
    count = int(world.sum(torch.tensor(num_samples(points))))
    variances, directions = prior.principal()
    centre = torch.zeros_like(variances) if prior.mean is None else prior.mean
    chosen = drift is None
    tempers = chosen and drifts and count >= ENOUGH and likelihood.has_temperature
    free = tempers and not likelihood.temperature_is_noise

    def precision(reach: float, by: float) -> Tensor:
        return directions / (reach * variances + by) @ directions.T

    def problem(reach: float, by: float) -> Problem:
        return Problem(inside, likelihood, centre, precision(reach, by), prior.temperature, free=free, world=world)

    tried = [(reach, 0.0) for reach in REACHES] if chosen else [(1.0, drift or 0.0)]
    if chosen and drifts and count >= ENOUGH:
        tried += [(1.0, by) for by in _drifts(problem(1.0, 0.0))]
    fewer, found, z = _fewer(draws, points, world), [], centre
    for reach, by in tried:
        of = problem(reach, by)
        z = of.minimum(of.near(z))
        _, information = of.information(z)
        unseen = points._replace(logits=of.outputs_left_out(z, information))
        after = replace(
            prior,
            mean=centre if reach == REACHES[0] else z[:rank],
            precision=information[:rank, :rank] + precision(1.0, by),  # of w, at this temperature
            temperature=z[rank:].exp().squeeze() if of.free else prior.temperature,
        )
        found.append((after, unseen))
    best = 0
    if chosen:
        losses = [_all_predicted(some, posterior, likelihood, predictive, fewer) for posterior, some in found]
        best = _choice(losses, len(REACHES), points, count, world)
    (reach, by), (after, unseen) = tried[best], found[best]
    if tempers:
        after = replace(after, temperature=_temperature(unseen, after, likelihood, predictive, fewer, prior, world))
    return after, reach, by, unseen


def _all_predicted(
    points: Observations, posterior: Posterior, likelihood: Likelihood, predictive: str, draws: Tensor
) -> Tensor:
    """−log p of each row times its weight, (n,), by the predictive around the points' outputs."""
    parts = [_predicted(some, posterior, likelihood, predictive, draws) for some in _in_parts(points, draws)]
    return torch.cat([draws.new_zeros(0), *parts])


def _predicted(
    points: Observations, posterior: Posterior, likelihood: Likelihood, predictive: str, draws: Tensor
) -> Tensor:
    """The same of so few rows that all draws of them are."""
    gaussian = Gaussian(points.logits.double(), posterior.factor(points.features.double()), draws)
    losses = likelihood.nll(likelihood.predict(gaussian, predictive, posterior.temperature), points.targets)
    return losses if points.weights is None else points.weights.double() * losses


def _fewer(draws: Tensor, points: Observations, world: World) -> Tensor:
    """As many of them as choosing can do with."""
    numbers = int(world.sum(torch.tensor(points.logits.numel())))
    return draws[: max(MIN_DRAWS, TUNING_BUDGET // max(1, numbers))].double()


def _in_parts(points: Observations, draws: Tensor) -> Iterator[Observations]:
    """Some rows at a time, as many as all draws of them allow."""
    size = chunks(points.logits).tuning // (points.logits.shape[1] * max(draws.shape))
    yield from map(points.rows, slices(len(points.logits), size))


def _choice(losses: list[Tensor], plain: int, points: Observations, count: int, world: World) -> int:
    """Which of several priors, from narrow to wide, by the losses of rows, (n,); the first `plain` have no drift."""

    def first(most: int) -> tuple[int, Tensor]:
        totals = [float(world.sum(loss.sum())) for loss in losses[:most]]
        least = losses[totals.index(min(totals))]
        worse = (_standard_errors(loss - least, points, count, world) for loss in losses[:most])
        return next(i for i, errors in enumerate(worse) if errors <= CAUTION), least

    (without, least), (best, lowest) = first(plain), first(len(losses))
    return best if best < plain or _standard_errors(least - lowest, points, count, world) >= EVIDENT else without


def gain(
    points: Observations,
    left_out: Observations,
    posterior: Posterior,
    likelihood: Likelihood,
    predictive: str,
    draws: Tensor,
    world: World,
) -> float:
    """How many standard errors better points are predicted around other outputs."""
    draws = _fewer(draws, points, world)
    before, after = (_all_predicted(some, posterior, likelihood, predictive, draws) for some in (points, left_out))
    return _standard_errors(before - after, points, int(world.sum(torch.tensor(num_samples(points)))), world)


def figures_of(
    points: Observations, posterior: Posterior, likelihood: Likelihood, predictive: str, draws: Tensor
) -> dict[str, float]:
    """What a likelihood's metrics say of a posterior's predictions at some points."""
    summaries = []
    for some in _in_parts(points, draws):
        gaussian = posterior.outputs(some.logits.to(draws), some.features.to(draws), draws)
        prediction = likelihood.predict(gaussian, predictive, posterior.temperature.to(draws))
        summaries.append(likelihood.summary(prediction, some.targets))
    return likelihood.figures(torch.cat(summaries), points.targets, points.logits.shape[1])


def _whole_samples(points: Observations, size: int) -> list[slice]:
    """Rows in pieces of `size` or so, none of which ends within a sample: rows of one lie together."""
    parts, start, end = [], 0, 0
    for count in _numbered(points).bincount().tolist():
        if end > start and end + count - start > size:
            parts.append(slice(start, end))
            start = end
        end += count
    return [*parts, slice(start, end)] if end else []


def _numbered(points: Observations) -> Tensor:
    """Of each row the number of its sample, (n,), from zero on."""
    if points.samples is None:
        return torch.arange(len(points.logits), device=points.logits.device)
    return points.samples.unique(return_inverse=True)[1].to(points.logits.device)


def num_samples(points: Observations) -> int:
    """Samples."""
    return len(points.logits) if points.samples is None else len(points.samples.unique())


def _standard_errors(change: Tensor, points: Observations, count: int, world: World) -> float:
    """How many standard errors the mean change of the samples' losses is above zero, from that of rows, (n,)."""
    by_sample = change.new_zeros(num_samples(points)).index_add_(0, _numbered(points), change)
    total, square = world.sum(torch.stack([by_sample.sum(), by_sample.square().sum()])) / max(1, count)
    return float(total / ((square - total.square()) / max(1, count)).clamp_min(1e-30).sqrt())


def _drifts(problem: Problem) -> list[float]:
    """Round numbers around the drift that changes the loss of a row by a nat or so."""
    information = problem.information(problem.centre)[1].diagonal().sum()
    rows = problem.world.sum(torch.tensor(len(problem.points.logits)))
    if not information > 0:
        return []
    one = log10(float(rows / information))
    steps = range(floor(EACH * (one + WEAKEST)), ceil(EACH * (one + STRONGEST)) + 1)
    return [10 ** (step / EACH) for step in steps]


def _temperature(
    points: Observations,
    posterior: Posterior,
    likelihood: Likelihood,
    predictive: str,
    draws: Tensor,
    prior: Posterior,
    world: World,
) -> Tensor:
    """With the lowest NLL of the predictive, at points whose outputs are those without their sample."""
    start = posterior.temperature

    def loss_and_gradient(step: Tensor) -> tuple[Tensor, Tensor]:
        step = step.detach().requires_grad_()
        found = step.new_zeros(2)
        with torch.enable_grad():
            for some in _in_parts(points, draws):
                at = replace(posterior, temperature=start * step.exp().squeeze())
                total = _predicted(some, at, likelihood, predictive, draws).sum()
                found += torch.cat([total.detach().view(1), *torch.autograd.grad(total, step)])
        away = step.detach() + (start / prior.temperature).log()
        loss, gradient = world.sum(found)
        return loss + (away / WIDTH).square().sum() / 2, gradient.view(1) + away / WIDTH**2

    step = minimise(loss_and_gradient, torch.zeros(1, dtype=torch.float64, device=start.device))
    return start * step.exp().squeeze()
