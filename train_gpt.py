"""Learning adapters on random linear maps: a language model for Parameter Golf in one script.

Most weight matrices are frozen random maps, regenerated from a seed and stored in 0 bytes. What is learned
around them (low-rank adapters, gains, embeddings) is quantised, compressed and written as one artifact. Every
setting is an environment variable, declared once in `Hyperparameters`.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # train, export, evaluate from the artifact
    EVAL_ONLY=1 MODEL_PATH=model.int6.ptz python train_gpt.py  # repeat the evaluation
"""
from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import pickle
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
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

flash_attention_3 = None
with contextlib.suppress(ImportError):
    from flash_attn_interface import flash_attn_func as flash_attention_3

# ---- Settings ----------------------------------------------------------------------------------------------
class UserError(Exception):
    """Something a person can mend: the message says what was wrong, where, and what to do."""

def setting(default, meaning: str, low=0, high=math.inf, choices=(), model=False):
    """One variable: its default (and so its type), meaning, range; `model`: the artifact must store it."""
    rule = {"meaning": meaning, "low": low, "high": high, "choices": choices, "model": model}
    return dataclasses.field(default=default, metadata=rule)

@dataclasses.dataclass(init=False)
class Hyperparameters:
    """Every setting: from keywords, else from the variable of its name in capitals, else its default. Raises
    UserError that names all that is wrong at once."""

    # Run
    run_id: str = setting("", "name of the run's folder; empty: the time of the start")
    output_dir: str = setting("runs", "where the run's folder is made")
    seed: int = setting(1337, "seed of initial weights and data order", 0, 2**63 - 1)
    dtype: str = setting("auto", "type of activations", choices=("auto", "bfloat16", "float32"))
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
    mlp_mult: float = setting(3.0, "hidden width of the MLP over MODEL_DIM", 0.01, 64, model=True)
    rope_dims: int = setting(16, "rotated dimensions of each head", 0, 1024, model=True)
    rope_base: float = setting(10_000.0, "base of the rotary frequencies", 1, 1e9, model=True)
    xsa_last_n: int = setting(11, "last N layers use exclusive self-attention", 0, 256, model=True)
    ln_scale: int = setting(1, "1: scale each pre-norm by 1/sqrt(layer + 1)", 0, 1, model=True)
    bigram_vocab_size: int = setting(2048, "buckets of the bigram hash; under 2: none", 0, 2**24, model=True)
    bigram_dim: int = setting(128, "width of the bigram embedding", 1, 4096, model=True)
    ve_enabled: int = setting(1, "1: value embedding, shared by VE_LAYERS", 0, 1, model=True)
    ve_dim: int = setting(128, "width of the value embedding", 1, 4096, model=True)
    ve_layers: str = setting("9,10", "layers whose values get the value embedding", model=True)
    vrl_enabled: int = setting(1, "1: later layers add layer 0's values", 0, 1, model=True)
    smear_enabled: int = setting(1, "1: mix each embedding with the previous one", 0, 1, model=True)
    skips_enabled: int = setting(1, "1: U-Net skips from first to second half", 0, 1, model=True)
    skip_gates_enabled: int = setting(0, "1: a sigmoid gate mixes in each skip", 0, 1, model=True)
    mlp_gated: int = setting(0, "1: GEGLU instead of LeakyReLU(0.5)²", 0, 1, model=True)
    parallel_from: int = setting(256, "from this layer on attention and MLP run side by side", model=True)
    recur_layers: str = setting("", "layers that run several times, such as 3-5", model=True)
    recur_times: int = setting(3, "how often", 1, 64, model=True)
    ensemble: int = setting(1, "members in one artifact, whose logits are averaged", 1, 64, model=True)
    qk_gain_init: float = setting(1.5, "initial gain of each query head", 0, 100)
    logit_softcap: float = setting(30.0, "logits are c·tanh(z/c)", 1e-3, 1e6, model=True)
    tied_embed_init_std: float = setting(0.005, "initial std of the tied embedding", 0, 10)
    # The map table (MapRow): a text is VALUE or SELECTOR=VALUE, with commas between; the last that fits holds
    map_basis: str = setting("orthogonal", "learned, or the basis of a frozen random map", model=True)
    map_gain: str = setting("1", "factor on the basis", model=True)
    map_seed: int = setting(12_345, "seed of the random maps", 0, 2**62, model=True)
    map_seed_stride: int = setting(100, "what a layer adds to it", 1, 2**32, model=True)
    map_adapter: str = setting("lora:32", "none, or NAME:SIZE with + between", model=True)
    map_scale: str = setting("none", "learned factor: none, one a map, one a row", model=True)
    map_gate: str = setting("none", "learned gate of each output feature: none, or how it begins", model=True)
    map_freeze: str = setting("0", "share of training after which it stands still; 0: never", model=True)
    # Training
    iterations: int = setting(20_000, "training steps at most", 1)
    warmup_steps: int = setting(20, "steps before the clock starts, whose effect is undone")
    warmdown_iters: int = setting(3500, "last steps, over which learning rates fall to 0")
    warmdown_frac: float = setting(0.0, "or the last share of training; 0: WARMDOWN_ITERS", 0, 1)
    dropout: float = setting(0.0, "share of each attention's and MLP's output dropped", 0, 0.9)
    recur_frac: float = setting(0.35, "share of training at which RECUR_LAYERS begin to recur", 0, 0.99)
    distill_from: str = setting("", "artifact of a teacher")
    self_distill: int = setting(0, "1: the model as it was at DISTILL_START_FRAC is the teacher", 0, 1)
    distill_start_frac: float = setting(0.0, "share of training at which the teacher begins", 0, 1)
    distill_end_frac: float = setting(1.0, "and ends", 0, 1)
    distill_alpha: float = setting(0.5, "share of the cross-entropy in the student's loss", 0, 1)
    distill_temperature: float = setting(2.0, "of both distributions", 0.01, 100)
    train_batch_tokens: int = setting(786_432, "tokens a step, over all processes", 1)
    train_seq_len: int = setting(2048, "tokens of a training sequence", 1, 2**20)
    micro_batch_tokens: int = setting(98_304, "most tokens of one forward pass on one device", 1)
    max_wallclock_seconds: float = setting(600.0, "training and export together; 0: no limit")
    gptq_reserve_seconds: float = setting(45.0, "the part of it kept for the export")
    val_loss_every: int = setting(4000, "steps between validations; 0: at the end only")
    train_log_every: int = setting(200, "steps between log lines; 0: none")
    # Optimisers
    matrix_lr: float = setting(0.025, "Muon: matrices and adapters")
    tied_embed_lr: float = setting(0.035, "AdamW: embeddings")
    scalar_lr: float = setting(0.025, "AdamW: gains, gates and scales")
    sparse_lr: float = setting(0.003, "AdamW: values of sparse adapters")
    muon_momentum: float = setting(0.99, "Muon's momentum", 0, 1)
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum at the first step", 0, 1)
    muon_momentum_warmup_steps: int = setting(1500, "steps from that momentum to MUON_MOMENTUM")
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1, 20)
    muon_wd: float = setting(0.04, "decoupled weight decay of Muon")
    adam_wd: float = setting(0.04, "decoupled weight decay of AdamW")
    embed_wd: float = setting(0.04, "likewise for embeddings")
    beta1: float = setting(0.9, "AdamW: decay of the mean", 0, 0.9999)
    beta2: float = setting(0.95, "AdamW: decay of the variance", 0, 0.99999)
    adam_eps: float = setting(1e-8, "AdamW: added to the deviation")
    grad_clip_norm: float = setting(0.3, "largest norm of all gradients together; 0: no clip")
    ema_decay: float = setting(0.997, "exponential moving average of the weights; 0: none", 0, 0.999999)
    swa_enabled: int = setting(1, "1: plain average of late weights", 0, 1)
    swa_interval: int = setting(50, "steps between two weights of that average", 1)
    swa_threshold: float = setting(0.2, "learning-rate scale below which it begins", 0, 1)
    late_qat_threshold: float = setting(0.15, "scale below which quantised weights are trained", 0, 1)
    # Quantisation and artifact
    matrix_bits: int = setting(6, "bits of a matrix's code", 2, 8)
    embed_bits: int = setting(8, "bits of an embedding's code", 2, 8)
    matrix_clip_sigmas: float = setting(10.0, "deviations of a row that its largest code spans", 0.5, 100)
    embed_clip_sigmas: float = setting(15.0, "likewise for embeddings", 0.5, 100)
    gptq_calib_batches: int = setting(256, "calibration batches of 16,384 training tokens; 0: no GPTQ")
    gptq_damping: float = setting(0.01, "added to a Hessian's diagonal, as a share of its mean", 1e-6, 10)
    prune_pct: float = setting(0.0, "percentage of each matrix, the smallest, set to zero", 0, 99)
    artifact_limit_bytes: int = setting(16_000_000, "code and model together", 1)
    # Evaluation
    eval_seq_len: int = setting(2048, "tokens of an evaluation window", 1, 2**20)
    eval_stride: int = setting(64, "new tokens that each window scores", 1)
    eval_batch_tokens: int = setting(131_072, "tokens of one forward pass of the evaluation", 1)

    def __init__(self, /, environment: Mapping[str, str] = os.environ, **given):
        fields = {f.name: f for f in dataclasses.fields(self)}
        problems = [f"{name}: no such setting" for name in given if name not in {**fields, **PUBLISHED}]
        names = [name for name in [*fields, *PUBLISHED] if name.upper() in environment]
        said = {name: environment[name.upper()] for name in names} | given
        said = expand_published(said, problems)
        self.given = set(said)  # what somebody asked for, by name
        for name, f in fields.items():
            raw = said.get(name, f.default)
            setattr(self, name, f.default)
            with noting(problems, f"{name.upper()}={raw}"):
                setattr(self, name, parse_setting(f, raw))
        self.head_dim = self.model_dim // self.num_heads
        self.kv_dim, self.mlp_dim = self.head_dim * self.num_kv_heads, int(self.mlp_mult * self.model_dim)
        self.value_layers, self.recurring_layers, self.maps = [], [], []
        with noting(problems, f"VE_LAYERS={self.ve_layers}"):
            self.value_layers = layers_of(self.ve_layers, self.num_layers) if self.ve_enabled else []
        with noting(problems, f"RECUR_LAYERS={self.recur_layers}"):
            self.recurring_layers = layers_of(self.recur_layers, self.num_layers)
        problems += contradictions(self, int(environment.get("WORLD_SIZE", 1)))
        problems += foreign_variables(environment, self.allow_unknown)
        if not problems:  # the table of impossible shapes would only repeat what is wrong with them
            self.maps = map_table(self, problems)
        if problems:
            raise UserError("these settings cannot be used:\n  " + "\n  ".join(problems))

    def model_settings(self) -> dict:
        """What the artifact stores, and all that rebuilding the model depends on."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["model"]}

    def adopt(self, stored: dict, what: str) -> Hyperparameters:
        """These settings with the model of an artifact or checkpoint; UserError if one asked for another."""
        mine = self.model_settings()
        other = [f"{name.upper()}={mine[name]} here, {stored.get(name)} there" for name in mine
                 if name in self.given and mine[name] != stored.get(name)]
        if other:
            raise UserError(f"{what} is of another model: {'; '.join(other)}. Unset what differs")
        kept = {name: getattr(self, name) for name in self.given if name not in mine}
        return Hyperparameters({}, **kept, **stored)

@contextlib.contextmanager
def noting(problems: list[str], where: str):
    """Within, a ValueError becomes a problem that says where it is."""
    try:
        yield
    except ValueError as error:
        problems.append(f"{where}: {error}")

def parse_setting(f: dataclasses.Field, raw):
    """A field's value from its text; whole numbers may be hexadecimal. ValueError says what is wrong."""
    kind, low, high, choices = type(f.default), *(f.metadata[key] for key in ("low", "high", "choices"))
    try:
        value = int(str(raw), 0) if kind is int else kind(raw)
    except ValueError:
        raise ValueError(f"needs a {'whole ' if kind is int else ''}number") from None
    if kind is not str and not (low <= value <= high and value < math.inf):
        raise ValueError(f"must be at least {low:,}" + (f" and at most {high:,}" if high < math.inf else ""))
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    return value

