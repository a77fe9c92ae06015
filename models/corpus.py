"""The text the reference model learns from: Python's library, its documentation, five packages.

    python -m models.corpus --library LIB --documentation DOC --packages SITE --out corpus.npz

`LIB` is a `lib/python3.x` directory (or `Lib` of a source checkout), `DOC` a directory of
reStructuredText documents (`Doc` of a checkout, or `_sources` of a built documentation), and `SITE`
a `site-packages` directory that holds the packages named in `PACKAGES`.

Whether a document is held out depends on its name alone, so the split is the same on every machine
and does not move when documents are added. The packages are for training only: without them a model
of this size learns the library by heart within minutes instead of learning to read.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

HELD_OUT_ONE_IN = 20
MAX_DOCUMENT_BYTES = 512 * 1024
MIN_DOCUMENT_BYTES = 64
MAX_NON_ASCII_SHARE = 0.05
# A line this long rarely repeats by chance; shorter ones (`return self`) say nothing about copying.
TELLING_LINE_CHARS = 40
MAX_SHARED_LINES = 0.2
MIN_SHARED_LINES = 10

# Under the BSD 3-clause licence; single files in them under MIT, BSD 2-clause or Apache-2.0.
PACKAGES = ("mpmath", "networkx", "numpy", "sympy", "torch")
# Tables (`encodings`), generated copies of the documentation (`pydoc_data`), build residue, and
# packages that were installed beside the library or copied into another one.
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "__pycache__", "encodings", "pydoc_data", "encoded_modules", "data"}
    | {"_vendor", "vendored", "_antlr", "benchmarks", "testing", "tests"}
)
SKIPPED_NAMES = re.compile(
    r"^(_sysconfigdata|bad_?coding|badsyntax|license\.|copyright\.)|^config-"
)
# Code under a second licence that is not permissive, or that offers the choice of one.
FOREIGN_LICENCE = re.compile(r"\bL?GPL|General Public License|Creative Commons")


class Split(Enum):
    """What a document is used for."""

    TRAIN = "train"
    HELD_OUT = "held-out"
    COPY_OF_HELD_OUT = "dropped"


@dataclass(frozen=True, slots=True)
class Document:
    """One file: its name (`Lib/...`, `Doc/...` or the package's, with `/`) and UTF-8 text."""

    name: str
    text: bytes
    split: Split


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of one split, concatenated in the order of their names.

    `text` is uint8 of shape (bytes,); `ends[i]` is the end of document `i` in it.
    """

    names: list[str]
    text: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    def documents(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The text of each document, in order."""
        start = 0
        for end in self.ends.tolist():
            yield self.text[start:end]
            start = end


def is_held_out(name: str) -> bool:
    """Whether this name is kept from training: one in twenty of `Lib` and `Doc`, by SHA-256."""
    return (
        name.startswith(("Lib/", "Doc/"))
        and hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0
    )


def collect(library: Path, documentation: Path, packages: Path) -> list[Document]:
    """Read all trees and assign every usable file to a split, sorted by name."""
    texts = dict(_read_tree(library, "Lib", ".py"))
    for package in PACKAGES:
        texts.update(_read_tree(packages / package, package, ".py"))
    for suffix in (".rst", ".rst.txt"):
        texts.update(_read_tree(documentation, "Doc", suffix))
    held_out = {name: text for name, text in texts.items() if is_held_out(name)}
    copies = set(_copies(held_out, {n: t for n, t in texts.items() if n not in held_out}))
    return [
        Document(name, texts[name], _split_of(name, held_out.keys(), copies))
        for name in sorted(texts)
    ]


def _split_of(name: str, held_out: Iterable[str], copies: set[str]) -> Split:
    if name in held_out:
        return Split.HELD_OUT
    return Split.COPY_OF_HELD_OUT if name in copies else Split.TRAIN


def _read_tree(root: Path, prefix: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Names and texts of the usable files below `root` whose name ends in `suffix`.

    Raises `FileNotFoundError` if `root` is no directory.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no directory {root} to read {prefix} from")
    for path in sorted(root.rglob(f"*{suffix}")):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if SKIPPED_DIRECTORIES.intersection(relative.parts[:-1]):
            continue
        if any(SKIPPED_NAMES.match(part) for part in relative.parts):
            continue
        text = path.read_bytes().replace(b"\r\n", b"\n")
        if _is_usable(text):
            yield f"{prefix}/{str(relative).removesuffix('.txt')}", text


def _is_usable(text: bytes) -> bool:
    """Whether this is UTF-8 text of a sensible size, mostly ASCII, under the library's licence."""
    if not MIN_DOCUMENT_BYTES <= len(text) <= MAX_DOCUMENT_BYTES:
        return False
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    non_ascii = sum(byte >= 0x80 for byte in text)
    if non_ascii > MAX_NON_ASCII_SHARE * len(text) or b"\0" in text:
        return False
    return FOREIGN_LICENCE.search(decoded) is None


def _telling_lines(text: bytes) -> set[bytes]:
    lines = (line.strip() for line in text.splitlines())
    return {line for line in lines if len(line) >= TELLING_LINE_CHARS}


def _copies(held_out: dict[str, bytes], others: dict[str, bytes]) -> Iterator[str]:
    """Names of `others` that repeat ten lines, and more than a fifth, of a held-out text."""
    lines_of = {name: _telling_lines(text) for name, text in held_out.items()}
    owners: dict[bytes, list[str]] = {}
    for name, lines in lines_of.items():
        for line in lines:
            owners.setdefault(line, []).append(name)
    for name, text in others.items():
        shared = Counter(owner for line in _telling_lines(text) for owner in owners.get(line, ()))
        limits = {o: max(MIN_SHARED_LINES, MAX_SHARED_LINES * len(lines_of[o])) for o in shared}
        if any(count > limits[owner] for owner, count in shared.items()):
            yield name


def concatenate(documents: Iterable[Document], split: Split) -> Corpus:
    """The documents of one split as one array."""
    chosen = [document for document in documents if document.split is split]
    text = np.frombuffer(b"".join(document.text for document in chosen), dtype=np.uint8)
    ends = np.cumsum([len(document.text) for document in chosen], dtype=np.int64)
    return Corpus([document.name for document in chosen], text, ends)


def save(path: Path, train: Corpus, held_out: Corpus) -> None:
    """Write both splits into one compressed file without pickled objects."""
    np.savez_compressed(
        path,
        train_text=train.text,
        train_ends=train.ends,
        train_names=np.array(train.names),
        held_out_text=held_out.text,
        held_out_ends=held_out.ends,
        held_out_names=np.array(held_out.names),
    )


def load(path: Path) -> tuple[Corpus, Corpus]:
    """Read what `save` wrote: the training and the held-out corpus."""
    with np.load(path, allow_pickle=False) as arrays:
        train, held_out = (
            Corpus(
                arrays[f"{split}_names"].tolist(), arrays[f"{split}_text"], arrays[f"{split}_ends"]
            )
            for split in ("train", "held_out")
        )
    return train, held_out


def manifest(documents: Iterable[Document]) -> str:
    """One line per document (split, bytes, start of its SHA-256, name) under totals per split."""
    documents = list(documents)
    head = [f"# {split.value}\t{_totals(documents, split)}" for split in Split]
    rows = [
        "\t".join(
            (d.split.value, str(len(d.text)), hashlib.sha256(d.text).hexdigest()[:16], d.name)
        )
        for d in documents
    ]
    return "\n".join([*head, *rows, ""])


def _totals(documents: Iterable[Document], split: Split) -> str:
    texts = [document.text for document in documents if document.split is split]
    digest = hashlib.sha256(b"".join(texts)).hexdigest()
    return f"{len(texts)} files\t{sum(map(len, texts))} bytes\tsha256 {digest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--library", type=Path, required=True, help="standard library (.py)")
    parser.add_argument("--documentation", type=Path, required=True, help="documents (.rst)")
    parser.add_argument("--packages", type=Path, required=True, help="site-packages directory")
    parser.add_argument("--out", type=Path, required=True, help="the corpus, .npz")
    parser.add_argument("--manifest", type=Path, help="what was used, .tsv")
    arguments = parser.parse_args()
    documents = collect(arguments.library, arguments.documentation, arguments.packages)
    save(
        arguments.out,
        concatenate(documents, Split.TRAIN),
        concatenate(documents, Split.HELD_OUT),
    )
    listing = manifest(documents)
    if arguments.manifest is not None:
        arguments.manifest.write_text(listing, encoding="utf-8")
    print("\n".join(line for line in listing.splitlines() if line.startswith("#")))


if __name__ == "__main__":
    main()
