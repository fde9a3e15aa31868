"""The recipes as a user starts them, on data that every machine has or that the test makes."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import clone, run
from conftest import ROOT, noise_images
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image
from wandb.proto import wandb_internal_pb2

QUICK = ["trainer.enable_progress_bar=false", "ella.num_landmarks=24", "ella.rank=4", "ella.num_curvature=24"]


def start(recipe: str, folder: Path, *arguments: str) -> tuple[list[Path], str]:
    """Start a recipe in a clone; return the folders of its runs, which it names itself, and what it printed."""
    before = set(folder.glob("outputs/**/.hydra"))
    printed = run(shlex.join(["python", f"recipes/{recipe}", *arguments]), folder)
    made = sorted(set(folder.glob("outputs/**/.hydra")) - before)
    return [each.parent for each in made], printed


def train(folder: Path, *overrides: str) -> tuple[dict, Path, str]:
    """Run recipes/train.py in a clone; return report.json, the run's folder, and what was printed."""
    (made,), printed = start("train.py", folder, *overrides)
    return json.loads((made / "report.json").read_text()), made, printed


def evaluate(folder: Path, *overrides: str) -> tuple[dict, Path]:
    """Run recipes/evaluate.py in a clone; return report.json and the run's folder."""
    (made,), _ = start("evaluate.py", folder, *overrides)
    return json.loads((made / "report.json").read_text()), made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return clone(tmp_path / "clone")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Noise in two classes, with a split file."""
    order = np.random.default_rng(0).permutation(80)
    np.savez(tmp_path / "split.npz", train=order[:60], heldout=order[60:])
    return noise_images(tmp_path / "images", {"train": 40, "test": 4}, (32, 32))


def test_the_digits_experiment_ends_with_table_report_figures_and_wandb(folder: Path):
    report, run, printed = train(folder, "trainer.max_epochs=1", "max_images=60", "data.holdout=100", *QUICK)
    for words in (
        "accuracy",
        "NLL",
        "ECE",
        "Brier",
        "AUROC against foreign images",
        "epistemic",
        "novelty",
        "MAP",
        "ELLA",
    ):
        assert words in printed
    for words in ("The network is right on", "are told best by", "python recipes/evaluate.py run="):
        assert words in printed
    assert set(report["test"]) == {"MAP", "ELLA"}
    assert 0 < report["foreign"]["foreign/photographs"]["AUROC epistemic"] < 1
    assert report["num_test"] == 60
    assert report["config"]["ella"]["rank"] == 4
    assert report["fit"]["ella/nll"] > 0
    plots = {"reliability", "confidence", "risk_coverage", "eigenvalues", "tuning", "most_uncertain"}
    for name in plots:
        with Image.open(run / f"{name}.png") as image:
            assert image.size[0] > 500
            assert len(image.convert("L").getcolors()) > 20  # something is drawn
    (stored,) = run.glob("wandb/offline-run-*/run-*.wandb")
    kept = read_wandb(stored)
    for who in ("map", "ella"):
        for metric in ("nll", "ece", "brier", "accuracy", "aurc", "adaptive_ece"):
            assert float(kept["history"][f"{who}/{metric}"]) == pytest.approx(report["fit"][f"{who}/{metric}"])
            assert float(kept["history"][f"test/{who}/{metric}"]) == report["test"][who.upper()][metric]
    pictures = {
        name for name, kind in kept["history"].items() if name.endswith("/_type") and kind == '"images/separated"'
    }
    assert pictures == {f"test/{name}/_type" for name in plots}
    assert kept["history"]["test/most_uncertain_images/_type"] == '"table-file"'
    assert kept["config"]["ella"]["rank"] == 4
    assert kept["artefacts"]["posterior"] == {"config.yaml", "weights.safetensors", "ella.safetensors"}
    again, _ = evaluate(folder, f"run={run}")
    assert (again["test"], again["foreign"]) == (report["test"], report["foreign"])


def records(content: bytes, block: int = 2**15) -> Iterator[bytes]:
    """The records of a LevelDB log after W&B's header of 7 bytes: each is in one piece or more, none across blocks."""
    at, joined = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        joined += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            yield joined
            joined = b""


