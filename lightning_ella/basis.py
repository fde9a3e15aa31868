"""From gradients at the landmarks to V, the leading directions of the neural tangent kernel in parameter space.

Memory beside the result, K x P numbers: the M x P rows where they fit the budget; where they do not, their sketches
(M x d numbers and P signs) and a chunk of rows, at the price of a second pass over the landmarks.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .distributed import World
from .memory import give_back
from .residual import random_signs

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
    world: World | None = None,
) -> NystromBasis:
    """Nyström basis V = Rᵀ U Λ^(-1/2) of the kernel, R the landmarks' gradients (Deng, Zhou and Zhu 2022).

    U are the leading eigenvectors of the Gram matrix R Rᵀ, or of that of random sketches of the rows if R does not fit.
    Either way Rᵀ U is exact and V comes from a Rayleigh-Ritz step on it: it is orthonormal, and the eigenvalues
    are those of the exact Gram matrix within the span.

    Args:
        gradients: starts a pass over the M landmarks, or over this process's share of them.
        parameters: name -> value, in the order that the gradients have.
        num_landmarks: M.
        rank: K, how many directions to keep; fewer are kept where the kernel's numerical rank is lower.
        memory_budget: bytes for the rows or their sketches.
        seed: fixes the sketches.
        world: the processes that share the landmarks.

    Raises:
        ValueError: if a gradient is NaN or infinite, or all of them are zero.
    """
    world = world or World()
    sketch_size = sketch_numbers(num_landmarks, parameters, rank, memory_budget)
    held: Tensor | None = None
    with world.together("the landmarks' gradients"):
        count = len(world.share(range(num_landmarks)))
        if sketch_size is None:
            vectors = held = _hold(gradients(), parameters, count)  # R, (M, P)
        else:
            log.info(
                "ELLA: %d gradients of %d numbers do not fit the memory budget of %.1f GB; they are computed twice, "
                "and compared by sketches of %d numbers.",
                *(num_landmarks, _size(parameters), memory_budget / 1e9, sketch_size),
            )
            vectors = _sketched(gradients(), Sketch(parameters, sketch_size, seed), count)  # (M, d)
    gram = _gram(vectors, num_landmarks, world)
    eps, device = torch.finfo(vectors.dtype).eps, vectors.device
    del vectors
    with world.together("the eigendecomposition"):
        leading = {} if gram is None else _leading(gram, rank, eps)
    del gram
    give_back()
    leading = world.tensors_from_first(leading, device)
    scales, weights = leading["eigenvalues"], leading["eigenvectors"] / leading["eigenvalues"].sqrt()  # (K,), (M, K)
    with world.together("the combination of the gradients"):
        chunks = gradients() if held is None else _split(held, parameters)
        combined = _combine(chunks, weights[world.rank :: world.size].T, parameters)
    for part in combined.values():
        world.sum(part)
    return _rayleigh_ritz(combined, scales, num_landmarks, world)


class Sketch:
    """Random projection (b, P) -> (b, d) that keeps inner products on average: coordinates are signed and folded.

    The variance of an inner product is that of a CountSketch (Charikar et al. 2002): about |a|² |b|² / d.
    """

    def __init__(self, parameters: Mapping[str, Tensor], size: int, seed: int):
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self.dtype = _type(parameters)
        self.signs, self.shifts = {}, {}
        for name, parameter in parameters.items():
            self.signs[name] = random_signs(parameter.numel(), generator, parameter.device)
            self.shifts[name] = int(torch.randint(size, (), generator=generator))

    def __call__(self, chunk: dict[str, Tensor]) -> Tensor:
        """Sketch the rows of a chunk, (b, d)."""
        total: Tensor | None = None
        for name, gradient in chunk.items():
            signed = pad(gradient.to(self.dtype) * self.signs[name], (0, -gradient.shape[1] % self.size))
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


def _leading(gram: Tensor, rank: int, eps: float) -> dict[str, Tensor]:
    """Leading eigenvalues (K,) and eigenvectors (M, K) of a Gram matrix, none that is only rounding."""
    eigenvalues, eigenvectors = _eigh(gram)
    kept = int((eigenvalues[:rank] > eigenvalues[0] * len(gram) * eps).sum())
    if kept == 0:
        raise ValueError(
            "every gradient at the landmarks is zero: the network's outputs do not depend on its trainable parameters."
        )
    if kept < rank:
        log.warning("ELLA: the kernel has the numerical rank %d, so rank=%d is cut to %d.", kept, rank, kept)
    return {"eigenvalues": eigenvalues[:kept], "eigenvectors": eigenvectors[:, :kept]}


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors whose sign does not hang on rounding."""
    eigenvalues, eigenvectors = (part.flip(-1) for part in torch.linalg.eigh(matrix))
    generic = torch.arange(1, len(matrix) + 1).cos().to(matrix)  # no symmetry of the matrix makes products with it zero
    return eigenvalues, torch.where(generic @ eigenvectors < 0, -eigenvectors, eigenvectors)


