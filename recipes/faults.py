"""What becomes of a fit on several processes when one of them fails: each stage, each process, an error or a SIGKILL.

    python recipes/faults.py [pattern]   # prints the table in docs/distributed.md; about five minutes

A pattern of stage/process/fault, such as 'the curvature/*/kill', makes it the rows of these. It starts itself as a
user's training script in real processes (CPU and gloo) and lets one of them fail.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ella import ELLACallback
from lightning_ella.distributed import World

STAGES = (
    "a look before training",
    "the choice of weights",
    "the choice of data",
    "a look at network and data",
    "the choice of landmarks",
    "the landmarks' gradients",
    "the eigendecomposition",
    "the combination of the gradients",
    "the curvature",
    "a look at the calibration points",
    "the calibration points",
    "the calibration",
    "the figures",
    "the predictor",
    "writing the posterior and its figures",
)
INJECTED = "this error was injected"
LIMIT = 600  # seconds for a process to end: a busy machine needs a part of them, a wait for a lost process needs 1,800


class Blobs(LightningModule):
    """A small network that tests and predicts with its head."""

    def __init__(self, batchnorm: bool = False):
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(2, 8)
        self.norm = nn.BatchNorm1d(8) if batchnorm else nn.Identity()
        self.last = nn.Linear(8, 3)

    def setup(self, stage: str) -> None:
        # Lightning ends the process group of NCCL alone: gloo's threads may abort an interpreter that shuts down.
        if torch.distributed.is_initialized():
            atexit.unregister(torch.distributed.destroy_process_group)  # of an earlier stage
            atexit.register(torch.distributed.destroy_process_group)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_nll", nn.functional.nll_loss(vars(self)["ella"](x).probs.log(), y), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return vars(self)["ella"](batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    @staticmethod
    def points(count: int, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, (count,), generator=generator)
        x = torch.randn(count, 2, generator=generator) + labels.unsqueeze(1)
        return DataLoader(TensorDataset(x, labels), batch_size=7)

    def train_dataloader(self) -> DataLoader:
        return self.points(101, 0)

    def val_dataloader(self) -> DataLoader:
        return self.points(53, 1)

    def test_dataloader(self) -> DataLoader:
        return self.points(24, 2)

    predict_dataloader = test_dataloader


def worker(folder: Path, options: dict[str, str]) -> None:
    """Train, fit, test and predict in this process, and write found.json."""
    warnings.simplefilter("ignore")
    if "fault" in options:
        let_fail(*options["fault"].split("/"))
    seed_everything(0, verbose=False)
    ella = ELLACallback(
        num_landmarks=31,
        rank=4,
        num_curvature=41,
        num_calibration=19,
        memory_budget=2**30,
        on_error=options.get("on_error", "warn"),  # type: ignore[arg-type]
        resume="ckpt" in options,
        path=folder / "ella.safetensors",
    )
    trainer = Trainer(
        max_epochs=int(options.get("epochs", 0)),
        accelerator="cpu",
        devices=int(options.get("devices", 1)),
        strategy=options.get("strategy", "auto"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ella, ModelCheckpoint(folder, save_last=True)],
    )
    module = Blobs.load_from_checkpoint(options["ckpt"]) if "ckpt" in options else Blobs("batchnorm" in options)
    trainer.fit(module)
    print("fit has ended", flush=True)
    predictor = None
    with suppress(RuntimeError):  # which says why there is none
        predictor = ella.predictor
    found: dict[str, Any] = {"weights": module.first.weight.tolist(), "fitted": predictor is not None}
    if predictor is not None:
        found |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        found["eigenvalues"] = predictor.eigenvalues.tolist()
        found["probs"] = predictor(torch.ones(1, 2)).probs.tolist()
        found["test_nll"] = trainer.test(module, verbose=False)[0]["test_nll"]
        found["predicted"] = sum(len(out) for out in trainer.predict(module) or ())  # type: ignore[arg-type]
    if trainer.is_global_zero:
        (folder / "found.json").write_text(json.dumps(found))


def let_fail(stage: str, rank: str, kind: str) -> None:
    """Make the process of this rank fail when it begins a stage."""
    original = World.together

    @contextmanager
    def together(self: World, what: str):
        with original(self, what):
            if what == stage and self.rank == int(rank) and self.size > 1:  # each process looks ahead by itself
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError(INJECTED)
            yield

    World.together = together  # type: ignore[method-assign]


class Outcome(NamedTuple):
    """How a process ended."""

    code: int
    output: str


def launch(folder: Path, processes: int, **options: Any) -> list[Outcome]:
    """Start `processes` workers as a cluster does, without anything that ends them all when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options |= {"devices": processes}
    command = [sys.executable, __file__, "worker", str(folder), *(f"{key}={value}" for key, value in options.items())]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            command,
            env={**common, "WORLD_SIZE": str(processes), "NODE_RANK": "0", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [Outcome(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def describe(outcomes: list[Outcome], rank: int, folder: Path) -> tuple[str, str]:
    """What the other process said, and what is left on disk."""
    other = outcomes[1 - rank]
    said = next((line for line in reversed(other.output.splitlines()) if "RuntimeError: " in line), "")
    shown = {
        "last.ckpt": "checkpoint",
        "ella.safetensors.basis.stage": "basis",
        "ella.safetensors.curvature.stage": "curvature",
    }
    shown |= {"ella.safetensors": "posterior"}
    left = [what for name, what in shown.items() if (folder / name).exists()]
    ended = "fit ended" if "fit has ended" in other.output else f"exit code {other.code}"
    return escape(f"{ended}; {said.partition('RuntimeError: ')[2][:70]}…"), ", ".join(left)


def main(pattern: str = "*") -> None:
    """Try every fault, or those whose stage/process/fault is of the pattern, and print the table."""
    table = Table("stage", "process", "fault", "s", "the other process", "on disk", title="One of two processes fails")
    for stage, rank, kind in product(STAGES, (0, 1), ("raise", "kill")):
        if not fnmatch(fault := f"{stage}/{rank}/{kind}", pattern):
            continue
        with tempfile.TemporaryDirectory() as name:
            started = time.monotonic()
            outcomes = launch(Path(name), 2, epochs=1, fault=fault)
            seconds = f"{time.monotonic() - started:.0f}"
            table.add_row(stage, str(rank), kind, seconds, *describe(outcomes, rank, Path(name)))
    Console(width=200).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]), dict(argument.split("=", 1) for argument in sys.argv[3:]))
    else:
        main(*sys.argv[1:])
