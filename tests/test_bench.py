"""The measuring programs of bench/: the textbook's model is ours, and every program runs."""

from __future__ import annotations

import os

import pytest
import torch

import helpers
from bench import common, textbook
from helpers import ROOT, train_gpt

PROGRAMS = (
    "cpu",
    "memory",
    "kernels",
    "step",
    "roofline",
    "eval",
    "export",
    "start",
    "scaling",
    "target",
)


def textbook_name(name: str) -> str:
    """Return what the textbook calls a parameter of ours."""
    return name.replace(".lora.", ".")


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (4, 17), generator=generator)
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(2)]


# Logits are float32 in both, whatever the type.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("stretch_from", [1024, 4])
def test_textbook_has_our_loss_and_gradients(
    settings, random_model, batches, dtype, tolerance, stretch_from
):
    h = settings(rope_stretch_from=stretch_from)
    ours = random_model(h, dtype)
    theirs = textbook.Textbook(h, ours, dtype)
    ids, targets = batches[0]
    loss, other = ours(ids, targets), theirs(ids, targets)
    assert other.item() == pytest.approx(loss.item(), rel=tolerance)
    loss.backward()
    other.backward()
    gradients = {textbook_name(name): p.grad for name, p in ours.named_parameters()}
    parameters = dict(theirs.named_parameters())
    assert set(parameters) == set(gradients)
    for name, p in parameters.items():
        apart = (p.grad - gradients[name]).norm() / gradients[name].norm()
        assert apart < tolerance, name


def test_muon_matrix_by_matrix_is_ours():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 4), (8, 4), (4, 12))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {"params": theirs, "lr": 0.1, "weight_decay": 0.1}
    muons = [
        train_gpt.Muon(ours, lr=0.1, momentum=0.9, backend_steps=5, weight_decay=0.1),
        textbook.Muon([group], momentum=0.9, steps=5),
    ]
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for muon in muons:
            muon.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_textbook_takes_our_step(settings, random_model, processes, batches):
    h = settings(factor_lr=0.02, factor_wd=0.1)
    ours = random_model(h)
    theirs = textbook.Textbook(h, ours, torch.float32)
    step = textbook.TextbookStep(h, theirs, compiled=False)
    our_step = common.OurStep(h, processes, ours, compiled=False)
    for _ in range(2):
        loss = our_step(batches)
        assert step(batches).item() == pytest.approx(loss.item(), rel=1e-5)
    parameters = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        other = parameters[textbook_name(name)]
        torch.testing.assert_close(other, p, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_runs_and_prints_its_table(program):
    # With the allocator's variables, the program need not start itself again.
    kept = {"OMP_NUM_THREADS": "1"} | common.KEEP_FREED_MEMORY
    command = [ROOT / "bench" / f"{program}.py", "--smoke"]
    process = helpers.fork_server().start(command, os.environ | kept, with_children=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"# {program}.py: smoke run" in out
    assert f"torch {torch.__version__}" in out
    first = {"roofline": "part", "target": "preset"}.get(program, "what")
    table = out[out.index(f"| {first} |") :].split("\n\n")[0]
    assert len(table.splitlines()) >= 4  # header, rule, and some rows
