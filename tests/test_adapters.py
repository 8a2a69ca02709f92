"""Bases, adapters and what else a map can ask for, against plain restatements in float64."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import math

import brotli
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import head_input, train_gpt

SHAPES = [(64, 64), (128, 32), (32, 128), (48, 48), (96, 40), (40, 96), (1, 7), (7, 1), (1, 1)]
each_basis = pytest.mark.parametrize("basis", train_gpt.BASES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- Bases ---------------------------------------------------------------------------------------


@each_basis
@each_shape
def test_a_basis_gives_a_matrix_that_its_seed_alone_decides(basis, shape):
    draw = train_gpt.BASES[basis]
    torch.manual_seed(0)
    np.random.seed(0)
    first = draw(*shape, 5)
    torch.manual_seed(1)
    np.random.seed(1)
    assert first.shape == shape
    assert first.dtype is torch.float64
    assert first.isfinite().all()
    assert first.abs().max() > 0
    assert torch.equal(first, draw(*shape, 5))
    if min(shape) > 1:
        assert not torch.equal(first, draw(*shape, 6))
        assert not torch.equal(first, draw(*shape, 5 + 100))


@each_basis
@pytest.mark.parametrize("gain", [1.0, 0.5, 3.0])
def test_a_generated_map_is_its_basis_times_its_gain_in_bfloat16(basis, gain):
    drawn = train_gpt.generate_map(train_gpt.MapSpec("", 24, 40, basis, seed=9, gain=gain))
    assert drawn.dtype is torch.bfloat16
    assert drawn.is_contiguous()
    assert torch.equal(drawn, (train_gpt.BASES[basis](24, 40, 9) * gain).to(torch.bfloat16))


@pytest.mark.parametrize("basis", ["gaussian", "uniform", "rademacher", "hadamard"])
def test_entries_have_no_preferred_sign_row_or_column(basis):
    entries = train_gpt.BASES[basis](256, 256, 3) * 16
    assert entries.mean().abs() < 5 / 256
    assert entries.mean(0).abs().max() < 0.4
    assert entries.mean(1).abs().max() < 0.4


def test_different_seeds_are_unrelated():
    """Neighbors too, which are what the maps of one layer have."""
    for basis, draw in train_gpt.BASES.items():
        drawn = torch.stack([draw(64, 64, seed).flatten() for seed in (1, 2, 3, 101, 1 << 40)])
        drawn = F.normalize(drawn, dim=1)
        overlap = drawn @ drawn.T - torch.eye(5, dtype=torch.float64)
        assert overlap.abs().max() < 5 / 64, basis


@each_shape
def test_rademacher_entries_are_signs_over_the_root_of_the_inputs(shape):
    drawn = train_gpt.rademacher(*shape, 3)
    assert torch.equal(drawn.abs(), torch.full(shape, 1 / math.sqrt(shape[1]), dtype=torch.float64))


def test_uniform_entries_fill_their_interval_evenly():
    drawn = train_gpt.uniform(400, 100, 3) * 10
    assert -1 <= drawn.min() < -0.999
    assert 0.999 < drawn.max() <= 1
    assert drawn.var() == pytest.approx(1 / 3, rel=0.02)
    counts = torch.histc(drawn, 10, -1, 1) / drawn.numel()
    assert (counts - 0.1).abs().max() < 0.01


def test_gaussian_entries_are_normal():
    drawn = train_gpt.gaussian(400, 100, 3) * 10
    assert drawn.std() == pytest.approx(1, rel=0.02)
    assert (drawn**4).mean() == pytest.approx(3, rel=0.06)
    for deviations, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (drawn.abs() < deviations).double().mean() == pytest.approx(share, abs=0.006)


@each_shape
def test_hadamard_entries_are_one_power_of_two(shape):
    """So they are exact in every floating-point type, fp8 among them."""
    drawn = train_gpt.hadamard(*shape, 3)
    sizes = drawn.abs().unique()
    assert len(sizes) == 1
    assert math.log2(sizes.item()).is_integer()
    assert 2**-0.5 <= sizes.item() * math.sqrt(max(shape)) <= 2**0.5
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        assert torch.equal(drawn.to(dtype).double(), drawn)


def test_hadamard_maps_of_every_usual_width_are_exact_in_fp8():
    for width in (512, 768, 1024, 1536, 2048, 4096, 16_384, 65_536):
        drawn = train_gpt.hadamard(2, width, 3)
        assert torch.equal(drawn.to(torch.float8_e4m3fn).double(), drawn), width


@pytest.mark.parametrize("size", [2, 16, 64, 256])
def test_square_hadamard_maps_of_a_power_of_two_are_orthogonal(size):
    drawn = train_gpt.hadamard(size, size, 3)
    factor = size * drawn[0, 0] ** 2
    assert torch.equal(drawn @ drawn.T, factor * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(128, 32), (32, 128), (48, 48), (96, 40), (200, 200), (100, 30)])
def test_other_hadamard_maps_are_nearly_orthogonal(shape):
    """Part of an orthogonal matrix: no direction grows more than in it, and angles are near 90°."""
    drawn = train_gpt.hadamard(*shape, 3)
    size, entry = 2 ** math.ceil(math.log2(max(shape))), drawn[0, 0].abs().item()
    values = torch.linalg.svdvals(drawn)
    assert values.max() <= entry * math.sqrt(size) + 1e-12
    tall = drawn if shape[0] >= shape[1] else drawn.T
    gram = tall.T @ tall / (entry**2 * len(tall))
    cosines = gram - torch.eye(len(gram), dtype=torch.float64)
    assert cosines.abs().max() < 6 * math.sqrt((1 - len(tall) / size) / len(tall)) + 1e-12
    assert torch.linalg.matrix_rank(drawn) >= 0.9 * min(shape)


def test_hadamard_maps_do_not_depend_on_the_release_of_numpy(monkeypatch):
    """Its function that counts bits came with 2.0; without it the map is the same."""
    expected = train_gpt.hadamard(48, 20, 7)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert torch.equal(train_gpt.hadamard(48, 20, 7), expected)


GOLDEN = {
    "orthogonal": "17cac7380830c06ea15045a08010662fdfa12e1b01d4f80627d5aa1beeca14cd",
    "gaussian": "35e9a9576e393533daeceff10458836788b5313949fbab7d19b7bfe34cc1db80",
    "uniform": "a1ecef3d3f701bcac5af13430f7590af61b3e533d705927e5d6f4e00cdab5931",
    "rademacher": "c583651ede8adcc3432776689418355f59cd01386182772ada365ad545fbcf6e",
    "hadamard": "87d6ebf8d13558fd003fbc03232b0904ed85ad1185afc45f16ead3ba9074a1e1",
}


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@each_basis
def test_the_maps_are_the_ones_that_artifacts_were_made_with(basis):
    """A changed stream makes every artifact garbage. A new basis gets its line here."""
    generated = train_gpt.generate_map(train_gpt.MapSpec("", 24, 40, basis, seed=12_345))
    assert sha256(generated) == GOLDEN[basis]


def test_what_adapters_and_twists_generate_is_what_artifacts_were_made_with():
    spec = train_gpt.MapSpec("", 24, 40, "uniform", seed=12_345, shared_seed=77)
    vera, sparse = train_gpt.VeRA(spec, 3), train_gpt.Sparse(spec, 0.2)
    permutation, orthogonal = train_gpt.PermutationTwist(spec), train_gpt.OrthogonalTwist(spec)
    numbers = torch.arange(24.0 * 40).view(24, 40)
    expected = {
        vera.A: "d9de1af6d9b599cf5675cd3f79a446b7a690b7ed2f9683b02e25132f60b3ae6a",
        vera.B: "8e2750bbfc40c042e92f49b925b2fca4e25efe9a3bbd8c1a9aea6e981d55ae2f",
        sparse.support: "51755b379b60a3d4a4f28f15945dd8728c24f50e279b7f3548f2bdc143dc94b4",
        train_gpt.Combination(spec, 2).maps: (
            "0c0c9edec24793fb64ee7b8ccdd773c9d557cb368f8fd586405a562a2c80ffaf"
        ),
        permutation(numbers): "3a78c8fef2622d34d2009c9004f2cea89b0bca471579f05644bc96ef25d37780",
        orthogonal.p: "d41f28ea5b35fa398fbafa82c858ba4fa7abc9b36cb3916b5c8ee410f36555da",
        orthogonal.q: "292c7ecfe4d09f68a40aa1a576b9b58bbe6039676ef2b9ae7f5e791728be9dd9",
    }
    for tensor, digest in expected.items():
        assert sha256(tensor) == digest


# ---- Linear layers -------------------------------------------------------------------------------

ADAPTERS = [
    "none",
    "lora:3",
    "rslora:3",
    "vera:3",
    "sparse:0.3",
    "mask",
    "signs",
    "combination:3",
    "lora:2+sparse:0.4",
    "mask+lora:2",
    "vera:2+rslora:4",
    "sparse:0.2+vera:2+lora:1",
    "signs+lora:2+combination:2",
    "mask+sparse:0.3+vera:3+rslora:2+lora:4",
]


def squared(y: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(y, 0.5).square()


def made(spec: train_gpt.MapSpec, bias: bool = False) -> train_gpt.Linear:
    """Return a map in float64. No learned value is at its initial value, which hides mistakes."""
    torch.manual_seed(1)
    layer = train_gpt.Linear(spec, bias=bias).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def own_path(layer: train_gpt.Linear, name: str, p: dict, x: torch.Tensor) -> torch.Tensor:
    """Return what an adapter adds, as its paper has it: a path of its own beside the map's."""
    if name in ("lora", "rslora"):
        a, b = p[f"{name}.A"], p[f"{name}.B"]
        return (x @ b.T) @ a.T / (1 if name == "lora" else math.sqrt(a.shape[1]))
    if name == "vera":
        return ((x @ layer.vera.A.T) * p["vera.d"]) @ layer.vera.B.T * p["vera.b"]
    if name == "combination":
        pairs = zip(p["combination.coefficients"], layer.combination.maps, strict=True)
        return sum(coefficient * (x @ r.double().T) for coefficient, r in pairs)
    outputs = []
    for values, places in zip(p["sparse.values"], layer.sparse.support, strict=True):
        pairs = zip(values, places.tolist(), strict=True)
        outputs.append(sum(value * x[..., place] for value, place in pairs))
    return torch.stack(outputs, -1)


