"""The model against a plain restatement of its definition, its switches, what it promises."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from helpers import ROOT, finish, head_input, start, train_gpt
from reference import attention, linear_map, normal, tokens

# ---- The forward pass, restated ------------------------------------------------------------------


def rms_normalized(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def rotated(x, position, length, h):
    """One head's vector at one position: dimension i turns with i + rope_dims / 2."""
    out, half, base = x.clone(), h.rope_dims // 2, h.rope_base
    if 0 < h.rope_stretch_from < length:
        base *= (length / h.rope_stretch_from) ** (h.rope_dims / (h.rope_dims - 2))
    for i in range(half):
        angle = position * base ** (-2 * i / h.rope_dims)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return out


class Restated:
    """The model in float64, one position and head at a time.

    It shares nothing with the model but its values; adapters take the textbook's two paths.
    """

    def __init__(self, h, model):
        self.h, self.model = h, model
        self.p = {name: value.detach() for name, value in model.named_parameters()}
        layers = [int(i) for i in h.ve_layers.split(",")] if h.ve_enabled else []
        self.value_layers = [i if i >= 0 else h.num_layers + i for i in layers]

    def order(self):
        """Return the layers in the order in which they run."""
        layers = list(range(self.h.num_layers))
        if not self.h.recur_layers:
            return layers
        first, _, last = self.h.recur_layers.partition("-")
        again = list(range(int(first), int(last or first) + 1)) * (self.h.recur_times - 1)
        end = int(last or first) + 1
        return layers[:end] + again + layers[end:]

    def logits(self, row):
        """Return (T, vocabulary) for one row of tokens."""
        h, p = self.h, self.p
        x = x0 = self.embed(row)
        left, first_values, half = {}, None, h.num_layers // 2
        for layer in self.order():
            at, i = f"blocks.{layer}", layer - half
            if h.skips_enabled and 0 <= i < half:  # the stream that the mirrored layer left last
                skip = p["skip_weights"][i] * left[half - 1 - i]
                if h.skip_gates_enabled:
                    gate = torch.sigmoid(p["skip_gates"][i])
                    x = gate * x + (1 - gate) * skip
                else:
                    x = x + skip
            x = p[f"{at}.stream_mix"] * x + p[f"{at}.embedding_mix"] * x0
            scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
            seen = rms_normalized(x) * scale
            attended, values = self.attend(layer, seen, row, first_values)
            first_values = values if first_values is None else first_values
            x = x + p[f"{at}.attention_scale"] * attended
            if layer < h.parallel_from:
                seen = rms_normalized(x) * scale
            x = x + p[f"{at}.mlp_scale"] * self.mlp(f"{at}.mlp", seen)
            left[layer] = x
        z = rms_normalized(x) @ p["embedding.weight"].T
        return h.logit_softcap * torch.tanh(z / h.logit_softcap)

    def linear(self, name, x, activation=None):
        layer = self.model.get_submodule(name)
        return linear_map(layer, dict(layer.named_parameters()), x, activation)

    def mlp(self, at, x):
        if self.h.mlp_gated:  # GEGLU
            gate = self.linear(f"{at}.gate", x, lambda y: y * (1 + torch.erf(y / 2**0.5)) / 2)
            return self.linear(f"{at}.proj", self.linear(f"{at}.fc", x) * gate)
        inner = self.linear(f"{at}.fc", x, lambda y: torch.where(y > 0, y, 0.5 * y) ** 2)
        return self.linear(f"{at}.proj", inner)

    def embed(self, row):
        p = self.p
        x = p["embedding.weight"][row]
        if self.h.bigram_vocab_size:
            last = self.h.bigram_vocab_size - 1
            pairs = itertools.pairwise(row)
            hashed = [last, *(((36313 * now) ^ (27191 * before)) % last for before, now in pairs)]
            rows, signs = p["bigram.weight"][hashed], self.model.bigram.signs
            if signs:
                rows = rows * signs["previous"].weight[[0, *row[:-1]]]
                rows = rows * signs["current"].weight[row]
            if self.h.bigram_gate:
                z = rms_normalized(x) @ p["bigram.gates"].T
                z = torch.cat([0 * z[:1, 0], z[:-1, 0]]) + z[:, 1]
                rows = rows * (2 / (1 + torch.exp(-z)))[:, None]
            x = x + p["bigram_scale"] * self.linear("bigram.proj", rows)
        x = rms_normalized(x)
        if self.h.smear_enabled:
            gate, before = torch.sigmoid(p["smear_gate"]), torch.cat([0 * x[:1], x[:-1]])
            x = (1 - gate) * x + gate * before
        return x

    def attend(self, layer, seen, row, first_values):
        """Return the output of a layer's attention, and its own values."""
        h, p, at = self.h, self.p, f"blocks.{layer}.attention"
        q, k, own_values = (self.linear(f"{at}.{name}", seen) for name in "qkv")
        v = own_values
        if layer in self.value_layers:
            added = self.linear("value_embedding.proj", p["value_embedding.weight"][row])
            v = v + p["value_scales"][self.value_layers.index(layer)] * added
        if h.vrl_enabled and layer:
            v = v + torch.sigmoid(p[f"{at}.value_gate"]) * first_values
        width, group = h.model_dim // h.num_heads, h.num_heads // h.num_kv_heads
        heads = []
        for head in range(h.num_heads):
            mine, theirs = (slice(i * width, (i + 1) * width) for i in (head, head // group))
            gain = p[f"{at}.q_gain"][head]
            y = self.one_head(gain, q[:, mine], k[:, theirs], v[:, theirs])
            if layer >= h.num_layers - h.xsa_last_n:
                own = v[:, theirs]
                share = (y * own).sum(1) / (own * own).sum(1)
                y = y - share[:, None] * own
            if h.induction:
                y = y + p[f"{at}.induction_gain"][head] * self.followed(row) @ v[:, theirs]
            heads.append(y)
        return self.linear(f"{at}.proj", torch.hstack(heads)), own_values

    def followed(self, row):
        """Return how much each position looks at each of those that followed the same tokens."""
        weights = torch.zeros(len(row), len(row), dtype=torch.float64)
        for i, j in itertools.product(range(len(row)), repeat=2):
            for n, log_strength in enumerate(self.p["induction.log_strengths"], start=1):
                if n <= j < i and row[j - n : j] == row[i - n + 1 : i + 1]:
                    weights[i, j] += log_strength.exp()
        return weights / (1 + weights.sum(1, keepdim=True))

    def one_head(self, gain, q, k, v):
        outputs, keys = [], []
        for t in range(len(q)):
            query = gain * rotated(rms_normalized(q[t]), t, len(q), self.h)
            keys.append(rotated(rms_normalized(k[t]), t, len(k), self.h))
            weights = (torch.stack(keys) @ query / math.sqrt(len(query))).exp()
            outputs.append((weights / weights.sum()) @ v[: t + 1])
        return torch.stack(outputs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"xsa_last_n": 0},
        {"rope_dims": 0},
        {"rope_base": 50.0},
        {"rope_stretch_from": 3},
        {"vrl_enabled": 0},
        {"bigram_vocab_size": 0},
        {"smear_enabled": 0},
        {"skips_enabled": 0},
        {"skip_gates_enabled": 1},
        {"induction": 1},
        {"induction": 3, "parallel_from": 0},
        {"ve_enabled": 0},
        {"ve_layers": "3,1"},
        {"ln_scale": 0},
        {"logit_softcap": 2.0},
        {"num_layers": 5},
        {"num_layers": 1, "ve_layers": "0"},
        {"num_kv_heads": 1},
        {"mlp_mult": 1.5},
        {"parallel_from": 2},
        {"recur_layers": "0-1", "recur_times": 2},
        {"recur_layers": "3", "recur_times": 4},
        {"num_layers": 6, "recur_layers": "2-3", "recur_times": 3, "skip_gates_enabled": 1},
        {"map_seed": 7, "map_seed_stride": 99},
        {"map_basis": "learned"},
        {"map_basis": "attention.v@1-2=orthogonal"},
        {"map_basis": "orthogonal,bigram.signs=rademacher"},
        {"map_basis": "learned,bigram.signs=rademacher", "map_adapter": "none", "bigram_gate": 1},
        {"map_basis": "orthogonal,bigram=gaussian,value_embedding=orthogonal"},
        {"map_adapter": "sparse:0.2+lora:4", "map_scale": "row", "map_gate": "mlp=0.5"},
        {"mlp_gated": 1, "map_adapter": "vera:3", "map_scale": "map", "map_gate": "mlp=0.5"},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "all-on",
)
def test_logits_are_those_of_the_restated_model(settings, random_model, changes):
    """And the switch is no dummy: its logits are not those of the model that has everything on."""
    h, ids = settings(**changes), tokens(2, 9)
    ids[:, 5:8] = ids[:, 1:4]
    model = random_model(h, torch.float64)
    with torch.no_grad():
        logits, restated = model.predict(ids), Restated(h, model)
        expected = torch.stack([restated.logits(row) for row in ids.tolist()])
        # The head alone is float32: its sigmoid, good to some units in the last place, is times 2c.
        atol = 10 * 2 * h.logit_softcap * 2**-24
        torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=atol)
        if changes:
            base = random_model(settings(), torch.float64).predict(ids)
            assert (logits - base).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_types_that_train_agree_with_float64(settings, random_model, dtype):
    """Some dozen roundings in a row, in each of 4 layers, of which each may err by eps / 2."""
    ids = tokens(2, 16)
    exact = random_model(settings(), torch.float64).predict(ids)
    logits = random_model(settings(), dtype).predict(ids)
    assert logits.dtype is torch.float32
    assert (logits - exact).norm() < 24 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("scale", [0.3, torch.tensor([[0.2], [-1.5], [1.0]]).double()])
