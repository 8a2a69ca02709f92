"""Learning adapters on random linear maps: a language model for Parameter Golf in one script.

Most weight matrices are frozen random maps, regenerated from a seed and stored in 0 bytes. What is learned
around them (low-rank adapters, gains, embeddings) is quantised, compressed and written as one artifact.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # train, export, evaluate from the artifact
    EVAL_ONLY=1 MODEL_PATH=model.int6.ptz python train_gpt.py  # repeat the evaluation

Every setting is an environment variable, declared once in `Hyperparameters`.
"""
from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import functools
import glob
import hashlib
import io
import json
import lzma
import math
import os
import platform
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import brotli
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Settings ----------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something a person can mend: the message says what was wrong, where, and what to do."""


def setting(default, meaning: str, low=None, high=None, choices=(), model=False):
    """One variable: its default (and so its type), meaning, range; `model` marks what rebuilds the model."""
    rule = {"meaning": meaning, "low": low, "high": high, "choices": choices, "model": model}
    return dataclasses.field(default=default, metadata=rule)


@dataclasses.dataclass(init=False)
class Hyperparameters:
    """Every setting; the variable's name is the field's in capitals. `Hyperparameters()` reads the environment,
    keyword arguments win over it. Raises UserError with all that is wrong at once."""

    # Run
    run_id: str = setting("", "name of the run's folder; empty: the time of the start")
    output_dir: str = setting("runs", "where the run's folder is made")
    seed: int = setting(1337, "seed of initial weights and data order", 0, 2**63 - 1)
    dtype: str = setting("bfloat16", "type of activations", choices=("bfloat16", "float32"))
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    eval_only: int = setting(0, "1: evaluate the artifact MODEL_PATH, nothing else", 0, 1)
    model_path: str = setting("", "artifact that EVAL_ONLY reads")
    export_only: int = setting(0, "1: export and evaluate CHECKPOINT_PATH, do not train", 0, 1)
    checkpoint_path: str = setting("", "checkpoint that EXPORT_ONLY reads")
    allow_unknown: int = setting(0, "1: accept variables that look like a misspelt setting", 0, 1)
    author: str = setting("", "for submission.json")
    github_id: str = setting("", "for submission.json")

    # Data
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    holdout_tokens: int = setting(1_048_576, "training tokens kept back to choose between averages", 1)

    # Model
    vocab_size: int = setting(1024, "pieces of the tokenizer", 8, 65_536, model=True)
    num_layers: int = setting(11, "transformer blocks", 1, 256, model=True)
    model_dim: int = setting(512, "width of the residual stream", 8, 16_384, model=True)
    num_heads: int = setting(8, "query heads", 1, 256, model=True)
    num_kv_heads: int = setting(4, "key and value heads", 1, 256, model=True)
    mlp_mult: float = setting(3.0, "hidden width of the MLP over MODEL_DIM", 0.01, 64.0, model=True)
    rope_dims: int = setting(16, "rotated dimensions of each head", 0, 1024, model=True)
    rope_base: float = setting(10_000.0, "base of the rotary frequencies", 1.0, 1e9, model=True)
    xsa_last_n: int = setting(11, "last N layers use exclusive self-attention", 0, 256, model=True)
    ln_scale: int = setting(1, "1: scale each pre-norm by 1/sqrt(layer + 1)", 0, 1, model=True)
    bigram_vocab_size: int = setting(2048, "buckets of the bigram embedding; 0: none", 0, 2**24, model=True)
    bigram_dim: int = setting(128, "width of the bigram embedding", 1, 4096, model=True)
    ve_enabled: int = setting(1, "1: value embedding, shared by VE_LAYERS", 0, 1, model=True)
    ve_dim: int = setting(128, "width of the value embedding", 1, 4096, model=True)
    ve_layers: str = setting("9,10", "layers whose values get the value embedding", model=True)
    vrl_enabled: int = setting(1, "1: later layers add layer 0's values", 0, 1, model=True)
    smear_enabled: int = setting(1, "1: mix each embedding with the previous one", 0, 1, model=True)
    skips_enabled: int = setting(1, "1: U-Net skips from first to second half", 0, 1, model=True)
    qk_gain_init: float = setting(1.5, "initial gain of each query head", 0.0, 100.0)
    logit_softcap: float = setting(30.0, "logits are c·tanh(z/c)", 1e-3, 1e6, model=True)
    tied_embed_init_std: float = setting(0.005, "initial std of the tied embedding", 0.0, 10.0)

    # Random maps
    use_random_adapters: int = setting(1, "1: every map random, with LoRA; 0: all learned", 0, 1, model=True)
    random_adapter_rank: int = setting(32, "rank of the LoRA on each random map", 1, 16_384, model=True)
    random_adapter_seed: int = setting(12_345, "base seed of the random maps", 0, 2**62, model=True)

    # Training
    iterations: int = setting(20_000, "training steps at most", 1)
    warmup_steps: int = setting(20, "steps before the clock starts, whose effect is undone", 0)
    warmdown_iters: int = setting(3500, "last steps, over which learning rates fall to 0", 0)
    train_batch_tokens: int = setting(786_432, "tokens a step, over all processes", 1)
    train_seq_len: int = setting(2048, "tokens of a training sequence", 1, 2**20)
    micro_batch_tokens: int = setting(98_304, "most tokens of one forward pass on one device", 1)
    max_wallclock_seconds: float = setting(600.0, "training and export together; 0: no limit", 0.0)
    gptq_reserve_seconds: float = setting(45.0, "the part of it kept for the export", 0.0)
    val_loss_every: int = setting(4000, "steps between validations; 0: at the end only", 0)
    train_log_every: int = setting(200, "steps between log lines; 0: none", 0)

    # Optimisers
    matrix_lr: float = setting(0.025, "Muon: matrices and adapters", 0.0)
    tied_embed_lr: float = setting(0.035, "AdamW: embeddings", 0.0)
    scalar_lr: float = setting(0.025, "AdamW: gains, gates and scales", 0.0)
    muon_momentum: float = setting(0.99, "Muon's momentum", 0.0, 1.0)
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum at the first step", 0.0, 1.0)
    muon_momentum_warmup_steps: int = setting(1500, "steps from that momentum to MUON_MOMENTUM", 0)
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1, 20)
    muon_wd: float = setting(0.04, "decoupled weight decay of Muon", 0.0)
    adam_wd: float = setting(0.04, "decoupled weight decay of AdamW", 0.0)
    beta1: float = setting(0.9, "AdamW: decay of the mean", 0.0, 0.9999)
    beta2: float = setting(0.95, "AdamW: decay of the variance", 0.0, 0.99999)
    adam_eps: float = setting(1e-8, "AdamW: added to the deviation", 0.0)
    grad_clip_norm: float = setting(0.3, "largest norm of all gradients together; 0: no clip", 0.0)
    ema_decay: float = setting(0.997, "exponential moving average of the weights; 0: none", 0.0, 0.999999)
    swa_enabled: int = setting(1, "1: plain average of late weights", 0, 1)
    swa_interval: int = setting(50, "steps between two weights of that average", 1)
    swa_threshold: float = setting(0.2, "learning-rate scale below which it begins", 0.0, 1.0)
    late_qat_threshold: float = setting(0.15, "scale below which quantised weights are trained", 0.0, 1.0)

    # Quantisation and artifact
    matrix_bits: int = setting(6, "bits of a matrix's code", 2, 8)
    embed_bits: int = setting(8, "bits of an embedding's code", 2, 8)
    matrix_clip_sigmas: float = setting(12.85, "deviations of a row that its largest code spans", 0.5, 100.0)
    embed_clip_sigmas: float = setting(20.0, "likewise for embeddings", 0.5, 100.0)
    gptq_calib_batches: int = setting(256, "calibration batches of 16,384 training tokens; 0: no GPTQ", 0)
    gptq_damping: float = setting(0.01, "added to a Hessian's diagonal, as a share of its mean", 1e-6, 10.0)
    prune_pct: float = setting(0.0, "percentage of each matrix, the smallest, set to zero", 0.0, 99.0)
    artifact_limit_bytes: int = setting(16_000_000, "code and model together", 1)

    # Evaluation
    eval_seq_len: int = setting(2048, "tokens of an evaluation window", 1, 2**20)
    eval_stride: int = setting(64, "new tokens that each window scores", 1)
    eval_batch_tokens: int = setting(131_072, "tokens of one forward pass of the evaluation", 1)

    def __init__(self, /, **given):
        problems = [f"{name}: no such setting" for name in set(given) - {f.name for f in dataclasses.fields(self)}]
        for f in dataclasses.fields(self):
            raw = given.get(f.name, os.environ.get(f.name.upper(), f.default))
            try:
                setattr(self, f.name, parse_setting(f, raw))
            except ValueError as error:
                problems.append(f"{f.name.upper()}={raw}: {error}")
                setattr(self, f.name, f.default)
        self.head_dim = self.model_dim // self.num_heads
        self.kv_dim = self.head_dim * self.num_kv_heads
        self.mlp_dim = int(self.mlp_mult * self.model_dim)
        layers = [i.strip() for i in self.ve_layers.split(",") if i.strip()] if self.ve_enabled else []
        self.value_layers = [int(i) if i.isdecimal() else self.num_layers for i in layers]
        problems += contradictions(self) + foreign_variables(self)
        if problems:
            raise UserError("these settings cannot be used:\n  " + "\n  ".join(problems))

    def model_settings(self) -> dict:
        """What the artifact stores, and all that rebuilding the model depends on."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["model"]}


