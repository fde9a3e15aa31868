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

FORMAT = "lightning-ella stages 2"


class Stages:
    """What the stages of one fit gave, each in a file of its own until the posterior is written.

    Args:
        path: of the posterior; the first process writes the stages beside it. None keeps none.
        older: posteriors beside which a fit may have left stages to go on from.
    """

    def __init__(self, path: Path | None = None, older: Iterable[Path] = ()):
        self.path, self.older = path, list(older)
        self._metadata: dict[str, str] = {}
        self._files: list[Path] = []

    def open(self, fit: str) -> None:
        """Begin the fit that is known as `fit`: its weights, settings and data."""
        self._metadata = {"format": FORMAT, "fit": fit}

    def do(
        self,
        stage: str,
        world: World,
        generator: Generator,
        device: torch.device,
        work: Callable[[], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """What `work` gives, by name: read back if it is done, else done now and written."""
        with world.together(f"reading the {stage}"):
            found = self._find(stage, device) if world.first else {}
        found = world.tensors_from_first(found, device)
        if found:
            generator.set_state(found.pop("generator").cpu())
            return found
        found = dict(work())
        with world.together(f"writing the {stage}"):
            if self.path is not None and world.first:
                self._write(file_of(self.path, stage), found | {"generator": generator.get_state()})
        return found

    def forget(self) -> None:
        """Delete the files: the posterior is written."""
        for path in self._files:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _find(self, stage: str, device: torch.device) -> dict[str, Tensor]:
        def accept(metadata: dict[str, str], shapes: artefact.Shapes) -> None:
            if metadata.get("fit") != self._metadata["fit"]:
                raise ValueError("it is of other weights, settings or data.")

        for path in (file_of(older, stage) for older in self.older):
            try:
                found, _ = artefact.read(path, FORMAT, device, accept)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                log.info("ELLA: %s is not used: %s", path, error)
            else:
                log.info("ELLA: %s read from %s.", stage, path)
                self._files.append(path)
                return found
        return {}

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            self._files.append(artefact.write(path, tensors, self._metadata))
        except OSError as error:
            log.warning("ELLA: this fit cannot be resumed, because %s", error)


def file_of(posterior: Path, stage: str) -> Path:
    """Where a stage of a fit is kept."""
    return posterior.with_name(f"{posterior.name}.{stage}.stage")
