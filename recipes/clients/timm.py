# /// script
# dependencies = ["timm"]
# ///
"""timm's networks with its Mixup: on the device, as a hook of the module; and in the loader, as a collate function."""

from functools import partial

import timm
from clients import Steps, compare, fit, pictures
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, default_collate

mixup = Mixup(mixup_alpha=0.4, label_smoothing=0.1, num_classes=4)


class Classifier(Steps):
    """Trains on soft targets; mixes by itself if it is asked to."""

    def __init__(self, mixes):
        super().__init__()
        self.network, self.mixes = timm.create_model("test_resnet", num_classes=4), mixes

    def on_after_batch_transfer(self, batch, _):
        return mixup(*batch) if self.mixes and self.trainer.training else batch

    def forward(self, x):
        return self.network(x)

    def loss(self, batch, split):
        x, y = batch
        return SoftTargetCrossEntropy()(self(x), y) if y.is_floating_point() else cross_entropy(self(x), y)


def mix(samples):
    return mixup(*default_collate(samples))


def train(callbacks, collated=False):
    training, *others = (TensorDataset(*pictures(count, size=32)) for count in (128, 130, 132))
    collate = mix if collated else default_collate
    loaders = [DataLoader(training, batch_size=32, shuffle=True, collate_fn=collate)]
    loaders += [DataLoader(other, batch_size=32) for other in others]
    return fit(Classifier(mixes=not collated), loaders, callbacks, max_epochs=8)


unmixed = DataLoader(TensorDataset(*pictures(128, size=32)), batch_size=32)
compare("timm", "ResNet, Mixup as a hook", train)
compare("timm", "ResNet, Mixup in collate_fn", partial(train, collated=True), train_loader=unmixed)
