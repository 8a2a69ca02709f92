"""Run tools/ablate.py as a user does, mostly with a stand-in for the training script."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import forking
import pytest

import helpers
from helpers import ONE_LAYER, ROOT, SCRIPT, TINY

for package in ("pandas", "matplotlib", "scipy", "adjustText", "psutil", "pynvml", "rich"):
    pytest.importorskip(package, reason="an extra of tools/requirements.txt")

import numpy as np
import pandas as pd

TOOL = ROOT / "tools" / "ablate.py"
# Trains nothing: size and score follow from the settings, and every run leaves its environment.
STAND_IN = """
import dataclasses, json, os, shutil, signal, sys, time
from pathlib import Path

ALIASES = {}
UNSUPPORTED = {}


class UserError(Exception):
    pass


@dataclasses.dataclass
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


def load_settings(environment):
    fields = dataclasses.fields(Hyperparameters)
    given = {f.name: environment.get(f.name.upper(), f.default) for f in fields}
    h = Hyperparameters(**{f.name: type(f.default)(given[f.name]) for f in fields})
    if h.model_dim > 4096:
        raise UserError("MODEL_DIM is over 4096")
    return h


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            sys.exit(f"error: no {path}")
        time.sleep(0.02)


def save_checkpoint(*_):
    (folder / "checkpoint.pt").touch()
    sys.exit("error: stopped")


if __name__ == "__main__":
    h = load_settings(os.environ)
    folder = Path(h.output_dir) / h.run_id
    data = Path(h.data_path)
    resumed = (folder / "checkpoint.pt").exists()
    folder.mkdir(parents=True, exist_ok=resumed)
    signal.signal(signal.SIGTERM, save_checkpoint)
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
    if h.mode == "fail" and not (data / "mended").exists():
        print("something to say")
        sys.exit("error: it went wrong")
    if h.mode == "wait" and not resumed:
        wait_for(data / "mended")
    if h.mode == "look":
        shutil.copy(folder.parent.parent / "results.csv", folder)
    if h.mode.startswith("meet"):  # two runs that end only if both run at the same time
        (data / h.mode).touch()
        wait_for(data / {"meet1": "meet2", "meet2": "meet1"}[h.mode])
    if h.distill_from and not Path(h.distill_from).is_file():
        sys.exit("error: no teacher")
    rank = int(h.map_adapter.removeprefix("lora:"))
    size = int((1000 + 3 * h.model_dim ** 2 + 500 * rank) * (1 if h.iterations == 8 else h.grows))
    (folder / "model.int6.ptz").write_bytes(bytes(size))
    bpb = 2 - h.model_dim * (1 + h.seed / 10) / 1e4 - h.seed ** 2 / 1e3
    (folder / "results.json").write_text(json.dumps({
        "steps": h.iterations, "train_seconds": 1.5, "tokens_per_second": 1000,
        "val_bpb_before": bpb - 0.01, "val_bpb_roundtrip": bpb, "val_bpb_sliding_window": bpb,
        "bytes_total": size + 70_000, "bytes_code": 70_000, "trained_parameters": 10,
        "resumed": resumed}))
"""


@pytest.fixture(scope="module")
def ablate():
    """Import the tool as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOL.parent))
        yield importlib.import_module("ablate")


class Place:
    """A folder with the stand-in, data and presets, where the tool runs."""

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
        """Run the tool in this process, which has its packages loaded; return what it prints."""
        self.patch.setattr(sys, "argv", self.command(words))
        assert self.ablate.ablate(self.ablate.parse_arguments()) == failed
        return self.capsys.readouterr().out

    def start(self, *words: str) -> forking.ForkedProcess:
        return helpers.fork_server().start(self.command(words), os.environ)

    def rows(self) -> list[dict]:
        return self.ablate.read_results(self.out).to_dict("records")

    def environment(self, row: dict) -> dict:
        return json.loads((self.out / "runs" / row["run"] / "environment.json").read_text())

    def results(self, row: dict) -> dict:
        return json.loads((self.out / "runs" / row["run"] / "results.json").read_text())

    def plan(self, *lines: str) -> None:
        (self.folder / "plan").write_text("\n".join(lines) + "\n")


@pytest.fixture
def place(tmp_path, ablate, monkeypatch, capsys):
    return Place(tmp_path, ablate, monkeypatch, capsys)


