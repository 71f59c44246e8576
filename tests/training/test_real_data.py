"""Settings on trial: levels, the critic's target, and real data."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler, TeacherBridge, load_teacher
from hsivi_diffusers.distillation import plan
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.plan import Cost, measure, read_configs
from hsivi_diffusers.distillation.student import UNetDiscriminator
from hsivi_diffusers.distillation.trials import Trials, load_data
from hsivi_diffusers.distillation.updates import make_objective
from hsivi_diffusers.images import load_images, to_model_range
from hsivi_diffusers.model_card import make_card
from hsivi_diffusers.vi import Adversarial, KullbackLeibler, ScoreMatching
from tiny_unet import make_unet

GAME = {"train_data": "digits", "adversarial_weight": 0.01}
KINDS = {
    "game": GAME,
    "shared": {
        **GAME,
        "preset": "paper",
        "scoring": "random",
        "teacher_share": 0.5,
        "num_inference_steps": (1, 2),
    },
}


@pytest.fixture(scope="module")
def runs(distil, tmp_path_factory):
    """Finished runs with real data, by kind: to be read, not written to."""
    folders = tmp_path_factory.mktemp("runs")
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = distil(folders / kind, **KINDS[kind])
        return made[kind]

    return run


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory):
    """A teacher of random weights for the ten classes of the digits."""
    folder = tmp_path_factory.mktemp("digits_teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = make_unet(num_class_embeds=10)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


# ----- the options reach the core -----


def test_the_objective_has_the_share_and_the_adversarial_term(teacher):
    unet, schedule = load_teacher(str(teacher))
    bridge = TeacherBridge(unet, HSIVIScheduler.from_config(schedule.config, layer_timesteps=[440, 220, 0]))
    plain = make_objective(HSIVIConfig(objective="KL", trials=Trials(teacher_share=0.5)), bridge)
    assert (type(plain), plain.teacher_share) == (KullbackLeibler, 0.5)
    both = make_objective(
        HSIVIConfig(preset="paper", trials=Trials(teacher_share=0.3, adversarial_weight=0.01)), bridge
    )
    assert (type(both), both.weight, both.teacher_share) == (Adversarial, 0.01, 0.3)
    assert type(both.objective) is ScoreMatching


def test_the_bridge_has_the_power_and_the_data_and_the_critic_answers_with_logits(make_state):
    made = make_state(level_power=2.0, **GAME)
    assert made.bridge.level_power == 2.0
    assert isinstance(made.critic, UNetDiscriminator)
    assert made.bridge.sample(torch.tensor([0, 0, 0])).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    "settings",
    [{"level_power": 3.0}, {"teacher_share": 0.5}, "game"],
    ids=lambda settings: settings if isinstance(settings, str) else next(iter(settings)),
)
def test_each_setting_changes_the_run(runs, distil, fast_run, tmp_path, differences, settings):
    folder = runs(settings) if isinstance(settings, str) else distil(tmp_path / "run", preset="fast", **settings)
    changed = differences(folder, fast_run)
    assert any(name.startswith("pipeline/unet") for name in changed)


# ----- runs -----


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_real_data_is_finite_and_records_it(runs, kind):
    folder = runs(kind)
    for path in (folder / "pipeline").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    options = json.loads((folder / "options.json").read_text())
    assert options["train_data"] == "digits"


def test_the_card_says_whether_data_was_used(runs, fast_run):
    kinds = (
        (runs("game"), "with", "Real images of its training data were used too."),
        (fast_run, "without", "No images were used."),
    )
    for folder, said, sentence in kinds:
        run = {"options": json.loads((folder / "options.json").read_text()), "training": {}, "report": {}}
        card = make_card(HSIVIPipeline.from_pretrained(folder / "pipeline"), "alice/digits", run)
        assert f" {said} training data" in card.text
        assert [told for *_, told in kinds if told in card.text] == [sentence]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_real_data_resumes_to_the_same_bits(runs, distil, tmp_path, differences, kind):
    """From the checkpoint after the 4th of 5 updates."""
    folder = shutil.copytree(runs(kind), tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-5")
    shutil.rmtree(folder / "pipeline")
    distil(folder, resume_from_checkpoint="latest", **KINDS[kind])
    assert differences(folder, runs(kind)) == []


def test_two_processes_with_real_data_equal_two_accumulated_batches(launch, distil, tmp_path, differences):
    """The adversarial critic is reduced between the processes, drawn and real rows in one call."""
    options = {"preset": "fast", "max_train_steps": 2, **GAME}
    statuses, text = launch(tmp_path / "two", processes=2, **options)
    assert statuses == [0, 0], text
    distil(tmp_path / "one", gradient_accumulation_steps=2, **options)
    assert differences(tmp_path / "two", tmp_path / "one") == []


def test_a_run_without_data_goes_on_with_one(runs, distil, fast_run, tmp_path):
    """The critic that is a discriminator has the weights of a plain one."""
    distil(tmp_path / "run", init_from=fast_run, max_train_steps=1, **GAME)
    distil(tmp_path / "back", init_from=runs("game"), max_train_steps=1)


# ----- the images -----


def test_images_are_drawn_evenly_and_by_the_generator(teacher):
    unet, _ = load_teacher(str(teacher))
    sample = load_data("digits", unet)
    real = to_model_range(load_images("digits", 8, 1)[0])
    drawn = sample(5000, None, torch.Generator().manual_seed(0))
    assert drawn.shape == (5000, 1, 8, 8)
    assert torch.equal(drawn[:9], sample(5000, None, torch.Generator().manual_seed(0))[:9])
    known = {image.numpy().tobytes() for image in real}
    assert {image.numpy().tobytes() for image in drawn} <= known
    torch.testing.assert_close(drawn.mean(0), real.mean(0), rtol=0, atol=0.05)


def test_a_conditional_teacher_gets_images_of_the_class_asked_for(digits_teacher):
    unet, _ = load_teacher(str(digits_teacher))
    sample = load_data("digits", unet)
    images, labels = load_images("digits", 8, 1)
    label_of = {}
    for image, label in zip(to_model_range(images), labels.tolist(), strict=True):
        label_of.setdefault(image.numpy().tobytes(), set()).add(label)
    asked = torch.arange(10).repeat(50)
    for image, label in zip(sample(500, asked, torch.Generator().manual_seed(0)), asked.tolist(), strict=True):
        assert label in label_of[image.numpy().tobytes()]


def test_a_conditional_teacher_trains_on_its_classes(distil, digits_teacher, tmp_path):
    folder = distil(tmp_path / "run", pretrained_teacher_model=digits_teacher, max_train_steps=2, **GAME)
    assert all(
        t.isfinite().all() for path in folder.glob("pipeline/unet/*.safetensors") for t in load_file(path).values()
    )


def test_data_without_the_classes_of_the_teacher_is_refused(distil, class_teacher, digits_teacher, tmp_path):
    message = r"has images of the classes \[0, 1, .*\], and the teacher is for 0 to 2, each of which it needs"
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", pretrained_teacher_model=class_teacher, **GAME)
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="tells no labels, and the teacher has 10 classes: take other data"):
        distil(tmp_path / "run", pretrained_teacher_model=digits_teacher, **{**GAME, "train_data": tmp_path})
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_will_do(distil, tmp_path):
    for grey in (0, 100, 255):
        Image.new("L", (16, 16), grey).save(tmp_path / f"{grey}.png")
    distil(tmp_path / "run", max_train_steps=1, **{**GAME, "train_data": tmp_path})


def test_a_teacher_whose_images_cannot_be_loaded_is_told():
    for shape in ({"in_channels": 2, "out_channels": 2}, {"sample_size": (8, 16)}):
        message = r"the teacher's images of \d x 8 x \d+ are not loaded: .* of 1 or 3 channels, or leave train_data out"
        with pytest.raises(ValueError, match=message):
            load_data("digits", make_unet(**shape))


# ----- what cannot run, and what it would cost -----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adversarial_weight": 0.01}, "adversarial_weight=0.01 needs real images"),
        ({"train_data": "digits"}, "train_data='digits' has no effect: set adversarial_weight too, or leave"),
        ({"teacher_share": 1.0}, "teacher_share=1.0: give a number from 0 to below 1"),
        ({"level_power": 0.0}, "level_power=0.0: give a number above 0"),
        ({"adversarial_weight": -0.1}, "adversarial_weight=-0.1: give a number from 0 on"),
        ({"preset": "paper", "level_min": 20}, "level_min=20 has no effect with scoring='own'"),
        ({"scoring": "own", "level_power": 2.0}, "level_power=2.0 has no effect with scoring='own'"),
        ({"start_spacing": 20}, "start_spacing=20 has no effect with one step count, 2: give several"),
        (
            {"preset": "paper", "start_spacing": 20},
            "start_spacing=20 needs start_timestep, start_signal or",
        ),
        ({"kernel": "renoise"}, "scoring='between' needs kernel='ddim', got 'renoise'"),
        ({"objective": "SM"}, "scoring='between' with objective='SM': .* set objective to 'KL', or scoring to 'random"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(distil, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", pretrained_teacher_model="nowhere", **settings)
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_no_images_and_counts_the_calls(make_config, tmp_path, fresh_accelerator):
    """The critic is asked for its layers' loss, and for drawn and real rows in its own; the teacher is in both."""
    config = make_config(critic_updates=1, **{**GAME, "train_data": "nowhere"}, teacher_share=0.5)
    # A plan goes through the layers of the networks one by one: here they are few.
    unet = make_unet(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    cost = measure(*read_configs(str(tmp_path), None), config)
    assert cost.calls == {"student": 1, "critic": 3, "teacher": 2}
    assert cost.parameters["each network"] == unet.num_parameters()


def test_a_plan_says_that_the_images_come_on_top(make_config, teacher, monkeypatch, capsys):
    cost = Cost({}, {}, {"student": 1.0}, flops=1e9, call_flops=1e9, written={})
    monkeypatch.setattr(plan, "measure", lambda *given: cost)
    monkeypatch.setattr(plan, "seconds_per_flop", lambda *given: (1e-9, "cpu"))
    plan.print_plan(str(teacher), make_config(**{**GAME, "train_data": "nowhere"}))
    assert "the images of train_data stay in main memory and come on top" in capsys.readouterr().out
