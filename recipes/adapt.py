"""My data have changed and I have n labels: what each way to use them is worth, on one network and the same images.

python recipes/adapt.py                                  # digits and a small ResNet, trained first
python recipes/adapt.py experiment=cifar10_resnet20 trainer.max_epochs=0 data.root=<folder> model.checkpoint=<file>

Whatever a method has to choose, it chooses on the n labels alone, by cross-validation where they are also what it
learns from. Only the temperature that it starts from is that of the images that calibrate the posterior. Seconds are
those of adapting, with the pass of the n images through the network, without test images.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import hydra
import torch
from compare import cell, first, network
from corruptions import corrupt
from data import Images
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from matplotlib import colormaps
from matplotlib.figure import Figure
from omegaconf import DictConfig
from report import classification_figures
from rich.console import Console
from rich.table import Table
from rivals import NotApplicable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from lightning_ella import ELLAPredictor, fit_ella

BATCH = 128  # images in a pass
STEP = 32  # images in a step of the fine-tuning
WIDTH = 0.5  # e-folds: of a prior on every temperature, as few labels that are all right would else make it 0
EXPONENTS = torch.linspace(-3, 3, 301).tolist()  # e-folds from the usual temperature: what is tried
PENALTIES = torch.logspace(-4, 3, 8).tolist()  # of the last layer; the last of them leaves it as it is
UNCHANGED = "none"
SCALING, OURS = "temperature scaling", "lightning-ella"
STATISTICS = "BatchNorm statistics"
BOTH = f"{STATISTICS} and {OURS}"

log = logging.getLogger(__name__)

Figures = dict[str, float]  # NLL, accuracy, …, seconds, and what was chosen
Found = dict[str, dict[str, list[dict[str, Figures]]]]  # domain -> number of labels -> a draw of them -> method


@dataclass(frozen=True)
class Seen:
    """What a network makes of images (n, …).

    Attributes:
        logits: (n, C), float64.
        activations: what its last layer takes, (n, D), float64; None where that is no `nn.Linear` with logits (n, C).
        seconds: that it took.
    """

    logits: Tensor
    activations: Tensor | None
    seconds: float

    def first(self, count: int) -> "Seen":
        """Of the first images, with their share of the time."""
        activations = None if self.activations is None else self.activations[:count]
        return Seen(self.logits[:count], activations, self.seconds * count / len(self.logits))


@dataclass
class Domain:
    """Images of a domain, and what networks make of them, which is computed once for all methods and counts of labels.

    Attributes:
        model: trained, in eval mode.
        usual: its temperature where nothing has changed.
        labelled: images and their labels, of which a method may use the first n.
        unlabelled: images.
        test: images and their labels.
    """

    model: nn.Module
    usual: float
    labelled: tuple[Tensor, Tensor]
    unlabelled: Tensor
    test: tuple[Tensor, Tensor]

    @cached_property
    def seen(self) -> tuple[Seen, Seen]:
        """Labelled and test images, by the network as it is."""
        return look(self.model, self.labelled[0]), look(self.model, self.test[0])

    @cached_property
    def adapted(self) -> tuple[nn.Module, float]:
        """The network with the BatchNorms' statistics of the unlabelled images, and the seconds that took."""
        started = time.perf_counter()
        model = deepcopy(self.model)
        norms = batch_norms(model)
        if not norms:
            raise NotApplicable("The network has no BatchNorm with running statistics.")
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches, with equal weights
            norm.train()
        with torch.no_grad():
            for images in self.unlabelled.chunk(math.ceil(len(self.unlabelled) / BATCH)):
                model(images)
        return model.eval(), time.perf_counter() - started

    @cached_property
    def seen_adapted(self) -> tuple[Seen, Seen]:
        """Labelled and test images, by the network with new statistics."""
        model, _ = self.adapted
        return look(model, self.labelled[0]), look(model, self.test[0])