def parse_setting(f: dataclasses.Field, raw):
    """A field's value from its text; whole numbers may be hexadecimal. ValueError says what is wrong."""
    kind, rule = type(f.default), f.metadata
    try:
        value = int(str(raw), 0) if kind is int else kind(raw)
    except ValueError:
        raise ValueError("needs a whole number" if kind is int else "needs a number") from None
    if kind is float and not math.isfinite(value):
        raise ValueError("needs a finite number")
    if rule["low"] is not None and value < rule["low"]:
        raise ValueError(f"must be at least {rule['low']}")
    if rule["high"] is not None and value > rule["high"]:
        raise ValueError(f"must be at most {rule['high']}")
    if rule["choices"] and value not in rule["choices"]:
        raise ValueError(f"must be one of {', '.join(rule['choices'])}")
    return value


def contradictions(h: Hyperparameters) -> list[str]:
    """Settings that are fine alone and impossible together, with their numbers."""
    narrowest = min(h.model_dim, h.kv_dim, h.mlp_dim)
    share = h.train_seq_len * int(os.environ.get("WORLD_SIZE", 1))
    checks = [
        (h.model_dim % h.num_heads == 0, f"MODEL_DIM={h.model_dim} is no multiple of NUM_HEADS={h.num_heads}"),
        (h.num_heads % h.num_kv_heads == 0,
         f"NUM_HEADS={h.num_heads} is no multiple of NUM_KV_HEADS={h.num_kv_heads}"),
        (h.rope_dims % 2 == 0 and h.rope_dims <= h.head_dim,
         f"ROPE_DIMS={h.rope_dims} must be even and at most the {h.head_dim} dimensions of a head"),
        (max(h.value_layers, default=0) < h.num_layers,
         f"VE_LAYERS={h.ve_layers} must name layers from 0 to {h.num_layers - 1}, with commas between them"),
        (not h.use_random_adapters or h.random_adapter_rank <= narrowest,
         f"RANDOM_ADAPTER_RANK={h.random_adapter_rank} is over the narrowest map's {narrowest}"),
        (h.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1 must be 0 or at least 2"),
        (h.eval_stride <= h.eval_seq_len,
         f"EVAL_STRIDE={h.eval_stride} is over EVAL_SEQ_LEN={h.eval_seq_len}: tokens would be skipped"),
        (h.train_batch_tokens % share == 0, f"TRAIN_BATCH_TOKENS={h.train_batch_tokens} is no multiple of {share},"
         f" TRAIN_SEQ_LEN={h.train_seq_len} times the number of processes"),
        (not 0 < h.max_wallclock_seconds <= h.gptq_reserve_seconds,
         f"GPTQ_RESERVE_SECONDS={h.gptq_reserve_seconds:g} leaves no time to train of"
         f" MAX_WALLCLOCK_SECONDS={h.max_wallclock_seconds:g}"),
        (not h.eval_only or h.model_path, "EVAL_ONLY=1 needs MODEL_PATH, the artifact to evaluate"),
        (not h.export_only or h.checkpoint_path, "EXPORT_ONLY=1 needs CHECKPOINT_PATH, the checkpoint to export"),
    ]
    return [message for fine, message in checks if not fine]


# Variables of published scripts that ask for what is not here, and why it is not.
NOT_HERE = dict.fromkeys(("RANDOM_BASIS_ENABLED", "SELECTIVE_FREEZE", "PROGRESSIVE_FREEZE_FRAC", "RAND_PROJ_LAYERS",
                          "RAND_GAIN", "LORA_RANK", "RANDOM_BASIS_SEED", "TTT_ENABLED"), "not built yet")
NOT_HERE |= dict.fromkeys(("NGRAM_EVAL", "KNN_LAMBDA"), "as published it gives no normalised distribution")


def foreign_variables(h: Hyperparameters) -> list[str]:
    """Variables of the environment that ask for what is not here, or look like a misspelt setting."""
    asked = [name for name in NOT_HERE if os.environ.get(name, "") not in ("", "0", "0.0")]
    problems = [f"{name}={os.environ[name]}: {NOT_HERE[name]}; unset it" for name in asked]
    known = {f.name.upper() for f in dataclasses.fields(h)}
    for name in [] if h.allow_unknown else sorted(set(os.environ) - known - set(NOT_HERE)):
        for near in difflib.get_close_matches(name, known, n=1, cutoff=0.9):
            problems.append(f"{name}: no such setting; {near}? (ALLOW_UNKNOWN=1 accepts it)")
    return problems


# ---- Processes and log -------------------------------------------------------------------------------------


class Processes:
    """This process among those of the run, its device and its type of activations.

    A context manager that joins and leaves torchrun's process group. With one process every method is the
    identity, so no other code asks how many there are.
    """

    def __init__(self, h: Hyperparameters):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if self.on_cuda else torch.device("cpu")
        self.dtype = getattr(torch, h.dtype)
        self.compile = self.on_cuda if h.compile == "auto" else h.compile == "1"

    def __enter__(self) -> Processes:
        if self.on_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # what is computed in float32 there tolerates tf32
        else:  # let glibc keep freed memory: the kernel would map and clear each activation anew, which costs
            with contextlib.suppress(OSError, AttributeError):  # more than the arithmetic (bench/cpu_memory.py)
                libc, m_trim_threshold, m_mmap_max = ctypes.CDLL("libc.so.6"), -1, -4
                libc.mallopt(m_mmap_max, 0)
                libc.mallopt(m_trim_threshold, 2**31 - 1)
        if self.count > 1:
            backend = "cpu:gloo,cuda:nccl" if self.on_cuda else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=15))
        return self

    def __exit__(self, *_) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over the processes in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, in one message."""
        if self.count > 1:
            flat = self.sum_(torch.cat([t.flatten() for t in tensors])) / self.count
            pieces = flat.split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [piece.view_as(t) for piece, t in zip(pieces, tensors)])

    def gather(self, tensor: Tensor) -> Tensor:
        """(n, …) of each process -> (count · n, …) on all, in the order of the ranks."""
        parts = [torch.empty_like(tensor) for _ in range(self.count)] if self.count > 1 else [tensor]
        if self.count > 1:
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def share(self, value):
        """Rank 0's object on every process: clocks differ, and decisions must not."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]


class Log:
    """Rank 0's lines, to the run's file and to the console; `progress` goes to a terminal only."""

    def __init__(self, on: bool, path: Path | None = None):
        self.on, self.file = on, path.open("a", encoding="utf-8") if on and path else None
        self.clear = "\r\033[K" if on and sys.stdout.isatty() else ""

    def __call__(self, text: str = "", console: bool = True) -> None:
        if self.file:
            print(text, file=self.file, flush=True)
        if self.on and console:
            print(self.clear + text, flush=True)

    def progress(self, text: str) -> None:
        if self.clear:
            print(self.clear + text, end="", flush=True)


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the whole new one, whatever happens in between."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


