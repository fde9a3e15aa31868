"""Stages of a fit that are done, kept in a file, so that a fit that was cut short need not do them again."""

import logging
from collections.abc import Callable, Iterable, Mapping
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
        older: files to go on from, the first one that is of the same fit.
    """

    def __init__(self, path: Path | None = None, older: Iterable[Path] = ()):
        self.path, self.older = path, older
        self._metadata: dict[str, str] = {}
        self._done: dict[str, Tensor] = {}
        self._read: Path | None = None  # the file that is gone on from

    def open(self, fit: str, world: World) -> None:
        """Find what is done of the fit that is known as `fit`: its weights, settings and data."""
        self._metadata = {"format": FORMAT, "fit": fit}

        def accept(metadata: dict[str, str], shapes: artefact.Shapes) -> None:
            if metadata.get("fit") != fit:
                raise ValueError("they are of other weights, settings or data.")

        for path in self.older if world.first else ():
            try:
                self._done, _ = artefact.read(path, FORMAT, accept=accept)
            except (OSError, ValueError) as error:
                log.info("ELLA: the stages in %s are not used: %s", path, error)
            else:
                self._read = path
                return

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
        with world.together(f"reading the {stage}"):
            found = {name: value.to(device) for name, value in found.items()}
        found = world.tensors_from_first(found, device)
        if found:
            log.info("ELLA: %s read from %s.", stage, self._read)
            generator.set_state(found.pop("generator").cpu())
            return found
        found = dict(work())
        self._done |= {f"{stage}/{name}": value for name, value in found.items()}
        self._done[f"{stage}/generator"] = generator.get_state()
        with world.together(f"writing the {stage}"):
            if self.path is not None and world.first:
                try:
                    artefact.write(self.path, self._done, self._metadata)
                except OSError as error:
                    log.warning("ELLA: this fit cannot be resumed, because %s", error)
        return found

    def forget(self) -> None:
        """Delete the files: the posterior is written."""
        for path in (self.path, self._read):
            if path is not None:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
