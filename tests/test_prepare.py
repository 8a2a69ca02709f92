"""data/prepare.py: text of many kinds becomes shards that can be read back; bad input is said."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from helpers import prepare, read_shard, write_jsonl

DRAW = random.Random(1)
WORDS = ["".join(DRAW.choices("etaoinshrdlu", k=1 + n // 20)) for n in range(120)]
VOCAB = 400


def made_up(count: int) -> list[str]:
    """Return documents of ASCII with single spaces, which a tokenizer's normalization keeps."""
    return [" ".join(DRAW.choices(WORDS, k=DRAW.randint(20, 60))) for _ in range(count)]


DOCUMENTS = made_up(300)
OTHERS = made_up(20)
BOOK = "\n\n".join(made_up(2000))
GOOD = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
ZIPPED = gzip.compress(GOOD, mtime=0)


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """JSON lines below a folder with a space in its name."""
    return write_jsonl(tmp_path_factory.mktemp("my texts") / "book.jsonl", DOCUMENTS)


@pytest.fixture(scope="module")
def model(book: Path) -> Path:
    path = book.with_name("small.model")
    path.write_bytes(prepare.train_tokenizer(DOCUMENTS, VOCAB))
    return path


@pytest.fixture
def run_well(capsys):
    """run_well(out, *arguments): the lines that a call prints which must succeed."""

    def call(out: Path, *args: object) -> list[str]:
        code = prepare.main([*map(str, args), "--out", str(out)])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out.splitlines()

    return call


