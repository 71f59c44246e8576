"""What a run starts from: the grid of the student, student and critic, and the weights of an earlier run."""

import json
import shutil
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    BitsAndBytesConfig,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIConfig, HSIVINoiseScale, HSIVIScheduler, HSIVITrainer, Teacher, load_teacher
from hsivi_diffusers.distillation import state
from hsivi_diffusers.distillation.networks import load_networks, make_scheduler
from hsivi_diffusers.runs.artifacts import ADAPTER
from short_run import pipeline_of
from tiny_lora import write_lora
from tiny_text import PROMPTS, make_text
from tiny_unet import save_teacher

CPU = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
GREY = (1, 8, 8)


# ----- the grid of the student -----


def test_the_first_step_starts_at_a_signal_unless_a_timestep_is_given():
    def start(side, channels=1, **settings):
        config = HSIVIConfig(num_inference_steps=2, **settings)
        return make_scheduler(HSIVIScheduler(), config, (channels, side, side)).config.layer_timesteps[0]

    assert start(8, preset="paper") == 800  # the quadratic spacing's own
    assert [start(side) for side in (8, 16, 32)] == [440, 566, 674]
    assert [start(side, channels=3) for side in (32, 64)] == [750, 836]
    assert start(32, start_timestep=500) == 500


@pytest.mark.parametrize(("shape", "start"), [((1, 8, 8), 440), ((1, 64, 64), 440), ((3, 64, 64), 541)])
def test_one_step_starts_at_a_noise_whatever_the_size_of_the_images(shape, start):
    scheduler = make_scheduler(HSIVIScheduler(), HSIVIConfig(num_inference_steps=1), shape)
    assert scheduler.config.layer_timesteps == [start, 0]
    alpha, sigma = scheduler.alpha_sigma(torch.tensor([start - 1, start]), torch.zeros(2, 1, 1, 1))
    assert (sigma / alpha >= 2.5 * shape[0] ** 0.5).flatten().tolist() == [False, True]


def test_a_noise_cutoff_is_one_that_leaves_something_out_of_pixels():
    config = HSIVIConfig(num_inference_steps=1, noise_cutoff=8.0)
    config.check()
    assert make_scheduler(HSIVIScheduler(), config, (3, 64, 48)).config.noise_cutoff == 8
    assert make_scheduler(HSIVIScheduler(), HSIVIConfig(num_inference_steps=1), (3, 64, 48)).config.noise_cutoff is None
    with pytest.raises(
        ValueError, match="noise_cutoff=8 leaves nothing out from 8 on in these images: leave it out, or give less"
    ):
        make_scheduler(HSIVIScheduler(), config, (1, 16, 16))
    with pytest.raises(ValueError, match="noise_cutoff=8 is not for latents: leave it out"):
        make_scheduler(HSIVIScheduler(), config, (4, 64, 64), is_pixels=False)


@pytest.mark.parametrize("settings", [{"num_inference_steps": 4}, {"num_inference_steps": 1}, {"start_timestep": 999}])
def test_a_student_of_a_rectified_flow_starts_at_pure_noise(settings):
    schedule = HSIVIScheduler(prediction_type="flow_prediction", shift=3.0)
    student = make_scheduler(schedule, HSIVIConfig(**settings), GREY)
    assert (student.timesteps[0], student.layers.grid[-1]) == (1000.0, 0)


def test_the_layers_clamp_nothing_whatever_the_teacher_does():
    schedule = HSIVIScheduler(clip_sample=True, thresholding=True)
    config = make_scheduler(schedule, HSIVIConfig(), GREY).config
    assert (config.clip_sample, config.thresholding) == (False, False)


FLOW = {"prediction_type": "flow_prediction", "shift": 3.0}


