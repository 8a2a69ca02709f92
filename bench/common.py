"""What the measuring programs share: sizes, text, our training step, timing and the printed table.

Every program measures both sides of a comparison in one run, in turn (A B A B ...), and prints
medians. Calls into train_gpt.py whose signature may change stand in this file where possible.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare

import train_gpt as t

# System A: small enough for a CPU, and as published with the tokens of one of eight GPUs.
CPU_SIZE = {
    "num_layers": 6,
    "model_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 3.0,
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
    "map_adapter": "lora:32",
    "xsa_last_n": 256,
    "train_seq_len": 2048,
    "train_batch_tokens": 98_304,
    "micro_batch_tokens": 98_304,
}
# A program of this size ends within seconds: it shows that the program runs, and measures nothing.
SMOKE_SIZE = {
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "rope_dims": 8,
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
# Dense bfloat16 FLOP/s in the vendor's data sheet, by a part of the GPU's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def read_variables(path: Path) -> dict[str, str]:
    """Return the variables of a file of KEY=VALUE lines and comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


KEEP_FREED_MEMORY = read_variables(ROOT / "tools" / "memory.env")

# ---- Options and sizes -------------------------------------------------------------------------


def begin(description: str, **more: dict) -> argparse.Namespace:
    """Return the options of a program.

    On a CPU the program first starts itself again with the allocator's variables that run.sh sets:
    both sides gain from them.

    Args:
        description: the program's docstring.
        more: the program's own options, keywords of add_argument by name.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="measurements of each side")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, one run: shows that the program runs"
    )
    for name, keywords in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    options = parser.parse_args()
    if options.smoke:
        options.runs, options.compile = 1, False
    on_cuda = torch.cuda.is_available()
    compiles_on_cpu = getattr(options, "compile", False) and not on_cuda
    if compiles_on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        parser.error("torch.compile on a CPU needs g++, or another C++ compiler that CXX names")
    if not on_cuda and not set(KEEP_FREED_MEMORY) <= set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)
    if on_cuda or compiles_on_cpu:  # several models of one class are compiled side by side
        torch._dynamo.config.recompile_limit = 64
    return options


def compile_setting(options: argparse.Namespace) -> dict[str, str]:
    """Return the setting for options.compile; on CUDA everything is compiled anyway."""
    return {"compile": "1" if options.compile else "auto"}


def size_of(options: argparse.Namespace, on_cpu: dict = CPU_SIZE) -> dict:
    """Return the settings of the size that suits the device."""
    if options.smoke:
        return SMOKE_SIZE
    return FULL_SIZE if torch.cuda.is_available() else on_cpu


def settings(*parts: dict, **changes: object) -> t.Hyperparameters:
    """Return settings from these parts, later ones over earlier ones, without the environment."""
    given = {}
    for part in parts:
        given |= part
    return t.load_settings({}, **given | changes)


# ---- Text --------------------------------------------------------------------------------------

_folders = []  # temporary ones, kept until the program ends


def text_of(options: argparse.Namespace) -> tuple[dict, str]:
    """Return settings that name the training text, and a label for it.

    It is that of DATA_PATH, else that of `data/prepare.py docs` if it is there, else synthetic.
    """
    docs = ROOT / "data" / "datasets" / "docs_sp1024"
    given = os.environ.get("DATA_PATH")
    if options.smoke:
        return synthetic_text(vocabulary=64, tokens=20_000)
    if not given and not (docs / "manifest.json").exists():
        return synthetic_text(vocabulary=1024, tokens=6_000_000)
    folder = Path(given or docs)
    found = {"data_path": str(folder)}
    if (folder / "manifest.json").exists():  # it names the tokenizer that made the shards
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found["vocab_size"] = manifest["vocab_size"]
        found["tokenizer_path"] = str(folder / manifest["tokenizer"])
    for name in ("vocab_size", "tokenizer_path"):
        if name.upper() in os.environ:
            found[name] = os.environ[name.upper()]
    return found, f"tokens of {folder.name}"


def synthetic_text(vocabulary: int, tokens: int) -> tuple[dict, str]:
    """Return settings that name a Markov text, and a label.

    After each token comes one of 4, the first of them in half of the cases: something to learn that
    needs no network and is the same everywhere.
    """
    generator = np.random.Generator(np.random.Philox(7))
    successors = generator.integers(4, vocabulary, (vocabulary, 4))
    chains = 256
    text = np.empty((chains, tokens // chains), np.int64)
    text[:, 0] = generator.integers(4, vocabulary, chains)
    choices = np.minimum(generator.geometric(0.5, text.shape) - 1, 3)
    for i in range(1, text.shape[1]):
        text[:, i] = successors[text[:, i - 1], choices[:, i]]
    _folders.append(tempfile.TemporaryDirectory(prefix="bench_text_"))
    folder = Path(_folders[-1].name)
    for split in ("train", "val"):
        prepare.write_shard(folder / f"fineweb_{split}_000000.bin", text.flatten())
    return {"data_path": str(folder), "vocab_size": vocabulary}, "a synthetic Markov text"


# ---- Calls into train_gpt.py -------------------------------------------------------------------


class OurStep:
    """A training step as the trainer takes it: gradients, optimizers, averages of the weights."""

    def __init__(
        self, h: t.Hyperparameters, dist: t.Distributed, model: t.LanguageModel, compiled: bool
    ) -> None:
        self.model = model.train()
        self.optimizers = t.Optimizers(t.tensors_by_role(model), h, dist)
        self.averages = t.WeightAverages(self.optimizers.params, h)
        self.forward = torch.compile(model, dynamic=False, fullgraph=True, disable=not compiled)
        self.count = 0

    def __call__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        loss = t.accumulate_gradients(self.forward, batches, lambda ids: None)
        self.optimizers.step(self.count, 1.0)
        self.averages.update(self.count, 1.0)
        self.count += 1
        return loss


def dtype_of(h: t.Hyperparameters, dist: t.Distributed) -> torch.dtype:
    """Return the type of activations."""
    return t.resolve_dtype(h, dist.on_cuda)


def new_model(h: t.Hyperparameters, dist: t.Distributed) -> t.LanguageModel:
    """Return a model with the initial weights of the seed."""
    torch.manual_seed(h.seed)
    return t.make_model(h, dtype_of(h, dist)).to(dist.device)


def export(
    h: t.Hyperparameters, dist: t.Distributed, model: t.LanguageModel, data: t.TrainingData
) -> bytes:
    """Return the artifact of an untrained model; its header names no real tokenizer."""
    tokenizer = SimpleNamespace(sha256="none")
    run = t.Run(h, dist, t.RunLog(dist.rank), t.StopSignal(), tokenizer, val=None)
    with contextlib.redirect_stdout(io.StringIO()):
        return t.export(run, model, data, 0).blob


# ---- Time and memory ---------------------------------------------------------------------------


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Within, float32 products on CUDA are float32, too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize() -> None:
    """Wait for what is queued on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], calls: int = 1) -> float:
    """Return the seconds per call, of several calls queued one after the other."""
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    return (time.perf_counter() - began) / calls


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    runs: int,
    calls: int = 1,
    warm_ups: int | None = None,
) -> dict[str, float]:
    """Return the median seconds per call of each side.

    The sides take turns, so that other load on the machine meets all of them. Before that each side
    runs alone until it is compiled and has its memory.
    """
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
    """Return how many steps to time at once: on a GPU one is queued while another still runs."""
    return 5 if torch.cuda.is_available() and not options.smoke else 1


