"""A language model of 30,000 words that knows how sure it is.

    python recipes/language.py [vocabulary=…] [max_epochs=…]

A small transformer with tied embeddings learns the sources of Python's own standard library, which are everywhere where
this runs. The curvature comes from sampled words, with one backward pass a sequence, and predictions are over the
likeliest words and all others as one: nothing is squared in the vocabulary, and features of all words are held for one
sequence at a time. Files are split: those of the test were never seen, nor were those of the calibration.
"""

import json
import re
import sysconfig
from collections import Counter
from pathlib import Path

import hydra
import torch
from benchmark import memory
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryCalibrationError
from tqdm import tqdm

from lightning_ella import ELLACallback

BATCH = 16


class Block(nn.Module):
    """Causal attention and a perceptron, each after a LayerNorm."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(LightningModule):
    """Words (B, L) to logits (B, L, C) of the next word."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.words.weight, std=width**-0.5)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)), nn.LayerNorm(width))

    def forward(self, words: Tensor) -> Tensor:
        """Output weights are those of the embedding."""
        x = self.words(words) + self.places.weight[: words.shape[1]]
        return self.blocks(x) @ self.words.weight.T

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the next words."""
        words, following = batch
        return cross_entropy(self(words).flatten(0, 1), following.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01)


class Sources(LightningDataModule):
    """Sequences of words and the words that follow, from the standard library's sources."""

    def __init__(self, config: DictConfig):
        super().__init__()
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        files += sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-r]*/*.py"))
        texts = [re.findall(r"\w+|[^\w\s]", file.read_text(errors="ignore")) for file in files]
        parts = [texts[0::5] + texts[1::5] + texts[2::5], texts[3::5], texts[4::5]]
        known = Counter(word for text in parts[0] for word in text).most_common(config.vocabulary - 1)
        self.numbers = {word: i + 1 for i, (word, _) in enumerate(known)}  # 0 is any other word
        wanted = config.num_sequences, config.num_calibration, config.num_test
        self.parts = [self._sequences(part, config.length, count) for part, count in zip(parts, wanted, strict=True)]

    def _sequences(self, texts: list[list[str]], length: int, count: int) -> TensorDataset:
        stream = torch.tensor([self.numbers.get(word, 0) for text in texts for word in text])
        sequences = stream[: (len(stream) - 1) // length * length + 1].unfold(0, length + 1, length)
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))[:count]
        chosen = sequences[order]
        return TensorDataset(chosen[:, :-1], chosen[:, 1:])

    def train_dataloader(self) -> DataLoader:
        """To train on."""
        return DataLoader(self.parts[0], BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """From other files."""
        return DataLoader(self.parts[1], BATCH)

    def test_dataloader(self) -> DataLoader:
        """From yet other files."""
        return DataLoader(self.parts[2], BATCH)


def best_temperature(module: LanguageModel, loader: DataLoader) -> float:
    """The one with the lowest NLL on unseen sequences, by golden section on a grid fine enough for three digits."""
    candidates = torch.linspace(0.7, 2.5, 91)
    total = torch.zeros(len(candidates))
    with torch.no_grad():
        for words, following in tqdm(loader, desc="temperature"):
            logits = module(words).flatten(0, 1)
            total += torch.stack([cross_entropy(logits / t, following.flatten(), reduction="sum") for t in candidates])
    return float(candidates[total.argmin()])


def figures(log_probs: Tensor, confidence: Tensor, correct: Tensor) -> dict[str, float]:
    """NLL a word, perplexity, and how far the confidence in the likeliest word is from its accuracy."""
    calibration = BinaryCalibrationError(n_bins=15)(confidence.flatten(), correct.flatten().long())
    nll = float(-log_probs.mean())
    return {"NLL": nll, "perplexity": float(torch.tensor(nll).exp()), "ECE": float(calibration)}


@hydra.main(version_base="1.3", config_path="../conf", config_name="language")
def main(config: DictConfig) -> None:
    """Train, fit, and compare on sequences of files that nobody has seen."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    seed_everything(config.seed)
    data = Sources(config)
    module = LanguageModel(config.vocabulary, config.length, config.width, config.depth)
    Trainer(max_epochs=config.max_epochs, logger=False, default_root_dir=folder, enable_checkpointing=False).fit(
        module, data
    )
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    ella = ELLACallback(**config.ella, path=folder / "ella.safetensors")
    Trainer(max_epochs=0, logger=False, callbacks=[ella], default_root_dir=folder, enable_checkpointing=False).fit(
        module, data
    )
    used = memory("VmHWM") - before
    assert ella.predictor is not None
    module.eval()
    temperature = best_temperature(module, data.val_dataloader())
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for words, following in tqdm(data.test_dataloader(), desc="test"):
        with torch.no_grad():
            logits = module(words)
        for name, t in (("MAP", 1.0), ("temperature scaling", temperature)):
            logs = (logits / t).log_softmax(-1)
            top = logs.max(-1)
            chosen = logs.gather(-1, following.unsqueeze(-1)).squeeze(-1)
            seen.setdefault(name, []).append((chosen, top.values.exp(), top.indices == following))
        out = ella.predictor(words)
        top = out.probs[..., :-1].max(-1)  # the last one is all other words
        likeliest = out.indices.gather(-1, top.indices.unsqueeze(-1)).squeeze(-1)
        row = ella.predictor.log_prob(words, following), top.values, likeliest == following
        seen.setdefault("lightning-ella", []).append(row)
    rows = {name: figures(*(torch.cat(part) for part in zip(*parts, strict=True))) for name, parts in seen.items()}
    table = Table("", "NLL", "perplexity", "ECE", title=f"{config.num_test * config.length:,} words")
    for name, row in rows.items():
        table.add_row(name, f"{row['NLL']:.4f}", f"{row['perplexity']:.1f}", f"{row['ECE']:.4f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"The fit took {used / 2**30:.2f} GiB beyond the network; the temperature is {temperature:.2f}.")
    features = config.num_calibration * config.length * config.vocabulary * config.ella.rank * 4
    console.print(f"Features of all words at the calibration points would take {features / 2**30:.0f} GiB.")
    (folder / "language.json").write_text(json.dumps({**rows, "bytes": used, "temperature": temperature}, indent=2))


if __name__ == "__main__":
    main()
