"""Random maps: what each basis is, and that every machine generates the same ones."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from helpers import train_gpt

SHAPES = [(64, 16), (16, 64), (48, 48), (512, 512), (256, 512), (1536, 512), (512, 1536)]
each_basis = pytest.mark.parametrize("basis", train_gpt.BASES)


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def generate(*shape: int, seed: int, basis: str = "orthogonal") -> torch.Tensor:
    return train_gpt.generate_map(train_gpt.MapSpec("", *shape, basis, seed=seed))


# ---- Bases ---------------------------------------------------------------------------------------


@each_basis
@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96), (1, 7), (7, 1)])
def test_a_basis_gives_a_matrix_that_its_seed_alone_decides(basis, shape):
    """And no global generator, which it leaves as it was."""
    draw = train_gpt.BASES[basis]
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), draw(*shape, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, draw(*shape, 5))
    assert (first.shape, first.dtype) == (shape, torch.float64)
    assert min(shape) == 1 or not torch.equal(first, draw(*shape, 6))


@each_basis
@pytest.mark.parametrize("gain", [1.0, 0.5, 3.0])
def test_a_generated_map_is_its_basis_times_its_gain_in_bfloat16(basis, gain):
    drawn = train_gpt.generate_map(train_gpt.MapSpec("", 24, 40, basis, seed=9, gain=gain))
    assert drawn.dtype is torch.bfloat16
    assert drawn.is_contiguous()
    assert torch.equal(drawn, (train_gpt.BASES[basis](24, 40, 9) * gain).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (48, 48), (40, 96), (1, 7), (2, 65_536)])
def test_hadamard_maps_are_orthogonal_or_nearly_so_with_exact_entries(shape):
    """Entries are one power of 2, so that they are exact in every floating-point type.

    Rows and columns of an orthogonal matrix: no direction grows, and angles are near 90°.
    """
    drawn = train_gpt.hadamard(*shape, 3)
    (entry,) = drawn.abs().unique().tolist()
    assert math.log2(entry).is_integer()
    assert 2**-0.5 <= entry * math.sqrt(max(shape)) <= 2**0.5
    size = 2 ** math.ceil(math.log2(max(shape)))
    assert torch.linalg.svdvals(drawn).max() <= entry * math.sqrt(size) + 1e-12
    tall = drawn if shape[0] >= shape[1] else drawn.T
    cosines = tall.T @ tall / (entry**2 * len(tall)) - torch.eye(tall.size(1)).double()
    deviation = math.sqrt((1 - len(tall) / size) / len(tall))  # 0 where all rows are taken
    assert cosines.abs().max() < 6 * deviation + 1e-12


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_orthogonal_maps_are_the_one_qr_with_a_positive_diagonal(out_features, in_features):
    """That makes them unique, and Haar-distributed: a bare QR is neither."""
    w = train_gpt.orthogonal(out_features, in_features, 3)
    q = w if out_features >= in_features else w.T
    normal = torch.from_numpy(train_gpt.normal_deviates(3, q.numel())).view(q.shape)
    r = q.T @ normal
    torch.testing.assert_close(q.T @ q, torch.eye(len(r)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ r, normal, rtol=0, atol=1e-11)
    torch.testing.assert_close(r, r.triu(), rtol=0, atol=1e-11)
    assert r.diagonal().min() > 0


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


def test_the_gain_of_a_learned_map_is_that_of_its_first_weights():
    layer = train_gpt.Linear(train_gpt.MapSpec("", 12, 8, gain=2.0))
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight), torch.full((8,), 2.0))


# ---- Same bits everywhere ------------------------------------------------------------------------

WORDS = [  # literals of NumPy's Philox, whose stream NumPy promises to keep: the root of every map
    11923609910150341984,
    14282716219641783572,
    14507188490975060125,
    2944039161201405073,
]


def test_the_raw_stream_is_philox():
    assert train_gpt.random_uint64(12345, 4).tolist() == WORDS


def test_deviates_are_the_formula_of_box_and_muller():
    """Recomputed with Python's integers and math module; of an odd number the last is dropped."""
    uniform = [(word >> 11) / 2**53 for word in WORDS]
    pairs = zip(uniform[:2], uniform[2:], strict=True)
    polar = [(math.sqrt(-2 * math.log1p(-u)), 2 * math.pi * v) for u, v in pairs]
    expected = [r * math.cos(a) for r, a in polar] + [r * math.sin(a) for r, a in polar]
    deviates = train_gpt.normal_deviates(12345, 4)
    np.testing.assert_allclose(deviates, expected, rtol=0, atol=1e-14)
    assert np.array_equal(train_gpt.normal_deviates(12345, 3), deviates[:3])


GOLDEN = {
    "orthogonal": "17cac7380830c06ea15045a08010662fdfa12e1b01d4f80627d5aa1beeca14cd",
    "gaussian": "35e9a9576e393533daeceff10458836788b5313949fbab7d19b7bfe34cc1db80",
    "uniform": "a1ecef3d3f701bcac5af13430f7590af61b3e533d705927e5d6f4e00cdab5931",
    "rademacher": "c583651ede8adcc3432776689418355f59cd01386182772ada365ad545fbcf6e",
    "hadamard": "87d6ebf8d13558fd003fbc03232b0904ed85ad1185afc45f16ead3ba9074a1e1",
}


