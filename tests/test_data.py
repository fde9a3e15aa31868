"""A loader as numbered points: those that have numbers, and those that can only be iterated."""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_ella.batches import Picked
from lightning_ella.data import LONGEST, Points, draw, points_of, seeded

DATA = TensorDataset(torch.arange(10.0), torch.arange(10))


def visited(points: Points) -> list[int]:
    return [int(y) for _, targets, _ in points.batches(points.numbers, "cpu") for y in targets]


# Points that have numbers


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.booleans(), st.booleans())
def test_every_point_comes_once_in_order(batch_size: int, shuffle: bool, drop_last: bool):
    assert visited(points_of(DataLoader(DATA, batch_size, shuffle=shuffle, drop_last=drop_last))) == list(range(10))


def test_workers_change_nothing():
    assert visited(points_of(DataLoader(DATA, 4, num_workers=1))) == list(range(10))


class Balanced(WeightedRandomSampler):
    """A subclass, as torch-geometric's ImbalancedSampler is one."""


class ByIndex(Sampler):
    """As torchsampler's: a weight for each of some indices."""

    def __init__(self, indices: list[int], weights: list[float]):
        self.indices, self.weights = indices, torch.tensor(weights)

    def __iter__(self):
        return (self.indices[i] for i in torch.multinomial(self.weights, 30, replacement=True))

    def __len__(self):
        return 30


class OfClasses(Sampler):
    """Its weights are of classes, not of points."""

    weights = (1.0, 0.0)

    def __iter__(self):
        return iter([1, 4, 2])


class Half(RandomSampler):
    """A subclass that gives something else."""

    def __iter__(self):
        return (i for i in super().__iter__() if i < 5)


class Repeated(Sampler):
    """As in repeated augmentation, and of one epoch that stands for several."""

    def __init__(self, times: int, of: int = 10):
        self.times, self.of = times, of

    def __iter__(self):
        for _ in range(self.times):
            yield from torch.randperm(self.of)

    def __len__(self):
        return self.times * self.of


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 2, "sampler": SubsetRandomSampler([7, 2, 5])}, [2, 5, 7]),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler([7, 2, 5]), 2, drop_last=False)}, [2, 5, 7]),
        ({"batch_sampler": [[7, 2], [5]]}, [2, 5, 7]),
        ({"sampler": WeightedRandomSampler([1.0] * 8 + [0.0, 2.0], 10)}, [*range(8), 9]),
        ({"sampler": Balanced([0.0] + [1.0] * 9, 3)}, list(range(1, 10))),
        ({"batch_sampler": BatchSampler(Balanced([0.0] + [1.0] * 9, 3), 2, drop_last=True)}, list(range(1, 10))),
        ({"sampler": ByIndex([3, 8, 9], [1.0, 0.0, 1.0])}, [3, 9]),
        ({"sampler": OfClasses()}, [1, 2, 4]),
        ({"sampler": Half(DATA)}, list(range(5))),
        ({"sampler": RandomSampler(DATA, replacement=True, num_samples=3)}, list(range(10))),
        ({"sampler": SequentialSampler(range(4))}, list(range(4))),
        ({"sampler": DistributedSampler(DATA, num_replicas=3, rank=1)}, list(range(10))),
        ({"sampler": Repeated(3)}, list(range(10))),
        ({"sampler": Repeated(90, 60)}, list(range(10))),
        ({"sampler": np.array([4, 2, 2])}, [2, 4]),
    ],
)
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_the_sampler_says_which_points_there_are(options: dict, expected: list[int]):
    data = DATA
    if getattr(options.get("sampler"), "of", 10) == 60:
        data, expected = TensorDataset(torch.arange(60.0), torch.arange(60)), list(range(60))
    points = points_of(DataLoader(data, **options))
    assert len(points) == len(expected)
    assert visited(points) == expected


