"""The page of a run, RUN_DIR/index.html: sample grids, curves, quality, what to do next, and options.

The files of a run may be of someone else: all text on the page is escaped, and what is damaged is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from .artifacts import GRID_ROWS, PROMPTS, column_prompts, read_json, sample_grids
from .curves import charts
from .folders import write_text
from .measures import BOUND, HALVES, MEASURES, REPORTED, counted, format_cell, format_ratios
from .next_steps import next_steps
from .options import renamed
from .page_design import SCRIPT, STYLE

PAGE = "index.html"
LOG = "log.jsonl"  # losses, rates and speed, a line of JSON every now and then
REFRESH = 30  # seconds after which a browser reads the page again, until the training has ended
LONGEST = 300  # characters of an option that are shown
HEADLINE = ("pretrained_teacher_model", "num_inference_steps", "preset", "max_train_steps")  # options told at the top
FIGURES = {"samples.png": "Images of each method", "curve.png": "Quality of each method against network calls"}
GRID = """\
<figure>
<div class="rows" style="grid-template-rows: 1fr {students}fr">
<b class="teacher">teacher</b><b>student</b>
<a id="whole" href="{source}"><img id="image" src="{source}" alt="Sample grid after {updates} updates: the first of \
{rows} rows is the teacher's, the others are the student's"></a></div>
<figcaption>After <output id="updates">{updates}</output> updates. First row: the teacher, in many steps. Below: the
student; its first row starts from the teacher's noise, but a student that adds noise draws other images from it.
<span id="compared">{compared}</span></figcaption>
</figure>"""
CONTROLS = """\
<div class="controls" data-script hidden><button type="button" id="play">Play</button>
<input type="range" id="at" min="0" max="{last}" value="{last}" aria-label="Sample grid, by updates"></div>"""
STEP = """\
<div class="step"><span>{title}:</span>
<button type="button" class="copy" aria-label="Copy: {title}" data-script hidden>Copy</button>
<pre><code>{text}</code></pre></div>"""
CURVES = f"""\
Contrast is the standard deviation of all values of a sample grid, diversity the mean distance between two images of a
row. Both are ratios to the teacher's row: 1 is best, and after a tenth of the run values outside of {1 / BOUND:.2f} to
{BOUND}, the shaded range, are reported. The loss does not measure quality: look at the images."""
QUALITY = """\
KID and FD compare features with those of the reference, FD of pixels and SWD compare pixels, at most 64 x 64 of them:
lower is better. KID is estimated without bias, so near the best it may fall below 0; a number after ± is its
standard error over draws of as many images. The row of two halves of the reference, one measured against the other,
shows the best values to expect; the other rows are measured against the whole reference and may be better.
Precision is the fraction of the images that lie among those of the reference, recall and coverage are fractions of the
reference that the images cover: higher is better. NFE is the number of network calls per image. The "few-step grid" of
a solver starts where an image begins to show in the noise, for a rectified flow at pure noise; the other rows have the
timesteps of diffusers."""


def write_page(run_dir: Path, usual: Mapping[str, Any] | None = None) -> None:
    """Writes the page of a run, finished or not; `usual` are the options that its preset gives."""
    options, training, report = (read_json(run_dir / f"{name}.json") for name in ("options", "training", "report"))
    log, grids = read_log(run_dir), sample_grids(run_dir)
    reasons = [str(line["stopped"]) for line in log if "stopped" in line]
    seconds = 0 if training or reasons else REFRESH
    data = _grid_data(grids, log)
    sections = [
        *_header(run_dir, options, training, log, reasons),
        *_images(run_dir, options, data),
        *_curves(log),
        *_report(run_dir, report),
        *_next(run_dir, options, training, bool(reasons)),
        *_options(options, usual or {}),
    ]
    again = f'<noscript><meta http-equiv="refresh" content="{seconds}"></noscript>' if seconds else ""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"{again}<title>{escape(run_dir.resolve().name)}</title>\n<style>\n{STYLE}\n</style>"
    script = json.dumps({"grids": data, "seconds": seconds}).replace("<", "\\u003c")  # which could end the element
    scripts = f'<script type="application/json" id="grids">{script}</script>\n<script>\n{SCRIPT}\n</script>'
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        f"<head>{head}</head>",
        "<body>",
        *sections,
        scripts,
        "</body></html>",
    ]
    text = "\n".join([*lines, ""])
    write_text(run_dir / PAGE, text.encode(errors="replace").decode())  # names of files need not be text


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the log of a run, without those that are cut off or damaged, and values that are not numbers."""
    path, lines = run_dir / LOG, list[dict[str, Any]]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError):
            found = dict(json.loads(line))
            lines.append({k: v for k, v in found.items() if _is_number(v) or k == "stopped"})
    return [line for line in lines if isinstance(line.get("step"), int) and line["step"] >= 0]


