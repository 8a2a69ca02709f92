"""data/prepare.py: text of many kinds becomes shards that can be read back; bad input is refused."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece

from helpers import ROOT, environment, prepare

LIST = """the of and to in is you that it he was for on are as with his they at be this have
    from or one had by word but not what all were we when your can said there use an each
    which she do how their if will up other about out many then them these so some her
    would make like him into time has look two more 17 99 write go, see. number no way
    could people my than first water been call who oil its now find"""
WORDS = LIST.split()
VOCAB = 400


# ---- Helpers -------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a call of the program gave."""

    code: int
    out: str
    err: str


def run(out: Path, *args) -> Result:
    """Call the program."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = prepare.main(["--out", str(out), *map(str, args)])
    return Result(code, said.getvalue(), complained.getvalue())


def run_well(out: Path, *args) -> Result:
    result = run(out, *args)
    assert result.code == 0, result.err
    return result


def refusal(out: Path, *args) -> str:
    """Return the one line of a call that must fail and write nothing."""
    before = contents(out)
    result = run(out, *args)
    assert result.code == 1 and result.err.startswith("error: ") and result.err.count("\n") == 1
    assert contents(out) == before
    return result.err


def contents(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def shard_tokens(path: Path) -> list[int]:
    """The tokens of a shard, after a look at all a reader of the challenge relies on."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert len(header) == 256 and header[:2].tolist() == [20240520, 1] and not header[3:].any()
    assert len(raw) == 1024 + 2 * header[2]
    return np.frombuffer(raw[1024:], "<u2").tolist()


def stream(folder: Path, split: str) -> list[int]:
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    assert [path.name for path in paths] == [
        f"fineweb_{split}_{i:06d}.bin" for i in range(len(paths))
    ]
    return [token for path in paths for token in shard_tokens(path)]


def written(out: Path) -> tuple[Path, sentencepiece.SentencePieceProcessor, dict]:
    """Return the one dataset folder below `out`, its tokenizer as readers find it, its manifest."""
    (folder,) = (out / "datasets").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    model = (folder / manifest["tokenizer"]).resolve(strict=True).read_bytes()
    assert hashlib.sha256(model).hexdigest() == manifest["tokenizer_sha256"]
    return folder, sentencepiece.SentencePieceProcessor(model_proto=model), manifest


def decoded(out: Path) -> dict[str, list[str]]:
    """Return the documents of the one dataset, by split, after a look at what is counted."""
    folder, tokenizer, manifest = written(out)
    texts = {}
    for split in ("train", "val"):
        tokens = stream(folder, split)
        starts = [at for at, token in enumerate(tokens) if token == 1]
        assert starts[0] == 0 and not {0, 2} & set(tokens)
        pairs = itertools.pairwise([*starts, len(tokens)])
        texts[split] = [tokenizer.decode(tokens[a + 1 : b]) for a, b in pairs]
        assert manifest[split]["documents"] == len(starts)
        assert manifest[split]["tokens"] == len(tokens)
    return texts