@pytest.fixture
def refusal(capsys):
    """refusal(out, *arguments): the last line of a call that must fail and change no dataset."""

    def call(out: Path, *args: object) -> str:
        before = contents(out)
        assert prepare.main([*map(str, args), "--out", str(out)]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and contents(out) == before
        return last

    return call


def contents(out: Path) -> dict[str, bytes]:
    files = [*out.glob("datasets/*/*"), *out.glob("tokenizers/*")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def shards(folder: Path, split: str) -> list[list[int]]:
    """Return the tokens of each shard, after a look at its header."""
    count = len(list(folder.glob(f"fineweb_{split}_*.bin")))
    paths = [folder / f"fineweb_{split}_{number:06d}.bin" for number in range(count)]
    for path in paths:
        header = np.fromfile(path, "<i4", 256).tolist()
        assert header == [20240520, 1, (path.stat().st_size - 1024) // 2, *[0] * 253]
    return [read_shard(path).tolist() for path in paths]


def decoded(out: Path) -> tuple[Path, sentencepiece.SentencePieceProcessor, dict[str, list[str]]]:
    """Return the one dataset's folder, its tokenizer and its documents by split.

    They must be what its manifest says.
    """
    (folder,) = (out / "datasets").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    model = (folder / manifest["tokenizer"]).resolve(strict=True).read_bytes()
    assert hashlib.sha256(model).hexdigest() == manifest["tokenizer_sha256"]
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert manifest["vocab_size"] == tokenizer.vocab_size()
    texts = {}
    for split in ("train", "val"):
        parts = shards(folder, split)
        tokens = [*itertools.chain(*parts)]
        starts = [at for at, token in enumerate(tokens) if token == 1]
        assert starts[0] == 0 and not {0, 2} & set(tokens)
        pairs = itertools.pairwise([*starts, len(tokens)])
        texts[split] = [tokenizer.decode(tokens[a + 1 : b]) for a, b in pairs]
        counts = {"documents": len(starts), "tokens": len(tokens), "shards": len(parts)}
        counts["bytes"] = manifest[split]["bytes"]  # a tokenizer may change spaces
        assert manifest[split] == counts
    return folder, tokenizer, texts


def splits(*names: object, val: tuple = (), fraction: float = 0.04) -> dict[str, list[str]]:
    """Return the documents of both splits, without a tokenizer."""
    sources = prepare.find_sources([*map(str, names)], [*map(str, val)])
    found: dict[str, list[str]] = {"train": [], "val": []}
    for split, text in prepare.Corpus(*sources, fraction).pairs():
        found[split].append(text)
    return found


# ---- Datasets ------------------------------------------------------------------------------------


def test_docs(run_well, tmp_path):
    """No document stands there twice, and the tokenizer is as the challenge has it."""
    (said,) = run_well(tmp_path, "docs")
    folder, tokenizer, texts = decoded(tmp_path)
    assert said.startswith(f"{folder}: ") and "vocabulary 1024" in said
    both = texts["train"] + texts["val"]
    assert len(both) > 500 and len(set(both)) == len(both)
    share = len("".join(texts["val"])) / len("".join(both))
    assert 0.035 < share < 0.08  # the document that reaches --val-fraction may be a long one
    assert [tokenizer.id_to_piece(i) for i in (0, 1, 2, 3)] == ["<pad>", "<s>", "</s>", "<unk>"]
    unseen = tokenizer.encode("\U0001f9ff", out_type=str)
    assert unseen == ["<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>"]
    assert not tokenizer.encode("module", out_type=str)[0].startswith("▁")
    assert tokenizer.encode("2024", out_type=str) == list("2024")


def test_text_and_its_validation_text_can_be_read_back(model, run_well, monkeypatch, tmp_path):
    """Tokens of --val fill one shard exactly, and no empty one follows; others fill many."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    full = 1 + len(tokenizer.encode(OTHERS[0]))
    monkeypatch.setattr(prepare, "SHARD_TOKENS", full)
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 4000)
    marked, out = tmp_path / "book.jsonl", tmp_path / "not there yet"
    marked.write_bytes(b"\xef\xbb\xbf" + GOOD)  # some editors put a byte order mark there
    others = write_jsonl(tmp_path / "others.jsonl", OTHERS[:1])
    run_well(out, "text", marked, "--val", others, "--tokenizer", model, "--name", "mine")
    folder, _, texts = decoded(out)
    assert texts == {"train": DOCUMENTS, "val": OTHERS[:1]}
    assert folder.name == f"mine_sp{VOCAB}"
    assert (out / "tokenizers" / f"mine_{VOCAB}_bpe.model").read_bytes() == model.read_bytes()
    for split in ("train", "val"):
        *first, last = map(len, shards(folder, split))
        assert set(first) <= {full} and 0 < last <= full


def test_text_trains_a_tokenizer_that_sees_no_validation_text(run_well, tmp_path):
    """One text file is enough; a word of its last part alone is spelled in bytes."""
    (tmp_path / "my book.txt").write_text(BOOK + "\n\n" + "ÿþ ÿþ ÿþ " * 300)
    run_well(tmp_path / "out", "text", tmp_path / "my book.txt", "--vocab", VOCAB)
    folder, tokenizer, texts = decoded(tmp_path / "out")
    assert folder.name == f"my book_sp{VOCAB}"
    assert all(tokenizer.is_byte(i) for i in tokenizer.encode("ÿþ"))
    assert " ".join(texts["train"]) in BOOK.replace("\n\n", " ")
    assert texts["val"][-1].endswith("ÿþ ÿþ ÿþ")


def test_an_interrupted_run_leaves_nothing(model, tmp_path):
    """What a killed run leaves is under a name nobody reads, and goes with the next one."""
    left = tmp_path / "datasets" / f"x_sp{VOCAB}.part" / "fineweb_train_000007.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")

    def documents():
        yield "train", DOCUMENTS[0]
        assert left.parent.exists() and not left.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.write_dataset(tmp_path, "x", model.read_bytes(), {}, documents())
    assert not contents(tmp_path)


def test_text_again(model, run_well, refusal, tmp_path):
    """The same text is found; another reading of the same bytes is another text, and refused."""
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    (notes / "a.jsonl").write_bytes(GOOD)
    (notes / "b.txt").write_text(BOOK)
    text = ("text", notes, "--tokenizer", model)
    run_well(out, *text)
    before = contents(out)
    (notes / "a.jsonl").rename(notes / "a.txt")
    assert "is there already" in refusal(out, *text)
    (notes / "a.txt").rename(notes / "aa.jsonl")
    assert "made from the same text before" in run_well(out, *text)[-1]
    assert contents(out) == before
    folder, _, _ = decoded(out)
    (folder / "fineweb_train_000000.bin").unlink()
    assert "damaged" in refusal(out, *text)
    folder.rename(tmp_path / "away")
    (out / "tokenizers" / f"notes_{VOCAB}_bpe.model").write_bytes(b"of other shards")
    assert "another tokenizer" in refusal(out, *text)


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.jsonl", b'{"text": "\\ud800"}\n' + GOOD, ["a.jsonl, line 1:", "whole characters"]),
        ("a.jsonl", GOOD + b"[" * 200_000 + b"\n", ["a.jsonl, line 301"]),
        ("a.txt", b"good \n\r\n" * 9 + b"a\xe9b\n", ["line 19", "byte 0xe9", "iconv"]),
        ("a.txt", b"abc\0\0", ["a.txt, line 1", "a null character"]),
        ("a.jsonl.gz", ZIPPED[:-2000], ["a.jsonl.gz", "to its end"]),
        ("a.jsonl.gz", ZIPPED[:10] + b"\xff" * 8 + ZIPPED[18:], ["a.jsonl.gz", "to its end"]),
        ("a.jsonl.xz", b"\xff" + lzma.compress(GOOD), ["a.jsonl.xz", "to its end"]),
    ],
)
def test_text_says_what_is_wrong_with_a_file(book, model, refusal, tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    error = refusal(tmp_path / "out", "text", book, tmp_path / name, "--tokenizer", model)
    assert all(words in error for words in said), error
    assert not (tmp_path / "out").exists()


def test_too_little_text_and_options_without_meaning(book, refusal, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("2 shrt")
    assert "short.txt: 5 characters are too few" in refusal(tmp_path, "text", short)
    short.write_text(" \n" * 1000)
    assert "no training text" in refusal(tmp_path, "text", short)
    equal = write_jsonl(tmp_path / "equal.jsonl", OTHERS[:1] * 3)
    assert "no val text" in refusal(tmp_path, "text", equal)
    for option in ("--vocab 70000", "--vocab 256", "--val-fraction 0", "--name a/b"):
        assert option in refusal(tmp_path, "text", book, *option.split())
    assert str(book) in refusal(tmp_path, "text", book, "--tokenizer", book)


# ---- How files part into documents and splits ----------------------------------------------------


@pytest.mark.parametrize(
    "name, between", [("BOOK.MD", "\n\n"), ("book.txt.xz", "\n"), ("book", " ")]
)
def test_the_last_part_of_one_text_file_becomes_validation(tmp_path, name, between):
    """Whether it has blank lines, lines, or one line only."""
    path, text = tmp_path / name, BOOK.replace("\n\n", between)
    path.write_bytes(lzma.compress(text.encode()) if name.endswith(".xz") else text.encode())
    for fraction in (0.04, 0.9):
        found = splits(path, fraction=fraction)
        assert "".join(found["train"] + found["val"]) == text
        assert 0.5 * fraction < len("".join(found["val"])) / len(text) <= 1.01 * fraction


def test_blank_lines_do_not_shift_validation(tmp_path):
    """However many there are: they hold no text. Documents are up to 3% of this book."""

    def held_out(text: str) -> list[str]:
        (tmp_path / "book.txt").write_text(text)
        return "".join(splits(tmp_path / "book.txt", fraction=0.1)["val"]).split()

    expected, parts, many = held_out(BOOK), BOOK.split("\n\n"), "    \n" * 150_000
    assert held_out(BOOK + "\n\n" + many) == expected
    for text in (many + BOOK, "\n\n".join([*parts[:1500], many, *parts[1500:]])):
        assert abs(len(held_out(text)) - len(expected)) < 0.03 * len(BOOK.split())


def test_folders_and_patterns(tmp_path):
    """Each file counts once; what is hidden is left out, and what is validation text."""
    for text, name in zip(DOCUMENTS, ["a.md", "b/c.txt", "f.html", ".git/g.txt"], strict=False):
        path = tmp_path / "my notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folder = tmp_path / "my notes"
    (folder / "k.jsonl.gz").write_bytes(ZIPPED)
    files = prepare.named_files([str(folder), str(folder / "b"), str(folder / "**" / "[af].*")])
    assert [path.name for path in files] == ["a.md", "c.txt", "k.jsonl.gz", "f.html"]
    with pytest.raises(prepare.PrepareError, match="no such file or folder, or a pattern"):
        splits(folder / "*.zip")
    with pytest.raises(prepare.PrepareError, match="--val names every file"):
        splits(folder / "a.md", val=(folder / "*.md",))
    found = splits(folder, val=(folder / "b" / "c.txt",))
    assert found["val"] == DOCUMENTS[1:2]
    assert sorted(found["train"]) == sorted([DOCUMENTS[0], *DOCUMENTS])


def test_documents_of_many_files_part_by_what_they_say(tmp_path):
    """A text that occurs twice stays on one side, and even two files give validation text."""
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text(DOCUMENTS[number % 100])
    found = splits(tmp_path, fraction=0.3)
    assert sorted(found["train"] + found["val"]) == sorted(2 * DOCUMENTS[:100])
    assert not set(found["train"]) & set(found["val"]) and 20 < len(found["val"]) < 100
    two = splits(tmp_path / "1.txt", tmp_path / "2.txt", fraction=0.001)
    assert len(two["train"]) == len(two["val"]) == 1


# ---- Through `datasets` --------------------------------------------------------------------------


def test_tables(tmp_path, monkeypatch):
    """Rows without a text are left out, "NA" is one; a split named validation is held out."""
    # Without the package, a folder data/datasets would be imported, which has no version.
    datasets = pytest.importorskip("datasets", minversion="3")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [*DOCUMENTS, "NA"]
    rows = datasets.Dataset.from_dict({"text": [*texts, None, ""]})
    rows.to_parquet(tmp_path / "t.parquet")
    rows.select(range(len(texts))).to_csv(tmp_path / "t.csv")
    for path in (tmp_path / "t.parquet", tmp_path / "t.csv"):
        assert list(prepare.documents_of(prepare.open_file(path))) == texts
    bad = tmp_path / "x.parquet"
    datasets.Dataset.from_dict({"body": ["a"]}).to_parquet(bad)
    with pytest.raises(prepare.PrepareError, match="needs a column text of strings; it has body"):
        splits(bad)
    bad.write_bytes((tmp_path / "t.parquet").read_bytes()[:999])
    with pytest.raises(prepare.PrepareError, match=r"x\.parquet: could not be loaded \(.*arquet"):
        splits(bad)
    others = datasets.Dataset.from_dict({"text": OTHERS})
    there = datasets.DatasetDict(train=rows, validation=others, test=others)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: there)
    assert splits("hf:owner/data:plain") == {"train": texts, "val": OTHERS}
    assert prepare.name_of("hf:owner/data:plain") == "data"


def test_a_missing_extra(tmp_path, refusal, monkeypatch):
    """What needs it says how to get it."""
    path = tmp_path / "x.parquet"
    path.touch()
    # A folder such as data/datasets is a package, but holds nothing.
    for module in (None, types.ModuleType("datasets")):
        monkeypatch.setitem(sys.modules, "datasets", module)
        said = f"{path} needs the package datasets: pip install -r data/requirements.txt"
        assert said in refusal(tmp_path, "text", path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "huggingface_hub: pip install -r data/requirements.txt" in refusal(tmp_path, "fineweb")


# ---- fineweb -------------------------------------------------------------------------------------

NAME = "fineweb10B_sp1024"
SHARDS = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(3))]
FINEWEB = ("fineweb", "--repo", "someone/export", "--train-shards")


class Hub:
    """A stand-in for the package `huggingface_hub`, which lacks some files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fetched: list[str] = []

    def hf_hub_download(self, repository: str, path: str, repo_type: str, local_dir: Path) -> str:
        assert (repository.split("/")[-1], repo_type) == ("export", "dataset")
        self.fetched.append(path.split("/")[-1])
        if path not in self.files:
            raise OSError(f"{path}:\nconnection lost")
        target = local_dir / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.files[path])
        return str(target)


@pytest.fixture
def hub(model, monkeypatch) -> Hub:
    stats = {"files_train": 3, "files_val": 1}
    published = {
        "datasets": [{"name": NAME, "tokenizer_name": "bpe", "stats": stats}],
        "tokenizers": [{"name": "bpe", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    files = {
        "datasets/manifest.json": json.dumps(published).encode(),
        "datasets/tokenizers/fineweb_1024_bpe.model": model.read_bytes(),
    }
    for number, name in enumerate(SHARDS):
        tokens = np.arange(4000 + number, dtype="<u2") % VOCAB
        shard = prepare.shard_header(len(tokens)) + tokens.tobytes()
        files[f"datasets/datasets/{NAME}/{name}"] = shard
    stand_in = Hub(files)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


def there(out: Path) -> list[str]:
    """Return the names of the shards, which must be whole."""
    paths = sorted((out / "datasets" / NAME).glob("*.bin"))
    assert all(prepare.shard_tokens(path) for path in paths)
    return [path.name for path in paths]


def test_fineweb_fetches_only_what_is_wanting(hub, model, run_well, refusal, tmp_path):
    """More shards later; one cut short by a full disk; then fewer, with none thrown away."""
    out = tmp_path / "my out"
    assert f"--train-shards 4: {NAME} has 3" in refusal(out, *FINEWEB, 4)
    run_well(out, *FINEWEB, 1)
    assert there(out) == sorted(SHARDS[:2])
    os.truncate(out / "datasets" / NAME / SHARDS[0], 5000)
    run_well(out, *FINEWEB, 3)
    warning, last = run_well(out, *FINEWEB, 1)
    assert warning == "all 3 training shards there are trained on, not only 1"
    assert there(out) == sorted(SHARDS)
    assert [hub.fetched.count(name) for name in SHARDS] == [2, 1, 1, 1]
    folder = out / "datasets" / NAME
    assert last.startswith(f"{folder}: 12,006 training and 4,000 validation tokens"), "all there"
    assert (out / "tokenizers" / "fineweb_1024_bpe.model").read_bytes() == model.read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["datasets", "tokenizers"]


def test_fineweb_of_two_repositories_is_never_mixed(hub, run_well, refusal, tmp_path):
    out, other = tmp_path / "out", ("fineweb", "--repo", "else/export", "--train-shards", 2)
    run_well(out, *FINEWEB, 1)
    found = "is there already, from {'kind': 'fineweb', 'repository': 'someone/export'"
    assert found in refusal(out, *other)
    (out / "datasets" / NAME).rename(tmp_path / "away")
    hub.files["datasets/tokenizers/fineweb_1024_bpe.model"] += b"\0"
    assert prepare.main([*map(str, other), "--out", str(out)]) == 1
    assert not (out / "datasets" / NAME / "manifest.json").exists()


@pytest.mark.parametrize("wrong", [None, prepare.shard_header(1)])
def test_fineweb_carries_on_after_a_shard_did_not_come(hub, run_well, capsys, tmp_path, wrong):
    """The connection failed, or what came is no whole shard."""
    path = f"datasets/datasets/{NAME}/{SHARDS[2]}"
    good = hub.files.pop(path)
    if wrong is not None:
        hub.files[path] = wrong
    assert prepare.main([*FINEWEB, "2", "--out", str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert SHARDS[2] in last and "run the command again" in last
    assert ("connection lost" if wrong is None else "is not a shard") in last
    assert there(tmp_path) == sorted(SHARDS[:2])
    assert not (tmp_path / "datasets" / NAME / "manifest.json").exists()
    hub.files[path] = good
    run_well(tmp_path, *FINEWEB, 2)
    assert [hub.fetched.count(name) for name in SHARDS[:3]] == [1, 1, 2]


def test_second_start_does_not_take_what_the_first_is_writing(hub, book, model, refusal, tmp_path):
    busy = "another start of prepare.py is making it; wait"
    with prepare.locked(tmp_path / "datasets" / f"x_sp{VOCAB}"):
        text = ("text", book, "--tokenizer", model, "--name", "x")
        assert busy in refusal(tmp_path, *text)
    with prepare.locked(tmp_path / ".fineweb_download"):
        assert busy in refusal(tmp_path, *FINEWEB, 1)
