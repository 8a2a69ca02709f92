"""Presets: which file PRESET names, and what it leaves to the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_gpt
from helpers import ROOT
from train_gpt import UserError, load_preset, load_settings


@pytest.fixture
def presets(tmp_path, monkeypatch) -> Path:
    """A folder of presets of its own: a, its twin for CPUs, and what they build on."""
    folder = tmp_path / "presets"
    (folder / "cpu").mkdir(parents=True)
    files = {
        "a": "NUM_LAYERS=12\n",
        "cpu/a": "# small\nPRESET_BASE=cpu/common\n\nNUM_LAYERS=2  # two\nMAP_SCALE=row\n",
        "cpu/common": "MODEL_DIM=64\nNUM_LAYERS=3\nROPE_DIMS=8\nMAP_ADAPTER=mask\nTEACHER_PRESET=b",
        "b": "MODEL_DIM=32",
    }
    for name, text in files.items():
        (folder / f"{name}.env").write_text(text)
    monkeypatch.setattr(train_gpt, "PRESETS", folder)
    return folder


SMALL = {"NUM_LAYERS": "2", "MAP_SCALE": "row", "MODEL_DIM": "64", "ROPE_DIMS": "8"}
SMALL |= {"MAP_ADAPTER": "mask"}
LARGE = {"NUM_LAYERS": "12"}


@pytest.mark.parametrize(
    ("name", "device", "has_gpu", "variables"),
    [
        ("a", "cpu", True, SMALL),
        ("a.env", "auto", False, SMALL),
        ("a", "auto", True, LARGE),
        ("cpu/a", "auto", True, SMALL),
        ("b", "cpu", False, {"MODEL_DIM": "32"}),
        ("presets/a.env", "cpu", False, LARGE),
        ("mine.env", "auto", True, {"SEED": "1", "MODEL_DIM": "32"}),
    ],
)
def test_a_preset_by_its_name_or_its_file(presets, monkeypatch, name, device, has_gpu, variables):
    """A name is that of a small twin on a CPU; a path is exactly that file."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    path = presets.parent / "mine.env"
    path.write_text("PRESET_BASE=b\nSEED=1")
    assert load_preset(str(path) if name == path.name else name, device) == variables


def test_a_path_that_is_wrong_takes_no_preset_of_its_name(presets):
    with pytest.raises(UserError, match="PRESET=mine/a: no such file"):
        load_preset("mine/a", "cpu")


@pytest.mark.parametrize(
    ("variables", "columns"),
    [
        ({"NUM_LAYERS": "5", "MAP_SCALE": "map"}, {"num_layers": 5, "map_scale": "map"}),
        ({"RANDOM_ADAPTER_RANK": "8"}, {"map_adapter": "lora:8", "map_scale": "row"}),
        ({"SELECTIVE_FREEZE": "1"}, {"map_adapter": "none", "map_scale": "none"}),
        ({"MAP_BASIS": "uniform"}, {"map_adapter": "lora:32", "model_dim": 64, "num_layers": 2}),
    ],
)
def test_what_the_environment_says_wins(presets, variables, columns):
    """Beside another basis the preset's other columns would be about other maps."""
    h = load_settings({"PRESET": "a", "DEVICE": "cpu", **variables})
    assert {name: getattr(h, name) for name in columns} == columns


def test_beside_an_artifact_or_a_checkpoint_a_preset_is_refused(presets):
    for task, path in (("EVAL_ONLY", "MODEL_PATH"), ("EXPORT_ONLY", "CHECKPOINT_PATH")):
        with pytest.raises(
            UserError, match="EVAL_ONLY and EXPORT_ONLY bring settings; unset PRESET"
        ):
            load_settings({"PRESET": "a", task: "1", path: "a"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NUM_LAYERS 5", "mine.env: not KEY=VALUE: NUM_LAYERS 5"),
        ("PRESET_BASE=mine", "its own base"),
        ("PRESET_BASE=none", r"PRESET=none: no such file; .* has: a, b, mine"),
        ("NUM_LAYER=5", "PRESET=mine: NUM_LAYER: no such setting"),
        ("TEACHER_PRESET=a", "needs a teacher: set DISTILL_FROM .* PRESET=a"),
    ],
)
def test_what_is_wrong_with_a_preset_is_said(presets, text, says):
    (presets / "mine.env").write_text(text)
    with pytest.raises(UserError, match=says):
        load_settings({"PRESET": "mine", "DEVICE": "cpu"})


@pytest.mark.parametrize("path", sorted((ROOT / "presets").rglob("*.env")), ids=lambda p: p.stem)
def test_every_preset_of_the_project_can_be_used(path):
    teacher = {"DISTILL_FROM": "teacher.ptz"} if path.stem == "distill_from" else {}
    load_settings({"PRESET": str(path)} | teacher)


def test_a_manifest_names_tokenizer_and_vocabulary_unless_somebody_does(tmp_path):
    manifest = {"tokenizer": "../it.model", "vocab_size": 300}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    given = {"DATA_PATH": str(tmp_path)}
    h = train_gpt.settings_from_manifest(load_settings(given))
    assert (h.tokenizer_path, h.vocab_size) == (f"{tmp_path}/../it.model", 300)
    given |= {"TOKENIZER_PATH": "mine.model", "VOCAB_SIZE": "600"}
    h = train_gpt.settings_from_manifest(load_settings(given))
    assert (h.tokenizer_path, h.vocab_size) == ("mine.model", 600)


@pytest.mark.parametrize(
    ("variables", "plan"),
    [
        ({}, "2,,"),
        ({"PRESET": "cpu/distill_from"}, "2,,cpu/baseline"),
        ({"PRESET": "random_basis_mlp"}, "2,4096,"),
        ({"PRESET": "random_basis_mlp", "DEVICE": "cpu"}, "0,,"),
    ],
)
def test_run_sh_learns_gpus_vocabulary_and_teacher(monkeypatch, variables, plan):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert train_gpt.plan_of_run(variables) == plan
