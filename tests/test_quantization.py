"""From trained weights to the artifact and back; the optimiser, averages and schedule that lead there."""

from __future__ import annotations

import copy
import io
import itertools
import json
import random
import zipfile
from types import SimpleNamespace

import brotli
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import train_gpt

MATRIX, EMBEDDING, SCALAR = train_gpt.MATRIX, train_gpt.EMBEDDING, train_gpt.SCALAR
QUANTIZERS = [
    train_gpt.Quantizer(6, 12.85),
    train_gpt.Quantizer(8, 20.0),
    train_gpt.Quantizer(2, 2.0),
]
each_quantizer = pytest.mark.parametrize(
    "quantizer", QUANTIZERS, ids=["matrix", "embedding", "2-bit"]
)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """(n, dim) float64 inputs as layers see them: few strong directions, a mean, channels of unlike size."""
    torch.manual_seed(seed)
    x = (
        torch.randn(n, dim // 4) @ torch.randn(dim // 4, dim)
        + 0.3 * torch.randn(n, dim)
        + torch.randn(dim)
    )
    return (x * torch.rand(dim).exp()).double()


# ---- Rounding ----------------------------------------------------------------------------------------------


def awkward_rows() -> torch.Tensor:
    """Rows from far too small for the smallest step to far too large for the largest, an outlier, zeros."""
    torch.manual_seed(0)
    w = (
        torch.randn(9, 40)
        * torch.tensor([1e-12, 1e-7, 1e-3, 1.0, 1e3, 1e8, 1.0, 1.0, 1.0])[:, None]
    )
    w[6], w[7, 1:], w[8, 5] = 0.0, 0.0, 1e4
    return w


def restated_nearest(quantizer: train_gpt.Quantizer, w: torch.Tensor) -> torch.Tensor:
    """Each value rounded to its row's steps, within the codes there are; what is pruned is zero."""
    steps, largest = (
        train_gpt.row_steps(quantizer.exponents(w)).numpy(),
        2 ** (quantizer.bits - 1) - 1,
    )
    codes = np.clip(np.rint(w.double().numpy() / np.maximum(steps, 1e-30)), -largest, largest)
    return torch.from_numpy(codes * steps * (quantizer.prune(w) != 0).numpy()).float()


@each_quantizer
def test_codes_without_a_hessian_are_the_nearest(quantizer):
    torch.manual_seed(0)
    for w in (torch.randn(64, 48), torch.randn(5, 1), 1e-3 * torch.randn(1, 300), awkward_rows()):
        assert torch.equal(quantizer.gptq(w).values(), restated_nearest(quantizer, w))


def test_pruned_codes_without_a_hessian_are_the_nearest():
    """A row's exponent is that of the whole row, of which the smallest values are dropped after."""
    torch.manual_seed(0)
    quantizer, w = train_gpt.Quantizer(6, 10.0, 60.0), torch.randn(64, 48)
    assert torch.equal(quantizer.gptq(w).values(), restated_nearest(quantizer, w))


def test_ties_go_to_even_codes():
    """They are rare, about one in 4 million values."""
    torch.manual_seed(0)
    quantizer, w = QUANTIZERS[0], torch.randn(64, 512)
    steps = train_gpt.row_steps(quantizer.exponents(w))
    tied = (((w / steps).floor() + 0.5) * steps).float()
    tied = torch.where(torch.arange(512) % 8 == 0, tied, w)
    assert torch.equal(quantizer.gptq(tied).values(), restated_nearest(quantizer, tied))


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    columns=st.integers(1, 50),
    scale=st.integers(-17, 30),
    tail=st.integers(1, 5),
    which=st.sampled_from(range(3)),
)
def test_rounding_errs_by_half_a_step_where_nothing_is_clipped(
    seed, rows, columns, scale, tail, which
):
    quantizer, generator = QUANTIZERS[which], torch.Generator().manual_seed(seed)
    w = 2.0**scale * torch.randn(rows, columns, generator=generator) ** tail
    codes = quantizer.gptq(w, None)
    steps, largest = train_gpt.row_steps(codes.exponents), 2 ** (quantizer.bits - 1) - 1
    assert codes.codes.dtype is torch.int8
    assert codes.exponents.dtype is torch.uint8
    assert codes.codes.abs().max() <= largest
    clipped = w.double().abs() > (largest + 0.5) * steps
    error = (codes.values().double() - w.double()).abs()
    assert (error <= steps * 0.500001).logical_or(clipped).all()
    assert (codes.codes[clipped].abs() == largest).all()
    assert (codes.codes[clipped].sign() == w[clipped].sign()).all()