@pytest.mark.parametrize(
    ("settings", "schedule", "message"),
    [
        ({"start_timestep": 1000}, {}, r"start_timestep=1000: give a timestep from 5 \(the steps\) to 999"),
        ({"start_timestep": 4}, {}, r"start_timestep=4: give a timestep from 5 \(the steps\) to 999"),
        ({"start_timestep": -1}, {}, "start_timestep=-1: give a timestep from 5"),
        ({"start_timestep": 3, "num_inference_steps": [1, 4]}, {}, "start_timestep=3: give a timestep from 4"),
        ({"num_inference_steps": 1000}, {}, "at timestep 440: take at most 440 steps, or set a higher start_timestep$"),
        ({"num_inference_steps": [1, 1000]}, {}, "=1000: the first step starts at timestep .*: take at most"),
        ({"num_inference_steps": 1000, "preset": "paper"}, {}, "^num_inference_steps=1000: .* take at most 999 steps$"),
        ({"start_timestep": 800}, FLOW, "start_timestep=800: a student of a rectified flow starts at 999, pure noise"),
        ({"num_inference_steps": 1000}, FLOW, "the first step starts at timestep 999: take at most 999 steps$"),
    ],
)
def test_grids_that_do_not_fit_the_schedule_are_refused_with_the_remedy(settings, schedule, message):
    with pytest.raises(ValueError, match=message) as refused:
        make_scheduler(HSIVIScheduler(**schedule), HSIVIConfig(**settings), GREY)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("given", "scales"), [(None, []), (1.0, []), (3.0, [3.0]), ([1.0, 3.0], [1.0, 3.0])])
def test_a_guidance_scale_of_1_is_none(given, scales):
    config = HSIVIConfig(guidance_scale=given)
    assert make_scheduler(HSIVIScheduler(), config, GREY).guidance_scales == scales


# ----- copies of the teacher -----


def test_the_teacher_alone_is_kept_in_half_precision(teacher, monkeypatch):
    warned = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warned.append)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        accelerator = SimpleNamespace(device="cpu", mixed_precision=precision)
        networks, _ = load_networks(load_teacher(teacher), HSIVIConfig(), accelerator)
        assert networks.teacher.network.dtype == dtype
        assert networks.student.dtype == networks.critic.dtype == torch.float32
    assert warned == []  # diffusers warns of a cast, even where nothing is to be kept in single precision


def test_a_teacher_given_in_half_precision_is_trained_in_single_and_stays_as_it_is(teacher):
    half = DDPMPipeline.from_pretrained(teacher).to(torch.bfloat16)
    networks, _ = load_networks(load_teacher(half), HSIVIConfig(), CPU)
    assert {weight.dtype for weight in networks.student.parameters()} == {torch.float32}
    assert half.unet.dtype == torch.bfloat16


# ----- going on from an earlier run -----


@pytest.fixture(scope="module")
def pixel_run(distil, tmp_path_factory):
    """A finished run of 3 steps that learns a noise scale for each pixel, at a high rate."""
    folder = tmp_path_factory.mktemp("runs") / "per_pixel"
    options = {"noise_scale_type": "per_pixel", "num_inference_steps": 3, "train_batch_size": 12}  # rows of each layer
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state, "NOISE_SCALE_LEARNING_RATE", 0.1)
        return distil(folder, max_train_steps=4, critic_updates=1, **options)


@pytest.fixture
def scaled_run(fast_run, tmp_path):
    """Makes a finished run whose scheduler has a noise scale, as a run of an earlier version may have learned."""

    def make(noise_scale):
        folder = shutil.copytree(fast_run, tmp_path / "scaled")
        path = folder / "pipeline" / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "noise_scale": noise_scale}))
        return folder

    return make


@pytest.fixture
def begin(teacher):
    """The networks of a run that has made no update yet."""

    def load(run, teacher=teacher, num_inference_steps=2, **settings):
        settings = {"start_timestep": 440, **settings}
        config = HSIVIConfig(num_inference_steps, preset="fast", init_from=str(run), **settings)
        return load_networks(load_teacher(teacher), config, CPU)[0]

    return load


def test_a_curriculum_of_two_and_one_steps(pixel_run, teacher, tmp_path):
    run = pixel_run
    for steps in (2, 1):
        options = {"noise_scale_type": "per_pixel", "max_train_steps": 2, "train_batch_size": 4}
        config = HSIVIConfig(steps, init_from=run, output_dir=tmp_path / str(steps), **options)
        HSIVITrainer(teacher, config).train()
        pipeline, run = pipeline_of(tmp_path / str(steps)), tmp_path / str(steps)
        assert len(pipeline.scheduler.timesteps) == steps
        assert pipeline(2, output_type="pt").images.isfinite().all()


