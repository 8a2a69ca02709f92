"""What four choices for the CPU are worth: each side as a ratio from one run, medians.

    python bench/cpu.py

1. Attention: plain matrix products or torch's fused kernel, whichever `causal_attention` takes at this length
   on this CPU, against the other one; forward and backward, and forward alone without gradients.
2. The norm with a gradient of its own against torch's.
3. A training step with glibc keeping freed memory, and that in huge pages, as run.sh asks it to, against
   glibc's defaults. It reads its settings at the start, so each is a process of its own.
4. A training step in the type that DTYPE=auto chooses here, against the other one; and a square product.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F

import common
from common import Row, t

TOKENS, HEADS, KV_HEADS, DIM = 8192, 4, 2, 64


def attention(length: int, dtype: torch.dtype, options: argparse.Namespace) -> list[Row]:
    q, k, v = (
        torch.randn(TOKENS // length, length, heads, DIM).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def fused() -> torch.Tensor:
        heads_first = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=True
        ).transpose(1, 2)

    def plain() -> torch.Tensor:
        return t.block_attention(q, k, v, length)

    def both_ways(forward):
        return lambda: (y := forward()).backward(y.detach())

    rows, forwards = [], {"plain": plain, "fused": fused}
    for graded, what in ((True, "forward and backward"), (False, "forward alone")):
        is_plain = length <= t.PLAIN_ATTENTION[t.AMX, graded]
        chosen, other = ("plain", "fused") if is_plain else ("fused", "plain")
        sides = {
            name: both_ways(forwards[name]) if graded else torch.no_grad()(forwards[name])
            for name in (chosen, other)
        }
        ours, theirs = common.interleaved(sides, options.runs).values()
        rows.append(
            Row(
                f"attention, {length} tokens: {chosen} against {other}, {what}",
                common.milliseconds(ours),
                common.milliseconds(theirs),
                theirs / ours,
            )
        )
    return rows


def norms(dtype: torch.dtype, options: argparse.Namespace) -> Row:
    x = torch.randn(TOKENS, 256).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    times = common.interleaved(
        {
            "ours": lambda: t.norm(x).backward(dy),
            "torch's": lambda: F.rms_norm(x, (x.size(-1),)).backward(dy),
        },
        options.runs,
    )
    ours, theirs = times.values()
    return Row(
        "norm of (8192, 256), forward and backward, against torch's",
        common.milliseconds(ours),
        common.milliseconds(theirs),
        theirs / ours,
    )


def time_step(options: argparse.Namespace, dtype: str = "auto") -> None:
    """Prints the median seconds of a training step, under the allocator as it is."""
    size = common.size_of(options) | common.text_of(options)[0] | {"dtype": dtype}
    h = common.settings(size)
    with t.World(h) as world:
        step = common.OurStep(h, world, common.new_model(h, world), compiled=False)
        batches = t.TrainingData(h).micro_batches(0, world)
        print(common.interleaved({"step": lambda: step(batches)}, options.runs, warm_ups=3)["step"])


def in_processes(
    options: argparse.Namespace, sides: dict[str, tuple[dict, str]]
) -> dict[str, float]:
    """Side -> median seconds of a step in processes of its own, in turn; a side is environment and DTYPE."""
    times = {name: [] for name in sides}
    for _ in range(1 if options.smoke else 3):
        for name, (environment, dtype) in sides.items():
            command = f"import argparse, cpu; cpu.time_step(argparse.{options}, {dtype!r})"
            result = subprocess.run(
                [sys.executable, "-c", command],
                env=environment,
                text=True,
                check=True,
                cwd=common.ROOT / "bench",
                capture_output=True,
            )
            times[name].append(float(result.stdout))
    return {name: statistics.median(values) for name, values in times.items()}


def types(options: argparse.Namespace, chosen: torch.dtype) -> list[Row]:
    both = sorted([torch.bfloat16, torch.float32], key=lambda dtype: dtype != chosen)
    names = [str(dtype).removeprefix("torch.") for dtype in both]
    steps = in_processes(options, {name: (dict(os.environ), name) for name in names})
    rates = [common.gemm_rate(dtype, torch.device("cpu"), options) for dtype in both]
    what = f"{names[0]}, which DTYPE=auto chooses, against {names[1]}"
    return [
        Row(
            f"step: {what}",
            *(common.milliseconds(steps[name]) for name in names),
            steps[names[1]] / steps[names[0]],
        ),
        Row(
            f"square product: {what}",
            *(f"{rate / 1e9:,.0f} GFLOP/s" for rate in rates),
            rates[0] / rates[1],
        ),
    ]


def allocator(options: argparse.Namespace) -> list[Row]:
    others = {
        key: value for key, value in os.environ.items() if key not in common.KEEP_FREED_MEMORY
    }
    huge = others | common.KEEP_FREED_MEMORY
    kept = {key: value for key, value in huge.items() if key != "GLIBC_TUNABLES"}
    environments = {"defaults": others, "kept": kept, "huge": huge}
    sides = {name: (environment, "auto") for name, environment in environments.items()}
    defaults, kept_took, huge = in_processes(options, sides).values()
    return [
        Row(
            "step, freed memory kept, against glibc's defaults",
            common.milliseconds(kept_took),
            common.milliseconds(defaults),
            defaults / kept_took,
        ),
        Row(
            "step, that in huge pages, against kept alone",
            common.milliseconds(huge),
            common.milliseconds(kept_took),
            kept_took / huge,
        ),
    ]


def main() -> None:
    options = common.begin(__doc__)
    dtype, lengths = (
        t.World(common.settings()).dtype,
        (256,) if options.smoke else (128, 256, 512, 1024, 2048),
    )
    rows = [row for length in lengths for row in attention(length, dtype, options)]
    rows += [norms(dtype, options), *allocator(options), *types(options, dtype)]
    common.print_header(__file__, options, str(dtype).removeprefix("torch."))
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
