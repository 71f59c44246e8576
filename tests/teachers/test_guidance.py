"""Classifier-free guidance distilled into a student: the teacher's score, runs, pipelines, commands."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from hsivi_diffusers import HSIVIConfig, HSIVIPipeline, HSIVIScheduler, HSIVITrainer, TeacherBridge
from hsivi_diffusers.commands import cli, evaluate
from hsivi_diffusers.distillation import progress, state, updates
from hsivi_diffusers.distillation.config import read_settings
from hsivi_diffusers.distillation.networks import carry_over, make_networks
from hsivi_diffusers.distillation.pairs import follow_ode
from hsivi_diffusers.distillation.progress import Progress
from hsivi_diffusers.runs.artifacts import read_run
from hsivi_diffusers.share.card import make_card
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.loading import load_teacher
from hsivi_diffusers.teachers.pixels import Pixels
from hsivi_diffusers.teachers.teacher import Teacher
from short_run import SETTINGS, train
from slow import others_slow
from tiny_unet import make_unet

GRID = [440, 220, 10]
QUICK = {"max_train_steps": 1, "critic_updates": 1, "lr_warmup_steps": 0}
NONE = 3  # the last of four labels


@pytest.fixture
def pipeline():
    return DDPMPipeline(unet=make_unet(num_class_embeds=4), scheduler=DDPMScheduler())


@pytest.fixture
def teacher():
    unet = make_unet(num_class_embeds=4).eval().requires_grad_(False)
    return Pixels(unet, HSIVIScheduler(), (1, 8, 8), 4)


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    monkeypatch.setattr(updates, "PAIR_STEPS", 2)
    monkeypatch.setattr(progress, "TEACHER_STEPS", 2)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The trainer of a finished run of two scales, with its teacher."""
    teacher = DDPMPipeline(unet=make_unet(num_class_embeds=4), scheduler=DDPMScheduler())
    return teacher, train(teacher, tmp_path_factory.mktemp("several") / "run", guidance_scale=[1.0, 3.0], **QUICK)


@pytest.mark.parametrize("scales", [[3.0], [1.0, 2.0, 5.0]])
def test_the_guided_teacher_is_none_plus_w_times_class_minus_none(teacher, scales):
    x, time, places = torch.randn(6, 1, 8, 8), torch.full((6,), 300), torch.arange(6) % len(scales)
    classes = torch.tensor([0, 1, 2, 2, 1, 0])
    of_class, of_none = (
        teacher.network(x, time, class_labels=label).sample for label in (classes, torch.full((6,), NONE))
    )
    w = torch.tensor(scales)[places].reshape(6, 1, 1, 1)
    guided = Guided(teacher, scales)(x, time, classes * len(scales) + places)
    torch.testing.assert_close(guided, of_none + w * (of_class - of_none))


