"""Write docs/settings.md, the reference of all settings, from their declaration in train_gpt.py.

python tools/settings_table.py            # write the file
python tools/settings_table.py --check    # exit with 1 if the file is not up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t

PAGE = ROOT / "docs" / "settings.md"
INTRODUCTION = """# Settings

Every setting is an environment variable: `NUM_LAYERS=6 python train_gpt.py`. All values are checked
before anything starts, and a misspelled name is an error. An artifact stores the settings with a
check mark, since rebuilding its model depends on them.
"""
ALIASES = """## Variables of published scripts

Each is short for other settings; `VALUE` is the variable's value. "Also sets" holds unless somebody
sets that, too.
"""
UNSUPPORTED = """These variables of published scripts are refused with the reason. The accepted
values change nothing here.
"""


def row(*cells: str) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def header(*names: str) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [row(*names), row(*["---"] * len(names))]


def range_of(name: str) -> str:
    """Return what values a setting may have."""
    rule = t.SETTINGS[name].metadata
    if isinstance(t.SETTINGS[name].default, str):
        return ", ".join(f"`{choice}`" for choice in rule["choices"])
    low, high = (
        f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
        for limit in (rule["low"], rule["high"])
    )
    return f"from {low}" if high == "inf" else f"{low} to {high}"


def settings_tables() -> list[str]:
    """Return a table for each group of settings."""
    titles = {first: title for title, first in t.SETTING_GROUPS.items()}
    lines = []
    for name, f in t.SETTINGS.items():
        if name in titles:
            columns = header("variable", "default", "range", "stored", "meaning")
            lines += ["", f"## {titles[name]}", "", *columns]
        default = f"`{f.default}`" if f.default != "" else "empty"
        stored = "✓" if f.metadata["stored"] else ""
        lines.append(
            row(f"`{name.upper()}`", default, range_of(name), stored, f.metadata["meaning"])
        )
    return lines


def in_words(settings: Mapping[str, str]) -> str:
    """Return settings of an alias as text."""
    return ", ".join(
        f"`{name.upper()}={text.replace('{}', 'VALUE')}`" for name, text in settings.items()
    )


def alias_table() -> list[str]:
    """Return the table of the variables of published scripts."""
    lines = [ALIASES, *header("variable", "meaning", "stands for", "also sets")]
    for name, alias in t.ALIASES.items():
        cells = f"`{name.upper()}`", alias.meaning, in_words(alias.sets), in_words(alias.defaults)
        lines.append(row(*cells))
    return lines


def unsupported_table() -> list[str]:
    """Return the table of published variables that are refused."""
    lines = [UNSUPPORTED, *header("variable", "accepted", "reason")]
    for name, unsupported in t.UNSUPPORTED.items():
        accepted = ", ".join(f"`{value}`" for value in unsupported.defaults)
        lines.append(row(f"`{name}`", accepted, unsupported.reason))
    return lines


def page() -> str:
    """Return the content of the file."""
    lines = [INTRODUCTION.rstrip(), *settings_tables(), "", *alias_table(), ""]
    lines += unsupported_table()
    lines += ["", "<!-- Written by tools/settings_table.py from train_gpt.py. -->"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    content = page()
    path = PAGE.relative_to(ROOT)
    is_current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == content
    if is_current:
        print(f"{path} is up to date")
    elif options.check:
        print(f"error: {path} is not up to date; run python tools/settings_table.py")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(content, encoding="utf-8")
        print(f"written: {path}")
    return int(options.check and not is_current)


if __name__ == "__main__":
    sys.exit(main())
