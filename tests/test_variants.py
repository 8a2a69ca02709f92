"""Every kind of model that the map table can describe: trained, exported, read, told from the others."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import socket
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch

import train_gpt
from helpers import Corpus, finish, make_corpus, refusal, run_well, start

TINY = {
    "NUM_LAYERS": 3,
    "MODEL_DIM": 32,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "ROPE_DIMS": 8,
    "VE_LAYERS": 1,
    "VE_DIM": 8,
    "BIGRAM_VOCAB_SIZE": 64,
    "BIGRAM_DIM": 8,
    "TRAIN_SEQ_LEN": 32,
    "EVAL_SEQ_LEN": 32,
    "EVAL_STRIDE": 32,
    "TRAIN_BATCH_TOKENS": 256,
    "MICRO_BATCH_TOKENS": 128,
    "ITERATIONS": 12,
    "WARMUP_STEPS": 1,
    "WARMDOWN_ITERS": 6,
    "GPTQ_CALIB_BATCHES": 1,
    "MAX_WALLCLOCK_SECONDS": 0,
    "DTYPE": "float32",
    "COMPILE": 0,
    "TRAIN_LOG_EVERY": 1,
    "VAL_LOSS_EVERY": 0,
    "HOLDOUT_TOKENS": 512,
    "SWA_INTERVAL": 1,
    "SCALAR_LR": 0.1,
    "LATE_QAT_THRESHOLD": 0.4,
}
PUBLISHED_B = {
    "RANDOM_BASIS_ENABLED": 1,
    "LORA_RANK": 4,
    "MLP_MULT": 4,
    "SKIP_GATES_ENABLED": 1,
    "WARMDOWN_FRAC": 0.667,
}
VARIANTS = {
    "system-a": {"USE_RANDOM_ADAPTERS": 1, "RANDOM_ADAPTER_RANK": 4},
    "system-b": PUBLISHED_B,
    "system-c": {"SELECTIVE_FREEZE": 1, "MLP_GATED": 0, "DROPOUT": 0.2},
    "system-c-gated": {"SELECTIVE_FREEZE": 1, "MLP_GATED": 1, "DROPOUT": 0.2},
    "system-d": {"PROGRESSIVE_FREEZE_FRAC": 0.3, "GPTQ_CALIB_BATCHES": 2},
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
    "sparse-hadamard": {
        "MAP_BASIS": "hadamard",
        "MAP_ADAPTER": "sparse:0.1+lora:4",
        "MAP_SCALE": "map",
    },
    "mask": {"MAP_BASIS": "rademacher", "MAP_ADAPTER": "mask", "MAP_SCALE": "row"},
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


@dataclasses.dataclass
class Run:
    """One training and what was seen of it."""

    h: train_gpt.Hyperparameters
    model: train_gpt.LanguageModel = None  # as it stands after the export
    blob: bytes = b""
    exported: dict = dataclasses.field(
        default_factory=dict
    )  # what the export handed to the artifact
    lines: list[str] = dataclasses.field(default_factory=list)
    scales: list[float] = dataclasses.field(
        default_factory=list
    )  # of learning rates, warm-up included
    taught: list[bool] = dataclasses.field(
        default_factory=list
    )  # whether a teacher spoke, of each batch
    stages: train_gpt.Stages = None
    snapshots: list[tuple[str, dict, dict]] = dataclasses.field(default_factory=list)

    def __call__(self, text: str, console: bool = True) -> None:
        """Stands for the log. What a stage finds when it begins is kept with its line."""
        self.lines += [text] if console else []
        if text.startswith("stage "):
            teacher = self.stages.teacher
            self.snapshots.append((text, copied(self.model), copied(teacher) if teacher else {}))

    def losses(self) -> list[float]:
        found = [
            line.split("train_loss:")[1].split()[0] for line in self.lines if " train_loss:" in line
        ]
        return [float(text) for text in found]


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def described(corpus, tmp_path_factory, trained_blob):
    """described(name): the environment of a variant; a teacher's name becomes the path of its artifact."""

    def environment_of(name: str) -> dict[str, str]:
        variant = dict(VARIANTS[name])
        if "DISTILL_FROM" in variant:
            variant["DISTILL_FROM"] = trained_blob(variant["DISTILL_FROM"])
        return {key: str(value) for key, value in (TINY | corpus.settings | variant).items()}

    return environment_of


