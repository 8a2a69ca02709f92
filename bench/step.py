"""Measure our training step against the textbook's, and against learning every map in full.

    python bench/step.py                # small on a CPU, system A's full size on a GPU
    python bench/step.py --eager        # on a CPU without torch.compile, which takes minutes
    DATA_PATH=... python bench/step.py  # on these tokens

The sides take turns on the same batches:
- ours: train_gpt's step as the trainer takes it (gradients, optimizers, averages), compiled as on
  CUDA or with COMPILE=1; on a CPU also eager, which is the default there;
- textbook: the same network in bench/textbook.py, eager and compiled; also eager in bfloat16, as
  published, where ours uses float32 because this CPU multiplies it faster;
- learned in full: train_gpt's step with MAP_BASIS=learned and MAP_ADAPTER=none;
- on CUDA, ours at other ranks.

Reading the batches is not timed. Peak memory does not include what was there before a side was
built: on CUDA it is what torch allocated, on a CPU the largest resident size of a process that
takes two steps of that side alone. At the end ours and the textbook take --loss-steps steps in
float32 from the same weights on the same batches, and their losses on held-out text are compared.

A ratio over 1 is in our favor, except for ranks: there it is the cost of the higher rank.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # optimizers load it; import it once, before this process forks
from roofline import Part, model_flops, parts_of
from textbook import Textbook, TextbookStep

import common
from common import Row, t

RANKS = (128, 304)  # beside 32, on CUDA
AS_PUBLISHED = "textbook, eager, bfloat16"

# ---- Sides -------------------------------------------------------------------------------------


def sides_of(on_cuda: bool, compiled: bool, dtype: torch.dtype) -> list[str]:
    """Return the names of the sides, ours first. `compiled` in a name means torch.compile."""
    others = ["textbook, eager", "textbook, compiled", "learned in full, compiled"]
    if on_cuda:
        return ["ours, compiled", *others, *(f"ours, rank {rank}, compiled" for rank in RANKS)]
    published = [AS_PUBLISHED] if dtype is torch.float32 else []
    if compiled:
        return ["ours, compiled", "ours, eager", *others, *published]
    return ["ours, eager", "textbook, eager", "learned in full, eager", *published]


def build(side: str, size: dict, dist: t.Distributed) -> common.OurStep | TextbookStep:
    """Return the step of one side, from the initial weights of the seed."""
    changes = {}
    if side.startswith("learned"):
        changes = {"map_basis": "learned", "map_adapter": "none"}
    if "rank" in side:
        rank = side.split("rank ")[1].split(",")[0]
        changes = {"map_adapter": f"lora:{rank}"}
    h = common.settings(size, changes)
    model = common.new_model(h, dist)
    compiled = "compiled" in side
    if side.startswith("textbook"):
        dtype = torch.bfloat16 if side == AS_PUBLISHED else common.dtype_of(h, dist)
        return TextbookStep(h, Textbook(h, model, dtype), compiled)
    return common.OurStep(h, dist, model, compiled)


# ---- Memory ------------------------------------------------------------------------------------


def peak_memory_on_cuda(step: Callable, batches: list, held: int) -> int:
    """Return the bytes at the peak of a step, of which `held` are always allocated."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(batches)
    torch.cuda.synchronize()
    return held + torch.cuda.max_memory_allocated() - before


def status_bytes(key: str) -> int:
    """Return a size of this process by Linux: VmRSS is its memory now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def added_memory(side: str, size: dict) -> int:
    """Return the bytes that two steps of one side add to this process at its peak."""
    h = common.settings(size)
    with t.Distributed(h) as dist:
        batches = t.TrainingData(h).micro_batches(0, dist)
        ids = torch.randint(0, 64, (4, common.SMOKE_SIZE["train_seq_len"]))
        build(side, common.SMOKE_SIZE, dist)([(ids, ids)])  # loads torch's code: does not count
        before = status_bytes("VmRSS")
        step = build(side, size, dist)
        for _ in range(2):
            step(batches)
        return status_bytes("VmHWM") - before


def peak_memory_on_cpu(sides: list[str], size: dict) -> dict[str, int]:
    """Return side -> bytes, each measured in a fork of this process, which has not computed yet."""
    work = functools.partial(added_memory, size=size)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(sides, pool.map(work, sides, chunksize=1), strict=True))


# ---- Speed -------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What was measured of each side, and what a step computes."""

    seconds: dict[str, float]  # by side
    memory: dict[str, int]
    parts: list[Part]
    gemm_rate: float


