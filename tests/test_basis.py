"""The Nyström basis against dense linear algebra."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ella.basis import nystrom_basis, orthonormal, unflatten


def rows(count: int, size: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(count, rank, generator=generator), torch.randn(rank, size, generator=generator)
    return left.double() @ right.double()


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 10), st.integers(0, 99))
def test_directions_are_the_leading_right_singular_vectors(count: int, size: int, rank: int, seed: int):
    matrix = rows(count, size, min(count, size), seed)
    basis = nystrom_basis(matrix, min(rank, count))
    kept = len(basis.eigenvalues)
    _, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(basis.eigenvalues, singular[:kept].square() / count)
    torch.testing.assert_close(basis.vectors @ basis.vectors.T, torch.eye(kept).double(), atol=1e-9, rtol=0)
    # the span does not depend on signs; where eigenvalues nearly tie it is not defined
    if kept == len(singular) or singular[kept] < 0.9 * singular[kept - 1]:
        expected = right[:kept].T @ right[:kept]
        torch.testing.assert_close(basis.vectors.T @ basis.vectors, expected, atol=1e-5, rtol=0)


def test_single_precision_gives_orthonormal_directions_too():
    vectors = nystrom_basis(rows(200, 5000, 60).float(), 40).vectors
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(40), atol=1e-6, rtol=0)


def test_a_rank_above_the_kernels_is_cut_and_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        assert nystrom_basis(rows(20, 30, 4), 9).vectors.shape == (4, 30)
    assert "numerical rank 4, so rank=9 is cut to 4" in caplog.text


def test_orthonormal_stays_close():
    vectors = torch.eye(3, 8).double() + 1e-3 * rows(3, 8, 3)
    mended = orthonormal(vectors)
    torch.testing.assert_close(mended @ mended.T, torch.eye(3).double())
    assert (mended - vectors).norm() < 2e-2


def test_unflatten_follows_the_order_of_the_parameters():
    parameters = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    vectors = torch.arange(14.0).view(2, 7)
    basis = unflatten(vectors, parameters)
    assert basis["a"].shape == (2, 2, 2)
    torch.testing.assert_close(basis["b"], vectors[:, 4:])


@pytest.mark.parametrize(("value", "message"), [(torch.nan, "NaN or infinite"), (0.0, "every gradient .* is zero")])
def test_useless_gradients_are_refused(value: float, message: str):
    with pytest.raises(ValueError, match=message):
        nystrom_basis(torch.full((4, 5), value), 2)
