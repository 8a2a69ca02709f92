"""Make one HTML page of one run, or of several side by side; or event files for TensorBoard.

    python tools/report.py runs/ID --out report.html
    python tools/report.py runs/A runs/B runs/C --out report.html --png
    python tools/report.py runs/A runs/B --tensorboard events

The page holds everything that it shows: it opens from the disk and needs no network. Charts are
interactive; without JavaScript they are pictures, and all tables are text. --png also writes every
chart as report.NAME.png beside the page.

RUN is the folder of a finished run: its results.json and metrics.jsonl are read. A run that is
still going is refused, except with --unfinished, which shows what there is. The exit code is 0, or
1 with one line that says what is wrong, or 2 for unusable arguments.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import altair as alt
    import check
    import jinja2
    import pandas as pd
    import vl_convert as vlc
except ImportError as missing:
    raise SystemExit(
        f"error: {missing.name} is missing: pip install -r tools/requirements.txt"
    ) from None

MOST_POINTS = 2000  # of one curve of one run
NUMBERS = ("tokens", "seconds", "tokens_per_second", "train_loss", "lr_scale", "grad_norm")
NUMBERS += ("val_loss", "val_bpb")
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


class UserError(Exception):
    """A problem that a person can fix. The message says what is wrong, where, and what to do."""


# ---- A run ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    name: str
    folder: Path
    results: dict[str, Any]  # empty for a run that has not ended
    metrics: pd.DataFrame  # a row for each record of a step
    phases: pd.DataFrame  # step and text of what began there

    def result(self, name: str) -> float:
        """Return a figure of results.json; NaN without one."""
        value = self.results.get(name)
        return float(value) if isinstance(value, (int, float)) else math.nan

    def rows(self, name: str, *columns: str) -> pd.DataFrame:
        """Return a table of results.json; empty if it is not there, as in runs of old scripts."""
        frame = pd.DataFrame(self.results.get(name) or [])
        if "bytes" in frame:
            frame["bytes"] = pd.to_numeric(frame["bytes"], errors="coerce")
        return frame if set(columns) <= set(frame) else pd.DataFrame(columns=list(columns))

    @property
    def maps(self) -> pd.DataFrame:
        """The map table, with the ratio of adapter to map at the last validation."""
        frame = self.rows("maps", "name", "shape", "basis", "learned").copy()
        frame["shape"] = frame["shape"].astype(str).str.replace("x", "×")
        known = self.metrics.get("adapter_ratios", pd.Series(dtype=object)).dropna()
        return frame.assign(adapter_ratio=frame["name"].map(known.iloc[-1] if len(known) else {}))

    @property
    def kind(self) -> str:
        """Whether any map is random, if the run says it."""
        bases = set(self.maps["basis"])
        if not bases:
            return "unknown"
        return "learned" if bases == {"learned"} else "random"

    @property
    def command(self) -> str:
        """What repeats the run; empty if its results do not hold its settings."""
        settings = self.results.get("settings") or {}
        # Somebody will run it, so nothing but settings may come from the file.
        own = ("RUN_ID", "RESUME")  # a finished run is not repeated under its name
        settings = {
            k: str(text) for k, text in settings.items() if k.isidentifier() and k not in own
        }
        return check.command_of(settings, self.results.get("hardware")) if settings else ""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise UserError(f"{path} is not UTF-8 text; copy the run again") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records; where a run went on from an earlier step, without what it left behind."""
    records: list[dict[str, Any]] = []
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
            if records and step < records[-1]["step"]:
                records = [each for each in records if each["step"] < step]
            records.append(record | {"step": step})
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):  # a machine that stops may tear the last one
                raise UserError(f"{path}: line {number} is not JSON as a run writes it") from None
    if not records:
        raise UserError(f"{path} has no metrics; the run did not take a step")
    return records


