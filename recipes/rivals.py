"""What one would use instead of this package, each tuned by the NLL of its own predictions on the same unseen points.

A rival takes a `Task` and gives back a function from inputs to class probabilities. Those of laplace-torch 0.3 choose
a prior precision from `GRID`, and probit or Monte Carlo. Curvature over all layers is that of `Task.num_train` points,
scaled up to the whole training set; that of the last layer is of all points. Rivals over all layers share Jacobians if
they are asked about the same tensor one after the other, of at most `BATCH` inputs. `hessian_structure="lowrank"` is
left out: it needs a fork of ASDL that PyPI does not have; a subnetwork with dense curvature stands in its place.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset

from lightning_ella.augmentation import seen
from lightning_ella.linearize import version
from lightning_ella.metrics import NegativeLogLikelihood

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from laplace import Laplace
    from laplace.curvature import AsdlGGN, CurvlinopsGGN
    from laplace.utils.functional_utils import draw_gaussian

Predict = Callable[[Tensor], Tensor]  # inputs (B, …) -> probabilities (B, C)
Look = Callable[[Tensor], tuple[Tensor, Tensor]]  # inputs (B, …) -> Jacobians (B, C, P), logits (B, C)
Covariance = Callable[[Tensor, float], Tensor]  # Jacobians (B, C, P), prior precision -> (B, C, C)

GRID = torch.logspace(-2, 6, 17).tolist()  # prior precisions; the last is close to no uncertainty
WIDE = torch.logspace(-5, 6, 23).tolist()  # for kernels of low rank, which can do with little
BATCH = 16  # inputs whose Jacobians over all layers are held at a time
DRAWS, PASSES = 512, 20  # of Monte Carlo, of dropout
SUBNETWORK = 500  # parameters
LANDMARKS, RANK = 500, 20  # of laplace-torch's ELLA
INDUCING, ITERATIONS, LEARNING_RATE = 32, 100, 1e-2  # of VaLLA


class NotApplicable(Exception):  # noqa: N818
    """The network is not one for this method."""


@dataclass
class Task:
    """What every method gets.

    Attributes:
        model: trained, in eval mode, maps inputs to logits (B, C).
        train: (x, y) batches of training data, clean.
        held_out: (x, y) batches never trained on, to tune on.
        seed: fixes chosen points and draws.
        num_train: training points that curvature over all layers is computed from, at most.
    """

    model: nn.Module
    train: DataLoader
    held_out: DataLoader
    seed: int = 0
    num_train: int = 2000

    @cached_property
    def _jacobians(self) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        return lru_cache(1)(lambda inputs, version: jacobians(self.model, inputs))

    def jacobians(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Jacobians (B, C, P), logits (B, C); those of the last inputs are kept, as the next rival may ask for them."""
        return self._jacobians(inputs, version(inputs))

    @cached_property
    def part(self) -> DataLoader:
        """`num_train` training points, in small batches."""
        return self.points(self.num_train)

    def points(self, count: int) -> DataLoader:
        """Training points, drawn at random, in small batches."""
        dataset: Any = self.train.dataset
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed))
        return DataLoader(Subset(dataset, order[:count].tolist()), BATCH, collate_fn=self.train.collate_fn)


