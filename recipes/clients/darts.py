# /// script
# dependencies = ["darts"]
# ///
"""darts trains with the older name of Lightning, on dataclasses; what it trains is compared by its forecasts, too."""

from functools import partial

import numpy as np
from clients import compare
from darts import TimeSeries
from darts.models import NBEATSModel, TiDEModel


def series(start, stop):
    steps = np.arange(start, stop)
    noise = np.random.default_rng(start).normal(scale=0.3, size=len(steps))
    return TimeSeries.from_values((np.sin(steps / 5) + noise).astype(np.float32))


def train(callbacks, kind, **sizes):
    options = {"accelerator": "cpu", "callbacks": callbacks, "enable_progress_bar": False}
    model = kind(
        input_chunk_length=12, output_chunk_length=4, n_epochs=3, random_state=0, pl_trainer_kwargs=options, **sizes
    )
    model.fit(series(0, 200), val_series=series(200, 300))
    return {"forecast": model.predict(4).values().tolist()}


# Functions of a module, as darts pickles its models, callbacks included.
def unpack(batch):
    return batch.to_module_input(), batch.future_target


def forward(module, inputs):
    return module(inputs).prediction[..., 0]


nbeats = partial(train, kind=NBEATSModel, num_stacks=2, num_blocks=1, layer_widths=32)
tide = partial(train, kind=TiDEModel, hidden_size=32)
compare("darts", "N-BEATS", nbeats, likelihood="regression", unpack=unpack, forward=forward)
compare("darts", "TiDE", tide, likelihood="regression", unpack=unpack, forward=forward)
