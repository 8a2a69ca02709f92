"""The training loop in this process: time limit, phases, dropout, checkpoints, choice, export.

Time is made up, so that no test depends on how fast the machine is.
"""

from __future__ import annotations

import copy
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from helpers import Seconds, copied
from reference import same, tokens

# Every state that a checkpoint must hold: optimizers, averages, dropout, a teacher, phases.
EVERYTHING = {
    "num_layers": 2,
    "iterations": 8,
    "warmdown_iters": 8,
    "swa_interval": 1,
    "swa_threshold": 1.0,
    "late_qat_threshold": 0.7,
    "map_basis": "orthogonal,mlp.fc=learned",
    "map_freeze": "mlp.fc=0.5",
    "dropout": 0.1,
    "self_distill": 1,
    "distill_start_frac": 0.3,
    "recur_layers": "1",
    "recur_frac": 0.2,
}


@pytest.fixture
def seconds(monkeypatch):
    """The time of the process; each training step takes one second of it."""
    clock, train_step = Seconds(), train_gpt.Trainer.train_step

    def one_second(self, plan):
        loss = train_step(self, plan)
        clock.now += 1.0
        return loss

    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(train_gpt.Trainer, "train_step", one_second)
    return clock


def took(clock: Seconds, seconds: float) -> None:
    clock.now += seconds


# ---- The time limit ------------------------------------------------------------------------------


def test_phases_begin_by_the_clock_where_time_ends_the_run(data_settings, trainer_of, seconds):
    """20 s of training in steps of 1 s, far from the end of ITERATIONS."""
    phases = {"map_freeze": "mlp.fc=0.5", "recur_layers": "1", "recur_frac": 0.25, "num_layers": 2}
    limit = {"max_wallclock_seconds": 25, "gptq_reserve_seconds": 5}
    trainer = trainer_of(data_settings(iterations=1000, **limit, **phases))
    trainer.train()
    assert trainer.step == 20
    recurs, freezes = [line for line in trainer.run.log.lines if line.startswith("phase ")]
    assert recurs.startswith("phase step:5 progress:0.2500 frozen_maps:0 recurrence:True")
    assert freezes.startswith("phase step:10 progress:0.5000 frozen_maps:2")
    assert trainer.lr_scale == pytest.approx(1 / 10), "the warm-down of 10 steps ends with the time"


@pytest.mark.parametrize("limit", [{"iterations": 6}, {"max_wallclock_seconds": 6.5}])
def test_a_phase_that_begins_at_the_end_is_entered_before_the_choice(
    data_settings, trainer_of, seconds, limit
):
    """No step is left for it, or no time: the export has its recurrence all the same."""
    usual = {"iterations": 1000, "gptq_reserve_seconds": 0, "num_layers": 2}
    trainer = trainer_of(data_settings(**usual | limit, recur_layers="1", recur_frac=0.95))
    trainer.phases.enter(0.0)
    trainer.train()
    assert trainer.step == 6
    assert trainer.model.recurs


def test_a_continued_run_has_what_is_left_of_the_time(data_settings, trainer_of, seconds):
    """Stopped after 8 of 20 s, and continued an hour later."""
    limit = {"max_wallclock_seconds": 25, "gptq_reserve_seconds": 5}
    h = data_settings(iterations=1000, num_layers=1, **limit)
    first = trainer_of(h)
    train_until(first, 8)
    seconds.now += 3600
    second = continued(first, trainer_of(h))
    second.train()
    assert (first.step, second.step) == (8, 20)
    assert second.clock.elapsed == 20.0


def test_validation_and_nothing_else_stops_the_clock(data_settings, trainer_of, seconds):
    trainer = trainer_of(data_settings(iterations=4, val_loss_every=1, num_layers=1))
    trainer.validate = lambda: took(seconds, 100)
    trainer.save = lambda: took(seconds, 10)
    trainer.train()
    assert trainer.clock.elapsed == 4 + 10


