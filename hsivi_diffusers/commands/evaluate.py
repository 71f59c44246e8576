"""Measure a distilled sampler against solvers of its teacher, the baselines, and write a report.

    hsivi evaluate --run_dir runs/my_run

Writes RUN_DIR/report.json, report.md, samples.png and curve.png, and adds them to RUN_DIR/index.html. Images are
compared to a reference: images that the teacher draws in many steps, or, with --real_data, real images. All methods
start from the same noise, with the same balanced class labels; the reference has noise of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..evaluation.features import check_channels, check_packages, load_network
from ..evaluation.images import check_source, load_images
from ..evaluation.metrics import FEWEST, PACKAGES, Measures, split_halves
from ..evaluation.report import OURS, Report, load_run
from ..runs.artifacts import PROMPTS
from ..runs.bars import bar
from ..runs.measures import REPORTED
from ..runs.options import option
from ..runs.page import read_json, write_page
from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.denoisers import Network, give_prompts, num_classes, sample_shape
from ..teachers.guidance import GuidedNetwork, calls_of_step, guided
from ..teachers.ode import few_step_timesteps
from ..teachers.solvers import Sampler, make_solver, make_student, sample, shorten
from ..teachers.teacher import image_shape, load_parts, load_prompts, load_student, network_of
from .options import check_numbers, parse_options

ON_GRID = ("DPM-Solver++", "UniPC")  # of `few_step_timesteps` too: neither grid is the better one for every teacher
BASELINES = ("DDIM", *ON_GRID)
# The SDE of a teacher corrects errors of its network, and a rectified flow has none. Both by the trailing grid, which
# starts at the last timestep.
REFERENCE, REFERENCE_OF_FLOW = "DPM-Solver++ SDE", "DPM-Solver++"


@dataclass
class Evaluation:
    _group = "evaluation"
    run_dir: str | None = option(None, "folder of a finished distillation; the report goes there")
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
        [], "steps of DDIM, DPM-Solver++ and UniPC; by default for the calls of the student, and twice the most of them"
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
    options: Evaluation,
    student: DiffusionPipeline,
    unet: Network | GuidedNetwork,
    config: Any,
    host: DiffusionPipeline | None = None,
) -> Iterator[tuple[str, int, Sampler, str]]:
    """The student at each of its step counts, then the baselines: method, network calls, sampler, grid.

    A step of a teacher with guidance is two network calls. DDPM is not defined for rectified flows.
    """
    counts = student.scheduler.depths
    for nfe in counts:
        student.scheduler.set_timesteps(nfe)
        grid = f"trained: {shorten(student.scheduler.timesteps.tolist())}"
        if student.scheduler.guidance_scales:
            grid += f"; guidance {scale_of(options, student)}"
        yield OURS, nfe, make_student(student, nfe, options.guidance_scale), grid
    calls = calls_of_step(unet)
    few = dict.fromkeys(max(1, nfe // calls) for nfe in [*counts, 2 * max(counts)])
    baselines = [(method, steps) for steps in options.solver_steps or few for method in BASELINES]
    if not student.scheduler.is_flow:
        baselines += [("DDIM, eta 1", options.ddim_steps), ("DDPM", options.ddpm_steps)]
    for method, steps in baselines:
        if not steps:
            continue
        grids: dict[str, list[int] | None] = {method: None}
        if method in ON_GRID:
            grids[f"{method}, few-step grid"] = few_step_timesteps(student.scheduler, sample_shape(unet), steps)
        for name, timesteps in grids.items():
            solver = make_solver(method, steps, unet, config, timesteps, host)
            yield name, calls * steps, solver, solver.grid


def batch_size_of(options: Evaluation, host: DiffusionPipeline | None) -> int:
    """Images at once: 100 by default, of latents 4."""
    if options.batch_size is None:
        return 100 if host is None else 4
    return options.batch_size


def scale_of(options: Evaluation, student: DiffusionPipeline) -> float:
    """The guidance scale that is measured; 1 for a student that was trained without guidance."""
    scales = student.scheduler.guidance_scales or [1.0]
    return float(scales[student.scheduler.guidance_index(options.guidance_scale)])


def load_reference(
    options: Evaluation,
    unet: Network | GuidedNetwork,
    config: Any,
    classes: int | None,
    host: DiffusionPipeline | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Loads the real images, or samples the teacher, from other noise than the methods start from.

    Returns:
        Images in [0, 1], shape (N, C, H, W), labels of shape (N,) if they are known, and a name.
    """
    channels, height, width = image_shape(host, sample_shape(unet))
    if options.real_data is not None:
        if height != width or channels not in (1, 3):
            raise ValueError(
                f"--real_data {options.real_data}: the teacher's images are {channels} x {height} x {width}, and only "
                "square images of 1 or 3 channels are loaded: leave --real_data out to compare with the teacher"
            )
        images, labels = load_images(options.real_data, height, channels)
        path = Path(options.real_data)
        return images.float() / 255, labels, path.resolve().name if path.exists() else options.real_data
    method = REFERENCE_OF_FLOW if HSIVIScheduler.from_config(config).is_flow else REFERENCE
    solver = make_solver(method, options.reference_steps, unet, config, host=host, timestep_spacing="trailing")
    size = options.reference_samples
    images = draw("reference", solver, size, batch_size_of(options, host), options.eval_seed + 1, classes)
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
    training["teacher"] = options.teacher or training["pretrained_teacher_model"]
    if training["teacher"] is None:
        raise ValueError("--teacher is missing: this run was given a loaded pipeline, name its folder or repo id")
    network, features = load_network(options.feature_extractor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet, schedule, host, _ = load_parts(training["teacher"], None if options.teacher else training.get("revision"))
    check_channels(network, image_shape(host, sample_shape(unet))[0])
    student = load_student(run_dir / "pipeline", host).to(device)
    unet.to(device).eval()
    if host is not None:
        host.vae.to(device)
    told = str(run_dir / PROMPTS) if training.get("prompts") else None, training.get("negative_prompt", "")
    if (prompts := load_prompts(host, *told, torch.device(device))) is not None:
        for each in (unet, network_of(student)):
            give_prompts(each, prompts)
    classes = num_classes(unet, bool(student.scheduler.guidance_scales)) or None
    if prompts is not None:  # the same for methods and reference
        classes = min(len(prompts) - 1, options.num_samples, options.reference_samples)
    training["guidance_scale"] = scale_of(options, student)
    teacher = guided(unet, [training["guidance_scale"]])
    samplers = list(make_samplers(options, student, teacher, schedule.config, host))  # refuses counts without a grid
    reference, labels, name = load_reference(options, teacher, schedule.config, classes, host)
    measures = Measures(network.to(device), reference, REPORTED)
    if before := read_json(run_dir / "report.json").get("features"):
        print(f"The report in {run_dir} (features: {before}) will be replaced.")

    headline, features = "fd" if options.feature_extractor else "kid", options.feature_name or features
    report = Report(run_dir, training, headline, features, name, split_halves(network, reference, REPORTED))
    size, batch_size, seed = options.num_samples, batch_size_of(options, host), options.eval_seed
    for method, nfe, sampler, grid in samplers:
        images = draw(f"{method} at {nfe}", sampler, size, batch_size, seed, classes)
        report.add(method, nfe, grid, images, measures, seed)
    report.draw(reference, labels, classes)
    write_page(run_dir)
    print(report.closing_lines())
