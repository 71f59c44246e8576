"""Measures a distilled sampler against the solvers on the same teacher, and writes the report.

    python -m hsivi_diffusers.evaluation.evaluate \
        --config training/configs/digits_evaluation.yaml --run_dir runs/digits_t5

Writes RUN_DIR/report.json, report.md, samples.png and curve.png. Every method starts from the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from tqdm import tqdm

from ..distillation.denoisers import load_teacher
from ..folders import write_text
from ..options import option, parse_options
from ..pipeline_hsivi import HSIVIPipeline
from .classifier import ImageClassifier
from .figures import draw_curve, draw_samples
from .images import load_images
from .metrics import Distances
from .pages import measured_on
from .solvers import Sampler, make_solver, make_student, sample


@dataclass
class Evaluation:
    _argument_group_name = "evaluation"
    run_dir: str | None = option(None, "folder of a run of train_hsivi.py; the report goes there")
    teacher: str | None = option(None, "folder or repo id of the teacher; that of the run by default")
    real_data: str = option("digits", "`digits`, a folder of pictures, or a dataset's name")
    feature_extractor: str = option("assets/digits_classifier", "folder of an ImageClassifier")
    feature_name: str = option("digits classifier features", "its name in the tables")
    num_samples: int = option(2000, "pictures of each method")
    eval_seed: int = option(0, "seed of the noise")
    batch_size: int = option(500, "pictures at once")
    solver_steps: list[int] = option([5, 10], "network calls of DDIM, DPM-Solver++ and UniPC")
    ddpm_steps: int = option(100, "network calls of DDPM, the teacher's row; 0 leaves it out")
    ddim_steps: int = option(50, "network calls of DDIM with eta 1; 0 leaves it out")
    columns: int = option(16, "pictures in a row of samples.png")


@dataclass(frozen=True)
class Entry:
    """One line of the report before it is measured."""

    method: str
    nfe: int
    sampler: Sampler


def entries(options: Evaluation, student: HSIVIPipeline, unet: UNet2DModel, config: Any) -> Iterator[Entry]:
    for nfe in student.scheduler.depths:
        yield Entry("HSIVI", nfe, make_student(student, nfe))
    for nfe in options.solver_steps:
        for method in ("DDIM", "DPM-Solver++", "UniPC"):
            yield Entry(method, nfe, make_solver(method, nfe, unet, config))
    if options.ddim_steps:
        yield Entry("DDIM, eta 1", options.ddim_steps, make_solver("DDIM eta 1", options.ddim_steps, unet, config))
    if options.ddpm_steps:
        yield Entry("DDPM", options.ddpm_steps, make_solver("DDPM", options.ddpm_steps, unet, config))


def measure(
    options: Evaluation, lines: list[Entry], distances: Distances, training: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], torch.Tensor]]:
    """Samples and measures every entry; returns the rows, and some pictures of each."""
    rows, pictures = [], {}
    total = options.num_samples * sum(line.nfe for line in lines)
    with tqdm(total=total, desc="evaluate", unit="call", unit_scale=True) as progress:
        for line in lines:
            progress.set_postfix_str(f"{line.method} at {line.nfe}")
            batches = []
            for batch in sample(line.sampler, options.num_samples, options.batch_size, options.eval_seed):
                batches.append(batch)
                progress.update(len(batch) * line.nfe)
            images = torch.cat(batches)
            pictures[line.method, line.nfe] = images[: options.columns]
            rows.append(make_row(line, options, training, distances(images)))
    return rows, pictures


def make_row(line: Entry, options: Evaluation, training: dict[str, Any], measured: dict[str, float]) -> dict[str, Any]:
    """A row of report.json; only ours was trained."""
    ours = line.method == "HSIVI"
    return {
        "dataset": Path(options.real_data).resolve().name if Path(options.real_data).exists() else options.real_data,
        "method": line.method,
        "nfe": line.nfe,
        "train_seed": training["seed"] if ours else None,
        "eval_seed": options.eval_seed,
        "num_samples": options.num_samples,
        **measured,
        "train_seconds": training["seconds"] if ours else None,
    }


def write_report(run_dir: Path, rows: list[dict[str, Any]], options: Evaluation, training: dict[str, Any]) -> None:
    cells = [
        f"| {row['nfe']} | {'**HSIVI**' if row['method'] == 'HSIVI' else row['method']} | {row['fd']:.2f} "
        f"| {row['swd']:.4f} | {row['num_samples']} | {'' if row['train_seed'] is None else row['train_seed']} "
        f"| {row['eval_seed']} | {'' if row['train_seconds'] is None else format(row['train_seconds'], '.0f')} |"
        for row in sorted(rows, key=lambda row: (row["nfe"], row["fd"]))
    ]
    measured = f"Measured on {measured_on()}."
    text = "\n".join(
        [
            f"# {run_dir.name}",
            "",
            f"Teacher `{training['pretrained_teacher_model']}`, real pictures `{options.real_data}`. HSIVI was trained "
            f"{'with' if training.get('train_data') else 'without'} data by the preset `{training['preset']}` for "
            f"{training['max_train_steps']} updates.",
            "",
            f"| NFE | method | FD, {options.feature_name} | sliced Wasserstein | samples | train seed | eval seed "
            "| training s |",
            "|---:|---|---:|---:|---:|---:|---:|---:|",
            *cells,
            "",
            "Lower is better in both. DDIM has eta 0 on the quadratic grid; "
            "DPM-Solver++ is 2M. Every method starts from the same noise.",
            measured,
            "",
        ]
    )
    report = {"features": options.feature_name, "measured": measured, "rows": rows}
    write_text(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(run_dir / "report.md", text)


def picture_rows(pictures: dict[tuple[str, int], torch.Tensor], real: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The teacher first, then each solver and HSIVI at equal calls, then real pictures."""
    rows = [(f"teacher, {key[0]} at {key[1]}", pictures[key]) for key in pictures if key[0] == "DDPM"]
    ours = {key[1]: pictures[key] for key in pictures if key[0] == "HSIVI"}
    for nfe in ours:
        rows += [(f"{key[0]} at {nfe}", pictures[key]) for key in pictures if key[1] == nfe and key[0] != "HSIVI"]
        rows.append((f"HSIVI at {nfe}", ours[nfe]))
    columns = len(next(iter(ours.values())))
    return [*rows, ("real", real[torch.linspace(0, len(real) - 1, columns).long()])]


