"""A training step of ours against the textbook's of the same network, and against learning it in full.

    python bench/step.py                # 6 layers of width 256 on a CPU, system A's full size on a GPU
    python bench/step.py --eager        # on a CPU without what is compiled: that takes minutes
    DATA_PATH=… python bench/step.py    # on these tokens

Sides, all with the same batches, in turn:
- ours: train_gpt's step as the trainer takes it (gradients, optimisers, averages), compiled as on CUDA and by
  COMPILE=1, and on a CPU eager beside it, as there by default;
- textbook: bench/textbook.py, which says what it does in another way; eager and compiled; and eager in
  bfloat16, as published, where ours computes in float32 because this CPU multiplies it faster;
- learned in full: train_gpt's step with MAP_BASIS=learned and MAP_ADAPTER=none;
- on CUDA, ours at other ranks.

Reading the batches is not timed. Peak memory is what comes to that before the side was built: on CUDA what
torch allocated, on a CPU the largest resident size of a process that takes two steps of that side alone.
Last, ours and the textbook take --loss-steps steps in float32 from the same weights on the same batches, and
their losses on held-out text are compared.

A ratio over 1 is in our favour, but for ranks: there it is what a higher rank costs.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # optimisers load it: once, before this process forks
from roofline import model_flops, parts_of
from textbook import Textbook, TextbookStep

import common
from common import Row, t

RANKS = (128, 304)  # beside 32, on CUDA
AS_PUBLISHED = "textbook, eager, bfloat16"


def build(side: str, size: dict, world: t.World) -> Callable:
    """The step of one side, from the initial weights of the seed. `compiled` in its name: torch.compile."""
    compiled, changes = "compiled" in side, {}
    if side.startswith("learned"):
        changes = {"map_basis": "learned", "map_adapter": "none"}
    if "rank" in side:
        changes = {"map_adapter": f"lora:{side.split('rank ')[1].split()[0]}"}
    h = common.settings(size, changes)
    model = common.new_model(h, world)
    if side.startswith("textbook"):
        dtype = torch.bfloat16 if side == AS_PUBLISHED else world.dtype
        return TextbookStep(h, Textbook(h, model, dtype), compiled)
    return common.OurStep(h, world, model, compiled)


def sides_of(on_cuda: bool, compiled: bool, dtype: torch.dtype) -> list[str]:
    others = ["textbook, eager", "textbook, compiled", "learned in full, compiled"]
    if on_cuda:
        return ["ours, compiled", *others, *(f"ours, rank {rank}, compiled" for rank in RANKS)]
    published = [AS_PUBLISHED] if dtype is torch.float32 else []
    if compiled:
        return ["ours, compiled", "ours, eager", *others, *published]
    return ["ours, eager", "textbook, eager", "learned in full, eager", *published]


def peak_memory_on_cuda(step: Callable, batches: list, held: int) -> int:
    """Bytes at the peak of a step, of which `held` are there all the time."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(batches)
    torch.cuda.synchronize()
    return held + torch.cuda.max_memory_allocated() - before


def status_bytes(key: str) -> int:
    """A size that Linux knows of this process: VmRSS is what it holds, VmHWM the most that it ever held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def added_memory(side: str, size: dict) -> int:
    """Bytes that two steps of one side add to this process at its peak."""
    h = common.settings(size)
    with t.World(h) as world:
        batches = t.TrainingData(h).micro_batches(0, world)
        ids = torch.randint(0, 64, (4, common.SMOKE_SIZE["train_seq_len"]))
        build(side, common.SMOKE_SIZE, world)(
            [(ids, ids)]
        )  # torch's own code and buffers do not count
        before = status_bytes("VmRSS")
        step = build(side, size, world)
        for _ in range(2):
            step(batches)
        return status_bytes("VmHWM") - before


def peak_memory_on_cpu(sides: list[str], size: dict) -> dict[str, int]:
    """Side -> bytes, each in a process of its own. These are forks: this one must not have computed yet."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return dict(
            zip(sides, pool.map(functools.partial(added_memory, size=size), sides, chunksize=1))
        )


