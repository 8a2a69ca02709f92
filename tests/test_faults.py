"""Tests by a small sample of bench/faults.py, and properties of what a run stores.

The program injects faults into real processes. `pytest -m campaign tests/test_faults.py` takes more
of them, `python bench/faults.py` all. Those of two ranks are in test_ranks.py.
"""

from __future__ import annotations

import math
import random
import string

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import train_gpt
from bench import faults
from helpers import nothing_lost

LARGER = 0.1  # fraction of the campaign behind the marker


@pytest.fixture(scope="module")
def site(corpus, tmp_path_factory):
    """Where the runs lie; the undisturbed run, and one killed in training, are made once."""
    return faults.Site(tmp_path_factory.mktemp("faults"), corpus, forks=True)


# ---- Processes ---------------------------------------------------------------------------------


def test_killed_runs_end_as_if_nothing_had_been(site):
    moments = ["operation", "export"]
    nothing_lost(faults.kills(site, 2, seed=7, variants=[faults.USUAL], moments=moments), 2)


def test_a_signal_in_training_saves_and_leaves(site):
    nothing_lost(faults.signals(site, 1, seed=1, moments=["training"]), 1)


def test_a_file_that_cannot_grow_costs_no_checkpoint(site):
    nothing_lost(faults.disk(site, 1, seed=1, only=["file size limit"]), 1)


def test_a_missing_file_is_named(site):
    nothing_lost(faults.disk(site, 1, seed=2, only=["missing"]), 1)


def test_a_missing_package_is_named_at_once(site):
    nothing_lost(faults.packages(site, 4, seed=1), 4)


def test_not_a_number_is_found_and_the_last_checkpoint_exports(site):
    nothing_lost(faults.not_a_number(site, 1, seed=1), 1)


def test_two_processes_of_one_run_do_not_meet(site):
    nothing_lost(faults.twice(site, 1, seed=1), 1)


# ---- Files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count"), [("artifacts", 20), ("shards", 40), ("checkpoints", 20)]
)
def test_spoiled_files_are_refused(site, kind, count):
    tally = getattr(faults, kind)(site, count, seed=1)
    nothing_lost(tally, count)
    assert tally.seconds < faults.SLOWEST
    assert tally.memory < faults.LARGEST
    refused = sum(found for where, found in tally.landed.items() if "refused" in where)
    assert refused > count / 3, "the rest is harmless: the sample must not be"


def test_a_loss_is_counted(site):
    """The campaign itself must see one: here a run that ended in other bytes, and a torn file."""
    settings = site.copy_of(site.undisturbed())
    folder = site.runs / settings["RUN_ID"]
    blob = (folder / "model.int6.ptz").read_bytes()
    (folder / "model.int6.ptz").write_bytes(blob[:-1])
    (folder / "checkpoint.pt").write_bytes(b"")
    (folder / "results.json.part").touch()
    first, second, third = site.ends_like(settings)
    assert (first, second) == ("the artifact has other bytes", "results.json.part was left")
    assert "no checkpoint loads" in third
    tally = faults.Tally("a kind")
    tally.add("export", [first, second], faults=2)
    assert (tally.injected, tally.survived, len(tally.lost)) == (2, 0, 2)
    assert "| a kind | 2 | 0 | 2 |" in tally.row()


def test_a_run_that_fails_by_itself_is_no_survivor(site):
    """As where the script has changed so that a fault has no place in it."""
    settings = site.settings(faults.USUAL) | {"ITERATIONS": "many"}
    with pytest.raises(RuntimeError, match="ITERATIONS"):
        faults.kill_once(site, settings, faults.USUAL, "operation", random.Random(1))


@pytest.mark.campaign
@pytest.mark.parametrize("kind", faults.KINDS)
def test_campaign(site, kind):
    function, full = faults.KINDS[kind]
    nothing_lost(function(site, math.ceil(LARGER * full), seed=2), 1)


# ---- Properties --------------------------------------------------------------------------------

examples = hypothesis.settings(max_examples=60, database=None)
NAMES = st.lists(
    st.text(string.ascii_lowercase + ".", min_size=1, max_size=8), unique=True, max_size=6
)
SHAPES = st.lists(st.integers(0, 9), max_size=2)  # what an artifact may hold


