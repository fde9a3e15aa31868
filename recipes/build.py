"""Network and data from a configuration, matched: classes and channels of the data, image size of the network."""

from data import Images
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from models import Classifier
from omegaconf import DictConfig


def build(config: DictConfig) -> tuple[Classifier, Images]:
    """The module, and the datamodule before its `setup`."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    of_digits = str(chosen.get("experiment")).startswith("digit")
    if of_digits and not str(chosen["data"]).startswith("digit"):
        raise ValueError(
            f"experiment={chosen['experiment']} is made for digits: pass experiment=own with data of your own."
        )
    data: Images = instantiate(config.data)
    return build_network(config, data), data


def build_network(config: DictConfig, data: Images) -> Classifier:
    """A network for the data, which from now on prepare their images for it."""
    from_data = {"num_classes": len(data.classes), "in_channels": data.channels}
    chosen = {name: config.model.get(name) or value for name, value in from_data.items()}
    module: Classifier = instantiate(config.model, **chosen)
    wanted = module.preprocessing.size if module.preprocessing else data.fixed_size
    if chosen["num_classes"] < len(data.classes):
        raise ValueError(f"model.num_classes={chosen['num_classes']}, but the data have {len(data.classes)} classes.")
    if data.fixed_size and (wanted, module.in_channels) != (data.fixed_size, data.channels):
        raise ValueError(
            f"the network takes {module.in_channels} x {wanted} x {wanted} numbers, but these data are "
            f"{data.channels} x {data.fixed_size} x {data.fixed_size}: choose data= of your own, or model=cifar_resnet."
        )
    data.preprocessing, data.channels = module.preprocessing, module.in_channels
    return module
