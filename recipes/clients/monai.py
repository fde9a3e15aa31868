# /// script
# dependencies = ["monai"]
# ///
"""MONAI's data sets, transforms and networks: batches are dicts of MetaTensors."""

from clients import Steps, compare, fit, pictures, squares
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import DenseNet, UNet
from monai.transforms import Compose, EnsureTyped, ScaleIntensityd
from torch import nn


class Network(Steps):
    """As in MONAI's tutorials with Lightning."""

    def __init__(self, network, criterion, target):
        super().__init__()
        self.network, self.criterion, self.target = network, criterion, target

    def forward(self, x):
        return self.network(x)

    def loss(self, batch, split):
        return self.criterion(self(batch["image"]), batch[self.target])


def loader(count, masks, shuffle=False):
    target, made = ("mask", squares) if masks else ("label", pictures)
    images, targets = made(count, channels=1, size=16)
    samples = [{"image": image, target: value} for image, value in zip(images, targets.long(), strict=True)]
    keys = ["image", "mask"] if masks else ["image"]
    transforms = Compose([EnsureTyped(keys), ScaleIntensityd("image")])
    return DataLoader(CacheDataset(samples, transforms, progress=False), batch_size=32, shuffle=shuffle)


def train(callbacks, module, masks, count):
    loaders = [loader(count, masks, shuffle=True), loader(count + 1, masks), loader(count + 2, masks)]
    return fit(module, loaders, callbacks, max_epochs=10)


def classification(callbacks):
    network = DenseNet(2, 1, 4, init_features=8, growth_rate=8, block_config=(2, 2))
    return train(callbacks, Network(network, nn.CrossEntropyLoss(), "label"), masks=False, count=150)


def segmentation(callbacks):
    network = UNet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2))
    return train(callbacks, Network(network, DiceCELoss(to_onehot_y=True, softmax=True), "mask"), masks=True, count=40)


compare("monai", "DenseNet", classification)
compare("monai", "U-Net, masks (B, 1, H, W)", segmentation)