def test_the_time_of_the_export_is_kept_back(data_settings, run_of, monkeypatch):
    """Training ends that much earlier, as the preflight measured it."""
    h = data_settings(iterations=2, max_wallclock_seconds=100, gptq_reserve_seconds=5)
    limits = []

    def stop(self):
        limits.append(self.clock.seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "preflight", lambda *_: 20.0)
    monkeypatch.setattr(train_gpt.Trainer, "train", stop)
    model = train_gpt.make_model(h)
    with pytest.raises(KeyboardInterrupt):
        train_gpt.train_model(run_of(h), model, train_gpt.TrainingData(h), None)
    assert limits == [100 - 1.25 * 20]


def test_a_run_over_its_time_says_so(data_settings, run_of):
    """Training and export together."""
    for limit, trained, is_over in ((10, 6.9, False), (10, 7.1, True), (0, 7.1, False)):
        run = run_of(data_settings(max_wallclock_seconds=limit, gptq_reserve_seconds=1))
        metrics = {"train_seconds": trained, "export_seconds": 3.0}
        assert train_gpt.time_limit_exceeded(run, metrics) is is_over
        assert any("over MAX_WALLCLOCK_SECONDS=10" in line for line in run.log.lines) is is_over


@pytest.fixture
def ended_with(data_settings, run_of, monkeypatch, seconds):
    """ended_with(**settings): metrics, steps that exports were told, and the run.

    Training takes 9 steps and 50 seconds, ranking the candidates 2, each export 5. `losses` are
    those of the artifacts, `before` those before quantization.
    """

    def end(losses=(2.0, 1.0, 1.5), sizes=(3, 2, 1), before=(0.8, 0.8, 0.9), **settings):
        run, steps, left = run_of(data_settings(**settings)), [], [*losses]
        lengths = [*sizes]

        def export(run, model, data, step, start):
            steps.append(step)  # calibration reads the text that comes after theirs
            seconds.now += 5
            return train_gpt.Artifact(bytes(lengths.pop(0)), {}, {}, math.nan)

        def trained(run, model, data, saved):
            figures = {"steps": 9, "choice_seconds": 2.0, "train_seconds": 50.0}
            names = ("last", "ema", "swa")
            held_out = zip(names, before, strict=True)
            figures |= {f"holdout_loss_{name}": loss for name, loss in held_out}
            return figures, dict.fromkeys(names, model.state_dict())

        weights = train_gpt.make_model(run.h).state_dict()
        monkeypatch.setattr(train_gpt, "export", export)
        monkeypatch.setattr(train_gpt, "read_artifact", lambda _: ({}, weights))
        monkeypatch.setattr(train_gpt, "evaluate", lambda *_: left.pop(0))
        monkeypatch.setattr(train_gpt, "train_model", trained)
        monkeypatch.setattr(train_gpt, "log_start", lambda *_: {})
        _, metrics = train_gpt.train_and_export(run, None)
        return metrics, steps, run

    return end


def test_the_export_counts_from_the_end_of_training(ended_with):
    """The ranking of candidates, which is neither training nor export, and the artifacts.

    The finished checkpoint holds the candidates, for an export after a fault.
    """
    metrics, steps, run = ended_with()
    assert metrics["export_seconds"] == 2 + 3 * 5
    assert steps == [9, 9, 9]
    assert (metrics["candidate"], (run.folder / "model.int6.ptz").read_bytes()) == ("ema", bytes(2))
    saved = train_gpt.Checkpoint.read_newest(run.folder)
    assert saved.finished
    assert list(saved.training["candidates"]) == ["last", "ema", "swa"]