def textbook(
    layer: train_gpt.Linear, spec: train_gpt.MapSpec, p: dict, x: torch.Tensor, activation=None
) -> torch.Tensor:
    """Return the output of the map and of all its adapters, with the values p."""
    w = p.get("weight", layer.weight)
    if "mask.scores" in p:
        w = math.sqrt(2) * w * p["mask.scores"]
    if "signs.scores" in p:
        w = w * (2 * p["signs.scores"] - 1)
    y = x @ w.T
    for name in spec.adapters():
        if name not in ("mask", "signs"):
            y = y + own_path(layer, name, p, x)
    y = y * p["scale"] if "scale" in p else y
    y = y + p["bias"] if "bias" in p else y
    y = y if activation is None else activation(y)
    return y * p["gate"] if "gate" in p else y


def same_as_the_textbook(spec: train_gpt.MapSpec, bias: bool, activation) -> None:
    """Compare a map's outputs and gradients with those of the textbook."""
    layer, x = made(spec, bias), normal(2, 3, spec.in_features, seed=2).requires_grad_()
    p = {name: value.detach().clone() for name, value in layer.named_parameters()}
    slopes = {}  # of the sigmoid that stands for a bit: what is differentiated here are the bits
    for name in p:
        if name.endswith(".scores"):
            soft = p[name].sigmoid()
            slopes[name] = soft * (1 - soft)
            p[name] = (p[name] > 0).double()
    p = {name: value.requires_grad_() for name, value in p.items()}
    y, expected = layer(x, activation=activation), textbook(layer, spec, p, x, activation)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    dy = normal(*y.shape, seed=3)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    theirs = torch.autograd.grad(expected, [x, *p.values()], dy)
    for name, mine, their in zip(["x", *p], ours, theirs, strict=True):
        assert mine.abs().max() > 0, name
        their = their * slopes.get(name, 1.0)
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(mine, their, rtol=1e-12, atol=1e-10, msg=message)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("basis", "shape"),
    [("uniform", (12, 9)), ("uniform", (6, 14)), ("learned", (12, 9))],
    ids=["tall", "wide", "learned"],
)
def test_a_linear_map_and_its_gradients_are_the_textbooks(adapter, basis, shape):
    """With every scale and gate.

    A learned map beside adapters takes a dense gradient through the product.
    """
    for scale, gate, bias in itertools.product(("none", "map", "row"), (None, 0.5), (False, True)):
        spec = train_gpt.MapSpec("", *shape, basis, seed=4, shared_seed=7)
        spec = spec._replace(adapter=adapter, scale=scale, gate=gate)
        same_as_the_textbook(spec, bias, None if gate is None else squared)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_transposed_map_is_the_adjoint_of_the_map(adapter):
    """<M x, y> = <x, Mᵀ y>, with every scale and gate: the head narrows what the lookup widens."""
    x, y = normal(3, 9, seed=2), normal(3, 12, seed=3)
    for scale, gate in itertools.product(("none", "map", "row"), (None, 0.5)):
        spec = train_gpt.MapSpec("", 12, 9, "uniform", seed=4, shared_seed=7)
        layer = made(spec._replace(adapter=adapter, scale=scale, gate=gate), False)
        torch.testing.assert_close((layer(x) * y).sum(), (x * layer.transposed(y)).sum())


