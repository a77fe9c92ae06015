"""Checks: that what was timed computes what attention is, whatever lay where."""

from __future__ import annotations

import math
from contextlib import closing

import torch

from tiermem.attention.pool_view import TORCH_DTYPES
from tiermem.errors import InvariantError
from tiermem.layout import PageLayout
from tiermem.manager import TierManager

LOGITS_TOLERANCE = {torch.float16: 0.03, torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Of the norm of a token's logits, by dtype: tens of layers that round differently."""
OUTPUT_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}
"""Of the norm of a head's output: about four times one rounding of every element."""
SEED = 5


def check_logits(name: str, found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference of any token's logits (tokens, vocabulary), of their norm.

    Parameters
    ----------
    wanted: of another run that was given the same tokens; it may have more of them.

    Raises
    ------
    InvariantError: larger than rounding explains, or not a number.
    """
    wanted = wanted[: len(found)]
    worst = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    tolerance = LOGITS_TOLERANCE[dtype]
    if not worst <= tolerance:
        raise InvariantError(
            f"{name}: logits differ by {worst:.2g} of their norm, more than {tolerance}"
        )
    return worst


def check_attention(manager: TierManager, ids: torch.Tensor, q_heads: int) -> float:
    """One more step over tokens `ids` (tokens,), its output in several layers against float64.

    K and V are read back for that. The largest difference of any head's output, of its norm.

    Raises
    ------
    InvariantError: larger than rounding explains.
    """
    layout = manager.layout
    layers = sorted({0, layout.num_layers // 2, layout.num_layers - 1})
    make = torch.Generator(manager.torch_device).manual_seed(SEED)
    with closing(manager.open_sequence(ids)) as sequence:
        outs = {}
        with manager.step([sequence]) as step:
            for layer in range(layout.num_layers):
                q, k, v = _row(layout, q_heads, make)
                step.append(layer, k, v)
                out = step.attend(layer, q)
                if layer in layers:
                    outs[layer] = (q[0], out[0])
        worst = 0.0
        for layer, (q_row, out_row) in outs.items():
            keys, values = sequence.read(layer, 0, sequence.num_tokens)
            wanted = _attend(q_row, keys, values)
            differs = (out_row.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            worst = max(worst, float(differs.max()))
    tolerance = OUTPUT_TOLERANCE[TORCH_DTYPES[layout.dtype]]
    if not worst <= tolerance:
        raise InvariantError(
            f"attention over {sequence.num_tokens} tokens differs from float64 by {worst:.2g} of the "
            f"norm of a head's output, more than {tolerance}"
        )
    return worst


def _row(
    layout: PageLayout, q_heads: int, make: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one token, (1, heads, head_dim)."""
    heads = (q_heads, layout.num_kv_heads, layout.num_kv_heads)
    q, k, v = (
        torch.randn(
            (1, count, layout.head_dim), generator=make,
            dtype=TORCH_DTYPES[layout.dtype], device=make.device,
        )
        for count in heads
    )  # fmt: skip
    return q, k, v


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One row in float64: q (q_heads, head_dim) over (tokens, kv_heads, head_dim), a head of K and V at a time."""
    kv_heads = keys.shape[1]
    outs = []
    for head, rows in enumerate(q.double().unflatten(0, (kv_heads, -1))):
        scores = rows @ keys[:, head].double().T / math.sqrt(q.shape[1])
        outs.append(torch.softmax(scores, -1) @ values[:, head].double())
    return torch.cat(outs)
