"""data/prepare.py as a person runs it: real processes, files, and a hub on 127.0.0.1."""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece

from helpers import ROOT, finish, fork_server, prepare

PREPARE = ROOT / "data" / "prepare.py"

LIST = """the of and to in is you that it he was for on are as with his they at be this have
    from or one had by word but not what all were we when your can said there use an each
    which she do how their if will up other about out many then them these so some her
    would make like him into time has look two more 17 99 write go, see. number no way
    could people my than first water been call who oil its now find"""
WORDS = LIST.split()
VOCAB = 400
COMMAND = [sys.executable, str(PREPARE), "--out"]


# ---- Helpers -------------------------------------------------------------------------------------


def run(out: Path, *args, **environment) -> subprocess.CompletedProcess:
    """Run data/prepare.py in a fork, which need not import its packages again."""
    words = [*COMMAND[1:], out, *args]
    return finish(fork_server().start(words, {**os.environ, **environment}), timeout=60)


def run_well(out: Path, *args, **environment) -> subprocess.CompletedProcess:
    result = run(out, *args, **environment)
    assert result.returncode == 0, result.stderr
    return result


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


def shard_tokens(path: Path) -> np.ndarray:
    """The tokens of a shard, after a look at all a reader of the challenge relies on."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert len(header) == 256 and header[:2].tolist() == [20240520, 1] and not header[3:].any()
    assert len(raw) == 1024 + 2 * header[2]
    return np.frombuffer(raw[1024:], "<u2")


def stream(folder: Path, split: str) -> list[int]:
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    assert [path.name for path in paths] == [
        f"fineweb_{split}_{i:06d}.bin" for i in range(len(paths))
    ]
    return [token for path in paths for token in shard_tokens(path).tolist()]


def split_at_bos(tokens: list[int]) -> list[list[int]]:
    starts = [at for at, token in enumerate(tokens) if token == 1]
    assert starts[0] == 0
    return [tokens[a + 1 : b] for a, b in itertools.pairwise([*starts, len(tokens)])]


def only(paths) -> Path:
    (path,) = paths
    return path


def written(out: Path) -> tuple[Path, sentencepiece.SentencePieceProcessor, dict]:
    """Return the one dataset folder below `out`, its tokenizer as readers find it, its manifest."""
    folder = only((out / "datasets").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    model = (folder / manifest["tokenizer"]).resolve(strict=True).read_bytes()
    assert hashlib.sha256(model).hexdigest() == manifest["tokenizer_sha256"]
    return folder, sentencepiece.SentencePieceProcessor(model_proto=model), manifest


def decoded(out: Path) -> dict[str, list[str]]:
    folder, tokenizer, _ = written(out)
    return {
        split: [tokenizer.decode(ids) for ids in split_at_bos(stream(folder, split))]
        for split in ("train", "val")
    }


def assert_refused(result: subprocess.CompletedProcess, *said: str) -> None:
    assert result.returncode != 0
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    for words in said:
        assert words in result.stderr


def made_up(count: int, seed: int) -> list[str]:
    """Return documents of ASCII with single spaces, which a tokenizer's normalization keeps."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(count)]


DOCUMENTS = made_up(300, 1)
OTHERS = made_up(20, 2)


def jsonl(documents: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)
    ).encode()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The same documents in each form, below a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("with a space") / "my texts"
    folder.mkdir()
    raw = jsonl(DOCUMENTS)
    forms = {
        "": raw,
        ".gz": gzip.compress(raw),
        ".bz2": bz2.compress(raw),
        ".xz": lzma.compress(raw),
    }
    for suffix, data in forms.items():
        (folder / f"book.jsonl{suffix}").write_bytes(data)
    (folder / "plain.txt").write_text("\n".join(DOCUMENTS))
    (folder / "other.txt").write_text(OTHERS[0])
    (folder / "others.jsonl").write_bytes(jsonl(OTHERS))
    return folder


@pytest.fixture(scope="module")
def model(library: Path) -> Path:
    path = library / "small.model"
    path.write_bytes(prepare.train_tokenizer(DOCUMENTS, VOCAB))
    return path


