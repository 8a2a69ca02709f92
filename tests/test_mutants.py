"""bench/mutants.py: its list is true of the script, and it tells killed mistakes from others."""

from __future__ import annotations

import collections
import json
import subprocess

import pytest

from bench import mutants
from helpers import ROOT

MUTANTS = mutants.all_mutants()


def text_of(mutant: mutants.Mutant) -> str:
    return (ROOT / mutant.file).read_text(encoding="utf-8")


@pytest.mark.parametrize("section", mutants.MUTANTS)
def test_each_mistake_can_be_made_at_one_place(section):
    """Whoever changes such a line changes the list with it."""
    group = mutants.MUTANTS[section]
    counts = {mutant.key: text_of(mutant).count(mutant.old) for mutant in group}
    assert {key: count for key, count in counts.items() if count != 1} == {}
    assert not [mutant.key for mutant in group if "\n" in mutant.old + mutant.new]
    assert not [mutant.key for mutant in group if mutant.old == mutant.new]


def test_no_mistake_stands_twice_and_each_has_its_harm():
    counts = collections.Counter(mutant.key for mutant in MUTANTS)
    assert [key for key, count in counts.items() if count > 1] == []
    assert all(mutant.harm for mutant in MUTANTS)
    assert len(MUTANTS) >= 60


def test_the_named_tests_are_there():
    for name in {name for mutant in MUTANTS for name in mutant.named_tests()}:
        file, _, test = name.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"\ndef {test.partition('[')[0]}(" in text, name


def test_the_record_leaves_no_survivor_without_a_reason_and_the_table_shows_it():
    record = mutants.read_record(ROOT)
    for mutant in MUTANTS:
        verdict = record.get(mutant.key, mutants.Verdict("not tried"))
        assert verdict.outcome in ("killed", "not tried") or mutant.harmless, mutant.key
    table = (ROOT / mutants.TABLE).read_text(encoding="utf-8")
    assert table == mutants.table(record), "write it by python bench/mutants.py --table"


# ---- The program, on a project of two lines ------------------------------------------------------

ADD = mutants.Mutant("a + b", "a - b", "sums are wrong", "sum::test_sum", "sums.py")
TWICE = mutants.Mutant("2 * a", "a + a", "none", "sum", "sums.py", harmless="it is the same")
HALF = mutants.Mutant("a / 2", "a / 3", "halves are wrong", "sum::test_sum", "sums.py")
GONE = mutants.Mutant("a ** b", "a * b", "powers are wrong", "sum", "sums.py")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with one tested function, and two whose tests are not among those named."""
    files = {
        "sums.py": "add = lambda a, b: a + b\ntwice = lambda a: 2 * a\nhalf = lambda a: a / 2\n",
        "tests/test_sum.py": "import sums\ndef test_sum(): assert sums.add(2, 1) == 3\n",
        "tests/test_half.py": "import sums\ndef test_half(): assert sums.half(6) == 3\n",
        "bench/results/readme": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutants, "MUTANTS", {"All": [ADD, TWICE, HALF]})
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "IMPORTED", ())  # these tests need nothing
    return tmp_path


def call(capsys, monkeypatch, *words: str) -> tuple[int, list[str]]:
    """Return the exit code of the program and the lines that it prints."""
    monkeypatch.setattr("sys.argv", ["mutants.py", *words])
    with pytest.raises(SystemExit) as ended:
        mutants.main()
    return int(ended.value.code), capsys.readouterr().out.splitlines()


def test_killed_survived_and_tried_again(project, capsys, monkeypatch):
    code, lines = call(capsys, monkeypatch)
    assert code == 1, "one survivor harms"
    assert [line.split()[0] for line in lines[:3]] == ["killed", "survived", "survived"]
    assert lines[0].startswith("killed sum::test_sum: sums.py: a + b -> a - b")
    assert "1 left without a reason" in lines[3]
    assert "a / 2 -> a / 3: halves are wrong" in lines[4]
    assert (project / "sums.py").read_text().count("a + b") == 1, "the repository is not touched"
    page = (project / mutants.TABLE).read_text()
    assert "3 mutations: 1 killed, 2 survived, 0 not tried." in page
    assert "| survived: it is the same |" in page
    code, lines = call(capsys, monkeypatch, "--all", "--jobs", "2")
    assert code == 0, "the whole suite kills it"
    assert [line.split()[0] for line in lines[:2]] == ["survived", "killed"]
    record = json.loads((project / mutants.RECORD).read_text())
    assert record[HALF.key] == ["killed", "half::test_half", "all"]


def test_what_is_no_mistake_of_the_script_is_named(project):
    with pytest.raises(ValueError, match=r"sums\.py: 0 times, not once: a \*\* b"):
        GONE.apply(project)


def test_tests_that_fail_by_themselves_kill_nothing(project, capsys, monkeypatch):
    (project / "tests" / "test_sum.py").write_text("def test_sum(): assert False\n")
    with pytest.raises(RuntimeError, match="without a mutation the tests fail"):
        call(capsys, monkeypatch)
