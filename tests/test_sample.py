"""tools/sample.py: its probabilities are those of the evaluation; text comes in whole pieces."""

from __future__ import annotations

import io
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import ROOT, TINY, environment, run_well, tiny_settings, tool_refusal, train_gpt

sys.path.insert(0, str(ROOT / "tools"))

import sample

TOOL = ROOT / "tools" / "sample.py"


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """Return the folder of a run, made once."""
    runs = tmp_path_factory.mktemp("runs")
    place = {"OUTPUT_DIR": runs, "RUN_ID": "tiny"}
    run_well({**TINY, **corpus.settings, "ITERATIONS": 6, **place})
    return runs / "tiny"


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """Return a copy of the run to damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def writer(run):
    """Return a writer with the run's model."""
    with sample.open_writer(sample.parse([str(run)])) as writer:
        yield writer


def write(capsys, *arguments: object) -> tuple[str, str]:
    """Return the output and the messages of a call that must succeed."""
    code = sample.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out, shown.err


def refusal(capsys, *arguments: object) -> str:
    return tool_refusal(capsys, sample.main, *arguments)


# ---- Probabilities -------------------------------------------------------------------------------


VARIANTS = {
    "plain": {},
    "longer than the window of training": {"rope_stretch_from": 8},
    "recurrent": {"recur_layers": "1-2", "recur_times": 3},
    "parallel and gated": {"parallel_from": 1, "mlp_gated": 1, "skip_gates_enabled": 1},
    "ensemble": {"ensemble": 2},
    "without a look back": {"bigram_vocab_size": 0, "smear_enabled": 0, "ve_enabled": 0},
    "shared, masked and scaled": {
        "map_basis": "mlp=shared:2,attention=gaussian",
        "map_adapter": "mlp=none,attention=mask",
        "map_scale": "row",
    },
}


def random_model(h: train_gpt.Hyperparameters) -> train_gpt.LanguageModel:
    """Return a model none of whose learned values is at its initial value."""
    model = train_gpt.make_model(h)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = 0.4 * torch.randn(p.shape, generator=generator)
            p.copy_(noise + 0.5 * (p.ndim == 1))
    return model.eval()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_probabilities_are_those_that_the_evaluation_scores(changes, processes):
    """Token by token, each read once, over windows that move on, as in `evaluate`."""
    length, stride = 32, 8
    h = tiny_settings(**changes)
    model = random_model(h)
    count = length + 3 * stride  # the last window is as the others
    tokens = torch.randint(h.vocab_size, (count + 1,), generator=torch.Generator().manual_seed(1))
    expected = train_gpt.evaluate(model, tokens, h, processes, stride)
    starts, counts = train_gpt.plan_windows(count, length, stride)
    with torch.no_grad():
        rows = torch.stack([tokens[start : start + length + 1] for start in starts.tolist()])
        losses = model.token_losses(rows[:, :-1], rows[:, 1:])
    scored = torch.cat([row[-n:] for row, n in zip(losses, counts.tolist(), strict=True)])
    sample.fold_adapters(model, torch.float32)
    window = sample.Window(model, length, stride)
    text = tokens.tolist()
    sampling = sample.Sampling()
    ours = []
    for i in range(1, count + 1):
        probabilities = sampling.probabilities(window.next_logits(text[:i]))
        assert probabilities.sum().item() == pytest.approx(1)
        ours.append(-probabilities[text[i]].log().item())
    np.testing.assert_allclose(ours, scored.tolist(), atol=2e-4, rtol=1e-4)
    assert np.mean(ours) == pytest.approx(expected, abs=2e-5)


def test_folded_maps_compute_the_same_bits(processes):
    h = tiny_settings(map_adapter="lora:4", map_scale="row", map_gate="mlp.fc=1")
    model = random_model(h)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        before = model.predict(ids)
        sample.fold_adapters(model, torch.float32)
        assert torch.equal(model.predict(ids), before)


def test_each_token_is_read_once(monkeypatch):
    """Beside its own position only the two before it are embedded, for smear and bigrams."""
    h = tiny_settings()
    model = random_model(h)
    read = []
    embed = model.embedding.forward
    monkeypatch.setattr(
        model.embedding, "forward", lambda ids: read.append(ids.size(1)) or embed(ids)
    )
    window = sample.Window(model, 16, 4)
    text = list(range(3))
    for token in range(20):
        window.next_logits(text)
        text.append(token)
    assert read[:14] == [3, *[3] * 13]  # until the window is full
    assert read[14:18] == [13, 3, 3, 3]  # then it moves on by 4


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (sample.Sampling(), [0.1, 0.2, 0.3, 0.4]),
        (sample.Sampling(temperature=0), [0, 0, 0, 1]),
        (sample.Sampling(temperature=0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        (sample.Sampling(top_k=2), [0, 0, 3 / 7, 4 / 7]),
        (sample.Sampling(top_k=9), [0.1, 0.2, 0.3, 0.4]),
        (sample.Sampling(top_p=0.69), [0, 0, 3 / 7, 4 / 7]),
        (sample.Sampling(top_p=0.71), [0, 2 / 9, 3 / 9, 4 / 9]),
        (sample.Sampling(top_p=1e-9), [0, 0, 0, 1]),
        (sample.Sampling(top_k=3, top_p=0.5), [0, 0, 3 / 7, 4 / 7]),
    ],
)
def test_choices(sampling, expected):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log() + 5
    assert sampling.probabilities(logits).tolist() == pytest.approx(expected)


# ---- Text ----------------------------------------------------------------------------------------