def read_wandb(file: Path) -> dict:
    """What W&B's offline mode wrote: the latest of each figure, the configuration, and the artefacts' files."""
    kept: dict = {"history": {}, "config": {}, "artefacts": {}}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        for item in record.history.item:
            kept["history"]["/".join(item.nested_key) or item.key] = item.value_json
        for item in record.config.update:
            kept["config"][item.key] = json.loads(item.value_json)
        for request in (record.request.log_artifact.artifact, record.artifact):
            if request.type:
                kept["artefacts"][request.type] = {entry.path for entry in request.manifest.contents}
    return kept


def test_the_cifar_experiment_takes_any_image_folder_a_split_and_a_checkpoint(folder: Path, image_folder: Path):
    common = [
        "experiment=cifar10_resnet20",
        f"data.root={image_folder}",
        f"data.split={image_folder.parent}/split.npz",
        "model.num_classes=2",
        "model.depth=8",
        "data.holdout=20",
        "logger=csv",
        *QUICK,
    ]
    report, made, _ = train(folder, *common, "trainer.max_epochs=0")
    assert report["num_test"] == 8
    columns = next(made.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"test/ella/nll", "map/nll", "foreign/digits/AUROC_novelty"} < set(columns)
    report, *_ = train(folder, *common, "trainer.fast_dev_run=true", "ella=paper")
    assert report["fit"]["ella/prior_variance"] == pytest.approx(0.04)


def test_the_study_compares_rivals_and_ablations_and_writes_what_it_found(folder: Path):
    network = ["experiment=digits_vit", "trainer.max_epochs=1", "data.train=60", "data.holdout=300", "logger=wandb"]
    sizes = ["num_calibration=20", "num_test=16", "num_corrupted=2", "num_foreign=6", "num_bootstraps=20"]
    sizes += ["corruptions=[contrast,jpeg]"]
    sizes += ["ensemble=2", "seeds=[0,1]", "rivals=[MAP,temperature scaling,MC dropout]"]
    (made,), printed = start("compare.py", folder, *network, *sizes, *QUICK)
    figures = json.loads((made / "compare.json").read_text())
    rows = figures["1"]
    wanted = {"MAP", "temperature scaling", "MC dropout", "deep ensemble", "deep ensemble, temperature"}
    wanted |= {"weight averaging, temperature", "lightning-ella", "lightning-ella, student"}
    wanted |= {"by ViM", "by Mahalanobis", "by k nearest neighbours", "by principal components", "by energy"}
    assert wanted < set(rows)
    assert {path.name for path in (made / "members").iterdir()} == {
        *(f"{name}-{seed}.safetensors" for name, seed in (("seed", 1), ("seed", 2), ("averaged", 0), ("averaged", 1)))
    }
    assert rows["ELLA as in the paper"]["corrupted"]["nll"] > 0
    for name in ("familiarity", "novelty", "student, familiarity"):
        assert set(rows[f"by lightning-ella, {name}"]["foreign"]) == set(rows["MAP"]["foreign"])
        assert 0 <= rows[f"by lightning-ella, {name}"]["foreign"]["AUROC corrupted"] <= 1
    assert figures["NLL over ours"]["test"]["lightning-ella"] == [0, 0]
    low, high = figures["NLL over ours"]["corrupted"]["MAP"]
    assert low < high
    for words in ("AURC", "FPR95 photographs", "±"):
        assert words in printed
    for name in ("reliability", "shift", "risk_coverage"):
        assert (made / f"{name}.png").stat().st_size > 10_000
    (stored,) = made.glob("wandb/offline-run-*/run-*.wandb")
    assert b"compare/MC dropout/corrupted/nll" in stored.read_bytes()


