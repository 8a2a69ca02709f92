"""Measure the export of system A's full configuration, and what takes how long in it.

    python bench/export.py

The weights are random and none is at its initial zero, so that they compress like trained ones.
The other side of the quantization is GPTQ as in its paper, one matrix after the other, column by
column; it gets Hessians of random inputs, since its time does not depend on their values.
--calib-batches is the setting GPTQ_CALIB_BATCHES; 256 was published.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping

import torch

import common
from common import Row, t

STAGES = {
    "Hessians": "collect_hessians",
    "sensitivities": "collect_sensitivities",
    "compression": "write_artifact",
}


@contextlib.contextmanager
def timing(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Within, train_gpt's function of this name adds its time to `seconds`."""
    function = getattr(t, name)

    def timed(*arguments: object, **keywords: object) -> object:
        common.synchronize()
        began = time.perf_counter()
        result = function(*arguments, **keywords)
        common.synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        return result

    setattr(t, name, timed)
    try:
        yield
    finally:
        setattr(t, name, function)


def gptq(w: torch.Tensor, hessian: torch.Tensor, quantizer: t.Quantizer) -> torch.Tensor:
    """Return the codes of one matrix (rows, columns), in blocks of 128 columns."""
    largest = quantizer.largest
    rms = w.double().square().mean(1).sqrt()
    exponents = (160 + 8 * (rms * quantizer.clip_sigmas / largest).log2()).round()
    scales = torch.exp2((exponents.clamp(1, 255) - 160) / 8)
    order = hessian.diagonal().argsort(descending=True)
    w, hessian = w.double()[:, order], hessian.double()[order][:, order]
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(w)
    for begin in range(0, w.size(1), 128):
        end = min(begin + 128, w.size(1))
        errors = torch.empty_like(w[:, begin:end])
        for j in range(begin, end):
            codes[:, j] = (w[:, j] / scales).round().clamp(-largest, largest)
            errors[:, j - begin] = (w[:, j] - codes[:, j] * scales) / factor[j, j]
            w[:, j:end] -= errors[:, j - begin, None] * factor[j, j:end]
        w[:, end:] -= errors @ factor[begin:end, end:]
    return codes[:, order.argsort()]


class Case:
    """The model to export, and the two sides of its quantization."""

    def __init__(self, h: t.Hyperparameters, dist: t.Distributed) -> None:
        self.h, self.dist = h, dist
        self.model = common.new_model(h, dist).eval()
        self.data = t.TrainingData(h)
        groups = t.tensors_by_role(self.model)
        self.groups = {role: groups[role] for role in t.make_quantizers(h) if groups[role]}
        with torch.no_grad():
            for role, group in self.groups.items():
                for p in group.values():
                    is_embedding = role is t.Role.EMBEDDING
                    p.normal_(std=0.02 if is_embedding else p.size(1) ** -0.5)
        widths = {p.size(1) for group in self.groups.values() for p in group.values()}
        inputs = {width: torch.randn(2 * width, width, device=dist.device) for width in widths}
        self.hessians = {width: x.T @ x for width, x in inputs.items()}
        self.stages: list[Mapping[str, float]] = []  # seconds of each export

    def export(self) -> None:
        """Export, and note the time of each stage."""
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for name in STAGES.values():
                stack.enter_context(timing(name, seconds))
            common.export(self.h, self.dist, self.model, self.data)
        common.synchronize()
        whole = time.perf_counter() - began
        self.stages.append(seconds | {"quantization": whole - sum(seconds.values())})

    def quantize_one_by_one(self) -> None:
        """Quantize each matrix; A of an adapter against inputs that went through its B."""
        quantizers = t.make_quantizers(self.h)
        for role, group in self.groups.items():
            for name, p in group.items():
                hessian = self.hessians.get(p.size(1))
                if name.endswith(".A"):
                    b = group[name.removesuffix("A") + "B"].detach().double()
                    hessian = b @ self.hessians[b.size(1)].double() @ b.T
                gptq(p.detach(), hessian, quantizers[role])

    def median(self, stage: str, runs: int) -> float:
        """Return the median seconds of a stage over the last exports."""
        return statistics.median(seconds[stage] for seconds in self.stages[-runs:])


def main() -> None:
    default = t.load_settings({}).gptq_calib_batches
    calib_batches = {"type": int, "default": default, "help": "calibration batches"}
    options = common.begin(__doc__, calib_batches=calib_batches)
    text, _ = common.text_of(options)
    size = common.size_of(options, on_cpu=common.FULL_SIZE)
    calibration = {"gptq_calib_batches": 1 if options.smoke else options.calib_batches}
    h = common.settings(size, text, calibration)
    with t.Distributed(h) as dist:
        case = Case(h, dist)
        times = common.interleaved(
            {"ours": case.export, "one by one": case.quantize_one_by_one},
            options.runs,
            warm_ups=1 if dist.on_cuda else 0,
        )
    limit = 10 if dist.on_cuda else 60
    ours, theirs = case.median("quantization", options.runs), times["one by one"]
    what = "export, whole"
    rows = [Row(what, f"{times['ours']:.2f} s", bar=f"≤ {limit} s", measured=times["ours"])]
    for stage, function in STAGES.items():
        rows.append(Row(f"of it {stage}", f"{case.median(function, options.runs):.2f} s"))
    what = "of it quantization, against GPTQ matrix by matrix"
    rows.append(Row(what, f"{ours:.2f} s", f"{theirs:.2f} s", theirs / ours))
    common.print_header(__file__, options, common.dtype_of(h, dist))
    values = sum(p.numel() for p in case.model.parameters())
    print(
        f"\n{h.num_layers} layers of width {h.model_dim}, {h.map_adapter}: {values:,} learned"
        f" values; {h.gptq_calib_batches} calibration batches of 8,192 tokens."
    )
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
