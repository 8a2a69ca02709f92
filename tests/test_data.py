"""Tests of shards, the order of training, the bytes of text, and how an evaluation scores it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from helpers import TINY, UNUSUAL_DOCUMENTS, read_shard, tiny_settings, write_shard

UserError = train_gpt.UserError
BOS = 1


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return train_gpt.Tokenizer(str(corpus.tokenizer), corpus.settings["VOCAB_SIZE"])


def corpus_settings(corpus, **changes):
    """Return the tiny settings with those of the corpus, and changes."""
    named = {name.lower(): value for name, value in corpus.settings.items()}
    return tiny_settings(**named, **changes)


# ---- Shards ------------------------------------------------------------------------------------


def test_header_is_skipped_to_the_byte(tmp_path):
    """Published readers skip 12 of its 1,024 bytes and train on the rest of it."""
    first, second = np.arange(500, 600), np.arange(7)
    write_shard(tmp_path / "fineweb_train_000000.bin", first)
    write_shard(tmp_path / "fineweb_train_000001.bin", second)
    write_shard(tmp_path / "fineweb_val_000000.bin", [65_535, 3])

    for split, expected in (("train", [first, second]), ("val", [[65_535, 3]])):
        found = train_gpt.read_shards(str(tmp_path), split)
        assert [tokens.tolist() for tokens in found] == [list(tokens) for tokens in expected]


SPOILED = {
    "wrong magic": lambda whole: b"\0" + whole[1:],
    "wrong version": lambda whole: whole[:4] + b"\2" + whole[5:],
    "a token short": lambda whole: whole[:-2],
    "a token too long": lambda whole: whole + b"\0\0",
    "no tokens": lambda whole: whole[:8] + bytes(1016),
    "part of the header": lambda whole: whole[:10],
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_damaged_shard_is_refused_by_name(tmp_path, spoil):
    write_shard(tmp_path / "fineweb_train_000000.bin", range(50))
    damaged = write_shard(tmp_path / "fineweb_train_000001.bin", range(50))
    damaged.write_bytes(spoil(damaged.read_bytes()))
    with pytest.raises(UserError, match=f"^{damaged}: incomplete or no shard"):
        train_gpt.read_shards(str(tmp_path), "train")


# ---- Training data -----------------------------------------------------------------------------

LENGTH = TINY["TRAIN_SEQ_LEN"]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Three shards of uneven lengths; every token is another number, which tells its place."""
    folder, first = tmp_path_factory.mktemp("numbered"), 0
    for number, size in enumerate((LENGTH * 70 + 5, LENGTH * 40, LENGTH * 61 + 1)):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", np.arange(first, first + size))
        first += size
    return folder


def training_data(numbered, **given):
    return train_gpt.TrainingData(tiny_settings(data_path=numbered, vocab_size=65_536, **given))


def test_every_sequence_that_is_not_held_out_is_seen_once_an_epoch(numbered):
    data = training_data(numbered, holdout_tokens=3 * LENGTH)
    # A sequence needs LENGTH + 1 tokens of one shard: 70, 39 and 61 of them.
    starts = np.cumsum([0, LENGTH * 70 + 5, LENGTH * 40])
    shards = zip(starts, (70, 39, 61), strict=True)
    everything = np.concatenate([first + LENGTH * np.arange(count) for first, count in shards])
    held_out, epoch = data.read(data.held_out), len(everything) - len(data.held_out)
    assert len(held_out) == 3
    for number in range(3):
        rows = data.sequences(number * epoch, epoch)
        assert (rows.diff(dim=1) == 1).all()  # whole sequences, none across the end of a shard
        seen = torch.cat([rows[:, 0], held_out[:, 0]]).sort().values
        assert seen.tolist() == everything.tolist()
    data = training_data(numbered, holdout_tokens=1_048_576)  # more than all there is
    assert len(data.held_out) == len(everything) // 50


def test_each_epoch_and_each_seed_has_its_own_order(numbered):
    data, other = training_data(numbered), training_data(numbered, seed=5)
    count = len(data.positions)
    orders = [data.sequences(epoch * count, count)[:, 0] for epoch in range(3)]
    orders.append(other.sequences(0, count)[:, 0])
    for one, another in itertools.combinations(orders, 2):
        assert (one != another).float().mean() > 0.9
    assert torch.equal(training_data(numbered).sequences(0, count)[:, 0], orders[0])


def test_a_stream_is_read_as_it_lies_in_the_shards(numbered):
    data = training_data(numbered, data_order="stream")
    count = len(data.positions)
    for epoch in range(2):
        assert (data.sequences(epoch * count, count)[:, 0].diff() > 0).all()


