"""Make token shards and a tokenizer for train_gpt.py, in the challenge's layout.

    python data/prepare.py docs                      # the English that comes with every Python
    python data/prepare.py text book.txt             # your own text: a file, a folder, a pattern
    python data/prepare.py text hf:owner/name        # a dataset of Hugging Face's `datasets`
    python data/prepare.py fineweb --train-shards 10 # the published export

Each writes below --out (by default the folder of this script):

    datasets/<name>_sp<vocab>/fineweb_{train,val}_000000.bin …, manifest.json
    tokenizers/<name>_<vocab>_bpe.model

A shard is a header of 256 little-endian int32 (magic, version, number of tokens) and little-endian
uint16 tokens; a BOS stands before each document. Files appear under their names only when they are
whole. The last line printed begins with the dataset's folder.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import contextlib
import fcntl
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

try:
    import numpy as np
    import sentencepiece
except ImportError as missing:
    raise SystemExit(f"error: {missing.name} is missing: pip install -r requirements.txt") from None

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
SHARD_TOKENS = 100_000_000
DOCUMENT_CHARACTERS = 100_000  # a longer text file becomes several documents
TRAINER_BYTES = 64_000_000  # about the most a tokenizer is trained on: 6 seconds on 2 cores
BATCH_CHARACTERS = 4_000_000
PIECE_CHARACTERS = 1 << 16  # the most of one line of a text file that is read at a time

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What the package `datasets` reads, by the name that it has for the format.
TABLE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json"}
# What is read of a folder. A file that is named itself may have any suffix.
FOLDER_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet", ".arrow")
SKIPPED_SOURCES = {"site-packages", "dist-packages", "tests", "test", "idlelib"}
HUB = "hf:"
EXTRAS = "pip install -r data/requirements.txt"


class PrepareError(Exception):
    """Something a person can mend; the message says what and how."""


# ---- Shards --------------------------------------------------------------------------------------


def shard_header(tokens: int) -> bytes:
    numbers = [SHARD_MAGIC, SHARD_VERSION, tokens] + [0] * (HEADER_INTS - 3)
    return np.array(numbers, "<i4").tobytes()


def shard_tokens(path: Path) -> int | None:
    """Return the number of tokens of a whole shard, None for anything else."""
    header = np.fromfile(path, "<i4", 3).tolist()
    if header[:2] != [SHARD_MAGIC, SHARD_VERSION]:
        return None
    whole = path.stat().st_size == 4 * HEADER_INTS + 2 * header[2]
    return header[2] if whole else None


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file under another name and rename it, so that nobody meets a half of it."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    return part.replace(path)


class SplitWriter:
    """Encode one split's documents into shards of SHARD_TOKENS, and count what goes in."""

    def __init__(
        self, folder: Path, split: str, tokenizer: sentencepiece.SentencePieceProcessor
    ) -> None:
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0, "shards": 0}
        self.texts: list[str] = []  # documents that wait to be encoded
        self.characters = 0  # of self.texts
        self.tokens = [np.empty(0, "<u2")]  # that are in no shard yet

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.characters += len(text)
        self.counts["documents"] += 1
        self.counts["bytes"] += len(text.encode())
        if self.characters >= BATCH_CHARACTERS:
            self.write(SHARD_TOKENS)

    def write(self, least: int) -> None:
        """Encode the documents that wait; write shards until fewer than `least` tokens are left."""
        threads = os.cpu_count()
        for ids in self.tokenizer.encode(self.texts, add_bos=True, num_threads=threads):
            self.tokens.append(np.array(ids, "<u2"))
            self.counts["tokens"] += len(ids)
        self.texts, self.characters = [], 0
        while self.counts["tokens"] - self.counts["shards"] * SHARD_TOKENS >= least:
            tokens, rest = np.split(np.concatenate(self.tokens), [SHARD_TOKENS])
            path = self.folder / f"fineweb_{self.split}_{self.counts['shards']:06d}.bin"
            write_whole(path, shard_header(len(tokens)) + tokens.tobytes())
            self.counts["shards"] += 1
            self.tokens = [rest]


