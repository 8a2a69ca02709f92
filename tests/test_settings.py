"""Settings: what is accepted, what is refused, --help, and whether a message would help."""

from __future__ import annotations

import dataclasses
import re

import pytest

import helpers
from helpers import SETTINGS, TINY, refusal, train_gpt

UserError, UNSUPPORTED = train_gpt.UserError, train_gpt.UNSUPPORTED
build_map_table, load_settings = train_gpt.build_map_table, train_gpt.load_settings

# What a shell, a launcher, a scheduler, a container or a library sets, so that every run has some.
COMMON_VARIABLES = """
    PATH HOME USER LOGNAME SHELL TERM LANG LC_ALL PWD OLDPWD SHLVL TMPDIR TZ HOSTNAME DISPLAY
    EDITOR PAGER MAIL LS_COLORS SSH_CLIENT SSH_TTY SSH_AUTH_SOCK XDG_CACHE_HOME XDG_RUNTIME_DIR
    MODULEPATH LOADEDMODULES MANPATH LD_LIBRARY_PATH PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED
    VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV CC CXX CFLAGS LDFLAGS CI RANK LOCAL_RANK
    GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE
    MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
    TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_ERROR_FILE TORCHINDUCTOR_CACHE_DIR TORCH_HOME
    TORCH_LOGS TORCH_NCCL_ASYNC_ERROR_HANDLING TRITON_CACHE_DIR OMP_NUM_THREADS MKL_NUM_THREADS
    OPENBLAS_NUM_THREADS NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME
    PYTORCH_CUDA_ALLOC_CONF CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_PATH NVIDIA_VISIBLE_DEVICES
    NVIDIA_DRIVER_CAPABILITIES RUNPOD_POD_ID SLURM_JOB_ID SLURM_JOBID SLURM_PROCID SLURM_LOCALID
    SLURM_NTASKS SLURM_NODELIST SLURM_ARRAY_TASK_ID PBS_JOBID HF_HOME HF_TOKEN WANDB_API_KEY
    WANDB_PROJECT WANDB_RUN_ID WANDB_MODE GITHUB_ACTIONS GITHUB_ACTOR GITHUB_SHA GITHUB_REF
    GITHUB_RUN_ID GITHUB_TOKEN GIT_AUTHOR_NAME MODEL_NAME DATASET_PATH
    BATCH_SIZE
"""


def load(variables: dict) -> train_gpt.Hyperparameters:
    """Return the settings of an environment that has these variables and no others."""
    return load_settings({name: str(value) for name, value in variables.items()})


def message_of(variables: dict) -> str:
    """Return what load_settings says against these variables."""
    with pytest.raises(UserError) as refused:
        load(variables)
    return str(refused.value)


def faults(variables: dict) -> list[str]:
    """Return the lines that message has below its heading, one for each fault."""
    return [line.strip() for line in message_of(variables).splitlines()[1:]]


# ---- What is accepted ----------------------------------------------------------------------------


def test_defaults_are_the_published_configuration():
    h = load({})
    shape = (h.num_layers, h.model_dim, h.num_heads, h.num_kv_heads, h.head_dim)
    assert shape == (11, 512, 8, 4, 64)
    assert (h.mlp_mult, h.mlp_dim, h.rope_dims, h.vocab_size) == (3.0, 1536, 16, 1024)
    assert (h.qk_gain_init, h.value_layers) == (1.5, [9, 10])
    assert (h.train_batch_tokens, h.train_seq_len, h.eval_stride) == (786_432, 2048, 64)
    assert h.warmdown_iters == 3500
    assert (h.matrix_lr, h.tied_embed_lr, h.scalar_lr, h.ema_decay) == (0.025, 0.035, 0.025, 0.997)
    assert h.artifact_limit_bytes == 16_000_000


def test_published_command_is_accepted():
    command = (
        "USE_RANDOM_ADAPTERS=1 RANDOM_ADAPTER_RANK=32 RANDOM_ADAPTER_SEED=12345 NGRAM_EVAL=0"
        " KNN_LAMBDA=0 SEED=42 OMP_NUM_THREADS=1"
    )
    h = load(dict(assignment.split("=") for assignment in command.split()))
    assert (h.map_basis, h.map_adapter, h.map_seed) == ("orthogonal", "lora:32", 12_345)
    assert build_map_table(h) == build_map_table(load({}))
    assert h.seed == 42


