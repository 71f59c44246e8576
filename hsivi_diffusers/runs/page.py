"""The page of a run, RUN_DIR/index.html: sample grids, losses, quality, cost and options.

The files of a run may be of someone else: all text on the page is escaped, and what is damaged is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from .artifacts import PROMPTS, read_record, sample_grids
from .folders import write_text
from .measures import HALVES, MEASURES, REPORTED, format_measure

PAGE = "index.html"
LOG = "log.jsonl"  # losses, rates and speed, a line of JSON every now and then
SHOWN = {"loss/student": "#e8590c", "loss/critic": "#1971c2"}  # curves and their colours
WIDTH, HEIGHT = 640, 200  # of the curves, in pixels
REFRESH = 30  # seconds after which a browser reads the page again, until the training has ended
STYLE = """\
body { font: 16px/1.5 sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
img { max-width: 100%; image-rendering: pixelated } table { border-collapse: collapse }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: left } input { width: 100% }"""
SLIDER = """\
<p><input type="range" id="at" min="0" max="{last}" value="{last}"></p>
<p>after <b id="step"></b> updates<span id="beside"></span></p>
<img id="grid" alt="sample grid">
<script>
const grids = {grids}, at = document.getElementById("at");
function show() {{
  document.getElementById("grid").src = grids[at.value][1];
  document.getElementById("step").textContent = grids[at.value][0];
  document.getElementById("beside").textContent = grids[at.value][2];
}}
if (location.hash) at.value = location.hash.slice(1);  // where it was before the page was read again
at.oninput = () => {{ location.hash = at.value == at.max ? "" : at.value; show(); }};
show();
</script>"""
QUALITY = """\
KID and FD compare features with those of the reference, FD of pixels and SWD compare pixels, at most 64 x 64 of them:
lower is better. The row of two halves of the reference, one measured against the other, shows the best values to
expect; the other rows are measured against the whole reference and may be better.
Precision is the fraction of the images that lie among those of the reference, recall and coverage are fractions of the
reference that the images cover: higher is better. NFE is the number of network calls per image. The "few-step grid" of
a solver starts where an image begins to show in the noise, for a rectified flow at pure noise; the other rows have the
timesteps of diffusers."""


def write_page(run_dir: Path) -> None:
    """Writes the page of a run, finished or not."""
    options, training, report = (read_json(run_dir / f"{name}.json") for name in ("options", "training", "report"))
    title, log = run_dir.resolve().name, read_log(run_dir)
    stopped = [f"<p><b>{escape(str(line['stopped']))}</b></p>" for line in log if "stopped" in line]
    done = max((line["step"] for line in log), default=0)
    state = "was stopped" if stopped else "" if training else f"has done {done} of them"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_cost(options, training, state))}</p>", *stopped]
    if calls := _timesteps(read_json(run_dir / "pipeline" / "scheduler" / "scheduler_config.json")):
        parts.append(f"<p>{escape(calls)}</p>")
    if drawn := sample_grids(run_dir):
        ratios = {line["step"]: line for line in log if {"images/contrast", "images/diversity"} <= line.keys()}
        shown = json.dumps([(step, f"samples/{path.name}", _beside(ratios.get(step))) for step, path in drawn.items()])
        text = "First row: the teacher in 20 steps. Below: the student, from the same noise."
        parts += ["<h2>Images</h2>", f"<p>{text}</p>", SLIDER.format(last=len(drawn) - 1, grids=shown)]
    if (prompts := run_dir / PROMPTS).is_file():
        first = prompts.read_text(encoding="utf-8", errors="replace").split("\n")[:20]
        parts += ["<p>The first prompts:</p>", "<ol>", *(f"<li>{escape(prompt)}</li>" for prompt in first), "</ol>"]
    if curves := loss_curves(log):
        parts += ["<h2>Losses</h2>", curves]
    if rows := [row for row in report.get("rows") or [] if isinstance(row, dict) and {"nfe", "method"} <= row.keys()]:
        about = f"Features: {report.get('features')}. Reference: {report.get('reference')}. {report.get('measured')} "
        parts += ["<h2>Quality</h2>", f"<p>{escape(about + QUALITY)}</p>", _quality(rows, report.get("floor"))]
        figures = [name for name in ("samples.png", "curve.png") if (run_dir / name).is_file()]
        parts += [f'<p><img src="{name}" alt="{name}"></p>' for name in figures]
    parts += ["<h2>Options</h2>", _table(["option", "value"], options.items())]
    again = f'<meta http-equiv="refresh" content="{REFRESH}">' * (not training and not stopped)
    head = f'<meta charset="utf-8">{again}<title>{escape(title)}</title><style>{STYLE}</style>'
    write_text(run_dir / PAGE, "\n".join(["<!doctype html>", head, *parts, ""]))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, see `read_record`; empty if there is none, or a damaged one."""
    try:
        return read_record(path)
    except (OSError, ValueError):
        return {}


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the log of a run, without those that are cut off or damaged, and values that are not numbers."""
    path, lines = run_dir / LOG, list[dict[str, Any]]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError):
            found = dict(json.loads(line))
            lines.append({k: v for k, v in found.items() if isinstance(v, int | float) or k == "stopped"})
    return [line for line in lines if isinstance(line.get("step"), int)]


def _timesteps(scheduler: dict[str, Any]) -> str:
    """Where the network is called."""
    grids = scheduler.get("layer_timesteps")
    if not isinstance(grids, list) or not grids:
        return ""
    grids = grids if isinstance(grids[0], list) else [grids]
    text = "; ".join(", ".join(map(str, grid[:-1])) for grid in grids if isinstance(grid, list))
    name = "levels" if scheduler.get("prediction_type") == "flow_prediction" else "timesteps"
    return f"The network is called at the {name} {text}."


def _cost(options: dict[str, Any], training: dict[str, Any], state: str) -> str:
    counts = options.get("num_inference_steps")
    steps = ", ".join(map(str, counts if isinstance(counts, list) else [counts]))
    teacher, updates = options.get("pretrained_teacher_model"), options.get("max_train_steps")
    text = f"{steps} steps, distilled from {teacher} in {updates} updates."
    if not training.get("seconds"):
        return f"{text} The training {state}."
    calls = f", {training['network_calls']:,} network calls" if training.get("network_calls") else ""
    precision = training.get("mixed_precision") or "no"
    return f"{text} It took {training['seconds']:.0f} s{calls}, in {'float32' if precision == 'no' else precision}."


def _beside(line: dict[str, Any] | None) -> str:
    """How the images of a grid compare with the teacher's."""
    if line is None:
        return ""
    return f", {line['images/contrast']:.2f} times the teacher's contrast, {line['images/diversity']:.2f} its diversity"


