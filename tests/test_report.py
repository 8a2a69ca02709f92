"""tools/report.py: the page says what the files of the run say, and a browser draws it."""

from __future__ import annotations

import base64
import fcntl
import html.parser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers import ROOT, SCRIPT, TINY, run_well, run_without, tool_refusal, train_gpt

for package in ("altair", "vl_convert"):
    pytest.importorskip(package, reason="pip install -r tools/requirements.txt")
sys.path.insert(0, str(ROOT / "tools"))

import report

TOOL = ROOT / "tools" / "report.py"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
PHASES = {"RECUR_LAYERS": "1-2", "MAP_FREEZE": "mlp.fc=0.8"}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> list[Path]:
    """Return the folders of a run with random maps, a copy that is larger, and a learned one."""
    folder = tmp_path_factory.mktemp("runs")
    shared = {**TINY, **corpus.settings, "VAL_LOSS_EVERY": 3, "ITERATIONS": 6, "OUTPUT_DIR": folder}
    basis = {"MAP_BASIS": "hadamard,mlp=gaussian,attention.v=learned"}
    adapter = {"MAP_ADAPTER": "lora:4,attention.v=none"}
    run_well({**shared, **basis, **adapter, **PHASES, "RUN_ID": "random"})
    run_well({**shared, "MAP_BASIS": "learned", "MAP_ADAPTER": "none", "RUN_ID": "learned"})
    shutil.copytree(folder / "learned", folder / "larger")
    claim(folder / "larger", bytes_model=99_999, bytes_total=999_999, val_bpb=1.25)
    return [folder / "random", folder / "learned", folder / "larger"]


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory) -> tuple[Path, Path]:
    """Return the page of one run, with pictures, and that of three."""
    folder = tmp_path_factory.mktemp("pages")
    one, three = folder / "one.html", folder / "three.html"
    assert report.main([str(runs[0]), "--out", str(one), "--png"]) == 0
    assert report.main([*map(str, runs), "--out", str(three)]) == 0
    return one, three


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    """Return a copy of a run to damage."""
    return Path(shutil.copytree(runs[0], tmp_path / "copy"))


