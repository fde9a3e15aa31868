"""Regression beside the exact methods that ELLA approximates: python recipes/regression.py [seeds=[0]] [rank=…].

Small data sets that scikit-learn has or makes, a perceptron on each, and four predictives of it, each tuned by the NLL
on the same held-out fifth: the network with noise alone, exact linearised Laplace over all parameters, a Gaussian
process with the network's tangent kernel, and this package. Only the latter needs no matrix of N x N or P x P. Beside
them, an ensemble of three and a network that learns quantiles. Width is that of intervals made to hold 90 % of the
held-out points by split conformal prediction, for everyone alike.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import ceil, log
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from sklearn import datasets
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from lightning_ella import ELLACallback
from lightning_ella.guarantee import Guarantee, Judged
from lightning_ella.likelihoods import LEVEL, Regression
from lightning_ella.metrics import regression_metrics
from lightning_ella.plots import coverage_curve, fan_chart
from lightning_ella.posterior import minimise
from lightning_ella.predictions import Gaussian, NormalPrediction

Tables = dict[str, Callable[[int], tuple[Tensor, Tensor]]]


def gap(seed: int) -> tuple[Tensor, Tensor]:
    """A wave of one input with nothing between −1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(300, 1, generator=generator) - 2
    x = x + x.sign()
    return x, (1.5 * x).sin() + 0.2 * torch.randn(300, 1, generator=generator)