@pytest.mark.parametrize(
    ("given", "exports", "best"),
    [
        # One that is behind an artifact already is left out, but not if that is too large.
        ({"losses": (2.0, 1.7, 1.0), "before": (1.6, 1.65, 1.75)}, 2, "ema"),
        (
            {"losses": (2.0, 1.7, 1.8), "before": (1.6, 1.65, 1.75), "sizes": (1, 10_001, 1)},
            3,
            "swa",
        ),
        # Losses of other windows are not known.
        ({"before": (math.nan, math.nan, math.nan)}, 3, "ema"),
        # After 52 seconds: 5 for each, and the next one may take a quarter longer.
        ({"max_wallclock_seconds": 68.5}, 3, "ema"),
        ({"max_wallclock_seconds": 68}, 2, "ema"),
        ({"max_wallclock_seconds": 63.5}, 2, "ema"),
        ({"max_wallclock_seconds": 63}, 1, "last"),
        # One that is not finite or too large is the last choice.
        ({"losses": (math.nan, 2.0, 3.0)}, 3, "ema"),
        ({"sizes": (1, 10_001, 1)}, 3, "swa"),
        ({"losses": (math.nan, 1.0, 2.0), "sizes": (1, 10_001, 10_001)}, 3, "last"),
    ],
)
def test_the_best_artifact_of_those_that_time_allows_is_the_choice(
    ended_with, given, exports, best
):
    limit = train_gpt.code_bytes() + 10_000
    metrics, steps, run = ended_with(**given, gptq_reserve_seconds=1, artifact_limit_bytes=limit)
    said = [line for line in run.log.lines if "no time" in line or "not exported" in line]
    assert len(said) == 3 - exports
    assert len(steps) == exports
    assert len([name for name in metrics if name.startswith("holdout_loss_quantized_")]) == exports
    assert metrics["candidate"] == best


# ---- Phases --------------------------------------------------------------------------------------


def test_frozen_maps_stand_still_and_what_their_optimizers_kept_is_freed(settings, processes):
    """Maps that are learned, and the adapters and scales of random ones."""
    h = settings(
        map_basis="learned,attention=uniform",
        map_adapter="attention=lora:2+sparse:0.2",
        map_scale="attention=row",
        map_freeze="mlp.in=0.5,attention@1=0.5",
    )
    torch.manual_seed(0)
    model = train_gpt.make_model(h)
    phases = train_gpt.Phases(h, model, None, compiled=False)
    optimizers = train_gpt.Optimizers(train_gpt.tensors_by_role(model), h, processes)
    for step in range(4):
        phases.enter(step / 4)
        model(tokens(4, 16, seed=step), tokens(4, 16, seed=step + 100)).backward()
        optimizers.step(step, 1.0)
        if step == 1:
            before = copied(model)
    freezes, learned = r"blocks\.(\d\.mlp\.fc|1\.attention\.(q|k|v|proj)\.)", set()
    for name, p in model.named_parameters():
        is_frozen = re.match(freezes, name) is not None
        assert torch.equal(p, before[name]) == is_frozen, name
        learned |= set() if is_frozen else {p}
    assert optimizers.muon.state.keys() | optimizers.adam.state.keys() == learned


# ---- Warm-up and preflight -----------------------------------------------------------------------


def test_a_warm_up_leaves_no_trace(data_settings, trainer_of):
    """In weights, phases, and the state of the optimizers that then train."""
    trainer = trainer_of(data_settings(**EVERYTHING, warmup_steps=3))
    trainer.phases.enter(0.0)
    before = copy.deepcopy((trainer.model.state_dict(), without_times(trainer)))
    trained = [p.requires_grad for p in trainer.model.parameters()]
    trainer.warm_up()
    after = without_times(trainer)
    del before[1]["teacher"], after["teacher"]  # its weights are copied anew when it begins
    assert same((trainer.model.state_dict(), after), before)
    assert [p.requires_grad for p in trainer.model.parameters()] == trained
    assert trainer.model.recurs is False


@pytest.mark.parametrize(
    ("stage", "name", "value", "says"),
    [
        ("evaluation from the artifact", "evaluate", float("nan"), "loss is not finite"),
        ("disk", "disk_usage", SimpleNamespace(free=1000), "needs .* bytes free"),
    ],
)
def test_a_preflight_finds_what_would_fail_at_the_end(
    data_settings, run_of, monkeypatch, stage, name, value, says
):
    h = data_settings()
    model = train_gpt.make_model(h)
    owner = train_gpt.shutil if name == "disk_usage" else train_gpt
    monkeypatch.setattr(owner, name, lambda *_, **__: value)
    with pytest.raises(train_gpt.UserError, match=f"preflight, {stage}: .*{says}"):
        train_gpt.preflight(run_of(h), model, train_gpt.TrainingData(h))


