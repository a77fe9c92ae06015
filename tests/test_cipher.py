"""An encrypted SSD tier: nothing readable on the disk, nothing changed there is served, no key is shown."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_manager import config, grow
from test_store import PAGE, TOKENS, found
from world import LAYOUT, kv_of, store_bytes

pytest.importorskip("cryptography")

from tiermem import (
    ConfigError,
    PageLayout,
    Sequence,
    TierConfig,
    TierManager,
    TransferError,
    _core,
    cipher,
)
from tiermem._core import Tier
from tiermem.cipher import MOST_LAYERS, Seal, StoreCipher
from tiermem.cipher_key import KEY_VARIABLE, SecretKey, find_key
from tiermem.slot_scan import Part
from tiermem.store import ColdStore
from tiermem.store_check import check_page, check_pages
from tiermem.store_format import TRAILER_BYTES, pack_trailers, sound_trailers
from tiermem.store_reader import StoreReader
from tiermem.store_transfer import StoreTransfer

SECRET = bytes(range(7, 39))
KEY = SecretKey(SECRET)
STRIDE = LAYOUT.slot_bytes + TRAILER_BYTES
LAYERS = LAYOUT.num_layers


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture
def sealed(tmp_path: Path, key_file: Path) -> TierConfig:
    """Of an encrypted store."""
    return replace(config(8, 8, 20, tmp_path / "s"), ssd_key_file=key_file)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def engine() -> Iterator[StoreCipher]:
    made = StoreCipher(KEY, LAYOUT)
    yield made
    made.close()


def pages_of(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 256, (count, LAYOUT.slot_bytes), dtype=np.uint8)


def rows(array: np.ndarray) -> np.ndarray:
    """Where each row lies."""
    return array.ctypes.data + np.arange(len(array), dtype=np.int64) * array.strides[0]


# ---- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_pages_come_back_and_layers_alone_too(
    engine: StoreCipher, rng: np.random.Generator, count: int
) -> None:
    plain = pages_of(rng, count)
    hidden = np.zeros_like(plain)
    seals = engine.new_seals(count)
    engine.encrypt(seals, range(LAYERS), rows(plain), rows(hidden))
    size = LAYOUT.layer_bytes
    for layer in range(LAYERS):
        piece = slice(layer * size, (layer + 1) * size)
        assert (hidden[:, piece] == plain[:, piece]).mean() < 0.05
        alone = hidden[:, piece].copy()
        assert engine.decrypt(seals, range(layer, layer + 1), rows(alone)).all()
        assert np.array_equal(alone, plain[:, piece])
    assert engine.decrypt(seals, range(LAYERS), rows(hidden)).all()
    assert np.array_equal(hidden[:, : LAYOUT.page_bytes], plain[:, : LAYOUT.page_bytes])


def test_equal_pages_are_never_encrypted_equally(engine: StoreCipher) -> None:
    plain = np.zeros((4, LAYOUT.slot_bytes), dtype=np.uint8)
    hidden = np.zeros_like(plain)
    seals = engine.new_seals(4)
    engine.encrypt(seals, range(LAYERS), rows(plain), rows(hidden))
    size = LAYOUT.layer_bytes
    slices = {row[i * size :][:size].tobytes() for row in hidden for i in range(LAYERS)}
    assert len(slices) == 4 * LAYERS
    assert len({seal.nonce for seal in seals}) == 4


def test_a_changed_byte_of_a_layer_a_tag_or_a_nonce_is_found(
    engine: StoreCipher, rng: np.random.Generator
) -> None:
    plain = pages_of(rng, 1)
    hidden = np.zeros_like(plain)
    (seal,) = engine.new_seals(1)
    engine.encrypt([seal], range(LAYERS), rows(plain), rows(hidden))
    for _ in range(50):
        bad = hidden.copy()
        bad[0, rng.integers(LAYOUT.page_bytes)] ^= np.uint8(1 << rng.integers(8))
        assert not engine.decrypt([seal], range(LAYERS), rows(bad)).any()
    tags = seal.tags.copy()
    tags[LAYERS - 1, 3] ^= 1
    nonce = bytes([seal.nonce[0] ^ 1]) + seal.nonce[1:]
    for other in (Seal(seal.nonce, tags), Seal(nonce, seal.tags), None):
        assert not engine.decrypt([other], range(LAYERS), rows(hidden.copy())).any()
    swapped = hidden.copy()  # two layers of one page
    size = LAYOUT.layer_bytes
    swapped[0, :size], swapped[0, size : 2 * size] = hidden[0, size : 2 * size], hidden[0, :size]
    assert not engine.decrypt([seal], range(LAYERS), rows(swapped)).any()


def test_a_trailer_is_authentic_as_a_whole(engine: StoreCipher, rng: np.random.Generator) -> None:
    sums = rng.integers(1, 2**63, (3, LAYERS), dtype=np.uint64)
    raw = pack_trailers(LAYOUT, [None] * 3, 77, sums)
    seals = engine.new_seals(3)
    for seal in seals:
        seal.tags[:] = rng.integers(1, 256, seal.tags.shape, dtype=np.uint8)
    engine.seal_trailers(raw, seals)
    records, sound = sound_trailers(LAYOUT, raw)
    assert sound.all()
    assert not (records["checksums"][:, :LAYERS] == sums).any()
    found_sums, found_seals = engine.open_trailers(raw)
    assert np.array_equal(found_sums, sums)
    for seal, other in zip(seals, found_seals, strict=True):
        assert other is not None
        assert (seal.nonce, seal.tags.tobytes()) == (other.nonce, other.tags.tobytes())
    used = 240 + LAYERS * 24
    for _ in range(300):
        bad = raw.copy()
        bad[1, rng.integers(used)] ^= np.uint8(1 << rng.integers(8))
        _, opened = engine.open_trailers(bad)
        assert [seal is not None for seal in opened] == [True, False, True]
    other = StoreCipher(SecretKey(SECRET[::-1]), LAYOUT)
    assert other.open_trailers(raw)[1] == [None] * 3
    other.close()


def test_a_layout_with_more_layers_than_tags_have_room_is_refused() -> None:
    layout = PageLayout(MOST_LAYERS + 1, 1, 16, "float16", 16)
    with pytest.raises(ConfigError, match=f"must be at most {MOST_LAYERS} for an encrypted"):
        StoreCipher(KEY, layout)
    StoreCipher(KEY, dataclasses.replace(layout, num_layers=MOST_LAYERS)).close()


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, sealed: TierConfig
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.exceptions", None)
    with pytest.raises(ConfigError, match=r"pip install 'tiermem\[encryption\]'"):
        TierManager(LAYOUT, sealed)


def read_all(sequence: Sequence) -> None:
    for layer in range(LAYERS):
        sequence.read(layer, 0, sequence.num_tokens)


# ---- a store ---------------------------------------------------------------------------------------


def test_an_encrypted_store_serves_what_was_stored_and_shows_nothing(
    tmp_path: Path, sealed: TierConfig
) -> None:
    with TierManager(LAYOUT, sealed) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
        manager.flush()
        assert manager.stats().ssd_io is not None and "AES-256-GCM" in str(manager.stats().ssd_io)
        plain_staging = manager.stats().staging_host_bytes
        assert plain_staging >= 4 * LAYOUT.slot_bytes
    data = (tmp_path / "s" / "slots").read_bytes()
    for layer in range(LAYERS):
        k, _ = kv_of(b"", np.array(TOKENS), 0, layer)
        assert k[0].numpy().tobytes()[:16] not in data
    assert SECRET not in b"".join(
        p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()
    )
    with TierManager(LAYOUT, sealed) as manager:
        assert found(manager) == len(TOKENS)
        manager.check()


@pytest.mark.parametrize(("gpu", "ram"), [(2, 0), (2, 2), (4, 0)])
def test_streaming_write_through_and_spilling_work_encrypted(
    sealed: TierConfig, gpu: int, ram: int
) -> None:
    """Pages larger than the hot tier: written layer by layer, streamed, renamed and found again."""
    size = LAYOUT.slot_bytes
    tight = replace(sealed, gpu=gpu * size, ram=ram * size, ssd=store_bytes(40))
    with TierManager(LAYOUT, tight) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, TOKENS)
        for token in range(500, 500 + 2 * PAGE, 7):
            grow(manager, sequence, list(range(token, token + 7)))
        assert manager.stats().corrupt_pages == 0
        every = np.array(sequence.token_ids)
        manager.flush()
        other = manager.open_sequence()
        grow(manager, other, list(range(9000, 9000 + 3 * PAGE)))
        for layer in range(LAYERS):
            k, v = sequence.read(layer, 0, sequence.num_tokens)
            want = kv_of(b"", every, 0, layer)
            assert torch.equal(k, want[0])
            assert torch.equal(v, want[1])
        manager.check()
    with TierManager(LAYOUT, tight) as manager:
        assert found(manager) == len(TOKENS)
        assert manager.stats().corrupt_pages == 0


def test_every_write_has_a_nonce_of_its_own(
    sealed: TierConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key and nonce meet twice: write-through, undone steps, renaming, restarts with a stopped clock."""
    used: set[tuple[bytes, bytes]] = set()
    real = StoreCipher._gcm

    def note(
        self: StoreCipher, key: bytes, first: int, second: int, tag: bytes | None = None
    ) -> object:
        if tag is None:  # to encrypt
            message = (key, cipher._NONCE.pack(first, second))
            assert message not in used
            used.add(message)
        return real(self, key, first, second, tag)

    monkeypatch.setattr(StoreCipher, "_gcm", note)
    monkeypatch.setattr("time.time_ns", lambda: 12345)
    size = LAYOUT.slot_bytes
    tight = replace(sealed, gpu=2 * size, ram=0, ssd=store_bytes(30))
    for turn in range(3):
        with TierManager(LAYOUT, tight) as manager:
            sequence = manager.open_sequence()
            for attempt in range(
                3
            ):  # a step that is undone after its first layers, and tried again
                with (
                    contextlib.suppress(RuntimeError),
                    manager.step([sequence], new_tokens=6 * PAGE) as step,
                ):
                    for layer in range(LAYERS):
                        k, v = kv_of(b"", np.array(TOKENS), 0, layer)
                        step.append(layer, k, v)
                        step.attend(layer, torch.randn(6 * PAGE, 3, LAYOUT.head_dim))
                        if attempt < 2 and layer == attempt:
                            raise RuntimeError("undone")
            sequence.record(TOKENS)
            manager.flush()
            grow(manager, sequence, [turn, 1, 2])
    assert len(used) > 6 * (LAYERS + 1)


