"""Rows of J for one parameter, in the form that a layer gives them: what costs least is left undone until it is needed.

B samples, S cotangents each (S = C for all of J), T positions or tokens, K columns of the basis, p numbers in the
parameter.
"""

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.functional import conv_transpose1d, conv_transpose2d, conv_transpose3d, pad
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .chunks import chunks

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class NoRuleError(ValueError):
    """A call of a layer that its rule does not know: without a batch, say."""


class Rows:
    """Rows of J for one parameter, (B, S, p)."""

    def __init__(self, values: Tensor):
        self.values = values.reshape(*values.shape[:2], -1)

    def __getitem__(self, samples: slice) -> "Rows":
        return Rows(self.values[samples])

    def dense(self) -> Tensor:
        """(B, S, p)."""
        return self.values

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K) from a basis (K, p)."""
        B, S, _ = self.values.shape  # BLAS is up to three times faster with the few rows first, in bf16
        return (basis.to(self.values.dtype) @ self.values.flatten(0, 1).T).T.view(B, S, -1)


class Summed(Rows):
    """Rows of J of samples that each are `count` rows of the layer's input, one after the other: frames, windows."""

    def __init__(self, parts: Rows, count: int):
        self.parts, self.count = parts, count

    def dense(self) -> Tensor:
        """(B, S, p)."""
        total = self.parts[:: self.count].dense().clone()
        for number in range(1, self.count):
            total += self.parts[number :: self.count].dense()
        return total

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K) from a basis (K, p)."""
        return self.parts.times(basis).unflatten(0, (-1, self.count)).sum(1)


class Reordered(Rows):
    """Rows of J for a parameter (a, b) from those for its transpose (b, a)."""

    def __init__(self, transposed: Rows, shape: torch.Size):
        self.transposed, self.shape = transposed, shape

    def dense(self) -> Tensor:
        """(B, S, p)."""
        return self.transposed.dense().unflatten(2, self.shape[::-1]).mT.flatten(2)

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K) from a basis (K, p)."""
        return self.transposed.times(basis.unflatten(1, self.shape).mT.flatten(1))


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

    @property
    def products(self) -> tuple[int, int]:
        """How many rows a sample's outer products have in all groups, and T."""
        _, G, So, T = self.gradients.shape
        return G * So // self.num_cotangents, T

    @property
    def numel_of_response(self) -> int:
        """Of a sample, to one direction."""
        return self.gradients[0].numel() // self.num_cotangents

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
        S, (K, p), bytes_each = self.num_cotangents, basis.shape, self.gradients.element_size()
        at_a_time = chunks(self.gradients)
        channels, T = self.products
        d = p // channels
        # Multiply-adds for an output channel.
        if self.response_cost * K * T * (d + S) >= S * d * (T + K + at_a_time.row_cost):
            basis, most = basis.to(self.gradients.dtype), at_a_time.rows_in_groups if self.in_groups else at_a_time.rows
            return torch.cat([Rows(part.dense()).times(basis) for part in self.some(most, S * p * bytes_each)])
        few = max(1, at_a_time.directions // (p * bytes_each))
        return torch.cat([self._responses(some.to(self.gradients.dtype)) for some in basis.split(few)], 2)

    def some(self, most: int, one: int) -> Iterator[Any]:
        """So many samples at a time that `most` bytes are held, `one` for each."""
        size = max(1, most // one)
        return (self[start : start + size] for start in range(0, len(self.gradients), size))

    def _responses(self, basis: Tensor) -> Tensor:
        one = len(basis) * self.numel_of_response * self.gradients.element_size()
        return torch.cat([part.response(basis) for part in self.some(chunks(self.gradients).rows, one)])


class Convolved(OuterProducts):
    """Rows of J for the weights of a convolution: its patches are windows, made when they are needed.

    Args:
        layer: the convolution.
        inputs: of the layer, (B, in, *).
        gradients: of its outputs, (B, G, S * o, T).
        num_cotangents: S.
        size: of its outputs, without their channels.
    """

    def __init__(self, layer: Convolution, inputs: Tensor, gradients: Tensor, num_cotangents: int, size: torch.Size):
        self.layer, self.inputs, self.size = layer, inputs, size
        self.gradients, self.num_cotangents = gradients, num_cotangents

    def __getitem__(self, samples: slice) -> "Convolved":
        return Convolved(self.layer, self.inputs[samples], self.gradients[samples], self.num_cotangents, self.size)

    @property
    def response_cost(self) -> float:  # type: ignore[override]
        """A convolution of images is faster than batched products, but not where its windows do not overlap."""
        if not any(map(operator.gt, self.layer.kernel_size, self.layer.stride)):
            return 1.5
        return 0.6 if len(self.size) == 2 else 1.0

    @property
    def in_groups(self) -> bool:  # type: ignore[override]
        """Whether to have each sample as a group of channels, and rows as its weights' gradients.

        Up to ten times faster than products of windows, but slower where a group is large, and in bf16.
        """
        few = 2 * self.num_cotangents * self.layer.weight.nbytes <= chunks(self.inputs).rows_in_groups
        known = self.inputs.device.type == "cpu" and torch.backends.mkldnn.is_available()
        return few and known and self.inputs.dtype == self.gradients.dtype == torch.float32

    def dense(self) -> Tensor:
        """(B, S, G * o * d)."""
        if not self.in_groups:
            one = self.layer.weight[0].numel() * self.layer.groups * self.products[1] * self.inputs.element_size()
            return torch.cat([OuterProducts.dense(part) for part in self.some(chunks(self.inputs).windows, one)])
        B, G, So, _ = self.gradients.shape
        padding, size = zero_padding(self.layer), (B * G * So, *self.layer.weight.shape[1:])
        images = padded(self.layer, self.inputs) if padding is None else self.inputs
        gradients = self.gradients.reshape(1, -1, *self.size)  # samples as groups of channels
        images = images.reshape(1, -1, *images.shape[2:])
        weight_gradient: Any = (conv1d_weight, conv2d_weight, conv3d_weight)[len(self.size) - 1]
        how = self.layer.stride, padding or 0, self.layer.dilation, B * G
        weights = weight_gradient(images, size, gradients, *how)
        return weights.view(B, G, self.num_cotangents, -1).transpose(1, 2).reshape(B, self.num_cotangents, -1)

    @property
    def patches(self) -> Tensor:  # type: ignore[override]
        """(B, G, in / G * kernel, T)."""
        windows = sliding_windows(self.layer, padded(self.layer, self.inputs))  # (B, in, *kernel, *)
        return windows.flatten(1, -1 - len(self.size)).flatten(2).unflatten(1, (self.layer.groups, -1))

    def response(self, basis: Tensor) -> Tensor:
        """(B, S, K), with the basis (K, p) as weights of K times as many channels."""
        shape = len(basis), self.layer.groups, -1, *self.layer.weight.shape[1:]
        weights = basis.view(shape).transpose(0, 1).flatten(0, 2)  # (G * K * o, in / G, *)
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.size) - 1]
        responses = kind._conv_forward(self.layer, self.inputs, weights, None)  # (B, G * K * o, *)
        responses = responses.reshape(*self.gradients.shape[:2], len(basis), -1)  # (B, G, K, o * T)
        return (self.gradients.reshape(*responses.shape[:2], self.num_cotangents, -1) @ responses.mT).sum(1)


