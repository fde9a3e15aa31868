"""Rules: rows of J for the parameters of one layer, from its input and the gradients of its output.

To add one, write a function `(layer, inputs, gradients, B) -> Terms` and name it in `RULES`.

B samples, S cotangents each (S = C for all of J), T positions or tokens, K columns of the basis.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm as normalize_batch
from torch.nn.functional import group_norm as normalize_groups
from torch.nn.functional import layer_norm as normalize_layer
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight

MAX_BYTES = 2**24  # of J, for one layer, held at a time: what stays in a cache
MAX_BYTES_IN_GROUPS = 3 * 2**20  # the same, where one convolution has each sample as a group of channels
MAX_BYTES_OF_BASIS = 2**26  # of a layer's directions, whose responses are computed at a time


class Rows:
    """Rows of J for one parameter, (B, S, p)."""

    def __init__(self, values: Tensor):
        self.values = values.reshape(*values.shape[:2], -1)

    def dense(self) -> Tensor:
        """(B, S, p)."""
        return self.values

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K) from a basis (K, p)."""
        B, S, _ = self.values.shape  # BLAS is up to three times faster with the few rows first, in bf16
        return (basis.to(self.values.dtype) @ self.values.flatten(0, 1).T).T.view(B, S, -1)


class OuterProducts(Rows):
    """Rows of J for the weights of G groups, each a sum of T outer products.

    Args:
        gradients: of the outputs, (B, G, S * o, T).
        patches: inputs that each output sees, (B, G, d, T).
        num_cotangents: S.
    """

    response_cost = 1.0  # of a multiply-add, in those of the rows
    in_groups = False

    def __init__(self, gradients: Tensor, patches: Tensor, num_cotangents: int):
        self.gradients, self.patches, self.num_cotangents = gradients, patches, num_cotangents

    def __getitem__(self, samples: slice) -> "OuterProducts":
        return OuterProducts(self.gradients[samples], self.patches[samples], self.num_cotangents)

    def dense(self) -> Tensor:
        """(B, S, G * o * d)."""
        B, G, _, _ = self.gradients.shape
        products = (self.gradients @ self.patches.mT).view(B, G, self.num_cotangents, -1)
        return products.transpose(1, 2).reshape(B, self.num_cotangents, -1)

    def response(self, basis: Tensor) -> Tensor:
        """(B, S, K), from how the layer's outputs respond to its weights' move along a basis (K, p)."""
        tangents = basis.view(len(basis), self.gradients.shape[1], -1, self.patches.shape[2])
        responses = torch.einsum("bgdt,kgod->bgotk", self.patches, tangents)
        return torch.einsum("bgsot,bgotk->bsk", self.gradients.unflatten(2, (self.num_cotangents, -1)), responses)

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K), by way of the rows or of the layer's response to the basis, whichever takes less time."""
        _, G, So, T = self.gradients.shape
        S, (K, p), bytes_each = self.num_cotangents, basis.shape, self.gradients.element_size()
        d = p * S // (G * So)
        # Multiply-adds for an output channel; to write and read an element of a row takes as long as 32 of them.
        if self.response_cost * K * T * (d + S) >= S * d * (T + K + 32):
            basis, most = basis.to(self.gradients.dtype), MAX_BYTES_IN_GROUPS if self.in_groups else MAX_BYTES
            return torch.cat([Rows(part.dense()).times(basis) for part in self.parts(most, S * p * bytes_each)])
        few = max(1, MAX_BYTES_OF_BASIS // (p * bytes_each))  # a library may copy them
        return torch.cat([self._responses(some.to(self.gradients.dtype)) for some in basis.split(few)], 2)

    def parts(self, most: int, one: int) -> Iterator["OuterProducts"]:
        """So many samples at a time that `most` bytes are held, `one` for each."""
        size = max(1, most // one)
        return (self[start : start + size] for start in range(0, len(self.gradients), size))

    def _responses(self, basis: Tensor) -> Tensor:
        _, G, So, T = self.gradients.shape
        one = len(basis) * G * So // self.num_cotangents * T * self.gradients.element_size()
        return torch.cat([part.response(basis) for part in self.parts(MAX_BYTES, one)])


class Convolved(OuterProducts):
    """Rows of J for the weights of a convolution: its patches are windows, made when they are needed.

    Args:
        layer: the convolution.
        inputs: of the layer, (B, in, H, W).
        gradients: of its outputs, (B, G, S * o, T).
        num_cotangents: S.
        size: of its outputs, (H', W').
    """

    def __init__(self, layer: nn.Conv2d, inputs: Tensor, gradients: Tensor, num_cotangents: int, size: torch.Size):
        self.layer, self.inputs, self.size = layer, inputs, size
        self.gradients, self.num_cotangents = gradients, num_cotangents

    def __getitem__(self, samples: slice) -> "Convolved":
        return Convolved(self.layer, self.inputs[samples], self.gradients[samples], self.num_cotangents, self.size)

    @property
    def response_cost(self) -> float:  # type: ignore[override]
        """A convolution is faster than batched products, but not where its windows do not overlap."""
        return 0.6 if any(map(operator.gt, self.layer.kernel_size, self.layer.stride)) else 1.5

    @property
    def in_groups(self) -> bool:  # type: ignore[override]
        """Whether to have each sample as a group of channels, and rows as its weights' gradients.

        Up to ten times faster than products of windows, but slower where a group is large, and in bf16.
        """
        few = 2 * self.num_cotangents * self.layer.weight.nbytes <= MAX_BYTES_IN_GROUPS
        known = self.inputs.device.type == "cpu" and torch.backends.mkldnn.is_available()
        return few and known and self.inputs.dtype == self.gradients.dtype == torch.float32

    def dense(self) -> Tensor:
        """(B, S, G * o * d)."""
        if not self.in_groups:
            return super().dense()
        B, G, So, _ = self.gradients.shape
        images, size = padded(self.layer, self.inputs), (B * G * So, *self.layer.weight.shape[1:])
        gradients = self.gradients.reshape(1, -1, *self.size)  # samples as groups of channels
        images = images.reshape(1, -1, *images.shape[2:])
        stride, dilation = self.layer.stride, self.layer.dilation
        weights = conv2d_weight(images, size, gradients, stride, 0, dilation, B * G)  # type: ignore[arg-type]
        return weights.view(B, G, self.num_cotangents, -1).transpose(1, 2).reshape(B, self.num_cotangents, -1)

    @property
    def patches(self) -> Tensor:  # type: ignore[override]
        """(B, G, in / G * kernel, T)."""
        return sliding_windows(self.layer, self.inputs).unflatten(1, (self.layer.groups, -1))

    def response(self, basis: Tensor) -> Tensor:
        """(B, S, K), with the basis (K, p) as weights of K times as many channels."""
        shape = len(basis), self.layer.groups, -1, *self.layer.weight.shape[1:]
        weights = basis.view(shape).transpose(0, 1).flatten(0, 2)  # (G * K * o, in / G, *)
        responses = nn.Conv2d._conv_forward(self.layer, self.inputs, weights, None)  # (B, G * K * o, H', W')
        responses = responses.reshape(*self.gradients.shape[:2], len(basis), -1)  # (B, G, K, o * T)
        return (self.gradients.reshape(*responses.shape[:2], self.num_cotangents, -1) @ responses.mT).sum(1)


Terms = Iterator[tuple[Tensor | None, Rows]]  # a parameter, and what this call of its layer adds to its rows


def linear(layer: nn.Linear, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, *, in) to (B, *, out)."""
    patches = inputs.reshape(B, 1, -1, layer.in_features).mT
    g = by_token(gradients, B, layer.out_features)  # (B, S, T, o)
    yield layer.weight, OuterProducts(g.mT.flatten(1, 2).unsqueeze(1), patches, g.shape[1])
    if layer.bias is not None:
        yield layer.bias, Rows(g.sum(2))


def by_token(gradients: Tensor, B: int, width: int) -> Tensor:
    """(B, S, *, width), or (B * T, S, *, width) where tokens are along the first axis, to (B, S, T, width)."""
    S = gradients.shape[1]
    return gradients.reshape(B, -1, S, gradients[0, 0].numel() // width, width).transpose(1, 2).flatten(2, 3)


def conv2d(layer: nn.Conv2d, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, in, H, W) to (B, out, H', W')."""
    g = gradients.flatten(3)  # (B, S, out, T)
    grouped = g.unflatten(2, (layer.groups, -1)).transpose(1, 2).flatten(2, 3)  # (B, G, S * o, T)
    yield layer.weight, Convolved(layer, inputs, grouped, gradients.shape[1], gradients.shape[3:])
    if layer.bias is not None:
        yield layer.bias, Rows(g.sum(3))


def padded(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """(B, in, H, W) with the layer's padding."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return pad(inputs, layer._reversed_padding_repeated_twice, mode)


def sliding_windows(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What `F.unfold` gives, (B, in * kernel, T), by one strided copy: many times faster on a CPU."""
    windows = padded(layer, inputs)
    for axis, size, stride, dilation in zip((2, 3), layer.kernel_size, layer.stride, layer.dilation, strict=True):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)
    windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]]  # (B, in, H', W', kernel, kernel)
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(1, 3).flatten(2)


