"""Drafts: what followed the longest, most recent match, against a plain search."""

from __future__ import annotations

import random

import pytest

from tiermem.integrations.transformers.drafts import LEAST_ROOM, LONGEST_MATCH, Drafts


def expected(tokens: list[int], count: int) -> list[int]:
    """The definition: try every earlier place, keep the longest match and of equal ones the last."""
    best = (0, 0)
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, LONGEST_MATCH) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        best = max(best, (length, end))
    length, start = best
    if length == 0:
        return []
    text = list(tokens)
    for i in range(count):
        text.append(text[start + i])
    return text[len(tokens) :]


@pytest.mark.parametrize("letters", [1, 2, 3, 20])
def test_drafts_are_what_followed_the_longest_and_latest_match(letters: int) -> None:
    seed = random.SystemRandom().getrandbits(31)
    chance = random.Random(seed)
    tokens: list[int] = []
    drafts = Drafts()
    for _ in range(120):
        new = [chance.randrange(letters) for _ in range(chance.choice([0, 1, 1, 3]))]
        if len(tokens) > 30 and chance.random() < 0.3:
            start = chance.randrange(len(tokens) - 25)
            new = tokens[start : start + 25]
        drafts.extend(new)
        tokens += new
        assert len(drafts) == len(tokens)
        count = chance.randint(1, 31)
        assert drafts.draft(count) == expected(tokens, count), f"seed {seed}"


def test_a_text_without_a_match_has_no_draft() -> None:
    assert Drafts().draft(5) == []
    assert Drafts([7]).draft(5) == []
    assert Drafts([1, 2, 3]).draft(5) == []
    assert Drafts([1, 2, 1]).draft(0) == []


def test_a_text_that_goes_round_is_drafted_on_and_on() -> None:
    assert Drafts([9, 1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]
    assert Drafts([4, 4]).draft(3) == [4, 4, 4]


def test_long_texts_and_large_ids() -> None:
    tokens = list(range(2**32 - 3 * LEAST_ROOM, 2**32))
    drafts = Drafts(tokens)
    drafts.extend(tokens[5:9])
    assert drafts.draft(4) == tokens[9:13]
