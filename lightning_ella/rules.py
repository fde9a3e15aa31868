"""Rules: rows of J for the parameters of one layer, from its input and the gradients of its output.

To add one, write a function `(layer, inputs, gradients, B) -> Terms` and name it in `RULES`, or in `RULES_BY_NAME` if
its layer is of a package that need not be installed. Any other module with parameters of its own is differentiated
alone (`by_vjp`), so a rule is worth writing only where that takes too long: for large weights.

B samples, S cotangents each (S = C for all of J), T positions or tokens, K columns of the basis.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm as normalize_batch
from torch.nn.functional import group_norm as normalize_groups
from torch.nn.functional import layer_norm as normalize_layer
from torch.nn.functional import rms_norm as normalize_root_mean_square

from .chunks import chunks
from .terms import (
    Convolution,
    Convolved,
    ConvolvedTransposed,
    NoRuleError,
    OuterProducts,
    Pulled,
    Reordered,
    Rows,
    SparseRows,
    Summed,
    Transposed,
    pulled,
)

Terms = Iterator[tuple[Tensor | None, Rows]]  # a parameter, and what this call of its layer adds to its rows
Rule = Callable[[Any, Tensor, Tensor, int], Terms]  # layer, its input, gradients (n, S, *) of its output, B


def linear(layer: nn.Linear, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, *, in) to (B, *, out)."""
    yield layer.weight, outer_products(inputs, gradients, B)
    if layer.bias is not None:
        yield layer.bias, Rows(by_token(gradients, B, layer.out_features).sum(2))


def transposed_linear(layer: Any, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, *, in) to (B, *, out), with a weight (in, out)."""
    yield layer.weight, Reordered(outer_products(inputs, gradients, B), layer.weight.shape)
    yield layer.bias, Rows(by_token(gradients, B, layer.weight.shape[1]).sum(2))


def outer_products(inputs: Tensor, gradients: Tensor, B: int) -> OuterProducts:
    """Rows for a weight (out, in)."""
    g = by_token(gradients, B, gradients.shape[-1])  # (B, S, T, out)
    patches = inputs.reshape(B, 1, -1, inputs.shape[-1]).mT
    return OuterProducts(g.mT.flatten(1, 2).unsqueeze(1), patches, g.shape[1])


def by_token(gradients: Tensor, B: int, width: int) -> Tensor:
    """(B, S, *, width), or (B * T, S, *, width) where tokens are along the first axis, to (B, S, T, width)."""
    S = gradients.shape[1]
    rows_of_samples(gradients, B)
    return gradients.reshape(B, -1, S, gradients[0, 0].numel() // width, width).transpose(1, 2).flatten(2, 3)


def rows_of_samples(tensor: Tensor, B: int) -> int:
    """How many rows of a tensor (n, *) each of B samples has.

    Raises:
        NoRuleError: if they are not as many for all.
    """
    if len(tensor) % B:
        raise NoRuleError(f"{len(tensor)} rows are not of {B} samples")
    return len(tensor) // B


def by_sample(rows: Rows, gradients: Tensor, B: int) -> Rows:
    """Rows of J of B samples from those of all n rows of a layer's output."""
    count = rows_of_samples(gradients, B)
    return rows if count == 1 else Summed(rows, count)


def conv(layer: Convolution, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, in, *) to (B, out, *)."""
    check_batched(layer, inputs)
    g = gradients.flatten(3)  # (B, S, out, T)
    grouped = g.unflatten(2, (layer.groups, -1)).transpose(1, 2).flatten(2, 3)  # (B, G, S * o, T)
    weight = Convolved(layer, inputs, grouped, gradients.shape[1], gradients.shape[3:])
    yield layer.weight, by_sample(weight, gradients, B)
    if layer.bias is not None:
        yield layer.bias, by_sample(Rows(g.sum(3)), gradients, B)


def conv_transposed(layer: Transposed, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, in, *) to (B, out, *)."""
    check_batched(layer, inputs)
    yield layer.weight, by_sample(ConvolvedTransposed(layer, inputs, gradients), gradients, B)
    if layer.bias is not None:
        yield layer.bias, by_sample(Rows(gradients.flatten(3).sum(3)), gradients, B)


