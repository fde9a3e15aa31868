"""The pipeline: landmarks → basis → curvature → calibration → predictor."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .basis import nystrom_basis, sketch_numbers
from .curvature import CURVATURES, curvature
from .data import Inputs, Points, Unpack, draw, inputs_and_targets, seeded
from .engine import ENGINES, PRECISIONS, Linearization, give_back
from .landmarks import LANDMARKS, Landmarks
from .likelihoods import LIKELIHOODS, Gaussian, Likelihood
from .linearize import Forward, as_function, call, num_samples
from .posterior import Posterior, calibrate
from .predictor import ELLAPredictor, linearize, standard_normal

log = logging.getLogger(__name__)

SAMPLES_CHECKED = 8  # before a fit, so that what would fail late fails early

Progress = Callable[[Iterable, str, int], Iterable]  # (batches, what is done, how many points) -> batches


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a fit depends on, apart from the network and the data.

    Attributes:
        likelihood: what the network's outputs mean: "classification".
        num_landmarks: M, training inputs that the kernel is approximated from, one output of each.
        rank: K, directions of the kernel that are kept.
        landmarks: how the landmarks are drawn: "class-balanced" or "uniform".
        curvature: "exact", or "sampled" with one backward pass a point.
        num_curvature: n, training points that the curvature is estimated from; None takes all.
        num_calibration: unseen points that the scales are chosen on, at most; None takes all.
        prior_variance: σ₀²; None chooses it on unseen points.
        covariance_scale: multiplier of the posterior covariance; None chooses it on unseen points.
        predictive: how probabilities are averaged over the posterior: "mc", "probit" or "bridge".
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
    num_landmarks: int = 2000
    rank: int = 20
    landmarks: str = "class-balanced"
    curvature: str = "exact"
    num_curvature: int | None = 2000
    num_calibration: int | None = 5000
    prior_variance: float | None = None
    covariance_scale: float | None = None
    predictive: str = "mc"
    num_samples: int = 512
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
        _one_of("predictive", self.predictive, LIKELIHOODS[self.likelihood].predictives)
        _one_of("curvature", self.curvature, CURVATURES)
        _one_of("engine", self.engine, ENGINES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("basis_precision", self.basis_precision, PRECISIONS)
        for name in ("num_landmarks", "rank", "num_samples"):
            _at_least_one(name, getattr(self, name))
        for name in ("num_curvature", "num_calibration", "memory_budget", "samples_per_chunk", "tangents_per_chunk"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        for name in ("prior_variance", "covariance_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a positive number, or None to choose it on unseen points.")
        if self.rank > self.num_landmarks:
            raise ValueError(
                f"rank={self.rank} is more than num_landmarks={self.num_landmarks} can span: "
                f"pass rank={self.num_landmarks} or less, or more landmarks."
            )

    def limited(self, **limits: int) -> "Settings":
        """These settings, with none of the named numbers above its limit (None counts as above)."""
        return replace(
            self,
            **{n: limit if getattr(self, n) is None else min(limit, getattr(self, n)) for n, limit in limits.items()},
        )


@dataclass(frozen=True)
class Fit:
    """A predictor, and what the fit found out on the way."""

    predictor: ELLAPredictor
    figures: dict[str, float]  # "map/nll", "ella/nll", …, "ella/prior_variance", "ella/seconds"
    num_calibration: int  # unseen points that the figures are of


def fit_ella(
    model: nn.Module,
    train_loader: DataLoader,
    calibration_loader: DataLoader | None = None,
    likelihood: str = "classification",
    *,
    unpack: Unpack = inputs_and_targets,
    forward: Forward = call,
    **settings: Any,
) -> ELLAPredictor:
    """Turn a trained network into a Bayesian predictor (ELLA, Deng, Zhou and Zhu, NeurIPS 2022).

    The network itself is not changed: weights, modes, gradients and device stay as they are.

    Args:
        model: a trained network on the device where the work is to be done.
        train_loader: the data that it was trained on, without augmentation.
        calibration_loader: data that it has never seen, to choose the prior variance and the covariance scale on.
        likelihood: what the outputs mean.
        unpack: maps a batch to `(inputs, targets)`; by default batches are such pairs.
        forward: maps `(model, inputs)` to logits (B, C); `model(inputs)` by default.
        **settings: see `Settings`.

    Raises:
        ValueError, TypeError: if the network, the data or a setting cannot be used; the message names the fix.
    """
    chosen = Settings(likelihood=likelihood, **settings)
    return run(model, train_loader, calibration_loader, chosen, unpack=unpack, forward=forward).predictor


def run(
    model: nn.Module,
    train_loader: DataLoader,
    calibration_loader: DataLoader | None,
    settings: Settings,
    *,
    unpack: Unpack = inputs_and_targets,
    forward: Forward = call,
    progress: Progress | None = None,
) -> Fit:
    """As `fit_ella`, and report figures and progress."""
    started = time.perf_counter()
    progress = progress or _tqdm
    with seeded(settings.seed), as_function(model):
        linearization = linearize(model, forward, asdict(settings))
        likelihood = LIKELIHOODS[settings.likelihood]()
        generator = torch.Generator().manual_seed(settings.seed)
        train, held_out = _points(train_loader, calibration_loader, unpack)
        num_outputs = _check(linearization, train, held_out, settings)

        def visit(points: Points, numbers: list[int], what: str) -> Iterable[tuple[Inputs, Tensor]]:
            return progress(points.batches(numbers, linearization.device), f"ELLA {what}", len(numbers))

        landmarks = LANDMARKS[settings.landmarks](train, settings.num_landmarks, num_outputs, generator)
        basis, eigenvalues = _basis(linearization, landmarks, partial(visit, train), settings)
        hessian = curvature(
            linearization,
            visit(train, draw(settings.num_curvature, len(train), generator), "curvature"),
            basis,
            likelihood,
            len(train),
            how=settings.curvature,
            generator=generator,
        )
        if held_out is None:
            posterior, figures, count = _given(hessian, settings), {}, 0
        else:
            count = min(len(held_out), settings.num_calibration or len(held_out))
            unseen = visit(held_out, draw(count, len(held_out), generator), "calibration")
            cached = [(*linearization.features(inputs, basis), targets) for inputs, targets in unseen]
            posterior, figures = _calibrated(cached, hessian, likelihood, settings)
        predictor = ELLAPredictor(
            model,
            basis=basis,
            eigenvalues=eigenvalues,
            curvature=hessian,
            prior_variance=posterior.prior_variance,
            covariance_scale=posterior.covariance_scale,
            forward=forward,
            settings=asdict(settings),
        )
    figures |= {
        "ella/prior_variance": float(posterior.prior_variance),
        "ella/covariance_scale": float(posterior.covariance_scale),
        "ella/seconds": time.perf_counter() - started,
        **{f"ella/eigenvalue_{k:02d}": value for k, value in enumerate(eigenvalues.tolist())},
    }
    return Fit(predictor, figures, count)


def check(
    model: nn.Module,
    train_loader: DataLoader,
    calibration_loader: DataLoader | None,
    settings: Settings,
    *,
    unpack: Unpack = inputs_and_targets,
    forward: Forward = call,
) -> None:
    """Find out, from a few points, whether a fit can work; raise an error that names the fix if not."""
    with seeded(settings.seed), as_function(model):
        train, held_out = _points(train_loader, calibration_loader, unpack)
        _check(linearize(model, forward, asdict(settings)), train, held_out, settings)


def _points(train: DataLoader, held_out: DataLoader | None, unpack: Unpack) -> tuple[Points, Points | None]:
    return Points(train, unpack), None if held_out is None else Points(held_out, unpack)


def _check(linearization: Linearization, train: Points, held_out: Points | None, settings: Settings) -> int:
    """Return C, the number of the network's outputs, if network and data can be used."""
    if len(train) < settings.num_landmarks:
        raise ValueError(
            f"num_landmarks={settings.num_landmarks}, but there are only {len(train)} training points: "
            f"pass num_landmarks={len(train)} or less."
        )
    sketch_numbers(
        settings.num_landmarks, linearization.parameters, settings.rank, linearization.memory_budget // 2
    )  # refuses a budget that is too small
    num_outputs = _try(linearization, train, settings)
    if held_out is not None:
        _try(linearization, held_out, settings)
    if not train.is_repeatable():
        log.warning(
            "ELLA: the training data look different each time (augmentation?). Pass train_loader= a loader without "
            "augmentation, or give the datamodule an ella_train_dataloader()."
        )
    return num_outputs


