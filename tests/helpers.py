"""What all tests share: tiny settings, small corpora, runs of the script."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple
from unittest import mock

import brotli
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare

import train_gpt

# ---- Settings ------------------------------------------------------------------------------------

# Every variable that is read.
SETTINGS = [name.upper() for name in (*train_gpt.SETTINGS, *train_gpt.ALIASES)]
# What a launcher sets, or a shell may have set for other scripts, would decide a test's outcome.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
NOT_INHERITED = {*SETTINGS, *train_gpt.UNSUPPORTED, *LAUNCHER, "PRESET"}

# A model that is built in milliseconds and trained in a second, on the CPU also where there is a
# GPU. A corpus has a vocabulary of its own.
TINY = {
    "DEVICE": "cpu",
    "COMPILE": "0",
    "DTYPE": "float32",
    "VOCAB_SIZE": 64,
    "NUM_LAYERS": 4,
    "MODEL_DIM": 32,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "ROPE_DIMS": 4,
    "VE_DIM": 8,
    "BIGRAM_VOCAB_SIZE": 32,
    "BIGRAM_DIM": 8,
    "MAP_ADAPTER": "lora:4",
    "TRAIN_SEQ_LEN": 32,
    "EVAL_SEQ_LEN": 32,
    "EVAL_STRIDE": 8,
    "TRAIN_BATCH_TOKENS": 256,
    "HOLDOUT_TOKENS": 512,
    "ITERATIONS": 20,
    "WARMUP_STEPS": 1,
    "WARMDOWN_ITERS": 10,
    "LATE_QAT_THRESHOLD": 0.15,
    "EMA_DECAY": 0,  # each candidate is exported
    "GPTQ_CALIB_BATCHES": 2,
    "MAX_WALLCLOCK_SECONDS": 0,
    "TRAIN_LOG_EVERY": 1,
}
ONE_LAYER = {"NUM_LAYERS": 1, "VE_LAYERS": 0}  # for what is compiled: a layer takes a second


def tiny_settings(**changes: Any) -> train_gpt.Hyperparameters:
    """Return the tiny settings with changes by lower-case name; None stands for the default."""
    values = {name.lower(): value for name, value in TINY.items()} | changes
    given = {name: value for name, value in values.items() if value is not None}
    return train_gpt.load_settings({}, **given)


def head_input(model: train_gpt.GPT, *given: Any) -> torch.Tensor:
    """Return what the head reads when the model predicts: logits are float32 in any model."""
    inputs = []
    hook = model.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.predict(*given)
    hook.remove()
    return inputs[0]


# ---- Runs in this process ------------------------------------------------------------------------


class KeptLog(train_gpt.RunLog):
    """A log that writes nothing; at each line about a training step it copies the weights."""

    def __init__(self, model: train_gpt.LanguageModel | None = None) -> None:
        super().__init__(rank=0)
        self.model, self.lines, self.snapshots = model, [], []

    def __call__(self, text: str, console: bool = True) -> None:
        self.lines.append(text)
        if self.model and "train_loss" in text:
            self.snapshots.append(copied(self.model))


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Seconds:
    """A clock that stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---- Corpus --------------------------------------------------------------------------------------

# Text that a small vocabulary spells in bytes, and spaces that a tokenizer treats in its own way.
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


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """Write documents as JSON lines, as data/prepare.py reads them."""
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_shard(path: Path, tokens: Sequence[int]) -> Path:
    """Write a shard as data/prepare.py does."""
    body = np.asarray(tokens, "<u2")
    return prepare.write_whole(path, prepare.shard_header(len(body)) + body.tobytes())


def read_shard(path: Path) -> np.ndarray:
    """Return the tokens, by this file's own reading of the format."""
    return np.frombuffer(path.read_bytes()[1024:], "<u2")


class Corpus(NamedTuple):
    """Shards and tokenizer that data/prepare.py made, and the settings that name them."""

    folder: Path
    tokenizer: Path
    settings: dict
    documents: list[str]  # validation text, one by one


def make_corpus(folder: Path) -> Corpus:
    """Make English and some harder text; a tiny model validates on it in a tenth of a second."""
    texts = sorted(set(topics.values()), key=lambda text: (len(text), text))
    validation = texts[:8] + UNUSUAL_DOCUMENTS
    train = write_jsonl(folder / "train.jsonl", texts[8:])
    val = write_jsonl(folder / "val.jsonl", validation)
    command = ["text", train, "--val", val, "--vocab", 512, "--out", folder]
    assert prepare.main([str(part) for part in command]) == 0
    (dataset,) = (folder / "datasets").iterdir()
    (tokenizer,) = (folder / "tokenizers").glob("*.model")
    settings = {"DATA_PATH": dataset, "TOKENIZER_PATH": tokenizer, "VOCAB_SIZE": 512}
    return Corpus(dataset, tokenizer, settings, validation)


# ---- Artifact ------------------------------------------------------------------------------------


