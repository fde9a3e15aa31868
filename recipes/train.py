"""Train a network, or take a trained one, and end with a Bayesian predictor.

python recipes/train.py                                  # digits and a small ResNet
python recipes/train.py experiment=cifar10_resnet20 data.root=<folder> model.checkpoint=<file> trainer.max_epochs=0
"""

from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from report import write_report


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    """Build what the configuration names, fit, and report."""
    seed_everything(config.seed, workers=True, verbose=False)
    folder = Path(HydraConfig.get().runtime.output_dir)
    resolved = cast(dict, OmegaConf.to_container(config, resolve=True))
    data, module, ella = instantiate(config.data), instantiate(config.model), instantiate(config.ella)
    logger = instantiate(config.logger) if config.logger else False
    if isinstance(logger, WandbLogger):
        logger.log_hyperparams(resolved)
    best = ModelCheckpoint(monitor="val/loss", save_last=True)
    trainer = instantiate(config.trainer, callbacks=[best, ella], logger=logger)
    trainer.fit(module, data, ckpt_path=config.ckpt_path)
    if trainer.is_global_zero:
        if ella.predictor is None:
            raise SystemExit("ELLA could not be fitted: the reason is above. The checkpoints are kept.")
        write_report(ella.predictor, data, trainer, resolved, folder)


if __name__ == "__main__":
    main()
