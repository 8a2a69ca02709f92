"""Make one HTML page of one run, or of several side by side.

    python tools/report.py runs/ID --out report.html
    python tools/report.py runs/A runs/B runs/C --out report.html --png

The page holds everything that it shows: it opens from the disk and needs no network. Charts are
interactive; without JavaScript they are pictures, and all tables are text. --png also writes every
chart as report.NAME.png beside the page.

RUN is the folder of a finished run: its train.log, metrics.jsonl and results.json are read. A run
that is still going is refused, except with --unfinished, which shows what there is. The exit code
is 0, or 1 with one line that says what is wrong, or 2 for unusable arguments.
"""

from __future__ import annotations

import argparse
import ast
import base64
import dataclasses
import functools
import html
import json
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

try:
    import altair as alt
    import jinja2
    import pandas as pd
    import vl_convert as vlc
except ImportError as missing:
    raise SystemExit(
        f"error: {missing.name} is missing: pip install -r tools/requirements.txt"
    ) from None

import check

MOST_POINTS = 2000  # of one curve of one run
MOST_LABELS = 6  # of points in one chart
LONG = 30  # characters of a cell that may be broken into lines
# Settings that say where a run is written, not what it computes.
PLACES = ("RUN_ID", "OUTPUT_DIR", "RESUME")
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
MAP_HEADING = "map shape basis seed adapter scale gate freeze learned frozen bytes"
MAP_COLUMNS = MAP_HEADING.split()
MAP_NUMBERS = ("learned", "frozen", "bytes")
BASIS_COLORS = {
    "learned": "#4c78a8",
    "orthogonal": "#f58518",
    "gaussian": "#54a24b",
    "uniform": "#b279a2",
    "rademacher": "#e45756",
    "hadamard": "#72b7b2",
    "shared": "#9d755d",
}


class UserError(Exception):
    """A problem that a person can fix. The message says what is wrong, where, and what to do."""


# ---- A run ---------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Return the text of a file. UserError if it is no text."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; copy the run again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_results(path: Path, unfinished: bool) -> dict[str, Any]:
    """Return results.json; an unfinished run has none."""
    if unfinished and not path.exists():
        return {}
    try:
        results = json.loads(read_text(path))
    except ValueError:
        results = None
    if not isinstance(results, dict):
        raise UserError(f"{path} is not JSON as a run writes it; copy the run again")
    return results


def read_metrics(path: Path) -> pd.DataFrame:
    """Return a row for each object of metrics.jsonl; a step that was repeated counts once."""
    rows = []
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), **row})
        except (ValueError, TypeError, KeyError):
            is_last = number == len(lines)
            if not is_last:  # a machine that stops may tear the last one
                raise UserError(f"{path}: line {number} is not JSON as a run writes it") from None
    if not rows:
        raise UserError(f"{path} has no metrics; the run did not take a step")
    frame = pd.DataFrame(rows)
    for name in ("tokens", "seconds", "tokens_per_second", "train_loss", "lr_scale", "grad_norm"):
        frame[name] = pd.to_numeric(frame.get(name), errors="coerce")
    for name in ("val_loss", "val_bpb"):
        frame[name] = pd.to_numeric(frame.get(name), errors="coerce")
    frame["is_validation"] = frame["val_bpb"].notna()
    return frame.drop_duplicates(["step", "is_validation"], keep="last").sort_values("step")


def constant(node: ast.expr) -> Any:
    """Return the value of an expression of numbers and texts. ValueError for any other."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return constant(node.left) ** min(constant(node.right), 64)
    return ast.literal_eval(node)


def default_settings(source: str) -> dict[str, str]:
    """Return the defaults of a script's settings, as a log writes them; nothing is executed."""
    defaults = {}
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return {}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    fields = [node for each in classes if each.name == "Hyperparameters" for node in each.body]
    for field in fields:
        value = getattr(field, "value", None)
        if isinstance(field, ast.AnnAssign) and isinstance(value, ast.Call) and value.args:
            try:
                defaults[field.target.id.upper()] = str(constant(value.args[0]))
            except (ValueError, TypeError):
                continue
    return defaults


