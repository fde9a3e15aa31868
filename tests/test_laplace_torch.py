"""The same posterior as laplace-torch's ELLA, given the same basis."""

from dataclasses import asdict

import pytest
import torch
from conftest import make_case

from lightning_ella import ELLAPredictor, Settings
from lightning_ella.curvature import curvature
from lightning_ella.engine import Linearization
from lightning_ella.likelihoods import Classification
from lightning_ella.linearize import as_function

laplace = pytest.importorskip("laplace")


@pytest.mark.filterwarnings("ignore")  # laplace-torch's own
@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm"])
def test_same_covariance_with_the_same_basis(name: str):
    case = make_case(name)
    peer = laplace.Laplace(
        case.model,
        "classification",
        subset_of_weights="all",
        hessian_structure="gp",
        functional_approximation="nystrom",
        subsample_size=40,
        n_eigenvalues=6,
        prior_precision=1 / 0.7,
        backend=laplace.curvature.CurvlinopsGGN,
    )
    peer.fit(case.loader())
    with as_function():
        linearization = Linearization(case.model)
        parameters = linearization.parameters
        columns = peer.dual_directions.T.split([p.numel() for p in parameters.values()], dim=1)
        basis = {n: c.reshape(-1, *p.shape) for (n, p), c in zip(parameters.items(), columns, strict=True)}
        hessian = curvature(
            linearization, case.loader(), basis, Classification(), len(case), seeds=torch.zeros(len(case))
        )
    predictor = ELLAPredictor(
        case.model,
        basis=basis,
        eigenvalues=torch.ones(6),
        curvature=hessian,
        prior_variance=torch.tensor(0.7).double(),
        covariance_scale=torch.tensor(1.0).double(),
        residual_scale=torch.tensor(1.0).double(),
        temperature=torch.tensor(1.0).double(),
        settings=asdict(Settings(residual=0)),
    )
    mean, covariance = peer._glm_predictive_distribution(case.inputs)
    out = predictor(case.inputs)
    torch.testing.assert_close(out.logits_covariance, covariance, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(out.logits_mean, mean)
