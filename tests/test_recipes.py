"""The recipes as a user starts them, on data that every machine has or that the test makes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from PIL import Image

QUICK = ["trainer.enable_progress_bar=false", "ella.num_landmarks=24", "ella.rank=4", "ella.num_curvature=24"]


def run(recipe: str, tmp_path: Path, *overrides: str, python: Sequence[str] = ()) -> str:
    """Run a recipe in `tmp_path`, with more arguments to Python if given; return what it printed."""
    command = [sys.executable, *python, str(ROOT / "recipes" / recipe), f"hydra.run.dir={tmp_path}/run", *overrides]
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(tmp_path: Path, *overrides: str) -> tuple[dict, str]:
    """Run recipes/train.py in `tmp_path`; return report.json and what was printed."""
    printed = run("train.py", tmp_path, *overrides)
    return json.loads((tmp_path / "run" / "report.json").read_text()), printed


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Noise in two classes, with a split file."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04d}.jpg")
    order = generator.permutation(80)
    np.savez(tmp_path / "split.npz", train=order[:60], heldout=order[60:])
    return tmp_path / "images"


def test_the_digits_experiment_ends_with_table_report_figures_and_wandb(tmp_path: Path):
    report, printed = train(tmp_path, "trainer.max_epochs=1", *QUICK)
    for column in ("accuracy", "NLL", "ECE", "Brier", "AUROC total", "AUROC epistemic", "AUROC novelty", "MAP", "ELLA"):
        assert column in printed
    assert set(report["test"]) == {"MAP", "ELLA"}
    assert 0 < report["test"]["ELLA"]["auroc_epistemic"] < 1
    assert report["num_test"] == 900
    assert report["config"]["ella"]["rank"] == 4
    assert report["fit"]["ella/nll"] > 0
    run = tmp_path / "run"
    for name in ("reliability.png", "eigenvalues.png"):
        with Image.open(run / name) as image:
            assert image.size[0] > 500
    (stored,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    for key in (b"ella/nll", b"test/ella/nll", b"test/reliability"):
        assert key in content
    assert list(run.rglob("ella.safetensors"))


def test_the_cifar_experiment_takes_any_image_folder_a_split_and_a_checkpoint(tmp_path: Path, image_folder: Path):
    common = [
        "experiment=cifar10_resnet20",
        f"data.root={image_folder}",
        f"data.split={tmp_path}/split.npz",
        "model.network.num_classes=2",
        "model.network.depth=8",
        "logger=csv",
        *QUICK,
    ]
    report, _ = train(tmp_path, *common, "trainer.max_epochs=0")
    assert report["num_test"] == 8
    assert report["fit"]["ella/accuracy"] == pytest.approx(report["fit"]["map/accuracy"], abs=0.2)
    report, _ = train(tmp_path, *common, "trainer.fast_dev_run=true", "ella=paper")
    assert report["fit"]["ella/prior_variance"] == pytest.approx(0.04)


def test_the_study_compares_rivals_and_ablations_and_writes_what_it_found(tmp_path: Path):
    network = ["experiment=digits_vit", "trainer.max_epochs=1", "data.train=60", "data.holdout=300", "logger=wandb"]
    sizes = ["num_calibration=40", "num_test=30", "num_corrupted=4", "num_foreign=10", "num_bootstraps=20"]
    sizes += ["ensemble=2", "seeds=[0,1]", "rivals=[MAP,temperature scaling,MC dropout]"]
    printed = run("compare.py", tmp_path, *network, *sizes, *QUICK)
    rows = json.loads((tmp_path / "run" / "compare.json").read_text())["1"]
    assert {"MAP", "temperature scaling", "MC dropout", "deep ensemble", "lightning-ella"} < set(rows)
    assert rows["ELLA as in the paper"]["corrupted"]["nll"] > 0
    assert set(rows["lightning-ella, by novelty"]["foreign"]) == set(rows["MAP"]["foreign"])
    assert rows["lightning-ella"]["NLL over ours"]["test"] == [0, 0]
    for words in ("AURC", "FPR95 photographs", "±"):
        assert words in printed
    for name in ("reliability", "shift", "risk_coverage"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 10_000
    (stored,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    assert b"compare/MC dropout/corrupted/nll" in stored.read_bytes()


def test_the_shortcuts_are_compared_on_any_image_folder(tmp_path: Path, image_folder: Path):
    network = ["model.network.num_classes=2", "model.network.depth=8", "num_landmarks=24", "rank=4"]
    sizes = ["num_curvature=40", "stop_every=10", "num_calibration=20", "num_test=8", "memory_budget=4000000"]
    run("shortcuts.py", tmp_path, f"data.root={image_folder}", f"data.split={tmp_path}/split.npz", *network, *sizes)
    rows = json.loads((tmp_path / "run" / "shortcuts.json").read_text())
    assert 0 < rows["gradients streamed"]["median"] < 1
    assert 0 < rows["features in bf16"]["median"] < 1
    assert rows["MAP"]["nll"] > 0


def test_the_benchmark_compares_the_memory_of_a_fit_with_the_formula(tmp_path: Path):
    small = ["networks.resnet20.model.depth=8", "networks.resnet20.peer_batches=[2]", "networks.resnet20.samples=2"]
    printed = run("benchmark.py", tmp_path, "fit=true", "num_landmarks=20", "rank=4", *small)
    assert "resnet20, M = 20, K = 4" in printed
    assert "GB by the formula" in printed


def test_the_benchmark_compares_one_process_with_two(tmp_path: Path):
    small = ["networks.resnet20.model.depth=8", "networks.resnet20.peer_batches=[2]", "networks.resnet20.samples=2"]
    printed = run("benchmark.py", tmp_path, "processes=2", "num_landmarks=20", "rank=4", *small)
    assert "by one process of one thread" in printed


def test_torchrun_starts_the_recipe_on_two_processes(tmp_path: Path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    overrides = ["launcher=torchrun", "logger=none", "trainer.max_epochs=1", "data.train=64", *QUICK]
    printed = run("train.py", tmp_path, *overrides, python=launcher)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["config"]["trainer"]["strategy"] == "ddp"
    assert report["fit"]["ella/nll"] > 0
    assert printed.count("AUROC against foreign images") == 1


def test_the_slurm_launcher_composes(monkeypatch: pytest.MonkeyPatch):
    overrides = ["launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=8"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    assert config.hydra.launcher["_target_"].endswith("SlurmLauncher")
    assert (config.trainer.devices, config.trainer.num_nodes, config.trainer.strategy) == (8, 2, "ddp")
    assert config.hydra.launcher.gpus_per_node == 4
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
