"""Which directions are worth having: rules for the basis at equal rank, with everything after it the same.

    python recipes/bases.py                                  # pairs of digits, 100 classes
    python recipes/bases.py experiment=cifar10_resnet20 trainer.max_epochs=0 data.root=<folder> model.checkpoint=<file>

A rule gives K orthonormal directions. How good they are is told by the shares that they hold of the kernel's trace (on
test points) and of the curvature's (on training points), and by what the calibrated posterior predicts.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import hydra
import torch
from compare import NONE, Own, detection, evaluation_sets, figures_of, network
from data import some
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_ella import ELLAPredictor
from lightning_ella.basis import nystrom_basis
from lightning_ella.curvature import curvature
from lightning_ella.data import Batch, Points, draw
from lightning_ella.engine import Linearization
from lightning_ella.fit import MANY
from lightning_ella.landmarks import class_balanced, uniform
from lightning_ella.likelihoods import Classification
from lightning_ella.linearize import Basis, as_function
from lightning_ella.posterior import SCALES
from lightning_ella.residual import num_probes, with_probes
from lightning_ella.settings import Settings

LIKELIHOOD = Classification()

Gradients = Iterator[dict[str, Tensor]]


@dataclass
class Task:
    """A network, its training points, and how many of everything."""

    linearization: Linearization
    points: Points
    num_landmarks: int  # M
    rank: int  # K
    num_curvature: int
    generator: torch.Generator

    @cached_property
    def first(self) -> Tensor:
        """The first of its inputs, as a batch."""
        return next(iter(self.points.batches([0], "cpu")))[0]

    @cached_property
    def num_outputs(self) -> int:
        """C."""
        return self.linearization.sizes(self.first).num_outputs

    def gradients(self, numbers: list[int], cotangents: Callable[[Tensor, slice], Tensor]) -> Gradients:
        """Rows vᵀ J(x) of some points, with v = `cotangents(logits, which of them)`, (b, C)."""
        done = 0
        for inputs, targets, _ in tqdm(self.points.batches(numbers, "cpu"), desc="gradients", leave=False):
            which = slice(done, done := done + len(targets))
            rows = self.linearization.layerwise.rows(inputs, lambda f, which=which: cotangents(f, which).unsqueeze(1))
            yield {name: rows.pop(name).squeeze(1) for name in self.linearization.parameters}

    def curvature_batches(self) -> Iterator[Batch]:
        """The training points that the curvature is summed over: the same for every rule."""
        numbers = draw(self.num_curvature, len(self.points), torch.Generator().manual_seed(0))
        yield from tqdm(self.points.batches(numbers, "cpu"), desc="curvature", leave=False)

    def nystrom(self, numbers: list[int], cotangents: Callable[[Tensor, slice], Tensor]) -> Basis:
        """The leading directions of some rows."""
        gradients = lambda: self.gradients(numbers, cotangents)  # noqa: E731
        return self.shaped(
            nystrom_basis(gradients, self.linearization.parameters, len(numbers), self.rank, memory_budget=2**34).basis
        )

    def one_hot(self, outputs: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Cotangents that choose one output of each point."""
        return lambda logits, which: nn.functional.one_hot(outputs[which], logits.shape[1])

    def shaped(self, rows: Basis) -> dict[str, Tensor]:
        """Rows (K, p) in the parameters' shapes."""
        return {name: rows[name].reshape(-1, *value.shape) for name, value in self.linearization.parameters.items()}


def uniform_class(task: Task) -> Basis:
    """The paper's: points of every class in turn, one output of each drawn uniformly."""
    chosen = class_balanced(task.points, task.num_landmarks, task.num_outputs, task.generator)
    return task.nystrom(chosen.numbers, task.one_hot(chosen.outputs))


def likely_outputs(task: Task) -> Basis:
    """The same points, the output of each drawn from the network's own p(y|x)."""
    chosen = class_balanced(task.points, task.num_landmarks, task.num_outputs, task.generator)
    uniforms = torch.rand(task.num_landmarks, generator=task.generator)
    return task.nystrom(chosen.numbers, lambda f, which: drawn(f, uniforms[which]))


