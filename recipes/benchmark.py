"""Time and memory of ELLA's heavy steps, beside the paper's procedure and laplace-torch's, on one network in one run.

    python recipes/benchmark.py                    # ResNet-20, 32 x 32, 10 classes
    python recipes/benchmark.py network=resnet18   # timm's, 224 x 224, 1000 classes; or vit_tiny, vit_b16
    python recipes/benchmark.py fit=true           # memory of a whole fit, and the formula's
    python recipes/benchmark.py processes=2        # time of a whole fit by one process and by two, of one thread each
    python recipes/benchmark.py device=cuda        # on a GPU

Times are medians of interleaved rounds, a sample each, and ratios to the plain forward pass F of the same run; on a GPU
by its own events. Peak memory is that of a process that does nothing else, above what it held with the network loaded:
of the GPU's memory, if it works there. Launches are kernels on a GPU, operations on a CPU; `as_on_a_gpu=true` works on
as much at a time as a GPU gets, to count them without one.
"""

import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import hydra
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_ella import chunks, fit_ella
from lightning_ella.engine import Linearization
from lightning_ella.linearize import as_function
from lightning_ella.memory import free_memory


class Bench(NamedTuple):
    """A network, noise to feed it, and a basis to multiply with."""

    model: nn.Module
    images: Tensor
    basis: dict[str, Tensor]


class Job(NamedTuple):
    """Something to time: a function, and how many samples a call of it takes."""

    run: Callable[[], Any]
    samples: int


def build(config: DictConfig, rank: int | None = None) -> Bench:
    """The same network and noise in every process; `rank` is that of the configuration, or 0 for no basis."""
    torch.manual_seed(0)
    network = config.networks[config.network]
    outputs = {} if config.num_outputs is None else {"num_classes": config.num_outputs}
    model = instantiate(network.model, **outputs).eval().to(config.device)
    count = max(config.samples or network.samples, *network.peer_batches)
    images = torch.randn(count, 3, network.size, network.size).to(config.device)
    directions: int = config.rank if rank is None else rank
    basis = {name: torch.randn(directions, *p.shape).div_(100).to(p) for name, p in model.named_parameters()}
    if config.as_on_a_gpu:
        chunks.CPU = chunks.GPU
    return Bench(model, images, basis)


def forward_pass(bench: Bench, samples: int) -> Job:
    """F."""
    return Job(lambda: bench.model(bench.images[:samples]), samples)


def paper_features(bench: Bench, batch: int) -> Job:
    """K dual-number products in turn, each with its own primal pass (the authors' procedure)."""
    parameters = {name: p.detach() for name, p in bench.model.named_parameters()}
    images = bench.images[:batch]

    def run() -> Tensor:
        def call(at: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(bench.model, at, (images,))

        rank = len(next(iter(bench.basis.values())))
        directions = ({name: v[k] for name, v in bench.basis.items()} for k in range(rank))
        return torch.stack([torch.func.jvp(call, (parameters,), (v,))[1] for v in directions], -1)

    return Job(run, batch)


def paper_gradient(bench: Bench, samples: int) -> Job:
    """One gradient at a time."""
    parameters = list(bench.model.parameters())

    def run() -> None:
        for image in bench.images[:samples]:
            with torch.enable_grad():
                output = bench.model(image.unsqueeze(0))[0, 0]
            torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters)])

    return Job(run, samples)


