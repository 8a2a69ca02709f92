"""Fault injection: what a run survives, with what was lost counted.

    python bench/faults.py                                   # everything, about half an hour on one slow core
    python bench/faults.py --scale 0.02 --seed 7             # a sample of every kind
    python bench/faults.py --only kills,artifacts

Prints one table row a kind of fault. A fault is survived if what the README promises held: a run that was
interrupted ends in the very bytes of one that was not; what cannot be used is refused with one clear message,
in bounded time and memory, and the last good checkpoint still loads. The exit code is 1 if anything was lost.
Needs Linux. The artifacts, shards and checkpoints that are spoilt are read in child processes of this script.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import brotli
import numpy as np
import torch

import helpers
import train_gpt

GIB = 2**30
SLOWEST, LARGEST = 20.0, GIB  # seconds and bytes that reading one file of a stranger may take

BASE = helpers.TINY | {
    "ITERATIONS": 30,
    "EVAL_STRIDE": 32,
    "HOLDOUT_TOKENS": 512,
    "SWA_INTERVAL": 3,
    "LATE_QAT_THRESHOLD": 0.4,
    "CHECKPOINT_SECONDS": 0.01,
    "COMPILE": 0,
    "VAL_LOSS_EVERY": 20,
    "TRAIN_LOG_EVERY": 1,
}
# Together they have every state that a checkpoint must hold: optimisers, averages, dropout, teacher, stages.
VARIANTS = {
    "everything": {
        "MAP_BASIS": "orthogonal,mlp.fc=learned",
        "MAP_FREEZE": "mlp.fc=0.5",
        "DROPOUT": 0.1,
        "SELF_DISTILL": 1,
        "DISTILL_START_FRAC": 0.3,
        "DISTILL_END_FRAC": 0.8,
        "RECUR_LAYERS": 1,
    },
    "adapters": {"EMA_DECAY": 0},
    "ensemble": {"ENSEMBLE": 2, "MAP_BASIS": "learned,m1.all=orthogonal", "MAP_ADAPTER": "lora:4"},
    "sparse": {"MAP_BASIS": "hadamard", "MAP_ADAPTER": "sparse:0.1+lora:4", "MAP_SCALE": "map"},
}
USUAL = "everything"  # what is used where one is enough
MODEL_BUILT = r"^\S+ trained and "  # a line of the log


@dataclasses.dataclass
class Tally:
    """What became of the faults of one kind."""

    name: str
    injected: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)  # a description each
    landed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0  # the slowest answer to a fault
    memory: int = 0  # bytes, the most that one answer took
    skipped: list[str] = dataclasses.field(default_factory=list)  # what this machine does not allow

    def add(
        self,
        where: str,
        problems: list[str],
        seconds: float = 0.0,
        memory: int = 0,
        faults: int = 1,
    ):
        """Faults that landed at `where`; they were survived if there are no problems."""
        self.injected += faults
        self.landed[where] += faults
        self.lost += [f"{where}: {'; '.join(problems)}"] * faults if problems else []
        self.seconds, self.memory = max(self.seconds, seconds), max(self.memory, memory)

    @property
    def survived(self) -> int:
        return self.injected - len(self.lost)

    def row(self) -> str:
        where = ", ".join(f"{name} {count:,}" for name, count in sorted(self.landed.items()))
        memory = f"{self.memory / 2**20:,.0f}" if self.memory else ""
        where += "".join(f"; not possible here: {text}" for text in self.skipped)
        return (
            f"| {self.name} | {self.injected:,} | {self.survived:,} | {len(self.lost):,} |"
            f" {self.seconds:.1f} | {memory} | {where} |"
        )


# ---- Processes ---------------------------------------------------------------------------------------------

# What runs before the script's main() where a fault comes from within. argv: root, what the fault needs
PRELUDE = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
argument = sys.argv[2] if len(sys.argv) > 2 else ""
"""
EAGER = """
import inspect, train_gpt
assert "self.saving_took" in inspect.getsource(train_gpt.Trainer.run)
train_gpt.Trainer.saving_took = property(lambda self: 0.0, lambda self, value: None)  # else it saves seldom
"""
DRIVERS = {
    # Saves a checkpoint at nearly every step.
    "eager": EAGER,
    # Dies before or after the n-th operation of those that replace a file.
    "operation": EAGER
    + """
left = int(argument)
def moment():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
def mortal(function):
    def call(*args, **more):
        moment()
        result = function(*args, **more)
        moment()
        return result
    return call
os.fsync = mortal(os.fsync)
pathlib.Path.replace = mortal(pathlib.Path.replace)
""",
    # A step that lasts a minute, as where a device hangs.
    "slow": """
import train_gpt
calls, accumulate = 0, train_gpt.accumulate_gradients
def slow(*args):
    global calls
    calls += 1
    if calls == int(argument):
        time.sleep(60)
    return accumulate(*args)
train_gpt.accumulate_gradients = slow
""",
    # Not a number in the gradient of one tensor at one step (WARMUP_STEPS=0: calls are steps).
    "nan": EAGER
    + """
step, name = argument.split(":")
calls, accumulate = 0, train_gpt.accumulate_gradients
def poisoned(forward, *args):
    global calls
    calls += 1
    loss = accumulate(forward, *args)
    if calls == int(step):
        dict(forward.named_parameters())[name].grad.view(-1)[-1] = float("nan")
    return loss
train_gpt.accumulate_gradients = poisoned
""",
    "hidden": """
sys.modules[argument] = None  # an import of it now fails as if it were not installed
import train_gpt
""",
}


class Attempt:
    """A process of the script, with its output in files: a pipe that nobody reads would stop it."""

    def __init__(
        self,
        site: Site,
        settings: dict,
        fault: tuple = (),
        launcher: tuple = (),
        wrap: tuple = (),
        file_limit: int = 0,
    ):
        out, err = (site.folder / f"process-{next(site.numbers)}.{kind}" for kind in ("out", "err"))
        self.paths, self.log = (
            (out, err),
            Path(settings["OUTPUT_DIR"]) / settings["RUN_ID"] / "train.log",
        )
        self.log_began = self.log.stat().st_size if self.log.exists() else 0
        script = (*launcher, str(helpers.SCRIPT))
        if fault:
            name, *rest = fault
            code = PRELUDE + DRIVERS[name] + "\ntrain_gpt.main()\n"
            script = ("-c", code, str(ROOT), *map(str, rest))
        limit = functools.partial(
            resource.setrlimit, resource.RLIMIT_FSIZE, (file_limit, file_limit)
        )
        self.began = time.monotonic()
        with out.open("w") as to_out, err.open("w") as to_err:
            self.process = subprocess.Popen(
                [*wrap, sys.executable, *script],
                env=helpers.environment(settings),
                cwd=site.folder,
                stdout=to_out,
                stderr=to_err,
                stdin=subprocess.DEVNULL,
                preexec_fn=limit if file_limit else None,
            )

    @property
    def errors(self) -> str:
        return self.paths[1].read_text(encoding="utf-8", errors="replace")

    def new_log(self) -> str:
        """What this process wrote to the run's log."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_bytes()[self.log_began :].decode("utf-8", "replace")
        return ""

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60) -> bool:
        """Whether it came true while the process lived."""
        end = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def wait_for_log(self, pattern: str, timeout: float = 60) -> bool:
        return self.wait_for(lambda: re.search(pattern, self.new_log(), re.M) is not None, timeout)

    def end(self, timeout: float = 120) -> int | None:
        """The exit code; None of a process that had to be ended with all that it started."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            return None

    def kill(self) -> int:
        """Sends kill -9; the exit code tells whether it came in time."""
        self.process.kill()
        return self.process.wait()

    def phase(self) -> str:
        """Where the process was when it ended, from what it left."""
        log = re.sub(r"^(projected .*|\s.*)$", "", self.new_log(), flags=re.M)
        marks = (
            ("finished", r"^written: "),
            ("evaluation", r"^artifact code "),
            ("export", r"^step:(\d+)/\1 val_loss"),
            ("training", r"^(step:\d|continued after)"),
            ("preflight or warm-up", MODEL_BUILT),
        )
        found = next((name for name, pattern in marks if re.search(pattern, log, re.M)), "start")
        part = found in ("training", "export") and self.log.with_name("checkpoint.pt.part").exists()
        return "checkpointing" if part else found


