"""How the cost of our training step grows: with processes on a CPU, and with rank, width, depth and sequence.

    python bench/scaling.py

Processes: this one with all cores and, by torchrun, two that share them take turns on the same batch; each
turn builds the model, warms up with one step and times the next. Growth: one size changes, the rest and the
tokens a step stay; all steps take turns in one process. There the ratio is the cost over the base's.
"""

from __future__ import annotations

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
    "depth": [{"num_layers": 3, "ve_layers": "1,2"}, {"num_layers": 12, "ve_layers": "10,11"}],
    "sequence": [{"train_seq_len": length} for length in (128, 2048)],
}
ON_CUDA = {
    "rank": [{"map_adapter": f"lora:{rank}"} for rank in (8, 128, 304)],
    "width": [
        {"model_dim": 256, "num_heads": 4, "num_kv_heads": 2},
        {"model_dim": 1024, "num_heads": 16, "num_kv_heads": 8},
    ],
    "depth": [{"num_layers": 5, "ve_layers": "3,4"}, {"num_layers": 22, "ve_layers": "20,21"}],
    "sequence": [{"train_seq_len": length} for length in (512, 8192)],
}
IN_SMOKE = {"rank": [{"map_adapter": "lora:8"}], "sequence": [{"train_seq_len": 16}]}
NAMES = {
    "rank": "map_adapter",
    "width": "model_dim",
    "depth": "num_layers",
    "sequence": "train_seq_len",
}


def second_step(size: dict, world: t.World) -> float:
    """Seconds of the second step of a new model; all processes begin it together."""
    h = common.settings(size)
    step = common.OurStep(h, world, common.new_model(h, world), world.compile)
    data = t.TrainingData(h)
    step(data.micro_batches(0, world))
    batches = data.micro_batches(1, world)
    world.sum_(torch.zeros(1))
    return common.seconds_of(lambda: step(batches))


def start_two(smoke: bool) -> float:
    """Seconds of that step with two processes, which share this one's threads."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, __file__, "--part"] + (["--smoke"] if smoke else [])
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])["seconds"]


def compare_processes(options, size: dict, world: t.World) -> Row:
    """This process with all cores against 2 that share them, in turn."""
    alone, shared = [], []
    for _ in range(options.runs):
        alone.append(second_step(size, world))
        shared.append(start_two(options.smoke))
    one, two = statistics.median(alone), statistics.median(shared)
    tokens = size["train_batch_tokens"]
    return Row(
        "2 processes against 1, tokens/s", f"{tokens / two:,.0f}", f"{tokens / one:,.0f}", one / two
    )


def compare_sizes(options, size: dict, world: t.World) -> list[Row]:
    """Each changed size against the base."""
    changed = IN_SMOKE if options.smoke else ON_CUDA if world.on_cuda else ON_CPU
    variants = {"base": {}}
    for name, changes in changed.items():
        for change in changes:
            key = NAMES[name]
            variants[f"{name} {change[key]} against {size[key]}"] = change
    works = {}
    for name, change in variants.items():
        h = common.settings(size, change)
        step = common.OurStep(h, world, common.new_model(h, world), world.compile)
        batches = t.TrainingData(h).micro_batches(0, world)
        works[name] = lambda step=step, batches=batches: step(batches)
    times = common.interleaved(works, options.runs, common.calls_per_measurement(options))
    base = times.pop("base")
    rows = []
    for name, seconds in times.items():
        bar = "≤ 1.25" if world.on_cuda and name.startswith("rank lora:128") else ""
        rows.append(
            Row(name, common.milliseconds(seconds), common.milliseconds(base), seconds / base, bar)
        )
    return rows


def main() -> None:
    part = {"action": "store_true", "help": "one of two processes; for the program itself"}
    options = common.begin(__doc__, part=part)
    text, label = common.text_of(options)
    size = common.size_of(options) | text
    if options.part:
        with t.World(common.settings(size)) as world:
            seconds = second_step(size, world)
            if world.rank == 0:
                print(json.dumps({"seconds": seconds}), flush=True)
        return
    rows = []
    h = common.settings(size)
    with t.World(h) as world:
        if not world.on_cuda:
            rows.append(compare_processes(options, size, world))
        rows += compare_sizes(options, size, world)
    common.print_header(__file__, options, str(world.dtype).removeprefix("torch."))
    print(
        f"\nA step of {h.train_batch_tokens:,} tokens on {label}; the base has {h.num_layers} layers of"
        f" width {h.model_dim}, {h.map_adapter}, sequences of {h.train_seq_len}."
        f" {'Compiled' if world.compile else 'Eager'}."
    )
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
