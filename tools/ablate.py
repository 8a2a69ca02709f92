"""Runs presets of train_gpt.py with changes and seeds under one budget, and compares what they score.

    python tools/ablate.py --out DIR --presets cpu/baseline,cpu/random_adapters --set "MAP_BASIS=hadamard" \\
        --seeds 1,2 --budget tokens=1000000 NUM_LAYERS=4
    python tools/ablate.py --out DIR --plan FILE --seeds 1,2,3 --budget seconds=120
    python tools/ablate.py --out DIR --plan FILE --budget bytes=800000 --tokens 1000000 --knob MODEL_DIM
    python tools/ablate.py --out DIR --report-only --compare "LABEL" "OTHER LABEL"

A plan has one line a variant: label family preset KEY=VALUE ...; the picture draws one line a family.
Settings of a variant win over those of the command line, and those over the preset's.

A preset's TEACHER_PRESET=NAME is trained first, with the same seed and budget, and its artifact passed as
DISTILL_FROM. Of a budget of bytes it gets the tokens and keeps its size: only the student is stored.

Below --out: results.csv (one row a run), table.md, bpb_vs_bytes.png; runs/, pilots/ and logs/; in script/ the
very script that ran. The same command goes on where an earlier one stopped.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import matplotlib.pyplot as plt
    import pandas as pd
    from scipy import stats
except ImportError as error:
    raise SystemExit(
        f"error: {error.name} is missing: pip install -r tools/requirements.txt"
    ) from None

ROOT = Path(__file__).resolve().parent.parent
# All that a run inherits: what a process needs. Another variable of the shell could change one run.
INHERITED = re.compile(
    r"PATH|HOME|LANG|LC_ALL|TMPDIR|LD_LIBRARY_PATH|OMP_NUM_THREADS|(CUDA|MALLOC)_\w+"
)
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}  # on a CPU, see run.sh
OURS = {
    "SEED": "--seeds",
    "ITERATIONS": "--budget",
    "MAX_WALLCLOCK_SECONDS": "--budget",
    "RUN_ID": "--out",
    "OUTPUT_DIR": "--out",
}
# The least that gives a model file of the right size. The quantiser's step is proportional to a row's RMS, so
# the bits a value takes hardly depend on how long it was trained.
PILOT = {"ITERATIONS": 8, "WARMUP_STEPS": 0, "VAL_LOSS_EVERY": 0, "MAX_WALLCLOCK_SECONDS": 0}
TOLERANCE = 0.03  # a model file may be this much smaller than the budget of bytes
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
]  # columns
FIGURES = {  # column: key of the run's submission.json
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
# Imports the script once and asks it about the settings of each run, in the environment that a run has.
CHECK = """
import dataclasses, importlib, json, os, sys
folder, name = os.path.split(sys.argv[1])
sys.path.insert(0, folder)
script = importlib.import_module(name.removesuffix(".py"))
torch, inherited, answers = sys.modules.get("torch"), dict(os.environ), []
gpus = torch.cuda.device_count() if torch else 0
for settings in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update({**inherited, **settings, "WORLD_SIZE": str(max(1, gpus))})
    try:
        answers.append([dataclasses.asdict(script.Hyperparameters()), ""])
    except script.UserError as error:
        answers.append([{}, str(error)])
names = [f.name for f in dataclasses.fields(script.Hyperparameters)]
names += [*getattr(script, "PUBLISHED", ()), *getattr(script, "NOT_HERE", ())]
print(json.dumps([answers, [name.upper() for name in names], gpus, torch.__version__ if torch else ""]))
"""


class UserError(Exception):
    """Something a person can mend: the message says what was wrong and what to do."""


class RunFailed(Exception):
    """A run gave no result; the message is its row's error, and the other runs go on."""


