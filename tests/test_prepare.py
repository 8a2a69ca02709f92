"""data/prepare.py as a person runs it: a real process, real files, a stand-in for the hub on 127.0.0.1."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib.util
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

PREPARE = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
SPEC = importlib.util.spec_from_file_location("prepare", PREPARE)
prepare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prepare)

LIST = """the of and to in is you that it he was for on are as with his they at be this have from or one had
    by word but not what all were we when your can said there use an each which she do how their if will
    up other about out many then them these so some her would make like him into time has look two more 17
    99 write go, see. number no way could people my than first water been call who oil its now find"""
WORDS = LIST.split()
VOCAB = 400
COMMAND = [sys.executable, str(PREPARE), "--out"]


# ---- Helpers -----------------------------------------------------------------------------------------------


def run(out: Path, *args, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, str(out), *map(str, args)],
        capture_output=True,
        timeout=60,
        encoding="utf-8",
        check=False,
        env={**os.environ, **environment},
    )


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
    """The one dataset folder below `out`, its tokenizer found as a reader finds it, and its manifest."""
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
    """Documents of plain ASCII with single spaces, which the tokenizer's normalisation leaves as they are."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(count)]


DOCUMENTS = made_up(300, 1)
OTHERS = made_up(20, 2)


def jsonl(documents: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)
    ).encode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
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
def model(corpus: Path) -> Path:
    path = corpus / "small.model"
    path.write_bytes(prepare.train_tokenizer(DOCUMENTS, VOCAB))
    return path


# ---- docs --------------------------------------------------------------------------------------------------


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
    """What is trained on may not be in the validation text; Python has help topics of the same text."""
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


# ---- text --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(corpus, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("an out") / "not there yet"
    run_well(out, "text", corpus / "book.jsonl", "--tokenizer", model)
    return out


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_text_compressed_gives_the_same_shards(corpus, model, plain_run, tmp_path, suffix):
    run_well(tmp_path, "text", corpus / f"book.jsonl{suffix}", "--tokenizer", model)
    first, second = contents(plain_run), contents(tmp_path)
    manifests = [
        json.loads(each.pop(f"datasets/book_sp{VOCAB}/manifest.json")) for each in (first, second)
    ]
    assert first == second and len(first) == 3
    assert manifests[1].pop("source")["files"] == [f"book.jsonl{suffix}"]
    assert manifests[0].pop("source")["files"] == ["book.jsonl"]
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


def test_text_with_its_own_validation_files(corpus, model, tmp_path):
    run_well(
        tmp_path,
        "text",
        corpus / "book.jsonl",
        "--val",
        corpus / "others.jsonl",
        "--tokenizer",
        model,
        "--name",
        "mine",
    )
    assert decoded(tmp_path) == {"train": DOCUMENTS, "val": OTHERS}
    folder, _, manifest = written(tmp_path)
    assert folder.name == f"mine_sp{VOCAB}"
    assert manifest["source"] == {
        "kind": "text",
        "files": ["book.jsonl"],
        "val_files": ["others.jsonl"],
    }


def test_text_validation_fraction(corpus, model, plain_run, tmp_path):
    run_well(tmp_path, "text", corpus / "book.jsonl", "--val-fraction", "0.5", "--tokenizer", model)
    texts = decoded(tmp_path)
    assert 100 < len(texts["val"]) < 200
    assert not set(texts["val"]) & set(texts["train"])
    assert set(decoded(plain_run)["val"]) < set(texts["val"]), "a larger share only adds documents"


def test_text_makes_a_tokenizer_from_plain_text(corpus, tmp_path):
    """Without --tokenizer; a .txt is one document, whose line ends the normalisation makes spaces."""
    run_well(
        tmp_path, "text", corpus / "plain.txt", "--val", corpus / "other.txt", "--vocab", VOCAB
    )
    folder, tokenizer, manifest = written(tmp_path)
    assert (
        folder.name == f"plain_sp{VOCAB}"
        and tokenizer.vocab_size() == manifest["vocab_size"] == VOCAB
    )
    assert decoded(tmp_path) == {"train": [" ".join(DOCUMENTS)], "val": OTHERS[:1]}
    assert (tmp_path / "tokenizers" / f"plain_{VOCAB}_bpe.model").exists()


def test_text_tokenizer_sees_no_validation_text(corpus, tmp_path):
    strange = tmp_path / "strange.jsonl"
    strange.write_text(json.dumps({"text": "ÿþ ÿþ ÿþ " * 500}))
    run_well(tmp_path / "out", "text", corpus / "book.jsonl", "--val", strange, "--vocab", VOCAB)
    _, tokenizer, _ = written(tmp_path / "out")
    assert all(tokenizer.is_byte(i) for i in tokenizer.encode("ÿþ"))


def test_text_with_a_byte_order_mark(corpus, model, tmp_path):
    """As some editors write it, before the first line of JSON."""
    marked = tmp_path / "book.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + jsonl(DOCUMENTS))
    run_well(
        tmp_path / "out", "text", marked, "--val", corpus / "others.jsonl", "--tokenizer", model
    )
    assert decoded(tmp_path / "out")["train"] == DOCUMENTS


def damaged(data: bytes) -> bytes:
    """A .gz whose first block has a type there is none of: zlib complains, not gzip."""
    at = 10  # no file name in the header of gzip.compress
    return data[:at] + b"\xff" * 8 + data[at + 8 :]


