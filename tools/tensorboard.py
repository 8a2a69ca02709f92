"""Write the metrics of runs as event files for TensorBoard.

    python tools/tensorboard.py runs/A runs/B --out events
    tensorboard --logdir events

    python tools/tensorboard.py runs/ID --out events --follow     # while the run is going

Each run gets a folder in --out, with the scalars of its metrics.jsonl and its settings as a text.
The exit code is 0, or 1 with one line that says what is wrong, or 2 for unusable arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# This file has the name of the package that it needs.
HERE = Path(__file__).resolve().parent
sys.path = [path for path in sys.path if Path(path).resolve() != HERE]

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as missing:
    name = (missing.name or "tensorboard").partition(".")[0]
    raise SystemExit(f"error: {name} is missing: pip install -r tools/requirements.txt") from None

sys.path.append(str(HERE))  # behind the packages
import check

NOT_SCALARS = ("step", "tokens", "seconds", "adapter_ratios")


class UserError(Exception):
    """A problem that a person can fix. The message says what is wrong, where, and what to do."""


def check_run(folder: Path, follow: bool) -> None:
    """Raise UserError unless the folder is that of a run that has ended, or is to be followed."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name a run's, such as runs/ID")
    for name in ("train.log", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; it is not a run's folder")
    if check.is_going(folder / "train.log") and not follow:
        raise UserError(f"{folder}: the run is still going; wait until it ends, or use --follow")


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Return one object of metrics.jsonl. UserError if it is none."""
    try:
        row = json.loads(line.decode("utf-8"))
        return {**row, "step": int(row["step"]), "seconds": float(row["seconds"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} is not JSON as a run writes it; copy the run again") from None


def read_rows(folder: Path, follow: bool) -> Iterator[dict[str, Any]]:
    """Yield the objects of metrics.jsonl; `follow` waits for more until the run ends."""
    path = folder / "metrics.jsonl"
    number = 0
    with path.open("rb") as file:
        while True:
            going = follow and check.is_going(folder / "train.log")
            start = file.tell()
            line = file.readline()
            if line.endswith(b"\n"):
                number += 1
                yield parse_line(line, f"{path}: line {number}")
            elif going:  # the rest is still to come
                file.seek(start)
                time.sleep(1)
            else:
                return


def settings_text(log: Path) -> str:
    """Return the settings of a log as a table in Markdown."""
    text = log.read_bytes().decode("utf-8", "replace")
    record = text.partition("\nRUN_ID=")[2]
    pairs = re.findall(r"^([A-Z][A-Z0-9_]*)=(.*)$", f"RUN_ID={record}", re.M)
    return "\n".join(
        ["| setting | value |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in pairs)]
    )


def scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the name and the value of each scalar of a step."""
    for name, value in row.items():
        if name not in NOT_SCALARS and isinstance(value, (int, float)):
            yield name, value
    for name, value in (row.get("adapter_ratios") or {}).items():
        yield f"adapter_ratios/{name}", value


def convert(folder: Path, target: Path, follow: bool) -> int:
    """Write the event file of a run; return the number of steps."""
    began = (folder / "train.log").stat().st_mtime  # near enough: times differ by its seconds
    count = 0
    with SummaryWriter(str(target)) as writer:
        writer.add_text("settings", settings_text(folder / "train.log"))
        for row in read_rows(folder, follow):
            for name, value in scalars(row):
                writer.add_scalar(name, value, row["step"], began + row["seconds"])
            count += 1
            if follow:
                writer.flush()
    if not count:
        raise UserError(f"{folder}/metrics.jsonl has no metrics; the run did not take a step")
    return count


def write_events(args: argparse.Namespace) -> None:
    """Write a folder for each run. UserError says what is wrong; no new folder is left then."""
    folders = list(dict.fromkeys(folder.resolve() for folder in args.runs))
    for folder in folders:
        check_run(folder, args.follow)
        if (args.out / folder.name).exists():
            raise UserError(f"{args.out / folder.name} is there already; choose another --out")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError("two runs have the same name; convert them to different --out")
    if not args.out.parent.is_dir() or args.out.is_file():
        raise UserError(f"--out {args.out} is no folder that can be written")
    if args.follow:
        (folder,) = folders
        convert(folder, args.out / folder.name, follow=True)
        return
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as place:
        for folder in folders:
            count = convert(folder, Path(place) / folder.name, follow=False)
            print(f"{args.out / folder.name}: {count} steps")
        args.out.mkdir(exist_ok=True)
        for folder in folders:
            shutil.move(Path(place) / folder.name, args.out / folder.name)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="tensorboard.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    add("--out", type=Path, default=Path("events"), help="folder to write (default events)")
    add("--follow", action="store_true", help="go on until the run ends; for one run")
    args = parser.parse_args(arguments)
    if args.follow and len(args.runs) > 1:
        parser.error("--follow is for one run")
    try:
        write_events(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; see to that file", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
