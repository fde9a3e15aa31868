"""On a GPU: `make gpu`. Skipped without one; ELLA_DEVICE=cpu tries what needs no GPU."""

import copy
import os
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from conftest import MAKERS, ListDataset, flat, make_case
from test_callback import Net, blobs
from test_devices import FIRST, SMALL, Noted, to
from test_distributed import Problem, assert_same, fitted
from test_other_likelihoods import problem
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ella import LIKELIHOODS, ELLACallback, ELLAPredictor, fit_ella
from lightning_ella.chunks import chunks
from lightning_ella.data import Points
from lightning_ella.distributed import World
from lightning_ella.engine import Linearization
from lightning_ella.linearize import as_function
from lightning_ella.memory import free_memory
from lightning_ella.posterior import SCALES

DEVICE = os.environ.get("ELLA_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
IMAGE = (3, 224, 224) if ON_GPU else (3, 32, 32)
pytestmark = [
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*(deterministic|Deterministic)"),
]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="about CUDA itself")
multi_gpu = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def network(name: str, num_outputs: int = 10) -> nn.Module:
    import timm

    torch.manual_seed(0)
    names = {"vit_tiny": "vit_tiny_patch16_224", "vit_b16": "vit_base_patch16_224"}
    size = {"img_size": IMAGE[1]} if "vit" in name else {}
    return timm.create_model(names.get(name, name), num_classes=num_outputs, **size).eval()


def some_images(count: int) -> ListDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    return ListDataset([(torch.randn(IMAGE, generator=generator), y) for y in labels])


def trained(module: pl.LightningModule, ella: ELLACallback, folder: Path, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    accelerator = "gpu" if ON_GPU else "cpu"
    options = {"max_epochs": 1, "devices": 1, "default_root_dir": folder} | options
    trainer = pl.Trainer(accelerator=accelerator, callbacks=[ella, *options.pop("also", [])], **quiet, **options)
    trainer.fit(module, DataLoader(blobs(60, 0), 16), DataLoader(blobs(40, 1), 16))
    return trainer


# Breaks


def test_the_predictor_answers_on_the_cpu_right_after_a_fit(tmp_path: Path):
    module, ella = Net(), ELLACallback(on_error="raise", **SMALL)
    trained(module, ella, tmp_path)
    x, predictor = torch.stack([row for row, _ in blobs(20, 2).items]), ella.predictor
    assert predictor is not None
    assert not any(part.is_cuda for part in (*predictor.basis.values(), predictor.curvature, predictor.draws))
    loaders = DataLoader(blobs(60, 0), 16), DataLoader(blobs(40, 1), 16)
    scales = {name: float(getattr(predictor, name)) for name in SCALES}
    expected = fit_ella(module, *loaders, **SMALL, **scales)
    torch.testing.assert_close(predictor(x).probs, expected(x).probs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize("what", FIRST)
def test_every_method_works_as_the_first_call_after_a_move(what: str, way: str, tmp_path: Path):
    case = make_case("conv_batchnorm")
    start, end = (DEVICE, "cpu") if way == "back" else ("cpu", DEVICE)
    file = fit_ella(case.model, case.loader(), prior_variance=0.5, residual=4, **SMALL).save(tmp_path / "ella")
    predictor = ELLAPredictor.load(file, copy.deepcopy(case.model).to(start))
    predictor.model.to(end)
    found = FIRST[what](predictor, case, to(case.rows(slice(5)), end))
    assert found.device.type == torch.device(end).type
    expected = FIRST[what](ELLAPredictor.load(file, case.model), case, case.rows(slice(5)))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-10)
    assert ELLAPredictor.load(predictor.save(tmp_path / "moved"), case.model).rank == predictor.rank


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks(kind: type[nn.Module], tmp_path: Path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = kind(2, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)[0][:, -1])

    torch.manual_seed(0)
    model, flags = Recurrent().double(), (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark)
    data = ListDataset([(torch.randn(5, 2).double(), torch.tensor(i % 3)) for i in range(40)])
    found = []
    for place in ("cpu", DEVICE):
        predictor = fit_ella(model.to(place), DataLoader(data, 8), prior_variance=0.5, **SMALL)
        found.append(predictor(torch.stack([x for x, _ in data.items[:5]])).probs.cpu())
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
    assert flags == (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark)


@gpu_only
def test_out_of_memory_is_told_as_such(caplog: pytest.LogCaptureFixture):
    model, x = network("resnet18").to(DEVICE), torch.randn(64, *IMAGE, device=DEVICE)
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    with as_function():
        linearization = Linearization(model, memory_budget=whole, samples_per_chunk=64)
        basis = {name: torch.randn(20, *p.shape, device=DEVICE) for name, p in linearization.parameters.items()}
        linearization.features(x[:2], basis)
        torch.cuda.empty_cache()
        try:
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 4e9) / whole)
            linearization.features(x, basis)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert any("do not fit the memory" in record.message for record in caplog.records)
        try:
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 1e8) / whole)
            with pytest.raises(torch.OutOfMemoryError):  # while routes are found: it is not taken for a missing rule
                Linearization(model, memory_budget=whole).features(torch.randn(64, *IMAGE, device=DEVICE), basis)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert not any("no rule" in record.message for record in caplog.records)


