"""What the recipes read: image folders, torchvision's and Hugging Face's data sets, corrupted test images, weights."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(ROOT / "recipes"))
import models
from data import HuggingFace, ImageFolders, Known, Preprocessing, shifted
from models import CifarResNet, load_weights

from lightning_ella.data import Points


def picture(value: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, np.uint8))


def folders(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("cat", "dog"), size: int = 32) -> Path:
    """Uniform images, whose value counts up, so that each can be told from the others."""
    value = 0
    for part, count in parts.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture(value, size).save(root / part / name / f"{number:03d}.png")
                value += 1
    return root


def values(dataset) -> list[int]:
    """The images' values, from what the network sees."""
    return [round(float(image.mean()) * 255) for image, _ in dataset]


def plain(data):
    """Set up without normalisation."""
    data.given |= {"mean": (0.0,) * data.channels, "std": (1.0,) * data.channels}
    data.setup("fit")
    return data


def test_the_hold_out_is_drawn_from_the_training_images_or_from_the_test_images(tmp_path: Path):
    root = folders(tmp_path, {"train": 20, "test": 10})
    data = plain(ImageFolders(root, holdout=6))
    assert len(data.clean) == len(data.train) == 34
    assert sorted(values(data.clean) + values(data.holdout)) == list(range(40))
    assert values(data.test) == list(range(40, 60))
    data = plain(ImageFolders(root, holdout=6, holdout_from="test"))
    assert values(data.clean) == list(range(40))
    assert sorted(values(data.test) + values(data.holdout)) == list(range(40, 60))
    assert len(data.holdout) == 6
    data.limit(3)
    assert len(data.test) == len(data.foreign["noise"]) == 3
    assert len(data.holdout) == 6


def test_labels_are_known_without_reading_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = plain(ImageFolders(folders(tmp_path, {"train": 20, "test": 10}), holdout=6))
    expected = torch.tensor([label for _, label in data.clean])
    monkeypatch.setattr(Image, "open", None)
    assert torch.equal(Points(DataLoader(data.clean, 4)).labels(range(34)), expected)


def test_training_images_are_augmented_and_those_for_ella_are_not(tmp_path: Path):
    root = folders(tmp_path, {"train": 20, "test": 10})
    for name in ("000.png", "001.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(
            root / "train/cat" / name
        )
    data = plain(ImageFolders(root, holdout=1))
    torch.manual_seed(0)
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert torch.equal(data.clean[0][0], data.clean[0][0])


def test_images_are_cut_and_normalised_as_the_network_wants(tmp_path: Path):
    root = folders(tmp_path, {"train": 2, "test": 2}, size=40)
    data = ImageFolders(root)
    data.preprocessing = Preprocessing(24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 30, "bicubic")
    data.setup("fit")
    image = data.test[3][0]
    assert image.shape == (3, 24, 24)
    pixels = 7 / 255 * torch.ones(3)
    torch.testing.assert_close(
        image.mean((1, 2)), (pixels - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.6, 0.7])
    )
    torch.testing.assert_close(data.pixels(image.unsqueeze(0))[0].mean((1, 2)), pixels)
    data = ImageFolders(root, image_size=16, mean=(0.5,) * 3)
    data.preprocessing = Preprocessing(24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 30)
    data.setup("fit")
    assert data.test[0][0].shape == (3, 16, 16)
    assert data.mean == (0.5,) * 3