def descendants(pid: int) -> list[int]:
    """Processes that this one started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [below for child in children for below in descendants(child)]


class Site:
    """A folder with a corpus, the undisturbed runs that others must end like, and everything else."""

    def __init__(self, folder: Path, corpus: helpers.Corpus | None = None):
        self.folder, self.runs, self.numbers = folder, folder / "runs", itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        self.corpus = corpus or helpers.make_corpus(folder)
        self.made: dict[str, Path] = {}
        self.durations: dict[str, float] = {}

    def settings(self, variant: str, name: str = "") -> dict:
        """Of a new run, or of the one that is named."""
        name = name or f"{variant}-{next(self.numbers)}"
        return (
            BASE
            | VARIANTS[variant]
            | self.corpus.settings
            | {"OUTPUT_DIR": self.runs, "RUN_ID": name}
        )

    def start(self, settings: dict, fault: tuple = (), **more) -> Attempt:
        return Attempt(self, settings, fault, **more)

    def undisturbed(self, variant: str = USUAL) -> Path:
        """The folder of a run that nothing happened to, made once."""
        if variant not in self.made:
            attempt = self.start(self.settings(variant, variant))
            if attempt.end() != 0:
                raise RuntimeError(f"the undisturbed run failed: {attempt.errors}")
            self.made[variant] = self.runs / variant
            self.durations[variant] = time.monotonic() - attempt.began
        return self.made[variant]

    def interrupted(self, variant: str = USUAL) -> Path:
        """The folder of a run that was killed in the midst of training, made once; has two checkpoints."""
        key = f"{variant}-interrupted"
        if key not in self.made:
            attempt = self.start(self.settings(variant, key), ("operation", 40))
            if attempt.end() != -signal.SIGKILL:
                raise RuntimeError(f"the run to interrupt ended: {attempt.errors}")
            self.made[key] = self.runs / key
        return self.made[key]

    def copy_of(self, folder: Path, variant: str = USUAL) -> dict:
        """Settings of a new run that stands where another does."""
        settings = self.settings(variant)
        shutil.copytree(folder, self.runs / settings["RUN_ID"])
        return settings

    def ends_like(self, settings: dict, variant: str = USUAL) -> list[str]:
        """Continues a run to its end; what differs from the undisturbed one."""
        folder, expected = (
            Path(settings["OUTPUT_DIR"]) / settings["RUN_ID"],
            self.undisturbed(variant),
        )
        if not (folder / "submission.json").exists():
            attempt = self.start(settings)
            code = attempt.end()
            if code != 0:
                return [f"continuing it ended with {code}: {attempt.errors[-600:]}"]
        problems = []
        if (folder / "model.int6.ptz").read_bytes() != (expected / "model.int6.ptz").read_bytes():
            problems.append("the artifact has other bytes")
        ours, theirs = (
            json.loads((path / "submission.json").read_text()) for path in (folder, expected)
        )
        problems += [
            f"{key} is {ours[key]}, not {theirs[key]}"
            for key in theirs
            if key in ("steps", "bytes_total") or re.match("val_|holdout_", key)
            if ours.get(key) != theirs[key]
        ]
        left = sorted(path.name for path in folder.glob("*.part"))
        return problems + [f"{name} was left" for name in left] + loads(folder)


def checkpoints_of(folder: Path) -> list[Path]:
    return [
        path
        for name in ("checkpoint.pt", "checkpoint.previous.pt")
        if (path := folder / name).exists()
    ]


def loads(folder: Path) -> list[str]:
    """A problem if there are checkpoints and none can be read, or what is read is not finite."""
    try:
        for path in checkpoints_of(folder):
            weights = train_gpt.read_checkpoint(path)["weights"]
            if not all(weight.isfinite().all() for weight in weights.values()):
                return [f"{path.name} is not finite"]
    except (train_gpt.UserError, KeyError) as error:
        return [f"no checkpoint loads: {error!r}"]
    return []


def clear_error(attempt: Attempt, code: int | None, *words: str) -> list[str]:
    """What is wrong with a message: there must be one, without a traceback, and it names these words."""
    errors, problems = attempt.errors, []
    first = [line for line in errors.splitlines() if line.startswith("error: ")]
    if code in (0, None):
        problems.append("hung" if code is None else "went on as if nothing had happened")
    if len(first) != 1 or "Traceback" in errors:
        problems.append(f"no clear message: {errors[-600:]!r}")
    elif code is not None and len(errors.splitlines()) > 1 + first[0].endswith(":"):
        problems.append(f"more than one line: {errors[-600:]!r}")
    return problems + [
        f"does not name {word}: {errors[-600:]!r}" for word in words if word not in errors
    ]


# ---- Interruptions -----------------------------------------------------------------------------------------

MOMENTS = ("any", "checkpointing", "export", "operation")


def kill_once(
    site: Site, settings: dict, variant: str, moment: str, draw: random.Random
) -> str | None:
    """Starts or continues a run and kills it at such a moment; where that was, None if it had ended."""
    site.undisturbed(variant)
    if moment == "operation":
        attempt = site.start(settings, ("operation", draw.randint(1, 4 * BASE["ITERATIONS"])))
        code = attempt.end()
    else:
        attempt = site.start(
            settings, ("eager",) if moment == "checkpointing" or draw.random() < 0.5 else ()
        )
        part = attempt.log.with_name("checkpoint.pt.part")
        if moment == "any":
            time.sleep(draw.uniform(0, site.durations[variant]))
        elif moment == "checkpointing":
            if attempt.wait_for_log(r"^(step:|continued after)"):
                time.sleep(draw.uniform(0, 1))
                attempt.wait_for(part.exists)
        elif attempt.wait_for_log(rf"^step:{BASE['ITERATIONS']}/\d+ val_loss"):
            time.sleep(draw.uniform(0, 0.8))
        code = attempt.kill()
    return attempt.phase() if code == -signal.SIGKILL else None


def kills(
    site: Site,
    count: int,
    seed: int,
    variants: Iterable[str] = VARIANTS,
    moments: Iterable[str] = MOMENTS,
) -> Tally:
    """kill -9 at random moments, up to three times a run; every run must end as if nothing had been."""
    draw, tally, variants = random.Random(seed), Tally("kill -9"), list(variants)
    moments, turn = itertools.cycle(moments), itertools.cycle(variants)
    while tally.injected < count:
        variant, landed, problems = next(turn), [], []
        settings = site.settings(variant)
        for _ in range(min(draw.randint(1, 3), count - tally.injected)):
            where = kill_once(site, settings, variant, next(moments), draw)
            if where is None:
                break
            landed.append(where)
            folder = site.runs / settings["RUN_ID"]
            problems += loads(folder)
        began = time.monotonic()
        problems += site.ends_like(settings, variant)
        took = time.monotonic() - began
        for where in landed:
            tally.add(
                where,
                [f"{settings['RUN_ID']}, killed in {', '.join(landed)}", *problems]
                if problems
                else [],
                took,
            )
    return tally


def signals(
    site: Site, count: int, seed: int, moments: Iterable[str] = ("training", "any", "twice")
) -> Tally:
    """SIGTERM and SIGINT at random moments, and twice in a step that lasts long."""
    draw, tally = random.Random(seed), Tally("SIGTERM, SIGINT")
    numbers = itertools.cycle((signal.SIGTERM, signal.SIGINT))
    for number, moment in zip(itertools.islice(numbers, count), itertools.cycle(moments)):
        site.undisturbed()
        settings = site.settings(USUAL)
        if moment == "twice":
            tally.add(*signal_twice(site, settings, number, draw))
            continue
        attempt = site.start(settings)
        if moment == "training":
            attempt.wait_for_log("^step:1/")
            time.sleep(draw.uniform(0, 0.5))
        else:
            time.sleep(draw.uniform(0, site.durations[USUAL]))
        if attempt.process.poll() is not None:
            continue
        attempt.process.send_signal(number)
        sent = time.monotonic()
        code, took, name = attempt.end(30), time.monotonic() - sent, number.name
        said, where, problems = attempt.errors, attempt.phase(), []
        if code == 0 and where != "finished":
            problems.append("exit code 0")
        if took > 5:
            problems.append(f"took {took:.1f} s to leave")
        if "saving after this step" in said:
            problems += clear_error_after(said, "checkpoint.pt", f"{settings['RUN_ID']}/")
            problems += loads(site.runs / settings["RUN_ID"])
        elif moment == "training":
            problems.append(f"did not save in training: {said!r}")
        problems += site.ends_like(settings)
        tally.add(f"{name} in {where}", problems, took)
    return tally


def clear_error_after(said: str, *words: str) -> list[str]:
    """What is wrong with what a stopped run says: after the line of the signal comes the error's."""
    error = [line for line in said.splitlines() if line.startswith("error: stopped")]
    if len(error) != 1 or "Traceback" in said:
        return [f"no clear message: {said!r}"]
    return [f"does not name {word}: {error[0]}" for word in words if word not in error[0]]


