"""Learning adapters on random linear maps: a language model for Parameter Golf in one script.

Most weight matrices are frozen random maps. A seed regenerates them, so they take 0 bytes of the
artifact. Adapters, gains, gates, embeddings and selected matrices are learned around them,
quantized, compressed and written as one file. The score is read from that file alone. Every setting
is an environment variable.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # train, export, evaluate
    PRESET=mask python train_gpt.py                            # with settings of presets/mask.env
    EVAL_ONLY=1 MODEL_PATH=model.int6.ptz python train_gpt.py  # evaluate an artifact
    python train_gpt.py --help                                 # list all settings

Sections follow the data, each under a line that begins with `# ----`: Settings, Reading the
settings, Random maps, Linear layers, Map table, Attention, Transformer, Processes and log, Data,
Optimizers, Quantization, Artifact, Evaluation, Checkpoints, Training, Main.

Glossary:

    map         a weight matrix W (out, in) of a block, such as blocks.3.attention.q
    basis       the distribution of a frozen random map (BASES), or `learned`
    adapter     what is learned beside a frozen map: y = x (W + dW)^T, dW from ADAPTERS
    map table   one MapSpec for each map: basis, seed, gain, adapter, scale, gate, freeze
    selector    the part of a map-table setting that names maps, such as mlp.fc@0-4
    role        what a learned tensor is (Role); it decides optimizer and quantizer
    phase       a stretch of training with the same frozen maps, recurrence and teacher
    progress    the fraction of training that is over, by steps or by the clock
    candidate   weights that may be exported: the last ones, their EMA, their SWA
    fingerprint SHA-256 of everything that seeds generate; equal ones prove equal maps
    code, scale the level of a value's int8 code times scales of its row and column, 2^(n/8)
    window      EVAL_SEQ_LEN tokens of the validation stream, read at once (plan_windows)
"""

from __future__ import annotations

import argparse
import ast
import bisect
import contextlib
import copy
import dataclasses
import datetime
import difflib
import enum
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

SOURCE = Path(__file__).read_bytes()  # now: somebody may edit the file while torch is imported

try:  # all packages now: the export needs one that the training does not
    import brotli
    import numpy as np
    import sentencepiece
    import torch
    import torch.distributed
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.checkpoint import checkpoint
except ImportError as missing:
    raise SystemExit(f"error: {missing}; pip install -r requirements.txt") from None


# ---- Settings ----------------------------------------------------------------------------------


class UserError(Exception):
    """A problem that a person can fix. The message says what is wrong, where, and what to do."""


def setting(
    default: str | int | float,
    meaning: str,
    low: float = 0,
    high: float = math.inf,
    *,
    choices: str = "",
    also: str = "",
    stored: bool = False,
) -> Any:
    """Declare one setting. The type of its default is its type; `low` and `high` limit a number.

    `choices` are the words it may have, and `also` what published scripts call it, with spaces
    between. The artifact holds what is `stored`, because the model is built from it.
    """
    metadata = {"meaning": meaning, "low": low, "high": high, "stored": stored}
    metadata |= {"choices": choices.split(), "also": also.split()}
    return dataclasses.field(default=default, metadata=metadata)


model_setting = functools.partial(setting, stored=True)


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """All settings of a run. `load_settings` makes one from the environment and checks it."""

    # Run
    run_id: str = setting("", "name of the run's folder; empty: the start time")
    resume: str = setting("auto", "continue RUN_ID; auto: if unfinished", choices="auto 0 1")
    checkpoint_seconds: float = setting(60.0, "seconds between checkpoints; 0: at the end")
    timeout_seconds: float = setting(600.0, "seconds a process waits for the others", 1, 86_400)
    output_dir: str = setting("runs", "folder for the runs")
    seed: int = setting(1337, "seed of initial weights and data order", 0, 2**63 - 1)
    device: str = setting("auto", "auto: CUDA if there is a GPU", choices="auto cpu cuda")
    dtype: str = setting("auto", "type of activations", choices="auto bfloat16 float32")
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", choices="auto 0 1")
    attention_backend: str = setting("auto", "order on CUDA: fa3,cudnn,flash,efficient,math")
    eval_only: int = setting(0, "1: evaluate the artifact MODEL_PATH and do nothing else", 0, 1)
    model_path: str = setting("", "artifact that EVAL_ONLY reads")
    export_only: int = setting(0, "1: export and evaluate CHECKPOINT_PATH, do not train", 0, 1)
    checkpoint_path: str = setting("", "checkpoint that EXPORT_ONLY reads")
    model_limit_bytes: int = setting(2**30, "memory that building a model may take", 1)
    allow_unknown: int = setting(0, "1: accept misspelled settings", 0, 1)

    # Data
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of the shards")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    data_order: str = setting("shuffle", "stream: as in the shards", choices="shuffle stream")
    holdout_tokens: int = setting(1_048_576, "training tokens held out to choose a candidate", 1)

    # Model
    vocab_size: int = model_setting(1024, "pieces of the tokenizer", 8, 65_536)
    num_layers: int = model_setting(11, "transformer blocks", 1, 256)
    model_dim: int = model_setting(512, "width of the residual stream", 8, 16_384)
    num_heads: int = model_setting(8, "query heads", 1, 256)
    num_kv_heads: int = model_setting(4, "key and value heads", 1, 256)
    mlp_mult: float = model_setting(3.0, "hidden width of the MLP over MODEL_DIM", 0.01, 64)
    rope_dims: int = model_setting(16, "rotated dimensions of each head", 0, 1024)
    rope_base: float = model_setting(10_000.0, "base of the rotary frequencies", 1, 1e9)
    rope_stretch_from: int = model_setting(
        1024, "length above which ROPE_BASE grows; 0: never", also="rope_train_seq_len"
    )
    xsa_last_n: int = model_setting(11, "last N layers use exclusive self-attention", 0, 256)
    ln_scale: int = model_setting(1, "1: scale each pre-norm by 1/sqrt(layer + 1)", 0, 1)
    bigram_vocab_size: int = model_setting(2048, "rows of the bigram hash; under 2: none", 0, 2**24)
    bigram_dim: int = model_setting(128, "width of the bigram embedding", 1, 4096)
    bigram_gate: int = model_setting(0, "1: tokens decide how much of their bigram to read", 0, 1)
    ve_enabled: int = model_setting(1, "1: value embedding, shared by VE_LAYERS", 0, 1)
    ve_dim: int = model_setting(128, "width of the value embedding", 1, 4096)
    ve_layers: str = model_setting("-2,-1", "layers with the value embedding; -1 is the last")
    vrl_enabled: int = model_setting(1, "1: later layers add layer 0's values", 0, 1)
    smear_enabled: int = model_setting(1, "1: mix each embedding with the previous one", 0, 1)
    induction: int = model_setting(0, "longest match of frozen induction heads; 0: none", 0, 16)
    skips_enabled: int = model_setting(1, "1: U-Net skips from first to second half", 0, 1)
    skip_gates_enabled: int = model_setting(0, "1: a sigmoid gate mixes in each skip", 0, 1)
    mlp_gated: int = model_setting(0, "1: GEGLU instead of LeakyReLU(0.5)²", 0, 1)
    parallel_from: int = model_setting(
        256, "first layer with attention and MLP in parallel", also="parallel_residual_start"
    )
    recur_layers: str = model_setting("", "layers that run several times, such as 3-5")
    recur_times: int = model_setting(3, "how many times they run", 1, 64)
    ensemble: int = model_setting(1, "members in one artifact; their logits are averaged", 1, 16)
    qk_gain_init: float = setting(1.5, "initial gain of each query head", 1e-3, 100)
    logit_softcap: float = model_setting(30.0, "c in logits c·tanh(z/c)", 1e-3, 1e3)
    tied_embed_init_std: float = setting(0.005, "initial std of the tied embedding", 0, 10)

    # Map table: each MAP_* column is CELL or SELECTOR=CELL, separated by commas; the last rule that
    # selects a map wins
    map_basis: str = model_setting("orthogonal", "learned, shared, or the basis of a random map")
    map_init: str = model_setting(
        "orthogonal,attention.proj=zero,mlp.proj=zero", "initial value of a learned map"
    )
    map_gain: str = model_setting("1", "factor on the basis")
    map_seed: int = model_setting(
        12_345,
        "seed of the random maps",
        high=2**62,
        also="random_adapter_seed random_basis_seed random_backbone_seed",
    )
    map_seed_stride: int = model_setting(100, "what each layer adds to the seed", 1, 2**32)
    map_adapter: str = model_setting("lora:32", "none, or NAME:SIZE with + between")
    map_scale: str = model_setting("none", "learned factor: none, map (one) or row (one per row)")
    map_gate: str = model_setting("none", "initial value of a learned gate per output, or none")
    map_freeze: str = model_setting("0", "progress at which the map freezes; 0: never")

    # Training
    iterations: int = setting(20_000, "training steps at most", 1)
    warmup_steps: int = setting(20, "steps before the clock starts; their effect is undone")
    warmdown_iters: int = setting(3500, "last steps, over which learning rates fall to 0")
    warmdown_frac: float = setting(0.0, "the same as a fraction; 0: use WARMDOWN_ITERS", 0, 1)
    min_lr: float = setting(0.0, "lowest learning rates, as a fraction of the full ones", 0, 1)
    dropout: float = setting(0.0, "fraction of attention and MLP outputs dropped", 0, 0.9)
    recur_frac: float = setting(
        0.35, "progress at which RECUR_LAYERS begin to recur", 0, 0.99, also="enable_looping_at"
    )
    distill_from: str = setting("", "artifact of a teacher")
    self_distill: int = setting(0, "1: the model at DISTILL_START_FRAC becomes the teacher", 0, 1)
    distill_start_frac: float = setting(0.0, "progress at which the teacher begins", 0, 1)
    distill_end_frac: float = setting(1.0, "progress at which the teacher ends", 0, 1)
    distill_alpha: float = setting(0.5, "weight of the cross-entropy in the student's loss", 0, 1)
    distill_temperature: float = setting(2.0, "temperature of both distributions", 0.01, 100)
    train_batch_tokens: int = setting(786_432, "tokens of a step, over all processes", 1)
    train_seq_len: int = setting(2048, "tokens of a training sequence", 1, 2**20)
    micro_batch_tokens: int = setting(98_304, "most tokens of one forward pass on a device", 1)
    max_wallclock_seconds: float = setting(600.0, "seconds of training and export; 0: no limit")
    gptq_reserve_seconds: float = setting(45.0, "least seconds of these kept for the export")
    val_loss_every: int = setting(4000, "steps between validations; 0: at the end only")
    train_log_every: int = setting(200, "steps between log lines; 0: none")

    # Optimizers
    matrix_lr: float = setting(0.025, "learning rate of Muon for matrices")
    factor_lr: float = setting(0.025, "the same for low-rank factors", also="adapter_lr")
    tied_embed_lr: float = setting(0.035, "learning rate of AdamW for embeddings")
    scalar_lr: float = setting(0.025, "learning rate of AdamW for gains, gates and scales")
    sparse_lr: float = setting(0.003, "learning rate of AdamW for values of sparse adapters")
    mask_lr: float = setting(0.1, "learning rate for the scores of masks")
    mask_optimizer: str = setting("adam", "PR #1753: adam", choices="adam muon")
    muon_momentum: float = setting(0.99, "momentum of Muon", 0, 1)
    muon_momentum_warmup_start: float = setting(0.92, "momentum of Muon at the first step", 0, 1)
    muon_momentum_warmup_steps: int = setting(1500, "steps in which it rises to MUON_MOMENTUM")
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1, 20, also="muon_ns_steps")
    muon_wd: float = setting(0.04, "decoupled weight decay of matrices and sparse adapters")
    factor_wd: float = setting(0.04, "decoupled weight decay of low-rank factors")
    adam_wd: float = setting(0.04, "decoupled weight decay of gains, gates and scales")
    embed_wd: float = setting(0.04, "decoupled weight decay of embeddings")
    beta1: float = setting(0.9, "AdamW: decay of the mean", 0, 0.9999)
    beta2: float = setting(0.95, "AdamW: decay of the variance", 0, 0.99999)
    adam_eps: float = setting(1e-8, "AdamW: added to the root of the variance", 1e-30)
    grad_clip_norm: float = setting(0.3, "largest norm of all gradients together; 0: no clip")
    ema_decay: float = setting(0.997, "decay of the weights' moving average; 0: none", 0, 0.999999)
    swa_enabled: int = setting(1, "1: plain average of late weights", 0, 1)
    swa_interval: int = setting(50, "steps between its snapshots", 1, also="swa_every")
    swa_threshold: float = setting(0.2, "learning-rate scale below which it begins", 0, 1)
    late_qat_threshold: float = setting(0.0, "learning-rate scale below which QAT begins", 0, 1)

    # Quantization and artifact
    quantizer: str = setting("sensitivity", "what sets a row's scale", choices="sensitivity rms")
    matrix_bits: int = setting(6, "bits of a matrix's code, for QUANTIZER=rms", 2, 8)
    embed_bits: int = setting(8, "bits of an embedding's code, for QUANTIZER=rms", 2, 8)
    matrix_clip_sigmas: float = setting(10.0, "largest code of a row, in its RMS", 0.5, 100)
    embed_clip_sigmas: float = setting(15.0, "the same for embeddings", 0.5, 100)
    loss_per_value: float = setting(3e-9, "nats per token to round one value", 1e-15, 1)
    target_bytes: int = setting(0, "bytes of code and model; sets LOSS_PER_VALUE; 0: off")
    gptq_calib_batches: int = setting(
        5, "batches of up to 8,192 tokens to calibrate by; 0: none", also="gptq_calibration_batches"
    )
    prune_pct: float = setting(0.0, "fraction of each matrix set to zero; 0.03 is 3%", 0, 0.99)
    artifact_limit_bytes: int = setting(16_000_000, "most bytes of code and model together", 1)

    # Evaluation
    eval_seq_len: int = setting(2048, "tokens of an evaluation window", 1, 2**20)
    eval_stride: int = setting(64, "new tokens that each window scores", 1, also="stride")
    eval_mode: str = setting("exact", "streaming: one pass, no windows", choices="exact streaming")
    eval_batch_tokens: int = setting(
        131_072, "tokens of one forward pass; streaming takes at least layers + 2 windows", 1
    )

    # Names that the environment, an alias or a file set; all others have their defaults.
    explicit: frozenset[str] = dataclasses.field(default=frozenset(), repr=False, compare=False)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.num_kv_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def value_layers(self) -> list[int]:
        """The layers whose values get the value embedding, in the order of its scales."""
        return parse_layers(self.ve_layers, self.num_layers) if self.ve_enabled else []

    @property
    def block_order(self) -> list[int]:
        """The layers in the order in which they run once RECUR_LAYERS recur."""
        layers = list(range(self.num_layers))
        recurring = parse_layers(self.recur_layers, self.num_layers)
        end = max(recurring, default=-1) + 1
        return layers[:end] + recurring * (self.recur_times - 1) + layers[end:]

    def as_dict(self) -> dict[str, Any]:
        """Return every setting by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    def given(self) -> dict[str, Any]:
        """Return the settings that somebody set, by name."""
        return {name: getattr(self, name) for name in self.explicit}

    def model_settings(self) -> dict[str, Any]:
        """Return what the artifact stores: everything that rebuilding the model depends on."""
        return {name: getattr(self, name) for name, f in SETTINGS.items() if f.metadata["stored"]}


SETTINGS = {f.name: f for f in dataclasses.fields(Hyperparameters) if f.metadata}
# Headings of --help, each by the setting that it stands above.
SETTING_GROUPS = {
    "run_id": "Run",
    "data_path": "Data",
    "vocab_size": "Model",
    "map_basis": "Map table",
    "iterations": "Training",
    "matrix_lr": "Optimizers",
    "quantizer": "Quantization and artifact",
    "eval_seq_len": "Evaluation",
}


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Return the layers that a text such as `0-2,5,9-` or `-2,-1` names; + may stand for a comma.

    Negative numbers count from the end. One that lies before the first layer selects nothing, so
    that "the last two" of a network with one layer is that layer. ValueError says what is wrong.
    """
    layers: dict[int, None] = {}  # an ordered set
    for part in filter(None, re.split(r"[,+ ]+", text)):
        match = re.fullmatch(r"(-?\d+)(-(-?\d+)?)?", part)
        if not match:
            raise ValueError(f"{part} must be layers such as 0-2,5 or -2,-1")
        first, is_range, last = match.groups()
        begin = int(first) + (num_layers if first.startswith("-") else 0)
        end = begin
        if is_range:
            end = int(last or -1) + (num_layers if not last or last.startswith("-") else 0)
        if end >= num_layers or (is_range and begin > end):
            raise ValueError(f"{part} must be layers from 0 to {num_layers - 1}, such as 0-2,5")
        layers |= dict.fromkeys(range(max(begin, 0), end + 1))
    return list(layers)


# ---- Reading the settings ----------------------------------------------------------------------


class Alias(NamedTuple):
    """A variable of a published script, in this script's vocabulary. `{}` stands for its value."""

    meaning: str
    sets: dict[str, str]  # settings that it stands for; without a {} it is a flag, 0 or 1
    defaults: Mapping[str, str] = MappingProxyType({})  # what it sets unless somebody else does
    zero_is_off: bool = False  # whether the value 0 means that the variable is not set


ALIASES = {
    "use_random_adapters": Alias(
        "PR #1113 (system A), 1: random maps with LoRA; 0: learned", {"map_basis": "orthogonal"}
    ),
    "random_adapter_rank": Alias("system A: rank of LoRA", {"map_adapter": "lora:{}"}),
    "random_basis_enabled": Alias(
        "PR #1684 (system B), 1: random MLP with LoRA and a gate per hidden unit",
        {"map_basis": "mlp=gaussian", "map_gate": "mlp.fc=0"},
        {"map_adapter": "lora:16", "map_seed": "0xD15EA5E", "map_seed_stride": "1009"},
    ),
    "lora_rank": Alias("system B: rank of LoRA", {"map_adapter": "lora:{}"}),
    "selective_freeze": Alias(
        "PR #1301 (system C), 1: the MLP's input maps random",
        {"map_basis": "mlp.in=gaussian"},
        {"map_adapter": "none", "map_seed": "42000"},
    ),
    "progressive_freeze_frac": Alias(
        "PR #1301 (system D): progress at which the MLP's input maps freeze",
        {"map_freeze": "mlp.in={}"},
        {"map_basis": "learned"},
        zero_is_off=True,
    ),
    "rand_proj_layers": Alias(
        "PR #1228: layers of random up-projections",
        {"map_basis": "mlp.in@{}=orthogonal"},
        {"map_adapter": "none"},
    ),
    "rand_gain": Alias("PR #1228, 1: a gain per random feature", {"map_scale": "random=row"}),
    "adapter_rank": Alias("PR #1549: rank of LoRA", {"map_adapter": "lora:{}"}),
    "mlp_rank": Alias(
        "PR #2058: random MLP with LoRA of this rank",
        {"map_basis": "mlp=orthogonal", "map_adapter": "lora:{}"},
    ),
}
ALIASES |= {
    name: Alias("another name of it", {target: "{}"})
    for target, f in SETTINGS.items()
    for name in f.metadata["also"]
}


# Variables of published scripts whose feature does not exist here, by reason; each with its
# published values that change nothing.
UNSUPPORTED_BY_REASON = {
    "this part of a published model is not built": "BACKOUT_ENABLED=0 BACKOUT_INIT=0.2"
    " DDL_ENABLED=0 MINI_MOE_EXPERTS=1 SHC_N=0",
    "test-time training is not built": "TTT_BATCH_SEQS=32 TTT_CHUNK_TOKENS=65536,32768"
    " TTT_ENABLED=0 TTT_EPOCHS=1,3 TTT_FREEZE_BLOCKS=2,0 TTT_GRAD_CLIP=1.0 TTT_LR=0.002,0.005"
    " TTT_MOMENTUM=0.9 TTT_OPTIMIZER=sgd",
    "embeddings are tied here, without a separate head; set TIED_EMBED_LR": "EMBED_LR=0.6"
    " HEAD_LR=0.008 TIE_EMBEDDINGS=1",
    "it is gone, because it made no run better": "EMBEDDING_DIM=512",
    "the module that owns a tensor decides how it is quantized": "CONTROL_TENSOR_NAME_PATTERNS"
    " INT6_LAYERS INT6_STEP=4 INT8_KEEP_FLOAT_FP32_NAME_PATTERNS",
    "MATRIX_CLIP_SIGMAS decides where codes clip": "QAT_CLIP_PCT=0.9995",
    "artifacts are compressed by brotli alone": "COMPRESSOR=brotli",
    "the block does not change the codes; it is 128": "GPTQ_BLOCK_SIZE=128",
    "GPTQ_CALIB_BATCHES=0 turns GPTQ off": "GPTQ_ENABLED=1",
    "Muon has no second moment and normalizes no rows here": "MUON_BETA2=0.95 MUON_ROW_NORMALIZE=0",
    "a cache of hidden states gives no distribution that is fixed before scoring": "KNN_LAMBDA=0",
    "its probabilities sum to over 1": "NGRAM_EVAL=0",
    "MAP_BASIS chooses another basis than orthogonal": "RAND_INIT_QR=1",
    "RECUR_TIMES counts every pass, NUM_LOOPS=2 is RECUR_TIMES=3": "NUM_LOOPS=0",
    "it belongs in a preset's file": "PRESET_BASE TEACHER_PRESET",
    "set RECUR_LAYERS, such as 3-5": "LOOP_START LOOP_END",
    "set XSA_LAST_N": "XSA_LAYERS",
    "set DATA_PATH and TOKENIZER_PATH": "DATA_DIR=./data/,./data",
    "set EVAL_BATCH_TOKENS": "EVAL_BATCH_SEQS=256 VAL_BATCH_SIZE=524288 VAL_BATCH_TOKENS=524288",
    "MICRO_BATCH_TOKENS decides it": "GRAD_ACCUM_STEPS=6",
    "EVAL_STRIDE=EVAL_SEQ_LEN turns sliding off": "SLIDING_WINDOW_ENABLED=1",
    "COMPILE=0 turns compilation off": "TORCH_COMPILE_DISABLE=0",
}
UNSUPPORTED = {
    name: (reason, values.split(","))
    for reason, variables in UNSUPPORTED_BY_REASON.items()
    for name, _, values in (variable.partition("=") for variable in variables.split())
}


@contextlib.contextmanager
def collect_errors(errors: list[str], where: str) -> Iterator[None]:
    """Add a ValueError raised in the block to `errors`, after the name of its place."""
    try:
        yield
    except ValueError as error:
        errors.append(f"{where}: {error}")


def expand_aliases(overrides: Mapping[str, Any], errors: list[str]) -> dict[str, Any]:
    """Replace aliases by the settings they stand for; what contradicts an alias is an error."""
    explicit = {name: value for name, value in overrides.items() if name not in ALIASES}
    aliased: dict[str, str] = {}  # what aliases stand for
    alias_defaults: dict[str, str] = {}  # what aliases set unless it is set elsewhere
    set_by = {name: name for name in explicit}
    if str(overrides.get("use_random_adapters")) == "0":
        alias_defaults["map_basis"] = "learned"
    for name, alias in ALIASES.items():
        # A comma would end the rule of the map table that the value becomes a part of.
        value = str(overrides.get(name, "")).replace(" ", "").replace(",", "+")
        is_flag = not any("{}" in template for template in alias.sets.values())
        if is_flag and value not in ("", "0", "1"):
            errors.append(f"{name.upper()}={value}: must be 0 or 1")
        is_zero = not value.strip("0.")
        if not value or (is_zero and (is_flag or alias.zero_is_off)):
            continue
        alias_defaults = {**alias.defaults, **alias_defaults}
        for target, template in alias.sets.items():
            text = template.replace("{}", value)
            earlier = str(explicit.get(target, aliased.get(target, text)))
            if earlier != text:
                means = f"{name.upper()}={value} means {target.upper()}={text}"
                errors.append(f"{means}, but {set_by[target].upper()} says {earlier}; unset one")
            aliased.setdefault(target, text)
            set_by.setdefault(target, name)
    return alias_defaults | aliased | explicit


def parse_setting(f: dataclasses.Field, raw: Any) -> str | int | float:
    """Return a setting's value from its text, maybe hexadecimal. ValueError says what is wrong."""
    kind, choices = type(f.default), f.metadata["choices"]
    if kind is str:
        if len(str(raw)) > 4096:  # an artifact's settings may come from anyone
            raise ValueError("is longer than 4,096 characters")
        if choices and raw not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(raw)
    try:
        value = int(str(raw), 0) if kind is int else float(raw)
    except (TypeError, ValueError):
        raise ValueError(f"needs a {'whole ' if kind is int else ''}number") from None
    low, high = f.metadata["low"], f.metadata["high"]
    if not (low <= value <= high and value < math.inf):
        limit = f" and at most {high:,}" if high < math.inf else ""
        raise ValueError(f"must be at least {low:,}{limit}")
    return value


