"""Decoder: a Llama-family model with random weights, to measure decode steps without transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear, rms_norm, silu

from tiermem.attention.pool_view import TORCH_DTYPES
from tiermem.model_shape import ModelShape
from tiermem.step import Step

SCALE = 0.02
"""Standard deviation of the weights: what activations stay finite with."""
ROPE_BASE = 10_000.0


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The matrices of one layer, (output features, input features): q, k and v in one, gate and up in one."""

    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Decoder:
    """Random weights on `device`; the same for every shape and seed.

    Raises
    ------
    RuntimeError: torch finds no room for the weights.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self.shape = shape
        self._dtype = TORCH_DTYPES[shape.dtype]
        self._device = device
        self._random = torch.Generator(device).manual_seed(0)
        hidden, inner = shape.hidden_size, shape.intermediate_size
        q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self._layers = [
            Layer(
                self._matrix(q_width + 2 * kv_width, hidden),
                self._matrix(hidden, q_width),
                self._matrix(2 * inner, hidden),
                self._matrix(hidden, inner),
            )
            for _ in range(shape.num_layers)
        ]
        self._embedding = self._matrix(shape.vocab_size, hidden)
        self._head = self._matrix(shape.vocab_size, hidden)
        self._norm = torch.ones(hidden, dtype=self._dtype, device=device)
        half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        self._frequencies = ROPE_BASE**-half

    def decode(self, step: Step, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The likeliest next token of each sequence.

        Parameters
        ----------
        ids, positions: (sequences,) int64, the new token of each and where it stands.

        Returns
        -------
        (sequences,) int64.
        """
        shape = self.shape
        x = self._embedding[ids]
        angles = positions[:, None, None] * self._frequencies
        cos, sin = angles.cos().to(self._dtype), angles.sin().to(self._dtype)
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        for index, layer in enumerate(self._layers):
            qkv = linear(self._normed(x), layer.qkv).view(len(ids), -1, shape.head_dim)
            q, k, v = qkv.split(heads, dim=1)
            rotated = _rotated(torch.cat((q, k), dim=1), cos, sin)
            step.append(index, rotated[:, shape.num_heads :], v)
            out = step.attend(index, rotated[:, : shape.num_heads])
            x = x + linear(out.reshape(len(ids), -1), layer.output)
            gate, up = linear(self._normed(x), layer.gate_up).chunk(2, dim=1)
            x = x + linear(silu(gate) * up, layer.down)
        return linear(self._normed(x), self._head).argmax(1)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._norm.shape, self._norm)

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        weights = torch.empty(rows, columns, dtype=self._dtype, device=self._device)
        return weights.normal_(0, SCALE, generator=self._random)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (rows, heads, head_dim), halves rotated against each other."""
    first, second = x.chunk(2, dim=2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2)
