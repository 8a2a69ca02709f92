"""tools/submit.py: the packed script does what the readable one does; nothing false gets out."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import json
import re
import shutil
import statistics
import sys
import traceback
from pathlib import Path

import pytest
import torch

from helpers import (
    ROOT,
    SCRIPT,
    TINY,
    fork_children,
    run_well,
    run_without,
    tiny_settings,
    train_gpt,
)

pytest.importorskip("python_minifier", reason="pip install -r tools/requirements.txt")
sys.path.insert(0, str(ROOT / "tools"))

import check
import submit

TOOL = ROOT / "tools" / "submit.py"
FILES = {
    "README.md",
    "model.int6.ptz",
    "requirements.txt",
    "results.json",
    "submission.json",
    "train.log",
    "train_gpt.py",
    "train_gpt_readable.py",
    "train_seed42.log",
    "train_seed43.log",
}


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Let the children that execute scripts be forks."""
    fork_children(check, monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def minified_once():
    """Keep what a script is minified to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submit, "minify", functools.cache(submit.minify))
        yield


@pytest.fixture(scope="module")
def honest(corpus, tmp_path_factory) -> Path:
    """Return the folder of a run, made once."""
    runs = tmp_path_factory.mktemp("runs")
    place = {"OUTPUT_DIR": runs, "RUN_ID": "honest"}
    run_well({**TINY, **corpus.settings, "ITERATIONS": 6, "SEED": 42, **place})
    return runs / "honest"


@pytest.fixture(scope="module")
def packed(honest) -> bytes:
    """Return the packed script of the run."""
    return submit.pack(check.Submission(honest, check.Options()).logged_script.decode())


def load_packed(folder: Path, with_globals: bool):
    """Return the script, packed with or without the names of its globals, as a module."""
    path = folder / "train_gpt.py"
    path.write_bytes(submit.compress(submit.minify(SCRIPT.read_text("utf-8"), False, with_globals)))
    return check.load(path)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return the packed script as a module."""
    return load_packed(tmp_path_factory.mktemp("packed"), with_globals=True)


@pytest.fixture
def copied(honest, tmp_path) -> Path:
    """Return a copy of the run to falsify."""
    return Path(shutil.copytree(honest, tmp_path / "runs" / "copy"))


def claim(folder: Path, **figures) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | figures))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def other_seed(folder: Path, target: Path) -> Path:
    """Copy a run and say that it was of the next seed and of a better score."""
    shutil.copytree(folder, target)
    claim(target, seed=43, val_bpb=json.loads((folder / "results.json").read_text())["val_bpb"] - 1)
    replace(target / "train.log", "\nSEED=42\n", "\nSEED=43\n")
    return target


def refusal(capsys, tmp_path: Path, *arguments: object) -> str:
    """Return the one line of a call that must fail and leave nothing behind."""
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    before = sorted(place.rglob("*"))
    out = [] if "--out" in arguments else ["--out", place / "out"]
    code = submit.main([str(argument) for argument in [*arguments, *out]])
    errors = capsys.readouterr().err.splitlines()
    assert code == 1
    assert sorted(place.rglob("*")) == before
    assert errors[-1].startswith("error: ")
    assert not any(line.startswith("error: ") for line in errors[:-1])
    return errors[-1]


# ---- The packed script ---------------------------------------------------------------------------


def test_packed_script_keeps_every_name_that_others_use(script):
    """Globals, settings, rows of tables, members of classes, and keywords that calls state."""
    ours = {name for name in vars(train_gpt) if not name.startswith("__")}
    ours -= set(vars(train_gpt).keys() & {"annotations"})
    assert ours <= set(vars(script))
    assert list(script.SETTINGS) == list(train_gpt.SETTINGS)
    for name in ("MapSpec", "Alias", "QuantizedTensor", "StepPlan", "AttentionContext"):
        assert getattr(script, name)._fields == getattr(train_gpt, name)._fields
    for name, value in vars(train_gpt).items():
        if inspect.isclass(value) and value.__module__ == "train_gpt":
            caches = {"__doc__", "__annotations__", "__static_attributes__", "__slotnames__"}
            members = set(vars(value)) - caches
            assert members <= set(vars(getattr(script, name))), name


