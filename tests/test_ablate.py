"""tools/ablate.py, as a person runs it: a stand-in for the script where only budgets and order matter."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, SCRIPT, TINY, make_corpus

for package in ("pandas", "matplotlib", "scipy"):
    pytest.importorskip(package, reason="an extra of tools/requirements.txt")

TOOL = ROOT / "tools" / "ablate.py"
# Trains nothing: the size and the score follow from the settings, and every run leaves its environment.
STAND_IN = """
import dataclasses, json, os, sys, time
from pathlib import Path


class UserError(Exception):
    pass


@dataclasses.dataclass(init=False)
class Hyperparameters:
    seed: int = 1
    iterations: int = 5
    warmup_steps: int = 0
    val_loss_every: int = 0
    max_wallclock_seconds: float = 0.0
    gptq_reserve_seconds: float = 45.0
    train_batch_tokens: int = 100
    eval_seq_len: int = 32
    eval_stride: int = 8
    num_heads: int = 2
    model_dim: int = 32
    map_adapter: str = "lora:4"
    grows: float = 1.0
    mode: str = ""
    output_dir: str = ""
    run_id: str = ""
    data_path: str = ""
    tokenizer_path: str = ""
    vocab_size: int = 512
    distill_from: str = ""

    def __init__(self):
        for f in dataclasses.fields(self):
            setattr(self, f.name, type(f.default)(os.environ.get(f.name.upper(), f.default)))
        if self.model_dim > 4096:
            raise UserError("MODEL_DIM is over 4096")


if __name__ == "__main__":
    h = Hyperparameters()
    folder = Path(h.output_dir) / h.run_id
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
    if h.mode == "fail" and not Path(h.data_path, "mended").exists():
        print("something to say")
        sys.exit("error: it went wrong")
    if h.mode == "wait" and not Path(h.data_path, "mended").exists():
        time.sleep(60)
    if h.distill_from and not Path(h.distill_from).is_file():
        sys.exit("error: no teacher")
    rank = int(h.map_adapter.removeprefix("lora:"))
    size = int((1000 + 3 * h.model_dim ** 2 + 500 * rank) * (1 if h.iterations == 8 else h.grows))
    (folder / "model.int6.ptz").write_bytes(bytes(size))
    bpb = 2 - h.model_dim * (1 + h.seed / 10) / 1e4 - h.seed ** 2 / 1e3
    (folder / "submission.json").write_text(json.dumps({
        "steps": h.iterations, "train_seconds": 1.5, "tokens_per_second": 1000, "val_bpb_before": bpb,
        "val_bpb_roundtrip": bpb, "val_bpb_sliding_window": bpb, "bytes_total": size + 70_000,
        "bytes_code": 70_000, "trained_parameters": 10}))
"""


@pytest.fixture(scope="module")
def ablate():
    """The tool as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOL.parent))
        yield importlib.import_module("ablate")


