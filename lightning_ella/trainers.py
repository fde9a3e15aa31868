"""What ELLA asks of a Trainer, of `lightning` or of `pytorch_lightning`.

The two packages have the same classes twice, so nothing here goes by a class itself: names decide.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from .data import Unpack
from .distributed import World
from .linearize import num_samples
from .numerics import WITHOUT_FLOAT64
from .progress import Progress, silent
from .samplers import len_of

PACKAGES = {"lightning", "pytorch_lightning", "lightning_fabric"}
Source = tuple[Any, str]  # a loader, or None, and what it is
SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


def is_a(kind: type, *names: str) -> bool:
    """Whether a class is one of Lightning's of these names, or inherits from one, whichever package it is from."""
    return any(base.__name__ in names and base.__module__.partition(".")[0] in PACKAGES for base in kind.__mro__)


def refuse_unusable(trainer: Trainer) -> None:
    """Raise a ValueError for a trainer that ELLA cannot fit in."""
    strategy = type(trainer.strategy)
    afterwards = "fit ELLA afterwards from the checkpoint, with Trainer(devices=1, max_epochs=0)."
    if is_a(strategy, *SHARDING):
        raise ValueError(
            f"ELLA needs whole parameters on each device, but {strategy.__name__} shards them: {afterwards}"
        )
    if trainer.world_size > 1 and not torch.distributed.is_initialized():
        raise ValueError(
            f"ELLA needs torch.distributed for {trainer.world_size} processes, which {strategy.__name__} does not "
            f"use: {afterwards}"
        )


def world_of(trainer: Trainer) -> World:
    """The trainer's processes."""
    if trainer.world_size == 1:
        return World()
    return World(torch.distributed.group.WORLD, trainer.strategy.root_device)


def place_of(trainer: Trainer) -> torch.device:
    """Where to fit: on the trainer's device, or on the CPU where that has no float64."""
    device = trainer.strategy.root_device
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether this is a quick look at the pipeline, which leaves no files."""
    return bool(getattr(trainer, "fast_dev_run", False))  # set where type checkers do not see it


def trainer_with(callback: Callback, knows: Callable[[Trainer], bool]) -> Trainer | None:
    """Find the trainer that has this callback and that `knows`.

    Lightning calls no hook in the process that spawned the others.
    """
    things = gc.get_objects()
    kinds = {id(kind): kind for kind in map(type, things)}  # by id: a metaclass may forbid hashing
    trainers = {key for key, kind in kinds.items() if is_a(kind, "Trainer")}
    found = (thing for thing in things if id(type(thing)) in trainers)
    return next((t for t in found if any(callback is c for c in getattr(t, "callbacks", ())) and knows(t)), None)


def monitored(trainer: Trainer) -> list[ModelCheckpoint]:
    """The checkpoint callbacks that know which weights are best, and keep them."""
    found: Iterable[Any] = (c for c in trainer.callbacks if is_a(type(c), "ModelCheckpoint"))  # type: ignore[attr-defined]
    return [checkpoint for checkpoint in found if checkpoint.monitor and checkpoint.save_top_k != 0]


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """Augmentation in `on_after_batch_transfer` asks `trainer.training`; let it hear no."""
    stages = sys.modules[type(trainer.state).__module__]  # of the trainer's own package
    before, trainer.state.stage = trainer.state.stage, stages.RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = before


def as_in_training(trainer: Trainer, unpack: Unpack) -> Unpack:
    """The user's `unpack`, after the module's transfer hooks and the precision plugin as in a training step."""

    def unpacked(batch: Any) -> Any:
        inputs, *targets = unpack(trainer.strategy.batch_to_device(batch))
        return trainer.precision_plugin.convert_input(inputs), *targets

    return unpacked


def training_data(trainer: Trainer) -> Source:
    """The loader that the network is trained on, and what it is."""
    trainer.fit_loop.setup_data()
    found = only(trainer.train_dataloader, "train_loader")
    return found, "the training data (with their augmentation, if any)"


def validation_data(trainer: Trainer) -> Source:
    """The first validation loader, if there is one, and what it is."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    try:
        loop.setup_data()
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":  # a validation_step, but no val_dataloader
            raise
    loaders = trainer.val_dataloaders
    if loaders is None:  # given to fit(), which sets them aside where the module has no validation_step
        given = getattr(loop._data_source, "instance", None)
        loaders = None if _has_loaders(given) else given
    for owner in _owners(trainer):
        if loaders is None and not _is_default(owner.val_dataloader):
            loaders = owner.val_dataloader()  # the module has no validation_step, so Lightning did not ask
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        if not loaders:
            return None, "nothing"
        return only(loaders[0], "calibration_loader"), f"the first of {len(loaders)} validation loaders"
    if loaders is None or len_of(loaders) == 0:
        return None, "nothing"
    return only(loaders, "calibration_loader"), "the validation data"


def data_of(trainer: Trainer, method: str, argument: str) -> Source | None:
    """The loader that a `method` of the datamodule or the module gives, and what it is; None where none has it."""
    for owner in _owners(trainer):
        if callable(getattr(owner, method, None)):
            return only(getattr(owner, method)(), argument), f"the data of {type(owner).__name__}.{method}()"
    return None


def only(loader: Any, argument: str) -> Any:
    """Return `loader`; raise an error that names the `argument` to pass if there is none or if there are several."""
    if loader is None:
        raise ValueError(f"the trainer has no data for ELLA's {argument}: pass {argument}= to ELLACallback.")
    if isinstance(loader, (list, tuple, Mapping)):
        raise TypeError(
            f"ELLA needs one DataLoader, but the trainer has a {type(loader).__name__} of {len(loader)}: "
            f"pass {argument}= to ELLACallback."
        )
    return loader


def bars(trainer: Trainer) -> Progress:
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
    return with_rich if is_a(type(bar), "RichProgressBar") else with_tqdm


@contextmanager
def _rich_display(trainer: Trainer, bar: Any) -> Iterator[Any]:
    """The display that the trainer's bar is drawn on, or one like it where it has been stopped or never started."""
    from rich.progress import Progress as RichProgress

    if bar.progress is not None and bar.progress.live.is_started:
        yield bar.progress
    else:
        with RichProgress(*bar.configure_columns(trainer)) as display:
            yield display


def _owners(trainer: Trainer) -> list[Any]:
    """Who may have data: the datamodule before the module."""
    owners: list[LightningModule | Any | None] = [getattr(trainer, "datamodule", None), trainer.lightning_module]
    return [owner for owner in owners if owner is not None]


def _has_loaders(thing: Any) -> bool:
    """Whether Lightning would ask `thing` for its loaders, rather than take it for one."""
    return thing is None or is_a(type(thing), "LightningModule", "LightningDataModule")


def _is_default(method: Any) -> bool:
    """Whether a loader method is Lightning's own, which only raises."""
    package = getattr(method, "__module__", "").partition(".")[0]
    return package in PACKAGES and getattr(method, "__qualname__", "").startswith("DataHooks.")
