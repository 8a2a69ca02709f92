"""Run variants of train_gpt.py under one budget and compare their scores at equal bytes.

    python tools/ablate.py --out DIR --plan FILE --seeds 1,2,3 --budget tokens=1000000 --jobs 4
    python tools/ablate.py --out DIR --presets cpu/baseline,cpu/random_adapters \\
        --seeds 1,2 --budget seconds=120 NUM_LAYERS=4
    python tools/ablate.py --out DIR --report-only --compare "LABEL" "OTHER LABEL"

A plan has one line per variant: label family preset KEY=VALUE ...
The settings of a variant override those of the command line, which override the preset's. With
TARGET_BYTES=N among them, all variants get the same bytes.

The yardstick is a line through the networks of one family (--line, by default "learned"): val_bpb
against the logarithm of the model file's bytes. The report gives each variant's distance from it.

If a preset has TEACHER_PRESET=NAME, that preset is trained first, with the same seed and budget,
and its artifact is passed as DISTILL_FROM.

With --jobs N, N runs share the GPUs, or the cores of the CPU; their tokens/s depend on each other.
Files in --out: results.csv (one row per run, written as soon as the run ends), table.md,
bpb_vs_bytes.png, runs/, logs/, and in script/ what ran. Ctrl-C lets each run save a checkpoint; the
same command continues from there, and repeats failed runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

try:
    import matplotlib
    import numpy as np
    import pandas as pd
    import torch
    from scipy import stats
    from tqdm import tqdm
except ImportError as missing:
    raise SystemExit(
        f"error: {missing.name} is missing: pip install -r tools/requirements.txt"
    ) from None

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
sys.path.insert(0, str(ROOT))

import train_gpt
from train_gpt import UserError, load_preset, shard_paths

# The variables that the script and its launcher read; none may come from the shell.
NAMES = {*train_gpt.SETTINGS, *train_gpt.ALIASES, *train_gpt.UNSUPPORTED, "preset"}
NAMES |= {"rank", "local_rank", "world_size", "local_world_size"}
NAMES = {name.upper() for name in NAMES}
# Settings that follow from --seeds, --budget and --out.
CONTROLLED = {"SEED", "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "GPTQ_RESERVE_SECONDS"}
CONTROLLED |= {"RUN_ID", "OUTPUT_DIR"}
# More than any export takes: the script then keeps exactly this time for the export, so that the
# training time, which is the rest, is the same for all variants.
RESERVE_SECONDS = 10**6
# Variables that are no settings but may be given like one.
MACHINE = re.compile(r"(OMP|MKL|MALLOC|GLIBC|CUDA|NCCL|TORCH|TORCHINDUCTOR|TRITON)_\w+")
ARTIFACT = "model.int6.ptz"
GRACE_SECONDS = 60  # for a run that was told to stop: it finishes its step and saves a checkpoint
# Columns of results.csv: those with text, and those with figures by their keys in results.json.
TEXT = ("label", "family", "preset", "settings", "budget")
TEXT += ("script", "torch", "variant", "run", "error")
FIGURES = {
    "steps": "steps",
    "seconds": "train_seconds",
    "tokens_per_second": "tokens_per_second",
    "trained": "trained_parameters",
    "frozen": "frozen_parameters",
    "model_bytes": "bytes_model",
    "val_bpb_before": "val_bpb_before",
    "val_bpb_roundtrip": "val_bpb_roundtrip",
    "val_bpb_sliding": "val_bpb_sliding_window",
}


class RunFailed(Exception):
    """A run without a result. The message goes into its row; the other runs continue."""


# ---- What to run ---------------------------------------------------------------------------------


class Budget(NamedTuple):
    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        found = re.fullmatch(r"(tokens|seconds)=(\d[\d_]*(\.\d+)?(e\d+)?)", text)
        if not found or not float(found[2]):
            raise UserError("--budget needs tokens=N or seconds=S, over 0")
        return cls(found[1], float(found[2]))

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:.10g}"

    def settings(self, step_tokens: int) -> dict[str, str]:
        """Return the settings that spend the budget in steps of so many tokens."""
        if self.kind == "seconds":
            return {
                "ITERATIONS": str(10**9),
                "MAX_WALLCLOCK_SECONDS": f"{self.amount + RESERVE_SECONDS:.16g}",
                "GPTQ_RESERVE_SECONDS": str(RESERVE_SECONDS),
            }
        steps = int(self.amount) // step_tokens
        if not steps:
            raise UserError(f"{self} is less than one step of {step_tokens} tokens")
        return {"ITERATIONS": str(steps), "MAX_WALLCLOCK_SECONDS": "0"}

    def problem(self, steps: int, seconds: float) -> str:
        """Return why a run cannot be compared with the others; empty if it can."""
        tolerance = 2 * seconds / max(steps, 1) + 0.02 * self.amount
        if self.kind == "tokens" or abs(seconds - self.amount) <= tolerance:
            return ""
        return f"trained for {seconds:.1f} s instead of {self.amount:g}: no fair comparison"


@dataclasses.dataclass(eq=False)
class Variant:
    label: str
    family: str
    preset: str
    settings: dict[str, str]  # at first the changes, then all
    teacher: Variant | None = None
    step_tokens: int = 0
    id: str = ""  # a hash of everything that the runs depend on except the seed

    def folder(self, out: Path, seed: int) -> Path:
        preset = re.sub(r"[^A-Za-z0-9_-]+", "_", self.preset.removesuffix(".env"))
        return out / "runs" / f"{preset[-40:]}-{self.id}-s{seed}"


def parse_settings(words: list[str], where: str) -> dict[str, str]:
    for word in words:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word):
            raise UserError(f"{where}: {word!r} is not KEY=VALUE")
    return dict(word.split("=", 1) for word in words)


def read_plan(path: str) -> Iterator[Variant]:
    """Yield the variants of a plan, with their changes as settings."""
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            words = shlex.split(text, comments=True)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if 0 < len(words) < 3:
            raise UserError(f"{where}: needs label, family and preset, then KEY=VALUE ...")
        if words:
            yield Variant(*words[:3], parse_settings(words[3:], where))


def read_variants(args: argparse.Namespace) -> list[Variant]:
    presets = args.presets.split(",") if args.presets else []
    variants = [Variant(name, name, name, {}) for name in presets]
    variants += read_plan(args.plan) if args.plan else []
    if not variants:
        raise UserError("nothing to run: name presets by --presets, or give lines to --plan")
    given = set(args.common).union(*(variant.settings for variant in variants))
    refused = ", ".join(given & CONTROLLED)
    if refused:
        raise UserError(f"{refused}: use --seeds, --budget and --out instead")
    return variants


def load(given: dict[str, str], data: str | None) -> train_gpt.Hyperparameters:
    """Return the settings of a run; data, tokenizer and vocabulary are those that run.sh takes."""
    h = train_gpt.load_settings(given | ({"DATA_PATH": data} if data else {}))
    default = ROOT / "data" / "datasets" / f"docs_sp{h.vocab_size}"
    folder = os.path.abspath(h.data_path if "data_path" in h.explicit else default)
    h = dataclasses.replace(h, data_path=folder, explicit=h.explicit | {"data_path"})
    h = train_gpt.settings_from_manifest(h)
    if "tokenizer_path" not in h.explicit:
        advice = "data/prepare.py makes such a folder for --data"
        raise UserError(f"no {folder}/manifest.json; {advice}")
    return dataclasses.replace(h, tokenizer_path=os.path.abspath(h.tokenizer_path))


def data_of(h: train_gpt.Hyperparameters) -> list[Any]:
    """Return the names and sizes of the shards, and the tokenizer's SHA-256, as `identify` does."""
    paths = [path for split in ("train", "val") for path in shard_paths(h.data_path, split)]
    tokenizer = train_gpt.read_file("TOKENIZER_PATH", h.tokenizer_path)
    sizes = [[path.name, path.stat().st_size] for path in paths]
    return [sizes, hashlib.sha256(tokenizer).hexdigest()]


