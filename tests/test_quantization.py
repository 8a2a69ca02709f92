"""Quantization and the artifact: from the weights to the bytes of a file, and back to a model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from types import SimpleNamespace

import brotli
import numpy as np
import pytest
import torch

import train_gpt
from helpers import KeptLog, head_input, tiny_settings
from reference import artifact_groups, normal, tokens

Role = train_gpt.Role
QUANTIZERS = {
    "matrix": train_gpt.Quantizer(6, 12.85),
    "embedding": train_gpt.Quantizer(8, 20.0),
    "2-bit": train_gpt.Quantizer(2, 2.0),
    "pruned": train_gpt.Quantizer(8, 4.0, prune_fraction=0.3),
}
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


def quantize(quantizer, w, hessian=None) -> train_gpt.QuantizedTensor:
    return quantizer.quantize([(w, hessian)])[0]


def as_read(value: train_gpt.QuantizedTensor | torch.Tensor) -> torch.Tensor:
    """Return the values of a tensor that an artifact gives back."""
    is_coded = isinstance(value, train_gpt.QuantizedTensor)
    return value.dequantize() if is_coded else value.half().float()


def correlated_inputs(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Return (n, dim) float64 inputs as layers see them.

    They have few strong directions, a mean, and channels of unlike size.
    """
    torch.manual_seed(seed)
    directions = torch.randn(n, dim // 4) @ torch.randn(dim // 4, dim)
    x = directions + 0.3 * torch.randn(n, dim) + torch.randn(dim)
    return (x * torch.rand(dim).exp()).double()


def awkward_rows() -> torch.Tensor:
    """Return rows too small for the smallest scale, too large for the largest, and zeros."""
    sizes = torch.tensor([1e-12, 1e-7, 1e-3, 1.0, 1e3, 1e8, 1.0, 1.0, 1.0])
    w = normal(9, 40).float() * sizes[:, None]
    w[6], w[7, 1:], w[8, 5] = 0.0, 0.0, 1e4
    return w


# ---- Rounding ------------------------------------------------------------------------------------


def tied(quantizer: train_gpt.Quantizer) -> torch.Tensor:
    """Return a matrix of which some values lie in the middle between two codes."""
    w = normal(64, 512).float()
    scales = train_gpt.scales_of(quantizer.exponents(w))[:, None]
    middle = (((w / scales).floor() + 0.5) * scales).float()
    return torch.where(torch.arange(512) % 8 == 0, middle, w)


@each_quantizer
def test_codes_without_a_hessian_are_the_nearest(quantizer):
    """Multiples of the row's scale, within the codes that there are; what is pruned is zero.

    A row's scale is that of the whole row, of which the smallest values are dropped after.
    """
    shapes = (64, 48), (5, 1), (1, 300)
    for w in [awkward_rows(), tied(quantizer), *(normal(*shape).float() for shape in shapes)]:
        found = quantize(quantizer, w)
        scales = train_gpt.scales_of(found.exponents)[:, None].numpy()
        largest = 2 ** (quantizer.bits - 1) - 1
        codes = np.clip(np.rint(w.double().numpy() / np.maximum(scales, 1e-30)), -largest, largest)
        codes *= (quantizer.prune(w) != 0).numpy()  # a tie goes to the even code
        assert (found.codes.dtype, found.exponents.dtype) == (torch.int8, torch.uint8)
        assert np.array_equal(found.codes.numpy(), codes)
        assert np.array_equal(found.dequantize().numpy(), (codes * scales).astype(np.float32))


@each_quantizer
def test_the_largest_code_stands_for_so_many_root_mean_squares(quantizer):
    """Scales are powers of 2^(1/8), so the span is right to 2^(1/16)."""
    w = normal(50, 60) * torch.logspace(-3, 3, 50)[:, None]
    span = train_gpt.scales_of(quantizer.exponents(w)) * (2 ** (quantizer.bits - 1) - 1)
    wanted = quantizer.clip_sigmas * w.square().mean(1).sqrt()
    assert (span / wanted).log2().abs().max() <= 1 / 16 + 1e-9


def test_an_exponent_is_an_eighth_of_an_octave_and_zero_is_a_zero_row():
    exponents = torch.tensor([0, 1, 152, 160, 168, 255], dtype=torch.uint8)
    expected = [0, 2 ** (-159 / 8), 0.5, 1, 2, 2 ** (95 / 8)]
    assert train_gpt.scales_of(exponents).tolist() == pytest.approx(expected, rel=1e-15)


def test_rows_of_unlike_scale_do_not_touch_each_other():
    quantizer, w = QUANTIZERS["matrix"], awkward_rows()
    x = correlated_inputs(200, 40)
    for hessian in (None, x.T @ x):
        together = quantize(quantizer, w, hessian)
        alone = [quantize(quantizer, row[None], hessian) for row in w]
        assert torch.equal(together.codes, torch.cat([c.codes for c in alone]))
        assert torch.equal(together.exponents, torch.cat([c.exponents for c in alone]))
        assert (together.exponents == 0).tolist() == [i == 6 for i in range(9)]
        assert together.dequantize().isfinite().all()


# ---- GPTQ ----------------------------------------------------------------------------------------


def plain_gptq(
    w: torch.Tensor,
    hessian: torch.Tensor,
    quantizer: train_gpt.Quantizer,
    scales: torch.Tensor,
    column_scales: torch.Tensor,
) -> torch.Tensor:
    """Return the codes by GPTQ's definition: after each column, the best change of those after it.

    Every inverse is computed anew.
    """
    kept, w = quantizer.prune(w) != 0, w.detach().double().clone()
    columns = w.shape[1]
    damped = hessian.double() + torch.eye(columns) * (0.01 * hessian.trace() / columns + 1e-12)
    codes = torch.zeros_like(w)
    for j in range(columns):
        inverse = torch.linalg.inv(damped[j:, j:])
        steps = scales * column_scales[j]
        nearest = (w[:, j] / steps).round().clamp(-quantizer.largest, quantizer.largest)
        codes[:, j] = nearest * kept[:, j]
        error = w[:, j] - codes[:, j] * steps
        w[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0]
    return codes


@each_quantizer
@pytest.mark.parametrize("shape", [(20, 1), (1, 33), (20, 270)])
def test_gptq_is_the_definition_computed_plainly(quantizer, shape):
    x = correlated_inputs(600, max(shape[1], 4))[:, : shape[1]]
    w, hessian = normal(*shape).float(), x.T @ x
    before = w.clone(), hessian.clone()
    found = quantize(quantizer, w, hessian)
    scales = train_gpt.scales_of(found.exponents)
    expected = plain_gptq(w, hessian, quantizer, scales, torch.ones(shape[1]))
    assert torch.equal(found.codes.double(), expected)
    assert torch.equal(found.exponents, quantize(quantizer, w).exponents)
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.5, 0.99])
def test_pruning_zeroes_that_fraction_of_the_smallest(fraction):
    w, x = normal(40, 50).float(), correlated_inputs(400, 50)
    smallest = w.abs().flatten().argsort()[: round(w.numel() * fraction)]
    quantizer = train_gpt.Quantizer(8, 4.0, fraction)
    assert quantize(quantizer, w, x.T @ x).codes.flatten()[smallest].abs().sum() == 0


