# /// script
# dependencies = ["pytorch-forecasting"]
# ///
"""pytorch-forecasting: batches (dict, (target, weight)), outputs with names, N-BEATS with layers of two names."""

import numpy as np
import pandas as pd
from clients import compare, fit
from pytorch_forecasting import MAE, NBeats, TemporalFusionTransformer, TimeSeriesDataSet

SERIES, STEPS = 4, 40
steps = np.arange(STEPS)
noise = np.random.default_rng(0).normal(scale=0.2, size=(SERIES, STEPS))
frame = pd.DataFrame(
    {
        "series": np.repeat(np.arange(SERIES), STEPS).astype(str),
        "step": np.tile(steps, SERIES),
        "value": (np.sin(steps / 4 + np.arange(SERIES)[:, None]) + noise).flatten(),
    }
)


def train(callbacks, kind, **sizes):
    training = TimeSeriesDataSet(
        frame[frame.step < 30],
        time_idx="step",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        min_encoder_length=12,
        max_prediction_length=3,
        time_varying_unknown_reals=["value"],
    )
    unseen = TimeSeriesDataSet.from_dataset(training, frame, min_prediction_idx=30)
    loaders = [part.to_dataloader(train=part is training, batch_size=32, num_workers=0) for part in (training, unseen)]
    module = kind.from_dataset(training, learning_rate=0.01, loss=MAE(), log_interval=-1, **sizes)
    return fit(module, [*loaders, loaders[1]], callbacks, max_epochs=3)


def transformer(callbacks):
    return train(callbacks, TemporalFusionTransformer, hidden_size=4, attention_head_size=2, hidden_continuous_size=4)


def nbeats(callbacks):
    return train(callbacks, NBeats, widths=[16, 32], backcast_loss_ratio=0.1)


compare(
    "pytorch-forecasting",
    "Temporal Fusion Transformer",
    transformer,
    likelihood="regression",
    unpack=lambda batch: (batch[0], batch[1][0]),
)
compare(
    "pytorch-forecasting",
    "N-BEATS",
    nbeats,
    likelihood="regression",
    unpack=lambda batch: (batch[0], batch[1][0]),
)
