"""Learning adapters on random linear maps: a language model for Parameter Golf in one script.

Most weight matrices are frozen random maps, regenerated from a seed and stored in 0 bytes. What is learned
around them is quantised, compressed and written as one artifact. Settings are environment variables.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # train, export, evaluate from the artifact
    EVAL_ONLY=1 MODEL_PATH=model.int6.ptz python train_gpt.py  # evaluate an artifact, as EVAL_* say
"""
from __future__ import annotations

import bisect, contextlib, copy, dataclasses, datetime, difflib, fcntl, functools, hashlib, io, itertools
import json, math, os, pickle, platform, re, shutil, signal, statistics, time, traceback, zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

try:
    import brotli, numpy as np, sentencepiece, torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, cpu, nn
except ImportError as missing:  # all of them now: the export needs one that the training does not
    raise SystemExit(f"error: {missing}; pip install -r requirements.txt") from None

# ---- Settings ----------------------------------------------------------------------------------------------
class UserError(Exception):
    """Something a person can mend: the message says what was wrong, where, and what to do."""

def setting(default, meaning: str, low=0, high=math.inf, choices=(), model=False):
    """One variable: its default (and so its type), meaning, range; `model`: the artifact must store it."""
    rule = {"meaning": meaning, "low": low, "high": high, "choices": choices, "model": model}
    return dataclasses.field(default=default, metadata=rule)

@dataclasses.dataclass(init=False)
class Hyperparameters:
    """Every setting: a keyword, else the variable of its name, else its default. UserError for all faults."""
    # Run
    run_id: str = setting("", "name of the run's folder; empty: the time of the start")
    resume: str = setting("auto", "continue RUN_ID if unfinished; 1: it must be", choices=("auto", "0", "1"))
    checkpoint_seconds: float = setting(60.0, "training time between checkpoints; 0: only at its end")
    timeout_seconds: float = setting(600.0, "longest wait of a process for the others", 1, 86_400)
    output_dir: str = setting("runs", "where the run's folder is made")
    seed: int = setting(1337, "seed of initial weights and data order", 0, 2**63 - 1)
    dtype: str = setting("auto", "activations; auto: the fast type", choices=("auto", "bfloat16", "float32"))
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    eval_only: int = setting(0, "1: evaluate the artifact MODEL_PATH, nothing else", 0, 1)
    model_path: str = setting("", "artifact that EVAL_ONLY reads")
    export_only: int = setting(0, "1: export and evaluate CHECKPOINT_PATH, do not train", 0, 1)
    checkpoint_path: str = setting("", "checkpoint that EXPORT_ONLY reads")
    model_limit_bytes: int = setting(2**30, "memory that a model may ask for when it is built", 1)
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
    ensemble: int = setting(1, "members in one artifact, whose logits are averaged", 1, 16, model=True)
    qk_gain_init: float = setting(1.5, "initial gain of each query head", 1e-3, 100)
    logit_softcap: float = setting(30.0, "logits are c·tanh(z/c)", 1e-3, 1e3, model=True)
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
    adam_eps: float = setting(1e-8, "AdamW: added to the deviation", 1e-30)
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
    gptq_calib_batches: int = setting(8, "calibration batches of 8,192 training tokens; 0: no GPTQ")
    prune_pct: float = setting(0.0, "percentage of each matrix, the smallest, set to zero", 0, 99)
    artifact_limit_bytes: int = setting(16_000_000, "code and model together", 1)
    # Evaluation
    eval_seq_len: int = setting(2048, "tokens of an evaluation window", 1, 2**20)
    eval_stride: int = setting(64, "new tokens that each window scores", 1)
    eval_mode: str = setting("exact", "window: one pass, sees EVAL_SEQ_LEN back", choices=("exact", "window"))
    eval_batch_tokens: int = setting(131_072, "tokens of one forward pass of the evaluation", 1)
    def __init__(self, /, environment: Mapping[str, str] = os.environ, **given):
        fields, problems = {f.name: f for f in dataclasses.fields(self)}, []
        names = [name for name in [*fields, *PUBLISHED] if name.upper() in environment]
        said = expand_published({name: environment[name.upper()] for name in names} | given, problems)
        self.given = set(said)  # names of what is not a default: somebody's words, or those of a file
        problems += [f"{name}: no such setting" for name in said if name not in fields]
        for name, f in fields.items():
            setattr(self, name, f.default)
            with noting(problems, f"{name.upper()}={said.get(name)}"):
                setattr(self, name, parse_setting(f, said.get(name, f.default)))
        self.head_dim = self.model_dim // self.num_heads
        self.kv_dim, self.mlp_dim = self.head_dim * self.num_kv_heads, int(self.mlp_mult * self.model_dim)
        self.value_layers, self.recurring_layers, self.maps = [], [], []
        for name, layers in (("ve_layers", self.value_layers), ("recur_layers", self.recurring_layers)):
            with noting(problems, f"{name.upper()}={(text := getattr(self, name))}"):
                layers += layers_of(text, self.num_layers) if name != "ve_layers" or self.ve_enabled else []
        problems += contradictions(self, environment) + foreign_variables(environment, self.allow_unknown)
        if not problems:  # the table of impossible shapes would only repeat what is wrong with them
            self.maps = map_table(self, problems)
        sizes = [row.out_features * row.in_features for row in self.maps] or [0]
        tables = self.vocab_size * (self.model_dim + self.ve_dim) + self.bigram_vocab_size * self.bigram_dim
        need = 4 * (sum(sizes) + self.ensemble * tables) + 64 * max(sizes)  # 64: while one is drawn
        need += sum(4 * size * (row[1] + row[2]) if type(size) is int else 12 * row[1] * row[2]  # int: a rank
                    for row in self.maps if not problems for size in row.adapters().values())
        if need > self.model_limit_bytes:  # a stranger's artifact must not ask for more, either
            problems.append(f"MODEL_LIMIT_BYTES={self.model_limit_bytes}, but the model needs {need:,} bytes")
        if problems:
            raise UserError("these settings cannot be used:\n  " + "\n  ".join(problems))
    def model_settings(self) -> dict:
        """What the artifact stores, and all that rebuilding the model depends on."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["model"]}
    def adopt(self, stored: dict, what: str, may_differ: Iterable[str] = ()) -> Hyperparameters:
        """These settings with those of an artifact or a checkpoint; UserError if one asked for others."""
        mine = {name: getattr(self, name) for name in self.given if name not in stored or name in may_differ}
        other = [f"{name.upper()}={getattr(self, name)} here, {stored[name]} there"
                 for name in sorted(self.given - mine.keys()) if getattr(self, name) != stored[name]]
        if other:
            raise UserError(f"{what} is of another model or run: {'; '.join(other)}. Unset what differs")
        return Hyperparameters({"WORLD_SIZE": os.environ.get("WORLD_SIZE", "")}, **(stored | mine))

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
    except (TypeError, ValueError):
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

def contradictions(h, environment: Mapping[str, str]) -> list[str]:
    """Settings that are fine alone and impossible together or under this launcher, with their numbers."""
    count = int(environment.get("WORLD_SIZE") or 1)
    wrong = {
        "RESUME=1 and torchrun's --max-restarts need RUN_ID, the run to continue": not h.run_id and (
            h.resume == "1" or environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"),
        f"NUM_HEADS={h.num_heads} must divide MODEL_DIM={h.model_dim}": h.model_dim % h.num_heads,
        f"NUM_KV_HEADS={h.num_kv_heads} must divide NUM_HEADS={h.num_heads}": h.num_heads % h.num_kv_heads,
        f"ROPE_DIMS={h.rope_dims} is odd or over the {h.head_dim} dimensions of a head":
            h.rope_dims % 2 or h.rope_dims > h.head_dim,
        f"EVAL_STRIDE={h.eval_stride} is over EVAL_SEQ_LEN={h.eval_seq_len}": h.eval_stride > h.eval_seq_len,
        f"TRAIN_BATCH_TOKENS={h.train_batch_tokens} is no multiple of TRAIN_SEQ_LEN={h.train_seq_len} times"
        f" {count} processes": not h.eval_only and h.train_batch_tokens % (h.train_seq_len * count),
        f"GPTQ_RESERVE_SECONDS={h.gptq_reserve_seconds:g} leaves nothing of MAX_WALLCLOCK_SECONDS to train":
            0 < h.max_wallclock_seconds <= h.gptq_reserve_seconds,
        f"MLP_MULT={h.mlp_mult:g} gives the MLP no hidden unit": h.mlp_dim < 1,
        "EVAL_ONLY=1 needs MODEL_PATH, the artifact to evaluate": h.eval_only and not h.model_path,
        "EXPORT_ONLY=1 needs CHECKPOINT_PATH, a checkpoint.pt": h.export_only and not h.checkpoint_path,
        "DISTILL_FROM and SELF_DISTILL=1 are two teachers": h.distill_from and h.self_distill,
        "SELF_DISTILL=1 needs DISTILL_START_FRAC over 0": h.self_distill and not h.distill_start_frac,
        f"DISTILL_END_FRAC={h.distill_end_frac} is not after DISTILL_START_FRAC={h.distill_start_frac}":
            h.distill_end_frac <= h.distill_start_frac}
    return [message for message, is_wrong in wrong.items() if is_wrong]

# Variables of published scripts: meaning, columns of the map table they set ({}: value), other defaults.
PUBLISHED = {
    "use_random_adapters": ("1: system A, every map random with LoRA", {"map_basis": "orthogonal"}, {}),
    "random_adapter_rank": ("rank of its LoRA", {"map_adapter": "lora:{}"}, {}),
    "random_adapter_seed": ("its seed", {"map_seed": "{}"}, {}),
    "random_basis_enabled": ("1: system B, random MLP with LoRA and a gate a hidden unit",
                             {"map_basis": "mlp=gaussian", "map_gate": "mlp.fc=0"},
                             {"map_adapter": "lora:16", "map_seed": "0xD15EA5E", "map_seed_stride": "1009"}),
    "random_basis_seed": ("its seed", {"map_seed": "{}"}, {}),
    "lora_rank": ("rank of its LoRA", {"map_adapter": "lora:{}"}, {}),
    "selective_freeze": ("1: system C, the MLP's input maps random", {"map_basis": "mlp.in=gaussian"},
                         {"map_adapter": "none", "map_seed": "42000"}),
    "progressive_freeze_frac": ("system D, share of training at which the MLP's input maps freeze",
                                {"map_freeze": "mlp.in={}"}, {"map_basis": "learned"}),
    "rand_proj_layers": ("PR #1228, layers of random up-projections", {"map_basis": "mlp.in@{}=orthogonal"},
                         {"map_adapter": "none"}),
    "rand_gain": ("1: a learned gain for each of their features", {"map_scale": "row"}, {})}
def expand_published(said: dict[str, object], problems: list[str]) -> dict[str, object]:
    """What was said, in the project's own vocabulary: the published variables replaced by what they mean."""
    columns = {name: value for name, value in said.items() if name not in PUBLISHED}
    firm = {name: (name, str(value)) for name, value in columns.items()}
    soft = {"map_basis": "learned"} if str(said.get("use_random_adapters")) == "0" else {}
    for name, (_, says, otherwise) in PUBLISHED.items():
        value = str(said.get(name, "")).replace(" ", "").replace(",", "+")
        is_flag = not any("{}" in text for text in says.values())
        if is_flag and value not in ("", "0", "1"):
            problems.append(f"{name.upper()}={value}: must be 0 or 1")
        if not value or (is_flag or name == "progressive_freeze_frac") and not value.strip("0."):
            continue
        soft = otherwise | soft
        for column, text in says.items():
            by, there = firm.setdefault(column, (name, text := text.replace("{}", value)))
            if there != text:
                problems.append(f"{name.upper()}={value} says {column.upper()}={text}, but {by.upper()} says"
                                f" {there}; unset one")
    return soft | {name: text for name, (_, text) in firm.items()} | columns

# Variables of published scripts for what is not here, and why it is not.
NOT_HERE = {"TTT_ENABLED": "test-time training is not built", "NGRAM_EVAL": "its probabilities sum to over 1",
            "KNN_LAMBDA": "a cache of hidden states gives no distribution that is fixed before scoring"}
