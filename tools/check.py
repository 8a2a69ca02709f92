"""Verify a submission as a suspicious reviewer would: recompute its claims and print the evidence.

    python tools/check.py runs/ID
    python tools/check.py FOLDER --data DATA_PATH --tokenizer TOKENIZER_PATH --steps 2

FOLDER holds train.log, model.int6.ptz and results.json. Its train_gpt.py is the code under
examination; without one it is the source at the beginning of the log. Settings are those of the
log, and so are DATA_PATH and TOKENIZER_PATH unless they are given. The exit code is 0 if every
check passes, 1 if one fails or cannot be made, 2 for unusable arguments.

The examined script runs in child processes only, without network, each in an empty folder with a
clean environment. Their reports reveal mistakes and plain cheats, not a script that attacks its
checker: files opened by native code are not traced, and times are those of the log. Such a script
must be read.
"""

from __future__ import annotations

import argparse
import ast
import copy
import fcntl
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
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import brotli
    import numpy as np
    import sentencepiece
except ImportError as missing:
    raise SystemExit(f"error: {missing.name} is missing: pip install -r requirements.txt") from None

if TYPE_CHECKING:  # a child imports torch once the examined script runs
    from torch import Tensor

INHERITED = re.compile(r"PATH|LANG|LC_ALL|LD_LIBRARY_PATH|OMP_NUM_THREADS|(CUDA|MALLOC)_\w+")
# Settings of a run that decide how its artifact is scored.
SCORING = (
    "EVAL_SEQ_LEN",
    "EVAL_STRIDE",
    "EVAL_MODE",
    "EVAL_BATCH_TOKENS",
    "DEVICE",
    "DTYPE",
    "COMPILE",
)
SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev")  # any process opens these
RESULTS = "results.json"
MAX_SEQUENCES = 8  # of one step of the short training
PROBABILITY = 1e-4  # how far a sum of probabilities may be from 1, and a log-probability may move
EXACT = 1e-6  # between figures that differ only by rounding in print
LOOP = 1e-3  # nats between two orders of the same sums, in bfloat16 too


class CannotCheck(Exception):
    """A check cannot be made. The message says what is missing and what to do."""


class Result(NamedTuple):
    """The outcome of a check."""

    verdict: str  # pass, FAIL or not checked
    evidence: str


def true_ones(statements: dict[str, object]) -> list[str]:
    """Return the statements that are true."""
    return [text for text, is_true in statements.items() if is_true]


def judge(problems: list[str], evidence: str) -> Result:
    """Return FAIL if there are problems, else pass."""
    return Result("FAIL" if problems else "pass", "; ".join([*problems, evidence]))


# ---- The submission ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the command line sets; see `parse`."""

    data: str = ""
    tokenizer: str = ""
    train_limit: float = 600.0
    eval_limit: float = 600.0
    size_limit: int = 16_000_000
    tolerance: float = 1e-4
    steps: int = 3
    timeout: float = 3600.0


