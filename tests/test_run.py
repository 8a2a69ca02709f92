"""Tests of the whole job as a person runs it: real processes, a tiny model, on the CPU."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forking
import numpy as np
import pytest
import torch

import train_gpt
from helpers import (
    ALIASES,
    MODEL_SETTINGS,
    ONE_LAYER,
    ROOT,
    SCRIPT,
    TINY,
    TWO_PROCESSES,
    environment,
    finish,
    read_shard,
    refusal,
    run_well,
    start,
    tiny_settings,
    write_shard,
)

LOSSES = re.compile(
    r"^step:(\d+)/(\d+) train_loss:(\d+\.\d+) train_time:(\d+)ms step_avg:\d+\.\d+ms$", re.M
)
VALIDATIONS = re.compile(r"^step:(\d+)/(\d+) val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)", re.M)
FINAL = r"^final_int6_brotli_{}_exact val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)$"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that the runs of this file lie in."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(corpus, runs) -> dict:
    """Settings of the run that others are compared with: half of it trains quantized weights."""
    return {
        **TINY,
        **corpus.settings,
        "OUTPUT_DIR": runs,
        "RUN_ID": "base",
        "LATE_QAT_THRESHOLD": 1,
        "VAL_LOSS_EVERY": 10,
        "SEED": 42,
    }


@pytest.fixture(scope="module")
def trained(base, runs) -> Path:
    published = {
        "USE_RANDOM_ADAPTERS": 1,
        "RANDOM_ADAPTER_RANK": 4,
        "NGRAM_EVAL": 0,
        "KNN_LAMBDA": 0,
    }
    run_well(base | published)  # which say what `base` says
    return runs / "base"


def log_of(folder: Path) -> str:
    return (folder / "train.log").read_text(encoding="utf-8")


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def losses_of(text: str) -> list[float]:
    return [float(found[3]) for found in LOSSES.finditer(text)]


def final(text: str, kind: str = "sliding_window") -> tuple[float, float]:
    """Return val_loss and val_bpb of the last lines of a log or a console."""
    (found,) = re.finditer(FINAL.format(kind), text, re.M)
    return float(found[1]), float(found[2])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]


def artifact_of(folder: Path) -> bytes:
    return (folder / "model.int6.ptz").read_bytes()


def contents(folder: Path, pattern: str = "*") -> dict[str, tuple[bytes, int]]:
    """Return what is in a folder's files, and when they were written."""
    paths = folder.glob(pattern)
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def names_in(folder: Path) -> set[str]:
    """Return the names of a run's files, without those that a run may or may not leave."""
    return {path.name for path in folder.iterdir()} - {"checkpoint.previous.pt", "metrics.jsonl"}


# ---- One run -------------------------------------------------------------------------------------


def test_run_leaves_its_four_files(trained):
    assert names_in(trained) == {"checkpoint.pt", "model.int6.ptz", "results.json", "train.log"}


def test_log_has_the_lines_that_others_look_for(trained):
    text = log_of(trained)
    steps = [(int(found[1]), int(found[2])) for found in LOSSES.finditer(text)]
    assert steps == [(step, 20) for step in range(1, 21)]
    assert [(int(found[1]), int(found[2])) for found in VALIDATIONS.finditer(text)] == [
        (10, 20),
        (20, 20),
    ]
    for kind in ("roundtrip", "sliding_window"):
        loss, bpb = final(text, kind)
        rounded = rf"^final_int6_brotli_{kind} val_loss:{loss:.4f} val_bpb:{bpb:.4f} "
        assert re.search(rounded, text, re.M)
    assert final(text, "roundtrip") != final(text)  # windows that overlap score differently
    assert "late_qat:on step:11" in text


def test_log_holds_all_that_the_run_depends_on(trained, base):
    text = log_of(trained)
    assert SCRIPT.read_text(encoding="utf-8") in text
    logged = dict(re.findall(r"^([A-Z][A-Z0-9_]+)=(.*)$", text, re.M))
    for name, field in train_gpt.SETTINGS.items():
        expected = type(field.default)(base.get(name.upper(), field.default))
        assert logged[name.upper()] == str(expected), name
    row = r"^(blocks\.\S+) +\d+x\d+ +1·orthogonal +(\d+) lora:4 "
    found = re.findall(row, text, re.M)
    table = train_gpt.build_map_table(tiny_settings())
    expected = [(spec.name, str(spec.seed)) for spec in table.values() if spec.is_random]
    assert found == expected


