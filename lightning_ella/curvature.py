"""From features and the likelihood to H, the curvature of the loss along the basis."""

from collections.abc import Iterable

from torch import Generator, Tensor

from .data import Inputs
from .engine import Linearization
from .likelihoods import Likelihood
from .linearize import Basis

CURVATURES = ("exact", "sampled")


def curvature(
    linearization: Linearization,
    batches: Iterable[tuple[Inputs, Tensor]],
    basis: Basis,
    likelihood: Likelihood,
    num_points: int,
    *,
    how: str = "exact",
    generator: Generator,
) -> Tensor:
    """Generalised Gauss-Newton matrix H = Σ_i Ψ(x_i)ᵀ Λ(x_i) Ψ(x_i), (K, K) float64 (Deng, Zhou and Zhu 2022).

    "sampled" needs no features: with y drawn from the network's own p(y|x), the mean of (Vᵀ∇ log p)(Vᵀ∇ log p)ᵀ is the
    same matrix, for one backward pass a point. It is unbiased, and noisy.

    Args:
        linearization: of the network.
        batches: inputs and targets of n of the training points.
        basis: V.
        likelihood: what Λ is.
        num_points: N; the sum over the n points visited is scaled by N / n.
        how: "exact" or "sampled".
        generator: draws the labels that are sampled.
    """
    seen, total = 0, None
    for inputs, targets in batches:
        if how == "exact":
            logits, features = linearization.features(inputs, basis)
            term = likelihood.curvature(logits.double(), features.double())
        else:
            score = lambda logits: likelihood.sampled_score(logits, generator)  # noqa: E731
            logits, projections = linearization.projections(inputs, score, basis)  # (B, K)
            term = projections.double().T @ projections.double()
        likelihood.check(logits, targets)
        total = term if total is None else total.add_(term)
        seen += len(logits)
    assert total is not None  # num_curvature is at least 1
    return total * (num_points / seen)
