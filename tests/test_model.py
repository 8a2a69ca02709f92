"""The model against a plain restatement of its definition, its switches, and what the script promises."""

from __future__ import annotations

import inspect
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt

ROOT = Path(train_gpt.__file__).resolve().parent


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


# ---- The forward pass, restated ----------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_normalised(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True))


def rotated(x, position, h):
    """One head's vector at one position: dimension i turns with i + rope_dims / 2."""
    out, half = x.copy(), h.rope_dims // 2
    for i in range(half):
        angle = position * h.rope_base ** (-2 * i / h.rope_dims)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return out


def restated_logits(h, model, row):
    """(T, vocabulary) float64 of one row of tokens, in NumPy, one position and head at a time.

    Shares nothing with the model but its values; adapters take the textbook's two paths.
    """
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    length, width, layers = len(row), h.model_dim // h.num_heads, h.num_layers

    def linear(name, x):
        if f"{name}.lora.A" not in p:
            return x @ p[f"{name}.weight"].T
        frozen = model.get_submodule(name).weight.numpy()
        return x @ frozen.T + (x @ p[f"{name}.lora.B"].T) @ p[f"{name}.lora.A"].T

    x = p["embedding.weight"][row]
    if h.bigram_vocab_size:
        last = h.bigram_vocab_size - 1
        hashed = [last] + [
            ((36313 * row[t]) ^ (27191 * row[t - 1])) % last for t in range(1, length)
        ]
        x = x + p["bigram_scale"] * (p["bigram.0.weight"][hashed] @ p["bigram.1.weight"].T)
    x = rms_normalised(x)
    if h.smear_enabled:
        gate, before = sigmoid(p["smear_gate"]), np.vstack([np.zeros_like(x[:1]), x[:-1]])
        x = (1 - gate) * x + gate * before
    x0, waiting, first_values = x, [], None
    value_layers = [int(i) for i in h.ve_layers.split(",")] if h.ve_enabled else []
    for layer in range(layers):
        at = f"blocks.{layer}"
        if h.skips_enabled and layers // 2 <= layer and waiting:
            x = x + p["skip_weights"][layer - layers // 2] * waiting.pop()
        x = p[f"{at}.stream_mix"] * x + p[f"{at}.embedding_mix"] * x0
        scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        seen = rms_normalised(x) * scale
        q, k, v = (linear(f"{at}.attention.{name}", seen) for name in "qkv")
        first_values = v if layer == 0 else first_values
        if layer in value_layers:
            added = p["value_embedding.0.weight"][row] @ p["value_embedding.1.weight"].T
            v = v + p["value_scales"][value_layers.index(layer)] * added
        if h.vrl_enabled and layer:
            v = v + sigmoid(p[f"{at}.attention.value_gate"]) * first_values
        heads = np.zeros((length, h.num_heads, width))
        for head in range(h.num_heads):
            shared = head // (h.num_heads // h.num_kv_heads)
            mine, theirs = (slice(i * width, (i + 1) * width) for i in (head, shared))
            gain = p[f"{at}.attention.q_gain"][head]
            queries = [gain * rotated(rms_normalised(q[t, mine]), t, h) for t in range(length)]
            keys = [rotated(rms_normalised(k[t, theirs]), t, h) for t in range(length)]
            for t in range(length):
                weights = np.exp([queries[t] @ keys[s] / math.sqrt(width) for s in range(t + 1)])
                y = (weights / weights.sum()) @ v[: t + 1, theirs]
                if layer >= layers - h.xsa_last_n:
                    own = v[t, theirs]
                    y = y - (y @ own) / (own @ own) * own
                heads[t, head] = y
        x = x + p[f"{at}.attention_scale"] * linear(
            f"{at}.attention.proj", heads.reshape(length, -1)
        )
        inner = linear(f"{at}.mlp.fc", rms_normalised(x) * scale)
        inner = np.where(inner > 0, inner, 0.5 * inner) ** 2
        x = x + p[f"{at}.mlp_scale"] * linear(f"{at}.mlp.proj", inner)
        if h.skips_enabled and layer < layers // 2:
            waiting.append(x)
    z = rms_normalised(x) @ p["embedding.weight"].T
    return h.logit_softcap * np.tanh(z / h.logit_softcap)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"xsa_last_n": 0},
        {"xsa_last_n": 1},
        {"rope_dims": 0},
        {"rope_dims": 8},
        {"rope_base": 50.0},
        {"vrl_enabled": 0},
        {"bigram_vocab_size": 0},
        {"bigram_vocab_size": 2},
        {"bigram_vocab_size": 31},
        {"smear_enabled": 0},
        {"skips_enabled": 0},
        {"ve_enabled": 0},
        {"ve_layers": "0"},
        {"ve_layers": "3,1"},
        {"ln_scale": 0},
        {"logit_softcap": 2.0},
        {"logit_softcap": 1e3},
        {"num_layers": 5},
        {"num_layers": 1, "ve_layers": "0"},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"num_heads": 8, "num_kv_heads": 8},
        {"mlp_mult": 1.5},
        {"map_adapter": "lora:1"},
        {"map_seed": 7},
        {"map_seed_stride": 99},
        {"map_basis": "learned"},
        {"map_basis": "mlp=orthogonal"},
        {"map_basis": "attention.v@1-2=orthogonal"},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "all-on",
)
def test_logits_are_those_of_the_restated_model(settings, random_model, changes):
    """And the switch is no dummy: its logits are not those of the model that has everything on."""
    h, ids = settings(**changes), tokens(2, 9)
    model = random_model(h, torch.float64)
    logits = model.logits(model.hidden(ids)).detach().numpy()
    expected = np.stack([restated_logits(h, model, row) for row in ids.tolist()])
    atol = max(1e-5, 2e-7 * h.logit_softcap)  # c is what float32 rounds last
    np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
    if changes:
        base = random_model(settings(), torch.float64)
        assert np.abs(logits - base.logits(base.hidden(ids)).detach().numpy()).max() > 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1.6)])