@dataclasses.dataclass
class Run:
    """What the files of a run say."""

    name: str
    folder: Path
    source: str  # of the script
    record: str  # the log below the source
    settings: dict[str, str]
    results: dict[str, Any]
    metrics: pd.DataFrame

    def found(self, pattern: str) -> list[re.Match]:
        """Return the matches of all lines of the log."""
        return list(re.finditer(f"^{pattern}$", self.record, re.M))

    def result(self, name: str) -> float:
        """Return a figure of results.json; NaN without one."""
        value = self.results.get(name)
        return float(value) if isinstance(value, (int, float)) else math.nan

    @functools.cached_property
    def maps(self) -> pd.DataFrame:
        """The map table, with the ratio of adapter to map at the last validation."""
        rows: list[list[str]] = []
        heading = r"\s+".join(MAP_COLUMNS)
        tables = self.found(heading + r"((?:\n.*)*?)(?=\n[\d,]+ trained and )[^\n]*")
        if tables:
            cells = [line.split() for line in tables[-1][1].strip().splitlines()]
            rows = [row for row in cells if len(row) == len(MAP_COLUMNS)]
        frame = pd.DataFrame(rows, columns=MAP_COLUMNS)
        for name in MAP_NUMBERS:
            numbers = frame[name].str.replace(",", "")
            frame[name] = pd.to_numeric(numbers, errors="coerce").fillna(0).astype(int)
        # A basis is written as 1·orthogonal, or 1·shared:2·permutation with a twist.
        families = frame["basis"].str.split("·").str[1].fillna("").str.partition(":")[0]
        frame["family"] = families if len(frame) else ""
        ratios = {}
        for value in self.metrics.get("adapter_ratios", pd.Series(dtype=object)):
            if isinstance(value, dict):
                ratios = value
        frame["ratio"] = frame["map"].map(ratios)
        return frame

    @functools.cached_property
    def groups(self) -> pd.DataFrame:
        """Bytes of the artifact by group of like tensors."""
        lines = self.found(r"artifact bytes: (.*)")
        parts = lines[-1][1].split(", ") if lines else []
        pairs = [part.rpartition(" ") for part in parts]
        rows = [(name, int(size.replace(",", ""))) for name, _, size in pairs]
        return pd.DataFrame(rows, columns=["group", "bytes"])

    @functools.cached_property
    def codes(self) -> list[list[str]]:
        """The table of what each role's codes take and cost: role, values, bytes, bits, loss."""
        heading = r"codes +values +bytes +bits +loss"
        tables = self.found(heading + r"((?:\n\w+(?: +[\d.,]+){4})+)")
        return [line.split() for line in tables[-1][1].strip().splitlines()] if tables else []

    @property
    def versions(self) -> str:
        """The versions of the packages, and the device."""
        words = self.line("versions ").removeprefix("versions ")
        return re.sub(r'[{}"]', "", words).replace(": ", " ").replace(" device ", "; ")

    @property
    def stalls(self) -> str:
        """How often training waited for data, and how long."""
        words = self.line("data_stalls:")
        return re.sub(r"data_stalls:(\d+) seconds:(\S+)", r"\1, in all \2 s", words)

    @property
    def phases(self) -> list[tuple[int, str]]:
        """The steps at which something began, and what."""
        found = self.found(r"phase step:(\d+) progress:\S+ (.*)")
        phases = [(int(match[1]), match[2]) for match in found]
        late = [(int(match[1]), "late QAT") for match in self.found(r"late_qat:on step:(\d+) .*")]
        return sorted({*phases, *late})

    @property
    def candidates(self) -> dict[str, dict[str, float]]:
        """The held-out loss of each candidate, `before` quantization and `quantized`."""
        before = self.line("average ").partition(" best:")[0].split()[1:]
        quantized = [match[1] for match in self.found(r"quantized (\S+) model .*")]
        return {
            stage: {name: float(loss) for name, loss in (pair.split(":") for pair in pairs)}
            for stage, pairs in (("before", before), ("quantized", quantized))
        }

    @property
    def exported(self) -> str:
        """The candidate that was exported; empty if none was yet."""
        return self.line("exported:").removeprefix("exported:")

    @property
    def ended_by(self) -> str:
        """What ended the training; empty if nothing did."""
        found = self.found(r"average .* ended_by:(\S+).*")
        return found[-1][1] if found else ""

    def line(self, pattern: str) -> str:
        """Return the last line of the log that begins so; empty without one."""
        found = self.found(f"{pattern}.*")
        return found[-1][0] if found else ""

    @property
    def processes(self) -> str:
        return re.match(r"\d*", str(self.results.get("hardware", "")))[0] or "1"

    @property
    def command(self) -> str:
        """What repeats the run: every setting that is not the script's default."""
        defaults = default_settings(self.source)
        words = [
            f"{name}={shlex.quote(value)}"
            for name, value in self.settings.items()
            if value != defaults.get(name) and name not in PLACES
        ]
        launcher = f"torchrun --standalone --nproc_per_node={self.processes}"
        start = "python" if self.processes == "1" else launcher
        return " \\\n    ".join([*words, f"{start} train_gpt.py"])

    @property
    def is_learned(self) -> bool:
        """Whether no map is random."""
        if len(self.maps):
            return set(self.maps["family"]) == {"learned"}
        return self.settings.get("MAP_BASIS") == "learned"