def drawn(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One-hot labels (b, C) from the network's probabilities: where the distribution passes uniform numbers (b,)."""
    passed = logits.softmax(-1).double().cumsum(-1) <= uniforms.unsqueeze(1)
    return nn.functional.one_hot(passed.sum(-1).clamp_max(logits.shape[1] - 1), logits.shape[1]).to(logits)


def weighted_rows(task: Task) -> Basis:
    """Rows vᵀ J with E[v vᵀ] = Λ, so the directions of the curvature. Sampled labels of a sure network are too rare."""
    chosen = class_balanced(task.points, task.num_landmarks, task.num_outputs, task.generator)
    signs = torch.randint(2, (task.num_landmarks, task.num_outputs), generator=task.generator) * 2 - 1

    def cotangents(logits: Tensor, which: slice) -> Tensor:
        p = logits.softmax(-1)
        mixed = signs[which] * p.sqrt()
        return mixed - p * mixed.sum(-1, keepdim=True)

    return task.nystrom(chosen.numbers, cotangents)


def rp_cholesky(task: Task) -> Basis:
    """M landmarks out of 2 M, drawn by what the earlier ones leave of the kernel (Chen, Epperly, Tropp, Webber 2022).

    The leading directions of all 2 M rows within the span of the chosen ones. Costs twice as many gradients.
    """
    pool = uniform(task.points, min(2 * task.num_landmarks, len(task.points)), task.num_outputs, task.generator)
    parts = task.gradients(pool.numbers, task.one_hot(pool.outputs))
    rows = torch.cat([torch.cat(list(part.values()), 1) for part in parts])  # (2M, P)
    kernel = (rows @ rows.T).double()
    left, factor = kernel.diagonal().clone(), kernel.new_zeros(len(kernel), task.num_landmarks)
    pivots = []
    for i in range(min(task.num_landmarks, len(kernel) // 2)):
        pivot = int(torch.multinomial(left.clamp_min(0), 1, generator=task.generator))
        pivots.append(pivot)
        column = kernel[:, pivot] - factor[:, :i] @ factor[pivot, :i]
        factor[:, i] = column / column[pivot].clamp_min(1e-12).sqrt()
        left -= factor[:, i].square()
        left[pivot] = 0
    jitter = 1e-6 * kernel.diagonal().mean() * torch.eye(len(pivots))
    inverse = torch.linalg.inv(torch.linalg.cholesky(kernel[pivots][:, pivots] + jitter))  # makes the rows orthonormal
    coordinates = kernel[:, pivots] @ inverse.T  # of all rows in the span of the chosen
    _, directions = torch.linalg.eigh(coordinates.T @ coordinates)
    weights = directions[:, -task.rank :].T.flip(0) @ inverse  # (K, M)
    sizes = [value.numel() for value in task.linearization.parameters.values()]
    basis = (weights.float() @ rows[pivots]).split(sizes, 1)
    return orthonormal(task.shaped(dict(zip(task.linearization.parameters, basis, strict=True))))


def krylov(task: Task) -> Basis:
    """One step of block Krylov on the curvature: the leading directions of it within the span of V and G V."""
    start = uniform_class(task)
    moved = {name: torch.zeros_like(part) for name, part in start.items()}
    for inputs, *_ in task.curvature_batches():
        logits, features = task.linearization.features(inputs, start)
        p = logits.softmax(-1).unsqueeze(2)
        weighted = p * features - p * (p * features).sum(1, keepdim=True)  # Λ Ψ, (B, C, K)
        with torch.enable_grad():
            outputs = task.linearization.network(inputs)
            wanted = list(task.linearization.network.names)
            for k in range(features.shape[2]):
                parts = torch.autograd.grad(outputs, wanted, weighted[..., k], retain_graph=True)
                for name, part in zip(moved, parts, strict=True):
                    moved[name][k] += part
    both = orthonormal({name: torch.cat([part, moved[name]]) for name, part in start.items()})
    _, directions = torch.linalg.eigh(summed_curvature(task, both))
    best = directions[:, -task.rank :].T.flip(0).float()
    return {name: torch.tensordot(best, part, 1) for name, part in both.items()}


def optimal_subspace(task: Task) -> Basis:
    """Of 5 K directions the subspace that keeps most of the predictive variance (Faller and Martin 2025).

    Costs features along 5 K directions at the curvature's points. The prior is the one that the tuning starts from.
    """
    wide = uniform_class(replace(task, rank=5 * task.rank))
    curvature = summed_curvature(task, wide)
    gram = torch.zeros_like(curvature)
    for inputs, *_ in task.curvature_batches():
        features = task.linearization.features(inputs, wide)[1].flatten(0, 1).double()  # (BC, 5K)
        gram += features.T @ features
    weakest = torch.linalg.eigvalsh(curvature).clamp_min(1e-8).log().mean().exp()
    directions = best_subspace(curvature + weakest * torch.eye(len(curvature)), gram, task.rank).float()
    return {name: torch.tensordot(directions.T, part, 1) for name, part in wide.items()}


def best_subspace(precision: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Orthonormal D (n, rank) with the largest tr(D (Dᵀ A D)⁻¹ Dᵀ S), for precision A and the features' Gram matrix S.

    With A⁻¹ = L Lᵀ it is the span of L U, where U are the leading eigenvectors of Lᵀ S L.
    """
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    _, vectors = torch.linalg.eigh(root.T @ gram @ root)
    return torch.linalg.qr(root @ vectors[:, -rank:])[0]


RULES = {
    "uniform outputs (the paper)": uniform_class,
    "likely outputs": likely_outputs,
    "rows of Λ^½ J": weighted_rows,
    "RPCholesky, 2 M gradients": rp_cholesky,
    "block Krylov on the curvature": krylov,
    "optimal subspace of 5 K": optimal_subspace,
}


def orthonormal(basis: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same span, orthonormal."""
    rows = torch.cat([part.flatten(1) for part in basis.values()], 1)
    turned = torch.linalg.qr(rows.double().T)[0].T.to(rows)
    parts = turned.split([part[0].numel() for part in basis.values()], 1)
    return {name: part.reshape(basis[name].shape) for name, part in zip(basis, parts, strict=True)}


def summed_curvature(task: Task, basis: Basis) -> Tensor:
    """H along a basis, with whatever probes are in it."""
    count = min(task.num_curvature, len(task.points))
    return curvature(
        *(task.linearization, task.curvature_batches(), basis, LIKELIHOOD, len(task.points)), seeds=torch.zeros(count)
    )


def predictor_of(task: Task, basis: Basis, config: DictConfig) -> tuple[ELLAPredictor, float]:
    """A predictor with this basis, its scales still 1, and the share of the curvature's trace that the basis holds."""
    rank = len(next(iter(basis.values())))  # less than asked for where the kernel has no more
    probes = num_probes("auto", rank, reverse=task.linearization.cheaper(task.first, rank) == "layerwise")
    tangents = with_probes(dict(basis), probes, config.seed)
    both = summed_curvature(task, tangents)
    share = both.diagonal()[:rank].sum() / both.trace()
    one = torch.tensor(1.0, dtype=torch.float64)
    settings = asdict(Settings(rank=rank, residual=probes, seed=config.seed))
    predictor = ELLAPredictor(
        task.linearization.network.model,
        basis=tangents,
        eigenvalues=torch.ones(rank),
        curvature=both[:rank, :rank],
        settings=settings,
        **dict.fromkeys(SCALES, one),
    )
    return predictor, float(share)


def row(predictor: ELLAPredictor, held_out: DataLoader, sets: dict) -> dict[str, float]:
    """What the posterior predicts, calibrated with the span alone and with all its parts."""
    own, found = Own(predictor, held_out), {}
    variants = {"span": {"residual_scale": NONE, "temperature": 1.0}, "all": {}}
    predictions = {name: own.variant(given) for name, given in variants.items()}
    corrupted = [key for key in sets if key != "test" and not key.startswith("foreign")]
    probs: dict[str, dict[str, Tensor]] = {name: {} for name in variants}
    scores = {}
    for key, (images, _) in tqdm(sets.items(), desc="sets of images", leave=False):
        batches = images.split(64)
        parts = [{name: predict(batch) for name, predict in predictions.items()} for batch in batches]
        for name in variants:
            probs[name][key] = torch.cat([part[name] for part in parts])
        if key not in corrupted:
            scores[key] = torch.cat([predictor(batch).novelty for batch in batches])
    for name in variants:
        found[f"NLL, {name}"] = figures_of(probs[name], sets, ["test"])["nll"]
        found[f"corrupted NLL, {name}"] = figures_of(probs[name], sets, corrupted)["nll"]
    detected = detection(scores)
    found |= {name: value for name, value in detected.items() if name.startswith("AUROC")}
    return {"kernel": 1 - float(scores["test"].mean())} | found


@hydra.main(version_base="1.3", config_path="../conf", config_name="bases")
def main(config: DictConfig) -> None:
    """Make every basis, compare, print, and write bases.json."""
    data = instantiate(config.data)
    module = network(config, data, config.seed)
    data.setup("fit")
    sets = evaluation_sets(data, config)
    held_out = DataLoader(some(data.holdout, config.num_calibration, config.seed), batch_size=64)
    rows, points = {}, Points(data.ella_train_dataloader())
    num_landmarks = config.ella.num_landmarks or min(MANY, len(points))
    for name, rule in RULES.items():
        generator = torch.Generator().manual_seed(config.seed)
        sizes = (num_landmarks, config.ella.rank, config.ella.num_curvature)
        with as_function():
            task = Task(Linearization(module), points, *sizes, generator)
            predictor, share = predictor_of(task, rule(task), config)
        rows[name] = {"curvature": share} | row(predictor, held_out, sets)
    table = Table("", *next(iter(rows.values())), title=f"M = {num_landmarks:,}, K = {config.ella.rank}")
    for name, found in rows.items():
        table.add_row(name, *(f"{value:.4f}" if value < 10 else f"{value:.0f}" for value in found.values()))
    Console(width=160).print(table)
    (Path(HydraConfig.get().runtime.output_dir) / "bases.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
