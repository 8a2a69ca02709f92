"""Muon, learning rates, averages of the weights, the clock and the schedule."""

from __future__ import annotations

import itertools
import time

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import train_gpt
from reference import tokens

Role = train_gpt.Role

# ---- Muon ----------------------------------------------------------------------------------------

# Five Newton-Schulz steps in float32 multiply an early rounding error by 3.4445^5 at most; the
# products here sum up to 48 terms.
ROUNDING = 3.4445**5 * 48 * 2**-24


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """Take 5 steps of x <- 3.4445 x - 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x, by singular values."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ vt


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24), (1, 9), (9, 1)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    torch.manual_seed(0)
    g = torch.randn(3, *shape) * torch.tensor([1e-2, 1.0, 1e4])[:, None, None]
    for x, given in zip(train_gpt.orthogonalize(g, 5), g, strict=True):
        torch.testing.assert_close(x.double(), newton_schulz(given), rtol=0, atol=ROUNDING)
        if shape != (24, 24):  # which has singular values near zero: 5 steps leave them small
            singular = torch.linalg.svdvals(x)
            assert 0.65 < singular.min() <= singular.max() < 1.25
    # The gradient of B is zero while A is: no division by its norm.
    assert torch.equal(train_gpt.orthogonalize(0 * g, 5), 0 * g)


def test_muon_is_nesterov_momentum_orthogonalized_with_decoupled_decay():
    """Matrices of one shape share a batch; one without a gradient is left alone."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (24, 8), (5, 5)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [*shapes, (24, 8)]]
    *weights, untouched = [p.detach().double() for p in params]
    momenta = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    optimizer = train_gpt.Muon(params, lr=0.1, momentum=0.9, weight_decay=0.04)
    for _ in range(3):
        for p in params[:-1]:
            p.grad = torch.randn(p.shape)
        gradients = [p.grad.double() for p in params[:-1]]
        optimizer.step()
        for i, (p, gradient, (rows, columns)) in enumerate(
            zip(params[:-1], gradients, shapes, strict=True)
        ):
            momenta[i] = 0.9 * momenta[i] + gradient
            update = newton_schulz(gradient + 0.9 * momenta[i])
            step = 0.1 * max(1, rows / columns) ** 0.5 * update
            weights[i] = weights[i] * (1 - 0.1 * 0.04) - step
            torch.testing.assert_close(p.detach().double(), weights[i], rtol=1e-6, atol=ROUNDING)
    assert torch.equal(params[-1].double(), untouched)


def test_a_step_warms_momentum_up_and_scales_every_learning_rate(settings, random_model, processes):
    rates = {"matrix_lr": 0.02, "factor_lr": 0.03, "tied_embed_lr": 0.04, "scalar_lr": 0.05}
    h = settings(muon_momentum_warmup_steps=100, map_basis="orthogonal,mlp=learned", **rates)
    model = random_model(h)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def unchanged() -> list[str]:
        return [name for name, p in model.state_dict().items() if torch.equal(p, before[name])]

    optimizers = train_gpt.Optimizers(train_gpt.tensors_by_role(model), h, processes)
    for step, momentum in ((0, 0.92), (50, 0.955), (100, 0.99), (1000, 0.99)):
        model(tokens(2, 16), tokens(2, 16, seed=1)).backward()
        optimizers.step(step, 0.0)
        for group in optimizers.muon.param_groups:
            assert group["momentum"] == pytest.approx(momentum)
        assert all(p.grad is None for p in model.parameters()), "the next step begins from nothing"
    assert unchanged() == list(before)
    model(tokens(2, 16), tokens(2, 16, seed=1)).backward()
    optimizers.step(1000, 0.5)
    rate_of = {p: group["lr"] for group in optimizers.param_groups for p in group["params"]}
    roles = (Role.MATRIX, Role.FACTOR, Role.EMBEDDING, Role.SCALAR)
    for role, rate in zip(roles, rates.values(), strict=True):
        for name, p in train_gpt.tensors_by_role(model)[role].items():
            assert rate_of[p] == pytest.approx(0.5 * rate), name
    assert unchanged() == []


# ---- Averages ------------------------------------------------------------------------------------


