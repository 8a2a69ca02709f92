"""EVAL_MODE=streaming: one pass, in which a position attends to the last EVAL_SEQ_LEN ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from helpers import train_gpt

WINDOW = 16


def stream_of(count: int) -> torch.Tensor:
    """Return random tokens, (count,)."""
    return torch.randint(64, (count,), generator=torch.Generator().manual_seed(0))


def plain_attention(q, k, v):
    """Attend over a whole sequence, each position to the last WINDOW ones."""
    group = q.size(2) // k.size(2)
    q, k, v = (
        t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
    )
    places = torch.arange(q.size(2))
    past = places[:, None] - places
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(
        (past < 0) | (past >= WINDOW), -math.inf
    )
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def windows(settings):
    """windows(**changes): settings of small windows that overlap, in batches of 4."""
    shape = {"eval_seq_len": WINDOW, "eval_stride": 4, "eval_batch_tokens": 4 * WINDOW}
    return lambda **changes: settings(**(shape | changes))


@pytest.fixture
def streaming(windows):
    """streaming(**changes): settings that evaluate in one pass."""
    return lambda **changes: windows(eval_mode="streaming", **changes)


@pytest.mark.parametrize("count", [18, 32, 33, 34, 150, 401])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 1},  # whose bigrams and smear reach beyond the row above
        {"recur_layers": "1-2", "recur_times": 2},
        {"mlp_gated": 1, "num_kv_heads": 4, "parallel_from": 2},
    ],
)
def test_one_pass_is_attention_over_the_last_positions(
    streaming, random_model, processes, monkeypatch, count, changes, either_cpu
):
    """In float64, against the whole stream as one sequence."""
    h, tokens = streaming(**changes), stream_of(count)
    model = random_model(h, torch.float64)
    loss = train_gpt.evaluate(model, tokens, h, processes, h.eval_stride)
    monkeypatch.setattr(train_gpt, "causal_attention", plain_attention)
    logits = model.predict(tokens[None, :-1], count - 1)
    expected = F.cross_entropy(logits[0], tokens[1:]).item()
    assert loss == pytest.approx(expected, rel=1e-6)  # logits are float32


def test_the_kernel_for_cuda_gives_the_shapes_that_the_sums_need():
    """Without a GPU: of tensors that have no values."""
    with FakeTensorMode():
        q, k = (torch.empty(3, WINDOW, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2))
        y, lse = train_gpt.flash_attention_and_lse(q, k, k)
    assert (y.shape, y.dtype, y.device) == (q.shape, q.dtype, q.device)
    assert (lse.shape, lse.dtype) == ((3, WINDOW, 4, 1), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "dim", "fits"),
    [(torch.bfloat16, 64, True), (torch.bfloat16, 12, False), (torch.float32, 64, False)],
)
def test_what_the_kernel_for_cuda_does_not_take_goes_by_plain_products(
    monkeypatch, dtype, dim, fits
):
    """Without a GPU: of tensors that have no values."""
    taken, flash = [], train_gpt.flash_attention_and_lse

    def counted(q, k, v):
        taken.append(q.shape)
        return flash(q, k, v)

    monkeypatch.setattr(train_gpt, "flash_attention_and_lse", counted)
    with FakeTensorMode():
        q, k = (torch.empty(3, WINDOW, n, dim, device="cuda", dtype=dtype) for n in (4, 2))
        turn = torch.empty(1, 4, device="cuda", dtype=dtype)
        y = train_gpt.streaming_attention(q, k, k, (turn, turn))
    assert (y.shape, y.dtype, y.device, bool(taken)) == (q.shape, dtype, q.device, fits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_attention_and_its_log_sum_exp(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 64, dtype=dtype) for heads in (4, 2, 2))
    with torch.no_grad():
        y, lse = train_gpt.flash_attention_and_lse(q, k, v)
    fused = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert torch.equal(y, fused.transpose(1, 2))
    scores = q.double().transpose(1, 2) @ k.double().repeat_interleave(2, 2).permute(0, 2, 3, 1) / 8
    scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    expected = scores.logsumexp(-1).transpose(1, 2)[..., None]
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=2e-4)


def test_processes_share_the_rows(streaming, random_model, processes):
    """The sums of two processes are the sum of one."""
    h, tokens = streaming(), stream_of(700)
    model = random_model(h, torch.float64)

    def part(rank: int, world_size: int) -> float:
        dist = copy.copy(processes)
        dist.rank, dist.world_size = rank, world_size
        dist.all_reduce = lambda total: total
        return train_gpt.evaluate(model, tokens, h, dist, h.eval_stride)

    first, second = part(0, 2), part(1, 2)
    assert part(0, 1) == pytest.approx(first + second, rel=1e-12)
    assert min(first, second) > 0


@pytest.mark.parametrize("count", [17, 18, 32, 33, 48, 49, 1000])
def test_every_token_is_scored_once(streaming, processes, count):
    """Each token's loss is its place squared, from 2 on: padding is a token, too, and not free."""

    class Ledger(torch.nn.Module):
        def token_losses(self, ids, targets, streaming):
            assert streaming == (count > WINDOW + 1)  # else there is one window
            assert torch.equal(ids[:, 1:], targets[:, :-1])  # whole rows, in order
            return (targets.double() + 1) ** 2

    loss = train_gpt.evaluate(Ledger(), torch.arange(count), streaming(), processes, 4)
    assert loss * (count - 1) == pytest.approx(sum(i**2 for i in range(2, count + 1)), rel=1e-12)


