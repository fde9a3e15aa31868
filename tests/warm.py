"""Python with the recipes' libraries imported, which takes seconds: each script that it is sent runs in a fork of it.

A line of JSON on stdin is a job: `arguments`, of which the first is the script, `folder`, `environment` and `output`, a
file. The script's exit code is written to stdout. Nothing of the package or of the recipes is imported here.
"""

import json
import os
import runpy
import sys
import weakref
from tempfile import TemporaryDirectory

import hydra
import lightning.pytorch
import matplotlib.figure
import sklearn.datasets
import timm
import torchvision
import wandb

IMPORTED = hydra, lightning, matplotlib, sklearn, timm, torchvision, wandb
FINALIZED = [each.peek()[0] for each in weakref.finalize._registry]  # what the libraries clean up at exit


def become(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Run a script in this process, as `python <arguments>` would."""
    for each in FINALIZED:
        if isinstance(each, TemporaryDirectory):
            each._finalizer.detach()
            each.__init__()  # a folder of this process: at its end it removes that one, and not everybody's
    with open(output, "w") as file, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    while line := sys.stdin.readline():
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            become(**json.loads(line))
            break
