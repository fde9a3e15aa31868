"""What a run ends with: tables, report.json, figures, words; on disk and in every logger."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import wandb
from data import Images, Pictures, some
from features import cache, nll
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lightning_ella import ELLAPredictor, FastPredictor
from lightning_ella.metrics import FalsePositiveRate, classification_metrics
from lightning_ella.plots import (
    calibration_under_shift,
    confidence_histograms,
    eigenvalue_spectrum,
    image_grid,
    reliability_diagram,
    risk_coverage,
    tuning_curves,
)
from lightning_ella.posterior import SCALES

FIGURES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "adaptive_ece": "adaptive ECE", "brier": "Brier"}
FIGURES |= {"aurc": "AURC"}
RUN = ("config.yaml", "weights.safetensors", "ella.safetensors")  # what evaluate.py needs
STUDENT = "ella-fast.safetensors"  # and what it uses if it is there
SCORES = ("total", "epistemic", "novelty", "familiarity", "student novelty", "student familiarity")
LEVEL, RISK = 0.9, 0.05  # that prediction sets hold the class, and that answers are wrong
FALSE_ALARMS = 0.05  # share of familiar images whose familiarity is no more than this
WHO = ("MAP", "ELLA", "student")
SHOWN = 18  # of the most uncertain images
TUNING_POINTS = 500  # that the curves of the tuning are drawn from

Seen = dict[str, Tensor]  # "MAP", "ELLA" and, if there is one, "student" (n, C), "targets" and the uncertainties (n,)


def write_report(
    predictor: ELLAPredictor,
    data: Images,
    config: dict[str, Any],
    folder: Path,
    loggers: list[Logger],
    fit: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Evaluate on test, shifted and foreign images; print, write and log what comes out.

    Returns:
        what report.json has: "test", "severity <number>" -> "MAP" | "ELLA" | "student" -> metric -> value, "foreign",
        and more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"test": data.test, **data.shifted, **{f"foreign/{name}": part for name, part in data.foreign.items()}}
    seen = {name: predict(predictor, data.loader(dataset), name) for name, dataset in sets.items()}
    splits = {"test": ["test"]}
    for name in sorted(data.shifted, key=lambda name: name.rpartition("/")[2]):
        splits.setdefault(f"severity {name.rpartition('/')[2]}", []).append(name)
    results = {
        split: {who: classification_figures([seen[name] for name in names], who) for who in WHO if who in seen["test"]}
        for split, names in splits.items()
    }
    found = {name: detection(seen["test"], seen[name]) for name in seen if name.startswith("foreign/")}
    heads = {"ELLA": predictor, "student": predictor.fast}
    promised = {who: kept(head, seen["test"], who) for who, head in heads.items() if head and head.guaranteed}
    report = {**results, "foreign": found, "false alarms": false_alarms(seen["test"]), "guarantees": promised}
    report |= {"num_test": len(seen["test"]["targets"]), "fit": fit, "config": config}
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    plots = figures(predictor, data, seen["test"], results)
    uncertain = most_uncertain(seen["test"], data)
    plots["most_uncertain"] = image_grid(uncertain["images"], uncertain["captions"])
    for name, figure in plots.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    show(results, found, report["num_test"], Console())
    log(
        loggers,
        results,
        found | {f"test/{who.lower()}": values for who, values in promised.items()},
        folder,
        plots,
        uncertain,
    )
    return report


def predict(predictor: ELLAPredictor, loader: DataLoader, name: str) -> Seen:
    """Probabilities of the network ("MAP"), of the posterior ("ELLA") and of its student, uncertainties and targets."""
    parts = []
    device = next(predictor.model.parameters()).device
    with logging_redirect_tqdm([logging.getLogger("lightning_ella"), logging.getLogger()]):
        for images, targets in tqdm(loader, desc=f"ELLA on {name} images", unit="batch"):
            out = predictor(images.to(device))
            part = {"MAP": out.logits_mean.softmax(-1), "ELLA": out.probs, "total": out.entropy, "targets": targets}
            part["epistemic"] = out.mutual_information
            part |= foreignness(out)
            if predictor.fast is not None:
                fast = predictor.fast(images.to(device))
                part |= {"student": fast.probs} | {
                    f"student {name}": score for name, score in foreignness(fast).items()
                }
            parts.append(part)
    seen = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    return seen | {"MAP total": torch.special.entr(seen["MAP"]).sum(-1)}


def foreignness(out: Any) -> Seen:
    """What a prediction says of where its inputs are from, by name."""
    said = {"novelty": out.novelty, "familiarity": out.familiarity}
    return {name: score for name, score in said.items() if score is not None}


def classification_figures(parts: list[Seen], who: str) -> dict[str, float]:
    """Metrics of one predictive over some sets together: the few images of one would make any ECE large."""
    probs, targets = (torch.cat([part[name] for part in parts]) for name in (who, "targets"))
    metrics = classification_metrics(probs.shape[1], sync_on_compute=False)
    metrics.update(probs, targets)
    return {name: float(value) for name, value in metrics.compute().items()}


def detection(seen: Seen, foreign: Seen) -> dict[str, float]:
    """AUROC and FPR95 of foreign images against the test images, by each uncertainty that there is."""
    found = {}
    for score in ("MAP total", *SCORES):
        if score in seen:
            sign = -1 if score.endswith("familiarity") else 1  # the lower, the more foreign
            found |= {
                f"{what} {score}": value for what, value in told(sign * seen[score], sign * foreign[score]).items()
            }
    return found


def false_alarms(seen: Seen) -> dict[str, float]:
    """Share of the test images that look foreign, by each familiarity: `FALSE_ALARMS`, if it is what it says."""
    scores = [score for score in SCORES if score.endswith("familiarity") and score in seen]
    return {score: float((seen[score] <= FALSE_ALARMS).double().mean()) for score in scores}


def told(familiar: Tensor, foreign: Tensor) -> dict[str, float]:
    """How well a score (n,) tells foreign images from familiar ones: AUROC, and FPR95, the share of false alarms."""
    both = torch.cat([familiar, foreign])
    is_foreign = torch.arange(len(both)) >= len(familiar)
    false_positives = FalsePositiveRate(sync_on_compute=False)  # one process alone reports
    false_positives.update(both, is_foreign)
    # in [0, 1] by rank: torchmetrics would squash scores that leave it
    ranks = both.unique(return_inverse=True)[1] / len(both)
    return {"AUROC": float(binary_auroc(ranks, is_foreign.long())), "FPR95": float(false_positives.compute())}


def kept(head: ELLAPredictor | FastPredictor, seen: Seen, who: str) -> dict[str, float]:
    """What was promised of the test images, and what came of it."""
    probs, targets = seen[who], seen["targets"]
    sets = 1 - probs <= head.guaranteed.quantile(LEVEL).to(probs)  # type: ignore[union-attr]
    confidence, answer = probs.max(1)
    answered = confidence >= head.threshold(RISK)
    found = {
        "coverage": float(sets.gather(1, targets.unsqueeze(1)).double().mean()),
        "set size": float(sets.double().sum(1).mean()),
        "answered": float(answered.double().mean()),
    }
    wrong = (answer != targets)[answered].double()
    return found | ({"wrong answers": float(wrong.mean())} if len(wrong) else {})


def figures(predictor: ELLAPredictor, data: Images, seen: Seen, results: dict) -> dict[str, Figure]:
    """All plots, by name."""
    both = {who: seen[who] for who in WHO if who in seen}
    curves = tuning(predictor, data.loader(some(data.holdout, TUNING_POINTS, 0)))
    plots = {
        "reliability": reliability_diagram(both, seen["targets"]),
        "confidence": confidence_histograms(both, seen["targets"]),
        "risk_coverage": risk_coverage(both, seen["targets"]),
        "eigenvalues": eigenvalue_spectrum(predictor.eigenvalues),
        "tuning": tuning_curves(curves, {name: float(getattr(predictor, name)) for name in SCALES}),
    }
    if len(results) > 1:
        errors = {who: [row[who]["ece"] for row in results.values()] for who in both}
        severities = [split.removeprefix("severity ") for split in results]
        plots["shift"] = calibration_under_shift(errors, severities=["0", *severities[1:]])
    return plots


def tuning(predictor: ELLAPredictor, unseen: DataLoader) -> dict[str, tuple[Tensor, Tensor]]:
    """NLL on unseen points as one scale after the other changes: variances tenfold, the temperature twofold."""
    points, chosen, curves = cache(predictor, unseen, "held-out images"), predictor.posterior, {}
    for name in SCALES:
        scale = getattr(chosen, name)
        values = scale * torch.logspace(-1, 1, 9, 2 if name == "temperature" else 10).to(scale)
        losses = [nll(points, replace(chosen, **{name: value}), predictor.draws) for value in values]
        curves[name] = values, torch.tensor(losses)
    return curves


def most_uncertain(seen: Seen, data: Images) -> dict[str, Any]:
    """The test images with the highest entropy, what they are and what is said of them."""
    chosen = seen["total"].argsort(descending=True)[:SHOWN].tolist()
    images = data.pixels(torch.stack([data.test[i][0] for i in chosen]))
    name = lambda label: data.classes[int(label)]  # noqa: E731
    columns = ["image", "label", "prediction", "confidence", *(score for score in SCORES if score in seen)]
    rows, captions = [], []
    for i in chosen:
        confidence, predicted = seen["ELLA"][i].max(-1)
        uncertainties = [float(seen[score][i]) for score in columns[4:]]
        rows.append([name(seen["targets"][i]), name(predicted), float(confidence), *uncertainties])
        right = "" if predicted == seen["targets"][i] else f", is {rows[-1][0]}"
        total, epistemic, *_ = uncertainties
        captions.append(f"{rows[-1][1]} ({confidence:.0%}){right}\ntotal {total:.2f}, epist. {epistemic:.2f}")
    return {"images": images, "captions": captions, "columns": columns, "rows": rows}


def show(results: dict, foreign: dict, num_test: int, console: Console) -> None:
    """Print MAP beside ELLA and its student for every split, and how well foreign images are told."""
    table = Table("", "", *FIGURES.values(), title=f"{num_test:,} test images")
    for split, row in results.items():
        for who, values in row.items():
            table.add_row(split if who == "MAP" else "", who, *(f"{values[name]:.4f}" for name in FIGURES))
    console.print(table)
    scores = aurocs(foreign)
    columns = (name.removeprefix("AUROC ") for name in scores)
    table = Table("", *columns, title="AUROC against foreign images, by MAP's entropy and ELLA's uncertainties")
    for name, values in foreign.items():
        table.add_row(name.removeprefix("foreign/"), *(f"{values[score]:.4f}" for score in scores))
    console.print(table)


def aurocs(foreign: dict[str, dict[str, float]]) -> list[str]:
    """The names of the scores that tell foreign images, as they are in every set's figures."""
    return [name for name in next(iter(foreign.values())) if name.startswith("AUROC")]