def layers_of(text: str, count: int) -> list[int]:
    """The layers that a text such as `0-2,5,9-` names among `count`; + may stand for the comma."""
    layers: dict[int, None] = {}
    for part in filter(None, re.split(r"[,+ ]+", text)):
        match = re.fullmatch(r"(\d+)(-?)(\d*)", part)
        first, dash, last = match.groups() if match else (count, "", "")
        last = int(last or (count - 1 if dash else first))
        if not int(first) <= last < count:
            raise ValueError(f"{part} must be layers from 0 to {count - 1}, such as 0-2,5")
        layers |= dict.fromkeys(range(int(first), last + 1))
    return list(layers)

def contradictions(h: Hyperparameters, processes: int) -> list[str]:
    """Settings that are fine alone and impossible together, with their numbers."""
    wrong = {
        f"NUM_HEADS={h.num_heads} must divide MODEL_DIM={h.model_dim}": h.model_dim % h.num_heads,
        f"NUM_KV_HEADS={h.num_kv_heads} must divide NUM_HEADS={h.num_heads}": h.num_heads % h.num_kv_heads,
        f"ROPE_DIMS={h.rope_dims} is odd or over the {h.head_dim} dimensions of a head":
            h.rope_dims % 2 or h.rope_dims > h.head_dim,
        f"EVAL_STRIDE={h.eval_stride} is over EVAL_SEQ_LEN={h.eval_seq_len}: tokens would be skipped":
            h.eval_stride > h.eval_seq_len,
        f"TRAIN_BATCH_TOKENS={h.train_batch_tokens} is no multiple of TRAIN_SEQ_LEN={h.train_seq_len} times"
        f" {processes} processes": not h.eval_only and h.train_batch_tokens % (h.train_seq_len * processes),
        f"GPTQ_RESERVE_SECONDS={h.gptq_reserve_seconds:g} leaves nothing of MAX_WALLCLOCK_SECONDS to train":
            0 < h.max_wallclock_seconds <= h.gptq_reserve_seconds,
        f"MLP_MULT={h.mlp_mult:g} gives the MLP no hidden unit": h.mlp_dim < 1,
        "EVAL_ONLY=1 needs MODEL_PATH, the artifact to evaluate": h.eval_only and not h.model_path,
        "EXPORT_ONLY=1 needs CHECKPOINT_PATH, a checkpoint.pt": h.export_only and not h.checkpoint_path,
        "DISTILL_FROM and SELF_DISTILL=1 are two teachers": h.distill_from and h.self_distill,
        "SELF_DISTILL=1 needs DISTILL_START_FRAC over 0, an untrained model teaches nothing":
            h.self_distill and not h.distill_start_frac,
        f"DISTILL_END_FRAC={h.distill_end_frac} is not after DISTILL_START_FRAC={h.distill_start_frac}":
            h.distill_end_frac <= h.distill_start_frac,
    }
    return [message for message, is_wrong in wrong.items() if is_wrong]

# Variables of published scripts: what each means, what it says in the columns of the map table, {} being its
# value, and defaults for columns that nothing else sets. Two that say different things contradict.
PUBLISHED = {
    "use_random_adapters": ("1: system A, every map random with LoRA", {"map_basis": "orthogonal"}, {}),
    "random_adapter_rank": ("rank of its LoRA", {"map_adapter": "lora:{}"}, {}),
    "random_adapter_seed": ("its seed", {"map_seed": "{}"}, {}),
    "random_basis_enabled": (
        "1: system B, random MLP with LoRA and a gate a hidden unit",
        {"map_basis": "mlp=gaussian", "map_gate": "mlp.fc=0"},
        {"map_adapter": "lora:16", "map_seed": "0xD15EA5E", "map_seed_stride": "1009"}),
    "random_basis_seed": ("its seed", {"map_seed": "{}"}, {}),
    "lora_rank": ("rank of its LoRA", {"map_adapter": "lora:{}"}, {}),
    "selective_freeze": (
        "1: system C, the MLP's input maps random", {"map_basis": "mlp.in=gaussian"},
        {"map_adapter": "none", "map_seed": "42000"}),
    "progressive_freeze_frac": (
        "system D, share of training at which the MLP's input maps freeze", {"map_freeze": "mlp.in={}"},
        {"map_basis": "learned"}),
    "rand_proj_layers": (
        "PR #1228, layers of random up-projections", {"map_basis": "mlp.in@{}=orthogonal"},
        {"map_adapter": "none"}),
    "rand_gain": ("1: a learned gain for each of their features", {"map_scale": "row"}, {}),
}

def expand_published(said: dict[str, object], problems: list[str]) -> dict[str, object]:
    """What was said, in the project's own vocabulary: the published variables replaced by what they mean."""
    columns = {name: value for name, value in said.items() if name not in PUBLISHED}
    firm, soft = {name: (name, str(value)) for name, value in columns.items()}, {}
    if str(said.get("use_random_adapters")) == "0":
        soft["map_basis"] = "learned"
    for name, (_, says, otherwise) in PUBLISHED.items():
        value = str(said.get(name, "")).replace(" ", "").replace(",", "+")
        is_flag = not any("{}" in text for text in says.values())
        if is_flag and value not in ("", "0", "1"):
            problems.append(f"{name.upper()}={value}: must be 0 or 1")
        is_switch = is_flag or name == "progressive_freeze_frac"
        if not value or is_switch and not value.strip("0."):
            continue
        soft = otherwise | soft
        for column, text in says.items():
            by, there = firm.setdefault(column, (name, text := text.replace("{}", value)))
            if there != text:
                problems.append(f"{name.upper()}={value} says {column.upper()}={text}, but {by.upper()} says"
                                f" {there}; unset one")
    return soft | {name: text for name, (_, text) in firm.items()} | columns

# Variables of published scripts for what is not here, and why it is not.
NOT_HERE = {"TTT_ENABLED": "test-time training is not built",
            "NGRAM_EVAL": "a cache of hashed n-grams gives no normalised distribution",
            "KNN_LAMBDA": "a cache of hidden states gives no distribution that is fixed before scoring"}

def foreign_variables(environment: Mapping[str, str], allow_unknown: int) -> list[str]:
    """Variables of the environment that ask for what is not here, or look like a misspelt setting."""
    asked = [name for name in NOT_HERE if environment.get(name, "") not in ("", "0", "0.0")]
    problems = [f"{name}={environment[name]}: {NOT_HERE[name]}; unset it" for name in asked]
    known = [name.upper() for name in (*Hyperparameters.__dataclass_fields__, *PUBLISHED)]
    for name in [] if allow_unknown else sorted(set(environment) - set(known) - set(NOT_HERE)):
        for near in difflib.get_close_matches(name, known, n=1, cutoff=0.9):
            problems.append(f"{name}: no such setting; {near}? (ALLOW_UNKNOWN=1 accepts it)")
    return problems

# ---- Map table ---------------------------------------------------------------------------------------------
class MapRow(NamedTuple):
    """What one linear map of the model is made of. The table of these rows decides all of it."""
    name: str  # path of its module in the model
    out_features: int
    in_features: int
    basis: str = "learned"  # or a key of BASES for a frozen random map
    seed: int = 0  # of a frozen map
    shared_seed: int = 0  # of what adapters draw once for all maps of one shape
    gain: float = 1.0  # factor on the basis
    adapter: str = "none"  # what is learned beside a frozen map: NAME:SIZE with NAME in ADAPTERS, + between
    scale: str = "none"  # learned factor, first 1: one for the "map" or one for each output "row"
    gate: float | None = None  # first value of a learned factor of each output, after the activation
    freeze: float = 0.0  # share of training after which all of it stands still; 0: never

    def adapters(self) -> dict[str, float]:
        """Name -> size. ValueError for what is no adapter or does not fit the map."""
        chosen, narrow = {}, min(self.out_features, self.in_features)
        for part in self.adapter.split("+") if self.adapter != "none" else []:
            name, _, text = part.partition(":")
            if name not in ADAPTERS:
                raise ValueError(f"no adapter {name!r}; there are {', '.join(ADAPTERS)} and none")
            if name in chosen:
                raise ValueError(f"{name} stands twice in {self.adapter}")
            unit = ADAPTERS[name].size
            low, high = {"rank": (1, narrow), "density": (1 / self.in_features, 1), "": (0, 0)}[unit]
            with contextlib.suppress(ValueError):
                chosen[name] = int(text) if unit == "rank" else float(text or 0)
            if not low <= chosen.get(name, math.nan) <= high:
                needs = f"a {unit} from {low:.3g} to {high}" if unit else "no size"
                shape = f"{self.out_features} x {self.in_features}"
                raise ValueError(f"{part!r} needs {needs} on a map of {shape}")
        return chosen

def read_cell(column: str, text: str) -> str | float | None:
    """One cell of a column from its text. ValueError says what is wrong with it."""
    choices = {"basis": ["learned", *BASES], "scale": ["none", "map", "row"]}.get(column)
    if choices and text not in choices:
        raise ValueError(f"{text!r} is none of {', '.join(choices)}")
    if choices or column == "adapter":
        return text
    if column == "gate" and text == "none":
        return None
    low, high = {"gain": (1e-6, 1e6), "gate": (-100.0, 100.0), "freeze": (0.0, 1.0)}[column]
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high:
            return float(text)
    raise ValueError(f"{text!r} is no number from {low:g} to {high:g}")

class Column:
    """A column's rules, CELL or SELECTOR=CELL with commas between; of those that select a map the last holds.
    A selector is KIND[@LAYERS]: `all`, `attention`, `mlp`, `mlp.in` (the MLP's maps but its proj) or one kind
    such as `attention.q`; `m1.` before it means member 1 of an ensemble. A rule without one selects all maps
    where it is a basis or a freezing, and the random ones elsewhere."""
    def __init__(self, name: str, text: str, h: Hyperparameters):
        self.name, self.rules, self.used = name, [], {""}
        for rule in text.replace(" ", "").split(","):
            selector, _, cell = rule.rpartition("=")
            match = re.fullmatch(r"(?:m(\d+)\.)?([a-z.]+)?(?:@([\d+-]+))?", selector)
            if not match:
                raise ValueError(f"{selector!r} is no selector such as all, mlp.fc or attention@0-2")
            member, kind, layers = match.groups()
            layers = layers_of(layers, h.num_layers) if layers else range(h.num_layers)
            member, kind = member and int(member), kind or "all"
            self.rules.append((selector, member, kind, layers, read_cell(name, cell)))

    def cells(self, member: int, kind: str, layer: int, random: bool) -> dict[str, str | float | None]:
        """{column: cell} for one map, or nothing where no rule selects it."""
        family = "mlp.in" if kind in ("mlp.fc", "mlp.gate") else kind
        groups, chosen = ("all", kind.partition(".")[0], family, kind), {}
        for selector, of_member, group, layers, cell in self.rules:
            about = selector or random or self.name in ("basis", "freeze")
            if about and group in groups and layer in layers and of_member in (None, member):
                chosen[self.name] = cell
                self.used.add(selector)
        return chosen

