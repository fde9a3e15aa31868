"""Forward mode: products with J that cost the same for any number of outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils._pytree import tree_map

from .batches import Inputs, slices
from .folding import UNFOLDED, Folding
from .linearize import Basis, Network

Reduce = Callable[[Tensor, Tensor], Tensor]


class ForwardMode:
    """Features by products with tangents of all parameters that go through the network, many at a time.

    Args:
        network: what is differentiated.
        tangents_per_chunk: how many at a time.
        dtype: of the arithmetic, if not that of the weights.
    """

    def __init__(self, network: Network, tangents_per_chunk: int, dtype: torch.dtype | None = None):
        self.network, self.tangents_per_chunk, self.dtype = network, tangents_per_chunk, dtype

    def features(
        self, inputs: Inputs, basis: Basis, folding: Folding = UNFOLDED, reduce: Reduce | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, C) and Ψ = J V (B, C, K), one primal pass for each chunk of V's, or the folded, tangents.

        `reduce(outputs, products)` makes a chunk's products smaller before the next.
        """
        taken = self.network.parameters_taken
        # Forward mode is slow where a weight and its tangent differ in layout: channels_last is undone here.
        parameters = {n: self._cast(v).contiguous() for n, v in (taken | folding.values()).items() if n in basis}
        others = {}
        if self.dtype is not None:  # autocast does not work under vmap and jvp
            rest = self.network.view.tensors
            others = {name: self._cast(value.detach()) for name, value in rest.items() if name not in parameters}
            inputs = tree_map(self._cast, inputs)

        def product(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return jvp(lambda at: self.network.at(others | at, inputs), (parameters,), (tangent,))[:2]

        out_dims: Any = (None, -1)  # vmap's annotation does not know None for "the same for all tangents"
        products = []
        parts = slices(len(next(iter(basis.values()))), self.tangents_per_chunk)
        for part in parts:
            # Autograd makes zeros and copies into them where a tangent's storage is larger than its weight's.
            tangents = {n: basis[n][part].to(value.dtype, copy=len(parts) > 1) for n, value in parameters.items()}
            with folding.applied(self.network):
                outputs, features = vmap(product, out_dims=out_dims)(tangents)
                folding.check()
            products.append(features if reduce is None else reduce(outputs, features))
        return outputs, torch.cat(products, dim=-1)  # type: ignore[possibly-undefined] - there is a chunk

    def _cast(self, leaf: Any) -> Any:
        if self.dtype is None or not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.to(self.dtype)