def read_run(folder: Path, unfinished: bool) -> Run:
    """Return the run of a folder. UserError says what is wrong with it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name a run's, such as runs/ID")
    log = folder / "train.log"
    if not log.is_file():
        raise UserError(f"{folder} has no train.log; it is not a run's folder")
    hint = "wait until it ends, or show what there is with --unfinished"
    if check.is_going(log) and not unfinished:
        raise UserError(f"{folder}: the run is still going; {hint}")
    if not (folder / "results.json").exists() and not unfinished:
        raise UserError(f"{folder}: the run has not ended; {hint}")
    text = read_text(log)
    source, mark, record = text.partition("\nRUN_ID=")
    if not mark:
        raise UserError(f"{log} has no source and settings; it is not the log of a run")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        source=source,
        record=mark + record,
        settings=check.Submission(folder, check.Options()).settings,
        results=read_results(folder / "results.json", unfinished),
        metrics=read_metrics(folder / "metrics.jsonl"),
    )


def read_runs(folders: list[Path], unfinished: bool) -> list[Run]:
    """Return the runs; those whose folders have one name get that of the parent, too."""
    distinct = list(dict.fromkeys(folder.resolve() for folder in folders))
    runs = [read_run(folder, unfinished) for folder in distinct]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    return runs


# ---- Charts --------------------------------------------------------------------------------------

AXES = {"step": "step", "tokens": "tokens", "seconds": "training time in seconds"}
SHORT, PLAIN = ".3~s", ",~f"  # formats of numbers: 1.5M and 1,500,000


def all_metrics(runs: list[Run]) -> pd.DataFrame:
    """Return the metrics of all runs, at most MOST_POINTS of each kind and run."""
    frames = []
    for run in runs:
        for _, part in run.metrics.groupby("is_validation"):
            every = -(-len(part) // MOST_POINTS)
            frames.append(part.iloc[::-1].iloc[::every].assign(run=run.name))
    frame = pd.concat(frames, ignore_index=True)
    return frame.drop(columns="adapter_ratios", errors="ignore").sort_values(["run", "step"])


def by_run(runs: list[Run], selection: alt.Parameter | None = None) -> dict[str, Any]:
    """Return the color of each run, and faint lines for those that the legend does not select."""
    names = [run.name for run in runs]
    legend = alt.Legend(title=None, orient="top", columns=4, labelLimit=300, symbolLimit=0)
    scheme = "tableau10" if len(runs) <= 10 else "tableau20"
    color = alt.Color(
        "run:N",
        scale=alt.Scale(domain=names, scheme=scheme),
        legend=legend if len(runs) > 1 else None,
    )
    if selection is None:
        return {"color": color}
    opacity = alt.condition(selection, alt.value(1.0), alt.value(0.15))
    return {"color": color, "opacity": opacity}


def scale_to(end: float) -> alt.Scale:
    """Return a scale from 0 to this number, or one that fits the data if there is none."""
    return alt.Scale(domain=[0, end], nice=False) if 0 < end < math.inf else alt.Scale()


def scale_around(values: pd.Series) -> alt.Scale:
    """Return a scale whose ticks tell what a value is, also where there is one value only."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return alt.Scale(domain=[low - 0.05 * abs(low), high + 0.05 * abs(low)])
    return alt.Scale(zero=False, padding=6)


