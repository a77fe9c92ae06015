"""How much faster does a GPT-2 of 124M parameters decode with tiermem than with eager PyTorch?

The same random weights, batch 1, greedy: through `model.generate`, and in a loop that calls the model. Eager is
transformers' dynamic cache. Every token of tiermem's is checked against the plain model's logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from common import Place, decode_generate, decode_loop, main
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.cache_utils import Cache

from tiermem import TierConfig
from tiermem.bench.result import Ceiling, Result, Subject, measured
from tiermem.errors import InvariantError
from tiermem.integrations.transformers import TieredCache

NAME = "gpt2_decode"
TARGET_RATIO = 2.0
PROMPT_TOKENS = 64
NEW_TOKENS = 512
TOLERANCE = 0.05
"""Of the spread of the logits, by which a chosen token's may fall short of the largest: rounding to fp16."""

WAYS = {"generate": decode_generate, "loop": decode_loop}
NO_CEILING = "a ratio has no ceiling"


def compare(place: Place) -> Iterator[Result]:
    """Tokens a second of both caches in both ways, and their ratios."""
    model = _model(place)
    new_tokens = 24 if place.is_quick else NEW_TOKENS
    make = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), generator=make).to(place.on)
    bound = place.ceilings.hbm_read_rate() / _weight_bytes(model)
    ceiling = Ceiling("weights read once a token at the memory's read rate", bound)
    parameters = {
        "model": "gpt2-124m" if not place.is_quick else "tiny gpt2",
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": PROMPT_TOKENS, "new_tokens": new_tokens,
    }  # fmt: skip
    config = TierConfig(gpu="256MiB", ram=0, device=str(place.on))
    for way, run in WAYS.items():
        with TieredCache(model, config) as cache:

            def tiered(run: Callable = run, cache: TieredCache = cache) -> tuple:
                cache.reset()
                return run(model, cache, prompt, new_tokens)

            tokens, tiered_s = _second(tiered)
        _check(model, prompt, tokens)
        _, eager_s = _second(lambda run=run: run(model, _eager(), prompt, new_tokens))
        subject = Subject(NAME, f"tiermem, {way}", parameters, "tokens/s")
        yield measured(subject, [1 / seconds for seconds in tiered_s], ceiling)
        subject = Subject(NAME, f"eager PyTorch, {way}", parameters, "tokens/s")
        yield measured(subject, [1 / seconds for seconds in eager_s], ceiling)
        subject = Subject(
            NAME, f"tiermem over eager, {way}", parameters, "x",
            budget=None if place.is_quick else TARGET_RATIO,
        )  # fmt: skip
        yield measured(subject, [sum(eager_s) / sum(tiered_s)], NO_CEILING)


def _second(run: Callable[[], tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """The second of two runs; the first one compiles and captures."""
    run()
    return run()


def _eager() -> Cache:
    return DynamicCache()


def _model(place: Place) -> PreTrainedModel:
    small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 257} if place.is_quick else {}
    config = GPT2Config(
        **small, bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=True
    )
    torch.manual_seed(0)
    dtype = torch.float16 if place.on.type == "cuda" else torch.float32
    return GPT2LMHeadModel(config).to(place.on, dtype).eval()


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a token needs: all but the positions it is not at."""
    positions = model.transformer.wpe.weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not positions)


@torch.no_grad()
def _check(model: PreTrainedModel, prompt: torch.Tensor, tokens: list[int]) -> None:
    """Every token is the likeliest after those before it, but for rounding."""
    chosen = torch.tensor([tokens], device=prompt.device)
    ids = torch.cat([prompt, chosen], dim=1)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, prompt.shape[1] - 1 :].float()
    short = logits.amax(-1) - logits.gather(1, chosen[0, :, None])[:, 0]
    worst = float((short / logits.std(-1)).max())
    if not worst <= TOLERANCE:
        raise InvariantError(
            f"a token's logit falls {worst:.2g} of their spread short of the largest, more than "
            f"{TOLERANCE}"
        )


if __name__ == "__main__":
    sys.exit(main(__doc__, compare))