@pytest.mark.parametrize("balance", [0.0, 1e9], ids=["thin", "dense"])
@pytest.mark.parametrize(
    ("basis", "adapters"),
    [
        ("uniform", ("lora:2", "lora:1+rslora:3", "lora:4")),
        ("uniform", ("lora:2", "none", "vera:3")),
        ("uniform", ("none", "none", "none")),
        ("learned", ("none", "none", "none")),
    ],
)
def test_maps_of_one_input_by_one_product_are_the_maps_one_by_one(
    basis, adapters, balance, monkeypatch
):
    """With other ranks, scales and gates in each, by thin gradients and by the dense one."""
    monkeypatch.setitem(train_gpt.MACHINE_BALANCE, "cpu", balance)
    maps = []
    for seed, (adapter, rows, scale, gate) in enumerate(
        zip(adapters, (6, 4, 4), ("none", "row", "map"), (0.5, None, 2.0), strict=True)
    ):
        spec = train_gpt.MapSpec("", rows, 8, basis, seed=seed, shared_seed=7)
        maps.append(made(spec._replace(adapter=adapter, scale=scale, gate=gate)))
    x, row_scale = normal(2, 3, 8).requires_grad_(), normal(14, seed=1).requires_grad_()
    learned = [x, row_scale, *(p for each in maps for p in each.parameters())]
    apart = torch.cat([each(x) for each in maps], -1) * row_scale
    together = train_gpt.fused_linear(x, maps, row_scale)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    dy = normal(2, 3, 14, seed=2)
    gradients = [torch.autograd.grad(y, learned, dy) for y in (together, apart)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("balance", "rows", "columns", "rank", "thin"),
    [
        (264.0, 512, 512, 32, False),  # an H100: memory bounds thin products
        (264.0, 4096, 4096, 32, True),
        (20.0, 256, 256, 32, True),  # a CPU: FLOPs decide
        (20.0, 256, 256, 128, False),
    ],
)
def test_the_cheaper_gradient_is_chosen_by_count(balance, rows, columns, rank, thin, monkeypatch):
    monkeypatch.setitem(train_gpt.MACHINE_BALANCE, "meta", balance)
    shapes = (rows, columns), (rows, rank), (rank, columns)
    merged = train_gpt.MapParts(*(torch.empty(shape, device="meta") for shape in shapes))
    assert merged.low_rank_gradient_pays(has_scale=False) == thin


def test_one_vector_goes_through_a_map_and_back():
    layer = made(train_gpt.MapSpec("", 6, 5, "uniform", seed=4, adapter="lora:2"))
    x = normal(5).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, (layer.weight.double() + layer.lora.A @ layer.lora.B).sum(0))


def test_a_model_without_a_learned_matrix_takes_a_step(variant, processes):
    h = variant(map_basis="uniform", map_adapter="vera:2", bigram_vocab_size=0, ve_enabled=0)
    model = train_gpt.make_model(h)
    groups = train_gpt.tensors_by_role(model)
    assert not groups[train_gpt.Role.MATRIX]
    optimizers = train_gpt.Optimizers(groups, h, processes)
    model(tokens(2, 16), tokens(2, 16, seed=1)).backward()
    before = model.embedding.weight.detach().clone()
    optimizers.step(0, 1.0)
    assert not torch.equal(before, model.embedding.weight)


def test_no_gradient_is_computed_for_a_frozen_map():
    layer = made(train_gpt.MapSpec("", 6, 5, "uniform", seed=4, adapter="lora:2"))
    layer(normal(3, 5)).sum().backward()
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_linear_map_in_bfloat16_is_near_the_one_in_float64(adapter):
    spec = train_gpt.MapSpec("", 40, 48, "gaussian", seed=4, shared_seed=7, adapter=adapter)
    spec = spec._replace(scale="row", gate=0.5)
    torch.manual_seed(1)
    layer, x = train_gpt.Linear(spec), normal(20, 48)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y, exact = layer(x.bfloat16()), layer.double()(x)
    assert y.dtype is torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_mask_passes_the_gradient_of_its_bits_through_a_sigmoid(temperature):
    spec = train_gpt.MapSpec("", 6, 5, "gaussian", seed=4, adapter="mask")
    layer, x, dy = made(spec), normal(8, 5, seed=2), normal(8, 6, seed=3)
    layer.mask.temperature.fill_(temperature)
    layer(x).backward(dy)
    soft = torch.sigmoid(layer.mask.scores.detach() / temperature)
    expected = math.sqrt(2) * layer.weight * (dy.T @ x) * soft * (1 - soft) / temperature
    torch.testing.assert_close(layer.mask.scores.grad, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # only signs count
        y = layer(x)
        layer.mask.scores.mul_(100)
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)


def test_a_new_mask_keeps_half_of_its_map_and_the_length_of_the_output():
    torch.manual_seed(0)
    layer = train_gpt.Linear(train_gpt.MapSpec("", 200, 200, "gaussian", seed=4, adapter="mask"))
    assert (layer.mask.scores > 0).double().mean() == pytest.approx(0.5, abs=0.02)
    x = torch.randn(50, 200)
    ratio = layer(x).detach().norm() / (x @ layer.weight.float().T).norm()
    assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("density", "in_features", "count"),
    [(0.1, 40, 4), (0.3, 9, 3), (1.0, 9, 9), (1 / 9, 9, 1), (0.25, 10, 2)],
)
def test_places_of_a_sparse_adapter_are_a_share_of_each_row(density, in_features, count):
    spec = train_gpt.MapSpec("", 30, in_features, "uniform", seed=4)
    sparse = train_gpt.Sparse(spec, density)
    assert sparse.support.shape == sparse.values.shape == (30, count)
    for places in sparse.support.tolist():
        assert places == sorted(set(places))
        assert 0 <= places[0] <= places[-1] < in_features
    again = train_gpt.Sparse(spec, density)
    other = train_gpt.Sparse(spec._replace(seed=5), density)
    assert torch.equal(again.support, sparse.support)
    if count < in_features:
        assert not torch.equal(other.support, sparse.support)


