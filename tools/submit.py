"""Make a folder that the challenge takes from finished runs, and verify it.

    python tools/submit.py runs/ID --out FOLDER --author "NAME" --github-id LOGIN
    python tools/submit.py runs/A --seeds runs/B runs/C --out FOLDER

FOLDER holds

    train_gpt.py, train_gpt_readable.py   the script, packed (it executes itself) and as written
    submission.json, README.md            means of all runs, bytes, how to repeat and verify it
    requirements.txt, train_seedN.log     the versions of the packages, and each run's log
    model.int6.ptz, results.json, train.log of the first run, for tools/check.py

The bytes that count are those of the packed script and of the artifact. Several runs must have the
same script, data and settings except for the seed.

FOLDER appears only once everything is verified. Without network, the packed script must train ten
steps to the weights, the artifact and the scores of the readable one. tools/check.py must pass with
the packed script, and for runs of other seeds, each of which it evaluates again. The exit code is
0, or 1 with one line that says what is wrong, or 2 for unusable arguments.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
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

SHORT_STEPS = 10
OTHER_SEEDS = ("size", "evaluation", "bytes", "claims")  # what is checked of further runs


def require(condition: object, message: str) -> None:
    """Raise CannotCheck with the message, which says what to do, unless the condition holds."""
    if not condition:
        raise check.CannotCheck(message)


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


def pack(source: str) -> bytes:
    """Return a script that executes `source`, minified and compressed.

    Names stay, except for local ones, and so does what --help prints of the module's docstring.
    CannotCheck if the source is no Python, or packed already.
    """
    require("b85decode" not in source, "the run's script is packed already; give a readable one")
    try:
        help_text = ast.get_docstring(ast.parse(source), clean=False) or ""
    except (SyntaxError, ValueError) as error:
        raise check.CannotCheck(f"the log does not begin with a Python script: {error}") from None
    minified = python_minifier.minify(
        source,
        remove_annotations=python_minifier.RemoveAnnotationsOptions(
            remove_class_attribute_annotations=True  # except in dataclasses and named tuples
        ),
        remove_literal_statements=True,
        hoist_literals=False,  # brotli finds repeated literals itself
        preserve_locals=["self"],  # tools/check.py looks for it on the stack
    )
    help_text = help_text.partition("\n\nContents")[0]
    compressed = brotli.compress(f"{help_text!r}\n{minified}".encode(), quality=11, lgwin=24)
    return (LOADER % base64.b85encode(compressed).decode()).encode()


# ---- Runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    parts: check.Submission
    results: dict[str, Any]
    bytes_model: int

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def versions(self) -> dict[str, str]:
        found = re.findall(r"^versions (\{.*?\})", self.parts.starts[-1], re.M)
        return json.loads(found[-1]) if found else {}


def read_run(folder: Path, args: argparse.Namespace) -> Run:
    require(folder.is_dir(), f"{folder} is no folder; name a run's, such as runs/ID")
    parts = check.Submission(folder, args)
    has_ended = (folder / check.RESULTS).exists()
    require(has_ended, f"{folder}: the run has not ended; its RUN_ID continues it to the end")
    for name in ("val_loss", "val_bpb", "seed"):
        parts.claim(name)  # there is such a figure
    return Run(parts, json.loads(parts.part(check.RESULTS)), len(parts.part(check.ARTIFACT)))


def data_of(parts: check.Submission) -> list[tuple[str, int]]:
    """Return the names and sizes of the shards, which a run is tied to, too."""
    paths = parts.shards("train") + parts.shards("val")
    return [(path.name, path.stat().st_size) for path in paths]


def check_alike(runs: list[Run]) -> None:
    """Raise CannotCheck unless the runs differ in nothing but the seed."""
    seeds = [run.seed for run in runs]
    require(len(set(seeds)) == len(seeds), f"two runs have the same seed: {seeds}")
    artifacts = {run.parts.part(check.ARTIFACT) for run in runs}
    require(len(artifacts) == len(runs), "two runs have the same artifact")
    first = runs[0].parts
    for run in runs[1:]:
        folder, ours, theirs = run.parts.folder, first.settings, run.parts.settings
        is_same = run.parts.starts[0] == first.starts[0]
        require(is_same, f"{folder} is of another script than the first")
        names = sorted((ours | theirs).keys() - {*check.PLACES, "SEED"})
        different = [name for name in names if ours.get(name) != theirs.get(name)]
        require(not different, f"{folder} has other settings: {', '.join(different)}")
        require(data_of(run.parts) == data_of(first), f"{folder} was trained on other data")
        is_same = run.parts.tokenizer.read_bytes() == first.tokenizer.read_bytes()
        require(is_same, f"{folder} has another tokenizer")


# ---- The files of the folder ---------------------------------------------------------------------


def describe(runs: list[Run], code: int, args: argparse.Namespace) -> dict[str, Any]:
    first = runs[0].results
    scores = [run.results["val_bpb"] for run in runs]
    largest = max(run.bytes_model for run in runs)
    facts = {
        "author": args.author,
        "github_id": args.github_id,
        "name": args.name,
        "blurb": first.get("model", ""),
        **{name: first.get(name, "") for name in ("date", "hardware", "dataset")},
        "val_loss": statistics.fmean(run.results["val_loss"] for run in runs),
        "val_bpb": statistics.fmean(scores),
        "bytes_total": code + largest,
        "bytes_code": code,
        "bytes_code_readable": len(runs[0].parts.starts[0].encode()),
        "bytes_model": largest,
        "seeds": [run.seed for run in runs],
        "seed_results": {},
    }
    for run in runs:
        names = ("val_loss", "val_bpb", "steps", "train_seconds")
        figures = {name: run.results.get(name) for name in names}
        facts["seed_results"][str(run.seed)] = figures | {"bytes_model": run.bytes_model}
    if len(runs) > 1:
        facts["val_bpb_std"] = statistics.stdev(scores)
    copied = ("eval_mode", "trained_parameters", "frozen_parameters", "tokens_per_second")
    return facts | {name: first[name] for name in copied if name in first}


def requirements(versions: dict[str, str]) -> str:
    """Return the packages of the script, in the versions of the run where its log has them."""
    text = (ROOT / "requirements.txt").read_text()
    for name, version in versions.items():
        number = version.partition("+")[0]
        text = re.sub(rf"^{name}\b.*", f"{name}=={number}", text, flags=re.M)
    return text


README = """\
# {name}