# ---- Calibration ---------------------------------------------------------------------------------


def test_hessians_are_the_sums_of_products_of_the_inputs(
    settings, random_model, processes, monkeypatch
):
    """Of every map, also where maps share an input or a matrix, and of the head."""
    h = settings(map_basis="learned,attention=orthogonal,mlp=shared,mlp.fc=shared:3")
    model, batches = random_model(h, torch.float64), [tokens(3, 16), tokens(2, 16, seed=1)]
    hessians, expected = train_gpt.collect_hessians(model, iter(batches), processes), {}
    fused_linear = train_gpt.fused_linear

    def watched(x, maps, *given):
        for each in maps:
            gram = x.flatten(0, -2).T @ x.flatten(0, -2)
            owner = each.shared_matrices[0] if each.shared_matrices else each
            if each.shared_mix is not None:  # of a matrix, a layer has c² of its error
                gram = each.shared_mix.square()[:, None, None] * gram
            expected[owner] = expected.get(owner, 0) + gram
        return fused_linear(x, maps, *given)

    monkeypatch.setattr(train_gpt, "fused_linear", watched)
    x = torch.cat([head_input(model, ids).flatten(0, 1) for ids in batches])
    expected[model.embedding] = x.T @ x
    for module, gram in expected.items():
        found = hessians[module].double().view_as(gram)
        # A float32 sum of so many products is as near as its arithmetic lets it be.
        assert (found - gram).abs().max() <= 4 * 5 * 16 * 2**-24 * gram.max(), module
    for block in model.blocks:  # an adapter sees what its map does
        assert hessians[block.attention.k.lora] is hessians[block.attention.q]
    assert model.bigram not in hessians, "it is only looked up"


