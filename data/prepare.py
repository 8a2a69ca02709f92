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
import codecs
import collections
import contextlib
import functools
import glob
import gzip
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import lzma
import os
import shutil
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple, TextIO

try:
    import numpy as np
    import sentencepiece
except ImportError as missing:
    raise SystemExit(f"error: {missing.name} is missing: pip install -r requirements.txt") from None

try:
    from tqdm import tqdm
except ImportError:  # an extra of data/requirements.txt: without it there is no bar
    tqdm = None

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
SHARD_TOKENS = 100_000_000
DOCUMENT_CHARACTERS = 100_000  # a longer text file becomes several documents
TRAINER_CHARACTERS = 64_000_000  # the most a tokenizer is trained on: some 6 seconds on 2 cores
BATCH_CHARACTERS = 4_000_000
BLOCK_BYTES = 1 << 20
PIECE_CHARACTERS = 1 << 16  # the most of one line that is read at a time

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".parquet", ".arrow")  # .arrow is what the cache of `datasets` consists of
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", *TABLE_SUFFIXES)
HUB = "hf:"


class PrepareError(Exception):
    """Something a person can mend; the message says what and how."""


class NullCharacterError(ValueError):
    """A text file holds a null character, so it is not text."""


# ---- Shards --------------------------------------------------------------------------------------


def shard_header(tokens: int, magic: int = SHARD_MAGIC, version: int = SHARD_VERSION) -> bytes:
    """Return the header of a shard of this many tokens."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = magic, version, tokens
    return header.tobytes()


def write_shard(path: Path, tokens: Iterable[int]) -> Path:
    """Write tokens as one shard, which appears when it is whole."""
    body = np.asarray(tokens, "<u2")
    return write_whole(path, shard_header(len(body)) + body.tobytes())


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


class ShardWriter:
    """Write one split's tokens into shards of SHARD_TOKENS, and count what goes in."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.documents = self.tokens = self.bytes = self.shards = self.in_shard = 0
        self.waiting: list[str] = []
        self.file: BinaryIO | None = None

    def flush(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        """Encode the documents that wait and write their tokens."""
        if not self.waiting:
            return
        encoded = tokenizer.encode(self.waiting, out_type=int, num_threads=os.cpu_count())
        self.documents += len(self.waiting)
        self.bytes += sum(map(utf8_length, self.waiting))
        self.waiting.clear()
        self.write(np.concatenate([np.array([tokenizer.bos_id(), *ids], "<u2") for ids in encoded]))

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, which begin a new shard wherever one is full."""
        self.tokens += len(tokens)
        while len(tokens):
            if self.file is None:
                self.file = (self.folder / f"fineweb_{self.split}_{self.shards:06d}.bin").open("wb")
                self.file.write(shard_header(0))
            part = tokens[: SHARD_TOKENS - self.in_shard]
            self.file.write(part.tobytes())
            self.in_shard += len(part)
            tokens = tokens[len(part) :]
            if self.in_shard == SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        """Complete the shard that is open, if one is."""
        if self.file is None:
            return
        self.file.seek(0)
        self.file.write(shard_header(self.in_shard))
        self.file.close()
        self.file, self.in_shard, self.shards = None, 0, self.shards + 1

    def counts(self) -> dict[str, int]:
        """Return what the manifest says of this split."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shards": self.shards,
        }


# ---- Documents of Python -------------------------------------------------------------------------