{by}{blurb}, on {hardware}, dataset `{dataset}`.

**val_bpb {score}**, val_loss {val_loss:.8f}

| seed | val_loss | val_bpb | before the export | steps | training | export | evaluation | bytes |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

The times of export and evaluation, and the number of devices, are the run's own statement;
everything else is computed again or compared with the log.

Bytes: code {bytes_code:,} (packed; {bytes_code_readable:,} as it is written) and model
{bytes_model:,}, in all {bytes_total:,} of {limit:,}. Versions: {versions}.

## Repeat it

`train_gpt.py` unpacks and executes itself; `train_gpt_readable.py` is the same script to read. The
shards of `{dataset}` and the tokenizer with SHA-256 {tokenizer} must be there.

```
pip install -r requirements.txt
{command}
```

With `EVAL_ONLY=1 MODEL_PATH=model.int6.ptz` in front, this evaluates the artifact alone.

## Verified

{steps} steps of the packed and of the readable script, without network, give the same weights, the
same artifact and the same scores. `python tools/check.py` on this folder finds:

```
{table}
```

`train_seedN.log` are the logs as the runs wrote them, with the bytes of a script that is not
minified. In `train.log` and `results.json`, which tools/check.py reads, the packed script and its
bytes stand in place of the readable one; everything else is the same as of seed {seed}.
"""


def readme(runs: list[Run], facts: dict[str, Any], table: str) -> str:
    first = runs[0]
    names = ("val_bpb_before", "steps", "train_seconds", "export_seconds", "eval_seconds")
    row = (
        "| {seed} | {val_loss:.8f} | {val_bpb:.8f} | {val_bpb_before:.4f} | {steps:,}"
        " | {train_seconds:,.1f} s | {export_seconds:,.1f} s | {eval_seconds:,.1f} s | {total:,} |"
    )
    rows = []
    for run in runs:
        total = facts["bytes_code"] + run.bytes_model
        rows.append(row.format(**dict.fromkeys(names, 0) | run.results, total=total))
    settings = {"DATA_PATH": "...", "TOKENIZER_PATH": "..."}
    for name, value in first.parts.settings.items():
        if name in first.results.get("settings", {}) and name not in check.PLACES:
            settings[name] = value
    score = f"{facts['val_bpb']:.8f}"
    if len(runs) > 1:
        score += f" ± {facts['val_bpb_std']:.8f} (mean and deviation of {len(runs)} seeds)"
    return README.format(
        **facts,
        by=f"By {facts['author']}. " if facts["author"] else "",
        score=score,
        rows="\n".join(rows),
        limit=first.parts.options.size_limit,
        versions=", ".join(f"{name} {version}" for name, version in first.versions.items()),
        tokenizer=hashlib.sha256(first.parts.tokenizer.read_bytes()).hexdigest(),
        command=check.command_of(settings, first.results.get("hardware")),
        steps=first.parts.options.steps,
        table=table,
        seed=first.seed,
    )


def write_folder(folder: Path, runs: list[Run], packed: bytes, facts: dict[str, Any]) -> None:
    """Write everything but README.md, which says how the rest was verified."""
    first = runs[0]
    source, log = first.parts.starts[0].encode(), first.parts.part("train.log")
    sizes = {"bytes_code": len(packed), "bytes_total": len(packed) + first.bytes_model}
    files = {
        "train_gpt.py": packed,
        "train_gpt_readable.py": source,
        "train.log": log.replace(source, packed),
        "requirements.txt": requirements(first.versions).encode(),
        check.ARTIFACT: first.parts.part(check.ARTIFACT),
    }
    results = {name: value for name, value in first.results.items() if not name.endswith("_path")}
    for name, content in (("submission.json", facts), (check.RESULTS, results | sizes)):
        files[name] = (json.dumps(content, indent=2) + "\n").encode()
    for run in runs:
        files[f"train_seed{run.seed}.log"] = run.parts.part("train.log")
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


# ---- Verification --------------------------------------------------------------------------------


def verify(runs: list[Run], packed: check.Submission) -> str:
    """Compare short trainings, and check all runs; return the table. CannotCheck if one fails."""
    ours, theirs = packed.training, runs[0].parts.training
    for text in ("val", "other"):
        for what, value in theirs[text].items():
            require(ours[text][what] == value, f"the packed script trains to other {what}")
    results = {name: check.perform(name, packed) for name in check.CHECKS}
    for run in runs[1:]:
        for name in OTHER_SEEDS:
            results[f"{name} {run.seed}"] = check.perform(name, run.parts)
    table = check.table(results)
    bad = [name for name, result in results.items() if result.verdict != "pass"]
    if bad:
        print(table, file=sys.stderr)
    require(not bad, f"tools/check.py does not pass: {', '.join(bad)}")
    return table


# ---- Command -------------------------------------------------------------------------------------


def make_submission(args: argparse.Namespace) -> None:
    """Write the folder. CannotCheck says why there is none."""
    out = args.out
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(is_free, f"{out} is not empty; choose another --out")
    require(out.parent.is_dir(), f"there is no folder {out.parent} to write {out.name} to")
    runs = [read_run(folder, args) for folder in (args.run, *args.seeds) if folder]
    check_alike(runs)
    packed = pack(runs[0].parts.starts[0])
    facts = describe(runs, len(packed), args)
    text = f"code {len(packed):,} + model {facts['bytes_model']:,} = {facts['bytes_total']:,} bytes"
    require(facts["bytes_total"] <= args.size_limit, f"{text}, over {args.size_limit:,}")
    print(f"{text}; verifying ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name) / "submission"
        write_folder(folder, runs, packed, facts)
        table = verify(runs, check.Submission(folder, args))
        (folder / "README.md").write_text(readme(runs, facts, table), encoding="utf-8")
        folder.replace(out)
    score = f"val_bpb {facts['val_bpb']:.8f}"
    if len(runs) > 1:
        score += f" ± {facts['val_bpb_std']:.8f} over seeds {facts['seeds']}"
    print(f"{table}\n{out}: {score}; {text}, {args.size_limit:,} allowed")


def parse(arguments: list[str] | None) -> argparse.Namespace:
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
    check.add_options(parser)
    parser.set_defaults(steps=SHORT_STEPS)
    args = parser.parse_args(arguments)
    if not args.run and not args.seeds:
        parser.error("name the folder of a run, such as runs/ID")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        make_submission(args)
    except check.CannotCheck as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, UnicodeError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; nothing is written", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
