"""Tests of the whole job as a person runs it, with a tiny model on the CPU."""

from __future__ import annotations

import functools
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

import train_gpt
from helpers import (
    ONE_LAYER,
    SCRIPT,
    TINY,
    TWO_PROCESSES,
    log_of,
    metrics_of,
    read_shard,
    refusal,
    results_of,
    run_well,
    tiny_settings,
    write_shard,
)

LOSSES = r"^step:(\d+)/20 train_loss:\d+\.\d+ train_time:\d+ms step_avg:\d+\.\d+ms$"
VALIDATIONS = r"^step:(\d+)/20 val_loss:\d+\.\d+ val_bpb:\d+\.\d+"
# A loss is the mean of sums of at most 512 terms (the vocabulary) in some ten operations, each
# rounded to float32. In another order such a sum differs by 6e-8 · sqrt(512) of its size, about 6.
REORDERED = 1e-4
FINAL = r"^final_int6_brotli_{}_exact val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)$"


@pytest.fixture(scope="module")
def base(corpus, runs) -> dict:
    """Settings of the run that others are compared with: half of it trains quantized weights."""
    own = {"OUTPUT_DIR": runs, "RUN_ID": "base", "SEED": 42}
    return {**TINY, **corpus.settings, **own, "LATE_QAT_THRESHOLD": 1, "VAL_LOSS_EVERY": 10}


@pytest.fixture(scope="module")
def trained(base, runs) -> Path:
    """The folder of that run. The published names say what `base` says."""
    published = {"USE_RANDOM_ADAPTERS": 1, "RANDOM_ADAPTER_RANK": 4}
    run_well(base | published | {"NGRAM_EVAL": 0, "KNN_LAMBDA": 0})
    return runs / "base"


def values_of(folder: Path, name: str) -> list:
    return list(metrics_of(folder, name).values())


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


def test_log_and_metrics_have_what_others_look_for(trained):
    text, losses = log_of(trained), values_of(trained, "train_loss")
    assert len(losses) == 20
    assert losses[0] == pytest.approx(math.log(512), abs=0.1)  # nothing is known at first
    assert re.findall(LOSSES, text, re.M) == [str(step) for step in range(1, 21)]
    assert re.findall(VALIDATIONS, text, re.M) == ["10", "20"]
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
    rows = results_of(trained)["maps"]
    assert train_gpt.describe_rows(rows) in text
    table = train_gpt.build_map_table(tiny_settings())
    assert {row["name"]: row["seed"] for row in rows} == {n: s.seed for n, s in table.items()}
    random = {name for name, spec in table.items() if spec.is_random}
    assert set(values_of(trained, "adapter_ratios")[-1]) == random


def test_results_agree_with_the_log_and_the_files(trained, base):
    results = results_of(trained)
    assert (results["val_loss"], results["val_bpb"]) == pytest.approx(final(log_of(trained)))
    assert results["bytes_code"] == train_gpt.code_bytes() < results["bytes_code_readable"]
    assert results["bytes_code_readable"] == SCRIPT.stat().st_size
    assert results["bytes_model"] == len(artifact_of(trained))
    assert results["bytes_total"] == results["bytes_code"] + results["bytes_model"]
    assert results["dataset"] == base["DATA_PATH"].name
    assert (results["seed"], results["steps"]) == (42, 20)
    assert results["hardware"].startswith("1 x ")
    assert (results["settings"]["SEED"], results["settings"]["NUM_LAYERS"]) == (42, 4)
    assert "ROPE_BASE" not in results["settings"], "it has its default"
    assert results["versions"]["torch"] == torch.__version__
    before = contents(trained)
    assert "choose a new RUN_ID" in refusal(base)
    assert contents(trained) == before


