"""What else tells foreign inputs from familiar ones, for the price of one forward pass: detectors of pytorch-ood.

They see the input of the last linear layer, the penultimate features, of training points with their labels, as many as
the distance of this package sees. Settings are those of their papers. A detector takes a `Task` and gives back a
function from inputs to scores, higher for what is more foreign.
"""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_ood.detector import KNN, EnergyBased, Mahalanobis, MaxSoftmax, ViM
from rivals import NotApplicable, Task
from torch import Tensor, nn

from lightning_ella.familiarity import NUM_POINTS

Score = Callable[[Tensor], Tensor]  # inputs (B, …) -> how foreign they look, (B,)

NEIGHBOURS = 50  # Sun et al. (2022), for as many points of CIFAR-10


def last_linear(model: nn.Module) -> nn.Linear:
    """The layer that gives the logits.

    Raises:
        NotApplicable: if there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers or layers[-1].bias is None:
        raise NotApplicable("The network does not end in a linear layer.")
    return layers[-1]


def features_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The penultimate features, (B, D), by one forward pass."""
    layer = last_linear(model)

    @torch.no_grad()
    def features(inputs: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        try:
            model(inputs)
        finally:
            handle.remove()
        return kept[-1].flatten(1)

    return features


def fitted(task: Task, detector: Callable[[Callable, Task, Tensor], Any]) -> Score:
    """By penultimate features of some training points."""
    encoder, device = features_of(task.model), next(task.model.parameters()).device
    parts = [(encoder(inputs.to(device)), targets) for inputs, targets in task.points(NUM_POINTS)]
    found, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    made = detector(encoder, task, found)
    made.fit_features(found, targets.to(found.device))
    return lambda inputs: made.predict_features(encoder(inputs))


def vim(encoder: Callable, task: Task, found: Tensor) -> ViM:
    layer = last_linear(task.model)
    return ViM(encoder, max(1, min(found.shape[1] // 2, len(found) // 2)), layer.weight, layer.bias).to(found.device)


class PrincipalComponents:
    """The share of a feature's square that lies outside the first C − 1 principal components."""

    def __init__(self, rank: int):
        self.rank = rank

    def fit_features(self, found: Tensor, targets: Tensor) -> None:
        """Find them."""
        self.mean = found.mean(0)
        self.directions = torch.linalg.svd(found - self.mean, full_matrices=False)[2][: self.rank]

    def predict_features(self, found: Tensor) -> Tensor:
        """(B,), in [0, 1]."""
        away = found - self.mean
        inside = (away @ self.directions.T).square().sum(1)
        return 1 - inside / away.square().sum(1).clamp_min(torch.finfo(away.dtype).tiny)


def outputs(detector: type) -> Callable[[Task], Score]:
    """By what the outputs say, which needs no points."""

    def made(task: Task) -> Score:
        return torch.no_grad()(detector(task.model).predict)

    return made


DETECTORS: dict[str, Callable[[Task], Score]] = {
    "maximum probability": outputs(MaxSoftmax),
    "energy": outputs(EnergyBased),
    "ViM": lambda task: fitted(task, vim),
    "Mahalanobis": lambda task: fitted(task, lambda encoder, *_: Mahalanobis(encoder)),
    "k nearest neighbours": lambda task: fitted(
        task, lambda encoder, _, found: KNN(encoder, min(NEIGHBOURS, len(found) - 1))
    ),
    "principal components": lambda task: fitted(
        task, lambda encoder, task, _: PrincipalComponents(last_linear(task.model).out_features - 1)
    ),
}