def complete(variant: Variant, args: argparse.Namespace, plain: dict[str, Variant]) -> None:
    """Give a variant all its settings and its id, after its teacher.

    `plain` has the variants without changes by preset: teachers are among them, or are added.
    """
    given = args.common | variant.settings
    strange = [key for key in given if not (key in NAMES or MACHINE.fullmatch(key))]
    if strange:
        raise UserError(f"{', '.join(strange)}: no such setting")
    device = given.get("DEVICE", "auto")
    machine = {key: text for key, text in given.items() if key not in NAMES}
    teacher = load_preset(variant.preset, device).get("TEACHER_PRESET")
    if teacher and not given.get("DISTILL_FROM"):
        if "TEACHER_PRESET" in load_preset(teacher, device):
            raise UserError(f"its teacher {teacher} may not have a teacher, too")
        variant.teacher = plain.setdefault(teacher, Variant(teacher, teacher, teacher, {}))
        if not variant.teacher.id:
            complete(variant.teacher, args, plain)
        given["DISTILL_FROM"] = "its artifact"
    launcher = {"PRESET": variant.preset, "WORLD_SIZE": str(args.processes)}
    h = load(given | launcher, args.data)
    settings = {name.upper(): str(getattr(h, name)) for name in h.explicit}
    for name in {*CONTROLLED, "DISTILL_FROM"} if variant.teacher else CONTROLLED:
        settings.pop(name, None)
    variant.step_tokens = h.train_batch_tokens
    variant.settings = settings | machine | args.budget.settings(h.train_batch_tokens)
    code = SCRIPT.read_text(encoding="utf-8")
    facts = [variant.settings, variant.teacher and variant.teacher.id, code, data_of(h)]
    if args.budget.kind == "seconds":  # the steps in that time depend on who shares the machine
        facts += [args.jobs, args.gpus]
    variant.id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def complete_all(variants: list[Variant], args: argparse.Namespace) -> list[Variant]:
    """Return the complete variants, teachers first. UserError has all that the script refuses."""
    plain = {variant.preset: variant for variant in variants if not variant.settings}
    problems = []
    for variant in variants:
        try:
            if not variant.id:
                complete(variant, args, plain)
        except UserError as error:
            problems.append(f"{variant.label}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    every = dict.fromkeys([*variants, *(each.teacher for each in variants if each.teacher)])
    return sorted(every, key=lambda variant: variant.teacher is not None)


# ---- Runs ----------------------------------------------------------------------------------------


class Runner:
    """Make the runs, several at a time, and keep results.csv."""

    def __init__(self, out: Path, budget: Budget, gpus: int, jobs: int) -> None:
        self.out, self.budget, self.gpus, self.jobs = out, budget, gpus, jobs
        # A copy runs, so that editing the script does not change the later runs.
        self.sha = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        self.script = out / "script" / self.sha[:12] / SCRIPT.name
        self.script.parent.mkdir(parents=True, exist_ok=True)
        train_gpt.write_file(self.script, SCRIPT.read_bytes())
        self.rows = read_results(out).drop(columns="name").to_dict("records")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else [str(index) for index in range(gpus)]
        self.devices: queue.SimpleQueue[str] = queue.SimpleQueue()  # one for each job
        for index in range(jobs):
            self.devices.put(devices[index % gpus] if gpus else "")
        self.lock = threading.Lock()  # of the next two
        self.children: list[subprocess.Popen] = []
        self.is_stopping = False

    def command(self) -> list[str]:
        launcher = []
        if self.jobs == 1 and self.gpus > 1:
            processes = f"--nproc_per_node={self.gpus}"
            launcher = ["-m", "torch.distributed.run", "--standalone", processes]
        return [sys.executable, *launcher, str(self.script)]

    def environment(self, settings: dict[str, str], device: str) -> dict[str, str]:
        """Return the environment of a run: this one without stray settings, and its share."""
        inherited = {key: text for key, text in os.environ.items() if key not in NAMES}
        if not self.gpus:
            words = shlex.split((ROOT / "tools" / "memory.env").read_text(), comments=True)
            inherited = parse_settings(words, "tools/memory.env") | inherited
        if self.jobs > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
            limit = int(inherited.get("OMP_NUM_THREADS", threads))
            inherited["OMP_NUM_THREADS"] = str(min(threads, limit))
        if self.jobs > 1 and self.gpus > 1:
            inherited["CUDA_VISIBLE_DEVICES"] = device
        return inherited | settings

    def launch(self, name: str, settings: dict[str, str]) -> None:
        """Run the script until it ends. RunFailed if it fails."""
        log = self.out / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        device = self.devices.get()
        with log.open("wb") as output, self.lock:
            if self.is_stopping:
                raise RunFailed("stopped")
            child = subprocess.Popen(
                self.command(),
                env=self.environment(settings, device),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches it once, by `stop`
            )
            self.children.append(child)
        code = child.wait()
        self.devices.put(device)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            # torchrun's own report comes after the error.
            errors = (
                [line for line in lines if line.startswith("error: ")] or lines or ["no output"]
            )
            raise RunFailed(f"exit status {code}: {errors[-1].strip()}")

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Make a run unless its folder is complete; return the columns that it fills in."""
        folder = variant.folder(self.out, seed)
        settings = {"SEED": str(seed), "OUTPUT_DIR": str(folder.parent), "RUN_ID": folder.name}
        if variant.teacher:
            artifact = variant.teacher.folder(self.out, seed) / ARTIFACT
            if not artifact.is_file():
                raise RunFailed(f"its teacher {variant.teacher.label} has no {artifact}")
            settings["DISTILL_FROM"] = str(artifact)
        path = folder / "results.json"
        if not path.is_file():
            self.launch(folder.name, variant.settings | settings)
        results = json.loads(path.read_text(encoding="utf-8"))
        figures = {column: results.get(key, math.nan) for column, key in FIGURES.items()}
        figures["tokens"] = results["steps"] * variant.step_tokens
        problem = self.budget.problem(results["steps"], results["train_seconds"])
        return figures | {"run": folder.name, "error": problem}

    def result(self, variant: Variant, seed: int, teacher: Future | None) -> tuple[dict, str]:
        """Return the row of a run, after its teacher's run, and what to remark on it."""
        if teacher:
            teacher.result()
        keys = (variant.id, seed)
        known = [row for row in self.rows if (row["variant"], row["seed"]) == keys]
        if known and not known[0]["error"]:
            return known[0], "  (already there)"
        folder = variant.folder(self.out, seed)
        if known and (folder / "results.json").is_file():
            shutil.rmtree(folder)  # its training time was wrong
        row = dict.fromkeys(TEXT, "") | dict.fromkeys([*FIGURES, "tokens"], math.nan)
        row |= {"preset": variant.preset, "seed": seed, "variant": variant.id, "script": self.sha}
        row |= {"budget": str(self.budget), "torch": torch.__version__}
        row["settings"] = " ".join(f"{key}={text}" for key, text in variant.settings.items())
        try:
            return row | self.run(variant, seed), ""
        except RunFailed as error:
            return row | {"error": str(error)}, ""

    def record(self, row: dict[str, Any]) -> None:
        """Put a row into results.csv, in place of an earlier one of the same run and label."""
        keys = ("variant", "seed", "label", "family")
        others = [old for old in self.rows if any(old[key] != row[key] for key in keys)]
        self.rows = [*others, row]
        text = pd.DataFrame(self.rows).to_csv(index=False)
        train_gpt.write_file(self.out / "results.csv", text.encode())

    def run_all(self, variants: list[Variant], seeds: list[int]) -> int:
        """Make the missing rows; return how many of those asked for hold an error."""
        futures: dict[tuple[str, int], Future] = {}  # by variant and seed
        failed = 0
        bar = tqdm(total=len(variants) * len(seeds), unit="run", disable=None)
        with ThreadPoolExecutor(self.jobs) as pool, bar:
            for seed, variant in itertools.product(seeds, variants):
                key = (variant.id, seed)
                if key not in futures:  # teachers come before their students
                    teacher = futures[variant.teacher.id, seed] if variant.teacher else None
                    futures[key] = pool.submit(self.result, variant, seed, teacher)
            try:
                for future in as_completed(futures.values()):
                    row, remark = future.result()
                    outcome = f"failed: {row['error']}"
                    if not row["error"]:
                        outcome = f"{row['seconds']:.0f} s  {row['model_bytes']:,.0f} bytes"
                        outcome += f"  {row['val_bpb_sliding']:.4f} bpb"
                    for variant in variants:  # two of them may be the same run
                        if variant.id == row["variant"]:
                            self.record(row | {"label": variant.label, "family": variant.family})
                            failed += bool(row["error"])
                            bar.update()
                            bar.write(f"{variant.label}  seed {row['seed']}  {outcome}{remark}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        return failed

    def stop(self) -> None:
        """End the runs; they have time to save a checkpoint, unless a second signal comes."""
        with self.lock:
            self.is_stopping = True
        running = [child for child in self.children if child.poll() is None]
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("stopping; the runs save checkpoints; a second signal ends them", flush=True)
        try:
            for child in running:
                child.terminate()  # torchrun passes the signal on
            for child in running:
                child.wait(GRACE_SECONDS)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            for child in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)


# ---- Report --------------------------------------------------------------------------------------


def read_results(out: Path) -> pd.DataFrame:
    """Return the rows so far. `name` is the label, with the variant's id where labels repeat."""
    path = out / "results.csv"
    frame = pd.DataFrame(columns=TEXT)
    if path.is_file():
        numbers = {column: [""] for column in (*FIGURES, "tokens")}
        types = dict.fromkeys(TEXT, str)
        frame = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=numbers)
    several = frame.groupby("label")["variant"].transform("nunique") > 1
    unique_names = frame["label"] + " #" + frame["variant"]
    return frame.assign(name=frame["label"].where(~several, unique_names))


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