@pytest.fixture(scope="module")
def train_here(corpus, processes, tmp_path_factory):
    """train_here(environment): a run in this process, by the script's own functions."""

    def train(environment: dict[str, str]) -> Run:
        h = train_gpt.Hyperparameters(environment=environment)
        tokenizer = train_gpt.Tokenizer(h.tokenizer_path, h.vocab_size)
        run, folder = Run(h), tmp_path_factory.mktemp("run")
        make_model, write_artifact = train_gpt.make_model, train_gpt.write_artifact
        step, teach = train_gpt.Optimizers.step, train_gpt.Stages.teach

        def make_and_keep(h, dtype=torch.float32):
            made = make_model(h, dtype)
            run.model = made if h is run.h else run.model  # the other is the teacher
            return made

        def write_and_keep(header, tensors, quality):
            run.exported = tensors
            return write_artifact(header, tensors, 4)

        def step_and_keep(self, number, scale):
            run.scales.append(scale)
            return step(self, number, scale)

        def teach_and_keep(self, ids):
            run.stages = self
            logits = teach(self, ids)
            run.taught.append(logits is not None)
            return logits

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt, "make_model", make_and_keep)
            patch.setattr(train_gpt, "write_artifact", write_and_keep)
            patch.setattr(train_gpt.Optimizers, "step", step_and_keep)
            patch.setattr(train_gpt.Stages, "teach", teach_and_keep)
            val = train_gpt.ValidationStream(h, tokenizer)
            val.tokens = val.tokens[:1025]  # is only looked at
            world = copy.copy(processes)
            world.log, world.h = run, h
            run.blob, _ = train_gpt.train_and_export(h, world, tokenizer, val, folder, None)
        return run

    return train


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {}


@pytest.fixture(scope="module")
def trained_blob(runs, train_here, corpus, tmp_path_factory):
    """trained_blob(name): path of a variant's artifact, for variants without a teacher."""

    def path_of(name: str) -> Path:
        if name not in runs:
            environment = TINY | corpus.settings | VARIANTS[name]
            runs[name] = train_here({key: str(value) for key, value in environment.items()})
        path = tmp_path_factory.mktemp(name) / "model.int6.ptz"
        path.write_bytes(runs[name].blob)
        return path

    return path_of


@pytest.fixture(scope="module")
def trained(runs, train_here, described):
    """trained(name): a variant's run, made once."""

    def run_of(name: str) -> Run:
        if name not in runs:
            runs[name] = train_here(described(name))
        return runs[name]

    return run_of


def unpacked_groups(blob: bytes) -> dict[str, bytes]:
    """The artifact's groups, by the format's description alone."""
    size = int.from_bytes(blob[12:16], "little")
    header, place, groups = json.loads(brotli.decompress(blob[16 : 16 + size])), 16 + size, {}
    for name, packed in header["groups"]:
        groups[name] = brotli.decompress(blob[place : place + packed])
        place += packed
    assert place + 32 == len(blob)
    return groups


def bytes_of_row(row: train_gpt.MapRow) -> int:
    """What a map costs, by its row of the table: codes and exponents of a byte, floats of two, masks of a
    bit."""
    rows, columns = row.out_features, row.in_features
    total = rows * columns + rows if row.basis == "learned" else 0
    for part in row.adapter.split("+"):
        name, _, size = part.partition(":")
        total += {
            "none": lambda _: 0,
            "lora": lambda rank: rows * rank + rows + rank * columns + rank,
            "rslora": lambda rank: rows * rank + rows + rank * columns + rank,
            "vera": lambda rank: 2 * (rows + rank),
            "sparse": lambda density: rows * max(1, round(density * columns)) + rows,
            "mask": lambda _: math.ceil(rows * columns / 8),
        }[name](float(size or 0))
    total += {"none": 0, "map": 2, "row": 2 * rows}[row.scale]
    return int(total) + (0 if row.gate is None else 2 * rows)


