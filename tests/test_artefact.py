"""Files: whole or not there, and nothing but an error or the right result from a hostile one."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Case, make_case
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_ella import ELLAPredictor, artefact, fit_ella
from lightning_ella.predictor import FORMAT

MUTATED = 10_000


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("mlp")


@pytest.fixture
def written(case: Case, tmp_path: Path) -> tuple[Path, Tensor]:
    """A posterior, and what it predicts."""
    predictor = fit_ella(case.model, case.loader(), case.loader(), num_landmarks=20, rank=3, num_samples=8)
    return predictor.save(tmp_path / "ella.safetensors"), predictor(case.inputs[:2]).probs


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """Flip, cut, double, insert or overwrite some bytes, more often in the header than elsewhere."""
    header = 8 + int.from_bytes(data[:8], "little")
    end = header if random.random() < 0.7 else len(data)
    at, length = int(random.integers(end)), int(random.integers(1, 9))
    noise = random.bytes(length)
    how = random.integers(6)
    if how == 0:
        return data[:at] + bytes([data[at] ^ (1 << int(random.integers(8)))]) + data[at + 1 :]
    if how == 1:
        return data[: int(random.integers(len(data)))]
    if how == 2:
        return data[:at] + noise + data[at + length :]
    if how == 3:
        return data[:at] + noise + data[at:]
    if how == 4:
        return data + noise
    digits = [i for i in range(8, header) if 48 <= data[i] <= 57]
    at = digits[int(random.integers(len(digits)))]
    return data[:at] + str(random.integers(10)).encode() + data[at + 1 :]


def test_mutated_files_give_an_error_or_the_right_result(case: Case, written: tuple[Path, Tensor], tmp_path: Path):
    path, expected = written
    data, random, hostile = path.read_bytes(), np.random.default_rng(0), tmp_path / "hostile"
    refused = 0
    for _ in range(MUTATED):
        hostile.write_bytes(mutate(data, random))
        try:
            predictor = ELLAPredictor.load(hostile, case.model)
        except ValueError as error:
            refused += str(hostile) in str(error)
            continue
        torch.testing.assert_close(predictor(case.inputs[:2]).probs, expected, rtol=0, atol=0)
        refused += 1
    assert refused == MUTATED


def forged(path: Path, case: Case, tmp_path: Path, **changes: object) -> Path:
    """The file with other tensors or metadata, and a checksum that fits them."""
    tensors = load_file(path)
    _, metadata = artefact.read(path, FORMAT)
    settings = json.loads(metadata["settings"])
    for name, value in changes.items():
        if isinstance(value, Tensor):
            tensors[name.replace("__", ".")] = value
        else:
            settings[name] = value
    return artefact.write(tmp_path / "forged", tensors, {**metadata, "settings": json.dumps(settings)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 10**12}, "cannot be read as a posterior .num_samples=1000000000000 is more than"),
        ({"num_samples": "many"}, "cannot be read as a posterior .num_samples='many' must be a whole number"),
        ({"likelihood": ["classification"]}, "cannot be read as a posterior"),
        ({"seed": -1}, "cannot be read as a posterior .seed=-1 must be a whole number"),
        ({"unknown": 1}, "cannot be read as a posterior"),
        ({"curvature": torch.eye(4).double()}, "not those of a posterior of this network"),
        ({"eigenvalues": torch.ones(0).double()}, "not those of a posterior of this network"),
        ({"basis__0__weight": torch.zeros(3, 1)}, "not those of a posterior of this network"),
        ({"basis__9__weight": torch.zeros(3, 1)}, "not those of a posterior of this network"),
        ({"curvature": torch.full((3, 3), torch.nan).double()}, "NaN or infinite"),
        ({"eigenvalues": torch.ones(3).int()}, "not those of a posterior of this network"),
        ({"eigenvalues": torch.ones(3).half()}, "not those of a posterior of this network"),
        ({"eigenvalues": torch.ones(3).to(torch.float8_e4m3fn)}, "not those of a posterior of this network"),
        ({"prior_variance": torch.tensor(-1.0).double()}, "a variance that is not positive"),
    ],
)
def test_forged_files_are_refused(
    case: Case, written: tuple[Path, Tensor], tmp_path: Path, changes: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        ELLAPredictor.load(forged(written[0], case, tmp_path, **changes), case.model)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bombed",)


def test_files_of_other_kinds_are_refused(
    case: Case, written: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Bomb()}, tmp_path / "torch")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "huge header").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    save_file({"a": torch.zeros(1)}, tmp_path / "tensors")
    for name in ("torch", "pickle", "empty", "folder", "huge header", "sparse", "tensors"):
        with pytest.raises(ValueError, match=str(tmp_path / name)):
            ELLAPredictor.load(tmp_path / name, case.model)
    assert not (tmp_path / "bombed").exists()
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        ELLAPredictor.load(tmp_path / "absent", case.model)


def test_a_full_disk_leaves_the_older_file(case: Case, written: tuple[Path, Tensor], tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("may not mount a small file system")
    try:
        kept = Path(shutil.copy(written[0], disk / "ella.safetensors"))
        before = kept.read_bytes()
        with pytest.raises(OSError, match=r"ella\.safetensors"):
            artefact.write(kept, {"large": torch.zeros(2**20)}, {"format": FORMAT})
        assert kept.read_bytes() == before
        assert os.listdir(disk) == [kept.name]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
