"""A look at network and data: from a few points, what can be known before anything is computed with many."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .augmentation import names_of, refuse_unusable, seen
from .basis import sketch_numbers
from .batches import Inputs, Picked, num_samples, rows
from .data import Points
from .engine import Linearization
from .likelihoods import LIKELIHOODS
from .linearize import Network, hooked
from .observations import checked, weights_of
from .settings import Settings

log = logging.getLogger(__name__)

POINTS = 8  # that are looked at
ALONE = 3  # of them, one by one
ROUNDING = 1000  # units in the last place that two evaluations may differ by, of the largest output
MOST = 0.05  # of it, however few places there are (bfloat16)
# What reshapes outputs, but changes no number.
RESHAPING = {
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Permute",
    "T",
    "Select",
    "Slice",
}
# What keeps probabilities away from 0 and 1, before a loss that takes their logarithm.
NUDGING = {"Add", "Clamp", "ClampMax", "ClampMin", "Maximum", "Minimum", "Mul", "NanToNum", "Sub", "ToCopy"}


Record = list[tuple[nn.Module, list[Tensor], list[Tensor]]]  # calls as they end: module, inputs, outputs


def look(
    linearization: Linearization, train: Points, held_out: Points | None, settings: Settings
) -> tuple[Inputs, Tensor]:
    """Return a few training inputs and their outputs (b, *, C), if network and data can be used.

    Raises:
        ValueError, TypeError: if not; the message names the fix.
    """
    assert settings.num_landmarks is not None
    if (count := len(train.numbers)) < settings.num_landmarks:
        raise ValueError(
            f"num_landmarks={settings.num_landmarks}, but there are only {count} training points: "
            f"pass num_landmarks={count} or less, or leave it out."
        )
    budget = linearization.memory_budget // 2
    sketch_numbers(
        settings.num_landmarks, linearization.parameters, settings.rank, budget
    )  # refuses too small a budget
    found = _try(linearization, train, settings)
    if held_out is not None:
        _try(linearization, held_out, settings)
    if settings.views:
        _look_through(linearization, found[0], settings)
    if not train.is_repeatable():
        log.warning(
            "ELLA: the training data look different each time (augmentation?). Pass train_loader= a loader without "
            "augmentation, or give the datamodule an ella_train_dataloader()."
        )
    return found


def _try(linearization: Linearization, points: Points, settings: Settings) -> tuple[Inputs, Tensor]:
    """The first few of the points and their outputs, if the network can be evaluated and differentiated there."""
    inputs, targets, weights = next(iter(points.batches(points.numbers[:POINTS], linearization.device)))
    logits = linearization.logits(inputs)
    likelihood = LIKELIHOODS[settings.likelihood].from_settings(settings.as_dict())
    outputs = linearization.at_positions(logits)
    known = checked(likelihood, outputs, targets, linearization.axis)
    if not (weights_of(likelihood, known, weights) > 0).any():
        log.warning("ELLA: none of the first %d points has a target that counts.", len(logits))
    same_each_time(linearization.network, inputs)
    same_alone(linearization.network, inputs)
    _shortcuts(linearization.network, inputs, logits)
    if settings.likelihood in PROBABILITIES:
        no_probabilities(linearization.network, inputs, *PROBABILITIES[settings.likelihood])
    next(linearization.gradients(inputs, torch.zeros(len(logits), dtype=torch.long, device=logits.device)))
    return inputs, outputs


def _look_through(linearization: Linearization, inputs: Inputs, settings: Settings) -> None:
    """Raise a ValueError if views cannot be used: they are random, or outputs would move with the inputs."""
    if isinstance(inputs, Picked) or len(linearization.network.output_shape or ()) > 1:
        raise ValueError(
            "views= are for networks with one row of outputs an input, and this one has several, which move with what "
            "is seen: leave views= out."
        )
    refuse_unusable(inputs, settings.views)
    for view, name in zip(settings.views, names_of(settings.views), strict=True):
        try:
            linearization.logits(seen(inputs, view))
        except Exception as error:
            error.add_note(f"ELLA: this is with the view {name} of views=.")
            raise


def same_each_time(network: Network, inputs: Inputs) -> None:
    """Raise a ValueError if the network gives other outputs the second time."""
    with _recorded(network) as calls:
        one = network(inputs)
    if _differ(one, network(inputs), calls):
        with _recorded(network, values=True) as first:
            network(inputs)
        with _recorded(network, values=True) as second:
            network(inputs)
        raise ValueError(
            f"the same inputs give other outputs the second time, although the network is in eval mode: something in "
            f"{_culprit(network, first, second)} is random, such as a dropout with training=True. Leave it out, by "
            "forward= say: the posterior is to be the uncertainty."
        )


def same_alone(network: Network, inputs: Inputs) -> None:
    """Raise a ValueError if the outputs of a sample depend on the batch that it is in."""
    with _recorded(network) as together:
        outputs = network(inputs)
    for b in range(min(ALONE, num_samples(inputs))) if not isinstance(inputs, Picked) else ():
        with _recorded(network) as alone:
            one = _evaluated_alone(network, rows(inputs, slice(b, b + 1)), alone, together)
        if one.shape[1:] == outputs.shape[1:] and _differ(one, outputs[b : b + 1], together, outputs):
            with _recorded(network, values=True) as together:
                network(inputs)
            with _recorded(network, values=True) as alone:
                network(rows(inputs, slice(b, b + 1)))
            raise ValueError(
                "the network's outputs for a sample depend on the other samples of its batch, by "
                f"{_culprit(network, alone, together, b)} (statistics of the batch, as a BatchNorm has them with "
                "track_running_stats=False?). Pass a forward= that looks at each sample alone."
            )


def _evaluated_alone(network: Network, sample: Inputs, alone: Record, together: Record) -> Tensor:
    try:
        return network(sample)
    except Exception as error:
        missing = [module for module, *_ in together[len(alone) : len(alone) + 1]]
        where = _named(network, missing[0]) if missing else "its forward()"
        raise ValueError(
            f"the network cannot be evaluated for one sample alone, because of {where}: {error} Pass a forward= that "
            "does without the other samples of a batch."
        ) from error


def no_probabilities(network: Network, inputs: Inputs, operation: str, one_row: bool, fix: str) -> None:
    """Raise a ValueError if the outputs are probabilities instead of what their softmax or sigmoid is taken of."""
    outputs = network(inputs)
    shaped = network.at_positions(outputs, None if not network.output_shape else _axis(network.output_shape))
    inside = bool(((shaped >= 0) & (shaped <= 1)).all())
    sums = one_row and shaped.shape[-1] > 1 and bool(((shaped.sum(-1) - 1).abs() < 1e-4).all())
    if inside and (sums or _last_operation(network, inputs) == operation):
        raise ValueError(
            f"the network's outputs are probabilities already, but ELLA takes the {operation.lower()} of them itself: "
            f"pass forward=lambda module, inputs: module(inputs){fix}, or leave out the last {operation.lower()}."
        )


# likelihood -> what would make probabilities of outputs, whether they add up to one, and how to undo it
PROBABILITIES = {
    "classification": ("Softmax", True, ".log()"),
    "binary": ("Sigmoid", False, ".logit()"),
    "multilabel": ("Sigmoid", False, ".logit()"),
    "ordinal": ("Sigmoid", False, ".logit()"),
}


def _axis(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) > 2 else -1


def _last_operation(network: Network, inputs: Inputs) -> str:
    """The name of what made the outputs, in autograd's graph, of one sample."""
    with torch.enable_grad():
        node = network(rows(inputs, slice(0, 1))).grad_fn
    while node is not None:
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        before = [after for after, _ in node.next_functions if after is not None]
        if name not in RESHAPING | NUDGING or len(before) != 1:
            return name
        node = before[0]
    return ""


