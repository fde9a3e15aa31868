"""Stages of a fit that are done, kept in a file, so that a fit that was cut short need not do them again."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Generator, Tensor

from . import artefact
from .distributed import World

log = logging.getLogger(__name__)

FORMAT = "lightning-ella stages 1"


class Stages:
    """What the stages of one fit gave, by stage and name.

    Args:
        path: of the file, written after each stage by the first process; None keeps none.
        resume: read the file first, if it is there and of the same fit.
    """

    def __init__(self, path: Path | None = None, *, resume: bool = False):
        self.path, self.resume = path, resume
        self._metadata: dict[str, str] = {}
        self._done: dict[str, Tensor] = {}

    def open(self, fit: str, world: World) -> None:
        """Find what is done of the fit that is known as `fit`: its weights, settings and data."""
        self._metadata = {"format": FORMAT, "fit": fit}
        if self.path is None or not self.resume or not world.first:
            return
        try:
            self._done, found = artefact.read(self.path, FORMAT)
        except FileNotFoundError:
            log.info("ELLA: nothing to resume at %s.", self.path)
        except ValueError as error:
            log.warning("ELLA: starting from the beginning, because %s", error)
        else:
            if found != self._metadata:
                log.warning("ELLA: starting from the beginning: %s is of other weights, settings or data.", self.path)
                self._done = {}

    def do(
        self,
        stage: str,
        world: World,
        generator: Generator,
        device: torch.device,
        work: Callable[[], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """What `work` gives, by name: read back if it is done, else done now and written."""
        found = {name.partition("/")[2]: value for name, value in self._done.items() if name.startswith(f"{stage}/")}
        found = world.tensors_from_first({name: value.to(device) for name, value in found.items()}, device)
        if found:
            log.info("ELLA: %s read from %s.", stage, self.path)
            generator.set_state(found.pop("generator").cpu())
            return found
        found = dict(work())
        self._done |= {f"{stage}/{name}": value for name, value in found.items()}
        self._done[f"{stage}/generator"] = generator.get_state()
        if self.path is not None and world.first:
            try:
                artefact.write(self.path, self._done, self._metadata)
            except OSError as error:
                log.warning("ELLA: this fit cannot be resumed, because %s", error)
        return found

    def forget(self) -> None:
        """Delete the file: the posterior is written."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
