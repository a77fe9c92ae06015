"""Summary: what a run of generate did, as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tiermem.cli.human import (
    count_text,
    duration_text,
    rate_text,
    share_text,
    size_text,
    tokens_rate_text,
)
from tiermem.cli.loop import Times
from tiermem.cli.manager_text import all_bytes, attended_text, trouble_text
from tiermem.cli.table import Table, pairs
from tiermem.cli.verify import Difference, Verdict
from tiermem.integrations.transformers import Acceptance
from tiermem.stats import Stats


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Counts are tokens, times seconds.

    `acceptance` is None where nothing was drafted for, `verdict` where nothing was compared.
    """

    model: str
    device: str
    dtype: str
    prompt_tokens: int
    attached_tokens: int
    token_ids: tuple[int, ...]
    text: str | None
    token_bytes: int
    load_s: float
    close_s: float
    times: Times
    acceptance: Acceptance | None
    stats: Stats
    verdict: Verdict | None

    @property
    def decode_s(self) -> float:
        """Seconds from the first new token to the last."""
        return self.times.last_token_s - self.times.first_token_s

    def to_json(self) -> dict[str, object]:
        """Names and plain values, for `json.dumps`."""
        new_tokens = len(self.token_ids)
        prefilled = self.prompt_tokens - self.attached_tokens
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "prompt_tokens": self.prompt_tokens,
            "attached_tokens": self.attached_tokens,
            "computed_again_tokens": self.stats.computed_again_tokens,
            "new_tokens": new_tokens,
            "token_ids": list(self.token_ids),
            "text": self.text,
            "load_s": self.load_s,
            "first_token_s": self.times.first_token_s,
            "total_s": self.times.last_token_s,
            "close_s": self.close_s,
            "prefill_tokens_per_s": _rate(prefilled, self.times.first_token_s),
            "decode_tokens_per_s": _rate(new_tokens - 1, self.decode_s),
            "lookup": None if self.acceptance is None else _acceptance_json(self.acceptance),
            "kv_bytes": (self.prompt_tokens + new_tokens) * self.token_bytes,
            "stats": self.stats.to_json(),
            "verify": None if self.verdict is None else _verdict_json(self.verdict),
        }

    def lines(self, width: int | None) -> list[str]:
        """A few short tables."""
        stats = self.stats
        tables = [
            pairs(self._facts()),
            _tier_table(stats),
            _flow_table(stats, self.times.last_token_s),
        ]
        blocks = [table.lines(width) for table in tables]
        lines: list[str] = []
        for block in filter(None, blocks):
            lines += [""] * bool(lines) + block
        return lines

    def _facts(self) -> list[tuple[str, str]]:
        times, stats = self.times, self.stats
        new_tokens = len(self.token_ids)
        prompt = f"{count_text(self.prompt_tokens)} tokens"
        if self.attached_tokens:
            prompt += f", {count_text(self.attached_tokens)} of them attached"
        first_s = duration_text(times.first_token_s)
        prefill = tokens_rate_text(self.prompt_tokens - self.attached_tokens, times.first_token_s)
        seconds = (self.load_s, times.last_token_s, self.close_s)
        load, generate, close = (duration_text(value) for value in seconds)
        cache_bytes = (self.prompt_tokens + new_tokens) * self.token_bytes
        hot = stats.tiers[0]
        hot_bytes = hot.slots * hot.page_bytes
        rows = [
            ("model", f"{self.model}, {self.dtype} on {self.device}"),
            ("prompt", prompt),
            ("new", f"{count_text(new_tokens)} tokens"),
            ("first token", f"after {first_s} (prompt: {prefill})"),
            ("then", tokens_rate_text(new_tokens - 1, self.decode_s)),
        ]
        if self.acceptance is not None:
            rows.append(("lookup", acceptance_text(self.acceptance)))
        rows += [
            (
                "KV cache",
                f"{size_text(cache_bytes)}, {cache_bytes / hot_bytes:.1f} times the GPU tier",
            ),
            ("time", f"{load} loading, {generate} generating, {close} closing"),
        ]
        if stats.attended_bytes:
            rows.append(("in RAM", f"attended {attended_text(stats)}"))
        if stats.failed_transfers or stats.corrupt_pages or stats.computed_again_tokens:
            rows.append(("trouble", trouble_text(stats)))
        rows.append(("verified", verdict_text(self.verdict)))
        return rows


def _tier_table(stats: Stats) -> Table:
    """What is where at the end, in pages."""
    rows = [
        (
            tier.tier,
            size_text(tier.slots * tier.page_bytes) if tier.slots else "off",
            f"{count_text(tier.used)} of {count_text(tier.slots)}",
            share_text(stats.hit_rates.get(tier.tier)),
            count_text(tier.evictions),
        )
        for tier in stats.tiers
    ]
    return Table(("tier", "capacity", "pages used", "hits", "evicted"), tuple(rows))


def _flow_table(stats: Stats, seconds: float) -> Table:
    """Bytes moved by direction. Copy rate: of pages while one was under way; mean rate: of all over the run."""
    rows = [
        (
            f"{flow.src} to {flow.dst}",
            size_text(all_bytes(flow)),
            size_text(flow.streamed_bytes),
            rate_text(flow.gb_per_s),
            rate_text(all_bytes(flow) / seconds / 1e9),
        )
        for flow in stats.flows
    ]
    titles = ("moved", "bytes", "streamed", "copy rate", "mean rate")
    return Table(titles, tuple(rows)) if rows else Table((), ())


def acceptance_text(found: Acceptance) -> str:
    """In one line, what drafts were good for."""
    if found.tokens_per_pass is None:
        return "no pass after the prompt's"
    return (
        f"{found.tokens_per_pass:.2f} tokens a pass, {count_text(found.passes)} passes; "
        f"{count_text(found.accepted_tokens)} of {count_text(found.drafted_tokens)} drafted tokens accepted"
    )


def verdict_text(verdict: Verdict | None) -> str:
    """In one line, whether the tokens are those of an untiered run."""
    if verdict is None:
        return "no (--verify compares with the untiered run)"
    if verdict.errors:
        return f"NO: {_difference_text(verdict.errors[0])}; {len(verdict.errors)} of {verdict.positions} differ"
    same = f"yes: all {verdict.positions} tokens equal those of the untiered run"
    if verdict.ties:
        widest = max(found.gap for found in verdict.ties)
        return f"{same}, but for {len(verdict.ties)} ties, at most {widest:.2g} apart in logit"
    return same if verdict.tie_logits == 0 else f"{same}; no ties"


def _difference_text(found: Difference) -> str:
    return (
        f"new token {found.position + 1} is {found.tiered}, untiered {found.untiered} "
        f"(logits {found.gap:.2g} apart)"
    )


def _acceptance_json(found: Acceptance) -> dict[str, object]:
    return {
        "passes": found.passes,
        "new_tokens": found.new_tokens,
        "drafted_tokens": found.drafted_tokens,
        "accepted_tokens": found.accepted_tokens,
        "acceptance": found.share,
        "tokens_per_pass": found.tokens_per_pass,
    }


def _verdict_json(verdict: Verdict) -> dict[str, object]:
    return {
        "passed": not verdict.errors,
        "positions": verdict.positions,
        "tie_logits": verdict.tie_logits,
        "ties": len(verdict.ties),
        "differences": [asdict(found) for found in verdict.differences],
    }


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
