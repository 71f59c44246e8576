import contextlib
import copy
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler, load_teacher
from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation import networks, state, trainer, updates
from hsivi_diffusers.distillation.config import ALIASES, GONE, HSIVIConfig
from hsivi_diffusers.distillation.trainer import HSIVITrainer
from hsivi_diffusers.runs.output import read_progress, seal
from tiny_unet import make_unet

GRIDS = {"fast": [440, 220, 0], "paper": [800, 200, 0]}


def pipeline_weights(folder):
    """The tensors of all components of a saved pipeline."""
    files = sorted((folder / "pipeline").rglob("*.safetensors"))
    return {f"{path.parent.name}.{name}": tensor for path in files for name, tensor in load_file(path).items()}


def checkpoints(folder):
    return sorted(os.listdir(folder / "checkpoints"))


def contents(folder):
    """Every file under a folder, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def starts(monkeypatch):
    """Steps at which the loop was entered."""
    entered = []
    fit = updates.fit
    monkeypatch.setattr(
        updates, "fit", lambda *given, **named: entered.append(named["start_step"]) or fit(*given, **named)
    )
    return entered


@pytest.fixture
def interrupt(distil):
    """Runs up to 3 steps of 5, with one checkpoint, after the 2nd; then Ctrl-C."""

    def run(folder, **options):
        fit = updates.fit

        def stopping(*given, **named):
            for step in fit(*given, **named):
                if step.step == 3:
                    raise KeyboardInterrupt
                yield step

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(updates, "fit", stopping)
            with pytest.raises(KeyboardInterrupt):
                distil(folder, **options)
        assert checkpoints(folder) == ["checkpoint-2"]
        assert not (folder / "pipeline").exists()
        return folder

    return run


@pytest.fixture
def resume(distil):
    """Has a copy of a finished run continue from its last checkpoint but one."""

    def run(finished, folder, **options):
        shutil.copytree(finished, folder)
        shutil.rmtree(folder / "pipeline")
        shutil.rmtree(max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1])))
        return distil(folder, resume_from_checkpoint="latest", **options)

    return run


@pytest.fixture(scope="module")
def class_runs(distil, class_teacher, class_run, tmp_path_factory):
    """Runs of a class-conditional teacher, by preset."""
    options = {"preset": "paper", "max_train_steps": 3, "critic_updates": 1}
    folder = tmp_path_factory.mktemp("class_runs") / "paper"
    return {"fast": class_run, "paper": distil(folder, pretrained_teacher_model=class_teacher, **options)}


@pytest.fixture
def poison(monkeypatch):
    """Makes the teacher's score NaN from a call on; there is one call in each update of the layers."""

    def patch(first):
        calls = []
        score = state.TeacherBridge.score

        def poisoned(self, x, level, condition=None):
            calls.append(level)
            return score(self, x, level, condition) * (1 if len(calls) <= first else torch.nan)

        monkeypatch.setattr(state.TeacherBridge, "score", poisoned)

    return patch


# ----- what a run makes -----


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_preset_makes_a_pipeline_of_its_layers(request, preset):
    folder = request.getfixturevalue(f"{preset}_run")
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    settings = HSIVIConfig(preset=preset)
    assert pipeline.scheduler.config.layer_timesteps == GRIDS[preset]
    assert pipeline.scheduler.config.clip_sample is False
    assert (pipeline.unet_noise_scale is not None) == (settings.noise_scale_type == "per_pixel")

    called = []
    images = pipeline(
        3,
        torch.Generator().manual_seed(0),
        output_type="pt",
        callback_on_step_end=lambda _, step, timestep, tensors: called.append(timestep) or tensors,
    ).images
    assert called == GRIDS[preset][:-1]
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()
    assert images.std() > 0.05


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_options_json_records_the_preset_and_what_was_given(request, teacher, preset):
    options = json.loads((request.getfixturevalue(f"{preset}_run") / "options.json").read_text())
    given = {"num_inference_steps": [2], "critic_updates": 2, "max_train_steps": 5, "train_batch_size": 4}
    given |= {"checkpointing_steps": 2, "validation_steps": 0}
    config = HSIVIConfig(preset=preset, lr_warmup_steps=4, **given)
    assert options == {"pretrained_teacher_model": str(teacher), "revision": None, **config.record()}
    assert {**options, **given, "mixed_precision": "no"} == options
    assert not {"output_dir", "overwrite_output_dir"} & {*options}