def test_script_without_names_of_globals_computes_the_same(script, honest, tmp_path):
    """It is smaller, has what the tools call, and the model of its artifact is the same."""
    short = load_packed(tmp_path, with_globals=False)
    sizes = [Path(each.__file__).stat().st_size for each in (short, script)]
    assert sizes[0] < 0.99 * sizes[1]
    path = honest / "model.int6.ptz"
    blob, found = path.read_bytes(), []
    for each in (short, script):
        h = each.load_settings({}, eval_only=1, model_path=str(path), device="cpu")
        h = each.settings_from_artifact(h, blob)
        with each.Distributed(h) as dist:
            model = each.model_from_artifact(h, blob, dist)
        ids = torch.arange(64).view(2, 32) % h.vocab_size
        found.append((model.fingerprint(), model(ids, ids).item()))
    assert found[0] == found[1]
    assert not hasattr(short, "WeightAverages") and hasattr(script, "WeightAverages")


def test_packed_script_says_the_same_to_help(packed, tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_bytes(packed)
    assert len(packed) <= submit.CODE_LIMIT
    texts = []
    for file in (path, SCRIPT):
        texts.append(run_well({}, script=file, arguments=["--help"]))
    ours, readable = (text.partition("Settings are environment variables") for text in texts)
    assert ours[0].replace(submit.READ_MORE, "") == readable[0]
    if submit.READ_MORE not in ours[0]:
        assert ours == readable
    names = [re.findall(r"^  ([A-Z]\w+) +(\S+)", text, re.M) for text in (ours[2], readable[2])]
    assert names[0] == names[1] and ("NUM_LAYERS", "(11)") in names[0]


def test_packed_script_has_source_lines_for_tracebacks_and_the_compiler(script):
    """Dynamo reads the source of what it compiles; `eager` is its back end without a compiler."""
    assert "def predict(" in inspect.getsource(script.GPT)
    try:
        script.load_settings({}, num_layers=0)
    except script.UserError:
        text = traceback.format_exc()
    assert "raise UserError(" in text and "b85decode" not in text
    tiny = {name.lower(): value for name, value in TINY.items()} | {"num_layers": 1}
    h = script.load_settings({}, **tiny)
    torch.manual_seed(1)
    model = script.make_model(h)
    torch.manual_seed(1)
    readable = train_gpt.make_model(tiny_settings(num_layers=1))
    ids = torch.arange(64).view(2, 32) % h.vocab_size
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert compiled(ids, ids).item() == pytest.approx(readable(ids, ids).item(), abs=1e-6)
    assert model.fingerprint() == readable.fingerprint()


def test_shortening_changes_no_result():
    """Calls by keyword, defaults, closures, vars, classes and starred arguments."""
    source = '''
"""Title.

Contents: not for help."""
from __future__ import annotations
import dataclasses
from typing import NamedTuple
TITLE = __doc__
@dataclasses.dataclass
class Point:
    """A point."""
    first: int = 1
    second: int = 2
class Pair(NamedTuple):
    left: int
    right: int = 5
class Base:
    kind: str = "base"
    def scale(self, amount: int, factor: int = 2, *rest: int, extra: int = 0) -> int:
        """Scale."""
        total: int = amount * factor
        def inner(value: int) -> int:
            return value + total
        return inner(extra) + sum(rest)
def setting(default, meaning):
    return default + len(meaning)
def named(first_argument, second_argument, third_argument=3):
    return 100 * first_argument + 10 * second_argument + third_argument
result = [
    TITLE, vars(Point(second_argument := 4)), tuple(Pair(3)), Base.kind,
    Base().scale(3, 4, 5, extra=1), named(1, second_argument=2), named(7, 8, 9),
    setting(1, "of a setting") > 0,
]
'''
    assert "of a setting" in submit.minify(source)
    short = submit.minify(source, with_meanings=False)
    assert "of a setting" not in short
    results = []
    for text in (source.replace("\n\nContents: not for help.", submit.READ_MORE), short):
        names = {"__name__": "shortened"}
        sys.modules["shortened"] = type(sys)("shortened")
        exec(compile(text.lstrip(), "shortened", "exec"), names)
        results.append(names["result"])
    assert results[0] == results[1]
    assert "A point" not in short and "first_argument" not in short and "second_argument" in short


@pytest.mark.parametrize(
    "source, message",
    [
        ("this is no Python", "does not begin with a Python script"),
        ("nul = '\0'", "does not begin with a Python script"),
        ("exec(base64.b85decode('…'))", "packed already"),
    ],
)
def test_what_cannot_be_packed_is_refused(source, message):
    with pytest.raises(submit.UserError, match=message):
        submit.pack(source)


def test_script_over_the_limit_is_refused():
    names = [hashlib.sha256(bytes([i, j])).hexdigest() for i in range(32) for j in range(32)]
    with pytest.raises(submit.UserError, match=r"has [\d,]+ bytes, over 40,000"):
        submit.pack(f"names = {names}")


def test_bytes_of_another_script_in_a_log():
    log = """code: 1,000 bytes as it ships, packed; 9,000 readable
projected artifact code 1,000 + model 2,000 = 3,000 bytes, 0.0% of 16,000,000
artifact bytes: header 1,000, A codes 1,000
artifact code 1,000 + model 3,000,000 = 3,001,000 bytes, 18.8% of 16,000,000
artifact 3,001,000 bytes: code 1,000, model 3,000,000
"""
    assert (
        submit.recount(log, 500_000)
        == """code: 500,000 bytes as it ships, packed; 9,000 readable
projected artifact code 500,000 + model 2,000 = 502,000 bytes, 3.1% of 16,000,000
artifact bytes: header 1,000, A codes 1,000
artifact code 500,000 + model 3,000,000 = 3,500,000 bytes, 21.9% of 16,000,000
artifact 3,500,000 bytes: code 500,000, model 3,000,000
"""
    )


# ---- The folder ----------------------------------------------------------------------------------


def test_whole_command_with_two_seeds(honest, packed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(submit, "pack", lambda source: packed)
    second = other_seed(honest, tmp_path / "second")
    out = tmp_path / "out"
    given = ["--author", "A. Nonymous", "--github-id", "nobody"]
    code = submit.main([str(honest), "--seeds", str(second), "--out", str(out), *given])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert {path.name for path in out.iterdir()} == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "second"]
    facts = json.loads((out / "submission.json").read_text())
    results = json.loads((honest / "results.json").read_text())
    size = (out / "train_gpt.py").stat().st_size
    model = (out / "model.int6.ptz").stat().st_size
    assert (facts["author"], facts["github_id"]) == ("A. Nonymous", "nobody")
    assert (facts["bytes_code"], facts["bytes_total"]) == (size, size + model)
    assert facts["bytes_code_readable"] == results["bytes_code_readable"]
    assert facts["seeds"] == [42, 43]
    scores = [results["val_bpb"], results["val_bpb"] - 1]
    assert facts["val_bpb"] == pytest.approx(statistics.fmean(scores))
    assert facts["val_bpb_std"] == pytest.approx(statistics.stdev(scores))
    for folder, seed in ((honest, 42), (second, 43)):
        log = (out / f"train_seed{seed}.log").read_bytes()
        assert log == (folder / "train.log").read_bytes()
    source = (out / "train_gpt_readable.py").read_bytes()
    assert (honest / "train.log").read_bytes().startswith(source)
    readme = (out / "README.md").read_text(encoding="utf-8")
    for fact in (
        f"{size:,}",
        f"{results['bytes_code_readable']:,}",
        "A. Nonymous",
        "NUM_LAYERS=4",
        "±",
    ):
        assert fact in readme
    assert re.search(r"10 steps of both scripts give the same losses", readme)
    assert readme.count(" pass ") == len(check.CHECKS)
    again = submit.main([str(honest), "--out", str(out)])
    assert again == 1 and "is not empty" in capsys.readouterr().err


def test_packed_script_that_computes_otherwise_is_seen(honest, tmp_path, capsys, monkeypatch):
    source = check.Submission(honest, check.Options()).logged_script.decode()
    changed = source.replace("beta=-4.7750", "beta=-4.7")
    monkeypatch.setattr(submit, "pack", lambda source: changed.encode())
    message = refusal(capsys, tmp_path, honest)
    assert "the packed script trains to the losses" in message


# ---- Bad input -----------------------------------------------------------------------------------


def torn(folder: Path) -> None:
    path = folder / "model.int6.ptz"
    path.write_bytes(path.read_bytes()[:-100])


def binary_log(folder: Path) -> None:
    (folder / "train.log").write_bytes(bytes(range(256)) * 100)


def no_script(folder: Path) -> None:
    log = (folder / "train.log").read_text(encoding="utf-8")
    _, mark, record = log.partition("\nRUN_ID=")
    (folder / "train.log").write_text("this is no Python" + mark + record, encoding="utf-8")


def another_script(folder: Path) -> None:
    no_script(folder)
    replace(folder / "train.log", "this is no Python", "print(unknown_name)")


@pytest.mark.parametrize(
    "damage, message",
    [
        (torn, "model.int6.ptz is torn"),
        (binary_log, "train.log has no source and settings"),
        (no_script, "does not begin with a Python script"),
        (another_script, "cannot be loaded: NameError"),
        (lambda folder: (folder / "results.json").unlink(), "the run has not ended"),
        (lambda folder: (folder / "results.json").write_text("{"), "has no figure val_loss"),
        (lambda folder: (folder / "results.json").write_bytes(b"\xff\xfe"), "has no figure"),
        (lambda folder: (folder / "model.int6.ptz").unlink(), "model.int6.ptz: No such file"),
        (lambda folder: (folder / "train.log").unlink(), "has no train.log"),
        (lambda folder: claim(folder, val_bpb="unknown"), "has no figure val_bpb"),
    ],
)
def test_damaged_run_is_refused_in_one_line(copied, tmp_path, capsys, damage, message):
    damage(copied)
    assert message in refusal(capsys, tmp_path, copied)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert "is no folder" in refusal(capsys, tmp_path, tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no train.log" in refusal(capsys, tmp_path, empty)


def test_run_that_is_still_going_is_refused(copied, tmp_path, capsys):
    with (copied / "train.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "the run is still going" in refusal(capsys, tmp_path, copied)


def test_foreign_tokenizer_is_refused(honest, packed, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(submit, "pack", lambda source: packed)
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(corpus.tokenizer.read_bytes() + b"\0")
    message = refusal(capsys, tmp_path, honest, "--tokenizer", foreign)
    assert "foreign.model is not the tokenizer of the artifact" in message
    assert "no tokenizer" in refusal(capsys, tmp_path, honest, "--tokenizer", tmp_path / "none")


def test_runs_that_are_not_alike_are_refused(honest, copied, tmp_path, capsys):
    arguments = [honest, "--seeds", copied]
    assert "the same seed" in refusal(capsys, tmp_path, *arguments)
    claim(copied, seed=7)
    replace(copied / "train.log", "\nNUM_LAYERS=4\n", "\nNUM_LAYERS=5\n")
    assert "other settings: NUM_LAYERS" in refusal(capsys, tmp_path, *arguments)
    replace(copied / "train.log", "import argparse\n", "import  argparse\n")
    assert "of another script" in refusal(capsys, tmp_path, *arguments)


def test_place_that_is_not_free_is_refused(honest, packed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(submit, "pack", lambda source: packed)
    assert "is not empty" in refusal(capsys, tmp_path, honest, "--out", honest)
    assert "there is no folder" in refusal(capsys, tmp_path, honest, "--out", tmp_path / "a" / "b")
    file = tmp_path / "file"
    file.write_text("text")
    assert "is not empty" in refusal(capsys, tmp_path, honest, "--out", file)


def test_artifact_over_the_limit_is_refused(honest, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "pack", lambda source: packed)
    args = submit.parse([str(honest), "--out", str(tmp_path / "out")])
    with pytest.raises(submit.UserError, match="over 1,000"):
        submit.make_submission(args, check.Options(size_limit=1000))
    assert not any(tmp_path.iterdir())


def test_unusable_arguments_and_missing_package(tmp_path):
    for arguments in ([], ["--out", "x"], ["runs/x"]):
        with pytest.raises(SystemExit) as ended:
            submit.main(arguments)
        assert ended.value.code == 2
    done = run_without("python_minifier", TOOL, tmp_path, "runs/x", "--out", "y")
    assert done.returncode == 1
    expected = "error: python_minifier is missing: pip install -r tools/requirements.txt\n"
    assert done.stderr == expected
