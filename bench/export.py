"""The export of system A's full configuration: how long, and what of it takes how long.

    python bench/export.py

Weights are random, none at its initial zero, so that they pack like trained ones. The other side of the
quantisation is GPTQ as its paper has it, one matrix after the other, column by column; it gets Hessians of
random inputs, since its time does not depend on their values. --calib-batches is the setting of that name;
256 is what was published.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from types import SimpleNamespace

import torch

import common
from common import Row, t


@contextlib.contextmanager
def timing(name: str, seconds: dict[str, float]):
    """Within, train_gpt's function of this name adds its time to `seconds`."""
    function = getattr(t, name)

    def timed(*arguments, **keywords):
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


def gptq(
    w: torch.Tensor, hessian: torch.Tensor, bits: int, sigmas: float, damping: float
) -> torch.Tensor:
    """The codes of one matrix (rows, columns) for inputs of this Hessian, blocks of 128 columns."""
    largest = 2 ** (bits - 1) - 1
    exponents = (160 + 8 * (w.double().square().mean(1).sqrt() * sigmas / largest).log2()).round()
    steps = torch.exp2((exponents.clamp(1, 255) - 160) / 8)
    order = hessian.diagonal().argsort(descending=True)
    w, hessian = w.double()[:, order], hessian.double()[order][:, order]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(w)
    for begin in range(0, w.size(1), 128):
        end = min(begin + 128, w.size(1))
        errors = torch.empty_like(w[:, begin:end])
        for j in range(begin, end):
            codes[:, j] = (w[:, j] / steps).round().clamp(-largest, largest)
            errors[:, j - begin] = (w[:, j] - codes[:, j] * steps) / factor[j, j]
            w[:, j:end] -= errors[:, j - begin, None] * factor[j, j:end]
        w[:, end:] -= errors @ factor[begin:end, end:]
    return codes[:, order.argsort()]


def quantise_one_by_one(
    h: t.Hyperparameters, groups: dict, hessians: dict[int, torch.Tensor]
) -> None:
    """All matrices and embeddings of the model, A of each adapter against inputs that went through its B."""
    for role, bits, sigmas in (
        (t.MATRIX, h.matrix_bits, h.matrix_clip_sigmas),
        (t.EMBEDDING, h.embed_bits, h.embed_clip_sigmas),
    ):
        for name, p in groups[role].items():
            if name.endswith(".A"):
                b = groups[role][name.removesuffix("A") + "B"].detach().double()
                hessian = b @ hessians[b.size(1)].double() @ b.T
            else:
                hessian = hessians[p.size(1)]
            gptq(p.detach(), hessian, bits, sigmas, 0.01)


def main() -> None:
    default = t.Hyperparameters({}).gptq_calib_batches
    options = common.begin(
        __doc__, calib_batches={"type": int, "default": default, "help": "how many"}
    )
    text, _ = common.text_of(options)
    size = common.size_of(options, on_cpu=common.FULL_SIZE)
    h = common.settings(
        size, text, gptq_calib_batches=1 if options.smoke else options.calib_batches
    )
    with t.World(h) as world:
        model = common.new_model(h, world).eval()
        groups = t.tensors_by_role(model)
        with torch.no_grad():
            for p in groups[t.MATRIX].values():
                p.normal_(std=p.size(1) ** -0.5)
            for p in groups[t.EMBEDDING].values():
                p.normal_(std=0.02)
        data = t.TrainingData(h)
        parts: dict[str, list[float]] = {"Hessians": [], "packing": [], "quantisation": []}
        widths = {p.size(1) for role in (t.MATRIX, t.EMBEDDING) for p in groups[role].values()}
        inputs = {width: torch.randn(2 * width, width, device=world.device) for width in widths}
        hessians = {width: x.T @ x for width, x in inputs.items()}

        def ours():
            seconds: dict[str, float] = {}
            began = time.perf_counter()
            with timing("collect_hessians", seconds), timing("write_artifact", seconds):
                common.export(h, world, model, data, SimpleNamespace(sha256="none"))
            common.synchronize()
            whole = time.perf_counter() - began
            parts["Hessians"].append(seconds["collect_hessians"])
            parts["packing"].append(seconds["write_artifact"])
            parts["quantisation"].append(whole - sum(seconds.values()))

        def one_by_one():
            quantise_one_by_one(h, groups, hessians)

        warm_ups = 1 if world.on_cuda else 0
        times = common.interleaved(
            {"ours": ours, "one by one": one_by_one}, options.runs, warm_ups=warm_ups
        )
        medians = {
            name: statistics.median(values[-options.runs :]) for name, values in parts.items()
        }

    limit = 10 if world.on_cuda else 60
    rows = [
        Row("export, whole", f"{times['ours']:.2f} s", bar=f"≤ {limit} s", measured=times["ours"])
    ]
    rows += [Row(f"of it {name}", f"{medians[name]:.2f} s") for name in ("Hessians", "packing")]
    rows.append(
        Row(
            "of it quantisation, against GPTQ matrix by matrix",
            f"{medians['quantisation']:.2f} s",
            f"{times['one by one']:.2f} s",
            times["one by one"] / medians["quantisation"],
        )
    )
    common.print_header(__file__, options, str(world.dtype).removeprefix("torch."))
    values = sum(p.numel() for p in model.parameters())
    print(
        f"\n{h.num_layers} layers of width {h.model_dim}, {h.map_adapter}: {values:,} learned values;"
        f" {h.gptq_calib_batches} calibration batches of 8,192 tokens."
    )
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
