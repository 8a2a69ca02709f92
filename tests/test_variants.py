"""Tests of every kind of model that the map table can describe.

Each variant is trained in this process, exported, read back, and told from the others.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from helpers import ONE_LAYER, TINY, TWO_PROCESSES, Container, refusal, run_well

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
PUBLISHED_B = {
    "RANDOM_BASIS_ENABLED": 1,
    "LORA_RANK": 4,
    "MLP_MULT": 4,
    "SKIP_GATES_ENABLED": 1,
    "WARMDOWN_FRAC": 0.667,
}
VARIANTS = {
    "system-a": {"USE_RANDOM_ADAPTERS": 1, "RANDOM_ADAPTER_RANK": 4, "EMA_DECAY": 0.9},
    "system-b": PUBLISHED_B,
    "system-c": {"SELECTIVE_FREEZE": 1, "MLP_GATED": 0, "DROPOUT": 0.2},
    "system-c-gated": {"SELECTIVE_FREEZE": 1, "MLP_GATED": 1, "DROPOUT": 0.2},
    "system-d": {"PROGRESSIVE_FREEZE_FRAC": 0.3, "GPTQ_CALIB_BATCHES": 2, "QUANTIZER": "rms"},
    "gaussian-mlp": {"MAP_BASIS": "mlp=gaussian", "MAP_ADAPTER": "lora:8"},
    "self-distilled": {
        "MAP_ADAPTER": "lora:4",
        "SELF_DISTILL": 1,
        "DISTILL_START_FRAC": 0.25,
        "DISTILL_END_FRAC": 0.75,
    },
    "self-distilled-freezing": {
        "PROGRESSIVE_FREEZE_FRAC": 0.5,
        "SELF_DISTILL": 1,
        "DISTILL_START_FRAC": 0.4,
    },
    "distilled": {
        "MAP_ADAPTER": "lora:2",
        "NUM_LAYERS": 2,
        "MODEL_DIM": 16,
        "DISTILL_FROM": "system-a",
    },
    "ensemble": {"ENSEMBLE": 2, "MAP_BASIS": "learned,m1.all=orthogonal", "MAP_ADAPTER": "lora:4"},
    "uniform": {"MAP_BASIS": "uniform", "MAP_ADAPTER": "lora:4"},
    "vera": {"MAP_ADAPTER": "vera:4"},
    "random-projections": {"RAND_PROJ_LAYERS": "0,1", "RAND_GAIN": 1},
    "orthogonal-mlp": {"MAP_BASIS": "mlp=orthogonal", "MAP_ADAPTER": "lora:8"},
    "recurrent": {"MAP_ADAPTER": "rslora:16", "RECUR_LAYERS": 1, "PARALLEL_FROM": 2},
    "learned": {"USE_RANDOM_ADAPTERS": 0},
    "shared": {"MAP_BASIS": "shared:2", "MAP_TWIST": "permutation", "MAP_ADAPTER": "lora:4"},
    "signs": {"MAP_ADAPTER": "signs", "MAP_SCALE": "row"},
    "combination": {"MAP_BASIS": "gaussian", "MAP_ADAPTER": "combination:8+lora:2"},
    "sparse-hadamard": {
        "MAP_BASIS": "hadamard",
        "MAP_ADAPTER": "sparse:0.1+lora:4",
        "MAP_SCALE": "map",
    },
    "mask": {"MAP_BASIS": "rademacher", "MAP_ADAPTER": "mask", "MAP_SCALE": "row"},
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


class Trained(train_gpt.RunLog):
    """One training and what was seen of it; it stands for the log of the run."""

    def __init__(self, h: train_gpt.Hyperparameters) -> None:
        super().__init__(rank=0)
        self.h = h
        self.specs = list(train_gpt.build_map_table(h).values())
        self.model: train_gpt.LanguageModel = None  # as training left it
        self.phases: train_gpt.Phases = None
        self.blob = b""
        self.quantized: dict = {}  # what an export handed to its artifact, the last one so far
        self.exports: dict[str, dict] = {}  # that of each candidate
        self.lines: list[str] = []  # of the console
        self.lr_scales: list[float] = []  # of all steps, warm-up included
        self.taught: list[bool] = []  # whether a teacher spoke, of each batch
        self.snapshots: list[tuple[str, dict, dict]] = []  # line, model and teacher as it begins

    def __call__(self, text: str, console: bool = True) -> None:
        """Keep a line, and what a phase finds when it begins."""
        self.lines += [text] if console else []
        if text.startswith("quantized "):
            self.exports[text.split()[1].partition(":")[0]] = self.quantized
        if text.startswith("phase "):
            teacher = self.phases.teacher
            self.snapshots.append((text, copied(self.model), copied(teacher) if teacher else {}))

    @property
    def exported(self) -> dict:
        """What the artifact was made of."""
        (text,) = (line for line in self.lines if line.startswith("exported:"))
        return self.exports[text.split()[0].removeprefix("exported:")]

    def losses(self) -> list[float]:
        lines = [line for line in self.lines if " train_loss:" in line]
        return [float(line.split("train_loss:")[1].split()[0]) for line in lines]

    def map_lines(self) -> list[list[str]]:
        """Return the logged map table, heading included, as cells."""
        table = next(text for text in self.lines if text.startswith("map "))
        return [line.split() for line in table.splitlines()]


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def described(corpus, tmp_path_factory, trained_blob):
    """described(name): the environment of a variant; a teacher becomes a path of its artifact."""

    def environment_of(name: str) -> dict[str, str]:
        variant = dict(VARIANTS[name])
        if "DISTILL_FROM" in variant:
            variant["DISTILL_FROM"] = trained_blob(variant["DISTILL_FROM"])
        return strings(VARIANT | corpus.settings | variant)

    return environment_of


def strings(settings: dict) -> dict[str, str]:
    return {name: str(value) for name, value in settings.items()}


@pytest.fixture(scope="module")
def train_here(processes, tmp_path_factory):
    """train_here(environment): a run in this process, by the script's own functions."""

    def train(environment: dict[str, str]) -> Trained:
        h = train_gpt.load_settings(environment)
        tokenizer = train_gpt.Tokenizer(h.tokenizer_path, h.vocab_size)
        val = train_gpt.ValidationStream(h, tokenizer)
        val.tokens = val.tokens[:1025]  # is only looked at
        trained, folder = Trained(h), tmp_path_factory.mktemp("run")
        stop = train_gpt.StopSignal()
        run = train_gpt.Run(h, processes, trained, stop, tokenizer, val, folder)
        with pytest.MonkeyPatch.context() as patch:
            watch(trained, patch)
            trained.blob, _ = train_gpt.train_and_export(run, None)
        return trained

    return train