# ---- Budgets -------------------------------------------------------------------------------------


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
            r"no more than 50,\d{3},\d{3} bytes are possible; with more, .*MODEL_DIM is over 4096",
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

    def size(k: int) -> float:
        return 2000 + 50 * k**power

    async def measure(k: int) -> float:
        sizes[k] = size(k)
        return sizes[k]

    k = asyncio.run(ablate.search(measure, target, start))
    assert size(k) <= target
    assert size(k) >= 0.97 * target or size(k + 1) > target
    assert len(sizes) <= 9


# ---- Teacher, crash, failure ---------------------------------------------------------------------


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
def test_stopped_runs_continue(place, number):
    words = ("--presets", "a.env", "--budget", "tokens=500", "--jobs", "2")
    words += ("--set", "MODE=wait", "--set", "MODE=wait MODEL_DIM=32")
    process = place.start(*words)
    wait_for_runs(place, process, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    killed = number == signal.SIGKILL
    assert process.returncode == (-9 if killed else 130)
    assert killed or "the same command continues: python" in err
    assert len(place.rows()) == 1
    running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_run_of(path, place.out)]
    assert len(running) == (2 if killed else 0)  # no process outlives a tool that can act
    for path in running:
        os.kill(int(path.parent.name), signal.SIGKILL)
    (place.data / "mended").touch()
    assert place.run(*words).count("already there") == 1
    rows = place.rows()
    assert [row["error"] for row in rows] == ["", "", ""]
    assert [place.results(row)["resumed"] for row in rows] == [False, not killed, not killed]


def wait_for_runs(place: Place, process: forking.ForkedProcess, count: int) -> None:
    """Return when this many runs wait and the others have a row."""
    deadline = time.monotonic() + 60
    waiting = 0
    while waiting < count or not place.rows():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        paths = list((place.out / "runs").glob("*/environment.json"))
        waiting = sum('"MODE": "wait"' in path.read_text() for path in paths)


def is_run_of(cmdline: Path, out: Path) -> bool:
    try:
        return str(out / "script") in cmdline.read_text()
    except OSError:  # it has just ended
        return False


# ---- Several runs at once ------------------------------------------------------------------------


def test_jobs_run_at_the_same_time(place):
    place.patch.delenv("OMP_NUM_THREADS", raising=False)
    place.patch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    words = ("--presets", "a.env", "--set", "MODE=meet1", "--set", "MODE=meet2")
    place.run(*words, "--budget", "tokens=500", "--jobs", "2")
    rows = place.rows()
    assert len(rows) == 3 and not any(row["error"] for row in rows)
    assert {place.environment(row)["OMP_NUM_THREADS"] for row in rows} == {"4"}


def test_threads_that_are_set_are_kept(place):
    place.patch.setenv("OMP_NUM_THREADS", "1")
    place.patch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    place.run("--presets", "a.env", "--budget", "tokens=500", "--jobs", "2")
    assert place.environment(place.rows()[0])["OMP_NUM_THREADS"] == "1"


def test_student_waits_for_its_teacher_and_failures_stay_alone(place):
    place.preset("student", "TEACHER_PRESET=a.env", "MODEL_DIM=32")
    place.plan(
        "s f student.env", "bad f a.env MODE=fail", "t learned a.env", "other f a.env GROWS=2"
    )
    words = ("--plan", "plan", "--budget", "tokens=500", "--jobs", "4", "--seeds", "1,2")
    place.run(*words, failed=2)
    rows = place.rows()
    errors = {(row["label"], row["seed"]) for row in rows if row["error"]}
    assert errors == {("bad", 1), ("bad", 2)}
    # The teacher is also a line of the plan: it runs once and has the plan's label.
    assert sorted(row["label"] for row in rows if row["seed"] == 1) == ["bad", "other", "s", "t"]
    assert len(list((place.out / "runs").iterdir())) == 8
    students = {row["seed"]: row for row in rows if row["label"] == "s"}
    teachers = {row["seed"]: row for row in rows if row["label"] == "t"}
    for seed in (1, 2):
        artifact = Path(place.environment(students[seed])["DISTILL_FROM"])
        assert artifact.parent.name == teachers[seed]["run"]


