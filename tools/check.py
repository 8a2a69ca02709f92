"""Verifies a submission as a suspicious reviewer would: recomputes what it claims and prints the evidence.

    python tools/check.py runs/ID
    python tools/check.py FOLDER --data DATA_PATH --tokenizer TOKENIZER_PATH --steps 2

FOLDER holds train.log, model.int6.ptz and submission.json. Its train_gpt.py is the code under examination;
where there is none, the source that the log begins with is. Settings are the log's, as are DATA_PATH and
TOKENIZER_PATH unless given. The exit code is 0 only if every check passes, 1 if one fails or cannot be made,
2 for unusable arguments.

The examined script runs in child processes only, without network, each in an empty folder with a clean
environment. What they report finds mistakes and plain cheats, not a script that attacks its checker: files
opened by native code are not traced, and seconds are the log's own. Such a script needs reading.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import runpy
import signal
import site
import socket
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

INHERITED = re.compile(r"PATH|LANG|LC_ALL|LD_LIBRARY_PATH|OMP_NUM_THREADS|(CUDA|MALLOC)_\w+")
SCORING = ("EVAL_SEQ_LEN", "EVAL_STRIDE", "EVAL_MODE", "EVAL_BATCH_TOKENS", "DTYPE", "COMPILE")
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc",
    "/proc",
    "/sys",
    "/dev",
)  # files that any process may open
SEQUENCES = 8  # most sequences of one step of the short training
PROBABILITY = 1e-4  # how far a sum of probabilities may be from 1, and a log-probability may move
EXACT = 1e-6  # between figures that differ by the rounding of what is printed
LOOP = 1e-3  # nats between two orders of the same sums, in bfloat16 too


class CannotCheck(Exception):
    """A check that could not be made; the message says what is missing and what to do."""


class Result(NamedTuple):
    verdict: str  # pass, FAIL or not checked
    evidence: str


def true_ones(statements: dict[str, object]) -> list[str]:
    return [text for text, is_true in statements.items() if is_true]


def judge(problems: list[str], evidence: str) -> Result:
    return Result("FAIL" if problems else "pass", "; ".join([*problems, evidence]))


# ---- The submission ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    data: str = ""
    tokenizer: str = ""
    train_limit: float = 600.0
    eval_limit: float = 600.0
    size_limit: int = 16_000_000
    tolerance: float = 1e-4
    steps: int = 3
    timeout: float = 3600.0


class Submission:
    """The folder's parts, each read when a check first asks for it. CannotCheck where a part is missing."""

    def __init__(self, folder: Path, options: Options):
        self.folder, self.options = folder, options

    def part(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise CannotCheck(
                f"{name}: {error.strerror}; copy the run's {name} to {self.folder}"
            ) from None

    @functools.cached_property
    def log(self) -> str:
        return self.part("train.log").decode("utf-8", "replace")

    @functools.cached_property
    def logged_script(self) -> bytes:
        """The source that the log begins with; after it come the settings."""
        source, mark, _ = self.log.partition("\nRUN_ID=")
        if not mark:
            raise CannotCheck("train.log has no source and settings; give the run's whole log")
        return source.encode()

    @functools.cached_property
    def script(self) -> bytes:
        return (
            self.part("train_gpt.py")
            if (self.folder / "train_gpt.py").exists()
            else self.logged_script
        )

    @functools.cached_property
    def artifact(self) -> bytes:
        return self.part("model.int6.ptz")

    @functools.cached_property
    def record(self) -> str:
        """What the log says below the source."""
        return self.log[len(self.logged_script.decode()) :]

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        return dict(re.findall(r"^([A-Z][A-Z0-9_]*)=(.*)$", self.record, re.M))

    def setting(self, name: str) -> int:
        try:
            return int(self.settings[name])
        except (KeyError, ValueError):
            raise CannotCheck(
                f"train.log has no whole number {name}=; give the run's whole log"
            ) from None

    def claim(self, name: str) -> float:
        """A figure of submission.json."""
        try:
            value = float(json.loads(self.part("submission.json"))[name])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise CannotCheck(f"submission.json has no figure {name}; the run writes it")
        return value

    def found(self, pattern: str, what: str) -> list[tuple[str, ...]]:
        """What the lines of the log that match hold; there must be one."""
        matches = re.findall(f"^{pattern}$", self.record, re.M)
        if not matches:
            raise CannotCheck(
                f"train.log has no line of {what}; give the log of the run that trained"
            )
        return matches

    def final(self, kind: str = "sliding_window") -> tuple[float, float]:
        """val_loss and val_bpb of the log's exact line."""
        return final_scores(self.record, kind)

    @functools.cached_property
    def tokenizer(self) -> Path:
        path = Path(self.options.tokenizer or self.settings.get("TOKENIZER_PATH", ""))
        if not path.is_file():
            raise CannotCheck(f"no tokenizer {path}; name it with --tokenizer")
        return path

    def shards(self, split: str) -> list[Path]:
        folder = Path(self.options.data or self.settings.get("DATA_PATH", ""))
        paths = sorted(folder.absolute().glob(f"fineweb_{split}_*.bin"))
        if not paths:
            raise CannotCheck(
                f"no fineweb_{split}_*.bin in {folder}; name their folder with --data"
            )
        return paths

    def tokens(self, split: str, count: int | None = None) -> np.ndarray:
        """The first tokens of a split, or all, (n,) uint16; read by this file's own reading of the format."""
        parts, left = [], count
        for path in self.shards(split):
            parts.append(np.fromfile(path, "<u2", -1 if left is None else left, offset=1024))
            if left is not None and (left := left - len(parts[-1])) <= 0:
                break
        return np.concatenate(parts)

    @functools.cached_property
    def probing(self) -> dict:
        """The answer of the child that tries the script's functions on the artifact, see `probe`."""
        length, stride = self.setting("EVAL_SEQ_LEN"), self.setting("EVAL_STRIDE")
        with tempfile.TemporaryDirectory() as name:
            folder = lay_out(self, Path(name), artifact=True)
            write_shard(
                folder / "data", "val", self.tokens("val", length + 3 * stride + stride // 2 + 2)
            )
            return run_child(
                "probe", folder, scoring(self) | {"COMPILE": "0"}, self.options.timeout
            )

    def probed(self) -> dict:
        if error := self.probing["error"]:
            raise CannotCheck(f"the script cannot be probed on the artifact: {error}")
        return self.probing["figures"]


def final_scores(text: str, kind: str) -> tuple[float, float]:
    line = rf"^final_int6_\w+_{kind}_exact val_loss:([\d.]+) val_bpb:([\d.]+)$"
    if not (found := re.findall(line, text, re.M)):
        raise CannotCheck(
            f"no line final_int6_*_{kind}_exact; give the log of a run that came to its end"
        )
    loss, bpb = found[-1]
    return float(loss), float(bpb)


def scoring(s: Submission) -> dict[str, str]:
    """The environment of an evaluation: where things lie and how to score; the artifact says the rest."""
    asked = {name: s.settings[name] for name in SCORING if name in s.settings}
    return asked | {
        "EVAL_ONLY": "1",
        "MODEL_PATH": "model.int6.ptz",
        "DATA_PATH": "data",
        "TOKENIZER_PATH": "tokenizer.model",
    }


def lay_out(s: Submission, folder: Path, artifact: bool) -> Path:
    """The empty folder of a child: script, tokenizer, artifact, and room for data."""
    (folder / "data").mkdir()
    (folder / "train_gpt.py").write_bytes(s.script)
    (folder / "tokenizer.model").write_bytes(s.tokenizer.read_bytes())
    if artifact:
        (folder / "model.int6.ptz").write_bytes(s.artifact)
    return folder


def write_shard(folder: Path, split: str, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    folder.mkdir(exist_ok=True)
    (folder / f"fineweb_{split}_000000.bin").write_bytes(
        header.tobytes() + tokens.astype("<u2").tobytes()
    )


# ---- Children ----------------------------------------------------------------------------------------------


@functools.cache
def namespace() -> tuple[str, ...]:
    """What starts a command without network interfaces, where the system lets a user do that."""
    command = ("unshare", "--map-root-user", "--net", "--")
    try:
        works = subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return command if works else ()


def run_child(task: str, folder: Path, settings: dict[str, str], timeout: float) -> dict:
    """What the child reports of a task in this folder; its `error` is empty if the script worked."""
    clean = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
    clean |= {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONUSERBASE": site.getuserbase()}
    command = [*namespace(), sys.executable, "-B", str(Path(__file__).absolute()), "--child", task]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=clean | settings,
            stdout=out,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CannotCheck(
                f"to {task} takes over {timeout:g} s here; give more with --timeout"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    output, errors = (
        (folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr")
    )
    if not (folder / "answer.json").exists():
        last = (errors.strip() or "no message").splitlines()[-1]
        raise CannotCheck(f"the child that was to {task} ended with {process.returncode}: {last}")
    return json.loads((folder / "answer.json").read_text()) | {"output": output}


# ---- The checks, in the order of the table -----------------------------------------------------------------


def check_size(s: Submission) -> Result:
    code, model = len(s.script), len(s.artifact)
    problems = []
    if code + model > s.options.size_limit:
        problems.append(f"{code + model - s.options.size_limit:,} bytes over the limit")
    for name, size in (("bytes_code", code), ("bytes_total", code + model)):
        if s.claim(name) != size:
            problems.append(f"submission.json has {name} {s.claim(name):,.0f}, not {size:,}")
    return judge(
        problems,
        f"code {code:,} + model {model:,} = {code + model:,} bytes of {s.options.size_limit:,}",
    )


def check_seconds(s: Submission) -> Result:
    """The limits hold for what was claimed, and the claims fit each other and the log's clock."""
    names = "train_seconds", "export_seconds", "eval_seconds", "steps", "tokens_per_second"
    train, export, evaluation, steps, speed = (s.claim(name) for name in names)
    clock = s.found(r"step:(\d+)/\d+ .*train_time:(\d+)ms step_avg:([\d.]+)ms", "train_time")
    clock = [(int(step), int(time), float(average)) for step, time, average in clock]
    last, milliseconds, _ = clock[-1]
    each = sum(int(ms) for ms in s.found(r"final_int6_.* eval_time:(\d+)ms", "eval_time")) / 1000
    tokens = s.setting("TRAIN_BATCH_TOKENS") * steps
    wrong = {
        f"training and export over {s.options.train_limit:g} s": train + export
        > s.options.train_limit,
        f"evaluation over {s.options.eval_limit:g} s": evaluation > s.options.eval_limit,
        "a time is negative": min(train, export, evaluation) < 0,
        f"the log's clock ends at {milliseconds / 1000:g} s": abs(1000 * train - milliseconds) > 1,
        f"the log ends at step {last}, submission.json at {steps:g}": last != steps,
        "step_avg × steps is not train_time": any(
            abs(step * average - time) > 1 + 0.006 * step for step, time, average in clock
        ),
        "train_time runs backwards": [time for _, time, _ in clock]
        != sorted(time for _, time, _ in clock),
        f"the log's evaluations took {each:g} s": each > evaluation + 0.005,
        f"{tokens:,.0f} tokens are not {speed:,.0f} a second": abs(tokens - speed * train)
        > speed * 0.002 + train + 1,
    }
    return judge(
        true_ones(wrong),
        f"training {train:g} + export {export:g} = {train + export:.3f} s of"
        f" {s.options.train_limit:g}, evaluation {evaluation:g} s of"
        f" {s.options.eval_limit:g}; {steps:g} steps by the log's clock",
    )


def check_untouched(s: Submission) -> Result:
    """The first steps of training, then export, twice: on the validation text and on other text in its place.
    There is half as much of it as of training text, and training validates after each step: whatever mixes it
    in, or chooses by it, gets other weights. On the CPU, where sums come in one order."""
    length, steps = s.setting("TRAIN_SEQ_LEN"), s.options.steps
    batch = min(SEQUENCES, max(1, s.setting("TRAIN_BATCH_TOKENS") // length)) * length
    count = max(steps * batch, 2 * s.setting("EVAL_SEQ_LEN")) + 1
    validation = s.tokens("val", count)
    model = sentencepiece.SentencePieceProcessor(model_file=str(s.tokenizer))
    page = model.encode(" ".join(__doc__.split()))
    other = [int(validation[0]), *(page * (count // len(page) + 1))[: count // 2 + 1]]
    changes = {
        "ITERATIONS": steps,
        "TRAIN_BATCH_TOKENS": batch,
        "MAX_WALLCLOCK_SECONDS": 0,
        "COMPILE": 0,
        "VAL_LOSS_EVERY": 1,
        "TRAIN_LOG_EVERY": 1,
        "EVAL_STRIDE": s.setting("EVAL_SEQ_LEN"),
        "WARMUP_STEPS": min(1, s.setting("WARMUP_STEPS")),
        "CUDA_VISIBLE_DEVICES": "",
        "GPTQ_CALIB_BATCHES": min(2, s.setting("GPTQ_CALIB_BATCHES")),
        "EXPORT_ONLY": 0,
        "OUTPUT_DIR": "runs",
        "TOKENIZER_PATH": "tokenizer.model",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = lay_out(s, Path(name), artifact=False)
        if teacher := s.settings.get("DISTILL_FROM"):
            (folder / "teacher").write_bytes(Path(teacher).read_bytes())
            changes["DISTILL_FROM"] = "teacher"
        for split, tokens in (("val", validation), ("other", np.array(other))):
            write_shard(folder / split, "val", tokens)
            write_shard(folder / split, "train", s.tokens("train", 2 * count + length))
        settings = s.settings | {name: str(value) for name, value in changes.items()}
        answer = run_child("train", folder, settings, s.options.timeout)
        if answer["error"]:
            raise CannotCheck(f"the short training ended in: {answer['error']}")
        artifacts = [
            (folder / "runs" / split / "model.int6.ptz").read_bytes() for split in ("val", "other")
        ]
        logs = [
            (folder / "runs" / split / "train.log").read_text("utf-8") for split in ("val", "other")
        ]
    losses, scores = (
        [re.findall(pattern, log, re.M) for log in logs]
        for pattern in (r"^average .*|train_loss:\S+", r"^final_int6_.*_exact .*")
    )
    readers = answer["opened"]["val"]
    strangers = [by for by in readers if "ValidationStream." not in by]
    wrong = {
        f"validation shards opened by {', '.join(strangers)}": strangers,
        "no validation shard was seen being opened": not readers,
        f"other files opened: {', '.join(answer['other'][:5])}": answer["other"],
        "other validation text gives other weights": len(set(answer["figures"]["weights"])) != 1,
        "other validation text gives another artifact": artifacts[0] != artifacts[1],
        "other validation text gives other training losses": losses[0] != losses[1],
        "the two texts score alike, so the comparison says nothing": scores[0] == scores[1],
    }
    return judge(
        true_ones(wrong),
        f"{steps} steps and export: validation shards opened by {', '.join(readers)}; weights"
        f" {answer['figures']['weights'][0][:12]} and artifact {len(artifacts[0]):,} bytes, compared"
        f" after {len(validation):,} validation tokens were replaced by {len(other):,} others",
    )


def check_evaluation(s: Submission) -> Result:
    """The score again, from script, artifact, tokenizer and validation shards in an empty folder."""
    claimed, (_, logged) = s.claim("val_bpb"), s.final()
    with tempfile.TemporaryDirectory() as name:
        folder = lay_out(s, Path(name), artifact=True)
        for path in s.shards("val"):
            (folder / "data" / path.name).symlink_to(path)
        answer = run_child("evaluate", folder, scoring(s), s.options.timeout)
    network = answer["network"]
    off = (
        "an isolated namespace"
        if network["kernel"]
        else "sockets refused in Python, no namespace here"
    )
    evidence = f"network off: {off} ({network['kernel'] or network['python']})"
    problems = (
        [f"the script used the network: {', '.join(answer['refused'])}"]
        if answer["refused"]
        else []
    )
    if not network["python"]:
        problems.append("the network could be reached")
    if answer["other"]:
        problems.append(f"other files opened: {', '.join(answer['other'][:5])}")
    if answer["error"]:
        return judge([*problems, f"the evaluation ended in: {answer['error']}"], evidence)
    _, bpb = final_scores(answer["output"], "sliding_window")
    for source, said in (("train.log", logged), ("submission.json", claimed)):
        if not abs(said - bpb) <= s.options.tolerance:
            problems.append(f"{source} has val_bpb {said:.8f}")
    return judge(
        problems,
        f"val_bpb {bpb:.8f} here, {logged:.8f} in the log; {evidence}; opened only script,"
        " artifact, tokenizer and validation shards",
    )


def check_probabilities(s: Submission) -> Result:
    p = s.probed()["probabilities"]
    wrong = {
        "probabilities do not sum to one": not 1 - PROBABILITY
        <= p["least"]
        <= p["most"]
        <= 1 + PROBABILITY,
        "predict and losses disagree": not p["predicted"] <= PROBABILITY,
        "the future changes the past": not p["future"] <= PROBABILITY,
        "other windows of a batch change a window": not p["others"] <= PROBABILITY,
    }
    return judge(
        true_ones(wrong),
        f"over {p['vocabulary']} targets at {p['positions']} positions they sum to"
        f" {p['least']:.7f} to {p['most']:.7f}; {p['cuts']} changed futures move"
        f" earlier log-probabilities by {p['future']:.1e} at most, other windows"
        f" by {p['others']:.1e}",
    )


def check_scoring(s: Submission) -> Result:
    """`evaluate` gets a loss of its own for each token, so that a token left out or scored twice shows."""
    once, (ours, theirs) = s.probed()["once"], s.probed()["loop"]
    wrong = [
        f"{case['tokens']} tokens: mean {case['mean']:.6f}, not {case['expected']:.6f}; total"
        f" {case['total']:.4f}, not {case['expected_total']:.4f}"
        for case in once
        if not abs(case["mean"] - case["expected"]) <= EXACT
        or not abs(case["total"] - case["expected_total"]) <= EXACT * case["tokens"]
    ]
    wrong += [
        f"{case['tokens']} tokens: a target is not the token after its window"
        for case in once
        if not case["aligned"]
    ]
    if not abs(ours - theirs) <= LOOP:
        wrong.append(f"a plain loop has {ours:.6f} nats a token, evaluate {theirs:.6f}")
    lengths = ", ".join(str(case["tokens"]) for case in once)
    return judge(
        wrong,
        f"streams of {lengths} tokens, where every token after the first counts once; a plain"
        f" loop has {ours:.6f} nats a token, evaluate {theirs:.6f}",
    )


def check_bytes(s: Submission) -> Result:
    """The length of the decoded text of all documents; the log's bits per byte must follow from it."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(s.tokenizer))
    tokens, (loss, bpb) = s.tokens("val"), s.final()
    if tokens.max() >= model.vocab_size() or not model.is_control(int(tokens[0])):
        raise CannotCheck(
            "the validation stream is not this tokenizer's, or has no BOS at its beginning"
        )
    end = len(tokens)
    while model.is_byte(int(tokens[end - 1])):
        end -= 1  # the end may cut a character: bytes there are counted one by one
    starts = np.flatnonzero(tokens[:end] == tokens[0])
    size = len(tokens) - end
    for some in np.split(starts, range(1000, len(starts), 1000)):
        after = starts[np.searchsorted(starts, some[-1]) + 1 :]
        part = tokens[some[0] : after[0] if len(after) else end]
        documents = [document.tolist() for document in np.split(part, some[1:] - some[0])]
        size += sum(len(text.encode()) for text in model.decode(documents))
    expected = loss * (len(tokens) - 1) / math.log(2) / size
    problems = [] if abs(bpb - expected) <= EXACT else [f"the log has val_bpb {bpb:.8f}"]
    return judge(
        problems,
        f"{len(tokens):,} tokens decode to {size:,} bytes; val_loss {loss:.8f} then is"
        f" val_bpb {expected:.8f}",
    )


def check_agreement(s: Submission) -> Result:
    """Log, submission.json and artifact tell one story."""
    pairs = []  # what, one side, the other side
    for kind in ("roundtrip", "sliding_window"):
        for name, logged in zip(("val_loss", "val_bpb"), s.final(kind)):
            pairs.append((f"{name}_{kind}", f"{logged:.8f}", f"{s.claim(f'{name}_{kind}'):.8f}"))
    pairs += [
        (name, f"{logged:.8f}", f"{s.claim(name):.8f}")
        for name, logged in zip(("val_loss", "val_bpb"), s.final())
    ]
    (*_, sizes) = s.found(r"artifact code ([\d,]+) \+ model ([\d,]+) = .*", "the artifact's bytes")
    pairs += [("bytes in the log", sizes, (f"{len(s.script):,}", f"{len(s.artifact):,}"))]
    claims = json.loads(s.part("submission.json"))
    pairs += [
        ("seeds", claims.get("seeds"), [s.setting("SEED")]),
        ("dataset", claims.get("dataset"), Path(s.settings.get("DATA_PATH", "")).name),
        (
            "SHA-256 of the code and the log's",
            *(hashlib.sha256(source).hexdigest()[:12] for source in (s.script, s.logged_script)),
        ),
    ]
    try:
        header = s.probed()["header"]
        pairs += [
            (name.upper(), str(value), s.settings.get(name.upper()))
            for name, value in header["model"].items()
        ]
        digest = hashlib.sha256(s.tokenizer.read_bytes()).hexdigest()
        pairs.append(("the artifact's tokenizer", header["tokenizer"], digest))
        unread = None
    except CannotCheck as error:
        unread = error
    problems = [f"{what}: {one} and {other}" for what, one, other in pairs if one != other]
    if unread and not problems:
        raise unread
    return judge(problems, f"{len(pairs)} facts compared, val_bpb {s.claim('val_bpb'):.8f}")


CHECKS: dict[str, Callable[[Submission], Result]] = {
    "size": check_size,
    "seconds": check_seconds,
    "untouched": check_untouched,
    "evaluation": check_evaluation,
    "probabilities": check_probabilities,
    "scoring": check_scoring,
    "bytes": check_bytes,
    "agreement": check_agreement,
}


def perform(check: Callable[[Submission], Result], s: Submission) -> Result:
    """The check's result; whatever keeps it from one is said, and never passes."""
    try:
        return check(s)
    except CannotCheck as error:
        return Result("not checked", str(error))
    except Exception as error:  # malformed files have many shapes; the other checks go on
        return Result("not checked", f"{type(error).__name__}: {error}")


# ---- In a child --------------------------------------------------------------------------------------------
# All that depends on the examined script's functions.


class Watch:
    """An audit hook, which Python code cannot take off again: notes files and refuses the network."""

    def __init__(self, script: Path):
        self.script, self.folder, self.refusing = str(script), str(script.parent), True
        self.opened: dict[str, set[str]] = {
            "train": set(),
            "val": set(),
        }  # split: the functions on the stack
        self.files, self.refused = set(), []

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            self.files.add(path)
            if shard := re.match(r"fineweb_(train|val)_.*\.bin", os.path.basename(path)):
                self.opened[shard[1]].add(" > ".join(self.callers(sys._getframe(1))))
        elif self.refusing and self.is_network(event, arguments):
            self.refused.append(f"{event}{tuple(str(argument) for argument in arguments[-2:])}")
            raise PermissionError(f"no network in an evaluation: {event}")

    def is_network(self, event: str, arguments: tuple) -> bool:
        if event == "socket.__new__":
            return arguments[1] in (socket.AF_INET, socket.AF_INET6)
        return event in (
            "socket.getaddrinfo",
            "socket.gethostbyname",
            "socket.connect",
            "socket.sendto",
        )

    def callers(self, frame) -> list[str]:
        """The script's functions on the stack, with their classes, outermost first."""
        names = []
        while frame:
            name, owner = frame.f_code.co_name, frame.f_locals.get("self")
            if frame.f_code.co_filename == self.script and not name.startswith("<"):
                names.append(f"{type(owner).__name__}.{name}" if owner is not None else name)
            frame = frame.f_back
        return names[::-1]

    def others(self) -> list[str]:
        """Files that are neither in the child's folder nor Python's or the system's."""
        roots = {
            self.folder,
            sys.prefix,
            sys.base_prefix,
            site.getuserbase(),
            *sys.path,
            *SYSTEM,
        } - {""}
        inside = tuple(
            os.path.join(path, "") for root in roots for path in (root, os.path.realpath(root))
        )
        return sorted(
            path
            for path in self.files - {os.path.abspath(__file__)}
            if not path.startswith(inside) and os.path.isfile(path)
        )


def reach_network() -> str:
    """How the network refuses; empty if it does not. A datagram's connect asks for a route, sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect(("192.0.2.1", 9))
    except OSError as error:
        return str(error)
    return ""


def load(script: Path):
    """The script as a module, whose `main` does not run."""
    spec = importlib.util.spec_from_file_location("examined", script)
    module = sys.modules["examined"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def child(task: str) -> None:
    """Carries out a task on the script in this folder and writes answer.json."""
    script = Path.cwd() / "train_gpt.py"
    sys.path[0], sys.argv = str(script.parent), [str(script)]
    kernel = reach_network()
    watch, figures, problem = Watch(script), {}, ""
    sys.addaudithook(watch)
    network = {"kernel": kernel, "python": reach_network()}
    watch.refused.clear()
    try:
        if task == "train":
            figures = {"weights": [train(script, data) for data in ("val", "other")]}
        elif task == "evaluate":
            runpy.run_path(str(script), run_name="__main__")
        else:
            figures = probe(load(script))
    except SystemExit as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    answer = {
        "error": problem,
        "figures": figures,
        "network": network,
        "refused": watch.refused,
        "opened": {split: sorted(by) for split, by in watch.opened.items()},
        "other": watch.others(),
    }
    Path(script.parent, "answer.json").write_text(json.dumps(answer))


def train(script: Path, data: str) -> str:
    """SHA-256 over the weights that a run on this folder of data trains."""
    import torch

    os.environ |= {"DATA_PATH": data, "RUN_ID": data}
    runpy.run_path(str(script), run_name="__main__")
    saved = torch.load(Path("runs", data, "checkpoint.pt"), map_location="cpu", weights_only=True)
    digest = hashlib.sha256()
    for name, weight in sorted(saved["weights"].items()):
        digest.update(
            name.encode() + weight.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def probe(module) -> dict:
    """Figures of the model that the artifact holds, of its losses and of `evaluate`."""
    import torch

    header, tensors = module.read_artifact(Path(os.environ["MODEL_PATH"]).read_bytes())
    h = module.Hyperparameters(**header["model"])
    with torch.no_grad(), module.World(h) as world:
        model = module.build_model(header, tensors, world)
        val = module.ValidationStream(h, module.Tokenizer(h.tokenizer_path, h.vocab_size))
        return {
            "header": {"model": header["model"], "tokenizer": header["tokenizer"]},
            "probabilities": probe_probabilities(model, val, h, world),
            "once": probe_scoring(module.evaluate, val, h, world),
            "loop": probe_loop(module.evaluate, model, val, h, world),
        }


def probe_probabilities(model, val, h, world) -> dict:
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary, length = h.vocab_size, min(h.eval_seq_len, len(val.tokens) - 1)
    # Each row has another target at each position; over the rows, every position has every target once.
    short = min(length, 24)
    ids = val.tokens[None, :short].to(world.device)
    targets = (torch.arange(vocabulary)[:, None] + 7 * torch.arange(short)) % vocabulary
    losses = torch.cat(
        [
            model.losses(ids.expand(len(part), -1), part.to(world.device)).double()
            for part in targets.split(64)
        ]
    )
    sums = (-losses).exp().sum(0)
    predicted = -model.predict(ids, short)[0].double().log_softmax(-1)  # (short, vocabulary)
    gap = (losses - predicted.gather(1, targets.t().to(world.device)).t()).abs().max()
    window = val.tokens[: length + 1]
    strange = (
        window + torch.randint(1, vocabulary, (5, length + 1), generator=generator)
    ) % vocabulary

    def losses_of(rows, wanted):
        return model.losses(rows[:, :-1].to(world.device), wanted.to(world.device)).double()

    def moved(cuts: list[int], last: int) -> float:
        """The most by which another future after each cut moves the last positions' losses up to the cut."""
        rows = window.repeat(1 + len(cuts), 1)
        wanted = rows[:, 1:].clone()
        for row, cut in enumerate(cuts, 1):
            rows[row, cut + 1 :] = strange[row, cut + 1 :]
            wanted[row, cut + 1 :] = rows[
                row, cut + 2 :
            ]  # at the cut it stays: that loss is of the past
        found, skipped = losses_of(rows, wanted[:, -last:]), length - last
        return max(
            (found[row, : cut + 1 - skipped] - found[0, : cut + 1 - skipped]).abs().max().item()
            for row, cut in enumerate(cuts, 1)
        )

    cuts = torch.linspace(0, length - 1, 6)[1:-1].long().tolist()
    # A model may compute a window's few last positions in another way than all of them.
    few = max(2, min(h.eval_stride, length))
    future = max(moved(cuts, length), moved([length - 1 - few // 2], few)) if length > 1 else 0.0
    before, after = (
        losses_of(rows, rows[:, 1:])
        for rows in (window.repeat(5, 1), torch.cat([window[None], strange[1:]]))
    )
    return {
        "vocabulary": vocabulary,
        "positions": short,
        "least": sums.min().item(),
        "most": sums.max().item(),
        "predicted": gap.item(),
        "cuts": len(cuts) + 1,
        "future": future,
        "others": (before[0] - after[0]).abs().max().item(),
    }


class Ledger:
    """In place of a model: the loss of token number i, whatever stands before it, is entry i of a table."""

    def __init__(self, table, device):
        self.table, self.device, self.aligned = table, device, True

    def eval(self) -> Ledger:
        return self

    def losses(self, ids, targets, streams=False):
        self.aligned &= bool((ids[:, -targets.size(1) :] + 1 == targets).all())
        return self.table[targets.cpu()].to(self.device)


def probe_scoring(evaluate: Callable, val, h, world) -> list[dict]:
    """Token number i is i, so a loss tells which token it is of."""
    import torch

    generator, cases = torch.Generator().manual_seed(0), []
    length, stride = h.eval_seq_len, h.eval_stride
    beyond = (
        1 - length // 2,
        0,
        1,
        stride,
        3 * stride // 2,
    )  # the last three: windows after the first
    for targets in sorted({1, *(length + more for more in beyond)}):
        table = torch.rand(targets + 1, generator=generator)
        stream = copy.copy(val)
        stream.tokens, stream.bytes = torch.arange(targets + 1), 3 * targets
        ledger = Ledger(table, world.device)
        mean, bpb = evaluate(ledger, stream, h, world, h.eval_stride)
        expected = table[1:].double().sum().item()
        cases.append(
            {
                "tokens": targets + 1,
                "mean": mean,
                "expected": expected / targets,
                "total": bpb * math.log(2) * stream.bytes,
                "expected_total": expected,
                "aligned": ledger.aligned,
            }
        )
    return cases


def probe_loop(evaluate: Callable, model, val, h, world) -> tuple[float, float]:
    """Nats a token by one window after the other, and by `evaluate`."""
    targets = len(val.tokens) - 1
    length = min(h.eval_seq_len, targets)
    end, scored, total = 0, 0, 0.0
    while end < targets:
        new = min(h.eval_stride if end else length, targets - end)
        end += new
        window = val.tokens[end - length : end + 1].to(world.device)
        # All positions' losses, though a model may compute few of them in another way: they must be the same.
        total += model.losses(window[None, :-1], window[None, 1:])[:, -new:].double().sum().item()
        scored += new
    nats, _ = evaluate(model, val, h, world, h.eval_stride)
    return total / scored, nats


# ---- Command -----------------------------------------------------------------------------------------------


def table(results: dict[str, Result]) -> str:
    lines = []
    for name, (verdict, evidence) in results.items():
        head = f"{name:<15}{verdict:<13}"
        lines += textwrap.wrap(
            evidence,
            110,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [head]
    return "\n".join(lines)


def parse(arguments: list[str]) -> tuple[Path, Options]:
    parser = argparse.ArgumentParser(
        prog="check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN_OR_FOLDER")
    meanings = {
        "data": "folder of fineweb_{train,val}_*.bin",
        "tokenizer": "SentencePiece model",
        "train_limit": "seconds of training and export",
        "eval_limit": "seconds of evaluation",
        "size_limit": "bytes of code and model",
        "tolerance": "bits per byte between two evaluations",
        "steps": "steps of the short training",
        "timeout": "seconds that one child may take",
    }
    for name, meaning in meanings.items():
        default = getattr(Options, name)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            default=default,
            help=meaning + (f" (default {default})" if default else " (default: the log's)"),
        )
    given = vars(parser.parse_args(arguments))
    folder, options = given.pop("folder"), Options(**given)
    if not folder.is_dir():
        parser.error(f"{folder} is no folder; name a run's, such as runs/ID")
    if options.steps < 1 or options.timeout <= 0 or options.tolerance < 0:
        parser.error("--steps and --timeout must be over 0, --tolerance not under 0")
    return folder, options


def main(arguments: list[str]) -> int:
    submission = Submission(*parse(arguments))
    results = {}
    for name, check in CHECKS.items():
        print(f"checking {name} ...", file=sys.stderr)
        results[name] = perform(check, submission)
    bad = [name for name, result in results.items() if result.verdict != "pass"]
    print(table(results))
    print(
        f"{len(results) - len(bad)} of {len(results)} checks pass"
        + (f"; not: {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
