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
from .residual import random_signs

CURVATURES = ("auto", "exact", "sampled")
FEW = 100  # points whose features are cheap
POINTS_PER_DIRECTION = 25  # with fewer, the noise of random signs reaches the variances of predictions


def way(how: str, num_points: int, rank: int, likelihood: Likelihood, *, tuned: bool) -> str:
    """How the curvature of so many points is computed, "exact" or "sampled".

    Args:
        how: what was asked for; "auto" samples where there are many points for each direction.
        num_points: n.
        rank: K.
        likelihood: one without a root of its curvature cannot be sampled.
        tuned: whether scales are chosen afterwards, which evens out what noise does to all variances.

    Raises:
        ValueError: if it is to be sampled, and cannot be.
    """
    if how == "sampled" and not likelihood.has_root:
        raise ValueError(
            f"curvature='sampled' needs a root of what {type(likelihood).__name__} has as its curvature(): override "
            "rooted() instead, or pass curvature='exact'."
        )
    many = num_points > max(FEW, POINTS_PER_DIRECTION * rank)
    return how if how != "auto" else "sampled" if many and tuned and likelihood.has_root else "exact"


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

    "sampled" needs no features: with random signs s, Ψᵀ √Λᵀ s sᵀ √Λ Ψ has Ψᵀ Λ Ψ as its mean (Hutchinson 1989), for
    one backward pass a point, of however many outputs. It is unbiased, with less noise than labels that are drawn from
    p(y|x), which are nearly all the likeliest where a network is sure; and the same where √Λ is one row.

    Args:
        linearization: of the network.
        batches: inputs and targets of n of the training points, or of this process's share of them.
        basis: V.
        likelihood: what Λ is.
        num_points: N; the sum over the n points visited is scaled by N / n.
        how: "exact" or "sampled".
        seeds: (n,), of the signs that are drawn at each of all n points.
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
                signed = partial(_signed_root, linearization, likelihood, targets, weights, drawn)
                projections = linearization.projections(inputs, signed, basis)[1].double()  # (B, K)
                total += projections.T @ projections
            done += len(targets)
    return world.sum(total) * (num_points / len(seeds))


def _signed_root(
    linearization: Linearization,
    likelihood: Likelihood,
    targets: Tensor,
    weights: Tensor | None,
    seeds: Sequence[int],
    flat: Tensor,
    part: slice,
) -> Tensor:
    """√Λᵀ s, (b, D), at outputs (b, D) of some of the samples, each with signs s of its own."""
    outputs = linearization.at_positions(flat)  # (b, *, C)
    known = checked(likelihood, outputs, targets[part], linearization.axis)
    weighted = weights_of(likelihood, known, None if weights is None else weights[part])
    outputs = outputs.double()  # where a network is sure, Λ is what rounding leaves of 1 − p
    with torch.enable_grad():
        features = torch.zeros_like(outputs).unsqueeze(-1).requires_grad_()  # along one direction
        rooted = likelihood.rooted(outputs.flatten(0, -2), features.flatten(0, -3))  # (n, ·, 1)
        rooted = rooted.reshape(len(outputs), -1)
        # Drawn on the CPU: the same on every device.
        generators = (torch.Generator().manual_seed(seed) for seed in seeds[part])
        signs = torch.stack([random_signs(rooted.shape[1], generator, "cpu") for generator in generators])
        (v,) = torch.autograd.grad(rooted, features, signs.to(rooted))
    signed = shaped((v.squeeze(-1) * weighted.sqrt().to(v).unsqueeze(-1)).to(flat), linearization.axis)
    return signed.flatten(1) if signed.ndim > 1 else signed.unsqueeze(1)
