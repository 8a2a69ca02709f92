"""What the measuring programs share: sizes, text, our training step, timing and the printed table.

Every program measures both sides of a comparison in one run, in turn (A B A B …), and prints medians.
Most of what they take from train_gpt.py by a signature that may change stands in this file, and in
`textbook.py` nothing of it but names of settings and weights.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t

# The system of the issue: system A at the size of a CPU, and as published, with the tokens of one GPU.
CPU_SIZE = {
    "num_layers": 6,
    "model_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 3.0,
    "ve_layers": "4,5",
    "map_adapter": "lora:32",
    "xsa_last_n": 256,
    "train_seq_len": 512,
    "train_batch_tokens": 8192,
    "micro_batch_tokens": 8192,
}
FULL_SIZE = {
    "num_layers": 11,
    "model_dim": 512,
    "num_heads": 8,
    "num_kv_heads": 4,
    "mlp_mult": 3.0,
    "ve_layers": "9,10",
    "map_adapter": "lora:32",
    "xsa_last_n": 256,
    "train_seq_len": 2048,
    "train_batch_tokens": 98_304,
    "micro_batch_tokens": 98_304,
}
# So small that a program is through in seconds: it shows that the program runs, its figures mean nothing.
SMOKE_SIZE = {
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "rope_dims": 8,
    "ve_layers": "1",
    "ve_dim": 8,
    "bigram_vocab_size": 64,
    "bigram_dim": 8,
    "map_adapter": "lora:4",
    "xsa_last_n": 256,
    "train_seq_len": 32,
    "train_batch_tokens": 128,
    "micro_batch_tokens": 128,
    "eval_seq_len": 32,
    "eval_stride": 8,
    "gptq_calib_batches": 1,
}
# Dense bfloat16 FLOP/s by the vendor's data sheet, of what a GPU's name may contain.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
# glibc gives freed memory back to the kernel, which then clears each large activation anew (bench/cpu.py).
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


# ---- Options and sizes -------------------------------------------------------------------------------------


def begin(description: str, **more: dict) -> argparse.Namespace:
    """The options of a program; `more` are its own, as keywords of add_argument by name. On a CPU the program
    starts itself again with glibc keeping freed memory, as run.sh starts a run: both sides gain from it."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--runs", type=int, default=5, help="measurements of each side; their median counts"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, one run: shows that it runs"
    )
    for name, keywords in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    options = parser.parse_args()
    if options.smoke:
        options.runs, options.compile = 1, False
    compiles_on_cpu = getattr(options, "compile", False) and not torch.cuda.is_available()
    if compiles_on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        parser.error("what is compiled on a CPU needs g++, or CXX must name another C++ compiler")
    if not torch.cuda.is_available() and not set(KEEP_FREED_MEMORY) <= set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)
    if torch.cuda.is_available() or compiles_on_cpu:
        torch._dynamo.config.recompile_limit = (
            64  # several models of one class are compiled side by side
        )
    return options


def compile_setting(options: argparse.Namespace) -> dict[str, str]:
    """The setting by options.compile, where a program has it: on CUDA all is compiled anyway."""
    return {"compile": "1" if options.compile else "auto"}


def size_of(options: argparse.Namespace, on_cpu: dict = CPU_SIZE) -> dict:
    """The settings that suit the device."""
    if options.smoke:
        return SMOKE_SIZE
    return FULL_SIZE if torch.cuda.is_available() else on_cpu


def settings(*parts: dict, **changes) -> t.Hyperparameters:
    """Settings from these parts, later ones over earlier ones; the user's environment stays out of it."""
    given = {}
    for part in parts:
        given |= part
    return t.Hyperparameters(environment={}, **given | changes)


# ---- Text --------------------------------------------------------------------------------------------------

_folders = []  # temporary ones, kept until the program ends


