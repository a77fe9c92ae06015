"""What the tests of the command line share: tiny model directories, runs in process and beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tiermem.cli import main
from tiermem.data import data_path

VOCAB = 264
PAGE_TOKENS = 16
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# A page of the tiny Llama: 2 layers x (K, V) x 2 heads x 16 tokens x 16 elements x 4 bytes = 8 KiB.
TIERS = ("--page-tokens", "16", "--gpu", "32KiB", "--ram", "48KiB", "--ssd", "8MiB")
CPU = ("--device", "cpu")

HOLDER = """
import sys
import torch
from tiermem import PageLayout, TierConfig, TierManager
layout = PageLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32", page_tokens=16)
path = sys.argv[1] if len(sys.argv) > 1 else None
config = TierConfig(gpu="32KiB", ram="48KiB", ssd="2MiB" if path else 0, ssd_path=path, device="cpu")
with TierManager(layout, config, model_id="held") as tm:
    seq = tm.open_sequence(label="held by a test")
    for _ in range(2):
        with tm.step([seq], new_tokens=48) as step:
            for layer in range(2):
                kv = torch.rand(48, 2, 16)
                step.append(layer, kv, kv)
                step.attend(layer, torch.rand(48, 4, 16))
    tm._publisher.publish(tm.stats)
    print("ready", flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one document on stdout."""
        document: dict[str, Any] = json.loads(self.out)
        return document


class Cli:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        return Outcome(code, out, err)


@contextmanager
def one_thread() -> Iterator[None]:
    """A tiny model's work is not worth waking other threads for, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    """Random weights far larger than usual, so that what a token attends to decides what comes next."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.25,
        bos_token_id=256,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> PreTrainedModel:
    """Learned positions, 128 of them."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=128,
        bos_token_id=256,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


def save_model(model: PreTrainedModel, path: Path) -> Path:
    """`model` and a byte tokenizer as a model directory."""
    model.save_pretrained(path)
    for name in TOKENIZER_FILES:
        shutil.copy(data_path("models/reference") / name, path / name)
    return path


def environment(**variables: str) -> dict[str, str]:
    """This process's environment; one thread, because many small processes share few cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def start(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start Python with `arguments`, its output in pipes.

    Ctrl-C reaches it even where this process was started in the background of a shell, which ignores it.
    """
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=options.pop("stdin", subprocess.PIPE),
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        env=environment(**options.pop("variables", {})),
        preexec_fn=_listen_to_ctrl_c,  # noqa: PLW1509 - it sets one signal and nothing else
        **options,
    )


def _listen_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_holder(
    path: Path | None = None, runtime_dir: Path | None = None
) -> subprocess.Popen[str]:
    """A process that holds a TierManager, on a store at `path` if given, until its stdin ends.

    Its snapshot is below `runtime_dir`; if not given, where this process's environment says.
    """
    arguments = ["-c", HOLDER] + ([str(path)] if path else [])
    variables = {"TIERMEM_RUNTIME_DIR": str(runtime_dir)} if runtime_dir else {}
    process = start(arguments, stderr=subprocess.DEVNULL, variables=variables)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Let a holder end and close its pipes."""
    process.communicate(timeout=60)


def untiered(model_dir: Path, prompt: str, **options: object) -> list[int]:
    """What model.generate adds to `prompt`, without any of our code."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = torch.tensor([list(prompt.encode())])
    with one_thread():
        tokens: list[int] = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    return tokens