TEXTS = {
    "map_basis": "gaussian",
    "map_init": "zero",
    "map_twist": "permutation",
    "map_gain": "2",
    "map_adapter": "lora:8",
    "map_scale": "row",
    "map_gate": "0.5",
    "map_freeze": "0.5",
    "ve_layers": "0",
    "recur_layers": "0",
    "attention_backend": "flash",
}
COMPANIONS = {
    "map_twist": {"MAP_BASIS": "shared"},
    "eval_only": {"MODEL_PATH": "some.ptz"},
    "export_only": {"CHECKPOINT_PATH": "some.pt"},
    "self_distill": {"DISTILL_START_FRAC": "0.5"},
    "matrix_bits": {"QUANTIZER": "rms"},
    "embed_bits": {"QUANTIZER": "rms"},
    "matrix_clip_sigmas": {"QUANTIZER": "rms"},
    "embed_clip_sigmas": {"QUANTIZER": "rms"},
}


def another_value(field: dataclasses.Field) -> str | int | float:
    """Return a value that a setting accepts and that is not its default."""
    default, rule = field.default, field.metadata
    if isinstance(default, str):
        others = [word for word in rule["choices"] if word != default and word != "cuda"]
        return others[0] if others else TEXTS.get(field.name, "elsewhere")
    if isinstance(default, float):
        return default / 2 or 0.5
    lower = default // 2
    return lower if lower >= rule["low"] and lower != default else default + 1


@pytest.mark.parametrize("name", train_gpt.SETTINGS)
def test_a_setting_is_read_from_its_variable(name):
    value = another_value(train_gpt.SETTINGS[name])
    h = load(COMPANIONS.get(name, {}) | {name.upper(): value})
    assert getattr(h, name) == value != getattr(load({}), name)
    assert type(getattr(h, name)) is type(value)
    assert name in h.explicit


def test_the_environment_is_the_process_own(monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "12")
    assert load_settings().num_layers == 12


def test_keywords_win_over_the_environment():
    """What a keyword replaces need not even be valid."""
    assert load_settings({"NUM_LAYERS": "99999"}, num_layers=12).num_layers == 12


def test_settings_are_a_frozen_dataclass():
    """A changed copy is another object; nothing is read or checked anew."""
    h = load({"NUM_LAYERS": 4})
    with pytest.raises(dataclasses.FrozenInstanceError):
        h.num_layers = 5
    changed = dataclasses.replace(h, num_layers=5)
    assert (h.num_layers, changed.num_layers) == (4, 5)
    assert changed != h == load({"NUM_LAYERS": 4})


@pytest.mark.parametrize("name", ["MAP_SEED", "RANDOM_ADAPTER_SEED", "RANDOM_BASIS_SEED"])
def test_hexadecimal_seeds(name):
    h = load({"SEED": "0xD15EA5E", name: "0xd15ea5e"})
    table = build_map_table(h)
    assert h.seed == h.map_seed == table["blocks.0.attention.q"].seed == 219_540_062
    assert build_map_table(load({name: "219540062"})) == table


def test_maps_of_embeddings_are_random_only_by_name():
    kinds = ["embedding.proj", "bigram.proj", "value_embedding.proj"]
    narrow = {"EMBEDDING_DIM": 128}
    table = build_map_table(load(narrow | {"MAP_BASIS": "all=gaussian", "MAP_FREEZE": "0.5"}))
    assert [spec.kind for spec in table.values() if spec.basis == "learned"] == kinds
    assert {table[kind].freeze for kind in kinds} == {0.0}
    named = "learned,embedding=orthogonal,bigram.proj=gaussian"
    table = build_map_table(load(narrow | {"MAP_BASIS": named, "MAP_ADAPTER": "none"}))
    assert [spec.name for spec in table.values() if spec.is_random] == kinds[:2]
    assert table["embedding.proj"].shape == (512, 128)
    assert {table[kind].adapter for kind in kinds} == {"none"}


