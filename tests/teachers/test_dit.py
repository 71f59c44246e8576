"""DiTPipeline teachers: latents, labels, learned variance, and students that stay in the stock pipeline."""

import json
import math
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from hsivi_diffusers import HSIVIConfig, HSIVIPipeline, HSIVIScheduler, TeacherBridge, load_teacher, push
from hsivi_diffusers.commands import cli, evaluate
from hsivi_diffusers.distillation import plan, updates
from hsivi_diffusers.distillation.networks import make_networks, make_student_and_critic
from hsivi_diffusers.distillation.pairs import follow_ode
from hsivi_diffusers.share.card import make_card
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.loading import load_student, read_teacher
from hsivi_diffusers.teachers.solvers import run_solver
from short_run import train
from tiny_dit import make_dit

NONE = 3  # the last of four labels
QUICK = {"max_train_steps": 1, "critic_updates": 1}
DRAW = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture
def stock():
    return make_dit()


@pytest.fixture(scope="module")
def run(distil, dit_teacher, tmp_path_factory):
    return distil(tmp_path_factory.mktemp("dit") / "run", pretrained_teacher_model=dit_teacher, validation_steps=5)


@pytest.fixture
def student(run):
    pipeline = DiTPipeline.from_pretrained(run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def loaded(stock):
    return load_teacher(stock)


def test_it_is_loaded_with_its_schedule(dit_teacher, stock):
    teacher = load_teacher(str(dit_teacher))
    assert isinstance(teacher.network, DiTTransformer2DModel)
    assert torch.equal(teacher.schedule.alphas_cumprod, stock.scheduler.alphas_cumprod)
    assert (teacher.shape, teacher.image_shape) == ((2, 8, 8), (3, 16, 16))
    assert (teacher.num_rows, teacher.num_conditions(), teacher.num_conditions(guides=True)) == (4, 3, 3)


@pytest.mark.parametrize("scale", [None, 4.0])
def test_the_bridge_guides_by_the_label_for_no_class(stock, loaded, scale):
    scheduler = HSIVIScheduler(layer_timesteps=[440, 220, 10], noise_eta=1.0, guidance_scale=scale)
    bridge, x = TeacherBridge(loaded, scheduler), torch.randn(3, 2, 8, 8)
    level, labels = torch.tensor([10, 200, 400]), torch.tensor([0, 1, 2])
    of_class, of_none = (
        stock.transformer(x, level, class_labels=each).sample[:, :2] for each in (labels, torch.full((3,), NONE))
    )
    output = of_class if scale is None else of_none + scale * (of_class - of_none)
    _, sigma = scheduler.alpha_sigma(level, x)
    torch.testing.assert_close(bridge.score(x, level, labels), -output / sigma, rtol=1e-3, atol=1e-4)
    assert bridge.num_classes == 3


def test_no_label_is_dropped_in_training(loaded):
    config = HSIVIConfig(num_inference_steps=2)
    networks = make_networks(loaded, *make_student_and_critic(loaded, config), config)
    x, labels = torch.randn(64, 2, 8, 8), torch.arange(64) % 3
    outputs = [networks.student.train(mode)(x, torch.full((64,), 300), labels).sample for mode in (True, False)]
    torch.testing.assert_close(*outputs)


def test_latents_are_not_clipped_and_become_the_images_of_the_stock_pipeline(stock):
    stock.scheduler = DDIMScheduler(clip_sample=False)
    loaded = load_teacher(stock)
    noise, labels = 3 * torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 2])
    assert follow_ode(Guided(loaded), noise, labels).abs().max() > 1
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    generator = torch.Generator().manual_seed(3)
    images = stock([0, 1], 1.0, generator, num_inference_steps=4, output_type="pt").images
    latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    latents = run_solver(Guided(loaded), stock.scheduler, latents, 4, torch.tensor([0, 1]))
    torch.testing.assert_close(loaded.decode(latents), images)


def test_the_student_is_a_stock_pipeline_with_our_scheduler(student, run, dit_teacher):
    assert isinstance(student.scheduler, HSIVIScheduler)
    assert student.get_label_ids(["tiger", "owl"]) == [0, 2]
    before = load_teacher(str(dit_teacher)).network
    assert not torch.equal(student.transformer.proj_out_2.weight, before.proj_out_2.weight)
    assert student([0, 1, 2], **DRAW).images.shape == (3, 16, 16, 3)
    with pytest.raises(ValueError, match="num_inference_steps"):
        student([0])
    assert {"step-0.png", "step-5.png"} <= {path.name for path in (run / "samples").iterdir()}
    assert Image.open(run / "samples" / "step-5.png").size[0] >= 512


def test_without_noise_images_follow_from_the_generator_alone(dit_teacher, tmp_path):
    pipeline = train(dit_teacher, tmp_path / "run", noise_eta=0.0, guidance_scale=4.0, **QUICK).pipeline
    pipeline.set_progress_bar_config(disable=True)
    first, again = (pipeline([0, 1], generator=torch.Generator().manual_seed(5), **DRAW).images for _ in range(2))
    assert (first == again).all()


def test_a_dit_without_a_learned_variance_makes_a_student_that_draws(stock, tmp_path):
    stock.transformer = DiTTransformer2DModel.from_config({**stock.transformer.config, "out_channels": None}).eval()
    train(stock, tmp_path / "run", **QUICK)
    assert DiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")([0, 1], **DRAW).images.shape == (2, 16, 16, 3)