# ---- Documents of Python -------------------------------------------------------------------------


def python_documents() -> dict[str, str]:
    """Return Python's help topics, and a document for each module of its library and of numpy.

    Sources are parsed, never imported: importing every module would run them.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = {}
    for name, text in topics.items():
        # Some topics are one text under two names, which could part over the splits.
        if text not in seen:
            documents[f"topic {name}"] = text
            seen.add(text)
    numpy_root = Path(importlib.util.find_spec("numpy").origin).parent
    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"]), "numpy": numpy_root}
    for label, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if SKIPPED_SOURCES & set(name.parts[:-1]):
                continue
            texts = [text for text in module_docstrings(path) if text not in seen]
            seen.update(texts)
            if texts:
                documents[f"{label} {name.as_posix()}"] = "\n\n".join(texts)
    return documents


def module_docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, and those of `add_newdoc`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a file that is wrong on purpose
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
            constants = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
            values = (constant.value for constant in constants)
            yield from (text.strip() for text in values if isinstance(text, str) and len(text) > 80)


# ---- Documents of files --------------------------------------------------------------------------

Rows: TypeAlias = Any  # a split as `datasets` returns it, which is imported only if it is needed
Source: TypeAlias = Path | Rows  # a file of text or of JSON lines, or rows with a `text`


def documents_of(source: Source, cut: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Yield each `text` of JSON lines and rows, or parts, by `cut` characters, of a text file."""
    if not isinstance(source, Path):
        for rows in source.select_columns("text").iter(batch_size=1000):
            yield from filter(None, rows["text"])
    elif kind(source) == ".jsonl":
        yield from json_documents(source)
    else:
        yield from text_documents(source, cut)


def kind(path: Path) -> str:
    """Return the suffix that says how to read a file: `.txt` for `book.txt.gz`."""
    packed = path.suffix.lower() in (*OPENERS, ".zst")
    return Path(path.stem if packed else path.name).suffix.lower()


