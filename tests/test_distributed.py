"""Several processes together give the posterior of one, and fail together. Real processes, gloo."""

import multiprocessing
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import ListDataset, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ella import LIKELIHOODS, Settings, fit_ella
from lightning_ella.basis import _eigh
from lightning_ella.data import points_of
from lightning_ella.distributed import FEW, World, _check_current, _timeout_of
from lightning_ella.fit import run

MOST = 4


class Pool:
    """`MOST` processes in a group; a job goes to the first few of them."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.inboxes, self.answers = [context.Queue() for _ in range(MOST)], context.Queue()
        self.processes = [
            context.Process(target=serve, args=(rank, port, inbox, self.answers), daemon=True)
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, size: int, function: Callable, *args: Any) -> list[Any]:
        """What `function(world, *args)` returned, or the error it raised, on each of `size` processes."""
        for inbox in self.inboxes[:size]:
            inbox.put((size, function, args))
        answers = dict(self.answers.get(timeout=120) for _ in range(size))
        return [answers[rank] for rank in range(size)]

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(20)


def serve(rank: int, port: int, inbox: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    address, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=MOST, timeout=timeout)
    groups = {size: dist.new_group(range(size)) for size in range(1, MOST + 1)}
    while (job := inbox.get()) is not None:
        size, function, args = job
        try:
            answers.put((rank, function(World(groups[size]), *args)))
        except Exception as error:
            answers.put((rank, f"{type(error).__name__}: {error}"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


def negated(x: Tensor) -> Tensor:
    return -x


def halved(x: Tensor) -> Tensor:
    return x / 2


@dataclass(frozen=True)
class Problem:
    """A small network, its data and the settings of a fit, made anew from these numbers in every process."""

    points: int = 23
    landmarks: int = 11
    rank: int = 3
    outputs: int = 3
    batch_size: int = 4
    num_curvature: int | None = 13
    unseen: int = 9
    num_calibration: int | None = None
    curvature: str = "exact"
    views: tuple[Callable, ...] = ()
    memory_budget: int | None = 2**30
    dtype: torch.dtype = torch.float64

    def settings(self) -> Settings:
        return Settings(
            num_landmarks=self.landmarks,
            rank=self.rank,
            num_curvature=self.num_curvature,
            num_calibration=self.num_calibration,
            curvature=self.curvature,
            views=self.views,
            memory_budget=self.memory_budget,
            num_samples=64,
            # In float32 the search would end elsewhere where the NLL is flat.
            **({} if self.dtype == torch.float64 else {"prior_variance": 1.0, "covariance_scale": 10.0}),
        )

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, self.outputs)).to(self.dtype)

    def loader(self, count: int, seed: int) -> DataLoader:
        """The number of each point is its first coordinate, in thousandths."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 4, generator=generator).to(self.dtype)
        x[:, 0] = torch.arange(count) / 1000
        y = torch.randint(self.outputs, (count,), generator=generator)
        return DataLoader(ListDataset(list(zip(x, y, strict=True))), self.batch_size)


