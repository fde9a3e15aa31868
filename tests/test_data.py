"""A DataLoader as numbered points."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_ella.data import Points, draw, seeded

DATA = TensorDataset(torch.arange(10.0), torch.arange(10))


def visited(points: Points) -> list[int]:
    return [int(y) for _, targets, _ in points.batches(range(len(points)), "cpu") for y in targets]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.booleans(), st.booleans())
def test_every_point_comes_once_in_order(batch_size: int, shuffle: bool, drop_last: bool):
    assert visited(Points(DataLoader(DATA, batch_size, shuffle=shuffle, drop_last=drop_last))) == list(range(10))


def test_workers_and_weights_change_nothing():
    sampler = WeightedRandomSampler([1.0] * 9 + [0.0], 10)
    assert visited(Points(DataLoader(DATA, 4, sampler=sampler, num_workers=1))) == list(range(10))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2, "sampler": SubsetRandomSampler([7, 2, 5])},
        {"batch_sampler": BatchSampler(SubsetRandomSampler([7, 2, 5]), 2, drop_last=False)},
        {"batch_sampler": [[7, 2], [5]]},
    ],
)
def test_a_hold_out_by_sampler_is_respected(options: dict):
    assert visited(Points(DataLoader(DATA, **options))) == [2, 5, 7]


def test_looking_does_not_change_what_a_sampler_gives_next():
    class Custom(SubsetRandomSampler):
        pass

    class Wrapped:
        def __init__(self, inner: SubsetRandomSampler):
            self.inner, self.generator = inner, inner.generator

        def __iter__(self):
            return iter(self.inner)

    orders = []
    for look in (False, True):
        sampler = Wrapped(Custom(range(8), torch.Generator().manual_seed(0)))
        loader = DataLoader(DATA, batch_size=2, sampler=sampler)
        if look:
            assert visited(Points(loader)) == list(range(8))
        orders.append(list(sampler))
    assert orders[0] == orders[1]


def test_names_of_classes_are_no_labels():
    data = TensorDataset(torch.arange(3), torch.arange(3))
    data.targets = ["cat", "dog", "cat"]
    assert Points(DataLoader(data)).targets is None


def test_chosen_points_come_in_their_order():
    points = Points(DataLoader(Subset(DATA, [9, 8, 7]), 2))
    assert [y.tolist() for _, y, _ in points.batches([2, 0], "cpu")] == [[7, 9]]


def test_labels_of_a_subset_need_no_inputs():
    class Labelled(Dataset):
        targets = (3, 1, 2)

        def __len__(self):
            return 3

        def __getitem__(self, index: int):
            raise AssertionError("an input was read")

    assert Points(DataLoader(Subset(Labelled(), [2, 0]), 2)).labels([1, 0]).tolist() == [3, 2]


def test_augmentation_is_noticed():
    class Noisy(TensorDataset):
        def __getitem__(self, index: int):
            return torch.rand(2), 0

    assert Points(DataLoader(DATA)).is_repeatable()
    assert not Points(DataLoader(Noisy(torch.zeros(5)))).is_repeatable()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(Stream()), TypeError, "IterableDataset .* map-style"),
        ([DataLoader(DATA)], TypeError, r"a list \(DataLoader\): pass train_loader="),
        (DataLoader(DATA, batch_size=None), ValueError, "batch_size="),
    ],
)
def test_unusable_loaders_are_refused(loader: DataLoader, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Points(loader)


def test_other_batches_ask_for_unpack():
    loader = DataLoader([{"a": torch.zeros(1), "b": 0}], 1)
    with pytest.raises(TypeError, match="a dict with 'a', 'b': pass unpack="):
        visited(Points(loader))
    assert visited(Points(loader, lambda batch: (batch["a"], batch["b"]))) == [0]


def test_draws_are_without_replacement():
    assert sorted(draw(10, 10, torch.Generator())) == list(range(10))
    assert draw(None, 3, torch.Generator()) == [0, 1, 2]
    assert len(set(draw(5, 10, torch.Generator()))) == 5


def test_the_users_random_numbers_are_left_alone():
    def numbers() -> tuple:
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    def reset() -> None:
        torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002

    reset()
    expected = numbers()
    reset()
    with seeded(3):
        first = numbers()
    assert numbers() == expected
    with seeded(3):
        assert numbers() == first
