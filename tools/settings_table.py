"""Prints the README's table of settings from their declaration in train_gpt.py.

python tools/settings_table.py
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def table() -> str:
    from train_gpt import Hyperparameters

    # The headings are the comments above each group of fields; dataclasses do not keep comments.
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    body = source[source.index("class Hyperparameters") : source.index("def __init__(self, /, **given)")]
    headings, heading = {}, ""
    for line in body.splitlines():
        if comment := re.fullmatch(r"    # (.+)", line):
            heading = comment[1]
        elif field := re.match(r"    (\w+): \w+ = setting\(", line):
            headings[field[1]] = heading
    lines, last = [], ""
    for f in dataclasses.fields(Hyperparameters):
        if headings[f.name] != last:
            last = headings[f.name]
            lines += ["", f"**{last}**", "", "| variable | default | meaning |", "| --- | --- | --- |"]
        default = f"`{f.default}`" if f.default != "" else ""
        lines.append(f"| `{f.name.upper()}` | {default} | {f.metadata['meaning']} |".replace("|  |", "| |"))
    return "\n".join(lines[1:]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
