"""Bases, adapters and what else a row of the map table can ask for, against plain restatements in float64."""

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

import train_gpt

SHAPES = [(64, 64), (128, 32), (32, 128), (48, 48), (96, 40), (40, 96), (1, 7), (7, 1), (1, 1)]
each_basis = pytest.mark.parametrize("basis", train_gpt.BASES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- Bases -------------------------------------------------------------------------------------------------


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
def test_a_drawn_map_is_its_basis_times_its_gain_in_bfloat16(basis, gain):
    drawn = train_gpt.draw_map(train_gpt.MapRow("", 24, 40, basis, 9, gain=gain))
    assert drawn.dtype is torch.bfloat16
    assert drawn.is_contiguous()
    assert torch.equal(drawn, (train_gpt.BASES[basis](24, 40, 9) * gain).to(torch.bfloat16))


@pytest.mark.parametrize("basis", ["gaussian", "uniform", "rademacher", "hadamard"])
def test_entries_have_no_preferred_sign_row_or_column(basis):
    entries = train_gpt.BASES[basis](256, 256, 3) * 16
    assert entries.mean().abs() < 5 / 256
    assert (entries.mean(0).abs().max(), entries.mean(1).abs().max()) < (0.4, 0.4)


def test_different_seeds_are_unrelated():
    """Neighbours too, which are what the maps of one layer have."""
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
    assert drawn.abs().max() <= 1
    assert (drawn.min(), drawn.max()) < (-0.999, 1)
    assert drawn.max() > 0.999
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
    cosines = (tall.T @ tall) / (entry**2 * len(tall)) - torch.eye(
        tall.size(1), dtype=torch.float64
    )
    assert cosines.abs().max() < 6 * math.sqrt((1 - len(tall) / size) / len(tall)) + 1e-12
    assert torch.linalg.matrix_rank(drawn) >= 0.9 * min(shape)


def test_hadamard_maps_do_not_depend_on_the_release_of_numpy(monkeypatch):
    """Its function that counts bits came with 2.0; without it the same map is drawn."""
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
    assert sha256(train_gpt.draw_map(train_gpt.MapRow("", 24, 40, basis, 12_345))) == GOLDEN[basis]


def test_what_adapters_draw_is_what_artifacts_were_made_with():
    row = train_gpt.MapRow("", 24, 40, "uniform", 12_345, 77)
    vera, sparse = train_gpt.VeRA(row, 3), train_gpt.Sparse(row, 0.2)
    assert sha256(vera.A) == "d9de1af6d9b599cf5675cd3f79a446b7a690b7ed2f9683b02e25132f60b3ae6a"
    assert sha256(vera.B) == "8e2750bbfc40c042e92f49b925b2fca4e25efe9a3bbd8c1a9aea6e981d55ae2f"
    assert (
        sha256(sparse.support) == "51755b379b60a3d4a4f28f15945dd8728c24f50e279b7f3548f2bdc143dc94b4"
    )


# ---- Linear layers -----------------------------------------------------------------------------------------

ADAPTERS = [
    "none",
    "lora:3",
    "rslora:3",
    "vera:3",
    "sparse:0.3",
    "mask",
    "lora:2+sparse:0.4",
    "mask+lora:2",
    "vera:2+rslora:4",
    "sparse:0.2+vera:2+lora:1",
    "mask+sparse:0.3+vera:3+rslora:2+lora:4",
]


def squared(y: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(y, 0.5).square()


def made(row: train_gpt.MapRow, bias: bool = False) -> train_gpt.Linear:
    """In float64, and no learned value is at its initial value, which would hide mistakes."""
    torch.manual_seed(1)
    layer = train_gpt.Linear(row, bias=bias).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def textbook(
    layer: train_gpt.Linear, row: train_gpt.MapRow, p: dict, x: torch.Tensor, activation=None
):
    """Each adapter as its paper has it: a path of its own beside that of the map."""
    w = p.get("weight", layer.weight)
    y = torch.zeros(*x.shape[:-1], row.out_features, dtype=torch.float64)
    if "mask.scores" not in p:
        y = y + x @ w.T
    for part in row.adapter.split("+"):
        name = part.partition(":")[0]
        if name in ("lora", "rslora"):
            a, b = p[f"{name}.A"], p[f"{name}.B"]
            y = y + (x @ b.T) @ a.T / (1 if name == "lora" else math.sqrt(a.shape[1]))
        if name == "vera":
            y = y + ((x @ layer.vera.A.T) * p["vera.d"]) @ layer.vera.B.T * p["vera.b"]
        if name == "sparse":
            lines = []
            for values, places in zip(p["sparse.values"], layer.sparse.support.tolist()):
                lines.append(sum(value * x[..., place] for value, place in zip(values, places)))
            y = y + torch.stack(lines, -1)
        if name == "mask":
            y = y + math.sqrt(2) * x @ (w * p["mask.scores"]).T
    y = y * p["scale"] if "scale" in p else y
    y = y + p["bias"] if "bias" in p else y
    y = y if activation is None else activation(y)
    return y * p["gate"] if "gate" in p else y


def same_as_the_textbook(row: train_gpt.MapRow, bias: bool, activation) -> None:
    layer, x = made(row, bias), normal(2, 3, row.in_features, seed=2).requires_grad_()
    p = {name: value.detach().clone() for name, value in layer.named_parameters()}
    if (
        "mask.scores" in p
    ):  # the mask is what is differentiated: scores get the gradient of their bits
        p["mask.scores"] = (p["mask.scores"] > 0).double()
    p = {name: value.requires_grad_() for name, value in p.items()}
    y, expected = layer(x, activation=activation), textbook(layer, row, p, x, activation)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    dy = normal(*y.shape, seed=3)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    theirs = torch.autograd.grad(expected, [x, *p.values()], dy)
    for name, mine, their in zip(["x", *p], ours, theirs):
        assert mine.abs().max() > 0, name
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(mine, their, rtol=1e-12, atol=1e-10, msg=message)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("basis", "shape"),
    [("uniform", (12, 9)), ("uniform", (6, 14)), ("learned", (12, 9))],
    ids=["tall", "wide", "learned"],
)
def test_a_linear_map_and_its_gradients_are_the_textbooks(adapter, basis, shape):
    """With every scale and gate. A learned map beside adapters takes a dense gradient through the product."""
    for scale, gate, bias in itertools.product(("none", "map", "row"), (None, 0.5), (False, True)):
        row = train_gpt.MapRow("", *shape, basis, 4, 7, adapter=adapter, scale=scale, gate=gate)
        same_as_the_textbook(row, bias, None if gate is None else squared)


@pytest.mark.parametrize("ridge", [0.0, 1e9], ids=["thin", "dense"])
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
    basis, adapters, ridge, monkeypatch
):
    """With other ranks, scales and gates in each, whichever way the gradients of the factors are computed."""
    monkeypatch.setitem(train_gpt.RIDGE, "cpu", ridge)
    maps = [
        made(train_gpt.MapRow("", rows, 8, basis, seed, 7, adapter=adapter, scale=scale, gate=gate))
        for seed, (rows, adapter, scale, gate) in enumerate(
            zip((6, 4, 4), adapters, ("none", "row", "map"), (0.5, None, 2.0))
        )
    ]
    x, factor = normal(2, 3, 8).requires_grad_(), normal(14, seed=1).requires_grad_()
    learned = [x, factor, *(p for each in maps for p in each.parameters())]
    apart = torch.cat([each(x) for each in maps], -1) * factor
    together = maps[0](x, *maps[1:], factor=factor)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    dy = normal(2, 3, 14, seed=2)
    gradients = [torch.autograd.grad(y, learned, dy) for y in (together, apart)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("ridge", "rows", "columns", "rank", "thin"),
    [
        (264.0, 512, 512, 32, False),
        (264.0, 4096, 4096, 32, True),  # an H100: memory bounds thin products
        (20.0, 256, 256, 32, True),
        (20.0, 256, 256, 128, False),
    ],
)  # a CPU: FLOPs decide
def test_the_cheaper_gradient_is_chosen_by_count(ridge, rows, columns, rank, thin, monkeypatch):
    monkeypatch.setitem(train_gpt.RIDGE, "meta", ridge)
    shapes = (rows, columns), (rows, rank), (rank, columns)
    w, a, b = (torch.empty(shape, device="meta") for shape in shapes)
    assert train_gpt.thin_pays(w, a, b, False) == thin


