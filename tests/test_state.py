"""Data with habits: a look at them, and a fit, changes nothing of what training gets from them."""

import collections
import functools
import io
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_callback import SMALL, Data, Net, blobs, make_trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from lightning_ella import ELLACallback
from lightning_ella.state import State

POINTS = list(blobs(100, 0))
ITEMS = 64  # of each data set


class Habits(Dataset):
    """Gives points by a function of the data set and the number, which may keep what it likes in `self.kept`."""

    def __init__(self, kept: Any, item: Callable[[Any, int], Any]):
        self.kept, self.item = kept, item

    def __len__(self):
        return ITEMS

    def __getitem__(self, i):
        return self.item(self.kept, i)


class Counter:
    def __init__(self):
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        return 1 / self.count


def scaled(i: int, by: float) -> tuple[Any, Any]:
    x, y = POINTS[i]
    return x * by, y


def mixed(buffer: list, i: int) -> tuple[Any, Any]:
    buffer.append(i)
    if len(buffer) > 9:
        del buffer[0]
    return scaled(i, 1 + float(POINTS[buffer[0]][0][0]))


def cached(cache: dict, i: int) -> tuple[Any, Any]:
    if i not in cache:
        cache[i] = scaled(i, 1 + float(torch.rand(())))
    return cache[i]


def counted(counts: collections.Counter, i: int) -> tuple[Any, Any]:
    counts[i] += 1
    return scaled(i, counts[i] + counts.total())


def moved(array: np.ndarray, i: int) -> tuple[Any, Any]:
    array[i % len(array)] += 0.1
    return scaled(i, float(array.sum()))


class Text(io.BytesIO):
    """Cannot be written to."""

    def writable(self) -> bool:
        return False


TEXT = Text(bytes(10_000))


def read(file: io.BytesIO, i: int) -> tuple[Any, Any]:
    return scaled(i, 1 + len(file.read(3)) / 100)


DRAWN = np.random.default_rng(0)  # a random state of the whole module


def drawn(_: None, i: int) -> tuple[Any, Any]:
    return scaled(i, float(DRAWN.random()))


def loader(kept: Any, item: Callable, **options: Any) -> DataLoader:
    return DataLoader(Habits(kept, item), **{"batch_size": 16, "shuffle": True} | options)


def collating() -> Callable:
    rng, calls = random.Random(0), 0

    def collate(items: list) -> Any:
        nonlocal calls
        calls += 1
        x, y = default_collate(items)
        return x * (rng.random() + 1 / calls), y

    return collate


class Stream(IterableDataset):
    """Shuffles by a buffer that it keeps from epoch to epoch."""

    def __init__(self):
        self.buffer: list[int] = []

    def __iter__(self):
        for i in range(ITEMS):
            self.buffer.append(i)
            if len(self.buffer) > 10:
                yield POINTS[self.buffer.pop(0)]


class Plain(IterableDataset):
    def __iter__(self):
        yield from POINTS[:ITEMS]


class Hardest(Sampler):
    def __init__(self):
        self.weights = {"all": np.ones(ITEMS)}

    def __len__(self):
        return ITEMS

    def __iter__(self):
        order = (-self.weights["all"]).argsort(kind="stable")
        self.weights["all"][order[:7]] -= 0.5
        return iter(order.tolist())


class Wrapped:
    """A loader of one's own around a loader whose workers go on from epoch to epoch."""

    def __init__(self):
        self.loader = DataLoader(POINTS[:ITEMS], 16, shuffle=True)  # type: ignore[arg-type]

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)


def partly(item: Callable, kept: Any, unused: None, i: int) -> tuple[Any, Any]:
    return item(kept, i)


