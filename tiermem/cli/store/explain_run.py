"""Explain run: `tiermem explain` from options to an answer in plain words."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiermem.cli.human import count_text
from tiermem.cli.model_files import check_model_dir
from tiermem.cli.notes import Progress
from tiermem.cli.prompt import checked_prompt, read_prompt_file
from tiermem.cli.store.verify_run import report_text
from tiermem.cli.store.words import (
    GONE_TEXTS,
    count_of,
    key_text,
    layout_json,
    layout_text,
    root_json,
    root_text,
    tokens_text,
    when_text,
)
from tiermem.errors import ConfigError
from tiermem.layout import PageLayout
from tiermem.store_content import StoreContent
from tiermem.store_index import MIN_GONE
from tiermem.store_match import Explanation, Match, Stop, explain
from tiermem.store_names import ChainRoot, root_hash
from tiermem.store_reader import StoreReader

MAX_IDS_BYTES = 1 << 30
MAX_TOKEN = 2**32 - 1
SECOND_NS = 10**9
_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What is asked: the prompt's token ids, the model they are for (None: any), and how its pages lie."""

    tokens: NDArray[np.int64]
    model_id: str | None
    layout: PageLayout


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    shard = _shard(options.shard)
    salt = _salt(options.salt)
    _check(options)
    with StoreReader(options.store) as reader:
        content = reader.content()
        question = _question(options, reader.layout)
        if question.layout != reader.layout:
            _tell_layouts(options, reader, question)
            return 0
        answer = _answer(reader, content, question, shard, salt)
        if options.json:
            print(json.dumps(_json(reader, answer), indent=2))
        else:
            print("\n".join(_lines(reader, content, answer)))
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.token_ids_file is None and options.model is None:
        raise ConfigError(
            "--prompt, --prompt-file: need --model, whose tokenizer makes tokens of them"
        )
    if options.model is not None:
        check_model_dir(options.model)


