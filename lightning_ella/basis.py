"""From gradients at the landmarks to V, the leading directions of the neural tangent kernel in parameter space."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

COLUMNS = 2**13  # of R are multiplied in its own precision before they are added up in float64


class NystromBasis(NamedTuple):
    """K orthonormal directions in parameter space, and the kernel's eigenvalues along them."""

    vectors: Tensor  # (K, P), rows orthonormal
    eigenvalues: Tensor  # (K,) float64, of the kernel: those of the Gram matrix / M, descending


def nystrom_basis(rows: Tensor, rank: int) -> NystromBasis:
    """Nyström basis V = Rᵀ U diag(λ)^(-1/2) of the kernel from landmark gradients R (Deng et al. 2022).

    Args:
        rows: (M, P) gradients of one output each.
        rank: K, how many directions to keep; fewer are kept where the kernel's numerical rank is lower.

    Raises:
        ValueError: if a gradient is NaN or infinite, or all of them are zero.
    """
    gram = _gram(rows)
    if not gram.isfinite().all():
        raise ValueError(
            "gradients at the landmarks are NaN or infinite: check the weights, or freeze the layers that cause it."
        )
    eigenvalues, eigenvectors = (part.flip(-1) for part in torch.linalg.eigh(gram))
    noise = eigenvalues[0] * len(rows) * torch.finfo(rows.dtype).eps
    kept = int((eigenvalues[:rank] > noise).sum())
    if kept == 0:
        raise ValueError(
            "every gradient at the landmarks is zero: the network's output does not depend on its trainable parameters."
        )
    if kept < rank:
        log.warning("ELLA: the kernel has the numerical rank %d, so rank=%d is cut to %d.", kept, rank, kept)
    combination = eigenvectors[:, :kept] / eigenvalues[:kept].sqrt()  # (M, K)
    vectors = orthonormal(combination.T.to(rows.dtype) @ rows)
    return NystromBasis(vectors, eigenvalues[:kept] / len(rows))


def orthonormal(vectors: Tensor) -> Tensor:
    """The orthonormal rows closest to the (K, P) rows `vectors`, which are nearly so: S^(-1/2) V with S = V Vᵀ."""
    eigenvalues, eigenvectors = torch.linalg.eigh(_gram(vectors))
    return ((eigenvectors / eigenvalues.sqrt()) @ eigenvectors.T).to(vectors.dtype) @ vectors


def unflatten(vectors: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(K, P) rows as a mapping from parameter name to (K, *shape)."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    return {
        name: block.reshape(-1, *parameter.shape).contiguous()
        for (name, parameter), block in zip(parameters.items(), vectors.split(sizes, dim=1), strict=True)
    }


def _gram(rows: Tensor) -> Tensor:
    """R Rᵀ, summed in float64: long dot products in float32 would blur the small eigenvalues."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in rows.split(COLUMNS, dim=1):
        gram += columns @ columns.T
    return gram