def test_hessians_of_bfloat16_activations_are_exact_and_can_be_used(settings, processes):
    """Products may be multiplied as bfloat16, but not rounded to it, and nothing else from then on.

    A Hessian of inputs with a strong mean would have negative eigenvalues, and end the export.
    """
    h = settings(num_layers=1, model_dim=128, bigram_vocab_size=0, ve_enabled=0, smear_enabled=0)
    torch.manual_seed(0)
    model, seen = train_gpt.GPT(h, torch.bfloat16), []
    with torch.no_grad():
        model.embedding.weight.copy_(1 + 0.05 * torch.randn(64, 128))
    proj = model.blocks[0].mlp.proj
    proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2).double()))
    hessians = train_gpt.collect_hessians(model, [tokens(64, 16)], processes)
    expected = seen[0].T @ seen[0]
    assert (hessians[proj] - expected).abs().max() <= len(seen[0]) * 2**-24 * expected.max()
    assert torch.get_float32_matmul_precision() == "highest"
    for hessian in hessians.values():
        assert torch.linalg.eigvalsh(hessian.double())[0] > -1e-3 * hessian.diagonal().mean()
    train_gpt.quantize_model(model, train_gpt.make_quantizers(h), hessians)


def test_calibration_leaves_no_trace_and_takes_every_table_by_its_own_gradients(
    data_settings, random_model, processes
):
    """Also where maps are frozen: what is stored of them is quantized, too."""
    model, batches, text = random_model(data_settings()), [tokens(2, 16)], tokens(8, 16)
    model.blocks[0].mlp.fc.set_frozen(True)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    calibration = train_gpt.calibrate(data_settings(), model, processes, batches, text)
    rows, tables = train_gpt.collect_sensitivities(model, batches, text, processes)
    assert rows[model.blocks[0].mlp.fc.lora.B].min() > 0
    assert rows[model.embedding.weight].min() > 0, "also what the text does not show"
    assert set(tables) == {model.embedding, model.bigram, model.value_embedding}
    for module, hessian in tables.items():
        torch.testing.assert_close(calibration.hessians[module], hessian)
    assert not model.blocks[0].mlp.fc.lora.B.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_factor_pair_is_quantized_each_against_its_own_inputs():
    """B sees x; A sees x B̂ᵀ, with the B̂ that the artifact holds."""
    torch.manual_seed(0)
    layer = train_gpt.FrozenRandomLinearWithLoRA(40, 300, rank=8)
    with torch.no_grad():
        layer.lora_A.normal_()
    quantizer = train_gpt.Quantizer(4, 3.0)
    quantizers = {Role.FACTOR: quantizer, Role.MATRIX: None, Role.EMBEDDING: None}
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    x = correlated_inputs(4000, 40)
    hessian = (x.T @ x).float()
    stored = train_gpt.quantize_model(layer, quantizers, dict.fromkeys(layer.modules(), hessian))
    assert stored.keys() == {"lora.A", "lora.B"}, "the map itself is not stored"
    b_codes = quantize(quantizer, b, hessian)
    assert torch.equal(stored["lora.B"].codes, b_codes.codes)
    b_stored = b_codes.dequantize().double()
    a_codes = quantize(quantizer, a, b_stored @ hessian.double() @ b_stored.T)
    assert torch.equal(stored["lora.A"].codes, a_codes.codes)


# ---- Scales by sensitivity -----------------------------------------------------------------------


def test_sensitivities_are_the_fisher_information(processes):
    """E[g²] over every position and label, as likely as the model says, for each row of values.

    The estimate draws labels; many batches come near to the sum over all labels.
    """
    sizes = {"num_layers": 1, "vocab_size": 16, "model_dim": 16, "bigram_vocab_size": 8}
    torch.manual_seed(0)
    model = train_gpt.GPT(tiny_settings(**sizes, map_adapter="lora:2"), torch.float64).double()
    with torch.no_grad():  # sure of some predictions
        for p in model.parameters():
            p.normal_(std=0.4) if p.ndim > 1 else p
    ids = tokens(4, 8) % 16
    rows, _ = train_gpt.collect_sensitivities(model, [ids] * 100, ids, processes)
    parameters = [model.embedding.weight, model.bigram.proj.weight]
    parameters += [model.blocks[0].mlp.fc.lora.A, model.blocks[0].attention.v.lora.B]
    by_hand = [0.0] * 4
    for log in model.predict(ids).double().log_softmax(-1).flatten():
        gradients = torch.autograd.grad(log, parameters, retain_graph=True)
        squares = [log.exp().item() * g.square().mean(1) / ids.numel() for g in gradients]
        by_hand = [total + square for total, square in zip(by_hand, squares, strict=True)]
    # Rows of a table matter as often as they are read.
    counts = ids.flatten().bincount(minlength=16) + 1.0
    by_hand[0] = by_hand[0].sum() * counts / counts.sum()
    for p, expected in zip(parameters, by_hand, strict=True):
        assert (rows[p] - expected).norm() < 0.15 * expected.norm()