@pytest.mark.parametrize(
    "place",
    [
        100,
        LAYOUT.page_bytes - 1,
        LAYOUT.slot_bytes + 60,
        LAYOUT.slot_bytes + 230,
        LAYOUT.slot_bytes + 245,
        LAYOUT.slot_bytes + 240 + LAYERS * 8 + 5,
    ],
)
@pytest.mark.parametrize("has_right_crc", [False, True])
def test_changed_bytes_are_a_miss(
    tmp_path: Path, sealed: TierConfig, place: int, has_right_crc: bool
) -> None:
    with TierManager(LAYOUT, sealed) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
    slots = tmp_path / "s" / "slots"
    data = bytearray(slots.read_bytes())
    for slot in range(6):
        data[slot * STRIDE + place] ^= 4
        if has_right_crc:
            end = (slot + 1) * STRIDE
            body = bytes(data[end - TRAILER_BYTES : end - 4])
            data[end - 4 : end] = zlib.crc32(body).to_bytes(4, "little")
    slots.write_bytes(data)
    with TierManager(LAYOUT, sealed) as manager:
        sequence = manager.open_sequence(TOKENS)
        assert sequence.num_tokens == len(TOKENS)
        with pytest.raises(TransferError):
            read_all(sequence)
        assert manager.stats().corrupt_pages > 0