def loss_curves(log: Sequence[dict[str, Any]]) -> str:
    """Losses against updates as SVG, on a logarithmic scale; nothing with fewer than two lines."""
    curves = {name: [(line["step"], line[name]) for line in log if line.get(name, 0) > 0] for name in SHOWN}
    heights = [y for curve in curves.values() for _, y in curve]
    if max(map(len, curves.values())) < 2:
        return ""
    last, low, high = log[-1]["step"] or 1, min(heights), max(heights)
    scale = HEIGHT / max(math.log(high / low), 1e-9)
    lines, names = [], []
    for name, color in SHOWN.items():
        points = " ".join(f"{WIDTH * x / last:.1f},{scale * math.log(high / y):.1f}" for x, y in curves[name])
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        names.append(f'<b style="color: {color}">{name.removeprefix("loss/")}</b>')
    legend = f"<p>{', '.join(names)}: from {low:.3g} to {high:.3g}, logarithmic, over {last} updates.</p>"
    return f'<svg width="{WIDTH}" height="{HEIGHT}" style="border: 1px solid #ccc">{"".join(lines)}</svg>{legend}'


def _quality(rows: Sequence[dict[str, Any]], floor: Any) -> str:
    measures = [name for name in REPORTED if any(name in row for row in rows)]
    lines = [[row["nfe"], row["method"], *(_cell(name, row) for name in measures)] for row in rows]
    if isinstance(floor, dict):
        lines.insert(0, ["", HALVES, *(_cell(name, floor) for name in measures)])
    return _table(["NFE", "method", *(MEASURES[name].head for name in measures)], lines)


def _cell(name: str, row: dict[str, Any]) -> str:
    return format_measure(name, row[name]) if isinstance(row.get(name), int | float) else ""


def _table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = [("th", heads), *(("td", line) for line in lines)]
    cells = ("".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in line) for tag, line in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