def test_one_vector_goes_through_a_map_and_back():
    layer, x = (
        made(train_gpt.MapRow("", 6, 5, "uniform", 4, adapter="lora:2")),
        normal(5).requires_grad_(),
    )
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, (layer.weight.double() + layer.lora.A @ layer.lora.B).sum(0))


def test_a_model_without_a_learned_matrix_takes_a_step(variant):
    h = variant(map_basis="uniform", map_adapter="vera:2", bigram_vocab_size=0, ve_enabled=0)
    model = train_gpt.make_model(h)
    groups = train_gpt.tensors_by_role(model)
    assert not groups["matrix"]
    optimizers = train_gpt.Optimizers(groups, h, train_gpt.World(h))
    model(tokens(2, 16), tokens(2, 16, seed=1)).backward()
    before = model.embedding.weight.detach().clone()
    optimizers.step(0, 1.0)
    assert not torch.equal(before, model.embedding.weight)


def test_no_gradient_is_computed_for_a_frozen_map():
    layer = made(train_gpt.MapRow("", 6, 5, "uniform", 4, adapter="lora:2"))
    layer(normal(3, 5)).sum().backward()
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_linear_map_in_bfloat16_is_near_the_one_in_float64(adapter):
    row = train_gpt.MapRow("", 40, 48, "gaussian", 4, 7, adapter=adapter, scale="row", gate=0.5)
    torch.manual_seed(1)
    layer, x = train_gpt.Linear(row), normal(20, 48)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y, exact = layer(x.bfloat16()), layer.double()(x)
    assert y.dtype is torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.02


