"""Loop: one prompt through a model, with any cache: prefill in chunks, then transformers' own generate.

With drafts, for a TieredCache, PromptLookup takes the place of transformers' loop within its generate.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from tiermem.integrations.transformers import Acceptance, PromptLookup


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0: always the likeliest; `top_p` and `seed` matter above 0 only.

    `draft_tokens` is the most that is drafted for a pass; it changes how fast tokens come, not which.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    draft_tokens: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0

    def arguments(self) -> dict[str, object]:
        """For `model.generate`; what a model's own generation settings say of sampling does not count."""
        common = {"max_new_tokens": self.max_new_tokens, "num_beams": 1}
        if self.is_greedy:
            return {**common, "do_sample": False}
        chances = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**common, **chances, "do_sample": True}


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told how far it is. `prefilled` gets (tokens in the cache, all tokens of the prompt, tokens computed,
    seconds), `token` each new id."""

    prefilled: Callable[[int, int, int, float], None]
    token: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from the start to the first token and to the last."""

    first_token_s: float
    last_token_s: float


@dataclass(frozen=True, slots=True)
class Generated:
    """New token ids, the end-of-text token included where there was one, and how long they took.

    `acceptance` says what drafts were good for; None without them.
    """

    token_ids: tuple[int, ...]
    times: Times
    acceptance: Acceptance | None = None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    sampling: Sampling,
    chunk_tokens: int,
    watcher: Watcher,
    processor: LogitsProcessor | None = None,
) -> Generated:
    """Continue `ids`; the tokens are those of `model.generate(ids, **sampling.arguments())` after the same seed.

    Parameters
    ----------
    cache: empty, or with a beginning of `ids` attached, but not with all of them.
    ids: int64 (1, tokens) on the model's device.
    chunk_tokens: at least 1; the most prompt tokens of one pass, which bounds the activations.
    processor: sees, and may change, the scores that every choice is made by.
    """
    start_s = time.perf_counter()
    prefill(model, cache, ids, chunk_tokens, watcher, start_s)
    relay = _Relay(watcher, start_s)
    lookup = PromptLookup(sampling.draft_tokens, streamer=relay) if sampling.draft_tokens else None
    torch.manual_seed(sampling.seed)
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        logits_processor=LogitsProcessorList([processor] if processor else []),
        **({"streamer": relay} if lookup is None else {"custom_generate": lookup}),
        **sampling.arguments(),
    )
    return Generated(
        tuple(relay.token_ids),
        Times(relay.first_s, relay.last_s),
        None if lookup is None else lookup.acceptance,
    )


def prefill(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    chunk_tokens: int,
    watcher: Watcher,
    start_s: float,
) -> None:
    """Put all of `ids` but the last chunk into `cache`."""
    only_last = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    total = ids.shape[1]
    attached = done = cache.get_seq_length()
    while total - done > chunk_tokens:
        watcher.prefilled(done, total, done - attached, time.perf_counter() - start_s)
        chunk = ids[:, done : done + chunk_tokens]
        model(input_ids=chunk, past_key_values=cache, use_cache=True, **only_last)
        done += chunk_tokens
    watcher.prefilled(done, total, done - attached, time.perf_counter() - start_s)


class _Relay(BaseStreamer):
    """Takes note of every new token and when it came."""

    def __init__(self, watcher: Watcher, start_s: float) -> None:
        self.token_ids: list[int] = []
        self.first_s = 0.0
        self.last_s = 0.0
        self._watcher = watcher
        self._start_s = start_s
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then each token, or all those of a pass."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.last_s = time.perf_counter() - self._start_s
        if not self.token_ids:
            self.first_s = self.last_s
        for token_id in value.flatten().tolist():
            self.token_ids.append(token_id)
            self._watcher.token(token_id)

    def end(self) -> None:
        """Nothing to do."""
