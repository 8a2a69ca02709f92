"""The whole job as a person runs it: real processes, a tiny model, loopback where there are several."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import (
    FIELDS,
    MODEL_SETTINGS,
    PUBLISHED,
    ROOT,
    SCRIPT,
    TINY,
    environment,
    finish,
    make_corpus,
    read_shard,
    refusal,
    run_well,
    start,
    train_gpt,
    write_shard,
)

TORCHRUN = ("-m", "torch.distributed.run")
LOSSES = re.compile(
    r"^step:(\d+)/(\d+) train_loss:(\d+\.\d+) train_time:\d+ms step_avg:\d+\.\d+ms$", re.M
)
VALIDATIONS = re.compile(r"^step:(\d+)/(\d+) val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)", re.M)
FINAL = r"^final_int6_(brotli|lzma)_{}_exact val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)$"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that the runs of this file lie in."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(corpus, runs) -> dict:
    """Settings of the run that others are compared with: half of it trains quantised weights."""
    return {
        **TINY,
        **corpus.settings,
        "OUTPUT_DIR": runs,
        "RUN_ID": "base",
        "LATE_QAT_THRESHOLD": 1,
        "VAL_LOSS_EVERY": 10,
        "SEED": 42,
        "AUTHOR": "A. Person",
        "GITHUB_ID": "aperson",
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


def losses_of(text: str) -> list[float]:
    return [float(found[3]) for found in LOSSES.finditer(text)]


def final(text: str, kind: str = "sliding_window") -> tuple[float, float]:
    """(val_loss, val_bpb) of the last lines of a log or a console."""
    (found,) = re.finditer(FINAL.format(kind), text, re.M)
    return float(found[2]), float(found[3])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


# ---- One run -----------------------------------------------------------------------------------------------


def test_run_leaves_its_four_files(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "checkpoint.pt",
        "model.int6.ptz",
        "submission.json",
        "train.log",
    ]


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
        assert re.search(
            rf"^final_int6_\w+_{kind} val_loss:{loss:.4f} val_bpb:{bpb:.4f} ", text, re.M
        )
    assert final(text, "roundtrip") != final(text)  # windows that overlap score differently
    assert "late_qat:on step:11" in text


def test_log_holds_all_that_the_run_depends_on(trained, base):
    text = log_of(trained)
    assert SCRIPT.read_text(encoding="utf-8") in text
    logged = dict(re.findall(r"^([A-Z][A-Z0-9_]+)=(.*)$", text, re.M))
    for f in FIELDS:
        expected = type(f.default)(base.get(f.name.upper(), f.default))
        assert logged[f.name.upper()] == str(expected), f.name
    row = r"^(blocks\.\S+) +\d+x\d+ +1·orthogonal +(\d+) lora:4 "
    kinds = re.findall(row, text, re.M)
    rows = train_gpt.Hyperparameters(**{name.lower(): value for name, value in TINY.items()}).maps
    assert kinds == [(row.name, str(row.seed)) for row in rows]


def test_loss_falls(trained):
    losses = losses_of(log_of(trained))
    assert losses[0] == pytest.approx(math.log(512), abs=0.1)  # nothing is known at first
    assert np.mean(losses[-5:]) < losses[0] - 0.8


def test_submission_agrees_with_the_log_and_the_files(trained, base):
    submission = json.loads((trained / "submission.json").read_text())
    loss, bpb = final(log_of(trained))
    assert submission["val_loss"] == pytest.approx(loss, abs=1e-8)
    assert submission["val_bpb"] == pytest.approx(bpb, abs=1e-8)
    assert submission["bytes_code"] == SCRIPT.stat().st_size
    assert (
        submission["bytes_total"]
        == SCRIPT.stat().st_size + (trained / "model.int6.ptz").stat().st_size
    )
    assert (submission["author"], submission["github_id"]) == ("A. Person", "aperson")
    assert submission["dataset"] == base["DATA_PATH"].name
    assert (submission["seeds"], submission["steps"]) == ([42], 20)
    assert (
        abs(time.mktime(time.strptime(submission["date"], "%Y-%m-%d")) - time.time()) < 2 * 86_400
    )
    for name in ("name", "blurb", "hardware"):
        assert submission[name]


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


# ---- Repeatability -----------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(trained, base, runs):
    run_well(base | {"RUN_ID": "again"})
    assert (runs / "again" / "model.int6.ptz").read_bytes() == (
        trained / "model.int6.ptz"
    ).read_bytes()
    assert losses_of(log_of(runs / "again")) == losses_of(log_of(trained))


def test_another_seed_gives_another_run(trained, base, runs):
    run_well(base | {"RUN_ID": "seed", "SEED": 43})
    assert (runs / "seed" / "model.int6.ptz").read_bytes() != (
        trained / "model.int6.ptz"
    ).read_bytes()
    assert losses_of(log_of(runs / "seed")) != losses_of(log_of(trained))


def test_validation_text_has_no_part_in_training(trained, base, runs, corpus, tmp_path):
    """Other text is validated on, in the midst of training too, and the weights come out the same."""
    for path in corpus.folder.glob("fineweb_train_*.bin"):
        shutil.copy(path, tmp_path)
    tokens = read_shard(corpus.folder / "fineweb_val_000000.bin")
    second = np.flatnonzero(tokens == 1)[1]
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens[second:])  # without its first document
    run_well(base | {"RUN_ID": "other", "DATA_PATH": tmp_path})
    ours, theirs = weights_of(runs / "other"), weights_of(trained)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    choices = [
        re.findall(r"^average .*$", log_of(folder), re.M) for folder in (runs / "other", trained)
    ]
    assert choices[0] == choices[1] != []
    assert final(log_of(runs / "other")) != final(log_of(trained))


# ---- Evaluation from the artifact --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validation_only(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    shutil.copy(corpus.folder / "fineweb_val_000000.bin", folder)
    return folder


@pytest.fixture(scope="module")
def eval_only(trained, validation_only, corpus) -> dict:
    """What an evaluator sets: where things lie and how to score. The model is described by the artifact."""
    settings = {
        "EVAL_ONLY": 1,
        "MODEL_PATH": trained / "model.int6.ptz",
        "DATA_PATH": validation_only,
        "TOKENIZER_PATH": corpus.tokenizer,
        "EVAL_SEQ_LEN": 32,
        "EVAL_STRIDE": 8,
        "DTYPE": "float32",
    }
    assert not settings.keys() & {*MODEL_SETTINGS, *PUBLISHED}
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
    assert f"MODEL_PATH={eval_only['MODEL_PATH']} is of another model" in message
    for part in (
        "NUM_LAYERS=12 here, 2 there",
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
        {"NUM_LAYERS": 2, "VE_LAYERS": 1},
        {"MAP_ADAPTER": "lora:4"},
        {"RANDOM_ADAPTER_RANK": 4},
        {"MAP_SEED": "0x3039"},
        {"RANDOM_ADAPTER_SEED": "0x3039"},
        {"USE_RANDOM_ADAPTERS": 1},
        {"MATRIX_LR": 1.0},
    ],
)
def test_settings_that_agree_with_the_artifact_are_accepted(trained, monkeypatch, asked):
    """However they are spelt; what is no part of the model stays as it was set."""
    stored = train_gpt.read_artifact((trained / "model.int6.ptz").read_bytes())[0]["model"]
    for name, value in {**asked, "EVAL_STRIDE": 5}.items():
        monkeypatch.setenv(name, str(value))
    h = train_gpt.Hyperparameters().adopt(stored, "the artifact")
    assert h.model_settings() == stored
    assert h.eval_stride == 5


def test_two_processes_evaluate_as_one(trained, eval_only):
    out = run_well(eval_only, launcher=(*TORCHRUN, "--standalone", "--nproc_per_node=2"))
    assert final(out) == pytest.approx(final(log_of(trained)), abs=1e-7)


PLACES = [0, 7, 8, 11, 12, 16, 100, 0.2, 0.4, 0.6, 0.8, -33, -32, -1]


@pytest.mark.parametrize("place", PLACES)
def test_flipped_bit_is_refused(trained, place):
    blob = bytearray((trained / "model.int6.ptz").read_bytes())
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
        train_gpt.read_artifact(spoil((trained / "model.int6.ptz").read_bytes()))


def test_missing_artifact_is_named(eval_only, tmp_path):
    message = refusal(eval_only | {"MODEL_PATH": tmp_path / "none.ptz"})
    assert f"MODEL_PATH={tmp_path / 'none.ptz'} cannot be used: FileNotFoundError" in message
    assert "RUN_ID" not in message, "an evaluation has no run to continue"


def test_log_says_how_each_figure_was_scored(eval_only):
    """The roundtrip has one window after the other in either mode."""
    out = run_well(eval_only | {"EVAL_MODE": "window"})
    modes = dict(re.findall(r"final_int6_brotli_(\w+) .* mode:(\w+)", out))
    assert modes == {"roundtrip": "exact", "sliding_window": "window"}


@pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(), reason="run.sh would have to set up first"
)
def test_run_sh_evaluates_and_exports_what_its_preset_did_not_make(
    trained, eval_only, corpus, tmp_path
):
    """The preset says how to score an artifact, and nothing of a checkpoint's run."""
    export = {
        "EXPORT_ONLY": 1,
        "CHECKPOINT_PATH": trained / "checkpoint.pt",
        "OUTPUT_DIR": tmp_path,
    }
    for settings in (eval_only, corpus.settings | export):
        process = subprocess.run(
            ["bash", ROOT / "run.sh"],
            env=environment(settings),
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=100,
        )
        assert process.returncode == 0, process.stderr
        assert final(process.stdout) == pytest.approx(final(log_of(trained)), abs=1e-6)