def test_loss_falls(trained):
    losses = losses_of(log_of(trained))
    assert losses[0] == pytest.approx(math.log(512), abs=0.1)  # nothing is known at first
    assert np.mean(losses[-5:]) < losses[0] - 0.8


def test_results_agree_with_the_log_and_the_files(trained, base):
    results = results_of(trained)
    loss, bpb = final(log_of(trained))
    assert results["val_loss"] == pytest.approx(loss, abs=1e-8)
    assert results["val_bpb"] == pytest.approx(bpb, abs=1e-8)
    assert results["bytes_code"] == train_gpt.code_bytes() < results["bytes_code_readable"]
    assert results["bytes_code_readable"] == SCRIPT.stat().st_size
    assert results["bytes_model"] == len(artifact_of(trained))
    assert results["bytes_total"] == results["bytes_code"] + results["bytes_model"]
    assert results["dataset"] == base["DATA_PATH"].name
    assert (results["seed"], results["steps"]) == (42, 20)
    day = time.mktime(time.strptime(results["date"], "%Y-%m-%d"))
    assert abs(day - time.time()) < 2 * 86_400
    assert "lora:4" in results["model"]
    assert results["hardware"].startswith("1 x ")


def test_bits_per_byte_count_the_bytes_of_the_text(trained, base, corpus):
    """Against the length of the decoded text, without this project's own table of bytes."""
    tokens = read_shard(corpus.folder / "fineweb_val_000000.bin")
    model = train_gpt.Tokenizer(str(corpus.tokenizer), 512).model
    documents = [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == 1))]
    size = sum(len(text.encode()) for text in model.decode(documents))
    loss, bpb = final(log_of(trained))
    assert bpb == pytest.approx(loss * (len(tokens) - 1) / math.log(2) / size, abs=1e-7)


def test_run_into_an_old_folder_is_refused(trained, base):
    before = contents(trained)
    assert "choose a new RUN_ID" in refusal(base)
    assert contents(trained) == before


# ---- Repeatability -----------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(trained, base, runs):
    """Of two interpreters: each has an order of its own for a set of strings."""
    run_well(base | {"RUN_ID": "again"}, fresh=True)
    assert artifact_of(runs / "again") == artifact_of(trained)
    assert losses_of(log_of(runs / "again")) == losses_of(log_of(trained))


def test_another_seed_gives_another_run(trained, base, runs):
    run_well(base | {"RUN_ID": "seed", "SEED": 43})
    assert artifact_of(runs / "seed") != artifact_of(trained)
    assert losses_of(log_of(runs / "seed")) != losses_of(log_of(trained))


def test_validation_text_has_no_part_in_training(trained, base, runs, corpus, tmp_path):
    """Other text is validated on, amid training too, and the weights come out the same."""
    for path in corpus.folder.glob("fineweb_train_*.bin"):
        shutil.copy(path, tmp_path)
    tokens = read_shard(corpus.folder / "fineweb_val_000000.bin")
    second = np.flatnonzero(tokens == 1)[1]
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens[second:])  # without its first document
    run_well(base | {"RUN_ID": "other", "DATA_PATH": tmp_path})
    ours, theirs = weights_of(runs / "other"), weights_of(trained)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    choice = re.compile(r"^average .*$", re.M)
    chosen = choice.findall(log_of(trained))
    assert choice.findall(log_of(runs / "other")) == chosen != []
    assert final(log_of(runs / "other")) != final(log_of(trained))


# ---- Evaluation from the artifact --------------------------------------------------------------


