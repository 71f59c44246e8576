"""Fits a semi-implicit sampler to a target of the benchmarks, or does a whole study of such fits.

One fit:

    python -m training.benchmarks.inference.fit_target --target checkerboard --num_layers 5 --bridge diffusion \
        --objective LB --output_dir runs/checkerboard

writes OUTPUT_DIR/report.json (settings, agreement with the target, signs of failure), layers.safetensors,
draws.safetensors and, for targets on the plane, marginals.png.

A study, which continues where it was stopped:

    python -m training.benchmarks.inference.fit_target --study training/configs/study_*.yaml

writes docs/inference/results.json, and what is made from it: docs/inference/study.csv, and the figures and tables of
study.md. A page that is begun in a folder of your own has more tables.
`--quick true` does a short version of each study and writes to runs/inference_quick.

A target of your own is fitted by a few lines of Python; see docs/inference/index.md.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.pages import fill_tables, new_parts
from hsivi_diffusers.runs.folders import claim_output_dir, sole_writer, write_json, write_text
from hsivi_diffusers.runs.options import option

from .study import read_study, run_study
from .study_figures import FIGURES, draw_fits, draw_marginals_figure, save
from .study_rows import csv_of, frame_of
from .study_tables import TABLES
from .target_fit import Fit, measure, run

PAGE, CSV = "study.md", "study.csv"  # of the folder of a study


@dataclass
class Output:
    _group = "run"
    output_dir: str | None = option(None, "folder of the results")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")


@dataclass
class Study:
    _group = "study"
    study: list[str] | None = option(None, "YAML files of studies, instead of one fit")
    quick: bool = option(False, "a short version of each study")
    workers: int = option(os.cpu_count() or 1, "processes side by side, of one thread each")
    pages_only: bool = option(False, "make the pages of docs/inference again from results.json")


def fit_one(fit: Fit, output: Output) -> None:
    """Trains, with a progress bar, and writes the results."""
    folder = claim_output_dir(output.output_dir, output.overwrite_output_dir)
    fitted, seconds = run(fit, progress=True)
    inference = fitted.inference
    layers = {name: value.contiguous() for name, value in inference.layers.state_dict().items()}
    save_file(layers, folder / "layers.safetensors")
    save_file({"x": fitted.sample(10_000, seed=0).contiguous()}, folder / "draws.safetensors")
    findings = inference.diagnose(seed=2)
    for finding in findings:
        print(f"{finding.signature}: {finding.message}")
    agreement = measure(fitted.sample, fit.target)
    if fitted.target.dimension == 2:
        draw_marginals_figure(fitted, folder / "marginals.png")
    report = {"fit": asdict(fit), "seconds": seconds, "agreement": agreement}
    write_json(folder / "report.json", {**report, "findings": [asdict(finding) for finding in findings]})
    print(f"{folder / 'report.json'}:", ", ".join(f"{name} {value:.4g}" for name, value in agreement.items()))


def study_all(study: Study, output: Output) -> None:
    """Does what results.json lacks, then makes the pages."""
    default = "runs/inference_quick" if study.quick else "docs/inference"
    folder = Path(output.output_dir or default)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder):
        if not study.pages_only:
            jobs = [job for path in study.study or [] for job in read_study(path, study.quick)]
            run_study(jobs, folder / "results.json", study.workers)
            print(f"{folder}: {len(jobs)} rows are there; fitting for the images", flush=True)
            draw_fits(folder, study.quick)
        write_pages(folder)
    print(f"{folder / PAGE} is made")


def write_pages(folder: Path) -> None:
    """Makes figures, study.csv and the tables of study.md from a folder's results.json.

    The CSV has a line a fit. The page is begun, with all tables, if there is none.
    """
    path, page = folder / "results.json", folder / PAGE
    if not path.exists():
        raise ValueError(f"{path} is missing: do a study first, with --study")
    rows = frame_of(json.loads(path.read_text(encoding="utf-8"))["rows"])
    tables = {name: make(rows) for name, make in TABLES.items()}
    figures = [*dict.fromkeys([*FIGURES, *sorted(each.name for each in folder.glob("*.png"))])]
    old = page.read_text(encoding="utf-8") if page.exists() else "# Results\n" + new_parts([*TABLES], figures)
    text = fill_tables(old, tables)
    for name, draw in FIGURES.items():
        save(draw(rows), folder / name)
    write_text(page, text)
    write_text(folder / CSV, csv_of(rows))


def main(args: list[str] | None = None) -> None:
    """Reads the options, and does one fit or a study."""
    fit, output, study = parse_options([Fit, Output, Study], __doc__ or "", args=args)
    torch.set_num_threads(1)
    if study.study or study.pages_only:
        study_all(study, output)
    elif study.quick:
        raise ValueError("--quick is for a --study: name its files")
    else:
        fit_one(fit, output)


if __name__ == "__main__":
    run_command(main)