def test_damaged_artifact_ends_a_process_with_a_message(trained, eval_only, tmp_path):
    blob = bytearray((trained / "model.int6.ptz").read_bytes())
    blob[len(blob) // 2] ^= 1
    (tmp_path / "damaged.ptz").write_bytes(blob)
    assert "damaged" in refusal(eval_only | {"MODEL_PATH": tmp_path / "damaged.ptz"})


def rewritten(trained: Path, **changes) -> bytes:
    """The run's artifact with other entries in its header, and a checksum that is right."""
    header, tensors = train_gpt.read_artifact((trained / "model.int6.ptz").read_bytes())
    return train_gpt.write_artifact(header | changes, tensors)[0]


@pytest.mark.parametrize("change", ["fingerprint", "seed"])
def test_other_maps_than_the_artifacts_are_refused(trained, base, change):
    """As another release of a library could draw them; with those the weights are garbage."""
    header, _ = train_gpt.read_artifact((trained / "model.int6.ptz").read_bytes())
    seed = header["model"]["map_seed"]
    changes = {
        "fingerprint": {"fingerprint": "0" * 64},
        "seed": {"model": header["model"] | {"map_seed": seed + 1}},
    }[change]
    processes = train_gpt.World(train_gpt.Hyperparameters(dtype="float32"))
    train_gpt.build_model(*train_gpt.read_artifact(rewritten(trained)), processes)
    with pytest.raises(train_gpt.UserError, match="maps drawn here are not the artifact's"):
        train_gpt.build_model(*train_gpt.read_artifact(rewritten(trained, **changes)), processes)


def test_other_maps_end_a_process_with_a_message(trained, eval_only, tmp_path):
    (tmp_path / "other.ptz").write_bytes(rewritten(trained, fingerprint="0" * 64))
    assert "maps" in refusal(eval_only | {"MODEL_PATH": tmp_path / "other.ptz"})


def test_another_tokenizer_than_the_artifacts_is_refused(eval_only, corpus, tmp_path):
    """One of the same size whose text is another: its bytes per token, and so the score, would be wrong."""
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
    assert f"TOKENIZER_PATH={other} is not what made the shards" in message
    assert str(corpus.folder / "manifest.json") in message
    assert not (runs / "tokenizer").exists()


# ---- Several processes -------------------------------------------------------------------------------------


def test_two_processes_train_as_one(base, runs):
    """Sums in another order differ in their last bits. Late QAT would round some to other codes: not here."""
    exact = base | {"LATE_QAT_THRESHOLD": 0}
    run_well(exact | {"RUN_ID": "one"})
    run_well(exact | {"RUN_ID": "two"}, launcher=(*TORCHRUN, "--standalone", "--nproc_per_node=2"))
    same_training(runs / "two", runs / "one", steps=20)
    ours, theirs = weights_of(runs / "two"), weights_of(runs / "one")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5, msg=name)


