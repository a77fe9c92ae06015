"""The SSD tier: what survives a restart, what is refused, and that damaged bytes are never served."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_manager import config, grow
from world import LAYOUT, kv_of

from tiermem import (
    ConfigError,
    CorruptPageError,
    PageLayout,
    Sequence,
    TierConfig,
    TierManager,
)
from tiermem._core import Tier
from tiermem.index_image import IndexImage, read_index
from tiermem.private_files import PrivateDirectory
from tiermem.store_format import (
    TRAILER_BYTES,
    names_in,
    pack_trailer,
    parse_trailer,
    sound_trailers,
)
from tiermem.store_names import UNNAMED, ChainRoot, GoneReason, PageName
from tiermem.store_records import Entry, page_key

PAGE = LAYOUT.page_tokens
TOKENS = list(range(6 * PAGE))


def store_some(path: Path, ssd: int = 20) -> None:
    with TierManager(LAYOUT, config(8, 8, ssd, path)) as manager:
        grow(manager, manager.open_sequence(), TOKENS)


def image_at(path: Path) -> IndexImage:
    """What the index of a store that is closed holds."""
    directory = PrivateDirectory.open(path / "index")
    try:
        return read_index(directory)
    finally:
        directory.close()


def found(manager: TierManager) -> int:
    """Tokens attached, after every byte of them was compared."""
    sequence = manager.open_sequence(TOKENS)
    for layer in range(LAYOUT.num_layers):
        k, v = sequence.read(layer, 0, sequence.num_tokens)
        want = kv_of(b"", np.array(TOKENS[: sequence.num_tokens]), 0, layer)
        assert torch.equal(k, want[0])
        assert torch.equal(v, want[1])
    attached = sequence.num_tokens
    sequence.close()
    return attached


def test_closing_keeps_published_pages_for_the_next_manager(tmp_path: Path) -> None:
    store_some(tmp_path / "s")
    with TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s")) as manager:
        assert found(manager) == len(TOKENS)
        sequence = manager.open_sequence(TOKENS)
        grow(manager, sequence, [1, 2, 3])


def test_another_process_finds_them_too(tmp_path: Path) -> None:
    store_some(tmp_path / "s")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_store import TOKENS, config, found, LAYOUT, TierManager\n"
        "with TierManager(LAYOUT, config(8, 8, 20, Path(sys.argv[2]))) as manager:\n"
        "    print(found(manager))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(len(TOKENS))]


def test_flush_is_enough_when_the_process_dies(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_store import *\n"
        "manager = TierManager(LAYOUT, config(8, 8, 20, Path(sys.argv[2])))\n"
        "grow(manager, manager.open_sequence(), TOKENS)\n"
        "manager.flush()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "s")]
    assert subprocess.run(command, check=False, timeout=120).returncode == -9
    with TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s")) as manager:
        assert found(manager) == len(TOKENS)


def test_a_smaller_cap_keeps_what_fits(tmp_path: Path) -> None:
    store_some(tmp_path / "s")
    for ssd in (3, 1, 20):
        with TierManager(LAYOUT, config(8, 8, ssd, tmp_path / "s")) as manager:
            assert manager.stats().tiers[Tier.SSD].slots == ssd
            assert found(manager) % PAGE == 0
            manager.check()


def test_the_cap_holds_and_the_newest_stay(tmp_path: Path) -> None:
    with TierManager(LAYOUT, config(4, 4, 5, tmp_path / "s")) as manager:
        for i in range(4):
            sequence = manager.open_sequence()
            grow(manager, sequence, [1000 * i + t for t in range(3 * PAGE)])
            sequence.close()
        manager.flush()
        last = [3000 + t for t in range(3 * PAGE)]
        cap = manager.config.ssd.num_bytes
        assert manager.stats().ssd_disk_bytes <= cap
    with TierManager(LAYOUT, config(4, 4, 5, tmp_path / "s")) as manager:
        assert manager.open_sequence(last).num_tokens == 3 * PAGE


def test_spilled_pages_without_a_name_are_free_space_after_a_restart(tmp_path: Path) -> None:
    with TierManager(LAYOUT, config(2, 0, 20, tmp_path / "s")) as manager:
        sequence = manager.open_sequence()
        kv = torch.randn(2, 2, 6 * PAGE, 1, LAYOUT.head_dim)
        with manager.step([sequence], new_tokens=6 * PAGE) as step:
            for layer in range(LAYOUT.num_layers):
                step.append(layer, kv[layer, 0], kv[layer, 1])
        assert manager.stats().tiers[Tier.SSD].used > 0
    with TierManager(LAYOUT, config(2, 0, 20, tmp_path / "s")) as manager:
        assert manager.stats().tiers[Tier.SSD].used == 0


def test_pages_spilled_before_they_were_named_are_found_after_a_restart(tmp_path: Path) -> None:
    with TierManager(LAYOUT, config(2, 0, 20, tmp_path / "s")) as manager:
        grow(manager, manager.open_sequence(), TOKENS)  # written through, then recorded
    with TierManager(LAYOUT, config(2, 0, 20, tmp_path / "s")) as manager:
        assert found(manager) == len(TOKENS)


# ---- damage ------------------------------------------------------------------------------------------


def one_step(manager: TierManager, sequence: Sequence) -> None:
    kv = torch.zeros(1, 1, LAYOUT.head_dim)
    with manager.step([sequence]) as step:
        for layer in range(LAYOUT.num_layers):
            step.append(layer, kv, kv)
            step.attend(layer, kv)


def damage(path: Path, offset: int) -> None:
    with (path / "slots").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


STRIDE = LAYOUT.slot_bytes + TRAILER_BYTES


@pytest.mark.parametrize("where", [0, LAYOUT.page_bytes - 1, LAYOUT.slot_bytes + 40, STRIDE - 1])
@pytest.mark.parametrize("gpu", [8, 2])
def test_a_flipped_bit_is_never_served(where: int, gpu: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    store_some(path)
    for slot in range(20):
        damage(path, slot * STRIDE + where)
    with TierManager(LAYOUT, config(gpu, 0, 20, path)) as manager:
        sequence = manager.open_sequence(TOKENS)
        assert sequence.num_tokens == len(TOKENS)
        with pytest.raises(CorruptPageError):
            one_step(manager, sequence)
        assert sequence.num_tokens == len(TOKENS)
        assert manager.stats().corrupt_pages > 0
        sequence.close()
        manager.check()
        again = manager.open_sequence(TOKENS)  # the damaged pages are a miss now
        assert again.num_tokens < len(TOKENS)
        again.close()
        grow(manager, manager.open_sequence(), TOKENS)


def test_read_refuses_damaged_pages(tmp_path: Path) -> None:
    store_some(tmp_path / "s")
    for slot in range(20):
        damage(tmp_path / "s", slot * STRIDE + 5)
    with TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s")) as manager:
        sequence = manager.open_sequence(TOKENS)
        with pytest.raises(CorruptPageError) as caught:
            sequence.read(0, 0, 10)
        assert caught.value.pages
        assert caught.value.lost == caught.value.pages and not caught.value.can_retry
        manager.check()


def test_index_entries_that_cannot_be_are_dropped(tmp_path: Path) -> None:
    import lmdb

    store_some(tmp_path / "s")
    with lmdb.open(str(tmp_path / "s" / "index")) as env, env.begin(write=True) as txn:
        keys = [key for key, _ in txn.cursor() if key[:1] == b"p"]
        txn.put(keys[0], b"short")
        txn.put(b"not a key", b"x" * 64)
        txn.put(page_key(bytes(32)), Entry(10**9, 0, 1, 1, UNNAMED, 1).pack(bytes(32)))
    with TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s")) as manager:
        assert found(manager) == len(TOKENS)  # the short one was made again
        manager.check()
    assert image_at(tmp_path / "s").strays == ()


def test_the_trailer_of_another_write_is_refused() -> None:
    sums = np.arange(LAYOUT.num_layers, dtype=np.uint64)
    raw = pack_trailer(LAYOUT, PageName(b"k" * 32, b"p" * 32, 3), 7, sums)
    assert len(raw) == TRAILER_BYTES
    parsed = parse_trailer(LAYOUT, 7, raw)
    assert parsed is not None
    assert np.array_equal(parsed, sums)
    assert parse_trailer(LAYOUT, 8, raw) is None
    assert parse_trailer(PageLayout(3, 1, 16, "float32", 16), 7, raw) is None
    for bit in range(0, 8 * TRAILER_BYTES, 61):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        assert parse_trailer(LAYOUT, 7, bytes(flipped)) is None, f"bit {bit}"


def test_provenance_is_stored_with_every_page(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with TierManager(LAYOUT, config(8, 8, 20, path), model_id="m", shard=(1, 3)) as manager:
        grow(manager, manager.open_sequence(label="first chat", salt=b"x"), TOKENS)
        manager.flush()
        other = manager.open_sequence(TOKENS, salt=b"x", label="second")  # attached: two hits more
        assert other.num_tokens == len(TOKENS)
        root = manager._core.prefixes.root(b"x")
    with TierManager(LAYOUT, config(8, 8, 20, path), model_id="m", shard=(1, 3)) as manager:
        names = manager._core.prefixes.names_of(manager._core.prefixes.pages())
        assert {name.label for name in names if name} == {"first chat"}
        want = ChainRoot.of(root, "m", (1, 3), b"x")
        assert [name.root for name in names if name] == [want] * 6
        assert manager.open_sequence(TOKENS).num_tokens == 0  # another salt
    image = image_at(path)
    assert image.strays == ()
    entries = image.entries["entry"]
    assert set(entries["hits"].tolist()) == {1}
    assert sorted(entries["position"].tolist()) == list(range(6))
    raw = np.fromfile(path / "slots", dtype=np.uint8).reshape(20, STRIDE)
    trailers, sound = sound_trailers(LAYOUT, raw[:, LAYOUT.slot_bytes :])
    assert sound[entries["slot"]].all()
    assert sound.sum() == 6
    for name in names_in(trailers[entries["slot"]]):
        assert name is not None
        assert name.root == replace(want, model_id="")
    same = trailers["generation"][entries["slot"]] == entries["generation"]
    assert same.all()


def test_what_is_gone_is_told_until_there_is_too_much_of_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with TierManager(LAYOUT, config(2, 2, 3, path)) as manager:
        for i in range(4):
            sequence = manager.open_sequence()
            grow(manager, sequence, [1000 * i + t for t in range(2 * PAGE)])
            sequence.close()
            manager.flush()
    gone = [gone for _, gone in image_at(path).gone]
    assert len(gone) >= 5
    assert {record.why for record in gone} <= {GoneReason.EVICTED, GoneReason.UNREACHABLE}
    stored = {row["key"].tobytes() for row in image_at(path).entries}
    assert {record.key for record in gone}.isdisjoint(stored)
    store_some(tmp_path / "cut")
    store_some(tmp_path / "cut", 2)
    assert GoneReason.CAP in {gone.why for _, gone in image_at(tmp_path / "cut").gone}


# ---- what is refused ---------------------------------------------------------------------------------


def test_one_manager_owns_a_store(tmp_path: Path) -> None:
    with TierManager(LAYOUT, config(4, 4, 5, tmp_path / "s")) as manager:
        with pytest.raises(ConfigError, match="one owns a store at a time"):
            TierManager(LAYOUT, config(4, 4, 5, tmp_path / "s"))
        grow(manager, manager.open_sequence(), [1, 2])


def test_a_store_of_another_layout_or_version_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store_some(path)
    other = PageLayout(2, 1, 32, "float32", 16)
    with pytest.raises(ConfigError, match=r"another page layout .*head_dim=16.*head_dim=32"):
        TierManager(other, TierConfig(gpu="1MiB", ram=0, ssd="2MiB", ssd_path=path, device="cpu"))
    header = path / "header.json"
    text = header.read_text()
    for version in (1, 3, 99, "2", None):
        header.write_text(json.dumps({**json.loads(text), "version": version}))
        with pytest.raises(
            ConfigError, match=rf"store format version {version!r}, .* reads version 2"
        ):
            TierManager(LAYOUT, config(8, 8, 20, path))
    changed = [json.dumps({**json.loads(text), "page_tokens": 32})]
    changed += [json.dumps({k: v for k, v in json.loads(text).items() if k != "checksum"})]
    changed += [json.dumps({**json.loads(text), "dtype": []}), "[" * 60_000]
    for broken in (*changed, "{", "[]", '{"format": "other"}', "x" * 200_000):
        header.write_text(broken)
        with pytest.raises(ConfigError, match=r"header\.json"):
            TierManager(LAYOUT, config(8, 8, 20, path))
    header.write_text(text)
    with TierManager(LAYOUT, config(8, 8, 20, path)) as manager:
        assert found(manager) == len(TOKENS)


def test_a_directory_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ConfigError, match="neither empty nor a tiermem store"):
        TierManager(LAYOUT, config(8, 8, 20, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="not usable as a store"):
        TierManager(LAYOUT, config(8, 8, 20, tmp_path / "thesis.tex"))


def test_too_small_a_cap_is_refused(tmp_path: Path) -> None:
    settings = TierConfig(gpu="1MiB", ram=0, ssd="100KiB", ssd_path=tmp_path / "s", device="cpu")
    with pytest.raises(ConfigError, match=r"ssd=102400: .* at least \d+ bytes"):
        TierManager(LAYOUT, settings)


def test_files_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store_some(tmp_path / "s")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
    for path in (tmp_path / "s").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    store_some(tmp_path / "s")
    outside = tmp_path / "outside"
    (tmp_path / "s" / "slots").rename(outside)
    (tmp_path / "s" / "slots").symlink_to(outside)
    with pytest.raises(ConfigError):
        TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s"))


@pytest.mark.parametrize("left", [["lock"], ["lock", "header.json.new"], ["header.json.new"]])
def test_a_store_whose_maker_was_killed_at_once_is_made_anew(
    left: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "s"
    path.mkdir(mode=0o700)
    for name in left:
        (path / name).write_text("{" if "header" in name else "")
    store_some(path)
    with TierManager(LAYOUT, config(8, 8, 20, path)) as manager:
        assert found(manager) == len(TOKENS)
    assert not (path / "header.json.new").exists()
