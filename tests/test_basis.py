"""The Nyström basis against dense linear algebra."""

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ella.basis import NystromBasis, Sketch, nystrom_basis

PLENTY = 2**40


def matrix(count: int, size: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(count, rank, generator=generator), torch.randn(rank, size, generator=generator)
    return left.double() @ right.double()


def named(size: int, like: Tensor) -> dict[str, Tensor]:
    """Parameters of `size` numbers in all."""
    return {"a": like.new_zeros(size // 3), "b": like.new_zeros(size - size // 3)}


def fit(rows: Tensor, rank: int, chunk: int = 7, memory_budget: int = PLENTY) -> NystromBasis:
    parameters = named(rows.shape[1], rows)

    def gradients() -> Iterator[dict[str, Tensor]]:
        for part in rows.split(chunk):
            yield dict(zip(parameters, part.split([p.numel() for p in parameters.values()], 1), strict=True))

    return nystrom_basis(gradients, parameters, len(rows), rank, memory_budget=memory_budget)


def flat(basis: NystromBasis) -> Tensor:
    return torch.cat(list(basis.basis.values()), dim=1)  # (K, P)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(3, 40), st.integers(1, 10), st.integers(1, 9), st.integers(0, 99))
def test_directions_are_the_leading_right_singular_vectors(count: int, size: int, rank: int, chunk: int, seed: int):
    rows = matrix(count, size, min(count, size), seed)
    basis = fit(rows, min(rank, count), chunk)
    kept = len(basis.eigenvalues)
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(basis.eigenvalues, singular[:kept].square() / count)
    torch.testing.assert_close(flat(basis) @ flat(basis).T, torch.eye(kept).double(), atol=1e-6, rtol=0)
    # the span does not depend on signs; where eigenvalues nearly tie it is not defined
    if kept == len(singular) or singular[kept] < 0.9 * singular[kept - 1]:
        expected = right[:kept].T @ right[:kept]
        torch.testing.assert_close(flat(basis).T @ flat(basis), expected, atol=1e-5, rtol=0)


def test_single_precision_gives_orthonormal_directions_too():
    vectors = flat(fit(matrix(200, 5000, 60).float(), 40))
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(40), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 8), st.integers(1, 60), st.integers(0, 99))
def test_streamed_directions_are_orthonormal_ritz_vectors(rank: int, chunk: int, seed: int):
    """Whatever the sketch chooses, V is orthonormal and in the span of the rows; its eigenvalues are not too large."""
    rows = matrix(60, 900, 30, seed)
    basis = fit(rows, rank, chunk, memory_budget=60 * 200 * 8)
    V, exact = flat(basis), fit(rows, rank)
    torch.testing.assert_close(V @ V.T, torch.eye(rank).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(V @ torch.linalg.pinv(rows) @ rows, V)
    assert (basis.eigenvalues <= exact.eigenvalues * (1 + 1e-9)).all()
    assert (basis.eigenvalues >= 0.3 * exact.eigenvalues).all()


def test_streamed_directions_are_nearly_the_best():
    spectrum = torch.logspace(0, -3, 100).double()
    left, right = torch.linalg.qr(matrix(300, 100, 100))[0], torch.linalg.qr(matrix(6000, 100, 100))[0]
    rows = (left * spectrum) @ right.T
    exact, streamed = fit(rows, 10), fit(rows, 10, memory_budget=300 * 6000 * 8 - 1)
    torch.testing.assert_close(streamed.eigenvalues, exact.eigenvalues, rtol=0.05, atol=0)
    assert not streamed.eigenvalues.equal(exact.eigenvalues)


def test_sketches_keep_inner_products_on_average():
    rows = matrix(2, 500, 2)
    parameters = {"all": rows[0]}
    products = [(lambda s: s[0] @ s[1])(Sketch(parameters, 64, seed)({"all": rows})) for seed in range(400)]
    exact, spread = rows[0] @ rows[1], rows[0].norm() * rows[1].norm() / 64**0.5
    assert abs(torch.stack(products).mean() - exact) < 4 * spread / 400**0.5
    assert 0.5 * spread < torch.stack(products).std() < 2.5 * spread


def test_a_rank_above_the_kernels_is_cut_and_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        assert flat(fit(matrix(20, 30, 4), 9)).shape == (4, 30)
    assert "numerical rank 4, so rank=9 is cut to 4" in caplog.text


@pytest.mark.parametrize(("value", "message"), [(torch.nan, "NaN or infinite"), (0.0, "every gradient .* is zero")])
@pytest.mark.parametrize("budget", [PLENTY, 1000])
def test_useless_gradients_are_refused(value: float, message: str, budget: int):
    with pytest.raises(ValueError, match=message):
        fit(torch.full((4, 500), value), 2, memory_budget=budget)
