"""Sequences with random K and V, and steps of them compared with float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from tiermem import PageLayout, Sequence, TierConfig, TierManager
from tiermem.store_format import TRAILER_BYTES

PAGE = 16
Q_HEADS = 6


def layout_of(dtype: str = "float16") -> PageLayout:
    return PageLayout(num_layers=2, num_kv_heads=2, head_dim=32, dtype=dtype, page_tokens=PAGE)


def config_of(
    layout: PageLayout, gpu: int, ram: int, ssd: int = 0, path: Path | None = None, **more: object
) -> TierConfig:
    store = ssd * (layout.slot_bytes + TRAILER_BYTES + 8192) + (1 << 20) if ssd else 0
    return TierConfig(
        gpu=gpu * layout.slot_bytes, ram=ram * layout.slot_bytes, ssd=store, ssd_path=path,
        staging_pages=1, device="cpu", low_watermark=0.0, high_watermark=0.0, **more,
    )  # type: ignore[arg-type]  # fmt: skip


@dataclass(eq=False)
class Text:
    """One sequence, and all K and V that were appended to it: (layers, tokens, kv_heads, head_dim)."""

    sequence: Sequence
    k: torch.Tensor
    v: torch.Tensor
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))

    @classmethod
    def new(cls, manager: TierManager) -> Text:
        layout = manager.layout
        shape = (layout.num_layers, 0, layout.num_kv_heads, layout.head_dim)
        empty = torch.empty(shape, dtype=getattr(torch, layout.dtype))
        return cls(manager.open_sequence(), empty, empty)

    def draw(self, count: int) -> None:
        layers, _, heads, dim = self.k.shape
        for name in ("k", "v"):
            old = getattr(self, name)
            new = torch.randn(layers, count, heads, dim, generator=self.random).to(old.dtype)
            setattr(self, name, torch.cat([old, new], 1))

    def wanted(self, layer: int, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """Attention of the last tokens, in float64."""
        group, total = Q_HEADS // self.k.shape[2], self.k.shape[1]
        k = self.k[layer].double().repeat_interleave(group, 1)
        v = self.v[layer].double().repeat_interleave(group, 1)
        scores = torch.einsum("rhd,nhd->hrn", q.double(), k) * q.shape[-1] ** -0.5
        rows = torch.arange(total - len(q), total)[:, None]
        columns = torch.arange(total)[None]
        unseen = columns > rows
        if window is not None:
            unseen |= columns <= rows - window
        scores.masked_fill_(unseen, -torch.inf)
        return torch.einsum("hrn,nhd->rhd", torch.softmax(scores, -1), v)


def run_step(
    manager: TierManager, texts: list[Text], counts: list[int], window: int | None = None
) -> float:
    """One step of new random tokens; the largest error of its outputs, relative to their norm."""
    layout, worst = manager.layout, 0.0
    for text, count in zip(texts, counts, strict=True):
        text.draw(count)
    with manager.step([text.sequence for text in texts], counts) as step:
        for layer in range(layout.num_layers):
            news = list(zip(texts, counts, strict=True))
            step.append(
                layer,
                torch.cat([text.k[layer, -count:] for text, count in news]),
                torch.cat([text.v[layer, -count:] for text, count in news]),
            )
            q = torch.randn(sum(counts), Q_HEADS, layout.head_dim).to(texts[0].k.dtype)
            out = step.attend(layer, q, window=window)
            parts = q.split(counts)
            want = torch.cat(
                [t.wanted(layer, part, window) for t, part in zip(texts, parts, strict=True)]
            )
            worst = max(worst, float((out.double() - want).norm() / want.norm()))
    return worst


TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
"""One rounding of the output to the dtype, and a little."""
