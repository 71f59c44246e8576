"""The captioned emoji, their autoencoder and their text-to-image teacher, on glyphs of noise."""

import re

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

from hsivi_diffusers import load_teacher
from training.benchmarks.images import sets
from training.benchmarks.text import bench_step, captions, train_text_teacher, train_vae

TONES = ["light", "medium", "dark"]
TEXTS = [*(f"{who}: {tone} skin tone" for who in ("man", "woman", "hand") for tone in TONES), "red apple", "cat"]
TRAIN = ["--max_train_steps=2", "--train_batch_size=4", "--lr_warmup_steps=1"]


@pytest.fixture(scope="module")
def glyphs():
    with pytest.MonkeyPatch.context() as patched:
        images = torch.randint(256, (len(TEXTS), 3, 16, 16), dtype=torch.uint8, generator=torch.Generator())
        for module in (train_vae, train_text_teacher):
            patched.setattr(module, "load_captioned", lambda resolution: (images, TEXTS))
        patched.setattr(train_text_teacher, "hold_out", lambda texts: captions.hold_out(texts, 2))
        yield


@pytest.fixture(scope="module")
def vae(glyphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    train_vae.main([*TRAIN, "--resolution=16", "--block_out_channels", "8", "8", f"--output_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def teach(vae, tmp_path_factory):
    def run(*words):
        folder = tmp_path_factory.mktemp("teacher") / "teacher"
        sizes = ["--block_out_channels", "8", "16", "--text_width=8", "--text_layers=1", "--tokens=8"]
        train_text_teacher.main([*TRAIN, *sizes, f"--vae={vae}", f"--output_dir={folder}", *words])
        return folder

    return run


def test_the_latents_of_the_autoencoder_have_a_std_of_1(vae):
    kept = AutoencoderKL.from_pretrained(vae)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
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
    assert images.shape == (2, 16, 16, 3)
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
def test_more_than_two_thousand_emoji_have_a_name():
    images, texts = captions.load_captioned(16)
    assert len(images) == len(texts) > 2000
    assert len(captions.hold_out(texts)[1]) == 50


def test_the_cost_of_an_update_is_held_against_its_calls(text_teachers, fresh_accelerator, capsys):
    given = [f"--teacher={text_teachers('sd')}", "--lora_rank=2", "--train_batch_size=2", "--repetitions=1"]
    bench_step.main(given)
    pattern = r"an update (\S+) s, its (\d+) calls, (\d+) with a gradient, (\S+) s: (\S+)"
    told = re.search(pattern, capsys.readouterr().out)
    # Five draws of the student, the first with a gradient, an answer of the critic to each, two of the guided teacher.
    assert [told[2], told[3]] == ["12", "6"]
    assert all(float(told[place]) > 0 for place in (1, 4, 5))
