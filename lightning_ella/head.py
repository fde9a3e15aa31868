"""What every head on a trained network has: the network, which it only reads, and proof that it is still the same."""

import copy
import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import is_
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .augmentation import OneView, names_of, portable_views
from .batches import Batch, Inputs, Unpack, inputs_and_targets
from .data import draw, points_of, seeded
from .guarantee import MISSING, Guarantee, Judged
from .likelihoods import Likelihood
from .linearize import Forward, version
from .observations import checked, weights_of
from .pickling import portable

MOST = 10_000  # points that guarantees are learnt from


class Head(nn.Module):
    """A module on a trained network, which it holds without owning it, and whose weights it knows.

    Args:
        model: the network.
        forward: how to call it.
        origin: says which weights these are, in the error that refuses others: the name of a checkpoint.
        counted: names of parameters and buffers that a forward pass itself writes to, which are no weights.
    """

    is_head_of_a_network = True  # a view of the network leaves it out
    made_again: ClassVar[tuple[str, ...]] = ("_verified", "_lock")  # what neither a pickle nor a copy keeps
    model: nn.Module
    settings: dict[str, Any]
    likelihood: Likelihood

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        raise NotImplementedError

    def __init__(self, model: nn.Module, forward: Forward, origin: str, counted: Collection[str]):
        super().__init__()
        # Not registered: the head may then be a submodule of the network, as in `module.ella = ELLAPredictor.load(…)`.
        object.__setattr__(self, "model", model)
        self.forward_function, self.origin = forward, origin
        self.guaranteed: Guarantee | None = None
        self._lock = threading.RLock()
        self._recognise(counted)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle keeps: all but what is made again, and a `forward=` that cannot be pickled."""
        kept = {"settings": self.settings | {"views": portable_views(self.settings["views"])}}
        return self._own() | {"forward_function": portable("forward_function", self.forward_function)} | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the parts; a network that has this head on it may not be whole yet, so it is looked at when asked."""
        super().__setstate__(state)
        self._verified, self._lock = None, threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = made = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self._own(), memo))
        return made

    @property
    def all_views(self) -> tuple[OneView | None, ...]:
        """Of each input: None, which is as it is, and the others."""
        return None, *self.settings["views"]

    def guarantee(self, loader: Any, unpack: Unpack = inputs_and_targets) -> Self:
        """Learn from labelled points how large sets and intervals must be, and what may be answered.

        A fit does so by itself where there are more unseen points than the scales are chosen on. What is promised then
        holds for inputs like these points, on average over all of them.

        Args:
            loader: points that neither the network, nor the fit, nor a student, nor `update` has seen.
            unpack: maps a batch to `(inputs, targets)`.

        Returns:
            this predictor, whose predictions have `prediction_set()` or `interval(guaranteed=True)` from now on.

        Raises:
            ValueError: if there are several rows of outputs for each input, or no labels.
        """
        if self.settings["top_outputs"] is not None:
            raise ValueError("with top_outputs= every input has other outputs, for which nothing can be guaranteed.")
        points = points_of(loader, unpack, MOST)
        with seeded(self.settings["seed"]), torch.no_grad():
            chosen = draw(MOST, points.numbers, torch.Generator().manual_seed(self.settings["seed"]))
            batches = points.batches(points.arranged(chosen), self.device)
            judged, weights = judge(self, self.likelihood, tqdm(batches, desc="ELLA guarantee", unit="batch"))
        if judged is None or not len(weights):
            raise ValueError("no point of the loader has a target that counts: pass one with labels.")
        if (weights != 1).any():
            raise ValueError("a guarantee is for points that count alike: let unpack= return no weights but 0 and 1.")
        self.guaranteed = Guarantee.of(judged)
        return self

    def threshold(self, risk: float = 0.05, certainty: float = 0.9) -> float:
        """The confidence from which on to answer, so that no more than a share `risk` of the answers is wrong.

        Answer where `out.confidence >= predictor.threshold(risk=0.05)`. It keeps its promise with probability
        `certainty`, over the points that it was found with (learn then test: Angelopoulos et al. 2025).

        Returns:
            the threshold; infinite, with a warning, if none is known to keep it.

        Raises:
            ValueError: if there were no points that nothing else has seen, or no single answer, as of numbers.
        """
        if self.guaranteed is None:
            raise ValueError(f"threshold() {MISSING}")
        return self.guaranteed.threshold(risk, certainty)

    def _stored_settings(self) -> dict[str, Any]:
        """Settings as they are written to a file."""
        return self.settings | {"views": names_of(self.settings["views"])}

    def _own(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.made_again}

    def _recognise(self, counted: Collection[str]) -> None:
        """Take the weights that the network has now for those that this head belongs to."""
        self.counted = frozenset(counted)
        self.fingerprint = fingerprint(self.model, self.counted)
        self._verified: Versions | None = Versions(self.model, self.counted)

    def _check_weights(self) -> bool:
        """Whether something was written to the weights since the last look, although they are the same.

        Raises:
            ValueError: if they are others.
        """
        if self._verified is not None and self._verified.hold():
            return False
        found = Versions(self.model, self.counted)
        compare(self.fingerprint, self.model, self.counted, "this posterior", self.origin)
        self._verified = found
        return True