# Wrong


@pytest.mark.parametrize("engine", ["forward", "layerwise"])
@pytest.mark.parametrize("rows", ["held", "streamed"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_posterior_is_that_of_the_cpu(name: str, rows: str, engine: str):
    case, found = make_case(name), []
    scales = {"prior_variance": 0.5, "covariance_scale": 2.0, "residual_scale": 0.1, "temperature": 1.2}
    settings = SMALL | {"num_landmarks": 40, "engine": engine, "curvature": "exact"}
    settings["memory_budget"] = 10**8 if rows == "held" else 40 * 8 * 4 * 45
    for place in ("cpu", DEVICE):
        case.model.to(place)
        predictor = fit_ella(case.model, case.loader(), case.loader(9), **settings, **scales)
        out = predictor(case.rows(slice(6)))
        found.append([predictor.eigenvalues, predictor.curvature, out.probs, out.logits_covariance, out.novelty])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny"])
def test_the_same_bits_twice(name: str, as_set_by_a_user: None):
    model, data = network(name).to(DEVICE), some_images(40 if ON_GPU else 8)
    settings = {"num_landmarks": len(data), "rank": 4, "num_curvature": 8, "memory_budget": 2 * 10**9}
    fits = [fit_ella(model, DataLoader(data, 8), DataLoader(data, 8), **settings) for _ in range(2)]
    for part in ("eigenvalues", "curvature", "covariance_scale", "prior_variance", "temperature"):
        assert getattr(fits[0], part).equal(getattr(fits[1], part))
    assert all(value.equal(fits[1].basis[key]) for key, value in fits[0].basis.items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_b16", "convnext_tiny"] if ON_GPU else ["resnet18"])
def test_every_parameter_has_a_rule(name: str):
    model, x = network(name).to(DEVICE), torch.randn(2, *IMAGE, device=DEVICE)
    with as_function():
        linearization = Linearization(model)
        basis = {key: p.detach().unsqueeze(0) for key, p in linearization.parameters.items()}
        linearization.projections(x, lambda f, _: f, basis)
        assert not linearization.layerwise._uncovered()
        assert linearization._folding is not None
        assert len(linearization._folding.pairs) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_tf32_does_not_reach_the_basis(as_set_by_a_user: None):
    found = []
    for kind in (torch.float32, torch.float64):
        case = make_case("conv_batchnorm")
        data = ListDataset([(x.to(kind), y) for x, y in case.dataset.items])
        model = case.model.to(DEVICE, kind)
        found.append(fit_ella(model, DataLoader(data, 7), prior_variance=0.5, **SMALL))
    V = flat(found[0].basis).double()  # else it is the test that multiplies in TF32
    assert (V.T @ V - torch.eye(V.shape[1]).to(V)).norm() < 1e-5
    torch.testing.assert_close(found[0].eigenvalues, found[1].eigenvalues, rtol=1e-4, atol=1e-6)


def test_batches_that_come_back_from_the_gpu_are_whole():
    torch.manual_seed(0)
    data = ListDataset([(torch.randn(3, 64, 64), torch.tensor(i % 7)) for i in range(1200)])

    def moved(batch: Any) -> Any:
        return tuple(part.to(DEVICE, non_blocking=True) for part in batch)

    points = Points(DataLoader(data, 4), moved)
    assert points.is_repeatable()
    assert points.digest() == Points(DataLoader(data, 4), moved).digest()
    done = 0
    for inputs, targets, _ in points.batches(points.numbers, "cpu"):
        assert all(x.equal(data[done + i][0]) for i, x in enumerate(inputs))
        assert targets.tolist() == [(done + i) % 7 for i in range(len(targets))]
        done += len(targets)
    assert points.labels(points.numbers).tolist() == [i % 7 for i in range(1200)]


def test_a_deterministic_trainer_ends_with_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ella = ELLACallback(on_error="raise", **SMALL)
    try:
        trainer = trained(Net(), ella, tmp_path, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "ella/nll" in trainer.callback_metrics


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_read_inside_autocast(dtype: torch.dtype):
    case = make_case("mlp")
    data = ListDataset([(x.float(), y) for x, y in case.dataset.items])
    predictor = fit_ella(case.model.float().to(DEVICE), DataLoader(data, 7), prior_variance=0.5, **SMALL)
    x = torch.stack([x for x, _ in data.items[:9]]).to(DEVICE)
    outside = predictor(x)
    expected = outside.probs, outside.logits_covariance, outside.entropy  # worked out when they are read
    with torch.autocast(DEVICE, dtype=dtype):
        out = predictor(x)
        found = out.probs, out.logits_covariance, out.entropy
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("how", ["exact", "sampled"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood(name: str, how: str):
    model, x, y, loader = problem(name)
    predictor = fit_ella(model.to(DEVICE), loader, loader, name, curvature=how, **SMALL)
    for out in (predictor(x[:6]), predictor(x[:6])):
        asked = [out.log_prob(y[:6].to(DEVICE)), out.novelty]
        if predictor.likelihood.has_moments:
            asked += [out.mean, out.quantile(0.3), out.crps(y[:6].to(DEVICE)), out.sample(3)]
        assert all(value.isfinite().all() for value in asked)
        again = predictor(x[:6])
        assert again.log_prob(y[:6].to(DEVICE)).equal(asked[0])


@gpu_only
def test_random_states_are_left_alone(tmp_path: Path):
    before = torch.cuda.get_rng_state_all()
    fit_ella(Net().body.to(DEVICE), DataLoader(blobs(60, 0), 16), DataLoader(blobs(40, 1), 16), **SMALL)
    assert all(one.equal(other) for one, other in zip(before, torch.cuda.get_rng_state_all(), strict=True))
    script = (
        "import torch\nfrom torch.utils.data import DataLoader, Sampler\nfrom lightning_ella import ELLACallback\n"
        "class Backwards(Sampler):\n    def __iter__(self): return iter(range(9, -1, -1))\n"
        "    def __len__(self): return 10\n"
        "ELLACallback(train_loader=DataLoader(list(range(10)), sampler=Backwards()))\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"] if ON_GPU else ["bf16-mixed"])
def test_best_weights_mixed_precision_and_a_test(precision: Any, tmp_path: Path):
    module, ella = Noted(), ELLACallback(weights="best", on_error="raise", **SMALL)
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = trained(module, ella, tmp_path, precision=precision, max_epochs=2, also=[best])
    assert trainer.test(module, DataLoader(blobs(40, 3), 16), verbose=False)[0]["test_nll"] < 10
    assert len(trainer.predict(module, DataLoader(blobs(40, 3), 16)) or ()) == 3


# Several processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass(frozen=True)
class Placed(Problem):
    """On a device, and large enough for NCCL."""

    place: str = "cpu"

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 3)).double().to(self.place)


def take_part(rank: int, port: int, backend: str, how: str, answers: Any) -> None:
    warnings.simplefilter("ignore")
    meeting = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 2}
    dist.init_process_group(backend, timeout=timedelta(seconds=30), **meeting)
    place = torch.device(DEVICE, rank % torch.cuda.device_count()) if ON_GPU else torch.device("cpu")
    if ON_GPU and how != "unset":
        torch.cuda.set_device(place)
    try:
        if how == "killed" and rank == 1:
            with World(dist.group.WORLD, place).together("the curvature"):
                os._exit(1)
        if how == "killed":
            with World(dist.group.WORLD, place).together("the curvature"):
                pass
        answers.put((rank, fitted(World(dist.group.WORLD, place), Placed(place=str(place)))))
    except Exception as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))