def read_lines(path: Path, limit: int = -1) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of a file, which may be compressed.

    A line longer than `limit` characters comes in pieces. PrepareError says which line is not text.
    """
    opener = OPENERS.get(path.suffix.lower(), open)
    number = 1
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            for line in iter(functools.partial(file.readline, limit), ""):
                wrong = "a null character" if "\0" in line else None
                try:
                    line.encode()
                except UnicodeEncodeError as error:  # the byte was read as U+DC00 + byte
                    wrong = f"byte {ord(line[error.start]) - 0xDC00:#x}"
                if wrong:
                    advice = "convert the file, for example by `iconv -f latin1 -t utf-8`"
                    raise PrepareError(f"{path}, line {number}: not UTF-8 text ({wrong}); {advice}")
                yield number, line
                number += line.endswith("\n")
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise PrepareError(f"{path}: cannot be read to its end ({error})") from None


def json_documents(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # half a surrogate pair, which JSON can write, is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            needs = 'a JSON object with a string "text" of whole characters'
            raise PrepareError(f"{path}, line {number}: needs {needs}") from None
        if text:
            yield text


def text_documents(path: Path, cut: int) -> Iterator[str]:
    """Yield a text as documents that together are the text, without those that are blank.

    A document ends at the first blank line after `cut` characters. Where there is none before twice
    as many, it ends at a line's end or, in a line that long, anywhere.
    """
    part, size = [], 0
    for _, piece in read_lines(path, min(cut, PIECE_CHARACTERS)):
        part.append(piece)
        size += len(piece)
        if size >= (cut if piece.isspace() else 2 * cut):
            yield from filter(str.strip, ["".join(part)])
            part, size = [], 0
    yield from filter(str.strip, ["".join(part)])


def load_rows(name: str, *args: str | None, **options) -> dict[str, Rows]:
    """Return the splits that `datasets.load_dataset(*args, **options)` returns.

    PrepareError, about `name`, if they do not hold strings named `text`.
    """
    try:  # for a folder such as data/datasets this fails too: it is a package without contents
        from datasets import load_dataset
    except ImportError:
        raise PrepareError(f"{name} needs the package datasets: {EXTRAS}") from None
    try:
        splits = load_dataset(*args, **options)
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` wraps what it meets while it reads
        raise PrepareError(f"{name}: could not be loaded ({one_line(cause)})") from None
    if "train" not in splits:
        raise PrepareError(f"{name}: has no split train; it has {', '.join(splits)}")
    for rows in splits.values():
        held = getattr(rows.features.get("text"), "dtype", None)
        if held not in ("string", "large_string"):
            columns = ", ".join(rows.column_names)
            raise PrepareError(f"{name}: needs a column text of strings; it has {columns}")
    return splits


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ---- Files of a command line ---------------------------------------------------------------------


def find_sources(names: list[str], val_names: list[str]) -> tuple[list[Source], list[Source]]:
    hub = []
    for name in names:
        if name.startswith(HUB):
            repository, _, config = name.removeprefix(HUB).partition(":")
            hub.append(load_rows(name, repository, config or None))
    held_out = named_files(val_names)
    files = named_files([name for name in names if not name.startswith(HUB)])
    # A folder may hold the files of --val too. They are not to be trained on.
    train = [open_file(path) for key, path in files.items() if key not in held_out]
    train += [splits["train"] for splits in hub]
    if not train:
        raise PrepareError("there is no training text: --val names every file")
    val = [open_file(path) for path in held_out.values()]
    return train, val or [splits["validation"] for splits in hub if "validation" in splits]


def named_files(names: list[str]) -> dict[Path, Path]:
    """Return the files that names, folders and patterns stand for, each once.

    The key of a file is the place that its path leads to.
    """
    found = {}
    for name in names:
        path, is_folder = Path(name), Path(name).is_dir()
        pattern = os.path.join(glob.escape(name), "**", "*") if is_folder else name
        paths = [path]
        if is_folder or not path.exists():  # what is hidden does not match
            paths = sorted(filter(Path.is_file, map(Path, glob.glob(pattern, recursive=True))))
        if is_folder:
            paths = [each for each in paths if kind(each) in FOLDER_SUFFIXES]
        if not paths:
            kinds = ", ".join(FOLDER_SUFFIXES)
            raise PrepareError(
                f"{name}: no such file or folder, or a pattern that no file matches; of a folder"
                f" only {kinds} are taken, and a pattern such as 'FOLDER/**/*.html' names others"
            )
        if not all(path.is_file() for path in paths):
            raise PrepareError(f"{name}: not a regular file, which can be read more than once")
        found |= {path.resolve(): path for path in paths}
    return found


def open_file(path: Path) -> Source:
    """Return the file if it is read here, or its rows, which `datasets` reads."""
    packed = path.suffix.lower() == ".zst"  # which Python cannot unpack
    form = "json" if packed and kind(path) == ".jsonl" else TABLE_FORMATS.get(kind(path))
    if form is None and packed:
        raise PrepareError(f"{path}: unpack it first; of .zst files only .jsonl.zst is read")
    if form is None:
        return path
    options = {"keep_default_na": False} if form == "csv" else {}  # "NA" is a text, too
    return load_rows(str(path), form, data_files=glob.escape(str(path)), **options)["train"]


# ---- Training and validation ---------------------------------------------------------------------


def document_share(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone; it decides a document's split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def letters(text: str) -> int:
    """Return the number of characters but white space.

    Their sum over the documents of a text does not depend on where it is cut or what is blank.
    """
    return sum(map(len, text.split()))


def progress(documents: Iterable, what: str) -> Iterable:
    try:  # it comes with data/requirements.txt
        from tqdm import tqdm
    except ImportError:
        return documents
    return tqdm(documents, desc=what, unit=" documents", disable=None, leave=False)


class Corpus:
    """Text, and how it parts into two splits.

    All is read once at the start, so that what is wrong with it comes out first.

    Without sources of validation text, a fraction of the training text is held out: the last part
    of a single text file, else documents drawn by their hash.
    """

    def __init__(self, train: list[Source], val: list[Source], fraction: float) -> None:
        self.train, self.val = train, val
        self.cut = DOCUMENT_CHARACTERS
        self.is_file = len(train) == 1 and isinstance(train[0], Path) and kind(train[0]) != ".jsonl"
        self.bytes = 0
        found = {"train": 0, "val": 0}  # letters
        shares = [1.0, 0.0]  # the lowest and the highest
        seen = hashlib.sha256()
        for split, text in progress(self.documents(), "reading"):
            found[split] += letters(text)
            self.bytes += len(text.encode())
            share = document_share(text)
            shares = [min(share, shares[0]), max(share, shares[1])]
            seen.update(f"{split} {len(text)} {text}".encode())
        self.sha256 = seen.hexdigest()
        if not found["train"]:
            raise PrepareError("there is no training text in what is named")
        if val and not found["val"]:
            raise PrepareError("there is no val text in what --val names")
        self.choose_split(found["train"], shares, fraction)

    def choose_split(self, count: int, shares: list[float], fraction: float) -> None:
        """Choose which of `count` letters, or which documents, are held out."""
        # Equal documents have equal shares and stay together. One at least is held out.
        self.limit = max(fraction, shares[0])
        self.start = (1 - fraction) * count
        if self.val:
            self.split = "validation has files of its own"
        elif self.is_file:
            self.split = f"validation is the last {100 * fraction:g} %"
            # Documents are so short that some begin in the last part, whatever its length.
            self.cut = min(int(count * min(fraction, 1 - fraction) / 4), self.cut)
            if not self.cut:
                raise PrepareError(f"{self.train[0]}: {count} characters are too few")
        else:
            self.split = f"validation is about {100 * fraction:g} % of the documents"
            if shares[1] <= self.limit:
                advice = "name more text, another --val-fraction or --val files"
                raise PrepareError(f"there is no val text: too few documents to part; {advice}")

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yield (split, text) of each document, as if nothing were held out."""
        for split, sources in (("val", self.val), ("train", self.train)):
            for source in sources:
                for text in documents_of(source, self.cut):
                    yield split, text

    def pairs(self) -> Iterator[tuple[str, str]]:
        place = 0
        for split, text in self.documents():
            if self.val:
                yield split, text
            else:
                held = place >= self.start if self.is_file else document_share(text) <= self.limit
                yield "val" if held else "train", text
            place += letters(text)


