"""Every experiment of conf/experiment/, on stand-in data."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf/experiment").glob("*.yaml"))


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_runs(
    experiment: str, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import train

    overrides = [f"experiment={experiment}", "trainer.fast_dev_run=true", "logger=none", f"hydra.run.dir={tmp_path}"]
    overrides += ["hydra.runtime.output_dir=" + str(tmp_path), "trainer.enable_progress_bar=false"]
    overrides += ["ella.rank=2", "ella.residual=2"]
    if not experiment.startswith("digit"):
        overrides += [f"data.root={stand_ins}", "data.holdout=5", "data.batch_size=4", "data.num_workers=0"]
    if experiment.startswith("imagenet"):
        overrides += ["model.pretrained=false", "trainer.max_epochs=0", "data.image_size=32"]
    if experiment == "imagenet_vit_b16":
        overrides += ["model.name=vit_tiny_patch16_224", "model.options={img_size:32}"]  # 224 pixels take minutes
    if experiment in ("imagenet_resnet34", "imagenet_resnet50"):
        overrides += ["ella.views=[]"]
    if experiment == "own":
        overrides += ["data=image_folder", "model.depth=8"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        HydraConfig.instance().set_config(compose("config", overrides, return_hydra_config=True))
        config = compose("config", overrides)
    try:
        objective = train.main.__wrapped__(config)
    finally:
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    assert objective > 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["test"]["ELLA"]["nll"] > 0


def composed(*overrides: str) -> DictConfig:
    """A configuration outside of a run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*overrides, "ella.path=null"])


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["data=cifar10", "data.foreign_folders={street:/a}"], "data.foreign_folders", {"street": "/a"}),
        (["data=hugging_face", "data.options={data_dir:/a}"], "data.options", {"data_dir": "/a"}),
        (["model=timm", "model.options={img_size:48}"], "model.options", {"img_size": 48}),
    ],
)
def test_dictionaries_are_given_on_the_command_line(overrides: list[str], key: str, expected: dict):
    assert OmegaConf.select(composed("experiment=own", *overrides), key) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=torchvision", "model.name=resnet18", "model.pretrained=false"], "takes 3 x 224 x 224 numbers"),
        (["model.num_classes=2"], r"model\.num_classes=2, but the data have 10 classes"),
        (["data=image_folder", "data.root=/nowhere"], r"data\.root needs train/<class>"),
    ],
)
def test_network_and_data_that_do_not_fit_are_refused_at_once(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from build import build

    with pytest.raises(Exception, match=message):
        build(composed("experiment=own", *overrides))