def test_a_preflight_estimates_the_export_and_the_choice(
    data_settings, run_of, monkeypatch, seconds
):
    """Batches of 5 s, artifacts of 7 s, three candidates and an artifact at 2 s each.

    With the trellis of the export artifacts take twice as long; QUANTIZER=rms has none.
    """
    build_artifact, evaluate = train_gpt.build_artifact, train_gpt.evaluate
    calibrate = train_gpt.calibrate

    def slow_calibration(*args):
        seconds.now += 5
        return calibrate(*args)

    def slow_build(*args):
        seconds.now += 7
        return build_artifact(*args)

    def slow_evaluation(*args, trial=False):
        seconds.now += 100 if trial else 2
        return evaluate(*args, trial=trial)

    monkeypatch.setattr(train_gpt, "calibrate", slow_calibration)
    monkeypatch.setattr(train_gpt, "build_artifact", slow_build)
    monkeypatch.setattr(train_gpt, "evaluate", slow_evaluation)
    for changes, expected in (
        ({"gptq_calib_batches": 1}, 5 + 14 + 4 * 2),
        ({"gptq_calib_batches": 1, "target_bytes": 300_000}, 5 + 3 * 14 + 4 * 2),  # about three
        ({"gptq_calib_batches": 3, "quantizer": "rms"}, 3 * 5 + 7 + 4 * 2),
    ):
        h = data_settings(**changes)
        model, data = train_gpt.make_model(h), train_gpt.TrainingData(h)
        assert train_gpt.preflight(run_of(h), model, data) == expected


def test_a_preflight_leaves_the_training_as_it_was(data_settings, run_of):
    """Weights, what is trained of them, and the order of the data."""
    h = data_settings(map_freeze="mlp.fc=0.5", map_basis="orthogonal,mlp.fc=learned")
    model, data = train_gpt.make_model(h).train(), train_gpt.TrainingData(h)

    def state():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {
            "modes": [module.training for module in model.modules()],
            "places": [(p.requires_grad, p.grad, p.data_ptr()) for _, p in tensors],
            "data": data.sequences(0, len(data.positions)),
            "values": {name: value.detach().clone() for name, value in tensors},
        }

    before = state()
    train_gpt.preflight(run_of(h, model), model, data)
    assert same(state(), before)


# ---- Steps ---------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_batch(data_settings, random_model, processes):
    """Their size is a matter of memory alone; a teacher's logits come in the same parts.

    The sums of losses are float32, all else is float64.
    """
    teacher = random_model(data_settings(logit_softcap=20), torch.float64)
    losses, gradients = [], []
    for size in (256, 64):
        h = data_settings(micro_batch_tokens=size)
        model = random_model(h, torch.float64)
        batches = train_gpt.TrainingData(h).micro_batches(0, processes)
        assert len(batches) == 256 // size
        losses.append(train_gpt.accumulate_gradients(model, batches, teacher.predict))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*losses)
    assert (gradients[0] - gradients[1]).norm() < 64 * 2**-24 * gradients[0].norm()


def test_a_teacher_with_another_tokenizer_is_refused(data_settings, run_of, tmp_path):
    """Its logits would be about other pieces of text."""
    path = tmp_path / "teacher.ptz"
    run = run_of(data_settings(distill_from=str(path), num_layers=1))
    teacher = train_gpt.make_model(run.h)
    header = {
        "model": run.h.model_settings(),
        "fingerprint": teacher.fingerprint(),
        "tokenizer": run.tokenizer.sha256,
    }
    path.write_bytes(train_gpt.write_artifact(header, teacher.state_dict())[0])
    assert train_gpt.load_teacher(run).fingerprint() == teacher.fingerprint()
    run.tokenizer.sha256 = "1" * 64
    with pytest.raises(train_gpt.UserError, match="the teacher has another tokenizer"):
        train_gpt.load_teacher(run)


# ---- Dropout -------------------------------------------------------------------------------------


def test_each_step_of_each_process_drops_out_units_of_its_own(
    data_settings, trainer_of, monkeypatch
):
    """Also after a validation, and wherever a run was continued."""
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    h = data_settings(iterations=3, dropout=0.2, val_loss_every=2, seed=100)
    for rank in range(2):
        trainer = trainer_of(h)  # its initial values have another seed
        alone, trainer.dist = trainer.dist, copy.copy(trainer.dist)
        trainer.dist.rank, trainer.dist.world_size = rank, 2
        trainer.dist.all_reduce = alone.all_reduce
        trainer.dist.sync_from_rank0 = alone.sync_from_rank0
        trainer.dist.broadcast_object = alone.broadcast_object
        trainer.train()
    assert sorted(seed for seed in seeds if seed >= 100) == [100 + i for i in range(6)]