# ---- Data --------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def read_shards(folder: str, split: str, vocab_size: int) -> list[np.ndarray]:
    """The tokens of every shard of a split, memory-mapped, each (n,) uint16; headers and sizes are checked."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), f"fineweb_{split}_*.bin")))
    if not paths:
        raise UserError(f"DATA_PATH={folder}: no fineweb_{split}_*.bin there; data/prepare.py makes them")
    shards = []
    for path in paths:
        header = np.fromfile(path, dtype="<i4", count=3).tolist()
        if header[:2] != [SHARD_MAGIC, SHARD_VERSION]:
            raise UserError(f"{path}: not a token shard of version {SHARD_VERSION}; its header begins {header}")
        if header[2] < 1 or os.path.getsize(path) != SHARD_HEADER_BYTES + 2 * header[2]:
            raise UserError(f"{path}: {os.path.getsize(path)} bytes do not hold {header[2]} tokens; fetch it again")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(header[2],))
        largest = int(tokens[:10_000_000].max())
        if largest >= vocab_size:
            raise UserError(f"{path}: token {largest} is outside VOCAB_SIZE={vocab_size}")
        shards.append(tokens)
    return shards


class TrainingData:
    """The training shards as sequences of `seq_len` + 1 tokens, in a fixed order without end.

    Shard after shard; within a shard the order is shuffled anew each epoch. What stands at a position depends on
    the seed and the position alone: any number of processes sees the same steps, and there is no state to keep.
    The last sequences of the last shard are held out of training.
    """

    def __init__(self, h: Hyperparameters):
        self.shards = read_shards(h.data_path, "train", h.vocab_size)
        self.seq_len, self.seed = h.train_seq_len, h.seed
        counts = [(len(shard) - 1) // self.seq_len for shard in self.shards]
        self.held_out = max(1, min(h.holdout_tokens // self.seq_len, sum(counts) // 50, counts[-1] - 1))
        counts[-1] -= self.held_out
        if min(counts) < 1:
            raise UserError(f"DATA_PATH={h.data_path}: too few training tokens for TRAIN_SEQ_LEN={self.seq_len}")
        self.first = np.cumsum([0] + counts)  # position in the epoch at which each shard begins

    def sequences(self, position: int, count: int) -> Tensor:
        """(count, seq_len + 1) int64: the sequences at `position` and after it."""
        rows = []
        while count:
            epoch, place = divmod(position, int(self.first[-1]))
            shard = int(np.searchsorted(self.first, place, side="right")) - 1
            take = min(count, int(self.first[shard + 1]) - place)
            begin = place - int(self.first[shard])
            rows.append(self._rows(shard, self._order(shard, epoch)[begin : begin + take]))
            position, count = position + take, count - take
        return torch.from_numpy(np.concatenate(rows))

    def holdout(self) -> Tensor:
        """(held_out, seq_len + 1) int64: never trained on."""
        begin = int(self.first[-1] - self.first[-2])
        return torch.from_numpy(self._rows(len(self.shards) - 1, np.arange(begin, begin + self.held_out)))

    def micro_batches(self, step: int, h: Hyperparameters, processes: Processes) -> list[tuple[Tensor, Tensor]]:
        """This process's share of a step: inputs and targets, each (sequences, seq_len), in equal parts of at most
        MICRO_BATCH_TOKENS."""
        per_step = h.train_batch_tokens // self.seq_len
        mine = per_step // processes.count
        fits = max(1, h.micro_batch_tokens // self.seq_len)
        size = max(n for n in range(1, min(mine, fits) + 1) if mine % n == 0)
        rows = self.sequences(step * per_step + processes.rank * mine, mine).to(processes.device, non_blocking=True)
        return [(part[:, :-1], part[:, 1:]) for part in rows.split(size)]

    @functools.lru_cache(maxsize=2)
    def _order(self, shard: int, epoch: int) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {epoch} {shard}".encode()).digest()[:8], "little")
        return np.argsort(random_words(seed, int(self.first[shard + 1] - self.first[shard])), kind="stable")

    def _rows(self, shard: int, index: np.ndarray) -> np.ndarray:
        return self.shards[shard][index[:, None] * self.seq_len + np.arange(self.seq_len + 1)].astype(np.int64)


def random_words(seed: int, n: int) -> np.ndarray:
    """(n,) uint64 of Philox, a counter-based generator whose raw stream NumPy promises never to change."""
    return np.random.Philox(key=seed).random_raw(n)


class Tokenizer:
    """A SentencePiece model, and how many bytes of text each token stands for.

    A token's bytes: the UTF-8 length of its piece without the leading ▁, 1 for a byte token, 0 for a control
    token; plus 1 for the leading ▁ where the previous token is no control token.
    """

    def __init__(self, path: str, vocab_size: int):
        try:
            self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            self.model = model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"TOKENIZER_PATH={path}: no SentencePiece model to be read there ({error})") from None
        if model.vocab_size() != vocab_size:
            raise UserError(f"TOKENIZER_PATH={path} has {model.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
        if model.is_unknown(model.piece_to_id("▁")):
            raise UserError(f"TOKENIZER_PATH={path}: ▁ is no piece of its own, so bytes cannot be counted")
        ids, pieces = range(vocab_size), [model.id_to_piece(i) for i in range(vocab_size)]
        self.is_control = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids])
        self.is_byte = np.array([model.is_byte(i) for i in ids])
        self.has_space = np.array([piece.startswith("▁") for piece in pieces]) & ~self.is_control
        lengths = np.array([len(piece.removeprefix("▁").encode()) for piece in pieces])
        self.own_bytes = np.where(self.is_byte, 1, np.where(self.is_control, 0, lengths))

    def count_bytes(self, before: np.ndarray, tokens: np.ndarray) -> int:
        """Bytes of text of the tokens (n,), given the token before each, (n,)."""
        return int(self.own_bytes[tokens].sum() + (self.has_space[tokens] & ~self.is_control[before]).sum())

    def decode(self, tokens: np.ndarray) -> bytes:
        """The text of a stream, document after document: a control token stands before each."""
        documents = np.split(tokens, np.flatnonzero(self.is_control[tokens]))
        return "".join(self.model.decode([document.tolist() for document in documents])).encode()


class ValidationStream:
    """All validation tokens as one stream, the bytes of its text counted once and audited.

    Refuses a stream whose counted bytes are not the length of its decoded text: its bits per byte would be wrong.
    """

    def __init__(self, h: Hyperparameters, tokenizer: Tokenizer):
        tokens = np.concatenate(read_shards(h.data_path, "val", h.vocab_size))
        if len(tokens) < 2 or int(tokens.max()) >= h.vocab_size:
            raise UserError(f"DATA_PATH={h.data_path}: the validation tokens are too few or outside VOCAB_SIZE")
        whole = len(tokens) - int(np.argmin(tokenizer.is_byte[tokens[::-1]]))  # the end may cut a character
        self.text = tokenizer.decode(tokens[:whole])
        counted = tokenizer.count_bytes(np.append(tokenizer.is_control.argmax(), tokens[: whole - 1]), tokens[:whole])
        if counted != len(self.text):
            raise UserError(f"DATA_PATH={h.data_path}: the validation tokens count {counted} bytes and decode to"
                            f" {len(self.text)}; is TOKENIZER_PATH={h.tokenizer_path} the one that made them?")
        self.bytes = tokenizer.count_bytes(tokens[:-1], tokens[1:])  # of what is scored: all but the first token
        self.tokens = torch.from_numpy(tokens.astype(np.int64))

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2) / self.bytes


# ---- Random maps -------------------------------------------------------------------------------------------


class MapRow(NamedTuple):
    """What one linear map of the model is made of. The table of these rows decides all of it."""

    name: str  # path of its module in the model
    out_features: int
    in_features: int
    basis: str  # "learned", or a key of BASES for a frozen random map
    seed: int = 0  # of a frozen map
    rank: int = 0  # of its LoRA


def map_table(h: Hyperparameters) -> list[MapRow]:
    """The maps of all blocks in order: the one place that decides which are random, and how.

    A map's seed is base + 100 · layer + offset (PR #1113); the offset stands before its shape.
    """
    d, kv, hidden = h.model_dim, h.kv_dim, h.mlp_dim
    kinds = {"attention.q": (0, d, d), "attention.k": (1, kv, d), "attention.v": (2, kv, d),
             "attention.proj": (3, d, d), "mlp.fc": (10, hidden, d), "mlp.proj": (11, d, hidden)}
    rows = []
    for layer in range(h.num_layers):
        for kind, (offset, out_features, in_features) in kinds.items():
            row = MapRow(f"blocks.{layer}.{kind}", out_features, in_features, "learned")
            if h.use_random_adapters:
                seed = h.random_adapter_seed + 100 * layer + offset
                row = row._replace(basis="orthogonal", seed=seed, rank=h.random_adapter_rank)
            rows.append(row)
    return rows


def normal_deviates(seed: int, n: int) -> np.ndarray:
    """(n,) float64 standard normal deviates by Box and Muller's formula; no library's sampler has a part in it."""
    half = (n + 1) // 2
    uniform = (random_words(seed, 2 * half) >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def orthogonal(out_features: int, in_features: int, seed: int) -> Tensor:
    """Haar-random (out, in) float64 with orthonormal columns, or rows where those are longer: QR of a normal
    matrix on its tall side, made unique by a positive diagonal of R."""
    tall, short = max(out_features, in_features), min(out_features, in_features)
    q, r = torch.linalg.qr(torch.from_numpy(normal_deviates(seed, tall * short).reshape(tall, short)))
    q = q * r.diagonal().sign()
    return q if out_features >= in_features else q.T.contiguous()


BASES: dict[str, Callable[[int, int, int], Tensor]] = {"orthogonal": orthogonal}


def draw_map(basis: str, out_features: int, in_features: int, seed: int) -> Tensor:
    """(out, in) bfloat16, drawn on the CPU. The map *is* this rounding, on every device and in every type."""
    return BASES[basis](out_features, in_features, seed).to(torch.bfloat16)


# ---- Linear layers -----------------------------------------------------------------------------------------

MATRIX, EMBEDDING, SCALAR = "matrix", "embedding", "scalar"


class Owner(nn.Module):
    """A module that says of each learned tensor of its own what role it has; others are SCALAR.

    The role decides the optimiser and the quantiser. While `observe` is set, the module gives it its inputs.
    """

    roles: dict[str, str] = {}
    observe: Callable[[Tensor], None] | None = None

    def quantize(self, quantizers: dict[str, Quantizer], hessian: Tensor | None) -> dict[str, Codes]:
        """Codes of each tensor in `roles`; `hessian` is Σ x xᵀ (in, in) over calibration inputs, if any came."""
        return {name: quantizers[role].gptq(getattr(self, name).data, hessian) for name, role in self.roles.items()}


class Linear(Owner):
    """A learned map: y = x Wᵀ; W (out, in) float32, orthogonal at first, computed in the type of x."""

    roles = {"weight": MATRIX}

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(out_features, in_features)))

    def forward(self, x: Tensor) -> Tensor:
        if self.observe:
            self.observe(x)
        return F.linear(x, self.weight.to(x.dtype))


class MergedLinear(torch.autograd.Function):
    """y = x (W + A B)ᵀ with a frozen W: one GEMM forward, one backward for the input, thin ones for A and B.

    The dense weight gradient, as costly as a GEMM again, is never formed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        merged = torch.addmm(weight, a, b)
        ctx.save_for_backward(x, merged, a, b)
        return x @ merged.t()

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, merged, a, b = ctx.saved_tensors
        rows_dy, rows_x = dy.flatten(0, -2), x.flatten(0, -2)
        da = rows_dy.t() @ (rows_x @ b.t())
        db = (rows_dy @ a).t() @ rows_x
        return dy @ merged, None, da, db


