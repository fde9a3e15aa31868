"""The Gaussian over the K coordinates of the basis, and the choice of its two scales on unseen points."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .distributed import World
from .likelihoods import Gaussian, Likelihood

PRIOR_VARIANCES = (1e-4, 1e-2, 1e0, 1e2)  # where the search for each scale starts
COVARIANCE_SCALES = (1e0, 1e1, 1e2, 1e3, 1e4)
TUNING_BUDGET = 2**22  # logits sampled for one candidate


@dataclass(frozen=True)
class Posterior:
    """N(0, s A⁻¹) with A = H + I/σ₀²: H the curvature (K, K), σ₀² the prior variance, s the covariance scale."""

    curvature: Tensor
    prior_variance: Tensor
    covariance_scale: Tensor

    def root(self) -> Tensor:
        """R (K, K) with R Rᵀ = s A⁻¹, float64: the symmetric one, which does not hang on the signs of eigenvectors."""
        eigenvalues, eigenvectors = torch.linalg.eigh(self.curvature)
        return eigenvectors * self._deviations(eigenvalues) @ eigenvectors.T

    def _deviations(self, eigenvalues: Tensor) -> Tensor:
        return (self.covariance_scale / (eigenvalues.clamp_min(0) + 1 / self.prior_variance)).sqrt()


def calibrate(
    logits: Tensor,
    features: Tensor,
    targets: Tensor,
    curvature: Tensor,
    likelihood: Likelihood,
    *,
    predictive: str,
    draws: Tensor,
    prior_variance: float | None = None,
    covariance_scale: float | None = None,
    world: World | None = None,
) -> Posterior:
    """Choose the prior variance and the covariance scale with the lowest NLL on unseen points.

    Works on cached features alone, by the predictive that is used later: a coarse grid over what is not given, then
    a compass search around its best point, in powers of ten.

    Args:
        logits: (n, C) outputs at the calibration points.
        features: (n, C, K) features there.
        targets: what belongs to them.
        curvature: H, (K, K).
        likelihood: gives the NLL.
        predictive: how the posterior is integrated over.
        draws: (S, K) standard normal numbers; as many are used as `TUNING_BUDGET` allows, 16 at least.
        prior_variance: fixes σ₀², if given.
        covariance_scale: fixes s, if given.
        world: the processes that share the calibration points; the arguments are then this one's share.
    """
    world = world or World()
    count = int(world.sum(torch.tensor(len(logits))))
    draws = draws[: max(16, TUNING_BUDGET // (count * logits.shape[1]))]
    unit = torch.ones((), dtype=torch.float64, device=curvature.device)

    def posterior(exponents: tuple[float, float]) -> Posterior:
        return Posterior(curvature, *(unit * 10.0**exponent for exponent in exponents))

    def nll(exponents: tuple[float, float]) -> float:
        with world.together("the calibration"):
            factor = features @ posterior(exponents).root().to(features.dtype)
            prediction = likelihood.predict(Gaussian(logits, factor, draws), predictive)
            total = likelihood.nll(prediction, targets).double().sum()
        return float((world.sum(total) / count).nan_to_num(torch.inf))

    def exponents(given: float | None, candidates: tuple[float, ...]) -> list[float]:
        return torch.tensor(candidates if given is None else [given]).double().log10().tolist()

    grid = product(exponents(prior_variance, PRIOR_VARIANCES), exponents(covariance_scale, COVARIANCE_SCALES))
    return posterior(compass_search(nll, list(grid), free=(prior_variance is None, covariance_scale is None)))


def compass_search(
    loss: Callable[[tuple[float, float]], float],
    starts: list[tuple[float, float]],
    free: tuple[bool, bool],
    step: float = 0.5,
    smallest_step: float = 0.03,
) -> tuple[float, float]:
    """Minimise `loss` in the plane: from the best start, step along the free axes and halve the step when stuck."""
    seen = {point: loss(point) for point in starts}
    best = min(seen, key=seen.__getitem__)
    while step > smallest_step and any(free):
        moves = [(step, 0.0), (-step, 0.0)] * free[0] + [(0.0, step), (0.0, -step)] * free[1]
        for dx, dy in moves:
            point = (best[0] + dx, best[1] + dy)
            if abs(point[0]) <= 8 and abs(point[1]) <= 8 and point not in seen:
                seen[point] = loss(point)
        nearby = min(seen, key=seen.__getitem__)
        if nearby == best:
            step /= 2
        best = nearby
    return best
