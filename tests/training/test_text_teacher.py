"""The captioned emoji, their autoencoder and their text-to-image teacher, on glyphs of noise."""

import importlib
import json
import re

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

from hsivi_diffusers import cli, load_teacher
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from training.benchmarks.images import benchmark, captions, sets, trainings
from training.benchmarks.images.benchmark_pages import measures_table
from training.benchmarks.images.benchmark_results import (
    LATENT_CONSISTENCY,
    NO_LORA,
    OURS,
    REAL,
    SOLVER,
    TEACHER,
    TEACHER_SDE,
    read_rows,
)
from training.benchmarks.images.goals import goals_table
from training.benchmarks.images.spaces import CaptionMeasures
from training.benchmarks.text import bench_step, train_scorer, train_text_teacher, train_vae

TONES = ["light", "medium", "dark"]
TEXTS = [*(f"{who}: {tone} skin tone" for who in ("man", "woman", "hand") for tone in TONES), "red apple", "cat"]
TEXTS_OF_MANY = [f"{number}: {tone} skin tone" for number in range(300) for tone in TONES]
READ_NAMES = captions.read_names
TRAIN = ["--max_train_steps=2", "--train_batch_size=4", "--lr_warmup_steps=1"]


@pytest.fixture(scope="module")
def glyphs():
    with pytest.MonkeyPatch.context() as patched:
        images = torch.randint(256, (len(TEXTS), 3, 4, 4), dtype=torch.uint8, generator=torch.Generator())
        images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
        points = range(65, 65 + len(TEXTS))
        patched.setattr(captions, "read_names", lambda: dict(zip(map(chr, points), TEXTS, strict=True)))
        patched.setattr(captions, "read_emoji", lambda: {bytes([point]): (point,) for point in points})
        patched.setattr(captions, "load_images", lambda *given: (images, None))
        patched.setattr(captions, "HELD_OUT", 2)
        patched.setattr(captions, "DRAWN", 8)
        yield


