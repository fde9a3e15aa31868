"""README and docs: their Python runs, page by page, as a program of a user."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from lightning.fabric.utilities.warnings import PossibleUserWarning
from test_callback import Data, Net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of a page in some languages, "" for none, in their order."""
    found = re.findall(r"^```(\w*).*?\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


@pytest.mark.filterwarnings(f"ignore::{PossibleUserWarning.__module__}.{PossibleUserWarning.__name__}")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pages
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = Data()
    names = {
        "module": Net(),
        "datamodule": data,
        "x": torch.randn(5, 2),
        "model": Net(),
        "train_loader": data.train_dataloader(),
        "unseen_loader": data.val_dataloader(),
        "fresh_loader": data.val_dataloader(),
        **numbers(),
    }
    if "ella.predictor" in (text := "\n".join(blocks(page, "python"))) and "ELLACallback" not in text:
        names["ella"] = fitted(names)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def numbers() -> dict:
    """A regression."""
    inputs = torch.randn(250, 3)
    points = TensorDataset(inputs, inputs[:, :1] + torch.randn(250, 1))
    return {
        "network": nn.Linear(3, 1),
        "train": DataLoader(points, 50),
        "unseen": DataLoader(points, 50),
        "fresh": DataLoader(points, 50),
        "inputs": inputs,
        "targets": points.tensors[1],
    }


def fitted(names: dict):
    """What a page takes for granted that only says how to use it."""
    from lightning.pytorch import Trainer

    from lightning_ella import ELLACallback

    ella = ELLACallback(num_landmarks=50, rank=5)
    Trainer(max_epochs=1, callbacks=[ella], logger=False).fit(names["module"], names["datamodule"])
    return ella


@pages
def test_what_a_page_points_to_exists(page: Path):
    text = page.read_text()
    for target in re.findall(r"!?\[[^\]]*\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{command}:" in makefile