def wrong_combinations(h: Hyperparameters, environment: Mapping[str, str]) -> list[str]:
    """Return what is wrong with settings that are fine alone but not together."""
    processes = int(environment.get("WORLD_SIZE") or 1)
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    by_rms = ("matrix_bits", "embed_bits", "matrix_clip_sigmas", "embed_clip_sigmas")
    changed = [name.upper() for name in by_rms if getattr(h, name) != SETTINGS[name].default]
    has_sensitivities = h.quantizer == "sensitivity" and h.gptq_calib_batches
    reads_rms = h.late_qat_threshold or not has_sensitivities
    start, preset = h.distill_start_frac, environment.get("PRESET")
    trains = not (h.eval_only or h.export_only)
    faults = {
        "{NUM_HEADS} must divide {MODEL_DIM}": h.model_dim % h.num_heads,
        "{NUM_KV_HEADS} must divide {NUM_HEADS}": h.num_heads % h.num_kv_heads,
        "{ROPE_DIMS} must be even": h.rope_dims % 2,
        "{ROPE_DIMS} is over the {head_dim} dimensions of a head": h.rope_dims > h.head_dim,
        "{MLP_MULT} gives the MLP no hidden unit": h.mlp_dim < 1,
        "{changed} would do nothing; QUANTIZER=rms uses them": changed and not reads_rms,
        "BIGRAM_GATE=1 needs BIGRAM_VOCAB_SIZE over 1": h.bigram_gate and h.bigram_vocab_size < 2,
        "TARGET_BYTES needs QUANTIZER=sensitivity and GPTQ_CALIB_BATCHES over 0": (
            h.target_bytes and not has_sensitivities
        ),
        "RESUME=1 needs RUN_ID, the run to continue": h.resume == "1" and not h.run_id,
        "torchrun's --max-restarts needs RUN_ID, the run to continue": restarts and not h.run_id,
        "torchrun's --max-restarts must be 0 on several machines, which count them apart": (
            restarts and int(environment.get("GROUP_WORLD_SIZE") or 1) > 1
        ),
        "{EVAL_STRIDE} is over {EVAL_SEQ_LEN}": h.eval_stride > h.eval_seq_len,
        "{TRAIN_BATCH_TOKENS} is not a multiple of {TRAIN_SEQ_LEN} times {processes} processes": (
            not h.eval_only and h.train_batch_tokens % (h.train_seq_len * processes)
        ),
        "{GPTQ_RESERVE_SECONDS} leaves nothing of MAX_WALLCLOCK_SECONDS to train": (
            0 < h.max_wallclock_seconds <= h.gptq_reserve_seconds
        ),
        "WARMDOWN_ITERS has no effect beside {WARMDOWN_FRAC}; unset it, or set WARMDOWN_FRAC=0": (
            h.warmdown_frac and h.warmdown_iters != SETTINGS["warmdown_iters"].default
        ),
        "LOSS_PER_VALUE would do nothing beside scales by RMS": (
            h.loss_per_value != SETTINGS["loss_per_value"].default and not has_sensitivities
        ),
        "EVAL_ONLY=1 and EXPORT_ONLY=1 are two tasks": h.eval_only and h.export_only,
        "EVAL_ONLY and EXPORT_ONLY bring settings; unset PRESET": preset and not trains,
        "EVAL_ONLY=1 and MODEL_PATH need each other": h.eval_only != bool(h.model_path),
        "EXPORT_ONLY=1 and CHECKPOINT_PATH need each other": (
            h.export_only != bool(h.checkpoint_path)
        ),
        "DISTILL_FROM and SELF_DISTILL=1 are two teachers": h.distill_from and h.self_distill,
        "SELF_DISTILL=1 needs DISTILL_START_FRAC over 0": h.self_distill and not start,
        "{DISTILL_END_FRAC} is not after {DISTILL_START_FRAC}": start >= h.distill_end_frac,
    }
    shown = {name.upper(): f"{name.upper()}={value}" for name, value in h.as_dict().items()}
    shown |= {"head_dim": h.head_dim, "changed": ", ".join(changed), "processes": processes}
    errors = [message.format_map(shown) for message, is_wrong in faults.items() if is_wrong]
    with collect_errors(errors, f"ATTENTION_BACKEND={h.attention_backend}"):
        attention_order(h)
    with collect_errors(errors, f"VE_LAYERS={h.ve_layers}"):
        _ = h.value_layers
    with collect_errors(errors, f"RECUR_LAYERS={h.recur_layers}"):
        _ = h.block_order
    return errors


def same_value(text: str, other: str) -> bool:
    """Return whether two texts mean the same number or word."""
    try:
        return float(text) == float(other)
    except ValueError:
        return text == other


def unsupported_variables(environment: Mapping[str, str]) -> list[str]:
    """Return errors for variables of published scripts that would change something there."""
    errors = []
    for name, (reason, harmless) in UNSUPPORTED.items():
        value = environment.get(name, "").replace("_", "")
        if value and not any(same_value(value, other) for other in harmless):
            errors.append(f"{name}={environment[name]}: {reason}; unset it")
    return errors


def misspelled_variables(environment: Mapping[str, str]) -> list[str]:
    """Return errors for variables that look like a misspelled setting."""
    errors = []
    known = [name.upper() for name in (*SETTINGS, *ALIASES, "preset")]
    unknown = set(environment) - {*known, *UNSUPPORTED}
    for name in sorted(name for name in unknown if len(name) > 3):
        # At least one letter may be added, dropped, changed or swapped with the next.
        cutoff = min(0.9, 1 - 1 / len(name) - 1e-9)
        for near in difflib.get_close_matches(name.upper(), known, n=1, cutoff=cutoff):
            errors.append(f"{name}: no such setting; {near}? (ALLOW_UNKNOWN=1 accepts it)")
    return errors


PRESETS = Path(__file__).resolve().with_name("presets")


def find_preset(name: str, on_cpu: bool) -> Path:
    """Return a preset's file: a path of an .env, or a name in presets/cpu/ (on a CPU), presets/."""
    places = [PRESETS / f"{name.removesuffix('.env')}.env"]
    if on_cpu and "/" not in name:
        places.insert(0, PRESETS / "cpu" / places[0].name)
    if name.endswith(".env"):
        places = [Path(name), PRESETS.parent / name, *places]
    for place in places:
        if place.is_file():
            return place
    known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.env")))
    raise UserError(f"PRESET={name}: no such file; {PRESETS} has: {known or 'nothing'}")


def load_preset(name: str, device: str = "auto", heirs: tuple[Path, ...] = ()) -> dict[str, str]:
    """Return the variables of a preset, and those of its PRESET_BASE that it does not set itself.

    A line is KEY=VALUE; # begins a comment. TEACHER_PRESET names the preset of its teacher.
    `device` is DEVICE, `heirs` are the files that build on this one. UserError for another line.
    """
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    path = find_preset(name, on_cpu and not heirs)
    if path in heirs:
        raise UserError(f"{path}: PRESET_BASE makes the preset its own base")
    own = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            raise UserError(f"{path}: not KEY=VALUE: {text}")
        own[key] = value
    base = own.pop("PRESET_BASE", None)
    inherited = load_preset(base, device, (*heirs, path)) if base else {}
    inherited.pop("TEACHER_PRESET", None)  # a preset names its own teacher
    return inherited | own


def apply_preset(name: str, given: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """Return what is given, over what a preset sets.

    Beside another MAP_BASIS its columns would be about other maps: none of its MAP_* holds.
    """
    preset = load_preset(name, str(given.get("device", "auto")))
    teacher = preset.pop("TEACHER_PRESET", None)
    if teacher and not given.get("distill_from"):
        by_hand = f"set DISTILL_FROM to the artifact of a run with PRESET={teacher}"
        errors.append(f"PRESET={name} needs a teacher: {by_hand}, or let run.sh train both")
    errors += unsupported_variables(preset)
    settings = {key.lower(): text for key, text in preset.items() if key not in UNSUPPORTED}
    for key in sorted(settings.keys() - SETTINGS.keys() - ALIASES.keys()):
        errors.append(f"PRESET={name}: {key.upper()}: no such setting")
        del settings[key]
    settings = expand_aliases(settings, errors)
    if "map_basis" in given:
        settings = {key: text for key, text in settings.items() if not key.startswith("map_")}
    return settings | given


def load_settings(environment: Mapping[str, str] = os.environ, **overrides: Any) -> Hyperparameters:
    """Return checked settings: an override, else the variable of its name, else the default.

    Before the defaults come the settings of PRESET. UserError lists every error.
    """
    errors: list[str] = []
    names = [name for name in (*SETTINGS, *ALIASES) if name.upper() in environment]
    overrides = {name: environment[name.upper()] for name in names} | overrides
    overrides = expand_aliases(overrides, errors)
    preset = environment.get("PRESET")
    if preset:
        overrides = apply_preset(preset, overrides, errors)
    errors += [f"{name}: no such setting" for name in overrides if name not in SETTINGS]
    values = {}
    for name, raw in overrides.items():
        if name in SETTINGS:
            with collect_errors(errors, f"{name.upper()}={raw}"):
                values[name] = parse_setting(SETTINGS[name], raw)
    h = Hyperparameters(**values, explicit=frozenset(overrides))
    errors += wrong_combinations(h, environment)
    errors += unsupported_variables(environment)
    if not h.allow_unknown:
        errors += misspelled_variables(environment)
    if errors:
        raise UserError("\n  ".join(["these settings cannot be used:", *errors]))
    build_map_table(h)  # now: a table of impossible shapes would repeat these errors
    return h


def adopt_settings(
    h: Hyperparameters, stored: dict[str, Any], source: str, overridable: Iterable[str] = ()
) -> Hyperparameters:
    """Return these settings over stored ones. UserError if one differs that is not overridable."""
    kept = {name for name in h.explicit if name not in stored or name in overridable}
    changed = [name for name in sorted(h.explicit - kept) if getattr(h, name) != stored[name]]
    if changed:
        pairs = [
            f"{name.upper()}={getattr(h, name)} here, {stored[name]} there" for name in changed
        ]
        raise UserError(f"{source} has other settings: {'; '.join(pairs)}. Unset these")
    return reload_settings(stored | {name: getattr(h, name) for name in kept})


def reload_settings(values: dict[str, Any]) -> Hyperparameters:
    """Return checked settings with these values alone, under this launcher."""
    # The batch must still divide among these processes.
    return load_settings({"WORLD_SIZE": os.environ.get("WORLD_SIZE", "")}, **values)


def read_manifest(data_path: str) -> dict[str, Any]:
    """Return what the manifest says of the shards; nothing if there is none."""
    path = Path(data_path) / "manifest.json"
    if not path.exists():
        return {}
    with untrusted_input(f"{path} (prepare the data again, or remove it)"):
        return dict(json.loads(path.read_bytes()))


def settings_from_manifest(h: Hyperparameters) -> Hyperparameters:
    """Return the settings with tokenizer and vocabulary of DATA_PATH's manifest, unless set."""
    manifest = read_manifest(h.data_path)
    found: dict[str, Any] = {}
    if {"tokenizer", "vocab_size"} <= manifest.keys():
        path = os.path.join(h.data_path, str(manifest["tokenizer"]))
        found = {"tokenizer_path": path, "vocab_size": manifest["vocab_size"]}
    return reload_settings(found | h.given())


def allowed_values(f: dataclasses.Field) -> str:
    """Return the range or the words of a setting, in brackets, for --help."""
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        return f" [{', '.join(choices)}]"
    if isinstance(f.default, str):
        return ""
    return f" [{low:,} to {high:,}]" if high < math.inf else f" [at least {low:,}]"


def settings_help() -> str:
    """Return all settings with defaults, meanings and ranges, in groups, for --help."""
    lines = ["Settings are environment variables, such as NUM_LAYERS=6 python train_gpt.py."]
    lines += ["PRESET=NAME adds those of presets/NAME.env, on a CPU of presets/cpu/NAME.env."]
    for name, f in SETTINGS.items():
        if name in SETTING_GROUPS:
            lines += ["", f"{SETTING_GROUPS[name]}:"]
        default = f"({f.default})" if f.default != "" else "(empty)"
        meaning = f"{f.metadata['meaning']}{allowed_values(f)}"
        lines.append(f"  {name.upper():<28} {default:<14} {meaning}")
    lines += ["", "Variables of published scripts, each short for settings of the map table:"]
    for name, alias in ALIASES.items():
        means = " ".join(f"{key.upper()}={text}" for key, text in alias.sets.items())
        lines.append(f"  {name.upper():<28} {means}: {alias.meaning}".replace("{}", "VALUE"))
    return "\n".join(lines)


# ---- Random maps -------------------------------------------------------------------------------


# Philox keys have 128 bits: the seed is at the bottom, the epoch of the data order from bit 64 on.
# Adapters have high bits of their own, so that none repeats the numbers of a map.
SHARED_FACTOR_KEY, SPARSE_KEY, COMBINATION_KEY = (n << 96 for n in (1, 2, 3))


def random_uint64(seed: int, n: int) -> np.ndarray:
    """Return (n,) uint64 of Philox, a counter-based generator that NumPy promises not to change."""
    return np.random.Philox(key=seed).random_raw(n)


def normal_deviates(seed: int, n: int) -> np.ndarray:
    """Return (n,) float64 normal deviates by Box and Muller's formula, which no release changes."""
    half = (n + 1) // 2
    words = random_uint64(seed, 2 * half) >> np.uint64(11)
    uniform = words.astype(np.float64) * 2.0**-53  # [0, 1)
    radius = np.sqrt(-2 * np.log1p(-uniform[:half]))
    angle = 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def orthogonal(out_features: int, in_features: int, seed: int) -> Tensor:
    """Return (out, in) float64, Haar-random, orthonormal along its shorter side."""
    tall, short = max(out_features, in_features), min(out_features, in_features)
    normal = torch.from_numpy(normal_deviates(seed, tall * short).reshape(tall, short))
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal().sign()  # unique: now the diagonal of R is positive
    return q if out_features >= in_features else q.T


def gaussian(out_features: int, in_features: int, seed: int) -> Tensor:
    """Return (out, in) float64, normal with std 1/√in."""
    values = normal_deviates(seed, out_features * in_features)
    return torch.from_numpy(values).view(out_features, in_features) / math.sqrt(in_features)


def uniform(out_features: int, in_features: int, seed: int) -> Tensor:
    """Return (out, in) float64, uniform between ±1/√in."""
    values = random_uint64(seed, out_features * in_features) * 2.0**-63 - 1
    return torch.from_numpy(values).view(out_features, in_features) / math.sqrt(in_features)


def rademacher(out_features: int, in_features: int, seed: int) -> Tensor:
    """Return (out, in) float64, each entry 1/√in with a random sign."""
    signs = 1 - 2.0 * (random_uint64(seed, out_features * in_features) >= 2**63)
    return torch.from_numpy(signs).view(out_features, in_features) / math.sqrt(in_features)


def hadamard(out_features: int, in_features: int, seed: int) -> Tensor:
    """Return (out, in) float64: random rows and columns, with random signs, of a Hadamard matrix.

    Every entry is ± one power of two within √2 of 1/√(longer side): exact in bfloat16 and in fp8.
    """
    longer = max(out_features, in_features)
    size = 2 ** (longer - 1).bit_length()
    words = random_uint64(seed, 2 * size).reshape(2, size)
    rows, columns = words.argsort(kind="stable")
    row_signs, column_signs = 1.0 - 2.0 * (words & np.uint64(1))
    # Entry (i, j) of Sylvester's matrix is -1 to the number of bits that i and j share.
    shared = rows[:out_features, None] & columns[:in_features]
    for half in (16, 8, 4, 2, 1):
        shared ^= shared >> half
    signs = (1.0 - 2.0 * (shared & 1)) * row_signs[:out_features, None] * column_signs[:in_features]
    return torch.from_numpy(signs * 2.0 ** -math.floor(math.log2(longer) / 2 + 0.5))


BASES = {"orthogonal": orthogonal, "gaussian": gaussian, "uniform": uniform}
BASES |= {"rademacher": rademacher, "hadamard": hadamard}


def generate_map(spec: MapSpec) -> Tensor:
    """Return the frozen map of a table row, (out, in) bfloat16 on every device, made on the CPU."""
    values = BASES[spec.basis](spec.out_features, spec.in_features, spec.seed) * spec.gain
    if values.shape != spec.shape or not values.isfinite().all():
        shape = tuple(values.shape)
        raise UserError(f"MAP_BASIS={spec.basis}: {spec.name} is {shape}, or not finite")
    return values.to(torch.bfloat16).contiguous()


# ---- Linear layers -----------------------------------------------------------------------------


class Role(enum.Enum):
    """What a learned tensor is. The role decides its optimizer and its quantizer."""

    MATRIX = "matrix"
    FACTOR = "factor"
    EMBEDDING = "embedding"
    SCALAR = "scalar"  # stored as float16
    SPARSE = "sparse"
    MASK = "mask"  # stored as bits


StoredTensors = dict[str, "QuantizedTensor | Tensor"]  # by name, as the artifact holds them
Quantizers = Mapping[Role, "Quantizer"]
# It yields quantizer, matrix and Hessian, gets codes for them, and returns what a module stores.
Quantization = Generator[
    tuple["Quantizer", Tensor, "Tensor | None"], "QuantizedTensor", StoredTensors
]
Pointwise = Callable[[Tensor], Tensor] | None


class QuantizedModule(nn.Module):
    """A module whose `roles` name its learned tensors; what no module names is a SCALAR."""

    roles: ClassVar[dict[str, Role]] = {}

    def quantize(self, quantizers: Quantizers, hessian: Tensor | None) -> Quantization:
        """Ask for codes of the tensors in `roles`, for inputs x by `hessian` Σ x xᵀ (in, in)."""
        codes = {}
        for name, role in self.roles.items():
            if isinstance(getattr(self, name, None), nn.Parameter):
                codes[name] = yield quantizers[role], getattr(self, name), hessian
        return codes


class Adapter(QuantizedModule):
    """What is learned beside a frozen map W: ΔW as low-rank factors, or as a full correction."""

    size_unit: ClassVar[str] = ""  # rank, density or count: what the number in MAP_ADAPTER means

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A (out, r) and B (r, in) of ΔW = A B, or None."""
        return None

    def correction(self, weight: Tensor) -> Tensor | None:
        """Return ΔW (out, in) for W in its type, or None. Its gradient is as large as W."""
        return None


class LoRA(Adapter):
    """ΔW = A B (B A in arXiv:2106.09685): A (out, rank) is zero at first, B (rank, in) normal."""

    size_unit = "rank"
    roles: ClassVar = {"B": Role.FACTOR, "A": Role.FACTOR}

    def __init__(self, spec: MapSpec, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(spec.out_features, rank))
        self.B = nn.Parameter(torch.randn(rank, spec.in_features) / math.sqrt(spec.in_features))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def quantize(self, quantizers: Quantizers, hessian: Tensor | None) -> Quantization:
        """Quantize B against its inputs x, then A against its own inputs x B̂ᵀ."""
        b_codes = yield quantizers[Role.FACTOR], self.B, hessian
        if hessian is not None:
            b = b_codes.dequantize().double()
            hessian = b @ hessian.double() @ b.T
        a_codes = yield quantizers[Role.FACTOR], self.A, hessian
        return {"B": b_codes, "A": a_codes}


class RankStabilizedLoRA(LoRA):
    """ΔW = A B / √rank (arXiv:2312.03732)."""

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.A.size(1) ** -0.5, self.B


@functools.lru_cache(maxsize=64)
def shared_normal(count: int, rows: int, columns: int, key: int) -> Tensor:
    """Return (count, rows, columns) bfloat16, normal with std 1/√columns; all callers share it."""
    maps = [gaussian(rows, columns, key + i).to(torch.bfloat16) for i in range(count)]
    return torch.stack(maps)


class VeRA(Adapter):
    """ΔW = diag(b) B diag(d) A (arXiv:2310.11454); maps of one shape share the frozen A and B."""

    size_unit = "rank"

    def __init__(self, spec: MapSpec, rank: int) -> None:
        super().__init__()
        key = spec.shared_seed + SHARED_FACTOR_KEY
        (a,) = shared_normal(1, rank, spec.in_features, key)
        (b,) = shared_normal(1, spec.out_features, rank, key + 1)
        self.register_buffer("A", a, persistent=False)
        self.register_buffer("B", b, persistent=False)
        self.b = nn.Parameter(torch.zeros(spec.out_features))
        self.d = nn.Parameter(torch.full((rank,), 0.1))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.b[:, None] * self.B, self.d[:, None] * self.A


class Sparse(Adapter):
    """ΔW has learned values at seeded positions, a fraction of each row (arXiv:2406.02214)."""

    size_unit = "density"
    roles: ClassVar = {"values": Role.SPARSE}

    def __init__(self, spec: MapSpec, density: float) -> None:
        super().__init__()
        count = max(1, round(density * spec.in_features))
        words = random_uint64(spec.seed + SPARSE_KEY, spec.out_features * spec.in_features)
        smallest = np.argpartition(words.reshape(spec.shape), count - 1)[:, :count]
        support = torch.from_numpy(np.sort(smallest))  # (out, count)
        self.register_buffer("support", support, persistent=False)
        self.values = nn.Parameter(torch.zeros(spec.out_features, count))

    def correction(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight).scatter(1, self.support, self.values.to(weight.dtype))

    def quantize(self, quantizers: Quantizers, hessian: Tensor | None) -> Quantization:
        return super().quantize(quantizers, None)  # each row has inputs of its own


class Mask(Adapter):
    """W + ΔW is √2 · W where a learned bit is 1, else 0 (arXiv:1911.13299).

    A bit is 1 where its score is positive. The scores get the gradient of
    sigmoid(score / temperature); the temperature falls during training as in PR #1753.
    """

    roles: ClassVar = {"scores": Role.MASK}

    def __init__(self, spec: MapSpec, _: float) -> None:
        super().__init__()
        scores = torch.empty(spec.shape).uniform_(-1, 1) * spec.in_features**-0.5
        self.scores = nn.Parameter(scores)
        self.register_buffer("temperature", torch.ones(()), persistent=False)

    def correction(self, weight: Tensor) -> Tensor:
        soft = torch.sigmoid(self.scores / self.temperature)
        bits = (self.scores > 0).to(weight.dtype) + (soft - soft.detach()).to(weight.dtype)
        return weight * (math.sqrt(2) * bits - 1)

    def quantize(self, quantizers: Quantizers, hessian: Tensor | None) -> Quantization:
        yield from ()  # a generator as the others are, which asks for nothing
        return {"scores": self.scores.data > 0}


class Combination(Adapter):
    """ΔW = Σ c_i R_i, learned c_i, seeded R_i of a shape (NOLA, arXiv:2310.02556; PR #812)."""

    size_unit = "count"

    def __init__(self, spec: MapSpec, count: int) -> None:
        super().__init__()
        maps = shared_normal(count, *spec.shape, spec.shared_seed + COMBINATION_KEY)
        self.register_buffer("maps", maps, persistent=False)
        self.coefficients = nn.Parameter(torch.zeros(count))

    def correction(self, weight: Tensor) -> Tensor:
        return torch.tensordot(self.coefficients.to(weight.dtype), self.maps.to(weight.dtype), 1)


ADAPTERS: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "rslora": RankStabilizedLoRA,
    "vera": VeRA,
    "sparse": Sparse,
    "mask": Mask,
    "combination": Combination,
}


class SharedMatrices(QuantizedModule):
    """Learned matrices (out, in) that the maps of one kind share; each is stored once."""

    def __init__(self, spec: MapSpec) -> None:
        super().__init__()
        self.roles = {f"weight{i}": Role.MATRIX for i in range(spec.shared_count)}
        for name in self.roles:
            self.register_parameter(name, nn.Parameter(initial_weight(spec)))

    def weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.roles]

    def quantize(self, quantizers: Quantizers, hessian: Tensor | None) -> Quantization:
        """Quantize each matrix against its own Hessian; `hessian` is (count, in, in)."""
        hessians = [None] * len(self.roles) if hessian is None else hessian
        codes = {}
        for (name, role), own in zip(self.roles.items(), hessians, strict=True):
            codes[name] = yield quantizers[role], getattr(self, name), own
        return codes


def initial_weight(spec: MapSpec) -> Tensor:
    """Return the initial value of a learned map, (out, in) float32."""
    weight = torch.empty(spec.shape)
    return nn.init.zeros_(weight) if spec.init == "zero" else nn.init.orthogonal_(weight, spec.gain)


def depth_weights(count: int, depth: float) -> Tensor:
    """Return initial weights (count,) of shared matrices in a layer at a depth from 0 to 1.

    A layer starts as a mix of the two matrices that are nearest in depth: with equal weights all
    layers would be the same at first (PR #812).
    """
    return (1 - (torch.arange(count) - depth * (count - 1)).abs()).clamp(min=0)


class LowRankLinearFunction(torch.autograd.Function):
    """y = x Mᵀ, with M (Σ out, in) the stacked rows of maps W + A B whose W is frozen.

    Thin products give the gradients of `factors`, A and B of each map, without that of M.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, merged: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, merged, *factors)
        return x @ merged.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, *factors = ctx.saved_tensors
        dx = dy @ merged
        dy, x = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
        all_a, all_b = factors[::2], factors[1::2]
        gradients = []
        for part, a, b in zip(dy.split([len(a) for a in all_a], 1), all_a, all_b, strict=True):
            gradients += [part.t() @ (x @ b.t()), (part @ a).t() @ x]
        return dx, None, *gradients


class MapParts(NamedTuple):
    """One map in parts: W + ΔW is weight + a b."""

    weight: Tensor  # (out, in): W and its full corrections
    a: Tensor  # (out, r), r = 0 where no adapter has factors
    b: Tensor  # (r, in)

    def low_rank_gradient_pays(self, has_scale: bool) -> bool:
        """Return whether thin products for a and b take less time than the dense gradient.

        On a CPU they save 7% of a step of 6 layers of width 256. On a GPU memory bounds them.
        """
        rows, columns = self.weight.shape
        thin = 2 * len(self.b) * (rows + columns)
        if has_scale:  # then it multiplies y instead of W, as slow as 100 FLOPs for each value
            thin += 100 * rows
        return not self.weight.is_cuda and thin < rows * columns


def stack_rows(maps: Sequence[Linear], name: str, neutral: float) -> Tensor | None:
    """Return one factor or bias for the rows of all maps, (Σ out,), or None where none has one."""
    values = [getattr(each, name) for each in maps]
    given = [value for value in values if value is not None]
    if not given:
        return None
    usual = given[0].new_full((1,), neutral)
    rows = [usual if value is None else value for value in values]
    return torch.cat([row.expand(m.out_features) for m, row in zip(maps, rows, strict=True)])


def fused_linear(
    x: Tensor, maps: Sequence[Linear], row_scale: Tensor | None = None, activation: Pointwise = None
) -> Tensor:
    """Apply maps of one input as a single product: gate · activation(scale · x (W + ΔW)ᵀ + bias).

    All is computed in the type of x (..., in). `row_scale` (Σ out,) is multiplied into the maps'
    own scales. The outputs of the maps lie side by side, (..., Σ out).
    """
    scale = stack_rows(maps, "scale", 1.0)
    if row_scale is not None:
        scale = row_scale if scale is None else scale * row_scale
    bias = stack_rows(maps, "bias", 0.0)
    gate = stack_rows(maps, "gate", 1.0)
    parts = [each.parts(x.dtype) for each in maps]
    weight = torch.cat([torch.addmm(*each) if len(each.b) else each.weight for each in parts])
    trained = [each for each in parts if each.a.requires_grad]  # their factors
    has_dense = any(each.weight.requires_grad for each in parts)
    pays = all(each.low_rank_gradient_pays(scale is not None) for each in trained)
    if trained and pays and not has_dense:
        factors = [factor for each in parts for factor in (each.a, each.b)]
        y = LowRankLinearFunction.apply(x, weight.detach(), *factors)
    else:
        if scale is not None and weight.requires_grad:
            # W has a dense gradient anyway: to scale W is cheaper than to scale y.
            weight, scale = weight * scale.to(x.dtype)[:, None], None
        y = F.linear(x, weight)
    if scale is not None:
        y = y * scale.to(x.dtype)
    if bias is not None:
        y = y + bias.to(x.dtype)
    if activation is not None:
        y = activation(y)
    return y if gate is None else y * gate.to(x.dtype)


class Linear(QuantizedModule):
    """One map of the map table: y = gate · activation(scale · x (W + ΔW)ᵀ + bias).

    W (out, in) is one of three: a float32 parameter; a frozen random map, a bfloat16 buffer that is
    never in a state_dict; or a mix of shared matrices. ΔW is the sum of its adapters.
    """

    roles: ClassVar = {"weight": Role.MATRIX}

    def __init__(
        self, spec: MapSpec, bias: bool = False, shared: SharedMatrices | None = None
    ) -> None:
        super().__init__()
        self.out_features = out_features = spec.out_features
        self.shared_matrices = ()  # a tuple does not register them again
        self.shared_mix = None
        if shared is not None:
            self.shared_matrices = (shared,)
            if spec.shared_count > 1:
                self.shared_mix = nn.Parameter(depth_weights(spec.shared_count, spec.depth))
        elif spec.is_random:
            self.register_buffer("weight", generate_map(spec), persistent=False)
        else:
            self.weight = nn.Parameter(initial_weight(spec))
        self.is_frozen = False
        for name, size in spec.adapters().items():
            self.add_module(name, ADAPTERS[name](spec, size))
        scale_shape = {"none": None, "map": 1, "row": out_features}[spec.scale]
        self.scale = None if scale_shape is None else nn.Parameter(torch.ones(scale_shape))
        self.gate = None
        if spec.gate is not None:
            self.gate = nn.Parameter(torch.full((out_features,), spec.gate))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def parts(self, dtype: torch.dtype) -> MapParts:
        """Return W with its corrections, and the factors of its low-rank adapters side by side."""
        weight = total = self.base_weight().to(dtype)
        factors = []
        for adapter in self.children():
            correction = adapter.correction(weight)
            if correction is not None:
                total = total + correction
            pair = adapter.factors()
            if pair is not None:
                factors.append(pair)
        a, b = total[:, :0], total[:0]
        if factors:
            a = torch.cat([a for a, _ in factors], dim=1).to(dtype)
            b = torch.cat([b for _, b in factors], dim=0).to(dtype)
        if self.is_frozen:
            return MapParts(total.detach(), a.detach(), b.detach())
        return MapParts(total, a, b)

    def set_frozen(self, frozen: bool) -> None:
        """Freeze everything that is learned of this map, or train it."""
        self.requires_grad_(not frozen)
        self.is_frozen = frozen  # torch 2.9 makes no new graph where requires_grad changes

    def base_weight(self) -> Tensor:
        """Return W (out, in)."""
        if not self.shared_matrices:
            return self.weight
        weights = self.shared_matrices[0].weights()
        if self.shared_mix is None:
            return weights[0]
        return sum(c * w for c, w in zip(self.shared_mix, weights, strict=True))

    @property
    def readers(self) -> tuple[QuantizedModule, ...]:
        """The modules that read its input, as in an InputGroup: this one alone."""
        return (self,)

    def forward(
        self, x: Tensor, row_scale: Tensor | None = None, activation: Pointwise = None
    ) -> Tensor:
        """Apply the map: x (..., in) -> (..., out), as in `fused_linear`."""
        return fused_linear(x, (self,), row_scale, activation)


class InputGroup(nn.Module):
    """Modules that multiply the same input by their weights, and so share its Hessian in GPTQ."""

    def __init__(self, *readers: QuantizedModule) -> None:
        super().__init__()
        self.readers = readers  # a tuple does not register them again


class FusedLinear(InputGroup):
    """Maps of one input, computed by one product: x (..., in) -> (..., Σ out)."""

    def forward(self, x: Tensor) -> Tensor:
        return fused_linear(x, self.readers)


class Embedding(QuantizedModule):
    """Learned rows (vocabulary, dim), looked up in `dtype`; `proj`, if any, widens dim to out."""

    roles: ClassVar = {"weight": Role.EMBEDDING}

    def __init__(
        self, vocabulary: int, dim: int, std: float, dtype: torch.dtype, proj: Linear | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, dim) * std)
        self.dtype = dtype
        self.proj = proj

    def rows_of(self, ids: Tensor) -> Tensor:
        """Return the row that each token of ids (B, T) reads, (B, T)."""
        return ids

    def frequencies(self, ids: Tensor) -> Tensor:
        """Return how often a token of ids (B, T) reads each row, (vocabulary,) float64, never 0."""
        counts = self.rows_of(ids).flatten().bincount(minlength=len(self.weight)).double() + 1
        return counts / counts.sum()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (...), (..., out)."""
        x = F.embedding(ids, self.weight).to(self.dtype)
        return x if self.proj is None else self.proj(x)