def closing_lines(run_dir: Path, rows: list[dict[str, Any]]) -> list[str]:
    """What was made, how it compares at the most network calls it can make, what to do next."""
    ours = max((row for row in rows if row["method"] == "HSIVI"), key=lambda row: row["nfe"])
    rivals = [row for row in rows if row["nfe"] == ours["nfe"] and row is not ours]
    compared = f"FD {ours['fd']:.2f} at {ours['nfe']} network calls"
    if rivals:
        best = min(rivals, key=lambda row: row["fd"])
        compared += f", against {best['fd']:.2f} of {best['method']}, the best stock solver at as many"
    slow = [row for row in rows if row["nfe"] > ours["nfe"] and row["method"] != "HSIVI"]
    if slow:
        longest = max(slow, key=lambda row: row["nfe"])
        compared += f", and {longest['fd']:.2f} of {longest['method']} at {longest['nfe']}"
    return [
        f"Made:     {run_dir / 'pipeline'} (HSIVIPipeline), report.md, report.json, samples.png, curve.png beside it",
        f"Compares: {compared}",
        f"Next:     look at {run_dir / 'samples.png'}, then distil your own: python training/train_hsivi.py --help",
    ]


def load_run(run_dir: Path) -> dict[str, Any]:
    """Options and cost of a finished run.

    Raises:
        ValueError: The folder is no finished run.
    """
    missing = [name for name in ("pipeline", "options.json", "training.json") if not (run_dir / name).exists()]
    if missing:
        raise ValueError(f"--run_dir {run_dir} lacks {', '.join(missing)}: give the folder of a finished run")
    return {**json.loads((run_dir / "options.json").read_text()), **json.loads((run_dir / "training.json").read_text())}


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Evaluation], __doc__ or "", args, "hsivi evaluate")
    if not options.run_dir:
        raise ValueError("--run_dir is missing: give the folder of a run of train_hsivi.py")
    run_dir = Path(options.run_dir)
    training = load_run(run_dir)
    student = HSIVIPipeline.from_pretrained(run_dir / "pipeline")
    revision = None if options.teacher else training["revision"]
    unet, schedule = load_teacher(options.teacher or training["pretrained_teacher_model"], revision)
    real, _ = load_images(options.real_data, unet.config.sample_size, unet.config.in_channels)
    real = real.float() / 255
    distances = Distances(ImageClassifier.from_pretrained(options.feature_extractor).eval(), real)

    rows, pictures = measure(options, list(entries(options, student, unet, schedule.config)), distances, training)
    write_report(run_dir, rows, options, training)
    draw_samples(picture_rows(pictures, real), run_dir / "samples.png")
    draw_curve(rows, f"FD, {options.feature_name}", run_dir / "curve.png")
    print("\n".join(closing_lines(run_dir, rows)))


if __name__ == "__main__":
    main()