def foreign_variables(environment: Mapping[str, str], allow_unknown: int) -> list[str]:
    """Variables that ask for what is not here, or look like a misspelt setting or run.sh's PRESET."""
    asked = [name for name in NOT_HERE if environment.get(name, "") not in ("", "0", "0.0")]
    problems = [f"{name}={environment[name]}: {NOT_HERE[name]}; unset it" for name in asked]
    names = [name.upper() for name in (*Hyperparameters.__dataclass_fields__, *PUBLISHED, "preset")]
    def one_less(name: str) -> set[str]:  # what two share if they differ by a letter
        return {name} | {name[:i] + name[i + 1 :] for i in range(len(name))}
    for name in [] if allow_unknown else sorted(set(environment) - {*names, *NOT_HERE}):
        near = [known for known in names if len(name) > 3 and one_less(known) & one_less(name)
                and (len(known) != len(name) or sorted(known) == sorted(name))]
        for known in difflib.get_close_matches(name, near or names, 1, 0 if near else 0.9):
            problems.append(f"{name}: no such setting; {known}? (ALLOW_UNKNOWN=1 accepts it)")
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
        chosen, (rows, columns) = {}, self[1:3]
        limits = {"rank": (1, min(rows, columns)), "density": (1 / columns, 1)}
        for name, colon, text in [part.partition(":") for part in self.adapter.split("+") if part != "none"]:
            if name not in ADAPTERS or name in chosen:
                raise ValueError(f"{name!r} is no adapter or stands twice; use {', '.join(ADAPTERS)} or none")
            low, high = limits.get(unit := ADAPTERS[name].size, (0, 0))
            with contextlib.suppress(ValueError):
                chosen[name] = int(text) if unit == "rank" else float(text or 0)
            if not low <= chosen.get(name, math.nan) <= high:
                needs = f"a {unit} from {low:.3g} to {high}" if unit else "no size"
                raise ValueError(f"{name + colon + text!r} needs {needs} on a map of {rows} x {columns}")
        return chosen

def read_cell(column: str, text: str) -> str | float | None:
    """One cell of a column from its text. ValueError says what is wrong with it."""
    words = {"basis": ["learned", *BASES], "scale": ["none", "map", "row"], "gate": ["none"]}
    if column == "adapter" or text in words.get(column, []):  # an adapter is read when its map is known
        return None if column == "gate" else text
    low, high = {"gain": (1e-6, 1e6), "gate": (-100.0, 100.0), "freeze": (0.0, 1.0)}.get(column, (1, 0))
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high:
            return float(text)
    needs = f"no number from {low:g} to {high:g}" if low < high else f"none of {', '.join(words[column])}"
    raise ValueError(f"{text!r} is {needs}")

class Column:
    """A column's rules, CELL or SELECTOR=CELL with commas between; of those that fit a map the last holds. A
    selector is KIND[@LAYERS]: all, attention, mlp, mlp.in (without proj) or one such as attention.q; `m1.` is
    member 1. A rule without one is for all maps in the columns basis and freeze, else for random ones."""
    def __init__(self, name: str, text: str, h):
        self.name, self.rules, self.used = name, [], {""}
        for rule in text.replace(" ", "").split(","):
            selector, _, cell = rule.rpartition("=")
            match = re.fullmatch(r"(?:m(\d+)\.)?([a-z.]+)?(?:@([\d+-]+))?", selector)
            if not match:
                raise ValueError(f"{selector!r} is no selector such as all, mlp.fc or attention@0-2")
            member, kind, layers = match.groups()
            about = member and int(member), kind or "all", layers_of(layers or "0-", h.num_layers)
            self.rules.append((selector, *about, read_cell(name, cell)))
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

def map_table(h, problems: list[str]) -> list[MapRow]:
    """The maps of all blocks: the one place that decides which are random, and how. A map's seed is MAP_SEED
    + MAP_SEED_STRIDE · layer + the offset before its shape (PR #1113); an ensemble's are a million apart."""
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
        prefix = f"members.{member}." if h.ensemble > 1 else ""
        cells = columns[0].cells(member, kind, layer, False)
        random = cells.get("basis", "learned") != "learned"
        for column in columns[1:]:
            cells |= column.cells(member, kind, layer, random)
        if random:
            shared = h.map_seed + 1_000_000 * member
            cells |= {"seed": shared + h.map_seed_stride * layer + kinds[kind][0], "shared_seed": shared}
        rows.append(row := MapRow(f"{prefix}blocks.{layer}.{kind}", *kinds[kind][1:], **cells))
        with noting(problems, f"MAP_ADAPTER={h.map_adapter}"):
            if row.adapters() and not random:
                raise ValueError(f"{kind} is learned in full, it has no adapter")
        if row.freeze and random and (row.adapter, row.scale, row.gate) == ("none", "none", None):
            problems.append(f"MAP_FREEZE={h.map_freeze}: {kind} is random, nothing of it is learned")
    for column in columns if rows else []:
        unused = [selector for selector, *_ in column.rules if selector not in column.used]
        problems += [f"MAP_{column.name.upper()}: {selector} selects no map" for selector in unused]
    seeds = [row.seed for row in rows if row.basis != "learned"]
    if len(set(seeds)) < len(seeds):
        problems.append(f"MAP_SEED_STRIDE={h.map_seed_stride} and the members give two maps the same seed")
    problems[:] = dict.fromkeys(problems)  # a kind of map has the same problem in every layer
    return rows

# ---- World and log -----------------------------------------------------------------------------------------
AMX = cpu._is_amx_tile_supported()  # matrix units of an Intel CPU
class World:
    """This process among those of the run: its device, type of activations, signals and log."""
    def __init__(self, h):
        self.h, self.rank = h, int(os.environ.get("RANK", 0))
        self.count, self.on_cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
        intel = any("GenuineIntel" in path.read_text() for path in Path("/proc").glob("cpuinfo"))
        fast = self.on_cuda or AMX or not intel and cpu._is_avx512_bf16_supported()
        self.dtype = getattr(torch, ("bfloat16" if fast else "float32") if h.dtype == "auto" else h.dtype)
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if self.on_cuda else "cpu")
        self.device_name = torch.cuda.get_device_name() if self.on_cuda else f"{platform.machine()} CPU"
        self.compile = self.on_cuda if h.compile == "auto" else h.compile == "1"
        self.file, self.can_save, self.told_to_stop = None, False, 0.0
    def __enter__(self) -> World:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self.on_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # what is computed in float32 there tolerates tf32
        if self.compile:
            from torch._inductor.decomposition import decompositions  # only now: it loads the compiler
            decompositions.pop(torch.ops.aten.embedding_dense_backward.default, None)  # atomic: in any order
        if self.count > 1:
            timeout = datetime.timedelta(seconds=self.h.timeout_seconds)
            store, *_ = next(dist.rendezvous("env://", self.rank, self.count, timeout=timeout))
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "cpu:gloo,cuda:nccl" if self.on_cuda else "gloo"
            dist.init_process_group(backend, None, timeout, self.count, self.rank, store)
        return self
    def __exit__(self, kind, error, _) -> None:
        if error:  # a log without its last line explains nothing
            self.log(f"error: {error}" if kind is UserError else traceback.format_exc(), console=False)
        elif self.count > 1:
            dist.barrier()  # rank 0 may still be writing
            dist.destroy_process_group()
            os._exit(0)  # now and then a thread of gloo's aborts an interpreter that takes its time to exit
    def _on_signal(self, number: int, _) -> None:
        """In training the first asks for a checkpoint; others, but for its copies within a second, leave."""
        if self.told_to_stop and time.monotonic() < self.told_to_stop + 1:
            return
        if self.told_to_stop or not self.can_save:
            os._exit(128 + number)
        self.told_to_stop = time.monotonic()
        with contextlib.suppress(OSError):  # the console may be gone; and print may be under way
            os.write(2, b"saving after this step; a second signal leaves at once\n")
    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over the processes in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor
    def share(self, value):
        """Rank 0's object on every process."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]
    def agree(self, *mine: float) -> list[float]:
        """Rank 0's numbers, since clocks differ and decisions must not; and how many were told to stop."""
        mine = mine if self.rank == 0 else [0.0] * len(mine)
        return self.sum_(torch.tensor([*mine, self.told_to_stop > 0], dtype=torch.float64)).tolist()
    def open_log(self, path: Path) -> None:
        """Appends to the log of a run's folder, which is this process's own as long as it lives."""
        self.file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file = None
            raise UserError(f"{path}: another process is at this run; choose a new RUN_ID") from None
    def log(self, text: str, console: bool = True) -> None:
        """A line of rank 0's, to the run's file and to the console, unless that is gone."""
        if self.file:
            print(text, file=self.file, flush=True)
        if self.rank == 0 and console:
            with contextlib.suppress(OSError):
                print(text, flush=True)

def write_file(path: Path, content: bytes, keep: Path | None = None) -> None:
    """A reader sees the old file or the whole new one, whatever happens; the old one may be kept."""
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

