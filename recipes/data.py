"""Datamodules of the recipes: training data with and without augmentation, a true hold-out, test data, other inputs."""

import gzip
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from torchvision.transforms import InterpolationMode, v2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """What images a network takes: a square of `size`, normalised with `mean` and `std`.

    It is cut out of the middle after the shorter side became `resize` long (`size` by default).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"

    def transform(self, channels: int) -> v2.Compose:
        """From a picture to what the network takes, (channels, size, size)."""
        resize = v2.Resize(self.resize or self.size, InterpolationMode(self.interpolation), antialias=True)
        return v2.Compose([v2.ToImage(), self._coloured(channels), resize, v2.CenterCrop(self.size), *self._numbers()])

    def augmentation(self, channels: int, flip: bool) -> v2.Compose:
        """The same, shifted a little where images are small and cut out anywhere where they are not."""
        if self.size <= SMALL:
            moves = [
                v2.Resize((self.size, self.size), antialias=True),
                v2.RandomCrop(self.size, padding=self.size // 8),
            ]
        else:
            moves = [v2.RandomResizedCrop(self.size, antialias=True)]
        flips = [v2.RandomHorizontalFlip()] if flip else []
        return v2.Compose([v2.ToImage(), self._coloured(channels), *moves, *flips, *self._numbers()])

    @staticmethod
    def _coloured(channels: int) -> v2.Transform:
        return v2.Grayscale(1) if channels == 1 else v2.RGB()

    def _numbers(self) -> list[v2.Transform]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]


NUM_CLASSES = {"CIFAR10": 10, "CIFAR100": 100, "MNIST": 10, "FashionMNIST": 10, "SVHN": 10}
LARGE = 100  # foreign images of each kind where they are large
SMALL = 64  # pixels: up to here, cutting a part out would leave too little


class Images(LightningDataModule):
    """What every image datamodule of the recipes offers.

    `setup` fills `train`, `clean` (the same images without augmentation), `holdout`, `test`, and by name `foreign`,
    sets of images of none of the classes, and `shifted`, test images corrupted in some way at some severity. Pixels
    in [0, 1] are normalised with `mean` and `std`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]
    channels = 3
    preprocessing: Preprocessing | None = None  # what the network wants, if it wants anything
    fixed_size: int | None = None  # of images that are taken as they are
    flip = False  # whether the training mirrors images

    train: Dataset
    clean: Dataset
    holdout: Dataset
    test: Dataset

    def __init__(self, batch_size: int, num_workers: int = 0):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.foreign: dict[str, Dataset] = {}
        self.shifted: dict[str, Dataset] = {}

    @property
    def views(self) -> list[str]:
        """What the training makes of an image as well, as `views=` of ELLA takes it."""
        return ["hflip"] if self.flip else []

    def train_dataloader(self) -> DataLoader:
        """Augmented and shuffled."""
        return self.loader(self.train, shuffle=True)

    def ella_train_dataloader(self) -> DataLoader:
        """The training images as they are, for ELLA."""
        return self.loader(self.clean)

    def val_dataloader(self) -> DataLoader:
        """Images never trained on; ELLA is calibrated on them."""
        return self.loader(self.holdout)

    def limit(self, count: int) -> None:
        """Keep some of the images that a report looks at, of each set but the held-out one."""
        self.test = some(self.test, count, 0)
        for sets in (self.foreign, self.shifted):
            sets |= {name: some(dataset, count, 0) for name, dataset in sets.items()}

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to what the network takes."""
        return v2.functional.normalize(pixels, list(self.mean), list(self.std))

    def pixels(self, images: Tensor) -> Tensor:
        """What the network takes, as (B, C, H, W) in [0, 1]."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def loader(self, dataset: Dataset, shuffle: bool = False) -> DataLoader:
        """Batches of a data set."""
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)


class Digits(Images):
    """Scikit-learn's 1,797 handwritten digits, 8 × 8; patches of its two photographs as foreign images."""

    def __init__(self, train: int = 997, holdout: int = 300, batch_size: int = 64, seed: int = 0):
        super().__init__(batch_size)
        self.num_train, self.num_holdout, self.seed, self.fixed_size = train, holdout, seed, 8
        self.mean, self.std, self.channels = (0.5,), (0.5,), 1
        self.classes = [str(digit) for digit in range(10)]

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