def _try(linearization: Linearization, points: Points, settings: Settings) -> int:
    """Return C, if the network can be evaluated and differentiated on the first few of the points."""
    inputs, targets = next(iter(points.batches(range(min(SAMPLES_CHECKED, len(points))), linearization.device)))
    logits = linearization.logits(inputs)
    LIKELIHOODS[settings.likelihood]().check(logits, targets)
    next(linearization.gradients(inputs, torch.zeros(len(logits), dtype=torch.long, device=logits.device)))
    return logits.shape[1]


def _basis(
    linearization: Linearization,
    landmarks: Landmarks,
    visit: Callable[[list[int], str], Iterable[tuple[Inputs, Tensor]]],
    settings: Settings,
) -> tuple[dict[str, Tensor], Tensor]:
    """V, as name -> (K, *shape), and the kernel's eigenvalues (K,)."""

    def gradients() -> Iterator[dict[str, Tensor]]:
        with seeded(settings.seed):  # a second pass must see the same augmentation
            done = 0
            for inputs, _ in visit(landmarks.numbers, "landmarks"):
                done += (size := num_samples(inputs))
                yield from linearization.gradients(inputs, landmarks.outputs[done - size : done])

    parameters = linearization.parameters
    vectors, eigenvalues = nystrom_basis(
        gradients,
        parameters,
        len(landmarks.numbers),
        settings.rank,
        memory_budget=linearization.memory_budget // 2,
        seed=settings.seed,
    )
    give_back()
    basis = {}
    for name, parameter in parameters.items():
        part = vectors.pop(name).reshape(-1, *parameter.shape)
        basis[name] = part.bfloat16() if settings.basis_precision == "bf16" else part
    return basis, eigenvalues


