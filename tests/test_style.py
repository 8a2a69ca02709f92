"""Style: ruff's format and rules in the whole repository, and how train_gpt.py is written."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from helpers import ROOT, SCRIPT

LONGEST_FUNCTION = 60  # lines, with its docstring


def functions() -> dict[str, ast.FunctionDef]:
    """Return every function and method of train_gpt.py, by line and name."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f"{node.lineno}: {node.name}": node for node in found}


@pytest.mark.parametrize("command", [("format", "--check"), ("check", "--output-format=concise")])
def test_ruff_has_nothing_to_say(command):
    pytest.importorskip("ruff", reason="pip install -r tests/requirements.txt")
    words = [sys.executable, "-m", "ruff", *command, "."]
    done = subprocess.run(words, cwd=ROOT, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_function_is_longer_than_a_page():
    lines = {name: node.end_lineno - node.lineno + 1 for name, node in functions().items()}
    assert {name: count for name, count in lines.items() if count > LONGEST_FUNCTION} == {}


def test_every_argument_has_a_type():
    """Also those of functions within functions and the starred ones, but not self and cls."""
    without = []
    for name, node in functions().items():
        listed = [child for child in ast.walk(node.args) if isinstance(child, ast.arg)]
        names = [argument.arg for argument in listed if argument.annotation is None]
        without += [f"{name}({own})" for own in names if own not in ("self", "cls")]
    assert without == []