# ---- What to run -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run may use: training tokens, training seconds, or bytes of the model file and tokens."""

    kind: str
    amount: float
    tokens: int = 0
    knob: str = ""
    step: int = 0  # of the knob; 0: what suits it

    def __str__(self) -> str:
        more = f" tokens={self.tokens} {self.knob}" if self.knob else ""
        return f"{self.kind}={self.amount:.10g}{more}"

    def settings(self, h: dict) -> dict[str, str]:
        """What spends it, given the values of a variant's settings. UserError if it is less than one step."""
        if self.kind == "seconds":
            seconds = self.amount + h["gptq_reserve_seconds"]
            return {"ITERATIONS": str(10**9), "MAX_WALLCLOCK_SECONDS": f"{seconds:.10g}"}
        steps = int(self.tokens or self.amount) // h["train_batch_tokens"]
        if not steps:
            raise UserError(f"{self} is less than one step of {h['train_batch_tokens']} tokens")
        return {"ITERATIONS": str(steps), "MAX_WALLCLOCK_SECONDS": "0"}


@dataclasses.dataclass(eq=False)
class Variant:
    """What is run once a seed."""

    label: str
    family: str
    preset: str
    settings: dict[str, str]
    budget: Budget
    teacher: Variant | None = None
    teaches: bool = False
    h: dict = dataclasses.field(
        default_factory=dict
    )  # every setting's value, as the script reads them
    id: str = ""  # a hash of all that its runs depend on but the seed

    def name(self) -> str:
        return (
            f"{re.sub(r'[^A-Za-z0-9_-]+', '_', self.preset.removesuffix('.env'))[-40:]}-{self.id}"
        )

    def knob(self, value: int | None = None) -> tuple[dict[str, str], int]:
        """The settings with the knob at a value, and the value it has without. UserError if it has none."""
        rank = self.budget.knob == "rank"
        key, number = ("MAP_ADAPTER", r"(?<=lora:)\d+") if rank else (self.budget.knob, r"^\d+$")
        text = str(self.h.get(key.lower(), self.settings.get(key, "")))
        if len(found := re.findall(number, text)) != 1 or int(found[0]) < 1:
            needed = (
                "MAP_ADAPTER with one lora:R" if rank else "a setting that is a whole number over 0"
            )
            raise UserError(
                f"{self.label}: --knob {self.budget.knob} needs {needed}, not {key}={text}"
            )
        return self.settings | {key: re.sub(number, str(value), text)}, int(found[0])


def parse_budget(args: argparse.Namespace) -> Budget:
    found = re.fullmatch(r"(tokens|seconds|bytes)=(\d[\d_]*(\.\d+)?(e\d+)?)", args.budget or "")
    if not found or not float(found[2]):
        raise UserError("--budget needs tokens=N, seconds=S or bytes=N, over 0")
    knob = re.fullmatch(r"([A-Z_]+|rank)(?::([1-9]\d*))?", args.knob or "")
    if found[1] != "bytes" and not args.knob and args.tokens is None:
        return Budget(found[1], float(found[2]))
    if found[1] != "bytes" or not knob or not args.tokens or args.tokens < 0:
        raise UserError(
            "--budget bytes=N needs --tokens T and --knob KNOB[:STEP], the other budgets neither"
        )
    return Budget(found[1], float(found[2]), args.tokens, knob[1], int(knob[2] or 0))


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


