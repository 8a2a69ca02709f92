"""What the processes of a run share, with threads in their place: sums, decisions, first weights.

Real processes train and evaluate together in test_run.py, and die in test_faults.py.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_gpt
from helpers import KeptLog, tiny_settings
from reference import tokens

Role = train_gpt.Role


@pytest.fixture
def on_ranks(monkeypatch):
    """on_ranks(n, function): what function(dist) gives on each of n ranks, which are threads."""

    def run(world_size: int, function: Callable[[train_gpt.Distributed], Any]) -> list[Any]:
        barrier = threading.Barrier(world_size, timeout=30)  # broken where a rank stays away
        local, given = threading.local(), [None] * world_size

        def exchange(value: Any) -> list[Any]:
            """Return what every rank gave."""
            given[local.rank] = value
            barrier.wait()
            received = list(given)
            barrier.wait()
            return received

        def all_reduce(tensor: torch.Tensor, async_op: bool = False) -> SimpleNamespace:
            tensor.copy_(torch.stack(exchange(tensor.clone())).sum(0))
            return SimpleNamespace(wait=lambda: None)

        def broadcast_object_list(box: list, source: int) -> None:
            box[:] = exchange(copy.deepcopy(box))[source]

        def on_rank(rank: int) -> Any:
            local.rank = rank
            dist = train_gpt.Distributed(tiny_settings())
            dist.rank, dist.world_size = rank, world_size
            return function(dist)

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast_object_list)
        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(on_rank, range(world_size)))

    return run


def test_all_processes_take_rank_0s_numbers_and_objects_and_any_ones_flag(on_ranks):
    for who in (None, 0, 2):
        found = on_ranks(
            3, lambda dist, who=who: dist.sync_from_rank0(dist.rank + 5, 0.1, flag=dist.rank == who)
        )
        assert found == [([5.0, 0.1], who is not None)] * 3
    assert on_ranks(2, lambda dist: dist.broadcast_object(dist.rank)) == [0, 0]


def test_all_processes_plan_a_step_by_rank_0s_clock(on_ranks, settings):
    """The clock of each rank is an hour ahead of the one before."""

    def plan_on(dist):
        clock = train_gpt.Clock(100, 50.0)
        clock.elapsed, clock.recent = 10.0 + 3600 * dist.rank, [2.0] * 5
        trainer = SimpleNamespace(dist=dist, clock=clock, step=7, saved_at=0.0, save_seconds=0.0)
        trainer.h = settings(checkpoint_seconds=20)
        trainer.run = SimpleNamespace(stop=SimpleNamespace(requested=dist.rank == 1))
        return train_gpt.Trainer.plan_step(trainer)

    plan = train_gpt.StepPlan(20, 0.2, save=False, stop=True, validate=False)
    assert on_ranks(2, plan_on) == [plan] * 2


def test_processes_start_from_rank_0s_weights_and_must_agree_on_the_maps(
    on_ranks, data_settings, monkeypatch
):
    h = data_settings(num_layers=1)
    initial_weight = train_gpt.initial_weight

    def on_another_machine(spec):  # other last bits
        return initial_weight(spec) + 1e-3 * threading.get_ident() % 1

    monkeypatch.setattr(train_gpt, "initial_weight", on_another_machine)

    def start(dist, seed_of_map=0):
        own = train_gpt.load_settings({}, **h.as_dict() | {"map_seed": 7 + seed_of_map * dist.rank})
        run = train_gpt.Run(own, dist, KeptLog(), train_gpt.StopSignal(), None, None)
        return train_gpt.prepare_model(run, None)

    ours, theirs = on_ranks(2, start)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    with pytest.raises(train_gpt.UserError, match="generate different random maps"):
        on_ranks(2, lambda dist: start(dist, seed_of_map=1))


def test_a_restart_meets_no_keys_of_the_dead_run_and_waits_no_longer_than_asked(monkeypatch):
    """Whether torchrun gives the processes of a restart a new store, or the old one."""
    shared, groups = torch.distributed.HashStore(), []

    def begin(*_, **given):
        groups.append(given)

    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(shared, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        train_gpt.Distributed(tiny_settings(timeout_seconds=7)).__enter__()
        assert groups[-1]["timeout"].total_seconds() == 7
    groups[0]["store"].set("key", "of the dead run")
    assert not groups[1]["store"].check(["key"])


NAMES = {role: [f"{role.value}{i}" for i in range(3)] for role in Role}


def stepped(dist: train_gpt.Distributed, gradients: list[dict]) -> dict[str, torch.Tensor]:
    """Return three parameters of each role, and all norms, after a step on a rank."""
    parameters = {
        role: {name: torch.nn.Parameter(torch.ones(4, 6)) for name in names}
        for role, names in NAMES.items()
    }
    optimizers = train_gpt.Optimizers(parameters, tiny_settings(), dist)
    values = {name: p for group in parameters.values() for name, p in group.items()}
    for name, p in values.items():
        p.grad = gradients[dist.rank][name].clone()
    norms = optimizers.step(1, 1.0)
    return values | {f"norm of {name}": norm for name, norm in norms.items()}


def test_a_step_of_several_processes_is_one_on_their_mean_gradients(on_ranks, processes):
    names = [name for group in NAMES.values() for name in group]
    generator = torch.Generator().manual_seed(0)
    gradients = [{n: torch.randn(4, 6, generator=generator) for n in names} for _ in range(2)]
    mean = {name: (gradients[0][name] + gradients[1][name]) / 2 for name in names}
    expected = stepped(processes, [mean])
    for found in on_ranks(2, lambda dist: stepped(dist, gradients)):
        torch.testing.assert_close(found, expected)


def test_processes_calibrate_on_the_batches_of_one(on_ranks, data_settings, processes):
    """Each on its own share; where they do not divide evenly, on a few more."""
    h = data_settings(gptq_calib_batches=3)
    data = train_gpt.TrainingData(h)
    alone = list(train_gpt.calibration_batches(h, processes, data, 2))
    parts = on_ranks(2, lambda dist: list(train_gpt.calibration_batches(h, dist, data, 2)))
    assert [len(part) for part in parts] == [2, 2]
    interleaved = [parts[0][0], parts[1][0], parts[0][1]]
    assert len(alone) == 3
    assert all(torch.equal(*pair) for pair in zip(alone, interleaved, strict=True))


def test_hessians_are_summed_over_the_processes(on_ranks, settings, random_model, processes):
    model = random_model(settings(num_layers=1))
    batches = [tokens(2, 16, seed=rank) for rank in range(2)]

    def collect(dist, texts):
        own = copy.deepcopy(model)
        found = train_gpt.collect_hessians(own, texts, dist)
        return {name: found[module] for name, module in own.named_modules() if module in found}

    expected = collect(processes, batches)
    for found in on_ranks(2, lambda dist: collect(dist, [batches[dist.rank]])):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_sensitivities_are_of_the_text_of_all(on_ranks, settings, random_model, processes):
    """The mean of what each finds alone; each draws its own labels."""
    model = random_model(settings(num_layers=1))

    def collect(dist):
        own = copy.deepcopy(model)
        ids = tokens(2, 16, seed=dist.rank)
        rows, tables = train_gpt.collect_sensitivities(own, [ids], tokens(8, 16), dist)
        by_name = {name: rows[p] for name, p in own.named_parameters() if p in rows}
        return by_name | {name: tables[m] for name, m in own.named_modules() if m in tables}

    second_alone = copy.copy(processes)
    second_alone.rank = 1
    first, second = collect(processes), collect(second_alone)
    expected = {name: (value + second[name]) / 2 for name, value in first.items()}
    for found in on_ranks(2, collect):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_an_evaluation_is_shared_whatever_the_number_of_processes(
    on_ranks, settings, random_model, processes, mode
):
    h = settings(num_layers=1, eval_batch_tokens=64, eval_mode=mode)
    model, stream = random_model(h), tokens(500)

    def evaluated(dist):
        return train_gpt.evaluate(copy.deepcopy(model), stream, h, dist, 8)

    for count in (2, 3):
        # A mean over 500 tokens, in other batches: float32 sums of 64 terms of about 4.
        expected = [evaluated(processes)] * count
        assert on_ranks(count, evaluated) == pytest.approx(expected, abs=1e-4)