@pytest.mark.parametrize("together", [False, True])
def test_decaying_guidance_is_whole_without_noise_and_none_from_its_end_on(teacher, together):
    x, condition, scales = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), [1.0, 3.0]
    decaying = Guided(teacher, scales, end=400)
    for time, share in ((0, 1.0), (100, 0.75), (300, 0.25), (400, 0.0), (900, 0.0)):
        times = torch.tensor(time) if together else torch.full((4,), time)
        wanted = Guided(teacher, [1 + share * (w - 1) for w in scales])(x, times, condition)
        torch.testing.assert_close(decaying(x, times, condition), wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    ("interval", "times", "scales", "calls"),
    [
        ((0, 999), 300, [3.0] * 4, 2),
        ((300, 300), 300, [3.0] * 4, 2),
        ((301, 999), 300, [1.0] * 4, 1),
        ((0, 299.5), 300, [1.0] * 4, 1),
        ((200, 400), [100, 200, 400, 401], [1.0, 3.0, 3.0, 1.0], 2),
        ((200, 400), [100, 199, 500, 401], [1.0] * 4, 1),
    ],
)
def test_outside_its_interval_there_is_no_guidance_and_one_call(teacher, interval, times, scales, calls):
    x, condition, times = torch.randn(4, 1, 8, 8), torch.arange(4), torch.tensor(times)
    wanted = torch.cat(
        [
            Guided(teacher, [w])(x[row, None], time, condition[row, None])
            for row, (w, time) in enumerate(zip(scales, times.expand(4), strict=True))
        ]
    )
    seen = []
    teacher.network.register_forward_hook(lambda *_: seen.append(1))
    found = Guided(teacher, [5.0, 3.0], interval=interval)(x, times, 2 * condition + 1)  # of the second scale
    torch.testing.assert_close(found, wanted)
    assert len(seen) == calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_guidance_is_computed_in_the_precision_of_x(dtype):
    """Of a network in half precision: 1 for the class, 0 for none."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(1, dtype=dtype))

        def forward(self, x, time, class_labels):
            assert x.dtype == dtype
            return (class_labels != NONE).to(x)[:, None, None, None] * self.one.expand(x.shape)

    teacher = Teacher(Two(), HSIVIScheduler(), (1, 8, 8), 4)
    found = Guided(teacher, [7.5], end=440)(torch.zeros(1, 1, 8, 8), torch.tensor([323]), torch.tensor([0]))
    assert found[0, 0, 0, 0] == torch.tensor(1 + 6.5 * (1 - 323 / 440))


@pytest.mark.parametrize(("scales", "calls", "classes"), [(None, 1, 4), (3.0, 2, 3), ([1.0, 2.0, 5.0], 2, 3)])
def test_the_score_of_the_bridge_is_that_of_the_guided_teacher_in_two_calls(teacher, scales, calls, classes):
    seen, scheduler = [], HSIVIScheduler(layer_timesteps=GRID, noise_eta=1.0, guidance_scale=scales)
    bridge = TeacherBridge(teacher, scheduler, decay_guidance=scales is not None)
    x, level = torch.randn(6, 1, 8, 8), torch.tensor([10, 100, 300, 500, 700, 800])
    condition = torch.arange(6) % (3 * len(bridge.scales))
    output = Guided(teacher, bridge.scales, GRID[0])(x, level, condition)
    _, sigma = scheduler.alpha_sigma(level, x)
    teacher.network.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(bridge.score(x, level, condition), -output / sigma, rtol=1e-3, atol=1e-4)
    assert (len(seen), bridge.num_classes) == (calls, classes)


def test_the_guidance_of_a_bridge_ends_where_its_highest_grid_starts(teacher):
    scheduler = HSIVIScheduler(layer_timesteps=[[200, 10], [440, 220, 10]], noise_eta=1.0, guidance_scale=3.0)
    ends = [TeacherBridge(teacher, scheduler, decay_guidance=decays).guidance_end for decays in (True, False)]
    assert ends == [440, None]
    options = {"prediction_type": "flow_prediction", "shift": 3.0, "guidance_scale": 3.0}
    flow = HSIVIScheduler(layer_timesteps=[999, 500, 10], **options)
    bridge = TeacherBridge(Pixels(teacher.network, flow, (1, 8, 8), 4), flow, decay_guidance=True)
    assert bridge.guidance_end == 1000  # a time of the network
    x, sigma = torch.randn(2, 1, 8, 8), flow.alpha_sigma(torch.tensor([500]), torch.zeros(1))[1].item()
    given = x, 1000 * torch.tensor([sigma, sigma]), torch.tensor([0, 2])
    torch.testing.assert_close(bridge.guided(*given), Guided(teacher, [3 - 2 * sigma])(*given))


@pytest.mark.parametrize("decays", others_slow([True, False], True))
def test_pairs_and_the_row_of_the_teacher_have_the_guidance_of_the_training(pipeline, tmp_path, decays, monkeypatch):
    ends = []

    def note(guided, *given, **named):
        ends.append(guided.end)
        return follow_ode(guided, *given, **named)

    for module in (progress, state):
        monkeypatch.setattr(module, "follow_ode", note)
    more = {**QUICK, "num_pairs": 8, "num_inference_steps": 1, "validation_steps": 1, "decay_guidance": decays}
    trainer = train(pipeline, tmp_path / "run", guidance_scale=3.0, **more)
    (start, *_) = trainer.pipeline.scheduler.trained_grids[0]
    assert ends == [start if decays else None] * 2
    assert read_settings(tmp_path / "run" / "options.json")["decay_guidance"] == decays
    card = str(make_card(trainer.pipeline, "alice/student", read_run(tmp_path / "run")))
    assert ("scale 3, decreased with noise during training, is distilled" in card) == decays


def test_a_student_of_several_scales_starts_farther_from_no_class_the_larger_the_scale(teacher):
    config = HSIVIConfig(num_inference_steps=2, guidance_scale=[5.0, 1.0])
    networks = make_networks(teacher, teacher.network, teacher.network, config)
    assert networks.scheduler.config.guidance_scale == [1.0, 5.0]
    x, classes = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, NONE])
    farther, old = copy.deepcopy(teacher.network), teacher.network.class_embedding.weight
    farther.class_embedding.weight = nn.Parameter(old[NONE] + 2 * (old - old[NONE]))
    for network in (networks.student, networks.critic):
        for place, same in enumerate((teacher.network, farther)):
            wanted = same(x, 100, class_labels=classes).sample
            torch.testing.assert_close(network(x, 100, class_labels=2 * classes + place).sample, wanted)


@pytest.mark.parametrize(("scales", "steps"), [(3.0, 2), ([1.0, 3.0], 1)])
def test_a_guided_student_is_trained_and_draws_at_its_scale(pipeline, tmp_path, steps, scales):
    options = {**QUICK, "num_inference_steps": steps, "num_pairs": 0 if steps == 2 else 8, "validation_steps": 1}
    train(pipeline, tmp_path / "run", guidance_scale=scales, **options)
    student = HSIVIPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert (student.num_classes, student.scheduler.config.guidance_scale) == (3, scales)

    def draw(**given):
        generator = torch.Generator().manual_seed(0)
        return student(3, generator, class_labels=[0, 1, 2], output_type="np", **given).images

    assert draw(guidance_scale=3).shape == (3, 8, 8, 1)
    assert (draw() == draw(guidance_scale=3)).all() != isinstance(scales, list)
    with pytest.raises(ValueError, match=r"guidance_scale=2.* was trained with"):
        draw(guidance_scale=2)
    with pytest.raises(ValueError, match="the classes of this unet are 0 to 2"):
        student(1, class_labels=[3])


def test_classes_are_trained_by_their_shares(pipeline, tmp_path):
    options = {"guidance_scale": [1.0, 3.0], "class_shares": [2, 0, 1], "output_dir": str(tmp_path / "run")}
    state = HSIVITrainer(pipeline, HSIVIConfig(**SETTINGS, **options)).state
    drawn = state.sample_condition(6000, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=6) / len(drawn)  # of class * 2 + scale
    assert counts.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 6, 1 / 6], abs=0.02)
    assert Progress(state)._conditions.tolist() == [0, 4] * 4


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (4, {"class_shares": [1.0, 1.0]}, "class_shares has 2 numbers, and the teacher 3 classes: give as many"),
        (None, {}, "guidance_scale was given, and the teacher has no class labels"),
    ],
)
def test_what_is_refused(tmp_path, classes, options, message):
    pipeline = DDPMPipeline(unet=make_unet(num_class_embeds=classes), scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match=message):
        train(pipeline, tmp_path / "run", guidance_scale=2.0, **options)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_same_several_scales_alone(several, tmp_path):
    pipeline, run = several[0], several[1].config.output_dir
    for other in ([1.0, 7.0], 3.0, None):
        with pytest.raises(ValueError, match=r"was trained with guidance_scale=\[1.0, 3.0\], and the new run has"):
            train(pipeline, tmp_path / "other", guidance_scale=other, init_from=run)
    teacher = load_teacher(pipeline)
    config = HSIVIConfig(num_inference_steps=1, guidance_scale=[1.0, 3.0])
    networks = make_networks(teacher, teacher.network, teacher.network, config)
    carry_over(networks, Path(run))
    saved = UNet2DModel.from_pretrained(run, subfolder="critic")
    assert torch.equal(networks.critic.class_embedding.weight, saved.class_embedding.weight)


def test_a_guided_student_is_measured_against_guided_solvers_of_two_calls_a_step(pipeline, tmp_path, extractor):
    pipeline.save_pretrained(tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "run", guidance_scale=3.0, **QUICK)
    sizes = ["--num_samples=20", "--reference_samples=20", "--reference_steps=2", "--ddpm_steps=3", "--ddim_steps=0"]
    evaluate.main([f"--run_dir={tmp_path / 'run'}", f"--feature_extractor={extractor}", *sizes, "--solver_steps=2"])
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert {(row["method"], row["nfe"]) for row in rows} >= {("HSIVI", 2), ("DDIM", 4), ("UniPC", 4), ("DDPM", 6)}
    assert next(row["grid"] for row in rows if row["method"] == "HSIVI").endswith("; guidance 3.0")
    assert {row["nfe"] for row in rows if row["method"] == "DDIM"} == {4}


def test_solvers_are_compared_at_the_calls_of_the_student(teacher):
    scheduler = HSIVIScheduler(layer_timesteps=[600, 400, 200, 100, 0], guidance_scale=[1.0, 3.0])
    student = HSIVIPipeline(teacher.network, scheduler)
    for scale, calls in ((3.0, 2), (None, 1)):
        options = evaluate.Evaluation(guidance_scale=scale, ddpm_steps=0, ddim_steps=0)
        guided = Guided(teacher, [evaluate.scale_of(options, student)])
        rows = list(evaluate.make_samplers(options, student, guided))
        assert {nfe for method, nfe, *_ in rows if method == "DDIM"} == {4, 8}
        assert {solver.num_steps * calls for _, _, solver, _ in rows[1:]} == {4, 8}


def test_the_command_samples_with_the_scale_asked_for_and_the_card_names_the_scales(several, tmp_path, capsys):
    student = several[1].pipeline
    text = make_card(student, "user/name", {"options": {}, "training": {}, "report": {}}).text
    assert "scale 1 or 3" in text
    assert "guidance_scale=3.0" in text
    nn.init.normal_(student.unet.class_embedding.weight, std=5.0)  # so that the scale shows
    student.save_pretrained(tmp_path / "student")
    common = ["sample", f"--pipeline={tmp_path / 'student'}", "--num_samples=3"]
    cli.main([*common, f"--output_dir={tmp_path / 'low'}"])
    cli.main([*common, f"--output_dir={tmp_path / 'high'}", "--guidance_scale=3"])
    low, high = ((tmp_path / name / "00000.png").read_bytes() for name in ("low", "high"))
    assert low != high
    with pytest.raises(SystemExit):
        cli.main([*common, f"--output_dir={tmp_path / 'none'}", "--guidance_scale=2"])
    assert "guidance_scale=2.0: this sampler was trained with" in capsys.readouterr().err.replace("--", "")
    assert not (tmp_path / "none").exists()
