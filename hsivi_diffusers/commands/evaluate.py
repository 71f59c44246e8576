"""Measure a distilled sampler against solvers of its teacher, the baselines, and write a report.

    hsivi evaluate --run_dir runs/my_run

Writes RUN_DIR/report.json, report.md, samples.png and curve.png, and adds them to RUN_DIR/index.html; with --output_dir
the four go there, and the run stays as it is. Images are compared to a reference: images that the teacher draws in many
steps, or, with --real_data, real images. All methods start from the same noise, with the same balanced class labels;
the reference has noise of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..distillation.config import usual_options
from ..evaluation.features import check_channels, check_packages, load_network
from ..evaluation.images import check_source, load_images
from ..evaluation.metrics import FEWEST, PACKAGES, Measures, split_halves
from ..evaluation.report import OURS, Report, load_run
from ..runs.artifacts import PROMPTS, read_json
from ..runs.bars import bar
from ..runs.folders import claim_output_dir
from ..runs.measures import REPORTED
from ..runs.options import option
from ..runs.page import write_page
from ..teachers.guidance import Guided
from ..teachers.levels import clock_of
from ..teachers.loading import load_student, load_teacher
from ..teachers.solvers import Sampler, make_solver, make_student, sample, shorten
from .options import check_numbers, parse_options

ON_GRID = ("DPM-Solver++", "UniPC")  # of `few_step_levels` too: neither grid is the better one for every teacher
BASELINES = ("DDIM", "Euler", *ON_GRID)


@dataclass
class Evaluation:
    _group = "evaluation"
    run_dir: str | None = option(None, "folder of a finished distillation")
    output_dir: str | None = option(None, "folder of the report; by default that of the run, for its page and card")
    teacher: str | None = option(None, "folder or repo id of the teacher; that of the run by default")
    real_data: str | None = option(
        None,
        "real images as the reference: a folder (also with one subfolder per class), `digits`, or a dataset on the "
        "Hub; by default images of the teacher",
    )
    reference_samples: int = option(2000, "images of the teacher in the reference")
    reference_steps: int = option(50, "steps of DPM-Solver++ SDE for each of them; DPM-Solver++ for a rectified flow")
    feature_extractor: str | None = option(None, "folder of an ImageClassifier; EfficientNet-Lite0 by default")
    feature_name: str | None = option(None, "its name in the tables")
    num_samples: int = option(1000, "images of each method")
    eval_seed: int = option(0, "seed of the noise")
    guidance_scale: float | None = option(None, "one of the guidance scales it was trained with; the lowest by default")
    batch_size: int | None = option(None, "images at once; 100 by default, of latents 4")
    solver_steps: list[int] = option(
        [],
        "steps of DDIM, DPM-Solver++, UniPC and, of a flow, Euler; by default for the calls of the student, and twice "
        "the most of them",
    )
    ddpm_steps: int = option(100, "steps of DDPM; 0 leaves it out")
    ddim_steps: int = option(50, "steps of DDIM with eta 1; 0 leaves it out")

    def check(self) -> None:
        """Refuses, before anything is loaded, what cannot be measured."""
        if not self.run_dir:
            raise ValueError("--run_dir is missing: give the folder of a finished distillation")
        samples, steps, or_none = (FEWEST, 1_000_000), (1, 1000), (0, 10_000)
        check_numbers(self, num_samples=samples, reference_samples=samples, batch_size=(1, 10_000))
        check_numbers(self, reference_steps=steps, solver_steps=steps, ddpm_steps=or_none, ddim_steps=or_none)
        check_numbers(self, eval_seed=(0, 2**32))
        if self.real_data is not None:
            check_source(self.real_data)
        check_packages([*PACKAGES, "matplotlib"])


def make_samplers(
    options: Evaluation, student: DiffusionPipeline, guided: Guided
) -> Iterator[tuple[str, int, Sampler, str]]:
    """The student at each of its step counts, then the baselines: method, network calls, sampler, grid.

    A step of a teacher with guidance is two network calls. Solvers that its noise schedule excludes are left out.
    """
    clock, shape = clock_of(guided.teacher.schedule), guided.teacher.shape
    counts = student.scheduler.depths
    for nfe in counts:
        student.scheduler.set_timesteps(nfe)
        grid = f"trained: {shorten(student.scheduler.timesteps.tolist())}"
        if student.scheduler.guidance_scales:
            grid += f"; guidance {scale_of(options, student)}"
        yield OURS, nfe, make_student(student, guided.teacher, nfe, options.guidance_scale), grid
    few = dict.fromkeys(max(1, nfe // guided.calls) for nfe in [*counts, 2 * max(counts)])
    baselines = [(method, steps) for steps in options.solver_steps or few for method in BASELINES]
    baselines += [("DDIM, eta 1", options.ddim_steps), ("DDPM", options.ddpm_steps)]
    for method, steps in baselines:
        if not steps or method in clock.unsupported:
            continue
        grids: dict[str, list[int] | None] = {method: None}
        if method in ON_GRID:
            grids[f"{method}, few-step grid"] = clock.few_step_levels(shape, steps)
        for name, levels in grids.items():
            solver = make_solver(method, steps, guided, levels)
            yield name, guided.calls * steps, solver, solver.grid


def scale_of(options: Evaluation, student: DiffusionPipeline) -> float:
    """The guidance scale that is measured; 1 for a student that was trained without guidance."""
    scales = student.scheduler.guidance_scales or [1.0]
    return float(scales[student.scheduler.guidance_index(options.guidance_scale)])


def load_reference(
    options: Evaluation, guided: Guided, classes: int | None, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Loads the real images, or samples the teacher, from other noise than the methods start from.

    Returns:
        Images in [0, 1], shape (N, C, H, W), labels of shape (N,) if they are known, and a name.
    """
    channels, height, width = guided.teacher.image_shape
    if options.real_data is not None:
        if height != width or channels not in (1, 3):
            raise ValueError(
                f"--real_data {options.real_data}: the teacher's images are {channels} x {height} x {width}, and only "
                "square images of 1 or 3 channels are loaded: leave --real_data out to compare with the teacher"
            )
        images, labels = load_images(options.real_data, height, channels)
        path = Path(options.real_data)
        return images.float() / 255, labels, path.resolve().name if path.exists() else options.real_data
    method = clock_of(guided.teacher.schedule).reference
    # The trailing grid starts at the last timestep.
    solver = make_solver(method, options.reference_steps, guided, timestep_spacing="trailing")
    size = options.reference_samples
    images = draw("reference", solver, size, batch_size, options.eval_seed + 1, classes)
    if not images.isfinite().all():
        raise ValueError(
            f"the teacher's images by {method} at {options.reference_steps} steps are not finite: give more "
            "--reference_steps, or real images by --real_data"
        )
    labels = torch.arange(size) % classes if classes else None
    return images, labels, f"teacher, {method} at {options.reference_steps} steps"


