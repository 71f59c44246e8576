"""`HSIVITrainer` from Python, as in a notebook."""

import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from hsivi_diffusers import HSIVIConfig, HSIVIPipeline, HSIVITrainer
from hsivi_diffusers.distillation.trainer import InterruptedRunError
from short_run import SETTINGS

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def make(teacher, folder=None, callbacks=(), **settings):
    output_dir = None if folder is None else str(folder)
    return HSIVITrainer(teacher, HSIVIConfig(output_dir=output_dir, **SETTINGS, **settings), callbacks=callbacks)


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """A finished run whose teacher is a loaded pipeline: trainer, teacher, what its callback saw and trackers got."""
    pipeline, seen, logged = DDPMPipeline.from_pretrained(teacher), [], {}

    def watch(trainer, step):
        seen.append((trainer, step.step, float(step.layers.loss.mean())))
        return {"halves": step.step / 2} if step.step % 2 else None

    trainer = make(pipeline, tmp_path_factory.mktemp("runs") / "python", [watch])
    trainer.accelerator.log = lambda numbers, step: logged.update({step: numbers})
    bars = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tqdm, "set_postfix", lambda bar, shown, **options: bars.append(shown))
        summary = trainer.train()
    return {
        "trainer": trainer,
        "teacher": pipeline,
        "seen": seen,
        "logged": logged,
        "bars": bars,
        "summary": summary,
        "folder": Path(trainer.config.output_dir),
    }


# ----- training -----


def test_a_run_from_python_has_the_bits_of_the_command(run, fast_run, differences):
    assert differences(run["folder"], fast_run) == []
    assert run["summary"]["network_calls"] > 0
    assert 100 < run["summary"]["peak_memory_mib"] < 32_000


def test_a_loaded_teacher_stays_as_it_was(run, teacher, same_tensors):
    before = DDPMPipeline.from_pretrained(teacher)
    assert same_tensors(run["teacher"].unet.state_dict(), before.unet.state_dict())
    assert all(parameter.requires_grad for parameter in run["teacher"].unet.parameters())
    assert run["teacher"].scheduler.config == before.scheduler.config


def test_a_loaded_teacher_keeps_its_precision(teacher, fresh_accelerator):
    pipeline = DDPMPipeline.from_pretrained(teacher)
    trainer = make(pipeline, mixed_precision="bf16")
    assert trainer.state.bridge.network.unet.dtype == torch.bfloat16
    assert pipeline.unet.dtype == torch.float32


def test_callbacks_see_each_step_and_their_numbers_are_shown(run):
    assert [(trainer is run["trainer"], step) for trainer, step, _ in run["seen"]] == [
        (True, step) for step in range(5)
    ]
    assert {step: numbers.get("halves") for step, numbers in run["logged"].items()} == {2: 0.5, 4: 1.5, 5: None}
    for step, numbers in run["logged"].items():
        assert numbers["loss/student"] == pytest.approx(run["seen"][step - 1][2])
    assert [bar.get("halves") for bar in run["bars"]] == ["0.5", "1.5", None]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": {"num_inference_steps": 2}}, r"config is a dict: give an HSIVIConfig\("),
        ({"callbacks": print}, "callbacks=.*: give a list of functions"),
        ({"callbacks": ["hi"]}, "callbacks=.*: give a list of functions"),
    ],
)
def test_arguments_of_another_type_are_refused(teacher, given, message):
    with pytest.raises(ValueError, match=message):
        HSIVITrainer(teacher, **given)


def test_a_callback_that_returns_no_numbers_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="a callback returned 'hi': return a dictionary of numbers, or None"):
        make(teacher, tmp_path / "run", [lambda trainer, step: "hi"]).train()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_is_saved_and_goes_on_to_the_same_bits(
    teacher, tmp_path, fast_run, differences, sign, monkeypatch
):
    """Ctrl-C in a terminal and `interrupt` of a notebook are SIGINT."""
    handler = signal.getsignal(sign)
    stopped = make(teacher, tmp_path / "run", [lambda trainer, step: step.step == 2 and signal.raise_signal(sign)])
    with pytest.raises(InterruptedRunError, match="saved after update 3: continue with resume_from_checkpoint latest"):
        stopped.train()
    assert signal.getsignal(sign) is handler
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir()
    assert not (tmp_path / "run" / "pipeline").exists()
    steps = []
    make(teacher, tmp_path / "run", [lambda trainer, step: steps.append(step.step)]).train("latest")
    assert steps == [3, 4]
    assert differences(tmp_path / "run", fast_run) == []


def test_a_run_in_a_thread_has_the_same_bits(teacher, tmp_path, fast_run, differences):
    """There are no signals there."""
    trainer = make(teacher, tmp_path / "run")
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert differences(tmp_path / "run", fast_run) == []


# ----- the student -----


