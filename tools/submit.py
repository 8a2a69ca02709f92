"""Make a folder that the challenge takes from finished runs, and verify it.

    python tools/submit.py runs/ID --out FOLDER --author "NAME" --github-id LOGIN
    python tools/submit.py runs/A --seeds runs/B runs/C --out FOLDER

FOLDER holds

    train_gpt.py            the script of the run, packed: it unpacks and executes itself
    train_gpt_readable.py   the same script as it was written, from the beginning of the log
    submission.json         who, what, scores and bytes
    README.md               what was measured, how to repeat it, how it was verified
    requirements.txt        the packages, in the versions of the run
    train_seedN.log         the log of each run, unchanged
    model.int6.ptz          the artifact of the first run
    results.json, train.log results and log of the first run for tools/check.py: the packed script
                            and its bytes stand in place of the readable one

The bytes that count are those of the packed script and of the artifact. Several runs must have the
same script and the same settings except for the seed. The scores of submission.json are their
means.

FOLDER appears only once everything is verified. In empty folders without network, the packed script
must evaluate the artifact to the score of the run and train ten steps to the losses of the readable
one, and tools/check.py must pass. The exit code is 0, or 1 with one line that says what is wrong,
or 2 for unusable arguments.
"""

from __future__ import annotations

import argparse
import ast
import base64
import dataclasses
import hashlib
import json
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

try:
    import brotli
    import check
    import python_minifier
except ImportError as missing:
    raise SystemExit(
        f"error: {missing.name} is missing: pip install -r tools/requirements.txt"
    ) from None

CODE_LIMIT = 40_000  # bytes of the packed script
SAME_SCORE = 1e-8  # bits per byte; figures have eight decimals
SHORT_STEPS = 10
SHORT_SEQUENCES = 2  # of one step of the short training
# Settings that say where a run lies and how it was started, not what it computes.
PLACES = (
    "RUN_ID",
    "OUTPUT_DIR",
    "RESUME",
    "DATA_PATH",
    "TOKENIZER_PATH",
    "EVAL_ONLY",
    "MODEL_PATH",
    "EXPORT_ONLY",
    "CHECKPOINT_PATH",
)


class UserError(Exception):
    """A problem that a person can fix. The message says what is wrong, where, and what to do."""