def test_two_launchers_train_as_one(trained, base, runs):
    """Two machines of one process each, as far as one machine can be two; with late QAT from step 11 on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (
        *TORCHRUN,
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--local-addr=127.0.0.1",
    )
    processes = [start(base | {"RUN_ID": "launchers"}, launcher) for _ in range(2)]
    for result in [finish(process) for process in processes]:
        assert result.returncode == 0, result.stdout + result.stderr
    same_training(runs / "launchers", trained, steps=11)


def same_training(folder: Path, other: Path, steps: int) -> None:
    """Losses as exact as the log has them for so many steps, nearly so where values are rounded."""
    ours, theirs = losses_of(log_of(folder)), losses_of(log_of(other))
    assert len(ours) == len(theirs) == 20
    assert ours[:steps] == pytest.approx(theirs[:steps], abs=1.01e-4)  # the log has four decimals
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert final(log_of(folder)) == pytest.approx(final(log_of(other)), abs=1e-3)
    assert json.loads((folder / "submission.json").read_text())["hardware"].startswith("2 x ")


# ---- Export ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def over_the_limit(base, runs) -> str:
    """The message of a run that trained and then found its artifact too large."""
    return refusal(base | {"RUN_ID": "large", "ARTIFACT_LIMIT_BYTES": 1000})


def test_artifact_over_the_limit_is_refused_and_the_weights_stay(over_the_limit, trained, runs):
    size = SCRIPT.stat().st_size + (trained / "model.int6.ptz").stat().st_size
    for word in (
        f"{size:,} bytes",
        "1,000",
        "checkpoint.pt",
        "EXPORT_ONLY=1",
        "CHECKPOINT_PATH",
        "MATRIX_CLIP_SIGMAS",
        "rank",
    ):
        assert word in over_the_limit
    assert sorted(path.name for path in (runs / "large").iterdir()) == [
        "checkpoint.pt",
        "train.log",
    ]


def test_its_checkpoint_exports_what_the_run_would_have(over_the_limit, trained, base, runs):
    export = {
        "EXPORT_ONLY": 1,
        "CHECKPOINT_PATH": runs / "large" / "checkpoint.pt",
        "RUN_ID": "exported",
    }
    run_well(base | export)
    assert final(log_of(runs / "exported")) == pytest.approx(final(log_of(trained)), abs=1e-8)
    assert (runs / "exported" / "model.int6.ptz").read_bytes() == (
        trained / "model.int6.ptz"
    ).read_bytes()
    assert json.loads((runs / "exported" / "submission.json").read_text())["steps"] == 20


def test_checkpoint_brings_the_settings_of_its_run(trained, base, runs):
    """Who exports need not know how the model was built, trained and evaluated, or in which type."""
    where = {name: base[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "OUTPUT_DIR")}
    export = {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": trained / "checkpoint.pt", "RUN_ID": "forgotten"}
    (runs / "forgotten").mkdir()
    (runs / "forgotten" / "train.log").write_text("a start that came no further\n")
    out = run_well(where | export)
    assert final(out) == pytest.approx(final(log_of(trained)), abs=1e-8)
    assert json.loads((runs / "forgotten" / "submission.json").read_text())["seeds"] == [
        base["SEED"]
    ]


def test_a_continued_run_computes_in_its_own_type_and_may_take_smaller_batches(
    over_the_limit, trained, base, runs
):
    shutil.copytree(runs / "large", runs / "continued")
    other = {
        "RUN_ID": "continued",
        "MICRO_BATCH_TOKENS": 32,
        "EVAL_BATCH_TOKENS": 64,
        "ARTIFACT_LIMIT_BYTES": 16_000_000,
    }
    out = run_well({name: value for name, value in base.items() if name != "DTYPE"} | other)
    assert final(out) == pytest.approx(final(log_of(trained)), abs=1e-7)
    # Trying the export again writes no checkpoint: the last ones of the training would be pushed out.
    assert not (runs / "continued" / "checkpoint.previous.pt").exists()


def test_a_console_that_is_gone_ends_no_run(processes, tmp_path, monkeypatch):
    """`bash run.sh | tee log`: Ctrl-C ends tee, too, before the run has saved."""

    def write(*_):
        raise BrokenPipeError

    world = copy.copy(processes)
    world.file, world.can_save = (tmp_path / "train.log").open("w"), True
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=write, flush=write))
    monkeypatch.setattr("os.write", write)
    world.log("a line")
    world._on_signal(2, None)
    assert (tmp_path / "train.log").read_text() == "a line\n"
    assert world.told_to_stop


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


# ---- Other configurations ----------------------------------------------------------------------------------


def test_everything_learned_trains_and_exports(base, runs):
    run_well(base | {"RUN_ID": "learned", "USE_RANDOM_ADAPTERS": 0})
    text = log_of(runs / "learned")
    losses = losses_of(text)
    assert np.mean(losses[-5:]) < losses[0] - 0.8
    assert "and 0 frozen parameters" in text
    before = [float(found[4]) for found in VALIDATIONS.finditer(text)][-1]
    assert final(text, "roundtrip")[1] == pytest.approx(before, rel=0.02)


def test_master_weights_are_float32_under_bfloat16(base, runs):
    """Small updates of bfloat16 weights are rounded away; no master weight may pass through that type."""
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

compiled = []

def backend(graph, inputs):  # the graphs, without the minutes of making code of them
    compiled.append("training" if torch.is_grad_enabled() else "evaluation")
    return graph.forward

torch.compile = functools.partial(torch.compile, backend=backend)
train_gpt.main()
print("compiled", *compiled)
"""


