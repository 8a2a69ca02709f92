"""What the README, the pages of docs/ and the presets say, against what is there."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
import torch

from helpers import ROOT, SCRIPT, SETTINGS, tiny_settings, train_gpt

PAGES = [ROOT / "README.md"]
PAGES += sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("bench/results/*.md")])
PRESETS = ROOT / "presets"
ON_EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def sh_lines(text: str) -> list[str]:
    """Return the lines of the blocks of shell commands; one that is continued is one line."""
    return "\n".join(fenced(text, "sh")).replace("\\\n", " ").splitlines()


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def inline(text: str) -> list[str]:
    """Return what stands between single backticks outside blocks, on one line or two."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


@ON_EVERY_PAGE
def test_every_link_and_named_file_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{target} (a link to a page, headings change)"
    folders = r"(?<![\w/.])(?:(?:bench|data|docs|presets|tests|tools|comparison)/[\w./-]*\w"
    for name in re.findall(folders + r"|train_gpt\.py|run\.sh)", text):
        if not name.startswith(("data/datasets/", "data/tokenizers/")):  # users make these
            places = (ROOT / name, page.parent / name, ROOT / f"{name}.py", ROOT / f"{name}.env")
            assert any(place.exists() for place in places), name
    assert not re.search(r"\.\./shared|/work/", text), "a place that users do not have"


@ON_EVERY_PAGE
def test_every_command_is_one_that_its_program_takes(page):
    text = page.read_text(encoding="utf-8")
    lines = sh_lines(text)
    lines += [code for code in inline(text) if re.search(r"\b(python|bash|ruff) ", code)]
    for words in [shlex.split(line, comments=True) for line in lines]:
        for program in [word for word in words if re.search(r"\.(py|sh)$", word)]:
            source = (ROOT / program).read_text(encoding="utf-8")
            after = words[words.index(program) + 1 :]
            for option in after:
                if option.startswith("--") and option != "--help":
                    spellings = (f'"{option}"', f"{option[2:].replace('-', '_')}=", f"{option})")
                    assert any(spelling in source for spelling in spellings), f"{program} {option}"
            if program == "bench/gpu.sh":
                parts = re.search(r'^parts="(.*)"$', source, re.MULTILINE).group(1).split()
                assert set(after) <= {*parts, "--list"}, after
        if "pytest" in words and "-k" in words:
            files = [ROOT / word for word in words if word.startswith("tests/")]
            files = files or [*ROOT.glob("tests/test_*.py")]
            tests = "".join(path.read_text(encoding="utf-8") for path in files)
            for part in words[words.index("-k") + 1].split(" or "):  # of a name, or of a case's
                assert part in tests, f"{part} in {words}"


# Names in capitals that belong to other programs, or stand for something of the reader's.
OTHER_NAMES = {
    *("BOOKS", "DIR", "FOLDER", "OUT", "PRESET", "PYTHON", "RANDMAPS", "SIGTERM"),
    *("DENSITY", "GOLDEN", "LAYERS", "MOMENTS", "SELECTOR", "STAGE", "VALUE"),
}


@ON_EVERY_PAGE
def test_every_name_in_capitals_is_a_setting_or_a_name_of_the_script(page):
    known = {*SETTINGS, *train_gpt.UNSUPPORTED, *train_gpt.Role.__members__, *dir(train_gpt)}
    known |= OTHER_NAMES
    for code in inline(page.read_text(encoding="utf-8")):
        for name in re.findall(r"(?<![\w.:/{])([A-Z][A-Z0-9_]{4,})(?=[=`]|$| |:)", code):
            assert name in known or name.startswith("MAP_"), f"{name} in `{code}`"


def test_every_explained_message_is_one_of_the_script():
    """In a text with values, … stands for a value."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(rows) > 20
    texts = (ROOT / "run.sh").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "") for part in node.values]
            texts += "".join(part if isinstance(part, str) else "…" for part in parts) + "\n"
        elif isinstance(node, ast.Constant):
            texts += f"{node.value}\n"
    assert [row for row in rows if row not in texts] == []


def test_the_examples_for_contributors_work(monkeypatch, random_model):
    """A new basis and a new adapter, each a function or class and a line in a table."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    names = dict(vars(train_gpt))
    added = {}
    for block in fenced(text, "python"):
        code, _, row = block.rpartition("\n\n\n")
        exec(code, names)
        table, key, value = re.fullmatch(r'(\w+) = \{\.\.\., "(\w+)": (\w+)\}\n', row).groups()
        monkeypatch.setitem(getattr(train_gpt, table), key, names[value])
        added[table] = key
    words = [*train_gpt.CELL_WORDS["basis"], added["BASES"]]  # an import of the script would add it
    monkeypatch.setitem(train_gpt.CELL_WORDS, "basis", words)
    cells = {"map_basis": added["BASES"], "map_adapter": f"{added['ADAPTERS']}+lora:4"}
    model = random_model(tiny_settings(num_layers=1, ve_layers="0", **cells))
    layer = model.get_submodule("blocks.0.mlp.fc")
    assert layer.weight.float().std().item() == pytest.approx(32**-0.5, rel=0.1)
    ids = torch.arange(32).view(2, 16)
    model(ids, ids).backward()
    parameters = list(layer.get_submodule(added["ADAPTERS"]).parameters())
    assert parameters and all(p.grad.abs().sum() > 0 for p in parameters)


PUBLISHED = sh_lines((ROOT / "docs" / "published.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", [line for line in PUBLISHED if line.strip()])
def test_published_runs_can_be_asked_for(command):
    words = shlex.split(command, comments=True)
    given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    preset = PRESETS / f"{given.pop('PRESET', 'random_adapters')}.env"  # not its twin for CPUs
    around = {"WORLD_SIZE": "8", "PRESET": str(preset)}
    if preset.stem == "distill_from":  # run.sh trains the teacher
        around["DISTILL_FROM"] = "teacher.ptz"
    train_gpt.load_settings(around | given)


def test_every_preset_has_a_twin_for_the_cpu_and_a_row_in_the_readme():
    names = {path.stem for path in PRESETS.glob("*.env")}
    assert names == {path.stem for path in PRESETS.glob("cpu/*.env")} - {"common"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Experiments")[2].partition("A preset is")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == names
