"""Files of tensors that are whole or not there, and that are believed only if they are what was written."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM = "sha256"
T = TypeVar("T")
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # by name: type as in the file ("F64") and shape


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file; it replaces an older one in one step, and only when it is safe on the disk.

    Raises:
        OSError: if it cannot be written: no room, no permission. An older file is then still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, unfinished, {**metadata, CHECKSUM: _checksum(contiguous, metadata)})
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}).") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return path


def read(
    path: str | os.PathLike[str],
    kind: str,
    device: torch.device | str = "cpu",
    accept: Callable[[dict[str, str], Shapes], None] = lambda metadata, shapes: None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write` wrote: tensors by name, and the metadata. No code in a file is ever run.

    Args:
        path: the file.
        kind: what its metadata must have as "format".
        device: where the tensors go.
        accept: raises a ValueError for metadata and shapes that are not wanted, before any tensor is read.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is not of this kind, or not as it was written.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:  # checks that the header describes the file to the last byte
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise ValueError(f"{path} is not a file of the format {kind!r}.")
            names = list(file.keys())
            parts = {name: file.get_slice(name) for name in names}
            accept(metadata, {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()})
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): write it again.") from error
    if metadata.pop(CHECKSUM, None) != _checksum(tensors, metadata):
        raise ValueError(f"{path} is not as it was written (its checksum is wrong): write it again.")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


def named(things: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Those whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): thing for name, thing in things.items() if name.startswith(prefix)}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of everything in the file."""
    found = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
