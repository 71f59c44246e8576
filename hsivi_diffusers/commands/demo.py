"""A page in the browser with a student beside its teacher: `hsivi demo`.

What a visitor chooses travels with each request, so several can use the page at once; networks draw for one at a time.
Visitors reach the folders that the page was started with, and repos of the Hub.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub import ModelCard
from PIL import Image

from ..evaluation.images import enlarge
from ..pipeline_hsivi import network_calls
from ..runs.artifacts import run_of
from ..runs.options import option
from ..share.push import check_repo_id
from ..teachers.loading import kind_of, load_teacher
from .options import check_numbers, parse_options
from .sample import classes_of, draw, load_sampler, usable_device

DEMO = """Open a page in the browser that draws from distilled samplers, each beside its teacher.

    hsivi demo --pipeline runs/digits_t5"""
BUNDLED = [Path("assets/students") / name for name in ("emoji_t4", "fashion_t4", "digits_t4")]  # in a clone
WIDTH = 192  # pixels that an image has on the page, about
MOST_STEPS, MOST_IMAGES = 100, 16  # of the teacher; of a request
MOST_LETTERS = 1000  # of a prompt; text encoders read 77 to 512 tokens of it
IN_TURN = "all in turn"
Drawn = tuple[list[Image.Image], int, str]  # images, network calls for each, and what drew them
KEPT = 3600  # seconds that drawn images stay on the disk


@dataclass
class Demo:
    _group = "demo"
    pipeline: list[str] = option(
        [], "distilled pipelines to choose from: folders, of runs too, or repo ids; in a clone its students by default"
    )
    server_name: str = option("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    server_port: int | None = option(None, "port; the first free one from 7860 on by default")
    device: str | None = option(None, "cpu, cuda or another torch device; the GPU if there is one")


@dataclass(frozen=True)
class Student:
    """A distilled pipeline, and its teacher beside it, which may be missing, on a device."""

    pipeline: Any
    teacher: Any
    about: str  # name of the teacher, or why there is none
    classes: Sequence[int]  # that it was trained on
    negative_prompt: str  # that it was trained with

    @property
    def takes_text(self) -> bool:
        """Whether it draws prompts."""
        return kind_of(self.pipeline).takes_text

    @property
    def scales(self) -> list[float]:
        """The guidance scales that it was trained with; [1] if none."""
        return self.pipeline.scheduler.guidance_scales or [1.0]


@dataclass(frozen=True)
class Request:
    """What a visitor asks for."""

    count: int
    seed: int
    condition: int | str | None  # a class or a prompt; None: every class in turn
    scale: float

    def generators(self, device: Any) -> list[torch.Generator]:
        """One for each image: image i has the seed `seed + i`."""
        return [torch.Generator(device).manual_seed(self.seed + number) for number in range(self.count)]

    def conditions(self, classes: Sequence[int]) -> list[Any] | None:
        """The class or prompt of each image; None of a pipeline without."""
        if self.condition is None:
            return [classes[number % len(classes)] for number in range(self.count)] if classes else None
        return [self.condition] * self.count


def load_with_teacher(name: str, device: str) -> Student:
    """Loads a student, and the teacher that its run or its card names.

    Raises:
        ValueError: There is none, or its card names something else than a repo as its teacher.
    """
    run = run_of(name)
    source = run.get("pretrained_teacher_model") or teacher_of_card(name)
    teacher, about = None, "not named by its run or its card"
    if source is not None:
        about = source if names_repo(source) else Path(source).name  # visitors need not know where a folder lies
        try:
            teacher = load_teacher(source, run.get("revision"))
        except (OSError, ValueError) as error:
            about = f"{about} was not loaded ({type(error).__name__})"
    pipeline = load_sampler(name, teacher).to(device)
    pipeline.set_progress_bar_config(disable=True)
    given = {"classes": classes_of(pipeline, name), "negative_prompt": run.get("negative_prompt", "")}
    if teacher is None:
        return Student(pipeline, None, about, **given)
    teacher.set_sizes(pipeline.scheduler.config)
    teacher.to(device).network.eval()
    return Student(pipeline, teacher, about, **given)


def names_repo(name: str) -> bool:
    """Whether it is the id of a repo, and nothing of that name is here."""
    try:
        check_repo_id(name)
    except ValueError:
        return False
    return not Path(name).exists()


def teacher_of_card(name: str) -> str | None:
    """The repo of the teacher that a card names; None without one.

    Raises:
        ValueError: It names a folder of this machine, which a repo of somebody else must not reach.
    """
    card = Path(name) / "README.md"
    if Path(name).is_dir() and not card.is_file():
        return None
    try:
        source = ModelCard.load(card if card.is_file() else name).data.base_model
    except Exception:  # no card, a damaged one, or no connection
        return None
    if isinstance(source, str) and not names_repo(source):
        raise ValueError(f"the card of {name} names a teacher that is no repo id such as user/name")
    return source if isinstance(source, str) else None


def draw_student(student: Student, request: Request, num_steps: int) -> Drawn:
    """Draws with a student."""
    pipeline, conditions = student.pipeline, request.conditions(student.classes)
    scale = request.scale if pipeline.scheduler.guidance_scales else None
    return draw(pipeline, conditions, request.generators(pipeline.device), num_steps, scale), num_steps, "Student"


@torch.no_grad()
def draw_teacher(student: Student, request: Request, num_steps: int) -> Drawn:
    """Draws with the teacher of a student."""
    teacher = student.teacher
    given = request.conditions(student.classes), request.generators(teacher.device), num_steps, request.scale
    images, calls, sampler = teacher.draw_teacher(*given, student.negative_prompt)
    return images, calls, f"Teacher, {sampler}"


def timed(drawn: Callable[[], Drawn]) -> tuple[str, list[Image.Image]]:
    """A line with network calls and milliseconds, and the images, enlarged."""
    start = time.perf_counter()
    images, calls, who = drawn()
    milliseconds = 1000 * (time.perf_counter() - start) / len(images)
    return f"{who}: {network_calls([calls])}, {milliseconds:.0f} ms an image", [
        enlarge(image, WIDTH) for image in images
    ]


class Students:
    """Students by name; the one that was used last is kept.

    Args:
        names: Folders and repo ids that may be asked for, besides repos of the Hub.
        device: Where they draw.
    """

    def __init__(self, names: Sequence[str], device: str) -> None:
        self.names, self.device, self._kept = [*names], device, dict[str, Student]()

    def __call__(self, name: str) -> Student:
        """Returns the student of that name.

        Raises:
            ValueError: It may not be asked for, or there is none.
        """
        if name not in self.names and not names_repo(name):
            raise ValueError(
                f"{name!r} is neither a student of the list nor a repo id such as user/name; a folder must be named "
                f"when the page is started: hsivi demo --pipeline {name}"
            )
        if name not in self._kept:
            self._kept.clear()  # first, for there may be no memory for both
            self._kept[name] = load_with_teacher(name, self.device)
        return self._kept[name]


def choose(students: Students, name: str) -> list[Any]:
    """What can be asked of a student: its steps, its classes, a prompt, its scales of guidance; and its teacher."""
    student = students(name)
    depths, classes, scales = student.pipeline.scheduler.depths, student.classes, student.scales
    return [
        gr.update(choices=depths, value=depths[-1], interactive=len(depths) > 1),
        gr.update(choices=[IN_TURN, *map(str, classes)], value=IN_TURN, visible=bool(classes)),
        gr.update(visible=student.takes_text),
        gr.update(choices=scales, value=scales[0], visible=scales != [1.0]),
        f"Teacher: {student.about}",
    ]


def show(
    students: Students,
    name: str,
    steps: int,
    teacher_steps: int,
    label: str,
    prompt: str,
    scale: float,
    count: int,
    seed: int,
) -> list[Any]:
    """Images of student and teacher, each with a line of network calls and time."""
    student, text = students(name), (prompt or "").strip()
    for what, number, most in (("teacher steps", teacher_steps, MOST_STEPS), ("images", count, MOST_IMAGES)):
        if not 1 <= number <= most:
            raise ValueError(f"{number} {what}: give a number from 1 to {most}")
    condition: int | str | None = None if label in (None, IN_TURN) else int(label)
    if student.takes_text:
        if not 1 <= len(text) <= MOST_LETTERS:
            raise ValueError(f"the prompt has {len(text)} letters: say what to draw in 1 to {MOST_LETTERS}")
        condition = text
    elif not student.classes:  # a class or prompt of the student before may still be in its hidden field
        condition = None
    request = Request(int(count), int(seed or 0), condition, float(scale))
    ours = timed(partial(draw_student, student, request, int(steps)))
    theirs: tuple[str, list[Image.Image]] = f"Teacher: {student.about}", []
    if student.teacher is not None:
        try:
            theirs = timed(partial(draw_teacher, student, request, int(teacher_steps)))
        except Exception as error:  # its pipeline may not draw with what the student was trained on
            theirs = f"Teacher: it could not draw ({type(error).__name__}: {error})", []
    return [*ours, *theirs]


def on_page(function: Callable[..., list[Any]], *given: Any) -> Callable[..., list[Any]]:
    """Returns the function with the first arguments given, and shows what it raises as one line on the page."""

    def call(*chosen: Any) -> list[Any]:
        try:
            return function(*given, *chosen)
        except Exception as error:
            expected = isinstance(error, OSError | ValueError)
            text = str(error).removeprefix("--pipeline ") if expected else f"{type(error).__name__}: {error}"
            raise gr.Error(text, print_exception=not expected) from error

    return call


def make_page(names: Sequence[str], device: str) -> gr.Blocks:
    """Makes the page, to be launched."""
    students = Students(names, device)
    with gr.Blocks(title="hsivi_diffusers", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown("# A student beside its teacher")
        with gr.Row():
            name = gr.Dropdown(students.names, value=names[0], label="Student, or a repo id", allow_custom_value=True)
            steps = gr.Dropdown([1], value=1, label="Steps of the student")
            teacher_steps = gr.Slider(1, MOST_STEPS, 20, step=1, label="Steps of the teacher")
        with gr.Row():
            label = gr.Dropdown([IN_TURN], value=IN_TURN, label="Class", visible=False)
            prompt = gr.Textbox("", label="Prompt", visible=False, max_length=MOST_LETTERS)
            scale = gr.Dropdown([1.0], value=1.0, label="Guidance scale", visible=False)
            count = gr.Slider(1, MOST_IMAGES, 8, step=1, label="Images")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53)
        button, about = gr.Button("Draw", variant="primary"), gr.Markdown()
        with gr.Row():
            shown = list[gr.Component]()
            for who in ("Student", "Teacher"):
                with gr.Column():
                    shown += [gr.Markdown(who), gr.Gallery(columns=4, object_fit="contain", show_label=False)]
        one_by_one: dict[str, Any] = {"concurrency_id": "networks", "concurrency_limit": 1}
        chosen, asked = [steps, label, prompt, scale, about], [name, steps, teacher_steps, label, prompt, scale]
        for event in (name.change, page.load):
            event(on_page(choose, students), name, chosen, api_name="choose", **one_by_one)
        button.click(on_page(show, students), [*asked, count, seed], shown, api_name="draw", **one_by_one)
    return page


def check_address(options: Demo) -> None:
    """Refuses an address or a port that cannot be listened at, which gradio tries for minutes.

    Raises:
        ValueError: The name is of no address of this machine, or the port is taken or out of range.
    """
    check_numbers(options, server_port=(1, 65535))
    name, port = options.server_name, options.server_port
    try:
        family, _, _, _, address = socket.getaddrinfo(name, port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        where = f"--server_name {name}" + (f" --server_port {port}" if port else "")
        raise ValueError(f"{where}: {error}; give an address of this machine, and a free port") from error


def main(args: Sequence[str]) -> None:
    """Runs `hsivi demo`."""
    (options,) = parse_options([Demo], DEMO, args, "hsivi demo")
    names = options.pipeline or [str(folder) for folder in BUNDLED if folder.is_dir()]
    if not names:
        raise ValueError("--pipeline is missing: give folders of runs, or repo ids")
    if unknown := [name for name in names if not Path(name).is_dir() and not names_repo(name)]:
        raise ValueError(f"--pipeline {unknown[0]} is no folder, and no repo id such as user/name: check the spelling")
    check_address(options)
    page = make_page(names, usable_device(options.device))
    # Nothing needs to be uploaded, and the least that can be allowed is a byte. Quiet, for gradio offers to share.
    where = {"server_name": options.server_name, "server_port": options.server_port}
    _, address, _ = page.launch(**where, max_file_size=1, quiet=True, prevent_thread_lock=True)
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()
