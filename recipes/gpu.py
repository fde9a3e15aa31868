"""What ELLA costs on a GPU: features, a fit by its stages and predictions, with few outputs and with many.

    python recipes/gpu.py                                                    # on a GPU
    python recipes/gpu.py device=cpu measured=[tiny] num_outputs=[3] matmul=[highest] samples=4 few=20 unseen=20

Times are medians of warm rounds by the GPU's events, F is one forward pass of the same batch. A fit is measured with
few points, and its stages are scaled to 1,000 landmarks, 1,000 points of curvature and 1,000 unseen ones.
"""

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import torch
from benchmark import Bench, build, launches_of, machine, memory_at_most, memory_now, paper_features, seconds
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lightning_ella import ELLAPredictor, fit_ella
from lightning_ella.engine import Linearization
from lightning_ella.likelihoods import Classification
from lightning_ella.linearize import as_function
from lightning_ella.numerics import spread_normal
from lightning_ella.observations import Observations
from lightning_ella.posterior import calibrate
from lightning_ella.residual import num_probes

LANDMARKS, CURVATURE, UNSEEN = 1000, 1000, 1000  # of the fit that times are scaled to


def of_products(config: DictConfig, bench: Bench) -> dict[str, Any]:
    """Times of features and gradients, samples a chunk, launches and bytes."""
    device, images = bench.images.device, bench.images[: config.samples]
    with as_function():
        linearization = Linearization(bench.model)
        outputs = torch.zeros(len(images), dtype=torch.long)

        def timed(run: Callable[[], Any], samples: int = len(images)) -> float:
            run()
            return 1e3 * median(seconds(run, device) for _ in range(config.rounds)) / samples

        F = timed(lambda: bench.model(images))
        found = {"F, ms": F}
        few = min(len(images), 16)
        found["paper, F"] = min(timed(paper_features(bench, b).run, b) for b in (few, len(images))) / F
        for name, options in {"features, F": {}, "bf16, F": {"precision": "bf16"}}.items():
            ours = Linearization(bench.model, **options)
            found[name] = timed(lambda ours=ours: ours.features(images, bench.basis)) / F
        found["gradients, F"] = timed(lambda: [None for _ in linearization.gradients(images, outputs)]) / F
        before = memory_now(device)
        linearization.features(images, bench.basis)
        found["peak, of the budget"] = (memory_at_most(device) - before) / linearization.memory_budget
        engine = linearization._engine(images, bench.basis)
        found["samples a chunk"] = linearization._samples_for_features(images, engine, bench.basis)
        found |= of_kernels(lambda: linearization.features(images, bench.basis), device, len(images))
        last = bench.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ours, there = Linearization(last), images.to(memory_format=torch.channels_last)
        found["channels_last, F"] = timed(lambda: ours.features(there, bench.basis)) / F
        bench.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return found


def of_kernels(run: Callable[[], Any], device: torch.device, samples: int) -> dict[str, float]:
    """Launches a sample, and the share of the time in which a kernel runs."""
    launches = launches_of(run, device)
    busy = sum(event.time_range.elapsed_us() for event in launches) / 1e6
    return {"launches a sample": len(launches) / samples, "busy": busy / seconds(run, device)}


def of_a_fit(config: DictConfig, bench: Bench) -> dict[str, Any]:
    """Seconds of the stages of a fit, of the search for scales, of loading, and ms of predictions."""
    device = bench.images.device
    images = bench.images[: config.samples]
    C = bench.model(images[:1]).shape[1]

    def loader(count: int) -> DataLoader:
        again = torch.arange(count) % len(images)
        return DataLoader(TensorDataset(images[again].cpu(), torch.arange(count) % C), min(128, count))

    ends = Ends()
    logging.getLogger("lightning_ella").addHandler(ends)
    sizes = {"num_landmarks": config.few, "num_curvature": config.few, "rank": config.rank, "curvature": "sampled"}
    try:
        predictor = fit_ella(bench.model, loader(config.few), loader(config.unseen), **sizes, landmarks="uniform")
    finally:
        logging.getLogger("lightning_ella").removeHandler(ends)
    few = {"landmarks": LANDMARKS / config.few, "curvature": CURVATURE / config.few}
    scaled = few | {"calibration": UNSEEN / config.unseen}
    found = {f"{stage}, s": ends.seconds[stage] * by for stage, by in scaled.items()}
    for K in (20, 100):
        found[f"scales, K = {K}, s"] = seconds(lambda K=K: search(K, C, config.tuned, device), device)
    with tempfile.TemporaryDirectory() as folder:
        file = predictor.save(Path(folder) / "ella")
        found["load and first, s"] = seconds(lambda: ELLAPredictor.load(file, bench.model)(images[:1]).probs, device)
    for B in (1, 64):
        predictor(images[:B])
        taken = [seconds(lambda B=B: predictor(images[:B]).probs, device) for _ in range(config.rounds)]
        found[f"prediction of {B}, ms"] = 1e3 * median(taken)
    return found


class Ends(logging.Handler):
    """Hears how long the stages of a fit took."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take them from the line that says it."""
        self.seconds: dict[str, float] = getattr(record, "seconds", None) or vars(self).get("seconds", {})


def search(K: int, C: int, count: int, device: torch.device) -> None:
    """Choose the scales on so many unseen points."""
    generator = torch.Generator().manual_seed(0)
    columns = K + num_probes("auto", K, reverse=C <= K)
    logits, features = torch.randn(count, C, generator=generator), torch.randn(count, C, columns, generator=generator)
    points = Observations(logits.to(device), features.to(device), logits.argmax(-1).roll(1).to(device))
    curvature = torch.randn(K, K, generator=generator).double()
    curvature = (curvature @ curvature.T + torch.eye(K)).to(device)
    draws = spread_normal(256, columns, 0).to(device)
    calibrate(points, curvature, Classification(), predictive="mc", draws=draws, given={})


@hydra.main(version_base="1.3", config_path="../conf", config_name="gpu")
def main(config: DictConfig) -> None:
    """Measure, print, and write gpu.json."""
    rows: list[dict[str, Any]] = []
    for network in config.measured:
        for num_outputs in config.num_outputs:
            for matmul in config.matmul:
                torch.set_float32_matmul_precision(matmul)
                own = OmegaConf.merge(config, {"network": network, "num_outputs": num_outputs, "matmul": matmul})
                bench = build(own)  # type: ignore[arg-type]
                found = {"network": network, "C": num_outputs, "matmul": matmul} | of_products(config, bench)
                if matmul == config.matmul[0]:
                    found |= of_a_fit(config, bench)
                rows.append(found)
                Console().print(f"{network}, C = {num_outputs}, {matmul}: features {found['features, F']:.1f} F")
                del bench
    where = machine(torch.device(config.device))
    table = Table("", *(f"{row['network']}, C = {row['C']}, {row['matmul']}" for row in rows), title=where)
    for name in [name for name in rows[0] if name not in ("network", "C", "matmul")]:
        table.add_row(name, *("" if name not in row else f"{row[name]:.3g}" for row in rows))
    Console(width=200).print(table)
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "gpu.json").write_text(json.dumps({"machine": where, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