class FrozenRandomLinearWithLoRA(Owner):
    """y = x (W + A B)ᵀ (+ bias): W (out, in) frozen and random, A (out, rank) and B (rank, in) learned.

    W is a non-persistent bfloat16 buffer, never in a state_dict; `weight` takes one that is already drawn. A
    starts at zero, B normal with std 1/√in. LoRA is arXiv:2106.09685, its use on random maps PR #1113.
    """

    roles = {"lora_B": MATRIX, "lora_A": MATRIX}

    def __init__(self, in_features: int, out_features: int, rank: int = 32, seed: int = 0, bias: bool = False,
                 basis: str = "orthogonal", weight: Tensor | None = None):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is not between 1 and the shorter side, {min(in_features, out_features)}")
        weight = draw_map(basis, out_features, in_features, seed) if weight is None else weight
        self.register_buffer("weight", weight, persistent=False)
        self.lora_A = nn.Parameter(torch.zeros(out_features, rank))
        self.lora_B = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.observe:
            self.observe(x)
        y = MergedLinear.apply(x, self.weight.to(x.dtype), self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def quantize(self, quantizers: dict[str, Quantizer], hessian: Tensor | None) -> dict[str, Codes]:
        """B against its inputs x; then A against its own, x B̂ᵀ with the quantised B̂, so that A mends B's error."""
        b_codes = quantizers[MATRIX].gptq(self.lora_B.data, hessian)
        a = self.lora_A.data
        if hessian is not None:
            b, b_hat, hessian = self.lora_B.data.double(), b_codes.values().double(), hessian.double()
            seen = b_hat @ hessian @ b_hat.T  # (rank, rank)
            seen.diagonal().add_(1e-4 * seen.diagonal().mean() + 1e-12)
            a = torch.linalg.solve(seen, b_hat @ hessian @ b.T @ a.double().T).T.float()  # least squares
            hessian = seen
        return {"lora_B": b_codes, "lora_A": quantizers[MATRIX].gptq(a, hessian)}


class Embedding(Owner):
    """A learned table (vocabulary, dim) float32, looked up in `dtype`; `logits` uses it as the output map.

    Without that use its inputs are one-hot, no Hessian is seen, and GPTQ is rounding to the nearest.
    """

    roles = {"weight": EMBEDDING}

    def __init__(self, vocabulary: int, dim: int, std: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, dim) * std)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        if self.observe:
            self.observe(x)
        return F.linear(x, self.weight.to(x.dtype))


def tensors_by_role(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters by name, sorted into the roles that their owners gave them."""
    groups = {MATRIX: {}, EMBEDDING: {}, SCALAR: {}}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            groups[getattr(module, "roles", {}).get(name.rpartition(".")[-1], SCALAR)][name] = parameter
    return groups


# ---- Transformer -------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


@functools.cache
def flash_attention_3() -> Callable | None:
    with contextlib.suppress(ImportError):
        from flash_attn_interface import flash_attn_func
        return flash_attn_func


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, T, H, D), k and v (B, T, H_kv, D) -> (B, T, H, D); H / H_kv query heads share a key head."""
    if q.is_cuda and q.dtype is torch.bfloat16 and flash_attention_3():
        out = flash_attention_3()(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    batch, heads, length, dim = q.shape
    if q.is_cuda or length > 1024:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    # On a CPU, plain products are faster than the fused kernel at such lengths (bench/cpu_attention.py).
    k, v = k.reshape(-1, length, dim), v.reshape(-1, length, dim)  # (B · H_kv, T, D)
    q = q.reshape(len(k), -1, dim)  # the query heads of a group one below the other
    future = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    future = future.repeat(heads * batch // len(k), 1)
    weights = torch.baddbmm(future, q, k.mT, alpha=dim**-0.5).softmax(-1)
    return (weights @ v).view(batch, heads, length, dim).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial RoPE: x (B, T, H, D), cos and sin (T, 1, R); the first 2R dimensions turn, the rest stay."""
    half = cos.size(-1)
    x1, x2, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest], dim=-1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: y (B, T, H, D) without its projection on the position's own value v (B, T, H_kv, D)."""
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, H_kv, H / H_kv, D)
    direction = F.normalize(v, dim=-1)[..., None, :]
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)


class Attention(nn.Module):
    """Causal attention with grouped queries, normalised q and k, partial RoPE, XSA and value residual."""

    def __init__(self, h: Hyperparameters, layer: int, linear: Callable[[str], nn.Module]):
        super().__init__()
        self.q, self.k, self.v = linear("attention.q"), linear("attention.k"), linear("attention.v")
        self.proj = linear("attention.proj")
        self.q_gain = nn.Parameter(torch.full((h.num_heads, 1), h.qk_gain_init))
        self.value_gate = nn.Parameter(torch.zeros(1)) if h.vrl_enabled and layer else None
        self.head_dim = h.head_dim
        self.xsa = layer >= h.num_layers - h.xsa_last_n

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], added_v: Tensor | None, first_v: Tensor | None):
        """x (B, T, d) -> output (B, T, d) and this layer's own values (B, T, kv_dim)."""
        own_v = self.v(x)
        v = own_v if added_v is None else own_v + added_v
        if self.value_gate is not None:
            v = v + torch.sigmoid(self.value_gate).to(x.dtype) * first_v
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (self.q(x), self.k(x), v))  # (B, T, H, D)
        q = rotate(norm(q), *rope) * self.q_gain.to(x.dtype)
        y = causal_attention(q, rotate(norm(k), *rope), v)
        if self.xsa:
            y = exclude_self(y, v)
        return self.proj(y.flatten(2)), own_v


class MLP(nn.Module):
    """LeakyReLU(0.5)² between two maps."""

    def __init__(self, linear: Callable[[str], nn.Module]):
        super().__init__()
        self.fc, self.proj = linear("mlp.fc"), linear("mlp.proj")

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    """Pre-norm attention and MLP on a learned mix, per channel, of the stream x and the embedding x0."""

    def __init__(self, h: Hyperparameters, layer: int, linear: Callable[[str], nn.Module]):
        super().__init__()
        self.attention, self.mlp = Attention(h, layer, linear), MLP(linear)
        self.norm_scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        share = 1 / (1 + math.exp(-3 * (layer / max(h.num_layers - 1, 1) - 0.5)))
        self.stream_mix = nn.Parameter(torch.full((h.model_dim,), share))
        self.embedding_mix = nn.Parameter(torch.full((h.model_dim,), 1 - share))
        self.attention_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))

    def forward(self, x: Tensor, x0: Tensor, rope: tuple[Tensor, Tensor], added_v: Tensor | None,
                first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.stream_mix.to(x.dtype) * x + self.embedding_mix.to(x.dtype) * x0
        y, own_v = self.attention(norm(x) * self.norm_scale, rope, added_v, first_v)
        x = x + self.attention_scale.to(x.dtype) * y
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * self.norm_scale), own_v


