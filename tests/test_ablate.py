"""tools/ablate.py: what it asks of the script, what it records, and what it says about scores.

Most tests put a function in place of the process of the script.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import helpers
from helpers import ONE_LAYER, ROOT, TINY, train_gpt

for package in ("pandas", "matplotlib", "scipy", "tqdm"):
    pytest.importorskip(package, reason="pip install -r tools/requirements.txt")
sys.path.insert(0, str(ROOT / "tools"))

import ablate
import numpy as np
import pandas as pd

TOOL = ROOT / "tools" / "ablate.py"
STEP = TINY["TRAIN_BATCH_TOKENS"]
BUDGET = ("--budget", f"tokens={2 * STEP}")


class Place:
    """A folder with data and presets, where the tool runs with a stand-in for the script.

    A run's size and score follow from its settings; one whose width is in `failing` fails.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capsys):
        self.out, self.data, self.folder = folder / "out", folder / "data", folder
        self.capsys = capsys
        self.data.mkdir()
        manifest = {"tokenizer": "../tok.model", "vocab_size": 512}
        (self.data / "manifest.json").write_text(json.dumps(manifest))
        (folder / "tok.model").touch()
        self.failing: set[str] = set()
        self.seconds = 1.5
        self.given: list[dict[str, str]] = []  # the settings of every run, in order
        self.preset("a", MODEL_DIM=64, ITERATIONS=7, MAX_WALLCLOCK_SECONDS=100)
        patch.chdir(folder)
        patch.setattr(ablate.Runner, "launch", lambda runner, name, given: self.launch(given))

    def preset(self, name: str, **settings) -> None:
        text = "".join(f"{key}={value}  # a comment\n" for key, value in (TINY | settings).items())
        text = text.replace("VOCAB_SIZE=64", "")
        (self.folder / f"{name}.env").write_text(text)

    def launch(self, given: dict[str, str]) -> None:
        self.given.append(given)
        width, seed, steps = given["MODEL_DIM"], int(given["SEED"]), int(given["ITERATIONS"])
        if width in self.failing:
            raise ablate.RunFailed("exit status 1: error: it went wrong")
        folder = Path(given["OUTPUT_DIR"]) / given["RUN_ID"]
        folder.mkdir(parents=True)
        (folder / "model.int6.ptz").touch()
        bpb = 2 - int(width) * (1 + seed / 10) / 1e4 - seed**2 / 1e3
        scores = dict.fromkeys(("val_bpb_roundtrip", "val_bpb_sliding_window"), bpb)
        size = 1000 + 3 * int(width) ** 2
        figures = {"steps": steps, "train_seconds": self.seconds, "tokens_per_second": 1000}
        figures |= {"bytes_model": size, "trained_parameters": 10, "val_bpb_before": bpb - 0.01}
        (folder / "results.json").write_text(json.dumps(scores | figures))

    def run(self, *words: object, failed: int = 0) -> str:
        """Run the tool in this process; return what it prints."""
        options = ["--out", self.out, "--data", self.data, *words]
        assert ablate.ablate(ablate.parse_arguments([str(word) for word in options])) == failed
        return self.capsys.readouterr().out

    def rows(self) -> list[dict]:
        return ablate.read_results(self.out).to_dict("records")

    def plan(self, *lines: str) -> str:
        (self.folder / "plan").write_text("\n".join(lines) + "\n")
        return "plan"


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    return Place(tmp_path, monkeypatch, capsys)


# ---- Budgets -------------------------------------------------------------------------------------


def test_budget_of_tokens(place):
    plan = place.plan("wide w a.env MODEL_DIM=96 EVAL_STRIDE=16")
    words = ("--presets", "a.env", "--plan", plan, "--seeds", "2,1", "EVAL_STRIDE=32")
    place.run(*words, "--budget", f"tokens={10 * STEP + 5}")
    rows = place.rows()
    order = [("a.env", 1), ("wide", 1), ("a.env", 2), ("wide", 2)]
    assert [(row["label"], row["seed"]) for row in rows] == order
    assert all((row["steps"], row["tokens"], row["error"]) == (10, 10 * STEP, "") for row in rows)
    plain, wide = place.given[:2]
    assert (plain["ITERATIONS"], plain["MAX_WALLCLOCK_SECONDS"], plain["SEED"]) == ("10", "0", "1")
    assert (plain["MODEL_DIM"], wide["MODEL_DIM"]) == ("64", "96")
    assert (plain["EVAL_STRIDE"], wide["EVAL_STRIDE"]) == ("32", "16")
    assert (plain["VOCAB_SIZE"], plain["DATA_PATH"]) == ("512", str(place.data))


