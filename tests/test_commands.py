"""The commands of README and docs run as a reader's would: word for word, in a folder like a clone's."""

import functools
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from commands import clone, run
from conftest import ROOT, noise_images
from test_readme import PAGES, blocks
from torchvision.models import resnet18

sys.path.insert(0, str(ROOT / "recipes"))
from models import CifarResNet


def commands(page: Path) -> list[str]:
    """The recipes that a page starts, each as a shell takes it; one where a part in [brackets] is optional, another."""
    text = "\n".join((*blocks(page, "bash", ""), *inline(page)))
    lines = (" ".join(line.partition(" #")[0].split()) for line in text.replace("\\\n", " ").splitlines())
    found = [line.removeprefix(".venv/bin/") for line in lines if re.match(PROGRAM, line)]
    return [line for each in found for line in dict.fromkeys((without_options(each), with_options(each)))]


PROGRAM = r"(\w+=\S+ )*(\.venv/bin/)?(python|torchrun)\b.*\brecipes/"


def inline(page: Path) -> list[str]:
    """The code within the text of a page."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M))


def without_options(line: str) -> str:
    return re.sub(r" \[\S*\]", "", line)


def with_options(line: str) -> str:
    """The first of each list of choices."""
    return re.sub(r" \[([^|\]]*)\S*\]", r" \1", line)


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
RECIPES = (ROOT / "docs/how-to/recipes.md").read_text()
SMALLER = dict(re.findall(r"^\| `(\S+)` \| `([^`]*)`", RECIPES.partition("## Try it small")[2], re.MULTILINE))
ELSEWHERE = re.compile(r"model=timm|imagenet_|fashion_mnist|<entity>")  # it downloads, or takes a Debian package


class Reader:
    """Has what the placeholders of commands stand for: small data, checkpoints, and runs, made when they are needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.has: dict[str, Callable[[str], Any]] = {
            "data.root=<folder>": lambda line: self.images,
            "data.shifted=<folder>": lambda line: self.shifted,
            "data.split=<npz>": lambda line: self.split,
            "data.name=<data set>": lambda line: self.images,
            "model.name=<folder or name>": lambda line: self.hugging_face,
            "model.checkpoint=<file>": lambda line: self.weights(
                "torchvision" if "torchvision" in line else "resnet20"
            ),
            "model.checkpoint=<run>": lambda line: self.run("python recipes/train.py"),
            "run=<folder>": lambda line: self.run(f"{self.fill(OF_IMAGES)} max_images=4"),
            "run=<folder that the first one names>": lambda line: self.run(f"{self.fill(OF_IMAGES)} max_images=4"),
            "hydra.launcher.partition=<yours>": lambda line: "gpus",
            "network=…": lambda line: "resnet20",
            "num_landmarks=…": lambda line: 20,
        }

    def fill(self, line: str) -> str:
        """The command with all placeholders filled in."""
        for place, value in self.has.items():
            if place in line:
                line = line.replace(place, f"{place.partition('=')[0]}={value(line)}")
        return line

    @functools.cached_property
    def images(self) -> Path:
        return noise_images(self.folder / "images", dict.fromkeys(("train", "test"), 20), (40, 32))

    @functools.cached_property
    def shifted(self) -> Path:
        for severity in "15":
            shutil.copytree(self.images / "test", self.folder / "shifted/fog" / severity)
        return self.folder / "shifted"

    @functools.cached_property
    def split(self) -> Path:
        order = np.random.default_rng(0).permutation(40)
        np.savez(self.folder / "split.npz", train=order[:30], heldout=order[30:])
        return self.folder / "split.npz"

    @functools.cached_property
    def hugging_face(self) -> Path:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
        transformers.ViTForImageClassification(config).save_pretrained(self.folder / "vit")
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(self.folder / "vit")
        return self.folder / "vit"

    @functools.cache  # noqa: B019 - one reader lives as long as the tests
    def weights(self, name: str) -> Path:
        networks = {"resnet20": lambda: CifarResNet(20, 2), "torchvision": lambda: resnet18(num_classes=2)}
        torch.manual_seed(0)
        torch.save(networks[name]().state_dict(), self.folder / f"{name}.pt")
        return self.folder / f"{name}.pt"

    @functools.cache  # noqa: B019
    def run(self, line: str) -> Path:
        """The folder of a run that is not cut short, as it names it itself."""
        printed = run(line, clone(self.folder / re.sub(r"\W+", "-", line)[-60:]))
        return Path(re.findall(r"are in (\S+)", printed)[-1])


OF_IMAGES = next(line for line in COMMANDS if "train.py experiment=cifar10_resnet20 trainer.max_epochs=0" in line)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_a_command_runs_as_its_page_has_it(line: str, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = clone(tmp_path / "clone")
    if ELSEWHERE.search(line):
        composed = run(re.sub(r"<[^>]*>", "1", line) + " --cfg job --resolve", folder)
        assert "max_images: null" in composed
        return
    small = " ".join(more for what, more in SMALLER.items() if what in line)
    assert small, f"the table of docs/how-to/recipes.md does not say how to try {line}"
    assert "hydra." not in small.replace("hydra.sweeper.n_trials", "")  # where results go is not its business
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run(f"{reader.fill(line)} {small}", folder, cluster(tmp_path / "bin"))
    if "train.py" in line:
        assert len(list(folder.glob("outputs/*/*/**/report.json"))) == runs_of(line)
    if "--multirun" in line:
        assert len(list(folder.glob("outputs/sweeps/*"))) == 1
    if "launcher=slurm" in line:
        job = (tmp_path / "bin" / "job.sh").read_text()
        for asked in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpus"):
            assert f"#SBATCH --{asked}\n" in job


def runs_of(line: str) -> int:
    """How many runs a command makes on this machine."""
    if "launcher=slurm" in line:
        return 0
    return 2 if "sweep=optuna" in line else math.prod(word.count(",") + 1 for word in line.split())


CLUSTER = """#!{python}
import pickle, re, sys
from pathlib import Path
from hydra.core.utils import JobReturn, JobStatus
job = Path(sys.argv[1]).read_text()
Path("{folder}/job.sh").write_text(job)
nodes, tasks = (int(re.search(f"--{{what}}=(.*)", job)[1]) for what in ("nodes", "ntasks-per-node"))
results = Path(re.search("--output=(.*)/", job)[1].replace("%j", "1"))
results.mkdir(parents=True, exist_ok=True)
done = pickle.dumps(("success", JobReturn(_return_value=0.5, status=JobStatus.COMPLETED)))
for task in range(nodes * tasks):
    (results / f"1_{{task}}_result.pkl").write_bytes(done)
print("Submitted batch job 1")
"""


def cluster(folder: Path) -> Path:
    """The programs of a SLURM that takes jobs, keeps their script in `folder`, and says at once that they are done."""
    folder.mkdir()
    for name in ("sbatch", "srun"):
        (folder / name).write_text(CLUSTER.format(python=sys.executable, folder=folder))
        (folder / name).chmod(0o755)
    return folder
