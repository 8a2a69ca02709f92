"""Faults: kills, signals, full disks, missing, torn and forged files, NaN, processes that die.

A run that was disturbed ends in the very bytes of one that was not. What cannot be used is refused
with one clear message, and the last good checkpoint still loads.
"""

from __future__ import annotations

import collections
import errno
import functools
import io
import itertools
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import brotli
import numpy as np
import pytest
import torch

import train_gpt
from helpers import (
    ROOT,
    TINY,
    TWO_PROCESSES,
    Container,
    Corpus,
    finish,
    log_of,
    refusal,
    results_of,
    run_well,
    sealed,
    start,
)

# Every state that a checkpoint must hold: optimizers, averages, dropout, a teacher, phases.
SETTINGS = TINY | {
    "NUM_LAYERS": 2,
    "ITERATIONS": 12,
    "GPTQ_CALIB_BATCHES": 1,
    "EVAL_STRIDE": 32,
    "EMA_DECAY": 0.9,
    "LATE_QAT_THRESHOLD": 0.4,
    "MAP_BASIS": "orthogonal,mlp.fc=learned",
    "MAP_FREEZE": "mlp.fc=0.5",
    "DROPOUT": 0.1,
    "SELF_DISTILL": 1,
    "DISTILL_START_FRAC": 0.3,
    "DISTILL_END_FRAC": 0.8,
    "RECUR_LAYERS": 1,
}
ARTIFACT = "model.int6.ptz"

