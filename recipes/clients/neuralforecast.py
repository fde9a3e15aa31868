# /// script
# dependencies = ["neuralforecast"]
# ///
"""neuralforecast copies its models, and cuts windows out of whole series within the training step.

So ELLA gets windows that are cut here: those that the model learns from, and the last of each series, which it does
not see.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch
from clients import compare
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP, NHITS
from torch.utils.data import DataLoader, TensorDataset

SERIES, STEPS, PAST, AHEAD = 60, 60, 12, 4
steps = np.arange(STEPS)
values = np.sin(steps / 4 + np.arange(SERIES)[:, None]) + np.random.default_rng(0).normal(
    scale=0.2, size=(SERIES, STEPS)
)
frame = pd.DataFrame(
    {"unique_id": np.repeat(np.arange(SERIES), STEPS), "ds": np.tile(steps, SERIES), "y": values.flatten()}
)


def windows(end):
    """The window of each series that ends there: (past, future)."""
    cut = torch.tensor(values[:, end - PAST - AHEAD : end], dtype=torch.float32)
    return DataLoader(TensorDataset(cut[:, :PAST], cut[:, PAST:]), batch_size=32)


def forward(module, past):
    windows = {"insample_y": past[..., None], "insample_mask": torch.ones_like(past)[..., None]}
    return module(windows | dict.fromkeys(["futr_exog", "hist_exog", "stat_exog"]))[..., 0]


def train(callbacks, kind, **sizes):
    trainer = {"accelerator": "cpu", "callbacks": callbacks, "enable_progress_bar": False}
    model = kind(h=AHEAD, input_size=PAST, max_steps=60, **sizes, **trainer)
    forecaster = NeuralForecast(models=[model], freq=1)
    forecaster.fit(frame, val_size=AHEAD)
    return {"forecast": forecaster.predict()[kind.__name__].tolist()}


seen, unseen = windows(STEPS - AHEAD), windows(STEPS)
mlp = partial(train, kind=MLP, hidden_size=32)
nhits = partial(train, kind=NHITS, mlp_units=3 * [[32, 32]])
compare(
    "neuralforecast",
    "MLP",
    mlp,
    likelihood="regression",
    train_loader=seen,
    calibration_loader=unseen,
    forward=forward,
)
compare(
    "neuralforecast",
    "NHITS",
    nhits,
    likelihood="regression",
    train_loader=seen,
    calibration_loader=unseen,
    forward=forward,
)