@pytest.mark.slow  # other runs are killed and resumed, and other LoRAs the start of one, by default
def test_a_run_from_a_lora_is_killed_resumed_and_the_start_of_another(
    launch, distil, text_teachers, tmp_path, differences
):
    lora, prompts, teacher = tmp_path / "lora.safetensors", tmp_path / "prompts.txt", text_teachers("sd")
    write_lora(make_text("sd"), lora, 3, ["conv_in"])
    prompts.write_text("\n".join(PROMPTS))
    options = {"pretrained_teacher_model": teacher, "prompts": prompts, "guidance_scale": 3.0, "init_from": lora}
    options |= {"learning_rate": 1e-2, "critic_updates": 1, "max_train_steps": 4}
    once, run = distil(tmp_path / "once", **options), tmp_path / "run"
    assert launch(run, kill={"point": "SIGKILL", "step": 3}, **options)[0] == [-signal.SIGKILL]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert launch(run, resume_from_checkpoint="latest", **options)[0] == [0]
    assert differences(run, once) == []
    following = {**options, "init_from": run, "max_train_steps": 1, "learning_rate": 1e-12, "num_inference_steps": 1}
    distil(tmp_path / "next", **following)
    weights = [load_file(folder / "pipeline" / ADAPTER) for folder in (run, tmp_path / "next")]
    assert any("conv_in" in name for name in weights[0])
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_student_and_critic_start_where_the_run_ended(begin, fast_run, same_tensors):
    networks = begin(fast_run)
    for unet, name in ((networks.student, "pipeline/unet"), (networks.critic, "critic")):
        assert same_tensors(unet.state_dict(), load_file(fast_run / name / "diffusion_pytorch_model.safetensors"))
    assert not same_tensors(networks.student.state_dict(), networks.teacher.network.state_dict())
    assert networks.noise_scale is None


def test_noise_scales_are_carried_over(begin, scaled_run, pixel_run, same_tensors):
    run = scaled_run(0.75)
    for steps in (3, [1, 2]):
        config = begin(run, num_inference_steps=steps).scheduler.config
        assert config.noise_scale == 0.75
        pixels = begin(run, num_inference_steps=steps, noise_scale_type="per_pixel").noise_scale()
        torch.testing.assert_close(pixels, torch.full((1, 1, 8, 8), 0.75))
        networks = begin(pixel_run, num_inference_steps=steps, noise_scale_type="per_pixel")
        assert networks.scheduler.depths == ([steps] if steps == 3 else steps)
        assert same_tensors(networks.noise_scale.state_dict(), pipeline_of(pixel_run).unet_noise_scale.state_dict())


def test_a_noise_scale_is_learned_for_each_pixel_and_saved_for_the_sampler(pixel_run):
    scale = pipeline_of(pixel_run).unet_noise_scale
    assert isinstance(scale, HSIVINoiseScale)
    values = scale().unique()
    assert scale().shape == (1, 1, 8, 8)
    assert len(values) > 1
    assert 1 not in values
    assert json.loads((pixel_run / "options.json").read_text())["noise_scale_type"] == "per_pixel"


def test_the_labels_of_a_critic_hold_for_the_same_grids_alone(begin, several_run, same_tensors):
    """Grids of 1, 2 and 4 layers from 440; others have as many layers."""
    saved = load_file(several_run / "critic" / "diffusion_pytorch_model.safetensors")
    name = "class_embedding.weight"
    rest = {key: value for key, value in saved.items() if key != name}
    assert saved[name].any()
    for layers, kept in (({"start_timestep": None}, True), ({"start_timestep": 500}, False)):
        critic = begin(several_run, num_inference_steps=[1, 2, 4], **layers).critic.state_dict()
        assert torch.equal(critic[name], saved[name] if kept else torch.zeros(7, saved[name].shape[1]))
        assert same_tensors({key: critic[key] for key in rest}, rest)


