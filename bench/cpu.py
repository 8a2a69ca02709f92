"""What two choices for the CPU are worth, each as a ratio from one run: medians of 7.

    python bench/cpu.py

1. Attention by plain matrix products, as `causal_attention` does it up to 1024 tokens, against PyTorch's
   fused kernel, forward and backward.
2. A training step of presets/cpu/random_adapters.env's model with glibc keeping freed memory (as run.sh asks
   it to) against glibc's defaults.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}


def median_seconds(work, runs: int = 7) -> float:
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def compare_attention(
    length: int, tokens: int = 8192, heads: int = 4, kv_heads: int = 2, dim: int = 64
) -> None:
    import torch
    import torch.nn.functional as F

    from train_gpt import causal_attention

    batch = tokens // length
    q = torch.randn(batch, length, heads, dim).bfloat16().requires_grad_()
    k, v = (torch.randn(batch, length, kv_heads, dim).bfloat16().requires_grad_() for _ in range(2))

    def fused():
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
        out.backward(out.detach())

    def plain():
        out = causal_attention(q, k, v)
        out.backward(out.detach())

    a, b = median_seconds(fused), median_seconds(plain)
    print(
        f"attention, {length:>4} tokens: fused {1e3 * a:6.1f} ms, plain {1e3 * b:6.1f} ms, ratio {a / b:.2f}"
    )


def time_step() -> None:
    """Seconds of a training step; printed for the parent process."""
    import torch

    import train_gpt as t

    h = t.Hyperparameters()
    processes = t.World(h)
    torch.manual_seed(0)
    model = t.GPT(h, processes.dtype)
    optimizers = t.Optimizers(t.tensors_by_role(model), h, processes)
    ids = torch.randint(0, h.vocab_size, (h.train_batch_tokens // h.train_seq_len, h.train_seq_len + 1))
    batches = [(ids[:, :-1], ids[:, 1:])]

    def step():
        t.accumulate_gradients(model, batches, lambda ids: None)
        optimizers.step(0, 1.0)

    print(median_seconds(step))


def child(part: str, extra: dict[str, str]) -> str:
    """What this program prints for one part, in its own process: glibc reads its settings at the start."""
    presets = [ROOT / "presets/cpu" / name for name in ("common.env", "random_adapters.env")]
    lines = [line for preset in presets for line in preset.read_text().splitlines() if line[0] not in "#"]
    settings = dict(line.split("=", 1) for line in lines if not line.startswith("PRESET_BASE"))
    environment = {key: value for key, value in os.environ.items() if key not in KEEP} | settings | extra
    command = [sys.executable, __file__, part]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def main() -> None:
    import torch

    print(f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}")
    print(child("attention", KEEP), end="")
    default, kept = float(child("step", {})), float(child("step", KEEP))
    times = f"glibc's defaults {1e3 * default:.0f} ms, kept memory {1e3 * kept:.0f} ms"
    print(f"a step: {times}, ratio {default / kept:.2f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["attention"]:
        for tokens in (256, 512, 1024):
            compare_attention(tokens)
    elif sys.argv[1:] == ["step"]:
        time_step()
    else:
        main()
