# /// script
# dependencies = ["lightly"]
# ///
"""lightly's linear evaluation: a frozen network with a trained head, batches with the names of the files."""

from clients import compare, fit, pictures
from lightly.data import LightlyDataset
from lightly.models import ResNetGenerator
from lightly.utils.benchmarking import LinearClassifier
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loader(count, shuffle=False):
    named = LightlyDataset.from_torch_dataset(TensorDataset(*pictures(count, size=32)))
    return DataLoader(named, batch_size=32, shuffle=shuffle)


def train(callbacks):
    network = ResNetGenerator("resnet-9", width=0.25)
    network.linear = nn.Identity()
    module = LinearClassifier(network, batch_size_per_device=32, feature_dim=128, num_classes=4, topk=(1,), lr=3)
    return fit(module, [loader(200, shuffle=True), loader(201)], callbacks, trainer=Trainer, max_epochs=10)


compare("lightly", "LinearClassifier, ResNet-9", train)