class Place:
    """A folder with the stand-in, data and presets, and the tool's command line in it."""

    def __init__(self, folder: Path, ablate, patch: pytest.MonkeyPatch, capsys):
        self.folder, self.out, self.data = folder, folder / "out", folder / "data"
        self.ablate, self.patch, self.capsys = ablate, patch, capsys
        self.data.mkdir()
        for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
            (self.data / name).touch()
        (self.data / "manifest.json").write_text(
            json.dumps({"tokenizer": "../tok.model", "vocab_size": 512})
        )
        (folder / "fake.py").write_text(STAND_IN)
        self.preset("a", "MODEL_DIM=64  # a comment", "ITERATIONS=7", "MAX_WALLCLOCK_SECONDS=100")
        patch.chdir(folder)

    def preset(self, name: str, *lines: str) -> None:
        (self.folder / f"{name}.env").write_text("\n".join(lines) + "\n")

    def command(self, words: tuple[str, ...]) -> list[str]:
        options = ("--out", self.out, "--data", self.data, "--script", "fake.py")
        return list(map(str, (TOOL, *options, *words)))

    def run(self, *words: str, failed: int = 0) -> str:
        """What the tool prints, in this process: importing its packages takes seconds."""
        self.patch.setattr(sys, "argv", self.command(words))
        assert self.ablate.ablate(self.ablate.parse_arguments()) == failed
        return self.capsys.readouterr().out

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *self.command(words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def rows(self) -> list[dict]:
        return self.ablate.read_results(self.out).to_dict("records")

    def environment(self, row: dict) -> dict:
        return json.loads((self.out / "runs" / row["run"] / "environment.json").read_text())


@pytest.fixture
def place(tmp_path, ablate, monkeypatch, capsys):
    return Place(tmp_path, ablate, monkeypatch, capsys)


# ---- Budgets -----------------------------------------------------------------------------------------------


def test_budget_of_tokens(place):
    for stray in ("STRAY", "MODEL_DIM", "ITERATIONS"):
        place.patch.setenv(stray, "8")
    out = place.run(
        "--presets",
        "a.env",
        "--set",
        "MODEL_DIM=96 WARMUP_STEPS=2",
        "--seeds",
        "1,2",
        "--budget",
        "tokens=1_050",
        "EVAL_SEQ_LEN=64",
        "WARMUP_STEPS=1",
    )
    rows = place.rows()
    assert [(row["label"], row["seed"]) for row in rows] == [
        ("a.env", 1),
        ("a.env MODEL_DIM=96 WARMUP_STEPS=2", 1),
        ("a.env", 2),
        ("a.env MODEL_DIM=96 WARMUP_STEPS=2", 2),
    ]
    assert {row["family"] for row in rows} == {"a.env"}
    assert all((row["steps"], row["tokens"]) == (10, 1000) for row in rows)
    plain, changed = map(place.environment, rows[:2])
    assert (plain["ITERATIONS"], plain["MAX_WALLCLOCK_SECONDS"], plain["SEED"]) == ("10", "0", "1")
    assert (plain["MODEL_DIM"], changed["MODEL_DIM"]) == ("64", "96")
    assert (plain["WARMUP_STEPS"], changed["WARMUP_STEPS"], plain["EVAL_SEQ_LEN"]) == (
        "1",
        "2",
        "64",
    )
    assert (plain["VOCAB_SIZE"], plain["TOKENIZER_PATH"]) == (
        "512",
        str(place.folder / "tok.model"),
    )
    assert "STRAY" not in plain and plain["MALLOC_MMAP_MAX_"] == "0"
    assert "2 of 4  a.env MODEL_DIM=96 WARMUP_STEPS=2  seed 1  2 s" in out
    assert sorted(path.name for path in place.folder.iterdir()) == [
        "a.env",
        "data",
        "fake.py",
        "out",
    ]


def test_budget_of_seconds_adds_what_the_export_keeps(place):
    place.run("--presets", "a.env", "--budget", "seconds=2.5", "GPTQ_RESERVE_SECONDS=10")
    given = place.environment(place.rows()[0])
    assert float(given["MAX_WALLCLOCK_SECONDS"]) == 12.5
    assert int(given["ITERATIONS"]) >= 10**9


@pytest.mark.parametrize("grows", (1.0, 1.1, 0.9))  # what the real run's bytes are of the pilot's
def test_budget_of_bytes(place, grows):
    place.run(
        "--presets",
        "a.env",
        "--budget",
        "bytes=400_000",
        "--tokens",
        "1000",
        "--knob",
        "rank",
        f"GROWS={grows}",
        "--seeds",
        "1,2",
        "MAP_ADAPTER=lora:300",
    )
    for row in place.rows():
        assert 0.97 * 400_000 <= row["model_bytes"] <= 400_000
        assert row["note"] == "rank=" + place.environment(row)["MAP_ADAPTER"].removeprefix("lora:")
        assert row["steps"] == 10
    assert len(list((place.out / "runs").iterdir())) == 2  # those that did not fit are gone
    assert len(list((place.out / "pilots").iterdir())) <= 5


def test_budget_of_bytes_with_coarse_steps(place):
    place.run(
        "--presets",
        "a.env",
        "--budget",
        "bytes=110000",
        "--tokens",
        "1000",
        "--knob",
        "MODEL_DIM:100",
    )
    (row,) = place.rows()  # 33,000 bytes at 100, 123,000 at 200
    assert place.environment(row)["MODEL_DIM"] == "100"
    assert re.search(r"MODEL_DIM=100, \d\d\.\d% of the bytes.*steps of 100", row["note"])


@pytest.mark.parametrize(
    "budget, reason",
    (
        (2000, "bytes with the knob at its least, over 2,000"),
        (
            10**9,
            r"no more than 50,\d{3},\d{3} bytes can be had; with more, .*MODEL_DIM is over 4096",
        ),
    ),
)
def test_budget_of_bytes_out_of_reach(place, budget, reason):
    place.run(
        "--presets",
        "a.env",
        "--budget",
        f"bytes={budget}",
        "--tokens",
        "1000",
        "--knob",
        "MODEL_DIM",
        failed=1,
    )
    (row,) = place.rows()
    assert re.search(reason, row["error"])


def test_knob_that_changes_nothing_is_named(place):
    place.run(
        "--presets",
        "a.env",
        "--budget",
        "bytes=50000",
        "--tokens",
        "1000",
        "--knob",
        "EVAL_STRIDE",
        failed=1,
    )
    assert "hardly changes" in place.rows()[0]["error"]


@pytest.mark.parametrize("power", (1, 2))  # of a rank, of a width
@pytest.mark.parametrize("target", (1e4, 7e4, 3e6))
@pytest.mark.parametrize("start", (1, 40, 3000))
def test_search_needs_few_pilots(ablate, power, target, start):
    sizes = {}

    def measure(k: int) -> float:
        sizes[k] = 2000 + 50 * k**power
        return sizes[k]

    k = ablate.search(measure, target, start)
    assert measure(k) <= target
    assert measure(k) >= 0.97 * target or measure(k + 1) > target
    assert len(sizes) <= 9


# ---- Teacher, crash, failure -------------------------------------------------------------------------------


def test_teacher_is_trained_once_a_seed(place):
    place.preset("student", "TEACHER_PRESET=a.env", "MODEL_DIM=32")
    words = ("--presets", "student.env,a.env", "--set", "EVAL_STRIDE=4", "--budget", "tokens=500")
    place.run(*words, "--seeds", "3,4")
    rows = place.rows()
    assert len(list((place.out / "runs").iterdir())) == 8
    for row in rows:
        given = place.environment(row)
        if row["label"].startswith("student"):
            teacher = json.loads(
                (Path(given["DISTILL_FROM"]).parent / "environment.json").read_text()
            )
            assert teacher["SEED"] == str(row["seed"])
            assert (teacher["ITERATIONS"], teacher["MODEL_DIM"]) == ("5", "64")
            assert "EVAL_STRIDE" not in teacher  # that is a change to the student alone
        else:
            assert "DISTILL_FROM" not in given
        assert "TEACHER_PRESET" not in given


def test_lost_teacher_is_made_again(place):
    place.preset("student", "TEACHER_PRESET=a.env")
    words = ("--presets", "student.env", "--budget", "tokens=500")
    place.run(*words)
    (place.out / "runs" / place.rows()[0]["run"] / "model.int6.ptz").unlink()
    assert place.run(*words, "--seeds", "1337").count("already there") == 1
    assert [row["error"] for row in place.rows()] == ["", ""]


def test_given_teacher_wins(place):
    place.preset("student", "TEACHER_PRESET=a.env")
    (place.folder / "t.ptz").touch()
    place.run("--presets", "student.env", "--budget", "tokens=500", "DISTILL_FROM=t.ptz")
    (row,) = place.rows()
    assert place.environment(row)["DISTILL_FROM"] == "t.ptz"


def test_what_is_there_is_not_repeated(place):
    words = ("--presets", "a.env", "--set", "MODEL_DIM=32", "--budget", "tokens=500")
    place.run(*words)
    before = {path: path.stat().st_mtime_ns for path in (place.out / "runs").rglob("*")}
    assert place.run(*words, "--seeds", "1337,1").count("already there") == 2
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert len(place.rows()) == 4
    (place.folder / "fake.py").write_text(STAND_IN + "# another script\n")
    assert "already there" not in place.run(*words)
    assert len(place.rows()) == 6
    table = (place.out / "table.md").read_text()
    assert (
        len(re.findall(r"^\| a\.env #\w+ \|", table, re.M)) == 2
    )  # two scripts are never averaged


def test_failure_is_a_row_and_the_others_go_on(place):
    words = (
        "--presets",
        "a.env",
        "--set",
        "MODE=fail",
        "--set",
        "MODEL_DIM=32",
        "--budget",
        "tokens=500",
    )
    place.run(*words, failed=1)
    assert [row["error"] for row in place.rows()] == ["", "exit status 1: error: it went wrong", ""]
    assert "seed 1337: exit status 1: error: it went wrong" in (place.out / "table.md").read_text()
    (place.data / "mended").touch()
    assert place.run(*words, failed=1).count("already there") == 3
    assert place.run(*words, "--retry-failed").count("already there") == 2
    assert [row["error"] for row in place.rows()] == ["", "", ""]


def test_student_of_a_failed_teacher_fails(place):
    place.preset("teacher", "MODE=fail")
    place.preset("student", "TEACHER_PRESET=teacher.env")
    place.run("--presets", "student.env", "--budget", "tokens=500", failed=2)
    assert "its teacher teacher.env has no artifact" in place.rows()[1]["error"]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
def test_stopped_run_is_made_again(place, number):
    words = ("--presets", "a.env", "--set", "MODE=wait", "--budget", "tokens=500")
    process = place.start(*words)
    deadline = time.monotonic() + 30
    while not (
        waiting := [
            path
            for path in (place.out / "runs").glob("*/environment.json")
            if '"MODE": "wait"' in path.read_text()
        ]
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or "the same command goes on: python" in err
    assert len(place.rows()) == 1
    (place.data / "mended").touch()
    running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_run_of(path, place.out)]
    assert len(running) == (number == signal.SIGKILL)  # nothing can be done about that one
    for path in running:
        os.kill(int(path.parent.name), signal.SIGKILL)
    assert place.run(*words).count("already there") == 1
    assert [row["error"] for row in place.rows()] == ["", ""]
    assert (waiting[0].parent / "submission.json").is_file()


def is_run_of(cmdline: Path, out: Path) -> bool:
    try:
        return str(out / "script") in cmdline.read_text()
    except OSError:  # it has just ended
        return False


# ---- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    (
        (
            ["--presets", "nope", "--budget", "tokens=500"],
            r"no preset 'nope'; there are: .*random_adapters",
        ),
        (
            ["--presets", "a.env", "--set", "dim=3", "--budget", "tokens=500"],
            "'dim=3' is not KEY=VALUE",
        ),
        (
            ["--presets", "a.env", "--set", "MODEL_DIN=3", "--budget", "tokens=500"],
            "MODEL_DIN: no such setting",
        ),
        (
            ["--presets", "a.env", "--set", "MODEL_DIM=5000", "--budget", "tokens=500"],
            "MODEL_DIM is over 4096",
        ),
        (
            ["--presets", "a.env", "--budget", "tokens=50"],
            "tokens=50 is less than one step of 100 tokens",
        ),
        (["--presets", "a.env", "--budget", "hours=5"], "--budget needs"),
        (["--presets", "a.env", "--budget", "tokens=0"], "--budget needs"),
        (["--presets", "a.env", "--budget", "bytes=500"], "needs --tokens T and --knob"),
        (
            ["--presets", "a.env", "--budget", "tokens=500", "--knob", "rank"],
            "needs --tokens T and --knob",
        ),
        (
            ["--presets", "a.env", "--budget", "bytes=500", "--tokens", "500", "--knob", "MODE"],
            "whole number",
        ),
        (
            [
                "--presets",
                "a.env",
                "--budget",
                "bytes=500",
                "--tokens",
                "500",
                "--knob",
                "rank",
                "MAP_ADAPTER=gain",
            ],
            "MAP_ADAPTER with one lora:R",
        ),
        (["--presets", "a.env", "--budget", "tokens=500", "SEED=3"], "SEED is set by --seeds"),
        (["--presets", "a.env", "--budget", "tokens=500", "--seeds", "1,x"], "whole numbers"),
        (
            ["--presets", "a.env", "--budget", "tokens=500", "--data", "."],
            r"no fineweb_train_\*.bin in",
        ),
        (["--presets", "a.env", "--budget", "tokens=500", "--compare", "a.env", "b"], "no label b"),
        (["--presets", "a.env", "--plan", "plan", "--budget", "tokens=500"], "what to run"),
        (
            ["--plan", "plan", "--budget", "tokens=500"],
            "plan, line 2: needs label, family and preset",
        ),
        (["--plan", "missing", "--budget", "tokens=500"], "missing"),
        (["--report-only"], "no results.csv"),
    ),
)
def test_bad_input_is_refused_at_once(place, words, message):
    (place.folder / "plan").write_text("x f a.env\ny f\n")
    with pytest.raises((place.ablate.UserError, OSError), match=message):
        place.run(*words)
    assert not place.out.exists()


