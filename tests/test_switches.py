"""Every variable that a published script reads is understood here or refused with a reason.

golden/published_switches.tsv lists the 121 variables of PR #1113, #1684, #1301, #1295, #1228,
#2058, #1549 and the naive baseline, with their defaults.
"""

from __future__ import annotations

import csv
import re

import pytest

import helpers
from helpers import ROOT, train_gpt

with (ROOT / "tests" / "golden" / "published_switches.tsv").open(encoding="utf-8") as file:
    SWITCHES = {
        row["variable"]: row["read by (default)"] for row in csv.DictReader(file, delimiter="\t")
    }
UNDERSTOOD = {name.upper() for name in (*train_gpt.SETTINGS, *train_gpt.ALIASES)}


def errors_of(environment: dict[str, str]) -> str:
    """Return what load_settings says against an environment."""
    try:
        train_gpt.load_settings(environment)
    except train_gpt.UserError as error:
        return str(error)
    return ""


def test_each_switch_is_understood_or_has_a_reason():
    assert len(SWITCHES) == 121
    for name in SWITCHES:
        assert (name in UNDERSTOOD) != (name in train_gpt.UNSUPPORTED), name


@pytest.mark.parametrize("name", [name for name in SWITCHES if name in train_gpt.UNSUPPORTED])
def test_an_unsupported_switch_is_refused_by_name_unless_it_changes_nothing(name):
    """What changes nothing is a published default, in this or another spelling, or off."""
    reason, harmless = train_gpt.UNSUPPORTED[name]
    numbers = re.findall(r"\((.*?)\)(?:;|$)", SWITCHES[name].replace("_", "").replace(" ", ""))
    published = [number.strip("'\"") for number in numbers]
    for default in filter(None, harmless):
        assert name not in errors_of({name: default})
        is_published = any(
            train_gpt.same_value(default.replace("_", ""), text) for text in published
        )
        assert is_published or default in ("0", "0.0", "1", "./data", "524288")
    assert f"{name}=17: {reason}" in errors_of({name: "17"})


@pytest.mark.parametrize(
    ("variables", "setting", "value"),
    [
        ({"STRIDE": "32"}, "eval_stride", 32),
        ({"SWA_EVERY": "7"}, "swa_interval", 7),
        ({"MUON_NS_STEPS": "3"}, "muon_backend_steps", 3),
        ({"ROPE_TRAIN_SEQ_LEN": "512"}, "rope_stretch_from", 512),
        ({"ENABLE_LOOPING_AT": "0.5"}, "recur_frac", 0.5),
        ({"PARALLEL_RESIDUAL_START": "7"}, "parallel_from", 7),
        ({"ADAPTER_LR": "0.01"}, "factor_lr", 0.01),
        ({"ADAPTER_RANK": "200"}, "map_adapter", "lora:200"),
        ({"MLP_RANK": "32"}, "map_basis", "mlp=orthogonal"),
        ({"RANDOM_BACKBONE_SEED": "43"}, "map_seed", 43),
        ({"GPTQ_CALIBRATION_BATCHES": "64"}, "gptq_calib_batches", 64),
        ({"MIN_LR": "0.1"}, "min_lr", 0.1),
        ({"PRUNE_PCT": "0.03"}, "prune_pct", 0.03),
    ],
)
def test_a_switch_changes_what_it_names(variables, setting, value):
    assert getattr(train_gpt.load_settings(variables), setting) == value


def test_a_percentage_is_no_fraction():
    assert "PRUNE_PCT=3" in errors_of({"PRUNE_PCT": "3"})


def test_a_run_refuses_them_all_at_once(corpus, tmp_path):
    asked = {"TTT_ENABLED": "1", "SHC_N": "4", "XSA_LAYERS": "1,2", "VAL_BATCH_SIZE": "524_288"}
    settings = helpers.TINY | corpus.settings | {"OUTPUT_DIR": tmp_path / "runs"} | asked
    message = helpers.refusal(settings)
    assert all(name in message for name in ("TTT_ENABLED=1", "SHC_N=4", "XSA_LAYERS=1,2"))
    assert "VAL_BATCH_SIZE" not in message
    assert not (tmp_path / "runs").exists()
