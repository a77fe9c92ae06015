"""What the reference model is trained on, and that it is never trained on what measures it."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "models" / "reference" / "corpus.tsv"
PROMPT_SHA256 = "0f2c8b65edf24c37089afd92fae1f1f4cd605294a40dd124175b6fde270af220"
LINES = [f"a line of more than forty characters, and its number is {n}" for n in range(60)]


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models.corpus", ROOT / "models" / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def names(corpus: ModuleType, held_out: bool, count: int) -> list[str]:
    """File names below `Lib` that the split rule holds out, or does not."""
    found = (f"m{n}.py" for n in range(10_000) if corpus.is_held_out(f"Lib/m{n}.py") is held_out)
    return [next(found) for _ in range(count)]


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def source_trees(corpus: ModuleType, root: Path, library: dict[str, bytes]) -> list[Path]:
    """A library of these files, an empty documentation and packages of one file each."""
    packages = {f"{p}/a.py": f"# {p}\n".encode() * 20 for p in corpus.PACKAGES}
    trees = {"lib": library, "doc": {"a.rst": b"Text.\n" * 20}, "site": packages}
    for name, files in trees.items():
        write_tree(root / name, files)
    return [root / "lib", root / "doc", root / "site"]


def test_one_in_twenty_is_held_out(corpus: ModuleType) -> None:
    share = np.mean([corpus.is_held_out(f"Doc/{n}.rst") for n in range(20_000)])
    assert 0.04 < share < 0.06
    assert not any(corpus.is_held_out(f"torch/{n}.py") for n in range(1_000))


def test_copy_of_a_held_out_document_is_dropped(corpus: ModuleType, tmp_path: Path) -> None:
    (secret,), (copy, free) = names(corpus, True, 1), names(corpus, False, 2)
    text = "\n".join(LINES).encode()
    library = {secret: text, copy: b"# moved\n" + text[: len(text) // 2], free: b"x = 1\n" * 50}
    documents = corpus.collect(*source_trees(corpus, tmp_path, library))
    split_of = {d.name: d.split for d in documents}
    assert split_of[f"Lib/{secret}"] is corpus.Split.HELD_OUT
    assert split_of[f"Lib/{copy}"] is corpus.Split.COPY_OF_HELD_OUT
    assert split_of[f"Lib/{free}"] is corpus.Split.TRAIN


def test_unusable_files_are_left_out(corpus: ModuleType, tmp_path: Path) -> None:
    library = {
        "good.py": b"pass\n" * 20,
        "short.py": b"pass\n",
        "binary.py": b"\xff\xfe" * 50,
        "greek.py": "\u03b1".encode() * 50,
        "licence.py": b"# Under the GNU GPL.\n" * 20,
        "encodings/table.py": b"pass\n" * 20,
        "site-packages/other.py": b"pass\n" * 20,
        "long.py": b"#" * (corpus.MAX_DOCUMENT_BYTES + 1),
    }
    documents = corpus.collect(*source_trees(corpus, tmp_path, library))
    assert [d.name for d in documents if d.name.startswith("Lib/")] == ["Lib/good.py"]


def test_missing_source_is_named(corpus: ModuleType, tmp_path: Path) -> None:
    library, documentation, _ = source_trees(corpus, tmp_path, {"good.py": b"pass\n" * 20})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        corpus.collect(library, documentation, tmp_path / "nowhere")


def test_saved_corpus_reads_back(corpus: ModuleType, tmp_path: Path) -> None:
    held_out, train = names(corpus, True, 2), names(corpus, False, 3)
    library = {name: (name + "\n").encode() * 20 for name in (*held_out, *train)}
    documents = corpus.collect(*source_trees(corpus, tmp_path, library))
    splits = [corpus.concatenate(documents, s) for s in (corpus.Split.TRAIN, corpus.Split.HELD_OUT)]
    corpus.save(tmp_path / "corpus.npz", *splits)
    for written, read in zip(splits, corpus.load(tmp_path / "corpus.npz"), strict=True):
        assert read.names == written.names
        assert [d.tobytes() for d in read.documents()] == [d.tobytes() for d in written.documents()]
    kept = [name for name in splits[1].names if name.startswith("Lib/")]
    assert sorted(kept) == sorted(f"Lib/{name}" for name in held_out)


def test_shipped_manifest_obeys_the_split(corpus: ModuleType) -> None:
    rows = [line.split("\t") for line in MANIFEST.read_text("utf-8").splitlines()]
    files = [row for row in rows if not row[0].startswith("#")]
    assert len(files) > 5_000
    for split, _, _, name in files:
        assert (split == "held-out") is corpus.is_held_out(name), name
    for head in rows[:3]:
        mine = [row for row in files if f"# {row[0]}" == head[0]]
        assert head[1] == f"{len(mine)} files"
        assert head[2] == f"{sum(int(row[1]) for row in mine)} bytes"


def test_demonstration_prompt_is_the_start_of_a_held_out_document() -> None:
    rows = MANIFEST.read_text("utf-8").splitlines()
    assert any(
        row.startswith("held-out\t") and row.endswith("\tLib/http/client.py") for row in rows
    )
    prompt = (ROOT / "examples" / "long_prompt.txt").read_bytes()
    assert prompt.startswith(b'r"""HTTP/1.1 client library')
    assert hashlib.sha256(prompt).hexdigest() == PROMPT_SHA256