def made_up(count: int, seed: int) -> list[str]:
    """Return documents of ASCII with single spaces, which a tokenizer's normalization keeps."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(count)]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


DOCUMENTS = made_up(300, 1)
OTHERS = made_up(20, 2)
GOOD = jsonl(DOCUMENTS)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Text in two forms, below a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("with a space") / "my texts"
    folder.mkdir()
    (folder / "book.jsonl").write_bytes(GOOD)
    (folder / "others.jsonl").write_bytes(jsonl(OTHERS))
    (folder / "plain.txt").write_text("\n".join(DOCUMENTS))
    return folder


@pytest.fixture(scope="module")
def model(library: Path) -> Path:
    path = library / "small.model"
    path.write_bytes(prepare.train_tokenizer(DOCUMENTS, VOCAB))
    return path


# ---- docs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    assert "vocabulary 1024" in run_well(out, "docs").out.splitlines()[-1]
    return out


def test_docs_gives_the_same_bytes_in_another_process(docs, tmp_path):
    """The order of sets, which PYTHONHASHSEED decides, must not matter."""
    command = [sys.executable, ROOT / "data" / "prepare.py", "--out", tmp_path, "docs"]
    env = environment({"PYTHONHASHSEED": "7"})
    done = subprocess.run(command, env=env, capture_output=True, timeout=300, check=True)
    assert b"\033" not in done.stdout + done.stderr, "no terminal codes in a pipe"
    first = contents(docs)
    assert first == contents(tmp_path)
    folder = "datasets/docs_sp1024"
    assert sorted(first) == [
        f"{folder}/fineweb_train_000000.bin",
        f"{folder}/fineweb_val_000000.bin",
        f"{folder}/manifest.json",
        "tokenizers/docs_1024_bpe.model",
    ]


def test_docs_documents(docs):
    """No document stands twice: Python has help topics of one text, which could part."""
    texts = decoded(docs)
    both = texts["train"] + texts["val"]
    assert len(both) > 500 and len(set(both)) == len(both)
    _, tokenizer, manifest = written(docs)
    assert manifest["vocab_size"] == tokenizer.vocab_size() == 1024
    share = manifest["val"]["bytes"] / (manifest["val"]["bytes"] + manifest["train"]["bytes"])
    assert 0.035 < share < 0.08  # the document that reaches --val-fraction may be a long one


def test_docs_tokenizer_has_the_settings_of_the_challenge(docs):
    _, tokenizer, _ = written(docs)
    kinds = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
    assert [kind() for kind in kinds] == [0, 1, 2, 3]
    assert [i for i in range(1024) if tokenizer.is_byte(i)] == list(range(4, 260))
    unseen = tokenizer.encode("\U0001f9ff", out_type=str)
    assert unseen == ["<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>"]
    assert not tokenizer.is_unknown(tokenizer.piece_to_id("▁"))
    assert not tokenizer.encode("module", out_type=str)[0].startswith("▁")
    assert tokenizer.encode("2024", out_type=str) == list("2024")


def test_docs_into_the_same_folder_is_refused(docs, monkeypatch):
    short = {f"topic {number}": text for number, text in enumerate(DOCUMENTS)}
    monkeypatch.setattr(prepare, "python_documents", lambda: short)
    vocab = len(written(docs)[1])
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *args: model_of(docs, vocab))
    assert "docs_sp1024 is there already" in refusal(docs, "docs")


def model_of(out: Path, vocab: int) -> bytes:
    return (out / "tokenizers" / f"docs_{vocab}_bpe.model").read_bytes()


# ---- text ----------------------------------------------------------------------------------------


def test_text_can_be_read_back_from_the_shards(library, model, tmp_path):
    out = tmp_path / "not there yet"
    result = run_well(out, "text", library / "book.jsonl", "--tokenizer", model)
    texts = decoded(out)
    folder, tokenizer, manifest = written(out)
    assert sorted(texts["train"] + texts["val"]) == sorted(DOCUMENTS)
    assert 3 <= len(texts["val"]) <= 30  # 4 % of 300, by hash
    for split, documents in texts.items():
        kept = set(documents)
        assert documents == [text for text in DOCUMENTS if text in kept], "the file's order"
        assert manifest[split]["bytes"] == sum(map(len, documents))
        expected = [[1, *tokenizer.encode(text)] for text in documents]
        assert stream(folder, split) == list(itertools.chain(*expected))
    last = f"{folder}: {manifest['train']['tokens']:,} training and "
    assert result.out.splitlines()[-1].startswith(last) and result.err == ""
    assert (out / "tokenizers" / f"book_{VOCAB}_bpe.model").read_bytes() == model.read_bytes()


def test_text_with_its_own_validation_files(library, model, tmp_path):
    marked = tmp_path / "book.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + GOOD)  # some editors put a byte order mark there
    others, out = library / "others.jsonl", tmp_path / "out"
    run_well(out, "text", marked, "--val", others, "--tokenizer", model, "--name", "mine")
    assert decoded(out) == {"train": DOCUMENTS, "val": OTHERS}
    assert written(out)[0].name == f"mine_sp{VOCAB}"


def test_text_trains_a_tokenizer_that_sees_no_validation_text(tmp_path):
    """One text file is enough; a word of its last part alone is spelled in bytes."""
    (tmp_path / "my book.txt").write_text(BOOK + "\n\n" + "ÿþ ÿþ ÿþ " * 300)
    run_well(tmp_path / "out", "text", tmp_path / "my book.txt", "--vocab", VOCAB)
    folder, tokenizer, manifest = written(tmp_path / "out")
    assert folder.name == f"my book_sp{VOCAB}"
    assert tokenizer.vocab_size() == manifest["vocab_size"] == VOCAB
    assert all(tokenizer.is_byte(i) for i in tokenizer.encode("ÿþ"))
    texts = decoded(tmp_path / "out")
    assert " ".join(texts["train"]) in BOOK.replace("\n\n", " ")
    assert texts["val"][-1].endswith("ÿþ ÿþ ÿþ")


def test_tokenizer_of_a_long_text_is_trained_on_a_share(monkeypatch):
    monkeypatch.setattr(prepare, "TRAINER_BYTES", 10)
    size = sum(map(len, DOCUMENTS))
    first = [*DOCUMENTS[:1], *(["ÿ" * 100] * 299)]
    assert prepare.train_tokenizer(first, VOCAB, size) == prepare.train_tokenizer(
        DOCUMENTS[:1], VOCAB
    )


def test_tokens_roll_over_into_further_shards(monkeypatch, model, tmp_path):
    """Also where a shard is exactly full, and no empty one follows."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 4000)
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1 + len(tokenizer.encode(OTHERS[0])))
    pairs = [("val", OTHERS[0]), *(("train", text) for text in DOCUMENTS)]
    prepare.write_dataset(tmp_path, "rolled", model.read_bytes(), {"kind": "test"}, iter(pairs))
    assert decoded(tmp_path) == {"train": DOCUMENTS, "val": OTHERS[:1]}
    folder, _, manifest = written(tmp_path)
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        sizes = [len(shard_tokens(path)) for path in paths]
        assert set(sizes[:-1]) <= {prepare.SHARD_TOKENS} and 0 < sizes[-1] <= prepare.SHARD_TOKENS
        assert manifest[split]["shards"] == len(sizes)