class Forever(Sampler):
    def __init__(self, size: int = 64, length: int | None = None):
        self.size, self.length = size, length

    def __iter__(self):
        while True:
            yield from torch.randperm(self.size).tolist()

    def __len__(self):
        if self.length is None:
            raise TypeError
        return self.length


class Growing(Sampler):
    def __iter__(self):
        return itertools.count()


class Silent(Sampler):
    def __iter__(self):
        return itertools.repeat([])


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": Forever()},
        {"sampler": Forever(length=64)},
        {"sampler": Forever(length=10**12)},
        {"sampler": Forever(), "batch_size": None},
        {"batch_sampler": BatchSampler(Forever(), 8, drop_last=False)},
        {"batch_sampler": Silent()},
        {"sampler": Growing()},
        {"sampler": itertools.cycle([0, 1])},
    ],
)
def test_samplers_without_an_end_are_refused_at_once(options: dict):
    data = TensorDataset(torch.randn(64, 4), torch.arange(64))
    with pytest.raises(ValueError, match=r"indices without an end.* pass train_loader="):
        points_of(DataLoader(data, **options))


class NoLength(Dataset):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor(float(index)), index


def test_a_dataset_without_a_length_has_the_points_of_its_sampler():
    assert visited(points_of(DataLoader(NoLength(), 2, sampler=[3, 1, 2]))) == [1, 2, 3]
    with pytest.raises(TypeError, match="NoLength has no length: give it a __len__, or the DataLoader a sampler"):
        points_of(DataLoader(NoLength(), 2))
    with pytest.raises(ValueError, match="without an end"):
        points_of(DataLoader(NoLength(), 2, sampler=Forever()))


class Stateful(Sampler):
    """Whatever a sampler may change when it is iterated."""

    def __init__(self) -> None:
        self.order, self.array, self.epoch = list(range(10)), np.arange(10), 0
        self.torch = torch.Generator().manual_seed(0)
        self.numpy, self.old, self.python = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)

    def __iter__(self):
        self.epoch += 1
        random.shuffle(self.order)
        self.numpy.shuffle(self.array)
        yield from self.order
        yield from self.array
        yield int(torch.randint(10, (1,), generator=self.torch))
        yield from (self.old.randint(10), self.python.randrange(10), self.epoch % 10)


class Augmented(Dataset):
    """Draws from a generator of its transform, as those of MONAI do."""

    def __init__(self) -> None:
        self.transforms = [{"noise": np.random.RandomState(0)}]
        self.loads, self.loaded = 0, None

    def __len__(self):
        return 10

    def __getitem__(self, index: int):
        self.loads += 1
        self.loaded = self.loaded or object()
        return self.transforms[0]["noise"].rand(), index


def state_of_everything(loader: DataLoader) -> list:
    return [*list(loader.sampler), torch.rand(1).item(), random.random(), np.random.rand()]  # noqa: NPY002


def test_looking_does_not_change_what_is_given_next():
    given = []
    for look in (False, True):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
        loader = DataLoader(Augmented(), 3, sampler=Stateful(), generator=torch.Generator().manual_seed(0))
        if look:
            with seeded(0):
                assert visited(points_of(loader)) == list(range(10))
                points_of(loader).is_repeatable()
            assert loader.dataset.loaded is not None  # what it may have read from a disk stays
        given.append([state_of_everything(loader), [batch[0].tolist() for batch in loader], loader.dataset.loads])
    assert given[0] == given[1]


def test_names_of_classes_are_no_labels():
    data = TensorDataset(torch.arange(3), torch.arange(3))
    data.targets = ["cat", "dog", "cat"]
    assert points_of(DataLoader(data)).targets is None


def test_chosen_points_come_in_their_order():
    points = points_of(DataLoader(Subset(DATA, [9, 8, 7]), 2))
    assert [y.tolist() for _, y, _ in points.batches(points.arranged([2, 0]), "cpu")] == [[7, 9]]


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

    assert points_of(DataLoader(DATA)).is_repeatable()
    assert not points_of(DataLoader(Noisy(torch.zeros(5)))).is_repeatable()
    assert not points_of(DataLoader(Augmented())).is_repeatable()