def test_the_pipeline_of_the_trainer_is_the_one_it_saved(run, tmp_path):
    images = run["trainer"].pipeline(batch_size=2, generator=torch.Generator().manual_seed(3)).images
    saved = HSIVIPipeline.from_pretrained(run["folder"] / "pipeline")
    for image, wanted in zip(images, saved(2, torch.Generator().manual_seed(3)).images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(wanted))
    run["trainer"].pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (run["folder"] / "pipeline" / WEIGHTS).read_bytes()


def test_the_pipeline_is_a_copy(run):
    pipeline = run["trainer"].pipeline
    with torch.no_grad():
        pipeline.unet.conv_in.weight.zero_()
    assert run["trainer"].pipeline.unet.conv_in.weight.abs().sum() > 0


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


# ----- what is refused -----


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("/nowhere/at/all", "teacher '/nowhere/at/all' is not a folder: give"),
        (Path("/nowhere/at/all"), "teacher '/nowhere/at/all' is not a folder: give"),
        (torch.nn.Linear(1, 1), "teacher is a Linear: give a folder, a repo id, or a loaded pipeline"),
    ],
)
def test_a_bad_teacher_is_refused_in_one_line(bad, message):
    with pytest.raises(ValueError, match=message) as refused:
        make(bad)
    assert "\n" not in str(refused.value)