@pytest.mark.parametrize("settings", [{}, {"EMBEDDING_DIM": 512}])
def test_an_embedding_as_wide_as_the_model_has_no_map(settings):
    assert "embedding.proj" not in build_map_table(load(settings))
    with pytest.raises(train_gpt.UserError, match="embedding selects no map"):
        load(settings | {"MAP_BASIS": "learned,embedding=orthogonal"})


@pytest.mark.parametrize("layers", [1, 2, 6, 9, 12])
def test_the_number_of_layers_can_be_set_alone(layers):
    """The layers of the value embedding are the last two, or the only one."""
    h = load({"NUM_LAYERS": layers})
    assert h.value_layers == list(range(layers))[-2:]
    maps = [spec for spec in build_map_table(h).values() if spec.is_random]
    assert len(maps) == 6 * layers


def test_layers_of_a_value_embedding_that_is_off_do_not_matter():
    assert load({"VE_ENABLED": 0, "VE_LAYERS": 77}).value_layers == []


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", []),
        ("3", [3]),
        ("3,1", [3, 1]),
        ("1+1, 2", [1, 2]),
        ("0-2,5,9-", [0, 1, 2, 5, 9, 10]),
        ("-1", [10]),
        ("-2,-1", [9, 10]),
        ("-3--2", [8, 9]),
        ("8--2", [8, 9]),
        ("-11", [0]),
        ("-12,4", [4]),
    ],
)
def test_layers_by_number_range_and_from_the_end(text, layers):
    assert train_gpt.parse_layers(text, 11) == layers


@pytest.mark.parametrize("text", ["11", "0-11", "3-1", "-1--2", "x", "1.5", "-", "--1", "1-2-3"])
def test_text_that_names_no_layers_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        train_gpt.parse_layers(text, 11)


def test_a_selector_counts_layers_from_the_end():
    table = build_map_table(load({"MAP_BASIS": "learned,mlp.fc@-1=gaussian"}))
    assert [spec.name for spec in table.values() if spec.is_random] == ["blocks.10.mlp.fc"]


# ---- The command line ----------------------------------------------------------------------------


def test_help_lists_every_setting_and_ends_well():
    """Also where the environment is one that a run would refuse."""
    out = helpers.run_well({"NUM_LAYERS": "banana"}, arguments=["--help"])
    documented = dict(re.findall(r"^  ([A-Z][A-Z0-9_]+) +(.+)$", out, re.MULTILINE))
    assert documented.keys() == set(SETTINGS)
    for name, field in train_gpt.SETTINGS.items():
        default = "(empty)" if field.default == "" else f"({field.default})"
        meaning = f"{field.metadata['meaning']}{train_gpt.allowed_values(field)}"
        assert documented[name.upper()].split(maxsplit=1) == [default, meaning]
    assert re.search(r"^  NUM_LAYERS .* \[1 to 256\]$", out, re.MULTILINE)
    assert re.search(r"^  DEVICE .* \[auto, cpu, cuda\]$", out, re.MULTILINE)
    assert re.search(r"^  TARGET_BYTES .* \[at least 0\]$", out, re.MULTILINE)


def test_each_group_of_help_begins_where_its_comment_stands_in_the_script():
    source = helpers.SCRIPT.read_text(encoding="utf-8")
    heading, other = r"^    # ([^\n:]+)(?::[^\n]*)?\n", r"(?:    # [^\n]*\n)*"
    first_below = heading + other + r"    (\w+): \w+ = (?:model_)?setting\("
    assert dict(re.findall(first_below, source, re.MULTILINE)) == train_gpt.SETTING_GROUPS


@pytest.mark.parametrize("argument", ["--num-layers=3", "NUM_LAYERS=3", "config.json"])
def test_an_argument_is_refused(argument, capsys):
    """Settings are variables; an argument that was ignored would be a run of something else."""
    with pytest.raises(SystemExit) as ended:
        train_gpt.main([argument])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {argument}" in capsys.readouterr().err