def _combine(chunks: Gradients, weights: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Σ_m weights[:, m] g_m: name -> (K, p), from `weights` (K, M)."""
    total = {name: value.new_zeros(len(weights), value.numel()) for name, value in parameters.items()}
    done = 0
    for chunk in chunks:
        count = len(next(iter(chunk.values())))
        part = weights[:, done : done + count]
        parts = {dtype: part.to(dtype) for dtype in {value.dtype for value in total.values()}}
        for name, gradient in chunk.items():
            total[name].addmm_(parts[total[name].dtype], gradient.to(total[name]))
        done += count
        chunk.clear()
    return total


def _rayleigh_ritz(combined: dict[str, Tensor], scales: Tensor, num_landmarks: int, world: World) -> NystromBasis:
    """Orthonormalise X = Rᵀ U Λ^(-1/2), in place, and find the exact Gram matrix's eigenvalues in the span of U."""
    overlap = torch.stack([_products(vectors) for vectors in combined.values()]).sum(0)  # Xᵀ X, near I
    ritz = scales.sqrt() * overlap * scales.sqrt().unsqueeze(1)  # Uᵀ R Rᵀ U
    eigenvalues, rotation = _eigh(ritz)
    change = (scales.sqrt().unsqueeze(1) * rotation / eigenvalues.sqrt()).T.contiguous()  # (K, K)
    world.from_first(change)  # so that all have the same V to the last bit
    for name, vectors in combined.items():
        combined[name] = change.to(vectors.dtype) @ vectors
    return NystromBasis(combined, world.from_first(eigenvalues) / num_landmarks)


def _hold(chunks: Gradients, parameters: Mapping[str, Tensor], num_rows: int) -> Tensor:
    held = next(iter(parameters.values())).new_empty(num_rows, _size(parameters), dtype=_type(parameters))
    done = 0
    for chunk in chunks:
        count = len(next(iter(chunk.values())))
        _check_finite(torch.cat(list(chunk.values()), dim=1, out=held[done : done + count]))
        done += count
        chunk.clear()  # else it would live while the next is made
    return held


def _sketched(chunks: Gradients, sketch: Sketch, num_rows: int) -> Tensor:
    rows = next(iter(sketch.signs.values())).new_empty(num_rows, sketch.size, dtype=sketch.dtype)
    done = 0
    for chunk in chunks:
        part = _check_finite(sketch(chunk))
        rows[done : done + len(part)] = part
        done += len(part)
        chunk.clear()
    return rows


def _check_finite(rows: Tensor) -> Tensor:
    if not rows.sum().isfinite():
        raise ValueError(
            "gradients at the landmarks are NaN or infinite: check the weights, or freeze the layers that cause it."
        )
    return rows


def _split(held: Tensor, parameters: Mapping[str, Tensor]) -> Gradients:
    sizes = [parameter.numel() for parameter in parameters.values()]
    yield dict(zip(parameters, held.split(sizes, dim=1), strict=True))


def _type(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """That holds all of them."""
    return functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters.values()))


def _size(parameters: Mapping[str, Tensor]) -> int:
    """P."""
    return sum(parameter.numel() for parameter in parameters.values())


def _gram(rows: Tensor, num_landmarks: int, world: World) -> Tensor | None:
    """R Rᵀ (M, M), on the first process, from rows that are shared out."""
    gram = rows.new_zeros(num_landmarks, num_landmarks, dtype=torch.float64) if world.first else None
    for columns in rows.split(COLUMNS, dim=1):
        gathered = world.gather_rows(columns, num_landmarks)
        if gram is not None and gathered is not None:
            _add_products(gram, gathered)
    return None if gram is None else gram.triu() + gram.triu(1).T


def _products(rows: Tensor) -> Tensor:
    """R Rᵀ of rows that this process has."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in rows.split(COLUMNS, dim=1):
        _add_products(gram, columns)
    return gram.triu() + gram.triu(1).T


def _add_products(gram: Tensor, columns: Tensor) -> None:
    """Add the upper triangle of C Cᵀ, in float64: long dot products in float32 would blur the small eigenvalues."""
    for start in range(0, len(columns), ROWS):
        gram[start : start + ROWS, start:] += columns[start : start + ROWS] @ columns[start:].T
