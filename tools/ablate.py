"""Run variants of train_gpt.py under one budget and compare their scores at equal bytes.

    python tools/ablate.py --out DIR --plan FILE --seeds 1,2,3 --budget tokens=1000000 --jobs 4
    python tools/ablate.py --out DIR --presets cpu/baseline,cpu/random_adapters \\
        --set "MAP_BASIS=hadamard" --seeds 1,2 --budget seconds=120 NUM_LAYERS=4
    python tools/ablate.py --out DIR --plan FILE --budget bytes=800000 --tokens 1000000 \\
        --knob MODEL_DIM
    python tools/ablate.py --out DIR --report-only --compare "LABEL" "OTHER LABEL"

A plan has one line per variant: label family preset KEY=VALUE ...
The settings of a variant override those of the command line, which override the preset's.

The yardstick is a line through the networks of one family (--line, by default "learned"): val_bpb
against the logarithm of the model file's bytes. The report gives each variant's distance from it.

If a preset has TEACHER_PRESET=NAME, that preset is trained first, with the same seed and budget,
and its artifact is passed as DISTILL_FROM. With a budget of bytes, the teacher gets the tokens and
keeps its size, because only the student is stored.

With --jobs N, N runs share the GPU, or the cores of the CPU; their tokens/s depend on each other.

Files in --out: results.csv (one row per run, written as soon as the run ends), table.md,
bpb_vs_bytes.png, the folders runs/, pilots/ and logs/, and in script/ a copy of the script that
ran. Ctrl-C lets each run save a checkpoint; the same command continues from there.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import collections
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import pandas as pd
    import psutil
    import pynvml
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
    from scipy import stats
except ImportError as error:
    raise SystemExit(
        f"error: {error.name} is missing: pip install -r tools/requirements.txt"
    ) from None

ROOT = Path(__file__).resolve().parent.parent
# A run inherits these variables and no others: a stray setting in the shell could change a run.
INHERITED = re.compile(
    r"PATH|PYTHONPATH|HOME|LANG|LC_ALL|TMPDIR|LD_LIBRARY_PATH|OMP_NUM_THREADS"
    r"|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|(CUDA|MALLOC)_\w+"
)
# On a CPU, keep freed memory in the process (see run.sh).
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# Settings that an option of this tool controls.
CONTROLLED = {
    "SEED": "--seeds",
    "ITERATIONS": "--budget",
    "MAX_WALLCLOCK_SECONDS": "--budget",
    "RUN_ID": "--out",
    "OUTPUT_DIR": "--out",
}
# The shortest run whose model file has the right size. The quantizer's scale is proportional to a
# row's RMS, so the bits per value hardly depend on how long the model was trained.
PILOT = {"ITERATIONS": 8, "WARMUP_STEPS": 0, "VAL_LOSS_EVERY": 0, "MAX_WALLCLOCK_SECONDS": 0}
TOLERANCE = 0.03  # a model file may be smaller than the budget of bytes by this fraction
ARTIFACT = "model.int6.ptz"
REPORT = "results.json"
GIB = 2**30
GRACE_SECONDS = 60  # for a run that was told to stop: it finishes its step and saves a checkpoint
LINE_SECONDS = 30  # between two progress lines where the output is not a terminal
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Columns of results.csv that hold text.
TEXT = [
    "label",
    "family",
    "preset",
    "settings",
    "budget",
    "script",
    "torch",
    "variant",
    "run",
    "note",
    "error",
]
# Columns of results.csv that hold numbers, and the keys of the run's results.json.
FIGURES = {
    "steps": "steps",
    "seconds": "train_seconds",
    "tokens_per_second": "tokens_per_second",
    "trained": "trained_parameters",
    "frozen": "frozen_parameters",
    "total_bytes": "bytes_total",
    "val_bpb_before": "val_bpb_before",
    "val_bpb_roundtrip": "val_bpb_roundtrip",
    "val_bpb_sliding": "val_bpb_sliding_window",
    "holdout_last": "holdout_loss_last",
    "holdout_ema": "holdout_loss_ema",
    "holdout_swa": "holdout_loss_swa",
}
# Import the script once and read the settings of each run, in the environment that a run has.
CHECK = """
import dataclasses, importlib, json, os, sys
folder, name = os.path.split(sys.argv[1])
processes = sys.argv[2]
sys.path.insert(0, folder)
script = importlib.import_module(name.removesuffix(".py"))
torch = sys.modules.get("torch")
gpus = torch.cuda.device_count() if torch else 0
world_size = max(1, gpus) if processes == "all" else 1
inherited = dict(os.environ)
answers = []
for settings in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update({**inherited, **settings, "WORLD_SIZE": str(world_size)})
    try:
        answers.append([dataclasses.asdict(script.load_settings(os.environ)), ""])
    except script.UserError as error:
        answers.append([{}, str(error)])
names = [field.name for field in dataclasses.fields(script.Hyperparameters)]
names += [*script.ALIASES, *script.UNSUPPORTED]
names = [name.upper() for name in names]
version = torch.__version__ if torch else ""
print(json.dumps([answers, names, gpus, version], default=str))
"""


class UserError(Exception):
    """An error that the user can fix: the message says what is wrong and what to do."""


class RunFailed(Exception):
    """A run without a result. The message goes into its row; the other runs continue."""


# ---- What to run ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run may use: training tokens, training seconds, or bytes of the model file."""

    kind: str
    amount: float
    tokens: int = 0  # with a budget of bytes: the training tokens
    knob: str = ""  # with a budget of bytes: the setting that changes the size
    step: int = 0  # of the knob; 0 means the smallest valid step

    def __str__(self) -> str:
        suffix = f" tokens={self.tokens} {self.knob}" if self.knob else ""
        return f"{self.kind}={self.amount:.10g}{suffix}"

    def settings(self, values: dict) -> dict[str, str]:
        """Return the settings that spend the budget, given the values of a variant's settings."""
        if self.kind == "seconds":
            seconds = self.amount + values["gptq_reserve_seconds"]
            return {"ITERATIONS": str(10**9), "MAX_WALLCLOCK_SECONDS": f"{seconds:.10g}"}
        step_tokens = values["train_batch_tokens"]
        steps = int(self.tokens or self.amount) // step_tokens
        if not steps:
            raise UserError(f"{self} is less than one step of {step_tokens} tokens")
        return {"ITERATIONS": str(steps), "MAX_WALLCLOCK_SECONDS": "0"}


