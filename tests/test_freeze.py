"""Maps that freeze during training: what is saved, what is freed, and that all else goes on."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import aot_module_simplified, make_boxed_func
from torch._decomp import core_aten_decompositions

from helpers import tiny_settings, train_gpt
from reference import tokens

PRODUCTS = {"aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default"}


def count_products(graph: torch.fx.GraphModule) -> int:
    return sum(str(node.target) in PRODUCTS for node in graph.graph.nodes)


def test_a_phase_with_frozen_maps_compiles_a_backward_pass_without_their_gradients():
    freezing = {"map_basis": "learned", "map_adapter": "none", "map_freeze": "mlp=0.5"}
    h = tiny_settings(**freezing, num_layers=1, ve_layers="0")  # a layer takes a second to compile
    model = train_gpt.GPT(h)
    phases = train_gpt.Phases(h, model, None, compiled=False)
    backward_products = []

    def compile_backward(graph, inputs):
        backward_products.append(count_products(graph))
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return aot_module_simplified(
            graph,
            inputs,
            fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            bw_compiler=compile_backward,
            decompositions=core_aten_decompositions(),
        )

    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    for progress in (0.0, 0.5):
        phases.enter(progress)
        compiled(tokens(2, 16), tokens(2, 16)).backward()
    trained, frozen = backward_products
    assert trained - frozen == 2  # fc and proj
    assert not model.blocks[0].mlp.fc.weight.requires_grad
    phases.enter(0.0)
    assert model.blocks[0].mlp.fc.weight.requires_grad, "also what was frozen can be trained again"


def take_steps(model, optimizers, steps: range, without: str = "nothing") -> None:
    """Train; what has this end of a name gets no gradient."""
    for step in steps:
        model(tokens(4, 16, seed=step), tokens(4, 16, seed=step + 100)).backward()
        for name, p in model.named_parameters():
            p.grad = None if name.endswith(without) else p.grad
        optimizers.step(step, 1.0)


def begun(h: train_gpt.Hyperparameters, processes) -> tuple:
    """Return a model with its phases and optimizers, after two steps of the first phase."""
    torch.manual_seed(0)
    model = train_gpt.make_model(h)
    phases = train_gpt.Phases(h, model, None, compiled=False)
    optimizers = train_gpt.Optimizers(train_gpt.tensors_by_role(model), h, processes)
    phases.enter(0.0)
    take_steps(model, optimizers, range(2))
    return model, phases, optimizers


def test_the_state_of_frozen_maps_is_freed_and_that_of_the_others_stays(settings, processes):
    h = settings(
        map_basis="learned,attention=uniform",
        map_adapter="attention=lora:2+sparse:0.2",
        map_scale="attention=row",
        map_freeze="mlp.in=0.5,attention@1=0.5",
    )
    model, phases, optimizers = begun(h, processes)
    phases.enter(0.5)
    names = {p: name for name, p in model.named_parameters()}
    of_attention = tuple(f"blocks.1.attention.{kind}." for kind in ("q", "k", "v", "proj"))
    frozen = {name for name in names.values() if name.startswith(of_attention)}
    frozen |= {name for name in names.values() if name.endswith("mlp.fc.weight")}
    assert {names[p] for p in optimizers.params if not p.requires_grad} == frozen
    values = {name: p.detach().clone() for p, name in names.items()}
    take_steps(model, optimizers, range(2, 4))
    for p, name in names.items():
        assert torch.equal(p, values[name]) == (name in frozen), name
    states = (optimizers.muon.state, optimizers.adam.state)
    assert {names[p] for state in states for p in state} == set(names.values()) - frozen


def test_those_that_go_on_move_as_if_nothing_had_been_forgotten(settings, processes):
    """Against steps that leave the frozen ones without a gradient and keep their state."""
    h = settings(map_basis="learned", map_adapter="none", map_freeze="mlp.in=0.5")
    model, phases, optimizers = begun(h, processes)
    phases.enter(0.7)
    take_steps(model, optimizers, range(2, 4))
    expected_model, _, expected_optimizers = begun(h, processes)
    take_steps(expected_model, expected_optimizers, range(2, 4), without="mlp.fc.weight")
    both = zip(model.named_parameters(), expected_model.parameters(), strict=True)
    for (name, p), expected in both:
        assert torch.equal(p, expected), name
        assert p.requires_grad != name.endswith("mlp.fc.weight")


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
    ages = range(7, -1, -1)
    ema = sum(0.9**age * (8 - age) for age in ages) / sum(0.9**age for age in ages)
    found = averages.candidates()
    for name, expected in {"last": 8, "swa": 4.5, "ema": ema}.items():
        kept, mean = found[name]
        assert kept.tolist() == [4, 4, 4]
        assert mean.tolist() == pytest.approx([expected] * 3, rel=1e-5)
        assert kept.data_ptr() != frozen.data_ptr(), "a candidate is a copy"
