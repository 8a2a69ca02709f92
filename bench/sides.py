"""Measure sides of a comparison on one GPU: compiled at the same time, timed one by one.

    python bench/sides.py --out DIR                  # all sides
    python bench/sides.py --out DIR base flash       # these alone
    python bench/sides.py --list                     # what there is

Each side is a process of its own. It builds and compiles what it measures, beside the others, and
stops itself. The program then lets one side after the other go on, so that each has the GPU to
itself while it is timed. A side that fails, or is not ready in time, does not hold up the others.
Each result is a line of DIR/sides.jsonl as soon as it exists; DIR/sides.md is the table of all.
`--pause PID` stops another process and its children while a side is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

import common
from common import t

# Training steps of the full configuration, by what differs from it.
STEPS = {
    "base": {},
    "mix-order reduction": {"mix_order_reduction": 1},
    "flash": {"attention_backend": "flash"},
    "cudnn": {"attention_backend": "cudnn"},
    "q, k, v apart": {"fuse_qkv": 0},
    "muon compiled": {"compile_muon": 1},
    "rank 128": {"map_adapter": "lora:128"},
    "learned": {"map_basis": "learned", "map_adapter": "none"},
}
OTHERS = ("eval eager", "eval compiled", "export")
SIDES = (*STEPS, *OTHERS)
EVAL_TOKENS = 160_000
SIDE_BYTES = 17e9  # of the GPU that a side may take


# ---- One side ----------------------------------------------------------------------------------


def wait_for_turn() -> None:
    """Stop this process until the program lets it go on."""
    common.synchronize()
    os.kill(os.getpid(), signal.SIGSTOP)


def settings_of(side: str, options: argparse.Namespace) -> t.Hyperparameters:
    """Return the settings of a side, at the size that suits the device."""
    text, _ = common.text_of(options)
    size = common.size_of(options)
    return common.settings(size, text, STEPS.get(side, {}))


def measure_step(
    h: t.Hyperparameters, dist: t.Distributed, options: argparse.Namespace
) -> dict[str, object]:
    """Return milliseconds per step and the peak memory."""
    model = common.new_model(h, dist)
    step = common.OurStep(h, dist, model, dist.compile)
    batches = t.TrainingData(h).micro_batches(0, dist)
    blocks, length, warm = (1, 2, 1) if options.smoke else (4, 10, 5)
    for _ in range(warm):
        step(batches)
    wait_for_turn()
    for _ in range(warm):
        step(batches)
    if dist.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [common.seconds_of(lambda: step(batches), length) for _ in range(blocks)]
    peak = torch.cuda.max_memory_allocated() if dist.on_cuda else 0
    result = {
        "ms": round(1e3 * statistics.median(seconds), 2),
        "blocks_ms": [round(1e3 * each, 2) for each in seconds],
        "peak_MiB": round(peak / 2**20),
        "attention": t.first_usable_attention(h, dist, common.dtype_of(h, dist)),
    }
    if options.profile and dist.on_cuda:
        result["profile"] = profile(lambda: step(batches), Path(options.out) / "profile.txt")
    return result


def profile(work, path: Path) -> dict[str, float]:
    """Write the kernels of three calls to a file; return milliseconds per call by kind."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            work()
        common.synchronize()
    averages = profiler.key_averages()
    path.write_text(
        averages.table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=120)
    )
    kinds: dict[str, float] = {}
    for event in averages:
        name = event.key.lower()
        kind = "elementwise and reductions"
        if any(word in name for word in ("gemm", "nvjet", "cutlass", "wgmma")):
            kind = "GEMM"
        if any(word in name for word in ("flash", "cudnn", "fmha", "attention", "sdpa")):
            kind = "attention"
        if "memcpy" in name or "memset" in name:
            kind = "copies"
        kinds[kind] = kinds.get(kind, 0) + event.self_device_time_total / 3e3
    return {kind: round(value, 2) for kind, value in kinds.items()}


def measure_eval(
    h: t.Hyperparameters, dist: t.Distributed, options: argparse.Namespace, compiled: bool
) -> dict[str, object]:
    """Return window tokens per second of the exact evaluation, and how long its graph took."""
    t.COMPILED_BATCHES[dist.device.type] = 0 if compiled else 10**9
    model = common.new_model(h, dist)
    count = 2000 if options.smoke else EVAL_TOKENS
    tokens = torch.randint(4, h.vocab_size, (count,))
    began = time.perf_counter()
    t.evaluate(model, tokens, h, dist, h.eval_stride, trial=True)
    common.synchronize()
    first = time.perf_counter() - began
    wait_for_turn()
    seconds = common.seconds_of(lambda: t.evaluate(model, tokens, h, dist, h.eval_stride))
    windows = len(t.plan_windows(count - 1, h.eval_seq_len, h.eval_stride)[0])
    return {
        "seconds": round(seconds, 3),
        "first_call_seconds": round(first, 2),
        "window_tokens_per_second": round(windows * h.eval_seq_len / seconds),
    }


