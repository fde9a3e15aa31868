"""Commands as a reader gives them in a shell: word for word, in a folder that holds a clone and nothing else."""

import atexit
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


@functools.cache
def _warm() -> subprocess.Popen:
    """A process that runs recipes without importing torch again for each: see warm.py."""
    command = [sys.executable, str(Path(__file__).with_name("warm.py"))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment())
    atexit.register(server.communicate)
    return server


def _environment(*programs: Path) -> dict[str, str]:
    """One thread, as tests share the machine; a table's width; no network for W&B and Hugging Face; our programs."""
    ours = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    path = *map(str, programs), str(Path(sys.executable).parent), os.environ["PATH"]
    return {**os.environ, **ours, "PATH": os.pathsep.join(path)}


def clone(folder: Path) -> Path:
    """Make `folder` what a reader has after `git clone` and `make`, with links in place of what only is read."""
    folder.mkdir(exist_ok=True)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(line: str, folder: Path, *programs: Path) -> str:
    """Run a command in a clone, where the folders `programs` are searched first; return what it printed.

    Raises:
        AssertionError: if it fails, with what it printed.
    """
    words, environment = shlex.split(line), _environment(*programs)
    while re.match(r"\w+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if Path(words[0]).name == "python":
        output = folder / "printed.txt"
        job = {"arguments": words[1:], "folder": str(folder), "environment": environment, "output": str(output)}
        server = _warm()
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(job), file=server.stdin, flush=True)
        code, printed = int(server.stdout.readline()), output.read_text()
    else:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        code, printed = done.returncode, done.stdout + done.stderr
    assert code == 0, f"{line} ends with {code}:\n{printed}"
    return printed