def compare_losses(size: dict, world: t.World, steps: int) -> tuple[float, float]:
    """Losses on held-out text, of ours and of the textbook's, after so many steps in float32, both eager."""
    h = common.settings(size, dtype="float32")
    if world.on_cuda:  # float32 activations of all tokens at once would not fit
        h = common.settings(size, dtype="float32", micro_batch_tokens=16_384)
    alone = t.World(h)
    data = t.TrainingData(h)
    model = common.new_model(h, alone)
    textbook = TextbookStep(h, Textbook(h, model, torch.float32), compiled=False)
    ours = common.OurStep(h, alone, model, compiled=False)
    for step in range(steps):
        batches = data.micro_batches(step, alone)
        ours(batches)
        textbook(batches)
    rows = data.read(data.held_out[: max(1, 32_768 // h.train_seq_len)]).to(alone.device)
    losses = []
    with torch.no_grad():
        for one in (ours.model, textbook.model):
            parts = [one(part[:, :-1], part[:, 1:]).item() for part in rows.split(1)]
            losses.append(sum(parts) / len(parts))
    return losses[0], losses[1]


def main() -> None:
    loss_steps = {
        "type": int,
        "default": 50,
        "help": "steps until the losses are compared; 0: leave it out",
    }
    eager = {
        "dest": "compile",
        "action": "store_false",
        "help": "on a CPU: leave out what is compiled",
    }
    options = common.begin(__doc__, eager=eager, loss_steps=loss_steps)
    text, label = common.text_of(options)
    size = common.size_of(options) | text | common.compile_setting(options)
    h = common.settings(size)
    sides = sides_of(torch.cuda.is_available(), options.compile, t.World(h).dtype)
    memory = {} if torch.cuda.is_available() else peak_memory_on_cpu(sides, size)
    with t.World(h) as world:
        rows = measure(options, size, h, world, sides, memory)
    common.print_header(__file__, options, str(world.dtype).removeprefix("torch."))
    print(
        f"\nA step of {h.train_batch_tokens:,} tokens in sequences of {h.train_seq_len}: {h.num_layers}"
        f" layers of width {h.model_dim}, {h.map_adapter}, on {label}. Ours is “{sides[0]}”."
    )
    common.print_rows(rows, options)


def measure(
    options,
    size: dict,
    h: t.Hyperparameters,
    world: t.World,
    sides: list[str],
    memory: dict[str, int],
) -> list[Row]:
    """The table; `memory` is filled in on CUDA."""
    n, on_cuda = h.train_batch_tokens, world.on_cuda
    data = t.TrainingData(h)
    batches = data.micro_batches(0, world)
    works, parts = {}, []
    for side in sides:
        held = torch.cuda.memory_allocated() if on_cuda else 0
        step = build(side, size, world)
        works[side] = functools.partial(step, batches)
        parts = parts or parts_of(h, step.model, world)
        if on_cuda:
            for _ in range(3):  # compiled, its optimisers' state there
                step(batches)
            memory[side] = peak_memory_on_cuda(step, batches, torch.cuda.memory_allocated() - held)
    times = common.interleaved(works, options.runs, common.calls_per_measurement(options))
    rate = common.gemm_rate(world.dtype, world.device, options)
    flops = model_flops(parts)
    works.clear()
    del step  # their memory is the next measurement's

    ours, *others = times
    rows = []
    for side in others:
        fast, slow = times[ours], times[side]
        bar = ""
        if side == (AS_PUBLISHED if AS_PUBLISHED in sides else "textbook, eager") and not on_cuda:
            bar = "≥ 2.5"
        if side == "textbook, compiled" and on_cuda:
            bar = "≥ 2.2"
        if "rank" in side:  # here the ratio is what more rank costs
            bar = "≤ 1.25" if "rank 128" in side else ""
            rows.append(
                Row(
                    f"step, {side} over rank 32",
                    common.milliseconds(slow),
                    common.milliseconds(fast),
                    slow / fast,
                    bar,
                )
            )
        else:
            rows.append(
                Row(
                    f"tokens/s against {side}",
                    f"{n / fast:,.0f}",
                    f"{n / slow:,.0f}",
                    slow / fast,
                    bar,
                )
            )
        rows.append(
            Row(
                f"peak memory against {side}",
                common.mebibytes(memory[ours]),
                common.mebibytes(memory[side]),
                memory[side] / memory[ours],
            )
        )
    bar = "≤ 55 ms" if on_cuda else ""
    rows.append(
        Row("our step", common.milliseconds(times[ours]), bar=bar, measured=1e3 * times[ours])
    )
    achieved = flops / times[ours]
    what = f"model FLOPs ({flops / n / 1e6:.0f} M a token) over the measured GEMM rate"
    rows.append(
        Row(
            what,
            f"{achieved / 1e9:,.0f} GFLOP/s",
            f"{rate / 1e9:,.0f} GFLOP/s",
            achieved / rate,
            "" if on_cuda else "≥ 0.40",
        )
    )
    peak = common.peak_flops()
    if peak and world.dtype is torch.bfloat16:
        rows.append(
            Row(
                "model FLOPs over the vendor's peak",
                f"{achieved / 1e12:,.0f} TFLOP/s",
                f"{peak / 1e12:,.0f} TFLOP/s",
                achieved / peak,
                "≥ 0.37",
            )
        )
        again = (
            sum(part.flops for part in parts if part.name == "attention") / 6
        )  # one product more of six
        rows.append(
            Row(
                "the same with the product that flash attention's backward repeats",
                f"{(flops + again) / times[ours] / 1e12:,.0f} TFLOP/s",
                f"{peak / 1e12:,.0f} TFLOP/s",
                (flops + again) / times[ours] / peak,
            )
        )
    steps = min(options.loss_steps, 2) if options.smoke else options.loss_steps
    if steps:
        with common.no_tf32():
            mine, theirs = compare_losses(size, world, steps)
        apart = abs(mine - theirs) if math.isfinite(mine + theirs) else math.inf
        rows.append(
            Row(
                f"held-out loss after {steps} steps in float32, difference {apart:.5f}",
                f"{mine:.4f}",
                f"{theirs:.4f}",
                bar="≤ 0.005",
                measured=apart,
            )
        )
    return rows


if __name__ == "__main__":
    main()