@pytest.fixture(scope="module")
def vae(glyphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    train_vae.main([*TRAIN, "--resolution=32", "--block_out_channels", "8", "8", "8", f"--output_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def teach(vae, tmp_path_factory):
    def run(*words):
        folder = tmp_path_factory.mktemp("teacher") / "teacher"
        sizes = ["--block_out_channels", "8", "16", "--text_width=8", "--text_layers=1", "--tokens=8"]
        train_text_teacher.main([*TRAIN, *sizes, f"--vae={vae}", f"--output_dir={folder}", *words])
        return folder

    return run


@pytest.fixture(scope="module")
def scorer(glyphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "scorer"
    sizes = ["--resolution=32", "--num_features=32", "--num_halvings=0", "--train_batch_size=16"]
    train_scorer.main([*sizes, "--max_train_steps=200", f"--output_dir={folder}"])
    return folder


def call(program, given):
    """Runs a program in this process."""
    if program == trainings.DISTIL:
        cli.distil(given)
    else:
        importlib.import_module(program).main(given)


def test_the_latents_of_the_autoencoder_have_a_std_of_1(vae):
    kept = AutoencoderKL.from_pretrained(vae)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert kept.encode(images).latent_dist.mode().shape == (8, 4, 8, 8)
    factor = train_vae.scaling_factor(kept, images)
    kept.register_to_config(scaling_factor=factor)
    mean, _ = train_text_teacher.encode(kept, images)
    assert float(mean.std()) == pytest.approx(1, rel=1e-5)


def test_the_teacher_is_a_stock_pipeline_and_a_function_of_its_seed(teach):
    folder = teach()
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["cat", "a red apple"], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    network, schedule = load_teacher(str(folder))
    assert (network.config.sample_size, schedule.config.prediction_type) == (8, "v_prediction")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for seed, same in ((0, True), (1, False)):
        other = load_file(teach(f"--seed={seed}") / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(weight, other[name]) for name, weight in weights.items()) == same


def test_a_token_is_a_word_and_a_new_one_is_unknown():
    tokenizer = train_text_teacher.make_tokenizer(TEXTS, 8)
    assert tokenizer.decode(tokenizer("Red cat").input_ids) == "[start] red cat [end]"
    assert tokenizer.unk_token_id in tokenizer("a dragon").input_ids
    assert len(tokenizer("man: light skin tone, red apple and more", truncation=True).input_ids) == 8


def test_what_is_held_out_is_a_new_combination_of_what_is_trained():
    rows, held = captions.hold_out(TEXTS, 3)
    assert sorted([*rows, *held]) == list(range(len(TEXTS)))
    trained = " ".join(TEXTS[row] for row in rows)
    for row in held:
        who, tone = TEXTS[row].split(":")
        assert who in trained
        assert tone in trained
    assert len({TEXTS[row].split(":")[0] for row in held}) == 3
    with pytest.raises(ValueError, match="3 captions can be held out, and 4 were asked for"):
        captions.hold_out(TEXTS, 4)


def test_names_and_images_are_joined_by_their_code_points(tmp_path, monkeypatch):
    for folder, point, name in (("annotations", "\u2764", "red heart"), ("annotationsDerived", "\U0001f44b", "wave")):
        (tmp_path / folder).mkdir()
        lines = f'<annotation cp="{point}">x | y</annotation><annotation cp="{point}" type="tts">{name}</annotation>'
        text = f"<ldml><annotations>{lines}</annotations></ldml>"
        (tmp_path / folder / "en.xml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(captions, "read_names", READ_NAMES)
    monkeypatch.setattr(captions, "CLDR", tmp_path)
    images = torch.arange(3)[:, None, None, None].expand(3, 3, 4, 4)
    monkeypatch.setattr(captions, "load_images", lambda *given: (images, None))
    points = {b"a": (0x1F44B,), b"b": (0x41,), b"c": (0x2764, 0xFE0F)}
    monkeypatch.setattr(captions, "read_emoji", lambda: points)
    found, texts = captions.load_captioned(4)
    assert (texts, found[:, 0, 0, 0].tolist()) == (["wave", "red heart"], [0, 2])
    (tmp_path / "annotations" / "en.xml").unlink()
    with pytest.raises(ValueError, match="is missing: install the package unicode-cldr-core"):
        captions.load_captioned(4)


def test_the_autoencoder_must_be_named(tmp_path):
    with pytest.raises(ValueError, match="--vae is missing: give the folder of an autoencoder"):
        train_text_teacher.main([f"--output_dir={tmp_path / 'teacher'}"])


@pytest.mark.skipif(
    not (sets.EMOJI_FONT.is_file() and captions.CLDR.is_dir()), reason="needs fonts-noto-color-emoji, unicode-cldr-core"
)
def test_more_than_two_thousand_emoji_have_a_name(monkeypatch):
    monkeypatch.setattr(captions, "read_names", READ_NAMES)
    monkeypatch.setattr(captions, "read_emoji", sets.read_emoji)
    monkeypatch.setattr(captions, "load_images", sets.load_images)
    images, texts = captions.load_captioned(16)
    assert len(images) == len(texts) > 2000
    assert len(captions.hold_out(texts, 50)[1]) == 50


def test_the_cost_of_an_update_is_held_against_its_calls(text_teachers, fresh_accelerator, capsys):
    given = [f"--teacher={text_teachers('sd')}", "--lora_rank=2", "--train_batch_size=2", "--repetitions=1"]
    bench_step.main(given)
    pattern = r"an update (\S+) s, its (\d+) calls, (\d+) with a gradient, (\S+) s: (\S+)"
    told = re.search(pattern, capsys.readouterr().out)
    # Five draws of the student, the first with a gradient, an answer of the critic to each, two of the guided teacher.
    assert [told[2], told[3]] == ["12", "6"]
    assert all(float(told[place]) > 0 for place in (1, 4, 5))


# ----- the benchmark -----


def test_a_benchmark_draws_what_is_held_out_first_and_the_same_captions_each_time():
    held, trained = captions.choose(TEXTS_OF_MANY)
    assert (len(held), len(trained)) == (captions.HELD_OUT, captions.DRAWN - captions.HELD_OUT)
    assert captions.choose(TEXTS_OF_MANY) == (held, trained)
    assert not {*held} & {*trained}


def test_the_scorer_finds_the_caption_of_a_changed_image(scorer):
    """Coloured squares are easily told apart, so a short training does."""
    network = ImageClassifier.from_pretrained(scorer)
    images = captions.load_captioned(32)[0].float() / 255
    torch.manual_seed(1)
    assert train_scorer.found(network, images, torch.arange(len(TEXTS))) > 0.8
    assert train_scorer.change(images).shape == images.shape


def test_white_stays_white_where_an_image_is_moved():
    torch.manual_seed(0)
    white = train_scorer.change(torch.ones(64, 3, 16, 16))
    assert float(white.mean()) > 0.95
    assert float(white.min()) >= 0


def test_retrieval_is_among_the_held_out_captions_and_diversity_of_one_caption():
    class Scorer(torch.nn.Module):
        def logits(self, images):
            """The class of an image is its first pixel, and caption 9, which is not held out, is the best of all."""
            return 5 - (torch.arange(10) - images[:, 0, 0, :1] * 10).abs() + 9 * (torch.arange(10) == 9)

    images = torch.zeros(6, 3, 8, 8)
    images[:4, 0, 0, 0] = torch.tensor([0.4, 0.7, 0.4, 0.4])
    asked = torch.tensor([0, 1, 0, 1, 2, 2])
    measured = CaptionMeasures(Scorer(), [4, 7])(images, asked)
    assert measured["retrieval"] == 0.75
    assert measured["diversity"] > 0
    images[3] = images[1]
    assert CaptionMeasures(Scorer(), [4, 7])(images, asked) == {"retrieval": 1, "diversity": 0}


def test_the_benchmark_of_captions(teach, scorer, tmp_path, monkeypatch):
    """A LoRA, a whole copy and an LCM-LoRA of the same cost, beside the guided teacher and a solver of two steps."""
    monkeypatch.setattr(trainings, "call", call)
    monkeypatch.setattr(benchmark, "write_pages", lambda folder: None)  # figures take most of the time
    teacher = teach()
    assert (teacher / "prompts.txt").read_text().split("\n")[:-1] == [
        TEXTS[row] for row in captions.hold_out(TEXTS, 2)[0]
    ]
    student, lcm = tmp_path / "student.yaml", tmp_path / "lcm.yaml"
    sizes = "num_inference_steps: 1\nmax_train_steps: 1\ntrain_batch_size: 2\ncritic_updates: 1\nlora_rank: 2\n"
    student.write_text(f"prompts: {teacher / 'prompts.txt'}\nguidance_scale: 4\n{sizes}")
    lcm.write_text("method: lcm_lora\ntrain_data: captions\ntrain_batch_size: 2\nlora_rank: 2\n")
    tuned = {"dataset": "captions", "solver": "UniPC", "calls": 4, "settings": {"timesteps": [900, 300]}}
    tuned["tuned"] = dict.fromkeys(("classifier", "EfficientNet", "pixels"), 1.0)
    (tmp_path / "solvers.json").write_text(json.dumps({"rows": [tuned]}))
    benchmark.main(
        [
            *["--dataset=captions", "--real_data=captions", f"--teacher={teacher}", f"--classifier={scorer}"],
            *["--students", str(student), f"{student} --lora_rank 0", f"--lcm_lora={lcm}", "--baseline_steps=1"],
            *["--seeds=0", "--guidance_scale=4", "--teacher_steps=6", "--num_samples=16", "--batch_size=16"],
            *[f"--solvers={tmp_path / 'solvers.json'}", f"--output_dir={tmp_path / 'docs'}"],
            f"--runs_dir={tmp_path / 'runs'}",
        ]
    )
    found = read_rows(tmp_path / "docs" / "results.json")
    rows = {(row["method"], row["nfe"]): row for row in found}
    assert rows.keys() == {
        (REAL, 0),
        (TEACHER, 6),
        (TEACHER_SDE, 6),
        (SOLVER, 4),
        (OURS, 1),
        (NO_LORA, 1),
        (LATENT_CONSISTENCY, 1),
    }
    assert rows[REAL, 0]["retrieval"] == 1
    assert rows[REAL, 0]["diversity"] == 0  # each has one image
    assert all(row["diversity"] > 0 for (method, _), row in rows.items() if method != REAL)
    assert rows[LATENT_CONSISTENCY, 1]["train_calls"] >= rows[OURS, 1]["train_calls"] > 0
    heads = measures_table(found).split("\n")[0]
    assert "retrieval" in heads
    assert "class TV" not in heads
    goals = goals_table(found)
    for words in ("1.25 of HSIVI, no LoRA at 1", "1/1.5 of LCM-LoRA at 1"):
        assert words in goals