LOADERS: dict[str, Callable[[], Any]] = {
    "a list": lambda: loader([], mixed),
    "a dict": lambda: loader({}, cached),
    "a Counter": lambda: loader(collections.Counter(), counted),
    "an array": lambda: loader(np.zeros(5), moved),
    "a tensor in a tuple": lambda: loader((torch.zeros(5),), lambda kept, i: moved(kept[0], i)),
    "an object": lambda: loader(Counter(), lambda counter, i: scaled(i, counter())),
    "a namespace": lambda: loader(types.SimpleNamespace(n=Counter()), lambda kept, i: scaled(i, kept.n())),
    "a partial": lambda: loader(None, functools.partial(partly, mixed, [])),
    "a file": lambda: loader(TEXT, read),
    "a generator": lambda: loader(np.random.RandomState(0), lambda rng, i: scaled(i, rng.rand())),
    "a global generator": lambda: loader(None, drawn),
    "a collate function": lambda: loader(None, lambda _, i: POINTS[i], collate_fn=collating()),
    "a stream": lambda: DataLoader(Stream(), 16),
    "a sampler": lambda: loader(None, lambda _, i: POINTS[i], shuffle=False, sampler=Hardest()),
    "workers that persist": lambda: DataLoader(Plain(), 16, num_workers=1, persistent_workers=True),
    "a wrapper": Wrapped,
}


@pytest.mark.filterwarnings("ignore:.*does not have a length.*")
@pytest.mark.parametrize("kind", LOADERS)
def test_training_gets_what_it_would_get_without_the_callback(tmp_path: Path, kind: str):
    def train(*callbacks: ELLACallback) -> Net:
        torch.manual_seed(0)
        DRAWN.bit_generator.state = np.random.default_rng(0).bit_generator.state
        TEXT.seek(0)
        module = Net()
        settings: dict[str, Any] = {"enable_checkpointing": False, "num_sanity_val_steps": 0}
        trainer = make_trainer(tmp_path, *callbacks, **settings)
        trainer.fit(module, LOADERS[kind](), Data().val_dataloader())
        return module

    ella = ELLACallback(**SMALL)
    expected, found = train(), train(ella)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert ella.predictor.rank == SMALL["rank"]


class Normalised(Data):
    """Follows the mean of its batches."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean()
        return batch[0] - self.mean, batch[1]


class NormalisedByAnObject(Net):
    def __init__(self):
        super().__init__()
        self.means = types.SimpleNamespace(all=[torch.zeros(())])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.means.all.append(0.9 * self.means.all[-1] + 0.1 * batch[0].mean())
        return batch[0] - self.means.all[-1], batch[1]


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")
@pytest.mark.parametrize(("module", "data"), [(Net, Normalised), (NormalisedByAnObject, Data)])
def test_what_hooks_keep_is_put_back(tmp_path: Path, module: type[Net], data: type[Data]):
    def train(*callbacks: ELLACallback) -> Net:
        torch.manual_seed(0)
        made = module()
        make_trainer(tmp_path, *callbacks, enable_checkpointing=False).fit(made, data())
        return made

    expected, found = train(), train(ELLACallback(**SMALL))
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_data_set_is_known_by_whatever_way_it_is_found_first():
    loader = DataLoader(data := Habits(Counter(), lambda counter, i: counter()))
    vars(loader).clear()
    vars(loader).update({"found first": data.kept, "arguments": (data,), "dataset": data})  # as Lightning keeps them
    memory = State(loader)
    data[0]
    assert memory.put_back()
    assert data.kept.count == 0


def test_what_a_data_set_has_loaded_stays():
    data = Habits(None, lambda _, i: i)
    data.rng = None  # type: ignore[attr-defined]
    memory = State(DataLoader(data))
    data.rng = np.random.default_rng(0)  # type: ignore[attr-defined] - and is drawn from
    data.kept, data.more = np.ones(3), "loaded"  # type: ignore[attr-defined]
    memory.put_back()
    assert data.kept is not None
    assert data.more == "loaded"  # type: ignore[attr-defined]
    assert data.rng is None  # type: ignore[attr-defined]


def test_it_says_whether_something_had_changed():
    kept: dict[str, Any] = {"order": [3, 1], "rng": random.Random(0), "array": np.arange(3.0), "set": {1}}
    memory = State(kept)
    assert not memory.put_back()
    for change in (
        lambda: kept["order"].reverse(),
        lambda: kept["rng"].random(),
        lambda: kept["array"].fill(0),
        lambda: kept["set"].add(2),
        lambda: kept.pop("order"),
    ):
        change()
        assert memory.put_back()
        assert not memory.put_back()
    assert kept["order"] == [3, 1]
