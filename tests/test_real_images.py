"""ResNet-20 on CIFAR-10 (JPEG): what calibration on unseen images is worth on others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader, Subset

from lightning_ella import fit_ella
from lightning_ella.metrics import classification_metrics


@pytest.fixture
def _recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


@pytest.mark.usefixtures("_recipes")
@pytest.mark.parametrize(
    ("checkpoint", "fall"), [("resnet20_cifar10_jpeg", 0.015), ("resnet20_cifar10_jpeg_overconfident", 0.06)]
)
def test_nll_and_ece_fall_on_images_nothing_was_chosen_on(real_data: tuple[Path, Path], checkpoint: str, fall: float):
    images, files = real_data
    torch.set_num_threads(2)
    overrides = ["experiment=cifar10_resnet20", f"data.root={images}", f"data.split={files}/cifar10_split.npz"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [*overrides, f"model.checkpoint={files}/{checkpoint}.pt"])
    from build import build

    module, data = build(config)
    data.setup("fit")
    predictor = fit_ella(
        module,
        data.ella_train_dataloader(),
        data.val_dataloader(),
        num_landmarks=1000,
        rank=20,
        num_curvature=1000,
        num_calibration=1500,
    )
    chosen = np.random.default_rng(0).permutation(len(data.test))[:1500].tolist()
    before, after = classification_metrics(10), classification_metrics(10)
    for x, y in DataLoader(Subset(data.test, chosen), 100):
        out = predictor(x)
        before.update(out.logits_mean.softmax(-1), y)
        after.update(out.probs, y)
    old, new = before.compute(), after.compute()
    assert new["nll"] < (1 - fall) * old["nll"]
    assert new["ece"] < old["ece"]
    assert abs(new["accuracy"] - old["accuracy"]) < 0.003
