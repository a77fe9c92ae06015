"""How near does decoding a 33B model over 32,768 resident tokens come to contiguous KV, and to the memory's rate?

Random weights of the shape "33b", fp16, batch 1. tiermem's captured decode; the same model captured with
contiguous KV and torch's fused attention (its best backend); transformers' dynamic cache, launched eagerly; and
tiermem's captured decode of the same model with its products and norms compiled by torch. All get the same tokens,
and their logits are compared.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from common import Place, feed, main, prefill
from contiguous_cache import ContiguousCache, Grouping, contiguous_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from tiermem import PageLayout, TierConfig
from tiermem.bench.result import Ceiling, Result, Subject, measured
from tiermem.cli.model_files import random_model
from tiermem.errors import InvariantError
from tiermem.integrations.transformers import TieredCache
from tiermem.measure.recorded import Recorded
from tiermem.model_shape import ModelShape, TierSizes
from tiermem.units import Size, SizeKind

NAME = "resident_33b"
CONTEXT, QUICK_CONTEXT = 32_768, 256
NEW_TOKENS, QUICK_NEW_TOKENS = 48, 8
SKIPPED_TOKENS = 4
"""The first ones compile and capture."""
CHUNK = 2048
SHARE_TARGET = 97.0
RATIO_TARGET = 3.0
TOLERANCE = 0.03
"""Norm of the difference of logits, of their norm: 62 layers in fp16 that round differently."""
FUSED = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def compare(place: Place) -> Iterator[Result]:
    """Tokens a second of each, and what they come to."""
    shape, context, count = _size(place)
    model = random_model(shape, place.on, "auto", 0)
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocab_size, (1, context), generator=make).to(place.on)
    tokens = torch.randint(shape.vocab_size, (count,), generator=make).tolist()
    parameters = {
        "model": shape.name, "context": context, "batch": 1,
        "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    read_bytes = _weight_bytes(model) + context * _token_bytes(model, shape)
    bound = Ceiling(
        "weights and KV read once a token at the memory's read rate",
        place.ceilings.hbm_read_rate() / read_bytes,
    )

    dynamic = DynamicCache()
    prefill(model, dynamic, ids, CHUNK)
    backend, captured_s, captured_logits = _contiguous(place, model, dynamic, tokens[0], count)
    dynamic_s, wanted = feed(place, model, dynamic, tokens)
    del dynamic
    _check("contiguous", captured_logits, wanted[:1])
    tiered_s, logits = _tiered(place, model, shape, ids, tokens)
    _check("tiermem", logits, wanted)
    _compile_parts(model, place)
    compiled_s, logits = _tiered(place, model, shape, ids, tokens)
    _check("tiermem, compiled", logits, wanted)

    rates = {
        "tiermem, captured": [1 / seconds for seconds in tiered_s],
        "tiermem, captured, parts compiled": [1 / seconds for seconds in compiled_s],
        "contiguous KV and torch SDPA, captured": [1 / seconds for seconds in captured_s],
        "transformers' dynamic cache, eager": [1 / seconds for seconds in dynamic_s],
    }
    for name, values in rates.items():
        note = backend if name.startswith("contiguous") else ""
        yield measured(Subject(NAME, name, parameters, "tokens/s", note=note), values, bound)
    aims = not place.is_quick
    contiguous = Ceiling("contiguous KV and torch SDPA, captured", _median(captured_s) ** -1)
    subject = Subject(
        NAME, "tiermem over contiguous KV", parameters, "tokens/s",
        target_percent=SHARE_TARGET if aims else None,
    )  # fmt: skip
    yield measured(subject, rates["tiermem, captured"], contiguous)
    ratios = {"tiermem": tiered_s, "tiermem, parts compiled,": compiled_s}
    for name, seconds in ratios.items():
        subject = Subject(
            NAME, f"{name} over the dynamic cache", parameters, "x",
            budget=RATIO_TARGET if aims else None,
        )  # fmt: skip
        yield measured(subject, [_median(dynamic_s) / _median(seconds)], "a ratio has no ceiling")


def _size(place: Place) -> tuple[ModelShape, int, int]:
    if not place.is_quick:
        return ModelShape.from_profile("33b"), CONTEXT, NEW_TOKENS
    sizes = TierSizes(*(Size(SizeKind.EXPLICIT, 1 << 20) for _ in range(3)))
    tiny = ModelShape("tiny", 2, 128, 4, 2, 32, 256, 264, "float16", sizes)
    return tiny, QUICK_CONTEXT, QUICK_NEW_TOKENS


def _compile_parts(model: PreTrainedModel, place: Place) -> None:
    """Let torch compile what decoding reads weights with: one program for all layers, tuned for this GPU."""
    how: dict[str, object] = {"backend": "eager"}
    if not place.is_quick:
        # With this option products of one row become reductions that are fused and tuned.
        how = {"options": {"coordinate_descent_tuning": True}}
    for layer in model.model.layers:
        attention = layer.self_attn
        parts = [layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        parts += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        for part in parts:
            part.compile(dynamic=False, **how)


def _tiered(
    place: Place, model: PreTrainedModel, shape: ModelShape, ids: torch.Tensor, tokens: list[int]
) -> tuple[list[float], torch.Tensor]:
    """Seconds of each token but the first ones, and the logits of all."""
    item = str(model.dtype).removeprefix("torch.")
    layout = PageLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, item, 64)
    pages = layout.pages_for(ids.shape[1] + len(tokens)) + 4
    config = TierConfig(gpu=pages * layout.slot_bytes, ram=0, device=str(place.on))
    with TieredCache(model, config, model_id=shape.name) as cache:
        prefill(model, cache, ids, CHUNK)
        seconds, logits = feed(place, model, cache, tokens)
    return seconds[SKIPPED_TOKENS:], logits


@torch.no_grad()
def _contiguous(
    place: Place, model: PreTrainedModel, dynamic: DynamicCache, token: int, count: int
) -> tuple[str, list[float], torch.Tensor]:
    """The best backend's name, seconds of each replay of one token, and its logits (1, vocabulary)."""
    cache = ContiguousCache(dynamic)
    ids = torch.tensor([[token]], device=place.on)
    positions = torch.full_like(ids, cache.past_tokens)
    found = []
    for name, context, grouping in _backends(place):
        logits: list[torch.Tensor] = []

        def forward(logits: list[torch.Tensor] = logits) -> None:
            out = model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits[:] = [out.logits[0, -1:]]

        try:
            with context, contiguous_attention(model, grouping), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of each reason why one is not used
                recorded = Recorded(place.device, forward)
                seconds = [_timed(place, recorded) for _ in range(count)][SKIPPED_TOKENS:]
        except RuntimeError:
            continue  # not for this GPU, or not for these shapes
        found.append((name, seconds, logits[0].float()))
        del recorded
    return min(found, key=lambda item: _median(item[1]))


def _timed(place: Place, recorded: Recorded) -> float:
    place.synchronize()
    start_s = time.perf_counter()
    recorded.replay()
    place.synchronize()
    return time.perf_counter() - start_s


def _backends(place: Place) -> Iterator[tuple[str, AbstractContextManager[object], Grouping]]:
    for grouping in Grouping:
        if place.on.type != "cuda":
            yield f"CPU, query heads {grouping.value}", nullcontext(), grouping
            continue
        for name, backend in FUSED.items():
            yield f"{name}, query heads {grouping.value}", sdpa_kernel([backend]), grouping


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a token needs: all but the rows of the embedding that it is not."""
    embedding = model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)


def _token_bytes(model: PreTrainedModel, shape: ModelShape) -> int:
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * model.dtype.itemsize


def _check(name: str, logits: torch.Tensor, wanted: torch.Tensor) -> None:
    worst = float(((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    if not worst <= TOLERANCE:
        raise InvariantError(
            f"{name}: logits differ from the dynamic cache's by {worst:.2g} of their norm, more "
            f"than {TOLERANCE}"
        )


def _median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    sys.exit(main(__doc__, compare))
