"""How long does a store of a million pages take to open again, and how much memory is a page?

An index as it is after a million pages were published in random order, the payload never written nor read. Each
opening is a process of its own: store, page table and prefix index, as a manager makes them. Memory is what the
process resides in afterwards, less before.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np
import psutil
from common import Place, main

from tiermem import PageLayout, _core
from tiermem.bench.result import Better, Result, Subject, measured
from tiermem.errors import InvariantError
from tiermem.pools import Tier
from tiermem.prefix import Prefixes
from tiermem.store import ColdStore
from tiermem.store_files import cap_of, index_bytes
from tiermem.store_names import ChainRoot
from tiermem.store_records import ROOT, Entry, number_key, pack_root, page_key

NAME = "reopen"
LAYOUT = PageLayout(1, 1, 16, "float16", 16)
CHAIN_PAGES = 100
BATCH = 50_000
BUDGET_S = 2.0
BUDGET_BYTES = 200.0


def compare(place: Place) -> Iterator[Result]:
    """Seconds to open and bytes a page, each a few times."""
    num_pages = 20_000 if place.is_quick else 1_000_000
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "store"
        make(path, num_pages)
        runs = [opened(path, num_pages) for _ in range(2 if place.is_quick else 3)]
    wanted = (
        ("open", "s", BUDGET_S),
        ("open, CPU time", "s", BUDGET_S),
        ("memory", "bytes/page", BUDGET_BYTES),
    )
    for name, unit, budget in wanted:
        subject = Subject(
            NAME, name, {"pages": num_pages}, unit, Better.LOWER,
            budget=budget if not place.is_quick else None,
        )  # fmt: skip
        yield measured(subject, [run[name] for run in runs], "an aim, not a ceiling")


def make(path: Path, num_pages: int) -> None:
    """A store whose index names `num_pages` pages in chains, written in random order."""
    ColdStore(path, LAYOUT, cap_of(LAYOUT, num_pages), "auto", 60.0).close()
    rng = random.Random(1)
    root = ChainRoot.of(_core.PrefixIndex.root_hash([b"reopen"]), "", (0, 1), b"")
    keys = [rng.randbytes(32) for _ in range(num_pages)]
    order = list(range(num_pages))
    rng.shuffle(order)
    with lmdb.open(
        str(path / "index"), map_size=index_bytes(num_pages), lock=False, sync=False
    ) as environment:
        for start in range(0, num_pages, BATCH):
            with environment.begin(write=True) as transaction:
                transaction.put(number_key(ROOT, 1), pack_root(1, root))
                for i in order[start : start + BATCH]:
                    position = i % CHAIN_PAGES
                    parent = keys[i - 1] if position else root.hash
                    entry = Entry(i, position, i + 1, i, parent, 1, last_use_s=i // CHAIN_PAGES)
                    transaction.put(page_key(keys[i]), entry.pack(keys[i]))


def opened(path: Path, num_pages: int) -> dict[str, float]:
    """Seconds and bytes a page of one opening in a process of its own."""
    command = [sys.executable, __file__, "--open", str(path), str(num_pages)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def open_once(path: Path, num_pages: int) -> dict[str, float]:
    """The same in this process."""
    process = psutil.Process()
    before = process.memory_info().rss
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    store = ColdStore(path, LAYOUT, cap_of(LAYOUT, num_pages), "auto", 60.0)
    table = _core.PageTable(4, 4, store.num_slots)
    prefixes = Prefixes(LAYOUT, "", (0, 1), table, store)
    seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    resident = process.memory_info().rss - before
    if len(prefixes) != num_pages or table.counts(Tier.SSD).free != store.num_slots - num_pages:
        raise InvariantError(f"{len(prefixes)} pages found, {num_pages} were stored")
    some = np.ascontiguousarray(prefixes.pages()[:: max(1, num_pages // 100)])
    names = prefixes.names_of(some)
    keys = [name.key for name in names if name is not None]
    if len(keys) != len(names) or any(len(np.frombuffer(key, np.uint8)) != 32 for key in keys):
        raise InvariantError("pages without a name")
    store.close()
    return {"open": seconds, "open, CPU time": cpu_s, "memory": resident / num_pages}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--open"]:
        json.dump(open_once(Path(sys.argv[2]), int(sys.argv[3])), sys.stdout)
    else:
        sys.exit(main(__doc__, compare))
