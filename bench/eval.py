"""Sliding evaluation: train_gpt's against a loop over the rows, and its modes against each other.

    python bench/eval.py                                              # speed, weights as they are initialised
    python bench/eval.py --compile                                    # as with COMPILE=1, as ever on CUDA
    DATA_PATH=… python bench/eval.py --artifact runs/ID/model.int6.ptz    # and the scores of trained weights

The row-by-row loop is what published scripts do: one window a forward pass, logits of all its positions, of
which the last ones are scored. It runs over the textbook's network (bench/textbook.py), eager, and over ours,
compiled where ours is. All must give the same bits per byte: that is checked first, in float32. What this
machine's rate of products allows exact mode at most is counted beside it.
Tokens scored per second are compared on the start of the stream; with --artifact, which the textbook does not
know, the modes are compared on all of it, in the type of the machine, and EVAL_SEQ_LEN and EVAL_STRIDE hold:
windows longer than the training sequences cost score.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from textbook import Textbook

import common
from common import Row, t

# Of the comparison with the loops, and of the modes: both score a first window in one pass, so that a longer
# stream is nearer to a whole one.
LOOP_TOKENS = {"cpu": 16_384, "cuda": 131_072, "smoke": 256}
MODE_TOKENS = {"cpu": 65_536, "cuda": 1_048_576, "smoke": 512}
WINDOW = {"eval_seq_len": 2048, "eval_stride": 64}
# EVAL_MODE's choices and EVAL_BATCH_TOKENS for each. Exact gives every scored token its own window's context,
# and is faster where activations stay near a CPU (presets/cpu has that size). Window is far cheaper; it
# computes some rows before each batch once more, so that large ones pay.
MODES = (
    {"exact": 131_072, "window": 524_288}
    if torch.cuda.is_available()
    else {"exact": 16_384, "window": 131_072}
)


@torch.no_grad()
def row_by_row(
    predict: Callable, val, h: t.Hyperparameters, world: t.World, stride: int
) -> tuple[float, float]:
    """Nats a token and bits per byte, one window after the other; `predict`: ids (1, T) -> logits."""
    tokens = val.tokens.to(world.device)
    targets = len(tokens) - 1
    length = min(h.eval_seq_len, targets)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    begin = scored = 0
    while scored < targets:
        end = min(begin + length, targets)
        begin = end - length  # the last window ends with the stream
        ids, following = tokens[begin:end], tokens[begin + 1 : end + 1]
        logits = predict(ids[None])[0]
        losses = F.cross_entropy(logits, following, reduction="none")
        total += losses[scored - begin :].double().sum()
        scored = end
        begin += stride
    nats = total.item()
    return nats / targets, nats / math.log(2) / val.bytes


def begin_of(val, tokens: int):
    """The first tokens of a stream; bytes in proportion, since only the two sides' agreement matters."""
    share = min(1.0, tokens / len(val.tokens))
    return SimpleNamespace(tokens=val.tokens[:tokens], bytes=val.bytes * share)


def flops_of_window(h: t.Hyperparameters) -> float:
    """Products that exact mode cannot do without for one window: keys and values of all its positions in every
    layer, the rest of the last layer and the logits for those that it scores alone; half of attention is masked.
    """
    length, scored, width = h.eval_seq_len, h.eval_stride, h.model_dim
    flops = 2 * width * length**2 * (h.num_layers - 1) + 4 * width * length * scored
    for row in h.maps:
        is_partial = f"blocks.{h.num_layers - 1}." in row.name and not row.name.endswith(
            (".k", ".v")
        )
        flops += 2 * row.out_features * row.in_features * (scored if is_partial else length)
    return flops + 2 * scored * h.vocab_size * width


def loops_over(
    model: t.LanguageModel, h: t.Hyperparameters, world: t.World, artifact
) -> dict[str, Callable]:
    """What the row-by-row loops predict by."""
    model.eval()
    loops = {
        "the same model": torch.compile(model.predict, dynamic=False, disable=not world.compile)
    }
    return loops if artifact else {"the textbook": Textbook(h, model, world.dtype).predict} | loops


