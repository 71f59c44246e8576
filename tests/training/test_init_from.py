"""Runs that start where another ended, and the noise scales they learn."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hsivi_diffusers import HSIVINoiseScale, HSIVIPipeline
from hsivi_diffusers.distillation import run as train_hsivi
from hsivi_diffusers.distillation import trainer as players
from hsivi_diffusers.distillation.config import GROUPS, Layers, Options, Teacher, complete

KINDS = ["scalar", "per_layer", "per_pixel"]


def pipeline_of(folder):
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scale_of(folder):
    """The learned noise scale: as in the config, or the component."""
    pipeline = pipeline_of(folder)
    return pipeline.unet_noise_scale or pipeline.scheduler.config.noise_scale


@pytest.fixture(scope="module")
def runs(distil, tmp_path_factory):
    """Finished runs with 3 layers by type of noise scale, whose learning rate is high."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(kind):
        if kind not in made:
            options = {"noise_scale_type": kind, "noise_scale_learning_rate": 0.1, "num_layers": 3}
            options["train_batch_size"] = 12  # chains of every layer
            made[kind] = distil(folder / kind, max_train_steps=8, critic_updates=1, **options)
        return made[kind]

    return get


@pytest.fixture
def begin(teacher):
    """The networks of a run that has made no update yet."""

    def load(run, teacher=teacher, **layers):
        options = Options(*(group() for group in GROUPS))._replace(
            teacher=Teacher(pretrained_teacher_model=str(teacher), init_from=str(run)),
            layers=Layers(**{"num_layers": [2], "timestep_spacing": "uniform", "start_timestep": 440, **layers}),
        )
        return players.load_networks(options, SimpleNamespace(device="cpu", mixed_precision="no"))

    return load


def test_a_curriculum_of_three_two_and_one_layers(runs, tmp_path):
    """The teacher is that of the first run."""
    run = runs("per_layer")
    for num_layers in (2, 1):
        options = {"noise_scale_type": "per_layer", "max_train_steps": 2, "train_batch_size": 4}
        options |= {"ode_pairs": 0, "critic_first": 0} if num_layers == 1 else {}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        folder = tmp_path / str(num_layers)
        train_hsivi.main([*arguments, f"--num_layers={num_layers}", f"--init_from={run}", f"--output_dir={folder}"])
        pipeline, run = pipeline_of(folder), folder
        assert len(pipeline.scheduler.timesteps) == len(scale_of(run)) == num_layers
        assert pipeline(2, output_type="pt").images.isfinite().all()


def test_the_teacher_is_that_of_the_run_unless_another_is_named(runs, teacher, class_teacher, tmp_path):
    for given, wanted in ((None, str(teacher)), (str(class_teacher), str(class_teacher))):
        options = Options(*(group() for group in GROUPS))
        options.teacher.init_from, options.teacher.pretrained_teacher_model = str(runs("config")), given
        complete(options)
        assert options.teacher.pretrained_teacher_model == wanted


def test_layers_and_critic_start_where_the_run_ended(begin, runs, same_tensors):
    run = runs("config")
    networks = begin(run)
    for unet, name in ((networks.student, "pipeline/unet"), (networks.critic, "critic")):
        assert same_tensors(unet.state_dict(), load_file(run / name / "diffusion_pytorch_model.safetensors"))
    assert not same_tensors(networks.student.state_dict(), networks.teacher.state_dict())
    assert networks.noise_scale is None


@pytest.mark.parametrize("kind", ["config", "scalar", "per_layer", "per_pixel"])
def test_a_single_number_is_carried_to_every_kind(begin, runs, kind):
    number = scale_of(runs("scalar"))
    networks = begin(runs("scalar"), noise_scale_type=kind)
    if kind == "config":
        got = torch.tensor(networks.scheduler.config.noise_scale)
    elif kind == "per_pixel":
        got = networks.noise_scale().unique()
    else:
        got = torch.tensor(networks.noise_scale.tolist())
    torch.testing.assert_close(got, torch.full_like(got, number))


def test_the_numbers_of_the_layers_are_interpolated_in_log_scale_at_their_outputs(begin, runs):
    """Three layers end at 0, 147 and 293 of 440; two at 0 and 220."""
    run = runs("per_layer")
    before, scale = pipeline_of(run).scheduler.config.layer_timesteps, scale_of(run)
    *_, middle, low, zero = before
    assert (len(before), zero) == (4, 0)
    share = (220 - low) / (middle - low)
    wanted = [scale[0], math.exp((1 - share) * math.log(scale[1]) + share * math.log(scale[2]))]
    got = begin(run, noise_scale_type="per_layer").noise_scale.tolist()
    assert got == pytest.approx(wanted, rel=1e-5)
    assert begin(run).scheduler.config.noise_scale == pytest.approx(wanted, rel=1e-5)
    mean = math.sqrt(wanted[0] * wanted[1])
    assert begin(run, noise_scale_type="scalar").noise_scale.tolist() == pytest.approx(mean, rel=1e-5)


def test_the_numbers_of_the_layers_go_to_several_grids_as_their_mean_alone(begin, runs):
    """One layer ends at 0, two at 0 and 220."""
    several, single = {"num_layers": [1, 2]}, runs("per_layer")
    low, high = begin(single, noise_scale_type="per_layer").noise_scale.tolist()
    mean = (low * low * high) ** (1 / 3)
    assert begin(single, noise_scale_type="scalar", **several).noise_scale.tolist() == pytest.approx(mean, rel=1e-5)
    scale = begin(single, noise_scale_type="per_pixel", **several).noise_scale
    torch.testing.assert_close(scale(), torch.full((1, 1, 8, 8), mean))
    with pytest.raises(ValueError, match="one for all: pass --noise_scale_type scalar, which starts at their mean"):
        begin(single, **several)


