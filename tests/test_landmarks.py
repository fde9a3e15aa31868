"""Which points are drawn."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ella.data import Points, points_of
from lightning_ella.landmarks import LANDMARKS


def points(labels: Tensor) -> Points:
    return points_of(DataLoader(TensorDataset(torch.arange(len(labels)), labels), 16))


def stream(labels: Tensor, keep: int = 5000) -> Points:
    return points_of(list(DataLoader(TensorDataset(torch.arange(len(labels)), labels), 16)), keep=keep)


@pytest.mark.parametrize("make", [points, stream, lambda labels: stream(labels, 60)])
@pytest.mark.parametrize("rule", LANDMARKS)
def test_inputs_are_distinct_and_outputs_in_range(rule: str, make):
    numbers, outputs = LANDMARKS[rule](made := make(torch.arange(100) % 3), 50, 4, torch.Generator())
    assert len(set(numbers)) == 50
    assert set(numbers) <= set(made.numbers)
    assert outputs.shape == (50,)
    assert set(outputs.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("make", [points, stream])
@pytest.mark.parametrize("rule", LANDMARKS)
def test_a_seed_fixes_the_draw(rule: str, make):
    draws = [LANDMARKS[rule](make(torch.arange(100) % 3), 20, 3, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert draws[0].numbers == draws[1].numbers
    assert draws[0].outputs.equal(draws[1].outputs)
    assert draws[0].numbers != draws[2].numbers


@pytest.mark.parametrize("rule", LANDMARKS)
def test_points_of_one_batch_are_visited_together(rule: str):
    made = stream(torch.arange(200) % 3)
    numbers, _ = LANDMARKS[rule](made, 50, 4, torch.Generator().manual_seed(0))
    assert numbers == made.arranged(numbers)
    assert max(numbers) > 150


@pytest.mark.parametrize("with_targets", [True, False])
def test_classes_are_balanced_however_rare(with_targets: bool):
    labels = torch.cat([torch.zeros(900), torch.ones(60), torch.full((40,), 2)]).long()
    data = points(labels)
    if with_targets:
        data.loader.dataset.targets = labels.tolist()  # as torchvision's data sets have
    numbers, _ = LANDMARKS["uniform-class"](data, 250, 3, torch.Generator().manual_seed(0))
    assert labels[numbers].bincount().tolist() == [150, 60, 40]


def test_classes_of_a_stream_are_balanced():
    labels = torch.cat([torch.zeros(900), torch.ones(60), torch.full((40,), 2)]).long()
    data = stream(labels)
    numbers, _ = LANDMARKS["uniform-class"](data, 250, 3, torch.Generator().manual_seed(0))
    assert data.labels(numbers).bincount().tolist() == [150, 60, 40]


def test_targets_that_are_no_classes_are_refused():
    with pytest.raises(ValueError, match="landmarks='uniform'"):
        LANDMARKS["uniform-class"](points(torch.rand(50)), 10, 3, torch.Generator())
