# /// script
# dependencies = ["monai"]
# ///
"""MONAI's data sets, transforms and networks: batches are dicts of MetaTensors."""

from clients import Steps, compare, fit, pictures
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
    images, labels = pictures(count, channels=1)
    samples = [
        {"image": image, "mask": (image > 0).long()} if masks else {"image": image, "label": label}
        for image, label in zip(images, labels, strict=True)
    ]
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