# ---- Tokenizer -----------------------------------------------------------------------------------


def sample(documents: Iterable[str], size: int) -> Iterator[str]:
    """Yield documents of about TRAINER_BYTES, spread over all; `size` is the bytes of all."""
    for number, text in enumerate(documents):
        if number == 0 or document_share(f"tokenizer {number}") * size < TRAINER_BYTES:
            yield text


def train_tokenizer(documents: Iterable[str], vocab: int) -> bytes:
    """Return a SentencePiece BPE model with the challenge's settings.

    A short text gives fewer pieces than `vocab`; PrepareError if `vocab` is too small for any.
    """
    lines = (
        line[at : at + 4000]
        for text in documents
        for line in text.split("\n")
        for at in range(0, len(line), 4000)
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            character_coverage=0.999,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            max_sentence_length=20_000,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        pieces = "4 control tokens, 256 bytes and each common character need a piece each"
        problem = f"--vocab {vocab}: no tokenizer of this size can be made of this text"
        raise PrepareError(f"{problem}; {pieces} ({one_line(error)})") from None
    return model.getvalue()


def load_tokenizer(model: bytes, where: object) -> sentencepiece.SentencePieceProcessor:
    """Return the tokenizer of a model, and refuse one that train_gpt.py could not use."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise PrepareError(f"{where}: not a SentencePiece model ({one_line(error)})") from None
    if tokenizer.is_unknown(tokenizer.piece_to_id("▁")):
        raise PrepareError(f"{where}: ▁ is no piece, so bytes per token could not be counted")
    if tokenizer.bos_id() < 0 or tokenizer.vocab_size() > 65_536:
        raise PrepareError(f"{where}: needs a BOS piece and at most 65,536 pieces")
    return tokenizer


# ---- Datasets ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Keep other starts of this program from writing there; PrepareError if one does already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    with lock.open("w") as file:  # freed however this process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = "another start of prepare.py is making it"
            raise PrepareError(f"{path}: {busy}; wait for it or choose another --name") from None
        try:
            yield path
        finally:
            lock.unlink()


def write_dataset(
    out: Path, name: str, model: bytes, source: dict, documents: Iterable[tuple[str, str]]
) -> None:
    """Encode (split, text) pairs into shards; they and the tokenizer appear when all is there.

    `source` is what the manifest says of where the text is from.
    """
    tokenizer = load_tokenizer(model, f"the tokenizer of {name}")
    vocab = tokenizer.vocab_size()
    folder = out / "datasets" / f"{name}_sp{vocab}"
    tokenizer_path = out / "tokenizers" / f"{name}_{vocab}_bpe.model"
    if folder.exists():
        raise PrepareError(
            f"{folder} is there already; to make it anew, move it and {tokenizer_path} away,"
            " or choose another --name"
        )
    refuse_another_tokenizer(tokenizer_path, model)
    part = folder.with_name(folder.name + ".part")
    began = time.perf_counter()
    with locked(folder), contextlib.ExitStack() as stack:
        shutil.rmtree(part, ignore_errors=True)  # what an interrupted run left
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        part.mkdir()
        writers = {split: SplitWriter(part, split, tokenizer) for split in ("val", "train")}
        for split, text in progress(documents, "encoding"):
            writers[split].add(text)
        for writer in writers.values():
            writer.write(1)
        counts = {split: writer.counts for split, writer in writers.items()}
        manifest = write_manifest(part, source, tokenizer_path, model, counts)
        tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(tokenizer_path, model)
        part.replace(folder)
    print(f"{in_words(folder, manifest)}, in {time.perf_counter() - began:.0f} s")


def refuse_another_tokenizer(path: Path, model: bytes) -> None:
    if path.exists() and path.read_bytes() != model:
        raise PrepareError(f"{path} is another tokenizer; move it away or choose another --out")


def write_manifest(folder: Path, source: dict, path: Path, model: bytes, counts: dict) -> dict:
    """Write and return what a reader of a dataset should know; `path` is its tokenizer's."""
    manifest = {
        "source": source,
        "vocab_size": load_tokenizer(model, path).vocab_size(),
        "tokenizer": f"../../tokenizers/{path.name}",
        "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
        **counts,
    }
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def in_words(folder: Path, manifest: dict) -> str:
    train, val = (f"{manifest[split]['tokens']:,}" for split in ("train", "val"))
    vocab = manifest["vocab_size"]
    return f"{folder}: {train} training and {val} validation tokens, vocabulary {vocab}"


def made_before(out: Path, name: str, source: dict) -> str | None:
    """Return the words for the dataset that has been made from this source, None if there is none.

    A dataset that is not whole any more is refused.
    """
    for path in sorted((out / "datasets").glob(f"{glob.escape(name)}_sp*/manifest.json")):
        folder, manifest = path.parent, json.loads(path.read_bytes())
        if manifest.get("source") == source:
            model = folder / manifest["tokenizer"]
            sha256 = hashlib.sha256(model.read_bytes()).hexdigest() if model.exists() else None
            tokens = {split: split_tokens(folder, split) for split in ("train", "val")}
            whole = all(count == manifest[split]["tokens"] for split, count in tokens.items())
            if not whole or sha256 != manifest["tokenizer_sha256"]:
                raise PrepareError(f"{folder} or its tokenizer is damaged; remove it and try again")
            return in_words(folder, manifest)
    return None


def split_tokens(folder: Path, split: str) -> int:
    """Return the number of tokens in all whole shards of a split, as a trainer reads them."""
    return sum(shard_tokens(path) or 0 for path in folder.glob(f"fineweb_{split}_*.bin"))


# ---- Subcommands ---------------------------------------------------------------------------------


def prepare_docs(args: argparse.Namespace) -> None:
    documents = python_documents()
    pairs, size, total = [], 0, sum(map(len, documents.values()))
    for key in sorted(documents, key=document_share):
        pairs.append(("val" if size < total * args.val_fraction else "train", documents[key]))
        size += len(documents[key])
    model = train_tokenizer((text for split, text in pairs if split == "train"), args.vocab)
    source = {"kind": "docs", "python": sys.version.split()[0], "numpy": np.__version__}
    write_dataset(args.out, args.name or "docs", model, source, pairs)


def prepare_text(args: argparse.Namespace) -> None:
    model = args.tokenizer.read_bytes() if args.tokenizer else None
    if model is not None:
        load_tokenizer(model, args.tokenizer)
    corpus = Corpus(*find_sources(args.files, args.val), args.val_fraction)
    name = args.name or name_of(args.files[0])
    source = {
        "kind": "text",
        "sha256": corpus.sha256,
        "split": corpus.split,
        "val_fraction": None if corpus.val else args.val_fraction,
        "vocab": args.vocab if model is None else None,
        "tokenizer_sha256": None if model is None else hashlib.sha256(model).hexdigest(),
    }
    before = made_before(args.out, name, source)
    if before is not None:
        print(f"{before}, made from the same text before")
        return
    print(f"{name}: {corpus.bytes:,} bytes of text; {corpus.split}", flush=True)
    if model is None:
        pairs = progress(corpus.pairs(), "sampling")
        texts = (text for split, text in pairs if split == "train")
        model = train_tokenizer(sample(texts, corpus.bytes), args.vocab)
    write_dataset(args.out, name, model, source, corpus.pairs())


def name_of(argument: str) -> str:
    """Return the first part of a dataset's name: that of the file, folder or repository."""
    if argument.startswith(HUB):
        argument = argument.removeprefix(HUB).partition(":")[0]
    elif not Path(argument).exists():  # a pattern: what stands before its first sign
        argument = re.split(r"[*?[]", argument)[0]
    return os.path.basename(os.path.abspath(argument)).split(".")[0] or "text"


def prepare_fineweb(args: argparse.Namespace) -> None:
    """Fetch the published shards one by one; those that are there and whole are kept."""
    with locked(args.out / ".fineweb_download") as download:
        published = json.loads(fetch(args.repo, "datasets/manifest.json", download).read_text())
        name = f"{args.name or 'fineweb10B'}_{args.variant}"
        entries = {each["name"]: each for each in published["datasets"]}
        if name not in entries:
            problem = f"--variant {args.variant}: no {name} in {args.repo}"
            raise PrepareError(f"{problem}; there are {', '.join(sorted(entries))}")
        counts = entries[name]["stats"]
        if not 1 <= args.train_shards <= int(counts["files_train"]):
            known = f"{name} has {counts['files_train']}"
            raise PrepareError(f"--train-shards {args.train_shards}: {known}")
        shards = [f"fineweb_val_{i:06d}.bin" for i in range(int(counts["files_val"]))]
        shards += [f"fineweb_train_{i:06d}.bin" for i in range(args.train_shards)]
        folder = args.out / "datasets" / name
        source = {"kind": "fineweb", "repository": args.repo, "variant": args.variant}
        refuse_another_source(folder, source)
        folder.mkdir(parents=True, exist_ok=True)
        for number, shard in enumerate(shards, 1):
            if not (folder / shard).exists() or shard_tokens(folder / shard) is None:
                path = fetch(args.repo, f"datasets/datasets/{name}/{shard}", download)
                if shard_tokens(path) is None:
                    path.unlink()
                    problem = f"{shard} is not a shard"
                    raise PrepareError(f"{args.repo}: {problem}; run the command again")
                path.replace(folder / shard)
            print(f"{number}/{len(shards)} {shard}", file=sys.stderr)
        models = {each["name"]: each["model_path"] for each in published["tokenizers"]}
        model_path = args.out / "tokenizers" / Path(models[entries[name]["tokenizer_name"]]).name
        model_path.parent.mkdir(parents=True, exist_ok=True)
        model = fetch(args.repo, f"datasets/tokenizers/{model_path.name}", download)
        refuse_another_tokenizer(model_path, model.read_bytes())
        model.replace(model_path)
        tokens = {split: {"tokens": split_tokens(folder, split)} for split in ("train", "val")}
        manifest = write_manifest(folder, source, model_path, model_path.read_bytes(), tokens)
        shutil.rmtree(download, ignore_errors=True)
    there = len(list(folder.glob("fineweb_train_*.bin")))
    if there > args.train_shards:
        print(f"all {there} training shards there are trained on, not only {args.train_shards}")
    print(in_words(folder, manifest))


def refuse_another_source(folder: Path, source: dict) -> None:
    """Raise PrepareError if a dataset's manifest says that it was made from something else."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        found = json.loads(manifest.read_bytes()).get("source")
        if found != source:
            advice = "move it and its tokenizer away or choose another --out"
            raise PrepareError(f"{folder} is there already, from {found}; {advice}")


def fetch(repository: str, path: str, download: Path) -> Path:
    """Fetch one file of the export; what of it has come stays for the next try."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise PrepareError(f"fineweb needs the package huggingface_hub: {EXTRAS}") from None
    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset", local_dir=download))
    except Exception as error:
        problem = f"{repository}/{path} could not be fetched ({one_line(error)})"
        raise PrepareError(f"{problem}; run the command again to carry on") from None


# ---- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    commands = parser.add_subparsers(required=True)
    docs = commands.add_parser("docs", help="the English that comes with every Python")
    text = commands.add_parser("text", help="your own text, in files of many kinds")
    fineweb = commands.add_parser("fineweb", help="the challenge's published shards")
    functions = {docs: prepare_docs, text: prepare_text, fineweb: prepare_fineweb}
    for command, function in functions.items():
        command.set_defaults(prepare=function)
        command.add_argument("--out", type=Path, default=here, help="folder to write below")
        command.add_argument("--name", default="", help="first part of the dataset's name")
    for command in (docs, text):
        add = command.add_argument
        add("--vocab", type=int, default=1024, help="pieces, 256 to 65536 (%(default)s)")
        add("--val-fraction", type=float, default=0.04, help="share held out (%(default)s)")
    add = text.add_argument
    kinds = "file, folder, quoted pattern such as 'notes/**/*.md', or hf:OWNER/NAME[:CONFIG]"
    add("files", nargs="+", metavar="INPUT", help=kinds)
    held = "validation text; else the last part of a single text file, or a share of documents"
    add("--val", nargs="+", metavar="INPUT", default=[], help=held)
    add("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model; else one is trained")
    add = fineweb.add_argument
    add("--variant", default="sp1024", help="tokenizer of the export (%(default)s)")
    add("--train-shards", type=int, default=80, help="of 100 M tokens each (%(default)s)")
    add("--repo", default="willdepueoai/parameter-golf", help="Hugging Face dataset")
    return parser


def check_options(args: argparse.Namespace) -> None:
    if args.name and Path(args.name).name != args.name:
        raise PrepareError(f"--name {args.name}: needs the name of a folder, not a path")
    if args.prepare is prepare_fineweb:
        return
    if not 256 <= args.vocab <= 65_536:
        raise PrepareError(f"--vocab {args.vocab}: needs a whole number from 256 to 65536")
    if not 0 < args.val_fraction < 1:
        raise PrepareError(f"--val-fraction {args.val_fraction}: needs a number between 0 and 1")


def main(arguments: list[str] | None = None) -> int:
    """Run the subcommand; what a person can mend ends it with one line and exit code 1."""
    args = build_parser().parse_args(arguments)
    try:
        check_options(args)
        args.prepare(args)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