def test_an_interrupted_run_leaves_nothing(model, tmp_path):
    """What a killed run leaves is under a name nobody reads, and goes with the next one."""
    left = tmp_path / "out" / "datasets" / f"x_sp{VOCAB}.part" / "fineweb_train_000007.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")

    def documents():
        yield "train", DOCUMENTS[0]
        assert left.parent.exists() and not left.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.write_dataset(tmp_path / "out", "x", model.read_bytes(), {}, documents())
    assert not list((tmp_path / "out").iterdir())


# ---- Text that is there already ------------------------------------------------------------------


def test_text_again_says_where_the_dataset_lies(library, model, tmp_path):
    """The same text under another path is the same text; a damaged dataset is refused."""
    copy = tmp_path / "book.jsonl"
    copy.write_bytes(GOOD)
    out = tmp_path / "out"
    run_well(out, "text", library / "book.jsonl", "--tokenizer", model)
    before = contents(out)
    again = run_well(out, "text", copy, "--tokenizer", model)
    folder, _, _ = written(out)
    last = again.out.splitlines()[-1]
    assert last.startswith(f"{folder}: ") and "before" in last and contents(out) == before
    (folder / "fineweb_train_000000.bin").unlink()
    assert "damaged" in refusal(out, "text", copy, "--tokenizer", model)


def test_another_suffix_is_another_text(model, tmp_path):
    """The same bytes give other documents where they are read in another way."""
    folder = tmp_path / "notes"
    folder.mkdir()
    file = folder / "a.jsonl"
    file.write_bytes(GOOD)
    (folder / "b.txt").write_text(BOOK)
    run_well(tmp_path, "text", folder, "--tokenizer", model)
    file.rename(folder / "a.txt")
    assert "is there already" in refusal(tmp_path, "text", folder, "--tokenizer", model)