def test_training_json_records_the_cost(fast_run):
    training = json.loads((fast_run / "training.json").read_text())
    assert training["processes"] == 1
    assert training["seconds"] > 0


def test_every_network_is_trained(paper_run, teacher):
    before = dict(load_teacher(str(teacher))[0].named_parameters())
    after = pipeline_weights(paper_run)
    assert all(not torch.equal(after[f"unet.{name}"], tensor) for name, tensor in before.items())
    assert (after["unet_noise_scale.log_scale"] != 0).all()
    layers, critic = (
        load_file(paper_run / "checkpoints" / "checkpoint-5" / name)
        for name in ("layers.safetensors", "critic.safetensors")
    )
    assert all(not torch.equal(critic[f"unet.{name}"], tensor) for name, tensor in before.items())
    assert not torch.equal(critic["unet.conv_in.weight"], layers["unet.conv_in.weight"])


def test_the_averaged_student_is_saved(distil, tmp_path):
    """The first update sets the average, the others enter it with 1 - decay."""
    options = {"max_train_steps": 3, "critic_updates": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 3}
    folder = distil(tmp_path / "run", ema_decay=0.15, **options)
    path, *others = (folder / "checkpoints" / f"checkpoint-{step}" / "layers.safetensors" for step in range(1, 4))
    averaged = load_file(path)
    for path in others:
        averaged = {name: averaged[name].lerp(tensor, 0.85) for name, tensor in load_file(path).items()}
    saved = pipeline_weights(folder)
    assert not torch.equal(saved["unet.conv_in.weight"], load_file(path)["unet.conv_in.weight"])
    for name, tensor in averaged.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6)


def test_a_run_is_a_function_of_its_seed_and_latest_starts_one(distil, fast_run, tmp_path, starts, same_tensors):
    again, other = (
        pipeline_weights(distil(tmp_path / str(seed), seed=seed, resume_from_checkpoint="latest")) for seed in (0, 1)
    )
    assert starts == [0, 0]
    assert same_tensors(again, pipeline_weights(fast_run))
    assert not same_tensors(other, pipeline_weights(fast_run))


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_class_conditional_teacher_trains(class_runs, class_teacher, preset):
    folder = class_runs[preset]
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    before = load_teacher(str(class_teacher))[0].class_embedding.weight
    assert pipeline.unet.class_embedding.weight.shape == (3, 32)
    assert not torch.equal(pipeline.unet.class_embedding.weight, before)

    def draw(label):
        return pipeline(1, torch.Generator().manual_seed(0), class_labels=[label], output_type="latent").images

    assert not torch.equal(draw(0), draw(2))
    if preset == "fast":
        chains = load_file(folder / "checkpoints" / "checkpoint-3" / "chains-0.safetensors")
        assert set(chains["condition"].tolist()) <= {0, 1, 2}
        assert len(chains["condition"]) == 2 * 4


def test_one_step_of_the_paper_is_a_single_layer(distil, tmp_path):
    """T = 1 is SIVI-SM."""
    folder = distil(tmp_path / "run", preset="paper", num_inference_steps=1, max_train_steps=1)
    assert HSIVIPipeline.from_pretrained(folder / "pipeline").scheduler.config.layer_timesteps == [800, 0]


def test_ddim_layers_may_be_scored_at_random_levels(distil, paper_run, tmp_path, same_tensors):
    random = pipeline_weights(distil(tmp_path / "run", preset="paper", scoring="random"))
    assert all(tensor.isfinite().all() for tensor in random.values())
    assert not same_tensors(random, pipeline_weights(paper_run))


def test_the_layers_clamp_nothing_whatever_the_teacher_does(teacher, tmp_path):
    scheduler = DDPMScheduler(clip_sample=True, thresholding=True)
    DDPMPipeline(unet=load_teacher(str(teacher))[0], scheduler=scheduler).save_pretrained(tmp_path)
    _, schedule = load_teacher(str(tmp_path))
    config = networks.make_scheduler(schedule, HSIVIConfig(), (1, 8, 8)).config
    assert (config.clip_sample, config.thresholding) == (False, False)