def test_every_variant_trains_for_the_seconds_of_the_budget(place):
    """What the script keeps for the export does not come out of the training time."""
    place.seconds = 6.0
    place.run("--presets", "a.env", "--budget", "seconds=6")
    (given,) = place.given
    h = train_gpt.load_settings({"WORLD_SIZE": "1"} | given)
    dist = SimpleNamespace(broadcast_object=lambda value: value)
    run = SimpleNamespace(h=h, dist=dist, log=helpers.KeptLog())
    for estimate in (0.1, 7.0, 1e4):
        reserve = train_gpt.reserve_for_export(run, estimate)
        assert h.max_wallclock_seconds - reserve == pytest.approx(6)
    place.seconds = 3.7
    place.run("--presets", "a.env", "--budget", "seconds=6", "--seeds", "2", failed=1)
    assert place.rows()[1]["error"] == "trained for 3.7 s instead of 6: no fair comparison"


def test_seconds_of_a_shared_machine_are_another_budget(place, monkeypatch):
    """The steps of a run in that time depend on who runs beside it; with tokens they do not."""
    place.seconds = 6.0
    words = ("--presets", "a.env", "--budget")
    for budget, repeats in (("seconds=6", False), (f"tokens={STEP}", True)):
        assert "already there" not in place.run(*words, budget)
        assert ("already there" in place.run(*words, budget, "--jobs", "2")) == repeats
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            assert ("already there" in place.run(*words, budget, "--jobs", "2")) == repeats
        assert "already there" in place.run(*words, budget)


# ---- Teachers, failures, what is there already ---------------------------------------------------


def test_teacher_is_trained_once_a_seed(place):
    place.preset("student", TEACHER_PRESET="t.env", MODEL_DIM=32)
    place.preset("t", MODEL_DIM=48)
    plan = place.plan("s f student.env", "s8 f student.env EVAL_STRIDE=4")
    place.run("--plan", plan, *BUDGET, "--seeds", "3,4", "--jobs", "4")
    assert len(place.given) == 6
    runs = {Path(given["OUTPUT_DIR"]) / given["RUN_ID"]: given for given in place.given}
    for given in place.given:
        if given["MODEL_DIM"] == "48":
            assert "DISTILL_FROM" not in given
            assert given["EVAL_STRIDE"] == "8"  # that is a change to the student alone
        else:
            assert runs[Path(given["DISTILL_FROM"]).parent]["SEED"] == given["SEED"]
    assert sorted(row["label"] for row in place.rows()) == ["s", "s", "s8", "s8", "t.env", "t.env"]


def test_failure_is_a_row_and_the_others_go_on(place):
    place.preset("student", TEACHER_PRESET="bad.env", MODEL_DIM=32)
    place.preset("bad", MODEL_DIM=96)
    place.failing = {"96"}
    words = ("--presets", "bad.env,student.env,a.env", *BUDGET)
    place.run(*words, failed=2)
    errors = {row["label"]: row["error"] for row in place.rows()}
    assert errors.pop("bad.env") == "exit status 1: error: it went wrong"
    assert errors.pop("student.env").startswith("its teacher bad.env has no ")
    assert errors == {"a.env": ""}
    assert "bad.env, seed 1337: exit status 1" in (place.out / "table.md").read_text()
    place.failing = set()
    assert place.run(*words).count("already there") == 1
    assert [row["error"] for row in place.rows()] == ["", "", ""]


def test_what_is_there_is_not_repeated(place, monkeypatch):
    """Other data, another tokenizer and another script are other runs."""
    plan = place.plan("x f a.env", "y f a.env MODEL_DIM=32")
    place.run("--plan", plan, *BUDGET)
    assert place.run("--plan", plan, *BUDGET, "--seeds", "1337,1").count("already there") == 2
    (place.out / "results.csv").unlink()  # as if it had been killed before it wrote the rows
    place.run("--plan", plan, *BUDGET, "--seeds", "1337,1")
    assert len(place.given) == len(place.rows()) == 4
    for path in (place.data / "fineweb_train_000001.bin", place.folder / "tok.model"):
        path.write_bytes(b"more")
        assert "already there" not in place.run("--plan", plan, *BUDGET)
    other = place.folder / "train_gpt.py"
    other.write_text("# another script\n")
    monkeypatch.setattr(ablate, "SCRIPT", other)
    assert "already there" not in place.run("--plan", plan, *BUDGET)
    table = (place.out / "table.md").read_text()
    assert len(re.findall(r"^\| x #\w+ \|", table, re.M)) == 4  # they are never averaged