def watch(trained: Trained, patch: pytest.MonkeyPatch) -> None:
    """Keep what some functions of the script are given, and what they return."""
    prepare_model, quantize_model = train_gpt.prepare_model, train_gpt.quantize_model
    export_best = train_gpt.export_best
    step, teacher_logits = train_gpt.Optimizers.step, train_gpt.Phases.teacher_logits

    def watched_prepare(*args):
        trained.model = prepare_model(*args)
        return trained.model

    def watched_quantize(*args):
        tensors = quantize_model(*args)
        trained.quantized = copy.deepcopy(tensors)  # some are the model's own
        return tensors

    def watched_export(run, model, *args):
        before = copied(model)
        found = export_best(run, model, *args)
        model.load_state_dict(before)
        return found

    def watched_step(self, number, lr_scale):
        trained.lr_scales.append(lr_scale)
        return step(self, number, lr_scale)

    def watched_logits(self, ids):
        trained.phases = self
        logits = teacher_logits(self, ids)
        trained.taught.append(logits is not None)
        return logits

    patch.setattr(train_gpt, "prepare_model", watched_prepare)
    patch.setattr(train_gpt, "quantize_model", watched_quantize)
    patch.setattr(train_gpt, "export_best", watched_export)
    patch.setattr(train_gpt.Optimizers, "step", watched_step)
    patch.setattr(train_gpt.Phases, "teacher_logits", watched_logits)


