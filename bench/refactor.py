"""Show that a refactoring changes no figure: train every CPU preset for 12 steps and compare.

    python bench/refactor.py --record           # before the change: write the record
    python bench/refactor.py                    # after it: run again and compare
    python bench/refactor.py cpu/baseline mask  # these presets alone

Each preset trains in a process of its own on one thread in float32, where sums have one order. So
the same code gives the same figures on the same kind of machine and the same torch. Compared are
the training losses as logged, val_bpb before and after the export to 1e-8, and the bytes of every
group of the artifact. Late QAT, SWA, GPTQ and sliding windows all occur within the 12 steps. On
another kind of machine record first, with the script of the earlier commit (--script). The record
is bench/results/refactor.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "refactor.json"
DATA = ROOT / "data" / "datasets" / "docs_sp1024"
SETTINGS = {
    "ITERATIONS": "12",
    "TRAIN_BATCH_TOKENS": "4096",
    "MICRO_BATCH_TOKENS": "2048",
    "WARMUP_STEPS": "1",
    "WARMDOWN_ITERS": "8",
    "WARMDOWN_FRAC": "0",
    "MUON_MOMENTUM_WARMUP_STEPS": "6",
    "SWA_INTERVAL": "2",
    "SWA_THRESHOLD": "0.5",
    "LATE_QAT_THRESHOLD": "0.3",
    "EVAL_STRIDE": "128",
    "GPTQ_CALIB_BATCHES": "2",
    "VAL_LOSS_EVERY": "0",
    "TRAIN_LOG_EVERY": "1",
    "MAX_WALLCLOCK_SECONDS": "0",
    "DTYPE": "float32",
    "COMPILE": "0",
    "SEED": "1337",
    "OMP_NUM_THREADS": "1",
}
SCORES = ("val_bpb_before", "val_bpb_roundtrip", "val_bpb_sliding_window")
TOLERANCE = 1e-8


def presets() -> list[str]:
    """Return the names of all CPU presets, in the order in which they run."""
    names = sorted(path.stem for path in (ROOT / "presets" / "cpu").glob("*.env"))
    return [f"cpu/{name}" for name in names if name != "common"]


def read_preset(name: str) -> dict[str, str]:
    """Return the settings of a preset and of its PRESET_BASE."""
    settings = {}
    for line in (ROOT / "presets" / f"{name}.env").read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("#")[0].strip().partition("=")
        if equals:
            settings[key] = value
    base = settings.pop("PRESET_BASE", None)
    return (read_preset(base) if base else {}) | settings


def run(name: str, script: Path, folder: Path) -> dict:
    """Train a preset, its teacher first, and return its figures. RuntimeError if it fails."""
    settings = read_preset(name)
    teacher = settings.pop("TEACHER_PRESET", None)
    if teacher:
        run(teacher, script, folder / "teacher")
        settings["DISTILL_FROM"] = str(folder / "teacher" / "run" / "model.int6.ptz")
    manifest = json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))
    settings |= SETTINGS
    settings |= {"DATA_PATH": str(DATA), "TOKENIZER_PATH": str(DATA / manifest["tokenizer"])}
    settings |= {"OUTPUT_DIR": str(folder), "RUN_ID": "run"}
    folder.mkdir(parents=True, exist_ok=True)
    inherited = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    command = [sys.executable, str(script)]
    child = subprocess.run(
        command, env=inherited | settings, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise RuntimeError(f"{name}: {child.stdout[-2000:]}{child.stderr[-2000:]}")
    return figures(folder / "run")


def figures(folder: Path) -> dict:
    """Return what one run's folder says of its losses, scores and bytes."""
    log = (folder / "train.log").read_text(encoding="utf-8")
    sizes = re.findall(r"^artifact bytes: (.*)$", log, re.MULTILINE)[-1]
    groups = dict(re.findall(r"([\w ]+) ([\d,]+)(?:, |$)", sizes))
    groups.pop("header", None)  # it holds versions and names of settings
    reports = [folder / name for name in ("results.json", "submission.json")]
    results = json.loads(
        next(path for path in reports if path.exists()).read_text(encoding="utf-8")
    )
    return {
        "train_losses": re.findall(r"^step:\d+/\d+ train_loss:([\d.]+)", log, re.MULTILINE),
        **{score: results[score] for score in SCORES},
        "bytes": {group.strip(): int(size.replace(",", "")) for group, size in groups.items()},
    }


def differences(name: str, before: dict, now: dict) -> list[str]:
    """Return a line for every figure of a preset that is not what it was."""
    lines = []
    for key in before:
        same = before[key] == now[key]
        if key in SCORES:
            same = abs(before[key] - now[key]) <= TOLERANCE
        if not same:
            lines.append(f"{name} {key}: {before[key]} before, {now[key]} now")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=presets(), metavar="PRESET")
    parser.add_argument("--record", action="store_true", help="write the record, compare nothing")
    parser.add_argument(
        "--script", type=Path, default=ROOT / "train_gpt.py", help="the script to run"
    )
    parser.add_argument("--jobs", type=int, default=2, help="presets that run at the same time")
    options = parser.parse_args()
    if not (DATA / "manifest.json").exists():
        parser.error(f"{DATA} is missing: run `python data/prepare.py docs --vocab 1024` first")
    names = [name if "/" in name else f"cpu/{name}" for name in options.presets]
    results = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        script = options.script.resolve()
        folders = [Path(folder) / name for name in names]
        for name, result in zip(
            names, pool.map(run, names, [script] * len(names), folders), strict=True
        ):
            results[name] = result
            print(f"{name}: {result['val_bpb_sliding_window']:.8f}", flush=True)
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"presets": {}}
    if options.record:
        record["machine"] = platform.machine()
        record["torch"] = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.__version__)"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        record["presets"] |= results
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"recorded {len(results)} presets in {RECORD.relative_to(ROOT)}")
        return
    lines = []
    for name, result in results.items():
        lines += differences(name, record["presets"][name], result)
    print("\n".join(lines) or f"all figures of {len(results)} presets are equal to the record")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
