"""Linear maps with their adapters, scales and gates, and matrices that layers share."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from helpers import head_input, train_gpt
from reference import linear_map, normal, tokens

ADAPTERS = [
    "none",
    "lora:3",
    "rslora:3",
    "vera:3",
    "sparse:0.3",
    "mask",
    "combination:3",
    "sparse:0.2+vera:2+lora:1",
    "mask+sparse:0.3+combination:2+rslora:2+lora:4",
]
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


@pytest.fixture(scope="session")
def variant(settings):
    """variant(**changes): tiny settings without adapters, unless they are asked for."""
    return lambda **changes: settings(**({"map_adapter": "none"} | changes))


def made(rows: int, columns: int, basis: str = "uniform", bias: bool = False, **columns_of_table):
    """Return a map in float64. No learned value is at its initial value, which hides mistakes."""
    spec = train_gpt.MapSpec("", rows, columns, basis, seed=4, shared_seed=7)
    torch.manual_seed(1)
    layer = train_gpt.Linear(spec._replace(**columns_of_table), bias=bias).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


# ---- Linear layers -------------------------------------------------------------------------------


def same_as_the_textbook(layer: train_gpt.Linear, activation=None) -> None:
    """Compare a map's outputs and gradients with those of the reference."""
    x = normal(2, 3, layer.weight.size(1), seed=2).requires_grad_()
    p = {name: value.detach().clone() for name, value in layer.named_parameters()}
    slopes = {}  # of the sigmoid that stands for a bit: what is differentiated here are the bits
    if "mask.scores" in p:
        layer.mask.temperature.fill_(0.5)
        soft = (p["mask.scores"] / 0.5).sigmoid()
        slopes["mask.scores"] = soft * (1 - soft) / 0.5
        p["mask.scores"] = (p["mask.scores"] > 0).double()
    p = {name: value.requires_grad_() for name, value in p.items()}
    y, expected = layer(x, activation=activation), linear_map(layer, p, x, activation)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    dy = normal(*y.shape, seed=3)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    theirs = torch.autograd.grad(expected, [x, *p.values()], dy)
    for name, mine, their in zip(["x", *p], ours, theirs, strict=True):
        assert mine.abs().max() > 0, name
        message = functools.partial("{}: {}".format, name)
        expected = their * slopes.get(name, 1.0)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-10, msg=message)


@each_adapter
@pytest.mark.parametrize(
    ("basis", "shape"),
    [("uniform", (12, 9)), ("uniform", (6, 14)), ("learned", (12, 9))],
    ids=["tall", "wide", "learned"],
)
def test_a_linear_map_and_its_gradients_are_the_textbooks(adapter, basis, shape):
    """With every scale and gate.

    A learned map beside adapters takes a dense gradient through the product.
    """

    def activation(y: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(y, 0.5).square()

    for scale, gate, bias in itertools.product(("none", "map", "row"), (None, 0.5), (False, True)):
        layer = made(*shape, basis, bias, adapter=adapter, scale=scale, gate=gate)
        same_as_the_textbook(layer, None if gate is None else activation)
    assert layer.weight.requires_grad == (basis == "learned")


@pytest.mark.parametrize("is_thin", [True, False], ids=["thin", "dense"])
@pytest.mark.parametrize(
    ("basis", "adapters"),
    [
        ("uniform", ("lora:2", "lora:1+rslora:3", "lora:4")),
        ("uniform", ("lora:2", "none", "vera:3")),
        ("learned", ("none", "none", "none")),
    ],
)
def test_maps_of_one_input_by_one_product_are_the_maps_one_by_one(
    basis, adapters, is_thin, monkeypatch
):
    """With other ranks, scales and gates in each, by thin gradients and by the dense one."""
    monkeypatch.setattr(train_gpt.MapParts, "low_rank_gradient_pays", lambda *_: is_thin)
    columns = zip(adapters, (6, 4, 4), ("none", "row", "map"), (0.5, None, 2.0), strict=True)
    maps = [
        made(rows, 8, basis, adapter=adapter, scale=scale, gate=gate)
        for adapter, rows, scale, gate in columns
    ]
    x, row_scale = normal(2, 3, 8).requires_grad_(), normal(14, seed=1).requires_grad_()
    learned = [x, row_scale, *(p for each in maps for p in each.parameters())]
    apart = torch.cat([each(x) for each in maps], -1) * row_scale
    together = train_gpt.fused_linear(x, maps, row_scale)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    dy = normal(2, 3, 14, seed=2)
    gradients = [torch.autograd.grad(y, learned, dy) for y in (together, apart)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (0, 3)])
