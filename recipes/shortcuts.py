"""What a fit takes, in epochs of the training, and what each of its shortcuts loses.

python recipes/shortcuts.py                              # digits and a small ResNet, trained first
python recipes/shortcuts.py experiment=cifar10_resnet20 trainer.max_epochs=0 data.root=<folder> model.checkpoint=<file>

The first fit takes none: many landmarks, the exact curvature of many points, all unseen points, many draws. The second
has the defaults, and each row after it goes without one of their shortcuts, or takes one more. An epoch is counted
from `num_timed` images of the training data, as they are loaded and learnt from.
"""

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import torch
from adapt import posterior_options
from compare import Sets, evaluation_sets, network
from data import Images, some
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from price import BATCH, Rung, network_alone, show, with_familiarity, worth
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_ella import fit_ella


def epoch(module: LightningModule, data: Images, num_timed: int) -> float:
    """Seconds of an epoch of training, of which so many images are timed."""
    loader, device = data.train_dataloader(), next(module.parameters()).device
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def learn(batch: list[torch.Tensor]) -> int:
        images, targets = (part.to(device) for part in batch)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images), targets).backward()
        optimizer.step()
        return len(images)

    module.train()
    learn(next(iter(loader)))  # to warm up
    started = time.perf_counter()
    seen = sum(map(learn, islice(loader, max(1, num_timed // data.batch_size))))
    seconds = (time.perf_counter() - started) / seen * len(loader.dataset)  # type: ignore[arg-type]
    module.load_state_dict(before)
    module.eval()
    return seconds


def fits(config: DictConfig, data: Images) -> dict[str, tuple[dict[str, Any], bool]]:
    """By row the settings, and whether the unseen points are some of them drawn at random."""
    options = posterior_options(config) | {"num_calibration": config.ella.num_calibration}
    undone: dict[str, dict[str, Any]] = {
        "more landmarks": {"num_landmarks": min(config.num_landmarks, len(data.clean))},  # type: ignore[arg-type]
        "the exact curvature of more points": {"curvature": "exact", "num_curvature": config.num_curvature},
        "all unseen points": {"num_calibration": None},
        "more draws": {"num_samples": config.num_samples},
    }
    everything: dict[str, Any] = {}
    for part in undone.values():
        everything |= part
    return {
        "no shortcut": (options | everything, False),
        "the defaults": (options, False),
        **{f"… but {name}": (options | part, False) for name, part in undone.items()},
        "… but as many unseen points at random": (options | {"num_calibration": None}, True),
        "… and features in bf16": (options | {"precision": "bf16"}, False),
    }


@hydra.main(version_base="1.3", config_path="../conf", config_name="shortcuts")
def main(config: DictConfig) -> None:
    """Fit, compare, print, and write shortcuts.json and shortcuts.md."""
    data: Images = instantiate(config.data)
    module = network(config, data, config.seed).to(config.device)
    module.trainer = None
    data.setup("fit")
    seconds = epoch(module, data, config.num_timed)
    unseen = some(data.holdout, config.num_calibration, config.seed)
    data.setup("test")
    sets: Sets = {name: (x.to(config.device), y) for name, (x, y) in evaluation_sets(data, config).items()}
    plan = fits(config, data)
    rows = {}
    with torch.no_grad(), tqdm(total=(len(plan) + 1) * len(sets), unit="set") as bar:
        for name, (options, fewer) in plan.items():
            bar.set_description(name)
            points = some(unseen, config.ella.num_calibration, config.seed + 1) if fewer else unseen
            started = time.perf_counter()
            predictor = fit_ella(module, data.ella_train_dataloader(), DataLoader(points, BATCH), **options)
            took = time.perf_counter() - started
            rows[name] = {"s": took, "epochs": took / seconds} | worth(
                Rung(with_familiarity(predictor), took), sets, bar
            )
        rows["network"] = worth(Rung(network_alone(module), 0.0), sets, bar)
    folder, count = Path(HydraConfig.get().runtime.output_dir), len(data.train)  # type: ignore[arg-type]
    title = f"What a fit takes and loses; an epoch of {count:,} images takes {seconds:.0f} s"
    show(rows, title, folder / "shortcuts.md")
    (folder / "shortcuts.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
