"""Tests of quantization, the artifact, the optimizers, the averages and the schedule.

They follow the weights from the gradients of a step to the bytes of an artifact, and back from the
bytes to a model.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import random
import time
import zipfile
from types import SimpleNamespace

import brotli
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import train_gpt
from helpers import KeptLog, copied, tiny_settings

Role = train_gpt.Role
QUANTIZERS = [
    train_gpt.Quantizer(6, 12.85),
    train_gpt.Quantizer(8, 20.0),
    train_gpt.Quantizer(2, 2.0),
]
each_quantizer = pytest.mark.parametrize(
    "quantizer", QUANTIZERS, ids=["matrix", "embedding", "2-bit"]
)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random tokens of a vocabulary of 64."""
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Return (n, dim) float64 inputs as layers see them.

    They have few strong directions, a mean, and channels of unlike size.
    """
    torch.manual_seed(seed)
    directions = torch.randn(n, dim // 4) @ torch.randn(dim // 4, dim)
    x = directions + 0.3 * torch.randn(n, dim) + torch.randn(dim)
    return (x * torch.rand(dim).exp()).double()


# ---- Rounding ------------------------------------------------------------------------------------


def awkward_rows() -> torch.Tensor:
    """Return rows too small for the smallest scale, too large for the largest, and zeros."""
    torch.manual_seed(0)
    sizes = torch.tensor([1e-12, 1e-7, 1e-3, 1.0, 1e3, 1e8, 1.0, 1.0, 1.0])
    w = torch.randn(9, 40) * sizes[:, None]
    w[6], w[7, 1:], w[8, 5] = 0.0, 0.0, 1e4
    return w


def restated_nearest(quantizer: train_gpt.Quantizer, w: torch.Tensor) -> torch.Tensor:
    """Round each value to a multiple of its row's scale, within the codes that there are.

    What is pruned is zero.
    """
    scales = train_gpt.scales_of(quantizer.exponents(w))[:, None].numpy()
    largest = 2 ** (quantizer.bits - 1) - 1
    codes = np.clip(np.rint(w.double().numpy() / np.maximum(scales, 1e-30)), -largest, largest)
    return torch.from_numpy(codes * scales * (quantizer.prune(w) != 0).numpy()).float()


@each_quantizer
def test_codes_without_a_hessian_are_the_nearest(quantizer):
    torch.manual_seed(0)
    for w in (torch.randn(64, 48), torch.randn(5, 1), 1e-3 * torch.randn(1, 300), awkward_rows()):
        assert torch.equal(quantizer.quantize(w).dequantize(), restated_nearest(quantizer, w))


def test_pruned_codes_without_a_hessian_are_the_nearest():
    """A row's exponent is that of the whole row, of which the smallest values are dropped after."""
    torch.manual_seed(0)
    quantizer, w = train_gpt.Quantizer(6, 10.0, prune_fraction=0.6), torch.randn(64, 48)
    assert torch.equal(quantizer.quantize(w).dequantize(), restated_nearest(quantizer, w))


def test_ties_go_to_even_codes():
    """They are rare, about one in 4 million values."""
    torch.manual_seed(0)
    quantizer, w = QUANTIZERS[0], torch.randn(64, 512)
    scales = train_gpt.scales_of(quantizer.exponents(w))[:, None]
    tied = (((w / scales).floor() + 0.5) * scales).float()
    tied = torch.where(torch.arange(512) % 8 == 0, tied, w)
    assert torch.equal(quantizer.quantize(tied).dequantize(), restated_nearest(quantizer, tied))


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    columns=st.integers(1, 50),
    scale=st.integers(-17, 30),
    tail=st.integers(1, 5),
    which=st.sampled_from(range(3)),
)
def test_rounding_errs_by_half_a_scale_where_nothing_is_clipped(
    seed, rows, columns, scale, tail, which
):
    quantizer, generator = QUANTIZERS[which], torch.Generator().manual_seed(seed)
    w = 2.0**scale * torch.randn(rows, columns, generator=generator) ** tail
    codes = quantizer.quantize(w)
    scales, largest = train_gpt.scales_of(codes.exponents)[:, None], 2 ** (quantizer.bits - 1) - 1
    assert codes.codes.dtype is torch.int8
    assert codes.exponents.dtype is torch.uint8
    assert codes.codes.abs().max() <= largest
    clipped = w.double().abs() > (largest + 0.5) * scales
    error = (codes.dequantize().double() - w.double()).abs()
    assert (error <= scales * 0.500001).logical_or(clipped).all()
    assert (codes.codes[clipped].abs() == largest).all()
    assert (codes.codes[clipped].sign() == w[clipped].sign()).all()


@each_quantizer
def test_the_largest_code_stands_for_so_many_root_mean_squares(quantizer):
    """Scales are powers of 2^(1/8), so the span is right to 2^(1/16)."""
    torch.manual_seed(0)
    w = torch.randn(50, 60) * torch.logspace(-3, 3, 50)[:, None]
    span = train_gpt.scales_of(quantizer.exponents(w)) * (2 ** (quantizer.bits - 1) - 1)
    wanted = quantizer.clip_sigmas * w.double().square().mean(1).sqrt()
    assert (span / wanted).log2().abs().max() <= 1 / 16 + 1e-9


def test_an_exponent_is_an_eighth_of_an_octave_and_zero_is_a_zero_row():
    exponents = torch.tensor([0, 1, 152, 160, 168, 255], dtype=torch.uint8)
    expected = [0, 2 ** (-159 / 8), 0.5, 1, 2, 2 ** (95 / 8)]
    assert train_gpt.scales_of(exponents).tolist() == pytest.approx(expected, rel=1e-15)


@each_quantizer
def test_zero_rows_and_rows_of_unlike_scale_do_not_touch_each_other(quantizer):
    w = awkward_rows()
    together = quantizer.quantize(w)
    alone = [quantizer.quantize(row[None]) for row in w]
    assert torch.equal(together.codes, torch.cat([c.codes for c in alone]))
    assert torch.equal(together.exponents, torch.cat([c.exponents for c in alone]))
    assert together.exponents[6] == 0
    assert together.dequantize()[6].abs().max() == 0
    assert (together.exponents[[0, 1, 2, 3, 4, 5, 7, 8]] > 0).all()
    assert together.dequantize().isfinite().all()
    hessian = torch.from_numpy(np.cov(correlated_inputs(200, 40).T.numpy()))
    by_gptq = quantizer.quantize(w, hessian)
    assert by_gptq.codes[6].abs().max() == 0
    assert by_gptq.dequantize().isfinite().all()


def test_a_matrix_of_one_row_or_column_is_quantized_like_any_other():
    """Adapters of rank 1 are such; a scale is 0.4 root mean squares, so errors are about 12%."""
    for shape in ((1, 64), (64, 1)):
        torch.manual_seed(0)
        w = torch.randn(shape)
        values = QUANTIZERS[0].quantize(w, torch.eye(shape[1])).dequantize()
        assert (values - w).norm() / w.norm() < 0.2


# ---- GPTQ ----------------------------------------------------------------------------------------


