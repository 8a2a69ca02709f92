"""Measure what five choices for the CPU are worth, each side in turn.

    python bench/cpu.py

1. Attention: plain matrix products or torch's fused kernel, as `causal_attention` chooses at this
   length on this CPU, against the other; forward and backward, and forward without gradients.
2. The norm with a gradient of its own against torch's.
3. A training step with freed memory kept in the process, without and with huge pages, against
   glibc's defaults (tools/memory.env). glibc reads this at its start, so each side is a process.
4. A training step in the type that DTYPE=auto chooses here, against the other type.
5. A square product in the same two types.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

import common
from common import Row, t

TOKENS, HEADS, KV_HEADS, DIM = 8192, 4, 2, 64
LENGTHS = (128, 256, 512, 1024, 2048)


def attention(length: int, dtype: torch.dtype, options: argparse.Namespace) -> list[Row]:
    """Compare the two kinds of attention on sequences of this length."""
    q, k, v = (
        torch.randn(TOKENS // length, length, heads, DIM).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def fused() -> torch.Tensor:
        heads_first = (each.transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    def plain() -> torch.Tensor:
        return t.block_attention(q, k, v, length)

    def both_ways(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def work() -> None:
            y = forward()
            y.backward(y.detach())

        return work

    rows = []
    for with_gradients in (True, False):
        is_plain = length <= t.PLAIN_ATTENTION[t.HAS_AMX, with_gradients]
        forwards = {"plain": plain, "fused": fused}
        chosen, other = ("plain", "fused") if is_plain else ("fused", "plain")
        wrap = both_ways if with_gradients else torch.no_grad()
        sides = {name: wrap(forwards[name]) for name in (chosen, other)}
        what = "forward and backward" if with_gradients else "forward alone"
        rows.append(
            common.time_row(
                f"attention, {length} tokens: {chosen} against {other}, {what}",
                *common.interleaved(sides, options.runs).values(),
            )
        )
    return rows


def norms(dtype: torch.dtype, options: argparse.Namespace) -> Row:
    """Compare the norm with torch's."""
    x = torch.randn(TOKENS, 256).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    sides = {
        "ours": lambda: t.norm(x).backward(dy),
        "torch's": lambda: F.rms_norm(x, (x.size(-1),)).backward(dy),
    }
    what = f"norm of ({TOKENS}, 256), forward and backward, against torch's"
    return common.time_row(what, *common.interleaved(sides, options.runs).values())


class Process(NamedTuple):
    """How one side's process computes."""

    environment: Mapping[str, str]
    dtype: str = "auto"


def time_step(options: argparse.Namespace, dtype: str) -> None:
    """Print the median seconds of a training step in this process."""
    text, _ = common.text_of(options)
    h = common.settings(common.size_of(options), text, dtype=dtype)
    with t.Distributed(h) as dist:
        step = common.OurStep(h, dist, common.new_model(h, dist), compiled=False)
        batches = t.TrainingData(h).micro_batches(0, dist)
        print(common.interleaved({"step": lambda: step(batches)}, options.runs, warm_ups=3)["step"])


def step_seconds(options: argparse.Namespace, sides: Mapping[str, Process]) -> dict[str, float]:
    """Return side -> median seconds of a step; the sides' processes take turns."""
    times = {name: [] for name in sides}
    for _ in range(1 if options.smoke else 3):
        for name, side in sides.items():
            command = f"import argparse, cpu; cpu.time_step(argparse.{options}, {side.dtype!r})"
            output = subprocess.check_output(
                [sys.executable, "-c", command],
                env=dict(side.environment),
                text=True,
                cwd=common.ROOT / "bench",
            )
            times[name].append(float(output))
    return {name: statistics.median(values) for name, values in times.items()}


def steps(chosen: torch.dtype, options: argparse.Namespace) -> list[Row]:
    """Compare steps by the allocator's settings, and in the type of DTYPE=auto and the other."""
    (other,) = {torch.bfloat16, torch.float32} - {chosen}
    types = [str(dtype).removeprefix("torch.") for dtype in (chosen, other)]
    kept = common.KEEP_FREED_MEMORY
    defaults = {key: value for key, value in os.environ.items() if key not in kept}
    huge = defaults | kept
    small = {key: value for key, value in huge.items() if key != "GLIBC_TUNABLES"}
    sides = {
        "defaults": Process(defaults),
        "kept": Process(small),
        "huge": Process(huge),
        "other type": Process(huge, types[1]),
    }
    seconds = step_seconds(options, sides)
    what = "{}, which DTYPE=auto chooses, against {}".format(*types)
    compared = {
        "freed memory kept, against glibc's defaults": ("kept", "defaults"),
        "freed memory kept, in huge pages against normal ones": ("huge", "kept"),
        what: ("huge", "other type"),
    }
    rows = [
        common.time_row(f"step, {name}", seconds[ours], seconds[theirs])
        for name, (ours, theirs) in compared.items()
    ]
    rates = [common.gemm_rate(dtype, torch.device("cpu"), options) for dtype in (chosen, other)]
    speeds = [f"{rate / 1e9:,.0f} GFLOP/s" for rate in rates]
    return [*rows, Row(f"square product, {what}", *speeds, rates[0] / rates[1])]


def main() -> None:
    options = common.begin(__doc__)
    dtype = t.resolve_dtype(common.settings(), on_cuda=False)
    lengths = LENGTHS[1:2] if options.smoke else LENGTHS
    rows = [row for length in lengths for row in attention(length, dtype, options)]
    rows += [norms(dtype, options), *steps(dtype, options)]
    common.print_header(__file__, options, dtype)
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