class DigitPairs(Images):
    """Two of scikit-learn's digits side by side, 8 × 16: 100 classes. No digit is in two of the three sets."""

    def __init__(self, train: int = 5000, holdout: int = 1000, test: int = 2000, batch_size: int = 64, seed: int = 0):
        super().__init__(batch_size)
        self.counts, self.seed = (train, holdout, test), seed
        self.mean, self.std, self.channels = (0.5,), (0.5,), 1
        self.classes = [f"{pair:02d}" for pair in range(100)]

    def setup(self, stage: str) -> None:
        """Split the digits 600 : 400 : 797 and draw pairs in each part."""
        pixels, labels = load_digits(return_X_y=True)
        images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
        generator = torch.Generator().manual_seed(self.seed)
        parts, sets = torch.randperm(len(images), generator=generator).split([600, 400, 797]), []
        for digits, count in zip(parts, self.counts, strict=True):
            left, right = digits[torch.randint(len(digits), (2, count), generator=generator)]
            pairs = torch.cat([images[left], images[right]], 3)
            sets.append(TensorDataset(pairs, 10 * labels[left] + labels[right]))
        self.train, self.holdout, self.test = sets
        self.clean = self.train
        photos = photo_patches(8, 1000).mean(1, keepdim=True)
        self.foreign = {"photographs": unlabelled(self.normalise(torch.cat([photos[::2], photos[1::2]], 3)))}


