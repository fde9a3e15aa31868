"""The student: a small network that learns from the exact engine what the posterior says of an input.

It sees what the user's network computes anyway, pooled activations and outputs. It gives the features along the K
directions as a unit vector and a length, the length of those outside the span, and the novelty. So the posterior may
move afterwards: features do not. ScaLLA (arXiv:2601.21835, 2026) learns features of the kernel, too.
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from .numerics import centred
from .posterior import Posterior
from .predictions import Spread
from .progress import Progress, silent
from .residual import novelty

WIDTH = 256  # of the hidden layers
DROPOUT = 0.2
FARTHEST = 4.0  # standard deviations from the mean that an input of the student counts as
EPOCHS, BATCH, RATE, DECAY = 40, 64, 2e-3, 1e-2  # of the teaching: AdamW in one cycle (Smith and Topin 2019)
ROUNDING = 1e-5  # of a number, that it varies by without a reason
TINY = 1e-30  # a variance that counts as none
SURE = 1e-6  # the novelty's distance from 0 and 1


class Lesson(NamedTuple):
    """What a student is shown of n inputs, and what it should say of them."""

    pooled: Tensor  # (n, A)
    outputs: Tensor  # (n, C)
    along: Tensor  # (n, C, K), of length 1
    inside: Tensor  # (n, C), log-variance in the span
    outside: Tensor  # (n, C), log-variance outside the span, but for its scale; (n, 0) without probes
    novelty: Tensor  # (n, 1), logit; (n, 0) without probes

    def rows(self, which: Tensor | slice) -> "Lesson":
        """Some of them."""
        return Lesson(*(part[which] for part in self))


class Said(NamedTuple):
    """What a student says of B inputs: as in a `Lesson`."""

    along: Tensor  # (B, C, K), of a length of at most 1: the rest is not known
    inside: Tensor
    outside: Tensor
    novelty: Tensor


def lesson(
    pooled: Tensor, outputs: Tensor, features: Tensor, root: Tensor, *, invariant: bool, predictive: str = "mc"
) -> Lesson:
    """What to learn from B inputs.

    Args:
        pooled: (B, A).
        outputs: (B, C).
        features: [Ψ, Ψ⊥], (B, C, K + m).
        root: R (K, K), with R Rᵀ the posterior covariance.
        invariant: whether a constant added to all outputs changes nothing.
        predictive: "probit" takes the variances of the outputs as they are, others those around their mean.
    """
    rank, features = len(root), features.double()
    foreign = novelty(features, rank, centred=invariant).clamp(SURE, 1 - SURE).logit().unsqueeze(1)
    if invariant and predictive != "probit":
        features = centred(features)
    inside, outside = features[..., :rank] @ root.to(features), features[..., rank:]
    variance = inside.square().sum(-1).clamp_min(TINY)
    if not outside.shape[-1]:
        outside, foreign = outside[..., :0].flatten(1), foreign[:, :0]
    else:
        outside = outside.square().sum(-1).clamp_min(TINY).log()
    parts = pooled, outputs, inside / variance.sqrt().unsqueeze(-1), variance.log(), outside, foreign
    return Lesson(*(part.to("cpu", torch.float32) for part in parts))


class Student(nn.Module):
    """Two hidden layers on standardised activations and outputs.

    Args:
        width: A, of the pooled activations.
        num_outputs: C.
        rank: K.
        has_outside: whether there are probes.
        invariant: whether a constant added to all outputs changes nothing.
    """

    seen_mean: Tensor
    seen_deviation: Tensor
    said_mean: Tensor
    said_deviation: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, width: int, num_outputs: int, rank: int, has_outside: bool, invariant: bool):
        super().__init__()
        self.num_outputs, self.rank, self.has_outside, self.invariant = num_outputs, rank, has_outside, invariant
        self.sizes = [num_outputs * rank, num_outputs] + ([num_outputs, 1] if has_outside else [])
        seen, said = width + (2 if invariant else 1) * num_outputs, sum(self.sizes)
        self.register_buffer("seen_mean", torch.zeros(seen))
        self.register_buffer("seen_deviation", torch.ones(seen))
        self.register_buffer("said_mean", torch.zeros(said))
        self.register_buffer("said_deviation", torch.ones(said))
        self.register_buffer("lowest", torch.zeros(said))
        self.register_buffer("highest", torch.zeros(said))
        self.layers = nn.Sequential(
            *(nn.Linear(seen, WIDTH), nn.SiLU(), nn.Dropout(DROPOUT)),
            *(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Dropout(DROPOUT)),
            nn.Linear(WIDTH, said),
        )

    @classmethod
    def of(cls, lessons: Lesson, invariant: bool) -> Self:
        """One that can learn such lessons."""
        sizes = lessons.pooled.shape[1], *lessons.along.shape[1:]
        return cls(*sizes, has_outside=lessons.outside.shape[1] > 0, invariant=invariant)

    def forward(self, pooled: Tensor, outputs: Tensor) -> Said:
        """From pooled activations (B, A) and outputs (B, C)."""
        flat = self.layers(self.standardised(pooled, outputs)) * self.said_deviation + self.said_mean
        flat = flat.clamp(self.lowest, self.highest)  # what no lesson said is not said far from them
        along, inside, *rest = flat.split(self.sizes, 1)
        along = along.unflatten(1, (self.num_outputs, self.rank))
        along = along / along.square().sum(-1, keepdim=True).clamp_min(1).sqrt()
        return Said(along, inside, *(rest or (inside[:, :0], inside[:, :0])))

    def standardised(self, pooled: Tensor, outputs: Tensor) -> Tensor:
        """What it sees, (B, ·); what is far away counts as not so far."""
        values = (self._seen(pooled, outputs) - self.seen_mean) / self.seen_deviation
        return FARTHEST * (values / FARTHEST).tanh()

    def _seen(self, pooled: Tensor, outputs: Tensor) -> Tensor:
        logs = [outputs.log_softmax(-1), outputs.softmax(-1)] if self.invariant else [outputs]
        return torch.cat([pooled, *logs], 1).to(self.seen_mean)

    def learn(self, lessons: Lesson, generator: torch.Generator, progress: Progress = silent) -> None:
        """Learn from all of the lessons, a few epochs long.

        Args:
            lessons: n inputs.
            generator: of their order.
            progress: shows it.
        """
        n = len(lessons.outputs)
        seen = self._seen(lessons.pooled, lessons.outputs)
        said = torch.cat([part.flatten(1) for part in lessons[2:]], 1)
        self.seen_mean, self.seen_deviation = seen.mean(0), _positive(seen.std(0), seen.mean(0))
        directions = self.sizes[0]  # whose scale is common: they are parts of unit vectors
        self.said_mean = said.mean(0).index_fill(0, torch.arange(directions), 0)
        deviation = said.std(0)
        deviation[:directions] = said[:, :directions].square().mean().sqrt()
        self.said_deviation = _positive(deviation, self.said_mean)
        self.lowest, self.highest = said.amin(0), said.amax(0)
        seen, said = self.standardised(lessons.pooled, lessons.outputs), (said - self.said_mean) / self.said_deviation
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=DECAY)
        steps = EPOCHS * math.ceil(n / BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        orders = (torch.randperm(n, generator=generator).split(BATCH) for _ in range(EPOCHS))
        batches = ((seen[some], said[some]) for order in orders for some in order)
        self.layers.train().requires_grad_(True)
        with torch.enable_grad():
            for some, right in progress(batches, "ELLA student", EPOCHS * n):
                pairs = zip(self.layers(some).split(self.sizes, 1), right.split(self.sizes, 1), strict=True)
                loss = torch.stack([mse_loss(answer, part) for answer, part in pairs]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.eval().requires_grad_(False)


def _positive(deviation: Tensor, mean: Tensor) -> Tensor:
    """One where there is none but that of rounding."""
    return torch.where(deviation > ROUNDING * (1 + mean.abs()), deviation, 1)


class Translation(nn.Module):
    """From what a student says to the outputs' Gaussian, under the posterior as it is now.

    Args:
        root: R (K, K) of the posterior that the student was taught, whose directions it knows.
        draws: (S, K + C) standard normal numbers.

    Its tensors `temperature` and `scale` (of all variances) are what predictions need beside; `tempering` is by how
    much the student's temperature is another than the posterior's.
    """

    root: Tensor
    scale: Tensor
    temperature: Tensor
    tempering: Tensor
    draws: Tensor
    move: Tensor
    turn: Tensor
    outside: Tensor

    def __init__(self, root: Tensor, draws: Tensor):
        super().__init__()
        self.register_buffer("root", root.double())
        self.register_buffer("scale", torch.ones(()).double())
        self.register_buffer("temperature", torch.ones(()).double())
        self.register_buffer("tempering", torch.ones(()).double())
        self.register_buffer("draws", draws)
        rank = len(root)
        self.register_buffer("move", torch.zeros(rank))  # (K,), of the mean, in the student's coordinates
        self.register_buffer("turn", torch.eye(rank))  # (K, K), of the covariance's root
        self.register_buffer("outside", torch.zeros(()))  # r

    def follow(self, posterior: Posterior) -> Self:
        """Take a posterior over the same directions."""
        now = posterior.root().to(self.root)
        turn = torch.linalg.solve(self.root, now)
        same = torch.allclose(now, self.root, rtol=1e-9, atol=0)
        mean = now.new_zeros(len(now)) if posterior.mean is None else posterior.mean.to(now)
        self.turn = (torch.eye(len(now)) if same else turn).to(self.turn)
        self.move = torch.linalg.solve(self.root, mean).to(self.move)
        self.outside = posterior.residual_scale.to(self.outside)
        self.temperature = posterior.temperature.to(self.temperature) * self.tempering
        return self

    def forward(self, outputs: Tensor, said: Said) -> Spread:
        """Mean, shared factor and own deviations of the outputs (B, C).

        What the student does not know of the direction is the outputs' own, as is the variance outside the span.
        """
        length = (said.inside / 2).exp().unsqueeze(-1)
        taught = said.along * length  # (B, C, K)
        now = taught @ self.turn
        ratio = now.square().sum(-1) / taught.square().sum(-1).clamp_min(TINY)  # of variances, since it was taught
        known = said.along.square().sum(-1)
        own = said.inside.exp() * (1 - known).clamp_min(0) * ratio
        if said.outside.shape[-1]:
            own = own + self.outside * said.outside.exp()
        scale = self.scale.to(own)
        mean = outputs + (taught @ self.move).to(outputs)
        parts = now * scale.sqrt(), (own * scale).sqrt()
        factor, own = (part.to(outputs) for part in parts)
        return Spread(mean, factor, self.draws.to(outputs), own=own)
