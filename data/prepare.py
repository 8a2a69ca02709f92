"""Makes token shards and a tokenizer for train_gpt.py, in the challenge's layout.

    python data/prepare.py docs                                   # the English that comes with every Python
    python data/prepare.py text book.txt more.jsonl.xz            # a person's own text
    python data/prepare.py fineweb --variant sp1024 --train-shards 10   # the published export

Written, below --out (this folder unless said):

    datasets/<name>_sp<vocab>/fineweb_{train,val}_000000.bin …, manifest.json
    tokenizers/<name>_<vocab>_bpe.model

A shard is a header of 256 little-endian int32 (20240520, 1, number of tokens) and little-endian uint16
tokens; a BOS stands before each document. Files appear under their names only when they are whole.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import shutil
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

SHARD_TOKENS = 100_000_000
SHARD_HEADER = (20240520, 1)
HEADER_INTS = 256
TXT_DOCUMENT = 1_000_000  # characters of one document at most, where a plain text file is cut
TRAINER_BYTES = 64_000_000  # text a tokenizer is trained on at most
BATCH_CHARACTERS = 4_000_000


class PrepareError(Exception):
    """Something a person can mend; the message says what and how."""


# ---- Documents ---------------------------------------------------------------------------------------------


def document_share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: what decides to which split a document goes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def python_documents() -> dict[str, str]:
    """The help topics of Python, and the docstrings of the standard library and numpy: one document a module.

    Sources are parsed, never imported: importing every module would run them.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = {}
    for name, text in topics.items():
        if (
            text not in seen
        ):  # some topics are one text under two names, which could part over the splits
            documents[f"topic {name}"] = text
            seen.add(text)
    numpy_root = os.path.dirname(importlib.util.find_spec("numpy").origin)
    roots = {"stdlib": sysconfig.get_paths()["stdlib"], "numpy": numpy_root}
    for label, root in roots.items():
        for path in sorted(Path(root).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if {"site-packages", "dist-packages", "tests", "test", "idlelib"} & set(
                name.split("/")
            ):
                continue
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # files that are wrong on purpose
            texts = [text for text in docstrings(tree) if text not in seen]
            seen.update(texts)
            if texts:
                documents[f"{label} {name}"] = "\n\n".join(texts)
    return documents


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, and what numpy hands to `add_newdoc`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
            for constant in ast.walk(node):
                if (
                    isinstance(constant, ast.Constant)
                    and isinstance(constant.value, str)
                    and len(constant.value) > 80
                ):
                    yield constant.value.strip()


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def file_documents(path: Path) -> Iterator[str]:
    """The documents of one file: a line's `text` in .jsonl, the file in .txt (if long, cut at line ends)."""
    opener = OPENERS.get(path.suffix, open)
    kind = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise PrepareError(
            f"{path}: only .txt and .jsonl are read, also with .gz, .bz2 or .xz behind"
        )
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            yield from (json_documents(path, lines) if kind == ".jsonl" else text_documents(lines))
    except FileNotFoundError:
        raise PrepareError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.end]  # its place counts from the last read only
        raise PrepareError(f"{path}: not UTF-8 ({error.reason}: {wrong!r})") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise PrepareError(f"{path}: cannot be read to its end ({error})") from None


def json_documents(path: Path, lines: Iterable[str]) -> Iterator[str]:
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
                f'{path}, line {number}: needs a JSON object with a string "text" of whole characters'
            )
        if text:
            yield text


def text_documents(lines: Iterable[str]) -> Iterator[str]:
    part, size = [], 0
    for line in lines:
        part.append(line)
        size += len(line)
        if size >= TXT_DOCUMENT:
            yield "".join(part)
            part, size = [], 0
    if size:
        yield "".join(part)


# ---- Tokenizer ---------------------------------------------------------------------------------------------


def sample(documents: Iterable[str], limit: int) -> list[str]:
    """Documents of at most about `limit` characters together, spread over all of them, in one pass."""
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
    """A SentencePiece BPE model with the challenge's settings; PrepareError if `vocab` is too small."""
    texts = sample(documents, TRAINER_BYTES)
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
            f"--vocab {vocab}: no tokenizer of this size can be made of this text; 4 control tokens,"
            f" 256 bytes and each common character need a piece each ({error})"
        ) from None
    return model.getvalue()


