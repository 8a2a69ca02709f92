"""Inject faults into real processes and files, and count what is lost.

    python bench/faults.py                        # everything: half an hour on one slow core
    python bench/faults.py --scale 0.02 --seed 7  # a sample of every kind
    python bench/faults.py --only kills,artifacts

Prints one table row for each kind of fault. A fault is survived if what the README promises held: a
run that was interrupted ends in the very bytes of one that was not; what cannot be used is refused
with one clear message, in bounded time and memory, and the last good checkpoint still loads. The
exit code is 1 if anything was lost. Needs Linux; everything runs on the CPU.

A fault comes from outside (signals, files, settings, a limit of the system) or, where its moment
matters, from a child process of this program, which changes a function of the script before it
runs it (FAULTS). Spoiled artifacts, shards and checkpoints are read in child processes, too.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import brotli
import forking
import numpy as np
import torch

import helpers
import train_gpt

GIB = 2**30
SLOWEST, LARGEST = 20.0, GIB  # CPU seconds and bytes that a file of a stranger may take
SLOWEST_TO_LEAVE = 20.0  # seconds that a process may take to leave after a signal

BASE = helpers.TINY | {
    "ITERATIONS": 30,
    "EVAL_STRIDE": 32,
    "SWA_ENABLED": 0,
    "EMA_DECAY": 0.9,
    "LATE_QAT_THRESHOLD": 0.4,
    "CHECKPOINT_SECONDS": 0.01,
    "VAL_LOSS_EVERY": 20,
}
# Together they have every state that a checkpoint must hold: optimizers, averages, dropout, a
# teacher, phases.
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
    "shared": {"MAP_BASIS": "shared:2", "MAP_TWIST": "permutation", "MAP_ADAPTER": "signs"},
}
USUAL = "everything"  # what is used where one is enough
OF_RANKS = "adapters"  # without dropout, which each process draws for itself
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
        problems: Sequence[str],
        seconds: float = 0.0,
        memory: int = 0,
        faults: int = 1,
    ) -> None:
        """Count faults that landed at `where`; they were survived if there are no problems."""
        self.injected += faults
        self.landed[where] += faults
        self.lost += [f"{where}: {'; '.join(problems)}"] * faults if problems else []
        self.seconds, self.memory = max(self.seconds, seconds), max(self.memory, memory)

    @property
    def survived(self) -> int:
        return self.injected - len(self.lost)

    def row(self) -> str:
        """Return the row of the printed table."""
        where = ", ".join(f"{name} {count:,}" for name, count in sorted(self.landed.items()))
        memory = f"{self.memory / 2**20:,.0f}" if self.memory else ""
        where += "".join(f"; not possible here: {text}" for text in self.skipped)
        return (
            f"| {self.name} | {self.injected:,} | {self.survived:,} | {len(self.lost):,} |"
            f" {self.seconds:.1f} | {memory} | {where} |"
        )


# ---- Faults from within: what a child process changes before it runs the script ------------------


def save_always() -> None:
    """Save a checkpoint before every step but the first; else that is done seldom."""
    plan_step = train_gpt.Trainer.plan_step

    def eager(trainer: train_gpt.Trainer) -> train_gpt.StepPlan:
        return plan_step(trainer)._replace(save=trainer.step > 0)

    train_gpt.Trainer.plan_step = eager


def die_at_operation(number: str) -> None:
    """Save always; die before or after the n-th operation of those that replace a file."""
    save_always()
    left = itertools.count(int(number) - 1, -1)

    def moment() -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def mortal(function: Callable) -> Callable:
        def call(*args, **more):
            moment()
            result = function(*args, **more)
            moment()
            return result

        return call

    os.fsync = mortal(os.fsync)
    Path.replace = mortal(Path.replace)


def hang_in_step(number: str, marker: str) -> None:
    """Let the n-th pass over batches last a minute, as where a device hangs.

    The file `marker` is made when it begins. Passes of the warm-up count.
    """
    accumulate, passes = train_gpt.accumulate_gradients, itertools.count(1)

    def slow(*args):
        if next(passes) == int(number):
            Path(marker).touch()
            time.sleep(60)
        return accumulate(*args)

    train_gpt.accumulate_gradients = slow


def poison_gradient(number: str, name: str) -> None:
    """Save always; put a NaN into the gradient of one tensor in the n-th pass over batches."""
    save_always()
    accumulate, passes = train_gpt.accumulate_gradients, itertools.count(1)

    def poisoned(forward, *args):
        loss = accumulate(forward, *args)
        if next(passes) == int(number):
            dict(forward.named_parameters())[name].grad.view(-1)[-1] = math.nan
        return loss

    train_gpt.accumulate_gradients = poisoned


FAULTS = {
    "eager": save_always,
    "operation": die_at_operation,
    "hang": hang_in_step,
    "nan": poison_gradient,
}


# ---- Processes -----------------------------------------------------------------------------------


class Attempt:
    """A process of the script, with its output in files: a pipe that nobody reads would stop it."""

    def __init__(
        self,
        site: Site,
        settings: dict,
        fault: Sequence = (),
        launcher: Sequence[str] = (),
        wrap: Sequence[str] = (),
        file_limit: int = 0,
        fresh: bool = False,
    ) -> None:
        number = next(site.numbers)
        self.paths = [site.folder / f"process-{number}.{kind}" for kind in ("out", "err")]
        self.log = Path(settings["OUTPUT_DIR"]) / settings["RUN_ID"] / "train.log"
        self.log_began = self.log.stat().st_size if self.log.exists() else 0
        script = [__file__, "--fault", *map(str, fault)] if fault else [str(helpers.SCRIPT)]
        environment = helpers.environment(settings)
        self.began = time.monotonic()
        if site.forks and not (wrap or fresh):
            server = helpers.fork_server()
            words = forking.forked_words([*launcher, *script])
            self.process = server.start(words, environment, site.folder, self.paths, file_limit)
            return
        limit = functools.partial(
            resource.setrlimit, resource.RLIMIT_FSIZE, (file_limit, file_limit)
        )
        with self.paths[0].open("w") as out, self.paths[1].open("w") as err:
            self.process = subprocess.Popen(
                [*wrap, sys.executable, *launcher, *script],
                env=environment,
                cwd=site.folder,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                preexec_fn=limit if file_limit else None,
            )

    @property
    def errors(self) -> str:
        return self.paths[1].read_text(encoding="utf-8", errors="replace")

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.began

    def new_log(self) -> str:
        """Return what this process wrote to the run's log."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_bytes()[self.log_began :].decode("utf-8", "replace")
        return ""

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60) -> bool:
        """Return whether it came true while the process lived."""
        end = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.02)
        return False

    def wait_for_log(self, pattern: str, timeout: float = 60) -> bool:
        return self.wait_for(lambda: re.search(pattern, self.new_log(), re.M) is not None, timeout)

    def end(self, timeout: float = 120) -> int | None:
        """Return the exit code; None of a process that had to be ended with all it started."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            return None

    def kill(self) -> int:
        """Send kill -9; the exit code tells whether it came in time."""
        self.process.kill()
        return self.process.wait()

    def where_it_ended(self) -> str:
        """Return the part of the job in which the process ended, from what it left."""
        log = re.sub(r"^(projected .*|\s.*)$", "", self.new_log(), flags=re.M)
        marks = (
            ("finished", r"^written: "),
            ("evaluation", r"^artifact code "),
            ("export", r"^step:(\d+)/\1 val_loss"),
            ("training", r"^(step:\d|continued after)"),
            ("preflight or warm-up", MODEL_BUILT),
        )
        found = next((name for name, pattern in marks if re.search(pattern, log, re.M)), "start")
        part = self.log.with_name("checkpoint.pt.part")
        return "checkpointing" if found in ("training", "export") and part.exists() else found


def descendants(pid: int) -> list[int]:
    """Return the processes that this one started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [below for child in children for below in descendants(child)]


