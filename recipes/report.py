"""What a run ends with: the table MAP beside ELLA, report.json, and the figures, on disk and in W&B."""

import json
from pathlib import Path
from typing import Any

import torch
from data import Images
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_ella import ELLAPredictor
from lightning_ella.metrics import classification_metrics
from lightning_ella.plots import eigenvalue_spectrum, reliability_diagram

COLUMNS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "auroc_total": "AUROC total",
    "auroc_epistemic": "AUROC epistemic",
    "auroc_novelty": "AUROC novelty",
}


def write_report(
    predictor: ELLAPredictor, data: Images, trainer: Trainer, config: dict[str, Any], folder: Path
) -> dict:
    """Evaluate on the test and the foreign images; print, write and log what comes out."""
    seen = predict(predictor, data.test_dataloader(), "test images")
    foreign = predict(predictor, data.foreign_dataloader(), "foreign images")
    results = {name: figures(name, seen, foreign) for name in ("MAP", "ELLA")}
    plots = {
        "reliability": reliability_diagram({"MAP": seen["MAP"], "ELLA": seen["ELLA"]}, seen["targets"]),
        "eigenvalues": eigenvalue_spectrum(predictor.eigenvalues),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in plots.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    calibration = {name: float(value) for name, value in trainer.callback_metrics.items()}
    report = {"test": results, "num_test": len(seen["targets"]), "fit": calibration, "config": config}
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    show(results, len(seen["targets"]), folder)
    log(trainer, results, folder, list(plots))
    return report


def predict(predictor: ELLAPredictor, loader: DataLoader, description: str) -> dict[str, Tensor]:
    """Probabilities of the network ("MAP") and of the posterior ("ELLA"), uncertainties and targets of a loader."""
    parts = []
    device = next(predictor.model.parameters()).device
    for images, targets in tqdm(loader, desc=f"ELLA on {description}"):
        prediction = predictor(images.to(device))
        parts.append(
            {
                "MAP": prediction.logits_mean.softmax(-1),
                "ELLA": prediction.probs,
                "total": prediction.entropy,
                "epistemic": prediction.mutual_information,
                "targets": targets,
            }
            | ({} if prediction.novelty is None else {"novelty": prediction.novelty})
        )
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def figures(name: str, seen: dict[str, Tensor], foreign: dict[str, Tensor]) -> dict[str, float | None]:
    """Figures of one predictive; the network alone has no epistemic uncertainty."""
    metrics = classification_metrics(seen[name].shape[1], sync_on_compute=False)
    metrics.update(seen[name], seen["targets"])
    is_foreign = [0] * len(seen[name]) + [1] * len(foreign[name])

    def auroc(scores: str) -> float:
        return float(roc_auc_score(is_foreign, torch.cat([seen[scores], foreign[scores]])))

    seen["MAP total"], foreign["MAP total"] = (torch.special.entr(part["MAP"]).sum(-1) for part in (seen, foreign))
    return {
        **{metric: float(value) for metric, value in metrics.compute().items()},
        "auroc_total": auroc("MAP total" if name == "MAP" else "total"),
        "auroc_epistemic": None if name == "MAP" else auroc("epistemic"),
        "auroc_novelty": auroc("novelty") if name == "ELLA" and "novelty" in seen else None,
    }


def show(results: dict[str, dict[str, float | None]], num_test: int, folder: Path) -> None:
    """Print the table and where the rest is."""
    table = Table("", *COLUMNS.values(), title=f"{num_test:,} test images; AUROC against foreign images")
    for name, row in results.items():
        table.add_row(name, *("" if row[c] is None else f"{row[c]:.4f}" for c in COLUMNS))
    console = Console()
    console.print(table)
    console.print(f"Figures and report.json are in {folder}", soft_wrap=True)


def log(trainer: Trainer, results: dict[str, dict[str, float | None]], folder: Path, plots: list[str]) -> None:
    """Send the figures to every logger, the plots to W&B."""
    flat = {
        f"test/{name.lower()}/{metric}": value
        for name, row in results.items()
        for metric, value in row.items()
        if value is not None
    }
    for logger in trainer.loggers:
        logger.log_metrics(flat, step=trainer.global_step)
        if isinstance(logger, WandbLogger):
            for name in plots:
                logger.log_image(f"test/{name}", [str(folder / f"{name}.png")])
