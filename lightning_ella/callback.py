"""Lightning in, Lightning out: hooks, loaders, loggers, checkpoints. No maths."""

import copy
import functools
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from .data import Points, Unpack, inputs_and_targets
from .distributed import World
from .fit import Fit, Progress, check, run, silent
from .linearize import Forward, Parameters, call, num_samples
from .predictor import ELLAPredictor
from .settings import Settings
from .stages import Stages

log = logging.getLogger(__name__)


class ELLACallback(Callback):
    """Turn the network into a Bayesian predictor when `fit` ends.

    Training is not touched, and afterwards the module is as it would have been. The posterior is on
    `callback.predictor` and `module.ella`, its file beside the checkpoints, its figures in `trainer.callback_metrics`
    and in every logger. For a network that is trained already, load its weights and fit with `max_epochs=0`.

    The training points come from, in this order: `train_loader`, the datamodule's or module's
    `ella_train_dataloader()`, the training loader's dataset (with the augmentation that it has). The unseen points
    that the scales are chosen on come from `calibration_loader`, `ella_calibration_dataloader()`, or the
    first validation loader. Batches pass through the module's batch-transfer hooks.

    Args:
        likelihood: what the network's outputs mean.
        weights: "last", the weights that the module has when training ends, EMA or SWA included; or "best", those of
            the best checkpoint, in a copy of the network that the predictor keeps: the module keeps the last ones.
        train_loader: the training data without augmentation.
        calibration_loader: data that the network has never seen.
        path: where the posterior is saved; `ella.safetensors` beside the checkpoints by default.
        on_error: what an error at the end of `fit` does: "warn" logs it, and the training run ends as it would have
            without this callback; "raise" raises it. What can be known before training is raised before training.
        resume: go on with a fit that was cut short, from the stages that it left beside the posterior (or beside
            the checkpoint that `fit(ckpt_path=…)` got, or in another version of the logger): same weights, settings
            and data.
        unpack: maps a batch to `(inputs, targets)` or `(inputs, targets, weights)`; by default batches are pairs.
        forward: maps `(module, inputs)` to outputs; by default `module(inputs)`. See `fit_ella`.
        parameters: which to take into account, by name, pattern or a function; see `fit_ella`.
        **settings: numbers and names of the method, see `Settings`.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> ella = ELLACallback(num_landmarks=2000, rank=20)
        >>> trainer = Trainer(callbacks=[ella])  # doctest: +SKIP
    """

    def __init__(
        self,
        likelihood: str = "classification",
        *,
        weights: Literal["last", "best"] = "last",
        train_loader: DataLoader | None = None,
        calibration_loader: DataLoader | None = None,
        path: str | Path | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        resume: bool = False,
        unpack: Unpack = inputs_and_targets,
        forward: Forward = call,
        parameters: Parameters = None,
        **settings: Any,
    ):
        if weights not in ("last", "best"):
            raise ValueError(f"weights={weights!r} is not one of 'last', 'best'.")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error={on_error!r} is not one of 'warn', 'raise'.")
        for loader in (train_loader, calibration_loader):
            if loader is not None:
                Points(loader)
        self.settings = Settings(likelihood=likelihood, **settings)
        self.weights = weights
        self.train_loader, self.calibration_loader = train_loader, calibration_loader
        self.path, self.on_error, self.resume = path, on_error, resume
        self.unpack, self.forward, self.parameters = unpack, forward, parameters
        self._predictor: ELLAPredictor | None = None

    @property
    def predictor(self) -> ELLAPredictor | None:
        """The head, once `fit` has ended; None before, and where the fit failed.

        After a fit in spawned processes (ddp_spawn, ddp_notebook) it is read from its file, here where it is asked for.
        """
        if self._predictor is None and (trainer := _trainer_with(self)) is not None:
            self._read_back(trainer)
        return self._predictor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before training."""
        if stage != "fit":
            return
        self._predictor = None  # it belongs to other weights than those that this fit ends with
        _files(trainer).pop(str(self.path), None)
        if isinstance(getattr(pl_module, "ella", None), ELLAPredictor):
            pl_module._modules.pop("ella", None)  # the user's `module.ella = ELLAPredictor.load(…)` registers it
            object.__setattr__(pl_module, "ella", None)
        others = [other for other in trainer.callbacks if isinstance(other, ELLACallback) and other is not self]  # type: ignore[attr-defined]
        if any(str(other.path) == str(self.path) for other in others):
            raise ValueError("two ELLACallbacks would write the same file: pass another path= to one of them.")
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"ELLA needs whole parameters on each device, but {type(trainer.strategy).__name__} shards them: "
                "fit ELLA afterwards from the checkpoint, with Trainer(devices=1, max_epochs=0)."
            )
        if trainer.world_size > 1 and not torch.distributed.is_initialized():
            raise ValueError(
                f"ELLA needs torch.distributed for {trainer.world_size} processes, which "
                f"{type(trainer.strategy).__name__} does not use: fit ELLA afterwards from the checkpoint, with "
                "Trainer(devices=1, max_epochs=0)."
            )
        if self.weights == "best" and not _monitored(trainer):
            raise ValueError(
                "weights='best' needs to know what is best: add ModelCheckpoint(monitor='val_loss') to the callbacks."
            )
        if not isinstance(getattr(pl_module, "ella", None), ELLAPredictor | None):
            raise ValueError(
                f"{type(pl_module).__name__} has an attribute `ella` of its own, where the predictor goes: rename it."
            )
        if trainer.strategy.root_device.type == "mps":
            raise ValueError("ELLA needs float64, which MPS does not have: pass Trainer(accelerator='cpu').")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try data and network on a few points, so that what would fail after training fails before."""
        world = _world(trainer)
        self._path(trainer)
        with isolate_rng(), self._validating(trainer):
            (train, _), (calibration, _) = self._loaders(trainer, world)
        with isolate_rng(), self._validating(trainer), world.together("a look before training"):
            settings, unpack = _fitting(self.settings, trainer, train), self._unpack(trainer)
            with world.quiet():
                hooks = {"unpack": unpack, "forward": self.forward, "parameters": self.parameters}
                check(pl_module, train, calibration, settings, **hooks)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the posterior, attach it, write it and log it."""
        try:
            self._fit(trainer, pl_module)
        except Exception as error:
            if self.on_error == "raise":
                raise
            state = "is in memory" if self._predictor is not None else "could not be fitted"
            log.warning(
                "ELLA: the posterior %s, but something failed; the trained network is as it would be without ELLA. "
                "Mend it and fit again from the checkpoint, with max_epochs=0. %s",
                *(state, "".join(traceback.format_exception(error))),
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its predictor in processes that were started anew."""
        try:
            self._read_back(trainer)
        except ValueError as error:  # other weights, which does not matter to a test that does not ask
            object.__setattr__(pl_module, "ella", _refuse(error))

    on_predict_start = on_test_start

    def _fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        home, world = pl_module.device, _world(trainer)
        path, checkpoint = world.object_from_first((self._path(trainer), self._checkpoint(trainer)))
        with world.together("the choice of weights"):
            network, origin = self._network(trainer, pl_module, checkpoint)
            stages = self._stages(trainer, path)
        with isolate_rng(), self._validating(trainer):
            (train, train_name), (calibration, calibration_name) = self._loaders(trainer, world)
            if world.first:
                log.info("ELLA: fitting on %s, calibrating on %s, at %s.", train_name, calibration_name, origin)
            try:
                with world.together("moving the network"):
                    network.to(trainer.strategy.root_device)
                for buffer in network.buffers():  # DDP lets them drift apart; a checkpoint has the first process's
                    world.from_first(buffer)
                fit = run(
                    network,
                    train,
                    calibration,
                    _fitting(self.settings, trainer, train),
                    unpack=self._unpack(trainer),
                    forward=self.forward,
                    parameters=self.parameters,
                    progress=_bars(trainer),
                    world=world,
                    stages=stages,
                    origin=origin,
                )
            finally:
                network.to(home)
        self._attach(pl_module, network, fit.predictor)
        with world.together("writing the posterior and its figures"):
            self._report(trainer, fit, path, checkpoint, stages)

    def _attach(self, pl_module: LightningModule, network: LightningModule, predictor: ELLAPredictor) -> None:
        self._predictor = predictor
        if network is not pl_module:
            predictor.register_forward_pre_hook(functools.partial(_follow, pl_module))
        # Registered as a submodule it would enter the user's state_dict and break a later strict load.
        object.__setattr__(pl_module, "ella", predictor)

    def _read_back(self, trainer: Trainer) -> None:
        """After a fit in spawned processes, get the predictor from the file that they wrote."""
        path, checkpoint, writer = _files(trainer).get(str(self.path), (None, None, None))
        pl_module = trainer.lightning_module
        if path is not None and writer != os.getpid() and self._predictor is None and pl_module is not None:
            network, _ = self._network(trainer, pl_module, checkpoint)
            self._attach(pl_module, network, ELLAPredictor.load(path, network, self.forward))

    def _stages(self, trainer: Trainer, path: Path) -> Stages:
        """Keep stages beside the posterior; go on with those that such a fit left there or in another run."""
        if _fast_dev_run(trainer):
            return Stages()
        if not self.resume:
            return Stages(path)
        beside = [Path(trainer.ckpt_path).with_name(path.name)] if trainer.ckpt_path else []
        versions = path.absolute().parents[2:3]  # of the logger: <root>/version_0/checkpoints/…
        other = [folder / path.name for root in versions for folder in root.glob(f"*/{path.parent.name}")]
        return Stages(path, dict.fromkeys([path, *beside, *other]))

    @staticmethod
    def _checkpoint(trainer: Trainer) -> str | None:
        """The path of the best checkpoint, if there is one."""
        return next((callback.best_model_path for callback in _monitored(trainer) if callback.best_model_path), None)

    def _network(self, trainer: Trainer, pl_module: LightningModule, path: str | None) -> tuple[LightningModule, str]:
        """The network at the chosen weights, and their name; `path` is that of the best checkpoint."""
        if self.weights == "last" or _fast_dev_run(trainer):
            return pl_module, f"the last weights, after {trainer.global_step} steps"
        if path is None:
            raise ValueError(
                "weights='best', but no checkpoint has been written: train for an epoch, or pass weights='last'."
            )
        try:
            best = copy.deepcopy(pl_module)
        except RuntimeError as error:
            raise ValueError(
                f"weights='best' works on a copy of the module, which cannot be copied ({error}): "
                "do not keep a loss or other tensors with a graph on it, or pass weights='last'."
            ) from error
        state = trainer.strategy.load_checkpoint(path, weights_only=False)["state_dict"]
        best.load_state_dict(state, strict=best.strict_loading)
        return best, f"the weights of {Path(path).name}"

    def _loaders(self, trainer: Trainer, world: World) -> tuple[tuple[DataLoader, str], tuple[DataLoader | None, str]]:
        """The training and the calibration data, and where they come from."""
        with world.together("the choice of data"):
            train = self._given(trainer, self.train_loader, "train_loader", "ella_train_dataloader")
            unseen = self._given(trainer, self.calibration_loader, "calibration_loader", "ella_calibration_dataloader")
        # Lightning's own loaders are set up by collectives of its own, so outside of `together`.
        if train is None:
            trainer.fit_loop.setup_data()
            train = trainer.train_dataloader, "the training data (with their augmentation, if any)"
        if unseen is None:
            unseen = self._validation_data(trainer)
        return (_only(train[0], "train_loader"), train[1]), unseen

    @staticmethod
    def _validation_data(trainer: Trainer) -> tuple[DataLoader | None, str]:
        with suppress(MisconfigurationException):  # a validation_step, but no val_dataloader
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        loaders = trainer.val_dataloaders
        if loaders is None:  # given to fit(), which sets them aside where the module has no validation_step
            given = getattr(trainer.fit_loop.epoch_loop.val_loop._data_source, "instance", None)
            loaders = given if isinstance(given, (DataLoader, list, tuple, dict)) else None
        for owner in (getattr(trainer, "datamodule", None), trainer.lightning_module):
            if loaders is None and owner is not None and type(owner).val_dataloader is not DataHooks.val_dataloader:
                loaders = owner.val_dataloader()  # the module has no validation_step, so Lightning did not ask
        if isinstance(loaders, dict):
            loaders = list(loaders.values())
        if isinstance(loaders, (list, tuple)) and loaders:
            return _only(loaders[0], "calibration_loader"), f"the first of {len(loaders)} validation loaders"
        return (_only(loaders, "calibration_loader"), "the validation data") if loaders else (None, "nothing")

    @staticmethod
    def _given(trainer: Trainer, argument: DataLoader | None, name: str, method: str):
        """The loader that the user gave, and its name: the argument, else the method of datamodule or module."""
        if argument is not None:
            return argument, f"the data of {name}"
        for owner in (getattr(trainer, "datamodule", None), trainer.lightning_module):
            if callable(getattr(owner, method, None)):
                return _only(getattr(owner, method)(), name), f"the data of {type(owner).__name__}.{method}()"
        return None

    def _unpack(self, trainer: Trainer) -> Unpack:
        """The user's `unpack`, after the module's transfer hooks and the precision plugin as in a training step."""

        def unpack(batch: Any) -> Any:
            inputs, *targets = self.unpack(trainer.strategy.batch_to_device(batch))
            return trainer.precision_plugin.convert_input(inputs), *targets

        return unpack

    @staticmethod
    @contextmanager
    def _validating(trainer: Trainer) -> Iterator[None]:
        """Augmentation in `on_after_batch_transfer` asks `trainer.training`; let it hear no."""
        stage, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
        try:
            yield
        finally:
            trainer.state.stage = stage

    def _report(self, trainer: Trainer, fit: Fit, path: Path, checkpoint: str | None, stages: Stages) -> None:
        """Write and log; a file or a logger that fails costs only what it would have got."""
        figures, errors = fit.figures, []
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        if not trainer.is_global_zero:
            return
        if not _fast_dev_run(trainer):
            try:
                log.info("ELLA: the posterior is in %s", fit.predictor.save(path))
                _files(trainer)[str(self.path)] = str(path), checkpoint, os.getpid()
                stages.forget()
            except OSError as error:
                errors.append(error)
        for logger in trainer.loggers:
            try:
                logger.log_metrics(figures, step=trainer.global_step)
            except Exception as error:
                errors.append(error)
        log.info("ELLA: done in %.0f s.", figures["ella/seconds"])
        if errors:
            raise errors[0]

    def _path(self, trainer: Trainer) -> Path:
        if self.path is not None:
            return Path(self.path)
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
        if "://" in str(folder):
            raise ValueError(f"ELLA writes to local files only, not to {folder}: pass path='…/ella.safetensors'.")
        return Path(folder) / "ella.safetensors"