def test_the_chain_starts_at_a_signal_unless_a_timestep_is_given():
    def start(side, channels=1, **settings):
        config = HSIVIConfig(num_inference_steps=2, **settings)
        return networks.make_scheduler(HSIVIScheduler(), config, (channels, side, side)).config.layer_timesteps[0]

    assert start(8, preset="paper") == 800  # the quadratic spacing's own
    assert [start(side) for side in (8, 16, 32)] == [440, 566, 674]
    assert [start(side, channels=3) for side in (32, 64)] == [750, 836]
    assert start(32, start_timestep=500) == 500


@pytest.mark.parametrize(("side", "highest"), [(8, 800), (32, 956)])
def test_the_random_levels_end_at_a_signal(side, highest):
    unet = make_unet(sample_size=side)
    config = HSIVIConfig(num_inference_steps=2, train_batch_size=1)
    made = networks.make_networks((unet, copy.deepcopy(unet), copy.deepcopy(unet)), HSIVIScheduler(), config)
    assert state.TrainingState(made, config, Accelerator(cpu=True)).bridge.level_range == (5, highest)


def test_the_weights_of_the_losses(teacher):
    """In score units `unit` is sigma^2, `sigma2` sigma^4."""
    unet, schedule = load_teacher(str(teacher))
    grid = HSIVIScheduler.from_config(schedule.config, layer_timesteps=[440, 220, 0])
    bridge = state.TeacherBridge(unet, grid)
    level = torch.tensor([0, 300, 800])
    variance = 1 - schedule.alphas_cumprod[level]
    for objective, kind in (("SM", updates.ScoreMatching), ("KL", updates.KullbackLeibler)):
        for weight, wanted in (("unit", variance), ("sigma2", variance**2)):
            config = HSIVIConfig(preset="fast", objective=objective, loss_weight=weight)
            made = updates.make_objective(config, bridge)
            assert type(made) is kind
            torch.testing.assert_close(made.level_weight(level), wanted)


# ----- one student, several step counts -----


def draw(pipeline, steps):
    return pipeline(3, torch.Generator().manual_seed(0), steps, output_type="pt", return_dict=False)[0]


