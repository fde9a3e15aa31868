"""What each shortcut of the fit costs in NLL on test images, and the paper's protocol beside it.

    python recipes/shortcuts.py data.root=<folder> model.checkpoint=<file> [data.split=<npz>]

One fit gives the basis. Features of 40,000 training points are computed once; from them come the paper's protocol (its
prior variance; stop where the NLL on unseen images, looked at after every 1,000 points, is lowest) and the curvature of
fewer points with both scales tuned. The other rows are fits of their own with the scales of the first, and say how
far the variances of the logits are from that one's.
"""

import json
from pathlib import Path
from typing import Any

import hydra
import torch
from build import build
from data import some
from features import LIKELIHOOD, cache, nll
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lightning_ella import ELLAPredictor, fit_ella
from lightning_ella.observations import Observations
from lightning_ella.posterior import Posterior, calibrate

PAPER_PRIOR_VARIANCE = 0.04
FEWER = (250, 500, 1000, 2000, 5000, 10_000, 20_000)


def paper(
    curvatures: dict[int, Tensor], total: int, unseen: Observations, test: Observations, draws: Tensor
) -> tuple[float, int]:
    """NLL on the test images, and where the paper's protocol stops.

    After n points its posterior covariance is (Σ_n + n I / (N σ₀²))⁻¹: that of the mean curvature, times N / n.
    """

    def after(n: int) -> Posterior:
        scale = torch.tensor(total / n, dtype=torch.float64)
        one = torch.ones_like(scale)
        return Posterior(curvatures[n] * total / n, PAPER_PRIOR_VARIANCE * one, scale, one, one)

    best = min(curvatures, key=lambda n: nll(unseen, after(n), draws))
    return nll(test, after(best), draws), best


def row(predictor: ELLAPredictor, dataset: Dataset, reference: Tensor | None) -> dict[str, Any]:
    """NLL of a predictor on the test images, and how far its variances are from the reference's."""
    outs = [(predictor(images), targets) for images, targets in tqdm(DataLoader(dataset, 128), desc="test images")]
    losses = torch.cat([LIKELIHOOD.nll(out, targets) for out, targets in outs])
    found: dict[str, Any] = {"nll": float(losses.mean()), "variance": torch.cat([o.logits_variance for o, _ in outs])}
    if reference is not None:
        error = (found["variance"] / reference - 1).abs().flatten()
        found |= {"median": float(error.median()), "p99": float(error.quantile(0.99))}
    return found


@hydra.main(version_base="1.3", config_path="../conf", config_name="shortcuts")
def main(config: DictConfig) -> None:
    """Fit, compare, print, and write shortcuts.json."""
    seed_everything(config.seed, verbose=False)
    module, data = build(config)
    data.setup("fit")
    train, unseen, test = data.ella_train_dataloader(), data.holdout, some(data.test, config.num_test, config.seed)
    common = {"num_landmarks": config.num_landmarks, "rank": config.rank, "seed": config.seed}
    common |= {"residual": "none", "temperature": 1.0}  # what is compared is what the span gives
    base = fit_ella(module, train, data.val_dataloader(), num_calibration=config.num_calibration, **common)
    rows = {"default": row(base, test, None)}
    reference = rows["default"].pop("variance")
    given = {name: float(getattr(base, name)) for name in ("prior_variance", "covariance_scale")}
    variants = {
        "gradients streamed": {"memory_budget": config.memory_budget},
        "basis in bf16": {"basis_precision": "bf16"},
        "features in bf16": {"precision": "bf16"},
        "curvature from sampled labels": {"curvature": "sampled"},
    }
    for name, options in variants.items():
        rows[name] = row(fit_ella(module, train, **common, **given, **options), test, reference)
        rows[name].pop("variance")

    visited = cache(
        base, DataLoader(some(train.dataset, config.num_curvature, config.seed + 1), 128), "training points"
    )
    held = cache(base, DataLoader(some(unseen, config.num_calibration, config.seed), 128), "unseen points")
    tested = cache(base, DataLoader(test, 128), "test images")
    stops = torch.arange(len(visited.logits)).split(config.stop_every)
    sums = [LIKELIHOOD.curvature(visited.logits[i].double(), visited.features[i].double()) for i in stops]
    curvatures = {int(i[-1]) + 1: torch.stack(sums[: k + 1]).sum(0) for k, i in enumerate(stops)}
    total = len(train.dataset)  # type: ignore[arg-type]
    loss, stop = paper(curvatures, total, held, tested, base.draws)
    rows[f"the paper's protocol (stops at {stop:,})"] = {"nll": loss}
    for n in (*(n for n in FEWER if n < len(visited.logits)), len(visited.logits)):
        part = visited.rows(slice(n))
        mean = LIKELIHOOD.curvature(part.logits.double(), part.features.double()) / len(part.logits)
        chosen = calibrate(
            held, mean * total, LIKELIHOOD, predictive="mc", draws=base.draws, given={"temperature": 1.0}
        )
        rows[f"curvature from {n:,} points, tuned"] = {"nll": nll(tested, chosen, base.draws)}
    certain = Observations(tested.logits, torch.zeros_like(tested.features), tested.targets)
    rows["MAP"] = {"nll": nll(certain, base.posterior, base.draws[:1])}
    show(rows, config.num_test)
    (Path(HydraConfig.get().runtime.output_dir) / "shortcuts.json").write_text(json.dumps(rows, indent=2))


def show(rows: dict[str, dict[str, float]], num_test: int) -> None:
    """Print the table."""
    table = Table("", "NLL", "variance off by (median)", "(99th percentile)", title=f"{num_test:,} test images")
    for name, found in rows.items():
        errors = (f"{found[key]:.2%}" if key in found else "" for key in ("median", "p99"))
        table.add_row(name, f"{found['nll']:.4f}", *errors)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
