"""Count what a compiled training step keeps for its backward pass, without running it.

    python bench/memory.py             # system A's full size, 98,304 tokens
    python bench/memory.py --list      # and what it consists of

The model is traced on tensors that have a shape and no values, and partitioned into forward and
backward as torch.compile does it; no GPU is needed. The storages that the first hands to the second
are added up: each once, without weights and inputs. Choices that depend on the device are those for
CUDA. It is no measurement: gradients, logits and the kernels' temporary memory come on top. At
commit bec83cc an earlier form of this program counted 21,966 MiB, and an H100 measured 22,340 MiB
at the peak.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

import common
from common import t

PUBLISHED = 24_407  # MiB at the peak of system A's own script, PR #1113
ON_CPU = t.squared_leaky_relu


def kept_storages(graph: torch.fx.GraphModule) -> Counter:
    """Return the bytes that a forward graph returns beside the loss, by operation and shape."""

    def storage(node: object) -> torch.UntypedStorage | None:
        value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
        return value.untyped_storage() if isinstance(value, torch.Tensor) else None

    (output,) = graph.graph.find_nodes(op="output")
    inputs = map(storage, graph.graph.find_nodes(op="placeholder"))
    seen = {each._cdata for each in inputs if each is not None}
    kept = Counter()
    for node in output.args[0][1:]:
        memory = storage(node)
        if memory is not None and memory._cdata not in seen:
            seen.add(memory._cdata)
            name = str(node.target).removesuffix(".default")
            value = node.meta["val"]
            kept[f"{name} {tuple(value.shape)} {value.dtype}"] += memory.nbytes()
    return kept


def activation_on_cuda(x: torch.Tensor) -> torch.Tensor:
    """Compute train_gpt's squared_leaky_relu as on CUDA."""
    return torch.utils.checkpoint.checkpoint(ON_CPU, x, use_reentrant=False)


def fake_model(h: t.Hyperparameters, mode: FakeTensorMode) -> t.LanguageModel:
    """Return a model whose tensors have no values."""
    torch.manual_seed(h.seed)
    model = t.make_model(h, torch.bfloat16).train()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.nn.Parameter(mode.from_tensor(p.data), requires_grad=p.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            module._buffers[name] = mode.from_tensor(buffer)
    return model


def trace(h: t.Hyperparameters, activation: Callable) -> list[torch.fx.GraphModule]:
    """Return the forward and the backward graph of a step of all its tokens at once.

    Args:
        h: the settings.
        activation: that of the MLP.
    """
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(h, mode)
    t.squared_leaky_relu = activation
    t.MACHINE_BALANCE["cpu"] = t.MACHINE_BALANCE["cuda"]
    t.PLAIN_ATTENTION = dict.fromkeys(t.PLAIN_ATTENTION, 0)
    shape = h.train_batch_tokens // h.train_seq_len, h.train_seq_len
    with mode, t.Distributed(h):
        ids = torch.zeros(shape, dtype=torch.int64)
        torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(ids, ids).backward()
    return graphs


def main() -> None:
    options = common.begin(
        __doc__, list={"action": "store_true", "help": "list what is kept, largest first"}
    )
    smoke_size = common.SMOKE_SIZE | {"num_layers": 1}  # a layer takes seconds to trace
    h = common.settings(smoke_size if options.smoke else common.FULL_SIZE, compile="1")
    activations = {
        "with the activation computed again, as on CUDA": activation_on_cuda,
        "with all that it computes kept": ON_CPU,
    }
    counts = {
        what: kept_storages(trace(h, activation)[0]) for what, activation in activations.items()
    }
    common.print_header(__file__, options, "bfloat16, traced, not measured", counted=True)
    print(
        f"\nA step of {h.train_batch_tokens:,} tokens in sequences of {h.train_seq_len}:"
        f" {h.num_layers} layers of width {h.model_dim}, {h.map_adapter}. Published:"
        f" {PUBLISHED:,} MiB at the peak."
    )
    lines = [
        [what, common.mebibytes(kept.total()), f"{kept.total() / 2**20 / PUBLISHED:.0%}"]
        for what, kept in counts.items()
    ]
    common.print_table(["what", "kept for the backward pass", "of the published peak"], lines)
    if options.list:
        largest = next(iter(counts.values())).most_common(12)
        lines = [[what, common.mebibytes(size)] for what, size in largest]
        common.print_table(["kept", "MiB"], lines)


if __name__ == "__main__":
    main()