def test_rows_of_a_table_matter_as_often_as_text_reads_them(data_settings, random_model, processes):
    """Text that the gradients do not see counts; pairs count in the rows that they share."""
    model, text = random_model(data_settings()), tokens(400, 16)
    text[:, ::2] = 7
    rows, _ = train_gpt.collect_sensitivities(model, [tokens(2, 16)], text, processes)
    for table, selected in ((model.embedding, text), (model.bigram, model.bigram.rows_of(text))):
        counts = selected.flatten().bincount(minlength=len(table.weight)) + 1.0
        found = rows[table.weight] / rows[table.weight].sum()
        torch.testing.assert_close(found, (counts / counts.sum()).double())


def by_sensitivity(p, sensitivity, loss=1e-6) -> train_gpt.SensitivityQuantizer:
    return train_gpt.SensitivityQuantizer(sensitivities={p: sensitivity}, loss_per_value=loss)


def parameter(*shape: int) -> torch.nn.Parameter:
    """Return normal values in rows of unlike size."""
    return torch.nn.Parameter(normal(*shape).float() * torch.logspace(-2, 1, shape[0])[:, None])


def test_a_row_that_matters_more_gets_a_finer_scale_until_it_costs_the_same():
    w = torch.nn.Parameter(normal(30, 400).float())
    sensitivity, loss = torch.logspace(-3, 1, 30).double(), 1e-3
    codes = quantize(by_sensitivity(w, sensitivity, loss), w)
    assert (codes.exponents.int().diff() <= 0).all()
    scales = train_gpt.scales_of(codes.exponents)
    assert (sensitivity * scales.square() / 32 / loss).log2().abs().max() < 0.25
    cost = (codes.dequantize() - w).detach().double().square().mean(1) * sensitivity / 2
    assert (cost[15:] / loss - 1).abs().max() < 0.3, "the mean squared error is s²/16"


def test_rows_that_nothing_depends_on_and_rows_of_zeros_have_codes():
    w = torch.nn.Parameter(parameter(4, 50).detach() * torch.tensor([1, 0, 1, 1])[:, None])
    for values in (torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0])):
        codes = quantize(by_sensitivity(w, values.double()), w)
        assert codes.exponents[1] == 0
        assert codes.dequantize().isfinite().all()


@pytest.fixture
def no_trellis(monkeypatch):
    monkeypatch.setattr(train_gpt.SensitivityQuantizer, "STATES", 1)
    monkeypatch.setattr(train_gpt.SensitivityQuantizer, "DEAD_ZONE", 0.0)


def test_columns_that_matter_less_get_coarser_scales(no_trellis):
    """Without a trellis the codes are those of GPTQ's definition at these scales."""
    w, sensitivity = parameter(40, 60), normal(40).square()
    x = correlated_inputs(300, 60) * torch.logspace(-1, 1, 60)
    hessian = x.T @ x
    quantizer = by_sensitivity(w, sensitivity, 1e-4)
    found = quantize(quantizer, w, hessian)
    scales, column_scales = map(train_gpt.scales_of, (found.exponents, found.column_exponents))
    assert column_scales[:20].log2().mean() > column_scales[40:].log2().mean() + 1
    expected = plain_gptq(w, hessian, quantizer, scales, column_scales)
    assert torch.equal(found.codes.double(), expected)
    values = (expected * scales[:, None] * column_scales).float()
    torch.testing.assert_close(found.dequantize(), values)