def test_the_old_name_of_the_class_is_known(dit_teacher, tmp_path):
    folder = shutil.copytree(dit_teacher, tmp_path / "old")
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        file.write_text(file.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert "norm_type" in (folder / "transformer" / "config.json").read_text()
    for read in (load_teacher, read_teacher):
        assert isinstance(read(str(folder)).network, DiTTransformer2DModel)


def test_a_subclass_is_as_good(stock):
    mine, my_transformer = type("Mine", (DiTPipeline,), {}), type("MyTransformer", (DiTTransformer2DModel,), {})
    pipeline = mine(my_transformer.from_config(stock.transformer.config), stock.vae, stock.scheduler)
    assert isinstance(load_teacher(pipeline).network, my_transformer)


def test_one_step_goes_on_from_another_run_and_starts_with_pairs(run, dit_teacher, distil, tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "PAIR_STEPS", 2)
    options = {**QUICK, "num_inference_steps": 1, "num_pairs": 8}
    folder = distil(tmp_path / "next", pretrained_teacher_model=dit_teacher, init_from=run, **options)
    assert json.loads((folder / "training.json").read_text())["network_calls"] > 8 * 15
    assert (folder / "pipeline" / "transformer").is_dir()


@pytest.mark.slow
def test_it_is_planned_with_its_vae(dit_teacher, make_config, capsys):
    cost = plan.measure(str(dit_teacher), None, make_config())
    assert cost.parameters["teacher"] == load_teacher(str(dit_teacher)).network.num_parameters()
    plan.print_plan(str(dit_teacher), make_config())
    text = capsys.readouterr().out
    assert "VAE" in text
    with pytest.raises(ValueError, match="per_pixel' needs a UNet2DModel, and the teacher is a DiTTransformer2DModel"):
        plan.print_plan(str(dit_teacher), make_config(noise_scale_type="per_pixel"))


def test_the_command_draws_each_image_by_its_own_seed(run, tmp_path):
    sample = ["sample", f"--pipeline={run}", "--num_samples=5", "--class_label", "1", "2"]
    for batch in ("2", "5"):
        cli.main([*sample, f"--output_dir={tmp_path / batch}", f"--batch_size={batch}"])
    for number in range(5):
        one, two = (Image.open(tmp_path / batch / f"{number:05d}.png") for batch in ("2", "5"))
        difference = max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True))
        assert difference <= 1  # a batch of another size is summed in another order


def test_it_is_pushed_and_pulled_by_the_stock_pipeline(run, student, logged_in):
    push(student, "alice/dit", run_dir=run)
    pulled = DiTPipeline.from_pretrained("alice/dit")
    drawn = []
    for pipeline in (student, pulled):
        torch.manual_seed(1)  # of the noise of the steps, which the pipeline gives no generator
        drawn.append(pipeline([0, 1], generator=torch.Generator().manual_seed(2), **DRAW).images)
    assert (drawn[0] == drawn[1]).all()
    assert pulled.get_label_ids(["dog"]) == [1]
    card = ModelCard.load("alice/dit").text
    assert "pipeline(class_labels=[0], num_inference_steps=2, guidance_scale=1).images" in card
    assert "It was trained without guidance, so keep `guidance_scale=1`." in card
    student.scheduler = HSIVIScheduler.from_config(student.scheduler.config, guidance_scale=3.0)
    card = make_card(student, "alice/dit", {"options": {}, "training": {}, "report": {}}).text
    assert "keep `guidance_scale=1`: the pipeline would guide a second time" in card


def test_damaged_weights_of_a_student_are_named(run, tmp_path):
    folder = shutil.copytree(run / "pipeline", tmp_path / "damaged")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({**state, "proj_out_2.bias": state["proj_out_2.bias"] * math.nan}, weights)
    with pytest.raises(ValueError, match="transformer has weights that are NaN or infinite, the first in proj_out"):
        load_student(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged or incomplete: download it again"):
        load_student(folder)


@pytest.mark.slow
def test_it_is_measured_against_solvers_of_the_teacher(run):
    sizes = ["--num_samples=20", "--reference_samples=20", "--reference_steps=3", "--ddpm_steps=0", "--ddim_steps=0"]
    evaluate.main([f"--run_dir={run}", *sizes, "--solver_steps=2"])
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert {(row["method"], row["nfe"]) for row in rows} >= {("HSIVI", 2), ("UniPC", 2)}
    assert all(math.isfinite(row["kid"]) for row in rows)
    assert Image.open(run / "samples.png").size[0] >= 16 * 16


def test_a_teacher_is_not_drawn_from_and_a_student_does_not_teach(dit_teacher, run, distil, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", f"--pipeline={dit_teacher}", f"--output_dir={tmp_path / 'drawn'}"])
    assert "was not distilled" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a sampler that was distilled: give the teacher it had"):
        load_teacher(str(run / "pipeline"))
    with pytest.raises(ValueError, match="was trained with another teacher, of other weights, noise levels or size"):
        distil(tmp_path / "next", init_from=run)
    with pytest.raises(ValueError, match="HSIVIPipeline draws with a UNet2DModel alone"):
        HSIVIPipeline.from_pretrained(run / "pipeline")