# ---- Published names of what is here -------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "columns"),
    [
        ({"ADAPTER_LR": 0.01}, {"factor_lr": 0.01}),
        ({"ADAPTER_RANK": 8, "RANDOM_BACKBONE_SEED": 7}, {"map_adapter": "lora:8", "map_seed": 7}),
        ({"MLP_RANK": 4}, {"map_basis": "mlp=orthogonal", "map_adapter": "lora:4"}),
        ({"ENABLE_LOOPING_AT": 0.5}, {"recur_frac": 0.5}),
        ({"PARALLEL_RESIDUAL_START": 7}, {"parallel_from": 7}),
        ({"ROPE_TRAIN_SEQ_LEN": 512}, {"rope_stretch_from": 512}),
        ({"MUON_NS_STEPS": 4}, {"muon_backend_steps": 4}),
        ({"GPTQ_CALIBRATION_BATCHES": 16}, {"gptq_calib_batches": 16}),
        ({"STRIDE": 128, "SWA_EVERY": 25}, {"eval_stride": 128, "swa_interval": 25}),
        ({"USE_RANDOM_ADAPTERS": 0}, {"map_basis": "learned"}),
        ({"USE_RANDOM_ADAPTERS": 0, "RANDOM_ADAPTER_RANK": 8}, {"map_basis": "learned"}),
        (
            {"RANDOM_ADAPTER_RANK": 8, "RANDOM_ADAPTER_SEED": 0},
            {"map_adapter": "lora:8", "map_seed": 0},
        ),
        (
            {"RANDOM_BASIS_ENABLED": 1},
            {
                "map_basis": "mlp=gaussian",
                "map_gate": "mlp.fc=0",
                "map_adapter": "lora:16",
                "map_seed": 0xD15EA5E,
                "map_seed_stride": 1009,
            },
        ),
        (
            {
                "RANDOM_BASIS_ENABLED": 1,
                "LORA_RANK": 8,
                "RANDOM_BASIS_SEED": "0x10",
                "MAP_SEED_STRIDE": 50,
            },
            {
                "map_basis": "mlp=gaussian",
                "map_gate": "mlp.fc=0",
                "map_adapter": "lora:8",
                "map_seed": 16,
                "map_seed_stride": 50,
            },
        ),
        (
            {"USE_RANDOM_ADAPTERS": 0, "SELECTIVE_FREEZE": 1},
            {"map_basis": "mlp.in=gaussian", "map_adapter": "none", "map_seed": 42_000},
        ),
        ({"PROGRESSIVE_FREEZE_FRAC": 0.3}, {"map_basis": "learned", "map_freeze": "mlp.in=0.3"}),
        (
            {"RAND_PROJ_LAYERS": "0,2-3", "RAND_GAIN": 1},
            {"map_basis": "mlp.in@0,2-3=orthogonal", "map_adapter": "none", "map_scale": "row"},
        ),
        (
            {
                "RANDOM_BASIS_ENABLED": 0,
                "SELECTIVE_FREEZE": 0,
                "PROGRESSIVE_FREEZE_FRAC": 0,
                "RAND_GAIN": 0,
            },
            {},
        ),
        (
            {"LORA_RANK": 16, "MAP_ADAPTER": "lora:16", "RANDOM_ADAPTER_RANK": 16},
            {"map_adapter": "lora:16"},
        ),
    ],
)
def test_published_variables_are_what_they_expand_to(variables, columns):
    """A comma of theirs is between layers, and one of ours between rules."""
    columns = {name: str(value).replace("0,2-3", "0+2-3") for name, value in columns.items()}
    published = load(variables)
    ours = load_settings({}, **columns)
    assert {name: str(getattr(published, name)) for name in columns} == columns
    assert build_map_table(published) == build_map_table(ours)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"USE_RANDOM_ADAPTERS": 1, "SELECTIVE_FREEZE": 1}, "MAP_BASIS=mlp.in=gaussian orthogonal"),
        (
            {"USE_RANDOM_ADAPTERS": 1, "RANDOM_BASIS_ENABLED": 1},
            "MAP_BASIS=mlp=gaussian orthogonal",
        ),
        (
            {"RANDOM_BASIS_ENABLED": 1, "SELECTIVE_FREEZE": 1},
            "MAP_BASIS=mlp.in=gaussian mlp=gaussian",
        ),
        ({"USE_RANDOM_ADAPTERS": 1, "RAND_PROJ_LAYERS": 3}, "MAP_BASIS=mlp.in@3=orthogonal"),
        ({"RANDOM_ADAPTER_RANK": 8, "LORA_RANK": 16}, "MAP_ADAPTER=lora:16 lora:8"),
        ({"RANDOM_ADAPTER_SEED": 7, "RANDOM_BASIS_SEED": 8}, "MAP_SEED=8 7"),
        ({"MAP_BASIS": "hadamard", "USE_RANDOM_ADAPTERS": 1}, "MAP_BASIS=orthogonal hadamard"),
        ({"MAP_ADAPTER": "none", "LORA_RANK": 16}, "MAP_ADAPTER=lora:16 none"),
        ({"MAP_SEED": 1, "RANDOM_ADAPTER_SEED": 2}, "MAP_SEED=2 1"),
    ],
)
def test_published_variables_that_contradict_each_other_are_refused(variables, says):
    """Not one of them silently ignored: both names, and what each of them says."""
    (line,) = faults(variables)
    for part in [*variables, *says.split()]:
        assert re.search(rf"\b{re.escape(part)}\b", line), line


