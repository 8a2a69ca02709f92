"""Every kind of model that the map table can describe, trained in this process and exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import train_gpt
from helpers import ONE_LAYER, TINY
from reference import artifact_groups, tokens

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
    "system-d": {"PROGRESSIVE_FREEZE_FRAC": 0.3, "GPTQ_CALIB_BATCHES": 2, "QUANTIZER": "rms"},
    "self-distilled": TEACHING | {"DISTILL_START_FRAC": 0.25, "DISTILL_END_FRAC": 0.75},
    "self-distilled-freezing": {
        "PROGRESSIVE_FREEZE_FRAC": 0.5,
        "SELF_DISTILL": 1,
        "DISTILL_START_FRAC": 0.4,
    },
    "distilled": {"MAP_ADAPTER": "lora:2", "MODEL_DIM": 16, "DISTILL_FROM": "system-a"},
    "ensemble": {"ENSEMBLE": 2, "MAP_BASIS": "learned,m1.all=orthogonal", "MAP_ADAPTER": "lora:4"},
    "vera": {"MAP_BASIS": "uniform", "MAP_ADAPTER": "vera:4"},
    "random-projections": {"RAND_PROJ_LAYERS": "0,1", "RAND_GAIN": 1},
    "recurrent": {"MAP_ADAPTER": "rslora:16", "RECUR_LAYERS": 1, "PARALLEL_FROM": 2},
    "shared": {"MAP_BASIS": "shared:2", "MAP_ADAPTER": "lora:4"},
    "combination": {"MAP_BASIS": "gaussian", "MAP_ADAPTER": "combination:8+lora:2"},
    "sparse-hadamard": {
        "MAP_BASIS": "hadamard",
        "MAP_ADAPTER": "sparse:0.1+lora:4",
        "MAP_SCALE": "map",
    },
    "signed": {"MAP_BASIS": "learned,bigram.signs=rademacher", "MAP_ADAPTER": "none"},
    "mask": {"MAP_BASIS": "rademacher", "MAP_ADAPTER": "mask", "MAP_SCALE": "row"},
}


def load(settings: dict) -> train_gpt.Hyperparameters:
    given = VARIANT | settings
    return train_gpt.load_settings({name: str(value) for name, value in given.items()})


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Trained(train_gpt.RunLog):
    """One training and what was seen of it; it stands for the log of the run."""

    def __init__(self, h: train_gpt.Hyperparameters) -> None:
        super().__init__(rank=0)
        self.h = h
        self.model: train_gpt.LanguageModel = None
        self.last: dict = {}  # what training left in it
        self.phases: train_gpt.Phases = None
        self.blob = b""
        self.lines: list[str] = []
        self.lr_scales: list[float] = []  # of all steps, warm-up included
        self.taught: list[bool] = []  # whether a teacher spoke, of each batch
        self.snapshots: list[tuple[str, dict, dict]] = []  # line, model and teacher as it begins

    def __call__(self, text: str, console: bool = True) -> None:
        """Keep a line, and what a phase finds when it begins."""
        self.lines.append(text)
        if text.startswith("phase "):
            teacher = self.phases.teacher
            self.snapshots.append((text, copied(self.model), copied(teacher) if teacher else {}))

    def losses(self) -> list[float]:
        lines = [line for line in self.lines if " train_loss:" in line]
        return [float(line.split("train_loss:")[1].split()[0]) for line in lines]

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Keep what some functions of the script are given, and what they return."""
        export_best, step = train_gpt.export_best, train_gpt.Optimizers.step
        prepare_model, teacher_logits = train_gpt.prepare_model, train_gpt.Phases.teacher_logits

        def watched_prepare(*given):
            self.model = prepare_model(*given)
            return self.model

        def watched_export(*given):
            self.last = copied(self.model)
            return export_best(*given)

        def watched_step(optimizers, number, lr_scale):
            self.lr_scales.append(lr_scale)
            return step(optimizers, number, lr_scale)

        def watched_logits(phases, ids):
            self.phases = phases
            logits = teacher_logits(phases, ids)
            self.taught.append(logits is not None)
            return logits

        patch.setattr(train_gpt, "prepare_model", watched_prepare)
        patch.setattr(train_gpt, "export_best", watched_export)
        patch.setattr(train_gpt.Optimizers, "step", watched_step)
        patch.setattr(train_gpt.Phases, "teacher_logits", watched_logits)


@pytest.fixture(scope="module")
def train_here(corpus, processes, tmp_path_factory):
    """train_here(settings): a run in this process, by the script's own functions."""

    def train(settings: dict) -> Trained:
        h = load(corpus.settings | settings)
        tokenizer = train_gpt.Tokenizer(h.tokenizer_path, h.vocab_size)
        val = train_gpt.ValidationStream(h, tokenizer)
        val.tokens = val.tokens[:1025]  # is only looked at
        trained, folder = Trained(h), tmp_path_factory.mktemp("run")
        stop = train_gpt.StopSignal()
        run = train_gpt.Run(h, processes, trained, stop, tokenizer, val, folder)
        with pytest.MonkeyPatch.context() as patch:
            trained.watch(patch)
            trained.blob, _ = train_gpt.train_and_export(run, None)
        trained.path = folder / "model.ptz"
        trained.path.write_bytes(trained.blob)
        return trained

    return train