def load_preset(name: str, heirs: tuple = ()) -> dict[str, str]:
    """The settings of presets/NAME.env, or of a file, as run.sh reads them: its PRESET_BASE holds where it
    is silent."""
    if name in heirs:
        raise UserError(f"PRESET_BASE makes {name} its own base")
    folder = ROOT / "presets"
    path = folder / f"{name.removesuffix('.env')}.env"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = sorted(
            path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.env")
        )
        raise UserError(f"no preset {name!r}; there are: {' '.join(known)}")
    lines = [line.split("#")[0].rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    settings = parse_settings(list(filter(None, lines)), str(path))
    if base := settings.pop("PRESET_BASE", ""):
        inherited = load_preset(base, (*heirs, name))
        inherited.pop("TEACHER_PRESET", None)  # a preset names its own teacher
        settings = inherited | settings
    return settings


def with_data(settings: dict[str, str], data: str | None) -> dict[str, str]:
    """The settings, and those that name data, tokenizer and vocabulary, by the manifest as in run.sh."""
    default = ROOT / "data" / "datasets" / f"docs_sp{settings.get('VOCAB_SIZE', 1024)}"
    folder = Path(os.path.abspath(data or settings.get("DATA_PATH") or default))
    for split in ("train", "val"):
        if not list(folder.glob(f"fineweb_{split}_*.bin")):
            raise UserError(
                f"no fineweb_{split}_*.bin in {folder}; data/prepare.py makes it, then --data"
            )
    settings = settings | {"DATA_PATH": str(folder)}
    manifest = folder / "manifest.json"
    if "TOKENIZER_PATH" not in settings:
        if not manifest.is_file():
            raise UserError(f"no {manifest} to name the tokenizer; set TOKENIZER_PATH")
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        settings["TOKENIZER_PATH"] = os.path.abspath(folder / facts["tokenizer"])
        settings.setdefault("VOCAB_SIZE", str(facts["vocab_size"]))
    return settings


def read_variants(args: argparse.Namespace, budget: Budget) -> list[Variant]:
    """The variants of the plan, or of presets and --set; a teacher stands before its first student."""
    if bool(args.plan) == bool(args.presets) or (args.plan and args.set):
        raise UserError("what to run: --presets with any number of --set, or else --plan")
    lines = []
    for number, line in enumerate(
        Path(args.plan).read_text("utf-8").splitlines() if args.plan else [], 1
    ):
        words = split_words(line, where := f"{args.plan}, line {number}")
        if words and len(words) < 3:
            raise UserError(f"{where}: needs label, family and preset, then KEY=VALUE ...")
        lines += [(*words[:3], parse_settings(words[3:], where))] if words else []
    for name in args.presets.split(",") if args.presets else []:
        for text in ["", *args.set]:
            change = parse_settings(split_words(text, "--set"), "--set")
            lines.append((f"{name} {text}".strip(), name, name, change))
    common = parse_settings(args.settings, "command line")
    if reserved := OURS.keys() & {*common, *(key for line in lines for key in line[3])}:
        raise UserError("; ".join(f"{key} is set by {OURS[key]}" for key in sorted(reserved)))
    variants, teachers = [], {}

    def add(
        label: str, family: str, preset: str, change: dict, budget: Budget, pupils: tuple
    ) -> Variant:
        if preset in pupils:
            raise UserError(f"TEACHER_PRESET makes {preset} its own teacher")
        given = load_preset(preset) | common | change
        settings = with_data(
            {key: value for key, value in given.items() if key not in OURS}, args.data
        )
        teacher = settings.pop("TEACHER_PRESET", "")
        if settings.get("DISTILL_FROM"):
            teacher = ""
        if teacher and teacher not in teachers:
            plain = Budget("tokens", budget.tokens) if budget.knob else budget
            teachers[teacher] = add(teacher, teacher, teacher, {}, plain, (*pupils, preset))
            teachers[teacher].teaches = True
        variants.append(Variant(label, family, preset, settings, budget, teachers.get(teacher)))
        return variants[-1]

    for line in lines:
        add(*line, budget, ())
    if not variants:
        raise UserError(f"{args.plan}: no line says what to run")
    return variants


def environment(settings: dict, on_cpu: bool = True) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if INHERITED.fullmatch(key)}
    settings = {key: str(value) for key, value in settings.items()}
    return (KEEP_MEMORY if on_cpu else {}) | inherited | settings | {"PYTHONDONTWRITEBYTECODE": "1"}


def check(variants: list[Variant], script: Path) -> tuple[int, str]:
    """Completes the variants: values, budget, id. Returns the number of GPUs and torch's version. UserError
    names all that the script refuses."""
    asked = [v.settings | ({"DISTILL_FROM": "an artifact"} if v.teacher else {}) for v in variants]
    child = subprocess.run(
        [sys.executable, "-c", CHECK, script.absolute()],
        input=json.dumps(asked),
        text=True,
        capture_output=True,
        env=environment({}),
        check=False,
    )
    if child.returncode:
        raise UserError(f"{script} cannot be asked for its settings: {child.stderr.strip()}")
    answers, names, gpus, version = json.loads(child.stdout.splitlines()[-1])
    problems = []
    for v, settings, (v.h, problem) in zip(variants, asked, answers):
        unknown = [key for key in settings if key not in names and not INHERITED.fullmatch(key)]
        found = [f"{key}: no such setting" for key in unknown] + ([problem] if problem else [])
        problems += [f"{v.label}: {text}" for text in found]
    if problems:
        raise UserError("\n".join(problems))
    for v in variants:  # a teacher's id is known before its students need it
        v.settings |= v.budget.settings(v.h)
        if v.budget.knob:
            v.knob()
        facts = [v.settings, v.teacher and v.teacher.id, script.read_text(encoding="utf-8")]
        facts += dataclasses.astuple(v.budget) if v.budget.knob else []
        v.id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return gpus, version