def read_run(folder: Path, unfinished: bool) -> Run:
    """Return the run of a folder. UserError says what is wrong with it."""
    path = folder / "results.json"
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} has no metrics.jsonl; name the folder of a run, such as runs/ID")
    if not path.exists() and not unfinished:
        hint = "wait until it ends, or show what there is with --unfinished"
        raise UserError(f"{folder}: the run has not ended; {hint}")
    records = pd.DataFrame(read_records(folder / "metrics.jsonl"))
    is_phase = records.get("kind", pd.Series("", records.index)) == "phase"
    metrics = records[~is_phase].copy()
    for name in NUMBERS:
        metrics[name] = pd.to_numeric(metrics.get(name), errors="coerce")
    metrics["is_validation"] = metrics["val_bpb"].notna()
    # The step at which a run was continued may stand there twice.
    metrics = metrics.drop_duplicates(["step", "is_validation"], keep="last")
    phases = records[is_phase].reindex(columns=["step", "text"]).drop_duplicates()
    try:
        results = json.loads(read_text(path)) if path.exists() else {}
        run = Run(folder.resolve().name, folder, results, metrics, phases)
        run.maps, run.command, run.rows("groups"), run.rows("codes")  # as a run writes them
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is not JSON as a run writes it; copy the run again") from None
    return run


def read_runs(folders: list[Path], unfinished: bool) -> list[Run]:
    """Return the runs; those whose folders have one name get what their paths differ in."""
    distinct = list(dict.fromkeys(folder.resolve() for folder in folders))
    runs = [read_run(folder, unfinished) for folder in distinct]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = os.path.relpath(run.folder, os.path.commonpath(distinct))
    return runs


# ---- Charts --------------------------------------------------------------------------------------

AXES = {"step": "step", "tokens": "tokens", "seconds": "training time in seconds"}
SCHEDULE = {
    "lr_scale": "learning rate scale",
    "grad_norm": "gradient norm before the clip",
    "tokens_per_second": "tokens per second since the start",
}