def draw(name: str, sampler: Sampler, size: int, batch_size: int, seed: int, classes: int | None) -> torch.Tensor:
    """Images as `sample` yields them, in one tensor, with a progress bar."""
    batches = []
    with bar(total=size, desc=name, unit="image") as progress:
        for batch in sample(sampler, size, batch_size, seed, classes):
            batches.append(batch)
            progress.update(len(batch))
    return torch.cat(batches)


def main(args: list[str] | None = None) -> None:
    """Measures a run and writes its report."""
    (options,) = parse_options([Evaluation], __doc__ or "", args, "hsivi evaluate")
    options.check()
    run_dir = Path(options.run_dir)
    training = load_run(run_dir)
    output = claim_output_dir(options.output_dir or options.run_dir, keep=True)
    if not os.access(output, os.W_OK):
        raise ValueError(f"{output} cannot be written to: name another folder for the report by --output_dir")
    training["teacher"] = options.teacher or training["pretrained_teacher_model"]
    if training["teacher"] is None:
        raise ValueError(
            "--teacher is missing: this run was given a loaded teacher, name the folder or repo id of its "
            "pipeline; of a Teacher of your own there is none, and its students are measured in Python"
        )
    network, features = load_network(options.feature_extractor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_teacher(training["teacher"], None if options.teacher else training.get("revision"))
    check_channels(network, teacher.image_shape[0])
    student = load_student(run_dir / "pipeline", teacher).to(device)
    teacher.set_sizes(student.scheduler.config)
    prompts = str(run_dir / PROMPTS) if training.get("prompts") else None
    teacher.encode_prompts(prompts, training.get("negative_prompt", ""), torch.device(device))
    teacher.to(device).network.eval()
    classes = teacher.num_conditions(bool(student.scheduler.guidance_scales)) or None
    if prompts is not None and classes is not None:  # the same for methods and reference
        classes = min(classes, options.num_samples, options.reference_samples)
    training["guidance_scale"] = scale_of(options, student)
    guided, batch = Guided(teacher, [training["guidance_scale"]]), options.batch_size or teacher.draw_batch
    samplers = list(make_samplers(options, student, guided))  # refuses counts without a grid
    reference, labels, name = load_reference(options, guided, classes, batch)
    names = (*REPORTED, "kid_error", "kid_folds")
    measures = Measures(network.to(device), reference, names)
    if before := read_json(output / "report.json").get("features"):
        print(f"The report in {output} (features: {before}) will be replaced.")

    headline, features = "fd" if options.feature_extractor else "kid", options.feature_name or features
    report = Report(output, training, headline, features, name, split_halves(network, reference, names))
    size, batch_size, seed = options.num_samples, batch, options.eval_seed
    for method, nfe, sampler, grid in samplers:
        images = draw(f"{method} at {nfe}", sampler, size, batch_size, seed, classes)
        report.add(method, nfe, grid, images, measures, seed)
    report.draw(reference, labels, classes)
    if output.samefile(run_dir):
        write_page(run_dir, usual_options(training))
    print(report.closing_lines())
