"""Products: what the matrix products of a decode step cost that multiply one row by weights.

The time of a product is a constant for its start and end, and its weights by the rate at which they are read. Two
layers of different sizes are timed, and both are solved for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from tiermem.device.protocol import Device
from tiermem.measure.recorded import Recorded
from tiermem.measure.timing import time_device

MIN_FEATURES = 16


@dataclass(frozen=True, slots=True)
class ProductCosts:
    """read_rate: bytes of weights a second. each_s: what one product takes besides."""

    read_rate: float
    each_s: float


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Features of a model's layer: of the residual stream, of K (and of V), of the MLP."""

    hidden: int
    kv: int
    inner: int

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(output, input) features of q, k, v, the output, gate, up and down."""
        hidden, kv, inner = self.hidden, self.kv, self.inner
        square, wide = (hidden, hidden), (inner, hidden)
        return (square, (kv, hidden), (kv, hidden), square, wide, wide, (hidden, inner))

    @property
    def num_weights(self) -> int:
        """Elements of all matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    def divided(self, by: int) -> LayerShape:
        """A layer of the same kind, `by` times as narrow."""
        return LayerShape(
            *(max(size // by, MIN_FEATURES) for size in (self.hidden, self.kv, self.inner))
        )


LARGE = LayerShape(hidden=7168, kv=1024, inner=19200)
"""Of a 33B model with grouped queries: 1.06 GB in half precision."""
SMALL = LayerShape(hidden=4096, kv=4096, inner=11008)
"""Of a 7B model: 0.40 GB."""


def product_costs(
    device: Device, memory: torch.Tensor, dtype: torch.dtype, repeats: int
) -> ProductCosts:
    """Measure the products of both layers, as CUDA graphs where there is a GPU.

    Parameters
    ----------
    memory: uint8 on the device, of finite numbers in `dtype`; where it is too small for the layers, narrower ones
        are timed.
    """
    weights = memory.view(dtype)
    narrower = 1
    while LARGE.divided(narrower).num_weights > weights.numel():
        narrower *= 2
    sizes, times = [], []
    for shape in (LARGE.divided(narrower), SMALL.divided(narrower)):
        layers = _layers(shape, weights)
        times.append(_time(device, layers, shape, repeats) / len(layers))
        sizes.append(shape.num_weights * dtype.itemsize)
    return solve(sizes, times, len(LARGE.matrices))


def solve(sizes: Sequence[int], times: Sequence[float], products: int) -> ProductCosts:
    """The costs from the bytes and seconds of the larger and of the smaller layer, of so many products each.

    Where the times do not fit such costs, products cost nothing besides reading the larger layer.
    """
    (large, small), (large_s, small_s) = sizes, times
    if large_s > small_s:
        rate = (large - small) / (large_s - small_s)
        each_s = (small_s - small / rate) / products
        if each_s >= 0:
            return ProductCosts(rate, each_s)
    return ProductCosts(large / large_s, 0.0)


def _layers(shape: LayerShape, weights: torch.Tensor) -> list[list[torch.Tensor]]:
    """As many layers as fit `weights`, each of memory of its own, so that no cache holds them."""
    layers = []
    for start in range(0, weights.numel() - shape.num_weights + 1, shape.num_weights):
        parts = weights[start : start + shape.num_weights].split([r * c for r, c in shape.matrices])
        layers.append([p.view(size) for p, size in zip(parts, shape.matrices, strict=True)])
    return layers


def _time(
    device: Device, layers: list[list[torch.Tensor]], shape: LayerShape, repeats: int
) -> float:
    row = torch.ones(
        1, max(shape.hidden, shape.inner), dtype=layers[0][0].dtype, device=device.torch_device
    )

    def run() -> None:
        for layer in layers:
            for weight in layer:
                linear(row[:, : weight.shape[1]], weight)

    recorded = Recorded(device, run)
    return time_device(device, recorded.replay, repeats, warmups=2).median_s
