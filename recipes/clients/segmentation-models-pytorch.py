# /// script
# dependencies = ["segmentation-models-pytorch"]
# ///
"""The Lightning module of segmentation-models-pytorch's own example: an FPN that tells pets from the rest."""

import segmentation_models_pytorch as smp
import torch
from clients import Steps, compare, fit, squares
from torch.utils.data import DataLoader


class PetModel(Steps):
    """As in the example."""

    def __init__(self):
        super().__init__()
        sizes = {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 64}
        self.model = smp.create_model("fpn", "tu-test_resnet", encoder_weights=None, in_channels=3, classes=1, **sizes)
        self.register_buffer("std", torch.ones(1, 3, 1, 1))
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)

    def forward(self, image):
        return self.model((image - self.mean) / self.std)

    def loss(self, batch, split):
        return self.loss_fn(self(batch["image"]), batch["mask"])


def loader(count, shuffle=False):
    images, masks = squares(count)
    masks = masks.float()
    samples = [{"image": image, "mask": mask, "trimap": mask + 1} for image, mask in zip(images, masks, strict=True)]
    return DataLoader(samples, batch_size=4, shuffle=shuffle)


def train(callbacks):
    return fit(PetModel(), [loader(20, shuffle=True), loader(21), loader(22)], callbacks, max_epochs=10)


compare("segmentation-models-pytorch", "FPN", train, likelihood="binary")
