"""What a run shows of itself."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hsivi_diffusers import HSIVIPipeline
from hsivi_diffusers.distillation import progress as monitor
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.images import load_images
from hsivi_diffusers.evaluation.metrics import Measures

VALIDATION = {"validation_steps": 2, "validation_samples": 40, "train_batch_size": 12}


@pytest.fixture(scope="module")
def shown(distil, extractor, tmp_path_factory):
    """A run that logs every step and measures the distance to the digits."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monitor, "EVERY", 1)
        return distil(
            tmp_path_factory.mktemp("runs") / "shown",
            report_to="tensorboard",
            noise_scale_type="per_layer",
            validation_data="digits",
            feature_extractor=extractor,
            **VALIDATION,
        )


@pytest.fixture(scope="module")
def events(shown):
    accumulator = EventAccumulator(str(shown / "logs" / "hsivi"), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def test_the_trackers_are_told_losses_norms_rates_and_scales(events):
    tags = {
        *(f"{kind}/{player}" for kind in ("loss", "grad_norm", "learning_rate") for player in ("layers", "critic")),
        *(f"{kind}/layer_{t}" for kind in ("critic_loss", "noise_scale") for t in (0, 1)),
        "images_per_second",
        "validation/fd",
    }
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags:
        values = events.Scalars(tag)
        assert all(np.isfinite(event.value) for event in values)
        steps = [event.step for event in values]
        assert steps == ([2, 4] if tag == "validation/fd" else steps)
    for tag in ("loss/layers", "grad_norm/critic", "noise_scale/layer_1", "images_per_second"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5]
    rates = [event.value for event in events.Scalars("learning_rate/critic")]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 0.0])
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))


def test_pictures_go_to_the_tracker_and_to_a_file(events, shown):
    assert events.Tags()["images"]
    assert sorted(path.name for path in (shown / "validation").iterdir()) == ["step-2.png", "step-4.png"]
    for step in (2, 4):
        with Image.open(shown / "validation" / f"step-{step}.png") as grid:
            assert grid.size == (8 * 8, 4 * 8)
            assert np.asarray(grid).std() > 0


@pytest.mark.parametrize("num_layers", [2, (1, 2)])
def test_the_distance_is_that_of_the_averaged_layers(distil, extractor, tmp_path, monkeypatch, capsys, num_layers):
    """With several step counts in the most calls."""
    measured = []
    validate = monitor.Monitor.validate
    monkeypatch.setattr(monitor.Monitor, "validate", lambda *given: measured.append(given[1]) or validate(*given))
    options = {**VALIDATION, "validation_steps": 3, "max_train_steps": 3, "num_layers": num_layers}
    folder = distil(tmp_path / "run", validation_data="digits", feature_extractor=extractor, **options)
    assert measured == [3]
    said = next(line for line in capsys.readouterr().out.splitlines() if "FD" in line)
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")
    generator = torch.Generator().manual_seed(0)
    pictures = [pipeline(size, generator, 2, output_type="pt").images for size in (12, 12, 12, 4)]
    real, _ = load_images("digits", 8, 1)
    distances = Measures(ImageClassifier.from_pretrained(extractor).eval(), real.float() / 255)
    assert said == f"step 3: FD {distances(torch.cat(pictures))['fd']:.2f} of 40 pictures, 2 network calls each"


def test_looking_changes_nothing(distil, shown, tmp_path, differences):
    plain = distil(tmp_path / "run", noise_scale_type="per_layer", train_batch_size=12)
    assert differences(plain, shown) == []


def test_a_class_conditional_student_is_shown_in_all_classes(distil, class_teacher, tmp_path):
    options = {**VALIDATION, "max_train_steps": 2}
    folder = distil(tmp_path / "run", pretrained_teacher_model=class_teacher, **options)
    with Image.open(folder / "validation" / "step-2.png") as grid:
        assert grid.size == (64, 32)


def test_a_scale_of_pixels_is_told_by_its_range(distil, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "EVERY", 1)
    told = {}
    numbers = monitor.Monitor._numbers
    monkeypatch.setattr(monitor.Monitor, "_numbers", lambda *given: told.update(numbers(*given)) or numbers(*given))
    distil(tmp_path / "run", preset="paper", max_train_steps=3)
    assert told["noise_scale/min"] < told["noise_scale/mean"] < told["noise_scale/max"]


def test_a_new_start_removes_the_pictures_of_the_old_one(distil, shown, tmp_path):
    folder = shutil.copytree(shown, tmp_path / "run")
    distil(folder, "--overwrite_output_dir", max_train_steps=2, critic_updates=1)
    assert not (folder / "validation").exists()


@pytest.mark.parametrize(
    ("extractor", "message"),
    [("nowhere", "nowhere holds no ImageClassifier: name"), ("colours", "takes 3 channels, the images have 1")],
)
def test_a_wrong_extractor_is_refused_before_work(distil, tmp_path, extractor, message):
    ImageClassifier(channels=3, num_classes=10, num_features=8).save_pretrained(tmp_path / "colours")
    options = {"validation_data": "digits", "feature_extractor": tmp_path / extractor, **VALIDATION}
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_real_pictures_without_a_step_to_measure_at_are_refused(distil, tmp_path):
    with pytest.raises(ValueError, match="--validation_data is measured every --validation_steps"):
        distil(tmp_path / "run", validation_data="digits")
