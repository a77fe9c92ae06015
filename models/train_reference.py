"""Train the reference model: a byte-level Llama of six million parameters that reads 16K bytes.

    python -m models.train_reference --corpus corpus.npz --out DIR --minutes 6

Training is bounded by the clock: the learning rate follows a cosine of the share of the time that
has passed, and each stage (a context length) gets a share of the time. Short contexts come first,
because they teach the language at a fraction of the cost; the long ones then teach the model to
look back. The model is written to DIR as fp16 every minute, so a run cut short leaves one behind.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from models import byte_tokenizer
from models.context_curve import CONTEXTS, Curve, measure
from models.corpus import Corpus, load

MAX_CONTEXT = 16384
FUSED_ATTENTION = "fused_causal"
PEAK_LEARNING_RATE = 3e-3
FLOOR_LEARNING_RATE = 0.02  # of the peak
WARM_UP_STEPS = 200
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
LOG_STEPS = 100
CHECKPOINT_S = 60.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A context length in tokens and the share of the training time it gets."""

    context: int
    share: float

    @staticmethod
    def parse(text: str) -> Stage:
        """Read `2048:0.55`."""
        context, share = text.split(":")
        return Stage(int(context), float(share))


@dataclass(frozen=True, slots=True)
class LogLine:
    """Where training stood: `loss` is the mean bits per byte since the line before."""

    step: int
    seconds: float
    bytes_seen: int
    context: int
    learning_rate: float
    loss: float


def fused_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention without a mask tensor: (batch, heads, tokens, head_dim) in,
    (batch, tokens, heads, head_dim) out. Rows of a batch are full, so no mask is ever needed."""
    # Rotary embedding leaves queries and keys in fp32, which no fused kernel takes.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def model_config() -> LlamaConfig:
    """The shape of the model: 6.4 million parameters, 4 KiB of fp16 KV cache a token."""
    return LlamaConfig(
        vocab_size=byte_tokenizer.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=byte_tokenizer.BOS_ID,
        eos_token_id=byte_tokenizer.EOS_ID,
        pad_token_id=byte_tokenizer.PAD_ID,
    )


def token_stream(corpus: Corpus, device: torch.device) -> Tensor:
    """All documents as one int16 tensor, each between a begin and an end token.

    Neighbours in it are neighbours in the source tree, so a window that crosses a boundary still
    has related text before it.
    """
    begin, end = np.array([byte_tokenizer.BOS_ID]), np.array([byte_tokenizer.EOS_ID])
    pieces = [np.concatenate((begin, text, end)) for text in corpus.documents()]
    return torch.from_numpy(np.concatenate(pieces).astype(np.int16)).to(device)


def sample(stream: Tensor, rows: int, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets, int64 (rows, context), from uniformly drawn positions."""
    starts = torch.randint(len(stream) - context, (rows, 1), device=stream.device)
    window = stream[starts + torch.arange(context + 1, device=stream.device)].long()
    return window[:, :-1], window[:, 1:]


