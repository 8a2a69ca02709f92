"""Every setting acts: a change of it changes the part of the script that it names.

OBSERVED has a line for a setting: what is looked at, and what of it must change. A new setting
needs a line, or a test of its own and a place in ELSEWHERE.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import train_gpt
from helpers import KeptLog, tiny_settings
from reference import same, tokens

Role = train_gpt.Role
Parts = dict[str, Any]  # what an observer saw, by name


class Seen(NamedTuple):
    """How a setting shows."""

    by: Callable[..., Parts]  # observer(settings) -> parts
    parts: str  # that change, with spaces between; "only" first: and no others do
    value: Any  # instead of the default, or of `beside`
    beside: dict[str, Any]  # other settings, with and without the change


# ---- Observers -----------------------------------------------------------------------------------


def observe_steps(h: train_gpt.Hyperparameters) -> Parts:
    """Take two steps with one parameter of each role; return their weights by role."""
    torch.manual_seed(0)
    groups = {role: {role.value: torch.nn.Parameter(torch.randn(6, 4))} for role in Role}
    optimizers = train_gpt.Optimizers(groups, h, train_gpt.Distributed(h))
    for step, size in enumerate((1.0, 1e-2)):
        for p in optimizers.params:
            p.grad = size * torch.randn(6, 4)
        optimizers.step(step, 1.0)
    return {role.value: groups[role][role.value].detach() for role in Role}


@functools.cache
def filled_model(h: train_gpt.Hyperparameters) -> train_gpt.LanguageModel:
    """Return a model none of whose learned values is at its initial value."""
    model = train_gpt.make_model(h).eval()
    with torch.no_grad():
        for p in model.parameters():
            generator = torch.Generator().manual_seed(p.numel())
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + 0.5 * (p.ndim == 1))
    return model


def observe_model(h: train_gpt.Hyperparameters) -> Parts:
    """Return a model's maps, initial values, parameters and predictions."""
    try:
        torch.manual_seed(0)
        model = train_gpt.make_model(h)
    except train_gpt.UserError as error:
        return {"refused": str(error)}
    initial = {name: p.detach() for name, p in model.named_parameters()}
    phases = train_gpt.Phases(h, model, None, compiled=False)
    with torch.no_grad():
        logits = filled_model(h).predict(tokens(2, 40))
    return {
        "refused": "",
        "maps": model.fingerprint(),
        "initial": {name: p.double().norm().item() for name, p in initial.items()},
        "shapes": {name: tuple(p.shape) for name, p in initial.items()},
        "logits": logits,
        "phases": [phases.enter(progress / 10) for progress in range(10)],
    }