def measure(
    options: argparse.Namespace, size: dict, dist: t.Distributed, memory: dict[str, int]
) -> Measured:
    """Time all sides; on CUDA, measure their memory, too."""
    h = common.settings(size)
    dtype = common.dtype_of(h, dist)
    batches = t.TrainingData(h).micro_batches(0, dist)
    works, parts = {}, []
    for side in sides_of(dist.on_cuda, options.compile, dtype):
        before = torch.cuda.memory_allocated() if dist.on_cuda else 0
        step = build(side, size, dist)
        works[side] = functools.partial(step, batches)
        parts = parts or parts_of(h, step.model, dist)
        if dist.on_cuda:
            for _ in range(3):  # compiled, and with the state of the optimizers
                step(batches)
            held = torch.cuda.memory_allocated() - before
            memory[side] = peak_memory_on_cuda(step, batches, held)
    seconds = common.interleaved(works, options.runs, common.calls_per_measurement(options))
    return Measured(seconds, memory, parts, common.gemm_rate(dtype, dist.device, options))


def bar_for(side: str, sides: list[str], on_cuda: bool) -> str:
    """Return the least ratio of speeds against a side."""
    published = AS_PUBLISHED if AS_PUBLISHED in sides else "textbook, eager"
    if on_cuda:
        return "≥ 2.2" if side == "textbook, compiled" else ""
    return "≥ 2.5" if side == published else ""


def side_rows(measured: Measured, tokens: int, on_cuda: bool) -> list[Row]:
    """Return speed and memory against each other side."""
    seconds, memory = measured.seconds, measured.memory
    ours, *others = seconds
    rows = []
    for side in others:
        fast, slow = seconds[ours], seconds[side]
        if "rank" in side:  # the ratio is the cost of the rank
            bar = "≤ 1.25" if "rank 128" in side else ""
            what = f"step, {side} over rank 32"
            rows.append(
                Row(what, common.milliseconds(slow), common.milliseconds(fast), slow / fast, bar)
            )
        else:
            bar = bar_for(side, others, on_cuda)
            what = f"tokens/s against {side}"
            speeds = f"{tokens / fast:,.0f}", f"{tokens / slow:,.0f}"
            rows.append(Row(what, *speeds, slow / fast, bar))
        sizes = common.mebibytes(memory[ours]), common.mebibytes(memory[side])
        rows.append(Row(f"peak memory against {side}", *sizes, memory[side] / max(memory[ours], 1)))
    return rows


def flops_rows(measured: Measured, h: t.Hyperparameters, dist: t.Distributed) -> list[Row]:
    """Return our step's time, and its FLOPs over what the machine could do."""
    seconds = next(iter(measured.seconds.values()))
    flops = model_flops(measured.parts)
    rate, achieved = measured.gemm_rate, flops / seconds
    step_bar, rate_bar = ("≤ 55 ms", "") if dist.on_cuda else ("", "≥ 0.40")
    per_token = flops / h.train_batch_tokens / 1e6
    speeds = f"{achieved / 1e9:,.0f} GFLOP/s", f"{rate / 1e9:,.0f} GFLOP/s"
    rows = [
        Row("our step", common.milliseconds(seconds), bar=step_bar, measured=1e3 * seconds),
        Row(
            f"model FLOPs ({per_token:.0f} M per token) over the measured GEMM rate",
            *speeds,
            achieved / rate,
            rate_bar,
        ),
    ]
    peak = common.peak_flops()
    if peak and common.dtype_of(h, dist) is torch.bfloat16:
        rows.append(peak_row("model FLOPs over the vendor's peak", achieved, peak, "≥ 0.37"))
        (attention,) = (part.flops for part in measured.parts if part.name == "attention")
        again = (flops + attention / 6) / seconds  # one more product beside its six
        what = "the same with the product that flash attention's backward pass repeats"
        rows.append(peak_row(what, again, peak))
    return rows