def plain_gptq(
    w: np.ndarray,
    hessian: np.ndarray,
    quantizer: train_gpt.Quantizer,
    scales: np.ndarray,
    column_scales: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Return the codes by GPTQ's definition: after each column, the best change of the free ones.

    Every inverse is computed anew.
    """
    w, columns = w.astype(np.float64).copy(), w.shape[1]
    column_scales = np.broadcast_to(column_scales, columns)
    order = sorted(range(columns), key=lambda j: -hessian[j, j])
    damped = hessian.astype(np.float64)
    damped = damped + np.eye(columns) * (0.01 * np.trace(damped) / columns + 1e-12)
    codes = np.zeros(w.shape, dtype=int)
    for place, j in enumerate(order):
        free = order[place:]
        inverse = np.linalg.inv(damped[np.ix_(free, free)])
        steps = scales * column_scales[j]
        codes[:, j] = quantizer.nearest(torch.from_numpy(w[:, j] / steps)).numpy()
        error = w[:, j] - codes[:, j] * steps
        w[:, free] -= error[:, None] / inverse[0, 0] * inverse[0]
    return codes


@each_quantizer
@pytest.mark.parametrize("columns", [3, 33, 270])
def test_gptq_is_the_definition_computed_plainly(quantizer, columns):
    """270 columns are more than two of the blocks in which errors are carried on."""
    x = correlated_inputs(600, max(columns, 4))[:, :columns]
    w, hessian = torch.randn(20, columns), x.T @ x
    found = quantizer.quantize(w, hessian)
    scales = train_gpt.scales_of(found.exponents).numpy()
    expected = plain_gptq(w.numpy(), hessian.numpy(), quantizer, scales)
    assert np.array_equal(found.codes.numpy(), expected)
    assert torch.equal(found.exponents, quantizer.quantize(w).exponents)


@each_quantizer
def test_gptq_halves_the_output_error_of_rounding(quantizer):
    """On inputs it has not seen, too: it fits the kind of input, not the sample."""
    x = correlated_inputs(6000, 64)
    seen, unseen = x[:4000], x[4000:]
    w = torch.randn(96, 64)
    rounded = quantizer.quantize(w).dequantize().double()
    by_gptq = quantizer.quantize(w, seen.T @ seen).dequantize().double()
    for inputs in (seen, unseen):
        error, before = ((inputs @ (w - values).T).norm() for values in (by_gptq, rounded))
        assert error < 0.5 * before


def test_gptq_leaves_weights_and_hessian_as_they_were():
    x, w = correlated_inputs(200, 16), torch.randn(8, 16)
    hessian = x.T @ x
    for given in (hessian, hessian.float()):
        before = w.clone(), given.clone()
        QUANTIZERS[0].quantize(w, given)
        assert torch.equal(w, before[0])
        assert torch.equal(given, before[1])


@each_quantizer
def test_uncorrelated_inputs_leave_nothing_to_make_good(quantizer):
    torch.manual_seed(0)
    w = torch.randn(10, 30)
    for hessian in (torch.eye(30), torch.diag(torch.rand(30)), torch.zeros(30, 30)):
        assert torch.equal(quantizer.quantize(w, hessian).codes, quantizer.quantize(w).codes)


@pytest.mark.parametrize("with_hessian", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.5, 0.99])
def test_pruning_zeroes_that_fraction_of_the_smallest(fraction, with_hessian):
    x = correlated_inputs(400, 50)
    w = torch.randn(40, 50)
    hessian = x.T @ x if with_hessian else None
    quantizer = train_gpt.Quantizer(8, 4.0, fraction)
    codes = quantizer.quantize(w, hessian).codes
    smallest = w.abs().flatten().argsort()[: round(w.numel() * fraction)]
    assert codes.flatten()[smallest].abs().sum() == 0
    if not with_hessian:  # with one, what is kept moves, and some of it to zero
        rounds_to_zero = (train_gpt.Quantizer(8, 4.0).quantize(w).codes == 0).flatten()
        rounds_to_zero[smallest] = True
        assert torch.equal(codes.flatten() == 0, rounds_to_zero)


def test_pruned_values_are_made_good_like_rounding_errors():
    x = correlated_inputs(2000, 48)
    w, hessian = torch.randn(32, 48), x.T @ x
    quantizer = train_gpt.Quantizer(8, 4.0, prune_fraction=0.3)
    by_gptq = quantizer.quantize(w, hessian).dequantize().double()
    plain = quantizer.quantize(w).dequantize().double()
    assert (x @ (w - by_gptq).T).norm() < 0.5 * (x @ (w - plain).T).norm()


# ---- Calibration ---------------------------------------------------------------------------------


def test_hessians_are_the_sums_of_products_of_the_inputs(settings, random_model, processes):
    """By hand: a first layer's input, the learned maps, and the second use of the embedding."""
    h = settings(num_layers=1, smear_enabled=0, ve_layers="0")
    model, batches = random_model(h), [tokens(3, 16), tokens(2, 16, seed=1)]
    hessians = train_gpt.collect_hessians(model, iter(batches), processes)

    def expected(inputs):
        x = torch.cat([inputs(ids).detach().flatten(0, 1).double() for ids in batches])
        return x.T @ x

    def bigrams(ids):
        hashed = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % 31
        return model.bigram.weight[torch.cat([torch.full((len(ids), 1), 31), hashed], 1)]

    def normalized(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def attention_input(ids):
        block, added = model.blocks[0], bigrams(ids) @ model.bigram.proj.weight.T
        x = normalized(model.embedding.weight[ids] + model.bigram_scale * added)
        return normalized(block.stream_mix * x + block.embedding_mix * x)

    def head_input(ids):
        seen = []
        hook = model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.predict(ids)
        hook.remove()
        return seen[0]

    by_hand = {
        model.bigram.proj: bigrams,
        model.value_embedding.proj: lambda ids: model.value_embedding.weight[ids],
        model.blocks[0].attention.q: attention_input,
        model.blocks[0].attention.v: attention_input,
        model.embedding: head_input,
    }
    for module, inputs in by_hand.items():
        assert hessians[module].dtype is torch.float32
        torch.testing.assert_close(
            hessians[module].double(), expected(inputs), rtol=1e-4, atol=1e-3
        )
    kinds = {type(module) for module in hessians}
    assert kinds == {train_gpt.Linear, train_gpt.Embedding, train_gpt.LoRA}
    for spec in model.random_maps():  # an adapter sees what its map does
        module = model.get_submodule(spec.name)
        assert hessians[module.lora] is hessians[module]
    looked_up_only = model.bigram, model.value_embedding
    assert all(module not in hessians for module in looked_up_only)
    assert len(hessians) == 2 * 6 + 3


def test_the_map_of_an_embedding_has_the_hessian_of_its_lookups(settings, random_model, processes):
    """The tied head reads the same table, and its inputs are as wide."""
    basis = {
        "map_basis": "orthogonal,embedding=orthogonal",
        "map_adapter": "lora:4,embedding=lora:3",
    }
    model, ids = random_model(settings(embedding_dim=24, **basis)), tokens(2, 16)
    hessians = train_gpt.collect_hessians(model, [ids], processes)
    looked_up = model.embedding.weight[ids].flatten(0, 1).detach()
    proj = model.embedding.proj
    torch.testing.assert_close(hessians[proj], looked_up.T @ looked_up, rtol=1e-4, atol=1e-3)
    assert hessians[proj.lora] is hessians[proj]
    assert hessians[model.embedding].shape == (24, 24)
    assert not torch.allclose(hessians[model.embedding], hessians[proj])


@pytest.mark.parametrize("twist", ["none", "permutation", "orthogonal"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_hessian_of_a_shared_matrix_measures_the_errors_of_all_its_layers(
    settings, random_model, processes, twist, count
):
    """An error D of a matrix costs Σ ‖c x twist(D)ᵀ‖² over the inputs x of all layers.

    c is how much of the matrix a layer mixes in.
    """
    h = settings(map_basis=f"shared:{count}", map_twist=twist, map_adapter="none")
    model, ids, inputs = random_model(h), tokens(6, 16), {}
    for layer, block in enumerate(model.blocks):
        block.mlp.fc.register_forward_pre_hook(
            lambda _, given, layer=layer: inputs.update({layer: given[0].flatten(0, -2).double()})
        )
    hessians = train_gpt.collect_hessians(model, [ids], processes)
    found = hessians[model.blocks[0].mlp.fc.shared_matrices[0]].double()
    assert len(found) == count
    error = torch.randn(model.blocks[0].mlp.fc.base_weight().shape).double()
    for i, hessian in enumerate(found):
        cost = 0.0
        for layer, block in enumerate(model.blocks):
            fc = block.mlp.fc
            c = 1.0 if fc.shared_mix is None else fc.shared_mix[i].item()
            in_layer = error if fc.twist is None else fc.twist.double()(error)
            cost += (c * inputs[layer] @ in_layer.T).square().sum()
        tolerance = 2e-2 if twist == "orthogonal" else 1e-5  # its maps are rounded to bfloat16
        by_hessian = (error @ hessian @ error.T).trace()
        torch.testing.assert_close(by_hessian, cost, rtol=tolerance, atol=0)


def test_products_of_bfloat16_inputs_are_exact(settings, processes):
    """They may be multiplied as bfloat16, but not rounded to it.

    Nothing else may be multiplied so from then on.
    """
    sizes = {"num_layers": 1, "model_dim": 256, "num_heads": 8}
    h = settings(**sizes, bigram_vocab_size=0, ve_enabled=0, smear_enabled=0)
    torch.manual_seed(0)
    model, seen = train_gpt.GPT(h, torch.bfloat16), []
    module = model.blocks[0].mlp.proj
    module.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2).double())
    )
    hessian = train_gpt.collect_hessians(model, [tokens(256, 16)], processes)[module].double()
    expected = seen[0].T @ seen[0]
    assert (hessian - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.get_float32_matmul_precision() == "highest"


def test_collecting_leaves_no_trace_in_the_model(settings, random_model, processes):
    model, ids = random_model(settings()), tokens(2, 16)
    before = copy.deepcopy(model.state_dict())
    assert train_gpt.collect_hessians(model, [ids], processes)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hessians_of_bfloat16_activations_can_be_used(settings, processes):
    """Inputs with a strong mean: a product rounded to bfloat16 would have negative eigenvalues.

    The export would then crash after all of the training.
    """
    h = settings(num_layers=1, model_dim=128, bigram_vocab_size=0, ve_enabled=0)
    torch.manual_seed(0)
    model = train_gpt.GPT(h, torch.bfloat16)
    with torch.no_grad():
        model.embedding.weight.copy_(1 + 0.05 * torch.randn(64, 128))
    hessians = train_gpt.collect_hessians(model, [tokens(64, 16)], processes)
    for hessian in hessians.values():
        assert torch.linalg.eigvalsh(hessian.double())[0] > -1e-3 * hessian.diagonal().mean()
    for module, hessian in hessians.items():
        module.quantize(train_gpt.make_quantizers(h), hessian)


def test_a_factor_pair_is_quantized_each_against_its_own_inputs():
    """Trap 3: B sees x; A sees x B̂ᵀ, with the B̂ that the artifact holds."""
    torch.manual_seed(0)
    layer = train_gpt.FrozenRandomLinearWithLoRA(40, 300, rank=8)
    with torch.no_grad():
        layer.lora_A.normal_()
    quantizer = train_gpt.Quantizer(4, 3.0)
    quantizers = {Role.FACTOR: quantizer, Role.MATRIX: None, Role.EMBEDDING: None}
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    x = correlated_inputs(4000, 40)
    hessian = (x.T @ x).float()
    codes = layer.lora.quantize(quantizers, hessian)
    assert list(codes) == ["B", "A"]
    assert layer.quantize(quantizers, hessian) == {}, "the map itself is not stored"

    b_codes = quantizer.quantize(b, hessian)
    seen = x @ b_codes.dequantize().double().T
    a_codes = quantizer.quantize(a, seen.T @ seen)
    assert torch.equal(codes["B"].codes, b_codes.codes)
    assert torch.equal(codes["A"].codes, a_codes.codes)
    seen_by_exact_b = x @ b.double().T
    other = quantizer.quantize(a, seen_by_exact_b.T @ seen_by_exact_b)
    assert not torch.equal(a_codes.codes, other.codes)

    def output_error(a_values, b_values):
        return (x @ (a @ b - a_values @ b_values).double().T).norm()

    nearest_a, nearest_b = (quantizer.quantize(factor).dequantize() for factor in (a, b))
    error = output_error(codes["A"].dequantize(), codes["B"].dequantize())
    assert error < 0.7 * output_error(nearest_a, nearest_b)
    plain = layer.lora.quantize(quantizers, None)
    assert torch.equal(plain["A"].dequantize(), nearest_a)


# ---- Scales by sensitivity -----------------------------------------------------------------------


def fisher_by_hand(model, ids, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the mean over each row of E[g²], (rows,) float64, by every position and label.

    The gradient of each label is weighted by the probability that the model gives it.
    """
    totals = [torch.zeros(len(p), dtype=torch.float64) for p in parameters]
    logs = model.predict(ids).double().log_softmax(-1).flatten()
    for log in logs:
        gradients = torch.autograd.grad(log, parameters, retain_graph=True)
        for total, g in zip(totals, gradients, strict=True):
            total += log.exp().item() * g.double().square().mean(1) / ids.numel()
    return totals


def small_model(dtype=torch.float64) -> train_gpt.GPT:
    """Return a model of one layer with 16 tokens, sure of some predictions."""
    sizes = {"num_layers": 1, "vocab_size": 16, "model_dim": 16, "bigram_vocab_size": 8}
    h = tiny_settings(**sizes, train_seq_len=8, eval_seq_len=8, map_adapter="lora:2")
    torch.manual_seed(0)
    model = train_gpt.GPT(h, dtype).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.4)
    return model


def test_sensitivities_are_the_fisher_information(processes):
    """The estimate draws labels; many batches come near to the sum over all labels, in float64."""
    model = small_model()
    ids = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(0))
    rows, _ = train_gpt.collect_sensitivities(model, [ids] * 100, processes)
    names = ["embedding.weight", "bigram.weight", "bigram.proj.weight"]
    names += ["blocks.0.mlp.fc.lora.A", "blocks.0.attention.v.lora.B"]
    parameters = [model.get_parameter(name) for name in names]
    for name, p, expected in zip(
        names, parameters, fisher_by_hand(model, ids, parameters), strict=True
    ):
        if name.endswith("0.weight") or name.startswith("embedding"):
            expected = expected + 0.05 * expected.mean()
        assert (rows[p] - expected).norm() < 0.15 * expected.norm(), name


def test_collecting_sensitivities_leaves_no_trace(settings, random_model, processes):
    """Also where maps are frozen: what is stored of them is quantized, too."""
    model, ids = random_model(settings()), tokens(2, 16)
    model.blocks[0].mlp.fc.set_frozen(True)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    rows, tables = train_gpt.collect_sensitivities(model, [ids], processes)
    assert rows[model.blocks[0].mlp.fc.lora.B].min() > 0
    assert not model.blocks[0].mlp.fc.lora.B.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(tables) == {model.embedding, model.bigram, model.value_embedding}
    by_seen = rows[model.embedding.weight] > 0
    assert by_seen.all(), "also what the text does not show"


def test_every_table_is_rounded_by_its_own_gradients(data_settings, random_model, processes):
    """Also those that are looked up alone, and are no linear map's weights."""
    model, batches = random_model(data_settings()), [tokens(2, 16)]
    calibration = train_gpt.calibrate(data_settings(), model, processes, batches)
    _, tables = train_gpt.collect_sensitivities(model, batches, processes)
    assert len(tables) == 3
    for module, hessian in tables.items():
        torch.testing.assert_close(calibration.hessians[module], hessian)


def by_sensitivity(p, sensitivity, loss=1e-6) -> train_gpt.SensitivityQuantizer:
    return train_gpt.SensitivityQuantizer(sensitivities={p: sensitivity}, loss_per_value=loss)


def parameter(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    """Return normal values in rows of unlike size."""
    torch.manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape) * torch.logspace(-2, 1, shape[0])[:, None])


def test_a_row_that_matters_more_gets_a_finer_scale_until_it_costs_the_same():
    w = torch.nn.Parameter(torch.randn(30, 400, generator=torch.Generator().manual_seed(0)))
    sensitivity = torch.logspace(-3, 1, 30).double()
    loss = 1e-3
    codes = by_sensitivity(w, sensitivity, loss).quantize(w)
    exponents = codes.exponents.int()
    assert (exponents.diff() <= 0).all()
    scales = train_gpt.scales_of(codes.exponents)
    assert (sensitivity * scales.square() / 24 / loss).log2().abs().max() < 0.25
    cost = (codes.dequantize() - w).detach().double().square().mean(1) * sensitivity / 2
    assert (cost[15:] / loss - 1).abs().max() < 0.3, "an error is uniform within a scale"


def test_scales_rise_with_the_loss_that_is_allowed():
    w, sensitivity = parameter(20, 60), torch.rand(20).double()
    x = correlated_inputs(300, 60)
    for hessian in (None, x.T @ x):
        exponents = [
            by_sensitivity(w, sensitivity, loss).quantize(w, hessian).exponents.int()
            for loss in (1e-8, 1e-6, 1e-4, 1e-2)
        ]
        assert all((b >= a).all() and (b > a).any() for a, b in itertools.pairwise(exponents))


def test_scaling_a_row_against_its_consumer_changes_no_code():
    """A function's row times c has the curvature over c², and so a scale that is c times larger."""
    w, sensitivity = parameter(20, 60), torch.rand(20).double()
    c = torch.tensor([2.0, 0.25, 1.0, 16.0]).repeat(5)
    scaled = torch.nn.Parameter(w.detach() * c[:, None])
    codes = by_sensitivity(w, sensitivity).quantize(w)
    other = by_sensitivity(scaled, sensitivity / c.double().square()).quantize(scaled)
    assert torch.equal(codes.codes, other.codes)
    steps = other.exponents.int() - codes.exponents.int()
    assert torch.equal(steps, (8 * c.log2()).int())


def test_rows_that_nothing_depends_on_and_rows_of_zeros_have_codes():
    w, sensitivity = parameter(4, 50), torch.zeros(4).double()
    with torch.no_grad():
        w[1] = 0
    for values in (sensitivity, torch.tensor([1.0, 1.0, 0.0, 0.0]).double()):
        codes = by_sensitivity(w, values).quantize(w)
        assert codes.exponents[1] == 0
        assert codes.dequantize().isfinite().all()


@pytest.mark.parametrize("with_hessian", [False, True])
def test_no_code_is_clipped_at_the_finest_scales(with_hessian):
    """Then each value errs by at most 0.58 scales (0.5 and the dead zone)."""
    w = parameter(20, 60)
    hessian = torch.eye(60) if with_hessian else None
    codes = by_sensitivity(w, torch.ones(20).double(), 1e-30).quantize(w, hessian)
    scales = train_gpt.scales_of(codes.exponents)[:, None]
    assert ((codes.dequantize() - w).detach().abs() <= 0.5801 * scales).all()
    largest = codes.codes.abs().amax(1)
    assert largest.max() < 127
    assert largest.min() >= 100


def test_columns_that_matter_less_get_coarser_scales():
    """The codes are those of GPTQ's definition at these scales."""
    w, sensitivity = parameter(40, 60), torch.rand(40).double()
    x = correlated_inputs(300, 60) * torch.logspace(-1, 1, 60)
    hessian = x.T @ x
    quantizer = by_sensitivity(w, sensitivity, 1e-4)
    found = quantizer.quantize(w, hessian)
    column_scales = train_gpt.scales_of(found.column_exponents)
    assert column_scales[:20].log2().mean() > column_scales[40:].log2().mean() + 1
    scales = train_gpt.scales_of(found.exponents).numpy()
    values = w.detach().double().numpy()
    expected = plain_gptq(values, hessian.numpy(), quantizer, scales, column_scales.numpy())
    assert np.array_equal(found.codes.numpy(), expected)
    by_hand = expected * scales[:, None] * column_scales.numpy()
    np.testing.assert_allclose(found.dequantize().numpy(), by_hand, rtol=1e-6)


def test_scales_of_columns_save_bytes_at_the_same_cost(monkeypatch):
    """Rows matter unlike, so that the steps between scales make no difference on average."""
    torch.manual_seed(0)
    w, sensitivity = torch.nn.Parameter(torch.randn(200, 60)), torch.logspace(0, 1, 200).double()
    x = correlated_inputs(2000, 60) * torch.logspace(-1, 1, 60)

    def cost_and_bytes() -> tuple[float, float]:
        codes = by_sensitivity(w, sensitivity, 1e-3).quantize(w, x.T @ x)
        errors = (x @ (codes.dequantize() - w).detach().double().T).square().sum(0)
        return (sensitivity * errors).sum().item(), train_gpt.entropy_bytes(codes.codes)

    cost, size = cost_and_bytes()
    monkeypatch.setattr(
        train_gpt.SensitivityQuantizer, "column_exponents", train_gpt.Quantizer.column_exponents
    )
    other_cost, larger_size = cost_and_bytes()
    assert size < 0.95 * larger_size
    assert cost < 1.05 * other_cost


def test_columns_have_no_scales_where_these_would_not_pay():
    """In a matrix of few rows, with columns that matter alike, and by root mean squares."""
    x = correlated_inputs(300, 60) * torch.logspace(-1, 1, 60)
    for rows, hessian, pays in (
        (2, x.T @ x, False),
        (40, torch.eye(60), False),
        (40, x.T @ x, True),
    ):
        w = parameter(rows, 60)
        codes = by_sensitivity(w, torch.ones(rows).double()).quantize(w, hessian)
        assert (codes.column_exponents is not None) == pays
        assert QUANTIZERS[0].quantize(w, hessian).column_exponents is None


def packed_at(loss: float, bits: int = 0) -> train_gpt.Artifact:
    """Return an artifact of half a bit less per value at twice the loss, not below 100 bytes."""
    codes = max(100, round(4000 - 500 * np.log2(loss / 1e-8)))
    sizes = {"weight codes": codes, "mask bits": bits}
    return train_gpt.Artifact(b"0" * (codes + bits), sizes, {}, loss)


def estimate(loss: float) -> float:
    """Return 10% more than the codes take, less a little."""
    return 1.1 * len(packed_at(loss).blob) - 50


@pytest.mark.parametrize("bits", [0, 20_000])  # which no scale changes
@pytest.mark.parametrize("target", [999, 1500, 4000, 9000])
def test_the_solver_lands_within_half_a_percent_under_the_target(target, bits):
    calls = []
    packed = train_gpt.solve_for_bytes(
        lambda loss: calls.append(loss) or packed_at(loss, bits), estimate, target + bits, 1e-8
    )
    assert 0.995 * (target + bits) <= len(packed.blob) <= target + bits
    assert len(calls) <= 4


def jumping(loss: float) -> train_gpt.Artifact:
    """Return an artifact that takes 150 bytes more if rounding costs less than 1e-8."""
    smooth = packed_at(loss)
    codes = smooth.sizes["weight codes"] + 150 * (loss < 1e-8)
    return smooth._replace(blob=b"0" * codes, sizes={"weight codes": codes})


@pytest.mark.parametrize("target", [3990, 4010, 4155, 4175])
@pytest.mark.parametrize("begin", [1e-9, 0.999e-8, 1.001e-8, 1e-7])
def test_the_solver_meets_a_target_beside_a_jump_of_the_bytes(target, begin):
    packed = train_gpt.solve_for_bytes(jumping, estimate, target, begin)
    assert 0.995 * target <= len(packed.blob) <= target


def test_a_target_that_no_scale_reaches_gives_the_smallest_there_is():
    assert len(train_gpt.solve_for_bytes(packed_at, estimate, 50, 1e-8).blob) == 100


def test_a_target_that_no_scale_fills_gives_the_largest_there_is():
    def pack(loss: float) -> train_gpt.Artifact:
        return packed_at(max(loss, 1e-9))

    packed = train_gpt.solve_for_bytes(pack, lambda loss: len(pack(loss).blob), 99_000, 1e-8)
    assert len(packed.blob) == len(packed_at(1e-9).blob)


def test_rows_that_matter_alike_take_the_next_scale_one_by_one():
    w = parameter(64, 8)
    sums = []
    for loss in np.logspace(-3, -2.9, 9):
        quantizer = by_sensitivity(w, torch.ones(64).double(), loss)
        sums.append(quantizer.exponents(w).sum().item())
    steps = np.diff(sums)
    assert (steps > 0).all()
    assert (steps < 32).all()


def test_the_estimate_of_bytes_is_near_what_an_artifact_takes(exported, processes):
    blob, model, h = exported
    batches = list(train_gpt.calibration_batches(h, processes, train_gpt.TrainingData(h), 3))
    calibration = train_gpt.calibrate(h, model, processes, batches)
    quantizers = calibration.quantizers(h, h.loss_per_value)
    assert train_gpt.estimate_bytes(model, quantizers) == pytest.approx(len(blob), rel=0.2)


def test_entropy_of_codes_in_bytes():
    codes = torch.tensor([0, 0, 0, 0, 1, 1, -1, 5] * 8, dtype=torch.int8)
    assert train_gpt.entropy_bytes(codes) == pytest.approx(64 * 1.75 / 8)
    assert train_gpt.entropy_bytes(torch.zeros(9, dtype=torch.int8)) == 0


def test_target_bytes_are_met_by_an_export_or_refused(exported, processes):
    _, model, h = exported
    at_default = train_gpt.code_bytes() + len(export(h, model, processes))
    for target in (at_default - 1000, at_default + 3000):
        changed = train_gpt.load_settings({}, **h.as_dict() | {"target_bytes": target})
        size = len(export(changed, model, processes))
        assert 0.995 * target <= train_gpt.code_bytes() + size <= target
        train_gpt.check_size(changed, size)
        with pytest.raises(train_gpt.UserError, match=f"over TARGET_BYTES={target:,} at any"):
            train_gpt.check_size(changed, target - train_gpt.code_bytes() + 1)
    changed = train_gpt.load_settings({}, **h.as_dict() | {"target_bytes": 1000})
    with pytest.raises(train_gpt.UserError, match="over TARGET_BYTES=1,000 at any scales"):
        train_gpt.check_size(changed, len(export(changed, model, processes)))


def test_target_bytes_need_sensitivities():
    for other in ({"quantizer": "rms"}, {"gptq_calib_batches": 0}):
        with pytest.raises(train_gpt.UserError, match="TARGET_BYTES needs QUANTIZER=sensitivity"):
            tiny_settings(target_bytes=10_000, **other)


# ---- Late quantization-aware training ------------------------------------------------------------


def test_weights_are_as_stored_within_and_their_own_after(settings, random_model):
    h = settings()
    model = random_model(h)
    groups, quantizers = train_gpt.tensors_by_role(model), train_gpt.make_quantizers(h)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with train_gpt.weights_as_stored(groups, quantizers):
        for role in (Role.MATRIX, Role.FACTOR, Role.EMBEDDING):
            for name, p in groups[role].items():
                stored = quantizers[role].quantize(before[name]).dequantize()
                assert torch.equal(p, stored), name
                assert not torch.equal(p, before[name]), name
        for name, p in groups[Role.SCALAR].items():
            assert torch.equal(p, before[name]), name
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.data_ptr() == places[name], name


def test_gradients_of_late_qat_are_straight_through(settings, random_model):
    """A gradient taken within is that of the quantized model, given to the masters as it is."""
    h = settings()
    model, stored = random_model(h), random_model(h)
    quantizers = train_gpt.make_quantizers(h)
    with torch.no_grad():
        for role, params in train_gpt.tensors_by_role(stored).items():
            for p in params.values() if role in quantizers else ():
                p.copy_(quantizers[role].quantize(p).dequantize())
    with train_gpt.weights_as_stored(train_gpt.tensors_by_role(model), quantizers):
        loss = model(tokens(2, 16), tokens(2, 16, seed=1))
        loss.backward()
    expected = stored(tokens(2, 16), tokens(2, 16, seed=1))
    expected.backward()
    assert loss.item() == expected.item()
    for (name, p), other in zip(model.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(p.grad, other.grad), name


def test_masters_come_back_when_a_step_fails(settings, random_model):
    h = settings()
    model = random_model(h)
    before = copy.deepcopy(model.state_dict())
    groups, quantizers = train_gpt.tensors_by_role(model), train_gpt.make_quantizers(h)
    with pytest.raises(KeyboardInterrupt), train_gpt.weights_as_stored(groups, quantizers):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- The trainer, in this process ----------------------------------------------------------------


def test_weights_go_on_learning_during_late_qat(data_settings, trainer_of):
    h = data_settings(iterations=5, warmdown_iters=5, late_qat_threshold=1.0, train_log_every=1)
    trainer = trainer_of(h)
    trainer.warm_up()
    trainer.train()
    log = trainer.run.log
    began = next(i for i, line in enumerate(log.lines) if line.startswith("late_qat:on"))
    assert "train_loss" in log.lines[began - 1], "it begins after the first step"
    assert len(log.snapshots) == 5
    before, *_, after = log.snapshots
    idle = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert idle == []


def spoiled(weights: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Return weights that predict worse: noise is added."""
    generator = torch.Generator().manual_seed(seed)
    return [w + torch.randn(w.shape, generator=generator) for w in weights]


@pytest.mark.parametrize("best", ["last", "ema", "swa"])
def test_the_best_candidate_is_what_the_model_holds_after_the_choice(
    data_settings, trainer_of, monkeypatch, best
):
    """Best on held-out training text, by an evaluation of its own here."""
    trainer = trainer_of(data_settings())
    own = [p.detach().clone() for p in trainer.optimizers.params]
    candidates = {"last": spoiled(own, 1), "ema": spoiled(own, 2), "swa": spoiled(own, 3)}
    candidates[best] = [w + 1e-3 for w in own]
    monkeypatch.setattr(trainer.averages, "candidates", lambda: candidates)
    ranked, losses = trainer.rank_candidates()
    for p, expected in zip(trainer.optimizers.params, candidates[best], strict=True):
        assert torch.equal(p, expected)
    assert list(ranked) == sorted(losses, key=losses.get)
    assert next(iter(ranked)) == best
    for name, weights in ranked.items():
        assert weights.keys() == trainer.model.state_dict().keys()
        for (p, own_name), w in zip(
            trainer.optimizers.names.items(), candidates[name], strict=True
        ):
            assert p.shape == w.shape
            assert torch.equal(weights[own_name], w)
    held_out = trainer.data.held_out_stream()
    for name, weights in candidates.items():
        with torch.no_grad():
            for p, w in zip(trainer.optimizers.params, weights, strict=True):
                p.copy_(w)
        h = trainer.h
        loss = train_gpt.evaluate(trainer.model, held_out, h, trainer.dist, h.eval_seq_len)
        assert losses[name] == pytest.approx(loss, abs=1e-9)
    (line,) = [line for line in trainer.run.log.lines if line.startswith("average ")]
    assert f" best:{best} " in line


def test_a_candidate_that_is_not_finite_is_not_chosen(data_settings, trainer_of, monkeypatch):
    trainer = trainer_of(data_settings())
    own = [p.detach().clone() for p in trainer.optimizers.params]
    broken = [torch.full_like(w, torch.nan) for w in own]
    candidates = {"last": broken, "ema": spoiled(own, 1), "swa": broken}
    monkeypatch.setattr(trainer.averages, "candidates", lambda: candidates)
    ranked, _ = trainer.rank_candidates()
    assert list(ranked) == ["ema"]
    for p, expected in zip(trainer.optimizers.params, candidates["ema"], strict=True):
        assert torch.equal(p, expected)
    candidates["ema"] = broken
    with pytest.raises(train_gpt.UserError, match="not finite"):
        trainer.rank_candidates()


def test_the_best_artifact_is_exported_whatever_came_first(data_settings, run_of, processes):
    """By the loss on held-out text of what its bytes give back."""
    h = data_settings()
    torch.manual_seed(0)
    model, data = train_gpt.make_model(h), train_gpt.TrainingData(h)
    own = copied(model)
    worse = [spoiled([*own.values()], seed) for seed in (1, 2)]
    last, swa = (dict(zip(own, weights, strict=True)) for weights in worse)
    candidates = {"last": last, "ema": own, "swa": swa}
    run = run_of(h, model)
    blob, metrics = train_gpt.export_best(run, model, data, candidates, 3, math.inf)
    rebuilt = train_gpt.model_from_artifact(h, blob, processes)
    loss = train_gpt.evaluate(rebuilt, data.held_out_stream(), h, processes, h.eval_seq_len)
    losses = {name: metrics[f"holdout_loss_quantized_{name}"] for name in candidates}
    assert min(losses, key=losses.get) == metrics["candidate"] == "ema"
    assert losses["ema"] == pytest.approx(loss, abs=1e-9)
    assert len(set(losses.values())) == 3
    lines = [line for line in run.log.lines if line.startswith("quantized ")]
    assert [line.split()[1] for line in lines] == [f"{name}:{losses[name]:.4f}" for name in losses]
    assert any(line.startswith("exported:ema\n") for line in run.log.lines)


def test_a_preflight_leaves_the_training_as_it_was(data_settings, run_of):
    """Weights, what is trained of them, and the order of the data."""
    h = data_settings(map_freeze="mlp.fc=0.5", map_basis="orthogonal,mlp.fc=learned")
    torch.manual_seed(0)
    model, data = train_gpt.make_model(h).train(), train_gpt.TrainingData(h)
    run = run_of(h, model)

    def state():
        return {
            "trained": torch.tensor([p.requires_grad for p in model.parameters()]),
            "training": torch.tensor([module.training for module in model.modules()]),
            "gradients": torch.tensor([p.grad is not None for p in model.parameters()]),
            "places": torch.tensor([p.data_ptr() for p in model.parameters()]),
            "data": data.sequences(0, len(data.positions)),
            **{name: value.clone() for name, value in model.state_dict().items()},
            **{f"{name} as a buffer": value.clone() for name, value in model.named_buffers()},
        }

    before = state()
    train_gpt.preflight(run, model, data)
    changed = [name for name, value in state().items() if not torch.equal(value, before[name])]
    assert changed == []


def test_training_after_a_preflight_is_training_without(data_settings, run_of, monkeypatch):
    """The same random numbers (of the dropout), batches and weights."""
    h = data_settings(iterations=3, dropout=0.2)
    found = []
    for preflight in (train_gpt.preflight, lambda *_: None):
        monkeypatch.setattr(train_gpt, "preflight", preflight)
        monkeypatch.setattr(train_gpt, "reserve_for_export", lambda *_: 0.0)
        torch.manual_seed(0)
        model, data = train_gpt.make_model(h), train_gpt.TrainingData(h)
        train_gpt.train_model(run_of(h, model), model, data, None)
        found.append(copied(model))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


# ---- What is quantized ---------------------------------------------------------------------------

PER_CHANNEL = ("skip_weights", "q_gain")


@pytest.fixture(scope="module")
def exported(data_settings, processes):
    """An artifact as a run makes it, the model it was made from, and the settings."""
    h = data_settings(model_dim=64, vocab_size=64)
    torch.manual_seed(0)
    model = train_gpt.GPT(h)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora.A"):
                p.normal_(std=0.05)
        model.embedding.weight.normal_(std=0.3)
        model.bigram.weight.normal_(std=0.3)
    return export(h, model, processes), model, h


def export(h: train_gpt.Hyperparameters, model: train_gpt.LanguageModel, processes) -> bytes:
    """Return the artifact of a model after 3 steps."""
    tokenizer = SimpleNamespace(sha256="0" * 64)
    run = train_gpt.Run(h, processes, KeptLog(), train_gpt.StopSignal(), tokenizer, None)
    return train_gpt.export(run, model, train_gpt.TrainingData(h), step=3).blob


def test_every_matrix_adapter_and_embedding_is_quantized(exported):
    """Trap 3: adapters are the payload, and none may slip through to float16."""
    blob, model, h = exported
    header, tensors = train_gpt.read_artifact(blob)
    groups = {name: kinds for name, _, kinds in header["tensors"]}
    learned = dict(model.named_parameters())
    assert set(groups) == set(tensors) == set(learned)
    for name, p in learned.items():
        expected = p.ndim == 2 and not name.endswith(PER_CHANNEL)
        assert (groups[name] != ["float16"]) == expected, name
        assert tensors[name].shape == p.shape, name
    adapters = [name for name in groups if ".lora." in name and "codes" in groups[name][0]]
    assert len(adapters) == 2 * 6 * h.num_layers


@pytest.mark.parametrize("basis", ["orthogonal", "learned"])
def test_each_parameter_has_one_role(settings, basis):
    """The role decides optimizer and quantizer: an adapter without one would train as a gain."""
    model = train_gpt.GPT(settings(map_basis=basis))
    roles = train_gpt.tensors_by_role(model)
    named = [name for group in roles.values() for name in group]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    embeddings = {"embedding.weight", "bigram.weight", "value_embedding.weight"}
    assert set(roles[Role.EMBEDDING]) == embeddings
    random = {spec.name for spec in model.random_maps()}
    learned = set(model.table) - random
    assert {"bigram.proj", "value_embedding.proj"} <= learned
    assert len(random) == (24 if basis == "orthogonal" else 0)
    assert set(roles[Role.MATRIX]) == {f"{name}.weight" for name in learned}
    assert set(roles[Role.FACTOR]) == {f"{name}.lora.{f}" for name in random for f in "AB"}


def test_hardly_any_learned_value_of_the_full_configuration_stays_float16():
    """Scalars are the same with and without random maps: none need be generated to count them."""
    table = train_gpt.build_map_table(train_gpt.load_settings({}))
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.load_settings({}, map_basis="learned"))
    roles = train_gpt.tensors_by_role(model)

    def count(role):
        return sum(p.numel() for p in roles[role].values())

    adapters = sum(
        spec.adapters()["lora"] * (spec.in_features + spec.out_features)
        for spec in table.values()
        if spec.is_random
    )
    assert count(Role.SCALAR) < 0.01 * (adapters + count(Role.EMBEDDING))
    assert all(name.endswith(PER_CHANNEL) for name, p in roles[Role.SCALAR].items() if p.ndim > 1)


def test_the_artifact_predicts_what_the_model_does(exported, processes):
    """From the bytes alone; 6 and 8 bits cost some accuracy, and no more."""
    blob, model, h = exported
    again = train_gpt.model_from_artifact(h, blob, processes)
    ids = tokens(8, 16)
    with torch.no_grad():
        exact, stored = (m.predict(ids) for m in (model, again))
    assert 0 < (stored - exact).norm() / exact.norm() < 0.1
    assert again.fingerprint() == model.fingerprint()


def test_a_rebuilt_model_has_a_table_of_angles_as_long_as_this_runs_windows(
    exported, settings, processes
):
    """A longer window would compute it anew in every forward pass."""
    for length in (64, 4096):
        h = settings(eval_seq_len=length)
        model = train_gpt.model_from_artifact(h, exported[0], processes)
        model.rotary = None  # what would compute it
        with torch.no_grad():
            model.predict(tokens(1, length))


def test_the_artifact_holds_the_codes_of_gptq_on_the_calibration_batches(exported, processes):
    """Their text is what training would have read next, here after 3 steps.

    A batch has as many tokens as a training batch, up to 8,192.
    """
    blob, model, h = exported
    _, tensors = train_gpt.read_artifact(blob)
    size = h.train_batch_tokens // h.train_seq_len
    read = 3 * size
    rows = train_gpt.TrainingData(h).sequences(read, h.gptq_calib_batches * size)
    batches = list(rows[:, :-1].split(size))
    calibration = train_gpt.calibrate(h, model, processes, batches)
    quantizers = calibration.quantizers(h, h.loss_per_value)
    for name in ("embedding", "bigram", "bigram.proj", "blocks.3.mlp.proj.lora"):
        module = model.get_submodule(name)
        stored = module.quantize(quantizers, calibration.hessians.get(module))
        assert len(stored) == (2 if name.endswith("lora") else 1), name
        for part, codes in stored.items():
            assert torch.equal(tensors[f"{name}.{part}"], codes.dequantize()), name
    nearest = quantizers[Role.MATRIX].quantize(model.blocks[3].mlp.proj.lora.B).dequantize()
    assert not torch.equal(tensors["blocks.3.mlp.proj.lora.B"], nearest)
    assert torch.equal(tensors["skip_weights"], model.skip_weights.half().float())


@pytest.mark.parametrize(("tokens", "expected"), [(256, 256), (16_384, 8192)])
def test_a_calibration_batch_is_no_larger_than_a_training_batch(
    data_settings, processes, tokens, expected
):
    h = data_settings(train_batch_tokens=tokens, gptq_calib_batches=2)
    batches = [*train_gpt.calibration_batches(h, processes, train_gpt.TrainingData(h), 0)]
    assert [batch.numel() for batch in batches] == [expected] * 2


def levels(values: torch.Tensor) -> int:
    """Return the most different values that a row has."""
    return max(len(row.unique()) for row in values)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_settings_of_bits_reach_the_codes(exported, processes, bits):
    _, model, h = exported
    quantized_as = {
        "matrix_bits": "blocks.0.mlp.fc.lora.B",
        "embed_bits": "embedding.weight",
    }
    for setting, name in quantized_as.items():
        by_rms = {"quantizer": "rms", setting: bits}
        changed = train_gpt.load_settings({}, **h.as_dict() | by_rms)
        clip = {f"{setting.removesuffix('_bits')}_clip_sigmas": 1.0}  # so that all codes occur
        changed = train_gpt.load_settings({}, **changed.as_dict() | clip)
        _, tensors = train_gpt.read_artifact(export(changed, model, processes))
        assert levels(tensors[name]) == 2**bits - 1, name
        (other,) = quantized_as.keys() - {setting}
        assert levels(tensors[quantized_as[other]]) > 2**bits - 1, other


def test_the_setting_of_pruning_reaches_the_codes(exported, processes):
    _, model, h = exported
    h = train_gpt.load_settings({}, **h.as_dict() | {"quantizer": "rms"})
    changed = train_gpt.load_settings({}, **h.as_dict() | {"prune_pct": 0.5})
    _, before = train_gpt.read_artifact(export(h, model, processes))
    _, pruned = train_gpt.read_artifact(export(changed, model, processes))
    for name in ("blocks.0.mlp.fc.lora.B", "blocks.3.attention.q.lora.A", "bigram.proj.weight"):
        assert (before[name] == 0).double().mean() < 0.25, name
        assert (pruned[name] == 0).double().mean() >= 0.5, name
    assert torch.equal(pruned["embedding.weight"], before["embedding.weight"])


# ---- Artifact ------------------------------------------------------------------------------------


def sample_tensors() -> dict:
    torch.manual_seed(0)
    quantizer = train_gpt.Quantizer(6, 12.85)
    rows = torch.cat([torch.randn(5, 17), torch.zeros(1, 17), 1e-4 * torch.randn(2, 17)])
    return {
        "z.lora.A": quantizer.quantize(rows),
        "a.lora.A": quantizer.quantize(torch.randn(40, 3)),
        "a.lora.B": quantizer.quantize(torch.randn(3, 90)),
        "gain": torch.randn(4, 1),
        "table.weight": quantizer.quantize(torch.randn(60, 8)),
        "columns.weight": train_gpt.QuantizedTensor(
            torch.arange(-30, 30).view(10, 6).to(torch.int8),
            torch.tensor([150, 0, 160, 150, 161, 149, 160, 255, 1, 0], dtype=torch.uint8),
            torch.tensor([160, 170, 0, 150, 160, 1], dtype=torch.uint8),
        ),
        "one": torch.tensor([0.05]).half(),
        "point": torch.tensor(-2.5),
        "blocks.0.mix": torch.randn(33),
        "extreme": torch.tensor([6e-8, -65504.0, 0.0, -0.0]),
        "a.mask.scores": torch.randn(5, 7) > 0,
        "b.mask.scores": torch.randn(3, 8) > 0,
        "c.mask.scores": torch.randn(1, 3) > 0,  # one bit each, and no whole bytes of them
    }


@pytest.fixture(scope="module")
def sample() -> bytes:
    return train_gpt.write_artifact({"note": "é"}, sample_tensors())[0]


def test_artifacts_give_back_every_value(sample):
    header, tensors = train_gpt.read_artifact(sample)
    expected = sample_tensors()
    assert header["note"] == "é"
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        is_coded = isinstance(tensor, train_gpt.QuantizedTensor)
        exact = tensor.dequantize() if is_coded else tensor.half().float()
        assert tensors[name].dtype is torch.float32
        assert torch.equal(tensors[name], exact), name
        assert tensors[name].shape == exact.shape, name


def test_the_bytes_are_accounted_for_and_the_same_each_time(sample):
    """The sizes that a run reports per group are to add up to the file, to the byte."""
    blob, sizes = train_gpt.write_artifact({"note": "é"}, sample_tensors())
    assert blob == sample
    assert sum(sizes.values()) == len(blob)
    groups = {name for name in sizes if name != "header"}
    assert groups == {
        "A codes",
        "A exponents",
        "B codes",
        "B exponents",
        "weight codes",
        "weight exponents",
        "weight columns",
        "scores bits",
        "float16",
    }


def test_groups_are_byte_planes_packed_by_brotli():
    """Read by the documented layout."""
    torch.manual_seed(0)
    codes = torch.randn(30, 20).round().to(torch.int8)
    exponents = torch.randint(90, 99, (30,), dtype=torch.uint8)
    columns = torch.randint(150, 170, (20,), dtype=torch.uint8)
    halves = torch.randn(200)
    tensors = {"x.walk": train_gpt.QuantizedTensor(codes, exponents, columns), "x": halves}
    blob, _ = train_gpt.write_artifact({}, tensors)
    assert blob[:8] == b"RANDMAPS"
    version, size = np.frombuffer(blob[8:16], "<u4").tolist()
    assert version == train_gpt.ARTIFACT_VERSION
    place, raw = 16 + size, {}
    for name, lengths in json.loads(brotli.decompress(blob[16:place]))["groups"]:
        raw[name] = b""
        for length in lengths:
            raw[name] += brotli.decompress(blob[place : place + length])
            place += length
    assert place == len(blob) - 32
    pairs = np.frombuffer(halves.half().numpy().tobytes(), np.uint8).reshape(-1, 2)
    by_row = sorted(range(30), key=lambda i: exponents[i])
    by_column = sorted(range(20), key=lambda j: columns[j])
    assert raw == {
        "float16": pairs.T.tobytes(),
        "walk codes": codes.numpy()[np.ix_(by_row, by_column)].tobytes(),
        "walk exponents": exponents.numpy().tobytes(),
        "walk columns": columns.numpy().tobytes(),
    }


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_blocks_of_any_size_give_back_every_value(sample, monkeypatch, size):
    monkeypatch.setattr(train_gpt, "BLOCK_BYTES", size)
    blob, sizes = train_gpt.write_artifact({"note": "é"}, sample_tensors())
    assert sum(sizes.values()) == len(blob)
    expected = train_gpt.read_artifact(sample)[1]
    header, tensors = train_gpt.read_artifact(blob)
    blocks = [len(lengths) for _, lengths in header["groups"]]
    assert max(blocks) > 1 or size == 10_000
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_any_flipped_bit_is_noticed(sample):
    generator = random.Random(0)
    end = len(sample) - 40
    places = [*range(60), *generator.sample(range(60, end), 200), *range(end, len(sample))]
    for place in places:
        damaged = bytearray(sample)
        damaged[place] ^= 1 << generator.randrange(8)
        with pytest.raises(train_gpt.UserError):
            train_gpt.read_artifact(bytes(damaged))


def test_a_cut_or_lengthened_file_is_noticed(sample):
    for length in [*range(70), len(sample) // 2, len(sample) - 32, len(sample) - 1]:
        with pytest.raises(train_gpt.UserError):
            train_gpt.read_artifact(sample[:length])
    for extra in (b"\0", b"\n", sample):
        with pytest.raises(train_gpt.UserError):
            train_gpt.read_artifact(sample + extra)


def test_a_group_that_stands_twice_is_refused():
    """Else each of many mentions of a small file would be unpacked."""
    packed = brotli.compress(bytes(8))
    once = {"tensors": [["a", [4], ["float16"]]], "groups": [["float16", [len(packed)]]]}
    assert [name for name, _ in train_gpt.read_tensors(once, packed)] == ["a"]
    with pytest.raises(KeyError):
        dict(train_gpt.read_tensors(once | {"groups": 2 * once["groups"]}, 2 * packed))


def test_bytes_that_belong_to_no_group_are_refused():
    """Else an artifact could carry anything, and be larger than it says."""
    packed = brotli.compress(bytes(8))
    header = {"tensors": [["a", [4], ["float16"]]], "groups": [["float16", [len(packed)]]]}
    with pytest.raises(ValueError, match="the file has"):
        list(train_gpt.read_tensors(header, packed + b"more"))


def test_an_artifact_must_say_all_that_its_model_depends_on(exported, processes):
    """What it leaves out would be as the evaluator happens to have set it."""
    blob, _, h = exported
    header, tensors = train_gpt.read_artifact(blob)
    for name in ("logit_softcap", "xsa_last_n"):
        part = {key: value for key, value in header["model"].items() if key != name}
        other, _ = train_gpt.write_artifact(header | {"model": part}, tensors, 4)
        with pytest.raises(train_gpt.UserError, match="not those of one model"):
            train_gpt.model_from_artifact(h, other, processes)


def test_what_is_no_artifact_is_refused():
    torch.save({"weight": torch.zeros(3)}, checkpoint := io.BytesIO())
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as z:
        z.writestr("model", "x" * 100)
    for other in (b"", b"\0" * 500, b"hello\n" * 20, checkpoint.getvalue(), archive.getvalue()):
        with pytest.raises(train_gpt.UserError, match="not an artifact"):
            train_gpt.read_artifact(other)


def stored_model(h: train_gpt.Hyperparameters, **header) -> tuple[bytes, train_gpt.GPT]:
    torch.manual_seed(0)
    model = train_gpt.GPT(h)
    own = {"model": h.model_settings(), "fingerprint": model.fingerprint(), "tokenizer": ""}
    return train_gpt.write_artifact(own | header, dict(model.state_dict()))[0], model


def test_maps_that_come_out_different_are_refused_with_the_versions(settings, processes):
    """Trap 6: another stream of random numbers would mean garbage weights without a word."""
    h, other = settings(), settings(map_seed=54321)
    blob, model = stored_model(h, model=other.model_settings())
    with pytest.raises(train_gpt.UserError) as error:
        train_gpt.model_from_artifact(h, blob, processes)
    for told in (torch.__version__, np.__version__, model.fingerprint()[:8]):
        assert told in str(error.value)


def test_an_artifact_is_rebuilt_from_itself_whatever_the_environment_says(
    settings, monkeypatch, processes
):
    h = settings(num_layers=3, ve_layers="1", bigram_vocab_size=0)
    blob, model = stored_model(h)
    for name, value in {
        "NUM_LAYERS": "2",
        "MODEL_DIM": "64",
        "RANDOM_ADAPTER_SEED": "1",
        "MAP_BASIS": "gaussian",
        "SKIPS_ENABLED": "0",
        "LOGIT_SOFTCAP": "1",
        "QK_GAIN_INIT": "9",
    }.items():
        monkeypatch.setenv(name, value)
    again = train_gpt.model_from_artifact(settings(), blob, processes)
    assert again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        for (name, p), other in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(p.half().float(), other), name
            p.copy_(other)
        assert torch.equal(model.predict(tokens(1, 8)), again.predict(tokens(1, 8)))


# ---- Muon ----------------------------------------------------------------------------------------


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Take 5 steps of x <- 3.4445 x - 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x.

    By its singular values, in float64.
    """
    u, s, vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s * s).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ vt


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24), (1, 9), (9, 1)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    torch.manual_seed(0)
    g = torch.randn(3, *shape) * torch.tensor([1e-2, 1.0, 1e4])[:, None, None]
    result = train_gpt.orthogonalize(g, 5)
    for x, given in zip(result, g, strict=True):
        np.testing.assert_allclose(x.numpy(), newton_schulz(given.numpy()), rtol=0, atol=1e-4)
        if shape == (24, 24):  # it has singular values near zero, which 5 steps leave small
            continue
        singular = torch.linalg.svdvals(x)
        assert singular.min() > 0.65
        assert singular.max() < 1.25


def test_orthogonalize_of_nothing_is_nothing():
    """The gradient of B is zero while A is: no division by its norm."""
    assert torch.equal(train_gpt.orthogonalize(torch.zeros(2, 4, 6), 5), torch.zeros(2, 4, 6))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_muon_is_nesterov_momentum_orthogonalized_with_decoupled_decay(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    w, momentum = p.detach().double().numpy(), np.zeros(shape)
    optimizer = train_gpt.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.04)
    for _ in range(3):
        p.grad = torch.randn(shape)
        gradient = p.grad.double().numpy()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        update = newton_schulz(gradient + 0.9 * momentum)
        w = w * (1 - 0.1 * 0.04) - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * update
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=0, atol=1e-4)


def test_muon_in_batches_is_muon_one_by_one():
    """Matrices of one shape share a batch; one without a gradient is left alone."""
    torch.manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10), (5, 5), (6, 10)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [train_gpt.Muon(together)] + [train_gpt.Muon([p]) for p in alone]
    untouched = together[4].detach().clone()
    for _ in range(2):
        for p, other in zip(together[:4], alone[:4], strict=True):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, other in zip(together, alone, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-5)
    assert torch.equal(together[4], untouched)