def test_the_shortcuts_of_a_fit_are_compared_on_any_image_folder(folder: Path, image_folder: Path):
    network = ["experiment=own", "data=image_folder", "model.num_classes=2", "model.depth=8"]
    sizes = ["num_landmarks=24", "num_curvature=24", "num_calibration=20", "num_test=8", "ella.num_landmarks=16"]
    sizes += ["ella.rank=4", "ella.curvature=sampled", "ella.num_curvature=16", "ella.num_calibration=4"]
    sizes += ["num_samples=300", "num_timed=8", "num_foreign=4"]
    data = [f"data.root={image_folder}", f"data.split={image_folder.parent}/split.npz", "trainer.max_epochs=0"]
    (made,), printed = start(
        "shortcuts.py", folder, *data, *network, *sizes, "corruptions=[contrast]", "num_corrupted=2"
    )
    rows = json.loads((made / "shortcuts.json").read_text())
    assert all(figures["NLL"] > 0 for figures in rows.values())
    assert rows["the defaults"]["epochs"] > 0
    undone = [name for name in rows if name.startswith("…")]
    assert all(rows[name]["NLL"] != rows["the defaults"]["NLL"] for name in undone)  # each of them changes something
    assert "epochs" in printed


def test_the_benchmark_compares_the_memory_of_a_fit_with_the_formula(folder: Path):
    _, printed = start("benchmark.py", folder, "fit=true", "num_landmarks=20", "rank=4", "network=tiny")
    assert "tiny, M = 20, K = 4" in printed
    assert "GB by the formula" in printed


def test_the_figures_of_a_gpu_are_taken_of_any_device(folder: Path):
    small = ["device=cpu", "measured=[tiny]", "num_outputs=[3]", "matmul=[highest]", "samples=4", "few=20", "unseen=20"]
    small += ["tuned=50"]
    (made,), printed = start("gpu.py", folder, *small, "rounds=1", "rank=2")
    found = json.loads((made / "gpu.json").read_text())
    assert found["machine"] in printed
    (row,) = found["rows"]
    assert min(value for name, value in row.items() if name not in ("network", "matmul", "peak, of the budget")) > 0
    assert row["samples a chunk"] == 64


