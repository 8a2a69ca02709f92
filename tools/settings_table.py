"""Prints the README's tables of settings and of published variables from their declaration in train_gpt.py.

python tools/settings_table.py
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def settings_table() -> list[str]:
    """One table a group of fields, headed by the comment above the group."""
    from train_gpt import Hyperparameters

    # dataclasses do not keep comments
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    body = source[source.index("class Hyperparameters") : source.index("def __init__(self, /,")]
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
            title, _, note = last.partition(": ")  # a comment may go on and explain the group
            lines += [
                "",
                f"**{title}**{note and ': '}{note}",
                "",
                row("variable", "default", "meaning"),
            ]
            lines.append(row("---", "---", "---"))
        default = f"`{f.default}`" if f.default != "" else ""
        lines.append(row(f"`{f.name.upper()}`", default, f.metadata["meaning"]))
    return lines[1:]


def published_table() -> list[str]:
    """What the variables of published scripts stand for."""
    from train_gpt import PUBLISHED, expand_published

    def columns(of: dict[str, str], value: str = "{}") -> str:
        return ", ".join(
            f"`{column.upper()}={text.replace('{}', value)}`" for column, text in of.items()
        )

    lines = [
        "**Published variables** stand for columns of the map table; their name stands for their value.",
        "",
        row("variable", "meaning", "stands for"),
        row("---", "---", "---"),
    ]
    for name, (meaning, says, otherwise) in PUBLISHED.items():
        stands_for = columns(says, name.upper())
        if otherwise:
            stands_for += f"; unless set otherwise {columns(otherwise)}"
        is_switch = not any("{}" in text for text in says.values())
        if is_switch and (off := expand_published({name: "0"}, [])):
            stands_for += f"; 0: {columns(off)}"
        lines.append(row(f"`{name.upper()}`", meaning, stands_for))
    return lines


if __name__ == "__main__":
    print("\n".join([*settings_table(), "", *published_table()]))
