"""The Gaussian over the coordinates of the basis and of the probes, and the choice of its scales on unseen points."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, floor, log10

import torch
from torch import Tensor

from .batches import slices
from .chunks import chunks
from .distributed import World
from .likelihoods import Likelihood
from .numerics import centred
from .observations import Observations
from .predictions import Gaussian

log = logging.getLogger(__name__)

SCALES = ("prior_variance", "covariance_scale", "residual_scale", "temperature")
TUNING_BUDGET = 2**22  # logits sampled for one candidate
# With fewer, the temperature does what the variances should: they would follow the draws, not the points.
MIN_DRAWS = 64
MANY = 1000  # outputs from which on float32 will do: its rounding evens out in sums over so many
LONG = 2**24  # logits sampled for one candidate: choosing takes seconds
TOP = 100  # outputs, that may be kept where there are more
# Standard deviations, in e-folds, of a normal prior on each scale around its start: what the points cannot tell stays
# there, and a few points that are all right do not make the network as sure as can be.
WIDTHS = {"prior_variance": 3.0, "covariance_scale": 3.0, "residual_scale": 3.0, "temperature": 1.0}
NEAR = 0.15  # the same of a temperature that is known from all outputs
# Standard errors that the NLL may rise for more variance outside the span. On two ResNet-20s, calibrated on 1,000 and
# 3,000 images, a whole one costs up to .6 % of the NLL on images like those, and gains 1 to 2 % on corrupted ones.
CAUTION = 0.5
RANGE = 20.0  # e-folds that a scale may move from its start
ENOUGH = 30  # points that a standard error can be had from
RISE = 3.0  # e-folds that the residual scale may rise after that
FLAT = 1e-12  # of the largest eigenvalue: a direction that has less is one that the data say nothing of
STEPS = 100  # of an e-fold: rounded to them, the scales do not hang on the order of a sum


@dataclass(frozen=True)
class Posterior:
    """Logits f(x) + Ψ w + Ψ⊥ v with w ~ N(m, S), S = s A⁻¹, A = H + I/σ₀², and v ~ N(0, r I).

    Ψ = J V are the features along the basis, of which H is the curvature (K, K); Ψ⊥ those along m probes, with
    E[Ψ⊥ Ψ⊥ᵀ] = J Jᵀ − Ψ Ψᵀ. Probabilities are those of the logits divided by the temperature T. The mean m is zero, and
    S as above, until the posterior has learnt from labelled points (`learning.py`).
    """

    curvature: Tensor
    prior_variance: Tensor  # σ₀²
    covariance_scale: Tensor  # s
    residual_scale: Tensor  # r
    temperature: Tensor  # T
    softened: bool = field(default=False, kw_only=True)  # whether T divides H, as the variance of noise does
    spectrum: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True, repr=False)  # of H, if it is known
    mean: Tensor | None = field(default=None, kw_only=True)  # m, (K,)
    precision: Tensor | None = field(default=None, kw_only=True)  # S⁻¹, (K, K), where points were learnt

    def root(self) -> Tensor:
        """R (K, K) with R Rᵀ = S, float64: the symmetric one, which does not hang on the signs of eigenvectors."""
        variances, eigenvectors = self.principal()
        return eigenvectors * variances.sqrt() @ eigenvectors.T

    def principal(self) -> tuple[Tensor, Tensor]:
        """Principal variances of S, (K,), and their directions, (K, K)."""
        known = self.spectrum if self.precision is None else None
        matrix = self.curvature if self.precision is None else self.precision
        eigenvalues, eigenvectors = known or torch.linalg.eigh(matrix)
        # One that rounding hides may be as large as that; as zero it would make a direction free that the data fix.
        hidden = (eigenvalues[-1] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps).clamp_min(0)
        eigenvalues = eigenvalues.maximum(hidden)
        if self.precision is not None:
            return 1 / eigenvalues, eigenvectors
        eigenvalues = eigenvalues / self.temperature if self.softened else eigenvalues
        return self.covariance_scale / (eigenvalues + 1 / self.prior_variance), eigenvectors

    def covariance(self) -> Tensor:
        """S, (K, K)."""
        return self.root() @ self.root().T

    def outputs(self, logits: Tensor, features: Tensor, draws: Tensor) -> Gaussian:
        """Of inputs with the network's outputs (B, C) and features [Ψ, Ψ⊥] (B, C, K + m)."""
        mean = logits if self.mean is None else logits + features[..., : len(self.mean)] @ self.mean.to(features)
        return Gaussian(mean, self.factor(features), draws)

    def to(self, move: Callable[[Tensor], Tensor]) -> "Posterior":
        """With what `move` makes of its tensors."""
        names = ("curvature", "mean", "precision", *SCALES)
        return replace(self, spectrum=None, **{n: None if (t := getattr(self, n)) is None else move(t) for n in names})

    def factor(self, features: Tensor) -> Tensor:
        """F (B, C, K + m) with F Fᵀ the covariance of the logits, from features [Ψ, Ψ⊥] (B, C, K + m)."""
        rank = len(self.curvature)
        inside, outside = features[..., :rank], features[..., rank:]
        return torch.cat([inside @ self.root().to(features), outside * self.residual_scale.sqrt().to(features)], -1)

    def coordinates(self, draws: Tensor) -> Tensor:
        """Coordinates [w, v] along the basis and the probes, (S, K + m), from standard normal draws (S, K + m)."""
        rank = len(self.curvature)
        inside, outside = draws[..., :rank], draws[..., rank:]
        return torch.cat([inside @ self.root().to(draws), outside * self.residual_scale.sqrt().to(draws)], -1)


