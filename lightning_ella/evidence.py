"""Laplace's marginal likelihood as a differentiable function of the prior and the noise, for the choice of models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Points
from .engine import Linearization
from .likelihoods import Likelihood, Regression
from .observations import checked, weights_of


@dataclass(frozen=True)
class Evidence:
    """Log p(D), nats, of some data under a network with a Gaussian prior (MacKay 1992; Immer et al. 2021).

    It is log p(D|θ) − ½ ‖θ‖² / σ₀² − ½ log det(I + σ₀² GGN) at the trained weights θ. The determinant is that of the
    GGN in the span of the basis, times the bound that the trace of the rest gives (evenly spread over `dimensions`),
    which is known where there are probes.
    """

    log_likelihood: Tensor  # log p(D|θ), (), at the predictor's noise
    eigenvalues: Tensor  # of the GGN in the span, (K,)
    outside: Tensor  # trace of the rest, ()
    dimensions: int
    weights_squared: Tensor  # ‖θ‖², ()
    noise_variance: Tensor | None = None  # σ², (C,), where the likelihood has one
    num_targets: Tensor | None = None  # of each output, (C,)

    def __call__(self, prior_variance: Tensor | float, noise_variance: Tensor | float | None = None) -> Tensor:
        """Log p(D), (); gradients flow to both arguments.

        Args:
            prior_variance: σ₀², ().
            noise_variance: σ², (), of a regression; with a noise for each output, the mean of them, which all follow.

        Raises:
            ValueError: if there is no noise to vary.
        """
        prior = torch.as_tensor(prior_variance).to(self.eigenvalues)
        factor, fit = prior.new_ones(()), self.log_likelihood
        if noise_variance is not None:
            if self.noise_variance is None or self.num_targets is None:
                raise ValueError("noise_variance= is for likelihood='regression': leave it out.")
            factor = torch.as_tensor(noise_variance).to(prior) / self.noise_variance.mean()
            constant = -0.5 * self.num_targets * (2 * torch.pi * self.noise_variance).log()
            fit = (fit - constant.sum()) / factor + constant.sum() - 0.5 * self.num_targets.sum() * factor.log()
        inside = (prior * self.eigenvalues / factor).log1p().sum()
        rest = self.dimensions * (prior * self.outside / factor / max(1, self.dimensions)).log1p()
        return fit - 0.5 * (self.weights_squared / prior + inside + rest)


def measure(
    linearization: Linearization, points: Points, likelihood: Likelihood, curvature: Tensor, rank: int
) -> Evidence:
    """What the marginal likelihood of all points is made of.

    Args:
        linearization: of the network.
        points: the data.
        likelihood: with its noise.
        curvature: of the data, along the basis and the probes, (K + m, K + m).
        rank: K.
    """
    total, seen = curvature.new_zeros(()), curvature.new_zeros(())
    outputs = curvature.new_zeros(0)
    for inputs, targets, weights in points.batches(points.numbers, linearization.device):
        outputs = linearization.at_positions(linearization.logits(inputs)).double()
        known = checked(likelihood, outputs, targets, linearization.axis)
        kept = (weight := weights_of(likelihood, known, weights).double()) > 0
        total += (weight[kept] * likelihood.log_prob(outputs[kept], known[kept])).sum()
        seen += weight[kept].sum()
    num_outputs, weights = outputs.shape[-1], list(linearization.parameters.values())
    dimensions = min(linearization.network.num_parameters, int(seen) * (num_outputs - likelihood.invariant)) - rank
    noisy = isinstance(likelihood, Regression)
    return Evidence(
        total,
        torch.linalg.eigvalsh(curvature[:rank, :rank]).clamp_min(0),
        curvature.diagonal()[rank:].sum(),
        max(0, dimensions),
        torch.stack([part.double().square().sum() for part in weights]).sum(),
        likelihood.variance(outputs).expand(num_outputs) if noisy else None,
        seen.expand(num_outputs) if noisy else None,
    )