# ---- Runs --------------------------------------------------------------------------------------------------


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """A reader sees the old file or the whole new one, whatever happens in between."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def stop(child: subprocess.Popen) -> None:
    """Ends a run and its processes, a session of their own; they get 10 s to end by themselves."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        if child.poll() is None:
            os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds)


def fits(size: float, target: float) -> bool:
    return (1 - TOLERANCE) * target <= size <= target


def search(measure: Callable[[int], float], target: float, k: int) -> int:
    """From k on, a whole number whose measure fits the target, else the largest whose measure is not over it.
    The measure rises about as a power of the number, and may fail above some number. RunFailed if even 1 is
    too much, if too little is all that does not fail, or if the number changes nothing."""
    sizes, refusal = {}, ""
    while True:
        try:
            sizes[k] = measure(k)
        except RunFailed as error:
            if k <= min(sizes, default=k):
                raise
            sizes[k], refusal = math.inf, str(error)
        under = max((i for i, size in sizes.items() if size <= target), default=0)
        over = min((i for i, size in sizes.items() if size > target), default=math.inf)
        if fits(sizes[k], target):
            return k
        if under and over <= under + 1:
            if sizes[over] == math.inf:
                raise RunFailed(
                    f"no more than {sizes[under]:,.0f} bytes can be had; with more, {refusal}"
                )
            return under
        if over == 1:
            raise RunFailed(f"{sizes[1]:,.0f} bytes with the knob at its least, over {target:,.0f}")
        finite = sorted(i for i, size in sizes.items() if size < math.inf)
        i = min(
            max(bisect.bisect(finite, under), 1), len(finite) - 1
        )  # the two around it or nearest to it
        a, b = (finite[i - 1], finite[i]) if i else (0, finite[0])
        power = math.log(sizes[b] / sizes[a]) / math.log(b / a) if a else 1.0
        if power < 0.001:
            raise RunFailed(f"the knob hardly changes the {sizes[b]:,.0f} bytes")
        wanted = math.log(b) + math.log((1 - TOLERANCE / 2) * target / sizes[b]) / power
        guess = math.exp(min(wanted, math.log(4 * max(sizes))))
        if under and over < math.inf and (sizes[over] == math.inf or len(sizes) % 3 == 0):
            guess = math.sqrt(
                under * over
            )  # nothing to reckon with above, or in case the power law crawls
        k = int(max(under + 1, min(guess, over - 1)))


