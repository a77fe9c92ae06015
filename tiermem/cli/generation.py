"""Generation: the run of `tiermem generate`, from options to summary.

What can be checked without loading anything is checked first.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tiermem.cli.human import size_text
from tiermem.cli.model_files import check_model_dir, go_offline, read_shape
from tiermem.cli.notes import NoteHandler, Progress, note
from tiermem.cli.prompt import read_prompt
from tiermem.cli.screen import terminal_width
from tiermem.cli.tier_options import tier_config, tier_overrides
from tiermem.errors import ConfigError, TierMemError

if TYPE_CHECKING:
    from tiermem.cli.subject import Subject
    from tiermem.cli.summary import Summary
    from tiermem.config import TierConfig
    from tiermem.integrations.transformers import TieredCache

CPU_CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = 2048


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code: 1 where a comparison failed."""
    if options.verify and options.temperature > 0:
        raise ConfigError("--verify: compares greedy choices, so --temperature must be 0")
    prompt = read_prompt(options)
    if options.model is not None:
        check_model_dir(options.model)
    else:
        read_shape(options.random_weights)
    with tier_overrides(options) as overrides:
        tier_config(options, overrides)
        with _quiet():
            summary = _generate(options, overrides, prompt)
    if options.json:
        print(json.dumps(summary.to_json(), indent=2))
    else:
        print("\n".join(["", *summary.lines(terminal_width(sys.stdout))]))
    return 1 if summary.verdict is not None and summary.verdict.errors else 0


def _generate(
    options: argparse.Namespace, overrides: dict[str, object], prompt: str | None
) -> Summary:
    """Load, run, compare."""
    import torch

    from tiermem.cli.subject import load_subject
    from tiermem.device.discovery import choose, survey

    wanted = tier_config(options, overrides).device
    Progress.show("loading")
    choice = choose(wanted, survey())
    config = tier_config(options, overrides, choice)
    if choice.is_fallback:
        note(f"runs on the CPU, the GPU tier in host memory: {choice.reason}")
    start_s = time.perf_counter()
    subject = load_subject(options, prompt, torch.device(config.device))
    load_s = time.perf_counter() - start_s
    try:
        return _run_tiered(options, config, subject, load_s)
    except torch.OutOfMemoryError as error:
        first_line = str(error).partition("\n")[0]
        raise TierMemError(
            f"the GPU has no room for what the model computes: {first_line} Smaller --gpu or "
            f"--prefill-chunk leave it more"
        ) from error


def _run_tiered(
    options: argparse.Namespace, config: TierConfig, subject: Subject, load_s: float
) -> Summary:
    from tiermem.cli.loop import Sampling, generate
    from tiermem.cli.summary import Summary
    from tiermem.cli.verify import Choices, verify
    from tiermem.cli.writer import Writer
    from tiermem.integrations.transformers import TieredCache

    ids, model = subject.ids, subject.model
    chunk_tokens = options.prefill_chunk or (
        CPU_CHUNK_TOKENS if model.device.type == "cpu" else GPU_CHUNK_TOKENS
    )
    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_p, options.seed, options.lookup
    )
    choices = Choices() if options.verify else None
    writer = Writer(None if options.json else sys.stdout, subject)
    with TieredCache(
        model,
        config,
        page_tokens=options.page_tokens,
        label=options.label,
        progress=Progress.pinning,
    ) as cache:
        _check_room(cache, ids.shape[1], options.max_new_tokens)
        attached = cache.attach(ids) if options.attach else 0
        made = generate(model, cache, ids, sampling, chunk_tokens, writer.watcher(), choices)
        text = writer.end()
        stats = cache.stats()
        token_bytes = cache.layout.token_bytes
        Progress.show("closing")
        closing_s = time.perf_counter()
    close_s = time.perf_counter() - closing_s
    verdict = None
    if choices is not None:
        watcher = writer.silent_watcher(len(made.token_ids))
        verdict = verify(model, ids, made.token_ids, choices, sampling, chunk_tokens, watcher)
    Progress.clear()
    return Summary(
        model=subject.name,
        device=stats.device,
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=ids.shape[1],
        attached_tokens=attached,
        token_ids=made.token_ids,
        text=text,
        token_bytes=token_bytes,
        load_s=load_s,
        close_s=close_s,
        times=made.times,
        acceptance=made.acceptance,
        stats=stats,
        verdict=verdict,
    )


def _check_room(cache: TieredCache, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse what all tiers together cannot hold, before the prompt is computed."""
    layout, tiers = cache.layout, cache.stats().tiers
    wanted = layout.pages_for(prompt_tokens + new_tokens)
    have = sum(tier.slots for tier in tiers)
    if wanted <= have:
        return
    sizes = ", ".join(f"{tier.tier} {size_text(tier.slots * tier.page_bytes)}" for tier in tiers)
    raise ConfigError(
        f"{prompt_tokens} tokens of prompt and {new_tokens} new ones: their keys and values take "
        f"{size_text(wanted * layout.slot_bytes)}, the tiers hold "
        f"{size_text(have * layout.slot_bytes)} ({sizes}): give --gpu, --ram or --ssd more"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Only what is tiermem's own reaches stderr, as notes; libraries keep their warnings to themselves."""
    log = logging.getLogger("tiermem")
    handler = NoteHandler(logging.WARNING)
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            go_offline()
            yield
    finally:
        log.removeHandler(handler)
        Progress.clear()