class FrozenRows(nn.Module):
    """A random map (vocabulary, dim) whose rows tokens select: ids (...) -> (..., dim) bfloat16."""

    def __init__(self, spec: MapSpec) -> None:
        super().__init__()
        self.register_buffer("weight", generate_map(spec), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class BigramTable(Embedding):
    """A learned table (rows, dim) whose rows pairs of tokens share by a hash (PR #1113).

    Without signs, the pairs of a row read the mean of what they want. With signs, each reads it
    times a frozen random vector of its own, S₁[previous] ⊙ S₂[current] of ±1: what one pair writes
    is noise of mean zero to the others (signed hashing, arXiv:0902.2206). With a gate, the two
    tokens decide how much of that noisy row to read: 2σ(w₁·ê[previous] + w₂·ê[current]).
    """

    def __init__(
        self, h: Hyperparameters, dtype: torch.dtype, proj: Linear, signs: Mapping[str, FrozenRows]
    ) -> None:
        super().__init__(h.bigram_vocab_size, h.bigram_dim, 0.0, dtype, proj)
        self.signs = nn.ModuleDict(signs)  # previous and current, or nothing
        self.gates = nn.Parameter(torch.zeros(2, h.model_dim)) if h.bigram_gate else None

    def rows_of(self, ids: Tensor) -> Tensor:
        last = len(self.weight) - 1  # for the first position, whose previous token counts as 0
        buckets = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % last
        return F.pad(buckets, (1, 0), value=last)

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Look up each token with the one before it: ids (B, T), embedded and out (B, T, d)."""
        x = F.embedding(self.rows_of(ids), self.weight).to(self.dtype)  # (B, T, dim)
        tokens = {"previous": F.pad(ids[:, :-1], (1, 0)), "current": ids}
        for name, signs in self.signs.items():
            x = x * signs(tokens[name]).to(x.dtype)
        if self.gates is not None:
            previous, current = F.linear(norm(embedded), self.gates.to(x.dtype)).unbind(-1)
            gate = 2 * torch.sigmoid(F.pad(previous[:, :-1], (1, 0)) + current)  # (B, T)
            x = x * gate.unsqueeze(-1)
        return self.proj(x)


class TiedHead(InputGroup):
    """Logits c·tanh(z/c), z = x Eᵀ with the token embedding E: (..., dim) -> (..., vocabulary)."""

    def __init__(self, embedding: Embedding, softcap: float) -> None:
        super().__init__(embedding)
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        (embedding,) = self.readers
        z = F.linear(x, embedding.weight.to(x.dtype)).float()
        c = self.softcap  # c - 2c·sigmoid(-2z/c) is the same as c·tanh(z/c), and faster on a CPU
        return torch.rsub(torch.sigmoid(-2 / c * z), c, alpha=2 * c)


RoleGroups = dict[Role, dict[str, nn.Parameter]]  # role -> name in the model -> parameter


def tensors_by_role(model: nn.Module) -> RoleGroups:
    """Return the parameters by name, sorted into the roles that their modules gave them."""
    groups: RoleGroups = {role: {} for role in Role}
    for prefix, module in model.named_modules():
        roles = module.roles if isinstance(module, QuantizedModule) else {}
        for name, parameter in module.named_parameters(prefix, recurse=False):
            role = roles.get(name.rpartition(".")[-1], Role.SCALAR)
            groups[role][name] = parameter
    return groups


# ---- Map table ---------------------------------------------------------------------------------


class MapSpec(NamedTuple):
    """What one linear map is made of: a row of the map table."""

    name: str  # path of its module in the model
    out_features: int
    in_features: int
    basis: str = "learned"  # shared or shared:N, or a key of BASES for a frozen random map
    init: str = "orthogonal"  # initial value of what is learned of W: orthogonal or zero
    depth: float = 0.0  # of its layer, from 0 to 1
    seed: int = 0  # of what is random in this map
    shared_seed: int = 0  # of what adapters generate once for all maps of one shape
    gain: float = 1.0  # factor on the basis
    adapter: str = "none"  # NAME:SIZE with NAME in ADAPTERS, + between
    scale: str = "none"  # learned factor, 1 at first: one for the "map" or one for each "row"
    gate: float | None = None  # initial value of a learned factor per output, after the activation
    freeze: float = 0.0  # progress at which all of it freezes; 0: never

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def is_random(self) -> bool:
        """Whether W is a frozen random map."""
        return self.basis in BASES

    @property
    def kind(self) -> str:
        """Its name without member and layer, such as mlp.fc."""
        return re.sub(r"^(members\.\d+\.)?(blocks\.\d+\.)?", "", self.name)

    @property
    def owner(self) -> tuple[str, str]:
        """What stores the map: its kind and basis, without the layer, where layers share it."""
        return re.sub(r"blocks\.\d+\.", "", self.name), self.basis

    @property
    def shared_count(self) -> int:
        """How many matrices the layers share for this kind of map; 0: it is not shared."""
        name, _, count = self.basis.partition(":")
        return int(count or 1) if name == "shared" else 0

    def adapters(self) -> dict[str, float]:
        """Return name -> size. ValueError for an unknown adapter or a wrong size."""
        limits = {"rank": (1, min(self.shape)), "density": (1 / self.in_features, 1)}
        limits |= {"count": (1, 4096), "": (0, 0)}
        sizes: dict[str, float] = {}
        for part in self.adapter.split("+"):
            if part == "none":
                continue
            name, colon, text = part.partition(":")
            if name not in ADAPTERS or name in sizes:
                known = ", ".join(ADAPTERS)
                raise ValueError(f"{name!r} is unknown or repeated; use {known} or none")
            unit = ADAPTERS[name].size_unit
            if not unit and colon:
                raise ValueError(f"{part!r} takes no size")
            low, high = limits[unit]
            size = math.nan
            with contextlib.suppress(ValueError):
                size = float(text) if unit == "density" else int(text if unit else 0)
            if not low <= size <= high:
                shape = f"{self.out_features} x {self.in_features}"
                raise ValueError(f"{part!r} needs a {unit} from {low:.3g} to {high}, map {shape}")
            sizes[name] = size
        return sizes


class MapRule(NamedTuple):
    """One CELL or SELECTOR=CELL of a column of the map table.

    A selector is [mMEMBER.]KIND[@LAYERS]. KIND is all, random (also those that are shared),
    attention, mlp, mlp.in (the MLP without its proj), one such as attention.q, or, since `all`
    leaves them out, bigram, value_embedding, or bigram.signs. A cell without a selector is for all
    maps, but an adapter is for random ones.
    """

    selector: str  # as written
    member: int | None
    kind: str
    layers: list[int]
    cell: str | float | None

    def selects(self, spec: MapSpec, member: int, layer: int) -> bool:
        kinds = [spec.kind, spec.kind.partition(".")[0]]
        if spec.kind in ("mlp.fc", "mlp.gate"):
            kinds.append("mlp.in")
        if spec.kind in BIGRAM_SIGNS:
            kinds = [spec.kind, "bigram.signs"]
        elif spec.kind not in EMBEDDING_MAPS:
            kinds += ["all"] if spec.basis == "learned" else ["all", "random"]
        return self.kind in kinds and layer in self.layers and self.member in (None, member)


# Maps that widen the rows of an embedding. They are learned unless a selector names them.
EMBEDDING_MAPS = ("bigram.proj", "value_embedding.proj")
# Frozen vectors of tokens, not in the model unless MAP_BASIS names a basis for bigram.signs.
BIGRAM_SIGNS = ("bigram.signs.previous", "bigram.signs.current")
# Each kind of map: what it adds to its seed, and the settings that are its rows and columns.
MAP_KINDS = {
    "bigram.proj": (21, "model_dim", "bigram_dim"),
    "bigram.signs.previous": (30, "vocab_size", "bigram_dim"),
    "bigram.signs.current": (31, "vocab_size", "bigram_dim"),
    "value_embedding.proj": (22, "kv_dim", "ve_dim"),
    "attention.q": (0, "model_dim", "model_dim"),
    "attention.k": (1, "kv_dim", "model_dim"),
    "attention.v": (2, "kv_dim", "model_dim"),
    "attention.proj": (3, "model_dim", "model_dim"),
    "mlp.fc": (10, "mlp_dim", "model_dim"),
    "mlp.proj": (11, "model_dim", "mlp_dim"),
    "mlp.gate": (12, "mlp_dim", "model_dim"),
}
# Words and numbers that a cell of each column may have; an adapter is checked with its map.
CELL_WORDS = {
    "basis": ["learned", "shared", "none", *BASES],
    "init": ["orthogonal", "zero"],
    "scale": ["none", "map", "row"],
    "gate": ["none"],
}
CELL_RANGES = {"gain": (1e-6, 1e6), "gate": (-100.0, 100.0), "freeze": (0.0, 1.0)}
COLUMNS = ("basis", "init", "gain", "adapter", "scale", "gate", "freeze")


def parse_cell(column: str, text: str) -> str | float | None:
    """Return one cell of a column from its text. ValueError says what is wrong with it."""
    if column == "gate" and text == "none":
        return None
    if column == "adapter" or text in CELL_WORDS.get(column, ()):
        return text
    if column == "basis" and re.fullmatch(r"shared:[1-9]\d?", text):
        return text
    if column not in CELL_RANGES:
        raise ValueError(f"{text!r} must be one of {', '.join(CELL_WORDS[column])}")
    low, high = CELL_RANGES[column]
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high:
            return float(text)
    raise ValueError(f"{text!r} must be a number from {low:g} to {high:g}")


def parse_column(column: str, text: str, num_layers: int) -> list[MapRule]:
    """Return the rules of one MAP_* setting. ValueError says what is wrong."""
    rules = []
    usual_kind = "random" if column == "adapter" else "all"
    for part in text.replace(" ", "").split(","):
        selector, _, cell = part.rpartition("=")
        match = re.fullmatch(r"(?:m(\d+)\.)?([a-z._]+)?(?:@([\d+-]+))?", selector)
        if not match:
            raise ValueError(f"{selector!r} is not a selector such as all, mlp.fc or attention@0-2")
        member, kind, layers = match.groups()
        of_member = int(member) if member else None
        of_layers = parse_layers(layers or "0-", num_layers)
        value = parse_cell(column, cell)
        rules.append(MapRule(selector, of_member, kind or usual_kind, of_layers, value))
    return rules


class MapTable:
    """All maps of the model, and the only place that decides which are random, and how.

    A map's seed is MAP_SEED + MAP_SEED_STRIDE · layer + the offset of its kind (PR #1113); the
    members of an ensemble are a million apart. `errors` holds everything that is wrong.
    """

    def __init__(self, h: Hyperparameters) -> None:
        self.h = h
        self.errors: list[str] = []
        self.rules: dict[str, list[MapRule]] = {}
        for column in COLUMNS:
            text = getattr(h, f"map_{column}")
            with collect_errors(self.errors, f"MAP_{column.upper()}={text}"):
                self.rules[column] = parse_column(column, text, h.num_layers)
        self.used = {(column, "") for column in COLUMNS}  # selectors that select a map
        self.specs: list[MapSpec] = []
        if self.errors:
            return
        absent = {"mlp.gate": not h.mlp_gated, "value_embedding.proj": not h.value_layers}
        absent |= dict.fromkeys(("bigram.proj", *BIGRAM_SIGNS), h.bigram_vocab_size < 2)
        kinds = [kind for kind in MAP_KINDS if not absent.get(kind)]
        of_blocks = [kind for kind in kinds if kind.startswith(("attention.", "mlp."))]
        of_embeddings = [kind for kind in kinds if kind not in of_blocks]
        for member in range(h.ensemble):
            specs = [self.spec(member, None, kind) for kind in of_embeddings]
            absent_signs = [s for s in specs if s.kind in BIGRAM_SIGNS and s.basis == "none"]
            self.specs += [spec for spec in specs if spec not in absent_signs]
            for layer in range(h.num_layers):
                self.specs += [self.spec(member, layer, kind) for kind in of_blocks]
        self.check()

    def spec(self, member: int, block: int | None, kind: str) -> MapSpec:
        """Return the row of a map of a block, or of an embedding (block None)."""
        h = self.h
        layer = block or 0
        prefix = f"members.{member}." if h.ensemble > 1 else ""
        if block is not None:
            prefix += f"blocks.{block}."
        offset, rows, columns = MAP_KINDS[kind]
        spec = MapSpec(prefix + kind, getattr(h, rows), getattr(h, columns))
        spec = spec._replace(depth=layer / max(h.num_layers - 1, 1))
        if kind in EMBEDDING_MAPS:
            spec = spec._replace(gain=(2 * h.num_layers) ** -0.5)  # as published (PR #1113)
        if kind in BIGRAM_SIGNS:
            spec = spec._replace(basis="none", gain=h.bigram_dim**0.5)  # ±1 instead of ±1/√dim
        for column in COLUMNS:  # the basis first: it decides what `random` selects
            for rule in self.rules[column]:
                if rule.selects(spec, member, layer):
                    spec = spec._replace(**{column: rule.cell})
                    self.used.add((column, rule.selector))
        if spec.basis == "learned":
            return spec
        shared_seed = h.map_seed + 1_000_000 * member
        seed = shared_seed + h.map_seed_stride * layer + offset
        return spec._replace(seed=seed, shared_seed=shared_seed)

    def check(self) -> None:
        """Add to `errors` what is wrong with the finished table."""
        basis = self.h.map_basis
        if all(rule.kind.startswith("bigram.signs") for rule in self.rules["basis"]):
            others = f"write learned,{basis} or orthogonal,{basis}"
            self.errors.append(f"MAP_BASIS={basis} names no basis of the other maps; {others}")
        first: dict[tuple[str, str], MapSpec] = {}  # map of each that is stored once
        for spec in self.specs:
            with collect_errors(self.errors, f"MAP_ADAPTER={self.h.map_adapter}"):
                spec.adapters()
            self.errors += self.faults(spec, first.setdefault(spec.owner, spec))
        for column, rules in self.rules.items():
            for rule in rules:
                if (column, rule.selector) not in self.used:
                    self.errors.append(f"MAP_{column.upper()}: {rule.selector} selects no map")
        seeds = [spec.seed for spec in self.specs if spec.basis != "learned"]
        if len(set(seeds)) < len(seeds):
            stride = f"MAP_SEED_STRIDE={self.h.map_seed_stride}"
            self.errors.append(f"{stride} gives two maps the same seed; choose another, as 100")
        self.errors = list(dict.fromkeys(self.errors))  # every layer repeats them

    def faults(self, spec: MapSpec, first: MapSpec) -> list[str]:
        """Return what is wrong with a map whose values, if shared, are those of `first`."""
        has_own = (spec.adapter, spec.scale, spec.gate) != ("none", "none", None)
        is_trained = spec.basis == "learned" or has_own or spec.shared_count > 1  # then its mix is
        is_signs = spec.kind in BIGRAM_SIGNS
        wrong_signs = is_signs and (not spec.is_random or has_own or spec.freeze)
        has_basis = spec.basis != "none" or is_signs
        is_as_first = (spec.gain, spec.init) == (first.gain, first.init) or not spec.shared_count
        adapter, freeze = f"MAP_ADAPTER={self.h.map_adapter}", f"MAP_FREEZE={self.h.map_freeze}"
        faults = {
            f"{adapter}: {spec.kind} is learned in full and takes no adapter": (
                spec.basis == "learned" and spec.adapter != "none"
            ),
            "bigram.signs are none or random, and take no adapter or scale": wrong_signs,
            f"MAP_BASIS={self.h.map_basis}: only bigram.signs can be none": not has_basis,
            f"{freeze}: {spec.kind} is {spec.basis} and has no adapter, scale or gate to freeze": (
                spec.freeze and not is_trained
            ),
            f"{spec.kind} is shared: MAP_GAIN and MAP_INIT must be the same in its layers": (
                not is_as_first
            ),
        }
        return [message for message, is_wrong in faults.items() if is_wrong]


@functools.lru_cache(maxsize=8)
def build_map_table(h: Hyperparameters) -> dict[str, MapSpec]:
    """Return the map table by name, one for all callers. UserError says what is wrong with it."""
    table = MapTable(h)
    if table.errors:
        raise UserError("\n  ".join(["the map table cannot be built:", *table.errors]))
    return {spec.name: spec for spec in table.specs}


class FrozenRandomLinearWithLoRA(Linear):
    """y = x (W + A B)ᵀ (+ bias), W random and orthogonal; the signature is PR #1113's."""

    def __init__(
        self, in_features: int, out_features: int, rank: int = 32, seed: int = 0, bias: bool = False
    ) -> None:
        spec = MapSpec("", out_features, in_features, "orthogonal", seed=seed)
        super().__init__(spec._replace(adapter=f"lora:{rank}"), bias=bias)

    lora_A = property(lambda self: self.lora.A)  # (out, rank)
    lora_B = property(lambda self: self.lora.B)  # (rank, in)


# ---- Attention ---------------------------------------------------------------------------------


def rotations(h: Hyperparameters, dtype: torch.dtype, length: int) -> Tensor:
    """Return cosine and sine for positions 0 to `length`, (2, length + 1, 1, R / 2), R = ROPE_DIMS.

    The last one is the rotation by a whole row, which streaming needs. Over ROPE_STRETCH_FROM
    tokens the base of the frequencies grows to base · (T / limit)^(R / (R - 2)), so that the
    slowest rotation turns as far over the longer sequence as before (PR #1113).
    """
    base, limit, dims = h.rope_base, h.rope_stretch_from, h.rope_dims
    if 0 < limit < length and dims > 2:
        base *= (length / limit) ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2).double() / max(dims, 1)
    angles = torch.arange(length + 1)[:, None, None] * base**-exponents
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply partial RoPE: x (B, T, H, D); cos, sin (T, 1, R) turn the first 2R dimensions."""
    half = cos.size(-1)
    x1, x2, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest], dim=-1)


class RMSNormFunction(torch.autograd.Function):
    """x · scale / rms(x) over the last dimension (arXiv:1910.07467), rotated first if cos is given.

    Its own gradient keeps y instead of x: a CPU step of 831 ms with torch's rms_norm takes 703. It
    divides y by the scale, which must not be 0.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float | Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        if cos is not None:
            x = rotate(x, cos, sin)
        width = x.size(-1)
        at_least_float32 = torch.promote_types(x.dtype, torch.float32)
        mean_square = x.norm(2, -1, True, at_least_float32).square() / width
        epsilon = torch.finfo(mean_square.dtype).eps
        factor = (scale * (mean_square + epsilon).rsqrt()).to(x.dtype)  # (..., 1)
        y = x * factor
        ctx.scale = scale
        ctx.save_for_backward(y, factor, (factor / (width * scale**2)).to(x), cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, factor, dot_factor, cos, sin = ctx.saved_tensors
        dot = (dy * y).sum(-1, keepdim=True)
        dscale = None
        if isinstance(ctx.scale, Tensor):
            dscale = (dot / ctx.scale).sum_to_size(ctx.scale.shape)
        if cos is not None:  # rotate back before the sum: compiled, that is one pass instead of two
            dy, y = rotate(dy, cos, -sin), rotate(y, cos, -sin)
        # With x = y / factor: dx = factor · dy - y · (dy · y) · factor / (width · scale²).
        dx = torch.addcmul(dy * factor, y, dot * dot_factor, value=-1)
        return dx, dscale, None, None


def norm(
    x: Tensor, scale: float | Tensor = 1.0, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """Return scale · x / rms(x), (..., d). Heads (B, T, H, D) may be rotated first."""
    return RMSNormFunction.apply(x, scale, cos, sin)


def block_attention(q: Tensor, k: Tensor, v: Tensor, span: int) -> Tensor:
    """Attend causally by plain products in blocks of queries.

    The queries q (B, n, H, D) of the last n positions see at most `span` keys k (B, T, H_kv, D),
    their own included; the result is (B, n, H, D).
    """
    kv_heads = k.size(2)
    position = k.size(1) - q.size(1)  # of the first query in the block
    block = 128 if k.size(1) <= 1024 else 256
    q = q.transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(0, 1)  # (B · H_kv, H / H_kv, n, D)
    k = k.transpose(1, 2).flatten(0, 1)  # (B · H_kv, T, D)
    v = v.transpose(1, 2).flatten(0, 1)
    outputs = []
    for queries in q.split(block, 2):
        count = queries.size(2)
        begin, end = max(0, position - span + 1), position + count  # keys that the block may see
        blocked = q.new_full((count, end - begin), -torch.inf)
        future = blocked.triu(position - begin + 1)
        too_old = blocked.tril(position - begin - span)
        mask = (future + too_old).repeat(queries.size(1), 1)
        keys = k[:, begin:end].mT
        scores = torch.baddbmm(mask, queries.flatten(1, 2), keys, alpha=q.size(-1) ** -0.5)
        outputs.append((scores.softmax(-1) @ v[:, begin:end]).view_as(queries))
        position = end
    y = torch.cat(outputs, 2)  # (B · H_kv, H / H_kv, n, D)
    return y.unflatten(0, (-1, kv_heads)).flatten(1, 2).transpose(1, 2)


HAS_AMX = torch.cpu._is_amx_tile_supported()  # matrix units of an Intel CPU
# Longest sequence for which a CPU attends by plain products rather than by torch's fused kernel,
# with gradients (plain products keep T² weights for them) and without (bench/speed.py).
PLAIN_ATTENTION = {True: 512, False: 0} if HAS_AMX else {True: 2048, False: math.inf}
SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_order(h: Hyperparameters) -> list[str]:
    """Return the kernels for CUDA, the first choice first. ValueError for an unknown one."""
    known = ["fa3", *SDPA_BACKENDS]
    if h.attention_backend == "auto":
        return known
    names = h.attention_backend.replace(" ", "").split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")
    if set(names) == {"fa3"}:
        raise ValueError("needs one of torch's kernels beside fa3, such as fa3,flash")
    return names


def load_flash_attention_3(h: Hyperparameters) -> Callable[..., Any] | None:
    """Return FlashAttention-3's function where it is installed, allowed and the GPU can run it."""
    is_allowed = h.device != "cpu" and attention_order(h)[0] == "fa3"
    if not is_allowed or h.head_dim % 8 or h.head_dim > 256:
        return None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:  # an optional extra
        return None
    return flash_attn_func


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally: q (B, n, H, D) of the last n positions, k, v (B, T, H_kv, D) -> as q."""
    length = k.size(1)
    is_plain = not q.is_cuda and length <= PLAIN_ATTENTION[torch.is_grad_enabled()]
    if q.size(1) < length or is_plain:
        return block_attention(q, k, v, length)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def flash_attention_and_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return causal attention (B, T, H, D) and its log-sum-exps (B, T, H, 1), without gradient."""
    name = "_scaled_dot_product_flash_attention" + ("" if q.is_cuda else "_for_cpu")
    flash = getattr(torch.ops.aten, name)
    y, lse, *_ = flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, True)
    return y.transpose(1, 2), lse.transpose(1, 2).unsqueeze(-1)


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, row_shift: tuple[Tensor, Tensor]
) -> Tensor:
    """Attend over a stream that is cut into rows, each query to the last T positions.

    A row of the batch continues the row above. Query t of a row sees keys 0 to t of its own row and
    keys t + 1 to T - 1 of the row above, T keys in all. For T = 4 (q: row, k: row above | own row):

        t = 0   . x x x | x . . .       The right half is causal attention. So is the left half
        t = 1   . . x x | x x . .       once queries and keys are read backwards: the query that
        t = 2   . . . x | x x x .       sees the fewest keys comes first, and each next one sees
        t = 3   . . . . | x x x x       one key more.

    Two passes of flash attention give both halves; their log-sum-exps weigh the two results. On a
    CPU with AMX a layer of 8 x 2,048 tokens takes 57 ms this way, and 84 ms in 16 masked blocks.
    Without a flash kernel, block_attention computes both halves at once.

    Shapes are q (B, T, H, D) and k, v (B, T, H_kv, D). `row_shift` rotates keys back by T
    positions: cosine and sine, (1, R) each.
    """
    fits = q.dtype is torch.bfloat16 and q.size(-1) in range(8, 257, 8)
    if not (fits if q.is_cuda else HAS_AMX):
        # Each row's keys: those of the row above, then its own, 2T in all.
        k_both = torch.cat([rotate(k[:-1], *row_shift), k[1:]], 1)
        v_both = torch.cat([v[:-1], v[1:]], 1)
        first = causal_attention(q[:1], k[:1], v[:1])
        return torch.cat([first, block_attention(q[1:], k_both, v_both, q.size(1))])
    y, lse = flash_attention_and_lse(q, k, v)
    q_back = q[1:, :-1].flip(1)
    k_back = rotate(k[:-1, 1:], *row_shift).flip(1)
    v_back = v[:-1, 1:].flip(1)
    y_above, lse_above = flash_attention_and_lse(q_back, k_back, v_back)
    y_above, lse_above = y_above.flip(1), lse_above.flip(1)
    weight_above = torch.sigmoid(lse_above - lse[1:, :-1])  # its share of the sum of exponentials
    y[1:, :-1].lerp_(y_above, weight_above.to(y.dtype))
    return y


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """Subtract from y (B, T, H, D) its part along its own v (B, T, H_kv, D) (XSA, PR #1113)."""
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, H_kv, H / H_kv, D)
    direction = F.normalize(v, dim=-1)[..., None, :]
    along = (grouped * direction).sum(-1, keepdim=True) * direction
    return (grouped - along).flatten(2, 3)


