"""Settings: what is accepted, what is refused, --help, and whether a message would help."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

import pytest

import helpers
from helpers import ROOT, SETTINGS, train_gpt

UserError, UNSUPPORTED = train_gpt.UserError, train_gpt.UNSUPPORTED
build_map_table, load_settings = train_gpt.build_map_table, train_gpt.load_settings

# What a shell, a launcher, a scheduler, a container or a library sets, so that every run has some.
COMMON_VARIABLES = """
    PATH HOME USER SHELL TERM LANG PWD SHLVL TMPDIR TZ HOSTNAME EDITOR PAGER MAIL CC CXX CI
    XDG_CACHE_HOME MODULEPATH MANPATH LD_LIBRARY_PATH PYTHONPATH PYTHONHASHSEED VIRTUAL_ENV
    CONDA_PREFIX RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS TORCH_HOME OMP_NUM_THREADS NCCL_DEBUG
    CUDA_VISIBLE_DEVICES CUDA_HOME NVIDIA_VISIBLE_DEVICES SLURM_JOB_ID SLURM_NTASKS PBS_JOBID
    HF_HOME WANDB_PROJECT WANDB_RUN_ID WANDB_MODE GITHUB_ACTOR GITHUB_RUN_ID GIT_AUTHOR_NAME
    MODEL_NAME DATASET_PATH BATCH_SIZE http_proxy https_proxy no_proxy
