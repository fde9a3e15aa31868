"""The page on LightningCLI, as a reader would follow it in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("jsonargparse")
PAGE = (ROOT / "docs" / "how-to" / "trainers.md").read_text()


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_page_on_lightning_cli_runs_as_it_is_written(tmp_path: Path, package: str):
    (program, own_base), (config,) = (
        re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("python", "yaml")
    )
    if package == "pytorch_lightning":
        program, marker, start = program.replace("lightning.pytorch", package).partition('if __name__ == "__main__":')
        program = f"{program}{own_base}\n\n{marker}{start}"
        config = config.replace("lightning_ella.ELLACallback", "main.ELLA")
    (tmp_path / "main.py").write_text(program)
    (tmp_path / "config.yaml").write_text(config)
    (command,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    interpreter, *arguments = command.split()
    assert interpreter == "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ELLA: the posterior is in" in done.stdout + done.stderr
    assert len(list(tmp_path.rglob("ella.safetensors"))) == 1