def bytes_around(model: train_gpt.LanguageModel) -> int:
    """Of what is in no row: embeddings with the maps behind them are codes, the rest is float16."""
    total = 0
    for name, p in model.named_parameters():
        if any(name.startswith(row + ".") for row in model.table):
            continue
        coded = name.endswith(
            (
                "embedding.weight",
                "bigram.0.weight",
                "bigram.1.weight",
                "embedding.0.weight",
                "embedding.1.weight",
            )
        )
        total += p.numel() + len(p) if coded else 2 * p.numel()
    return total


# ---- What all variants do ----------------------------------------------------------------------------------


@each_variant
def test_a_variant_learns(trained, name):
    losses = trained(name).losses()
    assert len(losses) == 12
    if (
        "self-distilled" in name or name == "distilled"
    ):  # the loss is another while a teacher speaks
        assert trained(name).taught.count(True) > 0
        taught = trained(name).taught[-24::2]  # two micro-batches a step
        losses = [loss for loss, by_teacher in zip(losses, taught) if by_teacher == taught[-1]]
    assert np.mean(losses[-2:]) < losses[0] - 0.05


@each_variant
def test_an_artifact_is_the_exported_model_to_the_bit(trained, processes, name):
    """The model that was trained, given the values that the export chose, and one built from bytes alone."""
    run = trained(name)
    header, tensors = train_gpt.read_artifact(run.blob)
    values = {
        key: value.values() if isinstance(value, train_gpt.Codes) else value
        for key, value in run.exported.items()
    }
    values = {
        key: value if value.dtype is torch.bool else value.float() for key, value in values.items()
    }
    for key, value in values.items():
        two_bytes = not isinstance(run.exported[key], train_gpt.Codes)
        values[key] = value.half().float() if two_bytes else value
    assert tensors.keys() == values.keys() == run.model.state_dict().keys()
    ours = run.model.eval()
    before = copied(ours)
    ours.load_state_dict(values)
    theirs = train_gpt.build_model(header, tensors, processes)
    ids = torch.randint(512, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = ours.predict(ids, 32), theirs.predict(ids, 32)
    ours.load_state_dict(before)
    assert torch.equal(logits, expected)
    assert expected.std() > 0.01
    assert ours.fingerprint() == theirs.fingerprint() == header["fingerprint"]


@each_variant
def test_an_artifact_holds_the_bytes_that_the_table_says(trained, name):
    run = trained(name)
    size = sum(map(len, unpacked_groups(run.blob).values()))
    assert size == sum(map(bytes_of_row, run.h.maps)) + bytes_around(run.model)
    assert size == train_gpt.stored_bytes(run.model)
    assert any(f"takes {size:,} unpacked" in line for line in run.lines)
    table = next(text for text in run.lines if text.startswith("map ")).splitlines()[1:]
    assert sum(int(line.split()[-1].replace(",", "")) for line in table) == sum(
        map(bytes_of_row, run.h.maps)
    )


@each_variant
def test_an_artifact_refuses_another_variants_settings(trained, described, name):
    """And takes its own, which say nothing new. A variant that asks for nothing different is no other."""
    stored, refused = train_gpt.read_artifact(trained(name).blob)[0]["model"], []
    for other in VARIANTS:
        if other == "distilled" or name == "distilled" != other:
            continue
        asked = train_gpt.Hyperparameters(environment=described(other))
        mine = {key: value for key, value in asked.model_settings().items() if key in asked.given}
        if all(stored[key] == value for key, value in mine.items()):
            asked.adopt(stored, "the artifact")
            continue
        with pytest.raises(train_gpt.UserError, match="of another model"):
            asked.adopt(stored, "the artifact")
        refused.append(other)
    adopted = train_gpt.Hyperparameters(environment=described(name)).adopt(stored, "the artifact")
    assert adopted.model_settings() == stored
    assert name not in refused
    assert len(refused) >= len(VARIANTS) - 5 or name == "distilled"


# ---- What each promises ------------------------------------------------------------------------------------


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
    rows = [row for row in trained(name).h.maps if row.basis != "learned"]
    assert {row.name.partition(".")[2].partition(".")[2] for row in rows} == random
    assert {row.adapter for row in rows} <= {adapter}
    for column, values in more.items():
        assert {getattr(row, column) for row in rows} == values


def test_random_projections_are_those_of_the_named_layers(trained):
    random = [row.name for row in trained("random-projections").h.maps if row.basis != "learned"]
    assert random == ["blocks.0.mlp.fc", "blocks.1.mlp.fc"]


def test_members_of_an_ensemble_are_what_their_selector_says(trained):
    rows = trained("ensemble").h.maps
    assert {row.basis for row in rows if row.name.startswith("members.0.")} == {"learned"}
    assert {row.basis for row in rows if row.name.startswith("members.1.")} == {"orthogonal"}
    assert len(rows) == 36


def test_what_is_random_is_not_in_the_artifact(trained):
    for name in VARIANTS:
        _, tensors = train_gpt.read_artifact(trained(name).blob)
        for row in trained(name).h.maps:
            assert (f"{row.name}.weight" in tensors) == (row.basis == "learned"), (name, row.name)


def test_the_random_maps_come_out_of_training_as_they_were_drawn(trained):
    for name in ("system-b", "mask", "sparse-hadamard", "vera"):
        model = trained(name).model
        for row in model.frozen:
            assert torch.equal(model.get_submodule(row.name).weight, train_gpt.draw_map(row)), (
                name,
                row,
            )


@pytest.mark.parametrize(("name", "share"), [("system-d", 0.3), ("self-distilled-freezing", 0.5)])
def test_maps_that_freeze_stand_still_and_are_stored(trained, name, share):
    """Averages, late QAT, weight decay and the optimisers' momenta must all leave them alone."""
    run = trained(name)
    ((line, then, _),) = [
        found
        for found in run.snapshots
        if "frozen_maps:3" in found[0] and f"step:{math.ceil(12 * share)} " in found[0]
    ]
    now, frozen = run.model.state_dict(), [f"blocks.{layer}.mlp.fc.weight" for layer in range(3)]
    for key, value in then.items():
        assert torch.equal(value, now[key]) == (key in frozen), (line, key)
    _, tensors = train_gpt.read_artifact(run.blob)
    for key in frozen:
        error = (tensors[key] - now[key]).norm() / now[key].norm()
        assert error < 0.25, "stored as they stand, up to quantisation"


def test_published_sizes_leave_frozen_maps_out_and_these_count_them(trained):
    run = trained("system-d")
    frozen = [row for row in run.h.maps if row.freeze]
    assert [row.name for row in frozen] == [f"blocks.{layer}.mlp.fc" for layer in range(3)]
    without = train_gpt.stored_bytes(run.model) - sum(96 * 32 + 96 for _ in frozen)
    groups = unpacked_groups(run.blob)
    assert sum(map(len, groups.values())) == without + 3 * (96 * 32 + 96)
    table = next(text for text in run.lines if text.startswith("map ")).splitlines()
    for line in [line.split() for line in table if ".mlp.fc " in line]:
        assert line[-1] == f"{96 * 32 + 96:,}"
        assert line[table[0].split().index("freeze")] == "0.3"


@pytest.mark.parametrize("name", ["system-d", "self-distilled-freezing", "recurrent", "learned"])
def test_stages_do_not_restart_the_learning_rates(trained, name):
    expected = [min(1.0, (12 - step) / 6) for step in range(12)]
    assert trained(name).scales[-12:] == pytest.approx(expected, abs=1e-12)


def test_a_share_of_training_to_warm_down_in(trained):
    """It is the share itself that counts, not a whole number of steps."""
    expected = [min(1.0, (1 - step / 12) / 0.667) for step in range(12)]
    assert trained("system-b").scales[-12:] == pytest.approx(expected, abs=1e-12)


def test_a_model_teaches_itself_as_it_was_when_its_teaching_began(trained):
    run = trained("self-distilled")
    (first, then, teacher), (last, _, still) = run.snapshots
    assert first.startswith("stage step:3 ")
    assert last.startswith("stage step:9 ")
    assert ("teacher:True" in first, "teacher:False" in last) == (True, True)
    for key, value in then.items():
        assert torch.equal(teacher[key], value)
        assert torch.equal(still[key], value)
    assert not torch.equal(run.model.state_dict()["embedding.weight"], then["embedding.weight"])
    batches = run.taught[-24:]  # two micro-batches a step
    assert batches == [3 <= step < 9 for step in range(12) for _ in range(2)]


def test_a_model_teaches_itself_while_maps_freeze(trained):
    """The freeze at 0.5 comes after the teaching began at 0.4, and must not take another teacher."""
    run = trained("self-distilled-freezing")
    (first, then, teacher), (_, _, still) = run.snapshots[:2]
    assert [line.split(" share")[0] for line, *_ in run.snapshots[:2]] == [
        "stage step:5",
        "stage step:6",
    ]
    for key, value in then.items():
        assert torch.equal(teacher[key], value)
        assert torch.equal(still[key], value)
    assert run.taught[-24:] == [step >= 5 for step in range(12) for _ in range(2)]


def test_a_teacher_may_be_of_another_width(trained, processes):
    run = trained("distilled")
    teacher, expected = run.stages.teacher, train_gpt.read_artifact(trained("system-a").blob)[1]
    assert all(run.taught[-24:])
    assert teacher.embedding.weight.shape == (512, 32)
    assert run.model.embedding.weight.shape == (512, 16)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, expected[key]), "a teacher does not learn"