def test_steps_train_with_dropout_after_a_validation_too(data_settings, trainer_of):
    """A validation turns it off in the model; the next step must turn it on again."""
    results = []
    for changes in ({}, {"val_loss_every": 1}, {"dropout": 0.0}):
        trainer = trainer_of(data_settings(**{"iterations": 3, "dropout": 0.3} | changes))
        trainer.train()
        results.append(copied(trainer.model))
    assert same(results[0], results[1])
    assert not torch.equal(*(result["embedding.weight"] for result in results[1:]))


def test_the_temperature_of_masks_halves_in_training(data_settings, trainer_of):
    trainer = trainer_of(data_settings(iterations=4, map_adapter="mask"))
    found, temperature = [], trainer.model.blocks[0].mlp.fc.mask.temperature
    set_temperature = trainer.model.set_temperature

    def watched(value):
        set_temperature(value)
        found.append(temperature.item())

    trainer.model.set_temperature = watched
    trainer.train()
    assert found == [1.0, 0.875, 0.75, 0.625]


# ---- Checkpoints ---------------------------------------------------------------------------------


def train_until(trainer: train_gpt.Trainer, steps: int) -> None:
    """Train until a signal ends it after so many steps."""
    train_step, stop = trainer.train_step, trainer.run.stop

    def step(plan):
        loss = train_step(plan)
        stop.requested_at = float(trainer.step == steps)
        return loss

    trainer.train_step = step
    with pytest.raises(train_gpt.UserError, match="stopped by a signal"):
        trainer.train()


def continued(first: train_gpt.Trainer, second: train_gpt.Trainer) -> train_gpt.Trainer:
    """Return a new trainer with the state of the checkpoint that the first one wrote."""
    saved = train_gpt.Checkpoint.read_newest(first.run.folder)
    second.model.load_state_dict(saved.weights)
    second.load_state_dict(saved.training)
    return second


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_continued_run_is_the_one_that_was_not_stopped(data_settings, trainer_of, steps):
    """To the bit, and in all that is saved, wherever it was stopped."""
    h = data_settings(**EVERYTHING)
    whole, first = trainer_of(h), trainer_of(h)
    whole.warm_up()
    whole.train()
    first.warm_up()
    train_until(first, steps)
    first.run.stop.requested_at = 0.0
    again = trainer_of(h)
    again.warm_up()
    second = continued(first, again)
    assert (second.step, second.late_qat) == (steps, first.late_qat)
    assert same(without_times(second), without_times(first))
    second.train()
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert same(without_times(second), without_times(whole))
    assert same(second.averages.candidates(), whole.averages.candidates())
    assert second.lr_scale == whole.lr_scale


def without_times(trainer: train_gpt.Trainer) -> dict:
    """Return the state of a trainer but for what its clock measured."""
    return {name: value for name, value in trainer.state_dict().items() if name != "clock"}


@pytest.mark.parametrize(("asked", "save_seconds", "every"), [(5, 0.0, 5), (5, 0.08, 8), (0, 0, 0)])
def test_checkpoints_come_as_often_as_asked_and_take_a_hundredth_at_most(
    data_settings, trainer_of, seconds, asked, save_seconds, every
):
    trainer = trainer_of(data_settings(iterations=17, checkpoint_seconds=asked, num_layers=1))
    trainer.save_seconds, saved = save_seconds, []

    def save():
        saved.append(trainer.step)
        trainer.saved_at = trainer.clock.elapsed

    trainer.save = save
    trainer.train()
    assert saved == [*range(every or 17, 17, every or 17), 17]


# ---- Averages ------------------------------------------------------------------------------------


