"""A page in the browser that compares students with solvers and teachers: `hsivi demo`.

What a visitor chooses travels with each request, so several can use the page at once; networks draw for one at a time.
Visitors reach the folders that the page was started with, and repos of the Hub. The browser loads nothing from other
hosts.
"""

from __future__ import annotations

import math
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..teachers.loading import kind_of
from .comparison import SOLVER, Panel, Request, Student, Students, compare, draw_strip, names_repo
from .options import check_numbers
from .sample import usable_device

Judge = Callable[[Sequence[Image.Image], Sequence[Any]], str]  # images and their classes or prompts -> a remark
BUNDLED = [Path("assets/students", f"{name}_t4") for name in ("scenes", "emoji", "fashion", "digits")]  # in a clone
MOST_STEPS, MOST_IMAGES = 100, 16  # of the teacher; of a request
LAST_SEED = 2**53
COUNTS = [1, 4, 9, 16]  # images of a square
MOST_LETTERS = 1000  # of a prompt; text encoders read 77 to 512 tokens of it
SMALL = 256  # pixels; the pixels of smaller images are shown as squares
IN_TURN = "all in turn"
STUDENT = "Student, or a repo id"
TITLES = ("Student", "Solver", "Teacher")
INTRO = f"""# Student, solver and teacher from the same noise
The distilled student is compared with the solver {SOLVER}, which calls the teacher's network as often as the student
calls its own, and with the teacher in many calls. The solver has the timesteps that diffusers gives it; others, chosen
for this teacher, may be better: `hsivi evaluate` tries another grid."""
HINT = "<p>Press Draw.</p>"
FONTS = ["Inter", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]  # those of the visitor's machine
MONO = ["Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
THEME = gr.themes.Base(primary_hue="blue", neutral_hue="slate", radius_size="sm", font=FONTS, font_mono=MONO).set(
    body_background_fill="*neutral_50", block_background_fill="white", body_text_color_subdued="*neutral_500"
)
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important }
.controls { align-items: end } .controls button { min-height: 3rem }
#results, #results .html-container { padding: 0 !important; overflow-wrap: anywhere }
#results h2 { font-size: 1.1rem; font-weight: 600; margin: .5rem 0 0 }
#results p, #results figcaption { color: var(--body-text-color-subdued); margin: 0 0 .5rem }
#results figure { margin: 0 } #results img, #results i { display: block; width: 100%; margin: 0; border-radius: 3px }
#results i { aspect-ratio: 1; background: var(--border-color-primary); opacity: .5 }
.columns { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1.5rem }
.images { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 4px }
.pixels { image-rendering: pixelated }
.strip { margin-top: 1rem } .strip h2 { padding-bottom: .5rem }
.strip div { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: 1rem }
@media (max-width: 700px) { .columns { grid-template-columns: minmax(0, 1fr) } }
"""


def picture(image: Image.Image, about: str) -> str:
    """An image as HTML, with the image in it."""
    small, file = max(image.size) < SMALL, BytesIO()
    kind = "PNG" if small else "WEBP"
    image.save(file, kind, quality=90)
    content = b64encode(file.getvalue()).decode()
    kept = ' class="pixels"' * small
    return f'<img{kept} src="data:image/{kind.lower()};base64,{content}" alt="{about}" title="{about}">'


def column(panel: Panel, cells: Sequence[str]) -> str:
    """A panel as HTML: its heading, and its images, or their empty places, in a square."""
    square = f'<div class="images" style="--columns: {math.ceil(math.sqrt(len(cells)))}">{"".join(cells)}</div>'
    return f"<section><h2>{escape(panel.title)}</h2><p>{escape(panel.text)}</p>{square}</section>"


def strip(panels: Sequence[Panel], about: str) -> str:
    """The first image of each panel as HTML, above what drew it."""
    each = list[str]()
    for panel in panels:
        image, text = picture(panel.images[0], about), f"<b>{escape(panel.title)}</b><br>{escape(panel.text)}"
        each.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    return f'<section class="strip"><h2>The first image by network calls</h2><div>{"".join(each)}</div></section>'


def choose(students: Students, name: str) -> Iterator[list[Any]]:
    """Yields what can be asked of a student: its steps, classes, a prompt, scales of guidance; and its teacher."""
    student = students(name)
    depths, classes, scales, ideas = student.depths, student.classes, student.scales, student.ideas
    yield [
        gr.update(choices=depths, value=depths[-1], interactive=len(depths) > 1),
        gr.update(choices=[IN_TURN, *map(str, classes)], value=IN_TURN, visible=bool(classes)),
        gr.update(visible=student.takes_text, value="".join(ideas[:1])),
        gr.update(samples=[[idea] for idea in ideas], visible=bool(ideas)),
        gr.update(choices=scales, value=scales[0], visible=scales != [1.0]),
        gr.update(value=COUNTS[1] if kind_of(student.pipeline).draw_batch < COUNTS[2] else COUNTS[2]),
        f"Teacher: {student.about}",
        HINT,
    ]


def ask(student: Student, label: str | None, prompt: str | None, scale: float, count: int, seed: int | None) -> Request:
    """Returns what a visitor asks for.

    Raises:
        ValueError: It is too much, or there is no prompt where one is needed.
    """
    if not 1 <= count <= MOST_IMAGES:
        raise ValueError(f"{count} images: give a number from 1 to {MOST_IMAGES}")
    text = (prompt or "").strip()
    condition: int | str | None = None
    if student.takes_text:
        if not 1 <= len(text) <= MOST_LETTERS:
            raise ValueError(f"the prompt has {len(text)} letters: say what to draw in 1 to {MOST_LETTERS}")
        condition = text
    elif student.classes and label not in (None, IN_TURN):  # the fields of the student before may still be filled
        condition = int(str(label))
    return Request(int(count), int(seed or 0), condition, float(scale))


def show(
    students: Students,
    judge: Judge | None,
    name: str,
    steps: int,
    teacher_steps: int,
    label: str,
    prompt: str,
    scale: float,
    count: int,
    seed: int,
) -> Iterator[str]:
    """Yields images of student, solver and teacher as HTML, as they are drawn, and a strip of one noise."""
    student = students(name)
    if not 1 <= teacher_steps <= MOST_STEPS:
        raise ValueError(f"{teacher_steps} teacher steps: give a number from 1 to {MOST_STEPS}")
    request = ask(student, label, prompt, scale, count, seed)
    conditions = request.conditions(student.classes) or [""] * request.count
    abouts = [escape(f"{what} seed {request.seed + i}".strip()) for i, what in enumerate(conditions)]
    given, drawn = (student, request, int(steps), int(teacher_steps)), list[str]()

    def page_so_far(text: str) -> str:
        waiting = [column(Panel(title, text), ["<i></i>"] * request.count) for title in TITLES[len(drawn) :]]
        return f'<div class="columns">{"".join([*drawn, *waiting])}</div>'  # on a phone one below the other

    yield page_so_far("drawing ...")
    try:
        for panel in compare(*given):
            if judge is not None and panel.images and (remark := judge(panel.images, conditions)):
                panel = replace(panel, text=f"{panel.text}; {remark}")
            drawn.append(column(panel, [picture(*each) for each in zip(panel.images, abouts, strict=False)]))
            yield page_so_far("drawing ...")
        panels = [panel for panel in draw_strip(*given) if panel.images]
    except Exception:
        yield page_so_far("not drawn")
        raise
    if len(panels) > 1:
        yield page_so_far("") + strip(panels, abouts[0])


def on_page(function: Callable[..., Iterator[Any]], *given: Any) -> Callable[..., Iterator[Any]]:
    """Returns the function with the first arguments given, and shows what it raises as one line on the page."""

    def call(*chosen: Any) -> Iterator[Any]:
        try:
            yield from function(*given, *chosen)
        except Exception as error:
            expected = isinstance(error, OSError | ValueError)
            text = str(error).removeprefix("--pipeline ") if expected else f"{type(error).__name__}: {error}"
            raise gr.Error(text, print_exception=not expected) from error

    return call


def make_page(students: Students, judge: Judge | None = None) -> gr.Blocks:
    """Makes the page, to be launched, for the first student; what a judge says of images stands above them."""
    first = students(students.names[0])
    with gr.Blocks(title="hsivi demo", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            name = gr.Dropdown(
                students.names, value=students.names[0], label=STUDENT, allow_custom_value=True, min_width=280
            )
            steps = gr.Dropdown(first.depths, value=first.depths[-1], label="Steps of the student")
            teacher_steps = gr.Slider(1, MOST_STEPS, 20, step=1, label="Steps of the teacher")
        with gr.Row():
            label = gr.Dropdown([IN_TURN], value=IN_TURN, label="Class", visible=False)
            prompt = gr.Textbox("", label="Prompt", visible=False, max_length=MOST_LETTERS, scale=3, min_width=280)
            scale = gr.Dropdown(first.scales, value=first.scales[0], label="Guidance scale", visible=False)
        ideas = gr.Dataset(components=[prompt], samples=[], label="Prompts of the run", visible=False)
        with gr.Row(elem_classes="controls"):
            count = gr.Radio(COUNTS, value=COUNTS[1], label="Images", min_width=280)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LAST_SEED, min_width=120)
            button = gr.Button("Draw", variant="primary", min_width=120)
            following = gr.Button("Next seed", min_width=120)
        about, results = gr.Markdown(), gr.HTML(HINT, elem_id="results")
        one_by_one: dict[str, Any] = {"concurrency_id": "networks", "concurrency_limit": 1}
        chosen = [steps, label, prompt, ideas, scale, count, about, results]
        gr.on([name.change, page.load], on_page(choose, students), name, chosen, api_name="choose", **one_by_one)
        asked = [name, steps, teacher_steps, label, prompt, scale, count, seed]
        shown = on_page(show, students, judge), asked, results
        gr.on([button.click, prompt.submit], *shown, api_name="draw", show_progress="hidden", **one_by_one)
        moved = following.click(next_seed, [seed, count], seed, api_visibility="private")
        moved.success(*shown, api_visibility="private", show_progress="hidden", **one_by_one)
        ideas.click(lambda row: row[0], ideas, prompt, api_visibility="private")
    return page


def next_seed(seed: int | None, count: int) -> int:
    """The seed of images with none of the noise of those before."""
    return min((seed or 0) + count, LAST_SEED)


def launch(page: gr.Blocks, **where: Any) -> str:
    """Serves a page until the process ends, and returns its address."""
    # Nothing needs to be uploaded, and the least that can be allowed is a byte. Quiet, for gradio offers to share.
    kept: dict[str, Any] = {"max_file_size": 1, "run_history": False, "footer_links": [], "theme": THEME, "css": CSS}
    _, address, _ = page.launch(**where, **kept, quiet=True, prevent_thread_lock=True)
    return str(address)


def check_address(options: Any) -> None:
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


def serve(options: Any, judge: Judge | None = None) -> None:
    """Serves the page until Ctrl-C; the options are a `Demo`.

    Raises:
        ValueError: There is no student, or a name, the address or the port cannot be used.
    """
    names = options.pipeline or [str(folder) for folder in BUNDLED if folder.is_dir()]
    if not names:
        raise ValueError("--pipeline is missing: give folders of runs, or repo ids")
    if unknown := [name for name in names if not Path(name).is_dir() and not names_repo(name)]:
        raise ValueError(f"--pipeline {unknown[0]} is no folder, and no repo id such as user/name: check the spelling")
    check_address(options)
    students = Students(names, usable_device(options.device))
    print(f"loading {names[0]}", flush=True)
    page = make_page(students, judge)  # which refuses a first name that leads nowhere
    address = launch(page, server_name=options.server_name, server_port=options.server_port)
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()