class Pictures(Images):
    """Pictures of any size, cut and normalised as the network wants them: subclasses say where they are.

    Args:
        holdout: images to hold out of the training images, where there is no split file; a fifth if it is over half.
        split: an npz file with index arrays `train` and `heldout` into the training images (by class, then file name).
        holdout_from: "test" for a network that was trained on all training images.
        image_size: of the square; None takes what the network wants, else the data's own.
        mean: of the channels, to normalise with; None as above.
        std: of the channels, to normalise with; None as above.
        foreign_folders: name -> a folder of images of none of the classes.
        shifted: a folder of corrupted test images, laid out as CIFAR-10-C or as ImageNet-C.
        batch_size: of every loader.
        num_workers: of every loader.
        seed: of the drawn hold-out.
    """

    own = Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # where the network has no wishes
    flip = True
    made = ("digits", "photographs", "noise")  # foreign images that every machine has

    def __init__(
        self,
        *,
        holdout: int = 5000,
        split: str | Path | None = None,
        holdout_from: Literal["train", "test"] = "train",
        image_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        foreign_folders: Mapping[str, str] | None = None,
        shifted: str | Path | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_workers)
        if holdout < 1:
            raise ValueError(f"data.holdout={holdout}: ELLA is calibrated on images that are held out, 200 or more.")
        self.num_holdout, self.split, self.holdout_from, self.seed = holdout, split, holdout_from, seed
        self.given = {"size": image_size, "mean": mean and tuple(mean), "std": std and tuple(std)}
        self.foreign_folders, self.shifted_folder = foreign_folders or {}, shifted

    def raw(self) -> tuple[Dataset, Dataset]:
        """Training and test pictures, pairs of a PIL image and a label."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Split into training, held-out and test images."""
        given = {name: value for name, value in self.given.items() if value is not None}
        if "size" in given:
            given["resize"] = None
        take = replace(self.preprocessing or self.own, **given)
        self.mean, self.std = take.mean, take.std
        clean, augmented = take.transform(self.channels), take.augmentation(self.channels, self.flip)
        trained, tested = self.raw()
        rest, held = self._indices(len(trained if self.holdout_from == "train" else tested))  # type: ignore[arg-type]
        views = (trained, augmented), (trained, clean), (tested, clean)
        self.train, self.clean, self.test = (Transformed(pictures, view) for pictures, view in views)
        if self.holdout_from == "train":
            self.holdout = Subset(self.clean, held)
            self.train, self.clean = Subset(self.train, rest), Subset(self.clean, rest)
        else:
            self.test, self.holdout = Subset(self.test, rest), Subset(self.test, held)
        count = None if take.size <= SMALL else LARGE
        noise = torch.Generator().manual_seed(self.seed)
        pixels = {
            "digits": lambda: enlarged_digits(take.size, count),
            "photographs": lambda: photo_patches(take.size, count or 500),
            "noise": lambda: torch.rand(count or 500, 3, take.size, take.size, generator=noise),
        }
        for name in self.made:
            images = pixels[name]()
            images = images.mean(1, keepdim=True) if self.channels == 1 else images
            self.foreign[name] = unlabelled(self.normalise(images))
        self.foreign |= {name: Transformed(Files(folder), clean) for name, folder in self.foreign_folders.items()}
        if self.shifted_folder:
            found = shifted(Path(self.shifted_folder), self.classes)
            self.shifted = {name: Transformed(part, clean) for name, part in found.items()}

    def _indices(self, total: int) -> tuple[list[int], list[int]]:
        if self.split is not None:
            indices = np.load(self.split)
            if max(indices["train"].max(), indices["heldout"].max()) >= total:
                raise ValueError(
                    f"{self.split} is a split of more than the {total} images: pass the one of these data."
                )
            return indices["train"].tolist(), indices["heldout"].tolist()
        held = self.num_holdout
        if held > total // 2:
            held = max(1, total // 5)
            log.warning("data.holdout=%d is too many of %d images: %d are held out.", self.num_holdout, total, held)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return order[held:], order[:held]


class ImageFolders(Pictures):
    """`<root>/<train>/<class>/…` and `<root>/<test>/<class>/…`.

    Raises:
        ValueError: if a folder is not there, or the two have other classes.
    """

    def __init__(self, root: str | Path, *, train: str = "train", test: str = "test", **options: Any):
        super().__init__(**options)
        self.folders = [Path(root) / part for part in (train, test)]
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(
                    f"{folder} is not a folder: data.root needs {train}/<class>/… and {test}/<class>/… (other names: "
                    "data.train=, data.test=)."
                )
        classes = [find_classes(folder)[0] for folder in self.folders]
        if classes[0] != classes[1]:
            raise ValueError(f"{train} and {test} in {root} have different classes: {classes[0]} and {classes[1]}.")
        self.classes = classes[0]

    def raw(self) -> tuple[Dataset, Dataset]:
        train, test = (ImageFolder(folder) for folder in self.folders)
        return train, test


class Known(Pictures):
    """A data set of torchvision by name, from a local folder; as an image folder, if it is one.

    Fashion-MNIST may also be the folder of Debian's package `dataset-fashion-mnist`.

    Args:
        name: "CIFAR10", "CIFAR100", "MNIST", "FashionMNIST" or "SVHN".
        root: the folder.
        download: fetch it if it is not there.
        **options: see `Pictures`.

    Raises:
        ValueError: if there is no such data set, or it is not in the folder.
    """

    def __init__(self, name: str, root: str | Path, *, download: bool = False, **options: Any):
        super().__init__(**options)
        if name not in NUM_CLASSES:
            raise ValueError(f"data.name={name} is not one of {', '.join(NUM_CLASSES)}.")
        self.dataset, self.root, self.download = name, Path(root), download
        self.classes = [str(label) for label in range(NUM_CLASSES[name])]
        if (self.root / "train").is_dir():
            self.classes = find_classes(self.root / "train")[0]
        if name.endswith("MNIST"):
            self.own, self.channels = Preprocessing(28, (0.5,), (0.5,)), 1
        self.flip = name.startswith("CIFAR") or name == "FashionMNIST"
        if name in ("MNIST", "SVHN"):  # digits are no foreign images there
            self.made = ("photographs", "noise")

    def raw(self) -> tuple[Dataset, Dataset]:
        if (self.root / "train").is_dir():
            train = of_classes(ImageFolder(self.root / "train"), self.classes)
            return train, of_classes(ImageFolder(self.root / "test"), self.classes)
        if (self.root / "train-images-idx3-ubyte.gz").exists():
            return self._idx("train"), self._idx("t10k")
        parts = [
            {"split": part} if self.dataset == "SVHN" else {"train": part == "train"} for part in ("train", "test")
        ]
        try:
            train, test = (getattr(datasets, self.dataset)(self.root, download=self.download, **part) for part in parts)
        except RuntimeError as error:
            raise ValueError(
                f"{self.dataset} is not in {self.root}: pass data.root=<its folder> or data.download=true."
            ) from error
        self.classes = getattr(train, "classes", self.classes)
        return train, test

    def _idx(self, part: str) -> Dataset:
        packed = (self.root / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        pixels, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in packed)
        return Arrays(pixels[16:].reshape(-1, 28, 28), labels[8:])  # behind their headers


class HuggingFace(Pictures):
    """A data set of Hugging Face's, by its name on the hub or by the folder that it is in.

    Args:
        name: of the data set, or of a builder ("imagefolder", with `options={data_dir: <folder>}`).
        train: the split to train on.
        test: the split to test on.
        image: the column with the images.
        label: the column with the classes.
        options: for `datasets.load_dataset`.
        **others: see `Pictures`.
    """

    def __init__(
        self,
        name: str,
        *,
        train: str = "train",
        test: str = "test",
        image: str = "image",
        label: str = "label",
        options: Mapping[str, Any] | None = None,
        **others: Any,
    ):
        super().__init__(**others)
        from datasets import load_dataset

        parts = load_dataset(name, **(options or {}))
        for split in (train, test):
            if split not in parts:
                raise ValueError(
                    f"{name} has no split {split!r}, but {', '.join(parts)}: pass data.train=, data.test=."
                )
        self.parts = [Rows(parts[split], image, label) for split in (train, test)]
        self.classes = parts[train].features[label].names

    def raw(self) -> tuple[Dataset, Dataset]:
        return self.parts[0], self.parts[1]


def of_classes(folder: ImageFolder, classes: list[str]) -> ImageFolder:
    """The same images, if their classes are `classes`; else their labels would mean something else."""
    if folder.classes != classes:
        raise ValueError(f"{folder.root} has the classes {folder.classes}, not {classes}: rename or add folders.")
    return folder


class Transformed(Dataset):
    """Pictures as the network takes them; what is known of their labels is known still."""

    def __init__(self, pictures: Any, transform: Callable):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        picture, label = self.pictures[number]
        return self.transform(picture), int(label)

    @property
    def targets(self) -> list[int]:
        """All labels, without reading an image."""
        known = getattr(self.pictures, "targets", None)
        return [int(label) for label in (self.pictures.labels if known is None else known)]


class Arrays(Dataset):
    """Images (n, H, W) or (n, H, W, 3) of bytes and labels (n,), as pictures."""

    def __init__(self, images: np.ndarray, targets: np.ndarray):
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.asarray(self.images[number])), int(self.targets[number])


