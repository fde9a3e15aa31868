"""What a posterior says of a batch: the Gaussian over outputs, and what is read off it.

Outputs are (*, C): B samples, or B samples of several positions (tokens, pixels) with C outputs each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log, pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .chunks import chunks
from .guarantee import MISSING, Guarantee
from .numerics import centred, in_full
from .top import Selection

if TYPE_CHECKING:
    from .likelihoods import Likelihood

ROUNDING = 1e-6  # of a probability, or a share of a number, in a batch of another size
FEWEST_TARGETS = 256  # that quantiles come from


@dataclass  # not frozen: Lightning moves what predict_step returns to the CPU field by field
class Gaussian:
    """Outputs with mean f(x) and covariance F Fᵀ, and the standard normal draws shared by all inputs.

    Everything from one posterior is in the same K coordinates, so a difference of two has its own covariance.
    """

    mean: Tensor  # (*, C)
    factor: Tensor  # (*, C, K)
    draws: Tensor = field(repr=False)  # (S, K)

    @property
    def covariance(self) -> Tensor:
        """(*, C, C), of the outputs of one position."""
        with in_full(self.factor):
            return self.factor @ self.factor.mT

    @property
    def variance(self) -> Tensor:
        """(*, C), the diagonal of the covariance."""
        return self.factor.square().sum(-1)

    @property
    def centred_variance(self) -> Tensor:
        """(*, C), of the outputs minus their mean over C."""
        return centred(self.factor).square().sum(-1)

    @property
    def joint(self) -> "LowRank":
        """The covariance of all outputs of all positions and samples, (n, n), in the order of `mean.flatten()`."""
        return LowRank(self.factor.flatten(0, -2))

    def __sub__(self, other: "Gaussian") -> "Gaussian":
        """The difference, whose variance knows that the two go together: Var(a) + Var(b) − 2 Cov(a, b).

        Raises:
            ValueError: if one of them is a student's, or of several views.
        """
        if isinstance(other, Mixture):
            raise ValueError(ONE_VIEW)
        if isinstance(self, Spread) or isinstance(other, Spread):
            raise ValueError("a student knows each input by itself: ask the exact predictor for a difference.")
        return Gaussian(self.mean - other.mean, self.factor - other.factor, self.draws)

    def __truediv__(self, by: Tensor) -> "Gaussian":
        return replace(self, mean=self.mean / by, factor=self.factor / by)

    def expectation(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Monte Carlo mean (*, …) of `function`, which maps outputs (s, *, C) to (s, *, …)."""
        total = sum(function(samples).sum(0) for samples in self.in_parts())
        return torch.as_tensor(total) / len(self.draws)

    def in_parts(self) -> Iterator[Tensor]:
        """Outputs (s, *, C) of some of the draws at a time."""
        size = max(1, chunks(self.mean).outputs // max(1, self.mean.numel()))
        yield from (replace(self, draws=z).samples() for z in self.draws.split(size))

    def rows(self) -> Iterator["Gaussian"]:
        """Some samples of the batch at a time, so many that all their draws are few enough."""
        size = self._rows_at_a_time()
        parts = zip(self.mean.split(size), self.factor.split(size), strict=True)
        yield from (replace(self, mean=mean, factor=factor) for mean, factor in parts)

    def _rows_at_a_time(self) -> int:
        return max(1, chunks(self.mean).outputs // max(1, len(self.draws) * self.mean[:1].numel()))

    def samples(self) -> Tensor:
        """Outputs (S, *, C), one for each draw."""
        with in_full(self.factor):
            away = self.draws @ self.factor.flatten(0, -2).T  # (S, K) x (K, n C) -> (S, n C)
        return self.mean + away.view(len(self.draws), *self.mean.shape)

    def read(self, closed: Callable[["Gaussian"], Tensor]) -> Tensor:
        """What a closed form makes of it."""
        return closed(self)

    def moved(self, change: Callable[[Tensor], Tensor]) -> "Gaussian":
        """With another mean."""
        return replace(self, mean=change(self.mean))

    def label_log_probs(self, labels: Tensor, temperature: Tensor) -> Tensor:
        """Log softmax at the label, (S, *), of each draw's outputs divided by the temperature."""
        size = max(1, chunks(self.mean).reused_outputs // max(1, self.mean.numel()))
        mean, factor = self.mean.flatten(0, -2).to(self.factor), self.factor.flatten(0, -3)
        parts = [
            _LabelLogProbs.apply(mean, factor, z, 1 / temperature.to(mean), labels.flatten())
            for z in self.draws.split(size)
        ]
        return torch.cat(parts).view(len(self.draws), *labels.shape)  # type: ignore[arg-type]


@dataclass
class Spread(Gaussian):
    """Outputs with covariance F Fᵀ + diag(σ²): what they share, and a deviation σ that each has of its own.

    The draws (S, K + C) are those of the K shared coordinates, and of the outputs' own deviations.
    """

    own: Tensor = field(kw_only=True)  # σ, (*, C)

    @property
    def covariance(self) -> Tensor:
        """(*, C, C), of the outputs of one position."""
        return super().covariance + torch.diag_embed(self.own.square())

    @property
    def variance(self) -> Tensor:
        """(*, C), the diagonal of the covariance."""
        return super().variance + self.own.square()

    @property
    def centred_variance(self) -> Tensor:
        """(*, C), of the outputs minus their mean over C."""
        squares, count = self.own.square(), self.own.shape[-1]
        return super().centred_variance + (1 - 2 / count) * squares + squares.sum(-1, keepdim=True) / count**2

    @property
    def joint(self) -> "LowRank":
        """Not known of a student.

        Raises:
            ValueError: always.
        """
        raise ValueError("a student knows each input by itself: ask the exact predictor what several have in common.")

    def __truediv__(self, by: Tensor) -> "Spread":
        return replace(self, mean=self.mean / by, factor=self.factor / by, own=self.own / by)

    def rows(self) -> Iterator["Spread"]:
        """Some samples of the batch at a time, so many that all their draws are few enough."""
        size = self._rows_at_a_time()
        parts = zip(self.mean.split(size), self.factor.split(size), self.own.split(size), strict=True)
        yield from (Spread(mean, factor, self.draws, own=own) for mean, factor, own in parts)

    def samples(self) -> Tensor:
        """Outputs (S, *, C), one for each draw."""
        rank = self.factor.shape[-1]
        shared = Gaussian(self.mean, self.factor, self.draws[:, :rank]).samples()
        apart = self.draws[:, rank:].view(-1, *[1] * (self.own.ndim - 1), self.own.shape[-1])
        return shared + self.own * apart

    def label_log_probs(self, labels: Tensor, temperature: Tensor) -> Tensor:
        """Log softmax at the label, (S, *), of each draw's outputs divided by the temperature."""
        where = labels.unsqueeze(-1)
        parts = (self / temperature).in_parts()
        logs = (f.log_softmax(-1).gather(-1, where.expand(len(f), *where.shape)) for f in parts)
        return torch.cat(list(logs)).squeeze(-1)


class _LabelLogProbs(torch.autograd.Function):
    """Log softmax at labels (n,), (S, n), of outputs a (m + F z): mean m (n, C), factor F (n, C, K), draws z (S, K).

    What autograd would do keeps and reads S n C numbers several times over; where C is large that is nearly all of the
    calibration. Here they are made, exponentiated and divided in place, and read once more for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, factor: Tensor, draws: Tensor, by: Tensor, labels: Tensor) -> Tensor:
        """Fill one matrix: outputs, then probabilities."""
        flat = torch.addmm(mean.flatten(), draws, factor.flatten(0, 1).T).mul_(by)  # (S, K) x (K, n C) -> (S, n C)
        outputs = flat.view(len(draws), *mean.shape)
        largest = outputs.amax(-1, keepdim=True)
        where = labels.expand(len(draws), -1).unsqueeze(-1)
        chosen = outputs.gather(-1, where) - largest
        total = outputs.sub_(largest).exp_().sum(-1, keepdim=True)
        ctx.save_for_backward(mean, factor, draws, by, where, outputs.div_(total))
        return (chosen - total.log()).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Through the one-hot label minus p."""
        mean, factor, draws, by, where, probs = ctx.saved_tensors
        rows = factor.flatten(0, 1)  # (n C, K)
        back = (probs * -gradient.unsqueeze(-1)).scatter_add_(-1, where, gradient.unsqueeze(-1)).flatten(1)  # (S, n C)
        to_draws = back @ rows
        to_by = (back @ mean.flatten()).sum() + (to_draws * draws).sum()
        to_mean = by * back.sum(0).view_as(mean) if ctx.needs_input_grad[0] else None
        to_factor = by * (back.T @ draws).view_as(factor) if ctx.needs_input_grad[1] else None
        return to_mean, to_factor, by * to_draws, to_by, None


class LowRank:
    """The matrix F Fᵀ, (n, n), that is never built: products, diagonal and blocks from F, (n, K)."""

    def __init__(self, factor: Tensor):
        self.factor = factor
        self.shape = torch.Size((len(factor), len(factor)))

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """F (Fᵀ v), (n,) or (n, k)."""
        with in_full(self.factor):
            return self.factor @ (self.factor.T @ vectors)

    def __getitem__(self, index: tuple) -> Tensor:
        """A block: rows and columns by slices, tensors of indices or numbers."""
        rows, columns = index
        left, right = self.factor[rows], self.factor[columns]
        with in_full(self.factor):
            products = left.reshape(-1, left.shape[-1]) @ right.reshape(-1, right.shape[-1]).T
        return products.view([*left.shape[:-1], *right.shape[:-1]])

    def diagonal(self) -> Tensor:
        """(n,)."""
        return self.factor.square().sum(1)


ONE_VIEW = "with views= ask predictor.outputs(inputs) for a difference, or for what several inputs have in common."


@dataclass
class Mixture:
    """Outputs of one of V views of each input, each as likely.

    Draws of the weights are the same for all views, so there are V S samples.
    """

    parts: list[Gaussian]

    @property
    def draws(self) -> Tensor:
        """(S, K), of each view."""
        return self.parts[0].draws

    @property
    def mean(self) -> Tensor:
        """(*, C), over the views."""
        return torch.stack([part.mean for part in self.parts]).mean(0)

    @property
    def covariance(self) -> Tensor:
        """(*, C, C), of the outputs of one position, by the law of total covariance."""
        means = torch.stack([part.mean for part in self.parts]) - self.mean
        between = torch.einsum("v...c,v...d->...cd", means, means) / len(self.parts)
        return self.read(lambda part: part.covariance) + between

    @property
    def variance(self) -> Tensor:
        """(*, C), the diagonal of the covariance."""
        means = torch.stack([part.mean for part in self.parts])
        return self.read(lambda part: part.variance) + means.var(0, correction=0)

    @property
    def joint(self) -> LowRank:
        """Not known of views.

        Raises:
            ValueError: always.
        """
        raise ValueError(ONE_VIEW)

    def __sub__(self, other: Any) -> Any:
        raise ValueError(ONE_VIEW)

    def __truediv__(self, by: Tensor) -> "Mixture":
        return Mixture([part / by for part in self.parts])

    def expectation(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Monte Carlo mean (*, …) of `function`, which maps outputs (s, *, C) to (s, *, …)."""
        return self.read(lambda part: part.expectation(function))

    def in_parts(self) -> Iterator[Tensor]:
        """Outputs (s, *, C) of some of the draws and views at a time."""
        for part in self.parts:
            yield from part.in_parts()

    def rows(self) -> Iterator["Mixture"]:
        """Some samples of the batch at a time."""
        yield from (Mixture([*some]) for some in zip(*(part.rows() for part in self.parts), strict=True))

    def samples(self) -> Tensor:
        """Outputs (V S, *, C), one for each view and draw."""
        return torch.cat([part.samples() for part in self.parts])

    def read(self, closed: Callable[[Gaussian], Tensor]) -> Tensor:
        """The mean over the views of what a closed form makes of each."""
        return torch.stack([closed(part) for part in self.parts]).mean(0)

    def moved(self, change: Callable[[Tensor], Tensor]) -> "Mixture":
        """With other means."""
        return Mixture([part.moved(change) for part in self.parts])

    def label_log_probs(self, labels: Tensor, temperature: Tensor) -> Tensor:
        """Log softmax at the label, (V S, *), of each draw's outputs divided by the temperature."""
        return torch.cat([part.label_log_probs(labels, temperature) for part in self.parts])


Outputs = Gaussian | Mixture


def mixed(parts: list[Gaussian]) -> Outputs:
    """The outputs of one view, or of one of several."""
    return parts[0] if len(parts) == 1 else Mixture(parts)


@dataclass
class Prediction:
    """What the posterior says of a batch, by Monte Carlo over its outputs, for any likelihood.

    Everything but the logits is worked out when it is asked for. Shapes are those of the network's outputs.
    """

    logits: Outputs
    predictive: str
    temperature: Tensor  # ()
    likelihood: "Likelihood | None" = None
    novelty: Tensor | None = None  # (B,), the share of the kernel that the directions do not reach
    axis: int | None = -1  # of the network's outputs, where C is; None if they have no such axis
    familiarity: Tensor | None = None  # (B,), the share of familiar inputs that look at least as foreign
    distance: Tensor | None = None  # (B,), of the activations from those of training points
    energy: Tensor | None = None  # (B,), of the outputs; low where they are sure
    guarantee: Guarantee | None = None

    @property
    def logits_mean(self) -> Tensor:
        """(B, C), the outputs of the trained network, unchanged; with views their mean over these."""
        return self.shaped(self.logits.mean)

    @property
    def logits_covariance(self) -> Tensor:
        """(B, C, C); (B, *, C, C) where there are several positions. All of it at once: `logits.joint`."""
        return self.logits.covariance

    @property
    def logits_variance(self) -> Tensor:
        """(B, C), the diagonal of `logits_covariance` without the rest of it."""
        return self.shaped(self.logits.variance)

    @cached_property
    def mean(self) -> Tensor:
        """E[y], (B, C)."""
        return self._as_targets(self._moments[0])

    @property
    def mean_of_rows(self) -> Tensor:
        """E[y], (*, C), or (*) where all outputs have one target."""
        return self._moments[0]

    @property
    def moments_of_rows(self) -> tuple[Tensor, Tensor]:
        """E[y] and Var[y], (*, C) each, or (*)."""
        return self._moments

    @cached_property
    def variance(self) -> Tensor:
        """Var[y], (B, C): of the noise, and of what is not known of the network."""
        return self._as_targets(self._moments[1])

    def log_prob(self, targets: Tensor) -> Tensor:
        """Log p(y), (B,), nats; of several outputs the sum, as if they were independent where a likelihood says so.

        It is 0 where there is no target (−100).
        """
        assert self.likelihood is not None
        checked = self._checked(targets)
        seen = self.likelihood.observed(checked)
        return torch.where(seen, -self.likelihood.nll(self, checked), 0)

    def sample(self, seed: int = 0) -> Tensor:
        """Targets (S, B, C), one for each draw of the network, with their noise."""
        assert self.likelihood is not None
        return self._as_targets(self._targets(seed), 2)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Quantiles of y, (B, C) for a number, (Q, B, C) for several.

        Raises:
            ValueError: if q is not in [0, 1].
        """
        levels = torch.as_tensor(q, dtype=torch.float64)
        if not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"quantile({q!r}): quantiles are of numbers in [0, 1].")
        found = self._as_targets(self._quantiles(torch.atleast_1d(levels)), 2)
        return found[0] if levels.ndim == 0 else found

    def interval(self, level: float = 0.9, *, guaranteed: bool = False) -> tuple[Tensor, Tensor]:
        """The central interval that holds y with probability `level`: its ends, (B, C) each.

        Args:
            level: of each output by itself.
            guaranteed: take the mean, and as many standard deviations as hold y that often whatever the network, as
                points that nothing else has seen tell; infinite if they are too few.

        Raises:
            ValueError: if there were no such points, or if the level is no probability.
        """
        if guaranteed:
            assert self.likelihood is not None
            mean, variance = self._moments
            times = self._guarantee("interval(guaranteed=True)").quantile(level).to(mean)
            away = (1 + ROUNDING) * times * variance.sqrt() + ROUNDING * mean.abs()
            away = torch.where(times.isinf(), torch.inf, away)
            low, high = (mean - away).clamp_min(self.likelihood.lowest), mean + away
            return self._as_targets(low), self._as_targets(high)
        low, high = self.quantile([(1 - level) / 2, (1 + level) / 2])
        return low, high

    def crps(self, targets: Tensor) -> Tensor:
        """Continuous ranked probability score (Gneiting and Raftery 2007), (B, C), in the units of y."""
        return self._as_targets(self.crps_of_rows(self._checked(targets).to(self.logits.mean)))

    def crps_of_rows(self, targets: Tensor) -> Tensor:
        """The same for targets (*, C), or (*) where all outputs have one target."""
        return self._crps(targets)

    def interval_of_rows(self, level: float) -> tuple[Tensor, Tensor]:
        """The same as `interval`, (*, C) each, or (*)."""
        low, high = self._quantiles(torch.tensor([(1 - level) / 2, (1 + level) / 2]))
        return low, high

    def _guarantee(self, what: str) -> Guarantee:
        if self.guarantee is None:
            raise ValueError(f"{what} {MISSING}")
        return self.guarantee

    def shaped(self, values: Tensor) -> Tensor:
        """(*, C) to the shape of the network's outputs."""
        return shaped(values, self.axis)

    def rows_of(self, targets: Tensor) -> Tensor:
        """Targets in the shape of the network's outputs to (*, C)."""
        if targets.ndim == self.logits.mean.ndim - 1:  # (B,) for a single output
            return targets.unsqueeze(-1)
        return targets if self.axis is None else targets.movedim(self.axis, -1)

    def _checked(self, targets: Tensor) -> Tensor:
        """Targets in the shape of the network's outputs as the likelihood takes them."""
        assert self.likelihood is not None
        rows = self.rows_of(targets) if self.likelihood.per_output else targets
        return self.likelihood.check(self.logits.mean, rows)

    def _as_targets(self, values: Tensor, batch_axes: int = 1) -> Tensor:
        """What belongs to targets (*, C) to where the network has its C; what belongs to targets (*) is as it is."""
        assert self.likelihood is not None
        return shaped(values, self.axis, batch_axes) if self.likelihood.per_output else values

    @property
    def tempered(self) -> Outputs:
        """Outputs as the likelihood takes them, at the temperature."""
        assert self.likelihood is not None
        return self.likelihood.tempered(self.logits, self.temperature)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """By the law of total variance, (*, C) each, or (*) where all outputs have one target."""
        assert self.likelihood is not None
        likelihood = self.likelihood
        if not likelihood.has_moments:
            drawn = [self._targets(logits=part).double() for part in self.logits.rows()]
            mean, variance = (torch.cat([f(part) for part in drawn]) for f in (_mean, _variance))
            return mean.to(self.logits.mean), variance.to(self.logits.mean)
        mean = self.tempered.expectation(lambda f: likelihood.moments(f)[0])

        def spread(f: Tensor) -> Tensor:
            found, variance = likelihood.moments(f)
            return variance + (found - mean).square()

        return mean, self.tempered.expectation(spread)

    def _targets(self, seed: int = 0, logits: Outputs | None = None) -> Tensor:
        """Targets (S, *, C) or (S, *); two or more for each draw where there are few draws."""
        assert self.likelihood is not None
        logits = self.likelihood.tempered(logits or self.logits, self.temperature)
        generator = torch.Generator().manual_seed(seed)
        copies = max(1, FEWEST_TARGETS // len(logits.draws))  # a network that is certain has one draw
        return self.likelihood.sample(logits.samples().repeat_interleave(copies, 0), generator)

    def _quantiles(self, q: Tensor) -> Tensor:
        found = []
        for part in self.logits.rows():
            drawn = self._targets(logits=part).sort(0).values
            found.append(drawn[(q.to(drawn.device) * (len(drawn) - 1)).round().long()])
        return torch.cat(found, 1)

    def _crps(self, targets: Tensor) -> Tensor:
        """E|X − y| − ½ E|X − X'|, without bias, from sorted samples of X."""
        found, done = [], 0
        for part in self.logits.rows():
            y = targets[done : (done := done + len(part.mean))]
            away = self._targets(logits=part).to(y).sort(0).values - y  # from y: large numbers would cancel
            count = len(away)
            weights = (2 * torch.arange(1, count + 1) - count - 1).to(away) / (count * max(1, count - 1))
            with in_full(away):
                found.append(away.abs().mean(0) - torch.einsum("s,s...->...", weights, away))
        return torch.cat(found)

    def __len__(self) -> int:
        return len(self.logits.mean)


def _mean(samples: Tensor) -> Tensor:
    return samples.mean(0)


def _variance(samples: Tensor) -> Tensor:
    return samples.var(0, unbiased=False)


def shaped(values: Tensor, axis: int | None, batch_axes: int = 1) -> Tensor:
    """(…, B, *, C), with so many axes up to B, to where the network has its C: `axis` after B is 1."""
    if axis is None:
        return values.squeeze(-1)
    return values.movedim(-1, axis if axis < 0 else axis + batch_axes - 1)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities of C classes."""
    return logits.softmax(-1)


@dataclass
class ClassPrediction(Prediction):
    """One of C classes: probabilities, and how uncertain they are."""

    link: Callable[[Tensor], Tensor] = softmax  # outputs (*, C) to probabilities of classes
    indices: Tensor | None = None  # (*, k), the classes that `top_outputs` kept; the last one of `probs` is all others

    def log_prob(self, targets: Tensor) -> Tensor:
        """Log p(y), (B,), nats; of a class that `top_outputs` did not keep, that of all others together."""
        if self.indices is not None:
            targets = Selection(self.indices, self.indices).labels(targets)
        return super().log_prob(targets)

    def sample(self, seed: int = 0) -> Tensor:
        """Classes (S, B), one for each draw of the network; −1 for those that `top_outputs` did not keep."""
        drawn = super().sample(seed)
        if self.indices is None:
            return drawn
        words = pad(self.indices, (0, 1), value=-1).expand(len(drawn), *self.indices.shape[:-1], -1)
        return words.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def probs(self) -> Tensor:
        """(B, C) class probabilities, averaged over the posterior."""
        return self.shaped(self._probs)

    @property
    def confidence(self) -> Tensor:
        """(B,), the probability of the likeliest class."""
        return self._probs.amax(-1)

    def prediction_set(self, level: float = 0.9) -> Tensor:
        """(B, C) bool: a set that holds the right class in a share `level` of cases, whatever the network.

        Its classes have a probability of at least 1 − q, where q is a quantile of 1 − p at the labels of points that
        nothing else has seen (Sadinle, Lei and Wasserman 2019). Where no class is that likely, it is empty.

        Raises:
            ValueError: if there were no such points, or if the level is no probability.
        """
        return 1 - self.probs <= self._guarantee("prediction_set()").quantile(level).to(self.probs) + ROUNDING

    @cached_property
    def entropy(self) -> Tensor:
        """(B,) total uncertainty: the entropy of `probs`, nats."""
        return entropy(self._probs)

    @cached_property
    def mutual_information(self) -> Tensor:
        """(B,) epistemic uncertainty, nats: what the label would tell about the weights.

        H(E[p]) − E[H(p)], both by Monte Carlo with the same draws, whichever way `probs` are computed.
        """
        mean = self._probs if self.predictive == "mc" else self.tempered.expectation(self.link)
        expected = self.tempered.expectation(lambda f: entropy(self.link(f)))
        return (entropy(mean) - expected).clamp_min(0)

    @property
    def tempered(self) -> Outputs:
        """Logits divided by the temperature."""
        return self.logits / self.temperature

    @cached_property
    def _probs(self) -> Tensor:
        closed = CLOSED_FORMS.get(self.predictive)
        return self.tempered.expectation(self.link) if closed is None else self.tempered.read(closed)


@dataclass
class LabelPrediction(Prediction):
    """C labels, each there or not (or one, of a binary classifier)."""

    @cached_property
    def probs(self) -> Tensor:
        """(B, C), of each label to be there, averaged over the posterior."""
        return self.shaped(self._probs).to(self.logits.mean)

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Of each label to be there, and to be absent, (*, C) float64 each: the smaller one is exact, too."""
        return self._probs, self._expected(-1)

    @property
    def confidence(self) -> Tensor:
        """(B, C), the probability of the likelier of there and absent, float64: float32 does not tell them near 1."""
        return self.shaped(torch.maximum(*self.both))

    def prediction_set(self, level: float = 0.9) -> Tensor:
        """(B, C, 2) bool, whether each label may be absent, and whether it may be there.

        The truth is among these in a share `level` of cases, for each label by itself; see
        `ClassPrediction.prediction_set`.

        Raises:
            ValueError: if there were no points that nothing else has seen, or if the level is no probability.
        """
        bound = self._guarantee("prediction_set()").quantile(level)
        there, absent = (1 - probs <= bound.to(probs) + ROUNDING for probs in self.both)  # (*, C)
        return torch.stack([self.shaped(absent), self.shaped(there)], -1)

    @cached_property
    def entropy(self) -> Tensor:
        """(B, C) total uncertainty of each label, nats."""
        return self.shaped(binary_entropy(self._probs)).to(self.logits.mean)

    @cached_property
    def mutual_information(self) -> Tensor:
        """(B, C) epistemic uncertainty of each label, nats."""
        expected = self.tempered.expectation(lambda f: binary_entropy(f.sigmoid()))
        mean = self._probs if self.predictive == "mc" else self.tempered.expectation(torch.sigmoid)
        return self.shaped((binary_entropy(mean) - expected).clamp_min(0)).to(self.logits.mean)

    @property
    def tempered(self) -> Outputs:
        """Logits divided by the temperature."""
        return self.logits / self.temperature

    @cached_property
    def _probs(self) -> Tensor:
        return self._expected(1)

    def _expected(self, sign: int) -> Tensor:
        logits = self.tempered
        if self.predictive == "mc":
            return logits.expectation(lambda f: (sign * f).double().sigmoid())
        shrunk = lambda g: sign * g.mean / (1 + pi / 8 * g.variance).sqrt()  # noqa: E731 - MacKay 1992
        return logits.read(lambda g: shrunk(g).double().sigmoid())


@dataclass
class NormalPrediction(Prediction):
    """Outputs with Gaussian noise of known variance, in closed form: y ~ N(f(x), F Fᵀ + σ²).

    Of several views it is the normal distribution with the moments of all of them (as of an ensemble, Lakshminarayanan
    et al. 2017).
    """

    noise_variance: Tensor = field(default_factory=lambda: torch.ones(1))  # σ², (C,), at the temperature

    @property
    def tempered(self) -> Outputs:
        """The outputs as they are: the temperature is in the noise."""
        return self.logits

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return self.logits.mean, self.logits.variance + self.noise_variance

    def _targets(self, seed: int = 0, logits: Outputs | None = None) -> Tensor:
        drawn = (logits or self.logits).samples()
        noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(seed), dtype=drawn.dtype)
        return drawn + noise.to(drawn.device) * self.noise_variance.sqrt()

    def _quantiles(self, q: Tensor) -> Tensor:
        mean, variance = self._moments
        steps = torch.special.ndtri(q.to(mean)).view(-1, *[1] * mean.ndim)
        return mean + steps * variance.sqrt()

    def _crps(self, targets: Tensor) -> Tensor:
        """Of a normal distribution: Gneiting and Raftery (2007), equation 21."""
        mean, deviation = self._moments[0], self._moments[1].sqrt()
        z = (targets - mean) / deviation
        density = (-z.square() / 2).exp() / (2 * pi) ** 0.5
        return deviation * (z * (2 * torch.special.ndtr(z) - 1) + 2 * density - pi**-0.5)


def probit(logits: Gaussian) -> Tensor:
    """Softmax of logits that are shrunk by their variance (MacKay 1992; Gibbs 1997), (*, C)."""
    return (logits.mean / (1 + pi / 8 * logits.variance).sqrt()).softmax(-1)


def laplace_bridge(logits: Gaussian) -> Tensor:
    """Mean of the Dirichlet that matches the Gaussian (Hobbhahn et al. 2022, equation 5), (*, C).

    Both are first centred over the classes, which the softmax does not notice. The bridge is close to Monte Carlo
    only where the logits' variance is of order one; where it vanishes the bridge is not the softmax.
    """
    mean, num_classes = logits.mean - logits.mean.mean(-1, keepdim=True), logits.mean.shape[-1]
    variance = logits.centred_variance.clamp_min(torch.finfo(mean.dtype).eps)
    evidence = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * log(num_classes)
    constant = torch.full_like(evidence, 1 - 2 / num_classes).log()
    return (torch.logaddexp(constant, evidence) - variance.log()).softmax(-1)


CLOSED_FORMS: dict[str, Callable[[Gaussian], Tensor]] = {"probit": probit, "bridge": laplace_bridge}


def entropy(probs: Tensor) -> Tensor:
    """−Σ p log p over the last axis, nats."""
    return torch.special.entr(probs).sum(-1)


def binary_entropy(probs: Tensor) -> Tensor:
    """−p log p − (1 − p) log(1 − p), nats."""
    return torch.special.entr(probs) + torch.special.entr(1 - probs)