def test_a_folder_that_does_not_fit_is_refused_before_anything_else(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is not a folder: data\.root needs train/<class>"):
        ImageFolders(tmp_path / "nowhere")
    root = folders(tmp_path / "one", {"train": 2})
    folders(root, {"test": 2}, ("cat", "horse"))
    with pytest.raises(ValueError, match="different classes"):
        ImageFolders(root)
    with pytest.raises(ValueError, match=r"CIFAR10 is not in .*data\.download=true"):
        Known("CIFAR10", tmp_path).setup("fit")
    with pytest.raises(ValueError, match=r"data\.name=CIFAR11 is not one of CIFAR10"):
        Known("CIFAR11", tmp_path)


def idx(values: np.ndarray) -> bytes:
    """The format of MNIST's files."""
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


@pytest.mark.parametrize("source", ["torchvision", "debian"])
def test_grey_images_come_from_torchvisions_files_or_from_debians(tmp_path: Path, source: str):
    images = np.arange(12, dtype=np.uint8).repeat(28 * 28).reshape(12, 28, 28)
    for part in ("train", "t10k"):
        for kind, content in (("images-idx3", idx(images)), ("labels-idx1", idx(np.arange(12, dtype=np.uint8) % 10))):
            file = tmp_path / ("FashionMNIST/raw" if source == "torchvision" else "") / f"{part}-{kind}-ubyte"
            file.parent.mkdir(parents=True, exist_ok=True)
            if source == "torchvision":
                file.write_bytes(content)
            else:
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
    data = plain(Known("FashionMNIST", tmp_path, holdout=4))
    assert data.test[0][0].shape == (1, 28, 28)
    assert values(data.test) == list(range(12))
    assert [label for _, label in data.test] == [*range(10), 0, 1]
    assert data.foreign["photographs"][0][0].shape == (1, 28, 28)
    data = Known("FashionMNIST", tmp_path, holdout=4)
    data.channels = 3  # as a colour network wants
    data.preprocessing = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    data.setup("fit")
    assert data.test[0][0].shape == (3, 32, 32)


def test_a_known_data_set_may_be_an_image_folder(tmp_path: Path):
    data = plain(Known("CIFAR10", folders(tmp_path, {"train": 3, "test": 2}), holdout=2))
    assert values(data.test) == [6, 7, 8, 9]


def test_a_data_set_of_hugging_face_is_read_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = folders(tmp_path / "images", {"train": 5, "test": 3})
    options = {"data_dir": str(root), "cache_dir": str(tmp_path / "cache")}
    data = plain(HuggingFace("imagefolder", options=options, holdout=2))
    assert data.classes == ["cat", "dog"]
    assert sorted(values(data.clean) + values(data.holdout)) == list(range(10))
    with pytest.raises(ValueError, match=r"has no split 'validation', but train, test: pass"):
        HuggingFace("imagefolder", options=options, test="validation")


def test_corrupted_images_are_read_as_cifar10_c_and_as_imagenet_c_are_laid_out(tmp_path: Path):
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    images = np.arange(10, dtype=np.uint8).repeat(32 * 32 * 3).reshape(10, 32, 32, 3)
    np.save(arrays / "fog.npy", images)
    np.save(arrays / "labels.npy", np.tile([0, 1], 5))
    pictures = folders(tmp_path / "pictures" / "blur", {"1": 2, "2": 2})
    root = folders(tmp_path / "data", {"train": 2, "test": 2})
    data = plain(ImageFolders(root, shifted=arrays))
    assert list(data.shifted) == [f"fog/{severity}" for severity in range(1, 6)]
    assert values(data.shifted["fog/3"]) == [4, 5]
    assert [label for _, label in data.shifted["fog/3"]] == [0, 1]
    assert list(shifted(pictures.parent, ["cat", "dog"])) == ["blur/1", "blur/2"]
    with pytest.raises(ValueError, match=r"has the classes \['cat', 'dog'\], not \['cat', 'dog', 'elk'\]"):
        shifted(pictures.parent, ["cat", "dog", "elk"])
    assert values(plain(ImageFolders(root, shifted=pictures.parent)).shifted["blur/2"]) == [4, 5, 6, 7]


def test_foreign_images_may_be_in_any_folder(tmp_path: Path):
    root = folders(tmp_path / "data", {"train": 2, "test": 2})
    picture(100).save(tmp_path / "a.png")
    data = plain(ImageFolders(root, foreign_folders={"mine": str(tmp_path)}))
    assert values(data.foreign["mine"]) == [100, 4, 5, 6, 7, 0, 1, 2, 3]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images below it"):
        plain(ImageFolders(root, foreign_folders={"mine": str(tmp_path / "empty")}))


TRAINING = {"learning_rate": 0.1, "weight_decay": 0.0}


def test_timms_networks_say_what_images_they_take():
    module = models.from_timm("vit_tiny_patch16_224", 5, 3, False, {}, **TRAINING)
    assert module.preprocessing == Preprocessing(224, (0.5,) * 3, (0.5,) * 3, 248, "bicubic")
    assert module.network.num_classes == 5
    small = models.from_timm("vit_tiny_patch16_224", 5, 1, False, {"img_size": 8, "patch_size": 2}, **TRAINING)
    assert small.preprocessing == Preprocessing(8, (0.5,), (0.5,), 8, "bicubic")
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "squeezenet1_1"])
def test_torchvisions_networks_get_a_last_layer_of_the_right_size(name: str):
    module = models.from_torchvision(name, 5, 3, False, **TRAINING).eval()
    assert module.preprocessing is not None
    assert module.preprocessing.mean == (0.485, 0.456, 0.406)
    assert module(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


def test_transformers_networks_are_read_from_a_folder_and_give_logits(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    module = models.from_hugging_face(str(tmp_path), 5, 3, True, **TRAINING)
    assert module.preprocessing == Preprocessing(16, (0.5,) * 3, (0.5,) * 3, 16)
    assert module(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("kind", ["state_dict", "lightning", "safetensors"])
def test_weights_are_read_from_every_kind_of_file(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    source, target = CifarResNet(8, 3, 1, 4), CifarResNet(8, 3, 1, 4)
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(source.state_dict(), file)
    else:
        prefixed = {f"network.{name}": value for name, value in source.state_dict().items()}
        torch.save({"state_dict": prefixed, "epoch": 1} if kind == "lightning" else source.state_dict(), file)
    load_weights(target, file)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="has no weights of CifarResNet as it is configured"):
        load_weights(CifarResNet(14, 3, 1, 4), file)
    other = CifarResNet(8, 4, 1, 4)
    with caplog.at_level("WARNING"):
        load_weights(other, file)
    assert "last layer (linear) is made anew" in caplog.text
    assert torch.equal(other.conv1.weight, source.conv1.weight)
    with pytest.raises(ValueError, match="has no weights of Linear"):
        load_weights(nn.Linear(2, 2), file)


def test_a_file_without_weights_is_refused_by_name(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(ValueError, match=r"notes\.txt holds no weights"):
        load_weights(nn.Linear(2, 2), tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"there is no file .*missing\.pt"):
        load_weights(nn.Linear(2, 2), tmp_path / "missing.pt")


def test_the_hold_out_is_never_most_of_the_images_nor_none(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = folders(tmp_path, {"train": 20, "test": 10})
    with caplog.at_level("WARNING"):
        data = plain(ImageFolders(root))
    assert (len(data.holdout), len(data.clean)) == (8, 32)
    assert "data.holdout=5000 is too many of 40 images: 8 are held out" in caplog.text
    with pytest.raises(ValueError, match=r"data\.holdout=0"):
        ImageFolders(root, holdout=0)
    np.savez(tmp_path / "split.npz", train=np.arange(50), heldout=np.arange(50, 60))
    with pytest.raises(ValueError, match="is a split of more than the 40 images"):
        plain(ImageFolders(root, split=tmp_path / "split.npz"))


def test_weights_that_cannot_be_downloaded_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(models.torchvision.models, "get_model", offline)
    with pytest.raises(ValueError, match=r"could not be downloaded: pass model\.pretrained=false"):
        models.from_torchvision("resnet18", 5, 3, True, **TRAINING)


def test_grey_becomes_colour_and_colour_grey():
    take = Preprocessing(8, (0.0,), (1.0,))
    assert take.transform(1)(picture(255)).shape == (1, 8, 8)
    grey = v2.functional.to_pil_image(torch.ones(1, 8, 8))
    assert Preprocessing(8, (0.0,) * 3, (1.0,) * 3).transform(3)(grey).shape == (3, 8, 8)