def text_of(options: argparse.Namespace) -> tuple[dict, str]:
    """Settings that name the training text, and what it is: DATA_PATH's, else that of `data/prepare.py docs`
    where it lies, else made up."""
    docs = ROOT / "data" / "datasets" / "docs_sp1024"
    given = os.environ.get("DATA_PATH")
    if options.smoke:
        return synthetic_text(vocabulary=64, tokens=20_000)
    if given or (docs / "manifest.json").exists():
        folder = Path(given or docs)
        found = {"data_path": str(folder)}
        if (
            folder / "manifest.json"
        ).exists():  # data/prepare.py says which tokenizer made the shards
            manifest = json.loads((folder / "manifest.json").read_text())
            found["vocab_size"] = manifest["vocab_size"]
            found["tokenizer_path"] = str(folder / manifest["tokenizer"])
        for name in ("vocab_size", "tokenizer_path"):
            if name.upper() in os.environ:
                found[name] = os.environ[name.upper()]
        return found, f"tokens of {folder.name}"
    return synthetic_text(vocabulary=1024, tokens=6_000_000)


def synthetic_text(vocabulary: int, tokens: int) -> tuple[dict, str]:
    """A Markov text: after each token one of 4, the first of them in half of the cases. It has something to
    learn, needs no network, and is the same everywhere."""
    generator = np.random.Generator(np.random.Philox(7))
    successors = generator.integers(4, vocabulary, (vocabulary, 4))
    chains = 256
    text = np.empty((chains, tokens // chains), np.int64)
    text[:, 0] = generator.integers(4, vocabulary, chains)
    choices = np.minimum(generator.geometric(0.5, text.shape) - 1, 3)
    for i in range(1, text.shape[1]):
        text[:, i] = successors[text[:, i - 1], choices[:, i]]
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, text.size
    _folders.append(tempfile.TemporaryDirectory(prefix="bench_text_"))
    folder = Path(_folders[-1].name)
    for split in ("train", "val"):
        path = folder / f"fineweb_{split}_000000.bin"
        path.write_bytes(header.tobytes() + text.astype("<u2").tobytes())
    return {"data_path": str(folder), "vocab_size": vocabulary}, "a synthetic Markov text"


# ---- What is taken from train_gpt.py -----------------------------------------------------------------------


class OurStep:
    """A training step as the trainer does it: gradients of the micro-batches, optimisers, averages."""

    def __init__(
        self, h: t.Hyperparameters, world: t.World, model: t.LanguageModel, compiled: bool
    ):
        self.model = model.train()
        self.optimizers = t.Optimizers(t.tensors_by_role(model), h, world)
        self.averages = t.Averages(self.optimizers.params, h)
        self.forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
        self.count = 0

    def __call__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        loss = t.accumulate_gradients(self.forward, batches, lambda ids: None)
        self.optimizers.step(self.count, 1.0)
        self.averages.update(self.count, 1.0)
        self.count += 1
        return loss


def new_model(h: t.Hyperparameters, world: t.World) -> t.LanguageModel:
    """A model with the initial weights of the seed."""
    torch.manual_seed(h.seed)
    return t.make_model(h, world.dtype).to(world.device)


def evaluate(
    model: t.LanguageModel, val, h: t.Hyperparameters, world: t.World, stride: int
) -> tuple[float, float]:
    """train_gpt's evaluation; `val` needs `tokens` and `bytes`."""
    with contextlib.redirect_stdout(io.StringIO()):
        return t.evaluate(model, val, h, world, stride)


def export(
    h: t.Hyperparameters, world: t.World, model: t.LanguageModel, data: t.TrainingData, tokenizer
) -> bytes:
    """train_gpt's export, as after step 0; `tokenizer` needs `sha256`."""
    with contextlib.redirect_stdout(io.StringIO()):
        return t.export(h, world, model, data, 0, tokenizer)


# ---- Time and memory ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_tf32():
    """Within, products of float32 are float32 on CUDA, too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], calls: int = 1) -> float:
    """Seconds a call, of several queued one after the other."""
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    return (time.perf_counter() - began) / calls


def interleaved(
    sides: dict[str, Callable[[], object]], runs: int, calls: int = 1, warm_ups: int | None = None
) -> dict[str, float]:
    """Median seconds of a call of each side. The sides take turns, so that what else the machine does meets
    all of them; before that each runs alone until it is compiled and its memory is there."""
    if warm_ups is None:
        warm_ups = 3 if torch.cuda.is_available() else 1
    for work in sides.values():
        for _ in range(warm_ups):
            work()
    times = {name: [] for name in sides}
    for _ in range(runs):
        for name, work in sides.items():
            times[name].append(seconds_of(work, calls))
    return {name: statistics.median(values) for name, values in times.items()}


def calls_per_measurement(options: argparse.Namespace) -> int:
    """On a GPU a training step is queued while the one before still runs: a few in a row, then the clock."""
    return 5 if torch.cuda.is_available() and not options.smoke else 1


def gemm_rate(
    dtype: torch.dtype,
    device: torch.device,
    options: argparse.Namespace,
    shapes: list[tuple[int, int, int]] | None = None,
) -> float:
    """FLOP/s of matrix products in this type: of a large square one, or of all of (rows, inner, columns)."""
    if shapes is None:
        side = 64 if options.smoke else 8192 if device.type == "cuda" else 2048
        shapes = [(side, side, side)]
    pairs = []
    for rows, inner, columns in shapes:
        left, right = (
            torch.randn(rows, inner, device=device),
            torch.randn(inner, columns, device=device),
        )
        pairs.append((left.to(dtype), right.to(dtype)))

    def multiply():
        for left, right in pairs:
            left @ right

    seconds = interleaved({"gemm": multiply}, options.runs, calls=3)["gemm"]
    return sum(2 * rows * inner * columns for rows, inner, columns in shapes) / seconds


def copy_rate(device: torch.device, options: argparse.Namespace) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    count = 2**16 if options.smoke else 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, options.runs, calls=3)["copy"]
    return 2 * count / seconds


def peak_flops() -> float | None:
    """The vendor's figure for this GPU in bfloat16, where it is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


# ---- Report ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the printed table."""

    what: str
    ours: str
    other: str = ""
    ratio: float | None = None
    bar: str = ""  # such as "≥ 2.5" or "≤ 55 ms", or nothing
    measured: float | None = None  # what the bar is for, if it is not the ratio

    def met(self) -> str:
        value = self.ratio if self.measured is None else self.measured
        if not self.bar or value is None:
            return ""
        sign, number = self.bar.split()[:2]
        holds = value >= float(number) if sign == "≥" else value <= float(number)
        return "yes" if holds else "no"


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            difference = ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "train_gpt.py"]
            changed = subprocess.run(difference, capture_output=True).returncode
            return result.stdout.strip() + (", train_gpt.py changed" if changed else "")
    return "unknown"


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """Markdown."""
    print(f"\n| {' | '.join(header)} |")
    print(f"|{' --- |' * len(header)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print(flush=True)


def print_header(
    program: str, options: argparse.Namespace, dtype: str, counted: bool = False
) -> None:
    """On what was measured, or counted: device, cores, versions, type, commit."""
    runs = "counted" if counted else f"medians of {options.runs}"
    runs = "smoke run, its figures mean nothing" if options.smoke else runs
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    today = datetime.date.today().isoformat()
    print(f"# {Path(program).name}: {runs}\n")
    print(f"{processor()}, {cores}; {versions}; {dtype}; commit {commit()}; {today}", flush=True)


def print_rows(rows: list[Row], options: argparse.Namespace) -> None:
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            [row.what, row.ours, row.other, ratio, row.bar, "" if options.smoke else row.met()]
        )
    print_table(["what", "ours", "other", "ratio", "bar", "met"], lines)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