def test_the_norm_is_torchs_with_its_gradient(scale):
    """By a number, or of rotated vectors by a gain for each head."""
    x, weights = normal(2, 5, 3, 8).requires_grad_(), normal(2, 5, 3, 8, seed=1)
    learned, turn, rotated_x = [x], (), x
    if isinstance(scale, torch.Tensor):
        learned.append(scale.requires_grad_())
        turn = normal(5, 1, 2, seed=2).cos(), normal(5, 1, 2, seed=2).sin()
        rotated_x = train_gpt.rotate(x, *turn)
    y, expected = train_gpt.norm(x, scale, *turn), scale * F.rms_norm(rotated_x, (8,))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad((each * weights).sum(), learned) for each in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_row_of_zeros_and_of_huge_values_is_finite(dtype):
    x = torch.tensor([[0.0], [1e15], [1e-3]]).expand(3, 64).to(dtype, copy=True).requires_grad_()
    y = train_gpt.norm(x)
    y.sum().backward()
    assert y[0].abs().max() == 0
    torch.testing.assert_close(y[1:].float(), torch.ones(2, 64), rtol=0.06, atol=0)
    assert x.grad.isfinite().all()


# ---- Attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("longest_plain", [0, 10_000])
@pytest.mark.parametrize("length", [1, 5, 300, 1025])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_both_ways_to_compute_attention_are_the_formula(
    length, kv_heads, longest_plain, monkeypatch
):
    """By PyTorch's kernel, and by plain products, which also attend with few queries."""
    monkeypatch.setattr(train_gpt, "PLAIN_ATTENTION", dict.fromkeys((True, False), longest_plain))
    shapes = [(1, length, heads, 8) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    expected = attention(q, k, v, length)
    out, last = (train_gpt.causal_attention(queries, k, v) for queries in (q, q[:, -2:]))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, expected[:, -2:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("queries", "keys", "span"),
    [(300, 300, 300), (300, 300, 1), (300, 300, 70), (300, 600, 300), (260, 1300, 129), (1, 40, 7)],
)
def test_plain_products_see_the_span_before_each_query(queries, keys, span):
    """Blocks have 128 queries, 256 from 1,025 keys on."""
    shapes = [(2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8)]
    q, k, v = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    out, expected = train_gpt.block_attention(q, k, v, span), attention(q, k, v, span)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


# ---- Validity of the predictions -----------------------------------------------------------------


@pytest.mark.parametrize(("length", "changed"), [(16, 1), (16, 15), (1100, 700)])
def test_later_tokens_do_not_change_earlier_predictions(settings, random_model, length, changed):
    model, ids = random_model(settings(), torch.float64), tokens(2, length)
    other = ids.clone()
    other[:, changed:] = (other[:, changed:] + 1 + tokens(2, length - changed, seed=1) % 63) % 64
    with torch.no_grad():
        before, after = head_input(model, ids), head_input(model, other)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-12)
    assert (after[:, changed] - before[:, changed]).abs().max() > 1e-3