@dataclasses.dataclass(eq=False)
class Variant:
    """A preset with changes; it runs once per seed."""

    label: str
    family: str
    preset: str
    settings: dict[str, str]
    budget: Budget
    teacher: Variant | None = None
    teaches: bool = False
    # Filled in by `check`: every setting's value as the script reads it, and a hash of everything
    # that the runs depend on except the seed.
    values: dict = dataclasses.field(default_factory=dict)
    id: str = ""

    def name(self) -> str:
        """Return the name of the variant's runs, without the seed."""
        preset = re.sub(r"[^A-Za-z0-9_-]+", "_", self.preset.removesuffix(".env"))
        return f"{preset[-40:]}-{self.id}"

    def knob_pattern(self) -> tuple[str, str, str]:
        """Return the knob's setting, its text, and the pattern that finds the number in it."""
        if self.budget.knob == "rank":
            key, pattern = "MAP_ADAPTER", r"(?<=lora:)\d+"
        else:
            key, pattern = self.budget.knob, r"^\d+$"
        text = self.values.get(key.lower(), self.settings.get(key, ""))
        return key, str(text), pattern

    def knob_value(self) -> int:
        """Return the knob's value in the variant's own settings."""
        key, text, pattern = self.knob_pattern()
        found = re.findall(pattern, text)
        if len(found) == 1 and int(found[0]) > 0:
            return int(found[0])
        needed = "a setting that is a whole number over 0"
        if self.budget.knob == "rank":
            needed = "MAP_ADAPTER with one lora:R"
        raise UserError(f"{self.label}: --knob {self.budget.knob} needs {needed}, not {key}={text}")

    def with_knob(self, value: int) -> dict[str, str]:
        """Return the settings with the knob at a value."""
        key, text, pattern = self.knob_pattern()
        return self.settings | {key: re.sub(pattern, str(value), text)}


class PlanLine(NamedTuple):
    """One line of a plan."""

    label: str
    family: str
    preset: str
    changes: dict[str, str]


def parse_budget(args: argparse.Namespace) -> Budget:
    found = re.fullmatch(r"(tokens|seconds|bytes)=(\d[\d_]*(\.\d+)?(e\d+)?)", args.budget or "")
    if not found or not float(found[2]):
        raise UserError("--budget needs tokens=N, seconds=S or bytes=N, over 0")
    kind, amount = found[1], float(found[2])
    if kind != "bytes" and not args.knob and args.tokens is None:
        return Budget(kind, amount)
    knob = re.fullmatch(r"([A-Z_]+|rank)(?::([1-9]\d*))?", args.knob or "")
    if kind != "bytes" or not knob or not args.tokens or args.tokens < 0:
        raise UserError(
            "--budget bytes=N needs --tokens T and --knob KNOB[:STEP], the other budgets neither"
        )
    return Budget(kind, amount, args.tokens, knob[1], int(knob[2] or 0))


def parse_settings(words: list[str], where: str) -> dict[str, str]:
    for word in words:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word):
            raise UserError(f"{where}: {word!r} is not KEY=VALUE")
    return dict(word.split("=", 1) for word in words)


def split_words(text: str, where: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def find_preset(name: str) -> Path:
    folder = ROOT / "presets"
    for path in (folder / f"{name.removesuffix('.env')}.env", Path(name)):
        if path.is_file():
            return path
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.env")]
    raise UserError(f"no preset {name!r}; there are: {' '.join(sorted(names))}")


def load_preset(name: str, heirs: tuple = ()) -> dict[str, str]:
    """Return the settings of presets/NAME.env, or of a file, as run.sh reads them.

    PRESET_BASE names a preset that supplies the settings missing here.
    """
    if name in heirs:
        raise UserError(f"PRESET_BASE makes {name} its own base")
    path = find_preset(name)
    lines = path.read_text(encoding="utf-8").splitlines()
    words = [line.split("#")[0].rstrip() for line in lines]
    settings = parse_settings([word for word in words if word], str(path))
    base = settings.pop("PRESET_BASE", "")
    if not base:
        return settings
    inherited = load_preset(base, (*heirs, name))
    inherited.pop("TEACHER_PRESET", None)  # a preset names its own teacher
    return inherited | settings


def with_data(settings: dict[str, str], data: str | None) -> dict[str, str]:
    """Add the settings that name the data, tokenizer and vocabulary, as run.sh does."""
    default = ROOT / "data" / "datasets" / f"docs_sp{settings.get('VOCAB_SIZE', 1024)}"
    folder = Path(os.path.abspath(data or settings.get("DATA_PATH") or default))
    for split in ("train", "val"):
        if not list(folder.glob(f"fineweb_{split}_*.bin")):
            raise UserError(
                f"no fineweb_{split}_*.bin in {folder}; data/prepare.py makes it, then --data"
            )
    settings = settings | {"DATA_PATH": str(folder)}
    if "TOKENIZER_PATH" in settings:
        return settings
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"no {manifest} to name the tokenizer; set TOKENIZER_PATH")
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    settings["TOKENIZER_PATH"] = os.path.abspath(folder / facts["tokenizer"])
    settings.setdefault("VOCAB_SIZE", str(facts["vocab_size"]))
    return settings


def read_plan(path: str) -> list[PlanLine]:
    lines = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        words = split_words(text, where)
        if not words:
            continue
        if len(words) < 3:
            raise UserError(f"{where}: needs label, family and preset, then KEY=VALUE ...")
        lines.append(PlanLine(*words[:3], parse_settings(words[3:], where)))
    if not lines:
        raise UserError(f"{path}: no line says what to run")
    return lines


def cross_presets(names: list[str], changes: list[str]) -> list[PlanLine]:
    """Return a line for each preset, without changes and with each of them."""
    lines = []
    for name in names:
        for text in ["", *changes]:
            settings = parse_settings(split_words(text, "--set"), "--set")
            lines.append(PlanLine(f"{name} {text}".strip(), name, name, settings))
    return lines


@dataclasses.dataclass
class VariantBuilder:
    """Turn lines of a plan into variants; a teacher stands before its first student."""

    common: dict[str, str]
    data: str | None
    variants: list[Variant] = dataclasses.field(default_factory=list)
    teachers: dict[str, Variant] = dataclasses.field(default_factory=dict)

    def add(self, line: PlanLine, budget: Budget, students: tuple = ()) -> Variant:
        if line.preset in students:
            raise UserError(f"TEACHER_PRESET makes {line.preset} its own teacher")
        settings = load_preset(line.preset) | self.common | line.changes
        for key in CONTROLLED:
            settings.pop(key, None)
        settings = with_data(settings, self.data)
        variant = Variant(line.label, line.family, line.preset, settings, budget)
        teacher = settings.pop("TEACHER_PRESET", "")
        if teacher and not settings.get("DISTILL_FROM"):
            variant.teacher = self.teacher(teacher, budget, (*students, line.preset))
        self.variants.append(variant)
        return variant

    def teacher(self, preset: str, budget: Budget, students: tuple) -> Variant:
        if preset not in self.teachers:
            if budget.knob:
                budget = Budget("tokens", budget.tokens)
            teacher = self.add(PlanLine(preset, preset, preset, {}), budget, students)
            teacher.teaches = True
            self.teachers[preset] = teacher
        return self.teachers[preset]


