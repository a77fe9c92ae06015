"""A store with pages of several prompts, sessions and salts, for tests that look into it."""

from __future__ import annotations

from pathlib import Path

from test_manager import config, grow
from world import LAYOUT

from tiermem import TierManager

PAGE = LAYOUT.page_tokens
MODEL = "the model"
TENANT = b"tenant"
SHARED = list(range(4 * PAGE))
"""What the prompts a, b and c begin with; d is the same under TENANT."""
PROMPTS = {
    "a": SHARED + [100 + t for t in range(2 * PAGE)],
    "b": SHARED + [200 + t for t in range(4 * PAGE)],
    "c": SHARED + [300 + t for t in range(6 * PAGE + 3)],
    "d": SHARED,
}
SALTS = {"d": TENANT}
NUM_PAGES = 4 + 2 + 4 + 6 + 4


def make_store(path: Path, slots: int = 40) -> Path:
    """A closed store with PROMPTS in it, each stored by a session with its letter as label."""
    with open_store(path, slots) as manager:
        for label in PROMPTS:
            store_prompt(manager, label)
    return path


def open_store(path: Path, slots: int = 40) -> TierManager:
    """A manager on the store at `path`."""
    return TierManager(LAYOUT, config(8, 8, slots, path), model_id=MODEL)


def store_prompt(manager: TierManager, label: str) -> None:
    """Compute what is not stored of one of PROMPTS, and close its sequence."""
    tokens, salt = PROMPTS[label], SALTS.get(label, b"")
    sequence = manager.open_sequence(tokens, salt=salt, label=label)
    if sequence.num_tokens < len(tokens):
        grow(manager, sequence, tokens[sequence.num_tokens :], salt)
    sequence.close()