def test_a_student_is_no_teacher(run):
    with pytest.raises(ValueError, match="is an HSIVIPipeline, a sampler that was distilled"):
        make(run["trainer"].pipeline)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_eta": -0.1}, "noise_eta=-0.1: give a number from 0 to 1"),
        ({"noise_eta": 0.0, "scoring": "own"}, "noise_eta=0, and outputs without noise have no score: set objective"),
        ({"init_from": "nowhere"}, "init_from='nowhere' lacks pipeline, critic, options.json"),
        ({"preset": "quick"}, "preset='quick' is unknown: choose one of fast, one_call, paper"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(teacher, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        make(teacher, tmp_path / "run", **settings)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_only_training_needs_a_folder(teacher):
    trainer = make(teacher)
    assert len(trainer.pipeline(batch_size=1).images) == 1
    with pytest.raises(ValueError, match="output_dir is missing"):
        trainer.train()


def test_the_config_of_the_user_is_not_changed(teacher):
    config = HSIVIConfig(**SETTINGS)
    trainer = HSIVITrainer(teacher, config)
    trainer.config.max_train_steps = 7
    assert config == HSIVIConfig(**SETTINGS)


# ----- what an independent reading found -----


def test_sample_grids_do_not_count_as_calls_of_the_training(teacher, tmp_path):
    """Whole and resumed; the teacher's row would be 160 calls more each time."""
    settings = {**SETTINGS, "validation_steps": 2}
    calls = HSIVITrainer(teacher, HSIVIConfig(output_dir=tmp_path / "grids", **settings)).train()["network_calls"]
    assert calls == make(teacher, tmp_path / "none").train()["network_calls"]
    (tmp_path / "grids" / "training.json").unlink()
    shutil.rmtree(tmp_path / "grids" / "checkpoints" / "checkpoint-5")
    resumed = HSIVITrainer(teacher, HSIVIConfig(output_dir=tmp_path / "grids", **settings)).train("latest")
    assert resumed["network_calls"] == pytest.approx(calls, abs=4)  # a pool is filled in a call of 4 rows more


def test_a_trainer_trains_once_unless_it_goes_on(teacher, tmp_path):
    trainer = make(teacher, tmp_path / "run", overwrite_output_dir=True)
    first = trainer.train()
    with pytest.raises(ValueError, match="has trained already: make a new HSIVITrainer"):
        trainer.train()
    assert trainer.train(resume_from_checkpoint="latest") == first  # though the config would overwrite


@pytest.mark.parametrize("more", [{}, {"num_pairs": 8, "pair_steps": 2}])
def test_a_trainer_that_stopped_before_its_first_checkpoint_does_not_start_over_in_its_trained_state(
    teacher, tmp_path, more, monkeypatch
):
    """Stopped by a callback, or by Ctrl-C in the fit to pairs; a new one starts."""

    def stop(*_):
        raise RuntimeError("stop")

    trainer = make(teacher, tmp_path / "run", [stop], **more)
    if more:
        monkeypatch.setattr(trainer.accelerator, "check_trigger", lambda: True)
    with pytest.raises(InterruptedRunError if more else RuntimeError, match="stop"):
        trainer.train()
    monkeypatch.undo()
    trainer.callbacks.clear()
    with pytest.raises(ValueError, match="has trained, and there is no checkpoint: make a new HSIVITrainer"):
        trainer.train("latest")
    with pytest.raises(ValueError, match="this trainer has trained already: make a new HSIVITrainer, or pass resume"):
        trainer.train()
    make(teacher, tmp_path / "run", **more).train("latest")


def test_a_trainer_whose_folder_was_refused_has_not_trained(teacher, tmp_path):
    trainer = make(teacher, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(ValueError, match="is not empty"):
        trainer.train()
    (tmp_path / "run" / "mine").unlink()
    trainer.train()


def test_a_folder_of_the_user_is_not_taken_for_the_start_of_a_run(teacher, tmp_path):
    (tmp_path / "mine" / "samples").mkdir(parents=True)
    (tmp_path / "mine" / "samples" / "photo.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match="is not empty"):
        make(teacher, tmp_path / "mine").train()
    assert (tmp_path / "mine" / "samples" / "photo.png").read_bytes() == b"precious"


def test_a_teacher_in_half_precision_is_trained_in_single(teacher):
    half = DDPMPipeline.from_pretrained(teacher).to(torch.bfloat16)
    assert {weight.dtype for weight in make(half).state.student.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "kl"}, "objective='kl' is unknown: choose one of 'SM', 'KL'"),
        ({"scoring": "Between"}, "scoring='Between' is unknown: choose one of 'own', 'random', 'between'"),
        ({"loss_weight": "sigma"}, "loss_weight='sigma' is unknown"),
        ({"num_inference_steps": 0}, "give one number of steps of at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: give a number above 0"),
        ({"ema_decay": 2.0}, "ema_decay=2.0: give a number from 0 to below 1"),
        ({"lr_warmup_steps": -3}, "lr_warmup_steps=-3: give a number from 0 on"),
        ({"level_min": -3}, "level_min=-3: give a number from 0 on"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler=piecewise_constant: give one of linear, cosine"),
        ({"critic_lr_scheduler": "cosin"}, "critic_lr_scheduler=cosin: give one of linear, cosine"),
        ({"start_signal": 3.0, "start_noise": 2.0}, "start_noise=2.0 and start_signal=3.0 each say where the first"),
        ({"start_timestep": 9, "start_noise": 2.0}, "start_timestep=9 and start_noise=2.0 each say where the first"),
    ],
)
def test_a_config_from_python_is_checked_as_one_of_the_command(settings, message):
    with pytest.raises(ValueError, match=message):
        HSIVIConfig(**settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "high"}, "learning_rate='high' has the type str: give float"),
        ({"learning_rate": True}, "learning_rate=True has the type bool: give float"),
        ({"max_train_steps": "10"}, "max_train_steps='10' has the type str: give int"),
        ({"max_train_steps": 10.0}, "max_train_steps=10.0 has the type float: give int"),
        ({"max_grad_norm": "1"}, r"max_grad_norm='1' has the type str: give float \| None"),
        ({"seed": None}, "seed=None has the type NoneType: give int"),
        ({"objective": None}, r"objective=None has the type NoneType: give Literal\['SM', 'KL'\]"),
        ({"clip_images": 1}, "clip_images=1 has the type int: give bool"),
        ({"output_dir": 5}, r"output_dir=5 has the type int: give str \| None"),
        ({"num_inference_steps": "4"}, r"num_inference_steps='4' has the type str: give int \| list\[int\]"),
        ({"num_inference_steps": [1, "4"]}, r"num_inference_steps=\[1, '4'\] has the type list: give int"),
        ({"num_inference_steps": 4.0}, "num_inference_steps=4.0 has the type float: give int"),
    ],
)
def test_a_value_of_another_type_is_refused_when_the_config_is_made(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        HSIVIConfig(**settings)
    assert "\n" not in str(refused.value)


def test_a_whole_number_is_a_number():
    HSIVIConfig(max_grad_norm=1, noise_eta=1, validation_steps=None).check()


def test_steps_may_be_a_tuple_and_folders_paths():
    config = HSIVIConfig(num_inference_steps=(4, 1), output_dir=Path("runs"), init_from=Path("other"))
    assert (config.depths, config.output_dir, config.init_from) == ([1, 4], "runs", "other")


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_every_schedule_of_learning_rates_that_is_accepted_can_be_trained(teacher, name):
    schedules = make(teacher, lr_scheduler=name, critic_lr_scheduler=name).state.lr_schedulers
    assert [schedule.get_last_lr()[0] >= 0 for schedule in schedules] == [True, True]


def test_scales_are_the_same_in_any_order_and_alone_in_a_list():
    assert HSIVIConfig(guidance_scale=[2.0]).guidance_scale == HSIVIConfig(guidance_scale=2).guidance_scale == 2
    assert HSIVIConfig(guidance_scale=[2.0, 1.0]) == HSIVIConfig(guidance_scale=[1.0, 2.0])


def test_nothing_counts_the_calls_of_a_run_that_was_stopped(teacher, tmp_path):
    def stop(trainer, step):
        raise KeyboardInterrupt

    trainer = make(teacher, tmp_path / "run", [stop])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.state.student.unet._forward_pre_hooks