def test_scales_of_columns_save_bytes_at_the_same_cost(monkeypatch):
    """Rows matter unlike, so that the steps between scales make no difference on average."""
    w, sensitivity = torch.nn.Parameter(normal(200, 60).float()), torch.logspace(0, 1, 200).double()
    x = correlated_inputs(2000, 60) * torch.logspace(-1, 1, 60)

    def cost_and_bytes() -> tuple[float, float]:
        codes = quantize(by_sensitivity(w, sensitivity, 1e-3), w, x.T @ x)
        errors = (x @ (codes.dequantize() - w).detach().double().T).square().sum(0)
        return (sensitivity * errors).sum().item(), train_gpt.entropy_bytes(codes.codes)

    cost, size = cost_and_bytes()
    monkeypatch.setattr(
        train_gpt.SensitivityQuantizer, "column_exponents", train_gpt.Quantizer.column_exponents
    )
    other_cost, larger_size = cost_and_bytes()
    assert size < 0.95 * larger_size
    assert cost < 1.05 * other_cost


# The next state after an even code and after an odd one, by state, as docs/artifact.md has it.
TRELLIS = [(0, 2), (5, 7), (1, 3), (4, 6), (2, 0), (7, 5), (3, 1), (6, 4)]


def level(code: int, state: int) -> float:
    return code - np.sign(code) * (state % 2) / 2


def cheapest_path(w: np.ndarray, dead_zone: float) -> float:
    """Return the least cost of codes for one row, by trying every sequence of parities."""
    least = np.inf
    for parities in itertools.product((0, 1), repeat=len(w)):
        state, cost = 0, 0.0
        for value, parity in zip(w, parities, strict=True):
            codes = [c for c in range(-9, 10) if c % 2 == parity]
            cost += min((value - level(c, state)) ** 2 + 2 * dead_zone * abs(c) for c in codes)
            state = TRELLIS[state][parity]
        least = min(least, cost)
    return least


def test_codes_are_the_cheapest_path_through_the_trellis():
    """Where columns do not depend on each other, and rows are no longer than the window."""
    w = torch.nn.Parameter(normal(32, 8).float())
    quantizer = by_sensitivity(w, torch.ones(32).double(), 1 / 32)
    found = quantize(quantizer, w)
    in_scales = (w.detach() / train_gpt.scales_of(found.exponents)[:, None]).numpy()
    for row, codes, values in zip(in_scales, found.codes.tolist(), found.levels(), strict=True):
        state, cost = 0, 0.0
        for value, code, stored in zip(row, codes, values.tolist(), strict=True):
            assert stored == level(code, state)
            cost += (value - stored) ** 2 + 2 * quantizer.DEAD_ZONE * abs(code)
            state = TRELLIS[state][code % 2]
        assert cost == pytest.approx(cheapest_path(row, quantizer.DEAD_ZONE))


def test_a_value_of_zero_may_have_a_code_that_is_not():
    """An odd code leads elsewhere; its error counts, though the value has no sign."""
    w = 2 * normal(1, 64, 60)
    w[..., ::3] = 1e-50  # 0 in float32
    quantizer = train_gpt.SensitivityQuantizer()
    codes = quantizer._gptq(w, torch.ones_like(w).bool(), torch.eye(60).double()[None])[0]
    states = train_gpt.TRELLIS_STATES
    found = train_gpt.QuantizedTensor(codes, torch.zeros(64), states=states).levels()
    assert codes[:, ::3].any()
    assert (found - w[0]).abs().max() <= 1 + quantizer.DEAD_ZONE, "levels of a parity are 2 apart"


def test_a_trellis_costs_less_at_equal_bytes(request):
    """By 0.1 bits a value and more; theory allows a quarter."""
    w, x = torch.nn.Parameter(normal(100, 120).float()), normal(2000, 120)

    def bits_at_a_cost() -> float:
        """Return bits a value plus half the log2 of the error: nearly the same at every scale."""
        codes = quantize(by_sensitivity(w, torch.ones(100).double(), 1e-3), w, x.T @ x)
        errors = (x @ (codes.dequantize() - w).detach().double().T).square().mean()
        return 8 * train_gpt.entropy_bytes(codes.codes) / w.numel() + errors.log2().item() / 2

    with_trellis = bits_at_a_cost()
    request.getfixturevalue("no_trellis")
    assert with_trellis < bits_at_a_cost() - 0.1


def test_more_loss_per_value_takes_fewer_bytes_and_little_takes_all_codes():
    w, x = torch.nn.Parameter(normal(60, 80).float()), correlated_inputs(1000, 80)
    sizes, costs = [], []
    for loss in (1e-12, 1e-4, 1e-3, 1e-2, 1e-1):
        codes = quantize(by_sensitivity(w, torch.ones(60).double(), loss), w, x.T @ x)
        errors = (codes.dequantize() - w).detach()
        sizes.append(train_gpt.entropy_bytes(codes.codes))
        costs.append((x @ errors.double().T).square().sum().item())
        if loss == 1e-12:  # nothing is clipped, whatever GPTQ adds
            assert 100 <= codes.codes.abs().max() <= 127
    assert sizes == sorted(sizes, reverse=True)
    assert costs == sorted(costs)


