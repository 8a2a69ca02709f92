"""What the README and the folder say of the project, held to what the script is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_table_of_settings_is_the_scripts():
    tool = ROOT / "tools" / "settings_table.py"
    table = subprocess.run(
        [sys.executable, str(tool)], capture_output=True, text=True, check=True
    ).stdout
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_script_keeps_within_its_limits():
    lines = (ROOT / "train_gpt.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1800
    assert max(map(len, lines)) <= 110


PRESETS = ROOT / "presets"
# What run.sh reads in a preset itself: another preset, by its path without .env.
OF_RUN_SH = ("PRESET_BASE", "TEACHER_PRESET")


def preset_of(name: str) -> dict[str, str]:
    """A preset's settings, over those of the one it builds on; every line is KEY=VALUE or a comment."""
    lines = (PRESETS / f"{name}.env").read_text(encoding="utf-8").splitlines()
    given = dict(line.split("=", 1) for line in lines if line.strip() and not line.startswith("#"))
    others = {key: given.pop(key) for key in OF_RUN_SH if key in given}
    for other in others.values():
        assert (PRESETS / f"{other}.env").is_file(), f"{name}: {other}"
    return (preset_of(others["PRESET_BASE"]) if "PRESET_BASE" in others else {}) | given


@pytest.mark.parametrize(
    "name",
    sorted(
        path.relative_to(PRESETS).with_suffix("").as_posix()
        for path in PRESETS.rglob("*.env")
        if path.stem != "common"
    ),
)
def test_presets_name_settings_only(name):
    import train_gpt

    preset = preset_of(name)
    assert preset
    h = train_gpt.Hyperparameters(environment=preset)  # misspelt names are refused too
    assert {key.lower() for key in preset} <= set(vars(h)) | set(train_gpt.PUBLISHED)


def test_every_preset_has_a_twin_for_the_cpu():
    twins = {path.name for path in (PRESETS / "cpu").glob("*.env")} - {"common.env"}
    assert twins == {path.name for path in PRESETS.glob("*.env")}


def test_submission_has_the_challenges_keys():
    submission = json.loads((ROOT / "submission.json").read_text())
    keys = "author github_id name blurb date val_loss val_bpb bytes_total bytes_code dataset hardware seeds"
    assert set(keys.split()) <= set(submission)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", submission["date"])


def test_the_readmes_new_basis_and_adapter_work(monkeypatch):
    """The section for contributors promises one function and one row: what it shows is run as it stands."""
    import torch

    import train_gpt

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = dict(vars(train_gpt))
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        code, _, row = block.rpartition("\n\n")
        exec(code, names)
        table, key, value = re.fullmatch(r'(\w+) = \{\.\.\., "(\w+)": (\w+)\}\n', row).groups()
        monkeypatch.setitem(getattr(train_gpt, table), key, names[value])
    sizes = {"model_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ve_layers": "1"}
    columns = {"map_basis": "signs", "map_adapter": "combination:3+lora:2"}
    h = train_gpt.Hyperparameters(environment={}, **sizes, **columns)
    model = train_gpt.make_model(h)
    before = model.fingerprint()
    ids = torch.arange(16)[None]
    loss = model(ids, ids)
    loss.backward()
    layer = model.get_submodule("blocks.0.mlp.fc")
    assert layer.combination.coefficients.grad.abs().min() > 0
    assert "blocks.0.mlp.fc.combination.coefficients" in model.state_dict()
    assert not any("drawn" in name for name in model.state_dict())
    layer.combination.drawn[0, 0, 0] += 1
    assert model.fingerprint() != before
