"""TARGET_BYTES is met by networks of learned maps, of low-rank factors and of masks."""

from __future__ import annotations

import pytest
import torch

from helpers import ROOT, train_gpt


@pytest.mark.parametrize(
    "preset, factor", [("baseline", 0.85), ("random_adapters", 1.15), ("mask", 0.85)]
)
def test_code_and_model_end_within_half_a_percent_under_the_target(
    preset, factor, data_settings, run_of
):
    lines = (ROOT / "presets" / "cpu" / f"{preset}.env").read_text(encoding="utf-8").splitlines()
    maps = dict(line.split("=", 1) for line in lines if line.startswith("MAP_"))
    given = {"map_adapter": "lora:32"} | {name.lower(): value for name, value in maps.items()}
    given |= {"model_dim": 64, "num_layers": 2, "gptq_calib_batches": 1}
    given["loss_per_value"] = 1e-9  # 2 to 5 bits a value, as after training
    free = data_settings(**given)
    torch.manual_seed(0)
    model = train_gpt.make_model(free).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3 * p.size(-1) ** -0.5 if p.ndim > 1 else 0.02)
    data = train_gpt.TrainingData(free)
    artifact = train_gpt.export(run_of(free), model, data, 0)
    codes = sum(size for group, size in artifact.sizes.items() if group.endswith("codes"))
    target = train_gpt.code_bytes() + len(artifact.blob) + round((factor - 1) * codes)
    h = data_settings(**given, target_bytes=target)
    size = train_gpt.code_bytes() + len(train_gpt.export(run_of(h), model, data, 0).blob)
    assert 0.995 * target <= size <= target