class Site:
    """A folder with a corpus, the undisturbed runs that others must end like, and all the rest.

    Processes are forks of one that has imported torch, if `forks` says so: that takes less time.
    """

    def __init__(
        self, folder: Path, corpus: helpers.Corpus | None = None, forks: bool = False
    ) -> None:
        self.forks = forks
        self.folder, self.runs, self.numbers = folder, folder / "runs", itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        self.corpus = corpus or helpers.make_corpus(folder)
        self.made: dict[str, Path] = {}
        self.durations: dict[str, float] = {}

    def settings(self, variant: str, name: str = "") -> dict:
        """Return the settings of a new run, or of the one that is named."""
        name = name or f"{variant}-{next(self.numbers)}"
        own = {"OUTPUT_DIR": self.runs, "RUN_ID": name}
        return BASE | VARIANTS[variant] | self.corpus.settings | own

    def start(self, settings: dict, fault: Sequence = (), **more) -> Attempt:
        return Attempt(self, settings, fault, **more)

    def undisturbed(self, variant: str = USUAL) -> Path:
        """Return the folder of a run that nothing happened to, made once."""
        if variant not in self.made:
            attempt = self.start(self.settings(variant, variant))
            if attempt.end() != 0:
                raise RuntimeError(f"the undisturbed run failed: {attempt.errors}")
            self.made[variant] = self.runs / variant
            self.durations[variant] = attempt.seconds
        return self.made[variant]

    def interrupted(self, variant: str = USUAL) -> Path:
        """Return the folder of a run that was killed amid training, with two checkpoints."""
        key = f"{variant}-interrupted"
        if key not in self.made:
            attempt = self.start(self.settings(variant, key), ("operation", 40))
            if attempt.end() != -signal.SIGKILL:
                raise RuntimeError(f"the run to interrupt ended: {attempt.errors}")
            self.made[key] = self.runs / key
        return self.made[key]

    def copy_of(self, folder: Path, variant: str = USUAL) -> dict:
        """Return the settings of a new run that is where another is."""
        settings = self.settings(variant)
        shutil.copytree(folder, self.runs / settings["RUN_ID"])
        return settings

    def ends_like(self, settings: dict, variant: str = USUAL) -> list[str]:
        """Continue a run to its end; return what differs from the undisturbed one."""
        folder = Path(settings["OUTPUT_DIR"]) / settings["RUN_ID"]
        expected = self.undisturbed(variant)
        if not (folder / "results.json").exists():
            attempt = self.start(settings)
            code = attempt.end()
            if code != 0:
                return [f"continuing it ended with {code}: {attempt.errors[-600:]}"]
        problems = []
        if (folder / "model.int6.ptz").read_bytes() != (expected / "model.int6.ptz").read_bytes():
            problems.append("the artifact has other bytes")
        ours, theirs = results_of(folder), results_of(expected)
        for key in theirs:
            matters = key in ("steps", "bytes_model") or key.startswith(("val_", "holdout_"))
            if matters and ours.get(key) != theirs[key]:
                problems.append(f"{key} is {ours.get(key)}, not {theirs[key]}")
        left = sorted(path.name for path in folder.glob("*.part"))
        return problems + [f"{name} was left" for name in left] + loads(folder)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def checkpoints_of(folder: Path) -> list[Path]:
    """Return a run's checkpoints, the newest first."""
    paths = [folder / "checkpoint.pt", folder / "checkpoint.previous.pt"]
    return [path for path in paths if path.exists()]


def loads(folder: Path) -> list[str]:
    """Return a problem if there are checkpoints and one is torn, or holds what is not finite."""
    try:
        for path in checkpoints_of(folder):
            weights = train_gpt.Checkpoint.read(path).weights
            if not all(weight.isfinite().all() for weight in weights.values()):
                return [f"{path.name} is not finite"]
    except train_gpt.UserError as error:
        return [f"no checkpoint loads: {error!r}"]
    return []


def clear_error(attempt: Attempt, code: int | None, *words: str) -> list[str]:
    """Return what is wrong with a message.

    There must be one, without a traceback, and it names these words.
    """
    errors, problems = attempt.errors, []
    first = [line for line in errors.splitlines() if line.startswith("error: ")]
    if code in (0, None):
        problems.append("hung" if code is None else "went on as if nothing had happened")
    if len(first) != 1 or "Traceback" in errors:
        problems.append(f"no clear message: {errors[-600:]!r}")
    elif code is not None and len(errors.splitlines()) > 1 + first[0].endswith(":"):
        problems.append(f"more than one line: {errors[-600:]!r}")
    missing = [word for word in words if word not in errors]
    return problems + [f"does not name {word}: {errors[-600:]!r}" for word in missing]


# ---- Interruptions -------------------------------------------------------------------------------

MOMENTS = ("any", "checkpointing", "export", "operation")


def kill_once(
    site: Site, settings: dict, variant: str, moment: str, draw: random.Random
) -> str | None:
    """Start or continue a run and kill it at such a moment; return where, None if it had ended."""
    site.undisturbed(variant)
    if moment == "operation":
        attempt = site.start(settings, ("operation", draw.randint(1, 4 * BASE["ITERATIONS"])))
        code = attempt.end()
    else:
        is_eager = moment == "checkpointing" or draw.random() < 0.5
        attempt = site.start(settings, ("eager",) if is_eager else ())
        wait_for_moment(attempt, moment, site.durations[variant], draw)
        code = attempt.kill()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run to kill ended with {code}: {attempt.errors}")
    return attempt.where_it_ended() if code else None


def wait_for_moment(attempt: Attempt, moment: str, duration: float, draw: random.Random) -> None:
    """Wait for a moment of a run, and then a random time."""
    if moment == "any":
        time.sleep(draw.uniform(0, duration))
    elif moment == "checkpointing":
        if attempt.wait_for_log(r"^(step:|continued after)"):
            time.sleep(draw.uniform(0, 1))
            attempt.wait_for(attempt.log.with_name("checkpoint.pt.part").exists)
    elif attempt.wait_for_log(rf"^step:{BASE['ITERATIONS']}/\d+ val_loss"):
        time.sleep(draw.uniform(0, 0.8))


