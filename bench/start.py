"""Measure a start: importing train_gpt, generating the random maps, run.sh to its first step.

    bash run.sh               # once before: the second time is measured
    python bench/start.py

`bash run.sh` is timed only where it has been set up (.venv is there) and there is no GPU.
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


def import_modules(modules: str) -> None:
    """Import these in a new process."""
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, cwd=ROOT)


def generate_threaded(specs: list[t.MapSpec]) -> None:
    """Generate all maps, several at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(t.generate_map, specs))


def generate_in_turn(specs: list[t.MapSpec]) -> None:
    """Generate all maps as GPT does: each of its factorizations uses all cores."""
    for spec in specs:
        t.generate_map(spec)


def first_step() -> None:
    """Start `bash run.sh` and end it once it has printed its first step."""
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


def rows_of(times: dict[str, float], maps: int) -> list[Row]:
    """Return the lines of the table."""

    def seconds(name: str, digits: int = 2) -> str:
        return f"{times[name]:.{digits}f} s"

    more = times["train_gpt"] - times["torch"]
    rows = [
        Row(
            "import torch, train_gpt against import torch",
            seconds("train_gpt"),
            seconds("torch"),
            times["train_gpt"] / times["torch"],
        ),
        Row("what train_gpt adds", f"{more:.2f} s", bar="≤ 0.3 s", measured=more),
        Row(
            f"generating the {maps} maps in turn, against several at a time",
            seconds("in turn"),
            seconds("threaded"),
            times["threaded"] / times["in turn"],
            "≤ 5 s",
            times["in turn"],
        ),
    ]
    if "run.sh" in times:
        what = "bash run.sh, second time, to its first training step"
        rows.append(Row(what, seconds("run.sh", 1), bar="≤ 30 s", measured=times["run.sh"]))
    return rows


def main() -> None:
    options = common.begin(__doc__)
    h = common.settings(common.size_of(options, on_cpu=common.FULL_SIZE))
    specs = [spec for spec in t.build_map_table(h).values() if spec.is_random]
    sides = {
        "torch": lambda: import_modules("torch"),
        "train_gpt": lambda: import_modules("torch, train_gpt"),
        "threaded": lambda: generate_threaded(specs),
        "in turn": lambda: generate_in_turn(specs),
    }
    is_set_up = (ROOT / ".venv" / ".installed").exists()
    if is_set_up and not torch.cuda.is_available() and not options.smoke:
        sides["run.sh"] = first_step
    times = common.interleaved(sides, options.runs, warm_ups=0 if options.smoke else 1)
    common.print_header(__file__, options, "maps in bfloat16")
    if "run.sh" not in times:
        print("\n`bash run.sh` was not timed: that needs a CPU on which it has run before.")
    common.print_rows(rows_of(times, len(specs)), options)


if __name__ == "__main__":
    main()