def together(backend: str, how: str = "") -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=take_part, args=(r, port, backend, how, answers)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in range(1 if how == "killed" else 2))
    for process in processes:
        process.kill()
    return found


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=multi_gpu)])
def test_two_processes_give_the_posterior_of_one(backend: str):
    alone = fitted(World(), Placed())
    for answer in together(backend).values():
        assert isinstance(answer, dict), answer
        assert_same(answer, alone, 1e-8)


@multi_gpu
def test_a_gpu_that_is_not_the_current_one_is_refused():
    assert all("call torch.cuda.set_device" in str(answer) for answer in together("nccl", "unset").values())


@multi_gpu
def test_a_killed_process_is_an_exception_on_the_other():
    assert "contact with another process was lost" in together("nccl", "killed")[0]


# Slow


@gpu_only
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny"])
@pytest.mark.parametrize(("budget", "num_outputs"), [(10**9, 10), (4 * 10**9, 10), (4 * 10**9, 1000)])
def test_peak_memory_is_within_the_budget(name: str, budget: int, num_outputs: int):
    model, x = network(name, num_outputs).to(DEVICE), torch.randn(256, *IMAGE, device=DEVICE)
    at_first = torch.cuda.memory_allocated()
    with as_function():
        linearization = Linearization(model, memory_budget=budget)
        basis = {key: torch.randn(60, *p.shape, device=DEVICE) for key, p in linearization.parameters.items()}
        linearization.features(x[:2], basis)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linearization.features(x, basis)
        assert torch.cuda.max_memory_allocated() - before <= budget
        del linearization, basis
    assert torch.cuda.memory_allocated() <= at_first + 2**26  # the workspace of cuBLAS