def test_losses_are_those_of_a_full_normalized_distribution(settings, random_model):
    """exp(-loss) over all tokens that could come next sums to 1, at every position."""
    model, ids, targets = random_model(settings()), tokens(2, 16), tokens(2, 16, seed=1)
    with torch.no_grad():
        every = [model.token_losses(ids, torch.full_like(ids, token)) for token in range(64)]
        probabilities = torch.stack(every, -1).double().neg().exp()
        ones = torch.ones(2, 16, dtype=torch.float64)
        torch.testing.assert_close(probabilities.sum(-1), ones, atol=1e-5, rtol=0)
        softmax = model.predict(ids).double().softmax(-1)
        torch.testing.assert_close(probabilities, softmax, rtol=1e-4, atol=1e-6)
        losses = softmax.gather(-1, targets[..., None])[..., 0].log().neg().float()
        torch.testing.assert_close(model.token_losses(ids, targets[:, -3:]), losses[:, -3:])
        torch.testing.assert_close(model(ids, targets), losses.mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recur_layers": "2-3", "recur_times": 2},
        {"num_layers": 1, "ve_enabled": 0},
    ],
)
@pytest.mark.parametrize(("last", "computed"), [(1, 1), (2, 2), (3, 16), (16, 16)])
def test_the_last_block_computes_few_positions_alone(
    settings, random_model, changes, last, computed
):
    """And they are what they are among all, in training as in evaluation."""
    model, ids = random_model(settings(**changes), torch.float64), tokens(2, 16)
    everything, widths = head_input(model, ids), []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            kept = head_input(model, ids, last)
        torch.testing.assert_close(kept, everything[:, -last:], rtol=0, atol=1e-12)
        blocks = len(widths) - 1
        assert widths == [16] * blocks + [computed]
        widths.clear()


