"""The main job on real input, in small: slow."""

from pathlib import Path

import pytest
import torch

from hsivi_diffusers import HSIVIPipeline, load_teacher
from hsivi_diffusers.commands import cli
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.images import load_images
from hsivi_diffusers.evaluation.metrics import Measures
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.solvers import make_solver, make_student, sample

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_short_distillation_of_the_digits_beats_the_solvers_at_five_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the config names the teacher from there
    run_dir = tmp_path / "run"
    cli.distil(
        ["--config", "training/configs/digits_t5.yaml", "--output_dir", str(run_dir), "--max_train_steps", "500"]
    )
    real, _ = load_images("digits", 8, 1)
    classifier = ImageClassifier.from_pretrained("assets/digits_classifier").eval()
    distances = Measures(classifier, real.float() / 255)

    teacher = load_teacher("assets/digits_ddpm")
    samplers = {method: make_solver(method, 5, Guided(teacher)) for method in ("DDIM", "DPM-Solver++", "UniPC")}
    samplers["HSIVI"] = make_student(HSIVIPipeline.from_pretrained(run_dir / "pipeline"), teacher)
    measured = {name: distances(torch.cat(list(sample(sampler, 2000, 500, 0)))) for name, sampler in samplers.items()}
    ours = measured.pop("HSIVI")
    assert ours["fd"] < 0.7 * min(row["fd"] for row in measured.values())
    assert ours["swd"] < 0.9 * min(row["swd"] for row in measured.values())
