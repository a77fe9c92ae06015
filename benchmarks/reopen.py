"""How long does a store of a million pages take to open again, and how much memory is a page?

An index as it is after a million pages were published in random order and most were used since, the payload never
written nor read; from the page cache, since it was just made. Each opening is a process of its own: store, page
table and prefix index, as a manager makes them. Memory is what the process resides in afterwards, less before.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import tempfile
import time
import zlib
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
from tiermem.store_records import ENTRY_ROW, PAGE, ROOT, number_key, pack_root, page_key

NAME = "reopen"
LAYOUT = PageLayout(1, 1, 16, "float16", 16)
CHAIN_PAGES = 100
LATER_COMMITS = 3
"""Of a twentieth of the pages each, in any order: so each writes most of the tree anew."""
BUDGET_S = 2.0
BUDGET_BYTES = 200.0
CONTEXT = multiprocessing.get_context("forkserver")
"""Processes begin as copies of one that has imported everything and done nothing yet."""


def compare(place: Place) -> Iterator[Result]:
    """Seconds to open and bytes a page, each a few times."""
    num_pages = 20_000 if place.is_quick else 1_000_000
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "store"
        CONTEXT.set_forkserver_preload([Path(__file__).stem])
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
    """A store whose index names `num_pages` pages in chains: put in random order, then used again."""
    ColdStore(path, LAYOUT, cap_of(LAYOUT, num_pages), "auto", 60.0).close()
    rng = random.Random(1)
    root = ChainRoot.of(_core.PrefixIndex.root_hash([b"reopen"]), "", (0, 1), b"")
    records = records_of(rng, num_pages, root)
    with lmdb.open(
        str(path / "index"), map_size=index_bytes(num_pages), lock=False, sync=False
    ) as environment:
        with environment.begin(write=True) as transaction:
            transaction.put(number_key(ROOT, 1), pack_root(1, root))
        put(environment, rng.sample(records, num_pages))
        for _ in range(LATER_COMMITS):  # leave the pages of the tree before them free
            put(environment, rng.sample(records, num_pages // 20))


def records_of(rng: random.Random, num_pages: int, root: ChainRoot) -> list[tuple[bytes, bytes]]:
    """Key and value of each page's record, made at once: a million of `Entry` would take longer than all else."""
    rows = np.zeros(num_pages, dtype=ENTRY_ROW)
    numbers = np.arange(num_pages)
    rows["kind"], rows["key"] = PAGE, np.frombuffer(rng.randbytes(32 * num_pages), dtype="V32")
    entries = rows["entry"]
    entries["slot"] = entries["checksum"] = numbers
    entries["position"], entries["generation"] = numbers % CHAIN_PAGES, numbers + 1
    entries["parent"][1:] = rows["key"][:-1]
    entries["parent"][::CHAIN_PAGES] = np.void(root.hash)
    entries["root"], entries["last_use_s"] = 1, numbers // CHAIN_PAGES
    raw, width = rows.tobytes(), ENTRY_ROW.itemsize
    entries["crc"] = [zlib.crc32(raw[i : i + width - 4]) for i in range(0, len(raw), width)]
    raw, key_bytes = rows.tobytes(), len(page_key(bytes(32)))
    return [
        (raw[i : i + key_bytes], raw[i + key_bytes : i + width]) for i in range(0, len(raw), width)
    ]


def put(environment: lmdb.Environment, records: list[tuple[bytes, bytes]]) -> None:
    """One commit."""
    with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
        cursor.putmulti(records)


def opened(path: Path, num_pages: int) -> dict[str, float]:
    """Seconds and bytes a page of one opening in a process of its own."""
    with CONTEXT.Pool(1) as pool:
        return pool.apply(open_once, (path, num_pages))


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
    sys.exit(main(__doc__, compare))