# ---- Losses and ensembles ------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.3, 1.0), (1.0, 3.0), (0.0, 0.5)])
def test_the_distillation_loss_is_its_formula(settings, random_model, alpha, temperature):
    """The loss is summed in float32 over 64 tokens, and logits are up to 30."""
    h = settings(distill_alpha=alpha, distill_temperature=temperature)
    model, ids, targets = random_model(h), tokens(3, 16), tokens(3, 16, seed=1)
    taught = 3 * normal(3, 16, 64, seed=2)
    student = model.predict(ids, 16).detach().double()
    p, q = ((z / temperature).softmax(-1) for z in (taught, student))
    divergence = (p * (p / q).log()).sum(-1).mean()
    entropy = -student.softmax(-1).gather(-1, targets[..., None]).log().mean()
    expected = alpha * entropy + (1 - alpha) * temperature**2 * divergence
    loss = model(ids, targets, taught.float()).item()
    assert loss == pytest.approx(expected.item(), rel=64 * 30 * 2**-24)


def test_a_teacher_is_not_learned_and_does_not_drop_out(settings):
    h = settings(self_distill=1, distill_start_frac=0.2, dropout=0.5)
    model = train_gpt.make_model(h).train()
    phases = train_gpt.Phases(h, model, None, compiled=False)
    phases.enter(0.2)
    ids = tokens(2, 16)
    assert not any(p.requires_grad for p in phases.teacher.parameters())
    first, second = phases.teacher_logits(ids), phases.teacher_logits(ids)
    assert torch.equal(first, second)
    assert not first.requires_grad


