"""Teaching: from a loader of unseen points to a `FastPredictor`, by lessons from the exact engine."""

import copy
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from math import atanh
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .activations import Layers, Place, Recorder, both, chosen, find_places
from .augmentation import OneView, seen
from .batches import Batch, Inputs, Picked, num_samples, rows, slices
from .chunks import chunks
from .data import Points, draw, seeded
from .distributed import World
from .familiarity import scores
from .fast import FastPredictor
from .guarantee import FEWEST, Guarantee
from .head import judge
from .likelihoods import Likelihood
from .linearize import Network, check_finite
from .numerics import spread_normal
from .observations import checked, weights_of
from .perturb import Perturb, perturbed
from .posterior import minimise
from .predictions import Gaussian, Spread, mixed
from .progress import Progress, bar, silent
from .student import Lesson, Student, Translation, lesson

if TYPE_CHECKING:
    from .predictor import ELLAPredictor

log = logging.getLogger(__name__)

SAMPLES = 128  # draws of a student's posterior; evenly spread, they are as good as 512 random ones
AT_A_TIME = 50  # points that copies are made of together
LOOKED_AT = 50  # points that the places are chosen on, at least
FEWEST_TAUGHT = 10  # points that a student can be taught and tested with
NUM_POINTS = 250  # that the exact engine is asked about, by default
TESTED = 5  # one part in so many tests the student
MOST_TUNED = 2000  # points that the scales are tuned on
MOST_APART, APART = 1000, 5  # points for guarantees, at most, and one of so many
TUNING = 2**24  # sampled outputs that they are tuned on
DRAWS = 64  # of the posterior, for each of these
# Standard deviations of the scales, in e-folds, around those of the exact predictor: a student is about as sure.
WIDTHS = {"variance": 0.1, "temperature": 0.01}
CLOSE = {"variance": 0.7, "novelty": 0.5}  # correlations below which a student is said to follow loosely
WORSE, SURE = 0.01, 2.0  # share of the NLL, and standard errors, by which it may be higher


class Lecture(NamedTuple):
    """A part of the points, and a copy of it: what to learn of each, and how well the exact predictor does."""

    plain: Lesson
    copies: Lesson
    looks: list[tuple[Tensor, Tensor]]  # outputs and pooled activations of the points, and of their views in a test
    nll: Tensor  # (n,), of the exact predictor at all of these
    targets: Tensor  # (n, …)
    weights: Tensor  # (n,)


