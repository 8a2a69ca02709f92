"""Count the bytes that the kernels of a compiled training step move on a GPU, without one.

    python bench/traffic.py              # system A's full size, 98,304 tokens
    python bench/traffic.py --top 40     # and the kernels that move most

torch.compile's own generator writes the code for an H100 from tensors that have a shape and no
values, and says what each kernel reads and writes; a buffer of which a kernel reads a slice counts
whole. The time is that of the bytes at an H100's measured copy rate (bench/results/gpu.md).
Products and attention are library calls, whose time does not follow from their bytes: they are left
out. The peak counts the buffers of the generated code in its order, with inputs and what the
forward pass keeps, but no temporary memory of library calls. This needs a CUDA build of torch, as
pip installs it on Linux, and no GPU. It uses torch's internals, so a new version may need another
program: no test runs it.
"""

from __future__ import annotations

import contextlib
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import memory
import torch
import torch._inductor.scheduler
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import memory as planning
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._ordered_set import OrderedSet

import common

COPY_RATE = 2976e9  # bytes per second, one H100
H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    gcnArchName="",
    uuid="",
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    L2_cache_size=50 * 2**20,
    shared_memory_per_multiprocessor=233_472,
    total_memory=80 * 2**30,
)
CUDA = torch.device("cuda:0")
aten = torch.ops.aten


@contextlib.contextmanager
def as_if_on_an_h100() -> Iterator[None]:
    """Within, the generator finds an H100, on which nothing could run."""

    def answer(value: object) -> Callable:
        return lambda *_, **__: value

    answers = {
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "_lazy_init": None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer(value)))
        for interface in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(mock.patch.object(interface, "get_device_properties", answer(H100)))
        stack.enter_context(mock.patch.object(CudaInterface, "get_compute_capability", answer(90)))
        stack.enter_context(
            mock.patch.object(torch._inductor.scheduler, "has_triton", answer(True))
        )
        stack.enter_context(
            mock.patch("torch.utils._triton.triton_hash_with_backend", answer("none"))
        )
        yield


class OnCuda(torch.fx.Interpreter):
    """Runs a graph that was traced on a CPU as on CUDA, with CUDA's kernels of attention."""

    def call_function(self, target: Callable, args: tuple, kwargs: dict) -> Any:
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": CUDA}
        if target is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return aten._scaled_dot_product_flash_attention(*args[:3], 0.0, True)[:2]
        if target is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            dy, q, k, v, y, lse = args[:6]
            seed, offset = (
                torch.empty(shape, dtype=torch.uint64, device=CUDA) for shape in ((2,), ())
            )
            return aten._scaled_dot_product_flash_attention_backward(
                dy, q, k, v, y, lse, None, None, q.size(2), k.size(2), 0.0, True, seed, offset
            )
        return super().call_function(target, args, kwargs)


class Kernel(NamedTuple):
    """A kernel of the generated code."""

    bytes: int  # read and written
    operations: str


class Generated(NamedTuple):
    """What is counted of a generated graph."""

    kernels: list[Kernel]
    peak: int  # bytes


def peak_of(lowered: GraphLowering, graph: torch.fx.GraphModule) -> int:
    """Return the largest sum of live buffers and inputs over the nodes of the generated code."""
    nodes, outputs = lowered.scheduler.nodes, OrderedSet(lowered.get_output_names())
    _, freeable = planning.prepare_planning_info(
        nodes,
        lowered.scheduler.name_to_buf,
        lowered.scheduler.name_to_fused_node,
        OrderedSet(lowered.graph_inputs),
        outputs,
    )
    _, buffers = planning.estimate_peak_memory(nodes, freeable, outputs)
    last_use = {dep.name: i for i, node in enumerate(nodes) for dep in node.read_writes.reads}
    inputs: dict[int, tuple[int, int]] = {}  # storage -> bytes, last node that reads it
    given = graph.graph.find_nodes(op="placeholder")
    for node, name in zip(given, lowered.graph_inputs, strict=True):
        if isinstance(node.meta["val"], torch.Tensor):
            storage = node.meta["val"].untyped_storage()
            _, last = inputs.get(storage._cdata, (0, -1))
            inputs[storage._cdata] = storage.nbytes(), max(last, last_use.get(name, -1))
    return max(
        buffers[i] + sum(size for size, last in inputs.values() if last >= i)
        for i in range(len(nodes))
    )