def averaged(h, history: list[torch.Tensor], lr_scales: list[float]) -> dict[str, torch.Tensor]:
    """Return the candidates of one parameter that had these values, by name."""
    p = torch.nn.Parameter(torch.zeros_like(history[0]))
    averages = train_gpt.WeightAverages([p], h)
    for step, (value, lr_scale) in enumerate(zip(history, lr_scales, strict=True)):
        with torch.no_grad():
            p.copy_(value)
        averages.update(step, lr_scale)
    found = averages.candidates()
    with torch.no_grad():
        p.fill_(torch.nan)  # candidates do not change with the weights
    return {name: values[0] for name, values in found.items()}


@pytest.mark.parametrize("updates", [1, 2, 40])
def test_ema_is_the_closed_formula_without_a_pull_to_its_start(settings, updates):
    """Divided by its total weight, so that after one update it is the weights."""
    torch.manual_seed(0)
    history, decay = [torch.randn(5, 3) for _ in range(updates)], 0.97
    ema = averaged(settings(ema_decay=decay), history, [1.0] * updates)["ema"]
    weights = [decay ** (updates - 1 - i) for i in range(updates)]
    weighted = [w * value.double() for w, value in zip(weights, history, strict=True)]
    # Each update rounds values of up to 4 three times.
    atol = 4 * 3 * updates * 2**-24
    torch.testing.assert_close(ema.double(), sum(weighted) / sum(weights), rtol=0, atol=atol)


def test_swa_is_the_plain_mean_of_late_weights(settings):
    torch.manual_seed(0)
    history, lr_scales = [torch.randn(4) for _ in range(14)], [1.0] * 6 + [0.2] + [0.19] * 7
    found = averaged(settings(swa_interval=3, swa_threshold=0.2), history, lr_scales)
    torch.testing.assert_close(found["swa"], (history[9] + history[12]) / 2)
    assert torch.equal(found["last"], history[-1])


def test_averages_that_are_off_or_empty_are_no_candidates(settings):
    """Also where EXPORT_ONLY with EMA_DECAY=0 reads a checkpoint that has one."""
    history = [torch.ones(2)] * 3
    assert set(averaged(settings(ema_decay=0.0, swa_enabled=0), history, [0.1] * 3)) == {"last"}
    assert set(averaged(settings(ema_decay=0.9), history, [1.0] * 3)) == {"last", "ema"}
    p = torch.nn.Parameter(torch.ones(3))
    trained = train_gpt.WeightAverages([p], settings(ema_decay=0.9, swa_interval=1))
    trained.update(0, 0.1)
    for decay, expected in ((0.9, {"last", "ema", "swa"}), (0.0, {"last", "swa"})):
        averages = train_gpt.WeightAverages([p], settings(ema_decay=decay))
        averages.load_state_dict(trained.state_dict())
        assert set(averages.candidates()) == expected


def test_averages_leave_frozen_tensors_as_they_stand(settings):
    h = settings(ema_decay=0.9, swa_interval=1, swa_threshold=1)
    frozen, learned = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    averages = train_gpt.WeightAverages([frozen, learned], h)
    for step in range(8):
        with torch.no_grad():
            frozen.add_(float(frozen.requires_grad))
            learned.add_(1.0)
        averages.update(step, 0.5)
        if step == 3:
            frozen.requires_grad_(False)
    assert all(frozen not in means for means in averages.means.values()), "their memory is freed"
    for kept, _ in averages.candidates().values():
        assert kept.tolist() == [4, 4, 4]
        assert kept.data_ptr() != frozen.data_ptr(), "a candidate is a copy"
    learned.requires_grad_(False)  # by an export, which trains no more: its mean is as it was
    assert averages.candidates()["swa"][1].tolist() == [4.5, 4.5, 4.5]


# ---- Clock and schedule --------------------------------------------------------------------------


def took(clock: train_gpt.Clock, *steps: float) -> None:
    """Let the clock count steps of so many seconds."""
    for seconds in steps:
        clock.elapsed += seconds
        clock.add_step(seconds)