@each_quantizer
def test_the_largest_code_stands_for_so_many_root_mean_squares(quantizer):
    """Steps are powers of 2^(1/8), so the span is right to 2^(1/16)."""
    torch.manual_seed(0)
    w = torch.randn(50, 60) * torch.logspace(-3, 3, 50)[:, None]
    span = train_gpt.row_steps(quantizer.exponents(w))[:, 0] * (2 ** (quantizer.bits - 1) - 1)
    wanted = quantizer.sigmas * w.double().square().mean(1).sqrt()
    assert (span / wanted).log2().abs().max() <= 1 / 16 + 1e-9


def test_an_exponent_is_an_eighth_of_an_octave_and_zero_is_a_zero_row():
    steps = train_gpt.row_steps(torch.tensor([0, 1, 152, 160, 168, 255], dtype=torch.uint8))[:, 0]
    assert steps.tolist() == pytest.approx(
        [0, 2 ** (-159 / 8), 0.5, 1, 2, 2 ** (95 / 8)], rel=1e-15
    )


@each_quantizer
def test_zero_rows_and_rows_of_unlike_scale_do_not_touch_each_other(quantizer):
    w = awkward_rows()
    together = quantizer.gptq(w, None)
    alone = [quantizer.gptq(row[None], None) for row in w]
    assert torch.equal(together.codes, torch.cat([c.codes for c in alone]))
    assert torch.equal(together.exponents, torch.cat([c.exponents for c in alone]))
    assert together.exponents[6] == 0
    assert together.values()[6].abs().max() == 0
    assert (together.exponents[[0, 1, 2, 3, 4, 5, 7, 8]] > 0).all()
    assert together.values().isfinite().all()
    hessian = torch.from_numpy(np.cov(correlated_inputs(200, 40).T.numpy()))
    fed = quantizer.gptq(w, hessian)
    assert fed.codes[6].abs().max() == 0
    assert fed.values().isfinite().all()


def test_a_matrix_of_one_row_or_column_is_quantised_like_any_other():
    """Adapters of rank 1 are such; a step is 0.4 root mean squares, so errors are about 12%."""
    for shape in ((1, 64), (64, 1)):
        torch.manual_seed(0)
        w = torch.randn(shape)
        values = QUANTIZERS[0].gptq(w, torch.eye(shape[1])).values()
        assert (values - w).norm() / w.norm() < 0.2


# ---- GPTQ --------------------------------------------------------------------------------------------------


def plain_gptq(
    w: np.ndarray, hessian: np.ndarray, quantizer: train_gpt.Quantizer, steps: np.ndarray
):
    """Codes by the definition: after each column, the best change of the free columns; every inverse anew."""
    w, columns, largest = w.astype(np.float64).copy(), w.shape[1], 2 ** (quantizer.bits - 1) - 1
    order = sorted(range(columns), key=lambda j: -hessian[j, j])
    damped = hessian.astype(np.float64)
    damped = damped + np.eye(columns) * (0.01 * np.trace(damped) / columns + 1e-12)
    codes = np.zeros(w.shape, dtype=int)
    for place, j in enumerate(order):
        free = order[place:]
        inverse = np.linalg.inv(damped[np.ix_(free, free)])
        for i in range(len(w)):
            codes[i, j] = np.clip(np.round(w[i, j] / steps[i]), -largest, largest)
            error = w[i, j] - codes[i, j] * steps[i]
            w[i, free] -= error / inverse[0, 0] * inverse[0]
    return codes


@each_quantizer
@pytest.mark.parametrize("columns", [3, 33])
def test_gptq_is_the_definition_computed_plainly(quantizer, columns):
    x = correlated_inputs(300, max(columns, 4))[:, :columns]
    w, hessian = torch.randn(20, columns), x.T @ x
    got = quantizer.gptq(w, hessian)
    steps = train_gpt.row_steps(got.exponents)[:, 0].numpy()
    assert np.array_equal(
        got.codes.numpy(), plain_gptq(w.numpy(), hessian.numpy(), quantizer, steps)
    )
    assert torch.equal(got.exponents, quantizer.gptq(w, None).exponents)