def generate(graph: torch.fx.GraphModule, is_backward: bool) -> Generated:
    """Generate the code of this graph; return its kernels and its peak of memory."""

    def moved(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, V.set_fake_mode(mode), as_if_on_an_h100():
        inputs = [moved(node.meta["val"]) for node in graph.graph.nodes if node.op == "placeholder"]
        on_cuda = make_fx(lambda *given: OnCuda(graph).run(*given))(*inputs)
        _recursive_post_grad_passes(on_cuda, is_inference=False)
        lowered = GraphLowering(
            on_cuda, example_inputs=inputs, is_inference=False, is_backward=is_backward
        )
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*inputs)
            lowered.codegen()
            own = [node for node in lowered.scheduler.nodes if "Extern" not in type(node).__name__]
            kernels = [
                Kernel(node.get_read_write_buffers_sizes(), operations(node)) for node in own
            ]
            return Generated(kernels, peak_of(lowered, graph))


def operations(node: torch._inductor.scheduler.BaseSchedulerNode) -> str:
    """Return what a kernel computes, in aten's names."""
    origins = {
        origin for part in node.get_nodes() if part.node for origin in part.node.get_origins()
    }
    names = {str(origin.target).removeprefix("aten.").partition(".")[0] for origin in origins}
    moves_nothing = {"view", "permute", "unsqueeze", "expand", "<built-in function getitem>"}
    return ", ".join(sorted(names - moves_nothing))


def main() -> None:
    options = common.begin(
        __doc__, top={"type": int, "default": 0, "help": "list so many kinds of kernels"}
    )
    if torch.version.cuda is None:
        raise SystemExit("error: this torch is built without CUDA; a CUDA build needs no GPU")
    h = common.settings(common.SMOKE_SIZE if options.smoke else common.FULL_SIZE, compile="1")
    graphs = memory.trace(h, memory.activation_on_cuda)
    lines, largest = [], []
    for what, graph in zip(("forward", "backward"), graphs, strict=True):
        kinds = defaultdict(list)  # operations -> bytes of each kernel
        generated = generate(graph, what == "backward")
        for kernel in generated.kernels:
            kinds[kernel.operations].append(kernel.bytes)
        count, total = sum(map(len, kinds.values())), sum(map(sum, kinds.values()))
        seconds = common.milliseconds(total / COPY_RATE)
        peak = common.mebibytes(generated.peak)
        lines.append([what, str(count), f"{total / 1e9:.1f} GB", seconds, peak])
        largest += [(sum(sizes), len(sizes), what, name) for name, sizes in kinds.items()]
    common.print_header(__file__, options, "bfloat16, generated, not measured", counted=True)
    print(
        f"\nA step of {h.train_batch_tokens:,} tokens in sequences of {h.train_seq_len}:"
        f" {h.num_layers} layers of width {h.model_dim}, {h.map_adapter}. Without products and"
        " attention."
    )
    common.print_table(["what", "kernels", "bytes", "at an H100's copy rate", "peak"], lines)
    if options.top:
        lines = [
            [what, str(n), f"{size / 1e9:.2f} GB", common.milliseconds(size / COPY_RATE), name]
            for size, n, what, name in sorted(largest, reverse=True)[: options.top]
        ]
        common.print_table(["what", "kernels", "bytes", "at that rate", "operations"], lines)


if __name__ == "__main__":
    main()
