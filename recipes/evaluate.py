"""Evaluate a run again, from its folder or from W&B: the same figures, or those on other data.

python recipes/evaluate.py run=outputs/digits_resnet/2026-01-31_12-00-00
python recipes/evaluate.py run=<entity>/lightning-ella/posterior-1a2b3c4d:latest [data.root=…] [data.shifted=…]
"""

from pathlib import Path
from typing import cast

import hydra
import torch
import wandb
from build import build
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from report import RUN, STUDENT, words, write_report
from safetensors.torch import load_model

from lightning_ella import ELLAPredictor, FastPredictor


def folder_of(run: str) -> Path:
    """The folder of a run: given, or downloaded from W&B.

    Raises:
        SystemExit: if there is no such folder, or it is not that of a finished run.
    """
    folder = Path(run)
    if not folder.exists() and ":" in run:
        folder = Path(wandb.Api().artifact(run, type="posterior").download())
    missing = [name for name in RUN if not (folder / name).exists()]
    if missing:
        raise SystemExit(
            f"{folder} has no {' and no '.join(missing)}: pass run=<folder that train.py printed>, or "
            "run=<entity>/<project>/posterior-<id>:latest of W&B."
        )
    return folder


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Load network and posterior, and report."""
    run = folder_of(config.run)
    stored = OmegaConf.load(run / "config.yaml")
    given = {name: value for name, value in config.data.items() if value is not None}
    if unknown := [name for name in given if name not in stored.data]:
        raise SystemExit(f"the data of this run have no {' and no '.join(unknown)}: leave out data.{unknown[0]}=.")
    stored = cast(DictConfig, OmegaConf.merge(stored, {"data": given}))
    for name in {"checkpoint", "pretrained"} & set(stored.model):
        stored.model[name] = None  # the weights are those of the run
    module, data = build(stored)
    load_model(module.network, str(run / "weights.safetensors"))
    module.eval().to(torch.device(config.device))
    data.setup("test")
    if data.classes != list(stored.classes):
        raise SystemExit(f"the run knows the classes {list(stored.classes)}, but the data have {data.classes}.")
    if limit := config.max_images or stored.max_images:
        data.limit(limit)
    predictor = ELLAPredictor.load(run / "ella.safetensors", module)
    if (run / STUDENT).exists():
        predictor.adopt(FastPredictor.load(run / STUDENT, module))
    folder = Path(HydraConfig.get().runtime.output_dir)
    loggers = [instantiate(config.logger)] if config.logger else []
    resolved = cast(dict, OmegaConf.to_container(stored, resolve=True))
    for logger in loggers:
        logger.log_hyperparams(resolved)
    print(words(write_report(predictor, data, resolved, folder, loggers), folder))
    wandb.finish()


if __name__ == "__main__":
    main()
