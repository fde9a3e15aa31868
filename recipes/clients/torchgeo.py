# /// script
# dependencies = ["torchgeo"]
# ///
"""torchgeo's tasks, whose batches are dicts of image and label or mask."""

import torch
from clients import compare, fit, pictures, squares
from torch.utils.data import Dataset
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.trainers import ClassificationTask, PixelwiseRegressionTask, RegressionTask, SemanticSegmentationTask


class Tiles(Dataset):
    """Images of 32 × 32 pixels, and a target of each."""

    def __init__(self, split, target, count=120):
        count = count if split == "train" else count + len(split)
        if target == "class":
            name, (images, values) = "label", pictures(count, size=32)
        else:
            images, masks = squares(count)
            masks = masks[:, 0]
            name, values = {
                "brightness": ("label", images.mean((1, 2, 3))[:, None] * 10),
                "mask": ("mask", masks.long()),
                "depth": ("mask", masks + images.mean(1)),
            }[target]
        self.samples = [{"image": image, name: value} for image, value in zip(images, values, strict=True)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return dict(self.samples[index])


def data(target, count=120):
    module = NonGeoDataModule(Tiles, batch_size=8, num_workers=0, target=target, count=count)
    module.mean, module.std = torch.tensor(0.0), torch.tensor(1.0)
    return module


def classification(callbacks):
    task = ClassificationTask(model="test_resnet", weights=None, in_channels=3, num_classes=4, lr=1e-3)
    return fit(task, data("class"), callbacks, max_epochs=5)


def regression(callbacks):
    task = RegressionTask(model="test_resnet", weights=None, in_channels=3, num_outputs=1, lr=1e-3)
    return fit(task, data("brightness"), callbacks, max_epochs=5)


def segmentation(callbacks):
    task = SemanticSegmentationTask(
        model="unet", backbone="tu-test_resnet", weights=None, in_channels=3, task="multiclass", num_classes=2, lr=1e-3
    )
    return fit(task, data("mask", 24), callbacks, max_epochs=5)


def depth(callbacks):
    task = PixelwiseRegressionTask(model="unet", backbone="tu-test_resnet", weights=None, in_channels=3, lr=1e-3)
    return fit(task, data("depth", 24), callbacks, max_epochs=5)


compare("torchgeo", "ClassificationTask, ResNet", classification)
compare("torchgeo", "RegressionTask, ResNet", regression, likelihood="regression")
compare("torchgeo", "SemanticSegmentationTask, U-Net", segmentation)
compare("torchgeo", "PixelwiseRegressionTask, U-Net", depth, likelihood="regression")