def after_row_above(x: Tensor, fill: int) -> Tensor:
    """Put what the row above has before each row of x: (B, T, ...) -> (B, 2T, ...)."""
    above = torch.cat([torch.full_like(x[:1], fill), x[:-1]])
    return torch.cat([above, x], 1)


class InductionPattern(nn.Module):
    """The weights of frozen induction heads: look at what came next last time.

    Networks learn such heads (arXiv:2209.11895); here they are hard-wired, as the n-gram heads of
    arXiv:2401.12973. Position i looks back at each earlier j before which the last tokens of i
    stand. With N = INDUCTION, w_ij = Σ_n a_n [x_{i-n+1}, …, x_i = x_{j-n}, …, x_{j-1}] for n = 1 to
    N, and the weights are w_ij / (1 + Σ_j w_ij): 0 where nothing repeats. Only a is learned.
    """

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.log_strengths = nn.Parameter(torch.arange(longest) - 1.0)

    def forward(self, ids: Tensor, dtype: torch.dtype, streaming: bool) -> Tensor:
        """Return weights (B, T, T) for ids (B, T); streaming: (B, T, 2T), the row above first."""
        batch, length = ids.shape
        stream = ids.reshape(1, -1) if streaming else ids
        strengths = self.log_strengths.exp()
        weights: Tensor | float = 0.0
        for n in reversed(range(len(strengths))):  # n tokens before those of the first comparison
            query = F.pad(stream, (n, 0), value=-1)[:, : stream.size(1)].reshape(batch, -1)
            key = F.pad(stream, (n + 1, 0), value=-2)[:, : stream.size(1)].reshape(batch, -1)
            key = after_row_above(key, fill=-2) if streaming else key
            weights = (query.unsqueeze(2) == key.unsqueeze(1)) * (strengths[n] + weights)
        above = key.size(1) - length
        weights = weights.tril(above - 1).triu(above - length + 1)  # the last T - 1 positions
        return (weights / (1 + weights.sum(-1, keepdim=True))).to(dtype)


