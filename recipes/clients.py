"""Other people's projects with one callback more: the table of docs/works-with.md.

    make clients        or, for some of them:        make clients only="torchgeo chemprop"

A project is a script in recipes/clients/, whose first lines say what it needs from PyPI. Its environment, in
.venv/clients/, is made where it is missing: it holds what the project adds, and sees the rest in .venv. The script
trains small networks on made-up data, without and with the callback, by `compare`. All that it says is in the file
`log` of its environment.
"""

import argparse
import ast
import copy
import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ella import ELLACallback, ELLAPredictor

SCRIPTS = Path(__file__).with_suffix("")
BASE = Path(sysconfig.get_paths()["purelib"])
ENVIRONMENTS = SCRIPTS.parents[1] / ".venv" / "clients"
# No project gets copies of its own: they would cost gigabytes, and other versions would be another test.
SHARED = ("torch", "torchvision", "lightning", "pytorch-lightning", "torchmetrics", "numpy")
LIMIT = 1200  # seconds for a script

Train = Callable[[list], Mapping[str, Any] | None]


@dataclass
class Row:
    """What came of one network."""

    project: str
    what: str = ""
    arguments: str = ""
    identical: bool | None = None
    nll: tuple[float, float] | None = None
    seconds: tuple[float, float] | None = None
    error: str = ""

    def __str__(self) -> str:
        arguments = f"`{self.arguments}`" if self.arguments else "-"
        identical = {True: "yes", False: "**no**", None: ""}[self.identical]
        nll = f"**fails**: {self.error}" if self.error else "{:.3f} → {:.3f}".format(*self.nll or (0, 0))
        seconds = "{:.1f} → {:.1f}".format(*self.seconds) if self.seconds else ""
        return line(self.project, self.what, arguments, identical, nll, seconds)


HEADER = ("project", "network", "arguments", "weights identical", "NLL before → after", "seconds without → with")


def line(*cells: str) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


# For the scripts, in the environment of the project.


def compare(project: str, what: str, train: Train, **arguments: Any) -> None:
    """Train without and with the callback, from one seed, and write down the row.

    Args:
        project: its name on PyPI.
        what: which of its networks.
        train: trains with the callbacks that it is given. What it returns, such as the test metrics, has to be the
            same without and with ELLA, as have all parameters and buffers.
        arguments: of ELLACallback: what a user of this project has to pass.
    """
    row = Row(f"{project} {metadata.version(project)}", what, _literally(what))
    log = Log()
    try:
        before, after = Training(train, []), Training(train, [ELLACallback(**arguments)])
        row.seconds = before.seconds, after.seconds
        row.identical = same(before.result, after.result)
        if not row.identical and not same(before.result, Training(train, []).result):
            raise RuntimeError("two trainings without ELLA differ, too")
        row.nll = after.nll()
    except Exception as error:
        logging.exception("%s, %s", project, what)
        row.error = log.failure() or first_line(f"{type(error).__name__}: {error}")
    finally:
        log.close()
    with (Path(sys.prefix) / "rows").open("a") as rows:
        print(json.dumps(asdict(row)), file=rows)


def fit(
    module: LightningModule,
    data: LightningDataModule | Sequence[DataLoader],
    callbacks: list,
    trainer: type = Trainer,
    **options: Any,
) -> Mapping[str, float]:
    """Train, and give the test metrics, if the module has a test step.

    Args:
        module: a module of the project.
        data: a datamodule, or the loaders for training, for validation, and for a test.
        callbacks: those that `compare` hands over.
        trainer: the project's, if it has one.
        options: of the trainer.
    """
    made = trainer(callbacks=callbacks, accelerator="cpu", enable_progress_bar=False, **options)
    if isinstance(data, Sequence):
        made.fit(module, *data[:2])
    else:
        made.fit(module, datamodule=data)
    if not any("test_step" in vars(base) for base in type(module).mro() if base.__name__ != "LightningModule"):
        return {}
    return made.test(module, data[-1], verbose=False)[0] if isinstance(data, Sequence) else made.test(module, data)[0]


