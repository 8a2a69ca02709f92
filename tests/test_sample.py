"""tools/sample.py: its probabilities are those of the evaluation; text comes in whole pieces."""

from __future__ import annotations

import io
import os
import pty
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import ROOT, TINY, finish, run_well, start, tiny_settings, tool_refusal, train_gpt

sys.path.insert(0, str(ROOT / "tools"))

import sample


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """Return the folder of a run, made once."""
    runs = tmp_path_factory.mktemp("runs")
    place = {"OUTPUT_DIR": runs, "RUN_ID": "tiny"}
    run_well({**TINY, **corpus.settings, "ITERATIONS": 6, **place})
    return runs / "tiny"


def write(capsys, *arguments: object) -> str:
    """Return the output of a call that must succeed."""
    code = sample.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def refusal(capsys, *arguments: object) -> str:
    return tool_refusal(capsys, sample.main, *arguments)


@pytest.mark.parametrize("recurrent", [False, True])
def test_probabilities_are_those_that_the_evaluation_scores(recurrent, random_model, processes):
    """Token by token, over windows that move on, as in `evaluate`; the base of rotations grows."""
    length, stride = 32, 8
    more = {"recur_layers": "1-2", "recur_times": 3} if recurrent else {}
    h = tiny_settings(rope_stretch_from=8, **more)
    model = random_model(h).eval()
    count = length + 3 * stride  # the last window is as the others
    tokens = torch.randint(h.vocab_size, (count + 1,), generator=torch.Generator().manual_seed(1))
    expected = train_gpt.evaluate(model, tokens, h, processes, stride)
    window = sample.Window(model, length, stride)
    text, losses = tokens.tolist(), []
    for i in range(1, count + 1):
        probabilities = sample.probabilities(window.next_logits(text[:i]))
        losses.append(-probabilities[text[i]].log().item())
    assert np.mean(losses) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 0}, [0, 0, 0, 1]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"top_p": 1e-9}, [0, 0, 0, 1]),
    ],
)
def test_choices(options, expected):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log() + 5
    assert sample.probabilities(logits, **options).tolist() == pytest.approx(expected)


def test_pieces_are_whole_characters_and_together_the_text(run, corpus, monkeypatch):
    """Also where a character is spelled in byte tokens, and where a text ends within one."""
    with sample.open_writer(sample.parse([str(run)])) as writer:
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
        *pieces, rest = writer.pieces("")
        assert "".join([before, *pieces, rest]) == decode(tokens)
        assert not any(sample.UNDECODED in piece for piece in pieces)


def test_tokens_are_counted_not_pieces(run, capsys, monkeypatch):
    args = sample.parse([str(run), "--tokens", "4", "--temperature", "0"])
    with sample.open_writer(args) as writer:
        logits = iter(torch.eye(512)[writer.tokenizer.model.encode("🎉")])
        monkeypatch.setattr(writer.window, "next_logits", lambda text: next(logits))
        writer.show("party: ")
    shown = capsys.readouterr()
    assert shown.out == "party: 🎉\n" and shown.err.startswith("[4 of 4 tokens, ")


def test_text_follows_the_seed_and_the_options(run, capsys):
    def written(*options: object) -> str:
        return write(capsys, run, "The first", "--tokens", 30, *options)

    first = written("--seed", 1)
    assert first.startswith("The first")
    assert written("--seed", 1) == first != written("--seed", 2)
    assert written("--temperature", 0) == written("--top-k", 1)


def test_artifact_alone_is_read_as_it_was_scored(run, corpus, tmp_path):
    """Without log and results it knows its window and its stride; --context makes them shorter."""
    model = shutil.copy(run / "model.int6.ptz", tmp_path)
    arguments = [model, "--tokenizer", str(corpus.tokenizer)]
    for more, expected in (([], (32, 8)), (["--context", "5"], (5, 5))):
        with sample.open_writer(sample.parse([*arguments, *more])) as writer:
            assert (writer.window.length, writer.window.stride) == expected


def test_each_line_is_a_prompt_also_at_a_terminal(run, capsys):
    """One prompt does not depend on the others."""
    outer, inner = pty.openpty()
    words = {"script": ROOT / "tools" / "sample.py", "stdin": inner}
    process = start({}, arguments=[str(run), "--tokens", "5", "--seed", "3"], **words)
    os.close(inner)
    os.write(outer, "First\n\nSecond ÄÖ\n\x04".encode())
    done = finish(process)
    os.close(outer)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("First") and done.stderr.count("/s]") == 2
    assert done.stdout.endswith(write(capsys, run, "Second ÄÖ", "--tokens", 5, "--seed", 3))


def test_other_bad_input_is_refused_in_one_line(run, corpus, tmp_path, capsys, monkeypatch):
    copied = Path(shutil.copytree(run, tmp_path / "copy"))
    os.truncate(copied / "model.int6.ptz", 999)
    assert "the artifact is damaged" in refusal(capsys, copied, "prompt")
    (copied / "model.int6.ptz").unlink()
    assert "model.int6.ptz cannot be read" in refusal(capsys, copied, "prompt")
    shutil.copy(run / "model.int6.ptz", copied)
    (copied / "results.json").write_bytes(b"\xff")
    assert "name it with --tokenizer" in refusal(capsys, copied, "prompt")
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(corpus.tokenizer.read_bytes().replace(b"ing", b"gni"))
    message = refusal(capsys, run, "prompt", "--tokenizer", foreign)
    assert "not the tokenizer of the artifact" in message
    with monkeypatch.context() as patch:
        patch.setenv("MODEL_LIMIT_BYTES", "1000")
        assert "MODEL_LIMIT_BYTES=1000" in refusal(capsys, run, "prompt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert "standard input is not UTF-8" in refusal(capsys, run)
    for option in ("--tokens=0", "--temperature=nan", "--top-k=-1", "--top-p=1.1", "--context=0"):
        with pytest.raises(SystemExit) as ended:
            sample.main(["model", option])
        assert ended.value.code == 2, option