@pytest.fixture(scope="module")
def ensemble(settings) -> train_gpt.Ensemble:
    torch.manual_seed(0)
    h = settings(ensemble=2, map_basis="m0.all=uniform,m1.all=orthogonal")
    model = train_gpt.make_model(h)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def test_an_ensemble_predicts_the_mean_of_its_members_logits(ensemble):
    ids, targets = tokens(2, 16), tokens(2, 16, seed=1)
    with torch.no_grad():
        each = [member.predict(ids, 16) for member in ensemble.members]
        assert (each[0] - each[1]).abs().max() > 0.1
        mean = (each[0] + each[1]) / 2
        torch.testing.assert_close(ensemble.predict(ids, 16), mean)
        expected = F.cross_entropy(mean.flatten(0, 1), targets.flatten(), reduction="none")
        torch.testing.assert_close(ensemble.token_losses(ids, targets).flatten(), expected)


def test_members_of_an_ensemble_learn_each_for_itself(ensemble):
    """What the others know does not touch the gradient of a member."""
    ids, targets = tokens(2, 16), tokens(2, 16, seed=1)
    learned = list(ensemble.members[0].parameters())
    alone = torch.autograd.grad(ensemble.members[0](ids, targets) / 2, learned)
    together = torch.autograd.grad(ensemble(ids, targets), learned)
    assert all(map(torch.equal, together, alone))


def test_members_of_an_ensemble_have_maps_and_weights_of_their_own(settings):
    model = train_gpt.make_model(settings(ensemble=3))
    assert len({spec.seed for spec in model.table.values() if spec.is_random}) == 3 * 24
    for one, other in itertools.combinations(model.members, 2):
        ours, theirs = one.blocks[0].mlp.fc, other.blocks[0].mlp.fc
        assert not torch.equal(ours.weight, theirs.weight)
        assert not torch.equal(ours.lora.B, theirs.lora.B)
        assert not torch.equal(one.embedding.weight, other.embedding.weight)


# ---- Recurrence and dropout ----------------------------------------------------------------------


def test_layers_recur_from_their_fraction_of_training_on(settings, random_model):
    h, ids = settings(recur_layers="1-2", recur_frac=0.4), tokens(2, 16)
    model, plain = random_model(h), random_model(settings())
    phases = train_gpt.Phases(h, model, None, compiled=False)
    for progress, recurs in ((0.0, False), (0.39, False), (0.4, True), (1.0, True), (0.0, False)):
        phases.enter(progress)
        assert torch.equal(model.predict(ids), plain.predict(ids)) is not recurs


@pytest.mark.parametrize("parallel", [0, 4])
def test_dropout_is_of_training_alone(settings, random_model, parallel):
    ids = tokens(2, 16)
    model = random_model(settings(dropout=0.3, parallel_from=parallel))
    plain = random_model(settings(parallel_from=parallel))
    with torch.no_grad():
        model.train()
        assert not torch.equal(model.predict(ids, 16), model.predict(ids, 16))
        model.eval()
        assert torch.equal(model.predict(ids, 16), plain.train().predict(ids, 16))


# ---- Initial values ------------------------------------------------------------------------------


def test_initial_values_are_the_references(settings):
    torch.manual_seed(0)
    h = settings(num_layers=5, vocab_size=512, model_dim=64, bigram_gate=1)
    values = {name: p.detach() for name, p in train_gpt.GPT(h).named_parameters()}
    constants = {"q_gain": 1.5, "attention_scale": 1, "mlp_scale": 1, "bigram_scale": 0.05}
    constants |= {"skip_weights": 1, "smear_gate": 0, "value_gate": 0}
    constants |= {"lora.A": 0, "bigram.weight": 0, "bigram.gates": 0}
    for ending, constant in constants.items():
        found = [p.flatten() for name, p in values.items() if name.endswith(ending)]
        assert torch.cat(found).unique().tolist() == pytest.approx([constant]), ending
    for name in [name for name in values if name.endswith("lora.B")]:
        std = values[name].size(1) ** -0.5
        assert values[name].mean().abs() < 0.4 * std, name
        assert values[name].std() == pytest.approx(std, rel=0.2), name
    for layer in range(5):
        share = 1 / (1 + math.exp(-3 * (layer / 4 - 0.5)))
        for of, expected in (("stream", share), ("embedding", 1 - share)):
            mix = values[f"blocks.{layer}.{of}_mix"]
            torch.testing.assert_close(mix, torch.full((64,), expected))
    assert values["embedding.weight"].std() == pytest.approx(0.005, rel=0.03)
    assert "blocks.0.attention.value_gate" not in values, "layer 0 has no earlier values to add"


