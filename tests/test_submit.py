"""tools/submit.py: the packed script does what the readable one does; nothing false gets out."""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest

from helpers import (
    ROOT,
    SCRIPT,
    TINY,
    claim,
    log_of,
    replace,
    results_of,
    run_well,
    train_gpt,
)

pytest.importorskip("python_minifier", reason="pip install -r tools/requirements.txt")
sys.path.insert(0, str(ROOT / "tools"))

import check
import submit


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> list[Path]:
    """Return the folders of two runs of different seeds whose bytes TARGET_BYTES decides."""
    place = tmp_path_factory.mktemp("runs")
    target = {"ITERATIONS": 6, "TARGET_BYTES": train_gpt.code_bytes() + 15_000}
    for seed in (42, 43):
        run = {"SEED": seed, "OUTPUT_DIR": place, "RUN_ID": f"seed{seed}"}
        run_well({**TINY, **corpus.settings, **target, **run})
    return [place / "seed42", place / "seed43"]


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    """Return a copy of the first run to falsify."""
    return Path(shutil.copytree(runs[0], tmp_path / "runs" / "copy"))


@pytest.fixture
def without_training(monkeypatch):
    """Take the short trainings as done: they are not what the test is about."""
    answer = {"error": "", "val": {}, "other": {}}
    monkeypatch.setattr(check, "train_briefly", lambda s: answer)


def refusal(capsys, tmp_path: Path, *arguments: object) -> str:
    """Return the messages of a call that must fail in one line and leave nothing behind."""
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    out = [] if "--out" in arguments else ["--out", place / "out"]
    assert submit.main([str(argument) for argument in [*arguments, *out]]) == 1
    errors = capsys.readouterr().err
    assert not any(place.iterdir())
    assert errors.splitlines()[-1].startswith("error: ") and errors.count("error: ") >= 1
    assert "Traceback" not in errors
    return errors


