"""Random maps: what they are, and that every machine generates the same ones."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import ROOT, train_gpt

SHAPES = [(64, 16), (16, 64), (48, 48), (512, 512), (256, 512), (1536, 512), (512, 1536)]


def sha256(weight: torch.Tensor) -> str:
    """Return the hash of a bfloat16 tensor's bits, the same on a big-endian machine."""
    bits = weight.contiguous().view(torch.int16).numpy().astype("<i2")
    return hashlib.sha256(bits.tobytes()).hexdigest()


def generate(out_features: int, in_features: int, seed: int) -> torch.Tensor:
    spec = train_gpt.MapSpec("", out_features, in_features, "orthogonal", seed=seed)
    return train_gpt.generate_map(spec)


# ---- What a map is -------------------------------------------------------------------------------


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_maps_are_orthonormal_on_their_shorter_side(out_features, in_features):
    exact = train_gpt.orthogonal(out_features, in_features, 3)
    weight = generate(out_features, in_features, 3)
    assert weight.shape == exact.shape == (out_features, in_features)
    assert weight.dtype is torch.bfloat16
    assert torch.equal(weight, exact.to(torch.bfloat16))
    for w, tolerance in ((exact, 1e-12), (weight.double(), 2**-8)):
        gram = w.T @ w if out_features >= in_features else w @ w.T
        torch.testing.assert_close(
            gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize(("out_features", "in_features"), [(24, 8), (8, 24), (8, 8)])
def test_maps_are_the_one_qr_with_a_positive_diagonal(out_features, in_features):
    """That makes them unique, and Haar-distributed: a bare QR is neither."""
    w = train_gpt.orthogonal(out_features, in_features, 3)
    q = w if out_features >= in_features else w.T
    normal = torch.from_numpy(train_gpt.normal_deviates(3, q.numel())).view(q.shape)
    r = q.T @ normal
    torch.testing.assert_close(q @ r, normal, rtol=0, atol=1e-12)
    torch.testing.assert_close(r, r.triu(), rtol=0, atol=1e-12)
    assert r.diagonal().min() > 0


def test_maps_have_no_preferred_direction():
    """Entries of a Haar matrix have mean 0 and variance 1/n.

    A bare QR has first entries of one sign.
    """
    entries = torch.stack([train_gpt.orthogonal(8, 8, seed) for seed in range(400)])
    assert entries.mean(0).abs().max() < 5 / math.sqrt(8 * 400)
    assert (entries.var(0) - 1 / 8).abs().max() < 0.05


# ---- Same bits everywhere ------------------------------------------------------------------------


def test_the_raw_stream_is_philox():
    """Literals of NumPy's Philox, whose stream NumPy promises to keep: the root of every map."""
    assert train_gpt.random_uint64(12345, 8).tolist() == [
        11923609910150341984,
        14282716219641783572,
        14507188490975060125,
        2944039161201405073,
        2968871015012291328,
        15096419966541852992,
        16923256687495202939,
        1160419304018695661,
    ]


def test_deviates_are_the_formula_of_box_and_muller():
    """Recomputed with Python's integers and math module from the literal words above."""
    words = train_gpt.random_uint64(12345, 8).tolist()
    uniform = [(word >> 11) / 2**53 for word in words]
    pairs = zip(uniform[:4], uniform[4:], strict=True)
    polar = [(math.sqrt(-2 * math.log1p(-u)), 2 * math.pi * v) for u, v in pairs]
    expected = [r * math.cos(a) for r, a in polar] + [r * math.sin(a) for r, a in polar]
    np.testing.assert_allclose(train_gpt.normal_deviates(12345, 8), expected, rtol=1e-13)


def test_a_known_map_has_its_known_bits():
    """Libraries differ in the last bits of float64.

    None of these values is within 1e-6 of a rounding boundary.
    """
    expected = "df3e9272bc0b2d1d235b4c97d90d57450e9290be8b2945797c108206836135b9"
    assert sha256(generate(16, 8, 12345)) == expected


def test_another_process_with_other_threads_generates_the_same_bits(tmp_path):
    code = """if True:
        import hashlib, sys, torch, train_gpt
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for out_features, in_features in eval(sys.argv[1]):
                spec = train_gpt.MapSpec("", out_features, in_features, "orthogonal", seed=5)
                bits = train_gpt.generate_map(spec).view(torch.int16).numpy().astype("<i2")
                print(hashlib.sha256(bits.tobytes()).hexdigest())
    """
    shell = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, repr(SHAPES)],
        cwd=tmp_path,
        env=shell,
        timeout=100,
        capture_output=True,
        text=True,
        check=True,
    )
    here = [sha256(generate(*shape, 5)) for shape in SHAPES]
    again = [sha256(generate(*shape, 5)) for shape in SHAPES]
    assert here == again, "generated twice in one process"
    assert done.stdout.split() == here + here


