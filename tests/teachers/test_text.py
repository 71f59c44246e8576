"""Text-to-image teachers: prompts as numbers, adapters on shared weights, and students in the stock pipelines."""

import copy
import hashlib
import json
import logging
import math
import shlex
import shutil
from functools import partial, wraps
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hsivi_diffusers import HSIVIConfig, HSIVIScheduler, HSIVITrainer, load_teacher, push
from hsivi_diffusers.commands import cli, evaluate
from hsivi_diffusers.distillation import plan, progress, updates
from hsivi_diffusers.distillation.networks import make_scheduler
from hsivi_diffusers.distillation.updates import run_updates
from hsivi_diffusers.runs import artifacts
from hsivi_diffusers.runs.artifacts import ADAPTER, read_prompts, read_run
from hsivi_diffusers.runs.default_prompts import default_prompts
from hsivi_diffusers.teachers import latents, loading, prompts
from hsivi_diffusers.teachers.adapters import add_adapter, factor_names, of_file, share
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.loading import load_student
from hsivi_diffusers.teachers.solvers import run_solver
from hsivi_diffusers.teachers.stable_diffusion import TARGETS, StableDiffusion
from short_run import SETTINGS as SHORT
from short_run import train
from slow import others_slow
from tiny_dit import make_dit
from tiny_text import KINDS, PROMPTS, make_text
from tiny_unet import make_unet

CPU = torch.device("cpu")
GIVEN = {"prompts": PROMPTS, "guidance_scale": 3.0}
QUICK = {"max_train_steps": 1, "critic_updates": 1, "lr_warmup_steps": 0}


def draw(pipeline, prompts=PROMPTS, steps=2, scale=1.0, seed=5, **options):
    if "use_resolution_binning" in signature(pipeline.__call__).parameters:
        options["use_resolution_binning"] = False  # for the sizes that PixArt was trained on
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    given = {"num_inference_steps": steps, "guidance_scale": scale, "generator": generator, "output_type": "pt"}
    return pipeline(prompts, **given, **options).images


def with_adapter(teacher, folder):
    """As a card says."""
    pipeline = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    pipeline.load_lora_weights(folder, weight_name=ADAPTER)
    pipeline.scheduler = HSIVIScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipeline


@pytest.fixture(scope="module", autouse=True)
def few_teacher_steps():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(progress, "TEACHER_STEPS", 2)
        yield


@pytest.fixture(scope="module", params=others_slow(KINDS, "sd", "pixart"))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join([*PROMPTS, "", ""]))
    return path


@pytest.fixture(scope="module")
def options(text_teachers, prompt_file):
    """Of a short `hsivi distil` of an adapter of Stable Diffusion."""
    given = {"prompts": prompt_file, "lora_rank": 4, "guidance_scale": 3.0}
    return {"pretrained_teacher_model": text_teachers("sd"), **given, **QUICK}


@pytest.fixture(scope="module")
def short(distil, printed, options, tmp_path_factory):
    """Of a finished `hsivi distil` the folder, its file of prompts, and what it printed."""
    folder = tmp_path_factory.mktemp("short")
    prompts = Path(shutil.copy(options["prompts"], folder))
    return folder / "run", prompts, printed(partial(distil, folder / "run", **{**options, "prompts": prompts}))


@pytest.fixture(scope="module")
def trainer(text_teachers, tmp_path_factory):
    """Of a finished run of the Stable Diffusion of random weights, with adapters."""
    given = {**GIVEN, **QUICK, "max_train_steps": 2, "validation_steps": 2, "lora_rank": 4, "learning_rate": 3e-2}
    return train(text_teachers("sd"), tmp_path_factory.mktemp("text") / "run", **given)


@pytest.fixture(scope="module")
def run(trainer):
    return Path(trainer.config.output_dir)


def encode(teacher, texts, negative=""):
    teacher.encode_prompts(texts, negative, CPU)
    return teacher


def test_a_text_teacher_without_transformers_is_refused_with_the_remedy(text_teachers, monkeypatch):
    monkeypatch.setattr(loading, "is_transformers_available", lambda: False)
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline, and transformers is missing: pip install tr"):
        load_teacher(text_teachers("sd"))


def test_an_adapter_on_other_weights_is_reported(run, text_teachers, tmp_path, caplog):
    """By what its file says, also where that names no teacher; and diffusers warns of nothing."""
    log = logging.getLogger("diffusers.loaders.lora_base")
    log.addHandler(caplog.handler)
    load_student(run / "pipeline")
    log.removeHandler(caplog.handler)
    assert not caplog.records
    stock = DiffusionPipeline.from_pretrained(text_teachers("sd"), torch_dtype=torch.float32)
    alone = shutil.copytree(run / "pipeline", tmp_path / "alone")
    with safe_open(alone / ADAPTER, framework="pt") as file:
        assert file.metadata() == {"teacher_weights_sha256": load_teacher(stock).weights_sha256}
    report = "alone was trained on other weights than it is loaded onto"
    with caplog.at_level("WARNING"):
        assert load_student(alone, load_teacher(stock)).scheduler.depths == [2]
        stock.unet.register_to_config(an_option_of_a_later_diffusers=None)
        load_student(alone, load_teacher(stock))
        assert report not in caplog.text
        with torch.no_grad():
            stock.unet.conv_in.bias += 1
        load_student(alone, load_teacher(stock))
        assert report in caplog.text