@pytest.mark.parametrize("micro_batch_tokens", [1, 2 * LENGTH, 3 * LENGTH, 98_304])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_is_the_same_for_any_number_of_processes(
    numbered, monkeypatch, micro_batch_tokens, world_size
):
    step_tokens = {"train_batch_tokens": 12 * LENGTH, "micro_batch_tokens": micro_batch_tokens}
    ranks = [training_data(numbered, **step_tokens) for _ in range(world_size)]
    for step in (0, 1, 40):  # the last is in a later epoch
        together = []
        for rank, data in enumerate(ranks):  # processes that need not be there to read
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            batches = data.micro_batches(step, train_gpt.Distributed(data.h))
            (size,) = {len(inputs) for inputs, _ in batches}  # one shape: one graph
            assert size <= max(1, micro_batch_tokens // LENGTH)
            for inputs, targets in batches:
                assert inputs.shape == targets.shape == (size, LENGTH)
                assert torch.equal(inputs[:, 1:], targets[:, :-1])
                together.append(torch.cat([inputs, targets[:, -1:]], dim=1))
        assert torch.equal(torch.cat(together), data.sequences(step * 12, 12))


def test_too_few_training_tokens_or_one_outside_the_vocabulary_are_refused(tmp_path):
    path, h = tmp_path / "fineweb_train_000000.bin", tiny_settings(data_path=tmp_path)
    write_shard(path, np.zeros(2 * LENGTH))  # one sequence, and none to hold out
    with pytest.raises(UserError, match="too few training tokens"):
        train_gpt.TrainingData(h)
    write_shard(path, np.where(np.arange(LENGTH * 9) == 100, 64, 3))
    data = train_gpt.TrainingData(h)
    with pytest.raises(UserError, match="token 64 is outside VOCAB_SIZE=64"):
        data.sequences(0, len(data.positions))


# ---- Byte accounting ---------------------------------------------------------------------------


def counted(tokenizer, tokens) -> int:
    return tokenizer.count_bytes(tokens[:-1], tokens[1:])


def stream_of(tokens, tokenizer, folder):
    """A validation stream of these tokens, by way of a shard in this folder."""
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    return train_gpt.ValidationStream(tiny_settings(data_path=folder, vocab_size=512), tokenizer)


def test_counted_bytes_are_the_decoded_text_document_by_document(corpus, tokenizer):
    stream = read_shard(corpus.folder / "fineweb_val_000000.bin")
    assert tokenizer.is_byte[stream].sum() > 100  # or the corpus tests nothing
    documents = np.split(stream, np.flatnonzero(stream == BOS))[1:]
    assert len(documents) == len(corpus.documents)
    for tokens, text in zip(documents, corpus.documents, strict=True):
        decoded = tokenizer.decode(tokens)
        # Normalization folds spaces and compatibility forms; else the text must come back whole.
        assert decoded.decode().split() == tokenizer.model.normalize(text).replace("▁", " ").split()
        assert counted(tokenizer, tokens) == len(decoded)
    read = train_gpt.ValidationStream(corpus_settings(corpus), tokenizer)
    assert read.tokens.tolist() == stream.tolist()
    assert read.text == b"".join(map(tokenizer.decode, documents))
    assert read.bytes == len(read.text)


@settings(max_examples=200)
@given(
    st.lists(
        st.text(max_size=40) | st.text("a ▁\n\té") | st.sampled_from(UNUSUAL_DOCUMENTS), max_size=4
    )
)
def test_any_text_counts_its_decoded_length(tokenizer, texts):
    documents = [np.array([BOS, *tokenizer.model.encode(text)]) for text in texts]
    stream = np.concatenate([[BOS], *documents])
    assert counted(tokenizer, stream) == len(tokenizer.decode(stream))
    assert counted(tokenizer, stream) == sum(counted(tokenizer, tokens) for tokens in documents)


def test_a_first_token_of_text_is_not_counted(tokenizer, tmp_path):
    """As in a shard that was cut from a longer one: nothing predicts its first token."""
    tokens = tokenizer.model.encode("plain words of text")
    first = tokenizer.model.id_to_piece(tokens[0]).removeprefix("▁")
    stream = stream_of(tokens, tokenizer, tmp_path)
    assert stream.bytes == len("plain words of text") - len(first)


def test_mistakes_of_published_accounts_are_noticed(corpus, tmp_path):
    """One counts every space twice."""
    wrong = train_gpt.Tokenizer(str(corpus.tokenizer), 512)
    text = "plain text and 日本語 too"
    tokens = [BOS, wrong.model.piece_to_id("▁"), *wrong.model.encode(text)]
    assert stream_of(tokens, wrong, tmp_path).bytes == len(text.encode())
    wrong.own_bytes += wrong.has_space
    with pytest.raises(UserError, match="validation tokens count"):
        stream_of(tokens, wrong, tmp_path)


def test_stream_may_end_within_a_character(tokenizer, tmp_path):
    """As a shard does that was cut at a number of tokens."""
    tokens = [BOS, *tokenizer.model.encode("some text 🎉")]
    assert tokenizer.is_byte[tokens[-4:]].all()
    for cut in range(5):
        stream = stream_of(tokens[: len(tokens) - cut], tokenizer, tmp_path)
        assert stream.bytes == len("some text 🎉".encode()) - cut


@pytest.mark.parametrize(
    ("tokens", "says"), [([BOS, 2, BOS], "no text"), ([BOS, 300, 512], "outside VOCAB_SIZE")]
)
def test_unusable_stream_is_refused(tokenizer, tmp_path, tokens, says):
    with pytest.raises(UserError, match=says):
        stream_of(tokens, tokenizer, tmp_path)


# ---- Tokenizers --------------------------------------------------------------------------------


def test_an_unusable_tokenizer_is_refused_by_name(corpus, tmp_path):
    own, path = corpus.tokenizer.read_bytes(), tmp_path / "some.model"
    without_space = own.replace(b"\n\x03\xe2\x96\x81\x15", b"\n\x03\xe2\x96\x82\x15")
    assert without_space != own
    for content, size, problem in (
        (b"no model", 512, "cannot be used"),
        (own, 511, "has 512 pieces, but VOCAB_SIZE=511"),
        (without_space, 512, "the vocabulary has no piece ▁"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"TOKENIZER_PATH={path}.* {problem}"):
            train_gpt.Tokenizer(str(path), size)


def test_tokenizer_that_did_not_make_the_shards_is_refused(corpus, tokenizer, tmp_path):
    """One of the same size passes every other check, and its text is another."""
    h = corpus_settings(corpus)
    tokenizer.check_manifest(h)
    other = train_gpt.Tokenizer(str(corpus.tokenizer), 512)
    other.sha256 = "0" * 64
    with pytest.raises(UserError, match=f"TOKENIZER_PATH={corpus.tokenizer} .*manifest.json"):
        other.check_manifest(h)
    # Shards from elsewhere have no manifest, or one that says less.
    h = tiny_settings(data_path=tmp_path)
    tokenizer.check_manifest(h)
    for content in ("[]", '{"tokenizer_sha256": null}', '{"tokenizer": "some.model"}'):
        (tmp_path / "manifest.json").write_text(content)
        tokenizer.check_manifest(h)


@settings(max_examples=200)
@given(st.data(), st.integers(1, 400))
def test_windows_score_every_token_once(data, targets):
    length = data.draw(st.integers(1, targets), "length")
    stride = data.draw(st.integers(1, length), "stride")
    starts, counts = train_gpt.plan_windows(targets, length, stride)
    scored = []
    for number, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        assert 0 <= start <= targets - length  # inside the stream
        assert 1 <= count <= length
        if number:
            assert length - count >= length - stride  # positions before the first that it scores
        scored += range(start + length - count, start + length)
    assert scored == list(range(targets))  # each once, left to right, the tail too


# ---- Evaluation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(corpus, tokenizer, tmp_path_factory):
    """A few hundred tokens, no multiple of any window."""
    tokens = read_shard(corpus.folder / "fineweb_val_000000.bin")[:331]
    return stream_of(tokens, tokenizer, tmp_path_factory.mktemp("stream"))


def slow_evaluation(model, tokens, length: int, stride: int) -> float:
    """Return the mean nats of the tokens after the first, each by the first window it is in."""
    targets, total = len(tokens) - 1, 0.0
    length = min(length, targets)
    for i in range(targets):
        windows_before = max(0, math.ceil((i + 1 - length) / stride))
        start = min(windows_before * stride, targets - length)
        with torch.no_grad():
            logits = model.predict(tokens[None, start : start + length])[0, i - start].double()
        total += float(logits.logsumexp(0) - logits[tokens[i + 1]])
    return total / targets


LOGIT_ERROR = 10 * 2 * 30 * 2**-24  # the logits, c·tanh(z/c) with c = 30, are float32


@pytest.mark.parametrize(
    ("length", "stride", "size"),
    [(32, 32, 331), (32, 5, 331), (1, 1, 99), (32, 8, 2), (32, 8, 33), (32, 32, 34)],
)
def test_evaluation_equals_a_slow_loop(
    corpus, processes, random_model, stream, length, stride, size
):
    """Whatever the batch, also where the stream is shorter than a window."""
    model = random_model(corpus_settings(corpus), torch.float64)
    tokens = stream.tokens[:size]
    expected = slow_evaluation(model, tokens, length, stride)
    for batch in (1, 100, 131_072):
        h = corpus_settings(corpus, eval_seq_len=length, eval_stride=1, eval_batch_tokens=batch)
        loss = train_gpt.evaluate(model, tokens, h, processes, stride)
        assert loss == pytest.approx(expected, abs=LOGIT_ERROR)


def test_bits_per_byte_divide_all_nats_by_all_bytes(stream):
    """The first token is not scored, and has no bytes."""
    nats = 2.5 * (len(stream.tokens) - 1)
    expected = nats / math.log(2) / len(stream.text)
    assert stream.bits_per_byte(2.5) == pytest.approx(expected, rel=1e-12)
