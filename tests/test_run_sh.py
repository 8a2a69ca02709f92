"""run.sh as a person uses it: preset, text, teacher, data, and the default run cut short.

It runs in a copy of the folder. In most tests a stand-in takes the place of the training and keeps
what it was told; the default run is a real one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT, SCRIPT, environment, log_of

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(), reason="run.sh would have to set up first"
)

# It keeps what it was told, and leaves the files that a run leaves.
STAND_IN = """
import json, os, sys
from pathlib import Path
if "--plan" in sys.argv:
    teacher = "baseline" if "distill_from" in os.environ.get("PRESET", "") else ""
    sys.exit(print(0, os.environ.get("VOCAB_SIZE", ""), teacher, sep=","))
folder = Path(os.environ["OUTPUT_DIR"]) / os.environ.get("RUN_ID", "unnamed")
folder.mkdir(parents=True, exist_ok=True)
for name in ("model.int6.ptz", "results.json"):
    (folder / name).write_text('"model": "a stand-in"')
(folder / "told.json").write_text(json.dumps(dict(os.environ)))
"""


@pytest.fixture
def place(tmp_path, corpus) -> Path:
    """A copy of the folder whose training is the stand-in; its data is the small corpus."""
    root = tmp_path / "project"
    for name in ("presets", "tools"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copytree(corpus.folder, root / "data" / "datasets" / "docs_sp512")
    shutil.copytree(corpus.tokenizer.parent, root / "data" / "tokenizers")
    for name in ("run.sh", "requirements.txt", "data/prepare.py"):
        shutil.copy(ROOT / name, root / name)
    (root / ".venv").symlink_to(ROOT / ".venv")
    (root / "train_gpt.py").write_text(STAND_IN)
    return root


def run_sh(root: Path, *words: str, **variables: object) -> subprocess.CompletedProcess:
    """Run run.sh with these variables, in another folder than its own."""
    command = ["bash", root / "run.sh", *words]
    options = {"cwd": root.parent, "capture_output": True, "text": True, "timeout": 200}
    return subprocess.run(command, env=environment({"VOCAB_SIZE": 512, **variables}), **options)


def told(root: Path, *words: str, **variables: object) -> dict[str, str]:
    """Return the environment that the training got."""
    process = run_sh(root, *words, RUN_ID="it", **variables)
    assert process.returncode == 0, process.stderr
    return json.loads((root / "runs" / "it" / "told.json").read_text())


def test_the_default_names_preset_data_and_how_to_keep_memory(place):
    got = told(place, MALLOC_MMAP_MAX_=7)
    assert got["PRESET"] == "random_adapters"
    assert got["DATA_PATH"] == str(place / "data/datasets/docs_sp512")
    assert got["MALLOC_MMAP_MAX_"] == "7"
    assert got["MALLOC_TRIM_THRESHOLD_"], "of tools/memory.env"
    assert "TOKENIZER_PATH" not in got, "the manifest of the data names it"
    for preset in ("mask", "presets/mask.env"):
        assert told(place, preset)["PRESET"] == told(place, PRESET=preset)["PRESET"] == preset


@pytest.mark.parametrize(
    ("words", "variables", "says"),
    [
        (["mask", "vera"], {}, "mask and vera are two presets; name one"),
        (["vera"], {"PRESET": "mask"}, "mask and vera are two presets; name one"),
        (["mask"], {"EVAL_ONLY": 1}, "PRESET=mask: an artifact and a checkpoint bring their own"),
    ],
)
def test_a_preset_that_would_not_hold_is_refused(place, words, variables, says):
    process = run_sh(place, *words, **variables)
    assert process.returncode == 1 and process.stderr.startswith(f"error: {says}")
    assert not (place / "runs").exists()


def test_a_teacher_is_trained_first_and_once(place):
    student = {"PRESET": "distill_from", "TRAIN_SEQ_LEN": 64}
    runs = place / "runs"
    artifact = runs / "it-teacher" / "model.int6.ptz"
    assert told(place, **student)["DISTILL_FROM"] == str(artifact)
    teacher = json.loads((artifact.parent / "told.json").read_text())
    assert (teacher["PRESET"], teacher["TRAIN_SEQ_LEN"]) == ("baseline", "64")
    assert "DISTILL_FROM" not in teacher
    written = artifact.stat().st_mtime_ns
    shutil.rmtree(runs / "it")
    told(place, **student)
    assert artifact.stat().st_mtime_ns == written
    shutil.rmtree(runs)
    assert told(place, **student, DISTILL_FROM="mine.ptz")["DISTILL_FROM"] == "mine.ptz"
    assert [path.name for path in runs.iterdir()] == ["it"]


def test_text_of_ones_own_is_prepared_and_trained_on(place):
    text = place.parent / "my book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 2000)
    got = told(place, str(text), VOCAB_SIZE=300)
    assert Path(got["DATA_PATH"]).parent == place / "data" / "datasets"
    assert list(Path(got["DATA_PATH"]).glob("fineweb_train_*.bin"))
    both = run_sh(place, str(text), DATA_PATH=place)
    assert "are two datasets; unset one" in both.stderr


def test_what_brings_its_data_gets_no_others(place):
    """A checkpoint, a run that continues, and an artifact beside the results of its run."""
    artifact = place / "runs" / "essay" / "model.int6.ptz"
    evaluation = {"EVAL_ONLY": 1, "MODEL_PATH": artifact}
    assert told(place, **evaluation)["DATA_PATH"] == str(place / "data/datasets/docs_sp512")
    artifact.parent.mkdir()
    (artifact.parent / "results.json").touch()
    (place / "runs" / "it" / "checkpoint.pt").touch()
    for variables in (evaluation, {"EXPORT_ONLY": 1, "CHECKPOINT_PATH": "a.pt"}, {}):
        got = told(place, **variables)
        assert not {"DATA_PATH", "PRESET"} & got.keys()


def test_the_default_run_cut_short(place):
    """The real script: it trains, exports and scores, and the log says by which settings."""
    shutil.copy(SCRIPT, place)
    tiny = {"NUM_LAYERS": 2, "MODEL_DIM": 64, "BIGRAM_VOCAB_SIZE": 64, "MAP_ADAPTER": "lora:4"}
    short = {"ITERATIONS": 2, "TRAIN_BATCH_TOKENS": 512, "EVAL_STRIDE": 256}
    process = run_sh(place, **tiny, **short, GPTQ_CALIB_BATCHES=1, RUN_ID="short")
    assert process.returncode == 0, process.stderr
    assert "final_int6_brotli_sliding_window_exact" in process.stdout
    log = log_of(place / "runs" / "short")
    for line in ("TRAIN_SEQ_LEN=256", "NUM_LAYERS=2", "ITERATIONS=2", "VOCAB_SIZE=512"):
        assert f"\n{line}\n" in log


WAITING = """
import signal, sys, time
if "--plan" in sys.argv: sys.exit(print("0,,"))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved") or 5))
print("started", flush=True)
time.sleep(60)
"""


def test_a_signal_reaches_the_script(place):
    """SIGTERM to run.sh: the script has taken its place."""
    (place / "train_gpt.py").write_text(WAITING)
    command, given = ["bash", place / "run.sh"], environment({"DATA_PATH": place})
    process = subprocess.Popen(command, env=given, stdout=subprocess.PIPE)
    while process.stdout.readline() != b"started\n":
        assert process.poll() is None
    process.terminate()
    out, _ = process.communicate(timeout=100)
    assert (process.returncode, out) == (5, b"saved\n")
