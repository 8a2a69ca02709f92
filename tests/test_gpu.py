"""What only CUDA executes: attention kernels, streaming, compiled training and evaluation, NCCL.

These tests are left out unless `-m gpu` asks for them: `bash bench/gpu.sh tests` does. They skip
where torch finds no GPU.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.nn.attention import sdpa_kernel

import helpers
from helpers import train_gpt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU"),
]

ON_GPU = {"DEVICE": "cuda", "DTYPE": "bfloat16", "MODEL_DIM": 64, "ROPE_DIMS": 8}


def heads(length: int, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Return q (B, T, 4, 64), k and v (B, T, 2, 64), float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, count, 64) for count in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_each_attention_kernel_is_near_float64(kernel):
    q, k, v = heads(256)
    expected = train_gpt.block_attention(q, k, v, 256)
    on_gpu = [x.to("cuda", torch.bfloat16) for x in (q, k, v)]
    with sdpa_kernel([train_gpt.SDPA_BACKENDS[kernel]]):
        y = train_gpt.causal_attention(*on_gpu)
    assert relative_error(y, expected) < 1e-2


def test_last_queries_attend_as_all_do():
    q, k, v = (x.to("cuda", torch.bfloat16) for x in heads(256))
    everything = train_gpt.causal_attention(q, k, v)[:, -16:]
    assert (
        relative_error(train_gpt.causal_attention(q[:, -16:], k, v), everything.double().cpu())
        < 1e-2
    )


def test_streaming_by_flash_is_streaming_by_blocks():
    q, k, v = heads(128, batch=3)
    shift = torch.zeros(1, 8).cos(), torch.zeros(1, 8).sin()
    on_cpu = [x.float() for x in (q, k, v)]
    expected = train_gpt.streaming_attention(*on_cpu, shift).double()
    on_gpu = [x.to("cuda", torch.bfloat16) for x in (q, k, v)]
    row_shift = tuple(x.to("cuda", torch.bfloat16) for x in shift)
    assert relative_error(train_gpt.streaming_attention(*on_gpu, row_shift), expected) < 2e-2


def test_compiled_muon_takes_the_steps_of_the_eager_one(settings):
    h = settings(device="cuda")
    steps = []
    for compiled in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 32, device="cuda"))
        muon = train_gpt.Muon([p], compiled=compiled, dist=train_gpt.Distributed(h))
        for _ in range(3):
            p.grad = p.detach() * 0.1
            muon.step()
        steps.append(p.detach().double().cpu())
    assert relative_error(steps[1], steps[0]) < 1e-3


def results_of(folder, run_id: str) -> dict:
    return json.loads((folder / run_id / "results.json").read_text())


def test_a_run_compiles_trains_and_scores(corpus, tmp_path):
    changes = {"OUTPUT_DIR": tmp_path, **ON_GPU, **corpus.settings}
    eager = helpers.TINY | changes | {"RUN_ID": "eager"}
    compiled = helpers.TINY | changes | {"RUN_ID": "compiled", "COMPILE": "1"}
    helpers.run_well(eager)
    helpers.run_well(compiled)
    log = (tmp_path / "compiled" / "train.log").read_text()
    assert re.search(r"^attention: the first of (fa3, )?cudnn,", log, re.MULTILINE)
    difference = (
        results_of(tmp_path, "eager")["val_bpb"] - results_of(tmp_path, "compiled")["val_bpb"]
    )
    assert abs(difference) < 0.05


def test_one_process_of_torchrun_uses_nccl(corpus, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    changes = {"OUTPUT_DIR": tmp_path, "RUN_ID": "nccl", **ON_GPU, **corpus.settings}
    helpers.run_well(helpers.TINY | changes, launcher=launcher)
    assert results_of(tmp_path, "nccl")["hardware"].startswith("1 x NVIDIA")


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_compiled_evaluation_scores_as_eager(settings, mode, monkeypatch):
    h = settings(
        device="cuda", dtype="bfloat16", compile="1", eval_mode=mode, model_dim=64, rope_dims=8
    )
    tokens = torch.randint(0, h.vocab_size, (3000,), generator=torch.Generator().manual_seed(1))
    scores = []
    with train_gpt.Distributed(h) as dist:
        torch.manual_seed(0)
        model = train_gpt.make_model(h, torch.bfloat16).to(dist.device)
        for batches in (10**9, 0):
            monkeypatch.setitem(train_gpt.COMPILED_BATCHES, "cuda", batches)
            scores.append(train_gpt.evaluate(model, tokens, h, dist, h.eval_stride))
    assert abs(scores[0] - scores[1]) < 2e-3