def map_table(h: Hyperparameters, problems: list[str]) -> list[MapRow]:
    """The maps of all blocks in order, the one place that decides which are random, and how; what is wrong
    with the columns is added to the problems. A map's seed is MAP_SEED + MAP_SEED_STRIDE · layer + offset (PR
    #1113), the offset stands before its shape; members of an ensemble are a million apart."""
    d, kv, hidden = h.model_dim, h.kv_dim, h.mlp_dim
    kinds = {"attention.q": (0, d, d), "attention.k": (1, kv, d), "attention.v": (2, kv, d),
             "attention.proj": (3, d, d), "mlp.fc": (10, hidden, d), "mlp.proj": (11, d, hidden)}
    kinds |= {"mlp.gate": (12, hidden, d)} if h.mlp_gated else {}
    columns, rows = [], []
    for name in ("basis", "gain", "adapter", "scale", "gate", "freeze"):
        with noting(problems, f"MAP_{name.upper()}={getattr(h, f'map_{name}')}"):
            columns.append(Column(name, getattr(h, f"map_{name}"), h))
    places = itertools.product(range(h.ensemble), range(h.num_layers), kinds)
    for member, layer, kind in [] if problems else places:
        offset, out_features, in_features = kinds[kind]
        cells = columns[0].cells(member, kind, layer, False)
        random = cells.get("basis", "learned") != "learned"
        for column in columns[1:]:
            cells |= column.cells(member, kind, layer, random)
        if random:
            shared = h.map_seed + 1_000_000 * member
            cells |= {"seed": shared + h.map_seed_stride * layer + offset, "shared_seed": shared}
        prefix = f"members.{member}." if h.ensemble > 1 else ""
        row = MapRow(f"{prefix}blocks.{layer}.{kind}", out_features, in_features, **cells)
        rows.append(row)
        with noting(problems, f"MAP_ADAPTER={h.map_adapter}"):
            if row.adapters() and not random:
                raise ValueError(f"{kind} is learned in full, it has no adapter")
        if row.freeze and random and (row.adapter, row.scale, row.gate) == ("none", "none", None):
            problems.append(f"MAP_FREEZE={h.map_freeze}: {kind} is random, nothing of it is learned")
    for column in columns if rows else []:
        unused = dict.fromkeys(rule[0] for rule in column.rules if rule[0] not in column.used)
        problems += [f"MAP_{column.name.upper()}: {selector} selects no map" for selector in unused]
    seeds = [row.seed for row in rows if row.basis != "learned"]
    if len(set(seeds)) < len(seeds):
        problems.append(f"MAP_SEED_STRIDE={h.map_seed_stride} and the members give two maps the same seed")
    problems[:] = dict.fromkeys(problems)  # a kind of map has the same problem in every layer
    return rows

# ---- Processes and log -------------------------------------------------------------------------------------
class Processes:
    """This process among those of the run, its device and type of activations; joins torchrun's group."""
    def __init__(self, h: Hyperparameters):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.on_cuda = torch.cuda.is_available()
        fast = "bfloat16" if self.on_cuda or torch.cpu._is_avx512_bf16_supported() else "float32"
        self.dtype = getattr(torch, fast if h.dtype == "auto" else h.dtype)
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if self.on_cuda else "cpu")
        self.compile = self.on_cuda if h.compile == "auto" else h.compile == "1"

    def __enter__(self) -> Processes:
        if self.on_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # what is computed in float32 there tolerates tf32
        if self.count > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.on_cuda else "gloo")
        return self

    def __exit__(self, failure, *_) -> None:
        if self.count > 1 and failure is None:
            dist.barrier()  # rank 0 may still be writing
            dist.destroy_process_group()
            os._exit(0)  # now and then a thread of gloo's aborts an interpreter that takes its time to exit

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over the processes in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value):
        """Rank 0's object on every process: clocks differ, and decisions must not."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

class Log:
    """Rank 0's lines, to the run's file and to the console; `progress` goes to a terminal only."""
    def __init__(self, on: bool, path: Path | None = None):
        if on and path:
            path.parent.mkdir(parents=True)
        self.on, self.file = on, path.open("a", encoding="utf-8") if on and path else None
        self.clear = "\r\033[K" if on and sys.stdout.isatty() else ""

    def __call__(self, text: str, console: bool = True) -> None:
        if self.file:
            print(text, file=self.file, flush=True)
        if self.on and console:
            print(self.clear + text, flush=True)

    def progress(self, text: str) -> None:
        if self.clear:
            print(self.clear + text, end="", flush=True)

def read_file(variable: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{variable}={path}: {error.strerror}") from None

def write_file(path: Path, content: bytes) -> None:
    """A reader sees the old file or the whole new one, whatever happens in between."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)

# ---- Data --------------------------------------------------------------------------------------------------
def read_shards(folder: str, split: str) -> list[np.ndarray]:
    """The tokens of each shard of a split, memory-mapped, (n,) uint16; headers and sizes are checked."""
    paths = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UserError(f"DATA_PATH={folder}: no fineweb_{split}_*.bin there; data/prepare.py makes them")
    shards, magic, version, header_bytes = [], 20240520, 1, 1024
    for path in paths:
        header, size = np.fromfile(path, "<i4", 3).tolist(), path.stat().st_size
        if header[:2] != [magic, version]:
            raise UserError(f"{path}: no token shard of version {version}; its header begins {header}")
        if header[2:] < [1] or size != header_bytes + 2 * header[2]:
            raise UserError(f"{path}: {size} bytes do not hold {header[2:]} tokens; fetch it again")
        shards.append(np.memmap(path, "<u2", "r", header_bytes, (header[2],)))
    return shards

def check_tokens(tokens: np.ndarray, h: Hyperparameters) -> np.ndarray:
    if tokens.max(initial=0) >= h.vocab_size:
        raise UserError(f"DATA_PATH={h.data_path}: token {tokens.max()} is outside VOCAB_SIZE={h.vocab_size}")
    return tokens

def random_words(seed: int, n: int) -> np.ndarray:
    """(n,) uint64 of Philox, a counter-based generator whose raw stream NumPy promises never to change."""
    return np.random.Philox(key=seed).random_raw(n)

