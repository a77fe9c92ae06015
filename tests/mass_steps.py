"""Steps whose outputs and pages' mass are compared with a softmax in float64, on any device."""

from __future__ import annotations

import torch
from texts import Q_HEADS, TOLERANCE, Text

from tiermem import Step, TierManager

MASS_ERROR = 2e-5
"""Of a page's share: K, V and q are exact, products are summed in float32."""


def mass_of(
    text: Text, layer: int, q: torch.Tensor, window: int | None, page_tokens: int
) -> torch.Tensor:
    """(rows, q_heads, pages) in float64: the softmax's weights of the last tokens, summed page by page."""
    group, total = Q_HEADS // text.k.shape[2], text.k.shape[1]
    k = text.k[layer].double().repeat_interleave(group, 1)
    scores = torch.einsum("rhd,nhd->rhn", q.double(), k) * q.shape[-1] ** -0.5
    rows, columns = torch.arange(total - len(q), total)[:, None], torch.arange(total)[None]
    seen = (columns <= rows) & (columns > rows - (window or total))
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), -1)
    padded = torch.nn.functional.pad(weights, (0, -total % page_tokens))
    return padded.unflatten(2, (-1, page_tokens)).sum(3)


def run_step(
    manager: TierManager, texts: list[Text], counts: list[int], window: int | None = None
) -> None:
    """One step of new random tokens, whose outputs and mass are compared with float64."""
    layout = manager.layout
    for text, count in zip(texts, counts, strict=True):
        text.draw(count)
    longest = max(layout.pages_for(text.k.shape[1]) for text in texts)
    results = []
    with manager.step([text.sequence for text in texts], counts) as step:
        for layer in range(layout.num_layers):
            append(manager, step, layer, texts, counts)
            q = torch.randn(sum(counts), Q_HEADS, layout.head_dim).to(texts[0].k.dtype)
            out, mass = step.attend_with_mass(layer, q.to(manager.torch_device), window=window)
            assert mass.dtype == torch.float32 and mass.device == manager.torch_device
            assert mass.shape == (len(q), Q_HEADS, longest)
            results.append((layer, q, out, mass))
    for layer, q, out, mass in results:
        parts = (q.split(counts), out.cpu().split(counts), mass.cpu().split(counts))
        for text, rows, part, its in zip(texts, *parts, strict=True):
            check(text, layer, rows, part, its, window, layout.page_tokens)


def append(
    manager: TierManager, step: Step, layer: int, texts: list[Text], counts: list[int]
) -> None:
    """The last `counts` tokens of each text."""
    news = list(zip(texts, counts, strict=True))
    k = torch.cat([text.k[layer, -count:] for text, count in news])
    v = torch.cat([text.v[layer, -count:] for text, count in news])
    step.append(layer, k.to(manager.torch_device), v.to(manager.torch_device))


def check(
    text: Text,
    layer: int,
    q: torch.Tensor,
    out: torch.Tensor,
    mass: torch.Tensor,
    window: int | None,
    page_tokens: int,
) -> None:
    """Compare the output and mass of the last tokens of one text."""
    want = text.wanted(layer, q, window)
    dtype = str(text.k.dtype).removeprefix("torch.")
    assert (out.double() - want).norm() < TOLERANCE[dtype] * want.norm()
    wanted = mass_of(text, layer, q, window, page_tokens)
    pages = wanted.shape[2]
    assert (mass[..., :pages].double() - wanted).abs().max() < MASS_ERROR
    assert (mass[..., pages:] == 0).all()
    assert ((mass.sum(2) - 1).abs() < 1e-4).all()


def poison(manager: TierManager) -> None:
    """NaN: what nobody wrote must not be read."""
    for pool in manager._core.pools.values():
        pool.memory.tensor.fill_(0xFF)