def test_a_page_of_another_slot_is_not_served(tmp_path: Path, sealed: TierConfig) -> None:
    """Authentic bytes in the wrong place: the payload of one slot with the trailer of another."""
    with TierManager(LAYOUT, sealed) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
    slots = tmp_path / "s" / "slots"
    data = bytearray(slots.read_bytes())
    page = LAYOUT.slot_bytes
    data[:page], data[STRIDE : STRIDE + page] = data[STRIDE : STRIDE + page], data[:page]
    slots.write_bytes(data)
    with TierManager(LAYOUT, sealed) as manager:
        sequence = manager.open_sequence(TOKENS)
        with pytest.raises(TransferError):
            sequence.read(0, 0, sequence.num_tokens)
        assert manager.stats().corrupt_pages > 0


def test_the_wrong_key_no_key_and_one_too_many_are_refused(
    tmp_path: Path, sealed: TierConfig, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TierManager(LAYOUT, sealed) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
    header = json.loads((tmp_path / "s" / "header.json").read_text())
    assert header["cipher_key"] == KEY.key_id.hex()
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=f"is encrypted with the key {KEY.key_id.hex()}: give it"):
        TierManager(LAYOUT, replace(sealed, ssd_key_file=None))
    key_file.write_bytes(SECRET[::-1])
    with pytest.raises(
        ConfigError, match=f"with the key {KEY.key_id.hex()}, and [0-9a-f]{{32}} is"
    ):
        TierManager(LAYOUT, sealed)
    assert {p: p.read_bytes() for p in before} == before
    key_file.unlink()
    monkeypatch.setenv(KEY_VARIABLE, SECRET.hex())
    with TierManager(LAYOUT, replace(sealed, ssd_key_file=None)) as manager:
        assert found(manager) == len(TOKENS)
    monkeypatch.delenv(KEY_VARIABLE)
    plain = replace(sealed, ssd_key_file=None, ssd_path=tmp_path / "plain")
    TierManager(LAYOUT, plain).close()
    monkeypatch.setenv(KEY_VARIABLE, SECRET.hex())
    with pytest.raises(ConfigError, match="is not encrypted, and a key is given"):
        TierManager(LAYOUT, plain)