class Yardstick:
    """A least-squares fit of val_bpb on x, the logarithm of the model file's bytes."""

    def __init__(self, table: pd.DataFrame, family: str, degree: int) -> None:
        points = table[table["family"] == family]
        sizes, needed = points["model_bytes"], 5 if degree == 2 else 2
        if sizes.nunique() < needed:
            raise UserError(
                f"no yardstick: it needs {needed} networks of different size in family {family!r}"
                f", and there are {sizes.nunique()}"
            )
        self.family, self.smallest, self.largest = family, sizes.min(), sizes.max()
        self.center = float(f"{math.sqrt(self.smallest * self.largest):.2g}")
        x, y = np.log(sizes / self.center), points["bpb"]
        self.coefficients = np.polyfit(x, y, degree)
        self.covariance = np.full((degree + 1, degree + 1), math.nan)
        self.residual = math.nan  # standard deviation of the networks around the line
        self.text = f"{len(points)} networks ({points['seeds'].sum()} runs) of family {family!r}"
        self.text += f", {self.smallest:,.0f} to {self.largest:,.0f} bytes"
        freedom = len(points) - degree - 1
        if freedom > 0:
            _, self.covariance = np.polyfit(x, y, degree, cov=True)
            squares = (y - self.at(sizes)) ** 2
            self.residual = math.sqrt(squares.sum() / freedom)
            self.text += f"; residual deviation {self.residual:.4f}, degrees of freedom: {freedom}"

    def at(self, sizes: np.ndarray) -> np.ndarray:
        return np.polyval(self.coefficients, np.log(sizes / self.center))

    def error(self, sizes: np.ndarray) -> np.ndarray:
        design = np.vander(np.log(sizes / self.center), len(self.coefficients))
        return np.sqrt(np.sum(design @ self.covariance * design, axis=1))

    def __str__(self) -> str:
        *terms, constant = self.coefficients
        text = f"val_bpb = {constant:.4f}"
        for term, power in zip(reversed(terms), ("x", "x²"), strict=False):
            text += f" {'+' if term > 0 else '−'} {abs(term):.4f} {power}"
        x = f"x = ln(bytes / {self.center:,.0f})"
        return f"{text} with {x}; least squares through {self.text}"