def test_a_teacher_changes_what_is_learned(trained, train_here, described):
    environment = {
        key: value for key, value in described("distilled").items() if key != "DISTILL_FROM"
    }
    alone, taught = train_here(environment).model, trained("distilled").model
    assert not torch.equal(alone.embedding.weight, taught.embedding.weight)


def test_layers_recur_from_their_share_of_training_on(trained):
    """0.35 of 12 steps: from the fifth on, and in what the artifact gives."""
    run = trained("recurrent")
    ((line, _, _),) = run.snapshots
    assert line.startswith("stage step:5 ")
    assert "recurrence:True" in line
    assert run.model.recurs
    assert run.model.recurrent_order == [0, 1, 1, 1, 2]


def test_a_jump_over_the_beginning_of_teaching_still_takes_the_model_of_now(settings):
    """Marks lie close, or the clock jumps when its pace is known: one step then passes two of them."""
    h = settings(self_distill=1, distill_start_frac=0.1, map_freeze="mlp.in=0.2")
    torch.manual_seed(0)
    model = train_gpt.make_model(h)
    stages = train_gpt.Stages(h, model, None)
    stages.enter(0.0)
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    assert "teacher:True" in stages.enter(0.25)
    assert torch.equal(stages.teacher.embedding.weight, model.embedding.weight)