def test_nothing_compiles_in_the_timed_region(trained, base, tmp_path):
    """Warm-up compiles the step; its undoing, validation and quantised training then reuse that one graph."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    settings = base | {
        "COMPILE": 1,
        "WARMUP_STEPS": 2,
        "RUN_ID": "compiled",
        "MICRO_BATCH_TOKENS": 64,
        "EVAL_BATCH_TOKENS": 128,
        "VAL_LOSS_EVERY": 5,
    }
    out = run_well(settings, launcher=(str(driver),), script=ROOT)
    compiled = out.splitlines()[-1].split()
    assert compiled[:2] == ["compiled", "training"]
    assert set(compiled[2:]) == {"evaluation"}
    assert "late_qat:on step:11" in out
    assert losses_of(out) == pytest.approx(losses_of(log_of(trained)), abs=1e-3)


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

with train_gpt.World(train_gpt.Hyperparameters(compile="1")):
    from torch._inductor.decomposition import select_decomp_table
    backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
    embedding = torch.compile(train_gpt.Embedding(8, 4, 1.0, torch.bfloat16), backend=backend, fullgraph=True)
    embedding(torch.randint(8, (64,))).float().sum().backward()
print(*traced)
"""


def test_compiled_gradients_of_embeddings_add_up_in_order(tmp_path):
    """Inductor would add by atomic operations, whose order and so whose last bits differ from run to run."""
    driver = tmp_path / "driver.py"
    driver.write_text(IN_ORDER)
    traced = run_well({}, launcher=(str(driver),), script=ROOT).split()
    assert any("embedding_dense_backward" in name for name in traced)
    assert not any("index_put" in name for name in traced)