def curve(
    frame: pd.DataFrame,
    x: str,
    y: str,
    title: str,
    runs: list[Run],
    selection: alt.Parameter,
    points: bool = False,
) -> alt.Chart:
    """Return a line of y over x for each run; it can be zoomed and moved."""
    known = frame[frame[y].notna() & frame[x].notna()]
    columns = list(dict.fromkeys(["run", "step", x, y]))
    number = PLAIN if x == "seconds" else SHORT
    along = scale_to(1.02 * frame[x].max())  # as far as the runs go: validations may be few
    base = alt.Chart(known[columns]).encode(
        alt.X(f"{x}:Q", title=AXES[x], scale=along, axis=alt.Axis(format=number, tickCount=5)),
        alt.Y(f"{y}:Q", title=title, scale=scale_around(known[y])),
        tooltip=[
            "run:N",
            alt.Tooltip("step:Q", format=","),
            alt.Tooltip(f"{y}:Q", format=".5~g"),
        ],
        **by_run(runs, selection),
    )
    chart = base.mark_line(point=points, interpolate="linear", clip=True)
    if points and len(runs) == 1 and len(known) <= MOST_LABELS:
        label = alt.Text(f"{y}:Q", format=".4f")
        chart += base.mark_text(align="right", dy=-10, clip=True).encode(text=label)
    chart = chart.properties(width=300, height=230)
    zoom = alt.selection_interval(bind="scales", name=f"zoom_{x}_{y}")
    return chart.add_params(zoom)


def legend_selection() -> alt.Parameter:
    """Return what a click on the legend selects, in all charts side by side."""
    return alt.selection_point(fields=["run"], bind="legend", name="legend")


def loss_chart(runs: list[Run]) -> alt.Chart:
    frame, chosen = all_metrics(runs), legend_selection()
    charts = [curve(frame, x, "train_loss", "training loss", runs, chosen) for x in AXES]
    return alt.hconcat(*charts).add_params(chosen)


def validation_chart(runs: list[Run]) -> alt.Chart:
    frame, chosen = all_metrics(runs), legend_selection()
    charts = [curve(frame, x, "val_bpb", "val_bpb", runs, chosen, points=True) for x in AXES]
    return alt.hconcat(*charts).add_params(chosen)


def schedule_chart(runs: list[Run]) -> alt.Chart:
    """Learning rate, gradient norm and speed over steps, with a line where a phase begins."""
    frame, chosen = all_metrics(runs), legend_selection()
    rows = [
        {"run": run.name, "step": step, "what": what} for run in runs for step, what in run.phases
    ]
    phases = pd.DataFrame(rows, columns=["run", "step", "what"])
    charts = []
    titles = {
        "lr_scale": "learning rate scale",
        "grad_norm": "gradient norm before the clip",
        "tokens_per_second": "tokens per second since the start",
    }
    for name, title in titles.items():
        chart = curve(frame, "step", name, title, runs, chosen)
        if len(phases):
            rules = alt.Chart(phases).mark_rule(strokeDash=[4, 3], strokeWidth=1.5)
            rules = rules.encode(x="step:Q", tooltip=["run:N", "step:Q", "what:N"], **by_run(runs))
            chart = chart + rules
        charts.append(chart)
    return alt.hconcat(*charts).add_params(chosen)


