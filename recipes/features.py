"""Features that are computed once, and what a posterior makes of them."""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_ella import ELLAPredictor
from lightning_ella.likelihoods import Classification
from lightning_ella.observations import Observations
from lightning_ella.posterior import Posterior
from lightning_ella.predictions import Gaussian

LIKELIHOOD = Classification()


def cache(predictor: ELLAPredictor, loader: Iterable[tuple[Tensor, Tensor]], what: str) -> Observations:
    """Run the network once over all points."""
    device = next(predictor.model.parameters()).device
    batches = tqdm(loader, desc=f"features of {what}", unit="batch")
    parts = [(*predictor.features(images.to(device)), targets.to(device)) for images, targets in batches]
    return Observations(*(torch.cat(part) for part in zip(*parts, strict=True)))


def nll(points: Observations, posterior: Posterior, draws: Tensor) -> float:
    """Mean NLL of the Monte Carlo predictive."""
    logits = Gaussian(points.logits, posterior.factor(points.features), draws.to(points.features))
    prediction = LIKELIHOOD.predict(logits, "mc", posterior.temperature.to(points.logits))
    return float(LIKELIHOOD.nll(prediction, points.targets).mean())