def sum_by_pattern(pattern: Tensor, v: Tensor, heads: int) -> Tensor:
    """Return the sums of v (B, T, H_kv, D) with weights (B, n, T or 2T), (B, n, H, D)."""
    if pattern.size(2) > v.size(1):  # streaming
        v = after_row_above(v, fill=0)
    sums = (pattern @ v.flatten(2)).unflatten(2, v.shape[2:])
    return sums.repeat_interleave(heads // v.size(2), 2)


def keep_last(x: Tensor, n: int | None) -> Tensor:
    """Return the last n positions of x (B, T, ...), or all of them for None."""
    return x if n is None else x[:, -n:]


class AttentionContext(NamedTuple):
    """What attention needs beside its input."""

    cos: Tensor  # (T, 1, R), rotation of each position
    sin: Tensor
    row_shift: tuple[Tensor, Tensor] | None = None  # streaming: see streaming_attention
    num_queries: int | None = None  # n, how many of the last positions attend; None: all
    value_embed: Tensor | None = None  # (B, T, kv_dim), added to the values
    v0: Tensor | None = None  # (B, T, kv_dim), layer 0's own values; None in layer 0
    pattern: Tensor | None = None  # of InductionPattern


class Attention(nn.Module):
    """Causal attention with grouped queries, normalized q and k, partial RoPE and XSA."""

    def __init__(self, h: Hyperparameters, layer: int, linear: Callable[[str], Linear]) -> None:
        super().__init__()
        self.q = linear("attention.q")
        self.k = linear("attention.k")
        self.v = linear("attention.v")
        self.proj = linear("attention.proj")
        self.q_gain = nn.Parameter(torch.full((h.num_heads, 1), h.qk_gain_init))
        self.value_gate = nn.Parameter(torch.zeros(1)) if h.vrl_enabled and layer else None
        self.project_qkv = FusedLinear(self.q, self.k, self.v)
        self.flash_attention_3 = load_flash_attention_3(h)
        self.use_xsa = layer >= h.num_layers - h.xsa_last_n
        self.head_dim = h.head_dim
        self.heads = [h.num_heads, h.num_kv_heads]
        self.widths = [h.model_dim + h.kv_dim, h.kv_dim]  # of q with k, and of v
        self.induction_gain = None
        if h.induction:
            self.induction_gain = nn.Parameter(torch.full((h.num_heads, 1), 0.3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Attend: q (B, T, H, D), k, v (B, T, H_kv, D) -> (B, n, H, D) by the kernel that fits."""
        if context.row_shift is not None:
            return streaming_attention(q, k, v, context.row_shift)
        use_flash_3 = self.flash_attention_3 is not None and q.dtype is torch.bfloat16
        if use_flash_3 and q.is_cuda and context.num_queries is None:
            y = self.flash_attention_3(q, k, v, causal=True)
            return y[0] if isinstance(y, tuple) else y  # older releases return the log-sum-exp, too
        return causal_attention(keep_last(q, context.num_queries), k, v)

    def forward(
        self, x: Tensor, out_scale: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """Attend: x (B, T, d) -> (B, n, d), times out_scale (d,), and own values (B, T, kv_dim)."""
        qk, own_v = self.project_qkv(x).split(self.widths, -1)
        v = own_v
        if context.value_embed is not None:
            v = v + context.value_embed
        if self.value_gate is not None:  # value residual
            v = v + torch.sigmoid(self.value_gate).to(x.dtype) * context.v0
        qk = qk.unflatten(-1, (-1, self.head_dim))  # (B, T, H + H_kv, D)
        v = v.unflatten(-1, (-1, self.head_dim))  # (B, T, H_kv, D)
        gains = F.pad(self.q_gain, (0, 0, 0, self.heads[1]), value=1)  # 1 for keys: (H + H_kv, 1)
        qk = norm(qk, gains, context.cos, context.sin)
        q, k = qk.split(self.heads, 2)
        y = self.attend(q, k, v, context)
        if self.use_xsa:
            y = exclude_self(y, keep_last(v, context.num_queries))
        if self.induction_gain is not None:
            pattern = keep_last(context.pattern, context.num_queries)
            y = y + self.induction_gain.to(y.dtype) * sum_by_pattern(pattern, v, self.heads[0])
        return self.proj(y.flatten(2), out_scale), own_v


# ---- Transformer -------------------------------------------------------------------------------


def squared_leaky_relu(x: Tensor) -> Tensor:
    """Return LeakyReLU(0.5)²; on CUDA only x is kept, and the rest computed again for gradients."""

    def compute(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.5).square()

    return checkpoint(compute, x, use_reentrant=False) if x.is_cuda else compute(x)


class MLP(nn.Module):
    """LeakyReLU(0.5)² between two maps, or GEGLU between three (arXiv:2002.05202)."""

    def __init__(self, h: Hyperparameters, linear: Callable[[str], Linear]) -> None:
        super().__init__()
        self.fc = linear("mlp.fc")
        self.proj = linear("mlp.proj")
        self.gate = linear("mlp.gate") if h.mlp_gated else None

    def forward(self, x: Tensor, out_scale: Tensor) -> Tensor:
        """Transform x (B, T, d) -> (B, T, d), times out_scale (d,)."""
        if self.gate is None:
            hidden = self.fc(x, activation=squared_leaky_relu)
        else:
            hidden = self.fc(x) * self.gate(x, activation=F.gelu)
        return self.proj(hidden, out_scale)


class Block(nn.Module):
    """Pre-norm attention and MLP, in turn or side by side, on a mix of stream and embedding."""

    def __init__(self, h: Hyperparameters, layer: int, linear: Callable[[str], Linear]) -> None:
        super().__init__()
        self.attention = Attention(h, layer, linear)
        self.mlp = MLP(h, linear)
        self.norm_scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.is_parallel = layer >= h.parallel_from
        self.dropout = nn.Dropout(h.dropout)
        depth = layer / max(h.num_layers - 1, 1)
        stream_weight = 1 / (1 + math.exp(-3 * (depth - 0.5)))  # from 0.18 to 0.82 (PR #1113)
        self.stream_mix = nn.Parameter(torch.full((h.model_dim,), stream_weight))
        self.embedding_mix = nn.Parameter(torch.full((h.model_dim,), 1 - stream_weight))
        self.attention_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))

    def forward(self, x: Tensor, x0: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Return stream (B, n, d) and own values (B, T, kv_dim) for stream, embedding (B, T, d)."""
        x = self.stream_mix.to(x.dtype) * x + self.embedding_mix.to(x.dtype) * x0
        normed = norm(x, self.norm_scale)
        y, own_v = self.attention(normed, self.attention_scale, context)
        x = keep_last(x, context.num_queries) + self.dropout(y)
        if self.is_parallel:
            normed = keep_last(normed, context.num_queries)
        else:
            normed = norm(x, self.norm_scale)
        return x + self.dropout(self.mlp(normed, self.mlp_scale)), own_v


class LanguageModel(nn.Module):
    """A model's losses and map table; subclasses implement `predict`."""

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.table = build_map_table(h)
        self.distill_alpha = h.distill_alpha
        self.temperature = h.distill_temperature

    def predict(self, ids: Tensor, keep: int | None = None, streaming: bool = False) -> Tensor:
        """Return float32 logits (B, n, vocabulary) of the last n = `keep` of tokens (B, T), or all.

        If `streaming`, each row continues the row above (see streaming_attention).
        """
        raise NotImplementedError

    def token_losses(self, ids: Tensor, targets: Tensor, streaming: bool = False) -> Tensor:
        """Return the loss in nats, (B, n) float32, of what follows the last n of tokens (B, T)."""
        logits = self.predict(ids, targets.size(1), streaming).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    def forward(self, ids: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """Return the mean loss; with a teacher α CE + (1 - α) T² KL(teacher ‖ student).

        Tokens and targets are (B, T); the teacher is arXiv:1503.02531's.
        """
        logits = self.predict(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if teacher_logits is None:
            return loss
        student = (logits / self.temperature).log_softmax(-1)
        teacher = (teacher_logits / self.temperature).log_softmax(-1)
        divergence = F.kl_div(student, teacher, log_target=True, reduction="sum") / targets.numel()
        alpha = self.distill_alpha
        return alpha * loss + (1 - alpha) * self.temperature**2 * divergence

    def set_recurrence(self, enabled: bool) -> None:
        """Run RECUR_LAYERS several times, or once."""
        for model in self.modules():
            if isinstance(model, GPT):
                model.recurs = enabled

    def linear_maps(self) -> dict[str, Linear]:
        """Return the modules of the map table by name, without the signs of pairs."""
        names = [name for name, spec in self.table.items() if spec.kind not in BIGRAM_SIGNS]
        return {name: self.get_submodule(name) for name in names}

    def fingerprint(self) -> str:
        """Return SHA-256 over all that seeds generated, in the order of the map table."""
        digest = hashlib.sha256()
        for spec in self.table.values():
            for buffer in self.get_submodule(spec.name).buffers():
                if buffer.ndim:  # a number is a schedule's state, such as a temperature
                    digest.update(buffer.cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of the bits that masks learn."""
        for module in self.modules():
            if isinstance(module, Mask):
                module.temperature.fill_(temperature)


class GPT(LanguageModel):
    """The transformer; a member of an ensemble has the map table's rows that have its prefix."""

    def __init__(
        self, h: Hyperparameters, dtype: torch.dtype = torch.float32, prefix: str = ""
    ) -> None:
        super().__init__(h)
        d = h.model_dim
        self.shared = nn.ModuleDict()  # by kind of map and basis

        def linear(kind: str, path: str = prefix) -> Linear:
            spec = self.table[path + kind]
            if not spec.shared_count:
                return Linear(spec)
            key = f"{spec.kind}:{spec.basis}".replace(".", "_")
            if key not in self.shared:
                self.shared[key] = SharedMatrices(spec)
            return Linear(spec, shared=self.shared[key])

        self.embedding = Embedding(h.vocab_size, d, h.tied_embed_init_std, dtype)
        self.bigram = None
        if h.bigram_vocab_size > 1:
            names = [name for name in BIGRAM_SIGNS if prefix + name in self.table]
            signs = {name.split(".")[-1]: FrozenRows(self.table[prefix + name]) for name in names}
            self.bigram = BigramTable(h, dtype, linear("bigram.proj"), signs)
            self.bigram_scale = nn.Parameter(torch.tensor([0.05]))
        self.smear_gate = nn.Parameter(torch.zeros(d)) if h.smear_enabled else None
        self.induction = InductionPattern(h.induction) if h.induction else None
        self.value_layers = h.value_layers
        if self.value_layers:
            proj = linear("value_embedding.proj")
            self.value_embedding = Embedding(h.vocab_size, h.ve_dim, 0.01, dtype, proj)
            self.value_scales = nn.Parameter(torch.full((len(self.value_layers),), 0.1))
        self.blocks = nn.ModuleList()
        for layer in range(h.num_layers):
            of_layer = functools.partial(linear, path=f"{prefix}blocks.{layer}.")
            self.blocks.append(Block(h, layer, of_layer))
        self.block_orders = {False: list(range(h.num_layers)), True: h.block_order}
        self.recurs = True  # training begins without recurrence (Phases), evaluation has it
        # U-Net skips: the i-th layer of the second half adds the stream after its mirror image.
        half = h.num_layers // 2 if h.skips_enabled else 0
        self.skip_from = {half + i: half - 1 - i for i in range(half)}
        self.skip_sources = set(self.skip_from.values())
        self.skip_weights = nn.Parameter(torch.ones(half, d)) if half else None
        has_gates = half and h.skip_gates_enabled
        self.skip_gates = nn.Parameter(torch.zeros(half, d)) if has_gates else None
        self.head = TiedHead(self.embedding, h.logit_softcap)
        self.rotary = functools.partial(rotations, h, dtype)
        for length in {h.train_seq_len, h.eval_seq_len}:
            self.register_buffer(f"rope_{length}", self.rotary(length), persistent=False)

    def embed_tokens(self, ids: Tensor, streaming: bool) -> Tensor:
        """Return the input of the blocks for ids (B, T), (B, T, d)."""
        batch, length = ids.shape
        if streaming:  # one long row: bigrams and smear look back across the rows
            ids = ids.reshape(1, -1)
        x = self.embedding(ids)
        if self.bigram is not None:
            x = x + self.bigram(ids, x) * self.bigram_scale.to(x.dtype)
        x = norm(x)
        if self.smear_gate is not None:  # SmearGate: a mix with the previous position, per channel
            previous = F.pad(x[:, :-1], (0, 0, 1, 0))
            x = torch.lerp(x, previous, torch.sigmoid(self.smear_gate).to(x.dtype))
        return x.view(batch, length, -1)

    def add_skip(self, x: Tensor, skips: dict[int, Tensor], layer: int) -> Tensor:
        """Add the stream of the mirrored layer to x (B, T, d), or mix it in by a gate."""
        i = layer - len(self.skip_from)
        skip = self.skip_weights[i].to(x.dtype) * skips[self.skip_from[layer]]
        if self.skip_gates is None:
            return x + skip
        return torch.lerp(skip, x, self.skip_gates[i].sigmoid().to(x.dtype))

    def predict(self, ids: Tensor, keep: int | None = None, streaming: bool = False) -> Tensor:
        x = x0 = self.embed_tokens(ids, streaming)
        length = ids.size(1)
        rope = getattr(self, f"rope_{length}", None)
        cos, sin = (self.rotary(length) if rope is None else rope).to(x0)
        row_shift = (cos[length], -sin[length]) if streaming else None
        context = AttentionContext(cos[:length], sin[:length], row_shift)
        if self.induction is not None:
            context = context._replace(pattern=self.induction(ids, x0.dtype, streaming))
        embedded = self.value_embedding(ids) if self.value_layers else None
        skips: dict[int, Tensor] = {}  # the stream after each layer of the first half
        order = self.block_orders[self.recurs]
        # For few kept positions the last block computes only these; for many, the explicit mask
        # that this needs costs more.
        are_few = keep is not None and 8 * keep <= length
        for i, layer in enumerate(order, start=1):
            if layer in self.skip_from:
                x = self.add_skip(x, skips, layer)
            value_embed = None
            if layer in self.value_layers:
                scale = self.value_scales[self.value_layers.index(layer)]
                value_embed = embedded * scale.to(embedded.dtype)
            context = context._replace(value_embed=value_embed)
            if i == len(order) and are_few and not streaming:
                context = context._replace(num_queries=keep)
            x, own_v = self.blocks[layer](x, x0, context)
            if context.v0 is None:
                context = context._replace(v0=own_v)
            if layer in self.skip_sources:
                skips[layer] = x
        return self.head(norm(keep_last(x, keep)))


class Ensemble(LanguageModel):
    """Models in one artifact (PR #1301): each has its own loss, the mean of the logits predicts."""

    def __init__(self, h: Hyperparameters, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(h)
        members = [GPT(h, dtype, f"members.{i}.") for i in range(h.ensemble)]
        self.members = nn.ModuleList(members)

    def predict(self, ids: Tensor, keep: int | None = None, streaming: bool = False) -> Tensor:
        logits = [member.predict(ids, keep, streaming) for member in self.members]
        return sum(logits) / len(logits)

    def forward(self, ids: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        losses = [member(ids, targets, teacher_logits) for member in self.members]
        return sum(losses) / len(losses)


@torch.no_grad()
def adapter_ratios(model: LanguageModel) -> dict[str, float]:
    """Return ‖A B‖ / ‖W‖ (Frobenius norms) of every map with low-rank factors."""
    ratios = {}
    for name, module in model.linear_maps().items():
        weight, a, b = module.parts(torch.float32)
        if len(b):
            square = ((a.T @ a) * (b @ b.T)).sum()  # of the Frobenius norm of a b
            ratios[name] = (square.clamp(min=0).sqrt() / weight.norm()).item()
    return ratios


def memory_of_model(h: Hyperparameters) -> int:
    """Return about how many bytes of memory building the model takes."""
    table = build_map_table(h)
    sizes = [math.prod(spec.shape) for spec in table.values()]
    embeddings = h.vocab_size * (h.model_dim + h.ve_dim) + h.bigram_vocab_size * h.bigram_dim
    # Weights in float32, and 64 bytes per entry while the largest map is generated.
    total = 4 * (sum(sizes) + h.ensemble * embeddings) + 64 * max(sizes)
    shared: dict[tuple, int] = {}  # what several maps share is there once
    for spec, numel in zip(table.values(), sizes, strict=True):
        shared[spec.owner] = 4 * spec.shared_count * numel
        for name, size in spec.adapters().items():
            unit = ADAPTERS[name].size_unit
            if unit == "rank":
                total += 4 * int(size) * sum(spec.shape)
            elif unit == "count":
                shared[spec.shared_seed, spec.shape, size] = 4 * int(size) * numel
            else:  # positions of sparse values, or scores of masks
                total += 12 * numel
    return total + sum(shared.values())


def make_model(h: Hyperparameters, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Return a new model. UserError over MODEL_LIMIT_BYTES: an artifact may ask for anything."""
    need = memory_of_model(h)
    if need > h.model_limit_bytes:
        limit = f"MODEL_LIMIT_BYTES={h.model_limit_bytes}"
        raise UserError(f"{limit}, but the model needs {need:,} bytes; raise it or build less")
    return Ensemble(h, dtype) if h.ensemble > 1 else GPT(h, dtype)


def map_rows(model: LanguageModel) -> list[dict[str, Any]]:
    """Return the map table of a built model, with counts of values."""
    rows = []
    for spec in model.table.values():
        module = model.get_submodule(spec.name)
        row = {"name": spec.name, "shape": f"{spec.out_features}x{spec.in_features}"}
        row |= {name: getattr(spec, name) for name in (*COLUMNS, "seed")}
        row["learned"] = sum(p.numel() for p in module.parameters())
        row["frozen"] = math.prod(spec.shape) if spec.is_random else 0
        rows.append(row)
    return rows


def describe_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same columns as a table of text."""
    lines = [list(row) for row in rows[:1]]
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# ---- Processes and log -------------------------------------------------------------------------


def resolve_dtype(h: Hyperparameters, on_cuda: bool) -> torch.dtype:
    """Return the type of activations that DTYPE means on this machine."""
    if h.dtype != "auto":
        return getattr(torch, h.dtype)
    is_intel = any("GenuineIntel" in path.read_text() for path in Path("/proc").glob("cpuinfo"))
    is_fast = HAS_AMX or (not is_intel and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if on_cuda or is_fast else torch.float32


GPU_FILE = Path("/dev/nvidia0")  # there is one where there is an NVIDIA GPU


def use_cuda(h: Hyperparameters) -> bool:
    """Return whether to run on a GPU. UserError if one is there but torch cannot use it."""
    if h.device == "cpu":
        return False
    if torch.cuda.is_available():
        return True
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")  # on purpose
    if h.device == "cuda" or (GPU_FILE.exists() and not is_hidden):
        raise UserError(
            f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) finds no usable GPU."
            " Install a build for the CUDA version that `nvidia-smi` names, or set DEVICE=cpu"
        )
    return False


class Distributed:
    """This process among those of the run, and its device. `with` opens the process group."""

    def __init__(self, h: Hyperparameters) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = int(os.environ.get("RANK", 0)) if self.world_size > 1 else 0
        self.timeout = datetime.timedelta(seconds=h.timeout_seconds)
        self.h = h
        self.on_cuda = use_cuda(h)
        self.device = torch.device("cpu")
        self.device_name = f"{platform.machine()} CPU"
        if self.on_cuda:
            self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            self.device_name = torch.cuda.get_device_name(self.device)
        self.stack = contextlib.ExitStack()

    @property
    def compile(self) -> bool:
        return self.on_cuda if self.h.compile == "auto" else self.h.compile == "1"

    def __enter__(self) -> Distributed:
        self.configure(self.h)
        if self.world_size == 1:
            return self
        place = {"rank": self.rank, "world_size": self.world_size, "timeout": self.timeout}
        store, *_ = next(torch.distributed.rendezvous("env://", **place))
        # A restart by torchrun gets a part of the store of its own.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        backend = "cpu:gloo,cuda:nccl" if self.on_cuda else "gloo"
        store = torch.distributed.PrefixStore(restart, store)
        torch.distributed.init_process_group(backend, store=store, **place)
        return self

    def configure(self, h: Hyperparameters) -> None:
        """Use the kernels and switches of these settings. UserError if they want another device."""
        if use_cuda(h) != self.on_cuda:
            raise UserError(f"the run had DEVICE={h.device}; set DEVICE to what it is now")
        self.h = h
        self.stack.close()
        if self.on_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 will do for what stays float32
            order = [SDPA_BACKENDS[name] for name in attention_order(h) if name != "fa3"]
            self.stack.enter_context(sdpa_kernel(order, set_priority=True))
        if not self.compile:
            return
        from torch._inductor import config as inductor  # only now: it takes seconds
        from torch._inductor.decomposition import decompositions

        # Inductor's gradient of an embedding adds atomically, in any order; torch's own kernel
        # gives the same sum every time.
        decompositions.pop(torch.ops.aten.embedding_dense_backward.default, None)
        # The cache of compiled graphs on disk does not know the order of kernels otherwise.
        torch.compiler.config.cache_key_tag = ",".join(attention_order(h))
        # This pass, on by default in torch 2.11, costs 5.9 ms of a step (PR #1420, pytorch#179494).
        if hasattr(inductor.triton, "mix_order_reduction"):
            inductor.triton.mix_order_reduction = False

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Close the group. After success with several processes this ends the interpreter."""
        self.stack.close()
        if self.world_size > 1 and error is None:
            torch.distributed.barrier()  # rank 0 may still be writing
            torch.distributed.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # a thread of gloo's sometimes aborts an interpreter that exits slowly

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over the processes in place, and return it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's object on every process."""
        box = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(box, 0)
        return box[0]

    def from_rank0(self, read: Callable[[], Any]) -> Any:
        """Return what `read` gives on rank 0, which alone calls it: disks may differ."""
        return self.broadcast_object(read() if self.rank == 0 else None)

    def sync_from_rank0(self, *numbers: float, flag: bool = False) -> tuple[list[float], bool]:
        """Return rank 0's numbers, since clocks differ, and whether any process has the flag."""
        mine = numbers if self.rank == 0 else [0.0] * len(numbers)
        *shared, flags = self.all_reduce(torch.tensor([*mine, flag], dtype=torch.float64)).tolist()
        return shared, flags > 0


class StopSignal:
    """SIGTERM, SIGHUP and Ctrl-C: in training the first asks for a checkpoint, a second one leaves.

    Ctrl-C may arrive twice, from the terminal and from torchrun; a copy within a second is ignored.
    """

    def __init__(self) -> None:
        self.can_save = False  # whether there is training that a checkpoint would save
        self.requested_at = 0.0

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._handle)

    @property
    def requested(self) -> bool:
        return self.requested_at > 0

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and time.monotonic() < self.requested_at + 1:
            return
        if self.requested or not self.can_save:
            os._exit(128 + number)
        self.requested_at = time.monotonic()
        with contextlib.suppress(OSError):  # the console may be gone, and print may be under way
            os.write(2, b"saving after this step; a second signal exits at once\n")


class RunLog:
    """The log of a run: rank 0 writes to the console, and to the run's folder once it is open."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.file: io.TextIOBase | None = None
        self.metrics_file: io.TextIOBase | None = None

    def open(self, folder: Path) -> None:
        """Open a folder's train.log and metrics.jsonl. UserError if another run has them."""
        path = folder / "train.log"
        self.file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file = None
            problem = f"{path}: another process is using this run; choose a new RUN_ID"
            raise UserError(problem) from None
        self.metrics_file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        for file in (self.file, self.metrics_file):  # a crash may have torn the last line
            file.truncate(Path(file.name).read_bytes().rfind(b"\n") + 1)

    def begin_anew(self) -> None:
        """Empty the files; train.previous.log and metrics.previous.jsonl keep those before."""
        if os.fstat(self.file.fileno()).st_size:
            self("no checkpoint: the run begins anew")
            for file in (self.file, self.metrics_file):
                path = Path(file.name)
                shutil.copyfile(path, path.with_stem(f"{path.stem}.previous"))
                file.truncate(0)

    def metrics(self, **values: Any) -> None:
        if self.metrics_file:
            print(json.dumps(values), file=self.metrics_file, flush=True)

    def __call__(self, text: str, console: bool = True) -> None:
        """Write a line of rank 0, to the file and to the console unless that is gone."""
        if self.file:
            print(text, file=self.file, flush=True)
        if self.rank == 0 and console:
            with contextlib.suppress(OSError):
                print(text, flush=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:  # a log without its last line explains nothing
            is_expected = isinstance(error, UserError)
            text = f"error: {error}" if is_expected else traceback.format_exc()
            self(text, console=False)
        for file in filter(None, (self.file, self.metrics_file)):
            file.close()


def write_file(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a file atomically: no reader sees a part of it. The old one moves to `keep` first."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(keep)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_file(setting: str, path: str) -> bytes:
    """Return a file's bytes. UserError, which names the setting, if it cannot be read."""
    with untrusted_input(f"{setting}={path}"):
        return Path(path).read_bytes()


@contextlib.contextmanager
def untrusted_input(what: str) -> Iterator[None]:
    """Turn the exceptions that a missing or damaged file causes in the block into a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a forged file may raise any
        raise UserError(f"{what} cannot be used: {type(error).__name__}: {error}") from None


# ---- Data --------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def shard_paths(folder: str, split: str) -> list[Path]:
    """Return the paths of a split's shards, in the order in which they are read."""
    return sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))


def read_shards(folder: str, split: str) -> list[np.ndarray]:
    """Return the tokens of each shard of a split, memory-mapped, (n,) uint16.

    A shard is a header of 256 little-endian int32 (magic, version, number of tokens), then
    little-endian uint16 tokens. UserError if there is none, or one is incomplete or lost.
    """
    paths = shard_paths(folder, split)
    if not paths:
        ways = "run `python data/prepare.py fineweb`, or `python data/prepare.py text FILE`"
        raise UserError(f"DATA_PATH={folder}: no fineweb_{split}_*.bin there; {ways}")
    shards = []
    for path in paths:
        header = np.fromfile(path, "<i4", 3).tolist()
        size = path.stat().st_size
        is_whole = len(header) == 3 and size == SHARD_HEADER_BYTES + 2 * header[2]
        if header[:2] != [SHARD_MAGIC, SHARD_VERSION] or not is_whole or header[2] < 1:
            found = f"{size} bytes, header {header}"
            raise UserError(f"{path}: incomplete or no shard ({found}); prepare it again")
        shards.append(np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, (header[2],)))
    total = sum(map(len, shards))
    expected = read_manifest(folder).get(split, {}).get("tokens", total)
    if total != expected:
        problem = f"manifest.json says {expected} {split} tokens, there are {total}"
        raise UserError(f"DATA_PATH={folder}: {problem}; prepare the data again")
    return shards


def check_tokens(tokens: np.ndarray, h: Hyperparameters) -> np.ndarray:
    """Return the tokens. UserError if one is outside the vocabulary."""
    largest = tokens.max(initial=0)
    if largest >= h.vocab_size:
        vocabulary = f"VOCAB_SIZE={h.vocab_size}"
        raise UserError(f"DATA_PATH={h.data_path}: token {largest} is outside {vocabulary}")
    return tokens


@functools.lru_cache(maxsize=2)
def epoch_order(order: str, seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of n sequences in an epoch, (n,) int64, by DATA_ORDER."""
    if order == "stream":
        return np.arange(n)
    return np.argsort(random_uint64(seed + (epoch << 64), n), kind="stable")


class TrainingData:
    """The training shards as sequences, read by seed and step; the last ones are held out."""

    def __init__(self, h: Hyperparameters) -> None:
        self.h = h
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self.ahead: dict[int, Future[Tensor]] = {}  # the next step's sequences
        self.shards = read_shards(h.data_path, "train")
        length = h.train_seq_len
        positions = []  # (shard, start) of every sequence
        for i, tokens in enumerate(self.shards):
            starts = np.arange(0, len(tokens) - length, length)
            positions.append(np.stack([np.full_like(starts, i), starts], 1))
        every = np.concatenate(positions)
        if len(every) < 2:
            need = f"too few training tokens for TRAIN_SEQ_LEN={length}"
            raise UserError(f"DATA_PATH={h.data_path}: {need}")
        count = max(1, min(h.holdout_tokens // length, len(every) // 50))  # at most 2%
        self.positions, self.held_out = every[:-count], every[-count:]

    def read(self, positions: Iterable[tuple[int, int]]) -> Tensor:
        """Return the sequences at these positions, (n, TRAIN_SEQ_LEN + 1) int64."""
        length = self.h.train_seq_len + 1
        rows = [self.shards[shard][start : start + length] for shard, start in positions]
        return torch.from_numpy(check_tokens(np.stack(rows), self.h).astype(np.int64))

    def sequences(self, first: int, count: int) -> Tensor:
        """Return `count` sequences of training from number `first` on, (count, length + 1)."""
        n = len(self.positions)
        chosen = []
        for number in range(first, first + count):
            epoch, i = divmod(number, n)
            order = epoch_order(self.h.data_order, self.h.seed, epoch, n)
            chosen.append(self.positions[order[i]])
        return self.read(chosen)

    def step_sequences(self, step: int, dist: Distributed) -> Tensor:
        """Return this process's part of a step on the CPU, (n, TRAIN_SEQ_LEN + 1) int64."""
        count = self.h.train_batch_tokens // self.h.train_seq_len // dist.world_size
        rows = self.sequences((step * dist.world_size + dist.rank) * count, count)
        return rows.pin_memory() if dist.on_cuda else rows

    def split(self, rows: Tensor, dist: Distributed) -> list[tuple[Tensor, Tensor]]:
        """Return equal micro-batches on the device: inputs and targets, (n, TRAIN_SEQ_LEN) each."""
        most = min(max(1, self.h.micro_batch_tokens // self.h.train_seq_len), len(rows))
        size = max(n for n in range(1, most + 1) if len(rows) % n == 0)
        rows = rows.to(dist.device, non_blocking=True)
        return [(part[:, :-1], part[:, 1:]) for part in rows.split(size)]

    def micro_batches(self, step: int, dist: Distributed) -> list[tuple[Tensor, Tensor]]:
        """Return this process's micro-batches, and read the next step's while it computes."""
        read = functools.partial(self.reader.submit, self.step_sequences)
        rows = self.ahead.pop(step, None) or read(step, dist)
        self.ahead = {step + 1: read(step + 1, dist)}
        return self.split(rows.result(), dist)

    @functools.cached_property
    def sample(self) -> Tensor:
        """2^20 to 2^21 tokens (n, T) from all over the training text, or all of it; read once."""
        every = max(1, len(self.positions) * self.h.train_seq_len // 2**20)
        return self.read(self.positions[::every])[:, :-1]

    def held_out_stream(self) -> Tensor:
        """Return the held-out training text as one stream of tokens."""
        rows = self.read(self.held_out)
        return torch.cat([rows[:, :-1].flatten(), rows[-1, -1:]])


class Tokenizer:
    """A SentencePiece model, and the bytes of text that each token stands for.

    A token has the UTF-8 length of its piece without the leading ▁, a byte token 1, a control token
    0; a leading ▁ adds 1 unless the previous token is a control token.
    """

    def __init__(self, path: str, vocab_size: int) -> None:
        with untrusted_input(f"TOKENIZER_PATH={path}"):
            proto = Path(path).read_bytes()
            model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        if model.vocab_size() != vocab_size:
            have = f"TOKENIZER_PATH={path} has {model.vocab_size()} pieces"
            raise UserError(f"{have}, but VOCAB_SIZE={vocab_size}")
        if model.is_unknown(model.piece_to_id("▁")):
            problem = "the vocabulary has no piece ▁, so bytes cannot be counted"
            raise UserError(f"TOKENIZER_PATH={path}: {problem}")
        self.model = model
        self.sha256 = hashlib.sha256(proto).hexdigest()
        ids = list(range(vocab_size))
        pieces = model.id_to_piece(ids)
        kinds = [is_kind(ids) for is_kind in (model.is_control, model.is_unknown, model.is_unused)]
        self.is_control = np.any(kinds, 0)
        self.is_byte = np.array(model.is_byte(ids))
        starts_with_space = np.array([piece.startswith("▁") for piece in pieces])
        self.has_space = starts_with_space & ~self.is_control
        lengths = np.array([len(piece.removeprefix("▁").encode()) for piece in pieces])
        self.own_bytes = np.where(self.is_byte, 1, np.where(self.is_control, 0, lengths))

    def check_manifest(self, h: Hyperparameters) -> None:
        """Raise UserError if the manifest of the shards, if any, names another tokenizer."""
        if read_manifest(h.data_path).get("tokenizer_sha256") not in (None, self.sha256):
            tokenizer, path = f"TOKENIZER_PATH={h.tokenizer_path}", f"{h.data_path}/manifest.json"
            raise UserError(f"{tokenizer} is not the tokenizer that {path} names for these shards")

    def count_bytes(self, previous: np.ndarray, tokens: np.ndarray) -> int:
        """Return the bytes of text of tokens (n,), given the token before each, (n,)."""
        spaces = self.has_space[tokens] & ~self.is_control[previous]
        return int(self.own_bytes[tokens].sum() + spaces.sum())

    def decode(self, tokens: np.ndarray) -> bytes:
        """Return the text of a stream, document by document: a control token stands before each."""
        documents = np.split(tokens, np.flatnonzero(self.is_control[tokens]))
        return "".join(self.model.decode(document.tolist()) for document in documents).encode()


class ValidationStream:
    """All validation tokens as one stream. UserError if their bytes are not those of their text."""

    def __init__(self, h: Hyperparameters, tokenizer: Tokenizer) -> None:
        tokens = check_tokens(np.concatenate(read_shards(h.data_path, "val")), h)
        self.bytes = tokenizer.count_bytes(tokens[:-1], tokens[1:])  # all but the first are scored
        if not self.bytes:
            raise UserError(f"DATA_PATH={h.data_path}: the validation stream has no text to score")
        # The stream may end within a character: the check leaves out the byte tokens at its end.
        whole = len(tokens) - int(np.argmin(tokenizer.is_byte[tokens[::-1]]))
        self.text = tokenizer.decode(tokens[:whole])
        any_control = tokenizer.is_control.argmax()
        previous = np.append(any_control, tokens[: whole - 1])
        counted = tokenizer.count_bytes(previous, tokens[:whole])
        if counted != len(self.text):
            counts = f"validation tokens count {counted} bytes, their text has {len(self.text)}"
            question = f"is TOKENIZER_PATH={h.tokenizer_path} what made them?"
            raise UserError(f"DATA_PATH={h.data_path}: {counts}; {question}")
        self.tokens = torch.from_numpy(tokens.astype(np.int64))

    def bits_per_byte(self, mean_loss: float) -> float:
        """Return the bits per byte of a mean loss in nats per scored token."""
        total_nats = mean_loss * (len(self.tokens) - 1)
        return total_nats / math.log(2) / self.bytes


def identify(h: Hyperparameters, tokenizer: Tokenizer, dist: Distributed) -> dict[str, str]:
    """Return what a run depends on beside its settings; shards count by their names and sizes.

    UserError if the processes do not have the same, or differ in a setting that is no path.
    """
    splits = ("val",) if h.eval_only else ("train", "val")
    shards = [path for split in splits for path in shard_paths(h.data_path, split)]
    listing = [[path.name, path.stat().st_size] for path in shards]
    identity = {
        "tokenizer": tokenizer.sha256,
        "shards": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        "source": hashlib.sha256(SOURCE).hexdigest(),
        "processes": str(dist.world_size),
        "dtype": str(resolve_dtype(h, dist.on_cuda)),
    }
    paths = ("run_id", "output_dir", "distill_from", "model_path", "checkpoint_path", *LOCATIONS)
    settings = h.as_dict() | {name: bool(getattr(h, name)) for name in paths}
    mine = identity | {name.upper(): value for name, value in settings.items()}
    mine |= {"versions": VERSIONS, "packed code": code_bytes(), "kind of device": dist.device.type}
    for name, value in dist.broadcast_object(mine).items():
        if mine[name] != value:
            raise UserError(f"process {dist.rank} has another {name} than process 0")
    return identity


# ---- Optimizers --------------------------------------------------------------------------------


def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """Bring the singular values of matrices (n, rows, columns) near 1 by Newton and Schulz."""
    is_tall = g.size(1) > g.size(2)
    x = (g.mT if is_tall else g).to(torch.bfloat16 if g.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if is_tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum (Jordan et al. 2024); processes share a shape's matrices."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.025,
        momentum: float = 0.95,
        backend_steps: int = 5,
        weight_decay: float = 0.0,
        dist: Distributed | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.backend_steps = backend_steps
        self.dist = dist

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            # All shapes are sent before the first is waited for.
            started = [self._start(params, group["momentum"]) for params in by_shape.values()]
            for (shape, params), (updates, transfer) in zip(by_shape.items(), started, strict=True):
                if transfer:
                    transfer.wait()
                rows, columns = shape
                lr = group["lr"]
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                lr *= max(1, rows / columns) ** 0.5
                torch._foreach_add_(params, list(updates), alpha=-lr)

    def _start(
        self, params: list[nn.Parameter], momentum: float
    ) -> tuple[Tensor, torch.distributed.Work | None]:
        """Return stacked updates of parameters of one shape, and a transfer to wait for or None."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients = [p.grad for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        batch = torch.stack(torch._foreach_add(gradients, momenta, alpha=momentum))
        if self.dist is None or self.dist.world_size == 1:
            return orthogonalize(batch, self.backend_steps), None
        updates = torch.zeros_like(batch)
        mine = slice(self.dist.rank, None, self.dist.world_size)
        updates[mine] = orthogonalize(batch[mine], self.backend_steps)
        return updates, torch.distributed.all_reduce(updates, async_op=True)


class Optimizers:
    """Muon for matrices and low-rank factors, AdamW for everything else."""

    def __init__(self, groups: RoleGroups, h: Hyperparameters, dist: Distributed) -> None:
        self.h, self.dist = h, dist
        self.names = {p: name for group in groups.values() for name, p in group.items()}
        self.params = list(self.names)
        muon_rates = {
            Role.MATRIX: (h.matrix_lr, h.muon_wd),
            Role.FACTOR: (h.factor_lr, h.factor_wd),
        }
        adam_rates = {
            Role.EMBEDDING: (h.tied_embed_lr, h.embed_wd),
            Role.SCALAR: (h.scalar_lr, h.adam_wd),
            Role.SPARSE: (h.sparse_lr, h.muon_wd),
        }
        mask_rates = muon_rates if h.mask_optimizer == "muon" else adam_rates
        mask_rates[Role.MASK] = (h.mask_lr, 0.0)

        def param_groups(rates: dict[Role, tuple[float, float]]) -> list[dict[str, Any]]:
            return [
                {"params": list(groups[role].values()), "lr": lr, "weight_decay": weight_decay}
                for role, (lr, weight_decay) in rates.items()
            ]

        steps, betas = h.muon_backend_steps, (h.beta1, h.beta2)
        self.muon = Muon(param_groups(muon_rates), backend_steps=steps, dist=dist)
        self.adam = torch.optim.AdamW(param_groups(adam_rates), 0.0, betas, h.adam_eps, fused=True)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adam.param_groups

    def step(self, step: int, lr_scale: float) -> dict[str, Tensor]:
        """Average the gradients over the processes, clip and apply; return their norms by name."""
        h = self.h
        warm = min(1.0, step / max(h.muon_momentum_warmup_steps, 1))
        momentum = (1 - warm) * h.muon_momentum_warmup_start + warm * h.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for group, lr in zip(self.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * lr_scale
        trained = [p for p in self.params if p.grad is not None]  # all that is not frozen
        gradients = [p.grad for p in trained]
        if self.dist.world_size > 1:  # all gradients in one message
            flat = self.dist.all_reduce(torch.nn.utils.parameters_to_vector(gradients))
            torch.nn.utils.vector_to_parameters(flat / self.dist.world_size, gradients)
        norms = torch._foreach_norm(gradients)
        if h.grad_clip_norm:
            total_norm = torch.stack(norms).norm()
            torch.nn.utils.clip_grads_with_norm_(trained, h.grad_clip_norm, total_norm)
        self.muon.step()
        self.adam.step()
        for p in self.params:
            p.grad = None
            if not p.requires_grad:  # frozen by now: its state is freed
                self.muon.state.pop(p, None)
                self.adam.state.pop(p, None)
        return {self.names[p]: size for p, size in zip(trained, norms, strict=True)}


class WeightAverages:
    """Averages of the weights: `ema` counts older ones less; `swa` is the mean of late ones."""

    def __init__(self, params: list[nn.Parameter], h: Hyperparameters) -> None:
        self.h, self.params = h, params
        decays = {"ema": h.ema_decay, "swa": float(h.swa_enabled)}
        self.decays = {name: decay for name, decay in decays.items() if decay}
        self.means = {name: {p: torch.zeros_like(p) for p in params} for name in self.decays}
        self.totals = dict.fromkeys(self.decays, 0.0)  # 1 + decay + decay² + ..., a mean's weight

    @torch.no_grad()
    def update(self, step: int, lr_scale: float) -> None:
        for name, decay in self.decays.items():
            # The memory of what is frozen by now is freed.
            means = {p: mean for p, mean in self.means[name].items() if p.requires_grad}
            self.means[name] = means
            is_late = lr_scale < self.h.swa_threshold and step % self.h.swa_interval == 0
            if name == "ema" or is_late:
                self.totals[name] = 1 + decay * self.totals[name]
                torch._foreach_lerp_([*means.values()], [*means], 1 / self.totals[name])

    def candidates(self) -> dict[str, list[Tensor]]:
        """Return name -> weights, in the order of the parameters; `last` are the present ones."""
        found = {"last": [p.detach().clone() for p in self.params]}
        for name, means in self.means.items():
            if self.totals[name]:
                weights = [means.get(p, p.data) for p in self.params]
                found[name] = [weight.clone() for weight in weights]
        return found

    def state_dict(self) -> dict[str, Any]:
        means = {name: [means.get(p) for p in self.params] for name, means in self.means.items()}
        return {"means": means, "totals": self.totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.totals |= state["totals"]
        for name in self.decays.keys() & state["means"].keys():
            pairs = zip(self.params, state["means"][name], strict=True)
            self.means[name] = {p: mean.to(p.device) for p, mean in pairs if mean is not None}


# ---- Quantization ------------------------------------------------------------------------------


class QuantizedTensor(NamedTuple):
    """A quantized matrix: value = level of the code · scale of the row · scale of the column.

    A scale is 2^((exponent - 160) / 8); exponent 0 is a scale of 0. The codes of a row lead through
    the states of a trellis, from state 0 on. In an even state a code's level is the code itself, in
    an odd one it is half a unit nearer to zero; code 0 always stands for 0. So a row can reach
    levels half a unit apart, though in each state its codes tell only whole units apart
    (trellis-coded quantization, Marcellin and Fischer 1990, as in the video codec VVC).
    """

    codes: Tensor  # (rows, columns) int8
    exponents: Tensor  # (rows,) uint8
    column_exponents: Tensor | None = None  # (columns,) uint8; None: every column's scale is 1
    states: int = 1  # of the trellis

    def levels(self) -> Tensor:
        """Return what the codes stand for, (rows, columns) float64."""
        if self.states == 1:
            return self.codes.double()
        follows = trellis(self.states).to(self.codes.device)
        state = torch.zeros_like(self.codes[:, 0], dtype=torch.int64)
        states = []
        for parity in self.codes.t().contiguous() & 1:
            states.append(state.to(torch.int8))
            state = follows[2 * state + parity]
        return self.codes - self.codes.sign() * (torch.stack(states, 1) & 1).double() / 2

    def dequantize(self) -> Tensor:
        """Return the values, (rows, columns) float32."""
        values = self.levels() * scales_of(self.exponents)[..., None]
        if self.column_exponents is not None:
            values *= scales_of(self.column_exponents)
        return values.float()


TRELLIS_STATES = 8


def trellis(states: int) -> Tensor:
    """Return the state that follows each pair, 2 · state + parity of the code, int64 (2 · states,).

    That of 8 states is Ungerboeck's (1982): a shift register that the parity of the codes feeds. A
    trellis of one state stays in it.
    """
    pair = torch.arange(2 * states)
    return ((pair >> 2) ^ (5 * (pair >> 1 & 1)) ^ (2 * (pair & 1))) % states


def scales_of(exponents: Tensor) -> Tensor:
    """Return the scales that exponents stand for, uint8 -> float64 of the same shape."""
    scales = torch.exp2((exponents.double() - 160) / 8)
    return scales.where(exponents > 0, 0.0)


def scale_exponents(scale: Tensor) -> Tensor:
    """Return the exponents of scales, uint8; 0 for a scale of 0."""
    exponent = (160 + 8 * scale.log2()).round().clamp(1, 255)
    return torch.where(scale > 0, exponent, 0).to(torch.uint8)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices with this precision; the one before returns after it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    """Symmetric quantization: the largest code of a row stands for `clip_sigmas` times its RMS."""

    bits: int
    clip_sigmas: float
    prune_fraction: float = 0.0

    STATES: ClassVar = 1  # of the trellis
    DEAD_ZONE: ClassVar = 0.0  # of a scale: how far the border of two codes moves to the larger
    WINDOW: ClassVar = 24  # columns after which a code is final

    @property
    def largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def column_exponents(self, rows: int, curvature: Tensor) -> Tensor | None:
        """Return the exponents of scales for the columns by their `curvature`, or None for none."""
        return None

    def exponents(
        self, w: Tensor, column_scales: Tensor | float = 1.0, remaining: float = 1.0
    ) -> Tensor:
        """Return the exponent of each row's scale, (..., rows, columns) -> (..., rows) uint8.

        The values will be divided by `column_scales` (columns,). `remaining` is the part of the
        curvature of a row's values that they and GPTQ leave.
        """
        rms = w.double().square().mean(-1).sqrt()
        return scale_exponents(rms * self.clip_sigmas / self.largest)

    def prune(self, w: Tensor) -> Tensor:
        """Return w (..., rows, columns) with the smallest values of each matrix set to zero."""
        count = int(w.size(-2) * w.size(-1) * self.prune_fraction)
        if not count:
            return w
        threshold = w.abs().flatten(-2).kthvalue(count).values[..., None, None]
        return w * (w.abs() > threshold)

    def nearest(self, w: Tensor) -> QuantizedTensor:
        """Quantize w (..., rows, columns) to the nearest codes."""
        exponents = self.exponents(w)
        in_scales = w.double() / scales_of(exponents)[..., None].clamp(min=1e-30)
        codes = in_scales.round().clamp_(-self.largest, self.largest) * (self.prune(w) != 0)
        return QuantizedTensor(codes.to(torch.int8), exponents)

    @torch.no_grad()
    @matmul_precision("highest")
    def quantize(self, matrices: Sequence[tuple[Tensor, Tensor | None]]) -> list[QuantizedTensor]:
        """Quantize each matrix w (rows, columns), all of one shape at the same time.

        With its Hessian Σ x xᵀ (columns, columns) the codes keep w x near (GPTQ, arXiv:2210.17323).
        """
        by_shape: dict[torch.Size, list[tuple]] = {}
        found = {}
        for i, (w, hessian) in enumerate(matrices):
            if hessian is None and self.STATES == 1:  # nothing to make up for, no path to find
                found[i] = self.nearest(w)
                continue
            if hessian is None:
                hessian = torch.eye(w.size(1), device=w.device)
            factor, curvature = gptq_factor(hessian.double())
            column_exponents = self.column_exponents(len(w), curvature)
            column_scales = torch.ones_like(curvature)
            if column_exponents is not None:
                column_scales = scales_of(column_exponents)
            remaining = (curvature * column_scales.square()).mean().item()
            exponents = self.exponents(w, column_scales, remaining)
            in_scales = w.double() / column_scales / scales_of(exponents)[:, None].clamp(min=1e-30)
            # The factor of the inputs times their scales.
            problem = in_scales, self.prune(w) != 0, factor / column_scales
            by_shape.setdefault(w.shape, []).append((i, exponents, column_exponents, *problem))
        for problems in by_shape.values():
            places, exponents, column_exponents, *parts = zip(*problems, strict=True)
            codes = self._gptq(*map(torch.stack, parts))
            for i, *each in zip(places, codes, exponents, column_exponents, strict=True):
                found[i] = QuantizedTensor(*each, self.STATES)
        return [found[i] for i in range(len(matrices))]

    def _nearest_of_parity(
        self, size: Tensor, barred: Tensor, parity: Tensor, half: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return error and cost of the nearest code of each parity in each state of the trellis.

        The `size` of what is rounded is (count, states, 1, rows), `parity` 0 and 1 (2, 1), both
        results are (count, states, 2, rows). A state's levels lie `half` (states, 1, 1) nearer to
        zero than its codes. The code must be 0 where `barred` (count, 1, 1, rows) is True.
        """
        border = (half - parity - self.DEAD_ZONE) / 2
        codes = torch.add(border, size.masked_fill(barred, 0), alpha=0.5)
        codes = parity + 2 * codes.round_().clamp_(0, self.largest // 2)
        # In an odd state 0 may be nearer than 1.5, the next level of an even code.
        codes[:, 1::2, 0] *= size[:, 1::2, 0] > (2.25 + 4 * self.DEAD_ZONE) / 3
        error = size - (codes - half).clamp_(min=0)
        cost = error.square().add_(codes, alpha=2 * self.DEAD_ZONE)
        cost[:, :, 1].masked_fill_(barred[:, :, 0], math.inf)
        return error, cost

    def _gptq(self, w: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
        """Choose codes column by column; the columns that are left make up for each error.

        For each state of the trellis a row keeps the cheapest codes that lead into it, a path, with
        the errors of its own (Viterbi's algorithm). After WINDOW more columns a code is final: the
        row takes that of its cheapest path, and drops the paths that differ there. With one state
        this is plain GPTQ.

        w (count, rows, columns) is float64 in units of the scales; codes must be 0 where `kept` is
        False; `factor` (count, columns, columns) is that of gptq_factor. The loop is in float32,
        which is twice as fast; the codes are read off in float64 at the end.
        """
        count, rows, columns = w.shape
        # The two pairs, 2 · state + parity of the code, that lead into each state.
        into = trellis(self.STATES).to(w.device).argsort(stable=True)
        first, second = into.view(-1, 2).unbind(1)
        parity = torch.arange(2, device=w.device)[:, None]
        half = (torch.arange(self.STATES, device=w.device) & 1)[:, None, None] / 2
        diagonal = factor.diagonal(dim1=1, dim2=2)
        factor = factor / diagonal[..., None]
        effects = factor.mT.float().contiguous()  # row j: of errors in the columns on column j
        weights = diagonal.pow(-2).float()[..., None, None, None]
        values = w.permute(2, 0, 1)[:, :, None].float().contiguous()
        barred = ~kept.permute(2, 0, 1)[:, :, None, None].contiguous()
        costs = values.new_full((count, self.STATES, rows), math.inf)  # of each path
        costs[:, 0] = 0
        window = min(self.WINDOW, columns)
        paths = costs.new_zeros(*costs.shape, window)  # their last errors
        ring = torch.zeros(window, dtype=torch.int64, device=w.device)  # the columns of these
        errors = costs.new_zeros(w.shape)
        # Where each row's path of state 0 stands among all paths.
        place = torch.arange(costs.numel(), device=w.device).view_as(costs)[:, :1]
        for j in range(columns):
            slot, last = j % window, max(j - window, 0)  # the columns before `last` are final
            pending = (paths.flatten(1, 2) @ effects[:, j, ring, None]).view_as(costs)
            target = values[j] - (errors[..., :last] @ effects[:, j, :last, None]).mT - pending
            size = target.abs()[:, :, None]
            error, cost = self._nearest_of_parity(size, barred[j], parity, half)
            cost = torch.addcmul(costs[:, :, None], cost, weights[:, j]).flatten(1, 2)
            costs, other = cost[:, first], cost[:, second]
            origin = torch.where(other < costs, second[:, None], first[:, None])
            costs = costs.minimum(other)
            before = (origin // 2 * rows + place).flatten()
            paths = paths.view(-1, window).index_select(0, before).view_as(paths)
            least, best = costs.min(1, keepdim=True)
            costs -= least  # only differences matter, and float32 holds small ones exactly enough
            if j >= window:
                final = paths[..., slot].gather(1, best)
                costs = costs.masked_fill(paths[..., slot] != final, math.inf)
                errors[..., last] = final[:, 0]
            latest = error.where(target[:, :, None] >= 0, -error).flatten(1, 2)
            paths[..., slot] = latest.gather(1, origin)
            ring[slot] = j
        best = costs.min(1, keepdim=True).indices[..., None].expand(-1, -1, -1, window)
        errors[..., ring] = paths.gather(1, best)[:, 0]
        # A code is its level rounded away from zero: only odd states have halves.
        halves = ((w - errors.double() @ factor) * 2).round()  # without the product's rounding
        return ((halves.abs() / 2).ceil() * halves.sign()).to(torch.int8)


@dataclasses.dataclass(frozen=True, eq=False)
class SensitivityQuantizer(Quantizer):
    """Quantization in which rounding costs the same for every value: `loss_per_value` nats a token.

    At a scale s the mean squared error is about s²/16 (measured; s²/12 without a trellis). It costs
    half of that times the curvature of the loss. A bit less makes it four times as large, so the
    loss is least where the cost is equal everywhere.
    """

    bits: int = 8
    clip_sigmas: float = math.inf
    sensitivities: Mapping[nn.Parameter, Tensor] = dataclasses.field(default_factory=dict)
    loss_per_value: float = 0.0

    STATES: ClassVar = TRELLIS_STATES
    # Both are measured in bench/results/quantize.md.
    DEAD_ZONE: ClassVar = 0.025
    # 0.5 would make every column cost the same, if its curvature were known exactly.
    COLUMN_POWER: ClassVar = 0.35

    def column_exponents(self, rows: int, curvature: Tensor) -> Tensor | None:
        """Return coarser scales for columns that matter less, if they save more than they take."""
        relative = curvature / curvature.log().mean().exp()
        bits = relative.mean().log2() / 2  # that equal costs save, per value
        if rows * bits < 8:  # an exponent has 8 bits
            return None
        return scale_exponents(relative**-self.COLUMN_POWER)

    def exponents(
        self, w: Tensor, column_scales: Tensor | float = 1.0, remaining: float = 1.0
    ) -> Tensor:
        """Return the exponents of the rows of a parameter w (rows, columns), (rows,) uint8."""
        curvature = remaining * self.sensitivities[w].double()
        scale = (32 * self.loss_per_value / curvature.clamp(min=1e-30)).sqrt()
        # Rows that matter alike take the next exponent one by one: the bytes change smoothly.
        scale = scale * torch.exp2((0.618 * torch.arange(len(w), device=w.device) % 1 - 0.5) / 8)
        largest = (w.double() / column_scales).abs().amax(-1)
        finest = 1.2 * largest / self.largest  # nothing is clipped, whatever GPTQ adds to it
        return scale_exponents(scale.maximum(finest) * (largest > 0))


def gptq_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return (U, curvature) of a Hessian (columns, columns), damped by 1% of its mean diagonal.

    U is upper triangular, with Uᵀ U the inverse of the damped Hessian. 1 / U_jj² is the curvature
    of column j once later columns make up for its error; `curvature` (columns,) is that over the
    mean of the diagonal.
    """
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    return factor, factor.diagonal().pow(-2) / damped.diagonal().mean()


CODED_ROLES = (Role.MATRIX, Role.FACTOR, Role.SPARSE, Role.EMBEDDING)


def make_quantizers(h: Hyperparameters) -> Quantizers:
    """Return how each of CODED_ROLES is quantized by the RMS of its rows."""
    matrix = Quantizer(h.matrix_bits, h.matrix_clip_sigmas, h.prune_pct)
    embedding = Quantizer(h.embed_bits, h.embed_clip_sigmas)
    return dict.fromkeys(CODED_ROLES, matrix) | {Role.EMBEDDING: embedding}


@contextlib.contextmanager
def weights_as_stored(groups: RoleGroups, quantizers: Quantizers) -> Iterator[None]:
    """Hold rounded values in tensors that become codes; the masters return after it (late QAT)."""
    by_shape: dict[tuple[Quantizer, torch.Size], list[Tensor]] = {}
    for role, quantizer in quantizers.items():
        for p in groups[role].values():
            by_shape.setdefault((quantizer, p.shape), []).append(p.detach())
    stored = [p for tensors in by_shape.values() for p in tensors]
    masters = [p.clone() for p in stored]
    for (quantizer, _), tensors in by_shape.items():  # a batch per shape, not one by one
        values = quantizer.nearest(torch.stack(tensors)).dequantize()
        torch._foreach_copy_(tensors, values.unbind())
    try:
        yield
    finally:
        torch._foreach_copy_(stored, masters)


def has_matrices(module: QuantizedModule) -> bool:
    """Return whether GPTQ has something to do in a module, or in matrices that it shares."""
    groups = tensors_by_role(module)
    has_own = groups[Role.MATRIX] or groups[Role.FACTOR] or groups[Role.EMBEDDING]
    return bool(has_own or getattr(module, "shared_matrices", ()))


@torch.no_grad()
def collect_hessians(
    model: LanguageModel, batches: Iterable[Tensor], dist: Distributed
) -> dict[nn.Module, Tensor]:
    """Return Σ x xᵀ (in, in) float32 over the inputs of every module with matrices.

    Modules of one input group share a Hessian, and adapters have that of their map. The batches of
    tokens (B, T) are this process's; the Hessians are summed over all processes.
    """
    hessians: dict[nn.Module, Tensor] = {}  # by input group
    precision = torch.get_float32_matmul_precision()

    def add(group: nn.Module, inputs: tuple) -> None:
        x = inputs[0].flatten(0, -2)
        # The lowest precision is exact for products of bfloat16 values. The sums must be float32:
        # a Hessian that is rounded to bfloat16 need not be positive definite.
        with matmul_precision("medium" if x.dtype is torch.bfloat16 else precision):
            x = x.float()
            hessians[group] = hessians.get(group, 0) + x.t() @ x

    # Maps inside a FusedLinear are hooked, too, but never called: their hooks add nothing.
    hooks = []
    for group in model.modules():
        if isinstance(group, (InputGroup, Linear)) and any(map(has_matrices, group.readers)):
            hooks.append(group.register_forward_pre_hook(add))
    for ids in batches:
        model.predict(ids)
    for hook in hooks:
        hook.remove()
    by_module: dict[nn.Module, Tensor] = {}
    for group, hessian in hessians.items():
        dist.all_reduce(hessian)
        for reader in group.readers:
            adapters = [each for each in reader.children() if isinstance(each, Adapter)]
            by_module |= dict.fromkeys([reader, *adapters], hessian)
            for shared in getattr(reader, "shared_matrices", ()):  # it has inputs in every layer
                mix = reader.shared_mix
                if mix is None:
                    mix = hessian.new_ones(1)
                # A layer that mixes a matrix in by c has c² of its error.
                own = mix.square()[:, None, None] * hessian  # (count, in, in)
                by_module[shared] = by_module.get(shared, 0) + own
    return by_module


def collect_sensitivities(
    model: LanguageModel, batches: Iterable[Tensor], text: Tensor, dist: Distributed
) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Module, Tensor]]:
    """Return the Fisher information of what is stored as codes.

    Its unit is nats per token and squared unit of a value. Labels are drawn from the model's own
    predictions: a batch's squared gradient is then an unbiased estimate of the sum over positions
    (arXiv:1412.1193). Each process uses its own batches of tokens (B, T).

    The first table has for each parameter the mean over each row's values, (rows,) float64. An
    embedding's sum is shared among its rows by how often `text` (B, T), the same on all processes,
    reads each: the batches are too few to tell rare rows apart. The second has for each
    embedding Σ g gᵀ (columns, columns) float64 over its rows g of gradients: GPTQ's Hessian, by
    lookups and by the tied head together.
    """
    groups = tensors_by_role(model)
    params = [p for role in CODED_ROLES for p in groups[role].values()]
    embeddings = {m.weight: m for m in model.modules() if isinstance(m, Embedding)}
    rows = {p: torch.zeros(len(p), dtype=torch.float64, device=p.device) for p in params}
    hessians = dict.fromkeys(embeddings.values(), 0)
    tokens = torch.zeros((), dtype=torch.float64, device=dist.device)
    generator = torch.Generator(dist.device).manual_seed(dist.rank)
    frozen = [m for m in model.modules() if isinstance(m, Linear) and m.is_frozen]
    for module in frozen:
        module.set_frozen(False)
    for ids in batches:
        for part in ids.split(max(1, len(ids) // 8)):  # one squared gradient per part
            logits = model.predict(part).flatten(0, 1)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            loss = F.cross_entropy(logits, labels[:, 0], reduction="sum")
            gradients = torch.autograd.grad(loss, params, materialize_grads=True)
            tokens += part.numel()
            for p, gradient in zip(params, gradients, strict=True):
                rows[p] += gradient.double().square().mean(1)
                if p in embeddings:
                    hessians[embeddings[p]] += gradient.T.double() @ gradient.double()
    for module in frozen:
        module.set_frozen(True)
    dist.all_reduce(tokens)
    rows = {p: dist.all_reduce(total) / tokens for p, total in rows.items()}
    rows |= {p: rows[p].sum() * module.frequencies(text) for p, module in embeddings.items()}
    return rows, {module: dist.all_reduce(total) / tokens for module, total in hessians.items()}


def calibration_batches(
    h: Hyperparameters, dist: Distributed, data: TrainingData, step: int
) -> Iterator[Tensor]:
    """Yield this process's calibration tokens (n, T), which training would have read next."""
    size = max(1, min(8192, h.train_batch_tokens) // h.train_seq_len)  # sequences of a batch
    first = step * (h.train_batch_tokens // h.train_seq_len)
    rounds = -(-h.gptq_calib_batches // dist.world_size)
    for i in range(dist.rank, rounds * dist.world_size, dist.world_size):
        yield data.sequences(first + i * size, size)[:, :-1].to(dist.device)


def for_gradients(batches: list[Tensor]) -> list[Tensor]:
    """Return the quarter of the batches that gradients take: one takes three times as long."""
    return batches[: len(batches[::4])]


class Calibration(NamedTuple):
    """What calibration text says of a model."""

    hessians: dict[nn.Module, Tensor]  # of each module's inputs, or of an embedding's rows
    sensitivities: dict[nn.Parameter, Tensor] | None  # None: QUANTIZER=rms

    def quantizers(self, h: Hyperparameters, loss_per_value: float) -> Quantizers:
        if self.sensitivities is None:
            return make_quantizers(h)
        quantizer = SensitivityQuantizer(
            sensitivities=self.sensitivities, loss_per_value=loss_per_value
        )
        pruning = dataclasses.replace(quantizer, prune_fraction=h.prune_pct)
        return dict.fromkeys(CODED_ROLES, pruning) | {Role.EMBEDDING: quantizer}


def calibrate(
    h: Hyperparameters,
    model: LanguageModel,
    dist: Distributed,
    batches: list[Tensor],
    text: Tensor,
) -> Calibration:
    """Calibrate by this process's batches (B, T), those of the others, and the tokens of `text`."""
    hessians = collect_hessians(model, batches, dist)
    if h.quantizer == "rms" or not batches:
        return Calibration(hessians, None)
    sensitivities, of_embeddings = collect_sensitivities(
        model, for_gradients(batches), text.to(dist.device), dist
    )
    if not all(each.isfinite().all() for each in sensitivities.values()):
        raise UserError("the loss's sensitivity to the weights is not finite")  # rows of zeros
    return Calibration(hessians | of_embeddings, sensitivities)


# ---- Artifact ----------------------------------------------------------------------------------

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"RANDMAPS", 8
BLOCK_BYTES = 2**22  # a group is compressed in blocks of this size, all at the same time
# How a model was scored; an evaluation of its artifact scores it in the same way unless asked.
SCORING = ("eval_seq_len", "eval_stride", "eval_mode", "eval_batch_tokens")
# How the values of a group of like tensors are stored, by the last word of the group's name.
GROUP_TYPES = {
    "codes": torch.int8,
    "exponents": torch.uint8,
    "columns": torch.uint8,  # their exponents
    "float16": torch.float16,
    "bits": torch.uint8,
}
VERSIONS = {
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "numpy": np.__version__,
    "machine": platform.machine(),
}


def stored_values(kind: str, tensor: QuantizedTensor | Tensor) -> dict[str, Tensor]:
    """Return group name -> values of one tensor; `kind` is the last word of its name."""
    if isinstance(tensor, QuantizedTensor):
        codes, exponents, column_exponents, states = tensor
        # Codes of like spread lie together, which brotli compresses 2% better.
        codes = codes[exponents.argsort(stable=True)]
        scales = {f"{kind} exponents": exponents}
        if column_exponents is not None:
            codes = codes[:, column_exponents.argsort(stable=True)]
            scales[f"{kind} columns"] = column_exponents
        words = "codes" if states == 1 else "trellis codes"
        return {f"{kind} {words}": codes} | scales
    if tensor.dtype is torch.bool:
        bits = np.packbits(tensor.cpu().numpy())
        return {f"{kind} bits": torch.from_numpy(bits)}
    return {"float16": tensor}


def write_artifact(header: dict[str, Any], tensors: StoredTensors) -> tuple[bytes, dict[str, int]]:
    """Return the artifact, and how many bytes each of its groups of like tensors takes.

    It is magic, format version and length of the header (little-endian uint32), the header (JSON,
    brotli) with the tensors [name, shape, groups] and the groups [name, bytes of each block], the
    blocks (byte planes, brotli), and SHA-256 over all before it. Floats are stored as float16,
    bools as bits.
    """
    entries = []
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].rpartition(".")[-1]):
        stored = stored_values(name.rpartition(".")[-1], tensor)
        shape = tensor.codes.shape if isinstance(tensor, QuantizedTensor) else tensor.shape
        entries.append([name, list(shape), list(stored)])
        for group, values in stored.items():
            dtype = GROUP_TYPES[group.split()[-1]]
            groups.setdefault(group, []).append(values.cpu().flatten().to(dtype))
    # With blocks of 1 MiB, not brotli's choice, like codes take like bytes: TARGET_BYTES needs it.
    # Quality 11 takes twice the time of 10, and 0.1 to 0.3% more bytes for codes.
    compress = functools.partial(brotli.compress, quality=10, lgwin=24, lgblock=20)
    packed: dict[str, Iterator[bytes]] = {}
    with ThreadPoolExecutor() as pool:
        for group, values in groups.items():
            # All first bytes, then all second bytes, and so on.
            planes = torch.cat(values)[:, None].view(torch.uint8).t().contiguous().numpy().tobytes()
            starts = range(0, len(planes), BLOCK_BYTES)
            packed[group] = pool.map(compress, [planes[i : i + BLOCK_BYTES] for i in starts])
    blocks = {group: list(results) for group, results in packed.items()}
    lengths = [[group, list(map(len, each))] for group, each in blocks.items()]
    header = header | {"versions": VERSIONS, "tensors": entries, "groups": lengths}
    text = brotli.compress(json.dumps(header).encode())
    numbers = np.array([ARTIFACT_VERSION, len(text)], "<u4").tobytes()
    body = b"".join([ARTIFACT_MAGIC, numbers, text, *itertools.chain(*blocks.values())])
    sizes = {"header": len(text) + 48}  # magic, two numbers and SHA-256 take 48
    sizes |= {group: sum(each) for group, each in lengths}
    return body + hashlib.sha256(body).digest(), sizes


def decompress(packed: bytes, limit: int) -> bytearray:
    """Undo brotli. ValueError once there are over `limit` bytes: no file may fill the memory."""
    raw = bytearray()
    decompressor = brotli.Decompressor()
    for i in range(0, len(packed), 64):  # so few bytes never become more than some 100 MB
        raw += decompressor.process(packed[i : i + 64])
        if len(raw) > limit:
            raise ValueError(f"{len(packed)} bytes hold more than the {limit} they should")
    return raw


def read_header(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Return an artifact's header and the bytes of its tensors. UserError if it is damaged."""
    if len(blob) < 48 or blob[:8] != ARTIFACT_MAGIC:
        found = f"{len(blob)} bytes that begin with {bytes(blob[:8])!r}"
        raise UserError(f"not an artifact of this project: {found}")
    if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
        raise UserError("the artifact is damaged, its checksum does not match; copy it again")
    version, size = np.frombuffer(blob[8:16], "<u4").tolist()
    if version != ARTIFACT_VERSION:
        raise UserError(f"the artifact has format {version}, this script reads {ARTIFACT_VERSION}")
    with untrusted_input("the artifact"):
        return json.loads(decompress(blob[16 : 16 + size], 2**22)), blob[16 + size : -32]


def read_artifact(blob: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header, and every tensor by name in float32. UserError if the file is damaged.

    Nothing in the file is executed, and no length is used before it is checked.
    """
    header, body = read_header(blob)
    with untrusted_input("the artifact"):
        return header, dict(read_tensors(header, body))


def read_groups(groups: list, body: bytes) -> dict[str, Tensor]:
    """Return the values of each group of like tensors, (n,) each."""
    found: dict[str, Tensor] = {}
    position = 0
    left = 2**28  # bytes that they may still take
    for group, blocks in groups:
        if group in found:
            raise ValueError(f"{group} stands twice")
        raw = bytearray()
        for packed in blocks:
            if packed < 0:
                raise ValueError(f"{group} has a block of {packed} bytes")
            raw += decompress(body[position : position + packed], left - len(raw))
            position += packed
        left -= len(raw)
        dtype = GROUP_TYPES[group.split()[-1]]
        planes = torch.from_numpy(np.frombuffer(raw, np.uint8)).view(dtype.itemsize, -1)
        found[group] = planes.t().flatten().view(dtype)
    if position != len(body):
        raise ValueError(f"its groups have {position} bytes, the file has {len(body)} for them")
    return found


def element_counts(shape: list[int], groups: list[str]) -> list[int]:
    """Return how many elements (bits: bytes) a tensor has in each group. ValueError: no shape."""
    if len(shape) > 2 or not all(type(n) is int and 0 <= n < 2**26 for n in shape):
        raise ValueError(f"{shape} is not a valid shape")
    count = math.prod(shape)
    if groups[0].endswith("bits"):
        count = -(-count // 8)
    if len(groups) == 1:
        return [count]
    rows, columns = shape  # only a matrix has exponents
    return [count, rows, columns][: len(groups)]


def read_tensors(header: dict[str, Any], body: bytes) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values of every tensor of an artifact, in float32."""
    stored = read_groups(header["groups"], body)
    left = 2**27  # values that may still be read: of one bit each, they fill the challenge's 16 MB
    trellis_columns = 2**18  # that may still be read: each takes a step of Python
    for name, shape, groups in header["tensors"]:
        parts = []
        for group, count in zip(groups, element_counts(shape, groups), strict=True):
            part, stored[group] = stored[group].split([count, len(stored[group]) - count])
            parts.append(part)
        values, *exponents = parts
        left -= max([math.prod(shape), *shape])
        if left < 0:
            raise ValueError("its tensors would need more than 512 MiB")
        if groups[0].endswith("bits"):
            values = torch.from_numpy(np.unpackbits(values.numpy(), count=math.prod(shape)))
        values = values.view(shape)
        if exponents:  # undo the order in which stored_values stores codes
            rows, *columns = [scale.argsort(stable=True).argsort() for scale in exponents]
            values = values[rows][:, columns[0]] if columns else values[rows]
            states = TRELLIS_STATES if "trellis" in groups[0].split() else 1
            trellis_columns -= shape[1] if states > 1 else 0
            if trellis_columns < 0:
                raise ValueError("its trellis codes have too many columns")
            values = QuantizedTensor(values, *exponents, states=states).dequantize()
        if not values.isfinite().all():
            raise ValueError(f"{name} is not finite")
        yield name, values.float()
    if any(map(len, stored.values())):
        raise ValueError("its groups have more values than its tensors")


def quantize_model(
    model: LanguageModel, quantizers: Quantizers, hessians: Mapping[nn.Module, Tensor]
) -> StoredTensors:
    """Return everything that is learned as it is stored."""
    tensors: StoredTensors = dict(model.state_dict())
    modules = [(p, m) for p, m in model.named_modules() if isinstance(m, QuantizedModule)]
    asking = {prefix: m.quantize(quantizers, hessians.get(m)) for prefix, m in modules}
    answers: dict[str, QuantizedTensor | None] = dict.fromkeys(asking)
    while answers:  # what all modules ask for now is computed together
        requests: dict[Quantizer, dict[str, tuple[Tensor, Tensor | None]]] = {}
        for prefix, answer in answers.items():
            try:
                quantizer, w, hessian = asking[prefix].send(answer)
            except StopIteration as end:
                tensors |= {f"{prefix}.{name}": value for name, value in end.value.items()}
            else:
                requests.setdefault(quantizer, {})[prefix] = w, hessian
        answers = {}
        for quantizer, matrices in requests.items():
            answers |= zip(matrices, quantizer.quantize([*matrices.values()]), strict=True)
    return tensors


@functools.cache
def code_bytes() -> int:
    """Return the most bytes that this script takes packed; `tools/submit.py` packs it smaller."""
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        may_have_one = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if may_have_one and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    compressed = brotli.compress(ast.unparse(tree).encode())
    # base85 makes 5 bytes of 4; a script that is packed already ships as it is.
    return min(len(SOURCE), len(compressed) * 5 // 4 + 500)


class Artifact(NamedTuple):
    """The bytes of an artifact, and what it is made of."""

    blob: bytes
    sizes: dict[str, int]  # bytes of each group of like tensors
    tensors: StoredTensors
    loss_per_value: float  # at which the scales were chosen


def solve_for_bytes(build: Callable[[float], Artifact], target: int, loss: float) -> Artifact:
    """Return the largest artifact found of up to `target` bytes, else the smallest one found.

    The search begins at a loss per value (nats per token). Bytes fall about linearly with its
    logarithm, so the next artifact lies on the line through the last two. The search ends within
    0.5% under the target, after eight artifacts, or where other scales give the same codes.
    """
    tried: list[Artifact] = []
    power, low, high = math.log2(loss), -math.inf, math.inf  # the answer lies between the bounds
    for _ in range(8):
        artifact = build(2**power)
        tried.append(artifact)
        size = len(artifact.blob)
        if 0.995 * target <= size <= target:
            break
        low, high = (power, high) if size > target else (low, power)
        stored = artifact.tensors.values()
        values = sum(each.codes.numel() for each in stored if isinstance(each, QuantizedTensor))
        saved = values / 16  # half a bit a value, by twice the loss
        if len(tried) > 1:
            before = tried[-2]
            if size == len(before.blob):
                break
            # Near a jump of the bytes, or near the finest scales, the line says nothing.
            octaves = power - math.log2(before.loss_per_value)
            saved = max((len(before.blob) - size) / octaves, values / 80)
        power += min(6.0, max(-6.0, (size - 0.9975 * target) / saved))
        if not low < power < high:
            power = (low + high) / 2
    tried.sort(key=lambda artifact: len(artifact.blob))
    fitting = [artifact for artifact in tried if len(artifact.blob) <= target]
    return fitting[-1] if fitting else tried[0]


def entropy_bytes(codes: Tensor) -> float:
    """Return the bytes that a coder of single codes needs; brotli is within 1% of them."""
    counts = codes.flatten().unique(return_counts=True)[1].double()
    return (counts * (counts.sum() / counts).log2()).sum().item() / 8


def code_rows(model: LanguageModel, artifact: Artifact) -> list[dict[str, Any]]:
    """Return values, bytes and bits a value of each role's codes, and the loss they may cost."""
    rows = []
    loss = artifact.loss_per_value
    for role, group in tensors_by_role(model).items():
        stored = [artifact.tensors.get(name) for name in group]
        codes = [tensor.codes.flatten() for tensor in stored if isinstance(tensor, QuantizedTensor)]
        if codes:
            values = sum(map(len, codes))
            size = entropy_bytes(torch.cat(codes))
            row = {"role": role.value, "values": values, "bytes": round(size)}
            row |= {"bits": 8 * size / values, "loss": None if math.isnan(loss) else values * loss}
            rows.append(row)
    return rows


def describe_size(h: Hyperparameters, size: int) -> str:
    """Return as text what code and a model of `size` bytes take, and how much of the limit."""
    code, limit = code_bytes(), h.artifact_limit_bytes
    total = f"{code + size:,} bytes, {(code + size) / limit:.1%} of {limit:,}"
    return f"code {code:,} + model {size:,} = {total}"


def largest_model(h: Hyperparameters) -> int:
    """Return the most bytes that a model may take beside the code."""
    limit = h.artifact_limit_bytes
    return min(h.target_bytes or limit, limit) - code_bytes()


def check_size(h: Hyperparameters, size: int) -> None:
    """Raise UserError if code and a model of `size` bytes are over TARGET_BYTES or the limit."""
    total = code_bytes() + size
    advice = "use a smaller rank or width"
    if h.target_bytes and total > h.target_bytes:
        target = f"TARGET_BYTES={h.target_bytes:,}"
        raise UserError(f"{describe_size(h, size)}, over {target} at any scales; {advice}")
    if total > h.artifact_limit_bytes:
        limit = f"the limit of {h.artifact_limit_bytes:,}"
        advice += ", or EXPORT_ONLY=1 CHECKPOINT_PATH=…/checkpoint.pt with TARGET_BYTES"
        raise UserError(f"{describe_size(h, size)}, over {limit}; {advice}")


def build_artifact(
    run: Run, model: LanguageModel, calibration: Calibration, loss_per_value: float
) -> Artifact:
    """Return the artifact of a calibrated model; scales by RMS ignore the loss per value."""
    if calibration.sensitivities is None:
        loss_per_value = math.nan
    scoring = {name: getattr(run.h, name) for name in SCORING}
    header = {"model": run.h.model_settings(), "evaluation": scoring}
    header |= {"fingerprint": model.fingerprint(), "tokenizer": run.tokenizer.sha256}
    quantizers = calibration.quantizers(run.h, loss_per_value)
    tensors = quantize_model(model, quantizers, calibration.hessians)
    return Artifact(*write_artifact(header, tensors), tensors, loss_per_value)


def export(
    run: Run, model: LanguageModel, data: TrainingData, step: int, start: float | None = None
) -> Artifact:
    """Return the artifact of the model; on processes other than rank 0 only its bytes.

    Calibration text comes after that of the steps that are done. The search for TARGET_BYTES begins
    at the loss per value `start`, or at LOSS_PER_VALUE.
    """
    h, dist = run.h, run.dist
    batches = list(calibration_batches(h, dist, data, step))
    calibration = calibrate(h, model, dist, batches, data.sample)
    number, some = (dist.world_size * len(part) for part in (batches, for_gradients(batches)))
    scales = "root mean squares" if calibration.sensitivities is None else "sensitivity"
    run.log(f"scales by {scales}; calibration batches: {number}, for gradients: {some}")
    if dist.rank:
        return Artifact(dist.broadcast_object(None), {}, {}, math.nan)
    build = functools.partial(build_artifact, run, model, calibration)
    loss = h.loss_per_value if start is None else start
    artifact = solve_for_bytes(build, largest_model(h), loss) if h.target_bytes else build(loss)
    dist.broadcast_object(artifact.blob)
    return artifact


def rebuild_model(
    h: Hyperparameters, stored: Mapping[str, Any], tensors: Mapping[str, Tensor], dist: Distributed
) -> LanguageModel:
    """Return the model of an artifact or a checkpoint, in evaluation mode.

    Its maps are generated anew and proved the same by their fingerprint. `stored` has `model` (its
    settings, which `h` includes), `fingerprint` and `versions`.
    """
    with untrusted_input("the stored model"):
        # Checked before any map is generated: a forged header could ask for a huge one.
        widths = [len(tensors[name]) for name in tensors if name.endswith(".mlp_scale")]
        expected = [h.model_dim] * (h.num_layers * h.ensemble)
        differing = sorted(dict(stored["model"].items() ^ h.model_settings().items()))
        if differing or widths != expected:
            problem = "its settings and tensors are not those of one model, or of another script"
            names = ", ".join(differing) or "none"
            raise ValueError(f"{problem} (use that script); settings that differ: {names}")
        model = make_model(h, resolve_dtype(h, dist.on_cuda))
        here, there = model.fingerprint(), stored["fingerprint"]
        if here != there:
            problem = f"the maps made here ({here[:16]}) are not the stored ones ({there[:16]})"
            versions = f"versions there: {stored['versions']}, here: {VERSIONS}"
            raise UserError(f"{problem}; {versions}; use the same")
        model.load_state_dict(tensors)
    return model.to(dist.device).eval()


def model_from_artifact(h: Hyperparameters, blob: bytes, dist: Distributed) -> LanguageModel:
    """Return the model of an artifact. `h` says how to compute with it, not what it is made of."""
    header, tensors = read_artifact(blob)
    with untrusted_input("the artifact's settings"):
        settings = load_settings({}, **(h.as_dict() | header["model"]))
    return rebuild_model(settings, header, tensors, dist)


# ---- Evaluation --------------------------------------------------------------------------------


def plan_windows(num_targets: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each window of `length` tokens starts, and how many tokens it scores.

    It scores its last positions: those that no earlier window scored.
    """
    starts = np.append(np.arange(0, num_targets - length, stride), num_targets - length)
    return starts, np.diff(starts + length, prepend=0)


class EvalBatch(NamedTuple):
    """Windows that are evaluated together."""

    starts: np.ndarray  # (n,) first token of each window
    counts: np.ndarray  # (n,) how many of its last positions it scores


def sliding_batches(num_targets: int, length: int, stride: int, per_batch: int) -> list[EvalBatch]:
    """Return batches of windows, each of which is computed for itself."""
    starts, counts = plan_windows(num_targets, length, stride)
    cuts = range(per_batch, len(starts), per_batch)
    pairs = zip(np.split(starts, cuts), np.split(counts, cuts), strict=True)
    return [EvalBatch(*pair) for pair in pairs]


def streaming_batches(num_targets: int, length: int, warm: int, per_batch: int) -> list[EvalBatch]:
    """Return batches of consecutive rows of a stream, each at least `warm` + 1 rows.

    Rows at the start of a batch lack the rows above them. Batches therefore overlap: all but the
    first score nothing in their first `warm` rows, and each row is scored once, as a whole.
    """
    rows = -(-num_targets // length)
    per_batch = min(max(per_batch, warm + 1), rows)
    row = np.arange(per_batch)
    # A batch is a window over rows.
    firsts, new_rows = plan_windows(rows, per_batch, max(per_batch - warm, 1))
    batches = []
    for first, new in zip(firsts, new_rows, strict=True):
        is_new = row >= per_batch - new
        batches.append(EvalBatch(length * (first + row), length * is_new))
    return batches


def gather_windows(
    tokens: Tensor, starts: Tensor, counts: Tensor, offsets: Tensor, tail: int, num_targets: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs (n, T), targets and is_scored (n, tail) of windows with `counts` new tokens."""
    positions = starts[:, None] + offsets  # (n, T + 1)
    rows = tokens[positions]
    is_new = offsets[:tail] >= tail - counts[:, None]  # no earlier window scored it
    exists = positions[:, -tail:] <= num_targets  # the stream is padded at its end
    return rows[:, :-1], rows[:, -tail:], is_new & exists


# Batches per process from which a compiled graph pays. On a CPU 24 were measured; on a GPU a graph
# takes about as long as 200 batches (bench/speed.py times both).
COMPILED_BATCHES = {"cpu": 24, "cuda": 200}


def is_streaming(h: Hyperparameters, stride: int, num_targets: int) -> bool:
    """Return whether an evaluation streams: its windows overlap, and there are several."""
    length = min(h.eval_seq_len, num_targets)
    return h.eval_mode == "streaming" and stride < length < num_targets


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tensor,
    h: Hyperparameters,
    dist: Distributed,
    stride: int,
    trial: bool = False,
) -> float:
    """Return the mean loss in nats over all tokens (n,) after the first, each scored once.

    A window scores `stride` new tokens. The processes take batches in turn. With `trial` one batch
    of each compiled shape is computed, to compile it and to see whether losses are finite.
    """
    model.eval()
    num_targets = len(tokens) - 1
    length = min(h.eval_seq_len, num_targets)
    per_batch = max(1, h.eval_batch_tokens // length)
    streaming = is_streaming(h, stride, num_targets)
    if streaming:
        warm = len(h.block_order) + 1  # a row for each block, and one for bigrams and smear
        batches, usual_tail = streaming_batches(num_targets, length, warm, per_batch), length
    else:
        batches, usual_tail = sliding_batches(num_targets, length, stride, per_batch), stride
    # Batches of this shape alone are compiled; the first and the last one may have another.
    usual_shape = (len(batches[0].starts), usual_tail)
    pays = dist.compile and len(batches) > COMPILED_BATCHES[dist.device.type] * dist.world_size
    compiled = torch.compile(model.token_losses, dynamic=False, disable=not pays)
    mine = range(dist.rank, len(batches), dist.world_size)
    if trial:  # the first batch scores all of its first window
        mine = [*mine[:2], *mine[2:][-1:]] if pays else mine[:1]
    # Tokens and plan are on the device: a copy per batch would stop it each time.
    tokens = F.pad(tokens, (0, length)).to(dist.device)
    offsets = torch.arange(length + 1, device=dist.device)
    plan = torch.from_numpy(np.concatenate(batches, 1)).to(dist.device)
    parts = plan.split([len(batch.starts) for batch in batches], 1)
    total = torch.zeros((), dtype=torch.float64, device=dist.device)
    for i in mine:
        starts, counts = parts[i]
        tail = int(batches[i].counts.max())
        inputs, targets, is_scored = gather_windows(
            tokens, starts, counts, offsets, tail, num_targets
        )
        score = compiled if (len(inputs), tail) == usual_shape else model.token_losses
        losses = score(inputs, targets, streaming)  # (n, tail)
        total += losses.double().masked_fill(~is_scored, 0.0).sum()
    return dist.all_reduce(total).item() / num_targets


# ---- Checkpoints -------------------------------------------------------------------------------


@dataclasses.dataclass
class Checkpoint:
    """What a run continues from; after training, what the export needs."""

    settings: dict[str, Any]
    model: dict[str, Any]  # the settings that the model depends on
    fingerprint: str  # of its random maps
    weights: dict[str, Tensor]
    training: dict[str, Any]  # state of the trainer; once training is finished, the candidates
    metrics: dict[str, Any]  # of the finished training
    finished: bool
    identity: dict[str, str]  # of data, tokenizer, source, and of the teacher if there is one
    versions: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a checkpoint, on the CPU. UserError if it is damaged; nothing in it is executed."""
        with untrusted_input(f"the checkpoint {path}"), zipfile.ZipFile(path) as archive:
            # torch stores every entry as it is, with a checksum.
            if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                raise ValueError("it is damaged")
            saved = torch.load(path, map_location="cpu", weights_only=True)
            return cls(**{f.name: saved[f.name] for f in dataclasses.fields(cls)})

    @classmethod
    def read_newest(cls, folder: Path, log: Callable[[str], Any] = print) -> Checkpoint | None:
        """Read a folder's checkpoint, or the one before it where that is damaged; None: no file."""
        newest, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
        if not newest.exists():
            return cls.read(previous) if previous.exists() else None
        try:
            return cls.read(newest)
        except UserError as error:
            if not previous.exists():
                raise
            saved = cls.read(previous)
            # Else the next save would keep the damaged file as the previous one.
            damaged = newest.replace(folder / "checkpoint.damaged.pt")
            log(f"warning: {error}; it is {damaged.name} now, and the one before it is taken")
            return saved


def save_checkpoint(
    run: Run, model: LanguageModel, fingerprint: str, training: dict[str, Any], metrics: dict | None
) -> None:
    """Let rank 0 write checkpoint.pt and keep the one before; `metrics` mean training ended."""
    if run.dist.rank:
        return
    saved = Checkpoint(
        settings=run.h.as_dict(),
        model=run.h.model_settings(),
        fingerprint=fingerprint,
        weights=model.state_dict(),
        training=training,
        metrics=metrics or {},
        finished=metrics is not None,
        identity=run.identity,
        versions=VERSIONS,
    )
    buffer = io.BytesIO()
    torch.save(vars(saved), buffer)
    previous = run.folder / "checkpoint.previous.pt"
    write_file(run.folder / "checkpoint.pt", buffer.getbuffer(), previous)


def check_identity(h: Hyperparameters, saved: Checkpoint, identity: Mapping[str, str]) -> None:
    """Raise UserError if a checkpoint's run had another tokenizer or other shards."""
    for name, setting in (("tokenizer", "tokenizer_path"), ("shards", "data_path")):
        if saved.identity[name] != identity[name]:
            variable = f"{setting.upper()}={getattr(h, setting)}"
            advice = f"set {setting.upper()} to that, it was {saved.settings[setting]}"
            raise UserError(f"{variable}: the {name} there are not the run's; {advice}")


# Settings that may change when a run continues: locations, logging, memory and size limits.
RESUME_OVERRIDES = {
    *("run_id", "resume", "output_dir", "data_path", "tokenizer_path", "distill_from"),
    *("device", "compile", "checkpoint_seconds", "timeout_seconds", "train_log_every"),
    *("allow_unknown", "micro_batch_tokens", "eval_batch_tokens"),
    *("model_limit_bytes", "artifact_limit_bytes"),
}
# What EXPORT_ONLY may set anew: the quantizer, the artifact and the evaluation, the last settings.
EXPORT_OVERRIDES = {"export_only", "checkpoint_path", "dtype"}
EXPORT_OVERRIDES |= {*list(SETTINGS)[list(SETTINGS).index("quantizer") :]}


# ---- Training ----------------------------------------------------------------------------------


class Clock:
    """The training time, and the steps that remain by number and by clock.

    The median step time predicts the remaining steps, so that one slow step does not shift the
    schedules. Time runs on while a checkpoint is written; validation pauses it.
    """

    def __init__(self, iterations: int, seconds: float) -> None:
        self.iterations = iterations
        self.set_limit(seconds)
        self.elapsed = 0.0
        self.recent: list[float] = []  # seconds of the last steps
        self.start()

    def set_limit(self, seconds: float) -> None:
        """Set the training time; 0 or less: no limit."""
        self.seconds = seconds if seconds > 0 else math.inf

    def start(self) -> None:
        self.mark = time.perf_counter()  # time before this moment is counted

    def lap(self) -> float:
        """Count the time since the last mark, and return it."""
        seconds = time.perf_counter() - self.mark
        self.mark += seconds
        self.elapsed += seconds
        return seconds

    def add_step(self, seconds: float) -> None:
        self.recent = [*self.recent[-99:], seconds]

    def remaining(self, step: int) -> int:
        """Return the steps that are left when `step` of them are done."""
        left = max(0.0, self.seconds - self.elapsed)
        by_clock = math.inf if left else 0.0
        if len(self.recent) >= 5:
            by_clock = left / statistics.median(self.recent)
        return int(min(self.iterations - step, by_clock))

    def progress(self, step: int) -> float:
        """Return the fraction of training that is over, by steps or by clock: the larger one."""
        return min(1.0, max(step / max(self.iterations, 1), self.elapsed / self.seconds))

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Few, since the run may continue on a faster or slower device.
        self.elapsed, self.recent = state["elapsed"], state["recent"][-5:]


def learning_rate_scale(h: Hyperparameters, step: int, remaining: int, progress: float) -> float:
    """Return 1, then a linear fall towards 0 that stops at MIN_LR, by steps or by progress."""
    if h.warmdown_frac:
        scale = (1 - progress) / h.warmdown_frac
    else:
        warmdown = min(h.warmdown_iters, step + remaining)  # all steps where there are fewer
        scale = remaining / max(1, warmdown)
    return min(1.0, max(scale, h.min_lr))


def accumulate_gradients(
    forward: Callable[..., Tensor],
    batches: list[tuple[Tensor, Tensor]],
    teacher_logits: Callable[[Tensor], Tensor | None],
) -> Tensor:
    """Add up the gradients of micro-batches; return the mean loss, a scalar on the device."""
    losses = []
    for ids, targets in batches:
        loss = forward(ids, targets, teacher_logits(ids)) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    return sum(losses)


class Phases:
    """What changes at `boundaries`, fractions of training: frozen maps, recurrence, the teacher."""

    def __init__(
        self,
        h: Hyperparameters,
        model: LanguageModel,
        teacher: LanguageModel | None,
        compiled: bool,
    ) -> None:
        self.h, self.model, self.teacher = h, model, teacher
        self.has_teacher = False  # in the present phase
        boundaries = {0.0} | {spec.freeze for spec in model.table.values()}
        if h.recur_layers:
            boundaries.add(h.recur_frac)
        if h.self_distill:
            self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        if self.teacher:
            boundaries |= {h.distill_start_frac, h.distill_end_frac}
            predict = self.teacher.predict
            self.teacher_predict = torch.compile(predict, dynamic=False, disable=not compiled)
        self.boundaries = sorted(boundaries - {1.0})
        self.current = 0.0  # the boundary at which the present phase began

    def boundary(self, progress: float) -> float:
        """Return the boundary at which the phase of this progress began."""
        return self.boundaries[bisect.bisect(self.boundaries, progress) - 1]

    def enter(self, progress: float) -> str:
        """Set the model up for the phase of this progress; return what it is, for the log."""
        h, boundary = self.h, self.boundary(progress)
        frozen = 0
        for name, module in self.model.linear_maps().items():
            is_frozen = 0 < self.model.table[name].freeze <= boundary
            module.set_frozen(is_frozen)
            frozen += is_frozen
        recurs = bool(h.recur_layers) and h.recur_frac <= boundary
        self.model.set_recurrence(recurs)
        if h.self_distill:
            self.teacher.set_recurrence(recurs)
        is_time = h.distill_start_frac <= boundary < h.distill_end_frac
        has_teacher = self.teacher is not None and is_time
        if has_teacher and not self.has_teacher and h.self_distill:
            # In place: new tensors would need a new compiled graph.
            self.teacher.load_state_dict(self.model.state_dict())
        self.has_teacher = has_teacher
        self.current = boundary
        return f"frozen_maps:{frozen} recurrence:{recurs} teacher:{has_teacher}"

    @torch.no_grad()
    def teacher_logits(self, ids: Tensor) -> Tensor | None:
        """Return the teacher's logits (B, T, vocabulary), or None in a phase without a teacher."""
        return self.teacher_predict(ids) if self.has_teacher else None


class FiniteCheck:
    """Looks for losses and gradients that are not finite, one step late: no step waits for it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.values = torch.zeros(0)
        self.arrival: torch.cuda.Event | None = None

    def record(self, loss: Tensor, norms: Mapping[str, Tensor]) -> None:
        self.names = ["loss", *norms]
        self.values = torch.stack([loss, *norms.values()]).to("cpu", non_blocking=True)
        self.arrival = torch.cuda.current_stream().record_event() if loss.is_cuda else None

    def wait(self) -> Tensor:
        """Wait for the recorded step; return its values: the loss, then the norms."""
        if self.arrival:
            self.arrival.synchronize()
        return self.values

    def failures(self) -> list[str]:
        """Return the names of what was not finite in the recorded step."""
        return [self.names[i] for i in (~self.wait().isfinite()).nonzero().flatten()]


# Candidate -> parameter name -> values; the best candidate before quantization is first.
Candidates = dict[str, dict[str, Tensor]]


class StepPlan(NamedTuple):
    """What happens around the next step; the same on every process."""

    remaining: int  # steps, this one included
    progress: float
    save: bool
    stop: bool  # a signal asked for it
    validate: bool


class Trainer:
    """The training loop. Its state can be saved and restored before any step."""

    def __init__(
        self, run: Run, model: LanguageModel, data: TrainingData, teacher: LanguageModel | None
    ) -> None:
        h, dist = run.h, run.dist
        self.run, self.h, self.dist, self.model, self.data = run, h, dist, model, data
        self.groups = tensors_by_role(model)
        self.quantizers = make_quantizers(h)  # of late QAT, by RMS
        self.phases = Phases(h, model, teacher, dist.compile)
        graphs = 2 * len(self.phases.boundaries)  # two per phase
        torch._dynamo.config.recompile_limit = 8 + graphs
        self.forward = torch.compile(model, dynamic=False, fullgraph=True, disable=not dist.compile)
        self.optimizers = Optimizers(self.groups, h, dist)
        self.averages = WeightAverages(self.optimizers.params, h)
        self.clock = Clock(h.iterations, h.max_wallclock_seconds - h.gptq_reserve_seconds)
        # What a checkpoint holds beside the weights.
        self.parts = {"muon": self.optimizers.muon, "adam": self.optimizers.adam}
        self.parts |= {"clock": self.clock, "averages": self.averages}
        if h.self_distill:
            self.parts["teacher"] = self.phases.teacher
        self.finite = FiniteCheck()
        self.fingerprint = model.fingerprint()  # once: it reads all maps
        self.step = 0  # steps that are done
        self.late_qat = False
        self.lr_scale = 1.0  # of the last step
        self.last_save = "none"  # what to go back to, in words
        self.saved_at = 0.0  # on the clock
        self.save_seconds = 0.0  # that the last one took

    def warm_up(self) -> None:
        """Run, and so compile, every phase before the clock starts; then restore the weights."""
        optimizers = Optimizers(self.groups, self.h, self.dist)
        initial = [p.detach().clone() for p in optimizers.params]
        self.model.train()
        boundaries = self.phases.boundaries
        rounds = -(-self.h.warmup_steps // len(boundaries))
        for step, boundary in itertools.product(range(rounds), boundaries):
            self.phases.enter(boundary)
            batches = self.data.micro_batches(step, self.dist)
            accumulate_gradients(self.forward, batches, self.phases.teacher_logits)
            optimizers.step(step, 1.0)
        # In place, since new tensors would mean a new graph.
        torch._foreach_copy_([p.detach() for p in optimizers.params], initial)
        self.phases.enter(0.0)

    # -- The loop

    def train(self) -> None:
        """Train to the end. UserError if a signal stops it; its state is saved then."""
        self.run.stop.can_save = True
        self.clock.start()
        while True:
            plan = self.plan_step()
            is_over = plan.remaining <= 0
            if plan.save or plan.stop or is_over:  # what follows must not cost a trained step
                self.save()
            if plan.stop:
                continues = f"the same RUN_ID continues from {self.last_save}"
                raise UserError(f"stopped by a signal; {continues}")
            if self.phases.boundary(plan.progress) > self.phases.current:
                what = self.phases.enter(plan.progress)
                self.log_phase(f"phase step:{self.step} progress:{plan.progress:.4f} {what}", what)
            if is_over:
                break
            if plan.validate:
                self.check_finite()  # waits for queued steps, whose time counts as training
                self.clock.lap()
                self.validate()
                self.clock.start()
            loss = self.train_step(plan)
            self.clock.add_step(self.clock.lap())
            self.log_loss(loss)
            expected = self.step + self.clock.remaining(self.step)
            if len(self.clock.recent) == 5 and expected < self.h.iterations:
                self.run.log(f"about {expected} of {self.h.iterations} steps fit into the time")
        self.clock.lap()

    def plan_step(self) -> StepPlan:
        """Decide what happens next, by rank 0's clock."""
        h, clock = self.h, self.clock
        # Checkpoints take 1% of training at most.
        interval = max(h.checkpoint_seconds or math.inf, 100 * self.save_seconds)
        is_due = clock.elapsed - self.saved_at >= interval
        mine = clock.remaining(self.step), clock.progress(self.step), is_due
        stop_here = self.run.stop.requested
        (remaining, progress, save), stop = self.dist.sync_from_rank0(*mine, flag=stop_here)
        validate = h.val_loss_every > 0 and self.step > 0 and self.step % h.val_loss_every == 0
        progress = progress if remaining > 0 else 1.0
        return StepPlan(int(remaining), progress, bool(save), stop, validate)

    def train_step(self, plan: StepPlan) -> Tensor:
        """Take one step; return its loss on this process, still on the device."""
        h, dist = self.h, self.dist
        lr_scale = learning_rate_scale(h, self.step, plan.remaining, plan.progress)
        self.lr_scale = lr_scale
        if lr_scale < h.late_qat_threshold and not self.late_qat:
            self.late_qat = True
            self.log_phase(f"late_qat:on step:{self.step} scale:{lr_scale:.4f}", "late QAT")
        # Dropout depends on step and process alone, wherever a run was continued.
        torch.manual_seed(h.seed + self.step * dist.world_size + dist.rank)
        self.model.train()
        self.model.set_temperature(1 - 0.5 * plan.progress)
        as_stored = contextlib.nullcontext()
        if self.late_qat:
            as_stored = weights_as_stored(self.groups, self.quantizers)
        with as_stored:
            batches = self.data.micro_batches(self.step, dist)
            loss = accumulate_gradients(self.forward, batches, self.phases.teacher_logits)
        norms = self.optimizers.step(self.step, lr_scale)  # on the float32 masters
        self.averages.update(self.step, lr_scale)
        self.check_finite()  # of the step before, while this one is under way
        self.finite.record(loss, norms)
        self.step += 1
        return loss

    def check_finite(self) -> None:
        """Raise UserError if the last recorded step had a loss or gradient that is not finite."""
        bad = self.finite.failures()
        if bad:
            what = f"step {self.step}: {', '.join(bad[:3])} not finite ({len(bad)} in all)"
            advice = "Lower the learning rates, or export that checkpoint"
            raise UserError(f"{what}; the last good checkpoint is {self.last_save}. {advice}")

    def log_loss(self, loss: Tensor) -> None:
        """Log the mean loss over the processes, for the first steps and then now and then."""
        every = self.h.train_log_every
        if not every or (self.step > 10 and self.step % every):
            return
        mean = self.dist.all_reduce(loss.clone()).item() / self.dist.world_size
        norm = self.finite.wait()[1:].norm().item()  # of all gradients, before the clip
        text = f"train_loss:{mean:.4f}"
        self.log(text, train_loss=mean, lr_scale=self.lr_scale, grad_norm=norm)

    def log_phase(self, line: str, what: str) -> None:
        """Log a line about the beginning of a phase; metrics.jsonl gets `what`."""
        self.run.log(line)
        self.run.log.metrics(kind="phase", step=self.step, text=what)

    def log(self, text: str, **metrics: Any) -> None:
        """Log a line with the step and the training time; metrics.jsonl gets the metrics, too."""
        ms = 1000 * self.clock.elapsed
        times = f"train_time:{ms:.0f}ms step_avg:{ms / max(self.step, 1):.2f}ms"
        self.run.log(f"step:{self.step}/{self.h.iterations} {text} {times}")
        self.run.log.metrics(step=self.step, **self.speed(), **metrics)

    def speed(self) -> dict[str, float]:
        """Return the tokens and seconds of training, and their quotient."""
        tokens, seconds = self.step * self.h.train_batch_tokens, self.clock.elapsed
        rate = round(tokens / max(seconds, 1e-9))
        return {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": rate}

    # -- Validation, and the choice of what is exported

    def loss_on(self, tokens: Tensor) -> float:
        """Return the mean loss over a stream in windows that do not overlap."""
        return evaluate(self.model, tokens, self.h, self.dist, self.h.eval_seq_len)

    def validate(self) -> dict[str, float]:
        val = self.run.val
        loss = self.loss_on(val.tokens)
        bpb = val.bits_per_byte(loss)
        ratios = adapter_ratios(self.model)
        text = f"val_loss:{loss:.4f} val_bpb:{bpb:.4f}"
        self.log(text, val_loss=loss, val_bpb=bpb, adapter_ratios=ratios)
        return {"val_loss_before": loss, "val_bpb_before": bpb}

    def rank_candidates(self) -> tuple[Candidates, dict[str, float]]:
        """Score the candidates on held-out text; return finite ones, best first, and losses."""
        params = [p.detach() for p in self.optimizers.params]
        candidates = self.averages.candidates()
        tokens = self.data.held_out_stream()
        losses = {}
        for name, weights in candidates.items():
            torch._foreach_copy_(params, weights)
            losses[name] = self.loss_on(tokens)
        finite = [name for name, loss in losses.items() if math.isfinite(loss)]
        if not finite:
            raise UserError(f"the losses are not finite: {losses}; lower the learning rates")
        ranked = sorted(finite, key=losses.get)
        torch._foreach_copy_(params, candidates[ranked[0]])
        text = " ".join(f"{name}:{loss:.4f}" for name, loss in losses.items())
        end = "ITERATIONS" if self.step >= self.h.iterations else "MAX_WALLCLOCK_SECONDS"
        end = "EXPORT_ONLY" if self.h.export_only else end
        self.run.log(f"average {text} best:{ranked[0]} ended_by:{end} lr_scale:{self.lr_scale:.3f}")
        names = self.optimizers.names.values()
        by_name = {name: dict(zip(names, candidates[name], strict=True)) for name in ranked}
        return by_name, losses

    def finish(self) -> tuple[dict[str, Any], Candidates]:
        """Rank the candidates and validate the best; return the metrics and the candidates."""
        began = time.perf_counter()
        candidates, losses = self.rank_candidates()
        choice_seconds = round(time.perf_counter() - began, 3)
        speed = self.speed()
        spent = {"tokens_per_second": speed["tokens_per_second"], "choice_seconds": choice_seconds}
        metrics = {"steps": self.step, "train_seconds": speed["seconds"]} | spent | self.validate()
        metrics |= {f"holdout_loss_{name}": loss for name, loss in losses.items()}
        return metrics, candidates

    # -- Saving and restoring

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the weights."""
        own = {"step": self.step, "boundary": self.phases.current}
        own |= {"late_qat": self.late_qat, "lr_scale": self.lr_scale}
        return own | {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.late_qat = state["step"], state["late_qat"]
        self.lr_scale = state["lr_scale"]
        self.phases.enter(state["boundary"])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.last_save = f"that of step {self.step}"
        self.saved_at = self.clock.elapsed

    def save(self) -> None:
        """Write a checkpoint. UserError if the last step was not finite."""
        began = time.perf_counter()
        self.check_finite()
        save_checkpoint(self.run, self.model, self.fingerprint, self.state_dict(), None)
        self.last_save = f"{self.run.folder}/checkpoint.pt of step {self.step}"
        self.saved_at = self.clock.elapsed
        # All processes wait here until rank 0 has written.
        self.save_seconds = self.dist.broadcast_object(time.perf_counter() - began)


# ---- Main --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What all stages of a run share."""

    h: Hyperparameters
    dist: Distributed
    log: RunLog
    stop: StopSignal
    tokenizer: Tokenizer
    val: ValidationStream
    folder: Path | None = None  # where the run writes; None: it only evaluates
    identity: dict[str, str] = dataclasses.field(default_factory=dict)  # see identify


def check_folder(h: Hyperparameters, folder: Path) -> None:
    """Raise UserError unless the folder is new, or an unfinished run that may continue."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if h.resume == "1" and not names & {"checkpoint.pt", "checkpoint.previous.pt"}:
        raise UserError(f"RESUME=1: {folder} has no checkpoint; drop RESUME=1 to begin anew")
    if "results.json" in names:
        raise UserError(f"{folder} is a finished run; choose a new RUN_ID")
    if names and "train.log" not in names:
        raise UserError(f"{folder} is not a run's folder; choose a new RUN_ID")
    if names and h.resume == "0":
        raise UserError(f"{folder} is an unfinished run; choose a new RUN_ID, or drop RESUME=0")


def open_folder(h: Hyperparameters, log: RunLog) -> tuple[Path, Checkpoint | None]:
    """Return the run's folder, its log open, and the checkpoint to continue from, if it has one."""
    folder = Path(h.output_dir) / (h.run_id or time.strftime("%Y%m%d-%H%M%S"))
    check_folder(h, folder)
    folder.mkdir(parents=True, exist_ok=True)
    log.open(folder)
    saved = Checkpoint.read_newest(folder, log)
    if saved is None:
        log.begin_anew()
    return folder, saved


def preflight(run: Run, model: LanguageModel, data: TrainingData) -> float:
    """Try everything that comes after training, with a copy of the model as it is now.

    Return about how many seconds lie between the end of training and the artifact. UserError names
    the stage that fails, before any step of this start.
    """
    h, dist = run.h, run.dist
    began = time.perf_counter()
    trial = copy.deepcopy(model).eval()
    for p in trial.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.02)  # codes of zeros would compress to nothing
    stage = "export"
    try:
        batches, text = list(calibration_batches(h, dist, data, 0)), data.sample
        some = [batch[: max(1, 2048 // h.train_seq_len)] for batch in batches[:1]]
        start = time.perf_counter()
        calibration = calibrate(h, trial, dist, some, text)
        seconds = time.perf_counter() - start
        calibration_seconds = seconds * sum(map(len, batches)) / max(sum(map(len, some)), 1)
        has_gradients = calibration.sensitivities is not None
        if has_gradients:  # three quarters of this time; the export takes them of a part
            calibration_seconds *= (1 + 3 * len(for_gradients(batches)) / len(batches)) / 4
        # Sensitivities before training say nothing about those after it.
        calibration = calibration._replace(sensitivities=None)
        start = time.perf_counter()
        blob = dist.from_rank0(lambda: build_artifact(run, trial, calibration, math.nan).blob)
        build_seconds = time.perf_counter() - start
        if has_gradients:
            build_seconds *= 2  # this artifact had no trellis, which takes longer
        run.log(f"projected artifact {describe_size(h, len(blob))}")
        stage = "evaluation from the artifact"
        rebuilt = model_from_artifact(h, blob, dist)
        for stride in (h.eval_seq_len, h.eval_stride):
            loss = evaluate(rebuilt, run.val.tokens, h, dist, stride, trial=True)
            if not math.isfinite(loss):
                raise UserError("the model's loss is not finite; lower the initial gains")
        stage = "choice of the candidate"
        tokens = data.held_out_stream()
        part = tokens if dist.compile else tokens[: max(h.eval_seq_len, h.eval_batch_tokens) + 1]
        start = time.perf_counter()
        evaluate(rebuilt, part, h, dist, h.eval_seq_len)
        seconds = (time.perf_counter() - start) * len(tokens) / len(part)
        choice_seconds = 4 * seconds  # there are up to three candidates, and the artifact of one
        stage = "disk"
        # Per value: weight 4, optimizer up to 8, EMA 4, SWA 4 bytes, and 4 of a teacher.
        value_bytes = 20 + 4 * h.self_distill
        need = 3 * value_bytes * sum(p.numel() for p in model.parameters())  # three checkpoints
        if dist.rank == 0 and shutil.disk_usage(run.folder).free < need:
            raise UserError(f"{run.folder} needs {need:,} bytes free; make room, or set OUTPUT_DIR")
    except (UserError, RuntimeError, OSError) as error:
        raise UserError(f"preflight, {stage}: {error} (before training)") from error
    seconds = time.perf_counter() - began
    run.log(f"preflight: export, reading back and evaluation work, {seconds:.1f} s")
    builds = 3 if h.target_bytes else 1  # solve_for_bytes makes two to five, at most eight
    return calibration_seconds + builds * build_seconds + choice_seconds


def reserve_for_export(run: Run, estimate: float) -> float:
    """Return the seconds kept for the export: GPTQ_RESERVE_SECONDS, or up to half of the time."""
    h = run.h
    estimate = run.dist.broadcast_object(estimate)
    most = h.max_wallclock_seconds / 2 or math.inf
    reserve = max(h.gptq_reserve_seconds, min(1.25 * estimate, most))
    kept = f", {reserve:.1f} s are kept for it" if h.max_wallclock_seconds else ""
    run.log(f"export: about {estimate:.1f} s{kept}")
    return reserve


def load_teacher(run: Run, saved: Checkpoint | None = None) -> LanguageModel | None:
    """Return the model of DISTILL_FROM, if it is set. UserError if the run began with another."""
    path = run.h.distill_from
    if not path:
        if saved and saved.identity.get("teacher"):
            began_with = saved.settings["distill_from"]
            raise UserError(f"DISTILL_FROM is empty, but the run began with {began_with}; unset it")
        return None
    blob = run.dist.from_rank0(lambda: read_file("DISTILL_FROM", path))
    header, _ = read_header(blob)
    if header.get("tokenizer") != run.tokenizer.sha256:
        raise UserError(f"DISTILL_FROM={path}: the teacher has another tokenizer")
    sha256 = hashlib.sha256(blob).hexdigest()
    if saved and saved.identity.get("teacher") != sha256:
        raise UserError(f"DISTILL_FROM={path}: the run began with another teacher")
    run.identity["teacher"] = sha256
    return model_from_artifact(run.h, blob, run.dist).requires_grad_(False)


def prepare_model(run: Run, saved: Checkpoint | None) -> LanguageModel:
    """Return a new model, the same on every process, or the one of a checkpoint."""
    h, dist = run.h, run.dist
    torch.manual_seed(h.seed)
    if saved:
        model = rebuild_model(h, vars(saved), saved.weights, dist)
    else:
        model = make_model(h, resolve_dtype(h, dist.on_cuda))
        # Rank 0's initial weights, since QR may differ in the last bit on another machine.
        model.load_state_dict(dist.broadcast_object(model.state_dict()))
        model.to(dist.device)
    fingerprint = model.fingerprint()
    if dist.broadcast_object(fingerprint) != fingerprint:
        problem = "the processes generate different random maps"
        raise UserError(f"{problem}; use the same versions on all machines")
    return model


def log_start(run: Run, model: LanguageModel) -> dict[str, Any]:
    """Log everything needed to repeat the run; return the numbers of parameters, and the maps."""
    log = run.log
    log(SOURCE.decode(), console=False)
    settings = run.h.as_dict().items()
    log("\n".join(f"{name.upper()}={value}" for name, value in settings), console=False)
    rows = map_rows(model)
    log(describe_rows(rows))
    trained = sum(p.numel() for p in model.parameters())
    frozen = sum(row["frozen"] for row in rows)
    log(f"{trained:,} trained and {frozen:,} frozen parameters, the latter in 0 bytes")
    log(f"{sum(row['frozen'] > 0 for row in rows)} of {len(rows)} maps are random")
    device = f"{run.dist.device_name}, {torch.get_num_threads()} threads"
    log(f"versions {json.dumps(VERSIONS)} device {device}")
    if run.dist.on_cuda:
        has_fa3 = load_flash_attention_3(run.h) is not None
        kernels = [name for name in attention_order(run.h) if has_fa3 or name != "fa3"]
        log(f"attention: the first of {', '.join(kernels)} that can")
    hardware = f"{run.dist.world_size} x {run.dist.device_name}"
    counts = {"trained_parameters": trained, "frozen_parameters": frozen}
    return counts | {"maps": rows, "hardware": hardware}


def log_inputs(run: Run, data: TrainingData, saved: Checkpoint | None) -> None:
    """Log what the run trains on, and what has changed since its checkpoint was written."""
    h = run.h
    if saved is None:
        run.log(f"new run: {run.folder}")
    sequences = f"{len(data.positions):,} sequences, {len(data.held_out):,} more held out"
    run.log(f"training on {h.data_path}: {sequences}; tokenizer {h.tokenizer_path}")
    held_out = len(data.held_out) * h.train_seq_len
    if held_out < h.eval_seq_len:
        run.log(f"warning: fewer held-out tokens ({held_out}) than EVAL_SEQ_LEN: one window")
    if saved is None:
        return
    if saved.identity["source"] != run.identity["source"]:
        run.log("warning: the script has changed since the checkpoint was written")
    before = saved.identity | {"versions": saved.versions}
    now = run.identity | {"versions": VERSIONS}
    for name in ("processes", "dtype", "versions"):
        if before.get(name) != now[name]:
            written = f"the checkpoint was written with {name} {before.get(name)}"
            run.log(f"warning: {written}, the run goes on with {now[name]}")


def train_model(
    run: Run, model: LanguageModel, data: TrainingData, saved: Checkpoint | None
) -> tuple[dict[str, Any], Candidates]:
    """Train the model, or the rest of what a checkpoint began; return Trainer.finish's result."""
    teacher = None if run.h.export_only else load_teacher(run, saved)
    trainer = Trainer(run, model, data, teacher)
    if not run.h.export_only:
        reserve = reserve_for_export(run, preflight(run, model, data))
        trainer.clock.set_limit(run.h.max_wallclock_seconds - reserve)
        trainer.warm_up()
    if saved:
        with untrusted_input("the checkpoint's training"):
            trainer.load_state_dict(saved.training)
        if run.h.export_only:
            trainer.clock.iterations = trainer.step  # no step is left: choose and export only
        run.log(f"continued after step {trainer.step}")
    trainer.train()
    return trainer.finish()


def export_best(
    run: Run,
    model: LanguageModel,
    data: TrainingData,
    candidates: Candidates,
    losses: Mapping[str, float],
    step: int,
    seconds: float,
) -> tuple[bytes, dict[str, Any]]:
    """Return the artifact whose loss on held-out text is the least, and its metrics.

    The first candidate is exported in any case, the others while `seconds` last. Rounding lowers no
    loss: a candidate whose loss before it, in `losses`, is above that of a finished artifact is
    skipped. `step` steps of training are done.
    """
    tokens = data.held_out_stream()
    exported: dict[str, Artifact] = {}
    scores: dict[str, tuple[bool, bool, float]] = {}  # too large, not finite, held-out loss
    start, took = None, 0.0
    seconds = run.dist.broadcast_object(seconds)  # the processes must stop together
    for name, weights in candidates.items():
        if scores and seconds < 1.25 * took:  # it may take a little longer than the last one
            run.log(f"no time is left to export {name}")
            continue
        if scores and (False, False, losses[name]) >= min(scores.values()):
            run.log(f"not exported: {name} is worse before rounding than the best one after it")
            continue
        began = time.perf_counter()
        with untrusted_input(f"the candidate {name}"):
            model.load_state_dict(weights)
        exported[name] = export(run, model, data, step, start)
        start = exported[name].loss_per_value  # the next candidate needs about the same
        blob = exported[name].blob
        model.load_state_dict(read_artifact(blob)[1])
        loss = evaluate(model, tokens, run.h, run.dist, run.h.eval_seq_len)
        scores[name] = len(blob) > largest_model(run.h), not math.isfinite(loss), loss
        run.log(f"quantized {name}:{loss:.4f} model {len(blob):,} bytes")
        took = run.dist.broadcast_object(time.perf_counter() - began)
        seconds -= took
    best = min(scores, key=scores.get)
    blob, sizes = exported[best].blob, exported[best].sizes
    codes = code_rows(model, exported[best])
    text = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    run.log(f"exported:{best}\n{describe_rows(codes)}\nartifact bytes: {text}")
    check_size(run.h, len(blob))
    quantized = {f"holdout_loss_quantized_{name}": loss for name, (*_, loss) in scores.items()}
    groups = [{"group": name, "bytes": size} for name, size in sizes.items()]
    return blob, {"candidate": best, **quantized, "codes": codes, "groups": groups}


def train_and_export(run: Run, saved: Checkpoint | None) -> tuple[bytes, dict[str, Any]]:
    """Return the artifact of a new model or of a checkpoint, and the run's metrics."""
    h = run.h
    data = TrainingData(h)
    model = prepare_model(run, saved)
    counts = log_start(run, model)
    log_inputs(run, data, saved)
    is_finished = saved is not None and saved.finished
    if is_finished:
        metrics = saved.metrics
        scored_in = saved.settings["eval_seq_len"], saved.identity.get("dtype")
        if scored_in != (h.eval_seq_len, run.identity["dtype"]):  # not comparable
            metrics = {k: v for k, v in metrics.items() if not re.search("before|holdout", k)}
        candidates = saved.training.get("candidates", {"last": saved.weights})
    else:
        metrics, candidates = train_model(run, model, data, saved)
        metrics = counts | metrics
    began = time.perf_counter()
    # EXPORT_ONLY may have read a finished checkpoint from another folder.
    if h.export_only or not is_finished or not (run.folder / "checkpoint.pt").exists():
        save_checkpoint(run, model, model.fingerprint(), {"candidates": candidates}, metrics)
    run.stop.can_save = False
    _, stop = run.dist.sync_from_rank0(flag=run.stop.requested)
    if stop:
        continues = f"the same RUN_ID exports {run.folder}/checkpoint.pt"
        raise UserError(f"stopped by a signal; {continues}")
    time_left = math.inf
    if h.max_wallclock_seconds and not h.export_only:
        time_left = h.max_wallclock_seconds - metrics["train_seconds"] - metrics["choice_seconds"]
        time_left -= time.perf_counter() - began  # to write the checkpoint
    losses = {name: metrics.get(f"holdout_loss_{name}", math.nan) for name in candidates}
    blob, choice = export_best(run, model, data, candidates, losses, metrics["steps"], time_left)
    if run.dist.rank == 0:
        write_file(run.folder / "model.int6.ptz", blob)
    seconds = time.perf_counter() - began + metrics["choice_seconds"]
    return blob, metrics | choice | {"export_seconds": round(seconds, 3)}


def time_limit_exceeded(run: Run, metrics: Mapping[str, Any]) -> bool:
    """Return whether training and export took longer than they may; log it if so."""
    limit = run.h.max_wallclock_seconds
    total = metrics["train_seconds"] + metrics["export_seconds"]
    is_over = 0 < limit < total
    if is_over:
        over = f"over MAX_WALLCLOCK_SECONDS={limit:g}"
        run.log(f"warning: training and export took {total:.1f} s, {over}")
    return is_over


def evaluate_artifact(run: Run, blob: bytes) -> dict[str, Any]:
    """Score an artifact from its bytes alone; log and return the metrics."""
    h, log = run.h, run.log
    header, _ = read_header(blob)
    if header.get("tokenizer") != run.tokenizer.sha256:
        problem = f"TOKENIZER_PATH={h.tokenizer_path} is not the tokenizer of the artifact"
        raise UserError(f"{problem}; set TOKENIZER_PATH and DATA_PATH to those of its training")
    began = time.perf_counter()
    model = model_from_artifact(h, blob, run.dist)
    dtype = str(resolve_dtype(h, run.dist.on_cuda)).removeprefix("torch.")
    metrics: dict[str, Any] = {}
    for kind, stride in (("roundtrip", h.eval_seq_len), ("sliding_window", h.eval_stride)):
        start = time.perf_counter()
        streams = is_streaming(h, stride, len(run.val.tokens) - 1)
        mode = "streaming" if streams else "exact"
        loss = evaluate(model, run.val.tokens, h, run.dist, stride)
        bpb = run.val.bits_per_byte(loss)
        seconds = time.perf_counter() - start
        metrics |= {f"val_loss_{kind}": loss, f"val_bpb_{kind}": bpb, "eval_mode": mode}
        name = f"final_int6_brotli_{kind}"  # the challenge's name, whatever MATRIX_BITS is
        how = f"length:{h.eval_seq_len} stride:{stride} mode:{mode} dtype:{dtype}"
        spent = f"eval_time:{1000 * seconds:.0f}ms"
        log(f"{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {how} {spent}")
        log(f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    seconds = time.perf_counter() - began
    scored, size = len(run.val.tokens) - 1, run.val.bytes
    log(f"scored {scored:,} tokens, {size:,} bytes of text, of {h.data_path}")
    total = code_bytes() + len(blob)
    log(f"artifact {total:,} bytes: code {code_bytes():,}, model {len(blob):,}")
    return metrics | {"val_tokens": scored, "val_bytes": size, "eval_seconds": round(seconds, 3)}


LOCATIONS = ("data_path", "tokenizer_path")


def locations_beside(artifact: str) -> dict[str, str]:
    """Return data and tokenizer of the run in whose folder an artifact lies, if it says them."""
    folder = Path(artifact).absolute().parent
    with contextlib.suppress(LookupError, OSError, TypeError, ValueError):  # it may be anything
        results = json.loads((folder / "results.json").read_bytes())
        return {name: os.path.normpath(folder / results[name]) for name in LOCATIONS}
    return {}


def write_results(run: Run, metrics: dict[str, Any], model_bytes: int) -> None:
    """Let rank 0 write results.json: what the run measured, and on what."""
    if run.dist.rank:
        return
    h = run.h
    values = h.as_dict().items()
    adapters = {spec.adapter for spec in build_map_table(h).values()} - {"none"}
    network = [f"{h.num_layers} x {h.model_dim}", f"maps {h.map_basis}", *sorted(adapters)]
    results = {
        "model": ", ".join(network),
        "date": time.strftime("%F"),
        "versions": VERSIONS,
        "eval_dtype": run.identity["dtype"].removeprefix("torch."),
        "dataset": Path(h.data_path).name,
        "seed": h.seed,
        "val_loss": metrics["val_loss_sliding_window"],
        "val_bpb": metrics["val_bpb_sliding_window"],
        "bytes_total": code_bytes() + model_bytes,
        "bytes_code": code_bytes(),
        "bytes_code_readable": len(SOURCE),
        "bytes_model": model_bytes,
        "eval_seq_len": h.eval_seq_len,
        "eval_stride": h.eval_stride,
        # As seen from the folder, so that both may move together.
        **{name: os.path.relpath(getattr(h, name), run.folder) for name in LOCATIONS},
        "settings": {k.upper(): value for k, value in values if value != SETTINGS[k].default},
        **metrics,
    }
    content = (json.dumps(results, indent=2) + "\n").encode()
    write_file(run.folder / "results.json", content)
    run.log(f"written: {run.folder}/ model.int6.ptz, results.json, checkpoint.pt, train.log")


def settings_from_artifact(h: Hyperparameters, blob: bytes) -> Hyperparameters:
    """Return the settings of the artifact's model, scored as it was unless somebody set it."""
    source = f"MODEL_PATH={h.model_path}"
    with untrusted_input(source):
        header, _ = read_header(blob)
        stored = {name: header["model"][name] for name in h.model_settings()}
        stored |= {name: header["evaluation"][name] for name in SCORING}
        return adopt_settings(h, stored, source, SCORING)


def settings_from_checkpoint(h: Hyperparameters, saved: Checkpoint) -> Hyperparameters:
    """Return the settings of the checkpoint's run, but quantizer and evaluation may be set anew."""
    source = f"CHECKPOINT_PATH={h.checkpoint_path}"
    with untrusted_input(source):
        own = {*LOCATIONS, "eval_batch_tokens", "distill_from", "artifact_limit_bytes"}
        of_this_start = RESUME_OVERRIDES - own
        stored = {k: value for k, value in saved.settings.items() if k not in of_this_start}
        overridable = EXPORT_OVERRIDES | RESUME_OVERRIDES - {"distill_from"}
        return adopt_settings(h, stored, source, overridable)


def decide_start(
    h: Hyperparameters, dist: Distributed, log: RunLog
) -> tuple[Hyperparameters, bytes, Checkpoint | None, Path | None]:
    """Return settings that hold, an artifact to evaluate, a checkpoint, and the run's folder."""
    if h.eval_only:
        found = dist.from_rank0(lambda: locations_beside(h.model_path))
        h = reload_settings(found | h.given())
        h = settings_from_manifest(h)
        blob = dist.from_rank0(lambda: read_file("MODEL_PATH", h.model_path))
        return settings_from_artifact(h, blob), blob, None, None
    saved = None
    if "data_path" in h.explicit:
        h = settings_from_manifest(h)
    if h.export_only:
        saved = dist.from_rank0(lambda: Checkpoint.read(Path(h.checkpoint_path)))
        h = settings_from_checkpoint(h, saved)
    folder, resumed = dist.from_rank0(lambda: open_folder(h, log))
    if resumed and not h.export_only:
        stored = resumed.settings | {"timeout_seconds": h.timeout_seconds}  # the group is open
        # After training nothing else would notice another teacher.
        own = {"distill_from"} if resumed.finished else set()
        h = adopt_settings(h, stored, str(folder), RESUME_OVERRIDES - own)
        saved = resumed
    elif resumed and not resumed.settings["export_only"]:
        raise UserError(f"{folder} is an unfinished run; choose a new RUN_ID for the export")
    return h, b"", saved, folder


def run_job(h: Hyperparameters, dist: Distributed, log: RunLog, stop: StopSignal) -> None:
    """Train and export unless EVAL_ONLY names an artifact, evaluate it from its bytes, report."""
    h, blob, saved, folder = decide_start(h, dist, log)
    dist.configure(h)
    tokenizer = Tokenizer(h.tokenizer_path, h.vocab_size)
    tokenizer.check_manifest(h)
    identity = identify(h, tokenizer, dist)
    if saved:
        with untrusted_input("the checkpoint"):
            check_identity(h, saved, identity)
            identity = saved.identity | identity  # with the hash of its teacher
    val = ValidationStream(h, tokenizer)
    if len(val.tokens) <= h.eval_seq_len:
        stream = f"the validation stream of {len(val.tokens)} tokens"
        raise UserError(f"EVAL_SEQ_LEN={h.eval_seq_len} is longer than {stream}")
    run = Run(h, dist, log, stop, tokenizer, val, folder, identity)
    metrics: dict[str, Any] = {}
    if folder:
        blob, metrics = train_and_export(run, saved)
    else:
        log(f"evaluating {h.model_path} on {h.data_path} with {h.tokenizer_path}")
    metrics |= evaluate_artifact(run, blob)
    if folder:
        metrics["over_time_limit"] = time_limit_exceeded(run, metrics)
        write_results(run, metrics, len(blob))


REMEDIES = {
    r"out of memory|allocate|MemoryError": "lower MICRO_BATCH_TOKENS or EVAL_BATCH_TOKENS",
    r"Errno": "check that file and its disk",
    r"gloo|NCCL|[Cc]onnection|[Tt]imed? ?out": "another process died, or hung for TIMEOUT_SECONDS",
}


def plan_of_run(environment: Mapping[str, str]) -> str:
    """Return GPUS,VOCAB_SIZE,TEACHER_PRESET of a run for run.sh; empty: nobody set it."""
    device = environment.get("DEVICE", "auto")
    gpus = 0 if device == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()
    preset = load_preset(environment["PRESET"], device) if environment.get("PRESET") else {}
    vocabulary = environment.get("VOCAB_SIZE", preset.get("VOCAB_SIZE", ""))
    return f"{gpus},{vocabulary},{preset.get('TEACHER_PRESET', '')}"


def main(arguments: Sequence[str] = ()) -> None:
    """Run the script; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\nSections")[0],
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", action="store_true", help="print what run.sh needs, then end")
    options = parser.parse_args(arguments)
    try:
        if options.plan:
            print(plan_of_run(os.environ))
            return
        h = load_settings()
        stop = StopSignal()
        stop.install()
        dist = Distributed(h)
        with RunLog(dist.rank) as log, dist:
            run_job(h, dist, log, stop)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except (MemoryError, OSError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        for pattern, remedy in REMEDIES.items():
            if re.search(pattern, text):
                continues = "The same RUN_ID continues a run"
                raise SystemExit(f"error: {text}: {remedy}. {continues}") from None
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