def advice(data: Images, run: Path) -> str:
    """What to do next; `run` is the folder with weights and posterior."""
    options = " [data.root=…] [data.shifted=…]" if isinstance(data, Pictures) else ""
    return (
        "Next: look at reliability.png and most_uncertain.png there; and again, or on other data:\n"
        f"  python recipes/evaluate.py run={run}{options}"
    )


def words(report: dict[str, Any], folder: Path) -> str:
    """What changed, in plain words."""
    before, after = report["test"]["MAP"], report["test"]["ELLA"]
    gain = 1 - after["nll"] / before["nll"] if before["nll"] else -1.0  # right on every image, and sure of it
    how = f"by {abs(gain):.1%}" if before["nll"] else f"from 0 to {after['nll']:.4f}"
    lines = [
        f"The network is right on {before['accuracy']:.1%} of the test images; with ELLA on {after['accuracy']:.1%}.",
        f"Its confidence was off by {100 * before['ece']:.1f} points on average (ECE), and now is by "
        f"{100 * after['ece']:.1f}. The NLL {'fell' if gain > 0 else 'rose'} {how}.",
    ]
    if gain < 0.005:
        lines.append("That is no gain: the network was calibrated already, or the held-out images are too few to tell.")
    worst = {score: min(values[score] for values in report["foreign"].values()) for score in aurocs(report["foreign"])}
    best = max(worst, key=lambda score: worst[score])
    how = {"MAP total": "the entropy of the network alone", "total": "entropy", "epistemic": "mutual information"}
    name = best.removeprefix("AUROC ")
    lines.append(f"Foreign images are told best by {how.get(name, name)}: AUROC {worst[best]:.3f} or more.")
    if (alarms := report["false alarms"].get("familiarity")) is not None:
        lines.append(f"Of the test images, {alarms:.1%} have a familiarity of {FALSE_ALARMS} or less.")
    if promised := report["guarantees"].get("ELLA"):
        lines += [
            f"Sets that hold the class in {LEVEL:.0%} of cases did so in {promised['coverage']:.1%}, with "
            f"{promised['set size']:.2f} classes on average.",
            f"Where no more than {RISK:.0%} of the answers may be wrong, {promised['answered']:.0%} of the images are "
            f"answered" + (f", and {promised['wrong answers']:.1%} of these wrongly." if promised["answered"] else "."),
        ]
    lines.append(f"Figures and report.json are in {folder}")
    return "\n".join(lines)


