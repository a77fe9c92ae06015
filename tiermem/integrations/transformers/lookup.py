"""PromptLookup: several tokens a pass, drafted from the text itself and kept only where the model agrees."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tiermem.errors import ConfigError, OutOfPagesError
from tiermem.integrations.transformers.cache import TieredCache
from tiermem.integrations.transformers.drafts import Drafts

MOST_DRAFT_TOKENS = 31
"""A step of the manager is made for up to 32 new tokens: these, and the one that is certain before them."""

DEFAULT_DRAFT_TOKENS = 8

READ_ARGUMENTS = frozenset(
    {"past_key_values", "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep"}
)  # fmt: skip
"""What transformers gives a decoding loop besides the ids, and what this one makes of its own."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What drafts were good for. `passes` are calls of the model after the prompt's; the others count tokens.

    `new_tokens` came out of those passes, `accepted_tokens` of them as they had been drafted.
    """

    passes: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def share(self) -> float | None:
        """Of the drafted tokens, those accepted; None where none were drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def tokens_per_pass(self) -> float | None:
        """1 without drafts; None without passes."""
        return self.new_tokens / self.passes if self.passes else None

    def plus(self, new_tokens: int, drafted_tokens: int, accepted_tokens: int) -> Acceptance:
        """With one pass more."""
        return Acceptance(
            self.passes + 1,
            self.new_tokens + new_tokens,
            self.drafted_tokens + drafted_tokens,
            self.accepted_tokens + accepted_tokens,
        )


class PromptLookup:
    """A decoding loop for `model.generate(ids, past_key_values=cache, custom_generate=PromptLookup())`.

    One pass of the model reads the cache once for the last token and a draft behind it: what followed the same
    words before, in the prompt or in what was generated. Drafted tokens are kept as far as the model would have
    chosen them itself; what it chooses after them comes on top; the rest is rolled back. So the tokens are those
    of decoding one by one, greedy or sampled after the same seed, but for rounding: a pass of several tokens may
    round logits otherwise than a pass of one, which decides between two candidates only where they are as good as
    equal.

    transformers' `prompt_lookup_num_tokens` works with a TieredCache too; it drafts from the first match instead
    of the best one, reads the whole text on the device for that, and does not say what was accepted.

    Parameters
    ----------
    max_draft_tokens: the most a draft has, 1 to 31. Drafts become shorter while they fail.
    streamer: is given the prompt and then new tokens, several at once; transformers does not hand the streamer of
        `generate` to a loop.
    """

    def __init__(
        self,
        max_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        *,
        streamer: BaseStreamer | None = None,
    ) -> None:
        if isinstance(max_draft_tokens, bool) or not isinstance(max_draft_tokens, int):
            raise TypeError(f"max_draft_tokens={max_draft_tokens!r}: must be an int")
        if not 1 <= max_draft_tokens <= MOST_DRAFT_TOKENS:
            raise ValueError(
                f"max_draft_tokens={max_draft_tokens}: must be 1 to {MOST_DRAFT_TOKENS}"
            )
        self.max_draft_tokens = max_draft_tokens
        self.acceptance = Acceptance()
        """Of the latest text."""
        self._streamer = streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: object,
    ) -> torch.Tensor:
        """Continue `input_ids` (1, tokens); returns them with what is new. As transformers calls it.

        Raises
        ------
        ConfigError: a kind of generation that needs another loop, or another cache.
        """
        cache = _check(input_ids, generation_config, model_kwargs)
        passes = _Passes(model, cache, model_kwargs.get("attention_mask"))
        choice = _Choice(logits_processor, stopping_criteria, bool(generation_config.do_sample))
        cache.activate_past_recording()
        self.acceptance = Acceptance()
        self._tell(input_ids)
        passes.prefill(input_ids, generation_config.prefill_chunk_size)
        ids, drafts = input_ids, Drafts(input_ids[0].tolist())
        draft: list[int] = []
        limit, is_first, is_done = self.max_draft_tokens, True, False
        while not is_done:
            text, draft, logits = passes.run_draft(ids, draft)
            new, accepted, is_done = choice.read(text, draft, logits)
            ids = torch.cat([ids, ids.new_tensor([new])], dim=1)
            # The last token is certain, and not stored yet: as after a pass without a draft.
            cache.crop(ids.shape[1] - 1 - text.shape[1])
            if not is_first:
                self.acceptance = self.acceptance.plus(len(new), len(draft), accepted)
            self._tell(ids[:, -len(new) :])
            drafts.extend(new)
            limit = self._next_limit(limit, len(draft), accepted)
            draft = drafts.draft(_at_most(limit, stopping_criteria, ids))
            is_first = False
        if self._streamer is not None:
            self._streamer.end()
        return ids

    def _next_limit(self, limit: int, drafted: int, accepted: int) -> int:
        """Two more after a draft that was right, one less after another: drafts that fail cost time."""
        if drafted == 0:
            return limit
        return min(limit + 2, self.max_draft_tokens) if accepted == drafted else max(limit - 1, 1)

    def _tell(self, ids: torch.Tensor) -> None:
        if self._streamer is not None:
            self._streamer.put(ids.cpu())