SWITCHES = ["USE_RANDOM_ADAPTERS", "RANDOM_BASIS_ENABLED", "SELECTIVE_FREEZE", "RAND_GAIN"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in SWITCHES for value in ("2", "yes", "-1")),
        ("RANDOM_ADAPTER_RANK", "many"),
        ("RANDOM_ADAPTER_RANK", "-1"),
        ("RANDOM_ADAPTER_RANK", "0"),
        ("LORA_RANK", "0"),
        ("LORA_RANK", "2.5"),
        ("LORA_RANK", "513"),
        ("RANDOM_ADAPTER_SEED", "many"),
        ("RANDOM_BASIS_SEED", "0xfg"),
        ("RANDOM_BASIS_SEED", "-1"),
        ("PROGRESSIVE_FREEZE_FRAC", "1.5"),
        ("PROGRESSIVE_FREEZE_FRAC", "half"),
        ("RAND_PROJ_LAYERS", "11"),
        ("RAND_PROJ_LAYERS", "0,x"),
    ],
)
def test_impossible_value_of_a_published_variable_is_refused(name, value):
    """A switch by its own name, another one by the setting that it stands for."""
    column = name
    if name not in SWITCHES:
        column = next(iter(train_gpt.ALIASES[name.lower()].sets)).upper()
    line = faults({name: value})[0]
    assert line.startswith(f"{column}=")
    assert value.replace(",", "+") in line


def test_zero_is_zero_however_it_is_written():
    """Published scripts have 0.0 as the fraction that freezes nothing."""
    whole, decimal = (load({"PROGRESSIVE_FREEZE_FRAC": text}) for text in ("0", "0.0"))
    assert build_map_table(whole) == build_map_table(decimal) == build_map_table(load({}))


# ---- What published scripts have and this one has not --------------------------------------------


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_variable_of_what_is_not_here_is_refused(name):
    """Of all settings, this one alone is complained of."""
    (line,) = faults({name: "7.25"})
    assert line == f"{name}=7.25: {UNSUPPORTED[name].reason}; unset it"


def test_values_that_change_nothing_are_accepted():
    """The defaults of published scripts: whoever exports all of their variables sets these."""
    for name, unsupported in UNSUPPORTED.items():
        for value in ("", *unsupported.defaults):
            assert load({name: value}) == load({}), (name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("TTT_ENABLED", "0.0"), ("TTT_CHUNK_TOKENS", "65_536"), ("TTT_MOMENTUM", ".90")],
)
def test_values_that_change_nothing_may_be_written_in_another_way(name, value):
    assert load({name: value}) == load({})


def test_refused_settings_leave_no_trace(tmp_path):
    """As a process: one message for all that is wrong, and not a file is written."""
    wrong = dict.fromkeys(UNSUPPORTED, "0.5") | {"NUM_LAYER": 3, "EVAL_STRIDE": "x"}
    message = refusal({**TINY, **wrong, "OUTPUT_DIR": tmp_path / "runs"}, cwd=tmp_path)
    for name in wrong:
        assert name in message
    assert list(tmp_path.iterdir()) == []