@pytest.mark.parametrize("kind", others_slow(KINDS, "sdxl", "pixart"))
def test_a_solver_of_the_guided_teacher_draws_what_the_stock_pipeline_draws(text_teachers, kind):
    teacher = encode(load_teacher(str(text_teachers(kind))), PROMPTS, "blurry")
    stock = DiffusionPipeline.from_pretrained(text_teachers(kind), torch_dtype=torch.float32)
    noise = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    solver = DDIMScheduler.from_config(stock.scheduler.config)
    x = run_solver(Guided(teacher, [3.0]), solver, noise, 4, torch.arange(3))
    images = draw(stock, steps=4, scale=3.0, negative_prompt="blurry" if kind == "pixart" else ["blurry"] * 3)
    torch.testing.assert_close(teacher.decode(x), images, atol=1e-4, rtol=0)
    assert (teacher.num_rows, teacher.num_conditions()) == (4, 3)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 3
    drawn, calls, _ = teacher.draw_teacher(PROMPTS[:1], [torch.Generator().manual_seed(5)], 4, 3.0, "blurry")
    assert (len(drawn), drawn[0].size, calls) == (1, (16, 16), 8)


def test_prompts_are_encoded_once_and_a_stopped_encoding_goes_on(monkeypatch, kind):
    calls, stock = [], make_text(kind)
    encode_prompt = type(stock).encode_prompt
    monkeypatch.setattr(latents.TextLatents, "prompts_of_file", 2)

    @wraps(encode_prompt)
    def count(self, prompt, **options):
        calls.append(prompt)
        if prompt == ["a dog"]:
            raise KeyboardInterrupt
        return encode_prompt(self, prompt=prompt, **options)

    monkeypatch.setattr(type(stock), "encode_prompt", count)
    texts, teacher = ["a red star", "a cat", "a dog"], load_teacher(stock)
    with pytest.raises(KeyboardInterrupt):
        encode(teacher, texts, "a green star")
    texts[2] = "a blue dog"
    calls.clear()
    first = encode(teacher, texts, "a green star").conditions
    assert calls == [["a blue dog"], ["a green star"]]
    calls.clear()
    again = encode(teacher, texts, "a green star").conditions
    assert (calls, again.digest, again.rows) == ([], first.digest, 4)
    assert encode(teacher, texts, "blurry").conditions.digest != first.digest
    rows = again.arguments(torch.tensor([3, 1]), torch.zeros(1))
    given = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    wanted = stock.encode_prompt(prompt=["a cat"], negative_prompt=["a green star"], **given)
    torch.testing.assert_close(rows["encoder_hidden_states"][1:], wanted[0])
    torch.testing.assert_close(rows["encoder_hidden_states"][:1], wanted[2 if kind == "pixart" else 1])


def test_no_text_encoder_is_loaded_where_the_prompts_are_encoded(text_teachers, monkeypatch):
    encode(load_teacher(str(text_teachers("sd"))), ["a cat"])
    teacher = load_teacher(str(text_teachers("sd")))
    assert teacher.pipeline.text_encoder is None
    monkeypatch.setattr(teacher, "load_encoders", lambda: pytest.fail("an encoder was loaded"))
    assert encode(teacher, ["a cat"]).num_rows == 2


