"""What Λ, the negative log-likelihood and the predictive are: one class a likelihood.

To add one, subclass `Likelihood` and name it in `LIKELIHOODS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import log, pi
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from .metrics import classification_metrics

SAMPLES_BUDGET = 2**22  # numbers in one chunk of Monte Carlo logits: few enough to stay near the caches


@dataclass  # not frozen: Lightning moves what predict_step returns to the CPU field by field
class Gaussian:
    """Logits with mean f(x) and covariance F Fᵀ, and the standard normal draws shared by all inputs."""

    mean: Tensor  # (B, C)
    factor: Tensor  # (B, C, K)
    draws: Tensor = field(repr=False)  # (S, K)

    @property
    def covariance(self) -> Tensor:
        """(B, C, C)."""
        return self.factor @ self.factor.mT

    @property
    def variance(self) -> Tensor:
        """(B, C), the diagonal of the covariance."""
        return self.factor.square().sum(-1)

    def expectation(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Monte Carlo mean (B, …) of `function`, which maps logits (s, B, C) to (s, B, …)."""
        size = max(1, SAMPLES_BUDGET // max(1, self.mean.numel()))
        parts = (Gaussian(self.mean, self.factor, z) for z in self.draws.split(size))
        total = sum(function(part.samples()).sum(0) for part in parts)
        return torch.as_tensor(total) / len(self.draws)

    def samples(self) -> Tensor:
        """Logits (S, B, C), one for each draw."""
        return self.mean + (self.factor @ self.draws.T).movedim(-1, 0)  # (B, C, K) x (K, S) -> (S, B, C)


class Likelihood(ABC):
    """What a network's outputs mean. Logits are (B, C); targets are whatever the loader gives."""

    predictives: tuple[str, ...]  # names of the ways to integrate over the posterior, the default first

    @abstractmethod
    def check(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the targets as the other methods take them; a ValueError names the fix if they cannot be used."""

    @abstractmethod
    def curvature(self, logits: Tensor, features: Tensor) -> Tensor:
        """Σ_b Ψ_bᵀ Λ_b Ψ_b, (K, K), with Λ the Hessian of the negative log-likelihood in the logits."""

    @abstractmethod
    def sampled_score(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """∇ log p(y|f) in the logits, (B, C), for one target each, drawn from the network's p(y|f) by uniforms (B,)."""

    @abstractmethod
    def predict(self, logits: Gaussian, predictive: str, temperature: Tensor) -> "ClassPrediction":
        """Integrate over the posterior of the logits, divided by the temperature ()."""

    @abstractmethod
    def nll(self, prediction: "ClassPrediction", targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target, (B,), nats."""

    @abstractmethod
    def metrics(self, num_outputs: int, **options: Any) -> MetricCollection:
        """Figures of a predictive, updated with `(prediction.probs, targets)`; `options` are those of a Metric."""


class Classification(Likelihood):
    """One of C classes; targets are class indices (B,)."""

    predictives = ("mc", "probit", "bridge")

    def check(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whole numbers (B,) in [0, C), of any integer type."""
        batch_size, num_classes = logits.shape
        if targets.shape != (batch_size,) or targets.is_floating_point():
            raise ValueError(
                f"likelihood='classification' needs class indices of the shape ({batch_size},), but the targets have "
                f"the shape {tuple(targets.shape)} and the type {targets.dtype}: pass unpack=lambda batch: (x, labels)."
            )
        if targets.min() < 0 or targets.max() >= num_classes:
            raise ValueError(
                f"labels must lie in [0, {num_classes}), the network's outputs, but they reach from "
                f"{int(targets.min())} to {int(targets.max())}: pass an unpack= that maps them there."
            )
        return targets.long()

    def curvature(self, logits: Tensor, features: Tensor) -> Tensor:
        """Λ = diag(p) − ppᵀ, as the covariance of features under p: centred, it does not cancel where p is sure."""
        probs = logits.softmax(-1).unsqueeze(-1)  # (B, C, 1)
        centred = features - (probs * features).sum(1, keepdim=True)  # (B, C, K)
        weighted = (probs.sqrt() * centred).flatten(0, 1)  # (BC, K)
        return weighted.T @ weighted

    def sampled_score(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """The one-hot label minus p; the label is where the distribution function passes the uniform number."""
        probs = logits.softmax(-1)
        passed = probs.double().cumsum(-1) <= uniforms.unsqueeze(1)  # (B, C)
        labels = passed.sum(-1).clamp_max(probs.shape[1] - 1)
        return torch.nn.functional.one_hot(labels, probs.shape[1]) - probs

    def predict(self, logits: Gaussian, predictive: str, temperature: Tensor) -> "ClassPrediction":
        """Class probabilities by Monte Carlo ("mc"), the probit approximation or the Laplace bridge."""
        return ClassPrediction(logits, predictive, temperature)

    def nll(self, prediction: "ClassPrediction", targets: Tensor) -> Tensor:
        """−log of the mean probability of the target."""
        probs = prediction.probs.gather(1, targets.unsqueeze(1)).squeeze(1)
        return -probs.clamp_min(torch.finfo(probs.dtype).tiny).log()

    def metrics(self, num_outputs: int, **options: Any) -> MetricCollection:
        """Accuracy, NLL, ECE in bins of equal width and of equal mass, Brier score and AURC."""
        return classification_metrics(num_outputs, **options)


@dataclass
class ClassPrediction:
    """What the posterior says of a batch; everything but the logits is worked out when it is asked for."""

    logits: Gaussian
    predictive: str
    temperature: Tensor  # ()
    novelty: Tensor | None = None  # (B,)

    @property
    def logits_mean(self) -> Tensor:
        """(B, C), the outputs of the trained network, unchanged."""
        return self.logits.mean

    @property
    def logits_covariance(self) -> Tensor:
        """(B, C, C)."""
        return self.logits.covariance

    @property
    def logits_variance(self) -> Tensor:
        """(B, C), the diagonal of `logits_covariance` without the rest of it."""
        return self.logits.variance

    @cached_property
    def probs(self) -> Tensor:
        """(B, C) class probabilities, averaged over the posterior."""
        return PREDICTIVES[self.predictive](self._tempered)

    @cached_property
    def entropy(self) -> Tensor:
        """(B,) total uncertainty: the entropy of `probs`, nats."""
        return entropy(self.probs)

    @cached_property
    def mutual_information(self) -> Tensor:
        """(B,) epistemic uncertainty, nats: what the label would tell about the weights.

        H(E[p]) − E[H(p)], both by Monte Carlo with the same draws, whichever way `probs` are computed.
        """
        mean = self.probs if self.predictive == "mc" else monte_carlo(self._tempered)
        expected = self._tempered.expectation(lambda f: -(f.softmax(-1) * f.log_softmax(-1)).sum(-1))
        return (entropy(mean) - expected).clamp_min(0)

    @property
    def _tempered(self) -> Gaussian:
        mean, factor = self.logits.mean / self.temperature, self.logits.factor / self.temperature
        return Gaussian(mean, factor, self.logits.draws)

    def __len__(self) -> int:
        return len(self.logits.mean)


def monte_carlo(logits: Gaussian) -> Tensor:
    """E[softmax(f)], (B, C), by sampling in K dimensions: f(x) + F z."""
    return logits.expectation(lambda f: f.softmax(-1))


def probit(logits: Gaussian) -> Tensor:
    """Softmax of logits that are shrunk by their variance (MacKay 1992; Gibbs 1997), (B, C)."""
    return (logits.mean / (1 + pi / 8 * logits.variance).sqrt()).softmax(-1)


def laplace_bridge(logits: Gaussian) -> Tensor:
    """Mean of the Dirichlet that matches the Gaussian (Hobbhahn et al. 2022, equation 5), (B, C).

    Both are first centred over the classes, which the softmax does not notice. The bridge is close to Monte Carlo
    only where the logits' variance is of order one; where it vanishes the bridge is not the softmax.
    """
    mean, num_classes = logits.mean - logits.mean.mean(1, keepdim=True), logits.mean.shape[1]
    variance = (logits.factor - logits.factor.mean(1, keepdim=True)).square().sum(-1)
    variance = variance.clamp_min(torch.finfo(variance.dtype).eps)
    evidence = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * log(num_classes)
    constant = torch.full_like(evidence, 1 - 2 / num_classes).log()
    return (torch.logaddexp(constant, evidence) - variance.log()).softmax(-1)


def entropy(probs: Tensor) -> Tensor:
    """−Σ p log p over the last axis, nats."""
    return torch.special.entr(probs).sum(-1)


PREDICTIVES: dict[str, Callable[[Gaussian], Tensor]] = {
    "mc": monte_carlo,
    "probit": probit,
    "bridge": laplace_bridge,
}

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "classification": Classification,
}
