"""From features and the likelihood to H, the curvature of the loss along the basis."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .data import Inputs
from .distributed import World
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
    uniforms: Tensor,
    world: World | None = None,
) -> Tensor:
    """Generalised Gauss-Newton matrix H = Σ_i Ψ(x_i)ᵀ Λ(x_i) Ψ(x_i), (K, K) float64 (Deng, Zhou and Zhu 2022).

    "sampled" needs no features: with y drawn from the network's own p(y|x), the mean of (Vᵀ∇ log p)(Vᵀ∇ log p)ᵀ is the
    same matrix, for one backward pass a point. It is unbiased, and noisy.

    Args:
        linearization: of the network.
        batches: inputs and targets of n of the training points, or of this process's share of them.
        basis: V.
        likelihood: what Λ is.
        num_points: N; the sum over the n points visited is scaled by N / n.
        how: "exact" or "sampled".
        uniforms: (n,) in [0, 1), what the sampled labels are drawn with, of all n points.
        world: the processes that share the points.
    """
    world, rank = world or World(), len(next(iter(basis.values())))
    total = torch.zeros(rank, rank, dtype=torch.float64, device=linearization.device)
    with world.together("the curvature"):
        done, shared = 0, uniforms[world.rank :: world.size].to(total)
        for inputs, targets in batches:
            if how == "exact":
                logits, features = linearization.features(inputs, basis)
                total += likelihood.curvature(logits.double(), features.double())
            else:
                drawn = shared[done : done + len(targets)]
                score = lambda logits, drawn=drawn: likelihood.sampled_score(logits, drawn)  # noqa: E731
                logits, projections = linearization.projections(inputs, score, basis)  # (B, K)
                total += projections.double().T @ projections.double()
            likelihood.check(logits, targets)
            done += len(logits)
    return world.sum(total) * (num_points / len(uniforms))