class ProjectedEmbedding(nn.Module):
    """A narrow learned table, widened by a learned map, times a learned scale."""

    def __init__(self, vocabulary: int, dim: int, out_features: int, std: float, scale: float, dtype: torch.dtype):
        super().__init__()
        self.table, self.proj = Embedding(vocabulary, dim, std, dtype), Linear(dim, out_features)
        self.scale = nn.Parameter(torch.tensor([scale]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.proj(self.table(ids))
        return x * self.scale.to(x.dtype)


def bigram_buckets(ids: Tensor, buckets: int) -> Tensor:
    """(B, T) -> (B, T): a hash of each token and the one before; the last bucket where there is none."""
    hashed = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % (buckets - 1)
    return F.pad(hashed, (1, 0), value=buckets - 1)


class GPT(nn.Module):
    """The model that the table of maps and the settings describe; `forward` gives the mean loss in nats.

    Frozen maps are drawn here, initial weights come from torch's global generator.
    """

    def __init__(self, h: Hyperparameters, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.softcap, self.bigram_buckets = h.logit_softcap, h.bigram_vocab_size
        self.ve_layers, self.skipping = h.value_layers, h.num_layers // 2 if h.skips_enabled else 0
        self.table = {row.name: row for row in map_table(h)}
        self.frozen = [row for row in self.table.values() if row.basis != "learned"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            drawn = pool.map(lambda row: draw_map(row.basis, *row[1:3], row.seed), self.frozen)
            maps = {row.name: weight for row, weight in zip(self.frozen, drawn)}

        def linear(layer: int, kind: str) -> nn.Module:
            row = self.table[f"blocks.{layer}.{kind}"]
            if row.basis == "learned":
                return Linear(row.in_features, row.out_features)
            return FrozenRandomLinearWithLoRA(row.in_features, row.out_features, row.rank, weight=maps[row.name])

        self.embedding = Embedding(h.vocab_size, h.model_dim, h.tied_embed_init_std, dtype)
        if h.bigram_vocab_size:
            self.bigram = ProjectedEmbedding(h.bigram_vocab_size, h.bigram_dim, h.model_dim, 0.0, 0.05, dtype)
        self.smear_gate = nn.Parameter(torch.zeros(h.model_dim)) if h.smear_enabled else None
        if self.ve_layers:
            self.value_embedding = ProjectedEmbedding(h.vocab_size, h.ve_dim, h.kv_dim, 0.01, 0.1, dtype)
            self.value_scales = nn.Parameter(torch.ones(len(self.ve_layers)))
        self.blocks = nn.ModuleList(Block(h, i, functools.partial(linear, i)) for i in range(h.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(self.skipping, h.model_dim)) if self.skipping else None
        frequencies = h.rope_base ** -(torch.arange(0, h.rope_dims, 2) / max(h.rope_dims, 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def fingerprint(self) -> str:
        """SHA-256 over the bfloat16 bytes of the maps it computes with, in the order of the table."""
        digest = hashlib.sha256()
        for row in self.frozen:
            digest.update(self.get_submodule(row.name).weight.cpu().view(torch.int16).numpy().astype("<i2").tobytes())
        return digest.hexdigest()

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> the last norm's output (B, T, d), which the logits are made of."""
        x = self.embedding(ids)
        if self.bigram_buckets:
            x = x + self.bigram(bigram_buckets(ids, self.bigram_buckets))
        x = norm(x)
        if self.smear_gate is not None:  # a mix with the position before, per channel
            x = torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), torch.sigmoid(self.smear_gate).to(x.dtype))
        x0 = x
        angles = torch.arange(ids.size(1), device=ids.device)[:, None, None] * self.frequencies
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # each (T, 1, rope_dims / 2)
        added_v = self.value_embedding(ids) if self.ve_layers else None
        skips, first_v = [], None
        for layer, block in enumerate(self.blocks):
            if skips and layer >= self.skipping:
                x = x + self.skip_weights[layer - self.skipping].to(x.dtype) * skips.pop()
            v = None
            if layer in self.ve_layers:
                v = added_v * self.value_scales[self.ve_layers.index(layer)].to(x.dtype)
            x, own_v = block(x, x0, rope, v, first_v)
            first_v = own_v if first_v is None else first_v
            if layer < self.skipping:
                skips.append(x)
        return norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, d) -> (…, vocabulary) float32, softly capped."""
        return self.softcap * torch.tanh(self.embedding.logits(hidden).float() / self.softcap)

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids (B, T) and the targets (B, n) of their last n positions -> loss of each in nats, (B, n) float32."""
        logits = self.logits(self.hidden(ids)[:, -targets.size(1) :])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.losses(ids, targets).mean()


# ---- Optimisers and averages -------------------------------------------------------------------------------


def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """(n, rows, columns) -> each matrix with its singular values near 1, by a quintic Newton-Schulz iteration."""
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    is_tall = g.size(1) > g.size(2)
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (Jordan et al. 2024), decoupled weight decay; for 2-D parameters.

    Matrices of one shape are orthogonalised in one batch, which the processes share out between them.
    """

    def __init__(self, params, lr: float = 0.025, momentum: float = 0.95, backend_steps: int = 5,
                 weight_decay: float = 0.0, processes: Processes | None = None):
        defaults = {"lr": lr, "momentum": momentum, "backend_steps": backend_steps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.processes = processes

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                updates = self._updates(params, group)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _updates(self, params: list[nn.Parameter], group: dict) -> list[Tensor]:
        gradients = [p.grad for p in params]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        stacked = torch.stack(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))
        if self.processes is None or self.processes.count == 1:
            return list(orthogonalize(stacked, group["backend_steps"]))
        share = -(-len(params) // self.processes.count)
        stacked = F.pad(stacked, (0, 0, 0, 0, 0, share * self.processes.count - len(params)))
        mine = stacked[self.processes.rank * share :][:share]
        return list(self.processes.gather(orthogonalize(mine, group["backend_steps"]))[: len(params)])


class Optimizers:
    """Muon for the matrices, AdamW for the rest; `step` clips the gradients and applies the schedule's scale."""

    def __init__(self, groups: dict[str, dict[str, nn.Parameter]], h: Hyperparameters, processes: Processes):
        self.h, self.processes = h, processes
        self.params = [p for group in groups.values() for p in group.values()]
        adam = [{"params": list(groups[role].values()), "lr": lr}
                for role, lr in ((EMBEDDING, h.tied_embed_lr), (SCALAR, h.scalar_lr))]
        self.muon = Muon(list(groups[MATRIX].values()), h.matrix_lr, h.muon_momentum, h.muon_backend_steps,
                         h.muon_wd, processes)
        self.adam = torch.optim.AdamW(adam, betas=(h.beta1, h.beta2), eps=h.adam_eps, weight_decay=h.adam_wd,
                                      fused=True)
        self.base_lrs = [(g, g["lr"]) for o in (self.muon, self.adam) for g in o.param_groups]

    def step(self, step: int, scale: float) -> None:
        h = self.h
        self.processes.average_([p.grad for p in self.params])
        warm = min(1.0, step / max(h.muon_momentum_warmup_steps, 1))
        self.muon.param_groups[0]["momentum"] = torch.lerp(
            torch.tensor(h.muon_momentum_warmup_start), torch.tensor(h.muon_momentum), warm).item()
        for group, lr in self.base_lrs:
            group["lr"] = lr * scale
        if h.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.params, h.grad_clip_norm)
        self.muon.step()
        self.adam.step()
        for p in self.params:
            p.grad = None


class Averages:
    """Averages of the weights along training, each a candidate for the export beside the last weights.

    `ema` is corrected for its start at zero, (1 - d) Σ dⁱ w / (1 - dᵗ): weights that begin at zero, as adapters
    do, are not pulled back to it. `swa` is the plain mean of late weights.
    """

    def __init__(self, params: list[nn.Parameter], h: Hyperparameters):
        self.h = h
        self.params = [p.detach() for p in params]
        self.sums = {"ema": [torch.zeros_like(p) for p in self.params], "swa": [torch.zeros_like(p) for p in self.params]}
        self.weights = {"ema": 0.0, "swa": 0.0}

    @torch.no_grad()
    def update(self, step: int, scale: float) -> None:
        d = self.h.ema_decay
        if d:
            torch._foreach_lerp_(self.sums["ema"], self.params, 1 - d)
            self.weights["ema"] = d * self.weights["ema"] + 1 - d
        if self.h.swa_enabled and scale < self.h.swa_threshold and step % self.h.swa_interval == 0:
            torch._foreach_add_(self.sums["swa"], self.params)
            self.weights["swa"] += 1.0

    def candidates(self) -> dict[str, list[Tensor]]:
        averages = {name: torch._foreach_div(self.sums[name], weight)
                    for name, weight in self.weights.items() if weight}
        return {"last": [p.clone() for p in self.params]} | averages


# ---- Quantisation ------------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """A quantised matrix: value = code · 2^((exponent - 160) / 8), one exponent a row; exponent 0: a zero row."""

    codes: Tensor  # (rows, columns) int8
    exponents: Tensor  # (rows,) uint8

    def values(self) -> Tensor:
        """(rows, columns) float32."""
        return self.codes.float() * row_steps(self.exponents)


def row_steps(exponents: Tensor) -> Tensor:
    """(rows,) uint8 -> (rows, 1) float32: the width of a row's quantisation step."""
    return torch.exp2((exponents.double() - 160) / 8).where(exponents > 0, 0.0).float()[:, None]


class Quantizer(NamedTuple):
    """Symmetric, one step width a row: its largest code stands for `sigmas` root mean squares of the row.

    Entropy coding comes after, so the width, not the number of codes, sets the bytes.
    """

    bits: int
    sigmas: float
    damping: float = 0.01
    prune_pct: float = 0.0

    def exponents(self, w: Tensor) -> Tensor:
        step = w.double().square().mean(1).sqrt() * self.sigmas / (2 ** (self.bits - 1) - 1)
        return torch.where(step > 0, (160 + 8 * step.log2()).round().clamp(1, 255), 0).to(torch.uint8)

    def round(self, w: Tensor, steps: Tensor) -> Tensor:
        """The codes nearest to w, as floats."""
        largest = 2 ** (self.bits - 1) - 1
        return (w / steps.clamp(min=1e-30)).round().clamp(-largest, largest)

    def nearest(self, w: Tensor) -> Tensor:
        """(rows, columns): w as the artifact would hold it, without error feedback. Late QAT trains this."""
        steps = row_steps(self.exponents(w)).to(w.dtype)
        return self.round(w, steps) * steps

    def gptq(self, w: Tensor, hessian: Tensor | None, block: int = 128) -> Codes:
        """Codes of w (rows, columns) that keep w x near for inputs with `hessian` (columns, columns) = Σ x xᵀ.

        GPTQ (arXiv:2210.17323): column by column, largest input first, each column's rounding error is made
        good in those that follow. Without a Hessian every value is rounded to the nearest.
        """
        exponents, w = self.exponents(w), w.double()
        steps = row_steps(exponents).double()
        kept = w.abs() >= torch.quantile(w.abs().flatten().float(), self.prune_pct / 100)
        if hessian is None:
            return Codes((self.round(w, steps) * kept).to(torch.int8), exponents)
        order = hessian.diagonal().argsort(descending=True)
        w, kept, hessian = w[:, order], kept[:, order], hessian[order][:, order].double()
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean() + 1e-12)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True)
        codes = torch.empty_like(w)
        for begin in range(0, w.size(1), block):
            end = min(begin + block, w.size(1))
            errors = torch.empty_like(w[:, begin:end])
            for j in range(begin, end):
                codes[:, j] = self.round(w[:, j : j + 1], steps)[:, 0] * kept[:, j]
                errors[:, j - begin] = (w[:, j] - codes[:, j] * steps[:, 0]) / factor[j, j]
                w[:, j:end] -= errors[:, j - begin, None] * factor[j, j:end]
            w[:, end:] -= errors @ factor[begin:end, end:]
        return Codes(codes[:, order.argsort()].to(torch.int8), exponents)


def quantizers_of(h: Hyperparameters) -> dict[str, Quantizer]:
    return {MATRIX: Quantizer(h.matrix_bits, h.matrix_clip_sigmas, h.gptq_damping, h.prune_pct),
            EMBEDDING: Quantizer(h.embed_bits, h.embed_clip_sigmas, h.gptq_damping)}


@contextlib.contextmanager
def weights_as_stored(groups: dict[str, dict[str, nn.Parameter]], quantizers: dict[str, Quantizer]):
    """Within, every tensor that the artifact quantises holds its quantised value; after, its own again.

    A gradient taken within is the straight-through one of the float32 master, for any part of the model, and
    the compiled graph knows nothing of it.
    """
    stored = [(quantizers[role], p.detach()) for role in quantizers for p in groups[role].values()]
    masters = [p.clone() for _, p in stored]
    for quantizer, p in stored:
        p.copy_(quantizer.nearest(p))
    yield
    torch._foreach_copy_([p for _, p in stored], masters)


def collect_hessians(model: GPT, batches: Iterable[Tensor], processes: Processes) -> dict[nn.Module, Tensor]:
    """Σ x xᵀ (in, in) float32 over all processes, for every module that asks for it with `observe`."""
    hessians: dict[nn.Module, Tensor] = {}

    def observer(module: nn.Module) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            x = x.detach().flatten(0, -2)
            product = (x.t() @ x).float()
            hessians[module] = hessians[module] + product if module in hessians else product
        return add

    owners = [module for module in model.modules() if isinstance(module, Owner)]
    for module in owners:
        module.observe = observer(module)
    with torch.no_grad():
        for ids in batches:
            model.logits(model.hidden(ids))
    for module in owners:
        module.observe = None
        if module in hessians:
            processes.sum_(hessians[module])
    return hessians


# ---- Artifact ----------------------------------------------------------------------------------------------

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"RANDMAPS", 1
CODECS = {
    "brotli": lambda raw: brotli.compress(raw, quality=11, lgwin=24),
    "lzma": lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE, filters=[LZMA_FILTER]),
}
LZMA_FILTER = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}