def test_columns_have_no_scales_where_these_would_not_pay():
    """In a matrix of few rows, with columns that matter alike, and by root mean squares."""
    x = correlated_inputs(300, 60) * torch.logspace(-1, 1, 60)
    cases = (2, x.T @ x, False), (40, torch.eye(60), False), (40, x.T @ x, True)
    for rows, hessian, pays in cases:
        w = parameter(rows, 60)
        codes = quantize(by_sensitivity(w, torch.ones(rows).double()), w, hessian)
        assert (codes.column_exponents is not None) == pays
        assert quantize(QUANTIZERS["matrix"], w, hessian).column_exponents is None


def test_rows_that_matter_alike_take_the_next_scale_one_by_one():
    w, sums = parameter(64, 8), []
    for loss in np.logspace(-3, -2.9, 9):
        quantizer = by_sensitivity(w, torch.ones(64).double(), loss)
        sums.append(quantizer.exponents(w).sum().item())
    assert all(0 < step < 32 for step in np.diff(sums))


# ---- TARGET_BYTES --------------------------------------------------------------------------------


def packed_at(loss: float, bits: int = 0, jump: int = 0) -> train_gpt.Artifact:
    """Return an artifact of half a bit less per value at twice the loss, not below 100 bytes.

    It takes `jump` bytes more if rounding costs less than 1e-8.
    """
    codes = max(100, round(4000 - 500 * np.log2(loss / 1e-8))) + jump * (loss < 1e-8)
    sizes = {"weight codes": codes, "mask bits": bits}
    values = torch.zeros(80, 100, dtype=torch.int8)
    tensors = {"weight": train_gpt.QuantizedTensor(values, torch.zeros(80, dtype=torch.uint8))}
    return train_gpt.Artifact(b"0" * (codes + bits), sizes, tensors, loss)


@pytest.mark.parametrize(
    ("target", "begin"), [(999, 1e-8), (9000, 1e-8), (4000, 1e-9), (4155, 0.999e-8), (4010, 1e-7)]
)
@pytest.mark.parametrize(("bits", "jump"), [(0, 0), (20_000, 0), (0, 150)])
def test_the_solver_lands_within_half_a_percent_under_the_target(target, begin, bits, jump):
    """Beside bits that no scale changes, and beside a jump of the bytes."""
    calls = []
    packed = train_gpt.solve_for_bytes(
        lambda loss: calls.append(loss) or packed_at(loss, bits, jump), target + bits, begin
    )
    assert 0.995 * (target + bits) <= len(packed.blob) <= target + bits
    assert jump or len(calls) <= 4


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


def test_target_bytes_are_met_by_an_export_or_refused(exported, processes):
    _, model, h = exported
    at_default = train_gpt.code_bytes() + len(export(h, model, processes))
    for target in (at_default - 1000, at_default + 3000):
        changed = dataclasses.replace(h, target_bytes=target)
        size = len(export(changed, model, processes))
        assert 0.995 * target <= train_gpt.code_bytes() + size <= target
        train_gpt.check_size(changed, size)
        with pytest.raises(train_gpt.UserError, match=f"over TARGET_BYTES={target:,} at any"):
            train_gpt.check_size(changed, target - train_gpt.code_bytes() + 1)


@pytest.mark.parametrize("quantizer", ["rms", "sensitivity"])
def test_the_fraction_of_the_smallest_values_is_not_stored(exported, processes, quantizer):
    """PRUNE_PCT, of every matrix of an export by either quantizer."""
    _, model, h = exported
    zeros = []
    for fraction in (0.0, 0.6):
        changed = dataclasses.replace(h, quantizer=quantizer, prune_pct=fraction)
        _, tensors = train_gpt.read_artifact(export(changed, model, processes))
        zeros.append((tensors["blocks.0.mlp.fc.lora.B"] == 0).double().mean().item())
    assert zeros[0] < 0.4
    assert zeros[1] > 0.55


# ---- Late quantization-aware training ------------------------------------------------------------


