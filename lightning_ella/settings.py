"""What a fit and its predictions depend on, apart from the network and the data."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .augmentation import OneView, listed
from .curvature import CURVATURES
from .engine import ENGINES, PRECISIONS
from .landmarks import LANDMARKS
from .likelihoods import LIKELIHOODS
from .posterior import SCALES

MAX_DRAWS = 2**20
MAX_PROBES = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a fit depends on, apart from the network and the data.

    Attributes:
        likelihood: what the network's outputs mean: "classification", "multilabel", "binary", "preference", "ordinal",
            "poisson", "regression" or "heteroscedastic"; or the name under which a class of your own is in
            `LIKELIHOODS`.
        noise_variance: σ² of "regression", a number or one for each output; None estimates it from residuals, and then
            tunes it with the other scales.
        noise: whether σ² is "shared" by the outputs or estimated "per-output".
        channels: where outputs of several positions have their C: "first" as in (B, C, H, W), "last" as in (B, L, C);
            "auto" takes the last axis of three, the second of four.
        top_outputs: k, for vocabularies: of the outputs at each position the k likeliest are kept, and all others
            count as one; None keeps all.
        num_landmarks: M, training inputs that the kernel is approximated from, one output of each; None takes
            half of them, but 200 to 1,000, and at least twice the rank.
        rank: K, directions of the kernel that are kept.
        landmarks: how the landmarks are drawn: "uniform-class" (classes in turn, as in the paper) or "uniform"; "auto"
            takes the first where every point has a class.
        curvature: "exact", or "sampled" with one backward pass a point; "auto" takes the
            second for more than 100 points and more than 25 for each direction, if there are unseen points, too.
        num_curvature: n, training points that the curvature is estimated from; None takes all.
        num_calibration: unseen points that the scales are chosen on, at most: such that the network's losses there are
            like those on five times as many, or 5,000; None takes all.
        num_apart: unseen points for familiarity and guarantees, of those that are left over then, half at most. Where
            these are fewer than 20, nothing is guaranteed, and familiarity is calibrated on those that the scales are
            chosen on, which it does not depend on.
        prior_variance: σ₀²; None chooses it on unseen points.
        covariance_scale: multiplier of the posterior covariance; None chooses it on unseen points.
        residual: the variance outside the span of the K directions, from random probes: "auto" takes as many as are
            cheap, "none" leaves it out, a number takes that many.
        residual_scale: variance of every parameter outside the span; None chooses it on unseen points, and leaves the
            residual out where there are none.
        temperature: the logits are divided by it before they become probabilities; None chooses it on unseen points.
        views: other looks at each input that mean the same, over which predictions average, each for the price of one
            more: names ("hflip", "vflip", "shift2", "hflip+shift2", …) or functions of a batch of inputs. Take those
            that the training's augmentations make.
        learn: whether the mean of the posterior may leave the network's outputs for what unseen points say, where that
            predicts each of them better from the others, by two standard errors.
        predictive: how the posterior is integrated over: "mc", "probit" or "bridge" for classes, "exact" for
            regression; "auto" takes the likelihood's first.
        num_samples: Monte Carlo draws S.
        engine: how features are computed: "forward" or "layerwise" (reverse) mode; "auto" takes the cheaper one.
        precision: of the features: "full" is that of the weights, "bf16" is faster where the processor has it.
        basis_precision: in which V is kept: "full", or "bf16" for half the memory.
        memory_budget: bytes that may be used beyond the network and V; None takes a quarter of what is free.
        samples_per_chunk: inputs that go through the network at a time; None chooses.
        tangents_per_chunk: tangents that go through it at a time; None chooses.
        seed: fixes landmarks, chosen points and Monte Carlo draws.

    Raises:
        ValueError: if a setting is out of range, or no such name exists.
    """

    likelihood: str = "classification"
    noise_variance: float | tuple[float, ...] | None = None
    noise: str = "shared"
    channels: str = "auto"
    top_outputs: int | None = None
    num_landmarks: int | None = None
    rank: int = 20
    landmarks: str = "auto"
    curvature: str = "auto"
    num_curvature: int | None = 1000
    num_calibration: int | None = 1000
    num_apart: int = 250
    prior_variance: float | None = None
    covariance_scale: float | None = None
    residual: str | int = "auto"
    residual_scale: float | None = None
    temperature: float | None = None
    views: tuple[OneView, ...] = ()  # whatever `listed` takes
    learn: bool = False
    predictive: str = "auto"
    num_samples: int = 256
    engine: str = "auto"
    precision: str = "full"
    basis_precision: str = "full"
    memory_budget: int | None = None
    samples_per_chunk: int | None = None
    tangents_per_chunk: int | None = None
    seed: int = 0

    def __post_init__(self):
        _one_of("likelihood", self.likelihood, LIKELIHOODS)
        _one_of("landmarks", self.landmarks, LANDMARKS)
        predictives = LIKELIHOODS[self.likelihood].predictives
        if self.predictive == "auto":
            object.__setattr__(self, "predictive", predictives[0])
        _one_of("predictive", self.predictive, predictives)
        _one_of("noise", self.noise, ("shared", "per-output"))
        _one_of("channels", self.channels, ("auto", "first", "last"))
        if self.noise_variance is not None and self.likelihood == "heteroscedastic":
            raise ValueError("noise_variance= is for likelihood='regression': a heteroscedastic network has its own.")
        if isinstance(self.noise_variance, torch.Tensor) and self.noise_variance.ndim == 0:
            object.__setattr__(self, "noise_variance", float(self.noise_variance))
        elif isinstance(self.noise_variance, Iterable):
            object.__setattr__(self, "noise_variance", tuple(map(float, self.noise_variance)))
        for value in torch.atleast_1d(torch.as_tensor(1.0 if self.noise_variance is None else self.noise_variance)):
            if not 0 < value < float("inf"):
                raise ValueError(f"noise_variance={self.noise_variance!r} must be positive, or None to estimate it.")
        _one_of("curvature", self.curvature, CURVATURES)
        _one_of("engine", self.engine, ENGINES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("basis_precision", self.basis_precision, PRECISIONS)
        for name in ("rank", "num_samples"):
            at_least_one(name, getattr(self, name))
        if self.top_outputs is not None and not LIKELIHOODS[self.likelihood].one_of_many:
            raise ValueError(f"top_outputs= is for likelihood='classification', not for {self.likelihood!r}.")
        for name in (
            "num_landmarks",
            "top_outputs",
            "num_curvature",
            "num_calibration",
            "memory_budget",
            "samples_per_chunk",
            "tangents_per_chunk",
        ):
            if getattr(self, name) is not None:
                at_least_one(name, getattr(self, name))
        if not isinstance(self.num_apart, int) or self.num_apart < 0:
            raise ValueError(f"num_apart={self.num_apart!r} must be a whole number of at least 0.")
        if self.num_samples > MAX_DRAWS:
            raise ValueError(f"num_samples={self.num_samples} is more than {MAX_DRAWS}: 256 are usually enough.")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be a whole number of at least 0.")
        if isinstance(self.residual, str):
            _one_of("residual", self.residual, ("auto", "none"))
        elif not isinstance(self.residual, int) or not 0 <= self.residual <= MAX_PROBES:
            raise ValueError(f"residual={self.residual!r} is not 'auto', 'none' or a number of at most {MAX_PROBES}.")
        object.__setattr__(self, "views", listed(self.views))
        for name, value in {"top_outputs": self.top_outputs, "learn": self.learn or None}.items():
            if self.views and value is not None:
                raise ValueError(f"views= and {name}= do not go together: leave out one of them.")
        for name in SCALES:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a positive number, or None to choose it on unseen points.")
        if self.num_landmarks is not None and self.rank > self.num_landmarks:
            raise ValueError(
                f"rank={self.rank} is more than num_landmarks={self.num_landmarks} can span: "
                f"pass rank={self.num_landmarks} or less, or more landmarks."
            )

    def as_dict(self) -> dict[str, Any]:
        """By name; views are the user's own, not copies."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def limited(self, **limits: int) -> "Settings":
        """These settings, with none of the named numbers above its limit (None counts as above)."""
        return replace(
            self,
            **{n: limit if getattr(self, n) is None else min(limit, getattr(self, n)) for n, limit in limits.items()},
        )


def _one_of(name: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}.")


def at_least_one(name: str, value: Any) -> None:
    """Raise a ValueError unless a number is a whole one of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
