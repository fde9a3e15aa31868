"""A user's training script in real processes: torchrun, ddp_spawn, a cluster's variables; killed and failing ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from torch.distributed.constants import default_pg_timeout

sys.path.insert(0, str(ROOT / "recipes"))
from faults import INJECTED, LIMIT, launch

SCRIPT = str(ROOT / "recipes" / "faults.py")


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def start(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the script by itself, or under a launcher."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *launcher, SCRIPT, "worker", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return found(folder) | {"said": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return start(tmp_path_factory.mktemp("alone"))


def assert_same(together: dict[str, Any], alone: dict[str, Any]) -> None:
    assert together["fitted"]
    for name in ("weights", "eigenvalues", "probs"):
        assert flat(together[name]) == pytest.approx(flat(alone[name]), rel=1e-4)
    for name in ("ella/nll", "ella/ece", "map/nll", "test_nll"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4)


def flat(values: Any) -> list[float]:
    return [number for value in values for number in flat(value)] if isinstance(values, list) else [values]


@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_gives_the_posterior_of_one_process(tmp_path: Path, alone: dict[str, Any], processes: int):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    together = start(tmp_path, f"devices={processes}", "strategy=ddp", launcher=launcher)
    assert_same(together, alone)
    assert together["predicted"] == 24 // processes  # on the first process: its share


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_spawned_processes_leave_the_predictor_to_their_parent(tmp_path: Path, alone: dict[str, Any], strategy: str):
    together = start(tmp_path, "devices=2", f"strategy={strategy}", "epochs=0")
    assert_same(together, alone)


def test_processes_whose_batchnorms_drifted_apart_fit_one_network(tmp_path: Path):
    outcomes = launch(tmp_path, 2, epochs=1, batchnorm=1)
    assert all(outcome.code == 0 for outcome in outcomes), outcomes[0].output + outcomes[1].output
    together = found(tmp_path)
    assert together["fitted"]
    resumed = start(tmp_path / "alone", f"ckpt={tmp_path}/last.ckpt", "epochs=0", "batchnorm=1")
    assert flat(together["probs"]) == pytest.approx(flat(resumed["probs"]), rel=1e-3)


@pytest.mark.parametrize("stage", ["the landmarks' gradients", "the curvature", "the calibration"])
def test_a_killed_process_leaves_training_and_a_fit_that_can_be_resumed(tmp_path: Path, stage: str):
    outcomes = launch(tmp_path, 2, epochs=1, fault=f"{stage}/1/kill")
    survivor = outcomes[0]
    assert outcomes[1].code == -9
    assert survivor.code == 0, survivor.output
    assert f"contact with another process was lost during {stage}" in survivor.output
    assert "process group's timeout of 1800 s" in survivor.output
    assert "fit has ended" in survivor.output
    assert not found(tmp_path)["fitted"]
    resumed = start(tmp_path, f"ckpt={tmp_path}/last.ckpt", "epochs=0")
    assert resumed["fitted"]
    assert not list(tmp_path.glob("*.stage"))
    assert ("basis read from" in resumed["said"]) == (stage != "the landmarks' gradients")
    assert ("curvature read from" in resumed["said"]) == (stage == "the calibration")


@pytest.mark.parametrize(("stage", "rank"), [("the eigendecomposition", 0), ("the combination of the gradients", 1)])
def test_an_error_on_one_process_is_told_by_all(tmp_path: Path, stage: str, rank: int):
    assert default_pg_timeout.total_seconds() > LIMIT  # so whoever ends did not wait until the others were given up
    outcomes = launch(tmp_path, 2, epochs=1, fault=f"{stage}/{rank}/raise")
    printed = "".join(outcome.output for outcome in outcomes)
    assert all(outcome.code == 0 and "fit has ended" in outcome.output for outcome in outcomes), printed
    assert f"RuntimeError: {INJECTED}" in outcomes[rank].output
    assert f"process {rank} of 2 failed during {stage}, so all of them stopped" in outcomes[1 - rank].output
    outcomes = launch(tmp_path, 2, epochs=1, on_error="raise", fault=f"{stage}/{rank}/raise")
    assert all(outcome.code != 0 and INJECTED in outcome.output for outcome in outcomes)
