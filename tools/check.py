"""Verify a submission as a suspicious reviewer would: recompute its claims and print the evidence.

    python tools/check.py runs/ID
    python tools/check.py FOLDER --data DATA_PATH --tokenizer TOKENIZER_PATH --steps 2

FOLDER holds train.log, model.int6.ptz and results.json. Its train_gpt.py is the code under
examination; without one it is the source at the beginning of the log. Settings are those of the
log, and so are DATA_PATH and TOKENIZER_PATH unless they are given; MODEL_LIMIT_BYTES is that of the
environment if it is set there. The exit code is 0 if every check passes, 1 if one fails or cannot
be made, 2 for unusable arguments.

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
import shlex
import site
import socket
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import brotli
    import numpy as np
    import sentencepiece
except ImportError as missing:
    raise SystemExit(f"error: {missing.name} is missing: pip install -r requirements.txt") from None

if TYPE_CHECKING:  # a child imports torch once the examined script runs
    from torch import Tensor

INHERITED = r"PATH|LANG|LC_ALL|LD_LIBRARY_PATH|OMP_NUM_THREADS|MODEL_LIMIT_BYTES|(CUDA|MALLOC)_\w+"
# Settings that say where a run lies and how it was started, not what it computes.
PLACES = {"RUN_ID", "OUTPUT_DIR", "RESUME", "DATA_PATH", "TOKENIZER_PATH"}
PLACES |= {"EVAL_ONLY", "MODEL_PATH", "EXPORT_ONLY", "CHECKPOINT_PATH"}
SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev")  # any process opens these
ARTIFACT, RESULTS = "model.int6.ptz", "results.json"
MAX_SEQUENCES = 8  # of one step of the short training
PROBABILITY = 1e-4  # nats between two computations of the same shape
EXACT = 1e-6  # between figures that differ only by rounding in print


class CannotCheck(Exception):
    """A check cannot be made. The message says what is missing and what to do."""


class Result(NamedTuple):
    verdict: str  # pass, FAIL or not checked
    evidence: str


def judge(problems: dict[str, object], evidence: str) -> Result:
    """Return FAIL if one of the statements in `problems` is true, else pass."""
    found = [text for text, is_one in problems.items() if is_one]
    return Result("FAIL" if found else "pass", "; ".join([*found, evidence]))


# ---- The submission ------------------------------------------------------------------------------


class Submission:
    """The parts of a run's folder, each read when it is first needed.

    CannotCheck if one is missing, or if the run is still going.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        log = folder / "train.log"
        if not log.is_file():
            raise CannotCheck(f"{folder} has no train.log; it is not a run's folder")
        with log.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotCheck(f"{folder}: the run is still going; wait for its end") from None

    def part(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            advice = f"copy the run's {name} to {self.folder}"
            raise CannotCheck(f"{name}: {error.strerror}; {advice}") from None

    @functools.cached_property
    def starts(self) -> list[str]:
        """The log, cut before the settings; the last part belongs to the last start.

        A run writes its source and its settings when it starts, and again when it continues.
        """
        starts = self.part("train.log").decode("utf-8", "replace").split("\nRUN_ID=")
        if len(starts) == 1:
            raise CannotCheck("train.log has no source and settings; give the run's whole log")
        return starts

    @functools.cached_property
    def script(self) -> bytes:
        has_script = (self.folder / "train_gpt.py").exists()
        return self.part("train_gpt.py") if has_script else self.starts[0].encode()

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        return dict(re.findall(r"^([A-Z][A-Z0-9_]*)=(.*)$", f"RUN_ID={self.starts[-1]}", re.M))

    def setting(self, name: str) -> int:
        text = self.settings.get(name, "")
        if not text.isdecimal():
            raise CannotCheck(f"train.log has no whole number {name}=; give the run's whole log")
        return int(text)

    def claim(self, name: str) -> float:
        try:
            value = float(json.loads(self.part(RESULTS))[name])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise CannotCheck(f"{RESULTS} has no figure {name}; a run writes it at its end")
        return value

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
            raise CannotCheck(f"no fineweb_{split}_*.bin in {folder}; give --data")
        return paths

    def tokens(self, split: str, count: int | None = None) -> np.ndarray:
        """Return the first tokens of a split, (n,) uint16, without the script's reader."""
        shards = [np.memmap(path, "<u2", "r", 1024) for path in self.shards(split)]
        return np.concatenate([shard[:count] for shard in shards])[:count]

    @functools.cached_property
    def training(self) -> dict:
        return train_briefly(self)

    @functools.cached_property
    def evaluation(self) -> dict:
        """The answer of the child that evaluates the artifact and probes the script's functions."""
        files = {f"data/{path.name}": path for path in self.shards("val")}
        changes = {"EVAL_ONLY": 1, "MODEL_PATH": ARTIFACT, "DATA_PATH": "data"}
        return run_child("evaluate", self, files | {ARTIFACT: self.part(ARTIFACT)}, changes)


def logged(pattern: str, text: str, what: str) -> Any:
    """Return the groups of a pattern where it last matches a log. CannotCheck if it never does."""
    found = re.findall(pattern, text, re.M)
    if not found:
        raise CannotCheck(f"train.log has no {what}; give the log of a run that came to its end")
    return found[-1]


def final_scores(text: str) -> tuple[float, float]:
    """Return val_loss and val_bpb of the last exact line of sliding windows."""
    line = r"^final_int6_\w+_sliding_window_exact val_loss:([\d.]+) val_bpb:([\d.]+)$"
    loss, bpb = logged(line, text, "line final_int6_*_sliding_window_exact")
    return float(loss), float(bpb)


# ---- Children ------------------------------------------------------------------------------------


def shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


@functools.cache
def namespace() -> tuple[str, ...]:
    """Return what starts a command without network interfaces, if the system lets a user do it."""
    command = ("unshare", "--map-root-user", "--net", "--")
    try:
        subprocess.run([*command, "true"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return command


def run_child(
    task: str, s: Submission, files: dict[str, bytes | Path], changes: dict[str, object]
) -> dict:
    """Run a task on the script, in a folder with these files, by the settings of the run.

    A file is given by its content, or by the path that it is a link to; `changes` are settings that
    differ from the run's. Returns the report of `child` and what the script printed. CannotCheck if
    there is no report.
    """
    settings = {name: value for name, value in s.settings.items() if name not in PLACES}
    settings |= {name: str(value) for name, value in changes.items()}
    settings["TOKENIZER_PATH"] = "tokenizer.model"
    files = {"train_gpt.py": s.script, "tokenizer.model": s.tokenizer.read_bytes()} | files
    clean = {name: value for name, value in os.environ.items() if re.fullmatch(INHERITED, name)}
    command = [*namespace(), sys.executable, "-B", str(Path(__file__).absolute()), "--child", task]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                path.symlink_to(content.absolute())
            else:
                path.write_bytes(content)
        clean |= {"HOME": folder, "TMPDIR": folder, "PYTHONUSERBASE": site.getuserbase()}
        options = {"cwd": folder, "env": settings | clean, "timeout": s.options.timeout}
        try:
            done = subprocess.run(
                command, **options, stdin=subprocess.DEVNULL, capture_output=True, errors="replace"
            )
        except subprocess.TimeoutExpired:
            raise CannotCheck(
                f"{task} takes over {s.options.timeout:g} s here; give more with --timeout"
            ) from None
        answer = Path(folder, "answer.json")
        if not answer.exists():
            last = done.stderr.strip().rpartition("\n")[2] or "no message"
            raise CannotCheck(f"the child for {task} ended with {done.returncode}: {last}")
        return json.loads(answer.read_text()) | {"output": done.stdout}


def train_briefly(s: Submission) -> dict:
    """Train the first steps and export, twice: with the validation text and with another one.

    Training validates after each step. It runs on the CPU, where sums have one order, and without
    TARGET_BYTES, which makes the scales depend on the bytes of the code.

    Returns the child's answer: `val` and `other` are what came out with each text.
    """
    length, window = s.setting("TRAIN_SEQ_LEN"), s.setting("EVAL_SEQ_LEN")
    batch = min(MAX_SEQUENCES, max(1, s.setting("TRAIN_BATCH_TOKENS") // length)) * length
    count = max(s.options.steps * batch, 2 * window) + 1
    training = s.tokens("train", 2 * count + length)
    changes = {
        "ITERATIONS": s.options.steps,
        "TRAIN_BATCH_TOKENS": batch,
        "MAX_WALLCLOCK_SECONDS": 0,
        "CHECKPOINT_SECONDS": 0,
        "TARGET_BYTES": 0,
        "ARTIFACT_LIMIT_BYTES": 2**40,
        "COMPILE": 0,
        "DEVICE": "cpu",
        "VAL_LOSS_EVERY": 1,
        "TRAIN_LOG_EVERY": 1,
        "EVAL_STRIDE": window,
        "WARMUP_STEPS": min(1, s.setting("WARMUP_STEPS")),
        "GPTQ_CALIB_BATCHES": min(2, s.setting("GPTQ_CALIB_BATCHES")),
    }
    files: dict[str, bytes | Path] = {}
    for text, validation in (("val", s.tokens("val", count)), ("other", training[:count])):
        files[f"{text}/fineweb_val_000000.bin"] = shard(validation)
        files[f"{text}/fineweb_train_000000.bin"] = shard(training)
    teacher = s.settings.get("DISTILL_FROM")
    if teacher:
        files["teacher"] = Path(teacher)
        changes["DISTILL_FROM"] = "teacher"
    answer = run_child("train", s, files, changes)
    if answer["error"]:
        raise CannotCheck(f"the short training ended in: {answer['error']}")
    return answer


# ---- The checks ----------------------------------------------------------------------------------


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
    code, model, limit = count_code(s.script), len(s.part(ARTIFACT)), s.options.size_limit
    problems = {f"{code + model - limit:,} bytes over the limit": code + model > limit}
    claimed, total = s.claim("bytes_code"), s.claim("bytes_total")
    # Versions of Python write an f-string back in different ways.
    is_wrong = abs(claimed - code) > code // 100
    problems[f"{RESULTS} has bytes_code {claimed:,.0f}, not {code:,}"] = is_wrong
    expected = claimed + model
    problems[f"{RESULTS} has bytes_total {total:,.0f}, not {expected:,.0f}"] = total != expected
    return judge(problems, f"code {code:,} + model {model:,} = {code + model:,} bytes of {limit:,}")


def check_untouched(s: Submission) -> Result:
    """Replace the validation text of a short training: nothing that is learned may change."""
    answer = s.training
    ours, theirs = answer["val"], answer["other"]
    readers = answer["opened"]["val"]
    strangers = [by for by in readers if "ValidationStream." not in by]
    problems = {
        f"validation shards opened by {', '.join(strangers)}": strangers,
        "no validation shard was seen being opened": not readers,
        f"other files opened: {', '.join(answer['files'][:5])}": answer["files"],
        "the two texts score alike, so the comparison says nothing": ours["scores"]
        == theirs["scores"],
    }
    for what in ("weights", "artifact", "losses"):
        problems[f"other validation text gives other {what}"] = ours[what] != theirs[what]
    return judge(
        problems,
        f"{s.options.steps} steps and export: validation shards opened by {', '.join(readers)};"
        f" weights {ours['weights'][:12]} and artifact {ours['artifact'][:12]} are the same with"
        " another validation text",
    )


def check_evaluation(s: Submission) -> Result:
    """Score again, from script, artifact, tokenizer and validation shards in an empty folder."""
    said = {"train.log": final_scores(s.starts[-1])[1], RESULTS: s.claim("val_bpb")}
    answer = s.evaluation
    network = (
        "isolated namespace" if namespace() else "sockets refused in Python, no namespace here"
    )
    evidence = f"network off: {network}"
    problems = {
        f"the script used the network: {', '.join(answer['refused'])}": answer["refused"],
        f"other files opened: {', '.join(answer['files'][:5])}": answer["files"],
    }
    if answer["error"]:
        return judge(problems | {f"the evaluation ended in: {answer['error']}": True}, evidence)
    _, bpb = final_scores(answer["output"])
    for source, claimed in said.items():
        is_near = abs(claimed - bpb) <= s.options.tolerance
        problems[f"{source} has val_bpb {claimed:.8f}"] = not is_near
    return judge(
        problems,
        f"val_bpb {bpb:.8f} here, {said['train.log']:.8f} in the log; {evidence}; opened only"
        " script, artifact, tokenizer and validation shards",
    )


def found_by_child(name: str, s: Submission) -> Result:
    error = s.evaluation["error"]
    if error:
        raise CannotCheck(f"the script cannot be probed on the artifact: {error}")
    return Result(*s.evaluation[name])


def check_bytes(s: Submission) -> Result:
    """Decode all documents; the log's bits per byte must follow from the length of the text."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(s.tokenizer))
    tokens, (loss, bpb) = s.tokens("val"), final_scores(s.starts[-1])
    if tokens.max() >= model.vocab_size() or not model.is_control(int(tokens[0])):
        raise CannotCheck("the validation text has no BOS first, or is not this tokenizer's")
    end = len(tokens)
    while model.is_byte(int(tokens[end - 1])):
        end -= 1  # the stream may end within a character: bytes there count one by one
    documents = np.split(tokens[:end], np.flatnonzero(tokens[:end] == tokens[0]))
    texts = (model.decode(document.tolist()) for document in documents)
    size = len(tokens) - end + sum(len(text.encode()) for text in texts)
    expected = loss * (len(tokens) - 1) / math.log(2) / size
    return judge(
        {f"the log has val_bpb {bpb:.8f}": not abs(bpb - expected) <= EXACT},
        f"{len(tokens):,} tokens decode to {size:,} bytes; val_loss {loss:.8f} then is"
        f" val_bpb {expected:.8f}",
    )


# By the figure of the results: where the log says it last, and how far the two may be apart; None
# for a text, which ends in what the log has.
LOGGED: dict[str, tuple[str, float | None]] = {
    "val_loss": (r"^final_int6_\w+_sliding_window_exact val_loss:(\S+) ", EXACT),
    "val_bpb": (r"^final_int6_\w+_sliding_window_exact .* val_bpb:(\S+)$", EXACT),
    "val_bpb_before": (r"^step:\S+ val_loss:\S+ val_bpb:(\S+) ", 1e-4),
    "train_seconds": (r"^step:.* train_time:(\d+ms) ", 0.002),
    "steps": (r"^step:(\d+)/\d+ .*train_time:", 0),
    "seed": (r"^SEED=(\d+)$", 0),
    "trained_parameters": (r"^([\d,]+) trained and [\d,]+ frozen ", 0),
    "frozen_parameters": (r"^[\d,]+ trained and ([\d,]+) frozen ", 0),
    "dataset": (r"^DATA_PATH=(?:.*/)?([^/\n]+)/*$", None),
    "hardware": (r"^versions \{.*\} device (.*), \d+ threads$", None),
    "eval_mode": (r"^final_int6_\w+_sliding_window .* mode:(\w+) ", None),
}


def check_claims(s: Submission) -> Result:
    """Compare the figures with the log and the times with the limits; look for another source."""
    log, results = "\nRUN_ID=".join(s.starts), json.loads(s.part(RESULTS))
    problems: dict[str, object] = {}
    for name, (pattern, gap) in LOGGED.items():
        text, claimed = logged(pattern, log, name), str(results.get(name))
        if gap is None:
            differs = not claimed.endswith(text)
        else:
            value = float(text.replace(",", "").replace("ms", "e-3"))
            differs = not abs(value - s.claim(name)) <= gap
        problems[f"{name}: {text} in the log, {claimed} in {RESULTS}"] = differs
    train, export, evaluation = (s.claim(f"{name}_seconds") for name in ("train", "export", "eval"))
    train_limit, eval_limit = s.options.train_limit, s.options.eval_limit
    goes_on = all(start.endswith(s.starts[0]) for start in s.starts[:-1])
    other_start = r"^(EXPORT_ONLY=1$|warning: the script has changed)"
    problems |= {
        f"training and export over {train_limit:g} s": train + export > train_limit,
        f"evaluation over {eval_limit:g} s": evaluation > eval_limit,
        "a time is negative": min(train, export, evaluation) < 0,
        "train_gpt.py is not the source in the log": s.script != s.starts[0].encode(),
        "the run was continued with another source": not goes_on,
        "the weights were trained by another start; check that run": re.search(
            other_start, "\n".join(s.starts[1:]), re.M
        ),
    }
    return judge(
        problems,
        f"training {train:g} + export {export:g} = {train + export:.3f} s of {train_limit:g},"
        f" evaluation {evaluation:g} s of {eval_limit:g}; the log says the same of"
        f" {', '.join(LOGGED)}; other times, and the number of processes, are the run's own"
        " statement",
    )


CHECKS: dict[str, Callable[[Submission], Result]] = {
    "size": check_size,
    "untouched": check_untouched,
    "evaluation": check_evaluation,
    "probabilities": functools.partial(found_by_child, "probabilities"),
    "scoring": functools.partial(found_by_child, "scoring"),
    "bytes": check_bytes,
    "claims": check_claims,
}


def perform(name: str, s: Submission) -> Result:
    """Return the result of a check; what keeps it from one never passes."""
    print(f"checking {name} ...", file=sys.stderr, flush=True)
    try:
        return CHECKS[name](s)
    except CannotCheck as error:
        return Result("not checked", str(error))
    except Exception as error:  # malformed files have many shapes; the other checks go on
        return Result("not checked", f"{type(error).__name__}: {error}")


# ---- In a child ----------------------------------------------------------------------------------
# Everything that depends on the examined script's functions.


class Watch:
    """An audit hook, which Python code cannot remove: it notes files and refuses the network."""

    def __init__(self, script: Path) -> None:
        self.script = str(script)
        # By split: the functions on the stack when a shard was opened.
        self.opened: dict[str, list[str]] = {"train": [], "val": []}
        self.files, self.refused = set(), []

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            self.files.add(path)
            shard = re.match(r"fineweb_(train|val)_.*\.bin", os.path.basename(path))
            if shard:
                by = " > ".join(self.callers())
                self.opened[shard[1]] = sorted({*self.opened[shard[1]], by})
        elif event in ("socket.__new__", "socket.getaddrinfo", "socket.gethostbyname"):
            if event == "socket.__new__" and arguments[1] == socket.AF_UNIX:
                return
            self.refused.append(f"{event}{tuple(map(str, arguments[1:]))}")
            raise PermissionError(f"no network in an evaluation: {event}")

    def callers(self) -> list[str]:
        """Return the script's functions on the stack, with their classes, outermost first."""
        names = []
        for frame, _ in traceback.walk_stack(None):
            name, owner = frame.f_code.co_name, frame.f_locals.get("self")
            if frame.f_code.co_filename == self.script and not name.startswith("<"):
                names.append(f"{type(owner).__name__}.{name}" if owner is not None else name)
        return names[::-1]

    def others(self) -> list[str]:
        """Return the opened files outside the child's folder, Python and the system."""
        python = {sys.prefix, sys.base_prefix, site.getuserbase(), *sys.path}
        roots = {os.path.dirname(self.script), *python, *SYSTEM} - {""}
        roots |= {os.path.realpath(root) for root in roots}
        inside = tuple(os.path.join(root, "") for root in roots)
        outside = [path for path in self.files if not path.startswith(inside)]
        return sorted(path for path in outside if os.path.isfile(path) and path != __file__)


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
    watch, found, problem = Watch(script), {}, ""
    sys.addaudithook(watch)
    try:
        if task == "train":
            found = {text: train(load(script), text) for text in ("val", "other")}
        else:
            module = load(script)
            module.main()
            found = probe(module)
    except SystemExit as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    seen = {"opened": watch.opened, "refused": watch.refused, "files": watch.others()}
    content = json.dumps({"error": problem, **seen, **found})
    Path(script.parent, "answer.json").write_text(content)


def train(script: ModuleType, text: str) -> dict[str, Any]:
    """Train on a folder of data; return SHA-256 of what was learned, the losses and the scores."""
    import torch

    os.environ |= {"DATA_PATH": text, "OUTPUT_DIR": "runs", "RUN_ID": text}
    script.main()
    run = Path("runs", text)
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    digest = hashlib.sha256()
    for name, weight in sorted(saved["weights"].items()):
        values = weight.contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(name.encode() + values.tobytes())
    log = (run / "train.log").read_text("utf-8").rpartition("\nRUN_ID=")[2]  # below the source
    return {
        "weights": digest.hexdigest(),
        "artifact": hashlib.sha256((run / ARTIFACT).read_bytes()).hexdigest(),
        "losses": re.findall(r"^average .*|train_loss:\S+", log, re.M),
        "scores": re.findall(r"^final_int6_.*_exact .*", log, re.M),
    }


class Probed(NamedTuple):
    """The script, its model from the artifact, and the validation text."""

    script: ModuleType
    h: Any  # settings
    dist: Any  # processes and device
    model: Any
    val: Any

    def losses(self, ids: Tensor, targets: Tensor, streaming: bool = False) -> Tensor:
        """Return the model's loss of each target, (B, n) float64 on the CPU."""
        ids, targets = ids.to(self.dist.device), targets.to(self.dist.device)
        return self.model.token_losses(ids, targets, streaming).double().cpu()


def probe(script: ModuleType) -> dict[str, Result]:
    """Look at the artifact's model, at its losses and at `evaluate`."""
    import torch

    os.environ["COMPILE"] = "0"
    h = script.load_settings()
    blob = Path(h.model_path).read_bytes()
    h = script.settings_from_artifact(h, blob)
    with torch.no_grad(), script.Distributed(h) as dist:
        model = script.model_from_artifact(h, blob, dist)
        val = script.ValidationStream(h, script.Tokenizer(h.tokenizer_path, h.vocab_size))
        p = Probed(script, h, dist, model, val)
        distance, (future, others) = distance_from_softmax(p), changes_of_losses(p)
        scoring = probe_scoring(p)
    problems = {
        "losses are not those of one distribution": not distance <= PROBABILITY,
        "the future changes the past": not future <= PROBABILITY,
        "other windows of a batch change a window": not others <= PROBABILITY,
    }
    evidence = (
        f"losses of all {h.vocab_size} targets are within {distance:.1e} of the softmax of"
        f" `predict`; changed futures move earlier log-probabilities by {future:.1e} at most,"
        f" other windows by {others:.1e}"
    )
    return {"probabilities": judge(problems, evidence), "scoring": scoring}


def distance_from_softmax(p: Probed) -> float:
    """Return how far losses of all targets are from the softmax of `predict`, which sees none.

    All batches have one shape, and each row is compared with itself: rounding depends on both.
    """
    import torch

    rows, length = 64, min(p.h.eval_seq_len, len(p.val.tokens) - 1, 24)
    ids = p.val.tokens[:length].expand(rows, -1)
    logits = p.model.predict(ids.to(p.dist.device), length)
    expected = -logits.double().cpu().log_softmax(-1)  # (rows, length, vocabulary)
    distances = []
    for first in range(0, p.h.vocab_size, rows):
        # Each position has another target; over the batches it has all of them.
        row = first + torch.arange(rows)[:, None]
        targets = (row + 7 * torch.arange(length)) % p.h.vocab_size
        chosen = expected.gather(2, targets[..., None])[..., 0]
        distances.append((p.losses(ids, targets) - chosen).abs().max())
    return torch.stack(distances).max().item()


def changes_of_losses(p: Probed) -> tuple[float, float]:
    """Return how much later tokens, and other rows of a batch, move losses of earlier tokens."""
    import torch

    length = min(p.h.eval_seq_len, len(p.val.tokens) - 1)
    window = p.val.tokens[: length + 1]
    generator = torch.Generator().manual_seed(0)
    shift = torch.randint(1, p.h.vocab_size, (5, length + 1), generator=generator)
    strange = (window + shift) % p.h.vocab_size

    def moved(cuts: list[int], scored: int, streaming: bool = False) -> Tensor:
        """Put strange tokens after the cut of each row; return how far losses before it move."""
        is_future = torch.arange(length + 1) > torch.tensor(cuts)[:, None]
        is_past = ~is_future[:, :-1]
        if streaming:  # a row continues the row above
            is_past = is_past.flatten().long().cumprod(0).view_as(is_past).bool()
        windows = window.expand(len(cuts), -1)
        rows = torch.where(is_future, strange[: len(cuts)], windows)
        # The loss at the cut itself is of the past, too, with the target of the window.
        targets = torch.where(is_past, windows[:, 1:], rows[:, 1:])[:, -scored:]
        before = p.losses(windows[:, :-1], windows[:, -scored:], streaming)
        after = p.losses(rows[:, :-1], targets, streaming)
        return (before - after).abs()[is_past[:, -scored:]].max()

    # A model may compute a window's few last positions in another way than all of them.
    few = min(p.h.eval_stride, length)
    future = [
        moved([length * i // 5 for i in range(1, 5)], length),
        moved([length - 1 - few // 2], few),
    ]
    if p.h.eval_mode == "streaming":
        future.append(moved([length, length // 2, 0], length, streaming=True))
    others = moved([length, -1, -1, -1, -1], length)
    return torch.stack(future).max().item(), others.item()


class Ledger:
    """In place of a model, for streams where token number i is i: its loss is entry i of a table.

    It notes whether each window is a piece of the stream, and each target the token after it.
    """

    def __init__(self, table: Tensor) -> None:
        self.table, self.is_aligned = table, True

    def eval(self) -> Ledger:
        return self

    def token_losses(self, ids: Tensor, targets: Tensor, streaming: bool = False) -> Tensor:
        follows = ids[:, -targets.size(1) :] + 1 == targets
        goes_on = ids[:, :-1] + 1 == ids[:, 1:]
        # Behind the stream there are zeros; 0 itself is never a target.
        self.is_aligned &= bool((follows | (targets == 0)).all())
        self.is_aligned &= bool((goes_on | (ids[:, 1:] == 0)).all())
        return self.table.to(targets.device)[targets]


def probe_scoring(p: Probed) -> Result:
    """Give `evaluate` a different loss for each token: one left out or counted twice shows."""
    import torch

    generator, problems = torch.Generator().manual_seed(0), {}
    length, stride = p.h.eval_seq_len, p.h.eval_stride
    counts = [1, length, length + 1, length + 3 * stride // 2]  # the last two have two windows
    for count in counts:
        ledger = Ledger(torch.rand(count + 1, generator=generator))
        stream = copy.copy(p.val)
        stream.tokens, stream.bytes = torch.arange(count + 1), 3 * count
        mean = p.script.evaluate(ledger, stream.tokens, p.h, p.dist, stride)
        expected = ledger.table[1:].double().mean().item()
        bpb, expected_bpb = stream.bits_per_byte(mean), expected / math.log(2) / 3
        where = f"{count + 1} tokens: "
        problems |= {
            f"{where}mean {mean:.6f}, not {expected:.6f}": not abs(mean - expected) <= EXACT,
            f"{where}BPB {bpb:.6f}, not {expected_bpb:.6f}": not abs(bpb - expected_bpb) <= EXACT,
            f"{where}a target is not the token after its window": not ledger.is_aligned,
        }
    sizes = ", ".join(str(count + 1) for count in counts)
    return judge(problems, f"in streams of {sizes} tokens every token after the first counts once")


def command_of(settings: dict[str, str], hardware: Any) -> str:
    """Return what repeats a run in a shell; `hardware` begins with the number of processes."""
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    processes = str(hardware).partition(" ")[0]
    start = "python"
    if processes.isdigit() and processes != "1":
        start = f"torchrun --standalone --nproc_per_node={processes}"
    return " \\\n    ".join([*words, f"{start} train_gpt.py"])


# ---- Command -------------------------------------------------------------------------------------


def table(results: dict[str, Result]) -> str:
    rows = []
    for name, (verdict, evidence) in results.items():
        indents = {"initial_indent": f"{name:<15}{verdict:<13}", "subsequent_indent": 28 * " "}
        rows.append(textwrap.fill(evidence, 110, **indents, break_on_hyphens=False))
    return "\n".join(rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", default="", help="folder of fineweb_{train,val}_*.bin (default: the log's)")
    add("--tokenizer", default="", help="SentencePiece model (default: the log's)")
    add("--train-limit", type=float, default=600, help="seconds of training and export (600)")
    add("--eval-limit", type=float, default=600, help="seconds of evaluation (600)")
    add("--size-limit", type=int, default=16_000_000, help="bytes of code and model (16 million)")
    add("--tolerance", type=float, default=1e-4, help="BPB between two evaluations (0.0001)")
    add("--steps", type=int, default=3, help="steps of the short training (3)")
    add("--timeout", type=float, default=3600, help="seconds that one child may take (3600)")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN_OR_FOLDER")
    add_options(parser)
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder; name a run's, such as runs/ID")
    if options.steps < 1 or options.timeout <= 0 or options.tolerance < 0:
        parser.error("--steps and --timeout must be over 0, --tolerance not under 0")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        submission = Submission(options.folder, options)
    except CannotCheck as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = {name: perform(name, submission) for name in CHECKS}
    bad = [name for name, result in results.items() if result.verdict != "pass"]
    print(table(results))
    summary = f"{len(results) - len(bad)} of {len(results)} checks pass"
    print(f"{summary}; not: {', '.join(bad)}" if bad else summary)
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
