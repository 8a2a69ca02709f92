"""Measure the script beside a reference, on a GPU if there is one, else on the CPU.

    python bench/speed.py step      # a training step, against plain PyTorch (bench/textbook.py)
    python bench/speed.py eval      # the sliding evaluation, against a loop over its windows
    python bench/speed.py export    # the export, against GPTQ one matrix after the other
    python bench/speed.py start     # imports, random maps, run.sh up to its first step
    python bench/speed.py kernels   # products, attention and norm, against torch's

Settings come from the environment, on top of system A's: its full size on a GPU and in `export`,
smaller ones on a CPU. `COMPILE=1` compiles on a CPU, too; DATA_PATH names a text, else tokens are
random. `--with "MAP_ADAPTER=lora:128"` adds a side of the script with these variables; they need
not be settings, and an empty value takes a variable away. `--only` measures some sides alone.

In step, eval and export each side is a process. All build and compile at the same time, and then
take turns (A B A B ...); those that do not have the turn wait for a message. So all of them must
fit into the memory together. Each measurement is printed at once, the medians at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import multiprocessing
import multiprocessing.connection
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from textbook import Textbook, TextbookStep

import train_gpt as t

# ---- Sizes and text ----------------------------------------------------------------------------


def variables_in(text: str) -> dict[str, str]:
    """Return the variables of words NAME=VALUE."""
    return dict(word.split("=", 1) for word in text.split())


CPU_SIZE = variables_in(
    "NUM_LAYERS=6 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2"
    " TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=8192 EVAL_BATCH_TOKENS=16384"
)
# System A as published, with the tokens that one of eight GPUs takes.
FULL_SIZE = variables_in(
    "NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4"
    " TRAIN_SEQ_LEN=2048 TRAIN_BATCH_TOKENS=98304"
)
# Shows within seconds that a subcommand runs; its figures mean nothing.
SMOKE_SIZE = variables_in(
    "COMPILE=0 VOCAB_SIZE=64 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 ROPE_DIMS=8"
    " VE_DIM=8 BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 MAP_ADAPTER=lora:4 TRAIN_SEQ_LEN=32"
    " TRAIN_BATCH_TOKENS=128 EVAL_SEQ_LEN=32 EVAL_STRIDE=8 GPTQ_CALIB_BATCHES=1"
)
# Dense bfloat16 FLOP/s in the vendor's data sheet, by a part of the GPU's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
ON_CUDA = torch.cuda.is_available()


def default_variables(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Return the variables that hold where the environment says nothing; write a random text."""
    wants_full = ON_CUDA or options.command in ("export", "start")
    size = SMOKE_SIZE if options.smoke else FULL_SIZE if wants_full else CPU_SIZE
    tokens = 64 * np.random.default_rng(7).random(2_000_000) ** 2
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    for split in ("train", "val"):
        shard = folder / f"fineweb_{split}_000000.bin"
        shard.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    allocator = {}
    if not ON_CUDA:  # as run.sh does it
        lines = (ROOT / "tools" / "memory.env").read_text(encoding="utf-8").splitlines()
        allocator = variables_in("\n".join(line for line in lines if not line.startswith("#")))
    return size | allocator | {"DATA_PATH": str(folder)}


# ---- Time and memory ---------------------------------------------------------------------------


def synchronize() -> None:
    """Wait for what is queued on the GPU."""
    if ON_CUDA:
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], calls: int = 1) -> tuple[float, Any]:
    """Return the seconds of a call, of several queued one after the other, and its last result."""
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        result = work()
    synchronize()
    return (time.perf_counter() - began) / calls, result


