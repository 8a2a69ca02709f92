"""Fixtures of all tests: a clean environment, tiny settings, models, one process, one corpus."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch

from helpers import (
    NOT_INHERITED,
    Corpus,
    KeptLog,
    make_corpus,
    tiny_settings,
    train_gpt,
    write_shard,
)
from reference import tokens

# Tiny models gain nothing from threads, and wait long for them on shared cores: one thread unless
# the environment asks for more, here and in the processes that tests start.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# Every run tries the same examples, however slow the machine is.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def clean_environment():
    """Take settings and a launcher's variables out of the environment, for the whole session."""
    with pytest.MonkeyPatch.context() as patch:
        for name in NOT_INHERITED:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(params=["with AMX", "without AMX"])
def either_cpu(request, monkeypatch):
    """Run a test twice: with what train_gpt chooses on each kind of CPU."""
    monkeypatch.setattr(train_gpt, "HAS_AMX", request.param == "with AMX")


@pytest.fixture(scope="session")
def settings():
    """settings(**changes): the Hyperparameters of the tiny model, see TINY."""
    return tiny_settings


@pytest.fixture(scope="session")
def random_model():
    """random_model(h, dtype): a GPT whose learned values depend on their names and shapes alone.

    Zero adapters and gates hide mistakes.
    """

    def build(h: train_gpt.Hyperparameters, dtype: torch.dtype = torch.float32) -> train_gpt.GPT:
        model = train_gpt.GPT(h, dtype)
        with torch.no_grad():
            for name, p in model.named_parameters():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                p.copy_(0.4 * torch.randn(p.shape, generator=generator) + 0.5 * (p.ndim == 1))
        return model.double() if dtype is torch.float64 else model

    return build


@pytest.fixture(scope="session")
def processes(settings, clean_environment):
    """The Distributed of one process on the CPU, also where there is a GPU."""
    return train_gpt.Distributed(settings(device="cpu"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """A small corpus with its tokenizer. It is shared: tests that damage it copy it first."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder that the runs of a file lie in."""
    return tmp_path_factory.mktemp("runs")


# ---- Runs in this process ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data_settings(settings, tmp_path_factory):
    """data_settings(**changes): settings of a run on shards of random tokens, most of them low."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        ids = 64 * np.random.default_rng(number).random(3000) ** 2
        write_shard(folder / f"fineweb_train_{number:06}.bin", ids.astype(int))
    return lambda **changes: settings(**{"data_path": str(folder)} | changes)


@pytest.fixture
def run_of(processes, tmp_path):
    """run_of(h, model): a run in this process, with a tokenizer and a validation text of no use."""

    def make(h, model=None):
        val = SimpleNamespace(tokens=tokens(50), bytes=50, bits_per_byte=lambda loss: loss)
        tokenizer = SimpleNamespace(sha256="0" * 64)
        log, stop = KeptLog(model), train_gpt.StopSignal()
        return train_gpt.Run(h, processes, log, stop, tokenizer, val, tmp_path)

    return make


@pytest.fixture
def trainer_of(run_of):
    """trainer_of(h): a trainer of a new model."""

    def make(h):
        torch.manual_seed(0)
        model = train_gpt.make_model(h)
        return train_gpt.Trainer(run_of(h, model), model, train_gpt.TrainingData(h), None)

    return make