def test_the_types_that_train_agree_with_float64(settings, random_model, dtype, tolerance):
    """bfloat16 carries 8 bits through 4 layers; these logits spread over ±5."""
    ids = tokens(2, 16)
    exact, model = random_model(settings(), torch.float64), random_model(settings(), dtype)
    exact, logits = exact.logits(exact.hidden(ids)), model.logits(model.hidden(ids))
    assert logits.dtype is torch.float32
    assert (logits - exact).abs().max() < tolerance
    assert (logits - exact).abs().mean() < tolerance / 16


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 8), (4, 1), (2, 3, 5, 16)])
def test_the_norm_is_torchs_with_its_gradient(shape, scale):
    x = torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    y, expected = train_gpt.norm(x, scale), scale * F.rms_norm(x, shape[-1:])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine, theirs = (torch.autograd.grad((each * weights).sum(), x)[0] for each in (y, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_norm_of_turned_vectors_with_a_scale_for_each_head():
    torch.manual_seed(0)
    x, weights = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64).unbind()
    scale = torch.tensor([[0.2], [-1.5], [1.0]], dtype=torch.float64)
    given, rope = (
        (x.requires_grad_(), scale.requires_grad_()),
        train_gpt.rotary_table(100.0, 4, x.dtype, 5),
    )
    y, expected = (
        train_gpt.norm(*given, *rope),
        scale * F.rms_norm(train_gpt.rotate(x, *rope), (8,)),
    )
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        *(torch.autograd.grad((each * weights).sum(), given) for each in (y, expected))
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def test_on_cuda_the_mlp_keeps_its_input_alone(monkeypatch):
    """And computes the rest again, with the same gradient."""
    x, seen = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_(), []
    gradients = []
    for on_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_cuda, raising=False)
        seen.append([])

        def keep(kept):
            seen[-1].append(kept.data_ptr())
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            y = train_gpt.squared_leaky_relu(x)
        gradients.append(torch.autograd.grad(y.sum(), x)[0])
        assert torch.equal(y, torch.where(x > 0, x, x / 2) ** 2)
    assert torch.equal(*gradients)
    assert len(set(seen[0])) == 2
    assert set(seen[1]) <= {x.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_row_of_zeros_and_of_huge_values_is_finite(dtype):
    x = torch.cat([torch.zeros(1, 64), 1e15 * torch.ones(1, 64), 1e-3 * torch.ones(1, 64)]).to(
        dtype
    )
    y = train_gpt.norm(x.requires_grad_())
    y.sum().backward()
    assert y[0].abs().max() == 0
    torch.testing.assert_close(y[1:].float(), torch.ones(2, 64), rtol=0.06, atol=0)
    assert x.grad.isfinite().all()


# ---- Linear layers -----------------------------------------------------------------------------------------


def factors(*batch: int, in_features: int = 7, out_features: int = 5, rank: int = 3):
    torch.manual_seed(0)
    shapes = (
        (*batch, in_features),
        (out_features, in_features),
        (out_features, rank),
        (rank, in_features),
    )
    x, w, a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("batch", [(4,), (2, 3), (2, 1, 3), (0, 3)])
def test_one_merged_product_equals_the_two_paths_of_the_textbook(batch):
    x, w, a, b = factors(*batch)
    merged, textbook = (
        train_gpt.ThinLinear.apply(x, (w + a @ b).detach(), a, b),
        x @ w.T + (x @ b.T) @ a.T,
    )
    torch.testing.assert_close(merged, textbook, rtol=0, atol=1e-10)
    dy = torch.randn_like(textbook)
    gradients = [torch.autograd.grad(y, (x, a, b), dy) for y in (merged, textbook)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_merged_gradients_are_numerically_right():
    x, w, a, b = factors(2, 3)
    assert torch.autograd.gradcheck(
        lambda x, a, b: train_gpt.ThinLinear.apply(x, (w + a @ b).detach(), a, b), (x, a, b)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_lora_layer_is_its_formula(bias):
    torch.manual_seed(0)
    layer = train_gpt.FrozenRandomLinearWithLoRA(12, 20, rank=3, seed=5, bias=bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x = torch.randn(2, 4, 12)
    expected = x @ layer.weight.float().T + (x @ layer.lora_B.T) @ layer.lora_A.T
    torch.testing.assert_close(
        layer(x), expected + layer.bias if bias else expected, rtol=1e-5, atol=1e-5
    )


def test_a_new_lora_layer_is_its_frozen_map_and_learns():
    """A starts at zero: B adds nothing at first, and the gradient must reach A all the same."""
    torch.manual_seed(0)
    layer = train_gpt.FrozenRandomLinearWithLoRA(12, 20, rank=3)
    x = torch.randn(6, 12)
    torch.testing.assert_close(layer(x), x @ layer.weight.float().T)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.abs().min() > 0
    assert layer.lora_B.grad.abs().max() == 0
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("rank", [0, -1, 13])
def test_a_rank_that_fits_no_map_is_refused(rank):
    with pytest.raises(ValueError, match=str(rank)):
        train_gpt.FrozenRandomLinearWithLoRA(12, 20, rank=rank)


# ---- Attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 64, 300, 512, 513, 1025])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_both_ways_to_compute_attention_are_the_formula(length, kv_heads, either_cpu):
    """On a CPU with AMX 512 tokens and fewer take plain products, for gradients, and more PyTorch's kernel."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1 if length > 100 else 3, length, n, 8, dtype=torch.float64)
        for n in (4, kv_heads, kv_heads)
    )
    out = train_gpt.causal_attention(q, k, v)
    wide_k, wide_v = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, wide_k) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    torch.testing.assert_close(out, torch.einsum("bhts,bshd->bthd", scores.softmax(-1), wide_v))
    fused = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, wide_k, wide_v)), is_causal=True
    )
    torch.testing.assert_close(out, fused.transpose(1, 2))
    with torch.no_grad():
        ungraded = train_gpt.causal_attention(q, k, v)
        last = train_gpt.causal_attention(q[:, -2:], k, v)  # of few queries
    torch.testing.assert_close(out, ungraded, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out[:, -2:], last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("queries", "keys", "span"),
    [(300, 300, 300), (300, 300, 1), (300, 300, 70), (300, 600, 300), (260, 1300, 129), (1, 40, 7)],
)
def test_plain_products_see_the_span_before_each_query(queries, keys, span):
    """Against a mask over all keys; blocks have 128 queries, 256 from 1,025 keys on."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, heads, 8, dtype=torch.float64, requires_grad=True)
        for n, heads in ((queries, 4), (keys, 2), (keys, 2))
    )
    past = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = (past >= 0) & (past < span)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, enable_gqa=True
    ).transpose(1, 2)
    out, dy = (
        train_gpt.block_attention(q, k, v, span),
        torch.randn(2, queries, 4, 8, dtype=torch.float64),
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (out, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    angles = torch.arange(20, dtype=torch.float64)[:, None, None] * torch.tensor([1.0, 0.3, 0.01])
    q, k = (
        train_gpt.rotate(x.expand(1, 20, 1, 8), angles.cos(), angles.sin())[0, :, 0] for x in (q, k)
    )
    scores = q @ k.T
    for distance in range(-19, 20):
        assert scores.diagonal(distance).std(correction=0) < 1e-12
    assert scores[0].std() > 0.1


# ---- Validity of the predictions ---------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "changed"), [(16, 1), (16, 9), (16, 15), (1100, 700)])
def test_later_tokens_do_not_change_earlier_predictions(settings, random_model, length, changed):
    model, ids = random_model(settings(), torch.float64), tokens(2, length)
    other = ids.clone()
    other[:, changed:] = (other[:, changed:] + 1 + tokens(2, length - changed, seed=1) % 63) % 64
    with torch.no_grad():
        before, after = model.hidden(ids), model.hidden(other)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-12)
    assert (after[:, changed] - before[:, changed]).abs().max() > 1e-3


def test_rows_of_a_batch_do_not_see_each_other(settings, random_model):
    model, ids = random_model(settings(), torch.float64), tokens(3, 16)
    together, alone = model.hidden(ids), torch.cat([model.hidden(row[None]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_the_scored_losses_are_of_a_full_normalised_distribution(settings, random_model):
    """Trap 10: exp(-loss) over all tokens that could come next sums to 1, at every position."""
    model, ids = random_model(settings()), tokens(2, 16)
    with torch.no_grad():
        each = torch.stack([model.losses(ids, torch.full_like(ids, token)) for token in range(64)])
    sums = (-each.double()).exp().sum(0)
    torch.testing.assert_close(sums, torch.ones(2, 16, dtype=torch.float64), atol=1e-5, rtol=0)


def test_losses_of_the_last_targets_and_their_mean(settings, random_model):
    model, ids, targets = random_model(settings()), tokens(2, 16), tokens(2, 16, seed=1)
    log_probabilities = model.logits(model.hidden(ids)).log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model.losses(ids, targets), expected)
    torch.testing.assert_close(model.losses(ids, targets[:, -3:]), expected[:, -3:])
    torch.testing.assert_close(model(ids, targets), expected.mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recur_layers": "2-3", "recur_times": 2},
        {"parallel_from": 2, "mlp_gated": 1},
        {"num_layers": 1, "ve_enabled": 0},
    ],
)
@pytest.mark.parametrize(("last", "computed"), [(1, 1), (2, 2), (3, 16), (16, 16)])
def test_the_last_block_computes_few_positions_alone(
    settings, random_model, changes, last, computed
):
    """And they are what they are among all, in training as in evaluation."""
    model, ids = random_model(settings(**changes), torch.float64), tokens(2, 16)
    everything, widths = model.hidden(ids), []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(
                model.hidden(ids, last), everything[:, -last:], rtol=0, atol=1e-12
            )
        blocks = len(widths) - 1
        assert widths == [16] * blocks + [computed]
        widths.clear()


def test_every_learned_parameter_gets_a_gradient(settings, random_model):
    model = random_model(settings())
    model(tokens(4, 16), tokens(4, 16, seed=1)).backward()
    idle = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert idle == []


# ---- Initial values ----------------------------------------------------------------------------------------


def test_initial_values_are_the_references(settings):
    torch.manual_seed(0)
    h = settings(num_layers=5, vocab_size=512, model_dim=64)
    values = {name: p.detach() for name, p in train_gpt.GPT(h).named_parameters()}
    for name, p in values.items():
        if name.endswith("lora.A"):
            assert p.abs().max() == 0, name
        if name.endswith("lora.B"):
            assert p.mean().abs() < 0.4 * p.size(1) ** -0.5, name
            assert p.std() == pytest.approx(p.size(1) ** -0.5, rel=0.2), name
        if name.endswith("q_gain"):
            assert p.shape[0] == h.num_heads, name
            assert p.unique().tolist() == [1.5], name
        if name.endswith(("attention_scale", "mlp_scale")):
            assert p.unique().tolist() == [1.0], name
        if name.endswith("value_gate"):
            assert p.item() == 0, name
    for layer in range(5):
        share = 1 / (1 + math.exp(-3 * (layer / 4 - 0.5)))
        torch.testing.assert_close(values[f"blocks.{layer}.stream_mix"], torch.full((64,), share))
        torch.testing.assert_close(
            values[f"blocks.{layer}.embedding_mix"], torch.full((64,), 1 - share)
        )
    assert values["embedding.weight"].std() == pytest.approx(0.005, rel=0.03)
    assert values["bigram.0.weight"].abs().max() == 0
    assert values["bigram_scale"].item() == pytest.approx(0.05)
    assert values["smear_gate"].abs().max() == 0
    assert values["skip_weights"].shape == (2, 64)
    assert values["skip_weights"].unique().tolist() == [1.0]
    assert "blocks.0.attention.value_gate" not in values, "layer 0 has no earlier values to add"


def test_a_new_model_knows_nothing(settings):
    """Small embeddings make it guess evenly; a loss above that would be a wrong initial scale."""
    torch.manual_seed(0)
    loss = train_gpt.GPT(settings())(tokens(8, 16), tokens(8, 16, seed=1))
    assert loss.item() == pytest.approx(math.log(64), abs=0.02)


def test_initial_weights_follow_the_seed_and_maps_do_not(settings):
    first, again, other = (
        torch.manual_seed(seed) and train_gpt.GPT(settings()) for seed in (1, 1, 2)
    )
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert first.fingerprint() == again.fingerprint() == other.fingerprint()


# ---- Saving and loading ------------------------------------------------------------------------------------


def test_state_dict_holds_what_is_learned_and_no_frozen_map(settings):
    model = train_gpt.GPT(settings())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    frozen = [name for name in model.table if f"{name}.weight" in model.state_dict()]
    assert frozen == []
    layer = train_gpt.FrozenRandomLinearWithLoRA(8, 8, rank=2)
    assert set(layer.state_dict()) == {"lora.A", "lora.B"}


def test_loading_restores_the_logits_exactly_and_keeps_the_buffers(settings, random_model):
    """Trap 1: a frozen buffer that loading re-creates would throw the compiled graph away."""
    saved, ids = random_model(settings()), tokens(2, 16)
    torch.save(saved.state_dict(), file := io.BytesIO())
    file.seek(0)
    torch.manual_seed(99)
    model = train_gpt.GPT(settings())
    places = {name: t.data_ptr() for name, t in [*model.named_buffers(), *model.named_parameters()]}
    assert len(places) > 24
    model.load_state_dict(torch.load(file, weights_only=True))
    assert {
        name: t.data_ptr() for name, t in [*model.named_buffers(), *model.named_parameters()]
    } == places
    with torch.no_grad():
        difference = model.logits(model.hidden(ids)) - saved.logits(saved.hidden(ids))
    assert difference.abs().max() == 0.0


# ---- Interface ---------------------------------------------------------------------------------------------


def test_importing_the_script_has_no_side_effects(tmp_path):
    """In a shell that torchrun and a careless user have filled: nothing is read, made, printed or joined."""
    code = """if True:
        import threading, torch
        before = torch.get_rng_state()
        import train_gpt
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.distributed.is_initialized()
        assert not torch.cuda.is_initialized()
        assert threading.active_count() == 1
    """
    shell = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NUM_LAYERS": "banana",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "7",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | shell,
        timeout=100,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_names_that_other_peoples_code_imports():
    layer = inspect.signature(train_gpt.FrozenRandomLinearWithLoRA).parameters
    assert list(layer)[:5] == ["in_features", "out_features", "rank", "seed", "bias"]
    assert [layer[name].default for name in ("rank", "seed", "bias")] == [32, 0, False]
    assert all(p.default is not inspect.Parameter.empty for p in list(layer.values())[2:])
    assert issubclass(train_gpt.FrozenRandomLinearWithLoRA, torch.nn.Module)
    assert issubclass(train_gpt.GPT, torch.nn.Module)
    assert issubclass(train_gpt.Muon, torch.optim.Optimizer)
    assert inspect.signature(train_gpt.main).parameters == {}


def test_defaults_are_system_a():
    expected = {
        "num_layers": 11,
        "model_dim": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "mlp_mult": 3.0,
        "rope_dims": 16,
        "rope_base": 10_000,
        "xsa_last_n": 11,
        "ln_scale": 1,
        "bigram_vocab_size": 2048,
        "bigram_dim": 128,
        "ve_enabled": 1,
        "ve_dim": 128,
        "ve_layers": "9,10",
        "vrl_enabled": 1,
        "smear_enabled": 1,
        "skips_enabled": 1,
        "qk_gain_init": 1.5,
        "logit_softcap": 30,
        "tied_embed_init_std": 0.005,
        "vocab_size": 1024,
        "map_basis": "orthogonal",
        "map_adapter": "lora:32",
        "map_seed": 12345,
        "map_seed_stride": 100,
        "map_gain": "1",
        "map_scale": "none",
        "map_gate": "none",
        "map_freeze": "0",
        "train_batch_tokens": 786_432,
        "train_seq_len": 2048,
        "matrix_lr": 0.025,
        "scalar_lr": 0.025,
        "tied_embed_lr": 0.035,
        "muon_momentum": 0.99,
        "muon_momentum_warmup_start": 0.92,
        "muon_momentum_warmup_steps": 1500,
        "muon_backend_steps": 5,
        "muon_wd": 0.04,
        "adam_wd": 0.04,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip_norm": 0.3,
        "warmdown_iters": 3500,
        "warmup_steps": 20,
        "ema_decay": 0.997,
        "swa_interval": 50,
        "swa_threshold": 0.2,
        "late_qat_threshold": 0.15,
        "gptq_reserve_seconds": 45,
        "max_wallclock_seconds": 600,
        "eval_stride": 64,
        "artifact_limit_bytes": 16_000_000,
    }
    h = train_gpt.Hyperparameters()
    assert {name: getattr(h, name) for name in expected} == expected
    assert (h.head_dim, h.kv_dim, h.mlp_dim, h.value_layers) == (64, 256, 1536, [9, 10])


def test_sizes_of_the_full_configuration():
    """No map is drawn: the same model with learned maps, on the meta device, has all the other parameters."""
    rows = train_gpt.Hyperparameters().maps
    assert len(rows) == 66
    assert {row.basis for row in rows} == {"orthogonal"}
    assert sum(row.out_features * row.in_features for row in rows) == 25_952_256
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Hyperparameters(map_basis="learned"))
    around = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.removesuffix(".weight") not in model.table
    )
    trained = around + sum(
        row.adapters()["lora"] * (row.in_features + row.out_features) for row in rows
    )
    assert trained == pytest.approx(
        3_744_892, abs=30
    )  # PR #1113 has 23 more scalars among its gates


# ---- The type of activations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amx", "avx512", "maker", "expected"),
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, True, None, torch.bfloat16),
        (False, True, "GenuineIntel", torch.float32),
        (False, False, "AuthenticAMD", torch.float32),
    ],
)
def test_the_type_is_the_one_that_this_cpu_multiplies_faster(
    amx, avx512, maker, expected, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_gpt, "AMX", amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    if maker:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {maker}\n")
    monkeypatch.setattr(train_gpt, "Path", lambda path: tmp_path)  # for /proc
    assert train_gpt.World(train_gpt.Hyperparameters({})).dtype is expected
    for name in ("float32", "bfloat16"):
        assert train_gpt.World(train_gpt.Hyperparameters({}, dtype=name)).dtype is getattr(
            torch, name
        )
