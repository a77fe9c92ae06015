"""What the comparisons with peers share: options, decode loops, and results as `tiermem bench` writes them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from tiermem.bench.environment import commit, describe
from tiermem.bench.result import Result, line_of
from tiermem.bench.result_file import SavedResult, check_writable, write_results
from tiermem.bench.run import Scale, open_ceilings
from tiermem.cli.bench_text import environment_lines, result_lines
from tiermem.cli.model_files import go_offline
from tiermem.device.discovery import open_device
from tiermem.device.protocol import Device
from tiermem.errors import TierMemError
from tiermem.measure.ceilings import Ceilings


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a comparison runs, and how large it is."""

    device: Device
    scale: Scale
    ceilings: Ceilings

    @property
    def on(self) -> torch.device:
        """Where tensors go."""
        return self.device.torch_device

    @property
    def is_quick(self) -> bool:
        """Tiny shapes, for tests."""
        return self.scale is Scale.QUICK

    def synchronize(self) -> None:
        """Wait for the device."""
        self.device.compute_stream().synchronize()


def main(
    description: str,
    compare: Callable[[Place], Iterable[Result]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the options, compare, print and save; the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a test, not figures")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--save", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument("--json", action="store_true", help="print one JSON line a result")
    options = parser.parse_args(arguments)
    go_offline()
    try:
        if options.save is not None:
            check_writable(options.save)
        found = []
        for saved in _run(options, compare):
            found.append(saved)
            if options.json:
                print(line_of(saved.to_json()), flush=True)
        if not options.json:
            text = [*environment_lines(found[0], None), ""]
            text += result_lines([saved.result for saved in found], None)
            print("\n".join(text))
        if options.save is not None:
            write_results(options.save, found)
    except TierMemError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0


def _run(
    options: argparse.Namespace, compare: Callable[[Place], Iterable[Result]]
) -> Iterator[SavedResult]:
    device, _ = open_device(options.device)
    scale = Scale.QUICK if options.quick else Scale.FULL
    try:
        with open_ceilings(device, scale) as ceilings:
            environment, name = describe(device), commit()
            for result in compare(Place(device, scale, ceilings)):
                yield SavedResult(result, environment, name)
    finally:
        device.close()


# ---- decoding -------------------------------------------------------------------------------------


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Put `ids` (1, tokens) into `cache`, `chunk` at a time; the logits (vocabulary,) behind the last."""
    for start in range(0, ids.shape[1], chunk):
        logits = model(
            input_ids=ids[:, start : start + chunk],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
    return logits[0, -1]


@torch.no_grad()
def feed(
    place: Place, model: PreTrainedModel, cache: Cache, tokens: list[int]
) -> tuple[list[float], torch.Tensor]:
    """Give the model `tokens` one at a time; seconds of each call, and logits (tokens, vocabulary) in fp32."""
    seconds, logits = [], []
    for token in tokens:
        place.synchronize()
        start_s = time.perf_counter()
        ids = torch.tensor([[token]], device=place.on)
        out = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        place.synchronize()
        seconds.append(time.perf_counter() - start_s)
        logits.append(out.float())
    return seconds, torch.stack(logits)


@torch.no_grad()
def decode_loop(
    model: PreTrainedModel, cache: Cache, prompt: torch.Tensor, count: int
) -> tuple[list[int], list[float]]:
    """The likeliest `count` tokens after `prompt`, each read by the host; seconds between tokens."""
    out = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits
    tokens, stamps = [], []
    for _ in range(count):
        chosen = out[0, -1].argmax()
        tokens.append(int(chosen))
        stamps.append(time.perf_counter())
        out = model(input_ids=chosen.view(1, 1), past_key_values=cache, use_cache=True).logits
    return tokens, _between(stamps)


@torch.no_grad()
def decode_generate(
    model: PreTrainedModel, cache: Cache, prompt: torch.Tensor, count: int
) -> tuple[list[int], list[float]]:
    """The same through `model.generate`."""
    clock = _Clock()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=clock,
    )
    return out[0, prompt.shape[1] :].tolist(), _between(clock.stamps[1:])


class _Clock(BaseStreamer):
    """When the prompt and each token came."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
        """transformers gives the prompt first, then each token, on the host."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


def _between(stamps: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(stamps)]