def test_generating_a_map_leaves_the_global_generators_alone_and_ignores_them():
    torch.manual_seed(1)
    np.random.seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = generate(32, 16, 9)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(generate(32, 16, 9), first)


def test_maps_are_the_same_in_every_type_of_activations(settings):
    """The bfloat16 rounding is the map: runs in float32 and bfloat16 share one artifact."""
    narrow = train_gpt.GPT(settings(), torch.bfloat16)
    wide = train_gpt.GPT(settings(), torch.float32)
    assert narrow.fingerprint() == wide.fingerprint()
    for name in [spec.name for spec in narrow.random_maps()]:
        assert narrow.get_submodule(name).weight.dtype is torch.bfloat16
        assert torch.equal(narrow.get_submodule(name).weight, wide.get_submodule(name).weight)


def test_a_layer_of_its_own_generates_the_models_map(settings):
    model = train_gpt.GPT(settings())
    spec = model.table["blocks.1.attention.proj"]
    alone = train_gpt.FrozenRandomLinearWithLoRA(
        spec.in_features, spec.out_features, rank=2, seed=spec.seed
    )
    assert torch.equal(model.get_submodule(spec.name).weight, alone.weight)


# ---- Normal deviates -----------------------------------------------------------------------------


def test_deviates_are_standard_normal():
    n = 200_000
    x = train_gpt.normal_deviates(7, n)
    assert x.dtype == np.float64
    assert np.isfinite(x).all()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        # √E[x^2p], which bounds the deviation of x^p
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)))
        assert abs((x**power).mean() - moment) < 4 * spread / math.sqrt(n), power
    # Kolmogorov and Smirnov's distance; 1.95 / √n is exceeded once in a thousand
    normal = 0.5 * (1 + torch.erf(torch.from_numpy(np.sort(x)) / math.sqrt(2))).numpy()
    steps = np.arange(n + 1) / n
    assert max((steps[1:] - normal).max(), (normal - steps[:-1]).max()) < 1.95 / math.sqrt(n)


def test_deviates_of_neighboring_seeds_and_halves_are_independent():
    """The maps of a layer have seeds that differ by one.

    A pair of deviates, one in each half, shares one radius and one angle.
    """
    n = 50_000
    streams = [train_gpt.normal_deviates(seed, n) for seed in (12345, 12346, 12347, 12445)]
    streams = [half for stream in streams for half in np.split(stream, 2)]
    for x in (streams, np.square(streams)):
        assert np.abs(np.corrcoef(x) - np.eye(len(streams))).max() < 5 / math.sqrt(n / 2)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 101])
def test_odd_numbers_of_deviates(n):
    x = train_gpt.normal_deviates(11, n)
    assert x.shape == (n,)
    assert np.array_equal(x, train_gpt.normal_deviates(11, n + n % 2)[:n])
    assert len(set(x.tolist())) == n


# ---- Seeds and fingerprint -----------------------------------------------------------------------


