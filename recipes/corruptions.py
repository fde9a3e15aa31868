"""Corruptions of images at five severities, made of torchvision's transforms.

Blur, elastic and pixelate are measured by the shorter side, so that a severity means the same at 32 and at 224 pixels;
noise, JPEG and sharpness work on single pixels, whatever the size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from math import ceil, pi, sqrt

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

SEVERITIES = range(1, 6)


@dataclass(frozen=True)
class Corruption:
    """A change to images (B, C, H, W) in [0, 1] that takes one number, and that number at severity 1 … 5."""

    change: Callable[[Tensor, float], Tensor]
    levels: tuple[float, float, float, float, float]

    def __call__(self, images: Tensor, severity: int) -> Tensor:
        """Images of the same shape, in [0, 1]; the random ones draw from torch's generator."""
        if severity not in SEVERITIES:
            raise ValueError(f"severity={severity} is not one of 1, 2, 3, 4 and 5.")
        return self.change(images, self.levels[severity - 1]).clamp(0, 1)


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images (B, C, H, W) in [0, 1], C = 1 or 3; the same seed gives the same result on every device.

    Every call with a seed draws the same numbers: pass all images at once, or another seed for each batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return CORRUPTIONS[name](images.cpu(), severity).to(images)


def gaussian_noise(images: Tensor, deviation: float) -> Tensor:
    """Noise in each pixel and channel, of this standard deviation."""
    return functional.gaussian_noise(images, sigma=deviation)


def gaussian_blur(images: Tensor, width: float) -> Tensor:
    """Blur with a Gaussian whose σ is a share of the shorter side."""
    size = min(images.shape[-2:])
    radius = min(ceil(3 * width * size), size - 1)
    return functional.gaussian_blur(images, 2 * [2 * radius + 1], [width * size])


def posterize(images: Tensor, bits: float) -> Tensor:
    """Keep so many bits of each channel."""
    return functional.posterize(images, int(bits))


def jpeg(images: Tensor, quality: float) -> Tensor:
    """Compress and decompress with this quality, 1 … 100; by Pillow, as torchvision gives up its own encoder."""
    pixels = functional.to_dtype(images, torch.uint8, scale=True)
    compressed = torch.stack([_through_jpeg(image, int(quality)) for image in pixels])
    return functional.to_dtype(compressed, images.dtype, scale=True)


def _through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """An image (C, H, W) of bytes through a JPEG file in memory."""
    file = BytesIO()
    functional.to_pil_image(pixels).save(file, "JPEG", quality=quality)
    return functional.pil_to_tensor(Image.open(file))


def elastic(images: Tensor, displacement: float) -> Tensor:
    """Move pixels along a smooth random field of each image's own; root mean square as a share of the shorter side."""
    size = min(images.shape[-2:])
    sigma = 0.06 * size
    blurred = 1 / (2 * sqrt(3 * pi) * sigma)  # standard deviation of ElasticTransform's noise, uniform in [−1, 1]
    transform = v2.ElasticTransform(alpha=2 * displacement * size / blurred, sigma=sigma)
    return torch.stack([transform(image) for image in images])


def pixelate(images: Tensor, blocks: float) -> Tensor:
    """Average over blocks, so many along the shorter side."""
    height, width = images.shape[-2:]
    scale = min(1, blocks / min(height, width))
    small = functional.resize(images, [round(scale * height), round(scale * width)], antialias=True)
    return functional.resize(small, [height, width], interpolation=InterpolationMode.NEAREST_EXACT)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Turn about the centre; the corners become black."""
    return functional.rotate(images, degrees, interpolation=InterpolationMode.BILINEAR)


# Chosen so that ResNet-20 on CIFAR-10 (1,000 test images, 88 % of them right) loses about 2, 5, 10, 20 and 35 points;
# posterize knows only whole bits: 1, 1, 3, 14 and 46.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.03, 0.045, 0.06, 0.08, 0.12)),
    "gaussian_blur": Corruption(gaussian_blur, (0.015, 0.017, 0.0195, 0.024, 0.0305)),
    "brightness": Corruption(functional.adjust_brightness, (1.3, 1.5, 1.7, 2.1, 2.7)),
    "darkness": Corruption(functional.adjust_brightness, (0.75, 0.5, 0.42, 0.32, 0.26)),
    "contrast": Corruption(functional.adjust_contrast, (0.75, 0.6, 0.48, 0.37, 0.28)),
    "saturation": Corruption(functional.adjust_saturation, (2, 2.6, 3.5, 5, 7.8)),
    "sharpness": Corruption(functional.adjust_sharpness, (1.7, 2.4, 3.6, 6, 11.5)),
    "jpeg": Corruption(jpeg, (68, 50, 25, 14, 8)),
    "posterize": Corruption(posterize, (5, 4, 3, 2, 1)),
    "elastic": Corruption(elastic, (0.004, 0.0075, 0.0125, 0.0185, 0.0275)),
    "pixelate": Corruption(pixelate, (30, 29, 27, 24, 20)),
    "rotate": Corruption(rotate, (1, 3, 11, 17, 25)),
}
