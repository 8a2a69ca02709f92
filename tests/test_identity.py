"""A run keeps its data, tokenizer, code and windows, or says what changed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from helpers import (
    ONE_LAYER,
    SCRIPT,
    TINY,
    Seconds,
    log_of,
    refusal,
    run_well,
    tiny_settings,
    write_shard,
)
from reference import tokens

SCORE = r"^final_int6_brotli_sliding_window_exact .*$"


@pytest.fixture(scope="module")
def base(corpus, runs) -> dict:
    """Settings of a short run on the corpus."""
    short = {"ITERATIONS": 3, "TRAIN_BATCH_TOKENS": 64, "GPTQ_CALIB_BATCHES": 1}
    return {**TINY, **ONE_LAYER, **corpus.settings, **short, "OUTPUT_DIR": runs}


@pytest.fixture(scope="module")
def trained(base, runs) -> Path:
    """The folder of a finished run."""
    run_well(base | {"RUN_ID": "trained"})
    return runs / "trained"


@pytest.fixture(scope="module")
def unfinished(base, runs) -> Path:
    """The folder of a run that trained, and whose artifact was too large."""
    assert "over the limit" in refusal(base | {"RUN_ID": "unfinished", "ARTIFACT_LIMIT_BYTES": 1})
    return runs / "unfinished"


@pytest.fixture(scope="module")
def others(corpus, tmp_path_factory) -> tuple[dict, dict]:
    """Settings of another tokenizer of the same size, and of the same data and one more shard."""
    folder = tmp_path_factory.mktemp("other") / "data"
    shutil.copytree(corpus.folder, folder, ignore=shutil.ignore_patterns("manifest.json"))
    grown = shutil.copytree(folder, folder.with_name("grown"))
    write_shard(grown / "fineweb_train_000001.bin", range(500))
    path = folder / "other.model"
    path.write_bytes(corpus.tokenizer.read_bytes().replace(b"ing", b"gni"))
    tokenizer = {"DATA_PATH": folder, "TOKENIZER_PATH": path}
    return tokenizer, {"DATA_PATH": grown, "TOKENIZER_PATH": corpus.tokenizer}


def score(text: str) -> str:
    (line,) = re.findall(SCORE, text, re.M)
    return line


@pytest.mark.parametrize("export", [True, False])
def test_another_tokenizer_and_other_data_than_the_runs_are_refused(
    unfinished, base, others, export
):
    """One more shard would move sequences to the hold-out."""
    settings = base | {"RUN_ID": unfinished.name}
    if export:
        path = unfinished / "checkpoint.pt"
        settings |= {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": path, "RUN_ID": "exported"}
    names = ("TOKENIZER_PATH", "tokenizer"), ("DATA_PATH", "shards")
    for changes, (name, what) in zip(others, names, strict=True):
        message = refusal(settings | changes)
        assert f"{name}={changes[name]}: the {what} there are not the run's" in message
        assert f"it was {base[name]}" in message


def test_an_export_takes_the_weights_and_data_of_the_checkpoint_that_it_names(
    trained, unfinished, runs
):
    """Not those that an interrupted export of an earlier one left in its folder."""
    stale = shutil.copytree(unfinished, runs / "again") / "checkpoint.pt"
    saved = torch.load(stale, weights_only=True)
    saved["settings"]["export_only"] = 1
    saved["weights"] = {name: values + 1 for name, values in saved["weights"].items()}
    torch.save(saved, stale)
    path = trained / "checkpoint.pt"
    export = {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": path, "RUN_ID": "again", "OUTPUT_DIR": runs}
    assert "over the limit" in refusal(export | {"CHECKPOINT_PATH": unfinished / "checkpoint.pt"})
    out = run_well(export | {"ARTIFACT_LIMIT_BYTES": 16_000_000})
    assert score(out) == score(log_of(trained))
    ours, theirs = ((folder / "model.int6.ptz").read_bytes() for folder in (stale.parent, trained))
    assert ours == theirs
    ours, theirs = (train_gpt.Checkpoint.read(saved).weights for saved in (stale, path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_continued_run_takes_its_own_data_and_names_an_edited_script(unfinished, runs):
    """It is told no path; what wrote the checkpoint was another script and other processes."""
    warnings = (
        "warning: the script has changed since the checkpoint was written",
        "warning: the checkpoint was written with processes 2, the run goes on with 1",
        "warning: the checkpoint was written with versions {}, the run goes on with {",
    )
    for name in ("edited", "same"):
        path = shutil.copytree(unfinished, runs / name) / "checkpoint.pt"
        if name == "edited":
            saved = torch.load(path, weights_only=True)
            saved["identity"] |= {"source": "0" * 64, "processes": "2"}
            saved["versions"] = {}
            saved["settings"]["timeout_seconds"] = 77  # the processes have met without it
            torch.save(saved, path)
        out = run_well({"RUN_ID": name, "OUTPUT_DIR": runs, "ARTIFACT_LIMIT_BYTES": 16_000_000})
        assert [warning in out for warning in warnings] == [name == "edited"] * 3
        assert "TIMEOUT_SECONDS=77" not in log_of(path.parent)


def test_the_source_of_a_run_is_read_before_packages_are_imported(tmp_path, monkeypatch):
    """That takes seconds, in which somebody may edit the script; Python has compiled it by then."""
    script = Path(shutil.copy(SCRIPT, tmp_path))
    edits = f"open({str(script)!r}, 'a').write('# edited')"
    (tmp_path / "brotli.py").write_text(edits, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brotli")
    source = script.read_bytes()
    assert runpy.run_path(str(script))["SOURCE"] == source != script.read_bytes()


def test_another_teacher_than_the_runs_is_refused(trained, run_of, settings, tmp_path):
    """Of the same network, after other steps."""
    path = shutil.copy(trained / "model.int6.ptz", tmp_path)
    run = run_of(settings(distill_from=path))
    run.tokenizer.sha256 = train_gpt.read_artifact(Path(path).read_bytes())[0]["tokenizer"]
    train_gpt.load_teacher(run, None)
    saved = SimpleNamespace(identity={"teacher": run.identity["teacher"]})
    train_gpt.load_teacher(run, saved)
    saved.identity = {"teacher": "0" * 64}
    with pytest.raises(train_gpt.UserError, match="the run began with another teacher"):
        train_gpt.load_teacher(run, saved)
    run.h = settings(distill_from="")  # as DISTILL_FROM=$TEACHER where TEACHER is unset
    saved.settings = {"distill_from": "teacher.ptz"}
    with pytest.raises(train_gpt.UserError, match=r"DISTILL_FROM is empty, .*began with teacher"):
        train_gpt.load_teacher(run, saved)


def test_processes_with_other_data_code_or_settings_are_refused(base, processes, settings):
    """Each node may have a disk and an environment, and so paths of its own, but no teacher."""
    tokenizer = train_gpt.Tokenizer(str(base["TOKENIZER_PATH"]), 512)
    h = settings(data_path=str(base["DATA_PATH"]), distill_from="a.ptz", output_dir="a")
    told, dist = {}, copy.copy(processes)
    dist.broadcast_object = lambda value: told.update(value) or value
    identity = train_gpt.identify(h, tokenizer, dist)
    dist.rank, dist.broadcast_object = 1, lambda _: told
    elsewhere = dataclasses.replace(h, distill_from="b.ptz", output_dir="b")
    assert train_gpt.identify(elsewhere, tokenizer, dist) == identity
    for name in ("shards", "tokenizer", "source", "dtype", "versions", "SEED", "DISTILL_FROM"):
        dist.broadcast_object = lambda _, name=name: told | {name: "0" * 64}
        with pytest.raises(train_gpt.UserError, match=f"process 1 has another {name} than process"):
            train_gpt.identify(h, tokenizer, dist)


def test_the_script_that_runs_counts_although_its_file_changes(
    base, processes, run_of, monkeypatch, tmp_path
):
    (tmp_path / "train_gpt.py").write_text("# edited meanwhile")
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    h = train_gpt.load_settings({}, data_path=str(base["DATA_PATH"]))
    run = run_of(tiny_settings())
    found = train_gpt.identify(h, run.tokenizer, processes)
    assert found["source"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    train_gpt.log_start(run, train_gpt.make_model(run.h))
    assert run.log.lines[0] == SCRIPT.read_text(encoding="utf-8")


def test_an_artifact_is_scored_as_its_run_was(trained, base, others, tmp_path):
    """Beside the results of its run it finds data and tokenizer, too."""
    evaluation = {"EVAL_ONLY": 1, "MODEL_PATH": trained / "model.int6.ptz", "DTYPE": "float32"}
    out = run_well(evaluation)
    assert score(out) == score(log_of(trained))
    window = r"^final_int6_brotli_sliding_window .* length:{0} stride:{1} .* dtype:float32 "
    assert re.search(window.format(32, 8), out, re.M)
    assert f"on {base['DATA_PATH'].resolve()} with" in out
    asked = run_well(evaluation | {"EVAL_SEQ_LEN": 16, "EVAL_STRIDE": 16})
    assert re.search(window.format(16, 16), asked, re.M)
    elsewhere = {"MODEL_PATH": shutil.copy(evaluation["MODEL_PATH"], tmp_path)}
    message = refusal(evaluation | others[0] | elsewhere)
    assert "is not the tokenizer of the artifact; set TOKENIZER_PATH and DATA_PATH" in message


def test_a_run_that_moves_with_its_data_is_still_evaluated(trained, base, tmp_path):
    """Results name the data as seen from their folder; without results the settings do."""
    results = json.loads((trained / "results.json").read_text())
    assert (trained / results["data_path"]).resolve() == base["DATA_PATH"].resolve()
    folder, data = tmp_path / "run", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    paths = {"data_path": "../data", "tokenizer_path": "../data"}
    expected = dict.fromkeys(paths, str(data))
    for content, found in ((results | paths, expected), ([], {}), ({"data_path": 1}, {})):
        (folder / "results.json").write_text(json.dumps(content))
        assert train_gpt.locations_beside(str(folder / "model.int6.ptz")) == found


def test_a_run_without_a_checkpoint_begins_anew_and_says_so(base, runs):
    """The first start opens the log and finds that the text is too short."""
    folder = runs / "twice"
    settings = base | {"RUN_ID": folder.name}
    tall = {"TRAIN_SEQ_LEN": 2**20, "TRAIN_BATCH_TOKENS": 2**20}
    assert "too few training tokens" in refusal(settings | tall)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    for name in (folder.name, "nothing"):
        assert "has no checkpoint" in refusal(settings | {"RUN_ID": name, "RESUME": 1})
    assert "no checkpoint: the run begins anew\n" in run_well(settings)
    assert log_of(folder).startswith(SCRIPT.read_text(encoding="utf-8") + "\nRUN_ID=")
    assert "too few training tokens" in (folder / "train.previous.log").read_text()
    assert (folder / "metrics.previous.jsonl").read_text() == '{"step": 1}\n'


def test_a_line_that_a_crash_has_torn_is_cut(tmp_path):
    """Or what a continued run writes would end it, and nobody could read the line."""
    paths = [tmp_path / name for name in ("train.log", "metrics.jsonl")]
    for path in paths:
        path.write_text('{"step": 2}\n{"step": 3, "tr')
    with train_gpt.RunLog(rank=0) as log:
        log.open(tmp_path)
        log('{"step": 3}')
        log.metrics(step=3)
    for path in paths:
        assert path.read_text() == '{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_terminal_that_closes_stops_a_run_as_sigterm_does(under_nohup, monkeypatch):
    """Unless nohup has asked for the signal to be ignored."""
    handlers = {signal.SIGHUP: signal.SIG_IGN} if under_nohup else {}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    stop = train_gpt.StopSignal()
    stop.install()
    assert handlers.pop(signal.SIGHUP) == (signal.SIG_IGN if under_nohup else stop._handle)
    assert handlers == dict.fromkeys((signal.SIGTERM, signal.SIGINT), stop._handle)


def test_writing_the_finished_checkpoint_counts(data_settings, run_of, monkeypatch):
    """It takes time from the export, and a slow disk puts a run over its time."""
    clock, left = Seconds(), []

    def save(*_):
        clock.now += 6

    def export_best(*given):
        left.append(given[-1])
        return b"", {}

    figures = {"steps": 9, "choice_seconds": 2.0, "train_seconds": 50.0}
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(train_gpt, "train_model", lambda *_: (figures, {"last": {}}))
    monkeypatch.setattr(train_gpt, "log_start", lambda *_: {})
    monkeypatch.setattr(train_gpt, "save_checkpoint", save)
    monkeypatch.setattr(train_gpt, "export_best", export_best)
    _, metrics = train_gpt.train_and_export(run_of(data_settings(max_wallclock_seconds=100)), None)
    assert left == [100 - 50 - 2 - 6]
    assert metrics["export_seconds"] == 2 + 6


@pytest.mark.parametrize(("seconds", "count"), [((100, 5, 5, 5), 3), ((1, 5), 1)])
def test_rank_0_decides_for_all_how_many_candidates_are_exported(
    data_settings, run_of, monkeypatch, seconds, count
):
    """This process alone, which has 12.5 `seconds` and takes none, would export them all."""
    run, answers = run_of(data_settings()), iter(seconds)
    run.dist = copy.copy(run.dist)
    run.dist.broadcast_object = lambda mine: next(answers)
    model = train_gpt.make_model(run.h)
    weights = model.state_dict()
    artifact = train_gpt.Artifact(b"blob", {}, {}, math.nan)
    monkeypatch.setattr(train_gpt, "export", lambda *_: artifact)
    monkeypatch.setattr(train_gpt, "read_artifact", lambda _: ({}, weights))
    monkeypatch.setattr(train_gpt, "evaluate", lambda *_: 1.0)
    candidates = dict.fromkeys(("last", "ema", "swa"), weights)
    data = train_gpt.TrainingData(run.h)
    losses = dict.fromkeys(candidates, math.nan)
    _, metrics = train_gpt.export_best(run, model, data, candidates, losses, 9, 12.5)
    assert sum(name.startswith("holdout_loss_quantized_") for name in metrics) == count


def test_all_processes_write_into_the_folder_that_rank_0_names(settings, processes, tmp_path):
    """Without RUN_ID its name is the time, and clocks differ."""
    dist = copy.copy(processes)
    dist.rank, dist.broadcast_object = 1, lambda value: (tmp_path, None)
    *_, folder = train_gpt.decide_start(settings(), dist, train_gpt.RunLog(1))
    assert folder == tmp_path


@pytest.mark.parametrize("asked", [1, 4, 5, 9])
def test_a_streaming_batch_has_as_many_rows_as_asked_for(asked):
    """But at least one more than what only warms up; 4 rows were warm-up, once at a quarter."""
    batches = train_gpt.streaming_batches(100 * 8, 8, warm=4, per_batch=asked)
    assert {len(batch.starts) for batch in batches} == {max(asked, 5)}
    assert sum(batch.counts.sum() for batch in batches) == 100 * 8


def test_sensitivities_that_are_not_finite_are_refused(settings, processes, monkeypatch):
    """Rows with such a scale would be stored as zeros."""
    model = train_gpt.make_model(settings())
    ruined = {model.embedding.weight: torch.tensor(math.inf)}
    monkeypatch.setattr(train_gpt, "collect_sensitivities", lambda *_: (ruined, {}))
    with pytest.raises(train_gpt.UserError, match=r"sensitivity .* is not finite"):
        train_gpt.calibrate(settings(), model, processes, [tokens(2, 16)], tokens(2, 16))


def test_lost_tokens_and_a_damaged_manifest_are_refused(base, corpus, tmp_path):
    folder = shutil.copytree(corpus.folder, tmp_path / "data")
    told = json.loads((folder / "manifest.json").read_text())
    told["val"]["tokens"] += 1
    for text, problem in ((json.dumps(told), "val tokens, there are"), ("{", "JSONDecodeError")):
        (folder / "manifest.json").write_text(text)
        assert problem in refusal(base | {"DATA_PATH": folder})


def test_losses_of_other_windows_or_another_type_are_not_compared_with_artifacts(
    trained, runs, monkeypatch
):
    """An export compares each candidate's loss before rounding with an artifact's after it."""
    compared = []

    def export_best(run, model, data, candidates, losses, *_):
        compared.append(losses)
        raise train_gpt.UserError("seen")

    monkeypatch.setattr(train_gpt, "export_best", export_best)
    export = {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": trained / "checkpoint.pt", "OUTPUT_DIR": runs}
    for name, changes in (
        ("alike", {}),
        ("short", {"EVAL_SEQ_LEN": 16, "EVAL_STRIDE": 8}),
        ("half", {"DTYPE": "bfloat16"}),
    ):
        assert "seen" in refusal(export | {"RUN_ID": name} | changes)
        assert math.isnan(compared[-1]["last"]) == (name != "alike")


def test_a_teacher_after_training_is_refused_and_a_new_run_says_so(unfinished, runs):
    """No step of training would read it; and a mistyped RUN_ID begins another run."""
    settings = {"RUN_ID": unfinished.name, "OUTPUT_DIR": runs}
    assert "DISTILL_FROM=a.ptz here,  there" in refusal(settings | {"DISTILL_FROM": "a.ptz"})
    assert f"new run: {unfinished}" in log_of(unfinished)


def test_an_export_says_nothing_of_other_windows_and_takes_no_other_run(trained, unfinished, runs):
    export = {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": trained / "checkpoint.pt", "OUTPUT_DIR": runs}
    assert "is an unfinished run" in refusal(export | {"RUN_ID": unfinished.name})
    run_well(export | {"RUN_ID": "windows", "EVAL_SEQ_LEN": 8, "EVAL_STRIDE": 8})
    results = json.loads((runs / "windows" / "results.json").read_text())
    assert results["eval_seq_len"] == 8 and not {"val_bpb_before", "holdout_loss_last"} & {*results}
    warning = "warning: fewer held-out tokens (512) than EVAL_SEQ_LEN: one window"
    assert warning not in log_of(runs / "windows")
    run_well(export | {"RUN_ID": "long", "EVAL_SEQ_LEN": 513, "EVAL_STRIDE": 513})
    assert warning in log_of(runs / "long")


def test_an_export_keeps_the_teacher_of_its_run(trained, settings):
    saved = train_gpt.Checkpoint.read(trained / "checkpoint.pt")
    saved.settings["distill_from"] = "teacher.ptz"
    path = str(trained / "checkpoint.pt")
    for explicit in ({}, {"distill_from": "other.ptz"}):
        h = train_gpt.load_settings({}, export_only=1, checkpoint_path=path, **explicit)
        if explicit:
            with pytest.raises(train_gpt.UserError, match="DISTILL_FROM=other"):
                train_gpt.settings_from_checkpoint(h, saved)
        else:
            assert train_gpt.settings_from_checkpoint(h, saved).distill_from == "teacher.ptz"