def distil(
    predictor: "ELLAPredictor",
    points: Points,
    world: World,
    *,
    layers: Layers = None,
    perturb: Perturb | None = None,
    num_points: int = NUM_POINTS,
    progress: Progress | None = None,
) -> FastPredictor:
    """Teach a student; see `ELLAPredictor.distil`. It is called while the predictor reads."""
    started, seed = time.perf_counter(), predictor.settings["seed"]
    generator, progress = torch.Generator().manual_seed(seed), progress or (bar if world.first else silent)
    with world.together("a look at the points to teach with"):
        apart = _apart(predictor, points)
        left = [number for number in points.numbers if number not in apart]
        parts = _parts(draw(num_points, left, generator), num_points)
        last = len(parts) - max(1, len(parts) // TESTED)  # these and those after it test the student
        recorder, places = _recorder(predictor, points, parts[0], layers)
        seeds = torch.randint(2**62, (len(parts),), generator=generator).tolist()
    with world.together("the student's lessons"):
        mine = world.share(range(len(parts)))
        batches = ((batch.inputs, batch, i) for i in mine for batch in points.at_once(parts[i], predictor.device))
        total = sum(len(parts[i]) for i in mine)
        given: dict[int, list[Lecture]] = {i: [] for i in mine}
        for _, batch, i in world.watched(progress(batches, "ELLA lessons", total)):
            copies = torch.Generator().manual_seed(seeds[i] + len(given[i]))
            views = predictor.settings["views"] if i >= last else ()
            given[i].append(_lecture(predictor, recorder, places, batch, copies, perturb, views))
    lectures = {number: lecture for some in world.everyone(given) for number, lecture in some.items()}
    with world.together("the student's learning"):
        taught, tested = ([x for i in range(*ends) for x in lectures[i]] for ends in ((0, last), (last, len(parts))))
        lessons = _joined([lesson for lecture in taught for lesson in lecture[:2]])  # type: ignore[misc]
        with seeded(seed):
            fast = _untaught(predictor, recorder, places, lessons)
            if world.first:
                fast.student.cpu().learn(lessons, generator, progress)
        if world.first:
            fast.student.to(predictor.device)
            tests = [number for part in parts[last:] for number in part]
            others = sorted(set(left) - {number for part in parts for number in part})
            most = min(MOST_TUNED, 10 * num_points) - len(tests)
            _tune(fast, recorder, points, tests + draw(max(0, most), others, generator))
            if apart:
                fast.guaranteed = _guaranteed(fast, recorder, points.batches(points.arranged(apart), fast.device))
            fast.figures = _figures(fast, tested) | {"seconds": time.perf_counter() - started}
    fast.take(world.tensors_from_first(fast.tensors(), predictor.device))
    fast.figures = world.object_from_first(fast.figures)
    with world.quiet():
        _tell(fast.figures, len(lessons.outputs), sum(len(lecture.nll) for lecture in tested), recorder)
    return fast


def _parts(numbers: Sequence[int], num_points: int) -> list[Sequence[int]]:
    """Points that are looked at together, whatever the number of processes: their copies depend on each other."""
    if len(numbers) < min(FEWEST_TAUGHT, num_points) or len(numbers) < 2:
        raise ValueError(f"a student needs {FEWEST_TAUGHT} points or more to learn from, but there are {len(numbers)}.")
    return [numbers[part] for part in slices(len(numbers), min(AT_A_TIME, max(1, len(numbers) // TESTED)))]


def _apart(predictor: "ELLAPredictor", points: Points) -> set[int]:
    """Points that the predictor's fit has not looked at, a fifth of all at most, for guarantees; none if not known."""
    spent = predictor.spent
    if spent is None or points.identity() != spent.identity:
        return set()
    unspent = sorted({*points.numbers} - {*spent.numbers.tolist()})
    count = min(MOST_APART, len(points.numbers) // APART, len(unspent))
    generator = torch.Generator().manual_seed(predictor.settings["seed"])
    return set(draw(count, unspent, generator)) if count >= FEWEST else set()


def _recorder(
    predictor: "ELLAPredictor", points: Points, numbers: Sequence[int], layers: Layers
) -> tuple[Recorder, list[Place]]:
    """Looks at the network where there is something to see; and what of it the student sees.

    Raises:
        ValueError: if its outputs, or its inputs, are not of the kind that a student learns.
    """
    if predictor.settings["top_outputs"] is not None:
        raise ValueError("with top_outputs= every input has other outputs, which a student cannot learn.")
    numbers = [*numbers, *[number for number in points.numbers if number not in numbers][:LOOKED_AT]]
    inputs = max(points.at_once(numbers, predictor.device), key=lambda batch: num_samples(batch.inputs)).inputs
    if isinstance(inputs, Picked) or predictor.batched or num_samples(inputs) < 2:
        raise ValueError(
            "samples cannot be told apart in such inputs, or all have other shapes, so a student cannot learn of each "
            "of them: use the exact predictor."
        )
    network = Network(predictor.model, predictor.forward_function, list(predictor.basis))
    network.settle(inputs)
    familiar = [] if predictor.familiarity is None else predictor.familiarity.places
    places = find_places(network, inputs, layers)
    if len(network.output_shape or ()) > 1:
        raise ValueError(
            f"a student learns of one row of outputs an input, but this network gives {network.output_shape}: use the "
            "exact predictor."
        )
    return Recorder(network, both(places, familiar), places), places


def _lecture(
    predictor: "ELLAPredictor",
    recorder: Recorder,
    places: Sequence[Place],
    batch: Batch,
    generator: torch.Generator,
    perturb: Perturb | None,
    views: Sequence[OneView],
) -> Lecture:
    """Ask the exact engine about a batch and a copy of it, and how well it predicts through `views`."""
    likelihood, posterior, count = predictor.likelihood, predictor.posterior, num_samples(batch.inputs)
    asked = [_asked(predictor, recorder, places, seen(batch.inputs, view)) for view in (None, *views)]
    looks = [look for *_, look in asked]
    plain, logits, *_ = asked[0]
    gaussian = mixed([posterior.outputs(mean, along, predictor.draws.to(along)) for _, mean, along, _ in asked])
    prediction = likelihood.predict(gaussian, predictor.settings["predictive"], posterior.temperature.to(logits))
    targets, weights = _answers(likelihood, batch, logits)
    answers = (part.cpu() for part in (likelihood.nll(prediction, targets), targets, weights))
    copies = perturbed(batch.inputs, generator) if perturb is None else perturb(batch.inputs)  # which may write to them
    if num_samples(copies) != count:
        raise ValueError(f"perturb= must give as many samples as it gets, {count}, not {num_samples(copies)}.")
    return Lecture(plain, _asked(predictor, recorder, places, copies)[0], looks, *answers)


def _joined(lessons: Sequence[Lesson]) -> Lesson:
    return Lesson(*map(torch.cat, zip(*lessons, strict=True)))


def _asked(
    predictor: "ELLAPredictor", recorder: Recorder, places: Sequence[Place], inputs: Inputs
) -> tuple[Lesson, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A lesson on some inputs, their outputs (B, C) and features (B, C, K + m), and what was recorded."""
    outputs, pooled = recorder(inputs)
    parts = predictor._here().affordable(inputs, predictor.draws.shape[1])
    looked = [predictor.features(rows(inputs, part)) for part in parts]
    logits, features = (torch.cat(part) for part in zip(*looked, strict=True))
    how = {"invariant": predictor.likelihood.invariant, "predictive": predictor.settings["predictive"]}
    own = chosen(pooled, places, recorder.places)
    learnt = lesson(own, outputs, features, predictor.posterior.root(), **how)
    return learnt, logits, features, (outputs.float().cpu(), pooled.float().cpu())


def _answers(likelihood: Likelihood, batch: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Targets as the likelihood takes them, and their weights, (B,)."""
    targets = checked(likelihood, outputs, batch.targets, -1)
    return targets, weights_of(likelihood, targets, batch.weights)


def _untaught(
    predictor: "ELLAPredictor", recorder: Recorder, places: Sequence[Place], lessons: Lesson
) -> FastPredictor:
    """A fast predictor with a student that has learnt nothing."""
    posterior, settings = predictor.posterior, predictor.settings
    num_outputs, rank = lessons.along.shape[1:]
    size = 12 * len(lessons.outputs) * num_outputs * (rank + 3)  # targets, standardised ones, and what is said
    if size > (budget := predictor._here().memory_budget):
        raise ValueError(
            f"the lessons take {size} bytes, more than memory_budget={budget}: pass fewer num_points=, or a larger "
            "memory_budget=."
        )
    draws = spread_normal(SAMPLES, rank + num_outputs, settings["seed"])
    assert recorder.network.output_shape is not None
    return FastPredictor(
        predictor.model,
        student=Student.of(lessons, predictor.likelihood.invariant),
        translation=Translation(posterior.root().cpu(), draws).follow(posterior),
        places=places,
        output_shape=recorder.network.output_shape,
        teacher=predictor.identity,
        forward=predictor.forward_function,
        settings=settings | predictor.likelihood.stored(),
        origin=predictor.origin,
        counted=predictor.counted,
        familiarity=copy.deepcopy(predictor.familiarity),
    ).to(predictor.device)


def _tune(fast: FastPredictor, recorder: Recorder, points: Points, numbers: Sequence[int]) -> None:
    """Choose the scales anew, on points that the student has not seen, with a prior around the exact predictor's."""
    likelihood, translation, parts = fast.likelihood, fast.translation, []
    numbers, foreign = numbers[: max(1, TUNING // (DRAWS * len(fast.all_views) * fast.student.num_outputs))], []
    for batch in points.batches(points.arranged(numbers), fast.device):
        looks = [recorder(seen(batch.inputs, view)) for view in fast.all_views]
        answers = [fast.say(pooled, check_finite(outputs)) for outputs, pooled in looks]
        said = [fast.translation(outputs, answer) for (outputs, _), answer in zip(looks, answers, strict=True)]
        if fast.familiarity is not None:
            foreign.append(
                fast.familiarity.columns(scores(fast.looks(looks, answers), fast.familiarity.distance, likelihood))
            )
        gaussians = (torch.stack(part, 1) for part in zip(*((g.mean, g.factor, g.own) for g in said), strict=True))
        parts.append((*gaussians, *_answers(likelihood, batch, looks[0][0])))
    mean, factor, own, targets, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    mean, factor, own, weights = (part.double() for part in (mean, factor, own, weights))  # (n, V, C, …)
    count, draws = weights.sum().clamp_min(1), fast.translation.draws[:DRAWS].double()
    names = ["variance"] + ["temperature"] * likelihood.has_temperature
    precision = torch.tensor([WIDTHS[name] ** -2 for name in names]).to(mean) / count
    pieces = slices(len(mean), chunks(mean).tuning // (mean[0].numel() * len(draws)))

    def loss(steps: Tensor, part: slice) -> Tensor:
        deviation = (steps[0] / 2).exp()
        looks = zip(*(values[part].unbind(1) for values in (mean, factor, own)), strict=True)
        parts: list[Gaussian] = [Spread(m, f * deviation, draws, own=o * deviation) for m, f, o in looks]
        temperature = translation.temperature.to(mean) * steps[1:].sum().exp()
        prediction = likelihood.predict(mixed(parts), fast.settings["predictive"], temperature)
        return (weights[part] * likelihood.nll(prediction, targets[part])).sum() / count

    def loss_and_gradient(steps: Tensor) -> tuple[Tensor, Tensor]:
        steps = steps.detach().requires_grad_()
        value, gradient = (precision * steps.detach().square()).sum() / 2, precision * steps.detach()
        with torch.enable_grad():
            for part in pieces:
                piece = loss(steps, part)
                value, gradient = value + piece.detach(), gradient + torch.autograd.grad(piece, steps)[0]
        return value, gradient

    steps = minimise(loss_and_gradient, mean.new_zeros(len(names)), 1e-7)
    translation.scale = steps[0].exp().to(translation.scale)
    translation.tempering = steps[1:].sum().exp().to(translation.tempering)
    translation.temperature = translation.temperature * translation.tempering
    if fast.familiarity is not None:
        object.__setattr__(fast, "familiarity", fast.familiarity.among(torch.cat(foreign)))


def _guaranteed(fast: FastPredictor, recorder: Recorder, batches: Iterable[Batch]) -> Guarantee | None:
    """What points that nothing has seen say about any that come; None if too few of them have labels, or equal ones."""

    def predict(inputs: Inputs) -> Any:
        return fast.predict([recorder(seen(inputs, view)) for view in fast.all_views])

    judged, weights = judge(predict, fast.likelihood, batches)
    return None if judged is None else Guarantee.promised(judged, weights)


def _figures(fast: FastPredictor, lectures: Sequence[Lecture]) -> dict[str, float]:
    """How well a student follows, on points that it was not taught on and on changed copies of them."""
    figures = {}
    for what, part in (("", 0), ("_changed", 1)):
        exact = _joined([lecture[part] for lecture in lectures])  # type: ignore[arg-type]
        said = fast.student(exact.pooled.to(fast.device), exact.outputs.to(fast.device))
        figures[f"variance_correlation{what}"] = _correlation(_log_variance(fast, said), _log_variance(fast, exact))
        if exact.novelty.numel():
            figures[f"novelty_correlation{what}"] = _correlation(said.novelty, exact.novelty)
    nll, weights = (torch.cat([getattr(lecture, name) for lecture in lectures]) for name in ("nll", "weights"))
    parts = []
    for lecture in lectures:
        prediction = fast.predict([(f.to(fast.device), a.to(fast.device)) for f, a in lecture.looks])
        parts.append(fast.likelihood.nll(prediction, lecture.targets.to(fast.device)).to(nll))
    ours = torch.cat(parts)
    total, change = weights.sum().clamp_min(1), weights * (ours - nll)
    figures |= {"nll_exact": float((weights * nll).sum() / total), "nll": float((weights * ours).sum() / total)}
    # The standard error of their difference.
    figures["nll_error"] = float(change.std(correction=0) * len(change) ** 0.5 / total)
    scales = {"variance_scale": fast.translation.scale, "temperature": fast.translation.temperature}
    return figures | {name: float(scale) for name, scale in scales.items()}


def _log_variance(fast: FastPredictor, said: NamedTuple) -> Tensor:
    """Of the outputs, in and outside the span, (n, C)."""
    inside, outside = (getattr(said, name).double().exp().cpu() for name in ("inside", "outside"))
    return (inside + fast.translation.outside.cpu() * outside if outside.numel() else inside).log()


def _correlation(a: Tensor, b: Tensor) -> float:
    """0 where one of them does not vary, or is not finite; 1 where both are the same."""
    a, b = (values.double().cpu().flatten() for values in (a, b))
    if len(a) < 2 or torch.equal(a, b):
        return float(torch.equal(a, b))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num(0.0))


def _tell(figures: Mapping[str, float], count: int, tested: int, recorder: Recorder) -> None:
    """Log how well the student follows, and warn where it surely does not."""
    log.info(
        "ELLA: a student was taught on %d inputs, half of them changed, and looks at %d places in the network. On "
        "others, its log-variances correlate with the exact ones by %.2f (%.2f where changed), and the NLL is %.4g, "
        "exactly %.4g. It took %.0f s.",
        *(count, len(recorder.places), figures["variance_correlation"], figures["variance_correlation_changed"]),
        *(figures["nll"], figures["nll_exact"], figures["seconds"]),
    )
    error = SURE / max(1, tested - 3) ** 0.5  # of a correlation's artanh (Fisher 1921)
    allowed = max(WORSE * abs(figures["nll_exact"]), SURE * figures["nll_error"])
    short = [
        f"{name} is {value:.2f}"
        for name, value in figures.items()
        if "_correlation" in name and atanh(0.999999 * value) + error < atanh(CLOSE[name.partition("_")[0]])
    ]
    if not figures["nll"] <= figures["nll_exact"] + allowed:
        short.append(f"its NLL is {figures['nll']:.4g} instead of {figures['nll_exact']:.4g}")
    if short:
        log.warning(
            "ELLA: the student follows the exact predictor loosely (%s): teach it with more points (num_points=), or "
            "ask the exact one.",
            ", ".join(short),
        )
