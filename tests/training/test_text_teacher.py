"""The captioned emoji, their autoencoder and their text-to-image teacher, on glyphs of noise."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

from hsivi_diffusers import load_teacher
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from short_run import call
from tiny_flows import make_flow
from tiny_text import make_text
from training.benchmarks.images import benchmark, captions, sets, train_baseline, trainings
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
from training.benchmarks.images.latent_consistency import LatentConsistency, load_latents
from training.benchmarks.images.spaces import CaptionMeasures
from training.benchmarks.text import bench_step, train_scorer, train_text_teacher, train_vae

ROOT = Path(__file__).parents[2]
TONES = ["light", "medium", "dark"]
TEXTS = [*(f"{who}: {tone} skin tone" for who in ("man", "woman", "hand") for tone in TONES), "red apple", "cat"]
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
        patched.setattr(captions, "EACH", 8)
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
def taught(teach):
    """The folder of a teacher, to be read."""
    return teach()


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def scorer(glyphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "scorer"
    sizes = ["--resolution=32", "--num_features=32", "--num_halvings=0", "--train_batch_size=16"]
    train_scorer.main([*sizes, "--max_train_steps=150", "--learning_rate=3e-3", f"--output_dir={folder}"])
    return folder


def test_the_latents_of_the_autoencoder_have_a_std_of_1(vae):
    kept = AutoencoderKL.from_pretrained(vae)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert kept.encode(images).latent_dist.mode().shape == (8, 4, 8, 8)
    factor = train_vae.scaling_factor(kept, images)
    kept.register_to_config(scaling_factor=factor)
    mean, _ = train_text_teacher.encode(kept, images)
    assert float(mean.std()) == pytest.approx(1, rel=1e-5)


def test_the_teacher_is_a_stock_pipeline_and_a_function_of_its_seed(teach, taught, same_tensors):
    pipeline = StableDiffusionPipeline.from_pretrained(taught)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["cat", "a red apple"], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    teacher = load_teacher(str(taught))
    assert (teacher.shape, teacher.schedule.config.prediction_type) == ((4, 8, 8), "v_prediction")
    for seed, same in ((0, True), (1, False)):
        assert same_tensors(weights(teach(f"--seed={seed}")), weights(taught)) == same


def test_a_teacher_goes_on_from_another_of_the_same_words(teach, taught, tmp_path, same_tensors):
    assert same_tensors(weights(teach(f"--init_from={taught}", "--learning_rate=0", "--seed=1")), weights(taught))
    other = shutil.copytree(taught, tmp_path / "other")
    words = other / "tokenizer" / "tokenizer.json"
    words.write_text(words.read_text().replace('"cat"', '"dog"'))
    with pytest.raises(ValueError, match="has other words than these captions: name another, or leave it out"):
        teach(f"--init_from={other}")


def test_a_token_is_a_word_and_a_new_one_is_unknown():
    tokenizer = train_text_teacher.make_tokenizer(TEXTS, 8)
    assert tokenizer.decode(tokenizer("Red cat").input_ids) == "[start] red cat [end]"
    assert tokenizer.unk_token_id in tokenizer("a dragon").input_ids
    assert len(tokenizer("man: light skin tone, red apple and more", truncation=True).input_ids) == 8


def test_what_is_held_out_is_a_new_combination_of_what_is_trained(monkeypatch):
    monkeypatch.setattr(captions, "HELD_OUT", 3)
    rows, held = captions.hold_out(TEXTS)
    assert sorted([*rows, *held]) == list(range(len(TEXTS)))
    trained = " ".join(TEXTS[row] for row in rows)
    for row in held:
        who, tone = TEXTS[row].split(":")
        assert who in trained
        assert tone in trained
    assert len({TEXTS[row].split(":")[0] for row in held}) == 3
    monkeypatch.setattr(captions, "HELD_OUT", 4)
    with pytest.raises(ValueError, match="3 captions can be held out, and 4 were asked for"):
        captions.hold_out(TEXTS)


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


@pytest.mark.skipif(
    not (sets.EMOJI_FONT.is_file() and captions.CLDR.is_dir()), reason="needs fonts-noto-color-emoji, unicode-cldr-core"
)
def test_more_than_two_thousand_emoji_have_a_name(monkeypatch):
    monkeypatch.setattr(captions, "read_names", READ_NAMES)
    monkeypatch.setattr(captions, "read_emoji", sets.read_emoji)
    monkeypatch.setattr(captions, "load_images", sets.load_images)
    images, texts = captions.load_captioned(16)
    assert len(images) == len(texts) > 2000
    monkeypatch.setattr(captions, "HELD_OUT", 50)
    assert len(captions.hold_out(texts)[1]) == 50


@pytest.mark.parametrize("make", [partial(make_text, "sd"), partial(make_flow, "sd3")], ids=["sd", "sd3"])
def test_the_cost_of_an_update_is_held_against_its_calls(make, fresh_accelerator, tmp_path, capsys):
    make().save_pretrained(tmp_path)
    bench_step.main([f"--teacher={tmp_path}", "--lora_rank=2", "--train_batch_size=2", "--repetitions=1"])
    pattern = r"an update (\S+) s, its (\d+) calls, (\d+) with a gradient, (\S+) s: (\S+)"
    told = re.search(pattern, capsys.readouterr().out)
    # Five draws of the student, the first with a gradient, an answer of the critic to each, two of the guided teacher.
    assert [told[2], told[3]] == ["12", "6"]
    assert all(float(told[place]) > 0 for place in (1, 4, 5))


# ----- the benchmark -----


def test_a_benchmark_draws_what_is_held_out_first_and_then_words_of_many_images(glyphs):
    held, prompts, rows = captions.choose(TEXTS)
    assert prompts == [*(TEXTS[row] for row in held), "skin", "tone"]
    assert captions.choose(TEXTS) == (held, prompts, rows)
    assert len(rows) == captions.EACH * len(prompts)
    for place, row in enumerate(rows):
        assert prompts[place % 4] in TEXTS[row]
        assert (row in held) == (place % 4 < 2)
    assert len({*rows[2::4]}) == 7  # of a word all images are there


def test_a_prompt_is_a_caption_or_a_word_of_several_and_nothing_that_is_held_out_is_trained(glyphs, monkeypatch):
    monkeypatch.setattr(captions, "SHARED", 3)
    trained, held = captions.hold_out(TEXTS)
    prompts, rows, numbers = captions.pair(TEXTS)
    assert prompts[: len(TEXTS)] == TEXTS
    assert {"skin", "tone"} < {*prompts[len(TEXTS) :]} < {"skin", "tone", *TONES, "man", "woman", "hand"}
    pairs = [*zip(rows.tolist(), (prompts[number] for number in numbers), strict=True)]
    assert len({*pairs}) == len(pairs)
    assert {row for row, _ in pairs} == {*trained}
    words = {row: {*TEXTS[row].replace(":", "").split()} & {*prompts[len(TEXTS) :]} for row in trained}
    assert {*pairs} == {(row, prompt) for row in trained for prompt in (TEXTS[row], *words[row])}
    assert not {prompt for _, prompt in pairs} & {TEXTS[row] for row in held}
    prompts, rows, numbers = captions.pair([*TEXTS, "Hand"])  # a caption that is a word
    assert [prompts[number] for number in numbers[rows == len(TEXTS)]] == ["hand"]


def test_the_scorer_finds_the_caption_of_a_changed_image(scorer):
    """Coloured squares are easily told apart, so a short training does."""
    network = ImageClassifier.from_pretrained(scorer)
    images = captions.load_captioned(32)[0].float() / 255
    torch.manual_seed(1)
    assert train_scorer.found(network, images, [0, 4], [1, 2, 3]) == 1
    assert train_scorer.found(network, images, list(range(len(TEXTS))), []) > 0.8
    assert train_scorer.change(images).shape == images.shape
    assert float(train_scorer.change(torch.ones(64, 3, 16, 16)).mean()) > 0.95  # white stays white


def test_retrieval_is_among_the_held_out_captions_and_diversity_of_one_caption():
    class Scorer(torch.nn.Module):
        def logits(self, images):
            """The class of an image is its first pixel, and caption 9, which is not held out, is the best of all."""
            return 5 - (torch.arange(10) - images[:, 0, 0, :1] * 10).abs() + 9 * (torch.arange(10) == 9)

    images = torch.zeros(6, 3, 8, 8)
    images[:4, 0, 0, 0] = torch.tensor([0.4, 0.7, 0.4, 0.4])
    images[5] = 1
    asked = torch.tensor([0, 1, 0, 1, 2, 2])
    measured = CaptionMeasures(Scorer(), [4, 7])(images, asked)
    assert measured["retrieval"] == 0.75
    assert measured["diversity"] > 0
    images[3], images[5] = images[1], images[4]
    assert CaptionMeasures(Scorer(), [4, 7])(images, asked) == {"retrieval": 1, "diversity": 0}
    assert CaptionMeasures(Scorer(), [4, 7], [9])(images, asked)["retrieval"] == 0  # a rival is put first


def test_the_rivals_of_a_caption_have_its_subject_and_another_tone():
    held = [TEXTS.index("man: light skin tone"), TEXTS.index("hand: dark skin tone")]
    others = ["man: medium skin tone", "man: dark skin tone", "hand: light skin tone", "hand: medium skin tone"]
    assert [TEXTS[row] for row in captions.rivals(TEXTS, held)] == others


@pytest.mark.slow  # three trainings and seven rows; the benchmark of images has the same steps
def test_the_benchmark_of_captions(taught, scorer, tmp_path, monkeypatch):
    """A LoRA, a whole copy and an LCM-LoRA of the same cost, beside the guided teacher and a solver of two steps."""
    monkeypatch.setattr(trainings, "call", call)
    monkeypatch.setattr(benchmark, "write_pages", lambda *folders: None)  # figures take most of the time
    student, lcm = tmp_path / "student.yaml", tmp_path / "lcm.yaml"
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS[row] for row in captions.hold_out(TEXTS)[0]))
    sizes = "num_inference_steps: 1\nmax_train_steps: 1\ntrain_batch_size: 2\ncritic_updates: 1\nvalidation_steps: 0\n"
    sizes += "num_pairs: 0\n"
    student.write_text(f"prompts: {tmp_path / 'prompts.txt'}\nguidance_scale: 4\n{sizes}")
    lcm.write_text("method: lcm_lora\ntrain_data: captions\ntrain_batch_size: 2\nlora_rank: 2\n")
    tuned = {"dataset": "captions", "solver": "UniPC", "calls": 4, "settings": {"timesteps": [900, 300]}}
    tuned["tuned"] = dict.fromkeys(("classifier", "EfficientNet", "pixels"), 1.0)
    (tmp_path / "solvers.json").write_text(json.dumps({"rows": [tuned]}))
    benchmark.main(
        [
            *["--dataset=captions", "--real_data=captions", f"--teacher={taught}", f"--classifier={scorer}"],
            *["--students", str(student), f"{student} --lora_rank 0", f"--lcm_lora={lcm}", "--baseline_steps=1"],
            *["--seeds=0", "--guidance_scale=4", "--teacher_steps=6", "--num_samples=8", "--batch_size=8"],
            *[f"--solvers={tmp_path / 'solvers.json'}", f"--output_dir={tmp_path / 'docs'}"],
            f"--runs_dir={tmp_path / 'runs'}",
        ]
    )
    found = read_rows(tmp_path / "docs" / "results.json")
    rows = {(row["method"], row["nfe"]): row for row in found}
    trained = {(OURS, 1), (NO_LORA, 1), (LATENT_CONSISTENCY, 1)}
    assert rows.keys() == {(REAL, 0), (TEACHER, 6), (TEACHER_SDE, 6), (SOLVER, 4)} | trained
    assert rows[REAL, 0]["retrieval"] == 1
    assert all(row["diversity"] > 0 for row in rows.values())
    assert rows[LATENT_CONSISTENCY, 1]["train_calls"] >= rows[OURS, 1]["train_calls"] > 0
    heads = measures_table(found).split("\n")[0]
    assert "retrieval" in heads
    assert "class TV" not in heads


def test_what_cannot_be_compared_is_refused_before_any_training(taught, scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "call", lambda *_: pytest.fail("something was trained"))
    (tmp_path / "solvers.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "baseline.yaml").write_text("method: lcm_lora\ntrain_data: captions\n")
    common = ["--dataset=captions", f"--solvers={tmp_path / 'solvers.json'}", f"--output_dir={tmp_path / 'docs'}"]
    common += [f"--runs_dir={tmp_path / 'runs'}", "--num_samples=16", "--teacher_steps=2", f"--classifier={scorer}"]
    text = [f"--teacher={taught}", "--real_data=captions"]
    lcm = f"--pretrained_teacher_model={taught}"
    digits = [f"--teacher={ROOT / 'assets' / 'digits_ddpm'}", "--real_data=digits"]
    for words, message in (
        ([*text, f"--pairs={tmp_path / 'baseline.yaml'}"], "pairs only cannot be trained: LCM-LoRA is for teachers of"),
        ([*digits, f"--lcm_lora={tmp_path / 'baseline.yaml'}"], "LCM-LoRA cannot be trained"),
        ([*text, "--num_samples=7"], "--num_samples 7: give 8 or more, 2 of each class"),
        ([text[0], digits[1]], "`captions` and `scenes` go with text to image"),
        ([digits[0], text[1]], "`captions` and `scenes` go with text to image"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.main([*common, *words])
    for program, words, message in (
        (train_text_teacher, [], "--vae is missing: give the folder of an autoencoder"),
        (train_baseline, [lcm, "--method=lcm_lora"], "--train_data digits: --method lcm_lora takes captioned images"),
    ):
        with pytest.raises(ValueError, match=message):
            program.main([*words, f"--output_dir={tmp_path / 'refused'}"])


# ----- LCM-LoRA -----


@pytest.fixture
def latent_consistency(taught):
    """Of the tiny teacher, with an adapter that has been trained a little."""
    torch.manual_seed(0)
    teacher = load_teacher(str(taught))
    clean, numbers = load_latents(teacher, "captions", torch.device("cpu"))
    made = LatentConsistency(teacher, 4.0, 2)
    for name, weight in made.student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return made, clean, numbers


def test_it_learns_the_pairs_of_images_and_prompts(latent_consistency):
    made, clean, numbers = latent_consistency
    prompts, _, pairs = captions.pair(TEXTS)
    assert len(clean) == len(numbers)
    assert made.teacher.conditions.prompts == prompts
    assert torch.equal(numbers, pairs)


def test_the_target_is_the_student_after_a_guided_step_of_ddim(latent_consistency):
    """By the formulas of arXiv 2310.04378, eq. 9 and 20, and the scheduler of diffusers."""
    made, clean, numbers = latent_consistency
    x, time, told = torch.randn(3, 4, 8, 8), torch.tensor([19, 499, 999]), numbers[:3]

    def velocity(network, x, time, rows):
        return network(x, time, **made.teacher.conditions.arguments(rows, x)).sample

    def split(x, time, v):
        alpha, sigma = (made.schedule.alphas_cumprod[time][:, None, None, None] ** 0.5 for _ in range(2))
        sigma = (1 - alpha.square()).sqrt()
        return alpha * x - sigma * v, sigma * x + alpha * v, alpha, sigma

    none = torch.full_like(told, len(made.teacher.conditions.prompts))  # the negative prompt
    with torch.no_grad():
        v_none, v_told = (velocity(made.teacher.network, x, time, rows) for rows in (none, told))
        x0, noise, *_ = split(x, time, v_none + 4 * (v_told - v_none))
        below = time - 20
        below[0] = 0
        abar = made.schedule.alphas_cumprod[below][:, None, None, None]
        down = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        x0, *_ = split(down, below, velocity(made.student, down, below, told))
        scaled = 10.0 * below[:, None, None, None]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        torch.testing.assert_close(made.aim(x, time, told), skip * down + out * x0, rtol=1e-4, atol=1e-3)


def test_its_pipeline_has_the_adapter_in_its_weights(latent_consistency):
    made, _, numbers = latent_consistency
    x, time, told = torch.randn(2, 4, 8, 8), torch.tensor([400, 400]), made.teacher.conditions
    given = told.arguments(numbers[:2], x)
    with torch.no_grad():
        before, teacher = (network(x, time, **given).sample for network in (made.student, made.teacher.network))
        after = made.pipeline().unet(x, time, **given).sample
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, teacher, rtol=1e-2, atol=1e-3)


def test_an_lcm_lora_continues_to_the_bit(taught, tmp_path, same_tensors):
    common = [f"--pretrained_teacher_model={taught}", "--method=lcm_lora", "--train_data=captions", "--lora_rank=2"]
    common += ["--train_batch_size=2", "--max_train_steps=3", "--checkpointing_steps=2", "--guidance_scale=4"]
    train_baseline.main([*common, f"--output_dir={tmp_path / 'whole'}"])
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("pipeline", "checkpoints/checkpoint-3"):
        shutil.rmtree(part / name)
    (part / "training.json").unlink()
    train_baseline.main([*common, f"--output_dir={part}", "--resume_from_checkpoint=latest"])
    assert same_tensors(weights(part / "pipeline"), weights(tmp_path / "whole" / "pipeline"))


# ----- the teacher of the repository -----


def test_the_stock_pipeline_draws_from_the_teacher_of_the_repository_what_it_was_not_trained_on():
    """Its parts are of several precisions in their files, and of one when they are loaded."""
    new, trained = (
        (ROOT / "training" / "configs" / f"emoji_{kind}.txt").read_text().splitlines()
        for kind in ("new_prompts", "prompts")
    )
    assert len(new) == 50
    assert not {*new} & {*trained}
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "assets" / "emoji_text")
    told = pipeline.tokenizer(new, truncation=True).input_ids
    assert not any(pipeline.tokenizer.unk_token_id in row for row in told)
    images = pipeline(new[:2], num_inference_steps=2, guidance_scale=4.0, output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    assert images.std() > 0.05