class Steps(LightningModule):
    """A module of which a script says the network, and the loss of a batch."""

    def loss(self, batch: Any, split: str) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch, "val"), batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch, "test"), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def pictures(count: int, channels: int = 3, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noise (count, channels, size, size) with faint stripes, whose direction is the class (count,), one of four."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    directions = torch.tensor([[1, 0], [0, 1], [1, 1], [1, -1]])[labels]
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    along = directions[:, 0, None, None] * row + directions[:, 1, None, None] * column
    return noise + 0.3 * torch.cos(along * torch.pi / 2)[:, None], labels


def squares(count: int, channels: int = 3, size: int = 32) -> tuple[Tensor, Tensor]:
    """Noise (count, channels, size, size) with a square that is brighter, and where it is, (count, 1, size, size)."""
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(count, channels, size, size, generator=generator)
    corner = torch.randint(size // 2, (count, 2, 1), generator=generator)
    within = (torch.arange(size) >= corner) & (torch.arange(size) < corner + size // 2)
    masks = within[:, 0, None, :, None] & within[:, 1, None, None, :]
    return noise + masks, masks


class Training:
    """A training, with what came of it: `result`, what is to be the same without and with ELLA, and `seconds`."""

    def __init__(self, train: Train, callbacks: list):
        self._witness = Witness()
        self._callbacks = [*callbacks, self._witness]
        seed_everything(0, verbose=False)
        started = time.perf_counter()
        returned = train(self._callbacks)
        self.seconds = time.perf_counter() - started
        module = self._witness.module
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self.result = copy.deepcopy((dict(tensors), list(module.state_dict()), dict(returned or {})))

    def nll(self) -> tuple[float, float]:
        """On the unseen points, of the network and of ELLA, whose predictor is asked for a batch of them, too."""
        ella = next(callback for callback in self._callbacks if isinstance(callback, ELLACallback))
        if not isinstance(ella.predictor, ELLAPredictor):
            raise RuntimeError(f"ella.predictor is {ella.predictor}")
        unseen: Any = ella.calibration_loader or self._witness.unseen
        inputs, *_ = ella.unpack(next(iter(unseen)))
        with torch.inference_mode():
            ella.predictor(inputs)
        return float(self._witness.figures["map/nll"]), float(self._witness.figures["ella/nll"])


class Witness(Callback):
    """Sees the module, the figures and the data at the end, even where the project copies its callbacks."""

    def __deepcopy__(self, memo: dict) -> "Witness":
        return self

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.module, self.figures = pl_module, dict(trainer.callback_metrics)
        unseen = trainer.val_dataloaders
        self.unseen = unseen[0] if isinstance(unseen, list) else unseen


class Log(logging.Handler):
    """What ELLA says."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("lightning_ella").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()

    def failure(self) -> str:
        """The last error's own line, if an error was only logged."""
        return first_line("".join([text for text in self.lines if re.match(r"[\w.]*(Error|Exception)\b", text)][-1:]))

    def close(self) -> None:
        logging.getLogger("lightning_ella").removeHandler(self)
        super().close()


def same(one: Any, other: Any) -> bool:
    """Whether all tensors are equal bit by bit, and all numbers."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    return one == other or (one != one and other != other)  # two NaN are the same


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def _literally(what: str) -> str:
    """The arguments of ELLACallback in the script's call of `compare` for this network, as they stand there."""
    tree = ast.parse(Path(sys.argv[0]).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "compare"]
    mine = next(call for call in calls if ast.literal_eval(call.args[1]) == what)
    return ", ".join(ast.unparse(keyword) for keyword in mine.keywords).replace("'", '"')


# For `make clients`, in .venv.


def environment(name: str, packages: list[str]) -> Path:
    """The folder of a project's environment, made where it is missing or was made for other packages."""
    folder = ENVIRONMENTS / name
    done, pinned = folder / "needs", folder / "pinned"
    versions = "".join(f"{shared}=={metadata.version(shared)}\n" for shared in SHARED)
    if done.exists() and done.read_text() == "\n".join([*packages, versions]):
        return folder
    venv.create(folder, clear=True, symlinks=True)
    paths = {"base": folder, "platbase": folder}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "base.pth").write_text(f"import site; site.addsitedir({str(BASE)!r})\n")
    pinned.write_text(versions)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", pinned, *packages]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    done.write_text("\n".join([*packages, versions]))
    return folder


def needs(script: Path) -> list[str]:
    """What the script says that it needs from PyPI, in the form of https://peps.python.org/pep-0723/."""
    block = re.search(r"^# /// script$\n(.*?)^# ///$", script.read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None, script
    return tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))["dependencies"]


def rows(name: str) -> list[Row]:
    """The rows of a project; what goes wrong is a row, too."""
    script = SCRIPTS / f"{name}.py"
    try:
        folder = environment(name, needs(script))
    except subprocess.CalledProcessError as error:
        return [Row(name, error=f"cannot be installed: {first_line(error.stderr.partition('ERROR: ')[2])}")]
    found, log = folder / "rows", folder / "log"
    found.write_text("")
    # -P: a script has the name of its project, which it would import itself in place of.
    command = [folder / "bin" / "python", "-P", script]
    path = os.pathsep.join(filter(None, [str(SCRIPTS.parent), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as said:
        try:
            run = subprocess.run(command, cwd=scratch, env=variables, stdout=said, stderr=said, timeout=LIMIT)
            reason = "" if run.returncode == 0 else f"status {run.returncode}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            reason = f"still running after {LIMIT} s"
    done = [Row(**json.loads(text)) for text in found.read_text().splitlines()]
    return [*done, Row(name, error=reason)] if reason else done


def last_line(log: Path) -> str:
    return first_line(log.read_text(errors="replace").strip().rpartition("\n")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(script.stem for script in SCRIPTS.glob("*.py"))
    parser.add_argument("names", nargs="*", metavar="project", help=f"of {', '.join(known)}; all by default")
    names = parser.parse_args().names or known
    for name in names:
        if name not in known:
            parser.error(f"no project {name!r}: there are {', '.join(known)}")
    print(line(*HEADER), line(*["---"] * len(HEADER)), sep="\n", flush=True)
    good = True
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in chain.from_iterable(pool.map(rows, names)):
            print(row, flush=True)
            good = good and row.identical is True and not row.error
    sys.exit(not good)


if __name__ == "__main__":
    main()