def peak_row(what: str, achieved: float, peak: float, bar: str = "") -> Row:
    """Return the line of FLOP/s over the vendor's figure."""
    speeds = f"{achieved / 1e12:,.0f} TFLOP/s", f"{peak / 1e12:,.0f} TFLOP/s"
    return Row(what, *speeds, achieved / peak, bar)


# ---- Loss --------------------------------------------------------------------------------------


def compare_losses(size: dict, on_cuda: bool, steps: int) -> tuple[float, float]:
    """Return our and the textbook's loss on held-out text after training eagerly in float32."""
    changes = {"dtype": "float32"}
    if on_cuda:  # float32 activations of all tokens at once would not fit
        changes["micro_batch_tokens"] = 16_384
    h = common.settings(size, changes)
    dist = t.Distributed(h)
    data = t.TrainingData(h)
    model = common.new_model(h, dist)
    textbook = TextbookStep(h, Textbook(h, model, torch.float32), compiled=False)
    ours = common.OurStep(h, dist, model, compiled=False)
    for step in range(steps):
        batches = data.micro_batches(step, dist)
        ours(batches)
        textbook(batches)
    rows = data.read(data.held_out[: max(1, 32_768 // h.train_seq_len)]).to(dist.device)
    losses = []
    with torch.no_grad():
        for side in (ours.model, textbook.model):
            parts = [side(part[:, :-1], part[:, 1:]).item() for part in rows.split(1)]
            losses.append(sum(parts) / len(parts))
    return losses[0], losses[1]


def loss_row(options: argparse.Namespace, size: dict, on_cuda: bool) -> Row:
    """Return the line of the two losses."""
    steps = min(options.loss_steps, 2) if options.smoke else options.loss_steps
    with common.no_tf32():
        ours, textbook = compare_losses(size, on_cuda, steps)
    apart = abs(ours - textbook) if math.isfinite(ours + textbook) else math.inf
    what = f"held-out loss after {steps} steps in float32, difference {apart:.5f}"
    return Row(what, f"{ours:.4f}", f"{textbook:.4f}", bar="≤ 0.005", measured=apart)


# ---- Command -----------------------------------------------------------------------------------


def main() -> None:
    loss_steps = {
        "type": int,
        "default": 50,
        "help": "steps before the losses are compared; 0: do not compare them",
    }
    eager = {
        "dest": "compile",
        "action": "store_false",
        "help": "on a CPU: leave out the compiled sides",
    }
    options = common.begin(__doc__, eager=eager, loss_steps=loss_steps)
    text, label = common.text_of(options)
    size = common.size_of(options) | text | common.compile_setting(options)
    h = common.settings(size)
    memory = {}
    dtype = common.dtype_of(h, t.Distributed(h))
    if not torch.cuda.is_available():
        memory = peak_memory_on_cpu(sides_of(False, options.compile, dtype), size)
    with t.Distributed(h) as dist:
        measured = measure(options, size, dist, memory)
        rows = side_rows(measured, h.train_batch_tokens, dist.on_cuda)
        rows += flops_rows(measured, h, dist)
        if options.loss_steps:
            rows.append(loss_row(options, size, dist.on_cuda))
    common.print_header(__file__, options, dtype)
    ours = next(iter(measured.seconds))
    print(
        f"\nA step of {h.train_batch_tokens:,} tokens in sequences of {h.train_seq_len}:"
        f" {h.num_layers} layers of width {h.model_dim}, {h.map_adapter}, on {label}."
        f" Ours is “{ours}”."
    )
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