GOOD = jsonl(DOCUMENTS)
BAD_FILES = {
    "missing file": ("nowhere.jsonl", None, ["nowhere.jsonl", "no such file"]),
    "wrong suffix": ("book.csv", GOOD, ["book.csv", ".txt and .jsonl"]),
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
    "not UTF-8": ("bad.txt", b"good " * 9000 + b"\xff\n", ["bad.txt", "UTF-8", r"b'\xff'"]),
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
def test_text_says_what_is_wrong_with_a_file(corpus, model, tmp_path, case):
    """With --tokenizer, so that the fault comes while shards are being written."""
    name, data, said = BAD_FILES[case]
    bad, out = tmp_path / name, tmp_path / "out"
    if data is not None:
        bad.write_bytes(data)
    assert_refused(run(out, "text", corpus / "book.jsonl", bad, "--tokenizer", model), *said)
    assert not out.exists() or not list(out.iterdir())


def test_text_leaves_nothing_when_the_tokenizer_cannot_be_trained(tmp_path, corpus):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(GOOD + b"{\n")
    assert_refused(run(tmp_path / "out", "text", corpus / "book.jsonl", bad), "bad.jsonl, line 301")
    assert_refused(
        run(tmp_path / "out", "text", corpus / "book.jsonl", "--vocab", 256), "--vocab 256"
    )
    (tmp_path / "empty.txt").touch()
    assert_refused(run(tmp_path / "out", "text", tmp_path / "empty.txt"), "no training text")
    assert not (tmp_path / "out").exists()


def test_text_refuses_what_is_no_tokenizer(corpus, tmp_path):
    for wrong in (corpus / "book.jsonl", corpus / "nowhere.model", corpus):
        assert_refused(
            run(tmp_path / "out", "text", corpus / "book.jsonl", "--tokenizer", wrong), str(wrong)
        )
    assert not (tmp_path / "out").exists()


def test_text_without_validation_text(corpus, model, tmp_path):
    """One short .txt is one document, and one document cannot be on both sides."""
    result = run(tmp_path / "out", "text", corpus / "plain.txt", "--tokenizer", model)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: there is no val text" in result.stderr and "--val" in result.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "option",
    [
        ["--vocab", "100"],
        ["--vocab", "70000"],
        ["--vocab", "many"],
        ["--val-fraction", "0"],
        ["--val-fraction", "4"],
        ["--name", "a/b"],
    ],
)
def test_text_refuses_options_out_of_range(corpus, tmp_path, option):
    result = run(tmp_path / "out", "text", corpus / "book.jsonl", *option)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: argument {option[0]}: needs " in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_text_keeps_what_is_there(corpus, model, plain_run, tmp_path):
    """Neither a dataset nor a tokenizer that other shards may need is replaced."""
    before = contents(plain_run)
    assert_refused(
        run(plain_run, "text", corpus / "book.jsonl", "--tokenizer", model), "is there already"
    )
    assert contents(plain_run) == before
    tokenizer = tmp_path / "tokenizers" / f"book_{VOCAB}_bpe.model"
    tokenizer.parent.mkdir()
    tokenizer.write_bytes(b"another")
    assert_refused(
        run(tmp_path, "text", corpus / "book.jsonl", "--tokenizer", model), "another tokenizer"
    )
    assert contents(tmp_path) == {f"tokenizers/{tokenizer.name}": b"another"}


def test_text_after_a_run_that_was_killed(corpus, model, plain_run, tmp_path):
    """What such a run leaves is under a name nobody reads, and goes with the next run."""
    left = tmp_path / "datasets" / f"book_sp{VOCAB}.part"
    left.mkdir(parents=True)
    (left / "fineweb_train_000007.bin").write_bytes(b"half")
    run_well(tmp_path, "text", corpus / "book.jsonl", "--tokenizer", model)
    assert contents(tmp_path) == contents(plain_run)


def test_out_that_is_a_file(corpus, model, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert_refused(
        run(tmp_path / "out", "text", corpus / "book.jsonl", "--tokenizer", model), "out"
    )
    assert (tmp_path / "out").read_text() == "mine"


# ---- Streaming ---------------------------------------------------------------------------------------------


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


def test_long_text_is_cut_at_line_ends_without_loss(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "TXT_DOCUMENT", 500)
    text = (
        "\n\n  "
        + "\n".join(DOCUMENTS[:100])
        + "\n"
        + "a long line " * 200
        + "\n\nno line end here: ÿ"
    )
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    for parts in (
        list(prepare.text_documents(io.StringIO(text))),
        list(prepare.file_documents(tmp_path / "long.txt")),
    ):
        assert "".join(parts) == text
        assert len(parts) > 20 and all(part.endswith("\n") for part in parts[:-1])
        assert all(len(part) >= 500 for part in parts[:-1])
        assert all(len(part) - len(part.splitlines()[-1]) <= 500 for part in parts)
    assert list(prepare.text_documents([])) == []


def test_files_are_read_as_they_are_asked_for(tmp_path):
    """The first document comes before a fault at the end of the file is met."""
    (tmp_path / "a.jsonl").write_bytes(GOOD * 5 + b"{\n")
    documents = prepare.file_documents(tmp_path / "a.jsonl")
    assert next(documents) == DOCUMENTS[0]
    with pytest.raises(prepare.PrepareError, match=r"a\.jsonl, line 1501"):
        list(documents)


# ---- Shards ------------------------------------------------------------------------------------------------


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


# ---- fineweb -----------------------------------------------------------------------------------------------

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
    """These shards are there as the hub has them, and no other file that a trainer would take for one."""
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
    """More shards later; a shard cut short by a full disk or a copy; then fewer, with none thrown away."""
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


def test_fineweb_without_huggingface_hub_says_how_to_get_it(tmp_path):
    program = (
        "import runpy, sys; sys.modules['huggingface_hub'] = None;"
        f" runpy.run_path({str(PREPARE)!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--out", str(tmp_path / "out"), "fineweb"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert_refused(result, "huggingface_hub", "pip install huggingface_hub")
    assert not (tmp_path / "out").exists()
