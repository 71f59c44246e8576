"""A short distillation, for the command line and from Python: 2 layers, 4 rows, 5 updates; and programs run here."""

import importlib
from pathlib import Path

SETTINGS = {
    "num_inference_steps": 2,
    "train_batch_size": 4,
    "max_train_steps": 5,
    "critic_updates": 2,
    "checkpointing_steps": 2,
    "lr_warmup_steps": 4,
    "validation_steps": 0,
}


def train(teacher, folder, **settings):
    """Trains a student from Python and returns the trainer."""
    from hsivi_diffusers import HSIVIConfig, HSIVITrainer

    teacher = str(teacher) if isinstance(teacher, Path) else teacher
    trainer = HSIVITrainer(teacher, HSIVIConfig(**{**SETTINGS, **settings}, output_dir=str(folder)))
    trainer.train()
    return trainer


def pipeline_of(run):
    """The pipeline of a finished run, without a progress bar."""
    from hsivi_diffusers import HSIVIPipeline

    pipeline = HSIVIPipeline.from_pretrained(run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def contents(folder):
    """Every file under a folder, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(program, given):
    """Stands in for `trainings.call`: runs the program in this process."""
    from hsivi_diffusers.commands import cli
    from training.benchmarks.images.trainings import DISTIL

    if program == DISTIL:
        cli.distil(given)
    else:
        importlib.import_module(program).main(given)