@st.composite
def stored(draw):
    """Draw {name: codes, floats or a mask} of any shapes, empty ones and single numbers too."""
    tensors = {}
    for name in draw(NAMES):
        kind = draw(st.sampled_from(("codes", "floats", "mask")))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        shape = draw(SHAPES)
        if kind == "codes":
            rows, columns = draw(st.integers(0, 9)), draw(st.integers(0, 9))
            codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
            exponents = torch.randint(0, 256, (rows,), generator=generator, dtype=torch.uint8)
            column_exponents = torch.randint(0, 256, (columns,), generator=generator).byte()
            has_columns = draw(st.booleans())
            tensors[name] = train_gpt.QuantizedTensor(
                codes, exponents, column_exponents if has_columns else None
            )
        elif kind == "mask":
            tensors[name] = torch.rand(shape, generator=generator) < 0.5
        else:
            tensors[name] = (100 * torch.randn(shape, generator=generator)).half().float()
    return tensors


@examples
@hypothesis.given(tensors=stored(), note=st.text(max_size=10))
def test_an_artifact_gives_back_what_was_put_in(tensors, note):
    blob, sizes = train_gpt.write_artifact({"note": note}, tensors, 4)
    header, found = train_gpt.read_artifact(blob)
    assert header["note"] == note
    assert sum(sizes.values()) == len(blob)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        is_coded = isinstance(tensor, train_gpt.QuantizedTensor)
        expected = tensor.dequantize() if is_coded else tensor.float()
        assert found[name].shape == expected.shape
        assert torch.equal(found[name], expected)


@examples
@hypothesis.given(
    values=st.lists(st.floats(-6e4, 6e4, width=16), min_size=1, max_size=30),
    bits=st.lists(st.booleans(), min_size=1, max_size=30),
)
def test_groups_are_byte_planes(values, bits):
    """All low bytes and then all high ones; a mask takes a bit each."""
    tensors = {"a.f": torch.tensor(values), "a.m": torch.tensor(bits)}
    raw = faults.Container(train_gpt.write_artifact({}, tensors, 4)[0]).groups()
    halves = np.array(values, "<f2").view(np.uint8).reshape(-1, 2)
    (floats,) = (data for name, data in raw.items() if name.endswith("float16"))
    (mask,) = (data for name, data in raw.items() if name.endswith("bits"))
    assert floats == halves[:, 0].tobytes() + halves[:, 1].tobytes()
    assert mask == np.packbits(bits).tobytes()


@examples
@hypothesis.given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 8),
    columns=st.integers(1, 40),
    scale=st.integers(-12, 12),
    bits=st.integers(2, 8),
    sigmas=st.floats(0.5, 30),
    zero=st.booleans(),
)
def test_quantizer_errs_by_half_a_scale_and_once(seed, rows, columns, scale, bits, sigmas, zero):
    quantizer, largest = train_gpt.Quantizer(bits, sigmas), 2 ** (bits - 1) - 1
    w = 2.0**scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[0] *= not zero
    codes = quantizer.quantize(w)
    scales = train_gpt.scales_of(codes.exponents)[:, None]
    inside = w.double().abs() <= largest * scales
    error = (codes.dequantize().double() - w.double()).abs()
    assert (error <= 0.500001 * scales)[inside].all()
    assert (codes.codes.abs() == largest)[~inside].all(), "what is clipped takes the largest code"
    assert not zero or (codes.exponents[0] == 0 and not codes.dequantize()[0].any())
    again = (codes.dequantize().double() / scales.clamp(min=1e-30)).round()
    assert torch.equal(again.to(torch.int8), codes.codes), "its own quantization is the same"


@examples
@hypothesis.given(data=st.data(), targets=st.integers(1, 400))
def test_windows_score_every_target_once_with_all_the_context_they_have(data, targets):
    length = data.draw(st.integers(1, targets))
    stride = data.draw(st.integers(1, length))
    starts, counts = train_gpt.plan_windows(targets, length, stride)
    scored = [
        (start + place, place)
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        for place in range(length - count, length)
    ]
    assert [target for target, _ in scored] == list(range(targets)), "each once, in order"
    assert starts[0] == 0
    assert starts[-1] + length == targets
    for target, before in scored:
        assert before >= min(target, length - stride), "tokens of its window before it"