def test_a_mask_passes_the_gradient_of_its_bits_straight_to_its_scores():
    row = train_gpt.MapRow("", 6, 5, "gaussian", 4, adapter="mask")
    layer, x, dy = made(row), normal(8, 5, seed=2), normal(8, 6, seed=3)
    layer(x).backward(dy)
    expected = math.sqrt(2) * layer.weight * (dy.T @ x)
    torch.testing.assert_close(layer.mask.scores.grad, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # only signs count
        y = layer(x)
        layer.mask.scores.mul_(100)
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)


def test_a_new_mask_keeps_half_of_its_map_and_the_length_of_the_output():
    torch.manual_seed(0)
    layer = train_gpt.Linear(train_gpt.MapRow("", 200, 200, "gaussian", 4, adapter="mask"))
    assert (layer.mask.scores > 0).double().mean() == pytest.approx(0.5, abs=0.02)
    x = torch.randn(50, 200)
    assert layer(x).detach().norm() / (x @ layer.weight.float().T).norm() == pytest.approx(
        1, abs=0.05
    )


@pytest.mark.parametrize(
    ("density", "in_features", "count"),
    [(0.1, 40, 4), (0.3, 9, 3), (1.0, 9, 9), (1 / 9, 9, 1), (0.25, 10, 2)],
)
def test_places_of_a_sparse_adapter_are_a_share_of_each_row(density, in_features, count):
    row = train_gpt.MapRow("", 30, in_features, "uniform", 4)
    sparse = train_gpt.Sparse(row, density)
    assert sparse.support.shape == sparse.values.shape == (30, count)
    for places in sparse.support.tolist():
        assert places == sorted(set(places))
        assert 0 <= places[0] <= places[-1] < in_features
    again, other = train_gpt.Sparse(row, density), train_gpt.Sparse(row._replace(seed=5), density)
    assert torch.equal(again.support, sparse.support)
    if count < in_features:
        assert not torch.equal(other.support, sparse.support)


def test_places_of_a_sparse_adapter_are_spread_evenly():
    sparse = train_gpt.Sparse(train_gpt.MapRow("", 2000, 20, "uniform", 4), 0.25)
    shares = sparse.support.flatten().bincount(minlength=20) / 2000
    assert (shares - 0.25).abs().max() < 0.05


