"""What the tests share: train_gpt.py as a module, a clean environment, tiny settings and models."""

from __future__ import annotations

import dataclasses
import signal
import sys
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt

torch.set_num_threads(
    1
)  # tiny models gain nothing from threads, and wait long for them on shared cores

TINY = {
    "num_layers": 4,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "xsa_last_n": 4,
    "vocab_size": 64,
    "bigram_vocab_size": 32,
    "bigram_dim": 8,
    "ve_dim": 8,
    "ve_layers": "2,3",
    "map_adapter": "lora:4",
    "train_seq_len": 16,
    "eval_seq_len": 16,
    "eval_stride": 4,
    "train_batch_tokens": 64,
    "holdout_tokens": 64,
    "dtype": "float32",
    "iterations": 4,
    "warmup_steps": 1,
    "gptq_calib_batches": 1,
    "compile": "0",
}


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "campaign: a larger sample of bench/faults.py, which takes minutes"
    )
    # A shell's background jobs ignore Ctrl-C, and so would the processes that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Without `-m` the campaign is left out."""
    if not config.getoption("-m"):
        left_out = [item for item in items if item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def clean_environment():
    """A user's shell must not change the tests: settings and torchrun's variables are taken out of it.

    For the whole session, so that fixtures of every scope see the same environment.
    """
    names = [f.name for f in dataclasses.fields(train_gpt.Hyperparameters)] + list(
        train_gpt.PUBLISHED
    )
    names = {name.upper() for name in names} | set(train_gpt.NOT_HERE)
    with pytest.MonkeyPatch.context() as patch:
        for name in names | {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(params=["with AMX", "without AMX"])
def either_cpu(request, monkeypatch):
    """What train_gpt chooses by the kind of CPU, as on each of both."""
    monkeypatch.setattr(train_gpt, "AMX", request.param == "with AMX")


@pytest.fixture(scope="session")
def settings():
    """settings(**changes): Hyperparameters of a model so small that building it takes milliseconds."""
    return lambda **changes: train_gpt.Hyperparameters(**(TINY | changes))


@pytest.fixture(scope="session")
def random_model(settings):
    """random_model(h, dtype): a GPT none of whose learned values is at its initial value.

    Zero adapters and gates hide mistakes. The values depend on the parameter's name alone, so two models that
    differ in one setting share all they can share.
    """

    def build(h: train_gpt.Hyperparameters, dtype: torch.dtype = torch.float32) -> train_gpt.GPT:
        model = train_gpt.GPT(h, dtype)
        with torch.no_grad():
            for name, p in model.named_parameters():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                p.copy_(
                    0.4 * torch.randn(p.shape, generator=generator) + (0.5 if p.ndim == 1 else 0.0)
                )
        return model.double() if dtype is torch.float64 else model

    return build


@pytest.fixture(scope="session")
def processes(settings):
    """One process on the CPU, also where there is a GPU: what is tested here is the same on both."""
    alone = train_gpt.World(settings())
    alone.on_cuda, alone.device = False, torch.device("cpu")
    return alone