def _shortcuts(network: Network, inputs: Inputs, logits: Tensor) -> None:
    """Warn where the network computes another function without gradients than the one that was trained."""
    if network.takes_shortcuts and not torch.allclose(network(inputs), logits, rtol=1e-3, atol=1e-4):
        log.warning(
            "ELLA: without gradients, torch's nn.TransformerEncoder takes a shortcut that makes padded positions zero, "
            "and the network's outputs are others than in training. Means are those of eval mode, variances those of "
            "the function that was trained: leave padded positions out of what forward() averages, or call "
            "torch.backends.mha.set_fastpath_enabled(False)."
        )


@contextmanager
def _recorded(network: Network, *, values: bool = False) -> Iterator[Record]:
    """What modules are called; with what, too, if so wanted: that takes all activations, so it is for errors only."""
    found: Record = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        found.append((module, _tensors(args, values), _tensors(output, values)))

    with hooked(network.model.modules(), record):
        yield found


def _tensors(tree: Any, values: bool) -> list[Tensor]:
    """Copies of tensors of real numbers, or something of their type."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.clone() if values else torch.empty(0, dtype=leaf.dtype) for leaf in found]


def _culprit(network: Network, ones: Record, others: Record, row: int | None = None) -> str:
    """The first module whose outputs differ where its inputs do not."""
    pick: Callable[[Tensor], Tensor] = lambda t: t if row is None or not t.ndim else t[row : row + 1]  # noqa: E731
    for (module, args, outputs), (_, other_args, other_outputs) in zip(ones, others, strict=False):
        if _same(args, map(pick, other_args)) and not _same(outputs, map(pick, other_outputs)):
            return _named(network, module)
    return "its forward()"


def _named(network: Network, module: nn.Module) -> str:
    names = {each: name for name, each in network.model.named_modules()}
    kind = type(module).__name__
    return f"{names[module]} ({kind})" if names.get(module) else f"{kind}.forward()"


def _same(ones: Any, others: Any) -> bool:
    pairs = list(zip(ones, others, strict=False))
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


def _differ(one: Tensor, other: Tensor, record: Record, scale: Tensor | None = None) -> bool:
    """Whether two evaluations differ by more than rounding, in the coarsest type that the network computes in."""
    kinds = {one.dtype, *(tensor.dtype for _, _, outputs in record for tensor in outputs)}
    allowed = min(MOST, ROUNDING * max(torch.finfo(kind).eps for kind in kinds))
    return bool((one - other).abs().max() > allowed * (one if scale is None else scale).abs().max())