def test_a_step_warms_momentum_up_and_scales_every_learning_rate(settings, random_model, processes):
    rates = {
        "matrix_lr": 0.02,
        "factor_lr": 0.03,
        "tied_embed_lr": 0.04,
        "scalar_lr": 0.05,
        "sparse_lr": 0.06,
        "mask_lr": 0.07,
    }
    h = settings(muon_momentum_warmup_steps=100, map_basis="orthogonal,mlp=learned", **rates)
    model = random_model(h)
    before = copy.deepcopy(model.state_dict())
    optimizers = train_gpt.Optimizers(train_gpt.tensors_by_role(model), h, processes)
    for step, momentum in ((0, 0.92), (50, 0.955), (100, 0.99), (1000, 0.99)):
        model(tokens(2, 16), tokens(2, 16, seed=1)).backward()
        optimizers.step(step, 0.0)
        for group in optimizers.muon.param_groups:
            assert group["momentum"] == pytest.approx(momentum)
        assert all(p.grad is None for p in model.parameters()), "the next step begins from nothing"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(tokens(2, 16), tokens(2, 16, seed=1)).backward()
    optimizers.step(1000, 0.5)
    rate_of = {p: group["lr"] for group in optimizers.param_groups for p in group["params"]}
    by_role = dict(zip(("matrix", "factor", "embedding", "scalar"), rates.values(), strict=False))
    for role, params in train_gpt.tensors_by_role(model).items():
        for name, p in params.items():
            assert rate_of[p] == pytest.approx(0.5 * by_role[role.value]), name
    idle = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert idle == []