@pytest.mark.parametrize("adapter", ["lora:3", "vera:3", "sparse:0.3", "mask"])
def test_every_adapter_reduces_an_error_by_gradients(adapter):
    """Adam for a few steps towards another map."""
    torch.manual_seed(0)
    layer = train_gpt.Linear(train_gpt.MapRow("", 12, 12, "gaussian", 4, adapter=adapter))
    x, target = torch.randn(64, 12), torch.randn(12, 12) / 12**0.5
    optimizer, losses = torch.optim.Adam(layer.parameters(), 0.05), []
    for _ in range(60):
        loss = (layer(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


# ---- New models --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def variant(settings):
    """variant(**changes): settings without the published variables, so that every column may be given."""

    def build(**changes) -> train_gpt.Hyperparameters:
        h = settings()
        shared = {key: value for key, value in vars(h).items() if key in h.model_settings()}
        names = ("dtype", "train_seq_len", "eval_seq_len", "eval_stride", "train_batch_tokens")
        shared |= {name: getattr(h, name) for name in names}
        for name in ("map_basis", "map_adapter"):
            shared.pop(name)
        return train_gpt.Hyperparameters(
            environment={}, **(shared | {"map_adapter": "none"} | changes)
        )

    return build


@pytest.mark.parametrize(
    "adapter", ["lora:4", "rslora:4", "vera:4", "sparse:0.2", "sparse:0.1+lora:2+vera:3"]
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
        expected = bare.hidden(tokens(2, 16))
        assert expected.std() > 0.1
        torch.testing.assert_close(model.hidden(tokens(2, 16)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a != "none"])
def test_nothing_random_is_saved(variant, adapter):
    model = train_gpt.make_model(
        variant(map_basis="gaussian", map_adapter=adapter, map_scale="map")
    )
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not any(
        name.endswith((".weight", ".support", "vera.A", "vera.B"))
        for name in model.state_dict()
        if name.startswith("blocks.")
    )


def test_vera_shares_its_factors_between_maps_of_one_shape(variant):
    model = train_gpt.make_model(variant(map_adapter="vera:4"))
    places, shapes = {}, set()
    for row in model.frozen:
        vera = model.get_submodule(row.name).vera
        shapes.add((row.out_features, row.in_features))
        for name, size in (("A", row.in_features), ("B", row.out_features)):
            places.setdefault((name, size), set()).add(getattr(vera, name).data_ptr())
    assert len(model.frozen) == 24
    assert len(shapes) == 4
    assert places.keys() == {("A", 32), ("A", 96), ("B", 16), ("B", 32), ("B", 96)}
    assert {len(found) for found in places.values()} == {1}


def test_vera_factors_are_random_normal_and_not_the_maps(variant):
    a, b = (train_gpt.shared_factor(64, 128, seed).double() for seed in (12_345, 12_346))
    assert a.std() == pytest.approx(128**-0.5, rel=0.03)
    assert F.cosine_similarity(a.flatten(), b.flatten(), 0).abs() < 0.05
    as_map = train_gpt.gaussian(64, 128, 12_345)
    assert F.cosine_similarity(a.flatten(), as_map.flatten(), 0).abs() < 0.05


@pytest.mark.parametrize("adapter", ["vera:4", "sparse:0.3"])
def test_the_fingerprint_is_of_all_that_seeds_drew(variant, adapter):
    """A release that draws other places or factors gives garbage as surely as other maps do."""
    h = variant(map_adapter=adapter)
    model = train_gpt.make_model(h)
    assert model.fingerprint() == train_gpt.make_model(h).fingerprint()
    assert model.fingerprint() != train_gpt.make_model(variant()).fingerprint()
    changed = copy.deepcopy(model)
    module = changed.get_submodule("blocks.1.mlp.fc")
    drawn = module.vera.A if adapter.startswith("vera") else module.sparse.support
    drawn[0, 0] = 1 - drawn[0, 0]
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
        "dora:4",
        "lora:4+",
        "",
    ],
)
def test_adapters_that_fit_no_map_are_refused(variant, bad):
    """The narrowest map is 16 wide."""
    with pytest.raises(train_gpt.UserError, match="MAP_ADAPTER"):
        variant(map_adapter=bad)


def test_an_adapter_named_twice_is_refused_or_there_twice(variant):
    """The table and the log show both; the model has the second alone."""
    with pytest.raises(train_gpt.UserError, match="MAP_ADAPTER"):
        variant(map_adapter="lora:4+lora:8")


def test_zero_is_zero_however_it_is_written():
    """Published scripts have 0.0 as the share that freezes nothing."""
    whole, decimal = (
        train_gpt.Hyperparameters(environment={"PROGRESSIVE_FREEZE_FRAC": text})
        for text in ("0", "0.0")
    )
    assert {row.basis for row in decimal.maps} == {row.basis for row in whole.maps}


# ---- Artifact ----------------------------------------------------------------------------------------------


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
        "a.weight": train_gpt.Quantizer(6, 10.0).gptq(torch.randn(4, 6), None),
    }
    blob, sizes = train_gpt.write_artifact({}, masks | others)
    header, tensors = train_gpt.read_artifact(blob)
    assert tensors.keys() == (masks | others).keys()
    for name, mask in masks.items():
        assert torch.equal(tensors[name], mask.float())
    assert torch.equal(tensors["gate"], others["gate"].half().float())
    assert torch.equal(tensors["a.weight"], others["a.weight"].values())
    place = len(blob) - 32 - sum(size for _, size in header["groups"])
    for group, packed in header["groups"]:
        if group == "scores bits":
            raw = brotli.decompress(blob[place : place + packed])
        place += packed
    assert len(raw) == sum(math.ceil(rows * columns / 8) for rows, columns in shapes)
    assert sizes["scores bits"] > 0