def test_weights_are_as_stored_within_and_their_own_after(settings, random_model):
    """Also after a step that fails."""
    h = settings()
    model = random_model(h)
    groups, quantizers = train_gpt.tensors_by_role(model), train_gpt.make_quantizers(h)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), train_gpt.weights_as_stored(groups, quantizers):
        for role in (Role.MATRIX, Role.FACTOR, Role.EMBEDDING):
            for name, p in groups[role].items():
                stored = quantize(quantizers[role], before[name]).dequantize()
                assert torch.equal(p, stored), name
                assert not torch.equal(p, before[name]), name
        for name, p in groups[Role.SCALAR].items():
            assert torch.equal(p, before[name]), name
        raise KeyboardInterrupt
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.data_ptr() == places[name], name


# ---- What is quantized ---------------------------------------------------------------------------


def test_every_matrix_adapter_and_embedding_is_quantized(exported):
    """Adapters are the payload, and none may slip through to float16."""
    blob, model, h = exported
    header, tensors = train_gpt.read_artifact(blob)
    groups = {name: kinds for name, _, kinds in header["tensors"]}
    learned = dict(model.named_parameters())
    assert set(groups) == set(tensors) == set(learned)
    for name, p in learned.items():
        expected = p.ndim == 2 and not name.endswith(("skip_weights", "q_gain"))
        assert (groups[name] != ["float16"]) == expected, name
        assert tensors[name].shape == p.shape, name
    assert sum(".lora." in name for name in groups) == 2 * 6 * h.num_layers


def test_the_artifact_predicts_what_the_model_does(exported, settings, processes):
    """From the bytes alone; 6 and 8 bits cost some accuracy, and no more.

    Its table of angles is as long as this run's windows: no forward pass computes it anew.
    """
    blob, model, _ = exported
    again = train_gpt.model_from_artifact(settings(eval_seq_len=4096), blob, processes)
    ids = tokens(8, 16)
    with torch.no_grad():
        exact, stored = (m.predict(ids) for m in (model, again))
        again.rotary = None  # what would compute it
        again.predict(tokens(1, 4096))
    assert 0 < (stored - exact).norm() / exact.norm() < 0.1
    assert again.fingerprint() == model.fingerprint()


def test_the_artifact_holds_the_codes_of_gptq_on_the_calibration_batches(exported, processes):
    """Their text is what training would have read next, here after 3 steps.

    A batch has as many tokens as a training batch, up to 8,192.
    """
    blob, model, h = exported
    _, tensors = train_gpt.read_artifact(blob)
    size = h.train_batch_tokens // h.train_seq_len
    data = train_gpt.TrainingData(h)
    rows = data.sequences(3 * size, h.gptq_calib_batches * size)
    batches, text = list(rows[:, :-1].split(size)), data.sample
    calibration = train_gpt.calibrate(h, model, processes, batches, text)
    quantizers = calibration.quantizers(h, h.loss_per_value)
    stored = train_gpt.quantize_model(model, quantizers, calibration.hessians)
    assert tensors.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(tensors[name], as_read(value)), name
    nearest = quantize(quantizers[Role.MATRIX], model.blocks[3].mlp.proj.lora.B).dequantize()
    assert not torch.equal(tensors["blocks.3.mlp.proj.lora.B"], nearest)


# ---- Artifact ------------------------------------------------------------------------------------


def sample_tensors() -> dict:
    quantizer, w = train_gpt.Quantizer(6, 12.85), normal(60, 90).float()
    return {
        "z.lora.A": quantize(
            quantizer, torch.cat([w[:5, :17], 0 * w[:1, :17], 1e-4 * w[5:7, :17]])
        ),
        "a.lora.A": quantize(quantizer, w[:40, :3]),
        "a.lora.B": quantize(quantizer, w[:3]),
        "gain": w[:4, :1],
        "table.weight": quantize(quantizer, w[:, :8]),
        "columns.weight": train_gpt.QuantizedTensor(
            torch.arange(-30, 30).view(10, 6).to(torch.int8),
            torch.tensor([150, 0, 160, 150, 161, 149, 160, 255, 1, 0], dtype=torch.uint8),
            torch.tensor([160, 170, 0, 150, 160, 1], dtype=torch.uint8),
            states=train_gpt.TRELLIS_STATES,
        ),
        "point": torch.tensor(-2.5),
        "blocks.0.mix": w[0, :33],
        "extreme": torch.tensor([6e-8, -65504.0, 0.0, -0.0]),
        "a.mask.scores": w[:5, :7] > 0,
        "b.mask.scores": w[:3, :8] > 0,
        "c.mask.scores": w[:1, :3] > 0,  # one bit each, and no whole bytes of them
    }