def document_share(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone; it decides a document's split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


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
    numpy_root = os.path.dirname(importlib.util.find_spec("numpy").origin)
    roots = {"stdlib": sysconfig.get_paths()["stdlib"], "numpy": numpy_root}
    for label, root in roots.items():
        for path in sorted(source_files(root)):
            texts = [text for text in module_docstrings(path) if text not in seen]
            seen.update(texts)
            if texts:
                documents[f"{label} {path.relative_to(root).as_posix()}"] = "\n\n".join(texts)
    return documents


def source_files(root: str) -> Iterator[Path]:
    """Yield the Python files below a folder, without tests and what is not Python's own."""
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - {"site-packages", "dist-packages", "tests", "test", "idlelib"}
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def module_docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file."""
    try:
        return list(docstrings(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return []  # files that are wrong on purpose


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, and those of `add_newdoc`."""
    for node in statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
            constants = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
            values = (constant.value for constant in constants)
            yield from (text.strip() for text in values if isinstance(text, str) and len(text) > 80)


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module, its statements, and expressions that stand alone, breadth first.

    They are a tenth of what `ast.walk` yields.
    """
    nodes = collections.deque([tree])
    while nodes:
        node = nodes.popleft()
        yield node
        if isinstance(node, ast.Expr):
            nodes.append(node.value)
        elif isinstance(node, ast.stmt | ast.Module | ast.excepthandler | ast.match_case):
            for field in ("body", "handlers", "cases", "orelse", "finalbody"):
                nodes.extend(getattr(node, field, ()))


# ---- Documents of files --------------------------------------------------------------------------


def kind(path: Path) -> str:
    """Return the suffix that says how to read a file: `.txt` for `book.txt.gz`."""
    packed = path.suffix.lower() in OPENERS
    return Path(path.stem if packed else path.name).suffix.lower()


def is_table(path: Path) -> bool:
    """Return whether pyarrow reads a file."""
    return kind(path) in TABLE_SUFFIXES


def file_documents(
    path: Path, errors: str = "strict", cut: int = DOCUMENT_CHARACTERS
) -> Iterator[str]:
    """Yield the documents of one file: each `text` of .jsonl and tables, or parts of a text file.

    Args:
        path: The file; its suffix says how to read it.
        errors: What becomes of bytes that are not text, "strict" or "replace".
        cut: Length of a document, in characters, from which a text file is cut.
    """
    try:
        yield from table_documents(path) if is_table(path) else read_documents(path, errors, cut)
    except FileNotFoundError:
        raise PrepareError(f"{path}: no such file") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise PrepareError(f"{path}: cannot be read to its end ({error})") from None


def read_documents(path: Path, errors: str, cut: int) -> Iterator[str]:
    """Yield the documents of a file that consists of text; `file_documents` says which."""
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors=errors) as file:
            if kind(path) == ".jsonl":
                yield from json_documents(path, file)
            else:
                yield from text_documents(file, errors, cut)
    except (UnicodeDecodeError, NullCharacterError):
        raise PrepareError(where_not_text(path)) from None


def where_not_text(path: Path) -> str:
    """Say which byte of a file is the first that is not text."""
    opener = OPENERS.get(path.suffix.lower(), open)
    with opener(path, "rb") as file:
        offset, what = first_bad_byte(file)
    unpacked = ", unpacked" if opener is not open else ""
    return (
        f"{path}: not UTF-8 text ({what} at byte {offset:,}{unpacked});"
        " convert the file to UTF-8, or use --errors replace"
    )


def first_bad_byte(file: BinaryIO) -> tuple[int, str]:
    """Return offset and description of the first byte that is not UTF-8 or is null."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in itertools.chain(iter(functools.partial(file.read, BLOCK_BYTES), b""), [b""]):
        held = decoder.getstate()[0]  # the begun character at the end of the block before
        data = held + block
        null = data.find(b"\0")
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            if not 0 <= null < error.start:
                wrong = data[error.start : error.end]
                return offset - len(held) + error.start, f"{error.reason}: {wrong!r}"
        if null >= 0:
            return offset - len(held) + null, "a null character"
        offset += len(block)
    raise AssertionError("called for a file that is text")


def json_documents(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """Yield the "text" of each line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # half a surrogate pair, which JSON can write, is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise PrepareError(
                f"{path}, line {number}:"
                ' needs a JSON object with a string "text" of whole characters'
            )
        if text:
            yield text


def text_documents(
    file: TextIO, errors: str = "strict", cut: int = DOCUMENT_CHARACTERS
) -> Iterator[str]:
    """Yield a text as documents that together are the text.

    A document ends at the first blank line after `cut` characters. Where there is none before twice
    as many, it ends at a line's end or, in a line that long, anywhere.
    """
    part, size = [], 0
    for piece in iter(functools.partial(file.readline, min(cut, PIECE_CHARACTERS)), ""):
        if "\0" in piece:
            if errors == "strict":
                raise NullCharacterError
            piece = piece.replace("\0", "\N{REPLACEMENT CHARACTER}")
        part.append(piece)
        size += len(piece)
        if size >= (cut if piece.isspace() else 2 * cut):
            yield from not_blank("".join(part))
            part, size = [], 0
    yield from not_blank("".join(part))


def not_blank(text: str) -> list[str]:
    """Return the text in a list, which is empty if the text is."""
    return [text] if text and not text.isspace() else []


def table_documents(path: Path) -> Iterator[str]:
    """Yield the strings in the column `text` of a .parquet file or of the cache of `datasets`."""
    import pyarrow
    import pyarrow.parquet

    rows = 0
    try:
        if kind(path) == ".parquet":
            table = pyarrow.parquet.ParquetFile(path)
            check_column(path, table.schema_arrow)
            batches = table.iter_batches(batch_size=1024, columns=["text"])
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            check_column(path, batches.schema)
        for batch in batches:
            yield from filter(None, batch.column("text").to_pylist())
            rows += batch.num_rows
    except UnicodeDecodeError:
        raise PrepareError(f"{path}: a text after row {rows:,} is not UTF-8") from None
    except pyarrow.ArrowException as error:
        raise PrepareError(f"{path}: cannot be read as {kind(path)} ({one_line(error)})") from None


def check_column(path: Path, schema) -> None:
    """Refuse a table without a column `text` of strings."""
    import pyarrow

    if "text" not in schema.names:
        raise PrepareError(f"{path}: no column text; its columns are {', '.join(schema.names)}")
    held = schema.field("text").type
    if not (pyarrow.types.is_string(held) or pyarrow.types.is_large_string(held)):
        raise PrepareError(f"{path}: the column text holds {held}, not strings")


# ---- Files of a command line ---------------------------------------------------------------------


class Inputs(NamedTuple):
    """The files that `text` reads."""

    train: list[Path]
    val: list[Path]


def find_inputs(args: argparse.Namespace) -> Inputs:
    """Find the files that the arguments name, and refuse those that cannot be read."""
    train, hub_val = [], []
    for name in args.files:
        if name.startswith(HUB):
            files, more = hub_files(name)
            train += files
            hub_val += more
        else:
            train += named_files(name, args.suffix)
    val = [path for name in args.val or () for path in named_files(name, args.suffix)]
    held_out = unique(val or hub_val)
    # A folder may hold the files of --val too. They are not to be trained on.
    training = [path for key, path in unique(train).items() if key not in held_out]
    if not training:
        raise PrepareError("there is no training text: --val names every file")
    inputs = Inputs(training, list(held_out.values()))
    tables = [path for path in (*inputs.train, *inputs.val) if is_table(path)]
    if tables:
        require("pyarrow", str(tables[0]))
    return inputs


def unique(paths: list[Path]) -> dict[Path, Path]:
    """Return the paths by the place they lead to, each place once."""
    return {path.resolve(): path for path in paths}


def named_files(name: str, suffixes: list[str] | None) -> list[Path]:
    """Return the file of this name, those below the folder, or those that match the pattern."""
    path = Path(name)
    if path.is_dir():
        return folder_files(path, suffixes or KNOWN_SUFFIXES)
    if path.exists():
        found = [path]
    elif is_pattern(name):
        found = sorted(filter(Path.is_file, map(Path, glob.glob(name, recursive=True))))
    else:
        raise PrepareError(f"{name}: no such file or folder")
    if not found:
        raise PrepareError(f"{name}: no file matches")
    for path in found:
        if not path.is_file():
            raise PrepareError(f"{path}: not a regular file, which can be read more than once")
        # A name without a suffix, such as README, is taken for text.
        if kind(path) not in ("", *KNOWN_SUFFIXES, *(suffixes or ())):
            raise PrepareError(
                f"{path}: only {' '.join(KNOWN_SUFFIXES)} are read, also with .gz, .bz2 or .xz"
                f" behind; --suffix {kind(path)} reads it as plain text"
            )
    return found


def is_pattern(name: str) -> bool:
    """Return whether a name stands for several."""
    return any(sign in name for sign in "*?[")


def folder_files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Return the files with these suffixes below a folder, without what is hidden or generated."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    found = sorted(path for path in found if kind(path) in suffixes and path.is_file())
    if not found:
        raise PrepareError(
            f"{folder}: no file with {' '.join(suffixes)} in this folder; --suffix names others"
        )
    return found


def hub_files(name: str) -> tuple[list[Path], list[Path]]:
    """Return the cached files of a dataset's training and validation split.

    Args:
        name: `hf:owner/name` or `hf:owner/name:config`, as `datasets.load_dataset` takes them.
    """
    datasets = require("datasets", name)
    repository, _, config = name.removeprefix(HUB).partition(":")
    try:
        splits = datasets.load_dataset(repository, config or None)
    except Exception as error:
        raise PrepareError(f"{name}: could not be loaded ({one_line(error)})") from None
    if "train" not in splits:
        raise PrepareError(f"{name}: has no split train; it has {', '.join(splits)}")
    files = {
        split: [Path(file["filename"]) for file in data.cache_files]
        for split, data in splits.items()
    }
    return files["train"], files.get("validation", [])


def require(package: str, what: str) -> ModuleType:
    """Return an optional package; PrepareError says how to get it where it is missing."""
    # Python takes a folder of the package's name, such as data/datasets, for an empty package.
    with contextlib.suppress(ImportError):
        module = importlib.import_module(package)
        if module.__file__:
            return module
    raise PrepareError(f"{what} needs the package {package}: pip install {package}")


def one_line(error: Exception) -> str:
    """Return an error's message without line ends."""
    return " ".join(str(error).split())


def digest(paths: list[Path], report: Callable[[int], object]) -> str:
    """Return a hash of the files' bytes, whatever the files are called."""
    whole = hashlib.sha256()
    for path in paths:
        one = hashlib.sha256()
        with path.open("rb") as file:
            for block in iter(functools.partial(file.read, BLOCK_BYTES), b""):
                one.update(block)
                report(len(block))
        whole.update(one.digest())
    return whole.hexdigest()


# ---- Training and validation ---------------------------------------------------------------------


class Corpus(NamedTuple):
    """Text whose every document has been read once, and how it parts into two splits."""

    inputs: Inputs
    errors: str
    bytes: int
    split: str  # in words
    side: Callable[[int, str], str]  # of a document of inputs.train that begins at a character
    cut: int = DOCUMENT_CHARACTERS

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield (split, text) of each document."""
        for path in self.inputs.val:
            for text in file_documents(path, self.errors):
                yield "val", text
        place = 0
        for path in self.inputs.train:
            for text in file_documents(path, self.errors, self.cut):
                yield self.side(place, text), text
                place += len(text)


class Measure(NamedTuple):
    """What a look at some documents gives."""

    bytes: int
    characters: int
    lowest: float  # share of a document
    highest: float


def measure(files: list[Path], errors: str, report: Callable[[int], object]) -> Measure:
    """Read all documents of some files."""
    total = characters = 0
    lowest, highest = 1.0, 0.0
    for path in files:
        for text in file_documents(path, errors):
            size, share = utf8_length(text), document_share(text)
            total += size
            characters += len(text)
            lowest, highest = min(lowest, share), max(highest, share)
            report(size)
    return Measure(total, characters, lowest, highest)


def survey(inputs: Inputs, fraction: float, errors: str) -> Corpus:
    """Read all text once, so that what is wrong with it comes out first, and choose the splits."""
    with progress("reading", text_size([*inputs.train, *inputs.val])) as report:
        val, train = (measure(files, errors, report) for files in (inputs.val, inputs.train))
    if not train.characters:
        raise PrepareError(f"there is no training text in {inputs.train[0]}")
    if inputs.val and not val.characters:
        raise PrepareError(f"there is no val text in {inputs.val[0]}")
    corpus = functools.partial(Corpus, inputs, errors, train.bytes + val.bytes)
    if inputs.val:
        return corpus("validation has files of its own", lambda place, text: "train")
    if (
        len(inputs.train) == 1
        and not is_table(inputs.train[0])
        and kind(inputs.train[0]) != ".jsonl"
    ):
        # Documents are so short that some begin in the last part, whatever its length.
        cut = int(train.characters * min(fraction, 1 - fraction) / 4)
        if not cut:
            raise PrepareError(f"{inputs.train[0]}: {train.characters} characters are too few")
        start = (1 - fraction) * train.characters
        return corpus(
            f"validation is the last {100 * fraction:g} %",
            lambda place, text: "val" if place >= start else "train",
            min(cut, DOCUMENT_CHARACTERS),
        )
    # Equal documents have equal shares and stay together. Validation has one document at least.
    limit = max(fraction, train.lowest)
    if train.highest <= limit:
        raise PrepareError(
            "there is no val text: too few documents for both training and validation;"
            " name more text, another --val-fraction or --val files"
        )
    return corpus(
        f"validation is about {100 * fraction:g} % of the documents, drawn by hash",
        lambda place, text: "val" if document_share(text) <= limit else "train",
    )


def text_size(files: list[Path]) -> int | None:
    """Return the size of files, None if it does not tell how much text they hold."""
    if any(is_table(path) or path.suffix.lower() in OPENERS for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def utf8_length(text: str) -> int:
    """Return the length of a text in bytes."""
    return len(text.encode())


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], object]]:
    """Show a bar with rate and time left, on a terminal; yield what to tell the bytes done."""
    if tqdm is None:
        yield lambda count: None
        return
    options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "leave": False}
    with tqdm(desc=what, total=total, disable=None, **options) as bar:  # None: if not a terminal
        yield bar.update


# ---- Tokenizer -----------------------------------------------------------------------------------


def sample(documents: Iterable[str], limit: int) -> list[str]:
    """Return documents of at most about `limit` characters together, spread over all of them.

    They are read in one pass, and no more than about `limit` characters are held.
    """
    kept, size, share = [], 0, 1.0
    for number, text in enumerate(documents):
        place = document_share(f"tokenizer {number}")
        if place < share:
            kept.append((place, text))
            size += len(text)
        while size > limit and len(kept) > 1:
            share /= 2
            kept = [(place, text) for place, text in kept if place < share] or kept[:1]
            size = sum(len(text) for _, text in kept)
    return [text for _, text in kept]


def train_tokenizer(documents: Iterable[str], vocab: int) -> bytes:
    """Return a SentencePiece BPE model with the challenge's settings.

    It is trained on a sample of at most about TRAINER_CHARACTERS. A short text gives fewer pieces
    than `vocab`; PrepareError if `vocab` is too small for any.
    """
    texts = sample(documents, TRAINER_CHARACTERS)
    if not texts:
        raise PrepareError("there is no training text to make a tokenizer from")
    lines = (
        line[at : at + 4000]
        for text in texts
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
        raise PrepareError(
            f"--vocab {vocab}: no tokenizer of this size can be made of this text; 4 control"
            " tokens, 256 bytes and each common character need a piece each"
            f" ({one_line(error)})"
        ) from None
    return model.getvalue()


def load_tokenizer(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    """Return the tokenizer of a model, and refuse one that train_gpt.py could not use."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise PrepareError(f"{where}: not a SentencePiece model ({one_line(error)})") from None
    if tokenizer.is_unknown(tokenizer.piece_to_id("▁")):
        raise PrepareError(
            f"{where}: ▁ is no piece of its own, so bytes per token could not be counted"
        )
    if tokenizer.bos_id() < 0 or tokenizer.vocab_size() > 65_536:
        raise PrepareError(f"{where}: needs a BOS piece and at most 65,536 pieces")
    return tokenizer


# ---- Datasets ------------------------------------------------------------------------------------


def dataset_folder(out: Path, name: str, vocab: int) -> Path:
    """Return where a dataset lies."""
    return out / "datasets" / f"{name}_sp{vocab}"


def tokenizer_file(out: Path, name: str, vocab: int) -> Path:
    """Return where a dataset's tokenizer lies."""
    return out / "tokenizers" / f"{name}_{vocab}_bpe.model"


def refuse_to_replace(out: Path, name: str, vocab: int, model: bytes | None = None) -> None:
    """Refuse to write where a dataset, or a tokenizer other than this model, lies already."""
    folder, tokenizer = dataset_folder(out, name, vocab), tokenizer_file(out, name, vocab)
    if folder.exists():
        raise PrepareError(
            f"{folder} is there already, made from something else or with other options;"
            f" move it and {tokenizer} away, or choose another --name"
        )
    if model is not None and tokenizer.exists() and tokenizer.read_bytes() != model:
        raise PrepareError(
            f"{tokenizer} is another tokenizer; move it away or choose another --name"
        )


def write_dataset(
    out: Path,
    name: str,
    model: bytes,
    source: dict,
    documents: Iterable[tuple[str, str]],
    total: int | None = None,
) -> None:
    """Encode (split, text) pairs into shards; they and the tokenizer appear when all is there.

    Args:
        out: The folder to write below.
        name: First part of the dataset's name.
        model: The tokenizer.
        source: What the manifest says of where the text is from.
        documents: The text.
        total: Bytes of text, if known.
    """
    tokenizer = load_tokenizer(model, f"the tokenizer of {name}")
    vocab = tokenizer.vocab_size()
    folder, tokenizer_path = dataset_folder(out, name, vocab), tokenizer_file(out, name, vocab)
    refuse_to_replace(out, name, vocab, model)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted run of this program left
    part.mkdir(parents=True)
    began = time.perf_counter()
    try:
        counts = write_splits(part, tokenizer, documents, total)
        manifest = {"source": source, **tokenizer_entry(tokenizer_path, model), **counts}
        write_json(part / "manifest.json", manifest)
        tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(tokenizer_path, model)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # goes only when it is empty
    print(f"{in_words(folder, manifest)}, in {time.perf_counter() - began:.0f} s")


def write_splits(
    folder: Path,
    tokenizer: sentencepiece.SentencePieceProcessor,
    documents: Iterable[tuple[str, str]],
    total: int | None,
) -> dict[str, dict[str, int]]:
    """Write the shards of both splits, and return what the manifest says of each."""
    writers = {split: ShardWriter(folder, split) for split in ("val", "train")}
    with progress("encoding", total) as report:
        waiting = 0
        for split, text in documents:
            writers[split].waiting.append(text)
            waiting += len(text)
            if waiting >= BATCH_CHARACTERS:
                encode_waiting(writers, tokenizer, report)
                waiting = 0
        encode_waiting(writers, tokenizer, report)
    for split, writer in writers.items():
        writer.close()
        if not writer.tokens:
            raise PrepareError(
                f"there is no {split} text; name more text, another --val-fraction or --val files"
            )
    return {split: writer.counts() for split, writer in writers.items()}


def encode_waiting(
    writers: dict[str, ShardWriter],
    tokenizer: sentencepiece.SentencePieceProcessor,
    report: Callable[[int], object],
) -> None:
    """Encode the documents that wait in each writer, and report how many bytes they are."""
    for writer in writers.values():
        before = writer.bytes
        writer.flush(tokenizer)
        report(writer.bytes - before)


def tokenizer_entry(path: Path, model: bytes) -> dict:
    """Return what the manifest says of the tokenizer."""
    return {
        "vocab_size": load_tokenizer(model, str(path)).vocab_size(),
        "tokenizer": f"../../tokenizers/{path.name}",
        "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
    }


def write_json(path: Path, content: dict) -> None:
    """Write a file of JSON, which appears when it is whole."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def in_words(folder: Path, manifest: dict) -> str:
    """Return what the last line printed says of a dataset."""
    tokens = {split: manifest[split]["tokens"] for split in ("train", "val")}
    return (
        f"{folder}: {tokens['train']:,} training and {tokens['val']:,} validation tokens,"
        f" vocabulary {manifest['vocab_size']}"
    )


def made_before(out: Path, name: str, source: dict) -> str | None:
    """Return the words for the dataset that has been made from this source, None if there is none.

    A dataset that is not whole any more is refused.
    """
    for path in sorted((out / "datasets").glob(f"{glob.escape(name)}_sp*/manifest.json")):
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError:
            continue
        if not isinstance(manifest, dict) or manifest.get("source") != source:
            continue
        if not is_whole(path.parent, manifest):
            raise PrepareError(
                f"{path.parent} or its tokenizer is damaged; remove it and try again"
            )
        return in_words(path.parent, manifest)
    return None


def is_whole(folder: Path, manifest: dict) -> bool:
    """Return whether shards and tokenizer are those that the manifest was written for."""
    model = folder / manifest["tokenizer"]
    if not model.is_file():
        return False
    if hashlib.sha256(model.read_bytes()).hexdigest() != manifest["tokenizer_sha256"]:
        return False
    return all(split_tokens(folder, s) == manifest[s]["tokens"] for s in ("train", "val"))


def split_tokens(folder: Path, split: str) -> int:
    """Return the number of tokens in all whole shards of a split, as a trainer reads them."""
    return sum(shard_tokens(path) or 0 for path in folder.glob(f"fineweb_{split}_*.bin"))


# ---- Subcommands ---------------------------------------------------------------------------------


def prepare_docs(args: argparse.Namespace) -> None:
    """Make a dataset of the English that comes with Python."""
    name = args.name or "docs"
    refuse_to_replace(args.out, name, args.vocab)
    documents = python_documents()
    order = sorted(documents, key=document_share)
    validation, size, total = set(), 0, sum(map(len, documents.values()))
    for key in order:
        if size >= total * args.val_fraction:
            break
        validation.add(key)
        size += len(documents[key])
    pairs = [("val" if key in validation else "train", documents[key]) for key in order]
    model = train_tokenizer((text for split, text in pairs if split == "train"), args.vocab)
    source = {"kind": "docs", "python": sys.version.split()[0], "numpy": np.__version__}
    size = sum(map(utf8_length, documents.values()))
    write_dataset(args.out, name, model, source, pairs, size)


def prepare_text(args: argparse.Namespace) -> None:
    """Make a dataset of a person's own text; stop at once if it has been made before."""
    model = args.tokenizer.read_bytes() if args.tokenizer else None
    vocab = args.vocab
    if model is not None:
        vocab = load_tokenizer(model, str(args.tokenizer)).vocab_size()
    inputs = find_inputs(args)
    name = args.name or name_of(args.files[0])
    source = text_source(args, inputs, model)
    before = made_before(args.out, name, source)
    if before is not None:
        print(f"{before}, made from the same text before")
        return
    refuse_to_replace(args.out, name, vocab, model)
    corpus = survey(inputs, args.val_fraction, args.errors)
    files = len(inputs.train) + len(inputs.val)
    print(
        f"{name}: {corpus.bytes:,} bytes of text in {files:,} file(s); {corpus.split}", flush=True
    )
    if model is None:
        with progress("sampling", corpus.bytes) as report:
            model = train_tokenizer(training_text(corpus, report), vocab)
    write_dataset(args.out, name, model, source, corpus.pairs(), corpus.bytes)


def training_text(corpus: Corpus, report: Callable[[int], object]) -> Iterator[str]:
    """Yield the documents a tokenizer may see."""
    for split, text in corpus.pairs():
        report(utf8_length(text))
        if split == "train":
            yield text


def text_source(args: argparse.Namespace, inputs: Inputs, model: bytes | None) -> dict:
    """Return all that decides what `text` makes, for the manifest."""
    files = [*inputs.val, *inputs.train]
    with progress("comparing", sum(path.stat().st_size for path in files)) as report:
        hashes = [digest(paths, report) for paths in inputs]
    return {
        "kind": "text",
        "files": [short_name(name) for name in args.files],
        "val_files": [short_name(name) for name in args.val or ()],
        "train_sha256": hashes[0],
        "val_sha256": hashes[1],
        "val_fraction": None if inputs.val else args.val_fraction,
        "errors": args.errors,
        "vocab": args.vocab if model is None else None,
        "tokenizer_sha256": hashlib.sha256(model).hexdigest() if model is not None else None,
    }


def short_name(name: str) -> str:
    """Return an argument without the folders before it."""
    return name if name.startswith(HUB) else Path(name).name or name


def name_of(argument: str) -> str:
    """Return the first part of a dataset's name: that of the file, folder or repository."""
    if argument.startswith(HUB):
        return argument.removeprefix(HUB).partition(":")[0].rstrip("/").split("/")[-1] or "text"
    parts = Path(argument).parts
    if not Path(argument).exists():  # a pattern: the folder whose files it matches
        parts = itertools.takewhile(lambda part: not is_pattern(part), parts)
    return os.path.basename(os.path.abspath(Path(*parts))).split(".")[0] or "text"


def prepare_fineweb(args: argparse.Namespace) -> None:
    """Fetch the published shards one by one; those that are there and whole are kept."""
    require("huggingface_hub", "fineweb")
    download = args.out / ".fineweb_download"
    fetch = functools.partial(fetch_file, args.repo, download)
    published = json.loads(fetch("datasets/manifest.json").read_text())
    name = f"{args.name or 'fineweb10B'}_{args.variant}"
    entry = published_entry(args, published, name)
    shards = [f"fineweb_val_{i:06d}.bin" for i in range(int(entry["stats"]["files_val"]))]
    shards += [f"fineweb_train_{i:06d}.bin" for i in range(args.train_shards)]
    folder = args.out / "datasets" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards, 1):
        fetch_shard(fetch, f"datasets/datasets/{name}/{shard}", folder / shard, args.repo)
        print(f"{number}/{len(shards)} {shard}", file=sys.stderr)
    tokenizers = {each["name"]: each["model_path"] for each in published["tokenizers"]}
    model_path = args.out / "tokenizers" / Path(tokenizers[entry["tokenizer_name"]]).name
    model_path.parent.mkdir(parents=True, exist_ok=True)
    if not model_path.exists():
        fetch(f"datasets/tokenizers/{model_path.name}").replace(model_path)
    manifest = {
        "source": {"kind": "fineweb", "repository": args.repo, "variant": args.variant},
        **tokenizer_entry(model_path, model_path.read_bytes()),
        **{split: {"tokens": split_tokens(folder, split)} for split in ("train", "val")},
    }
    write_json(folder / "manifest.json", manifest)
    shutil.rmtree(download, ignore_errors=True)
    print(in_words(folder, manifest))


def fetch_file(repository: str, download: Path, path: str) -> Path:
    """Fetch one file of the export; what of it has come stays for the next try."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset", local_dir=download))
    except Exception as error:
        raise PrepareError(
            f"{repository}/{path} could not be fetched ({error}); run the command again to carry"
            " on where it stopped"
        ) from None


def published_entry(args: argparse.Namespace, published: dict, name: str) -> dict:
    """Return what the export says of one of its datasets, and refuse what it does not have."""
    entries = {each["name"]: each for each in published["datasets"]}
    if name not in entries:
        there = ", ".join(sorted(entries))
        raise PrepareError(f"--variant {args.variant}: no {name} in {args.repo}; there are {there}")
    available = int(entries[name]["stats"]["files_train"])
    if not 1 <= args.train_shards <= available:
        raise PrepareError(f"--train-shards {args.train_shards}: {name} has {available}")
    return entries[name]


def fetch_shard(fetch: Callable[[str], Path], source: str, target: Path, repository: str) -> None:
    """Fetch a shard, unless it is there and whole."""
    if target.exists() and shard_tokens(target) is not None:
        return
    path = fetch(source)
    if shard_tokens(path) is None:
        path.unlink()
        raise PrepareError(
            f"{repository}/{target.name}: its header and its size disagree; run the command again"
        )
    path.replace(target)


# ---- Command line --------------------------------------------------------------------------------


def vocabulary_size(text: str) -> int:
    """Return the value of --vocab."""
    if not text.isdecimal() or not 256 <= int(text) <= 65_536:
        raise argparse.ArgumentTypeError("needs a whole number from 256 to 65536")
    return int(text)


def folder_name(text: str) -> str:
    """Return the value of --name."""
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError("needs the name of a folder, not a path")
    return text


def fraction(text: str) -> float:
    """Return the value of --val-fraction."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError("needs a number between 0 and 1")


def suffix(text: str) -> str:
    """Return a value of --suffix."""
    if Path("name" + text).suffix != text or not text or text.lower() in OPENERS:
        raise argparse.ArgumentTypeError(
            f"needs suffixes such as .md, not {text}; name files and folders before it"
        )
    return text.lower()


def add_text_options(text: argparse.ArgumentParser) -> None:
    """Add what only `text` takes."""
    text.add_argument(
        "files",
        nargs="+",
        metavar="INPUT",
        help="file, folder, quoted pattern such as 'notes/**/*.md', or hf:OWNER/NAME[:CONFIG]",
    )
    text.add_argument(
        "--val",
        nargs="+",
        metavar="INPUT",
        help="validation text; else the last part of a single text file, or a share of documents",
    )
    text.add_argument(
        "--suffix",
        type=suffix,
        nargs="+",
        metavar="SUFFIX",
        help=f"which files of a folder to read, unknown ones as plain text"
        f" ({' '.join(KNOWN_SUFFIXES)})",
    )
    text.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="refuse bytes that are not UTF-8, or replace them by U+FFFD (%(default)s)",
    )
    text.add_argument(
        "--tokenizer", type=Path, metavar="MODEL", help="use this SentencePiece model"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="folder to write below")
    sources = parser.add_subparsers(required=True)
    docs = sources.add_parser("docs", help="the English that comes with every Python")
    docs.set_defaults(prepare=prepare_docs)
    text = sources.add_parser("text", help="your own text, in files of many kinds")
    text.set_defaults(prepare=prepare_text)
    add_text_options(text)
    for source in (docs, text):
        source.add_argument(
            "--vocab",
            type=vocabulary_size,
            default=1024,
            help="pieces, such as 1024, 4096 or 8192, from 256 to 65536 (%(default)s)",
        )
        source.add_argument(
            "--val-fraction", type=fraction, default=0.04, help="share of validation (%(default)s)"
        )
    fineweb = sources.add_parser("fineweb", help="the challenge's published shards")
    fineweb.set_defaults(prepare=prepare_fineweb)
    fineweb.add_argument(
        "--variant", default="sp1024", help="tokenizer of the export (%(default)s)"
    )
    fineweb.add_argument(
        "--train-shards", type=int, default=80, help="of 100 M tokens each (%(default)s)"
    )
    fineweb.add_argument(
        "--repo", default="willdepueoai/parameter-golf", help="Hugging Face dataset"
    )
    for source in (docs, text, fineweb):
        source.add_argument("--name", type=folder_name, help="first part of the dataset's name")
    return parser


def main() -> None:
    """Run the subcommand; what a person can mend ends it with one line and exit code 1."""
    args = build_parser().parse_args()
    try:
        args.prepare(args)
    except (PrepareError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