def test_one_student_is_trained_for_several_counts(several_run, fast_run, teacher):
    pipeline = HSIVIPipeline.from_pretrained(several_run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    grids = [[440, 0], [440, 220, 0], [440, 330, 220, 110, 0]]
    assert pipeline.scheduler.config.layer_timesteps == grids
    assert json.loads((several_run / "options.json").read_text())["num_inference_steps"] == [1, 2, 4]
    images = {count: draw(pipeline, count) for count in (1, 2, 4)}
    assert pipeline.num_timesteps == 4
    for drawn in images.values():
        assert drawn.isfinite().all()
        assert drawn.std() > 0.05
    assert not torch.equal(images[1], images[2])
    assert torch.equal(draw(pipeline, None), images[4])
    with pytest.raises(ValueError, match="num_inference_steps=3, .* pass num_inference_steps=1, 2 or 4"):
        draw(pipeline, 3)
    before = dict(load_teacher(str(teacher))[0].named_parameters())
    after = pipeline_weights(several_run)
    assert all(not torch.equal(after[f"unet.{name}"], tensor) for name, tensor in before.items())
    chains = load_file(several_run / "checkpoints" / "checkpoint-5" / "chains-0.safetensors")
    assert len(chains["t"]) == 4 * 4
    hierarchies = torch.bucketize(chains["t"], torch.tensor([0, 2, 6])).bincount().tolist()
    assert hierarchies == [6, 5, 5]


def test_a_run_of_several_counts_resumes_to_the_same_bits(resume, several_run, tmp_path, differences):
    folder = resume(several_run, tmp_path / "run", preset="fast", num_inference_steps=(2, 4, 1))
    assert differences(folder, several_run) == []


def test_a_paper_run_of_several_counts_resumes_to_the_same_bits(distil, resume, tmp_path, differences):
    options = {"preset": "paper", "num_inference_steps": (1, 2), "max_train_steps": 3, "critic_updates": 1}
    at_once = distil(tmp_path / "at_once", **options)
    assert differences(resume(at_once, tmp_path / "run", **options), at_once) == []


def test_a_run_of_several_counts_is_not_one_of_a_single_count(distil, several_run, tmp_path):
    folder = shutil.copytree(several_run, tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"other options \(num_inference_steps: \[1, 2, 4\] -> \[4\]\): resume with the same"
    ):
        distil(folder, num_inference_steps=4, resume_from_checkpoint="latest")


def test_a_run_that_recorded_old_names_and_a_plain_number_of_steps_resumes(
    distil, fast_run, tmp_path, starts, same_tensors
):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    options = json.loads((folder / "options.json").read_text())
    old = {name: options.pop(new) for name, new in ALIASES.items()}
    assert old["num_layers"] == [2]
    del options["adam_beta1"]  # was not there yet
    (folder / "options.json").write_text(json.dumps({**options, **old, "num_layers": 2, "alpha": 0.5}))
    distil(folder, resume_from_checkpoint="latest")
    assert starts == [5]
    assert same_tensors(pipeline_weights(folder), pipeline_weights(fast_run))


def record(folder, **settings):
    """Writes settings into what a run and its last checkpoint record."""
    options = json.loads((folder / "options.json").read_text())
    (folder / "options.json").write_text(json.dumps({**options, **settings}))
    checkpoint = folder / "checkpoints" / "checkpoint-5"
    progress = read_progress(checkpoint)
    progress["identity"] |= settings
    del progress["sha256"]
    (checkpoint / "progress.json").write_text(json.dumps(seal(checkpoint, progress)))


def test_a_run_that_recorded_options_that_are_gone_resumes_if_they_had_their_defaults(
    distil, fast_run, tmp_path, starts, same_tensors
):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    record(folder, **GONE)
    distil(folder, resume_from_checkpoint="latest")
    assert starts == [5]
    assert same_tensors(pipeline_weights(folder), pipeline_weights(fast_run))
    assert not GONE.keys() & json.loads((folder / "options.json").read_text()).keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel", "renoise"),
        ("level_power", 2.0),
        ("teacher_share", 0.5),
        ("train_data", "digits"),
        ("adversarial_weight", 0.001),
        ("prediction_type", "v_prediction"),
    ],
)
def test_a_run_that_needs_an_option_that_is_gone_is_refused(distil, fast_run, tmp_path, starts, name, value):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    record(folder, **{name: value})
    before = contents(folder)
    message = f"the run was trained with {name}={value!r}, and the option was removed: finish it with the version"
    for checkpoint in ("latest", folder / "checkpoints" / "checkpoint-5"):
        with pytest.raises(ValueError, match=message) as refused:
            distil(folder, resume_from_checkpoint=checkpoint)
        assert "\n" not in str(refused.value)
    assert starts == []
    assert contents(folder) == before


def test_no_count_is_refused():
    with pytest.raises(ValueError, match=r"num_inference_steps=\[\]: give one number of steps of at least 1"):
        HSIVIConfig(num_inference_steps=[]).check()


# ----- the trainer in Python -----


def test_a_loaded_pipeline_is_distilled_and_callbacks_see_each_update(teacher, tmp_path, fast_run, same_tensors):
    pipeline, seen = DDPMPipeline.from_pretrained(teacher), []
    settings = json.loads((fast_run / "options.json").read_text())
    given = {each: settings[each] for each in ("num_inference_steps", "train_batch_size", "critic_updates")}
    config = HSIVIConfig(
        **given, max_train_steps=5, lr_warmup_steps=4, validation_steps=0, output_dir=str(tmp_path / "run")
    )

    def callback(trainer, step):
        seen.append(step.step)
        return {"metric": 1.0} if step.step == 2 else None

    trainer = HSIVITrainer(pipeline, config, callbacks=[callback])
    summary = trainer.train()
    assert seen == [0, 1, 2, 3, 4]
    assert summary == json.loads((tmp_path / "run" / "training.json").read_text())
    assert json.loads((tmp_path / "run" / "options.json").read_text())["pretrained_teacher_model"] is None
    assert same_tensors(pipeline_weights(tmp_path / "run"), pipeline_weights(fast_run))
    trainer.pipeline.save_pretrained(tmp_path / "saved" / "pipeline")
    assert same_tensors(pipeline_weights(tmp_path / "saved"), pipeline_weights(fast_run))