def test_presets_that_teach_each_other_are_refused(place):
    place.preset("x", "TEACHER_PRESET=y.env")
    place.preset("y", "TEACHER_PRESET=x.env")
    with pytest.raises(place.ablate.UserError, match="own teacher"):
        place.run("--presets", "x.env", "--budget", "tokens=500")


def test_preset_says_what_its_base_does_not(place):
    place.preset("common", "MODEL_DIM=16", "EVAL_STRIDE=4", "TEACHER_PRESET=a.env")
    place.preset("heir", "PRESET_BASE=common.env", "MODEL_DIM=48")
    assert place.ablate.load_preset("heir.env") == {"MODEL_DIM": "48", "EVAL_STRIDE": "4"}
    place.preset("common", "PRESET_BASE=heir.env")
    with pytest.raises(place.ablate.UserError, match="own base"):
        place.ablate.load_preset("heir.env")


def test_every_preset_can_be_read(ablate):
    for path in (ROOT / "presets").rglob("*.env"):
        settings = ablate.load_preset(path.relative_to(ROOT / "presets").as_posix())
        assert "PRESET_BASE" not in settings


def test_command_ends_with_one_clear_line(place):
    process = place.start("--presets", "nope", "--budget", "tokens=500")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and re.fullmatch("error: no preset 'nope'.*\n", err)