def calibrate(
    points: Observations,
    curvature: Tensor,
    likelihood: Likelihood,
    *,
    predictive: str,
    draws: Tensor,
    given: Mapping[str, float | None],
    near: float | None = None,
    world: World | None = None,
) -> Posterior:
    """Choose the scales with the lowest NLL on unseen points, then as much variance outside the span as they allow.

    Works on cached features alone, by the predictive that is used later, and follows the gradient in the scales'
    logarithms. Points like those of the training say little of the variance outside the span, which matters away from
    them: of the residual scales that the points do not refuse, by `CAUTION` standard errors of the change in NLL, the
    largest is taken (compare the one-standard-error rule of Breiman et al. 1984).

    Args:
        points: outputs and features, along the basis and the probes, at the calibration points, and their targets; on
            the device of the curvature, or on the CPU, from where some go there at a time.
        curvature: H, (K, K).
        likelihood: gives the NLL.
        predictive: how the posterior is integrated over.
        draws: (S, K + m) standard normal numbers; as many are used as `TUNING_BUDGET` allows, `MIN_DRAWS` at least.
        given: the scales that are fixed, by name; None where they are to be chosen.
        near: a temperature to stay near, where outputs were put together at it: what these would lose is not seen.
        world: the processes that share the calibration points; the arguments are then this one's share.
    """
    world = world or World()
    points = points if points.weights is None else points.rows(points.weights > 0)
    logits, features, weights = points.logits, points.features, points.weights
    weights = logits.new_ones(len(logits)) if weights is None else weights
    count = int(world.sum(torch.tensor(len(logits))))
    points = points._replace(weights=weights.double() / world.sum(weights.double().sum()) * count)  # one on average
    draws = draws.to(curvature.device)
    width = points.num_views * logits.shape[1]
    draws = draws[: max(MIN_DRAWS, TUNING_BUDGET // (count * width))]
    # In float64: where the loss is flat, the rounding of float32 would decide where the search ends.
    draws, tolerance = (draws.float(), 1e-7) if logits.shape[1] >= MANY else (draws.double(), 1e-13)
    if count * width * len(draws) >= LONG:
        faster = f", which is faster with top_outputs={TOP}" if likelihood.one_of_many and logits.shape[1] > TOP else ""
        log.info("ELLA: choosing the scales on %d points of %d outputs%s.", count, logits.shape[1], faster)
    start = _start(points, curvature, likelihood, given, count, world)
    widths = WIDTHS
    if near is not None and given.get("temperature") is None:
        start = replace(start, temperature=torch.full_like(start.temperature, near))
        widths = WIDTHS | {"temperature": NEAR}
    free = free_scales(given, features, curvature, likelihood)
    precision = torch.tensor([widths[name] ** -2 / count for name in free]).to(curvature)
    parts = slices(len(logits), chunks(curvature).tuning // (width * max(draws.shape)))

    def posterior(steps: Tensor) -> Posterior:
        """The start, its free scales multiplied by the exponentials of `steps`."""
        factors = steps.clamp(-RANGE, RANGE).exp()
        return replace(start, **{name: getattr(start, name) * by for name, by in zip(free, factors, strict=True)})

    def losses(steps: Tensor, part: slice) -> Tensor:
        chosen, some = posterior(steps), points.rows(part).to(curvature.device)
        # Samples alone come from the features at once, without a factor of their own.
        coordinates = chosen.coordinates(draws) if likelihood.sees_samples_only(predictive) else None

        def gaussian(mean: Tensor, features: Tensor) -> Gaussian:
            mean, along = mean.to(draws), features.to(draws)
            if coordinates is None:
                return Gaussian(mean, chosen.factor(along), draws)
            return Gaussian(mean, along, coordinates)

        prediction = likelihood.predict(some.outputs(gaussian), predictive, chosen.temperature.to(draws))
        assert some.weights is not None
        return some.weights * likelihood.nll(prediction, some.targets)

    def loss_and_gradient(steps: Tensor) -> tuple[Tensor, Tensor]:
        steps = steps.detach().requires_grad_()
        found = steps.new_zeros(1 + len(free))
        with world.together("the calibration"), torch.enable_grad():
            for part in parts:
                total = losses(steps, part).sum() / count
                found += torch.cat([total.detach().view(1), *torch.autograd.grad(total, steps)])
        pull = precision * steps.detach()
        loss, *gradient = world.sum(found) + torch.cat([(pull @ steps.detach() / 2).view(1), pull])
        return loss, torch.stack(gradient)

    def all_losses(steps: Tensor) -> Tensor:
        with world.together("the calibration"):
            return torch.cat([steps.new_empty(0), *(losses(steps, part) for part in parts)])

    def standard_errors(change: Tensor) -> float:
        """How many standard errors the mean change of the points' losses is above zero."""
        total, square = world.sum(torch.stack([change.sum(), change.square().sum()])) / count
        return float(total / ((square - total.square()) / count).clamp_min(1e-30).sqrt())

    start_at = torch.zeros(len(free), dtype=torch.float64, device=curvature.device)
    best = minimise(loss_and_gradient, start_at, tolerance)
    if "residual_scale" in free and count >= ENOUGH:
        axis = torch.tensor([name == "residual_scale" for name in free]).to(best)
        lowest = all_losses(best)
        best += axis * largest(lambda by: standard_errors(all_losses(best + by * axis) - lowest) <= CAUTION, RISE)
    return posterior((best * STEPS).round() / STEPS)


def free_scales(
    given: Mapping[str, float | None], features: Tensor, curvature: Tensor, likelihood: Likelihood
) -> list[str]:
    """Names of the scales to choose: those that are not given, and that do something."""
    idle = set() if features.shape[2] > len(curvature) else {"residual_scale"}
    idle |= set() if likelihood.has_temperature else {"temperature"}
    return [name for name in SCALES if given.get(name) is None and name not in idle]


def prior_by_evidence(curvature: Tensor, outside: Tensor, dimensions: int, weights: Iterable[Tensor]) -> float:
    """σ₀² with the highest marginal likelihood, for want of unseen points (MacKay 1992).

    Laplace's log p(D) is, but for what does not depend on σ₀², −½ ‖θ‖² / σ₀² − ½ log det(I + σ₀² GGN). Of the GGN the
    part in the span is known, H, and of the rest its trace, which is spread evenly: the determinant's upper bound.

    Args:
        curvature: H, (K, K).
        outside: the trace of the GGN outside the span, ().
        dimensions: how many it is spread over.
        weights: θ, the parameters taken into account.
    """
    eigenvalues = torch.linalg.eigvalsh(curvature).clamp_min(0)
    each = outside / max(1, dimensions)
    most, total = float(eigenvalues.max().maximum(each)), float(eigenvalues.sum() + outside)
    weights_squared = sum(float(part.double().square().sum()) for part in weights)
    if not total > 0:
        return weights_squared or 1.0  # the data say nothing, in any unit
    weights_squared = max(weights_squared, 1e-16 / most)  # a prior of less is none
    # At the best one ‖θ‖² / σ₀² = Σ σ₀² λ / (1 + σ₀² λ), which is at most σ₀² Σ λ and at least Σ λ / (1/σ₀² + max λ).
    lowest = (weights_squared / total) ** 0.5
    highest = lowest + weights_squared * most / total
    exponents = torch.arange(floor(100 * log10(lowest)), ceil(100 * log10(highest)) + 1, device=curvature.device)
    variances = 10 ** (exponents.double() / 100).unsqueeze(1)
    inside = (variances * eigenvalues).log1p().sum(1, keepdim=True)
    rest = dimensions * (variances * each).log1p()
    return float(variances[(weights_squared / variances + inside + rest).argmin()])


def minimise(
    loss_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, tolerance: float = 1e-13
) -> Tensor:
    """Follow the gradient downhill (L-BFGS), until a step changes loss or point by less than `tolerance`."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=60, tolerance_grad=1e-9, tolerance_change=tolerance, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss, point.grad = loss_and_gradient(point)
        return loss

    if len(start):
        optimizer.step(closure)  # type: ignore[arg-type] - a loss as a tensor is what it documents
    return point.detach()


def largest(accepted: Callable[[float], bool], highest: float, steps: int = 12) -> float:
    """The largest number up to `highest` that is accepted, if all below it are, by halving the interval."""
    low, high = 0.0, highest
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(middle) else (low, middle)
    return low


def _start(
    points: Observations,
    curvature: Tensor,
    likelihood: Likelihood,
    given: Mapping[str, float | None],
    count: int,
    world: World,
) -> Posterior:
    """The given scales; for the others, a prior like the curvature, variances of one at the mean logit, and T = 1.

    Where outputs have a unit, a variance of one would be of any size: as much as that of the noise, then.
    """

    def scale(name: str, otherwise: Tensor | float) -> Tensor:
        value = given.get(name)
        return torch.as_tensor(otherwise if value is None else value, dtype=torch.float64, device=curvature.device)

    def inverse(variance: Tensor) -> Tensor:
        return torch.where(variance > 0, 1 / variance, 1)

    one = curvature.new_ones(())
    eigenvalues, _ = spectrum = torch.linalg.eigh(curvature)
    least = eigenvalues[-1] * FLAT if eigenvalues[-1] > 0 else one
    prior = scale("prior_variance", 1 / eigenvalues.clamp_min(least).log().mean().exp())
    unscaled = Posterior(curvature, prior, one, one, one, spectrum=spectrum)
    squares = curvature.new_zeros(points.features.shape[2])  # (K + m,)
    for part in slices(len(points.logits), chunks(curvature).tuning // max(1, points.features[:1].numel())):
        some = points.rows(part).to(curvature.device)
        units = likelihood.information(some.logits.double()).sqrt() if likelihood.has_units else one
        features = centred(some.features) if likelihood.invariant else some.features
        squares += (units.unsqueeze(-1) * unscaled.factor(features.double())).square().sum((0, 1))
    rank = len(curvature)
    sums = world.sum(torch.stack([squares[:rank].sum(), squares[rank:].sum()]))
    inside, outside = (inverse(total / (count * points.features.shape[1])) for total in sums)
    return Posterior(
        curvature,
        prior,
        scale("covariance_scale", inside),
        scale("residual_scale", outside),
        scale("temperature", 1.0),
        softened=likelihood.temperature_is_noise,
        spectrum=spectrum,
    )
