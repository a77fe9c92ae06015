"""How the pages of a store follow each other, against a slow reference."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from tiermem.store_chains import NO_PAGE, Forest, rows_of


class RandomStore:
    """Pages that follow each other at random; `names` are (key, parent, position) in any order."""

    def __init__(self, seed: int, num_pages: int) -> None:
        chance = random.Random(seed)
        every: list[tuple[bytes, bytes, int]] = []
        for i in range(num_pages):
            key = hashlib.sha256(f"{seed} {i}".encode()).digest()
            above = chance.choice(every[-3:]) if every and chance.random() < 0.9 else None
            every.append((key, above[0] if above else bytes(32), above[2] + 1 if above else 0))
        chance.shuffle(every)
        lost = chance.randrange(3)
        self.names = every[lost:]
        self.rows = {key: row for row, (key, _, _) in enumerate(self.names)}

    def forest(self) -> Forest:
        return Forest.of(self._column(0), self._column(1), self.positions)

    @property
    def positions(self) -> np.ndarray:
        return np.array([position for _, _, position in self.names], dtype=np.int64)

    def before(self, row: int) -> int:
        _, parent, position = self.names[row]
        return self.rows.get(parent, NO_PAGE) if position else NO_PAGE

    def after(self, row: int) -> list[int]:
        return [other for other in range(len(self.names)) if self.before(other) == row]

    def stretch(self, row: int) -> list[int]:
        """The rows of the stretch with `row`, found step by step."""
        while self.before(row) != NO_PAGE and len(self.after(self.before(row))) == 1:
            row = self.before(row)
        found = [row]
        while len(self.after(found[-1])) == 1:
            found += self.after(found[-1])
        return found

    def _column(self, place: int) -> np.ndarray:
        joined = b"".join(name[place] for name in self.names)  # type: ignore[misc]
        return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32)


@pytest.mark.parametrize("seed", range(30))
def test_pages_follow_each_other_as_one_would_find_by_hand(seed: int) -> None:
    store = RandomStore(seed, 60)
    forest = store.forest()
    for row in range(len(store.names)):
        assert forest.before[row] == store.before(row)
        assert forest.num_after[row] == len(store.after(row))
        assert forest.is_cut[row] == (store.names[row][2] > 0 and store.before(row) == NO_PAGE)
        stretch, wanted = int(forest.stretch_of[row]), store.stretch(row)
        assert forest.stretches.firsts[stretch] == wanted[0]
        assert forest.stretches.lasts[stretch] == wanted[-1]
        assert forest.stretches.num_pages[stretch] == len(wanted)
        assert forest.stretches.is_end[stretch] == (not store.after(wanted[-1]))
        chain = forest.chain_to(row)
        assert chain[-1] == row
        assert [store.before(r) for r in chain] == [NO_PAGE, *chain[:-1]]
        firsts = [int(forest.stretches.firsts[s]) for s in forest.stretches_to(stretch)]
        assert firsts == [r for r in chain if store.stretch(r)[0] == r]


def test_no_page_makes_no_stretch() -> None:
    none = np.zeros((0, 32), dtype=np.uint8)
    forest = Forest.of(none, none, np.zeros(0, dtype=np.int64))
    assert len(forest.before) == len(forest.stretches.firsts) == 0


def test_pages_that_name_each_other_make_no_circle() -> None:
    keys = np.arange(64, dtype=np.uint8).reshape(2, 32)
    for positions in ([1, 2], [5, 5], [0, 0], [2**62, 2**62 + 1]):
        forest = Forest.of(keys, keys[::-1].copy(), np.array(positions, dtype=np.int64))
        assert all(len(forest.chain_to(row)) <= 2 for row in range(2))


def test_keys_that_begin_alike_are_told_apart() -> None:
    keys = np.zeros((4, 32), dtype=np.uint8)
    keys[:, 31] = [3, 1, 2, 0]
    wanted = np.zeros((3, 32), dtype=np.uint8)
    wanted[:, 31] = [2, 3, 9]
    assert rows_of(wanted, keys).tolist() == [2, 0, NO_PAGE]