def test_the_slurm_launcher_composes(monkeypatch: pytest.MonkeyPatch):
    overrides = ["launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=8"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    assert config.hydra.launcher["_target_"].endswith("SlurmLauncher")
    assert (config.trainer.devices, config.trainer.num_nodes, config.trainer.strategy) == (8, 2, "ddp")
    assert config.hydra.launcher.gpus_per_node == 4
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


def test_a_classifier_by_name_goes_from_training_to_evaluation_on_corrupted_images(folder: Path, stand_ins: Path):
    overrides = [
        "experiment=own",
        "model=timm",
        "model.name=test_resnet",
        "model.pretrained=false",
        "data=image_folder",
    ]
    overrides += [f"data.root={stand_ins}", "data.holdout=5", "data.image_size=32", "data.batch_size=4", "max_images=6"]
    overrides += ["trainer.max_epochs=1", "logger=csv", "ella.num_landmarks=8", "ella.rank=2"]
    report, made, _ = train(folder, *overrides)
    assert report["num_test"] == 6
    shifted = stand_ins.parent / "shifted"
    for severity in ("1", "5"):
        shutil.copytree(stand_ins / "test", shifted / "fog" / severity)
    again, on_shifted = evaluate(folder, f"run={made}", f"data.shifted={shifted}")
    assert again["test"] == report["test"]
    assert set(again) > {"severity 1", "severity 5"}
    assert (on_shifted / "shift.png").stat().st_size > 10_000
    (shifted / "fog" / "1" / "dog").rename(shifted / "fog" / "1" / "cow")
    with pytest.raises(AssertionError, match=r"has the classes \['cat', 'cow'\], not \['cat', 'dog'\]"):
        evaluate(folder, f"run={made}", f"data.shifted={shifted}")


def test_a_run_is_fetched_from_wandb_or_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import evaluate
    import wandb

    for name in ("config.yaml", "weights.safetensors", "ella.safetensors"):
        (tmp_path / name).touch()

    class Api:
        def artifact(self, name: str, type: str):
            assert (name, type) == ("me/lightning-ella/posterior-1a2b:latest", "posterior")
            return self

        def download(self) -> str:
            return str(tmp_path)

    monkeypatch.setattr(wandb, "Api", Api)
    assert evaluate.folder_of("me/lightning-ella/posterior-1a2b:latest") == tmp_path
    with pytest.raises(SystemExit, match=r"has no config\.yaml and no weights.* pass run="):
        evaluate.folder_of(str(tmp_path / "nowhere"))


def test_a_sweep_runs_over_lists_and_optuna_minimises_the_nll_on_held_out_images(folder: Path):
    common = ["trainer.max_epochs=1", "max_images=20", "data.holdout=60", *QUICK]
    quick = [override for override in common if not override.startswith("ella.rank")]
    runs, _ = start("train.py", folder, "--multirun", "ella.rank=2,4", *quick)
    assert [json.loads((each / "report.json").read_text())["config"]["ella"]["rank"] for each in runs] == [2, 4]
    assert all(list(each.glob("wandb/offline-run-*")) for each in runs)
    runs, _ = start("train.py", folder, "--multirun", "sweep=optuna", "hydra.sweeper.n_trials=2", *common)
    found = OmegaConf.load(runs[0].parent / "optimization_results.yaml")
    reports = [json.loads((each / "report.json").read_text()) for each in runs]
    assert found.best_value == pytest.approx(min(report["fit"]["ella/nll"] for report in reports))


def test_whatever_is_swept_is_in_one_folder(folder: Path):
    """Lists of experiments too, which name the folders of single runs; and those of the other recipes."""
    runs, _ = start(
        "train.py", folder, "--multirun", "experiment=digits_resnet,digits_vit", "trainer.fast_dev_run=true"
    )
    assert [each.name for each in runs] == ["0", "1"]
    assert runs[0].parent == runs[1].parent
    assert (runs[0].parent / "multirun.yaml").exists()
    small = ["peaks=false", "rounds=1", "network=tiny"]
    runs, _ = start("benchmark.py", folder, "--multirun", "rank=2,3", *small)
    assert [str(each.relative_to(folder / "outputs/benchmark/sweeps"))[-2:] for each in runs] == ["/0", "/1"]


def test_a_sweep_that_ddp_would_start_again_in_each_process_is_refused(folder: Path):
    with pytest.raises(AssertionError, match="with it the whole sweep: leave it out, or start the sweep with torchrun"):
        start("train.py", folder, "--multirun", "trainer=ddp", "ella.rank=2,4")


def test_ddp_is_a_choice_of_trainer_and_tensorboard_one_of_logger(folder: Path):
    overrides = ["trainer=ddp", "trainer.devices=2", "trainer.max_epochs=1", "logger=tensorboard", "data.train=64"]
    report, made, printed = train(folder, *overrides, "max_images=20", *QUICK)
    assert report["config"]["trainer"]["strategy"] == "ddp"
    assert printed.count("AUROC against foreign images") == 1
    events = b"".join(file.read_bytes() for file in made.rglob("events.out.tfevents.*"))
    for tag in (b"test/ella/nll", b"test/reliability", b"ella/temperature"):
        assert tag in events


def test_the_rules_for_the_basis_are_compared(folder: Path):
    sizes = ["num_calibration=40", "num_test=20", "num_corrupted=2", "num_foreign=10", "data.train=200", "data.test=60"]
    sizes += ["corruptions=[contrast]"]
    (made,), printed = start("bases.py", folder, "trainer.max_epochs=1", "model.width=4", *sizes, *QUICK)
    rows = json.loads((made / "bases.json").read_text())
    assert len(rows) == 6
    for row in rows.values():
        assert 0 < row["curvature"] < 1
        assert 0 < row["kernel"] < 1
    krylov, paper = rows["block Krylov on the curvature"], rows["uniform outputs (the paper)"]
    assert krylov["curvature"] > paper["curvature"]
    assert "corrupted NLL, all" in printed