def test_places_of_a_sparse_adapter_are_spread_evenly():
    sparse = train_gpt.Sparse(train_gpt.MapSpec("", 2000, 20, "uniform", seed=4), 0.25)
    shares = sparse.support.flatten().bincount(minlength=20) / 2000
    assert (shares - 0.25).abs().max() < 0.05


@pytest.mark.parametrize(
    "adapter", ["lora:3", "vera:3", "sparse:0.3", "mask", "signs", "combination:40"]
)
def test_every_adapter_reduces_an_error_by_gradients(adapter):
    """Adam for a few steps towards another map."""
    torch.manual_seed(0)
    layer = train_gpt.Linear(train_gpt.MapSpec("", 12, 12, "gaussian", seed=4, adapter=adapter))
    x, target = torch.randn(64, 12), torch.randn(12, 12) / 12**0.5
    optimizer, losses = torch.optim.Adam(layer.parameters(), 0.05), []
    for _ in range(60):
        loss = (layer(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


# ---- New models ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def variant(settings):
    """variant(**changes): tiny settings without adapters, unless they are asked for."""
    return lambda **changes: settings(**({"map_adapter": "none"} | changes))


@pytest.mark.parametrize(
    "adapter",
    [
        "lora:4",
        "rslora:4",
        "vera:4",
        "sparse:0.2",
        "signs",
        "combination:3",
        "sparse:0.1+lora:2+vera:3",
    ],
)
@pytest.mark.parametrize("scale", ["none", "map", "row"])
def test_a_new_model_computes_as_its_bare_maps_do(variant, adapter, scale):
    """Whatever is learned, beside whichever maps, begins as no change."""
    h = variant(map_basis="uniform", map_adapter=adapter, map_scale=scale)
    torch.manual_seed(0)
    model = train_gpt.make_model(h).double()
    bare = train_gpt.make_model(variant(map_basis="uniform")).double()
    own = {name for name, _ in bare.named_parameters()}
    bare.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    assert len(model.state_dict()) > len(own)
    with torch.no_grad():
        expected = head_input(bare, tokens(2, 16))
        assert expected.std() > 0.1
        actual = head_input(model, tokens(2, 16))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a != "none"])
def test_nothing_random_is_saved(variant, adapter):
    h = variant(map_basis="gaussian", map_adapter=adapter, map_scale="map")
    model = train_gpt.make_model(h)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    of_blocks = [name for name in model.state_dict() if name.startswith("blocks.")]
    random_ends = (".weight", ".support", ".maps", "vera.A", "vera.B")
    assert [name for name in of_blocks if name.endswith(random_ends)] == []


def test_vera_shares_its_factors_between_maps_of_one_shape(variant):
    model = train_gpt.make_model(variant(map_adapter="vera:4"))
    places = {}
    for spec in model.random_maps():
        vera = model.get_submodule(spec.name).vera
        for name, size in (("A", spec.in_features), ("B", spec.out_features)):
            places.setdefault((name, size), set()).add(getattr(vera, name).data_ptr())
    assert len(model.random_maps()) == 24
    assert len({spec.shape for spec in model.random_maps()}) == 4
    assert places.keys() == {("A", 32), ("A", 96), ("B", 16), ("B", 32), ("B", 96)}
    assert {len(found) for found in places.values()} == {1}


def test_vera_factors_are_random_normal_and_not_the_maps():
    a, b = (train_gpt.shared_factor(64, 128, seed).double() for seed in (12_345, 12_346))
    assert a.std() == pytest.approx(128**-0.5, rel=0.03)
    assert F.cosine_similarity(a.flatten(), b.flatten(), 0).abs() < 0.05
    as_map = train_gpt.gaussian(64, 128, 12_345)
    assert F.cosine_similarity(a.flatten(), as_map.flatten(), 0).abs() < 0.05


@pytest.mark.parametrize("adapter", ["vera:4", "sparse:0.3"])
def test_the_fingerprint_is_of_all_that_seeds_generate(variant, adapter):
    """Other places or factors give garbage as surely as other maps do."""
    h = variant(map_adapter=adapter)
    model = train_gpt.make_model(h)
    assert model.fingerprint() == train_gpt.make_model(h).fingerprint()
    assert model.fingerprint() != train_gpt.make_model(variant()).fingerprint()
    changed = copy.deepcopy(model)
    module = changed.get_submodule("blocks.1.mlp.fc")
    generated = module.vera.A if adapter.startswith("vera") else module.sparse.support
    generated[0, 0] = 1 - generated[0, 0]
    assert changed.fingerprint() != model.fingerprint()


@pytest.mark.parametrize(
    "bad",
    [
        "lora:0",
        "lora:17",
        "lora",
        "lora:2.5",
        "vera:-1",
        "sparse:0",
        "sparse:1.1",
        "sparse",
        "mask:3",
        "signs:3",
        "combination:0",
        "combination:1.5",
        "dora:4",
        "lora:4+",
        "",
    ],
)
def test_adapters_that_fit_no_map_are_refused(variant, bad):
    """The narrowest map is 16 wide."""
    with pytest.raises(train_gpt.UserError, match="MAP_ADAPTER"):
        variant(map_adapter=bad)


def test_an_adapter_named_twice_is_refused(variant):
    """Table and log would show both, and the model would have the second alone."""
    with pytest.raises(train_gpt.UserError, match="MAP_ADAPTER"):
        variant(map_adapter="lora:4+lora:8")


# ---- Shared matrices -----------------------------------------------------------------------------


def permuted(twist: train_gpt.PermutationTwist, w: torch.Tensor) -> torch.Tensor:
    """Return P W Q entry by entry."""
    out = torch.empty_like(w)
    for i, row in enumerate(twist.row_order.tolist()):
        for j, column in enumerate(twist.column_order.tolist()):
            out[i, j] = w[row, column] * twist.row_signs[i] * twist.column_signs[j]
    return out


def test_a_permutation_twist_moves_rows_and_columns_and_changes_signs():
    twist = train_gpt.PermutationTwist(train_gpt.MapSpec("", 6, 9, "shared", seed=4))
    w = normal(6, 9)
    assert torch.equal(twist(w), permuted(twist, w))
    assert sorted(twist(w).abs().flatten().tolist()) == sorted(w.abs().flatten().tolist())
    for order, signs in (
        (twist.row_order, twist.row_signs),
        (twist.column_order, twist.column_signs),
    ):
        assert order.sort().values.tolist() == list(range(len(order)))
        assert signs.abs().unique().tolist() == [1.0]