def signal_twice(site: Site, settings: dict, number: signal.Signals, draw: random.Random):
    """A second signal, more than a second after the first, ends a step that does not end."""
    site.undisturbed()
    step = draw.randint(5, 25)
    attempt = site.start(settings, ("slow", step + 1))  # one is the warm-up's
    attempt.wait_for_log(rf"^step:{step - 1}/")
    time.sleep(0.3)
    attempt.process.send_signal(number)
    time.sleep(1.3)
    problems = [] if attempt.process.poll() is None else ["left before its step was over"]
    attempt.process.send_signal(number)
    sent = time.monotonic()
    code, took = attempt.end(30), time.monotonic() - sent
    if code != 128 + number or took > 1:
        problems.append(
            f"the second signal ended it with {code} after {took:.1f} s: {attempt.errors!r}"
        )
    return f"{number.name} twice", problems + site.ends_like(settings), took


def ranks(
    site: Site, count: int, seed: int, modes: Iterable[str] = ("killed", "restarted", "stopped")
) -> Tally:
    """One of two processes dies, or stands still: the others must not wait for ever."""
    draw, tally = random.Random(seed), Tally("a rank of two")
    expected = json.loads((site.undisturbed() / "submission.json").read_text())["val_bpb"]
    for mode in itertools.islice(
        itertools.cycle(modes), count
    ):  # each draws its own dropout: ends near
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        launcher += ("--max-restarts=1",) if mode == "restarted" else ()
        settings = site.settings(USUAL) | {"TIMEOUT_SECONDS": 10}
        attempt, step = site.start(settings, launcher=launcher), draw.randint(2, 25)
        problems = (
            [] if attempt.wait_for_log(rf"^step:{step}/", 120) else ["never came to training"]
        )
        workers = [
            pid
            for pid in descendants(attempt.process.pid)
            if b"train_gpt.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        rank = draw.randrange(2)
        for pid in sorted(workers)[rank : rank + 1]:
            os.kill(pid, signal.SIGSTOP if mode == "stopped" else signal.SIGKILL)
        began, folder = time.monotonic(), site.runs / settings["RUN_ID"]
        code = attempt.end(150)
        took = time.monotonic() - began
        pattern = r"^(?:error: |\w*Error: ).*"  # the launcher has a traceback of its own
        said = "; ".join(re.findall(pattern, attempt.errors, re.M))
        trace = 'train_gpt.py", line' in attempt.errors
        if code is None:
            problems.append(f"still there after {took:.0f} s")
        elif mode == "restarted" and (code or not (folder / "submission.json").exists()):
            problems.append(f"did not go on by itself, exit code {code}: {said}")
        elif mode != "restarted" and (code == 0 or "error: " not in said or trace):
            problems.append(f"exit code {code}, and says: {said}")
        problems += loads(folder)
        if not (folder / "submission.json").exists():
            again = site.start(settings, launcher=launcher)
            code = again.end()
            problems += [f"continuing it ended with {code}: {again.errors[-600:]}"] if code else []
        if not problems:
            bpb = json.loads((folder / "submission.json").read_text())["val_bpb"]
            problems += (
                [f"ends with val_bpb {bpb}, not {expected}"] if abs(bpb - expected) > 0.1 else []
            )
        tally.add(f"rank {rank} {mode}", problems, took)
    return tally


def twice(site: Site, count: int, seed: int) -> Tally:
    """A second process of the same run, while the first is at it."""
    draw, tally = random.Random(seed), Tally("two runs with one RUN_ID")
    for _ in range(count):
        site.undisturbed()
        settings = site.settings(USUAL)
        first = site.start(settings, ("slow", draw.randint(2, 25)))
        first.wait_for_log(MODEL_BUILT)  # it then sleeps in a step
        began = time.monotonic()
        second = site.start(settings)
        problems = clear_error(
            second, second.end(), "another process is at this run", settings["RUN_ID"]
        )
        took = time.monotonic() - began
        if first.process.poll() is not None:
            problems.append(f"the first was disturbed: {first.errors!r}")
        first.kill()
        tally.add("refused", problems + loads(first.log.parent), took)
    return tally


# ---- Faults of files and of the machine ------------------------------------------------------------------

# In a mount namespace of its own: a small disk with the run on it, which may fill up or be read-only; what is
# left of the run is copied out. sh -c SCRIPT ROOM OPTIONS SAVED RUN FILL python …
SMALL_DISK = """
room=$1; options=$2; saved=$3; run=$4; fill=$5; shift 5
mount -t tmpfs -o "size=64m" none "$room" || exit 99
if [ -d "$saved" ]; then cp -r "$saved" "$room/$run"; fi
mount -o "remount,$options" "$room" || exit 99
if [ "$fill" ]; then
    (until grep -qs "^$fill" "$room/$run/train.log"; do sleep 0.01; done
     cat /dev/zero > "$room/fill") 2>/dev/null &
fi
"$@"; code=$?
rm -f "$room/fill"
if [ -d "$room/$run" ]; then rm -rf "$saved"; cp -r "$room/$run" "$saved"; fi
exit $code
"""


def namespaces_work() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /tmp"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def file_size_limit(site: Site, draw: random.Random) -> tuple[list[str], float]:
    """No file may grow over a size below a checkpoint's: the log or the checkpoint fails, at random."""
    saved = site.interrupted()
    settings, largest = site.copy_of(saved), (saved / "checkpoint.pt").stat().st_size
    attempt = site.start(
        settings, ("eager",), file_limit=draw.randint(largest // 10, largest - 1000)
    )
    problems = clear_error(attempt, attempt.end(), "Errno 27", "see to that file or disk")
    took = time.monotonic() - attempt.began
    return problems + loads(site.runs / settings["RUN_ID"]) + site.ends_like(settings), took


def small_disk(
    site: Site, options: str, fill: str, fresh: bool, *words: str
) -> tuple[list[str], float]:
    """A disk that is full from the start, fills up on the way, or cannot be written to."""
    settings = site.settings(USUAL) if fresh else site.copy_of(site.interrupted())
    room, saved = site.folder / "room", site.runs / settings["RUN_ID"]
    room.mkdir(exist_ok=True)
    arguments = (str(room), options, str(saved), settings["RUN_ID"], fill)
    wrap = ("unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", *arguments)
    attempt = site.start(settings | {"OUTPUT_DIR": room}, ("eager",), wrap=wrap)
    problems = clear_error(attempt, attempt.end(), *words)
    took = time.monotonic() - attempt.began
    return problems + loads(saved) + site.ends_like(settings), took


def missing_file(site: Site, draw: random.Random) -> tuple[list[str], float]:
    """Something that the settings name is not there, or is in the way."""
    gone = site.folder / "gone" / str(next(site.numbers))
    data = site.folder / f"data-{next(site.numbers)}"
    shutil.copytree(site.corpus.folder, data)
    split = draw.choice(("train", "val"))
    for path in data.glob(f"fineweb_{split}_*.bin"):
        path.unlink()
    changes, word = draw.choice(
        [
            ({"DATA_PATH": gone}, "DATA_PATH"),
            ({"DATA_PATH": data}, f"fineweb_{split}_"),
            ({"TOKENIZER_PATH": gone}, str(gone)),
            ({"TOKENIZER_PATH": site.corpus.folder}, "directory"),
            ({"OUTPUT_DIR": site.corpus.tokenizer}, str(site.corpus.tokenizer)),
            ({"DISTILL_FROM": gone}, str(gone)),
            ({"EVAL_ONLY": 1, "MODEL_PATH": gone}, str(gone)),
            ({"EXPORT_ONLY": 1, "CHECKPOINT_PATH": gone}, str(gone)),
        ]
    )
    settings = site.settings(USUAL) | changes
    attempt = site.start(settings)
    return clear_error(attempt, attempt.end(), word), time.monotonic() - attempt.began


def disk(site: Site, count: int, seed: int, only: Iterable[str] = ()) -> Tally:
    """No room, a limit on a file's size, a disk that cannot be written to, a file that is not there."""
    draw, tally = random.Random(seed), Tally("disk and files")
    cases = {
        "file size limit": lambda: file_size_limit(site, draw),
        "missing": lambda: missing_file(site, draw),
        "fills up in training": lambda: small_disk(
            site, "size=8m", "continued after", False, "Errno 28"
        ),
        "fills up in export": lambda: small_disk(site, "size=8m", "average ", False, "Errno 28"),
        "no room at the start": lambda: small_disk(
            site, "size=1m", "", True, "preflight, disk", "make room"
        ),
        "read-only": lambda: small_disk(site, "ro", "", True, "Errno 30"),
    }
    if not namespaces_work():
        cases = {
            name: case for name, case in cases.items() if name in ("file size limit", "missing")
        }
        tally.skipped.append("a small disk needs `unshare -rm`")
    for name in itertools.islice(itertools.cycle(list(only) or cases), count):
        if name in cases:
            tally.add(name, *cases[name]())
    return tally


def packages(site: Site, count: int, seed: int) -> Tally:
    """A package that is not installed: said at once, not after training."""
    tally = Tally("missing package")
    for name in itertools.islice(
        itertools.cycle(("brotli", "sentencepiece", "numpy", "torch")), count
    ):
        attempt = site.start(site.settings(USUAL), ("hidden", name))
        problems = clear_error(attempt, attempt.end(), name, "pip install")
        took = time.monotonic() - attempt.began
        problems += ["a folder was made"] if attempt.log.parent.exists() else []
        tally.add(name, problems, took)
    return tally


def not_a_number(site: Site, count: int, seed: int) -> Tally:
    """NaN in one gradient: the step and the tensor are named, and the last good checkpoint exports."""
    draw, tally = random.Random(seed), Tally("NaN in a gradient")
    weights = train_gpt.read_checkpoint(site.undisturbed() / "checkpoint.pt")["weights"]
    names = sorted(name for name in weights if "mlp.fc" not in name)  # those freeze
    for _ in range(count):
        step, name = draw.randint(2, BASE["ITERATIONS"]), draw.choice(names)
        settings = site.settings(USUAL) | {"WARMUP_STEPS": 0}
        attempt = site.start(settings, ("nan", f"{step}:{name}"))
        folder = site.runs / settings["RUN_ID"]
        words = f"step {step}: {name} not finite", "checkpoint.pt of step"
        problems = clear_error(attempt, attempt.end(), *words)
        took = time.monotonic() - attempt.began
        tally.add(
            "stopped, last checkpoint exported", problems + exports(site, folder, step - 1), took
        )
    return tally


def exports(site: Site, folder: Path, at_most: int, variant: str = USUAL) -> list[str]:
    """What is wrong with the export of a run's last checkpoint, one from the midst of training."""
    problems = loads(folder)
    settings = site.settings(variant) | {
        "EXPORT_ONLY": 1,
        "CHECKPOINT_PATH": folder / "checkpoint.pt",
    }
    attempt = site.start(settings)
    if attempt.end() != 0:
        return [*problems, f"export failed: {attempt.errors[-600:]}"]
    made = site.runs / settings["RUN_ID"]
    steps = json.loads((made / "submission.json").read_text())["steps"]
    if not 0 < steps <= at_most:
        problems.append(f"exports step {steps}, not one up to {at_most}")
    train_gpt.read_artifact((made / "model.int6.ptz").read_bytes())
    return problems


def midway(site: Site, count: int, seed: int) -> Tally:
    """EXPORT_ONLY of a checkpoint from the middle of training, of every kind of model."""
    tally = Tally("export of a checkpoint midway")
    for variant in itertools.islice(itertools.cycle(VARIANTS), count):
        began = time.monotonic()
        problems = exports(site, site.interrupted(variant), BASE["ITERATIONS"] - 1, variant)
        tally.add(variant, problems, time.monotonic() - began)
    return tally


def typos(site: Site, count: int, seed: int) -> Tally:
    """Every misspelling of every documented variable that tests/test_settings.py holds to be certain."""
    from pytest import MonkeyPatch
    from test_settings import CERTAIN_FROM, SETTINGS, misspellings, suggestions

    tally = Tally("misspelt variable")
    for name in random.Random(seed).sample(SETTINGS, min(count, len(SETTINGS))):
        kinds = [kind for kind, shortest in CERTAIN_FROM.items() if len(name) >= shortest]
        made, began = set().union(*(misspellings(name, kind) for kind in kinds)), time.monotonic()
        with MonkeyPatch.context() as patch:
            for setting in [*helpers.NOT_INHERITED]:
                patch.delenv(setting, raising=False)
            found = suggestions(patch, made)
        wrong = [f"{typo} gives {found.get(typo)}" for typo in made if found.get(typo) != name]
        tally.add("named and refused", [], time.monotonic() - began, faults=len(made) - len(wrong))
        for problem in wrong:
            tally.add("not refused", [problem])
    return tally


# ---- Files of a stranger: judged in a child process ------------------------------------------------------


class Lost(Exception):
    """A file was neither refused nor harmless."""


def status(name: str) -> int:
    """Bytes of VmRSS, VmHWM or VmSize of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(found[1])


def judge(kind: str, first: int, count: int, seed: int, folder: Path) -> None:
    """In a child: prints a line before each spoilt file and one after it, so that the parent knows which one
    a hang or a crash belongs to. `faulthandler` ends the process even where C code hangs."""
    limit = status("VmSize") + 6 * GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    make, read = JUDGES[kind](folder)
    for i in range(first, count):
        name, spoilt = make(i, random.Random(f"{seed}-{i}"))
        print(json.dumps({"began": i, "name": name}), flush=True)
        faulthandler.dump_traceback_later(3 * SLOWEST, exit=True)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before, began = status("VmRSS"), time.perf_counter()
        try:
            verdict, problem = read(spoilt), ""
        except train_gpt.UserError as error:
            verdict, problem = "refused", "" if str(error).strip() else "an empty message"
        except BaseException as error:  # whatever it is, a person would have seen a traceback
            verdict, problem = "lost", f"{type(error).__name__}: {str(error)[:300]}"
        seconds, memory = time.perf_counter() - began, status("VmHWM") - before
        faulthandler.cancel_dump_traceback_later()
        if seconds > SLOWEST or memory > LARGEST:
            problem += f" took {seconds:.1f} s and {memory / 2**20:,.0f} MiB"
        print(
            json.dumps(
                {"verdict": verdict, "problem": problem, "seconds": seconds, "memory": memory}
            ),
            flush=True,
        )


def judged(tally: Tally, kind: str, folder: Path, count: int, seed: int) -> Tally:
    """In the parent: has `count` spoilt files read, in a new child after each that ended one."""
    first = 0
    while first < count:
        command = [
            sys.executable,
            __file__,
            "--judge",
            kind,
            str(first),
            str(count),
            str(seed),
            str(folder),
        ]
        child = subprocess.run(command, capture_output=True, text=True, env=helpers.environment({}))
        lines = [json.loads(line) for line in child.stdout.splitlines()]
        for began, ended in itertools.zip_longest(lines[::2], lines[1::2]):
            if ended is None:
                ended = {
                    "verdict": "lost",
                    "seconds": 0.0,
                    "memory": 0,
                    "problem": f"the process ended with {child.returncode}: {child.stderr[-600:]}",
                }
            problems = [
                f"{began['name']} (number {began['began']}, seed {seed}): {ended['problem']}"
            ]
            problems = problems if ended["problem"] else []
            tally.add(ended["verdict"], problems, ended["seconds"], ended["memory"])
            first = began["began"] + 1
        if not lines:
            raise RuntimeError(f"the child failed: {child.stderr}")
    return tally


EVIL = [
    -1,
    0,
    1,
    7,
    2**16,
    2**26,
    2**31,
    2**63,
    2**200,
    0.5,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    True,
    False,
    None,
    "",
    "x",
    "0",
    "-1",
    "99999999999999999999",
    "lora:1",
    "all",
    "../../etc/passwd",
    "a" * 100_000,
    [],
    [[]],
    [-1],
    [2**40],
    [2**13, 2**13],
    [3, -3],
    {},
    {"x": 1},
]


def spoil_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One of the things that happen to bytes."""
    data, n = bytearray(data), len(data)
    i, j = sorted((draw.randrange(n), draw.randrange(n)))
    j = min(j, i + draw.choice((1, 4, 64, n)))
    what = draw.choice(
        ("flip", "flips", "random", "zero", "insert", "delete", "double", "swap", "cut")
    )
    if what == "flip":
        data[i] ^= 1 << draw.randrange(8)
    elif what == "flips":
        for _ in range(draw.randint(2, 40)):
            data[draw.randrange(n)] = draw.randrange(256)
    elif what == "random":
        data[i:j] = draw.randbytes(j - i)
    elif what == "zero":
        data[i:j] = bytes(j - i)
    elif what == "insert":
        data[i:i] = draw.randbytes(draw.choice((1, 2, 4, 1000)))
    elif what == "delete":
        del data[i:j]
    elif what == "double":
        data[j:j] = data[i:j]
    elif what == "swap":
        data = data[i:j] + data[:i] + data[j:]
    else:
        del data[i:]
    return f"{what} at {i} to {j}", bytes(data)


class Container:
    """An artifact in its parts, by the format's description alone; `blob` joins them, checksum right."""

    def __init__(self, blob: bytes):
        self.version, size = np.frombuffer(blob[8:16], "<u4").tolist()
        self.header, place, self.packed = (
            json.loads(brotli.decompress(blob[16 : 16 + size])),
            16 + size,
            [],
        )
        self.boundaries = [0, 8, 12, 16, place]
        for _, packed in self.header["groups"]:
            self.packed.append(blob[place : place + packed])
            place += packed
            self.boundaries.append(place)
        self.boundaries.append(len(blob))

    def blob(
        self,
        header: object = None,
        packed: list[bytes] | None = None,
        mend: bool = True,
        text: bytes | None = None,
    ) -> bytes:
        """`mend`: the sizes of the groups in the header are made right."""
        header = json.loads(json.dumps(self.header)) if header is None else header
        packed = self.packed if packed is None else packed
        if mend:
            header["groups"] = [
                [name, len(data)] for (name, _), data in zip(header["groups"], packed)
            ]
        text = brotli.compress(json.dumps(header).encode(), quality=5) if text is None else text
        numbers = np.array([self.version, len(text)], "<u4").tobytes()
        return sealed(b"RANDMAPS" + numbers + text + b"".join(packed))


def sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


@functools.cache
def zeros_packed(size: int, quality: int = 5) -> bytes:
    """So many zeros in a few bytes, packed without ever having them all."""
    compressor, block = brotli.Compressor(quality=quality, lgwin=24), bytes(2**24)
    parts = [compressor.process(block) for _ in range(size // len(block))]
    return b"".join([*parts, compressor.process(bytes(size % len(block))), compressor.finish()])


def spoil_json(value: object, draw: random.Random) -> str:
    """Changes one thing somewhere in a JSON value, in place; says what."""
    place, path = value, []
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = draw.choice(list(keys))
        path.append(key)
        inside = place[key]
        if isinstance(inside, (dict, list)) and inside and draw.random() < 0.85:
            place = inside
            continue
        break
    what = draw.choice(("replace", "replace", "replace", "delete", "number", "double"))
    if what == "delete":
        del place[key]
    elif what == "double" and isinstance(place, list):
        place.insert(draw.randrange(len(place) + 1), inside)
    elif what == "number" and type(inside) in (int, float):
        place[key] = draw.choice((inside + 1, inside - 1, 2 * inside, -inside, inside * 1000))
    else:
        place[key] = copy.deepcopy(draw.choice(EVIL))
        return f"header {path} becomes {str(place[key])[:40]}"
    return f"header {path}: {what}"


def forged(container: Container) -> dict[str, Callable[[], bytes]]:
    """Files that somebody made on purpose, each with a right checksum; made when they are read."""

    def header(**changes) -> bytes:
        return container.blob(container.header | changes)

    def model(**changes) -> bytes:
        return header(model=container.header["model"] | changes)

    def table(shape: list, groups: list[str], data: bytes, name: str = "x") -> bytes:
        parts = container.header | {"tensors": [[name, shape, groups]], "groups": [[groups[0], 0]]}
        return container.blob(parts, [data])

    def raw(text: bytes) -> bytes:
        return container.blob(text=brotli.compress(text, quality=5))

    def matching(**changes) -> bytes:
        """With a table of tensors that fits the larger model, all zeros: what is expensive comes first."""
        h = train_gpt.Hyperparameters({}, **container.header["model"] | changes)
        with torch.device("meta"):
            spaces = [(n, list(p.shape)) for n, p in train_gpt.make_model(h).state_dict().items()]
        total = sum(math.prod(shape) for _, shape in spaces)
        parts = {
            "model": h.model_settings(),
            "tensors": [[n, shape, ["a float16"]] for n, shape in spaces],
        }
        return container.blob(
            container.header | parts | {"groups": [["a float16", 0]]}, [zeros_packed(2 * total)]
        )

    nan = brotli.compress(np.array([1, np.nan], "<f2").tobytes())
    return {
        "a bomb for a header": lambda: container.blob(text=zeros_packed(2 * GIB)),
        "a bomb for a group": lambda: container.blob(
            packed=[zeros_packed(2 * GIB), *container.packed[1:]]
        ),
        "1 KB that asks for 100 GB": lambda: table(
            [160_000, 160_000], ["x codes", "x exponents"], b"\x06"
        ),
        "a product over 64 bits": lambda: table([2**25] * 9, ["x codes"], b"\x06"),
        "a shape with 0 in it": lambda: table([2**25, 2**25, 0], ["x float16"], b"\x06"),
        "a deep shape": lambda: table([1] * 5000, ["x float16"], brotli.compress(b"\0\0")),
        "as many codes as may be": lambda: table(
            [8, 2**23 - 8], ["x codes"], zeros_packed(2**26 - 64)
        ),
        "as many float16 as may be": lambda: table(
            [2**26 - 1], ["x float16"], zeros_packed(2**27 - 2)
        ),
        "as many bits as may be": lambda: table([2**26 - 1], ["x bits"], zeros_packed(2**23)),
        "bits past the limit": lambda: header(
            tensors=[[f"x{i}", [2**25], ["x bits"]] for i in range(2000)]
        ),
        "a million tensors": lambda: header(tensors=[["x", [0], ["x float16"]]] * 100_000),
        "4 MiB of brackets": lambda: raw(b"[" * (2**22 - 10)),
        "a long number": lambda: raw(
            b'{"tensors": [["x", [' + b"9" * 100_000 + b'], ["x codes"]]]}'
        ),
        "a header that is a list": lambda: raw(b"[]"),
        "no header": lambda: container.blob(text=b""),
        "no JSON": lambda: raw(b"\xff\xfe\x00"),
        "not finite": lambda: table([2], ["x float16"], nan),
        "too few tensors": lambda: header(tensors=container.header["tensors"][1:]),
        "no tensors": lambda: header(tensors=[], groups=[]),
        "a published variable": lambda: model(use_random_adapters=1),
        "a setting that is not the model's": lambda: model(output_dir="/tmp/elsewhere"),
        "its own limit": lambda: model(model_limit_bytes=2**60),
        "its own way to score": lambda: model(eval_stride=1, eval_seq_len=8),
        "an unknown setting": lambda: model(no_such_setting=1),
        "wide": lambda: model(model_dim=16_384, num_heads=256, num_kv_heads=256),
        "deep": lambda: model(num_layers=256, ve_layers="0-255"),
        "deep, many members": lambda: model(num_layers=256, ensemble=16),
        "a large vocabulary": lambda: model(vocab_size=65_536, model_dim=8192),
        "many buckets": lambda: model(bigram_vocab_size=2**24, bigram_dim=4096),
        "as large as may be": lambda: model(
            model_dim=1024, num_heads=8, num_kv_heads=8, num_layers=16
        ),
        "one map as large as may be": lambda: model(
            num_layers=1, ve_layers="0", model_dim=2304, mlp_mult=1
        ),
        "as large as may be, tensors too": lambda: matching(
            model_dim=768, num_layers=12, mlp_mult=4.0
        ),
        "sparse values without end": lambda: model(map_adapter="sparse:1"),
        "many loops": lambda: model(recur_layers="0-", recur_times=64),
        "a selector of patience": lambda: model(map_basis=",".join(["all@0-=uniform"] * 5000)),
        "another gain": lambda: model(map_gain="1e6"),
        "groups in another order": lambda: container.blob(
            container.header | {"groups": container.header["groups"][::-1]}, container.packed[::-1]
        ),
        "a group twice": lambda: container.blob(
            container.header
            | {"groups": [*container.header["groups"], container.header["groups"][0]]},
            [*container.packed, container.packed[0]],
        ),
        "negative size of a group": lambda: container.blob(
            container.header | {"groups": [["x codes", -5], *container.header["groups"]]},
            mend=False,
        ),
        "another version": lambda: sealed(container.blob()[:8] + b"\x07" + container.blob()[9:-32]),
    }


def artifact_cases(folder: Path):
    """(make, read): spoils an artifact in the i-th way; reads it as an evaluation does."""
    path = folder / "model.int6.ptz"
    whole = path.read_bytes()
    container, (header, expected) = Container(whole), train_gpt.read_artifact(whole)
    world = train_gpt.World(train_gpt.Hyperparameters({}, dtype="float32"))
    asked = train_gpt.Hyperparameters({}, eval_only=1, model_path=str(path))
    cuts = sorted({place + d for place in container.boundaries for d in (-2, -1, 0, 1, 2)})
    cuts = [cut for cut in cuts if 0 <= cut < len(whole)]
    specials = list(forged(container).items())
    # In turn, so that a small sample has some of each.
    planned = [("cut", cut) for cut in cuts] + [("cut, mended", cut) for cut in cuts]
    planned = [case for pair in itertools.zip_longest(specials, planned) for case in pair if case]

    def make(i: int, draw: random.Random) -> tuple[str, bytes]:
        if i % 2 == 0 and i // 2 < len(planned):
            name, what = planned[i // 2]
            if callable(what):
                return name, what()
            return f"{name} at {what}", sealed(whole[:what]) if "mended" in name else whole[:what]
        way = draw.choice(("bytes", "mended bytes", "header", "header", "header", "group", "codes"))
        if "bytes" in way:
            name, blob = spoil_bytes(whole[:-32] if way == "mended bytes" else whole, draw)
            return f"{way}: {name}", sealed(blob) if way == "mended bytes" else blob
        parts, packed = json.loads(json.dumps(container.header)), list(container.packed)
        if way == "header":
            names = [spoil_json(parts, draw) for _ in range(draw.choice((1, 1, 1, 2, 5)))]
            mend = draw.random() < 0.3 and type(parts.get("groups")) is list
            with contextlib.suppress(TypeError, ValueError):
                return "; ".join(names), container.blob(parts, mend=mend)
            return "; ".join(names), container.blob(parts, mend=False)
        place = draw.randrange(len(packed))
        if way == "group":
            name, packed[place] = spoil_bytes(packed[place], draw)
        else:
            name, data = spoil_bytes(brotli.decompress(packed[place]), draw)
            packed[place] = brotli.compress(data, quality=5)
        return f"{way} {parts['groups'][place][0]}: {name}", container.blob(parts, packed)

    def read(blob: bytes) -> str:
        found, tensors = train_gpt.read_artifact(blob)
        with train_gpt.distrusting("MODEL_PATH"):
            asked.adopt(found["model"], "MODEL_PATH")
        if found.get("tokenizer") != header["tokenizer"]:  # an evaluation refuses it by this
            return "refused"
        train_gpt.build_model(found, tensors, world)
        if tensors.keys() != expected.keys():
            raise Lost(f"other tensors: {sorted(tensors.keys() ^ expected.keys())[:3]}")
        for name, value in tensors.items():
            if value.shape != expected[name].shape or not value.isfinite().all():
                raise Lost(f"{name}: {tuple(value.shape)}, or not finite")
        same = all(torch.equal(value, expected[name]) for name, value in tensors.items())
        return "harmless" if same and found["model"] == header["model"] else "valid, another model"

    return make, read


def artifacts(site: Site, count: int, seed: int) -> Tally:
    """Artifacts cut, mutated and forged, with and without a right checksum."""
    return judged(Tally("artifact"), "artifact", site.undisturbed(), count, seed)


def shard_cases(folder: Path):
    """(make, read): spoils a shard; reads it as training and evaluation do."""
    corpus, tokenizer_path = folder / "shards", folder / "tokenizer.model"
    h = train_gpt.Hyperparameters(
        {},
        data_path=str(corpus),
        tokenizer_path=str(tokenizer_path),
        vocab_size=512,
        train_seq_len=32,
        train_batch_tokens=256,
        eval_seq_len=32,
        eval_stride=32,
    )
    tokenizer = train_gpt.Tokenizer(str(tokenizer_path), 512)
    wholes = {path: path.read_bytes() for path in sorted(corpus.glob("*.bin"))}

    def make(i: int, draw: random.Random) -> tuple[str, tuple[Path, bytes]]:
        path = draw.choice(list(wholes))
        data = wholes[path]
        way = draw.choice(("header", "numbers", "tokens", "outside", "cut", "bytes"))
        if way == "header":
            name, begin = spoil_bytes(data[:1024], draw)
            data = begin + data[1024:]
        elif way == "numbers":
            header, place = np.frombuffer(data[:1024], "<i4").copy(), draw.randrange(3)
            header[place] = draw.choice(
                (-1, 0, 1, 2**31 - 1, header[place] + 1, header[place] - 1, -(2**31))
            )
            name, data = f"number {place} is {header[place]}", header.tobytes() + data[1024:]
        elif way == "tokens":
            tokens = np.frombuffer(data[1024:], "<u2").copy()
            place, name = draw.randrange(len(tokens)), "another token"
            tokens[place] = draw.randrange(512)
            data = data[:1024] + tokens.tobytes()
        elif way == "outside":
            tokens = np.frombuffer(data[1024:], "<u2").copy()
            tokens[draw.randrange(len(tokens))] = draw.choice((512, 513, 65_535))
            name, data = "a token outside the vocabulary", data[:1024] + tokens.tobytes()
        elif way == "cut":
            cut = draw.choice(
                (0, 1, 11, 12, 1023, 1024, 1025, 1026, len(data) - 1, draw.randrange(2000))
            )
            name, data = f"cut at {cut}", data[:cut]
        else:
            name, data = spoil_bytes(data, draw)
        return f"{path.name}, {way}: {name}", (path, data)

    def read(spoilt: tuple[Path, bytes]) -> str:
        path, data = spoilt
        path.write_bytes(data)
        numbers = np.frombuffer(data[:12].ljust(12, b"\xff"), "<i4").tolist()
        sound = (
            numbers[:2] == [20240520, 1] and numbers[2] > 0 and len(data) == 1024 + 2 * numbers[2]
        )
        tokens = np.frombuffer(data[1024 : 1024 + 2 * numbers[2]], "<u2") if sound else np.zeros(0)
        split = "train" if "train" in path.name else "val"
        try:
            if split == "train":
                training = train_gpt.TrainingData(h)
                training.sequences(0, len(training.places))
                training.read(training.held_out)
            else:
                train_gpt.ValidationStream(h, tokenizer)
            found = train_gpt.read_shards(str(corpus), split)[list(wholes_of(split)).index(path)]
            if (
                not sound
                or not np.array_equal(found, tokens)
                or (split == "val" and tokens.max() >= 512)
            ):
                raise Lost("an unsound shard was taken")
            return "as documented"
        except train_gpt.UserError as error:
            if str(path) not in str(error) and str(corpus) not in str(error):
                raise Lost(f"names neither {path} nor its folder: {error}") from None
            if sound and split == "train" and tokens.max() < 512 and "too few" not in str(error):
                raise Lost(f"a sound shard was refused: {error}") from None
            return "refused"
        finally:
            path.write_bytes(wholes[path])

    def wholes_of(split: str) -> list[Path]:
        return [path for path in wholes if split in path.name]

    return make, read


def shards(site: Site, count: int, seed: int) -> Tally:
    """Shards with another header, length, tokens: refused by name, or they decode as documented."""
    folder = site.folder / "judged-shards"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(site.corpus.folder, folder / "shards")
    shutil.copy(site.corpus.tokenizer, folder / "tokenizer.model")
    return judged(Tally("shard"), "shard", folder, count, seed)


class Executes:
    """What a hostile pickle holds: unpickling it would make the file `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rezipped(data: bytes, change: Callable[[str, bytes], bytes], **more) -> bytes:
    """The archive with other contents of its entries, checksums right."""
    target = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(target, "w", **more) as archive,
    ):
        for entry in source.namelist():
            archive.writestr(entry, change(entry, source.read(entry)))
    return target.getvalue()


def saved_by_torch(value: object, **more) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def same(ours: object, theirs: object) -> bool:
    """Equality of what a checkpoint holds."""
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def hostile_checkpoints(whole: bytes, trap: Path) -> dict[str, Callable[[], bytes]]:
    """Files that somebody made on purpose. What would execute makes the folder `trap`."""

    def with_pickle(code: bytes) -> bytes:
        return rezipped(whole, lambda name, data: code if name.endswith("data.pkl") else data)

    def larger(name: str, data: bytes) -> bytes:
        """The pickle claims storages a thousand times as large as they are."""
        return data.replace(b"K\x20", b"M\x00\x80") if name.endswith("data.pkl") else data

    def bomb(name: str, data: bytes) -> bytes:
        return bytes(2**28) if name.endswith("/data/0") else data

    legacy = {"_use_new_zipfile_serialization": False}
    return {
        "a pickle with code": lambda: with_pickle(pickle.dumps(Executes(trap), 2)),
        "code in the old format": lambda: saved_by_torch(Executes(trap), **legacy),
        "code in torch's format": lambda: saved_by_torch({"weights": Executes(trap)}),
        "a bare pickle": lambda: pickle.dumps(Executes(trap)),
        "a zip bomb": lambda: rezipped(whole, bomb, compression=zipfile.ZIP_DEFLATED),
        "compressed": lambda: rezipped(
            whole, lambda _, data: data, compression=zipfile.ZIP_DEFLATED
        ),
        "storages that claim more": lambda: rezipped(whole, larger),
        "storages cut short": lambda: rezipped(
            whole, lambda name, data: data[: len(data) // 2] if "/data/" in name else data
        ),
        "no pickle": lambda: with_pickle(b""),
        "the old format": lambda: saved_by_torch({"weights": {}}, **legacy),
        "nothing": lambda: b"",
        "text": lambda: b"not a checkpoint\n" * 100,
        "an empty archive": lambda: b"PK\x05\x06" + bytes(18),
    }


def checkpoint_cases(folder: Path):
    """(make, read): spoils a checkpoint; reads it with the one before it beside it, and alone."""
    whole, before = (path.read_bytes() for path in checkpoints_of(folder))
    expected, older = (train_gpt.read_checkpoint(path) for path in checkpoints_of(folder))
    trial = folder / "trial"
    trial.mkdir(exist_ok=True)
    path, previous, trap = (
        trial / "checkpoint.pt",
        trial / "checkpoint.previous.pt",
        trial / "executed",
    )
    previous.write_bytes(before)
    specials = list(hostile_checkpoints(whole, trap).items())

    def make(i: int, draw: random.Random) -> tuple[str, bytes]:
        if i % 2 == 0 and i // 2 < len(specials):
            name, made = specials[i // 2]
            return name, made()
        return spoil_bytes(whole, draw)

    def read(data: bytes) -> str:
        path.write_bytes(data)
        try:
            try:
                both = train_gpt.read_checkpoint(path, previous)
            except train_gpt.UserError as error:
                raise Lost(f"the one before was not taken: {error}") from None
            if same(both, expected):
                return "harmless"
            if not same(both, older):
                raise Lost("neither this checkpoint nor the one before was read")
            train_gpt.read_checkpoint(path)
            raise Lost("it is read alone")
        finally:
            if trap.exists():
                trap.rmdir()
                raise Lost("its code was executed")

    return make, read


def checkpoints(site: Site, count: int, seed: int) -> Tally:
    """Checkpoints with other bytes, cut, with code or bombs in them; and those of other programs, as a user
    may give them to EXPORT_ONLY."""
    folder = site.folder / "judged-checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(site.interrupted(), folder)
    tally = judged(Tally("checkpoint"), "checkpoint", folder, count, seed)
    weights = {"embedding.weight": torch.zeros(3)}
    others = {
        "weights alone": weights,
        "another program's": {"model": weights, "step": 3},
        "a list": [1, 2],
    }
    for name, value in itertools.islice(others.items(), max(1, count // 20)):
        path = site.folder / "other.pt"
        torch.save(value, path)
        attempt = site.start(site.settings(USUAL) | {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": path})
        problems = clear_error(attempt, attempt.end(), str(path))
        tally.add(f"{name}, refused", problems, time.monotonic() - attempt.began)
    return tally


JUDGES = {"artifact": artifact_cases, "shard": shard_cases, "checkpoint": checkpoint_cases}

# ---- The campaign ------------------------------------------------------------------------------------------

KINDS: dict[
    str, tuple[Callable[[Site, int, int], Tally], int]
] = {  # and how many in the full campaign
    "kills": (kills, 50),
    "signals": (signals, 20),
    "disk": (disk, 24),
    "artifacts": (artifacts, 2000),
    "shards": (shards, 200),
    "checkpoints": (checkpoints, 200),
    "ranks": (ranks, 6),
    "packages": (packages, 4),
    "not_a_number": (not_a_number, 6),
    "twice": (twice, 3),
    "midway": (midway, 4),
    "typos": (typos, 1000),
}


def machine() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    name = model[1] if model else platform.machine()
    return (
        f"{os.cpu_count()} cores, {name}, Linux {platform.release()},"
        f" Python {platform.python_version()}, torch {torch.__version__}, commit {commit}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(KINDS), help="kinds with commas between: %(default)s"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the full number of faults"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--judge", nargs=5, help=argparse.SUPPRESS)  # this script's own children
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.judge:
        kind, first, count, seed, folder = asked.judge
        return judge(kind, int(first), int(count), int(seed), Path(folder))
    names = asked.only.split(",")
    if unknown := set(names) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    began, lost = time.monotonic(), []
    print(f"{machine()}, seed {asked.seed}, scale {asked.scale:g}\n")
    print(
        "| fault | injected | survived | lost | slowest, s | most memory, MiB | where it landed |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        site, tallies = Site(Path(folder)), []
        for name in names:
            function, full = KINDS[name]
            tallies.append(
                tally := function(site, max(1, math.ceil(full * asked.scale)), asked.seed)
            )
            lost += [f"{tally.name}: {text}" for text in tally.lost]
            print(tally.row(), flush=True)
    total, survived = (
        sum(getattr(tally, key) for tally in tallies) for key in ("injected", "survived")
    )
    seconds = time.monotonic() - began
    print(f"| **all** | {total:,} | {survived:,} | **{len(lost):,}** | {seconds:,.0f} in all | | |")
    if lost:
        print("\nLost:\n\n" + "\n".join(f"- {text}" for text in lost))
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
