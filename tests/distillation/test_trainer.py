"""Whole runs: what they make, how they are stopped and resumed, in one process and in several."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import threading
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from tqdm import tqdm

from hsivi_diffusers import HSIVIConfig, HSIVIPipeline, HSIVITrainer, load_teacher
from hsivi_diffusers.distillation import state, trainer, updates
from hsivi_diffusers.distillation.config import removed
from hsivi_diffusers.distillation.trainer import InterruptedRunError, make_accelerator
from hsivi_diffusers.runs.output import finished, read_progress, seal
from hsivi_diffusers.runs.page import read_log
from hsivi_diffusers.runs.state_dicts import load_state_dict, save_state_dict
from hsivi_diffusers.vi import KullbackLeibler, Regression, ScoreMatching
from short_run import SETTINGS, contents, pipeline_of
from slow import others_slow
from tiny_text import PROMPTS
from tiny_unet import make_unet

GRIDS = {"fast": [440, 220, 0], "paper": [800, 200, 0]}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ONE = {"preset": "one_call", "num_inference_steps": 1, "num_pairs": 12, "critic_first": 1}
SHORT = {"max_train_steps": 2, "critic_updates": 1, "lr_warmup_steps": 0}


def make(teacher, folder=None, callbacks=(), objective=None, **settings):
    config = HSIVIConfig(**{**SETTINGS, **settings}, output_dir=folder)
    return HSIVITrainer(teacher, config, callbacks=callbacks, objective=objective)


def checkpoints(folder):
    return sorted(os.listdir(folder / "checkpoints"))


def last_checkpoint(folder):
    return finished(folder)[-1]


@pytest.fixture
def starts(monkeypatch):
    """Steps at which the loop was entered, None for that of the fit to pairs."""
    entered, fit = [], updates.fit
    monkeypatch.setattr(
        updates, "fit", lambda *given, **named: entered.append(named.get("start_step")) or fit(*given, **named)
    )
    return entered


def interrupt(distil, folder, **options):
    """Runs up to 3 steps of 5, with one checkpoint, after the 2nd; then an error that nobody expects."""
    run_updates = trainer.run_updates

    def stopping(*given):
        for step in run_updates(*given):
            if step.step == 3:
                raise KeyboardInterrupt
            yield step

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "run_updates", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil(folder, **options)
    assert checkpoints(folder) == ["checkpoint-2"]
    assert not (folder / "pipeline").exists()


# ----- what a run makes -----


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_run_makes_a_pipeline_of_its_layers_and_records_its_options(request, teacher, preset):
    folder = request.getfixturevalue(f"{preset}_run")
    pipeline = pipeline_of(folder)
    config = HSIVIConfig(preset=preset, **SETTINGS)
    options = json.loads((folder / "options.json").read_text())
    assert options == {"pretrained_teacher_model": str(teacher), "revision": None, **config.record()}
    assert not {"output_dir", "overwrite_output_dir", "_filled"} & {*options}
    assert pipeline.scheduler.config.layer_timesteps == GRIDS[preset]
    assert pipeline.scheduler.config.clip_sample is False
    assert (pipeline.unet_noise_scale is not None) == (config.noise_scale_type == "per_pixel")

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


def test_a_run_records_the_published_weights_that_it_or_the_run_before_it_started_from(fast_run, tmp_path):
    (tmp_path / "lora.safetensors").touch()
    for source in ("ORG/REPO", "ORG/REPO/lora.safetensors"):
        assert trainer.published_start(source) == source
    assert trainer.published_start(str(tmp_path / "lora.safetensors")) is None
    run = shutil.copytree(fast_run, tmp_path / "run")
    assert trainer.published_start(str(run)) is None
    training = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps({**training, "start": "ORG/REPO"}))
    assert trainer.published_start(str(run)) == "ORG/REPO"


def test_every_network_is_trained(paper_run, teacher):
    before = load_teacher(teacher).network.state_dict()
    student, critic = (load_file(paper_run / name) for name in (f"pipeline/{WEIGHTS}", f"critic/{Path(WEIGHTS).name}"))
    scale = load_file(next((paper_run / "pipeline" / "unet_noise_scale").glob("*.safetensors")))
    for after in (student, critic):
        assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not torch.equal(critic["conv_in.weight"], student["conv_in.weight"])
    assert (scale["log_scale"] != 0).all()


def test_another_seed_makes_another_run_and_latest_starts_one(distil, fast_run, tmp_path, starts, differences):
    other = distil(tmp_path / "other", seed=1, resume_from_checkpoint="latest")
    assert starts == [0]
    assert f"pipeline/{WEIGHTS}" in differences(other, fast_run)


def test_a_class_conditional_teacher_trains(class_run, class_teacher):
    pipeline = pipeline_of(class_run)
    before = load_teacher(class_teacher).network.class_embedding.weight
    assert not torch.equal(pipeline.unet.class_embedding.weight, before)
    images = [
        pipeline(1, torch.Generator().manual_seed(0), class_labels=[label], output_type="latent").images
        for label in (0, 2)
    ]
    assert not torch.equal(*images)
    chains = load_file(last_checkpoint(class_run) / "chains-0.safetensors")
    assert set(chains["condition"].tolist()) <= {0, 1, 2}
    assert len(chains["condition"]) == 2 * 4


def test_one_student_is_trained_for_several_step_counts(several_run):
    pipeline = pipeline_of(several_run)
    assert pipeline.scheduler.config.layer_timesteps == [[440, 0], [460, 230, 0], [480, 360, 240, 120, 0]]
    assert json.loads((several_run / "options.json").read_text())["num_inference_steps"] == [1, 2, 4]

    def draw(steps):
        return pipeline(3, torch.Generator().manual_seed(0), steps, output_type="pt", return_dict=False)[0]

    images = {count: draw(count) for count in (1, 2, 4)}
    assert all(drawn.isfinite().all() and drawn.std() > 0.05 for drawn in images.values())
    assert not torch.equal(images[1], images[2])
    assert torch.equal(draw(None), images[4])
    with pytest.raises(ValueError, match="num_inference_steps=3, .* pass num_inference_steps=1, 2 or 4"):
        draw(3)
    chains = load_file(last_checkpoint(several_run) / "chains-0.safetensors")
    assert torch.bucketize(chains["t"], torch.tensor([0, 2, 6])).bincount().tolist() == [6, 5, 5]


@pytest.fixture(scope="module")
def one_run(distil, tmp_path_factory):
    return distil(tmp_path_factory.mktemp("runs") / "one", **ONE)


def test_a_run_counts_the_calls_of_its_pairs_and_makes_a_pipeline_of_one_call(distil, one_run, tmp_path):
    run = shutil.copytree(one_run, tmp_path / "run")
    calls = json.loads((run / "training.json").read_text())["network_calls"]
    # 12 pairs of 15 calls, 3 updates of 4 rows, and 5 of the layers, with 2 of the critic, which share an answer.
    assert calls == 12 * 15 + 3 * 4 + 5 * 4 * (1 + 1 + 1 + 2)
    pipeline = pipeline_of(run)
    assert pipeline.scheduler.config.layer_timesteps == [440, 0]
    assert not (run / "pairs").exists()  # of no use to a run that has ended
    distil(run, resume_from_checkpoint="latest", **ONE)
    assert not (run / "pairs").exists()


def test_a_run_without_fine_noise_shows_and_makes_images_of_the_rest(teacher, tmp_path):
    settings = {**ONE, **SHORT, "critic_first": 0, "noise_cutoff": 2.0, "validation_steps": 1}
    make(load_teacher(str(teacher)), str(tmp_path), **settings).train()
    assert {"step-0.png", "step-1.png", "step-2.png"} <= {*os.listdir(tmp_path / "samples")}
    pipeline = pipeline_of(tmp_path)
    assert pipeline.scheduler.config.noise_cutoff == 2
    assert pipeline(3, output_type="pt").images.isfinite().all()


def test_activations_computed_twice_give_the_same_weights(distil, paper_run, tmp_path, differences):
    assert differences(distil(tmp_path / "run", preset="paper", gradient_checkpointing=True), paper_run) == []


# ----- from Python -----


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """A finished run whose teacher is a loaded pipeline: trainer, teacher, what its callback saw and trackers got."""
    pipeline, seen, logged, bars = DDPMPipeline.from_pretrained(teacher), [], {}, []

    def watch(trainer, step):
        seen.append((trainer, step.step, float(step.layers.loss.mean())))
        return {"halves": step.step / 2} if step.step % 2 else None

    made = make(pipeline, tmp_path_factory.mktemp("runs") / "python", [watch])
    made.accelerator.log = lambda numbers, step: logged.update({step: numbers})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tqdm, "set_postfix", lambda bar, shown, **options: bars.append(shown))
        summary = made.train()
    found = {"trainer": made, "teacher": pipeline, "seen": seen, "logged": logged, "bars": bars, "summary": summary}
    return {**found, "folder": Path(made.config.output_dir)}


def test_a_run_from_python_has_the_bits_of_the_command(run, fast_run, differences):
    assert differences(run["folder"], fast_run) == []
    assert run["summary"] == json.loads((run["folder"] / "training.json").read_text())
    assert run["summary"]["processes"] == 1
    assert run["summary"]["seconds"] > 0
    assert run["summary"]["network_calls"] > 0
    assert 100 < run["summary"]["peak_memory_mib"] < 32_000
    assert json.loads((run["folder"] / "options.json").read_text())["pretrained_teacher_model"] is None


def test_a_run_of_a_loaded_teacher_is_not_resumed_by_a_name(run, distil, tmp_path):
    folder = shutil.copytree(run["folder"], tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run whose teacher was loaded in Python: resume it there, with that"):
        distil(folder, resume_from_checkpoint="latest")


def test_a_loaded_teacher_stays_as_it_was(run, teacher, same_tensors):
    before = DDPMPipeline.from_pretrained(teacher)
    assert same_tensors(run["teacher"].unet.state_dict(), before.unet.state_dict())
    assert all(parameter.requires_grad for parameter in run["teacher"].unet.parameters())
    assert run["teacher"].scheduler.config == before.scheduler.config


def test_callbacks_see_each_step_and_their_numbers_are_shown(run):
    assert [(made is run["trainer"], step) for made, step, _ in run["seen"]] == [(True, step) for step in range(5)]
    assert {step: numbers.get("halves") for step, numbers in run["logged"].items()} == {2: 0.5, 4: 1.5, 5: None}
    for step, numbers in run["logged"].items():
        assert numbers["loss/student"] == pytest.approx(run["seen"][step - 1][2])
    assert [bar.get("halves") for bar in run["bars"]] == ["0.5", "1.5", None]


def test_the_pipeline_of_the_trainer_is_a_copy_of_the_one_it_saved(run, tmp_path):
    images = run["trainer"].pipeline(batch_size=2, generator=torch.Generator().manual_seed(3)).images
    saved = HSIVIPipeline.from_pretrained(run["folder"] / "pipeline")
    for image, wanted in zip(images, saved(2, torch.Generator().manual_seed(3)).images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(wanted))
    with torch.no_grad():
        run["trainer"].pipeline.unet.conv_in.weight.zero_()
    run["trainer"].pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (run["folder"] / "pipeline" / WEIGHTS).read_bytes()


def test_the_student_is_pushed_with_its_card(run, logged_in):
    url = run["trainer"].push_to_hub("alice/python", license="mit")
    head = logged_in.repos["alice/python"].branches["main"]
    assert url == f"{logged_in.url}/alice/python/commit/{head.sha}"
    assert head.files[WEIGHTS] == (run["folder"] / "pipeline" / WEIGHTS).read_bytes()
    card = head.files["README.md"].decode()
    assert "preset fast" in card
    assert "license: mit" in card
    with pytest.raises(HfHubHTTPError, match="alice/python exists and holds files"):
        run["trainer"].push_to_hub("alice/python")


def test_the_config_of_the_user_is_not_changed_and_only_training_needs_a_folder(teacher):
    config = HSIVIConfig(**SETTINGS)
    made = HSIVITrainer(teacher, config)
    made.config.max_train_steps = 7
    assert config == HSIVIConfig(**SETTINGS)
    assert len(made.pipeline(batch_size=1).images) == 1
    with pytest.raises(ValueError, match="output_dir is missing"):
        made.train()


def test_a_run_in_a_thread_has_the_same_bits(teacher, tmp_path, fast_run, differences):
    """There are no signals there."""
    thread = threading.Thread(target=make(teacher, tmp_path / "run").train)
    thread.start()
    thread.join()
    assert differences(tmp_path / "run", fast_run) == []


def test_a_run_with_an_objective_of_the_user_is_resumed_with_it(teacher, tmp_path, fast_run, differences):
    objective = KullbackLeibler(lambda level: torch.full(level.shape, 1e-3))
    make(teacher, tmp_path / "whole", objective=objective).train()
    assert f"pipeline/{WEIGHTS}" in differences(tmp_path / "whole", fast_run)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "checkpoint-5")
    with pytest.raises(ValueError, match=r"other options \(custom_objective: KullbackLeibler -> None\)"):
        make(teacher, run).train("latest")
    make(teacher, run, objective=objective).train("latest")
    assert differences(run, tmp_path / "whole") == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": {"num_inference_steps": 2}}, r"config is a dict: give an HSIVIConfig\("),
        ({"callbacks": print}, "callbacks=.*: give a list of functions"),
        ({"callbacks": ["hi"]}, "callbacks=.*: give a list of functions"),
        ({"objective": "KL"}, "objective='KL': give a vi.CriticObjective"),
        ({"objective": Regression()}, "objective=<.*>: give a vi.CriticObjective"),
        ({"objective": ScoreMatching()}, "which scoring='between' and noise_eta=0 exclude"),
        ({"teacher": "/nowhere/at/all"}, "'/nowhere/at/all' is no folder here: give"),
        ({"teacher": Path("/nowhere/at/all")}, "'/nowhere/at/all' is no folder here: give"),
        ({"teacher": torch.nn.Linear(1, 1)}, "teacher is a Linear: give a folder, a repo id, or a loaded pipeline"),
        (
            {"teacher": "/nowhere/at/all", "config": HSIVIConfig(init_from="nowhere")},
            "init_from='nowhere' cannot be read .*: give the folder of a finished run",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(teacher, given, message):
    with pytest.raises(ValueError, match=message) as refused:
        HSIVITrainer(**{"teacher": teacher, **given})
    assert "\n" not in str(refused.value)


def test_a_student_is_no_teacher(run):
    with pytest.raises(ValueError, match="is an HSIVIPipeline, a sampler that was distilled"):
        make(run["trainer"].pipeline)


def test_a_callback_that_returns_no_numbers_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="a callback returned 'hi': return a dictionary of numbers, or None"):
        make(teacher, tmp_path / "run", [lambda trainer, step: "hi"]).train()


def test_a_trainer_trains_once_unless_it_goes_on(teacher, tmp_path):
    made = make(teacher, tmp_path / "run", overwrite_output_dir=True, **SHORT)
    first = made.train()
    with pytest.raises(ValueError, match="has trained already: make a new HSIVITrainer"):
        made.train()
    assert made.train(resume_from_checkpoint="latest") == first  # though the config would overwrite


@pytest.mark.parametrize(
    "more", [pytest.param(SHORT, id="callback"), pytest.param(ONE, id="pairs", marks=pytest.mark.slow)]
)
def test_a_trainer_that_stopped_before_its_first_checkpoint_does_not_start_over_in_its_trained_state(
    teacher, one_run, tmp_path, more, monkeypatch, differences
):
    def stop(*_):
        raise RuntimeError("stop")

    made = make(teacher, tmp_path / "run", [stop], **more)
    with monkeypatch.context() as patched:
        if more is ONE:
            patched.setattr(made.accelerator, "check_trigger", lambda: True)
        with pytest.raises(InterruptedRunError if more is ONE else RuntimeError, match="stop"):
            made.train()
    made.callbacks.clear()
    assert not made.state.student.network._forward_pre_hooks  # which count calls
    with pytest.raises(ValueError, match="has trained, and there is no checkpoint: make a new HSIVITrainer"):
        made.train("latest")
    with pytest.raises(ValueError, match="this trainer has trained already: make a new HSIVITrainer, or pass resume"):
        made.train()
    make(teacher, tmp_path / "run", **more).train("latest")
    assert more is SHORT or differences(tmp_path / "run", one_run) == []


def test_a_trainer_whose_folder_was_refused_has_not_trained(teacher, tmp_path):
    made = make(teacher, tmp_path / "run", **SHORT)
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "samples" / "photo.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match="is not empty"):
        made.train()
    assert contents(tmp_path / "run") == {Path("samples/photo.png"): b"precious"}
    shutil.rmtree(tmp_path / "run")
    made.train()


# ----- refused before an earlier run is touched -----


def save(folder, size=1000, bias=0.0, cut=0, **options):
    """Saves a teacher with a number of timesteps and a bias, and cuts bytes off its file of weights."""
    unet = make_unet(**options)
    torch.nn.init.constant_(unet.conv_out.bias, bias)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=size)).save_pretrained(folder)
    os.truncate(folder / WEIGHTS, os.path.getsize(folder / WEIGHTS) - cut)
    return folder


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (None, {"num_inference_steps": 10, "start_timestep": 999}, "set a lower start_timestep, or take fewer steps"),
        (None, {"num_inference_steps": 100}, "take fewer steps, or set level_min below 4"),
        (None, {"level_min": 900}, "level_min=900: give a timestep up to 800, the highest in training"),
        (None, {"class_shares": (1.0,)}, "class_shares has 1 numbers, and the teacher 0 classes: leave it out"),
        (None, {"num_inference_steps": 1000}, "take at most 440 steps, or set a higher start_timestep"),
        (None, {"pretrained_teacher_model": "./nowhere"}, "'./nowhere' is no folder here"),
        (None, {"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"in_channels": 6, "out_channels": 6}, {"validation_steps": 2}, "have 6 channels, .* set validation_steps=0"),
        ({"size": 12}, {"num_pairs": 8, "start_timestep": 9, "level_min": 1}, "set num_pairs=0"),
        ({"bias": float("nan")}, {}, "the unet of teacher .* has weights that are NaN or infinite"),
        ({"bias": float("inf")}, {}, "the unet of teacher .* has weights that are NaN or infinite"),
        ({"cut": 1000}, {}, "teacher .* cannot be loaded .*give a folder or repo id"),
    ],
)
def test_what_cannot_run_is_refused_before_a_finished_run_is_removed(
    distil, fast_run, tmp_path, starts, other, options, message
):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    before = contents(folder)
    if other is not None:
        options = {"pretrained_teacher_model": save(tmp_path / "teacher", **other), **options}
    with pytest.raises(ValueError, match=message) as refused:
        distil(folder, "--overwrite_output_dir=true", **options)
    assert "\n" not in str(refused.value)
    assert starts == []
    assert contents(folder) == before


def test_a_filled_output_folder_is_refused_before_the_teacher_is_loaded(distil, fast_run, monkeypatch):
    monkeypatch.setattr(trainer, "load_teacher", lambda *given: pytest.fail("the teacher was loaded"))
    before = contents(fast_run)
    with pytest.raises(ValueError, match="is not empty.*resume_from_checkpoint latest"):
        distil(fast_run)
    assert contents(fast_run) == before


def test_overwriting_starts_over(distil, fast_run, paper_run, tmp_path, starts, differences):
    folder = shutil.copytree(paper_run, tmp_path / "run")
    distil(folder, "--overwrite_output_dir", preset="fast")
    assert starts == [0]
    assert json.loads((folder / "options.json").read_text())["preset"] == "fast"
    assert differences(folder, fast_run) == []


# ----- hardware -----


@pytest.fixture(scope="module")
def bf16_runs(launch, tmp_path_factory):
    """Runs in bf16, by preset, in processes of their own: accelerate keeps one precision for a process."""
    folders = tmp_path_factory.mktemp("bf16")

    @cache
    def run(preset):
        statuses, text = launch(folders / preset, preset=preset, mixed_precision="bf16", **SHORT)
        assert statuses == [0], text
        return folders / preset

    return run


@pytest.mark.parametrize("preset", others_slow(["fast", "paper"], "paper"))
def test_bf16_trains_near_to_full_precision(distil, bf16_runs, tmp_path, preset):
    full = distil(tmp_path / "full", preset=preset, **SHORT)
    for name in (f"pipeline/{WEIGHTS}", f"critic/{Path(WEIGHTS).name}"):
        got, wanted = load_file(bf16_runs(preset) / name), load_file(full / name)
        assert any(not got[key].equal(tensor) for key, tensor in wanted.items())
        for key, tensor in wanted.items():
            assert got[key].dtype == torch.float32
            torch.testing.assert_close(got[key], tensor, rtol=0, atol=4e-3)


@pytest.mark.slow
def test_a_bf16_run_resumes(launch, bf16_runs, tmp_path, differences):
    options = {"mixed_precision": "bf16", "preset": "paper", **SHORT}
    assert launch(tmp_path / "run", kill={"point": "SIGTERM", "step": 1}, **options)[0] == [75]
    assert launch(tmp_path / "run", resume_from_checkpoint="latest", **options)[0] == [0]
    assert differences(tmp_path / "run", bf16_runs("paper")) == []


def test_fp16_on_a_cpu_is_refused(distil, tmp_path, fresh_accelerator):
    with pytest.raises(ValueError, match="fp16.* requires a GPU"):  # by us, or by an older accelerate
        distil(tmp_path / "run", mixed_precision="fp16")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("native", [False, True])
def test_bf16_that_a_cpu_lacks_is_told(native, monkeypatch, capsys, fresh_accelerator):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    make_accelerator(HSIVIConfig(mixed_precision="bf16"))
    assert ("no instructions" in capsys.readouterr().out) == (not native)


@pytest.mark.parametrize("wanted", [False, True])
def test_tf32_is_allowed_where_it_is_asked_for(request, wanted):
    for flag in (torch.backends.cuda.matmul, torch.backends.cudnn):
        request.addfinalizer(partial(setattr, flag, "allow_tf32", flag.allow_tf32))
        flag.allow_tf32 = False
    make_accelerator(HSIVIConfig(allow_tf32=wanted))
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == wanted


# ----- going on -----


@pytest.mark.parametrize(
    ("of", "fits", "options"),
    [
        ("fast_run", False, {"preset": "fast"}),
        pytest.param("several_run", True, {"preset": "fast", "num_inference_steps": (2, 4, 1)}, marks=pytest.mark.slow),
        pytest.param(
            None, False, {"preset": "paper", "num_inference_steps": (1, 2), "critic_updates": 1}, marks=pytest.mark.slow
        ),
        pytest.param(
            None,
            True,
            {"preset": "fast", "num_inference_steps": 2, "num_pairs": 12, "critic_first": 1},
            marks=pytest.mark.slow,
        ),
        ("one_run", True, ONE),
    ],
)
def test_a_resumed_run_equals_one_at_once(request, distil, tmp_path, starts, differences, of, fits, options):
    at_once = request.getfixturevalue(of) if of else distil(tmp_path / "at_once", **options)
    starts.clear()
    interrupt(distil, tmp_path / "run", **options)
    distil(tmp_path / "run", **options, resume_from_checkpoint="latest")
    assert starts == [*([None] if fits else []), 0, 2]  # the pairs are not fitted again
    assert differences(tmp_path / "run", at_once) == []
    calls = [json.loads((run / "training.json").read_text())["network_calls"] for run in (at_once, tmp_path / "run")]
    assert calls[0] == calls[1]


def test_a_run_that_is_stopped_is_saved_and_goes_on_to_the_same_bits(teacher, tmp_path, fast_run, differences):
    """Ctrl-C in a terminal and `interrupt` of a notebook are SIGINT. After the last update a signal stops nothing."""
    run, steps = tmp_path / "run", []

    def send(sign, done, trainer, step):
        if step.step + 1 == done:
            signal.raise_signal(sign)

    for sign, done in ((signal.SIGTERM, 1), (signal.SIGINT, 3)):
        handler = signal.getsignal(sign)
        with pytest.raises(InterruptedRunError, match=f"saved after update {done}: continue with resume_from_checkp"):
            make(teacher, run, [partial(send, sign, done)]).train("latest")
        assert signal.getsignal(sign) is handler
        assert not (run / "pipeline").exists()
        assert f"has done {done} of them" in (run / "index.html").read_text()
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-3"]
    make(teacher, run, [lambda _, step: steps.append(step.step), partial(send, signal.SIGTERM, 5)]).train("latest")
    assert steps == [3, 4]
    assert [line["step"] for line in read_log(run)] == [line["step"] for line in read_log(fast_run)]
    assert differences(run, fast_run) == []


def test_a_checkpoint_is_resumed_by_its_path_and_a_finished_run_to_itself(
    distil, fast_run, tmp_path, starts, differences, capsys
):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    (folder / "training.json").unlink()
    saving = {"checkpointing_steps": 7, "checkpoints_total_limit": 5}  # which may change
    distil(folder, resume_from_checkpoint=folder / "checkpoints" / "checkpoint-4", **saving)
    assert differences(folder, fast_run) == []
    assert (folder / "training.json").is_file()
    shutil.rmtree(folder / "pipeline")
    (folder / "options.json").unlink()
    capsys.readouterr()
    distil(folder, resume_from_checkpoint="latest")
    assert starts == [4, 5]
    assert "nothing is left to do, the run had 5 updates" in capsys.readouterr().out
    assert differences(folder, fast_run) == []
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize(
    ("of", "lost", "options", "message"),
    [
        ("fast_run", False, {"learning_rate": 0.1, "seed": 1}, "seed: 0 -> 1; learning_rate: 0.0001 -> 0.1"),
        ("several_run", True, {"num_inference_steps": (1, 4)}, r"num_inference_steps: \[1, 2, 4\] -> \[1, 4\]"),
    ],
)
def test_resuming_with_other_options_is_refused_and_names_them(
    request, distil, tmp_path, starts, of, lost, options, message
):
    """They are under the seal of a checkpoint too, so a run whose options.json is lost goes on with no others."""
    folder = shutil.copytree(request.getfixturevalue(of), tmp_path / "run")
    starts.clear()
    if lost:
        (folder / "options.json").unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"other options \({message}\): resume with the"):
        distil(folder, **options, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="holds a run with other options"):
        distil(tmp_path / "new", **options, resume_from_checkpoint=folder / "checkpoints" / "checkpoint-5")
    assert not (tmp_path / "new" / "options.json").exists()
    assert starts == []
    assert contents(folder) == before


def test_a_run_of_version_0_2_resumes_if_what_was_removed_changes_nothing(
    distil, fast_run, tmp_path, starts, differences
):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    record, checkpoint = folder / "options.json", folder / "checkpoints" / "checkpoint-5"
    options, progress = json.loads(record.read_text()), read_progress(checkpoint)
    del progress["sha256"]
    gone = removed(HSIVIConfig(num_inference_steps=2, preset="fast"))
    for name in ("layers", "critic"):
        weights = load_state_dict(checkpoint / f"{name}.safetensors")
        weights = {re.sub("^network[.]", "unet.", key): weight.clone() for key, weight in weights.items()}
        save_state_dict(weights, checkpoint / f"{name}.safetensors")
    for other in ({"pair_weight": 0.5}, {}):
        record.write_text(json.dumps({**options, **gone, **other, "num_inference_steps": 2}))
        progress["identity"] |= {**gone, **other}
        (checkpoint / "progress.json").write_text(json.dumps(seal(checkpoint, progress)))
        before = contents(folder)
        for path in ("latest", checkpoint) if other else ():
            with pytest.raises(ValueError, match="trained with pair_weight=0.5, and the option was removed: finish it"):
                distil(folder, resume_from_checkpoint=path)
            assert contents(folder) == before
    assert starts == []
    distil(folder, resume_from_checkpoint="latest")
    assert starts == [5]
    written = {f"checkpoints/checkpoint-5/{name}.safetensors" for name in ("layers", "critic")}
    assert {*differences(folder, fast_run)} == written
    assert not gone.keys() & json.loads(record.read_text()).keys()


# ----- divergence -----


def test_a_nan_ends_the_run_with_the_step_and_the_last_good_checkpoint(
    distil, fast_run, tmp_path, monkeypatch, differences
):
    folder, score = tmp_path / "run", state.TeacherBridge.score
    last = f"the last good checkpoint is {folder / 'checkpoints' / 'checkpoint-2'}"
    for first, note in ((1, "there was no checkpoint yet"), (3, last)):
        factors = itertools.chain([1] * first, itertools.repeat(torch.nan))  # of its calls, one in each update
        with monkeypatch.context() as patched:
            patched.setattr(state.TeacherBridge, "score", lambda *given, by=factors: score(*given) * next(by))
            with pytest.raises(SystemExit, match=f"the loss of the layers is not finite at step {first}") as exit:
                distil(folder, resume_from_checkpoint="latest")
        assert str(exit.value.code).endswith(note)
        assert not (folder / "pipeline").exists()
    distil(folder, resume_from_checkpoint="latest")
    assert differences(folder, fast_run) == []


@pytest.mark.parametrize("network", ["layers", "critic"])
def test_weights_that_are_not_finite_are_never_saved(distil, tmp_path, monkeypatch, network):
    fit = updates.fit

    def poisoned(layers, critic, *given, **named):
        for step in fit(layers, critic, *given, **named):
            if step.step == 1:
                torch.nn.init.constant_({"layers": layers, "critic": critic}[network].network.conv_out.bias, torch.inf)
            yield step

    monkeypatch.setattr(updates, "fit", poisoned)
    with pytest.raises(SystemExit) as exit:
        distil(tmp_path / "run", checkpointing_steps=1)
    assert re.search("a weight of the .* not finite at step 1", exit.value.code)
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]


# ----- several processes -----

PROCESSES = {"processes": 2, "gradient_accumulation_steps": 1}
ACCUMULATION = {"gradient_accumulation_steps": 2}
FEW = {"max_train_steps": 3, "critic_updates": 1}
KINDS = {
    "fast": {"preset": "fast"},
    "paper": {"preset": "paper", **FEW},
    "guided": {"guidance_scale": (1.0, 3.0), "max_grad_norm": 0.5, **FEW},
    "flow": {"noise_eta": 0.0, **FEW},
    "text": {"guidance_scale": 3.0, "lora_rank": 4, "num_inference_steps": 1, "num_pairs": 8, **FEW},
    "pairs": {"guidance_scale": (1.0, 3.0), **ONE, **FEW},
}


@pytest.fixture(scope="module")
def train(launch, distil, class_teacher, flow_teacher, text_teachers, tmp_path_factory):
    """Does a run of a kind, or what is left of one: several processes of their own, or batches in this one."""
    teachers = {"guided": class_teacher, "pairs": class_teacher, "flow": flow_teacher, "text": text_teachers("sd")}
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def run(folder, kind, processes=1, kill=None, **options):
        given = {"pretrained_teacher_model": teachers[kind]} if kind in teachers else {}
        given |= {"prompts": prompts} if kind == "text" else {}
        options = {**KINDS[kind], **given, **options}
        if processes == 1:
            return distil(folder, **options)
        statuses, text = launch(folder, processes=processes, kill=kill, **options)
        if kill:
            return statuses, text
        assert set(statuses) == {0}, text
        return folder

    return run


@pytest.fixture(scope="module")
def accumulated(train, tmp_path_factory):
    """One process with two batches an update, by kind of run."""
    folders = tmp_path_factory.mktemp("runs")
    return cache(lambda kind: train(folders / kind, kind, **ACCUMULATION))


@pytest.fixture(scope="module")
def parallel(train, tmp_path_factory):
    """Two processes, by kind of run."""
    folders = tmp_path_factory.mktemp("runs")
    return cache(lambda kind: train(folders / kind, kind, **PROCESSES))


@pytest.mark.parametrize("kind", others_slow(KINDS, "fast", "pairs"))
def test_two_processes_equal_two_accumulated_batches_and_not_one(parallel, accumulated, fast_run, differences, kind):
    folder = parallel(kind)
    assert differences(folder, accumulated(kind)) == []
    assert kind != "fast" or differences(folder, fast_run)
    assert json.loads((folder / "training.json").read_text())["processes"] == 2
    chains = [load_file(last_checkpoint(folder) / f"chains-{number}.safetensors") for number in (0, 1)]
    if kind not in ("paper", "text", "pairs"):  # of one layer, or empty after each chain
        assert not chains[0]["x_next"].equal(chains[1]["x_next"])


@pytest.mark.parametrize(
    ("kind", "second"),
    [
        ("fast", PROCESSES),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("paper", ACCUMULATION), ("guided", PROCESSES), ("flow", ACCUMULATION), ("text", ACCUMULATION))
        ),
        ("pairs", ACCUMULATION),
    ],
)
def test_a_run_resumes_with_its_batches_in_other_processes(
    train, accumulated, parallel, tmp_path, differences, kind, second
):
    """From the last checkpoint but one."""
    folder = shutil.copytree((accumulated if second is PROCESSES else parallel)(kind), tmp_path / "run")
    for path in (last_checkpoint(folder), folder / "pipeline"):
        shutil.rmtree(path)
    train(folder, kind, resume_from_checkpoint="latest", **second)
    assert differences(folder, accumulated(kind)) == []


@pytest.mark.parametrize(
    ("point", "step", "status", "second"),
    [
        ("making pairs", 1, 75, ACCUMULATION),
        pytest.param("SIGTERM", 2, 75, ACCUMULATION, marks=pytest.mark.slow),  # in the fit to the pairs
        pytest.param("ends of pairs", 0, -signal.SIGKILL, PROCESSES, marks=pytest.mark.slow),
    ],
)
def test_processes_that_are_ended_before_their_first_update_go_on_to_the_same_bits(
    train, accumulated, tmp_path, differences, point, step, status, second
):
    """One process kept its pairs, and the other may not have."""
    run, kill = tmp_path / "run", {"point": point, "step": step, "rank": 1}
    statuses, text = train(run, "pairs", kill=kill, **PROCESSES)
    assert statuses[-1] == status, text
    if status == 75:
        assert statuses == [75, 75]
        assert (
            "stopped before update 1; the pairs made so far were kept, a fit to them starts anew: continue with" in text
        )
        assert len([*(run / "pairs").glob("*.safetensors")]) == 2
    assert not any((run / name).exists() for name in ("checkpoints", "pipeline"))
    train(run, "pairs", resume_from_checkpoint="latest", **second)
    assert differences(run, accumulated("pairs")) == []


@pytest.mark.parametrize("batches", [1, 4])
def test_another_number_of_batches_is_refused(train, accumulated, tmp_path, batches):
    checkpoint = accumulated("fast") / "checkpoints" / "checkpoint-4"
    message = f"checkpoint-4 is of a run with 2 micro-batches an update, now there are {batches}: choose"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", "fast", resume_from_checkpoint=checkpoint, gradient_accumulation_steps=batches)


@pytest.mark.parametrize("error", [None, InterruptedRunError("stopped"), RuntimeError("out of memory")])
def test_trackers_get_the_options_and_are_ended(distil, tmp_path, monkeypatch, error):
    from accelerate.tracking import TensorBoardTracker

    ended, finish = [], TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: finish(self) or ended.append(self))
    if error is not None:
        monkeypatch.setattr(HSIVITrainer, "_run", mock.Mock(side_effect=error))
    with contextlib.nullcontext() if error is None else pytest.raises((SystemExit, RuntimeError)):
        distil(tmp_path / "run", report_to="tensorboard", max_train_steps=1, critic_updates=1, lr_warmup_steps=1)
    assert len(ended) == 1
    (record,) = (tmp_path / "run" / "logs" / "hsivi").glob("*/hparams.yml")
    options = yaml.safe_load(record.read_text())
    assert (options["learning_rate"], options["num_inference_steps"], options["max_grad_norm"]) == (1e-4, "[2]", None)
    assert options["pretrained_teacher_model"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "report_to='tensorbord' is unknown: choose one of .*tensorboard, wandb, .* or all"),
        ("tensorboard", "report_to='tensorboard', and its package is not installed: pip install tensorboard"),
        ("all", "report_to='all', and its package is not installed: pip install tensorboard"),
    ],
)
def test_a_tracker_without_its_package_is_refused_before_the_teacher_is_loaded(monkeypatch, name, message):
    """accelerate would leave it out; tensorboardX, which it takes for tensorboard, cannot write the options."""
    monkeypatch.setattr(trainer, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=message):
        make("no teacher", report_to=name)
