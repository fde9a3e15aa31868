# /// script
# dependencies = ["torch-uncertainty"]
# ///
"""torch-uncertainty's routine, data module and trainer, with and without its mixup."""

from functools import partial

from clients import compare, fit, pictures
from torch import nn, optim
from torch.utils.data import TensorDataset
from torch_uncertainty import TUTrainer
from torch_uncertainty.datamodules import TUDataModule
from torch_uncertainty.models.classification import resnet
from torch_uncertainty.routines import ClassificationRoutine


class Pictures(TUDataModule):
    """Three sets of pictures."""

    training_task = "classification"

    def __init__(self):
        super().__init__(".", 32, None, None, num_workers=0, pin_memory=False, persistent_workers=False)

    def setup(self, stage=None):
        self.train, self.val, self.test = (TensorDataset(*pictures(count)) for count in (200, 201, 202))


def train(callbacks, mixup=None):
    model = resnet(in_channels=3, num_classes=4, arch=18, style="cifar", width_multiplier=0.25)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    routine = ClassificationRoutine(model, 4, nn.CrossEntropyLoss(), optim_recipe=optimizer, mixup_params=mixup)
    return fit(routine, Pictures(), callbacks, trainer=TUTrainer, max_epochs=3)


mixed = {"mixtype": "mixup", "mixup_alpha": 0.5}
compare("torch-uncertainty", "ClassificationRoutine, ResNet-18", train)
compare("torch-uncertainty", "ClassificationRoutine with mixup", partial(train, mixup=mixed))