def load_tokenizer(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise PrepareError(f"{where}: not a SentencePiece model ({error})") from None
    if tokenizer.is_unknown(tokenizer.piece_to_id("▁")):
        raise PrepareError(
            f"{where}: ▁ is no piece of its own, so bytes per token could not be counted"
        )
    if tokenizer.bos_id() < 0 or tokenizer.vocab_size() > 65_536:
        raise PrepareError(f"{where}: needs a BOS piece and at most 65,536 pieces")
    return tokenizer


# ---- Shards ------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one split's tokens into shards of SHARD_TOKENS, and counts what goes in."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.documents = self.tokens = self.bytes = self.shards = self.in_shard = 0
        self.file = None

    def write(self, documents: list[str], tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        encoded = tokenizer.encode(documents, out_type=int, num_threads=os.cpu_count())
        self.documents += len(documents)
        self.bytes += sum(len(text.encode()) for text in documents)
        tokens = np.concatenate([np.array([tokenizer.bos_id(), *ids], "<u2") for ids in encoded])
        self.tokens += len(tokens)
        while len(tokens):
            if self.file is None:
                self.file = (self.folder / f"fineweb_{self.split}_{self.shards:06d}.bin").open("wb")
                self.file.write(bytes(4 * HEADER_INTS))
            part = tokens[: SHARD_TOKENS - self.in_shard]
            self.file.write(part.tobytes())
            self.in_shard += len(part)
            tokens = tokens[len(part) :]
            if self.in_shard == SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.seek(0)
            self.file.write(np.array([*SHARD_HEADER, self.in_shard], "<i4").tobytes())
            self.file.close()
            self.file, self.in_shard, self.shards = None, 0, self.shards + 1


def write_dataset(
    out: Path, name: str, model: bytes, source: dict, documents: Iterable[tuple[str, str]]
) -> None:
    """Encodes (split, text) pairs into shards; folder and tokenizer appear when all of it is there."""
    tokenizer = load_tokenizer(model, f"the tokenizer of {name}")
    vocab = tokenizer.vocab_size()
    folder = out / "datasets" / f"{name}_sp{vocab}"
    tokenizer_path = out / "tokenizers" / f"{name}_{vocab}_bpe.model"
    refuse_to_replace(folder)
    if tokenizer_path.exists() and tokenizer_path.read_bytes() != model:
        raise PrepareError(
            f"{tokenizer_path} is another tokenizer; move it away or choose another --name"
        )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted run of this program left
    part.mkdir(parents=True)
    try:
        writers = {split: ShardWriter(part, split) for split in ("val", "train")}
        waiting: dict[str, list[str]] = {split: [] for split in writers}
        size, began = 0, time.perf_counter()
        for split, text in documents:
            waiting[split].append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                flush(writers, waiting, tokenizer, began)
                size = 0
        flush(writers, waiting, tokenizer, began)
        for split, writer in writers.items():
            writer.close()
            if not writer.tokens:
                raise PrepareError(
                    f"there is no {split} text; name more text, another --val-fraction or --val files"
                )
        manifest = {
            "source": source,
            "vocab_size": vocab,
            "tokenizer": f"../../tokenizers/{tokenizer_path.name}",
            "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
        }
        for split, w in writers.items():
            manifest[split] = {
                "documents": w.documents,
                "tokens": w.tokens,
                "bytes": w.bytes,
                "shards": w.shards,
            }
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
        whole = tokenizer_path.with_name(tokenizer_path.name + ".part")
        whole.write_bytes(model)
        whole.replace(tokenizer_path)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # goes only when it is empty
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(
        f"{folder}: {writers['train'].tokens:,} training and {writers['val'].tokens:,} validation tokens,"
        f" vocabulary {vocab}, in {time.perf_counter() - began:.0f} s"
    )


def flush(writers: dict, waiting: dict, tokenizer, began: float) -> None:
    for split, texts in waiting.items():
        if texts:
            writers[split].write(texts, tokenizer)
            texts.clear()
    done = sum(writer.bytes for writer in writers.values()) / 1e6
    end = "" if sys.stderr.isatty() else "\n"
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    rate = done / max(time.perf_counter() - began, 1e-9)
    print(f"{clear}encoded {done:,.0f} MB, {rate:.1f} MB/s", end=end, file=sys.stderr, flush=True)


def refuse_to_replace(folder: Path) -> None:
    if folder.exists():
        raise PrepareError(f"{folder} is there already; move it away or choose another --name")


# ---- Sources -----------------------------------------------------------------------------------------------


def prepare_docs(args: argparse.Namespace) -> None:
    documents = python_documents()
    order = sorted(documents, key=document_share)
    validation, size, total = set(), 0, sum(map(len, documents.values()))
    for name in order:
        if size >= total * args.val_fraction:
            break
        validation.add(name)
        size += len(documents[name])
    pairs = [("val" if name in validation else "train", documents[name]) for name in order]
    model = train_tokenizer((text for split, text in pairs if split == "train"), args.vocab)
    source = {"kind": "docs", "python": sys.version.split()[0], "numpy": np.__version__}
    write_dataset(args.out, args.name or "docs", model, source, pairs)


def prepare_text(args: argparse.Namespace) -> None:
    def pairs() -> Iterator[tuple[str, str]]:
        for path in args.val or ():
            for text in file_documents(path):
                yield "val", text
        number = 0
        for path in args.files:
            for text in file_documents(path):
                number += 1
                in_val = not args.val and document_share(f"document {number}") < args.val_fraction
                yield "val" if in_val else "train", text

    name = args.name or args.files[0].name.split(".")[0]
    if args.tokenizer:
        model = args.tokenizer.read_bytes()
        load_tokenizer(model, str(args.tokenizer))
    else:
        model = train_tokenizer((text for split, text in pairs() if split == "train"), args.vocab)
    write_dataset(
        args.out,
        name,
        model,
        {
            "kind": "text",
            "files": [path.name for path in args.files],
            "val_files": [path.name for path in args.val or ()],
        },
        pairs(),
    )


def prepare_fineweb(args: argparse.Namespace) -> None:
    """Fetches the published shards one by one; those that are there and whole are kept."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise PrepareError(
            "fineweb needs the package huggingface_hub: pip install huggingface_hub"
        ) from None
    name = f"{args.name or 'fineweb10B'}_{args.variant}"
    download = args.out / ".fineweb_download"

    def fetch(path: str) -> Path:
        try:
            return Path(hf_hub_download(args.repo, path, repo_type="dataset", local_dir=download))
        except Exception as error:
            raise PrepareError(
                f"{args.repo}/{path} could not be fetched ({error}); run the command again to carry"
                " on where it stopped"
            ) from None

    manifest = json.loads(fetch("datasets/manifest.json").read_text())
    entry = next((d for d in manifest["datasets"] if d["name"] == name), None)
    if entry is None:
        there = ", ".join(sorted(d["name"] for d in manifest["datasets"]))
        raise PrepareError(f"--variant {args.variant}: no {name} in {args.repo}; there are {there}")
    available = int(entry["stats"]["files_train"])
    if not 1 <= args.train_shards <= available:
        raise PrepareError(f"--train-shards {args.train_shards}: {name} has {available}")
    shards = [f"fineweb_val_{i:06d}.bin" for i in range(int(entry["stats"]["files_val"]))]
    shards += [f"fineweb_train_{i:06d}.bin" for i in range(args.train_shards)]
    folder = args.out / "datasets" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards, 1):
        target = folder / shard
        if not target.exists() or shard_tokens(target) is None:
            path = fetch(f"datasets/datasets/{name}/{shard}")
            if shard_tokens(path) is None:
                path.unlink()
                raise PrepareError(
                    f"{args.repo}/{shard}: its header and its size disagree; run the command again"
                )
            path.replace(target)
        print(f"{number}/{len(shards)} {shard}", file=sys.stderr)
    tokenizer_entry = next(
        t for t in manifest["tokenizers"] if t["name"] == entry["tokenizer_name"]
    )
    model_path = args.out / "tokenizers" / Path(tokenizer_entry["model_path"]).name
    model_path.parent.mkdir(parents=True, exist_ok=True)
    if not model_path.exists():
        fetch(f"datasets/tokenizers/{model_path.name}").replace(model_path)
    model = model_path.read_bytes()
    tokens = {
        split: sum(shard_tokens(path) or 0 for path in folder.glob(f"fineweb_{split}_*.bin"))
        for split in ("train", "val")
    }  # of all that lie there, as a trainer reads them
    own = {
        "source": {"kind": "fineweb", "repository": args.repo, "variant": args.variant},
        "vocab_size": load_tokenizer(model, str(model_path)).vocab_size(),
        "tokenizer": f"../../tokenizers/{model_path.name}",
        "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
        "train": {"tokens": tokens["train"]},
        "val": {"tokens": tokens["val"]},
    }
    (folder / "manifest.json").write_text(json.dumps(own, indent=2) + "\n")
    shutil.rmtree(download, ignore_errors=True)
    print(f"{folder}: {tokens['train']:,} training and {tokens['val']:,} validation tokens")


def shard_tokens(path: Path) -> int | None:
    """The number of tokens of a whole shard; None for anything else."""
    header = np.fromfile(path, "<i4", 3).tolist()
    if header[:2] != [*SHARD_HEADER] or path.stat().st_size != 4 * HEADER_INTS + 2 * header[2]:
        return None
    return header[2]


def vocabulary_size(text: str) -> int:
    if not text.isdecimal() or not 256 <= int(text) <= 65_536:
        raise argparse.ArgumentTypeError("needs a whole number from 256 to 65536")
    return int(text)


def folder_name(text: str) -> str:
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError("needs the name of a folder, not a path")
    return text


def fraction(text: str) -> float:
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError("needs a number between 0 and 1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write below"
    )
    sources = parser.add_subparsers(required=True)
    docs = sources.add_parser("docs", help="the English that comes with every Python")
    docs.set_defaults(prepare=prepare_docs)
    text = sources.add_parser("text", help="your own .txt and .jsonl files, also .gz, .bz2, .xz")
    text.set_defaults(prepare=prepare_text)
    text.add_argument("files", type=Path, nargs="+", metavar="FILE")
    text.add_argument(
        "--val", type=Path, nargs="+", metavar="FILE", help="validation text; else a fraction"
    )
    text.add_argument(
        "--tokenizer", type=Path, metavar="MODEL", help="use this SentencePiece model"
    )
    for source in (docs, text):
        source.add_argument(
            "--vocab", type=vocabulary_size, default=1024, help="pieces, 256 to 65536 (%(default)s)"
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
    args = parser.parse_args()
    try:
        args.prepare(args)
    except (PrepareError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