@each_quantizer
def test_gptq_halves_the_output_error_of_rounding(quantizer):
    """On inputs it has not seen, too: it fits the kind of input, not the sample."""
    x = correlated_inputs(6000, 64)
    seen, unseen = x[:4000], x[4000:]
    w = torch.randn(96, 64)
    rounded, fed = (
        quantizer.gptq(w).values().double(),
        quantizer.gptq(w, seen.T @ seen).values().double(),
    )
    for inputs in (seen, unseen):
        error, before = ((inputs @ (w.double() - other).T).norm() for other in (fed, rounded))
        assert error < 0.5 * before


def test_gptq_leaves_weights_and_hessian_as_they_were():
    x, w = correlated_inputs(200, 16), torch.randn(8, 16)
    hessian = x.T @ x
    for given in (hessian, hessian.float()):
        before = w.clone(), given.clone()
        QUANTIZERS[0].gptq(w, given)
        assert torch.equal(w, before[0])
        assert torch.equal(given, before[1])


@each_quantizer
def test_uncorrelated_inputs_leave_nothing_to_make_good(quantizer):
    torch.manual_seed(0)
    w = torch.randn(10, 30)
    for hessian in (torch.eye(30), torch.diag(torch.rand(30)), torch.zeros(30, 30)):
        assert torch.equal(quantizer.gptq(w, hessian).codes, quantizer.gptq(w, None).codes)


