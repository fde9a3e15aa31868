"""What a network's outputs mean: log p(y|f), its curvature and its predictive, one class a likelihood.

To add one, subclass `Likelihood` and name it in `LIKELIHOODS`; a user does the same from outside. Outputs are (*, C):
one row for each sample, or for each position (token, pixel) of a sample. Targets are (*), or (*, C) `per_output`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import inf, log, pi
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot, pad, softplus
from torchmetrics import MetricCollection

from .metrics import classification_metrics, label_metrics, regression_metrics
from .predictions import ClassPrediction, LabelPrediction, NormalPrediction, Outputs, Prediction, softmax
from .top import IGNORED, without_channel

logger = logging.getLogger(__name__)

LEVEL = 0.9  # of the interval whose coverage is reported
CLOSEST = 1e-3  # that two cumulative logits count as: the information of equal ones is infinite
DIFFERENT = 100.0  # times as large: residuals of outputs that are in other units
LARGEST = 40.0  # logarithm of a rate: sums of squares of what is larger are no numbers


class Likelihood(ABC):
    """What a network's outputs mean.

    A new one needs `log_prob`, `information` and `sample`; without `moments`, means and variances come from samples.
    """

    predictives: tuple[str, ...] = ("mc",)  # names of the ways to integrate over the posterior, the default first
    per_output = False  # targets are (*, C), one for each output, rather than (*)
    invariant = False  # a constant added to all outputs changes nothing
    one_of_many = False  # outputs that are unlikely can be put together (`Settings.top_outputs`)
    has_temperature = False  # `tempered` does something, so that there is a temperature to choose
    has_units = False  # outputs are in the units of the targets, rather than pure numbers as logits are
    temperature_is_noise = False  # it multiplies a variance of noise, and divides the curvature
    lowest = -inf  # that a target can be

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Make one from the fields of `Settings`."""
        return cls()

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log p(y|f), (*), nats, of outputs (*, C) that are certain."""

    @abstractmethod
    def information(self, outputs: Tensor) -> Tensor:
        """Diagonal of Λ, (*, C): the Fisher information in the outputs, which for a canonical link is the Hessian."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from p(y|f); the generator is the CPU's, so that they are the same on every device."""

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of y, in the shape of the targets, at outputs that are certain."""
        raise NotImplementedError

    @property
    def has_moments(self) -> bool:
        """Whether they are known."""
        return type(self).moments is not Likelihood.moments

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets as the other methods take them; a ValueError names the fix if they cannot be used."""
        expected = outputs.shape if self.per_output else outputs.shape[:-1]
        targets = without_channel(targets, expected)
        if self.per_output and outputs.shape[-1] == 1:
            one = without_channel(targets, outputs.shape[:-1])
            targets = one.unsqueeze(-1) if one.shape == outputs.shape[:-1] else targets
        if targets.shape != expected:
            raise ValueError(
                f"{self._name} needs targets of the shape {tuple(expected)}, but they have the shape "
                f"{tuple(targets.shape)}: pass unpack=lambda batch: (x, targets)."
            )
        return targets

    def observed(self, targets: Tensor) -> Tensor:
        """Which positions count, (*), bool."""
        shape = targets.shape[:-1] if self.per_output else targets.shape
        return torch.ones(shape, dtype=torch.bool, device=targets.device)

    def curvature(self, outputs: Tensor, features: Tensor) -> Tensor:
        """Σ Ψᵀ Λ Ψ over all rows, (K, K), for outputs (n, C) and features (n, C, K)."""
        rooted = self.rooted(outputs, features).flatten(0, -2)
        return rooted.T @ rooted

    def rooted(self, outputs: Tensor, features: Tensor) -> Tensor:
        """√Λ Ψ, (n, ·, K): what has Ψᵀ Λ Ψ as its square, for outputs (n, C) and features (n, C, K)."""
        return self.information(outputs).sqrt().unsqueeze(-1) * features

    @property
    def has_root(self) -> bool:
        """Whether `rooted` is that of `curvature`: not where a class has written the second anew, and not the first."""
        kinds = type(self).__mro__
        rooted, curvature = (
            next(i for i, kind in enumerate(kinds) if n in vars(kind)) for n in ("rooted", "curvature")
        )
        return rooted <= curvature

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """∇ log p(y|f) in the outputs, (*, C)."""
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(outputs, targets).sum(), outputs)[0]

    def tempered(self, logits: Outputs, temperature: Tensor) -> Outputs:
        """Outputs at a temperature: as they are."""
        return logits

    def predict(self, logits: Outputs, predictive: str, temperature: Tensor) -> Prediction:
        """Integrate over the posterior of the outputs."""
        return Prediction(logits, predictive, temperature, self)

    def nll(self, prediction: Any, targets: Tensor) -> Tensor:
        """−log E[p(y|f)], (*), nats, over the draws of the prediction."""
        parts = prediction.tempered.in_parts()
        logs = torch.cat([self.log_prob(f, targets.expand(len(f), *targets.shape)) for f in parts])
        return log(len(logs)) - logs.logsumexp(0)

    def sees_samples_only(self, predictive: str) -> bool:
        """Whether `nll` depends on the Gaussian by its samples alone, and not by its variance."""
        return False

    def energy(self, outputs: Tensor) -> Tensor | None:
        """How little the network's outputs (B, C) say, (B,), higher for what is foreign; None if they do not tell."""
        return None

    def conformity(self, prediction: Any, targets: Tensor) -> Tensor:
        """How far targets are from what a prediction says, (n,) or (n, C): here in standard deviations."""
        mean, variance = prediction.moments_of_rows
        numbers = torch.finfo(mean.dtype)
        return ((targets.to(mean) - mean).abs() / variance.sqrt().clamp_min(numbers.tiny)).nan_to_num(numbers.max)

    def answers(self, prediction: Any, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Confidence (n,) in the one answer to each input, and whether that is wrong; None where there is no such."""
        return None

    def summary(self, prediction: Any, targets: Tensor) -> Tensor:
        """What `metrics` are updated with, (n, …): scores of each point, the mean of which is a figure."""
        nll, targets = self.nll(prediction, targets), targets.to(prediction.logits.mean)
        low, high = prediction.interval_of_rows(LEVEL)
        inside = (targets >= low) & (targets <= high)
        scores = (prediction.mean_of_rows - targets).square(), prediction.crps_of_rows(targets), inside
        return torch.stack([nll, *(score.to(nll).unsqueeze(-1).flatten(1).mean(1) for score in scores)], -1)  # (n, 4)

    def errors(self, summary: Tensor, targets: Tensor) -> Tensor:
        """How wrong each point's mean prediction is, (n,), from `summary`."""
        return summary[:, 1]

    def metrics(self, num_outputs: int, **options: Any) -> MetricCollection:
        """Figures of a predictive, updated with `(summary(prediction, targets), targets)`; options are of a Metric."""
        return regression_metrics(**options)

    def figures(self, summary: Tensor, targets: Tensor, num_outputs: int) -> dict[str, float]:
        """What `metrics` say of some points, by name; on the CPU, where it is repeatable."""
        metrics = self.metrics(num_outputs, sync_on_compute=False)
        metrics.update(summary.cpu(), targets.cpu())
        return {name: float(value) for name, value in metrics.compute().items()}

    # What a likelihood knows only from data, such as the variance of noise

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing to be estimated."""
        return True

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sums over rows from which `completed` estimates."""
        raise NotImplementedError

    def completed(self, sums: Tensor) -> "Likelihood":
        """This likelihood, with what was estimated from the sums over all rows."""
        return self

    def settled(self, temperature: Tensor) -> tuple["Likelihood", Tensor]:
        """This likelihood, with the temperature in its noise if it belongs there, and the temperature that is left."""
        return self, temperature

    def stored(self) -> dict[str, Any]:
        """Settings that make this likelihood again."""
        return {}

    @property
    def _name(self) -> str:
        names = [name for name, kind in LIKELIHOODS.items() if kind is type(self)]
        return f"likelihood={names[0]!r}" if names else type(self).__name__


class Classification(Likelihood):
    """One of C classes; targets are class indices (*), or −100 for a position that counts for nothing."""

    predictives = ("mc", "probit", "bridge")
    invariant = True
    one_of_many = True
    has_temperature = True

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whole numbers (*) in [0, C) or −100, of any integer type."""
        expected, num_classes = tuple(outputs.shape[:-1]), outputs.shape[-1]
        if num_classes < 2:
            raise ValueError(
                f"{self._name} needs at least two outputs, but the network has one: pass likelihood='binary', or "
                "'regression'."
            )
        targets = without_channel(targets, outputs.shape[:-1])
        if targets.shape != expected or targets.is_floating_point():
            raise ValueError(
                f"{self._name} needs class indices of the shape {expected}, but the targets have the shape "
                f"{tuple(targets.shape)} and the type {targets.dtype}: {_way_to_indices(targets, outputs)}."
            )
        seen = targets[self.observed(targets)]
        if len(seen) and (seen.min() < 0 or seen.max() >= num_classes):
            raise ValueError(
                f"labels must lie in [0, {num_classes}), the network's outputs, but they reach from "
                f"{int(seen.min())} to {int(seen.max())}: {_way_into_range(seen, num_classes)}."
            )
        return targets.long()

    def observed(self, targets: Tensor) -> Tensor:
        """All but −100."""
        return targets != IGNORED

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log softmax at the label."""
        return outputs.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def information(self, outputs: Tensor) -> Tensor:
        """P (1 − p), which leaves out what Λ = diag(p) − ppᵀ has beside its diagonal: `rooted` does not."""
        return outputs.softmax(-1) * (1 - outputs.softmax(-1))

    def rooted(self, outputs: Tensor, features: Tensor) -> Tensor:
        """Λ = diag(p) − ppᵀ, as the covariance of features under p: centred, it does not cancel where p is sure."""
        probs = outputs.softmax(-1).unsqueeze(-1)  # (n, C, 1)
        return probs.sqrt() * (features - (probs * features).sum(-2, keepdim=True))  # (n, C, K)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A label each: where the distribution function passes a uniform number."""
        probs = outputs.double().softmax(-1)
        shape = (*outputs.shape[:-1], 1)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
        passed = probs.cpu().cumsum(-1) <= uniforms  # on CUDA its order, and so its rounding, is not fixed
        return passed.to(outputs.device).sum(-1).clamp_max(outputs.shape[-1] - 1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The one-hot label minus p."""
        return one_hot(targets, outputs.shape[-1]) - outputs.softmax(-1)

    def tempered(self, logits: Outputs, temperature: Tensor) -> Outputs:
        """Logits divided by the temperature."""
        return logits / temperature

    def predict(self, logits: Outputs, predictive: str, temperature: Tensor) -> ClassPrediction:
        """Class probabilities by Monte Carlo ("mc"), the probit approximation or the Laplace bridge."""
        return ClassPrediction(logits, predictive, temperature, self)

    def nll(self, prediction: ClassPrediction, targets: Tensor) -> Tensor:
        """−log of the mean probability of the target; 0 where there is none."""
        if prediction.predictive == "mc" and prediction.link is softmax:
            logs = prediction.logits.label_log_probs(targets.clamp_min(0), prediction.temperature)
            return torch.where(self.observed(targets), log(len(logs)) - logs.logsumexp(0), 0)
        probs = prediction.rows_of(prediction.probs).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.observed(targets), -probs.clamp_min(torch.finfo(probs.dtype).tiny).log(), 0)

    def sees_samples_only(self, predictive: str) -> bool:
        """By Monte Carlo."""
        return predictive == "mc"

    def energy(self, outputs: Tensor) -> Tensor | None:
        """−log Σ exp(f) (Liu et al. 2020)."""
        return -outputs.logsumexp(-1)

    def conformity(self, prediction: ClassPrediction, targets: Tensor) -> Tensor:
        """1 − p of the label."""
        return 1 - prediction.rows_of(prediction.probs).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)

    def answers(self, prediction: ClassPrediction, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """The likeliest class."""
        confidence, answer = prediction.rows_of(prediction.probs).max(-1)
        return confidence, answer != targets

    def summary(self, prediction: ClassPrediction, targets: Tensor) -> Tensor:
        """Class probabilities, (n, C)."""
        return prediction.rows_of(prediction.probs)

    def errors(self, summary: Tensor, targets: Tensor) -> Tensor:
        """One where the likeliest class is another."""
        return (summary.argmax(1) != targets).double()

    def metrics(self, num_outputs: int, **options: Any) -> MetricCollection:
        """Accuracy, NLL, ECE in bins of equal width and of equal mass, Brier score and AURC."""
        return classification_metrics(num_outputs, **options)


class Preference(Classification):
    """Which of C items is preferred, from a score of each (Bradley and Terry 1952; Luce 1959 for more than two).

    Outputs are the scores (B, C) of the items that were shown together, targets the index of the one that was chosen.
    """

    def energy(self, outputs: Tensor) -> Tensor | None:
        """Scores are compared among each other: how high they are says nothing."""
        return None


class Ordinal(Classification):
    """One of C ordered classes, from C − 1 cumulative logits: P(y > c) = σ(f_c) (McCullagh 1980), as CORAL has them."""

    predictives = ("mc",)
    invariant = False
    one_of_many = False

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whole numbers (*) in [0, C)."""
        return super().check(pad(outputs, (0, 1)), targets)

    @staticmethod
    def log_probs(outputs: Tensor) -> Tensor:
        """Log P(y = c), (*, C). A network, or a draw, may have its logits in the wrong order: they are sorted.

        log(σ(a) − σ(b)) = log σ(a) + log σ(−b) + log(1 − exp(b − a)), which does not cancel where both are near 1.
        """
        infinity = outputs.new_full((), torch.inf).expand(*outputs.shape[:-1], 1)
        ordered = torch.cat([infinity, outputs.sort(-1, descending=True).values, -infinity], -1)
        above, below = ordered[..., :-1], ordered[..., 1:]
        gaps = (above - below).clamp_min(CLOSEST)
        return logsigmoid(above) + logsigmoid(-below) + (-torch.expm1(-gaps)).log()

    def probs(self, outputs: Tensor) -> Tensor:
        """P(y = c), (*, C)."""
        return self.log_probs(outputs).softmax(-1)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log of the probability between two cumulative ones; 0 where there is no target."""
        logs = self.log_probs(outputs).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.observed(targets), logs, 0)

    def information(self, outputs: Tensor) -> Tensor:
        """Of each logit alone: `rooted` knows that they share classes."""
        ratios, order = self._ratios(outputs)
        return torch.zeros_like(outputs).scatter(-1, order, ratios.square().sum(-2))

    def rooted(self, outputs: Tensor, features: Tensor) -> Tensor:
        """Λ is the sum over classes of ∇p_c ∇p_cᵀ / p_c, with ∇p_c = σ'(f_{c−1}) − σ'(f_c)."""
        ratios, order = self._ratios(outputs)
        features = features.gather(-2, order.unsqueeze(-1).expand(features.shape))
        upper, lower = (ratio.unsqueeze(-1) * features for ratio in ratios.unbind(-2))  # (n, C − 1, K)
        return pad(upper, (0, 0, 1, 0)) - pad(lower, (0, 0, 0, 1))  # (n, C, K)

    def _ratios(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """σ'(f_c) / √p of the class above f_c and of the one below, (*, 2, C − 1), and the order of the logits."""
        ordered, order = outputs.sort(-1, descending=True)
        slopes, logs = logsigmoid(ordered) + logsigmoid(-ordered), self.log_probs(outputs)
        return torch.stack([slopes - logs[..., 1:] / 2, slopes - logs[..., :-1] / 2], -2).exp(), order

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A class each."""
        return super().sample(self.log_probs(outputs), generator)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """By autograd."""
        return Likelihood.score(self, outputs, targets)

    def energy(self, outputs: Tensor) -> Tensor | None:
        """A cumulative logit that is high or low says where, and not how surely."""
        return None

    def predict(self, logits: Outputs, predictive: str, temperature: Tensor) -> ClassPrediction:
        """Class probabilities by Monte Carlo."""
        return ClassPrediction(logits, predictive, temperature, self, link=self.probs)

    def metrics(self, num_outputs: int, **options: Any) -> MetricCollection:
        """As of classes without an order."""
        return classification_metrics(num_outputs + 1, **options)


class MultiLabel(Likelihood):
    """C labels, each there or not (Bernoulli); targets are (*, C), numbers in [0, 1].

    A position with a label of −100 counts for nothing.
    """

    predictives = ("mc", "probit")
    per_output = True
    has_temperature = True

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Numbers (*, C) in [0, 1], or −100."""
        targets = super().check(outputs, targets).to(outputs.dtype)
        seen = targets[targets != IGNORED]
        if len(seen) and (seen.min() < 0 or seen.max() > 1):
            raise ValueError(
                f"{self._name} needs targets in [0, 1], but they reach from {float(seen.min()):g} to "
                f"{float(seen.max()):g}: {_way_into_range(seen, 2)}."
            )
        return targets

    def observed(self, targets: Tensor) -> Tensor:
        """All but those with a label that is −100."""
        return (targets != IGNORED).all(-1)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed over the labels."""
        return (targets * logsigmoid(outputs) + (1 - targets) * logsigmoid(-outputs)).sum(-1)

    def information(self, outputs: Tensor) -> Tensor:
        """P (1 − p)."""
        return outputs.sigmoid() * (-outputs).sigmoid()

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Zeros and ones."""
        return torch.bernoulli(outputs.sigmoid().cpu(), generator=generator).to(outputs)

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of a Bernoulli variable."""
        return outputs.sigmoid(), self.information(outputs)

    def tempered(self, logits: Outputs, temperature: Tensor) -> Outputs:
        """Logits divided by the temperature."""
        return logits / temperature

    def predict(self, logits: Outputs, predictive: str, temperature: Tensor) -> LabelPrediction:
        """Probability of each label by Monte Carlo or the probit approximation."""
        return LabelPrediction(logits, predictive, temperature, self)

    def nll(self, prediction: LabelPrediction, targets: Tensor) -> Tensor:
        """Sum of −log of the mean probability of each label, as if labels were independent."""
        there, absent = (probs.clamp_min(torch.finfo(probs.dtype).tiny).log() for probs in prediction.both)
        return -(targets * there + (1 - targets) * absent).sum(-1).to(prediction.logits.mean)

    def energy(self, outputs: Tensor) -> Tensor | None:
        """−Σ log(1 + exp(f)) (Wang et al. 2021): low where some label is surely there."""
        return -softplus(outputs).sum(-1)

    def conformity(self, prediction: LabelPrediction, targets: Tensor) -> Tensor:
        """1 − p of what is the case, of each label."""
        there, absent = prediction.both
        return 1 - torch.where(targets > 0.5, there, absent)

    def summary(self, prediction: LabelPrediction, targets: Tensor) -> Tensor:
        """Probability of each label, (n, C), float64: 1 − p is asked for, too."""
        return prediction.both[0]

    def errors(self, summary: Tensor, targets: Tensor) -> Tensor:
        """The share of labels that are likelier the other way."""
        return ((summary > 0.5) != (targets > 0.5)).double().mean(1)

    def metrics(self, num_outputs: int, **options: Any) -> MetricCollection:
        """Accuracy, NLL, ECE and Brier score over all labels."""
        return label_metrics(**options)


class Binary(MultiLabel):
    """Two classes from one logit: P(y = 1) = σ(f); outputs are (B,) or (B, 1), targets (B,) or (B, 1)."""

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Zeros and ones."""
        if outputs.shape[-1] != 1:
            no_channel = outputs.ndim > 2 and without_channel(targets, outputs.shape).shape == outputs.shape
            raise ValueError(
                f"{self._name} needs a network with one logit, but it has {outputs.shape[-1]}: pass "
                + (
                    "forward=lambda model, x: model(x).unsqueeze(1), if each of these is the logit of a position."
                    if no_channel
                    else "likelihood='classification' or 'multilabel'."
                )
            )
        return super().check(outputs, targets)

    def energy(self, outputs: Tensor) -> Tensor | None:
        """−log(exp(f / 2) + exp(−f / 2)): of two classes of which none is the one to be found."""
        return -torch.logaddexp(outputs / 2, -outputs / 2).sum(-1)

    def answers(self, prediction: LabelPrediction, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """The likelier class."""
        there, absent = (probs.squeeze(-1) for probs in prediction.both)
        return torch.maximum(there, absent), (there > absent) != (targets.squeeze(-1) > 0.5)


class Poisson(Likelihood):
    """Counts with the rate exp(f); targets are (*, C)."""

    per_output = True
    lowest = 0.0

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Numbers of at least 0."""
        targets = super().check(outputs, targets)
        if targets.numel() and targets.min() < 0:
            raise ValueError(f"{self._name} needs counts, but the targets go down to {float(targets.min()):g}.")
        return targets.to(outputs.dtype)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Y f − exp(f) − log y!, summed over the outputs."""
        f, y = outputs.double(), targets.double()  # large terms cancel
        return (y * f - f.exp() - (y + 1).lgamma()).sum(-1).to(outputs.dtype)

    def information(self, outputs: Tensor) -> Tensor:
        """The rate."""
        return outputs.exp()

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Counts; of large rates by the normal distribution that they come close to."""
        rates = outputs.clamp_max(LARGEST).exp()
        many = rates + _normal(rates, generator) * rates.sqrt()
        few = torch.poisson(rates.clamp_max(1e6).cpu(), generator=generator).to(rates)
        return torch.where(rates > 1e6, many.round(), few)

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Both the rate, e^40 at most."""
        rates = outputs.clamp_max(LARGEST).exp()
        return rates, rates


class Regression(Likelihood):
    """Real numbers (*, C), with Gaussian noise.

    Args:
        noise_variance: σ², one number or one for each output; None estimates it from residuals.
        noise: "shared" by the outputs, or "per-output", where it is estimated.
    """

    predictives = ("exact",)
    per_output = True
    has_temperature = True
    has_units = True
    temperature_is_noise = True

    def __init__(self, noise_variance: float | tuple[float, ...] | None = None, noise: str = "shared"):
        self.noise_variance, self.noise = noise_variance, noise

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """With the noise that is given."""
        return cls(settings["noise_variance"], settings["noise"])

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Numbers (*, C)."""
        targets = super().check(outputs, targets)
        if isinstance(self.noise_variance, tuple | list) and len(self.noise_variance) not in (1, outputs.shape[-1]):
            raise ValueError(
                f"noise_variance= has {len(self.noise_variance)} numbers, but the network has {outputs.shape[-1]} "
                "outputs: pass one number, or one for each output."
            )
        return targets.to(outputs.dtype)

    def variance(self, outputs: Tensor) -> Tensor:
        """σ², (C,) or (1,)."""
        given = 1.0 if self.noise_variance is None else self.noise_variance
        return torch.atleast_1d(torch.as_tensor(given, dtype=torch.float64)).to(outputs)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed over the outputs."""
        return _normal_log_prob(targets - outputs, self.variance(outputs)).sum(-1)

    def information(self, outputs: Tensor) -> Tensor:
        """1 / σ²."""
        return (1 / self.variance(outputs)).expand(outputs.shape)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The outputs with noise."""
        return outputs + _normal(outputs, generator) * self.variance(outputs).sqrt()

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and σ²."""
        return outputs, self.variance(outputs).expand(outputs.shape)

    def predict(self, logits: Outputs, predictive: str, temperature: Tensor) -> NormalPrediction:
        """In closed form; the temperature multiplies σ²."""
        noise = self.variance(logits.mean) * temperature
        return NormalPrediction(logits, predictive, temperature, self, noise_variance=noise)

    def nll(self, prediction: NormalPrediction, targets: Tensor) -> Tensor:
        """Summed over the outputs, as if they were independent."""
        variance = prediction.logits.variance + prediction.noise_variance
        return -_normal_log_prob(targets - prediction.logits.mean, variance).sum(-1)

    @property
    def is_complete(self) -> bool:
        """Whether the noise is known."""
        return self.noise_variance is not None

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Squared residuals of each output, (C,), squared rounding of its targets, (C,), and their weight, (1,)."""
        weights, eps = weights.double(), torch.finfo(outputs.dtype).eps
        squares = weights @ (targets.double() - outputs.double()).square()
        return torch.cat([squares, weights @ (eps * targets.double()).square(), weights.sum().view(1)])

    def completed(self, sums: Tensor) -> "Regression":
        """With the mean squared residual as the variance of the noise: the maximum of the likelihood.

        It is no less than the rounding of the targets; an output that is always zero has that of the others.

        Raises:
            ValueError: if there is no target.
        """
        count = float(sums[-1])
        if not count > 0:
            raise ValueError("no point has a target that counts: pass data with targets, or noise_variance=.")
        residuals, rounding = sums[:-1].chunk(2)
        variances = torch.maximum(residuals, rounding) / count
        mean = float(variances.mean()) or 1.0
        variances = torch.where(variances > 0, variances, mean)
        if self.noise == "shared" and variances.max() > DIFFERENT**2 * variances.min():
            logger.warning(
                "ELLA: residuals of the outputs lie between %.2g and %.2g, but share one variance of the noise: pass "
                "noise='per-output'.",
                *(float(variances.min().sqrt()), float(variances.max().sqrt())),
            )
        return type(self)(mean if self.noise == "shared" else tuple(variances.tolist()), self.noise)

    def settled(self, temperature: Tensor) -> tuple["Regression", Tensor]:
        """With the noise times the temperature."""
        variance = [float(value) * float(temperature) for value in self.variance(temperature.new_zeros(1))]
        settled = type(self)(variance[0] if len(variance) == 1 else tuple(variance), self.noise)
        return settled, torch.ones_like(temperature)

    def stored(self) -> dict[str, Any]:
        """The noise."""
        return {"noise_variance": self.noise_variance}


class Heteroscedastic(Likelihood):
    """Real numbers with noise that the network knows: outputs are means and log-variances, (*, 2 C), in this order.

    The Fisher information is that of the mean, 1/σ², and of the log-variance, ½ (compare Immer et al. 2023).
    """

    per_output = True
    has_units = True
    has_temperature = True

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Numbers (*, C)."""
        if outputs.shape[-1] % 2:
            raise ValueError(f"{self._name} needs means and log-variances, an even number, not {outputs.shape[-1]}.")
        means = outputs.chunk(2, -1)[0]
        return super().check(means, targets).to(outputs)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed over the means."""
        mean, log_variance = outputs.chunk(2, -1)
        return _normal_log_prob(targets - mean, log_variance.exp()).sum(-1)

    def information(self, outputs: Tensor) -> Tensor:
        """1/σ² and ½."""
        log_variance = outputs.chunk(2, -1)[1]
        return torch.cat([(-log_variance).exp(), torch.full_like(log_variance, 0.5)], -1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The means with noise."""
        mean, log_variance = outputs.chunk(2, -1)
        return mean + _normal(mean, generator) * (log_variance / 2).exp()

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the variance of the noise."""
        mean, log_variance = outputs.chunk(2, -1)
        return mean, log_variance.exp()

    def tempered(self, logits: Outputs, temperature: Tensor) -> Outputs:
        """Variances of the noise times the temperature."""

        def hotter(outputs: Tensor) -> Tensor:
            mean, log_variance = outputs.chunk(2, -1)
            return torch.cat([mean, log_variance + temperature.log()], -1)

        return logits.moved(hotter)


def _way_to_indices(targets: Tensor, outputs: Tensor) -> str:
    """What to pass where targets are no class indices for outputs (*, C)."""
    axis = -1 if targets.shape == outputs.shape else 1
    if targets.ndim == outputs.ndim and targets.movedim(axis, -1).shape == outputs.shape and (targets >= 0).all():
        rows = targets.double().movedim(axis, -1)
        if ((rows == 0) | (rows == 1)).all() and (rows.sum(-1) == 1).all():
            return f"they are one-hot, so pass unpack=lambda batch: (batch[0], batch[1].argmax({axis}))"
        if ((rows.sum(-1) - 1).abs() < 0.01).all():
            return (
                "they are soft labels, as of mixup, CutMix or smoothing, so pass train_loader= (or "
                "calibration_loader=) a loader without them"
            )
    if targets.shape == outputs.shape[:-1] and (targets == targets.round()).all():
        return "pass unpack=lambda batch: (batch[0], batch[1].long())"
    return "pass unpack=lambda batch: (x, labels)"


def _way_into_range(seen: Tensor, num_classes: int) -> str:
    """What to pass where some of the labels that count are not in [0, C)."""
    values = seen.unique().tolist()
    odd = [value for value in values if not 0 <= value < num_classes]
    if num_classes == 2 and set(values) <= {-1, 1}:
        return "of labels -1 and 1 make 0 and 1 by unpack=lambda batch: (batch[0], (batch[1] + 1) // 2)"
    if num_classes == 2 and set(values) <= {0, 255}:
        return (
            "where 255 means yes, pass unpack=lambda batch: (batch[0], batch[1] // 255); where it means that there is "
            f"no label, map it to {IGNORED}, which is ignored"
        )
    if odd in ([255], [-1]):
        return (
            f"where {odd[0]:g} means that there is no label, map it to {IGNORED}, which is ignored: pass unpack="
            f"lambda batch: (batch[0], batch[1].long().masked_fill(batch[1] == {odd[0]:g}, {IGNORED}))"
        )
    if odd == [num_classes] and values[0] >= 1:
        return "they count from 1, so pass unpack=lambda batch: (batch[0], batch[1] - 1)"
    return "pass an unpack= that maps them there"


def _normal_log_prob(residuals: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((residuals / variance.sqrt()).square() + (2 * pi * variance).log())


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "binary": Binary,
    "preference": Preference,
    "ordinal": Ordinal,
    "poisson": Poisson,
    "regression": Regression,
    "heteroscedastic": Heteroscedastic,
}
