"""Both ways to use tiermem: in an inference loop of your own, and with a Hugging Face model. Needs no GPU.

python examples/quickstart.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiermem import PageLayout, TierConfig, TierManager
from tiermem.integrations.transformers import TieredCache

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "reference"
PROMPT = ROOT / "examples" / "long_prompt.txt"


def own_loop(store: Path) -> None:
    """A sequence of 1,000 tokens, a hot tier of 256: what attention reads is exact, and stays for the next run."""
    layout = PageLayout(num_layers=4, num_kv_heads=2, head_dim=64, dtype="float32", page_tokens=64)
    page = layout.slot_bytes
    config = TierConfig(gpu=4 * page, ram=6 * page, ssd="64MiB", ssd_path=store)
    tokens = list(range(1000))
    with TierManager(layout, config, model_id="quickstart") as tm:
        # What a model would compute, on the device where it runs: (tokens, heads, head_dim).
        kv = torch.randn(1000, 2, 64, device=tm.torch_device)
        q = torch.randn(1000, 4, 64, device=tm.torch_device)
        seq = tm.open_sequence(tokens=tokens)
        for start, end in ((0, 600), (600, 999), (999, 1000)):  # prefill in two chunks, decode one
            with tm.step([seq], new_tokens=end - start) as step:
                for layer in range(layout.num_layers):
                    step.append(layer, kv[start:end], kv[start:end])
                    out = step.attend(layer, q[start:end])
            seq.record(tokens[start:end])
        whole = torch.nn.functional.scaled_dot_product_attention(
            q[-1:].transpose(0, 1),
            kv.transpose(0, 1).repeat_interleave(2, dim=0),
            kv.transpose(0, 1).repeat_interleave(2, dim=0),
        ).transpose(0, 1)
        print(f"own loop: {seq.num_tokens} tokens, hit rates {tm.stats().hit_rates}")
        print(
            f"  largest difference from attention over one tensor: {(out - whole).abs().max():.1e}"
        )
    with TierManager(layout, config, model_id="quickstart") as tm:
        seq = tm.open_sequence(tokens=tokens)
        print(f"  a new manager on the same store attaches {seq.num_tokens} of 1000 tokens")


def hugging_face(store: Path) -> None:
    """A language model reads a text several times larger than the hot tier; the second time, it is stored."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    ids = tokenizer(PROMPT.read_text()[:2000], return_tensors="pt").input_ids.to(device)
    config = TierConfig(gpu="2MiB", ram="4MiB", ssd="64MiB", ssd_path=store)
    with TieredCache(model, config) as cache:
        for _ in range(2):
            attached = cache.attach(ids)
            output = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=24)
            text = tokenizer.decode(output[0, ids.shape[1] :])
            print(f"Hugging Face: attached {attached} of {ids.shape[1]} tokens, wrote {text!r}")
            cache.reset()


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        own_loop(Path(directory) / "own")
        hugging_face(Path(directory) / "hugging-face")