def test_a_mask_is_exported_as_the_signs_of_its_scores():
    layer = made(train_gpt.MapRow("", 7, 5, "gaussian", 4, adapter="mask"))
    codes = layer.mask.quantize(train_gpt.quantizers_of(train_gpt.Hyperparameters()), None)
    x, y = normal(4, 5), layer(normal(4, 5))
    assert codes["scores"].dtype is torch.bool
    with torch.no_grad():
        layer.mask.scores.copy_(codes["scores"].float())
    assert torch.equal(layer(x), y)


def test_a_sparse_adapter_is_rounded_without_a_hessian():
    """Each of its rows sees inputs of its own, and no (in, in) matrix fits its (out, count) values."""
    layer = made(train_gpt.MapRow("", 8, 20, "uniform", 4, adapter="sparse:0.3+lora:2")).float()
    x = torch.randn(100, 20)
    quantizers = train_gpt.quantizers_of(train_gpt.Hyperparameters())
    codes = layer.sparse.quantize(quantizers, x.T @ x)["values"]
    assert torch.equal(
        codes.codes, quantizers[train_gpt.MATRIX].gptq(layer.sparse.values.data, None).codes
    )
    assert layer.lora.quantize(quantizers, x.T @ x).keys() == {"A", "B"}


def test_stored_bytes_of_each_kind():
    """Literals: 10 x 6 with codes and exponents of a byte, floats of two and masks of a bit."""
    expected = {
        "none": 0,
        "lora:3": 30 + 10 + 18 + 3,
        "rslora:1": 10 + 10 + 6 + 1,
        "vera:3": 2 * 13,
        "sparse:0.5": 30 + 10,
        "mask": 8,
        "mask+lora:1": 8 + 27,
    }
    for adapter, size in expected.items():
        row = train_gpt.MapRow("", 10, 6, "uniform", 4, adapter=adapter)
        assert train_gpt.stored_bytes(train_gpt.Linear(row)) == size, adapter
        more = row._replace(scale="row", gate=0.0)
        assert train_gpt.stored_bytes(train_gpt.Linear(more)) == size + 40, adapter
        assert train_gpt.stored_bytes(train_gpt.Linear(row._replace(scale="map"))) == size + 2
    assert train_gpt.stored_bytes(train_gpt.Linear(train_gpt.MapRow("", 10, 6))) == 70


# ---- Freezing ----------------------------------------------------------------------------------------------


def steps_of(
    model: train_gpt.LanguageModel, optimizers: train_gpt.Optimizers, count: int, first: int = 0
):
    for step in range(first, first + count):
        model(tokens(4, 16, seed=step), tokens(4, 16, seed=step + 100)).backward()
        optimizers.step(step, 1.0)


def begun(h: train_gpt.Hyperparameters, processes) -> tuple:
    """A model with its stages and optimisers, after two steps of the first stage."""
    torch.manual_seed(0)
    model = train_gpt.make_model(h)
    stages = train_gpt.Stages(h, model, None)
    optimizers = train_gpt.Optimizers(train_gpt.tensors_by_role(model), h, processes)
    stages.enter(0.0)
    steps_of(model, optimizers, 2)
    return model, stages, optimizers