class Runner:
    """Runs variants one after another and keeps results.csv."""

    def __init__(self, out: Path, script: Path, gpus: int, version: str):
        code = script.read_bytes()
        self.out, self.gpus, self.version, self.sha = (
            out,
            gpus,
            version,
            hashlib.sha256(code).hexdigest(),
        )
        # A copy runs, so that an edit meanwhile does not change the later runs.
        self.script = out / "script" / self.sha[:12] / script.name
        self.script.parent.mkdir(parents=True, exist_ok=True)
        replace(self.script, lambda part: part.write_bytes(code))
        self.rows = read_results(out).drop(columns="name").to_dict("records")

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.out / "runs" / f"{variant.name()}-s{seed}"

    def process(self, folder: Path, variant: Variant, seed: int, settings: dict) -> dict:
        """The submission.json of the run in this folder, made unless it is whole; else RunFailed."""
        submission = folder / "submission.json"  # what a run writes last
        lost = (
            variant.teaches and not (folder / "model.int6.ptz").is_file()
        )  # its students need that too
        if submission.is_file() and not lost:
            return json.loads(submission.read_text(encoding="utf-8"))
        shutil.rmtree(folder, ignore_errors=True)
        settings = settings | {"SEED": seed, "OUTPUT_DIR": folder.parent, "RUN_ID": folder.name}
        if variant.teacher:
            settings["DISTILL_FROM"] = self.folder(variant.teacher, seed) / "model.int6.ptz"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.gpus}"]
        command = [sys.executable, *(torchrun if self.gpus else []), self.script]
        log = self.out / "logs" / f"{folder.name}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            child = subprocess.Popen(
                command,
                env=environment(settings, not self.gpus),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                child.wait()
            finally:
                stop(child)
        if child.returncode or not submission.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RunFailed(
                f"exit status {child.returncode}: {lines[-1].strip() if lines else 'no output'}"
            )
        return json.loads(submission.read_text(encoding="utf-8"))

    def pilot(self, variant: Variant, seed: int, value: int) -> int:
        """Bytes of the model file with the knob at this value; one pilot serves every seed."""
        folder = self.out / "pilots" / f"{variant.name()}-{variant.budget.knob}{value}"
        settings = variant.knob(value)[0] | PILOT | {"EVAL_STRIDE": variant.h["eval_seq_len"]}
        figures = self.process(folder, variant, seed, settings)
        for name in ("checkpoint.pt", "model.int6.ptz"):
            (folder / name).unlink(missing_ok=True)
        return figures["bytes_total"] - figures["bytes_code"]

    def solve(self, variant: Variant, seed: int) -> tuple[dict, Path, str]:
        """Figures, folder and note of the one run whose model file fits the budget of bytes best."""
        target, knob, (_, value) = variant.budget.amount, variant.budget.knob, variant.knob()
        step = variant.budget.step or (8 * variant.h["num_heads"] if knob == "MODEL_DIM" else 1)
        k, ratio, sizes, made = max(1, value // step), 1.0, {}, {}

        def size(k: int) -> float:
            return sizes[k] if k in sizes else ratio * self.pilot(variant, seed, k * step)

        while len(made) < 3 and (k := search(size, target, k)) not in made:
            folder = self.folder(variant, seed)
            folder = folder.with_name(f"{folder.name}-{knob}{k * step}")
            figures = self.process(folder, variant, seed, variant.knob(k * step)[0])
            made[k], sizes[k] = (figures, folder), figures["bytes_total"] - figures["bytes_code"]
            if fits(sizes[k], target):
                break
            ratio = sizes[k] / self.pilot(variant, seed, k * step)
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
            note += (
                f", {sizes[best] / target:.1%} of the bytes: no larger one fits in steps of {step}"
            )
        return *made[best], note

    def run(self, variant: Variant, seed: int) -> dict:
        """The row of a run. What fails is in its `error`."""
        settings = " ".join(f"{key}={value}" for key, value in variant.settings.items())
        row = {
            "label": variant.label,
            "family": variant.family,
            "preset": variant.preset,
            "seed": seed,
            "settings": settings,
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
        try:
            if (
                variant.teacher
                and not (self.folder(variant.teacher, seed) / "model.int6.ptz").is_file()
            ):
                raise RunFailed(f"its teacher {variant.teacher.label} has no artifact")
            if variant.budget.knob:
                figures, folder, row["note"] = self.solve(variant, seed)
            else:
                folder = self.folder(variant, seed)
                figures = self.process(folder, variant, seed, variant.settings)
            row |= {column: figures.get(key, math.nan) for column, key in FIGURES.items()}
            row |= {
                "tokens": figures["steps"] * variant.h["train_batch_tokens"],
                "run": folder.name,
                "model_bytes": figures["bytes_total"] - figures["bytes_code"],
            }
        except RunFailed as error:
            row["error"] = str(error)
        return row

    def find(self, variant: Variant, seed: int, retry_failed: bool) -> dict | None:
        """The row of these settings, if there is one that need not be made again."""
        lost = variant.teaches and not (self.folder(variant, seed) / "model.int6.ptz").is_file()
        for row in self.rows:
            if (row["variant"], row["seed"]) == (variant.id, seed):
                return None if (retry_failed if row["error"] else lost) else dict(row)
        return None

    def record(self, row: dict) -> None:
        keys = ("variant", "seed", "label", "family")
        self.rows = [old for old in self.rows if any(old[key] != row[key] for key in keys)] + [row]
        replace(
            self.out / "results.csv", lambda part: pd.DataFrame(self.rows).to_csv(part, index=False)
        )

    def run_all(self, variants: list[Variant], seeds: list[int], retry_failed: bool) -> int:
        """Makes the rows that are missing; returns how many of those asked for hold an error."""
        jobs, failed = [(variant, seed) for seed in seeds for variant in variants], 0
        for k, (variant, seed) in enumerate(jobs, 1):
            found = self.find(variant, seed, retry_failed)
            row = (found or self.run(variant, seed)) | {
                "label": variant.label,
                "family": variant.family,
            }
            self.record(row)
            failed += bool(row["error"])
            result = (
                f"failed: {row['error']}"
                if row["error"]
                else (
                    f"{row['seconds']:.0f} s  {row['model_bytes']:,.0f} bytes  {row['val_bpb_sliding']:.4f} bpb"
                )
            )
            already = "  (already there)" if found else ""
            print(
                f"{k} of {len(jobs)}  {variant.label}  seed {seed}  {result}{already}", flush=True
            )
        return failed


# ---- Report ------------------------------------------------------------------------------------------------


def read_results(out: Path) -> pd.DataFrame:
    """The rows so far; `name` is the label, with the variant's id where the label stands for several."""
    path = out / "results.csv"
    frame = pd.DataFrame(columns=TEXT)
    if path.is_file():
        frame = pd.read_csv(
            path,
            dtype=dict.fromkeys(TEXT, str),
            keep_default_na=False,
            na_values={column: [""] for column in (*FIGURES, "tokens", "model_bytes")},
        )
    several = frame.groupby("label")["variant"].transform("nunique") > 1
    return frame.assign(
        name=frame["label"].where(~several, frame["label"] + " #" + frame["variant"])
    )


def with_deviation(mean: float, deviation: float) -> str:
    return f"{mean:.4f}" if math.isnan(deviation) else f"{mean:.4f} ± {deviation:.4f}"


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, the best first: means over its seeds, and the standard deviation of val_bpb."""
    columns = {
        name: (name, "mean") for name in ("trained", "frozen", "model_bytes", "tokens_per_second")
    }
    columns |= {
        "n": ("seed", "size"),
        "bpb": ("val_bpb_sliding", "mean"),
        "std": ("val_bpb_sliding", "std"),
    }
    groups = frame[frame["error"] == ""].groupby(["name", "family", "budget"])
    return groups.agg(**columns).reset_index().sort_values("bpb")


def compare(frame: pd.DataFrame, a: str, b: str) -> str:
    """The paired difference in val_bpb over the seeds that both names have. UserError if there is none."""
    good = frame[frame["error"] == ""].drop_duplicates(["name", "seed"])
    scores = good.pivot(index="seed", columns="name", values="val_bpb_sliding")
    pairs = scores.reindex(columns=[a, b]).dropna().to_numpy(float).T
    if not pairs.size:
        raise UserError(f"--compare: {a!r} and {b!r} share no seed; there are: {', '.join(scores)}")
    difference = pd.Series(pairs[0] - pairs[1])
    text = f"{a} − {b}: {with_deviation(difference.mean(), difference.std())} bpb, n = {len(difference)}"
    if len(difference) > 1:
        text += f", paired t-test p = {stats.ttest_rel(*pairs).pvalue:.2g}"
    return text


def draw(table: pd.DataFrame, path: Path) -> None:
    """val_bpb against the bytes of the model file, one line a family, error bars over the seeds."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    colours, markers = plt.colormaps["tab20"].colors, "osD^v"  # 100 families look different
    for i, (family, points) in enumerate(table.sort_values("model_bytes").groupby("family")):
        axes.errorbar(
            points["model_bytes"],
            points["bpb"],
            points["std"].fillna(0),
            capsize=3,
            label=family,
            color=colours[i % len(colours)],
            marker=markers[i % len(markers)],
        )
    for point in table.itertuples():
        place = point.model_bytes, point.bpb
        axes.annotate(point.name, place, (5, 5), textcoords="offset points", fontsize=8)
    axes.set(
        xscale="log",
        xlabel="model file (bytes)",
        ylabel="validation bits per byte, artifact, sliding",
    )
    axes.margins(0.15)
    axes.grid(which="both", alpha=0.3)
    axes.legend(title="family")
    replace(path, lambda part: figure.savefig(part, format="png", dpi=150))
    plt.close(figure)


def report(out: Path, comparisons: list[tuple[str, str]]) -> None:
    """Writes table.md and bpb_vs_bytes.png from results.csv, and prints the comparisons."""
    frame = read_results(out)
    table = summarise(frame)
    lines = [
        "| variant | family | budget | n | val_bpb | trained | frozen | model bytes | tokens/s |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in table.itertuples():
        counts = [
            f"{x:,.0f}" for x in (row.trained, row.frozen, row.model_bytes, row.tokens_per_second)
        ]
        cells = [
            row.name,
            row.family,
            row.budget,
            str(row.n),
            with_deviation(row.bpb, row.std),
            *counts,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    compared = [compare(frame, a, b) for a, b in comparisons]
    notes = [
        f"{row.name}, seed {row.seed}: {row.error or row.note}"
        for row in frame.itertuples()
        if row.error or row.note
    ]
    text = "\n".join([*lines, "", *(f"- {line}" for line in compared + notes)]).rstrip() + "\n"
    replace(out / "table.md", lambda part: part.write_text(text, encoding="utf-8"))
    if len(table):
        draw(table, out / "bpb_vs_bytes.png")
    print(*compared, f"results.csv, table.md and bpb_vs_bytes.png are in {out}", sep="\n")


# ---- Main --------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder of the results")
    add("--presets", help="names in presets/, or .env files, with commas between them")
    add(
        "--set",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="another variant of each preset",
    )
    add("--plan", help="file with one line a variant: label family preset KEY=VALUE ...")
    add("--seeds", default="1337", help="whole numbers with commas between them")
    add("--budget", help="tokens=N or seconds=S of training, or bytes=N of the model file")
    add("--tokens", type=int, help="training tokens, for a budget of bytes")
    add(
        "--knob",
        metavar="KNOB[:STEP]",
        help="setting that fits the bytes; rank: R of MAP_ADAPTER=lora:R",
    )
    add("--data", help="folder of token shards; default: what data/prepare.py docs makes")
    add(
        "--script",
        type=Path,
        default=ROOT / "train_gpt.py",
        help="default: the repository's train_gpt.py",
    )
    add("--retry-failed", action="store_true", help="repeat the runs whose row is an error")
    add(
        "--report-only",
        action="store_true",
        help="run nothing, make the table and the picture again",
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
    """Does what the command line says; returns how many of its runs failed."""
    out = args.out.absolute()
    if args.report_only:
        if not (out / "results.csv").is_file():
            raise UserError(f"no results.csv in {out}")
        report(out, args.compare)
        return 0
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise UserError(f"--seeds {args.seeds}: needs whole numbers with commas between them")
    variants = read_variants(args, parse_budget(args))
    gpus, version = check(variants, args.script)
    known = {*(variant.label for variant in variants), *read_results(out)["name"]}
    if unknown := {label for pair in args.compare for label in pair} - known:
        raise UserError(
            f"--compare: no label {', '.join(unknown)}; there are: {', '.join(sorted(known))}"
        )
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:  # freed however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another ablate.py is at work in {out}") from None
        runner = Runner(out, args.script, gpus, version)
        seeds = list(dict.fromkeys(map(int, args.seeds.split(","))))
        failed = runner.run_all(variants, seeds, args.retry_failed)
        report(out, args.compare)
    return failed


def main() -> None:
    plt.switch_backend("Agg")  # needs no display
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    try:
        failed = ablate(parse_arguments())
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print(
            f"\nstopped; the same command goes on: {shlex.join(['python', *sys.argv])}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    if failed:
        raise SystemExit(
            f"{failed} of the runs failed; logs/ has their output, --retry-failed repeats them"
        )


if __name__ == "__main__":
    main()