# ---- docs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_docs(tmp_path_factory) -> tuple[Path, Path]:
    """`docs` run into two folders, side by side because each takes seconds."""
    outs = tmp_path_factory.mktemp("docs") / "a", tmp_path_factory.mktemp("docs") / "b"
    running = [
        subprocess.Popen(
            [*COMMAND, str(out), "docs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for out in outs
    ]
    for process in running:
        said, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint.decode()
        assert b"1024" in said and b"\033" not in said, "no terminal codes in a pipe or a file"
    return outs


def test_docs_gives_the_same_bytes_each_time(two_docs):
    first, second = map(contents, two_docs)
    assert first == second
    folder = "datasets/docs_sp1024"
    assert sorted(first) == [
        f"{folder}/fineweb_train_000000.bin",
        f"{folder}/fineweb_val_000000.bin",
        f"{folder}/manifest.json",
        "tokenizers/docs_1024_bpe.model",
    ]


def test_docs_manifest_agrees_with_the_shards(two_docs):
    folder, tokenizer, manifest = written(two_docs[0])
    assert manifest["vocab_size"] == tokenizer.vocab_size() == 1024
    assert manifest["source"]["kind"] == "docs"
    for split in ("train", "val"):
        tokens = stream(folder, split)
        assert manifest[split]["tokens"] == len(tokens) and max(tokens) < 1024
        assert manifest[split]["documents"] == tokens.count(1) and tokens[0] == 1
        assert manifest[split]["shards"] == 1
        assert not {0, 2} & set(tokens)
        assert 1 < manifest[split]["bytes"] / len(tokens) < 5
    share = manifest["val"]["bytes"] / (manifest["val"]["bytes"] + manifest["train"]["bytes"])
    assert 0.035 < share < 0.08  # the document that reaches --val-fraction may be a long one


def test_docs_has_no_document_twice(two_docs):
    """Python has help topics of the same text, which may not part over the splits."""
    folder, _, _ = written(two_docs[0])
    both = [tuple(ids) for split in ("train", "val") for ids in split_at_bos(stream(folder, split))]
    assert len(both) > 500 and len(set(both)) == len(both)


def test_docs_tokenizer_has_the_settings_of_the_challenge(two_docs):
    _, tokenizer, _ = written(two_docs[0])
    assert [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()] == [
        0,
        1,
        2,
        3,
    ]
    assert [i for i in range(1024) if tokenizer.is_byte(i)] == list(range(4, 260))
    unseen = tokenizer.encode("\U0001f9ff", out_type=int)
    assert [tokenizer.id_to_piece(i) for i in unseen] == ["<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>"]
    space = tokenizer.piece_to_id("▁")
    assert tokenizer.id_to_piece(space) == "▁" and not tokenizer.is_unknown(space)
    assert not tokenizer.encode("module", out_type=str)[0].startswith("▁")
    assert tokenizer.encode("2024", out_type=str) == list("2024")


def test_docs_into_the_same_folder_is_refused(two_docs):
    before = contents(two_docs[0])
    assert_refused(run(two_docs[0], "docs"), "docs_sp1024 is there already", "--name")
    assert contents(two_docs[0]) == before


# ---- text ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(library, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("an out") / "not there yet"
    run_well(out, "text", library / "book.jsonl", "--tokenizer", model)
    return out


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_text_compressed_gives_the_same_shards(library, model, plain_run, tmp_path, suffix):
    run_well(tmp_path, "text", library / f"book.jsonl{suffix}", "--tokenizer", model)
    first, second = contents(plain_run), contents(tmp_path)
    manifests = [
        json.loads(each.pop(f"datasets/book_sp{VOCAB}/manifest.json")) for each in (first, second)
    ]
    assert first == second and len(first) == 3
    sources = [manifest.pop("source") for manifest in manifests]
    assert [source["files"] for source in sources] == [["book.jsonl"], [f"book.jsonl{suffix}"]]
    assert manifests[0] == manifests[1]


def test_text_can_be_read_back_from_the_shards(model, plain_run):
    folder, tokenizer, manifest = written(plain_run)
    texts = decoded(plain_run)
    assert sorted(texts["train"] + texts["val"]) == sorted(DOCUMENTS)
    for split, documents in texts.items():
        kept = set(documents)
        assert documents == [text for text in DOCUMENTS if text in kept], (
            "the order of the file is kept"
        )
        assert manifest[split]["bytes"] == sum(map(len, documents))
        assert manifest[split]["documents"] == len(documents)
        assert manifest[split]["tokens"] == len(stream(folder, split))
        assert stream(folder, split) == [
            i for text in documents for i in [1, *tokenizer.encode(text)]
        ]
    assert 3 <= len(texts["val"]) <= 30  # 4 % of 300, by hash
    assert (plain_run / "tokenizers" / f"book_{VOCAB}_bpe.model").read_bytes() == model.read_bytes()


def test_text_with_its_own_validation_files(library, model, tmp_path):
    run_well(
        tmp_path,
        "text",
        library / "book.jsonl",
        "--val",
        library / "others.jsonl",
        "--tokenizer",
        model,
        "--name",
        "mine",
    )
    assert decoded(tmp_path) == {"train": DOCUMENTS, "val": OTHERS}
    folder, _, manifest = written(tmp_path)
    assert folder.name == f"mine_sp{VOCAB}"
    source = manifest["source"]
    assert (source["kind"], source["files"]) == ("text", ["book.jsonl"])
    assert source["val_files"] == ["others.jsonl"] and source["val_fraction"] is None


def test_text_validation_fraction(library, model, plain_run, tmp_path):
    run_well(
        tmp_path, "text", library / "book.jsonl", "--val-fraction", "0.5", "--tokenizer", model
    )
    texts = decoded(tmp_path)
    assert 100 < len(texts["val"]) < 200
    assert not set(texts["val"]) & set(texts["train"])
    assert set(decoded(plain_run)["val"]) < set(texts["val"]), "a larger share only adds documents"


def test_text_makes_a_tokenizer_from_plain_text(library, tmp_path):
    """A short .txt is one document beside --val; the normalization makes its line ends spaces."""
    run_well(
        tmp_path, "text", library / "plain.txt", "--val", library / "other.txt", "--vocab", VOCAB
    )
    folder, tokenizer, manifest = written(tmp_path)
    assert (
        folder.name == f"plain_sp{VOCAB}"
        and tokenizer.vocab_size() == manifest["vocab_size"] == VOCAB
    )
    assert decoded(tmp_path) == {"train": [" ".join(DOCUMENTS)], "val": OTHERS[:1]}
    assert (tmp_path / "tokenizers" / f"plain_{VOCAB}_bpe.model").exists()


def test_text_tokenizer_sees_no_validation_text(library, tmp_path):
    strange = tmp_path / "strange.jsonl"
    strange.write_text(json.dumps({"text": "ÿþ ÿþ ÿþ " * 500}))
    run_well(tmp_path / "out", "text", library / "book.jsonl", "--val", strange, "--vocab", VOCAB)
    _, tokenizer, _ = written(tmp_path / "out")
    assert all(tokenizer.is_byte(i) for i in tokenizer.encode("ÿþ"))


def test_text_with_a_byte_order_mark(library, model, tmp_path):
    """As some editors write it, before the first line of JSON."""
    marked = tmp_path / "book.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + jsonl(DOCUMENTS))
    run_well(
        tmp_path / "out", "text", marked, "--val", library / "others.jsonl", "--tokenizer", model
    )
    assert decoded(tmp_path / "out")["train"] == DOCUMENTS


def damaged(data: bytes) -> bytes:
    """A .gz whose first block has a type there is none of: zlib complains, not gzip."""
    at = 10  # no file name in the header of gzip.compress
    return data[:at] + b"\xff" * 8 + data[at + 8 :]


GOOD = jsonl(DOCUMENTS)
BAD_FILES = {
    "missing file": ("nowhere.jsonl", None, ["nowhere.jsonl", "no such file"]),
    "wrong suffix": ("book.csv", GOOD, ["book.csv", ".txt .md", "--suffix .csv"]),
    "not JSON": ("bad.jsonl", GOOD + b'{"text": "half\n', ["bad.jsonl, line 301"]),
    "no text": (
        "bad.jsonl",
        jsonl(OTHERS) + b'{"body": "x"}\n' + GOOD,
        ["bad.jsonl, line 21", '"text"'],
    ),
    "text is a number": ("bad.jsonl", b'{"text": 7}\n' + GOOD, ["bad.jsonl, line 1"]),
    "half a character in JSON": (
        "bad.jsonl",
        GOOD + b'{"text": "\\ud800"}\n',
        ["bad.jsonl, line 301"],
    ),
    "deep JSON": ("bad.jsonl", GOOD + b"[" * 200_000 + b"\n", ["bad.jsonl, line 301"]),
    "not UTF-8 in JSON": ("bad.jsonl", GOOD + b'{"text": "\xff"}\n', ["bad.jsonl", "UTF-8"]),
    "not UTF-8": (
        "bad.txt",
        b"good " * 9000 + b"\xff\n",
        ["bad.txt", "UTF-8", r"b'\xff' at byte 45,000", "--errors replace"],
    ),
    "not UTF-8 in gzip": (
        "bad.md.gz",
        gzip.compress(b"good " * 9000 + b"\xe2\x82"),
        ["bad.md.gz", "UTF-8", r"b'\xe2\x82' at byte 45,000, unpacked"],
    ),
    "an image": ("bad.txt", b"\x89PNG\r\n\x1a\n\0\0", ["bad.txt", "UTF-8", "at byte 0)"]),
    "null characters": ("bad.txt", b"abc\0\0", ["bad.txt", "a null character at byte 3"]),
    "truncated gzip": ("bad.jsonl.gz", gzip.compress(GOOD)[:-2000], ["bad.jsonl.gz", "to its end"]),
    "truncated bzip2": (
        "bad.jsonl.bz2",
        bz2.compress(GOOD)[:-2000],
        ["bad.jsonl.bz2", "to its end"],
    ),
    "truncated xz": ("bad.jsonl.xz", lzma.compress(GOOD)[:-2000], ["bad.jsonl.xz", "to its end"]),
    "damaged gzip": ("bad.jsonl.gz", damaged(gzip.compress(GOOD)), ["bad.jsonl.gz", "to its end"]),
    "not gzip": ("bad.jsonl.gz", GOOD, ["bad.jsonl.gz", "to its end"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_text_says_what_is_wrong_with_a_file(library, model, tmp_path, case):
    name, data, said = BAD_FILES[case]
    bad, out = tmp_path / name, tmp_path / "out"
    if data is not None:
        bad.write_bytes(data)
    result = run(out, "text", library / "book.jsonl", bad, "--tokenizer", model)
    assert_refused(result, *said)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not out.exists()


def test_text_leaves_nothing_when_the_tokenizer_cannot_be_trained(tmp_path, library):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(GOOD + b"{\n")
    assert_refused(
        run(tmp_path / "out", "text", library / "book.jsonl", bad), "bad.jsonl, line 301"
    )
    assert_refused(
        run(tmp_path / "out", "text", library / "book.jsonl", "--vocab", 256), "--vocab 256"
    )
    (tmp_path / "empty.txt").touch()
    assert_refused(run(tmp_path / "out", "text", tmp_path / "empty.txt"), "no training text")
    assert not (tmp_path / "out").exists()


def test_text_refuses_what_is_no_tokenizer(library, tmp_path):
    for wrong in (library / "book.jsonl", library / "nowhere.model", library):
        assert_refused(
            run(tmp_path / "out", "text", library / "book.jsonl", "--tokenizer", wrong), str(wrong)
        )
    assert not (tmp_path / "out").exists()


def test_text_without_validation_text(library, model, tmp_path):
    """One document of .jsonl is not cut, and cannot be on both sides."""
    one = tmp_path / "one.jsonl"
    one.write_bytes(jsonl(OTHERS[:1] * 3))
    result = run(tmp_path / "out", "text", one, "--tokenizer", model)
    assert_refused(result, "there is no val text", "--val")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        ["--vocab", "100"],
        ["--vocab", "70000"],
        ["--vocab", "many"],
        ["--val-fraction", "0"],
        ["--val-fraction", "4"],
        ["--name", "a/b"],
        ["--suffix", "folder"],
        ["--suffix", ".md", ".gz"],
    ],
)
def test_text_refuses_options_out_of_range(library, tmp_path, option):
    result = run(tmp_path / "out", "text", library / "book.jsonl", *option)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: argument {option[0]}: needs " in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_text_keeps_what_is_there(library, model, plain_run, tmp_path):
    """Neither a dataset nor a tokenizer that other shards may need is replaced."""
    before = contents(plain_run)
    other = tmp_path / "book.jsonl"
    other.write_bytes(jsonl(OTHERS))
    for args in ([other], [library / "book.jsonl", "--val-fraction", "0.5"]):
        result = run(plain_run, "text", *args, "--tokenizer", model)
        assert_refused(result, "is there already", "--name")
    assert contents(plain_run) == before
    tokenizer = tmp_path / "tokenizers" / f"book_{VOCAB}_bpe.model"
    tokenizer.parent.mkdir()
    tokenizer.write_bytes(b"another")
    assert_refused(
        run(tmp_path, "text", library / "book.jsonl", "--tokenizer", model), "another tokenizer"
    )
    assert contents(tmp_path / "tokenizers") == {tokenizer.name: b"another"}


def test_text_again_says_where_the_dataset_lies(library, model, tmp_path):
    """The same text under another path is the same text; a dataset that is damaged is refused."""
    copy = tmp_path / "elsewhere" / "book.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(jsonl(DOCUMENTS))
    out = tmp_path / "out"
    first = run_well(out, "text", library / "book.jsonl", "--tokenizer", model)
    before = contents(out)
    again = run_well(out, "text", copy, "--tokenizer", model)
    folder, _, _ = written(out)
    for result in (first, again):
        assert result.stdout.splitlines()[-1].startswith(f"{folder}: ")
    assert "before" in again.stdout and contents(out) == before
    (folder / "fineweb_train_000000.bin").unlink()
    assert_refused(run(out, "text", copy, "--tokenizer", model), str(folder), "damaged")


def test_text_after_a_run_that_was_killed(library, model, plain_run, tmp_path):
    """What such a run leaves is under a name nobody reads, and goes with the next run."""
    left = tmp_path / "datasets" / f"book_sp{VOCAB}.part"
    left.mkdir(parents=True)
    (left / "fineweb_train_000007.bin").write_bytes(b"half")
    run_well(tmp_path, "text", library / "book.jsonl", "--tokenizer", model)
    assert contents(tmp_path) == contents(plain_run)


def test_out_that_is_a_file(library, model, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert_refused(
        run(tmp_path / "out", "text", library / "book.jsonl", "--tokenizer", model), "out"
    )
    assert (tmp_path / "out").read_text() == "mine"


# ---- One text file -------------------------------------------------------------------------------


def arguments(*args) -> argparse.Namespace:
    return prepare.build_parser().parse_args(["text", *map(str, args)])


def splits(*args) -> dict[str, list[str]]:
    """Return the documents of both splits that the arguments lead to, without a tokenizer."""
    parsed = arguments(*args)
    corpus = prepare.survey(prepare.find_inputs(parsed), parsed.val_fraction, parsed.errors)
    found: dict[str, list[str]] = {"train": [], "val": []}
    for split, text in corpus.pairs():
        found[split].append(text)
    return found


BOOK = "\n\n".join(made_up(2000, 5))


@pytest.mark.parametrize("name", ["book.txt", "book.md", "BOOK.TXT", "book.txt.xz", "book"])
@pytest.mark.parametrize("text", [BOOK, BOOK.replace("\n\n", "\n"), BOOK.replace("\n\n", " ")])
def test_the_last_part_of_one_text_file_becomes_validation(tmp_path, name, text):
    """Whether it has blank lines, lines, or one line only."""
    path = tmp_path / name
    with prepare.OPENERS.get(path.suffix, open)(path, "wt") as file:
        file.write(text)
    for fraction in (0.04, 0.5, 0.9):
        found = splits(path, "--val-fraction", fraction)
        assert "".join(found["train"] + found["val"]) == text
        assert 0.5 * fraction < len("".join(found["val"])) / len(text) <= fraction
        if "\n\n" in text:
            assert all(each.endswith("\n\n") for each in found["train"])


def test_one_text_file_is_enough(tmp_path):
    """The tokenizer knows nothing of the validation text, which alone has a word."""
    (tmp_path / "my book.txt").write_text(BOOK + "\n\n" + "ÿþ ÿþ ÿþ " * 300)
    result = run_well(tmp_path / "out", "text", tmp_path / "my book.txt", "--vocab", VOCAB)
    folder, tokenizer, manifest = written(tmp_path / "out")
    assert result.stdout.splitlines()[-1].startswith(f"{folder}: ") and result.stderr == ""
    assert folder.name == f"my book_sp{VOCAB}"
    assert min(manifest[split]["tokens"] for split in ("train", "val")) > 500
    assert all(tokenizer.is_byte(i) for i in tokenizer.encode("ÿþ"))
    texts = decoded(tmp_path / "out")
    assert " ".join(texts["train"]) in BOOK.replace("\n\n", " ")
    assert texts["val"][-1].endswith("ÿþ ÿþ ÿþ")


def test_text_that_is_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(prepare.PrepareError, match=r"short\.txt: 9 characters are too few"):
        splits(tmp_path / "short.txt")
    (tmp_path / "blank.txt").write_text(" \n" * 1000)
    with pytest.raises(prepare.PrepareError, match="no training text"):
        splits(tmp_path / "blank.txt")
    with pytest.raises(prepare.PrepareError, match=r"no val text in .*blank\.txt"):
        splits(tmp_path / "short.txt", "--val", tmp_path / "blank.txt")


def test_errors_replace(tmp_path):
    data = BOOK.encode().replace(b" ", b" \xff\0 ", 7)
    (tmp_path / "bad.txt").write_bytes(data)
    found = splits(tmp_path / "bad.txt", "--errors", "replace")
    replaced = data.decode("utf-8", "replace").replace("\0", "\ufffd")
    assert "".join(found["train"] + found["val"]) == replaced
    assert replaced.count("\ufffd") == 14


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
def test_first_bad_byte(monkeypatch, block):
    """However the file falls into blocks, the offset is that of the whole."""
    monkeypatch.setattr(prepare, "BLOCK_BYTES", block)
    good = "aé€😀".encode()
    for bad in (b"\xff", b"\xe2\x82", b"\xc3(", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\x80"):
        for data in (good + bad, good + bad + good, good + bad + b"\0", bad):
            with pytest.raises(UnicodeDecodeError) as caught:
                data.decode()
            assert prepare.first_bad_byte(io.BytesIO(data))[0] == caught.value.start
    for data in (good + b"\0", good + b"\0" + b"\xff"):
        assert prepare.first_bad_byte(io.BytesIO(data)) == (len(good), "a null character")


# ---- Folders, patterns and tables ----------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with text of many kinds, what is hidden, and what is no text."""
    folder = tmp_path / "my notes"
    for number, name in enumerate(
        [
            "a.md",
            "b/c.txt",
            "b/d.RST",
            "b/e.py",
            "f.html",
            ".git/g.txt",
            "__pycache__/h.txt",
            ".i.md",
        ]
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(DOCUMENTS[number])
    (folder / "j.png").write_bytes(b"\x89PNG")
    (folder / "k.jsonl.gz").write_bytes(gzip.compress(jsonl(OTHERS)))
    return folder


def names(folder: Path, *args) -> list[str]:
    train = prepare.find_inputs(arguments(*args)).train
    return [path.relative_to(folder).as_posix() for path in train]


def test_folders_and_patterns(tree, monkeypatch):
    known = ["a.md", "b/c.txt", "b/d.RST", "b/e.py", "k.jsonl.gz"]
    assert names(tree, tree) == known
    assert names(tree, tree, tree / "a.md", tree / "b") == known, "each file once"
    assert names(tree, tree, "--suffix", ".md", ".html") == ["a.md", "f.html"]
    assert names(tree, tree, "--suffix", ".rst") == ["b/d.RST"]
    assert names(tree, tree / "*.md") == ["a.md"]
    assert names(tree, tree / "**" / "[ac].*") == ["a.md", "b/c.txt"]
    assert names(tree, tree / "f.html", "--suffix", ".html") == ["f.html"]
    monkeypatch.chdir(tree)
    for argument in (".", "*.md", str(tree), "b/..", str(tree / "**" / "*.md")):
        assert prepare.name_of(argument) == "my notes"


def test_what_lies_nowhere_is_refused(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for argument, said in {
        tmp_path / "empty": r"empty: no file with \.txt \.md .*--suffix",
        tmp_path / "*.md": r"\*\.md: no file matches",
        tmp_path / "none": "none: no such file or folder",
        tmp_path / "pipe.txt": r"pipe\.txt: not a regular file",
        tree / "j.png": r"j\.png: only .* --suffix \.png",
        tree / "*": "are read",
    }.items():
        for args in ([argument], [tree, "--val", argument]):
            with pytest.raises(prepare.PrepareError, match=said):
                prepare.find_inputs(arguments(*args))
    with pytest.raises(prepare.PrepareError, match="--val names every file"):
        prepare.find_inputs(arguments(tree / "a.md", "--val", tree / "*.md"))


def test_validation_files_in_a_folder_are_not_trained_on(tree):
    found = splits(tree, "--val", tree / "b" / "c.txt")
    assert found["val"] == DOCUMENTS[1:2]
    assert sorted(found["train"]) == sorted([DOCUMENTS[0], *DOCUMENTS[2:4], *OTHERS])


def test_documents_of_many_files_part_by_what_they_say(tmp_path):
    """A text that occurs twice stays on one side, and even two files give validation text."""
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text(DOCUMENTS[number % 100])
    found = splits(tmp_path, "--val-fraction", 0.3)
    assert sorted(found["train"] + found["val"]) == sorted(2 * DOCUMENTS[:100])
    assert not set(found["train"]) & set(found["val"]) and 20 < len(found["val"]) < 100
    two = splits(tmp_path / "1.txt", tmp_path / "2.txt", "--val-fraction", 0.001)
    assert len(two["train"]) == len(two["val"]) == 1


def test_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, which reads .parquet, is missing")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [*DOCUMENTS, None, ""]
    for kind in (pyarrow.string(), pyarrow.large_string()):
        table = pyarrow.table({"id": list(range(302)), "text": pyarrow.array(texts, kind)})
        parquet.write_table(table, tmp_path / "t.parquet", row_group_size=70)
        with pyarrow.ipc.new_stream(tmp_path / "t.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
        for name in ("t.parquet", "t.arrow"):
            assert list(prepare.file_documents(tmp_path / name)) == DOCUMENTS
    found = splits(tmp_path / "t.parquet")
    assert sorted(found["train"] + found["val"]) == sorted(DOCUMENTS) and found["val"]
    for columns, said in (
        ({"body": ["a"]}, r"x\.parquet: no column text; its columns are body"),
        ({"text": [1]}, r"x\.parquet: the column text holds int64"),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
        with pytest.raises(prepare.PrepareError, match=said):
            splits(tmp_path / "x.parquet")
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes((tmp_path / "t.parquet").read_bytes()[:999])
        with pytest.raises(prepare.PrepareError, match=f"{name}: cannot be read as"):
            splits(tmp_path / name)


class Split(NamedTuple):
    """What of a split of `datasets` counts here."""

    cache_files: list[dict[str, str]]


def test_a_dataset_of_hugging_face(tmp_path, monkeypatch):
    """With a stand-in for `datasets` whose cache is of a form that needs no pyarrow."""
    there = {}
    for split, documents in (("train", DOCUMENTS), ("validation", OTHERS), ("test", ["never"])):
        (tmp_path / f"{split}.jsonl").write_bytes(jsonl(documents))
        there[split] = Split([{"filename": str(tmp_path / f"{split}.jsonl")}])
    asked = []

    def load_dataset(*args) -> dict[str, Split]:
        asked.append(args)
        if args[0] != "owner/data":
            raise ValueError("not found,\nreally")
        return there

    stand_in = types.SimpleNamespace(load_dataset=load_dataset, __file__="datasets.py")
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert splits("hf:owner/data") == {"train": DOCUMENTS, "val": OTHERS}
    assert splits("hf:owner/data:plain", "--val", tmp_path / "test.jsonl")["val"] == ["never"]
    assert asked == [("owner/data", None), ("owner/data", "plain")]
    with pytest.raises(prepare.PrepareError, match=r"hf:other: could not .*\(not found, really\)"):
        splits("hf:other")
    assert prepare.name_of("hf:owner/data:plain") == "data"
    del there["validation"]
    found = splits("hf:owner/data")
    assert sorted(found["train"] + found["val"]) == sorted(DOCUMENTS) and found["val"]
    del there["train"]
    with pytest.raises(prepare.PrepareError, match="has no split train; it has test"):
        splits("hf:owner/data")


@pytest.mark.parametrize("package", ["pyarrow", "datasets", "huggingface_hub", "tqdm"])
def test_a_missing_extra(tmp_path, library, model, package):
    """It ends what needs it with how to get it; without tqdm there is no bar, nothing else."""
    needed = {
        "pyarrow": ["text", library / "book.jsonl", tmp_path / "x.parquet"],
        "datasets": ["text", "hf:owner/data"],
        "huggingface_hub": ["fineweb"],
        "tqdm": ["text", library / "book.jsonl", "--tokenizer", model],
    }
    (tmp_path / "x.parquet").touch()
    program = (
        f"import runpy, sys; sys.modules[{package!r}] = None;"
        f" runpy.run_path({str(PREPARE)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "--out", tmp_path / "out", *needed[package]]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False
    )
    if package == "tqdm":
        assert result.returncode == 0 and written(tmp_path / "out")
    else:
        assert_refused(result, f"pip install {package}")
        assert result.returncode == 1 and not (tmp_path / "out").exists()


def test_a_folder_is_not_taken_for_a_package(tmp_path, monkeypatch):
    """As data/datasets would be, where the package `datasets` is not installed."""
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(prepare.PrepareError, match="x needs the package only_a_folder: pip"):
        prepare.require("only_a_folder", "x")


# ---- Streaming -----------------------------------------------------------------------------------


def test_sample_respects_its_limit_and_spans_the_corpus():
    """Twenty million characters go by; what is held is about what may be kept."""
    count, limit = 20_000, 200_000
    tracemalloc.start()
    kept = prepare.sample((f"{n:06d}" + "x" * 994 for n in range(count)), limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    numbers = [int(text[:6]) for text in kept]
    assert limit / 4 < sum(map(len, kept)) <= limit
    assert numbers == sorted(set(numbers))
    assert {10 * n // count for n in numbers} == set(range(10))
    assert peak < 3 * limit


def test_sample_keeps_all_of_a_small_corpus_and_something_of_a_long_document():
    assert prepare.sample(DOCUMENTS, 10**6) == DOCUMENTS
    assert prepare.sample([], 10) == []
    assert len(prepare.sample(["x" * 100, "y" * 100, "z" * 100], 10)) == 1


def test_long_text_is_cut_without_loss(tmp_path):
    """At a blank line if there is one, else at a line's end, else anywhere."""
    paragraphs = "".join(f"{text}\n{text}\n\n" for text in DOCUMENTS[:50])
    lines = "".join(f"{text}\n" for text in DOCUMENTS[50:100])
    line = "a long line " * 200
    text = f"\n\n  {paragraphs}{lines}{line}\n\nno line end here: ÿ"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    parts = list(prepare.file_documents(tmp_path / "long.txt", cut=500))
    assert parts == list(prepare.text_documents(io.StringIO(text), cut=500))
    assert "".join(parts) == text
    assert all(500 <= len(part) < 1500 for part in parts[:-1])
    places = list(itertools.accumulate(map(len, parts)))
    for part, place in zip(parts, places, strict=True):
        if place < len(paragraphs):
            assert part.endswith("\n\n")
        elif place < len(paragraphs + lines):
            assert part.endswith("\n")
    assert len(paragraphs + lines) + 1000 < places[-2], "the long line is cut"
    assert list(prepare.text_documents(io.StringIO(" \n\n"))) == []


def test_files_are_read_as_they_are_asked_for(tmp_path):
    """The first document comes before a fault at the end of the file is met."""
    (tmp_path / "a.jsonl").write_bytes(GOOD * 5 + b"{\n")
    documents = prepare.file_documents(tmp_path / "a.jsonl")
    assert next(documents) == DOCUMENTS[0]
    with pytest.raises(prepare.PrepareError, match=r"a\.jsonl, line 1501"):
        list(documents)


# ---- Shards --------------------------------------------------------------------------------------


def test_write_shard(tmp_path):
    path = prepare.write_shard(tmp_path / "fineweb_train_000000.bin", [1, 5, 65_535])
    assert shard_tokens(path).tolist() == [1, 5, 65_535] and prepare.shard_tokens(path) == 3
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-1])
    assert prepare.shard_tokens(path) is None
    path.write_bytes(prepare.shard_header(0, version=2))
    assert prepare.shard_tokens(path) is None


def test_an_interrupted_run_leaves_nothing(model, tmp_path):
    def documents():
        yield "train", DOCUMENTS[0]
        assert list((tmp_path / "out" / "datasets").iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.write_dataset(tmp_path / "out", "x", model.read_bytes(), {}, documents())
    assert not list((tmp_path / "out").iterdir())


def test_tokens_roll_over_into_further_shards(monkeypatch, model, tmp_path):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 4000)
    pairs = [*(("val", text) for text in OTHERS), *(("train", text) for text in DOCUMENTS)]
    prepare.write_dataset(tmp_path, "rolled", model.read_bytes(), {"kind": "test"}, iter(pairs))
    folder, tokenizer, manifest = written(tmp_path)
    for split, documents in (("train", DOCUMENTS), ("val", OTHERS)):
        assert stream(folder, split) == [
            i for text in documents for i in [1, *tokenizer.encode(text)]
        ]
        sizes = [len(shard_tokens(path)) for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
        assert set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
        assert manifest[split]["shards"] == len(sizes) and manifest[split]["tokens"] == sum(sizes)


def test_no_empty_shard_follows_a_full_one(monkeypatch, model, tmp_path):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    count = 1 + len(tokenizer.encode(DOCUMENTS[0]))
    monkeypatch.setattr(prepare, "SHARD_TOKENS", count)
    pairs = [("train", DOCUMENTS[0]), ("val", DOCUMENTS[0]), ("train", DOCUMENTS[0])]
    prepare.write_dataset(tmp_path, "full", model.read_bytes(), {"kind": "test"}, pairs)
    folder, _, _ = written(tmp_path)
    sizes = {path.name: len(shard_tokens(path)) for path in folder.glob("*.bin")}
    assert sizes == dict.fromkeys(
        ("fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"), count
    )


# ---- fineweb -------------------------------------------------------------------------------------

REPOSITORY = "someone/export"
NAME = "fineweb10B_sp1024"
SHARDS = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(3))]


def shard(tokens: list[int], said: int | None = None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens) if said is None else said
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


class Hub(ThreadingHTTPServer):
    """What of the Hugging Face hub a download of single files asks for, with faults on demand."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.faults: dict[str, str] = {}  # file name: "500", "reset" or "close"
        self.gets: list[str] = []

    def fetched(self, name: str) -> int:
        return self.gets.count(name)


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        path = self.path.removeprefix(f"/datasets/{REPOSITORY}/resolve/main/")
        data, name = self.server.files.get(path), path.split("/")[-1]
        fault = self.server.faults.get(name) if with_body else None
        if with_body:
            self.server.gets.append(name)
        if data is None or fault == "500":
            self.send_response(404 if data is None else 500)
            self.send_header("Content-Length", "0")
            if data is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            return self.end_headers()
        start = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body and fault is None:
            self.wfile.write(data[start:])
        elif with_body:
            self.wfile.write(
                data[start : len(data) // 2]
            )  # nothing more when asked to carry on from there
            self.close_connection = True
            if fault == "reset":
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()


@pytest.fixture
def hub(model):
    pytest.importorskip(
        "huggingface_hub", reason="huggingface_hub, which fetches shards, is not installed"
    )
    draw = random.Random(3)
    manifest = {
        "datasets": [
            {
                "name": NAME,
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 3, "files_val": 1},
            }
        ],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    files = {
        "datasets/manifest.json": json.dumps(manifest).encode(),
        "datasets/tokenizers/fineweb_1024_bpe.model": model.read_bytes(),
    }
    for number, name in enumerate(SHARDS):
        tokens = [draw.randrange(VOCAB) for _ in range(40_000 + number)]
        files[f"datasets/datasets/{NAME}/{name}"] = shard(tokens)
    server = Hub(files)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub: Hub, out: Path, *args) -> subprocess.CompletedProcess:
    """`fineweb` against the stand-in, with a cache of its own, no proxy and nobody's token."""
    return run(
        out,
        "fineweb",
        "--repo",
        REPOSITORY,
        *args,
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HOME=str(out.with_name("hf home")),
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )


def assert_fetch_fails(result: subprocess.CompletedProcess, *said: str) -> None:
    """Progress and the hub's own warnings may come first; the last thing said is what is wrong."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    at = result.stderr.rfind("error: ")
    assert at >= 0
    for words in said:
        assert words in result.stderr[at:], result.stderr


def assert_shards(hub: Hub, out: Path, names: list[str]) -> None:
    """Check that these shards are there as the hub has them, and no other."""
    there = {path.name: path.read_bytes() for path in (out / "datasets" / NAME).glob("*.bin")}
    assert there == {name: hub.files[f"datasets/datasets/{NAME}/{name}"] for name in names}


def test_fineweb_fetches_what_is_asked_for(hub, model, tmp_path):
    out = tmp_path / "my out"
    result = fetch(hub, out, "--train-shards", 2)
    assert result.returncode == 0, result.stderr
    assert_shards(hub, out, SHARDS[:3])
    folder, tokenizer, manifest = written(out)
    assert folder.name == NAME
    assert tokenizer.vocab_size() == manifest["vocab_size"] == VOCAB
    assert manifest["source"] == {"kind": "fineweb", "repository": REPOSITORY, "variant": "sp1024"}
    assert manifest["train"]["tokens"] == len(stream(folder, "train"))
    assert manifest["val"]["tokens"] == len(stream(folder, "val"))
    assert (out / "tokenizers" / "fineweb_1024_bpe.model").read_bytes() == model.read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["datasets", "tokenizers"]


def test_fineweb_again_fetches_only_what_is_wanting(hub, tmp_path):
    """More shards later; one cut short by a full disk; then fewer, with none thrown away."""
    out = tmp_path / "out"
    assert fetch(hub, out, "--train-shards", 1).returncode == 0
    with (out / "datasets" / NAME / SHARDS[0]).open("r+b") as file:
        file.truncate(5000)
    assert fetch(hub, out, "--train-shards", 3).returncode == 0
    assert_shards(hub, out, SHARDS)
    assert [hub.fetched(name) for name in SHARDS] == [2, 1, 1, 1]
    assert fetch(hub, out, "--train-shards", 1).returncode == 0
    assert_shards(hub, out, SHARDS)
    assert [hub.fetched(name) for name in SHARDS] == [2, 1, 1, 1]
    assert hub.fetched("fineweb_1024_bpe.model") == 1
    folder, _, manifest = written(out)
    assert manifest["train"]["tokens"] == len(stream(folder, "train")), (
        "a trainer takes all that lie there"
    )


def test_fineweb_refuses_what_the_export_has_not(hub, tmp_path):
    out = tmp_path / "out"
    assert_fetch_fails(fetch(hub, out, "--train-shards", 4), "--train-shards 4", f"{NAME} has 3")
    assert_fetch_fails(fetch(hub, out, "--train-shards", 0), "--train-shards 0")
    assert_fetch_fails(fetch(hub, out, "--variant", "sp9"), "--variant sp9", f"there are {NAME}")
    del hub.files["datasets/manifest.json"]
    assert_fetch_fails(fetch(hub, tmp_path / "none"), "datasets/manifest.json could not be fetched")
    assert not any(name.endswith((".bin", ".model")) for name in hub.gets)
    assert not (out / "datasets").exists()


@pytest.mark.parametrize("fault", ["500", "reset", "close"])
def test_fineweb_carries_on_after_the_connection_fails(hub, tmp_path, fault):
    out, broken = tmp_path / "out", SHARDS[2]
    hub.faults[broken] = fault
    assert_fetch_fails(fetch(hub, out, "--train-shards", 2), broken, "run the command again")
    assert_shards(hub, out, SHARDS[:2])
    assert not (out / "datasets" / NAME / "manifest.json").exists()
    tried = hub.fetched(broken)
    hub.faults.clear()
    result = fetch(hub, out, "--train-shards", 2)
    assert result.returncode == 0, result.stderr
    assert_shards(hub, out, SHARDS[:3])
    assert [hub.fetched(name) for name in SHARDS[:3]] == [1, 1, tried + 1]


def test_fineweb_refuses_a_shard_whose_header_and_size_disagree(hub, tmp_path):
    out, path = tmp_path / "out", f"datasets/datasets/{NAME}/{SHARDS[1]}"
    good = hub.files[path]
    for wrong in (shard([1, 5, 6], said=4), b"", b"<html>" * 400):
        hub.files[path] = wrong
        assert_fetch_fails(fetch(hub, out, "--train-shards", 1), SHARDS[1], "header")
        assert_shards(hub, out, SHARDS[:1])
    hub.files[path] = good
    assert fetch(hub, out, "--train-shards", 1).returncode == 0
    assert_shards(hub, out, SHARDS[:2])