# ---- Interface -----------------------------------------------------------------------------------


def test_importing_the_script_has_no_side_effects(tmp_path):
    """In a shell that torchrun and a careless user have filled.

    Nothing is read, made, printed or joined.
    """
    code = """
import threading, torch
before = torch.get_rng_state()
import train_gpt
assert torch.equal(torch.get_rng_state(), before)
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1
"""
    rank = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    shell = {"PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": 1, "NUM_LAYERS": "banana"} | rank
    done = finish(start(shell, launcher=("-c", code), cwd=tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_names_that_other_peoples_code_imports():
    layer = inspect.signature(train_gpt.FrozenRandomLinearWithLoRA).parameters
    assert list(layer)[:5] == ["in_features", "out_features", "rank", "seed", "bias"]
    assert [layer[name].default for name in ("rank", "seed", "bias")] == [32, 0, False]
    assert issubclass(train_gpt.FrozenRandomLinearWithLoRA, torch.nn.Module)
    assert issubclass(train_gpt.GPT, torch.nn.Module)
    assert issubclass(train_gpt.Muon, torch.optim.Optimizer)
    assert inspect.signature(train_gpt.main).bind().arguments == {}  # main() alone runs it


def test_sizes_of_the_full_configuration():
    """No map is generated: learned maps on the meta device have all other parameters."""
    table = train_gpt.build_map_table(train_gpt.load_settings({}))
    specs = [spec for spec in table.values() if spec.is_random]
    assert len(specs) == 66
    assert {spec.basis for spec in specs} == {"orthogonal"}
    assert sum(spec.out_features * spec.in_features for spec in specs) == 25_952_256
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.load_settings({}, map_basis="learned"))
    trained = sum(sum(spec.shape) * spec.adapters()["lora"] for spec in specs)
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") not in {spec.name for spec in specs}:
            trained += p.numel()
    # PR #1113 has 23 more scalars among its gates.
    assert trained == pytest.approx(3_744_892, abs=30)


# ---- Device --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "usable", "is_there", "visible", "device"),
    [
        ("auto", True, True, "0", "cuda:3"),
        ("cuda", True, True, "0", "cuda:3"),
        ("cpu", True, True, "0", "cpu"),
        ("auto", False, False, "0", "cpu"),
        ("auto", False, True, "", "cpu"),  # hidden on purpose
        ("auto", False, True, "0", "error"),  # the CPU is hundreds of times slower
        ("cuda", False, False, "0", "error"),
    ],
)
def test_the_device_is_the_gpu_unless_there_is_none_or_nobody_wants_it(
    wanted, usable, is_there, visible, device, monkeypatch, tmp_path
):
    """COMPILE=auto compiles on the GPU alone."""
    monkeypatch.setattr(train_gpt, "GPU_FILE", tmp_path / "nvidia0")
    if is_there:
        train_gpt.GPU_FILE.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", "3")
    h = train_gpt.load_settings({}, device=wanted)
    if device == "error":
        with pytest.raises(train_gpt.UserError, match=r"no usable GPU.*DEVICE=cpu"):
            train_gpt.Distributed(h)
        return
    dist = train_gpt.Distributed(h)
    assert (str(dist.device), dist.on_cuda, dist.compile) == (device, *[device != "cpu"] * 2)
    for choice in ("0", "1"):
        h = train_gpt.load_settings({}, device=wanted, compile=choice)
        assert train_gpt.Distributed(h).compile == (choice == "1")
