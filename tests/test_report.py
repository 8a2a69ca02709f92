"""tools/report.py: the page says what the files of the run say, whatever they contain."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from helpers import ROOT, TINY, claim, metrics_of, results_of, run_well, tool_refusal

for package in ("altair", "vl_convert", "tensorboard"):
    pytest.importorskip(package, reason="pip install -r tools/requirements.txt")
sys.path.insert(0, str(ROOT / "tools"))

import report

HOSTILE = "<!--<script>alert(1)</script>"


def map_row(name: str, basis: str, size: int) -> dict:
    row = {"name": name, "shape": "32x16", "basis": basis, "gain": 1.0, "seed": 7, "learned": size}
    return row | {"adapter": "lora:4", "scale": "none", "gate": None, "freeze": 0.0, "learned": 9}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> list[Path]:
    """Return the folders of a run with a random map, of a learned one, and of a larger one.

    Their tables are set here, as the script writes them.
    """
    folder = tmp_path_factory.mktemp("runs")
    settings = {**TINY, **corpus.settings, "VAL_LOSS_EVERY": 3, "ITERATIONS": 6}
    run_well({**settings, "OUTPUT_DIR": folder, "RUN_ID": "random"})
    for name in ("learned", "larger"):
        shutil.copytree(folder / "random", folder / name)
    maps = [map_row("blocks.0.attention.q", "hadamard", 340), map_row("head", "learned", 90)]
    groups = [{"group": "A codes", "bytes": 1234}, {"group": "weight codes", "bytes": 567}]
    codes = [{"role": "factor", "values": 4096, "bytes": 1200, "bits": 2.34, "loss": None}]
    settings = {"NUM_LAYERS": 4, "MAP_BASIS": "hadamard"}
    claim(folder / "random", maps=maps, groups=groups, codes=codes, settings=settings)
    with (folder / "random" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "phase", "step": 6, "text": "frozen_maps:2"}\n')
    claim(folder / "learned", maps=maps[1:])
    larger = {"bytes_model": 99_999, "bytes_total": 999_999, "val_bpb": 1.25}
    claim(folder / "larger", maps=maps[1:], groups=groups, **larger)
    return [folder / "random", folder / "learned", folder / "larger"]


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    """Return a copy of a run to damage."""
    return Path(shutil.copytree(runs[0], tmp_path / "copy"))


class Page:
    """The parts of a page: charts; and what is shown without JavaScript: rows, text, addresses."""

    def __init__(self, path: Path) -> None:
        self.source = path.read_text(encoding="utf-8")
        charts = re.findall(r'data-chart="(\w+)">(.*?)</script>', self.source)
        self.charts = {name: json.loads(data) for name, data in charts}
        shown = re.sub(r"(?s)<(script|style).*?</\1>", "", self.source)
        self.addresses = re.findall(r'(?:src|href)="(.*?)"', shown)
        rows = [re.findall(r"(?s)<t[dh]>(.*?)</t[dh]>", row) for row in shown.split("<tr")[1:]]
        self.rows = [[html.unescape(cell) for cell in row] for row in rows]
        self.text = html.unescape(re.sub(r"(?s)<.*?>", "", shown))

    def data_of(self, chart: str) -> list[dict]:
        """Return the rows of all data of a chart."""
        return [row for rows in self.charts[chart]["datasets"].values() for row in rows]


def refusal(capsys, *arguments: object) -> str:
    return tool_refusal(capsys, report.main, *arguments)


def test_page_needs_nothing_but_itself_and_has_the_facts_of_the_runs(runs, tmp_path):
    """Tables are text and charts hold their data; --png also writes each beside the page."""
    three = tmp_path / "three.html"
    assert report.main([*map(str, runs), "--out", str(three)]) == 0
    points = Page(three).charts["scatter"]["layer"][1]["data"]["name"]
    assert len(Page(three).charts["scatter"]["datasets"][points]) == 3
    one = tmp_path / "one.html"
    assert report.main([str(runs[0]), "--out", str(one), "--png"]) == 0
    page, facts = Page(one), results_of(runs[0])
    assert all(each.startswith("data:image/svg") for each in page.addresses)
    assert len(page.addresses) == len(page.charts)
    assert {path.name.split(".")[1] for path in tmp_path.glob("*.png")} == set(page.charts)
    for chart, name in (("loss", "train_loss"), ("validation", "val_bpb")):
        drawn = {row["step"]: row[name] for row in page.data_of(chart) if name in row}
        assert drawn == pytest.approx(metrics_of(runs[0], name))
    stated = {row[0]: row[1] for row in page.rows if len(row) == 2}
    for name in ("val_bpb", "bytes_total", "trained_parameters", "val_bpb_before"):
        assert stated[name] == f"{facts[name]:,}"
    assert stated["hardware"] == facts["hardware"] and stated["from step 6"] == "frozen_maps:2"
    rows = {row[0]: row for row in page.rows}
    assert rows["factor"] == ["factor", "4,096", "1,200", "2.34000", "–"]
    assert rows["A codes"] == ["A codes", "1,234"]
    assert rows["blocks.0.attention.q"][1:3] == ["32×16", "hadamard"]
    assert float(rows["blocks.0.attention.q"][-1]) > 0  # adapter ratio
    assert "NUM_LAYERS=4 \\\n    MAP_BASIS=hadamard \\\n    python train_gpt.py" in page.text


def test_what_a_continued_run_left_behind_is_not_shown(copied, tmp_path):
    """Killed after step 6, and continued from step 3; a machine that stops tears the last line."""
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train_loss": 1.5}\n{"step": 5, "train_loss": 1.5}\n{"step": 6, "t')
    run = report.read_run(copied, False)
    assert not len(run.phases) and max(run.metrics["step"]) == 5
    assert run.metrics["train_loss"].dropna().tolist()[3:] == [1.5, 1.5]
    assert report.main([str(copied), "--tensorboard", str(tmp_path / "events")]) == 0
    assert list(events(tmp_path / "events" / "copy")["train_loss"]) == [1, 2, 3, 4, 5]


def test_unfinished_run_is_shown_on_demand(copied, tmp_path, capsys):
    (copied / "results.json").unlink()
    out = tmp_path / "page.html"
    assert "the run has not ended" in refusal(capsys, copied, "--out", out)
    assert report.main([str(copied), "--out", str(out), "--unfinished"]) == 0
    assert "not finished" in Page(out).text


def test_no_text_of_a_run_can_break_the_page(copied, tmp_path):
    """Text from a file is text on the page, in tables and in the data of the charts."""
    settings = {"RUN": HOSTILE, "A=1; rm": "2"}
    groups = [{"group": HOSTILE, "bytes": 5}]
    maps = [map_row(HOSTILE, HOSTILE, 5)]
    claim(copied, model=HOSTILE, maps=maps, groups=groups, settings=settings)
    folder = copied.rename(tmp_path / "<!--<script>")
    out = tmp_path / "page.html"
    assert report.main([str(folder), "--out", str(out)]) == 0
    page = Page(out)
    assert "<!--" not in page.source and "<script>alert" not in page.source
    for data in re.findall(r'data-chart="\w+">(.*?)</script>', page.source):
        assert "<" not in data
    assert page.text.count(HOSTILE) > 3
    assert "rm" not in page.text.partition("The command")[2].partition("train_gpt.py")[0]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("results.json", b"[1]", "results.json is not JSON"),
        ("results.json", b"[" * 99999, "results.json is not JSON"),
        ("results.json", b"\xff", "results.json is not UTF-8 text"),
        ("metrics.jsonl", b"text\ntext\n", "line 1 is not JSON"),
        ("metrics.jsonl", b"", "has no metrics"),
    ],
)
def test_damaged_run_is_refused_in_one_line(copied, tmp_path, capsys, name, content, message):
    (copied / name).write_bytes(content)
    out = tmp_path / "page.html"
    assert message in refusal(capsys, copied, "--out", out, "--png")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy"]


def test_other_bad_input(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert "name the folder of a run" in refusal(capsys, tmp_path / "nowhere", "--out", out)
    assert "no file that can be written" in refusal(capsys, runs[0], "--out", tmp_path)


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Return the scalars of an event file, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    names = found.Tags()["scalars"]
    return {name: {e.step: e.value for e in found.Scalars(name)} for name in names}


def test_tensorboard_reads_the_metrics(runs, tmp_path, capsys):
    out = tmp_path / "events"
    assert report.main([*map(str, runs[:2]), "--tensorboard", str(out)]) == 0
    for run in runs[:2]:
        found = events(out / run.name)
        for name in ("train_loss", "val_bpb", "lr_scale", "tokens_per_second"):
            assert found[name] == pytest.approx(metrics_of(run, name), rel=1e-5)
        assert "adapter_ratios/blocks.0.attention.q" in found
    capsys.readouterr()
    assert "is there already" in refusal(capsys, runs[0], "--tensorboard", out)