def gemm_rate(
    dtype: torch.dtype,
    device: torch.device,
    options: argparse.Namespace,
    shapes: list[tuple[int, int, int]] | None = None,
) -> float:
    """Return the FLOP/s of matrix products in this type.

    Args:
        dtype, device: of the matrices.
        options: the program's.
        shapes: (rows, inner, columns) of each product; None: one large square.
    """
    if shapes is None:
        side = 8192 if device.type == "cuda" else 2048
        if options.smoke:
            side = 64
        shapes = [(side, side, side)]
    pairs = []
    for rows, inner, columns in shapes:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        pairs.append((left, right))

    def multiply() -> None:
        for left, right in pairs:
            left @ right

    seconds = interleaved({"gemm": multiply}, options.runs, calls=3)["gemm"]
    return sum(2 * rows * inner * columns for rows, inner, columns in shapes) / seconds


def copy_rate(device: torch.device, options: argparse.Namespace) -> float:
    """Return the bytes per second, read and written, of a copy that no cache holds."""
    count = 2**30 if device.type == "cuda" else 2**28
    if options.smoke:
        count = 2**16
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, options.runs, calls=3)["copy"]
    return 2 * count / seconds


def peak_flops() -> float | None:
    """Return the vendor's bfloat16 FLOP/s for this GPU, if it is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


# ---- Report ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the printed table."""

    what: str
    ours: str
    other: str = ""
    ratio: float | None = None
    bar: str = ""  # such as "≥ 2.5" or "≤ 55 ms", or empty
    measured: float | None = None  # what the bar applies to; None: the ratio

    def met(self) -> str:
        """Return yes or no, or nothing without a bar."""
        value = self.ratio if self.measured is None else self.measured
        if not self.bar or value is None:
            return ""
        sign, number = self.bar.split()[:2]
        holds = value >= float(number) if sign == "≥" else value <= float(number)
        return "yes" if holds else "no"


def time_row(what: str, ours: float, other: float, bar: str = "") -> Row:
    """Return the line of two times in seconds, whose ratio is the other's over ours."""
    return Row(what, milliseconds(ours), milliseconds(other), other / ours, bar)


def processor() -> str:
    """Return the name of the GPU or the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """Return the commit, and whether train_gpt.py differs from it."""
    git = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = subprocess.check_output(
            [*git, "rev-parse", "--short", "HEAD"], text=True, stderr=subprocess.DEVNULL
        )
        difference = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "train_gpt.py"])
        return head.strip() + (", train_gpt.py changed" if difference.returncode else "")
    return "unknown"


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {' | '.join(header)} |")
    print(f"|{' --- |' * len(header)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print(flush=True)


def print_header(
    program: str, options: argparse.Namespace, dtype: torch.dtype | str, counted: bool = False
) -> None:
    """Print on what was measured or counted: device, cores, versions, type, commit."""
    runs = "counted" if counted else f"medians of {options.runs}"
    if options.smoke:
        runs = "smoke run, its figures mean nothing"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    today = datetime.date.today().isoformat()
    dtype = str(dtype).removeprefix("torch.")
    print(f"# {Path(program).name}: {runs}\n")
    print(f"{processor()}, {cores}; {versions}; {dtype}; commit {commit()}; {today}", flush=True)


def print_rows(rows: list[Row], options: argparse.Namespace) -> None:
    """Print the table of a comparison."""
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        met = "" if options.smoke else row.met()
        lines.append([row.what, row.ours, row.other, ratio, row.bar, met])
    print_table(["what", "ours", "other", "ratio", "bar", "met"], lines)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
