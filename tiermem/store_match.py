"""Match: how far a prompt's chain of pages is stored, and why it stops there."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.slot_scan import Part
from tiermem.store_chains import NO_PAGE, Int64s, Keys, rows_of
from tiermem.store_check import PageReport, check_pages
from tiermem.store_content import StoreContent
from tiermem.store_names import ChainRoot
from tiermem.store_reader import StoreReader
from tiermem.store_records import Gone


class Stop(enum.Enum):
    """Why a prompt's chain of stored pages ends where it does."""

    COMPLETE = "complete"
    """Every whole page of the prompt is stored."""
    GONE = "gone"
    """The next page was stored, and the index says what became of it."""
    UNUSABLE = "unusable"
    """The next page has an entry, but its slot does not hold it any more, or is damaged."""
    OTHER_ROOT = "other_root"
    """The next page is stored for another model, salt or shard."""
    OTHER_TOKENS = "other_tokens"
    """Other tokens follow in the store: the prompts differ within the next page."""
    NEVER_STORED = "never_stored"
    """Nothing follows in the store."""


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """How far the pages of a prompt are stored below one root. rows: of those pages, from the first on."""

    root: ChainRoot
    keys: Keys
    rows: Int64s

    @property
    def num_pages(self) -> int:
        """Pages stored without a gap from the first on."""
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """The answer for one prompt.

    num_tokens, num_whole: tokens of the prompt, and the pages that they fill. match: below the root asked for.
    is_known: whether anything is stored below that root. elsewhere: the same tokens below other roots, longest
    first. gone: what became of the page after the match. num_gone: how many pages from it on went for that
    reason. report: what is wrong with that page. num_others: pages with other tokens that follow the match.
    num_later: pages of the prompt further on that are stored and cannot be found.
    """

    num_tokens: int
    num_whole: int
    match: Match
    is_known: bool
    stop: Stop
    elsewhere: tuple[Match, ...]
    gone: Gone | None = None
    num_gone: int = 0
    report: PageReport | None = None
    num_others: int = 0
    num_later: int = 0

    @property
    def best_elsewhere(self) -> Match | None:
        """The longest match below another root, if that is longer."""
        best = next(iter(self.elsewhere), None)
        return best if best is not None and best.num_pages > self.match.num_pages else None


def explain(
    reader: StoreReader,
    content: StoreContent,
    tokens: NDArray[np.int64],
    wanted: ChainRoot | None,
) -> Explanation:
    """Why `tokens` are stored as far as they are, below the root `wanted`, or below the best one there is.

    Raises
    ------
    ValueError: a token outside 0 to 2**32 - 1; no root is wanted, and the store knows none.
    """
    chains = _Chains(reader, content, tokens)
    found = sorted(chains.stored(), key=lambda match: -match.num_pages)
    if wanted is None:
        wanted = found[0].root if found else next(iter(content.roots.values()), None)
    if wanted is None:
        raise ValueError("the store holds no page and knows no model")
    match = chains.match(wanted)
    others = tuple(other for other in found if other.root.hash != wanted.hash)
    return chains.explain(match, others)


class _Chains:
    """The keys of one prompt's pages below every root."""

    def __init__(
        self, reader: StoreReader, content: StoreContent, tokens: NDArray[np.int64]
    ) -> None:
        self._reader, self._content, self._tokens = reader, content, tokens
        self._hasher = _core.PrefixIndex(reader.layout.page_tokens)
        self._num_whole = len(tokens) // reader.layout.page_tokens

    def stored(self) -> list[Match]:
        """The matches below the roots of the store, of one page at least."""
        matches = []
        first = self._tokens[: self._reader.layout.page_tokens]
        for root in self._content.roots.values():
            keys = self._hasher.chain(root.hash, first)
            if (rows_of(keys, self._content.keys) != NO_PAGE).any():
                matches.append(self.match(root))
        return matches

    def match(self, root: ChainRoot) -> Match:
        """How far the prompt is stored below `root`."""
        keys = self._hasher.chain(root.hash, self._tokens)
        rows = rows_of(keys, self._content.keys)
        missing = np.flatnonzero(rows == NO_PAGE)
        return Match(root, keys, rows[: missing[0]] if len(missing) else rows)

    def explain(self, match: Match, others: tuple[Match, ...]) -> Explanation:
        """Say why `match` ends; `others` are matches below other roots."""
        reports = check_pages(self._reader, self._content, match.rows, Part.TRAILER).reports
        report = min(reports, key=lambda one: one.position, default=None)
        if report is not None:
            match = Match(match.root, match.keys, match.rows[: report.position])
        here = match.num_pages
        gone = [self._content.gone.get(key.tobytes()) for key in match.keys[here:]]
        first = gone[0] if gone else None
        after = rows_of(match.keys[here + 1 :], self._content.keys)
        explanation = Explanation(
            num_tokens=len(self._tokens),
            num_whole=self._num_whole,
            match=match,
            is_known=any(root.hash == match.root.hash for root in self._content.roots.values()),
            stop=Stop.NEVER_STORED,
            elsewhere=others,
            gone=first,
            num_gone=_run_of(gone),
            report=report,
            num_others=self._followers(match),
            num_later=int((after != NO_PAGE).sum()),
        )
        return _with_stop(explanation)

    def _followers(self, match: Match) -> int:
        """How many stored pages follow the end of a match."""
        parent = match.keys[match.num_pages - 1].tobytes() if match.num_pages else match.root.hash
        wanted = np.frombuffer(parent, dtype=np.uint8)
        return int((self._content.parents == wanted).all(axis=1).sum())


def _run_of(gone: list[Gone | None]) -> int:
    """How many pages from the first on went for its reason."""
    count = 0
    for one in gone:
        if one is None or gone[0] is None or one.why is not gone[0].why:
            break
        count += 1
    return count


def _with_stop(found: Explanation) -> Explanation:
    best = found.best_elsewhere
    if found.match.num_pages == found.num_whole:
        stop = Stop.COMPLETE
    elif found.report is not None:
        stop = Stop.UNUSABLE
    elif found.gone is not None:
        stop = Stop.GONE
    elif best is not None:
        stop = Stop.OTHER_ROOT
    else:
        stop = Stop.OTHER_TOKENS if found.num_others else Stop.NEVER_STORED
    return replace(found, stop=stop)
