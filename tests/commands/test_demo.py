"""`hsivi demo`: the page, by its functions, by its server, and in a browser where there is one."""

import re
import shutil
import socket
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

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

from hsivi_diffusers.commands import comparison, demo

SAMPLER = "DPM-Solver++ SDE"  # of teachers on pixels
SOLVER = "Solver (UniPC)"
QUICK = {"max_train_steps": 1, "critic_updates": 1}
ASKED = {"label": demo.IN_TURN, "prompt": "", "scale": 1.0, "count": 3, "seed": 7}
TEACHER_STEPS = 3
PATIENT = {"timeout": 600}  # a busy machine is slow


class Kept(dict):
    def clear(self):
        """Each student is loaded once."""


@pytest.fixture(scope="module")
def students(fast_run, several_run, class_run):
    made = comparison.Students([str(run) for run in (fast_run, several_run, class_run)], "cpu")
    made._kept = Kept()
    return made


@pytest.fixture(scope="module")
def address(fast_run, several_run):
    page = demo.make_page(comparison.Students([str(fast_run), str(several_run)], "cpu"))
    yield demo.launch(page)
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


@pytest.fixture(scope="module")
def prompted(text_run):
    """A LoRA of Stable Diffusion: to be read, not written to."""
    return text_run("sd", negative_prompt="a dog")


def seeds(count, first):
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def same(image, other):
    return np.array_equal(np.asarray(image), np.asarray(other))


def compare(students, name, steps, **asked):
    """The panels of student, solver and teacher."""
    student = students(str(name))
    return [*comparison.compare(student, demo.ask(student, **{**ASKED, **asked}), steps, TEACHER_STEPS)]


def show(students, name, steps, teacher_steps=TEACHER_STEPS, judge=None, **asked):
    """The page after a draw, and as it grew."""
    return [*demo.show(students, judge, str(name), steps, teacher_steps, *{**ASKED, **asked}.values())]


def choose(students, name):
    (chosen,) = demo.choose(students, str(name))
    return dict(zip(["steps", "label", "prompt", "ideas", "scale", "count", "about", "results"], chosen, strict=True))


def images_of(html):
    return [Image.open(BytesIO(b64decode(content))) for content in re.findall('base64,([^"]*)', html)]


def drawn(run, **given):
    return HSIVIPipeline.from_pretrained(run / "pipeline")(3, seeds(3, 7), **given).images


def test_the_student_draws_what_its_pipeline_draws(students, fast_run):
    panel, *_ = compare(students, fast_run, 2)
    assert all(same(*each) for each in zip(panel.images, drawn(fast_run), strict=True))
    assert panel.title == "Student"
    assert re.fullmatch(r"2 network calls, [\d,]+ ms for 3 images", panel.text)
    assert len(compare(students, fast_run, 2, prompt=None, seed=None)[0].images) == 3  # fields that were cleared


def test_solver_and_teacher_start_from_the_same_noise(students, fast_run, teacher):
    loaded = load_teacher(teacher)
    levels = clock_of(loaded.schedule).pair_levels(TEACHER_STEPS)
    solvers = make_solver("UniPC", 2, Guided(loaded)), make_solver(SAMPLER, 3, Guided(loaded), levels)
    panels = compare(students, fast_run, 2, count=1)[1:]
    for panel, solver in zip(panels, solvers, strict=True):
        (image,) = HSIVIPipeline.numpy_to_pil(solver(1, *seeds(1, 7)).permute(0, 2, 3, 1).numpy())
        assert same(panel.images[0], image)
    assert [panel.title for panel in panels] == ["Solver (UniPC)", f"Teacher ({SAMPLER})"]
    told = ["2 network calls, default grid of diffusers", "3 network calls, stochastic, so its images differ"]
    assert [panel.text.rpartition(", ")[0] for panel in panels] == told