def bars(
    frame: pd.DataFrame, x: str, y: str, title: str, color: alt.Color, number: str = ","
) -> alt.Chart:
    """Return horizontal bars of x for each y, with their numbers."""
    scale = SHORT if number == "," else PLAIN
    base = alt.Chart(frame).encode(
        alt.X(
            f"{x}:Q",
            title=title,
            scale=scale_to(1.1 * frame[x].max()),  # with room for the numbers
            axis=alt.Axis(format=scale, tickCount=6),
        ),
        alt.Y(f"{y}:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
        tooltip=[alt.Tooltip(f"{name}:N") for name in frame.columns],
    )
    marks = base.mark_bar(height={"band": 0.8}).encode(color=color)
    text = base.mark_text(align="left", dx=4, fontSize=10).encode(text=alt.Text(x, format=number))
    return (marks + text).properties(width=760, height=alt.Step(18))


def candidate_chart(runs: list[Run]) -> alt.Chart | None:
    """Held-out loss of what could be exported, before and after quantization."""
    rows = [
        {
            "run": run.name,
            "candidate": f"{name}, {stage}",
            "loss": loss,
            "choice": "exported" if (name, stage) == (run.exported, "quantized") else "others",
        }
        for run in runs
        for stage, losses in run.candidates.items()
        for name, loss in losses.items()
    ]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    frame["label"] = frame["run"] + " · " + frame["candidate"] if len(runs) > 1 else ""
    frame["label"] = frame["label"].where(frame["label"] != "", frame["candidate"])
    domain = ["exported", "others"]
    scale = alt.Scale(domain=domain, range=["#f58518", "#bab0ac"])
    color = alt.Color("choice:N", title=None, scale=scale)
    title = "loss on held-out training text"
    return bars(frame, "loss", "label", title, color, ".4f")


STAGES = {
    "val_bpb_before": "before the export",
    "val_bpb_roundtrip": "artifact, windows side by side",
    "val_bpb_sliding_window": "artifact, sliding windows (the score)",
}


def quantization_chart(runs: list[Run]) -> alt.Chart | None:
    """val_bpb before the export, after it, and with sliding windows."""
    rows = [
        {"run": run.name, "stage": stage, "val_bpb": run.result(name)}
        for run in runs
        for name, stage in STAGES.items()
        if math.isfinite(run.result(name))
    ]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    base = alt.Chart(frame).encode(
        alt.X("val_bpb:Q", scale=alt.Scale(zero=False, padding=30), axis=alt.Axis(tickCount=6)),
        alt.Y("stage:N", title=None, sort=list(STAGES.values()), axis=alt.Axis(labelLimit=260)),
        tooltip=["run:N", "stage:N", alt.Tooltip("val_bpb:Q", format=".6f")],
        **by_run(runs),
    )
    points = base.mark_point(size=90, filled=True, opacity=1)
    if len(runs) > 1:
        return points.properties(width=760, height=120)
    text = base.mark_text(dy=-12, fontSize=11).encode(text=alt.Text("val_bpb:Q", format=".4f"))
    return (points + text).properties(width=760, height=120)


def group_chart(runs: list[Run]) -> alt.Chart | None:
    """Compressed bytes by group of like tensors; and, of one run, the code."""
    if len(runs) == 1:
        code = pd.DataFrame([("code", runs[0].result("bytes_code"))], columns=["group", "bytes"])
        frame = pd.concat([code, runs[0].groups]).dropna(subset="bytes")
        color = alt.value("#4c78a8")
        return None if frame.empty else bars(frame, "bytes", "group", "bytes", color)
    frame = pd.concat([run.groups.assign(run=run.name) for run in runs])
    if frame.empty:
        return None
    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            alt.X("bytes:Q", title="bytes of the model file", axis=alt.Axis(format=SHORT)),
            alt.Y("run:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
            alt.Color("group:N", title=None, scale=alt.Scale(scheme="tableau20"), sort=None),
            order=alt.Order("bytes:Q", sort="descending"),
            tooltip=["run:N", "group:N", alt.Tooltip("bytes:Q", format=",")],
        )
        .properties(width=700, height=alt.Step(24))
    )


def map_chart(run: Run) -> alt.Chart | None:
    """Bytes of each map before compression, in the color of its basis."""
    if run.maps.empty:
        return None
    columns = ["map", "shape", "basis", "adapter", "family", "learned", "frozen", "bytes"]
    present = [name for name in BASIS_COLORS if name in set(run.maps["family"])]
    colors = [BASIS_COLORS[name] for name in present]
    scale = alt.Scale(domain=present, range=colors)
    color = alt.Color("family:N", title="basis", scale=scale)
    chart = bars(run.maps[columns], "bytes", "map", "bytes before compression", color)
    return chart.properties(height=alt.Step(14))


def overview(runs: list[Run]) -> pd.DataFrame:
    """Return the figures of each run."""
    rows = []
    for run in runs:
        last = run.metrics.iloc[-1]
        steps = run.result("steps") if run.results else float(last["step"])
        rows.append(
            {
                "run": run.name,
                "val_bpb": run.result("val_bpb"),
                "val_loss": run.result("val_loss"),
                "bytes": run.result("bytes_total"),
                "model bytes": run.result("bytes_model"),
                "trained": run.result("trained_parameters"),
                "frozen": run.result("frozen_parameters"),
                "steps": steps,
                "tokens": steps * float(run.settings.get("TRAIN_BATCH_TOKENS", "nan")),
                "seconds": run.result("train_seconds"),
                "tokens/s": run.result("tokens_per_second"),
                "seed": run.settings.get("SEED", ""),
                "maps": "learned" if run.is_learned else "random",
                "model": run.results.get("model", "not finished"),
            }
        )
    return pd.DataFrame(rows)