class Files(Dataset):
    """All images below a folder, of no class."""

    def __init__(self, folder: str | Path):
        self.files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        self.targets = [0] * len(self.files)
        if not self.files:
            raise ValueError(f"{folder} has no images below it: pass another folder in data.foreign_folders.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[number]).convert("RGB"), 0


class Rows(Dataset):
    """A table of Hugging Face's as pictures."""

    def __init__(self, table: Any, image: str, label: str):
        self.table, self.image, self.label = table, image, label

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        row = self.table[number]
        picture = row[self.image]
        return picture if picture.mode == "L" else picture.convert("RGB"), row[self.label]

    @property
    def targets(self) -> list[int]:
        """All labels."""
        return self.table[self.label]


def shifted(folder: Path, classes: list[str]) -> dict[str, Dataset]:
    """Corrupted test images, "<corruption>/<severity>" -> pictures, from a folder like CIFAR-10-C or ImageNet-C.

    Raises:
        ValueError: if its classes are not `classes`.
    """
    if (folder / "labels.npy").exists():
        labels = np.split(np.load(folder / "labels.npy"), 5)  # the same for each severity
        files = [file for file in sorted(folder.glob("*.npy")) if file.stem != "labels"]
        return {
            f"{file.stem}/{severity}": Arrays(images, targets)
            for file in files
            for severity, (images, targets) in enumerate(zip(np.split(np.load(file, "r"), 5), labels, strict=True), 1)
        }
    return {
        f"{kind.name}/{level.name}": of_classes(ImageFolder(level), classes)
        for kind in sorted(folder.iterdir())
        if kind.is_dir()
        for level in sorted(kind.iterdir())
    }


def some(dataset: Dataset, count: int, seed: int) -> Dataset:
    """`count` points of a data set, drawn at random."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return Subset(dataset, order[:count].tolist())


def unlabelled(images: Tensor) -> Dataset:
    """Images with labels that mean nothing."""
    return TensorDataset(images, torch.zeros(len(images), dtype=torch.long))


def photo_patches(size: int, count: int = 500) -> Tensor:
    """Patches (count, 3, size, size) in [0, 1] of scikit-learn's two photographs, side by side if there are enough."""
    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images]).movedim(-1, 1) / 255
    if min(photos.shape[-2:]) < 2 * size:
        photos = v2.functional.resize(photos, [2 * size], antialias=True)
    step = size
    while (
        len(patches := photos.unfold(2, size, step).unfold(3, size, step).permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        < count
    ):
        step //= 2
    return patches[:: len(patches) // count][:count].contiguous()


def enlarged_digits(size: int, count: int | None = None) -> Tensor:
    """Scikit-learn's digits as (1797 or count, 3, size, size) in [0, 1]."""
    images = torch.tensor(load_digits(return_X_y=True)[0][:count], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return v2.functional.resize(images, [size, size], antialias=True).expand(-1, 3, -1, -1).contiguous()