# ---- Averages ------------------------------------------------------------------------------------


def averaged(h, history: list[torch.Tensor], lr_scales: list[float]) -> dict[str, torch.Tensor]:
    """Return the candidates of one parameter that had these values, by name."""
    p = torch.nn.Parameter(torch.zeros_like(history[0]))
    averages = train_gpt.WeightAverages([p], h)
    for step, (value, lr_scale) in enumerate(zip(history, lr_scales, strict=True)):
        with torch.no_grad():
            p.copy_(value)
        averages.update(step, lr_scale)
    return {name: values[0] for name, values in averages.candidates().items()}


@pytest.mark.parametrize("updates", [1, 2, 40])
def test_ema_is_the_closed_formula_without_a_pull_to_its_start(settings, updates):
    """Trap 4: divided by its total weight, so that after one update it is the weights."""
    torch.manual_seed(0)
    history, decay = [torch.randn(5, 3) for _ in range(updates)], 0.97
    ema = averaged(settings(ema_decay=decay), history, [1.0] * updates)["ema"]
    weights = [decay ** (updates - 1 - i) for i in range(updates)]
    weighted = [w * value.double() for w, value in zip(weights, history, strict=True)]
    torch.testing.assert_close(ema.double(), sum(weighted) / sum(weights), rtol=0, atol=1e-6)