def add_distances(table: pd.DataFrame, line: Yardstick) -> pd.DataFrame:
    """Add each variant's distance from the line, its standard error, and what to think of it.

    The error combines that of the line at the variant's bytes with that of the variant's mean. A
    variant's deviation between seeds is at least the pooled one, because two seeds may agree by
    chance. If no variant has two seeds, the residual deviation of the line stands in for it.
    """
    sizes = table["model_bytes"].to_numpy(float)
    distance = table["bpb"] - line.at(sizes)
    deviation = line.residual
    repeated = table[table["seeds"] > 1]
    if len(repeated):
        weights = repeated["seeds"] - 1
        deviation = math.sqrt(np.average(repeated["std"] ** 2, weights=weights))
    variance = np.fmax(table["std"], deviation) ** 2 / table["seeds"]
    error = np.sqrt(line.error(sizes) ** 2 + variance)
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
    parts, lines, notes = [], {}, []
    for budget, part in table.groupby("budget", sort=False):
        try:
            lines[budget] = Yardstick(part, family, degree)
            parts.append(add_distances(part, lines[budget]))
            notes.append(f"{budget}: {lines[budget]}")
        except UserError as error:
            unknown = {"distance": math.nan, "is_yardstick": False, "is_noise": False}
            parts.append(part.assign(**unknown))
            notes.append(f"{budget}: {error}")
    if parts:
        table = pd.concat(parts).sort_values("bpb", ignore_index=True)
    return table, lines, notes