@pytest.fixture(scope="module")
def runs() -> dict[str, Trained]:
    return {}


@pytest.fixture(scope="module")
def trained_blob(runs, train_here, corpus, tmp_path_factory):
    """trained_blob(name): path of a variant's artifact, for variants without a teacher."""

    def path_of(name: str) -> Path:
        if name not in runs:
            runs[name] = train_here(strings(VARIANT | corpus.settings | VARIANTS[name]))
        path = tmp_path_factory.mktemp(name) / "model.int6.ptz"
        path.write_bytes(runs[name].blob)
        return path

    return path_of


@pytest.fixture(scope="module")
def trained(runs, train_here, described):
    """trained(name): a variant's run, made once."""

    def run_of(name: str) -> Trained:
        if name not in runs:
            runs[name] = train_here(described(name))
        return runs[name]

    return run_of


def stored_groups(blob: bytes) -> dict[str, bytes]:
    """Return the artifact's groups, by the format's description alone."""
    return Container(blob).groups()


def bytes_of_map(spec: train_gpt.MapSpec) -> int:
    """Return what a map costs, by its row of the table.

    Codes and exponents take a byte each, floats two, bits one bit.
    """
    rows, columns = spec.shape

    def coded(height: int, width: int) -> int:
        return height * width + height

    adapter_bytes = {
        "none": lambda _: 0,
        "lora": lambda rank: coded(rows, int(rank)) + coded(int(rank), columns),
        "rslora": lambda rank: coded(rows, int(rank)) + coded(int(rank), columns),
        "vera": lambda rank: 2 * (rows + int(rank)),
        "sparse": lambda density: coded(rows, max(1, round(float(density) * columns))),
        "mask": lambda _: math.ceil(rows * columns / 8),
        "signs": lambda _: math.ceil(rows * columns / 8),
        "combination": lambda count: 2 * int(count),
    }
    total = coded(rows, columns) if spec.basis == "learned" else 0
    if spec.basis.startswith("shared:"):
        total += 2 * int(spec.basis.partition(":")[2])  # how the matrices are mixed
    for part in spec.adapter.split("+"):
        name, _, size = part.partition(":")
        total += adapter_bytes[name](size)
    total += {"none": 0, "map": 2, "row": 2 * rows}[spec.scale]
    return total + (0 if spec.gate is None else 2 * rows)


CODED = (  # what is stored as codes beside the maps of the table
    "embedding.weight",
    "bigram.weight",
)


def bytes_of_values(blob: bytes) -> int:
    """Return what an artifact holds, uncompressed, without the scales of columns.

    Calibration decides which matrices have these.
    """
    groups = stored_groups(blob)
    return sum(len(values) for name, values in groups.items() if not name.endswith(" columns"))


def bytes_around(model: train_gpt.LanguageModel) -> int:
    """Return what is in no row: tables and shared matrices are codes, the rest is float16."""
    total = 0
    for name, p in model.named_parameters():
        if any(name.startswith(f"{row}.") for row in model.table):
            continue
        is_coded = name.endswith(CODED) or name.startswith("shared.")
        total += p.numel() + len(p) if is_coded else 2 * p.numel()
    return total


# ---- What all variants do ----------------------------------------------------------------------


@each_variant
def test_a_variant_learns(trained, name):
    run = trained(name)
    losses = run.losses()
    assert len(losses) == 12
    if run.h.self_distill or run.h.distill_from:  # the loss is another while a teacher speaks
        assert any(run.taught)
        taught = run.taught[-24::2]  # two micro-batches a step
        pairs = zip(losses, taught, strict=True)
        losses = [loss for loss, by_teacher in pairs if by_teacher == taught[-1]]
    assert np.mean(losses[-2:]) < losses[0] - 0.05