def read_variants(args: argparse.Namespace, budget: Budget) -> list[Variant]:
    """Return the variants of the plan, or of --presets and --set."""
    if bool(args.plan) == bool(args.presets) or (args.plan and args.set):
        raise UserError("what to run: --presets with any number of --set, or else --plan")
    lines = read_plan(args.plan) if args.plan else cross_presets(args.presets.split(","), args.set)
    common = parse_settings(args.settings, "command line")
    given = set(common).union(*(line.changes for line in lines))
    refused = sorted(given & CONTROLLED.keys())
    if refused:
        raise UserError("; ".join(f"{key} is set by {CONTROLLED[key]}" for key in refused))
    builder = VariantBuilder(common, args.data)
    for line in lines:
        builder.add(line, budget)
    return builder.variants


# ---- The script and the machine ------------------------------------------------------------------


def environment(settings: dict, on_cpu: bool = True) -> dict[str, str]:
    """Return the environment of a run."""
    inherited = {key: value for key, value in os.environ.items() if INHERITED.fullmatch(key)}
    given = {key: str(value) for key, value in settings.items()}
    memory = KEEP_MEMORY if on_cpu else {}
    return memory | inherited | given | {"PYTHONDONTWRITEBYTECODE": "1"}


def check(variants: list[Variant], script: Path, jobs: int) -> tuple[int, str]:
    """Fill in the variants' values, budgets and ids. Return the GPUs to use and torch's version.

    Raise UserError with everything that the script refuses.
    """
    asked = []
    for variant in variants:
        teacher = {"DISTILL_FROM": "an artifact"} if variant.teacher else {}
        asked.append(variant.settings | teacher)
    child = subprocess.run(
        [sys.executable, "-c", CHECK, script.absolute(), "all" if jobs == 1 else "one"],
        input=json.dumps(asked),
        text=True,
        capture_output=True,
        env=environment({}),
        check=False,
    )
    if child.returncode:
        raise UserError(f"cannot read the settings of {script}: {child.stderr.strip()}")
    answers, names, gpus, version = json.loads(child.stdout.splitlines()[-1])
    problems = []
    for variant, settings, (values, problem) in zip(variants, asked, answers, strict=True):
        variant.values = values
        unknown = [key for key in settings if key not in names and not INHERITED.fullmatch(key)]
        problems += [f"{variant.label}: {key}: no such setting" for key in unknown]
        if problem:
            problems.append(f"{variant.label}: {problem}")
    if problems:
        raise UserError("\n".join(problems))
    code = script.read_text(encoding="utf-8")
    for variant in variants:  # teachers first: a student's id depends on its teacher's
        complete(variant, code)
    if all(variant.values.get("device") == "cpu" for variant in variants):
        gpus = 0
    return gpus, version


def complete(variant: Variant, code: str) -> None:
    """Add the settings that spend the budget, and the id."""
    variant.settings |= variant.budget.settings(variant.values)
    facts = [variant.settings, variant.teacher and variant.teacher.id, code]
    if variant.budget.knob:
        variant.knob_value()  # raises UserError if there is none
        facts += dataclasses.astuple(variant.budget)
    text = json.dumps(facts, sort_keys=True)
    variant.id = hashlib.sha256(text.encode()).hexdigest()[:12]


def merge_teachers(variants: list[Variant]) -> list[Variant]:
    """Drop each teacher that is also a variant of its own: the same runs, under the plan's name."""
    taught_by = {variant.id for variant in variants if variant.teaches}
    named = [variant for variant in variants if not variant.teaches]
    for variant in named:
        variant.teaches = variant.id in taught_by
    ids = {variant.id for variant in named}
    return [variant for variant in variants if variant in named or variant.id not in ids]


def visible_devices(gpus: int) -> list[str]:
    """Return the GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:gpus] if named else [str(index) for index in range(gpus)]


def memory_bound(values: dict) -> int:
    """Return the bytes that a run may need, from its settings.

    A rough upper bound for float32 without torch.compile. It decides how many runs may start before
    the first one has shown what it needs.
    """
    size = {"model_dim": 512, "num_layers": 12, "mlp_mult": 3, "vocab_size": 1024, "ensemble": 1}
    size |= {"train_batch_tokens": 8192, "micro_batch_tokens": 2**40, "eval_batch_tokens": 8192}
    size |= {key: values[key] for key in size if key in values}
    tokens = min(size["train_batch_tokens"], size["micro_batch_tokens"])
    per_layer = 4 * size["model_dim"] * (10 + 3 * size["mlp_mult"])
    activations = tokens * size["num_layers"] * per_layer * size["ensemble"]
    logits = 12 * size["vocab_size"] * max(tokens, size["eval_batch_tokens"])
    return int(GIB + activations + logits)


class Memory:
    """Free and used memory where the runs compute: on a GPU, or in the host without one."""

    def __init__(self, devices: list[str]):
        self.handles = {}
        if devices:
            pynvml.nvmlInit()
        for device in devices:
            if device.isdigit():
                self.handles[device] = pynvml.nvmlDeviceGetHandleByIndex(int(device))
            else:
                self.handles[device] = pynvml.nvmlDeviceGetHandleByUUID(device)

    def free(self, device: str) -> int:
        if not self.handles:
            return psutil.virtual_memory().available
        return pynvml.nvmlDeviceGetMemoryInfo(self.handles[device]).free

    def used(self, device: str, pid: int) -> int | None:
        """Return what a process and its children use, or None if the driver does not say."""
        try:
            leader = psutil.Process(pid)
            processes = [leader, *leader.children(recursive=True)]
            if not self.handles:
                return sum(process.memory_info().rss for process in processes)
        except psutil.NoSuchProcess:
            return None
        pids = {process.pid for process in processes}
        try:
            entries = pynvml.nvmlDeviceGetComputeRunningProcesses(self.handles[device])
        except pynvml.NVMLError:
            return None
        own = [entry.usedGpuMemory or 0 for entry in entries if entry.pid in pids]
        return sum(own) or None  # a container may hide the processes


def open_memory(devices: list[str]) -> Memory | None:
    """Return the memory to check, or None, with a message, if the driver does not allow it."""
    try:
        memory = Memory(devices)
        for device in devices:
            memory.free(device)
        return memory
    except pynvml.NVMLError as error:
        print(f"memory is not checked before a run starts: {error}", file=sys.stderr)
        return None


# ---- Runs ----------------------------------------------------------------------------------------


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


async def stop(child: asyncio.subprocess.Process) -> None:
    """End a run. It has time to save a checkpoint; cancelling this coroutine ends it at once."""
    try:
        if child.returncode is None:
            child.terminate()  # torchrun passes the signal on
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(child.wait(), GRACE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a run has a session of its own
    await child.wait()


def fits(size: float, target: float) -> bool:
    return (1 - TOLERANCE) * target <= size <= target


async def search(measure: Callable[[int], Awaitable[float]], target: float, k: int) -> int:
    """Return a whole number whose measure fits the target, else the largest below the target.

    The measure grows about as a power of the number and may fail above some number; k is the first
    guess. Raise RunFailed if the target cannot be reached.
    """
    sizes: dict[int, float] = {}
    refusal = ""
    while True:
        try:
            sizes[k] = await measure(k)
        except RunFailed as error:
            if k <= min(sizes, default=k):
                raise
            sizes[k] = math.inf
            refusal = str(error)
        if fits(sizes[k], target):
            return k
        under = max((i for i, size in sizes.items() if size <= target), default=0)
        over = min((i for i, size in sizes.items() if size > target), default=math.inf)
        if over == 1:
            raise RunFailed(f"{sizes[1]:,.0f} bytes with the knob at its least, over {target:,.0f}")
        if over == under + 1:
            if sizes[over] == math.inf:
                raise RunFailed(
                    f"no more than {sizes[under]:,.0f} bytes are possible; with more, {refusal}"
                )
            return under
        k = next_guess(sizes, target, under, over)


def next_guess(sizes: dict[int, float], target: float, under: int, over: float) -> int:
    """Return a number between `under` and `over`, by a power law through the nearest two sizes."""
    finite = sorted(i for i, size in sizes.items() if size < math.inf)
    index = min(max(bisect.bisect(finite, under), 1), len(finite) - 1)
    b = finite[index]
    power = 1.0
    if index:
        a = finite[index - 1]
        power = math.log(sizes[b] / sizes[a]) / math.log(b / a)
    if power < 0.001:
        raise RunFailed(f"the knob hardly changes the {sizes[b]:,.0f} bytes")
    wanted = math.log(b) + math.log((1 - TOLERANCE / 2) * target / sizes[b]) / power
    guess = math.exp(min(wanted, math.log(4 * max(sizes))))
    if under and over < math.inf and (sizes[over] == math.inf or len(sizes) % 3 == 0):
        # Bisect: there is no size above to use, or the power law may converge slowly.
        guess = math.sqrt(under * over)
    return int(max(under + 1, min(guess, over - 1)))


class Progress(NamedTuple):
    """The last step in a run's log."""

    step: int
    steps: int
    train_seconds: float
    step_seconds: float