# ---- Fresh processes ---------------------------------------------------------------------------------------


def final(text: str) -> float:
    """Loss of the artifact, window after window."""
    (line,) = [line for line in text.splitlines() if "roundtrip_exact" in line]
    return float(line.split("val_loss:")[1].split()[0])


@pytest.fixture(scope="module")
def evaluator(trained, corpus, tmp_path_factory):
    """evaluator(name): what one sets to evaluate a variant's artifact; nothing of it is about the model."""

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


def test_a_fresh_process_evaluates_an_artifact_from_its_bytes(trained, evaluator, processes):
    """Told nothing of the model, it finds the same maps and places, and the same loss."""
    run = trained("sparse-hadamard")
    out = run_well(evaluator("sparse-hadamard"))
    model = train_gpt.build_model(*train_gpt.read_artifact(run.blob), processes)
    val = train_gpt.ValidationStream(run.h, train_gpt.Tokenizer(run.h.tokenizer_path, 512))
    loss, _ = train_gpt.evaluate(model, val, run.h, processes, 32)
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
def test_a_fresh_process_refuses_an_artifact_of_another_variant(evaluator, name, other, named):
    message = refusal(evaluator(name) | other)
    for word in ["is of another model", *named]:
        assert word in message


def test_two_processes_freeze_as_one(trained, described, tmp_path):
    """Each takes one of the two micro-batches that one process takes in turn: sums of two in any order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = described("system-d") | {
        "OUTPUT_DIR": tmp_path,
        "RUN_ID": "two",
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    both = [start(given | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)]
    for result in [finish(process) for process in both]:
        assert result.returncode == 0, result.stdout + result.stderr
    assert "frozen_maps:3" in (tmp_path / "two" / "train.log").read_text(encoding="utf-8")
    blob = (tmp_path / "two" / "model.int6.ptz").read_bytes()
    ours, theirs = unpacked_groups(blob), unpacked_groups(trained("system-d").blob)
    assert ours == theirs


# ---- New kinds ---------------------------------------------------------------------------------------------


def test_a_new_basis_or_adapter_takes_a_function_and_a_row(
    train_here, described, processes, monkeypatch
):
    """One without codes, whose numbers are stored in float16, and one whose matrix is quantised."""

    def circulant(out_features: int, in_features: int, seed: int) -> torch.Tensor:
        first = train_gpt.gaussian(1, max(out_features, in_features), seed)[0] * out_features**0.5
        turned = torch.stack([first.roll(i) for i in range(out_features)])
        return turned[:, :in_features]

    class Outer(train_gpt.Owner):
        """ΔW = u vᵀ, u first 0."""

        size = ""

        def __init__(self, row, _):
            super().__init__()
            self.u = torch.nn.Parameter(torch.zeros(row.out_features))
            self.v = torch.nn.Parameter(torch.ones(row.in_features) / row.in_features**0.5)

        def factors(self):
            return self.u[:, None], self.v[None]

    class Left(train_gpt.Owner):
        """ΔW = M W."""

        size, roles = "", {"M": train_gpt.MATRIX}

        def __init__(self, row, _):
            super().__init__()
            self.M = torch.nn.Parameter(torch.zeros(row.out_features, row.out_features))

        def correction(self, weight):
            return self.M.to(weight.dtype) @ weight

        def quantize(self, quantizers, hessian):
            return super().quantize(quantizers, None)  # its inputs are not the map's

    monkeypatch.setitem(train_gpt.BASES, "circulant", circulant)
    monkeypatch.setitem(train_gpt.ADAPTERS, "outer", Outer)
    monkeypatch.setitem(train_gpt.ADAPTERS, "left", Left)
    asked = {
        "MAP_BASIS": "circulant,mlp=gaussian",
        "MAP_ADAPTER": "attention=outer,mlp=left+outer",
        "MAP_SCALE": "row",
    }
    said = VARIANTS["learned"]
    environment = {key: value for key, value in described("learned").items() if key not in said}
    run = train_here(environment | asked)
    assert np.mean(run.losses()[-2:]) < run.losses()[0] - 0.05
    header, tensors = train_gpt.read_artifact(run.blob)
    model = train_gpt.build_model(header, tensors, processes)
    for name in ("blocks.0.attention.q.outer.u", "blocks.1.mlp.fc.left.M"):
        assert model.state_dict()[name].abs().max() > 0
        expected = run.model.state_dict()[name]
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0.2, atol=0.05)
    size = sum(map(len, unpacked_groups(run.blob).values()))
    assert size == train_gpt.stored_bytes(run.model)
    assert any("circulant" in line for line in run.lines)


@pytest.mark.parametrize("name", ["system-c-gated", "sparse-hadamard", "mask", "recurrent"])
def test_each_stage_compiles_into_one_graph(name, described):
    """`fullgraph` refuses a graph break; the graph must compute what the model does, at every stage."""
    h = train_gpt.Hyperparameters(environment=described(name))
    torch.manual_seed(0)
    model = train_gpt.make_model(h).train()
    stages = train_gpt.Stages(h, model, None)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    ids = torch.arange(2 * 33).view(2, 33) % h.vocab_size
    for mark in stages.marks:
        stages.enter(mark)
        found = []
        for forward in (compiled, model):
            torch.manual_seed(1)  # of the dropout
            loss = forward(ids[:, :-1], ids[:, 1:], stages.teach(ids[:, :-1]))
            loss.backward()
            gradients = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
            found.append([loss.item(), *gradients])
            model.zero_grad()
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