@pytest.fixture(scope="module")
def validation_only(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    shutil.copy(corpus.folder / "fineweb_val_000000.bin", folder)
    return folder


@pytest.fixture(scope="module")
def eval_only(trained, validation_only, corpus) -> dict:
    """What an evaluator sets: where things lie, how to score. The artifact describes the model."""
    settings = {
        "EVAL_ONLY": 1,
        "MODEL_PATH": trained / "model.int6.ptz",
        "DATA_PATH": validation_only,
        "TOKENIZER_PATH": corpus.tokenizer,
        "EVAL_SEQ_LEN": 32,
        "EVAL_STRIDE": 8,
        "DTYPE": "float32",
    }
    assert not settings.keys() & {*MODEL_SETTINGS, *ALIASES}
    return settings


def test_artifact_alone_repeats_the_score(trained, eval_only, tmp_path):
    script = Path(shutil.copy(SCRIPT, tmp_path))
    out = run_well(eval_only, script=script, cwd=tmp_path)
    assert final(out) == pytest.approx(final(log_of(trained)), abs=1e-6)
    assert final(out, "roundtrip") == pytest.approx(final(log_of(trained), "roundtrip"), abs=1e-6)
    assert list(tmp_path.iterdir()) == [script]  # an evaluation writes nothing


def test_evaluation_of_another_model_than_was_asked_for_is_refused(eval_only):
    """Whoever sets a variable of the model expects it to hold; so do the published names for it."""
    others = {"NUM_LAYERS": 12, "LOGIT_SOFTCAP": 10, "RANDOM_ADAPTER_RANK": 8, "MAP_SEED": 7}
    message = refusal(eval_only | others)
    assert f"MODEL_PATH={eval_only['MODEL_PATH']} has other settings" in message
    for part in (
        f"NUM_LAYERS=12 here, {TINY['NUM_LAYERS']} there",
        "LOGIT_SOFTCAP=10.0 here, 30.0 there",
        "MAP_ADAPTER=lora:8 here, lora:4 there",
        "MAP_SEED=7 here, 12345 there",
    ):
        assert part in message
    assert "MODEL_DIM" not in message, "nobody asked for it"


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"NUM_LAYERS": 4, "VE_LAYERS": "-2,-1"},
        {"MAP_ADAPTER": "lora:4"},
        {"RANDOM_ADAPTER_RANK": 4},
        {"MAP_SEED": "0x3039"},
        {"RANDOM_ADAPTER_SEED": "0x3039"},
        {"USE_RANDOM_ADAPTERS": 1},
        {"MATRIX_LR": 1.0},
    ],
)
def test_settings_that_agree_with_the_artifact_are_accepted(trained, monkeypatch, asked):
    """However they are spelled; what is no part of the model stays as it was set."""
    stored = train_gpt.read_artifact(artifact_of(trained))[0]["model"]
    for name, value in {**asked, "EVAL_STRIDE": 5}.items():
        monkeypatch.setenv(name, str(value))
    h = train_gpt.adopt_settings(train_gpt.load_settings(), stored, "the artifact")
    assert h.model_settings() == stored
    assert h.eval_stride == 5


def test_two_processes_evaluate_as_one(trained, eval_only):
    out = run_well(eval_only, launcher=TWO_PROCESSES)
    assert final(out) == pytest.approx(final(log_of(trained)), abs=1e-7)


PLACES = [0, 7, 8, 11, 12, 16, 100, 0.2, 0.4, 0.6, 0.8, -33, -32, -1]


@pytest.mark.parametrize("place", PLACES)
def test_flipped_bit_is_refused(trained, place):
    blob = bytearray(artifact_of(trained))
    blob[int(place * len(blob)) if isinstance(place, float) else place] ^= 4
    with pytest.raises(train_gpt.UserError):
        train_gpt.read_artifact(bytes(blob))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda blob: b"",
        lambda blob: blob[:47],
        lambda blob: blob[:-1],
        lambda blob: blob + b"\0",
        lambda blob: blob[1:],
        lambda blob: b"\0" * 1000,
    ],
    ids=["empty", "47 bytes", "cut", "longer", "shifted", "zeros"],
)
def test_damaged_artifact_is_refused(trained, spoil):
    with pytest.raises(train_gpt.UserError):
        train_gpt.read_artifact(spoil(artifact_of(trained)))


def test_missing_artifact_is_named(eval_only, tmp_path):
    message = refusal(eval_only | {"MODEL_PATH": tmp_path / "none.ptz"})
    assert f"MODEL_PATH={tmp_path / 'none.ptz'} cannot be read: No such file" in message
    assert "RUN_ID" not in message, "an evaluation has no run to continue"


