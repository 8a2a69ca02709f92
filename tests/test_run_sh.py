"""run.sh as a person uses it: presets, variables, text, teachers, and the default run cut short.

It runs in a copy of the folder. In most tests a stand-in takes the place of the training and keeps
what it was told, and another that of torch; the default run is a real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import NOT_INHERITED, ROOT, SCRIPT, SETTINGS, run_well, train_gpt

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(), reason="run.sh would have to set up first"
)

# Imported, it is the script: run.sh asks it what published variables mean. Run, it keeps what it
# was told, and leaves the files that a run leaves.
STAND_IN = """
import importlib.util, json, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("real", {script!r})
ALIASES = {aliases!r}
def expand_aliases(given, notes):
    if not given:
        return {{}}
    real = importlib.util.module_from_spec(spec)
    sys.modules["real"] = real
    spec.loader.exec_module(real)
    return real.expand_aliases(given, notes)
if __name__ == "__main__":
    folder = Path(os.environ["OUTPUT_DIR"]) / os.environ.get("RUN_ID", "unnamed")
    folder.mkdir(parents=True)
    for name in ("model.int6.ptz", "results.json"):
        (folder / name).touch()
    (folder / "told.json").write_text(json.dumps(dict(os.environ)))
"""
# All that run.sh asks torch itself; the tests train on the CPU. The real one takes a second.
TORCH = """
from types import SimpleNamespace
cuda = SimpleNamespace(is_available=lambda: False)
version = SimpleNamespace(cuda=None)
"""


@pytest.fixture
def place(tmp_path, corpus) -> Path:
    """A copy of the folder whose training is the stand-in; its data is the small corpus."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, root)
    for name in ("presets", "tools"):
        shutil.copytree(ROOT / name, root / name)
    (root / ".venv").symlink_to(ROOT / ".venv")
    script = STAND_IN.format(script=str(SCRIPT), aliases=list(train_gpt.ALIASES))
    (root / "train_gpt.py").write_text(script)
    (root / "torch.py").write_text(TORCH)
    (root / "data").mkdir()
    for name in ("datasets", "tokenizers"):
        shutil.copytree(corpus.folder.parents[1] / name, root / "data" / name)
    (root / "data" / "datasets" / corpus.folder.name).rename(root / "data/datasets/docs_sp512")
    shutil.copy(ROOT / "data" / "prepare.py", root / "data")
    return root


def run_sh(root: Path, *words: str, **variables: object) -> subprocess.CompletedProcess:
    """Run run.sh with these variables, in another folder than its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    given = {"DEVICE": "cpu", "VOCAB_SIZE": 512, **variables}
    return subprocess.run(
        ["bash", root / "run.sh", *words],
        env=inherited | {name: str(value) for name, value in given.items() if value is not None},
        cwd=root.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def told(root: Path, *words: str, **variables: object) -> dict[str, str]:
    """Return the environment that the training got."""
    process = run_sh(root, *words, RUN_ID="it", **variables)
    assert process.returncode == 0, process.stderr
    return json.loads((root / "runs" / "it" / "told.json").read_text())


def test_the_default_on_a_cpu_is_random_adapters_of_a_size_that_suits_it(place):
    got = told(place)
    assert (got["MAP_BASIS"], got["NUM_LAYERS"]) == ("orthogonal", "6")
    assert got["TRAIN_SEQ_LEN"] == "256", "of PRESET_BASE"
    assert got["DATA_PATH"] == str(place / "data/datasets/docs_sp512")
    assert "PRESET_BASE" not in got
    assert got["MALLOC_TRIM_THRESHOLD_"], "of tools/memory.env"


def test_variables_win_over_the_preset_and_its_base(place):
    got = told(place, PRESET="mask", NUM_LAYERS=3, TRAIN_SEQ_LEN=64, MAP_SCALE="")
    assert (got["NUM_LAYERS"], got["TRAIN_SEQ_LEN"], got["MAP_SCALE"]) == ("3", "64", "")
    assert got["MAP_ADAPTER"] == "mask"
    assert got["NUM_HEADS"] == "4"


def test_a_preset_by_its_name_or_its_file(place):
    (place / "mine.env").write_text("PRESET_BASE=cpu/common\nNUM_LAYERS=5 # my own\n\n# no more")
    for words in (["mask"], [str(place / "mine.env")]):
        shutil.rmtree(place / "runs", ignore_errors=True)
        got = told(place, *words)
        is_mine = "mine" in words[0]
        assert got["NUM_LAYERS"] == ("5" if is_mine else "6")
        assert ("MAP_ADAPTER" not in got) == is_mine


def test_published_variables_replace_the_map_table_of_the_preset(place):
    """A preset's other columns would be about other maps."""
    (place / "torch.py").unlink()  # the real script says what they stand for
    got = told(place, PRESET="partial_random", SELECTIVE_FREEZE=1)
    assert not [name for name in got if name.startswith("MAP_")]
    assert got["SELECTIVE_FREEZE"] == "1"
    assert got["NUM_LAYERS"] == "6"


def test_a_teacher_is_trained_first_and_once(place):
    got = told(place, PRESET="distill_from", TRAIN_SEQ_LEN=64)
    artifact = place / "runs" / "it-teacher" / "model.int6.ptz"
    assert got["DISTILL_FROM"] == str(artifact)
    teacher = json.loads((artifact.parent / "told.json").read_text())
    assert (teacher["MAP_BASIS"], teacher["TRAIN_SEQ_LEN"]) == ("learned", "64")
    assert "DISTILL_FROM" not in teacher
    assert got["NUM_LAYERS"] == "8"
    written = artifact.stat().st_mtime_ns
    shutil.rmtree(place / "runs" / "it")
    told(place, PRESET="distill_from", TRAIN_SEQ_LEN=64)
    assert artifact.stat().st_mtime_ns == written, "it is there already"
    shutil.rmtree(place / "runs")
    got = told(place, PRESET="distill_from", DISTILL_FROM="mine.ptz")
    assert got["DISTILL_FROM"] == "mine.ptz"
    assert [path.name for path in (place / "runs").iterdir()] == ["it"]