class Bulk(Dataset):
    """Asked for several points at once, by a list."""

    def __len__(self):
        return 10

    def __getitem__(self, index: list[int]) -> tuple[Tensor, Tensor]:
        assert isinstance(index, list)
        return torch.tensor(index).float(), torch.tensor(index)


class Lists(Sampler):
    def __iter__(self):
        yield from ([7, 2], np.array([5]), torch.tensor([1]))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (BatchSampler(SequentialSampler(DATA), 4, drop_last=True), list(range(10))),
        (BatchSampler(SubsetRandomSampler([7, 2, 5]), 2, drop_last=False), [2, 5, 7]),
        (Lists(), [1, 2, 5, 7]),
    ],
)
def test_batches_that_the_dataset_makes_are_loaded_as_such(sampler: Any, expected: list[int]):
    points = points_of(DataLoader(Bulk(), batch_size=None, sampler=sampler))
    assert visited(points) == expected
    assert [y.tolist() for _, y, _ in points.batches([2, 0], "cpu")] == [[expected[2], expected[0]]]
    assert points.shareable


def test_a_subclass_that_only_sets_a_collate_function_has_numbers():
    class Own(DataLoader):
        def __init__(self, dataset: Dataset, **kwargs: Any):
            super().__init__(
                dataset, collate_fn=lambda samples: [part * 2 for part in default_collate(samples)], **kwargs
            )

    assert visited(points_of(Own(DATA, batch_size=4))) == [2 * i for i in range(10)]


def test_one_squeezed_target_is_one():
    points = points_of(DataLoader(DATA, 3), lambda batch: (batch[0], batch[1].squeeze()))
    assert not points.opaque
    assert visited(points) == list(range(10))


# Samples that are not rows of the inputs


class Graphs:
    """As a batch of torch-geometric."""

    def __init__(self, x: Tensor, batch: Tensor, y: Tensor):
        self.x, self.batch, self.y = x, batch, y

    def to(self, device: Any) -> "Graphs":
        self.x, self.batch, self.y = self.x.to(device), self.batch.to(device), self.y.to(device)
        return self


def together(samples: list[tuple[Tensor, int]]) -> Graphs:
    sizes = torch.tensor([len(x) for x, _ in samples])
    return Graphs(
        torch.cat([x for x, _ in samples]),
        torch.arange(len(samples)).repeat_interleave(sizes),
        torch.tensor([y for _, y in samples]),
    )


SETS = [(torch.full((1 + i % 4, 2), float(i)), i) for i in range(12)]


def padded(samples: list) -> tuple[Tensor, Tensor]:
    """Sequences first: (T, B, d)."""
    return pad_sequence([x for x, _ in samples]), torch.tensor([y for _, y in samples])


def ragged(samples: list) -> tuple[list[Tensor], Tensor]:
    return [x for x, _ in samples], torch.tensor([y for _, y in samples])


def texts(samples: list) -> tuple[dict, Tensor]:
    return {"text": ["a" * len(x) for x, _ in samples], "x": torch.stack([x[0] for x, _ in samples])}, torch.tensor(
        [y for _, y in samples]
    )


@pytest.mark.parametrize("collate", [together, padded, ragged, texts])
def test_batches_whose_rows_are_not_samples_are_picked_from(collate: Callable):
    points = points_of(DataLoader(SETS, 5, collate_fn=collate))
    assert points.opaque
    assert points.shareable
    batches = list(points.batches([3, 11, 2, 5, 0, 1], "cpu"))
    assert [batch.targets.tolist() for batch in batches] == [[3, 11, 2, 5, 0], [1]]
    assert all(isinstance(batch.inputs, Picked) for batch in batches)
    assert batches[0].inputs.rows.tolist() == [0, 1, 2, 3, 4]


