"""Networks of the recipes, and the LightningModule that trains them."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and an identity shortcut that strides and pads with zero channels (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        half = self.new_channels // 2
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return (out + shortcut).relu()


class CifarResNet(nn.Module):
    """ResNet for small images (He et al. 2016, section 4.2): depth 6 n + 2, three stages of n blocks.

    Args:
        depth: 8, 14, 20, 32, 44, 56, …
        num_classes: C.
        in_channels: of the images.
        width: channels of the first stage; 16 in the paper.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: int = 16):
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6 n + 2: pass 8, 14, 20, 32, 44 or 56.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, C)."""
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Classifier(LightningModule):
    """Any network, trained with cross-entropy and SGD under a cosine schedule.

    Args:
        network: maps images to logits (B, C).
        learning_rate: at the start.
        weight_decay: L2 penalty.
        checkpoint: a file with the network's `state_dict` to start from.
    """

    def __init__(
        self, network: nn.Module, learning_rate: float, weight_decay: float, checkpoint: str | Path | None = None
    ):
        super().__init__()
        if checkpoint is not None:
            network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
        self.network = network
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits (B, C)."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out data."""
        x, y = batch
        logits = self(x)
        self.log("val/loss", nn.functional.cross_entropy(logits, y), prog_bar=True)
        self.log("val/accuracy", (logits.argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with momentum, the learning rate falling to zero along a cosine."""
        optimizer = torch.optim.SGD(
            self.parameters(), self.learning_rate, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
