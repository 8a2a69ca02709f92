"""Measure the sliding evaluation against a loop over the windows, and its two modes.

    python bench/eval.py                                        # speed, with initial weights
    python bench/eval.py --compile                              # with COMPILE=1, as always on CUDA
    DATA_PATH=... python bench/eval.py --artifact runs/ID/model.int6.ptz  # also trained scores

The loop is what published scripts do: one window per forward pass, logits of all its positions, of
which the last ones are scored. It runs over the textbook's network (bench/textbook.py), eager, and
over ours, compiled where ours is. All must give the same loss: this is checked first, in float32.
Beside them stands the upper bound of exact mode at this machine's rate of products.

Speeds are measured on the first tokens of the stream. With --artifact, which the textbook does not
know, the modes are compared on all of it, in the type of the machine, and EVAL_SEQ_LEN and
EVAL_STRIDE apply: windows longer than the training sequences make the score worse.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from textbook import Textbook

import common
from common import Row, t

# A first window is scored in one pass in both modes: a longer stream is nearer to a whole one.
LOOP_TOKENS = {"cpu": 16_384, "cuda": 131_072, "smoke": 256}
MODE_TOKENS = {"cpu": 65_536, "cuda": 1_048_576, "smoke": 512}
WINDOW = {"eval_seq_len": 2048, "eval_stride": 64}
# EVAL_BATCH_TOKENS of each EVAL_MODE. Exact mode is faster where activations fit into a CPU's cache
# (presets/cpu has that size). Streaming computes some rows before each batch again, so that large
# batches pay.
MODES = {"exact": 16_384, "streaming": 131_072}
if torch.cuda.is_available():
    MODES = {"exact": 131_072, "streaming": 524_288}


@torch.no_grad()
def loop_over_windows(
    predict: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    h: t.Hyperparameters,
    dist: t.Distributed,
) -> float:
    """Return the mean loss in nats, one window after the other.

    Args:
        predict: ids (1, T) -> logits (1, T, vocabulary).
        tokens: (n,), one stream.
        h: EVAL_SEQ_LEN and EVAL_STRIDE.
        dist: the device.
    """
    tokens = tokens.to(dist.device)
    targets = len(tokens) - 1
    length = min(h.eval_seq_len, targets)
    total = torch.zeros((), dtype=torch.float64, device=dist.device)
    begin = scored = 0
    while scored < targets:
        end = min(begin + length, targets)
        begin = end - length  # the last window ends with the stream
        ids, following = tokens[begin:end], tokens[begin + 1 : end + 1]
        losses = F.cross_entropy(predict(ids[None])[0], following, reduction="none")
        total += losses[scored - begin :].double().sum()
        scored = end
        begin += h.eval_stride
    return total.item() / targets


def flops_per_window(h: t.Hyperparameters) -> float:
    """Return the FLOPs of the products that exact mode needs for a window.

    They are keys and values of all its positions in every layer, and the rest of the last layer and
    the logits for those that it scores; half of attention is masked.
    """
    length, scored, width = h.eval_seq_len, h.eval_stride, h.model_dim
    flops = 2 * width * length**2 * (h.num_layers - 1) + 4 * width * length * scored
    for spec in t.build_map_table(h).values():
        if "blocks." not in spec.name:
            continue
        in_last_layer = f"blocks.{h.num_layers - 1}." in spec.name
        needs_all = not in_last_layer or spec.name.endswith((".k", ".v"))
        flops += 2 * spec.out_features * spec.in_features * (length if needs_all else scored)
    return flops + 2 * scored * h.vocab_size * width


class Case(NamedTuple):
    """What is evaluated."""

    h: t.Hyperparameters
    dist: t.Distributed
    model: t.LanguageModel
    tokens: torch.Tensor
    label: str
    val: t.ValidationStream | None = None  # of trained weights

    def exact(self, tokens: torch.Tensor) -> float:
        """Return the mean loss in nats by train_gpt."""
        return t.evaluate(self.model, tokens, self.h, self.dist, self.h.eval_stride)

    def loops(self) -> dict[str, Callable]:
        """Return what the loops predict with."""
        model = self.model.eval()
        compiled = torch.compile(model.predict, dynamic=False, disable=not self.dist.compile)
        loops = {"the same model": compiled}
        if self.val is None:
            textbook = Textbook(self.h, model, common.dtype_of(self.h, self.dist))
            loops = {"the textbook": textbook.predict} | loops
        return loops


def untrained(options: argparse.Namespace, dist: t.Distributed, h: t.Hyperparameters) -> Case:
    """Return initial weights on random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, h.vocab_size, (1_100_000,), generator=generator)
    tokens = tokens[: MODE_TOKENS["smoke" if options.smoke else dist.device.type]]
    return Case(h, dist, common.new_model(h, dist), tokens, "initial weights on random tokens")


def trained(options: argparse.Namespace, dist: t.Distributed) -> Case:
    """Return the artifact's model and the validation stream of DATA_PATH."""
    blob = Path(options.artifact).read_bytes()
    header, _ = t.read_artifact(blob)
    text, label = common.text_of(options)
    paths = {name: text[name] for name in ("data_path", "tokenizer_path") if name in text}
    asked = {name: os.environ[name.upper()] for name in WINDOW if name.upper() in os.environ}
    batch = {"eval_batch_tokens": MODES["exact"]}
    h = common.settings(header["model"], WINDOW, paths, asked, batch)
    tokenizer = t.Tokenizer(h.tokenizer_path, h.vocab_size)
    if tokenizer.sha256 != header["tokenizer"]:
        wrong = f"{h.tokenizer_path} is not the tokenizer of {options.artifact}"
        raise SystemExit(f"error: {wrong}; set DATA_PATH")
    val = t.ValidationStream(h, tokenizer)
    model = t.model_from_artifact(h, blob, dist)
    label = f"the artifact {options.artifact} on {label}"
    return Case(h, dist, model, val.tokens, label, val)