# ---- Several runs at once, and their environment -------------------------------------------------


def test_runs_share_the_machine_and_take_no_setting_from_the_shell(tmp_path, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    budget = ablate.Budget("tokens", 1e6)

    def runner(gpus: int, jobs: int) -> ablate.Runner:
        return ablate.Runner(tmp_path, budget, gpus, jobs)

    assert "torch.distributed.run" in runner(2, 1).command()
    assert "torch.distributed.run" not in runner(2, 4).command()
    devices = runner(2, 4).devices
    assert [devices.get() for _ in range(4)] == ["0", "1", "0", "1"]
    assert runner(2, 4).environment({}, "1")["CUDA_VISIBLE_DEVICES"] == "1"
    assert runner(0, 2).environment({}, "")["OMP_NUM_THREADS"] == "4"
    names = ("MODEL_DIM", "USE_RANDOM_ADAPTERS", "PRESET", "RANK")
    for name in (*names, "NCCL_DEBUG", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    given = runner(0, 2).environment({"NUM_LAYERS": "2"}, "")
    assert [given[name] for name in ("NUM_LAYERS", "NCCL_DEBUG", "OMP_NUM_THREADS")] == [*"211"]
    assert given["MALLOC_TRIM_THRESHOLD_"]  # of tools/memory.env
    assert not given.keys() & set(names)


# ---- Bad input -----------------------------------------------------------------------------------

A = ("--presets", "a.env", *BUDGET)


@pytest.mark.parametrize(
    "words, message",
    (
        (["--presets", "nope", *BUDGET], "nope.*random_adapters"),
        ([*A, "MODEL_WIDTH=3"], "a.env: MODEL_WIDTH: no such setting"),
        ([*A, "SEED=3"], "SEED: use --seeds, --budget"),
        ([*A, "--budget", "tokens=50"], "tokens=50 is less than one step of 256 tokens"),
        ([*A, "--data", "."], "no .*manifest.json; data/prepare.py makes"),
        (["--presets", "x.env", *BUDGET], "x.env: its teacher x.env may not have a teacher"),
        (["--plan", "plan", *BUDGET], "plan, line 2: needs label, family and preset"),
    ),
)
def test_bad_input_is_refused_at_once(place, words, message):
    place.plan("x f a.env", "y f")
    place.preset("x", TEACHER_PRESET="x.env")
    with pytest.raises((ablate.UserError, OSError), match=message):
        place.run(*words)
    assert not place.out.exists()


# ---- Report --------------------------------------------------------------------------------------


def test_plan_table_picture_and_comparison(place):
    lines = ("# what is compared", "", "small  width a.env MODEL_DIM=32 # narrow")
    plan = place.plan(*lines, "'rather large' width a.env MODEL_DIM=96", "other rank a.env")
    pair = ("--compare", "small", "rather large")
    out = place.run("--plan", plan, *BUDGET, "--seeds", "1,2,3", *pair)
    table = (place.out / "table.md").read_text()
    difference = "small − rather large: 0.0077 ± 0.0006 bpb, n = 3, paired t-test p = 0.0023"
    assert difference in out and difference in table
    names = re.findall(r"^\| ([a-z ]+) \| (\w+) \| tokens=512 \| 3 \|", table, re.M)
    assert names == [("rather large", "width"), ("other", "rank"), ("small", "width")]
    scores = [2 - 96e-4 * (1 + seed / 10) - seed**2 / 1000 for seed in (1, 2, 3)]
    mean, deviation = np.mean(scores), np.std(scores, ddof=1)
    assert f"| {mean:.4f} ± {deviation:.4f} |  | 0.0100 | 10 | nan | 28,648 | 1,000 |" in table
    place.run("--report-only", *pair)
    assert (place.out / "table.md").read_text() == table
    assert (place.out / "bpb_vs_bytes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def make_table(*variants: tuple) -> pd.DataFrame:
    """Return the summary of runs (name, family, bytes, scores by seed)."""
    rows = []
    for name, family, size, scores in variants:
        for seed, score in enumerate(scores):
            facts = {"name": name, "variant": name, "family": family, "seed": seed}
            facts |= {"model_bytes": size, "val_bpb_sliding": score, "budget": "b", "error": ""}
            facts |= dict.fromkeys(("trained", "frozen", "tokens_per_second"), 1.0)
            rows.append(facts | {"val_bpb_before": score, "val_bpb_roundtrip": score})
    return ablate.summarize(pd.DataFrame(rows))


def test_distances_from_the_line():
    sizes = np.array([1e6, 2e6, 4e6, 8e6])
    scores = 2 - 0.1 * np.log(sizes / 1e6) + [0.01, -0.02, 0.005, 0.0]
    networks = [(f"w{i}", "learned", sizes[i], [scores[i]]) for i in range(4)]
    others = [("far", 3e6, [2.2, 2.21]), ("near", 3e6, [1.9]), ("beyond", 9e6, [2.2])]
    table = make_table(*networks, *((name, "f", *rest) for name, *rest in others))
    table, _, notes = ablate.measure_distances(table, "learned", 1)
    # By the textbook: b = Sxy / Sxx and s² (1/n + (x - mean)² / Sxx).
    x = np.log(sizes)
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * scores).sum() / spread
    rest = scores - scores.mean() - slope * (x - x.mean())
    residual = math.sqrt((rest**2).sum() / 2)
    at = math.log(3e6) - x.mean()
    line_error = residual * math.sqrt(1 / 4 + at**2 / spread)
    deviation = 0.01 / math.sqrt(2)  # of the only variant with two seeds, for all variants
    rows = table.set_index("name")
    assert rows.distance["far"] == pytest.approx(2.205 - scores.mean() - slope * at)
    assert rows.distance_error["far"] == pytest.approx(math.hypot(line_error, deviation / 2**0.5))
    assert rows.distance_error["near"] == pytest.approx(math.hypot(line_error, deviation))
    assert f"residual deviation {residual:.4f}, degrees of freedom: 2" in notes[0]
    texts = {row.name: ablate.format_distance(row) for row in table.itertuples()}
    assert texts["w0"] == f"{rest[0]:+.4f} (on the line)"
    assert texts["near"].endswith(" (within noise)")
    assert texts["beyond"].endswith(" (extrapolated)")
    assert texts["far"].endswith(f" ± {rows.distance_error['far']:.4f}")


# ---- The real script -----------------------------------------------------------------------------


def test_stopped_comparison_continues(corpus, tmp_path):
    """A signal lets the script save, no process stays behind, and the same command goes on."""
    settings = TINY | ONE_LAYER | {"MODEL_DIM": 16, "CHECKPOINT_SECONDS": 0}
    settings |= {"VOCAB_SIZE": corpus.settings["VOCAB_SIZE"], "EVAL_STRIDE": 32}
    lines = [f"{key}={value}\n" for key, value in settings.items()]
    (tmp_path / "tiny.env").write_text("".join(lines))
    out, steps = tmp_path / "out", 150
    words = ["--out", out, "--presets", "tiny.env", "--data", corpus.folder]
    words += ["--budget", f"tokens={steps * STEP}", "OMP_NUM_THREADS=1"]
    options = {"script": TOOL, "cwd": tmp_path, "arguments": list(map(str, words))}
    process = helpers.start({}, **options)
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in out.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stopped = helpers.finish(process, timeout=200)
    assert stopped.returncode == 130 and "the same command continues: python" in stopped.stderr
    (folder,) = (out / "runs").iterdir()
    assert (folder / "checkpoint.pt").is_file() and not (out / "results.csv").exists()
    with (folder / "train.log").open("r+") as log:
        ablate.fcntl.flock(log, ablate.fcntl.LOCK_EX | ablate.fcntl.LOCK_NB)  # nobody holds it
    continued = helpers.finish(helpers.start({}, **options), timeout=200)
    assert continued.returncode == 0, continued.stderr
    (row,) = pd.read_csv(out / "results.csv", keep_default_na=False).to_dict("records")
    results = json.loads((folder / "results.json").read_text())
    assert row["error"] == "" and (row["steps"], row["tokens"]) == (steps, steps * STEP)
    assert row["val_bpb_sliding"] == pytest.approx(results["val_bpb_sliding_window"])
    assert row["model_bytes"] == (folder / "model.int6.ptz").stat().st_size
    log = (folder / "train.log").read_bytes()
    assert b"continued after step" in log
    copy = out / "script" / row["script"][:12] / "train_gpt.py"
    assert copy.read_bytes() in log