# ----- going on -----


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_resumed_run_equals_one_at_once(request, interrupt, distil, tmp_path, starts, same_tensors, preset):
    at_once = request.getfixturevalue(f"{preset}_run")
    starts.clear()
    folder = interrupt(tmp_path / "run", preset=preset)
    distil(folder, preset=preset, resume_from_checkpoint="latest")
    assert starts == [0, 2]
    assert same_tensors(pipeline_weights(folder), pipeline_weights(at_once))
    for name in ("layers.safetensors", "critic.safetensors", "chains-0.safetensors"):
        last = [load_file(run / "checkpoints" / "checkpoint-5" / name) for run in (folder, at_once)]
        assert same_tensors(*last)


def test_a_class_conditional_run_resumes(resume, class_run, class_teacher, tmp_path, differences):
    folder = resume(class_run, tmp_path / "run", pretrained_teacher_model=class_teacher, max_train_steps=3)
    assert differences(folder, class_run) == []


def test_a_checkpoint_is_resumed_by_its_path(distil, fast_run, tmp_path, starts, same_tensors):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    (folder / "training.json").unlink()
    distil(folder, resume_from_checkpoint=folder / "checkpoints" / "checkpoint-4")
    assert starts == [4]
    assert same_tensors(pipeline_weights(folder), pipeline_weights(fast_run))
    assert (folder / "training.json").is_file()


def test_a_finished_run_resumes_to_itself(distil, fast_run, tmp_path, starts, same_tensors, capsys):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    shutil.rmtree(folder / "pipeline")
    distil(folder, resume_from_checkpoint="latest")
    assert starts == [5]
    assert "nothing is left to do, the run had 5 updates" in capsys.readouterr().out
    assert same_tensors(pipeline_weights(folder), pipeline_weights(fast_run))


def test_incomplete_checkpoints_are_ignored(interrupt, distil, fast_run, tmp_path, starts, same_tensors):
    folder = interrupt(tmp_path / "run")
    complete = folder / "checkpoints" / "checkpoint-2"
    shutil.copytree(complete, folder / "checkpoints" / "partial-4")
    shutil.copytree(complete, folder / "checkpoints" / "checkpoint-3.retired")
    shutil.copytree(complete, folder / "checkpoints" / "checkpoint-4")
    (folder / "checkpoints" / "checkpoint-4" / "progress.json").unlink()
    distil(folder, resume_from_checkpoint="latest")
    assert starts == [0, 2]
    assert same_tensors(pipeline_weights(folder), pipeline_weights(fast_run))


def test_a_checkpoint_that_is_cut_short_has_no_final_name(distil, tmp_path, monkeypatch):
    save_tensors = state.save_tensors

    def failing(tensors, path):
        if "partial-4" in str(path):
            raise OSError("no space left")
        save_tensors(tensors, path)

    monkeypatch.setattr(state, "save_tensors", failing)
    with pytest.raises(OSError, match="no space left"):
        distil(tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "partial-4"]


def test_checkpoints_are_pruned_to_the_limit_in_the_order_of_their_numbers(distil, fast_run, tmp_path):
    assert checkpoints(fast_run) == ["checkpoint-4", "checkpoint-5"]
    options = {"max_train_steps": 10, "critic_updates": 1, "num_inference_steps": 1, "num_pairs": 0}
    folder = distil(tmp_path / "run", checkpointing_steps=3, checkpoints_total_limit=3, **options)
    assert checkpoints(folder) == ["checkpoint-10", "checkpoint-6", "checkpoint-9"]
    assert json.loads((folder / "checkpoints" / "checkpoint-9" / "progress.json").read_text())["step"] == 9
    with pytest.raises(ValueError, match="checkpoint-7 holds no checkpoint"):
        distil(folder, resume_from_checkpoint=folder / "checkpoints" / "checkpoint-7", **options)


def test_resuming_with_other_options_is_refused_and_names_them(distil, fast_run, tmp_path):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    before = contents(folder)
    changed = r"other options \(max_train_steps: 5 -> 6; learning_rate: 0.0001 -> 0.1\): resume with the same"
    with pytest.raises(ValueError, match=changed):
        distil(folder, learning_rate=0.1, max_train_steps=6, resume_from_checkpoint="latest")
    assert contents(folder) == before


def test_what_only_concerns_saving_may_change_on_resuming(distil, fast_run, tmp_path):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    distil(folder, checkpointing_steps=7, checkpoints_total_limit=1, resume_from_checkpoint="latest")


def test_resuming_never_removes_checkpoints(distil, fast_run, tmp_path, starts):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    (folder / "options.json").unlink()
    distil(folder, resume_from_checkpoint="latest")
    assert starts == [5]
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-5"]


