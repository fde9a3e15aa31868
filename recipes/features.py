"""Features that are computed once, and what a posterior makes of them."""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_ella import ELLAPredictor
from lightning_ella.fit import Cache
from lightning_ella.likelihoods import Classification, Gaussian
from lightning_ella.posterior import Posterior

LIKELIHOOD = Classification()


def cache(predictor: ELLAPredictor, loader: Iterable[tuple[Tensor, Tensor]], what: str) -> Cache:
    """Run the network once over all points."""
    device = next(predictor.model.parameters()).device
    batches = tqdm(loader, desc=f"features of {what}", unit="batch")
    parts = [(*predictor.features(images.to(device)), targets.to(device)) for images, targets in batches]
    return Cache(*(torch.cat(part) for part in zip(*parts, strict=True)))


def nll(points: Cache, posterior: Posterior, draws: Tensor) -> float:
    """Mean NLL of the Monte Carlo predictive."""
    logits = Gaussian(points.logits, posterior.factor(points.features), draws.to(points.features))
    prediction = LIKELIHOOD.predict(logits, "mc", posterior.temperature.to(points.logits))
    return float(LIKELIHOOD.nll(prediction, points.targets).mean())