def jacobians(model: nn.Module, inputs: Tensor, outputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Jacobians (B, C, P) with respect to the parameters that require gradients, and logits (B, C).

    With `outputs` (B, k), only those rows of the Jacobians: (B, k, P).
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def logits(at: dict[str, Tensor], sample: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        out = functional_call(model, at, (sample.unsqueeze(0),)).squeeze(0)
        return (out if chosen is None else out.gather(0, chosen)), out

    axes = (None, 0, None if outputs is None else 0)
    blocks, found = vmap(jacrev(logits, has_aux=True), axes)(parameters, inputs, outputs)
    return torch.cat([block.flatten(2) for block in blocks.values()], 2), found


class PerSample(CurvlinopsGGN):
    """laplace-torch's default backend; its own Jacobians of a batch of B take B times as long."""

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians (B, C, P) and logits (B, C)."""
        found, logits = jacobians(self.model, x)
        return (found if self.subnetwork_indices is None else found[:, :, self.subnetwork_indices]), logits

    def selected_output_jacobians(
        self, x: Any, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Jacobians (B, 1, P) of one output each, and logits (B, C)."""
        return jacobians(self.model, x, outputs.unsqueeze(1))


def fitted(task: Task, loader: DataLoader, *structure: str, **options: Any) -> Any:
    """A posterior of laplace-torch around a copy of the network, its curvature scaled up to the whole training set.

    The `options` are its own, but for `model`, to take in place of the copy, and `fit`, options of the fit.
    """
    points, total = (len(each.dataset) for each in (loader, task.train))  # type: ignore[arg-type]
    model, fit = options.pop("model", None) or deepcopy(task.model), options.pop("fit", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior: Any = Laplace(model, "classification", *structure, temperature=points / total, **options)
        posterior.fit(loader, **fit)
    return posterior


def probit(logits: Tensor, covariance: Tensor, seed: int) -> Tensor:
    return (logits / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()).softmax(1)


def monte_carlo(logits: Tensor, covariance: Tensor, seed: int) -> Tensor:
    return draw_gaussian(logits, covariance, DRAWS, torch.Generator().manual_seed(seed)).softmax(-1).mean(0)


@torch.no_grad()
def tuned(task: Task, look: Look, covariance: Covariance, size: int = BATCH, grid: Sequence[float] = GRID) -> Predict:
    """Linearized predictions with the prior precision and the link that suit the held-out points best."""
    losses: dict[tuple[float, Callable], NegativeLogLikelihood] = defaultdict(NegativeLogLikelihood)
    smaller = (zip(*(part.split(size) for part in batch), strict=True) for batch in task.held_out)
    for inputs, targets in chain.from_iterable(smaller):
        found, logits = look(inputs)
        for precision in grid:
            spread = covariance(found, precision)
            for link in (probit, monte_carlo):
                losses[precision, link].update(link(logits, spread, task.seed), targets)
    best, link = min(losses, key=lambda choice: float(losses[choice].compute()))

    @torch.no_grad()
    def predict(inputs: Tensor) -> Tensor:
        parts = inputs.split(size) if len(inputs) > size else [inputs]
        seen = ((covariance(found, best), logits) for found, logits in map(look, parts))
        return torch.cat([link(logits, spread, task.seed) for spread, logits in seen])

    return predict


def variance(posterior: Any) -> Covariance:
    """laplace-torch's functional variance."""

    def covariance(found: Tensor, precision: float) -> Tensor:
        posterior.prior_precision = precision
        return posterior.functional_variance(found)

    return covariance


def certain(task: Task) -> Predict:
    return torch.no_grad()(lambda inputs: task.model(inputs).softmax(1))


@torch.no_grad()
def temperature_scaling(task: Task, views: Sequence[str] = (), models: Sequence[nn.Module] = ()) -> Predict:
    """One temperature for all logits (Guo et al. 2017); with views, or models, the mean of the probabilities of each.

    So it is tuned for the mean, as an ensemble's must be (Rahaman and Thiery 2021).
    """

    def looks(inputs: Tensor) -> Tensor:  # (B, V, C)
        asked = [seen(inputs, view) for view in (None, *views)]
        return torch.stack([model(each) for model in models or [task.model] for each in asked], 1)

    parts = [(looks(inputs), targets) for inputs, targets in task.held_out]
    logits, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    log_temperature = torch.zeros((), dtype=logits.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        of_each = (logits / log_temperature.exp()).log_softmax(-1)
        loss = nn.functional.nll_loss(of_each.logsumexp(1) - math.log(logits.shape[1]), targets)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    temperature = log_temperature.detach().exp()
    return torch.no_grad()(lambda inputs: (looks(inputs) / temperature).softmax(-1).mean(1))


def mc_dropout(task: Task) -> Predict:
    """The mean over passes with dropout left on (Gal and Ghahramani 2016)."""
    model = deepcopy(task.model)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if not dropouts:
        raise NotApplicable("The network has no nn.Dropout with p > 0.")
    for module in dropouts:
        module.train()

    @torch.no_grad()
    def predict(inputs: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(task.seed)
            return torch.stack([model(inputs).softmax(1) for _ in range(PASSES)]).mean(0)

    return predict


def last_layer(structure: str) -> Callable[[Task], Predict]:
    def rival(task: Task) -> Predict:
        posterior = fitted(task, task.train, "last_layer", structure, backend=AsdlGGN)
        return tuned(task, posterior.backend.last_layer_jacobians, variance(posterior), size=512)

    return rival


def diagonal(task: Task) -> Predict:
    posterior = fitted(task, task.part, "all", "diag", backend=PerSample)
    return tuned(task, task.jacobians, variance(posterior))


def kfac(task: Task) -> Predict:
    """Over linear and convolutional layers: KFAC knows no others."""
    model = deepcopy(task.model)
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    posterior = fitted(task, task.part, "all", "kron", model=model, backend=AsdlGGN)
    pairs = zip(task.model.parameters(), model.parameters(), strict=True)
    kept = torch.cat([torch.full((old.numel(),), new.requires_grad) for old, new in pairs if old.requires_grad])

    def look(inputs: Tensor) -> tuple[Tensor, Tensor]:
        found, logits = task.jacobians(inputs)
        return in_eigenbasis(posterior, found[:, :, kept]), logits

    eigenvalues = torch.cat([reduce(torch.kron, values) for values in posterior.posterior_precision.eigenvalues])
    return tuned(task, look, lambda found, precision: (found / (eigenvalues + precision)) @ found.mT)


def in_eigenbasis(posterior: Any, found: Tensor) -> Tensor:
    """Jacobians (B, C, P) rotated so that a Kronecker-factored posterior is diagonal, whatever its prior precision."""
    factors = posterior.H.eigenvectors
    blocks = found.split([math.prod(map(len, each)) for each in factors], 2)
    turned = (
        block @ each[0] if len(each) == 1 else (each[0].T @ block.unflatten(2, (len(each[0]), -1)) @ each[1]).flatten(2)
        for each, block in zip(factors, blocks, strict=True)
    )
    return torch.cat(list(turned), 2)


def subnetwork(task: Task) -> Predict:
    """Dense curvature of the largest parameters: those a diagonal posterior is least sure of are mostly dead ones."""
    values = torch.cat([p.detach().flatten() for p in task.model.parameters() if p.requires_grad])
    chosen = values.abs().topk(min(SUBNETWORK, len(values))).indices
    posterior = fitted(task, task.part, "subnetwork", "full", subnetwork_indices=chosen, backend=PerSample)

    def look(inputs: Tensor) -> tuple[Tensor, Tensor]:
        found, logits = task.jacobians(inputs)
        return found[:, :, chosen], logits

    return tuned(task, look, variance(posterior))


def nystrom(task: Task) -> Predict:
    """laplace-torch's ELLA (Deng et al. 2022)."""
    landmarks = min(LANDMARKS, len(task.part.dataset))  # type: ignore[arg-type]
    options = {"functional_approximation": "nystrom", "subsample_size": landmarks}
    options["n_eigenvalues"] = min(RANK, landmarks)
    posterior = fitted(task, task.part, "all", "gp", seed=task.seed, backend=PerSample, **options)
    return tuned(task, task.jacobians, variance(posterior), grid=WIDE)


def valla(task: Task) -> Predict:
    """Variational linearized Laplace (Ortega et al. 2024): a short run, then its prior precision like everyone's."""
    order = {"shuffle": True, "generator": torch.Generator().manual_seed(task.seed)}
    loader = DataLoader(task.train.dataset, BATCH, collate_fn=task.train.collate_fn, **order)
    inducing = min(INDUCING, len(task.train.dataset))  # type: ignore[arg-type]
    options = {"functional_approximation": "variational", "inducing_locations": "random", "num_inducing": inducing}
    fit = {"iterations": ITERATIONS, "lr": LEARNING_RATE}
    with sdpa_kernel(SDPBackend.MATH):  # differentiates gradients, which other kernels of attention cannot
        posterior = fitted(task, loader, "all", "gp", seed=task.seed, backend=PerSample, fit=fit, **options)
    with torch.no_grad():
        weighted = posterior._factor_matrix().T @ posterior._inducing_jacobians()  # (M, P)
        gram = (weighted @ weighted.T).double()

    def look(inputs: Tensor) -> tuple[Tensor, Tensor]:
        found, logits = task.jacobians(inputs)
        return found @ torch.cat([weighted.expand(len(found), -1, -1), found], 1).mT, logits  # (B, C, M + C)

    def covariance(products: Tensor, precision: float) -> Tensor:
        with_inducing, own = products.double().split([len(gram), products.shape[1]], 2)
        inner = gram + precision * torch.eye(len(gram))
        return ((own - with_inducing @ torch.linalg.solve(inner, with_inducing.mT)) / precision).to(products.dtype)

    return tuned(task, look, covariance)


def ensemble(models: list[nn.Module]) -> Predict:
    """The mean of the probabilities of several networks (Lakshminarayanan et al. 2017)."""
    return torch.no_grad()(lambda inputs: torch.stack([model(inputs).softmax(1) for model in models]).mean(0))


RIVALS: dict[str, Callable[[Task], Predict]] = {
    "MAP": certain,
    "temperature scaling": temperature_scaling,
    "MC dropout": mc_dropout,
    "last layer, full": last_layer("full"),
    "last layer, KFAC": last_layer("kron"),
    "all layers, KFAC": kfac,
    "all layers, diagonal": diagonal,
    "subnetwork, full": subnetwork,
    "laplace-torch ELLA": nystrom,
    "VaLLA": valla,
}