def check_batched(layer: Convolution | Transposed, inputs: Tensor) -> None:
    """Raise a NoRuleError if a convolution is called with one sample, without an axis for samples."""
    if inputs.ndim != layer.weight.ndim:
        raise NoRuleError(f"{type(layer).__name__} is called without a batch")


def with_shift(
    norm: nn.BatchNorm2d | nn.SyncBatchNorm, layer: nn.Conv2d, inputs: Tensor, gradients: Tensor, B: int
) -> Terms:
    """A convolution and the BatchNorm folded into it, of which only the shift is left: one gradient serves both."""
    yield norm.bias, by_sample(Rows(gradients.sum((3, 4))), gradients, B)
    yield from conv(layer, inputs, gradients, B)


def batch_norm(layer: Any, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, channels, *), with the running statistics."""
    normalized = normalize_batch(inputs, layer.running_mean, layer.running_var, eps=layer.eps)
    return scaled_channels(layer, normalized, gradients, B)


def group_norm(layer: nn.GroupNorm, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, channels, *)."""
    return scaled_channels(layer, normalize_groups(inputs, layer.num_groups, eps=layer.eps), gradients, B)


def scaled_channels(layer: Any, normalized: Tensor, gradients: Tensor, B: int) -> Terms:
    """Scale and shift of the channels of (B, channels, *)."""
    g = gradients.flatten(3) if gradients.ndim > 3 else gradients.unsqueeze(3)  # (B, S, channels, T)
    x = normalized.reshape(*normalized.shape[:2], -1, 1)  # (B, channels, T, 1)
    yield layer.weight, by_sample(Rows((g.transpose(1, 2) @ x).squeeze(3).transpose(1, 2)), gradients, B)
    yield layer.bias, by_sample(Rows(g.sum(3)), gradients, B)


def prelu(layer: nn.PReLU, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, channels, *), or (B, *) with one slope for all."""
    n, S = gradients.shape[:2]
    x = inputs.clamp(max=0).reshape(n, 1, layer.num_parameters, -1)
    yield layer.weight, by_sample(Rows((gradients.reshape(n, S, *x.shape[2:]) * x).sum(3)), gradients, B)


def layer_norm(layer: nn.LayerNorm, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, *, normalized shape)."""
    normalized = normalize_layer(inputs, layer.normalized_shape, eps=layer.eps)
    g = by_token(gradients, B, prod(layer.normalized_shape))  # (B, S, T, width)
    yield layer.weight, Rows((g * normalized.reshape(B, 1, *g.shape[2:])).sum(2))
    yield layer.bias, Rows(g.sum(2))


