"""How many bits does a byte of held-out text cost, given how many bytes before it?

    python -m models.context_curve --model models/reference --corpus corpus.npz --device cpu

The same target bytes are scored once per context length, so the curve shows what context buys.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.corpus import Corpus, load

CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384)
TARGET_BYTES = 256
SCORED_TOKENS_AT_ONCE = 65536


@dataclass(frozen=True, slots=True)
class Curve:
    """Bits per byte by context length over `target_bytes` bytes; the context is of the first
    target byte, later ones see up to 255 bytes more."""

    bits_per_byte: dict[int, float]
    target_bytes: int
    documents: int


def windows(corpus: Corpus, context: int, per_document: int) -> npt.NDArray[np.uint8]:
    """Evenly spaced windows of `context` + 256 bytes from every document that is long enough.

    Returns shape (windows, context + 256). The number of windows a document gives is bounded, so
    that one long document does not outweigh the others.
    """
    span = context + TARGET_BYTES
    chosen: list[npt.NDArray[np.uint8]] = []
    for text in corpus.documents():
        if len(text) < span:
            continue
        count = min(per_document, 1 + (len(text) - span) // TARGET_BYTES)
        starts = np.linspace(0, len(text) - span, count).astype(np.int64)
        chosen.extend(text[start : start + span] for start in starts)
    if not chosen:
        raise ValueError(f"no held-out document has {span} bytes; the longest context is too long")
    return np.stack(chosen)


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean cost of the last 256 tokens of each row of `tokens` (int64, (rows, length)), in bits."""
    batch = max(1, SCORED_TOKENS_AT_ONCE // tokens.shape[1])
    nats = 0.0
    for rows in torch.split(tokens, batch):
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -TARGET_BYTES:]).float()
        targets = rows[:, -TARGET_BYTES:]
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ).item()
    return nats / (tokens.shape[0] * TARGET_BYTES) / math.log(2)


def measure(
    model: PreTrainedModel, corpus: Corpus, contexts: Sequence[int], per_document: int
) -> Curve:
    """Score the same target bytes of `corpus` under each of `contexts`."""
    rows = windows(corpus, max(contexts), per_document)
    tokens = torch.from_numpy(rows).to(model.device, torch.int64)
    curve = {c: bits_per_byte(model, tokens[:, -(c + TARGET_BYTES) :]) for c in contexts}
    long_enough = sum(len(text) >= rows.shape[1] for text in corpus.documents())
    return Curve(curve, rows.shape[0] * TARGET_BYTES, long_enough)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--corpus", type=Path, required=True, help="written by models.corpus")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--windows", type=int, default=8, help="windows per document")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), local_files_only=True
    )
    torch.nn.Module.to(model, arguments.device)
    _, held_out = load(arguments.corpus)
    curve = measure(model, held_out, arguments.contexts, arguments.windows)
    print(f"{curve.target_bytes} bytes of {curve.documents} documents, {arguments.dtype}")
    print(json.dumps({str(context): round(b, 4) for context, b in curve.bits_per_byte.items()}))


if __name__ == "__main__":
    main()
