"""Tests of the whole job as a person runs it, with a tiny model on the CPU."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import shlex
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd

import train_gpt
from helpers import (
    ALIASES,
    MODEL_SETTINGS,
    ONE_LAYER,
    SCRIPT,
    TINY,
    TWO_PROCESSES,
    Seconds,
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
# A loss is the mean of sums of at most 512 terms (the vocabulary) in some ten operations, each
# rounded to float32. In another order such a sum differs by 6e-8 · sqrt(512) of its size, about 6.
REORDERED = 1e-4
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


def metrics_of(folder: Path, name: str) -> list[float]:
    """Return what metrics.jsonl has of each step, in all its digits."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


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


def test_metrics_have_every_logged_step_and_the_adapters(trained):
    assert len(metrics_of(trained, "train_loss")) == 20
    assert metrics_of(trained, "val_bpb")[-1] > 0
    table = train_gpt.build_map_table(tiny_settings()).values()
    random = {spec.name for spec in table if spec.is_random}
    assert set(metrics_of(trained, "adapter_ratios")[-1]) == random
    assert "data_stalls:" in log_of(trained)


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
    rows = results_of(trained)["maps"]
    assert train_gpt.describe_rows(rows) in text
    table = train_gpt.build_map_table(tiny_settings())
    assert {row["name"]: row["seed"] for row in rows} == {
        name: spec.seed for name, spec in table.items()
    }


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
    assert (results["settings"]["SEED"], results["settings"]["NUM_LAYERS"]) == (42, 4)
    assert "ROPE_BASE" not in results["settings"], "it has its default"
    assert results["versions"]["torch"] == torch.__version__


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