def test_memory_for_what_is_being_encrypted_is_bounded(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiermem.vault.PART_BYTES", 2 * LAYOUT.slot_bytes)
    monkeypatch.setattr("tiermem.store_transfer.PART_BYTES", 2 * LAYOUT.slot_bytes)
    store = ColdStore(tmp_path / "s", LAYOUT, store_bytes(40), "threads", 30.0, key=KEY)
    assert store.staging_bytes == 4 * 2 * LAYOUT.slot_bytes
    plain = pages_of(rng, 40)
    plain[:, LAYOUT.page_bytes :] = 0
    slots = np.arange(40, dtype=np.int64)
    first = store.write(slots[:20], rows(plain)[:20], [None] * 20)
    second = store.write(slots[20:], rows(plain)[20:], [None] * 20)
    for transfer in (second, first):
        transfer.wait()
        assert transfer.poll()
    back = np.zeros_like(plain)
    reading = store.read(slots, rows(back))
    reading.wait()
    assert reading.poll()
    assert store.verify(reading).all()
    assert np.array_equal(back[:, : LAYOUT.page_bytes], plain[:, : LAYOUT.page_bytes])
    store.close()


# ---- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        SECRET,
        SECRET.hex().encode(),
        SECRET.hex().upper().encode() + b"\n",
        base64.b64encode(SECRET) + b"\n",
    ],
    ids=["raw", "hex", "HEX", "base64"],
)
def test_a_key_is_read_in_every_form(key_file: Path, data: bytes) -> None:
    key_file.write_bytes(data)
    key = find_key(key_file)
    assert key is not None and key.secret == SECRET


