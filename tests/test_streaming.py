"""EVAL_MODE=streaming: one pass, in which a position attends to the last EVAL_SEQ_LEN ones."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from helpers import train_gpt
from reference import attention, tokens

WINDOW = 16


@pytest.fixture
def streaming(settings):
    """streaming(**changes): settings that evaluate in one pass, of small windows that overlap."""
    shape = {"eval_seq_len": WINDOW, "eval_stride": 4, "eval_batch_tokens": 4 * WINDOW}
    return lambda **changes: settings(**({"eval_mode": "streaming"} | shape | changes))


@pytest.mark.parametrize("count", [18, 33, 34, 401])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 1},  # whose bigrams and smear reach beyond the row above
        {"recur_layers": "1-2", "recur_times": 2},
        {"mlp_gated": 1, "num_kv_heads": 4, "parallel_from": 2},
        {"map_basis": "learned,bigram.signs=rademacher", "map_adapter": "none", "bigram_gate": 1},
        {"induction": 2},
    ],
)
def test_one_pass_is_attention_over_the_last_positions(
    streaming, random_model, processes, monkeypatch, count, changes, either_cpu
):
    """In float64, against the whole stream as one sequence; logits of up to 30 are float32."""
    h, stream = streaming(**changes), tokens(count)
    model = random_model(h, torch.float64)
    loss = train_gpt.evaluate(model, stream, h, processes, h.eval_stride)
    monkeypatch.setattr(train_gpt, "causal_attention", functools.partial(attention, span=WINDOW))
    forward = train_gpt.InductionPattern.forward

    def of_the_window(*args):
        shares = forward(*args)
        weights = (shares / (1 - shares.sum(-1, keepdim=True))).triu(1 - WINDOW)
        return weights / (1 + weights.sum(-1, keepdim=True))

    monkeypatch.setattr(train_gpt.InductionPattern, "forward", of_the_window)
    logits = model.predict(stream[None, :-1], count - 1)
    expected = F.cross_entropy(logits[0], stream[1:]).item()
    assert loss == pytest.approx(expected, abs=10 * 2 * 30 * 2**-24)


@pytest.mark.parametrize(
    ("dtype", "dim", "fits"),
    [(torch.bfloat16, 64, True), (torch.bfloat16, 12, False), (torch.float32, 64, False)],
)
def test_what_the_kernel_for_cuda_does_not_take_goes_by_plain_products(
    monkeypatch, dtype, dim, fits
):
    """Without a GPU: of tensors that have no values, which have the shapes that sums need."""
    taken, flash = [], train_gpt.flash_attention_and_lse

    def counted(q, k, v):
        y, lse = flash(q, k, v)
        assert (y.shape, y.dtype, lse.dtype) == (q.shape, q.dtype, torch.float32)
        assert lse.shape == (*q.shape[:3], 1)
        taken.append(q.shape)
        return y, lse

    monkeypatch.setattr(train_gpt, "flash_attention_and_lse", counted)
    with FakeTensorMode():
        q, k = (torch.empty(3, WINDOW, n, dim, device="cuda", dtype=dtype) for n in (4, 2))
        turn = torch.empty(1, 4, device="cuda", dtype=dtype)
        y = train_gpt.streaming_attention(q, k, k, (turn, turn))
    assert (y.shape, y.dtype, y.device, bool(taken)) == (q.shape, dtype, q.device, fits)


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


@pytest.mark.parametrize(("scored", "streams"), [(4, False), (64, True)])
def test_what_a_score_needs_compiles_into_one_graph(settings, random_model, scored, streams):
    """Of a few last positions, and of streams: `fullgraph` refuses a break."""
    h = settings(num_layers=1, recur_layers="0", recur_times=2)
    model = random_model(h, torch.float64).eval()
    ids = torch.arange(3 * 64).view(3, 64) % 61
    torch._dynamo.reset()
    with torch.no_grad():
        given = ids, ids[:, -scored:], streams
        compiled = torch.compile(model.token_losses, fullgraph=True, dynamic=False, backend="eager")
        torch.testing.assert_close(compiled(*given), model.token_losses(*given))