"""


def load(variables: dict) -> train_gpt.Hyperparameters:
    """Return the settings of an environment that has these variables and no others."""
    return load_settings({name: str(value) for name, value in variables.items()})


def faults(variables: dict) -> list[str]:
    """Return the lines that the refusal has below its heading, one for each fault."""
    with pytest.raises(UserError) as refused:
        load(variables)
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


def random_maps(h: train_gpt.Hyperparameters) -> list[str]:
    return [spec.name for spec in build_map_table(h).values() if spec.is_random]


# ---- What is accepted ----------------------------------------------------------------------------


def test_published_command_is_accepted():
    variables = {"USE_RANDOM_ADAPTERS": 1, "RANDOM_ADAPTER_RANK": 32, "RANDOM_ADAPTER_SEED": 12345}
    h = load(variables | {"NGRAM_EVAL": 0, "KNN_LAMBDA": 0, "SEED": 42, "OMP_NUM_THREADS": 1})
    assert (h.map_basis, h.map_adapter, h.map_seed) == ("orthogonal", "lora:32", 12_345)
    assert build_map_table(h) == build_map_table(load({}))
    assert h.seed == 42


def test_keywords_win_over_the_environment():
    """What a keyword replaces need not even be valid."""
    assert load_settings({"NUM_LAYERS": "99999"}, num_layers=12).num_layers == 12


def test_settings_of_an_artifact_come_back_with_all_their_defaults():
    """A default is no contradiction to what replaces it, such as WARMDOWN_FRAC."""
    h = load_settings({}, warmdown_frac=0.5)
    again = load_settings({}, **h.as_dict())
    assert again == h
    assert (h.explicit, again.explicit) == ({"warmdown_frac"}, train_gpt.SETTINGS.keys())


def test_maps_of_embeddings_are_random_only_by_name():
    kinds = ["bigram.proj", "value_embedding.proj"]
    table = build_map_table(load({"MAP_BASIS": "all=gaussian", "MAP_FREEZE": "0.5"}))
    assert [spec.kind for spec in table.values() if spec.basis == "learned"] == kinds
    assert {table[kind].freeze for kind in kinds} == {0.0}
    assert {table[kind].adapter for kind in kinds} == {"none"}
    for selector in ("bigram", "bigram.proj"):
        h = load({"MAP_BASIS": f"learned,{selector}=gaussian", "MAP_ADAPTER": "none"})
        assert random_maps(h) == kinds[:1]


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_the_number_of_layers_can_be_set_alone(layers):
    """The layers of the value embedding are the last two, or the only one."""
    h = load({"NUM_LAYERS": layers})
    assert h.value_layers == list(range(layers))[-2:]
    assert len(random_maps(h)) == 6 * layers
    assert load({"VE_ENABLED": 0, "VE_LAYERS": 77}).value_layers == []


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", []),
        ("1+1, 2", [1, 2]),
        ("0-2,5,9-", [0, 1, 2, 5, 9, 10]),
        ("8--2", [8, 9]),
        ("-12,4", [4]),
    ],
)
def test_layers_by_number_range_and_from_the_end(text, layers):
    assert train_gpt.parse_layers(text, 11) == layers


@pytest.mark.parametrize("text", ["11", "0-11", "3-1", "x", "1-2-3"])
def test_text_that_names_no_layers_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        train_gpt.parse_layers(text, 11)


@pytest.mark.parametrize(
    ("selector", "kinds"),
    [
        ("mlp.fc@-1", ["mlp.fc"]),
        ("mlp.in@-1", ["mlp.gate", "mlp.fc"]),
        ("mlp@10", ["mlp.gate", "mlp.fc", "mlp.proj"]),
    ],
)
def test_a_selector_names_kinds_and_layers_also_from_the_end(selector, kinds):
    """And the last rule that selects a map wins."""
    h = load({"MAP_BASIS": f"learned,{selector}=gaussian", "MLP_GATED": 1})
    assert set(random_maps(h)) == {f"blocks.10.{kind}" for kind in kinds}


# ---- The command line ----------------------------------------------------------------------------


def test_help_lists_every_setting_and_ends_well():
    """Also where the environment is one that a run would refuse."""
    out = helpers.run_well({"NUM_LAYERS": "banana"}, arguments=["--help"])
    documented = dict(re.findall(r"^  ([A-Z][A-Z0-9_]+) +(.+)$", out, re.MULTILINE))
    assert documented.keys() == set(SETTINGS)
    for name, field in train_gpt.SETTINGS.items():
        for part in (str(field.default), field.metadata["meaning"]):
            assert part in documented[name.upper()]


@pytest.mark.parametrize("argument", ["--num-layers=3", "NUM_LAYERS=3"])
def test_an_argument_is_refused(argument, capsys):
    """Settings are variables; an argument that was ignored would be a run of something else."""
    with pytest.raises(SystemExit) as ended:
        train_gpt.main([argument])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {argument}" in capsys.readouterr().err


# ---- Variables of published scripts --------------------------------------------------------------

# The 121 variables of PR #1113, #1684, #1301, #1295, #1228, #2058, #1549 and the naive baseline,
# with their defaults.
with (ROOT / "tests" / "golden" / "published_switches.tsv").open(encoding="utf-8") as file:
    SWITCHES = {
        row["variable"]: row["read by (default)"] for row in csv.DictReader(file, delimiter="\t")
    }
SYSTEM_B = {"map_basis": "mlp=gaussian", "map_gate": "mlp.fc=0"}
OFF = ("RANDOM_BASIS_ENABLED", "SELECTIVE_FREEZE", "PROGRESSIVE_FREEZE_FRAC", "RAND_GAIN")


@pytest.mark.parametrize(
    ("variables", "columns"),
    [
        ({"SEED": "0x10", "RANDOM_ADAPTER_SEED": "0x20"}, {"seed": 16, "map_seed": 32}),
        ({"ADAPTER_RANK": 8, "RANDOM_BACKBONE_SEED": 0}, {"map_adapter": "lora:8", "map_seed": 0}),
        ({"MLP_RANK": 4}, {"map_basis": "mlp=orthogonal", "map_adapter": "lora:4"}),
        ({"ADAPTER_LR": 0.01, "MUON_NS_STEPS": 4}, {"factor_lr": 0.01, "muon_backend_steps": 4}),
        ({"ENABLE_LOOPING_AT": 0.5, "STRIDE": 128}, {"recur_frac": 0.5, "eval_stride": 128}),
        ({"PARALLEL_RESIDUAL_START": 7, "SWA_EVERY": 25}, {"parallel_from": 7, "swa_interval": 25}),
        ({"USE_RANDOM_ADAPTERS": 0, "RANDOM_ADAPTER_RANK": 8}, {"map_basis": "learned"}),
        (
            {"RANDOM_BASIS_ENABLED": 1, "RANDOM_BASIS_SEED": "0x10", "MAP_SEED_STRIDE": 50},
            SYSTEM_B | {"map_adapter": "lora:16", "map_seed": 16, "map_seed_stride": 50},
        ),
        (
            {"USE_RANDOM_ADAPTERS": 0, "SELECTIVE_FREEZE": 1},
            {"map_basis": "mlp.in=gaussian", "map_adapter": "none", "map_seed": 42_000},
        ),
        ({"PROGRESSIVE_FREEZE_FRAC": 0.3}, {"map_basis": "learned", "map_freeze": "mlp.in=0.3"}),
        (
            {"RAND_PROJ_LAYERS": "0,2-3", "RAND_GAIN": 1},
            {
                "map_basis": "mlp.in@0+2-3=orthogonal",
                "map_adapter": "none",
                "map_scale": "random=row",
            },
        ),
        (dict.fromkeys(OFF, 0), {}),
        ({"LORA_RANK": 16, "RANDOM_ADAPTER_RANK": 16}, {"map_adapter": "lora:16"}),
    ],
)
def test_published_variables_are_what_they_expand_to(variables, columns):
    """A comma of theirs is between layers, and one of ours between rules."""
    published, ours = load(variables), load_settings({}, **columns)
    for name in columns:
        assert getattr(published, name) == getattr(ours, name)
    assert build_map_table(published) == build_map_table(ours)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"USE_RANDOM_ADAPTERS": 1, "SELECTIVE_FREEZE": 1}, "MAP_BASIS=mlp.in=gaussian orthogonal"),
        ({"RANDOM_ADAPTER_RANK": 8, "LORA_RANK": 16}, "MAP_ADAPTER=lora:16 lora:8"),
        ({"MAP_SEED": 1, "RANDOM_ADAPTER_SEED": 2}, "MAP_SEED=2 1"),
    ],
)
def test_published_variables_that_contradict_each_other_are_refused(variables, says):
    """Not one of them silently ignored: both names, and what each of them says."""
    (line,) = faults(variables)
    for part in [*variables, *says.split()]:
        assert re.search(rf"\b{re.escape(part)}\b", line), line


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("USE_RANDOM_ADAPTERS", "yes", "USE_RANDOM_ADAPTERS"),
        ("RAND_GAIN", "-1", "RAND_GAIN"),
        ("LORA_RANK", "0", "MAP_ADAPTER"),
        ("PROGRESSIVE_FREEZE_FRAC", "1.5", "MAP_FREEZE"),
        ("RAND_PROJ_LAYERS", "0,x", "MAP_BASIS"),
    ],
)
def test_impossible_value_of_a_published_variable_is_refused(name, value, setting):
    """A switch by its own name, another one by the setting that it stands for."""
    line = faults({name: value})[0]
    assert line.startswith(f"{setting}=")
    assert value.replace(",", "+") in line


def test_each_published_variable_is_understood_or_has_a_reason():
    assert len(SWITCHES) == 121
    for name in SWITCHES:
        assert (name in SETTINGS) != (name in UNSUPPORTED), name


@pytest.mark.parametrize("name", [name for name in SWITCHES if name in UNSUPPORTED])
def test_an_unsupported_switch_is_refused_by_name_unless_it_changes_nothing(name):
    """What changes nothing is a published default, in this or another spelling, or off."""
    numbers = re.findall(r"\((.*?)\)(?:;|$)", SWITCHES[name].replace("_", "").replace(" ", ""))
    published = [number.strip("'\"") for number in numbers]
    reason, harmless = UNSUPPORTED[name]
    for default in filter(None, harmless):
        assert load({name: default}) == load({})
        is_published = any(
            train_gpt.same_value(default.replace("_", ""), text) for text in published
        )
        assert is_published or default in ("0", "0.0", "1", "./data", "524288")
    assert faults({name: "17"}) == [f"{name}=17: {reason}; unset it"]


def test_values_that_change_nothing_may_be_written_in_another_way():
    variables = {"TTT_ENABLED": "0.0", "TTT_CHUNK_TOKENS": "65_536", "TTT_MOMENTUM": ".90"}
    assert load(variables) == load({})


# ---- Misspelled settings -------------------------------------------------------------------------


def typos_of(name: str) -> Iterator[str]:
    """Give the name in lower case; with a letter doubled, inserted, changed, swapped, dropped."""
    yield name.lower()
    for i in range(len(name)):
        yield name[: i + 1] + name[i:]
        yield name[:i] + "X" + name[i:]
        yield name[:i] + "X" + name[i + 1 :]
        yield name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :]
        if len(name) > 5:  # a shorter name may be a variable of another program
            yield name[:i] + name[i + 1 :]


@pytest.mark.parametrize("name", [*SETTINGS, "PRESET"])  # PRESET is run.sh's
def test_misspelled_setting_is_refused_with_the_right_name(name):
    """All misspellings of a name are set at once."""
    typos = {*typos_of(name)} - {*SETTINGS, *UNSUPPORTED, name}
    lines = [line for line in faults(dict.fromkeys(typos, "1")) if "no such setting" in line]
    found = dict(re.match(r"(\S+): no such setting; (\S+)\?", line).groups() for line in lines)
    assert found.keys() == typos
    # BETAX is as near to one as to the other.
    assert set(found.values()) <= ({"BETA1", "BETA2"} if name in ("BETA1", "BETA2") else {name})


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
        ("NUM_LAYERS", "257", "at most 256"),
        ("MATRIX_LR", "nan", "at least 0"),
        ("DTYPE", "float16", "bfloat16, float32"),
        ("ATTENTION_BACKEND", "fa3", "one of torch's kernels"),
    ],
)
def test_impossible_value_is_refused(name, value, says):
    (line,) = faults({name: value})
    assert line.startswith(f"{name}={value}: ")
    assert says in line


def test_attention_kernels_come_in_the_order_asked_for():
    h = load({"ATTENTION_BACKEND": "math, flash"})
    assert train_gpt.attention_order(h) == ["math", "flash"]


SIGNED = "orthogonal,bigram.signs=rademacher"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NUM_HEADS": 7, "NUM_KV_HEADS": 7}, "NUM_HEADS=7 MODEL_DIM=512"),
        ({"NUM_KV_HEADS": 3}, "NUM_KV_HEADS=3 NUM_HEADS=8"),
        ({"ROPE_DIMS": 66}, "ROPE_DIMS=66 64"),
        ({"MAP_SEED_STRIDE": 1}, "MAP_SEED_STRIDE=1 seed"),
        ({"SELF_DISTILL": 1}, "SELF_DISTILL=1 DISTILL_START_FRAC"),
        ({"EVAL_STRIDE": 2049}, "EVAL_STRIDE=2049 EVAL_SEQ_LEN=2048"),
        ({"WORLD_SIZE": 5}, "TRAIN_BATCH_TOKENS=786432 5"),
        ({"MAX_WALLCLOCK_SECONDS": 45}, "GPTQ_RESERVE_SECONDS=45 MAX_WALLCLOCK_SECONDS"),
        ({"EVAL_ONLY": 1}, "EVAL_ONLY=1 MODEL_PATH"),
        ({"MODEL_PATH": "a.ptz"}, "EVAL_ONLY=1 MODEL_PATH"),
        (
            {"TORCHELASTIC_MAX_RESTARTS": 3, "GROUP_WORLD_SIZE": 2, "RUN_ID": "a"},
            "--max-restarts several machines",
        ),
        ({"CHECKPOINT_PATH": "a.pt"}, "EXPORT_ONLY=1 CHECKPOINT_PATH"),
        ({"LOSS_PER_VALUE": 1e-8, "GPTQ_CALIB_BATCHES": 0}, "LOSS_PER_VALUE RMS"),
        (
            {"EVAL_ONLY": 1, "MODEL_PATH": "a", "EXPORT_ONLY": 1, "CHECKPOINT_PATH": "a"},
            "EVAL_ONLY=1 EXPORT_ONLY=1",
        ),
        ({"WARMDOWN_ITERS": 400, "WARMDOWN_FRAC": 0.667}, "WARMDOWN_FRAC=0.667 unset"),
        ({"MATRIX_BITS": 5}, "MATRIX_BITS QUANTIZER=rms"),
        ({"BIGRAM_GATE": 1, "BIGRAM_VOCAB_SIZE": 0}, "BIGRAM_GATE=1 BIGRAM_VOCAB_SIZE"),
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
        ("MAP_BASIS", "mlp@11=gaussian", "11 layers 10"),
        ("MAP_BASIS", "MLP=gaussian", "'MLP' selector"),
        ("MAP_BASIS", "mlp.gate=gaussian", "mlp.gate selects no map"),
        ("MAP_ADAPTER", "dora:4", "'dora' lora vera sparse none"),
        ("MAP_ADAPTER", "lora:257", "'lora:257' rank 256"),
        ("MAP_ADAPTER", "sparse:nan", "density 1"),
        ("MAP_ADAPTER", "mask:3", "'mask:3' size"),
        ("MAP_SCALE", "column", "'column' none map row"),
        ("MAP_FREEZE", "mlp.in@1=-1", "'-1' number 0 1"),
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
        ({"MAP_BASIS": "learned", "MAP_ADAPTER": "mlp.fc=lora:4"}, "mlp.fc is learned in full"),
        ({"MAP_BASIS": "orthogonal,bigram.signs=learned"}, "bigram.signs are none or random"),
        (
            {"MAP_BASIS": "bigram.signs=rademacher", "MAP_ADAPTER": "none"},
            "write learned,bigram.signs=rademacher or ",
        ),
        (
            {"MAP_BASIS": "shared", "MAP_GAIN": "mlp.fc@1=2"},
            "mlp.fc is shared: MAP_GAIN and MAP_INIT must be the same in its layers",
        ),
    ],
)
def test_columns_that_contradict_each_other_are_refused(variables, says):
    (line,) = faults(variables)
    assert says in line


def test_evaluation_takes_any_number_of_processes():
    """It has no training batch to split."""
    load({"WORLD_SIZE": 5, "EVAL_ONLY": 1, "MODEL_PATH": "some.ptz"})


def test_a_run_refuses_all_errors_at_once(corpus, tmp_path):
    wrong = {"NUM_LAYERS": "x", "SEED": -1, "NUM_HEADS": 7, "TTT_ENABLED": 1, "EVAL_STRIED": 64}
    places = corpus.settings | {"OUTPUT_DIR": tmp_path / "runs"}
    message = helpers.refusal(places | {"VAL_BATCH_SIZE": "524_288"} | wrong)
    assert all(name in message for name in wrong)
    assert "VAL_BATCH_SIZE" not in message
    assert not (tmp_path / "runs").exists()


def test_a_keyword_that_is_no_setting_is_refused():
    with pytest.raises(UserError, match="layers: no such setting"):
        load_settings({}, layers=3)