class TrainingData:
    """The training shards as sequences of TRAIN_SEQ_LEN + 1 tokens, shuffled anew each epoch, without end.
    What stands at a position depends on it and the seed alone: any number of processes sees the same steps,
    and there is no state to keep. The last sequences are held out of training."""
    def __init__(self, h: Hyperparameters):
        self.h, self.shards, length = h, read_shards(h.data_path, "train"), h.train_seq_len
        starts = [np.arange(0, len(tokens) - length, length) for tokens in self.shards]
        places = np.concatenate([np.stack([np.full_like(s, i), s], 1) for i, s in enumerate(starts)])
        if len(places) < 2:
            raise UserError(f"DATA_PATH={h.data_path}: too few training tokens for TRAIN_SEQ_LEN={length}")
        held_out = max(1, min(h.holdout_tokens // length, len(places) // 50))
        self.places, self.held_out = places[:-held_out], places[-held_out:]

    def read(self, places: Iterable[tuple[int, int]]) -> Tensor:
        """(n, TRAIN_SEQ_LEN + 1) int64: the sequences at these places, (shard, start) each."""
        rows = [self.shards[shard][start : start + self.h.train_seq_len + 1] for shard, start in places]
        return torch.from_numpy(check_tokens(np.stack(rows), self.h).astype(np.int64))

    def sequences(self, position: int, count: int) -> Tensor:
        """(count, TRAIN_SEQ_LEN + 1) int64: the sequences at `position` and after it."""
        turns = (divmod(i, len(self.places)) for i in range(position, position + count))
        return self.read(self.places[self._order(epoch)[i]] for epoch, i in turns)

    def micro_batches(self, step: int, processes: Processes) -> list[tuple[Tensor, Tensor]]:
        """This process's share of a step: inputs and targets (n, TRAIN_SEQ_LEN), in equal parts that fit."""
        mine = self.h.train_batch_tokens // self.h.train_seq_len // processes.count
        fits = range(1, 1 + max(1, self.h.micro_batch_tokens // self.h.train_seq_len))
        rows = self.sequences((step * processes.count + processes.rank) * mine, mine)
        rows = (rows.pin_memory() if processes.on_cuda else rows).to(processes.device, non_blocking=True)
        return [(part[:, :-1], part[:, 1:]) for part in rows.split(max(n for n in fits if mine % n == 0))]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (it lives as long as the run)
    def _order(self, epoch: int) -> np.ndarray:
        return np.argsort(random_words(self.h.seed + (epoch << 64), len(self.places)), kind="stable")

class Tokenizer:
    """A SentencePiece model, and the bytes of text that each token stands for: the UTF-8 length of its piece
    less the leading ▁, 1 for a byte, 0 for a control token; plus 1 for the ▁ not after a control token."""
    def __init__(self, path: str, vocab_size: int):
        proto = read_file("TOKENIZER_PATH", path)
        self.sha256 = hashlib.sha256(proto).hexdigest()
        try:
            self.model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise UserError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({error})") from None
        if model.vocab_size() != vocab_size:
            raise UserError(f"TOKENIZER_PATH={path} has {model.vocab_size()} pieces, VOCAB_SIZE={vocab_size}")
        if model.is_unknown(model.piece_to_id("▁")):
            raise UserError(f"TOKENIZER_PATH={path}: ▁ is no piece of its own, so bytes cannot be counted")
        pieces = [model.id_to_piece(i) for i in range(vocab_size)]
        kinds = model.is_control, model.is_unknown, model.is_unused
        self.is_control = np.array([any(is_kind(i) for is_kind in kinds) for i in range(vocab_size)])
        self.is_byte = np.array([model.is_byte(i) for i in range(vocab_size)])
        self.has_space = np.array([piece.startswith("▁") for piece in pieces]) & ~self.is_control
        lengths = np.array([len(piece.removeprefix("▁").encode()) for piece in pieces])
        self.own_bytes = np.where(self.is_byte, 1, np.where(self.is_control, 0, lengths))

    def check_manifest(self, h: Hyperparameters) -> None:
        """UserError if the manifest of the shards, where there is one, names another tokenizer."""
        path = Path(h.data_path) / "manifest.json"
        facts = {}
        with contextlib.suppress(OSError, ValueError):  # data from elsewhere may have none, or another one
            facts = json.loads(path.read_bytes())
        made_with = facts.get("tokenizer_sha256") if isinstance(facts, dict) else None
        if made_with not in (None, self.sha256):
            raise UserError(f"TOKENIZER_PATH={h.tokenizer_path} is not what made the shards of DATA_PATH="
                            f"{h.data_path}: {path} names a tokenizer of SHA-256 {made_with}")

    def count_bytes(self, before: np.ndarray, tokens: np.ndarray) -> int:
        """Bytes of text of the tokens (n,), given the token before each, (n,)."""
        return int(self.own_bytes[tokens].sum() + (self.has_space[tokens] & ~self.is_control[before]).sum())

    def decode(self, tokens: np.ndarray) -> bytes:
        """The text of a stream, document after document: a control token stands before each."""
        documents = np.split(tokens, np.flatnonzero(self.is_control[tokens]))
        return "".join(self.model.decode([document.tolist() for document in documents])).encode()

class ValidationStream:
    """All validation tokens as one stream; the bytes of its text, counted once. Refuses a stream whose count
    is not the length of its decoded text: its bits per byte would be wrong."""
    def __init__(self, h: Hyperparameters, tokenizer: Tokenizer):
        tokens = check_tokens(np.concatenate(read_shards(h.data_path, "val")), h)
        self.bytes = tokenizer.count_bytes(tokens[:-1], tokens[1:])  # scored: all but the first token
        if not self.bytes:
            raise UserError(f"DATA_PATH={h.data_path}: the validation stream has no text to score")
        whole = len(tokens) - int(np.argmin(tokenizer.is_byte[tokens[::-1]]))  # the end may cut a character
        self.text = tokenizer.decode(tokens[:whole])
        before = np.append(tokenizer.is_control.argmax(), tokens[: whole - 1])
        counted = tokenizer.count_bytes(before, tokens[:whole])
        if counted != len(self.text):
            raise UserError(f"DATA_PATH={h.data_path}: validation tokens count {counted} bytes, their text"
                            f" has {len(self.text)}; is TOKENIZER_PATH={h.tokenizer_path} what made them?")
        self.tokens = torch.from_numpy(tokens.astype(np.int64))

# ---- Random maps -------------------------------------------------------------------------------------------
def normal_deviates(seed: int, n: int) -> np.ndarray:
    """(n,) float64 standard normal deviates by Box and Muller's formula, without any library's sampler."""
    half = (n + 1) // 2
    uniform = (random_words(seed, 2 * half) >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]

def orthogonal(out_features: int, in_features: int, seed: int) -> Tensor:
    """(out, in) float64, Haar-random, orthonormal on its shorter side: QR of a normal matrix, diag(R) > 0."""
    tall, short = max(out_features, in_features), min(out_features, in_features)
    q, r = torch.linalg.qr(torch.from_numpy(normal_deviates(seed, tall * short).reshape(tall, short)))
    q = q * r.diagonal().sign()
    return q if out_features >= in_features else q.T

def gaussian(out_features: int, in_features: int, seed: int) -> Tensor:
    """(out, in) float64, normal with std 1/√in."""
    deviates = torch.from_numpy(normal_deviates(seed, out_features * in_features))
    return deviates.view(out_features, in_features) / math.sqrt(in_features)

def uniform(out_features: int, in_features: int, seed: int) -> Tensor:
    """(out, in) float64, uniform between -1/√in and 1/√in."""
    words = random_words(seed, out_features * in_features).astype(np.float64) * 2.0**-63 - 1
    return torch.from_numpy(words).view(out_features, in_features) / math.sqrt(in_features)

def rademacher(out_features: int, in_features: int, seed: int) -> Tensor:
    """(out, in) float64, ±1/√in."""
    signs = 1.0 - 2.0 * (random_words(seed, out_features * in_features) >> np.uint64(63))
    return torch.from_numpy(signs).view(out_features, in_features) / math.sqrt(in_features)

def hadamard(out_features: int, in_features: int, seed: int) -> Tensor:
    """(out, in) float64, a randomised Hadamard matrix: random rows and columns, of random signs, of the
    smallest that holds them. Every entry is ± one power of two, at most a factor √2 from 1/√(longer side):
    exact in bfloat16 and fp8, drawn without QR. Squares of a power of two are orthogonal up to a factor."""
    size = 2 ** (max(out_features, in_features) - 1).bit_length()
    words = random_words(seed, 2 * size).reshape(2, size)
    (rows, row_signs), (columns, column_signs) = ((w.argsort(kind="stable"), 1.0 - 2.0 * (w & np.uint64(1)))
                                                  for w in words)
    parity = np.bitwise_count if hasattr(np, "bitwise_count") else np.vectorize(int.bit_count, otypes="B")
    shared = rows[:out_features, None] & columns[None, :in_features]
    signs = (1.0 - 2.0 * (parity(shared) & 1)) * row_signs[:out_features, None] * column_signs[:in_features]
    exponent = math.floor(math.log2(max(out_features, in_features)) / 2 + 0.5)
    return torch.from_numpy(signs * 2.0**-exponent)

BASES: dict[str, Callable[[int, int, int], Tensor]] = {
    "orthogonal": orthogonal, "gaussian": gaussian, "uniform": uniform, "rademacher": rademacher,
    "hadamard": hadamard}

def draw_map(row: MapRow) -> Tensor:
    """(out, in) bfloat16, drawn on the CPU. The map *is* this rounding, on every device and in every type."""
    drawn = BASES[row.basis](row.out_features, row.in_features, row.seed) * row.gain
    return drawn.to(torch.bfloat16).contiguous()

# ---- Linear layers -----------------------------------------------------------------------------------------
# Roles of learned tensors: they decide optimiser and quantiser.
MATRIX, EMBEDDING, SCALAR, SPARSE, MASK = "matrix", "embedding", "scalar", "sparse", "mask"

class Owner(nn.Module):
    """A module that gives each of its learned tensors a role; a tensor without an owner is a SCALAR."""
    roles: dict[str, str] = {}

    def quantize(self, quantizers: dict[str, Quantizer], hessian: Tensor | None) -> dict[str, Codes]:
        """Codes of each tensor in `roles`; `hessian` is Σ x xᵀ (in, in) of calibration inputs, if any."""
        return {name: quantizers[role].gptq(getattr(self, name).data, hessian)
                for name, role in self.roles.items() if isinstance(getattr(self, name), nn.Parameter)}

class LoRA(Owner):
    """ΔW = A B (arXiv:2106.09685): A (out, rank) starts at zero, B (rank, in) normal with std 1/√in."""
    size, roles = "rank", {"B": MATRIX, "A": MATRIX}

    def __init__(self, row: MapRow, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(row.out_features, rank))
        self.B = nn.Parameter(torch.randn(rank, row.in_features) / math.sqrt(row.in_features))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, rank), (rank, in), whose product is ΔW."""
        return self.A, self.B

    def quantize(self, quantizers: dict[str, Quantizer], hessian: Tensor | None) -> dict[str, Codes]:
        """B against its inputs x; then A against its own, x B̂ᵀ with the quantised B̂."""
        b_codes = quantizers[MATRIX].gptq(self.B.data, hessian)
        seen = None if hessian is None else (b := b_codes.values().double()) @ hessian.double() @ b.T
        return {"B": b_codes, "A": quantizers[MATRIX].gptq(self.A.data, seen)}

class RankStabilizedLoRA(LoRA):
    """ΔW = A B / √rank (arXiv:2312.03732)."""
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.A.size(1) ** -0.5, self.B

@functools.lru_cache(maxsize=64)
def shared_factor(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) bfloat16, normal with std 1/√columns, the same tensor for all that ask."""
    return gaussian(rows, columns, seed + (1 << 96)).to(torch.bfloat16)  # a key that is no map's

class VeRA(Owner):
    """ΔW = diag(b) B diag(d) A (arXiv:2310.11454): A and B are random and shared by all maps of one shape,
    learned are b (out), first 0, and d (rank), first 0.1."""
    size = "rank"

    def __init__(self, row: MapRow, rank: int):
        super().__init__()
        a = shared_factor(rank, row.in_features, row.shared_seed)
        b = shared_factor(row.out_features, rank, row.shared_seed + 1)
        self.register_buffer("A", a, persistent=False)
        self.register_buffer("B", b, persistent=False)
        self.b = nn.Parameter(torch.zeros(row.out_features))
        self.d = nn.Parameter(torch.full((rank,), 0.1))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.b[:, None] * self.B, self.d[:, None] * self.A

class Sparse(Owner):
    """ΔW: in each row, learned values, first 0, on a support of a share `density` of its columns, which the
    seed draws: it costs no bytes (after SLTrain, arXiv:2406.02214)."""
    size, roles = "density", {"values": SPARSE}

    def __init__(self, row: MapRow, density: float):
        super().__init__()
        count = max(1, round(density * row.in_features))
        words = random_words(row.seed + (2 << 96), row.out_features * row.in_features)
        support = np.sort(np.argpartition(words.reshape(-1, row.in_features), count - 1)[:, :count])
        self.register_buffer("support", torch.from_numpy(support), persistent=False)  # (out, count)
        self.values = nn.Parameter(torch.zeros(row.out_features, count))

    def correction(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight).scatter(1, self.support, self.values.to(weight.dtype))

    def quantize(self, quantizers: dict[str, Quantizer], hessian: Tensor | None) -> dict[str, Codes]:
        return super().quantize(quantizers, None)  # each row has inputs of its own

class Mask(Owner):
    """W + ΔW = √2 · W where a score is positive and 0 elsewhere: one bit a weight, half of them set at first.
    Scores learn by the straight-through gradient (edge-popup, arXiv:1911.13299)."""
    size, roles = "", {"scores": MASK}

    def __init__(self, row: MapRow, _: float):
        super().__init__()
        bound = row.in_features**-0.5
        self.scores = nn.Parameter(torch.empty(row.out_features, row.in_features).uniform_(-bound, bound))

    def correction(self, weight: Tensor) -> Tensor:
        mask = (self.scores > 0).to(weight.dtype) + (self.scores - self.scores.detach()).to(weight.dtype)
        return weight * (math.sqrt(2) * mask - 1)

    def quantize(self, quantizers: dict[str, Quantizer], hessian: Tensor | None) -> dict[str, Tensor]:
        return {"scores": self.scores.data > 0}

# What may stand beside a frozen map. One that has `factors` adds their product, one that has `correction` a
# full matrix, whose gradient costs one GEMM more.
ADAPTERS: dict[str, type[Owner]] = {
    "lora": LoRA, "rslora": RankStabilizedLoRA, "vera": VeRA, "sparse": Sparse, "mask": Mask}

class MergedLinear(torch.autograd.Function):
    """y = x (W + A B)ᵀ: one GEMM forward, one backward, the dense gradient of W only where one asks."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        merged = torch.addmm(weight, a, b)
        ctx.save_for_backward(x, merged, a, b)
        return x @ merged.t()

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, merged, a, b = ctx.saved_tensors
        rows_dy, rows_x = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
        wants_x, wants_w, wants_a, wants_b = ctx.needs_input_grad
        return (dy @ merged if wants_x else None,
                rows_dy.t() @ rows_x if wants_w else None,
                rows_dy.t() @ (rows_x @ b.t()) if wants_a else None,
                (rows_dy @ a).t() @ rows_x if wants_b else None)

class Linear(Owner):
    """A row of the map table: y = gate · activation(scale · x (W + ΔW)ᵀ + bias). W (out, in) is learned in
    float32, orthogonal at first; or frozen and random, then a bfloat16 buffer that is never in a state_dict,
    with ΔW the sum of its adapters. All is computed in the type of x."""
    roles = {"weight": MATRIX}

    def __init__(self, row: MapRow, weight: Tensor | None = None, bias: bool = False):
        """`weight`: the random map, where it is already drawn."""
        super().__init__()
        shape = row.out_features, row.in_features
        if row.basis == "learned":
            self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(shape)))
        else:
            self.register_buffer("weight", draw_map(row) if weight is None else weight, persistent=False)
        for name, size in row.adapters().items():
            self.add_module(name, ADAPTERS[name](row, size))
        factors = {"none": None, "map": torch.ones(1), "row": torch.ones(row.out_features)}[row.scale]
        self.scale = None if factors is None else nn.Parameter(factors)
        self.gate = None if row.gate is None else nn.Parameter(torch.full((row.out_features,), row.gate))
        self.bias = nn.Parameter(torch.zeros(row.out_features)) if bias else None

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        weight, adapters = self.weight.to(x.dtype), list(self.children())
        low_rank = [adapter.factors() for adapter in adapters if hasattr(adapter, "factors")]
        full = [adapter.correction(weight) for adapter in adapters if hasattr(adapter, "correction")]
        weight = sum(full, weight)
        if low_rank:
            a, b = torch.cat([a for a, _ in low_rank], 1), torch.cat([b for _, b in low_rank], 0)
            y = MergedLinear.apply(x, weight, a.to(x.dtype), b.to(x.dtype))
        else:
            y = F.linear(x, weight)
        y = y if self.scale is None else y * self.scale.to(x.dtype)
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        y = y if activation is None else activation(y)
        return y if self.gate is None else y * self.gate.to(x.dtype)

class FrozenRandomLinearWithLoRA(Linear):
    """y = x (W + A B)ᵀ (+ bias): an orthogonal random map with LoRA (PR #1113), by itself."""
    def __init__(self, in_features: int, out_features: int, rank: int = 32, seed: int = 0,
                 bias: bool = False):
        row = MapRow("", out_features, in_features, "orthogonal", seed, adapter=f"lora:{rank}")
        super().__init__(row, bias=bias)

    lora_A = property(lambda self: self.lora.A)
    lora_B = property(lambda self: self.lora.B)

class Embedding(Owner):
    """A learned table (vocabulary, dim) float32: ids look up rows in `dtype`, vectors are multiplied by all.
    Ids are one-hot inputs with a diagonal Hessian: for a table that is only looked up, GPTQ is rounding."""
    roles = {"weight": EMBEDDING}

    def __init__(self, vocabulary: int, dim: int, std: float, dtype: torch.dtype):
        super().__init__()
        self.weight, self.dtype = nn.Parameter(torch.randn(vocabulary, dim) * std), dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return F.linear(x, self.weight.to(x.dtype))
        return F.embedding(x, self.weight).to(self.dtype)

def tensors_by_role(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters by name, sorted into the roles that their owners gave them."""
    groups = {MATRIX: {}, EMBEDDING: {}, SCALAR: {}, SPARSE: {}, MASK: {}}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            groups[getattr(module, "roles", {}).get(name.rpartition(".")[-1], SCALAR)][name] = parameter
    return groups

def stored_bytes(model: nn.Module) -> int:
    """Bytes that a module's learned tensors take in the artifact before they are packed."""
    groups = tensors_by_role(model)
    coded = sum(p.numel() + len(p) for role in (MATRIX, EMBEDDING, SPARSE) for p in groups[role].values())
    bits = sum(-(-p.numel() // 8) for p in groups[MASK].values())
    return coded + bits + 2 * sum(p.numel() for p in groups[SCALAR].values())

# ---- Transformer -------------------------------------------------------------------------------------------
def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))

def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, T, H, D), k and v (B, T, H_kv, D) -> (B, T, H, D); H / H_kv query heads share a key head."""
    if q.is_cuda and q.dtype is torch.bfloat16 and flash_attention_3:
        out = flash_attention_3(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    (batch, heads, length, dim), group = q.shape, q.size(1) // k.size(1)
    if q.is_cuda or length > 1024:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    # On a CPU, plain products are faster than the fused kernel at such lengths (bench/cpu.py).
    k, v = k.reshape(-1, length, dim), v.reshape(-1, length, dim)  # (B · H_kv, T, D)
    q = q.reshape(len(k), -1, dim)  # the query heads of a group one below the other
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1).repeat(group, 1)
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
        self.q, self.k, self.v, self.proj = (linear(f"attention.{kind}") for kind in ("q", "k", "v", "proj"))
        self.q_gain = nn.Parameter(torch.full((h.num_heads, 1), h.qk_gain_init))
        self.value_gate = nn.Parameter(torch.zeros(1)) if h.vrl_enabled and layer else None
        self.head_dim, self.xsa = h.head_dim, layer >= h.num_layers - h.xsa_last_n

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], added_v: Tensor | None, first_v: Tensor | None):
        """x (B, T, d) -> output (B, T, d) and this layer's own values (B, T, kv_dim)."""
        own_v = self.v(x)
        v = own_v if added_v is None else own_v + added_v
        if self.value_gate is not None:
            v = v + torch.sigmoid(self.value_gate).to(x.dtype) * first_v
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (self.q(x), self.k(x), v))  # (B, T, H, D)
        q = rotate(norm(q), *rope) * self.q_gain.to(x.dtype)
        y = causal_attention(q, rotate(norm(k), *rope), v)
        y = exclude_self(y, v) if self.xsa else y
        return self.proj(y.flatten(2)), own_v

class MLP(nn.Module):
    """LeakyReLU(0.5)² between two maps, or GEGLU between three (arXiv:2002.05202)."""
    def __init__(self, h: Hyperparameters, linear: Callable[[str], nn.Module]):
        super().__init__()
        self.fc, self.proj = linear("mlp.fc"), linear("mlp.proj")
        self.gate = linear("mlp.gate") if h.mlp_gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.proj(self.fc(x) * self.gate(x, F.gelu))
        return self.proj(self.fc(x, lambda y: F.leaky_relu(y, 0.5).square()))

class Block(nn.Module):
    """Pre-norm attention and MLP, one after the other or side by side, on a learned mix, per channel, of the
    stream x and the embedding x0."""
    def __init__(self, h: Hyperparameters, layer: int, linear: Callable[[str], nn.Module]):
        super().__init__()
        self.attention, self.mlp = Attention(h, layer, linear), MLP(h, linear)
        self.norm_scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.parallel, self.dropout = layer >= h.parallel_from, nn.Dropout(h.dropout)
        share = 1 / (1 + math.exp(-3 * (layer / max(h.num_layers - 1, 1) - 0.5)))
        self.stream_mix = nn.Parameter(torch.full((h.model_dim,), share))
        self.embedding_mix = nn.Parameter(torch.full((h.model_dim,), 1 - share))
        self.attention_scale, self.mlp_scale = (nn.Parameter(torch.ones(h.model_dim)) for _ in range(2))

    def forward(self, x: Tensor, x0: Tensor, rope: tuple[Tensor, Tensor], added_v: Tensor | None,
                first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.stream_mix.to(x.dtype) * x + self.embedding_mix.to(x.dtype) * x0
        normed = norm(x) * self.norm_scale
        y, own_v = self.attention(normed, rope, added_v, first_v)
        x = x + self.attention_scale.to(x.dtype) * self.dropout(y)
        normed = normed if self.parallel else norm(x) * self.norm_scale
        return x + self.mlp_scale.to(x.dtype) * self.dropout(self.mlp(normed)), own_v

class LanguageModel(nn.Module):
    """What training, export and evaluation ask of a model: `predict`, and all that follows from it."""
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.table = {row.name: row for row in h.maps}
        self.frozen = [row for row in h.maps if row.basis != "learned"]
        self.alpha, self.temperature = h.distill_alpha, h.distill_temperature

    def predict(self, ids: Tensor, last: int) -> Tensor:
        """ids (B, T) -> logits of the last positions (B, last, vocabulary) float32."""
        raise NotImplementedError

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids (B, T), targets (B, n) of their last n positions -> loss of each in nats, (B, n) float32."""
        logits = self.predict(ids, targets.size(1))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def forward(self, ids: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        """The loss to train on: cross-entropy, mixed with α where a teacher's logits (B, T, vocabulary) are
        given: α CE + (1 - α) T² KL(teacher ‖ student), both at temperature T (arXiv:1503.02531)."""
        logits = self.predict(ids, ids.size(1))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if taught is None:
            return loss
        student, teacher = ((z / self.temperature).log_softmax(-1) for z in (logits, taught))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="sum") / targets.numel()
        return self.alpha * loss + (1 - self.alpha) * self.temperature**2 * divergence

    def fingerprint(self) -> str:
        """SHA-256 over the maps it computes with and all else that seeds drew, in the order of the table."""
        digest = hashlib.sha256()
        for row in self.frozen:
            for drawn in self.get_submodule(row.name).buffers():
                digest.update(drawn.cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

class GPT(LanguageModel):
    """The model of the map table and the settings; initial weights come from torch's global generator. A
    member of an ensemble finds its rows of the table by their prefix."""
    def __init__(self, h: Hyperparameters, dtype: torch.dtype = torch.float32, prefix: str = ""):
        super().__init__(h)
        self.softcap, self.bigram_buckets = h.logit_softcap, h.bigram_vocab_size
        self.value_layers, self.skipping = h.value_layers, h.num_layers // 2 if h.skips_enabled else 0
        self.recurs, self.order = True, list(range(h.num_layers))  # the order in which blocks run
        last = max(h.recurring_layers, default=-1) + 1
        again = h.recurring_layers * (h.recur_times - 1)
        self.recurrent_order = self.order[:last] + again + self.order[last:]
        random = [row for row in self.frozen if row.name.startswith(prefix)]
        with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
            maps = dict(zip(random, pool.map(draw_map, random)))

        def linear(layer: int, kind: str) -> nn.Module:
            row = self.table[f"{prefix}blocks.{layer}.{kind}"]
            return Linear(row, maps.get(row))

        self.embedding = Embedding(h.vocab_size, h.model_dim, h.tied_embed_init_std, dtype)
        if h.bigram_vocab_size > 1:
            self.bigram = nn.Sequential(Embedding(h.bigram_vocab_size, h.bigram_dim, 0.0, dtype),
                                        Linear(MapRow("bigram.1", h.model_dim, h.bigram_dim)))
            self.bigram_scale = nn.Parameter(torch.tensor([0.05]))
        self.smear_gate = nn.Parameter(torch.zeros(h.model_dim)) if h.smear_enabled else None
        if h.value_layers:
            self.value_embedding = nn.Sequential(Embedding(h.vocab_size, h.ve_dim, 0.01, dtype),
                                                 Linear(MapRow("value_embedding.1", h.kv_dim, h.ve_dim)))
            self.value_scales = nn.Parameter(torch.full((len(h.value_layers),), 0.1))
        self.blocks = nn.ModuleList(Block(h, i, functools.partial(linear, i)) for i in range(h.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(self.skipping, h.model_dim)) if self.skipping else None
        gated = self.skipping and h.skip_gates_enabled
        self.skip_gates = nn.Parameter(torch.zeros(self.skipping, h.model_dim)) if gated else None
        frequencies = h.rope_base ** -(torch.arange(0, h.rope_dims, 2) / max(h.rope_dims, 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> the last norm's output (B, T, d), which the logits are made of."""
        x = self.embedding(ids)
        if self.bigram_buckets > 1:  # a hash of two tokens; the last bucket where there is one only
            buckets = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % (self.bigram_buckets - 1)
            buckets = F.pad(buckets, (1, 0), value=self.bigram_buckets - 1)
            x = x + self.bigram(buckets) * self.bigram_scale.to(x.dtype)
        x = norm(x)
        if self.smear_gate is not None:  # SmearGate: a mix with the position before, per channel
            x = torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), torch.sigmoid(self.smear_gate).to(x.dtype))
        angles = torch.arange(ids.size(1), device=ids.device)[:, None, None] * self.frequencies
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # each (T, 1, rope_dims / 2)
        added_v = self.value_embedding(ids) if self.value_layers else None
        x0, skips, first_v = x, {}, None  # skips: the stream after each layer of the first half
        for layer in self.recurrent_order if self.recurs else self.order:
            if 0 <= (i := layer - self.skipping) < self.skipping:
                skip = self.skip_weights[i].to(x.dtype) * skips[self.skipping - 1 - i]
                if self.skip_gates is None:
                    x = x + skip
                else:
                    x = torch.lerp(skip, x, self.skip_gates[i].sigmoid().to(x.dtype))
            v = None
            if layer in self.value_layers:
                v = added_v * self.value_scales[self.value_layers.index(layer)].to(x.dtype)
            x, own_v = self.blocks[layer](x, x0, rope, v, first_v)
            first_v = own_v if first_v is None else first_v
            if layer < self.skipping:
                skips[layer] = x
        return norm(x)

    def recur(self, on: bool) -> None:
        """Whether RECUR_LAYERS run several times."""
        self.recurs = on

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, d) -> (…, vocabulary) float32, softly capped."""
        return self.softcap * torch.tanh(self.embedding(hidden).float() / self.softcap)

    def predict(self, ids: Tensor, last: int) -> Tensor:
        return self.logits(self.hidden(ids)[:, -last:])

class Ensemble(LanguageModel):
    """Models in one artifact (PR #1301): each learns for itself, the mean of their logits predicts."""
    def __init__(self, h: Hyperparameters, dtype: torch.dtype = torch.float32):
        super().__init__(h)
        self.members = nn.ModuleList(GPT(h, dtype, f"members.{i}.") for i in range(h.ensemble))

    def predict(self, ids: Tensor, last: int) -> Tensor:
        return sum(member.predict(ids, last) for member in self.members) / len(self.members)

    def forward(self, ids: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        return sum(member(ids, targets, taught) for member in self.members) / len(self.members)

    def recur(self, on: bool) -> None:
        for member in self.members:
            member.recur(on)

def make_model(h: Hyperparameters, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return Ensemble(h, dtype) if h.ensemble > 1 else GPT(h, dtype)

def describe_maps(model: LanguageModel) -> list[str]:
    """The map table of a built model as text: one line for the maps of a kind that are alike."""
    alike: dict[tuple, list[MapRow]] = {}
    for row in model.table.values():
        kind = re.sub(r"blocks\.\d+\.", "", row.name)
        alike.setdefault((kind, *row._replace(name="", seed=0)), []).append(row)
    lines = ["map layers shape basis seed adapter scale gate freezes trained frozen stored".split()]
    totals = [0, 0, 0]
    for (kind, *_), rows in alike.items():
        row, modules = rows[0], [model.get_submodule(row.name) for row in rows]
        random = row.basis != "learned"
        layers = [re.search(r"blocks\.(\d+)", row.name)[1] for row in rows]
        whole = int(layers[-1]) - int(layers[0]) == len(layers) - 1
        counts = (sum(p.numel() for module in modules for p in module.parameters()),
                  random * len(rows) * row.out_features * row.in_features, sum(map(stored_bytes, modules)))
        totals = [total + count for total, count in zip(totals, counts)]
        basis = row.basis if row.gain == 1 else f"{row.gain:g}·{row.basis}"
        lines.append([kind, f"{layers[0]}-{layers[-1]}" if whole else ",".join(layers),
                      f"{row.out_features}x{row.in_features}", basis, f"{row.seed}.." if random else "",
                      row.adapter, row.scale, "none" if row.gate is None else f"{row.gate:g}",
                      f"at {row.freeze:g}" if row.freeze else "from start" if random else "never",
                      *(f"{count:,}" for count in counts)])
    lines.append(["all"] + [""] * 8 + [f"{total:,}" for total in totals])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]

# ---- Optimisers and averages -------------------------------------------------------------------------------
def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """(n, rows, columns) -> each matrix with singular values near 1, by a quintic Newton-Schulz iteration."""
    is_tall = g.size(1) > g.size(2)
    x = (g.mT if is_tall else g).to(torch.bfloat16 if g.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).to(g.dtype)

class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (Jordan et al. 2024); the processes share out each shape's batch."""
    def __init__(self, params, lr: float = 0.025, momentum: float = 0.95, backend_steps: int = 5,
                 weight_decay: float = 0.0, processes: Processes | None = None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.backend_steps, self.processes = backend_steps, processes

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                updates = self._updates(params, group["momentum"])
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _updates(self, params: list[nn.Parameter], momentum: float) -> list[Tensor]:
        gradients = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        stacked = torch.stack(torch._foreach_add(gradients, momenta, alpha=momentum))
        if self.processes is None or self.processes.count == 1:
            return list(orthogonalize(stacked, self.backend_steps))
        everyone, mine = torch.zeros_like(stacked), slice(self.processes.rank, None, self.processes.count)
        everyone[mine] = orthogonalize(stacked[mine], self.backend_steps)
        return list(self.processes.sum_(everyone))

class Optimizers:
    """Muon for the matrices, AdamW for the rest; `step` averages the gradients, clips and applies them."""
    def __init__(self, groups: dict[str, dict[str, nn.Parameter]], h: Hyperparameters, processes: Processes):
        self.h, self.processes = h, processes
        self.params = [p for group in groups.values() for p in group.values()]
        by_role = {role: list(group.values()) for role, group in groups.items()}
        matrices = [{"params": by_role[MATRIX] + by_role[MASK]}]
        self.muon = Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, h.muon_wd, processes)
        rates = {EMBEDDING: (h.tied_embed_lr, h.embed_wd), SCALAR: (h.scalar_lr, h.adam_wd),
                 SPARSE: (h.sparse_lr, h.muon_wd)}
        adam = [{"params": by_role[role], "lr": lr, "weight_decay": wd} for role, (lr, wd) in rates.items()]
        self.adam = torch.optim.AdamW(adam, 0.0, (h.beta1, h.beta2), h.adam_eps, fused=True)
        self.base_lrs = [(g, g["lr"]) for g in self.muon.param_groups + self.adam.param_groups]

    def step(self, step: int, scale: float) -> None:
        """`scale` is the learning rates' share of their base values."""
        h, warm = self.h, min(1.0, step / max(self.h.muon_momentum_warmup_steps, 1))
        momentum = (1 - warm) * h.muon_momentum_warmup_start + warm * h.muon_momentum
        self.muon.param_groups[0]["momentum"] = momentum
        for group, lr in self.base_lrs:
            group["lr"] = lr * scale
        if self.processes.count > 1:  # the mean over the processes, in one message
            gradients = [p.grad for p in self.params if p.grad is not None]  # of all that is not frozen
            mean = self.processes.sum_(torch.nn.utils.parameters_to_vector(gradients)) / self.processes.count
            torch.nn.utils.vector_to_parameters(mean, gradients)
        if h.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.params, h.grad_clip_norm)
        self.muon.step()
        self.adam.step()
        for p in self.params:
            p.grad = None

    def forget_frozen(self) -> None:
        """Frees the state of what is no longer learned."""
        for p in self.params:
            if not p.requires_grad:
                self.muon.state.pop(p, None)
                self.adam.state.pop(p, None)

class Averages:
    """Averages of the weights, candidates for the export beside the last: `ema`, divided by 1 - dᵗ so that
    adapters, which start at zero as it does, are not drawn back to it; `swa`, the mean of late weights. What
    was frozen on the way stays where it stands."""
    def __init__(self, params: list[nn.Parameter], h: Hyperparameters):
        self.h, self.params = h, params
        wanted = {"ema": h.ema_decay, "swa": h.swa_enabled}
        self.sums = {name: {p: torch.zeros_like(p) for p in params} for name, on in wanted.items() if on}
        self.totals = dict.fromkeys(self.sums, 0.0)

    @torch.no_grad()
    def update(self, step: int, scale: float) -> None:
        if self.h.ema_decay:
            ema = self.sums["ema"]
            torch._foreach_lerp_(list(ema.values()), list(ema), 1 - self.h.ema_decay)
            self.totals["ema"] += (1 - self.h.ema_decay) * (1 - self.totals["ema"])
        if self.h.swa_enabled and scale < self.h.swa_threshold and step % self.h.swa_interval == 0:
            swa = self.sums["swa"]
            torch._foreach_add_(list(swa.values()), list(swa))
            self.totals["swa"] += 1.0

    def forget_frozen(self) -> None:
        """Frees the averages of what is no longer learned."""
        self.sums = {name: {p: mean for p, mean in sums.items() if p.requires_grad}
                     for name, sums in self.sums.items()}

    def candidates(self) -> dict[str, list[Tensor]]:
        """The weights to choose from, each a list like `params`."""
        found = {"last": [p.detach().clone() for p in self.params]}
        for name, total in self.totals.items():
            if total:
                sums = self.sums[name]
                found[name] = [sums[p] / total if p in sums else last
                               for p, last in zip(self.params, found["last"])]
        return found

# ---- Quantisation ------------------------------------------------------------------------------------------
class Codes(NamedTuple):
    """A quantised matrix: value = code · 2^((exponent - 160) / 8), one exponent a row (0: a zero row)."""
    codes: Tensor  # (rows, columns) int8
    exponents: Tensor  # (rows,) uint8

    def values(self) -> Tensor:
        """(rows, columns) float32."""
        return (self.codes * row_steps(self.exponents)).float()

def row_steps(exponents: Tensor) -> Tensor:
    """(rows,) uint8 -> (rows, 1) float64: the width of each row's quantisation step."""
    return torch.exp2((exponents.double() - 160) / 8).where(exponents > 0, 0.0)[..., None]

class Quantizer(NamedTuple):
    """Symmetric, one step width a row: its largest code stands for `sigmas` root mean squares of the row.
    Entropy coding comes after: the width, and hardly the number of codes, sets the bytes."""
    bits: int
    sigmas: float
    damping: float = 0.01
    prune_pct: float = 0.0

    def exponents(self, w: Tensor) -> Tensor:
        step = w.double().square().mean(-1).sqrt() * self.sigmas / (2 ** (self.bits - 1) - 1)
        return torch.where(step > 0, (160 + 8 * step.log2()).round().clamp(1, 255), 0).to(torch.uint8)

    def round(self, w: Tensor, steps: Tensor) -> Tensor:
        """The codes nearest to w, as floats."""
        largest = 2 ** (self.bits - 1) - 1
        return (w / steps.clamp(min=1e-30)).round().clamp(-largest, largest)

    def prune(self, w: Tensor) -> Tensor:
        """w, its smallest values set to zero."""
        count = int(w.size(-2) * w.size(-1) * self.prune_pct / 100)
        return w * (w.abs() > w.abs().flatten(-2).kthvalue(count).values[..., None, None]) if count else w

    def nearest(self, w: Tensor) -> Tensor:
        """w (rows, columns) as the artifact would hold it, without error feedback. Late QAT trains this."""
        w, steps = self.prune(w), row_steps(self.exponents(w))
        return (self.round(w.double(), steps) * steps).to(w.dtype)

    def gptq(self, w: Tensor, hessian: Tensor | None, block: int = 128) -> Codes:
        """Codes that keep w x near, w (rows, columns), for inputs of `hessian` (columns, columns) = Σ x xᵀ.
        GPTQ (arXiv:2210.17323): column by column, largest input first, each column's rounding error is made
        good in those that follow. Without a Hessian every value is rounded to the nearest."""
        exponents, kept, w = self.exponents(w), self.prune(w) != 0, w.double()
        steps, codes = row_steps(exponents), torch.empty_like(w)
        if hessian is None:
            return Codes((self.round(w, steps) * kept).to(torch.int8), exponents)
        order = hessian.diagonal().argsort(descending=True)
        w, kept, hessian = w[:, order], kept[:, order], hessian[order][:, order].double()
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean() + 1e-12)
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
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
    """How each role is stored as codes; SCALAR is float16, MASK is bits."""
    matrix = Quantizer(h.matrix_bits, h.matrix_clip_sigmas, h.gptq_damping, h.prune_pct)
    return {MATRIX: matrix, SPARSE: matrix,
            EMBEDDING: Quantizer(h.embed_bits, h.embed_clip_sigmas, h.gptq_damping)}

@contextlib.contextmanager
def weights_as_stored(groups: dict[str, dict[str, nn.Parameter]], quantizers: dict[str, Quantizer]):
    """Within, every tensor that the artifact quantises holds its quantised value; after, its own again. So a
    gradient taken within is the straight-through one, and a compiled graph need not know of it."""
    stored = [(quantizers[role], p.detach()) for role in quantizers for p in groups[role].values()]
    masters = [p.clone() for _, p in stored]
    for key in dict.fromkeys((quantizer, p.shape) for quantizer, p in stored):  # by shape, not one by one
        alike = [p for quantizer, p in stored if (quantizer, p.shape) == key]
        torch._foreach_copy_(alike, key[0].nearest(torch.stack(alike)).unbind())
    try:
        yield
    finally:
        torch._foreach_copy_([p for _, p in stored], masters)

@torch.no_grad()
def collect_hessians(model: LanguageModel, batches: Iterable[Tensor],
                     processes: Processes) -> dict[nn.Module, Tensor]:
    """Σ x xᵀ (in, in) float32 of the inputs of all that owns matrices, over the batches of all processes, ids
    left out; adapters have those of their map."""
    hessians: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].is_floating_point():
            x = inputs[0].flatten(0, -2).float()  # a product rounded to bfloat16 need not be positive
            hessians[module] = hessians.get(module, 0) + x.t() @ x

    owners = [module for module in model.modules() if isinstance(module, Owner)]
    used = [module for module in owners if any(tensors_by_role(module)[role] for role in (MATRIX, EMBEDDING))]
    hooks = [module.register_forward_pre_hook(add) for module in used]
    for ids in batches:
        model.predict(ids, ids.size(1))
    for hook in hooks:
        hook.remove()
    hessians = {module: processes.sum_(hessian) for module, hessian in hessians.items()}
    return {owner: hessian for module, hessian in hessians.items() for owner in module.modules()}