def test_wall_clock_ends_training_with_its_schedule_complete(base, runs):
    limits = {"MAX_WALLCLOCK_SECONDS": 4, "GPTQ_RESERVE_SECONDS": 1, "ITERATIONS": 1_000_000}
    quiet = {"VAL_LOSS_EVERY": 0, "TRAIN_LOG_EVERY": 0}
    run_well(base | limits | quiet | {"RUN_ID": "clock", "LATE_QAT_THRESHOLD": 0.5})
    submission = json.loads((runs / "clock" / "submission.json").read_text())
    assert 20 < submission["steps"] < 1_000_000
    assert 2.7 < submission["train_seconds"] < 3.3
    assert "late_qat:on" in log_of(runs / "clock")  # the warm-down came within the time


def test_a_slow_first_step_does_not_move_the_schedule():
    """33 s in a budget of 555: by elapsed time over steps, 16 steps would remain, all of them warm-down."""
    clock = train_gpt.Clock(20_000, 555)
    for step, seconds in enumerate([33.0] + [0.12] * 20):
        remaining = clock.remaining(step)
        assert remaining > 3500 or step == 0
        assert train_gpt.warmdown_scale(step, remaining, 3500) == 1.0
        clock.step_took(seconds)
    assert clock.remaining(21) == pytest.approx((555 - 33) / 0.12, rel=0.01)