def fitted(world: World, problem: Problem) -> dict[str, Any]:
    visited: dict[str, list[int]] = {}

    def progress(batches: Any, description: str, total: int) -> Iterator:
        for inputs, targets, _ in batches:
            visited.setdefault(description, []).extend((1000 * inputs[:, 0]).round().int().tolist())
            yield inputs, targets, None

    train, unseen = problem.loader(problem.points, 1), problem.loader(problem.unseen, 2)
    fit = run(problem.network(), train, unseen, problem.settings(), progress=progress, world=world)
    torch.manual_seed(3)
    out = fit.predictor(torch.randn(5, 4, dtype=problem.dtype))
    figures = {name: value for name, value in fit.figures.items() if name != "ella/seconds"}
    tensors = {
        "curvature": fit.predictor.curvature,
        "eigenvalues": fit.predictor.eigenvalues,
        "probs": out.probs,
        "covariance": out.logits_covariance,
    }
    if out.familiarity is not None:
        tensors["foreign"] = torch.stack([getattr(out, part) for part in fit.predictor.familiarity.parts])
        tensors["familiarity"] = out.familiarity
    if (promised := fit.predictor.guaranteed) is not None:
        tensors["promised"] = torch.cat([promised.scores, promised.confidence.sort().values, promised.planned])
    return {"figures": figures, "visited": visited} | {name: value.tolist() for name, value in tensors.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for name in (
        "curvature",
        "eigenvalues",
        "probs",
        "covariance",
        *(expected.keys() & {"foreign", "familiarity", "promised"}),
    ):
        one, other = torch.tensor(found[name]).double(), torch.tensor(expected[name]).double()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    assert found["figures"] == pytest.approx(expected["figures"], rel=max(tolerance, 1e-6))  # metrics are in float32


def assert_each_once(answers: list[dict[str, Any]], alone: dict[str, Any], problem: Problem) -> None:
    for stage, expected in alone["visited"].items():
        visited = Counter(number for answer in answers for number in answer["visited"].get(stage, []))
        assert visited == Counter(expected), stage
    assert len(alone["visited"]["ELLA landmarks"]) == problem.landmarks
    assert len(alone["visited"]["ELLA calibration"]) == min(problem.unseen, problem.num_calibration or problem.unseen)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_number_of_processes_gives_the_same_posterior(pool: Pool, data: st.DataObject):
    points = data.draw(st.integers(2, 30))
    landmarks = data.draw(st.integers(1, points))
    problem = Problem(
        points=points,
        landmarks=landmarks,
        rank=data.draw(st.integers(1, min(landmarks, 4))),
        outputs=data.draw(st.sampled_from([2, 3, 6])),
        batch_size=data.draw(st.integers(1, 9)),
        num_curvature=data.draw(st.none() | st.integers(1, 20)),
        unseen=data.draw(st.integers(1, 12)),
        num_calibration=data.draw(st.none() | st.integers(1, 6)),
        curvature=data.draw(st.sampled_from(["exact", "sampled"])),
        views=data.draw(st.sampled_from([(), (negated,), (negated, halved)])),
    )
    size = data.draw(st.integers(2, MOST))
    alone, answers = fitted(World(), problem), pool(size, fitted, problem)
    for answer in answers:
        assert isinstance(answer, dict), answer
        assert_same(answer, alone, 1e-10)
    assert_each_once(answers, alone, problem)


def test_points_apart_are_shared_too(pool: Pool):
    problem = Problem(unseen=80, num_calibration=40)
    alone, answers = fitted(World(), problem), pool(3, fitted, problem)
    assert len(alone["visited"]["ELLA points apart"]) == 20
    for answer in answers:
        assert len(answer["promised"]) == 20 + 20 + 40
        assert_same(answer, alone, 1e-10)


@pytest.mark.parametrize("size", [2, 3])
def test_streamed_gradients_give_the_same_posterior(pool: Pool, size: int):
    problem = Problem(points=60, landmarks=50, memory_budget=8 * 50 * 30 * 4)  # sketches of 30 of 67 numbers
    alone, answers = fitted(World(), problem), pool(size, fitted, problem)
    for answer in answers:
        assert_same(answer, alone, 1e-10)


def test_float32_gives_the_same_posterior_to_its_rounding(pool: Pool):
    problem = Problem(dtype=torch.float32)
    alone = fitted(World(), problem)
    for answer in pool(3, fitted, problem):
        assert_same(answer, alone, 1e-3)


def test_processes_without_points_take_part(pool: Pool):
    problem = Problem(points=3, landmarks=2, rank=1, num_curvature=1, unseen=1)
    alone, answers = fitted(World(), problem), pool(4, fitted, problem)
    for answer in answers:
        assert isinstance(answer, dict), answer
        assert_same(answer, alone, 1e-10)
    assert_each_once(answers, alone, problem)


@dataclass(frozen=True)
class Field(Problem):
    """Outputs of a likelihood at several positions, so many that calibration takes some of them."""

    kind: str = "classification"
    top: int | None = None

    def settings(self) -> Settings:
        options = {"likelihood": self.kind, "channels": "last", "predictive": "auto", "top_outputs": self.top}
        return replace(super().settings(), **options)

    def loader(self, count: int, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 5, 4, generator=generator).to(self.dtype)
        x[:, 0, 0] = torch.arange(count) / 1000
        outputs = self.network()(x).detach() / 4
        y = LIKELIHOODS[self.kind]().sample(outputs, generator)
        return DataLoader(ListDataset(list(zip(x, y, strict=True))), self.batch_size)


def fitted_to_few_positions(world: World, problem: Field) -> dict[str, Any]:
    """Three of five positions of each unseen point."""
    with mock.patch("lightning_ella.fit.ROWS", 3 * problem.unseen):
        fit = run(
            *(problem.network(), problem.loader(problem.points, 1), problem.loader(problem.unseen, 2)),
            problem.settings(),
            world=world,
        )
    out = fit.predictor(torch.ones(2, 5, 4, dtype=problem.dtype))
    by_samples = ("ella/seconds", "map/crps", "ella/crps", "map/coverage_90", "ella/coverage_90")  # of targets
    figures = {name: value for name, value in fit.figures.items() if name not in by_samples}
    variances = {"probs": out.logits_mean, "covariance": out.logits_covariance}
    tensors = {"curvature": fit.predictor.curvature, "eigenvalues": fit.predictor.eigenvalues} | variances
    return {"figures": figures} | {name: value.tolist() for name, value in tensors.items()}


@pytest.mark.parametrize("kind", ["classification", "heteroscedastic", "regression", "poisson", "multilabel"])
@pytest.mark.parametrize("unseen", [1, 9])
def test_positions_of_any_likelihood_are_shared_too(pool: Pool, kind: str, unseen: int):
    problem = Field(kind=kind, outputs=2, unseen=unseen)
    alone = fitted_to_few_positions(World(), problem)
    for answer in pool(2, fitted_to_few_positions, problem):
        assert isinstance(answer, dict), answer
        assert_same(answer, alone, 1e-6)


def test_the_likeliest_outputs_are_shared_too(pool: Pool):
    problem = Field(outputs=6, top=2)
    alone = fitted_to_few_positions(World(), problem)
    for answer in pool(2, fitted_to_few_positions, problem):
        assert isinstance(answer, dict), answer
        assert_same(answer, alone, 1e-6)


def broken(world: World, stage: str, rank: int, how: str) -> None:
    """A fit in which one process fails in one stage."""
    problem = replace(Problem(), points=400, landmarks=300, num_curvature=400, unseen=300, batch_size=1)

    def progress(batches: Any, description: str, total: int) -> Iterator:
        for i, (inputs, targets, _) in enumerate(batches):
            if world.rank == rank and stage in description and i == 2:
                if how == "error":
                    raise KeyError("the disk with the images is gone")
                if how == "memory":
                    raise torch.OutOfMemoryError("tried to allocate 80 GB")
                inputs = inputs * float("nan")
            elif stage in description:
                time.sleep(0.2)  # the others would be busy for 20 s and more
            yield inputs, targets, None

    data = problem.loader(problem.points, 1), problem.loader(problem.unseen, 2)
    run(problem.network(), *data, problem.settings(), progress=progress, world=world)


MESSAGES = {"error": "KeyError: 'the disk with the images is gone'", "memory": "tried to allocate 80 GB", "nan": "NaN"}


@pytest.mark.parametrize("how", ["error", "memory", "nan"])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("stage", ["landmarks", "curvature", "calibration"])
def test_what_fails_on_one_process_ends_all_of_them(pool: Pool, stage: str, rank: int, how: str):
    started = time.monotonic()
    answers = pool(3, broken, stage, rank, how)
    assert time.monotonic() - started < 10  # far less than the others' work would take
    for other, answer in enumerate(answers):
        assert MESSAGES[how] in answer
        assert (f"process {rank} of 3 failed" in answer) == (other != rank)


def with_other_points(world: World) -> None:
    problem = replace(Problem(), points=23 + world.rank)
    fitted(world, problem)


def with_other_weights(world: World) -> None:
    problem = Problem()
    model = problem.network()
    model[0].weight.data.add_(world.rank)
    run(model, problem.loader(23, 1), None, problem.settings(), world=world)


def test_processes_that_do_not_agree_are_told_so(pool: Pool):
    assert all("do not have the same points" in answer for answer in pool(2, with_other_points))
    assert all("do not have the same weights" in answer for answer in pool(3, with_other_weights))


def without_memory(world: World) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ella.fit.free_memory", lambda device: 4 * 8 * 50 * 60 * 8)  # just enough for all rows
        return fitted(world, replace(Problem(), points=60, landmarks=50, memory_budget=None))


def test_the_memory_that_is_free_decides_as_for_one_process(pool: Pool):
    alone = without_memory(World())
    for answer in pool(3, without_memory):
        assert isinstance(answer, dict), answer
        assert_same(answer, alone, 1e-10)


def test_equal_gradients_in_two_directions_leave_a_basis():
    eigenvalues, eigenvectors = _eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())
    assert eigenvectors.norm(dim=0).tolist() == pytest.approx([1.0, 1.0])
    assert eigenvalues.tolist() == pytest.approx([3.0, 1.0])