# ---- Artifact ----------------------------------------------------------------------------------------------
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"RANDMAPS", 1
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
PACK = {"brotli": functools.partial(brotli.compress, quality=11, lgwin=24),
        "lzma": functools.partial(lzma.compress, format=lzma.FORMAT_ALONE, filters=LZMA_FILTERS)}
UNPACK = {"brotli": brotli.decompress, "lzma": lzma.decompress}
GROUP_TYPES = {"codes": torch.int8, "exponents": torch.uint8, "float16": torch.float16, "bits": torch.bool}

VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "machine": platform.machine(), "flash_attention_3": flash_attention_3 is not None}

def write_artifact(header: dict, tensors: dict[str, Codes | Tensor]) -> tuple[bytes, dict[str, int]]:
    """The artifact's bytes, and how many of them each group of like tensors takes. Little-endian: magic (8
    bytes), format version and length of the header (uint32 each), header (JSON, brotli), the groups, SHA-256
    over all before it. To `header` come the versions at work, the tensor table [name, shape, groups] and the
    groups [name, codec, packed size]. A group is its tensors' values in byte planes, all first bytes and then
    all second ones, or 8 bits to the byte, packed by the codec that makes it smallest."""
    table, groups = [], {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].rpartition(".")[-1]):
        kind, parts = name.rpartition(".")[-1], {"float16": tensor}
        if isinstance(tensor, Codes):
            parts = {f"{kind} codes": tensor.codes, f"{kind} exponents": tensor.exponents}
        elif tensor.dtype is torch.bool:
            parts = {f"{kind} bits": F.pad(tensor.flatten(), (0, -tensor.numel() % 8))}
        table.append([name, list((tensor.codes if isinstance(tensor, Codes) else tensor).shape), list(parts)])
        for group, part in parts.items():
            groups.setdefault(group, []).append(part.cpu().flatten().to(GROUP_TYPES[group.split()[-1]]))

    def pack(parts: list[Tensor]) -> tuple[str, bytes]:
        values = torch.cat(parts)
        if values.dtype is torch.bool:
            raw = np.packbits(values.numpy()).tobytes()
        else:
            raw = values[:, None].view(torch.uint8).t().contiguous().numpy().tobytes()
        return min(((codec, pack(raw)) for codec, pack in PACK.items()), key=lambda pair: len(pair[1]))

    with ThreadPoolExecutor() as pool:
        packed = dict(zip(groups, pool.map(pack, groups.values())))
    entries = [[group, codec, len(data)] for group, (codec, data) in packed.items()]
    text = json.dumps(header | {"versions": VERSIONS, "tensors": table, "groups": entries})
    text = brotli.compress(text.encode())
    numbers = np.array([ARTIFACT_VERSION, len(text)], "<u4").tobytes()
    body = b"".join([ARTIFACT_MAGIC, numbers, text, *(data for _, data in packed.values())])
    return body + hashlib.sha256(body).digest(), {"header": len(text) + 48} | {e[0]: e[2] for e in entries}

