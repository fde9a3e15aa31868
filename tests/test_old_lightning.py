"""The same Trainer of two packages: `lightning` and `pytorch_lightning`."""

import importlib
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from conftest import ListDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ella import ELLACallback, ELLAPredictor
from lightning_ella.trainers import is_a

pytestmark = [  # Lightning's advice to users, which these users ignore
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`"),
]

PACKAGES = {package.__name__: package for package in (lightning.pytorch, pytorch_lightning)}
SMALL: dict[str, Any] = {"num_landmarks": 30, "rank": 3, "num_curvature": 30, "on_error": "raise"}


def points(count: int, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return DataLoader(ListDataset([(torch.randn(2, generator=generator) + y, y) for y in labels]), 16)


class Steps:
    """An ordinary user's module, of either package."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch, batch_idx):
        return self.ella(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Validated(Steps):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


class Noisy(Validated):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + torch.randn_like(x) if self.trainer.training else x), y


class OldNet(Validated, pytorch_lightning.LightningModule):
    pass


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> ModuleType:
    return PACKAGES[request.param]


def module(pl: ModuleType, kind: type) -> Any:
    return type("Net", (kind, pl.LightningModule), {})()


def trainer(pl: ModuleType, folder: Path, *callbacks: Any, **settings: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **settings})


def test_both_packages_give_the_same_posterior(tmp_path: Path):
    found = []
    for name, pl in PACKAGES.items():
        pl.seed_everything(0, verbose=False)
        net, ella = module(pl, Noisy), ELLACallback(**SMALL)
        running = trainer(pl, tmp_path / name, ella)
        running.fit(net, points(100, 0), points(50, 1))
        assert "ella/nll" in running.callback_metrics
        inside = torch.cat([out.probs for out in running.predict(net, points(20, 2))])
        x = torch.stack([x for x, _ in points(20, 2).dataset])
        torch.testing.assert_close(inside, ella.predictor(x).probs)
        assert net.ella is ella.predictor
        assert (tmp_path / name / "checkpoints" / "ella.safetensors").exists()
        found.append([inside, ella.predictor.curvature, *net.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Steps, Validated])
@pytest.mark.parametrize("datamodule", [False, True])
def test_without_validation_data_there_is_no_calibration(
    pl: ModuleType, kind: type, datamodule: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train_only = type("Data", (pl.LightningDataModule,), {"train_dataloader": lambda self: points(100, 0)})
    ella = ELLACallback(**SMALL)
    with caplog.at_level(logging.INFO, "lightning_ella"):
        trainer(pl, tmp_path, ella).fit(module(pl, kind), train_only() if datamodule else points(100, 0))
    assert "calibrating on nothing" in caplog.text
    assert ella.predictor is not None


def test_validation_data_count_without_a_validation_step(
    pl: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    net = module(pl, Steps)
    net.val_dataloader = lambda: points(50, 1)
    with caplog.at_level(logging.INFO, "lightning_ella"):
        trainer(pl, tmp_path, ELLACallback(**SMALL)).fit(net, points(100, 0))
        trainer(pl, tmp_path, ELLACallback(**SMALL)).fit(module(pl, Steps), points(100, 0), points(40, 1))
    assert "chosen on 50 unseen points" in caplog.text
    assert "chosen on 40 unseen points" in caplog.text


def test_an_error_of_the_users_loader_is_told(pl: ModuleType, tmp_path: Path):
    def broken() -> Any:
        raise ZeroDivisionError("the file is empty")

    net = module(pl, Validated)
    net.val_dataloader = broken
    running = trainer(pl, tmp_path, ELLACallback(**SMALL), limit_val_batches=0, max_epochs=0)
    with pytest.raises(ZeroDivisionError, match="the file is empty"):
        running.fit(net, points(100, 0))


def test_the_best_weights_are_those_of_the_packages_own_checkpoint(pl: ModuleType, tmp_path: Path):
    checkpoint = importlib.import_module(f"{pl.__name__}.callbacks").ModelCheckpoint
    with pytest.raises(ValueError, match="weights='best' needs to know what is best"):
        trainer(pl, tmp_path, ELLACallback(weights="best", **SMALL)).fit(module(pl, Validated), points(100, 0))
    ella = ELLACallback(weights="best", **SMALL)
    net, running = module(pl, Validated), trainer(pl, tmp_path, ella, best := checkpoint(monitor="val_loss"))
    running.fit(net, points(100, 0), points(50, 1))
    state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    torch.testing.assert_close(ella.predictor.model.state_dict(), state)


def test_a_spawned_process_leaves_the_predictor_to_its_parent(tmp_path: Path):
    ella = ELLACallback(unpack=tuple, **SMALL)
    running = trainer(pytorch_lightning, tmp_path, ella, strategy="ddp_spawn", devices=1, max_epochs=0)
    running.fit(fitted := OldNet(), points(60, 0), points(30, 1))  # test_several_processes.py has the other package
    file = tmp_path / "checkpoints" / "ella.safetensors"
    x = torch.ones(1, 2)
    assert ella.predictor(x).probs.equal(ELLAPredictor.load(file, fitted)(x).probs)
    assert fitted.ella is ella.predictor


def test_the_rich_bar_is_the_packages_own(
    pl: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr("lightning_ella.trainers.Tqdm")
    bar = importlib.import_module(f"{pl.__name__}.callbacks").RichProgressBar(leave=True)
    running = trainer(pl, tmp_path, ELLACallback(**SMALL), bar, enable_progress_bar=True)
    running.fit(module(pl, Validated), points(100, 0), points(50, 1))
    printed = capsys.readouterr().out
    assert "ELLA landmarks" in printed
    assert "30/30" in printed


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_parameters_are_refused(pl: ModuleType, name: str, tmp_path: Path):
    strategy = getattr(importlib.import_module(f"{pl.__name__}.strategies"), name)
    mine = type("Mine", (strategy,), {})
    running = SimpleNamespace(strategy=object.__new__(mine), callbacks=[], state=SimpleNamespace(), world_size=2)
    with pytest.raises(ValueError, match="Mine shards them: fit ELLA afterwards from the checkpoint"):
        ELLACallback(**SMALL).setup(running, module(pl, Steps), "fit")


def test_a_class_of_the_same_name_is_another_class():
    assert is_a(type("Mine", (pytorch_lightning.Trainer,), {}), "Trainer")
    assert not is_a(type("Trainer", (), {}), "Trainer")
    assert not is_a(pytorch_lightning.Trainer, "Callback")