def test_the_state_of_frozen_maps_is_freed_and_that_of_the_others_stays(variant, processes):
    h = variant(
        map_basis="learned,attention=uniform",
        map_adapter="attention=lora:2+sparse:0.2",
        map_scale="attention=row",
        map_freeze="mlp.in=0.5,attention@1=0.5",
    )
    model, stages, optimizers = begun(h, processes)
    stages.enter(0.5)
    names = {p: name for name, p in model.named_parameters()}
    frozen = {name for name in names.values() if name.endswith("mlp.fc.weight")}
    of_attention = tuple(f"blocks.1.attention.{kind}." for kind in ("q", "k", "v", "proj"))
    frozen |= {name for name in names.values() if name.startswith(of_attention)}
    assert {names[p] for p in optimizers.params if not p.requires_grad} == frozen
    states = (optimizers.muon.state, optimizers.adam.state)
    held = {names[p] for state in states for p in state if state[p]}
    assert held == set(names.values())
    values = {name: p.detach().clone() for p, name in names.items()}
    steps_of(model, optimizers, 2, first=2)
    for p, name in names.items():
        assert torch.equal(p, values[name]) == (name in frozen), name
    assert {names[p] for state in states for p in state} == held - frozen


def test_those_that_go_on_move_as_if_nothing_had_been_forgotten(variant, processes):
    """Against steps that leave the frozen ones without a gradient and keep their state: the ends agree."""
    ends = []
    for stage in (True, False):
        h = variant(map_basis="learned", map_freeze="mlp.in=0.5")
        model, stages, optimizers = begun(h, processes)
        if stage:
            stages.enter(0.7)
            steps_of(model, optimizers, 2, first=2)
        else:
            for step in (2, 3):
                model(tokens(4, 16, seed=step), tokens(4, 16, seed=step + 100)).backward()
                for name, p in model.named_parameters():
                    p.grad = None if name.endswith("mlp.fc.weight") else p.grad
                optimizers.step(step, 1.0)
        ends.append(
            (
                model.state_dict(),
                {
                    name: optimizers.muon.state[p] | optimizers.adam.state[p]
                    for name, p in model.named_parameters()
                    if p.requires_grad
                },
            )
        )
    (weights, states), (expected_weights, expected_states) = ends
    for name, value in weights.items():
        assert torch.equal(value, expected_weights[name]), name
    assert states.keys() == {name for name in expected_states if not name.endswith("mlp.fc.weight")}
    for name, state in states.items():
        for key, value in state.items():
            expected = torch.as_tensor(expected_states[name][key])
            assert torch.equal(torch.as_tensor(value), expected), (name, key)


def test_averages_leave_frozen_tensors_as_they_stand(variant):
    h = variant(ema_decay=0.9, swa_interval=1, swa_threshold=1)
    frozen, learned = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    averages, seen = train_gpt.Averages([frozen, learned], h), []
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
        expected = sum(w * value for w, value in zip(weights, seen)) / sum(weights)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)


# ---- Losses ------------------------------------------------------------------------------------------------


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
    stages = train_gpt.Stages(h, model, None)
    stages.enter(0.2)
    ids = tokens(2, 16)
    assert not any(p.requires_grad for p in stages.teacher.parameters())
    first, second = stages.teach(ids), stages.teach(ids)
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
            losses = model.losses(ids, targets[:, -last:]).double()
            torch.testing.assert_close(losses, expected[:, -last:], rtol=0, atol=1e-5)
        separate = sum(member(ids, targets) for member in model.members) / 2
        torch.testing.assert_close(model(ids, targets), separate)


@pytest.mark.parametrize("teaching", [False, True])
def test_members_of_an_ensemble_learn_each_for_itself(ensemble, teaching):
    """What member 1 knows does not touch the gradient of member 0: they do not specialise on each other."""
    _, model = ensemble
    ids, targets = tokens(2, 16), tokens(2, 16, seed=1)
    taught = normal(2, 16, 64).float() if teaching else None
    first = torch.autograd.grad(model(ids, targets, taught), list(model.members[0].parameters()))
    alone = torch.autograd.grad(
        model.members[0](ids, targets, taught), list(model.members[0].parameters())
    )
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for p in changed.members[1].parameters():
            p.add_(torch.randn_like(p))
    second = torch.autograd.grad(
        changed(ids, targets, taught), list(changed.members[0].parameters())
    )
    for a, b, c in zip(first, second, alone):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c / 2)