@pytest.fixture(scope="module")
def trained(train_here):
    """trained(name): a variant's run, made once."""
    runs = {}

    def run_of(name: str) -> Trained:
        if name not in runs:
            variant = dict(VARIANTS[name])
            if "DISTILL_FROM" in variant:
                variant["DISTILL_FROM"] = run_of(variant["DISTILL_FROM"]).path
            runs[name] = train_here(variant)
        return runs[name]

    return run_of


def rebuilt(run: Trained, processes) -> train_gpt.LanguageModel:
    return train_gpt.model_from_artifact(run.h, run.blob, processes)


# ---- What all variants do ------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_and_its_artifact_is_the_model(trained, processes, name):
    """To the bit, with the maps that the table names, in the bytes that the log says."""
    run = trained(name)
    losses = run.losses()
    assert len(losses) == 12
    taught = run.taught[-24::2]  # two micro-batches a step; a teacher changes the loss
    losses = [loss for loss, by in zip(losses, taught, strict=True) if by == taught[-1]]
    assert np.mean(losses[-2:]) < losses[0] - 0.05

    header, tensors = train_gpt.read_artifact(run.blob)
    ours, theirs = run.model.eval(), rebuilt(run, processes)
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

    groups = artifact_groups(run.blob).items()  # calibration decides which columns have scales
    size = sum(len(values) for group, values in groups if not group.endswith(" columns"))
    assert size == train_gpt.stored_bytes(ours)
    assert any(f"takes {size:,} bytes uncompressed" in line for line in run.lines)


LARGE = {
    "many shared matrices": {"MAP_BASIS": "shared:60"},
    "many combined maps": {"MAP_ADAPTER": "combination:200"},
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
    assert train_gpt.memory_of_model(h, train_gpt.build_map_table(h)) >= sum(held.values())


# ---- What each promises --------------------------------------------------------------------------


def test_members_of_an_ensemble_are_what_their_selector_says():
    table = train_gpt.build_map_table(load(VARIANTS["ensemble"])).values()
    bases = {(spec.name.split(".")[1], spec.basis) for spec in table if "blocks" in spec.name}
    assert bases == {("0", "learned"), ("1", "orthogonal")}


@pytest.mark.parametrize(("name", "step"), [("system-d", 4), ("self-distilled-freezing", 6)])
def test_maps_that_freeze_do_not_change_and_are_stored(trained, name, step):
    """From 0.3 and 0.5 of 12 steps on; averages, late QAT and decay must leave them alone."""
    run = trained(name)
    snapshots = [found for found in run.snapshots if "frozen_maps:3" in found[0]]
    ((line, then, _),) = [found for found in snapshots if f"step:{step} " in found[0]]
    frozen = [f"blocks.{layer}.mlp.fc.weight" for layer in range(3)]
    for key, value in then.items():
        assert torch.equal(value, run.last[key]) == (key in frozen), (line, key)
    _, tensors = train_gpt.read_artifact(run.blob)
    for key in frozen:
        error = (tensors[key] - run.last[key]).norm() / run.last[key].norm()
        assert error < 0.25, "stored as they are, up to quantization"


@pytest.mark.parametrize(
    ("name", "warmdown"), [("system-d", 0.5), ("recurrent", 0.5), ("system-b", 0.667)]
)
def test_phases_do_not_restart_the_learning_rates(trained, name, warmdown):
    """The fraction itself counts, not a whole number of steps."""
    expected = [min(1.0, (1 - step / 12) / warmdown) for step in range(12)]
    assert trained(name).lr_scales[-12:] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "first", "last", "end"),
    [("self-distilled", 3, 9, 9), ("self-distilled-freezing", 5, 6, 12)],
)
def test_a_model_teaches_itself_as_it_was_when_its_teaching_began(trained, name, first, last, end):
    """A freeze at 0.5, after a teaching that began at 0.4, must not take another teacher."""
    run = trained(name)
    (begin, then, teacher), (change, _, still) = run.snapshots
    assert begin.startswith(f"phase step:{first} ")
    assert change.startswith(f"phase step:{last} ")
    for key, value in then.items():
        assert torch.equal(teacher[key], value)
        assert torch.equal(still[key], value)
    assert not torch.equal(run.last["embedding.weight"], then["embedding.weight"])
    # Two micro-batches a step.
    assert run.taught[-24:] == [first <= step < end for step in range(12) for _ in range(2)]


def test_a_teacher_may_be_of_another_width(trained):
    run = trained("distilled")
    teacher, expected = run.phases.teacher, train_gpt.read_artifact(trained("system-a").blob)[1]
    assert all(run.taught[-24:])
    assert teacher.embedding.weight.shape == (512, 32)
    assert run.model.embedding.weight.shape == (512, 16)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, expected[key]), "a teacher does not learn"


def test_layers_recur_from_their_fraction_of_training_on(trained):
    """0.35 of 12 steps: from the fifth on, and in what the artifact gives."""
    run = trained("recurrent")
    ((line, _, _),) = run.snapshots
    assert line.startswith("phase step:5 ")
    assert "recurrence:True" in line
    assert run.model.recurs


# ---- New kinds -----------------------------------------------------------------------------------


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