def test_averages_of_constant_weights_are_the_weights(settings):
    """Adapters that start at zero must not be dragged back to it, however early the export."""
    value = torch.tensor([1.0, -3.0, 1e-6, 1e4])
    found = averaged(settings(ema_decay=0.997, swa_interval=1), [value] * 7, [0.1] * 7)
    assert set(found) == {"last", "ema", "swa"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, value, rtol=1e-6, atol=0, msg=name)


def test_swa_is_the_plain_mean_of_late_weights(settings):
    torch.manual_seed(0)
    history, lr_scales = [torch.randn(4) for _ in range(14)], [1.0] * 6 + [0.2] + [0.19] * 7
    found = averaged(settings(swa_interval=3, swa_threshold=0.2), history, lr_scales)
    torch.testing.assert_close(found["swa"], (history[9] + history[12]) / 2)
    assert torch.equal(found["last"], history[-1])


def test_averages_that_are_off_or_empty_are_no_candidates(settings):
    history = [torch.ones(2)] * 3
    assert set(averaged(settings(ema_decay=0.0, swa_enabled=0), history, [0.1] * 3)) == {"last"}
    assert set(averaged(settings(ema_decay=0.9), history, [1.0] * 3)) == {"last", "ema"}


def test_an_export_considers_the_averages_that_it_is_asked_for(settings):
    """EXPORT_ONLY with EMA_DECAY=0, of a checkpoint that has one."""
    p = torch.nn.Parameter(torch.ones(3))
    trained = train_gpt.WeightAverages([p], settings(ema_decay=0.9, swa_interval=1))
    trained.update(0, 0.1)
    for decay, expected in ((0.9, {"last", "ema", "swa"}), (0.0, {"last", "swa"})):
        averages = train_gpt.WeightAverages([p], settings(ema_decay=decay))
        averages.load_state_dict(trained.state_dict())
        assert set(averages.candidates()) == expected


