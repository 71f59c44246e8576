"""Fits a semi-implicit sampler to a target of the benchmarks, or does a whole study of such fits.

One fit:

    python -m training.benchmarks.inference.fit_target --target checkerboard --num_layers 5 --bridge diffusion \
        --objective LB --output_dir runs/checkerboard

writes OUTPUT_DIR/report.json (settings, agreement with the target, signs of failure), layers.safetensors,
draws.safetensors and, for targets on the plane, marginals.png. `--resume_from_checkpoint latest` goes on with a fit
that was stopped.

A study, which goes on where it was stopped by itself:

    python -m training.benchmarks.inference.fit_target --study training/configs/study_*.yaml

writes docs/inference/results.json, and the figures and tables of docs/inference/index.md that are made from it.
`--quick true` does a short version of each study and writes to runs/inference_quick.

A target of your own is fitted by a few lines of Python; see docs/inference/index.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tqdm import tqdm

from hsivi_diffusers.folders import claim_output_dir, replace_folder, sole_writer, write_json
from hsivi_diffusers.options import changes, option, parse_options
from hsivi_diffusers.vi import Step

from .study import read_study, run_study
from .study_figures import draw_fits, draw_marginals_figure
from .study_pages import write_pages
from .target_fit import Fit, Fitted, Stopwatch, measure, prepare


@dataclass
class Output:
    _argument_group_name = "output of one fit"
    output_dir: str | None = option(None, "folder of the fit, or of a study's pages")
    overwrite_output_dir: bool = option(False, "write to a folder that is not empty")
    resume_from_checkpoint: str | None = option(None, "`latest` goes on with a fit that was stopped")
    checkpointing_steps: int = option(2000, "layer updates between checkpoints")


@dataclass
class Study:
    _argument_group_name = "study"
    study: list[str] | None = option(None, "YAML files of studies, in the place of one fit")
    quick: bool = option(False, "a short version of each study")
    workers: int = option(os.cpu_count() or 1, "processes side by side, of one thread each")
    pages_only: bool = option(False, "make the pages of docs/inference again from results.json")


def fit_one(fit: Fit, output: Output) -> None:
    """Trains, with a progress bar and checkpoints, and writes the results."""
    resumes = output.resume_from_checkpoint is not None
    if resumes and output.resume_from_checkpoint != "latest":
        raise ValueError(f"--resume_from_checkpoint {output.resume_from_checkpoint}: there is only `latest`")
    if output.checkpointing_steps < 1:
        raise ValueError(f"--checkpointing_steps {output.checkpointing_steps}: give 1 or more")
    if resumes and not (Path(output.output_dir or "") / "checkpoint").is_dir():
        raise ValueError(f"--output_dir {output.output_dir} holds no checkpoint: leave --resume_from_checkpoint out")
    folder = claim_output_dir(output.output_dir, resumes or output.overwrite_output_dir)
    with sole_writer(folder):
        stopwatch = Stopwatch()
        fitted = prepare(fit, stopwatch)
        _train(fitted, fit, folder, output, stopwatch)
        _write_results(fitted, fit, folder, stopwatch.seconds)


def _train(fitted: Fitted, fit: Fit, folder: Path, output: Output, stopwatch: Stopwatch) -> None:
    inference, checkpoint = fitted.inference, folder / "checkpoint"
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(inference)
    if output.resume_from_checkpoint and checkpoint.is_dir():
        stopwatch.seconds = _seconds_before(checkpoint, fit)
        accelerator.load_state(str(checkpoint))
    total = sum(stage.num_steps for stage in inference.curriculum)
    bar = tqdm(total=total, initial=inference.next_step, unit="step")
    for step in _timed(inference.steps(), stopwatch):
        bar.update(step.next_step - step.step)
        if step.step % 100 == 0:
            layer = ", ".join(map(str, step.layers.t.unique().tolist()))
            bar.set_postfix(layer=layer, loss=f"{float(step.layers.loss.mean()):.3f}")
        if step.next_step % output.checkpointing_steps == 0 and step.next_step < total:
            partial = folder / "checkpoint.partial"
            accelerator.save_state(str(partial))
            write_json(partial / "fit.json", {"fit": asdict(fit), "seconds": stopwatch.seconds})
            replace_folder(partial, checkpoint)
    bar.close()


def _timed(steps: Iterator[Step], stopwatch: Stopwatch) -> Iterator[Step]:
    """Counts what the steps take, not what is done between them."""
    while True:
        with stopwatch.running():
            step = next(steps, None)
        if step is None:
            return
        yield step


def _seconds_before(checkpoint: Path, fit: Fit) -> float:
    """Returns what a stopped fit has taken, and refuses one of other settings."""
    before = json.loads((checkpoint / "fit.json").read_text(encoding="utf-8"))
    if other := changes(before["fit"], asdict(fit)):
        raise ValueError(f"{checkpoint} is of a fit with other settings ({other}): name another --output_dir")
    return float(before["seconds"])


def _write_results(fitted: Fitted, fit: Fit, folder: Path, seconds: float) -> None:
    inference = fitted.inference
    save_file(
        {name: value.contiguous() for name, value in inference.layers.state_dict().items()},
        folder / "layers.safetensors",
    )
    save_file({"x": fitted.sample(10_000, seed=0).contiguous()}, folder / "draws.safetensors")
    found = inference.diagnose(seed=2)
    for finding in found:
        print(f"{finding.signature}: {finding.message}")
    agreement = measure(fitted.sample, fit.target)
    if fitted.target.dimension == 2:
        draw_marginals_figure(fitted, folder / "marginals.png")
    report = {
        "fit": asdict(fit),
        "seconds": seconds,
        "agreement": agreement,
        "findings": [asdict(one) for one in found],
    }
    write_json(folder / "report.json", report)
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
            print(f"{folder}: {len(jobs)} rows are there; fitting for the pictures", flush=True)
            draw_fits(folder, study.quick)
        write_pages(folder)
    print(f"{folder / 'index.md'} is made")


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
    main()
