"""ResNet-20 on CIFAR-10 (JPEG): what calibration on unseen images is worth on others."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader, Subset

from lightning_ella import fit_ella
from lightning_ella.metrics import classification_metrics


@pytest.fixture
def _recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


@pytest.mark.usefixtures("_recipes")
def test_nll_and_ece_fall_on_images_nothing_was_chosen_on(real_data: tuple[Path, Path]):
    images, files = real_data
    overrides = ["experiment=cifar10_resnet20", f"data.root={images}", f"data.split={files}/cifar10_split.npz"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [*overrides, f"model.checkpoint={files}/resnet20_cifar10_jpeg_overconfident.pt"])
    from build import build

    module, data = build(config)
    data.setup("fit")
    predictor = fit_ella(
        module,
        data.ella_train_dataloader(),
        data.val_dataloader(),
        num_landmarks=200,
        rank=20,
        num_curvature=200,
        num_calibration=400,
    )
    chosen = np.random.default_rng(0).permutation(len(data.test))[:400].tolist()
    before, after = classification_metrics(10), classification_metrics(10)
    for x, y in DataLoader(Subset(data.test, chosen), 100):
        out = predictor(x)
        before.update(out.logits_mean.softmax(-1), y)
        after.update(out.probs, y)
    old, new = before.compute(), after.compute()
    assert new["nll"] < 0.94 * old["nll"]
    assert new["ece"] < old["ece"]
    assert abs(new["accuracy"] - old["accuracy"]) < 0.01