def test_text_keeps_what_is_there(library, model, tmp_path):
    """Neither a dataset nor a tokenizer that other shards may need is replaced."""
    book, out = library / "book.jsonl", tmp_path / "out"
    run_well(out, "text", book, "--tokenizer", model)
    others = tmp_path / "book.jsonl"
    others.write_bytes(jsonl(OTHERS))
    for args in ([others, "--val-fraction", 0.5], [book, "--val-fraction", 0.5]):
        error = refusal(out, "text", *args, "--tokenizer", model)
        assert "is there already" in error and "--name" in error
    tokenizer = tmp_path / "new" / "tokenizers" / f"book_{VOCAB}_bpe.model"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_bytes(b"another")
    error = refusal(tmp_path / "new", "text", book, "--tokenizer", model)
    assert "another tokenizer" in error


# ---- Bad input -----------------------------------------------------------------------------------


def damaged(data: bytes) -> bytes:
    """A .gz whose first block has a type there is none of: zlib complains, not gzip."""
    at = 10  # no file name in the header of gzip.compress
    return data[:at] + b"\xff" * 8 + data[at + 8 :]


BAD_FILES = {
    "not JSON": ("a.jsonl", GOOD + b'{"text": "half\n', ["a.jsonl, line 301", '"text"']),
    "no text": ("a.jsonl", GOOD + b'{"body": "x"}\n', ["a.jsonl, line 301", '"text"']),
    "a number": ("a.jsonl", b'{"text": 7}\n' + GOOD, ["a.jsonl, line 1:"]),
    "half a character": ("a.jsonl", b'{"text": "\\ud800"}\n' + GOOD, ["a.jsonl, line 1:"]),
    "deep JSON": ("a.jsonl", GOOD + b"[" * 200_000 + b"\n", ["a.jsonl, line 301"]),
    "Latin in JSON": ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl, line 1", "UTF-8", "0xff"]),
    "Latin": ("a.txt", b"good \n\r\n" * 9 + b"a\xe9b\n", ["line 19", "byte 0xe9", "iconv"]),
    "a long line": ("a.txt", b"one\n" + b"x" * 200_000 + b"\xff", ["a.txt, line 2", "byte 0xff"]),
    "in gzip": ("a.md.gz", gzip.compress(b"ok\n\xe2\x82"), ["a.md.gz, line 2", "UTF-8"]),
    "an image": ("a.png", b"\x89PNG\r\n\x1a\n\0\0", ["a.png, line 1", "not UTF-8"]),
    "null": ("a.txt", b"abc\0\0", ["a.txt, line 1", "a null character"]),
    "half a gzip": ("a.jsonl.gz", gzip.compress(GOOD)[:-2000], ["a.jsonl.gz", "to its end"]),
    "half a bzip2": ("a.jsonl.bz2", bz2.compress(GOOD)[:-2000], ["a.jsonl.bz2", "to its end"]),
    "half an xz": ("a.jsonl.xz", lzma.compress(GOOD)[:-2000], ["a.jsonl.xz", "to its end"]),
    "bad gzip": ("a.jsonl.gz", damaged(gzip.compress(GOOD)), ["a.jsonl.gz", "to its end"]),
    "no gzip": ("a.jsonl.gz", GOOD, ["a.jsonl.gz", "to its end"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_text_says_what_is_wrong_with_a_file(library, model, tmp_path, case):
    name, data, said = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    book = library / "book.jsonl"
    error = refusal(tmp_path / "out", "text", book, tmp_path / name, "--tokenizer", model)
    assert all(words in error for words in said), error
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("2 shrt")
    (tmp_path / "blank.txt").write_text(" \n" * 1000)
    (tmp_path / "one.jsonl").write_bytes(jsonl(OTHERS[:1] * 3))
    short, blank = tmp_path / "short.txt", tmp_path / "blank.txt"
    out = tmp_path / "out"
    assert "short.txt: 5 characters are too few" in refusal(out, "text", short)
    assert "no training text" in refusal(out, "text", blank)
    assert "no val text" in refusal(out, "text", short, "--val", blank)
    assert "no val text" in refusal(out, "text", tmp_path / "one.jsonl"), "equal documents"


def test_options_that_have_no_meaning(library, model, tmp_path):
    book, out = library / "book.jsonl", tmp_path / "out"
    for option in (
        ["--vocab", "100"],
        ["--vocab", "70000"],
        ["--val-fraction", "0"],
        ["--val-fraction", "4"],
        ["--name", "a/b"],
    ):
        assert f"{' '.join(option)}" in refusal(out, "text", book, *option)
    assert "--vocab 256: no tokenizer" in refusal(out, "text", book, "--vocab", 256)
    for wrong in (book, library / "nowhere.model", library):
        assert str(wrong) in refusal(out, "text", book, "--tokenizer", wrong)
    assert not out.exists()
    out.write_text("mine")
    assert "out" in refusal(out, "text", book, "--tokenizer", model)


# ---- How files part into documents and splits ----------------------------------------------------

BOOK = "\n\n".join(made_up(2000, 5))


def splits(*names, val=(), fraction: float = 0.04) -> dict[str, list[str]]:
    """Return the documents of both splits, without a tokenizer."""
    sources = prepare.find_sources([*map(str, names)], [*map(str, val)])
    found: dict[str, list[str]] = {"train": [], "val": []}
    for split, text in prepare.Corpus(*sources, fraction).pairs():
        found[split].append(text)
    return found


@pytest.mark.parametrize("name", ["book.txt", "BOOK.MD", "book.html", "book.txt.xz", "book"])
@pytest.mark.parametrize("between", ["\n\n", "\n", " "])
def test_the_last_part_of_one_text_file_becomes_validation(tmp_path, name, between):
    """Whether it has blank lines, lines, or one line only."""
    path, text = tmp_path / name, BOOK.replace("\n\n", between)
    path.write_bytes(lzma.compress(text.encode()) if name.endswith(".xz") else text.encode())
    for fraction in (0.04, 0.5, 0.9):
        found = splits(path, fraction=fraction)
        assert "".join(found["train"] + found["val"]) == text
        assert 0.5 * fraction < len("".join(found["val"])) / len(text) <= 1.01 * fraction
        if between == "\n\n":
            assert all(each.endswith("\n\n") for each in found["train"])


@pytest.mark.parametrize("blank", ["\n", "    \n", "\t"])
def test_blank_lines_do_not_shift_validation(tmp_path, blank):
    """However many there are: they hold no text. Documents are up to 3% of this book."""

    def held_out(text: str) -> list[str]:
        (tmp_path / "book.txt").write_text(text)
        found = splits(tmp_path / "book.txt", fraction=0.1)
        assert "".join(found["train"] + found["val"]).split() == BOOK.split()
        return "".join(found["val"]).split()

    expected, parts, many = held_out(BOOK), BOOK.split("\n\n"), blank * 300_000
    assert held_out(BOOK + "\n\n" + many) == expected
    for text in (many + BOOK, "\n\n".join([*parts[:1500], many, *parts[1500:]])):
        assert abs(len(held_out(text)) - len(expected)) < 0.03 * len(BOOK.split())


def test_long_text_is_cut_without_loss(tmp_path):
    """At a blank line if there is one, else at a line's end, else anywhere."""
    paragraphs = "".join(f"{text}\n{text}\n\n" for text in DOCUMENTS[:50])
    lines = "".join(f"{text}\n" for text in DOCUMENTS[50:100])
    text = f"\n\n  {paragraphs}{lines}{'a long line ' * 200}\n\nno line end here: ÿ"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    parts = list(prepare.documents_of(tmp_path / "long.txt", cut=500))
    assert "".join(parts) == text
    assert all(500 <= len(part) < 1500 for part in parts[:-1])
    places = list(itertools.accumulate(map(len, parts)))
    for part, place in zip(parts, places, strict=True):
        if place < len(paragraphs):
            assert part.endswith("\n\n")
        elif place < len(paragraphs + lines):
            assert part.endswith("\n")
    assert len(paragraphs + lines) + 1000 < places[-2], "the long line is cut"


def test_files_are_read_as_they_are_asked_for(tmp_path):
    """The first document comes before a fault at the end of the file is met."""
    (tmp_path / "a.jsonl").write_bytes(GOOD * 5 + b"{\n")
    documents = prepare.documents_of(tmp_path / "a.jsonl")
    assert next(documents) == DOCUMENTS[0]
    with pytest.raises(prepare.PrepareError, match=r"a\.jsonl, line 1501"):
        list(documents)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with text of many kinds, what is hidden, and what is no text."""
    folder = tmp_path / "my notes"
    kinds = ["a.md", "b/c.txt", "b/d.RST", "b/e.py", "f.html", ".git/g.txt", "__pycache__/h.txt"]
    for text, name in zip(DOCUMENTS, [*kinds, ".i.md"], strict=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "j.png").write_bytes(b"\x89PNG")
    (folder / "k.jsonl.gz").write_bytes(gzip.compress(jsonl(OTHERS)))
    (folder / "l.jsonl.bz2").write_bytes(bz2.compress(jsonl(OTHERS)))
    return folder


def test_folders_and_patterns(tree, monkeypatch):
    def names(*args) -> list[str]:
        files = prepare.named_files([*map(str, args)]).values()
        return [path.relative_to(tree).as_posix() for path in files]

    known = ["a.md", "b/c.txt", "b/d.RST", "b/e.py", "k.jsonl.gz", "l.jsonl.bz2"]
    assert names(tree) == known
    assert names(tree, tree / "a.md", tree / "b") == known, "each file once"
    assert names(tree / "*.md") == ["a.md"]
    assert names(tree / "**" / "[acf].*") == ["a.md", "b/c.txt", "f.html"]
    monkeypatch.chdir(tree)
    for argument in (".", "*.md", str(tree), "b/..", str(tree / "**" / "*.md")):
        assert prepare.name_of(argument) == "my notes"
    assert prepare.name_of("hf:owner/data.v2:plain") == "data"


def test_what_lies_nowhere_is_refused(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for argument, said in {
        tmp_path / "empty": r"empty: no file with \.txt \.md .*pattern",
        tmp_path / "*.md": r"\*\.md: no such file or folder, or a pattern",
        tmp_path / "none": "none: no such file or folder",
        tmp_path / "pipe.txt": r"pipe\.txt: not a regular file",
    }.items():
        for names, val in (([argument], []), ([tree], [argument])):
            with pytest.raises(prepare.PrepareError, match=said):
                splits(*names, val=val)
    with pytest.raises(prepare.PrepareError, match="--val names every file"):
        splits(tree / "a.md", val=[tree / "*.md"])


def test_validation_files_in_a_folder_are_not_trained_on(tree):
    found = splits(tree, val=[tree / "b" / "c.txt"])
    assert found["val"] == DOCUMENTS[1:2]
    assert sorted(found["train"]) == sorted([DOCUMENTS[0], *DOCUMENTS[2:4], *OTHERS, *OTHERS])


def test_documents_of_many_files_part_by_what_they_say(tmp_path):
    """A text that occurs twice stays on one side, and even two files give validation text."""
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text(DOCUMENTS[number % 100])
    found = splits(tmp_path, fraction=0.3)
    assert sorted(found["train"] + found["val"]) == sorted(2 * DOCUMENTS[:100])
    assert not set(found["train"]) & set(found["val"]) and 20 < len(found["val"]) < 100
    more = splits(tmp_path, fraction=0.6)
    assert set(found["val"]) < set(more["val"]), "a larger share only adds documents"
    two = splits(tmp_path / "1.txt", tmp_path / "2.txt", fraction=0.001)
    assert len(two["train"]) == len(two["val"]) == 1


# ---- Tables and datasets -------------------------------------------------------------------------


def test_tables(tmp_path, monkeypatch):
    """Through the real `datasets`: rows without a text are left out, "NA" is one."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    # Without the package, a folder data/datasets would be imported, which has no version.
    datasets = pytest.importorskip("datasets", minversion="3")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [*DOCUMENTS, "NA"]
    table = pyarrow.table({"id": list(range(303)), "text": [*texts, None, ""]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "t.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    (tmp_path / "t.json").write_text(json.dumps([{"text": text} for text in texts]))
    for name in ("t.parquet", "t.arrow", "t.csv", "t.json"):
        assert list(prepare.documents_of(prepare.open_file(tmp_path / name))) == texts
    found = splits(tmp_path / "t.parquet")
    assert sorted(found["train"] + found["val"]) == sorted(texts) and found["val"]
    for columns in ({"body": ["a"]}, {"text": [1]}, {"text": [["a"]]}):
        parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
        said = rf"x\.parquet: needs a column text of strings; it has {next(iter(columns))}"
        with pytest.raises(prepare.PrepareError, match=said):
            splits(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:999])
    with pytest.raises(prepare.PrepareError, match=r"x\.parquet: could not be loaded \(.*arquet"):
        splits(tmp_path / "x.parquet")


class Rows:
    """What of a split of `datasets` counts here."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.column_names = texts, ["text"]
        self.features = {"text": types.SimpleNamespace(dtype="string")}

    def select_columns(self, name: str) -> Rows:
        assert name == "text"
        return self

    def iter(self, batch_size: int):
        for at in range(0, len(self.texts), batch_size):
            yield {"text": self.texts[at : at + batch_size]}


def test_a_dataset_of_hugging_face(tmp_path, monkeypatch):
    there = {"train": Rows(DOCUMENTS), "validation": Rows(OTHERS), "test": Rows(["never"])}
    asked = []

    def load_dataset(*args) -> dict[str, Rows]:
        asked.append(args)
        if args[0] != "owner/data":
            raise ValueError("not found,\nreally")
        return there

    stand_in = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    (tmp_path / "mine.jsonl").write_bytes(jsonl(["mine"]))
    assert splits("hf:owner/data") == {"train": DOCUMENTS, "val": OTHERS}
    assert splits("hf:owner/data:plain", val=[tmp_path / "mine.jsonl"])["val"] == ["mine"]
    assert asked == [("owner/data", None), ("owner/data", "plain")]
    with pytest.raises(prepare.PrepareError, match=r"hf:other: could not .*\(not found, really\)"):
        splits("hf:other")
    del there["validation"]
    found = splits("hf:owner/data")
    assert sorted(found["train"] + found["val"]) == sorted(DOCUMENTS) and found["val"]
    del there["train"]
    with pytest.raises(prepare.PrepareError, match="has no split train; it has test"):
        splits("hf:owner/data")


def test_a_missing_extra(tmp_path, library, model, monkeypatch):
    """It ends what needs it with how to get it; without tqdm there is no bar, nothing else."""
    (tmp_path / "x.parquet").touch()
    (tmp_path / "x.jsonl.zst").touch()
    # A folder such as data/datasets is a package, but holds nothing.
    for module in (None, types.ModuleType("datasets")):
        monkeypatch.setitem(sys.modules, "datasets", module)
        for name in (tmp_path / "x.parquet", tmp_path / "x.jsonl.zst", "hf:owner/data"):
            error = refusal(tmp_path / "out", "text", name)
            assert f"{name} needs the package datasets: pip install -r data/req" in error
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "huggingface_hub: pip install -r data/req" in refusal(tmp_path / "out", "fineweb")
    monkeypatch.setattr(prepare, "tqdm", None)
    run_well(tmp_path / "out", "text", library / "book.jsonl", "--tokenizer", model)


# ---- fineweb -------------------------------------------------------------------------------------

NAME = "fineweb10B_sp1024"
SHARDS = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(3))]


class Hub:
    """A stand-in for the package `huggingface_hub`, which may fail for some files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.broken: set[str] = set()
        self.fetched: list[str] = []

    def hf_hub_download(
        self, repository: str, path: str, *, repo_type: str, local_dir: Path
    ) -> str:
        assert (repository, repo_type) == ("someone/export", "dataset")
        name = path.split("/")[-1]
        if name in self.broken or path not in self.files:
            raise OSError(f"{name}:\nconnection lost")
        self.fetched.append(name)
        target = local_dir / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.files[path])
        return str(target)


@pytest.fixture
def hub(model, monkeypatch) -> Hub:
    published = {
        "datasets": [
            {"name": NAME, "tokenizer_name": "bpe", "stats": {"files_train": 3, "files_val": 1}}
        ],
        "tokenizers": [{"name": "bpe", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    files = {
        "datasets/manifest.json": json.dumps(published).encode(),
        "datasets/tokenizers/fineweb_1024_bpe.model": model.read_bytes(),
    }
    for number, name in enumerate(SHARDS):
        tokens = np.arange(4000 + number, dtype="<u2") % VOCAB
        body = prepare.shard_header(len(tokens)) + tokens.tobytes()
        files[f"datasets/datasets/{NAME}/{name}"] = body
    stand_in = Hub(files)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


def fetch(out: Path, *args) -> Result:
    return run(out, "fineweb", "--repo", "someone/export", *args)


def assert_fetch_fails(out: Path, *args, said: list[str]) -> None:
    """Progress may come first; the last line says what is wrong."""
    result = fetch(out, *args)
    last = result.err.splitlines()[-1]
    assert result.code == 1 and last.startswith("error: "), result.err
    assert all(words in last for words in said), last


def assert_shards(hub: Hub, out: Path, names: list[str]) -> None:
    """Check that these shards are there as the hub has them, and no other."""
    there = {path.name: path.read_bytes() for path in (out / "datasets" / NAME).glob("*.bin")}
    assert there == {name: hub.files[f"datasets/datasets/{NAME}/{name}"] for name in names}


def test_fineweb_fetches_only_what_is_wanting(hub, model, tmp_path):
    """More shards later; one cut short by a full disk; then fewer, with none thrown away."""
    out = tmp_path / "my out"
    assert fetch(out, "--train-shards", 1).code == 0
    assert_shards(hub, out, SHARDS[:2])
    with (out / "datasets" / NAME / SHARDS[0]).open("r+b") as file:
        file.truncate(5000)
    assert fetch(out, "--train-shards", 3).code == 0
    last = fetch(out, "--train-shards", 1).out
    assert_shards(hub, out, SHARDS)
    assert [hub.fetched.count(name) for name in SHARDS] == [2, 1, 1, 1]
    assert hub.fetched.count("fineweb_1024_bpe.model") == 1
    folder, tokenizer, manifest = written(out)
    assert last.startswith(f"{folder}: 12,006 training and 4,000 validation tokens"), "all there"
    assert tokenizer.vocab_size() == manifest["vocab_size"] == VOCAB
    assert manifest["train"]["tokens"] == len(stream(folder, "train")) == 12_006
    assert (out / "tokenizers" / "fineweb_1024_bpe.model").read_bytes() == model.read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["datasets", "tokenizers"]


def test_fineweb_refuses_what_the_export_has_not(hub, tmp_path):
    out = tmp_path / "out"
    assert_fetch_fails(out, "--train-shards", 4, said=["--train-shards 4", f"{NAME} has 3"])
    assert_fetch_fails(out, "--train-shards", 0, said=["--train-shards 0"])
    assert_fetch_fails(out, "--variant", "sp9", said=["--variant sp9", f"there are {NAME}"])
    del hub.files["datasets/manifest.json"]
    assert_fetch_fails(out, said=["datasets/manifest.json could not be fetched"])
    assert set(hub.fetched) == {"manifest.json"} and not (out / "datasets").exists()


def test_fineweb_carries_on_after_the_connection_fails(hub, tmp_path):
    out, args = tmp_path / "out", ["--train-shards", 2]
    hub.broken.add(SHARDS[2])
    assert_fetch_fails(out, *args, said=[SHARDS[2], "connection lost", "run the command again"])
    assert_shards(hub, out, SHARDS[:2])
    assert not (out / "datasets" / NAME / "manifest.json").exists()
    hub.broken.clear()
    assert fetch(out, *args).code == 0
    assert_shards(hub, out, SHARDS[:3])
    assert [hub.fetched.count(name) for name in SHARDS[:3]] == [1, 1, 1]


def test_fineweb_refuses_a_shard_whose_header_and_size_disagree(hub, tmp_path):
    out, path = tmp_path / "out", f"datasets/datasets/{NAME}/{SHARDS[1]}"
    good = hub.files[path]
    for wrong in (good[:-1], prepare.shard_header(0, version=2), b"", b"<html>" * 400):
        hub.files[path] = wrong
        assert_fetch_fails(out, "--train-shards", 1, said=[SHARDS[1], "header"])
        assert_shards(hub, out, SHARDS[:1])
    hub.files[path] = good
    assert fetch(out, "--train-shards", 1).code == 0
    assert_shards(hub, out, SHARDS[:2])