def test_the_block_size_does_not_change_the_codes():
    x = correlated_inputs(400, 50)
    w, hessian = torch.randn(12, 50), x.T @ x
    codes = [QUANTIZERS[0].gptq(w, hessian, block).codes for block in (1, 7, 50, 128)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


@pytest.mark.parametrize("with_hessian", [False, True])
@pytest.mark.parametrize("percent", [0.0, 3.0, 50.0, 99.0])
def test_pruning_zeroes_that_share_of_the_smallest(percent, with_hessian):
    x = correlated_inputs(400, 50)
    w = torch.randn(40, 50)
    hessian = x.T @ x if with_hessian else None
    quantizer = train_gpt.Quantizer(8, 4.0, prune_pct=percent)
    codes = quantizer.gptq(w, hessian).codes
    smallest = w.abs().flatten().argsort()[: int(w.numel() * percent / 100)]
    assert codes.flatten()[smallest].abs().sum() == 0
    if not with_hessian:  # with one, what is kept moves, and some of it to zero
        rounds_to_zero = (quantizer.gptq(w).values() == 0).flatten()
        rounds_to_zero[smallest] = True
        assert torch.equal(codes.flatten() == 0, rounds_to_zero)


def test_pruned_values_are_made_good_like_rounding_errors():
    x = correlated_inputs(2000, 48)
    w, hessian = torch.randn(32, 48), x.T @ x
    quantizer = train_gpt.Quantizer(8, 4.0, prune_pct=30.0)
    fed, plain = (quantizer.gptq(w, given).values().double() for given in (hessian, None))
    assert (x @ (w - fed).T).norm() < 0.5 * (x @ (w - plain).T).norm()


# ---- Calibration -------------------------------------------------------------------------------------------


def test_hessians_are_the_sums_of_products_of_the_inputs(settings, random_model, processes):
    """By hand: what the maps of a first layer see, the learned maps, and the tied embedding's second use."""
    h = settings(num_layers=1, smear_enabled=0, ve_layers="0")
    model, batches = random_model(h), [tokens(3, 16), tokens(2, 16, seed=1)]
    hessians = train_gpt.collect_hessians(model, iter(batches), processes)

    def expected(inputs):
        x = torch.cat([inputs(ids).detach().flatten(0, 1).double() for ids in batches])
        return x.T @ x

    def bigrams(ids):
        hashed = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % 31
        return model.bigram[0].weight[torch.cat([torch.full((len(ids), 1), 31), hashed], 1)]

    def normalised(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def attention_input(ids):
        block, added = model.blocks[0], bigrams(ids) @ model.bigram[1].weight.T
        x = normalised(model.embedding.weight[ids] + model.bigram_scale * added)
        return normalised(block.stream_mix * x + block.embedding_mix * x)

    by_hand = {
        model.bigram[1]: bigrams,
        model.value_embedding[1]: lambda ids: model.value_embedding[0].weight[ids],
        model.blocks[0].attention.q: attention_input,
        model.blocks[0].attention.v: attention_input,
        model.embedding: model.hidden,
    }
    for module, inputs in by_hand.items():
        assert hessians[module].dtype is torch.float32
        torch.testing.assert_close(
            hessians[module].double(), expected(inputs), rtol=1e-4, atol=1e-3
        )
    assert {type(module) for module in hessians} == {
        train_gpt.Linear,
        train_gpt.Embedding,
        train_gpt.LoRA,
    }
    for row in model.table.values():  # an adapter sees what its map does
        module = model.get_submodule(row.name)
        assert hessians[module.lora] is hessians[module]
    looked_up_only = model.bigram[0], model.value_embedding[0]
    assert all(module not in hessians for module in looked_up_only)
    assert len(hessians) == 2 * 6 + 3


def test_products_of_bfloat16_inputs_are_exact(settings, processes):
    """They may be multiplied as bfloat16, but not rounded to it; and nothing else may be from then on."""
    h = settings(
        num_layers=1, model_dim=256, num_heads=8, bigram_vocab_size=0, ve_enabled=0, smear_enabled=0
    )
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
    hooks = train_gpt.collect_hessians(model, [ids], processes)
    assert hooks
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hessians_of_bfloat16_activations_can_be_used(settings, processes):
    """Inputs with a strong mean: a product rounded to bfloat16 would have negative eigenvalues, and the
    export would crash after all of the training."""
    h = settings(num_layers=1, model_dim=128, bigram_vocab_size=0, ve_enabled=0)
    torch.manual_seed(0)
    model = train_gpt.GPT(h, torch.bfloat16)
    with torch.no_grad():
        model.embedding.weight.copy_(1 + 0.05 * torch.randn(64, 128))
    hessians = train_gpt.collect_hessians(model, [tokens(64, 16)], processes)
    for hessian in hessians.values():
        assert torch.linalg.eigvalsh(hessian.double())[0] > -1e-3 * hessian.diagonal().mean()
    for module, hessian in hessians.items():
        module.quantize(train_gpt.quantizers_of(h), hessian)


def test_a_factor_pair_is_quantised_each_against_its_own_inputs():
    """Trap 3: B sees x; A sees x B̂ᵀ, with the B̂ that the artifact holds."""
    torch.manual_seed(0)
    layer = train_gpt.FrozenRandomLinearWithLoRA(40, 300, rank=8)
    with torch.no_grad():
        layer.lora_A.normal_()
    quantizers = {MATRIX: train_gpt.Quantizer(4, 3.0), EMBEDDING: None}
    x = correlated_inputs(4000, 40)
    codes = layer.lora.quantize(quantizers, (x.T @ x).float())
    assert list(codes) == ["B", "A"]
    assert layer.quantize(quantizers, (x.T @ x).float()) == {}, "the map itself is not stored"
    b = quantizers[MATRIX].gptq(layer.lora_B.data, (x.T @ x).float())
    seen = x @ b.values().double().T
    a = quantizers[MATRIX].gptq(layer.lora_A.data, seen.T @ seen)
    assert torch.equal(codes["B"].codes, b.codes)
    assert torch.equal(codes["A"].codes, a.codes)
    seen = x @ layer.lora_B.detach().double().T
    assert not torch.equal(a.codes, quantizers[MATRIX].gptq(layer.lora_A.data, seen.T @ seen).codes)
    exact = x @ (layer.lora_A @ layer.lora_B).detach().double().T
    nearest = [
        quantizers[MATRIX].gptq(factor.data).values() for factor in (layer.lora_A, layer.lora_B)
    ]
    error, before = (
        (exact - x @ (a @ b).double().T).norm()
        for a, b in ((codes["A"].values(), codes["B"].values()), nearest)
    )
    assert error < 0.7 * before
    plain = layer.lora.quantize(quantizers, None)
    assert torch.equal(plain["A"].values(), nearest[0])


# ---- Late quantisation-aware training ----------------------------------------------------------------------


def test_weights_are_as_stored_within_and_their_own_after(settings, random_model):
    h = settings()
    model = random_model(h)
    groups, quantizers = train_gpt.tensors_by_role(model), train_gpt.quantizers_of(h)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with train_gpt.weights_as_stored(groups, quantizers):
        for role in (MATRIX, EMBEDDING):
            for name, p in groups[role].items():
                assert torch.equal(p, quantizers[role].gptq(before[name], None).values()), name
                assert not torch.equal(p, before[name]), name
        for name, p in groups[SCALAR].items():
            assert torch.equal(p, before[name]), name
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.data_ptr() == places[name], name


def test_gradients_of_late_qat_are_straight_through(settings, random_model):
    """A gradient taken within is that of the quantised model, given to the masters as it is."""
    h = settings()
    model, stored = random_model(h), random_model(h)
    quantizers = train_gpt.quantizers_of(h)
    with torch.no_grad():
        for role, params in train_gpt.tensors_by_role(stored).items():
            for p in params.values() if role in quantizers else ():
                p.copy_(quantizers[role].gptq(p).values())
    with train_gpt.weights_as_stored(train_gpt.tensors_by_role(model), quantizers):
        loss = model(tokens(2, 16), tokens(2, 16, seed=1))
        loss.backward()
    expected = stored(tokens(2, 16), tokens(2, 16, seed=1))
    expected.backward()
    assert loss.item() == expected.item()
    for (name, p), other in zip(model.named_parameters(), stored.parameters()):
        assert torch.equal(p.grad, other.grad), name


def test_masters_come_back_when_a_step_fails(settings, random_model):
    h = settings()
    model = random_model(h)
    before = copy.deepcopy(model.state_dict())
    groups, quantizers = train_gpt.tensors_by_role(model), train_gpt.quantizers_of(h)
    with pytest.raises(KeyboardInterrupt), train_gpt.weights_as_stored(groups, quantizers):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def data_settings(settings, tmp_path_factory):
    """settings of a run on two shards of random tokens, the first 16 of which are the most frequent."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        ids = (64 * np.random.default_rng(number).random(3000) ** 2).astype("<u2")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (folder / f"fineweb_train_{number:06}.bin").write_bytes(header.tobytes() + ids.tobytes())
    return lambda **changes: settings(data_path=str(folder), **changes)


class Snapshots:
    """A log that writes nothing; at each line about a training step it keeps a copy of the weights."""

    def __init__(self, model: train_gpt.GPT):
        self.model, self.taken, self.lines = model, [], []

    def __call__(self, text: str, *args, **kwargs) -> None:
        self.lines.append(text)
        if "train_loss" in text:
            self.taken.append(
                {name: p.detach().clone() for name, p in self.model.named_parameters()}
            )


def test_weights_go_on_learning_during_late_qat(data_settings, processes, tmp_path):
    h = data_settings(iterations=5, warmdown_iters=5, late_qat_threshold=1.0, train_log_every=1)
    torch.manual_seed(0)
    model, val = train_gpt.GPT(h), SimpleNamespace(tokens=tokens(50), bytes=50)
    world = copy.copy(processes)
    world.log = log = Snapshots(model)
    trainer = train_gpt.Trainer(h, world, model, None, train_gpt.TrainingData(h), tmp_path)
    trainer.warm_up()
    trainer.run(val)
    began = next(i for i, line in enumerate(log.lines) if line.startswith("late_qat:on"))
    assert "train_loss" in log.lines[began - 1], "it begins after the first step"
    assert len(log.taken) == 5
    before, *_, after = log.taken
    idle = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert idle == []


# ---- What is quantised -------------------------------------------------------------------------------------

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
        model.bigram[0].weight.normal_(std=0.3)
    tokenizer = SimpleNamespace(sha256="0" * 64)
    blob = train_gpt.export(h, processes, model, train_gpt.TrainingData(h), 3, tokenizer)
    return blob, model, h


def test_every_matrix_adapter_and_embedding_is_quantised(exported):
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
    """The role decides optimiser and quantiser, so an adapter without one would be trained as a gain is."""
    model = train_gpt.GPT(settings(map_basis=basis))
    roles = train_gpt.tensors_by_role(model)
    named = [name for group in roles.values() for name in group]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert set(roles[EMBEDDING]) == {
        "embedding.weight",
        "bigram.0.weight",
        "value_embedding.0.weight",
    }
    kinds = (".weight",) if basis == "learned" else (".lora.A", ".lora.B")
    maps = {name + kind for name in model.table for kind in kinds}
    assert set(roles[MATRIX]) == maps | {"bigram.1.weight", "value_embedding.1.weight"}


def test_hardly_any_learned_value_of_the_full_configuration_stays_float16():
    """Scalars are the same with and without random maps, so no map need be drawn to count them."""
    rows = train_gpt.Hyperparameters().maps
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Hyperparameters(map_basis="learned"))
    roles = train_gpt.tensors_by_role(model)
    scalars, embeddings = (
        sum(p.numel() for p in roles[role].values()) for role in (SCALAR, EMBEDDING)
    )
    adapters = sum(row.adapters()["lora"] * (row.in_features + row.out_features) for row in rows)
    assert scalars < 0.01 * (adapters + embeddings)
    assert all(name.endswith(PER_CHANNEL) for name, p in roles[SCALAR].items() if p.ndim > 1)


def test_the_artifact_predicts_what_the_model_does(exported, processes):
    """From the bytes alone; 6 and 8 bits cost some accuracy, and no more."""
    blob, model, _ = exported
    again = train_gpt.build_model(*train_gpt.read_artifact(blob), processes)
    ids = tokens(8, 16)
    with torch.no_grad():
        exact, stored = (m.logits(m.hidden(ids)) for m in (model, again))
    assert 0 < (stored - exact).norm() / exact.norm() < 0.1
    assert again.fingerprint() == model.fingerprint()


def test_a_rebuilt_model_has_a_table_of_angles_as_long_as_this_runs_windows(exported, settings):
    """A longer window would compute it anew in every forward pass."""
    for length in (16, 4096):
        world = train_gpt.World(settings(eval_seq_len=length))
        assert (
            train_gpt.build_model(*train_gpt.read_artifact(exported[0]), world).rope.size(1)
            == length + 1
        )


def test_the_artifact_holds_the_codes_of_gptq_on_the_calibration_batch(exported, processes):
    blob, model, h = exported
    _, tensors = train_gpt.read_artifact(blob)
    length = h.train_seq_len
    rows = train_gpt.TrainingData(h).sequences(3 * h.train_batch_tokens // length, 8192 // length)
    quantizers = train_gpt.quantizers_of(h)
    hessians = train_gpt.collect_hessians(model, [rows[:, :-1]], processes)
    for name in ("embedding", "bigram.0", "bigram.1", "blocks.3.mlp.proj.lora"):
        module = model.get_submodule(name)
        stored = module.quantize(quantizers, hessians.get(module))
        assert len(stored) == (2 if name.endswith("lora") else 1), name
        for part, codes in stored.items():
            assert torch.equal(tensors[f"{name}.{part}"], codes.values()), name
    fed = tensors["blocks.3.mlp.proj.lora.B"]
    assert not torch.equal(
        fed, quantizers[MATRIX].gptq(model.blocks[3].mlp.proj.lora.B.data).values()
    )
    assert torch.equal(tensors["skip_weights"], model.skip_weights.half().float())


# ---- Artifact ----------------------------------------------------------------------------------------------


def sample_tensors() -> dict:
    torch.manual_seed(0)
    quantizer = train_gpt.Quantizer(6, 12.85)
    rows = torch.cat([torch.randn(5, 17), torch.zeros(1, 17), 1e-4 * torch.randn(2, 17)])
    return {
        "z.lora.A": quantizer.gptq(rows, None),
        "a.lora.A": quantizer.gptq(torch.randn(40, 3), None),
        "a.lora.B": quantizer.gptq(torch.randn(3, 90), None),
        "gain": torch.randn(4, 1),
        "table.weight": quantizer.gptq(torch.randn(60, 8), None),
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
        exact = tensor.values() if isinstance(tensor, train_gpt.Codes) else tensor.half().float()
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
        "scores bits",
        "float16",
    }


def test_groups_are_byte_planes_packed_by_brotli():
    """Read by the documented layout."""
    torch.manual_seed(0)
    codes, exponents = (
        torch.randn(30, 20).round().to(torch.int8),
        torch.full((30,), 99, dtype=torch.uint8),
    )
    halves = torch.randn(200)
    blob, _ = train_gpt.write_artifact(
        {}, {"x.walk": train_gpt.Codes(codes, exponents), "x": halves}
    )
    assert blob[:8] == b"RANDMAPS"
    version, size = np.frombuffer(blob[8:16], "<u4").tolist()
    assert version == 2
    place, raw = 16 + size, {}
    for name, packed in json.loads(brotli.decompress(blob[16:place]))["groups"]:
        raw[name] = brotli.decompress(blob[place : place + packed])
        place += packed
    assert place == len(blob) - 32
    pairs = np.frombuffer(halves.half().numpy().tobytes(), np.uint8).reshape(-1, 2)
    assert raw == {
        "float16": pairs.T.tobytes(),
        "walk codes": codes.numpy().tobytes(),
        "walk exponents": exponents.numpy().tobytes(),
    }


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
    once = {"tensors": [["a", [4], ["float16"]]], "groups": [["float16", len(packed)]]}
    assert [name for name, _ in train_gpt.read_tensors(once, packed)] == ["a"]
    with pytest.raises(KeyError):
        dict(train_gpt.read_tensors(once | {"groups": 2 * once["groups"]}, 2 * packed))


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
    header = {
        "model": h.model_settings(),
        "fingerprint": model.fingerprint(),
        "tokenizer": "",
    } | header
    return train_gpt.write_artifact(header, dict(model.state_dict()))[0], model


def test_maps_that_come_out_different_are_refused_with_the_versions(settings, processes):
    """Trap 6: another stream of random numbers would mean garbage weights without a word."""
    h, other = settings(), settings(map_seed=54321)
    blob, model = stored_model(h, model=other.model_settings())
    with pytest.raises(train_gpt.UserError) as error:
        train_gpt.build_model(*train_gpt.read_artifact(blob), processes)
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
    again = train_gpt.build_model(*train_gpt.read_artifact(blob), processes)
    assert again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        for (name, p), other in zip(model.named_parameters(), again.parameters()):
            assert torch.equal(p.half().float(), other), name
            p.copy_(other)
        assert torch.equal(model.hidden(tokens(1, 8)), again.hidden(tokens(1, 8)))


# ---- Muon --------------------------------------------------------------------------------------------------


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """5 steps of x <- 3.4445 x - 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x, by its singular values, in float64."""
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
    for x, given in zip(result, g):
        np.testing.assert_allclose(x.numpy(), newton_schulz(given.numpy()), rtol=0, atol=1e-4)
        if shape != (
            24,
            24,
        ):  # a square matrix has singular values near zero, which 5 steps leave small
            singular = torch.linalg.svdvals(x)
            assert singular.min() > 0.65
            assert singular.max() < 1.25


def test_orthogonalize_of_nothing_is_nothing():
    """The gradient of B is zero while A is: no division by its norm."""
    assert torch.equal(train_gpt.orthogonalize(torch.zeros(2, 4, 6), 5), torch.zeros(2, 4, 6))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_muon_is_nesterov_momentum_orthogonalised_with_decoupled_decay(shape):
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
        for p, other in list(zip(together, alone))[:4]:
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, other in zip(together, alone):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-5)
    assert torch.equal(together[4], untouched)


def test_a_step_warms_momentum_up_and_scales_every_learning_rate(settings, random_model, processes):
    h = settings(muon_momentum_warmup_steps=100)
    model = random_model(h)
    before = copy.deepcopy(model.state_dict())
    optimizers = train_gpt.Optimizers(train_gpt.tensors_by_role(model), h, processes)
    for step, momentum in ((0, 0.92), (50, 0.955), (100, 0.99), (1000, 0.99)):
        model(tokens(2, 16), tokens(2, 16, seed=1)).backward()
        optimizers.step(step, 0.0)
        assert optimizers.muon.param_groups[0]["momentum"] == pytest.approx(momentum)
        assert all(p.grad is None for p in model.parameters()), "the next step begins from nothing"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(tokens(2, 16), tokens(2, 16, seed=1)).backward()
    optimizers.step(1000, 0.5)
    rates = [group["lr"] for group in optimizers.muon.param_groups + optimizers.adam.param_groups]
    full = [h.matrix_lr, h.tied_embed_lr, h.scalar_lr, h.sparse_lr]
    assert rates == pytest.approx([0.5 * rate for rate in full])
    idle = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert idle == []


# ---- Averages ----------------------------------------------------------------------------------------------


def averaged(h, history: list[torch.Tensor], scales: list[float]) -> dict[str, torch.Tensor]:
    p = torch.nn.Parameter(torch.zeros_like(history[0]))
    averages = train_gpt.Averages([p], h)
    for step, (value, scale) in enumerate(zip(history, scales)):
        with torch.no_grad():
            p.copy_(value)
        averages.update(step, scale)
    return {name: values[0] for name, values in averages.candidates().items()}


@pytest.mark.parametrize("updates", [1, 2, 40])
def test_ema_is_the_closed_formula_without_a_pull_to_its_start(settings, updates):
    """Trap 4: divided by its total weight, so that after one update it is the weights."""
    torch.manual_seed(0)
    history, decay = [torch.randn(5, 3) for _ in range(updates)], 0.97
    ema = averaged(settings(ema_decay=decay), history, [1.0] * updates)["ema"]
    weights = [decay ** (updates - 1 - i) for i in range(updates)]
    expected = sum(w * value.double() for w, value in zip(weights, history)) / sum(weights)
    torch.testing.assert_close(ema.double(), expected, rtol=0, atol=1e-6)


def test_averages_of_constant_weights_are_the_weights(settings):
    """Adapters that start at zero must not be dragged back to it, however early the export comes."""
    value = torch.tensor([1.0, -3.0, 1e-6, 1e4])
    found = averaged(settings(ema_decay=0.997, swa_interval=1), [value] * 7, [0.1] * 7)
    assert set(found) == {"last", "ema", "swa"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, value, rtol=1e-6, atol=0, msg=name)


def test_swa_is_the_plain_mean_of_late_weights(settings):
    torch.manual_seed(0)
    history, scales = [torch.randn(4) for _ in range(14)], [1.0] * 6 + [0.2] + [0.19] * 7
    found = averaged(settings(swa_interval=3, swa_threshold=0.2), history, scales)
    torch.testing.assert_close(found["swa"], (history[9] + history[12]) / 2)
    assert torch.equal(found["last"], history[-1])


def test_averages_that_are_off_or_empty_are_no_candidates(settings):
    history = [torch.ones(2)] * 3
    assert set(averaged(settings(ema_decay=0.0, swa_enabled=0), history, [0.1] * 3)) == {"last"}
    assert set(averaged(settings(ema_decay=0.9), history, [1.0] * 3)) == {"last", "ema"}


def test_an_export_considers_the_averages_that_it_is_asked_for(settings):
    """EXPORT_ONLY with EMA_DECAY=0, of a checkpoint that has one."""
    p = torch.nn.Parameter(torch.ones(3))
    trained = train_gpt.Averages([p], settings(swa_interval=1))
    trained.update(0, 0.1)
    for changes, expected in (({}, {"last", "ema", "swa"}), ({"ema_decay": 0.0}, {"last", "swa"})):
        averages = train_gpt.Averages([p], settings(**changes))
        averages.load_state_dict(trained.state_dict())
        assert set(averages.candidates()) == expected


def test_candidates_do_not_change_with_the_weights(settings):
    p = torch.nn.Parameter(torch.ones(3))
    averages = train_gpt.Averages([p], settings(swa_interval=1))
    averages.update(0, 0.1)
    found = averages.candidates()
    with torch.no_grad():
        p.zero_()
    for name, values in found.items():
        torch.testing.assert_close(values[0], torch.ones(3), msg=name)


# ---- Schedule ----------------------------------------------------------------------------------------------


def simulate(clock: train_gpt.Clock, warmdown: int, seconds_of_step) -> list[float]:
    """The learning-rate scale of each step of a run whose steps take so long."""
    scales = []
    while (remaining := clock.remaining(len(scales))) > 0:
        scales.append(train_gpt.warmdown_scale(len(scales), remaining, warmdown))
        clock.step_took(seconds_of_step(len(scales) - 1))
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
        clock.step_took(0.1)
    before = clock.remaining(50)
    clock.step_took(33.0)
    lost = before - clock.remaining(51)
    assert 330 <= lost <= 332


def test_the_schedule_follows_a_machine_that_becomes_slower():
    clock = train_gpt.Clock(20_000, 100.0)
    for seconds in [0.1] * 300 + [0.2] * 100:
        clock.step_took(seconds)
    assert clock.remaining(400) == pytest.approx(50 / 0.2, abs=1)


def test_one_slow_first_step_does_not_start_the_warm_down():
    clock = train_gpt.Clock(20_000, 555.0)
    clock.step_took(33.0)
    assert train_gpt.warmdown_scale(1, clock.remaining(1), 3500) == 1.0
    for step in range(2, 20):
        clock.step_took(0.1)
        assert train_gpt.warmdown_scale(step, clock.remaining(step), 3500) == 1.0
    assert clock.remaining(20) == pytest.approx((555 - 34.8) / 0.1, abs=2)


@pytest.mark.parametrize("seconds", [0, 0.0, -45.0])
def test_no_wall_clock_is_no_limit(seconds):
    """MAX_WALLCLOCK_SECONDS=0, from which the reserve for the export has been taken."""
    clock = train_gpt.Clock(10, seconds)
    for step in range(10):
        assert clock.remaining(step) == 10 - step
        clock.step_took(1e6)
    assert clock.remaining(10) == 0


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
    assert train_gpt.warmdown_scale(step, remaining, warmdown) == pytest.approx(scale)