def test_what_is_no_key_is_refused_and_not_repeated(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    texts = [
        b"",
        b"x",
        bytes(32),
        b"\n" * 32,
        b"0" * 64,
        SECRET[:31],
        SECRET + b"x",
        b"hunter2" * 9,
    ]
    texts += [rng.randbytes(rng.choice([16, 31, 33, 43, 44, 63, 65, 5000])) for _ in range(100)]
    for text in texts:
        key_file.write_bytes(text)
        with pytest.raises(ConfigError, match="holds no key; must hold 32 bytes, or") as caught:
            find_key(key_file)
        assert b"hunter" not in str(caught.value).encode()
    monkeypatch.setenv(KEY_VARIABLE, "hunter2" * 9)
    with pytest.raises(ConfigError, match="TIERMEM_SSD_KEY: holds no key") as caught:
        find_key(None)
    assert "hunter" not in str(caught.value)


def test_a_key_that_others_can_read_a_link_or_no_file_is_refused(
    key_file: Path, tmp_path: Path
) -> None:
    for mode in (0o640, 0o604, 0o660):
        key_file.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:04o}; must belong"):
            find_key(key_file)
    key_file.chmod(0o400)
    assert find_key(key_file) is not None
    (tmp_path / "link").symlink_to(key_file)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, says in [
        ("link", "cannot be read"),
        ("pipe", "regular file"),
        ("none", "No such file"),
    ]:
        with pytest.raises(ConfigError, match=says):
            find_key(tmp_path / name)