def rms_norm(layer: nn.RMSNorm, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, *, normalized shape)."""
    normalized = normalize_root_mean_square(inputs, layer.normalized_shape, eps=layer.eps)
    g = by_token(gradients, B, prod(layer.normalized_shape))  # (B, S, T, width)
    yield layer.weight, Rows((g * normalized.reshape(B, 1, *g.shape[2:])).sum(2))


def embedding(layer: nn.Embedding, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """Tokens (B, *) to (B, *, d)."""
    rows_of_samples(inputs, B)
    indices = inputs.reshape(B, -1)
    g = by_token(gradients, B, layer.embedding_dim)  # (B, S, T, d)
    yield layer.weight, SparseRows(indices, _without(layer.padding_idx, indices, g), layer.num_embeddings)


def embedding_bag(layer: nn.EmbeddingBag, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """Tokens (B, T) to (B, d)."""
    if inputs.ndim != 2:
        raise NoRuleError("EmbeddingBag is called with offsets")
    n, T = inputs.shape
    g = gradients.unsqueeze(2).expand(-1, -1, T, -1)  # (n, S, T, d)
    real = torch.ones_like(inputs, dtype=torch.bool) if layer.padding_idx is None else inputs != layer.padding_idx
    if layer.mode == "mean":
        g = g / real.sum(1).clamp(min=1).view(n, 1, 1, 1)
    elif layer.mode == "max":
        vectors = layer.weight.detach()[inputs.long()].masked_fill(~real.unsqueeze(2), -torch.inf)  # (n, T, d)
        first = torch.arange(T, device=inputs.device).view(1, T, 1) == vectors.argmax(1, keepdim=True)
        g = g * first.unsqueeze(1)
    rows = SparseRows(inputs, _without(layer.padding_idx, inputs, g), layer.num_embeddings)
    yield layer.weight, by_sample(rows, gradients, B)


def _without(padding_idx: int | None, indices: Tensor, gradients: Tensor) -> Tensor:
    """Gradients (n, S, T, d), none for padding."""
    return gradients if padding_idx is None else gradients * (indices != padding_idx)[:, None, :, None]


def by_vjp(module: nn.Module, inputs: Tensor, gradients: Tensor, B: int, names: Collection[str] | None = None) -> Terms:
    """Any module, of which each sample sees its own rows of the input alone: backward passes through it alone.

    It costs one more evaluation of the module, and backward passes from its output to the parameters `names`: those of
    the module itself, or of modules within it that do not have a rule of their own (an attention's weights that are
    used in another way than by calling their layer, say).
    """
    inputs = inputs.unflatten(0, (B, rows_of_samples(inputs, B)))  # (B, r, *)
    gradients = gradients.unflatten(0, (B, rows_of_samples(gradients, B))).transpose(1, 2)  # (B, S, r', *)
    found = {name: module.get_parameter(name) for name in (_pulled_names(module) if names is None else names)}
    if gradients.shape[:2].numel() * sum(value.nbytes for value in found.values()) <= chunks(gradients).rows:
        rows = pulled(module, found, inputs, gradients)
        yield from ((value, Rows(rows[name])) for name, value in found.items())
    else:  # each by itself, to hold but some samples' rows
        yield from ((value, Pulled(module, name, inputs, gradients)) for name, value in found.items())


def _pulled_names(module: nn.Module) -> list[str]:
    """Names of a module's own parameters, but of those with a first axis of length 1, as class tokens have.

    To copy those for each sample of the batch takes nothing. Here, a class token would take the whole network.
    """
    own = module.named_parameters(recurse=False)
    return [name for name, value in own if value.is_floating_point() and (value.ndim < 2 or len(value) > 1)]


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: conv,
    nn.Conv2d: conv,
    nn.Conv3d: conv,
    nn.ConvTranspose1d: conv_transposed,
    nn.ConvTranspose2d: conv_transposed,
    nn.ConvTranspose3d: conv_transposed,
    nn.Embedding: embedding,
    nn.EmbeddingBag: embedding_bag,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.SyncBatchNorm: batch_norm,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.PReLU: prelu,
}
RULES_BY_NAME: dict[str, Rule] = {
    "timm.layers.norm.LayerNorm": layer_norm,
    "transformers.pytorch_utils.Conv1D": transposed_linear,
}
# Of large weights, whose rows are dear by other means: it is worth a try whether their subclasses do the same.
OFTEN_SUBCLASSED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def rule_of(layer: nn.Module, *, subclasses: bool) -> Rule | None:
    """The rule for a layer's own parameters; None if there is none.

    Args:
        layer: a module.
        subclasses: also take the rule of a class that the layer's class is derived from, though its `forward` is
            another: it may do more than that class, and then the rule is wrong.
    """
    if isinstance(layer, torch.jit.ScriptModule) or not any(True for _ in layer.parameters(recurse=False)):
        return None
    rule = _rule_of_class(type(layer), "forward" in vars(layer), subclasses)
    return None if rule is by_vjp and not _pulled_names(layer) else rule


@lru_cache(1000)
def _rule_of_class(kind: type[nn.Module], patched: bool, subclasses: bool) -> Rule | None:
    """As `rule_of`; a layer whose `forward` was patched may know other parameters than those that it is given."""
    by_name = {base: RULES_BY_NAME.get(f"{base.__module__}.{base.__qualname__}") for base in kind.__mro__}
    for base, rule in () if patched else (by_name | RULES).items():
        if rule is not None and issubclass(kind, base) and kind.forward is base.forward:
            return rule
    for base in OFTEN_SUBCLASSED if subclasses else ():
        if issubclass(kind, base):
            return RULES[base]
    return None if patched or not _takes_one_input(kind) else by_vjp


def _takes_one_input(kind: type[nn.Module]) -> bool:
    try:
        inspect.signature(kind.forward).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True
