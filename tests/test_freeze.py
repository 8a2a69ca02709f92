"""Maps that freeze during training save the products of their weights' gradients, compiled, too."""

from __future__ import annotations

import torch
from functorch.compile import aot_module_simplified, make_boxed_func
from torch._decomp import core_aten_decompositions

from helpers import tiny_settings, train_gpt

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
    ids = torch.randint(0, h.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    for progress in (0.0, 0.5):
        phases.enter(progress)
        compiled(ids, ids).backward()
    trained, frozen = backward_products
    assert trained - frozen == 2  # fc and proj
    assert not model.blocks[0].mlp.fc.weight.requires_grad


def test_a_map_that_was_frozen_can_be_trained_again():
    h = tiny_settings(map_basis="learned", map_adapter="none", map_freeze="mlp=0.5", num_layers=2)
    model = train_gpt.GPT(h)
    phases = train_gpt.Phases(h, model, None, compiled=False)
    ids = torch.randint(0, h.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for progress in (0.5, 0.0):
        phases.enter(progress)
        model.zero_grad()
        model(ids, ids).backward()
        gradients.append(model.blocks[0].mlp.fc.weight.grad)
    assert gradients[0] is None
    assert gradients[1] is not None