def kills(
    site: Site,
    count: int,
    seed: int,
    variants: Iterable[str] = VARIANTS,
    moments: Iterable[str] = MOMENTS,
) -> Tally:
    """Send kill -9 at random moments, up to three times a run; it must end as if nothing was."""
    draw, tally = random.Random(seed), Tally("kill -9")
    moments, turn = itertools.cycle(moments), itertools.cycle(variants)
    while tally.injected < count:
        variant, landed, problems = next(turn), [], []
        settings = site.settings(variant)
        for _ in range(min(draw.randint(1, 3), count - tally.injected)):
            where = kill_once(site, settings, variant, next(moments), draw)
            if where is None:
                break
            landed.append(where)
            problems += loads(site.runs / settings["RUN_ID"])
        began = time.monotonic()
        problems += site.ends_like(settings, variant)
        seconds = time.monotonic() - began
        if problems:
            problems.insert(0, f"{settings['RUN_ID']}, killed in {', '.join(landed)}")
        for where in landed:
            tally.add(where, problems, seconds)
    return tally


def signals(
    site: Site, count: int, seed: int, moments: Iterable[str] = ("training", "any", "twice")
) -> Tally:
    """Send SIGTERM and SIGINT at random moments, and twice in a step that lasts long."""
    draw, tally = random.Random(seed), Tally("SIGTERM, SIGINT")
    turn = zip(
        itertools.cycle((signal.SIGTERM, signal.SIGINT)), itertools.cycle(moments), strict=False
    )
    for number, moment in itertools.islice(turn, count):
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
        if attempt.process.poll() is None:
            tally.add(*signal_once(site, attempt, settings, number, moment))
    return tally


def signal_once(
    site: Site, attempt: Attempt, settings: dict, number: signal.Signals, moment: str
) -> tuple[str, list[str], float]:
    """Send a signal; return where it landed, the problems, and the seconds until it left."""
    attempt.process.send_signal(number)
    sent = time.monotonic()
    code, seconds = attempt.end(30), time.monotonic() - sent
    said, where, problems = attempt.errors, attempt.where_it_ended(), []
    if code == 0 and where != "finished":
        problems.append("exit code 0")
    if seconds > SLOWEST_TO_LEAVE:
        problems.append(f"took {seconds:.1f} s to leave")
    if "saving after this step" in said:
        problems += clear_error_after(said, "checkpoint.pt", f"{settings['RUN_ID']}/")
        problems += loads(site.runs / settings["RUN_ID"])
    elif moment == "training" and where == "training":
        problems.append(f"did not save in training: {said!r}")
    problems += site.ends_like(settings)
    return f"{number.name} in {where}", problems, seconds


def clear_error_after(said: str, *words: str) -> list[str]:
    """Return what is wrong with what a stopped run says after the line of the signal."""
    error = [line for line in said.splitlines() if line.startswith("error: stopped")]
    if len(error) != 1 or "Traceback" in said:
        return [f"no clear message: {said!r}"]
    return [f"does not name {word}: {error[0]}" for word in words if word not in error[0]]


def signal_twice(
    site: Site, settings: dict, number: signal.Signals, draw: random.Random
) -> tuple[str, list[str], float]:
    """Send a second signal, more than a second after the first, in a step that does not end."""
    site.undisturbed()
    marker = site.folder / f"hangs-{settings['RUN_ID']}"
    attempt = site.start(settings, ("hang", draw.randint(6, 26), marker))
    attempt.wait_for(marker.exists)
    attempt.process.send_signal(number)
    heard = attempt.wait_for(lambda: "saving after this step" in attempt.errors)
    problems = [] if heard else ["the first signal was not heard, or ended it"]
    time.sleep(1.1)  # one that follows sooner is taken for a copy of the first
    attempt.process.send_signal(number)
    sent = time.monotonic()
    code, seconds = attempt.end(30), time.monotonic() - sent
    if code != 128 + number or seconds > SLOWEST_TO_LEAVE:
        said = f"with {code} after {seconds:.1f} s: {attempt.errors!r}"
        problems.append(f"the second signal ended it {said}")
    return f"{number.name} twice", problems + site.ends_like(settings), seconds


def ranks(
    site: Site, count: int, seed: int, modes: Iterable[str] = ("killed", "restarted", "stopped")
) -> Tally:
    """Let one of two processes die or stop: the others must not wait for ever."""
    draw, tally = random.Random(seed), Tally("a rank of two")
    for mode in itertools.islice(itertools.cycle(modes), count):
        tally.add(*disturb_rank(site, mode, draw.randint(2, 25), draw.randrange(2)))
    return tally


def disturb_rank(site: Site, mode: str, step: int, rank: int) -> tuple[str, list[str], float]:
    """Disturb one of two processes after a step; return what, the problems, and seconds."""
    launcher = helpers.TWO_PROCESSES + (("--max-restarts=1",) if mode == "restarted" else ())
    settings = site.settings(OF_RANKS) | {"TIMEOUT_SECONDS": 10}
    folder = site.runs / settings["RUN_ID"]
    attempt = site.start(settings, launcher=launcher)
    problems = []
    if not attempt.wait_for_log(rf"^step:{step}/", 120):
        problems.append("never came to training")
    for pid in workers_of(attempt)[rank : rank + 1]:
        os.kill(pid, signal.SIGSTOP if mode == "stopped" else signal.SIGKILL)
    began = time.monotonic()
    code = attempt.end(150)
    seconds = time.monotonic() - began
    # The launcher has a traceback of its own.
    said = "; ".join(re.findall(r"^(?:error: |\w*Error: ).*", attempt.errors, re.M))
    has_trace = 'train_gpt.py", line' in attempt.errors
    is_finished = (folder / "results.json").exists()
    if code is None:
        problems.append(f"still there after {seconds:.0f} s")
    elif mode == "restarted" and (code or not is_finished):
        problems.append(f"did not go on by itself, exit code {code}: {said}")
    elif mode != "restarted" and (code == 0 or "error: " not in said or has_trace):
        problems.append(f"exit code {code}, and says: {said}")
    problems += loads(folder)
    if not is_finished:
        problems += ends_by_itself(site, settings, launcher)
    return f"rank {rank} {mode}", problems or scores_near(site, folder), seconds


def workers_of(attempt: Attempt) -> list[int]:
    """Return the processes of the script that a launcher started, the eldest first."""
    workers = []
    for pid in sorted(descendants(attempt.process.pid)):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"train_gpt.py" in command or b"forking.py" in command:  # forks keep its command
                workers.append(pid)
    return workers


def ends_by_itself(site: Site, settings: dict, launcher: Sequence[str]) -> list[str]:
    """Continue a run of several processes; return a problem if it fails."""
    again = site.start(settings, launcher=launcher)
    code = again.end()
    return [f"continuing it ended with {code}: {again.errors[-600:]}"] if code else []


def scores_near(site: Site, folder: Path) -> list[str]:
    """Return a problem if a run's score is not that of one process, which adds in another order."""
    undisturbed = site.undisturbed(OF_RANKS)
    bpb, expected = (results_of(path)["val_bpb"] for path in (folder, undisturbed))
    return [f"ends with val_bpb {bpb}, not {expected}"] if abs(bpb - expected) > 0.01 else []