@dataclass(frozen=True)
class Adapted:
    """A method's probabilities of the test images (n, C), the seconds that it took, its NLL by cross-validation."""

    probs: Tensor
    seconds: float
    validated: float = math.nan
    chosen: Figures = field(default_factory=dict)


@dataclass
class Task:
    """What every method gets: the first n labels of a domain, and the settings; what it gave is kept."""

    domain: Domain
    count: int
    config: DictConfig
    seed: int
    predictors: dict[int, ELLAPredictor]  # number of directions -> fitted and calibrated where nothing had changed
    found: dict[str, Adapted] = field(default_factory=dict)

    @property
    def images(self) -> Tensor:
        return self.domain.labelled[0][: self.count]

    @property
    def targets(self) -> Tensor:
        return self.domain.labelled[1][: self.count]

    @property
    def loader(self) -> DataLoader:
        """Of the labelled images."""
        return DataLoader(TensorDataset(self.images, self.targets), BATCH)

    @cached_property
    def folds(self) -> list[tuple[Tensor, Tensor]]:
        """Numbers of the labelled images to learn from and to look at, for each fold."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed))
        parts = order.chunk(self.config.folds)
        return [(torch.cat([*parts[:i], *parts[i + 1 :]]), parts[i]) for i in range(len(parts))]

    def adapt(self, name: str, method: "Method") -> Adapted:
        """What a method gives; once."""
        if name not in self.found:
            self.found[name] = method(self)
        return self.found[name]


Method = Callable[[Task], Adapted]


def look(model: nn.Module, images: Tensor) -> Seen:
    """Pass images through a network."""
    started, taken = time.perf_counter(), []
    last = last_layer(model)
    hook = last and last[1].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    logits = logits_of(model, images)
    if hook:
        hook.remove()
    activations = torch.cat(taken).double() if taken and all(part.ndim == 2 for part in taken) else None
    if last and activations is not None:
        again = affine(activations, *weights(last[1]))
        if again.shape != logits.shape or not torch.allclose(again, logits, rtol=1e-3, atol=1e-3):
            activations = None  # the network goes on behind it
    return Seen(logits, activations, time.perf_counter() - started)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(n, C), float64."""
    return torch.cat([model(batch) for batch in images.split(BATCH)]).double()


