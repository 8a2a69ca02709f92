"""Measure val_bpb over the bytes of the model for each quantizer, on trained checkpoints.

    DATA_PATH=... TOKENIZER_PATH=... python bench/quantize.py --checkpoints a.pt b.pt

Every artifact is written, read back and scored on the first --tokens of the validation stream, in
windows of EVAL_SEQ_LEN that do not overlap. `rms` is QUANTIZER=rms with both numbers of clip
sigmas divided by each of FACTORS; `rms, nearest` is the same without GPTQ.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as t

FACTORS = (1.4, 1.0, 0.7)  # divide both clip sigmas: a larger one makes scales finer
LOSSES = (1e-9, 1.5e-9, 3e-9, 5e-9, 8e-9, 12e-9)


class Point(NamedTuple):
    """One artifact: who wrote it, its bytes without code, and its score."""

    quantizer: str
    setting: str
    bytes: int
    bpb: float


def variants(h: t.Hyperparameters) -> Iterator[tuple[str, str, t.Hyperparameters]]:
    """Yield quantizer, setting and settings of every artifact."""
    for name, calibration in (("rms, nearest", 0), ("rms", h.gptq_calib_batches)):
        for factor in FACTORS:
            changes = {
                "quantizer": "rms",
                "gptq_calib_batches": calibration,
                "matrix_clip_sigmas": h.matrix_clip_sigmas / factor,
                "embed_clip_sigmas": h.embed_clip_sigmas / factor,
            }
            yield name, f"sigmas / {factor:g}", dataclasses.replace(h, **changes)
    for loss in LOSSES:
        changes = {"quantizer": "sensitivity", "loss_per_value": loss}
        yield "sensitivity", f"LOSS_PER_VALUE={loss:g}", dataclasses.replace(h, **changes)


class Case:
    """A checkpoint with what its exports and their scores need."""

    def __init__(self, path: Path, tokens: int) -> None:
        saved = t.Checkpoint.read(path)
        h = t.load_settings(export_only=1, checkpoint_path=str(path), compile="0")
        self.h = t.settings_from_checkpoint(h, saved)
        self.dist = t.Distributed(self.h)
        self.data, self.steps = t.TrainingData(self.h), saved.metrics["steps"]
        self.val = t.ValidationStream(self.h, t.Tokenizer(self.h.tokenizer_path, self.h.vocab_size))
        self.tokens = self.val.tokens[:tokens]
        with self.dist:
            self.model = t.rebuild_model(self.h, vars(saved), saved.weights, self.dist)
            self.before = self.score(self.model)
            self.points = self.measure()

    def score(self, model: t.LanguageModel) -> float:
        length = self.h.eval_seq_len
        return self.val.bits_per_byte(t.evaluate(model, self.tokens, self.h, self.dist, length))

    def measure(self) -> list[Point]:
        """Return a point for each variant; each way of calibrating is done once."""
        calibrations: dict[tuple[str, int], t.Calibration] = {}
        quantized = copy.deepcopy(self.model)
        points = []
        for name, setting, h in variants(self.h):
            way = h.quantizer, h.gptq_calib_batches
            if way not in calibrations:
                batches = list(t.calibration_batches(h, self.dist, self.data, self.steps))
                calibrations[way] = t.calibrate(h, self.model, self.dist, batches, self.data.sample)
            calibration = calibrations[way]
            quantizers = calibration.quantizers(h, h.loss_per_value)
            codes = t.quantize_model(self.model, quantizers, calibration.hessians)
            blob, _ = t.write_artifact({"model": h.model_settings()}, codes)
            quantized.load_state_dict(t.read_artifact(blob)[1])
            points.append(Point(name, setting, len(blob), self.score(quantized)))
            print(points[-1], flush=True)
        return points


def table(name: str, case: Case) -> str:
    lines = [
        f"`{name}`: {case.before:.4f} before, {len(case.tokens):,} validation tokens",
        "",
        "| quantizer | setting | model bytes | val_bpb | lost |",
        "| --- | --- | --- | --- | --- |",
    ]
    for p in case.points:
        cells = p.quantizer, p.setting, f"{p.bytes:,}", f"{p.bpb:.4f}", f"{p.bpb - case.before:.4f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", nargs="+", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the validation stream")
    options = parser.parse_args()
    for path in options.checkpoints:
        print(table(path.stem, Case(path, options.tokens)))


if __name__ == "__main__":
    main()