def judge(
    predict: Callable[[Inputs], Any], likelihood: Likelihood, batches: Iterable[Batch]
) -> tuple[Judged | None, Tensor]:
    """How right predictions are about the points that count, and the weights (n,) of these; None without a batch.

    Raises:
        ValueError: if there are several rows of outputs for each input.
    """
    parts, counted = [], [torch.empty(0)]
    for inputs, targets, weights in batches:
        prediction = predict(inputs)
        if prediction.logits.mean.ndim > 2:
            raise ValueError(
                "guarantees are for networks with one row of outputs an input: pixels or words of one go together, so "
                "they are no points by themselves."
            )
        known = checked(likelihood, prediction.logits.mean, targets, prediction.axis)
        each = weights_of(likelihood, known, weights)
        parts.append(Judged.of(likelihood, prediction, known, each > 0))
        counted.append(each[each > 0].cpu())
    return Judged.joined(parts) if parts else None, torch.cat(counted)


def fingerprint(model: nn.Module, without: Collection[str] = (), *, halved: bool = False) -> dict[str, str]:
    """SHA-256 of the names and shapes of a network's parameters and buffers, and of their values.

    Values of those in `without` do not count. `halved` takes float64 as float32.
    """
    network, weights = hashlib.sha256(), hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            network.update(f"{name} {tuple(value.shape)}\n".encode())
            if name not in without:
                value = value.float() if halved and value.dtype == torch.float64 else value
                bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                weights.update(bits.numpy().data)
    return {"network": network.hexdigest(), "weights": weights.hexdigest()}


def compare(expected: Mapping[str, str], model: nn.Module, without: Collection[str], what: str, origin: str) -> None:
    """Raise a ValueError unless a network has the weights that are expected, in whatever type holds them exactly."""
    found = fingerprint(model, without)
    if expected["network"] != found["network"]:
        raise ValueError(
            f"{what} belongs to a network with other layers: pass the network that it was fitted with, "
            "wrapped in the same module."
        )
    if expected["weights"] in (found["weights"], fingerprint(model, without, halved=True)["weights"]):
        return
    kinds = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if kinds:
        raise ValueError(
            f"{what} was fitted at weights that {', '.join(map(str, kinds))}, the network's type now, does not hold: "
            "load them again, in float32."
        )
    theirs = f"{origin}, {expected['weights'][:8]}" if origin else expected["weights"][:8]
    raise ValueError(
        f"{what} was fitted at other weights ({theirs}; the network has {found['weights'][:8]}): "
        "load the weights that it was fitted with (a cast to a smaller type and back changes them, too), or fit again."
    )


class Versions:
    """Which weights a network has, and how often each was written to; costs no look at the values."""

    def __init__(self, model: nn.Module, without: Collection[str]):
        plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        tables = [table for module in plain for table in (module._parameters, module._buffers, module._modules)]
        self._tables = [(table, dict(table)) for table in tables]
        named = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = [value for name, value in named if name not in without]
        self._numbers = self._now()

    def hold(self) -> bool:
        """Whether the network has the same modules, parameters and buffers, and none was written to."""
        return (
            all(len(table) == len(held) and (not held or _same(table, held)) for table, held in self._tables)
            and self._now() == self._numbers
        )

    def _now(self) -> list[tuple[int, int]]:
        return [(value.data_ptr(), version(value)) for value in self._tensors]


def _same(table: Mapping[str, Any], held: Mapping[str, Any]) -> bool:
    """Whether a table has the very objects that were there, under their names."""
    return [*table] == [*held] and all(map(is_, table.values(), held.values()))