def as_stored(value: train_gpt.QuantizedTensor | torch.Tensor) -> torch.Tensor:
    """Return what the artifact gives back for a value."""
    if isinstance(value, train_gpt.QuantizedTensor):
        return value.dequantize()
    return value if value.dtype is torch.bool else value.half().float()


@each_variant
def test_an_artifact_is_the_exported_model_to_the_bit(trained, processes, name):
    """The trained model, given the values that the export chose, and one built from bytes alone."""
    run = trained(name)
    header, tensors = train_gpt.read_artifact(run.blob)
    values = {key: as_stored(value) for key, value in run.exported.items()}
    ours = run.model.eval()
    assert tensors.keys() == values.keys() == ours.state_dict().keys()
    before = copied(ours)
    ours.load_state_dict(values)
    theirs = train_gpt.model_from_artifact(run.h, run.blob, processes)
    ids = torch.randint(512, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = ours.predict(ids), theirs.predict(ids)
    ours.load_state_dict(before)
    assert torch.equal(logits, expected)
    assert expected.std() > 0.01
    assert ours.fingerprint() == theirs.fingerprint() == header["fingerprint"]


@each_variant
def test_an_artifact_holds_the_bytes_that_the_table_says(trained, name):
    run = trained(name)
    size = bytes_of_values(run.blob)
    in_table = sum(map(bytes_of_map, run.specs))
    assert size == in_table + bytes_around(run.model)
    assert size == train_gpt.stored_bytes(run.model)
    assert any(f"takes {size:,} bytes uncompressed" in line for line in run.lines)
    _, *rows = run.map_lines()
    assert sum(int(cells[-1].replace(",", "")) for cells in rows) == in_table


@each_variant
def test_an_artifact_refuses_another_variants_settings(trained, described, name):
    """And takes its own, which say nothing new; so it does those of a variant that agrees."""
    stored = train_gpt.read_artifact(trained(name).blob)[0]["model"]
    refused = set()
    for other in VARIANTS:
        if (other == "distilled") != (name == "distilled"):  # it has another size
            continue
        asked = train_gpt.load_settings(described(other))
        mine = asked.model_settings()
        if all(stored[key] == mine[key] for key in mine.keys() & asked.explicit):
            train_gpt.adopt_settings(asked, stored, "the artifact")
            continue
        with pytest.raises(train_gpt.UserError, match="the artifact has other settings"):
            train_gpt.adopt_settings(asked, stored, "the artifact")
        refused.add(other)
    own = train_gpt.load_settings(described(name))
    adopted = train_gpt.adopt_settings(own, stored, "the artifact")
    assert adopted.model_settings() == stored
    assert name not in refused
    assert len(refused) >= len(VARIANTS) - 5 or name == "distilled"


LARGE = {
    "many shared matrices": {"MAP_BASIS": "shared:60"},
    "large twists": {"MAP_BASIS": "shared", "MAP_TWIST": "orthogonal", "MLP_MULT": 40},
    "many combined maps": {"MAP_ADAPTER": "combination:200"},
    "values everywhere": {"MAP_ADAPTER": "sparse:1"},
    "large tables": {"VOCAB_SIZE": 20_000, "BIGRAM_VOCAB_SIZE": 20_000},
    "large members": {"ENSEMBLE": 3, "MAP_BASIS": "learned", "VOCAB_SIZE": 20_000},
}


@pytest.mark.parametrize("name", [*VARIANTS, *LARGE])
def test_the_estimate_of_memory_covers_what_a_model_takes(described, name):
    """Else an artifact whose header asks for a model that large fills the memory."""
    is_large = name in LARGE
    own = VARIANT | {"MAP_ADAPTER": "lora:4"} | LARGE[name] if is_large else described(name)
    h = train_gpt.load_settings(strings(own))
    model = train_gpt.make_model(h)
    held = {p.data_ptr(): p.nbytes for p in [*model.parameters(), *model.buffers()]}
    assert train_gpt.memory_of_model(h, train_gpt.build_map_table(h)) >= sum(held.values())


# ---- What each promises ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "random", "adapter", "more"),
    [
        (
            "system-a",
            {"attention.q", "attention.k", "attention.v", "attention.proj", "mlp.fc", "mlp.proj"},
            "lora:4",
            {"basis": {"orthogonal"}, "gate": {None}},
        ),
        (
            "system-b",
            {"mlp.fc", "mlp.proj"},
            "lora:4",
            {"basis": {"gaussian"}, "gate": {0.0, None}},
        ),
        ("system-c", {"mlp.fc"}, "none", {"basis": {"gaussian"}}),
        ("system-c-gated", {"mlp.fc", "mlp.gate"}, "none", {"basis": {"gaussian"}}),
        ("system-d", set(), "none", {}),
        ("random-projections", {"mlp.fc"}, "none", {"basis": {"orthogonal"}, "scale": {"row"}}),
        ("learned", set(), "none", {}),
    ],
)
def test_published_variables_name_these_maps(trained, name, random, adapter, more):
    specs = [spec for spec in trained(name).specs if spec.basis != "learned"]
    assert {spec.kind for spec in specs} == random
    assert {spec.adapter for spec in specs} <= {adapter}
    for column, values in more.items():
        assert {getattr(spec, column) for spec in specs} == values