def test_seeds_share_pilots_with_several_jobs(place):
    words = ("--presets", "a.env", "--budget", "bytes=400_000", "--tokens", "1000", "--jobs", "3")
    place.run(*words, "--knob", "rank", "--seeds", "1,2,3", "MAP_ADAPTER=lora:300")
    assert {row["note"] for row in place.rows()} == {place.rows()[0]["note"]}
    assert len(list((place.out / "pilots").iterdir())) <= 5


def test_row_is_on_disk_when_its_run_ends(place):
    place.plan("x f a.env", "y f a.env MODE=look")
    place.run("--plan", "plan", "--budget", "tokens=500", "--seeds", "1")
    (copy,) = (place.out / "runs").glob("*/results.csv")
    (row,) = pd.read_csv(copy).to_dict("records")
    assert row["label"] == "x" and row["val_bpb_sliding"] > 0


@pytest.fixture
def runner(place):
    """Return runner(gpus, slots): a Runner that does not look for GPUs."""
    place.patch.setattr(place.ablate, "open_memory", lambda _: None)
    place.patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    script = place.folder / "fake.py"
    return lambda gpus, slots: place.ablate.Runner(place.out, script, gpus, "", slots)


def make_job(ablate, variant_id: str, **values):
    budget = ablate.Budget("tokens", 1e6)
    variant = ablate.Variant(variant_id, "f", "p", {}, budget, id=variant_id)
    variant.values = {"train_batch_tokens": 1000} | values
    return ablate.Job(variant, 1)


def test_torchrun_only_for_several_processes(runner):
    assert "torch.distributed.run" in runner(2, 1).command()
    for gpus, slots in ((0, 1), (1, 1), (1, 4), (2, 4)):
        assert "torch.distributed.run" not in runner(gpus, slots).command()
    assert "CUDA_VISIBLE_DEVICES" not in runner(1, 4).shares("0")
    assert runner(2, 4).shares("1")["CUDA_VISIBLE_DEVICES"] == "1"


def test_run_waits_for_memory(ablate, runner):
    runner = runner(1, 4)
    gib = 2**30
    runner.memory = types.SimpleNamespace(free=lambda device: 30 * gib)
    small, large = make_job(ablate, "small"), make_job(ablate, "large", train_batch_tokens=100_000)
    assert ablate.memory_bound(large.variant.values) > 30 * gib
    assert runner.has_memory(large)  # alone: waiting would free nothing
    runner.running = {None: small}
    assert runner.has_memory(make_job(ablate, "small"))
    assert not runner.has_memory(large)
    assert re.match(r"large  seed 1 waits for memory: about \d\d\.\d GiB needed, ", runner.note)
    # What a run really took scales the bound of the others.
    small.progress = ablate.Progress(1, 10, 1.0, 1.0)
    small.peak = ablate.memory_bound(small.variant.values) // 10
    runner.learn_peak(small)
    assert runner.has_memory(large)
    # A run that has not made its first step yet still needs its share.
    small.progress, small.peak = None, 0
    runner.memory.free = lambda device: runner.memory_needed(large.variant) + 1
    assert not runner.has_memory(large)


def test_memory_of_the_host(ablate):
    memory = ablate.Memory([])
    assert memory.free("") > 0
    assert memory.used("", os.getpid()) > 2**20
    assert memory.used("", 2**30) is None


def test_progress_of_a_run(ablate, tmp_path):
    log = tmp_path / "train.log"
    assert ablate.read_progress(log) is None
    log.write_text("step:{self.done}/{n} train_time:\n" + "x" * 5000)
    assert ablate.read_progress(log) is None
    with log.open("a") as file:
        file.write("\nstep:20/180 train_loss:3.9 train_time:9310ms step_avg:465.50ms\n")
        file.write("step:40/180 train_loss:3.2 train_time:20000ms step_avg:500.00ms\nfinal\n")
    job = make_job(ablate, "x")
    assert job.cells() == ["x  seed 1", "starting", "", ""]
    job.progress = ablate.read_progress(log)
    assert job.cells() == ["x  seed 1", "40/180", "2,000", "0:01:10"]
    job.progress = job.progress._replace(step=180)
    assert job.cells()[1] == "scoring"
    job.variant.budget = ablate.Budget("seconds", 50)
    job.progress = ablate.Progress(40, 10**9, 20.0, 0.5)
    assert job.cells() == ["x  seed 1", "40", "2,000", "0:00:30"]