def twice(site: Site, count: int, seed: int) -> Tally:
    """Start a second process of the same run, while the first is at it."""
    tally = Tally("two runs with one RUN_ID")
    for _ in range(count):
        settings = site.settings(USUAL)
        first = site.start(settings)
        first.wait_for_log(MODEL_BUILT)
        first.process.send_signal(signal.SIGSTOP)  # so that it is not over before the second comes
        second = site.start(settings)
        code, words = second.end(), ("another process is using this run", settings["RUN_ID"])
        problems = clear_error(second, code, *words)
        if first.process.poll() is not None:
            problems.append(f"the first was disturbed: {first.errors!r}")
        first.process.send_signal(signal.SIGCONT)
        if first.end() != 0:
            problems.append(f"the first did not end well: {first.errors!r}")
        tally.add("refused", problems + site.ends_like(settings), second.seconds)
    return tally


# ---- Faults of files and of the machine ----------------------------------------------------------

# In a mount namespace of its own: a small disk with the run on it, which may fill up or be
# read-only; what is left of the run is copied out.
# sh -c SCRIPT ROOM OPTIONS SAVED RUN FILL python …
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
    """Let no file grow over a size below a checkpoint's: the log or the checkpoint fails."""
    saved = site.interrupted()
    settings, largest = site.copy_of(saved), (saved / "checkpoint.pt").stat().st_size
    limit = draw.randint(largest // 10, largest - 1000)
    attempt = site.start(settings, ("eager",), file_limit=limit)
    problems = clear_error(attempt, attempt.end(), "Errno 27", "disk")
    seconds = attempt.seconds
    return problems + loads(site.runs / settings["RUN_ID"]) + site.ends_like(settings), seconds


def small_disk(
    site: Site, options: str, fill: str, fresh: bool, *words: str
) -> tuple[list[str], float]:
    """Use a disk that is full from the start, fills up on the way, or cannot be written to."""
    settings = site.settings(USUAL) if fresh else site.copy_of(site.interrupted())
    room, saved = site.folder / "room", site.runs / settings["RUN_ID"]
    room.mkdir(exist_ok=True)
    arguments = (str(room), options, str(saved), settings["RUN_ID"], fill)
    wrap = ("unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", *arguments)
    attempt = site.start(settings | {"OUTPUT_DIR": room}, ("eager",), wrap=wrap)
    problems = clear_error(attempt, attempt.end(), *words)
    seconds = attempt.seconds
    return problems + loads(saved) + site.ends_like(settings), seconds


def missing_file(site: Site, draw: random.Random) -> tuple[list[str], float]:
    """Name in the settings what is not there, or is in the way."""
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
            ({"DISTILL_FROM": gone, "SELF_DISTILL": 0}, str(gone)),
            ({"EVAL_ONLY": 1, "MODEL_PATH": gone}, str(gone)),
            ({"EXPORT_ONLY": 1, "CHECKPOINT_PATH": gone}, str(gone)),
        ]
    )
    attempt = site.start(site.settings(USUAL) | changes)
    return clear_error(attempt, attempt.end(), word), attempt.seconds


def disk(site: Site, count: int, seed: int, only: Iterable[str] = ()) -> Tally:
    """Give no room, a limit on a file's size, a disk that is read-only, a file that is missing."""
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
        cases = {name: cases[name] for name in ("file size limit", "missing")}
        tally.skipped.append("a small disk needs `unshare -rm`")
    for name in itertools.islice(itertools.cycle(list(only) or cases), count):
        if name in cases:
            tally.add(name, *cases[name]())
    return tally


def packages(site: Site, count: int, seed: int) -> Tally:
    """Hide a package: that is said at once, not after training."""
    tally = Tally("missing package")
    names = itertools.cycle(("brotli", "sentencepiece", "numpy", "torch"))
    for name in itertools.islice(names, count):
        folder = site.folder / f"without-{name}"
        folder.mkdir(exist_ok=True)  # found first, it stands where the package would be
        problem = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        (folder / f"{name}.py").write_text(problem)
        attempt = site.start(site.settings(USUAL) | {"PYTHONPATH": folder}, fresh=True)
        problems = clear_error(attempt, attempt.end(), name, "pip install")
        problems += ["a folder was made"] if attempt.log.parent.exists() else []
        tally.add(name, problems, attempt.seconds)
    return tally


def not_a_number(site: Site, count: int, seed: int) -> Tally:
    """Put NaN into one gradient: step and tensor are named, the last good checkpoint exports."""
    draw, tally = random.Random(seed), Tally("NaN in a gradient")
    saved = train_gpt.Checkpoint.read(site.undisturbed() / "checkpoint.pt")
    names = sorted(name for name in saved.weights if "mlp.fc" not in name)  # those freeze
    for _ in range(count):
        step, name = draw.randint(2, BASE["ITERATIONS"]), draw.choice(names)
        settings = site.settings(USUAL) | {"WARMUP_STEPS": 0}  # so that passes are steps
        attempt = site.start(settings, ("nan", step, name))
        words = f"step {step}: {name} not finite", "checkpoint.pt of step"
        problems = clear_error(attempt, attempt.end(), *words)
        seconds = attempt.seconds
        problems += exports(site, site.runs / settings["RUN_ID"], step - 1)
        tally.add("stopped, last checkpoint exported", problems, seconds)
    return tally