class Submission:
    """The parts of a folder, each read when it is first needed. CannotCheck if one is missing."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options

    def part(self, name: str) -> bytes:
        """Return the content of a file."""
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
        """The source at the beginning of the log, before the settings."""
        source, mark, _ = self.log.partition("\nRUN_ID=")
        if not mark:
            raise CannotCheck("train.log has no source and settings; give the run's whole log")
        return source.encode()

    @functools.cached_property
    def script(self) -> bytes:
        has_script = (self.folder / "train_gpt.py").exists()
        return self.part("train_gpt.py") if has_script else self.logged_script

    @functools.cached_property
    def artifact(self) -> bytes:
        return self.part("model.int6.ptz")

    @functools.cached_property
    def record(self) -> str:
        """The log below the source."""
        return self.log[len(self.logged_script.decode()) :]

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        return dict(re.findall(r"^([A-Z][A-Z0-9_]*)=(.*)$", self.record, re.M))

    def setting(self, name: str) -> int:
        """Return a whole number among the settings."""
        try:
            return int(self.settings[name])
        except (KeyError, ValueError):
            raise CannotCheck(
                f"train.log has no whole number {name}=; give the run's whole log"
            ) from None

    def claim(self, name: str) -> float:
        """Return a figure of the results."""
        try:
            value = float(json.loads(self.part(RESULTS))[name])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise CannotCheck(f"{RESULTS} has no figure {name}; the run writes it")
        return value

    def found(self, pattern: str, what: str) -> list[tuple[str, ...]]:
        """Return the groups of all lines of the log that match; there must be one."""
        matches = re.findall(f"^{pattern}$", self.record, re.M)
        if not matches:
            raise CannotCheck(
                f"train.log has no line of {what}; give the log of the run that trained"
            )
        return matches

    def final(self, kind: str = "sliding_window") -> tuple[float, float]:
        """Return val_loss and val_bpb of the log's exact line."""
        return final_scores(self.record, kind)

    @functools.cached_property
    def tokenizer(self) -> Path:
        path = Path(self.options.tokenizer or self.settings.get("TOKENIZER_PATH", ""))
        if not path.is_file():
            raise CannotCheck(f"no tokenizer {path}; name it with --tokenizer")
        return path

    def shards(self, split: str) -> list[Path]:
        """Return the paths of a split's shards."""
        folder = Path(self.options.data or self.settings.get("DATA_PATH", ""))
        paths = sorted(folder.absolute().glob(f"fineweb_{split}_*.bin"))
        if not paths:
            raise CannotCheck(
                f"no fineweb_{split}_*.bin in {folder}; name their folder with --data"
            )
        return paths

    def tokens(self, split: str, count: int | None = None) -> np.ndarray:
        """Return the first tokens of a split, or all, (n,) uint16, without the script's reader."""
        parts, left = [], count
        for path in self.shards(split):
            parts.append(np.fromfile(path, "<u2", -1 if left is None else left, offset=1024))
            if left is not None and (left := left - len(parts[-1])) <= 0:
                break
        return np.concatenate(parts)

    @functools.cached_property
    def probing(self) -> dict:
        """The answer of the child that probes the script's functions on the artifact."""
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
        """Return the figures of `probe`."""
        if error := self.probing["error"]:
            raise CannotCheck(f"the script cannot be probed on the artifact: {error}")
        return self.probing["figures"]


def final_scores(text: str, kind: str) -> tuple[float, float]:
    """Return val_loss and val_bpb of the last exact line of this kind."""
    line = rf"^final_int6_\w+_{kind}_exact val_loss:([\d.]+) val_bpb:([\d.]+)$"
    if not (found := re.findall(line, text, re.M)):
        raise CannotCheck(
            f"no line final_int6_*_{kind}_exact; give the log of a run that came to its end"
        )
    loss, bpb = found[-1]
    return float(loss), float(bpb)


def scoring(s: Submission) -> dict[str, str]:
    """Return the environment of an evaluation: paths and how to score."""
    asked = {name: s.settings[name] for name in SCORING if name in s.settings}
    return asked | {
        "EVAL_ONLY": "1",
        "MODEL_PATH": "model.int6.ptz",
        "DATA_PATH": "data",
        "TOKENIZER_PATH": "tokenizer.model",
    }


def lay_out(s: Submission, folder: Path, artifact: bool) -> Path:
    """Fill the empty folder of a child with script, tokenizer, artifact and an empty data/."""
    (folder / "data").mkdir()
    (folder / "train_gpt.py").write_bytes(s.script)
    (folder / "tokenizer.model").write_bytes(s.tokenizer.read_bytes())
    if artifact:
        (folder / "model.int6.ptz").write_bytes(s.artifact)
    return folder


def write_shard(folder: Path, split: str, tokens: np.ndarray) -> None:
    """Write tokens as the only shard of a split."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    folder.mkdir(exist_ok=True)
    (folder / f"fineweb_{split}_000000.bin").write_bytes(
        header.tobytes() + tokens.astype("<u2").tobytes()
    )


# ---- Children ------------------------------------------------------------------------------------


@functools.cache
def namespace() -> tuple[str, ...]:
    """Return what starts a command without network interfaces, if the system lets a user do it."""
    command = ("unshare", "--map-root-user", "--net", "--")
    try:
        works = subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return command if works else ()


def run_child(task: str, folder: Path, settings: dict[str, str], timeout: float) -> dict:
    """Run a task in this folder; return the child's report, whose `error` is empty if it worked."""
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
                f"{task} takes over {timeout:g} s here; give more with --timeout"
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
        raise CannotCheck(f"the child for {task} ended with {process.returncode}: {last}")
    return json.loads((folder / "answer.json").read_text()) | {"output": output}