def test_random_projections_are_those_of_the_named_layers(trained):
    specs = trained("random-projections").specs
    random = [spec.name for spec in specs if spec.basis != "learned"]
    assert random == ["blocks.0.mlp.fc", "blocks.1.mlp.fc"]


def test_members_of_an_ensemble_are_what_their_selector_says(trained):
    specs = trained("ensemble").specs
    in_blocks = [spec for spec in specs if "blocks" in spec.name]
    bases = {(spec.name.split(".")[1], spec.basis) for spec in in_blocks}
    assert bases == {("0", "learned"), ("1", "orthogonal")}
    assert len(in_blocks) == 36


def test_what_is_random_is_not_in_the_artifact(trained):
    for name in VARIANTS:
        _, tensors = train_gpt.read_artifact(trained(name).blob)
        for spec in trained(name).specs:
            is_stored = f"{spec.name}.weight" in tensors
            assert is_stored == (spec.basis == "learned"), (name, spec.name)


def test_the_random_maps_come_out_of_training_as_they_were_generated(trained):
    for name in ("system-b", "mask", "signs", "sparse-hadamard", "vera", "combination"):
        model = trained(name).model
        for spec in model.random_maps():
            weight = model.get_submodule(spec.name).weight
            assert torch.equal(weight, train_gpt.generate_map(spec)), (name, spec)


@pytest.mark.parametrize(("name", "step"), [("system-d", 4), ("self-distilled-freezing", 6)])
def test_maps_that_freeze_do_not_change_and_are_stored(trained, name, step):
    """From 0.3 and 0.5 of 12 steps on; averages, late QAT and decay must leave them alone."""
    run = trained(name)
    snapshots = [found for found in run.snapshots if "frozen_maps:3" in found[0]]
    ((line, then, _),) = [found for found in snapshots if f"step:{step} " in found[0]]
    now, frozen = run.model.state_dict(), [f"blocks.{layer}.mlp.fc.weight" for layer in range(3)]
    for key, value in then.items():
        assert torch.equal(value, now[key]) == (key in frozen), (line, key)
    _, tensors = train_gpt.read_artifact(run.blob)
    for key in frozen:
        error = (tensors[key] - now[key]).norm() / now[key].norm()
        assert error < 0.25, "stored as they are, up to quantization"