def read_artifact(blob: bytes) -> tuple[dict, dict[str, Tensor]]:
    """The header, and every tensor by name in float32. UserError for all but what `write_artifact` makes."""
    if len(blob) < 48 or blob[:8] != ARTIFACT_MAGIC:
        raise UserError(f"not an artifact of this project: {len(blob)} bytes that begin with {blob[:8]!r}")
    if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
        raise UserError("the artifact is damaged, its checksum does not match; copy it again")
    version, size = np.frombuffer(blob[8:16], "<u4").tolist()
    if version != ARTIFACT_VERSION:
        raise UserError(f"the artifact has format version {version}, this script reads {ARTIFACT_VERSION}")
    header = json.loads(brotli.decompress(blob[16 : 16 + size]))
    place, streams, tensors = 16 + size, {}, {}
    for group, codec, packed in header["groups"]:
        dtype, raw = GROUP_TYPES[group.split()[-1]], bytearray(UNPACK[codec](blob[place : place + packed]))
        if dtype is torch.bool:
            streams[group] = torch.from_numpy(np.unpackbits(np.frombuffer(raw, np.uint8)))
        else:
            planes = torch.frombuffer(raw, dtype=torch.uint8).view(dtype.itemsize, -1)
            streams[group] = planes.t().contiguous().view(dtype).flatten()
        place += packed
    for name, shape, groups in header["tensors"]:
        parts = []
        for group, count in zip(groups, (math.prod(shape), *shape)):
            parts.append(streams[group][:count])
            streams[group] = streams[group][count + (-count % 8 if group.endswith("bits") else 0) :]
        values = parts[0].view(shape)
        tensors[name] = values.float() if len(parts) == 1 else Codes(values, parts[1]).values()
    return header, tensors