@pytest.fixture(scope="module", autouse=True)
def script(tmp_path_factory):
    """Return the packed script as a module. Packing takes seconds: what came of it is kept."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submit, "pack", functools.cache(submit.pack))
        path.write_bytes(submit.pack(SCRIPT.read_text("utf-8")))
        yield check.load(path)


def test_packed_script_counts_its_own_bytes_and_is_smaller_than_the_estimate(script):
    size = Path(script.__file__).stat().st_size
    assert script.code_bytes() == check.count_code(Path(script.__file__).read_bytes()) == size
    assert size <= train_gpt.code_bytes() == check.count_code(SCRIPT.read_bytes())


def test_whole_command_with_two_seeds(runs, tmp_path, capsys):
    """The packed script has fewer bytes, and so TARGET_BYTES would choose other scales."""
    first, second = (results_of(run) for run in runs)
    out = tmp_path / "out"
    given = ["--author", "A. Nonymous", "--github-id", "nobody", "--name", "A name"]
    code = submit.main([str(runs[0]), "--seeds", str(runs[1]), "--out", str(out), *given])
    assert code == 0, capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "requirements.txt", "submission.json", "train_gpt_readable.py"),
        *("model.int6.ptz", "results.json", "train.log", "train_gpt.py"),
        *("train_seed42.log", "train_seed43.log"),
    }
    facts = json.loads((out / "submission.json").read_text())
    size = (out / "train_gpt.py").stat().st_size
    models = [(run / "model.int6.ptz").stat().st_size for run in runs]
    assert (facts["author"], facts["seeds"]) == ("A. Nonymous", [42, 43])
    assert (facts["bytes_code"], facts["bytes_total"]) == (size, size + max(models))
    assert [facts["seed_results"][seed]["bytes_model"] for seed in ("42", "43")] == models
    scores = [first["val_bpb"], second["val_bpb"]]
    assert facts["val_bpb"] == pytest.approx(statistics.fmean(scores))
    assert facts["val_bpb_std"] == pytest.approx(statistics.stdev(scores))
    for folder in runs:
        log = (out / f"train_{folder.name}.log").read_bytes()
        assert log == (folder / "train.log").read_bytes()
        assert log.startswith((out / "train_gpt_readable.py").read_bytes())
    readme = (out / "README.md").read_text(encoding="utf-8")
    for fact in (f"{size:,}", "A. Nonymous", "NUM_LAYERS=4", "TARGET_BYTES=", "±"):
        assert fact in readme
    assert readme.count(" pass ") == len(check.CHECKS) + len(submit.OTHER_SEEDS)
    assert "is not empty" in refusal(capsys, tmp_path, runs[0], "--out", out)


def test_packed_script_that_computes_otherwise_is_seen(runs, tmp_path, capsys, monkeypatch):
    changed = SCRIPT.read_text("utf-8").replace("beta=-4.7750", "beta=-4.7")
    monkeypatch.setattr(submit, "pack", lambda source: changed.encode())
    assert "the packed script trains to other weights" in refusal(capsys, tmp_path, runs[0])


def test_figures_of_another_seed_are_not_believed(runs, tmp_path, capsys, without_training):
    """A copy that claims a better score, in its log, too; and one of another size."""
    second = Path(shutil.copytree(runs[1], tmp_path / "second"))
    bpb = results_of(second)["val_bpb"]
    claim(second, val_bpb=bpb - 1, bytes_total=1)
    replace(second / "train.log", f"val_bpb:{bpb:.8f}", f"val_bpb:{bpb - 1:.8f}")
    message = refusal(capsys, tmp_path, runs[0], "--seeds", second)
    assert f"results.json has val_bpb {bpb - 1:.8f}" in message
    failing = message.rpartition("does not pass: ")[2].strip().split(", ")
    assert {name for name in failing if name.endswith(" 43")} == {
        *("size 43", "evaluation 43", "bytes 43")
    }


def put_script(folder: Path, source: str) -> None:
    _, mark, record = log_of(folder).partition("\nRUN_ID=")
    (folder / "train.log").write_text(source + mark + record, encoding="utf-8")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: (run / "train.log").write_bytes(b"\xff" * 999), "has no source and settings"),
        (lambda run: put_script(run, "b85decode(…)"), "packed already"),
        (lambda run: put_script(run, "print(unknown_name)"), "ended in: NameError"),
        (lambda run: (run / "results.json").unlink(), "the run has not ended"),
    ],
)
def test_damaged_run_is_refused(copied, tmp_path, capsys, damage, message, without_training):
    damage(copied)
    assert message in refusal(capsys, tmp_path, copied)


def test_runs_that_are_not_alike_are_refused(runs, copied, corpus, tmp_path, capsys):
    arguments = [runs[0], "--seeds", copied]
    assert "the same seed" in refusal(capsys, tmp_path, *arguments)
    claim(copied, seed=7)
    assert "the same artifact" in refusal(capsys, tmp_path, *arguments)
    (copied / "model.int6.ptz").write_bytes(b"another one")
    log, data, tokenizer = copied / "train.log", tmp_path / "data", tmp_path / "other.model"
    tokenizer.write_bytes(b"another one")
    replace(log, f"\nTOKENIZER_PATH={corpus.tokenizer}\n", f"\nTOKENIZER_PATH={tokenizer}\n")
    assert "has another tokenizer" in refusal(capsys, tmp_path, *arguments)
    (shutil.copytree(corpus.folder, data) / "fineweb_train_000001.bin").touch()
    replace(log, f"\nDATA_PATH={corpus.folder}\n", f"\nDATA_PATH={data}\n")
    assert "was trained on other data" in refusal(capsys, tmp_path, *arguments)
    replace(copied / "train.log", "\nNUM_LAYERS=4\n", "\nNUM_LAYERS=5\n")
    assert "other settings: NUM_LAYERS" in refusal(capsys, tmp_path, *arguments)
    replace(copied / "train.log", "import argparse\n", "import  argparse\n")
    assert "of another script" in refusal(capsys, tmp_path, *arguments)


def test_place_and_size_are_looked_at_first(runs, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert "there is no folder" in refusal(capsys, tmp_path, runs[0], "--out", out)
    assert "over 1,000" in refusal(capsys, tmp_path, runs[0], "--size-limit", 1000)


def test_run_that_was_killed_and_continued_is_accepted(copied, tmp_path):
    """Its log has the source twice, and the steps after the checkpoint, too."""
    log = (copied / "train.log").read_text(encoding="utf-8")
    killed = log[: log.index("\nstep:4/6 train_loss")]
    (copied / "train.log").write_text(f"{killed}\n{log}", encoding="utf-8")
    args = submit.parse([str(copied), "--out", str(tmp_path / "out")])
    run = submit.read_run(copied, args)
    packed = submit.pack(run.parts.starts[0])
    submit.write_folder(args.out, [run], packed, submit.describe([run], len(packed), args))
    for name in ("size", "claims"):
        result = check.perform(name, check.Submission(args.out, args))
        assert result.verdict == "pass", result