def scatter_chart(runs: list[Run]) -> alt.Chart | None:
    """val_bpb over bytes; a line goes through the networks all of whose maps are learned."""
    frame = overview(runs).dropna(subset=["val_bpb", "model bytes"])
    if len(runs) == 1 or frame.empty:
        return None
    frame = frame.rename(columns={"model bytes": "bytes_model", "tokens/s": "speed"})
    x = alt.X(
        "bytes_model:Q",
        title="bytes of the model file",
        scale=alt.Scale(type="log", nice=False, padding=30),
        axis=alt.Axis(format=SHORT, tickCount=8),
    )
    y = alt.Y("val_bpb:Q", scale=alt.Scale(zero=False, padding=20))
    line = (
        alt.Chart(frame[frame["maps"] == "learned"])
        .mark_line(color="#888", strokeDash=[6, 4])
        .encode(x, y, order="bytes_model:Q")
    )
    points = (
        alt.Chart(frame)
        .mark_point(size=110, filled=True, opacity=1)
        .encode(
            x,
            y,
            shape=alt.Shape("maps:N", title="maps", scale=alt.Scale(domain=["learned", "random"])),
            tooltip=[
                "run:N",
                "model:N",
                alt.Tooltip("val_bpb:Q", format=".5f"),
                alt.Tooltip("bytes_model:Q", format=","),
            ],
            **by_run(runs),
        )
    )
    zoom = alt.selection_interval(bind="scales")
    return (line + points.add_params(zoom)).properties(width=820, height=380)


CHARTS: dict[str, tuple[str, Callable[[list[Run]], alt.Chart | None]]] = {
    "scatter": (
        "val_bpb against bytes; the dashed line joins the networks whose maps are all learned",
        scatter_chart,
    ),
    "loss": ("Training loss against steps, tokens and time", loss_chart),
    "validation": ("val_bpb against steps, tokens and time", validation_chart),
    "schedule": (
        "Learning rate, gradient norm and speed; a dashed line is the beginning of a phase",
        schedule_chart,
    ),
    "candidates": ("What could be exported, and what was", candidate_chart),
    "quantization": ("What quantization loses, and what sliding windows gain", quantization_chart),
    "groups": ("Bytes by group of like tensors, compressed", group_chart),
}


# ---- The page ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Figure:
    """A chart on the page: a picture, and its data for JavaScript."""

    name: str
    caption: str
    spec: dict[str, Any]

    @property
    def picture(self) -> str:
        """The chart as the address of an SVG that holds it."""
        svg = vlc.vegalite_to_svg(self.spec, vl_version=VEGA_LITE).encode()
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    @property
    def json(self) -> str:
        """The chart for a script element, which </ would end."""
        return json.dumps(self.spec).replace("</", "<\\/")

    def png(self) -> bytes:
        return vlc.vegalite_to_png(self.spec, vl_version=VEGA_LITE, scale=2)


def figures(runs: list[Run]) -> Iterator[Figure]:
    """Yield the charts of all runs together, then the maps of each."""
    for name, (caption, draw) in CHARTS.items():
        chart = draw(runs)
        if chart is not None:
            yield Figure(name, caption, chart.to_dict())
    for i, run in enumerate(runs):
        chart = map_chart(run)
        if chart is not None:
            name = "maps" if len(runs) == 1 else f"maps{i + 1}"
            caption = f"Bytes by map of {run.name}, before compression"
            yield Figure(name, caption, chart.to_dict())


def cell(value: Any, digits: int = 0) -> str:
    """Return a value as text for a table."""
    if isinstance(value, float):
        return f"{value:,.{digits}f}" if math.isfinite(value) else "–"
    return str(value)


def table(frame: pd.DataFrame, digits: dict[str, int] | None = None) -> str:
    """Return a table that sorts by a click on a heading."""
    lines = ["<table class=sortable><thead><tr>"]
    for name, column in frame.items():
        kind = " class=number" if pd.api.types.is_numeric_dtype(column) else ""
        lines.append(f"<th{kind}>{html.escape(str(name))}</th>")
    lines.append("</tr></thead><tbody>")
    for row in frame.to_dict("records"):
        lines.append("<tr>")
        for name, value in row.items():
            text = html.escape(cell(value, (digits or {}).get(name, 0)))
            is_number = isinstance(value, (int, float))
            kind = f" class=number data-value={value}" if is_number else ""
            kind = " class=long" if len(text) > LONG else kind
            lines.append(f"<td{kind}>{text}</td>")
        lines.append("</tr>")
    lines.append("</tbody></table>")
    return "".join(lines)


def overview_table(runs: list[Run]) -> str:
    return table(overview(runs), {"val_bpb": 5, "val_loss": 5, "seconds": 1})


def losses_table(run: Run) -> str:
    """Return losses and bits per byte at each stage, and what the stage before had."""
    rows = []
    before = math.nan
    for name, stage in STAGES.items():
        bpb = run.result(name)
        loss = run.result(name.replace("bpb", "loss"))
        rows.append({"stage": stage, "val_loss": loss, "val_bpb": bpb, "change": bpb - before})
        before = bpb
    return table(pd.DataFrame(rows), {"val_loss": 5, "val_bpb": 5, "change": 5})


