"""EVAL_MODE=window: one pass over the stream, each position attends to the last EVAL_SEQ_LEN ones."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import train_gpt

WINDOW = 16


def stream_of(count: int) -> SimpleNamespace:
    tokens = torch.randint(64, (count,), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(tokens=tokens, bytes=count)


def windowed(q, k, v):
    """Plain attention over a whole sequence, each position on the last WINDOW ones."""
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
def window(settings):
    return lambda **changes: settings(eval_mode="window", eval_batch_tokens=64, **changes)


@pytest.mark.parametrize("count", [18, 32, 33, 34, 150, 401])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recur_layers": "1-2", "recur_times": 2},
        {"mlp_gated": 1, "num_kv_heads": 4, "parallel_from": 2},
    ],
)
def test_one_pass_is_attention_over_the_last_positions(
    window, random_model, processes, monkeypatch, count, changes, either_cpu
):
    """In float64, against the whole stream as one sequence."""
    h, val = window(**changes), stream_of(count)
    model = random_model(h, torch.float64)
    nats, bpb = train_gpt.evaluate(model, val, h, processes, h.eval_stride)
    monkeypatch.setattr(train_gpt, "causal_attention", windowed)
    logits = model.predict(val.tokens[None, :-1], count - 1)
    expected = F.cross_entropy(logits[0], val.tokens[1:]).item()
    assert nats == pytest.approx(expected, rel=1e-6)  # logits are float32
    assert bpb == pytest.approx(expected * (count - 1) / math.log(2) / count, rel=1e-6)


def test_the_kernel_for_cuda_gives_the_shapes_that_the_sums_need():
    """Without a GPU: of tensors that have no values."""
    with FakeTensorMode():
        q, k = (torch.empty(3, WINDOW, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2))
        y, lse = train_gpt.attention_and_lse(q, k, k)
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
    taken, flash = [], train_gpt.attention_and_lse
    monkeypatch.setattr(train_gpt, "attention_and_lse", lambda *qkv: taken.append(1) or flash(*qkv))
    with FakeTensorMode():
        q, k = (torch.empty(3, WINDOW, n, dim, device="cuda", dtype=dtype) for n in (4, 2))
        back = [torch.empty(1, 4, device="cuda", dtype=dtype)] * 2
        y = train_gpt.streaming_attention(q, k, k, back)
    assert (y.shape, y.dtype, y.device, bool(taken)) == (q.shape, dtype, q.device, fits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_attention_and_its_log_sum_exp(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 64, dtype=dtype) for heads in (4, 2, 2))
    with torch.no_grad():
        y, lse = train_gpt.attention_and_lse(q, k, v)
    fused = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert torch.equal(y, fused.transpose(1, 2))
    scores = q.double().transpose(1, 2) @ k.double().repeat_interleave(2, 2).permute(0, 2, 3, 1) / 8
    scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    expected = scores.logsumexp(-1).transpose(1, 2)[..., None]
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=2e-4)


def test_processes_share_the_rows(window, random_model, processes):
    """The sums of two processes are the sum of one."""
    h, val = window(), stream_of(700)
    model = random_model(h, torch.float64)
    sums = []
    for count in (1, 2):
        for rank in range(count):
            world = copy.copy(processes)
            world.rank, world.count = rank, count
            world.sum_ = lambda total: sums.append(total.item()) or total
            train_gpt.evaluate(model, val, h, world, h.eval_stride)
    assert sums[0] == pytest.approx(sums[1] + sums[2], rel=1e-12)
    assert min(sums[1:]) > 0


@pytest.mark.parametrize("count", [17, 18, 32, 33, 48, 49, 1000])
def test_every_token_is_scored_once(window, processes, count):
    """Each token's loss is its place squared."""
    val = SimpleNamespace(tokens=torch.arange(count), bytes=count)

    class Ledger(torch.nn.Module):
        def losses(self, ids, targets, streams):
            assert streams == (count > WINDOW + 1)  # else there is one window
            assert torch.equal(
                ids[:, 1:], targets[:, :-1]
            )  # whole rows, in the order of the stream
            return targets.double() ** 2

    nats, _ = train_gpt.evaluate(Ledger(), val, window(), processes, 4)
    assert nats * (count - 1) == pytest.approx(sum(i**2 for i in range(1, count)), rel=1e-12)


def test_what_comes_later_changes_nothing(window, random_model, processes):
    h, val = window(), stream_of(300)
    model = random_model(h)
    seen = []
    losses = model.losses
    model.losses = lambda *given: seen.append(losses(*given)) or seen[-1]
    train_gpt.evaluate(model, val, h, processes, h.eval_stride)
    before, place = [loss.clone() for loss in seen], 200
    seen.clear()
    val.tokens[place:] = (val.tokens[place:] + 1) % 64
    train_gpt.evaluate(model, val, h, processes, h.eval_stride)
    rows = [
        loss.flatten() for loss in (before[0], seen[0])
    ]  # the first batch has no rows of an earlier one
    assert torch.equal(rows[0][: place - 1], rows[1][: place - 1])
    assert not torch.equal(rows[0][place - 1 :], rows[1][place - 1 :])


def test_whole_windows_are_scored_as_ever(window, settings, random_model, processes):
    """The roundtrip and validations in training have one window after the other, in either mode."""
    h, val = window(), stream_of(100)
    model = random_model(h)
    scores = [
        train_gpt.evaluate(model, val, each, processes, stride)
        for each in (h, settings())
        for stride in (WINDOW, 4)
    ]
    assert scores[0] == scores[2]
    assert scores[1] != scores[3]


@pytest.mark.parametrize("scored, streams", [(64, False), (4, False), (64, True)])
def test_what_a_score_needs_compiles_into_one_graph(
    settings, random_model, either_cpu, scored, streams
):
    """Without gradients, too: of whole windows, a few last positions, streams. `fullgraph` refuses a break."""
    model = random_model(settings(recur_layers="1-2", recur_times=2)).eval()
    ids = torch.arange(3 * 64).view(3, 64) % 61
    torch._dynamo.reset()
    with torch.no_grad():
        for eager, of in ((model.losses, ids[:, -scored:]), (model.predict, scored)):
            compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend="eager")
            torch.testing.assert_close(
                compiled(ids, of, streams), eager(ids, of, streams), rtol=1e-4, atol=1e-5
            )