def with_deviation(mean: float, deviation: float, sign: str = "") -> str:
    text = f"{mean:{sign}.4f}"
    return text if math.isnan(deviation) else f"{text} ± {deviation:.4f}"


def compare(frame: pd.DataFrame, a: str, b: str) -> str:
    """Describe the paired difference in val_bpb over the seeds that both names have."""
    good = frame[frame["error"] == ""].drop_duplicates(["name", "seed"])
    scores = good.pivot(index="seed", columns="name", values="val_bpb_sliding")
    pairs = scores.reindex(columns=[a, b]).dropna().to_numpy(float).T
    if not pairs.size:
        return f"--compare: {a!r} and {b!r} share no seed; there are: {', '.join(scores)}"
    difference = pd.Series(pairs[0] - pairs[1])
    text = with_deviation(difference.mean(), difference.std())
    text = f"{a} − {b}: {text} bpb, n = {len(difference)}"
    if len(difference) > 1:
        text += f", paired t-test p = {stats.ttest_rel(*pairs).pvalue:.2g}"
    return text


def format_distance(row: NamedTuple) -> str:
    if math.isnan(row.distance):
        return ""
    if row.is_yardstick:
        return f"{row.distance:+.4f} (on the line)"
    text = with_deviation(row.distance, row.distance_error, "+")
    text += " (within noise)" if row.is_noise else ""
    return text + (" (extrapolated)" if row.is_extrapolated else "")


