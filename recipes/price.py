"""The ladder: what each way to know how sure a network is costs, in forward passes, and what it is worth.

python recipes/price.py                                  # digits and a small ResNet, trained first
python recipes/price.py experiment=cifar10_resnet20 trainer.max_epochs=0 data.root=<folder> model.checkpoint=<file>

F is one forward pass of the network as it is, in eval mode. A price is the median of ratios: the rung and the network
take turns, so that a busy machine slows both.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import hydra
import torch
from adapt import posterior_options
from compare import SEVERITIES, Sets, evaluation_sets, first, network
from data import Images, some
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from report import classification_figures, told
from rich.console import Console
from rich.table import Table
from rivals import Task, temperature_scaling
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_ella import FastPredictor, fit_ella
from lightning_ella.predictions import entropy

try:
    import onnxruntime
except ImportError:  # of the extra "export"
    onnxruntime: Any = None

BATCHES = (64, 1)  # images that a price is measured with
BATCH = 100  # images that are asked about at a time
DIGITS = {"F": 1, "ms": 1, "fit": 1, "s": 1, "epochs": 2}  # of these columns; of all others four

Answer = tuple[Tensor, Tensor]  # probabilities (B, C), and how foreign the images look, (B,)


@dataclass(frozen=True)
class Rung:
    """A way to predict, and what it took to get there."""

    ask: Callable[[Tensor], Answer]
    seconds: float  # of fitting


def answering(probabilities: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Answer]:
    """Probabilities and their entropy."""

    def ask(images: Tensor) -> Answer:
        probs = probabilities(images)
        return probs, entropy(probs)

    return ask


def network_alone(model: nn.Module) -> Callable[[Tensor], Answer]:
    """The softmax and its entropy."""
    return answering(lambda images: model(images).softmax(-1))


def with_familiarity(predictor: Any) -> Callable[[Tensor], Answer]:
    """A prediction's probabilities of all classes, and how unfamiliar the images look."""

    def ask(images: Tensor) -> Answer:
        out = predictor(images)
        if out.indices is None:
            return out.probs, -out.familiarity
        others = predictor.model(images) / predictor.temperature.float()  # among themselves, as the network has them
        others = others.scatter(-1, out.indices, -torch.inf).softmax(-1) * out.probs[:, -1:]
        return others.scatter(-1, out.indices, out.probs[:, :-1]), -out.familiarity

    return ask