def test_a_student_of_one_step_count_has_a_strip_of_the_solver_and_one_of_several_its_own(
    students, fast_run, several_run
):
    for name, titles, calls in (
        (fast_run, [SOLVER] * 4 + ["Student"], [1, 2, 4, 8, 2]),
        (several_run, ["Student"] * 3 + [SOLVER], [1, 2, 4, 4]),
    ):
        student = students(str(name))
        panels = comparison.draw_strip(student, demo.ask(student, **ASKED), calls[-1], TEACHER_STEPS)
        assert [panel.title for panel in panels] == [*titles, f"Teacher ({SAMPLER})"]
        assert [int(panel.text.split()[0]) for panel in panels] == [*calls, TEACHER_STEPS]
        assert all(len(panel.images) == 1 for panel in panels)
        assert all("for" not in panel.text for panel in panels)  # the time of each is that of one image
    ours, *_ = compare(students, several_run, 4)
    assert same(panels[2].images[0], ours.images[0])  # from the same noise


def test_the_page_grows_column_by_column(students, fast_run):
    stages = show(students, fast_run, 2, count=4)
    assert [len(images_of(stage)) for stage in stages] == [0, 4, 8, 12, 12 + 6]
    assert [stage.count("<i></i>") for stage in stages] == [12, 8, 4, 0, 0]
    assert [stage.count("drawing") for stage in stages] == [3, 2, 1, 0, 0]
    assert stages[-1].count("--columns: 2") == 3
    assert 'alt="seed 10"' in stages[-1]
    first, last = images_of(stages[-1])[0], images_of(show(students, fast_run, 2, count=4, seed=10)[1])[0]
    assert not same(first, last)
    assert same(images_of(stages[1])[3], last)


def test_nothing_seems_to_be_drawn_after_the_student_has_failed(students, fast_run, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    students(str(fast_run))
    monkeypatch.setattr(comparison, "draw_student", fail)
    stages = demo.show(students, None, str(fast_run), 2, TEACHER_STEPS, *ASKED.values())
    assert next(stages).count("drawing") == 3
    assert next(stages).count("not drawn") == 3
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stages)


def test_steps_and_classes_can_be_chosen_where_there_are_several(students, several_run, class_run, teacher):
    chosen = choose(students, several_run)
    assert (chosen["steps"]["choices"], chosen["steps"]["value"]) == ([1, 2, 4], 4)
    assert chosen["steps"]["interactive"]
    assert not any(chosen[name]["visible"] for name in ("label", "prompt", "ideas", "scale"))
    assert chosen["about"] == f"Teacher: {teacher.name}"  # not where it lies
    assert compare(students, several_run, 1)[0].text.startswith("1 network call, ")
    label = choose(students, class_run)["label"]
    assert (label["visible"], label["choices"]) == (True, [demo.IN_TURN, "0", "1", "2"])


def test_a_class_is_drawn_that_is_asked_for_and_a_prompt_of_the_student_before_is_not(students, class_run, fast_run):
    images = compare(students, class_run, 2, label="1", prompt="a hidden cat")[0].images
    assert all(same(*each) for each in zip(images, drawn(class_run, class_labels=[1, 1, 1]), strict=True))
    assert re.findall('alt="(.*?)"', show(students, class_run, 2)[1]) == ["0 seed 7", "1 seed 8", "2 seed 9"]
    images = compare(students, fast_run, 2, label="1", prompt="a hidden cat")[0].images
    assert all(same(*each) for each in zip(images, drawn(fast_run), strict=True))


def test_what_a_judge_says_of_images_and_conditions_stands_above_them(students, class_run):
    def judge(images, conditions):
        return f"{len(images)} of the classes {conditions}" if "7" not in str(conditions) else ""

    assert show(students, class_run, 2, judge=judge)[-1].count("ms for 3 images; 3 of the classes [0, 1, 2]</p>") == 3
    assert "; " not in re.sub("<img[^>]*>", "", show(students, class_run, 2)[-1]).partition("strip")[0]