def test_members_of_an_ensemble_have_maps_and_weights_of_their_own(variant):
    model = train_gpt.make_model(variant(ensemble=3, map_adapter="lora:4"))
    seeds = [row.seed for row in model.table.values()]
    assert len(seeds) == len(set(seeds)) == 3 * 24
    for name in ("blocks.0.mlp.fc.weight", "embedding.weight", "blocks.0.mlp.fc.lora.B"):
        path, _, last = name.rpartition(".")
        values = [getattr(member.get_submodule(path), last) for member in model.members]
        for one, other in itertools.combinations(values, 2):
            assert not torch.equal(one, other)


# ---- Blocks ------------------------------------------------------------------------------------------------


def order_of(model: train_gpt.GPT) -> list[int]:
    """The layers that really run, one after the other."""
    seen = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, layer=i: seen.append(layer))
        for i, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        model.hidden(tokens(1, 8))
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
    model = train_gpt.make_model(
        variant(num_layers=layers, recur_layers=recurring, recur_times=times, ve_layers="0")
    )
    assert order_of(model) == expected
    model.recurs = False
    assert order_of(model) == list(range(layers))
    model.recurs = True
    assert order_of(model) == expected


def test_recurrence_begins_at_its_share_of_training(variant):
    h = variant(recur_layers="1", recur_times=2, recur_frac=0.4)
    model = train_gpt.make_model(h)
    stages = train_gpt.Stages(h, model, None)
    for share, recurs in ((0.0, False), (0.39, False), (0.4, True), (1.0, True), (0.0, False)):
        stages.enter(share)
        assert order_of(model) == ([0, 1, 1, 2, 3] if recurs else [0, 1, 2, 3])


@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize(
    ("layers", "recurring"), [(6, ""), (5, ""), (6, "2-3"), (6, "1"), (6, "4")]
)
def test_skips_pair_the_halves_with_recurrence_too(variant, random_model, gated, layers, recurring):
    """Layer n/2 + i adds what left layer n/2 - 1 - i last, whenever it runs. Blocks are taken as they are."""
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
        rope, left, values = tuple(model.rotary(8)), {}, None
        for layer in order:
            i = layer - half
            if 0 <= i < half:
                skip = model.skip_weights[i] * left[half - 1 - i]
                gate = 1 / (1 + torch.exp(-model.skip_gates[i])) if gated else None
                x = gate * x + (1 - gate) * skip if gated else x + skip
            x, own = model.blocks[layer](x, x0, rope, None, values)
            values = own if values is None else values
            left[layer] = x
        torch.testing.assert_close(model.hidden(ids), train_gpt.norm(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_block_runs_its_parts_side_by_side_or_one_after_the_other(
    variant, random_model, parallel
):
    h = variant(parallel_from=1 if parallel else 4, map_adapter="lora:4")
    model = random_model(h, torch.float64)
    x, x0, first = normal(2, 5, 32), normal(2, 5, 32, seed=1), normal(2, 5, h.kv_dim, seed=2)
    rope, once = tuple(model.rotary(5)), torch.ones(32, dtype=torch.float64)
    for layer, block in enumerate(model.blocks):
        with torch.no_grad():
            y, own = block(x, x0, rope, None, first)
            mixed = block.stream_mix * x + block.embedding_mix * x0
            seen = mixed / (mixed.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
            seen = seen / math.sqrt(layer + 1)
            attended, values = block.attention(seen, once, rope, None, first)
            after = mixed + block.attention_scale * attended
            if not (parallel and layer >= 1):
                seen = (
                    after
                    / (after.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
                )
                seen = seen / math.sqrt(layer + 1)
            expected = after + block.mlp_scale * block.mlp(seen)
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
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-9)


def test_a_hidden_gate_of_zero_silences_the_mlp_at_first_and_learns(variant):
    h = variant(map_basis="mlp=gaussian", map_adapter="lora:4", map_gate="mlp.fc=0")
    torch.manual_seed(0)
    model, ids, targets = train_gpt.make_model(h), tokens(4, 16), tokens(4, 16, seed=1)
    for block in model.blocks:
        assert block.mlp.fc.gate.shape == (h.mlp_dim,)
        assert block.mlp(torch.randn(2, 3, 32)).abs().max() == 0
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
        assert model.blocks[0].mlp(torch.randn(2, 3, 32)).abs().max() > 0


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
