# /// script
# dependencies = ["transformers"]
# ///
"""A BERT of transformers as in Lightning's tutorial on GLUE: dicts of tokens, `forward(**inputs)`."""

import torch
from clients import Steps, compare, fit
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification


class Classifier(Steps):
    """As in the tutorial."""

    def __init__(self):
        super().__init__()
        sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64, num_labels=3))

    def forward(self, **inputs):
        return self.model(**inputs)

    def loss(self, batch, split):
        return self(**batch)[0]


def loader(count, shuffle=False):
    """Sentences of 12 words; the words below 10 tell the class."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(3, (count,), generator=generator)
    words = torch.randint(10, 100, (count, 12), generator=generator)
    words[:, 3] = 1 + labels * 3
    wrong = torch.rand(count, generator=generator) < 0.2
    words[wrong, 3] = 1
    lengths = torch.randint(6, 13, (count, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    names = ("input_ids", "attention_mask", "labels")
    samples = [dict(zip(names, sample, strict=True)) for sample in zip(words * mask, mask, labels, strict=True)]
    return DataLoader(samples, batch_size=32, shuffle=shuffle)


def train(callbacks):
    return fit(Classifier(), [loader(200, shuffle=True), loader(201), loader(202)], callbacks, max_epochs=5)


compare("transformers", "BERT, forward(**inputs)", train)