def test_display(ablate, capsys):
    running, starting = make_job(ablate, "x"), make_job(ablate, "y")
    running.progress = ablate.Progress(40, 180, 20.0, 0.5)
    with ablate.Display() as display:
        display.show([running, starting], 3, "")
        assert capsys.readouterr().out == ""  # the first line is not due yet
        display.shown -= ablate.LINE_SECONDS
        display.show([running, starting], 3, "z waits for memory")
    line = (
        "2 running, 3 waiting; z waits for memory: x  seed 1 40/180, 2,000 tokens/s, 0:01:10 left"
    )
    assert capsys.readouterr().out == f"{line}; y  seed 1 starting\n"
    table = display.table([running, starting], "caption")
    assert [column.header for column in table.columns] == ["run", "step", "tokens/s", "time left"]
    assert table.row_count == 2


# ---- Bad input -----------------------------------------------------------------------------------


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
        (["--presets", "a.env", "--budget", "tokens=500", "--jobs", "0"], "--jobs 0"),
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


# ---- Report --------------------------------------------------------------------------------------


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
    assert "tokens=500: no yardstick: it needs 2 networks" in table
    assert names == [("rather large", "width"), ("other", "rank"), ("small", "width")]
    scores = [2 - 96e-4 * (1 + seed / 10) - seed**2 / 1000 for seed in (1, 2, 3)]
    mean = sum(scores) / 3
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 2)
    assert f"| {mean:.4f} ± {deviation:.4f} |  | 0.0100 | 10 | nan | 30,648 | 1,000 |" in table
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


def make_table(ablate, *variants: tuple) -> pd.DataFrame:
    """Return the summary of runs (name, family, bytes, scores by seed)."""
    rows = []
    for name, family, size, scores in variants:
        for seed, score in enumerate(scores):
            facts = {"name": name, "variant": name, "family": family, "seed": seed}
            facts |= {"model_bytes": size, "val_bpb_sliding": score, "budget": "b", "error": ""}
            facts |= dict.fromkeys(("trained", "frozen", "tokens_per_second"), 1.0)
            rows.append(facts | {"val_bpb_before": score, "val_bpb_roundtrip": score})
    return ablate.summarize(pd.DataFrame(rows))


def test_distances_from_the_line(ablate):
    sizes = np.array([1e6, 2e6, 4e6, 8e6])
    scores = 2 - 0.1 * np.log(sizes / 1e6) + [0.01, -0.02, 0.005, 0.0]
    networks = [(f"w{i}", "learned", sizes[i], [scores[i]]) for i in range(4)]
    variants = [
        ("far", "f", 3e6, [2.2, 2.21]),
        ("near", "f", 3e6, [1.9]),
        ("beyond", "f", 9e6, [2.2]),
    ]
    table = make_table(ablate, *networks, *variants)
    table, lines, notes = ablate.measure_distances(table, "learned", 1)
    # By the textbook: b = Sxy / Sxx and s² (1/n + (x - mean)² / Sxx).
    x = np.log(sizes)
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * scores).sum() / spread
    rest = scores - scores.mean() - slope * (x - x.mean())
    residual = math.sqrt((rest**2).sum() / 2)
    at = math.log(3e6)
    expected = scores.mean() + slope * (at - x.mean())
    line_error = residual * math.sqrt(1 / 4 + (at - x.mean()) ** 2 / spread)
    deviation = 0.01 / math.sqrt(2)  # of the only variant with two seeds, for all variants
    rows = table.set_index("name")
    assert rows.distance["far"] == pytest.approx(2.205 - expected)
    assert rows.distance_error["far"] == pytest.approx(math.hypot(line_error, deviation / 2**0.5))
    assert rows.distance_error["near"] == pytest.approx(math.hypot(line_error, deviation))
    assert lines["b"].residual == pytest.approx(residual)
    assert "4 networks (4 runs) of family 'learned', 1,000,000 to 8,000,000 bytes" in notes[0]
    assert f"− {-slope:.4f} x with x = ln(bytes / 2,800,000)" in notes[0]
    assert f"residual deviation {residual:.4f}, degrees of freedom: 2" in notes[0]
    texts = {row.name: ablate.format_distance(row) for row in table.itertuples()}
    assert texts["w0"] == f"{rest[0]:+.4f} (on the line)"
    assert texts["near"].endswith(" (within noise)")
    assert texts["beyond"].endswith(" (extrapolated)")
    assert texts["far"].endswith(f" ± {rows.distance_error['far']:.4f}")