def take_turns(
    works: Mapping[str, Callable[[], Any]], runs: int, calls: int = 3
) -> dict[str, float]:
    """Return the median seconds of a call of each work in this process."""
    times = {name: [] for name in works}
    for number in range(runs + 1):  # the first time is a warm-up
        for name, work in works.items():
            seconds, _ = timed(work, calls)
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def resident_bytes(key: str) -> int:
    """Return a size of this process by Linux: VmRSS is its memory now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def random_on(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def measure_rates(smoke: bool, runs: int) -> tuple[float, float]:
    """Return this machine's FLOP/s of a square product and bytes per second of a copy."""
    h = t.load_settings()
    with t.Distributed(h) as dist:
        side = 64 if smoke else 8192 if dist.on_cuda else 2048
        square = random_on(dist.device, t.resolve_dtype(h, dist.on_cuda), side, side)
        # Larger than any cache.
        count = 2**16 if smoke else 2**30 if dist.on_cuda else 2**28
        source = torch.zeros(count, dtype=torch.uint8, device=dist.device)
        target = torch.ones_like(source)
        works = {"gemm": lambda: square @ square, "copy": lambda: target.copy_(source)}
        seconds = take_turns(works, runs)
    return 2 * side**3 / seconds["gemm"], 2 * count / seconds["copy"]


# ---- Sides: processes that take turns ----------------------------------------------------------

PROCESSES = multiprocessing.get_context("spawn")
Facts = dict[str, float]  # what a measurement says: seconds, bytes of memory, loss, ...


class Side(NamedTuple):
    """One side of a comparison."""

    name: str
    # Returns what is timed; that may return facts by name.
    build: Callable[[t.Hyperparameters, t.Distributed], Callable[[], Mapping[str, Any]]]
    variables: Mapping[str, str] = {}  # of its process


def serve(side: Side, calls: int, pipe: multiprocessing.connection.Connection) -> None:
    """Build a side, then send a measurement for each message: the whole work of its process."""
    before = resident_bytes("VmRSS")
    h = t.load_settings()
    with t.Distributed(h) as dist:
        work = side.build(h, dist)
        for _ in range(3 if dist.on_cuda else 1):  # compiled, and with its memory
            work()
        synchronize()
        if dist.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        pipe.send({})
        while pipe.recv():
            seconds, facts = timed(work, calls)
            peak = resident_bytes("VmHWM") - before
            if dist.on_cuda:
                peak = torch.cuda.max_memory_allocated()
            facts = {name: float(value) for name, value in facts.items()}
            pipe.send({"seconds": seconds, "memory": peak} | facts)


class SideProcess:
    """The process of a side, as seen by the program."""

    def __init__(self, side: Side, calls: int) -> None:
        self.pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=serve, args=(side, calls, theirs), daemon=True)
        with mock.patch.dict(os.environ, side.variables):
            for name, value in side.variables.items():
                if not value:
                    del os.environ[name]
            self.process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def receive(self, deadline: float) -> Facts | None:
        """Return what the side sends until the deadline; None, and its end, if it sends nothing."""
        with contextlib.suppress(EOFError):  # it has ended
            if self.pipe.poll(max(0, deadline - time.monotonic())):
                return self.pipe.recv()
        self.process.kill()
        return None

    def send(self, go_on: bool) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.pipe.send(go_on)