def optimizer_for(model: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays the matrices but neither the embedding nor the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up in steps, then a cosine over `progress` (0 to 1, the share of the time)."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    decayed = FLOOR_LEARNING_RATE + (1.0 - FLOOR_LEARNING_RATE) * cosine
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * decayed


class Trainer:
    """One training run: the model, its optimizer, and the clock that ends it."""

    def __init__(self, corpus: Corpus, out: Path, device: torch.device, compiled: bool) -> None:
        AttentionInterface.register(FUSED_ATTENTION, fused_attention)
        config = model_config()
        config._attn_implementation = FUSED_ATTENTION
        self.device = device
        self.out = out
        self.stream = token_stream(corpus, device)
        self.model = LlamaForCausalLM(config)
        nn.Module.to(self.model, device)
        self.optimizer = optimizer_for(self.model, device)
        self.log: list[LogLine] = []
        self.step = 0
        self.bytes_seen = 0
        self._loss: Callable[[Tensor, Tensor], Tensor] = self._head_loss
        if compiled:
            # Layer by layer: eight layers share one compilation, where a whole model takes minutes.
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self._loss = torch.compile(self._head_loss, dynamic=False)

    def run(self, stages: list[Stage], batch_tokens: int, budget_s: float) -> None:
        """Train through `stages` until the budget is spent; write the model every minute."""
        start = time.monotonic()
        saved = start
        ends = np.cumsum([stage.share for stage in stages]) / sum(s.share for s in stages)
        losses = torch.zeros((), device=self.device)
        while (progress := (time.monotonic() - start) / budget_s) < 1.0:
            stage = stages[int(np.searchsorted(ends, progress, side="right"))]
            rate = learning_rate(self.step, progress)
            losses += self._train_step(stage.context, max(1, batch_tokens // stage.context), rate)
            if self.step % LOG_STEPS == 0:
                self._note(time.monotonic() - start, stage.context, rate, losses.item())
                losses.zero_()
            if time.monotonic() - saved > CHECKPOINT_S:
                self.export()
                saved = time.monotonic()
        self.export()

    def _train_step(self, context: int, rows: int, rate: float) -> Tensor:
        """One optimizer step; returns the loss in bits per byte without waiting for it."""
        inputs, targets = sample(self.stream, rows, context)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
            loss = self._loss(hidden, targets)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.bytes_seen += rows * context
        return loss.detach() / math.log(2)

    def _head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _note(self, seconds: float, context: int, rate: float, summed_loss: float) -> None:
        line = LogLine(
            self.step, round(seconds, 1), self.bytes_seen, context, rate, summed_loss / LOG_STEPS
        )
        self.log.append(line)
        print(
            f"step {line.step}  {line.seconds:.0f} s  {line.bytes_seen / 1e6:.0f} MB seen  "
            f"context {context}  rate {rate:.2e}  {line.loss:.4f} bits/byte",
            flush=True,
        )

    def export(self) -> None:
        """Write the weights as fp16, with the configuration and the tokenizer, into `out`."""
        model = LlamaForCausalLM(model_config())
        model.load_state_dict(self.model.state_dict())
        nn.Module.to(model, torch.float16)
        model.config.dtype = torch.float16
        model.save_pretrained(self.out)
        byte_tokenizer.build(MAX_CONTEXT).save_pretrained(self.out)
        log = [asdict(line) for line in self.log]
        (self.out / "training.json").write_text(json.dumps(log), encoding="utf-8")


def evaluate(out: Path, held_out: Corpus, device: torch.device, contexts: list[int]) -> Curve:
    """Load what was written, as anyone would, and measure it: fp16 on a GPU, else fp32."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = LlamaForCausalLM.from_pretrained(
        out, dtype=dtype, attn_implementation=FUSED_ATTENTION, local_files_only=True
    )
    nn.Module.to(model, device)
    return measure(model, held_out, contexts, per_document=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, required=True, help="written by models.corpus")
    parser.add_argument("--out", type=Path, required=True, help="where the model is written")
    parser.add_argument("--minutes", type=float, default=6.0, help="training time")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--stages", type=Stage.parse, nargs="+", metavar="CONTEXT:SHARE")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stages = arguments.stages or [Stage(2048, 0.45), Stage(16384, 0.55)]

    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    # The unfused kernel holds tokens x tokens scores: better to fail than to crawl.
    torch.backends.cuda.enable_math_sdp(False)
    device = torch.device(arguments.device)
    train, held_out = load(arguments.corpus)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(train, arguments.out, device, compiled=not arguments.no_compile)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters} parameters, {len(trainer.stream)} tokens of text", flush=True)
    trainer.run(stages, arguments.batch_tokens, arguments.minutes * 60.0)
    curve = evaluate(arguments.out, held_out, device, arguments.contexts)
    print(json.dumps(asdict(curve)), flush=True)
    (arguments.out / "curve.json").write_text(json.dumps(asdict(curve)), encoding="utf-8")


if __name__ == "__main__":
    main()
