"""`hsivi demo`: the page, by its functions, by its server, and in a browser where there is one."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from hsivi_diffusers import HSIVIPipeline, cli
from hsivi_diffusers.distillation.pairs import TeacherPairs
from hsivi_diffusers.distillation.teachers import load_teacher
from hsivi_diffusers.hub import push
from short_run import SETTINGS

pytest.importorskip("gradio", reason="needs the extra demo")

from gradio_client import Client
from gradio_client.exceptions import AppError

from hsivi_diffusers import demo

ASKED = {"teacher_steps": 3, "label": demo.IN_TURN, "prompt": "", "scale": 1.0, "count": 3, "seed": 7}


@pytest.fixture
def pairs(fast_run, several_run, class_run):
    return demo.Pairs([str(run) for run in (fast_run, several_run, class_run)], "cpu")


@pytest.fixture(scope="module")
def address(fast_run, several_run):
    page = demo.make_page([str(fast_run), str(several_run)], "cpu")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


def seeds(count, first):
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def same(shown, image):
    """Whether a shown image is another one with its pixels as squares."""
    factor = shown.width // image.width
    return np.array_equal(np.asarray(shown)[::factor, ::factor], np.asarray(image))


def show(pairs, name, steps, **asked):
    return demo.show(pairs, str(name), steps, **{**ASKED, **asked})


def test_the_student_draws_what_its_pipeline_draws(pairs, fast_run):
    told, images, *_ = show(pairs, fast_run, 2)
    drawn = HSIVIPipeline.from_pretrained(fast_run / "pipeline")(3, seeds(3, 7)).images
    assert len(images) == 3
    assert all(same(*each) for each in zip(images, drawn, strict=True))
    assert told.startswith("Student: 2 calls, ")
    assert told.endswith(" ms an image")


def test_the_teacher_starts_from_the_same_noise(pairs, fast_run, teacher):
    *_, told, images = show(pairs, fast_run, 2, count=1)
    unet, schedule = load_teacher(teacher)
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    (end,) = TeacherPairs(unet.eval(), schedule, noise, num_calls=3).end
    (drawn,) = HSIVIPipeline.numpy_to_pil((end / 2 + 0.5).permute(1, 2, 0)[None].numpy())
    assert same(images[0], drawn)
    assert told.startswith("Teacher: 3 calls, ")


def test_steps_and_classes_can_be_chosen_where_there_are_several(pairs, several_run, class_run, teacher):
    steps, label, prompt, scale, about = demo.choose(pairs, str(several_run))
    assert (steps["choices"], steps["value"], steps["interactive"]) == ([1, 2, 4], 4, True)
    assert (label["visible"], prompt["visible"], scale["visible"]) == (False, False, False)
    assert about == f"Teacher: {teacher}"
    assert show(pairs, several_run, 1)[0].startswith("Student: 1 calls")
    _, label, *_ = demo.choose(pairs, str(class_run))
    assert label["visible"]
    assert len(label["choices"]) == 4  # all in turn, and three


def test_a_class_is_drawn_that_is_asked_for(pairs, class_run):
    images = show(pairs, class_run, 2, label="1")[1]
    drawn = HSIVIPipeline.from_pretrained(class_run / "pipeline")(3, seeds(3, 7), class_labels=[1, 1, 1]).images
    assert all(same(*each) for each in zip(images, drawn, strict=True))


def test_scales_of_guidance_cost_the_teacher_two_calls(distil, class_teacher, tmp_path):
    run = distil(tmp_path / "run", pretrained_teacher_model=class_teacher, guidance_scale=(1, 3))
    pairs = demo.Pairs([str(run)], "cpu")
    *_, scale, _ = demo.choose(pairs, str(run))
    assert scale["visible"]
    assert show(pairs, run, 2, scale=3.0)[2].startswith("Teacher: 6 calls")
    assert show(pairs, run, 2, scale=1.0)[2].startswith("Teacher: 3 calls")
    with pytest.raises(ValueError, match="guidance_scale=2"):
        show(pairs, run, 2, scale=2.0)


def test_a_prompt_is_drawn_and_asked_for(distil, text_teachers, tmp_path):
    settings = {"pretrained_teacher_model": text_teachers("sd"), "guidance_scale": 2, "lora_rank": 2}
    (tmp_path / "prompts.txt").write_text("a cat\n")
    run = distil(tmp_path / "run", prompts=tmp_path / "prompts.txt", max_train_steps=1, **settings)
    pairs = demo.Pairs([str(run)], "cpu")
    assert demo.choose(pairs, str(run))[2]["visible"]
    _, images, told, theirs = show(pairs, run, 2, prompt="a cat", scale=2.0, count=2)
    assert (len(images), len(theirs)) == (2, 2)
    assert told.startswith("Teacher: 6 calls")
    with pytest.raises(ValueError, match="the prompt is missing: say what to draw"):
        show(pairs, run, 2, prompt=" ")


def test_a_student_without_its_teacher_is_shown_alone(fast_run, tmp_path):
    folder = shutil.copytree(fast_run / "pipeline", tmp_path / "alone")
    pairs = demo.Pairs([str(folder)], "cpu")
    assert show(pairs, folder, 2)[2:] == ["Teacher: not named by its run or its card", []]


def test_a_repo_may_be_named(logged_in, fast_run, teacher):
    push(HSIVIPipeline.from_pretrained(fast_run / "pipeline"), "alice/student", run_dir=fast_run)
    pair = demo.Pairs(["other"], "cpu")("alice/student")
    assert pair.student.scheduler.depths == [SETTINGS["num_inference_steps"]]
    assert pair.name == "not named by its run or its card"  # a folder, which the Hub does not have


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/b/c", "word"])
def test_folders_that_were_not_given_are_refused(pairs, name):
    with pytest.raises(ValueError, match="is not in the list, and no repo id such as user/name"):
        pairs(name)


def test_a_folder_that_looks_like_a_repo_is_refused(pairs, fast_run, tmp_path, monkeypatch):
    shutil.copytree(fast_run, tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not in the list"):
        pairs("user/name")


def test_two_visitors_at_once_get_their_own_images(address, fast_run, several_run, pairs):
    def ask(name, steps, seed):
        client = Client(address, verbose=False)
        client.predict(str(name), api_name="/choose")
        told, images, *_ = client.predict(str(name), steps, *{**ASKED, "seed": seed}.values(), api_name="/draw")
        return told, [np.asarray(Image.open(each["image"]).convert("RGB")) for each in images]

    asked = [(fast_run, 2, 7), (several_run, 4, 11), (fast_run, 2, 23)]
    with ThreadPoolExecutor(3) as pool:
        answers = [*pool.map(lambda each: ask(*each), asked)]
    for (name, steps, seed), (told, images) in zip(asked, answers, strict=True):
        assert told.startswith(f"Student: {steps} calls")
        alone = show(pairs, name, steps, seed=seed)[1]
        for image, other in zip(images, alone, strict=True):
            assert np.abs(image.astype(int) - np.asarray(other.convert("RGB"))).mean() < 4  # the page sends webp


def test_what_goes_wrong_is_one_line(address):
    with pytest.raises(AppError, match=r"^'word' is not in the list, and no repo id such as user/name$"):
        Client(address, verbose=False).predict("word", api_name="/choose")


@pytest.mark.parametrize("file", ["/etc/passwd", "README.md", "{run}/options.json"])
def test_no_file_is_served(address, fast_run, file):
    import httpx

    assert httpx.get(f"{address}gradio_api/file={file.format(run=fast_run)}").status_code in (403, 404)


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for message in ("--pipeline is missing: give folders of runs", "gradio is missing: pip install"):
        with pytest.raises(SystemExit) as exit:
            cli.main(["demo"])
        assert exit.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
        monkeypatch.setattr(cli, "find_spec", lambda name: None)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None or find_spec("playwright") is None, reason="needs playwright and chromium")
def test_a_browser_draws_and_changes_steps(address, several_run):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_text("Teacher: /")).to_be_visible(timeout=60_000)
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("Student: 2 calls")).to_be_visible(timeout=60_000)
        page.get_by_label("Student, or a repo id").fill(str(several_run))
        page.keyboard.press("Enter")
        expect(page.get_by_label("Steps of the student")).to_have_value("4", timeout=60_000)
        page.get_by_label("Steps of the student").click()
        page.get_by_role("option", name="1").click()
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("Student: 1 calls")).to_be_visible(timeout=60_000)
        page.get_by_label("Student, or a repo id").fill("nobody/nothing")
        page.keyboard.press("Enter")
        expect(page.get_by_text("was not found on the Hub")).to_be_visible(timeout=60_000)
        browser.close()