def test_same_seed_gives_the_same_bytes(trained, base, runs):
    """Of two interpreters: each has an order of its own for a set of strings."""
    run_well(base | {"RUN_ID": "again"}, fresh=True)
    assert artifact_of(runs / "again") == artifact_of(trained)
    assert values_of(runs / "again", "train_loss") == values_of(trained, "train_loss")


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
    logs = [log_of(runs / "other"), log_of(trained)]
    choices = [re.findall(r"^average .*$", log, re.M) for log in logs]
    assert choices[0] == choices[1] != []
    assert final(logs[0]) != final(logs[1])


def test_artifact_alone_repeats_the_score(trained, corpus, tmp_path):
    """An evaluator sets where things lie; the artifact describes the model."""
    script = Path(shutil.copy(SCRIPT, tmp_path))
    artifact = shutil.copy(trained / "model.int6.ptz", tmp_path)
    shutil.copy(corpus.folder / "fineweb_val_000000.bin", tmp_path)
    before = set(tmp_path.iterdir())
    places = {"MODEL_PATH": artifact, "TOKENIZER_PATH": corpus.tokenizer, "DATA_PATH": tmp_path}
    settings = {"EVAL_ONLY": 1, "DTYPE": "float32", **places}
    out = run_well(settings, script=script, cwd=tmp_path)
    for kind in ("sliding_window", "roundtrip"):
        assert final(out, kind) == pytest.approx(final(log_of(trained), kind), abs=1e-6)
    assert set(tmp_path.iterdir()) == before, "an evaluation writes nothing"
    # Settings that say the same in other words are accepted.
    same = {"VE_LAYERS": "-2,-1", "USE_RANDOM_ADAPTERS": 1, "RANDOM_ADAPTER_SEED": "0x3039"}
    out = run_well(settings | same | {"EVAL_MODE": "streaming"})
    modes = dict(re.findall(r"final_int6_brotli_(\w+) .* mode:(\w+)", out))
    assert modes == {"roundtrip": "exact", "sliding_window": "streaming"}


def test_another_model_or_training_than_was_asked_for_is_refused(trained, runs):
    """Whoever sets a variable of the model expects it to hold; so do the published names for it."""
    others = {"NUM_LAYERS": 12, "RANDOM_ADAPTER_RANK": 8, "EMA_DECAY": 0.5}
    for task, path, name in (
        ("EVAL_ONLY", "MODEL_PATH", "model.int6.ptz"),
        ("EXPORT_ONLY", "CHECKPOINT_PATH", "checkpoint.pt"),
    ):
        place = {path: trained / name, "OUTPUT_DIR": runs, "RUN_ID": "no"}
        message = refusal({task: 1} | place | others)
        assert f"{path}={trained / name} has other settings" in message
        assert f"NUM_LAYERS=12 here, {TINY['NUM_LAYERS']} there" in message
        assert "MAP_ADAPTER=lora:8 here, lora:4 there" in message
        assert ("EMA_DECAY=0.5 here" in message) == (task == "EXPORT_ONLY")
        assert "MODEL_DIM" not in message, "nobody asked for it"
    assert not (runs / "no").exists()


def test_two_processes_train_as_one(base, runs):
    # Late QAT would round last bits to other codes.
    settings = base | {"LATE_QAT_THRESHOLD": 0, "ITERATIONS": 10}
    run_well(settings | {"RUN_ID": "one"})
    run_well(settings | {"RUN_ID": "two"}, launcher=TWO_PROCESSES)
    ours, theirs = runs / "two", runs / "one"
    assert results_of(ours)["hardware"].startswith("2 x ")
    for name in ("train_loss", "grad_norm"):  # of the first step: sums in another order
        first, expected = values_of(ours, name)[0], values_of(theirs, name)[0]
        assert first == pytest.approx(expected, rel=REORDERED)
    losses, expected = values_of(ours, "train_loss"), values_of(theirs, "train_loss")
    assert losses == pytest.approx(expected, abs=1e-3)
    # AdamW divides a gradient by its own size, so that rounding may move a weight whose gradient is
    # nearly zero as far as any other. Few are such: the median must agree to a part of a step.
    weights, expected = weights_of(ours), weights_of(theirs)
    for name, weight in expected.items():
        assert (weights[name] - weight).abs().median() < 0.01 * tiny_settings().matrix_lr, name


def test_artifact_over_the_limit_is_refused_and_the_weights_stay(trained, base, runs):
    """The same RUN_ID tries again, also in its own type and in smaller batches."""
    settings, folder = base | {"RUN_ID": "large"}, runs / "large"
    message = refusal(settings | {"ARTIFACT_LIMIT_BYTES": 1000})
    size = train_gpt.code_bytes() + len(artifact_of(trained))
    for word in (f"{size:,} bytes", "1,000", "EXPORT_ONLY=1 CHECKPOINT_PATH", "TARGET_BYTES"):
        assert word in message
    assert not (folder / "model.int6.ptz").exists() and not (folder / "results.json").exists()
    before = contents(folder, "checkpoint*")
    del settings["DTYPE"]
    batches = {"MICRO_BATCH_TOKENS": 32, "EVAL_BATCH_TOKENS": 64}
    out = run_well(settings | batches | {"ARTIFACT_LIMIT_BYTES": 16_000_000})
    assert final(out) == pytest.approx(final(log_of(trained)), abs=REORDERED)
    # Trying the export again writes no checkpoint: it would push out the training's last ones.
    assert contents(folder, "checkpoint*") == before


def test_a_console_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    """`bash run.sh | tee log`: Ctrl-C ends tee, too, before the run has saved."""

    def write(*_):
        raise BrokenPipeError

    monkeypatch.setattr("sys.stdout.write", write)
    with train_gpt.RunLog(rank=0) as log:
        log.open(tmp_path)
        log("a line")
    assert log_of(tmp_path) == "a line\n"


def test_master_weights_are_float32_under_bfloat16(base, runs):
    """Small updates of bfloat16 weights are rounded away: no master may pass through that type."""
    run_well(base | ONE_LAYER | {"RUN_ID": "bfloat16", "DTYPE": "bfloat16"})
    losses = values_of(runs / "bfloat16", "train_loss")
    assert np.mean(losses[-5:]) < losses[0] - 0.8
    weights = weights_of(runs / "bfloat16")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for name, weight in weights.items():
        assert weight.numel() < 8 or not torch.equal(weight, weight.bfloat16().float()), name


def test_nothing_compiles_in_the_timed_region(base, monkeypatch):
    """Validation and quantized training reuse the graph that the warm-up has compiled."""

    def backend(graph, inputs):  # the graphs, without the minutes of making code of them
        print("compiled", "training" if torch.is_grad_enabled() else "evaluation")
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    batches = {"MICRO_BATCH_TOKENS": 64, "EVAL_BATCH_TOKENS": 128, "VAL_LOSS_EVERY": 5}
    out = run_well(base | ONE_LAYER | batches | {"COMPILE": 1, "RUN_ID": "compiled"})
    before, after = out.split("compiled training\n")  # it is there once
    assert "\nstep:" not in before and "\nlate_qat:on step:11" in after
    assert "compiled evaluation\n" in out
    torch._dynamo.reset()


def test_compiled_gradients_of_embeddings_add_up_in_order(monkeypatch):
    """Inductor would add by atomic operations, whose order and so last bits differ in each run."""
    from torch._inductor.decomposition import decompositions

    operator = torch.ops.aten.embedding_dense_backward.default
    monkeypatch.setitem(decompositions, operator, core_aten_decompositions()[operator])
    with train_gpt.Distributed(tiny_settings(compile="1")):
        traced = make_fx(operator, decomposition_table=decompositions)
        graph = traced(torch.ones(64, 4), torch.zeros(64, dtype=torch.int64), 8, -1, False)
    assert "embedding_dense_backward" in graph.code and "index_put" not in graph.code
