"""Measure how the cost of our step grows: with processes, rank, width, depth and sequence length.

    python bench/scaling.py

Processes, on a CPU: one with all cores, and two by torchrun that share them, take turns on the same
batch; each turn builds the model, warms up with one step and times the next. Growth: one size
changes, the others and the tokens per step stay; all steps take turns in one process. There the
ratio is the cost over that of the base.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch

import common
from common import Row, t

ON_CPU = {
    "rank": [{"map_adapter": f"lora:{rank}"} for rank in (8, 128)],
    "width": [
        {"model_dim": 128, "num_heads": 2, "num_kv_heads": 1},
        {"model_dim": 512, "num_heads": 8, "num_kv_heads": 4},
    ],
    "depth": [{"num_layers": layers} for layers in (3, 12)],
    "sequence": [{"train_seq_len": length} for length in (128, 2048)],
}
ON_CUDA = {
    "rank": [{"map_adapter": f"lora:{rank}"} for rank in (8, 128, 304)],
    "width": [
        {"model_dim": 256, "num_heads": 4, "num_kv_heads": 2},
        {"model_dim": 1024, "num_heads": 16, "num_kv_heads": 8},
    ],
    "depth": [{"num_layers": layers} for layers in (5, 22)],
    "sequence": [{"train_seq_len": length} for length in (512, 8192)],
}
IN_SMOKE = {"rank": [{"map_adapter": "lora:8"}], "sequence": [{"train_seq_len": 16}]}
NAMES = {
    "rank": "map_adapter",
    "width": "model_dim",
    "depth": "num_layers",
    "sequence": "train_seq_len",
}


def second_step(size: dict, dist: t.Distributed) -> float:
    """Return the seconds of a new model's second step; all processes begin it together."""
    h = common.settings(size)
    step = common.OurStep(h, dist, common.new_model(h, dist), dist.compile)
    data = t.TrainingData(h)
    step(data.micro_batches(0, dist))
    batches = data.micro_batches(1, dist)
    dist.all_reduce(torch.zeros(1))
    return common.seconds_of(lambda: step(batches))


def start_two(smoke: bool) -> float:
    """Return the seconds of that step with two processes that share this one's threads."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, __file__, "--part", *(["--smoke"] if smoke else [])]
    threads = max(1, torch.get_num_threads() // 2)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])["seconds"]


def compare_processes(options: argparse.Namespace, size: dict, dist: t.Distributed) -> Row:
    """Compare one process on all cores with two that share them."""
    alone, shared = [], []
    for _ in range(options.runs):
        alone.append(second_step(size, dist))
        shared.append(start_two(options.smoke))
    one, two = statistics.median(alone), statistics.median(shared)
    tokens = size["train_batch_tokens"]
    speeds = f"{tokens / two:,.0f}", f"{tokens / one:,.0f}"
    return Row("2 processes against 1, tokens/s", *speeds, one / two)


def compare_sizes(options: argparse.Namespace, size: dict, dist: t.Distributed) -> list[Row]:
    """Compare each changed size with the base."""
    changed = ON_CUDA if dist.on_cuda else ON_CPU
    if options.smoke:
        changed = IN_SMOKE
    variants = {"base": {}}
    for name, changes in changed.items():
        key = NAMES[name]
        for change in changes:
            variants[f"{name} {change[key]} against {size[key]}"] = change
    works = {}
    for name, change in variants.items():
        h = common.settings(size, change)
        step = common.OurStep(h, dist, common.new_model(h, dist), dist.compile)
        batches = t.TrainingData(h).micro_batches(0, dist)
        works[name] = lambda step=step, batches=batches: step(batches)
    times = common.interleaved(works, options.runs, common.calls_per_measurement(options))
    base = times.pop("base")
    rows = []
    for name, seconds in times.items():
        bar = "≤ 1.25" if dist.on_cuda and name.startswith("rank lora:128") else ""
        both = common.milliseconds(seconds), common.milliseconds(base)
        rows.append(Row(name, *both, seconds / base, bar))
    return rows


def main() -> None:
    part = {"action": "store_true", "help": "be one of two processes; the program's own use"}
    options = common.begin(__doc__, part=part)
    text, label = common.text_of(options)
    size = common.size_of(options) | text
    h = common.settings(size)
    if options.part:
        with t.Distributed(h) as dist:
            seconds = second_step(size, dist)
            if dist.rank == 0:
                print(json.dumps({"seconds": seconds}), flush=True)
        return
    rows = []
    with t.Distributed(h) as dist:
        if not dist.on_cuda:
            rows.append(compare_processes(options, size, dist))
        rows += compare_sizes(options, size, dist)
    common.print_header(__file__, options, common.dtype_of(h, dist))
    print(
        f"\nA step of {h.train_batch_tokens:,} tokens on {label}; the base has {h.num_layers}"
        f" layers of width {h.model_dim}, {h.map_adapter}, sequences of {h.train_seq_len}."
        f" {'Compiled' if dist.compile else 'Eager'}."
    )
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