class _Passes:
    """Calls of the model with all of a text that is not in the cache yet."""

    def __init__(self, model: PreTrainedModel, cache: TieredCache, mask: object) -> None:
        self._model = model
        self._cache = cache
        self._mask = mask if isinstance(mask, torch.Tensor) and not bool(mask.all()) else None
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prefill(self, ids: torch.Tensor, chunk_tokens: int | None) -> None:
        """Store all of `ids` but the last chunk, where chunks are wanted."""
        while chunk_tokens and ids.shape[1] - self._cache.get_seq_length() > chunk_tokens:
            self.run(ids[:, : self._cache.get_seq_length() + chunk_tokens], 1)

    def run_draft(
        self, ids: torch.Tensor, draft: list[int]
    ) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """Store `ids` and the draft behind them; the text they make, the draft, and its logits as of `run`.

        Without the draft where the tiers have no room for it: what fits one by one is not to fail.
        """
        text = torch.cat([ids, ids.new_tensor([draft])], dim=1) if draft else ids
        try:
            return text, draft, self.run(text, 1 + len(draft))
        except OutOfPagesError:
            if not draft:
                raise
            return ids, [], self.run(ids, 1)

    def run(self, text: torch.Tensor, keep: int) -> torch.Tensor:
        """Store what is new of `text` (1, tokens); the logits (keep, vocabulary) of its last tokens."""
        past, end = self._cache.get_seq_length(), text.shape[1]
        arguments: dict[str, object] = {"logits_to_keep": keep} if self._can_keep else {}
        if self._mask is not None:
            real = self._mask.new_ones((1, end))
            real[:, : min(end, self._mask.shape[1])] = self._mask[:, :end]
            positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]
            arguments.update(attention_mask=real, position_ids=positions)
        result = self._model(
            input_ids=text[:, past:], past_key_values=self._cache, use_cache=True, **arguments
        )
        logits: torch.Tensor = result.logits[0, -keep:]
        return logits


class _Choice:
    """Chooses tokens from logits as transformers does: one after the other, each knowing those before it."""

    def __init__(
        self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, is_sampled: bool
    ) -> None:
        self._processors = processors
        self._criteria = criteria
        self._is_sampled = is_sampled

    def read(
        self, text: torch.Tensor, draft: list[int], logits: torch.Tensor
    ) -> tuple[list[int], int, bool]:
        """New tokens, how many of them were drafted, and whether the text ends with them.

        text: (1, tokens), of which the last are `draft`. logits: (1 + drafted tokens, vocabulary).
        """
        start = text.shape[1] - len(draft)
        new: list[int] = []
        for token in self._tokens(text, start, logits):
            accepted = len(new) < len(draft) and token == draft[len(new)]
            new.append(token)
            ids = text[:, : start + len(new)]
            if not accepted:
                last = text.new_tensor([[token]])
                ids = torch.cat([text[:, : start + len(new) - 1], last], dim=1)
            is_done = bool(self._criteria(ids, None).all())
            if is_done or not accepted:
                break
        return new, len(new) - (not accepted), is_done

    def _tokens(self, text: torch.Tensor, start: int, logits: torch.Tensor) -> Iterator[int]:
        """The choice by each row of `logits`; the one after the last that is asked for is never made."""
        if not self._processors and not self._is_sampled:
            yield from logits.argmax(dim=-1).tolist()
            return
        for i, row in enumerate(logits):
            row_scores = row[None].to(torch.float32, copy=True)
            scores = self._processors(text[:, : start + i], row_scores)  # type: ignore[arg-type]
            if self._is_sampled:
                yield int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
            else:
                yield int(scores.argmax(dim=-1))


def _at_most(limit: int, criteria: StoppingCriteriaList, ids: torch.Tensor) -> int:
    """A draft and the token after it must not go beyond the longest text wanted."""
    most = criteria.max_length
    return limit if most is None else max(0, min(limit, most - ids.shape[1] - 1))


def _check(
    ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, object]
) -> TieredCache:
    """The cache; raises ConfigError for what this loop does not do."""
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, TieredCache):
        raise ConfigError(
            f"past_key_values: PromptLookup needs a TieredCache, not {type(cache).__name__}"
        )
    if ids.shape[0] != 1 or (config.num_beams or 1) > 1:
        raise ConfigError(
            f"input_ids of {ids.shape[0]} rows: PromptLookup continues one text at a time, without beams"
        )
    if config.return_dict_in_generate:
        raise ConfigError("return_dict_in_generate=True: PromptLookup returns token ids alone")
    for name, value in model_kwargs.items():
        if value is not None and name not in READ_ARGUMENTS:
            raise ConfigError(f"{name}: an argument that PromptLookup does not hand on")
    columns = _mask_columns(model_kwargs.get("attention_mask"), config)
    if columns is not None and columns != ids.shape[1]:
        raise ConfigError(
            f"attention_mask of {columns} tokens, input_ids of {ids.shape[1]}: both must be of all of the text"
        )
    if cache.get_seq_length() >= ids.shape[1]:
        raise ConfigError(
            f"input_ids of {ids.shape[1]} tokens: the cache holds {cache.get_seq_length()}; give all of the text, "
            f"which must go beyond them"
        )
    return cache


def _mask_columns(mask: object, config: GenerationConfig) -> int | None:
    """How long the caller's mask is; None where there was none.

    transformers 5 drops a mask of ones before it calls a loop, and notes its length.
    """
    if isinstance(mask, torch.Tensor):
        return int(mask.shape[-1])
    columns = getattr(config, "_mask_length", None)
    return columns if isinstance(columns, int) else None