# ---- The checks, in the order of the table -------------------------------------------------------


@functools.cache
def count_code(script: bytes) -> int:
    """Return the bytes of a script as it ships, by the rule of the script's `code_bytes`.

    It is counted anew here, because the script that is examined may count wrongly.
    """
    tree = ast.parse(script)
    for node in ast.walk(tree):
        is_documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if is_documented and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    compressed = brotli.compress(ast.unparse(tree).encode())
    return min(len(script), len(compressed) * 5 // 4 + 500)


def check_size(s: Submission) -> Result:
    """Count the bytes of code and model; code counts as it ships."""
    code, model = count_code(s.script), len(s.artifact)
    problems = []
    if code + model > s.options.size_limit:
        problems.append(f"{code + model - s.options.size_limit:,} bytes over the limit")
    for name, size in (("bytes_code", code), ("bytes_total", code + model)):
        if s.claim(name) != size:
            problems.append(f"{RESULTS} has {name} {s.claim(name):,.0f}, not {size:,}")
    return judge(
        problems,
        f"code {code:,} + model {model:,} = {code + model:,} bytes of {s.options.size_limit:,}",
    )


def check_seconds(s: Submission) -> Result:
    """Compare the claimed times with the limits, with each other and with the log's clock."""
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
        f"the log ends at step {last}, {RESULTS} at {steps:g}": last != steps,
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
    """Train the first steps and export, twice: with the validation text and with other text.

    Training validates after each step, so a script that trains on validation text, or chooses by
    it, gets other weights. This runs on the CPU, where sums have one order.
    """
    length, steps = s.setting("TRAIN_SEQ_LEN"), s.options.steps
    batch = min(MAX_SEQUENCES, max(1, s.setting("TRAIN_BATCH_TOKENS") // length)) * length
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
        "DEVICE": "cpu",
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
        f" {answer['figures']['weights'][0][:12]} and artifact {len(artifacts[0]):,} bytes, the"
        f" same after {len(validation):,} validation tokens became {len(other):,} others",
    )


def check_evaluation(s: Submission) -> Result:
    """Score again, from script, artifact, tokenizer and validation shards in an empty folder."""
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
    for source, said in (("train.log", logged), (RESULTS, claimed)):
        if not abs(said - bpb) <= s.options.tolerance:
            problems.append(f"{source} has val_bpb {said:.8f}")
    return judge(
        problems,
        f"val_bpb {bpb:.8f} here, {logged:.8f} in the log; {evidence}; opened only script,"
        " artifact, tokenizer and validation shards",
    )


def check_probabilities(s: Submission) -> Result:
    """Sum probabilities, and look for effects of later tokens and of other rows."""
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
    """Give `evaluate` a different loss for each token: one left out or counted twice shows."""
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
        wrong.append(f"a plain loop has {ours:.6f} nats per token, evaluate {theirs:.6f}")
    lengths = ", ".join(str(case["tokens"]) for case in once)
    return judge(
        wrong,
        f"streams of {lengths} tokens, where every token after the first counts once; a plain"
        f" loop has {ours:.6f} nats per token, evaluate {theirs:.6f}",
    )


def check_bytes(s: Submission) -> Result:
    """Decode all documents; the log's bits per byte must follow from the length of the text."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(s.tokenizer))
    tokens, (loss, bpb) = s.tokens("val"), s.final()
    if tokens.max() >= model.vocab_size() or not model.is_control(int(tokens[0])):
        raise CannotCheck(
            "the validation stream is not this tokenizer's, or has no BOS at its beginning"
        )
    end = len(tokens)
    while model.is_byte(int(tokens[end - 1])):
        end -= 1  # the stream may end within a character: bytes there count one by one
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
    """Compare what log, results and artifact say of the same facts."""
    pairs = []  # what, one side, the other side
    for kind in ("roundtrip", "sliding_window"):
        for name, logged in zip(("val_loss", "val_bpb"), s.final(kind), strict=True):
            pairs.append((f"{name}_{kind}", f"{logged:.8f}", f"{s.claim(f'{name}_{kind}'):.8f}"))
    pairs += [
        (name, f"{logged:.8f}", f"{s.claim(name):.8f}")
        for name, logged in zip(("val_loss", "val_bpb"), s.final(), strict=True)
    ]
    (*_, sizes) = s.found(r"artifact code ([\d,]+) \+ model ([\d,]+) = .*", "the artifact's bytes")
    counted = (f"{count_code(s.script):,}", f"{len(s.artifact):,}")
    pairs += [("bytes in the log", sizes, counted)]
    claims = json.loads(s.part(RESULTS))
    pairs += [
        ("seed", claims.get("seed"), s.setting("SEED")),
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
    """Return the result of a check. What keeps it from one is reported, and never passes."""
    try:
        return check(s)
    except CannotCheck as error:
        return Result("not checked", str(error))
    except Exception as error:  # malformed files have many shapes; the other checks go on
        return Result("not checked", f"{type(error).__name__}: {error}")


# ---- In a child ----------------------------------------------------------------------------------
# Everything that depends on the examined script's functions.


class Watch:
    """An audit hook, which Python code cannot remove: it notes files and refuses the network."""

    def __init__(self, script: Path) -> None:
        self.script, self.folder, self.refusing = str(script), str(script.parent), True
        # By split: the functions on the stack when a shard was opened.
        self.opened: dict[str, set[str]] = {"train": set(), "val": set()}
        self.files, self.refused = set(), []

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            self.files.add(path)
            if shard := re.match(r"fineweb_(train|val)_.*\.bin", os.path.basename(path)):
                self.opened[shard[1]].add(" > ".join(self.callers(sys._getframe(1))))
        elif self.refusing and self.is_network(event, arguments):
            self.refused.append(f"{event}{tuple(str(argument) for argument in arguments[-2:])}")
            raise PermissionError(f"no network in an evaluation: {event}")

    def is_network(self, event: str, arguments: tuple) -> bool:
        """Return whether an event uses the network."""
        if event == "socket.__new__":
            return arguments[1] in (socket.AF_INET, socket.AF_INET6)
        calls = ("getaddrinfo", "gethostbyname", "connect", "sendto")
        return event in [f"socket.{call}" for call in calls]

    def callers(self, frame: FrameType | None) -> list[str]:
        """Return the script's functions on the stack, with their classes, outermost first."""
        names = []
        while frame:
            name, owner = frame.f_code.co_name, frame.f_locals.get("self")
            if frame.f_code.co_filename == self.script and not name.startswith("<"):
                names.append(f"{type(owner).__name__}.{name}" if owner is not None else name)
            frame = frame.f_back
        return names[::-1]

    def others(self) -> list[str]:
        """Return the opened files outside the child's folder, Python and the system."""
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
    """Return the network's error, empty if it works. This asks for a route and sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect(("192.0.2.1", 9))
    except OSError as error:
        return str(error)
    return ""


def load(script: Path) -> ModuleType:
    """Import the script; its `main` does not run."""
    spec = importlib.util.spec_from_file_location("examined", script)
    module = sys.modules["examined"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def child(task: str) -> None:
    """Carry out a task on the script in this folder and write answer.json."""
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
    """Train on a folder of data; return SHA-256 over the weights."""
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


class Probed(NamedTuple):
    """The script, its model from the artifact, and the validation stream."""

    script: ModuleType
    h: Any  # settings
    dist: Any  # processes and device
    model: Any
    val: Any

    def losses(self, ids: Tensor, targets: Tensor, *streaming: bool) -> Tensor:
        """Return the model's loss of each target, (B, n) float64."""
        ids, targets = ids.to(self.dist.device), targets.to(self.dist.device)
        return self.model.token_losses(ids, targets, *streaming).double()

    def evaluate(self, model: Any, tokens: Tensor) -> float:
        """Return the script's mean loss in nats."""
        return self.script.evaluate(model, tokens, self.h, self.dist, self.h.eval_stride)


def probe(script: ModuleType) -> dict:
    """Return figures of the artifact's model, of its losses and of `evaluate`."""
    import torch

    blob = Path(os.environ["MODEL_PATH"]).read_bytes()
    header, _ = script.read_artifact(blob)
    h = script.load_settings(**header["model"])
    with torch.no_grad(), script.Distributed(h) as dist:
        model = script.model_from_artifact(h, blob, dist)
        val = script.ValidationStream(h, script.Tokenizer(h.tokenizer_path, h.vocab_size))
        p = Probed(script, h, dist, model, val)
        return {
            "header": {"model": header["model"], "tokenizer": header["tokenizer"]},
            "probabilities": probe_sums(p) | probe_causality(p),
            "once": probe_scoring(p),
            "loop": probe_loop(p),
        }


def probe_sums(p: Probed) -> dict:
    """Sum the probabilities that losses give to all targets, and compare them with `predict`."""
    import torch

    vocabulary = p.h.vocab_size
    # Each row has another target at each position; over the rows, each position has every target.
    short = min(p.h.eval_seq_len, len(p.val.tokens) - 1, 24)
    ids = p.val.tokens[None, :short]
    targets = (torch.arange(vocabulary)[:, None] + 7 * torch.arange(short)) % vocabulary
    parts = [p.losses(ids.expand(len(part), -1), part) for part in targets.split(64)]
    losses = torch.cat(parts)  # (vocabulary, short)
    sums = (-losses).exp().sum(0)
    logits = p.model.predict(ids.to(p.dist.device), short)[0]
    predicted = -logits.double().log_softmax(-1)  # (short, vocabulary)
    gap = (losses - predicted.gather(1, targets.t().to(p.dist.device)).t()).abs().max()
    return {
        "vocabulary": vocabulary,
        "positions": short,
        "least": sums.min().item(),
        "most": sums.max().item(),
        "predicted": gap.item(),
    }


def probe_causality(p: Probed) -> dict:
    """Change later tokens and other rows; return how much that moves a row's earlier losses."""
    import torch

    generator = torch.Generator().manual_seed(0)
    length = min(p.h.eval_seq_len, len(p.val.tokens) - 1)
    window = p.val.tokens[: length + 1]
    shift = torch.randint(1, p.h.vocab_size, (5, length + 1), generator=generator)
    strange = (window + shift) % p.h.vocab_size

    def moved(cuts: list[int], scored: int) -> float:
        """Return the largest change of the last `scored` losses up to each cut."""
        rows = window.repeat(1 + len(cuts), 1)
        targets = rows[:, 1:].clone()
        for row, cut in enumerate(cuts, 1):
            rows[row, cut + 1 :] = strange[row, cut + 1 :]
            targets[row, cut + 1 :] = rows[row, cut + 2 :]  # the loss at the cut is of the past
        losses, skipped = p.losses(rows[:, :-1], targets[:, -scored:]), length - scored
        return max(
            (losses[row, : cut + 1 - skipped] - losses[0, : cut + 1 - skipped]).abs().max().item()
            for row, cut in enumerate(cuts, 1)
        )

    def moved_in_stream() -> float:
        """Return the same for a row of a stream that continues the row above."""
        rows = window.repeat(3, 1)
        cut = length // 2
        before = p.losses(rows[:, :-1], rows[:, 1:], True)
        rows[1, cut + 1 :] = strange[1, cut + 1 :]
        rows[2] = strange[2]
        targets = rows[:, 1:].clone()
        targets[1, cut] = window[cut + 1]
        after = p.losses(rows[:, :-1], targets, True)
        return (before - after).flatten()[: length + cut + 1].abs().max().item()

    cuts = torch.linspace(0, length - 1, 6)[1:-1].long().tolist()
    # A model may compute a window's few last positions in another way than all of them.
    few = max(2, min(p.h.eval_stride, length))
    future = 0.0
    if length > 1:
        future = max(moved(cuts, length), moved([length - 1 - few // 2], few))
    if p.h.eval_mode == "streaming":
        future = max(future, moved_in_stream())
    before, after = (
        p.losses(rows[:, :-1], rows[:, 1:])
        for rows in (window.repeat(5, 1), torch.cat([window[None], strange[1:]]))
    )
    return {
        "cuts": len(cuts) + 1,
        "future": future,
        "others": (before[0] - after[0]).abs().max().item(),
    }


class Ledger:
    """In place of a model: the loss of token number i is entry i of a table."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.aligned = table, True

    def eval(self) -> Ledger:
        return self

    def token_losses(self, ids: Tensor, targets: Tensor, streaming: bool = False) -> Tensor:
        """Look the losses up, and note whether each target is the token after its window."""
        follows = ids[:, -targets.size(1) :] + 1 == targets
        is_beyond = targets == 0  # after the stream; 0 itself is never a target
        self.aligned &= bool((follows | is_beyond).all())
        return self.table.to(targets.device)[targets]


def probe_scoring(p: Probed) -> list[dict]:
    """Evaluate streams where token number i is i, so that a loss tells its token."""
    import torch

    generator, cases = torch.Generator().manual_seed(0), []
    length, stride = p.h.eval_seq_len, p.h.eval_stride
    # The last three have windows after the first.
    beyond = (1 - length // 2, 0, 1, stride, 3 * stride // 2)
    for targets in sorted({1, *(length + more for more in beyond)}):
        table = torch.rand(targets + 1, generator=generator)
        stream = copy.copy(p.val)
        stream.tokens, stream.bytes = torch.arange(targets + 1), 3 * targets
        ledger = Ledger(table)
        mean = p.evaluate(ledger, stream.tokens)
        expected = table[1:].double().sum().item()
        cases.append(
            {
                "tokens": targets + 1,
                "mean": mean,
                "expected": expected / targets,
                "total": stream.bits_per_byte(mean) * math.log(2) * stream.bytes,
                "expected_total": expected,
                "aligned": ledger.aligned,
            }
        )
    return cases


def probe_loop(p: Probed) -> tuple[float, float]:
    """Return the nats per token of a plain loop over windows, and of `evaluate`.

    In streaming mode the loop is a single batch that holds the whole stream.
    """
    targets = len(p.val.tokens) - 1
    length, stride = min(p.h.eval_seq_len, targets), p.h.eval_stride
    if p.h.eval_mode == "streaming" and stride < length < targets:
        total = whole_stream(p, length)
    else:
        total = window_by_window(p, length, stride)
    return total / targets, p.evaluate(p.model, p.val.tokens)


def window_by_window(p: Probed, length: int, stride: int) -> float:
    """Return the sum of all losses, each from its own window."""
    targets = len(p.val.tokens) - 1
    end, total = 0, 0.0
    while end < targets:
        new = min(stride if end else length, targets - end)
        end += new
        window = p.val.tokens[None, end - length : end + 1]
        # All positions' losses: a model that computes few of them in another way must agree.
        total += p.losses(window[:, :-1], window[:, 1:])[:, -new:].sum().item()
    return total


def whole_stream(p: Probed, length: int) -> float:
    """Return the sum of all losses of a stream that is cut into the rows of one batch."""
    import torch

    targets = len(p.val.tokens) - 1
    rows = -(-targets // length)
    beyond = p.val.tokens.new_zeros(rows * length - targets)
    tokens = torch.cat([p.val.tokens, beyond])
    losses = p.losses(tokens[:-1].view(rows, length), tokens[1:].view(rows, length), True)
    return losses.flatten()[:targets].sum().item()


# ---- Command -------------------------------------------------------------------------------------


def table(results: dict[str, Result]) -> str:
    """Return the results as text."""
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


def is_going(log: Path) -> bool:
    """Return whether a process is at the run of this log: it has locked the file."""
    with log.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def parse(arguments: list[str]) -> tuple[Path, Options]:
    """Return the folder and the options of a command line."""
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
    """Run all checks; return the exit code."""
    submission = Submission(*parse(arguments))
    log = submission.folder / "train.log"
    if not log.is_file():
        print(f"error: {log.parent} has no train.log; it is not a run's folder", file=sys.stderr)
        return 1
    if is_going(log):
        print(f"error: {log.parent}: the run is still going; wait until it ends", file=sys.stderr)
        return 1
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
