"""Weights: how many bytes a model's weights take in a format, and how few bits a weight would fit."""

from __future__ import annotations

from enum import Enum

from tiermem.layout import ITEM_BYTES
from tiermem.model_shape import ModelShape

GROUP = 128
"""Weights that share a scale (and a zero point) in the formats of few bits."""
SCALE_BITS = 16
EMBEDDING_BITS = 16
"""Embedding and output matrix stay in half precision, as the common formats leave them."""


class WeightFormat(Enum):
    """How the weights of the layers are stored."""

    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


def bits_with_scales(bits: int) -> float:
    """Bits a weight of a format in groups, with its share of scale and zero point: 4 become 4.16.

    8 bits are scaled by output channel, which takes next to nothing.
    """
    return float(bits) if bits >= 8 else bits + (SCALE_BITS + bits) / GROUP


BITS = {
    WeightFormat.FP16: 16.0,
    WeightFormat.INT8: bits_with_scales(8),
    WeightFormat.INT4: bits_with_scales(4),
}
FEW_BITS = (3, 2)
"""What is tried, with a warning about quality, when 4 bits do not fit."""


def embedding_parameters(shape: ModelShape) -> int:
    """Elements of the embedding, and as many of the output matrix."""
    return shape.vocab_size * shape.hidden_size


def num_parameters(shape: ModelShape) -> int:
    """All weights of the model."""
    return shape.weight_bytes // ITEM_BYTES[shape.dtype]


def layer_parameters(shape: ModelShape) -> int:
    """Weights of the layers: all but embedding and output matrix."""
    return num_parameters(shape) - 2 * embedding_parameters(shape)


def bytes_at(shape: ModelShape, bits: float) -> int:
    """Bytes of all weights with `bits` for each weight of the layers."""
    outside = 2 * embedding_parameters(shape) * EMBEDDING_BITS / 8
    return int(layer_parameters(shape) * bits / 8 + outside)


def bytes_read(shape: ModelShape, bits: float) -> int:
    """Bytes that one step reads: all but the embedding, of which it reads a row a token."""
    return bytes_at(shape, bits) - embedding_parameters(shape) * EMBEDDING_BITS // 8


def bits_that_fit(shape: ModelShape, num_bytes: int) -> float:
    """The most bits a weight of the layers could have, scales included, to fit `num_bytes`; 0 for none."""
    left = num_bytes - 2 * embedding_parameters(shape) * EMBEDDING_BITS / 8
    return max(0.0, 8 * left / layer_parameters(shape))