STEP = re.compile(
    r"^step:(\d+)/(\d+) .*train_time:([\d.]+)ms step_avg:([\d.]+)ms", flags=re.MULTILINE
)


def read_progress(log: Path) -> Progress | None:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            tail = file.read().decode("utf-8", errors="replace")
    except OSError:  # the run has not opened it yet
        return None
    found = STEP.findall(tail)
    if not found:
        return None
    step, steps, train_ms, step_ms = found[-1]
    return Progress(int(step), int(steps), float(train_ms) / 1000, float(step_ms) / 1000)


@dataclasses.dataclass(eq=False)
class Job:
    """One variant with one seed, and the process that works on it."""

    variant: Variant
    seed: int
    device: str = ""
    folder: Path | None = None
    child: asyncio.subprocess.Process | None = None
    progress: Progress | None = None
    peak: int = 0  # of the memory used so far

    @property
    def key(self) -> tuple[str, int]:
        return self.variant.id, self.seed

    @property
    def teacher_key(self) -> tuple[str, int] | None:
        return (self.variant.teacher.id, self.seed) if self.variant.teacher else None

    @property
    def title(self) -> str:
        return f"{self.variant.label}  seed {self.seed}"

    def update(self, memory: Memory | None) -> None:
        """Read the log and the memory in use."""
        if self.folder is None or self.child is None or self.child.returncode is not None:
            return
        # Once the log's last lines are about the evaluation, the last step stays known.
        self.progress = read_progress(self.folder / "train.log") or self.progress
        if memory:
            self.peak = max(self.peak, memory.used(self.device, self.child.pid) or 0)

    def cells(self) -> list[str]:
        """Return label, step, tokens per second and time left, as text."""
        progress = self.progress
        if progress is None:
            return [self.title, "starting", "", ""]
        if progress.step >= progress.steps:
            return [self.title, "scoring", "", ""]
        speed = self.variant.values["train_batch_tokens"] / max(progress.step_seconds, 1e-9)
        budget = self.variant.budget
        if budget.kind == "seconds":
            step = f"{progress.step}"
            left = budget.amount - progress.train_seconds
        else:
            step = f"{progress.step}/{progress.steps}"
            left = (progress.steps - progress.step) * progress.step_seconds
        time_left = datetime.timedelta(seconds=max(0, round(left)))
        return [self.title, step, f"{speed:,.0f}", str(time_left)]


class Display:
    """Show the runs under way: a live table on a terminal, else a line every LINE_SECONDS."""

    def __init__(self) -> None:
        self.live = Live(auto_refresh=False, transient=True) if sys.stdout.isatty() else None
        self.shown = time.monotonic()

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def show(self, running: list[Job], waiting: int, note: str) -> None:
        caption = f"{len(running)} running, {waiting} waiting"
        if note:
            caption += f"; {note}"
        if self.live:
            self.live.update(self.table(running, caption), refresh=True)
        elif time.monotonic() - self.shown >= LINE_SECONDS:
            self.shown = time.monotonic()
            print(f"{caption}: {'; '.join(map(self.line, running))}", flush=True)

    @staticmethod
    def line(job: Job) -> str:
        title, step, speed, left = job.cells()
        return f"{title} {step}, {speed} tokens/s, {left} left" if left else f"{title} {step}"

    @staticmethod
    def table(running: list[Job], caption: str) -> Table:
        table = Table("run", caption=Text(caption), caption_justify="left")
        for column in ("step", "tokens/s", "time left"):
            table.add_column(column, justify="right")
        for job in running:
            table.add_row(*map(Text, job.cells()))  # a label may contain brackets
        return table