def test_published_sizes_leave_frozen_maps_out_and_these_count_them(trained):
    run = trained("system-d")
    frozen = [spec for spec in run.specs if spec.freeze]
    assert [spec.name for spec in frozen] == [f"blocks.{layer}.mlp.fc" for layer in range(3)]
    bytes_of_one = 96 * 32 + 96
    learning = [p for p in run.model.parameters() if p.requires_grad]
    assert len(learning) == len(list(run.model.parameters())) - 3, "they are frozen at the end"
    size = bytes_of_values(run.blob)
    others = [spec for spec in run.specs if not spec.freeze]
    without = sum(map(bytes_of_map, others)) + bytes_around(run.model)
    assert size == without + 3 * bytes_of_one
    heading, *rows = run.map_lines()
    for cells in [cells for cells in rows if cells[0].endswith(".mlp.fc")]:
        assert cells[-1] == f"{bytes_of_one:,}"
        assert cells[heading.index("freeze")] == "0.3"


@pytest.mark.parametrize("name", ["system-d", "self-distilled-freezing", "recurrent", "learned"])
def test_phases_do_not_restart_the_learning_rates(trained, name):
    expected = [min(1.0, (12 - step) / 6) for step in range(12)]
    assert trained(name).lr_scales[-12:] == pytest.approx(expected, abs=1e-12)


def test_a_fraction_of_training_to_warm_down_in(trained):
    """It is the fraction itself that counts, not a whole number of steps."""
    expected = [min(1.0, (1 - step / 12) / 0.667) for step in range(12)]
    assert trained("system-b").lr_scales[-12:] == pytest.approx(expected, abs=1e-12)


def test_a_model_teaches_itself_as_it_was_when_its_teaching_began(trained):
    run = trained("self-distilled")
    (first, then, teacher), (last, _, still) = run.snapshots
    assert first.startswith("phase step:3 ")
    assert last.startswith("phase step:9 ")
    assert ("teacher:True" in first, "teacher:False" in last) == (True, True)
    for key, value in then.items():
        assert torch.equal(teacher[key], value)
        assert torch.equal(still[key], value)
    assert not torch.equal(run.model.state_dict()["embedding.weight"], then["embedding.weight"])
    batches = run.taught[-24:]  # two micro-batches a step
    assert batches == [3 <= step < 9 for step in range(12) for _ in range(2)]


def test_a_model_teaches_itself_while_maps_freeze(trained):
    """The freeze at 0.5 comes after the teaching began at 0.4; it must not take another teacher."""
    run = trained("self-distilled-freezing")
    (_, then, teacher), (_, _, still) = run.snapshots[:2]
    steps = [line.split(" progress")[0] for line, *_ in run.snapshots[:2]]
    assert steps == ["phase step:5", "phase step:6"]
    for key, value in then.items():
        assert torch.equal(teacher[key], value)
        assert torch.equal(still[key], value)
    assert run.taught[-24:] == [step >= 5 for step in range(12) for _ in range(2)]


def test_a_teacher_may_be_of_another_width(trained, processes):
    run = trained("distilled")
    teacher, expected = run.phases.teacher, train_gpt.read_artifact(trained("system-a").blob)[1]
    assert all(run.taught[-24:])
    assert teacher.embedding.weight.shape == (512, 32)
    assert run.model.embedding.weight.shape == (512, 16)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, expected[key]), "a teacher does not learn"


def test_a_teacher_changes_what_is_learned(trained, train_here, described):
    environment = described("distilled")
    del environment["DISTILL_FROM"]
    alone, taught = train_here(environment).model, trained("distilled").model
    assert not torch.equal(alone.embedding.weight, taught.embedding.weight)


def test_layers_recur_from_their_fraction_of_training_on(trained):
    """0.35 of 12 steps: from the fifth on, and in what the artifact gives."""
    run = trained("recurrent")
    ((line, _, _),) = run.snapshots
    assert line.startswith("phase step:5 ")
    assert "recurrence:True" in line
    assert run.model.recurs
    assert run.h.block_order == [0, 1, 1, 1, 2]