def test_candidates_do_not_change_with_the_weights(settings):
    p = torch.nn.Parameter(torch.ones(3))
    averages = train_gpt.WeightAverages([p], settings(ema_decay=0.9, swa_interval=1))
    averages.update(0, 0.1)
    found = averages.candidates()
    with torch.no_grad():
        p.zero_()
    for name, values in found.items():
        torch.testing.assert_close(values[0], torch.ones(3), msg=name)


# ---- Schedule ------------------------------------------------------------------------------------


def took(clock: train_gpt.Clock, seconds: float) -> None:
    """Let the clock count a step of so many seconds."""
    clock.elapsed += seconds
    clock.add_step(seconds)


def scale_of(step: int, remaining: int, warmdown: int) -> float:
    """Return the learning-rate scale of a step under WARMDOWN_ITERS."""
    h = train_gpt.load_settings({}, warmdown_iters=warmdown)
    return train_gpt.learning_rate_scale(h, step, remaining, progress=0.0)


def simulate(clock: train_gpt.Clock, warmdown: float, seconds_of_step) -> list[float]:
    """Return the learning-rate scale of each step of a run whose steps take so long.

    A warm-down below 1 is a fraction of training.
    """
    name = "warmdown_frac" if 0 < warmdown < 1 else "warmdown_iters"
    h = train_gpt.load_settings({}, **{name: warmdown})
    scales = []
    while (remaining := clock.remaining(len(scales))) > 0:
        step = len(scales)
        progress = clock.progress(step)
        scales.append(train_gpt.learning_rate_scale(h, step, remaining, progress))
        took(clock, seconds_of_step(step))
    assert clock.remaining(len(scales)) == 0
    return scales