def test_failed_runs_are_the_exit_status(place):
    process = place.start("--presets", "a.env", "--budget", "tokens=500", "MODE=fail")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "1 of the runs failed" in err


# ---- Report ------------------------------------------------------------------------------------------------


def test_plan_table_picture_and_comparison(place):
    (place.folder / "plan").write_text(
        "# what is compared\n\nsmall  width a.env MODEL_DIM=32 # narrow\n"
        "'rather large' width a.env MODEL_DIM=96\nother rank a.env MAP_ADAPTER=lora:8\n"
    )
    out = place.run(
        "--plan",
        "plan",
        "--budget",
        "tokens=500",
        "--seeds",
        "1,2,3",
        "--compare",
        "small",
        "rather large",
    )
    difference = "small − rather large: 0.0077 ± 0.0006 bpb, n = 3, paired t-test p = 0.0023"
    table = (place.out / "table.md").read_text()
    assert difference in out and difference in table
    names = re.findall(r"^\| ([a-z ]+) \| (width|rank) \| tokens=500 \| 3 \|", table, re.M)
    assert names == [("rather large", "width"), ("other", "rank"), ("small", "width")]
    scores = [2 - 96e-4 * (1 + seed / 10) - seed**2 / 1000 for seed in (1, 2, 3)]
    mean = sum(scores) / 3
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 2)
    assert f"| {mean:.4f} ± {deviation:.4f} | 10 | nan | 30,648 | 1,000 |" in table
    picture = place.out / "bpb_vs_bytes.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture.unlink()
    (place.out / "table.md").unlink()
    place.run("--report-only", "--compare", "small", "rather large")
    assert (place.out / "table.md").read_text() == table and picture.is_file()
    assert not list(place.out.glob("*.part"))


