"""How long a start takes: importing train_gpt, drawing the random maps, run.sh to the first training step.

    bash run.sh               # once before: what is timed is the second time
    python bench/start.py

The first step of `bash run.sh` is timed only where run.sh has set up (.venv is there) and there is no GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

import common
from common import ROOT, Row, t


def import_seconds(modules: str) -> None:
    """A fresh process that imports these."""
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, cwd=ROOT)


def draw_threaded(rows: list[t.MapRow]) -> None:
    """All maps, several at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        list(pool.map(t.draw_map, rows))


def draw_in_turn(rows: list[t.MapRow]) -> None:
    """All maps, as GPT draws them: the products and factorisations of each use all cores."""
    for row in rows:
        t.draw_map(row)


def first_step() -> None:
    """`bash run.sh` until it has printed its first step, then its end."""
    folder = tempfile.mkdtemp(prefix="bench_start_")
    environment = os.environ | {"ITERATIONS": "1", "OUTPUT_DIR": folder, "RUN_ID": "start"}
    process = subprocess.Popen(
        ["bash", str(ROOT / "run.sh")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step:1/"):
                return
        raise SystemExit("bash run.sh ended before its first step:\n" + "".join(lines))
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    options = common.begin(__doc__)
    h = common.settings(common.size_of(options, on_cpu=common.FULL_SIZE))
    rows = [row for row in h.maps if row.basis != "learned"]
    sides = {
        "torch": lambda: import_seconds("torch"),
        "train_gpt": lambda: import_seconds("torch, train_gpt"),
        "threaded": lambda: draw_threaded(rows),
        "in turn": lambda: draw_in_turn(rows),
    }
    set_up = (ROOT / ".venv" / ".installed").exists()
    on_cuda = torch.cuda.is_available()
    if set_up and not on_cuda and not options.smoke:
        sides["run.sh"] = first_step
    times = common.interleaved(sides, options.runs, warm_ups=0 if options.smoke else 1)

    more = times["train_gpt"] - times["torch"]
    threaded, in_turn = times["threaded"], times["in turn"]
    table = [
        Row(
            "import torch, train_gpt against import torch",
            f"{times['train_gpt']:.2f} s",
            f"{times['torch']:.2f} s",
            times["train_gpt"] / times["torch"],
        ),
        Row("what train_gpt adds", f"{more:.2f} s", bar="≤ 0.3 s", measured=more),
        Row(
            f"drawing the {len(rows)} maps, against several at a time",
            f"{in_turn:.2f} s",
            f"{threaded:.2f} s",
            threaded / in_turn,
            "≤ 5 s",
            in_turn,
        ),
    ]
    if "run.sh" in times:
        table.append(
            Row(
                "bash run.sh, second time, to its first training step",
                f"{times['run.sh']:.1f} s",
                bar="≤ 30 s",
                measured=times["run.sh"],
            )
        )
    common.print_header(__file__, options, "maps in bfloat16")
    if "run.sh" not in times:
        print(
            "\nThe first step of `bash run.sh` was not timed: that takes a CPU where it has run before."
        )
    common.print_rows(table, options)


if __name__ == "__main__":
    main()
