"""What only CUDA executes: attention kernels, streaming, compiled training and evaluation, NCCL.

These tests are left out unless `-m gpu` asks for them, as `bash bench/gpu.sh tests` does.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.attention import sdpa_kernel

from helpers import TINY, TWO_PROCESSES, log_of, results_of, run_well, train_gpt
from reference import tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU"),
]

ON_GPU = {"DEVICE": "cuda", "DTYPE": "bfloat16", "MODEL_DIM": 64, "ROPE_DIMS": 8}


def heads(length: int, batch: int = 2) -> list[torch.Tensor]:
    """Return q (B, T, 4, 64), k and v (B, T, 2, 64), float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, count, 64) for count in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_each_attention_kernel_is_near_float64(kernel):
    q, k, v = heads(256)
    expected = train_gpt.block_attention(q, k, v, 256)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in (q, k, v))
    with sdpa_kernel([train_gpt.SDPA_BACKENDS[kernel]]):
        assert relative_error(train_gpt.causal_attention(q, k, v), expected) < 1e-2
    last = train_gpt.causal_attention(q[:, -16:], k, v)  # of fewer queries than keys
    assert relative_error(last, expected[:, -16:]) < 1e-2


def test_streaming_by_flash_is_streaming_by_blocks():
    qkv = heads(128, batch=3)
    shift = torch.ones(1, 8), torch.zeros(1, 8)  # cosines and sines of 0
    expected = train_gpt.streaming_attention(*(x.float() for x in qkv), shift).double()
    on_gpu = [x.to("cuda", torch.bfloat16) for x in (*qkv, *shift)]
    found = train_gpt.streaming_attention(*on_gpu[:3], tuple(on_gpu[3:]))
    assert relative_error(found, expected) < 2e-2


@pytest.fixture
def here(corpus, tmp_path):
    """Settings of a run whose folder is in this test's own."""
    return {**TINY, "OUTPUT_DIR": tmp_path, **ON_GPU, **corpus.settings}


def test_a_run_compiles_trains_and_scores(here, tmp_path):
    for name in ("eager", "compiled"):
        run_well(here | {"RUN_ID": name, "COMPILE": int(name == "compiled")})
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    assert re.search(r"^attention: the first of (fa3, )?cudnn,", log_of(compiled), re.MULTILINE)
    assert abs(results_of(eager)["val_bpb"] - results_of(compiled)["val_bpb"]) < 0.05


def test_one_process_of_torchrun_uses_nccl(here, tmp_path):
    run_well(here | {"RUN_ID": "nccl"}, launcher=(*TWO_PROCESSES[:-1], "--nproc_per_node=1"))
    assert results_of(tmp_path / "nccl")["hardware"].startswith("1 x NVIDIA")


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_compiled_evaluation_scores_as_eager(settings, mode, monkeypatch):
    changes = {name.lower(): value for name, value in ON_GPU.items()}
    h = settings(**changes, compile="1", eval_mode=mode)
    scores = []
    with train_gpt.Distributed(h) as dist:
        torch.manual_seed(0)
        model = train_gpt.make_model(h, torch.bfloat16).to(dist.device)
        for batches in (10**9, 0):
            monkeypatch.setitem(train_gpt.COMPILED_BATCHES, "cuda", batches)
            scores.append(train_gpt.evaluate(model, tokens(3000), h, dist, h.eval_stride))
    assert abs(scores[0] - scores[1]) < 2e-3
