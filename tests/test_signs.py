"""Signs of pairs on the bigram table: against a restatement, as a memory, and in a whole run."""

from __future__ import annotations

import json
import math

import pytest
import torch

import helpers
from helpers import train_gpt

SIGNED = "learned,bigram.signs=rademacher"


def restated_rows(model, ids: list[int]) -> torch.Tensor:
    """Return what BigramTable reads for one row of tokens before its projection, float64."""
    table = model.bigram.weight.double()
    dim = table.size(1)
    h = model.bigram.signs
    rows = []
    for position, current in enumerate(ids):
        previous = ids[position - 1] if position else 0
        bucket = len(table) - 1
        if position:
            bucket = ((36313 * current) ^ (27191 * previous)) % (len(table) - 1)
        signs = h["previous"].weight[previous] * h["current"].weight[current]
        assert signs.shape == (dim,)
        rows.append(table[bucket] * signs.double())
    return torch.stack(rows)


def test_a_pair_reads_its_row_under_its_own_signs(settings, random_model):
    """In float64 the table gives what a loop over the tokens gives, to the last bits."""
    model = random_model(settings(map_basis=SIGNED), torch.float64)
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(1))
    read = model.bigram(ids)
    for row, tokens in zip(read, ids.tolist(), strict=True):
        expected = restated_rows(model, tokens) @ model.bigram.proj.weight.T
        torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-12)


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


def test_pairs_that_share_a_row_read_what_each_wrote_up_to_noise():
    """A row is the sum of what 16 pairs wrote under their signs; each reads its own part again.

    The others' parts are signs of mean zero: over 4,096 dimensions the mean product of a read and
    what was written is 1 with a standard deviation of √15/64. Without signs all read the same.
    """
    dim, pairs = 4096, 16
    seeds = torch.arange(pairs)
    spec = train_gpt.MapSpec("", pairs, dim, "rademacher", gain=math.sqrt(dim))
    previous = train_gpt.FrozenRows(spec._replace(seed=1))(seeds).double()
    current = train_gpt.FrozenRows(spec._replace(seed=2))(seeds.flip(0)).double()
    signs = previous * current
    written = torch.randn(pairs, dim, generator=torch.Generator().manual_seed(0)).double().sign()
    row = (signs * written).sum(0)
    agreement = (signs * row * written).mean(1)
    noise = math.sqrt((pairs - 1) / dim)
    assert (agreement - 1).abs().max() < 5 * noise
    unsigned = (written.sum(0) * written.roll(1, 0)).mean(1) - 1
    assert unsigned.abs().max() < 5 * noise  # what another pair wrote is noise, too


def test_the_table_without_signs_is_the_published_one(settings, random_model):
    """`none`, the default, and a table of ones read the same; signs change what is read."""
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    published = random_model(settings())
    signed = random_model(settings(map_basis=f"orthogonal,{SIGNED.partition(',')[2]}"))
    assert not torch.allclose(published.predict(ids), signed.predict(ids), atol=0.1)
    for signs in signed.bigram.signs.values():
        signs.weight.fill_(1)
    assert torch.equal(published.predict(ids), signed.predict(ids))


def test_streaming_reads_the_pairs_across_rows(settings, random_model):
    """The first token of a row of the stream is a pair with the last token of the row above."""
    model = random_model(settings(map_basis=SIGNED, vrl_enabled=0))
    ids = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(1))
    whole = model.embed_tokens(ids, streaming=False)
    rows = model.embed_tokens(ids.view(2, 32), streaming=True)
    assert torch.equal(rows.view(1, 64, -1), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map_basis": "learned,bigram.signs=learned"}, "none or random"),
        ({"map_basis": "learned,mlp=none"}, "only bigram.signs can be none"),
        ({"map_basis": SIGNED, "map_scale": "bigram.signs=row"}, "none or random"),
        ({"map_basis": SIGNED, "bigram_vocab_size": 0}, "bigram.signs selects no map"),
    ],
)
def test_a_table_of_signs_that_cannot_be_built_is_refused(settings, changes, message):
    """Each says what is wrong before anything is built."""
    with pytest.raises(train_gpt.UserError, match=message):
        settings(**{"map_adapter": "none"} | changes)


def test_a_signed_run_scores_the_same_from_its_artifact(corpus, tmp_path):
    """Training, the exact score and the streaming score work, and the artifact scores again."""
    given = helpers.TINY | corpus.settings | {"OUTPUT_DIR": tmp_path, "RUN_ID": "signed"}
    helpers.run_well(given | {"MAP_BASIS": SIGNED, "MAP_ADAPTER": "none"})
    results = json.loads((tmp_path / "signed" / "results.json").read_text())
    (artifact,) = (tmp_path / "signed").glob("model*.ptz")
    score = corpus.settings | {"EVAL_ONLY": 1, "MODEL_PATH": artifact}
    score |= {name: helpers.TINY[name] for name in ("EVAL_SEQ_LEN", "EVAL_STRIDE", "DTYPE")}
    again = helpers.run_well(score)
    assert f"val_bpb:{results['val_bpb_sliding_window']:.8f}" in again
    assert "val_bpb:" in helpers.run_well(score | {"EVAL_MODE": "streaming"})