def test_log_says_how_each_figure_was_scored(eval_only):
    """The roundtrip has one window after the other in either mode."""
    out = run_well(eval_only | {"EVAL_MODE": "streaming"})
    modes = dict(re.findall(r"final_int6_brotli_(\w+) .* mode:(\w+)", out))
    assert modes == {"roundtrip": "exact", "sliding_window": "streaming"}


# In place of the interpreter of .venv: it says when a signal ends it.
INTERPRETER = """
import os, signal, sys, time
if sys.argv[1] == "-m": sys.exit()  # pip
if sys.argv[-1] == "--plan": sys.exit(print("0,,"))
def leave(number, frame): sys.exit(print("saved") or 5)
signal.signal(getattr(signal, os.environ.get("STOP", "SIGTERM")), leave)
print("started", flush=True)
time.sleep(20 * ("STOP" in os.environ))
"""


@pytest.fixture
def start_run_sh(tmp_path):
    """Return a function that starts a run.sh whose script only waits."""
    root = tmp_path / "a project"
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "presets", root / "presets")
    for name in ("run.sh", "requirements.txt", "tools/memory.env"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    python = root / ".venv" / "bin" / "python"
    script = tmp_path / "interpreter.py"
    script.write_text(INTERPRETER)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)

    def start_it(**settings) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", root / "run.sh"],
            env=environment({"DATA_PATH": tmp_path, **settings}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    return start_it


def test_a_run_says_at_its_end_how_to_see_it(tmp_path, monkeypatch, capsys):
    """Where the tools are, with paths that a shell reads as they are."""
    script = tmp_path / "a project" / "train_gpt.py"
    monkeypatch.setattr(train_gpt, "__file__", str(script))
    train_gpt.say_what_is_next(Path("runs/my own"))
    assert capsys.readouterr().out == ""
    (script.parent / "tools").mkdir(parents=True)
    (script.parent / "tools" / "report.py").touch()
    train_gpt.say_what_is_next(Path("runs/my own"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "report.py" in line)
    tool = f"{script.parent}/tools/report.py"
    assert shlex.split(line, comments=True)[1:] == [tool, "runs/my own", "--out", "report.html"]


@pytest.mark.parametrize("number, send", [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_signals_reach_the_script_through_run_sh(start_run_sh, number, send):
    """SIGTERM to run.sh alone, Ctrl-C to all: the script has taken its place."""
    process = start_run_sh(STOP=number.name, RUN_ID="mine")
    while process.stdout.readline() != "started\n":
        assert process.poll() is None, process.stderr.read()
    send(process.pid, number)
    result = finish(process)
    assert result.returncode == 5
    assert "saved" in result.stdout


def test_damaged_artifact_ends_a_process_with_a_message(trained, eval_only, tmp_path):
    blob = bytearray(artifact_of(trained))
    blob[len(blob) // 2] ^= 1
    (tmp_path / "damaged.ptz").write_bytes(blob)
    assert "damaged" in refusal(eval_only | {"MODEL_PATH": tmp_path / "damaged.ptz"})


def rewritten(trained: Path, **changes) -> bytes:
    """The run's artifact with other entries in its header, and a checksum that is right."""
    header, tensors = train_gpt.read_artifact(artifact_of(trained))
    return train_gpt.write_artifact(header | changes, tensors)[0]


@pytest.mark.parametrize("change", ["fingerprint", "seed"])
def test_other_maps_than_the_artifacts_are_refused(trained, processes, change):
    """As another release of a library could generate them; with those the weights are garbage."""
    header, _ = train_gpt.read_artifact(artifact_of(trained))
    other_seed = header["model"] | {"map_seed": header["model"]["map_seed"] + 1}
    changes = {"fingerprint": {"fingerprint": "0" * 64}, "seed": {"model": other_seed}}[change]
    h = tiny_settings()
    train_gpt.model_from_artifact(h, rewritten(trained), processes)
    with pytest.raises(train_gpt.UserError, match="maps generated here are not the stored ones"):
        train_gpt.model_from_artifact(h, rewritten(trained, **changes), processes)


def test_other_maps_end_a_process_with_a_message(trained, eval_only, tmp_path):
    (tmp_path / "other.ptz").write_bytes(rewritten(trained, fingerprint="0" * 64))
    assert "maps" in refusal(eval_only | {"MODEL_PATH": tmp_path / "other.ptz"})


def test_another_tokenizer_than_the_artifacts_is_refused(eval_only, corpus, tmp_path):
    """One of the same size whose text is another: its bytes per token would be wrong."""
    proto = corpus.tokenizer.read_bytes()
    assert proto.count(b"the") > 0
    other = tmp_path / "other.model"
    other.write_bytes(proto.replace(b"the", b"eht"))
    message = refusal(eval_only | {"TOKENIZER_PATH": other})
    assert f"TOKENIZER_PATH={other}" in message
    assert "artifact" in message


def test_another_tokenizer_than_the_shards_is_refused(base, runs, corpus, tmp_path):
    """Trap 9: the numbers of the tokens would mean other text, and the bits per byte nothing."""
    other = tmp_path / "other.model"
    other.write_bytes(corpus.tokenizer.read_bytes().replace(b"the", b"eht"))
    message = refusal(base | {"RUN_ID": "tokenizer", "TOKENIZER_PATH": other})
    assert f"TOKENIZER_PATH={other} is not the tokenizer that" in message
    assert str(corpus.folder / "manifest.json") in message
    assert not (runs / "tokenizer" / "checkpoint.pt").exists()


# ---- Several processes -------------------------------------------------------------------------


def test_two_processes_train_as_one(base, runs):
    """Sums in another order differ in their last bits.

    Late QAT would round some of these to other codes, so it is off here.
    """
    exact = base | {"LATE_QAT_THRESHOLD": 0}
    run_well(exact | {"RUN_ID": "one"})
    run_well(exact | {"RUN_ID": "two"}, launcher=TWO_PROCESSES, fresh=True)
    same_training(runs / "two", runs / "one", steps=20)
    ours, theirs = weights_of(runs / "two"), weights_of(runs / "one")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5, msg=name)


def test_two_launchers_train_as_one(trained, base, runs, tmp_path):
    """Two machines of one process each, as far as one can be two; with late QAT from step 11 on.

    They meet by a file: a port that is free now may be taken a moment later.
    """
    launcher = (
        *forking.TORCHRUN,
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={tmp_path / 'rendezvous'}",
        "--rdzv-conf=store_type=file",
        "--local-addr=127.0.0.1",
    )
    processes = [start(base | {"RUN_ID": "launchers"}, launcher) for _ in range(2)]
    for result in [finish(process) for process in processes]:
        assert result.returncode == 0, result.stdout + result.stderr
    same_training(runs / "launchers", trained, steps=11)


def same_training(folder: Path, other: Path, steps: int) -> None:
    """Losses are as exact as the log has them for so many steps, nearly so where codes differ."""
    ours, theirs = losses_of(log_of(folder)), losses_of(log_of(other))
    assert len(ours) == len(theirs) == 20
    assert ours[:steps] == pytest.approx(theirs[:steps], abs=1.01e-4)  # the log has four decimals
    assert ours == pytest.approx(theirs, abs=1e-2)
    assert final(log_of(folder)) == pytest.approx(final(log_of(other)), abs=1e-2)
    assert results_of(folder)["hardware"].startswith("2 x ")


# ---- Export ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def over_the_limit(base, runs) -> str:
    """The message of a run that trained and then found its artifact too large."""
    return refusal(base | {"RUN_ID": "large", "ARTIFACT_LIMIT_BYTES": 1000})


def test_artifact_over_the_limit_is_refused_and_the_weights_stay(over_the_limit, trained, runs):
    size = train_gpt.code_bytes() + len(artifact_of(trained))
    for word in (
        f"{size:,} bytes",
        "1,000",
        "checkpoint.pt",
        "EXPORT_ONLY=1",
        "CHECKPOINT_PATH",
        "TARGET_BYTES",
        "rank",
    ):
        assert word in over_the_limit
    assert names_in(runs / "large") == {"checkpoint.pt", "train.log"}


def test_its_checkpoint_exports_what_the_run_would_have(over_the_limit, trained, base, runs):
    export = {
        "EXPORT_ONLY": 1,
        "CHECKPOINT_PATH": runs / "large" / "checkpoint.pt",
        "RUN_ID": "exported",
    }
    run_well(base | export)
    assert final(log_of(runs / "exported")) == pytest.approx(final(log_of(trained)), abs=1e-8)
    assert artifact_of(runs / "exported") == artifact_of(trained)
    assert results_of(runs / "exported")["steps"] == 20


def test_checkpoint_brings_the_settings_of_its_run(trained, base, runs):
    """Who exports need not know how the model was built, trained and evaluated."""
    where = {name: base[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "OUTPUT_DIR")}
    export = {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": trained / "checkpoint.pt", "RUN_ID": "forgotten"}
    (runs / "forgotten").mkdir()
    (runs / "forgotten" / "train.log").write_text("a start that came no further\n")
    out = run_well(where | export)
    assert final(out) == pytest.approx(final(log_of(trained)), abs=1e-8)
    assert results_of(runs / "forgotten")["seed"] == base["SEED"]


def test_a_continued_run_computes_in_its_own_type_and_may_take_smaller_batches(
    over_the_limit, trained, base, runs
):
    shutil.copytree(runs / "large", runs / "continued")
    before = contents(runs / "continued", "checkpoint*")
    other = {
        "RUN_ID": "continued",
        "MICRO_BATCH_TOKENS": 32,
        "EVAL_BATCH_TOKENS": 64,
        "ARTIFACT_LIMIT_BYTES": 16_000_000,
    }
    out = run_well({name: value for name, value in base.items() if name != "DTYPE"} | other)
    assert final(out) == pytest.approx(final(log_of(trained)), abs=1e-7)
    # Trying the export again writes no checkpoint: it would push out the training's last ones.
    assert contents(runs / "continued", "checkpoint*") == before


def test_a_console_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    """`bash run.sh | tee log`: Ctrl-C ends tee, too, before the run has saved."""

    def write(*_):
        raise BrokenPipeError

    log, stop = train_gpt.RunLog(rank=0), train_gpt.StopSignal()
    log.open(tmp_path)
    stop.can_save = True
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=write, flush=write))
    monkeypatch.setattr("os.write", write)
    log("a line")
    stop._handle(2, None)
    assert log_of(tmp_path) == "a line\n"
    assert stop.requested


def test_checkpoint_of_another_model_than_was_asked_for_is_refused(trained, base, runs):
    """Other maps than it was trained around would give a whole artifact of garbage."""
    others = {"RANDOM_ADAPTER_SEED": 7, "LOGIT_SOFTCAP": 10, "NUM_LAYERS": 3, "XSA_LAST_N": 0}
    export = {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": trained / "checkpoint.pt", "RUN_ID": "others"}
    message = refusal(base | export | others)
    for name in (
        "CHECKPOINT_PATH",
        "MAP_SEED=7",
        "LOGIT_SOFTCAP=10",
        "NUM_LAYERS=3",
        "XSA_LAST_N=0",
    ):
        assert name in message
    assert not (runs / "others").exists()


# ---- Other configurations ----------------------------------------------------------------------


def test_everything_learned_trains_and_exports(base, runs):
    run_well(base | {"RUN_ID": "learned", "USE_RANDOM_ADAPTERS": 0})
    text = log_of(runs / "learned")
    losses = losses_of(text)
    assert np.mean(losses[-5:]) < losses[0] - 0.8
    assert "and 0 frozen parameters" in text
    before = [float(found[4]) for found in VALIDATIONS.finditer(text)][-1]
    assert final(text, "roundtrip")[1] == pytest.approx(before, rel=0.02)


def test_master_weights_are_float32_under_bfloat16(base, runs):
    """Small updates of bfloat16 weights are rounded away: no master may pass through that type."""
    run_well(base | {"RUN_ID": "bfloat16", "DTYPE": "bfloat16"})
    losses = losses_of(log_of(runs / "bfloat16"))
    assert np.mean(losses[-5:]) < losses[0] - 0.8
    weights = weights_of(runs / "bfloat16")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for name, weight in weights.items():
        assert weight.numel() < 8 or not torch.equal(weight, weight.bfloat16().float()), name


def test_loss_that_is_not_finite_ends_the_run(base, runs):
    """Ruined by the last step, whose loss was still fine."""
    settings = base | {
        "RUN_ID": "diverged",
        "ITERATIONS": 1,
        "MATRIX_LR": 1e30,
        "TIED_EMBED_LR": 1e30,
    }
    assert "not finite" in refusal(settings)


DRIVER = """
import functools, sys
import torch
sys.path.insert(0, sys.argv[1])
import train_gpt

def backend(graph, inputs):  # the graphs, without the minutes of making code of them
    print("compiled", "training" if torch.is_grad_enabled() else "evaluation")
    return graph.forward

torch.compile = functools.partial(torch.compile, backend=backend)
train_gpt.main()
"""


def test_nothing_compiles_in_the_timed_region(base, tmp_path):
    """Warm-up compiles the step.

    Its undoing, validation and quantized training then reuse that one graph.
    """
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    small = base | ONE_LAYER
    eager = run_well(small | {"RUN_ID": "eager"})
    settings = small | {
        "COMPILE": 1,
        "WARMUP_STEPS": 2,
        "RUN_ID": "compiled",
        "MICRO_BATCH_TOKENS": 64,
        "EVAL_BATCH_TOKENS": 128,
        "VAL_LOSS_EVERY": 5,
    }
    out = run_well(settings, script=driver, arguments=[str(ROOT)])
    lines = out.splitlines()
    (compiled,) = [i for i, line in enumerate(lines) if line == "compiled training"]
    assert "compiled evaluation" in lines
    assert not any(line.startswith("step:") for line in lines[:compiled])
    assert "late_qat:on step:11" in out
    losses, expected = losses_of(out), losses_of(eager)
    assert losses[:11] == pytest.approx(expected[:11], abs=1.01e-4)  # the log has four decimals
    assert losses == pytest.approx(expected, abs=1e-2)  # other codes where a last bit differs


IN_ORDER = """
import sys
import torch
from torch._dynamo.backends.common import aot_autograd
sys.path.insert(0, sys.argv[1])
import train_gpt

traced = []

def keep(graph, inputs):  # what inductor gets, without the minutes of making code of it
    traced.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph.forward

with train_gpt.Distributed(train_gpt.load_settings({}, device="cpu", compile="1")):
    from torch._inductor.decomposition import select_decomp_table
    backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
    embedding = train_gpt.Embedding(8, 4, 1.0, torch.bfloat16)
    compiled = torch.compile(embedding, backend=backend, fullgraph=True)
    compiled(torch.randint(8, (64,))).float().sum().backward()
print(*traced)
"""


def test_compiled_gradients_of_embeddings_add_up_in_order(tmp_path):
    """Inductor would add by atomic operations, whose order and so last bits differ in each run."""
    driver = tmp_path / "driver.py"
    driver.write_text(IN_ORDER)
    traced = run_well({}, script=driver, arguments=[str(ROOT)]).split()
    assert any("embedding_dense_backward" in name for name in traced)
    assert not any("index_put" in name for name in traced)


def test_wall_clock_ends_training_with_its_schedule_complete(base, runs):
    """Judged by the times in the log, so that a busy machine may take what it takes."""
    limits = {"MAX_WALLCLOCK_SECONDS": 5, "GPTQ_RESERVE_SECONDS": 3, "ITERATIONS": 1_000_000}
    own = {"RUN_ID": "clock", "LATE_QAT_THRESHOLD": 0.5, "VAL_LOSS_EVERY": 0}
    run_well(base | limits | own | {"TRAIN_LOG_EVERY": 1})
    text = log_of(runs / "clock")
    (reserve,) = re.findall(r"^export: about .* s, ([\d.]+) s are kept for it$", text, re.M)
    assert float(reserve) >= 3.0  # more where the export takes longer
    limit = 5 - float(reserve)
    ends = [0.0] + [int(found[4]) / 1000 for found in LOSSES.finditer(text)]
    results = results_of(runs / "clock")
    assert results["steps"] == len(ends) - 1 < 1_000_000
    assert ends[-1] - 0.001 <= results["train_seconds"]
    assert ends[-2] < limit + 0.05, "no step begins after the time is up"
    steps = [end - begin for begin, end in itertools.pairwise(ends)]
    usual = statistics.median(steps[-100:])
    assert ends[-1] + usual > limit - 0.1, "it ends only when no further step fits"
    assert "late_qat:on" in text  # the warm-down came within the time
    assert "ended_by:MAX_WALLCLOCK_SECONDS" in text