def test_one_seed_has_no_deviation(place):
    out = place.run(
        "--presets",
        "a.env",
        "--set",
        "MODEL_DIM=96",
        "--budget",
        "tokens=500",
        "--compare",
        "a.env",
        "a.env MODEL_DIM=96",
        "--seeds",
        "10",
    )
    assert "a.env − a.env MODEL_DIM=96: 0.0064 bpb, n = 1\n" in out


def test_missing_package_is_named(tmp_path):
    (tmp_path / "pandas.py").write_text("raise ImportError('no pandas', name='pandas')")
    result = subprocess.run(
        [sys.executable, str(TOOL), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 1
    assert result.stderr == "error: pandas is missing: pip install -r tools/requirements.txt\n"


# ---- The real script ---------------------------------------------------------------------------------------


def test_real_script(tmp_path):
    corpus = make_corpus(tmp_path)
    settings = TINY | {"NUM_LAYERS": 1, "MODEL_DIM": 16, "VE_LAYERS": 0, "EVAL_STRIDE": 32}
    (tmp_path / "tiny.env").write_text(
        "".join(f"{key}={value}\n" for key, value in settings.items())
    )
    command = [
        sys.executable,
        TOOL,
        "--out",
        tmp_path / "out",
        "--presets",
        "tiny.env",
        "--data",
        corpus.folder,
        "--script",
        SCRIPT,
        "--budget",
        "tokens=1100",
        "OMP_NUM_THREADS=1",
    ]
    command = list(map(str, command))
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stdout + result.stderr
    import pandas as pd

    (row,) = pd.read_csv(tmp_path / "out" / "results.csv").to_dict("records")
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    submission = json.loads((folder / "submission.json").read_text())
    assert row["run"] == folder.name and (row["steps"], row["tokens"]) == (4, 1024)
    assert row["val_bpb_sliding"] == pytest.approx(submission["val_bpb_sliding_window"])
    assert row["model_bytes"] == (folder / "model.int6.ptz").stat().st_size
    copy = tmp_path / "out" / "script" / row["script"][:12] / SCRIPT.name
    assert copy.read_bytes() in (folder / "train.log").read_bytes()