def test_what_comes_later_changes_nothing(streaming, random_model, processes, monkeypatch):
    h, tokens, place = streaming(eval_batch_tokens=300), stream_of(300), 200
    model = random_model(h)
    token_losses = model.token_losses

    def losses_of(tokens):
        """Return the losses of the first batch, whose rows are the first ones of the stream."""
        batches = []

        def recorded(*given):
            batches.append(token_losses(*given))
            return batches[-1]

        monkeypatch.setattr(model, "token_losses", recorded)
        train_gpt.evaluate(model, tokens, h, processes, h.eval_stride)
        return batches[0].flatten()

    before = losses_of(tokens)
    tokens[place:] = (tokens[place:] + 1) % 64
    after = losses_of(tokens)
    assert torch.equal(before[: place - 1], after[: place - 1])
    assert not torch.equal(before[place - 1 :], after[place - 1 :])


def test_whole_windows_are_scored_as_ever(streaming, windows, random_model, processes):
    """The roundtrip and validations in training have one window after the other, in either mode."""
    tokens, model = stream_of(100), random_model(streaming())

    def loss(h, stride):
        return train_gpt.evaluate(model, tokens, h, processes, stride)

    assert loss(streaming(), WINDOW) == loss(windows(), WINDOW)
    assert loss(streaming(), 4) != loss(windows(), 4)


@pytest.mark.parametrize(
    ("either_cpu", "scored", "streams"),
    [
        ("with AMX", 64, False),
        ("without AMX", 64, False),
        ("without AMX", 4, False),
        ("without AMX", 64, True),
    ],
    indirect=["either_cpu"],
)
def test_what_a_score_needs_compiles_into_one_graph(
    settings, random_model, either_cpu, scored, streams
):
    """Without gradients, too: whole windows on each kind of CPU, a few last positions, streams.

    `fullgraph` refuses a break.
    """
    h = settings(num_layers=1, recur_layers="0", recur_times=2)
    model = random_model(h).eval()
    ids = torch.arange(3 * 64).view(3, 64) % 61
    torch._dynamo.reset()
    with torch.no_grad():
        for eager, of in ((model.token_losses, ids[:, -scored:]), (model.predict, scored)):
            compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend="eager")
            expected = eager(ids, of, streams)
            torch.testing.assert_close(compiled(ids, of, streams), expected, rtol=1e-4, atol=1e-5)
