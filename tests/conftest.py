"""Small networks with dense float64 oracles, shared by all tests."""

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from lightning_ella import chunks

ROOT = Path(__file__).parents[1]
settings.register_profile("ci", derandomize=True)  # a failure there must be the same when it is run again
if "CI" in os.environ:
    settings.load_profile("ci")
pretend.register()
torch.set_num_threads(1)  # the networks are tiny: threads would only wait for each other


LONG = ("test_commands", "test_recipes", "test_experiments", "test_zoo", "test_several_processes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def at_a_time(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    """Work on less at a time on the CPU, or on more."""
    monkeypatch.setattr("lightning_ella.chunks.CPU", replace(chunks.CPU, **limits))


class TinyViT(nn.Module):
    """4 x 4 patches, one attention block, a class token: every kind of parameter that a ViT has."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class DictMLP(nn.Module):
    """Takes {"left": (B, 2), "right": (B, 2)}."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 4), nn.Linear(2, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.out((self.left(inputs["left"]) * self.right(inputs["right"])).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def conv_batchnorm() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, 3),
    ).double()
    with torch.no_grad():
        model(torch.randn(64, 1, 8, 8, dtype=torch.float64) * 2 + 1)  # statistics that are not the initial ones
    return model


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64)


def vectors(count: int) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64)


def pairs(count: int) -> dict[str, Tensor]:
    return {side: torch.randn(count, 2, dtype=torch.float64) for side in ("left", "right")}


MAKERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (mlp, vectors),
    "conv_batchnorm": (conv_batchnorm, images),
    "vit": (TinyViT, images),
    "dict": (DictMLP, pairs),
    "frozen": (frozen, vectors),
}


@dataclass
class Case:
    """A network in float64, `count` inputs and targets of 3 classes, and what it is compared with."""

    model: nn.Module
    inputs: Any
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def dataset(self) -> "ListDataset":
        return ListDataset([(self.rows(i), self.targets[i]) for i in range(len(self))])

    def loader(self, batch_size: int = 7, **kwargs: Any) -> DataLoader:
        return DataLoader(self.dataset, batch_size, **kwargs)

    def rows(self, index: Any) -> Any:
        if isinstance(self.inputs, dict):
            return {name: value[index] for name, value in self.inputs.items()}
        return self.inputs[index]

    def jacobian(self) -> Tensor:
        """(N, C, P), in the order of the parameters that require gradients."""
        self.model.eval()
        parameters = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        with sdpa_kernel(SDPBackend.MATH):
            blocks = jacrev(lambda p: functional_call(self.model, p, (self.inputs,)))(parameters)
        return torch.cat([block.flatten(2) for block in blocks.values()], dim=2).detach()

    def logits(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(self.inputs)

    def ggn(self, jacobian: Tensor) -> Tensor:
        """Σ JᵀΛJ, (P, P), for J (N, C, P)."""
        probs = self.logits().softmax(-1)
        hessian = torch.diag_embed(probs) - probs.unsqueeze(2) * probs.unsqueeze(1)
        return torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian)


class ListDataset(Dataset):
    def __init__(self, items: list):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def make_case(name: str, count: int = 60) -> Case:
    torch.manual_seed(0)
    model, inputs = MAKERS[name]
    built = model().double()
    return Case(built, inputs(count), torch.randint(3, (count,)))


@pytest.fixture(params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def flat(basis: dict[str, Tensor]) -> Tensor:
    """A basis as (P, K)."""
    return torch.cat([tangents.flatten(1) for tangents in basis.values()], dim=1).T


@pytest.fixture
def as_set_by_a_user() -> Iterator[None]:
    """What Lightning tells people to set, and a flag of its Trainer."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The image folder and the folder of the checkpoints; `ELLA_DATA` names a folder that holds both."""
    source = Path(os.environ.get("ELLA_DATA", ROOT.parent / "shared" / "data"))
    archive = source / "cifar10-jpeg.tar.gz"
    if (source / "train").is_dir():
        return source, source
    if not archive.exists():
        pytest.skip("needs CIFAR-10 as an image folder: set ELLA_DATA")
    images = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(archive) as tar:
        tar.extractall(images, filter="data")
    return images, source


def noise_images(root: Path, counts: dict[str, int], size: tuple[int, int]) -> Path:
    """Folders of noise, <root>/<part>/<class>/…, so many images of each of two classes."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04d}.jpg")
    return root


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Ten images of each of two classes, where any experiment finds them."""
    return noise_images(tmp_path / "images", dict.fromkeys(("train", "test", "val"), 10), (40, 32))