def all_metrics(runs: list[Run]) -> pd.DataFrame:
    """Return the metrics of all runs, at most MOST_POINTS of each kind and run."""
    frames = []
    for run in runs:
        for _, part in run.metrics.groupby("is_validation"):
            every = -(-len(part) // MOST_POINTS)
            frames.append(part.iloc[::-1].iloc[::every].assign(run=run.name))
    return pd.concat(frames, ignore_index=True).sort_values(["run", "step"])


def color_of(runs: list[Run]) -> alt.Color:
    legend = alt.Legend(title=None, orient="top", columns=4, labelLimit=300, symbolLimit=0)
    scale = alt.Scale(scheme="tableau10" if len(runs) <= 10 else "tableau20")
    names = [run.name for run in runs]
    return alt.Color("run:N", sort=names, scale=scale, legend=legend if len(runs) > 1 else None)


def curve(frame: pd.DataFrame, x: str, y: str, title: str, runs: list[Run]) -> alt.Chart:
    """Return a line of y over x for each run; it can be zoomed and moved."""
    known = frame[frame[y].notna() & frame[x].notna()]
    form = ",~f" if x == "seconds" else ".3~s"
    value = alt.Tooltip(f"{y}:Q", format=".5~g")
    base = alt.Chart(known[list(dict.fromkeys(["run", "step", x, y]))]).encode(
        alt.X(f"{x}:Q", title=AXES[x], axis=alt.Axis(format=form, tickCount=5)),
        alt.Y(f"{y}:Q", title=title, scale=alt.Scale(zero=False)),
        color_of(runs),
        tooltip=["run:N", alt.Tooltip("step:Q", format=","), value],
    )
    chart = base.mark_line(point=y == "val_bpb", clip=True)
    zoom = alt.selection_interval(bind="scales", name=f"zoom_{x}_{y}")
    return chart.properties(width=300, height=230).add_params(zoom)


def curves(y: str, title: str, runs: list[Run]) -> alt.Chart:
    frame = all_metrics(runs)
    return alt.hconcat(*(curve(frame, x, y, title, runs) for x in AXES))


def schedule_chart(runs: list[Run]) -> alt.Chart:
    """Learning rate, gradient norm and speed over steps, with a line where a phase begins."""
    frame = all_metrics(runs)
    frame = frame[~frame["is_validation"]]
    phases = pd.concat([run.phases.assign(run=run.name) for run in runs])
    rules = alt.Chart(phases).mark_rule(strokeDash=[4, 3], strokeWidth=1.5)
    rules = rules.encode(x="step:Q", color=color_of(runs), tooltip=["run:N", "step:Q", "text:N"])
    charts = [curve(frame, "step", name, title, runs) for name, title in SCHEDULE.items()]
    return alt.hconcat(*(chart + rules if len(phases) else chart for chart in charts))


def overview(runs: list[Run]) -> pd.DataFrame:
    columns = ("val_bpb", "val_loss", "bytes_total", "bytes_model", "trained_parameters")
    columns += ("frozen_parameters", "train_seconds", "tokens_per_second", "val_bpb_before")
    rows = []
    for run in runs:
        last = run.metrics.iloc[-1]
        row = {"run": run.name} | {name: run.result(name) for name in columns}
        row |= {"steps": last["step"], "tokens": last["tokens"], "maps": run.kind}
        row |= {"seed": run.results.get("seed"), "model": run.results.get("model", "not finished")}
        rows.append(row)
    return pd.DataFrame(rows)


def scatter_chart(runs: list[Run]) -> alt.Chart | None:
    """val_bpb over bytes; a line goes through the networks all of whose maps are learned."""
    frame = overview(runs).dropna(subset=["val_bpb", "bytes_model"])
    if len(runs) == 1 or frame.empty:
        return None
    x = alt.X("bytes_model:Q", scale=alt.Scale(type="log", nice=False, padding=30))
    y = alt.Y("val_bpb:Q", scale=alt.Scale(zero=False, padding=20))
    learned = alt.Chart(frame[frame["maps"] == "learned"])
    line = learned.mark_line(color="#888", strokeDash=[6, 4]).encode(x, y, order="bytes_model:Q")
    points = alt.Chart(frame).mark_point(size=110, filled=True, opacity=1)
    tooltip = ["run:N", "model:N", "val_bpb:Q", alt.Tooltip("bytes_model:Q", format=",")]
    points = points.encode(x, y, color_of(runs), shape="maps:N", tooltip=tooltip)
    return (line + points.interactive()).properties(width=820, height=380)


# By name: the caption, and what draws the chart; it returns None without data.
CHARTS: dict[str, tuple[str, Callable[[list[Run]], alt.Chart | None]]] = {
    "scatter": (
        "val_bpb against bytes; the dashed line joins the networks whose maps are all learned",
        scatter_chart,
    ),
    "loss": (
        "Training loss against steps, tokens and time",
        functools.partial(curves, "train_loss", "training loss"),
    ),
    "validation": (
        "val_bpb against steps, tokens and time",
        functools.partial(curves, "val_bpb", "val_bpb"),
    ),
    "schedule": (
        "Learning rate, gradient norm and speed; a dashed line is the beginning of a phase",
        schedule_chart,
    ),
}


# ---- The page ------------------------------------------------------------------------------------


def picture(spec: dict[str, Any]) -> str:
    """Return a chart as the address of an SVG that holds it."""
    svg = vlc.vegalite_to_svg(spec, vl_version=VEGA_LITE).encode()
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def as_json(spec: dict[str, Any]) -> str:
    """Return a chart for a script element: no < in it can end or swallow the element."""
    return json.dumps(spec).replace("<", "\\u003c")


def draw_all(runs: list[Run]) -> dict[str, dict[str, Any]]:
    charts = {name: draw(runs) for name, (_, draw) in CHARTS.items()}
    return {name: chart.to_dict() for name, chart in charts.items() if chart is not None}


def number(value: Any) -> str:
    """Return a number as text: a count with commas, others with digits as their size needs."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.5f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,.0f}"


def table(frame: pd.DataFrame) -> str:
    numeric = frame.select_dtypes("number").columns
    formats = dict.fromkeys(numeric, number)
    frame = frame.where(frame.notna())  # None, too, becomes the mark of a missing value
    return frame.to_html(index=False, border=0, na_rep="–", formatters=formats, escape=True)


def facts(run: Run) -> pd.DataFrame:
    """Return everything in results.json that is no table, and where the phases begin."""
    pairs = [("folder", str(run.folder))]
    for name, value in run.results.items():
        if isinstance(value, dict) and name != "settings":
            value = ", ".join(f"{key} {text}" for key, text in value.items())
        if isinstance(value, (bool, str)):
            pairs.append((name, str(value)))
        elif isinstance(value, (int, float)):
            pairs.append((name, f"{value:,}"))
    pairs += [(f"from step {row.step:,}", row.text) for row in run.phases.itertuples()]
    return pd.DataFrame(pairs, columns=["what", "value"])


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #ddd; text-align: left; }
th { background: #f4f4f4; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
figure { margin: 1.6rem 0; overflow-x: auto; }
figcaption, summary { font-weight: 600; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>In charts, drag and scroll to move and zoom.</p>
{{ table(overview(runs))|safe }}
{% for name, spec in charts.items() %}
<figure>
<figcaption>{{ captions[name][0] }}</figcaption>
<div id="{{ name }}"><img alt="{{ captions[name][0] }}" src="{{ picture(spec) }}"></div>
<script type="application/json" data-chart="{{ name }}">{{ as_json(spec)|safe }}</script>
</figure>
{% endfor %}
{% for run in runs %}
<details {% if runs|length == 1 %}open{% endif %}>
<summary>{{ run.name }}</summary>
{{ table(facts(run))|safe }}
{% if run.results.groups %}<h2>Bytes</h2>{{ table(run.rows("groups"))|safe }}{% endif %}
{% if run.results.codes %}<h2>Codes</h2>{{ table(run.rows("codes"))|safe }}{% endif %}
{% if run.results.maps %}<h2>Maps</h2>{{ table(run.maps)|safe }}{% endif %}
{% if run.command %}<h2>The command that repeats it</h2><pre>{{ run.command }}</pre>{% endif %}
</details>
{% endfor %}
<script>{{ library|safe }}</script>
<script>
for (const data of document.querySelectorAll("script[data-chart]")) {
  const place = document.getElementById(data.dataset.chart);
  vegaEmbed(place, JSON.parse(data.textContent), {renderer: "svg", actions: {export: true}});
}
</script>
</body>
</html>
"""


def page(runs: list[Run], charts: dict[str, dict[str, Any]]) -> str:
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    library = vlc.javascript_bundle(vl_version=VEGA_LITE)  # defines vegaEmbed, without network
    library = library.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    functions = {each.__name__: each for each in (table, overview, facts, picture, as_json)}
    return template.render(
        title=title, runs=runs, charts=charts, captions=CHARTS, library=library, **functions
    )


def write_page(args: argparse.Namespace) -> None:
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise UserError(f"--out {args.out} is no file that can be written; name a page")
    runs = read_runs(args.runs, args.unfinished)
    alt.data_transformers.disable_max_rows()
    charts = draw_all(runs)
    part = args.out.with_name(f".{args.out.name}.part")
    part.write_text(page(runs, charts), encoding="utf-8")
    os.replace(part, args.out)
    for name, spec in charts.items() if args.png else []:
        png = vlc.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)
        args.out.with_suffix(f".{name}.png").write_bytes(png)
    print(f"{args.out}: {len(runs)} runs, {len(charts)} charts")