def export(h: Hyperparameters, processes: Processes, model: LanguageModel, data: TrainingData, step: int,
           tokenizer: Tokenizer, log: Log) -> bytes:
    """The artifact of the model, on every process; UserError if it and the code are over the limit."""
    size, first = max(1, 16_384 // h.train_seq_len), step * (h.train_batch_tokens // h.train_seq_len)
    rounds = -(-h.gptq_calib_batches // processes.count)  # the same number on every process
    mine = range(processes.rank, rounds * processes.count, processes.count)
    batches = (data.sequences(first + i * size, size)[:, :-1].to(processes.device) for i in mine)
    hessians = collect_hessians(model, batches, processes)
    if processes.rank:
        return processes.share(None)
    tensors, quantizers = dict(model.state_dict()), quantizers_of(h)
    for prefix, module in model.named_modules():
        if isinstance(module, Owner):
            codes = module.quantize(quantizers, hessians.get(module))
            tensors |= {f"{prefix}.{name}": value for name, value in codes.items()}
    facts = {"fingerprint": model.fingerprint(), "tokenizer": tokenizer.sha256}
    blob, sizes = write_artifact({"model": h.model_settings()} | facts, tensors)
    log("artifact bytes: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    code, limit = os.path.getsize(__file__), h.artifact_limit_bytes
    total = f"code {code:,} + model {len(blob):,} = {code + len(blob):,} bytes"
    log(f"artifact {total}, {(code + len(blob)) / limit:.1%} of {limit:,}")
    if code + len(blob) > limit:
        raise UserError(f"{total}, over the limit of {limit:,}; checkpoint.pt has the weights: export"
                        " them with EXPORT_ONLY=1 CHECKPOINT_PATH=… and a larger MATRIX_CLIP_SIGMAS or"
                        " EMBED_CLIP_SIGMAS, or train a smaller rank or width")
    return processes.share(blob)

def build_model(header: dict, tensors: dict[str, Tensor], processes: Processes) -> LanguageModel:
    """A model that computes from an artifact alone; its maps are drawn anew and proved to be the same."""
    model = make_model(Hyperparameters(environment={}, **header["model"]), processes.dtype)
    here, there = model.fingerprint(), header["fingerprint"]
    if here != there:
        raise UserError(f"the random maps drawn here are not the artifact's ({here[:16]}, not {there[:16]}):"
                        f" it was made with {header['versions']}, this is {VERSIONS}; use the same versions")
    model.load_state_dict(tensors)
    return model.to(processes.device).eval()

# ---- Evaluation --------------------------------------------------------------------------------------------
def plan_windows(targets: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each window starts, and how many of its last positions it scores: those that none before did. The
    first scores all its positions, the last, which ends with the stream, what remains, others `stride`."""
    starts = np.append(np.arange(0, targets - length, stride), targets - length)
    return starts, np.diff(starts + length, prepend=0)

@torch.no_grad()
def evaluate(model: LanguageModel, val: ValidationStream, h: Hyperparameters, processes: Processes,
             stride: int, log: Log) -> tuple[float, float]:
    """Mean loss in nats and bits per byte over every token of the stream after the first, each scored once.
    The batches are the same for any number of processes, which take them in turn."""
    model.eval()
    targets = len(val.tokens) - 1
    length = min(h.eval_seq_len, targets)
    starts, counts = plan_windows(targets, length, stride)
    per_batch = max(1, h.eval_batch_tokens // length)
    batches = [slice(0, 1)] + [slice(i, i + per_batch) for i in range(1, len(starts), per_batch)]
    compiled = torch.compile(model.losses, dynamic=False) if processes.compile else model.losses
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    for done, batch in enumerate(batches[processes.rank :: processes.count]):
        places = torch.from_numpy(starts[batch, None] + np.arange(length + 1))
        rows, tail = val.tokens[places].to(processes.device), int(counts[batch].max())
        score = compiled if (len(rows), tail) == (per_batch, stride) else model.losses  # others stay eager
        losses = score(rows[:, :-1], rows[:, 1:][:, -tail:])  # (windows, tail)
        seen = torch.arange(tail)[None] < tail - torch.from_numpy(counts[batch, None])  # in earlier windows
        total += losses.double().masked_fill(seen.to(processes.device), 0.0).sum()
        log.progress(f"evaluating: {100 * done * processes.count // len(batches)}%")
    nats = processes.sum_(total).item()
    return nats / targets, nats / math.log(2) / val.bytes

# ---- Training ----------------------------------------------------------------------------------------------
class Clock:
    """How many steps remain, by their number and by the wall-clock, whichever ends first. A step's time is
    the median of recent ones: a slow step costs its time, and does not move the schedule."""
    def __init__(self, iterations: int, seconds: float):
        self.iterations, self.seconds = iterations, seconds if seconds > 0 else math.inf
        self.elapsed, self.recent = 0.0, []

    def step_took(self, seconds: float) -> None:
        self.elapsed += seconds
        self.recent = self.recent[-99:] + [seconds]

    def remaining(self, step: int) -> int:
        left = max(0.0, self.seconds - self.elapsed)
        known = len(self.recent) >= 5 or left == 0
        return int(min(self.iterations - step, left / statistics.median(self.recent) if known else math.inf))

    def share(self, step: int) -> float:
        """The share of training that is over, by steps or by the wall-clock, whichever is further on."""
        return min(1.0, max(step / self.iterations, self.elapsed / self.seconds))

    def times(self, step: int) -> str:
        return f"train_time:{1000 * self.elapsed:.0f}ms step_avg:{1000 * self.elapsed / max(step, 1):.2f}ms"

def warmdown_scale(step: int, remaining: int, warmdown: int) -> float:
    """1, then linear to 0 over the last `warmdown` steps, or over all where there are fewer."""
    return min(1.0, remaining / max(1, min(warmdown, step + remaining)))

def accumulate_gradients(forward: Callable, batches: list[tuple[Tensor, Tensor]],
                         teach: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Adds up the gradients of the mean loss over micro-batches; gives that loss, still on the device."""
    total = 0.0
    for ids, targets in batches:
        loss = forward(ids, targets, teach(ids)) / len(batches)
        loss.backward()
        total = total + loss.detach()
    return total

class Stages:
    """What changes at a share of training, and nowhere else: maps freeze, layers begin to recur, a teacher
    speaks. A stage may be entered from any other, so that all can be compiled before the clock starts."""
    def __init__(self, h: Hyperparameters, model: LanguageModel, teacher: LanguageModel | None,
                 compiled: bool = False):
        self.h, self.model, self.teacher, self.current, self.teaches = h, model, teacher, 0.0, False
        marks = {0.0} | {row.freeze for row in h.maps} | ({h.recur_frac} if h.recurring_layers else set())
        if h.self_distill:
            self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        marks |= {h.distill_start_frac, h.distill_end_frac} if self.teacher else set()
        self.marks = sorted(marks - {1.0})
        if self.teacher:
            predict = self.teacher.predict
            self.predict = torch.compile(predict, dynamic=False) if compiled else predict

    def enter(self, share: float) -> str:
        """Sets the model up for the last stage that begins by this share of training; says what it is."""
        mark = self.marks[bisect.bisect(self.marks, share) - 1]
        frozen = [0 < row.freeze <= mark for row in self.h.maps]
        for row, stands_still in zip(self.h.maps, frozen):
            self.model.get_submodule(row.name).requires_grad_(not stands_still)
        self.model.recur(recurs := bool(self.h.recurring_layers) and self.h.recur_frac <= mark)
        taught, self.teaches = self.teaches, bool(self.teacher) and (
            self.h.distill_start_frac <= mark < self.h.distill_end_frac)
        if self.h.self_distill and self.teaches and not taught:
            self.teacher.load_state_dict(self.model.state_dict())  # in place: a new tensor means a new graph
            self.teacher.recur(recurs)
        self.current = mark
        return f"frozen_maps:{sum(frozen)} recurrence:{recurs} teacher:{self.teaches}"

    @torch.no_grad()
    def teach(self, ids: Tensor) -> Tensor | None:
        """The teacher's logits (B, T, vocabulary), where there is one at this stage."""
        return self.predict(ids, ids.size(1)) if self.teaches else None

def warm_up(h: Hyperparameters, processes: Processes, forward: Callable, stages: Stages, data: TrainingData,
            groups: dict[str, dict[str, nn.Parameter]]) -> None:
    """Runs every stage, and so compiles it, before the clock starts; the weights are as before."""
    optimizers = Optimizers(groups, h, processes)
    initial = [p.detach().clone() for p in optimizers.params]
    for step, mark in itertools.product(range(-(-h.warmup_steps // len(stages.marks))), stages.marks):
        stages.enter(mark)
        accumulate_gradients(forward, data.micro_batches(step, processes), stages.teach)
        optimizers.step(step, 1.0)
    torch._foreach_copy_([p.detach() for p in optimizers.params], initial)  # in place: else a new graph

@torch.no_grad()
def choose_average(model: LanguageModel, params: list[nn.Parameter], candidates: dict[str, list[Tensor]],
                   data: TrainingData, processes: Processes, log: Log) -> dict[str, float]:
    """Leaves in the model the candidate with the least loss on the text held out of training; the losses."""
    model.eval()
    scores, holdout = {}, data.read(data.held_out)
    for name, weights in candidates.items():
        torch._foreach_copy_([p.detach() for p in params], weights)
        total = torch.zeros((), dtype=torch.float64, device=processes.device)
        for rows in holdout.split(max(1, 16_384 // data.h.train_seq_len))[processes.rank :: processes.count]:
            rows = rows.to(processes.device)
            total += model.losses(rows[:, :-1], rows[:, 1:]).double().sum()
        scores[name] = processes.sum_(total).item() / holdout[:, 1:].numel()
    best = min(scores, key=scores.get)
    if not math.isfinite(scores[best]):
        raise UserError(f"the loss of the trained weights is not finite: {scores}; lower the learning rates")
    torch._foreach_copy_([p.detach() for p in params], candidates[best])
    log("average " + " ".join(f"{name}:{score:.4f}" for name, score in scores.items()) + f" exported:{best}")
    return scores

def train(h: Hyperparameters, processes: Processes, model: LanguageModel, teacher: LanguageModel | None,
          data: TrainingData, val: ValidationStream, log: Log) -> dict:
    """Trains the model, leaves in it the average that does best on held-out training text; gives figures."""
    groups, quantizers = tensors_by_role(model), quantizers_of(h)
    stages = Stages(h, model, teacher, processes.compile)
    forward = model
    if processes.compile:
        torch._dynamo.config.recompile_limit = 8 + 2 * len(stages.marks)  # each stage is a graph of its own
        forward = torch.compile(model, dynamic=False, fullgraph=True)
    model.train()
    warm_up(h, processes, forward, stages, data, groups)
    stages.enter(0.0)
    optimizers = Optimizers(groups, h, processes)
    averages = Averages(optimizers.params, h)
    clock = Clock(h.iterations, h.max_wallclock_seconds - h.gptq_reserve_seconds)
    step, qat, loss, began = 0, False, None, time.perf_counter()
    while True:
        remaining, share = processes.share((clock.remaining(step), clock.share(step)))
        share = share if remaining > 0 else 1.0
        validates = h.val_loss_every and step and step % h.val_loss_every == 0
        if processes.on_cuda and (validates or remaining <= 0):
            torch.cuda.synchronize()  # what is still queued is training
            clock.elapsed += time.perf_counter() - began
        if bisect.bisect(stages.marks, share) > bisect.bisect(stages.marks, stages.current):
            entered = stages.enter(share)
            log(f"stage step:{step} share:{share:.4f} {entered}")
            optimizers.forget_frozen()
            averages.forget_frozen()
        if remaining <= 0:
            began = time.perf_counter()
            scores = choose_average(model, optimizers.params, averages.candidates(), data, processes, log)
            choice_seconds = time.perf_counter() - began
        if remaining <= 0 or validates:
            nats, bpb = evaluate(model, val, h, processes, h.eval_seq_len, log)
            log(f"step:{step}/{h.iterations} val_loss:{nats:.4f} val_bpb:{bpb:.4f} {clock.times(step)}")
            began = time.perf_counter()
        if remaining <= 0:
            speed = round(h.train_batch_tokens * step / clock.elapsed)
            return {"steps": step, "train_seconds": round(clock.elapsed, 3), "tokens_per_second": speed,
                    **{f"holdout_loss_{name}": score for name, score in scores.items()},
                    "choice_seconds": round(choice_seconds, 3),
                    "val_loss_before": nats, "val_bpb_before": bpb}
        scale, previous = warmdown_scale(step, remaining, h.warmdown_iters), loss
        if h.warmdown_frac:
            scale = min(1.0, (1 - share) / h.warmdown_frac)
        if scale < h.late_qat_threshold and not qat:
            qat = True
            log(f"late_qat:on step:{step} scale:{scale:.4f}")
        if h.dropout:  # a stream of its own for each step and process
            torch.manual_seed(h.seed + step * processes.count + processes.rank)
        model.train()
        with weights_as_stored(groups, quantizers) if qat else contextlib.nullcontext():
            loss = accumulate_gradients(forward, data.micro_batches(step, processes), stages.teach)
        optimizers.step(step, scale)  # on the float32 masters
        averages.update(step, scale)
        step += 1
        if previous is not None and not math.isfinite(previous.item()):  # waits for the step before this one
            raise UserError(f"the loss of step {step - 1} is not finite; lower the learning rates")
        clock.step_took(time.perf_counter() - began)
        began = time.perf_counter()
        log.progress(f"step {step}, {remaining - 1} to go, {(remaining - 1) * clock.elapsed / step:.0f} s,"
                     f" {h.train_batch_tokens * step / clock.elapsed:,.0f} tokens/s")
        if h.train_log_every and (step <= 10 or step % h.train_log_every == 0):
            mean = processes.sum_(loss.clone()).item() / processes.count
            log(f"step:{step}/{h.iterations} train_loss:{mean:.4f} {clock.times(step)}")

# ---- Main --------------------------------------------------------------------------------------------------
def train_and_export(h: Hyperparameters, processes: Processes, device: str, tokenizer: Tokenizer,
                     val: ValidationStream, folder: Path, saved: dict | None, log: Log) -> tuple[bytes, dict]:
    """The artifact of a new model, or of a saved one, and the run's figures."""
    data, teacher = TrainingData(h), None
    if h.distill_from and not saved:
        header, tensors = read_artifact(read_file("DISTILL_FROM", h.distill_from))
        if header["tokenizer"] != tokenizer.sha256:
            raise UserError(f"DISTILL_FROM={h.distill_from}: the teacher has another tokenizer")
        teacher = build_model(header, tensors, processes).requires_grad_(False)
    torch.manual_seed(h.seed)
    model = (build_model(saved, saved["weights"], processes) if saved
             else make_model(h, processes.dtype).to(processes.device))
    fingerprint = model.fingerprint()
    if processes.share(fingerprint) != fingerprint:
        raise UserError("the processes draw different random maps; use the same versions on all machines")
    log(Path(__file__).read_text(encoding="utf-8"), console=False)  # a log is enough to repeat the run
    for f in dataclasses.fields(h):
        log(f"{f.name.upper()}={getattr(h, f.name)}", console=False)
    for row in model.table.values():
        log("map " + " ".join(f"{key}:{value}" for key, value in row._asdict().items()), console=False)
    for line in describe_maps(model):
        log(line)
    counts = {"trained_parameters": sum(p.numel() for p in model.parameters()),
              "frozen_parameters": sum(row.out_features * row.in_features for row in model.frozen)}
    log("model {trained_parameters:,} trained and {frozen_parameters:,} frozen parameters".format(**counts))
    log(f"{len(model.frozen)} of {len(model.table)} maps come from their seeds and cost 0 bytes; all that is"
        f" learned takes {stored_bytes(model):,} before it is packed")
    log(f"versions {json.dumps(VERSIONS)} device {device}, {torch.get_num_threads()} threads")
    figures = saved["figures"] if saved else counts | train(h, processes, model, teacher, data, val, log)
    del teacher  # its memory is the export's
    if processes.rank == 0:
        buffer = io.BytesIO()
        torch.save({"model": h.model_settings(), "fingerprint": model.fingerprint(), "versions": VERSIONS,
                    "figures": figures, "weights": model.state_dict()}, buffer)
        write_file(folder / "checkpoint.pt", buffer.getvalue())
    began = time.perf_counter()
    blob = export(h, processes, model, data, figures["steps"], tokenizer, log)
    if processes.rank == 0:
        write_file(folder / "model.int6.ptz", blob)
    seconds = time.perf_counter() - began + figures.get("choice_seconds", 0.0)
    return blob, figures | {"export_seconds": round(seconds, 3)}

def run(h: Hyperparameters, processes: Processes) -> None:
    """The job: train and export, unless there is an artifact; evaluate it from its bytes alone; report."""
    blob, saved, figures, folder = b"", None, {}, None
    if h.eval_only:
        blob = read_file("MODEL_PATH", h.model_path)
        h = h.adopt(read_artifact(blob)[0]["model"], f"MODEL_PATH={h.model_path}")
    elif h.export_only:
        checkpoint = io.BytesIO(read_file("CHECKPOINT_PATH", h.checkpoint_path))
        try:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            raise UserError(f"CHECKPOINT_PATH={h.checkpoint_path}: no checkpoint.pt, or a torn one") from None
        h = h.adopt(saved["model"], f"CHECKPOINT_PATH={h.checkpoint_path}")
    tokenizer = Tokenizer(h.tokenizer_path, h.vocab_size)
    tokenizer.check_manifest(h)
    val = ValidationStream(h, tokenizer)
    device = torch.cuda.get_device_name() if processes.on_cuda else f"{platform.machine()} CPU"
    if not h.eval_only:
        folder = Path(h.output_dir) / (h.run_id or time.strftime("%Y%m%d-%H%M%S"))
        if processes.rank == 0 and folder.exists():
            raise UserError(f"{folder} is another run's; choose a new RUN_ID")
    log = Log(processes.rank == 0, folder and folder / "train.log")
    if not h.eval_only:
        blob, figures = train_and_export(h, processes, device, tokenizer, val, folder, saved, log)
    header, tensors = read_artifact(blob)
    if header["tokenizer"] != tokenizer.sha256:
        raise UserError(f"TOKENIZER_PATH={h.tokenizer_path} is not the tokenizer the artifact was made with")
    began, codec = time.perf_counter(), max(header["groups"], key=lambda group: group[2])[1]
    model = build_model(header, tensors, processes)
    for kind, stride in (("roundtrip", h.eval_seq_len), ("sliding_window", h.eval_stride)):
        start = time.perf_counter()
        loss, bpb = evaluate(model, val, h, processes, stride, log)
        seconds, whole = (round(time.perf_counter() - since, 3) for since in (start, began))
        figures |= {f"val_loss_{kind}": loss, f"val_bpb_{kind}": bpb, "eval_seconds": whole}
        log(f"final_int6_{codec}_{kind} val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{stride}"
            f" eval_time:{1000 * seconds:.0f}ms")
        log(f"final_int6_{codec}_{kind}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if processes.rank == 0:
        report(h, f"{processes.count} x {device}", len(blob), val.text, figures, folder, log)

def report(h: Hyperparameters, hardware: str, model_bytes: int, text: bytes, figures: dict,
           folder: Path | None, log: Log) -> None:
    """The table for people, and submission.json."""
    code, sample = os.path.getsize(__file__), text[:4_000_000]
    log(f"\n{'':<34}{'val_loss':>10}{'val_bpb':>10}")
    labels = {"before": "before quantisation", "roundtrip": "artifact", "sliding_window": "artifact, sliding"}
    for kind, label in labels.items():
        if f"val_bpb_{kind}" in figures:
            log(f"{label:<34}{figures[f'val_loss_{kind}']:>10.4f}{figures[f'val_bpb_{kind}']:>10.4f}")
    part = "" if len(sample) == len(text) else ", first 4 MB"
    for name, packed in (("brotli 11", brotli.compress(sample)), ("xz -9", lzma.compress(sample, preset=9))):
        log(f"{'for scale, ' + name + part:<34}{'':>10}{8 * len(packed) / len(sample):>10.4f}")
    log(f"artifact {code + model_bytes:,} bytes: code {code:,}, model {model_bytes:,}")
    if folder:
        maps = f"maps {h.map_basis}, adapter {h.map_adapter}"
        submission = {
            "author": h.author, "github_id": h.github_id, "name": "Adapters on random linear maps",
            "blurb": f"{h.num_layers} layers of width {h.model_dim}, {maps}", "date": time.strftime("%F"),
            "val_loss": figures["val_loss_sliding_window"], "val_bpb": figures["val_bpb_sliding_window"],
            "bytes_total": code + model_bytes, "bytes_code": code, "dataset": Path(h.data_path).name,
            "hardware": hardware, "seeds": [h.seed], **figures}
        write_file(folder / "submission.json", (json.dumps(submission, indent=2) + "\n").encode())
        log(f"written: {folder}/ model.int6.ptz, submission.json, checkpoint.pt, train.log")

def main() -> None:
    try:
        h = Hyperparameters()
        with Processes(h) as processes:
            run(h, processes)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    main()