def exports(site: Site, folder: Path, at_most: int, variant: str = USUAL) -> list[str]:
    """Return what is wrong with the export of a run's last checkpoint, one from mid-training."""
    problems = loads(folder)
    checkpoint = {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": folder / "checkpoint.pt"}
    settings = site.settings(variant) | checkpoint
    attempt = site.start(settings)
    if attempt.end() != 0:
        return [*problems, f"export failed: {attempt.errors[-600:]}"]
    made = site.runs / settings["RUN_ID"]
    steps = results_of(made)["steps"]
    if not 0 < steps <= at_most:
        problems.append(f"exports step {steps}, not one up to {at_most}")
    train_gpt.read_artifact((made / "model.int6.ptz").read_bytes())
    return problems


def midway(site: Site, count: int, seed: int) -> Tally:
    """Export a checkpoint from the middle of training, of every kind of model."""
    tally = Tally("export of a checkpoint midway")
    for variant in itertools.islice(itertools.cycle(VARIANTS), count):
        began = time.monotonic()
        problems = exports(site, site.interrupted(variant), BASE["ITERATIONS"] - 1, variant)
        tally.add(variant, problems, time.monotonic() - began)
    return tally


def typos(site: Site, count: int, seed: int) -> Tally:
    """Misspell every documented variable as tests/test_settings.py holds to be certain."""
    from test_settings import CERTAIN_FROM, SETTINGS, misspellings, suggestions

    tally = Tally("misspelled variable")
    for name in random.Random(seed).sample(SETTINGS, min(count, len(SETTINGS))):
        began, made = time.monotonic(), set()
        for kind, shortest in CERTAIN_FROM.items():
            if len(name) >= shortest:
                made |= misspellings(name, kind)
        found = suggestions(made)
        # BETAX is as near to one as to the other.
        right = {"BETA1", "BETA2"} if name in ("BETA1", "BETA2") else {name}
        wrong = [typo for typo in made if found.get(typo) not in right]
        tally.add("named and refused", [], time.monotonic() - began, faults=len(made) - len(wrong))
        for typo in wrong:
            tally.add("not refused", [f"{typo} gives {found.get(typo)}"])
    return tally


# ---- Files of a stranger: judged in a child process ----------------------------------------------


class LostError(Exception):
    """A file was neither refused nor harmless."""


def status(name: str) -> int:
    """Return VmRSS, VmHWM or VmSize of this process in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(found[1])


def judge(kind: str, first: int, count: int, seed: int, folder: Path) -> None:
    """In a child: read spoiled files, with a printed line before and after each.

    So the parent knows which one a hang or a crash belongs to. `faulthandler` ends the process even
    where C code hangs.
    """
    limit = status("VmSize") + 6 * GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    make, read = JUDGES[kind](folder)
    for i in range(first, count):
        name, spoiled = make(i, random.Random(f"{seed}-{i}"))
        print(json.dumps({"began": i, "name": name}), flush=True)
        faulthandler.dump_traceback_later(3 * SLOWEST, exit=True)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before, began = status("VmRSS"), time.process_time()
        verdict, problem = verdict_of(read, spoiled)
        seconds, memory = time.process_time() - began, status("VmHWM") - before
        faulthandler.cancel_dump_traceback_later()
        if seconds > SLOWEST or memory > LARGEST:
            problem += f" took {seconds:.1f} s and {memory / 2**20:,.0f} MiB"
        found = {"verdict": verdict, "problem": problem, "seconds": seconds, "memory": memory}
        print(json.dumps(found), flush=True)


def verdict_of(read: Callable[[object], str], spoiled: object) -> tuple[str, str]:
    """Return what became of a spoiled file, and a problem or nothing."""
    try:
        return read(spoiled), ""
    except train_gpt.UserError as error:
        return "refused", "" if str(error).strip() else "an empty message"
    except BaseException as error:  # whatever it is, a person would have seen a traceback
        return "lost", f"{type(error).__name__}: {str(error)[:300]}"


def judged(site: Site, tally: Tally, kind: str, folder: Path, count: int, seed: int) -> Tally:
    """In the parent: have `count` spoiled files read, in a new child after each that ended one."""
    first = 0
    while first < count:
        arguments = ["--judge", kind, str(first), str(count), str(seed), str(folder)]
        child = helpers.start({}, script=__file__, arguments=arguments, fresh=not site.forks)
        out, err = child.communicate()
        lines = [json.loads(line) for line in out.splitlines()]
        if not lines:
            raise RuntimeError(f"the child failed: {err}")
        crash = f"the process ended with {child.returncode}: {err[-600:]}"
        died = {"verdict": "lost", "seconds": 0.0, "memory": 0, "problem": crash}
        for began, ended in itertools.zip_longest(lines[::2], lines[1::2], fillvalue=died):
            where = f"{began['name']} (number {began['began']}, seed {seed})"
            problems = [f"{where}: {ended['problem']}"] if ended["problem"] else []
            tally.add(ended["verdict"], problems, ended["seconds"], ended["memory"])
            first = began["began"] + 1
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
    "shared:99",
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


def flip_bytes(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(2, 40)):
        data[draw.randrange(len(data))] = draw.randrange(256)


def swap_parts(data: bytearray, i: int, j: int) -> None:
    data[:] = data[i:j] + data[:i] + data[j:]


def spoil_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Do one of the things that happen to bytes; return what, and the bytes."""
    data, n = bytearray(data), len(data)
    i, j = sorted((draw.randrange(n), draw.randrange(n)))
    j = min(j, i + draw.choice((1, 4, 64, n)))
    ways = {
        "flip": lambda: data.__setitem__(i, data[i] ^ 1 << draw.randrange(8)),
        "flips": lambda: flip_bytes(data, draw),
        "random": lambda: data.__setitem__(slice(i, j), draw.randbytes(j - i)),
        "zero": lambda: data.__setitem__(slice(i, j), bytes(j - i)),
        "insert": lambda: data.__setitem__(slice(i, i), draw.randbytes(draw.choice((1, 4, 1000)))),
        "delete": lambda: data.__delitem__(slice(i, j)),
        "double": lambda: data.__setitem__(slice(j, j), data[i:j]),
        "swap": lambda: swap_parts(data, i, j),
        "cut": lambda: data.__delitem__(slice(i, None)),
    }
    what = draw.choice(list(ways))
    ways[what]()
    return f"{what} at {i} to {j}", bytes(data)


class Container:
    """An artifact in its parts, by the format's description alone; `blob` joins them again."""

    def __init__(self, blob: bytes) -> None:
        self.version, size = np.frombuffer(blob[8:16], "<u4").tolist()
        place = 16 + size
        self.header = json.loads(brotli.decompress(blob[16:place]))
        self.edges = [0, 8, 12, 16, place]  # where one part ends and the next begins
        self.blocks: list[list[bytes]] = []  # of each group
        for _, lengths in self.header["groups"]:
            self.blocks.append([])
            for length in lengths:
                self.blocks[-1].append(blob[place : place + length])
                place += length
                self.edges.append(place)
        if place + 32 != len(blob):
            raise ValueError(f"the blocks end at {place} of {len(blob)} bytes")
        self.edges.append(len(blob))

    def groups(self) -> dict[str, bytes]:
        """Return each group's values as byte planes."""
        names = [name for name, _ in self.header["groups"]]
        planes = [b"".join(map(brotli.decompress, blocks)) for blocks in self.blocks]
        return dict(zip(names, planes, strict=True))

    def blob(
        self,
        header: object = None,
        blocks: list[list[bytes]] | None = None,
        mend: bool = True,
        text: bytes | None = None,
    ) -> bytes:
        """Return an artifact with a right checksum.

        Args:
            header: instead of the own one.
            blocks: instead of the own ones.
            mend: make the sizes of the blocks right in the header.
            text: the compressed header, instead of all that.
        """
        header = json.loads(json.dumps(self.header)) if header is None else header
        blocks = self.blocks if blocks is None else blocks
        if mend:
            pairs = zip(header["groups"], blocks, strict=False)  # some may be left out on purpose
            header["groups"] = [[name, list(map(len, group))] for (name, _), group in pairs]
        text = brotli.compress(json.dumps(header).encode(), quality=5) if text is None else text
        numbers = np.array([self.version, len(text)], "<u4").tobytes()
        return sealed(b"RANDMAPS" + numbers + text + b"".join(itertools.chain(*blocks)))


def sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


@functools.cache
def zeros_packed(size: int, quality: int = 5) -> bytes:
    """Return so many zeros in a few bytes, packed without ever having them all."""
    compressor, block = brotli.Compressor(quality=quality, lgwin=24), bytes(2**24)
    parts = [compressor.process(block) for _ in range(size // len(block))]
    return b"".join([*parts, compressor.process(bytes(size % len(block))), compressor.finish()])


def random_place(value: object, draw: random.Random) -> tuple[object, object, list]:
    """Return a container within a JSON value, a key in it, and the path to that."""
    place, path = value, []
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = draw.choice(list(keys))
        path.append(key)
        inside = place[key]
        goes_on = isinstance(inside, (dict, list)) and inside and draw.random() < 0.85
        if not goes_on:
            return place, key, path
        place = inside


def spoil_json(value: object, draw: random.Random) -> str:
    """Change one thing somewhere in a JSON value, in place; return what."""
    place, key, path = random_place(value, draw)
    inside = place[key]
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
    """Return files that somebody made on purpose, each with a right checksum.

    They are made when they are read.
    """

    def header(**changes) -> bytes:
        return container.blob(container.header | changes)

    def model(**changes) -> bytes:
        return header(model=container.header["model"] | changes)

    def table(shape: list, groups: list[str], data: bytes, name: str = "x") -> bytes:
        parts = {"tensors": [[name, shape, groups]], "groups": [[groups[0], []]]}
        return container.blob(container.header | parts, [[data]])

    def raw(text: bytes) -> bytes:
        return container.blob(text=brotli.compress(text, quality=5))

    def first_sizes(sizes: object) -> bytes:
        """With other sizes of the first group's blocks."""
        (name, _), *others = container.header["groups"]
        groups = [[name, sizes], *others]
        return container.blob(container.header | {"groups": groups}, mend=False)

    def matching(**changes) -> bytes:
        """With a table of tensors that fits the larger model, all zeros: the dear part is first."""
        h = train_gpt.load_settings({}, **container.header["model"] | changes)
        with torch.device("meta"):
            tensors = train_gpt.make_model(h).state_dict()
        table = [[name, list(p.shape), ["a float16"]] for name, p in tensors.items()]
        total = sum(p.numel() for p in tensors.values())
        parts = {"model": h.model_settings(), "tensors": table, "groups": [["a float16", []]]}
        return container.blob(container.header | parts, [[zeros_packed(2 * total)]])

    def wide(dim: int, **changes) -> bytes:
        """With one layer of a width, and no tensor but the one that proves the width."""
        own = {"num_layers": 1, "model_dim": dim, "num_heads": 1, "num_kv_heads": 1}
        changes |= own | {"ve_enabled": 0, "recur_layers": ""}
        parts = {
            "model": container.header["model"] | changes,
            "tensors": [["blocks.0.mlp_scale", [dim], ["a float16"]]],
            "groups": [["a float16", []]],
        }
        return container.blob(container.header | parts, [[zeros_packed(2 * dim)]])

    groups, blocks = container.header["groups"], container.blocks
    bomb = [zeros_packed(2 * GIB)]
    nan = brotli.compress(np.array([1, np.nan], "<f2").tobytes())
    many = [[f"x{i}", [2**25], ["x bits"]] for i in range(2000)]
    long_number = b'{"tensors": [["x", [' + b"9" * 100_000 + b'], ["x codes"]]]}'
    selectors = ",".join(["all@0-=uniform"] * 5000)
    large = {"model_dim": 1024, "num_heads": 8, "num_kv_heads": 8, "num_layers": 16}
    single = {"num_layers": 1, "ve_layers": "0", "model_dim": 2304, "mlp_mult": 1}
    return {
        "a bomb for a header": lambda: container.blob(text=bomb[0]),
        "a bomb for a group": lambda: container.blob(blocks=[bomb, *blocks[1:]]),
        "a bomb for a second block": lambda: container.blob(blocks=[blocks[0] + bomb, *blocks[1:]]),
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
        "bits past the limit": lambda: header(tensors=many),
        "a million tensors": lambda: header(tensors=[["x", [0], ["x float16"]]] * 100_000),
        "a million blocks": lambda: first_sizes([0] * 1_000_000),
        "4 MiB of brackets": lambda: raw(b"[" * (2**22 - 10)),
        "a long number": lambda: raw(long_number),
        "a header that is a list": lambda: raw(b"[]"),
        "no header": lambda: container.blob(text=b""),
        "no JSON": lambda: raw(b"\xff\xfe\x00"),
        "not finite": lambda: table([2], ["x float16"], nan),
        "too few tensors": lambda: header(tensors=container.header["tensors"][1:]),
        "no tensors": lambda: container.blob(
            container.header | {"tensors": [], "groups": []}, blocks=[]
        ),
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
        "as large as may be": lambda: model(**large),
        "one map as large as may be": lambda: model(**single),
        "as large as may be, tensors too": lambda: matching(
            model_dim=768, num_layers=12, mlp_mult=4.0
        ),
        "sparse values without end": lambda: model(map_adapter="sparse:1"),
        "combinations without end": lambda: model(map_adapter="combination:4096"),
        "shared matrices without end": lambda: model(map_basis="shared:99"),
        "large shared matrices": lambda: wide(2000, map_basis="shared:99"),
        "large twists": lambda: wide(160, map_basis="shared", map_twist="orthogonal", mlp_mult=64),
        "many loops": lambda: model(recur_layers="0-", recur_times=64),
        "a selector of patience": lambda: model(map_basis=selectors),
        "another gain": lambda: model(map_gain="1e6"),
        "groups in another order": lambda: container.blob(
            container.header | {"groups": groups[::-1]}, blocks[::-1]
        ),
        "a group twice": lambda: container.blob(
            container.header | {"groups": [*groups, groups[0]]}, [*blocks, blocks[0]]
        ),
        "a block of negative size": lambda: first_sizes([-5, 5]),
        "sizes that are a number": lambda: first_sizes(7),
        "sizes that are no numbers": lambda: first_sizes(["1", None]),
        "another version": lambda: sealed(container.blob()[:8] + b"\x07" + container.blob()[9:-32]),
    }


Cases = tuple[Callable[[int, random.Random], tuple[str, object]], Callable[[object], str]]


def planned_artifacts(whole: bytes) -> list[tuple[str, Callable[[], bytes]]]:
    """Return names and makers of files: forged ones, and cuts at and near every part's edge.

    They come in turn, so that a small sample has some of each.
    """
    container = Container(whole)
    cuts = sorted({edge + d for edge in container.edges for d in (-2, -1, 0, 1, 2)})
    cuts = [cut for cut in cuts if 0 <= cut < len(whole)]
    plain = [(f"cut at {cut}", functools.partial(bytes, whole[:cut])) for cut in cuts]
    mended = [(f"cut at {cut}, mended", functools.partial(sealed, whole[:cut])) for cut in cuts]
    turns = itertools.zip_longest(forged(container).items(), plain + mended)
    return [case for pair in turns for case in pair if case]


def artifact_cases(folder: Path) -> Cases:
    """Return make and read: make spoils an artifact in the i-th way, read evaluates it."""
    path = folder / "model.int6.ptz"
    whole = path.read_bytes()
    container, (header, expected) = Container(whole), train_gpt.read_artifact(whole)
    own = {"eval_only": 1, "model_path": str(path), "device": "cpu", "dtype": "float32"}
    asked = train_gpt.load_settings({}, **own)
    dist = train_gpt.Distributed(asked)
    planned = planned_artifacts(whole)

    def make(i: int, draw: random.Random) -> tuple[str, bytes]:
        if i % 2 == 0 and i // 2 < len(planned):
            name, made = planned[i // 2]
            return name, made()
        way = draw.choice(("bytes", "mended bytes", "header", "header", "header", "group", "codes"))
        if way == "bytes":
            return spoil_bytes(whole, draw)
        if way == "mended bytes":
            name, body = spoil_bytes(whole[:-32], draw)
            return f"mended: {name}", sealed(body)
        if way == "header":
            return spoil_header(container, draw)
        return spoil_block(container, way, draw)

    def read(blob: bytes) -> str:
        h = train_gpt.settings_from_artifact(asked, blob)
        found, tensors = train_gpt.read_artifact(blob)
        if found.get("tokenizer") != header["tokenizer"]:  # an evaluation refuses it by this
            return "refused"
        train_gpt.model_from_artifact(h, blob, dist)
        is_same = same_tensors(tensors, expected) and found["model"] == header["model"]
        return "harmless" if is_same else "valid, another model"

    return make, read


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Return whether the values are the same. LostError if they are not of that model at all."""
    if ours.keys() != theirs.keys():
        raise LostError(f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    for name, value in ours.items():
        if value.shape != theirs[name].shape or not value.isfinite().all():
            raise LostError(f"{name}: {tuple(value.shape)}, or not finite")
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def spoil_header(container: Container, draw: random.Random) -> tuple[str, bytes]:
    """Return an artifact with a header in which some things are changed."""
    header = json.loads(json.dumps(container.header))
    names = [spoil_json(header, draw) for _ in range(draw.choice((1, 1, 1, 2, 5)))]
    if draw.random() < 0.3 and isinstance(header.get("groups"), list):
        with contextlib.suppress(TypeError, ValueError):  # not every list can be mended
            return "; ".join(names), container.blob(header)
    return "; ".join(names), container.blob(header, mend=False)


def spoil_block(container: Container, way: str, draw: random.Random) -> tuple[str, bytes]:
    """Return an artifact with other bytes in a block of a `group`, or in its `codes`."""
    blocks = [list(group) for group in container.blocks]
    group = draw.choice([place for place, parts in enumerate(blocks) if parts])
    block = draw.randrange(len(blocks[group]))
    if way == "group":
        name, blocks[group][block] = spoil_bytes(blocks[group][block], draw)
    else:
        name, data = spoil_bytes(brotli.decompress(blocks[group][block]), draw)
        blocks[group][block] = brotli.compress(data, quality=5)
    return f"{way} {container.header['groups'][group][0]}: {name}", container.blob(blocks=blocks)


def artifacts(site: Site, count: int, seed: int) -> Tally:
    """Read artifacts cut, mutated and forged, with and without a right checksum."""
    return judged(site, Tally("artifact"), "artifact", site.undisturbed(), count, seed)


def spoil_shard(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Return what was done to a shard, and its bytes."""
    header, tokens = np.frombuffer(data[:1024], "<i4").copy(), np.frombuffer(data[1024:], "<u2")
    tokens, place = tokens.copy(), draw.randrange(len(tokens))
    way = draw.choice(("header", "numbers", "tokens", "outside", "cut", "bytes"))
    if way == "header":
        name, begin = spoil_bytes(data[:1024], draw)
        return f"header: {name}", begin + data[1024:]
    if way == "numbers":
        number = draw.randrange(3)
        near = header[number] + 1, header[number] - 1
        header[number] = draw.choice((-1, 0, 1, 2**31 - 1, *near, -(2**31)))
        return f"number {number} is {header[number]}", header.tobytes() + data[1024:]
    if way == "tokens":
        tokens[place] = draw.randrange(512)
        return "another token", data[:1024] + tokens.tobytes()
    if way == "outside":
        tokens[place] = draw.choice((512, 513, 65_535))
        return "a token outside the vocabulary", data[:1024] + tokens.tobytes()
    if way == "cut":
        ends = (0, 1, 11, 12, 1023, 1024, 1025, 1026, len(data) - 1, draw.randrange(2000))
        cut = draw.choice(ends)
        return f"cut at {cut}", data[:cut]
    return spoil_bytes(data, draw)


def shard_tokens(data: bytes) -> np.ndarray | None:
    """Return the tokens of a shard by the format's description alone; None: it is not sound."""
    numbers = np.frombuffer(data[:12].ljust(12, b"\xff"), "<i4").tolist()
    is_sound = numbers[:2] == [20240520, 1] and numbers[2] > 0
    if not is_sound or len(data) != 1024 + 2 * numbers[2]:
        return None
    return np.frombuffer(data[1024:], "<u2")


def shard_cases(folder: Path) -> Cases:
    """Return make and read: make spoils a shard, read reads it as training and evaluation do."""
    corpus, tokenizer_path = folder / "shards", folder / "tokenizer.model"
    h = helpers.tiny_settings(
        data_path=corpus, tokenizer_path=tokenizer_path, vocab_size=512, eval_stride=32
    )
    tokenizer = train_gpt.Tokenizer(str(tokenizer_path), 512)
    wholes = {path: path.read_bytes() for path in sorted(corpus.glob("*.bin"))}

    def make(i: int, draw: random.Random) -> tuple[str, tuple[Path, bytes]]:
        path = draw.choice(list(wholes))
        name, data = spoil_shard(wholes[path], draw)
        return f"{path.name}, {name}", (path, data)

    def read(spoiled: tuple[Path, bytes]) -> str:
        path, data = spoiled
        path.write_bytes(data)
        tokens = shard_tokens(data)
        is_training = "train" in path.name
        try:
            if is_training:
                training = train_gpt.TrainingData(h)
                training.sequences(0, len(training.positions))
                training.read(training.held_out)
            else:
                train_gpt.ValidationStream(h, tokenizer)
        except train_gpt.UserError as error:
            if str(path) not in str(error) and str(corpus) not in str(error):
                raise LostError(f"names neither {path} nor its folder: {error}") from None
            is_sound = tokens is not None and tokens.max() < 512
            if is_sound and is_training and "too few" not in str(error):
                raise LostError(f"a sound shard was refused: {error}") from None
            return "refused"
        else:
            if tokens is None or not was_read(path, tokens, is_training):
                raise LostError("an unsound shard was taken")
            return "as documented"
        finally:
            path.write_bytes(wholes[path])

    return make, read


def was_read(path: Path, tokens: np.ndarray, is_training: bool) -> bool:
    """Return whether the script reads these tokens from a shard, and may use them."""
    split = "train" if is_training else "val"
    names = sorted(other.name for other in path.parent.glob(f"fineweb_{split}_*.bin"))
    found = train_gpt.read_shards(str(path.parent), split)[names.index(path.name)]
    # Training reads whole sequences: tokens past the last one are never looked at.
    return np.array_equal(found, tokens) and (is_training or tokens.max() < 512)


def shards(site: Site, count: int, seed: int) -> Tally:
    """Read shards with another header, length, tokens.

    They are refused by name, or they decode as documented.
    """
    folder = site.folder / "judged-shards"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(site.corpus.folder, folder / "shards")
    shutil.copy(site.corpus.tokenizer, folder / "tokenizer.model")
    return judged(site, Tally("shard"), "shard", folder, count, seed)


class Executes:
    """What a hostile pickle holds: unpickling it would make the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rezipped(data: bytes, change: Callable[[str, bytes], bytes], **more) -> bytes:
    """Return the archive with other contents of its entries, checksums right."""
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
    """Return whether two parts of checkpoints are equal."""
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def hostile_checkpoints(whole: bytes, trap: Path) -> dict[str, Callable[[], bytes]]:
    """Return files that somebody made on purpose. What would execute makes the folder `trap`."""

    def with_pickle(code: bytes) -> bytes:
        return rezipped(whole, lambda name, data: code if name.endswith("data.pkl") else data)

    def larger(name: str, data: bytes) -> bytes:
        """The pickle claims storages a thousand times as large as they are."""
        return data.replace(b"K\x20", b"M\x00\x80") if name.endswith("data.pkl") else data

    def bomb(name: str, data: bytes) -> bytes:
        return bytes(2**28) if name.endswith("/data/0") else data

    def half(name: str, data: bytes) -> bytes:
        return data[: len(data) // 2] if "/data/" in name else data

    legacy = {"_use_new_zipfile_serialization": False}
    deflated = {"compression": zipfile.ZIP_DEFLATED}
    return {
        "a pickle with code": lambda: with_pickle(pickle.dumps(Executes(trap), 2)),
        "code in the old format": lambda: saved_by_torch(Executes(trap), **legacy),
        "code in torch's format": lambda: saved_by_torch({"weights": Executes(trap)}),
        "a bare pickle": lambda: pickle.dumps(Executes(trap)),
        "a zip bomb": lambda: rezipped(whole, bomb, **deflated),
        "compressed": lambda: rezipped(whole, lambda _, data: data, **deflated),
        "storages that claim more": lambda: rezipped(whole, larger),
        "storages cut short": lambda: rezipped(whole, half),
        "no pickle": lambda: with_pickle(b""),
        "the old format": lambda: saved_by_torch({"weights": {}}, **legacy),
        "nothing": lambda: b"",
        "text": lambda: b"not a checkpoint\n" * 100,
        "an empty archive": lambda: b"PK\x05\x06" + bytes(18),
    }


def checkpoint_cases(folder: Path) -> Cases:
    """Return make and read: make spoils a checkpoint, read reads it beside the one before it."""
    whole, before = (path.read_bytes() for path in checkpoints_of(folder))
    expected, older = (vars(train_gpt.Checkpoint.read(path)) for path in checkpoints_of(folder))
    trial = folder / "trial"
    trial.mkdir(exist_ok=True)
    path, trap = trial / "checkpoint.pt", trial / "executed"
    (trial / "checkpoint.previous.pt").write_bytes(before)
    specials = list(hostile_checkpoints(whole, trap).items())

    def make(i: int, draw: random.Random) -> tuple[str, bytes]:
        if i % 2 == 0 and i // 2 < len(specials):
            name, made = specials[i // 2]
            return name, made()
        return spoil_bytes(whole, draw)

    def read(data: bytes) -> str:
        path.write_bytes(data)
        with springs(trap):
            try:
                newest = vars(train_gpt.Checkpoint.read_newest(trial))
            except train_gpt.UserError as error:
                raise LostError(f"the one before was not taken: {error}") from None
            if same(newest, expected):
                return "harmless"
            if not same(newest, older):
                raise LostError("neither this checkpoint nor the one before was read")
            train_gpt.Checkpoint.read(path)
            raise LostError("it is read alone")

    return make, read


@contextlib.contextmanager
def springs(trap: Path) -> Iterator[None]:
    """Within, LostError if a file's code is executed, whatever else happens."""
    try:
        yield
    finally:
        if trap.exists():
            trap.rmdir()
            raise LostError("its code was executed")


def checkpoints(site: Site, count: int, seed: int) -> Tally:
    """Read checkpoints with other bytes, cut, with code or bombs in them.

    And those of other programs, as a user may give them to EXPORT_ONLY.
    """
    folder = site.folder / "judged-checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(site.interrupted(), folder)
    tally = judged(site, Tally("checkpoint"), "checkpoint", folder, count, seed)
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
        tally.add(f"{name}, refused", problems, attempt.seconds)
    return tally


JUDGES = {"artifact": artifact_cases, "shard": shard_cases, "checkpoint": checkpoint_cases}

# ---- The campaign --------------------------------------------------------------------------------

# Each kind with the number of faults in the full campaign.
KINDS: dict[str, tuple[Callable[[Site, int, int], Tally], int]] = {
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
    "midway": (midway, 5),
    "typos": (typos, 1000),
}


def machine() -> str:
    """Return a line on what this ran on."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    name = model[1] if model else platform.machine()
    return (
        f"{os.cpu_count()} cores, {name}, Linux {platform.release()},"
        f" Python {platform.python_version()}, torch {torch.__version__}, commit {commit}"
    )


def campaign(kinds: list[str], scale: float, seed: int) -> list[str]:
    """Inject faults of these kinds and print a table; return what was lost."""
    began, tallies = time.monotonic(), []
    print(f"{machine()}, seed {seed}, scale {scale:g}\n")
    headings = "fault", "injected", "survived", "lost", "slowest, s", "most memory, MiB", "where"
    print(f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        site = Site(Path(folder))
        for kind in kinds:
            inject, full = KINDS[kind]
            tallies.append(inject(site, max(1, math.ceil(full * scale)), seed))
            print(tallies[-1].row(), flush=True)
    injected = sum(tally.injected for tally in tallies)
    survived = sum(tally.survived for tally in tallies)
    lost = [f"{tally.name}: {text}" for tally in tallies for text in tally.lost]
    seconds = time.monotonic() - began
    print(
        f"| **all** | {injected:,} | {survived:,} | **{len(lost):,}** | {seconds:,.0f} in all | | |"
    )
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(KINDS), help="kinds with commas between: %(default)s"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full campaign")
    parser.add_argument("--seed", type=int, default=1)
    # This program's own children.
    parser.add_argument("--judge", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--fault", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fault:
        name, *arguments = options.fault
        FAULTS[name](*arguments)
        return train_gpt.main()
    torch.set_num_threads(1)
    if options.judge:
        kind, first, count, seed, folder = options.judge
        return judge(kind, int(first), int(count), int(seed), Path(folder))
    kinds = options.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    lost = campaign(kinds, options.scale, options.seed)
    if lost:
        print("\nLost:\n\n" + "\n".join(f"- {text}" for text in lost))
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
