"""The pipeline: landmarks → basis → curvature → calibration → predictor."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .activations import pooled_width
from .basis import nystrom_basis, sketch_numbers
from .batches import Batch, Inputs, Picked, Unpack, call, inputs_and_targets, num_samples, rows, slices
from .chunks import chunks
from .curvature import curvature, way
from .data import KEEP, LONGEST, Beginning, Points, beginning, draw, points_of, seeded
from .distil import NUM_POINTS
from .distributed import World
from .engine import Linearization
from .familiarity import NUM_POINTS as NUM_ACTIVATIONS
from .familiarity import PARTS, Distance, Familiarity, Judge, activations, some_places
from .guarantee import FEWEST, Guarantee, Judged, Spent
from .head import fingerprint
from .landmarks import LANDMARKS, Landmarks
from .learning import gain, learn
from .likelihoods import LIKELIHOODS, Likelihood
from .linearize import Basis, Forward, Parameters, as_function, chosen_names
from .look import POINTS, look
from .memory import free_memory, give_back
from .numerics import exact, spread_normal
from .observations import Observations, checked, joined, observations, weights_of
from .posterior import SCALES, Posterior, calibrate, free_scales, prior_by_evidence
from .predictions import Gaussian
from .predictor import ELLAPredictor, linearize
from .progress import Progress, bar, silent
from .residual import num_probes, with_probes
from .samplers import len_of
from .settings import Settings
from .stages import Stages
from .top import TEMPERATURES, sharpness
from .typical import LOOKS, typical

log = logging.getLogger(__name__)

ROWS = 20_000  # positions of all calibration points together that the scales are chosen on
FEW = 200  # calibration points: with fewer, the NLL after calibration varies by several percent from draw to draw
SURE = 2.0  # standard errors that moving the mean must help by: it is then no more the network's output
CERTAIN = 0.9  # a temperature below it makes the network surer than it is: rare on unseen points


@dataclass(frozen=True)
class Fit:
    """A predictor, and what the fit found out on the way."""

    predictor: ELLAPredictor
    figures: dict[str, float]  # "map/nll", "ella/nll", …, "ella/prior_variance", "ella/seconds"


def fit_ella(
    model: nn.Module,
    train_loader: DataLoader,
    calibration_loader: DataLoader | None = None,
    likelihood: str = "classification",
    *,
    unpack: Unpack = inputs_and_targets,
    forward: Forward = call,
    parameters: Parameters = None,
    distributed: bool = False,
    **settings: Any,
) -> ELLAPredictor:
    """Turn a trained network into a Bayesian predictor (ELLA, Deng, Zhou and Zhu, NeurIPS 2022).

    The network itself is not changed: weights, modes, gradients and device stay as they are.

    Args:
        model: a trained network on the device where the work is to be done.
        train_loader: the data that it was trained on, without augmentation.
        calibration_loader: data that it has never seen, to choose the prior variance and the covariance scale on.
        likelihood: what the outputs mean.
        unpack: maps a batch to `(inputs, targets)`, or `(inputs, targets, weights)` with a weight of at least 0 for
            each sample or position; by default batches are pairs.
        forward: maps `(model, inputs)` to outputs (B, C), (B,), (B, L, C) or (B, C, H, W), or to what has them
            as `.logits`; by default `model(inputs)`.
        parameters: which to take into account, by name ("blocks.11.*", or several patterns) or by a function of name
            and parameter; those that require gradients by default.
        distributed: share the work with all processes of torch.distributed's default group. Each of them must call
            this, with the same network, data and settings, and gets the same predictor.
        **settings: see `Settings`.

    Raises:
        ValueError, TypeError: if the network, the data or a setting cannot be used; the message names the fix.
        RuntimeError: if another process failed, with its message, or was lost.
    """
    chosen = Settings(likelihood=likelihood, **settings)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    world = World.of_all(device) if distributed else None
    hooks = {"unpack": unpack, "forward": forward, "parameters": parameters}
    return run(model, train_loader, calibration_loader, chosen, **hooks, world=world).predictor


def run(
    model: nn.Module,
    train_loader: DataLoader,
    calibration_loader: DataLoader | None,
    settings: Settings,
    *,
    unpack: Unpack = inputs_and_targets,
    forward: Forward = call,
    parameters: Parameters = None,
    progress: Progress | None = None,
    world: World | None = None,
    stages: Stages | None = None,
    origin: str = "",
) -> Fit:
    """As `fit_ella`, and report figures and progress.

    All processes of `world` call it with the same arguments and return the same predictor. `stages` keeps what is done
    on the way, and `origin` says which weights these are, in the error that refuses others.
    """
    started, ended = time.perf_counter(), {}  # the second by stage
    world, stages = world or World(), stages or Stages()
    progress = progress or (bar if world.first else silent)
    names = chosen_names(model, parameters)
    with seeded(settings.seed), as_function(), world.quiet():
        likelihood = LIKELIHOODS[settings.likelihood].from_settings(settings.as_dict())
        generator = torch.Generator().manual_seed(settings.seed)
        budget = settings.memory_budget or _share_of_memory(model, world)
        with world.together("a look at network and data"):
            linearization = linearize(model, forward, settings.as_dict() | {"memory_budget": budget}, names)
            train, held_out = _points(train_loader, calibration_loader, unpack, settings)
            if world.size > 1 and not all(points.shareable for points in (train, held_out) if points is not None):
                raise ValueError(
                    "each of several processes would read other points from such a loader: pass train_loader= and "
                    "calibration_loader= DataLoaders of map-style datasets."
                )
            asked, settings = settings.num_landmarks, _sized(settings, len(train.numbers))
            if asked is None:
                log.info("ELLA: %d of %d training points are landmarks.", settings.num_landmarks, len(train.numbers))
            inputs, example = look(linearization, train, held_out, settings)
            counted = linearization.network.view.counted
            weights = json.dumps(fingerprint(model, counted)) if world.size > 1 or stages.path else ""
            by_evidence = held_out is None and settings.prior_variance is None
            # Noise that is estimated comes from the points held out, and the curvature depends on it.
            seen = (train,) if likelihood.is_complete or held_out is None else (train, held_out)
            later = {"residual", "predictive", "num_samples", "learn", "views", "num_apart", *SCALES}
            later |= {"num_calibration"} if likelihood.is_complete else set()
            before = {name: value for name, value in settings.as_dict().items() if name not in later}
            stages.open(_identity(weights, linearization, seen, by_evidence, before) if stages.path else "")
        world.check_same(weights, "weights: load the same checkpoint on all of them")
        for points in (train, held_out):
            digest = "" if points is None else points.digest()
            world.check_same(digest, "points: pass train_loader= and calibration_loader= without a sampler for each")

        def visit(points: Points, numbers: Sequence[int], what: str) -> Iterable[Batch]:
            mine = world.share(numbers)
            batches = points.batches(mine, linearization.device)
            return world.watched(progress(batches, f"ELLA {what}", len(mine)))

        def make_basis() -> dict[str, Tensor]:
            with world.together("the choice of landmarks"):
                rule = LANDMARKS[settings.landmarks]
                chosen = rule(train, settings.num_landmarks or MANY, num_outputs, generator) if world.first else None
            chosen = world.object_from_first(chosen)
            generator.set_state(world.from_first(generator.get_state()))
            assert chosen is not None
            basis, eigenvalues = _basis(linearization, chosen, partial(visit, train), settings, world)
            return {"eigenvalues": eigenvalues} | {f"basis.{name}": tangents for name, tangents in basis.items()}

        num_outputs = example[0].numel()  # of all positions
        reverse = linearization.cheaper(inputs, settings.rank) == "layerwise"
        num_curvature = min(len(train.numbers), settings.num_curvature or len(train.numbers))
        how = way(settings.curvature, num_curvature, settings.rank, likelihood, tuned=held_out is not None)

        def make_curvature() -> dict[str, Tensor]:
            numbers = train.arranged(draw(num_curvature, train.numbers, generator))
            most = _most_probes(linearization, settings)
            probes = num_probes("auto", settings.rank, reverse=reverse, most=most) if by_evidence else 0
            hessian = curvature(
                linearization,
                visit(train, numbers, "curvature"),
                with_probes(dict(basis), probes, settings.seed),
                likelihood,
                len(train),
                how=how,
                top=settings.top_outputs,
                seeds=torch.randint(2**62, (len(numbers),), generator=generator),
                world=world,
            )
            return {"curvature": hessian}

        basis = stages.do("basis", world, generator, linearization.device, make_basis)
        eigenvalues = basis.pop("eigenvalues")
        basis = {name.removeprefix("basis."): tangents for name, tangents in basis.items()}
        ended["landmarks"] = time.perf_counter()
        give_back()
        apart = [] if held_out is None else _apart(held_out.numbers, settings)
        left = [] if held_out is None else sorted({*held_out.numbers} - {*apart})
        seen_for_noise: list[int] = []
        if not likelihood.is_complete:
            points, what = (train, "noise of training points") if held_out is None else (held_out, "noise")
            known = points.numbers if held_out is None else left
            seen_for_noise = draw(_looks(settings), known, torch.Generator().manual_seed(settings.seed))
            residuals = visit(points, points.arranged(seen_for_noise), what)
            likelihood = _completed(likelihood, linearization, residuals, world)
        hessian = stages.do("curvature", world, generator, linearization.device, make_curvature)["curvature"]
        ended["curvature"] = time.perf_counter()
        give_back()
        rank = len(eigenvalues)
        hessian, outside = hessian[:rank, :rank], hessian.diagonal()[rank:].sum()
        with world.together("the probes"):
            # Without unseen points there is no telling the scale of the residual: none, unless it is given.
            alone = held_out is None and settings.residual_scale is None
            most = _most_probes(linearization, settings)
            probes = 0 if alone else num_probes(settings.residual, rank, reverse=reverse, most=most)
            cut = not alone and probes < num_probes(settings.residual, rank, reverse=reverse)
            log.info(
                "ELLA: %d directions, and %d random probes of the variance outside their span%s.",
                *(rank, probes, ", as many as fit the memory budget" if cut else ""),
            )
            with_probes(basis, probes, settings.seed)
        if held_out is None:
            effective = num_outputs - (example[0, ..., 0].numel() if likelihood.invariant else 0)
            spread_over = min(linearization.network.num_parameters, len(train) * effective) - rank
            prior = settings.prior_variance or prior_by_evidence(
                hessian, outside, spread_over, linearization.parameters.values()
            )
            unseen, posterior, figures = None, _given(hessian, likelihood, settings, prior), {}
            familiarity = spent = judged = None
        else:
            numbers = held_out.arranged(draw(_looks(settings), left, generator))
            with world.together("a look at the unseen points"):
                looked_at = torch.tensor(sorted({*numbers, *seen_for_noise}))
                spent = Spent(held_out.identity(), looked_at) if world.first else None
            if (most := settings.num_calibration) is not None and len(numbers) > most:
                looks = visit(held_out, numbers, "look at unseen points")
                numbers = typical(linearization, likelihood, looks, numbers, most, generator, world)
            count = len(numbers)
            others = settings.temperature or 1.0
            if settings.top_outputs is not None and settings.temperature is None:
                others = _temperature(linearization, visit(held_out, numbers, "temperature"), likelihood, world)
            judge = _judge(linearization, train, partial(visit, train), likelihood, settings, world)
            with world.together("the calibration points"):
                seeds = world.share(torch.randint(2**62, (count,), generator=generator).tolist())
                points = visit(held_out, numbers, "calibration")
                most, top = max(1, ROWS // max(1, count)), settings.top_outputs
                how_seen = {"top": top, "most": most, "temperature": others, "views": settings.views}
                how_seen |= {"judge": judge, "rank": rank}
                unseen = judged = _cached(linearization, points, basis, example, likelihood, seeds, **how_seen)
            if judge is not None and apart:
                with world.together("the points apart"):
                    points, seeds = visit(held_out, held_out.arranged(apart), "points apart"), [0] * len(apart)
                    judged = _cached(linearization, points, basis, example, likelihood, seeds, **how_seen)
                if int(world.sum(torch.tensor(len(judged.targets)))) < FEWEST:  # with labels
                    judged = unseen
            familiarity = None if judge is None else _familiarity(judge, judged, linearization.device, world)
            if familiarity is not None:
                log.info(
                    "ELLA: familiarity goes by %s, calibrated on %d unseen points%s.",
                    *(_words(familiarity.parts), len(familiarity.scores)),
                    "" if judged is unseen else " that did not choose the scales",
                )
            near = others if (settings.top_outputs or MOST) < example.shape[-1] - 1 else None  # where some are lost
            posterior, figures = _calibrated(unseen, hessian, likelihood, settings, near, world)
        likelihood, temperature = likelihood.settled(posterior.temperature)
        if posterior.softened:
            hessian = hessian / posterior.temperature
        posterior = replace(posterior, curvature=hessian, temperature=temperature, softened=False, spectrum=None)
        if unseen is not None and settings.learn:
            posterior, better = _moved(unseen, posterior, likelihood, settings, world)
            figures |= better
        guaranteed = None
        if judged is not None and unseen is not None and judged is not unseen and settings.top_outputs is None:
            guaranteed = _guaranteed(judged, unseen, posterior, likelihood, settings, world)
        unseen = judged = None
        with world.together("the predictor"):
            predictor = ELLAPredictor(
                model,
                basis=basis,
                eigenvalues=eigenvalues,
                curvature=hessian,
                **{name: getattr(posterior, name) for name in SCALES},
                mean=posterior.mean,
                familiarity=familiarity,
                guaranteed=guaranteed,
                spent=world.object_from_first(spent),
                forward=forward,
                settings=settings.as_dict() | {"residual": probes, "curvature": how} | likelihood.stored(),
                origin=origin,
                counted=counted,
                batched=isinstance(inputs, Picked),
                quiet=True,
            )
        ended["calibration"] = time.perf_counter()
        give_back()
    took = {stage: end - start for (stage, end), start in zip(ended.items(), (started, *ended.values()), strict=False)}
    with world.quiet():
        log.info("ELLA: the fit took %s.", _listed(took), extra={"seconds": took})
    figures |= {
        **{f"ella/{name}": float(getattr(posterior, name)) for name in SCALES},
        **{f"ella/{name}": value for name, value in _noise(likelihood).items()},
        "ella/seconds": time.perf_counter() - started,
        **{f"ella/eigenvalue_{k:02d}": value for k, value in enumerate(eigenvalues.tolist())},
    }
    return Fit(predictor, figures)


def check(
    model: nn.Module,
    train_loader: DataLoader,
    calibration_loader: DataLoader | None,
    settings: Settings,
    *,
    unpack: Unpack = inputs_and_targets,
    forward: Forward = call,
    parameters: Parameters = None,
    distil: bool = False,
) -> None:
    """Go the whole way of a fit with a few points, and say how long it will take; raise what would go wrong then.

    With `distil`, a student is taught, too.

    Raises:
        ValueError, TypeError: if network, data or settings cannot be used; the message names the fix.
    """
    names = chosen_names(model, parameters)
    if distil and calibration_loader is None:
        raise ValueError(
            "a student learns from unseen points, and there are none: pass calibration_loader= or a val_dataloader."
        )
    with seeded(settings.seed), as_function():
        start, unseen_start = beginning(train_loader), beginning(calibration_loader)
        started = time.perf_counter()
        train, held_out = _points(start, unseen_start, unpack, settings)
        reading = (time.perf_counter() - started) / len(train.numbers)  # of a point of a stream
        count = len(train.numbers)
        sized = _sized(settings, count if start is train_loader else 2 * MANY)
        if start is not train_loader:  # how many points there are is not known
            sized = replace(sized, num_landmarks=min(count, sized.num_landmarks or count), rank=min(count, sized.rank))
        linearization = linearize(model, forward, sized.as_dict(), names)
        inputs, _ = look(linearization, train, held_out, sized)
        engine = linearization.cheaper(inputs, sized.rank)
        num_unseen = _total(held_out, unseen_start)
        num_points = _total(train, start)
        likelihood = LIKELIHOODS[settings.likelihood].from_settings(settings.as_dict())
        summed = min(num_points, settings.num_curvature or num_points)
        how = way(settings.curvature, summed, sized.rank, likelihood, tuned=held_out is not None)
        seconds, feature = _price(linearization, inputs, replace(settings, curvature=how), num_points, num_unseen)
        if distil:
            seconds["student"] = 2 * min(NUM_POINTS, num_unseen) * feature
        if start is not train_loader:
            seconds = {"reading": reading * _length(train_loader, settings)} | seconds
    few = sized.limited(num_landmarks=FEW_POINTS, num_curvature=FEW_POINTS, num_calibration=FEW_POINTS, rank=2)
    few = replace(
        few, engine=engine, curvature=how, residual=min(2, num_probes(settings.residual, settings.rank, reverse=False))
    )
    with _silenced():
        hooks = {"unpack": unpack, "forward": forward, "parameters": parameters}
        rehearsed = run(model, start, unseen_start, few, progress=silent, **hooks).predictor
        if distil:
            points = points_of(unseen_start, unpack)
            rehearsed.teach(points, World(), num_points=FEW_POINTS, progress=silent)
    log.info("ELLA: the fit at the end will take about %s.", _listed(seconds))


FEW_POINTS = 4  # of each kind in the rehearsal of a fit
MOST = 10**9  # points of a stream, whose end is not known


@contextmanager
def _silenced() -> Iterator[None]:
    """A rehearsal says nothing."""
    logger = logging.getLogger(__package__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _total(points: Points | None, loader: Any) -> int:
    """How many points there are, at most."""
    return 0 if points is None else MOST if isinstance(loader, Beginning) else len(points)


def _length(stream: Any, settings: Settings) -> int:
    """How many points of a training stream are read, at most."""
    most = LONGEST * _kept(settings)
    size = getattr(stream, "batch_size", None)
    return most if size is None or len_of(stream) is None else min(most, len(stream) * size)


def _price(
    linearization: Linearization, inputs: Inputs, settings: Settings, num_points: int, num_unseen: int
) -> tuple[dict[str, float], float]:
    """Seconds of the stages of a fit, from what a few points take; and of the features of one."""
    inputs = rows(inputs, slice(0, FEW_POINTS))
    count, parameters = num_samples(inputs), linearization.parameters
    reverse = linearization.cheaper(inputs, settings.rank) == "layerwise"
    most = _most_probes(linearization, settings)
    columns = settings.rank + num_probes(settings.residual, settings.rank, reverse=reverse, most=most)
    basis = {name: value.new_zeros(1, *value.shape).expand(columns, *value.shape) for name, value in parameters.items()}
    outputs = torch.zeros(count, dtype=torch.long)
    gradient = _timed(lambda: [None for _ in linearization.gradients(inputs, outputs)]) / count
    output = _timed(lambda: linearization.logits(inputs)) / count
    feature = _timed(lambda: linearization.look(inputs, basis, settings.top_outputs)) / count
    landmarks = _sized(settings, num_points).num_landmarks or 0
    held = sketch_numbers(landmarks, parameters, settings.rank, linearization.memory_budget // 2) is None
    summed, tuned = (
        min(n, most or (KEEP if n == MOST else n))
        for most, n in ((settings.num_curvature, num_points), (settings.num_calibration, num_unseen))
    )
    looks = min(_looks(settings) or 0, num_unseen) if num_unseen > tuned else 0
    looks += min(NUM_ACTIVATIONS, num_points) if num_unseen else 0
    tuned += min(settings.num_apart, num_unseen - tuned)
    return {
        "landmarks": landmarks * gradient * (1 if held else 2),
        "curvature": summed * (feature if settings.curvature == "exact" else gradient),
        "calibration": looks * output + tuned * feature * (1 + len(settings.views)),
    }, feature


def _timed(work: Callable[[], Any]) -> float:
    """Seconds, the second time."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _listed(seconds: Mapping[str, float]) -> str:
    """What stages take, in words."""
    each = ", ".join(
        f"{stage} {value:.0f}" if value >= 1 else f"{stage} {value:.1f}" for stage, value in seconds.items()
    )
    total = sum(seconds.values())
    return f"{total:.0f} s ({each})" if total < 300 else f"{total / 60:.0f} min (in seconds: {each})"


