"""From features and the likelihood to H, the curvature of the loss along the basis."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from .batches import Batch, slices
from .chunks import chunks
from .distributed import World
from .engine import Linearization
from .likelihoods import Likelihood
from .linearize import Basis
from .observations import checked, observations, weights_of
from .predictions import shaped

CURVATURES = ("exact", "sampled")


def curvature(
    linearization: Linearization,
    batches: Iterable[Batch],
    basis: Basis,
    likelihood: Likelihood,
    num_points: int,
    *,
    how: str = "exact",
    seeds: Tensor,
    top: int | None = None,
    world: World | None = None,
) -> Tensor:
    """Generalised Gauss-Newton matrix H = Σ_i Ψ(x_i)ᵀ Λ(x_i) Ψ(x_i), (K, K) float64 (Deng, Zhou and Zhu 2022).

    "sampled" needs no features: with y drawn from the network's own p(y|x), the mean of (Vᵀ∇ log p)(Vᵀ∇ log p)ᵀ is the
    same matrix, for one backward pass a point, of however many outputs. It is unbiased, and noisy.

    Args:
        linearization: of the network.
        batches: inputs and targets of n of the training points, or of this process's share of them.
        basis: V.
        likelihood: what Λ is.
        num_points: N; the sum over the n points visited is scaled by N / n.
        how: "exact" or "sampled".
        seeds: (n,), of the targets that are drawn at each of all n points.
        top: how many outputs are kept at each position, the others as one; for "exact".
        world: the processes that share the points.
    """
    world, rank = world or World(), len(next(iter(basis.values())))
    total = torch.zeros(rank, rank, dtype=torch.float64, device=linearization.device)
    with world.together("the curvature"):
        done, shared = 0, seeds[world.rank :: world.size].tolist()
        for inputs, targets, weights in (Batch(*batch) for batch in batches):
            if how == "exact":
                for seen in observations(linearization, likelihood, Batch(inputs, targets, weights), basis, top=top):
                    for part in slices(len(seen.logits), chunks(total).features // max(1, seen.features[:1].numel())):
                        some = seen.rows(part)
                        scaled = some.features.double() * some.weights.double().sqrt().view(-1, 1, 1)  # type: ignore[union-attr]
                        total += likelihood.curvature(some.logits.double(), scaled)
            else:
                drawn = shared[done : done + len(targets)]
                scores = partial(_sampled_scores, linearization, likelihood, targets, weights, drawn)
                projections = linearization.projections(inputs, scores, basis)[1].double()  # (B, K)
                total += projections.T @ projections
            done += len(targets)
    return world.sum(total) * (num_points / len(seeds))


def _sampled_scores(
    linearization: Linearization,
    likelihood: Likelihood,
    targets: Tensor,
    weights: Tensor | None,
    seeds: Sequence[int],
    flat: Tensor,
    part: slice,
) -> Tensor:
    """Scores (b, D) of targets that the network itself gives, at its outputs (b, D) for some of the samples."""
    outputs = linearization.at_positions(flat)
    known = checked(likelihood, outputs, targets[part], linearization.axis)
    weighted = weights_of(likelihood, known, None if weights is None else weights[part])
    drawn = []
    for output, seed in zip(outputs, seeds[part], strict=True):
        generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on every device
        drawn.append(likelihood.sample(output.unsqueeze(0), generator))
    scores = likelihood.score(outputs, torch.cat(drawn)) * weighted.sqrt().to(outputs).unsqueeze(-1)
    scores = shaped(scores, linearization.axis)
    return scores.flatten(1) if scores.ndim > 1 else scores.unsqueeze(1)