def without_gradient(world: World) -> None:
    model = mlp().double()
    model[2].weight.data.zero_()
    model[2].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    points = ListDataset([(torch.randn(3).double(), torch.tensor(i % 3)) for i in range(12)])
    run(model, DataLoader(points, 4), None, Settings(num_landmarks=8, rank=2), world=world)


def test_what_the_first_process_does_alone_may_fail(pool: Pool):
    answers = pool(3, without_gradient)
    assert all("every gradient at the landmarks is zero" in answer for answer in answers)


def as_with_nccl(world: World) -> dict[str, Any]:
    """A fit whose group is taken for one of NCCL's, and what went over which group."""
    sent: dict[str, list[int]] = {"data": [], "control": []}

    def noted(name: str) -> Callable:
        collective = getattr(dist, name)

        def called(values: Any, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            size = values.numel() if isinstance(values, Tensor) else -1
            sent["data" if group is data else "control"].append(size)
            return collective(values, *args, group=group, **kwargs)

        return called

    names = ("all_reduce", "broadcast", "broadcast_object_list", "all_gather_object")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ella.distributed._is_nccl", lambda group: True)
        for name in names:
            patch.setattr(dist, name, noted(name))
        ranks, timeout = dist.get_process_group_ranks(world.group), timedelta(seconds=61)
        data: Any = dist.new_group(ranks, timeout, use_local_synchronization=True)
        both = World(data), World(data)
        assert both[0].control is both[1].control is not data  # one for all fits
        assert _timeout_of(both[0].control) == timeout
        return fitted(both[1], Problem()) | {"sent": sent}


def test_with_nccl_whatever_is_small_goes_over_gloo(pool: Pool):
    alone = fitted(World(), Problem())
    for answer in pool(2, as_with_nccl):
        assert isinstance(answer, dict), answer
        sent = answer.pop("sent")
        assert min(sent["data"]) > FEW >= max(sent["control"])
        assert -1 in sent["control"]  # objects
        assert_same(answer, alone, 1e-10)


def test_nccl_is_told_to_use_the_network_s_gpu():
    with mock.patch("torch.cuda.current_device", return_value=0):
        _check_current(torch.device("cuda", 0))
        with pytest.raises(ValueError, match=r"call torch\.cuda\.set_device\(1\) first"):
            _check_current(torch.device("cuda", 1))


def test_sums_and_rows_cross_processes(pool: Pool):
    answers = pool(4, exchanged)
    assert [answer["sum"] for answer in answers] == [6.0] * 4
    assert [answer["rows"] for answer in answers] == [[[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], None, None, None]
    assert [answer["tensors"] for answer in answers] == [{"a": [7.0, 0.0]}] * 4
    assert [answer["share"] for answer in answers] == [[0, 4], [1, 5], [2], [3]]
    assert [answer["smallest"] for answer in answers] == [10] * 4
    assert [answer["neighbours"] for answer in answers] == [4] * 4


def exchanged(world: World) -> dict[str, Any]:
    mine = list(world.share(range(6)))
    rows = world.gather_rows(torch.tensor(mine, dtype=torch.float32).unsqueeze(1))
    tensors: dict[str, Tensor] = {"a": torch.tensor([7.0, 0.0])} if world.first else {}
    return {
        "sum": float(world.sum(torch.tensor(float(world.rank)))),
        "rows": None if rows is None else rows.tolist(),
        "tensors": {name: value.tolist() for name, value in world.tensors_from_first(tensors, "cpu").items()},
        "share": mine,
        "smallest": world.smallest(10 + world.rank),
        "neighbours": world.neighbours(),
    }


def loader_of(x: Tensor, y: Tensor) -> DataLoader:
    return DataLoader(ListDataset(list(zip(x, y, strict=True))), 4)


@pytest.mark.parametrize("count", [3, 50])
def test_all_processes_learn_the_same_from_points_that_they_share(pool: Pool, count: int):
    torch.manual_seed(0)
    x, y = torch.randn(50, 3).double(), torch.randint(2, (50,))
    torch.manual_seed(0)
    alone = fit_ella(mlp().double(), loader_of(x, y), num_landmarks=20, rank=3, num_samples=32)
    expected = alone.update(loader_of(x[:count], 1 - y[:count]))(x[:count]).probs
    for found in pool(MOST, learnt_of_some, x, y, count):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def learnt_of_some(world: World, x: Tensor, y: Tensor, count: int) -> Tensor:
    torch.manual_seed(0)
    predictor = fit_ella(mlp().double(), loader_of(x, y), num_landmarks=20, rank=3, num_samples=32)
    return predictor.update(loader_of(x[:count], 1 - y[:count]), distributed=True)(x[:count]).probs


@pytest.mark.parametrize("count", [12, 50])
def test_all_processes_teach_the_same_student(pool: Pool, count: int):
    torch.manual_seed(0)
    x, y = torch.randn(50, 3).double(), torch.randint(2, (50,))
    expected = student_of(World(), x, y, count)
    for found in pool(3, student_of, x, y, count):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def student_of(world: World, x: Tensor, y: Tensor, count: int) -> Tensor:
    torch.manual_seed(0)
    predictor = fit_ella(mlp().double(), loader_of(x, y), num_landmarks=20, rank=3, num_samples=32)
    predictor.teach(points_of(loader_of(x[:count], y[:count])), world)
    return predictor.fast(x).logits_variance


def test_what_keeps_one_process_from_teaching_stops_all(pool: Pool):
    x, y = torch.randn(50, 3).double(), torch.randint(2, (50,))
    answers = pool(2, without_lessons, x, y)
    assert all("is broken" in answer for answer in answers), answers


def without_lessons(world: World, x: Tensor, y: Tensor) -> None:
    torch.manual_seed(0)
    predictor = fit_ella(mlp().double(), loader_of(x, y), num_landmarks=20, rank=3, num_samples=32)

    def broken(inputs: Tensor) -> Tensor:
        raise ValueError("is broken")

    predictor.teach(points_of(loader_of(x, y)), world, perturb=broken if world.rank == 1 else None)
