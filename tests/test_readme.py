"""What the README and the folder say of the project, held to what the script is."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_table_of_settings_is_the_scripts():
    tool = ROOT / "tools" / "settings_table.py"
    table = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_script_keeps_within_its_limits():
    lines = (ROOT / "train_gpt.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1800
    assert max(map(len, lines)) <= 110


def test_presets_name_settings_only():
    import train_gpt

    for preset in (ROOT / "presets").rglob("*.env"):
        lines = [line for line in preset.read_text().splitlines() if "=" in line and line[0] != "#"]
        given = dict(line.split("=", 1) for line in lines)
        train_gpt.Hyperparameters(**{name.lower(): value for name, value in given.items()})


def test_submission_has_the_challenges_keys():
    submission = json.loads((ROOT / "submission.json").read_text())
    keys = "author github_id name blurb date val_loss val_bpb bytes_total bytes_code dataset hardware seeds"
    assert set(keys.split()) <= set(submission)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", submission["date"])