def laplace_torch(bench: Bench) -> Any:
    """Its ELLA, with the basis set by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace import Laplace
        from laplace.curvature import AsdlGGN

        peer: Any = Laplace(
            bench.model,
            "classification",
            subset_of_weights="all",
            hessian_structure="gp",
            functional_approximation="nystrom",
            subsample_size=32,
            n_eigenvalues=len(next(iter(bench.basis.values()))),
            backend=AsdlGGN,
        )
    peer.dual_directions = torch.cat([v.flatten(1) for v in bench.basis.values()], 1).T
    return peer


def peer_features(bench: Bench, batch: int) -> Job:
    """laplace-torch: products in turn."""
    peer = laplace_torch(bench)
    return Job(lambda: peer._features(bench.images[:batch]), batch)


def peer_gradient(bench: Bench, samples: int) -> Job:
    """laplace-torch: whole Jacobians, C x P a sample, of which one row is kept."""
    outputs = bench.model(bench.images[:1]).shape[1]
    needed = outputs * sum(p.nbytes for p in bench.model.parameters())
    if needed > free_memory(bench.images.device):
        raise MemoryError(f"needs {needed / 1e9:.0f} GB a sample")
    peer = laplace_torch(bench)
    bench.model.output_size = outputs  # type: ignore[assignment]

    def run() -> None:
        for image in bench.images[:samples]:
            with torch.enable_grad():
                peer.backend.jacobians(image.unsqueeze(0))

    return Job(run, samples)


def features(bench: Bench, samples: int, **options: Any) -> Job:
    """This package."""
    linearization = Linearization(bench.model, **options)
    return Job(lambda: linearization.features(bench.images[:samples], bench.basis), samples)


def gradient(bench: Bench, samples: int) -> Job:
    """This package."""
    linearization, outputs = Linearization(bench.model), torch.zeros(samples, dtype=torch.long)
    return Job(lambda: [None for _ in linearization.gradients(bench.images[:samples], outputs)], samples)


def projection(bench: Bench, samples: int) -> Job:
    """This package's curvature from random signs."""
    linearization = Linearization(bench.model)
    return Job(lambda: linearization.projections(bench.images[:samples], lambda f, _: f.sin(), bench.basis), samples)


def jobs(config: DictConfig) -> dict[str, Callable[[Bench], Job]]:
    """Everything that is measured, by name."""
    network = config.networks[config.network]
    samples, batches = config.samples or network.samples, network.peer_batches
    few = min(samples, 16)
    return {
        "forward pass F": lambda bench: forward_pass(bench, samples),
        **{f"features: paper, batch {b}": lambda bench, b=b: paper_features(bench, b) for b in batches},
        "features: laplace-torch": lambda bench: peer_features(bench, batches[min(1, len(batches) - 1)]),
        "features: ours": lambda bench: features(bench, samples),
        "features: ours, forward mode": lambda bench: features(bench, samples, engine="forward"),
        "features: ours, bf16": lambda bench: features(bench, samples, precision="bf16"),
        "curvature: ours, random signs": lambda bench: projection(bench, samples),
        "gradient: paper": lambda bench: paper_gradient(bench, few),
        "gradient: laplace-torch": lambda bench: peer_gradient(bench, 1),
        "gradient: ours": lambda bench: gradient(bench, samples),
    }


def measure_times(config: DictConfig) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds a sample of each job, round by round; and why some could not run."""
    bench, times, failures = build(config), {}, {}
    with as_function():
        ready = {}
        for name, make in jobs(config).items():
            try:
                ready[name] = make(bench)
                ready[name].run()  # warm up
            except Exception as error:
                ready.pop(name, None)
                failures[name] = str(error).splitlines()[0]
        for _ in range(config.rounds):
            for name, job in ready.items():
                times.setdefault(name, []).append(seconds(job.run, bench.images.device) / job.samples)
    return times, failures


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What it takes, until a GPU has done it."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_launches(config: DictConfig) -> dict[str, float]:
    """Launches a sample, by job."""
    bench, found = build(config), {}
    with as_function():
        for name, make in jobs(config).items():
            if "ours" in name:
                job = make(bench)
                job.run()
                found[name] = len(launches_of(job.run, bench.images.device)) / job.samples
    return found


def launches_of(run: Callable[[], Any], device: torch.device) -> list[Any]:
    """The profiler's events of kernels on a GPU, or of operations that call no other on a CPU."""
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
    events = (event for event in profile.events() or () if event.device_type.name == device.type.upper())
    return [event for event in events if not event.cpu_children]


def measure_memory(config: DictConfig, name: str, answer: Any) -> None:
    """Send the peak memory of one job in bytes; runs in a process of its own."""
    bench = build(config)
    with as_function():
        bench.model(bench.images[:1])
        before = memory_now(bench.images.device)
        try:
            jobs(config)[name](bench).run()
            answer.send(memory_at_most(bench.images.device) - before)
        except Exception:
            answer.send(None)