def test_sets_of_one_element_are_no_rows_when_others_have_more():
    """The first points look like rows; a later batch shows that they are not."""
    alike = [(torch.zeros(1 + (i == 7), 2), i) for i in range(12)]

    def flat(samples: list) -> tuple[Tensor, Tensor]:
        return together(samples).x, together(samples).y

    points = points_of(DataLoader(alike, 3, collate_fn=flat))
    kinds = [isinstance(batch.inputs, Picked) for batch in points.batches(range(12), "cpu")]
    assert kinds == [False, False, True, False]


def test_constants_leave_samples_rows():
    def with_constants(samples: list) -> tuple[dict, Tensor]:
        x, y = default_collate(samples)
        return {"x": x, "scale": torch.tensor(2.0), "size": [8, 8], "name": "a"}, y

    points = points_of(DataLoader(DATA, 4, collate_fn=with_constants))
    assert not points.opaque
    assert visited(points) == list(range(10))


def test_a_batch_size_of_one_is_never_exceeded():
    sets = [(x, torch.tensor(y)) for x, y in SETS]  # default_collate cannot stack two of them
    assert visited(points_of(DataLoader(sets, 1))) == list(range(12))


def test_points_that_only_a_batch_sampler_can_put_together_are_loaded_alone(caplog: Any):
    caplog.set_level(logging.INFO, "lightning_ella")
    sets = [(x, torch.tensor(y)) for x, y in SETS]
    points = points_of(DataLoader(sets, batch_sampler=[[i, i + 4, i + 8] for i in range(4)]))
    assert visited(points) == list(range(12))
    assert "one is loaded at a time" in caplog.text
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        points_of(DataLoader(sets, 4))  # as in training


def test_points_of_one_graph_are_its_labelled_nodes(caplog: Any):
    caplog.set_level(logging.INFO, "lightning_ella")
    graph = Graphs(torch.randn(9, 2), torch.zeros(9), torch.arange(9))
    mask = torch.tensor([True, False, True, True, False, True, False, False, True])
    loader = DataLoader([graph], 1, collate_fn=lambda graphs: graphs[0])
    points = points_of(loader, lambda graph: (graph, graph.y, mask))
    assert len(points) == 5
    assert points.opaque
    assert not points.shareable
    assert points.labels([0, 1, 2, 3, 4]).tolist() == [0, 2, 3, 5, 8]
    (batch,) = points.batches([4, 0], "cpu")
    assert batch.inputs.whole.x.equal(graph.x)
    assert batch.inputs.rows.tolist() == [8, 0]
    assert batch.targets.tolist() == [8, 0]
    assert "5 points, 5 held" in caplog.text


def test_items_of_several_rows_are_as_many_points():
    clips = [(torch.full((3, 2), float(i)), torch.full((3,), i)) for i in range(4)]
    points = points_of(DataLoader(clips, 2), lambda batch: (batch[0].flatten(0, 1), batch[1].flatten()))
    assert len(points) == 12
    assert not points.opaque
    assert Counter(visited(points)) == dict.fromkeys(range(4), 3)


# Points that can only be iterated


class Stream(IterableDataset):
    def __init__(self, size: int = 100):
        self.size, self.epoch = size, 0

    def __iter__(self):
        self.epoch += 1
        yield from ((torch.tensor([float(i)]), i % 7) for i in range(self.size))


class Sized(Stream):
    def __len__(self):
        return self.size


class Scaled(DataLoader):
    """Its batches are not those of its dataset."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x * 100, y


class Filtered(DataLoader):
    """As torch-geometric's NodeLoader: batches pass through a function of the loader."""

    def _get_iterator(self):
        return ([x * 100, y] for x, y in super()._get_iterator())


