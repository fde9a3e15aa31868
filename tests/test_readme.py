"""Every Python block of the README runs, in order, as one program of a user with a module and a datamodule."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_callback import Data, Net

README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    data = Data()
    names = {
        "module": Net(),
        "datamodule": data,
        "x": torch.randn(5, 2),
        "model": Net(),
        "train_loader": data.train_dataloader(),
        "unseen_loader": data.val_dataloader(),
    }
    for block in blocks:
        exec(compile(small(block), "README.md", "exec"), names)
    assert names["out"].probs.shape == (5, 3)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_the_python_blocks_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)
    assert blocks
    names = {"module": Net(), "datamodule": Data()}
    for block in blocks:
        exec(compile(small(block), "distributed.md", "exec"), names)
    assert names["ella"].predictor.rank > 0


def small(block: str) -> str:
    """The README's numbers, cut to the size of the test's data."""
    return block.replace("num_landmarks=2000", "num_landmarks=50")


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{command}:" in makefile
    for image in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / image).exists()