@gpu_only
def test_free_memory_counts_what_torch_keeps():
    device = torch.device(DEVICE, 0)
    torch.cuda.empty_cache()
    before = free_memory(device)
    kept = torch.empty(before // 2, dtype=torch.uint8, device=device)
    del kept
    assert abs(free_memory(device) - before) < 0.05 * before


@pytest.mark.parametrize(
    ("name", "num_outputs", "most"),
    [("resnet50", 10, 500), ("vit_b16", 10, 700), ("resnet50", 1000, 100), ("vit_b16", 1000, 100)]
    if ON_GPU
    else [("resnet18", 10, 10**6)],
)
def test_chunks_of_features_feed_the_gpu(name: str, num_outputs: int, most: int):
    model, x = network(name, num_outputs).to(DEVICE), torch.randn(64 if ON_GPU else 4, *IMAGE, device=DEVICE)
    with as_function():
        linearization = Linearization(model)
        basis = {key: torch.randn(30, *p.shape, device=DEVICE) for key, p in linearization.parameters.items()}
        linearization.features(x[:2], basis)
        kinds = [torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds) as profile:
            linearization.features(x, basis)
    kernels = [event for event in profile.events() if str(event.device_type).endswith(DEVICE.upper())]
    assert 0 < len(kernels) / len(x) <= most


def test_small_numbers_by_device_are_those_of_a_gpu():
    assert (chunks(torch.device(DEVICE)).samples == 64) != ON_GPU