class Concatenated(DataLoader):
    """As scvi's ConcatDataLoader: a DataLoader of DataLoaders."""

    def __init__(self, loaders: list[DataLoader]):
        self.loaders = loaders
        super().__init__(loaders)

    def __iter__(self):
        for batches in zip(*self.loaders, strict=True):
            yield [torch.cat(parts) for parts in zip(*batches, strict=True)]


class Prefetching:
    """As timm's PrefetchLoader: no DataLoader, but made of one."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self):
        for x, y in self.loader:
            yield x * 100, y

    def __len__(self):
        return len(self.loader)


def held(points: Points) -> dict[int, float]:
    """Target -> input of the points."""
    found = {}
    for inputs, targets, _ in points.batches(points.numbers, "cpu"):
        found |= dict(zip(targets.tolist(), inputs.flatten().tolist(), strict=True))
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scaled(DATA, 4),
        lambda: Filtered(DATA, 4),
        lambda: Prefetching(DataLoader(DATA, 4, shuffle=True)),
        lambda: list(Scaled(DATA, 4)),
        lambda: tuple(Scaled(DATA, 4)),
        lambda: Concatenated([Scaled(Subset(DATA, range(5)), 4), Scaled(Subset(DATA, range(5, 10)), 4)]),
    ],
)
def test_a_loader_that_makes_its_own_batches_is_followed(make: Callable, caplog: Any):
    caplog.set_level(logging.INFO, "lightning_ella")
    points = points_of(make())
    assert len(points) == 10
    assert held(points) == {i: 100.0 * i for i in range(10)}
    assert "has no numbered points, so it was read once: 10 points, 10 held." in caplog.text
    assert not points.shareable


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [8, None])
def test_a_stream_is_read_once_and_some_of_it_held(workers: int, batch_size: int | None):
    stream = Stream() if batch_size else ListOfBatches()
    points = points_of(DataLoader(stream, batch_size, num_workers=workers), keep=30)
    assert len(points) == 100
    assert points.numbers == range(30)
    found = [
        (float(x), int(y)) for xs, ys, _ in points.batches(points.numbers, "cpu") for x, y in zip(xs, ys, strict=True)
    ]
    assert len(set(found)) == 30
    assert all(x % 7 == y for x, y in found)
    assert max(x for x, _ in found) > 70  # not only the first ones
    assert sorted(points.labels(range(30)).tolist()) == sorted(y for _, y in found)


class ListOfBatches(IterableDataset):
    def __iter__(self):
        for start in range(0, 100, 10):
            numbers = torch.arange(start, start + 10)
            yield numbers[:, None].float(), numbers % 7


def test_every_point_of_a_stream_is_as_likely_to_be_held():
    counts = torch.zeros(40)
    for seed in range(400):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        points = points_of([(part[:, None].float(), part) for part in order.split(4)], keep=10)
        counts[points.labels(range(10))] += 1
    assert counts.min() > 65  # 100 expected, with a standard deviation of 9
    assert counts.max() < 135


def test_whole_batches_are_drawn_where_samples_are_not_rows():
    stream = [together(SETS[start : start + 3]) for start in range(0, 12, 3)]
    points = points_of(stream, keep=7)
    assert len(points) == 12
    assert points.opaque
    assert len(points.numbers) == 7
    batches = list(points.batches(points.arranged([6, 0, 3, 1, 5, 2, 4]), "cpu"))
    assert sorted(len(batch.targets) for batch in batches) == [1, 3, 3]
    for batch in batches:
        assert batch.targets.equal(batch.inputs.whole.y[batch.inputs.rows])
    assert {part.device.type for part in (batches[0].inputs.whole.x, batches[0].inputs.rows)} == {"cpu"}


def test_points_in_any_order_are_those_that_were_asked_for():
    points = points_of([together(SETS[start : start + 3]) for start in range(0, 12, 3)])
    numbers = [7, 2, 11, 0, 1]
    assert [y for batch in points.batches(numbers, "cpu") for y in batch.targets.tolist()] == numbers
    assert points.arranged(numbers) == [0, 1, 2, 7, 11]
    with pytest.raises(ValueError, match="of 12 points 12 are held"):
        list(points.batches([12], "cpu"))


def test_a_square_batch_is_no_batch_of_rows():
    sequences = [(torch.randn(3, 3, 2), torch.arange(3)), (torch.randn(5, 3, 2), torch.arange(3))]
    points = points_of(sequences)
    assert points.opaque
    assert all(isinstance(batch.inputs, Picked) for batch in points.batches(points.numbers, "cpu"))


def test_points_of_other_shapes_are_held_beside_each_other():
    lengths = [3, 5, 3, 4]
    batches = [
        ({"x": torch.full((2, length), float(i)), "k": torch.tensor(1)}, torch.tensor([i, i]))
        for i, length in enumerate(lengths)
    ]
    points = points_of(batches)
    assert not points.opaque
    for inputs, targets, _ in points.batches(points.numbers, "cpu"):
        assert (inputs["x"] == targets[:, None]).all()
        assert inputs["x"].shape[1] == lengths[int(targets[0])]
        assert inputs["k"] == 1


def test_rows_of_weight_zero_are_no_points():
    batches = [(torch.arange(4.0), torch.arange(4), torch.tensor([0.0, 2.0, 0.0, 1.0]))] * 2
    points = points_of(batches, lambda batch: batch)
    assert len(points) == 4
    weights = [
        (int(y), float(w)) for _, ys, ws in points.batches(points.numbers, "cpu") for y, w in zip(ys, ws, strict=True)
    ]
    assert weights == [(1, 2.0), (3, 1.0)] * 2


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(10**9), 10), lambda: EndlessBatches(), lambda: Nothing()])
def test_a_stream_without_an_end_is_cut(make: Callable, caplog: Any):
    points = points_of(make(), keep=20)
    assert len(points) <= LONGEST * 20
    assert len(points.numbers) in (20, 0)
    assert "goes on after" in caplog.text
    assert "Pass train_loader=" in caplog.text


class EndlessBatches:
    def __iter__(self):
        while True:
            yield torch.zeros(2, 1), torch.zeros(2)


class Nothing:
    def __iter__(self):
        while True:
            yield torch.zeros(0, 1), torch.zeros(0)


def test_a_long_stream_that_knows_its_length_has_as_many_points(caplog: Any):
    points = points_of(DataLoader(Sized(1000), 10), keep=20)
    assert len(points) == 1000
    assert len(points.numbers) == 20
    assert "after 200 points, of which 20 are held; it is taken to have 1000" in caplog.text


def test_a_stream_gives_next_what_it_would_have_given():
    class Shuffled(Stream):
        def __init__(self) -> None:
            super().__init__(10)
            self.rng, self.files = np.random.default_rng(0), list(range(10))

        def __iter__(self):
            self.epoch += 1
            yield from ((float(i), self.epoch) for i in self.rng.permutation(self.files))

    orders = []
    for look in (False, True):
        torch.manual_seed(0)
        loader = DataLoader(Shuffled(), 3)
        if look:
            assert len(points_of(loader)) == 10
        orders.append([torch.rand(1).item(), [[part.tolist() for part in batch] for batch in loader]])
    assert orders[0] == orders[1]


def test_a_digest_tells_streams_apart():
    first, again, other = (points_of([(torch.full((2, 1), x), torch.arange(2))]).digest() for x in (1.0, 1.0, 2.0))
    assert first == again != other


class OneShot(IterableDataset):
    def __init__(self) -> None:
        self.given = iter([(torch.zeros(1), 0)] * 4)

    def __iter__(self):
        yield from self.given


class Same(IterableDataset):
    given = iter([(torch.zeros(1), 0)] * 4)

    def __iter__(self) -> Iterator:
        return self.given


class Ahead(DataLoader):
    """As timm's MultiEpochsDataLoader: one iterator for all epochs."""

    def __init__(self, dataset: Dataset, batch_size: int):
        super().__init__(dataset, batch_size)
        object.__setattr__(self, "iterator", DataLoader.__iter__(self))

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (batch for batch in [(torch.zeros(1, 1), torch.zeros(1))]),
        lambda: iter(DataLoader(DATA)),
        lambda: DataLoader(OneShot(), 2),
        lambda: DataLoader(Same(), 2),
        lambda: Ahead(DATA, 2),
        lambda: zip([torch.zeros(1, 1)], [torch.zeros(1)], strict=True),
    ],
)
def test_what_a_look_would_use_up_is_refused_untouched(make: Callable):
    loader = make()
    with pytest.raises(ValueError, match=r"is an iterator or keeps one, .* pass train_loader="):
        points_of(loader)
    assert len(list(loader)) > 0


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([DataLoader(DATA)], r"one DataLoader, not a list \(DataLoader\): pass train_loader="),
        ({"a": DataLoader(DATA)}, "one DataLoader, not a dict with 'a': pass train_loader="),
        (DATA, r"not the dataset itself: .* DataLoader\(dataset"),
        (torch.zeros(3), r"not a tensor \(3,\): pass"),
        (3, "not an int: pass"),
        (None, "not a NoneType: pass"),
    ],
)
def test_what_is_no_loader_is_refused(loader: Any, message: str):
    with pytest.raises(TypeError, match=message):
        points_of(loader)