def codes_table(run: Run) -> str:
    """Return what the codes of each role take and cost; empty for a log without it."""
    if not run.codes:
        return ""
    columns = ["codes", "values", "bytes by entropy", "bits per value", "expected loss"]
    frame = pd.DataFrame(run.codes, columns=columns)
    for name in columns[1:]:
        frame[name] = pd.to_numeric(frame[name].str.replace(",", ""))
    return table(frame, {"bits per value": 2, "expected loss": 5})


def maps_table(run: Run) -> str:
    """Return the map table, with the color of each basis."""
    lines = ["<table class=sortable><thead><tr>"]
    columns = [*MAP_COLUMNS, "adapter ratio"]
    for name in columns:
        kind = " class=number" if name in (*MAP_NUMBERS, columns[-1]) else ""
        lines.append(f"<th{kind}>{name}</th>")
    lines.append("</tr></thead><tbody>")
    for row in run.maps.to_dict("records"):
        color = BASIS_COLORS.get(row["family"], "#bab0ac")
        lines.append("<tr>")
        for name in MAP_COLUMNS:
            value = row[name]
            text = f"{value:,}" if isinstance(value, int) else html.escape(value)
            kind = f" class=number data-value={value}" if isinstance(value, int) else ""
            style = f' style="background:{color}33;border-left:6px solid {color}"'
            lines.append(f"<td{kind}{style if name == 'basis' else ''}>{text}</td>")
        ratio = float(row["ratio"])
        lines.append(f"<td class=number data-value={ratio}>{cell(ratio, 3)}</td></tr>")
    lines.append("</tbody></table>")
    return "".join(lines)


def facts(run: Run) -> dict[str, str]:
    """Return what a reader asks of a run, in words."""
    scores = ", ".join(f"{name} {loss:.4f}" for name, loss in run.candidates["quantized"].items())
    why = f"{run.exported}: quantized, it has the lowest loss on held-out training text ({scores})"
    readable = run.result("bytes_code_readable")
    size = (
        f"code {cell(run.result('bytes_code'))} + model {cell(run.result('bytes_model'))}"
        f" = {cell(run.result('bytes_total'))} bytes"
        + (f"; the readable code has {cell(readable)}" if math.isfinite(readable) else "")
    )
    speed = (
        f"{cell(run.result('tokens_per_second'))} tokens/s;"
        f" training {cell(run.result('train_seconds'), 1)} s,"
        f" export {cell(run.result('export_seconds'), 1)} s,"
        f" evaluation {cell(run.result('eval_seconds'), 1)} s"
    )
    phases = "; ".join(f"from step {step}: {what}" for step, what in run.phases)
    stated = {
        "Score": f"val_bpb {cell(run.result('val_bpb'), 8)},"
        f" val_loss {cell(run.result('val_loss'), 8)}",
        "Exported": why if run.exported else "nothing yet",
        "Training ended by": run.ended_by,
        "Bytes": size,
        "Parameters": f"{cell(run.result('trained_parameters'))} trained,"
        f" {cell(run.result('frozen_parameters'))} frozen",
        "Speed": speed,
        "Waits for data": run.stalls,
        "Phases": phases or "one: nothing changes during training",
        "Dataset": str(run.results.get("dataset", "")),
        "Hardware": str(run.results.get("hardware", "")),
        "Versions": run.versions,
        "Attention": run.line("attention: ").removeprefix("attention: "),
        "Date": str(run.results.get("date", "")),
        "Folder": str(run.folder),
    }
    return {name: text for name, text in stated.items() if text}


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px;
       padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #ddd; text-align: left;
         white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; } .number { text-align: right; }
