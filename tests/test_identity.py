"""A run keeps its data, tokenizer, code and windows, or says what changed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import re
import shutil
import signal
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
    read_shard,
    refusal,
    run_well,
    tiny_settings,
    write_shard,
)

SCORE = r"^final_int6_brotli_sliding_window_exact .*$"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


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
def other_tokenizer(corpus, tmp_path_factory) -> dict:
    """Settings of the same shards without their manifest, and of another tokenizer of this size."""
    folder = tmp_path_factory.mktemp("other") / "data"
    shutil.copytree(corpus.folder, folder, ignore=shutil.ignore_patterns("manifest.json"))
    path = folder / "other.model"
    path.write_bytes(corpus.tokenizer.read_bytes().replace(b"ing", b"gni"))
    return {"DATA_PATH": folder, "TOKENIZER_PATH": path}


@pytest.fixture(scope="module")
def grown(corpus, tmp_path_factory) -> dict:
    """Settings of the same data after one more shard has been downloaded."""
    folder = shutil.copytree(corpus.folder, tmp_path_factory.mktemp("grown") / "data")
    tokens = read_shard(corpus.folder / "fineweb_train_000000.bin")
    write_shard(folder / "fineweb_train_000001.bin", tokens[:5000])
    return {"DATA_PATH": folder, "TOKENIZER_PATH": corpus.tokenizer}


def score(text: str) -> str:
    (line,) = re.findall(SCORE, text, re.M)
    return line


@pytest.mark.parametrize("export", [True, False])
def test_another_tokenizer_and_other_data_than_the_runs_are_refused(
    trained, unfinished, base, other_tokenizer, grown, export
):
    """A tokenizer of the same size; one more shard, which would move sequences to the hold-out."""
    for changes, name, what in (
        (other_tokenizer, "TOKENIZER_PATH", "the tokenizer there"),
        (grown, "DATA_PATH", "the shards there are not"),
    ):
        settings = base | {"RUN_ID": unfinished.name} | changes
        if export:
            path = trained / "checkpoint.pt"
            settings |= {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": path, "RUN_ID": name}
        message = refusal(settings)
        assert f"{name}={changes[name]}: {what}" in message
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
    out = run_well(export | {"ARTIFACT_LIMIT_BYTES": 16_000_000})
    assert score(out) == score(log_of(trained))
    artifacts = [folder / "model.int6.ptz" for folder in (stale.parent, trained)]
    assert artifacts[0].read_bytes() == artifacts[1].read_bytes()
    kept = train_gpt.Checkpoint.read(stale)
    for name, values in train_gpt.Checkpoint.read(path).weights.items():
        assert torch.equal(kept.weights[name], values), name


def test_a_continued_run_takes_its_own_data_and_names_an_edited_script(unfinished, runs):
    """It is told no path; what wrote the checkpoint was another script and other processes."""
    for name in ("edited", "same"):
        path = shutil.copytree(unfinished, runs / name) / "checkpoint.pt"
        if name == "edited":
            saved = torch.load(path, weights_only=True)
            saved["identity"] |= {"source": "0" * 64, "processes": "2"}
            torch.save(saved, path)
        again = {"RUN_ID": name, "OUTPUT_DIR": runs, "ARTIFACT_LIMIT_BYTES": 16_000_000}
        out = run_well(again)
        for warning in (
            "warning: the script has changed since the checkpoint was written",
            "warning: the run began with processes 2, it goes on with 1",
        ):
            assert (warning in out) == (name == "edited")


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
    other = dataclasses.replace(h, distill_from="b.ptz", output_dir="b")
    told = {}
    dist = copy.copy(processes)
    dist.broadcast_object = lambda value: told.update(value) or value
    identity = train_gpt.identify(h, tokenizer, dist)
    dist.rank = 1
    for name in (
        None,
        "shards",
        "tokenizer",
        "source",
        "dtype",
        "versions",
        "SEED",
        "DISTILL_FROM",
    ):
        dist.broadcast_object = lambda _, name=name: told | ({name: "0" * 64} if name else {})
        if not name:
            assert train_gpt.identify(other, tokenizer, dist) == identity
            continue
        with pytest.raises(train_gpt.UserError, match=f"process 1 has another {name} than process"):
            train_gpt.identify(h, tokenizer, dist)


def test_the_script_that_runs_is_logged_although_its_file_changes(
    base, processes, run_of, monkeypatch, tmp_path
):
    (tmp_path / "train_gpt.py").write_text("# edited meanwhile")
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    h = train_gpt.load_settings({}, data_path=str(base["DATA_PATH"]))
    found = train_gpt.identify(h, run_of(h).tokenizer, processes)
    assert found["source"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    run = run_of(tiny_settings())
    train_gpt.log_start(run, train_gpt.make_model(run.h))
    assert run.log.lines[0] == SCRIPT.read_text(encoding="utf-8")


def test_a_damaged_checkpoint_does_not_replace_the_one_before(unfinished, runs, base):
    """It is named, and the next ones that are saved leave a good one before them."""
    folder = shutil.copytree(unfinished, runs / "damaged")
    newest, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    shutil.copy(newest, previous)
    newest.write_bytes(b"a part of it")
    out = run_well(base | {"RUN_ID": "damaged", "ARTIFACT_LIMIT_BYTES": 16_000_000})
    assert f"warning: the checkpoint {newest} cannot be used" in out
    assert (folder / "checkpoint.damaged.pt").read_bytes() == b"a part of it"
    for path in (newest, previous):
        assert train_gpt.Checkpoint.read(path).finished


def test_an_artifact_is_scored_as_its_run_was(trained, base):
    """Beside the results of its run it finds data and tokenizer, too."""
    evaluation = {"EVAL_ONLY": 1, "MODEL_PATH": trained / "model.int6.ptz", "DTYPE": "float32"}
    out = run_well(evaluation)
    assert score(out) == score(log_of(trained))
    assert re.search(r"^final_int6_brotli_sliding_window .* length:32 stride:8 ", out, re.M)
    assert len(re.findall(r"^final_int6_.* dtype:float32 ", out, re.M)) == 2
    assert f"on {base['DATA_PATH'].resolve()} with" in out
    asked = run_well(evaluation | {"EVAL_SEQ_LEN": 16, "EVAL_STRIDE": 16})
    assert re.search(r"^final_int6_brotli_sliding_window .* length:16 stride:16 ", asked, re.M)


def test_a_run_that_moves_with_its_data_is_still_evaluated(trained, base, tmp_path):
    """Results name the data as seen from their folder; without results the settings do."""
    results = json.loads((trained / "results.json").read_text())
    assert (trained / results["data_path"]).resolve() == base["DATA_PATH"].resolve()
    folder, data = tmp_path / "run", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    (data / "it.model").touch()
    moved = results | {"data_path": "../data", "tokenizer_path": "../data/it.model"}
    found = []
    for content in (moved, [], {"data_path": 1, "tokenizer_path": 2}):
        (folder / "results.json").write_text(json.dumps(content))
        found.append(train_gpt.locations_beside(str(folder / "model.int6.ptz")))
    expected = {"data_path": str(data), "tokenizer_path": str(data / "it.model")}
    assert found == [expected, {}, {}]


def test_an_artifact_elsewhere_says_which_paths_it_needs(trained, other_tokenizer, tmp_path):
    path = shutil.copy(trained / "model.int6.ptz", tmp_path)
    evaluation = {"EVAL_ONLY": 1, "MODEL_PATH": path, "EVAL_BATCH_TOKENS": 1024}
    message = refusal(evaluation | other_tokenizer)
    assert "is not the tokenizer of the artifact; set TOKENIZER_PATH and DATA_PATH" in message


def test_a_run_without_a_checkpoint_begins_anew_and_says_so(base, runs):
    """The first start opens the log and finds that the text is too short."""
    folder = runs / "twice"
    settings = base | {"RUN_ID": folder.name}
    tall = {"TRAIN_SEQ_LEN": 2**20, "TRAIN_BATCH_TOKENS": 2**20}
    assert "too few training tokens" in refusal(settings | tall)
    assert "too few training tokens" in log_of(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    for name in (folder.name, "nothing"):
        assert "has no checkpoint" in refusal(settings | {"RUN_ID": name, "RESUME": 1})
    assert "no checkpoint: the run begins anew\n" in run_well(settings)
    source, found, _ = log_of(folder).partition("\nRUN_ID=")
    assert found and source == SCRIPT.read_text(encoding="utf-8")
    assert "too few training tokens" in (folder / "train.previous.log").read_text()
    assert (folder / "metrics.previous.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("torn", ["", '{"step": 3, "tr', "half a line"])
def test_a_line_that_a_crash_has_torn_is_cut(torn, tmp_path):
    """Or what a continued run writes would end it, and nobody could read the line."""
    paths = [tmp_path / name for name in ("train.log", "metrics.jsonl")]
    for path in paths:
        path.write_text(f'{{"step": 2}}\n{torn}')
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
        clock.now += 5
        return b"", {}

    figures = {"steps": 9, "choice_seconds": 2.0, "train_seconds": 50.0}
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(train_gpt, "train_model", lambda *_: (figures, {"last": {}}))
    monkeypatch.setattr(train_gpt, "log_start", lambda *_: {})
    monkeypatch.setattr(train_gpt, "save_checkpoint", save)
    monkeypatch.setattr(train_gpt, "export_best", export_best)
    run = run_of(data_settings(max_wallclock_seconds=100))
    _, metrics = train_gpt.train_and_export(run, None)
    assert left == [100 - 50 - 2 - 6]
    assert metrics["export_seconds"] == 2 + 6 + 5


@pytest.mark.parametrize(("rank0", "count"), [((), 2), ((100, 5, 5, 5), 3), ((1, 5), 1)])
def test_rank_0_decides_for_all_how_many_candidates_are_exported(
    data_settings, run_of, monkeypatch, rank0, count
):
    """This process alone would export two, of 5 seconds each, in 12.5; `rank0` are its seconds."""
    clock, answers, run = Seconds(), iter(rank0), run_of(data_settings())
    if rank0:
        run.dist = copy.copy(run.dist)
        run.dist.sync_from_rank0 = lambda *mine: ([next(answers) for _ in mine], False)

    def export(*_):
        clock.now += 5
        return train_gpt.Artifact(b"blob", {}, {}, math.nan)

    model = train_gpt.make_model(run.h)
    weights = model.state_dict()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(train_gpt, "export", export)
    monkeypatch.setattr(train_gpt, "read_artifact", lambda _: ({}, weights))
    monkeypatch.setattr(train_gpt, "evaluate", lambda *_: 1.0)
    candidates = dict.fromkeys(("last", "ema", "swa"), weights)
    data = train_gpt.TrainingData(run.h)
    _, metrics = train_gpt.export_best(run, model, data, candidates, 9, 12.5)
    assert sum(name.startswith("holdout_loss_quantized_") for name in metrics) == count


def test_all_processes_write_into_the_folder_that_rank_0_names(settings, processes, tmp_path):
    """Without RUN_ID its name is the time, and clocks differ."""
    dist = copy.copy(processes)
    dist.rank, dist.broadcast_object = 1, lambda value: (tmp_path, None)
    *_, folder = train_gpt.decide_start(settings(), dist, train_gpt.RunLog(1))
    assert folder == tmp_path


@pytest.mark.parametrize("signs", ["bigram.signs=rademacher", "bigram.signs.current=none"])
def test_a_basis_of_the_signs_alone_is_refused(signs, settings):
    """Every other map would be learned in silence."""
    with pytest.raises(train_gpt.UserError, match=f"write learned,{signs} or orthogonal,{signs}"):
        settings(map_basis=signs, map_adapter="none")
    assert settings(map_basis="mlp=orthogonal").map_basis == "mlp=orthogonal"


@pytest.mark.parametrize("asked", [1, 4, 5, 9])
def test_a_streaming_batch_has_as_many_rows_as_asked_for(asked):
    """But at least one more than what only warms up; 4 rows were warm-up, once at a quarter."""
    batches = train_gpt.streaming_batches(100 * 8, 8, warm=4, per_batch=asked)
    assert {len(batch.starts) for batch in batches} == {max(asked, 5)}
    assert sum(batch.counts.sum() for batch in batches) == 100 * 8


def test_sensitivities_that_are_not_finite_are_refused(data_settings, run_of, monkeypatch):
    """Rows with such a scale would be stored as zeros."""
    h = data_settings()
    collect = train_gpt.collect_sensitivities

    def ruined(*arguments):
        rows, tables = collect(*arguments)
        next(iter(rows.values()))[0] = math.inf
        return rows, tables

    monkeypatch.setattr(train_gpt, "collect_sensitivities", ruined)
    with pytest.raises(train_gpt.UserError, match=r"sensitivity .* is not finite"):
        train_gpt.export(run_of(h), train_gpt.make_model(h), train_gpt.TrainingData(h), 0)


def test_lost_tokens_and_a_damaged_manifest_are_refused(base, corpus, tmp_path):
    folder = shutil.copytree(corpus.folder, tmp_path / "data")
    told = json.loads((folder / "manifest.json").read_text())
    told["val"]["tokens"] += 1
    for text, problem in ((json.dumps(told), "val tokens, there are"), ("{", "JSONDecodeError")):
        (folder / "manifest.json").write_text(text)
        assert problem in refusal(base | {"DATA_PATH": folder})


def test_an_export_says_nothing_of_other_windows_and_takes_no_other_run(trained, unfinished, runs):
    export = {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": trained / "checkpoint.pt", "OUTPUT_DIR": runs}
    assert "is an unfinished run" in refusal(export | {"RUN_ID": unfinished.name})
    run_well(export | {"RUN_ID": "windows", "EVAL_SEQ_LEN": 8, "EVAL_STRIDE": 8})
    results = json.loads((runs / "windows" / "results.json").read_text())
    assert results["eval_seq_len"] == 8 and not {"val_bpb_before", "holdout_loss_last"} & {*results}


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
