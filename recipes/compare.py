"""What the posterior is worth beside what one would use instead, on one network, one split and the same pixels.

python recipes/compare.py                                # digits and a small ResNet, trained first
python recipes/compare.py experiment=cifar10_resnet20 trainer.max_epochs=0 data.root=<folder> model.checkpoint=<file>
"""

import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import hydra
import torch
from benchmark import memory
from build import build_network
from corruptions import CORRUPTIONS, SEVERITIES, corrupt
from data import Images, some
from detectors import DETECTORS, Score
from features import cache
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from omegaconf import DictConfig
from report import FIGURES, classification_figures, told
from rich.console import Console
from rich.table import Table
from rivals import RIVALS, NotApplicable, Predict, Task, ensemble, temperature_scaling
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lightning_ella import ELLAPredictor, FastPredictor, fit_ella
from lightning_ella.familiarity import PARTS
from lightning_ella.likelihoods import Classification
from lightning_ella.plots import calibration_under_shift, reliability_diagram, risk_coverage
from lightning_ella.posterior import SCALES, Posterior, calibrate, minimise
from lightning_ella.predictions import Gaussian, entropy

BATCH = 16  # images that all methods see before the next: rivals share their Jacobians
OURS = "lightning-ella"
SHOWN = ("MAP", "temperature scaling", "last layer, full", "ELLA as in the paper", OURS)  # in the plots
NUM_FUNCTIONS = 64
NONE = 1e-12  # a scale that leaves its part of the variance out
PAPER: dict[str, float | None] = {"prior_variance": 0.04, "temperature": 1.0}  # its early stop is the covariance scale
ABLATION: dict[str, dict[str, float | None]] = {  # what is fixed; the rest is tuned
    "only the span": {"residual_scale": NONE, "temperature": 1.0},
    "only outside the span": {"covariance_scale": NONE, "temperature": 1.0},
    "without temperature": {"temperature": 1.0},
    "without the span": {"covariance_scale": NONE},
    "without outside the span": {"residual_scale": NONE},
}

Sets = dict[str, tuple[Tensor, Tensor]]  # "test", "<corruption>/<severity>", "foreign/<name>" -> images, targets
STRONGEST = f"/{max(SEVERITIES)}"  # what the names of the strongest corruptions end with


def network(config: DictConfig, data: Images, seed: int, file: Path | None = None, **options: Any) -> LightningModule:
    """A network as it is in its checkpoint, or trained; one that is kept is trained once.

    Args:
        config: says which.
        data: to train with.
        seed: of the training.
        file: where it is read from, or written to.
        **options: of the Trainer.
    """
    seed_everything(seed, verbose=False)
    module = build_network(config, data)
    if file is not None and file.exists():
        load_model(module.network, str(file))
    elif config.trainer.max_epochs:
        trainer = instantiate(config.trainer, logger=False, enable_checkpointing=False, **options)
        trainer.fit(module, data)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_model(module.network, str(file))
    return module.eval()


def others(config: DictConfig, data: Images, seed: int) -> tuple[list[LightningModule], list[LightningModule]]:
    """The ensemble's other members, and a network whose weights are averaged; none where none is trained."""
    if not config.ensemble or not config.trainer.max_epochs:
        return [], []
    members = [
        network(config, data, other, kept(config, f"seed-{other}")) for other in range(seed + 1, seed + config.ensemble)
    ]
    averaging = StochasticWeightAveraging(swa_lrs=config.swa_lr)
    averaged = network(config, data, seed, kept(config, f"averaged-{seed}"), callbacks=[averaging])
    return members, [averaged]


def kept(config: DictConfig, name: str) -> Path:
    """The file of a network that is trained once."""
    return Path(config.members or Path(HydraConfig.get().runtime.output_dir) / "members") / f"{name}.safetensors"


