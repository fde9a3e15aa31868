"""Lightning in, Lightning out: hooks, loaders, loggers, checkpoints. No maths."""

import copy
import functools
import glob
import itertools
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import trainers
from .augmentation import portable_views
from .data import Unpack, inputs_and_targets, points_of
from .distil import MOST_TUNED, NUM_POINTS
from .distributed import World
from .fast import FastPredictor
from .fit import Fit, check, run
from .head import fingerprint
from .linearize import Parameters, call
from .outcomes import Outcome, Record, Refusal, Shared, records
from .pickling import LeftOut, portable
from .predictor import ELLAPredictor
from .settings import Settings
from .stages import Stages
from .untouched import AS_BEFORE, Remembered, digest, remembered
from .view import View

log = logging.getLogger(__name__)

ARGUMENTS = ("unpack", "forward", "parameters", "train_loader", "calibration_loader")  # which pickle may not keep
FEW_LESSONS = 8  # for a student under `fast_dev_run`
AGAIN = "Mend it and fit again from the checkpoint, with max_epochs=0"


class ELLACallback(Callback):
    """Turn the network into a Bayesian predictor when `fit` ends.

    Training is not touched, and afterwards the module is as it would have been. The posterior is on
    `callback.predictor` and `module.ella`, its file beside the checkpoints, its figures in `trainer.callback_metrics`
    and in every logger. For a network that is trained already, load its weights and fit with `max_epochs=0`. The
    Trainer may be of `lightning` or of `pytorch_lightning`.

    The training points come from, in this order: `train_loader`, the datamodule's or module's
    `ella_train_dataloader()`, the training loader's dataset (with the augmentation that it has). The unseen points
    that the scales are chosen on come from `calibration_loader`, `ella_calibration_dataloader()`, or the
    first validation loader. Batches pass through the module's batch-transfer hooks.

    Args:
        likelihood: what the network's outputs mean.
        weights: "last", the weights that the module has when training ends, EMA or SWA included; or "best", those of
            the best checkpoint, in a copy of the network that the predictor keeps: the module keeps the last ones.
        train_loader: the training data without augmentation, a DataLoader or another iterable of batches.
        calibration_loader: data that the network has never seen.
        path: where the posterior is saved; by default `ella.safetensors` beside the checkpoints, or
            `ella-2.safetensors` where there is another network's.
        on_error: what an error at the end of `fit` does: "warn" logs it, and the training run ends as it would have
            without this callback; "raise" raises it. What can be known before training is raised before training,
            and where nothing is trained (`max_epochs=0`) every error is raised.
        resume: go on with a fit that was cut short, from the stages that it left beside the posterior (or beside
            the checkpoint that `fit(ckpt_path=…)` got, or in another version of the logger): same weights, settings
            and data.
        unpack: maps a batch to `(inputs, targets)` or `(inputs, targets, weights)`; by default batches are pairs.
        forward: maps `(module, inputs)` to outputs; by default `module(inputs)`. See `fit_ella`.
        parameters: which to take into account, by name, pattern or a function; see `fit_ella`.
        distil: teach a student at the end, on the unseen points: `predictor.fast`, or `module.ella.fast`, predicts for
            the price of one forward pass. Its file has "-fast" in its name. See `ELLAPredictor.distil`.
        **settings: numbers and names of the method, see `Settings`.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> ella = ELLACallback()
        >>> trainer = Trainer(callbacks=[ella])  # doctest: +SKIP
    """

    def __init__(
        self,
        likelihood: str = "classification",
        *,
        weights: Literal["last", "best"] = "last",
        train_loader: Iterable[Any] | None = None,
        calibration_loader: Iterable[Any] | None = None,
        path: str | Path | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        resume: bool = False,
        unpack: Unpack = inputs_and_targets,
        forward: Callable[[nn.Module, Any], Any] = call,
        parameters: Parameters = None,
        distil: bool = False,
        **settings: Any,
    ):
        if weights not in ("last", "best"):
            raise ValueError(f"weights={weights!r} is not one of 'last', 'best'.")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error={on_error!r} is not one of 'warn', 'raise'.")
        self.settings = Settings(likelihood=likelihood, **settings)
        self.weights = weights
        self.train_loader, self.calibration_loader = train_loader, calibration_loader
        self.path, self.on_error, self.resume = path, on_error, resume
        self.unpack, self.forward, self.parameters = unpack, forward, parameters
        self.distil = distil
        self._outcome: Outcome | None = None
        self._shared = Shared()
        self._trained = False  # whether a batch was trained on in this fit

    @property
    def predictor(self) -> ELLAPredictor | None:
        """The head, once `fit` has ended; None before.

        After a fit in spawned processes (ddp_spawn, ddp_notebook) it is read from its file, here where it is asked for.
        Where libraries fit copies of this callback, with copies of the network, it is that of the last copy.

        Raises:
            RuntimeError: if the fit failed; the message says why, and what to do.
        """
        outcome = self._outcome or self._of_a_copy()
        if outcome is None:
            trainer = trainers.trainer_with(self, lambda found: str(self.path) in records(found))
            if trainer is not None:
                self._read_back(trainer)
                outcome = self._outcome
        if outcome is None:
            return None
        if outcome.predictor is None:
            raise RuntimeError(outcome.reason)
        return outcome.predictor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before training."""
        if stage != "fit":
            return
        self._outcome = self._shared.latest = None  # of other weights than those that this fit ends with
        self._trained = False
        records(trainer).pop(str(self.path), None)
        if isinstance(getattr(pl_module, "ella", None), ELLAPredictor | Refusal):
            pl_module._modules.pop("ella", None)  # the user's `module.ella = ELLAPredictor.load(…)` registers it
            object.__setattr__(pl_module, "ella", None)
        for missing in (*(getattr(self, name) for name in ARGUMENTS), *self.settings.views):
            if isinstance(missing, LeftOut):
                missing()
        others = [other for other in trainer.callbacks if isinstance(other, ELLACallback) and other is not self]  # type: ignore[attr-defined]
        if any(str(other.path) == str(self.path) for other in others):
            raise ValueError("two ELLACallbacks would write the same file: pass another path= to one of them.")
        trainers.refuse_unusable(trainer)
        if self.weights == "best" and not trainers.monitored(trainer):
            raise ValueError(
                "weights='best' needs to know what is best: add ModelCheckpoint(monitor='val_loss') to the callbacks."
            )
        if getattr(pl_module, "ella", None) is not None:
            raise ValueError(
                f"{type(pl_module).__name__} has an attribute `ella` of its own, where the predictor goes: rename it."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try data and network on a few points, so that what would fail after training fails before."""
        world = trainers.world_of(trainer)
        if lazy := [name for name, parameter in pl_module.named_parameters() if is_lazy(parameter)]:
            log.warning(
                "ELLA: %s has no shape before the first batch, so nothing is looked at before training: leave "
                "num_sanity_val_steps at 2, or call the network once in setup().",
                lazy[0],
            )
            return
        self._default_path(trainer)
        with isolate_rng(), trainers.validating(trainer):
            (train, _), (calibration, _) = self._loaders(trainer, world)
        with isolate_rng(), trainers.validating(trainer), world.together("a look before training"), world.quiet():
            place = trainers.place_of(trainer)
            if place != trainer.strategy.root_device:
                log.info("ELLA: %s has no float64, so the fit is on the CPU.", trainer.strategy.root_device)
            apart = self._takes_the_best(trainer) or place != trainer.strategy.root_device
            network = _copied(pl_module, lambda value: value.to(place)) if apart else pl_module
            with self._remembered(trainer, pl_module, "network and data were looked at"):
                few = self._fitting(trainer, train)
                check(network, train, calibration, few, **self._functions(trainer), distil=self.distil)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that there is a training run to protect from errors."""
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the posterior, attach it, write it and log it."""
        job = memory = None
        try:
            with isolate_rng(), trainers.validating(trainer):
                job = self._prepared(trainer, pl_module)
                with self._remembered(trainer, pl_module, "the posterior was fitted") as memory:
                    fit = self._fit(trainer, job, pl_module.device)
            self._attach(pl_module, job.network, fit.predictor)
            with job.world.together("writing the posterior and its figures"):
                self._report(trainer, fit, job)
            if self.distil:
                watched = self._remembered(trainer, pl_module, "a student was taught")
                with isolate_rng(), trainers.validating(trainer), watched as memory:
                    fast = self._taught(trainer, job, pl_module.device)
                with job.world.together("writing the student and its figures"):
                    self._report_student(trainer, fast, job)
        except Exception as error:
            state, kept = self._failed(trainer, pl_module, error), "" if job is None else _left_beside(job.path)
            if self.on_error == "raise" or not self._trained:  # no training run to protect
                if kept:
                    error.add_note(f"ELLA: {kept}")
                raise
            log.warning(
                "ELLA: the posterior %s; the trained network %s. %s. %s\n%s",
                *(state, AS_BEFORE if memory is None else memory.verdict, AGAIN, kept),
                "".join(traceback.format_exception(error)),
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its predictor in processes that were started anew."""
        try:
            self._read_back(trainer)
        except ValueError as error:  # other weights, which does not matter to a test that does not ask
            object.__setattr__(pl_module, "ella", Refusal(ValueError, str(error)))

    on_predict_start = on_test_start

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle keeps: neither the posterior, which has a file, nor functions that cannot be pickled."""
        kept = {name: portable(name, getattr(self, name)) for name in ARGUMENTS}
        kept["settings"] = replace(self.settings, views=portable_views(self.settings.views))
        return self._own() | kept | {"_outcome": self._left_behind(), "_shared": Shared()}

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        vars(made).update(self._own())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = made = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(self._own(), memo))
        return made

    def _own(self) -> dict[str, Any]:
        """The attributes, without those by which Lightning ties a callback to the module that it was fitted with."""
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    def _left_behind(self) -> Outcome | None:
        """What a callback that is restored from a pickle says of this one's fit."""
        outcome = self._outcome
        if outcome is None or outcome.predictor is None:
            return outcome
        if get_spawning_popen() is not None:  # a process of the same run, which finds the file
            return None
        how = f"ELLAPredictor.load({outcome.file!r}, module) reads it from its file" if outcome.file else AGAIN
        return Outcome(outcome.whose, None, f"the posterior is not kept in a pickle of ELLACallback: {how}.")

    def _of_a_copy(self) -> Outcome | None:
        """How the latest fit of this callback's copies ended."""
        outcome = self._shared.latest
        if outcome is not None and not outcome.told:
            outcome.told = True
            log.info(
                "ELLA: this callback has fitted nothing itself: its predictor is that of the %s that a copy of it was "
                "trained with last. Each network has its own on module.ella.",
                outcome.whose,
            )
        return outcome

    def _prepared(self, trainer: Trainer, pl_module: LightningModule) -> "_Job":
        """What is to be fitted, and where it goes."""
        world = trainers.world_of(trainer)
        with world.together("the place of the file"), world.quiet():
            place = self._path(trainer, pl_module), self._checkpoint(trainer)
        path, checkpoint = world.object_from_first(place)
        with world.together("the choice of weights"):
            network, origin = self._network(trainer, pl_module, checkpoint)
            stages = self._stages(trainer, path)
        network = _as_on_first(network, world)
        (train, train_name), (calibration, calibration_name) = self._loaders(trainer, world)
        if world.first:
            log.info("ELLA: fitting on %s, calibrating on %s, at %s.", train_name, calibration_name, origin)
        return _Job(world, network, origin, train, calibration, path, checkpoint, stages)

    def _fit(self, trainer: Trainer, job: "_Job", home: torch.device) -> Fit:
        with self._where_it_is_fitted(trainer, job, home):
            fit = run(
                job.network,
                job.train,
                job.calibration,
                self._fitting(trainer, job.train),
                progress=trainers.bars(trainer),
                world=job.world,
                stages=job.stages,
                origin=job.origin,
                **self._functions(trainer),
            )
        if home != trainers.place_of(trainer):
            fit.predictor.to(home)
        return fit

    def _taught(self, trainer: Trainer, job: "_Job", home: torch.device) -> FastPredictor:
        """A student of the predictor, from the unseen points."""
        assert self._outcome is not None
        assert self._outcome.predictor is not None
        most = FEW_LESSONS if trainers.is_fast_dev_run(trainer) else NUM_POINTS
        with self._where_it_is_fitted(trainer, job, home), job.world.quiet():
            with job.world.together("a look at the points to teach with"):
                points = points_of(job.calibration, trainers.as_in_training(trainer, self.unpack), most + MOST_TUNED)
            how = {"num_points": most, "progress": trainers.bars(trainer)}
            fast = self._outcome.predictor.teach(points, job.world, **how)
        if job.network is not trainer.lightning_module:
            fast.register_forward_pre_hook(functools.partial(_follow, trainer.lightning_module))
        return fast

    @contextmanager
    def _where_it_is_fitted(self, trainer: Trainer, job: "_Job", home: torch.device) -> Iterator[None]:
        """Have the network there for a while."""
        try:
            with job.world.together("moving the network"):
                job.network.to(trainers.place_of(trainer))
            yield
        finally:
            job.network.to(home)

    def _functions(self, trainer: Trainer) -> dict[str, Any]:
        """What the user's functions say about batches and network."""
        unpack = trainers.as_in_training(trainer, self.unpack)
        return {"unpack": unpack, "forward": self.forward, "parameters": self.parameters}

    def _remembered(
        self, trainer: Trainer, pl_module: LightningModule, while_: str
    ) -> AbstractContextManager[Remembered]:
        others = {"datamodule": data} if (data := getattr(trainer, "datamodule", None)) is not None else {}
        return remembered(pl_module, while_, others, self.settings.memory_budget)

    def _end(self, pl_module: LightningModule, outcome: Outcome, head: ELLAPredictor | Refusal) -> None:
        self._outcome = self._shared.latest = outcome
        # Registered as a submodule it would enter the user's state_dict and break a later strict load.
        object.__setattr__(pl_module, "ella", head)

    def _attach(
        self, pl_module: LightningModule, network: LightningModule, predictor: ELLAPredictor, file: str = ""
    ) -> None:
        if network is not pl_module:
            predictor.register_forward_pre_hook(functools.partial(_follow, pl_module))
        self._end(pl_module, Outcome(type(pl_module).__name__, predictor, file=file), predictor)

    def _failed(self, trainer: Trainer, pl_module: LightningModule, error: Exception) -> str:
        """Keep the reason for whoever asks for the predictor; return what has become of it."""
        if self._outcome is not None and self._outcome.predictor is not None:
            return "is in memory, but something failed"
        reason = f"the posterior could not be fitted: {str(error).rstrip('.') or type(error).__name__}. {AGAIN}."
        records(trainer)[str(self.path)] = Record(os.getpid(), failure=reason)
        self._end(pl_module, Outcome(type(pl_module).__name__, None, reason), Refusal(RuntimeError, reason))
        return "could not be fitted"

    def _read_back(self, trainer: Trainer) -> None:
        """After a fit in spawned processes, get the predictor from the file that they wrote."""
        record, pl_module = records(trainer).get(str(self.path)), trainer.lightning_module
        if record is None or record.writer == os.getpid() or self._outcome is not None or pl_module is None:
            return
        if record.failure:
            failed = Outcome(type(pl_module).__name__, None, record.failure)
            self._end(pl_module, failed, Refusal(RuntimeError, record.failure))
        else:
            network, _ = self._network(trainer, pl_module, record.checkpoint)
            hooks = {"forward": self.forward, "views": self.settings.views}
            predictor = ELLAPredictor.load(record.path, network, **hooks)
            if self.distil and _fast_path(record.path).exists():
                predictor.adopt(FastPredictor.load(_fast_path(record.path), network, **hooks))
            self._attach(pl_module, network, predictor, record.path)

    def _stages(self, trainer: Trainer, path: Path) -> Stages:
        """Keep stages beside the posterior; go on with those that such a fit left there or in another run."""
        if trainers.is_fast_dev_run(trainer):
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
        paths = (checkpoint.best_model_path for checkpoint in trainers.monitored(trainer))
        return next((path for path in paths if path), None)

    def _takes_the_best(self, trainer: Trainer) -> bool:
        return self.weights == "best" and not trainers.is_fast_dev_run(trainer)

    def _network(self, trainer: Trainer, pl_module: LightningModule, path: str | None) -> tuple[LightningModule, str]:
        """The network at the chosen weights, and their name; `path` is that of the best checkpoint."""
        if not self._takes_the_best(trainer):
            return pl_module, f"the last weights, after {trainer.global_step} steps"
        if path is None:
            raise ValueError(
                "weights='best', but no checkpoint has been written: train for an epoch, or pass weights='last'."
            )
        best = _copied(pl_module)
        state = trainer.strategy.load_checkpoint(path, weights_only=False)["state_dict"]
        best.load_state_dict(state, strict=best.strict_loading)
        return best, f"the weights of {Path(path).name}"

    def _loaders(self, trainer: Trainer, world: World) -> tuple[trainers.Source, trainers.Source]:
        """The training and the calibration data, and where they come from."""
        with world.together("the choice of data"):
            train = self._given(trainer, "train_loader", "ella_train_dataloader")
            unseen = self._given(trainer, "calibration_loader", "ella_calibration_dataloader")
        # Lightning's own loaders are set up by collectives of its own, so outside of `together`.
        return train or trainers.training_data(trainer), unseen or trainers.validation_data(trainer)

    def _given(self, trainer: Trainer, argument: str, method: str) -> trainers.Source | None:
        """The loader that the user gave, and its name: the argument, else the method of datamodule or module."""
        loader = getattr(self, argument)
        return trainers.data_of(trainer, method, argument) if loader is None else (loader, f"the data of {argument}")

    def _fitting(self, trainer: Trainer, train: Iterable[Any]) -> Settings:
        """Under `fast_dev_run`, no more points than a quick look at the pipeline needs."""
        if not trainers.is_fast_dev_run(trainer):
            return self.settings
        few = min(8, len(points_of(train, trainers.as_in_training(trainer, self.unpack), 8)))
        return self.settings.limited(num_landmarks=few, num_curvature=few, num_calibration=few, rank=min(2, few))

    def _report(self, trainer: Trainer, fit: Fit, job: "_Job") -> None:
        """Write and log; a file or a logger that fails costs only what it would have got."""
        figures, errors = fit.figures, []
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        if not trainer.is_global_zero:
            return
        if not trainers.is_fast_dev_run(trainer):
            try:
                log.info("ELLA: the posterior is in %s", fit.predictor.save(job.path))
                if self._outcome is not None:
                    self._outcome.file = str(job.path)
                records(trainer)[str(self.path)] = Record(os.getpid(), str(job.path), job.checkpoint)
                job.stages.forget()
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

    def _report_student(self, trainer: Trainer, fast: FastPredictor, job: "_Job") -> None:
        """Write and log."""
        figures = {f"fast/{name}": value for name, value in fast.figures.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        if trainer.is_global_zero:
            if not trainers.is_fast_dev_run(trainer):
                log.info("ELLA: the student is in %s", fast.save(_fast_path(job.path)))
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def _path(self, trainer: Trainer, network: LightningModule) -> Path:
        if self.path is not None:
            return Path(self.path)
        return _free(self._default_path(trainer), network)

    def _default_path(self, trainer: Trainer) -> Path:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
        if self.path is None and "://" in str(folder):
            raise ValueError(f"ELLA writes to local files only, not to {folder}: pass path='…/ella.safetensors'.")
        return Path(folder) / "ella.safetensors"


def _fast_path(path: str | Path) -> Path:
    """Where the student of the posterior in a file goes."""
    return (path := Path(path)).with_name(f"{path.stem}-fast{path.suffix}")


class _Job(NamedTuple):
    """What is to be fitted, and where it goes."""

    world: World
    network: LightningModule
    origin: str
    train: Any
    calibration: Any
    path: Path
    checkpoint: str | None
    stages: Stages


def _copied(module: LightningModule, value: Callable[[Tensor], Tensor] = Tensor.clone) -> LightningModule:
    """A network of the same structure, with weights of its own, or with what `value` makes of them.

    What is neither a module nor a tensor of the network is shared, so that locks, files and clients are no hindrance.
    """
    try:
        made = View(module, cast=lambda _, tensor: value(tensor)).root
    except Exception as error:  # whatever a class of the user's raises
        raise ValueError(
            f"weights='best' works on a copy of the module, as does a fit on a device without float64, but it cannot "
            f"be copied ({error}): pass weights='last' and Trainer(accelerator='cpu'), or load the best checkpoint and "
            "fit with max_epochs=0."
        ) from error
    return cast(LightningModule, made)


def _as_on_first(network: LightningModule, world: World) -> LightningModule:
    """The network with the buffers of the first process, as in a checkpoint: DDP lets them drift apart."""
    mine = [digest(buffer) for buffer in network.buffers()]
    if world.size == 1 or world.smallest(int(world.object_from_first(mine) == mine)):
        return network
    with world.together("a copy of the network"):
        network = network if world.first else _copied(network)
    for buffer in network.buffers():
        world.from_first(buffer)
    return network


def _left_beside(path: Path) -> str:
    """What to do with the stages that a fit which failed has left beside its posterior."""
    names = ", ".join(map(str, sorted(path.parent.glob(f"{glob.escape(path.name)}.*.stage"))))
    return names and f"What was done is kept in {names}: go on from there with resume=True, or delete them."


def _free(path: Path, network: LightningModule) -> Path:
    """Return `path`, or a name beside it where there is another network's posterior."""
    if not path.exists():
        return path
    mine = fingerprint(network)["network"]
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    free = path if _network_of(path) == mine else next(n for n in names if not n.exists() or _network_of(n) == mine)
    if free != path:
        log.info("ELLA: %s belongs to another network, so this posterior goes to %s.", path, free)
    return free


def _network_of(path: Path) -> str | None:
    """Which network the posterior in a file belongs to; None where it is no posterior."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["fingerprint"])["network"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def _follow(leader: LightningModule, predictor: nn.Module, _: Any) -> None:
    """The copy with the best weights moves with the user's module. Untested on more than the CPU."""
    assert isinstance(predictor, ELLAPredictor)
    predictor.model.to(leader.device)