def log(
    loggers: list[Logger],
    results: dict,
    more: dict[str, dict[str, float]],
    folder: Path,
    plots: dict[str, Figure],
    uncertain: dict,
) -> None:
    """Send the figures to every logger, the plots to those that take pictures."""
    flat = {
        f"{split.replace(' ', '/')}/{who.lower()}/{name}": value
        for split, row in results.items()
        for who, values in row.items()
        for name, value in values.items()
    }
    flat |= {f"{name}/{what}": value for name, values in more.items() for what, value in values.items()}
    flat = {name.replace(" ", "_"): value for name, value in flat.items()}
    for logger in loggers:
        logger.log_metrics(flat)
        logger.save()  # CSV's writes nothing before
        if isinstance(logger, WandbLogger):
            for name in plots:
                logger.log_image(f"test/{name}", [str(folder / f"{name}.png")])
            log_uncertain(logger, uncertain)
        elif isinstance(logger, TensorBoardLogger):
            for name, figure in plots.items():
                logger.experiment.add_figure(f"test/{name}", figure)


def log_uncertain(logger: WandbLogger, uncertain: dict) -> None:
    """The most uncertain images as a table that can be sorted."""
    images = [wandb.Image(image.movedim(0, -1).squeeze(-1).numpy()) for image in uncertain["images"]]
    rows = [[image, *row] for image, row in zip(images, uncertain["rows"], strict=True)]
    logger.log_table("test/most_uncertain_images", uncertain["columns"], rows)


def save_run(predictor: ELLAPredictor, config: dict[str, Any], folder: Path, loggers: list[Logger]) -> None:
    """Keep what evaluate.py needs: configuration and weights, beside the posterior; in W&B as an artefact."""
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    save_model(predictor.model.network, str(folder / "weights.safetensors"))  # type: ignore[arg-type]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            artefact = wandb.Artifact(f"posterior-{logger.version}", "posterior", metadata={"rank": predictor.rank})
            for file in (folder / name for name in (*RUN, STUDENT)):
                if file.exists():
                    artefact.add_file(str(file))
            logger.experiment.log_artifact(artefact)