def test_a_run_limited_by_steps_warms_down_linearly():
    scales = simulate(train_gpt.Clock(100, 0), 30, lambda step: 1.0)
    assert scales == pytest.approx([1.0] * 70 + [k / 30 for k in range(30, 0, -1)])


@pytest.mark.parametrize("slow", [{}, {0: 33.0}, {150: 33.0}, {0: 33.0, 100: 10.0, 101: 10.0}])
def test_a_run_limited_by_time_warms_down_over_its_last_steps_slow_steps_or_not(slow):
    """Trap 1: a first step of 33 s made the published schedule believe that training was over."""
    clock = train_gpt.Clock(20_000, 100.0)
    scales = simulate(clock, 300, lambda step: slow.get(step, 0.1))
    fast = round((100 - sum(slow.values())) / 0.1)
    assert abs(len(scales) - len(slow) - fast) <= 2
    assert scales.count(1.0) == pytest.approx(len(scales) - 300, abs=2)
    assert scales[-1] <= 2 / 300
    assert all(later <= earlier for earlier, later in itertools.pairwise(scales))
    assert clock.elapsed <= 100.0 + 0.1


def test_a_slow_step_costs_its_time_and_no_more():
    clock = train_gpt.Clock(20_000, 555.0)
    for _ in range(50):
        took(clock, 0.1)
    before = clock.remaining(50)
    took(clock, 33.0)
    lost = before - clock.remaining(51)
    assert 330 <= lost <= 332


