"""Runs that start where another ended, and the noise scales they learn."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from hsivi_diffusers import HSIVINoiseScale, HSIVIPipeline, HSIVIScheduler
from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation import state, updates
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.networks import load_networks
from hsivi_diffusers.teachers.teacher import load_parts


def pipeline_of(folder):
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pixel_run(distil, tmp_path_factory):
    """A finished run of 3 steps that learns a noise scale for each pixel, at a high rate."""
    folder = tmp_path_factory.mktemp("runs") / "per_pixel"
    options = {"noise_scale_type": "per_pixel", "num_inference_steps": 3, "train_batch_size": 12}  # rows of each layer
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state, "NOISE_SCALE_LEARNING_RATE", 0.1)
        return distil(folder, max_train_steps=4, critic_updates=1, **options)


@pytest.fixture(scope="module")
def number_run(fast_run, tmp_path_factory):
    """A finished run whose scheduler has a single noise scale, as a run of an earlier version may have learned."""
    folder = shutil.copytree(fast_run, tmp_path_factory.mktemp("runs") / "number")
    scheduler = HSIVIScheduler.from_pretrained(folder / "pipeline", subfolder="scheduler")
    HSIVIScheduler.from_config(scheduler.config, noise_scale=0.75).save_pretrained(folder / "pipeline" / "scheduler")
    return folder


@pytest.fixture
def begin(teacher):
    """The networks of a run that has made no update yet."""

    def load(run, teacher=teacher, num_inference_steps=2, **settings):
        start = {"start_timestep": 440} if "start_timestep" not in settings else {}
        config = HSIVIConfig(num_inference_steps, preset="fast", init_from=str(run), **start, **settings)
        accelerator = SimpleNamespace(device="cpu", mixed_precision="no", main_process_first=nullcontext)
        return load_networks(load_parts(str(teacher)), config, accelerator)

    return load


def test_a_curriculum_of_two_and_one_steps_whose_teacher_is_that_of_the_first_run(pixel_run, tmp_path):
    run = pixel_run
    for steps in (2, 1):
        options = {"noise_scale_type": "per_pixel", "max_train_steps": 2, "train_batch_size": 4, "validation_steps": 0}
        folder = tmp_path / str(steps)
        arguments = [f"--{name}={value}" for name, value in options.items()]
        cli.distil([*arguments, f"--num_inference_steps={steps}", f"--init_from={run}", f"--output_dir={folder}"])
        pipeline, run = pipeline_of(folder), folder
        assert len(pipeline.scheduler.timesteps) == steps
        assert pipeline(2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("given", [None, "another"])
def test_the_teacher_is_that_of_the_run_unless_another_is_named(fast_run, teacher, given):
    named = [] if given is None else [f"--pretrained_teacher_model={given}"]
    found, *_ = cli.read_distillation([f"--init_from={fast_run}", *named], "hsivi distil", "")
    assert found.pretrained_teacher_model == (given or str(teacher))


def test_student_and_critic_start_where_the_run_ended(begin, fast_run, same_tensors):
    run = fast_run
    networks = begin(run)
    for unet, name in ((networks.student, "pipeline/unet"), (networks.critic, "critic")):
        assert same_tensors(unet.state_dict(), load_file(run / name / "diffusion_pytorch_model.safetensors"))
    assert not same_tensors(networks.student.state_dict(), networks.teacher.state_dict())
    assert networks.noise_scale is None


@pytest.mark.parametrize("steps", [3, [1, 2]])
def test_a_single_noise_scale_is_carried_to_every_grid_and_pixel(begin, number_run, steps):
    networks = begin(number_run, num_inference_steps=steps)
    assert networks.scheduler.config.noise_scale == 0.75
    assert networks.scheduler.depths == ([steps] if steps == 3 else steps)
    pixels = begin(number_run, num_inference_steps=steps, noise_scale_type="per_pixel").noise_scale()
    torch.testing.assert_close(pixels, torch.full((1, 1, 8, 8), 0.75))


def test_the_pixels_are_carried_to_pixels_alone(begin, pixel_run, same_tensors):
    for steps in (2, [1, 2]):
        networks = begin(pixel_run, num_inference_steps=steps, noise_scale_type="per_pixel")
        assert same_tensors(networks.noise_scale.state_dict(), pipeline_of(pixel_run).unet_noise_scale.state_dict())
    with pytest.raises(ValueError, match="has a noise scale per pixel: set noise_scale_type to 'per_pixel'"):
        begin(pixel_run)


def test_a_noise_scale_per_layer_of_an_earlier_version_is_refused(begin, fast_run, tmp_path):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    path = folder / "pipeline" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "noise_scale": [0.9, 0.8]}))
    with pytest.raises(ValueError, match="has a noise scale per layer, which cannot be trained further"):
        begin(folder)


def test_what_is_no_finished_run_is_refused(distil, tmp_path):
    (tmp_path / "half" / "pipeline").mkdir(parents=True)
    with pytest.raises(ValueError, match="half' lacks critic, options.json: give the folder of a finished run"):
        distil(tmp_path / "run", init_from=tmp_path / "half")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_teacher_is_refused(distil, class_run, tmp_path):
    with pytest.raises(ValueError, match="has networks of another shape than the teacher"):
        distil(tmp_path / "run", init_from=class_run)
    assert not (tmp_path / "run").exists()


def test_a_student_that_predicts_something_else_than_the_teacher_is_refused(begin, fast_run, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "teacher")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(other / "scheduler")
    message = "has a student that predicts 'epsilon', and the teacher predicts 'v_prediction': give a run of the same"
    with pytest.raises(ValueError, match=message):
        begin(fast_run, teacher=other)


def test_a_teacher_of_no_classes_for_a_run_of_classes_and_the_other_way_are_refused(
    distil, fast_run, class_run, class_teacher, tmp_path
):
    """Though the critic's labels may differ, of a student they may not."""
    for run, other in ((fast_run, {"pretrained_teacher_model": class_teacher}), (class_run, {})):
        with pytest.raises(ValueError, match="has networks of another shape than the teacher: give a run of the same"):
            distil(tmp_path / "run", init_from=run, num_inference_steps=(1, 2), **other)


