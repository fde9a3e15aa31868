"""From gradients at the landmarks to V, the leading directions of the neural tangent kernel in parameter space.

Memory beside the result, K x P numbers: the M x P rows where they fit the budget; where they do not, their sketches
(M x d numbers and P signs) and a chunk of rows, at the price of a second pass over the landmarks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .engine import give_back

log = logging.getLogger(__name__)

COLUMNS = 2**13  # of R are multiplied in its own precision before they are added up in float64
ROWS = 256  # of R Rᵀ at a time
SKETCH_PER_LANDMARK = 16  # d / M, at most
SKETCH_PER_DIRECTION = 10  # d / K, at least

Gradients = Iterator[dict[str, Tensor]]  # chunks of landmarks: parameter name -> (b, p)


class NystromBasis(NamedTuple):
    """K orthonormal directions in parameter space, and the kernel's eigenvalues along them."""

    basis: dict[str, Tensor]  # parameter name -> (K, *shape)
    eigenvalues: Tensor  # (K,) float64, of the kernel: those of the Gram matrix / M, descending


def nystrom_basis(
    gradients: Callable[[], Gradients],
    parameters: Mapping[str, Tensor],
    num_landmarks: int,
    rank: int,
    *,
    memory_budget: int,
    seed: int = 0,
) -> NystromBasis:
    """Nyström basis V = Rᵀ U Λ^(-1/2) of the kernel, R the landmarks' gradients (Deng, Zhou and Zhu 2022).

    U are the leading eigenvectors of the Gram matrix R Rᵀ, or of that of random sketches of the rows if R does not fit.
    Either way Rᵀ U is exact and V comes from a Rayleigh-Ritz step on it: it is orthonormal, and the eigenvalues
    are those of the exact Gram matrix within the span.

    Args:
        gradients: starts a pass over the M landmarks.
        parameters: name -> value, in the order that the gradients have.
        num_landmarks: M.
        rank: K, how many directions to keep; fewer are kept where the kernel's numerical rank is lower.
        memory_budget: bytes for the rows or their sketches.
        seed: fixes the sketches.

    Raises:
        ValueError: if a gradient is NaN or infinite, or all of them are zero.
    """
    sketch_size = sketch_numbers(num_landmarks, parameters, rank, memory_budget)
    if sketch_size is None:
        held = _hold(gradients(), parameters, num_landmarks)  # R, (M, P)
        gram, again = _gram(held), lambda: _split(held, parameters)
    else:
        sketch = Sketch(parameters, sketch_size, seed)
        log.info(
            "ELLA: %d gradients of %d numbers do not fit the memory budget of %.1f GB; they are computed twice, and "
            "compared by sketches of %d numbers.",
            *(num_landmarks, _size(parameters), memory_budget / 1e9, sketch.size),
        )
        gram, again = _gram(torch.cat([sketch(chunk) for chunk in gradients()])), gradients
    eigenvalues, eigenvectors = _leading(gram, rank, torch.finfo(next(iter(parameters.values())).dtype).eps)
    del gram
    give_back()
    combined = _combine(again(), (eigenvectors / eigenvalues.sqrt()).T, parameters)
    return _rayleigh_ritz(combined, eigenvalues, num_landmarks)


class Sketch:
    """Random projection (b, P) -> (b, d) that keeps inner products on average: coordinates are signed and folded.

    The variance of an inner product is that of a CountSketch (Charikar et al. 2002): about |a|² |b|² / d.
    """

    def __init__(self, parameters: Mapping[str, Tensor], size: int, seed: int):
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self.signs, self.shifts = {}, {}
        for name, parameter in parameters.items():
            signs = torch.randint(2, (parameter.numel(),), generator=generator, dtype=torch.int8)
            self.signs[name] = signs.mul_(2).sub_(1).to(parameter.device)
            self.shifts[name] = int(torch.randint(size, (), generator=generator))

    def __call__(self, chunk: dict[str, Tensor]) -> Tensor:
        """Sketch the rows of a chunk, (b, d)."""
        total: Tensor | None = None
        for name, gradient in chunk.items():
            signed = pad(gradient * self.signs[name], (0, -gradient.shape[1] % self.size))
            folded = signed.unflatten(1, (-1, self.size)).sum(1).roll(self.shifts[name], 1)
            total = folded if total is None else total.add_(folded)
        assert total is not None
        return total