@pytest.mark.parametrize("name", train_gpt.TWISTS)
def test_a_twist_keeps_singular_values_and_is_of_its_seed_alone(name):
    spec = train_gpt.MapSpec("", 24, 40, "shared", twist=name, seed=4)
    twist, again = train_gpt.TWISTS[name](spec), train_gpt.TWISTS[name](spec)
    other = train_gpt.TWISTS[name](spec._replace(seed=5))
    w = normal(24, 40)
    torch.testing.assert_close(
        torch.linalg.svdvals(twist(w)), torch.linalg.svdvals(w), rtol=0.02, atol=0
    )
    assert torch.equal(twist(w), again(w))
    assert not torch.equal(twist(w), other(w))
    assert twist.state_dict() == {}


@pytest.mark.parametrize("name", train_gpt.TWISTS)
def test_a_twisted_hessian_measures_the_same_error(name):
    """The error of the outputs, tr(E H Eᵀ), for a change of the shared matrix."""
    twist = train_gpt.TWISTS[name](train_gpt.MapSpec("", 12, 9, "shared", twist=name, seed=4))
    x, change = normal(50, 9), normal(12, 9, seed=1)
    own = twist.untwist_hessian(x.T @ x)
    error = (x @ twist(change).T).square().sum()
    ours = (change @ own @ change.T).trace()
    torch.testing.assert_close(ours, error, rtol=1e-10 if name == "permutation" else 0.02, atol=0)


@pytest.mark.parametrize(("count", "depth"), [(1, 0.5), (3, 0.0), (3, 0.25), (4, 1.0)])
def test_a_layer_starts_as_a_mix_of_the_two_nearest_matrices(count, depth):
    weights = train_gpt.depth_weights(count, depth)
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).sum() <= 2
    if count > 1:
        center = (weights * torch.arange(count)).sum() / (count - 1)
        assert center == pytest.approx(depth)


def test_each_layer_of_a_model_starts_as_the_mix_of_its_depth(variant):
    """Else all layers would be one layer at first (PR #812)."""
    model = train_gpt.GPT(variant(map_basis="shared:3", map_adapter="none", num_layers=5))
    for layer, block in enumerate(model.blocks):
        for part in (block.attention.q, block.mlp.fc):
            assert torch.equal(part.shared_mix, train_gpt.depth_weights(3, layer / 4))


@pytest.mark.parametrize("basis", ["shared", "shared:3"])
@pytest.mark.parametrize("twist", ["none", *train_gpt.TWISTS])
def test_layers_share_matrices_and_each_has_its_own_twist(variant, random_model, basis, twist):
    h = variant(map_basis=f"mlp.fc={basis},attention=learned", map_twist=f"mlp.fc={twist}")
    model = random_model(h, torch.float64)
    shared = model.shared[f"mlp_fc:{basis}"]
    maps = [block.mlp.fc for block in model.blocks]
    for layer in maps:
        weight = sum(c * w for c, w in zip(mix_of(layer), shared.weights(), strict=True))
        if layer.twist is not None:
            weight = layer.twist(weight)
        x = normal(3, 32)
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=1e-12)
    weights = [layer.base_weight() for layer in maps]
    differ = basis != "shared" or twist != "none"
    for one, other in itertools.combinations(weights, 2):
        assert torch.equal(one, other) != differ
    stored = [name for name in model.state_dict() if "mlp.fc" in name or "shared" in name]
    count = int(basis.partition(":")[2] or 1)
    mixes = 4 if count > 1 else 0
    assert len(stored) == count + mixes


def mix_of(layer: train_gpt.Linear) -> list[torch.Tensor]:
    return [torch.tensor(1.0)] if layer.shared_mix is None else list(layer.shared_mix)


def test_a_shared_matrix_learns_from_every_layer(variant):
    """Its gradient is the sum of those that separate matrices in the layers would get."""
    h = variant(map_basis="mlp.fc=shared", map_twist="mlp.fc=permutation")
    torch.manual_seed(0)
    model = train_gpt.make_model(h)
    ids, targets = tokens(2, 16), tokens(2, 16, seed=1)
    model(ids, targets).backward()
    (shared,) = model.shared["mlp_fc:shared"].weights()
    total = shared.grad
    model.zero_grad()
    separate = [copy.deepcopy(model.shared["mlp_fc:shared"]) for _ in model.blocks]
    for block, own in zip(model.blocks, separate, strict=True):
        block.mlp.fc.shared_matrices = (own,)
    model(ids, targets).backward()
    gradients = [own.weights()[0].grad for own in separate]
    torch.testing.assert_close(sum(gradients), total, rtol=1e-4, atol=1e-6)


# ---- Artifact ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(1, 7)], [(1, 8)], [(1, 9)], [(3, 5), (4, 4), (1, 1), (7, 11)], [(13, 21)] * 3],
)
def test_masks_survive_the_artifact_exactly(shapes):
    """Also those whose size is no multiple of 8, among tensors of other kinds."""
    torch.manual_seed(0)
    masks = {f"blocks.{i}.mask.scores": torch.rand(shape) > 0.4 for i, shape in enumerate(shapes)}
    others = {
        "gate": torch.randn(5),
        "a.weight": train_gpt.Quantizer(6, 10.0).quantize(torch.randn(4, 6)),
    }
    blob, sizes = train_gpt.write_artifact({}, masks | others)
    header, tensors = train_gpt.read_artifact(blob)
    assert tensors.keys() == (masks | others).keys()
    for name, mask in masks.items():
        assert torch.equal(tensors[name], mask.float())
    assert torch.equal(tensors["gate"], others["gate"].half().float())
    assert torch.equal(tensors["a.weight"], others["a.weight"].dequantize())
    place = len(blob) - 32 - sum(sum(blocks) for _, blocks in header["groups"])
    for group, blocks in header["groups"]:
        if group == "scores bits":
            (packed,) = blocks
            raw = brotli.decompress(blob[place : place + packed])
        place += sum(blocks)
    assert len(raw) == sum(math.ceil(rows * columns / 8) for rows, columns in shapes)
    assert sizes["scores bits"] > 0


def quantizers() -> dict[train_gpt.Role, train_gpt.Quantizer]:
    """Return those of the default settings."""
    return train_gpt.make_quantizers(train_gpt.load_settings({}))