@pytest.mark.parametrize("kind", ["config", "scalar", "per_layer", "per_pixel"])
def test_a_student_of_several_counts_and_one_of_a_single_start_from_each_other(begin, distil, runs, tmp_path, kind):
    number = scale_of(runs("scalar"))
    networks = begin(runs("scalar"), num_layers=[1, 2], noise_scale_type="config")
    assert networks.scheduler.config.noise_scale == number
    assert networks.scheduler.depths == [1, 2]
    options = {"noise_scale_type": "scalar", "noise_scale_learning_rate": 0.1, "max_train_steps": 8}
    run = distil(tmp_path / "run", num_layers=(1, 2), critic_updates=1, **options)
    networks, number = begin(run, num_layers=[3], noise_scale_type=kind), scale_of(run)
    assert number != 1
    scale = networks.scheduler.config.noise_scale if kind == "config" else networks.noise_scale.log_scale.exp()
    torch.testing.assert_close(torch.as_tensor(scale), torch.full_like(torch.as_tensor(scale), number))
    assert (kind == "per_layer") == (torch.as_tensor(scale).shape == (3,))


def test_the_pixels_are_carried_to_pixels_alone(begin, runs, same_tensors):
    run = runs("per_pixel")
    networks = begin(run, noise_scale_type="per_pixel")
    assert same_tensors(networks.noise_scale.state_dict(), scale_of(run).state_dict())
    for kind in ("config", "scalar", "per_layer"):
        with pytest.raises(ValueError, match="has a noise scale per pixel: pass --noise_scale_type per_pixel"):
            begin(run, noise_scale_type=kind)


def test_what_is_no_finished_run_is_refused(distil, runs, tmp_path):
    (tmp_path / "half" / "pipeline").mkdir(parents=True)
    with pytest.raises(ValueError, match="half lacks critic, options.json: give the folder of a finished run"):
        distil(tmp_path / "run", init_from=tmp_path / "half")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_teacher_is_refused(distil, class_run, tmp_path):
    with pytest.raises(ValueError, match="has networks of another shape than the teacher"):
        distil(tmp_path / "run", init_from=class_run)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_no_classes_for_a_run_of_classes_and_the_other_way_are_refused(
    distil, runs, class_run, class_teacher, tmp_path
):
    """Though the critic's labels may differ, of a student they may not."""
    for run, other in ((runs("config"), {"pretrained_teacher_model": class_teacher}), (class_run, {})):
        with pytest.raises(ValueError, match="has networks of another shape than the teacher: give a run of the same"):
            distil(tmp_path / "run", init_from=run, num_layers=(1, 2), **other)


def test_what_a_critic_was_told_of_the_layers_holds_for_the_same_grids_alone(begin, several_run, same_tensors):
    """Grids of 1, 2 and 4 layers from 440; others have as many layers."""
    saved = load_file(several_run / "critic" / "diffusion_pytorch_model.safetensors")
    name = "class_embedding.weight"
    rest = {key: value for key, value in saved.items() if key != name}
    assert saved[name].any()
    for layers, kept in (({}, True), ({"start_timestep": 500}, False), ({"start_spacing": 20}, False)):
        state = begin(several_run, num_layers=[1, 2, 4], **layers).critic.state_dict()
        assert torch.equal(state[name], saved[name] if kept else torch.zeros(7, saved[name].shape[1]))
        assert same_tensors({key: state[key] for key in rest}, rest)


def test_a_critic_of_classes_keeps_them_on_any_grid_and_is_told_layers_anew(begin, class_run, class_teacher):
    name = "class_embedding.weight"
    saved = load_file(class_run / "critic" / "diffusion_pytorch_model.safetensors")[name]
    for start in (440, 500):
        critic = begin(class_run, teacher=class_teacher, start_timestep=start).critic
        assert torch.equal(critic.state_dict()[name], saved)
    networks = begin(class_run, teacher=class_teacher, num_layers=[1, 2])
    own = networks.teacher.state_dict()[name]
    assert torch.equal(networks.critic.state_dict()[name], own.repeat_interleave(3, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_noise_scale_is_learned_and_saved_for_the_sampler(runs, kind):
    scale = scale_of(runs(kind))
    if kind == "per_pixel":
        assert isinstance(scale, HSIVINoiseScale)
        scale = scale().flatten().tolist()
        assert len(set(scale)) > 1
    values = scale if isinstance(scale, list) else [scale]
    assert len(values) == {"scalar": 1, "per_layer": 3, "per_pixel": 64}[kind]
    assert all(value != 1 for value in values)
    assert pipeline_of(runs(kind))(2, output_type="pt").images.isfinite().all()
    options = json.loads((runs(kind) / "options.json").read_text())
    assert options["noise_scale_type"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_noise_scale_has_a_learning_rate_of_its_own(distil, tmp_path, kind):
    options = {"noise_scale_type": kind, "noise_scale_learning_rate": 0, "max_train_steps": 3}
    scale = scale_of(distil(tmp_path / "run", critic_updates=1, **options))
    values = scale().unique().tolist() if kind == "per_pixel" else scale
    assert set(values if isinstance(values, list) else [values]) == {1.0}