def measure_fit(config: DictConfig, answer: Any) -> None:
    """Send the peak memory of a whole fit on noise, and its seconds; runs in a process of its own."""
    bench = build(config, rank=0)
    count, labels = config.num_landmarks, torch.zeros(len(bench.images), dtype=torch.long)
    again = [i % len(bench.images) for i in range(count)]  # so many different images would take more than the fit
    loader = DataLoader(Subset(TensorDataset(bench.images, labels), again), batch_size=8)
    bench.model(bench.images[:1])
    device = bench.images.device
    before, started = memory_now(device), time.perf_counter()
    fit_ella(
        bench.model,
        loader,
        num_landmarks=count,
        rank=config.rank,
        num_curvature=8,
        landmarks="uniform",
        memory_budget=config.memory_budget,
        prior_variance=1.0,
        covariance_scale=1.0,
    )
    peak, took = memory_at_most(device) - before, time.perf_counter() - started
    answer.send((peak, formula(config, bench), took))


def measure_processes(config: DictConfig, rank: int, size: int, meeting: str, answer: Any) -> None:
    """Send the seconds of a fit on noise that `size` processes do together; runs in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    bench = build(config, rank=0)
    labels = bench.model(bench.images).argmax(1).roll(1)

    def loader(count: int) -> DataLoader:
        again = [i % len(bench.images) for i in range(count)]
        return DataLoader(Subset(TensorDataset(bench.images, labels), again), batch_size=128)

    dist.barrier()
    started = time.perf_counter()
    fit_ella(
        bench.model,
        loader(config.num_landmarks),
        loader(1000),
        num_landmarks=config.num_landmarks,
        rank=config.rank,
        landmarks="uniform",
        memory_budget=config.memory_budget,
        distributed=True,
    )
    answer.send(time.perf_counter() - started)
    dist.destroy_process_group()


def compare_processes(config: DictConfig) -> dict[int, float]:
    """Seconds of the same fit by one process and by several: number of processes -> those of the slowest."""
    context, found = multiprocessing.get_context("spawn"), {}
    for size in (1, config.processes):
        with tempfile.TemporaryDirectory() as folder:
            ends, started = [], []
            for rank in range(size):
                receive, send = context.Pipe(duplex=False)
                arguments = (config, rank, size, f"{folder}/meeting", send)
                started.append(context.Process(target=measure_processes, args=arguments))
                started[-1].start()
                send.close()  # so that the end of a process that dies is seen here
                ends.append(receive)
            found[size] = max(end.recv() for end in ends)
            for process in started:
                process.join()
    return found


def formula(config: DictConfig, bench: Bench) -> int:
    """Peak memory of a fit in bytes, as in docs/engine.md."""
    M, K, budget = config.num_landmarks, config.rank, config.memory_budget
    sizes, b = [p.numel() for p in bench.model.parameters()], 4
    P = sum(sizes)
    with as_function():
        linearization = Linearization(bench.model)
        measured = linearization.sizes(bench.images)
        a, C, largest = measured.held + measured.cotangent, measured.num_outputs, measured.largest
        linearization._fold(bench.images, {name: p.unsqueeze(0) for name, p in linearization.parameters.items()})
        folded = linearization._folding.numel if linearization._folding else 0
    held = M * P * b <= budget // 2
    d = P if held else min(16 * M, budget // (4 * M * b))
    at_a_time = chunks.chunks(bench.images)
    working_set = min(at_a_time.reverse, budget // 2)
    r = max(1, min(at_a_time.samples, min(working_set, budget // 4) // (2 * P * b + a)))
    s = max(2, min(at_a_time.forward, budget // 2) // (2 * 20 * largest))
    chunk = r * (2 * P * b + a)
    tangents = K * folded * b if K * folded * b <= budget // 4 else 0
    work = working_set if C <= K else 20 * (6 * s * largest + 2 * max(sizes) * b)
    proof = 7 * P * b
    gradients = M * d * b + max(chunk + proof, 24 * M**2)
    combination = K * P * b + chunk + (M * P * b if held else proof)
    return max(gradients, combination, K * P * b + tangents + work)


def in_own_process(target: Callable, *arguments: Any) -> Any:
    """Run `target(*arguments, connection)` in a new process and return what it sends."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:  # killed for its memory
        return None
    finally:
        process.join()


def memory_now(device: torch.device) -> int:
    """Bytes held: of the GPU by torch, or of the machine by this process. What was held at most counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return memory("VmRSS")


def memory_at_most(device: torch.device) -> int:
    """The most bytes that were held."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else memory("VmHWM")