def test_a_critic_of_classes_keeps_them_on_any_grid_and_labels_of_layers_start_over(begin, class_run, class_teacher):
    name = "class_embedding.weight"
    saved = load_file(class_run / "critic" / "diffusion_pytorch_model.safetensors")[name]
    for start in (440, 500):
        critic = begin(class_run, teacher=class_teacher, start_timestep=start).critic
        assert torch.equal(critic.state_dict()[name], saved)
    networks = begin(class_run, teacher=class_teacher, num_inference_steps=[1, 2])
    own = networks.teacher.network.state_dict()[name]
    assert torch.equal(networks.critic.state_dict()[name], own.repeat_interleave(3, 0))


def without_record(run, folder):
    """A copy of a run of an earlier version, whose training.json names no teacher."""
    path = shutil.copytree(run, folder) / "training.json"
    record = json.loads(path.read_text())
    del record["teacher_sha256"]
    path.write_text(json.dumps(record))
    return folder


def test_runs_that_do_not_fit_are_refused(
    begin, fast_run, class_run, pixel_run, scaled_run, teacher, class_teacher, tmp_path
):
    other = save_teacher(tmp_path / "other")
    DDPMScheduler(beta_end=0.01).save_pretrained(other / "scheduler")
    velocity = shutil.copytree(teacher, tmp_path / "velocity")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(velocity / "scheduler")
    old, old_classes = without_record(fast_run, tmp_path / "old"), without_record(class_run, tmp_path / "old_classes")
    shape = "has networks of another shape than the teacher: give a run of the same"
    for run, settings, message in (
        (fast_run, {"teacher": other}, "was trained with another teacher, of other weights, noise levels or size"),
        (class_run, {}, "was trained with another teacher"),
        (old, {"teacher": class_teacher, "num_inference_steps": [1, 2]}, shape),
        (old_classes, {"num_inference_steps": [1, 2]}, shape),
        (old, {"teacher": velocity}, "has a student that predicts 'epsilon', and the teacher predicts 'v_prediction'"),
        (pixel_run, {}, "has a noise scale per pixel: set noise_scale_type to 'per_pixel'"),
        (scaled_run([0.9, 0.8]), {}, "has a noise scale per layer, which cannot be trained further"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            begin(run, **settings)
        assert "\n" not in str(refused.value)
    assert begin(old, teacher=other).student  # of the same shape, and nothing is known


# ----- quantised weights, by bitsandbytes, which `make test-slow` installs -----

SETTINGS = {"num_inference_steps": 2, "prompts": PROMPTS, "guidance_scale": 3.0, "lora_rank": 4, "train_batch_size": 2}
SETTINGS |= {"max_train_steps": 2, "learning_rate": 1e-2, "lr_warmup_steps": 0, "ema_decay": 0.0}
SETTINGS |= {"checkpointing_steps": 1}


@pytest.mark.parametrize(
    ("kind", "bits", "rank", "storage", "accepted"),
    [
        ("sd", 4, 4, torch.uint8, True),
        ("sdxl", 4, None, torch.uint8, True),
        ("sd", 4, 0, torch.uint8, False),
        ("sd", 8, 4, torch.uint8, False),
        ("sd", 4, 4, torch.bfloat16, False),
        ("pixart", 4, None, torch.uint8, False),
    ],
)
def test_quantised_weights_are_the_base_of_adapters_in_4_bits_alone(kind, bits, rank, storage, accepted):
    class Params4bit(torch.nn.Parameter):
        pass

    teacher = load_teacher(make_text(kind))
    network = teacher.network
    network.is_quantized, network.is_loaded_in_4bit = True, bits == 4  # as diffusers says of its models
    network.codes = Params4bit(torch.zeros(2, dtype=storage), requires_grad=False)
    refusal = pytest.raises(ValueError, match="the teacher has quantised weights, which are supported in 4 bits")
    with nullcontext() if accepted else refusal:
        teacher.check_students(HSIVIConfig(**{**SETTINGS, "lora_rank": rank}))


def test_the_hash_of_quantised_weights_is_that_of_their_saved_folder():
    """Whose config says the same in another way."""
    teacher, hashes = load_teacher(make_text("sd")), set()
    for given in ({"load_in_4bit": True}, BitsAndBytesConfig, None):
        teacher.network.register_to_config(quantization_config=given)
        hashes.add(Teacher.identity(teacher)["teacher_sha256"])
    assert len(hashes) == 1


@pytest.fixture
def quantised(tmp_path, monkeypatch):
    """A Stable Diffusion with such weights, on a CPU, for which diffusers does not load one."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # weights packed for it cannot be trained through
    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **options: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    make_text("sd").save_pretrained(tmp_path / "whole")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "whole", subfolder="unet", quantization_config=how)
    StableDiffusionPipeline.from_pretrained(tmp_path / "whole", unet=unet).save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


def load(folder):
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def train(teacher, folder, resume=None, callbacks=(), **settings):
    trainer = HSIVITrainer(teacher, HSIVIConfig(**{**SETTINGS, **settings}, output_dir=folder), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapters_share_quantised_weights_which_stay_as_they_are(quantised, fresh_accelerator, tmp_path, precision):
    """Of a pipeline. They start as the teacher."""
    before = {name: weight.clone() for name, weight in load(quantised).unet.state_dict().items()}
    config = HSIVIConfig(**SETTINGS, mixed_precision=precision, output_dir=tmp_path / "run")
    trainer = HSIVITrainer(load(quantised), config)
    made, teacher = trainer.state, trainer.state.teacher.network
    players = (made.student.network, made.critic_network)
    x, prompts = torch.randn(2, 2, 8, 8).to(teacher.dtype), torch.randn(2, 8, 16).to(teacher.dtype)
    with torch.no_grad(), torch.autocast("cpu", teacher.dtype, enabled=precision == "bf16"):
        answers = [each(x, 500, prompts).sample for each in (teacher, *players)]
    assert all(answer.equal(answers[0]) for answer in answers)
    trainer.train()
    base = {weight.data_ptr() for weight in teacher.parameters()}
    for network in players:
        shared = [weight for weight in network.parameters() if not weight.requires_grad]
        assert {weight.data_ptr() for weight in shared} == base
        assert torch.uint8 in {weight.dtype for weight in shared}
        assert {weight.dtype for weight in network.parameters() if weight.requires_grad} == {torch.float32}
    codes = [name for name, weight in before.items() if weight.dtype == torch.uint8]
    assert codes
    assert all(teacher.state_dict()[name].equal(before[name]) for name in codes)


@pytest.mark.slow
def test_the_adapter_is_for_the_stock_pipeline_quantised_and_whole(quantised, tmp_path):
    trainer = train(quantised, tmp_path / "run")

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        given = {"num_inference_steps": 2, "guidance_scale": 1, "output_type": "pt"}
        return pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **given).images

    drawn = {}
    for teacher in (quantised, tmp_path / "whole"):
        pipeline = load(teacher)
        pipeline.scheduler = HSIVIScheduler.from_pretrained(tmp_path / "run" / "pipeline", subfolder="scheduler")
        without = draw(pipeline)
        pipeline.load_lora_weights(tmp_path / "run" / "pipeline", weight_name=ADAPTER)
        drawn[teacher] = draw(pipeline)
        assert (drawn[teacher] - without).abs().max() > 0.01
    torch.testing.assert_close(drawn[quantised], draw(trainer.pipeline))
    torch.testing.assert_close(drawn[quantised], drawn[tmp_path / "whole"], atol=0.1, rtol=0)


@pytest.mark.slow
def test_a_quantised_run_resumes_to_the_same_bits(quantised, tmp_path):
    def stop(trainer, step):
        if step.step == 1:
            raise KeyboardInterrupt

    train(quantised, tmp_path / "never")
    with pytest.raises(KeyboardInterrupt):
        train(quantised, tmp_path / "stopped", callbacks=[stop])
    train(quantised, tmp_path / "stopped", "latest")
    got, wanted = (load_file(tmp_path / name / "pipeline" / ADAPTER) for name in ("stopped", "never"))
    assert all(got[name].equal(weight) for name, weight in wanted.items())