@contextlib.contextmanager
def distrusting(what: str):
    """Within, whatever a damaged or forged file makes libraries say becomes a UserError."""
    try:
        yield
    except (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
            ValueError, brotli.error, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{what} cannot be used: {type(error).__name__}: {error}") from None

# ---- Data --------------------------------------------------------------------------------------------------
def read_shards(folder: str, split: str) -> list[np.ndarray]:
    """The tokens of each shard of a split, memory-mapped, (n,) uint16; headers and sizes are checked."""
    paths = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UserError(f"DATA_PATH={folder}: no fineweb_{split}_*.bin there; data/prepare.py makes them")
    shards = []
    for path in paths:
        header, size = np.fromfile(path, "<i4", 3).tolist(), path.stat().st_size
        if header[:2] != [20240520, 1] or header[2:] < [1] or size != 1024 + 2 * header[2]:
            raise UserError(f"{path}: no whole token shard: {size} bytes, header {header}; fetch it again")
        shards.append(np.memmap(path, "<u2", "r", 1024, (header[2],)))
    return shards

def check_tokens(tokens: np.ndarray, h) -> np.ndarray:
    if tokens.max(initial=0) >= h.vocab_size:
        raise UserError(f"DATA_PATH={h.data_path}: token {tokens.max()} is outside VOCAB_SIZE={h.vocab_size}")
    return tokens

def random_words(seed: int, n: int) -> np.ndarray:
    """(n,) uint64 of Philox, a counter-based generator whose raw stream NumPy promises never to change."""
    return np.random.Philox(key=seed).random_raw(n)

class TrainingData:
    """The training shards as sequences, the last held out. Seed and position say which: it has no state."""
    def __init__(self, h):
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
    def micro_batches(self, step: int, world) -> list[tuple[Tensor, Tensor]]:
        """This process's share of a step: inputs and targets (n, TRAIN_SEQ_LEN), in equal parts that fit."""
        mine = self.h.train_batch_tokens // self.h.train_seq_len // world.count
        fits = range(1, 1 + max(1, self.h.micro_batch_tokens // self.h.train_seq_len))
        rows = self.sequences((step * world.count + world.rank) * mine, mine)
        rows = (rows.pin_memory() if world.on_cuda else rows).to(world.device, non_blocking=True)
        return [(part[:, :-1], part[:, 1:]) for part in rows.split(max(n for n in fits if mine % n == 0))]
    @functools.lru_cache(maxsize=2)  # noqa: B019 (it lives as long as the run)
    def _order(self, epoch: int) -> np.ndarray:
        return np.argsort(random_words(self.h.seed + (epoch << 64), len(self.places)), kind="stable")

class Tokenizer:
    """A SentencePiece model, and the bytes of text that each token stands for: the UTF-8 length of its piece
    less the leading ▁, 1 for a byte, 0 for a control token; plus 1 for the ▁ not after a control token."""
    def __init__(self, path: str, vocab_size: int):
        with distrusting(f"TOKENIZER_PATH={path}"):
            proto = Path(path).read_bytes()
            self.model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.sha256 = hashlib.sha256(proto).hexdigest()
        if model.vocab_size() != vocab_size:
            raise UserError(f"TOKENIZER_PATH={path} has {model.vocab_size()} pieces, VOCAB_SIZE={vocab_size}")
        if model.is_unknown(model.piece_to_id("▁")):
            raise UserError(f"TOKENIZER_PATH={path}: ▁ is no piece of its own, so bytes cannot be counted")
        pieces = model.id_to_piece(ids := list(range(vocab_size)))
        self.is_control = np.any([f(ids) for f in (model.is_control, model.is_unknown, model.is_unused)], 0)
        self.is_byte = np.array(model.is_byte(ids))
        self.has_space = np.array([piece.startswith("▁") for piece in pieces]) & ~self.is_control
        lengths = np.array([len(piece.removeprefix("▁").encode()) for piece in pieces])
        self.own_bytes = np.where(self.is_byte, 1, np.where(self.is_control, 0, lengths))
    def check_manifest(self, h) -> None:
        """UserError if the manifest of the shards, where there is one, names another tokenizer."""
        path = Path(h.data_path) / "manifest.json"
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be none, or another kind
            if json.loads(path.read_bytes()).get("tokenizer_sha256") not in (None, self.sha256):
                raise UserError(f"TOKENIZER_PATH={h.tokenizer_path} is not what made the shards, {path} says")
    def count_bytes(self, before: np.ndarray, tokens: np.ndarray) -> int:
        """Bytes of text of the tokens (n,), given the token before each, (n,)."""
        return int(self.own_bytes[tokens].sum() + (self.has_space[tokens] & ~self.is_control[before]).sum())
    def decode(self, tokens: np.ndarray) -> bytes:
        """The text of a stream, document after document: a control token stands before each."""
        documents = np.split(tokens, np.flatnonzero(self.is_control[tokens]))
        return "".join(self.model.decode(document.tolist()) for document in documents).encode()

class ValidationStream:
    """All validation tokens as one stream. Refuses one whose bytes do not add up to its decoded text."""
    def __init__(self, h, tokenizer: Tokenizer):
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

def independent(draw: Callable[[int, int], np.ndarray], rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) float64, independent entries `draw(seed, n)` over √columns."""
    return torch.from_numpy(draw(seed, rows * columns)).view(rows, columns) / math.sqrt(columns)
gaussian = functools.partial(independent, normal_deviates)
uniform = functools.partial(independent, lambda seed, n: random_words(seed, n) * 2.0**-63 - 1)
rademacher = functools.partial(independent, lambda seed, n: 1 - 2.0 * (random_words(seed, n) >= 2**63))

def hadamard(out_features: int, in_features: int, seed: int) -> Tensor:
    """(out, in) float64, random rows and columns, of random signs, of the smallest Hadamard matrix that holds
    them. Every entry is ± one power of two, within √2 of 1/√(longer side): exact in bfloat16 and fp8."""
    size = 2 ** (max(out_features, in_features) - 1).bit_length()
    words = random_words(seed, 2 * size).reshape(2, size)
    rows, columns = words.argsort(kind="stable")
    row_signs, column_signs = 1.0 - 2.0 * (words & np.uint64(1))
    shared = rows[:out_features, None] & columns[:in_features]
    parity = functools.reduce(lambda bits, half: bits ^ (bits >> half), (16, 8, 4, 2, 1), shared) & 1
    signs = (1.0 - 2.0 * parity) * row_signs[:out_features, None] * column_signs[:in_features]
    return torch.from_numpy(signs * 2.0 ** -math.floor(math.log2(max(out_features, in_features)) / 2 + 0.5))

BASES = {"orthogonal": orthogonal, "gaussian": gaussian, "uniform": uniform, "rademacher": rademacher,
         "hadamard": hadamard}
def draw_map(row: MapRow) -> Tensor:
    """(out, in) bfloat16, drawn on the CPU. The map *is* this rounding, on every device and in every type."""
    drawn = BASES[row.basis](*row[1:3], row.seed) * row.gain
    if drawn.shape != row[1:3] or not drawn.isfinite().all():
        raise UserError(f"MAP_BASIS={row.basis} of {row.name} draws {tuple(drawn.shape)}, or not finite")
    return drawn.to(torch.bfloat16).contiguous()

# ---- Linear layers -----------------------------------------------------------------------------------------
MATRIX, EMBEDDING, SCALAR, SPARSE, MASK = "matrix", "embedding", "scalar", "sparse", "mask"  # roles
class Owner(nn.Module):
    """Gives learned tensors roles, which decide optimiser and quantiser; what has no owner is a SCALAR."""
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
    """ΔW = diag(b) B diag(d) A (arXiv:2310.11454): learned b, d; maps of one shape share random A and B."""
    size = "rank"
    def __init__(self, row: MapRow, rank: int):
        super().__init__()
        self.register_buffer("A", shared_factor(rank, row.in_features, row.shared_seed), False)
        self.register_buffer("B", shared_factor(row.out_features, rank, row.shared_seed + 1), False)
        self.b = nn.Parameter(torch.zeros(row.out_features))
        self.d = nn.Parameter(torch.full((rank,), 0.1))
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.b[:, None] * self.B, self.d[:, None] * self.A

class Sparse(Owner):
    """ΔW: learned values at places that the seed draws, a share `density` of each row (arXiv:2406.02214)."""
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
    """W + ΔW = √2 · W where a learned score is positive, else 0: one bit a weight (arXiv:1911.13299)."""
    size, roles = "", {"scores": MASK}
    def __init__(self, row: MapRow, _: float):
        super().__init__()
        self.scores = nn.Parameter(torch.empty(row[1:3]).uniform_(-1, 1) * row.in_features**-0.5)
    def correction(self, weight: Tensor) -> Tensor:
        mask = (self.scores > 0).to(weight.dtype) + (self.scores - self.scores.detach()).to(weight.dtype)
        return weight * (math.sqrt(2) * mask - 1)
    def quantize(self, quantizers: dict[str, Quantizer], hessian: Tensor | None) -> dict[str, Tensor]:
        return {"scores": self.scores.data > 0}

# Beside a frozen map: the product of `factors`, or a full `correction`, whose gradient is dense.
ADAPTERS = {"lora": LoRA, "rslora": RankStabilizedLoRA, "vera": VeRA, "sparse": Sparse, "mask": Mask}

class ThinLinear(torch.autograd.Function):
    """y = x Mᵀ, M of merged maps W + A B: one GEMM each way, thin ones for A and B, no dense gradient."""
    @staticmethod
    def forward(ctx, x: Tensor, merged: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, merged, *factors)
        return x @ merged.t()
    @staticmethod
    def backward(ctx, dy: Tensor):
        x, merged, *factors = ctx.saved_tensors
        gradients, dy, x = [dy @ merged, None], dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
        for part, a, b in zip(dy.split([len(a) for a in factors[::2]], 1), factors[::2], factors[1::2]):
            gradients += [part.t() @ (x @ b.t()), (part @ a).t() @ x]
        return tuple(gradients)

RIDGE = {"cuda": 264.0, "cpu": 70.0 if AMX else 20.0}  # bench/kernels.py
def thin_pays(weight: Tensor, a: Tensor, b: Tensor, scaled: bool) -> bool:
    """Whether four thin products for A and B cost less, by FLOPs or bytes, than the dense gradient."""
    (rows, columns), rank, ridge = weight.shape, len(b), RIDGE[weight.device.type]
    def cost(width: int, length: int) -> float:
        return max(2 * width * length, ridge * 2 * (width + length))
    return 2 * cost(rows, rank) + 2 * cost(columns, rank) + scaled * ridge * 10 * rows < cost(rows, columns)

def stacked(maps: tuple[Linear, ...], name: str, neutral: float) -> Tensor | None:
    """A factor or the bias of all rows of these maps, (Σ out,), or None where none has one."""
    parts = [getattr(each, name) for each in maps]
    if all(part is None for part in parts):
        return None
    parts = [each.weight.new_full((1,), neutral) if part is None else part for each, part in zip(maps, parts)]
    return torch.cat([part.expand(len(each.weight)) for each, part in zip(maps, parts)])

class Linear(Owner):
    """A row of the map table: y = gate · activation(scale · x (W + ΔW)ᵀ + bias). W (out, in) is learned in
    float32, orthogonal at first; or frozen and random, then a bfloat16 buffer that is never in a state_dict,
    with ΔW the sum of its adapters. All is computed in the type of x."""
    roles = {"weight": MATRIX}
    def __init__(self, row: MapRow, bias: bool = False):
        super().__init__()
        if row.basis == "learned":
            self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(row[1:3]), row.gain))
        else:
            self.register_buffer("weight", draw_map(row), persistent=False)
        for name, size in row.adapters().items():
            self.add_module(name, ADAPTERS[name](row, size))
        factors = {"none": None, "map": torch.ones(1), "row": torch.ones(row.out_features)}[row.scale]
        self.scale = None if factors is None else nn.Parameter(factors)
        self.gate = None if row.gate is None else nn.Parameter(torch.full((row.out_features,), row.gate))
        self.bias = nn.Parameter(torch.zeros(row.out_features)) if bias else None
    def parts(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """W with the corrections that are not low-rank, (out, in), and A, B of those that are."""
        weight, adapters = self.weight.to(dtype), list(self.children())
        weight = sum([each.correction(weight) for each in adapters if hasattr(each, "correction")], weight)
        low_rank = [adapter.factors() for adapter in adapters if hasattr(adapter, "factors")]
        low_rank = low_rank or [(weight[:, :0], weight[:0])]
        return weight, [torch.cat(pair, dim).to(dtype) for dim, pair in zip((1, 0), zip(*low_rank))]
    def forward(self, x: Tensor, *others: Linear, factor: Tensor | None = None, activation=None) -> Tensor:
        """x (…, in) -> (…, Σ out) by one product with other maps of x; `factor` (Σ out,) joins the scale."""
        maps = self, *others
        scale, bias, gate = (stacked(maps, *name) for name in (("scale", 1.0), ("bias", 0.0), ("gate", 1.0)))
        scale = factor if scale is None else scale if factor is None else scale * factor
        parts = [each.parts(x.dtype) for each in maps]
        merged = torch.cat([torch.addmm(w, *pair) if len(pair[1]) else w for w, pair in parts])
        pays = [thin_pays(w, *pair, scale is not None) for w, pair in parts if pair[0].requires_grad]
        if pays and all(pays) and not any(w.requires_grad for w, _ in parts):
            y = ThinLinear.apply(x, merged.detach(), *(each for _, pair in parts for each in pair))
        else:
            if scale is not None and merged.requires_grad:  # its gradient comes with the dense one
                merged, scale = merged * scale.to(x.dtype)[:, None], None
            y = F.linear(x, merged)
        y = y if scale is None else y * scale.to(x.dtype)
        y = y if bias is None else y + bias.to(x.dtype)
        y = y if activation is None else activation(y)
        return y if gate is None else y * gate.to(x.dtype)

class FrozenRandomLinearWithLoRA(Linear):
    """y = x (W + A B)ᵀ (+ bias): an orthogonal random map with LoRA (PR #1113), by itself."""
    def __init__(self, in_features: int, out_features: int, rank: int = 32, seed: int = 0, bias=False):
        row = MapRow("", out_features, in_features, "orthogonal", seed, adapter=f"lora:{rank}")
        super().__init__(row, bias=bias)
    lora_A, lora_B = property(lambda self: self.lora.A), property(lambda self: self.lora.B)

class Embedding(Owner):
    """A learned table (vocabulary, dim) float32: ids look up rows in `dtype`, vectors multiply it."""
    roles = {"weight": EMBEDDING}
    def __init__(self, vocabulary: int, dim: int, std: float, dtype: torch.dtype):
        super().__init__()
        self.weight, self.dtype = nn.Parameter(torch.randn(vocabulary, dim) * std), dtype
    def forward(self, x: Tensor) -> Tensor:
        are_ids = not x.is_floating_point()
        return F.embedding(x, self.weight).to(self.dtype) if are_ids else F.linear(x, self.weight.to(x.dtype))

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
def rotary_table(base: float, dims: int, dtype: torch.dtype, positions: int) -> Tensor:
    """(2, positions, 1, dims / 2): cosine and sine of angles, which kernels else compute for every head."""
    angles = torch.arange(positions)[:, None, None] * base ** -(torch.arange(0, dims, 2).double() / dims)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial RoPE: x (B, T, H, D), cos and sin (T, 1, R); the first 2R dimensions turn, the rest stay."""
    half = cos.size(-1)
    x1, x2, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest], dim=-1)

class RMSNorm(torch.autograd.Function):
    """x (…, d) · scale / rms(x) (arXiv:1910.07467), turned by cos, sin if given; keeps y, so no scale 0."""
    @staticmethod
    def forward(ctx, x: Tensor, scale: float | Tensor = 1.0, cos=None, sin=None) -> Tensor:
        ctx.scale, x = scale, x if cos is None else rotate(x, cos, sin)
        square = x.norm(2, -1, True, torch.promote_types(x.dtype, torch.float32)).square() / x.size(-1)
        factor = (scale * (square + torch.finfo(square.dtype).eps).rsqrt()).to(x.dtype)  # (…, 1)
        ctx.save_for_backward(y := x * factor, factor, (factor / (x.size(-1) * scale**2)).to(x), cos, sin)
        return y
    @staticmethod
    def backward(ctx, dy: Tensor):
        y, factor, share, cos, sin = ctx.saved_tensors
        dot = (dy * y).sum(-1, keepdim=True)
        dscale = (dot / ctx.scale).sum_to_size(ctx.scale.shape) if isinstance(ctx.scale, Tensor) else None
        if cos is not None:  # turned back, and then added: compiled, it is one pass; the other way round two
            dy, y = (rotate(each, cos, -sin) for each in (dy, y))
        return torch.addcmul(dy * factor, y, dot * share, value=-1), dscale, None, None
norm = RMSNorm.apply

class Scores(torch.autograd.Function):
    """mask + q kᵀ / √D, (B, M, N). Autograd gives k's gradient transposed, which is slow to add up."""
    @staticmethod
    def forward(ctx, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        return torch.baddbmm(mask, q, k.mT, alpha=q.size(-1) ** -0.5)
    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k = ctx.saved_tensors
        return None, q.size(-1) ** -0.5 * (dy @ k), q.size(-1) ** -0.5 * (dy.mT @ q)

# Longest attention by plain products on a CPU, by (AMX, with gradients: they keep T² weights); bench/cpu.py
PLAIN_ATTENTION = {(True, True): 512, (True, False): 0, (False, True): 2048, (False, False): math.inf}
def block_attention(q: Tensor, k: Tensor, v: Tensor, span: int) -> Tensor:
    """causal_attention, of `span` keys at most, by plain products that leave out what a block cannot see."""
    block, groups, place = 128 if k.size(1) <= 1024 else 256, k.size(2), k.size(1) - q.size(1)
    q = q.transpose(1, 2).unflatten(1, (groups, -1)).flatten(0, 1)  # (B · H_kv, H / H_kv, n, D)
    (k, v), rows = (each.transpose(1, 2).flatten(0, 1) for each in (k, v)), []  # (B · H_kv, T, D)
    for part in q.split(block, 2):
        begin, end = max(0, place - span + 1), place + part.size(2)
        hidden = q.new_full((part.size(2), end - begin), -torch.inf)
        mask = (hidden.triu(place - begin + 1) + hidden.tril(place - begin - span)).repeat(part.size(1), 1)
        weights = Scores.apply(mask, part.flatten(1, 2), k[:, begin:end]).softmax(-1)
        rows.append((weights @ v[:, begin:end]).view_as(part))
        place = end
    return torch.cat(rows, 2).unflatten(0, (-1, groups)).flatten(1, 2).transpose(1, 2)

def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, n, H, D) of n last positions, k, v (B, T, H_kv, D) -> (B, n, H, D); groups of heads share k."""
    if q.size(1) < k.size(1) or not q.is_cuda and k.size(1) <= PLAIN_ATTENTION[AMX, torch.is_grad_enabled()]:
        return block_attention(q, k, v, k.size(1))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

def attention_and_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """causal_attention of T queries, and the log-sum-exp of each one's scores, (B, T, H, 1)."""
    flash = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{'' if q.is_cuda else '_for_cpu'}")
    y, lse, *_ = flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, True)
    return y.transpose(1, 2), lse.transpose(1, 2).unsqueeze(-1)

def streaming_attention(q: Tensor, k: Tensor, v: Tensor, back: tuple[Tensor, Tensor]) -> Tensor:
    """As causal_attention, over rows that go on from the row above: `back` turns its keys' angle by T."""
    if not (q.dtype is torch.bfloat16 and q.size(-1) in range(8, 257, 8) if q.is_cuda else AMX):  # no flash
        kv = torch.cat([rotate(k[:-1], *back), k[1:]], 1), torch.cat([v[:-1], v[1:]], 1)
        return torch.cat([causal_attention(q[:1], k[:1], v[:1]), block_attention(q[1:], *kv, q.size(1))])
    y, lse = attention_and_lse(q, k, v)
    # Of the row above a query sees what is later in its row: causal, too, when both rows are read backwards.
    reverse = (each.flip(1) for each in (q[1:, :-1], rotate(k[:-1, 1:], *back), v[:-1, 1:]))
    y_above, lse_above = (each.flip(1) for each in attention_and_lse(*reverse))
    y[1:, :-1].lerp_(y_above, torch.sigmoid(lse_above - lse[1:, :-1]).to(y.dtype))  # its share of both sums
    return y

def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: y (B, T, H, D) without its projection on the position's own value v (B, T, H_kv, D)."""
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, H_kv, H / H_kv, D)
    direction = F.normalize(v, dim=-1)[..., None, :]
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)

class Attention(nn.Module):
    """Causal attention with grouped queries, normalised q and k, partial RoPE, XSA and value residual."""
    def __init__(self, h, layer: int, linear: Callable[[str], nn.Module]):
        super().__init__()
        self.q, self.k, self.v, self.proj = (linear(f"attention.{kind}") for kind in ("q", "k", "v", "proj"))
        self.q_gain = nn.Parameter(torch.full((h.num_heads, 1), h.qk_gain_init))
        self.value_gate = nn.Parameter(torch.zeros(1)) if h.vrl_enabled and layer else None
        self.xsa, self.head_dim = layer >= h.num_layers - h.xsa_last_n, h.head_dim
        self.heads, self.widths = [h.num_heads, h.num_kv_heads], [h.model_dim + h.kv_dim, h.kv_dim]
    def forward(self, x: Tensor, factor: Tensor, rope: list[Tensor], added_v, first_v, last: int = 0):
        """x (B, T, d) -> output times factor (d,) at last or all positions, and own values (B, T, kv_dim)."""
        qk, own_v = self.q(x, self.k, self.v).split(self.widths, -1)
        v = own_v if added_v is None else own_v + added_v
        v = v if self.value_gate is None else v + torch.sigmoid(self.value_gate).to(x.dtype) * first_v
        qk, v = (each.unflatten(-1, (-1, self.head_dim)) for each in (qk, v))  # (B, T, H + H_kv, D)
        q, k = norm(qk, F.pad(self.q_gain, (0, 0, 0, self.heads[1]), value=1), *rope[:2]).split(self.heads, 2)
        y = streaming_attention(q, k, v, rope[2:]) if rope[2:] else causal_attention(q[:, -last:], k, v)
        y = exclude_self(y, v[:, -last:]) if self.xsa else y
        return self.proj(y.flatten(2), factor=factor), own_v

def squared_leaky_relu(x: Tensor) -> Tensor:
    """LeakyReLU(0.5)². On CUDA only x is kept: the backward pass reads x anyway, and so computes it again."""
    def compute(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.5).square()
    return torch.utils.checkpoint.checkpoint(compute, x, use_reentrant=False) if x.is_cuda else compute(x)

class MLP(nn.Module):
    """LeakyReLU(0.5)² between two maps, or GEGLU between three (arXiv:2002.05202); times factor (d,)."""
    def __init__(self, h, linear: Callable[[str], nn.Module]):
        super().__init__()
        self.fc, self.proj = linear("mlp.fc"), linear("mlp.proj")
        self.gate = linear("mlp.gate") if h.mlp_gated else None
    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        hidden = (self.fc(x, activation=squared_leaky_relu) if self.gate is None
                  else self.fc(x) * self.gate(x, activation=F.gelu))
        return self.proj(hidden, factor=factor)

class Block(nn.Module):
    """Pre-norm attention and MLP, in turn or side by side, on a learned mix of stream x and embedding x0."""
    def __init__(self, h, layer: int, linear: Callable[[str], nn.Module]):
        super().__init__()
        self.attention, self.mlp = Attention(h, layer, linear), MLP(h, linear)
        self.norm_scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.parallel, self.dropout = layer >= h.parallel_from, nn.Dropout(h.dropout)
        share = 1 / (1 + math.exp(-3 * (layer / max(h.num_layers - 1, 1) - 0.5)))
        self.stream_mix = nn.Parameter(torch.full((h.model_dim,), share))
        self.embedding_mix = nn.Parameter(torch.full((h.model_dim,), 1 - share))
        self.attention_scale, self.mlp_scale = (nn.Parameter(torch.ones(h.model_dim)) for _ in range(2))
    def forward(self, x: Tensor, x0: Tensor, rope: list, added_v, first_v, last: int = 0):
        x = self.stream_mix.to(x.dtype) * x + self.embedding_mix.to(x.dtype) * x0
        normed = norm(x, self.norm_scale)
        y, own_v = self.attention(normed, self.attention_scale, rope, added_v, first_v, last)
        x = x[:, -last:] + self.dropout(y)
        normed = normed[:, -last:] if self.parallel else norm(x, self.norm_scale)
        return x + self.dropout(self.mlp(normed, self.mlp_scale)), own_v

class LanguageModel(nn.Module):
    """A model but for `predict`: ids (B, T) -> float32 logits of last or all positions (B, n, vocabulary)."""
    def __init__(self, h):
        super().__init__()
        self.table = {row.name: row for row in h.maps}
        self.frozen = [row for row in h.maps if row.basis != "learned"]
        self.alpha, self.temperature = h.distill_alpha, h.distill_temperature
    def losses(self, ids: Tensor, targets: Tensor, streams: bool = False) -> Tensor:
        """ids (B, T), targets (B, n) of their last n positions -> loss of each in nats, (B, n) float32."""
        logits = self.predict(ids, targets.size(1), streams)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    def forward(self, ids: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        """The loss; with a teacher's logits, α CE + (1 - α) T² KL(teacher ‖ student) (arXiv:1503.02531)."""
        logits = self.predict(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if taught is None:
            return loss
        student, teacher = ((z / self.temperature).log_softmax(-1) for z in (logits, taught))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="sum") / targets.numel()
        return self.alpha * loss + (1 - self.alpha) * self.temperature**2 * divergence
    def fingerprint(self) -> str:
        """SHA-256 over the maps it computes with and all else that seeds drew, in the order of the table."""
        digest = hashlib.sha256()
        for drawn in (buffer for row in self.frozen for buffer in self.get_submodule(row.name).buffers()):
            digest.update(drawn.cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

class GPT(LanguageModel):
    """The model of the map table and the settings; a member of an ensemble has the rows of its prefix."""
    def __init__(self, h, dtype: torch.dtype = torch.float32, prefix: str = ""):
        super().__init__(h)
        self.softcap, self.bigram_buckets = h.logit_softcap, h.bigram_vocab_size
        self.value_layers, self.skipping = h.value_layers, h.num_layers // 2 if h.skips_enabled else 0
        self.recurs, self.order = True, list(range(h.num_layers))  # the order in which blocks run
        last, again = max(h.recurring_layers, default=-1) + 1, h.recurring_layers * (h.recur_times - 1)
        self.recurrent_order = self.order[:last] + again + self.order[last:]
        def linear(layer: int, kind: str) -> Linear:
            return Linear(self.table[f"{prefix}blocks.{layer}.{kind}"])
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
        self.rotary = functools.partial(rotary_table, h.rope_base, h.rope_dims, dtype)
        self.register_buffer("rope", self.rotary(1 + max(h.train_seq_len, h.eval_seq_len)), persistent=False)
    def hidden(self, ids: Tensor, last: int = 0, streams: bool = False) -> Tensor:
        """ids (B, T) -> the last norm's output (B, last or T, d). Streams: rows go on from the one above."""
        shape, ids = ids.shape, ids.reshape(1, -1) if streams else ids
        x = self.embedding(ids)
        if self.bigram_buckets > 1:  # a hash of two tokens; the last bucket where there is one only
            buckets = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % (self.bigram_buckets - 1)
            buckets = F.pad(buckets, (1, 0), value=self.bigram_buckets - 1)
            x = x + self.bigram(buckets) * self.bigram_scale.to(x.dtype)
        x = norm(x)
        if self.smear_gate is not None:  # SmearGate: a mix with the position before, per channel
            x = torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), torch.sigmoid(self.smear_gate).to(x.dtype))
        x, ids, length = x.view(*shape, -1), ids.view(shape), shape[1]
        cos, sin = (self.rope if length < self.rope.size(1) else self.rotary(length + 1)).to(x)
        rope = [cos[:length], sin[:length]] + [cos[length], -sin[length]] * streams  # streams turn keys back
        added_v = self.value_embedding(ids) if self.value_layers else None
        x0, skips, first_v = x, {}, None  # skips: the stream after each layer of the first half
        order = self.recurrent_order if self.recurs else self.order
        few = 0 if streams or 8 * last > length else last  # so few that the mask they need costs little
        for place, layer in enumerate(order, 1):
            if 0 <= (i := layer - self.skipping) < self.skipping:
                skip, gates = self.skip_weights[i].to(x.dtype) * skips[self.skipping - 1 - i], self.skip_gates
                x = x + skip if gates is None else torch.lerp(skip, x, gates[i].sigmoid().to(x.dtype))
            v = (added_v * self.value_scales[self.value_layers.index(layer)].to(x.dtype)
                 if layer in self.value_layers else None)
            x, own_v = self.blocks[layer](x, x0, rope, v, first_v, few if place == len(order) else 0)
            first_v = own_v if first_v is None else first_v
            if layer < self.skipping:
                skips[layer] = x
        return norm(x[:, -last:])
    def logits(self, hidden: Tensor) -> Tensor:
        """(…, d) -> (…, vocabulary) float32: c·tanh(z/c), as c - 2c·sigmoid(-2z/c), which is faster."""
        c, z = self.softcap, self.embedding(hidden).float()
        return torch.rsub(torch.sigmoid(-2 / c * z), c, alpha=2 * c)
    def predict(self, ids: Tensor, last: int = 0, streams: bool = False) -> Tensor:
        return self.logits(self.hidden(ids, last, streams))

class Ensemble(LanguageModel):
    """Models in one artifact (PR #1301): each has a loss of its own, the mean of their logits predicts."""
    def __init__(self, h, dtype: torch.dtype = torch.float32):
        super().__init__(h)
        self.members = nn.ModuleList(GPT(h, dtype, f"members.{i}.") for i in range(h.ensemble))
    def predict(self, ids: Tensor, last: int = 0, streams: bool = False) -> Tensor:
        return sum(member.predict(ids, last, streams) for member in self.members) / len(self.members)
    def forward(self, ids: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        return sum(member(ids, targets, taught) for member in self.members) / len(self.members)

def make_model(h, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return Ensemble(h, dtype) if h.ensemble > 1 else GPT(h, dtype)

def describe_maps(model: LanguageModel) -> list[str]:
    """The map table of a built model as text, with learned and frozen values and bytes before packing."""
    layout = "{:<26} {:>10} {:<15} {:>7} {:<16} {:<5} {:<5} {:<6} {:>10} {:>10} {:>9}"
    lines = [layout.format(*"map shape basis seed adapter scale gate freeze learned frozen bytes".split())]
    for row in model.table.values():
        module = model.get_submodule(row.name)
        learned = sum(p.numel() for p in module.parameters())
        frozen = row.out_features * row.in_features if row.basis != "learned" else 0
        lines.append(layout.format(
            row.name, f"{row[1]}x{row[2]}", f"{row.gain:g}·{row.basis}", row.seed, row.adapter, row.scale,
            str(row.gate), f"{row.freeze:g}", f"{learned:,}", f"{frozen:,}", f"{stored_bytes(module):,}"))
    return lines

# ---- Optimisers and averages -------------------------------------------------------------------------------
def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """(n, rows, columns) -> each matrix with singular values near 1, by a quintic Newton-Schulz iteration."""
    is_tall = g.size(1) > g.size(2)
    x = (g.mT if is_tall else g).to(torch.bfloat16 if g.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if is_tall else x).to(g.dtype)

class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (Jordan et al. 2024); the processes share out each shape's batch."""
    def __init__(self, params, lr=0.025, momentum=0.95, backend_steps=5, weight_decay=0.0, world=None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.backend_steps, self.world = backend_steps, world
    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in [p for p in group["params"] if p.grad is not None]:
                shapes.setdefault(p.shape, []).append(p)
            begun = [self._begin(params, group["momentum"]) for params in shapes.values()]
            for ((rows, columns), params), (updates, arrival) in zip(shapes.items(), begun):
                if arrival:
                    arrival.wait()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
    def _begin(self, params: list[nn.Parameter], momentum: float) -> tuple[Tensor, dist.Work | None]:
        """Updates of parameters of one shape, stacked. From other processes they arrive later."""
        for p in params:
            self.state[p] = self.state[p] or {"momentum": torch.zeros_like(p)}
        gradients, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        batch = torch.stack(torch._foreach_add(gradients, momenta, alpha=momentum))
        if self.world is None or self.world.count == 1:
            return orthogonalize(batch, self.backend_steps), None
        everyone, mine = torch.zeros_like(batch), slice(self.world.rank, None, self.world.count)
        everyone[mine] = orthogonalize(batch[mine], self.backend_steps)
        return everyone, dist.all_reduce(everyone, async_op=True)

class Optimizers:
    """Muon for the matrices, AdamW for the rest; `step` averages the gradients, clips and applies them."""
    def __init__(self, groups: dict[str, dict[str, nn.Parameter]], h, world):
        self.h, self.world = h, world
        self.names = {p: name for group in groups.values() for name, p in group.items()}
        self.params = list(self.names)
        matrices = [{"params": (groups[MATRIX] | groups[MASK]).values()}]  # as a group there may be none
        self.muon = Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, h.muon_wd, world)
        rates = {EMBEDDING: (h.tied_embed_lr, h.embed_wd), SCALAR: (h.scalar_lr, h.adam_wd),
                 SPARSE: (h.sparse_lr, h.muon_wd)}
        adam = [{"params": groups[r].values(), "lr": lr, "weight_decay": wd} for r, (lr, wd) in rates.items()]
        self.adam = torch.optim.AdamW(adam, 0.0, (h.beta1, h.beta2), h.adam_eps, fused=True)
        self.base_lrs = [g["lr"] for g in self.muon.param_groups + self.adam.param_groups]
    def step(self, step: int, scale: float) -> dict[str, Tensor]:
        """At `scale` times the learning rates. Gives the norm of each gradient before the clip, by name."""
        h, warm = self.h, min(1.0, step / max(self.h.muon_momentum_warmup_steps, 1))
        momentum = (1 - warm) * h.muon_momentum_warmup_start + warm * h.muon_momentum
        self.muon.param_groups[0]["momentum"] = momentum
        for group, lr in zip(self.muon.param_groups + self.adam.param_groups, self.base_lrs):
            group["lr"] = lr * scale
        learned = [p for p in self.params if p.grad is not None]  # all that is not frozen
        gradients = [p.grad for p in learned]
        if self.world.count > 1:  # the mean over the processes, in one message
            mean = self.world.sum_(torch.nn.utils.parameters_to_vector(gradients)) / self.world.count
            torch.nn.utils.vector_to_parameters(mean, gradients)
        norms = torch._foreach_norm(gradients)
        if h.grad_clip_norm:
            torch.nn.utils.clip_grads_with_norm_(learned, h.grad_clip_norm, torch.stack(norms).norm())
        self.muon.step()
        self.adam.step()
        for p in self.params:
            p.grad = None
            if not p.requires_grad:  # frozen now: its memory is freed
                self.muon.state.pop(p, None)
                self.adam.state.pop(p, None)
        return {self.names[p]: size for p, size in zip(learned, norms)}

class Averages:
    """Candidates for the export: means of the weights, `ema` with less of older ones, `swa` of late ones."""
    def __init__(self, params: list[nn.Parameter], h):
        self.h, self.params = h, params
        self.decays = ({"ema": h.ema_decay} if h.ema_decay else {}) | ({"swa": 1.0} if h.swa_enabled else {})
        self.means = {name: {p: torch.zeros_like(p) for p in params} for name in self.decays}
        self.totals = dict.fromkeys(self.decays, 0.0)  # 1 + decay + decay² + …: what the weights count for
    @torch.no_grad()
    def update(self, step: int, scale: float) -> None:
        for name, decay in self.decays.items():  # the memory of what is frozen by now is freed
            learned = self.means[name] = {p: m for p, m in self.means[name].items() if p.requires_grad}
            if name == "ema" or scale < self.h.swa_threshold and step % self.h.swa_interval == 0:
                self.totals[name] = 1 + decay * self.totals[name]
                torch._foreach_lerp_([*learned.values()], [*learned], 1 / self.totals[name])
    def candidates(self) -> dict[str, list[Tensor]]:
        found = {name: [(means[p] if p.requires_grad else p.data).clone() for p in self.params]
                 for name, means in self.means.items() if self.totals[name]}
        return {"last": [p.detach().clone() for p in self.params]} | found
    def state_dict(self) -> dict:
        means = {name: [means.get(p) for p in self.params] for name, means in self.means.items()}
        return {"means": means, "totals": self.totals}
    def load_state_dict(self, state: dict) -> None:
        self.totals = dict(state["totals"])
        self.means = {name: {p: mean.to(p.device) for p, mean in zip(self.params, means) if mean is not None}
                      for name, means in state["means"].items() if name in self.decays}

# ---- Quantisation ------------------------------------------------------------------------------------------
class Codes(NamedTuple):
    """A quantised matrix: value = code · 2^((exponent - 160) / 8), one exponent a row (0: a zero row)."""
    codes: Tensor  # (rows, columns) int8
    exponents: Tensor  # (rows,) uint8
    def values(self) -> Tensor:  # (rows, columns) float32
        return (self.codes * row_steps(self.exponents)).float()

def row_steps(exponents: Tensor) -> Tensor:
    """(rows,) uint8 -> (rows, 1) float64: the width of each row's quantisation step."""
    return torch.exp2((exponents.double() - 160) / 8).where(exponents > 0, 0.0)[..., None]

class Quantizer(NamedTuple):
    """Symmetric, one step width a row: its largest code stands for `sigmas` root mean squares of the row."""
    bits: int
    sigmas: float
    prune_pct: float = 0.0
    def exponents(self, w: Tensor) -> Tensor:
        step = w.double().square().mean(-1).sqrt() * self.sigmas / (2 ** (self.bits - 1) - 1)
        return torch.where(step > 0, (160 + 8 * step.log2()).round().clamp(1, 255), 0).to(torch.uint8)
    def prune(self, w: Tensor) -> Tensor:  # its smallest values set to zero
        count = int(w.size(-2) * w.size(-1) * self.prune_pct / 100)
        return w * (w.abs() > w.abs().flatten(-2).kthvalue(count).values[..., None, None]) if count else w
    def gptq(self, w: Tensor, hessian: Tensor | None = None, block: int = 128) -> Codes:
        """The nearest codes, or with `hessian` Σ x xᵀ those that keep w x near (GPTQ, arXiv:2210.17323)."""
        exponents, kept, largest = self.exponents(w), self.prune(w) != 0, 2 ** (self.bits - 1) - 1
        w = w.double() / row_steps(exponents).clamp(min=1e-30)  # in steps, which the error feedback keeps
        if hessian is None:
            return Codes((w.round().clamp(-largest, largest) * kept).to(torch.int8), exponents)
        order, codes = hessian.diagonal().argsort(descending=True), torch.empty_like(w)
        w, kept, hessian = w[:, order], kept[:, order], hessian[order][:, order].double()
        hessian.diagonal().add_(0.01 * hessian.diagonal().mean() + 1e-12)
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        for begin in range(0, w.size(1), block):
            end = min(begin + block, w.size(1))
            errors = torch.empty_like(w[:, begin:end])
            for j in range(begin, end):
                codes[:, j] = w[:, j].round().clamp_(-largest, largest).mul_(kept[:, j])
                errors[:, j - begin] = (w[:, j] - codes[:, j]).div_(factor[j, j])
                w[:, j:end].addr_(errors[:, j - begin], factor[j, j:end], alpha=-1)
            w[:, end:] -= errors @ factor[begin:end, end:]
        return Codes(codes[:, order.argsort()].to(torch.int8), exponents)

def quantizers_of(h) -> dict[str, Quantizer]:
    """How each role is stored as codes; SCALAR is float16, MASK is bits."""
    matrix = Quantizer(h.matrix_bits, h.matrix_clip_sigmas, h.prune_pct)
    return {MATRIX: matrix, SPARSE: matrix, EMBEDDING: Quantizer(h.embed_bits, h.embed_clip_sigmas)}

@contextlib.contextmanager
def weights_as_stored(groups: dict[str, dict[str, nn.Parameter]], quantizers: dict[str, Quantizer]):
    """Within, all that is stored quantised holds its quantised value: gradients are straight-through ones."""
    stored = [(quantizers[role], p.detach()) for role in quantizers for p in groups[role].values()]
    masters = [p.clone() for _, p in stored]
    for key in dict.fromkeys((quantizer, p.shape) for quantizer, p in stored):  # by shape, not one by one
        alike = [p for quantizer, p in stored if (quantizer, p.shape) == key]
        torch._foreach_copy_(alike, key[0].gptq(torch.stack(alike)).values().unbind())
    try:
        yield
    finally:
        torch._foreach_copy_([p for _, p in stored], masters)

@torch.no_grad()
def collect_hessians(model: LanguageModel, batches: Iterable[Tensor], world) -> dict[nn.Module, Tensor]:
    """Σ x xᵀ (in, in) float32 of inputs, but ids, of all that owns matrices; adapters have their map's."""
    owners = [module for module in model.modules() if isinstance(module, Owner)]
    used = {module for module in owners if any(tensors_by_role(module)[role] for role in (MATRIX, EMBEDDING))}
    hessians: dict[tuple[nn.Module, ...], Tensor] = {}
    precision = torch.get_float32_matmul_precision()  # the lowest is exact for values of bfloat16
    def add(module: nn.Module, inputs: tuple) -> None:
        x, sharing = inputs[0], (module, *inputs[1:])  # maps of one input have one Hessian
        if x.is_floating_point() and not used.isdisjoint(sharing):
            torch.set_float32_matmul_precision("medium" if x.dtype is torch.bfloat16 else precision)
            x = x.flatten(0, -2).float()  # a product rounded to bfloat16 need not be positive
            hessians[sharing] = hessians.get(sharing, 0) + x.t() @ x
    hooks = [module.register_forward_pre_hook(add) for module in owners]
    for ids in batches:
        model.predict(ids)
    torch.set_float32_matmul_precision(precision)
    for hook in hooks:
        hook.remove()
    return {owner: hessian for sharing, total in hessians.items() for hessian in [world.sum_(total)]
            for module in sharing for owner in module.modules()}

# ---- Artifact ----------------------------------------------------------------------------------------------
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"RANDMAPS", 2
GROUP_TYPES = {"codes": torch.int8, "exponents": torch.uint8, "float16": torch.float16, "bits": torch.uint8}
VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "machine": platform.machine()}
def write_artifact(header: dict, tensors: dict[str, Codes | Tensor], quality=11) -> tuple[bytes, dict]:
    """The artifact's bytes, and how many each group of like tensors takes: magic, format version and length
    of the header (little-endian uint32), header (JSON, brotli) with tensor table [name, shape, groups] and
    groups [name, packed size], the groups (byte planes, or 8 bits to the byte, brotli), SHA-256 of it all."""
    table, groups = [], {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].rpartition(".")[-1]):
        kind, parts = name.rpartition(".")[-1], {"float16": tensor}
        if isinstance(tensor, Codes):
            parts = {f"{kind} codes": tensor.codes, f"{kind} exponents": tensor.exponents}
        elif tensor.dtype is torch.bool:
            parts = {f"{kind} bits": torch.from_numpy(np.packbits(tensor.cpu().numpy()))}
        table.append([name, list((tensor.codes if isinstance(tensor, Codes) else tensor).shape), list(parts)])
        for group, part in parts.items():
            groups.setdefault(group, []).append(part.cpu().flatten().to(GROUP_TYPES[group.split()[-1]]))
    def pack(parts: list[Tensor]) -> bytes:
        planes = torch.cat(parts)[:, None].view(torch.uint8).t().contiguous()
        return brotli.compress(planes.numpy().tobytes(), quality=quality, lgwin=24)
    with ThreadPoolExecutor() as pool:
        packed = dict(zip(groups, pool.map(pack, groups.values())))
    sizes = {group: len(data) for group, data in packed.items()}
    header = header | {"versions": VERSIONS, "tensors": table, "groups": list(sizes.items())}
    text = brotli.compress(json.dumps(header).encode())
    body = b"".join([ARTIFACT_MAGIC, np.array([ARTIFACT_VERSION, len(text)], "<u4"), text, *packed.values()])
    return body + hashlib.sha256(body).digest(), {"header": len(text) + 48} | sizes

def unpack(packed: bytes, size: int) -> bytearray:
    """What brotli packed. ValueError once it is over `size` bytes: no file may fill the memory."""
    raw, decompressor = bytearray(), brotli.Decompressor()
    for i in range(0, len(packed), 64):  # so few bytes never become more than some 100 MB
        raw += decompressor.process(packed[i : i + 64])
        if len(raw) > size:
            raise ValueError(f"{len(packed)} bytes hold more than the {size} they should")
    return raw

def read_artifact(blob: bytes) -> tuple[dict, dict[str, Tensor]]:
    """The header, and every tensor by name in float32; executes, believes nothing. UserError if damaged."""
    if len(blob) < 48 or blob[:8] != ARTIFACT_MAGIC:
        raise UserError(f"not an artifact of this project: {len(blob)} bytes that begin with {blob[:8]!r}")
    if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
        raise UserError("the artifact is damaged, its checksum does not match; copy it again")
    version, size = np.frombuffer(blob[8:16], "<u4").tolist()
    if version != ARTIFACT_VERSION:
        raise UserError(f"the artifact has format version {version}, this script reads {ARTIFACT_VERSION}")
    with distrusting("the artifact"):
        header = json.loads(unpack(blob[16 : 16 + size], 2**22))
        return header, dict(read_tensors(header, blob[16 + size : -32]))

def read_tensors(header: dict, body: bytes) -> Iterable[tuple[str, Tensor]]:
    """Name and values of every tensor of an artifact. Raises what `distrusting` expects."""
    lengths: dict[str, list[int]] = {}  # of each tensor's part of a group
    for _, shape, groups in header["tensors"]:
        if not all(type(n) is int and 0 <= n < 2**26 for n in shape):
            raise ValueError(f"{shape} is no shape")
        for group, n in zip(groups, (math.prod(shape), *shape)):
            lengths.setdefault(group, []).append(-(-n // 8) if group.endswith("bits") else n)
    if sum(map(sum, lengths.values())) > 2**26:
        raise ValueError("its tensors would not fit into 256 MiB")
    place, parts = 0, {}
    for group, packed in header["groups"]:
        dtype, counts = GROUP_TYPES[group.split()[-1]], lengths.pop(group)  # KeyError where it comes twice
        size = sum(counts) * dtype.itemsize
        raw = np.frombuffer(unpack(body[place : place + packed], size), np.uint8)
        if len(raw) != size or packed < 0:
            raise ValueError(f"{group} has {len(raw)} bytes, not {size}")
        values = torch.from_numpy(raw).view(dtype.itemsize, size // dtype.itemsize).t().flatten().view(dtype)
        parts[group], place = iter(values.split(counts)), place + packed
    if place != len(body):
        raise ValueError(f"its groups have {place} bytes, the file has {len(body)} for them")
    for name, shape, groups in header["tensors"]:
        values, *exponents = (next(parts[group]) for group in groups)
        if groups[0].endswith("bits"):
            values = torch.from_numpy(np.unpackbits(values.numpy(), count=math.prod(shape)))
        values = values.view(shape)
        values = Codes(values, *exponents).values() if exponents else values.float()
        if not values.isfinite().all():
            raise ValueError(f"{name} is not finite")
        yield name, values

def export(h, world, model: LanguageModel, data: TrainingData, step: int, tokenizer: Tokenizer,
           trial: bool = False) -> bytes:
    """The artifact of the model, on every process. A trial calibrates on little, and packs fast."""
    size = 1 if trial else max(1, 8192 // h.train_seq_len)  # sequences of a batch
    first, rounds = step * (h.train_batch_tokens // h.train_seq_len), -(-h.gptq_calib_batches // world.count)
    mine = range(world.rank, (min(rounds, 1) if trial else rounds) * world.count, world.count)
    batches = (data.sequences(first + i * size, size)[:, :-1].to(world.device) for i in mine)
    hessians = collect_hessians(model, batches, world)
    if world.rank:
        return world.share(None)
    tensors, quantizers = dict(model.state_dict()), quantizers_of(h)
    for prefix, module in model.named_modules():
        if isinstance(module, Owner):
            codes = module.quantize(quantizers, hessians.get(module))
            tensors |= {f"{prefix}.{name}": value for name, value in codes.items()}
    header = {"model": h.model_settings(), "fingerprint": model.fingerprint(), "tokenizer": tokenizer.sha256}
    blob, sizes = write_artifact(header, tensors, 5 if trial else 11)
    code, limit, kind = os.path.getsize(__file__), h.artifact_limit_bytes, "projected " * trial + "artifact"
    total = f"code {code:,} + model {len(blob):,} = {code + len(blob):,} bytes"
    world.log(f"{kind} bytes: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    world.log(f"{kind} {total}, {(code + len(blob)) / limit:.1%} of {limit:,}")
    if code + len(blob) > limit and not trial:
        raise UserError(f"{total}, over the limit of {limit:,}; EXPORT_ONLY=1 CHECKPOINT_PATH=…/checkpoint.pt"
                        " and a larger MATRIX_CLIP_SIGMAS or EMBED_CLIP_SIGMAS, or a smaller rank or width")
    return world.share(blob)

def build_model(header: dict, tensors: dict[str, Tensor], world, h=None) -> LanguageModel:
    """A model from an artifact alone, or with settings `h`; its maps are drawn anew and proved the same."""
    with distrusting("the stored model"):
        h = h or Hyperparameters({}, **(dataclasses.asdict(world.h) | header["model"]))
        blocks = {row.name.rsplit(".", 2)[0] for row in h.maps}  # a forger's need not be drawn first
        if header["model"].keys() != h.model_settings().keys() or any(
                tensors[f"{block}.mlp_scale"].shape != (h.model_dim,) for block in blocks):
            raise ValueError("its settings and tensors are not those of one model")
        model, there = make_model(h, world.dtype), header["fingerprint"]
        if (here := model.fingerprint()) != there:
            raise UserError(f"the maps drawn here are not the artifact's ({here[:16]}, not {there[:16]}): it"
                            f" is of {header['versions']}, this is {VERSIONS}; use the same versions")
        model.load_state_dict(tensors)
    return model.to(world.device).eval()

# ---- Evaluation --------------------------------------------------------------------------------------------
def plan_windows(targets: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each window starts, and how many of its last positions it scores: those that none before did."""
    starts = np.append(np.arange(0, targets - length, stride), targets - length)
    return starts, np.diff(starts + length, prepend=0)

@torch.no_grad()
def evaluate(model: LanguageModel, val: ValidationStream, h, world, stride: int) -> tuple[float, float]:
    """Mean loss in nats and bits per byte over all tokens after the first; processes take batches in turn."""
    model.eval()
    length = min(h.eval_seq_len, targets := len(val.tokens) - 1)
    per_batch = max(1, h.eval_batch_tokens // length)
    streams = h.eval_mode == "window" and stride < length < targets
    if streams:  # batches of rows; a row sees `warm` before it: one a layer, and one for bigrams and smear
        warm = 1 + h.num_layers + len(h.recurring_layers) * (h.recur_times - 1)
        rows, stride = -(-targets // length), length
        per_batch = min(max(per_batch, 4 * warm), rows)
        row, plan = np.arange(per_batch), plan_windows(rows, per_batch, max(per_batch - warm, 1))
        batches = [(length * (i + row), length * (row >= per_batch - new)) for i, new in zip(*plan)]
    else:
        starts, counts = plan_windows(targets, length, stride)
        batches = [*zip(*(np.split(each, range(1, len(starts), per_batch)) for each in (starts, counts)))]
    pays = world.compile and len(batches) > 24 * world.count  # a graph for fewer costs more than it saves
    compiled = torch.compile(model.losses, dynamic=False, disable=not pays)
    tokens, total = F.pad(val.tokens, (0, length)), torch.zeros((), dtype=torch.float64, device=world.device)
    for starts, counts in batches[world.rank :: world.count]:
        places = torch.from_numpy(starts[:, None] + np.arange(length + 1))
        rows, tail = tokens[places].to(world.device), int(counts.max())
        score = compiled if (len(rows), tail) == (per_batch, stride) else model.losses  # others stay eager
        losses = score(rows[:, :-1], rows[:, -tail:], streams)  # (windows, tail)
        seen = torch.arange(-tail, 0) < -torch.from_numpy(counts)[:, None]  # in earlier windows
        beyond = places[:, -tail:] > targets  # the end of the stream
        total += losses.double().masked_fill((seen | beyond).to(world.device), 0.0).sum()
    nats = world.sum_(total).item()
    return nats / targets, nats / math.log(2) / val.bytes

# ---- Training ----------------------------------------------------------------------------------------------
class Clock:
    """Steps left, by number or wall-clock, from the median step: a slow one costs its time, moves nothing."""
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
        return min(1.0, max(step / max(self.iterations, 1), self.elapsed / self.seconds))

def warmdown_scale(step: int, remaining: int, warmdown: int) -> float:
    """1, then linear to 0 over the last `warmdown` steps, or over all where there are fewer."""
    return min(1.0, remaining / max(1, min(warmdown, step + remaining)))

def accumulate_gradients(forward: Callable, batches: list[tuple[Tensor, Tensor]], teach: Callable) -> Tensor:
    """Adds up the gradients of the mean loss over micro-batches; gives that loss, still on the device."""
    total = 0.0
    for ids, targets in batches:
        loss = forward(ids, targets, teach(ids)) / len(batches)
        loss.backward()
        total = total + loss.detach()
    return total

class Stages:
    """What changes at shares of training, in any order: maps freeze, layers recur, a teacher speaks."""
    def __init__(self, h, model: LanguageModel, teacher: LanguageModel | None, compiled: bool = False):
        self.h, self.model, self.teacher, self.current, self.teaches = h, model, teacher, 0.0, False
        marks = {0.0} | {row.freeze for row in h.maps} | ({h.recur_frac} if h.recurring_layers else set())
        if h.self_distill:
            self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        if self.teacher:
            marks |= {h.distill_start_frac, h.distill_end_frac}
            self.predict = torch.compile(self.teacher.predict, dynamic=False, disable=not compiled)
        self.marks = sorted(marks - {1.0})
    def enter(self, share: float) -> str:
        """Sets the model up for the last stage that begins by this share of training; says what it is."""
        mark = self.marks[bisect.bisect(self.marks, share) - 1]
        frozen = [0 < row.freeze <= mark for row in self.h.maps]
        for row, stands_still in zip(self.h.maps, frozen):
            self.model.get_submodule(row.name).requires_grad_(not stands_still)
        recurs = bool(self.h.recurring_layers) and self.h.recur_frac <= mark
        for module in (*self.model.modules(), *(self.teacher.modules() if self.h.self_distill else ())):
            module.recurs = recurs
        taught, self.teaches = self.teaches, bool(self.teacher) and (
            self.h.distill_start_frac <= mark < self.h.distill_end_frac)
        if self.h.self_distill and self.teaches and not taught:
            self.teacher.load_state_dict(self.model.state_dict())  # in place: a new tensor means a new graph
        self.current = mark
        return f"frozen_maps:{sum(frozen)} recurrence:{recurs} teacher:{self.teaches}"
    @torch.no_grad()
    def teach(self, ids: Tensor) -> Tensor | None:
        """The teacher's logits (B, T, vocabulary), where there is one at this stage."""
        return self.predict(ids) if self.teaches else None

class Trainer:
    """Training as a state that can be saved before any step; a step needs settings and data besides."""
    def __init__(self, h, world, model, teacher: LanguageModel | None, data: TrainingData, folder: Path):
        self.h, self.world, self.model, self.data, self.folder = h, world, model, data, folder
        self.groups, self.quantizers = tensors_by_role(model), quantizers_of(h)
        self.stages = Stages(h, model, teacher, world.compile)
        torch._dynamo.config.recompile_limit = 8 + 2 * len(self.stages.marks)  # each stage is a graph
        self.forward = torch.compile(model, dynamic=False, fullgraph=True, disable=not world.compile)
        self.optimizers = Optimizers(self.groups, h, world)
        self.averages = Averages(self.optimizers.params, h)
        self.clock = Clock(h.iterations, h.max_wallclock_seconds - h.gptq_reserve_seconds)
        self.done, self.qat, self.every = 0, False, h.checkpoint_seconds or math.inf
        self.measured = [], torch.zeros(0), None  # of the last step: names, loss and norms, their arrival
        self.saved, self.saved_at, self.saving_took, self.fingerprint = "none", 0.0, 0.0, model.fingerprint()
        self.parts = {"muon": self.optimizers.muon, "adam": self.optimizers.adam, "averages": self.averages}
        self.parts |= {"teacher": self.stages.teacher} if h.self_distill else {}
    def warm_up(self) -> None:
        """Runs every stage, and so compiles it, before the clock starts; the weights are as before."""
        optimizers, marks = Optimizers(self.groups, self.h, self.world), self.stages.marks
        initial = [p.detach().clone() for p in optimizers.params]
        self.model.train()
        for step, mark in itertools.product(range(-(-self.h.warmup_steps // len(marks))), marks):
            self.stages.enter(mark)
            accumulate_gradients(self.forward, self.data.micro_batches(step, self.world), self.stages.teach)
            optimizers.step(step, 1.0)
        torch._foreach_copy_([p.detach() for p in optimizers.params], initial)  # in place: else a new graph
        self.stages.enter(0.0)
    def state_dict(self) -> dict:
        """All but the weights."""
        own = {"done": self.done, "qat": self.qat, "mark": self.stages.current, "clock": vars(self.clock)}
        return own | {name: part.state_dict() for name, part in self.parts.items()}
    def load_state_dict(self, state: dict) -> None:
        self.done, self.qat = state["done"], state["qat"]
        self.stages.enter(state["mark"])
        vars(self.clock).update(state["clock"])
        self.clock.iterations = self.done if self.h.export_only else self.h.iterations
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.saved, self.saved_at = f"that of step {self.done}", self.clock.elapsed
    def save(self) -> None:
        """Writes a checkpoint; the one before is kept beside it."""
        began = time.perf_counter()
        self.check_finite()  # a checkpoint must be one to go back to
        save_checkpoint(self.h, self.world, self.model, self.fingerprint, self.folder, {}, self.state_dict())
        self.saved, self.saved_at = f"{self.folder}/checkpoint.pt of step {self.done}", self.clock.elapsed
        self.saving_took = self.world.agree(time.perf_counter() - began)[0]  # all wait until it is written
    def check_finite(self) -> None:
        """UserError if the last step saw a loss or gradient that is not finite; waits for that step."""
        names, values, arrival = self.measured
        if arrival:
            arrival.synchronize()
        if bad := [name for name, is_finite in zip(names, values.isfinite().tolist()) if not is_finite]:
            raise UserError(f"step {self.done}: {', '.join(bad[:3])} not finite ({len(bad)} in all); the last"
                            f" good checkpoint is {self.saved}. Lower the learning rates, or export that")
    def run(self, val: ValidationStream) -> dict:
        """Trains to the end, leaves in the model the average that does best on held-out text; the figures."""
        h, clock, stages = self.h, self.clock, self.stages
        self.world.can_save, began = True, time.perf_counter()
        while True:
            due = clock.elapsed - self.saved_at >= max(self.every, 100 * self.saving_took)  # 1% at most
            mine = clock.remaining(self.done), clock.share(self.done), due
            remaining, share, due, stops = self.world.agree(*mine)
            if due or stops:
                self.save()
            if stops:
                raise UserError(f"stopped as a signal asked; the same RUN_ID continues from {self.saved}")
            validates = h.val_loss_every and self.done and self.done % h.val_loss_every == 0
            if validates or remaining <= 0:
                self.check_finite()  # and so waits for what is queued: it is training
                clock.elapsed += time.perf_counter() - began
            share = share if remaining > 0 else 1.0
            if bisect.bisect(stages.marks, share) > bisect.bisect(stages.marks, stages.current):
                self.world.log(f"stage step:{self.done} share:{share:.4f} {stages.enter(share)}")
            if remaining <= 0:
                return self.finish(val)
            if validates:
                self.validate(val)
                began = time.perf_counter()
            loss = self.step(int(remaining), share)
            clock.step_took(time.perf_counter() - began)
            began = time.perf_counter()
            if h.train_log_every and (self.done <= 10 or self.done % h.train_log_every == 0):
                self.log(f"train_loss:{self.world.sum_(loss.clone()).item() / self.world.count:.4f}")
    def step(self, remaining: int, share: float) -> Tensor:
        """One step, its loss; `remaining` counts it, `share` is what is over of training before it."""
        h, world = self.h, self.world
        scale = (min(1.0, (1 - share) / h.warmdown_frac) if h.warmdown_frac else
                 warmdown_scale(self.done, remaining, h.warmdown_iters))
        if scale < h.late_qat_threshold and not self.qat:
            self.qat = True
            world.log(f"late_qat:on step:{self.done} scale:{scale:.4f}")
        torch.manual_seed(h.seed + self.done * world.count + world.rank)  # of dropout, wherever a run resumes
        self.model.train()
        with weights_as_stored(self.groups, self.quantizers) if self.qat else contextlib.nullcontext():
            batches = self.data.micro_batches(self.done, world)
            loss = accumulate_gradients(self.forward, batches, self.stages.teach)
        norms = self.optimizers.step(self.done, scale)  # on the float32 masters
        self.averages.update(self.done, scale)
        self.check_finite()  # the step before, while this one is under way: the device is not to stand idle
        values = torch.stack([loss, *norms.values()]).to("cpu", non_blocking=True)
        arrival = torch.cuda.current_stream().record_event() if world.on_cuda else None
        self.measured, self.done = (["loss", *norms], values, arrival), self.done + 1
        return loss
    def log(self, what: str) -> None:
        took, step = 1000 * self.clock.elapsed, f"step:{self.done}/{self.h.iterations}"
        self.world.log(f"{step} {what} train_time:{took:.0f}ms step_avg:{took / max(self.done, 1):.2f}ms")
    def validate(self, val: ValidationStream) -> dict:
        nats, bpb = evaluate(self.model, val, self.h, self.world, self.h.eval_seq_len)
        self.log(f"val_loss:{nats:.4f} val_bpb:{bpb:.4f}")
        return {"val_loss_before": nats, "val_bpb_before": bpb}
    def finish(self, val: ValidationStream) -> dict:
        """Leaves in the model the weights that do best on held-out training text, validates; the figures."""
        began, elapsed, scores = time.perf_counter(), self.clock.elapsed, {}
        params, candidates = [p.detach() for p in self.optimizers.params], self.averages.candidates()
        held_out, rows = copy.copy(val), self.data.read(self.data.held_out)
        held_out.tokens = torch.cat([rows[:, :-1].flatten(), rows[-1, -1:]])
        for name, weights in candidates.items():
            torch._foreach_copy_(params, weights)
            scores[name] = evaluate(self.model, held_out, self.h, self.world, self.h.eval_seq_len)[0]
        best = min(scores, key=lambda name: (math.isnan(scores[name]), scores[name]))
        if not math.isfinite(scores[best]):
            raise UserError(f"the trained weights' loss is not finite: {scores}; lower the learning rates")
        torch._foreach_copy_(params, candidates[best])
        losses = " ".join(f"{name}:{score:.4f}" for name, score in scores.items())
        end = "ITERATIONS" if self.done >= self.clock.iterations else "MAX_WALLCLOCK_SECONDS"
        self.world.log(f"average {losses} exported:{best} ended_by:{end}")
        took, speed = time.perf_counter() - began, self.h.train_batch_tokens * self.done / max(elapsed, 1e-9)
        return {"steps": self.done, "train_seconds": round(elapsed, 3), "tokens_per_second": round(speed),
                "choice_seconds": round(took, 3), **self.validate(val),
                **{f"holdout_loss_{name}": score for name, score in scores.items()}}

# ---- Main --------------------------------------------------------------------------------------------------
# What may differ where a run is continued: where things lie, how much is told, what has to fit.
MAY_DIFFER = ("run_id resume output_dir data_path tokenizer_path distill_from compile checkpoint_seconds"
              " timeout_seconds train_log_every author github_id allow_unknown micro_batch_tokens"
              " eval_batch_tokens model_limit_bytes artifact_limit_bytes").split()
def save_checkpoint(h, world, model, fingerprint: str, folder: Path, figures: dict, training: dict) -> None:
    """Rank 0 writes all that training goes on from, or the export alone where there are figures."""
    if world.rank == 0:
        buffer, facts = io.BytesIO(), {"settings": dataclasses.asdict(h), "model": h.model_settings()}
        facts |= {"fingerprint": fingerprint, "versions": VERSIONS, "figures": figures}
        torch.save(facts | {"weights": model.state_dict(), "training": training}, buffer)
        write_file(folder / "checkpoint.pt", buffer.getbuffer(), folder / "checkpoint.previous.pt")

def read_checkpoint(*paths: Path) -> dict:
    """The first that is a whole checkpoint, else UserError. Nothing in the files is executed."""
    for path in paths:
        with contextlib.nullcontext() if path is paths[-1] else contextlib.suppress(UserError):
            with distrusting(f"{path}, as a checkpoint,"), zipfile.ZipFile(path) as archive:
                if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                    raise ValueError("it is torn")  # stored as it is, every entry with a checksum
                saved = torch.load(path, map_location="cpu", weights_only=True)
                parts = "settings", "model", "fingerprint", "versions", "figures", "weights", "training"
                return {part: saved[part] for part in parts}

def open_run(h, world) -> tuple[Path, dict | None]:
    """The run's folder, its log open, and the checkpoint to go on from, if it has one."""
    folder, saved = Path(h.output_dir) / (h.run_id or time.strftime("%Y%m%d-%H%M%S")), None
    if world.rank == 0:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        goes_on = "train.log" in names and "submission.json" not in names
        if names and (not goes_on or h.resume == "0") or h.resume == "1" and not goes_on:
            raise UserError(f"{folder} is not there, finished, or something else; choose a new RUN_ID")
        folder.mkdir(parents=True, exist_ok=True)
        world.open_log(folder / "train.log")
        paths = [folder / name for name in ("checkpoint.pt", "checkpoint.previous.pt") if name in names]
        saved = read_checkpoint(*paths) if paths else None
    return folder, world.share(saved)

def preflight(h, world, model: LanguageModel, data: TrainingData, val: ValidationStream, tokenizer: Tokenizer,
              folder: Path) -> None:
    """All that comes after training, in small and with the untrained model: what would fail, fails now."""
    began, stage, trial, few = time.perf_counter(), "export", copy.deepcopy(model).eval(), copy.copy(val)
    for p in trial.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.02)  # codes of zeros would pack to nothing
    few.tokens = val.tokens[: 1 + h.eval_seq_len + 2 * h.eval_stride]
    try:
        blob = export(h, world, trial, data, 0, tokenizer, trial=True)
        stage = "evaluation from the artifact"
        rebuilt = build_model(*read_artifact(blob), world)
        if not math.isfinite(evaluate(rebuilt, few, h, world, h.eval_stride)[0]):
            raise UserError("the untrained model's loss is not finite; lower the initial gains")
        stage, need = "disk", sum((60 + 12 * h.self_distill) * p.numel() for p in model.parameters())
        if world.rank == 0 and shutil.disk_usage(folder).free < need:  # for three checkpoints
            raise UserError(f"{folder} needs {need:,} bytes free; make room, or set OUTPUT_DIR")
    except (UserError, RuntimeError, OSError) as error:
        raise UserError(f"preflight, {stage}: {error} (nothing is trained yet)") from error
    world.log(f"preflight: export, reading back and evaluation work, {time.perf_counter() - began:.1f} s")

def train_and_export(h, world, tokenizer: Tokenizer, val: ValidationStream, folder: Path,
                     saved: dict | None) -> tuple[bytes, dict]:
    """The artifact of a new model, or of a saved one, and the run's figures."""
    data, teacher, log = TrainingData(h), None, world.log
    if h.distill_from and not h.export_only and not (saved and saved["figures"]):
        header, tensors = read_artifact(Path(h.distill_from).read_bytes())
        if header.get("tokenizer") != tokenizer.sha256:
            raise UserError(f"DISTILL_FROM={h.distill_from}: the teacher has another tokenizer")
        teacher = build_model(header, tensors, world).requires_grad_(False)
    torch.manual_seed(h.seed)
    model = build_model(saved, saved["weights"], world, h) if saved else make_model(h, world.dtype)
    if not saved:
        model.load_state_dict(world.share(model.state_dict()))  # another machine's QR may differ in a bit
    model.to(world.device)
    if world.share(fingerprint := model.fingerprint()) != fingerprint:
        raise UserError("the processes draw different random maps; use the same versions on all machines")
    log(Path(__file__).read_text(encoding="utf-8"), console=False)  # a log is enough to repeat the run
    log("\n".join(f"{name.upper()}={value}" for name, value in dataclasses.asdict(h).items()), console=False)
    log("\n".join(describe_maps(model)))
    trained = sum(p.numel() for p in model.parameters())
    frozen = sum(row.out_features * row.in_features for row in model.frozen)
    log(f"{trained:,} trained and {frozen:,} frozen parameters; {len(model.frozen)} of {len(model.table)}"
        f" maps are random, in 0 bytes; all that is learned takes {stored_bytes(model):,} unpacked")
    log(f"versions {json.dumps(VERSIONS)} device {world.device_name}, {torch.get_num_threads()} threads")
    if not (figures := saved["figures"] if saved else {}):
        trainer = Trainer(h, world, model, teacher, data, folder)
        if not h.export_only:
            preflight(h, world, model, data, val, tokenizer, folder)
            trainer.warm_up()
        if saved:
            with distrusting("the checkpoint's training"):
                trainer.load_state_dict(saved["training"])
            log(f"continued after step {trainer.done}")
        figures = {"trained_parameters": trained, "frozen_parameters": frozen} | trainer.run(val)
        del trainer  # its memory is the export's
    if not (saved and saved["figures"] and (folder / "checkpoint.pt").exists()):  # else the one that was read
        save_checkpoint(h, world, model, fingerprint, folder, figures, {})
    world.can_save = False
    if world.agree()[-1]:
        raise UserError(f"stopped as a signal asked; the same RUN_ID exports {folder}/checkpoint.pt")
    began = time.perf_counter()
    blob = export(h, world, model, data, figures["steps"], tokenizer)
    if world.rank == 0:
        write_file(folder / "model.int6.ptz", blob)
    took = time.perf_counter() - began + figures["choice_seconds"]
    return blob, figures | {"export_seconds": round(took, 3)}

def run(h, world) -> None:
    """The job: train and export, unless there is an artifact; evaluate it from its bytes alone; report."""
    blob, saved, figures, folder = b"", None, {}, None
    if h.eval_only:
        with distrusting(f"MODEL_PATH={h.model_path}"):
            blob = Path(h.model_path).read_bytes()
            stored = read_artifact(blob)[0]["model"]
            h = h.adopt({name: stored[name] for name in h.model_settings()}, f"MODEL_PATH={h.model_path}")
    elif h.export_only:
        saved = read_checkpoint(Path(h.checkpoint_path))
        with distrusting(what := f"CHECKPOINT_PATH={h.checkpoint_path}"):  # as it was, but for what is given
            stored = {name: saved["settings"][name] for name in saved["settings"].keys() - MAY_DIFFER}
            h = h.adopt(stored, what, stored.keys() - saved["model"].keys())
    tokenizer = Tokenizer(h.tokenizer_path, h.vocab_size)
    tokenizer.check_manifest(h)
    val = ValidationStream(h, tokenizer)
    if len(val.tokens) <= h.eval_seq_len:
        raise UserError(f"EVAL_SEQ_LEN={h.eval_seq_len} is longer than a stream of {len(val.tokens)} tokens")
    if not h.eval_only:
        folder, resumed = open_run(h, world)
        if resumed:
            saved, h = resumed, h.adopt(resumed["settings"], str(folder), MAY_DIFFER)
        world.h, world.dtype = h, World(h).dtype  # COMPILE stays what it is here and now
        blob, figures = train_and_export(h, world, tokenizer, val, folder, saved)
    header, tensors = read_artifact(blob)
    if header.get("tokenizer") != tokenizer.sha256:
        raise UserError(f"TOKENIZER_PATH={h.tokenizer_path} is not the tokenizer the artifact was made with")
    began, model = time.perf_counter(), build_model(header, tensors, world)
    for kind, stride in (("roundtrip", h.eval_seq_len), ("sliding_window", h.eval_stride)):
        start, mode = time.perf_counter(), h.eval_mode if stride < h.eval_seq_len else "exact"
        loss, bpb = evaluate(model, val, h, world, stride)
        seconds, whole = (round(time.perf_counter() - since, 3) for since in (start, began))
        figures |= {f"val_loss_{kind}": loss, f"val_bpb_{kind}": bpb, "eval_seconds": whole}
        world.log(f"final_int6_brotli_{kind} val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{stride}"
                  f" mode:{mode} eval_time:{1000 * seconds:.0f}ms")
        world.log(f"final_int6_brotli_{kind}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    code, size = os.path.getsize(__file__), len(blob)
    world.log(f"artifact {code + size:,} bytes: code {code:,}, model {size:,}")
    if folder and world.rank == 0:
        submission = {"author": h.author, "github_id": h.github_id, "name": "Adapters on random linear maps",
            "blurb": f"{h.num_layers} layers of width {h.model_dim}, maps {h.map_basis}, {h.map_adapter}",
            "date": time.strftime("%F"), "hardware": f"{world.count} x {world.device_name}",
            "val_loss": figures["val_loss_sliding_window"], "val_bpb": figures["val_bpb_sliding_window"],
            "bytes_total": code + size, "bytes_code": code, "seeds": [h.seed],
            "dataset": Path(h.data_path).name, "eval_mode": mode, **figures}
        write_file(folder / "submission.json", (json.dumps(submission, indent=2) + "\n").encode())
        world.log(f"written: {folder}/ model.int6.ptz, submission.json, checkpoint.pt, train.log")

REMEDIES = {r"out of memory|allocate|MemoryError": "lower MICRO_BATCH_TOKENS or EVAL_BATCH_TOKENS",
            r"Errno": "see to that file or disk",
            r"gloo|NCCL|[Cc]onnection|[Tt]imed? ?out": "another process died, or hung for TIMEOUT_SECONDS"}
def main() -> None:
    try:
        h = Hyperparameters()
        with World(h) as world:
            run(h, world)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except (MemoryError, OSError, RuntimeError) as error:
        for pattern, remedy in REMEDIES.items():
            if re.search(pattern, text := f"{type(error).__name__}: {error}".splitlines()[0]):
                raise SystemExit(f"error: {text}: {remedy}. The same RUN_ID continues a run") from None
        raise

if __name__ == "__main__":
    main()