def require(condition: object, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def say(text: str) -> None:
    """Tell the person who waits what is done now."""
    print(text, file=sys.stderr, flush=True)


# ---- Packing -------------------------------------------------------------------------------------

# The script unpacks itself under its own file name. `linecache` then has its lines, so that
# tracebacks, inspect.getsource and torch.compile find them. The entry has no time of change, so
# nobody compares it with the file.
LOADER = """\
import base64,linecache
try:import brotli
except ImportError as e:raise SystemExit(f"error: {e}; pip install -r requirements.txt")from None
s=brotli.decompress(base64.b85decode("%s")).decode()
linecache.cache[__file__]=len(s),None,s.splitlines(True),__file__
exec(compile(s,__file__,"exec"))
"""


# Which argument of what declares a setting, or an unsupported variable, explains it in words.
MEANING_PLACES = {"setting": 1, "model_setting": 1, "Alias": 0, "Unsupported": 1}
READ_MORE = "\n\nWhat the settings mean: python train_gpt_readable.py --help"


class Shortener(ast.NodeTransformer):
    """Prepares a script so that the minifier finds more to remove.

    The minifier renames no local variable where `vars` is called, and it keeps the names of
    arguments that a call may state. An argument that no call in the script states can be
    positional-only. The fields of classes need annotations, but nobody reads the types.
    """

    def __init__(self, tree: ast.Module, with_meanings: bool) -> None:
        self.with_meanings = with_meanings  # of settings, for --help
        nodes = list(ast.walk(tree))
        functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        self.stated: dict[str, set[str | None]] = {"": set()}  # by function; "": of any function
        for node in nodes:
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                name = "__init__" if name in classes else name
                key = name if name in functions else ""
                keywords = {keyword.arg for keyword in node.keywords}
                self.stated[key] = self.stated.get(key, set()) | keywords

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Write vars(x) as x.__dict__; empty the meaning of a setting."""
        self.generic_visit(node)
        name = getattr(node.func, "id", "")
        if name == "vars" and len(node.args) == 1:
            return ast.Attribute(node.args[0], "__dict__", ast.Load())
        place = MEANING_PLACES.get(name, len(node.args))
        if place < len(node.args) and not self.with_meanings:
            node.args[place] = ast.Constant("")
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Make the first arguments positional-only, up to one that a call states."""
        self.generic_visit(node)
        stated = self.stated[""] | self.stated.get(node.name, set())
        arguments = node.args
        while arguments.args and arguments.args[0].arg not in stated:
            arguments.posonlyargs.append(arguments.args.pop(0))
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Shorten a type; dataclasses look for ClassVar."""
        self.generic_visit(node)
        if "ClassVar" not in ast.unparse(node.annotation):
            node.annotation = ast.Constant(0)
        return node


def names_of_tools() -> list[str]:
    """Return every word of the tools that call a script's functions."""
    tools = (ROOT / "tools" / f"{name}.py" for name in ("check", "sample", "submit"))
    return sorted({word for tool in tools for word in re.findall(r"\w+", tool.read_text("utf-8"))})


def minify(source: str, with_meanings: bool = True, with_globals: bool = True) -> str:
    """Return a script without comments, docstrings, needless annotations and long local names.

    Names of attributes and keyword arguments stay, and so does what --help prints of the module's
    docstring. Without the meanings of settings, --help says where they are. Without the names of
    globals, only those stay that a tool mentions. UserError if the source is no Python.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"the log does not begin with a Python script: {error}") from None
    help_text = (ast.get_docstring(tree, clean=False) or "").split("\n\nContents")[0]
    help_text += "" if with_meanings else READ_MORE
    tree = ast.fix_missing_locations(Shortener(tree, with_meanings).visit(tree))
    minified = python_minifier.minify(
        ast.unparse(tree),
        remove_annotations=python_minifier.RemoveAnnotationsOptions(
            remove_class_attribute_annotations=True  # except in dataclasses and named tuples
        ),
        remove_literal_statements=True,
        rename_globals=not with_globals,
        preserve_globals=names_of_tools(),
        hoist_literals=False,  # brotli finds repeated literals itself
        preserve_locals=["self"],  # tools/check.py looks for it on the stack
    )
    return f"{help_text!r}\n{minified}"


def compress(minified: str) -> bytes:
    """Return a script that unpacks and executes a minified one."""
    compressed = brotli.compress(minified.encode(), quality=11, lgwin=24)
    return (LOADER % base64.b85encode(compressed).decode()).encode()


def pack(source: str) -> bytes:
    """Return a script that executes `source`, minified and compressed.

    It has the meanings of settings for --help if there is room, and the names of its globals if
    there is room for these. UserError if it is too large.
    """
    require(
        "b85decode" not in source,
        "the run's script is packed already; give a run of the readable script",
    )
    for kept in ((True, True), (False, True), (False, False)):
        packed = compress(minify(source, *kept))
        if len(packed) <= CODE_LIMIT:
            return packed
    raise UserError(f"the packed script has {len(packed):,} bytes, over {CODE_LIMIT:,}")


# ---- Runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A finished run."""

    parts: check.Submission
    results: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.parts.folder

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def source(self) -> str:
        return self.parts.logged_script.decode()


def check_tokenizer(run: Run, script: ModuleType) -> None:
    """Raise UserError if the tokenizer is not that of the artifact."""
    header, _ = script.read_artifact(run.parts.artifact)
    path = run.parts.tokenizer
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    require(
        header.get("tokenizer") == sha256,
        f"{path} is not the tokenizer of the artifact; name it with --tokenizer",
    )


def read_run(folder: Path, options: check.Options) -> Run:
    """Return the run of a folder. UserError or CannotCheck if it is not whole."""
    require(folder.is_dir(), f"{folder} is no folder; name a run's, such as runs/ID")
    log = folder / "train.log"
    require(log.is_file(), f"{folder} has no train.log; it is not a run's folder")
    require(not check.is_going(log), f"{folder}: the run is still going; wait until it ends")
    results = folder / "results.json"
    require(
        results.exists(), f"{folder}: the run has not ended; its RUN_ID continues it to the end"
    )
    parts = check.Submission(folder, options)
    for name in ("val_loss", "val_bpb", "seed", "bytes_model"):
        parts.claim(name)  # there is such a figure
    checksum = hashlib.sha256(parts.artifact[:-32]).digest()
    require(
        parts.artifact[-32:] == checksum,
        f"{folder}/model.int6.ptz is torn, its checksum does not match; copy it again",
    )
    return Run(parts, json.loads(results.read_bytes()))


def check_alike(runs: list[Run]) -> None:
    """Raise UserError unless the runs differ in nothing but the seed."""
    first = runs[0]
    seeds = [run.seed for run in runs]
    require(len(set(seeds)) == len(seeds), f"two runs have the same seed: {seeds}")
    for run in runs[1:]:
        require(run.source == first.source, f"{run.folder} is of another script than the first")
        pairs = {**first.parts.settings, **run.parts.settings}
        ignored = {*PLACES, "SEED"}
        different = [
            name
            for name in sorted(pairs.keys() - ignored)
            if first.parts.settings.get(name) != run.parts.settings.get(name)
        ]
        require(not different, f"{run.folder} has other settings: {', '.join(different)}")


# ---- The files of the folder ---------------------------------------------------------------------


def recount(record: str, code: int) -> str:
    """Return the lines of a log with the bytes of another script in place of those of its own."""

    def sizes(match: re.Match) -> str:
        model = int(match["model"].replace(",", ""))
        limit = int(match["limit"].replace(",", ""))
        total = code + model
        share = f"{total / limit:.1%} of {limit:,}"
        return f"code {code:,} + model {model:,} = {total:,} bytes, {share}"

    def last_line(match: re.Match) -> str:
        model = int(match["model"].replace(",", ""))
        return f"artifact {code + model:,} bytes: code {code:,}, model {model:,}"

    number = r"[\d,]*\d"
    model = rf"(?P<model>{number})"
    record = re.sub(
        rf"code {number} \+ model {model} = {number} bytes, \S+% of (?P<limit>{number})",
        sizes,
        record,
    )
    record = re.sub(rf"^code: {number} bytes", f"code: {code:,} bytes", record, flags=re.M)
    return re.sub(rf"artifact {number} bytes: code {number}, model {model}", last_line, record)


def describe(runs: list[Run], code: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the content of submission.json."""
    first = runs[0].results
    scores = [run.results["val_bpb"] for run in runs]
    by_seed = {}
    for run in runs:
        names = ("val_loss", "val_bpb", "steps", "train_seconds", "bytes_model")
        by_seed[str(run.seed)] = {name: run.results.get(name) for name in names}
    largest = max(run.results["bytes_model"] for run in runs)
    facts = {
        "author": args.author,
        "github_id": args.github_id,
        "name": args.name,
        "blurb": first.get("model", ""),
        "date": first.get("date", ""),
        "hardware": first.get("hardware", ""),
        "dataset": first.get("dataset", ""),
        "val_loss": statistics.fmean(run.results["val_loss"] for run in runs),
        "val_bpb": statistics.fmean(scores),
        "bytes_total": code + largest,
        "bytes_code": code,
        "bytes_code_readable": len(runs[0].parts.logged_script),
        "bytes_model": largest,
        "seeds": [run.seed for run in runs],
        "seed_results": by_seed,
    }
    if len(runs) > 1:
        facts["val_bpb_std"] = statistics.stdev(scores)
    copied = ("eval_mode", "trained_parameters", "frozen_parameters", "tokens_per_second")
    return facts | {name: first[name] for name in copied if name in first}


def versions(run: Run) -> dict[str, str]:
    """Return the versions that the log names."""
    found = re.findall(r"^versions (\{.*?\})", run.parts.record, re.M)
    return json.loads(found[-1]) if found else {}


def requirements(run: Run) -> str:
    """Return the packages of the script, in the versions of the run where its log has them."""
    lines = (ROOT / "requirements.txt").read_text().split()
    have = versions(run)
    pinned = []
    for line in lines:
        name = re.match(r"[\w-]+", line)[0]
        version = have.get(name, "").partition("+")[0]
        pinned.append(f"{name}=={version}" if version else line)
    return "\n".join(pinned) + "\n"


def command(run: Run, script: ModuleType) -> str:
    """Return what repeats a run in a shell: every setting that is not the script's default."""
    words = []
    for name, field in script.SETTINGS.items():
        value = run.parts.settings.get(name.upper(), "")
        is_default = value == str(field.default)
        if not is_default and name.upper() not in PLACES:
            words.append(f"{name.upper()}={shlex.quote(value)}")
    processes = re.match(r"\d*", run.results.get("hardware", ""))[0] or "1"
    launcher = f"torchrun --standalone --nproc_per_node={processes}"
    data = ["DATA_PATH=...", "TOKENIZER_PATH=..."]
    start = "python" if processes == "1" else launcher
    return " \\\n    ".join([*data, *words, f"{start} train_gpt.py"])


README = """\
# {name}

{author}{blurb}, on {hardware}, dataset `{dataset}`.

**val_bpb {score}**, val_loss {val_loss:.8f}

| seed | val_loss | val_bpb | before the export | steps | training | export | evaluation | bytes |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

Bytes: code {bytes_code:,} (packed; {bytes_code_readable:,} as it is written) and model
{bytes_model:,}, in all {bytes_total:,} of {limit:,}. Versions: {versions}.

## Repeat it

`train_gpt.py` unpacks and executes itself; `train_gpt_readable.py` is the same script to read.
{data} and the tokenizer with SHA-256 {tokenizer} must be there.

```
pip install -r requirements.txt
{command}
```

Evaluate the artifact alone:

```
{evaluation}
```

## Verified

In empty folders without network, the packed script evaluates the artifact to the score of the run.
{verified}
`python tools/check.py` on this folder finds:

```
{table}
```

`train_seedN.log` are the logs as the runs wrote them. In `train.log` and `results.json`, which
tools/check.py reads, the packed script and its bytes stand in place of the readable one; everything
else is the same as in the log of seed {seed}.
"""


def readme(
    runs: list[Run], facts: dict[str, Any], script: ModuleType, verified: str, table: str
) -> str:
    """Return the content of README.md."""
    first = runs[0]
    rows = []
    for run in runs:
        values = {"val_bpb_before": 0, "steps": 0, "train_seconds": 0, "export_seconds": 0}
        values |= {"eval_seconds": 0} | run.results
        row = (
            "| {seed} | {val_loss:.8f} | {val_bpb:.8f} | {val_bpb_before:.4f} | {steps:,}"
            " | {train_seconds:,.1f} s | {export_seconds:,.1f} s | {eval_seconds:,.1f} s"
        )
        total = facts["bytes_code"] + run.results["bytes_model"]
        rows.append(row.format(**values) + f" | {total:,} |")
    score = f"{facts['val_bpb']:.8f}"
    if len(runs) > 1:
        score += f" ± {facts['val_bpb_std']:.8f} (mean and deviation of {len(runs)} seeds)"
    scoring = {**check.scoring(first.parts), "DATA_PATH": "...", "TOKENIZER_PATH": "..."}
    evaluation = [f"{name}={shlex.quote(value)}" for name, value in scoring.items()]
    by = f"By {facts['author']}. " if facts["author"] else ""
    return README.format(
        **facts | {"author": by},
        score=score,
        rows="\n".join(rows),
        limit=first.parts.options.size_limit,
        versions=", ".join(f"{name} {version}" for name, version in versions(first).items()),
        data=f"The shards of `{facts['dataset']}`",
        tokenizer=hashlib.sha256(first.parts.tokenizer.read_bytes()).hexdigest(),
        command=command(first, script),
        evaluation=" \\\n    ".join([*evaluation, "python train_gpt.py"]),
        verified=verified,
        table=table,
        seed=first.seed,
    )


def write_folder(folder: Path, runs: list[Run], packed: bytes, facts: dict[str, Any]) -> None:
    """Write everything but README.md, which says how the rest was verified."""
    first = runs[0]
    results = first.results | {
        "bytes_code": len(packed),
        "bytes_total": len(packed) + len(first.parts.artifact),
    }
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(packed)
    (folder / "train_gpt_readable.py").write_bytes(first.parts.logged_script)
    (folder / "model.int6.ptz").write_bytes(first.parts.artifact)
    (folder / "requirements.txt").write_text(requirements(first))
    for name, content in (("submission.json", facts), ("results.json", results)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for run in runs:
        (folder / f"train_seed{run.seed}.log").write_bytes(run.parts.part("train.log"))
    record = recount(first.parts.record, len(packed))
    (folder / "train.log").write_text(packed.decode() + record, encoding="utf-8")


# ---- Verification --------------------------------------------------------------------------------


def run_script(folder: Path, settings: dict[str, str], timeout: float, what: str) -> dict:
    """Run the script of a folder without network, and return the child's report.

    UserError if it fails, or touches the network or a file outside of its folder.
    """
    answer = check.run_child("evaluate", folder, settings, timeout)
    require(not answer["error"], f"{what} ended in: {answer['error']}")
    require(not answer["refused"], f"{what} used the network: {answer['refused']}")
    require(not answer["other"], f"{what} opened other files: {', '.join(answer['other'][:5])}")
    return answer


def evaluate(parts: check.Submission, what: str) -> float:
    """Return the val_bpb to which a script evaluates its artifact in an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = check.lay_out(parts, Path(name), artifact=True)
        for path in parts.shards("val"):
            (folder / "data" / path.name).symlink_to(path)
        settings = check.scoring(parts)
        answer = run_script(folder, settings, parts.options.timeout, f"{what}'s evaluation")
    _, bpb = check.final_scores(answer["output"], "sliding_window")
    return bpb


def compare_here(run: Run, packed: check.Submission) -> check.Result:
    """Evaluate by both scripts on a machine that does not compute as that of the run did."""
    claimed = run.parts.claim("val_bpb")
    bpb = evaluate(packed, "the packed script")
    readable = evaluate(run.parts, "the readable script")
    require(
        abs(bpb - readable) <= SAME_SCORE,
        f"the packed script has val_bpb {bpb:.8f}, the readable one {readable:.8f}",
    )
    evidence = f"val_bpb {bpb:.8f} here by both scripts, {claimed:.8f} in the log"
    require(abs(bpb - claimed) <= run.parts.options.tolerance, evidence)
    return check.Result("pass", f"{evidence}, which is of another machine")


def short_training(parts: check.Submission, what: str) -> tuple[list[float], bytes]:
    """Train a few steps on the CPU; return the losses and the artifact."""
    length = parts.setting("TRAIN_SEQ_LEN")
    batch = SHORT_SEQUENCES * length
    changes = {
        "RUN_ID": "short",
        "OUTPUT_DIR": "runs",
        "DATA_PATH": "data",
        "TOKENIZER_PATH": "tokenizer.model",
        "EXPORT_ONLY": 0,
        "DEVICE": "cpu",
        "COMPILE": 0,
        "ITERATIONS": SHORT_STEPS,
        "TRAIN_BATCH_TOKENS": batch,
        "TRAIN_LOG_EVERY": 1,
        "VAL_LOSS_EVERY": 0,
        "CHECKPOINT_SECONDS": 0,
        "MAX_WALLCLOCK_SECONDS": 0,
        "WARMUP_STEPS": min(1, parts.setting("WARMUP_STEPS")),
        "GPTQ_CALIB_BATCHES": min(1, parts.setting("GPTQ_CALIB_BATCHES")),
        "EVAL_STRIDE": parts.setting("EVAL_SEQ_LEN"),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = check.lay_out(parts, Path(name), artifact=False)
        teacher = parts.settings.get("DISTILL_FROM")
        if teacher:
            (folder / "teacher").write_bytes(Path(teacher).read_bytes())
            changes["DISTILL_FROM"] = "teacher"
        train = parts.tokens("train", 2 * SHORT_STEPS * batch + length)
        check.write_shard(folder / "data", "train", train)
        validation = parts.tokens("val", 2 * parts.setting("EVAL_SEQ_LEN") + 1)
        check.write_shard(folder / "data", "val", validation)
        settings = parts.settings | {key: str(value) for key, value in changes.items()}
        run_script(folder, settings, parts.options.timeout, f"{what}'s short training")
        result = folder / "runs" / "short"
        lines = (result / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("train_loss") for line in lines]
        artifact = (result / "model.int6.ptz").read_bytes()
    return [loss for loss in losses if loss is not None], artifact


def load_script(path: Path) -> ModuleType:
    """Return the packed script as a module. UserError if it cannot be executed."""
    try:
        return check.load(path)
    except Exception as error:  # whatever stands in a log
        raise UserError(
            f"the packed script cannot be loaded: {type(error).__name__}: {error}"
        ) from None


def verify_training(run: Run, packed: check.Submission) -> str:
    """Compare ten steps of both scripts; return what was found."""
    losses, artifact = short_training(packed, "the packed script")
    expected, readable_artifact = short_training(run.parts, "the readable script")
    require(
        len(losses) == SHORT_STEPS and losses == expected,
        f"the packed script trains to the losses {losses}, the readable one to {expected}",
    )
    require(artifact == readable_artifact, "the packed script exports another artifact")
    return (
        f"{SHORT_STEPS} steps of both scripts give the same losses, from {losses[0]:.4f} to"
        f" {losses[-1]:.4f}, and the same artifact, byte for byte."
    )


def verify_checks(run: Run, packed: check.Submission) -> str:
    """Perform the checks of tools/check.py; return their table. UserError if one does not pass."""
    options = dataclasses.replace(packed.options, tolerance=SAME_SCORE)
    strict = check.Submission(packed.folder, options)
    results = {}
    for name, function in check.CHECKS.items():
        say(f"checking {name} ...")
        results[name] = check.perform(function, strict)
    if results["evaluation"].verdict == "FAIL":
        say(results["evaluation"].evidence)
        results["evaluation"] = compare_here(run, packed)
    table = check.table(results)
    bad = [name for name, result in results.items() if result.verdict != "pass"]
    if bad:
        say(table)
        raise UserError(f"tools/check.py does not pass: {', '.join(bad)}")
    return table


# ---- Command -------------------------------------------------------------------------------------


def make_submission(args: argparse.Namespace, options: check.Options) -> None:
    """Write the folder. UserError or CannotCheck says why there is none."""
    out = args.out
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(is_free, f"{out} is not empty; choose another --out")
    require(out.parent.is_dir(), f"there is no folder {out.parent} to write {out.name} to")
    folders = dict.fromkeys(path.resolve() for path in [*args.run, *args.seeds])
    runs = [read_run(folder, options) for folder in folders]
    check_alike(runs)
    packed = pack(runs[0].source)
    facts = describe(runs, len(packed), args)
    say(f"code {len(packed):,} bytes packed, {facts['bytes_code_readable']:,} readable")
    text = f"code {len(packed):,} + model {facts['bytes_model']:,} = {facts['bytes_total']:,} bytes"
    require(facts["bytes_total"] <= options.size_limit, f"{text}, over {options.size_limit:,}")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name) / "submission"
        write_folder(folder, runs, packed, facts)
        script = load_script(folder / "train_gpt.py")
        check_tokenizer(runs[0], script)
        parts = check.Submission(folder, options)
        say(f"training {SHORT_STEPS} steps twice ...")
        verified = verify_training(runs[0], parts)
        table = verify_checks(runs[0], parts)
        content = readme(runs, facts, script, verified, table)
        (folder / "README.md").write_text(content, encoding="utf-8")
        folder.replace(out)
    score = f"val_bpb {facts['val_bpb']:.8f}"
    if len(runs) > 1:
        score += f" ± {facts['val_bpb_std']:.8f} over seeds {facts['seeds']}"
    readable = f"{facts['bytes_code_readable']:,} readable"
    print(f"{table}\n{out}: {score}; {text} ({readable}), {options.size_limit:,} allowed")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="folder of the run to submit")
    add("--out", type=Path, required=True, help="folder to write; it must be empty or new")
    add("--seeds", nargs="+", type=Path, default=[], metavar="RUN", help="runs of other seeds")
    add("--author", default="", help="for submission.json")
    add("--github-id", default="", help="for submission.json")
    add("--name", default="Adapters on random linear maps", help="for submission.json")
    for field in dataclasses.fields(check.Options):
        if field.name in ("data", "tokenizer", "train_limit", "eval_limit", "timeout"):
            default = field.default
            flag = "--" + field.name.replace("_", "-")
            add(flag, type=type(default), default=default, help="as for tools/check.py")
    args = parser.parse_args(arguments)
    if not args.run and not args.seeds:
        parser.error("name the folder of a run, such as runs/ID")
    args.run = [args.run] if args.run else []
    return args


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the options that are those of tools/check.py."""
    for field in dataclasses.fields(check.Options):
        if hasattr(args, field.name):
            yield field.name, getattr(args, field.name)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    args = parse(arguments)
    try:
        make_submission(args, check.Options(**dict(chosen(args))))
    except (UserError, check.CannotCheck) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, UnicodeError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing is written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