def test_a_guided_solver_has_as_many_calls_as_the_student(distil, class_teacher, tmp_path):
    run = distil(tmp_path / "run", pretrained_teacher_model=class_teacher, guidance_scale=(1, 3), **QUICK)
    students = comparison.Students([str(run)], "cpu")
    assert choose(students, run)["scale"]["visible"]
    texts = [[panel.text.split(",")[0] for panel in compare(students, run, 2, scale=scale)] for scale in (1.0, 3.0)]
    assert texts[0] == ["2 network calls", "2 network calls", "3 network calls"]
    assert texts[1] == ["2 network calls", "2 network calls without guidance", "6 network calls"]
    student = students(str(run))
    request = demo.ask(student, **{**ASKED, "scale": 3.0})
    strip = [panel.text.split(",")[0] for panel in comparison.draw_strip(student, request, 2, TEACHER_STEPS)]
    assert strip[2:4] == ["4 network calls without guidance", "8 network calls without guidance"]
    assert comparison.draw_solver(student, request, 16)[1:] == (16, "Solver (UniPC)", comparison.ON_GRID)
    with pytest.raises(ValueError, match="guidance_scale=2"):
        show(students, run, 2, scale=2.0)


def test_a_prompt_is_drawn_and_asked_for(prompted, tmp_path):
    run = shutil.copytree(prompted, tmp_path / "run")
    students = comparison.Students([str(run)], "cpu")
    chosen = choose(students, run)
    assert chosen["prompt"] == {"visible": True, "value": "a cat", "__type__": "update"}
    assert (chosen["ideas"]["samples"], chosen["ideas"]["visible"], chosen["count"]["value"]) == ([["a cat"]], True, 4)
    panels = compare(students, run, 2, prompt="a cat", scale=2.0, count=2)
    assert [len(panel.images) for panel in panels] == [2, 2, 2]
    assert [panel.title for panel in panels] == ["Student", "Solver (UniPC)", "Teacher (DDIM)"]
    assert "stochastic" not in panels[2].text
    assert [panel.text.split(",")[0] for panel in panels] == [
        "2 network calls",
        "2 network calls without guidance",
        "6 network calls",
    ]
    student = students(str(run))
    kept = {weight.data_ptr() for weight in student.teacher.network.parameters()}  # the teacher's are there once
    own = [name for name, weight in student.pipeline.unet.named_parameters() if weight.data_ptr() not in kept]
    assert own
    assert all("lora" in name for name in own)
    assert not any("lora" in name for name, _ in student.teacher.network.named_parameters())
    image = load_sampler(str(run))("a cat", guidance_scale=1, num_inference_steps=2, generator=seeds(1, 7)).images[0]
    assert same(panels[0].images[0], image)
    (run / "prompts.txt").unlink()
    assert not choose(comparison.Students([str(run)], "cpu"), run)["ideas"]["visible"]
    for prompt, length in ((" ", 0), ("cat " * 1_000_000, 3_999_999)):
        with pytest.raises(ValueError, match=f"the prompt has {length} letters: say what to draw in 1 to 1000"):
            show(students, run, 2, prompt=prompt)
    assert 'alt="&quot;&lt;i&gt;x seed 7"' in show(students, run, 2, prompt='"<i>x')[-1]


def test_the_negative_prompt_of_the_run_is_the_teachers(prompted, text_teachers):
    panel = compare(comparison.Students([str(prompted)], "cpu"), prompted, 2, prompt="a cat", scale=2.0, count=1)[2]
    stock = DiffusionPipeline.from_pretrained(text_teachers("sd"), torch_dtype=torch.float32)
    given = {"negative_prompt": ["a dog"], "guidance_scale": 2.0, "generator": seeds(1, 7), "num_inference_steps": 3}
    assert same(panel.images[0], stock(["a cat"], **given).images[0])


