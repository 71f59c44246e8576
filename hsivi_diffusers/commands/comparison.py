"""Images of a student, a solver and the teacher from the same noise, with network calls and milliseconds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from PIL import Image

from ..pipeline_hsivi import network_calls
from ..runs.artifacts import PROMPTS, column_prompts, folder_of_run, read_prompts, run_of
from ..share.push import check_repo_id
from ..teachers.loading import kind_of, load_teacher
from .sample import classes_of, draw, load_sampler

# The best general solver of ODEs at 4 and 8 calls on the grids of diffusers, docs/benchmarks/solvers.md.
SOLVER = "UniPC"
GUIDED_FROM = 16  # calls; with fewer, constant guidance, which takes two calls a step, makes the images worse
ON_GRID = ", default grid of diffusers"
ADDS_NOISE = ", stochastic, so its images differ"  # those of the student and the solver are of the same noise
STRIP = (1, 2, 4, 8)  # calls of a solver
IDEAS = 6  # prompts of the run that are offered
Drawn = tuple[list[Image.Image], int, str, str]  # images, network calls for each, what drew them, and a remark


@dataclass(frozen=True)
class Student:
    """A distilled pipeline, and its teacher beside it, which may be missing, on a device."""

    pipeline: Any
    teacher: Any
    about: str  # name of the teacher, or why there is none
    classes: Sequence[int]  # that it was trained on
    negative_prompt: str  # that it was trained with
    ideas: Sequence[str]  # prompts to try

    @property
    def takes_text(self) -> bool:
        """Whether it draws prompts."""
        return kind_of(self.pipeline).takes_text

    @property
    def depths(self) -> list[int]:
        """The step counts that it was trained with."""
        return list(self.pipeline.scheduler.depths)

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


@dataclass(frozen=True)
class Panel:
    """Images under a heading; without images the text says why."""

    title: str
    text: str
    images: Sequence[Image.Image] = ()


def load_with_teacher(name: str, device: str) -> Student:
    """Loads a student, and the teacher that its run or its card names.

    Raises:
        ValueError: There is none, or its card names something else than a repo as its teacher.
    """
    run, prompts = run_of(name), folder_of_run(name) / PROMPTS
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
    ideas = column_prompts(read_prompts(str(prompts)), run)[:IDEAS] if prompts.is_file() else []
    given = classes_of(pipeline, name), run.get("negative_prompt", ""), ideas
    if teacher is None:
        return Student(pipeline, None, about, *given)
    teacher.set_sizes(pipeline.scheduler.config)
    teacher.to(device).network.eval()
    return Student(pipeline, teacher, about, *given)


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
    images = draw(pipeline, conditions, request.generators(pipeline.device), num_steps, scale)
    return images, num_steps, "Student", ""


@torch.no_grad()
def draw_teacher(student: Student, request: Request, num_steps: int, solver: str | None = None) -> Drawn:
    """Draws with the teacher of a student."""
    teacher = student.teacher
    given = request.conditions(student.classes), request.generators(teacher.device), num_steps, request.scale
    images, calls, sampler = teacher.draw_teacher(*given, student.negative_prompt, solver)
    name = sampler.removesuffix("Scheduler").removesuffix("Discrete")
    if solver:
        return images, calls, f"Solver ({name})", ON_GRID
    return images, calls, f"Teacher ({name})", ADDS_NOISE if re.search("SDE|DDPM|Ancestral", name) else ""


def draw_solver(student: Student, request: Request, calls: int) -> Drawn:
    """Draws with the teacher in a few network calls."""
    if request.scale == 1 or student.teacher.embeds_guidance:
        return draw_teacher(student, request, calls, SOLVER)
    if calls >= GUIDED_FROM:
        return draw_teacher(student, request, calls // 2, SOLVER)
    images, calls, title, _ = draw_teacher(student, replace(request, scale=1.0), calls, SOLVER)
    return images, calls, title, f" without guidance{ON_GRID}"


def timed(draws: Callable[[Student, Request, int], Drawn], student: Student, request: Request, number: int) -> Panel:
    """Draws, and counts network calls and milliseconds."""
    start = time.perf_counter()
    images, calls, title, remark = draws(student, request, number)
    milliseconds = 1000 * (time.perf_counter() - start)
    of = f" for {len(images)} images" if len(images) > 1 else ""
    return Panel(title, f"{network_calls([calls])}{remark}, {milliseconds:,.0f} ms{of}", images)


def of_teacher(
    title: str, draws: Callable[[Student, Request, int], Drawn], student: Student, request: Request, number: int
) -> Panel:
    """Draws with a teacher, if there is one that can."""
    if student.teacher is None:
        return Panel(title, f"no teacher: {student.about}")
    try:
        return timed(draws, student, request, number)
    except Exception as error:  # its pipeline may not draw with what the student was trained on
        return Panel(title, f"it could not draw ({type(error).__name__}: {error})")


def compare(student: Student, request: Request, num_steps: int, teacher_steps: int) -> Iterator[Panel]:
    """Yields images of the student, of a solver in as many network calls, and of the teacher in more."""
    yield timed(draw_student, student, request, num_steps)
    yield of_teacher("Solver", draw_solver, student, request, num_steps)
    yield of_teacher("Teacher", draw_teacher, student, request, teacher_steps)


def draw_strip(student: Student, request: Request, num_steps: int, teacher_steps: int) -> list[Panel]:
    """Draws the first image alone, in several numbers of network calls by the student, or if it has one, the solver.

    The others draw it in one, last.
    """
    first, several = replace(request, count=1), len(student.depths) > 1
    ours = [timed(draw_student, student, first, depth) for depth in student.depths]
    numbers = [num_steps] if several else STRIP
    solvers = [of_teacher("Solver", draw_solver, student, first, number) for number in numbers]
    teacher = of_teacher("Teacher", draw_teacher, student, first, teacher_steps)
    return [*ours, *solvers, teacher] if several else [*solvers, *ours, teacher]


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
            student = self._kept[name] = load_with_teacher(name, self.device)
            first = Request(1, 0, "an image" if student.takes_text else None, student.scales[0])
            with suppress(Exception):  # which a visitor is told of who asks for more
                [*compare(student, first, student.depths[0], 1)]  # what is done once only should not be timed
        return self._kept[name]
