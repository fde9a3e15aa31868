"""How much is worked on at a time, by kind of device.

A CPU is fastest where that stays in its caches: on ResNet-20, 500 samples x 20 tangents take a third more time a sample
than 16 x 20. A GPU wants enough to hide the start of each kernel; its numbers are estimates, not yet measured on one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """Samples, bytes and numbers that are worked on at a time, at most."""

    samples: int  # that go through the network
    forward: int  # bytes of the largest activation, and of a copy, for all samples and tangents
    reverse: int  # bytes that a pass holds: what autograd saves, and a gradient of each layer's outputs a cotangent
    rows: int  # bytes of J, for one layer
    rows_in_groups: int  # the same, where one convolution has each sample as a group of channels
    directions: int  # bytes of a layer's directions, whose responses are computed: a library may copy them
    windows: int  # bytes of the windows of a convolution
    row_cost: int  # multiply-adds that it takes as long as to write and read an element of a row
    features: int  # numbers of features, for the curvature
    outputs: int  # sampled outputs, for an expectation
    reused_outputs: int  # the same, where they are worked on several times
    tuning: int  # sampled outputs, for the choice of the scales


CPU = Chunks(
    samples=64,
    forward=2**26,
    reverse=2**29,
    rows=2**24,
    rows_in_groups=3 * 2**20,
    directions=2**26,
    windows=2**28,
    row_cost=32,
    features=2**24,
    outputs=2**22,
    reused_outputs=2**19,
    tuning=2**21,
)
GPU = Chunks(
    samples=256,
    forward=2**32,
    reverse=2**34,
    rows=2**29,
    rows_in_groups=0,
    directions=2**29,
    windows=2**29,
    row_cost=128,
    features=2**26,
    outputs=2**26,
    reused_outputs=2**24,
    tuning=2**24,
)


def chunks(place: torch.device | Tensor) -> Chunks:
    """Those of a device, or of the device of a tensor."""
    device = place.device if isinstance(place, Tensor) else place
    return CPU if device.type == "cpu" else GPU