class ConvolvedTransposed(OuterProducts):
    """Rows of J for the weights of a transposed convolution: of its inputs and windows over its outputs' gradients.

    Args:
        layer: the transposed convolution.
        inputs: of the layer, (B, in, *).
        gradients: of its outputs, (B, S, out, *).
    """

    response_cost = 1.5

    def __init__(self, layer: Transposed, inputs: Tensor, gradients: Tensor):
        self.layer, self.inputs, self.gradients, self.num_cotangents = layer, inputs, gradients, gradients.shape[1]

    def __getitem__(self, samples: slice) -> "ConvolvedTransposed":
        return ConvolvedTransposed(self.layer, self.inputs[samples], self.gradients[samples])

    @property
    def products(self) -> tuple[int, int]:
        """How many rows a sample's outer products have in all groups, and T."""
        return self.inputs.shape[1], self.inputs[0, 0].numel()

    def dense(self) -> Tensor:
        """(B, S, in * out / G * kernel)."""
        one = self.num_cotangents * self.layer.weight[0].numel() * self.layer.groups * self.inputs[0, 0].numel()
        parts = self.some(chunks(self.inputs).windows, one * self.inputs.element_size())
        return torch.cat([self._rows(part.inputs, part.gradients) for part in parts])

    def _rows(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        size, groups = inputs.shape[2:], self.layer.groups
        images = pad(gradients.flatten(0, 1), [n for n in _ints(self.layer.padding)[::-1] for _ in range(2)])
        windows = sliding_windows(self.layer, images)  # (B * S, out, *kernel, *); a few too many with output padding
        windows = windows[(..., *map(slice, size))].reshape(*gradients.shape[:2], groups, -1, size.numel())
        return (inputs.reshape(len(inputs), 1, groups, -1, size.numel()) @ windows.mT).flatten(2)

    def response(self, basis: Tensor) -> Tensor:
        """(B, S, K), with the basis (K, p) as weights of K times as many channels."""
        layer, (B, S), G, K = self.layer, self.gradients.shape[:2], self.layer.groups, len(basis)
        weights = basis.view(K, *layer.weight.shape).transpose(0, 1).flatten(1, 2)  # (in, K * out / G, *)
        padding = _ints(layer.padding)
        sizes = zip(self.inputs.shape[2:], layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)
        least = [(size - 1) * step - 2 * cut + wide * (kernel - 1) + 1 for size, kernel, step, cut, wide in sizes]
        extra = [found - size for found, size in zip(self.gradients.shape[3:], least, strict=True)]
        convolve: Any = (conv_transpose1d, conv_transpose2d, conv_transpose3d)[len(extra) - 1]
        responses = convolve(self.inputs, weights, None, layer.stride, padding, extra, G, layer.dilation)
        gradients = self.gradients.reshape(B, S, G, -1).transpose(1, 2)  # (B, G, S, out / G * positions)
        return (gradients @ responses.reshape(B, G, K, -1).mT).sum(1)


def _ints(padding: Any) -> tuple[int, ...]:
    """The padding of a transposed convolution, which is never the name of one."""
    return tuple(padding)


def zero_padding(layer: Convolution) -> tuple[int, ...] | None:
    """How many zeros there are before and after the inputs, for each axis; None where that is not all."""
    around = layer._reversed_padding_repeated_twice  # of the last axis first
    before, after = around[-2::-2], around[::-2]
    return tuple(before) if layer.padding_mode == "zeros" and before == after else None


def padded(layer: Convolution, inputs: Tensor) -> Tensor:
    """(B, in, *) with the layer's padding."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return pad(inputs, layer._reversed_padding_repeated_twice, mode)


def sliding_windows(layer: Convolution | Transposed, images: Tensor) -> Tensor:
    """Windows of images (B, channels, *), a view (B, channels, *kernel, *).

    By one strided copy what `F.unfold` gives: many times faster on a CPU.
    """
    dims = images.ndim - 2
    windows = images
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, stride)
    windows = windows[(..., *(slice(None, None, dilation) for dilation in layer.dilation))]  # (B, channels, *, *kernel)
    return windows.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))


class SparseRows(Rows):
    """Rows of J for a table of V vectors of d numbers, of which each sample uses T.

    Args:
        indices: of the vectors used, (B, T).
        gradients: of what was taken from the table, (B, S, T, d).
        length: V.
    """

    def __init__(self, indices: Tensor, gradients: Tensor, length: int):
        self.indices, self.gradients, self.length = indices, gradients, length

    def __getitem__(self, samples: slice) -> "SparseRows":
        return SparseRows(self.indices[samples], self.gradients[samples], self.length)

    def dense(self) -> Tensor:
        """(B, S, V * d)."""
        B, S, _, d = self.gradients.shape
        index = self.indices.long()[:, None, :, None].expand_as(self.gradients)
        return self.gradients.new_zeros(B, S, self.length, d).scatter_add_(2, index, self.gradients).flatten(2)

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K) from a basis (K, V * d), of which only the vectors in use are read."""
        B, S, T, d = self.gradients.shape
        in_full = self.length <= T  # few letters, long texts: their sums are shorter
        one = (S if in_full else len(basis)) * min(self.length, T) * d * self.gradients.element_size()
        size = max(1, chunks(self.gradients).rows // max(1, one))
        parts = [self[start : start + size] for start in range(0, B, size)]
        return torch.cat([Rows(part.dense()).times(basis) if in_full else part._looked_up(basis) for part in parts])

    def _looked_up(self, basis: Tensor) -> Tensor:
        B, _, T, d = self.gradients.shape
        table = basis.view(len(basis), self.length, d)
        used = table.index_select(1, self.indices.flatten()).view(len(basis), B, T * d).to(self.gradients.dtype)
        return self.gradients.flatten(2) @ used.permute(1, 2, 0)


class Pulled(Rows):
    """Rows of J for one parameter in any module, by backward passes through that module alone.

    Args:
        module: a function of its input, sample by sample, and of its parameters.
        name: of the parameter in the module.
        inputs: of the module, (B, r, *): each sample r rows of what the module takes.
        gradients: of its outputs, (B, S, r', *).
    """

    def __init__(self, module: nn.Module, name: str, inputs: Tensor, gradients: Tensor):
        self.module, self.name, self.inputs, self.gradients = module, name, inputs, gradients

    def dense(self) -> Tensor:
        """(B, S, p)."""
        return torch.cat([rows.values for rows in self._some()])

    def times(self, basis: Tensor) -> Tensor:
        """(B, S, K) from a basis (K, p)."""
        return torch.cat([rows.times(basis) for rows in self._some()])

    def _some(self) -> Iterator[Rows]:
        B, S = self.gradients.shape[:2]
        size = max(1, chunks(self.gradients).rows // (S * self.module.get_parameter(self.name).nbytes))
        for start in range(0, B, size):
            some = slice(start, start + size)
            yield Rows(pulled(self.module, [self.name], self.inputs[some], self.gradients[some])[self.name])


def pulled(module: nn.Module, names: Collection[str], inputs: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """Rows of J for some of a module's parameters, name -> (B, S, *), as of `Pulled`.

    Raises:
        RuntimeError: if the module writes to its input, draws random numbers or branches on the values of a tensor.
    """
    values = {name: module.get_parameter(name).detach() for name in names}

    def pull_back(one: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        def outputs(values: dict[str, Tensor]) -> Tensor:
            return type(module).forward(with_parameters(module, values), one)

        output, pull, *_ = vjp(outputs, values)
        return vmap(pull)(cotangents.to(output.dtype))[0]

    return vmap(pull_back)(inputs, gradients)


def with_parameters(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A copy of `module` with some parameters replaced, by name; `module` and what is within it are only read."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_parameters"] = module._parameters | {name: v for name, v in values.items() if "." not in name}
    within: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        child, _, rest = name.partition(".")
        if rest:
            within.setdefault(child, {})[rest] = value
    changed = {child: with_parameters(module.get_submodule(child), some) for child, some in within.items()}
    copy.__dict__["_modules"] = module._modules | changed
    return copy
