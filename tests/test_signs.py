"""Signs of pairs on the bigram table: what they are, and what they leave as it was.

The model with signs stands in test_model.py, test_streaming.py and test_variants.py.
"""

from __future__ import annotations

import torch

from helpers import train_gpt
from reference import tokens

SIGNED = "learned,bigram.signs=rademacher"


def test_signs_are_those_of_their_seeds_and_nothing_of_them_is_stored(settings):
    """Each sign is ±1 from the Philox stream of MAP_SEED + 30 and 31, and only seeds know it."""
    h = settings(map_basis=SIGNED, map_seed=5)
    model = train_gpt.GPT(h)
    for name, seed in (("previous", 35), ("current", 36)):
        words = train_gpt.random_uint64(seed, h.vocab_size * h.bigram_dim)
        expected = [1.0 if word < 2**63 else -1.0 for word in words.tolist()]
        assert model.bigram.signs[name].weight.flatten().tolist() == expected
    assert not [name for name in model.state_dict() if "signs" in name]
    other = train_gpt.GPT(settings(map_basis=SIGNED, map_seed=6))
    assert model.fingerprint() != other.fingerprint()


def test_the_table_without_signs_is_the_published_one(settings, random_model):
    """`none`, the default, and a table of ones read the same."""
    published = random_model(settings())
    signed = random_model(settings(map_basis="orthogonal,bigram.signs=rademacher"))
    for signs in signed.bigram.signs.values():
        signs.weight.fill_(1)
    assert torch.equal(published.predict(tokens(2, 20)), signed.predict(tokens(2, 20)))
