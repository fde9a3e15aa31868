# /// script
# dependencies = ["lightning-uq-box"]
# ///
"""lightning-uq-box's deterministic methods and its mean and variance estimation, on its own toy data."""

from functools import partial

import torch
from clients import compare, fit
from lightning_uq_box.datamodules import ToyHeteroscedasticDatamodule, TwoMoonsDataModule
from lightning_uq_box.models import MLP
from lightning_uq_box.uq_methods import DeterministicClassification, DeterministicRegression, MVERegression
from torch import nn

adam = partial(torch.optim.Adam, lr=1e-2)


def classification(callbacks):
    network = MLP(n_inputs=2, n_hidden=[32, 32], n_outputs=2)
    module = DeterministicClassification(network, nn.CrossEntropyLoss(), optimizer=adam)
    return fit(module, TwoMoonsDataModule(batch_size=32), callbacks, max_epochs=10)


def regression(callbacks):
    network = MLP(n_hidden=[32, 32], n_outputs=1)
    module = DeterministicRegression(network, nn.MSELoss(), optimizer=adam)
    return fit(module, ToyHeteroscedasticDatamodule(batch_size=32), callbacks, max_epochs=20)


def mean_and_variance(callbacks):
    module = MVERegression(MLP(n_hidden=[32, 32], n_outputs=2), burnin_epochs=5, optimizer=adam)
    return fit(module, ToyHeteroscedasticDatamodule(batch_size=32), callbacks, max_epochs=20)


compare("lightning-uq-box", "DeterministicClassification", classification)
compare("lightning-uq-box", "DeterministicRegression", regression, likelihood="regression")
compare("lightning-uq-box", "MVERegression", mean_and_variance, likelihood="heteroscedastic")