# ---- TensorBoard ---------------------------------------------------------------------------------


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    ratios = record.get("adapter_ratios") or {}
    values = record | {f"adapter_ratios/{name}": ratio for name, ratio in ratios.items()}
    names = values.keys() - {"step", "tokens", "seconds"}
    return {name: values[name] for name in names if isinstance(values[name], (int, float))}


def write_tensorboard(args: argparse.Namespace) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        advice = "pip install -r tools/requirements.txt"
        raise UserError(f"{error.name} is missing: {advice}") from None
    for run in read_runs(args.runs, args.unfinished):
        target = args.tensorboard / run.name
        if target.exists():
            raise UserError(f"{target} is there already; choose another folder")
        with SummaryWriter(str(target)) as writer:
            writer.add_text("results", table(facts(run)))
            for record in read_records(run.folder / "metrics.jsonl"):
                for name, value in scalars_of(record).items():
                    writer.add_scalar(name, value, record["step"])
        print(f"{target}: written; look at it with tensorboard --logdir {args.tensorboard}")


# ---- Command -------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    add("--out", type=Path, default=Path("report.html"), help="page (default report.html)")
    add("--png", action="store_true", help="also write every chart as a picture")
    add("--unfinished", action="store_true", help="also show runs that have not ended")
    add("--tensorboard", type=Path, metavar="DIR", help="write event files to DIR, and no page")
    args = parser.parse_args(arguments)
    try:
        write_tensorboard(args) if args.tensorboard else write_page(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; see to that file", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