def _is_number(value: Any) -> bool:
    """Whether it is a number that fits into 64 bits."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


# ----- sections -----


def _header(
    run_dir: Path, options: dict[str, Any], training: dict[str, Any], log: Sequence[dict[str, Any]], reasons: list[str]
) -> list[str]:
    done, total = max((line["step"] for line in log), default=0), options.get("max_train_steps")
    state = "was stopped" if reasons else "" if training else f"has done {done} of them"
    lines = [f"<header><h1>{escape(run_dir.resolve().name)}</h1>", f"<p>{escape(_cost(options, training, state))}</p>"]
    if calls := _timesteps(read_json(run_dir / "pipeline" / "scheduler" / "scheduler_config.json")):
        lines.append(f"<p>{escape(calls)}</p>")
    if not training and isinstance(total, int) and total > 0:
        lines.append(f'<progress value="{done}" max="{total}" aria-label="Updates">{done} of {total}</progress>')
    return [*lines, "</header>", *(f'<p class="warning"><b>{escape(reason)}</b></p>' for reason in reasons)]


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
    text = f"{counted(steps, 'step')}, distilled from {teacher} in {counted(updates, 'update')}."
    if not training.get("seconds"):
        return f"{text} The training {state}."
    calls = f", {training['network_calls']:,} network calls of one image each" if training.get("network_calls") else ""
    precision = training.get("mixed_precision") or "no"
    return f"{text} It took {training['seconds']:.0f} s{calls}, in {'float32' if precision == 'no' else precision}."


def _grid_data(grids: Mapping[int, Path], log: Sequence[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Updates, file and comparison with the teacher of each grid."""
    compared = {line["step"]: text for line in log if (text := format_ratios(line))}
    texts = {step: f"It has {compared[step]}." if step in compared else "" for step in grids}
    return [(step, f"samples/{path.name}", texts[step]) for step, path in grids.items()]


def _images(run_dir: Path, options: dict[str, Any], grids: Sequence[tuple[int, str, str]]) -> list[str]:
    if not grids:
        none = (
            "This run draws no sample grids."
            if options.get("validation_steps") == 0
            else "There is no sample grid yet."
        )
        return ["<h2>Images</h2>", f"<p>{none}</p>"]
    updates, source, compared = grids[-1]
    parts = [
        "<h2>Images</h2>",
        GRID.format(updates=updates, source=source, compared=escape(compared), rows=GRID_ROWS, students=GRID_ROWS - 1),
    ]
    if len(grids) > 1:
        parts.append(CONTROLS.format(last=len(grids) - 1))
    if (path := run_dir / PROMPTS).is_file():
        prompts = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
        items = "".join(f"<li>{escape(prompt)}</li>" for prompt in column_prompts(prompts, options))
        parts.append(_folded("Prompts of the columns, from left to right", f"<ol>{items}</ol>"))
    return parts


def _curves(log: Sequence[dict[str, Any]]) -> list[str]:
    main, further = charts(log)
    parts = ["<h2>Curves</h2>", f'<p class="soft">{CURVES}</p>', _side_by_side(main)] if main else []
    return parts + [_folded("More curves", _side_by_side(further))] * bool(further)


def _side_by_side(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _report(run_dir: Path, report: dict[str, Any]) -> list[str]:
    found = report.get("rows")
    rows = [
        row
        for row in (found if isinstance(found, list) else [])
        if isinstance(row, dict) and {"nfe", "method"} <= row.keys()
    ]
    if not rows:
        return []
    about = f"Features: {report.get('features')}. Reference: {report.get('reference')}. {report.get('measured')}"
    figures = {name: alt for name, alt in FIGURES.items() if (run_dir / name).is_file()}
    return [
        "<h2>Quality</h2>",
        f'<p class="soft">{escape(about)}</p>',
        _quality(rows, report.get("floor")),
        _folded("What the measures mean", f"<p>{escape(QUALITY)}</p>"),
        *(f'<p><img src="{name}" alt="{alt}" loading="lazy"></p>' for name, alt in figures.items()),
    ]


def _quality(rows: Sequence[dict[str, Any]], floor: Any) -> str:
    measures = [name for name in REPORTED if any(name in row for row in rows)]
    lines = [[row["nfe"], row["method"], *(format_cell(name, row) for name in measures)] for row in rows]
    if isinstance(floor, dict):
        lines.insert(0, ["", HALVES, *(format_cell(name, floor) for name in measures)])
    return _table(["NFE", "method", *(MEASURES[name].head for name in measures)], lines, "measures")


def _next(run_dir: Path, options: dict[str, Any], training: dict[str, Any], stopped: bool) -> list[str]:
    steps = next_steps(run_dir, options, training, stopped)
    parts = [STEP.format(title=escape(title), text=_keep_options(escape(text))) for title, text in steps]
    return ["<h2>What to do next</h2>", *parts] if parts else []


def _keep_options(text: str) -> str:
    """Marks the names of options in a command, so that no line ends within one."""
    return re.sub(r"--\w+", r"<span>\g<0></span>", text)


def _options(options: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """Those that differ from the preset, and the others folded."""
    options = renamed(options)
    given = {
        name: value
        for name, value in options.items()
        if name not in HEADLINE and (value is not None or name in usual) and usual.get(name) != value
    }
    others = {name: value for name, value in options.items() if name not in given}
    preset = escape(str(options.get("preset")))
    text = f"All options but steps and updates have the values of the preset {preset}."
    text = f"These differ from the preset {preset}:" if given else text
    table = [_option_table(given)] if given else []
    return [
        "<h2>Options</h2>",
        f"<p>{text}</p>",
        *table,
        _folded(f"{len(others)} further options", _option_table(others)),
    ]


def _option_table(options: Mapping[str, Any]) -> str:
    texts = ((name, str(value)) for name, value in options.items())
    short = ((name, text if len(text) <= LONGEST else f"{text[:LONGEST]} ...") for name, text in texts)
    return _table(["option", "value"], short, "options")


def _table(heads: Sequence[str], lines: Iterable[Sequence[Any]], kind: str) -> str:
    rows = [("th", heads), *(("td", line) for line in lines)]
    cells = ("".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in line) for tag, line in rows)
    return f'<div class="wide"><table class="{kind}">{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'
