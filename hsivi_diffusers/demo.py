"""A page in the browser with a student beside its teacher: `hsivi demo`.

What a visitor chooses travels with each request, so several can use the page at once; networks draw for one at a time.
Visitors reach the folders that the page was started with, and repos of the Hub.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub import ModelCard
from PIL import Image

from .distillation.denoisers import sample_shape
from .distillation.guidance import calls_of_step, guided
from .distillation.ode import run_solver
from .distillation.pairs import make_unipc, pair_levels
from .distillation.prompts import takes_text
from .distillation.teachers import Parts, decode, load_parts
from .options import option, parse_options
from .sampling import classes_of, draw, enlarge, load_sampler, run_of, usable_device

DEMO = """Open a page in the browser that draws from distilled samplers, each beside its teacher.

    hsivi demo --pipeline runs/digits_t5"""
BUNDLED = Path("assets/students")  # in a clone
REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")
WIDTH = 192  # pixels that an image has on the page, about
MOST_STEPS, MOST_IMAGES = 100, 16  # of the teacher; of a request
IN_TURN = "all in turn"


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
class Pair:
    """A student and its teacher, which may be missing, on a device."""

    student: Any
    teacher: Parts | None
    name: str  # of the teacher, or why there is none

    @property
    def scales(self) -> list[float]:
        """Scales of guidance that the student has taken in; [1] if none."""
        return self.student.scheduler.guidance_scales or [1.0]


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

    def conditions(self, classes: int) -> list[Any] | None:
        """The class or prompt of each image; None of a pipeline without."""
        if self.condition is None:
            return [number % classes for number in range(self.count)] if classes else None
        return [self.condition] * self.count


def load_pair(name: str, device: str) -> Pair:
    """Loads a student, and the teacher that its run or its card names."""
    student = load_sampler(name).to(device)
    student.set_progress_bar_config(disable=True)
    run = run_of(name)
    source = run.get("pretrained_teacher_model")
    if not Path(name).is_dir():
        with suppress(OSError, ValueError):  # without a card
            source = ModelCard.load(name).data.base_model
    if not isinstance(source, str):
        return Pair(student, None, "not named by its run or its card")
    try:
        teacher = load_parts(source, run.get("revision"))
    except (OSError, ValueError) as error:
        return Pair(student, None, f"not loaded: {error}")
    teacher.network.to(device).eval()
    if teacher.host is not None:
        teacher.host.to(device).set_progress_bar_config(disable=True)
    return Pair(student, teacher, source)


@torch.no_grad()
def draw_teacher(pair: Pair, request: Request, num_steps: int) -> tuple[list[Image.Image], int]:
    """Images of the teacher, and its network calls for each.

    A pipeline of latents draws as it does by itself, a UNet on pixels by UniPC on a grid that follows its ODE well.
    """
    teacher = pair.teacher
    assert teacher is not None
    conditions, network = request.conditions(classes_of(pair.student)), guided(teacher.network, [request.scale])
    calls = num_steps * calls_of_step(network)
    if teacher.host is not None:
        given = {"num_inference_steps": num_steps, "guidance_scale": request.scale}
        return teacher.host(conditions, generator=request.generators(network.device), **given).images, calls
    shape, schedule = sample_shape(network), teacher.schedule
    solver = make_unipc(schedule, pair_levels(schedule, num_steps))
    generators = request.generators(network.device)
    noise = [torch.randn(1, *shape, generator=each, device=network.device) for each in generators]
    labels = None if conditions is None else torch.tensor(conditions, device=network.device)
    x = run_solver(network, solver, torch.cat(noise), num_steps, labels)
    pixels = decode(None, x).permute(0, 2, 3, 1).cpu().numpy()
    return pair.student.numpy_to_pil(pixels), calls


def draw_student(pair: Pair, request: Request, num_steps: int) -> tuple[list[Image.Image], int]:
    """Images of the student, and its network calls for each."""
    generators, conditions = request.generators(pair.student.device), request.conditions(classes_of(pair.student))
    scale = request.scale if pair.student.scheduler.guidance_scales else None
    return draw(pair.student, conditions, generators, num_steps, scale), num_steps


def timed(who: str, drawn: Callable[[], tuple[list[Image.Image], int]]) -> tuple[list[Image.Image], str]:
    """Images, enlarged, and a line that tells network calls and milliseconds."""
    start = time.perf_counter()
    images, calls = drawn()
    milliseconds = 1000 * (time.perf_counter() - start) / len(images)
    return [enlarge(image, WIDTH) for image in images], f"{who}: {calls} calls, {milliseconds:.0f} ms an image"


class Pairs:
    """Students by name, each with its teacher; the two that were used last are kept.

    Args:
        names: Folders and repo ids that may be asked for, besides repos of the Hub.
        device: Where they draw.
    """

    def __init__(self, names: Sequence[str], device: str) -> None:
        self.names, self._load = [*names], lru_cache(maxsize=2)(partial(load_pair, device=device))

    def __call__(self, name: str) -> Pair:
        """Returns the student of that name.

        Raises:
            ValueError: It may not be asked for, or there is none.
        """
        if name not in self.names and (Path(name).exists() or not REPO.fullmatch(name)):
            raise ValueError(f"{name!r} is not in the list, and no repo id such as user/name")
        return self._load(name)


def choose(pairs: Pairs, name: str) -> list[Any]:
    """What can be asked of a student: its steps, its classes, a prompt, its scales of guidance; and its teacher."""
    pair = pairs(name)
    depths, classes, scales = pair.student.scheduler.depths, classes_of(pair.student), pair.scales
    return [
        gr.update(choices=depths, value=depths[-1], interactive=len(depths) > 1),
        gr.update(choices=[IN_TURN, *map(str, range(classes))], value=IN_TURN, visible=classes > 0),
        gr.update(visible=takes_text(pair.student)),
        gr.update(choices=scales, value=scales[0], visible=scales != [1.0]),
        f"Teacher: {pair.name}",
    ]


def show(
    pairs: Pairs,
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
    pair, text = pairs(name), prompt.strip()
    if takes_text(pair.student) and not text:
        raise ValueError("the prompt is missing: say what to draw")
    request = Request(int(count), int(seed), text or (None if label == IN_TURN else int(label)), float(scale))
    ours, told = timed("Student", partial(draw_student, pair, request, int(steps)))
    theirs, theirs_told = list[Image.Image](), f"Teacher: {pair.name}"
    if pair.teacher is not None:
        theirs, theirs_told = timed("Teacher", partial(draw_teacher, pair, request, int(teacher_steps)))
    return [told, ours, theirs_told, theirs]


def told(function: Callable[..., list[Any]], *given: Any) -> Callable[..., list[Any]]:
    """Returns the function with the first arguments given, and shows what it raises as one line on the page."""

    def call(*chosen: Any) -> list[Any]:
        try:
            return function(*given, *chosen)
        except (OSError, ValueError) as error:
            raise gr.Error(str(error).removeprefix("--pipeline "), print_exception=False) from error

    return call


def make_page(names: Sequence[str], device: str) -> gr.Blocks:
    """Makes the page, to be launched."""
    pairs = Pairs(names, device)
    with gr.Blocks(title="hsivi_diffusers", analytics_enabled=False) as page:
        gr.Markdown("# A student beside its teacher")
        with gr.Row():
            name = gr.Dropdown(pairs.names, value=names[0], label="Student, or a repo id", allow_custom_value=True)
            steps = gr.Dropdown([1], value=1, label="Steps of the student")
            teacher_steps = gr.Slider(1, MOST_STEPS, 20, step=1, label="Steps of the teacher")
        with gr.Row():
            label = gr.Dropdown([IN_TURN], value=IN_TURN, label="Class", visible=False)
            prompt = gr.Textbox("", label="Prompt", visible=False)
            scale = gr.Dropdown([1.0], value=1.0, label="Guidance scale", visible=False)
            count = gr.Slider(1, MOST_IMAGES, 8, step=1, label="Images")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        button, about = gr.Button("Draw", variant="primary"), gr.Markdown()
        with gr.Row():
            shown = list[gr.Component]()
            for who in ("Student", "Teacher"):
                with gr.Column():
                    shown += [gr.Markdown(who), gr.Gallery(columns=4, object_fit="contain", show_label=False)]
        one_by_one: dict[str, Any] = {"concurrency_id": "networks", "concurrency_limit": 1}
        chosen, asked = [steps, label, prompt, scale, about], [name, steps, teacher_steps, label, prompt, scale]
        for event in (name.change, page.load):
            event(told(choose, pairs), name, chosen, api_name="choose", **one_by_one)
        button.click(told(show, pairs), [*asked, count, seed], shown, api_name="draw", **one_by_one)
    return page


def main(args: Sequence[str]) -> None:
    """Runs `hsivi demo`."""
    (options,) = parse_options([Demo], DEMO, args, "hsivi demo")
    names = options.pipeline or [str(folder) for folder in sorted(BUNDLED.glob("*"), reverse=True) if folder.is_dir()]
    if not names:
        raise ValueError("--pipeline is missing: give folders of runs, or repo ids")
    page = make_page(names, usable_device(options.device))
    try:
        page.launch(server_name=options.server_name, server_port=options.server_port)
    except OSError as error:
        raise ValueError(f"--server_name {options.server_name} --server_port {options.server_port}: {error}") from error