def format_table(table: pd.DataFrame) -> list[str]:
    titles = ("variant", "family", "budget", "seeds", "val_bpb", "distance from the line")
    titles += ("lost to quantization", "trained", "frozen", "model bytes", "tokens/s")
    rows = [titles, ["---"] * 3 + ["--:"] * 8]
    for row in table.itertuples():
        cells = [row.name, row.family, row.budget, str(row.seeds)]
        cells += [with_deviation(row.bpb, row.std), format_distance(row), f"{row.lost:.4f}"]
        counts = (row.trained, row.frozen, row.model_bytes, row.tokens_per_second)
        rows.append([*cells, *(f"{count:,.0f}" for count in counts)])
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return [f"| {' | '.join(cells)} |" for cells in escaped]


def draw(table: pd.DataFrame, lines: dict[str, Yardstick], path: Path) -> None:
    """Draw val_bpb against the bytes of the model file, with each line and its band."""
    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 8), layout="constrained")
    for budget, line in lines.items():
        sizes = table.loc[table["budget"] == budget, "model_bytes"]
        x = np.geomspace(sizes.min(), sizes.max(), 200)
        y, band = line.at(x), 2 * line.error(x)
        axes.plot(x, y, "k", linewidth=1, label=f"{budget}: {line.family} ± 2 standard errors")
        axes.fill_between(x, y - band, y + band, color="gray", alpha=0.2, linewidth=0)
    for family, part in table.groupby("family"):
        bars = part["std"].fillna(0)
        axes.errorbar(part["model_bytes"], part["bpb"], bars, fmt="o", capsize=3, label=family)
    for row in table.itertuples():
        axes.annotate(row.name, (row.model_bytes, row.bpb), fontsize=7)
    axes.set(
        title="bars: deviation between seeds",
        xscale="log",
        xlabel="model file (bytes)",
        ylabel="validation bits per byte, artifact, sliding window",
        xlim=(table["model_bytes"].min() / 1.2, table["model_bytes"].max() * 1.4),
    )
    axes.grid(which="both", alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(args: argparse.Namespace, out: Path) -> None:
    frame = read_results(out)
    degree = {"line": 1, "parabola": 2}[args.fit]
    table, lines, notes = measure_distances(summarize(frame), args.line, degree)
    if lines:
        notes.append("± after a distance is its standard error; within noise: under two of them")
    notes += [compare(frame, a, b) for a, b in args.compare]
    failed = frame[frame["error"] != ""]
    notes += [f"{row.name}, seed {row.seed}: {row.error}" for row in failed.itertuples()]
    text = "\n".join([*format_table(table), "", *(f"- {note}" for note in notes)]).rstrip()
    train_gpt.write_file(out / "table.md", f"{text}\n".encode())
    print(text)
    if not table.empty:
        draw(table, lines, out / "bpb_vs_bytes.png")
        print(f"results.csv, table.md and bpb_vs_bytes.png are in {out}")


# ---- Main ----------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ablate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder of the results")
    add("--presets", help="names in presets/, or .env files, separated by commas")
    add("--plan", help="file with one line per variant: label family preset KEY=VALUE ...")
    add("--seeds", default="1337", help="whole numbers, separated by commas")
    add("--budget", default="", help="tokens=N or seconds=S of training")
    add("--jobs", type=int, default=1, help="runs at the same time, one process each; default: 1")
    add("--data", help="folder of token shards; default: what data/prepare.py docs makes")
    add("--report-only", action="store_true", help="run nothing, make table and picture again")
    add("--line", default="learned", help="family of the yardstick; default: learned")
    fits = {"choices": ("line", "parabola"), "default": "line"}
    add("--fit", **fits, help="form of the yardstick; parabola: from 5 networks")
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("A", "B")}
    add("--compare", **pair, help="paired difference of two labels")
    add("settings", nargs="*", metavar="KEY=VALUE", help="for every run")
    return parser.parse_intermixed_args(arguments)


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
    args.budget = Budget.parse(args.budget)
    args.common = parse_settings(args.settings, "command line")
    variants = read_variants(args)
    devices = {(args.common | variant.settings).get("DEVICE") for variant in variants}
    args.gpus = 0 if devices == {"cpu"} else torch.cuda.device_count()
    args.processes = max(1, args.gpus) if args.jobs == 1 else 1
    variants = complete_all(variants, args)
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:  # freed however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another ablate.py is at work in {out}") from None
        runner = Runner(out, args.budget, args.gpus, args.jobs)
        failed = runner.run_all(variants, sorted(set(map(int, args.seeds.split(",")))))
        report(args, out)
    return failed


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    failed = 0
    try:
        failed = ablate(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        command = shlex.join(["python", *sys.argv])
        print(f"\nstopped; the same command continues: {command}", file=sys.stderr)
        return 130
    if failed:
        print(f"{failed} runs failed, see logs/; the same command repeats them", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
