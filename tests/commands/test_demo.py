"""`hsivi demo`: the page, by its functions, by its server, and in a browser where there is one."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from hsivi_diffusers import HSIVIPipeline
from hsivi_diffusers.commands import cli
from hsivi_diffusers.commands.sample import load_sampler
from hsivi_diffusers.share.push import push
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.loading import load_teacher
from hsivi_diffusers.teachers.solvers import make_solver
from short_run import SETTINGS

pytest.importorskip("gradio", reason="needs the extra demo")

import httpx
from gradio_client import Client
from gradio_client.exceptions import AppError

from hsivi_diffusers.commands import demo

SAMPLER = "DPM-Solver++ SDE"  # of teachers on pixels
QUICK = {"max_train_steps": 1, "critic_updates": 1}
ASKED = {"teacher_steps": 3, "label": demo.IN_TURN, "prompt": "", "scale": 1.0, "count": 3, "seed": 7}


@pytest.fixture
def students(fast_run, several_run, class_run):
    return demo.Students([str(run) for run in (fast_run, several_run, class_run)], "cpu")


@pytest.fixture(scope="module")
def address(fast_run, several_run):
    page = demo.make_page([str(fast_run), str(several_run)], "cpu")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, max_file_size=1)
    yield address
    page.close()


@pytest.fixture(scope="module")
def text_run(distil, text_teachers, tmp_path_factory):
    """Makes a LoRA of a text-to-image teacher."""

    def make(kind, **settings):
        folder = tmp_path_factory.mktemp("text")
        (folder / "prompts.txt").write_text("a cat\n")
        settings = {"guidance_scale": 2, "lora_rank": 2, **QUICK, **settings}
        prompts = {"prompts": folder / "prompts.txt", "pretrained_teacher_model": text_teachers(kind)}
        return distil(folder / "run", **prompts, **settings)

    return make


def seeds(count, first):
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def same(shown, image):
    """Whether a shown image is another one with its pixels as squares."""
    factor = shown.width // image.width
    return np.array_equal(np.asarray(shown)[::factor, ::factor], np.asarray(image))


def show(students, name, steps, **asked):
    return demo.show(students, str(name), steps, **{**ASKED, **asked})


def drawn(run, **given):
    return HSIVIPipeline.from_pretrained(run / "pipeline")(3, seeds(3, 7), **given).images


def test_the_student_draws_what_its_pipeline_draws(students, fast_run):
    line, images, *_ = show(students, fast_run, 2)
    assert all(same(*each) for each in zip(images, drawn(fast_run), strict=True))
    assert line.startswith("Student: 2 network calls, ")
    assert line.endswith(" ms an image")
    assert len(show(students, fast_run, 2, prompt=None, seed=None)[1]) == 3  # fields that were cleared


def test_the_teacher_starts_from_the_same_noise(students, fast_run, teacher):
    *_, line, images = show(students, fast_run, 2, count=1)
    loaded = load_teacher(teacher)
    solver = make_solver(SAMPLER, 3, Guided(loaded), clock_of(loaded.schedule).pair_levels(3))
    (image,) = HSIVIPipeline.numpy_to_pil(solver(1, *seeds(1, 7)).permute(0, 2, 3, 1).numpy())
    assert same(images[0], image)
    assert line.startswith(f"Teacher, {SAMPLER}: 3 network calls, ")


def test_steps_and_classes_can_be_chosen_where_there_are_several(students, several_run, class_run, teacher):
    steps, label, prompt, scale, about = demo.choose(students, str(several_run))
    assert (steps["choices"], steps["value"], steps["interactive"]) == ([1, 2, 4], 4, True)
    assert (label["visible"], prompt["visible"], scale["visible"]) == (False, False, False)
    assert about == f"Teacher: {teacher.name}"  # not where it lies
    assert show(students, several_run, 1)[0].startswith("Student: 1 network call")
    _, label, *_ = demo.choose(students, str(class_run))
    assert (label["visible"], label["choices"]) == (True, [demo.IN_TURN, "0", "1", "2"])


def test_a_class_is_drawn_that_is_asked_for_and_a_prompt_of_the_student_before_is_not(students, class_run, fast_run):
    images = show(students, class_run, 2, label="1", prompt="a hidden cat")[1]
    assert all(same(*each) for each in zip(images, drawn(class_run, class_labels=[1, 1, 1]), strict=True))
    images = show(students, fast_run, 2, label="1", prompt="a hidden cat")[1]
    assert all(same(*each) for each in zip(images, drawn(fast_run), strict=True))


def test_scales_of_guidance_cost_the_teacher_two_calls(distil, class_teacher, tmp_path):
    run = distil(tmp_path / "run", pretrained_teacher_model=class_teacher, guidance_scale=(1, 3), **QUICK)
    students = demo.Students([str(run)], "cpu")
    *_, scale, _ = demo.choose(students, str(run))
    assert scale["visible"]
    assert show(students, run, 2, scale=3.0)[2].startswith(f"Teacher, {SAMPLER}: 6 network calls")
    assert show(students, run, 2, scale=1.0)[2].startswith(f"Teacher, {SAMPLER}: 3 network calls")
    with pytest.raises(ValueError, match="guidance_scale=2"):
        show(students, run, 2, scale=2.0)


def test_a_prompt_is_drawn_and_asked_for(text_run):
    run = text_run("sd")
    students = demo.Students([str(run)], "cpu")
    assert demo.choose(students, str(run))[2]["visible"]
    _, images, line, theirs = show(students, run, 2, prompt="a cat", scale=2.0, count=2)
    assert (len(images), len(theirs)) == (2, 2)
    assert line.startswith("Teacher, DDIMScheduler: 6 network calls")
    student = students(str(run))
    kept = {weight.data_ptr() for weight in student.teacher.network.parameters()}  # the teacher's are there once
    own = [name for name, weight in student.pipeline.unet.named_parameters() if weight.data_ptr() not in kept]
    assert own
    assert all("lora" in name for name in own)
    assert not any("lora" in name for name, _ in student.teacher.network.named_parameters())
    image = load_sampler(str(run))("a cat", guidance_scale=1, num_inference_steps=2, generator=seeds(1, 7)).images[0]
    assert same(images[0], image)
    for prompt, length in ((" ", 0), ("cat " * 1_000_000, 3_999_999)):
        with pytest.raises(ValueError, match=f"the prompt has {length} letters: say what to draw in 1 to 1000"):
            show(students, run, 2, prompt=prompt)


def test_the_negative_prompt_of_the_run_is_the_teachers(text_run, text_teachers):
    run = text_run("sdxl", negative_prompt="a dog")
    *_, images = show(demo.Students([str(run)], "cpu"), run, 2, prompt="a cat", scale=2.0, count=1)
    stock = DiffusionPipeline.from_pretrained(text_teachers("sdxl"), torch_dtype=torch.float32)
    given = {"negative_prompt": "a dog", "guidance_scale": 2.0, "generator": seeds(1, 7), "num_inference_steps": 3}
    assert same(images[0], stock(["a cat"], **given).images[0])


def test_a_teacher_that_cannot_draw_leaves_the_student(distil, dit_teacher, tmp_path):
    """A stock DiTPipeline takes label 1000 for "no class", and this teacher has three."""
    settings = {"pretrained_teacher_model": dit_teacher, "guidance_scale": 2, **QUICK}
    run = distil(tmp_path / "run", **settings)
    line, images, teacher_line, theirs = show(demo.Students([str(run)], "cpu"), run, 2, scale=2.0)
    assert (len(images), theirs) == (3, [])
    assert line.startswith("Student: 2 network calls")
    assert teacher_line.startswith("Teacher: it could not draw (IndexError")


def test_a_repo_may_be_named(logged_in, fast_run, teacher, tmp_path, monkeypatch):
    """And nothing of this machine is read for it, as the run ./alice."""
    shutil.copytree(fast_run, tmp_path / "alice", ignore=shutil.ignore_patterns("pipeline"))
    monkeypatch.chdir(tmp_path)
    push(HSIVIPipeline.from_pretrained(fast_run / "pipeline"), "alice/student", run_dir=fast_run)
    student = demo.Students(["other"], "cpu")("alice/student")
    assert student.pipeline.scheduler.depths == [SETTINGS["num_inference_steps"]]
    assert student.teacher is None
    alone = show(demo.Students(["other"], "cpu"), "alice/student", 2)
    assert alone[2:] == ["Teacher: not named by its run or its card", []]
    HfApi().create_repo("alice/teacher")
    HfApi().upload_folder(repo_id="alice/teacher", folder_path=teacher)
    push(HSIVIPipeline.from_pretrained(fast_run / "pipeline"), "alice/known", base_model="alice/teacher")
    line = show(demo.Students(["other"], "cpu"), "alice/known", 2)[2]
    assert line.startswith(f"Teacher, {SAMPLER}: 3 network calls")


def test_a_card_reaches_no_folder_of_this_machine(logged_in, fast_run, teacher):
    push(HSIVIPipeline.from_pretrained(fast_run / "pipeline"), "alice/student")
    card = ModelCard.load("alice/student")
    for card.data.base_model in (str(teacher), "../teacher", "assets"):
        card.push_to_hub("alice/student")
        with pytest.raises(ValueError, match="names a teacher that is no repo id such as user/name"):
            demo.Students(["other"], "cpu")("alice/student")


def test_folders_that_were_not_given_are_refused(students, fast_run, tmp_path, monkeypatch):
    shutil.copytree(fast_run, tmp_path / "user" / "name")  # looks like a repo
    monkeypatch.chdir(tmp_path)
    for name in ("../secret", "/etc", "a/b/c", "word", "user/name"):
        with pytest.raises(ValueError, match="is neither a student of the list nor a repo id"):
            students(name)


def test_numbers_beyond_those_of_the_page_are_refused(students, fast_run):
    for asked in ({"count": 17}, {"count": 0}, {"teacher_steps": 101}):
        with pytest.raises(ValueError, match=": give a number from 1 to 1"):
            show(students, fast_run, 2, **asked)


def test_two_visitors_at_once_get_their_own_images(address, fast_run, several_run, students):
    def ask(name, steps, seed):
        client = Client(address, verbose=False)
        client.predict(str(name), api_name="/choose")
        line, images, *_ = client.predict(str(name), steps, *{**ASKED, "seed": seed}.values(), api_name="/draw")
        return line, [np.asarray(Image.open(each["image"]).convert("RGB")) for each in images]

    asked = [(fast_run, 2, 7), (several_run, 4, 11), (fast_run, 2, 23)]
    with ThreadPoolExecutor(3) as pool:
        answers = [*pool.map(lambda each: ask(*each), asked)]
    for (name, steps, seed), (line, images) in zip(asked, answers, strict=True):
        assert line.startswith(f"Student: {steps} network calls")
        alone = show(students, name, steps, seed=seed)[1]
        for image, other in zip(images, alone, strict=True):
            assert np.abs(image.astype(int) - np.asarray(other.convert("RGB"))).mean() < 4  # the page sends webp


def test_what_goes_wrong_is_one_line(address):
    message = r"^'word' is neither a student of the list nor a repo id such as user/name; [^\n]*$"
    with pytest.raises(AppError, match=message):
        Client(address, verbose=False).predict("word", api_name="/choose")


def test_no_file_is_taken_or_served(address, fast_run):
    sent = httpx.post(f"{address}gradio_api/upload", files={"files": ("x.html", b"<script>")})
    assert sent.status_code == 413
    for file in ("/etc/passwd", "README.md", f"{fast_run}/options.json"):
        assert httpx.get(f"{address}gradio_api/file={file}").status_code in (403, 404)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--pipeline is missing: give folders of runs"),
        (["--pipeline=nowhere"], "--pipeline nowhere is no folder, and no repo id"),
        (["--pipeline=a/b", "--server_port=99999"], "--server_port=99999: give a whole number from 1 to 65535"),
        (["--pipeline=a/b", "--server_port=0"], "--server_port=0: give a whole number from 1 to 65535"),
        (["--pipeline=a/b", "--server_port={taken}"], "--server_name 127.0.0.1 --server_port {taken}: "),
        (["--pipeline=a/b", "--server_name=a..b"], "--server_name a..b: "),
        (["--pipeline=a/b", "--server_name=192.0.2.1"], "--server_name 192.0.2.1: "),
        (["--pipeline=a/b", "--device=meta"], "--device meta cannot be used here"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(SystemExit) as exit:
            cli.main(["demo", *(option.format(taken=taken) for option in options)])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.format(taken=taken)}")


def test_the_command_listens_where_it_says(fast_run, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pages = []
    monkeypatch.setattr(demo.gr.Blocks, "block_thread", lambda page: pages.append(page))
    demo.main([f"--pipeline={fast_run}", f"--server_port={port}"])
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    assert capsys.readouterr().out.startswith(f"open http://127.0.0.1:{port}/ in a browser")
    pages[0].close()


def test_the_command_needs_gradio(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["demo"])
    assert capsys.readouterr().err.startswith("error: gradio is missing: pip install")


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None or find_spec("playwright") is None, reason="needs playwright and chromium")
def test_a_browser_draws_and_changes_steps(address, several_run, teacher):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_text(f"Teacher: {teacher.name}")).to_be_visible(timeout=60_000)
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("Student: 2 network calls")).to_be_visible(timeout=60_000)
        page.get_by_label("Student, or a repo id").fill(str(several_run))
        page.keyboard.press("Enter")
        expect(page.get_by_label("Steps of the student")).to_have_value("4", timeout=60_000)
        page.get_by_label("Steps of the student").click()
        page.get_by_role("option", name="1").click()
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("Student: 1 network call")).to_be_visible(timeout=60_000)
        page.get_by_label("Student, or a repo id").fill("nobody/nothing")
        page.keyboard.press("Enter")
        expect(page.get_by_text("was not found on the Hub")).to_be_visible(timeout=60_000)
        browser.close()