def test_a_mask_is_exported_as_the_signs_of_its_scores():
    layer = made(train_gpt.MapSpec("", 7, 5, "gaussian", seed=4, adapter="mask"))
    codes = layer.mask.quantize(quantizers(), None)
    x, y = normal(4, 5), layer(normal(4, 5))
    assert codes["scores"].dtype is torch.bool
    with torch.no_grad():
        layer.mask.scores.copy_(codes["scores"].float())
    assert torch.equal(layer(x), y)


def test_a_sparse_adapter_is_rounded_without_a_hessian():
    """Each of its rows sees inputs of its own: no (in, in) matrix fits its (out, count) values."""
    spec = train_gpt.MapSpec("", 8, 20, "uniform", seed=4, adapter="sparse:0.3+lora:2")
    layer = made(spec).float()
    x = torch.randn(100, 20)
    codes = layer.sparse.quantize(quantizers(), x.T @ x)["values"]
    nearest = quantizers()[train_gpt.Role.SPARSE].quantize(layer.sparse.values.data)
    assert torch.equal(codes.codes, nearest.codes)
    assert layer.lora.quantize(quantizers(), x.T @ x).keys() == {"A", "B"}


def stored_bytes(spec: train_gpt.MapSpec) -> int:
    return train_gpt.stored_bytes(train_gpt.Linear(spec))


def test_stored_bytes_of_each_kind():
    """Literals: 10 x 6 with codes and exponents of a byte, floats of two and masks of a bit."""
    expected = {
        "none": 0,
        "lora:3": 30 + 10 + 18 + 3,
        "rslora:1": 10 + 10 + 6 + 1,
        "vera:3": 2 * 13,
        "sparse:0.5": 30 + 10,
        "mask": 8,
        "signs": 8,
        "combination:5": 2 * 5,
        "mask+lora:1": 8 + 27,
    }
    for adapter, size in expected.items():
        spec = train_gpt.MapSpec("", 10, 6, "uniform", seed=4, adapter=adapter)
        assert stored_bytes(spec) == size, adapter
        assert stored_bytes(spec._replace(scale="row", gate=0.0)) == size + 40, adapter
        assert stored_bytes(spec._replace(scale="map")) == size + 2, adapter
    assert stored_bytes(train_gpt.MapSpec("", 10, 6)) == 70


# ---- Freezing ------------------------------------------------------------------------------------


def take_steps(
    model: train_gpt.LanguageModel, optimizers: train_gpt.Optimizers, steps: range
) -> None:
    for step in steps:
        model(tokens(4, 16, seed=step), tokens(4, 16, seed=step + 100)).backward()
        optimizers.step(step, 1.0)


def begun(h: train_gpt.Hyperparameters, processes) -> tuple:
    """Return a model with its phases and optimizers, after two steps of the first phase."""
    torch.manual_seed(0)
    model = train_gpt.make_model(h)
    phases = train_gpt.Phases(h, model, None, compiled=False)
    optimizers = train_gpt.Optimizers(train_gpt.tensors_by_role(model), h, processes)
    phases.enter(0.0)
    take_steps(model, optimizers, range(2))
    return model, phases, optimizers


def test_the_state_of_frozen_maps_is_freed_and_that_of_the_others_stays(variant, processes):
    h = variant(
        map_basis="learned,attention=uniform",
        map_adapter="attention=lora:2+sparse:0.2",
        map_scale="attention=row",
        map_freeze="mlp.in=0.5,attention@1=0.5",
    )
    model, phases, optimizers = begun(h, processes)
    phases.enter(0.5)
    names = {p: name for name, p in model.named_parameters()}
    frozen = {name for name in names.values() if name.endswith("mlp.fc.weight")}
    of_attention = tuple(f"blocks.1.attention.{kind}." for kind in ("q", "k", "v", "proj"))
    frozen |= {name for name in names.values() if name.startswith(of_attention)}
    assert {names[p] for p in optimizers.params if not p.requires_grad} == frozen
    states = (optimizers.muon.state, optimizers.adam.state)
    held = {names[p] for state in states for p in state if state[p]}
    assert held == set(names.values())
    values = {name: p.detach().clone() for p, name in names.items()}
    take_steps(model, optimizers, range(2, 4))
    for p, name in names.items():
        assert torch.equal(p, values[name]) == (name in frozen), name
    assert {names[p] for state in states for p in state} == held - frozen


def test_those_that_go_on_move_as_if_nothing_had_been_forgotten(variant, processes):
    """Against steps that leave the frozen ones without a gradient and keep their state."""
    h = variant(map_basis="learned", map_freeze="mlp.in=0.5")
    model, phases, optimizers = begun(h, processes)
    phases.enter(0.7)
    take_steps(model, optimizers, range(2, 4))
    expected_model, _, expected_optimizers = begun(h, processes)
    for step in (2, 3):
        expected_model(tokens(4, 16, seed=step), tokens(4, 16, seed=step + 100)).backward()
        for name, p in expected_model.named_parameters():
            p.grad = None if name.endswith("mlp.fc.weight") else p.grad
        expected_optimizers.step(step, 1.0)
    both = zip(model.named_parameters(), expected_model.parameters(), strict=True)
    for (name, p), expected in both:
        assert torch.equal(p, expected), name
        assert p.requires_grad != name.endswith("mlp.fc.weight")
        if p.requires_grad:
            state = optimizers.muon.state[p] | optimizers.adam.state[p]
            other = expected_optimizers.muon.state[expected]
            other = other | expected_optimizers.adam.state[expected]
            assert state.keys() == other.keys() != set()
            for key in state:
                values = (torch.as_tensor(each[key]) for each in (state, other))
                assert torch.equal(*values), (name, key)


def test_averages_leave_frozen_tensors_as_they_stand(variant):
    h = variant(ema_decay=0.9, swa_interval=1, swa_threshold=1)
    frozen, learned = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    averages, seen = train_gpt.WeightAverages([frozen, learned], h), []
    for step in range(8):
        with torch.no_grad():
            frozen.add_(float(frozen.requires_grad))
            learned.add_(1.0)
        seen.append(learned.detach().clone().double())
        averages.update(step, 0.5)
        if step == 3:
            frozen.requires_grad_(False)
    assert all(frozen not in means for means in averages.means.values()), "their memory is freed"
    found = averages.candidates()
    assert found.keys() == {"last", "ema", "swa"}
    for name, (kept, mean) in found.items():
        assert torch.equal(kept, torch.full((3,), 4.0)), name
        assert kept.data_ptr() != frozen.data_ptr(), "a candidate is a copy"
        weights = {
            "last": [0] * 7 + [1],
            "swa": [1] * 8,
            "ema": [0.9 ** (7 - i) for i in range(8)],
        }[name]
        pairs = zip(weights, seen, strict=True)
        expected = sum(weight * value for weight, value in pairs) / sum(weights)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)