def batch_norm(layer: nn.BatchNorm2d, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, channels, *), with the running statistics."""
    return scaled_channels(
        layer, normalize_batch(inputs, layer.running_mean, layer.running_var, eps=layer.eps), gradients
    )


def with_shift(norm: nn.BatchNorm2d, layer: nn.Conv2d, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """A convolution and the BatchNorm folded into it, of which only the shift is left: one gradient serves both."""
    yield norm.bias, Rows(gradients.sum((3, 4)))
    yield from conv2d(layer, inputs, gradients, B)


def group_norm(layer: nn.GroupNorm, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, channels, *)."""
    return scaled_channels(layer, normalize_groups(inputs, layer.num_groups, eps=layer.eps), gradients)


def scaled_channels(layer: Any, normalized: Tensor, gradients: Tensor) -> Terms:
    """Scale and shift of the channels of (B, channels, *)."""
    g = gradients.flatten(3) if gradients.ndim > 3 else gradients.unsqueeze(3)  # (B, S, channels, T)
    x = normalized.reshape(*normalized.shape[:2], -1, 1)  # (B, channels, T, 1)
    yield layer.weight, Rows((g.transpose(1, 2) @ x).squeeze(3).transpose(1, 2))
    yield layer.bias, Rows(g.sum(3))


def layer_norm(layer: nn.LayerNorm, inputs: Tensor, gradients: Tensor, B: int) -> Terms:
    """(B, *, normalized shape)."""
    normalized = normalize_layer(inputs, layer.normalized_shape, eps=layer.eps)
    g = by_token(gradients, B, layer.weight.numel())  # (B, S, T, width)
    yield layer.weight, Rows((g * normalized.reshape(B, 1, *g.shape[2:])).sum(2))
    yield layer.bias, Rows(g.sum(2))


Rule = Callable[[Any, Tensor, Tensor, int], Terms]  # layer, its input, gradients (n, S, *) of its output, B
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
}
