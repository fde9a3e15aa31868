"""The rules for the basis that are compared with the paper's, against dense linear algebra."""

import sys

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
from bases import best_subspace


def kept(directions: torch.Tensor, precision: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The predictive variance that a subspace keeps, summed over inputs."""
    inner = torch.linalg.inv(directions.T @ precision @ directions)
    return torch.einsum("nk,kl,nl->", features @ directions, inner, features @ directions)


def test_the_optimal_subspace_keeps_the_most_predictive_variance():
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    features, rows = random(40, 12), random(30, 12)
    precision = rows.T @ rows + 0.1 * torch.eye(12)
    best = best_subspace(precision, features.T @ features, 3)
    torch.testing.assert_close(best.T @ best, torch.eye(3).double())
    spectrum = torch.linalg.eigvalsh(features @ torch.linalg.inv(precision) @ features.T)
    torch.testing.assert_close(kept(best, precision, features), spectrum[-3:].sum())  # no subspace can keep more
    others = [torch.linalg.qr(random(12, 3))[0] for _ in range(20)]
    assert all(kept(other, precision, features) < spectrum[-3:].sum() for other in others)
