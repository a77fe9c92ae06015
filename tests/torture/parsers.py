"""Parsers: everything in tiermem that reads bytes which somebody else may have written.

Each returns, or refuses with the error that it documents; nothing else may come out of it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from test_calibration import MACHINE, NOW_S, made
from world import LAYOUT

from tiermem import ConfigError, TierConfig, TierManager, calibration
from tiermem.cli.snapshot import Snapshot
from tiermem.configfile import parse_json
from tiermem.data import data_path
from tiermem.disk_budget import BUDGET_FILE, WriteBudget
from tiermem.index_image import image_of
from tiermem.model_shape import ModelShape
from tiermem.private_files import PrivateDirectory
from tiermem.sequence import check_token_ids
from tiermem.store_format import (
    TRAILER,
    PageName,
    header_layout,
    names_in,
    pack_header,
    pack_trailer,
    parse_trailer,
)
from tiermem.store_names import ChainRoot, GoneReason
from tiermem.store_records import (
    Entry,
    Gone,
    number_key,
    pack_label,
    pack_root,
    page_key,
    sealed,
)
from tiermem.units import Size
from torture.index_file import EDIT_BYTES, check_index, edited
from torture.mutations import mutated
from torture.tally import Tally, ViolationError

GENERATION = 7
INPUTS = 400
Parse = Callable[[bytes, Path], None]


@dataclass(frozen=True, slots=True)
class Parser:
    """One target: inputs to start from, what reads them, and what it may raise."""

    seeds: tuple[bytes, ...]
    parse: Parse
    refuses: tuple[type[Exception], ...] = (ConfigError,)


# ---- the store -------------------------------------------------------------------------------------------

ROOT = ChainRoot.of(b"r" * 32, "model", (0, 1), b"salt")
NAME = PageName(b"k" * 32, b"p" * 32, 3, ROOT)
SUMS = np.arange(LAYOUT.num_layers, dtype=np.uint64)
ENTRY = Entry(slot=3, position=1, generation=GENERATION, checksum=5, parent=b"p" * 32, root=1)
RECORDS = (
    page_key(b"k" * 32) + ENTRY.pack(b"k" * 32),
    number_key(b"r", 1) + pack_root(1, ROOT),
    number_key(b"l", 1) + pack_label(1, "chat"),
    number_key(b"g", 1) + Gone(b"k" * 32, 10**18, GoneReason.EVICTED).pack(1),
)


def _header(data: bytes, where: Path) -> None:
    header_layout("store", data)


def _trailer(data: bytes, where: Path) -> None:
    if parse_trailer(LAYOUT, GENERATION, data) is not None and data != TRAILER_SEEDS[0]:
        raise ViolationError("another trailer than the one that was written is taken for it")


def _sound_trailer(data: bytes, where: Path) -> None:
    """The same, with a CRC that is right: a forged one says what it likes, in bounds."""
    data = data.ljust(TRAILER.itemsize, b"\0")[: TRAILER.itemsize - 4]
    data += zlib.crc32(data).to_bytes(4, "little")
    parse_trailer(LAYOUT, GENERATION, data)
    names_in(np.frombuffer(data, dtype=TRAILER))


def _records(data: bytes, where: Path) -> None:
    """Records of any length, as LMDB would give them; every one that is taken packs to what it was."""
    records = _split(data)
    image = image_of(records)
    for record in image.records():
        if record not in records:
            raise ViolationError(f"a record was read that is not there: {record!r}")


def _sound_records(data: bytes, where: Path) -> None:
    """The same, each with a CRC that is right."""
    list(image_of([(key, sealed(key, value[:-4])) for key, value in _split(data)]).records())


def _split(data: bytes) -> list[tuple[bytes, bytes]]:
    key_bytes = {b"p": 33, b"r": 5, b"l": 5, b"g": 5}.get(data[:1], 4)
    return [(data[:key_bytes], data[key_bytes:])]


def _index_file(data: bytes, where: Path) -> None:
    """An LMDB file with the edits that `data` tells."""
    check_index(edited(data), where)


def _budget(data: bytes, where: Path) -> None:
    (where / BUDGET_FILE).write_bytes(data)
    (where / BUDGET_FILE).chmod(0o600)
    directory = PrivateDirectory.open(where)
    try:
        budget = WriteBudget(directory, 10**9)
        budget.spend(5)
        if not -2 * 10**9 <= budget.left_bytes <= 10**9:
            raise ViolationError(f"{budget.left_bytes} bytes are left of a day's")
        budget.close()
    finally:
        directory.close()


def _sound_budget(data: bytes, where: Path) -> None:
    data = data.ljust(28, b"\0")[:24]
    _budget(data + zlib.crc32(data).to_bytes(4, "little"), where)


# ---- text ------------------------------------------------------------------------------------------------


def _json_config(data: bytes, where: Path) -> None:
    TierConfig.load(_file(where / "config.json", data))


def _toml_config(data: bytes, where: Path) -> None:
    TierConfig.load(_file(where / "config.toml", data))


def _shape(data: bytes, where: Path) -> None:
    ModelShape.load(_file(where / "shape.toml", data))


def _size(data: bytes, where: Path) -> None:
    Size.parse(data.decode("latin-1"), "size").resolve(10**12)


def _calibration(data: bytes, where: Path) -> None:
    """It is never an error, only of no use."""
    os.environ["TIERMEM_CACHE_DIR"] = str(where)
    _file(where / f"calibration-{MACHINE.key}.json", data)
    calibration.load(MACHINE, NOW_S)


def _snapshot(data: bytes, where: Path) -> None:
    """What `tiermem stats` does with a file of another process."""
    try:
        document = parse_json(data.decode())
    except (ValueError, RecursionError):
        return  # passed over by the reader
    if isinstance(document, dict):
        snapshot = Snapshot.of(document)
        str((snapshot.pid, snapshot.key, snapshot.age_s))


def _token_ids(data: bytes, where: Path) -> None:
    kind = "<i8" if len(data) % 2 else "<u8"
    ids = np.frombuffer(data[: len(data) // 8 * 8], dtype=kind)
    checked = check_token_ids(ids)
    if any(not 0 <= token < 2**32 for token in checked):
        raise ViolationError("a token id out of range was taken")


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def _stats() -> bytes:
    """The document of a manager that is there."""
    config = TierConfig(gpu=LAYOUT.slot_bytes, ram=0, ssd=0, device="cpu", cpu_threads=1)
    with TierManager(LAYOUT, config) as manager:
        return json.dumps(manager.stats().to_json()).encode()


INDEX_EDITS = tuple(random.Random(i).randbytes(EDIT_BYTES * i) for i in (1, 1, 2, 5))
TRAILER_SEEDS = (pack_trailer(LAYOUT, NAME, GENERATION, SUMS),)


def parsers() -> dict[str, Parser]:
    """All of them."""
    json_config, toml_config = (
        b'{"gpu": "8GiB", "ram": 0.5, "ssd": "50%", "ssd_path": "x", "low_watermark": 0.1, "cpu_threads": null}',
        b'gpu = "8GiB"\nram = 0.5\nssd = "auto"\nssd_path = "x"\nstaging_pages = 4\ndevice = "cuda:0"\n',
    )
    configs, shapes = (
        tuple(path.read_bytes() for path in sorted(data_path(name).glob("*.toml")))
        for name in ("configs", "configs/models")
    )
    budget = struct.pack("<8sqd", b"tiermemB", 10**8, 1.8e9)
    budget += zlib.crc32(budget).to_bytes(4, "little")
    made_text = json.dumps(made().to_table()).encode()
    return {
        "header": Parser((pack_header(LAYOUT),), _header),
        "trailer": Parser(TRAILER_SEEDS, _trailer, ()),
        "sound trailer": Parser(TRAILER_SEEDS, _sound_trailer, ()),
        "index records": Parser(RECORDS, _records, ()),
        "sound index records": Parser(RECORDS, _sound_records, ()),
        "index file": Parser(INDEX_EDITS, _index_file, ()),
        "write budget": Parser((budget,), _budget, ()),
        "sound write budget": Parser((budget,), _sound_budget, ()),
        "JSON configuration": Parser((json_config,), _json_config),
        "TOML configuration": Parser((toml_config, *configs), _toml_config),
        "model shape": Parser(shapes, _shape),
        "size": Parser((b"8GiB", b"50%", b"auto", b"0.5", b"1.5 GB"), _size),
        "calibration": Parser((made_text,), _calibration, ()),
        "stats": Parser((_stats(),), _snapshot, ()),
        "token ids": Parser(
            (np.arange(20, dtype=np.int64).tobytes(),), _token_ids, (TypeError, ValueError)
        ),
    }


# ---- many inputs -----------------------------------------------------------------------------------------


def try_input(name: str, parser: Parser, data: bytes, where: Path) -> None:
    """Parse; raises ViolationError where something comes out that is not documented."""
    try:
        parser.parse(data, where)
    except parser.refuses:
        return
    except ViolationError as error:
        raise ViolationError(f"{name}: {error}; the input: {data!r}") from error
    except Exception as error:
        raise ViolationError(
            f"{name}: {type(error).__name__}: {error}; the input: {data!r}"
        ) from error


def run_parsers(seed: int, where: Path, tally: Tally) -> None:
    """INPUTS mutated inputs for each parser."""
    rng = random.Random(seed)
    where.chmod(0o700)
    logging.getLogger("tiermem").setLevel(logging.CRITICAL)
    every = parsers()
    corpus = [data for parser in every.values() for data in parser.seeds]
    for name, parser in every.items():
        for _ in range(INPUTS):
            data = mutated(rng.choice(parser.seeds), corpus, rng)
            try_input(name, parser, data, where)
            tally.inputs[name] += 1