def byte_planes(array: np.ndarray) -> bytes:
    """All first bytes of the items, then all second ones, …: like stands beside like for the compressor."""
    return array.reshape(-1, 1).view(np.uint8).T.tobytes()


def from_byte_planes(raw: bytes, dtype: str, count: int) -> np.ndarray:
    planes = np.frombuffer(raw, np.uint8).reshape(np.dtype(dtype).itemsize, count)
    return np.ascontiguousarray(planes.T).view(dtype)[:, 0]


def decompress(codec: str, packed: bytes, size: int) -> bytes:
    """Exactly `size` bytes, or UserError; never more than a little above that in memory."""
    out, decoder = bytearray(), brotli.Decompressor() if codec == "brotli" else lzma.LZMADecompressor()
    try:
        for begin in range(0, len(packed), 64):
            piece = packed[begin : begin + 64]
            out += decoder.process(piece) if codec == "brotli" else decoder.decompress(piece, size + 1 - len(out))
            if len(out) > size:
                break
    except (brotli.error, lzma.LZMAError, EOFError) as error:
        raise UserError(f"the artifact's data are damaged: {error}") from None
    if len(out) != size:
        raise UserError(f"the artifact's data are damaged: a section of {size} bytes unpacks to {len(out)}")
    return bytes(out)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "machine": platform.machine()}


def write_artifact(h: Hyperparameters, model_fingerprint: str, tokenizer_sha256: str,
                   tensors: dict[str, Codes | Tensor]) -> tuple[bytes, dict[str, int]]:
    """The artifact's bytes, and how many of them each group of like tensors takes.

    Layout, little-endian: magic (8 bytes), version and length of the header (uint32 each), header (JSON,
    brotli), the groups one after another, SHA-256 over all before it. The header holds the configuration, the
    maps' fingerprint, the tensor table [name, group, shape] and the groups [name, codec, size, packed size].
    """
    table, streams = [], {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].rsplit(".", 1)[-1]):
        kind = name.rsplit(".", 1)[-1]
        quantized = isinstance(tensor, Codes)
        group = f"codes {kind}" if quantized else "float16"
        table.append([name, group, list((tensor.codes if quantized else tensor).shape)])
        array = tensor.codes.cpu().numpy() if quantized else tensor.detach().cpu().numpy().astype("<f2")
        streams.setdefault(group, []).append(array.ravel())
        if quantized:
            streams.setdefault(f"exponents {kind}", []).append(tensor.exponents.cpu().numpy())
    groups, payload = [], b""
    raws = {group: byte_planes(np.concatenate(arrays)) for group, arrays in streams.items()}
    with ThreadPoolExecutor() as pool:
        tried = {(g, c): pool.submit(compress, raw) for g, raw in raws.items() for c, compress in CODECS.items()}
    for group, raw in raws.items():
        packed, codec = min(((tried[group, c].result(), c) for c in CODECS), key=lambda pair: len(pair[0]))
        groups.append([group, codec, len(raw), len(packed)])
        payload += packed
    header = {"model": h.model_settings(), "fingerprint": model_fingerprint, "tokenizer_sha256": tokenizer_sha256,
              "versions": versions(), "tensors": table, "groups": groups}
    packed_header = CODECS["brotli"](json.dumps(header, separators=(",", ":")).encode())
    body = ARTIFACT_MAGIC + struct.pack("<II", ARTIFACT_VERSION, len(packed_header)) + packed_header + payload
    sizes = {"header": len(body) - len(payload) + 32} | {group: size for group, _, _, size in groups}
    return body + hashlib.sha256(body).digest(), sizes