# ---- Losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.3, 1.0), (1.0, 3.0), (0.0, 0.5)])
def test_the_distillation_loss_is_its_formula(variant, random_model, alpha, temperature):
    h = variant(distill_alpha=alpha, distill_temperature=temperature, map_adapter="lora:4")
    model, ids, targets = random_model(h), tokens(3, 16), tokens(3, 16, seed=1)
    taught = 3 * normal(3, 16, 64, seed=2)
    student = model.predict(ids, 16).detach().double().numpy()

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    entropies, divergences = [], []
    for row, position in np.ndindex(3, 16):
        mine, theirs = student[row, position], taught[row, position].numpy()
        entropies.append(-np.log(softmax(mine)[targets[row, position]]))
        p, q = softmax(theirs / temperature), softmax(mine / temperature)
        divergences.append((p * np.log(p / q)).sum())
    expected = alpha * np.mean(entropies) + (1 - alpha) * temperature**2 * np.mean(divergences)
    assert model(ids, targets, taught.float()).item() == pytest.approx(expected, rel=1e-5)
    assert model(ids, targets).item() == pytest.approx(np.mean(entropies), rel=1e-5)


def test_a_student_that_agrees_with_its_teacher_has_no_divergence(variant, random_model):
    h = variant(distill_alpha=0.0)
    model, ids, targets = random_model(h), tokens(3, 16), tokens(3, 16, seed=1)
    assert model(ids, targets, model.predict(ids, 16).detach()).abs() < 1e-6


def test_a_teacher_is_not_learned_and_does_not_drop_out(variant):
    h = variant(self_distill=1, distill_start_frac=0.2, dropout=0.5, map_adapter="lora:4")
    model = train_gpt.make_model(h).train()
    phases = train_gpt.Phases(h, model, None, compiled=False)
    phases.enter(0.2)
    ids = tokens(2, 16)
    assert not any(p.requires_grad for p in phases.teacher.parameters())
    first, second = phases.teacher_logits(ids), phases.teacher_logits(ids)
    assert torch.equal(first, second)
    assert not first.requires_grad


@pytest.fixture(scope="module")
def ensemble(variant) -> tuple[train_gpt.Hyperparameters, train_gpt.Ensemble]:
    h = variant(ensemble=2, map_basis="m0.all=uniform,m1.all=orthogonal", map_adapter="lora:4")
    torch.manual_seed(0)
    model = train_gpt.make_model(h)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return h, model


def test_an_ensemble_predicts_the_mean_of_its_members_logits(ensemble):
    _, model = ensemble
    ids, targets = tokens(2, 16), tokens(2, 16, seed=1)
    assert isinstance(model, train_gpt.Ensemble)
    with torch.no_grad():
        each = [member.predict(ids, 16) for member in model.members]
        assert (each[0] - each[1]).abs().max() > 0.1
        mean = (each[0].double() + each[1].double()) / 2
        torch.testing.assert_close(model.predict(ids, 16).double(), mean, rtol=0, atol=1e-5)
        expected = -mean.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        for last in (16, 3):
            losses = model.token_losses(ids, targets[:, -last:]).double()
            torch.testing.assert_close(losses, expected[:, -last:], rtol=0, atol=1e-5)
        separate = sum(member(ids, targets) for member in model.members) / 2
        torch.testing.assert_close(model(ids, targets), separate)


@pytest.mark.parametrize("teaching", [False, True])
def test_members_of_an_ensemble_learn_each_for_itself(ensemble, teaching):
    """What member 1 knows does not touch the gradient of member 0.

    They do not specialize on each other.
    """
    _, model = ensemble
    ids, targets = tokens(2, 16), tokens(2, 16, seed=1)
    taught = normal(2, 16, 64).float() if teaching else None

    def gradients_of_first(ensemble, learner):
        first = ensemble.members[0]
        return torch.autograd.grad(learner(ids, targets, taught), list(first.parameters()))

    together = gradients_of_first(model, model)
    alone = gradients_of_first(model, model.members[0])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for p in changed.members[1].parameters():
            p.add_(torch.randn_like(p))
    beside_another = gradients_of_first(changed, changed)
    for a, b, c in zip(together, beside_another, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c / 2)


def test_members_of_an_ensemble_have_maps_and_weights_of_their_own(variant):
    model = train_gpt.make_model(variant(ensemble=3, map_adapter="lora:4"))
    seeds = [spec.seed for spec in model.random_maps()]
    assert len(seeds) == len(set(seeds)) == 3 * 24
    for name in ("blocks.0.mlp.fc.weight", "embedding.weight", "blocks.0.mlp.fc.lora.B"):
        path, _, last = name.rpartition(".")
        values = [getattr(member.get_submodule(path), last) for member in model.members]
        for one, other in itertools.combinations(values, 2):
            assert not torch.equal(one, other)


# ---- Blocks --------------------------------------------------------------------------------------


def order_of(model: train_gpt.GPT) -> list[int]:
    """Return the layers that really run, one after the other."""
    seen = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, layer=i: seen.append(layer))
        for i, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        model.predict(tokens(1, 8))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("layers", "recurring", "times", "expected"),
    [
        (11, "3-5", 3, [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]),
        (4, "0", 2, [0, 0, 1, 2, 3]),
        (4, "3", 4, [0, 1, 2, 3, 3, 3, 3]),
        (3, "0-2", 2, [0, 1, 2, 0, 1, 2]),
        (4, "1-2", 1, [0, 1, 2, 3]),
        (4, "", 3, [0, 1, 2, 3]),
    ],
)
def test_layers_recur_in_this_order(variant, layers, recurring, times, expected):
    h = variant(num_layers=layers, recur_layers=recurring, recur_times=times)
    model = train_gpt.make_model(h)
    assert h.block_order == order_of(model) == expected
    model.set_recurrence(False)
    assert order_of(model) == list(range(layers))
    model.set_recurrence(True)
    assert order_of(model) == expected


