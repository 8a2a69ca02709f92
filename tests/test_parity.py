"""The network of system A against golden numbers of PR #1113's own model class.

golden/pr1113.npz holds random weights of a small network, token ids, and the logits of the last 24
positions that the published class gives for them in float32: with adapters on frozen maps and
learned in full, at 40 tokens and at 1,100, where the published RoPE stretches its base.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt

GOLDEN = Path(__file__).parent / "golden" / "pr1113.npz"
KINDS = {f"attention.{name}": f"attn.c_{name}" for name in "qkv"}
KINDS |= {"attention.proj": "attn.proj", "mlp.fc": "mlp.fc", "mlp.proj": "mlp.proj"}
PARTS = {
    "learned": {"weight": "weight"},
    "adapters": {"frozen_weight": "weight", "lora_A": "lora.A", "lora_B": "lora.B"},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as archive:
        return dict(archive)


def published_settings(golden: dict[str, np.ndarray], kind: str) -> train_gpt.Hyperparameters:
    config = json.loads(str(golden["config"]))
    changes = {"map_adapter": f"lora:{config.pop('rank')}", "map_seed": config.pop("seed")}
    if kind == "learned":
        changes = {"map_basis": "learned", "map_adapter": "none"}
    lengths = {"train_seq_len": 40, "eval_seq_len": 1100, "train_batch_tokens": 40}
    return train_gpt.load_settings({}, **config, **lengths, **changes, dtype="float32")


def turned(rows: torch.Tensor, h: train_gpt.Hyperparameters) -> torch.Tensor:
    """Swap the halves of each head's rotated rows: the published rotation turns the other way."""
    heads = rows.reshape(-1, h.head_dim, rows.size(-1)).clone()
    half = h.rope_dims // 2
    heads[:, : 2 * half] = torch.cat([heads[:, half : 2 * half], heads[:, :half]], 1)
    return heads.reshape(rows.shape)


def published_model(golden: dict[str, np.ndarray], kind: str) -> train_gpt.GPT:
    """Our model with the published weights."""
    h = published_settings(golden, kind)
    model = train_gpt.GPT(h, torch.float64)

    def value(name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(golden[f"{kind}/{name}"], np.float32))

    state = {
        "embedding.weight": value("tok_emb.weight"),
        "bigram.weight": value("bigram.embed.weight"),
        "bigram.proj.weight": value("bigram.proj.weight"),
        "bigram_scale": value("bigram.scale").reshape(1),
        "smear_gate": value("smear.gate"),
        "value_embedding.weight": value("ve_shared.embed.weight"),
        "value_embedding.proj.weight": torch.eye(h.kv_dim),  # it is as wide as the values
        "skip_weights": value("skip_weights"),
    }
    scales = [value(f"ve_layer_scales.{i}") for i in range(len(h.value_layers))]
    state["value_scales"] = torch.cat(scales) * value("ve_shared.scale")
    for layer in range(h.num_layers):
        block = f"blocks.{layer}"
        state[f"{block}.stream_mix"], state[f"{block}.embedding_mix"] = value(f"{block}.resid_mix")
        state[f"{block}.attention_scale"] = value(f"{block}.attn_scale")
        state[f"{block}.mlp_scale"] = value(f"{block}.mlp_scale")
        state[f"{block}.attention.q_gain"] = value(f"{block}.attn.q_gain")[:, None]
        if layer:
            state[f"{block}.attention.value_gate"] = value(f"vrl_alphas.{layer - 1}").reshape(1)
        for name, published in KINDS.items():
            for part, target in PARTS[kind].items():
                tensor = value(f"{block}.{published}.{part}")
                if name in ("attention.q", "attention.k") and part != "lora_B":
                    tensor = turned(tensor, h)
                if part == "frozen_weight":
                    model.get_submodule(f"{block}.{name}").weight = tensor.to(torch.bfloat16)
                else:
                    state[f"{block}.{name}.{target}"] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("length", [40, 1100])
@pytest.mark.parametrize("kind", ["adapters", "learned"])
def test_logits_are_those_of_the_published_model(golden, kind, length):
    """Ours are of float64, so that the same rounding is compared on every machine."""
    model = published_model(golden, kind).double()
    ids = torch.from_numpy(golden[f"{kind}/ids{length}"].astype(np.int64))
    with torch.no_grad():
        logits = model.predict(ids)[:, -24:]
    expected = torch.from_numpy(golden[f"{kind}/logits{length}"])
    # Both heads are float32, c·tanh(z/c) with c = 30, and so are the layers of the published one.
    assert (logits - expected).abs().max() < 2 * 10 * 2 * 30 * 2**-24
