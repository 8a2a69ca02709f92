"""What the tests of runs, settings and data share: a tiny configuration, a small corpus, real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"

FIELDS = dataclasses.fields(train_gpt.Hyperparameters)
PUBLISHED = [name.upper() for name in train_gpt.PUBLISHED]
SETTINGS = [f.name.upper() for f in FIELDS] + PUBLISHED  # every name that a variable may have
MODEL_SETTINGS = [f.name.upper() for f in FIELDS if f.metadata["model"]]
# What a launcher sets, or a shell may have set for other scripts, and would decide a test's outcome.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
NOT_INHERITED = {*SETTINGS, *train_gpt.NOT_HERE, *LAUNCHER}

TINY = {
    "NUM_LAYERS": 2,
    "MODEL_DIM": 32,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "ROPE_DIMS": 8,
    "VE_LAYERS": 1,
    "VE_DIM": 8,
    "BIGRAM_VOCAB_SIZE": 64,
    "BIGRAM_DIM": 8,
    "MAP_ADAPTER": "lora:4",
    "TRAIN_SEQ_LEN": 32,
    "EVAL_SEQ_LEN": 32,
    "EVAL_STRIDE": 8,
    "TRAIN_BATCH_TOKENS": 256,
    "ITERATIONS": 20,
    "WARMUP_STEPS": 1,
    "WARMDOWN_ITERS": 10,
    "GPTQ_CALIB_BATCHES": 2,
    "MAX_WALLCLOCK_SECONDS": 0,
    "DTYPE": "float32",
    "TRAIN_LOG_EVERY": 1,
}

# Text that a small vocabulary can only spell in bytes, and spaces that a tokenizer treats in its own way.
UNUSUAL_DOCUMENTS = [
    "Déjà vu: naïve café, Übergröße, smörgåsbord, ¿qué?",
    "日本語の文章と、中文句子。 한국어 문장도 있다.",
    "🎉 party 👩‍👩‍👧 family 🇨🇭 flag",
    "  two spaces before,  two within, two after  ",
    "\n\nlines\n\n\nand\ttabs\n",
    "é",
    " ",
    "🎉",
    "ends in bytes 🎉",
    "a\u00a0b\u3000c\u2028d \u2581e",
    "<s> </s> <unk> <0x41>",
]


# ---- Corpus ------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8"
    )
    return path


def write_shard(path: Path, tokens, magic=20240520, version=1, count: int | None = None) -> Path:
    """A shard as the challenge defines it, or one that is wrong in what is given."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def read_shard(path: Path) -> np.ndarray:
    """The tokens, by this file's own reading of the format."""
    return np.frombuffer(path.read_bytes()[1024:], "<u2")


class Corpus(NamedTuple):
    """Shards and tokenizer that data/prepare.py made, and the settings that name them."""

    folder: Path
    tokenizer: Path
    settings: dict
    documents: list[str]  # validation text, one by one


def make_corpus(folder: Path) -> Corpus:
    """English and some harder text; the validation part takes a tiny model a tenth of a second."""
    from pydoc_data.topics import topics

    texts = sorted(set(topics.values()), key=lambda text: (len(text), text))
    validation = texts[:8] + UNUSUAL_DOCUMENTS
    train, val = (
        write_jsonl(folder / "train.jsonl", texts[8:]),
        write_jsonl(folder / "val.jsonl", validation),
    )
    command = [
        sys.executable,
        ROOT / "data" / "prepare.py",
        "--out",
        folder,
        "text",
        train,
        "--val",
        val,
        "--vocab",
        512,
    ]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=60)
    (dataset,) = (folder / "datasets").iterdir()
    manifest = json.loads((dataset / "manifest.json").read_text())
    tokenizer = (dataset / manifest["tokenizer"]).resolve()
    settings = {
        "DATA_PATH": dataset,
        "TOKENIZER_PATH": tokenizer,
        "VOCAB_SIZE": manifest["vocab_size"],
    }
    return Corpus(dataset, tokenizer, settings, validation)


# ---- Processes ---------------------------------------------------------------------------------------------


def environment(settings: dict) -> dict[str, str]:
    """This process's environment with these settings and no others. One thread: sums always in one order."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return (
        inherited
        | {"OMP_NUM_THREADS": "1"}
        | {name: str(value) for name, value in settings.items()}
    )


def start(settings: dict, launcher: tuple = (), script: Path = SCRIPT, cwd: Path | None = None):
    """A process of the script (not waited for), or of a launcher of it."""
    command = [sys.executable, *launcher, str(script)]
    return subprocess.Popen(
        command,
        env=environment(settings),
        cwd=cwd,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """What the process gave; one that hangs is ended, since a hang is a failure too."""
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(settings: dict, launcher: tuple = (), script: Path = SCRIPT, cwd: Path | None = None):
    return finish(start(settings, launcher, script, cwd))


def run_well(
    settings: dict, launcher: tuple = (), script: Path = SCRIPT, cwd: Path | None = None
) -> str:
    """The console output of a process that must succeed."""
    result = run(settings, launcher, script, cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refusal(settings: dict, **more) -> str:
    """The message of a process that must end with one clear message and no traceback."""
    result = run(settings, **more)
    assert result.returncode != 0, result.stdout
    assert result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr
