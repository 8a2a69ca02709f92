"""The model against a plain restatement of its definition, its switches, what it promises."""

from __future__ import annotations

import inspect
import io
import itertools
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import ROOT, head_input, train_gpt


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


# ---- The forward pass, restated ------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_normalized(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True))


def rotated(x, position, length, h):
    """One head's vector at one position: dimension i turns with i + rope_dims / 2."""
    out, half, base = x.copy(), h.rope_dims // 2, h.rope_base
    if 0 < h.rope_stretch_from < length:
        base *= (length / h.rope_stretch_from) ** (h.rope_dims / (h.rope_dims - 2))
    for i in range(half):
        angle = position * base ** (-2 * i / h.rope_dims)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return out


class Restated:
    """The model in NumPy and float64, one position and head at a time.

    It shares nothing with the model but its values; adapters take the textbook's two paths.
    """

    def __init__(self, h, model):
        self.h, self.model = h, model
        self.p = {name: value.detach().numpy() for name, value in model.named_parameters()}
        layers = [int(i) for i in h.ve_layers.split(",")] if h.ve_enabled else []
        self.value_layers = [i if i >= 0 else h.num_layers + i for i in layers]

    def logits(self, row):
        """Return (T, vocabulary) for one row of tokens."""
        h, p = self.h, self.p
        x = x0 = self.embed(row)
        waiting, first_values, half = [], None, h.num_layers // 2
        for layer in range(h.num_layers):
            at = f"blocks.{layer}"
            if h.skips_enabled and layer >= half and waiting:
                x = x + p["skip_weights"][layer - half] * waiting.pop()
            x = p[f"{at}.stream_mix"] * x + p[f"{at}.embedding_mix"] * x0
            scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
            attended, values = self.attend(layer, rms_normalized(x) * scale, row, first_values)
            first_values = values if layer == 0 else first_values
            x = x + p[f"{at}.attention_scale"] * attended
            inner = self.linear(f"{at}.mlp.fc", rms_normalized(x) * scale)
            inner = np.where(inner > 0, inner, 0.5 * inner) ** 2
            x = x + p[f"{at}.mlp_scale"] * self.linear(f"{at}.mlp.proj", inner)
            if h.skips_enabled and layer < half:
                waiting.append(x)
        z = self.narrow(rms_normalized(x)) @ p["embedding.weight"].T
        return h.logit_softcap * np.tanh(z / h.logit_softcap)

    def linear(self, name, x):
        p = self.p
        y = x @ self.model.get_submodule(name).weight.detach().numpy().T
        if f"{name}.lora.A" in p:
            y = y + (x @ p[f"{name}.lora.B"].T) @ p[f"{name}.lora.A"].T
        return p[f"{name}.scale"] * y if f"{name}.scale" in p else y

    def narrow(self, x):
        """Return the transposed map of the token embedding, if it has one."""
        if "embedding.proj" not in self.model.table:
            return x
        return x @ self.linear("embedding.proj", np.eye(self.h.embedding_dim)).T

    def embed(self, row):
        p = self.p
        x = p["embedding.weight"][row]
        if "embedding.proj" in self.model.table:
            x = self.linear("embedding.proj", x)
        if self.h.bigram_vocab_size:
            last = self.h.bigram_vocab_size - 1
            pairs = itertools.pairwise(row)
            hashed = [last, *(((36313 * now) ^ (27191 * before)) % last for before, now in pairs)]
            x = x + p["bigram_scale"] * self.linear("bigram.proj", p["bigram.weight"][hashed])
        x = rms_normalized(x)
        if self.h.smear_enabled:
            gate, before = sigmoid(p["smear_gate"]), np.vstack([np.zeros_like(x[:1]), x[:-1]])
            x = (1 - gate) * x + gate * before
        return x

    def attend(self, layer, seen, row, first_values):
        """Return the output of a layer's attention, and its own values."""
        h, p, at = self.h, self.p, f"blocks.{layer}.attention"
        q, k, own_values = (self.linear(f"{at}.{name}", seen) for name in "qkv")
        v = own_values
        if layer in self.value_layers:
            added = self.linear("value_embedding.proj", p["value_embedding.weight"][row])
            v = v + p["value_scales"][self.value_layers.index(layer)] * added
        if h.vrl_enabled and layer:
            v = v + sigmoid(p[f"{at}.value_gate"]) * first_values
        width, group = h.model_dim // h.num_heads, h.num_heads // h.num_kv_heads
        heads = []
        for head in range(h.num_heads):
            mine, theirs = (slice(i * width, (i + 1) * width) for i in (head, head // group))
            gain = p[f"{at}.q_gain"][head]
            y = self.one_head(gain, q[:, mine], k[:, theirs], v[:, theirs])
            if layer >= h.num_layers - h.xsa_last_n:
                own = v[:, theirs]
                share = (y * own).sum(1) / (own * own).sum(1)
                y = y - share[:, None] * own
            heads.append(y)
        return self.linear(f"{at}.proj", np.hstack(heads)), own_values

    def one_head(self, gain, q, k, v):
        outputs, keys = [], []
        for t in range(len(q)):
            query = gain * rotated(rms_normalized(q[t]), t, len(q), self.h)
            keys.append(rotated(rms_normalized(k[t]), t, len(k), self.h))
            weights = np.exp([query @ key / math.sqrt(len(query)) for key in keys])
            outputs.append((weights / weights.sum()) @ v[: t + 1])
        return np.array(outputs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"xsa_last_n": 0},
        {"xsa_last_n": 1},
        {"rope_dims": 0},
        {"rope_dims": 8},
        {"rope_base": 50.0},
        {"rope_stretch_from": 3},
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
        {"map_basis": "orthogonal,bigram=gaussian,value_embedding=orthogonal"},
        {"embedding_dim": 24},
        {"embedding_dim": 24, "map_basis": "orthogonal,embedding=orthogonal"},
        {
            "embedding_dim": 48,
            "map_basis": "orthogonal,embedding=gaussian",
            "map_adapter": "lora:4,embedding=lora:3",
            "map_scale": "embedding=row",
        },
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "all-on",
)
def test_logits_are_those_of_the_restated_model(settings, random_model, changes):
    """And the switch is no dummy: its logits are not those of the model that has everything on."""
    h, ids = settings(**changes), tokens(2, 9)
    model = random_model(h, torch.float64)
    logits = model.predict(ids).detach().numpy()
    restated = Restated(h, model)
    expected = np.stack([restated.logits(row) for row in ids.tolist()])
    atol = max(1e-5, 2e-7 * h.logit_softcap)  # c is what float32 rounds last
    np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
    if changes:
        base = random_model(settings(), torch.float64)
        assert np.abs(logits - base.predict(ids).detach().numpy()).max() > 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1.6)])
