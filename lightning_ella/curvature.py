"""From features and the likelihood to H, the curvature of the loss along the basis."""

from collections.abc import Iterable

from torch import Tensor

from .likelihoods import Likelihood


def curvature(visited: Iterable[tuple[Tensor, Tensor, Tensor]], likelihood: Likelihood, num_points: int) -> Tensor:
    """Generalised Gauss-Newton matrix H = Σ_i Ψ(x_i)ᵀ Λ(x_i) Ψ(x_i), (K, K) float64 (Deng et al. 2022).

    Args:
        visited: batches of logits (B, C), features (B, C, K) and targets, over n of the training points.
        likelihood: what Λ is.
        num_points: N; the sum over the n points visited is scaled by N / n.
    """
    seen, total = 0, None
    for logits, features, targets in visited:
        likelihood.check(logits, targets)
        term = likelihood.curvature(logits.double(), features.double())
        total = term if total is None else total.add_(term)
        seen += len(logits)
    if total is None:
        raise ValueError("there is no training point to estimate the curvature from: pass num_curvature >= 1.")
    return total * (num_points / seen)
