"""The same posterior as laplace-torch's ELLA, given the same basis."""

import pytest
import torch
from conftest import make_case

from lightning_ella import ELLAPredictor
from lightning_ella.basis import unflatten
from lightning_ella.curvature import curvature
from lightning_ella.likelihoods import Classification
from lightning_ella.linearize import Linearization, as_function

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
    with as_function(case.model):
        linearization = Linearization(case.model)
        basis = unflatten(peer.dual_directions.T, linearization.parameters)
        batches = [(*linearization.features(x, basis), y) for x, y in case.loader()]
    predictor = ELLAPredictor(
        case.model,
        basis=basis,
        eigenvalues=torch.ones(6),
        curvature=curvature(batches, Classification(), len(case)),
        prior_variance=torch.tensor(0.7).double(),
        covariance_scale=torch.tensor(1.0).double(),
        settings={
            "likelihood": "classification",
            "predictive": "mc",
            "num_samples": 8,
            "seed": 0,
            "samples_per_chunk": 16,
            "tangents_per_chunk": 20,
        },
    )
    mean, covariance = peer._glm_predictive_distribution(case.inputs)
    out = predictor(case.inputs)
    torch.testing.assert_close(out.logits_covariance, covariance, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(out.logits_mean, mean)