def memory(field: str) -> int:
    """Bytes by the kernel's account (Linux): VmRSS now, VmHWM at most since the process began."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine(device: torch.device) -> str:
    """What the figures are of."""
    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name(device)}, {versions}, matmul {torch.get_float32_matmul_precision()}"


def show(
    config: DictConfig,
    times: dict[str, list[float]],
    failures: dict[str, str],
    peaks: dict[str, Any],
    launches: dict[str, float],
) -> dict:
    """Print the table and the ratios that matter; return them."""
    unit = median(times["forward pass F"])
    title = f"{config.network}, K = {config.rank}, on {machine(torch.device(config.device))}"
    columns = ("ms a sample", "F", "from … to", "peak MB", *(["launches"] if launches else []))
    table = Table("", *columns, title=title)
    rows = {}
    for name, taken in times.items():
        rows[name] = {
            "ms": 1e3 * median(taken),
            "F": median(taken) / unit,
            "spread": [min(taken) / unit, max(taken) / unit],
            "peak_bytes": peaks.get(name),
            "launches": launches.get(name),
        }
        row, peak = rows[name], peaks.get(name)
        spread = "{:.1f} … {:.1f}".format(*row["spread"])
        cells = name, f"{row['ms']:.2f}", f"{row['F']:.1f}", spread, "" if peak is None else f"{peak / 1e6:.0f}"
        table.add_row(*cells, *([f"{launches[name]:.0f}"] if name in launches else []))
    for name, reason in failures.items():
        table.add_row(name, "", "", reason, "")
    Console(width=120).print(table)
    report = {"machine": title, "rows": rows, "failures": failures, "ratios": ratios(rows)}
    for name, value in report["ratios"].items():
        Console(width=120).print(f"{name}: {value:.3g}", highlight=False)
    return report


def ratios(rows: dict[str, dict]) -> dict[str, float]:
    """What is compared, each from medians of this run."""
    paper = min(row["ms"] for name, row in rows.items() if name.startswith("features: paper"))
    ours, grad = rows["features: ours"]["ms"], rows["gradient: ours"]["ms"]
    found = {
        "features, ours / paper at its best batch": ours / paper,
        "features, ours bf16 / ours": rows["features: ours, bf16"]["ms"] / ours,
        "gradient, ours / paper": grad / rows["gradient: paper"]["ms"],
        # 2,000 landmarks; 40,000 points of curvature and 10,000 of validation after every 1,000 of them, against
        # 1,000 landmarks, 1,000 points of curvature and 5,000 looks at unseen points, of which 1,000 have features:
        # extrapolated from the costs of a point above
        "whole fit by the paper's protocol / ours": (
            2000 * rows["gradient: paper"]["ms"] + (40_000 + 40 * 10_000) * paper
        )
        / (1000 * (grad + rows["curvature: ours, random signs"]["ms"] + ours) + 5000 * rows["forward pass F"]["ms"]),
    }
    if "features: laplace-torch" in rows:
        found["features, ours / laplace-torch"] = ours / rows["features: laplace-torch"]["ms"]
    if "gradient: laplace-torch" in rows:
        found["gradient, ours / laplace-torch"] = grad / rows["gradient: laplace-torch"]["ms"]
    return found


@hydra.main(version_base="1.3", config_path="../conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    """Measure, print, and write benchmark.json."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    torch.set_float32_matmul_precision(config.matmul)
    if config.fit:
        found = in_own_process(measure_fit, config)
        peak, expected, seconds = found
        Console().print(
            f"{config.network}, M = {config.num_landmarks}, K = {config.rank}: {seconds:.0f} s, at most "
            f"{peak / 1e9:.2f} GB above the network; {expected / 1e9:.2f} GB by the formula in docs/engine.md",
            highlight=False,
            soft_wrap=True,
        )
        return
    if config.processes:
        seconds = compare_processes(config)
        alone, together = seconds[1], seconds[config.processes]
        Console().print(
            f"{config.network}, M = {config.num_landmarks}, K = {config.rank}: {alone:.0f} s by one process of one "
            f"thread, {together:.0f} s by {config.processes}: {together / alone:.2f}",
            highlight=False,
            soft_wrap=True,
        )
        return
    times, failures = measure_times(config)
    peaks = {name: in_own_process(measure_memory, config, name) for name in times} if config.peaks else {}
    launches = measure_launches(config) if config.launches else {}
    report = show(config, times, failures, peaks, launches)
    (folder / "benchmark.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