def last_layer(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """The last `nn.Linear`, with its name."""
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return layers[-1] if layers else None


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those that keep running statistics, by name."""
    norms = {name: part for name, part in model.named_modules() if isinstance(part, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.track_running_stats}


def weights(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,), float64."""
    weight = layer.weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()


def affine(activations: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return activations @ weight.T + bias


def best(logits: Tensor, targets: Tensor, usual: float) -> tuple[int, float, float]:
    """The candidate of k with the lowest NLL at its best temperature, that temperature and NLL; logits are (k, n, C).

    Its loss is what the temperature is for, so candidates are compared as they will be used.
    """
    tried = [usual * math.exp(exponent) for exponent in EXPONENTS]
    losses = torch.stack([nll(logits / temperature, targets) for temperature in tried])  # (temperatures, k)
    penalties = torch.tensor([(exponent / WIDTH) ** 2 / 2 for exponent in EXPONENTS]).to(losses)
    totals = (len(targets) * losses + penalties.unsqueeze(1)).nan_to_num(nan=math.inf)  # a rate that was too high
    hottest, candidate = divmod(int(totals.argmin()), len(logits))
    return candidate, tried[hottest], float(losses[hottest, candidate])


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of each candidate, (k,), from logits (k, n, C)."""
    found = logits.log_softmax(2).gather(2, targets.expand(len(logits), -1).unsqueeze(2))
    return -found.mean((1, 2))


def as_it_is(task: Task) -> Adapted:
    return Adapted(task.domain.seen[1].logits.softmax(1), 0.0)


def usual_temperature(task: Task) -> Adapted:
    """The temperature of the images that calibrate the posterior."""
    return Adapted((task.domain.seen[1].logits / task.domain.usual).softmax(1), 0.0)


def behind(fit: Callable[[Seen, Seen, Task], Adapted], statistics: bool = False) -> Method:
    """What is fitted on what the network makes of images: as it is, or with new statistics of its BatchNorms."""

    def method(task: Task) -> Adapted:
        if not statistics:
            return fit(*task.domain.seen, task)
        _, seconds = task.domain.adapted
        found = fit(*task.domain.seen_adapted, task)
        return replace(found, seconds=found.seconds + seconds)

    return method


def scaled(labelled: Seen, test: Seen, task: Task) -> Adapted:
    """One temperature for all logits (Guo et al. 2017), from the labels."""
    started, known = time.perf_counter(), labelled.first(task.count)
    _, temperature, _ = best(known.logits.unsqueeze(0), task.targets, task.domain.usual)
    seconds = known.seconds + time.perf_counter() - started
    return Adapted((test.logits / temperature).softmax(1), seconds, chosen={"temperature": temperature})


def regressed(labelled: Seen, test: Seen, task: Task) -> Adapted:
    """Logistic regression on what the last layer takes, drawn towards that layer by a penalty."""
    started, last = time.perf_counter(), last_layer(task.domain.model)
    known = labelled.first(task.count)
    if last is None or known.activations is None or test.activations is None:
        raise NotApplicable("The network does not end with an nn.Linear on vectors.")
    activations, targets = known.activations, task.targets
    weight, bias = weights(last[1])
    own = weight / task.domain.usual, bias / task.domain.usual
    unseen = known.logits.new_empty(len(PENALTIES), *known.logits.shape)
    for learn, held in task.folds:
        for k, penalty in enumerate(PENALTIES):
            layer = refitted(own, activations[learn], targets[learn], penalty)
            unseen[k, held] = affine(activations[held], *layer)
    index, temperature, validated = best(unseen, targets, 1.0)
    layer = refitted(own, activations, targets, PENALTIES[index])
    seconds = known.seconds + time.perf_counter() - started
    chosen = {"penalty": PENALTIES[index], "temperature": temperature}
    return Adapted((affine(test.activations, *layer) / temperature).softmax(1), seconds, validated, chosen)


def refitted(own: tuple[Tensor, Tensor], activations: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The last layer over a temperature, plus a difference, with the lowest NLL of the targets and penalty of both."""
    weight, bias = own
    difference = torch.zeros(len(bias), weight.shape[1] + 1, dtype=weight.dtype, device=weight.device)
    log_scale = weight.new_zeros(())
    parameters = [difference.requires_grad_(), log_scale.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def layer() -> tuple[Tensor, Tensor]:
        scale = log_scale.exp()
        return scale * weight + difference[:, :-1], scale * bias + difference[:, -1]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(affine(activations, *layer()), targets) + penalty / 2 * difference.square().sum()
        loss = loss + (log_scale / WIDTH).square() / 2 / len(targets)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    weight, bias = (part.detach() for part in layer())
    return weight, bias


def all_weights(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def norms_and_last_layer(model: nn.Module) -> set[str]:
    norms, last = batch_norms(model), last_layer(model)
    if not norms or last is None:
        raise NotApplicable("The network has no BatchNorm, or no nn.Linear.")
    modules = (*norms, last[0])
    return {name for name in all_weights(model) if name.rpartition(".")[0] in modules}


def fine_tuning(part: Callable[[nn.Module], set[str]]) -> Method:
    """Training of some weights for as many epochs and at the rate that cross-validation says; none are a candidate."""

    def method(task: Task) -> Adapted:
        started, names, config = time.perf_counter(), part(task.domain.model), task.config
        known = task.domain.seen[0].first(task.count)
        unseen = known.logits.new_full((len(config.rates), config.epochs + 1, *known.logits.shape), math.nan)
        unseen[:, 0] = known.logits
        for learn, held in task.folds:
            for r, rate in enumerate(config.rates):
                for epoch, model in enumerate(trained(task, names, rate, config.epochs, learn), 1):
                    unseen[r, epoch, held] = logits_of(model, task.images[held])
        index, temperature, validated = best(unseen.flatten(0, 1), task.targets, task.domain.usual)
        rate, epochs = config.rates[index // (config.epochs + 1)], index % (config.epochs + 1)
        model = task.domain.model
        for model in trained(task, names, rate, epochs, torch.arange(task.count)):  # noqa: B007 - the last of them
            pass
        seconds = known.seconds + time.perf_counter() - started
        chosen = {"rate": rate, "epochs": epochs, "temperature": temperature}
        probs = (logits_of(model, task.domain.test[0]) / temperature).softmax(1)
        return Adapted(probs, seconds, validated, chosen)

    return method


def trained(task: Task, names: set[str], rate: float, epochs: int, numbers: Tensor) -> Iterator[nn.Module]:
    """The network after each epoch on some of the labelled images, by SGD, until its loss is no number any more.

    It stays in eval mode: a few labels would ruin the statistics of BatchNorms.
    """
    model = deepcopy(task.domain.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9)
    generator = torch.Generator().manual_seed(task.seed)
    for _ in range(epochs):
        for batch in numbers[torch.randperm(len(numbers), generator=generator)].split(STEP):
            optimizer.zero_grad()
            loss = cross_entropy(model(task.images[batch]), task.targets[batch])
            if not loss.isfinite():
                return
            loss.backward()
            optimizer.step()
        yield model


def better(*names: str) -> Method:
    """The one of several methods that cross-validation on the labels prefers; it takes the time of all of them."""

    def method(task: Task) -> Adapted:
        known = {name: found for name in names if (found := attempt(task, name, METHODS[name]))}
        if not known:
            raise NotApplicable(f"There is none of {', '.join(names)}.")
        taken = min(known.values(), key=lambda each: each.validated)
        return Adapted(taken.probs, sum(each.seconds for each in known.values()), taken.validated, taken.chosen)

    return method


def attempt(task: Task, name: str, method: Method) -> Adapted | None:
    """What a method gives, or None where the network is not one for it."""
    try:
        return task.adapt(name, method)
    except NotApplicable:
        return None


def before(rank: int) -> Method:
    """This package's posterior as it was fitted."""
    return lambda task: Adapted(probabilities(task.predictors[rank], task.domain.test[0]), 0.0)


def updated(rank: int) -> Method:
    """This package's posterior after `update` with the labels."""

    def method(task: Task) -> Adapted:
        return learnt(deepcopy(task.predictors[rank]), task, 0.0)

    return method


def statistics_and_ours(task: Task) -> Adapted:
    """New statistics of the BatchNorms, and a posterior around that network from the labels alone."""
    model, seconds = task.domain.adapted
    started = time.perf_counter()
    options = posterior_options(task.config)
    few = {"num_landmarks": min(options["num_landmarks"] or task.count, task.count), "num_curvature": task.count}
    few |= {"rank": min(task.config.ranks[0], task.count), "seed": task.seed}
    predictor = fit_ella(deepcopy(model), task.loader, **options | few)
    return learnt(predictor, task, seconds + time.perf_counter() - started)


def learnt(predictor: ELLAPredictor, task: Task, seconds: float) -> Adapted:
    """Update a predictor with the labels; `seconds` are those that it took before."""
    started = time.perf_counter()
    predictor.update(task.loader)
    seconds += time.perf_counter() - started
    assert predictor.learnt is not None
    chosen = {name: float(getattr(predictor.learnt, name)) for name in ("reach", "drift", "temperature")}
    return Adapted(probabilities(predictor, task.domain.test[0]), seconds, chosen=chosen)


def probabilities(predictor: ELLAPredictor, images: Tensor) -> Tensor:
    return torch.cat([predictor(batch).probs for batch in images.split(BATCH)])


ALL, FEW = "fine-tuning, all weights", "fine-tuning, BatchNorms and last layer"
temperature_scaling, last_layer_again = behind(scaled), behind(regressed)
METHODS: dict[str, Method] = {
    "MAP": as_it_is,
    f"{SCALING}, no labels": usual_temperature,
    SCALING: temperature_scaling,
    "last layer fitted again": last_layer_again,
    STATISTICS: behind(scaled, statistics=True),  # Li et al. 2017; Schneider et al. 2020
    f"{STATISTICS} and last layer": behind(regressed, statistics=True),
    ALL: fine_tuning(all_weights),
    FEW: fine_tuning(norms_and_last_layer),
    "fine-tuning, better by CV": better(ALL, FEW),
}


def methods_of(config: DictConfig) -> dict[str, Method]:
    """Rivals and ours, by name."""
    methods = {name: METHODS[name] for name in config.rivals or METHODS}
    methods[f"{OURS}, no labels"] = before(config.ranks[0])
    methods |= {directions(rank): updated(rank) for rank in config.ranks}
    return methods | ({BOTH: statistics_and_ours} if config.both else {})


def directions(rank: int) -> str:
    return f"{OURS}, {rank} directions"


def posterior_options(config: DictConfig) -> dict[str, Any]:
    """The settings of a fit."""
    callback = ("_target_", "weights", "resume", "on_error", "path", "distil", "views")
    return {n: v for n, v in config.ella.items() if n not in callback} | {"num_calibration": None}


@dataclass(frozen=True)
class Parts:
    """Numbers of the held-out images: to calibrate on, and all others."""

    calibration: list[int]
    others: Tensor


def parts_of(data: Images, config: DictConfig) -> tuple[Parts, list[int], int]:
    """The held-out images in two parts, and how many of them are labelled and unlabelled."""
    total = len(data.holdout)  # type: ignore[arg-type] - it has a length
    wanted = config.num_calibration, max(config.labels), config.num_unlabelled
    share = min(1.0, total / sum(wanted))
    calibration, most, unlabelled = (int(share * count) for count in wanted)
    labels = sorted({min(count, most) for count in config.labels})
    if share < 1:
        log.warning(
            "num_calibration, labels and num_unlabelled want %d images of %d held out: they become %d, %s and %d.",
            *(sum(wanted), total, calibration, labels, unlabelled),
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(config.seed))
    return Parts(order[:calibration].tolist(), order[calibration:]), labels, unlabelled


def usual(model: nn.Module, held_out: DataLoader, device: str) -> float:
    """The network's temperature on images that it has not seen and that are as they were."""
    images, targets = (torch.cat(part).to(device) for part in zip(*held_out, strict=True))
    return best(logits_of(model, images).unsqueeze(0), targets, 1.0)[1]


def fit_all(config: DictConfig, model: nn.Module, train: DataLoader, held_out: DataLoader) -> dict[int, ELLAPredictor]:
    """A posterior for each number of directions, where nothing has changed."""
    options = posterior_options(config)
    return {rank: fit_ella(deepcopy(model), train, held_out, **options | {"rank": rank}) for rank in config.ranks}


@dataclass(frozen=True)
class Source:
    """Where domains come from: the network, its data, and what is drawn of them."""

    model: nn.Module
    data: Images
    parts: Parts
    usual: float
    num_labelled: int
    num_unlabelled: int

    def domain(self, name: str, config: DictConfig, seed: int) -> Domain:
        """Labelled, unlabelled and test images of a domain, none of which calibrated a posterior."""
        others = self.parts.others
        order = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
        drawn = Subset(self.data.holdout, order[: self.num_labelled + self.num_unlabelled].tolist())
        sets = first(drawn, len(drawn), seed), first(self.data.test, config.num_test, config.seed)
        held, test = (
            (changed(name, self.data, images, number).to(config.device), targets.to(config.device))
            for number, (images, targets) in enumerate(sets)
        )
        labelled = held[0][: self.num_labelled], held[1][: self.num_labelled]
        return Domain(self.model, self.usual, labelled, held[0][self.num_labelled :], test)


def changed(name: str, data: Images, images: Tensor, seed: int) -> Tensor:
    """Images as they are in a domain, "<corruption>/<severity>" or "none"."""
    if name == UNCHANGED:
        return images
    corruption, _, severity = name.partition("/")
    return data.normalise(corrupt(data.pixels(images), corruption, int(severity), seed))


def figures(task: Task, methods: dict[str, Method], bar: tqdm) -> dict[str, Figures]:
    """NLL, accuracy and more of each method that the network is one for."""
    rows, targets = {}, task.domain.test[1].cpu()
    for name, method in methods.items():
        bar.set_postfix_str(name)
        if found := attempt(task, name, method):
            known = classification_figures([{"probs": found.probs.cpu(), "targets": targets}], "probs")
            rows[name] = known | {"seconds": found.seconds} | found.chosen
        bar.update()
    return rows


def show(name: str, draws: dict[str, list[dict[str, Figures]]], console: Console) -> None:
    """Print the table of a domain: NLL and accuracy for each number of labels, and what adapting took."""
    columns = [f"{count} labels: {what}" for count in draws for what in ("NLL", "accuracy", "s")]
    table = Table("", *columns, title=title(name))
    for method in dict.fromkeys(method for rows in draws.values() for row in rows for method in row):
        cells = []
        for rows in draws.values():
            cells += [cell([row[method][figure] for row in rows]) for figure in ("nll", "accuracy")]
            cells.append(f"{mean(row[method]['seconds'] for row in rows):.2f}")
        table.add_row(method, *cells)
    console.print(table)


def title(name: str) -> str:
    return "unchanged" if name == UNCHANGED else name


def over_domains(found: Found, domains: Iterable[str]) -> dict[str, dict[str, float]]:
    """The mean NLL over some domains and all draws, number of labels -> method."""
    domains = list(domains)
    return {
        count: {
            method: mean(row[method]["nll"] for domain in domains for row in found[domain][count])
            for method in found[domains[0]][count][0]
        }
        for count in (found[domains[0]] if domains else ())
    }


def summarise(found: Found, console: Console) -> dict[str, dict]:
    """Print, and return, the mean NLL over the changed domains and that where nothing changed."""
    groups = {"changed": [name for name in found if name != UNCHANGED], "unchanged": [UNCHANGED] * (UNCHANGED in found)}
    means = {group: over_domains(found, names) for group, names in groups.items() if names}
    for group, by_count in means.items():
        counts = list(by_count)
        columns = [f"{count} labels: {what}" for count in counts for what in ("NLL", f"over {SCALING}")]
        table = Table("", *columns, title=f"NLL, {len(groups[group])} {group} domain(s)")
        for method in by_count[counts[0]]:
            cells = []
            for row in by_count.values():
                ratio = row[method] / row[SCALING] if SCALING in row else math.nan
                cells += [f"{row[method]:.4f}", f"{ratio:.3f}"]
            table.add_row(method, *cells)
        console.print(table)
    return means


def plots(found: Found, means: dict[str, dict], ranks: list[int]) -> dict[str, Figure]:
    """NLL against the number of labels, a panel for each domain; and against the number of directions, if several."""
    made = {"adapt": by_labels(found)}
    if len(ranks) > 1:
        made["ranks"] = by_rank(means, ranks)
    return made


def by_labels(found: Found) -> Figure:
    """A line for each method, a panel for each domain."""
    drawn = Figure(figsize=(3.4 * len(found) + 3.2, 4), layout="constrained")
    panels = drawn.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, draws) in zip(panels, found.items(), strict=True):
        counts = [int(count) for count in draws]
        for number, method in enumerate(next(iter(draws.values()))[0]):
            losses = [mean(row[method]["nll"] for row in rows) for rows in draws.values()]
            style = "-" if method.startswith(OURS) or method == BOTH else "--"
            colour = colormaps["tab20"](number % 20)  # more than ten methods
            axes.plot(counts, losses, style, marker="o", markersize=4, linewidth=1.2, label=method, color=colour)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set(title=title(name), xlabel="labels")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("NLL on test images: lower is better")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return drawn


def by_rank(means: dict[str, dict], ranks: list[int]) -> Figure:
    """A line for each number of labels, a panel for changed domains and one for the unchanged."""
    drawn = Figure(figsize=(4.5 * len(means), 3.5), layout="constrained")
    panels = drawn.subplots(1, len(means), squeeze=False)[0]
    for axes, (group, by_count) in zip(panels, means.items(), strict=True):
        for count, row in by_count.items():
            losses = [row[directions(rank)] for rank in ranks]
            axes.plot(ranks, losses, marker="o", markersize=4, linewidth=1.2, label=f"{count} labels")
        axes.set_xscale("log")
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        axes.set(title=f"{group} domains", xlabel="directions K")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0].set_ylabel("NLL on test images")
    return drawn


def send(logger: Logger | None, found: Found, folder: Path, names: Iterable[str]) -> None:
    """Log the figures of the last draw, and the plots to W&B."""
    if logger is None:
        return
    logger.log_metrics(
        {
            f"adapt/{name}/{count}/{method}/{figure}": value
            for name, draws in found.items()
            for count, rows in draws.items()
            for method, row in rows[-1].items()
            for figure, value in row.items()
        }
    )
    logger.save()  # CSV's writes nothing before
    if isinstance(logger, WandbLogger):
        for name in names:
            logger.log_image(f"adapt/{name}", [str(folder / f"{name}.png")])


@hydra.main(version_base="1.3", config_path="../conf", config_name="adapt")
def main(config: DictConfig) -> None:
    """Fit, adapt to one domain after the other, print; write adapt.json and pictures, and log them."""
    folder, console = Path(HydraConfig.get().runtime.output_dir), Console(width=180)
    data: Images = instantiate(config.data)
    module = network(config, data, config.seed)
    module.trainer = None  # copies of the network would copy it, with all data
    module.to(config.device)
    data.setup("fit")
    parts, labels, unlabelled = parts_of(data, config)
    held_out = data.loader(Subset(data.holdout, parts.calibration))
    predictors, methods = fit_all(config, module, data.ella_train_dataloader(), held_out), methods_of(config)
    source = Source(module, data, parts, usual(module, held_out, config.device), labels[-1], unlabelled)
    found: Found = {}
    with tqdm(total=len(config.domains) * len(config.seeds) * len(labels) * len(methods), unit="method") as bar:
        for name in config.domains:
            bar.set_description(title(name))
            draws: dict[str, list[dict[str, Figures]]] = {str(count): [] for count in labels}
            for seed in config.seeds:
                here = source.domain(name, config, seed)
                for count in labels:
                    task = Task(here, count, config, seed, predictors)
                    draws[str(count)].append(figures(task, methods, bar))
            found[name] = draws
            bar.clear()
            show(name, draws, console)
            (folder / "adapt.json").write_text(json.dumps(found, indent=2))  # what there is, should it be stopped
    means = summarise(found, console)
    (folder / "adapt.json").write_text(json.dumps(found | {"NLL": means}, indent=2))
    made = plots(found, means, list(config.ranks))
    for name, drawn in made.items():
        drawn.savefig(folder / f"{name}.png", dpi=150)
    send(instantiate(config.logger) if config.logger else None, found, folder, made)
    print(f"Figures and adapt.json are in {folder}")


if __name__ == "__main__":
    main()