# Runs the script with slow steps, so that a fault finds it in training, and leaves process ids.
DRIVER = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
rank = os.environ.get("RANK", "0")
Path(os.environ["OUTPUT_DIR"], os.environ["RUN_ID"] + "." + rank).write_text(str(os.getpid()))
step = train_gpt.Trainer.train_step
train_gpt.Trainer.train_step = lambda *given: time.sleep(0.2) or step(*given)
train_gpt.main()
"""


class Site:
    """Where runs and copies of them lie, and the run that nothing happened to."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.folder, self.corpus, self.numbers = folder, corpus, itertools.count()
        self.driver = folder / "driver.py"
        self.driver.write_text(DRIVER)
        self.killed: dict[str, Path] = {}  # what a kill at a moment leaves
        with pytest.MonkeyPatch.context() as patch:
            settings = self.settings()
            self.whole = self.run_of(settings)
            call_at_moments(patch, self.keep)
            run_well(settings)

    def settings(self, **changes: object) -> dict:
        own = {"OUTPUT_DIR": self.folder, "RUN_ID": f"run{next(self.numbers)}"}
        return SETTINGS | self.corpus.settings | own | changes

    def run_of(self, settings: dict) -> Path:
        return self.folder / settings["RUN_ID"]

    def keep(self, moment: str) -> None:
        """Copy the run's folder as it is at a moment; half of what is being written is there."""
        if moment in self.killed:
            return
        copy = self.killed[moment] = self.folder / moment
        shutil.copytree(self.whole, copy)
        if moment.endswith("written"):
            (part,) = copy.glob("*.part")
            os.truncate(part, part.stat().st_size // 2)

    def after_kill(self, moment: str) -> dict:
        """Return the settings of a run that was killed at a moment."""
        settings = self.settings()
        shutil.copytree(self.killed[moment], self.run_of(settings))
        return settings

    def ends_whole(self, settings: dict) -> str:
        """Continue a run, see that it ends as if nothing had been, and return its log."""
        run_well(settings)
        folder = self.run_of(settings)
        assert (folder / ARTIFACT).read_bytes() == (self.whole / ARTIFACT).read_bytes()
        ours, theirs = results_of(folder), results_of(self.whole)
        for key in ("steps", "val_loss", "val_bpb", "bytes_model", "candidate"):
            assert ours[key] == theirs[key], key
        assert not list(folder.glob("*.part"))
        return log_of(folder)


def call_at_moments(patch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """Save at steps 5 and 9; call `act` around what replaces a file, and where stages begin."""
    write_file, fsync, replace = train_gpt.write_file, os.fsync, Path.replace
    plan_step = train_gpt.Trainer.plan_step
    counts: collections.Counter = collections.Counter()
    file = "none"

    def counted_write(path: Path, *given: object) -> None:
        nonlocal file
        counts[path.name] += 1
        file = f"{path.name} {counts[path.name]}"
        write_file(path, *given)

    def fsync_later(number: int) -> None:
        act(f"{file}: written")
        fsync(number)

    def replace_and_act(path: Path, target: Path) -> None:
        replace(path, target)
        act(f"{file}: {'replaced' if path.suffix == '.part' else 'kept'}")

    def plan_saves(trainer: train_gpt.Trainer) -> train_gpt.StepPlan:
        return plan_step(trainer)._replace(save=trainer.step in (5, 9))

    def act_before(function: Callable) -> Callable:
        def acted(*given: object) -> object:
            act(function.__name__)
            return function(*given)

        return acted

    patch.setattr(train_gpt, "write_file", counted_write)
    patch.setattr(os, "fsync", fsync_later)
    patch.setattr(Path, "replace", replace_and_act)
    patch.setattr(train_gpt.Trainer, "plan_step", plan_saves)
    for owner, name in ((train_gpt, "preflight"), (train_gpt.Trainer, "rank_candidates")):
        patch.setattr(owner, name, act_before(getattr(owner, name)))


@pytest.fixture(scope="module")
def site(corpus, tmp_path_factory):
    return Site(tmp_path_factory.mktemp("faults"), corpus)


# ---- Kills and full disks ------------------------------------------------------------------------

# Moment of the kill -> the step after which training continues; None: from the start, or not at
# all since it had ended. Checkpoint 3 ends the training, 4 holds the candidates, too.
MOMENTS = {
    "preflight": None,
    "checkpoint.pt 2: written": 5,
    "checkpoint.pt 2: kept": 5,
    "checkpoint.pt 2: replaced": 9,
    "rank_candidates": 12,
    "checkpoint.pt 4: kept": 12,
    "results.json 1: written": None,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_been(site, moment):
    log = site.ends_whole(site.after_kill(moment))
    found = [int(step) for step in re.findall(r"^continued after step (\d+)", log, re.M)]
    assert found == [step for step in [MOMENTS[moment]] if step]


@pytest.mark.parametrize("moment", ["checkpoint.pt 2: written", f"{ARTIFACT} 1: written"])
def test_a_full_disk_costs_no_checkpoint(site, moment):
    def fill(now: str) -> None:
        if now == moment:
            raise OSError(errno.ENOSPC, "No space left on device")

    settings = site.settings()
    with pytest.MonkeyPatch.context() as patch:
        call_at_moments(patch, fill)
        message = refusal(settings)
    assert "Errno 28" in message and "check that file and its disk" in message
    assert not list(site.run_of(settings).glob("*.part"))
    site.ends_whole(settings)


def test_too_little_memory_has_a_remedy(site, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(train_gpt, "preflight", fail)
    message = refusal(site.settings())
    assert "lower MICRO_BATCH_TOKENS" in message and "The same RUN_ID continues" in message


# ---- Processes -----------------------------------------------------------------------------------


def start_and_wait(site: Site, settings: dict, launcher: tuple = ()) -> subprocess.Popen:
    """Start a process with slow steps, and wait until its second step and a checkpoint."""
    process = start(settings, launcher, script=site.driver)
    folder, end = site.run_of(settings), time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end:
        if (folder / "checkpoint.pt").exists() and "\nstep:2/" in log_of(folder):
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


def test_a_signal_in_training_saves_and_leaves(site):
    settings = site.settings(CHECKPOINT_SECONDS=0.01)
    process = start_and_wait(site, settings)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.returncode == 1
    stopped = r"^error: stopped by a signal; .*checkpoint\.pt of step (\d+)"
    (step,) = re.findall(stopped, result.stderr, re.M)
    before, _, _ = log_of(site.run_of(settings)).partition("error: stopped")
    assert int(step) == len(re.findall(r"^step:\d+/12 train_loss", before, re.M))
    assert f"continued after step {step}\n" in site.ends_whole(settings)


def test_a_second_signal_leaves_at_once_as_does_one_before_training(monkeypatch):
    """But Ctrl-C may come twice, from the terminal and from torchrun, after ending `tee`."""

    def write(*_: object) -> None:
        raise BrokenPipeError

    codes, number = [], signal.SIGTERM
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(os, "write", write)
    stop = train_gpt.StopSignal()
    stop._handle(number, None)
    assert codes == [128 + number]
    stop.can_save, stop.requested_at = True, 0.0
    stop._handle(number, None)
    stop._handle(number, None)
    assert stop.requested and codes == [128 + number]
    stop.requested_at -= 1.1
    stop._handle(number, None)
    assert codes == [128 + number] * 2


def test_two_processes_of_one_run_do_not_meet(site):
    settings = site.after_kill("checkpoint.pt 2: replaced")
    with train_gpt.RunLog(rank=0) as log:
        log.open(site.run_of(settings))
        message = refusal(settings)
    assert "another process is using this run" in message and settings["RUN_ID"] in message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_others_or_is_started_again(site, rank):
    """Rank 0, and the run is continued; rank 1 under torchrun's --max-restarts."""
    settings = site.settings(CHECKPOINT_SECONDS=0.01)
    process = start_and_wait(site, settings, TWO_PROCESSES + (("--max-restarts=1",) * rank))
    folder = site.run_of(settings)
    os.kill(int(Path(f"{folder}.{rank}").read_text()), signal.SIGKILL)
    result = finish(process)
    assert 'train_gpt.py", line' not in result.stderr, "the launcher alone has a traceback"
    assert (result.returncode == 0) == (rank == 1), result.stderr
    if rank == 0:
        assert re.search(r"^error: .* another process died, or hung", result.stderr, re.M)
        run_well(settings)
    assert "continued after step" in log_of(folder)
    ours, theirs = results_of(folder), results_of(site.whole)
    assert ours["val_bpb"] == pytest.approx(theirs["val_bpb"], rel=0.05)  # dropout differs


def test_not_a_number_is_found_and_the_last_checkpoint_exports(site, monkeypatch):
    settings = site.settings(WARMUP_STEPS=0)
    name = "blocks.1.attention.q.lora.A"
    accumulate, passes = train_gpt.accumulate_gradients, itertools.count(1)

    def poisoned(forward: torch.nn.Module, *given: object) -> torch.Tensor:
        loss = accumulate(forward, *given)
        if next(passes) == 11:
            dict(forward.named_parameters())[name].grad.view(-1)[-1] = math.nan
        return loss

    with monkeypatch.context() as patch:
        call_at_moments(patch, lambda moment: None)
        patch.setattr(train_gpt, "accumulate_gradients", poisoned)
        message = refusal(settings)
    assert f"step 11: {name} not finite" in message
    assert "checkpoint.pt of step 9" in message
    checkpoint = site.run_of(settings) / "checkpoint.pt"
    exported = site.settings(EXPORT_ONLY=1, CHECKPOINT_PATH=checkpoint, WARMUP_STEPS=0)
    run_well(exported)
    assert results_of(site.run_of(exported))["steps"] == 9


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"DATA_PATH": "gone"}, "DATA_PATH=gone"),
        ({"TOKENIZER_PATH": "/"}, "directory"),
        ({"OUTPUT_DIR": __file__}, __file__),
        ({"DISTILL_FROM": "gone", "SELF_DISTILL": 0}, "DISTILL_FROM=gone"),
        ({"EVAL_ONLY": 1, "MODEL_PATH": "gone"}, "MODEL_PATH=gone"),
        ({"EXPORT_ONLY": 1, "CHECKPOINT_PATH": "gone"}, "gone"),
    ],
)
def test_a_missing_file_is_named(site, changes, named):
    message = refusal(site.settings(**changes))
    assert named in message and message.count("\n") == 1