def test_a_filled_output_folder_is_refused_before_the_teacher_is_loaded_and_left_as_it_is(
    distil, fast_run, monkeypatch
):
    monkeypatch.setattr(trainer, "load_parts", lambda *given: pytest.fail("the teacher was loaded"))
    before = contents(fast_run)
    with pytest.raises(ValueError, match="is not empty.*--resume_from_checkpoint latest"):
        distil(fast_run)
    assert contents(fast_run) == before


def test_overwriting_starts_over(distil, fast_run, paper_run, tmp_path, starts, differences):
    folder = shutil.copytree(paper_run, tmp_path / "run")
    distil(folder, "--overwrite_output_dir", preset="fast")
    assert starts == [0]
    assert json.loads((folder / "options.json").read_text())["preset"] == "fast"
    assert differences(folder, fast_run) == []


# ----- divergence -----


def test_a_nan_ends_the_run_with_the_step_and_the_last_good_checkpoint(
    distil, fast_run, tmp_path, poison, monkeypatch, same_tensors
):
    folder = tmp_path / "run"
    poison(first=3)
    with pytest.raises(SystemExit) as exit:
        distil(folder)
    message, kept = str(exit.value.code), folder / "checkpoints" / "checkpoint-2"
    assert "the loss of the layers is not finite at step 3" in message
    assert message.endswith(f"the last good checkpoint is {kept}")
    assert checkpoints(folder) == ["checkpoint-2"]
    assert not (folder / "pipeline").exists()

    monkeypatch.undo()
    distil(folder, resume_from_checkpoint=kept)
    assert same_tensors(pipeline_weights(folder), pipeline_weights(fast_run))


def test_a_nan_before_any_checkpoint_says_so(distil, tmp_path, poison):
    poison(first=1)
    with pytest.raises(SystemExit, match="not finite at step 1.*there was no checkpoint yet"):
        distil(tmp_path / "run", preset="paper")


@pytest.mark.parametrize("network", ["layers", "critic"])
def test_weights_that_are_not_finite_are_never_saved(distil, tmp_path, monkeypatch, network):
    fit = updates.fit

    def poisoned(layers, critic, *given, **named):
        for step in fit(layers, critic, *given, **named):
            if step.step == 3:
                unet = {"layers": layers, "critic": critic}[network].unet
                torch.nn.init.constant_(unet.conv_out.bias, torch.inf)
            yield step

    monkeypatch.setattr(updates, "fit", poisoned)
    with pytest.raises(SystemExit) as exit:
        distil(tmp_path / "run")
    assert re.search("a weight of the .* not finite at step 3", exit.value.code)
    assert exit.value.code.endswith(f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'checkpoint-2'}")
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]


# ----- refusals before long work -----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained_teacher_model": ""}, "--pretrained_teacher_model is missing"),
        ({"pretrained_teacher_model": "./nowhere"}, "teacher './nowhere' is not a folder"),
        ({"num_inference_steps": 0}, r"num_inference_steps=\[0\]: give one number of steps of at least 1"),
        ({"num_inference_steps": 1001}, "1001 steps"),
        ({"num_inference_steps": (2, 0)}, r"num_inference_steps=\[0, 2\]: give one number of steps of at least 1"),
        ({"num_inference_steps": (1, 1001)}, "1001 steps"),
        (
            {"num_inference_steps": (2, 4, 2)},
            r"=\[2, 2, 4\]: .*several that differ, such as 1 2 4 8",
        ),
        ({"num_inference_steps": (1, 4), "start_timestep": 3}, "start=3: give a timestep from 4"),
        ({"max_train_steps": 0}, "max_train_steps=0: give a number of at least 1"),
        ({"train_batch_size": 0}, "train_batch_size=0"),
        ({"critic_updates": 0}, "critic_updates=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"checkpointing_steps": 0}, "checkpointing_steps=0"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit=0"),
        ({"validation_steps": -1}, "validation_steps=-1: give a number of at least 1, or 0 for no images"),
        ({"max_grad_norm": 0}, "max_grad_norm=0.0: give a number above 0, or leave it out"),
        ({"preset": "paper", "noise_eta": 0}, "noise_eta=0, and outputs without noise have no score"),
        ({"preset": "paper", "noise_eta": 1.5}, "noise_eta=1.5"),
        ({"start_timestep": 1000}, "start=1000: give a timestep from 2 .* to 999"),
        ({"start_timestep": 1}, "start=1: give a timestep from 2"),
        ({"start_signal": 0}, "start_signal=0.0: give a number above 0, or leave it out"),
        ({"level_min": 900}, r"level_range=\(900, 800\)"),
        ({"preset": "paper", "level_min": 20}, "level_min=20 has no effect with scoring='own'"),
        ({"start_spacing": 20}, "start_spacing=20 has no effect with one step count, 2: give several"),
        ({"preset": "paper", "start_spacing": 20}, "start_spacing=20 needs start_timestep, start_signal or"),
        ({"objective": "SM"}, "scoring='between' with objective='SM': .* set objective to 'KL', or scoring to 'random"),
    ],
)
def test_what_cannot_run_is_refused_before_work(distil, tmp_path, starts, options, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", **options)
    assert starts == []
    assert not (tmp_path / "run").exists()


def test_a_damaged_teacher_is_refused_before_work(distil, teacher, tmp_path, starts):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="teacher .* cannot be loaded .*give a folder or repo id"):
        distil(tmp_path / "run", pretrained_teacher_model=folder)
    assert starts == []
    assert not (tmp_path / "run").exists()


