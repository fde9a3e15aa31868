# /// script
# dependencies = ["jsonargparse[signatures]"]
# ///
"""LightningCLI: the callback is a line of the YAML file."""

from pathlib import Path

from clients import Steps, compare, pictures
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

CONFIG = """\
trainer:
  max_epochs: 5
  accelerator: cpu
  enable_progress_bar: false
"""
ELLA = """\
  callbacks:
    - class_path: lightning_ella.ELLACallback
"""


class Classifier(Steps):
    """A network of two layers."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(768, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x):
        return self.network(x)

    def loss(self, batch, split):
        return cross_entropy(self(batch[0]), batch[1])


class Pictures(LightningDataModule):
    """Pictures for training, validation and test."""

    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(*pictures(200)), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*pictures(201)), self.batch_size)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*pictures(202)), self.batch_size)


def train(callbacks):
    *ella, witness = callbacks
    Path("config.yaml").write_text(CONFIG + (ELLA if ella else ""))
    cli = LightningCLI(
        Classifier,
        Pictures,
        args=["fit", "--config=config.yaml"],
        seed_everything_default=0,
        trainer_defaults={"callbacks": [witness]},
        save_config_kwargs={"overwrite": True},
    )
    callbacks[:] = cli.trainer.callbacks  # ELLA's is the one that the file made
    return cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]


compare("lightning", "LightningCLI, a line of YAML", train)