def test_a_teacher_that_cannot_draw_leaves_the_student(distil, dit_teacher, tmp_path):
    """A stock DiTPipeline takes label 1000 for "no class", and this teacher has three."""
    settings = {"pretrained_teacher_model": dit_teacher, "guidance_scale": 2, **QUICK}
    run = distil(tmp_path / "run", **settings)
    ours, _, theirs = compare(comparison.Students([str(run)], "cpu"), run, 2, scale=2.0)
    assert (len(ours.images), len(theirs.images)) == (3, 0)
    assert ours.text.startswith("2 network calls")
    assert theirs.title == "Teacher"
    assert theirs.text.startswith("it could not draw (IndexError")


def test_a_repo_may_be_named(logged_in, fast_run, teacher, tmp_path, monkeypatch):
    """And nothing of this machine is read for it, as the run ./alice."""
    shutil.copytree(fast_run, tmp_path / "alice", ignore=shutil.ignore_patterns("pipeline"))
    monkeypatch.chdir(tmp_path)
    push(HSIVIPipeline.from_pretrained(fast_run / "pipeline"), "alice/student", run_dir=fast_run)
    student = comparison.Students(["other"], "cpu")("alice/student")
    assert student.pipeline.scheduler.depths == [SETTINGS["num_inference_steps"]]
    assert student.teacher is None
    alone = compare(comparison.Students(["other"], "cpu"), "alice/student", 2)
    assert [panel.text for panel in alone[1:]] == ["no teacher: not named by its run or its card"] * 2
    assert len(show(comparison.Students(["other"], "cpu"), "alice/student", 2)) == 4  # no strip
    HfApi().create_repo("alice/teacher")
    HfApi().upload_folder(repo_id="alice/teacher", folder_path=teacher)
    push(HSIVIPipeline.from_pretrained(fast_run / "pipeline"), "alice/known", base_model="alice/teacher")
    panel = compare(comparison.Students(["other"], "cpu"), "alice/known", 2)[2]
    assert (panel.title, panel.text[:15]) == (f"Teacher ({SAMPLER})", "3 network calls")


def test_a_card_reaches_no_folder_of_this_machine(logged_in, fast_run, teacher):
    push(HSIVIPipeline.from_pretrained(fast_run / "pipeline"), "alice/student")
    card = ModelCard.load("alice/student")
    for card.data.base_model in (str(teacher), "../teacher", "assets"):
        card.push_to_hub("alice/student")
        with pytest.raises(ValueError, match="names a teacher that is no repo id such as user/name"):
            comparison.Students(["other"], "cpu")("alice/student")


def test_folders_that_were_not_given_are_refused(students, fast_run, tmp_path, monkeypatch):
    shutil.copytree(fast_run, tmp_path / "user" / "name")  # looks like a repo
    monkeypatch.chdir(tmp_path)
    for name in ("../secret", "/etc", "a/b/c", "word", "user/name"):
        with pytest.raises(ValueError, match="is neither a student of the list nor a repo id"):
            students(name)


def test_numbers_beyond_those_of_the_page_are_refused(students, fast_run):
    assert demo.next_seed(None, 4) == 4
    assert demo.next_seed(2**53, 4) == 2**53
    for asked in ({"count": 17}, {"count": 0}, {"teacher_steps": 101}):
        with pytest.raises(ValueError, match=": give a number from 1 to 1"):
            show(students, fast_run, 2, **asked)


def test_two_visitors_at_once_get_their_own_images(address, fast_run, several_run, students):
    def ask(name, steps, seed):
        client = Client(address, verbose=False, httpx_kwargs=PATIENT)
        client.predict(str(name), api_name="/choose")
        asked = steps, TEACHER_STEPS, *{**ASKED, "count": 4, "seed": seed}.values()
        return images_of(client.predict(str(name), *asked, api_name="/draw"))

    asked = [(fast_run, 2, 7), (several_run, 4, 11), (fast_run, 2, 23)]
    with ThreadPoolExecutor(3) as pool:
        answers = [*pool.map(lambda each: ask(*each), asked)]
    for (name, steps, seed), images in zip(asked, answers, strict=True):
        alone = [image for panel in compare(students, name, steps, seed=seed, count=4) for image in panel.images]
        assert len(alone) == 12
        assert all(same(*each) for each in zip(images, alone, strict=False))


