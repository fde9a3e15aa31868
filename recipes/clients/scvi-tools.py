# /// script
# dependencies = ["scvi-tools"]
# ///
"""scvi-tools' SCANVI, whose batches are pairs of dicts (all cells, labelled cells), from loaders of its own."""

import anndata
import numpy as np
import scvi
from clients import compare
from scvi.model import SCANVI

CELLS, GENES = 400, 50
rng = np.random.default_rng(0)
kinds = rng.integers(3, size=CELLS)
rates = np.ones((CELLS, GENES))
rates[np.arange(CELLS)[:, None], kinds[:, None] * 5 + np.arange(5)] = 1.6
cells = anndata.AnnData(rng.poisson(rates).astype(np.float32))
cells.obs["kind"] = [f"kind {kind}" for kind in kinds]
SCANVI.setup_anndata(cells, labels_key="kind", unlabeled_category="unknown")


def train(callbacks):
    scvi.settings.seed = 0  # it draws the split from it
    model = SCANVI(cells, n_hidden=16, n_latent=5)
    model.train(max_epochs=30, train_size=0.6, batch_size=64, accelerator="cpu", callbacks=callbacks)
    return {"kinds": model.predict().tolist()}


compare(
    "scvi-tools",
    "SCANVI",
    train,
    unpack=lambda batch: (batch[0]["X"], batch[0]["labels"].flatten().long()),
    forward=lambda plan, counts: plan.module.classify(counts),
)
