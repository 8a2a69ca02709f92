"""What a training step could take by this machine's own rates, and what it takes, part by part.

    python bench/roofline.py > bench/results/roofline_NAME.md

FLOPs and bytes of each part are counted by formula: bytes are what it must read and write if each operand and
each result of a product goes to memory once, and each chain of element-wise operations is one kernel. "At the
rates" is the larger of FLOPs over the measured GEMM rate and bytes over the measured copy rate; the gap is
the time taken over that.

Each part is timed alone, at its shapes, as the step's own code does it or as torch does it; the factors by
thin products, also where the step takes the dense gradient (`thin_pays`, bench/kernels.py). A profile of the
whole step would name kernels, and a compiled step's kernels mix the parts. Element-wise work cannot be run
alone: its time is what remains of the whole step, so it holds all that the step loses between the parts, too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import common
from common import t


class Part(NamedTuple):
    """What a part of one training step computes and moves."""

    name: str
    flops: float
    bytes: float


def shapes_of(h: t.Hyperparameters) -> list[tuple[int, int, int]]:
    """(out, in, rank) of every map of the blocks; rank 0: no low-rank adapter."""
    return [
        (row.out_features, row.in_features, int(row.adapters().get("lora", 0))) for row in h.maps
    ]


def count_parts(
    h: t.Hyperparameters, parameters: dict[str, list[torch.Size]], dtype: torch.dtype, on_cuda: bool
) -> list[Part]:
    """The parts of a step of system A; `parameters` are the shapes of what is learned, by role."""
    n, size, maps = h.train_batch_tokens, dtype.itemsize, shapes_of(h)
    tables = [
        (h.model_dim, h.bigram_dim),
        (h.kv_dim, h.ve_dim),
    ]  # learned maps of the two embeddings
    dense = sum(o * i for o, i, _ in maps)
    operands = sum(n * (o + i) + o * i for o, i, _ in maps) * size
    factors = sum(r * (o + i) for o, i, r in maps)
    heads = h.num_layers * h.model_dim
    attention_io = (
        h.num_layers * n * (2 * h.model_dim + 2 * h.kv_dim) * size
    )  # q, k, v and the output
    logits, vectors = n * h.vocab_size * size, n * h.model_dim * size
    matrices = parameters[t.MATRIX]
    values = sum(math.prod(shape) for shapes in parameters.values() for shape in shapes)
    in_muon = sum(math.prod(shape) for shape in matrices)
    orthogonalise, moved = newton_schulz_cost(matrices, h.muon_backend_steps, 2 if on_cuda else 4)
    return [
        Part(
            "merging W + A B", 2 * sum(r * o * i for o, i, r in maps), size * (2 * dense + factors)
        ),
        Part("maps forward", 2 * n * dense, operands),
        Part("maps, input gradient", 2 * n * dense, operands),
        # x Bᵀ, dY A, and with them the two gradients; each operand once
        Part(
            "adapter factors",
            4 * n * factors,
            size * sum(2 * n * (o + i) + 4 * n * r for o, i, r in maps),
        ),
        Part(
            "embeddings' maps",
            6 * n * sum(o * i for o, i in tables),
            4 * n * sum(o + i for o, i in tables) * size,
        ),
        # Two products of (T, D) and (T, T) a head, half of each masked; the gradient has twice as many.
        Part("attention", 6 * n * h.train_seq_len * heads, 4 * attention_io),
        # Logits: written, read; their gradient: written, read for both products.
        Part("head and loss", 6 * n * h.vocab_size * h.model_dim, 5 * logits + 3 * vectors),
        Part(
            "optimisers",
            orthogonalise,
            moved + 4 * (5 * in_muon + 7 * (values - in_muon) + 3 * values),
        ),
        Part("averages", 0, 4 * 3 * values),
        Part("element-wise work and the rest", 0, elementwise_bytes(h, n, size)),
    ]


def newton_schulz_cost(matrices: list[torch.Size], steps: int, size: int) -> tuple[float, float]:
    """FLOPs and bytes of orthogonalising matrices of these shapes."""
    flops = moved = 0.0
    for shape in matrices:
        small, large = min(shape), max(shape)
        flops += steps * (4 * small**2 * large + 2 * small**3)
        moved += steps * size * (5 * small * large + 4 * small**2)
    return flops, moved


def elementwise_bytes(h: t.Hyperparameters, n: int, size: int) -> float:
    """Bytes of all that is neither product nor attention, fused as far as it goes. Where the forward pass of
    a chain reads R and writes W, its backward pass reads R and W's gradient and writes R's: 3 R + 2 W.
    """
    d, kv, hidden = h.model_dim, h.kv_dim, h.mlp_dim
    in_a_layer = [  # values read and written for a token
        (2 * d, 2 * d),  # mix of stream and embedding; norm
        (d + kv, d + kv),  # norm and rotation of queries and keys
        (2 * kv, kv),  # value residual
        (d + kv, d),  # exclusive self-attention
        (2 * d, 2 * d),  # residual; norm
        (hidden, hidden),  # activation
        (2 * d, d),  # residual
    ]
    once = [(3 * d, d)]  # embedding, bigram and norm; SmearGate
    once += [(2 * d, d)] * (h.num_layers // 2)  # U-Net skips
    chains = in_a_layer * h.num_layers + once
    return n * size * sum(3 * reads + 2 * writes for reads, writes in chains)


def model_flops(parts: list[Part]) -> float:
    """FLOPs of a step's model: what the network needs, and not what the optimiser adds; attention's backward
    pass without the products that flash attention repeats."""
    return sum(part.flops for part in parts if part.name not in ("optimisers", "averages"))


def parts_of(h: t.Hyperparameters, model: t.LanguageModel, world: t.World) -> list[Part]:
    """The parts of a step of this model."""
    shapes = {
        role: [p.shape for p in group.values()] for role, group in t.tensors_by_role(model).items()
    }
    return count_parts(h, shapes, world.dtype, world.on_cuda)


def alone(h: t.Hyperparameters, world: t.World, step: common.OurStep) -> dict[str, object]:
    """Part -> work that does it once, as often as a step does, by itself."""
    n, device, dtype = h.train_batch_tokens, world.device, world.dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    maps = shapes_of(h)
    widths = {width for o, i, _ in maps for width in (o, i)}
    rows = {width: random(n, width) for width in widths}
    weights = {(o, i): random(o, i) for o, i, _ in maps}
    a = {(o, r): random(o, r) for o, _, r in maps}
    b = {(r, i): random(r, i) for _, i, r in maps}
    tables = [
        (random(n, i), random(n, o), random(o, i))
        for o, i in ((h.model_dim, h.bigram_dim), (h.kv_dim, h.ve_dim))
    ]
    batch = n // h.train_seq_len
    q = random(batch, h.train_seq_len, h.num_heads, h.head_dim).requires_grad_()
    k = random(batch, h.train_seq_len, h.num_kv_heads, h.head_dim).requires_grad_()
    v = random(batch, h.train_seq_len, h.num_kv_heads, h.head_dim).requires_grad_()
    hidden = random(n, h.model_dim).requires_grad_()
    targets = torch.randint(0, h.vocab_size, (n,), device=device)
    gradients = [torch.randn_like(p) for p in step.optimizers.params]

    def merge():
        for o, i, r in maps:
            torch.addmm(weights[o, i], a[o, r], b[r, i])

    def forward():
        for o, i, _ in maps:
            rows[i] @ weights[o, i].t()

    def input_gradient():
        for o, i, _ in maps:
            rows[o] @ weights[o, i]

    def factors():
        for o, i, r in maps:
            x, dy = rows[i], rows[o]
            dy.t() @ (x @ b[r, i].t())
            (dy @ a[o, r]).t() @ x

    def embeddings_maps():
        for x, dy, weight in tables:
            x @ weight.t()
            dy @ weight
            dy.t() @ x

    def attention():
        for _ in range(h.num_layers):
            y = t.causal_attention(q, k, v)
            torch.autograd.grad(y, (q, k, v), y.detach())

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(step.model.logits(x), targets)

    compiled_loss = torch.compile(loss_of, dynamic=False) if world.compile else loss_of

    def head():
        torch.autograd.grad(compiled_loss(hidden), (hidden, step.model.embedding.weight))

    def optimisers():
        for p, gradient in zip(step.optimizers.params, gradients):
            p.grad = gradient
        step.optimizers.step(0, 0.0)  # a rate of 0: the same work, and the weights stay as they are

    return {
        "merging W + A B": merge,
        "maps forward": forward,
        "maps, input gradient": input_gradient,
        "adapter factors": factors,
        "embeddings' maps": embeddings_maps,
        "attention": attention,
        "head and loss": head,
        "optimisers": optimisers,
        "averages": lambda: step.averages.update(0, 1.0),
    }


def main() -> None:
    options = common.begin(__doc__)
    text, label = common.text_of(options)
    h = common.settings(common.size_of(options), text)
    with t.World(h) as world:
        model = common.new_model(h, world)
        step = common.OurStep(h, world, model, world.compile)
        batches = t.TrainingData(h).micro_batches(0, world)
        parts = parts_of(h, model, world)
        calls = common.calls_per_measurement(options)
        works = alone(h, world, step) | {"whole": lambda: step(batches)}
        times = common.interleaved(works, options.runs, calls)
        whole = times.pop("whole")
        times[parts[-1].name] = whole - sum(times.values())

        square = common.gemm_rate(world.dtype, world.device, options)
        n = h.train_batch_tokens
        shapes = [(n, i, o) for o, i, _ in set(shapes_of(h))]
        own = common.gemm_rate(world.dtype, world.device, options, shapes)
        copy = common.copy_rate(world.device, options)

    common.print_header(__file__, options, str(world.dtype).removeprefix("torch."))
    print(
        f"\nA step of {n:,} tokens in sequences of {h.train_seq_len}: {h.num_layers} layers of width"
        f" {h.model_dim}, {h.map_adapter}, {'compiled' if world.compile else 'eager'}, on {label}."
    )
    print(
        f"Measured: {square / 1e9:,.0f} GFLOP/s (a square product), {own / 1e9:,.0f} GFLOP/s (products of"
        f" the maps' shapes), {copy / 1e9:,.1f} GB/s (a copy, read and written). The table uses the first"
        " and the last."
    )
    lines = []
    total = 0.0
    for part in parts:
        least = max(part.flops / square, part.bytes / copy)
        limit = "FLOPs" if part.flops / square > part.bytes / copy else "bytes"
        total += least
        lines.append(
            [
                part.name,
                f"{part.flops / 1e9:,.1f}",
                f"{part.bytes / 1e9:,.2f}",
                f"{common.milliseconds(least)} ({limit})",
                common.milliseconds(times[part.name]),
                f"{times[part.name] / least:.2f}",
            ]
        )
    flops, moved = sum(part.flops for part in parts), sum(part.bytes for part in parts)
    lines.append(
        [
            "whole step",
            f"{flops / 1e9:,.1f}",
            f"{moved / 1e9:,.2f}",
            common.milliseconds(total),
            common.milliseconds(whole),
            f"{whole / total:.2f}",
        ]
    )
    common.print_table(["part", "GFLOP", "GB", "at the rates", "taken", "gap"], lines)
    flops = model_flops(parts)
    print(
        f"Model FLOPs {flops / 1e9:,.1f} G a step, {flops / whole / square:.1%} of the measured GEMM rate."
    )


if __name__ == "__main__":
    main()
