"""Several processes that fit together: who takes which points, and how sums and failures get to all of them.

Work and exchange alternate. Work happens inside `World.together`: each process on its own, and if one of them fails,
all raise. Sums and broadcasts come after it, when none is missing, so that no process waits for one that has given up.

NCCL has no exception for a process that is lost: it waits, and then ends the others. So whatever is small goes over
gloo, and before large tensors go over NCCL every process has answered there.
"""

import logging
import socket
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")

FEW = 64  # numbers, which go over gloo wherever they are: their sum is waited for anyway


class _StoppedError(Exception):
    """Another process has failed; this one has no error of its own."""


class World:
    """The processes of a process group, or this one alone.

    Args:
        group: its processes fit together; None for this one alone.
        device: the GPU of this process, which NCCL works on (untested); gloo takes the CPU.

    Raises:
        ValueError: if the GPU is not the current one, so that NCCL would take another.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"):
        self.group, self.control, self.device = group, group, torch.device("cpu")
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._stage = "the start"
        self._stages = 0
        if group is not None and not _works_on_cpus(group):
            self.device = torch.device(device)
        if group is not None and _is_nccl(group):
            with self._contact():
                self.control = _control_of(group)
        self._name = self.object_from_first(f"ella/{uuid.uuid4()}")
        with self.together("the choice of GPUs"):
            _check_current(self.device)

    @classmethod
    def of_all(cls, device: torch.device) -> "World":
        """All processes of torch.distributed's default group."""
        return cls(dist.group.WORLD, device)

    @property
    def first(self) -> bool:
        """Whether this is the process that does what is done once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What of `items` is this process's to do: every `size`-th of them, none twice and none left out."""
        return items[self.rank :: self.size]

    @contextmanager
    def together(self, stage: str) -> Iterator[None]:
        """Let every process do its part of a stage, and raise on all of them if one fails.

        Raises:
            RuntimeError: with the message of the process that failed, on the others.
        """
        if self.size == 1:
            yield
            return
        self._stage, self._stages = stage, self._stages + 1
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
            with self._contact():
                _get_default_store().set(self._flag(), "failed")
        failures = self._failures(error)
        if error is not None and not isinstance(error, _StoppedError):
            raise error
        if failures:
            rank, message = failures[0]
            raise RuntimeError(
                f"process {rank} of {self.size} failed during {stage}, so all of them stopped: {message}"
            )
        assert error is None

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """Go through this process's batches of a stage, and stop where another process has failed meanwhile."""
        for batch in batches:
            if self.size > 1:
                with self._contact():
                    failed = _get_default_store().check([self._flag()])
                if failed:
                    raise _StoppedError
            yield batch

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.size > 1:
            self._in_place(tensor, lambda values, group: dist.all_reduce(values, group=group))
        return tensor

    def smallest(self, number: int) -> int:
        """Find the least of the processes' numbers."""
        least = torch.tensor(number)
        if self.size > 1:
            self._in_place(least, lambda values, group: dist.all_reduce(values, dist.ReduceOp.MIN, group=group))
        return int(least)

    def from_first(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor by the first process's, in place."""
        if self.size > 1:
            self._in_place(tensor, lambda values, group: dist.broadcast(values, group=group, group_src=0))
        return tensor

    def object_from_first(self, value: T) -> T:
        """Give every process the first one's object; for small ones."""
        values = [value]
        if self.size > 1:
            with self._contact():
                dist.broadcast_object_list(values, group=self.control, group_src=0, device=torch.device("cpu"))
        return values[0]

    def tensors_from_first(self, tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """Give every process the first one's tensors, by name, on `device`."""
        if self.size == 1:
            return dict(tensors)
        kinds = self.object_from_first([(name, value.shape, value.dtype) for name, value in tensors.items()])
        found = {}
        for name, shape, dtype in kinds:
            value = tensors[name] if self.first else torch.empty(shape, dtype=dtype, device=device)
            found[name] = self.from_first(value.contiguous())
        return found

    def gather_rows(self, rows: Tensor, total: int | None = None) -> Tensor | None:
        """Put together rows that were shared out in turns, (n, …), on the first process; None on the others.

        `total` is how many there are on all of them, where `share` has shared them out; else all are asked.
        """
        if self.size == 1:
            return rows
        shares = [len(range(rank, total or 0, self.size)) for rank in range(self.size)]
        counts = self.everyone(len(rows)) if total is None else shares
        padded = rows.new_zeros(max(counts), *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.first else None
        with self._contact():
            dist.gather(padded, parts, group=self.group, group_dst=0)
        if parts is None:
            return None
        there = torch.arange(max(counts)).unsqueeze(1) < torch.tensor(counts)  # (most, size)
        return torch.stack(parts, 1)[there.to(self.device)].to(rows.device)

    def check_same(self, value: str, what: str) -> None:
        """Raise a ValueError, on all processes, unless they all have the same."""
        if len(set(self.everyone(value))) > 1:
            raise ValueError(f"the processes do not have the same {what}.")

    def neighbours(self) -> int:
        """How many of the processes run on this machine and share its memory."""
        return self.everyone(socket.gethostname()).count(socket.gethostname())

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Let the first process alone say what all of them would."""
        logger = logging.getLogger(__package__)
        level = logger.level
        if not self.first:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)

    def _flag(self) -> str:
        """What it says in the group's store that a process has failed in this stage."""
        return f"{self._name}/{self._stages}"

    def _failures(self, error: Exception | None) -> list[tuple[int, str]]:
        """Rank and message of each process with an error of its own."""
        failed = self.sum(torch.tensor(int(error is not None)))
        if not failed:
            return []
        described = None if error is None or isinstance(error, _StoppedError) else f"{type(error).__name__}: {error}"
        return [(rank, text) for rank, text in enumerate(self.everyone(described)) if text is not None]

    def everyone(self, value: Any) -> list[Any]:
        """Each process's object, on all of them; for small ones."""
        values = [value] * self.size
        if self.size > 1:
            with self._contact():
                dist.all_gather_object(values, value, group=self.control)
        return values

    def _in_place(self, tensor: Tensor, collective: Callable[[Tensor, Any], Any]) -> None:
        few = tensor.numel() <= FEW
        with self._contact():  # NCCL's is over when its result has been copied, or never
            values = tensor.to("cpu" if few else self.device).contiguous()
            collective(values, self.control if few else self.group)
            if values is not tensor:
                tensor.copy_(values)

    @contextmanager
    def _contact(self) -> Iterator[None]:
        """Say in one sentence that a process is gone."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are all of this kind
            raise RuntimeError(
                f"contact with another process was lost during {self._stage} ({str(error).splitlines()[0]}): it was "
                f"killed or took longer than the process group's timeout{self._timeout()}. Fit again from the "
                "checkpoint with max_epochs=0 and resume=True; DDPStrategy(timeout=…) waits longer."
            ) from error

    def _timeout(self) -> str:
        found = None if self.control is None else _timeout_of(self.control)
        return "" if found is None else f" of {found.total_seconds():.0f} s"


_controls: weakref.WeakKeyDictionary[dist.ProcessGroup, Any] = weakref.WeakKeyDictionary()


def _control_of(group: dist.ProcessGroup) -> Any:
    """A gloo group of the same processes, with the same timeout; one for each group."""
    if group not in _controls:
        ranks = dist.get_process_group_ranks(group)
        timeout = _timeout_of(group)
        some = len(ranks) < dist.get_world_size()  # of all processes: the others do not take part
        _controls[group] = dist.new_group(ranks, timeout, backend="gloo", use_local_synchronization=some)
    return _controls[group]


def _is_nccl(group: dist.ProcessGroup) -> bool:
    """Whether tensors on GPUs go over NCCL in this group."""
    return "nccl" in str(dist.get_backend_config(group))


def _works_on_cpus(group: dist.ProcessGroup) -> bool:
    """Whether tensors on the CPU can go over this group, and nothing is faster."""
    return "cpu:" in str(dist.get_backend_config(group)) and not _is_nccl(group)


def _check_current(device: torch.device) -> None:
    index = device.index
    if device.type == "cuda" and index is not None and torch.cuda.current_device() != index:
        raise ValueError(
            f"the network is on cuda:{index}, but this process works on cuda:{torch.cuda.current_device()}, which NCCL "
            f"would take: call torch.cuda.set_device({index}) first."
        )


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    for device in ("cuda", "cpu"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (AttributeError, RuntimeError):  # not public; or not a device of this group
            continue
    return None