def test_a_jump_over_the_beginning_of_teaching_still_takes_the_model_of_now(settings):
    """Boundaries lie close, or the clock jumps: one step then passes two of them."""
    h = settings(self_distill=1, distill_start_frac=0.1, map_freeze="mlp.in=0.2")
    torch.manual_seed(0)
    model = train_gpt.make_model(h)
    phases = train_gpt.Phases(h, model, None, compiled=False)
    phases.enter(0.0)
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    assert "teacher:True" in phases.enter(0.25)
    assert torch.equal(phases.teacher.embedding.weight, model.embedding.weight)


# ---- Fresh processes ---------------------------------------------------------------------------


def final(text: str) -> float:
    """Return the loss of the artifact, window after window."""
    (line,) = [line for line in text.splitlines() if "roundtrip_exact" in line]
    return float(line.split("val_loss:")[1].split()[0])


@pytest.fixture(scope="module")
def evaluator(trained, corpus, tmp_path_factory):
    """evaluator(name): what one sets to evaluate a variant's artifact, and nothing of its model."""

    def settings_of(name: str) -> dict:
        path = tmp_path_factory.mktemp("artifact") / "model.ptz"
        path.write_bytes(trained(name).blob)
        return {
            "EVAL_ONLY": 1,
            "MODEL_PATH": path,
            "EVAL_SEQ_LEN": 32,
            "EVAL_STRIDE": 32,
            "DTYPE": "float32",
            "DATA_PATH": corpus.folder,
            "TOKENIZER_PATH": corpus.tokenizer,
        }

    return settings_of


def test_another_process_evaluates_an_artifact_from_its_bytes(trained, evaluator, processes):
    """Told nothing of the model, it finds the same maps and places, and the same loss."""
    run = trained("sparse-hadamard")
    out = run_well(evaluator("sparse-hadamard"))
    model = train_gpt.model_from_artifact(run.h, run.blob, processes)
    val = train_gpt.ValidationStream(run.h, train_gpt.Tokenizer(run.h.tokenizer_path, 512))
    loss = train_gpt.evaluate(model, val.tokens, run.h, processes, 32)
    assert final(out) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "other", "named"),
    [
        (
            "recurrent",
            {"RECUR_LAYERS": 0, "MAP_ADAPTER": "lora:16"},
            ["RECUR_LAYERS=0", "MAP_ADAPTER=lora:16"],
        ),
        ("mask", PUBLISHED_B, ["MAP_BASIS=mlp=gaussian", "MAP_ADAPTER=lora:4", "MLP_MULT=4.0"]),
    ],
)
def test_another_process_refuses_an_artifact_of_another_variant(evaluator, name, other, named):
    message = refusal(evaluator(name) | other)
    for word in ["has other settings", *named]:
        assert word in message


def test_two_processes_freeze_as_one(trained, described, tmp_path):
    """Each takes one of the two micro-batches of a step: sums of two, in any order."""
    own = {"OUTPUT_DIR": tmp_path, "RUN_ID": "two"}
    run_well(described("system-d") | own, launcher=TWO_PROCESSES)
    assert "frozen_maps:3" in (tmp_path / "two" / "train.log").read_text(encoding="utf-8")
    blob = (tmp_path / "two" / "model.int6.ptz").read_bytes()
    assert stored_groups(blob) == stored_groups(trained("system-d").blob)


# ---- New kinds ---------------------------------------------------------------------------------