def _world(trainer: Trainer) -> World:
    """The trainer's processes."""
    if trainer.world_size == 1:
        return World()
    return World(torch.distributed.group.WORLD, trainer.strategy.root_device)


def _files(trainer: Trainer) -> dict[str, tuple[str, str | None, int]]:
    """Files of posteriors, the best checkpoint then, and who wrote them: state that spawned processes send back."""
    return vars(trainer.state).setdefault("ella_files", {})


def _trainer_with(callback: Callback) -> Trainer | None:
    """The trainer that has this callback. Lightning calls no hook in the process that spawned the others."""
    trainers = [thing for thing in gc.get_objects() if issubclass(type(thing), Trainer)]
    mine = (trainer for trainer in trainers if callback in getattr(trainer, "callbacks", ()))  # type: ignore[attr-defined]
    return next((trainer for trainer in mine if _files(trainer)), None)


def _refuse(error: ValueError) -> Callable[..., Any]:
    """Stand in for a predictor that could not be read."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error

    return refuse


def _monitored(trainer: Trainer) -> list[ModelCheckpoint]:
    """The checkpoint callbacks that know which weights are best, and keep them."""
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [callback for callback in found if callback.monitor and callback.save_top_k != 0]


def _only(loader: Any, argument: str) -> DataLoader:
    if loader is None:
        raise ValueError(f"the trainer has no data for ELLA's {argument}: pass {argument}= to ELLACallback.")
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"ELLA needs one DataLoader, but the trainer has a {type(loader).__name__} of them: "
            f"pass {argument}= to ELLACallback."
        )
    return loader


def _fitting(settings: Settings, trainer: Trainer, train: DataLoader) -> Settings:
    """Under `fast_dev_run`, no more points than a quick look at the pipeline needs."""
    if not _fast_dev_run(trainer):
        return settings
    few = min(8, len(Points(train)))
    return settings.limited(num_landmarks=few, num_curvature=few, num_calibration=few, rank=min(2, few))


def _fast_dev_run(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set where type checkers do not see it


def _follow(leader: LightningModule, predictor: torch.nn.Module, _: Any) -> None:
    """The copy with the best weights moves with the user's module. Untested on more than the CPU."""
    assert isinstance(predictor, ELLAPredictor)
    predictor.model.to(leader.device)


def _bars(trainer: Trainer) -> Progress:
    """A bar a stage, drawn by whatever draws the trainer's own."""
    bar = trainer.progress_bar_callback

    def with_tqdm(batches: Iterable, description: str, total: int) -> Iterator:
        with Tqdm(total=total, desc=description, unit="point", dynamic_ncols=True, file=sys.stdout) as line:
            for batch in batches:
                yield batch
                line.update(num_samples(batch[0]))

    def with_rich(batches: Iterable, description: str, total: int) -> Iterator:
        with _rich_display(trainer, bar) as display:
            task = display.add_task(description, total=total)
            for batch in batches:
                yield batch
                display.update(task, advance=num_samples(batch[0]), refresh=True)

    if bar is None or getattr(bar, "is_disabled", False):
        return silent
    return with_rich if isinstance(bar, RichProgressBar) else with_tqdm


@contextmanager
def _rich_display(trainer: Trainer, bar: Any) -> Iterator[Any]:
    """The display that the trainer's bar is drawn on, or one like it where it has been stopped or never started."""
    from rich.progress import Progress as RichProgress

    if bar.progress is not None and bar.progress.live.is_started:
        yield bar.progress
    else:
        with RichProgress(*bar.configure_columns(trainer)) as display:
            yield display