def test_pieces_are_whole_characters_and_together_the_text(writer, corpus, monkeypatch):
    """Also where a character is spelled in byte tokens, and where a text ends within one."""
    decode = writer.tokenizer.model.decode
    texts = [writer.tokenizer.model.encode(document) for document in corpus.documents]
    cases = [(text, cut) for text in texts for cut in range(len(text))]
    for tokens, cut in cases:
        before = decode(tokens[:cut])
        if before.endswith(sample.UNDECODED):
            continue  # no prompt ends within a character
        given, written = tokens[:cut], tokens[cut:]
        monkeypatch.setattr(writer, "encode", lambda prompt, given=given: list(given))
        monkeypatch.setattr(writer, "tokens", lambda *_, written=written: iter(written))
        *pieces, rest = writer.pieces("", 10)
        assert "".join([before, *pieces, rest]) == decode(tokens)
        assert not any(sample.UNDECODED in piece for piece in pieces)


def test_document_ends_with_a_control_token(writer, monkeypatch):
    logits = torch.zeros(writer.window.model.embedding.weight.size(0))
    logits[writer.tokenizer.model.bos_id()] = 100
    monkeypatch.setattr(writer.window, "next_logits", lambda text: logits)
    assert list(writer.tokens([5], 10)) == []


def test_text_follows_the_seed_and_the_options(run, capsys):
    first, message = write(capsys, run, "The first", "--tokens", 30, "--seed", 1)
    assert first.startswith("The first") and "tokens/s]" in message
    assert write(capsys, run, "The first", "--tokens", 30, "--seed", 1)[0] == first
    assert write(capsys, run, "The first", "--tokens", 30, "--seed", 2)[0] != first
    likeliest = write(capsys, run, "The first", "--tokens", 30, "--temperature", 0)[0]
    assert write(capsys, run, "The first", "--tokens", 30, "--top-k", 1)[0] == likeliest
    assert write(capsys, run / "model.int6.ptz", "The", "--tokens", 2, "--context", 3)[0]


def test_prompts_of_a_file_do_not_depend_on_each_other(run, tmp_path, capsys):
    file = tmp_path / "prompts"
    file.write_text("One\n\nTwo ÄÖ\n", encoding="utf-8")
    both, _ = write(capsys, run, "--prompts", file, "--tokens", 20, "--seed", 3)
    alone, _ = write(capsys, run, "Two ÄÖ", "--tokens", 20, "--seed", 3)
    assert both.split("\n---\n\n")[1] == alone
    assert both.startswith("One")


def test_prompt_from_the_standard_input_and_a_reader_that_leaves(run):
    command = [sys.executable, str(TOOL), str(run), "--tokens", "2000", "--top-k", "5"]
    process = subprocess.Popen(
        command,
        env=environment({}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"A prompt\n")
    process.stdin.close()
    assert process.stdout.read(8) == b"A prompt"
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(100) == 0


def test_terminal_asks_for_prompts(run):
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(TOOL), str(run), "--tokens", "5"],
        env=environment({}),
        stdin=inner,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(inner)
    os.write(outer, b"First prompt\nSecond prompt\n\x04")
    out, err = process.communicate(timeout=100)
    os.close(outer)
    assert process.returncode == 0, err
    assert "First prompt" in out and "Second prompt" in out
    assert err.count("tokens/s]") == 2


def test_tokenizer_is_that_of_the_manifest_wherever_the_log_says(copied, capsys):
    log = copied / "train.log"
    text = log.read_text(encoding="utf-8")
    before, mark, after = text.partition("\nTOKENIZER_PATH=")
    rest = after.partition("\n")[2]
    log.write_text(f"{before}{mark}nowhere.model\n{rest}", encoding="utf-8")
    assert write(capsys, copied, "A", "--tokens", 1)[0].startswith("A")


# ---- Bad input -----------------------------------------------------------------------------------


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: tear(run / "model.int6.ptz"), "the artifact is damaged"),
        (lambda run: (run / "model.int6.ptz").write_bytes(b"text"), "not an artifact"),
        (lambda run: (run / "model.int6.ptz").unlink(), "the run is still going"),
        (lambda run: (run / "train.log").unlink(), "name it with --tokenizer"),
        (lambda run: (run / "train.log").write_bytes(b"\xff" * 99), "name it with --tokenizer"),
    ],
)
def test_damaged_run_is_refused_in_one_line(copied, capsys, damage, message):
    damage(copied)
    assert message in refusal(capsys, copied, "prompt")


def test_other_bad_input_is_refused_in_one_line(run, corpus, tmp_path, capsys, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "not a run's folder" in refusal(capsys, empty, "prompt")
    assert "No such file" in refusal(capsys, tmp_path / "nowhere", "prompt")
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(corpus.tokenizer.read_bytes() + b"\0")
    message = refusal(capsys, run, "prompt", "--tokenizer", foreign)
    assert "not the tokenizer of the artifact" in message or "cannot be used" in message
    assert "cannot be" in refusal(capsys, run, "prompt", "--tokenizer", run / "results.json")
    binary = tmp_path / "binary"
    for content, problem in (
        (b"\xff\xfe", "not UTF-8"),
        (b"a\0b", "not text"),
        (b"\n", "no prompt"),
    ):
        binary.write_bytes(content)
        assert problem in refusal(capsys, run, "--prompts", binary)
    assert "cannot be read" in refusal(capsys, run, "--prompts", tmp_path / "nowhere")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert "standard input is not UTF-8" in refusal(capsys, run)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model", "--tokens", "0"],
        ["model", "--temperature", "-1"],
        ["model", "--temperature", "nan"],
        ["model", "--top-k", "-1"],
        ["model", "--top-p", "0"],
        ["model", "--top-p", "1.1"],
        ["model", "--context", "0"],
        ["model", "prompt", "--prompts", "file"],
    ],
)
def test_unusable_arguments(arguments):
    with pytest.raises(SystemExit) as ended:
        sample.main(arguments)
    assert ended.value.code == 2