class Watched(train_gpt.Trainer):
    """A trainer that keeps what it did in each step."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        names = ("lr", "batches", "calls", "validations", "quantized")
        self.seen: dict[str, list] = {name: [] for name in names}
        forward, train_step = self.forward, self.train_step

        def watched_forward(ids, targets, teacher_logits):
            self.seen["calls"].append((self.step, tuple(ids.shape)))
            self.seen["batches"].append(ids.tolist())
            return forward(ids, targets, teacher_logits)

        def watched_step(plan):
            loss = train_step(plan)
            self.seen["lr"].append(self.lr_scale)
            self.seen["quantized"].append(self.late_qat)
            self.clock.elapsed += 1  # on a machine that takes a second
            return loss

        self.forward, self.train_step = watched_forward, watched_step

    def validate(self) -> dict[str, float]:
        self.seen["validations"].append(self.step)
        return {}

    def save(self) -> None:
        """Write nothing."""


def run_for(h: train_gpt.Hyperparameters) -> train_gpt.Run:
    tokenizer = types.SimpleNamespace(sha256="0" * 64)
    dist, stop = train_gpt.Distributed(h), train_gpt.StopSignal()
    return train_gpt.Run(h, dist, KeptLog(), stop, tokenizer, None)


def observe_training(h: train_gpt.Hyperparameters) -> Parts:
    """Train as a run does, but for the preflight; return what happened, and the last weights."""
    torch.manual_seed(0)
    model, data = train_gpt.make_model(h), train_gpt.TrainingData(h)
    run = run_for(h)
    trainer = Watched(run, model, data, None)
    trainer.clock.set_limit(h.max_wallclock_seconds - train_gpt.reserve_for_export(run, 0.0))
    trainer.warm_up()
    warm_up = len(trainer.seen["calls"])
    for kept in trainer.seen.values():
        kept.clear()
    trainer.train()
    logged = [line.split()[0] for line in run.log.lines if "train_loss" in line]
    return trainer.seen | {
        "warm-up": warm_up,
        "steps": trainer.step,
        "logged": logged,
        "held-out": data.held_out_stream(),
        "weights": {name: p.detach() for name, p in model.named_parameters()},
    }


def observe_export(h: train_gpt.Hyperparameters) -> Parts:
    """Return what an artifact gives back, by role, and whether one was made."""
    model = filled_model(h)
    try:
        blob = train_gpt.export(run_for(h), model, train_gpt.TrainingData(h), step=3).blob
        train_gpt.check_size(h, len(blob))
    except train_gpt.UserError as error:
        return {"refused": str(error)}
    values = train_gpt.read_artifact(blob)[1]
    groups = train_gpt.tensors_by_role(model)
    parts = {role.value: {name: values[name] for name in groups[role]} for role in Role}
    return {"refused": "", "size": len(blob)} | parts


def observe_evaluation(h: train_gpt.Hyperparameters) -> Parts:
    """Return the loss of a stream, and the shapes of the forward passes."""
    model, shapes = filled_model(tiny_settings(num_layers=1)), []
    predict = model.predict

    def watched(ids, *given):
        shapes.append(tuple(ids.shape))
        return predict(ids, *given)

    model.predict = watched
    loss = train_gpt.evaluate(model, tokens(400), h, train_gpt.Distributed(h), h.eval_stride)
    del model.predict
    return {"loss": loss, "largest": max(n for n, _ in shapes), "shapes": shapes}


# ---- What each setting changes -------------------------------------------------------------------

ONE_LAYER = {"num_layers": 1}
# Six steps of a second each, in which learning rates fall from the first on.
SHORT = {"num_layers": 2, "iterations": 6, "warmdown_iters": 3500, "late_qat_threshold": 0.0}
MIXED = {"map_basis": "orthogonal,mlp.fc=learned", "map_adapter": "lora:4+sparse:0.2"}
CODED = "matrix factor sparse"

steps = functools.partial(Seen, observe_steps, beside={})
model = functools.partial(Seen, observe_model, beside={})
training = functools.partial(Seen, observe_training, beside=SHORT)
exported = functools.partial(Seen, observe_export, beside=MIXED | ONE_LAYER)
by_rms = functools.partial(Seen, observe_export, beside=MIXED | ONE_LAYER | {"quantizer": "rms"})
evaluation = functools.partial(Seen, observe_evaluation, beside={})

OBSERVED = {
    # Run and data
    "seed": training("batches weights", 7, beside=SHORT | {"dropout": 0.1}),
    "model_limit_bytes": model("refused", 1000),
    "data_order": training("batches weights", "stream"),
    "holdout_tokens": training("held-out", 64, beside=SHORT | {"holdout_tokens": 96}),
    # Model
    "vocab_size": model("shapes", 70),
    "model_dim": model("maps shapes", 16),
    "num_heads": model("shapes logits", 2),
    "bigram_dim": model("shapes logits", 4),
    "ve_dim": model("shapes logits", 4),
    "ensemble": model("maps shapes", 2),
    "qk_gain_init": model("only initial", 2.0),
    "tied_embed_init_std": model("only initial", 0.1),
    # Map table
    "map_init": model("only initial", "zero", beside={"map_basis": "learned"}),
    "map_gain": model("maps logits", "0.5"),
    "map_adapter": model("shapes logits", "lora:3"),
    "map_freeze": model("only phases", "0.5"),
    # Training
    "iterations": training("steps lr", 5),
    "warmup_steps": training("only warm-up", 2),
    "dropout": training("only weights", 0.2),
    "train_batch_tokens": training("batches weights", 128),
    "train_seq_len": training("batches weights", 16),
    "micro_batch_tokens": training("calls batches", 64),
    "max_wallclock_seconds": training("steps", 4.0, beside=SHORT | {"gptq_reserve_seconds": 0.0}),
    "gptq_reserve_seconds": training(
        "steps", 2.0, beside=SHORT | {"max_wallclock_seconds": 5.0, "gptq_reserve_seconds": 1.0}
    ),
    "val_loss_every": training("only validations", 2),
    "train_log_every": training("only logged", 0),
    # Optimizers
    "matrix_lr": steps("only matrix", 0.011),
    "factor_lr": steps("only factor", 0.012),
    "tied_embed_lr": steps("only embedding", 0.013),
    "scalar_lr": steps("only scalar", 0.014),
    "sparse_lr": steps("only sparse", 0.015),
    "mask_lr": steps("only mask", 0.016),
    "mask_optimizer": steps("only mask", "muon"),
    "muon_momentum": steps("only matrix factor", 0.8, beside={"muon_momentum_warmup_steps": 1}),
    "muon_momentum_warmup_start": steps("only matrix factor", 0.8),
    "muon_momentum_warmup_steps": steps("only matrix factor", 3),
    "muon_backend_steps": steps("only matrix factor", 3),
    "muon_wd": steps("only matrix sparse", 0.017),
    "factor_wd": steps("only factor", 0.018),
    "adam_wd": steps("only scalar", 0.019),
    "embed_wd": steps("only embedding", 0.021),
    "beta1": steps("only embedding scalar sparse mask", 0.8),
    "beta2": steps("only embedding scalar sparse mask", 0.8),
    "adam_eps": steps("only embedding scalar sparse mask", 1e-2),
    "grad_clip_norm": steps("matrix factor embedding scalar sparse mask", 3.0),
    "late_qat_threshold": training("quantized weights", 0.6),
    # Quantization and artifact
    "quantizer": exported(f"{CODED} embedding", "rms"),
    "matrix_bits": by_rms(f"only {CODED} size", 3),
    "embed_bits": by_rms("only embedding size", 3),
    "matrix_clip_sigmas": by_rms(f"only {CODED} size", 2.0),
    "embed_clip_sigmas": by_rms("only embedding size", 2.0),
    "loss_per_value": exported(f"only {CODED} embedding size", 1e-4),
    "target_bytes": exported(f"{CODED} embedding size", train_gpt.code_bytes() + 5000),
    "gptq_calib_batches": exported("matrix factor", 1),
    "prune_pct": exported(f"only {CODED} size", 0.6),
    "artifact_limit_bytes": exported("refused", 1000),
    # Evaluation
    "eval_seq_len": evaluation("loss shapes", 24),
    "eval_stride": evaluation("loss shapes", 16),
    "eval_mode": evaluation("loss shapes", "streaming"),
    "eval_batch_tokens": evaluation("largest", 64),
}


# Each of these has a test of its own: files and folders in test_run.py, test_identity.py and
# test_faults.py, the model and its device in test_model.py, schedule and averages in
# test_optimizers.py, phases in test_variants.py, others in test_training.py, test_processes.py and
# test_settings.py.
ELSEWHERE = """
    run_id resume output_dir eval_only model_path export_only checkpoint_path data_path
    tokenizer_path device dtype compile attention_backend timeout_seconds allow_unknown ema_decay
    swa_enabled swa_interval swa_threshold num_layers num_kv_heads mlp_mult rope_dims rope_base
    rope_stretch_from xsa_last_n ln_scale bigram_vocab_size ve_enabled ve_layers vrl_enabled
    smear_enabled skips_enabled skip_gates_enabled mlp_gated parallel_from recur_layers recur_times
    logit_softcap map_basis map_seed map_seed_stride map_scale map_gate distill_alpha
    distill_temperature recur_frac distill_from self_distill distill_start_frac distill_end_frac
    warmdown_iters warmdown_frac min_lr checkpoint_seconds bigram_gate induction
"""


def test_every_setting_is_observed():
    """A new setting needs a line in OBSERVED, or a test of its own."""
    assert {*OBSERVED, *ELSEWHERE.split()} == train_gpt.SETTINGS.keys()
    assert not OBSERVED.keys() & set(ELSEWHERE.split())


@functools.cache
def seen(by: Callable[..., Parts], h: train_gpt.Hyperparameters) -> Parts:
    return by(h)


@pytest.mark.parametrize("name", OBSERVED)
def test_a_setting_changes_what_it_names(name, data_settings):
    case = OBSERVED[name]
    before = seen(case.by, data_settings(**case.beside))
    after = seen(case.by, data_settings(**case.beside | {name: case.value}))
    changed = {part for part in before | after if not same(before.get(part), after.get(part))}
    expected = set(case.parts.split()) - {"only"}
    assert expected <= changed
    assert "only" not in case.parts.split() or expected == changed


@pytest.mark.parametrize("by", sorted({case.by for case in OBSERVED.values()}, key=str))
def test_what_is_observed_changes_by_nothing_but_the_settings(by, data_settings):
    """Else the test before would show nothing."""
    case = next(case for case in OBSERVED.values() if case.by is by)
    h = data_settings(**case.beside)
    assert same(by(h), by(h))