def evaluation_sets(data: Images, config: DictConfig) -> Sets:
    """Test images as they are and corrupted, and foreign ones."""
    images, targets = first(data.test, max(config.num_test, config.num_corrupted), config.seed)
    sets = {"test": (images[: config.num_test], targets[: config.num_test])}
    pixels, labels = data.pixels(images[: config.num_corrupted]), targets[: config.num_corrupted]
    for name, dataset in data.shifted.items():
        sets[name] = first(dataset, config.num_corrupted, config.seed)
    for name, severity in () if data.shifted else product(config.corruptions or CORRUPTIONS, SEVERITIES):
        corrupted = corrupt(pixels, name, severity)
        if not corrupted.equal(pixels):  # as of the saturation of a grey image
            sets[f"{name}/{severity}"] = data.normalise(corrupted), labels
    for name, dataset in data.foreign.items():
        sets[f"foreign/{name}"] = first(dataset, config.num_foreign, config.seed)
    return sets


def first(dataset: Dataset, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some of the points of a data set, drawn at random."""
    loader = DataLoader(some(dataset, count, seed), batch_size=256)
    images, targets = (torch.cat(part) for part in zip(*loader, strict=True))
    return images, targets


class Own:
    """This package's predictor, and the same with less: features are computed once for all of them."""

    def __init__(self, predictor: ELLAPredictor, held_out: DataLoader):
        self.predictor, self.likelihood = predictor, Classification()
        self.unseen = cache(predictor, held_out, "held-out images")
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def variant(self, given: dict[str, float | None]) -> Predict:
        """With some scales fixed and the others tuned on the held-out points."""
        posterior = calibrate(
            self.unseen,
            self.predictor.curvature,
            self.likelihood,
            predictive="mc",
            draws=self.predictor.draws,
            given=given,
        )
        return lambda images: self.probabilities(posterior, images)

    def probabilities(self, posterior: Posterior, images: Tensor) -> Tensor:
        logits, features = self._look(images)
        gaussian = Gaussian(logits, posterior.factor(features), self.predictor.draws)
        return self.likelihood.predict(gaussian, "mc", posterior.temperature.to(logits)).probs

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._last is None or self._last[0] is not images:
            self._last = images, self.predictor.features(images)
        return self._last[1]


def without_probes(predictor: ELLAPredictor) -> ELLAPredictor:
    """The same directions and curvature without the variance outside their span, at the cost that it has then."""
    parts = {name: getattr(predictor, name) for name in ("eigenvalues", "curvature", *SCALES)}
    basis = {name: tangents.clone() for name, tangents in predictor.basis.items()}
    return ELLAPredictor(predictor.model, basis=basis, settings=predictor.settings | {"residual": 0}, **parts)


def fit_all(
    config: DictConfig, module: LightningModule, data: Images, seed: int
) -> tuple[dict[str, Predict], dict, dict[str, Score]]:
    """Every method's predictions, and what its fit took; and scores of foreign images, by name."""
    points = some(data.holdout, config.num_calibration, seed)
    held_out = DataLoader(points, batch_size=64)
    task = Task(deepcopy(module), data.ella_train_dataloader(), held_out, seed, config.num_train)
    predictions, costs = {}, {}
    for name in config.rivals or RIVALS:
        try:
            predictions[name], costs[name] = measured(lambda name=name: RIVALS[name](task))
        except NotApplicable as error:
            print(f"{name}: {error}")
    views = list(data.views)
    if views:
        name = f"temperature scaling, {1 + len(views)} views"
        predictions[name], costs[name] = measured(lambda: temperature_scaling(task, views))
    (members, averaged), cost = measured(lambda: others(config, data, seed))
    for each in averaged:
        task_of_it = replace(task, model=each)
        predictions["weight averaging, temperature"] = temperature_scaling(task_of_it)
    if members:
        costs["deep ensemble"] = cost
        predictions["deep ensemble"] = ensemble([module, *members])
        predictions["deep ensemble, temperature"] = temperature_scaling(task, models=[module, *members])
    settings = {**config.ella, "seed": seed, "num_calibration": None}
    del settings["_target_"]
    known = {n: v for n, v in settings.items() if n not in ("weights", "resume", "on_error", "path", "distil", "views")}
    fit = lambda: fit_ella(deepcopy(module), task.train, held_out, **known)  # noqa: E731
    predictor, costs[OURS] = measured(fit)
    predictions[OURS] = lambda images: predictor(images).probs
    fast, costs[f"{OURS}, student"] = measured(lambda: predictor.distil(held_out))
    predictions[f"{OURS}, student"] = lambda images: fast(images).probs
    if views:
        name = f"{OURS}, student, {1 + len(views)} views"
        looking, costs[name] = measured(
            lambda: fit_ella(deepcopy(module), task.train, held_out, views=views, **known).distil(held_out)
        )
        predictions[name] = lambda images: looking(images).probs
    own = Own(predictor, held_out)
    predictions |= {name: own.variant(given) for name, given in ABLATION.items()}
    predictions["ELLA as in the paper"] = Own(without_probes(predictor), held_out).variant(PAPER)
    predictions["prior by marginal likelihood"] = own.variant(by_evidence(predictor, task))
    functions = predictor.sample_functions(NUM_FUNCTIONS, seed)
    predictions[f"{NUM_FUNCTIONS} sampled functions"] = lambda images: functions(images).softmax(-1).mean(0)
    return predictions, costs, detectors(task, predictor, fast)


def detectors(task: Task, predictor: ELLAPredictor, fast: FastPredictor) -> dict[str, Score]:
    """Those of others, and this package's with its parts."""
    found: dict[str, Score] = {}
    for name in DETECTORS:
        try:
            found[name] = DETECTORS[name](task)
        except NotApplicable as error:
            print(f"{name}: {error}")
    for part in PARTS:
        found[f"{OURS}, student, {part}"] = lambda images, part=part: getattr(fast(images), part)
    found[f"{OURS}, student, familiarity"] = lambda images: -fast(images).familiarity
    found[f"{OURS}, novelty"] = lambda images: predictor(images).novelty
    found[f"{OURS}, familiarity"] = lambda images: -predictor(images).familiarity
    return found


def by_evidence(predictor: ELLAPredictor, task: Task) -> dict[str, float | None]:
    """No unseen points: the prior variance with the highest marginal likelihood, by its gradient, and nothing else.

    That of the training points, from the sums over some of them.
    """
    some = predictor.evidence(task.part)
    count = len(task.train.dataset)  # type: ignore[arg-type] - it has a length
    scale = count / len(task.part.dataset)  # type: ignore[arg-type]
    sums = ("log_likelihood", "eigenvalues", "outside")
    evidence = replace(some, **{name: scale * getattr(some, name) for name in sums})

    def loss_and_gradient(log_prior: Tensor) -> tuple[Tensor, Tensor]:
        log_prior = log_prior.detach().requires_grad_()
        loss = -evidence(log_prior.exp().squeeze()) / count
        return loss.detach(), torch.autograd.grad(loss, log_prior)[0]

    log_prior = minimise(loss_and_gradient, torch.zeros(1, dtype=torch.float64))
    given: dict[str, float | None] = {"covariance_scale": 1.0, "residual_scale": NONE, "temperature": 1.0}
    return given | {"prior_variance": float(log_prior.exp())}


def measured(fit: Callable) -> tuple:
    """What a fit gives, and its seconds and additional memory in bytes (by the kernel's account)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before, started = memory("VmRSS"), time.perf_counter()
    found = fit()
    return found, {"seconds": time.perf_counter() - started, "memory": memory("VmHWM") - before}


def times(predictions: dict[str, Predict], model: torch.nn.Module, images: Tensor) -> dict[str, float]:
    """Median time of a prediction in units of the forward pass F of the same batch."""
    jobs: dict[str, Predict] = {"F": torch.no_grad()(model.__call__), **predictions}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(3):
        for name, job in jobs.items():
            batch = images.clone()  # another tensor, so that nobody finds its features done
            started = time.perf_counter()
            job(batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: sorted(taken)[1] / sorted(seconds["F"])[1] for name, taken in seconds.items() if name != "F"}


def predict_all(predictions: dict[str, Predict], detectors: dict[str, Score], sets: Sets) -> tuple[dict, dict]:
    """Probabilities, method -> set -> (n, C), and scores of foreign images, detector -> set -> (n,)."""
    probs: dict[str, dict[str, Tensor]] = {name: {} for name in predictions}
    scores: dict[str, dict[str, Tensor]] = {name: {} for name in detectors}
    for key, (images, _) in tqdm(sets.items(), desc="sets of images"):
        parts: dict[str, list[Tensor]] = {name: [] for name in predictions}
        for batch in images.split(BATCH):
            for name, predict in predictions.items():
                parts[name].append(predict(batch))
        for name, found in parts.items():
            probs[name][key] = torch.cat(found)
        if key == "test" or key.startswith("foreign") or key.endswith(STRONGEST):
            for name, score in detectors.items():
                scores[name][key] = torch.cat([score(batch) for batch in images.split(64)])
    return probs, scores


def figures_of(probs: dict[str, Tensor], sets: Sets, keys: list[str]) -> dict[str, float]:
    """Figures of one method over all images of some sets."""
    return classification_figures([{"probs": probs[key], "targets": sets[key][1]} for key in keys], "probs")


def detection(scores: dict[str, Tensor]) -> dict[str, float]:
    """AUROC and FPR95 of each foreign set against the test images, from a score for each image.

    And the AUROC of the strongest corruptions, the mean over them.
    """
    found = {key: told(scores["test"], others) for key, others in scores.items() if key != "test"}
    foreign = {
        f"{what} {key.removeprefix('foreign/')}": value
        for key, values in found.items()
        if key.startswith("foreign/")
        for what, value in values.items()
    }
    corrupted = [values["AUROC"] for key, values in found.items() if key.endswith(STRONGEST)]
    return foreign | ({"AUROC corrupted": mean(corrupted)} if corrupted else {})


def losses_of(probs: dict[str, dict[str, Tensor]], sets: Sets, keys: list[str]) -> dict[str, Tensor]:
    """Each method's NLL of each image, (n,): the mean over the corruptions of it."""
    targets = sets[keys[0]][1].unsqueeze(1)
    return {
        name: torch.stack([-found[key].double().gather(1, targets).clamp_min(1e-38).log() for key in keys]).mean((0, 2))
        for name, found in probs.items()
    }


def bootstrap(losses: list[dict[str, Tensor]], count: int) -> dict[str, list[float]]:
    """95 % interval of each method's NLL over ours, minus one, from its losses (n,) by seed.

    Paired, and resampled over images and seeds; of few seeds it is too narrow, as any bootstrap of few.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(len(losses[0][OURS]), (count, len(losses[0][OURS])), generator=generator)
    seeds = torch.randint(len(losses), (count, len(losses)), generator=generator)

    def resampled(name: str) -> Tensor:
        by_seed = torch.stack([loss[name][images].mean(1) for loss in losses], 1)  # (count, seeds)
        return by_seed.gather(1, seeds).mean(1)

    ours, quantiles = resampled(OURS), torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: (resampled(name) / ours - 1).quantile(quantiles).tolist() for name in losses[0]}


def study(config: DictConfig, module: LightningModule, data: Images, sets: Sets, seed: int) -> tuple[dict, dict, dict]:
    """Of one seed: figures, method -> group -> name -> value; probabilities; losses, group -> method -> (n,)."""
    predictions, costs, detectors = fit_all(config, module, data, seed)
    probs, scores = predict_all(predictions, detectors, sets)
    corrupted = [key for key in sets if key != "test" and not key.startswith("foreign")]
    by_severity = [[key for key in corrupted if key.endswith(f"/{severity}")] for severity in SEVERITIES]
    taken = times(predictions | detectors, module, sets["test"][0][:64])
    rows: dict[str, dict] = {}
    for name, found in probs.items():
        entropies = {key: entropy(found[key]) for key in found if key not in corrupted or key.endswith(STRONGEST)}
        clean, *shifted = (figures_of(found, sets, keys) for keys in (["test"], *by_severity))
        rows[name] = {
            "test": clean,
            "corrupted": {figure: mean(row[figure] for row in shifted) for figure in clean},
            "foreign": detection(entropies),
            "cost": {"F": taken[name], **costs.get(name, {})},
            "ECE by severity": [row["ece"] for row in (clean, *shifted)],
        }
    rows |= {f"by {name}": {"foreign": detection(scores[name]), "cost": {"F": taken[name]}} for name in detectors}
    losses = {"test": losses_of(probs, sets, ["test"]), "corrupted": losses_of(probs, sets, corrupted)}
    return rows, probs, losses


def show(runs: list[dict], over_ours: dict[str, dict], console: Console, config: DictConfig) -> None:
    """Print a table for each group of figures: the mean over seeds, and the spread if there are several."""
    titles = {
        "test": f"{config.num_test:,} test images",
        "corrupted": f"{config.num_corrupted} test images under {len(config.corruptions or CORRUPTIONS)} corruptions, "
        "mean of 5 severities",
        "foreign": "Foreign images and the strongest corruptions, told by the entropy of probabilities or by a score",
        "cost": "Fit (s), memory of the fit (bytes), prediction (F)",
    }
    for group, title in titles.items():
        names: dict[str, None] = {name: None for row in runs[0].values() for name in row.get(group, {})}
        interval = ["NLL over ours"] if group in over_ours else []
        table = Table("", *(FIGURES.get(name) or name for name in names), *interval, title=title)
        for method, row in runs[0].items():
            if group not in row:
                continue
            cells = [cell([run[method][group][n] for run in runs]) if n in row[group] else "" for n in names]
            if interval:
                low, high = over_ours[group][method]
                cells.append("" if method == OURS else f"{low:+.1%} … {high:+.1%}")
            table.add_row(method, *cells)
        console.print(table)


def cell(values: list[float]) -> str:
    """The mean over seeds, and the standard deviation if there are several."""
    digits = "{:.4f}" if abs(values[0]) < 10 else "{:,.0f}"
    spread = f" ±{digits.format(stdev(values))}" if len(values) > 1 else ""
    return digits.format(mean(values)) + spread


def plots(rows: dict, probs: dict[str, dict[str, Tensor]], sets: Sets) -> dict[str, Figure]:
    """Reliability, calibration under shift, risk and coverage."""
    shown = {name: probs[name]["test"] for name in SHOWN if name in probs}
    return {
        "reliability": reliability_diagram(shown, sets["test"][1]),
        "shift": calibration_under_shift({name: rows[name]["ECE by severity"] for name in shown}),
        "risk_coverage": risk_coverage(shown, sets["test"][1]),
    }


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(config: DictConfig) -> None:
    """Fit, compare, print; write compare.json and three pictures, and log them to W&B."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    data: Images = instantiate(config.data)
    module = network(config, data, config.seed, kept(config, f"seed-{config.seed}") if config.members else None)
    data.setup("fit")
    sets = evaluation_sets(data, config)
    runs, losses, probs = [], [], {}
    for seed in config.seeds:
        rows, probs, lost = study(config, module, data, sets, seed)
        runs.append(rows)
        losses.append(lost)
    over_ours = {key: bootstrap([lost[key] for lost in losses], config.num_bootstraps) for key in losses[0]}
    show(runs, over_ours, Console(width=140), config)
    found = dict(zip(map(str, config.seeds), runs, strict=True)) | {"NLL over ours": over_ours}
    (folder / "compare.json").write_text(json.dumps(found, indent=2))
    for name, figure in plots(runs[-1], probs, sets).items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    logger = instantiate(config.logger) if config.logger else None
    if isinstance(logger, WandbLogger):
        for name in ("reliability", "shift", "risk_coverage"):
            logger.log_image(f"compare/{name}", [str(folder / f"{name}.png")])
        logger.log_metrics(
            {
                f"compare/{m}/{g}/{n}": v
                for m, row in runs[-1].items()
                for g in ("test", "corrupted", "foreign")
                for n, v in row.get(g, {}).items()
            }
        )
    print(f"Figures and compare.json are in {folder}")


if __name__ == "__main__":
    main()