def _calibrated(
    cached: list[tuple[Tensor, Tensor, Tensor]], hessian: Tensor, likelihood: Likelihood, settings: Settings
) -> tuple[Posterior, dict[str, float]]:
    """The posterior with scales chosen on cached logits, features and targets, and the figures there."""
    logits, features, targets = (torch.cat(parts) for parts in zip(*cached, strict=True))
    targets = likelihood.check(logits, targets)
    draws = standard_normal(settings.num_samples, len(hessian), settings.seed).to(features)
    posterior = calibrate(
        logits,
        features,
        targets,
        hessian,
        likelihood,
        predictive=settings.predictive,
        draws=draws,
        prior_variance=settings.prior_variance,
        covariance_scale=settings.covariance_scale,
    )
    factor = features @ posterior.root().to(features.dtype)
    figures = _scores(likelihood, Gaussian(logits, factor, draws), targets, settings.predictive)
    if figures["ella/nll"] > figures["map/nll"] - 1e-4:
        log.warning(
            "ELLA: the calibration points ask for no uncertainty. Either the network is not overconfident, or "
            "it was trained on them: pass calibration_loader= a loader of data never trained on."
        )
    return posterior, figures


def _given(hessian: Tensor, settings: Settings) -> Posterior:
    prior, scale = settings.prior_variance or 1.0, settings.covariance_scale or 1.0
    log.warning(
        "ELLA: no validation data, so nothing is tuned: prior_variance=%g, covariance_scale=%g. Uncertainty is "
        "calibrated only if these are; pass calibration_loader= or a val_dataloader of data never trained on.",
        prior,
        scale,
    )
    return Posterior(hessian, torch.tensor(prior).to(hessian), torch.tensor(scale).to(hessian))


def _scores(likelihood: Likelihood, logits: Gaussian, targets: Tensor, predictive: str) -> dict[str, float]:
    """Figures of the network as it was ("map/…") and of the posterior's predictive ("ella/…")."""
    certain = Gaussian(logits.mean, torch.zeros_like(logits.factor[..., :1]), torch.zeros_like(logits.draws[:1, :1]))
    figures = {}
    for name, prediction in {
        "map": likelihood.predict(certain, "mc"),
        "ella": likelihood.predict(logits, predictive),
    }.items():
        metrics = likelihood.metrics(logits.mean.shape[1]).to(targets.device)
        metrics.update(prediction.probs, targets)
        figures |= {f"{name}/{metric}": float(value) for metric, value in metrics.compute().items()}
    return figures


def _tqdm(batches: Iterable, description: str, total: int) -> Iterable:
    with tqdm(total=total, desc=description, unit="point") as bar:
        for batch in batches:
            yield batch
            bar.update(num_samples(batch[0]))


def _one_of(name: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}.")


def _at_least_one(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
