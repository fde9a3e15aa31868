"""What becomes of functions that pickle cannot keep: they are left out, and missed only where they are needed."""

import pickle
from multiprocessing.context import get_spawning_popen
from typing import Any, NoReturn

from torch.utils.data import DataLoader


class LeftOut:
    """Stands, in what was restored from a pickle, for an argument that pickle could not keep."""

    def __init__(self, name: str, reason: str, instead: str):
        self.name, self.reason, self.instead = name, reason, instead

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError that says what is missing, and what to pass instead."""
        raise ValueError(
            f"{self.name}= was left out of the pickle that this was restored from ({self.reason}): pass a function of "
            f"a module, which pickle keeps, instead of a lambda or a local function, or {self.instead}."
        )


def portable(name: str, value: Any, instead: str = "") -> Any:
    """Return `value`, or what stands for it if it cannot be pickled, and says what to do `instead`.

    A DataLoader on its way to a spawned process is not tried, as its tensors go there by shared memory.
    """
    if isinstance(value, DataLoader) and get_spawning_popen() is not None:
        return value
    try:
        pickle.Pickler(_Nowhere()).dump(value)  # type: ignore[arg-type]
    except Exception as error:  # whatever a class of the user's raises
        return LeftOut(name, str(error), instead or f"set .{name} again")
    return value


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)