def measure_export(h: t.Hyperparameters, dist: t.Distributed) -> dict[str, object]:
    """Return the seconds of an export with calibration."""
    model = common.new_model(h, dist)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    data = t.TrainingData(h)
    wait_for_turn()
    blobs = []
    seconds = common.seconds_of(lambda: blobs.append(common.export(h, dist, model, data)))
    return {"seconds": round(seconds, 2), "bytes": len(blobs[0])}


def run_side(side: str, options: argparse.Namespace) -> None:
    """Measure one side and append its result."""
    h = settings_of(side, options)
    with t.Distributed(h) as dist:
        if side in STEPS:
            result = measure_step(h, dist, options)
        elif side == "export":
            result = measure_export(h, dist)
        else:
            result = measure_eval(h, dist, options, "compiled" in side)
    line = {"side": side, **result, "device": common.processor(), "torch": torch.__version__}
    with (Path(options.out) / "sides.jsonl").open("a") as file:
        file.write(json.dumps(line | {"commit": common.commit()}) + "\n")


# ---- All sides ---------------------------------------------------------------------------------


def start(side: str, options: argparse.Namespace) -> subprocess.Popen:
    """Start the process of a side."""
    command = [sys.executable, "-u", __file__, "--out", options.out, "--side", side]
    if options.smoke:
        command.append("--smoke")
    if side == "base":
        command.append("--profile")
    log = (Path(options.out) / f"{side.replace(' ', '_').replace(',', '')}.log").open("w")
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "3"} | dict(os.environ)
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=threads)


def is_stopped(process: subprocess.Popen) -> bool:
    """Return whether a side is ready and waits for its turn."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    return False


def wait_until_ready(processes: dict[str, subprocess.Popen], deadline: float) -> set[str]:
    """Return the sides that are ready once all are, or at the deadline; others are ended."""
    waiting = dict(processes)
    ready = set()
    while waiting and time.monotonic() < deadline:
        for side, process in list(waiting.items()):
            if is_stopped(process):
                ready.add(side)
            if side in ready or process.poll() is not None:
                del waiting[side]
        time.sleep(0.2)
    for process in waiting.values():
        process.kill()
    return ready


@contextlib.contextmanager
def paused(pid: int | None):
    """Within, a process and all its children stand still."""
    others = []
    if pid:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            others = [parent, *parent.children(recursive=True)]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for other in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.send_signal(number)
        if number == signal.SIGSTOP:
            yield


def run_wave(sides: list[str], options: argparse.Namespace, deadline: float) -> None:
    """Compile some sides at the same time, then time one after the other."""
    processes = {side: start(side, options) for side in sides}
    ready = wait_until_ready(processes, deadline)
    with paused(options.pause):
        for side, process in processes.items():
            if side not in ready:
                print(f"{side}: failed or not ready in time, see its log", flush=True)
                continue
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            print(f"{side}: exit code {process.wait()}", flush=True)


def write_table(folder: Path) -> None:
    """Write sides.md from sides.jsonl."""
    path = folder / "sides.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        return
    base = next((row["ms"] for row in rows if row["side"] == "base"), None)
    lines = [
        f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}",
        "",
        "| side | result | against base |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        facts = {
            key: value
            for key, value in row.items()
            if key not in ("device", "torch", "commit", "side")
        }
        ratio = f"{row['ms'] / base:.3f}" if base and "ms" in row else ""
        text = ", ".join(f"{key} {value}" for key, value in facts.items())
        lines.append(f"| {row['side']} | {text} | {ratio} |")
    (folder / "sides.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def wave_size(options: argparse.Namespace) -> int:
    """Return how many sides fit into the memory of the GPU, or the cores of a CPU."""
    if not torch.cuda.is_available():
        return 2
    free, _ = torch.cuda.mem_get_info()
    return max(1, int(free / SIDE_BYTES))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sides", nargs="*", metavar="SIDE", help="these alone")
    parser.add_argument("--out", default="bench/results/gpu", help="folder for the results")
    parser.add_argument("--list", action="store_true", help="name the sides and stop")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--seconds", type=float, default=240, help="time for all of it")
    parser.add_argument("--pause", type=int, help="process to stop while a side is timed")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.runs, options.compile = 1, False
    if options.list:
        print("\n".join(SIDES))
        return
    Path(options.out).mkdir(parents=True, exist_ok=True)
    if options.side:
        run_side(options.side, options)
        return
    sides = options.sides or list(SIDES)
    unknown = [side for side in sides if side not in SIDES]
    if unknown:
        parser.error(f"no such side: {', '.join(unknown)}; --list names them")
    deadline = time.monotonic() + options.seconds
    size = wave_size(options)
    while sides and time.monotonic() < deadline:
        run_wave(sides[:size], options, deadline)
        sides = sides[size:]
    write_table(Path(options.out))


if __name__ == "__main__":
    main()
