"""Compare the parts of a training step with what this machine's own rates would allow.

    python bench/roofline.py > bench/results/roofline_NAME.md

FLOPs and bytes of each part are counted by formula: bytes are what it must read and write if each
operand and each result of a product goes to memory once, and each chain of element-wise operations
is one kernel. "At the rates" is the larger of FLOPs over the measured GEMM rate and bytes over the
measured copy rate; the gap is the measured time over that.

Each part is timed by itself, at its shapes, as the step's own code or torch computes it. The
adapter factors are timed as thin products, even where the step takes the dense gradient
(`MapParts.low_rank_gradient_pays`, bench/kernels.py). A profile of the whole step would name
kernels, and a compiled step's kernels mix the parts. Element-wise work cannot run by itself: its
time is what remains of the whole step, so it also holds what the step loses between the parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    """Return (out, in, rank) of every map of the blocks; rank 0: no LoRA."""
    specs = [spec for spec in t.build_map_table(h).values() if "blocks." in spec.name]
    return [(*spec.shape, int(spec.adapters().get("lora", 0))) for spec in specs]


def count_parts(
    h: t.Hyperparameters,
    parameters: Mapping[t.Role, list[torch.Size]],
    dtype: torch.dtype,
    on_cuda: bool,
) -> list[Part]:
    """Return the parts of a step of system A; `parameters` are the learned shapes by role."""
    n, size, maps = h.train_batch_tokens, dtype.itemsize, shapes_of(h)
    tables = [(h.model_dim, h.bigram_dim), (h.kv_dim, h.ve_dim)]  # maps of the two embeddings
    dense = sum(o * i for o, i, _ in maps)
    operands = sum(n * (o + i) + o * i for o, i, _ in maps) * size
    factors = sum(r * (o + i) for o, i, r in maps)
    heads = h.num_layers * h.model_dim
    q_k_v_and_output = 2 * h.model_dim + 2 * h.kv_dim
    attention_io = h.num_layers * n * q_k_v_and_output * size
    logits, vectors = n * h.vocab_size * size, n * h.model_dim * size
    matrices = [*parameters[t.Role.MATRIX], *parameters[t.Role.FACTOR]]
    values = sum(math.prod(shape) for shapes in parameters.values() for shape in shapes)
    in_muon = sum(math.prod(shape) for shape in matrices)
    orthogonalize, moved = newton_schulz_cost(matrices, h.muon_backend_steps, 2 if on_cuda else 4)
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
        # Per head two products of (T, D) and (T, T), half of each masked; twice as many backward.
        Part("attention", 6 * n * h.train_seq_len * heads, 4 * attention_io),
        # Logits: written, read; their gradient: written, read for both products.
        Part("head and loss", 6 * n * h.vocab_size * h.model_dim, 5 * logits + 3 * vectors),
        Part(
            "optimizers",
            orthogonalize,
            moved + 4 * (5 * in_muon + 7 * (values - in_muon) + 3 * values),
        ),
        Part("averages", 0, 4 * 3 * values),
        Part("element-wise work and the rest", 0, elementwise_bytes(h, n, size)),
    ]


def newton_schulz_cost(matrices: list[torch.Size], steps: int, size: int) -> tuple[float, float]:
    """Return FLOPs and bytes of orthogonalizing matrices of these shapes."""
    flops = moved = 0.0
    for shape in matrices:
        small, large = min(shape), max(shape)
        flops += steps * (4 * small**2 * large + 2 * small**3)
        moved += steps * size * (5 * small * large + 4 * small**2)
    return flops, moved


def elementwise_bytes(h: t.Hyperparameters, n: int, size: int) -> float:
    """Return the bytes of all that is neither product nor attention, each chain fused.

    Where the forward pass of a chain reads R and writes W, its backward pass reads R and the
    gradient of W, and writes the gradient of R: 3 R + 2 W.
    """
    d, kv, hidden = h.model_dim, h.kv_dim, h.mlp_dim
    in_each_layer = [  # values read and written per token
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
    chains = in_each_layer * h.num_layers + once
    return n * size * sum(3 * reads + 2 * writes for reads, writes in chains)


def model_flops(parts: list[Part]) -> float:
    """Return the FLOPs that the network needs in a step.

    Neither the optimizers nor what flash attention repeats in its backward pass count.
    """
    return sum(part.flops for part in parts if part.name not in ("optimizers", "averages"))


def parts_of(h: t.Hyperparameters, model: t.LanguageModel, dist: t.Distributed) -> list[Part]:
    """Return the parts of a step of this model."""
    groups = t.tensors_by_role(model)
    shapes = {role: [p.shape for p in group.values()] for role, group in groups.items()}
    return count_parts(h, shapes, common.dtype_of(h, dist), dist.on_cuda)


class PartsAlone:
    """Work that does each part of a step by itself, as often as a step does."""

    def __init__(self, h: t.Hyperparameters, dist: t.Distributed, step: common.OurStep) -> None:
        self.h, self.step = h, step
        self.maps = shapes_of(h)
        n, device, dtype = h.train_batch_tokens, dist.device, common.dtype_of(h, dist)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        widths = {width for o, i, _ in self.maps for width in (o, i)}
        self.rows = {width: random(n, width) for width in widths}
        self.weights = {(o, i): random(o, i) for o, i, _ in self.maps}
        self.a = {(o, r): random(o, r) for o, _, r in self.maps}
        self.b = {(r, i): random(r, i) for _, i, r in self.maps}
        tables = (h.model_dim, h.bigram_dim), (h.kv_dim, h.ve_dim)
        self.tables = [(random(n, i), random(n, o), random(o, i)) for o, i in tables]
        batch = n // h.train_seq_len
        self.q, self.k, self.v = (
            random(batch, h.train_seq_len, heads, h.head_dim).requires_grad_()
            for heads in (h.num_heads, h.num_kv_heads, h.num_kv_heads)
        )
        self.hidden = random(n, h.model_dim).requires_grad_()
        self.targets = torch.randint(0, h.vocab_size, (n,), device=device)
        self.loss = torch.compile(self.loss_of, dynamic=False, disable=not dist.compile)
        self.gradients = [torch.randn_like(p) for p in step.optimizers.params]

    def works(self) -> dict[str, Callable[[], object]]:
        """Return part -> work."""
        return {
            "merging W + A B": self.merge,
            "maps forward": self.forward,
            "maps, input gradient": self.input_gradient,
            "adapter factors": self.factors,
            "embeddings' maps": self.embeddings_maps,
            "attention": self.attention,
            "head and loss": self.head,
            "optimizers": self.optimizers,
            "averages": lambda: self.step.averages.update(0, 1.0),
        }

    def merge(self) -> None:
        for o, i, r in self.maps:
            torch.addmm(self.weights[o, i], self.a[o, r], self.b[r, i])

    def forward(self) -> None:
        for o, i, _ in self.maps:
            self.rows[i] @ self.weights[o, i].t()

    def input_gradient(self) -> None:
        for o, i, _ in self.maps:
            self.rows[o] @ self.weights[o, i]

    def factors(self) -> None:
        for o, i, r in self.maps:
            x, dy = self.rows[i], self.rows[o]
            dy.t() @ (x @ self.b[r, i].t())
            (dy @ self.a[o, r]).t() @ x

    def embeddings_maps(self) -> None:
        for x, dy, weight in self.tables:
            x @ weight.t()
            dy @ weight
            dy.t() @ x

    def attention(self) -> None:
        for _ in range(self.h.num_layers):
            y = t.causal_attention(self.q, self.k, self.v)
            torch.autograd.grad(y, (self.q, self.k, self.v), y.detach())

    def loss_of(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.step.model.head(x), self.targets)

    def head(self) -> None:
        weight = self.step.model.embedding.weight
        torch.autograd.grad(self.loss(self.hidden), (self.hidden, weight))

    def optimizers(self) -> None:
        for p, gradient in zip(self.step.optimizers.params, self.gradients, strict=True):
            p.grad = gradient
        self.step.optimizers.step(0, 0.0)  # at a rate of 0: the same work, the same weights


def part_lines(
    parts: list[Part], seconds: Mapping[str, float], whole: float, gemm_rate: float, rate: float
) -> list[list[str]]:
    """Return the lines of the table; `rate` is that of a copy."""

    def line(name: str, flops: float, moved: float, least: str, taken: float, gap: float) -> list:
        counts = f"{flops / 1e9:,.1f}", f"{moved / 1e9:,.2f}"
        return [name, *counts, least, common.milliseconds(taken), f"{gap:.2f}"]

    lines = []
    total = flops = moved = 0.0
    for part in parts:
        computing, moving = part.flops / gemm_rate, part.bytes / rate
        least = max(computing, moving)
        limit = "FLOPs" if computing > moving else "bytes"
        text = f"{common.milliseconds(least)} ({limit})"
        taken = seconds[part.name]
        lines.append(line(part.name, part.flops, part.bytes, text, taken, taken / least))
        total += least
        flops += part.flops
        moved += part.bytes
    lines.append(line("whole step", flops, moved, common.milliseconds(total), whole, whole / total))
    return lines


def main() -> None:
    options = common.begin(__doc__)
    text, label = common.text_of(options)
    h = common.settings(common.size_of(options), text)
    n = h.train_batch_tokens
    with t.Distributed(h) as dist:
        dtype = common.dtype_of(h, dist)
        model = common.new_model(h, dist)
        step = common.OurStep(h, dist, model, dist.compile)
        batches = t.TrainingData(h).micro_batches(0, dist)
        parts = parts_of(h, model, dist)
        works = PartsAlone(h, dist, step).works() | {"whole": lambda: step(batches)}
        calls = common.calls_per_measurement(options)
        times = common.interleaved(works, options.runs, calls)
        whole = times.pop("whole")
        times[parts[-1].name] = whole - sum(times.values())

        square = common.gemm_rate(dtype, dist.device, options)
        shapes = [(n, i, o) for o, i, _ in set(shapes_of(h))]
        own = common.gemm_rate(dtype, dist.device, options, shapes)
        copy = common.copy_rate(dist.device, options)

    common.print_header(__file__, options, dtype)
    mode = "compiled" if dist.compile else "eager"
    print(
        f"\nA step of {n:,} tokens in sequences of {h.train_seq_len}: {h.num_layers} layers of"
        f" width {h.model_dim}, {h.map_adapter}, {mode}, on {label}."
    )
    print(
        f"Measured: {square / 1e9:,.0f} GFLOP/s (a square product), {own / 1e9:,.0f} GFLOP/s"
        f" (products of the maps' shapes), {copy / 1e9:,.1f} GB/s (a copy, read and written). The"
        " table uses the first and the last."
    )
    common.print_table(
        ["part", "GFLOP", "GB", "at the rates", "taken", "gap"],
        part_lines(parts, times, whole, square, copy),
    )
    flops = model_flops(parts)
    share = flops / whole / square
    print(f"Model FLOPs {flops / 1e9:,.1f} G per step, {share:.1%} of the measured GEMM rate.")


if __name__ == "__main__":
    main()