def simulate(clock: train_gpt.Clock, seconds_of_step, **warmdown: float) -> list[float]:
    """Return the learning-rate scale of each step of a run whose steps take so long."""
    h = train_gpt.load_settings({}, **warmdown)
    scales = []
    while (remaining := clock.remaining(len(scales))) > 0:
        step = len(scales)
        scales.append(train_gpt.learning_rate_scale(h, step, remaining, clock.progress(step)))
        took(clock, seconds_of_step(step))
    return scales


def test_a_run_limited_by_steps_warms_down_linearly():
    scales = simulate(train_gpt.Clock(100, 0), lambda step: 1e6, warmdown_iters=30)
    assert scales == pytest.approx([1.0] * 70 + [k / 30 for k in range(30, 0, -1)])
    scales = simulate(train_gpt.Clock(20, 0), lambda step: 1e6, warmdown_iters=3500)
    assert scales == pytest.approx([k / 20 for k in range(20, 0, -1)]), "over all of a short run"


@pytest.mark.parametrize("slow", [{}, {0: 33.0}, {150: 33.0}, {0: 33.0, 100: 10.0, 101: 10.0}])
def test_a_run_limited_by_time_warms_down_over_its_last_steps_slow_steps_or_not(slow):
    """A first step of 33 s made a published schedule believe that training was over."""
    clock = train_gpt.Clock(20_000, 100.0)
    scales = simulate(clock, lambda step: slow.get(step, 0.1), warmdown_iters=300)
    fast = round((100 - sum(slow.values())) / 0.1)
    assert abs(len(scales) - len(slow) - fast) <= 2
    assert scales.count(1.0) == pytest.approx(len(scales) - 300, abs=2)
    assert scales[-1] <= 2 / 300
    assert all(later <= earlier for earlier, later in itertools.pairwise(scales))
    assert clock.elapsed <= 100.0 + 0.1


def test_progress_is_by_steps_or_by_the_clock_whichever_is_further():
    """A run that its time limit will end must not wait for a fraction of its steps."""
    clock = train_gpt.Clock(1000, 100.0)
    for step in range(400):
        assert clock.progress(step) == pytest.approx(step / 400)  # time is over after 400 steps
        took(clock, 0.25)
    took(clock, 50.0)
    assert clock.progress(401) == 1.0, "it never goes past the end"
    quick = train_gpt.Clock(1000, 100.0)
    took(quick, 1.0)
    assert quick.progress(500) == 0.5


def test_the_clock_counts_training_and_not_what_it_is_paused_for(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = train_gpt.Clock(100, 60.0)
    now[0] += 500  # it is made long before training starts
    clock.start()
    for _ in range(6):
        now[0] += 2
        clock.add_step(clock.lap())
    assert (clock.elapsed, clock.remaining(6)) == (12, 24)
    now[0] += 1000
    clock.start()
    now[0] += 2
    clock.add_step(clock.lap())
    assert clock.elapsed == 14
    continued = train_gpt.Clock(100, 60.0)
    continued.load_state_dict(clock.state_dict())
    assert continued.elapsed == 14
    assert continued.remaining(7) == clock.remaining(7)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    iterations=st.integers(1, 60),
    seconds=st.floats(0.01, 100),
    warmdown=st.integers(0, 100),
    times=st.lists(st.floats(1e-4, 50), min_size=60, max_size=60),
)
def test_the_schedule_stays_in_its_bounds(iterations, seconds, warmdown, times):
    clock = train_gpt.Clock(iterations, seconds)
    scales = simulate(clock, times.__getitem__, warmdown_iters=warmdown)
    assert 1 <= len(scales) <= iterations
    assert all(0 < scale <= 1 for scale in scales)
    assert clock.elapsed - times[len(scales) - 1] < seconds, "no step begins after the time is up"
    assert clock.remaining(len(scales)) == 0


@pytest.mark.parametrize("warmdown", [{"warmdown_iters": 10}, {"warmdown_frac": 0.5}])
def test_the_scale_does_not_fall_below_the_least_one(warmdown):
    h = train_gpt.load_settings({}, min_lr=0.3, **warmdown)
    scales = [train_gpt.learning_rate_scale(h, 20 - n, n, 1 - n / 20) for n in (20, 5, 4, 2, 1, 0)]
    assert scales == pytest.approx([1.0, 0.5, 0.4, 0.3, 0.3, 0.3])