@pytest.mark.parametrize("block", [1, 64, 2**22])
def test_artifacts_give_back_every_value(monkeypatch, block):
    """Whatever the size of the blocks; the sizes that a run reports add up to the file."""
    monkeypatch.setattr(train_gpt, "BLOCK_BYTES", block)
    expected = sample_tensors()
    blob, sizes = train_gpt.write_artifact({"note": "é"}, expected)
    assert train_gpt.write_artifact({"note": "é"}, expected) == (blob, sizes), "the same each time"
    assert sum(sizes.values()) == len(blob)
    assert sizes.keys() == {"header", *artifact_groups(blob)}
    header, tensors = train_gpt.read_artifact(blob)
    assert header["note"] == "é"
    assert (max(len(lengths) for _, lengths in header["groups"]) > 1) == (block < 1000)
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        exact = as_read(tensor)
        assert tensors[name].dtype is torch.float32
        assert torch.equal(tensors[name], exact), name
        assert tensors[name].shape == exact.shape, name


def test_groups_are_byte_planes_packed_by_brotli():
    """Read by the documented layout: masks as bits, codes ordered by the scales of their rows."""
    generator = np.random.default_rng(0)
    codes, bits = generator.integers(-9, 9, (30, 20), np.int8), generator.random((3, 5)) > 0.5
    exponents = generator.integers(90, 99, 30, np.uint8)
    columns = generator.integers(150, 170, 20, np.uint8)
    halves = generator.random(200, np.float32)
    parts = [torch.from_numpy(each) for each in (codes, exponents, columns)]
    blob, _ = train_gpt.write_artifact(
        {},
        {
            "x.walk": train_gpt.QuantizedTensor(*parts),
            "x": torch.from_numpy(halves),
            "mask": torch.from_numpy(bits),
        },
    )
    by_row = sorted(range(30), key=lambda i: exponents[i])
    by_column = sorted(range(20), key=lambda j: columns[j])
    pairs = np.frombuffer(halves.astype("<f2").tobytes(), np.uint8).reshape(-1, 2)
    assert artifact_groups(blob) == {
        "float16": pairs.T.tobytes(),
        "mask bits": np.packbits(bits).tobytes(),
        "walk codes": codes[np.ix_(by_row, by_column)].tobytes(),
        "walk exponents": exponents.tobytes(),
        "walk columns": columns.tobytes(),
    }


def test_any_flipped_bit_is_noticed():
    sample = train_gpt.write_artifact({"note": "é"}, sample_tensors())[0]
    generator = random.Random(0)
    end = len(sample) - 40
    places = [*range(60), *generator.sample(range(60, end), 200), *range(end, len(sample))]
    for place in places:
        damaged = bytearray(sample)
        damaged[place] ^= 1 << generator.randrange(8)
        with pytest.raises(train_gpt.UserError):
            train_gpt.read_artifact(bytes(damaged))


PACKED = brotli.compress(bytes(8))
ONE_GROUP = {"tensors": [["a", [4], ["float16"]]], "groups": [["float16", [len(PACKED)]]]}


def test_an_artifact_carries_nothing_twice_and_nothing_beside_its_groups():
    """Each of many mentions of a small file would be unpacked; any file could be a part of it."""
    assert [name for name, _ in train_gpt.read_tensors(ONE_GROUP, PACKED)] == ["a"]
    with pytest.raises(ValueError, match="stands twice"):
        dict(train_gpt.read_tensors(ONE_GROUP | {"groups": 2 * ONE_GROUP["groups"]}, 2 * PACKED))
    with pytest.raises(ValueError, match="the file has"):
        list(train_gpt.read_tensors(ONE_GROUP, PACKED + b"more"))


def test_an_artifact_must_say_all_that_its_model_depends_on(exported, processes):
    """What it leaves out would be as the evaluator happens to have set it."""
    blob, _, h = exported
    header, tensors = train_gpt.read_artifact(blob)
    for name in ("logit_softcap", "xsa_last_n"):
        part = {key: value for key, value in header["model"].items() if key != name}
        other, _ = train_gpt.write_artifact(header | {"model": part}, tensors)
        says = f"not those of one model.*use that script.*{name}"
        with pytest.raises(train_gpt.UserError, match=says):
            train_gpt.model_from_artifact(h, other, processes)
