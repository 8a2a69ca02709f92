"""Style: ruff's format and rules in the whole repository, and the length of functions."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from helpers import ROOT, SCRIPT

LONGEST_FUNCTION = 60  # lines, with its docstring


@pytest.mark.parametrize("command", [("format", "--check"), ("check", "--output-format=concise")])
def test_ruff_has_nothing_to_say(command):
    pytest.importorskip("ruff", reason="pip install -r tests/requirements.txt")
    words = [sys.executable, "-m", "ruff", *command, "."]
    done = subprocess.run(words, cwd=ROOT, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_function_is_longer_than_a_page():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lines = {f"{node.lineno}: {node.name}": node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: count for name, count in lines.items() if count > LONGEST_FUNCTION} == {}
