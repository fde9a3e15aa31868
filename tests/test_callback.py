"""The callback inside a Trainer: where it gets its data and weights, what it leaves, what it refuses."""

import copy
import io
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import ListDataset
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_ella import ELLACallback, ELLAPredictor, fit_ella
from lightning_ella.pickling import LeftOut

pytestmark = [  # Lightning's advice to users, which these users ignore
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`"),
]

SMALL: dict[str, Any] = {"num_landmarks": 30, "rank": 4, "num_curvature": 40}


def blobs(count: int, seed: int) -> ListDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return ListDataset([(torch.randn(2, generator=generator) + y, y) for y in labels])


class Net(pl.LightningModule):
    """An ordinary user's module."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_entropy", self.ella(batch[0]).entropy.mean())

    def predict_step(self, batch, batch_idx):
        return self.ella(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(blobs(100, 0), batch_size=16, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(blobs(50, 1), batch_size=16)

    def test_dataloader(self):
        return DataLoader(blobs(20, 2), batch_size=16)

    predict_dataloader = test_dataloader


def make_trainer(tmp_path: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**defaults, **kwargs})


def probabilities(module: pl.LightningModule, x: Tensor) -> Tensor:
    return module.ella(x).probs


def broken(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("broken")


def killed(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


class Fault(pl.Callback):
    """After training, a part of the fit fails: the look before it has seen nothing."""

    def __init__(self, part: str = "curvature", fault: Any = broken):
        self.part, self.fault = f"lightning_ella.fit.{part}", fault
        self.patch = pytest.MonkeyPatch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.patch.setattr(self.part, self.fault)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.patch.undo()

    on_exception = teardown


def test_after_fit_the_module_is_a_bayesian_predictor(tmp_path: Path):
    pl.seed_everything(0, verbose=False)
    module, ella = Net(), ELLACallback(likelihood="classification", **SMALL)
    trainer = make_trainer(tmp_path, ella)
    trainer.fit(module, Data())
    out = ella.predictor(torch.randn(5, 2))
    assert out.probs.shape == (5, 3)
    assert module.ella is ella.predictor
    expected = fit_ella(module, Data().train_dataloader(), Data().val_dataloader(), **SMALL)
    torch.testing.assert_close(ella.predictor.curvature, expected.curvature, rtol=0, atol=0)
    torch.testing.assert_close(ella.predictor.prior_variance, expected.prior_variance, rtol=0, atol=0)
    artefact = Path(trainer.checkpoint_callback.dirpath) / "ella.safetensors"
    assert ELLAPredictor.load(artefact, module)(torch.ones(1, 2)).probs.equal(module.ella(torch.ones(1, 2)).probs)


def test_training_and_module_are_as_without_the_callback(tmp_path: Path):
    class Drawing(Data):
        def ella_train_dataloader(self):
            torch.rand(3)  # as random_split does: the callback must not pass it on to training
            return super().train_dataloader()

    def train(*callbacks: pl.Callback) -> Net:
        pl.seed_everything(0, verbose=False)
        module = Net()
        module.body[1].eval()  # a module that the user froze
        module.body[0].weight.requires_grad_(False)
        make_trainer(tmp_path, *callbacks).fit(module, Drawing())
        module.after = torch.rand(1)  # the global random state is the same, too
        return module

    plain, module = train(), train(ELLACallback(**SMALL))
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [m.training for m in module.modules()] == [m.training for m in plain.modules()]
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in plain.parameters()]
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or mine.grad.equal(theirs.grad)
    assert module.device == plain.device
    assert module.after.equal(plain.after)
    assert "body.0.weight" not in module.ella.basis
    plain.load_state_dict(module.state_dict(), strict=True)


def test_figures_reach_callback_metrics_and_every_logger(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, ELLACallback(**SMALL), logger=[logger, CSVLogger(tmp_path, "second")])
    trainer.fit(Net(), Data())
    metrics = ("accuracy", "nll", "ece", "adaptive_ece", "brier", "aurc")
    names = {f"{who}/{what}" for who in ("map", "ella") for what in metrics}
    names |= {"ella/prior_variance", "ella/covariance_scale", "ella/seconds", "ella/eigenvalue_00"}
    assert names <= set(trainer.callback_metrics)
    for each in trainer.loggers:
        assert "ella/nll" in Path(each.log_dir, "metrics.csv").read_text()
    assert (Path(logger.log_dir) / "checkpoints" / "ella.safetensors").exists()


def test_a_trained_checkpoint_needs_no_training(tmp_path: Path):
    trainer = make_trainer(tmp_path)
    module = Net()
    trainer.fit(module, Data())
    path = trainer.checkpoint_callback.best_model_path
    again, ella = Net.load_from_checkpoint(path), ELLACallback(**SMALL)
    make_trainer(tmp_path, ella, max_epochs=0).fit(again, Data())
    torch.testing.assert_close(again.state_dict(), module.state_dict())
    assert ella.predictor(torch.ones(1, 2)).logits_mean.equal(module.eval()(torch.ones(1, 2)))


def test_early_stopping_ends_with_a_posterior(tmp_path: Path):
    ella = ELLACallback(**SMALL)
    stop = EarlyStopping("val_loss", patience=0, stopping_threshold=1e9)
    trainer = make_trainer(tmp_path, stop, ella, max_epochs=50)
    trainer.fit(Net(), Data())
    assert trainer.current_epoch < 50
    assert ella.predictor is not None


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1)])
def test_averaged_weights_are_the_ones_used(tmp_path: Path, averaging):
    module, ella = Net(), ELLACallback(**SMALL)
    make_trainer(tmp_path, ella, averaging(), max_epochs=4).fit(module, Data())
    x = torch.randn(6, 2)
    assert ella.predictor(x).logits_mean.equal(module.eval()(x))


def test_best_weights_live_in_a_copy(tmp_path: Path):
    class Worsening(Net):
        def on_train_end(self):
            nn.init.zeros_(self.body[4].weight)

    module, ella = Worsening(), ELLACallback(weights="best", **SMALL)
    trainer = make_trainer(tmp_path, ella, ModelCheckpoint(monitor="val_loss"), max_epochs=3)
    trainer.fit(module, Data())
    x = torch.randn(6, 2)
    assert module.body[4].weight.eq(0).all()
    best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    torch.testing.assert_close(ella.predictor.model.state_dict(), best)
    assert not module.ella(x).logits_mean.equal(module.eval()(x))
    assert trainer.predict(module, Data())[0].probs.shape == (16, 3)


def test_predict_and_test_work_through_the_users_own_steps(tmp_path: Path):
    module = Net()
    trainer = make_trainer(tmp_path, ELLACallback(**SMALL))
    trainer.fit(module, Data())
    outputs = trainer.predict(module, Data())
    x = torch.stack([x for x, _ in blobs(20, 2)])
    inside = torch.cat([out.probs for out in outputs])
    torch.testing.assert_close(inside, module.ella(x).probs)
    assert torch.cat([out.logits_variance for out in outputs]).min() > 0  # no tangent was lost
    figures = trainer.test(module, Data(), verbose=False)[0]
    assert figures["test_entropy"] == pytest.approx(module.ella(x).entropy.mean().item(), rel=1e-4)


def test_a_refit_replaces_the_posterior(tmp_path: Path):
    module, ella = Net(), ELLACallback(**SMALL)
    make_trainer(tmp_path, ella).fit(module, Data())
    first = module.ella
    make_trainer(tmp_path, ella).fit(module, Data())
    assert module.ella is ella.predictor is not first


def train_data(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: Any, module: Net | None = None, **kwargs) -> str:
    with caplog.at_level(logging.INFO, "lightning_ella"):
        make_trainer(tmp_path, ELLACallback(**SMALL, **kwargs), max_epochs=1).fit(module or Net(), data)
    return caplog.text


class Augmented(Data):
    def train_dataloader(self):
        class Noisy(ListDataset):
            def __getitem__(self, index: int):
                x, y = super().__getitem__(index)
                return x + torch.randn(2), y

        return DataLoader(Noisy(blobs(100, 0).items), batch_size=16)


class Clean(Augmented):
    def ella_train_dataloader(self):
        return DataLoader(blobs(100, 0), batch_size=16)

    def ella_calibration_dataloader(self):
        return DataLoader(blobs(25, 4), batch_size=16)


def test_augmentation_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    text = train_data(tmp_path, caplog, Augmented())
    assert "fitting on the training data (with their augmentation, if any), calibrating on the validation data" in text
    assert "look different each time" in text


def test_a_clean_loader_of_the_datamodule_is_preferred(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    text = train_data(tmp_path, caplog, Clean())
    assert "fitting on the data of Clean.ella_train_dataloader(), calibrating on the data of Clean.ella_calib" in text
    assert "look different each time" not in text
    assert "chosen on 25 unseen points" in text


def test_a_clean_loader_argument_comes_first(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    text = train_data(tmp_path, caplog, Clean(), train_loader=Data().train_dataloader())
    assert "fitting on the data of train_loader" in text


def test_hooks_of_the_module_apply_without_their_augmentation(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Normalising(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x + torch.randn_like(x) if self.trainer.training else x) * 100, y

    module = Normalising()
    assert "look different" not in train_data(tmp_path, caplog, Data(), module)
    scaled = [(x * 100, y) for x, y in blobs(100, 0)]
    expected = fit_ella(module, DataLoader(scaled, batch_size=16), **SMALL, prior_variance=1.0, covariance_scale=1.0)
    torch.testing.assert_close(module.ella.curvature, expected.curvature)


def test_loaders_without_a_datamodule_and_without_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "lightning_ella"):
        trainer = make_trainer(tmp_path, ELLACallback(**SMALL, prior_variance=0.1), limit_val_batches=0)
        trainer.fit(Net(), Data().train_dataloader())
    assert "calibrating on nothing" in caplog.text
    assert "no validation data, so nothing is tuned: prior_variance=0.1, covariance_scale=1" in caplog.text
    assert trainer.callback_metrics["ella/prior_variance"] == pytest.approx(0.1)


def test_other_batches_pass_through_unpack(tmp_path: Path):
    class Dicts(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    loader = DataLoader([{"x": x, "y": y} for x, y in blobs(100, 0)], batch_size=16)
    ella = ELLACallback(**SMALL, unpack=lambda batch: (batch["x"], batch["y"]))
    make_trainer(tmp_path, ella, limit_val_batches=0).fit(Dicts(), loader)
    assert ella.predictor(torch.ones(1, 2)).probs.shape == (1, 3)


def test_layers_may_be_built_in_setup(tmp_path: Path):
    class Late(Net):
        def __init__(self):
            super().__init__()
            del self.body

        def setup(self, stage: str):
            self.body = nn.Sequential(nn.Linear(2, 8), nn.ReLU())

        def configure_model(self):
            if len(self.body) == 2:
                self.body.append(nn.Linear(8, 3))

    ella = ELLACallback(**SMALL)
    make_trainer(tmp_path, ella).fit(Late(), Data())
    assert ella.predictor is not None


def test_mixed_precision_predicts_as_without_a_trainer(tmp_path: Path):
    module = Net()
    trainer = make_trainer(tmp_path, ELLACallback(**SMALL), precision="bf16-mixed")
    trainer.fit(module, Data())
    outputs = trainer.predict(module, Data())
    x = torch.stack([x for x, _ in blobs(20, 2)])
    torch.testing.assert_close(torch.cat([out.probs for out in outputs]), module.ella(x).probs)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_a_validation_loader_counts_without_a_validation_step(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    module = Net()
    module.__class__ = type("NoValidation", (Net,), {"validation_step": pl.LightningModule.validation_step})
    assert "chosen on 50 unseen points" in train_data(tmp_path, caplog, Data(), module)


def test_a_guarded_use_during_validation_survives_a_refit(tmp_path: Path):
    class Guarded(Net):
        ella = None

        def validation_step(self, batch, batch_idx):
            if self.ella is not None:
                self.log("entropy", self.ella(batch[0]).entropy.mean())

    module, ella = Guarded(), ELLACallback(**SMALL)
    for _ in range(2):
        make_trainer(tmp_path, ella).fit(module, Data())
    assert module.ella is ella.predictor


@pytest.mark.parametrize("many", [list, tuple, lambda loaders: dict(enumerate(loaders))])
def test_the_first_of_several_validation_loaders_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, many):
    class Several(Data):
        def val_dataloader(self):
            return many([super().val_dataloader(), self.test_dataloader()])

    class Indifferent(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    text = train_data(tmp_path, caplog, Several(), Indifferent())
    assert "the first of 2 validation loaders" in text
    assert "chosen on 50 unseen points" in text


def test_double_precision_and_a_fast_dev_run(tmp_path: Path):
    ella = ELLACallback()
    make_trainer(tmp_path, ella, precision="64-true", fast_dev_run=True).fit(Net(), Data())
    assert ella.predictor.rank <= 2
    assert next(iter(ella.predictor.basis.values())).dtype == torch.float64
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("bar", [True, "rich"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_progress_is_drawn_by_the_trainers_own_bar(tmp_path: Path, capsys: pytest.CaptureFixture, bar, epochs: int):
    callbacks = [RichProgressBar(leave=True)] if bar == "rich" else []
    trainer = make_trainer(tmp_path, ELLACallback(**SMALL), *callbacks, max_epochs=epochs, enable_progress_bar=True)
    trainer.fit(Net(), Data())
    printed = capsys.readouterr().out
    for stage, total in (("landmarks", 30), ("curvature", 40), ("calibration", 50)):
        assert f"ELLA {stage}" in printed
        assert f"{total}/{total}" in printed


class Stream(IterableDataset):
    def __iter__(self):
        return iter(blobs(64, 0).items)


def wide_output(module: Net) -> None:
    module.body.append(nn.Unflatten(1, (3, 1)))
    module.training_step = lambda batch, batch_idx: module(batch[0]).sum()


def out_of_range(module: Net) -> None:
    module.body[4] = nn.Linear(8, 2)
    module.training_step = lambda batch, batch_idx: module(batch[0]).sum()


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"num_landmarks": 101}, None, "num_landmarks=101, but there are only 100 training points"),
        ({}, wide_output, "likelihood='classification' needs at least two outputs, but the network has one"),
        ({}, out_of_range, r"labels must lie in \[0, 2\)"),
        ({"weights": "best"}, None, "weights='best' needs to know what is best"),
        ({"calibration_loader": DataLoader([(torch.zeros(2), 7)])}, None, r"labels must lie in \[0, 3\)"),
        ({"path": None}, lambda module: module.requires_grad_(False), "requires_grad=True"),
        ({}, lambda module: setattr(module, "ella", nn.Linear(1, 1)), "NoTraining has an attribute `ella` of its own"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, settings: dict, change, message: str):
    class NoTraining(Net):
        def on_train_batch_start(self, batch, batch_idx):
            raise AssertionError("training has begun")

    module = NoTraining()
    if change:
        change(module)
    trainer = make_trainer(tmp_path, ELLACallback(**{**SMALL, **settings}), num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, Data())


def test_frozen_modules_and_many_loaders_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="requires_grad=True"):
        make_trainer(tmp_path, ELLACallback(**SMALL)).fit(Net().requires_grad_(False), Data())
    loaders = [Data().train_dataloader(), Data().train_dataloader()]
    module = Net()
    module.training_step = lambda batch, batch_idx: module(batch[0][0]).sum()
    with pytest.raises(TypeError, match="the trainer has a list of 2: pass train_loader= to ELLACallback"):
        make_trainer(tmp_path, ELLACallback(**SMALL)).fit(module, loaders)


class Wrapped:
    """A loader around a loader, as libraries have them."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", ["a stream", "a loader around a loader"])
def test_loaders_that_only_give_batches_are_followed(tmp_path: Path, kind: str, fast: bool):
    train = DataLoader(Stream(), batch_size=16) if kind == "a stream" else Wrapped(Data().train_dataloader())
    ella = ELLACallback(**SMALL)
    make_trainer(tmp_path, ella, fast_dev_run=fast).fit(Net(), train, Wrapped(Data().val_dataloader()))
    assert ella.predictor(torch.ones(1, 2)).probs.shape == (1, 3)
    assert ella.predictor.rank == (2 if fast else 4)


def test_weights_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="weights='newest' is not one of 'last', 'best'"):
        ELLACallback(weights="newest")


class _WithStrategy:
    """A trainer that says it has another strategy."""

    def __init__(self, trainer: pl.Trainer, strategy: Any):
        self._trainer, self.strategy = trainer, strategy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def test_sharded_parameters_are_refused(tmp_path: Path):
    trainer = _WithStrategy(make_trainer(tmp_path), FSDPStrategy())
    with pytest.raises(ValueError, match="FSDPStrategy shards them"):
        ELLACallback().setup(trainer, Net(), "fit")


class Diverging(Net):
    """Its weights are lost after the last checkpoint."""

    def on_train_end(self):
        self.body[4].weight.data.fill_(torch.nan)


def test_an_error_at_the_end_costs_neither_weights_nor_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    module, ella = Diverging(), ELLACallback(**SMALL)
    trainer = make_trainer(tmp_path, ella)
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        trainer.fit(module, Data())
    assert "outputs are NaN or infinite" in caplog.text
    assert "the trained network is as it would be without ELLA" in caplog.text
    assert "Traceback" in caplog.text
    for ask in (lambda: ella.predictor, lambda: module.ella(torch.ones(1, 2)), lambda: module.ella.features(0)):
        with pytest.raises(RuntimeError, match=r"could not be fitted: .* NaN or infinite.* with max_epochs=0"):
            ask()
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    torch.testing.assert_close(module.body[0].weight, saved["body.0.weight"])
    assert saved["body.4.weight"].isfinite().all()
    assert module.training


def test_an_error_at_the_end_is_raised_on_demand(tmp_path: Path):
    with pytest.raises(ValueError, match="outputs are NaN or infinite"):
        make_trainer(tmp_path, ELLACallback(on_error="raise", **SMALL)).fit(Diverging(), Data())
    with pytest.raises(ValueError, match="on_error='ignore' is not one of 'warn', 'raise'"):
        ELLACallback(on_error="ignore")


class Throwing(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if "ella/nll" in metrics:
            raise ConnectionError("the server does not answer")
        super().log_metrics(metrics, step)


def test_a_logger_that_throws_costs_only_its_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    module, ella = Net(), ELLACallback(**SMALL)
    trainer = make_trainer(tmp_path, ella, logger=[Throwing(tmp_path), CSVLogger(tmp_path, "second")])
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        trainer.fit(module, Data())
    assert "the posterior is in memory, but something failed" in caplog.text
    assert "ConnectionError: the server does not answer" in caplog.text
    assert module.ella(torch.ones(1, 2)).probs.shape == (1, 3)
    assert "ella/nll" in trainer.callback_metrics
    assert "ella/nll" in (Path(trainer.loggers[1].log_dir) / "metrics.csv").read_text()
    assert (Path(trainer.checkpoint_callback.dirpath) / "ella.safetensors").exists()


@pytest.mark.parametrize("where", ["a file", "a full disk"])
def test_a_file_that_cannot_be_written_costs_only_itself(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "here"
    if where == "a file":
        folder.write_text("not a folder")  # as read-only as a folder can be for root
    else:
        monkeypatch.setattr("lightning_ella.artefact.save_file", no_room)
    module, ella = Net(), ELLACallback(path=folder / "ella.safetensors", **SMALL)
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        make_trainer(tmp_path, ella).fit(module, Data())
    assert "the posterior is in memory, but something failed" in caplog.text
    assert "this fit cannot be resumed" in caplog.text
    assert ella.predictor(torch.ones(1, 2)).probs.shape == (1, 3)
    assert list(folder.parent.glob("here/*")) == []


def no_room(*args: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("how", ["the checkpoint's weights", "ckpt_path"])
def test_a_fit_goes_on_where_it_was_cut_short(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture):
    checkpoint = ModelCheckpoint(save_last=True)
    trained = make_trainer(tmp_path, checkpoint, first := ELLACallback(**SMALL), logger=CSVLogger(tmp_path))
    trained.fit(module := Net(), Data())
    assert not list(tmp_path.rglob("*.stage"))  # nothing is left of a fit that ended well

    def again(ella: ELLACallback, **kwargs: Any) -> None:
        """As a user who comes back the next day: a new version of the logger, no path given."""
        kwargs |= {"logger": CSVLogger(tmp_path)}
        if how == "ckpt_path":
            make_trainer(tmp_path, ella, **kwargs).fit(Net(), Data(), ckpt_path=checkpoint.last_model_path)
        else:
            copied = Net()
            copied.load_state_dict(module.state_dict())
            make_trainer(tmp_path, ella, max_epochs=0, **kwargs).fit(copied, Data())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ella.fit._calibrated", killed)
        with pytest.raises(SystemExit):
            again(ELLACallback(resume=True, **SMALL))
    assert len(list(tmp_path.rglob("*.stage"))) == 2
    second = ELLACallback(resume=True, **SMALL)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, "lightning_ella"):
        patch.setattr("lightning_ella.fit.nystrom_basis", killed)
        patch.setattr("lightning_ella.fit.curvature", killed)
        again(second)
    assert "ELLA: basis read from" in caplog.text
    assert "ELLA: curvature read from" in caplog.text
    x = torch.randn(5, 2)
    torch.testing.assert_close(second.predictor(x).probs, first.predictor(x).probs, rtol=0, atol=0)
    assert not list(tmp_path.rglob("*.stage"))


def test_stages_of_another_fit_are_not_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "ella.safetensors"
    module = Net()
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, Fault("_calibrated", killed), ELLACallback(path=path, **SMALL)).fit(module, Data())
    kept = {path: path.read_bytes() for path in tmp_path.glob("ella.safetensors.*.stage")}
    assert len(kept) == 2

    def refit(changes: dict[str, Any]) -> ELLACallback:
        for left, content in kept.items():
            left.write_bytes(content)
        other = ELLACallback(path=path, resume=True, **{**SMALL, **changes})
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning_ella"):
            make_trainer(tmp_path, other, max_epochs=0).fit(module, Data())
        return other

    assert refit({}).predictor.rank == 4
    assert "basis read from" in caplog.text
    assert refit({"rank": 3}).predictor.rank == 3
    assert "it is of other weights, settings or data" in caplog.text
    module.body[0].requires_grad_(False)
    assert "body.0.weight" not in refit({}).predictor.basis
    assert "it is of other weights, settings or data" in caplog.text


def test_a_fit_that_fails_leaves_no_older_posterior(tmp_path: Path):
    module, ella = Net(), ELLACallback(**SMALL)
    assert ella.predictor is None
    make_trainer(tmp_path, ella).fit(module, Data())
    assert ella.predictor is not None
    make_trainer(tmp_path, Fault(), ella, max_epochs=1).fit(module, Data())
    with pytest.raises(RuntimeError, match="the posterior could not be fitted: broken"):
        _ = ella.predictor
    assert not module.ella
    make_trainer(tmp_path, ella, max_epochs=0).fit(module, Data())
    assert module.ella is ella.predictor is not None


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_where_nothing_was_trained_an_error_is_raised(tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning_ella.fit.curvature", broken)
    ella = ELLACallback(on_error="warn", **SMALL)
    with pytest.raises(RuntimeError, match="broken") as raised:
        make_trainer(tmp_path, ella, **{limit: 0}).fit(Net(), Data())
    assert "ella.safetensors.basis.stage: go on from there with resume=True" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="the posterior could not be fitted: broken"):
        _ = ella.predictor
    with pytest.raises(ValueError, match="the trainer has no data for ELLA's train_loader"):
        make_trainer(tmp_path, ELLACallback(**SMALL), limit_train_batches=0).fit(Net(), Data())


def test_stages_that_are_left_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = make_trainer(tmp_path, Fault("_calibrated"), ELLACallback(**SMALL))
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        trainer.fit(Net(), Data())
    folder = Path(trainer.checkpoint_callback.dirpath)
    left = [str(folder / f"ella.safetensors.{stage}.stage") for stage in ("basis", "curvature")]
    assert f"What was done is kept in {left[0]}, {left[1]}: go on from there with resume=True" in caplog.text


class Locked(Net):
    """It cannot be pickled, nor taken apart by `copy.deepcopy`."""

    def __init__(self):
        super().__init__()
        self.lock, self.last_loss = threading.Lock(), None

    def training_step(self, batch, batch_idx):
        self.last_loss = super().training_step(batch, batch_idx)
        return self.last_loss


def test_the_best_weights_of_a_module_that_cannot_be_pickled(tmp_path: Path):
    module, ella = Locked(), ELLACallback(weights="best", on_error="raise", **SMALL)
    trainer = make_trainer(tmp_path, ella, ModelCheckpoint(monitor="val_loss"), max_epochs=2)
    trainer.fit(module, Data())
    best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    torch.testing.assert_close(ella.predictor.model.state_dict(), best)
    assert ella.predictor.model.lock is module.lock
    assert not {p.data_ptr() for p in ella.predictor.model.parameters()} & {p.data_ptr() for p in module.parameters()}


def test_copies_that_a_library_fits_tell_the_callback_of_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.body[0], self.body[1] = nn.Linear(2, 9), nn.BatchNorm1d(9)
            self.body[4] = nn.Linear(9, 3)

    ella = ELLACallback(**SMALL, unpack=lambda batch: batch)
    owners = [copy.deepcopy({"module": module, "callbacks": [ella]}) for module in (Net(), Wider())]
    assert ella.predictor is None
    with caplog.at_level(logging.INFO, "lightning_ella"):
        for owner in owners:
            trainer = make_trainer(tmp_path, *owner["callbacks"], max_epochs=1, enable_checkpointing=False)
            trainer.fit(owner["module"], Data())
        assert ella.predictor is owners[1]["module"].ella is owners[1]["callbacks"][0].predictor
    assert ella.predictor is not None
    assert caplog.text.count("its predictor is that of the Wider that a copy of it was trained with last") == 1
    first, second = (owner["module"] for owner in owners)
    assert f"{tmp_path / 'ella.safetensors'} belongs to another network, so this posterior goes to" in caplog.text
    x = torch.ones(1, 2)
    assert ELLAPredictor.load(tmp_path / "ella.safetensors", first)(x).probs.equal(first.ella(x).probs)
    assert ELLAPredictor.load(tmp_path / "ella-2.safetensors", second)(x).probs.equal(second.ella(x).probs)
    again = make_trainer(tmp_path, owners[1]["callbacks"][0], max_epochs=0, enable_checkpointing=False)
    again.fit(second, Data())  # the same network's posterior is replaced, where it is
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["ella-2.safetensors", "ella.safetensors"]
    third = copy.deepcopy(ella)
    make_trainer(tmp_path, Fault(), third, max_epochs=1, enable_checkpointing=False).fit(Net(), Data())
    with pytest.raises(RuntimeError, match="the posterior could not be fitted: broken"):
        _ = ella.predictor


@pytest.mark.parametrize("content", [b"not a posterior", b""])
def test_a_foreign_file_at_a_place_that_nobody_chose_is_kept(tmp_path: Path, content: bytes):
    (tmp_path / "ella.safetensors").write_bytes(content)
    make_trainer(tmp_path, ELLACallback(**SMALL), max_epochs=0, enable_checkpointing=False).fit(Net(), Data())
    assert (tmp_path / "ella.safetensors").read_bytes() == content
    assert (tmp_path / "ella-2.safetensors").exists()


def pair(batch: Any) -> Any:
    return batch


def collated(samples: Any) -> Any:
    return torch.utils.data.default_collate(samples)


FUNCTIONS: list[tuple[str, Any]] = [
    ("unpack", lambda batch: batch),
    ("forward", lambda model, x: model(x)),
    ("parameters", lambda name, parameter: True),
    ("train_loader", DataLoader(blobs(100, 0), 16, collate_fn=lambda samples: collated(samples))),
    ("calibration_loader", DataLoader(blobs(50, 1), 16, collate_fn=lambda samples: collated(samples))),
]


@pytest.mark.parametrize(("name", "value"), FUNCTIONS, ids=[name for name, _ in FUNCTIONS])
def test_functions_that_cannot_be_pickled_are_missed_only_where_they_are_needed(tmp_path: Path, name: str, value: Any):
    ella = ELLACallback(**SMALL, **{name: value})
    file = io.BytesIO()
    torch.save([ella], file)
    file.seek(0)
    restored = [pickle.loads(pickle.dumps(ella)), *torch.load(file, weights_only=False)]
    for each in restored:
        with pytest.raises(ValueError, match=f"{name}= was left out of the pickle .* pass a function of a module"):
            make_trainer(tmp_path, each, max_epochs=0).fit(Net(), Data())
    setattr(restored[0], name, value)
    for each in (ella, copy.copy(ella), copy.deepcopy(ella), restored[0]):
        make_trainer(tmp_path, each, max_epochs=0).fit(Net(), Data())
        assert each.predictor is not None
    assert getattr(copy.deepcopy(ella), name) is value or "loader" in name
    assert isinstance(getattr(pickle.loads(pickle.dumps(ella)), name), LeftOut)  # after a fit, too


def test_a_pickle_of_the_callback_says_where_the_posterior_is(tmp_path: Path):
    ella = ELLACallback(**SMALL, unpack=pair)
    module, trainer = Net(), make_trainer(tmp_path, ella, max_epochs=0)
    assert pickle.loads(pickle.dumps(ella)).predictor is None
    trainer.fit(module, Data())
    dumped = pickle.dumps(ella)
    assert len(dumped) < 10_000
    restored = pickle.loads(dumped)
    with pytest.raises(
        RuntimeError, match=r"not kept in a pickle .* ELLAPredictor.load\('.*ella.safetensors', module\)"
    ):
        _ = restored.predictor
    make_trainer(tmp_path, restored, max_epochs=0).fit(module, Data())
    assert module.ella is restored.predictor is not ella.predictor


def test_a_module_without_posterior_is_copied_and_pickled_as_before(tmp_path: Path):
    make_trainer(tmp_path, Fault(), ELLACallback(**SMALL)).fit(module := Net(), Data())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with pytest.raises(RuntimeError, match="the posterior could not be fitted: broken"):
            copied.ella(torch.ones(1, 2))


@pytest.mark.parametrize("forward", [None, lambda model, x: model(x)])
def test_a_module_with_a_posterior_is_copied_and_pickled_as_before(tmp_path: Path, forward: Any):
    ella = ELLACallback(**SMALL, **({"forward": forward} if forward else {}))
    make_trainer(tmp_path, ella, max_epochs=0).fit(module := Net(), Data())
    x = torch.randn(3, 2)
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    assert copied.ella.model is copied is not module
    assert copied.ella(x).probs.equal(module.ella(x).probs)
    assert pickled.eval()(x).equal(module.eval()(x))
    if forward is None:
        assert pickled.ella(x).probs.equal(module.ella(x).probs)
    else:
        with pytest.raises(ValueError, match="forward_function= was left out of the pickle"):
            pickled.ella(x)


class Logging(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.log("norm", out.norm())
        self.log_dict({"largest": out.max()})
        return out


def test_a_network_may_log_in_forward(tmp_path: Path):
    ella = ELLACallback(on_error="raise", **SMALL)
    trainer = make_trainer(tmp_path, ella)
    trainer.fit(Logging(), Data())
    assert {"norm", "largest", "ella/nll"} <= set(trainer.callback_metrics)


class Meddling:
    """An `unpack=` that has got hold of the network, and writes to it."""

    def __init__(self, module: Net, when: str):
        self.module, self.when = module, when

    def __call__(self, batch: Any) -> Any:
        if self.when == "before" or self.module.trainer.current_epoch:
            self.module.body[0].weight.data.mul_(1.01)
            self.module.body[1].running_mean = self.module.body[1].running_mean + 1
            self.module.body[3].train(not self.module.body[3].training)
            self.module.seen = batch
        return batch


@pytest.mark.parametrize("when", ["before", "after", "after, with an error"])
def test_what_is_written_to_the_network_on_the_way_is_put_back(
    tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture
):
    def train(*callbacks: pl.Callback) -> Net:
        pl.seed_everything(0, verbose=False)
        make_trainer(tmp_path, *callbacks).fit(module, Data())
        return module

    pl.seed_everything(0, verbose=False)
    module = Net()
    start = copy.deepcopy(module.state_dict())
    plain = copy.deepcopy(train())
    module = Net()
    module.load_state_dict(start)
    faults = [Fault()] if "error" in when else []
    with caplog.at_level(logging.WARNING, "lightning_ella"):
        train(*faults, ELLACallback(**SMALL, unpack=Meddling(module, when)))
    during = "network and data were looked at" if when == "before" else "the posterior was fitted"
    assert f"while {during}, something (forward=, unpack=, a hook, the network) wrote to the network's" in caplog.text
    assert "which has been put back; the network is as it would be without ELLA" in caplog.text
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert [m.training for m in module.modules()] == [m.training for m in plain.modules()]
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert not hasattr(module, "seen")


def test_two_callbacks_need_two_files(tmp_path: Path):
    trainer = make_trainer(tmp_path, ELLACallback(**SMALL), ELLACallback(**{**SMALL, "rank": 2}))
    with pytest.raises(ValueError, match="two ELLACallbacks would write the same file"):
        trainer.fit(Net(), Data())
    second = ELLACallback(path=tmp_path / "second", **{**SMALL, "rank": 2})
    make_trainer(tmp_path, first := ELLACallback(**SMALL), second).fit(module := Net(), Data())
    assert (first.predictor.rank, second.predictor.rank) == (4, 2)
    assert module.ella is second.predictor


def test_other_weights_are_refused_by_name(tmp_path: Path):
    class Falling(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))  # the first epoch is the best

    best = ModelCheckpoint(monitor="val_loss", save_last=True)
    trainer = make_trainer(tmp_path, best, ELLACallback(**SMALL))
    trainer.fit(module := Falling(), Data())
    last = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"fitted at other weights \(the last weights, after 12 steps, "):
        trainer.test(ckpt_path="best", datamodule=Data(), verbose=False)
    module.load_state_dict(last)
    trainer.test(module, datamodule=Data(), verbose=False)
    best = ModelCheckpoint(monitor="val_loss")
    trainer = make_trainer(tmp_path / "second", best, ELLACallback(weights="best", path=tmp_path / "best", **SMALL))
    trainer.fit(Falling(), Data())
    module = Falling()
    with pytest.raises(ValueError, match=r"fitted at other weights \(the weights of epoch=0-step=6.ckpt, "):
        ELLAPredictor.load(tmp_path / "best", module)