def test_the_schedule_follows_a_machine_that_becomes_slower():
    clock = train_gpt.Clock(20_000, 100.0)
    for seconds in [0.1] * 300 + [0.2] * 100:
        took(clock, seconds)
    assert clock.remaining(400) == pytest.approx(50 / 0.2, abs=1)


def test_one_slow_first_step_does_not_start_the_warm_down():
    clock = train_gpt.Clock(20_000, 555.0)
    took(clock, 33.0)
    assert scale_of(1, clock.remaining(1), 3500) == 1.0
    for step in range(2, 20):
        took(clock, 0.1)
        assert scale_of(step, clock.remaining(step), 3500) == 1.0
    assert clock.remaining(20) == pytest.approx((555 - 34.8) / 0.1, abs=2)


@pytest.mark.parametrize("seconds", [0, 0.0, -45.0])
def test_no_wall_clock_is_no_limit(seconds):
    """MAX_WALLCLOCK_SECONDS=0, from which the reserve for the export has been taken."""
    clock = train_gpt.Clock(10, seconds)
    for step in range(10):
        assert clock.remaining(step) == 10 - step
        assert clock.progress(step) == step / 10
        took(clock, 1e6)
    assert clock.remaining(10) == 0


def test_progress_is_by_steps_or_by_the_clock_whichever_is_further():
    """A run that its time limit will end must not wait for a fraction of its steps."""
    clock = train_gpt.Clock(1000, 100.0)
    for step in range(400):
        assert clock.progress(step) == pytest.approx(step / 400)  # time is over after 400 steps
        took(clock, 0.25)
    assert clock.progress(400) == 1.0
    took(clock, 50.0)
    assert clock.progress(401) == 1.0, "it never goes past the end"
    quick = train_gpt.Clock(1000, 100.0)
    took(quick, 1.0)
    assert quick.progress(500) == 0.5


def test_the_clock_counts_training_and_not_what_it_is_paused_for(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = train_gpt.Clock(100, 60.0)
    now[0] += 500  # it is made long before training starts
    clock.start()
    for _ in range(6):
        now[0] += 2
        clock.add_step(clock.lap())
    assert clock.elapsed == 12
    assert clock.remaining(6) == 24
    now[0] += 1
    with clock.paused():
        now[0] += 1000
    now[0] += 1
    clock.add_step(clock.lap())
    assert clock.elapsed == 14
    assert clock.progress(7) == pytest.approx(14 / 60)
    continued = train_gpt.Clock(100, 60.0)
    continued.load_state_dict(clock.state_dict())
    continued.start()
    assert continued.elapsed == 14
    assert continued.remaining(7) == clock.remaining(7)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    iterations=st.integers(1, 60),
    seconds=st.floats(0.01, 100),
    warmdown=st.integers(0, 100),
    times=st.lists(st.floats(1e-4, 50), min_size=60, max_size=60),
)
def test_the_schedule_stays_in_its_bounds(iterations, seconds, warmdown, times):
    clock = train_gpt.Clock(iterations, seconds)
    scales = simulate(clock, warmdown, times.__getitem__)
    assert 1 <= len(scales) <= iterations
    assert all(0 < scale <= 1 for scale in scales)
    assert clock.elapsed - times[len(scales) - 1] < seconds, "no step begins after the time is up"
    assert clock.remaining(len(scales)) >= 0


@pytest.mark.parametrize(
    ("step", "remaining", "warmdown", "scale"),
    [
        (0, 1000, 300, 1.0),
        (700, 300, 300, 1.0),
        (850, 150, 300, 0.5),
        (999, 1, 300, 1 / 300),
        (0, 20, 3500, 1.0),
        (10, 10, 3500, 0.5),
        (19, 1, 3500, 0.05),
        (5, 1, 0, 1.0),
        (9, 0, 300, 0.0),
    ],
)
def test_the_scale_is_one_until_the_warm_down_and_then_linear(step, remaining, warmdown, scale):
    """A run shorter than WARMDOWN_ITERS warms down over the whole of it."""
    assert scale_of(step, remaining, warmdown) == pytest.approx(scale)


@pytest.mark.parametrize("warmdown", [{"warmdown_iters": 10}, {"warmdown_frac": 0.5}])
def test_the_scale_does_not_fall_below_the_least_one(warmdown):
    h = train_gpt.load_settings({}, min_lr=0.3, **warmdown)
    scales = [train_gpt.learning_rate_scale(h, 20 - n, n, 1 - n / 20) for n in (20, 5, 4, 2, 1, 0)]
    assert scales == pytest.approx([1.0, 0.5, 0.4, 0.3, 0.3, 0.3])


def test_a_warm_down_by_a_fraction_of_training_follows_the_progress():
    h = train_gpt.load_settings({}, warmdown_frac=0.5)
    for progress, scale in ((0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (0.9, 0.2), (1.0, 0.0)):
        found = train_gpt.learning_rate_scale(h, step=3, remaining=7, progress=progress)
        assert found == pytest.approx(scale)


def test_a_warm_down_given_twice_is_refused_and_one_of_an_artifact_is_not():
    """Settings of an artifact or a checkpoint come back with all their defaults."""
    h = train_gpt.load_settings({}, warmdown_frac=0.5)
    assert train_gpt.load_settings({}, **h.as_dict()) == h
    with pytest.raises(train_gpt.UserError, match="WARMDOWN_ITERS has no effect"):
        train_gpt.load_settings({}, warmdown_frac=0.5, warmdown_iters=10)


@pytest.mark.parametrize("steps", [180, 74])
def test_a_warm_down_by_a_fraction_keeps_its_shape_on_a_slow_machine(steps):
    clock = train_gpt.Clock(iterations=180, seconds=150)
    scales = simulate(clock, 0.667, lambda step: 150 / steps)
    assert abs(len(scales) - steps) <= 1
    assert scales[: steps // 3] == [1.0] * (steps // 3)
    assert scales[2 * steps // 3] == pytest.approx(0.5, abs=0.02)
    assert scales[-1] <= 2 / steps / 0.667


def test_two_lengths_of_the_warm_down_are_an_error():
    with pytest.raises(train_gpt.UserError, match=r"WARMDOWN_FRAC=0\.667; unset one"):
        train_gpt.load_settings({"WARMDOWN_ITERS": "400", "WARMDOWN_FRAC": "0.667"})
    train_gpt.load_settings({"WARMDOWN_ITERS": "400", "WARMDOWN_FRAC": "0"})
