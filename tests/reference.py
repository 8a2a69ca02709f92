"""What several tests compare with, written anew from the definitions, and their random inputs.

Nothing here calls the functions that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import brotli
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from helpers import Container


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Return random tokens of a vocabulary of 64."""
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return normal values in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention(q: Tensor, k: Tensor, v: Tensor, span: int) -> Tensor:
    """Return softmax(q kᵀ / √D) v: the queries of the last positions see at most `span` keys."""
    k, v = (t.repeat_interleave(q.size(2) // k.size(2), 2) for t in (k, v))
    past = torch.arange(k.size(1) - q.size(1), k.size(1))[:, None] - torch.arange(k.size(1))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
    scores = scores.masked_fill((past < 0) | (past >= span), -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def same(ours: object, theirs: object) -> bool:
    """Compare nested dicts and lists exactly; tensors by their values."""
    (values, shape), (others, other_shape) = tree_flatten(ours), tree_flatten(theirs)
    return shape == other_shape and all(map(same_value, values, others))


def same_value(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other or (type(one) is type(other) and one == other)


def linear_map(
    layer: torch.nn.Module,
    p: Mapping[str, Tensor],
    x: Tensor,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return gate · activation(scale · y + bias), y = x Wᵀ plus a path of its own per adapter.

    Args:
        layer: what holds the frozen map, and what adapters generate by their seeds.
        p: the learned values by name; those of a mask are its bits.
        x: (..., in).
        activation: of the scaled output.
    """
    w = p.get("weight", layer.weight).to(x.dtype)
    if "mask.scores" in p:
        w = math.sqrt(2) * w * p["mask.scores"]
    y = x @ w.T
    if "lora.A" in p:
        y = y + (x @ p["lora.B"].T) @ p["lora.A"].T
    if "rslora.A" in p:
        y = y + (x @ p["rslora.B"].T) @ p["rslora.A"].T / math.sqrt(p["rslora.A"].shape[1])
    if "vera.d" in p:
        y = y + ((x @ layer.vera.A.T.to(x)) * p["vera.d"]) @ layer.vera.B.T.to(x) * p["vera.b"]
    if "combination.coefficients" in p:
        pairs = zip(p["combination.coefficients"], layer.combination.maps, strict=True)
        y = y + sum(coefficient * (x @ r.T.to(x)) for coefficient, r in pairs)
    if "sparse.values" in p:
        rows = zip(p["sparse.values"], layer.sparse.support, strict=True)
        y = y + torch.stack([(x[..., places] * values).sum(-1) for values, places in rows], -1)
    y = y * p["scale"] if "scale" in p else y
    y = y + p["bias"] if "bias" in p else y
    y = y if activation is None else activation(y)
    return y * p["gate"] if "gate" in p else y


def artifact_groups(blob: bytes) -> dict[str, bytes]:
    """Return the values of each group of an artifact, by the description of the format alone."""
    groups = Container(blob).blocks.items()
    return {name: b"".join(map(brotli.decompress, blocks)) for name, blocks in groups}