class Page(html.parser.HTMLParser):
    """The parts of a page: its text, the cells of its tables, charts, pictures, and addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tables, self.charts = "", [], {}
        self.pictures, self.addresses, self.chart, self.in_script = [], [], None, False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.pictures.append(base64.b64decode(given["src"].partition("base64,")[2]))
        self.in_script = tag in ("script", "style")
        self.chart = given.get("data-chart")

    def handle_endtag(self, tag: str) -> None:
        self.in_script, self.chart = False, None

    def handle_data(self, data: str) -> None:
        if self.chart:
            self.charts[self.chart.removeprefix("chart-")] = json.loads(data)
        elif not self.in_script:
            self.text += data
            if self.lasttag in ("td", "th") and data.strip():
                self.tables[-1][-1][-1] += data


def data_of(chart: dict) -> list[dict]:
    """Return the rows of all data of a chart."""
    return [row for rows in chart["datasets"].values() for row in rows]


def claim(folder: Path, **figures) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | figures))


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refusal(capsys, *arguments: object) -> str:
    return tool_refusal(capsys, report.main, *arguments)


# ---- What the page says --------------------------------------------------------------------------


def test_page_needs_nothing_but_itself(pages):
    for path in pages:
        addresses = Page(path).addresses
        assert addresses and all(address.startswith("data:") for address in addresses)
        assert not re.search(
            r"@import|url\(", path.read_text(encoding="utf-8").split("</style>")[0]
        )


def test_text_has_the_facts_of_the_run(runs, pages):
    """All of it stands in the page as text, so it needs no JavaScript."""
    page, facts = Page(pages[0]), results(runs[0])
    for name in ("val_bpb", "val_loss"):
        assert f"{facts[name]:.8f}" in page.text
    for name in ("bytes_total", "bytes_code", "bytes_model", "trained_parameters"):
        assert f"{facts[name]:,}" in page.text
    for stage in ("before", "roundtrip", "sliding_window"):
        assert f"{facts[f'val_bpb_{stage}']:.5f}" in page.text
    assert "ITERATIONS" in page.text and "torch" in page.text
    assert "recurrence:True" in page.text and "lowest loss on held-out" in page.text


def test_map_table_is_that_of_the_log(pages):
    (table,) = (table for table in Page(pages[0]).tables if table[0][0] == "map")
    rows = {row[0]: row for row in table[1:]}
    assert len(rows) == 4 * 6 + 2  # those of the blocks, and of two embeddings
    assert rows["blocks.0.attention.q"][1:5] == ["32x32", "1·hadamard", "12345", "lora:4"]
    assert rows["blocks.3.mlp.fc"][2] == "1·gaussian" and rows["blocks.3.mlp.fc"][7] == "0.8"
    assert rows["blocks.0.attention.v"][2] == "1·learned"
    assert rows["blocks.0.attention.v"][-1] == "–"
    assert float(rows["blocks.0.attention.q"][-1]) > 0
    source = pages[0].read_text(encoding="utf-8")
    for basis in ("hadamard", "gaussian", "learned"):
        assert f"background:{report.BASIS_COLORS[basis]}" in source


def test_charts_have_the_figures_of_the_run(runs, pages):
    charts = Page(pages[0]).charts
    assert list(charts) == [*list(report.CHARTS)[1:], "maps"]
    logged = {row["step"]: row for row in metrics(runs[0]) if "train_loss" in row}
    drawn = {row["step"]: row for row in data_of(charts["loss"]) if "tokens" in row}
    assert {step: row["train_loss"] for step, row in drawn.items()} == {
        step: row["train_loss"] for step, row in logged.items()
    }
    assert {row["tokens"] for row in drawn.values()} == {row["tokens"] for row in logged.values()}
    validated = {row["step"]: row["val_bpb"] for row in data_of(charts["validation"])}
    assert validated == {
        row["step"]: row["val_bpb"] for row in metrics(runs[0]) if "val_bpb" in row
    }
    phases = [row for row in data_of(charts["schedule"]) if "what" in row]
    assert len({row["step"] for row in phases}) >= 2
    groups = {row["group"]: row["bytes"] for row in data_of(charts["groups"])}
    assert sum(groups.values()) == pytest.approx(results(runs[0])["bytes_total"], abs=20)
    exported = [row for row in data_of(charts["candidates"]) if row["choice"] == "exported"]
    assert len(exported) == 1
    assert {row["family"] for row in data_of(charts["maps"])} == {"hadamard", "gaussian", "learned"}


def test_scatter_has_a_line_through_the_learned_networks(runs, pages):
    page = Page(pages[1])
    line, points = page.charts["scatter"]["layer"]
    assert line["mark"]["type"] == "line" and points["mark"]["type"] == "point"
    sets = page.charts["scatter"]["datasets"]
    learned = {row["run"] for row in sets[line["data"]["name"]]}
    assert learned == {"learned", "larger"}
    assert {row["run"] for row in sets[points["data"]["name"]]} == {"random", "learned", "larger"}
    assert {"maps1", "maps2", "maps3"} <= set(page.charts)
    heading, *rows = page.tables[0]
    by_run = {row[0]: dict(zip(heading, row, strict=True)) for row in rows}
    assert by_run["larger"]["val_bpb"] == "1.25000" and by_run["larger"]["bytes"] == "999,999"


def test_a_single_validation_is_shown_for_what_it_is(copied, tmp_path):
    """Where it lies among the steps, on an axis whose ticks tell its value."""
    path = copied / "metrics.jsonl"
    *first, last = [row for row in metrics(copied) if "val_bpb" in row]
    rows = [row for row in metrics(copied) if row not in first]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "page.html"
    assert report.main([str(copied), "--out", str(out)]) == 0
    chart = Page(out).charts["validation"]["hconcat"][0]["layer"][0]["encoding"]
    low, high = chart["y"]["scale"]["domain"]
    assert low < last["val_bpb"] < high < 1.2 * low
    assert chart["x"]["scale"]["domain"] == pytest.approx([0, 6], rel=0.05)


def test_command_repeats_the_run(runs):
    """It names the settings that are not the defaults of the logged script, and no others."""
    run = report.read_run(runs[0], False)
    named = dict(re.findall(r"^ *([A-Z_]+)=(.*?) \\$", run.command, re.M))
    h = train_gpt.load_settings({name: value.strip("'") for name, value in named.items()})
    for name, text in run.settings.items():
        if name not in report.PLACES:
            assert str(getattr(h, name.lower())) == text
    assert {"NUM_LAYERS", "MAP_BASIS"} <= set(named) and "MUON_WD" not in named
    defaults = report.default_settings(SCRIPT.read_text(encoding="utf-8"))
    for name, field in train_gpt.SETTINGS.items():
        assert defaults[name.upper()] == str(field.default)


def test_pictures_are_drawn(pages):
    """A page without JavaScript shows an SVG for each chart; --png writes each as a PNG."""
    page = Page(pages[0])
    assert len(page.pictures) == len(page.charts)
    assert all(picture.startswith(b"<svg") for picture in page.pictures)
    assert any(b"training loss" in picture for picture in page.pictures)
    pngs = {path.name.split(".")[1]: path.read_bytes() for path in pages[0].parent.glob("*.png")}
    assert set(pngs) == set(page.charts)
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in pngs.values())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt install chromium")
def test_browser_draws_every_chart_and_sorts_the_table(pages, tmp_path):
    """Every picture gives way to a drawing with marks; a click sorts by number."""
    path = tmp_path / "page.html"
    click = """<script>addEventListener("load", () => setTimeout(() => {
      [...document.querySelectorAll("th")].find(th => th.textContent === "val_bpb").click();
    }, 500));</script></body></html>"""
    page = pages[1].read_text(encoding="utf-8")
    path.write_text(page.rpartition("</body>")[0] + click, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [
            BROWSER,
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            path.as_uri(),
        ],
        timeout=100,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = tmp_path / "shown.html"
    shown.write_text(done.stdout, encoding="utf-8")
    parts = re.split(r'<div id="chart-', done.stdout)[1:]
    assert len(parts) == len(Page(pages[1]).charts)
    for part in parts:
        drawing = part.partition("</figure>")[0]
        assert "vega-embed" in drawing and "<img" not in drawing
        assert len(re.findall(r"<path [^>]*aria-label=", drawing)) >= 1
    scores = [float(row[1]) for row in Page(shown).tables[0][1:]]
    assert scores == sorted(scores) and scores[0] == 1.25


# ---- Readings ------------------------------------------------------------------------------------


def test_step_that_was_repeated_counts_once(copied):
    """A run that was continued takes some steps again; a machine that stops tears the last line."""
    path = copied / "metrics.jsonl"
    lines = path.read_text().splitlines()
    again = json.dumps(json.loads(lines[1]) | {"train_loss": 1.5})
    path.write_text("\n".join([*lines, again, '{"step": 7, "tok']))
    frame = report.read_metrics(path)
    losses = frame[frame["step"] == json.loads(lines[1])["step"]]["train_loss"].dropna()
    assert losses.tolist() == [1.5]
    assert 7 not in set(frame["step"])


def test_long_runs_are_thinned(runs, monkeypatch):
    monkeypatch.setattr(report, "MOST_POINTS", 2)
    frame = report.all_metrics([report.read_run(runs[0], False)])
    for _, part in frame.groupby("is_validation"):
        assert len(part) <= 2
    assert frame["step"].max() == 6


def test_unfinished_run_is_shown_on_demand(copied, tmp_path, capsys):
    (copied / "results.json").unlink()
    out = tmp_path / "page.html"
    assert "the run has not ended" in refusal(capsys, copied, "--out", out)
    assert not out.exists()
    with (copied / "train.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "the run is still going" in refusal(capsys, copied, "--out", out)
        assert report.main([str(copied), "--out", str(out), "--unfinished"]) == 0
    assert "not finished" in Page(out).text


def test_names_cannot_break_the_page(copied, tmp_path):
    """Text from a file is text on the page, whatever it is."""
    attack = "</script><script>alert(1)</script>"
    claim(copied, model=attack, hardware=attack)
    folder = copied.rename(tmp_path / "<b>bold")
    out = tmp_path / "page.html"
    other = shutil.copytree(folder, tmp_path / "deep" / "<b>bold")
    assert report.main([str(folder), str(other), "--out", str(out)]) == 0
    assert attack not in out.read_text(encoding="utf-8")
    assert attack in Page(out).text
    assert "deep/<b>bold" in Page(out).text


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("results.json", b"{", "results.json is not JSON"),
        ("results.json", b"[1]", "results.json is not JSON"),
        ("results.json", b"\xff", "results.json is not UTF-8 text"),
        ("train.log", b"\xff" * 99, "train.log is not UTF-8 text"),
        ("train.log", b"text", "has no source and settings"),
        ("train.log", None, "has no train.log"),
        ("metrics.jsonl", b"\xff", "metrics.jsonl is not UTF-8 text"),
        ("metrics.jsonl", b"text\ntext\n", "line 1 is not JSON"),
        ("metrics.jsonl", b"", "has no metrics"),
        ("metrics.jsonl", None, "cannot be read"),
    ],
)
def test_damaged_run_is_refused_in_one_line(copied, tmp_path, capsys, name, content, message):
    path = copied / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "page.html"
    assert message in refusal(capsys, copied, "--out", out, "--png")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy"]


def test_other_bad_input(runs, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "page.html"
    assert "has no train.log" in refusal(capsys, empty, "--out", out)
    assert "is no folder" in refusal(capsys, tmp_path / "nowhere", "--out", out)
    assert "no file that can be written" in refusal(capsys, runs[0], "--out", empty)
    assert "no file that can" in refusal(capsys, runs[0], "--out", tmp_path / "a" / "b.html")
    with pytest.raises(SystemExit) as ended:
        report.main([])
    assert ended.value.code == 2
    done = run_without("altair", TOOL, tmp_path, "runs/x")
    assert done.returncode == 1
    assert done.stderr == "error: altair is missing: pip install -r tools/requirements.txt\n"


# ---- TensorBoard ---------------------------------------------------------------------------------


@pytest.fixture
def tensorboard(monkeypatch):
    """Return tools/tensorboard.py, which has the name of the package that it needs."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(ROOT / "tools")])
    pytest.importorskip("tensorboard.backend", reason="pip install -r tools/requirements.txt")
    path = ROOT / "tools" / "tensorboard.py"
    spec = importlib.util.spec_from_file_location("tensorboard_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Return the scalars of an event file, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    names = found.Tags()["scalars"]
    return {name: {e.step: e.value for e in found.Scalars(name)} for name in names}


def test_tensorboard_reads_the_metrics(tensorboard, runs, tmp_path, capsys):
    out = tmp_path / "events"
    assert tensorboard.main([*map(str, runs[:2]), "--out", str(out)]) == 0
    for run in runs[:2]:
        found, rows = events(out / run.name), metrics(run)
        for name in ("train_loss", "val_bpb", "lr_scale", "tokens_per_second"):
            expected = {row["step"]: row[name] for row in rows if name in row}
            assert found[name] == pytest.approx(expected, rel=1e-5)
    assert "adapter_ratios/blocks.0.attention.q" in events(out / "random")
    assert tensorboard.main([str(runs[0]), "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_tensorboard_follows_a_run(tensorboard, copied, tmp_path, capsys):
    path = copied / "metrics.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[:20])
    out = tmp_path / "events"
    with (copied / "train.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert tensorboard.main([str(copied), "--out", str(out)]) == 1
        assert "the run is still going" in capsys.readouterr().err
        assert not out.exists()
        arguments = [str(copied), "--out", str(out), "--follow"]
        thread = threading.Thread(target=tensorboard.main, args=(arguments,))
        thread.start()
        with path.open("ab") as file:
            file.write(last[20:])
    thread.join(60)
    assert not thread.is_alive()
    assert events(out / "copy")["val_bpb"] == pytest.approx(
        {row["step"]: row["val_bpb"] for row in metrics(copied) if "val_bpb" in row}, rel=1e-5
    )


@pytest.mark.parametrize(
    "content, message",
    [(b"\xff\n", "line 1 is not JSON"), (b"text\n", "line 1 is not JSON"), (b"", "no metrics")],
)
def test_tensorboard_refuses_what_is_no_metrics(
    tensorboard, copied, tmp_path, capsys, content, message
):
    (copied / "metrics.jsonl").write_bytes(content)
    assert tensorboard.main([str(copied), "--out", str(tmp_path / "events")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