@each_basis
def test_the_maps_are_the_ones_that_artifacts_were_made_with(basis):
    """A changed stream makes every artifact garbage. A new basis gets its line here.

    Libraries differ in the last bits of float64, which the rounding to bfloat16 drops.
    """
    assert sha256(generate(24, 40, seed=12_345, basis=basis)) == GOLDEN[basis]


def test_what_adapters_generate_is_what_artifacts_were_made_with():
    spec = train_gpt.MapSpec("", 24, 40, "uniform", seed=12_345, shared_seed=77)
    vera, sparse = train_gpt.VeRA(spec, 3), train_gpt.Sparse(spec, 0.2)
    expected = {
        vera.A: "d9de1af6d9b599cf5675cd3f79a446b7a690b7ed2f9683b02e25132f60b3ae6a",
        vera.B: "8e2750bbfc40c042e92f49b925b2fca4e25efe9a3bbd8c1a9aea6e981d55ae2f",
        sparse.support: "51755b379b60a3d4a4f28f15945dd8728c24f50e279b7f3548f2bdc143dc94b4",
        train_gpt.Combination(spec, 2).maps: (
            "0c0c9edec24793fb64ee7b8ccdd773c9d557cb368f8fd586405a562a2c80ffaf"
        ),
    }
    for tensor, digest in expected.items():
        assert sha256(tensor) == digest


@pytest.mark.parametrize("shape", SHAPES)
def test_other_threads_generate_the_same_bits(shape):
    threads, drawn = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            drawn.append(generate(*shape, seed=5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)


def test_maps_are_the_same_in_every_type_of_activations_and_in_a_layer_of_its_own(settings):
    """The bfloat16 rounding is the map: runs in float32 and bfloat16 share one artifact."""
    narrow, wide = (train_gpt.GPT(settings(), dtype) for dtype in (torch.bfloat16, torch.float32))
    assert narrow.fingerprint() == wide.fingerprint()
    spec = narrow.table["blocks.1.mlp.fc"]
    alone = train_gpt.FrozenRandomLinearWithLoRA(
        spec.in_features, spec.out_features, rank=2, seed=spec.seed
    )
    assert torch.equal(narrow.blocks[1].mlp.fc.weight, alone.weight)


# ---- Seeds and fingerprint -----------------------------------------------------------------------


def test_seeds_are_those_of_the_published_system():
    offsets = {"q": 0, "k": 1, "v": 2, "proj": 3}
    kinds = {f"attention.{name}": offset for name, offset in offsets.items()}
    kinds |= {"mlp.fc": 10, "mlp.proj": 11}
    table = train_gpt.build_map_table(train_gpt.load_settings({}))
    seeds = {name: spec.seed for name, spec in table.items() if spec.is_random}
    assert seeds == {
        f"blocks.{layer}.{kind}": 12345 + 100 * layer + offset
        for layer in range(11)
        for kind, offset in kinds.items()
    }


def test_signs_are_those_of_their_seeds_and_nothing_of_them_is_stored(settings):
    """Each sign is ±1 from the Philox stream of MAP_SEED + 30 and 31, and only seeds know it."""
    h = settings(map_basis="learned,bigram.signs=rademacher", map_seed=5)
    model = train_gpt.GPT(h)
    for name, seed in (("previous", 35), ("current", 36)):
        words = train_gpt.random_uint64(seed, h.vocab_size * h.bigram_dim)
        expected = [1.0 if word < 2**63 else -1.0 for word in words.tolist()]
        assert model.bigram.signs[name].weight.flatten().tolist() == expected
    assert not [name for name in model.state_dict() if "signs" in name]
    other = train_gpt.GPT(settings(map_basis="learned,bigram.signs=rademacher", map_seed=6))
    assert model.fingerprint() != other.fingerprint()


def test_the_fingerprint_is_the_hash_of_the_maps_in_their_order(settings, random_model):
    """Whatever is learned, and whatever is switched on around the maps, it proves the maps."""
    model = train_gpt.GPT(settings())
    original = model.fingerprint()
    digest = hashlib.sha256()
    for spec in (spec for spec in model.table.values() if spec.is_random):
        bits = model.get_submodule(spec.name).weight.view(torch.int16)
        digest.update(bits.numpy().astype("<i2").tobytes())
    assert original == digest.hexdigest()
    other = random_model(settings(bigram_vocab_size=0, smear_enabled=0))
    assert other.fingerprint() == original


@pytest.mark.parametrize(
    ("adapter", "generated"),
    [
        ("none", "weight"),
        ("vera:4", "vera.A"),
        ("sparse:0.3", "sparse.support"),
        ("combination:2", "combination.maps"),
    ],
)
def test_the_fingerprint_is_of_all_that_seeds_generate(settings, adapter, generated):
    """Other places or factors give garbage as surely as other maps do."""
    model = train_gpt.make_model(settings(map_adapter=adapter))
    original = model.fingerprint()
    assert original == train_gpt.make_model(settings(map_adapter=adapter)).fingerprint()
    changed = model.blocks[1].mlp.fc.get_buffer(generated).flatten()
    changed[0] = 1 - changed[0]
    assert model.fingerprint() != original