def sketch_numbers(num_landmarks: int, parameters: Mapping[str, Tensor], rank: int, memory_budget: int) -> int | None:
    """d: as much as half of the budget holds, but no more than is of use; None if the rows themselves fit it.

    Raises:
        ValueError: if the budget does not hold sketches that tell `rank` directions apart.
    """
    size, element = _size(parameters), next(iter(parameters.values())).element_size()
    if num_landmarks * size * element <= memory_budget:
        return None
    least = min(size, SKETCH_PER_DIRECTION * rank)
    affordable = memory_budget // (2 * num_landmarks * element)
    if affordable < least:
        raise ValueError(
            f"memory_budget is too small to compare {num_landmarks} landmarks' gradients of {size} numbers for rank="
            f"{rank}: pass at least memory_budget={4 * num_landmarks * element * least}, or fewer landmarks."
        )
    return min(size, affordable, SKETCH_PER_LANDMARK * num_landmarks)


def _leading(gram: Tensor, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues (K,) and eigenvectors (M, K) of a Gram matrix, none that is only rounding."""
    if not gram.isfinite().all():
        raise ValueError(
            "gradients at the landmarks are NaN or infinite: check the weights, or freeze the layers that cause it."
        )
    eigenvalues, eigenvectors = (part.flip(-1) for part in torch.linalg.eigh(gram))
    kept = int((eigenvalues[:rank] > eigenvalues[0] * len(gram) * eps).sum())
    if kept == 0:
        raise ValueError(
            "every gradient at the landmarks is zero: the network's outputs do not depend on its trainable parameters."
        )
    if kept < rank:
        log.warning("ELLA: the kernel has the numerical rank %d, so rank=%d is cut to %d.", kept, rank, kept)
    return eigenvalues[:kept], eigenvectors[:, :kept]


def _combine(chunks: Gradients, weights: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Σ_m weights[:, m] g_m: name -> (K, p), from `weights` (K, M)."""
    total = {name: value.new_zeros(len(weights), value.numel()) for name, value in parameters.items()}
    done = 0
    for chunk in chunks:
        count = len(next(iter(chunk.values())))
        part = weights[:, done : done + count]
        for name, gradient in chunk.items():
            total[name].addmm_(part.to(gradient.dtype), gradient)
        done += count
    return total


def _rayleigh_ritz(combined: dict[str, Tensor], scales: Tensor, num_landmarks: int) -> NystromBasis:
    """Orthonormalise X = Rᵀ U Λ^(-1/2), in place, and find the exact Gram matrix's eigenvalues in the span of U."""
    overlap = sum(_gram(vectors) for vectors in combined.values())  # Xᵀ X, near I
    ritz = scales.sqrt() * overlap * scales.sqrt().unsqueeze(1)  # Uᵀ R Rᵀ U
    eigenvalues, rotation = (part.flip(-1) for part in torch.linalg.eigh(ritz))
    change = (scales.sqrt().unsqueeze(1) * rotation / eigenvalues.sqrt()).T  # (K, K)
    for name, vectors in combined.items():
        combined[name] = change.to(vectors.dtype) @ vectors
    return NystromBasis(combined, eigenvalues / num_landmarks)


def _hold(chunks: Gradients, parameters: Mapping[str, Tensor], num_landmarks: int) -> Tensor:
    held = next(iter(parameters.values())).new_empty(num_landmarks, _size(parameters))
    done = 0
    for chunk in chunks:
        count = len(next(iter(chunk.values())))
        torch.cat(list(chunk.values()), dim=1, out=held[done : done + count])
        done += count
    return held


def _split(held: Tensor, parameters: Mapping[str, Tensor]) -> Gradients:
    sizes = [parameter.numel() for parameter in parameters.values()]
    yield dict(zip(parameters, held.split(sizes, dim=1), strict=True))


def _size(parameters: Mapping[str, Tensor]) -> int:
    """P."""
    return sum(parameter.numel() for parameter in parameters.values())


def _gram(rows: Tensor) -> Tensor:
    """R Rᵀ, summed in float64: long dot products in float32 would blur the small eigenvalues."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in rows.split(COLUMNS, dim=1):
        for start in range(0, len(rows), ROWS):  # the upper triangle is enough
            gram[start : start + ROWS, start:] += columns[start : start + ROWS] @ columns[start:].T
    return gram.triu() + gram.triu(1).T