@pytest.mark.parametrize("loader", [DataLoader(Stream()), [DataLoader(DATA)]])
def test_only_map_style_datasets_have_numbers_by_themselves(loader: Any):
    with pytest.raises(TypeError, match=r"map-style dataset, not .*: pass train_loader="):
        Points(loader)


def test_other_batches_ask_for_unpack():
    loader = DataLoader([{"a": torch.zeros(1), "b": 0}], 1)
    with pytest.raises(TypeError, match="a dict with 'a', 'b': pass unpack="):
        points_of(loader)
    assert visited(points_of(loader, lambda batch: (batch["a"], batch["b"]))) == [0]


@pytest.mark.parametrize(
    "found", [None, (1,), (torch.zeros(1), [0]), (torch.zeros(1), torch.zeros(1), [1]), torch.zeros(2)]
)
def test_an_unpack_that_gives_something_else_is_told_so(found: Any):
    with pytest.raises(TypeError, match=r"unpack= must return \(inputs, targets\)"):
        points_of(DataLoader(DATA, 2), lambda batch: found)


@pytest.mark.parametrize("make", [lambda: DataLoader(PARTS, 4), lambda: list(DataLoader(PARTS, 4))])
def test_what_was_taken_for_what_is_said_once_for_each_loader(make: Callable, caplog: Any):
    caplog.set_level(logging.INFO, "lightning_ella")
    points = points_of(make())
    list(points.batches(points.numbers, "cpu"))
    assert [line for line in caplog.messages if "taken" in line] == [
        "ELLA: 'image' is taken for the inputs and 'label' for the targets."
    ]


PARTS = [{"image": torch.zeros(2), "label": i} for i in range(10)]


def test_an_empty_loader_has_no_points():
    assert len(points_of(DataLoader(Subset(DATA, []), 2))) == 0
    assert len(points_of([])) == 0


def test_draws_are_without_replacement():
    assert sorted(draw(10, 10, torch.Generator())) == list(range(10))
    assert draw(None, 3, torch.Generator()) == [0, 1, 2]
    assert draw(9, range(3), torch.Generator()) == [0, 1, 2]
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


def test_parts_of_several_datasets_are_numbered_through():
    assert visited(points_of(DataLoader(ConcatDataset([DATA, Subset(DATA, [3])]), 4))) == [*range(10), 3]
