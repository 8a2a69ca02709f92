"""Every kind of model that the map table can describe, trained in this process and exported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from helpers import ONE_LAYER, TINY, KeptLog, copied
from reference import tokens

VARIANT = TINY | {
    "NUM_LAYERS": 3,
    "EVAL_STRIDE": 32,
    "MICRO_BATCH_TOKENS": 128,  # two micro-batches a step
    "ITERATIONS": 12,
    "GPTQ_CALIB_BATCHES": 1,
    "VAL_LOSS_EVERY": 0,
    "WARMDOWN_FRAC": 0.5,
    "SWA_INTERVAL": 1,
    "SCALAR_LR": 0.1,
    "LOSS_PER_VALUE": 1e-12,  # hardly anything, as the few steps here have learned little
    "LATE_QAT_THRESHOLD": 0.4,
}
del VARIANT["MAP_ADAPTER"]  # each variant has its own
del VARIANT["WARMDOWN_ITERS"]  # half of the training for each, by WARMDOWN_FRAC
TEACHING = {"SELF_DISTILL": 1, "MAP_ADAPTER": "lora:4"}
VARIANTS = {
    "system-a": {"USE_RANDOM_ADAPTERS": 1, "RANDOM_ADAPTER_RANK": 4, "EMA_DECAY": 0.9},
    "system-b": {
        "RANDOM_BASIS_ENABLED": 1,
        "LORA_RANK": 4,
        "MLP_MULT": 4,
        "SKIP_GATES_ENABLED": 1,
        "WARMDOWN_FRAC": 0.667,
    },
    "system-c": {"SELECTIVE_FREEZE": 1, "MLP_GATED": 1, "DROPOUT": 0.2},
    "system-d": {
        "PROGRESSIVE_FREEZE_FRAC": 0.3,
        "GPTQ_CALIB_BATCHES": 2,
        "QUANTIZER": "rms",
        "LOSS_PER_VALUE": 3e-9,
    },
    "self-distilled": TEACHING | {"DISTILL_START_FRAC": 0.25, "DISTILL_END_FRAC": 0.75},
    "self-distilled-freezing": {
        "PROGRESSIVE_FREEZE_FRAC": 0.5,
        "SELF_DISTILL": 1,
        "DISTILL_START_FRAC": 0.4,
    },
    "distilled": {"MAP_ADAPTER": "lora:2", "MODEL_DIM": 16, "DISTILL_FROM": "system-a"},
    "ensemble": {"ENSEMBLE": 2, "MAP_BASIS": "learned,m1.all=orthogonal", "MAP_ADAPTER": "lora:4"},
    "vera": {  # without a learned matrix
        "MAP_BASIS": "uniform",
        "MAP_ADAPTER": "vera:4",
        "BIGRAM_VOCAB_SIZE": 0,
        "VE_ENABLED": 0,
    },
    "random-projections": {"RAND_PROJ_LAYERS": "0,1", "RAND_GAIN": 1},
    "recurrent": {"MAP_ADAPTER": "rslora:16", "RECUR_LAYERS": 1, "PARALLEL_FROM": 2},
    "shared": {"MAP_BASIS": "shared:2", "MAP_ADAPTER": "lora:4"},
    "combination": {"MAP_BASIS": "gaussian", "MAP_ADAPTER": "combination:8+lora:2"},
    "sparse-hadamard": {
        "MAP_BASIS": "hadamard",
        "MAP_ADAPTER": "sparse:0.1+lora:4",
        "MAP_SCALE": "map",
    },
    "signed": {
        "MAP_BASIS": "learned,bigram.signs=rademacher",
        "MAP_ADAPTER": "none",
        "BIGRAM_GATE": "1",
        "INDUCTION": "3",
    },
    "mask": {"MAP_BASIS": "rademacher", "MAP_ADAPTER": "mask", "MAP_SCALE": "row"},
}


def load(settings: dict) -> train_gpt.Hyperparameters:
    given = VARIANT | settings
    return train_gpt.load_settings({name: str(value) for name, value in given.items()})


class Trained:
    """One training of a run, its export, and what was seen of them."""

    def __init__(self, run: train_gpt.Run, path: Path) -> None:
        h, data, log = run.h, train_gpt.TrainingData(run.h), run.log
        self.h, self.path, self.model = h, path, train_gpt.prepare_model(run, None)
        train_gpt.log_start(run, self.model)
        log.model = self.model
        trainer = train_gpt.Trainer(run, self.model, data, train_gpt.load_teacher(run))
        self.phases, forward = trainer.phases, trainer.forward
        self.taught: list[bool] = []  # whether a teacher spoke, of each step

        def watched(ids, targets, teacher_logits):
            self.taught.append(teacher_logits is not None)
            return forward(ids, targets, teacher_logits)

        trainer.warm_up()
        trainer.forward = watched
        trainer.train()
        del self.taught[::2]  # two micro-batches a step
        metrics, candidates = trainer.finish()
        self.last = copied(self.model)  # what training left in it
        losses = {name: metrics[f"holdout_loss_{name}"] for name in candidates}
        steps = metrics["steps"]
        exported = train_gpt.export_best(run, self.model, data, candidates, losses, steps, 1e9)
        self.blob, self.lines = exported[0], log.lines
        self.after_step = [self.last, *log.snapshots]  # the weights, from step 1 on
        path.write_bytes(self.blob)


@pytest.fixture(scope="module")
def trained(corpus, processes, tmp_path_factory):
    """trained(name): a variant's run, made once, by the script's own functions."""
    runs = {}
    tokenizer = SimpleNamespace(sha256="0" * 64)
    val = SimpleNamespace(tokens=tokens(100), bytes=100, bits_per_byte=lambda loss: loss)

    def run_of(name: str) -> Trained:
        if name not in runs:
            variant = VARIANTS[name] | corpus.settings
            if "DISTILL_FROM" in variant:
                variant["DISTILL_FROM"] = run_of(variant["DISTILL_FROM"]).path
            folder, stop = tmp_path_factory.mktemp("run"), train_gpt.StopSignal()
            run = train_gpt.Run(load(variant), processes, KeptLog(), stop, tokenizer, val, folder)
            runs[name] = Trained(run, folder / "model.ptz")
        return runs[name]

    return run_of


# ---- What all variants do ------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_and_its_artifact_is_the_model(trained, processes, name):
    """To the bit, with the maps that the table names, in the bytes that the log says."""
    run = trained(name)
    lines = [line for line in run.lines if " train_loss:" in line]
    losses = [float(line.split("train_loss:")[1].split()[0]) for line in lines]
    assert len(losses) == 12
    # A teacher changes the loss.
    losses = [loss for loss, by in zip(losses, run.taught, strict=True) if by == run.taught[-1]]
    assert np.mean(losses[-2:]) < losses[0] - 0.05

    header, tensors = train_gpt.read_artifact(run.blob)
    ours = run.model.eval()
    theirs = train_gpt.model_from_artifact(run.h, run.blob, processes)
    assert tensors.keys() == ours.state_dict().keys()
    ours.load_state_dict(tensors)
    ids = tokens(3, 32)
    with torch.no_grad():
        assert torch.equal(ours.predict(ids), theirs.predict(ids))
    assert ours.fingerprint() == theirs.fingerprint() == header["fingerprint"]
    for spec in ours.table.values():
        assert (f"{spec.name}.weight" in tensors) == (spec.basis == "learned"), spec
        if spec.is_random:
            weight = ours.get_submodule(spec.name).weight
            assert torch.equal(weight, train_gpt.generate_map(spec)), spec


LARGE = {
    "many shared matrices": {"MAP_BASIS": "shared:60"},
    "values everywhere": {"MAP_ADAPTER": "sparse:1"},
    "large tables": {"VOCAB_SIZE": 20_000, "BIGRAM_VOCAB_SIZE": 20_000},
    "large members": {"ENSEMBLE": 3, "MAP_BASIS": "learned", "VOCAB_SIZE": 20_000},
}


@pytest.mark.parametrize("settings", (VARIANTS | LARGE).values(), ids=VARIANTS | LARGE)
def test_the_estimate_of_memory_covers_what_a_model_takes(settings):
    """Else an artifact whose header asks for a model that large fills the memory."""
    h = load({"MAP_ADAPTER": "lora:4"} | settings if settings in LARGE.values() else settings)
    model = train_gpt.make_model(h)
    held = {p.data_ptr(): p.nbytes for p in [*model.parameters(), *model.buffers()]}
    assert train_gpt.memory_of_model(h) >= sum(held.values())


# ---- What each promises --------------------------------------------------------------------------


def test_members_of_an_ensemble_are_what_their_selector_says():
    table = train_gpt.build_map_table(load(VARIANTS["ensemble"])).values()
    bases = {(spec.name.split(".")[1], spec.basis) for spec in table if "blocks" in spec.name}
    assert bases == {("0", "learned"), ("1", "orthogonal")}


@pytest.mark.parametrize(("name", "step"), [("system-d", 4), ("self-distilled-freezing", 6)])
def test_maps_that_freeze_do_not_change_and_are_stored(trained, name, step):
    """From 0.3 and 0.5 of 12 steps on; averages, late QAT and decay must leave them alone."""
    run = trained(name)
    frozen = [f"blocks.{layer}.mlp.fc.weight" for layer in range(3)]
    for key, value in run.after_step[step].items():
        assert torch.equal(value, run.last[key]) == (key in frozen), key
    _, tensors = train_gpt.read_artifact(run.blob)
    for key in frozen:
        error = (tensors[key] - run.last[key]).norm() / run.last[key].norm()
        assert error < 0.25, "stored as they are, up to quantization"


@pytest.mark.parametrize(
    ("name", "first", "end"), [("self-distilled", 3, 9), ("self-distilled-freezing", 5, 12)]
)
def test_a_model_teaches_itself_as_it_was_when_its_teaching_began(trained, name, first, end):
    """A freeze at 0.5, after a teaching that began at 0.4, must not take another teacher."""
    run = trained(name)
    assert run.taught == [first <= step < end for step in range(12)]
    for key, value in run.phases.teacher.named_parameters():
        assert torch.equal(value, run.after_step[first][key])
    assert not torch.equal(run.last["embedding.weight"], run.phases.teacher.embedding.weight)


# ---- Compiled ------------------------------------------------------------------------------------


EACH_ADAPTER = {
    "NUM_LAYERS": 2,
    "MAP_BASIS": "gaussian,attention.q=rademacher,attention.k=hadamard,mlp=shared:2",
    "MAP_ADAPTER": "combination:8+lora:2,attention.q=mask,attention.k=sparse:0.1+rslora:4,"
    "attention.v=vera:4",
    "MAP_SCALE": "none,attention.q=row,attention.k=map",
}
RECURRENT_LAYER = ONE_LAYER | {"RECUR_LAYERS": 0, "RECUR_TIMES": 2, "PARALLEL_FROM": 0}


FREEZING = ONE_LAYER | {"MAP_BASIS": "learned", "MAP_FREEZE": "mlp=0.5", "DROPOUT": 0.2}


@pytest.mark.parametrize(
    "variant",
    [FREEZING, EACH_ADAPTER, VARIANTS["recurrent"] | RECURRENT_LAYER],
    ids=["freezing", "adapters", "recurrent"],
)
def test_each_phase_compiles_into_one_graph(variant):
    """`fullgraph` refuses a graph break; the graph must compute what the model does.

    A phase with frozen maps has no gradients of theirs.
    """
    h = load(variant)
    torch.manual_seed(0)
    model = train_gpt.make_model(h, torch.float64).double().train()
    phases = train_gpt.Phases(h, model, None, compiled=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    ids = tokens(2, 33)
    for boundary in phases.boundaries:
        phases.enter(boundary)
        found = []
        for forward in (compiled, model):
            torch.manual_seed(1)  # of the dropout
            loss = forward(ids[:, :-1], ids[:, 1:], phases.teacher_logits(ids[:, :-1]))
            loss.backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append(torch.cat([loss.detach()[None], *gradients]))
            model.zero_grad()
        # The logits and their gradients alone are float32.
        assert (found[0] - found[1]).norm() < 64 * 2**-24 * found[1].norm()
