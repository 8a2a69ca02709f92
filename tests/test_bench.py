"""The measuring programs of bench/: the textbook's model is ours, and every program runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from bench import common, textbook

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("cpu", "memory", "kernels", "step", "roofline", "eval", "export", "start", "scaling")


def in_textbook(name: str) -> str:
    """What the textbook calls a parameter of ours."""
    return name.replace(".lora.", ".")


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (4, 17), generator=generator)
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(2)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 2e-6), (torch.float32, 1e-4)])
def test_the_textbooks_model_is_ours(settings, random_model, batches, dtype, tolerance):
    """The same loss and gradients from the same weights; logits are float32 in both, whatever the type."""
    h = settings()
    ours = random_model(h, dtype)
    theirs = textbook.Textbook(h, ours, dtype)
    ids, targets = batches[0]
    loss, other = ours(ids, targets), theirs(ids, targets)
    assert other.item() == pytest.approx(loss.item(), rel=tolerance)
    loss.backward()
    other.backward()
    gradients = {in_textbook(name): p.grad for name, p in ours.named_parameters()}
    parameters = dict(theirs.named_parameters())
    assert set(parameters) == set(gradients)
    for name, p in parameters.items():
        apart = (p.grad - gradients[name]).norm() / gradients[name].norm()
        assert apart < tolerance, name


def test_muon_matrix_by_matrix_is_ours():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 4), (8, 4), (4, 12))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muons = [
        train_gpt.Muon(ours, lr=0.1, momentum=0.9, backend_steps=5, weight_decay=0.1),
        textbook.Muon(theirs, lr=0.1, momentum=0.9, steps=5, weight_decay=0.1),
    ]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for muon in muons:
            muon.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)


def test_the_textbooks_step_is_ours(settings, random_model, batches):
    h, alone = settings(), SimpleNamespace(rank=0, count=1)
    ours = random_model(h)
    theirs = textbook.Textbook(h, ours, torch.float32)
    step = textbook.TextbookStep(h, theirs, compiled=False)
    optimizers = train_gpt.Optimizers(train_gpt.tensors_by_role(ours), h, alone)
    for i in range(2):
        loss = train_gpt.accumulate_gradients(ours, batches, lambda ids: None)
        optimizers.step(i, 1.0)
        assert step(batches).item() == pytest.approx(loss.item(), rel=1e-5)
    parameters = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(parameters[in_textbook(name)], p, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_runs_and_prints_its_table(program):
    kept = {
        "OMP_NUM_THREADS": "1"
    } | common.KEEP_FREED_MEMORY  # so that it need not start itself again
    command = [sys.executable, str(ROOT / "bench" / f"{program}.py"), "--smoke"]
    result = subprocess.run(
        command, env=os.environ | kept, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert f"# {program}.py: smoke run" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout
    first = "part" if program == "roofline" else "what"
    header = result.stdout.index(f"| {first} |")
    assert (
        len(result.stdout[header:].split("\n\n")[0].splitlines()) >= 4
    )  # header, rule, and some rows