def by_onnxruntime(fast: FastPredictor, path: Path, example: Tensor) -> Callable[[Tensor], Answer]:
    """The student with its network as an exported program, which needs no PyTorch."""
    session = onnxruntime.InferenceSession(fast.export(path, example), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def ask(images: Tensor) -> Answer:
        probs, familiarity = session.run(["probs", "familiarity"], {name: images.cpu().numpy()})
        return torch.from_numpy(probs), -torch.from_numpy(familiarity)

    return ask


def rungs(config: DictConfig, model: nn.Module, data: Images, folder: Path) -> dict[str, Rung]:
    """From the cheapest to the dearest."""
    held_out = DataLoader(some(data.holdout, config.num_calibration, config.seed), BATCH)
    found = {"network": Rung(network_alone(model), 0.0)}
    task = Task(model, data.ella_train_dataloader(), held_out, config.seed)
    started = time.perf_counter()
    scaled = temperature_scaling(task)
    found["temperature scaling"] = Rung(answering(scaled), time.perf_counter() - started)
    options = posterior_options(config)
    layers = [name for name, layer in model.named_modules() if name and [*layer.parameters(recurse=False)]]
    third = layers[-max(1, len(layers) // 3) :]
    parts: dict[str, dict[str, Any]] = {
        f"last layer, {layers[-1]}": {"parameters": [f"{layers[-1]}.*"]},
        "last third of the layers": {"parameters": [f"{name}.*" for name in third]},
        "exact, 2 likeliest outputs": {"top_outputs": 2},
        "exact": {},
    }
    views = config.views if data.views else []
    for some_views in views:
        started = time.perf_counter()
        scaled = temperature_scaling(task, some_views)
        found[f"temperature scaling, {1 + len(some_views)} views"] = Rung(
            answering(scaled), time.perf_counter() - started
        )
    for name, more in parts.items():
        started = time.perf_counter()
        predictor = fit_ella(model, data.ella_train_dataloader(), held_out, **options | more)
        seconds = time.perf_counter() - started
        if name == "exact":
            fast = predictor.distil(held_out)
            seconds_taught = fast.figures["seconds"] + seconds
            found["student"] = Rung(with_familiarity(fast), seconds_taught)
            if onnxruntime is not None:
                example = first(data.holdout, 2, config.seed)[0].to(config.device)
                found["student, by onnxruntime"] = Rung(
                    by_onnxruntime(fast, folder / "student.onnx", example), seconds_taught
                )
        found[name] = Rung(with_familiarity(predictor), seconds)
    for some_views in views:
        started = time.perf_counter()
        predictor = fit_ella(model, data.ella_train_dataloader(), held_out, **options, views=some_views)
        fast = predictor.distil(held_out)
        found[f"student, {1 + len(some_views)} views"] = Rung(with_familiarity(fast), time.perf_counter() - started)
    return found


def price(rung: Rung, model: nn.Module, images: Tensor, repeats: int) -> tuple[float, float]:
    """In forward passes, the median of ratios of times taken in turns; and in milliseconds."""
    times = [(timed(model, images), timed(rung.ask, images)) for _ in range(repeats + 1)][1:]
    return median(other / one for one, other in times), 1000 * median(other for _, other in times)


def timed(ask: Callable[[Tensor], Any], images: Tensor) -> float:
    started = time.perf_counter()
    ask(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def worth(rung: Rung, sets: Sets, bar: tqdm) -> dict[str, float]:
    """NLL and ECE of test images and of corrupted ones, and the AUROC of test images against each set of others.

    Of the corrupted ones it is that of the strongest, the mean over the corruptions.
    """
    said = {}
    for name, (images, targets) in sets.items():
        probs, scores = (torch.cat(part) for part in zip(*map(rung.ask, images.split(BATCH)), strict=True))
        said[name] = {"probs": probs.float().cpu(), "targets": targets.cpu(), "score": scores.cpu()}
        bar.update()
    corrupted = [part for name, part in said.items() if name != "test" and not name.startswith("foreign/")]
    figures = {}
    for what, parts in (("", [said["test"]]), (", corrupted", corrupted)):
        if parts:
            known = classification_figures(parts, "probs")
            figures |= {f"{title}{what}": known[name] for name, title in (("nll", "NLL"), ("ece", "ECE"))}
    auroc = {name: told(said["test"]["score"], part["score"])["AUROC"] for name, part in said.items()}
    figures |= {f"AUROC {n.removeprefix('foreign/')}": each for n, each in auroc.items() if n.startswith("foreign/")}
    if strongest := [each for name, each in auroc.items() if name.endswith(f"/{max(SEVERITIES)}")]:
        figures["AUROC, strongest corruptions"] = mean(strongest)
    return figures


def cells(figures: dict[str, float], columns: list[str]) -> list[str]:
    """Numbers of a row, with as many digits as they are worth."""
    digits = {column: DIGITS.get(column.split(",")[0], 4) for column in columns}
    return [f"{figures[column]:.{digits[column]}f}" if column in figures else "" for column in columns]


def show(rows: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Print rows of figures as a table, and write it as Markdown."""
    columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
    table = Table("", *columns, title=title)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in rows.items():
        known = cells(figures, columns)
        table.add_row(name, *known)
        lines.append(f"| {name} | " + " | ".join(known) + " |")
    Console(width=200).print(table)
    path.write_text("\n".join([*lines, ""]))


@hydra.main(version_base="1.3", config_path="../conf", config_name="price")
def main(config: DictConfig) -> None:
    """Fit, measure and print; write price.json and price.md."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    data: Images = instantiate(config.data)
    module = network(config, data, config.seed)
    module.trainer = None
    model = module.to(config.device)
    data.setup("fit")
    ladder = rungs(config, model, data, folder)
    data.setup("test")
    sets = {name: (x.to(config.device), y) for name, (x, y) in evaluation_sets(data, config).items()}
    images, found = first(data.test, max(BATCHES), config.seed)[0].to(config.device), {}
    with torch.no_grad(), tqdm(total=len(ladder) * len(sets), unit="set") as bar:
        for name, rung in ladder.items():
            bar.set_description(name)
            prices = [price(rung, model, images[:size], config.repeats) for size in BATCHES]
            costs = {f"F, batch {size}": ratio for size, (ratio, _) in zip(BATCHES, prices, strict=True)}
            costs |= {f"ms, batch {size}": each for size, (_, each) in zip(BATCHES, prices, strict=True)}
            found[name] = costs | {"fit, s": rung.seconds} | worth(rung, sets, bar)
    show(found, "The ladder: price in forward passes, and what it buys", folder / "price.md")
    (folder / "price.json").write_text(json.dumps(found, indent=2))
    print(f"price.json is in {folder}")


if __name__ == "__main__":
    main()
