"""How fits end, told to whoever asks for the predictor: the user, a copy of the callback, the process that spawned."""

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Self

from lightning.pytorch import Trainer

from .predictor import ELLAPredictor


@dataclass
class Outcome:
    """How a fit ended: with a predictor, or with the reason why there is none."""

    whose: str  # the network's class
    predictor: ELLAPredictor | None = None
    reason: str = ""
    file: str = ""  # of the posterior
    told: bool = False  # to the user of another copy of the callback


class Refusal:
    """Stands where a predictor would, and says why there is none."""

    def __init__(self, kind: type[Exception], reason: str):
        self._kind, self._reason = kind, reason

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise the reason."""
        raise self._kind(self._reason)

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise self._kind(self._reason)


class Shared:
    """What a callback and its copies know of each other: how the latest fit of any of them ended."""

    def __init__(self):
        self.latest: Outcome | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Record(NamedTuple):
    """What a process that fitted tells the one that spawned it."""

    writer: int  # process id
    path: str = ""
    checkpoint: str | None = None  # the best one then
    failure: str = ""


def records(trainer: Trainer) -> dict[str, Record]:
    """Records of fits, by the callback's `path`: state that spawned processes send back."""
    return vars(trainer.state).setdefault("ella", {})
