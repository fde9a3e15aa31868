"""Random directions outside the span of the basis: what the rank-K covariance leaves out, without bias.

Probes are made from a seed when a predictor is made, held beside the basis, and never written to a file.
"""

import sys

import torch
from torch import Tensor

from .numerics import exact

FEWEST = 10  # a single variance is then off by 45 % (standard deviation), and novelty, a sum over outputs, by less


def num_probes(residual: str | int, rank: int, *, reverse: bool, most: int = sys.maxsize) -> int:
    """m: none, as many as given, or as many as are cheap and no more than `most`, which the memory has a place for.

    In forward mode a probe costs as much as a direction of the basis: half as many. In reverse mode it costs less:
    twice as many. Never fewer than `FEWEST`: novelty would be noise.
    """
    if isinstance(residual, int):
        return residual
    return {"none": 0, "auto": max(FEWEST, min(most, 2 * rank if reverse else rank // 2))}[residual]


def random_signs(count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Random −1 and 1, (count,) int8, the same on every device: 64 from each number that the generator draws."""
    words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 64),), generator=generator)
    bits = words.view(torch.uint8).to(device).unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=device)
    return bits.bitwise_and_(1).flatten()[:count].to(torch.int8).mul_(2).sub_(1)


def with_probes(basis: dict[str, Tensor], count: int, seed: int) -> dict[str, Tensor]:
    """Put `count` = m probes after the K directions of the basis V, in place: name -> (K + m, *shape).

    A probe is (I − V Vᵀ) ε / √m with random signs ε, so the products with them, Ψ⊥ (B, C, m), are of the size of what
    lies outside: E[Ψ⊥ Ψ⊥ᵀ] = J Jᵀ − Ψ Ψᵀ. A single variance has the relative standard deviation √(2/m).
    """
    if not count:
        return basis
    generator = torch.Generator().manual_seed(seed)
    rank = len(next(iter(basis.values())))
    try:
        with exact():
            return _outside(basis, rank, count, generator)
    except torch.OutOfMemoryError as error:
        error.add_note(
            "ELLA: directions and probes do not fit: pass basis_precision='bf16', or a lower rank= or residual="
        )
        raise


def _outside(basis: dict[str, Tensor], rank: int, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    overlap = torch.zeros(())
    for name in sorted(basis):  # a file may have another order
        part = basis[name]
        signs = random_signs(count * part[0].numel(), generator, part.device).view(count, *part.shape[1:])
        basis[name] = torch.cat([part, signs.to(part).div_(count**0.5)])
        inside, outside = _halves(basis[name], rank)
        overlap = overlap + outside @ inside.T  # (m, K)
    for part in basis.values():
        inside, outside = _halves(part, rank)
        part[rank:] = (outside - overlap.to(inside) @ inside).view_as(part[rank:])
    return basis


def _halves(tangents: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(K, p) and (m, p), in float32 at least."""
    precise = tangents.reshape(len(tangents), -1).to(torch.promote_types(tangents.dtype, torch.float32))
    return precise[:rank], precise[rank:]


def novelty(features: Tensor, rank: int, *, centred: bool = True) -> Tensor:
    """The share of an input's kernel that lies outside the span of the basis, (B,) in [0, 1].

    tr(Ψ⊥ Ψ⊥ᵀ) / tr(Ψ Ψᵀ + Ψ⊥ Ψ⊥ᵀ), from features (B, *, C, K + m), centred over the C outputs where only their
    differences count. Near one for inputs that the landmarks tell nothing about: a score for out-of-distribution
    detection.
    """
    features = features - features.mean(-2, keepdim=True) if centred else features
    flat = features.flatten(1, -2)
    flat = flat / flat.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)  # squares overflow
    squares = flat.square().sum(1)  # (B, K + m)
    return squares[:, rank:].sum(1) / squares.sum(1).clamp_min(torch.finfo(squares.dtype).tiny)
