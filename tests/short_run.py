"""A short distillation, for the command line and for Python: 2 layers, 4 rows, 5 updates; and programs run here."""

import importlib

SETTINGS = {
    "num_inference_steps": 2,
    "train_batch_size": 4,
    "max_train_steps": 5,
    "critic_updates": 2,
    "checkpointing_steps": 2,
    "lr_warmup_steps": 4,
    "validation_steps": 0,
}


def call(program, given):
    """Stands in for `trainings.call`: runs the program in this process."""
    from hsivi_diffusers.commands import cli
    from training.benchmarks.images.trainings import DISTIL

    if program == DISTIL:
        cli.distil(given)
    else:
        importlib.import_module(program).main(given)