def test_line_without_an_error(ablate):
    table = make_table(
        ablate,
        ("a", "learned", 1e6, [2.0]),
        ("b", "learned", 2e6, [1.9]),
        ("c", "f", 2e6, [1.95]),
    )
    table, _, notes = ablate.measure_distances(table, "learned", 1)
    assert ablate.format_distance(table.set_index("name", drop=False).loc["c"]) == "+0.0500"
    assert "residual" not in notes[0]


def test_parabola_needs_five_networks(ablate):
    sizes = np.array([1e6, 2e6, 4e6, 8e6, 16e6])
    scores = 2 - 0.1 * np.log(sizes / 4e6) + 0.02 * np.log(sizes / 4e6) ** 2
    networks = [(f"w{i}", "learned", sizes[i], [scores[i]]) for i in range(5)]
    _, lines, notes = ablate.measure_distances(make_table(ablate, *networks), "learned", 2)
    assert lines["b"].coefficients == pytest.approx([0.02, -0.1, 2.0])
    assert "val_bpb = 2.0000 − 0.1000 x + 0.0200 x² with x = ln(bytes / 4,000,000)" in notes[0]
    _, lines, notes = ablate.measure_distances(make_table(ablate, *networks[1:]), "learned", 2)
    assert not lines and "needs 5 networks of different size" in notes[0]


def test_other_family_as_the_line(place):
    place.plan("x width a.env MODEL_DIM=32", "y width a.env MODEL_DIM=96", "z f a.env MODEL_DIM=64")
    place.run("--plan", "plan", "--budget", "tokens=500", "--line", "width", "--seeds", "1")
    table = (place.out / "table.md").read_text()
    assert table.count("(on the line)") == 2
    assert re.search(r"^\| z \| f \| tokens=500 \| 1 \| [\d.]+ \| [+-]0\.00\d\d \|", table, re.M)


def test_labels_do_not_overlap(ablate, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    networks = [(f"baseline-{i}", "learned", 5e5 * 2**i, [1.9 - 0.05 * i]) for i in range(4)]
    crowd = [(f"variant-number-{i}", f"f{i}", 1e6 + 2e4 * i, [1.85 + i / 500]) for i in range(12)]
    table, lines, _ = ablate.measure_distances(make_table(ablate, *networks, *crowd), "learned", 1)
    ablate.draw(table, lines, tmp_path / "x.png")
    (figure,) = figures
    figure.canvas.draw()  # at the figure's own resolution: it was saved at another
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 16
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    assert "± 2 standard errors of the line" in axes.get_legend_handles_labels()[1]


def test_table_is_made_without_the_packages_of_the_picture(place):
    place.run("--presets", "a.env", "--budget", "tokens=500")
    place.patch.setitem(sys.modules, "adjustText", None)
    assert "no picture: adjustText is missing: pip install -r" in place.run("--report-only")


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


# ---- The real script -----------------------------------------------------------------------------


def test_real_script(corpus, tmp_path):
    settings = TINY | ONE_LAYER | {"MODEL_DIM": 16, "EVAL_STRIDE": 32}
    settings["VOCAB_SIZE"] = corpus.settings["VOCAB_SIZE"]
    (tmp_path / "tiny.env").write_text(
        "".join(f"{key}={value}\n" for key, value in settings.items())
    )
    arguments = [
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
    helpers.run_well({}, script=TOOL, cwd=tmp_path, arguments=arguments)
    (row,) = pd.read_csv(tmp_path / "out" / "results.csv").to_dict("records")
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert row["run"] == folder.name and (row["steps"], row["tokens"]) == (4, 1024)
    assert row["val_bpb_sliding"] == pytest.approx(results["val_bpb_sliding_window"])
    assert row["model_bytes"] == (folder / "model.int6.ptz").stat().st_size
    copy = tmp_path / "out" / "script" / row["script"][:12] / SCRIPT.name
    assert copy.read_bytes() in (folder / "train.log").read_bytes()