def table(found: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets as tensors, (N, d) and (N, C)."""
    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in found)
    return x, y.reshape(len(y), -1)


DATA: Tables = {
    "diabetes": lambda seed: table(datasets.load_diabetes(return_X_y=True)),
    "linnerud (3 outputs)": lambda seed: table(datasets.load_linnerud(return_X_y=True)),
    "friedman1": lambda seed: table(datasets.make_friedman1(600, noise=1.0, random_state=seed)),
    "friedman3": lambda seed: table(datasets.make_friedman3(600, noise=0.1, random_state=seed)),
    "wave with a gap": gap,
}


LEVELS = torch.linspace(0.05, 0.95, 19)  # quantiles that a network learns, for the interval of 90 % the first and last
MEMBERS = 3  # of the ensemble
MOVED = "mean moved by the unseen points"


class Perceptron(LightningModule):
    """Two hidden layers, and the squared error."""

    def __init__(self, inputs: int, outputs: int, hidden: int):
        super().__init__()
        layers = nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d) to (B, C)."""
        return self.body(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Nothing: the held-out points are for ELLA."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.01)


class QuantilePerceptron(Perceptron):
    """Quantiles of each output at `LEVELS`, by the pinball loss (Koenker and Bassett 1978)."""

    def __init__(self, inputs: int, outputs: int, hidden: int):
        super().__init__(inputs, len(LEVELS) * outputs, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d) to (B, C, Q), in ascending order."""
        return self.body(x).unflatten(1, (-1, len(LEVELS))).sort(-1).values

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean pinball loss."""
        return pinball(self(batch[0]), batch[1])


def pinball(quantiles: Tensor, targets: Tensor) -> Tensor:
    """The mean pinball loss of quantiles (n, C, Q); twice it comes close to the CRPS."""
    away = targets.unsqueeze(-1) - quantiles
    return torch.maximum(LEVELS.to(away) * away, (LEVELS.to(away) - 1) * away).mean()


class QuantileNetwork:
    """What a network that learnt quantiles says: intervals that are made wider alike (Romano et al. 2019)."""

    def __init__(self, network: nn.Module):
        self.network = network

    def figures(self, problem: "Problem") -> dict[str, float]:
        """Of test points, like those of a prediction, but without an NLL."""
        (known, seen), (found, targets) = (
            (self.network(x).detach(), y) for x, y in (problem.held_out.tensors, problem.test.tensors)
        )
        scores = torch.maximum(known[..., 0] - seen, seen - known[..., -1])
        away = Guarantee.of(Judged(scores, scores[:0, 0], scores[:0, 0] > 0)).quantile(LEVEL).to(found)
        inside = (found[..., 0] <= targets) & (targets <= found[..., -1])
        return {
            "rmse": float((found[..., len(LEVELS) // 2] - targets).square().mean().sqrt()),
            "crps": 2 * float(pinball(found, targets)),
            "coverage_90": float(inside.double().mean()),
            "width": float((found[..., -1] - found[..., 0] + 2 * away).mean()),
        }


class Ensemble:
    """Several networks, and the noise of their mean's residuals at held-out points (Lakshminarayanan et al. 2017)."""

    def __init__(self, networks: list[nn.Module], problem: "Problem"):
        self.networks = networks
        x, targets = problem.held_out.tensors
        mean, spread = self._look(x)
        excess = (targets - mean).square() - spread.square().sum(2)
        self.noise = excess.mean().clamp_min(0.01 * (targets - mean).square().mean()).view(1)

    def __call__(self, x: Tensor) -> NormalPrediction:
        mean, factor = self._look(x)
        gaussian = Gaussian(mean, factor, mean.new_zeros(1, factor.shape[2]))
        return NormalPrediction(gaussian, "exact", mean.new_ones(()), Regression(), noise_variance=self.noise)

    def _look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (n, C) and deviations of the members from it, (n, C, members), so that their squares are a variance."""
        found = torch.stack([network(x).detach() for network in self.networks], 2)
        mean = found.mean(2)
        return mean, (found - mean.unsqueeze(2)) / len(self.networks) ** 0.5


@dataclass
class Problem:
    """Standardised thirds: trained on, held out, tested on."""

    train: TensorDataset
    held_out: TensorDataset
    test: TensorDataset

    @classmethod
    def split(cls, x: Tensor, y: Tensor, seed: int) -> "Problem":
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        first, second = ceil(0.6 * len(x)), ceil(0.8 * len(x))
        seen = order[:first]
        x, y = ((values - values[seen].mean(0)) / values[seen].std(0).clamp_min(1e-6) for values in (x, y))
        parts = seen, order[first:second], order[second:]
        return cls(*(TensorDataset(x[part], y[part]) for part in parts))


def tuned(predict: Callable[[Tensor], tuple[Gaussian, Tensor]], targets: Tensor, start: list[float]) -> Tensor:
    """Logarithms of the scales with the lowest NLL of `predict(scales) -> (outputs, noise)` on held-out points."""

    def loss_and_gradient(steps: Tensor) -> tuple[Tensor, Tensor]:
        steps = steps.detach().requires_grad_()
        with torch.enable_grad():
            gaussian, noise = predict(steps)
            prediction = NormalPrediction(gaussian, "exact", noise.new_ones(()), Regression(), noise_variance=noise)
            loss = Regression().nll(prediction, targets).mean() + 0.005 * (steps - begin).square().sum()
        return loss.detach(), torch.autograd.grad(loss, steps)[0]

    begin = torch.tensor(start, dtype=torch.float64)
    return minimise(loss_and_gradient, begin)


class Exact:
    """Linearised Laplace over all parameters, or the Gaussian process of the same kernel, with dense matrices."""

    def __init__(self, network: nn.Module, problem: Problem, process: bool):
        self.network, self.process = network.double(), process
        self.x, self.y = (values.double() for values in problem.train.tensors)
        self.jacobian, self.mean = self._look(self.x)
        flat = self.jacobian.flatten(0, 1)
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(flat @ flat.T)
        x, targets = (values.double() for values in problem.held_out.tensors)
        held_out = self._look(x)
        noise = float((targets - held_out[1]).square().mean().log())
        self.scales = tuned(lambda steps: self._at(held_out, steps), targets, [log(0.1), noise])

    def __call__(self, x: Tensor) -> NormalPrediction:
        gaussian, noise = self._at(self._look(x.double()), self.scales)
        return NormalPrediction(gaussian, "exact", noise.new_ones(()), Regression(), noise_variance=noise)

    def _look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Jacobians (n, C, P) and outputs (n, C)."""
        parameters = {name: value.detach() for name, value in self.network.named_parameters()}
        blocks = jacrev(lambda p: functional_call(self.network, p, (x,)))(parameters)
        return torch.cat([block.flatten(2) for block in blocks.values()], 2).detach(), self.network(x).detach()

    def _at(self, seen: tuple[Tensor, Tensor], steps: Tensor) -> tuple[Gaussian, Tensor]:
        """Outputs and noise: variances are σ₀² (k(x, x) − k(x, X) (k(X, X) + σ²/σ₀²)⁻¹ k(X, x))."""
        jacobian, mean = seen
        prior, noise = steps.exp()
        cross = jacobian @ self.jacobian.flatten(0, 1).T @ self.eigenvectors  # (n, C, N C)
        shrunk = 1 / (self.eigenvalues.clamp_min(0) + noise / prior)
        variance = prior * (jacobian.square().sum(2) - (cross.square() * shrunk).sum(2))
        if self.process:
            mean = cross @ (shrunk * (self.eigenvectors.T @ self.y.flatten()))
        factor = torch.diag_embed(variance.clamp_min(1e-12).sqrt())
        return Gaussian(mean, factor, torch.zeros(1, mean.shape[1]).to(mean)), noise.view(1)


def certain(network: nn.Module, problem: Problem) -> Callable[[Tensor], NormalPrediction]:
    """The network with the noise of its residuals at held-out points."""
    x, targets = problem.held_out.tensors
    noise = (targets - network(x).detach()).square().mean().view(1)

    def predict(x: Tensor) -> NormalPrediction:
        mean = network(x).detach()
        gaussian = Gaussian(mean, mean.new_zeros(*mean.shape, 1), mean.new_zeros(1, 1))
        return NormalPrediction(gaussian, "exact", noise.new_ones(()), Regression(), noise_variance=noise)

    return predict


def trained(
    config: DictConfig, problem: Problem, kind: type[Perceptron], seed: int, *callbacks: Callback
) -> Perceptron:
    """A network after the training that all have."""
    seed_everything(seed, verbose=False)
    x, y = problem.train.tensors
    module = kind(x.shape[1], y.shape[1], config.hidden)
    loaders = DataLoader(problem.train, 32, shuffle=True), DataLoader(problem.held_out, 64)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    folder = HydraConfig.get().runtime.output_dir
    options = {**quiet, "default_root_dir": folder, "enable_checkpointing": False, "callbacks": [*callbacks]}
    Trainer(max_epochs=config.max_epochs, **options).fit(module, *loaders)
    return module.eval()


def methods(
    config: DictConfig, problem: Problem, seed: int
) -> Iterator[tuple[str, Callable[[Tensor], NormalPrediction] | QuantileNetwork]]:
    """Train, and give each method's predictions by name."""
    x, y = problem.train.tensors
    count = min(config.num_landmarks, len(x))
    ella = ELLACallback(likelihood="regression", num_landmarks=count, rank=min(config.rank, count), seed=seed)
    module = trained(config, problem, Perceptron, seed, ella)
    assert ella.predictor is not None
    yield "network and noise", certain(module, problem)
    yield "lightning-ella", ella.predictor
    held_out = DataLoader(problem.held_out, 64)
    yield f"lightning-ella, {MOVED}", deepcopy(ella.predictor).update(held_out)
    copy = Perceptron(x.shape[1], y.shape[1], config.hidden)
    copy.load_state_dict(module.state_dict())
    yield "exact linearised Laplace", Exact(copy.body, problem, process=False)
    yield "Gaussian process (NTK)", Exact(copy.body, problem, process=True)
    others = [trained(config, problem, Perceptron, 1000 * (seed + 1) + i) for i in range(1, MEMBERS)]
    yield f"ensemble of {MEMBERS}", Ensemble([module, *others], problem)
    yield "quantile network", QuantileNetwork(trained(config, problem, QuantilePerceptron, seed))


def figures(predict: Callable[[Tensor], NormalPrediction], problem: Problem) -> dict[str, float]:
    """NLL, RMSE, CRPS, coverage, and the width of intervals that are made to hold 90 %, in standardised units."""
    (known, seen), (prediction, targets) = (
        (predict(x), y) for x, y in (problem.held_out.tensors, problem.test.tensors)
    )
    metrics, targets = regression_metrics(), targets.to(prediction.mean)
    metrics.update(Regression().summary(prediction, targets), targets)
    scores = Judged.of(Regression(), known, seen, torch.ones(len(seen), dtype=torch.bool))
    prediction.guarantee = Guarantee.of(scores)
    low, high = prediction.interval(LEVEL, guaranteed=True)
    return {name: float(value) for name, value in metrics.compute().items()} | {"width": float((high - low).mean())}


@hydra.main(version_base="1.3", config_path="../conf", config_name="regression")
def main(config: DictConfig) -> None:
    """All data sets and seeds; print, draw and write."""
    folder, console = Path(HydraConfig.get().runtime.output_dir), Console(width=100)
    report: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in config.sets or DATA:
        rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        predictions: dict[str, NormalPrediction] = {}
        for seed in config.seeds:
            problem = Problem.split(*DATA[name](seed), seed)
            x, targets = problem.test.tensors
            for method, predict in methods(config, problem, seed):
                found = predict.figures(problem) if isinstance(predict, QuantileNetwork) else figures(predict, problem)
                if method.endswith(MOVED):
                    del found["width"]  # it has learnt from the points that would make it wider
                for figure, value in found.items():
                    rows[method][figure].append(value)
                if isinstance(predict, QuantileNetwork):
                    continue
                predictions[method] = predict(x)
                if name == "wave with a gap" and method == "lightning-ella":
                    everywhere = torch.linspace(-1.8, 1.8, 300).unsqueeze(1)
                    seen = [values[:, 0] for values in problem.train.tensors]
                    chart = fan_chart(everywhere[:, 0], predict(everywhere), seen[1], seen[0])
                    chart.savefig(folder / "fan.png", dpi=120)
            coverage_curve(predictions, targets).savefig(folder / f"coverage_{name.split()[0]}.png", dpi=120)
        report[name] = rows
        show(console, f"{name}, {len(config.seeds)} seeds", rows)
    (folder / "regression.json").write_text(json.dumps(report, indent=2))
    console.print(f"Figures and regression.json are in {folder}")


def show(console: Console, title: str, rows: dict[str, dict[str, list[float]]]) -> None:
    """Means over seeds, and their standard errors."""
    columns = list(next(iter(rows.values())))
    printed = Table("", *columns, title=title)
    for method, found in rows.items():
        printed.add_row(method, *(cell(torch.tensor(found[column])) if column in found else "" for column in columns))
    console.print(printed)


def cell(values: Tensor) -> str:
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}" if len(values) > 1 else f"{values[0]:.3f}"


if __name__ == "__main__":
    main()
