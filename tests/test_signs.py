"""Signs and gate of the bigram table: what they are, and what they leave as it was.

The model with both stands in test_model.py, test_streaming.py and test_variants.py.
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


def test_a_gate_begins_open_and_asks_the_token_and_the_one_before(settings, random_model):
    """Gates of 0 read every row as it is; one that answers to a token weakens its two pairs."""
    plain = random_model(settings(map_basis=SIGNED))
    gated = random_model(settings(map_basis=SIGNED, bigram_gate=1))
    ids, mark = torch.arange(20)[None], 7
    with torch.no_grad():
        gated.bigram.gates.zero_()
        assert torch.equal(plain.predict(ids), gated.predict(ids))
        for gates, position in ((gated.bigram.gates[0], mark + 1), (gated.bigram.gates[1], mark)):
            embedded = torch.zeros(1, 20, gates.numel())
            embedded[0, mark, 0] = 1
            gates[0] = -1000
            read = gated.bigram(ids, embedded)[0].norm(dim=-1)
            gates.zero_()
            assert (read == 0).nonzero().flatten().tolist() == [position]