def test_the_files_of_encoders_are_hashed_again_only_if_they_change(text_teachers, monkeypatch, tmp_path):
    shutil.copytree(text_teachers("sd"), tmp_path / "teacher")
    teacher, hashed, digest = load_teacher(tmp_path / "teacher"), [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    first, again = teacher.encoders_digest(), teacher.encoders_digest()
    assert first == again
    assert len(hashed) == len(set(hashed)) > 0
    hashed.clear()
    config = tmp_path / "teacher" / "text_encoder" / "config.json"
    config.write_text(config.read_text() + " ")
    assert teacher.encoders_digest() != first
    assert hashed == [str(config)]


@pytest.mark.parametrize("damage", [lambda file: file[:-100], lambda file: file[:-100] + bytes(100), None])
def test_a_damaged_file_of_encoded_prompts_is_made_again(text_teachers, damage):
    """Without a damage it is a file of other tensors."""
    teacher, texts = load_teacher(str(text_teachers("sd"))), ["a blue cat"]
    wanted = encode(teacher, texts).conditions.files[0]["encoder_hidden_states"].clone()
    folder = prompts.cached_assets_path("hsivi_diffusers", "prompts", teacher.encoders_digest()[:16])
    left = folder / "left.123.partial"
    left.write_bytes(b"of a process that was killed")
    for path in folder.glob("*.safetensors"):
        if damage:
            path.write_bytes(damage(path.read_bytes()))
        else:
            save_file({"encoder_hidden_states": torch.zeros(1, 8, 16)}, path)
    assert torch.equal(encode(teacher, texts).conditions.files[0]["encoder_hidden_states"], wanted)
    assert not left.exists()


def longest(pipeline):
    for name in {"tokenizer", "tokenizer_2"} & {*pipeline.components}:
        getattr(pipeline, name).model_max_length = 7


CHANGES = [
    lambda pipeline: None,
    lambda pipeline: next(pipeline.text_encoder.parameters()).data.add_(1),
    lambda pipeline: setattr(pipeline.tokenizer, "padding_side", "left"),
    longest,
    lambda pipeline: setattr(pipeline.tokenizer, "pad_token", "a"),
    lambda pipeline: setattr(pipeline.text_encoder.config, "num_attention_heads", 1),
    lambda pipeline: pipeline.register_to_config(force_zeros_for_empty_prompt=False),  # of SDXL
]


def test_what_an_embedding_follows_from_names_its_file():
    digests = set()
    for change in CHANGES:
        pipeline = make_text("sdxl")
        change(pipeline)
        digests.add(encode(load_teacher(pipeline), ["a cat"]).conditions.digest)
    assert len(digests) == len(CHANGES)


def test_a_teacher_is_known_wherever_it_is_loaded_from(tmp_path):
    digests = set()
    for folder in (tmp_path / "one", tmp_path / "two"):
        make_text("sd").save_pretrained(folder)
        (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(folder.name.encode())  # a variant
        digests.add(encode(load_teacher(str(folder)), ["a cat"]).conditions.digest)
    assert len(digests) == 1


def test_the_size_of_images_is_given_as_the_stock_call_gives_it():
    assert load_teacher(make_text("sdxl")).sizes()["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    pixart = load_teacher(make_text("pixart"))
    assert pixart.sizes() == {}
    pixart.network.use_additional_conditions = True
    pixart.set_size([16, 32])
    sizes = pixart.sizes()
    assert (sizes["resolution"].tolist(), sizes["aspect_ratio"].tolist()) == ([[16, 32]], [[0.5]])


@pytest.mark.parametrize("kind", others_slow(KINDS, "pixart"))
def test_a_run_has_the_size_that_is_asked_for(kind, tmp_path):
    trainer = train(make_text(kind), tmp_path, **GIVEN, **QUICK, resolution=[16, 24])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    images = trainer.state.teacher.draw(trainer.pipeline, PROMPTS, generators)
    assert [image.size for image in images] == [(24, 16)] * 3
    saved = HSIVIScheduler.from_pretrained(tmp_path / "pipeline", subfolder="scheduler")
    assert saved.config.resolution == [16, 24]


def test_prompts_of_a_pipeline_with_one_length_cannot_be_cut():
    with pytest.raises(ValueError, match="max_sequence_length=5: the pipeline of a UNet2DConditionModel takes none"):
        HSIVITrainer(make_text("sd"), HSIVIConfig(**{**GIVEN, "max_sequence_length": 5}))
    with pytest.raises(ValueError, match="max_sequence_length=0"):
        HSIVIScheduler(max_sequence_length=0)


@pytest.mark.parametrize(
    ("teacher", "size", "message"),
    [
        (lambda: make_text("sd"), [16, 18], "resolution=.16, 18.: give height and width, multiples of 4 for a UNet2D"),
        (make_dit, [16, 32], "resolution=.16, 32.: a DiTTransformer2DModel draws images of 16 x 16 alone"),
        (
            lambda: DDPMPipeline(make_unet(), DDIMScheduler()),
            [16, 16],
            "a UNet2DModel draws images of 8 x 8 alone: leave it out",
        ),
    ],
)
def test_a_size_that_a_teacher_cannot_draw_is_refused(teacher, size, message):
    pipeline = teacher()
    prompts = PROMPTS if hasattr(pipeline, "tokenizer") else None
    with pytest.raises(ValueError, match=message):
        HSIVITrainer(pipeline, HSIVIConfig(2, prompts=prompts, resolution=size, guidance_scale=1.0))


def test_prompts_come_from_a_file_or_a_list(prompt_file):
    assert read_prompts(str(prompt_file)) == PROMPTS
    binary = prompt_file.with_name("image.png")
    binary.write_bytes(b"\x89PNG")
    for given, message in (
        ("nowhere.txt", "prompts='nowhere.txt' is no file"),
        ([" "], r"prompts=\[' '\] has no text"),
        (str(binary), "image.png' is no text in UTF-8 .*"),
    ):
        with pytest.raises(ValueError, match=f"{message}: give the path of a text file"):
            read_prompts(given)


def test_student_and_critic_share_every_weight_of_the_teacher():
    """And theirs are in single precision on a teacher in half."""
    teacher = make_text("sd").unet.to(torch.bfloat16)
    student, critic = (add_adapter(teacher, StableDiffusion.adapter, 4) for _ in range(2))
    base = {weight.data_ptr() for weight in teacher.parameters()}
    for network in (student, critic):
        assert {weight.data_ptr() for weight in network.parameters() if not weight.requires_grad} == base
        own = {name: weight.dtype for name, weight in network.named_parameters() if weight.requires_grad}
        assert all("lora_" in name for name in own)
        assert {*own.values()} == {torch.float32}
    assert not hasattr(teacher, "peft_config")
    both = [{id(weight) for weight in network.parameters() if weight.requires_grad} for network in (student, critic)]
    assert not both[0] & both[1]
    wrapped = {name.split(".lora_A")[0] for name in student.state_dict() if "lora_A" in name}
    assert {target for target in TARGETS if any(name.endswith(target) for name in wrapped)} == set(TARGETS)
    copied = share(student)
    assert base <= {weight.data_ptr() for weight in copied.parameters()}
    assert not both[0] & {id(weight) for weight in copied.parameters()}


@pytest.mark.parametrize("kind", others_slow(["sd", "sdxl"], "sd"))
def test_the_stock_pipeline_draws_with_the_file_what_the_trainer_draws(request, text_teachers, tmp_path, kind):
    """Of a teacher given by its folder, and as a pipeline."""
    folder = text_teachers(kind)
    if kind == "sd":
        trainer = request.getfixturevalue("trainer")
    else:
        given = {**QUICK, "lora_rank": 4, "learning_rate": 0.1}
        trainer = train(DiffusionPipeline.from_pretrained(folder), tmp_path / "run", **GIVEN, **given)
    images, saved = draw(trainer.pipeline), Path(trainer.config.output_dir) / "pipeline"
    torch.testing.assert_close(draw(with_adapter(folder, saved)), images, atol=1e-5, rtol=0)
    untrained = DiffusionPipeline.from_pretrained(folder)
    untrained.scheduler = HSIVIScheduler.from_config(trainer.pipeline.scheduler.config)
    assert (draw(untrained) - images).abs().max() > 0.01
    assert [path.name for path in sorted(saved.iterdir())] == [ADAPTER, "scheduler"]


def test_a_run_goes_on_from_another(run, options, distil, tmp_path):
    options = {**options, "init_from": run}
    distil(tmp_path / "next", **options, learning_rate=1e-12)
    before, after = (load_file(folder / "pipeline" / ADAPTER) for folder in (run, tmp_path / "next"))
    assert before.keys() == after.keys()
    for name in ("layers", "critic"):  # a checkpoint holds the adapters alone
        assert all("lora_" in key for key in load_file(run / "checkpoints" / "checkpoint-2" / f"{name}.safetensors"))
    assert all(torch.allclose(weight, after[name], atol=1e-6) for name, weight in before.items())
    with pytest.raises(ValueError, match="has a LoRA of rank 4, and lora_rank=2: leave that out"):
        distil(tmp_path / "other", **{**options, "lora_rank": 2})
    shutil.copytree(run, tmp_path / "full")
    (tmp_path / "full" / "pipeline" / ADAPTER).unlink()
    with pytest.raises(ValueError, match=f"holds no {ADAPTER}: give a run that was trained with lora_rank"):
        distil(tmp_path / "other", **{**options, "init_from": tmp_path / "full"})


@pytest.mark.parametrize("kind", others_slow(KINDS, "pixart"))
def test_copies_of_all_weights_make_a_stock_pipeline(text_teachers, distil, options, tmp_path, kind):
    given = {"pretrained_teacher_model": text_teachers(kind), "guidance_scale": 1.0, "lora_rank": 0}
    distil(tmp_path / "run", **{**options, **given})
    student = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(student) is type(make_text(kind))
    assert isinstance(student.scheduler, HSIVIScheduler)
    assert draw(student).shape == (3, 3, 16, 16)
    assert type(load_student(tmp_path / "run" / "pipeline")) is type(student)
    with pytest.raises(ValueError, match="scheduler of a sampler that was distilled: give the teacher it had"):
        load_teacher(str(tmp_path / "run" / "pipeline"))


@pytest.mark.slow
def test_a_run_in_half_precision_draws(text_teachers, tmp_path, fresh_accelerator):
    more = {**QUICK, "lora_rank": 4, "mixed_precision": "bf16", "validation_steps": 1}
    trainer = train(text_teachers("sd"), tmp_path / "run", **GIVEN, **more)
    assert draw(trainer.pipeline).shape == (3, 3, 16, 16)
    kinds = {weight.dtype for weight in trainer.state.student.network.parameters() if weight.requires_grad}
    assert kinds == {torch.float32}


def weights_of(networks):
    return [copy.deepcopy(network.state_dict()) for network in networks]


@pytest.mark.parametrize("dtype", others_slow([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("rank", others_slow([None, 0, 4], None, 4))
def test_a_given_pipeline_a_run_and_its_pipeline_are_independent(tmp_path, same_tensors, rank, dtype):
    """A rank of None is a DiT."""
    given = {} if rank is None else {**GIVEN, "lora_rank": rank}
    stock = (make_text("sd") if given else make_dit()).to(dtype)
    parts = [part for part in stock.components.values() if isinstance(part, torch.nn.Module)]
    before = weights_of(parts)
    trainer = train(stock, tmp_path / "run", **QUICK, **given)
    pipeline, state = trainer.pipeline, trainer.state
    assert len(draw(pipeline, PROMPTS if given else [0, 1, 2])) == 3
    networks = [state.teacher.network, state.student.network, state.critic_network]
    trained = weights_of(networks)
    if rank:
        pipeline.fuse_lora()
    for part in pipeline.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data.add_(1)
    pipeline.to(torch.float16)
    assert trainer.pipeline.vae.dtype == torch.float32
    for part, weights in zip([*parts, *networks], [*before, *trained], strict=True):
        assert same_tensors(part.state_dict(), weights)
    for part in parts:
        assert {weight.dtype for weight in part.parameters()} == {dtype}
        assert all(weight.requires_grad for weight in part.parameters())
    assert {weight.dtype for network in networks for weight in network.parameters()} == {torch.float32}
    assert isinstance(stock.scheduler, DDIMScheduler)


def test_the_usual_rank_is_that_of_the_kind():
    assert [load_teacher(make_text(kind)).rank(None) for kind in KINDS] == [64, 64, 0]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("asked", "wanted"), [({}, pytest.approx(899, abs=1)), ({"start_timestep": 500}, 500)])
def test_the_preset_starts_on_the_clock_of_stable_diffusion_where_a_published_recipe_does(steps, asked, wanted):
    config = HSIVIConfig(prompts=PROMPTS, num_inference_steps=steps, **asked)
    schedule = HSIVIScheduler.from_config(make_text("sd").scheduler.config)
    assert make_scheduler(schedule, config, (4, 64, 64)).trained_grids[0][0] == wanted


def test_one_step_is_first_fitted_to_pairs_of_the_guided_teacher(text_teachers, make_state, monkeypatch):
    """Latents, which are not clipped."""
    monkeypatch.setattr(updates, "PAIR_STEPS", 10)
    options = {**GIVEN, "num_pairs": 4, "learning_rate": 5e-3, "lora_rank": 8, "num_inference_steps": 1}
    state = make_state(text_teachers("sd"), **options)
    pairs = state.pairs(0)
    ends = pairs.mean.squeeze(1)
    assert ends.abs().max() > 1.2

    @torch.no_grad()
    def error():
        call = partial(state.teacher.call, state.student.network)
        end = run_solver(call, state.student.scheduler, pairs.noise, 1, pairs.condition)
        return float((end - ends).square().mean())

    before = error()
    next(run_updates(state, 0))
    assert error() < 0.8 * before


def test_the_command_draws_prompts(run, tmp_path):
    sample = ["sample", f"--pipeline={run}", "--num_samples=3"]
    cli.main([*sample, f"--output_dir={tmp_path / 'of_run'}"])
    cli.main([*sample, f"--output_dir={tmp_path / 'given'}", "--prompt", *PROMPTS])
    cli.main([*sample, f"--output_dir={tmp_path / 'other'}", "--prompt", "a red star"])
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]))
    cli.main([*sample[:2], f"--prompts={tmp_path / 'prompts.txt'}", f"--output_dir={tmp_path / 'file'}", "--seed=1"])
    assert sorted(path.name for path in (tmp_path / "file").iterdir()) == ["00000.png", "00001.png", "grid.png"]

    def images(name):
        return [Image.open(tmp_path / name / f"{number:05d}.png").tobytes() for number in range(3)]

    assert images("of_run") == images("given")
    assert not set(images("given")) & set(images("other"))
    assert Image.open(tmp_path / "file" / "00000.png").tobytes() == images("given")[1]  # the same seed, and prompt
    assert Image.open(run / "samples" / "step-2.png").size[0] >= 512


def test_the_command_tells_how_to_draw_a_prompt(short):
    folder, _, text = short
    line = text.splitlines()[-1]
    assert line.startswith("draw from it: ")
    cli.main([*shlex.split(line.removeprefix("draw from it: "))[1:]])
    assert [path.name for path in (folder / "drawn").glob("0*.png")] == ["00000.png"]


@pytest.mark.slow
def test_it_is_measured_against_solvers_of_the_teacher(run):
    words = ["--num_samples=20", "--reference_samples=20", "--reference_steps=3", "--ddpm_steps=0", "--ddim_steps=0"]
    evaluate.main([f"--run_dir={run}", *words, "--solver_steps", "2"])
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert {(row["method"], row["nfe"]) for row in rows} >= {("HSIVI", 2), ("UniPC", 4)}
    assert all(math.isfinite(row["kid"]) for row in rows)


def test_it_is_pushed_and_pulled_into_the_stock_pipeline_beside_a_style(run, text_teachers, logged_in, tmp_path):
    teacher, api = text_teachers("sd"), HfApi()
    kept = {"style/old/model.safetensors", "unet/diffusion_pytorch_model.safetensors"}
    api.create_repo("alice/lora")
    for name in kept:
        api.upload_file(repo_id="alice/lora", path_in_repo=name, path_or_fileobj=b"mine")
    cli.main(["push", f"--run_dir={run}", "--hub_model_id=alice/lora", "--base_model=alice/teacher", "--hub_exist_ok"])
    assert kept < {*api.list_repo_files("alice/lora")}
    pulled, local = with_adapter(teacher, "alice/lora"), with_adapter(teacher, run / "pipeline")
    assert torch.equal(draw(pulled), draw(local))
    api.create_repo("alice/teacher")
    api.upload_folder(repo_id="alice/teacher", folder_path=teacher)
    cli.main(["sample", "--pipeline=alice/lora", "--prompt", "a red cat", f"--output_dir={tmp_path / 'drawn'}"])
    assert (tmp_path / "drawn" / "00000.png").is_file()
    card = ModelCard.load("alice/lora")
    assert card.data.base_model == "alice/teacher"
    assert 'pipeline.load_lora_weights("alice/lora")' in card.text
    assert "num_inference_steps=2, guidance_scale=1" in card.text
    assert "keep `guidance_scale=1`: the pipeline would guide a second time" in card.text
    style = load_file(run / "pipeline" / ADAPTER)
    save_file({name: weight.flip(0) for name, weight in style.items()}, tmp_path / ADAPTER)
    both = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    both.load_lora_weights("alice/lora", adapter_name="few_steps", weight_name=ADAPTER)
    both.load_lora_weights(tmp_path, adapter_name="style", weight_name=ADAPTER)
    both.scheduler = pulled.scheduler
    both.set_adapters(["few_steps", "style"], [1.0, 0.0])
    torch.testing.assert_close(draw(both), draw(pulled), atol=1e-5, rtol=0)
    both.set_adapters(["few_steps", "style"], [1.0, 0.5])
    assert (draw(both) - draw(pulled)).abs().max() > 1e-3


def test_a_trainer_pushes_its_adapter(trainer, run, text_teachers, logged_in, tmp_path):
    untrained = HSIVITrainer(str(text_teachers("sd")), HSIVIConfig(**{**SHORT, **GIVEN}, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"no adapter to push yet: call train\(\) first"):
        untrained.push_to_hub("alice/mine")
    trainer.push_to_hub("alice/mine")
    assert with_adapter(text_teachers("sd"), "alice/mine").scheduler.depths == [2]
    pushed, last = HfApi().hf_hub_download("alice/mine", "samples.png"), run / "samples" / "step-2.png"
    assert Image.open(pushed).tobytes() == Image.open(last).convert("RGB").tobytes()
    text = f"The columns are of the prompts {', '.join(PROMPTS)}, in turn."
    assert text in ModelCard.load("alice/mine").text


def test_an_adapter_that_is_damaged_or_alone_is_refused(run, text_teachers, tmp_path):
    folder = shutil.copytree(run / "pipeline", tmp_path / "alone")
    with pytest.raises(ValueError, match="nothing beside it names its teacher: load it as its card says"):
        load_student(folder)
    state = load_file(folder / ADAPTER)
    teacher = load_teacher(str(text_teachers("sd")))
    found = of_file(state, factor_names(teacher.network), "unet")
    assert 3 * len(found) == 2 * len(state)  # A and B without alpha
    name = next(key for key in state if key.endswith("lora_up.weight"))
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{ADAPTER} is damaged .*: make it again, or remove it"):
        load_student(folder, teacher)
    others = {key.replace("up_blocks", "upper_blocks"): value for key, value in state.items()}
    for kept in ({}, {key: value for key, value in state.items() if key != name}, others):
        save_file(kept, folder / ADAPTER)
        with pytest.raises(
            ValueError, match=r"weights of an adapter, of which \d+ fit the teacher's network, for \d+ mod"
        ):
            load_student(folder, teacher)
    save_file({**state, name: state[name] * math.nan}, folder / ADAPTER)
    with pytest.raises(ValueError, match=f"1 weights of .* are not finite, such as {name}"):
        push(folder, "alice/lora")
    with pytest.raises(ValueError, match="holds no pipeline: give a pipeline, or the folder"):
        push(tmp_path, "alice/lora")


def test_a_plan_knows_what_adapters_share(text_teachers, prompt_file, make_config, fresh_accelerator):
    folder, config = str(text_teachers("sdxl")), make_config(prompts=prompt_file, lora_rank=4, guidance_scale=3.0)
    meter = plan.Meter()
    state = plan.make_hollow_state(folder, None, config, meter)
    network = load_teacher(folder).network
    chains = sum(tensor.numel() for chain in state.chains for tensor in chain.state_dict().values())
    assert meter.now == 4 * (network.num_parameters() + 3 * trained_numbers(network) + chains)


def trained_numbers(network):
    adapted = add_adapter(network, StableDiffusion.adapter, 4)
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def test_a_call_is_timed_with_prompts_of_the_length_of_the_run(text_teachers, prompt_file, make_config):
    config = make_config(prompts=prompt_file, guidance_scale=3.0, max_sequence_length=30)
    teacher = plan.make_teacher(str(text_teachers("pixart")), None, config)
    assert teacher.conditions.files[0]["encoder_hidden_states"].shape[1] == 30
    speed, _ = plan.seconds_per_flop(teacher, config, flops=1e7)
    assert speed > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("sdxl", 4), ("pixart", 0)])
def test_it_is_planned_by_its_configs(text_teachers, prompt_file, make_config, kind, rank, capsys, fresh_accelerator):
    teacher = str(text_teachers(kind))
    config = make_config(prompts=prompt_file, lora_rank=rank, guidance_scale=3.0)
    cost = plan.measure(teacher, None, config)
    network = load_teacher(teacher).network
    weights = network.num_parameters()
    trained = trained_numbers(network) if rank else weights
    assert cost.parameters == {"teacher": weights, "trained of the student": trained}
    assert cost.memory["teacher"] == 4 * weights
    assert cost.memory["Adam's moments"] >= 16 * trained
    assert cost.calls["teacher"] == 2
    assert cost.adapted == bool(rank)
    plan.print_plan(teacher, config)
    assert "VAE" in capsys.readouterr().out


@pytest.mark.slow  # one of flows is trained and drawn from by default
def test_a_teacher_stored_in_half_precision_is_drawn_from(options, distil, tmp_path):
    """transformers keeps the precision that a text encoder is stored in, and diffusers that of the rest not."""
    make_text("sd").to(torch.float16).save_pretrained(tmp_path / "half")
    folder = distil(tmp_path / "run", **{**options, "pretrained_teacher_model": tmp_path / "half"})
    cli.main(["sample", f"--pipeline={folder}", "--num_samples=1", f"--output_dir={tmp_path / 'drawn'}"])
    assert (tmp_path / "drawn" / "00000.png").is_file()


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_teachers_come_with_other_schedulers(kind):
    stock = make_text("sd")
    stock.scheduler = kind.from_config(stock.scheduler.config)
    teacher = encode(load_teacher(stock), PROMPTS)
    torch.testing.assert_close(teacher.schedule.alphas_cumprod, make_text("sd").scheduler.alphas_cumprod)
    x, level = torch.randn(2, 2, 8, 8), torch.tensor([300, 700])
    embeddings = stock.encode_prompt(PROMPTS[:2], CPU, 1, False)[0]
    _, eps = teacher.denoise(teacher.network, x, level, torch.arange(2))
    torch.testing.assert_close(eps, stock.unet(x, level, embeddings).sample)


def test_a_resume_that_is_refused_leaves_the_prompts_of_the_run(short, options, distil, tmp_path):
    run, prompts, _ = short
    folder = shutil.copytree(run, tmp_path / "run")
    prompts.write_text("a blue dog\n")
    with pytest.raises(ValueError, match="prompts_sha256"):
        distil(folder, **{**options, "prompts": prompts}, resume_from_checkpoint="latest")
    assert (folder / "prompts.txt").read_text().splitlines() == PROMPTS


def test_a_run_of_the_default_prompts_records_their_name_and_continues(options, distil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = default_prompts()[:20]
    monkeypatch.setattr(artifacts, "default_prompts", lambda: few)
    (tmp_path / "default").write_text("a red cat\n")
    given = {**options, "prompts": "default", "checkpointing_steps": 1}
    folder = distil(tmp_path / "run", **{**given, "max_train_steps": 1})
    assert json.loads((folder / "options.json").read_text())["prompts"] == "default"
    assert tuple((folder / "prompts.txt").read_text().splitlines()) == few
    assert read_run(folder)["prompts"] == [*few[:8]]
    cli.distil([f"--output_dir={folder}", "--resume_from_checkpoint=latest"])


def test_the_prompts_of_the_columns_are_those_that_were_trained(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    assert read_run(folder)["prompts"] == PROMPTS
    record = folder / "options.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "class_shares": [1.0, 0.0, 1.0]}))
    assert read_run(folder)["prompts"] == [PROMPTS[0], PROMPTS[2]]


@pytest.mark.slow
def test_shares_of_prompts_are_planned(text_teachers, prompt_file, make_config, fresh_accelerator):
    """And nothing without prompts."""
    config = make_config(prompts=prompt_file, class_shares=(1, 0, 1), critic_updates=1, guidance_scale=1.0)
    assert plan.measure(str(text_teachers("pixart")), None, config).calls["student"] > 0
    with pytest.raises(ValueError, match="prompts is missing, and the teacher takes text"):
        plan.print_plan(str(text_teachers("sd")), make_config())


def test_a_teacher_with_an_adapter_is_refused_and_one_it_was_merged_into_is_not(run):
    stock = make_text("sd")
    stock.load_lora_weights(run / "pipeline", weight_name=ADAPTER)
    with pytest.raises(ValueError, match=r"adapters in its unet, .*: call fuse_lora\(\) and unload_lora_weights\(\)"):
        load_teacher(stock)
    stock.fuse_lora()
    stock.unload_lora_weights()
    assert torch.equal(load_teacher(stock).network.conv_in.weight, stock.unet.conv_in.weight)


NO_LABEL = "has no free class embedding"


def test_prompts_that_are_missing_are_missed_before_anything_is_loaded(text_teachers, make_config, monkeypatch):
    teacher = str(text_teachers("sd"))
    loaded = load_teacher(teacher)
    for name in ("_load", "check_finite_weights"):  # the first of what follows the refusals
        monkeypatch.setattr(loading, name, lambda *given: pytest.fail("it was loaded"))
    for given in (teacher, loaded, make_text("sd")):
        with pytest.raises(ValueError, match="prompts is missing, and the teacher takes text: give a text file"):
            HSIVITrainer(given, make_config())


TEXT = "prompts was given, and the teacher takes no text: leave it out"
RANK = "no stock pipeline loads a LoRA of a .*: set lora_rank=0"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sd", {"prompts": None}, "prompts is missing, and the teacher takes text: give a text file"),
        ("sd", {"num_inference_steps": [1, 2]}, rf"num_inference_steps=\[1, 2\]: a UNet2DConditionModel {NO_LABEL}"),
        ("sd", {"guidance_scale": [1.0, 3.0]}, rf"guidance_scale=\[1.0, 3.0\]: a UNet2DConditionModel {NO_LABEL}"),
        ("pixart", {}, "no stock pipeline loads a LoRA of a PixArtTransformer2DModel: set lora_rank=0"),
        ("dit", {"num_inference_steps": [1, 2]}, f"a DiTTransformer2DModel {NO_LABEL}"),
        ("dit", {"guidance_scale": [1.0, 2.0]}, f"a DiTTransformer2DModel {NO_LABEL}"),
        ("dit", {"noise_scale_type": "per_pixel"}, "needs a UNet2DModel, and the teacher is a DiTTransformer2DModel"),
        *(("pixels", options, message) for options, message in ((GIVEN, TEXT), ({"lora_rank": 4}, RANK))),
        *(("dit", options, message) for options, message in ((GIVEN, TEXT), ({"lora_rank": 4}, RANK))),
    ],
)
def test_what_cannot_be_trained_is_refused_before_prompts_are_encoded(
    text_teachers, teacher, dit_teacher, monkeypatch, kind, options, message
):
    monkeypatch.setattr(latents, "encode_prompts", lambda *given: pytest.fail("work was begun"))
    folder = {"pixels": teacher, "dit": dit_teacher}.get(kind) or text_teachers(kind)
    settings = {} if kind in ("pixels", "dit") else {**GIVEN, "lora_rank": 4}
    with pytest.raises(ValueError, match=message):
        HSIVITrainer(str(folder), HSIVIConfig(**{**SHORT, **settings, **options}))


def test_the_command_says_what_it_needs(run, text_teachers, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "prompts.txt").unlink()
    for words, message in (
        ([f"--pipeline={run}", "--class_label", "1"], "this pipeline has no classes, leave it out"),
        ([f"--pipeline={text_teachers('sd')}"], "that was not distilled"),
        ([f"--pipeline={folder}"], "--prompt or --prompts is missing: say what to draw"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["sample", *words, f"--output_dir={tmp_path / 'drawn'}"])
        assert message in capsys.readouterr().err