def test_the_types_that_train_agree_with_float64(settings, random_model, dtype, tolerance):
    """bfloat16 carries 8 bits through 4 layers; these logits spread over ±5."""
    ids = tokens(2, 16)
    exact = random_model(settings(), torch.float64).predict(ids)
    logits = random_model(settings(), dtype).predict(ids)
    assert logits.dtype is torch.float32
    assert (logits - exact).abs().max() < tolerance
    assert (logits - exact).abs().mean() < tolerance / 16


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 8), (4, 1), (2, 3, 5, 16)])
def test_the_norm_is_torchs_with_its_gradient(shape, scale):
    x, weights = normal(*shape).requires_grad_(), normal(*shape, seed=1)
    y, expected = train_gpt.norm(x, scale), scale * F.rms_norm(x, shape[-1:])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad((each * weights).sum(), x)[0] for each in (y, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_norm_of_rotated_vectors_with_a_gain_for_each_head():
    x, weights = normal(2, 5, 3, 8).requires_grad_(), normal(2, 5, 3, 8, seed=1)
    gain = torch.tensor([[0.2], [-1.5], [1.0]], dtype=torch.float64).requires_grad_()
    angles = normal(5, 1, 2, seed=2)
    cos, sin = angles.cos(), angles.sin()
    y = train_gpt.rotate_and_norm(x, gain, cos, sin)
    expected = gain * F.rms_norm(train_gpt.rotate(x, cos, sin), (8,))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad((each * weights).sum(), (x, gain)) for each in (y, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_on_cuda_the_mlp_keeps_its_input_alone(monkeypatch):
    """And computes the rest again, with the same gradient."""
    x = normal(5, 7).float().requires_grad_()

    def run(on_cuda: bool) -> tuple[torch.Tensor, set[int]]:
        """Return the gradient, and the addresses of what was kept for it."""
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_cuda, raising=False)
        addresses = set()

        def keep(kept):
            addresses.add(kept.data_ptr())
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            y = train_gpt.squared_leaky_relu(x)
        assert torch.equal(y, torch.where(x > 0, x, x / 2) ** 2)
        return torch.autograd.grad(y.sum(), x)[0], addresses

    gradient, kept = run(on_cuda=False)
    gradient_on_cuda, kept_on_cuda = run(on_cuda=True)
    assert torch.equal(gradient, gradient_on_cuda)
    assert len(kept) == 2
    assert kept_on_cuda <= {x.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_row_of_zeros_and_of_huge_values_is_finite(dtype):
    x = torch.tensor([[0.0], [1e15], [1e-3]]).expand(3, 64).to(dtype, copy=True).requires_grad_()
    y = train_gpt.norm(x)
    y.sum().backward()
    assert y[0].abs().max() == 0
    torch.testing.assert_close(y[1:].float(), torch.ones(2, 64), rtol=0.06, atol=0)
    assert x.grad.isfinite().all()


# ---- Linear layers -------------------------------------------------------------------------------


def factors(*batch: int) -> tuple[torch.Tensor, ...]:
    """Return x (..., 7), a frozen map (5, 7), and factors of rank 3."""
    shapes = ((*batch, 7), (5, 7), (5, 3), (3, 7))
    x, w, a, b = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("batch", [(4,), (2, 3), (2, 1, 3), (0, 3)])
def test_one_merged_product_equals_the_two_paths_of_the_textbook(batch):
    x, w, a, b = factors(*batch)
    merged = train_gpt.LowRankLinearFunction.apply(x, (w + a @ b).detach(), a, b)
    textbook = x @ w.T + (x @ b.T) @ a.T
    torch.testing.assert_close(merged, textbook, rtol=0, atol=1e-10)
    dy = normal(*textbook.shape, seed=4)
    gradients = [torch.autograd.grad(y, (x, a, b), dy) for y in (merged, textbook)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_merged_gradients_are_numerically_right():
    x, w, a, b = factors(2, 3)

    def product(x, a, b):
        return train_gpt.LowRankLinearFunction.apply(x, (w + a @ b).detach(), a, b)

    assert torch.autograd.gradcheck(product, (x, a, b))


@pytest.mark.parametrize("bias", [False, True])
def test_lora_layer_is_its_formula(bias):
    torch.manual_seed(0)
    layer = train_gpt.FrozenRandomLinearWithLoRA(12, 20, rank=3, seed=5, bias=bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x = torch.randn(2, 4, 12)
    expected = x @ layer.weight.float().T + (x @ layer.lora_B.T) @ layer.lora_A.T
    if bias:
        expected = expected + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


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


# ---- Attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 64, 300, 512, 513, 1025])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_both_ways_to_compute_attention_are_the_formula(length, kv_heads, either_cpu):
    """With AMX, up to 512 tokens with gradients take plain products, others PyTorch's kernel."""
    batch = 1 if length > 100 else 3
    shapes = [(batch, length, heads, 8) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
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
    shapes = [(2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8)]
    q, k, v = (normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))
    past = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = (past >= 0) & (past < span)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, enable_gqa=True
    ).transpose(1, 2)
    out = train_gpt.block_attention(q, k, v, span)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    dy = normal(2, queries, 4, 8, seed=3)
    ours, theirs = (torch.autograd.grad(y, (q, k, v), dy) for y in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_rotary_scores_depend_on_distance_alone():
    angles = torch.arange(20, dtype=torch.float64)[:, None, None] * torch.tensor([1.0, 0.3, 0.01])

    def at_each_position(x):
        return train_gpt.rotate(x.expand(1, 20, 1, 8), angles.cos(), angles.sin())[0, :, 0]

    scores = at_each_position(normal(8)) @ at_each_position(normal(8, seed=1)).T
    for distance in range(-19, 20):
        assert scores.diagonal(distance).std(correction=0) < 1e-12
    assert scores[0].std() > 0.1


# ---- Validity of the predictions -----------------------------------------------------------------


@pytest.mark.parametrize(("length", "changed"), [(16, 1), (16, 9), (16, 15), (1100, 700)])
def test_later_tokens_do_not_change_earlier_predictions(settings, random_model, length, changed):
    model, ids = random_model(settings(), torch.float64), tokens(2, length)
    other = ids.clone()
    other[:, changed:] = (other[:, changed:] + 1 + tokens(2, length - changed, seed=1) % 63) % 64
    with torch.no_grad():
        before, after = head_input(model, ids), head_input(model, other)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-12)
    assert (after[:, changed] - before[:, changed]).abs().max() > 1e-3


def test_rows_of_a_batch_do_not_see_each_other(settings, random_model):
    model, ids = random_model(settings(), torch.float64), tokens(3, 16)
    together = head_input(model, ids)
    alone = torch.cat([head_input(model, row[None]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_the_scored_losses_are_of_a_full_normalized_distribution(settings, random_model):
    """Trap 10: exp(-loss) over all tokens that could come next sums to 1, at every position."""
    model, ids = random_model(settings()), tokens(2, 16)
    with torch.no_grad():
        targets = [torch.full_like(ids, token) for token in range(64)]
        each = torch.stack([model.token_losses(ids, token) for token in targets])
    sums = (-each.double()).exp().sum(0)
    torch.testing.assert_close(sums, torch.ones(2, 16, dtype=torch.float64), atol=1e-5, rtol=0)


def test_losses_of_the_last_targets_and_their_mean(settings, random_model):
    model, ids, targets = random_model(settings()), tokens(2, 16), tokens(2, 16, seed=1)
    log_probabilities = model.predict(ids).log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model.token_losses(ids, targets), expected)
    torch.testing.assert_close(model.token_losses(ids, targets[:, -3:]), expected[:, -3:])
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
    everything, widths = head_input(model, ids), []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            kept = head_input(model, ids, last)
        torch.testing.assert_close(kept, everything[:, -last:], rtol=0, atol=1e-12)
        blocks = len(widths) - 1
        assert widths == [16] * blocks + [computed]
        widths.clear()


def test_every_learned_parameter_gets_a_gradient(settings, random_model):
    model = random_model(settings())
    model(tokens(4, 16), tokens(4, 16, seed=1)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


# ---- Initial values ------------------------------------------------------------------------------


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
    assert values["bigram.weight"].abs().max() == 0
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
    def seeded(seed):
        torch.manual_seed(seed)
        return train_gpt.GPT(settings())

    first, again, other = seeded(1), seeded(1), seeded(2)
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert first.fingerprint() == again.fingerprint() == other.fingerprint()


# ---- Saving and loading --------------------------------------------------------------------------


def test_state_dict_holds_what_is_learned_and_no_frozen_map(settings):
    model = train_gpt.GPT(settings())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    maps = [spec.name for spec in model.random_maps()]
    assert len(maps) == 24
    assert not {f"{name}.weight" for name in maps} & set(model.state_dict())
    layer = train_gpt.FrozenRandomLinearWithLoRA(8, 8, rank=2)
    assert set(layer.state_dict()) == {"lora.A", "lora.B"}


def test_loading_restores_the_logits_exactly_and_keeps_the_buffers(settings, random_model):
    """Trap 1: a frozen buffer that loading re-creates would throw the compiled graph away."""
    saved, ids = random_model(settings()), tokens(2, 16)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    model = train_gpt.GPT(settings())

    def addresses():
        tensors = [*model.named_buffers(), *model.named_parameters()]
        return {name: tensor.data_ptr() for name, tensor in tensors}

    before = addresses()
    assert len(before) > 24
    model.load_state_dict(torch.load(file, weights_only=True))
    assert addresses() == before
    with torch.no_grad():
        assert torch.equal(model.predict(ids), saved.predict(ids))


# ---- Interface -----------------------------------------------------------------------------------


def test_importing_the_script_has_no_side_effects(tmp_path):
    """In a shell that torchrun and a careless user have filled.

    Nothing is read, made, printed or joined.
    """
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
    assert inspect.signature(train_gpt.main).bind().arguments == {}  # main() alone runs it


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
        "ve_layers": "-2,-1",
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
        "gptq_reserve_seconds": 45,
        "max_wallclock_seconds": 600,
        "eval_stride": 64,
        "artifact_limit_bytes": 16_000_000,
    }
    h = train_gpt.load_settings({})
    assert {name: getattr(h, name) for name in expected} == expected
    assert (h.head_dim, h.kv_dim, h.mlp_dim, h.value_layers) == (64, 256, 1536, [9, 10])


def test_sizes_of_the_full_configuration():
    """No map is generated: learned maps on the meta device have all other parameters."""
    table = train_gpt.build_map_table(train_gpt.load_settings({}))
    specs = [spec for spec in table.values() if spec.is_random]
    assert len(specs) == 66
    assert {spec.basis for spec in specs} == {"orthogonal"}
    assert sum(spec.out_features * spec.in_features for spec in specs) == 25_952_256
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.load_settings({}, map_basis="learned"))
    trained = sum(sum(spec.shape) * spec.adapters()["lora"] for spec in specs)
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") not in {spec.name for spec in specs}:
            trained += p.numel()
    # PR #1113 has 23 more scalars among its gates.
    assert trained == pytest.approx(3_744_892, abs=30)


# ---- Device and type of activations --------------------------------------------------------------


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
    monkeypatch.setattr(train_gpt, "HAS_AMX", amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    if maker:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {maker}\n")
    monkeypatch.setattr(train_gpt, "Path", lambda path: tmp_path)  # for /proc
    auto = train_gpt.load_settings({})
    assert train_gpt.resolve_dtype(auto, on_cuda=False) is expected
    assert train_gpt.resolve_dtype(auto, on_cuda=True) is torch.bfloat16
    for name in ("float32", "bfloat16"):
        h = train_gpt.load_settings({}, dtype=name)
        for on_cuda in (False, True):
            assert train_gpt.resolve_dtype(h, on_cuda) is getattr(torch, name)


@pytest.mark.parametrize(
    ("wanted", "available", "on_cuda"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("cuda", True, True),
        ("cpu", True, False),
        ("cpu", False, False),
    ],
)
def test_the_device_is_the_gpu_unless_there_is_none_or_nobody_wants_it(
    wanted, available, on_cuda, monkeypatch, tmp_path
):
    """COMPILE=auto compiles on the GPU alone."""
    monkeypatch.setattr(train_gpt, "GPU_FILE", tmp_path / "nvidia0")  # it is not there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setenv("LOCAL_RANK", "3")
    dist = train_gpt.Distributed(train_gpt.load_settings({}, device=wanted))
    assert (dist.on_cuda, dist.compile) == (on_cuda, on_cuda)
    assert str(dist.device) == ("cuda:3" if on_cuda else "cpu")
    assert dist.device_name == "GPU 3" if on_cuda else dist.device_name.endswith("CPU")
    for choice in ("0", "1"):
        h = train_gpt.load_settings({}, device=wanted, compile=choice)
        assert train_gpt.Distributed(h).compile == (choice == "1")


@pytest.mark.parametrize(("wanted", "is_there"), [("cuda", False), ("cuda", True), ("auto", True)])
def test_a_gpu_that_torch_cannot_use_is_an_error(wanted, is_there, monkeypatch, tmp_path):
    """Else the run would go on hundreds of times slower on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_gpt, "GPU_FILE", tmp_path / "nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if is_there:
        train_gpt.GPU_FILE.touch()
    with pytest.raises(train_gpt.UserError, match=r"no usable GPU.*DEVICE=cpu"):
        train_gpt.Distributed(train_gpt.load_settings({}, device=wanted))
    assert not train_gpt.Distributed(train_gpt.load_settings({}, device="cpu")).on_cuda


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_gpu_that_is_hidden_on_purpose_is_left_alone(visible, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_gpt, "GPU_FILE", tmp_path / "nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    train_gpt.GPU_FILE.touch()
    assert not train_gpt.Distributed(train_gpt.load_settings({}, device="auto")).on_cuda


# ---- Compiled ------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler"
)
def test_inductor_makes_code_that_computes_as_the_model_does(settings, random_model):
    """Of an MLP with its norm, forward and backward: a whole model takes a minute to compile."""
    model = random_model(settings(num_layers=1, model_dim=16))
    mlp = model.blocks[0].mlp

    def loss_of(x, scale):
        return mlp(train_gpt.norm(x, 0.5), scale).square().mean()

    def computed(function):
        x = normal(2, 8, 16).float().requires_grad_()
        scale = normal(16, seed=1).float().requires_grad_()
        loss = function(x, scale)
        learned = [p for p in mlp.parameters() if p.requires_grad]
        return loss.detach(), torch.autograd.grad(loss, [x, scale, *learned])

    torch._dynamo.reset()
    loss, gradients = computed(torch.compile(loss_of, dynamic=False, fullgraph=True))
    expected, expected_gradients = computed(loss_of)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
