"""Networks of the recipes, and the LightningModule that trains them.

A function a source: it gives a `Classifier`, which knows what images its network takes.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from data import Preprocessing
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)


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
        if self.stride > 1 or self.new_channels:
            half = self.new_channels // 2
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return (out + x).relu()


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
        network: maps images to logits (B, C), or to an object with `.logits`, as Hugging Face's do.
        preprocessing: what images it takes; None leaves that to the data.
        in_channels: of the images.
        learning_rate: at the start.
        weight_decay: L2 penalty.
        checkpoint: a file with weights to start from, see `load_weights`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        preprocessing: Preprocessing | None = None,
        in_channels: int = 3,
        learning_rate: float,
        weight_decay: float,
        checkpoint: str | Path | None = None,
    ):
        super().__init__()
        if checkpoint is not None:
            load_weights(network, checkpoint)
        self.network, self.preprocessing, self.in_channels = network, preprocessing, in_channels
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits (B, C)."""
        out = self.network(x)
        return out if isinstance(out, Tensor) else out.logits

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


def cifar_resnet(depth: int, num_classes: int, in_channels: int, width: int = 16, **training: Any) -> Classifier:
    """ResNet for small images."""
    return Classifier(CifarResNet(depth, num_classes, in_channels, width), in_channels=in_channels, **training)


def from_timm(
    name: str,
    num_classes: int,
    in_channels: int,
    pretrained: bool | None,
    options: Mapping[str, Any] | None,
    **training: Any,
) -> Classifier:
    """Any classifier of timm, with `options` for its constructor.

    Images are prepared as its weights want them, with the `img_size` of `options`, if any.
    """
    options = options or {}
    with _downloading(name, pretrained):
        network = timm.create_model(
            name, pretrained=bool(pretrained), num_classes=num_classes, in_chans=in_channels, **options
        )
    wanted = timm.data.resolve_model_data_config(network)  # type: ignore[attr-defined]
    size, resize = wanted["input_size"][-1], int(wanted["input_size"][-1] / wanted["crop_pct"])
    if "img_size" in options:
        size = resize = options["img_size"]
    mean, std = (values if in_channels == 3 else (sum(values) / 3,) for values in (wanted["mean"], wanted["std"]))
    preprocessing = Preprocessing(size, mean, std, resize, wanted["interpolation"])
    return Classifier(network, preprocessing=preprocessing, in_channels=in_channels, **training)


def from_torchvision(
    name: str, num_classes: int, in_channels: int, pretrained: bool | None, **training: Any
) -> Classifier:
    """Any classifier of torchvision; its last layer is made anew where the number of classes differs."""
    weights = torchvision.models.get_model_weights(name)["DEFAULT"]
    with _downloading(name, pretrained):
        network = torchvision.models.get_model(name, weights=weights if pretrained else None)
    layers = [(path, part) for path, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    path, head = layers[-1]
    if isinstance(head, nn.Linear) and head.out_features != num_classes:
        network.set_submodule(path, nn.Linear(head.in_features, num_classes))
    elif isinstance(head, nn.Conv2d) and head.out_channels != num_classes:
        network.set_submodule(path, nn.Conv2d(head.in_channels, num_classes, head.kernel_size))  # type: ignore[arg-type]
    wanted = weights.transforms()
    size, resize = wanted.crop_size[0], wanted.resize_size[0]
    if getattr(network, "image_size", size) != size:  # of the weights that are not taken
        size = resize = int(network.image_size)  # type: ignore[arg-type]
    preprocessing = Preprocessing(size, tuple(wanted.mean), tuple(wanted.std), resize, wanted.interpolation.value)
    return Classifier(network, preprocessing=preprocessing, **training)


def from_hugging_face(
    name: str, num_classes: int, in_channels: int, pretrained: bool | None, **training: Any
) -> Classifier:
    """An image classifier of transformers, by its folder or its name on the hub."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    with _downloading(name, True):
        config = AutoConfig.from_pretrained(name, num_labels=num_classes)
        processor = AutoImageProcessor.from_pretrained(name)
        if pretrained:
            network = AutoModelForImageClassification.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
        else:
            network = AutoModelForImageClassification.from_config(config)
    resize = processor.size.get("height") or processor.size["shortest_edge"]
    crop, share = getattr(processor, "crop_size", None), getattr(processor, "crop_pct", None)
    size = crop["height"] if crop and getattr(processor, "do_center_crop", True) else resize
    if share:  # ConvNeXt's: the size is that of the cut
        resize = int(resize / share)
    interpolation = {0: "nearest", 3: "bicubic"}.get(int(processor.resample), "bilinear")
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Classifier(network, preprocessing=Preprocessing(size, mean, std, resize, interpolation), **training)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a state_dict from a file of torch or safetensors, or from a checkpoint of Lightning.

    Raises:
        ValueError: if there are none, or they are not of this network; a last layer for other classes is made anew.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}: pass model.checkpoint=<file with the weights>.")
    try:
        state = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
        state = cast(dict[str, Tensor], state.get("state_dict", state))
    except Exception as error:  # whatever unpickling text or a picture gives
        raise ValueError(f"{path} holds no weights of torch or safetensors: {error!r}") from error
    for prefix in ("network.", "model.", "module.", "net."):
        if all(name.startswith(prefix) for name in state) and not hasattr(network, prefix[:-1]):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    own = network.state_dict()
    other = [name for name in state if name in own and own[name].shape != state[name].shape]
    layers = {name.rpartition(".")[0] for name in other}
    if len(layers) == 1 and len(other) < len(state) - len(other):
        log.warning("%s is of other classes: its last layer (%s) is made anew and has to be trained.", path, *layers)
        state |= {name: own[name] for name in other}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} has no weights of {type(network).__name__} as it is configured: choose the model that they are "
            f"of, with its num_classes. {str(error)[:1000]}"
        ) from error


@contextmanager
def _downloading(name: str, pretrained: bool | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not pretrained:
            raise
        raise ValueError(
            f"the weights of {name} could not be downloaded: pass model.pretrained=false and "
            f"model.checkpoint=<file>, or the folder that they are in. {error}"
        ) from error