def test_recurrence_begins_at_its_progress(variant):
    h = variant(recur_layers="1", recur_times=2, recur_frac=0.4)
    model = train_gpt.make_model(h)
    phases = train_gpt.Phases(h, model, None, compiled=False)
    times = ((0.0, False), (0.39, False), (0.4, True), (1.0, True), (0.0, False))
    for progress, recurs in times:
        phases.enter(progress)
        assert order_of(model) == ([0, 1, 1, 2, 3] if recurs else [0, 1, 2, 3])


@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize(
    ("layers", "recurring"), [(6, ""), (5, ""), (6, "2-3"), (6, "1"), (6, "4")]
)
def test_skips_pair_the_halves_with_recurrence_too(variant, random_model, gated, layers, recurring):
    """Layer n/2 + i adds what left layer n/2 - 1 - i last, whenever it runs.

    Blocks are taken as they are.
    """
    h = variant(
        num_layers=layers,
        recur_layers=recurring,
        recur_times=3,
        ve_enabled=0,
        map_adapter="lora:4",
        skip_gates_enabled=gated,
        bigram_vocab_size=0,
        smear_enabled=0,
    )
    model, ids, half = random_model(h).double(), tokens(2, 8), layers // 2
    model.embedding.dtype = torch.float64
    order = list(range(layers))
    for layer in reversed(range(layers)):
        named = [int(text) for text in recurring.split("-")] if recurring else []
        if named and layer == named[-1]:
            again = list(range(named[0], named[-1] + 1))
            order = order[: layer + 1] + again + again + order[layer + 1 :]
    with torch.no_grad():
        x = x0 = train_gpt.norm(model.embedding.weight[ids])
        context = model.attention_context(x, streaming=False)
        left, values = {}, None
        for layer in order:
            i = layer - half
            if 0 <= i < half:
                skip = model.skip_weights[i] * left[half - 1 - i]
                gate = 1 / (1 + torch.exp(-model.skip_gates[i])) if gated else None
                x = gate * x + (1 - gate) * skip if gated else x + skip
            x, own = model.blocks[layer](x, x0, context, None, values)
            values = own if values is None else values
            left[layer] = x
        expected = train_gpt.norm(x)
        torch.testing.assert_close(head_input(model, ids), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_block_runs_its_parts_side_by_side_or_one_after_the_other(
    variant, random_model, parallel
):
    h = variant(parallel_from=1 if parallel else 4, map_adapter="lora:4")
    model = random_model(h, torch.float64)
    x, x0, first = normal(2, 5, 32), normal(2, 5, 32, seed=1), normal(2, 5, h.kv_dim, seed=2)
    context = model.attention_context(x, streaming=False)
    once = torch.ones(32, dtype=torch.float64)

    def normalized(x, layer):
        mean_square = x.square().mean(-1, keepdim=True)
        return x / (mean_square + torch.finfo(x.dtype).eps).sqrt() / math.sqrt(layer + 1)

    for layer, block in enumerate(model.blocks):
        with torch.no_grad():
            y, own = block(x, x0, context, None, first)
            mixed = block.stream_mix * x + block.embedding_mix * x0
            seen = normalized(mixed, layer)
            attended, values = block.attention(seen, once, context, None, first)
            after = mixed + block.attention_scale * attended
            if not (parallel and layer >= 1):
                seen = normalized(after, layer)
            expected = after + block.mlp_scale * block.mlp(seen, once)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(own, values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adapter", ["none", "lora:4", "sparse:0.2+lora:4"])
def test_the_gated_mlp_is_geglu(variant, random_model, adapter):
    h = variant(
        mlp_gated=1,
        map_basis="mlp=gaussian",
        map_adapter=adapter,
        map_scale="row",
        map_gate="mlp.in=0.5,mlp.proj=1",
    )
    mlp, x = random_model(h, torch.float64).blocks[1].mlp, normal(2, 5, 32)

    def dense(layer):
        weight = layer.weight.detach().clone()
        if hasattr(layer, "lora"):
            weight += layer.lora.A @ layer.lora.B
        if hasattr(layer, "sparse"):
            for i, places in enumerate(layer.sparse.support.tolist()):
                for j, place in enumerate(places):
                    weight[i, place] += layer.sparse.values[i, j]
        return layer.scale[:, None] * weight

    with torch.no_grad():
        gate = x @ dense(mlp.gate).T
        gate = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * mlp.gate.gate
        value = x @ dense(mlp.fc).T * mlp.fc.gate
        expected = (value * gate) @ dense(mlp.proj).T * mlp.proj.gate
        once = torch.ones(32, dtype=torch.float64)
        torch.testing.assert_close(mlp(x, once), expected, rtol=0, atol=1e-9)


def test_a_hidden_gate_of_zero_silences_the_mlp_at_first_and_learns(variant):
    h = variant(map_basis="mlp=gaussian", map_adapter="lora:4", map_gate="mlp.fc=0")
    torch.manual_seed(0)
    model, ids, targets = train_gpt.make_model(h), tokens(4, 16), tokens(4, 16, seed=1)
    x, once = torch.randn(2, 3, 32), torch.ones(32)
    for block in model.blocks:
        assert block.mlp.fc.gate.shape == (h.mlp_dim,)
        assert block.mlp(x, once).abs().max() == 0
        assert block.mlp.proj.gate is None
    model(ids, targets).backward()
    for block in model.blocks:
        assert block.mlp.fc.gate.grad.abs().min() > 0
        assert block.mlp.proj.lora.A.grad.abs().max() == 0
    with torch.no_grad():
        before = model(ids, targets)
        for block in model.blocks:
            block.mlp.fc.gate -= 0.1 * block.mlp.fc.gate.grad.sign()
        assert model(ids, targets) != before
        assert model.blocks[0].mlp(x, once).abs().max() > 0


@pytest.mark.parametrize("parallel", [0, 4])
def test_dropout_is_of_training_alone(variant, random_model, parallel):
    """And of what attention and MLP add to the stream, with what is left scaled up."""
    ids = tokens(2, 16)
    model = random_model(variant(dropout=0.3, map_adapter="lora:4", parallel_from=parallel))
    plain = random_model(variant(map_adapter="lora:4", parallel_from=parallel))
    with torch.no_grad():
        model.train()
        assert not torch.equal(model.predict(ids, 16), model.predict(ids, 16))
        model.eval()
        assert torch.equal(model.predict(ids, 16), model.predict(ids, 16))
        assert torch.equal(model.predict(ids, 16), plain.train().predict(ids, 16))
    dropped = model.blocks[0].train().dropout(torch.ones(100_000))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (dropped == 0).double().mean() == pytest.approx(0.3, abs=0.01)