def _shard(text: str) -> tuple[int, int]:
    match = _SHARD.fullmatch(text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 <= index < count:
        raise ConfigError(f"--shard {text[:40]!r}: must be I/N with I from 0 to N - 1, such as 0/2")
    return index, count


def _salt(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigError("--salt: not UTF-8 text") from None


# ---- the question ----------------------------------------------------------------------------------


def _question(options: argparse.Namespace, layout: PageLayout) -> Question:
    if options.model is None:
        return Question(_read_ids(options.token_ids_file), options.model_id, layout)
    from tiermem.cli.model_files import go_offline, load_model, load_tokenizer

    go_offline()
    if options.token_ids_file is not None:
        tokens = _read_ids(options.token_ids_file)
    else:
        text = _prompt(options)
        tokens = np.array(load_tokenizer(options.model).encode(text), dtype=np.int64)
    Progress.show("loading the model")
    import torch

    from tiermem.integrations.transformers.model_identity import model_identity
    from tiermem.integrations.transformers.support import attention_of

    dtype = layout.dtype if options.dtype == "auto" else options.dtype
    model = load_model(options.model, torch.device("cpu"), dtype)
    attention = attention_of(model, layout.page_tokens)
    Progress.clear()
    return Question(tokens, model_identity(model), attention.layout)


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return checked_prompt("--prompt", options.prompt)
    return read_prompt_file(options.prompt_file)


def _read_ids(path: Path) -> NDArray[np.int64]:
    """The token ids in a file, apart by anything but digits and signs."""
    name = f"--token-ids-file {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_IDS_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_IDS_BYTES:
        raise ConfigError(f"{name}: must be at most {MAX_IDS_BYTES} bytes")
    words = data.translate(None, b"[]").replace(b",", b" ").split()
    for word in words:
        if not word.isdigit() or len(word) > 10 or int(word) > MAX_TOKEN:
            shown = word[:40].decode("ascii", "replace")
            raise ConfigError(f"{name}: {shown!r} must be a token id, 0 to {MAX_TOKEN}")
    if not words:
        raise ConfigError(f"{name}: has no token id in it")
    return np.array([int(word) for word in words], dtype=np.int64)


def _answer(
    reader: StoreReader,
    content: StoreContent,
    question: Question,
    shard: tuple[int, int],
    salt: bytes,
) -> Explanation:
    wanted = None
    if question.model_id is not None:
        root = root_hash(reader.layout, question.model_id, shard, salt)
        wanted = ChainRoot.of(root, question.model_id, shard, salt)
    try:
        return explain(reader, content, question.tokens, wanted)
    except ValueError as error:
        raise ConfigError(f"{reader.path}: {error}") from None


# ---- the answer ------------------------------------------------------------------------------------


def _lines(reader: StoreReader, content: StoreContent, found: Explanation) -> list[str]:
    layout, match = reader.layout, found.match
    rest = found.num_tokens - found.num_whole * layout.page_tokens
    more = f", and {count_of(rest, 'token')} more" if rest else ""
    pages = f"{count_of(found.num_whole, 'whole page')} of {layout.page_tokens}{more}"
    lines = [
        f"prompt: {count_of(found.num_tokens, 'token')}: {pages}",
        f"looked for: {root_text(match.root)}",
    ]
    if match.num_pages:
        what = f"{count_text(match.num_pages)} of {count_of(found.num_whole, 'page')}"
        lines.append(f"stored: {what}, tokens {tokens_text(0, match.num_pages, layout)}")
    else:
        lines.append("stored: nothing of it")
    lines += [f"why not more: {_why(reader, content, found, rest)}"]
    if found.num_later:
        lines.append(
            f"besides: {count_of(found.num_later, 'later page')} of it are stored, but nothing finds them "
            f"without those before"
        )
    lines += [_elsewhere(other, layout) for other in found.elsewhere[:5]]
    if reader.owner_pid() is not None:
        lines.append(
            f"process {reader.owner_pid()} has the store in use: what it has not written down yet is not seen here"
        )
    return lines


def _why(reader: StoreReader, content: StoreContent, found: Explanation, rest: int) -> str:
    layout, here = reader.layout, found.match.num_pages
    if found.stop is Stop.COMPLETE:
        if rest:
            return f"the last {count_of(rest, 'token')} do not fill a page; only whole pages are stored"
        return "all of it is stored"
    page = (
        f"the next page, {key_text(found.match.keys[here].tobytes())} with tokens "
        + tokens_text(here, 1, layout)
    )
    if found.stop is Stop.UNUSABLE and found.report is not None:
        return f"{page}, is not usable: {report_text(found.report)}"
    if found.stop is Stop.GONE and found.gone is not None:
        also = (
            f", and {count_of(found.num_gone - 1, 'page')} after it" if found.num_gone > 1 else ""
        )
        when = when_text(found.gone.when_ns / SECOND_NS)
        return f"{page}, was stored and is gone since {when}: {GONE_TEXTS[found.gone.why]}{also}"
    if found.stop is Stop.OTHER_ROOT and found.best_elsewhere is not None:
        return f"these tokens are stored, but {_difference(found.match.root, found.best_elsewhere.root)}"
    if not found.is_known:
        return f"nothing was ever stored for this model, salt and shard{_memory(content)}"
    if found.stop is Stop.OTHER_TOKENS:
        others = count_of(found.num_others, "stored prompt goes", "stored prompts go")
        start = "from the very beginning" if here == 0 else "from here"
        return f"{others} on {start} with other tokens: the first difference is within {page}"
    return f"{page}, was never stored{_memory(content)}"


def _memory(content: StoreContent) -> str:
    """How far back the index knows what is gone, where that is not for ever."""
    if len(content.gone) < MIN_GONE:
        return ""
    oldest = min(gone.when_ns for gone in content.gone.values())
    return f", or is gone since before {when_text(oldest / SECOND_NS)}, which is as far as the index remembers"


def _difference(wanted: ChainRoot, other: ChainRoot) -> str:
    """In what two roots differ, in words."""
    parts = []
    if wanted.model != other.model:
        parts.append("another model")
    if wanted.salt != other.salt:
        parts.append("another salt")
    if wanted.shard != other.shard:
        parts.append(f"shard {other.shard[0]} of {other.shard[1]}")
    return f"for {' and '.join(parts) or 'another root'}: pages are never shared between those"


def _elsewhere(match: Match, layout: PageLayout) -> str:
    where = tokens_text(0, match.num_pages, layout)
    return f"elsewhere: {count_of(match.num_pages, 'page')}, tokens {where}, for {root_text(match.root)}"


def _tell_layouts(options: argparse.Namespace, reader: StoreReader, question: Question) -> None:
    """The model's pages do not fit this store at all."""
    if options.json:
        document = {
            "store": str(reader.path),
            "stop": "other_layout",
            "stored_pages": 0,
            "store_layout": layout_json(reader.layout),
            "model_layout": layout_json(question.layout),
        }
        print(json.dumps(document, indent=2))
        return
    lines = [
        "stored: nothing of it",
        "why not more: the store holds pages of another layout, which this model cannot use",
        f"  the store: {layout_text(reader.layout)}",
        f"  the model: {layout_text(question.layout)}",
    ]
    print("\n".join(lines))


def _json(reader: StoreReader, found: Explanation) -> dict[str, object]:
    layout, match = reader.layout, found.match
    here = match.num_pages
    is_complete = found.stop is Stop.COMPLETE
    return {
        "store": str(reader.path),
        "in_use": reader.owner_pid() is not None,
        "prompt_tokens": found.num_tokens,
        "whole_pages": found.num_whole,
        "page_tokens": layout.page_tokens,
        "root": root_json(match.root),
        "root_is_known": found.is_known,
        "stored_pages": here,
        "stored_tokens": here * layout.page_tokens,
        "stop": found.stop.value,
        "next_page": None if is_complete else match.keys[here].tobytes().hex(),
        "gone_s": None if found.gone is None else found.gone.when_ns / SECOND_NS,
        "gone_why": None if found.gone is None else found.gone.why.name.lower(),
        "gone_pages": found.num_gone,
        "finding": None if found.report is None else report_text(found.report),
        "other_continuations": found.num_others,
        "later_pages": found.num_later,
        "elsewhere": [
            {"stored_pages": other.num_pages, "root": root_json(other.root)}
            for other in found.elsewhere
        ],
    }