def test_seeds_are_those_of_the_published_system():
    offsets = {
        "attention.q": 0,
        "attention.k": 1,
        "attention.v": 2,
        "attention.proj": 3,
        "mlp.fc": 10,
        "mlp.proj": 11,
    }
    table = train_gpt.build_map_table(train_gpt.load_settings({}))
    expected = {
        f"blocks.{layer}.{kind}": 12345 + 100 * layer + offset
        for layer in range(11)
        for kind, offset in offsets.items()
    }
    seeds = {name: spec.seed for name, spec in table.items() if spec.is_random}
    assert seeds == expected
    assert len(set(expected.values())) == 66


def test_every_map_of_a_model_differs(settings):
    """Layers whose maps repeat would be a smaller random network than the one that is reported."""
    model = train_gpt.GPT(settings())
    different = {sha256(model.get_submodule(spec.name).weight) for spec in model.random_maps()}
    assert len(different) == len(model.random_maps()) == 24


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows, columns, seed: torch.ones(columns, rows, dtype=torch.float64),
        lambda rows, columns, seed: torch.full((rows, columns), math.inf),
    ],
)
def test_a_basis_that_gives_no_map_is_named(monkeypatch, wrong):
    monkeypatch.setitem(train_gpt.BASES, "mine", wrong)
    with pytest.raises(train_gpt.UserError, match=r"MAP_BASIS=mine: blocks\.0\.mlp\.fc "):
        train_gpt.generate_map(train_gpt.MapSpec("blocks.0.mlp.fc", 6, 4, "mine"))


def test_the_fingerprint_sees_one_bit_the_order_and_the_seed(settings):
    model = train_gpt.GPT(settings())
    original = model.fingerprint()
    weight = model.blocks[2].mlp.fc.weight
    bits = weight.view(torch.int16)
    bits[5, 7] ^= 1
    assert model.fingerprint() != original
    bits[5, 7] ^= 1
    assert model.fingerprint() == original
    q, proj = model.blocks[1].attention.q, model.blocks[1].attention.proj
    q.weight, proj.weight = proj.weight, q.weight
    assert model.fingerprint() != original
    assert train_gpt.GPT(settings(map_seed=12346)).fingerprint() != original
    assert train_gpt.GPT(settings(map_seed=12345)).fingerprint() == original


def test_the_fingerprint_is_of_the_maps_alone(settings, random_model):
    """Whatever is learned, and whatever is switched on around the maps, it proves the maps."""
    model = train_gpt.GPT(settings())
    digest = hashlib.sha256()
    for spec in model.random_maps():
        bits = model.get_submodule(spec.name).weight.view(torch.int16)
        digest.update(bits.numpy().astype("<i2").tobytes())
    assert model.fingerprint() == digest.hexdigest()
    other = random_model(settings(bigram_vocab_size=0, smear_enabled=0))
    assert other.fingerprint() == model.fingerprint()


def test_the_gain_of_a_learned_map_is_that_of_its_first_weights():
    layer = train_gpt.Linear(train_gpt.MapSpec("", 12, 8, gain=2.0))
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight), torch.full((8,), 2.0))


@pytest.mark.parametrize(
    "adapter", ["none", "lora:16", "rslora:8+vera:16", "sparse:0.5", "sparse:1", "mask"]
)
def test_a_model_asks_for_no_less_memory_than_it_takes(settings, adapter):
    with pytest.raises(train_gpt.UserError, match="MODEL_LIMIT_BYTES=1, but") as refused:
        train_gpt.make_model(settings(map_adapter=adapter, model_limit_bytes=1))
    need = int(re.search(r"needs ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))
    h = settings(map_adapter=adapter, model_limit_bytes=need)
    model = train_gpt.make_model(h)
    maps = [each for name, each in model.named_buffers() if not name.startswith("rope")]
    taken = sum(each.numel() * each.element_size() for each in [*model.parameters(), *maps])
    assert taken < 1.1 * need  # but for small gates
    one_less = dataclasses.replace(h, model_limit_bytes=need - 1)
    with pytest.raises(train_gpt.UserError, match="MODEL_LIMIT_BYTES"):
        train_gpt.make_model(one_less)