def test_the_manifest_names_tokenizer_and_vocabulary_unless_somebody_does(place):
    folder = place / "data/datasets/docs_sp512"
    manifest = json.loads((folder / "manifest.json").read_text())
    got = told(place, DATA_PATH=folder, VOCAB_SIZE=None)
    assert got["VOCAB_SIZE"] == str(manifest["vocab_size"]) == "512"
    assert got["TOKENIZER_PATH"] == f"{folder}/{manifest['tokenizer']}"
    shutil.rmtree(place / "runs")
    got = told(place, DATA_PATH=folder, VOCAB_SIZE=600, TOKENIZER_PATH="mine.model")
    assert (got["VOCAB_SIZE"], got["TOKENIZER_PATH"]) == ("600", "mine.model")


def test_text_of_ones_own_is_prepared_and_trained_on(place):
    text = place.parent / "my book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 2000)
    got = told(place, str(text), VOCAB_SIZE=300)
    assert Path(got["DATA_PATH"]).parent == place / "data" / "datasets"
    assert list(Path(got["DATA_PATH"]).glob("fineweb_train_*.bin"))
    assert got["VOCAB_SIZE"] == "300"
    assert Path(got["TOKENIZER_PATH"]).exists()
    both = run_sh(place, str(text), DATA_PATH=place)
    assert "are two datasets; unset one" in both.stderr


@pytest.mark.parametrize("task", ["EVAL_ONLY", "EXPORT_ONLY"])
def test_an_artifact_and_a_checkpoint_take_nothing_from_the_preset(place, task):
    got = told(place, **{task: 1}, MODEL_PATH="a.ptz", PRESET="mask")
    assert not {"NUM_LAYERS", "MAP_ADAPTER", "EVAL_SEQ_LEN"} & got.keys()
    assert ("DATA_PATH" in got) == (task == "EVAL_ONLY")


@pytest.mark.parametrize("variables", [{}, {"EXPORT_ONLY": 1}, {"EVAL_ONLY": 1}])
def test_what_made_an_artifact_says_what_to_do_with_it(place, variables):
    process = run_sh(place, RUN_ID="it", **variables)
    assert process.returncode == 0, process.stderr
    assert ("tools/report.py" in process.stdout) == ("EVAL_ONLY" not in variables)


def test_an_artifact_and_a_checkpoint_score_as_their_run_did(place):
    """The real script with what run.sh tells it; the later processes know nothing of the model."""
    scoring = {"EVAL_STRIDE": 256, "DTYPE": "float32"}
    small = {"NUM_LAYERS": 2, "MODEL_DIM": 64, "ITERATIONS": 2, "TRAIN_BATCH_TOKENS": 512}
    small |= {"GPTQ_CALIB_BATCHES": 1, **scoring}
    run = place / "real" / "trained"
    later = {
        "evaluated": {"EVAL_ONLY": 1, "MODEL_PATH": run / "model.int6.ptz", **scoring},
        "exported": {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": run / "checkpoint.pt"},
    }
    scores = set()
    for name, variables in {"trained": small, **later}.items():
        got = told(place, PRESET="mask", **variables)
        shutil.rmtree(place / "runs")
        assert ("MAP_ADAPTER" in got) == (name == "trained")
        settings = {key: got[key] for key in SETTINGS if key in got}
        said = run_well(settings | {"OUTPUT_DIR": run.parent, "RUN_ID": name})
        (score,) = re.findall(r"^final_int6_brotli_sliding_window_exact .*", said, re.M)
        scores.add(score)
    assert len(scores) == 1


def test_what_is_wrong_is_said_in_one_line(place):
    (place / "bad.env").write_text("NUM_LAYERS 5\n")
    cases = {
        "no preset none; there are: baseline.env": {"PRESET": "none"},
        "not KEY=VALUE: NUM_LAYERS 5": {"PRESET": place / "bad.env"},
    }
    for message, variables in cases.items():
        process = run_sh(place, **variables)
        assert process.returncode == 1
        (line,) = process.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_the_default_run_cut_short(place):
    """The real script: it trains, exports and scores, and the log says by which settings."""
    shutil.copy(SCRIPT, place)
    (place / "torch.py").unlink()
    tiny = {
        "NUM_LAYERS": 2,
        "TRAIN_BATCH_TOKENS": 512,
        "MODEL_DIM": 64,
        "BIGRAM_VOCAB_SIZE": 64,
        "MAP_ADAPTER": "lora:4",
        "GPTQ_CALIB_BATCHES": 1,
    }
    process = run_sh(place, ITERATIONS=2, EVAL_STRIDE=256, RUN_ID="short", **tiny)
    assert process.returncode == 0, process.stderr
    assert "final_int6_brotli_sliding_window_exact" in process.stdout
    folder = place / "runs" / "short"
    assert json.loads((folder / "results.json").read_text())["steps"] == 2
    log = (folder / "train.log").read_text()
    for line in ("TRAIN_SEQ_LEN=256", "NUM_LAYERS=2", "ITERATIONS=2", "VOCAB_SIZE=512"):
        assert f"\n{line}\n" in log