class Artifact:
    """A parsed artifact. Raises UserError for anything that is not exactly what `write_artifact` makes."""

    def __init__(self, blob: bytes):
        if len(blob) < 48 or blob[:8] != ARTIFACT_MAGIC:
            raise UserError(f"not an artifact of this project ({len(blob)} bytes beginning {blob[:8]!r})")
        if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
            raise UserError("the artifact is damaged: its checksum does not match; copy it again")
        version, header_size = struct.unpack("<II", blob[8:16])
        if version != ARTIFACT_VERSION:
            raise UserError(f"the artifact has format version {version}, this script reads {ARTIFACT_VERSION}")
        try:
            packed_header = blob[16 : 16 + header_size]
            self.bytes = len(blob)
            self.header = json.loads(brotli.decompress(packed_header))
            self.h = Hyperparameters(**self.header["model"])
            self.tensors = self._unpack(memoryview(blob)[16 + header_size : -32])
        except (brotli.error, KeyError, TypeError, ValueError) as error:
            raise UserError(f"the artifact is damaged: {type(error).__name__}: {error}") from None

    @property
    def codec(self) -> str:
        return max(self.header["groups"], key=lambda group: group[3])[1]

    def _unpack(self, payload: memoryview) -> dict[str, Tensor]:
        """Every tensor by name, float32."""
        table, groups = self.header["tensors"], self.header["groups"]
        wanted = {}
        for _, group, shape in table:
            wanted[group] = wanted.get(group, 0) + math.prod(shape) * (2 if group == "float16" else 1)
            if group != "float16":
                rows = group.replace("codes", "exponents")
                wanted[rows] = wanted.get(rows, 0) + shape[0]
        streams, place = {}, 0
        for name, codec, size, packed in groups:
            if size != wanted.get(name):
                raise ValueError(f"group {name} has {size} bytes, its tensors need {wanted.get(name)}")
            raw = decompress(codec, bytes(payload[place : place + packed]), size)
            kind = "<f2" if name == "float16" else "i1" if name.startswith("codes") else "u1"
            streams[name] = torch.from_numpy(from_byte_planes(raw, kind, size // np.dtype(kind).itemsize).copy())
            place += packed
        if place != len(payload):
            raise ValueError("the groups do not fill the file")
        tensors, used = {}, dict.fromkeys(streams, 0)

        def take(group: str, count: int) -> Tensor:
            used[group] += count
            return streams[group][used[group] - count : used[group]]

        for name, group, shape in table:
            values = take(group, math.prod(shape)).view(shape)
            if group != "float16":
                values = Codes(values, take(group.replace("codes", "exponents"), shape[0])).values()
            tensors[name] = values.float()
        return tensors

    def build(self, processes: Processes) -> GPT:
        """A model that computes from this artifact alone, its maps drawn anew and proved to be the same."""
        model = GPT(self.h, processes.dtype)
        here, there = model.fingerprint(), self.header["fingerprint"]
        if here != there:
            raise UserError(
                f"the random maps drawn here are not those of the artifact ({here[:16]} here, {there[:16]} there);"
                f" made with {self.header['versions']}, read with {versions()}: use those versions"
            )
        expected = {name: list(t.shape) for name, t in model.state_dict().items()}
        if expected != {name: list(t.shape) for name, t in self.tensors.items()}:
            raise UserError("the artifact's tensors are not those of the model that its configuration describes")
        model.load_state_dict(self.tensors)
        return model.to(processes.device).eval()


# ---- Evaluation --------------------------------------------------------------------------------------------


def plan_windows(targets: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each window starts, and how many of its last positions it scores; the sum is `targets`.

    The first window scores all its positions, each later one those that no window scored before: `stride` of
    them, and in the last, which ends with the stream, what remains.
    """
    length = min(length, targets)
    starts = np.append(np.arange(0, targets - length, stride), targets - length)
    ends = starts + length
    return starts, np.diff(ends, prepend=0)


@torch.no_grad()
def evaluate(model: GPT, val: ValidationStream, h: Hyperparameters, processes: Processes, stride: int,
             log: Log) -> tuple[float, float]:
    """Mean loss in nats and bits per byte over every token of the stream after the first, each scored once.

    Batches are the same for any number of processes, which take them in turn.
    """
    starts, counts = plan_windows(len(val.tokens) - 1, h.eval_seq_len, stride)
    length = min(h.eval_seq_len, len(val.tokens) - 1)
    per_batch = max(1, h.eval_batch_tokens // length)
    batches = [slice(0, 1)] + [slice(i, i + per_batch) for i in range(1, len(starts), per_batch)]
    score = torch.compile(model.losses, dynamic=False) if processes.compile else model.losses
    tokens = val.tokens.to(processes.device)
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    for done, batch in enumerate(batches[processes.rank :: processes.count]):
        first, scored = starts[batch], torch.from_numpy(counts[batch]).to(processes.device)
        tail = int(counts[batch].max())
        places = torch.from_numpy(first[:, None] + np.arange(length + 1)).to(processes.device)
        rows = tokens[places]  # (windows, length + 1)
        whole = len(first) == per_batch and tail == stride
        losses = (score if whole else model.losses)(rows[:, :-1], rows[:, 1:][:, -tail:])
        new = torch.arange(tail, device=processes.device) >= tail - scored[:, None]
        total += torch.where(new, losses.double(), 0.0).sum()
        log.progress(f"evaluating: {100 * done * processes.count // len(batches)}%")
    nats = processes.sum_(total).item()
    return nats / (len(val.tokens) - 1), val.bits_per_byte(nats)


# ---- Training ----------------------------------------------------------------------------------------------


class Clock:
    """How many steps remain, by their number and by the wall-clock, whichever ends first.

    A step's time is the median of the recent ones: a slow step costs its time, and does not move the schedule.
    """

    def __init__(self, iterations: int, seconds: float):
        self.iterations, self.seconds = iterations, seconds if seconds > 0 else math.inf
        self.elapsed, self.recent = 0.0, []

    def step_took(self, seconds: float) -> None:
        self.elapsed += seconds
        self.recent = self.recent[-99:] + [seconds]

    def remaining(self, step: int) -> int:
        left = self.seconds - self.elapsed
        typical = statistics.median(self.recent) if len(self.recent) >= 5 or left <= 0 else 0.0
        return int(min(self.iterations - step, max(0.0, left) // typical if typical else math.inf))


def warmdown_scale(step: int, remaining: int, warmdown: int) -> float:
    """1, then linear to 0 over the last `warmdown` steps, or over all where there are fewer."""
    return min(1.0, remaining / max(1, min(warmdown, step + remaining)))


def train_step(run: Callable, optimizers: Optimizers, batches: list, step: int, scale: float) -> Tensor:
    """Gradients over all micro-batches and processes, then an update; this process's mean loss, on the device."""
    total = 0.0
    for ids, targets in batches:
        loss = run(ids, targets) / len(batches)
        loss.backward()
        total += loss.detach()
    optimizers.step(step, scale)
    return total


def train(h: Hyperparameters, processes: Processes, model: GPT, data: TrainingData, val: ValidationStream,
          log: Log) -> dict:
    """Trains the model, leaves in it the average that did best on held-out training text; returns the figures."""
    groups, quantizers = tensors_by_role(model), quantizers_of(h)
    params = [p for group in groups.values() for p in group.values()]
    run = torch.compile(model, dynamic=False, fullgraph=True) if processes.compile else model
    initial = [p.detach().clone() for p in params]
    optimizers = Optimizers(groups, h, processes)
    for step in range(h.warmup_steps):
        log.progress(f"warming up: {step}/{h.warmup_steps}")
        train_step(run, optimizers, data.micro_batches(step, h, processes), step, 1.0)
    torch._foreach_copy_([p.detach() for p in params], initial)  # in place: a new tensor would mean a new graph
    optimizers, averages = Optimizers(groups, h, processes), Averages(params, h)
    clock = Clock(h.iterations, h.max_wallclock_seconds - h.gptq_reserve_seconds)
    step, qat, loss = 0, False, None
    began = time.perf_counter()
    while True:
        remaining = processes.share(clock.remaining(step))
        times = f"train_time:{1000 * clock.elapsed:.0f}ms step_avg:{1000 * clock.elapsed / max(step, 1):.2f}ms"
        if remaining <= 0 or (h.val_loss_every and step and step % h.val_loss_every == 0):
            if remaining <= 0:
                choose_average(model, params, averages, data.holdout(), h, processes, log)
            val_loss, val_bpb = evaluate(model, val, h, processes, h.eval_seq_len, log)
            log(f"step:{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} {times}")
            began = time.perf_counter()
        if remaining <= 0:
            break
        scale = warmdown_scale(step, remaining, h.warmdown_iters)
        if scale < h.late_qat_threshold and not qat:
            qat = True
            log(f"late_qat:on step:{step} scale:{scale:.4f}")
        previous = loss
        with weights_as_stored(groups, quantizers) if qat else contextlib.nullcontext():
            loss = train_step(run, optimizers, data.micro_batches(step, h, processes), step, scale)
        averages.update(step, scale)
        step += 1
        if previous is not None and not math.isfinite(previous.item()):  # waits: the device is a step behind at most
            raise UserError(f"the loss of step {step - 1} is not finite; lower the learning rates")
        now = time.perf_counter()
        clock.step_took(now - began)
        began = now
        tokens_per_second = h.train_batch_tokens * step / clock.elapsed
        log.progress(f"step {step}, {remaining - 1} to go: {tokens_per_second:,.0f} tokens/s,"
                     f" {(remaining - 1) * clock.elapsed / step:.0f} s left")
        if h.train_log_every and (step <= 10 or step % h.train_log_every == 0):
            mean = processes.sum_(loss.clone()).item() / processes.count
            times = f"train_time:{1000 * clock.elapsed:.0f}ms step_avg:{1000 * clock.elapsed / step:.2f}ms"
            log(f"step:{step}/{h.iterations} train_loss:{mean:.4f} {times}")
    return {"steps": step, "train_seconds": round(clock.elapsed, 3), "val_loss_before": val_loss,
            "val_bpb_before": val_bpb, "tokens_per_second": round(h.train_batch_tokens * step / clock.elapsed)}


def choose_average(model: GPT, params: list, averages: Averages, holdout: Tensor, h: Hyperparameters,
                   processes: Processes, log: Log) -> None:
    """Leaves in the model the candidate with the least loss on text that was neither trained on nor validation."""
    scores, candidates = {}, averages.candidates()
    size = max(1, h.eval_batch_tokens // holdout.size(1))
    for name, weights in candidates.items():
        torch._foreach_copy_([p.detach() for p in params], weights)
        total = torch.zeros((), dtype=torch.float64, device=processes.device)
        with torch.no_grad():
            for rows in holdout.split(size)[processes.rank :: processes.count]:
                rows = rows.to(processes.device)
                total += model.losses(rows[:, :-1], rows[:, 1:]).double().sum()
        scores[name] = processes.sum_(total).item() / holdout[:, 1:].numel()
    best = min(scores, key=scores.get)
    torch._foreach_copy_([p.detach() for p in params], candidates[best])
    log("average " + " ".join(f"{name}:{score:.4f}" for name, score in scores.items()) + f" exported:{best}")


def export(h: Hyperparameters, processes: Processes, model: GPT, data: TrainingData, step: int, tokenizer: Tokenizer,
           log: Log) -> bytes:
    """The artifact of the model, on every process; UserError if it and the code are over the limit."""
    blob, began, code = b"", time.perf_counter(), len(Path(__file__).read_bytes())
    size = max(1, 16_384 // h.train_seq_len)
    first = step * (h.train_batch_tokens // h.train_seq_len)
    calibration = (data.sequences(first + i * size, size)[:, :-1].to(processes.device)
                   for i in range(processes.rank, h.gptq_calib_batches, processes.count))
    hessians = collect_hessians(model, calibration, processes)
    if processes.rank == 0:
        tensors, quantizers = dict(model.state_dict()), quantizers_of(h)
        for prefix, module in model.named_modules():
            if isinstance(module, Owner):
                log.progress(f"quantising {prefix}")
                codes = module.quantize(quantizers, hessians.get(module))
                tensors |= {f"{prefix}.{name}": value for name, value in codes.items()}
        blob, sizes = write_artifact(h, model.fingerprint(), tokenizer.sha256, tensors)
        for name, size in sizes.items():
            log(f"artifact {name}: {size:,} bytes")
        total = code + len(blob)
        log(f"artifact code {code:,} + model {len(blob):,} = {total:,} bytes,"
            f" {total / h.artifact_limit_bytes:.1%} of {h.artifact_limit_bytes:,};"
            f" exported in {time.perf_counter() - began:.1f} s")
        if total > h.artifact_limit_bytes:
            raise UserError(f"code and model take {total:,} bytes, the limit is {h.artifact_limit_bytes:,}. The trained"
                            " weights are in checkpoint.pt: export them with EXPORT_ONLY=1 CHECKPOINT_PATH=… and a"
                            " larger MATRIX_CLIP_SIGMAS or EMBED_CLIP_SIGMAS, or train with a smaller rank or width")
    return processes.share(blob)


# ---- Main --------------------------------------------------------------------------------------------------


def describe(h: Hyperparameters, processes: Processes, model: GPT, log: Log) -> None:
    """Everything that a run depends on: source, settings, versions, device, the table of maps."""
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    for f in dataclasses.fields(h):
        log(f"{f.name.upper()}={getattr(h, f.name)}", console=False)
    device = torch.cuda.get_device_name() if processes.on_cuda else f"{platform.machine()} CPU"
    log(f"versions {json.dumps(versions())} device {processes.count} x {device}, {torch.get_num_threads()} threads")
    for row in model.table.values():
        log(f"map {row.name} {row.out_features}x{row.in_features} {row.basis} seed:{row.seed} rank:{row.rank}", False)
    trained = sum(p.numel() for p in model.parameters())
    frozen = sum(row.out_features * row.in_features for row in model.frozen)
    log(f"model {trained:,} trained and {frozen:,} frozen parameters, maps {model.fingerprint()[:16]}")


def run(h: Hyperparameters, processes: Processes) -> None:
    """The job: train and export, or take a checkpoint or an artifact; evaluate the artifact; report."""
    artifact = None
    if h.eval_only:
        artifact = Artifact(read_file("MODEL_PATH", h.model_path))
        h = Hyperparameters(**artifact.header["model"])
    tokenizer = Tokenizer(h.tokenizer_path, h.vocab_size)
    val = ValidationStream(h, tokenizer)
    name = h.run_id or time.strftime("%Y%m%d-%H%M%S")
    folder = Path(h.output_dir) / name
    figures = {}
    if artifact is None:
        data = TrainingData(h)
        if processes.rank == 0 and folder.exists():
            raise UserError(f"{folder} is another run's; set RUN_ID to a new name")
        if processes.rank == 0:
            folder.mkdir(parents=True)
    log = Log(processes.rank == 0, None if artifact else folder / "train.log")
    if artifact is None:
        torch.manual_seed(h.seed)
        model = GPT(h, processes.dtype).to(processes.device)
        describe(h, processes, model, log)
        if h.export_only:
            saved = torch.load(io.BytesIO(read_file("CHECKPOINT_PATH", h.checkpoint_path)), weights_only=True)
            figures = saved["figures"]
            model.load_state_dict(saved["weights"])
        else:
            figures = train(h, processes, model, data, val, log)
        if processes.rank == 0:
            buffer = io.BytesIO()
            torch.save({"model": h.model_settings(), "figures": figures, "weights": model.state_dict()}, buffer)
            write_atomically(folder / "checkpoint.pt", buffer.getvalue())
        began = time.perf_counter()
        blob = export(h, processes, model, data, figures["steps"], tokenizer, log)
        figures["export_seconds"] = round(time.perf_counter() - began, 3)
        if processes.rank == 0:
            write_atomically(folder / "model.int6.ptz", blob)
        del model
        artifact = Artifact(blob)
    if artifact.header["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(f"TOKENIZER_PATH={h.tokenizer_path} is not the tokenizer the artifact was made with")
    began = time.perf_counter()
    model = artifact.build(processes)
    results = {}
    for kind, stride in (("roundtrip", h.eval_seq_len), ("sliding_window", h.eval_stride)):
        val_loss, val_bpb = results[kind] = evaluate(model, val, h, processes, stride, log)
        prefix = f"final_int6_{artifact.codec}_{kind}"
        log(f"{prefix} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} stride:{stride}"
            f" eval_time:{1000 * (time.perf_counter() - began):.0f}ms")
        log(f"{prefix}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    figures["eval_seconds"] = round(time.perf_counter() - began, 3)
    if processes.rank == 0:
        report(h, processes, artifact, val, figures, results, folder if not h.eval_only else None, log)


def read_file(variable: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{variable}={path}: {error.strerror}") from None


def report(h: Hyperparameters, processes: Processes, artifact: Artifact, val: ValidationStream, figures: dict,
           results: dict, folder: Path | None, log: Log) -> None:
    """The table for people, and submission.json."""
    code = len(Path(__file__).read_bytes())
    text = val.text[:4_000_000]
    part = "" if len(text) == len(val.text) else " (of its first 4 MB)"
    log()
    log(f"{'':<36}{'val_loss':>10}{'val_bpb':>10}")
    if "val_bpb_before" in figures:
        log(f"{'before quantisation':<36}{figures['val_loss_before']:>10.4f}{figures['val_bpb_before']:>10.4f}")
    for kind, (val_loss, val_bpb) in results.items():
        log(f"{'artifact, ' + kind.replace('_', ' '):<36}{val_loss:>10.4f}{val_bpb:>10.4f}")
    for name, packed in (("brotli 11", brotli.compress(text)), ("xz -9", lzma.compress(text, preset=9))):
        log(f"{'for scale, ' + name + part:<36}{'':>10}{8 * len(packed) / len(text):>10.4f}")
    log(f"artifact {code + artifact.bytes:,} bytes: code {code:,}, model {artifact.bytes:,}")
    if folder:
        hardware = torch.cuda.get_device_name() if processes.on_cuda else f"{platform.machine()} CPU"
        submission = {
            "author": h.author, "github_id": h.github_id, "name": f"Adapters on random linear maps ({folder.name})",
            "blurb": f"{h.num_layers}L x {h.model_dim}d, frozen random maps with LoRA of rank {h.random_adapter_rank}"
                     if h.use_random_adapters else f"{h.num_layers}L x {h.model_dim}d, everything learned",
            "date": time.strftime("%Y-%m-%d"), "val_loss": results["sliding_window"][0],
            "val_bpb": results["sliding_window"][1], "bytes_total": code + artifact.bytes, "bytes_code": code,
            "dataset": Path(h.data_path).name, "hardware": f"{processes.count} x {hardware}", "seeds": [h.seed], **figures,
        }
        write_atomically(folder / "submission.json", (json.dumps(submission, indent=2) + "\n").encode())
        log(f"written to {folder}: model.int6.ptz, submission.json, checkpoint.pt, train.log")


def main() -> None:
    try:
        h = Hyperparameters()
        with Processes(h) as processes:
            run(h, processes)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