def test_a_missing_output_folder_is_refused(teacher, starts):
    with pytest.raises(ValueError, match="--output_dir is missing"):
        cli.distil([f"--pretrained_teacher_model={teacher}"])
    assert starts == []


def test_help(check_help):
    check_help(cli.distil, "teacher and checkpoints", "distillation", "hub")


# ----- nothing is lost -----


def test_resuming_into_a_folder_that_is_no_run_is_refused_and_leaves_it(distil, tmp_path):
    (tmp_path / "mine" / "pipeline").mkdir(parents=True)
    (tmp_path / "mine" / "pipeline" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        distil(tmp_path / "mine", resume_from_checkpoint="latest")
    assert contents(tmp_path / "mine") == {Path("pipeline/notes.txt"): b"precious"}


def test_a_checkpoint_of_a_run_with_other_options_is_refused(distil, fast_run, tmp_path, starts):
    with pytest.raises(ValueError, match=r"holds a run with other options \(learning_rate"):
        distil(
            tmp_path / "other",
            learning_rate=0.1,
            resume_from_checkpoint=fast_run / "checkpoints" / "checkpoint-5",
        )
    assert starts == []


def test_a_run_does_not_both_start_over_and_go_on(distil, fast_run, tmp_path):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    before = contents(folder)
    with pytest.raises(ValueError, match="starts over and --resume_from_checkpoint latest continues: pass one"):
        distil(folder, "--overwrite_output_dir=true", resume_from_checkpoint="latest")
    assert contents(folder) == before


def test_gradients_that_always_overflow_end_the_run(distil, tmp_path, monkeypatch):
    """As under fp16, where a step with an overflow is skipped."""
    from accelerate.optimizer import AcceleratedOptimizer

    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda _: True))
    monkeypatch.setattr(updates, "MAX_OVERFLOWS", 4)
    with pytest.raises(SystemExit, match="the gradient is not finite at step 3.*good checkpoint is .*checkpoint-2"):
        distil(tmp_path / "run")


@pytest.mark.parametrize("error", [None, trainer.InterruptedRunError("stopped"), RuntimeError("out of memory")])
def test_trackers_get_the_options_and_are_ended(distil, tmp_path, monkeypatch, error):
    from accelerate.tracking import TensorBoardTracker

    ended, finish = [], TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: finish(self) or ended.append(self))
    if error is not None:
        monkeypatch.setattr(HSIVITrainer, "_run", mock.Mock(side_effect=error))
    with contextlib.nullcontext() if error is None else pytest.raises((SystemExit, RuntimeError)):
        distil(tmp_path / "run", report_to="tensorboard", max_train_steps=1, critic_updates=1)
    assert len(ended) == 1
    (record,) = (tmp_path / "run" / "logs" / "hsivi").glob("*/hparams.yml")
    options = yaml.safe_load(record.read_text())
    assert (options["learning_rate"], options["num_inference_steps"], options["max_grad_norm"]) == (1e-4, "[2]", None)
    assert options["pretrained_teacher_model"]
