# /// script
# dependencies = ["chemprop"]
# ///
"""chemprop's message passing: a batch of molecules is one large graph."""

import random

from chemprop import data, models, nn
from clients import compare, fit
from rdkit import Chem
from rdkit.Chem.Descriptors import MolLogP

PARTS = ("C", "CC", "O", "N", "C(C)", "c1ccccc1", "C(=O)", "S", "C(F)")


def loader(count, shuffle=False):
    draw = random.Random(count)
    names = ["C" + "".join(draw.choices(PARTS, k=draw.randint(1, 5))) for _ in range(count)]
    points = [data.MoleculeDatapoint.from_smi(name, [MolLogP(Chem.MolFromSmiles(name))]) for name in names]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=32, shuffle=shuffle)


def train(callbacks):
    module = models.MPNN(
        nn.BondMessagePassing(d_h=32, depth=2), nn.MeanAggregation(), nn.RegressionFFN(input_dim=32, hidden_dim=32)
    )
    return fit(module, [loader(200, shuffle=True), loader(100), loader(102)], callbacks, max_epochs=5)


compare("chemprop", "MPNN", train, likelihood="regression")
