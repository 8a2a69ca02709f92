"""bench/speed.py: the textbook's model is ours, and every subcommand runs."""

from __future__ import annotations

import multiprocessing.dummy
import os
from unittest import mock

import pytest
import torch

from bench import speed, textbook
from helpers import ROOT, finish, start, train_gpt
from reference import tokens

BATCHES = [(part[:, :-1], part[:, 1:]) for part in tokens(4, 17).split(2)]


def by_name(model):
    """Return the parameters by what the textbook calls them."""
    return {name.replace(".lora.", "."): p for name, p in model.named_parameters()}


@pytest.mark.parametrize("stretch_from", [1024, 4])
def test_textbook_has_our_loss_and_gradients(settings, random_model, stretch_from):
    h = settings(rope_stretch_from=stretch_from)
    ours = random_model(h, torch.float64)
    theirs = textbook.Textbook(h, ours, torch.float64)
    loss, other = ours(*BATCHES[0]), theirs(*BATCHES[0])
    assert other.item() == pytest.approx(loss.item(), rel=1e-5)  # logits are float32 in both
    loss.backward()
    other.backward()
    found = by_name(theirs)
    assert found.keys() == by_name(ours).keys()
    for name, p in by_name(ours).items():
        assert (found[name].grad - p.grad).norm() < 1e-5 * p.grad.norm(), name


def test_textbook_takes_our_step(settings, random_model, processes):
    h = settings(factor_lr=0.02, factor_wd=0.1)
    ours = random_model(h)
    theirs = textbook.Textbook(h, ours, torch.float32)
    step = textbook.TextbookStep(h, theirs, compiled=False)
    our_step = speed.OurStep(h, processes, ours, compiled=False)
    for _ in range(2):
        loss = our_step(BATCHES)
        assert step(BATCHES).item() == pytest.approx(loss.item(), rel=1e-5)
    for name, p in by_name(ours).items():
        torch.testing.assert_close(by_name(theirs)[name], p, rtol=1e-3, atol=1e-3, msg=name)


def measure_here(sides, options, calls=1):
    """Do the work of speed.compare in this process, each side once."""
    facts = {}
    for side in sides:
        with mock.patch.dict(os.environ, side.variables):
            h = train_gpt.load_settings()
            with train_gpt.Distributed(h) as dist:
                seconds, result = speed.timed(side.build(h, dist))
        values = {name: float(value) for name, value in result.items()}
        facts[side.name] = {"seconds": seconds, "memory": 0} | values
    return facts


@pytest.fixture
def shown(capsys, monkeypatch):
    """shown(*arguments): what a subcommand prints at its smallest size, without its processes."""
    monkeypatch.setattr(speed, "ON_CUDA", False)
    monkeypatch.setattr(speed, "PROCESSES", multiprocessing.dummy)
    monkeypatch.setattr(speed, "compare", measure_here)

    def show(*arguments):
        with mock.patch.dict(os.environ, {"DEVICE": "cpu", "DTYPE": "float32"}):
            speed.main([*arguments, "--smoke"])
        return capsys.readouterr().out

    return show


def column(text, name):
    """Return the cells of a column of the table that has it, by the first cell of their row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    begin = next(i for i, row in enumerate(rows) if name in row)
    place = rows[begin].index(name)
    return {row[0]: row[place] for row in rows[begin + 2 :] if len(row) == len(rows[begin])}


def test_all_sides_of_a_step_compute_the_same_loss(shown):
    losses = column(shown("step", "--with", "MAP_ADAPTER=lora:8"), "last loss")
    assert float(losses["ours"]) == pytest.approx(float(losses["textbook"]), abs=2e-4)
    assert "ours, MAP_ADAPTER=lora:8" in losses and "learned in full" in losses


def test_the_evaluation_and_the_loops_over_its_windows_agree(shown):
    losses = column(shown("eval"), "nats per token")
    exact = float(losses.pop("exact"))
    assert set(losses) == {"streaming", "loop over the same model", "loop over the textbook"}
    for name, loss in losses.items():
        assert float(loss) == pytest.approx(exact, abs=1e-2 if name == "streaming" else 2e-6)


def test_stages_kernels_and_starts_are_timed(shown, monkeypatch):
    table = column(shown("export"), "calibration")
    assert table["ours"].endswith("s") and "GPTQ one by one" in table
    text = shown("kernels")
    assert len(column(text, "thin")) >= 4
    assert len(column(text, "fused")) == 2 and len(column(text, "torch's")) == 1
    done = mock.Mock(stdout=b"", returncode=0)
    monkeypatch.setattr(speed.subprocess, "run", lambda *_, **__: done)
    assert len(column(shown("start"), "time")) == 4


def test_sides_are_processes_that_take_turns():
    sides = ["--with", "MODEL_DIM=33", "--only", "ours", "ours, MODEL_DIM=33"]
    arguments = ["step", "--smoke", *sides]
    result = finish(start({}, script=ROOT / "bench" / "speed.py", arguments=arguments), timeout=300)
    assert result.returncode == 0, result.stderr
    assert f"torch {torch.__version__}" in result.stdout
    assert "MODEL_DIM=33: failed" in result.stdout  # and does not hold up the other side
    assert list(column(result.stdout, "tokens/s")) == ["ours"]