def _sized(settings: Settings, num_points: int) -> Settings:
    """With a number of landmarks where it was left open: half of the points, but 200 to 1,000, or twice K."""
    if settings.num_landmarks is not None:
        return settings
    count = min(num_points, max(FEW_LANDMARKS, 2 * settings.rank, min(MANY, num_points // 2)))
    return replace(settings, num_landmarks=count, rank=min(settings.rank, count))


FEW_LANDMARKS, MANY = 200, 1000


def _share_of_memory(model: nn.Module, world: World) -> int:
    """A quarter of what is free, in bytes, divided among the processes that it is for; the same for all of them."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    sharing = world.neighbours() if device.type == "cpu" else 1
    return world.smallest(free_memory(device) // (4 * sharing))


def _most_probes(linearization: Linearization, settings: Settings) -> int:
    """As many as take the memory budget, beside V."""
    numbers = sum(value.numel() for value in linearization.parameters.values())
    each = 2 if settings.basis_precision == "bf16" else next(iter(linearization.parameters.values())).element_size()
    return linearization.memory_budget // (each * numbers)


def _identity(
    weights: str, linearization: Linearization, data: Sequence[Points], by_evidence: bool, settings: dict[str, Any]
) -> str:
    """What the stages of a fit depend on: weights, parameters taken into account, some settings, and data."""
    names, identities = sorted(linearization.parameters), [points.identity() for points in data]
    return json.dumps([weights, names, settings, identities, by_evidence])


def _points(train: Any, held_out: Any | None, unpack: Unpack, settings: Settings) -> tuple[Points, Points | None]:
    unseen = None if held_out is None else points_of(held_out, unpack, _looks(settings) or KEEP)
    return points_of(train, unpack, _kept(settings)), unseen


def _looks(settings: Settings) -> int | None:
    """How many unseen points the network looks at; None for all."""
    chosen = settings.num_calibration
    return None if chosen is None else max(chosen, min(LOOKS * chosen, KEEP))


def _kept(settings: Settings) -> int:
    """How many points of a training stream are held."""
    return max(settings.num_landmarks or 2 * max(MANY, settings.rank), settings.num_curvature or KEEP)


def _basis(
    linearization: Linearization,
    landmarks: Landmarks,
    visit: Callable[[list[int], str], Iterable[Batch]],
    settings: Settings,
    world: World,
) -> tuple[dict[str, Tensor], Tensor]:
    """V, as name -> (K, *shape), and the kernel's eigenvalues (K,)."""

    def gradients() -> Iterator[dict[str, Tensor]]:
        with seeded(settings.seed):  # a second pass must see the same augmentation
            done, outputs = 0, landmarks.outputs[world.rank :: world.size]
            for inputs, *_ in visit(landmarks.numbers, "landmarks"):
                done += (size := num_samples(inputs))
                yield from linearization.gradients(inputs, outputs[done - size : done])

    parameters = linearization.parameters
    # What is free has been divided by the processes; a budget that is given decides as it would for one process.
    budget = linearization.memory_budget // 2 * (1 if settings.memory_budget else world.size)
    with exact():
        vectors, eigenvalues = nystrom_basis(
            gradients,
            parameters,
            len(landmarks.numbers),
            settings.rank,
            memory_budget=budget,
            seed=settings.seed,
            world=world,
        )
    basis = {}
    for name, parameter in parameters.items():
        part = vectors.pop(name).reshape(-1, *parameter.shape)
        basis[name] = part.bfloat16() if settings.basis_precision == "bf16" else part
    return basis, eigenvalues


def _completed(
    likelihood: Likelihood, linearization: Linearization, batches: Iterable[Batch], world: World
) -> Likelihood:
    """With what the likelihood learns from the network's residuals."""
    with world.together("the noise"):
        sums = torch.zeros((), dtype=torch.float64, device=linearization.device)
        for inputs, targets, weights in batches:
            outputs = linearization.at_positions(linearization.logits(inputs))
            known = checked(likelihood, outputs, targets, linearization.axis)
            kept = (weight := weights_of(likelihood, known, weights)) > 0
            sums = sums + likelihood.statistics(outputs[kept], known[kept], weight[kept])
    size = int(-world.smallest(-sums.numel()))  # a process without points has none
    return likelihood.completed(world.sum(sums.expand(size).clone()))


def _temperature(linearization: Linearization, batches: Iterable[Batch], likelihood: Likelihood, world: World) -> float:
    """Of all outputs together the temperature with the lowest NLL, for those that are not kept."""
    total = torch.zeros(len(TEMPERATURES), dtype=torch.float64, device=linearization.device)
    with world.together("the temperature"):
        for inputs, targets, *weights in batches:
            outputs = linearization.at_positions(linearization.logits(inputs))
            targets = checked(likelihood, outputs, targets, linearization.axis)
            total += sharpness(outputs, targets, weights_of(likelihood, targets, *weights))
    return TEMPERATURES[int(world.sum(total).argmin())]


def _cached(
    linearization: Linearization,
    batches: Iterable[Batch],
    basis: Basis,
    example: Tensor,
    likelihood: Likelihood,
    seeds: Sequence[int],
    *,
    most: int,
    top: int | None,
    **how: Any,
) -> Observations:
    """Run the network over the points, for `most` rows of each; `example` are outputs, for a process without points.

    What takes more than a quarter of the memory budget is kept on the CPU. `how` is as for `observations`.
    """
    rank, done, views = len(next(iter(basis.values()))), 0, len(how["views"])
    outputs = min(most, example[0, ..., 0].numel()) * (example.shape[-1] if top is None else top + 1)
    fits = 4 * len(seeds) * (1 + views) * outputs * rank * example.element_size() <= linearization.memory_budget
    place = linearization.device if fits else torch.device("cpu")
    parts = []
    for batch in batches:
        drawn = seeds[done : (done := done + num_samples(batch[0]))]
        seen = observations(linearization, likelihood, Batch(*batch), basis, top=top, most=most, seeds=drawn, **how)
        parts += (part.to(place) for part in seen)
    if not parts:  # more processes than points
        none = example.flatten(0, -2)[:0]
        none = none if top is None else none[:, : top + 1]
        targets = likelihood.sample(none, torch.Generator())
        one = none, none.unsqueeze(2).expand(-1, -1, rank)
        others = (part.unsqueeze(1).expand(-1, views, *part.shape[1:]) for part in one) if views else (None, None)
        foreign = None if how["judge"] is None else none.new_empty(0, len(PARTS))
        return Observations(*one, targets, none.new_empty(0), torch.arange(0), *others)._replace(foreign=foreign)
    return joined(parts)


def _words(names: Sequence[str]) -> str:
    """Names as in a sentence."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def _apart(numbers: Sequence[int], settings: Settings) -> list[int]:
    """Points that the scales are not chosen on, at random: half of those left over, as some may be without labels."""
    count = min(settings.num_apart, (len(numbers) - (settings.num_calibration or len(numbers))) // 2)
    generator = torch.Generator().manual_seed(settings.seed)
    return draw(count, numbers, generator) if count >= FEWEST else []


def _judge(
    linearization: Linearization,
    train: Points,
    visit: Callable[[Sequence[int], str], Iterable[Batch]],
    likelihood: Likelihood,
    settings: Settings,
    world: World,
) -> Judge | None:
    """What says how foreign an input looks, with a distance that is learnt from training points.

    None for networks with several rows of outputs an input.
    """
    if len(linearization.network.output_shape or ()) > 1:
        return None
    numbers = train.arranged(draw(NUM_ACTIVATIONS, train.numbers, torch.Generator().manual_seed(settings.seed)))
    with world.together("the places of activations"):
        few = max(train.at_once(train.numbers[:POINTS], linearization.device), key=lambda one: num_samples(one.inputs))
        found = some_places(linearization, few.inputs) if world.first else []
    places = world.object_from_first(found)
    with world.together("the activations"):
        batches = visit(numbers, "activations") if places else ()
        parts = [pooled for batch in batches for pooled in activations(linearization, places, Batch(*batch).inputs)]
        mine = torch.cat([torch.zeros(0, pooled_width(places)), *parts])
    pooled = world.gather_rows(mine, len(numbers)) if places else None
    with world.together("the distance"):
        distance = None if pooled is None else Distance.of(pooled)
    distance = world.object_from_first(distance)
    if distance is not None:
        distance = distance.to(linearization.device)
    # With top_outputs= novelty depends on the temperature, which is not chosen yet.
    return Judge(places, distance, likelihood, (None, *settings.views), has_novelty=settings.top_outputs is None)


def _familiarity(judge: Judge, judged: Observations, device: torch.device, world: World) -> Familiarity | None:
    """Ranks among unseen points."""
    assert judged.foreign is not None
    scores = world.gather_rows(judged.foreign)
    with world.together("familiarity"):
        found = None if scores is None else Familiarity.calibrated(judge.places, judge.distance, scores.to(device))
    found = world.object_from_first(None if found is None else found.cpu())
    return None if found is None else found.to(device)


def _guaranteed(
    apart: Observations,
    unseen: Observations,
    posterior: Posterior,
    likelihood: Likelihood,
    settings: Settings,
    world: World,
) -> Guarantee | None:
    """What is promised from points apart; which thresholds are tested is planned on those of the calibration."""
    with world.together("the guarantee"):
        draws = _draws(settings, apart, posterior.curvature)
        mine = [_judged(points, posterior, likelihood, settings.predictive, draws) for points in (apart, unseen)]
    assert apart.weights is not None
    parts = mine[0].scores, mine[0].confidence, mine[0].wrong, mine[1].confidence, apart.weights
    scores, confidence, wrong, planned, weights = (world.gather_rows(part.cpu().double()) for part in parts)
    found = None
    with world.together("the guarantee"):
        if scores is not None and confidence is not None and wrong is not None and weights is not None:
            found = Guarantee.promised(Judged(scores, confidence, wrong > 0), weights, planned)
    return world.object_from_first(found)


def _judged(
    points: Observations, posterior: Posterior, likelihood: Likelihood, predictive: str, draws: Tensor
) -> Judged:
    """How right the posterior is about some points."""
    parts, temperature = [], posterior.temperature.to(draws)
    for part in _parts(points, draws) or [slice(0)]:
        some = points.rows(part).to(draws.device)
        outputs = some.outputs(lambda mean, features: posterior.outputs(mean, features, draws))
        counts = torch.ones(len(some.targets), dtype=torch.bool, device=some.targets.device)
        prediction = likelihood.predict(outputs, predictive, temperature)
        parts.append(Judged.of(likelihood, prediction, some.targets, counts))
    return Judged.joined(parts)


def _calibrated(
    unseen: Observations,
    hessian: Tensor,
    likelihood: Likelihood,
    settings: Settings,
    near: float | None,
    world: World,
) -> tuple[Posterior, dict[str, float]]:
    """The posterior with scales chosen on cached logits, features and targets, and the figures there."""
    count = int(world.sum(torch.tensor(len(unseen.targets))))
    if not count:
        raise ValueError("no calibration point has a target that counts: pass calibration_loader= data with labels.")
    draws = _draws(settings, unseen, hessian)
    given = {name: getattr(settings, name) for name in SCALES}
    if settings.noise_variance is not None and likelihood.temperature_is_noise:
        given["temperature"] = given["temperature"] or 1.0
    posterior = calibrate(
        unseen, hessian, likelihood, predictive=settings.predictive, draws=draws, given=given, near=near, world=world
    )
    figures = _compared(unseen, posterior, likelihood, settings.predictive, draws, world)
    chosen = free_scales(given, unseen.features, hessian, likelihood)
    _say(posterior, figures, count, chosen, likelihood)
    return posterior, figures


def _moved(
    unseen: Observations, posterior: Posterior, likelihood: Likelihood, settings: Settings, world: World
) -> tuple[Posterior, dict[str, float]]:
    """The posterior with its mean where unseen points would have it, if each is predicted better without itself."""
    draws, predictive = _draws(settings, unseen, posterior.curvature), settings.predictive
    points, fitted = unseen.to(torch.device("cpu")), posterior.to(lambda tensor: tensor.cpu())  # where there is room
    options = {"predictive": predictive, "draws": draws.cpu(), "drifts": False, "world": world}
    after, reach, _, left_out = learn(points, fitted, likelihood, **options)
    better = gain(points, left_out, fitted, likelihood, predictive, draws.cpu(), world)
    if better < SURE:
        return posterior, {}
    left_out = left_out._replace(logits=left_out.logits.to(unseen.logits.dtype))
    figures = _compared(left_out, posterior, likelihood, predictive, draws, world)
    figures = {name: value for name, value in figures.items() if name.startswith("ella/")}
    log.info(
        "ELLA: the mean moves by what the unseen points say, with a prior of %.3g times the posterior's covariance: "
        "each without itself is predicted better by %.1f standard errors, with an NLL of %.4g (learn=False leaves it).",
        *(reach, better, figures["ella/nll"]),
    )
    assert after.mean is not None
    return replace(posterior, mean=after.mean.to(posterior.curvature)), figures


def _draws(settings: Settings, unseen: Observations, curvature: Tensor) -> Tensor:
    """Standard normal numbers, (S, K + m), where the curvature is."""
    draws = spread_normal(settings.num_samples, unseen.features.shape[-1], settings.seed)
    return draws.to(curvature.device, unseen.features.dtype)


def _compared(
    unseen: Observations, posterior: Posterior, likelihood: Likelihood, predictive: str, draws: Tensor, world: World
) -> dict[str, float]:
    """Figures of the network as it was and of the posterior, on the points of all processes."""
    with world.together("the figures"):
        mine = _summaries(likelihood, unseen, posterior, predictive, draws)
    targets = world.gather_rows(unseen.targets)
    gathered = [(name, world.gather_rows(values)) for name, values in mine.items()]
    with world.together("the figures"):
        known = {name: values for name, values in gathered if values is not None}
        figures = {}
        if targets is not None:
            for name, summary in known.items():
                found = likelihood.figures(summary, targets, unseen.logits.shape[1])
                figures |= {f"{name}/{figure}": value for figure, value in found.items()}
            if unseen.num_views > 1:
                before, after = (likelihood.errors(known[name].cpu(), targets.cpu()).double() for name in known)
                _tell_of_views(before, after)
    return world.object_from_first(figures)


def _tell_of_views(before: Tensor, after: Tensor) -> None:
    """Warn where points, of errors (n,) without views and with them, are surely predicted worse."""
    change = after - before
    if change.mean() > SURE * change.std(correction=0) / len(change) ** 0.5:
        log.warning(
            "ELLA: with views= the error on unseen points rises from %.3g to %.3g: the views change what an input is. "
            "Pass those that the training's augmentations make, or none.",
            *(float(before.mean()), float(after.mean())),
        )


def _noise(likelihood: Likelihood) -> dict[str, float]:
    """The variance of the noise, where the likelihood has one: of several outputs the mean."""
    variance = likelihood.stored().get("noise_variance")
    return {} if variance is None else {"noise_variance": float(torch.as_tensor(variance, dtype=torch.float64).mean())}


def _say(
    posterior: Posterior,
    figures: dict[str, float],
    count: int,
    chosen: list[str],
    likelihood: Likelihood,
) -> None:
    """Log what was chosen, and warn of points that cannot tell."""
    names = {"ece": "ECE", "crps": "CRPS"}
    shown = {"nll": "NLL"} | {name: title for name, title in names.items() if f"map/{name}" in figures}
    values = {name: float(getattr(posterior, name)) for name in chosen}
    if posterior.softened and values.pop("temperature", None):  # it ends in the noise, and one is left: `settled`
        values |= _noise(likelihood.settled(posterior.temperature)[0])
    log.info(
        "ELLA: %s, chosen on %d unseen points: %s.",
        ", ".join(f"{name} {value:.3g}" for name, value in values.items()) or "no scale",
        count,
        ", ".join(f"{title} {figures[f'map/{n}']:.4g} -> {figures[f'ella/{n}']:.4g}" for n, title in shown.items()),
    )
    surer = posterior.temperature < CERTAIN and not posterior.softened
    if surer or figures["ella/nll"] > figures["map/nll"] - 1e-4:
        accuracy = f" (accuracy {100 * figures['map/accuracy']:.1f} %)" if "map/accuracy" in figures else ""
        log.warning(
            "ELLA: the calibration points ask for no uncertainty%s. Either the network is not "
            "overconfident (trained too little?), or it was trained on them: pass calibration_loader= a loader of data "
            "never trained on.",
            accuracy,
        )
    if count < FEW and chosen:
        log.warning("ELLA: %d calibration points are few, so the scales are rough: hold out %d or more.", *(count, FEW))


def _given(hessian: Tensor, likelihood: Likelihood, settings: Settings, prior: float) -> Posterior:
    """The posterior without unseen points to choose its scales on."""
    scales = {name: getattr(settings, name) or 1.0 for name in SCALES} | {"prior_variance": prior}
    log.warning(
        "ELLA: no validation data, so %s: %s. Uncertainty is "
        "calibrated only if these are; pass calibration_loader= or a val_dataloader of data never trained on.",
        "nothing is tuned" if settings.prior_variance else "the prior is the one with the highest marginal likelihood",
        ", ".join(f"{n}={v:g}" for n, v in scales.items() if n != "residual_scale" or settings.residual_scale)
        + ("" if settings.residual_scale else ", no variance outside the span"),
    )
    given = (torch.as_tensor(scales[name], dtype=hessian.dtype, device=hessian.device) for name in SCALES)
    return Posterior(hessian, *given, softened=likelihood.temperature_is_noise)


def _parts(points: Observations, draws: Tensor) -> list[slice]:
    """So many rows at a time as are few enough."""
    size = chunks(draws.device).outputs // max(1, points.num_views * points.features[:1].numel())
    return slices(len(points.targets), size)


def _summaries(
    likelihood: Likelihood, unseen: Observations, posterior: Posterior, predictive: str, draws: Tensor
) -> dict[str, Tensor]:
    """What metrics are made of, (n, …), for the network as it was ("map") and for the posterior ("ella")."""
    temperature = posterior.temperature.to(draws)
    one, first = torch.ones_like(temperature), likelihood.predictives[0]  # of one without variance, all are the same
    found: dict[str, list[Tensor]] = {"map": [], "ella": []}
    for part in _parts(unseen, draws) or [slice(0)]:
        some = unseen.rows(part).to(draws.device)
        certain = Gaussian(some.logits, torch.zeros_like(some.features[..., :1]), torch.zeros_like(draws[:1, :1]))
        learnt = some.outputs(lambda mean, features: Gaussian(mean, posterior.factor(features), draws))
        found["map"].append(likelihood.summary(likelihood.predict(certain, first, one), some.targets))
        found["ella"].append(likelihood.summary(likelihood.predict(learnt, predictive, temperature), some.targets))
    return {name: torch.cat(parts) for name, parts in found.items()}