def test_a_key_is_shown_nowhere(
    tmp_path: Path,
    sealed: TierConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    forms = [SECRET.hex(), base64.b64encode(SECRET).decode(), repr(SECRET)[2:-1], str(list(SECRET))]
    monkeypatch.setenv(KEY_VARIABLE, SECRET.hex())
    with TierManager(LAYOUT, sealed) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
        manager.flush()
        shown = [
            repr(KEY), str(KEY), repr(manager.config), json.dumps(manager.config.to_table()),
            json.dumps(manager.stats().to_json()), repr(manager.stats()), caplog.text, repr(vars(KEY.__class__)),
        ]  # fmt: skip
    for text, form in itertools.product(shown, forms):
        assert form not in text
    assert KEY.key_id.hex() in repr(KEY)
    assert TierConfig.from_table(sealed.to_table()) == sealed
    assert manager.stats is not None and Tier.SSD in Tier


def test_a_slice_that_is_not_authentic_is_not_served_though_its_checksum_fits(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Who flips bits of a cipher text knows which bits of the plain text change: checksums are not enough."""
    store = ColdStore(tmp_path / "s", LAYOUT, store_bytes(4), "threads", 30.0, key=KEY)
    plain = pages_of(rng, 1)
    slots = np.zeros(1, dtype=np.int64)
    writing = store.write(slots, rows(plain), [None])
    writing.wait()
    assert writing.poll()
    with (tmp_path / "s" / "slots").open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    forged = plain[0, : LAYOUT.layer_bytes].copy()
    forged[0] ^= 1
    store._trailers.load(slots)
    store._trailers.sums[0][0] = _core.checksum_pages(rows(forged[None]), LAYOUT.layer_bytes, 1)[
        0, 0
    ]
    back = np.zeros((1, LAYOUT.layer_bytes), dtype=np.uint8)
    reading = store.read_slices(slots, 0, rows(back))
    reading.wait()
    assert reading.poll()
    assert not store.verify(reading).any()
    store.close()


@pytest.mark.parametrize("is_sealed", [False, True])
def test_an_index_that_names_another_page_serves_nothing(
    tmp_path: Path, sealed: TierConfig, is_sealed: bool
) -> None:
    """The trailer says which page it is: an entry that was forged, or damaged, leads to a miss."""
    chosen = sealed if is_sealed else replace(sealed, ssd_key_file=None)
    with TierManager(LAYOUT, chosen) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
        manager.flush()
        pages = manager._core.prefixes.pages()
        names = manager._core.prefixes.names_of(pages)
        slots = np.array(manager._core.table.slots(pages, Tier.SSD), dtype=np.int64)
    key = KEY if is_sealed else None
    store = ColdStore(tmp_path / "s", LAYOUT, store_bytes(20), "threads", 30.0, key=key)
    store.index.take_stored()
    store.index.publish(np.roll(slots, 1), names)  # each is said to be where another one is
    store.close()
    with TierManager(LAYOUT, chosen) as manager:
        sequence = manager.open_sequence(TOKENS)
        assert sequence.num_tokens == len(TOKENS)
        with pytest.raises(TransferError):
            read_all(sequence)
        assert manager.stats().corrupt_pages > 0


def test_slices_that_were_started_end_before_a_refused_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Their slots are given up by then: nothing may still be on its way there."""
    monkeypatch.setattr("tiermem.store_transfer.PART_BYTES", LAYOUT.layer_bytes)
    store = ColdStore(tmp_path / "s", LAYOUT, store_bytes(4), "threads", 30.0, key=KEY)
    pages = rng.integers(0, 256, (2, LAYOUT.layer_bytes), dtype=np.uint8)
    encrypt = iter([store._vault.encrypt_layer])

    def refused_at_second(transfer: StoreTransfer, *rest: object) -> object:
        started.append(transfer)
        for first in encrypt:
            return first(transfer, *rest)
        raise TransferError("no memory to encrypt in")

    started: list[StoreTransfer] = []
    monkeypatch.setattr(store._vault, "encrypt_layer", refused_at_second)
    with pytest.raises(TransferError, match="no memory to encrypt in"):
        store.write_slices(np.arange(2), 0, pages.ctypes.data + np.arange(2) * pages.shape[1])
    assert len(started) == 2 and started[0] is started[1] and started[0].has_ended
    store.close()


# ---- looking inside --------------------------------------------------------------------------------


def test_verify_needs_the_key_and_finds_what_is_damaged(
    tmp_path: Path, sealed: TierConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TierManager(LAYOUT, sealed) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
    path = tmp_path / "s"
    with StoreReader(path) as reader:
        content = reader.content()
        with pytest.raises(
            ConfigError, match=f"encrypted with the key {reader.key_id}: give it in"
        ):
            check_pages(reader, content, content.rows(), Part.WHOLE)
        assert check_pages(reader, content, content.rows(), Part.TRAILER).damaged == ()
        assert check_page(reader, content, 0) is None
    monkeypatch.setenv(KEY_VARIABLE, SECRET.hex())
    with StoreReader(path) as reader:
        content = reader.content()
        assert check_pages(reader, content, content.rows(), Part.WHOLE).reports == ()
    with (path / "slots").open("r+b") as file:
        file.seek(2 * STRIDE + 11)
        byte = file.read(1)[0]
        file.seek(2 * STRIDE + 11)
        file.write(bytes([byte ^ 32]))
    with StoreReader(path) as reader:
        content = reader.content()
        damaged = check_pages(reader, content, content.rows(), Part.WHOLE).damaged
        assert [report.slot for report in damaged] == [2]
        assert check_pages(reader, content, content.rows(), Part.TRAILER).damaged == ()
    monkeypatch.setenv(KEY_VARIABLE, SECRET[::-1].hex())
    with StoreReader(path) as reader:
        assert not reader.can_read_pages


def test_a_rebuilt_index_of_an_encrypted_store_finds_its_pages(
    tmp_path: Path, sealed: TierConfig
) -> None:
    with TierManager(LAYOUT, sealed) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
    for path in (tmp_path / "s" / "index").iterdir():
        path.write_bytes(b"damaged" * 1000)
    with TierManager(LAYOUT, sealed) as manager:
        assert found(manager) == len(TOKENS)
