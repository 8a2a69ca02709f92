"""Measure the kernels of a step at its shapes: gradients of factors, fp8, attention.

    python bench/kernels.py

For each shape of map and each rank: the gradients of A and B by four thin products, and the dense
gradient of W + A B from which both follow; beside them the one that train_gpt's estimate chooses
for a map whose output has no scale. (One with a scale, such as proj, changes to the dense gradient
at a lower rank; q, k and v are estimated one by one.) On CUDA also the forward product in fp8 with
the cast of its input, and the fused attention of each backend that takes these shapes.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from roofline import shapes_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
from common import milliseconds, t

RANKS = (32, 128, 304)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
COLUMNS = (
    "what",
    "rank",
    "forward",
    "in fp8 + cast",
    "input gradient",
    "thin",
    "dense",
    "chosen",
    "faster",
)


def products(
    options: argparse.Namespace, n: int, rows: int, columns: int, like: torch.Tensor
) -> list[list[str]]:
    """Return the lines of a map (rows, columns) and n tokens, in the type of `like`."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=like.device).to(like.dtype)

    x, dy, weight = random(n, columns), random(n, rows), random(rows, columns)
    works = {
        "forward": lambda: x @ weight.t(),
        "input": lambda: dy @ weight,
        "dense": lambda: dy.t() @ x,
    }
    ranks = [rank for rank in RANKS if rank <= min(rows, columns)] or [min(rows, columns)]
    maps = {rank: t.MapParts(weight, random(rows, rank), random(rank, columns)) for rank in ranks}
    for rank, (_, a, b) in maps.items():
        works[rank] = lambda a=a, b=b: (dy.t() @ (x @ b.t()), (dy @ a).t() @ x)
    if like.is_cuda:
        one = torch.ones((), device=like.device)
        x8, w8 = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
        works["fp8"] = lambda: torch._scaled_mm(
            x8, w8, one, one, out_dtype=like.dtype, use_fast_accum=True
        )
        works["cast"] = lambda: x.to(torch.float8_e4m3fn)
    times = common.interleaved(works, options.runs, calls=3)
    taken = {name: milliseconds(seconds) for name, seconds in times.items()}
    fp8 = f"{taken['fp8']} + {taken['cast']}" if like.is_cuda else ""
    lines = []
    for rank, merged in maps.items():
        chosen = "thin" if merged.low_rank_gradient_pays(False) else "dense"
        faster = "thin" if times[rank] < times["dense"] else "dense"
        shape = f"{rows} x {columns}"
        forward = shape, str(rank), taken["forward"], fp8, taken["input"]
        lines.append([*forward, taken[rank], taken["dense"], chosen, faster])
    return lines


def attention(
    options: argparse.Namespace, h: t.Hyperparameters, like: torch.Tensor
) -> list[list[str]]:
    """Return the time of one layer's attention, forward and with its gradients, by backend."""
    batch = h.train_batch_tokens // h.train_seq_len
    q, k, v = (
        torch.randn(batch, heads, h.train_seq_len, h.head_dim, device=like.device)
        .to(like.dtype)
        .requires_grad_()
        for heads in (h.num_heads, h.num_kv_heads, h.num_kv_heads)
    )
    dy = torch.randn_like(q)
    lines = []
    for name, backend in BACKENDS.items():

        def forward(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def both(forward=forward) -> None:
            torch.autograd.grad(forward(), (q, k, v), dy)

        try:
            times = common.interleaved({"forward": forward, "both": both}, options.runs, calls=3)
        except RuntimeError as error:
            lines.append([name, "refused", str(error).splitlines()[0]])
            continue
        lines.append([name, milliseconds(times["forward"]), milliseconds(times["both"])])
    return lines


def main() -> None:
    options = common.begin(__doc__)
    h = common.settings(common.size_of(options))
    with t.Distributed(h) as dist:
        like = torch.zeros(0, dtype=common.dtype_of(h, dist), device=dist.device)
        shapes = sorted({(rows, columns) for rows, columns, _ in shapes_of(h)})
        qkv = h.model_dim + 2 * h.kv_dim, h.model_dim  # the three maps as one
        if qkv not in shapes:
            shapes.append(qkv)
        lines = []
        for rows, columns in shapes:
            lines += products(options, h.train_batch_tokens, rows, columns, like)
        by_backend = attention(options, h, like) if dist.on_cuda else []
    common.print_header(__file__, options, like.dtype)
    common.print_table(list(COLUMNS), lines)
    if by_backend:
        common.print_table(["attention per layer", "forward", "forward and backward"], by_backend)


if __name__ == "__main__":
    main()