def check_agreement(h: t.Hyperparameters, model: t.LanguageModel, val, artifact) -> float:
    """Most bits per byte by which they differ in float32; an error where it is more than rounding."""
    h = common.settings(
        h.model_settings(),
        dtype="float32",
        compile="0",
        eval_seq_len=h.eval_seq_len,
        eval_stride=h.eval_stride,
        eval_batch_tokens=h.eval_batch_tokens,
    )
    world = t.World(h)
    single = t.make_model(h, torch.float32).to(world.device)
    single.load_state_dict(model.state_dict())
    # A few windows, the last of which scores less than a stride.
    few = begin_of(val, h.eval_seq_len + 5 * h.eval_stride + h.eval_stride // 2)
    with common.no_tf32():
        ours = common.evaluate(single, few, h, world, h.eval_stride)[1]
        loops = loops_over(single, h, world, artifact)
        apart = max(
            abs(ours - row_by_row(predict, few, h, world, h.eval_stride)[1])
            for predict in loops.values()
        )
    if not apart < 1e-6:
        raise SystemExit(f"the evaluations differ by {apart:.8f} bits per byte")
    return apart


def trained(options, world: t.World):
    """The artifact's model and the validation stream of DATA_PATH."""
    header, tensors = t.read_artifact(Path(options.artifact).read_bytes())
    text, label = common.text_of(options)
    paths = {name: text[name] for name in ("data_path", "tokenizer_path") if name in text}
    asked = {name: os.environ[name.upper()] for name in WINDOW if name.upper() in os.environ}
    h = common.settings(header["model"], WINDOW, paths, asked, eval_batch_tokens=MODES["exact"])
    tokenizer = t.Tokenizer(h.tokenizer_path, h.vocab_size)
    if tokenizer.sha256 != header["tokenizer"]:
        raise SystemExit(
            f"{h.tokenizer_path} is not the tokenizer of {options.artifact}: set DATA_PATH"
        )
    return h, t.build_model(header, tensors, world), t.ValidationStream(h, tokenizer), label


def compare_modes(
    h: t.Hyperparameters, model: t.LanguageModel, val, world: t.World, options
) -> list[Row]:
    """Seconds and, where trained, bits per byte of the modes on a stream."""
    scores = {}

    def side(mode: str):
        setting = common.settings(
            h.model_settings(),
            eval_seq_len=h.eval_seq_len,
            eval_stride=h.eval_stride,
            eval_batch_tokens=MODES[mode],
            eval_mode=mode,
        )

        def work():
            scores[mode] = common.evaluate(model, val, setting, world, h.eval_stride)[1]

        return work

    times = common.interleaved({mode: side(mode) for mode in MODES}, options.runs, warm_ups=1)
    exact, window = times["exact"], times["window"]
    what = (
        f"EVAL_MODE=window against exact at stride {h.eval_stride}, {len(val.tokens) - 1:,} tokens"
    )
    rows = [Row(what, f"{window:.2f} s", f"{exact:.2f} s", exact / window, "≥ 15")]
    if options.artifact:
        apart = scores["window"] - scores["exact"]
        rows.append(
            Row(
                f"its bits per byte, difference {apart:+.6f}",
                f"{scores['window']:.6f}",
                f"{scores['exact']:.6f}",
            )
        )
    return rows


def main() -> None:
    artifact = {"help": "trained model; else initial weights, for speed only"}
    compiled = {"action": "store_true", "help": "on a CPU: compiled, as COMPILE=1 does"}
    options = common.begin(__doc__, compile=compiled, artifact=artifact)
    size = common.SMOKE_SIZE if options.smoke else common.size_of(options) | WINDOW
    h = common.settings(size, common.compile_setting(options), eval_batch_tokens=MODES["exact"])
    with t.World(h) as world:
        if options.artifact:
            h, model, val, label = trained(options, world)
            label = f"the artifact {options.artifact} on {label}"
        else:
            model = common.new_model(h, world)
            stream = torch.randint(
                0, h.vocab_size, (1_100_000,), generator=torch.Generator().manual_seed(0)
            )
            val, label = (
                SimpleNamespace(tokens=stream, bytes=len(stream)),
                "initial weights on random tokens",
            )
        apart = check_agreement(h, model, val, options.artifact)
        kind = "smoke" if options.smoke else world.device.type
        few = begin_of(val, LOOP_TOKENS[kind])
        more = val if options.artifact else begin_of(val, MODE_TOKENS[kind])
        works = {"ours": lambda: common.evaluate(model, few, h, world, h.eval_stride)}
        for name, predict in loops_over(model, h, world, options.artifact).items():
            works[name] = functools.partial(row_by_row, predict, few, h, world, h.eval_stride)
        times = common.interleaved(works, options.runs, warm_ups=1)
        n = len(few.tokens) - 1
        ours = times.pop("ours")
        rows = []
        for name, loop in times.items():
            what = f"exact mode against a row-by-row loop over {name}, tokens scored a second"
            rows.append(Row(what, f"{n / ours:,.0f}", f"{n / loop:,.0f}", loop / ours, "≥ 5"))
        rate = common.gemm_rate(world.dtype, world.device, options)
        most, (loop, *_) = h.eval_stride * rate / flops_of_window(h), times.values()
        rows.append(
            Row(
                f"the most that exact mode could reach, at {rate / 1e9:,.0f} GFLOP/s of products alone",
                f"{most:,.0f}",
                f"{n / loop:,.0f}",
                most * loop / n,
            )
        )
        rows.append(
            Row(
                "bits per byte of them in float32, difference",
                f"{apart:.1e}",
                bar="≤ 1e-6",
                measured=apart,
            )
        )
        rows += compare_modes(h, model, more, world, options)

    common.print_header(__file__, options, str(world.dtype).removeprefix("torch."))
    print(
        f"\n{n:,} tokens in windows of {h.eval_seq_len}, stride {h.eval_stride}; {h.num_layers} layers of"
        f" width {h.model_dim}, {label}{', compiled' if world.compile else ''}."
    )
    common.print_rows(rows, options)


if __name__ == "__main__":
    main()