# ---- Misspelled settings -------------------------------------------------------------------------

TYPOS = {
    "dropped": lambda name, i: name[:i] + name[i + 1 :],
    "doubled": lambda name, i: name[: i + 1] + name[i:],
    "inserted": lambda name, i: name[:i] + "X" + name[i:],
    "changed": lambda name, i: name[:i] + "X" + name[i + 1 :],
    "swapped": lambda name, i: name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :],
}
# In a shorter name a typo changes too much to be told from a variable of another program.
CERTAIN_FROM = {"dropped": 6, "doubled": 4, "inserted": 4, "changed": 4, "swapped": 4}


def misspellings(name: str, kind: str) -> set[str]:
    """Return what one typo of a kind makes of a name, at every place."""
    made = {TYPOS[kind](name, i) for i in range(len(name))}
    return {typo for typo in made if typo and not typo[0].isdigit()} - {*SETTINGS, *UNSUPPORTED}


def suggestions(typos: set[str]) -> dict[str, str]:
    """Return the setting that the message proposes for each of these variables, all set at once."""
    try:
        load(dict.fromkeys(typos, "1"))
    except UserError as error:
        return dict(re.findall(r"^ *(\S+): no such setting; (\S+)\?", str(error), re.MULTILINE))
    return {}


@pytest.mark.parametrize("name", SETTINGS)
def test_misspelled_setting_is_refused_with_the_right_name(name):
    typos = set()
    for kind, shortest in CERTAIN_FROM.items():
        if len(name) >= shortest:
            typos |= misspellings(name, kind)
    found = suggestions(typos)
    # BETAX is as near to one as to the other.
    right = {"BETA1", "BETA2"} if name in ("BETA1", "BETA2") else {name}
    assert found.keys() == typos
    assert set(found.values()) <= right


def test_misspelled_preset_of_run_sh_is_refused():
    assert suggestions({"PRSET", "PRESETS"}) == {"PRSET": "PRESET", "PRESETS": "PRESET"}


def test_great_majority_of_all_misspellings_is_refused():
    """Short names too, of every setting, without exception."""
    right = total = 0
    for name in SETTINGS:
        typos = set().union(*(misspellings(name, kind) for kind in TYPOS))
        right += sum(found == name for found in suggestions(typos).values())
        total += len(typos)
    assert right / total > 0.98


def test_misspelling_can_be_accepted():
    assert load({"NUM_LAYER": 3, "ALLOW_UNKNOWN": 1}).num_layers == 11