def compare(sides: Sequence[Side], options: argparse.Namespace, calls: int = 1) -> dict[str, Facts]:
    """Return the median facts of each side that works; print each measurement."""
    cores = str(max(1, (os.cpu_count() or 1) // len(sides)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", cores)
    began = time.monotonic()
    processes = {side.name: SideProcess(side, calls) for side in sides}
    for name, process in list(processes.items()):
        if process.receive(began + options.wait) is None:
            print(f"{name}: failed, or not ready after {options.wait:g} s", flush=True)
            del processes[name]
        else:
            print(f"{name}: ready after {time.monotonic() - began:.0f} s", flush=True)
    measured = {name: [] for name in processes}
    for _ in range(options.runs):
        for name, process in processes.items():
            process.send(True)
            facts = process.receive(time.monotonic() + options.wait)
            if facts:
                measured[name].append(facts)
                print(f"{name}: {duration(facts['seconds'])}", flush=True)
    for process in processes.values():
        process.send(False)
        process.process.join()
    medians = {name: medians_of(results) for name, results in measured.items() if results}
    if not medians:
        raise SystemExit("error: no side could be measured")
    return medians


def medians_of(results: list[Facts]) -> Facts:
    return {key: statistics.median(facts[key] for facts in results) for key in results[0]}


def chosen(sides: list[Side], options: argparse.Namespace) -> list[Side]:
    """Return the sides that --only names, all without it, and those of --with."""
    for words in options.variables:
        name = f"{sides[0].name}, {words}"
        sides = [*sides, sides[0]._replace(name=name, variables=variables_in(words))]
    unknown = set(options.only) - {side.name for side in sides}
    if unknown:
        names = ", ".join(side.name for side in sides)
        raise SystemExit(f"error: --only {', '.join(unknown)}: the sides are {names}")
    return [side for side in sides if not options.only or side.name in options.only]


# ---- Report ------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{1e3 * seconds:,.1f} ms"


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(*cells: str) -> None:
    print()
    print_row(*cells)
    print_row(*["---"] * len(cells))


def print_sides(facts: Mapping[str, Facts], columns: Mapping[str, Callable[[Facts], str]]) -> None:
    """Print the table of all sides, with the time of each over that of the first."""
    first = next(iter(facts.values()))
    print_head("side", "time", "over the first", *columns)
    for name, mine in facts.items():
        ratio = f"{mine['seconds'] / first['seconds']:.2f}"
        cells = [text(mine) for text in columns.values()]
        print_row(name, duration(mine["seconds"]), ratio, *cells)


def mebibytes(facts: Facts) -> str:
    return f"{facts['memory'] / 2**20:,.0f}"


def processor() -> str:
    if ON_CUDA:
        return torch.cuda.get_device_name()
    for path in Path("/proc").glob("cpuinfo"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """Return the commit, and whether train_gpt.py differs from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        result = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True)
        differs = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "train_gpt.py"]).returncode
    except FileNotFoundError:  # no git
        return "unknown"
    head = result.stdout.decode().strip() or "unknown"
    return head + (", train_gpt.py changed" if differs and head != "unknown" else "")


def print_machine(options: argparse.Namespace, h: t.Hyperparameters) -> None:
    """Print on what is measured: device, cores, versions, type, commit, size of the network."""
    runs = "smoke run, its figures mean nothing" if options.smoke else f"medians of {options.runs}"
    dtype = str(t.resolve_dtype(h, t.use_cuda(h))).removeprefix("torch.")
    print(f"# speed.py {options.command}: {runs}\n")
    print(
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads;"
        f" torch {torch.__version__}, Python {platform.python_version()}; {dtype};"
        f" commit {commit()}; {datetime.date.today().isoformat()}."
        f" {h.num_layers} layers of width {h.model_dim}, {h.map_adapter}.\n",
        flush=True,
    )


# ---- step --------------------------------------------------------------------------------------


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

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        loss = t.accumulate_gradients(self.forward, batches, lambda ids: None)
        self.optimizers.step(self.count, 1.0)
        self.averages.update(self.count, 1.0)
        self.count += 1
        return loss


def new_model(h: t.Hyperparameters, dist: t.Distributed) -> t.LanguageModel:
    """Return a model with the initial weights of the seed."""
    torch.manual_seed(h.seed)
    return t.make_model(h, t.resolve_dtype(h, dist.on_cuda)).to(dist.device)


def new_textbook(h: t.Hyperparameters, dist: t.Distributed) -> Textbook:
    """Return the textbook's model with the same weights."""
    return Textbook(h, new_model(h, dist), t.resolve_dtype(h, dist.on_cuda))


def build_step(h: t.Hyperparameters, dist: t.Distributed) -> Callable[[], Facts]:
    batches = t.TrainingData(h).micro_batches(0, dist)
    step = OurStep(h, dist, new_model(h, dist), dist.compile)
    return lambda: {"loss": step(batches)}


def build_textbook_step(h: t.Hyperparameters, dist: t.Distributed) -> Callable[[], Facts]:
    batches = t.TrainingData(h).micro_batches(0, dist)
    step = TextbookStep(h, new_textbook(h, dist), dist.compile)
    return lambda: {"loss": step(batches)}


def step(options: argparse.Namespace) -> None:
    """A training step, without the reading of its batch; all sides take the same steps."""
    h = t.load_settings()
    compiled = t.Distributed(h).compile
    learned = {"MAP_BASIS": "learned", "MAP_ADAPTER": "none"}
    sides = [
        Side("ours", build_step),
        Side("textbook", build_textbook_step),
        Side("learned in full", build_step, learned),
    ]
    if compiled:
        sides.append(Side("textbook, eager", build_textbook_step, {"COMPILE": "0"}))
    # A step is queued on a GPU while another still runs.
    calls = 5 if ON_CUDA and not options.smoke else 1
    facts = compare(chosen(sides, options), options, calls)
    columns = {
        "tokens/s": lambda mine: f"{h.train_batch_tokens / mine['seconds']:,.0f}",
        "peak memory, MiB": mebibytes,
        "last loss": lambda mine: f"{mine['loss']:.4f}",
    }
    print_sides(facts, columns)
    if "ours" in facts:
        print_counts(options, h, facts["ours"]["seconds"])


class Part(NamedTuple):
    flops: float
    bytes: float


def count_parts(h: t.Hyperparameters, model: t.LanguageModel, size: int) -> dict[str, Part]:
    """Return the parts of a step of system A, by formula; an activation has `size` bytes.

    Bytes are what it must read and write if each operand and each result of a product goes to
    memory once, and each chain of element-wise operations is one kernel.
    """
    n, layers = h.train_batch_tokens, h.num_layers
    maps = [m for name, m in model.named_modules() if "blocks." in name and isinstance(m, t.Linear)]
    shapes = [m.weight.shape for m in maps]
    ranks = [len(m.lora.B) if hasattr(m, "lora") else 0 for m in maps]
    tables = [(h.model_dim, h.bigram_dim), (h.kv_dim, h.ve_dim)]  # maps of the two embeddings
    dense = sum(rows * columns for rows, columns in shapes)
    factors = sum(rank * sum(shape) for shape, rank in zip(shapes, ranks, strict=True))
    merged = sum(r * rows * columns for (rows, columns), r in zip(shapes, ranks, strict=True))
    product = Part(2 * n * dense, (n * sum(map(sum, shapes)) + dense) * size)
    attention = layers * n * (2 * h.model_dim + 2 * h.kv_dim) * size  # q, k, v and the output
    logits, vectors = n * h.vocab_size * size, n * h.model_dim * size
    return {
        "merging W + A B": Part(2 * merged, size * (2 * dense + factors)),
        "maps, forward": product,
        "maps, input gradient": product,
        "adapter factors": Part(  # x Bᵀ, dY A, and with them the two gradients
            4 * n * factors, size * (2 * n * sum(map(sum, shapes)) + 4 * n * sum(ranks))
        ),
        "maps of embeddings": Part(
            6 * n * sum(rows * columns for rows, columns in tables),
            4 * n * sum(map(sum, tables)) * size,
        ),
        # Per head two products of (T, D) and (T, T), half of each masked; twice as many backward.
        "attention": Part(6 * n * h.train_seq_len * layers * h.model_dim, 4 * attention),
        # Logits: written, read; their gradient: written, read for both products.
        "head and loss": Part(6 * n * h.vocab_size * h.model_dim, 5 * logits + 3 * vectors),
        "optimizers and averages": count_optimizers(h, model),
        "element-wise work": Part(0, elementwise_bytes(h, n, size)),
    }


def count_optimizers(h: t.Hyperparameters, model: t.LanguageModel) -> Part:
    """Return the cost of Newton-Schulz, of reading and writing float32 states, and of averages."""
    groups = t.tensors_by_role(model)
    matrices = [p for role in (t.Role.MATRIX, t.Role.FACTOR) for p in groups[role].values()]
    size = 2 if ON_CUDA else 4
    flops = moved = 0.0
    for p in matrices:
        small, large = min(p.shape), max(p.shape)
        flops += h.muon_backend_steps * (4 * small**2 * large + 2 * small**3)
        moved += h.muon_backend_steps * size * (5 * small * large + 4 * small**2)
    values = sum(p.numel() for p in model.parameters())
    in_muon = sum(p.numel() for p in matrices)
    return Part(flops, moved + 4 * (5 * in_muon + 7 * (values - in_muon) + 6 * values))


def elementwise_bytes(h: t.Hyperparameters, n: int, size: int) -> float:
    """Return the bytes of all that is neither product nor attention.

    Where the forward pass of a chain reads R and writes W, its backward pass reads R and the
    gradient of W, and writes the gradient of R: 3 R + 2 W.
    """
    d, kv, hidden = h.model_dim, h.kv_dim, h.mlp_dim
    in_each_layer = [  # values read and written per token
        (2 * d, 2 * d),  # mix of stream and embedding; norm
        (d + kv, d + kv),  # norm and rotation of queries and keys
        (2 * kv, kv),  # value residual
        (d + kv, d),  # exclusive self-attention
        (2 * d, 2 * d),  # residual; norm
        (hidden, hidden),  # activation
        (2 * d, d),  # residual
    ]
    once = [(3 * d, d)]  # embedding, bigram and norm; SmearGate
    once += [(2 * d, d)] * (h.num_layers // 2)  # U-Net skips
    chains = in_each_layer * h.num_layers + once
    return n * size * sum(3 * reads + 2 * writes for reads, writes in chains)


def print_counts(options: argparse.Namespace, h: t.Hyperparameters, seconds: float) -> None:
    """Print what our step computes and moves, over what this machine could do."""
    with PROCESSES.Pool(1) as pool:
        gemm, copy = pool.apply(measure_rates, (options.smoke, options.runs))
    dtype = t.resolve_dtype(h, ON_CUDA)
    parts = count_parts(h, t.make_model(h, dtype), dtype.itemsize)
    print_head("part", "GFLOP", "GB", "least time at the rates below")
    least = 0.0
    for name, part in parts.items():
        computing, moving = part.flops / gemm, part.bytes / copy
        least += max(computing, moving)
        limit = "FLOPs" if computing > moving else "bytes"
        both = f"{part.flops / 1e9:,.1f}", f"{part.bytes / 1e9:,.2f}"
        print_row(name, *both, f"{duration(max(computing, moving))} ({limit})")
    # What the optimizers compute is not the network's.
    flops = sum(part.flops for name, part in parts.items() if "optimizers" not in name)
    moved = sum(part.bytes for part in parts.values())
    print(
        f"\nRates measured here: {gemm / 1e9:,.0f} GFLOP/s (a square product),"
        f" {copy / 1e9:,.1f} GB/s (a copy, read and written)."
        f"\nModel FLOPs: {flops / 1e9:,.1f} G per step, {flops / seconds / 1e9:,.0f} GFLOP/s,"
        f" {flops / seconds / gemm:.1%} of that rate."
        f"\nBytes: {moved / 1e9:,.1f} GB per step, {moved / seconds / copy:.1%} of the rate."
        f"\nLeast time of all parts: {duration(least)}; ours took {duration(seconds)}."
    )
    for name, peak in PEAK_FLOPS.items():
        if name in processor() and dtype is torch.bfloat16:
            share = f"{flops / seconds / peak:.1%}"
            print(f"The vendor's peak is {peak / 1e12:,.0f} TFLOP/s: {share} of it.")


# ---- eval --------------------------------------------------------------------------------------


@torch.no_grad()
def loop_over_windows(
    predict: Callable[[Tensor], Tensor], tokens: Tensor, h: t.Hyperparameters
) -> float:
    """Return the mean loss in nats, one window after the other, as published scripts do it.

    `predict` maps ids (1, T) to logits (1, T, vocabulary).
    """
    targets = len(tokens) - 1
    length = min(h.eval_seq_len, targets)
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    begin = scored = 0
    while scored < targets:
        end = min(begin + length, targets)
        begin = end - length  # the last window ends with the stream
        ids, following = tokens[begin:end], tokens[begin + 1 : end + 1]
        losses = F.cross_entropy(predict(ids[None])[0], following, reduction="none")
        total += losses[scored - begin :].double().sum()
        scored = end
        begin += h.eval_stride
    return total.item() / targets


def build_eval(h: t.Hyperparameters, dist: t.Distributed, tokens: Tensor) -> Callable[[], Facts]:
    model = new_model(h, dist)
    return lambda: {"loss": t.evaluate(model, tokens, h, dist, h.eval_stride)}


def build_loop(
    h: t.Hyperparameters,
    dist: t.Distributed,
    tokens: Tensor,
    make: Callable[[t.Hyperparameters, t.Distributed], torch.nn.Module],
) -> Callable[[], Facts]:
    model = make(h, dist).eval()
    predict = torch.compile(model.predict, dynamic=False, disable=not dist.compile)
    tokens = tokens.to(dist.device)
    return lambda: {"loss": loop_over_windows(predict, tokens, h)}


def evaluation(options: argparse.Namespace) -> None:
    """The exact and the streaming evaluation of random tokens by initial weights."""
    h = t.load_settings()
    count = options.tokens or (512 if options.smoke else 131_072 if ON_CUDA else 16_384)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, h.vocab_size, (count,), generator=generator)
    # Streaming computes some rows before each batch again, so that large batches pay.
    streaming = {"EVAL_MODE": "streaming", "EVAL_BATCH_TOKENS": "524288" if ON_CUDA else "131072"}
    eager = {"COMPILE": "0"}
    ours = functools.partial(build_eval, tokens=tokens)
    loop = functools.partial(build_loop, tokens=tokens)
    sides = [
        Side("exact", ours),
        Side("streaming", ours, streaming),
        Side("loop over the same model", functools.partial(loop, make=new_model)),
        Side("loop over the textbook", functools.partial(loop, make=new_textbook), eager),
    ]
    facts = compare(chosen(sides, options), options)
    columns = {
        "tokens scored per second": lambda mine: f"{(count - 1) / mine['seconds']:,.0f}",
        "peak memory, MiB": mebibytes,
        "nats per token": lambda mine: f"{mine['loss']:.6f}",
    }
    print_sides(facts, columns)
    print(
        f"\n{count:,} tokens in windows of {h.eval_seq_len}, stride {h.eval_stride}. Every side"
        " scores the first window in one pass: more --tokens are nearer to a whole text."
    )


# ---- export ------------------------------------------------------------------------------------


STAGES = ("calibration", "quantization", "compression")


def trained_like(h: t.Hyperparameters, dist: t.Distributed) -> t.LanguageModel:
    """Return a model that compresses like a trained one: no matrix is at its initial zero."""
    model = new_model(h, dist).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=p.size(1) ** -0.5)
    return model


def build_export(h: t.Hyperparameters, dist: t.Distributed) -> Callable[[], Facts]:
    model, data = trained_like(h, dist), t.TrainingData(h)

    def work() -> Facts:
        batches = list(t.calibration_batches(h, dist, data, 0))
        calibrating, calibration = timed(lambda: t.calibrate(h, model, dist, batches, data.sample))
        quantizers = calibration.quantizers(h, h.loss_per_value)
        quantizing, tensors = timed(
            lambda: t.quantize_model(model, quantizers, calibration.hessians)
        )
        header = {"model": h.model_settings()}
        compressing, (blob, _) = timed(lambda: t.write_artifact(header, tensors))
        times = dict(zip(STAGES, (calibrating, quantizing, compressing), strict=True))
        return times | {"bytes": len(blob)}

    return work


def gptq(w: Tensor, hessian: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    """Return the codes of one matrix (rows, columns) as in GPTQ's paper, arXiv:2210.17323."""
    largest = 2 ** (bits - 1) - 1
    scales = w.double().square().mean(1).sqrt() * clip_sigmas / largest
    order = hessian.diagonal().argsort(descending=True)
    w, hessian = w.double()[:, order], hessian.double()[order][:, order]
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(w)
    for begin in range(0, w.size(1), 128):
        end = min(begin + 128, w.size(1))
        errors = torch.empty_like(w[:, begin:end])
        for j in range(begin, end):
            codes[:, j] = (w[:, j] / scales).round().clamp(-largest, largest)
            errors[:, j - begin] = (w[:, j] - codes[:, j] * scales) / factor[j, j]
            w[:, j:end] -= errors[:, j - begin, None] * factor[j, j:end]
        w[:, end:] -= errors @ factor[begin:end, end:]
    return codes[:, order.argsort()]


def build_gptq(h: t.Hyperparameters, dist: t.Distributed) -> Callable[[], Facts]:
    model = trained_like(h, dist)
    matrices = [p.detach() for p in model.parameters() if p.ndim > 1]
    hessians = {}
    for n in {p.size(1) for p in matrices}:  # the time does not depend on their values
        x = random_on(dist.device, torch.float32, 2 * n, n)
        hessians[n] = x.T @ x

    def work() -> Facts:
        for p in matrices:
            gptq(p, hessians[p.size(1)], h.matrix_bits, h.matrix_clip_sigmas)
        return {}

    return lambda: {"quantization": timed(work)[0]}


def export(options: argparse.Namespace) -> None:
    """The export; the reference is GPTQ alone, one matrix and one column after the other."""
    h = t.load_settings()
    sides = [Side("ours", build_export), Side("GPTQ one by one", build_gptq)]
    facts = compare(chosen(sides, options), options)
    columns = {
        stage: lambda mine, stage=stage: duration(mine[stage]) if stage in mine else ""
        for stage in STAGES
    }
    columns |= {
        "bytes": lambda mine: f"{mine['bytes']:,.0f}" if "bytes" in mine else "",
        "peak memory, MiB": mebibytes,
    }
    print_sides(facts, columns)
    print(f"\n{h.gptq_calib_batches} calibration batches of up to 8,192 tokens.")


# ---- start -------------------------------------------------------------------------------------


def first_step(environment: Mapping[str, str]) -> None:
    """Start `bash run.sh` and end it once it has printed its first step."""
    with tempfile.TemporaryDirectory(prefix="bench_start_") as folder:
        settings = {"ITERATIONS": "1", "OUTPUT_DIR": folder, "RUN_ID": "start"}
        process = subprocess.Popen(
            ["bash", ROOT / "run.sh"],
            env={**environment, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step:1/"):
                break
        process.kill()
        process.wait()
    if not lines or not lines[-1].startswith("step:1/"):
        raise SystemExit("error: bash run.sh ended before its first step:\n" + "".join(lines))


def start(options: argparse.Namespace) -> None:
    """The parts of a start; run.sh only on a CPU where it has run before."""
    h = t.load_settings()
    specs = [spec for spec in t.build_map_table(h).values() if spec.is_random]

    def run_python(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

    def in_threads() -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(t.generate_map, specs))

    sides = {
        "import torch": run_python("import torch"),
        "import torch, train_gpt": run_python("import torch, train_gpt"),
        f"{len(specs)} random maps in turn, as the script does it": lambda: [
            t.generate_map(spec) for spec in specs
        ],
        "the same, several at a time in threads": in_threads,
    }
    if (ROOT / ".venv").exists() and not ON_CUDA and not options.smoke:
        sides["bash run.sh, to its first training step"] = lambda: first_step(options.environment)
    print_head("what", "time")
    for name, work in sides.items():
        print_row(name, duration(take_turns({name: work}, options.runs, calls=1)[name]))


# ---- kernels -----------------------------------------------------------------------------------


def time_products(parts: t.MapParts, n: int, runs: int) -> dict[str, float]:
    """Return the seconds of the products of a map with n tokens.

    Those for the gradients of A and B are four thin ones, or the dense gradient of W + A B.
    """
    weight, a, b = parts
    rows, columns = weight.shape
    x = random_on(weight.device, weight.dtype, n, columns)
    dy = random_on(weight.device, weight.dtype, n, rows)
    works = {
        "forward": lambda: x @ weight.t(),
        "input gradient": lambda: dy @ weight,
        "thin": lambda: (dy.t() @ (x @ b.t()), (dy @ a).t() @ x),
        "dense": lambda: dy.t() @ x,
    }
    return take_turns(works, runs)


def measure_products(h: t.Hyperparameters, like: Tensor, runs: int) -> None:
    """Print the products at the shapes of the maps.

    `chosen` is what the script estimates to be faster where the output has no scale.
    """
    random = functools.partial(random_on, like.device, like.dtype)
    in_blocks = [spec for spec in t.build_map_table(h).values() if "blocks." in spec.name]
    print_head("map", "rank", "forward", "input gradient", "thin", "dense", "chosen", "faster")
    for rows, columns in sorted({tuple(spec.shape) for spec in in_blocks}):
        for rank in sorted({min(rank, rows, columns) for rank in (32, 128, 304)}):
            parts = t.MapParts(random(rows, columns), random(rows, rank), random(rank, columns))
            times = time_products(parts, h.train_batch_tokens, runs)
            chosen = "thin" if parts.low_rank_gradient_pays(False) else "dense"
            faster = min("thin", "dense", key=times.get)
            print_row(f"{rows} × {columns}", rank, *map(duration, times.values()), chosen, faster)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    """Attend by torch's fused kernel: q (B, T, H, D), k and v (B, T, H_kv, D) -> (B, T, H, D)."""
    heads_first = [each.transpose(1, 2) for each in (q, k, v)]
    backends = list(t.SDPA_BACKENDS.values()) if backend is None else [backend]
    with sdpa_kernel(backends):
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return t.block_attention(q, k, v, k.size(1))


def attention_kinds(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return the kinds of attention: the script's choice first."""
    kinds = {"ours": t.causal_attention}
    if device.type == "cuda":
        for name in ("cudnn", "flash"):
            kinds[name] = functools.partial(fused_attention, backend=t.SDPA_BACKENDS[name])
        return kinds
    return kinds | {"plain products": plain_attention, "fused": fused_attention}


def gradients_of(forward: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute forward and backward; the output is its own gradient."""
    y = forward(*inputs)
    return torch.autograd.grad(y, inputs, y.detach())


def measure_attention(h: t.Hyperparameters, like: Tensor, runs: int, smoke: bool) -> None:
    """Print the time of one layer's attention by sequence length."""
    kinds = attention_kinds(like.device)
    print_head("attention, tokens per sequence", *kinds)
    n = h.train_batch_tokens
    for length in [32] if smoke else [2048] if like.is_cuda else [128, 256, 512, 1024, 2048]:
        new = functools.partial(random_on, like.device, like.dtype, n // length, length)
        heads = (h.num_heads, h.num_kv_heads, h.num_kv_heads)
        qkv = [new(count, h.head_dim).requires_grad_() for count in heads]
        both = {name: functools.partial(gradients_of, each, qkv) for name, each in kinds.items()}
        times = take_turns(both, runs)
        print_row(f"{length}, forward and backward", *map(duration, times.values()))
        with torch.no_grad():
            alone = {name: functools.partial(each, *qkv) for name, each in kinds.items()}
            times = take_turns(alone, runs)
        print_row(f"{length}, forward", *map(duration, times.values()))


def measure_kernels(runs: int, smoke: bool) -> None:
    h = t.load_settings()
    with t.Distributed(h) as dist:
        dtype = t.resolve_dtype(h, dist.on_cuda)
        like = random_on(dist.device, dtype, h.train_batch_tokens, h.model_dim)
        measure_products(h, like, runs)
        measure_attention(h, like, runs, smoke)
        x = like.requires_grad_()
        norms = {
            "ours": functools.partial(gradients_of, t.norm, [x]),
            "torch's": functools.partial(gradients_of, lambda x: F.rms_norm(x, x.shape[-1:]), [x]),
        }
        print_head("norm, forward and backward", *norms)
        print_row(tuple(x.shape), *map(duration, take_turns(norms, runs).values()))
    gemm, copy = measure_rates(smoke, runs)
    print(
        f"\nRates: {gemm / 1e9:,.0f} GFLOP/s (a square product), {copy / 1e9:,.1f} GB/s (a copy,"
        f" read and written): {gemm / copy:.0f} FLOPs per byte."
    )


def kernels(options: argparse.Namespace) -> None:
    """The kernels of a step, in a process that has the allocator's variables."""
    with PROCESSES.Pool(1) as pool:
        pool.apply(measure_kernels, (options.runs, options.smoke))


# ---- Command -----------------------------------------------------------------------------------

COMMANDS = {"step": step, "eval": evaluation, "export": export, "start": start, "kernels": kernels}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--runs", type=int, default=5, help="measurements of each side")
    add("--only", nargs="+", default=[], metavar="SIDE", help="these sides alone")
    side = "one more side of the script with these variables, such as MAP_ADAPTER=lora:128"
    add("--with", dest="variables", action="append", default=[], metavar="VARIABLES", help=side)
    add("--tokens", type=int, help="of the text that eval scores")
    add("--wait", type=float, default=600, help="seconds after which a side is left out")
    add("--smoke", action="store_true", help="tiny sizes, one run: shows that it runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.runs = 1
    options.environment = dict(os.environ)  # for what does not take the sizes of this program
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench_text_") as folder:
        os.environ.update(default_variables(options, Path(folder)) | options.environment)
        print_machine(options, t.load_settings())
        COMMANDS[options.command](options)


if __name__ == "__main__":
    main()
