"""What three choices for the CPU are worth: each side as a ratio from one run, medians.

    python bench/cpu.py

1. Attention by plain matrix products, as `causal_attention` takes it for gradients up to 512 tokens, against
   torch's fused kernel: forward and backward, and forward alone, where the script takes the fused one.
2. The norm with a gradient of its own against torch's.
3. A training step with glibc keeping freed memory, and that in huge pages, as run.sh asks it to, against
   glibc's defaults. It reads its settings at the start, so each is a process of its own.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

import common
import torch
import torch.nn.functional as F
from common import Row, t

TOKENS, HEADS, KV_HEADS, DIM = 8192, 4, 2, 64


def attention(length: int, dtype: torch.dtype, options: argparse.Namespace) -> list[Row]:
    q, k, v = (torch.randn(TOKENS // length, length, heads, DIM).to(dtype).requires_grad_()
               for heads in (HEADS, KV_HEADS, KV_HEADS))

    def fused() -> torch.Tensor:
        heads_first = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    def plain() -> torch.Tensor:
        return t.causal_attention(q, k, v)

    def both_ways(forward):
        return lambda: (y := forward()).backward(y.detach())

    times = common.interleaved({"fused": fused, "plain": plain, "fused, gradient": both_ways(fused),
                                "plain, gradient": both_ways(plain)}, options.runs)
    fused_took, plain_took, fused_both, plain_both = map(common.milliseconds, times.values())
    return [
        Row(f"attention, {length} tokens: plain against fused, forward and backward", plain_both, fused_both,
            times["fused, gradient"] / times["plain, gradient"]),
        Row(f"attention, {length} tokens: fused against plain, forward alone", fused_took, plain_took,
            times["plain"] / times["fused"])]


def norms(dtype: torch.dtype, options: argparse.Namespace) -> Row:
    x = torch.randn(TOKENS, 256).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    times = common.interleaved({
        "ours": lambda: t.norm(x).backward(dy),
        "torch's": lambda: F.rms_norm(x, (x.size(-1),)).backward(dy)}, options.runs)
    ours, theirs = times.values()
    return Row("norm of (8192, 256), forward and backward, against torch's", common.milliseconds(ours),
               common.milliseconds(theirs), theirs / ours)


def time_step(options: argparse.Namespace) -> None:
    """Prints the median seconds of a training step, under the allocator as it is."""
    size = common.size_of(options) | common.text_of(options)[0]
    h = common.settings(size)
    with t.World(h) as world:
        step = common.OurStep(h, world, common.new_model(h, world), compiled=False)
        batches = t.TrainingData(h).micro_batches(0, world)
        print(common.interleaved({"step": lambda: step(batches)}, options.runs, warm_ups=3)["step"])


def allocator(options: argparse.Namespace) -> list[Row]:
    others = {key: value for key, value in os.environ.items() if key not in common.KEEP_FREED_MEMORY}
    huge = others | common.KEEP_FREED_MEMORY
    kept = {key: value for key, value in huge.items() if key != "GLIBC_TUNABLES"}
    environments = {"defaults": others, "kept": kept, "huge": huge}
    command = [sys.executable, "-c", f"import argparse, cpu; cpu.time_step(argparse.{options})"]
    times = {name: [] for name in environments}
    for _ in range(1 if options.smoke else 3):
        for name, environment in environments.items():
            result = subprocess.run(command, env=environment, cwd=common.ROOT / "bench", capture_output=True,
                                    text=True, check=True)
            times[name].append(float(result.stdout))
    defaults, kept_took, huge = (statistics.median(values) for values in times.values())
    return [Row("step, freed memory kept, against glibc's defaults", common.milliseconds(kept_took),
                common.milliseconds(defaults), defaults / kept_took),
            Row("step, that in huge pages, against kept alone", common.milliseconds(huge),
                common.milliseconds(kept_took), kept_took / huge)]


def main() -> None:
    options = common.begin(__doc__)
    dtype, lengths = t.World(common.settings()).dtype, (256,) if options.smoke else (128, 256, 512)
    rows = [row for length in lengths for row in attention(length, dtype, options)]
    rows += [norms(dtype, options), *allocator(options)]
    common.print_header(__file__, options, str(dtype).removeprefix("torch."))
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