def sealed(body: bytes) -> bytes:
    """Return an artifact of these bytes: they and their checksum."""
    return body + hashlib.sha256(body).digest()


class Container:
    """An artifact in its parts, by the format's description alone; `blob` joins them again."""

    def __init__(self, blob: bytes) -> None:
        assert blob[:8] == b"RANDMAPS"
        place = 16 + int.from_bytes(blob[12:16], "little")
        self.start = blob[:12]  # magic and version
        self.header = json.loads(brotli.decompress(blob[16:place]))
        self.blocks: dict[str, list[bytes]] = {}  # of each group
        for name, lengths in self.header["groups"]:
            self.blocks[name] = []
            for length in lengths:
                self.blocks[name].append(blob[place : place + length])
                place += length
        assert blob[place:] == hashlib.sha256(blob[:place]).digest()

    def blob(
        self, text: bytes = b"", blocks: dict[str, list[bytes]] | None = None, **changes: Any
    ) -> bytes:
        """Return an artifact with a right checksum.

        `text` takes the place of the compressed header, which has the sizes of the blocks;
        `changes` are entries of the header.
        """
        blocks = blocks or self.blocks
        sizes = [[name, [len(block) for block in group]] for name, group in blocks.items()]
        header = self.header | {"groups": sizes} | changes
        text = text or brotli.compress(json.dumps(header).encode(), quality=5)
        size = len(text).to_bytes(4, "little")
        return sealed(b"".join([self.start, size, text, *itertools.chain(*blocks.values())]))


# ---- Folders of runs -----------------------------------------------------------------------------


def log_of(folder: Path) -> str:
    return (folder / "train.log").read_text(encoding="utf-8")


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def claim(folder: Path, **figures: Any) -> None:
    """Falsify figures of results.json."""
    (folder / "results.json").write_text(json.dumps(results_of(folder) | figures))


def replace(path: Path, old: str, new: str) -> None:
    """Falsify a text."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def metrics_of(folder: Path, name: str) -> dict[int, Any]:
    """Return what metrics.jsonl has by this name, in all its digits, by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


# ---- Runs of the script --------------------------------------------------------------------------

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def environment(settings: dict) -> dict[str, str]:
    """Return this process's environment with these settings alone, on the CPU."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    given = {name: str(value) for name, value in settings.items()}
    return inherited | {"DEVICE": "cpu"} | given


def start(
    settings: dict,
    launcher: Sequence = (),
    script: Path = SCRIPT,
    arguments: Sequence[str] = (),
    **options: Any,
) -> subprocess.Popen:
    """Start a new interpreter with the script, or a launcher of it; `options` are Popen's."""
    command = [sys.executable, *launcher, str(script), *arguments]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment(settings), **options)


def finish(process: subprocess.Popen, timeout: float = 200) -> subprocess.CompletedProcess:
    """Return what the process gave; one that hangs is ended, since a hang is a failure too."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(
    settings: dict, fresh: bool = False, arguments: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess:
    """Run the script to its end, in this process, which takes a tenth of the time.

    `fresh` and the options of `start` ask for an interpreter of its own. An exception other than
    SystemExit is a test's failure, as is a traceback.
    """
    if fresh or options:
        return finish(start(settings, arguments=arguments, **options))
    out, err = io.StringIO(), io.StringIO()
    code: str | int | None = 0
    with (
        mock.patch.dict(os.environ, environment(settings), clear=True),
        mock.patch.object(sys, "argv", [str(SCRIPT), *arguments]),
        mock.patch.object(train_gpt.StopSignal, "install"),
        torch.random.fork_rng(devices=[]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            train_gpt.main(arguments)
        except SystemExit as ended:
            code = ended.code
    if isinstance(code, str):
        print(code, file=err)
    returncode = 1 if isinstance(code, str) else code or 0
    return subprocess.CompletedProcess(sys.argv, returncode, out.getvalue(), err.getvalue())


def run_well(settings: dict, **options: Any) -> str:
    """Return the console output of a process that must succeed."""
    result = run(settings, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refusal(settings: dict, **options: Any) -> str:
    """Return the message of a process that must end with one clear message and no traceback."""
    result = run(settings, **options)
    assert result.returncode != 0, result.stdout
    assert result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def tool_refusal(capsys: Any, main: Callable[[list[str]], int], *arguments: object) -> str:
    """Return the one line of a tool's call that must fail and write nothing."""
    code = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert code == 1 and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


def run_without(
    package: str, tool: Path, folder: Path, *arguments: str
) -> subprocess.CompletedProcess:
    """Run a tool in a folder, in a process that cannot import a package."""
    script = folder / "without.py"
    script.write_text(
        f"import runpy, sys\nsys.modules[{package!r}] = None\n"
        f"sys.argv[0] = {tool.name!r}\nrunpy.run_path({str(tool)!r}, run_name='__main__')\n"
    )
    return finish(start({}, script=script, cwd=folder, arguments=arguments))