@pytest.mark.parametrize("task", ["evaluation", "export"])
def test_another_model_than_was_asked_for_is_refused(trained, eval_only, base, runs, task):
    """Whoever sets a variable of the model expects it to hold; so do the published names for it."""
    model, checkpoint = trained / "model.int6.ptz", trained / "checkpoint.pt"
    places = {name: base[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "OUTPUT_DIR")}
    export = places | {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": checkpoint, "RUN_ID": "no"}
    settings, source = {
        "evaluation": (eval_only, f"MODEL_PATH={model}"),
        "export": (export, f"CHECKPOINT_PATH={checkpoint}"),
    }[task]
    others = {"NUM_LAYERS": 12, "LOGIT_SOFTCAP": 10, "RANDOM_ADAPTER_RANK": 8, "MAP_SEED": 7}
    message = refusal(settings | others)
    for part in (
        f"{source} has other settings",
        f"NUM_LAYERS=12 here, {TINY['NUM_LAYERS']} there",
        "LOGIT_SOFTCAP=10.0 here, 30.0 there",
        "MAP_ADAPTER=lora:8 here, lora:4 there",
        "MAP_SEED=7 here, 12345 there",
    ):
        assert part in message
    assert "MODEL_DIM" not in message, "it is as stored, or nobody asked for it"
    assert not (runs / "no").exists()


@pytest.mark.parametrize(
    "asked",
    [
        {"NUM_LAYERS": 4, "VE_LAYERS": "-2,-1", "MATRIX_LR": 1.0},
        {"MAP_ADAPTER": "lora:4", "MAP_SEED": "0x3039"},
        {"RANDOM_ADAPTER_RANK": 4, "RANDOM_ADAPTER_SEED": "0x3039"},
        {"USE_RANDOM_ADAPTERS": 1},
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
    assert final(out) == pytest.approx(final(log_of(trained)), abs=REORDERED)


def test_log_says_how_each_figure_was_scored(eval_only):
    """The roundtrip has one window after the other in either mode."""
    out = run_well(eval_only | {"EVAL_MODE": "streaming"})
    modes = dict(re.findall(r"final_int6_brotli_(\w+) .* mode:(\w+)", out))
    assert modes == {"roundtrip": "exact", "sliding_window": "streaming"}


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


# ---- Several processes -------------------------------------------------------------------------


# Two machines of one process each, as far as one can be two. They meet by a file: a port that is
# free now may be taken a moment later.
TWO_MACHINES = (
    "-m",
    "torch.distributed.run",
    "--nnodes=2",
    "--nproc_per_node=1",
    "--rdzv-backend=c10d",
    "--rdzv-conf=store_type=file",
    "--local-addr=127.0.0.1",
)


@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_train_as_one(base, runs, one, machines, tmp_path):
    settings = one | {"RUN_ID": f"two{machines}"}
    meeting = f"--rdzv-endpoint={tmp_path / 'rendezvous'}"
    launcher = TWO_PROCESSES if machines == 1 else (*TWO_MACHINES, meeting)
    processes = [start(settings, launcher) for _ in range(machines)]
    for result in [finish(process) for process in processes]:
        assert result.returncode == 0, result.stdout + result.stderr
    ours, theirs = runs / settings["RUN_ID"], runs / one["RUN_ID"]
    assert results_of(ours)["hardware"].startswith("2 x ")
    for name in ("train_loss", "grad_norm"):  # of the first step: sums in another order
        first, expected = metrics_of(ours, name)[0], metrics_of(theirs, name)[0]
        assert first == pytest.approx(expected, rel=REORDERED)
    losses, expected = metrics_of(ours, "train_loss"), metrics_of(theirs, "train_loss")
    assert losses == pytest.approx(expected, abs=1e-3)
    # AdamW divides a gradient by its own size, so that rounding may move a weight whose gradient is
    # nearly zero as far as any other. Few are such: the median must agree to a part of a step.
    weights, expected = weights_of(ours), weights_of(theirs)
    for name, weight in expected.items():
        assert (weights[name] - weight).abs().median() < 0.01 * tiny_settings().matrix_lr, name


@pytest.fixture(scope="module")
def one(base, runs) -> dict:
    """Settings of a run of one process. Late QAT would round last bits to other codes."""
    settings = base | {"RUN_ID": "one", "LATE_QAT_THRESHOLD": 0}
    run_well(settings)
    return settings


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
    assert final(out) == pytest.approx(final(log_of(trained)), abs=REORDERED)
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


# ---- Other configurations ----------------------------------------------------------------------


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


@pytest.fixture
def dynamo():
    """Begin and end without compiled graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_nothing_compiles_in_the_timed_region(base, dynamo, monkeypatch):
    """Warm-up compiles the step.

    Its undoing, validation and quantized training then reuse that one graph.
    """

    def backend(graph, inputs):  # the graphs, without the minutes of making code of them
        print("compiled", "training" if torch.is_grad_enabled() else "evaluation")
        return graph.forward

    small = base | ONE_LAYER
    eager = run_well(small | {"RUN_ID": "eager"})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    settings = small | {
        "COMPILE": 1,
        "WARMUP_STEPS": 2,
        "RUN_ID": "compiled",
        "MICRO_BATCH_TOKENS": 64,
        "EVAL_BATCH_TOKENS": 128,
        "VAL_LOSS_EVERY": 5,
    }
    out = run_well(settings)
    lines = out.splitlines()
    (compiled,) = [i for i, line in enumerate(lines) if line == "compiled training"]
    assert "compiled evaluation" in lines
    assert not any(line.startswith("step:") for line in lines[:compiled])
    assert "late_qat:on step:11" in out
    losses, expected = losses_of(out), losses_of(eager)
    assert losses[:11] == pytest.approx(expected[:11], abs=1e-3)
    assert losses == pytest.approx(expected, abs=1e-2)  # other codes where a last bit differs


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_compiled_gradients_of_embeddings_add_up_in_order(dynamo, monkeypatch):
    """Inductor would add by atomic operations, whose order and so last bits differ in each run."""
    from torch._inductor.decomposition import decompositions

    operator, traced = torch.ops.aten.embedding_dense_backward.default, []
    monkeypatch.setitem(decompositions, operator, core_aten_decompositions()[operator])

    def keep(graph, inputs):  # what inductor gets, without the minutes of making code of it
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with train_gpt.Distributed(tiny_settings(compile="1")):
        backend = aot_autograd(fw_compiler=keep, decompositions=decompositions)
        embedding = train_gpt.Embedding(8, 4, 1.0, torch.bfloat16)
        compiled = torch.compile(embedding, backend=backend, fullgraph=True)
        compiled(torch.randint(8, (64,))).float().sum().backward()
    assert any("embedding_dense_backward" in name for name in traced)
    assert not any("index_put" in name for name in traced)


# ---- Time ----------------------------------------------------------------------------------------


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


def test_the_reserve_grows_with_what_the_export_takes(processes, capsys):
    h = tiny_settings(max_wallclock_seconds=100, gptq_reserve_seconds=10)
    run = train_gpt.Run(h, processes, train_gpt.RunLog(0), train_gpt.StopSignal(), None, None)
    assert train_gpt.reserve_for_export(run, 1.0) == 10
    assert train_gpt.reserve_for_export(run, 40.0) == 50
    assert "50.0 s are kept for it" in capsys.readouterr().out


class SlowDisk:
    """Stands for the thread that reads: each answer comes a quarter of a second late."""

    def __init__(self, seconds: Seconds) -> None:
        self.seconds = seconds

    def submit(self, read, *given):
        def result():
            self.seconds.now += 0.25
            return read(*given)

        return SimpleNamespace(result=result)


def test_slow_data_is_counted_and_changes_nothing(data_settings, processes, monkeypatch):
    data = train_gpt.TrainingData(data_settings())
    expected = [data.micro_batches(step, processes) for step in range(3)]
    seconds = Seconds()
    monkeypatch.setattr(time, "perf_counter", seconds)
    loader = train_gpt.BatchLoader(data, processes)
    loader.close()
    loader.pool = SlowDisk(seconds)
    for step, batches in enumerate(expected):
        for found, wanted in zip(loader.micro_batches(step), batches, strict=True):
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert loader.stalls == 2  # the first step has nothing to be read ahead of
    assert loader.stall_seconds == 0.5
