"""Train a network, or take a trained one, and end with a Bayesian predictor.

python recipes/train.py                                  # digits and a small ResNet
python recipes/train.py experiment=cifar10_resnet20 data.root=<folder> model.checkpoint=<file> trainer.max_epochs=0
python recipes/train.py --multirun sweep=optuna          # the numbers that matter most
"""

from pathlib import Path
from typing import cast

import hydra
import wandb
from build import build
from data import some
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from report import advice, save_run, words, write_report

FEW = 2  # images of each set under fast_dev_run


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(config: DictConfig) -> float | None:
    """Run, and leave no open W&B run for the next job of a sweep."""
    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices
    if (hydra_config.mode, chosen["trainer"], chosen["hydra/launcher"]) == (RunMode.MULTIRUN, "ddp", "basic"):
        raise SystemExit(
            "trainer=ddp starts this command again for each device, and with it the whole sweep: leave it out, or "
            "start the sweep with torchrun and launcher=torchrun, or with launcher=slurm."
        )
    try:
        return run(config)
    finally:
        wandb.finish()


def run(config: DictConfig) -> float | None:
    """Build what the configuration names, fit, and report; return the metric that a sweep goes by."""
    seed_everything(config.seed, workers=True, verbose=False)
    folder = Path(HydraConfig.get().runtime.output_dir)
    module, data = build(config)
    if config.ella.views is None and not (config.ella.get("top_outputs") or config.ella.get("learn")):
        config.ella.views = data.views
    resolved = cast(dict, OmegaConf.to_container(config, resolve=True))
    ella, logger = instantiate(config.ella), instantiate(config.logger) if config.logger else False
    best = ModelCheckpoint(monitor="val/loss", save_last=True)
    trainer = instantiate(config.trainer, callbacks=[best, ella], logger=logger)
    for each in trainer.loggers:
        each.log_hyperparams(resolved)
    trainer.fit(module, data, ckpt_path=config.ckpt_path)
    if trainer.is_global_zero:
        try:
            predictor = ella.predictor
        except RuntimeError as error:
            raise SystemExit(f"{error} The checkpoints are kept.") from error
        quick = config.trainer.fast_dev_run
        if quick:
            data.holdout = some(data.holdout, FEW, config.seed)
        else:
            save_run(predictor, resolved | {"classes": data.classes}, folder, trainer.loggers)
        if limit := FEW if quick else config.max_images:
            data.limit(limit)
        fit = {name: float(value) for name, value in trainer.callback_metrics.items()}
        report = write_report(predictor, data, resolved, folder, trainer.loggers, fit)
        print(words(report, folder), *([] if quick else [advice(data, folder)]), sep="\n")
    return float(trainer.callback_metrics[config.objective])


if __name__ == "__main__":
    main()