# ---- Artifacts -----------------------------------------------------------------------------------


@pytest.fixture
def one_gibibyte_more():
    """Let this process have so much more memory than it has: no file may fill it."""
    statm = Path("/proc/self/statm")  # of Linux
    own = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, own[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, own)


@functools.cache
def bomb() -> bytes:
    """Return a few bytes that brotli unpacks to 1.5 GiB of zeros."""
    compressor, block = brotli.Compressor(quality=5, lgwin=24), bytes(2**24)
    parts = [compressor.process(block) for _ in range(96)]
    return b"".join([*parts, compressor.finish()])


def with_model(container: Container, **changes: object) -> bytes:
    return container.blob(model=container.header["model"] | changes)


def with_table(container: Container, shape: list, kind: str, data: bytes) -> bytes:
    return container.blob(blocks={kind: [data]}, tensors=[["x", shape, [kind]]])


def bomb_in_block(container: Container) -> bytes:
    """Replace the first group by its first block, and one that unpacks to gigabytes."""
    name, blocks = next(iter(container.blocks.items()))
    return container.blob(blocks=container.blocks | {name: [blocks[0], bomb()]})


NOT_FINITE = brotli.compress(np.array([1, np.nan], "<f2").tobytes())
# Name -> artifact that somebody made on purpose, with a right checksum, of a sound one's parts.
FORGED: dict[str, Callable[[Container], bytes]] = {
    "another version": lambda c: sealed(c.blob()[:8] + b"\xff" + c.blob()[9:-32]),
    "a bomb for a header": lambda c: c.blob(text=bomb()),
    "a bomb for a block": bomb_in_block,
    "1 KB that asks for 100 GB": lambda c: with_table(c, [160_000] * 2, "x codes", b"\x06"),
    "an hour of trellis codes": lambda c: c.blob(
        blocks={"x trellis codes": [b"\x06"], "x exponents": [b"\x06"]},
        tensors=[["x", [0, 2**25], ["x trellis codes", "x exponents"]]],
    ),
    "a product over 64 bits": lambda c: with_table(c, [2**25] * 9, "x codes", b"\x06"),
    "not finite": lambda c: with_table(c, [2], "x float16", NOT_FINITE),
    "a block of negative size": lambda c: c.blob(groups=[["x", [-5, 5]]]),
    "4 MiB of brackets": lambda c: c.blob(text=brotli.compress(b"[" * (2**22 - 10), quality=5)),
    "no JSON": lambda c: c.blob(text=brotli.compress(b"\xff\xfe\x00")),
    "too few tensors": lambda c: c.blob(tensors=c.header["tensors"][1:]),
    "another map's fingerprint": lambda c: c.blob(fingerprint="0" * 64),
    "a setting that is not the model's": lambda c: with_model(c, output_dir="/tmp/elsewhere"),
    "wide": lambda c: with_model(c, model_dim=16_384, num_heads=256, num_kv_heads=256),
    "deep": lambda c: with_model(c, num_layers=256, ve_layers="0-255", ensemble=16),
    "a selector of patience": lambda c: with_model(c, map_basis=",".join(["all@0-=uniform"] * 999)),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_artifact_is_refused(site, one_gibibyte_more, tmp_path, name):
    path = tmp_path / "forged.ptz"
    path.write_bytes(FORGED[name](Container((site.whole / ARTIFACT).read_bytes())))
    evaluation = {"EVAL_ONLY": 1, "MODEL_PATH": path, "DTYPE": "float32"}
    assert not re.search("allocate|MemoryError", refusal(site.corpus.settings | evaluation))


# ---- Checkpoints ---------------------------------------------------------------------------------


class Executes(NamedTuple):
    """Unpickling it would make a folder."""

    folder: Path

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def with_bomb(data: bytes) -> bytes:
    """Return a checkpoint whose first values unpack to 256 MiB, checksums right."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, bytes(2**28) if name.endswith("/data/0") else source.read(name))
    return target.getvalue()


def saved_by_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# Name -> file, of a whole checkpoint and of what executes code when it is unpickled.
HOSTILE: dict[str, Callable[[bytes, object], bytes]] = {
    "code in the old format": lambda _, code: pickle.dumps(code),
    "code in torch's format": lambda _, code: saved_by_torch({"weights": code}),
    "a zip bomb": lambda whole, _: with_bomb(whole),
    "another program's": lambda *_: saved_by_torch({"model": {}, "step": 3}),
    "cut": lambda whole, _: whole[: len(whole) // 2],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_never_executed(site, tmp_path, name):
    path, trap = tmp_path / "checkpoint.pt", tmp_path / "executed"
    whole = (site.whole / "checkpoint.pt").read_bytes()
    path.write_bytes(HOSTILE[name](whole, Executes(trap)))
    message = refusal(site.settings(EXPORT_ONLY=1, CHECKPOINT_PATH=path))
    assert str(path) in message
    assert not trap.exists()


def test_a_torn_checkpoint_gives_way_to_the_one_before(site):
    """Whatever byte has changed, what is read is one of the two; the next ones are good again."""
    settings = site.after_kill("checkpoint.pt 2: replaced")
    folder = site.run_of(settings)
    paths = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    known = {read.training["step"]: read for read in map(train_gpt.Checkpoint.read, paths)}
    whole, steps = paths[0].read_bytes(), []
    for place in random.Random(0).sample(range(len(whole)), 20):
        paths[0].write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = train_gpt.Checkpoint.read_newest(folder)
        steps.append(found.training["step"])
        expected = known[steps[-1]].weights
        assert all(torch.equal(found.weights[key], expected[key]) for key in expected), place
    assert set(steps) <= {5, 9} and steps.count(5) > 10
    paths[0].write_bytes(whole[:-1000])
    log = site.ends_whole(settings)
    assert f"warning: the checkpoint {paths[0]} cannot be used" in log
    assert "continued after step 5\n" in log
    assert (folder / "checkpoint.damaged.pt").read_bytes() == whole[:-1000]
    assert all(map(train_gpt.Checkpoint.read, paths))