def test_what_goes_wrong_is_one_line(address):
    message = r"^'word' is neither a student of the list nor a repo id such as user/name; [^\n]*$"
    with pytest.raises(AppError, match=message):
        Client(address, verbose=False, httpx_kwargs=PATIENT).predict("word", api_name="/choose")


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
        (["--pipeline=runs/nowhere"], "--pipeline runs/nowhere is no folder here and was not found on the Hub"),
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
    cli.demo([f"--pipeline={fast_run}", f"--server_port={port}"])
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    loading, opened = capsys.readouterr().out.splitlines()
    assert loading == f"loading {fast_run}"
    assert opened.startswith(f"open http://127.0.0.1:{port}/ in a browser")
    pages[0].close()


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def visit(address):
    """Opens the page in a browser, 1200 or as many pixels wide; nothing may be loaded from another host."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if BROWSER is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        asked = []

        def visit(to=address, width=1200):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.set_default_timeout(300_000)
            sync_api.expect.set_options(timeout=300_000)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(to)
            sync_api.expect(page.get_by_text("Teacher: ")).to_be_visible()
            return page, sync_api.expect

        yield visit
        browser.close()
    assert asked
    assert [
        url for url in asked if not url.startswith(("http://127.0.0.1:", "http://localhost:", "data:", "blob:"))
    ] == []


def go_to(page, name):
    page.get_by_label("Student, or a repo id").fill(str(name))
    page.keyboard.press("Enter")


@pytest.mark.slow
def test_a_browser_draws_and_changes_students(visit, several_run):
    page, expect = visit()
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".strip img")).to_have_count(6)
    expect(page.locator(".columns img")).to_have_count(27)
    expect(page.get_by_text("2 network calls, ")).to_have_count(4)  # two of them in the strip
    go_to(page, several_run)
    expect(page.get_by_label("Steps of the student")).to_have_value("4")
    expect(page.locator("#results img")).to_have_count(0)
    page.get_by_label("Steps of the student").click()
    page.get_by_role("option", name="1").click()
    page.get_by_role("button", name="Next seed").click()
    expect(page.get_by_label("Seed")).to_have_value("9")
    expect(page.locator(".strip img")).to_have_count(5)
    expect(page.locator(".columns img").first).to_have_attribute("alt", "seed 9")
    go_to(page, "nobody/nothing")
    expect(page.get_by_text("was not found on the Hub")).to_be_visible()


@pytest.mark.slow
def test_two_browsers_see_their_own_seeds(visit):
    (one, expect), (other, _) = visit(), visit()
    other.get_by_label("Seed").fill("50")
    for page in (one, other):
        page.get_by_role("button", name="Draw").click()
    for page, seed in ((one, 0), (other, 50)):
        expect(page.locator(".strip img")).to_have_count(6)
        expect(page.locator(".columns img").first).to_have_attribute("alt", f"seed {seed}")


@pytest.mark.slow
def test_a_browser_of_the_width_of_a_phone_draws_prompts(visit, text_run):
    page = demo.make_page(comparison.Students([str(text_run("sd"))], "cpu"))
    phone, expect = visit(demo.launch(page), width=390)
    phone.get_by_label("Prompt").fill("cat " * 240)
    phone.get_by_role("button", name="Draw").click()
    expect(phone.locator(".strip img")).to_have_count(6)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    phone.get_by_label("Prompt").fill("")
    phone.get_by_role("button", name="a cat").click()
    expect(phone.get_by_label("Prompt")).to_have_value("a cat")
    phone.get_by_label("Prompt").fill(" ")
    phone.get_by_role("button", name="Draw").click()
    expect(phone.get_by_text("the prompt has 0 letters: say what to draw in 1 to 1000")).to_be_visible()
    page.close()
