"""Datamodules of the recipes: training data with and without augmentation, a true hold-out, test data, other inputs."""

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class Images(LightningDataModule):
    """What every image datamodule of the recipes offers.

    `setup` fills `train`, `clean` (the same images without augmentation), `holdout`, `test` and `foreign`, sets of
    images of none of the classes, by name. Pixels in [0, 1] are normalised with `mean` and `std`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    train: Dataset
    clean: Dataset
    holdout: Dataset
    test: Dataset
    foreign: dict[str, Dataset]

    def __init__(self, batch_size: int, num_workers: int = 0):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self) -> DataLoader:
        """Augmented and shuffled."""
        return self._loader(self.train, shuffle=True)

    def ella_train_dataloader(self) -> DataLoader:
        """The training images as they are, for ELLA."""
        return self._loader(self.clean)

    def val_dataloader(self) -> DataLoader:
        """Images never trained on; ELLA is calibrated on them."""
        return self._loader(self.holdout)

    def test_dataloader(self) -> DataLoader:
        """Images that nothing was chosen on."""
        return self._loader(self.test)

    def foreign_dataloader(self) -> DataLoader:
        """Images of none of the classes, for out-of-distribution detection: the first set."""
        return self._loader(next(iter(self.foreign.values())))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to what the network takes."""
        return v2.functional.normalize(pixels, list(self.mean), list(self.std))

    def pixels(self, images: Tensor) -> Tensor:
        """What the network takes, as (B, C, H, W) in [0, 1]."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def _loader(self, dataset: Dataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)


class Digits(Images):
    """Scikit-learn's 1,797 handwritten digits, 8 × 8; patches of its two photographs as foreign images."""

    def __init__(self, train: int = 997, holdout: int = 300, batch_size: int = 64, seed: int = 0):
        super().__init__(batch_size)
        self.num_train, self.num_holdout, self.seed = train, holdout, seed
        self.mean = self.std = (0.5,)

    def setup(self, stage: str) -> None:
        """Split into training, held-out and test images."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        data = TensorDataset(images, torch.tensor(labels))
        held, tested, rest = order.split([self.num_holdout, 900, len(order) - self.num_holdout - 900])
        self.train = self.clean = Subset(data, rest[: self.num_train].tolist())
        self.holdout, self.test = Subset(data, held.tolist()), Subset(data, tested.tolist())
        shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(self.seed))
        pixels = {
            "photographs": photo_patches(8).mean(1, keepdim=True),
            "shuffled pixels": self.pixels(images[tested]).flatten(2)[..., shuffled].unflatten(2, (8, 8)),
        }
        self.foreign = {name: unlabelled(self.normalise(images)) for name, images in pixels.items()}


class ImageFolders(Images):
    """`<root>/train/<class>/…` and `<root>/test/<class>/…`; digits, enlarged, as foreign images.

    Args:
        root: the folder.
        split: an npz file with index arrays `train` and `heldout` into the training images (by class, then file name);
            without it, `holdout` images are drawn.
        holdout: images to hold out where there is no split file.
        image_size: of the square that the network sees.
        mean: of the channels, to normalise with.
        std: of the channels, to normalise with.
        batch_size: of every loader.
        num_workers: of every loader.
        seed: of the drawn hold-out.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | Path | None = None,
        holdout: int = 5000,
        image_size: int = 32,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_workers)
        self.root, self.split, self.num_holdout = Path(root), split, holdout
        self.image_size, self.mean, self.std, self.seed = image_size, tuple(mean), tuple(std), seed

    def setup(self, stage: str) -> None:
        """Split the training folder into training and held-out images."""
        size = self.image_size
        resize = [v2.ToImage(), v2.Resize((size, size), antialias=True)]
        normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
        flip_and_crop = [v2.RandomHorizontalFlip(), v2.RandomCrop(size, padding=size // 8)]
        clean = ImageFolder(self.root / "train", v2.Compose(resize + normalise))
        augmented = ImageFolder(self.root / "train", v2.Compose(resize + flip_and_crop + normalise))
        trained, held = self._indices(len(clean))
        self.train, self.clean = Subset(augmented, trained), Subset(clean, trained)
        self.holdout = Subset(clean, held)
        self.test = ImageFolder(self.root / "test", clean.transform)
        noise = torch.rand(500, 3, size, size, generator=torch.Generator().manual_seed(self.seed))
        pixels = {"digits": enlarged_digits(size), "photographs": photo_patches(size), "noise": noise}
        self.foreign = {name: unlabelled(self.normalise(images)) for name, images in pixels.items()}

    def _indices(self, total: int) -> tuple[list[int], list[int]]:
        if self.split is not None:
            indices = np.load(self.split)
            return indices["train"].tolist(), indices["heldout"].tolist()
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return order[self.num_holdout :], order[: self.num_holdout]


def some(dataset: Dataset, count: int, seed: int) -> Dataset:
    """`count` points of a data set, drawn at random."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return Subset(dataset, order[:count].tolist())


def unlabelled(images: Tensor) -> Dataset:
    """Images with labels that mean nothing."""
    return TensorDataset(images, torch.zeros(len(images), dtype=torch.long))


def photo_patches(size: int, count: int = 500) -> Tensor:
    """Patches (count, 3, size, size) in [0, 1] of scikit-learn's two photographs."""
    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images]).movedim(-1, 1) / 255
    patches = photos.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return patches[:: len(patches) // count][:count].contiguous()


def enlarged_digits(size: int) -> Tensor:
    """Scikit-learn's digits as (1797, 3, size, size) in [0, 1]."""
    images = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return v2.functional.resize(images, [size, size], antialias=True).expand(-1, 3, -1, -1).contiguous()