td.long { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
table.sortable th { cursor: pointer; background: #f4f4f4; position: sticky; top: 0; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: 13px; }
figure { margin: 1.6rem 0; overflow-x: auto; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
img { max-width: 100%; } .wide { overflow-x: auto; }
details.run { border-top: 2px solid #ddd; padding: .6rem 0; }
details.run > summary { cursor: pointer; font-size: 1.2rem; font-weight: 600; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if runs|length > 1 %}
<p>A click on a heading sorts the table; in charts, drag and scroll to move and zoom, and click
names in the legend.</p>
{% else %}
<p>In charts, drag and scroll to move and zoom.</p>
{% endif %}
<div class="wide">{{ overview_table(runs) }}</div>
{% macro show(figure) %}
<figure id="figure-{{ figure.name }}">
<figcaption>{{ figure.caption }}</figcaption>
<div id="chart-{{ figure.name }}" class="chart">
<img alt="{{ figure.caption }}" src="{{ figure.picture }}">
</div>
<script type="application/json" data-chart="chart-{{ figure.name }}">{{ figure.json|safe }}</script>
</figure>
{% endmacro %}
{% for figure in figures if not figure.name.startswith("maps") %}{{ show(figure) }}{% endfor %}
{% for run in runs %}
<details class="run" {% if runs|length == 1 %}open{% endif %}>
<summary>{{ run.name }}</summary>
<dl>
{% for name, text in facts(run).items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>
<h2>Losses from quantization</h2>
{{ losses_table(run) }}
{{ codes_table(run) }}
<h2>Maps</h2>
{% for figure in figures if figure.name == map_names[run.name] %}{{ show(figure) }}{% endfor %}
<div class="wide">{{ maps_table(run) }}</div>
<h2>The command that repeats it</h2>
<pre>{{ run.command }}</pre>
</details>
{% endfor %}
<script>{{ library|safe }}</script>
<script>
for (const data of document.querySelectorAll("script[data-chart]")) {
  const actions = {export: true, source: false, compiled: false, editor: false};
  const place = document.getElementById(data.dataset.chart);
  vegaEmbed(place, JSON.parse(data.textContent), {renderer: "svg", actions: actions});
}
function value(row, column) {
  const cell = row.children[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}
function compare(a, b) {
  if (typeof a === "string") return a.localeCompare(b, undefined, {numeric: true});
  return (isNaN(a) - isNaN(b)) || (a - b);
}
for (const heading of document.querySelectorAll("table.sortable th")) {
  heading.addEventListener("click", () => {
    const rises = heading.getAttribute("aria-sort") !== "ascending";
    const body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const rows = [...body.rows].sort((a, b) => compare(value(a, column), value(b, column)));
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rises ? "ascending" : "descending");
    body.append(...(rises ? rows : rows.reverse()));
  });
}
</script>
</body>
</html>
"""


def library() -> str:
    """Return Vega-Lite as one script that defines vegaEmbed, without network."""
    return vlc.javascript_bundle(vl_version=VEGA_LITE).replace("</script", "<\\/script")


def page(runs: list[Run], drawn: list[Figure]) -> str:
    """Return the whole page."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    names = {run.name: "maps" if len(runs) == 1 else f"maps{i + 1}" for i, run in enumerate(runs)}
    template = jinja2.Environment(autoescape=True).from_string(PAGE)

    def safe(make: Callable[..., str]) -> Callable[..., Any]:
        return lambda *given: jinja2.utils.markupsafe.Markup(make(*given))

    return template.render(
        title=title,
        runs=runs,
        figures=drawn,
        map_names=names,
        facts=facts,
        overview_table=safe(overview_table),
        losses_table=safe(losses_table),
        codes_table=safe(codes_table),
        maps_table=safe(maps_table),
        library=library(),
    )


# ---- Command -------------------------------------------------------------------------------------


def write_whole(files: dict[Path, bytes]) -> None:
    """Write all files, or none of them."""
    parts = {path: path.with_name(f".{path.name}.part") for path in files}
    try:
        for path, part in parts.items():
            part.write_bytes(files[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def report(args: argparse.Namespace) -> None:
    """Write the page, and the pictures if they are wanted."""
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise UserError(f"--out {args.out} is no file that can be written; name a page")
    runs = read_runs(args.runs, args.unfinished)
    alt.data_transformers.disable_max_rows()
    with warnings.catch_warnings():
        # The charts side by side share what the legend selects; altair says that it noticed.
        warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter")
        drawn = list(figures(runs))
    files = {args.out: page(runs, drawn).encode()}
    if args.png:
        files |= {args.out.with_suffix(f".{each.name}.png"): each.png() for each in drawn}
    write_whole(files)
    size = sum(map(len, files.values()))
    print(f"{args.out}: {len(runs)} runs, {len(drawn)} charts, {size:,} bytes")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    add("--out", type=Path, default=Path("report.html"), help="page (default report.html)")
    add("--png", action="store_true", help="also write every chart as a picture")
    add("--unfinished", action="store_true", help="also show runs that have not ended")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    args = parse(arguments)
    try:
        report(args)
    except (UserError, check.CannotCheck) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; see to that file", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
