"""The kernels that a step is made of, at its shapes: both ways to a factor's gradient, fp8, attention.

    python bench/kernels.py

For each shape of map and each rank: the gradients of A and B by four thin products, and the dense gradient of
W + A B from which both follow, beside the one that train_gpt's count chooses for a map of that shape whose
output has no scale (one that has, such as proj, goes over to the dense gradient sooner; q, k and v are
counted one by one). On CUDA also the forward product in fp8, with the cast of its input, and the fused
attention of each backend that takes these shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from roofline import shapes_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
from common import milliseconds, t

RANKS = (32, 128, 304)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def products(
    options, n: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> list[list[str]]:
    """Lines of the table for a map (rows, columns) and n tokens."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, dy, weight = random(n, columns), random(n, rows), random(rows, columns)
    works = {
        "forward": lambda: x @ weight.t(),
        "input": lambda: dy @ weight,
        "dense": lambda: dy.t() @ x,
    }
    ranks = [rank for rank in RANKS if rank <= min(rows, columns)] or [min(rows, columns)]
    factors = {rank: (random(rows, rank), random(rank, columns)) for rank in ranks}
    for rank, (a, b) in factors.items():
        works[rank] = lambda a=a, b=b: (dy.t() @ (x @ b.t()), (dy @ a).t() @ x)
    if device.type == "cuda":
        one, x8 = torch.ones((), device=device), x.to(torch.float8_e4m3fn)
        w8 = weight.to(torch.float8_e4m3fn).t()
        works["fp8"] = lambda: torch._scaled_mm(
            x8, w8, one, one, out_dtype=dtype, use_fast_accum=True
        )
        works["cast"] = lambda: x.to(torch.float8_e4m3fn)
    times = common.interleaved(works, options.runs, calls=3)
    lines = []
    for rank, (a, b) in factors.items():
        chosen = "thin" if t.thin_pays(weight, a, b, False) else "dense"
        faster = "thin" if times[rank] < times["dense"] else "dense"
        fp8 = (
            f"{milliseconds(times['fp8'])} + {milliseconds(times['cast'])}"
            if "fp8" in times
            else ""
        )
        lines.append(
            [
                f"{rows} x {columns}",
                str(rank),
                milliseconds(times["forward"]),
                fp8,
                milliseconds(times["input"]),
                milliseconds(times[rank]),
                milliseconds(times["dense"]),
                chosen,
                faster,
            ]
        )
    return lines


def attention(
    options, h: t.Hyperparameters, device: torch.device, dtype: torch.dtype
) -> list[list[str]]:
    """Seconds of one layer's attention, forward and with its gradients, by backend."""
    batch = h.train_batch_tokens // h.train_seq_len

    def random(heads: int) -> torch.Tensor:
        shape = batch, heads, h.train_seq_len, h.head_dim
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    q, k, v = random(h.num_heads), random(h.num_kv_heads), random(h.num_kv_heads)
    dy, lines = torch.randn_like(q), []
    for name, backend in BACKENDS.items():

        def forward(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        try:
            times = common.interleaved(
                {"forward": forward, "both": lambda: torch.autograd.grad(forward(), (q, k, v), dy)},
                options.runs,
                calls=3,
            )
        except RuntimeError as error:
            lines.append([name, "refused", str(error).splitlines()[0]])
            continue
        lines.append([name, milliseconds(times["forward"]), milliseconds(times["both"])])
    return lines


def main() -> None:
    options = common.begin(__doc__)
    h = common.settings(common.size_of(options))
    with t.World(h) as world:
        shapes = sorted({(rows, columns) for rows, columns, _ in shapes_of(h)})
        if (h.model_dim + 2 * h.kv_dim, h.model_dim) not in shapes:
            shapes.append((h.model_dim + 2 * h.kv_dim, h.model_dim))  # q, k and v as one
        lines = [
            line
            for shape in shapes
            for line in products(options, h.train_batch_tokens, *shape, world.device, world.dtype)
        ]
        by_backend = attention(options, h, world.device, world.dtype) if world.on_cuda else []
    common.print_header(__file__, options, str(world.dtype).removeprefix("torch."))
    common.print_table(
        [
            "what",
            "rank",
            "forward",
            "in fp8 + cast",
            "input gradient",
            "thin",
            "dense",
            "chosen",
            "faster",
        ],
        lines,
    )
    if by_backend:
        common.print_table(["attention of a layer", "forward", "forward and backward"], by_backend)


if __name__ == "__main__":
    main()
