"""Style: ruff's format and rules in the whole repository, and how train_gpt.py is written."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys

import pytest

from helpers import ROOT, SCRIPT

LONGEST_FUNCTION = 60  # lines, with its docstring
needs_ruff = pytest.mark.skipif(
    importlib.util.find_spec("ruff") is None,
    reason="ruff is missing: pip install -r tests/requirements.txt",
)


def functions() -> dict[str, ast.FunctionDef]:
    """Return every function and method of train_gpt.py, by line and name."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f"{node.lineno}: {node.name}": node for node in found}


@needs_ruff
@pytest.mark.parametrize("command", [("format", "--check"), ("check", "--output-format=concise")])
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."],
        cwd=ROOT,
        timeout=100,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_function_is_longer_than_a_page():
    too_long = {}
    for name, node in functions().items():
        lines = node.end_lineno - node.lineno + 1
        if lines > LONGEST_FUNCTION:
            too_long[name] = lines
    assert too_long == {}


def test_every_argument_has_a_type():
    """Also those of functions within functions and the starred ones, but not self and cls."""
    without = []
    for name, node in functions().items():
        arguments = node.args
        listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
        for argument in listed + starred:
            if argument.annotation is None and argument.arg not in ("self", "cls"):
                without.append(f"{name}({argument.arg})")
    assert without == []