def test_a_layer_for_other_peoples_code_is_its_formula(bias, batch):
    """FrozenRandomLinearWithLoRA of one vector, and of none."""
    layer = train_gpt.FrozenRandomLinearWithLoRA(12, 20, rank=3, seed=5, bias=bias).double()
    x = normal(*batch, 12)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)  # A starts at zero
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    expected = x @ layer.weight.T + (x @ layer.lora_B.T) @ layer.lora_A.T
    torch.testing.assert_close(layer(x), expected + (layer.bias if bias else 0))
    assert set(layer.state_dict()) == {"lora.A", "lora.B"} | ({"bias"} if bias else set())


@pytest.mark.parametrize("rank", [0, -1, 13])
def test_a_rank_that_fits_no_map_is_refused(rank):
    with pytest.raises(ValueError, match=str(rank)):
        train_gpt.FrozenRandomLinearWithLoRA(12, 20, rank=rank)


@each_adapter
def test_a_linear_map_in_bfloat16_is_near_the_one_in_float64(adapter):
    """Inputs, weights, each adapter and each factor on the output are rounded: 2^-9 each time."""
    spec = train_gpt.MapSpec("", 40, 48, "gaussian", seed=4, shared_seed=7, adapter=adapter)
    torch.manual_seed(1)
    layer, x = train_gpt.Linear(spec._replace(scale="row", gate=0.5)), normal(20, 48)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y, exact = layer(x.bfloat16()), layer.double()(x)
    assert y.dtype is torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 10 * 2**-9


def test_a_new_mask_keeps_half_of_its_map_and_the_length_of_the_output():
    torch.manual_seed(0)
    layer = train_gpt.Linear(train_gpt.MapSpec("", 200, 200, "gaussian", seed=4, adapter="mask"))
    assert (layer.mask.scores > 0).double().mean() == pytest.approx(0.5, abs=0.02)
    x = torch.randn(50, 200)
    ratio = layer(x).detach().norm() / (x @ layer.weight.float().T).norm()
    assert ratio == pytest.approx(1, abs=0.05)


# ---- New models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if "mask" not in a and a != "none"])
@pytest.mark.parametrize("scale", ["map", "row"])
def test_a_new_model_computes_as_its_bare_maps_do_and_saves_what_is_learned(
    variant, adapter, scale
):
    """Whatever is learned, beside whichever maps, begins as no change."""
    h = variant(map_basis="uniform", map_adapter=adapter, map_scale=scale)
    torch.manual_seed(0)
    model = train_gpt.make_model(h).double()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    bare = train_gpt.make_model(variant(map_basis="uniform")).double()
    own = {name for name, _ in bare.named_parameters()}
    assert not {f"{spec.name}.weight" for spec in model.table.values() if spec.is_random} & own
    bare.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    with torch.no_grad():
        expected, actual = (head_input(each, tokens(2, 16)) for each in (bare, model))
        assert expected.std() > 0.1
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# ---- Shared matrices -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_each_layer_starts_as_a_mix_of_the_two_matrices_nearest_to_its_depth(variant, count):
    """Else all layers would be one layer at first (PR #812)."""
    model = train_gpt.GPT(variant(map_basis=f"shared:{count}", num_layers=5))
    for layer, block in enumerate(model.blocks):
        for part in (block.attention.q, block.mlp.fc):
            mix = part.shared_mix.detach()
            assert mix.sum() == pytest.approx(1)
            assert (mix > 0).sum() <= 2
            center = (mix * torch.arange(count)).sum() / (count - 1)
            assert center == pytest.approx(layer / 4)


@pytest.mark.parametrize(("basis", "count"), [("shared", 1), ("shared:3", 3)])
def test_layers_share_matrices_and_each_has_its_own_mix(variant, random_model, basis, count):
    model = random_model(variant(map_basis=f"mlp.fc={basis}"), torch.float64)
    weights = model.shared[f"mlp_fc:{basis}"].weights()
    assert len(weights) == count
    maps, x = [block.mlp.fc for block in model.blocks], normal(3, 32)
    for layer in maps:
        mix = [1.0] if layer.shared_mix is None else layer.shared_mix
        expected = x @ sum(c * w for c, w in zip(mix, weights, strict=True)).T
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        learned = [*weights] if layer.shared_mix is None else [*weights, mix]
        gradients = [torch.autograd.grad(y.square().sum(), learned) for y in (layer(x), expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    for one, other in itertools.combinations(maps, 2):
        assert torch.equal(one(x), other(x)) == (count == 1)
    stored = [name for name in model.state_dict() if "mlp.fc" in name or "shared" in name]
    assert len(stored) == count + (len(maps) if count > 1 else 0)