def test_averages_are_of_the_weights_after_each_step(data_settings, trainer_of):
    h = data_settings(iterations=5, ema_decay=0.5, swa_interval=1, swa_threshold=1.0, num_layers=1)
    trainer = trainer_of(h)
    trainer.train()
    history = [snapshot["embedding.weight"] for snapshot in trainer.run.log.snapshots]
    assert len(history) == 5
    place = next(i for i, p in enumerate(trainer.optimizers.params) if p.shape == history[0].shape)
    found = {name: weights[place] for name, weights in trainer.averages.candidates().items()}
    torch.testing.assert_close(found["last"], history[-1])
    weights = [0.5**age for age in range(4, -1, -1)]
    ema = sum(w * value for w, value in zip(weights, history, strict=True)) / sum(weights)
    torch.testing.assert_close(found["ema"], ema)
    torch.testing.assert_close(found["swa"], sum(history[1:]) / 4, msg="from the second step on")


# ---- The choice ----------------------------------------------------------------------------------


def spoiled(weights: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Return weights that predict worse: noise is added."""
    generator = torch.Generator().manual_seed(seed)
    return [w + torch.randn(w.shape, generator=generator) for w in weights]


@pytest.mark.parametrize("best", ["last", "ema", "swa"])
def test_the_best_candidate_is_what_the_model_holds_after_the_choice(
    data_settings, trainer_of, monkeypatch, best
):
    """Best on held-out training text, by an evaluation of its own here."""
    trainer = trainer_of(data_settings(num_layers=1))
    params, names = trainer.optimizers.params, [*trainer.optimizers.names.values()]
    own = [p.detach().clone() for p in params]
    candidates = {"last": spoiled(own, 1), "ema": spoiled(own, 2), "swa": spoiled(own, 3)}
    candidates[best] = own
    held_out, losses = trainer.data.held_out_stream(), {}
    for name, weights in candidates.items():
        trainer.model.load_state_dict(dict(zip(names, weights, strict=True)))
        losses[name] = trainer.loss_on(held_out)
    monkeypatch.setattr(trainer.averages, "candidates", lambda: candidates)
    metrics, ranked = trainer.finish()
    assert {name: metrics[f"holdout_loss_{name}"] for name in losses} == losses
    assert same([p.detach() for p in params], own)
    assert list(ranked) == sorted(losses, key=losses.get)
    assert next(iter(ranked)) == best
    for name, weights in ranked.items():
        assert same(weights, dict(zip(names, candidates[name], strict=True)))
    assert metrics["val_loss_before"] == trainer.loss_on(trainer.run.val.tokens)


def test_a_candidate_that_is_not_finite_is_not_chosen(data_settings, trainer_of, monkeypatch):
    trainer = trainer_of(data_settings(num_layers=1))
    own = [p.detach().clone() for p in trainer.optimizers.params]
    broken = [torch.full_like(w, torch.nan) for w in own]
    candidates = {"last": broken, "ema": own, "swa": broken}
    monkeypatch.setattr(trainer.averages, "candidates", lambda: candidates)
    assert list(trainer.rank_candidates()[0]) == ["ema"]
    candidates["ema"] = broken
    with pytest.raises(train_gpt.UserError, match="not finite"):
        trainer.rank_candidates()


def test_the_best_artifact_is_exported_whatever_came_first(data_settings, run_of, processes):
    """By the loss on held-out text of what its bytes give back."""
    h = data_settings(num_layers=1)
    torch.manual_seed(0)
    model, data = train_gpt.make_model(h), train_gpt.TrainingData(h)
    own = copied(model)
    worse = [spoiled([*own.values()], seed) for seed in (1, 2)]
    last, swa = (dict(zip(own, weights, strict=True)) for weights in worse)
    candidates = {"last": last, "ema": own, "swa": swa}
    run = run_of(h, model)
    unknown = dict.fromkeys(candidates, math.nan)
    blob, metrics = train_gpt.export_best(run, model, data, candidates, unknown, 3, math.inf)
    rebuilt = train_gpt.model_from_artifact(h, blob, processes)
    loss = train_gpt.evaluate(rebuilt, data.held_out_stream(), h, processes, h.eval_seq_len)
    losses = {name: metrics[f"holdout_loss_quantized_{name}"] for name in candidates}
    assert min(losses, key=losses.get) == metrics["candidate"] == "ema"
    assert losses["ema"] == loss
    assert len(set(losses.values())) == 3
    assert any(line.startswith("exported:ema\n") for line in run.log.lines)
