"""System A as a textbook would write it: the reference of bench/speed.py.

It is the network of train_gpt.GPT (the same weights give the same loss: tests/test_bench.py) and
shares no line of its computation. It differs in how it computes:

- a linear map is two paths, `x Wᵀ + (x Bᵀ) Aᵀ`, left to autograd;
- adapters are kept in the type of the activations, bfloat16 where the machine has it (PR #1113);
- attention is torch's `scaled_dot_product_attention`, everything else one torch function at a time;
- Muon goes matrix by matrix, and so does the average of the weights;
- gradients are torch's: `zero_grad`, `backward`, `clip_grad_norm_`.

Late fake quantization, SWA and what other presets need are left out: the measured steps do not
reach them. Of train_gpt.py it takes the names of settings and of weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from train_gpt import Hyperparameters, LanguageModel


MAPS = ("attention.q", "attention.k", "attention.v", "attention.proj", "mlp.fc", "mlp.proj")


class TwoPathLinear(nn.Module):
    """A frozen random map (out, in) with LoRA beside it."""

    def __init__(self, weight: Tensor, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.register_buffer("weight", weight.to(dtype), persistent=False)
        self.A = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(rank, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.B), self.A)


class CastLinear(nn.Linear):
    """A learned float32 map, computed in the type of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class CastEmbedding(nn.Embedding):
    """A float32 table whose rows are looked up in `dtype`; a map widens them to `width`, if any."""

    def __init__(self, count: int, dim: int, dtype: torch.dtype, width: int = 0) -> None:
        super().__init__(count, dim)
        self.dtype = dtype
        self.proj = CastLinear(dim, width) if width else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(super().forward(ids).to(self.dtype))


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of the first dimensions of x (B, T, H, D); leave the others."""
    half = cos.size(-1)
    first = x[..., :half]
    second = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def rope_angles(h: Hyperparameters, length: int, device: torch.device) -> Tensor:
    """Return the angle of each position and pair of dimensions, (T, 1, R / 2).

    The base grows with sequences that are longer than ROPE_STRETCH_FROM (NTK-aware scaling).
    """
    base = h.rope_base
    if 0 < h.rope_stretch_from < length and h.rope_dims > 2:
        stretch = length / h.rope_stretch_from
        base *= stretch ** (h.rope_dims / (h.rope_dims - 2))
    dims = torch.arange(0, h.rope_dims, 2, dtype=torch.float64, device=device)
    frequencies = base ** -(dims / h.rope_dims)
    return torch.arange(length, device=device)[:, None, None] * frequencies


class Attention(nn.Module):
    """Causal attention with grouped queries, normalized q and k, partial RoPE and XSA."""

    def __init__(self, h: Hyperparameters, layer: int, maps: dict[str, nn.Module]) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = h.num_heads, h.num_kv_heads, h.head_dim
        self.xsa = layer >= h.num_layers - h.xsa_last_n
        self.q, self.k, self.v, self.proj = (maps[path] for path in MAPS[:4])
        self.q_gain = nn.Parameter(torch.zeros(h.num_heads, 1))
        if layer > 0:
            self.value_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        value_embedding: Tensor | None,
        first_values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        own_values = self.v(x)
        v = own_values
        if value_embedding is not None:
            v = v + value_embedding
        if first_values is not None:
            v = v + torch.sigmoid(self.value_gate).to(x.dtype) * first_values
        q = self.q(x).view(batch, length, self.num_heads, self.head_dim)
        k = self.k(x).view(batch, length, self.num_kv_heads, self.head_dim)
        v = v.view(batch, length, self.num_kv_heads, self.head_dim)
        q = apply_rope(rms_norm(q), cos, sin) * self.q_gain.to(x.dtype)
        k = apply_rope(rms_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        y = y.transpose(1, 2)  # (B, T, H, D)
        if self.xsa:  # remove the projection on the position's own value
            direction = F.normalize(v, dim=-1).repeat_interleave(
                self.num_heads // self.num_kv_heads, dim=2
            )
            y = y - (y * direction).sum(dim=-1, keepdim=True) * direction
        return self.proj(y.reshape(batch, length, -1)), own_values


class MLP(nn.Module):
    """LeakyReLU(0.5)² between two maps."""

    def __init__(self, maps: dict[str, nn.Module]) -> None:
        super().__init__()
        self.fc, self.proj = maps["mlp.fc"], maps["mlp.proj"]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.square(F.leaky_relu(self.fc(x), negative_slope=0.5)))


class Block(nn.Module):
    """Pre-norm attention and MLP on a mix of stream and embedding."""

    def __init__(self, h: Hyperparameters, layer: int, maps: dict[str, nn.Module]) -> None:
        super().__init__()
        self.attention = Attention(h, layer, maps)
        self.mlp = MLP(maps)
        self.norm_scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.stream_mix = nn.Parameter(torch.zeros(h.model_dim))
        self.embedding_mix = nn.Parameter(torch.zeros(h.model_dim))
        self.attention_scale = nn.Parameter(torch.zeros(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.zeros(h.model_dim))

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        cos: Tensor,
        sin: Tensor,
        value_embedding: Tensor | None,
        first_values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x = self.stream_mix.to(x.dtype) * x + self.embedding_mix.to(x.dtype) * x0
        y, values = self.attention(
            rms_norm(x) * self.norm_scale, cos, sin, value_embedding, first_values
        )
        x = x + self.attention_scale.to(x.dtype) * y
        y = self.mlp(rms_norm(x) * self.norm_scale)
        return x + self.mlp_scale.to(x.dtype) * y, values


class Textbook(nn.Module):
    """The network of a train_gpt.GPT of system A, with that model's weights and maps."""

    def __init__(self, h: Hyperparameters, ours: LanguageModel, dtype: torch.dtype) -> None:
        """Copy the weights of `ours`; `dtype` is that of activations and adapters."""
        super().__init__()
        self.h, self.dtype = h, dtype
        self.embedding = CastEmbedding(h.vocab_size, h.model_dim, dtype)
        self.bigram = CastEmbedding(h.bigram_vocab_size, h.bigram_dim, dtype, h.model_dim)
        self.bigram_scale = nn.Parameter(torch.zeros(1))
        self.smear_gate = nn.Parameter(torch.zeros(h.model_dim))
        self.value_embedding = CastEmbedding(h.vocab_size, h.ve_dim, dtype, h.kv_dim)
        self.value_scales = nn.Parameter(torch.zeros(len(h.value_layers)))
        self.skips = h.num_layers // 2
        self.skip_weights = nn.Parameter(torch.zeros(self.skips, h.model_dim))
        self.blocks = nn.ModuleList()
        for layer, block in enumerate(ours.blocks):
            maps = {}
            for path in MAPS:
                ours_map = block.get_submodule(path)
                rank = len(ours_map.lora.B)
                maps[path] = TwoPathLinear(ours_map.weight.detach().clone(), rank, dtype)
            self.blocks.append(Block(h, layer, maps))
        weights = {name.replace(".lora.", "."): w for name, w in ours.state_dict().items()}
        if dtype is torch.float64:
            self.double()
        self.to(next(ours.parameters()).device)
        self.load_state_dict(weights)

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the normalized output of the blocks for ids (B, T), (B, T, d)."""
        h, dtype = self.h, self.dtype
        x = self.embedding(ids)
        buckets = torch.full_like(ids, h.bigram_vocab_size - 1)
        buckets[:, 1:] = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % (h.bigram_vocab_size - 1)
        x = x + self.bigram(buckets) * self.bigram_scale.to(dtype)
        x = rms_norm(x)
        gate = torch.sigmoid(self.smear_gate).to(dtype)
        previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        x = (1 - gate) * x + gate * previous
        angles = rope_angles(h, ids.size(1), ids.device)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        value_embedding = self.value_embedding(ids)
        x0, first_values, skips = x, None, []
        for layer, block in enumerate(self.blocks):
            if self.skips <= layer < 2 * self.skips:
                x = x + self.skip_weights[layer - self.skips].to(dtype) * skips.pop()
            own = None
            if layer in h.value_layers:
                own = value_embedding * self.value_scales[h.value_layers.index(layer)].to(dtype)
            x, values = block(x, x0, cos, sin, own, first_values)
            if layer == 0:
                first_values = values
            if layer < self.skips:
                skips.append(x)
        return rms_norm(x)

    def predict(self, ids: Tensor) -> Tensor:
        """Return float32 logits of all positions of ids (B, T), (B, T, vocabulary)."""
        x = self.hidden(ids)
        logits = F.linear(x, self.embedding.weight.to(x.dtype)).float()
        return self.h.logit_softcap * torch.tanh(logits / self.h.logit_softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats."""
        logits = self.predict(ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Bring the singular values of a matrix (rows, columns) near 1."""
    x = g.bfloat16() if g.is_cuda else g.float()  # as train_gpt has it
    x = x / (x.norm() + 1e-7)
    if g.size(0) > g.size(1):
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    if g.size(0) > g.size(1):
        x = x.T
    return x.to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum, one matrix after the other."""

    def __init__(self, groups: list[dict], momentum: float, steps: int) -> None:
        super().__init__(groups, {"momentum": momentum})
        self.steps = steps

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"]
                momentum.mul_(group["momentum"]).add_(p.grad)
                update = newton_schulz(p.grad.add(momentum, alpha=group["momentum"]), self.steps)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


class TextbookStep:
    """A training step of the textbook's network."""

    def __init__(self, h: Hyperparameters, model: Textbook, compiled: bool) -> None:
        self.h, self.model, self.count = h, model.train(), 0
        self.forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
        groups = {TwoPathLinear: [], CastLinear: [], CastEmbedding: []}
        scalars = []
        for module in model.modules():
            groups.get(type(module), scalars).extend(module.parameters(recurse=False))
        factors, matrices, embeddings = groups.values()
        low_rank = {"params": factors, "lr": h.factor_lr, "weight_decay": h.factor_wd}
        full = {"params": matrices, "lr": h.matrix_lr, "weight_decay": h.muon_wd}
        self.muon = Muon([low_rank, full], h.muon_momentum, h.muon_backend_steps)
        tables = {"params": embeddings, "lr": h.tied_embed_lr, "weight_decay": h.embed_wd}
        rest = {"params": scalars, "lr": h.scalar_lr, "weight_decay": h.adam_wd}
        betas = (h.beta1, h.beta2)
        self.adam = torch.optim.AdamW([tables, rest], betas=betas, eps=h.adam_eps, fused=True)
        self.ema = {name: w.detach().float().clone() for name, w in model.state_dict().items()}

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        h, total = self.h, 0.0
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        for ids, targets in batches:
            loss = self.forward(ids, targets) / len(batches)
            loss.backward()
            total = total + loss.detach()
        warm = min(1.0, self.count / max(h.muon_momentum_warmup_steps, 1))
        for group in self.muon.param_groups:
            group["momentum"] = (1 - warm) * h.muon_momentum_warmup_start + warm * h.muon_momentum
        if h.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), h.grad_clip_norm)
        self.muon.step()
        self.adam.step()
        with torch.no_grad():
            for name, w in self.model.state_dict().items():
                self.ema[name].mul_(h.ema_decay).add_(w.float(), alpha=1 - h.ema_decay)
        self.count += 1
        return total