def test_common_variables_are_not_mistaken_for_settings():
    """Some of them are torchrun's, and say that it may restart the run: that needs RUN_ID."""
    load(dict.fromkeys(COMMON_VARIABLES.split(), "1") | {"RUN_ID": "a"})


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("NUM_LAYERS", "many", "whole number"),
        ("NUM_LAYERS", "2.5", "whole number"),
        ("NUM_LAYERS", "", "whole number"),
        ("NUM_LAYERS", "0", "at least 1"),
        ("NUM_LAYERS", "257", "at most 256"),
        ("SEED", "0xfg", "whole number"),
        ("SEED", "-1", "at least 0"),
        ("SEED", str(2**63), "at most"),
        ("VOCAB_SIZE", "65537", "at most 65,536"),
        ("EVAL_ONLY", "2", "at most 1"),
        ("MATRIX_LR", "fast", "number"),
        ("MATRIX_LR", "", "number"),
        ("MATRIX_LR", "-0.1", "at least 0"),
        ("MATRIX_LR", "nan", "at least 0"),
        ("MATRIX_LR", "inf", "at least 0"),
        ("MAX_WALLCLOCK_SECONDS", "inf", "at least 0"),
        ("MAX_WALLCLOCK_SECONDS", "nan", "at least 0"),
        ("EMA_DECAY", "1", "at most"),
        ("BETA1", "1.0", "at most"),
        ("PRUNE_PCT", "-1", "at least 0"),
        ("MATRIX_BITS", "1", "at least 2"),
        ("MATRIX_BITS", "9", "at most 8"),
        ("EVAL_STRIDE", "0", "at least 1"),
        ("LOGIT_SOFTCAP", "0", "at least"),
        ("DTYPE", "float16", "bfloat16, float32"),
        ("COMPILE", "yes", "auto, 0, 1"),
        ("DEVICE", "gpu", "auto, cpu, cuda"),
        ("ATTENTION_BACKEND", "fa2", "'fa2' is none of fa3, cudnn, flash"),
        ("ATTENTION_BACKEND", "fa3", "one of torch's kernels"),
        ("EVAL_MODE", "fast", "exact, streaming"),
    ],
)
def test_impossible_value_is_refused(name, value, says):
    (line,) = faults({name: value})
    assert line.startswith(f"{name}={value}: ")
    assert says in line


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NUM_HEADS": 7, "NUM_KV_HEADS": 7}, "NUM_HEADS=7 MODEL_DIM=512"),
        ({"NUM_KV_HEADS": 3}, "NUM_KV_HEADS=3 NUM_HEADS=8"),
        ({"ROPE_DIMS": 15}, "ROPE_DIMS=15"),
        ({"ROPE_DIMS": 66}, "ROPE_DIMS=66 64"),
        ({"VE_LAYERS": "9,11"}, "VE_LAYERS=9,11 10"),
        ({"VE_LAYERS": "nine"}, "VE_LAYERS=nine"),
        ({"NUM_LAYERS": 9, "VE_LAYERS": "9,10"}, "VE_LAYERS=9,10 8"),
        ({"RECUR_LAYERS": "3,11"}, "RECUR_LAYERS=3,11 10"),
        ({"RECUR_LAYERS": "5-3"}, "RECUR_LAYERS=5-3"),
        ({"RANDOM_ADAPTER_RANK": 257}, "MAP_ADAPTER=lora:257 256"),
        ({"MAP_ADAPTER": "lora:257"}, "MAP_ADAPTER=lora:257 256"),
        ({"MAP_SEED_STRIDE": 1}, "MAP_SEED_STRIDE=1 seed"),
        (
            {"DISTILL_FROM": "some.ptz", "SELF_DISTILL": 1, "DISTILL_START_FRAC": 0.3},
            "DISTILL_FROM SELF_DISTILL=1",
        ),
        ({"SELF_DISTILL": 1}, "SELF_DISTILL=1 DISTILL_START_FRAC"),
        (
            {"DISTILL_START_FRAC": 0.5, "DISTILL_END_FRAC": 0.5},
            "DISTILL_START_FRAC=0.5 DISTILL_END_FRAC=0.5",
        ),
        (
            {"MLP_MULT": 0.01, "MODEL_DIM": 32, "ROPE_DIMS": 4, "USE_RANDOM_ADAPTERS": 0},
            "MLP_MULT=0.01",
        ),
        ({"EVAL_STRIDE": 2049}, "EVAL_STRIDE=2049 EVAL_SEQ_LEN=2048"),
        ({"TRAIN_BATCH_TOKENS": 786_431}, "TRAIN_BATCH_TOKENS=786431 TRAIN_SEQ_LEN=2048"),
        ({"WORLD_SIZE": 5}, "TRAIN_BATCH_TOKENS=786432 5"),
        ({"MAX_WALLCLOCK_SECONDS": 45}, "GPTQ_RESERVE_SECONDS=45 MAX_WALLCLOCK_SECONDS"),
        ({"EVAL_ONLY": 1}, "EVAL_ONLY=1 MODEL_PATH"),
        ({"EXPORT_ONLY": 1}, "EXPORT_ONLY=1 CHECKPOINT_PATH"),
    ],
)
def test_impossible_combination_is_refused(variables, says):
    (line,) = faults(variables)
    for part in says.split():
        assert re.search(rf"{re.escape(part)}\b", line), line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MAP_BASIS", "haar", "'haar' learned orthogonal gaussian hadamard"),
        ("MAP_BASIS", "", "'' learned"),
        ("MAP_BASIS", "gaussian,", "'' learned"),
        ("MAP_BASIS", "mlp=", "'' learned"),
        ("MAP_BASIS", "mlp@11=gaussian", "11 layers 10"),
        ("MAP_BASIS", "mlp@3-1=gaussian", "3-1 layers 10"),
        ("MAP_BASIS", "MLP=gaussian", "'MLP' selector"),
        ("MAP_BASIS", "mlp@x=gaussian", "'mlp@x' selector"),
        ("MAP_BASIS", "attn=gaussian", "attn selects no map"),
        ("MAP_BASIS", "mlp.gate=gaussian", "mlp.gate selects no map"),
        ("MAP_BASIS", "m1.mlp=gaussian", "m1.mlp selects no map"),
        ("MAP_BASIS", "shared:0", "'shared:0' learned shared"),
        ("MAP_BASIS", "gaussian:2", "'gaussian:2' learned"),
        ("MAP_INIT", "one", "'one' orthogonal zero"),
        ("MAP_TWIST", "rotation", "'rotation' none permutation orthogonal"),
        ("MAP_GAIN", "attention.o=2", "attention.o selects no map"),
        ("MAP_GAIN", "0", "'0' number"),
        ("MAP_GAIN", "inf", "'inf' number"),
        ("MAP_GAIN", "big", "'big' number"),
        ("MAP_ADAPTER", "dora:4", "'dora' lora vera sparse none"),
        ("MAP_ADAPTER", "", "'' lora none"),
        ("MAP_ADAPTER", "lora:4+", "'' lora"),
        ("MAP_ADAPTER", "lora", "'lora' rank 512 x 512"),
        ("MAP_ADAPTER", "lora:0", "rank 1"),
        ("MAP_ADAPTER", "lora:1.5", "'lora:1.5' rank"),
        ("MAP_ADAPTER", "mlp=vera:513", "'vera:513' 512 1536"),
        ("MAP_ADAPTER", "sparse:0", "'sparse:0' density"),
        ("MAP_ADAPTER", "sparse:1.1", "density 1"),
        ("MAP_ADAPTER", "sparse:nan", "density 1"),
        ("MAP_ADAPTER", "mask:3", "'mask:3' size"),
        ("MAP_SCALE", "column", "'column' none map row"),
        ("MAP_GATE", "open", "'open' number"),
        ("MAP_GATE", "nan", "'nan' number"),
        ("MAP_FREEZE", "1.5", "'1.5' number 0 1"),
        ("MAP_FREEZE", "mlp.in@1=-1", "'-1' number"),
    ],
)
def test_impossible_column_is_refused(name, value, says):
    """The column, what was wrong in it, and what there is instead."""
    lines = faults({name: value})
    for line in lines:
        assert line.startswith((f"{name}={value}: ", f"{name}: ")), line
    for part in says.split():
        assert part in lines[0], lines[0]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"MAP_BASIS": "attention=gaussian", "MAP_ADAPTER": "mlp.fc=lora:4"},
            "mlp.fc is learned in full",
        ),
        (
            {"MAP_BASIS": "shared,mlp.fc=learned", "MAP_TWIST": "permutation"},
            "mlp.fc is not shared and takes no twist",
        ),
        (
            {"MAP_ADAPTER": "none", "MAP_FREEZE": "mlp.fc=0.5"},
            "mlp.fc is orthogonal and has no adapter, scale or gate to freeze",
        ),
    ],
)
def test_columns_that_contradict_each_other_are_refused(variables, says):
    (line,) = faults(variables)
    assert says in line
    assert line.startswith(tuple(f"{name}={value}: " for name, value in variables.items()))


def test_evaluation_takes_any_number_of_processes():
    """It has no training batch to split."""
    load({"WORLD_SIZE": 5, "EVAL_ONLY": 1, "MODEL_PATH": "some.ptz"})


def test_all_errors_are_reported_at_once():
    wrong = {"NUM_LAYERS": "x", "SEED": -1, "NUM_HEADS": 7, "TTT_ENABLED": 1, "EVAL_STRIED": 64}
    message = message_of(wrong)
    for name in wrong:
        assert name in message


def test_unknown_keyword_is_refused():
    with pytest.raises(UserError, match="layers: no such setting"):
        load_settings({}, layers=3)