def scoring(h: t.Hyperparameters, **changes: object) -> t.Hyperparameters:
    """Return the settings of the model and its windows, with changes."""
    window = {"eval_seq_len": h.eval_seq_len, "eval_stride": h.eval_stride}
    return common.settings(h.model_settings(), window, changes)


def check_agreement(case: Case) -> float:
    """Return the largest difference of the loops from `evaluate`, in bits per token in float32.

    SystemExit where it is more than rounding.
    """
    h = scoring(case.h, dtype="float32", compile="0", eval_batch_tokens=case.h.eval_batch_tokens)
    dist = t.Distributed(h)
    model = t.make_model(h, torch.float32).to(dist.device)
    model.load_state_dict(case.model.state_dict())
    single = case._replace(h=h, dist=dist, model=model)
    # A few windows, the last of which scores less than a stride.
    tokens = case.tokens[: h.eval_seq_len + 5 * h.eval_stride + h.eval_stride // 2]
    with common.no_tf32():
        ours = single.exact(tokens)
        loops = [loop_over_windows(loop, tokens, h, dist) for loop in single.loops().values()]
    apart = max(abs(ours - loop) for loop in loops) / math.log(2)
    if not apart < 1e-6:
        raise SystemExit(f"error: the evaluations differ by {apart:.8f} bits per token")
    return apart


def compare_with_loops(case: Case, options: argparse.Namespace) -> list[Row]:
    """Return the tokens scored per second by `evaluate`, by the loops, and at most."""
    h, dist = case.h, case.dist
    tokens = case.tokens[: LOOP_TOKENS["smoke" if options.smoke else dist.device.type]]
    works = {"ours": lambda: case.exact(tokens)}
    for name, predict in case.loops().items():
        works[name] = functools.partial(loop_over_windows, predict, tokens, h, dist)
    times = common.interleaved(works, options.runs, warm_ups=1)
    n = len(tokens) - 1
    ours = times.pop("ours")
    rows = []
    for name, loop in times.items():
        what = f"exact mode against a loop over {name}, tokens scored per second"
        rows.append(Row(what, f"{n / ours:,.0f}", f"{n / loop:,.0f}", loop / ours, "≥ 5"))
    rate = common.gemm_rate(common.dtype_of(h, dist), dist.device, options)
    most = h.eval_stride * rate / flops_per_window(h)
    loop = n / next(iter(times.values()))
    what = f"upper bound of exact mode, at {rate / 1e9:,.0f} GFLOP/s of products"
    return [*rows, Row(what, f"{most:,.0f}", f"{loop:,.0f}", most / loop)]


def compare_modes(case: Case, options: argparse.Namespace) -> list[Row]:
    """Return the seconds and, of trained weights, the bits per byte of the modes."""
    h, losses = case.h, {}

    def side(mode: str) -> Callable[[], None]:
        setting = scoring(h, eval_batch_tokens=MODES[mode], eval_mode=mode)

        def work() -> None:
            losses[mode] = t.evaluate(case.model, case.tokens, setting, case.dist, h.eval_stride)

        return work

    times = common.interleaved({mode: side(mode) for mode in MODES}, options.runs, warm_ups=1)
    exact, streaming = times["exact"], times["streaming"]
    targets = len(case.tokens) - 1
    what = f"EVAL_MODE=streaming against exact at stride {h.eval_stride}, {targets:,} tokens"
    rows = [Row(what, f"{streaming:.2f} s", f"{exact:.2f} s", exact / streaming, "≥ 15")]
    if case.val is not None:
        bits = {mode: case.val.bits_per_byte(loss) for mode, loss in losses.items()}
        apart = bits["streaming"] - bits["exact"]
        what = f"its bits per byte, difference {apart:+.6f}"
        rows.append(Row(what, f"{bits['streaming']:.6f}", f"{bits['exact']:.6f}"))
    return rows


def main() -> None:
    artifact = {"help": "trained model; without it: initial weights, for speed only"}
    compiled = {"action": "store_true", "help": "on a CPU: compile, as COMPILE=1 does"}
    options = common.begin(__doc__, compile=compiled, artifact=artifact)
    size = common.SMOKE_SIZE if options.smoke else common.size_of(options) | WINDOW
    batch = {"eval_batch_tokens": MODES["exact"]}
    h = common.settings(size, common.compile_setting(options), batch)
    with t.Distributed(h) as dist:
        case = trained(options, dist) if options.artifact else untrained(options, dist, h)
        apart = check_agreement(case)
        rows = compare_with_loops(case, options)
        what = "bits per token of them in float32, difference"
        rows.append(Row(what, f"{apart:.1e}", bar="≤ 1e-6", measured=apart))
        rows += compare_modes(case, options)
    h = case.h
    common.print_header(__file__, options, common.dtype_of(h, dist))
    print(
        f"\nWindows of {h.eval_seq_len}, stride {h.eval_stride}; {h.num_layers} layers of width"
        f" {h.model_dim}, {case.label}{', compiled' if dist.compile else ''}."
    )
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