def test_a_new_basis_or_adapter_takes_a_function_and_a_row(
    train_here, described, processes, monkeypatch
):
    """One whose numbers are stored in float16, and one whose matrix is stored as codes."""

    def circulant(out_features: int, in_features: int, seed: int) -> torch.Tensor:
        first = train_gpt.gaussian(1, max(out_features, in_features), seed)[0] * out_features**0.5
        turned = torch.stack([first.roll(i) for i in range(out_features)])
        return turned[:, :in_features]

    class Outer(train_gpt.Adapter):
        """ΔW = u vᵀ, u first 0."""

        size = ""

        def __init__(self, spec, _):
            super().__init__()
            self.u = torch.nn.Parameter(torch.zeros(spec.out_features))
            self.v = torch.nn.Parameter(torch.ones(spec.in_features) / spec.in_features**0.5)

        def factors(self):
            return self.u[:, None], self.v[None]

    class Left(train_gpt.Adapter):
        """ΔW = M W."""

        size, roles = "", {"M": train_gpt.Role.MATRIX}

        def __init__(self, spec, _):
            super().__init__()
            self.M = torch.nn.Parameter(torch.zeros(spec.out_features, spec.out_features))

        def correction(self, weight):
            return self.M.to(weight.dtype) @ weight

        def quantize(self, quantizers, hessian):
            return super().quantize(quantizers, None)  # its inputs are not the map's

    monkeypatch.setitem(train_gpt.BASES, "circulant", circulant)
    words = [*train_gpt.CELL_WORDS["basis"], "circulant"]  # an import of the script would add it
    monkeypatch.setitem(train_gpt.CELL_WORDS, "basis", words)
    monkeypatch.setitem(train_gpt.ADAPTERS, "outer", Outer)
    monkeypatch.setitem(train_gpt.ADAPTERS, "left", Left)
    asked = {
        "MAP_BASIS": "circulant,mlp=gaussian",
        "MAP_ADAPTER": "attention=outer,mlp=left+outer",
        "MAP_SCALE": "row",
    }
    environment = described("learned") | {"SWA_ENABLED": "0"}
    del environment["USE_RANDOM_ADAPTERS"]
    run = train_here(environment | asked)
    assert np.mean(run.losses()[-2:]) < run.losses()[0] - 0.05
    model = train_gpt.model_from_artifact(run.h, run.blob, processes)
    for name in ("blocks.0.attention.q.outer.u", "blocks.1.mlp.fc.left.M"):
        assert model.state_dict()[name].abs().max() > 0
        expected = run.model.state_dict()[name]
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0.2, atol=0.05)
    size = bytes_of_values(run.blob)
    assert size == train_gpt.stored_bytes(run.model)
    assert any("circulant" in line for line in run.lines)


EACH_ADAPTER = {
    "NUM_LAYERS": 2,
    "MAP_BASIS": "gaussian,attention.q=rademacher,attention.k=hadamard,mlp=shared:2",
    "MAP_ADAPTER": "combination:8+lora:2,attention.q=mask,attention.k=sparse:0.1+rslora:4,"
    "attention.v=vera:4,mlp=signs",
    "MAP_SCALE": "none,attention.q=row,attention.k=map",
    "MAP_TWIST": "none,mlp=permutation",
}

RECURRENT_LAYER = ONE_LAYER | {"RECUR_LAYERS": 0, "RECUR_TIMES": 2, "PARALLEL_FROM": 0}


@pytest.mark.parametrize(
    "variant",
    [
        VARIANTS["system-c-gated"] | ONE_LAYER,
        EACH_ADAPTER,
        VARIANTS["recurrent"] | RECURRENT_LAYER,
    ],
    ids=["freezing", "adapters", "recurrent"],
)
def test_each_phase_compiles_into_one_graph(variant, corpus):
    """`fullgraph` refuses a graph break; the graph must compute what the model does."""
    h = train_gpt.load_settings(strings(VARIANT | corpus.settings | variant))
    torch.manual_seed(0)
    model = train_gpt.make_model(h).train()
    phases = train_gpt.Phases(h, model, None, compiled=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    ids = torch.arange(2 * 33).view(2, 33) % h.vocab_size
    for boundary in phases.boundaries:
        phases.enter(boundary)
        found = []
        for forward in (compiled, model):
            torch.manual_seed(1)  # of the dropout
            loss = forward(ids[:, :-1], ids[:, 1:], phases.teacher_logits(ids[:, :-1]))
            loss.backward()
            gradients = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
            found.append([loss.item(), *gradients])
            model.zero_grad()
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
