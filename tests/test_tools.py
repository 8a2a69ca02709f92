"""The script and its tools: what each says where a package is missing."""

from __future__ import annotations

import pytest

from helpers import ROOT, run_without

RUN_NEEDS = ("brotli", "numpy", "sentencepiece", "torch")
# A tool, a package that it needs, and the file that names this package.
NEEDED = [
    ("data/prepare.py", "sentencepiece", "requirements.txt"),
    ("tools/ablate.py", "pandas", "tools/requirements.txt"),
    ("tools/report.py", "altair", "tools/requirements.txt"),
    ("tools/submit.py", "python_minifier", "tools/requirements.txt"),
    ("tools/check.py", "numpy", "requirements.txt"),
    ("tools/sample.py", "torch", "requirements.txt"),
    *(("train_gpt.py", name, "requirements.txt") for name in RUN_NEEDS),
]


@pytest.mark.parametrize("tool, package, file", NEEDED)
def test_missing_package_is_said_in_one_line(tool, package, file, tmp_path):
    done = run_without(package, ROOT / tool, tmp_path, "runs/x", "--out", "out")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert package in done.stderr
    assert done.stderr.endswith(f"pip install -r {file}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["without.py"], "it writes nothing"