def test_what_a_critic_was_told_of_the_layers_holds_for_the_same_grids_alone(begin, several_run, same_tensors):
    """Grids of 1, 2 and 4 layers from 440; others have as many layers."""
    saved = load_file(several_run / "critic" / "diffusion_pytorch_model.safetensors")
    name = "class_embedding.weight"
    rest = {key: value for key, value in saved.items() if key != name}
    assert saved[name].any()
    for layers, kept in (({}, True), ({"start_timestep": 500}, False), ({"start_spacing": 20}, False)):
        state = begin(several_run, num_inference_steps=[1, 2, 4], **layers).critic.state_dict()
        assert torch.equal(state[name], saved[name] if kept else torch.zeros(7, saved[name].shape[1]))
        assert same_tensors({key: state[key] for key in rest}, rest)


def test_a_critic_of_classes_keeps_them_on_any_grid_and_is_told_layers_anew(begin, class_run, class_teacher):
    name = "class_embedding.weight"
    saved = load_file(class_run / "critic" / "diffusion_pytorch_model.safetensors")[name]
    for start in (440, 500):
        critic = begin(class_run, teacher=class_teacher, start_timestep=start).critic
        assert torch.equal(critic.state_dict()[name], saved)
    networks = begin(class_run, teacher=class_teacher, num_inference_steps=[1, 2])
    own = networks.teacher.state_dict()[name]
    assert torch.equal(networks.critic.state_dict()[name], own.repeat_interleave(3, 0))


def test_a_noise_scale_is_learned_for_each_pixel_and_saved_for_the_sampler(pixel_run):
    pipeline = pipeline_of(pixel_run)
    assert isinstance(pipeline.unet_noise_scale, HSIVINoiseScale)
    scale = pipeline.unet_noise_scale().flatten().tolist()
    assert len(scale) == 64
    assert len(set(scale)) > 1
    assert all(value != 1 for value in scale)
    assert pipeline(2, output_type="pt").images.isfinite().all()
    assert json.loads((pixel_run / "options.json").read_text())["noise_scale_type"] == "per_pixel"


def test_a_noise_scale_has_a_learning_rate_of_its_own(make_state, monkeypatch):
    monkeypatch.setattr(state, "NOISE_SCALE_LEARNING_RATE", 0.0)
    made = make_state(noise_scale_type="per_pixel", critic_updates=1, lr_warmup_steps=0)
    before = made.student.unet.conv_in.weight.clone()
    steps = updates.run_updates(made, 0)
    next(steps)  # of a critic that is the teacher, the student has nothing to learn
    next(steps)
    assert made.student.noise_scale().unique().tolist() == [1.0]
    assert not torch.equal(made.student.unet.conv_in.weight, before)