class Runner:
    """Make the runs, several at a time, and keep results.csv."""

    def __init__(self, out: Path, script: Path, gpus: int, version: str, slots: int):
        code = script.read_bytes()
        self.out = out
        self.version = version
        self.slots = slots
        self.sha = hashlib.sha256(code).hexdigest()
        # A copy runs, so that editing the script does not change the later runs.
        self.script = out / "script" / self.sha[:12] / script.name
        self.script.parent.mkdir(parents=True, exist_ok=True)
        replace(self.script, lambda part: part.write_bytes(code))
        self.rows = read_results(out).drop(columns="name").to_dict("records")
        self.devices = visible_devices(gpus)
        self.processes = gpus if slots == 1 else min(1, gpus)  # per run, on GPUs
        self.memory = open_memory(self.devices) if slots > 1 else None
        self.peaks: dict[str, int] = {}  # memory, by the variant's id
        self.peak_ratio = 0.0  # the largest peak, as a multiple of the bound
        self.locks: dict[Path, asyncio.Lock] = collections.defaultdict(asyncio.Lock)
        self.waiting: list[Job] = []
        self.running: dict[asyncio.Task, Job] = {}
        self.finished = 0
        self.failed = 0
        self.note = ""  # why a job with a free slot does not start

    # -- One run

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.out / "runs" / f"{variant.name()}-s{seed}"

    def command(self) -> list[str]:
        launcher = []
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            launcher.append(f"--nproc_per_node={self.processes}")
        return [sys.executable, *launcher, str(self.script)]

    def shares(self, device: str) -> dict[str, str]:
        """Return the variables that give a run its share of the machine."""
        shares = {}
        if self.slots > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // self.slots)
            limit = os.environ.get("OMP_NUM_THREADS", "")
            shares["OMP_NUM_THREADS"] = str(min(threads, int(limit)) if limit else threads)
        if self.slots > 1 and len(self.devices) > 1:
            shares["CUDA_VISIBLE_DEVICES"] = device
        return shares

    async def process(self, job: Job, folder: Path, settings: dict) -> dict:
        """Return the results.json of the run in this folder; make the run unless it is complete."""
        async with self.locks[folder]:  # two seeds may need the same pilot
            report = folder / REPORT
            artifact = folder / ARTIFACT
            lost = job.variant.teaches and not artifact.is_file()  # its students need it
            if lost or not report.is_file():
                can_resume = (folder / "checkpoint.pt").is_file() and not report.is_file()
                if not can_resume:
                    shutil.rmtree(folder, ignore_errors=True)
                await self.launch(job, folder, settings)
            return json.loads(report.read_text(encoding="utf-8"))

    async def launch(self, job: Job, folder: Path, settings: dict) -> None:
        """Run the script until it ends. Raise RunFailed if it gives no result."""
        settings = self.shares(job.device) | settings
        settings |= {"SEED": job.seed, "OUTPUT_DIR": folder.parent, "RUN_ID": folder.name}
        if job.variant.teacher:
            settings["DISTILL_FROM"] = self.folder(job.variant.teacher, job.seed) / ARTIFACT
        log = self.out / "logs" / f"{folder.name}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            child = await asyncio.create_subprocess_exec(
                *self.command(),
                env=environment(settings, on_cpu=not self.devices),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        job.folder, job.child, job.progress = folder, child, None
        try:
            await child.wait()
        finally:
            await stop(child)
        if child.returncode or not (folder / REPORT).is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1].strip() if lines else "no output"
            raise RunFailed(f"exit status {child.returncode}: {last}")

    async def pilot(self, job: Job, value: int) -> int:
        """Return the bytes of the model file with the knob at a value; seeds share a pilot."""
        variant = job.variant
        folder = self.out / "pilots" / f"{variant.name()}-{variant.budget.knob}{value}"
        settings = (
            variant.with_knob(value) | PILOT | {"EVAL_STRIDE": variant.values["eval_seq_len"]}
        )
        figures = await self.process(job, folder, settings)
        for name in ("checkpoint.pt", ARTIFACT):
            (folder / name).unlink(missing_ok=True)
        return model_bytes(figures)

    async def solve(self, job: Job) -> tuple[dict, Path, str]:
        """Return figures, folder and note of the run whose model file fits the bytes best."""
        variant = job.variant
        target, knob = variant.budget.amount, variant.budget.knob
        natural = 8 * variant.values["num_heads"] if knob == "MODEL_DIM" else 1
        step = variant.budget.step or natural
        ratio = 1.0  # of a run's bytes to its pilot's
        made: dict[int, tuple[dict, Path]] = {}
        sizes: dict[int, int] = {}

        async def size(k: int) -> float:
            return sizes[k] if k in sizes else ratio * await self.pilot(job, k * step)

        k = max(1, variant.knob_value() // step)
        while len(made) < 3:
            k = await search(size, target, k)
            if k in made:
                break
            run = self.folder(variant, job.seed)
            folder = run.with_name(f"{run.name}-{knob}{k * step}")
            figures = await self.process(job, folder, variant.with_knob(k * step))
            made[k] = figures, folder
            sizes[k] = model_bytes(figures)
            if fits(sizes[k], target):
                break
            ratio = sizes[k] / await self.pilot(job, k * step)
        best = max((k for k in made if sizes[k] <= target), default=None)
        for k in made.keys() - {best}:
            shutil.rmtree(made[k][1])
        if best is None:
            tried = ", ".join(f"{size:,} at {knob}={k * step}" for k, size in sizes.items())
            raise RunFailed(
                f"no model file of at most {target:,.0f} bytes in {len(made)} runs: {tried}"
            )
        note = f"{knob}={best * step}"
        if not fits(sizes[best], target):
            share = sizes[best] / target
            note += f", {share:.1%} of the bytes: no larger one fits in steps of {step}"
        return *made[best], note

    async def run(self, job: Job) -> dict:
        """Return the row of a run. If the run fails, the row's `error` says why."""
        row = self.empty_row(job.variant, job.seed)
        try:
            row |= await self.result(job)
        except RunFailed as error:
            row["error"] = str(error)
        return row

    def empty_row(self, variant: Variant, seed: int) -> dict:
        words = [f"{key}={value}" for key, value in variant.settings.items()]
        return {
            "label": variant.label,
            "family": variant.family,
            "preset": variant.preset,
            "seed": seed,
            "settings": " ".join(words),
            "budget": str(variant.budget),
            "tokens": math.nan,
            **dict.fromkeys(FIGURES, math.nan),
            "model_bytes": math.nan,
            "script": self.sha,
            "torch": self.version,
            "variant": variant.id,
            "run": "",
            "note": "",
            "error": "",
        }

    async def result(self, job: Job) -> dict:
        """Return the columns that a run fills in."""
        variant = job.variant
        if variant.teacher and not (self.folder(variant.teacher, job.seed) / ARTIFACT).is_file():
            raise RunFailed(f"its teacher {variant.teacher.label} has no artifact")
        note = ""
        if variant.budget.knob:
            figures, folder, note = await self.solve(job)
        else:
            folder = self.folder(variant, job.seed)
            figures = await self.process(job, folder, variant.settings)
        columns = {column: figures.get(key, math.nan) for column, key in FIGURES.items()}
        columns["tokens"] = figures["steps"] * variant.values["train_batch_tokens"]
        columns["model_bytes"] = model_bytes(figures)
        return columns | {"run": folder.name, "note": note}

    # -- All runs

    def find(self, job: Job, retry_failed: bool) -> dict | None:
        """Return the row of an earlier run, unless the run must be repeated."""
        artifact = self.folder(job.variant, job.seed) / ARTIFACT
        lost = job.variant.teaches and not artifact.is_file()
        for row in self.rows:
            if (row["variant"], row["seed"]) == job.key:
                repeat = retry_failed if row["error"] else lost
                return None if repeat else dict(row)
        return None

    def record(self, row: dict) -> None:
        """Put a row into results.csv, in place of an earlier one of the same run and label."""
        keys = ("variant", "seed", "label", "family")
        others = [old for old in self.rows if any(old[key] != row[key] for key in keys)]
        self.rows = [*others, row]
        frame = pd.DataFrame(self.rows)
        replace(self.out / "results.csv", lambda part: frame.to_csv(part, index=False))

    def finish(self, job: Job, row: dict, suffix: str = "") -> None:
        """Record and print the result of a job."""
        row |= {"label": job.variant.label, "family": job.variant.family}
        self.record(row)
        self.finished += 1
        result = f"{row['seconds']:.0f} s  {row['model_bytes']:,.0f} bytes"
        result += f"  {row['val_bpb_sliding']:.4f} bpb"
        if row["error"]:
            self.failed += 1
            result = f"failed: {row['error']}"
        total = self.finished + len(self.waiting) + len(self.running)
        print(f"{self.finished} of {total}  {job.title}  {result}{suffix}", flush=True)

    def memory_needed(self, variant: Variant) -> int:
        """Return the memory that a run needs: as measured, or the bound scaled to other runs."""
        if variant.id in self.peaks:
            return self.peaks[variant.id]
        return int(memory_bound(variant.values) * (self.peak_ratio or 1.0))

    def has_memory(self, job: Job) -> bool:
        """Check whether the run fits beside those that still grow; if not, say so in `note`."""
        neighbors = [other for other in self.running.values() if other.device == job.device]
        if not self.memory or not neighbors:  # waiting would not free any of our memory
            return True
        to_come = 0
        for other in neighbors:
            if other.progress is None:  # after its first step, a run has what it needs
                to_come += max(0, self.memory_needed(other.variant) - other.peak)
        needed = self.memory_needed(job.variant)
        left = self.memory.free(job.device) - to_come
        if needed > left:
            self.note = f"{job.title} waits for memory: about {needed / GIB:.1f} GiB needed"
            self.note += f", {max(0, left) / GIB:.1f} GiB free beside the runs under way"
        return needed <= left

    def learn_peak(self, job: Job) -> None:
        """Remember the memory that a run took, once it has made a step."""
        if job.peak and job.progress:
            self.peaks[job.variant.id] = max(job.peak, self.peaks.get(job.variant.id, 0))
            self.peak_ratio = max(self.peak_ratio, job.peak / memory_bound(job.variant.values))

    def is_blocked(self, job: Job) -> bool:
        """Check whether the same run, or the run of its teacher, is still to end."""
        under_way = {other.key for other in self.running.values()}
        to_come = under_way | {other.key for other in self.waiting}
        return job.key in under_way or job.teacher_key in to_come

    def free_device(self) -> str:
        """Return the GPU with the fewest runs; without a GPU, the empty string."""
        counts = collections.Counter(job.device for job in self.running.values())
        return min(self.devices, key=lambda device: counts[device], default="")

    def start_ready(self, retry_failed: bool) -> None:
        """Start the jobs that can start, in the order of the plan."""
        self.note = ""
        for job in list(self.waiting):
            if self.is_blocked(job):
                continue
            row = self.find(job, retry_failed)
            if row is None and (self.note or len(self.running) == self.slots):
                continue
            job.device = self.free_device()
            if row is None and not self.has_memory(job):
                continue
            self.waiting.remove(job)
            if row is None:
                self.running[asyncio.create_task(self.run(job))] = job
            else:
                self.finish(job, row, "  (already there)")

    async def run_all(self, variants: list[Variant], seeds: list[int], retry_failed: bool) -> int:
        """Make the missing rows; return how many of those asked for hold an error."""
        stop_on_signals()
        self.waiting = [Job(variant, seed) for seed in seeds for variant in variants]
        with Display() as display:
            try:
                while self.waiting or self.running:
                    self.start_ready(retry_failed)
                    display.show(list(self.running.values()), len(self.waiting), self.note)
                    await self.collect()
            finally:
                for task in self.running:
                    task.cancel()
                await asyncio.gather(*self.running, return_exceptions=True)
        return self.failed

    async def collect(self) -> None:
        """Wait a second, or until a run ends, and record what has ended."""
        if not self.running:
            return
        first = asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait(self.running, timeout=1, return_when=first)
        for job in self.running.values():
            job.update(self.memory)
            self.learn_peak(job)
        for task in done:
            job = self.running.pop(task)
            self.finish(job, task.result())


def model_bytes(figures: dict) -> int:
    return figures["bytes_total"] - figures["bytes_code"]


def stop_on_signals() -> None:
    """Make a signal cancel the current task: its runs then save their checkpoints and end."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            loop.add_signal_handler(number, cancel_with_message, task)


def cancel_with_message(task: asyncio.Task) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print("stopping: the runs save their checkpoints; a second signal ends them", flush=True)
    task.cancel()


# ---- Report --------------------------------------------------------------------------------------


def read_results(out: Path) -> pd.DataFrame:
    """Return the rows so far. `name` is the label, with the variant's id where labels repeat."""
    path = out / "results.csv"
    frame = pd.DataFrame(columns=TEXT)
    if path.is_file():
        numbers = [*FIGURES, "tokens", "model_bytes"]
        frame = pd.read_csv(
            path,
            dtype=dict.fromkeys(TEXT, str),
            keep_default_na=False,
            na_values={column: [""] for column in numbers},
        )
    several = frame.groupby("label")["variant"].transform("nunique") > 1
    unique_names = frame["label"] + " #" + frame["variant"]
    return frame.assign(name=frame["label"].where(~several, unique_names))


def with_deviation(mean: float, deviation: float, sign: str = "") -> str:
    text = f"{mean:{sign}.4f}"
    return text if math.isnan(deviation) else f"{text} ± {deviation:.4f}"


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per variant, the best first: means over its seeds, and val_bpb's deviation."""
    good = frame[frame["error"] == ""].copy()
    good = good.drop_duplicates(["variant", "seed", "family"])  # one run may have two labels
    good["lost"] = good["val_bpb_roundtrip"] - good["val_bpb_before"]
    means = ("trained", "frozen", "model_bytes", "tokens_per_second", "lost")
    columns = {name: (name, "mean") for name in means}
    columns["seeds"] = ("seed", "size")
    columns["bpb"] = ("val_bpb_sliding", "mean")
    columns["std"] = ("val_bpb_sliding", "std")
    groups = good.groupby(["name", "family", "budget"])
    return groups.agg(**columns).reset_index().sort_values("bpb", ignore_index=True)


def pooled_deviation(table: pd.DataFrame) -> float:
    """Return the standard deviation between seeds, over all variants; NaN if all have one seed."""
    repeated = table[table["seeds"] > 1]
    if repeated.empty:
        return math.nan
    return math.sqrt(np.average(repeated["std"] ** 2, weights=repeated["seeds"] - 1))


@dataclasses.dataclass
class Yardstick:
    """A least-squares fit of val_bpb on the logarithm of the model file's bytes."""

    family: str
    networks: int
    runs: int
    smallest: float  # network, in bytes
    largest: float
    center: float  # the fit is in x = ln(bytes / center)
    coefficients: np.ndarray
    covariance: np.ndarray  # of the coefficients; NaN: too few networks to estimate it
    residual: float  # standard deviation of the networks around the line

    @classmethod
    def fit(cls, table: pd.DataFrame, family: str, degree: int) -> Yardstick:
        """Fit the networks of a family, each with the mean over its seeds."""
        points = table[table["family"] == family]
        sizes = points["model_bytes"].nunique()
        needed = 5 if degree == 2 else 2
        if sizes < needed:
            raise UserError(
                f"no yardstick: it needs {needed} networks of different size in family {family!r}"
                f", and there are {sizes}"
            )
        smallest, largest = points["model_bytes"].min(), points["model_bytes"].max()
        center = float(f"{math.sqrt(smallest * largest):.2g}")
        x, y = np.log(points["model_bytes"] / center), points["bpb"]
        freedom = len(points) - degree - 1
        if freedom > 0:
            coefficients, covariance = np.polyfit(x, y, degree, cov=True)
            squares = (y - np.polyval(coefficients, x)) ** 2
            residual = math.sqrt(squares.sum() / freedom)
        else:
            coefficients = np.polyfit(x, y, degree)
            covariance = np.full((degree + 1, degree + 1), math.nan)
            residual = math.nan
        return cls(
            family=family,
            networks=len(points),
            runs=int(points["seeds"].sum()),
            smallest=smallest,
            largest=largest,
            center=center,
            coefficients=coefficients,
            covariance=covariance,
            residual=residual,
        )

    def at(self, sizes: np.ndarray) -> np.ndarray:
        """Return the val_bpb of the line at these sizes."""
        return np.polyval(self.coefficients, np.log(sizes / self.center))

    def error(self, sizes: np.ndarray) -> np.ndarray:
        """Return the standard error of the line itself at these sizes."""
        design = np.vander(np.log(sizes / self.center), len(self.coefficients))
        return np.sqrt(np.sum(design @ self.covariance * design, axis=1))

    def __str__(self) -> str:
        *terms, constant = self.coefficients
        text = f"val_bpb = {constant:.4f}"
        for term, power in zip(reversed(terms), ("x", "x²"), strict=False):
            text += f" {'+' if term > 0 else '−'} {abs(term):.4f} {power}"
        text += f" with x = ln(bytes / {self.center:,.0f})"
        text += f"; least squares through {self.networks} networks ({self.runs} runs)"
        text += f" of family {self.family!r}, {self.smallest:,.0f} to {self.largest:,.0f} bytes"
        freedom = self.networks - len(self.coefficients)
        if freedom > 0:
            text += f"; residual deviation {self.residual:.4f}, degrees of freedom: {freedom}"
        return text


def add_distances(table: pd.DataFrame, line: Yardstick) -> pd.DataFrame:
    """Add each variant's distance from the line, its standard error, and what to think of it.

    The error combines that of the line at the variant's bytes with that of the variant's mean. A
    variant's deviation between seeds is at least the pooled one, because two seeds may agree by
    chance. If no variant has two seeds, the residual deviation of the line stands in for it.
    """
    sizes = table["model_bytes"].to_numpy(float)
    distance = table["bpb"] - line.at(sizes)
    pooled = pooled_deviation(table)
    between_seeds = np.fmax(table["std"], line.residual if math.isnan(pooled) else pooled)
    error = np.sqrt(line.error(sizes) ** 2 + between_seeds**2 / table["seeds"])
    return table.assign(
        distance=distance,
        distance_error=error,
        is_yardstick=table["family"] == line.family,
        is_noise=distance.abs() < 2 * error,
        is_extrapolated=(sizes < line.smallest) | (sizes > line.largest),
    )


def measure_distances(
    table: pd.DataFrame, family: str, degree: int
) -> tuple[pd.DataFrame, dict[str, Yardstick], list[str]]:
    """Fit a line for each budget. Return the table with distances, the lines, and what to note."""
    parts = []
    lines = {}
    notes = []
    for budget, part in table.groupby("budget", sort=False):
        try:
            lines[budget] = Yardstick.fit(part, family, degree)
            part = add_distances(part, lines[budget])
            notes.append(f"{budget}: {lines[budget]}")
        except UserError as error:
            part = part.assign(distance=math.nan, distance_error=math.nan)
            part = part.assign(is_yardstick=False, is_noise=False, is_extrapolated=False)
            notes.append(f"{budget}: {error}")
        parts.append(part)
    if parts:
        table = pd.concat(parts).sort_values("bpb", ignore_index=True)
    return table, lines, notes


def compare(frame: pd.DataFrame, a: str, b: str) -> str:
    """Describe the paired difference in val_bpb over the seeds that both names have."""
    good = frame[frame["error"] == ""].drop_duplicates(["name", "seed"])
    scores = good.pivot(index="seed", columns="name", values="val_bpb_sliding")
    pairs = scores.reindex(columns=[a, b]).dropna().to_numpy(float).T
    if not pairs.size:
        raise UserError(f"--compare: {a!r} and {b!r} share no seed; there are: {', '.join(scores)}")
    difference = pd.Series(pairs[0] - pairs[1])
    text = with_deviation(difference.mean(), difference.std())
    text = f"{a} − {b}: {text} bpb, n = {len(difference)}"
    if len(difference) > 1:
        text += f", paired t-test p = {stats.ttest_rel(*pairs).pvalue:.2g}"
    return text


def format_distance(row: NamedTuple) -> str:
    """Describe a variant's distance from the line."""
    if math.isnan(row.distance):
        return ""
    if row.is_yardstick:
        return f"{row.distance:+.4f} (on the line)"
    text = with_deviation(row.distance, row.distance_error, "+")
    marks = []
    if row.is_noise:
        marks.append("within noise")
    if row.is_extrapolated:
        marks.append("extrapolated")
    return f"{text} ({', '.join(marks)})" if marks else text


def format_table(table: pd.DataFrame) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [
        "| variant | family | budget | seeds | val_bpb | distance from the line "
        "| lost to quantization | trained | frozen | model bytes | tokens/s |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in table.itertuples():
        cells = [row.name, row.family, row.budget, str(row.seeds)]
        cells += [with_deviation(row.bpb, row.std), format_distance(row), f"{row.lost:.4f}"]
        counts = (row.trained, row.frozen, row.model_bytes, row.tokens_per_second)
        cells += [f"{count:,.0f}" for count in counts]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def draw(table: pd.DataFrame, lines: dict[str, Yardstick], path: Path) -> None:
    """Draw val_bpb against the bytes of the model file, with each line and its band."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    plt.switch_backend("Agg")  # needs no display
    figure, axes = plt.subplots(figsize=(12, 8), layout="constrained")
    axes.set(
        xscale="log",
        xlabel="model file (bytes)",
        ylabel="validation bits per byte, artifact, sliding window",
        xlim=(table["model_bytes"].min() / 1.2, table["model_bytes"].max() * 1.4),
    )
    draw_lines(axes, table, lines)
    draw_points(axes, table)
    axes.grid(which="both", alpha=0.3)
    axes.margins(y=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper right")
    # Labels keep their distances only if axes and layout no longer change.
    figure.canvas.draw()
    figure.set_layout_engine("none")
    axes.autoscale(False)
    place_labels(axes, table)
    replace(path, lambda part: figure.savefig(part, format="png", dpi=150))
    plt.close(figure)


def place_labels(axes, table: pd.DataFrame) -> None:
    """Label the points. Try again, in the end in a smaller font, while two labels overlap."""
    from adjustText import adjust_text
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=2, foreground="white")]  # legible on top of a line
    only_up_or_down = {"text": "y", "static": "xy", "explode": "xy", "pull": "xy"}
    spread = ({"expand": (1.15, 1.6)}, {"expand": (1.05, 2), "only_move": only_up_or_down})
    labels = []
    for fontsize, options in itertools.product((8, 7, 6, 5), spread):
        for label in labels:
            label.remove()
        texts = []
        for row in table.itertuples():
            text = axes.text(row.model_bytes, row.bpb, row.name, fontsize=fontsize)
            text.set_path_effects(outline)
            texts.append(text)
        _, arrows = adjust_text(
            texts,
            ax=axes,
            objects=[axes.get_legend()] if axes.get_legend() else None,
            force_static=(0.3, 0.5),
            iter_lim=1000,
            arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.5},
            **options,
        )
        labels = [*texts, *arrows]
        boxes = [text.get_window_extent() for text in texts]
        if not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)):
            return


def draw_lines(axes, table: pd.DataFrame, lines: dict[str, Yardstick]) -> None:
    """Draw each yardstick, dotted where it is extrapolated, with a band of two standard errors."""
    for budget, line in lines.items():
        sizes = table.loc[table["budget"] == budget, "model_bytes"]
        reach = np.geomspace(sizes.min(), sizes.max(), 200)
        inside = np.geomspace(line.smallest, line.largest, 100)
        label = f"family {line.family}, {budget}: {line.networks} networks"
        axes.plot(inside, line.at(inside), color="black", linewidth=1.2, label=label)
        axes.plot(reach, line.at(reach), color="black", linewidth=1, linestyle=":")
        middle, band = line.at(reach), 2 * line.error(reach)
        if np.isfinite(band).all():
            label = "± 2 standard errors of the line"
            style = {"color": "gray", "alpha": 0.2, "linewidth": 0, "label": label}
            axes.fill_between(reach, middle - band, middle + band, **style)


def draw_points(axes, table: pd.DataFrame) -> None:
    """Draw the variants with the deviation over their seeds; hollow points are within noise."""
    import matplotlib.pyplot as plt

    families = {family: index for index, family in enumerate(sorted(table["family"].unique()))}
    colors, markers = plt.colormaps["tab20"].colors, "osD^v"  # 100 families look different
    for row in table.itertuples():
        index = families[row.family]
        color = "black" if row.is_yardstick else colors[index % len(colors)]
        axes.errorbar(
            row.model_bytes,
            row.bpb,
            0 if math.isnan(row.std) else row.std,
            capsize=3,
            color=color,
            marker=markers[index % len(markers)],
            markerfacecolor="white" if row.is_noise and not row.is_yardstick else color,
        )
    if (table["is_noise"] & ~table["is_yardstick"]).any():
        axes.plot([], [], "o", color="gray", markerfacecolor="white", label="hollow: within noise")


def report(args: argparse.Namespace, out: Path) -> None:
    """Write table.md and bpb_vs_bytes.png from results.csv, and print the table."""
    frame = read_results(out)
    degree = {"line": 1, "parabola": 2}[args.fit]
    table, lines, notes = measure_distances(summarize(frame), args.line, degree)
    if lines:
        notes.append("± after a distance is its standard error; within noise: under two of them")
    notes += [compare(frame, a, b) for a, b in args.compare]
    for row in frame.itertuples():
        if row.error or row.note:
            notes.append(f"{row.name}, seed {row.seed}: {row.error or row.note}")
    text = "\n".join([*format_table(table), "", *(f"- {note}" for note in notes)]).rstrip()
    replace(out / "table.md", lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)
    if table.empty:
        return
    try:
        draw(table, lines, out / "bpb_vs_bytes.png")
    except ImportError as error:
        print(f"no picture: {error.name} is missing: pip install -r tools/requirements.txt, then")
        print(f"  python tools/ablate.py --out {shlex.quote(str(args.out))} --report-only")
        return
    print(f"results.csv, table.md and bpb_vs_bytes.png are in {out}")


# ---- Main ----------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder of the results")
    add("--presets", help="names in presets/, or .env files, separated by commas")
    add(
        "--set",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="another variant of each preset",
    )
    add("--plan", help="file with one line per variant: label family preset KEY=VALUE ...")
    add("--seeds", default="1337", help="whole numbers, separated by commas")
    add("--budget", help="tokens=N or seconds=S of training, or bytes=N of the model file")
    add("--tokens", type=int, help="training tokens, for a budget of bytes")
    add(
        "--knob",
        metavar="KNOB[:STEP]",
        help="setting that fits the bytes; rank: R of MAP_ADAPTER=lora:R",
    )
    add("--jobs", type=int, default=1, help="runs at the same time, one process each; default: 1")
    add("--data", help="folder of token shards; default: what data/prepare.py docs makes")
    add(
        "--script",
        type=Path,
        default=ROOT / "train_gpt.py",
        help="default: the repository's train_gpt.py",
    )
    add("--retry-failed", action="store_true", help="repeat the runs whose row is an error")
    add("--report-only", action="store_true", help="run nothing, make table and picture again")
    add("--line", default="learned", help="family of the yardstick; default: learned")
    add(
        "--fit",
        choices=("line", "parabola"),
        default="line",
        help="form of the yardstick in the logarithm of the bytes; parabola: from 5 networks",
    )
    add(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        metavar=("A", "B"),
        help="paired difference",
    )
    add("settings", nargs="*", metavar="KEY=VALUE", help="for every run")
    return parser.parse_intermixed_args()


def ablate(args: argparse.Namespace) -> int:
    """Do what the command line says; return how many of its runs failed."""
    out = args.out.absolute()
    if args.report_only:
        if not (out / "results.csv").is_file():
            raise UserError(f"no results.csv in {out}")
        report(args, out)
        return 0
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise UserError(f"--seeds {args.seeds}: needs whole numbers, separated by commas")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: needs a whole number over 0")
    variants = read_variants(args, parse_budget(args))
    gpus, version = check(variants, args.script, args.jobs)
    variants = merge_teachers(variants)
    check_comparisons(args, variants, out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:  # freed however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another ablate.py is at work in {out}") from None
        runner = Runner(out, args.script, gpus, version, args.jobs)
        seeds = list(dict.fromkeys(map(int, args.seeds.split(","))))
        try:
            failed = asyncio.run(runner.run_all(variants, seeds, args.retry_failed))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        report(args, out)
    return failed


def check_comparisons(args: argparse.Namespace, variants: list[Variant], out: Path) -> None:
    """Raise UserError if --compare names a label that there is not."""
    known = {*(variant.label for variant in variants), *read_results(out)["name"]}
    unknown = {label for pair in args.compare for label in pair} - known
    if unknown:
        raise UserError(
            f"--compare: no label {', '.join(unknown)}; there are: {', '.join(sorted(known))}"
        )


def main() -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    try:
        failed = ablate(parse_arguments())
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        command = shlex.join(["python", *sys.argv])
        print(f"\nstopped; the same command continues: {command}", file=sys.stderr)
        raise SystemExit(130) from None
    if failed:
        raise SystemExit(
            f"{failed} of the runs failed; logs/ has their output, --retry-failed repeats them"
        )


if __name__ == "__main__":
    main()
