"""Tunes the solvers of a teacher: grid, order and kind, for each number of network calls.

    python -m training.benchmarks.images.tune_solvers --config training/configs/solvers_digits.yaml

For each solver and number of calls, Optuna's TPE looks for the settings with the least mean log distance to real
images in three spaces (`spaces.py`); of scenes the share that is not right counts as a fourth distance. A trial draws
from noise of `--tuning_seed`. The best settings are then measured with more images, in float32, from noise of
`--eval_seed`, beside the stock settings of diffusers. The first trials are what was found for other sets, the stock
grids and a few good ones; then the timesteps are e + (s - e) (k / (n - 1))^p, k = n - 1 .. 0, of the clock. Each solver
and number of calls has a row in OUTPUT_DIR/solvers.json; solvers.md has the tables. A study that was stopped continues
by the same command, and rows that exist are kept.

Guidance is constant, or falls with noise (--guidance_falls), or is in an interval of times alone (--guidance_interval,
arXiv 2404.07724): a step outside it is one network call, so there are more steps. These have rows of their own.

With --polish, UniPC is tuned further, from its row: all its timesteps, what the network is told of each, the scale of
the noise, contrast and brightness, by COBYQA of scipy in --trials steps. See `PolishedSolver`; rows of their own, too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from scipy.optimize import minimize
from torch import Tensor

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.pages import measured_on
from hsivi_diffusers.runs.folders import in_turn
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.teachers.levels import power_timesteps
from hsivi_diffusers.teachers.solvers import SOLVERS

from .benchmark_results import Row, hash_networks, read_rows, write_rows
from .set_teacher import SetTeacher
from .solver_pages import FALLING, INTERVAL, POLISHED_SET, WITHOUT, score, write_page
from .spaces import make_spaces

# What is tuned of each solver beside its grid, by the names of diffusers.
CHOICES: dict[str, dict[str, list[Any]]] = {
    "DDIM": {},
    "DPM-Solver++": {"solver_order": [1, 2, 3], "solver_type": ["midpoint", "heun"]},
    "DPM-Solver++ SDE": {"solver_order": [1, 2], "solver_type": ["midpoint", "heun"]},
    "UniPC": {"solver_order": [1, 2, 3], "solver_type": ["bh1", "bh2"]},
    "DEIS": {"solver_order": [1, 2, 3]},
    "SA-Solver": {"predictor_order": [1, 2, 3], "corrector_order": [1, 2, 3]},
    "iPNDM": {},
}
WRONG = "wrong"  # share of scenes that are not right
WORST = 20.0  # mean log distance that stands for an infinite one
FINAL = ("DPM-Solver++", "DPM-Solver++ SDE", "UniPC")  # end at sigma 0, or at the lowest of the clock
GRIDS = ("leading", "trailing", "linspace")  # of diffusers; iPNDM has none for a teacher
# Start and end, as shares of the clock, and power; the last one is for flows, which start at pure noise.
POWER_GRIDS = [(0.7, 0.03, 1.5), (0.8, 0.02, 1.5), (0.9, 0.01, 2.0), (0.95, 0.06, 1.0), (0.44, 0.1, 1.0)]
POWER_GRIDS += [(0.999, 0.05, 1.0)]
GUIDANCE_ENDS = (0.2, 0.35, 0.5, 0.8)  # shares of the clock
# Shares of guided steps, of those that the calls allow, and of the others before them; the first is constant guidance.
GUIDED_SHARES = [(1.0, 0.0), (0.5, 0.5), (0.5, 0.25), (0.75, 0.5), (0.5, 0.0)]
SUFFIXES = {"guidance_falls": FALLING, "guidance_interval": INTERVAL}  # of sets whose guidance is not constant


@dataclass
class Options:
    _group = "tuning"
    dataset: str | None = option(None, "name of the set")
    teacher: str | None = option(None, "folder of the teacher")
    classifier: str | None = option(None, "folder of the ImageClassifier")
    real_data: str = option("digits", "real images, see train_teacher.py; of a text-to-image teacher `scenes`")
    guidance_scale: float | None = option(None, "scale of guidance; with another than 1 a step is two network calls")
    guidance_falls: bool = option(False, "guide less the more noise there is, and tune where guidance ends")
    guidance_interval: bool = option(False, "guide some of the steps alone, the others take one call, and tune which")
    solvers: list[str] = option([*CHOICES], "solvers to tune")
    polish: bool = option(False, "tune the tuned UniPC further, by numbers that diffusers has no options for")
    calls: list[int] = option([1, 2, 3, 4, 5, 8, 10, 15, 20], "network calls")
    trials: int = option(30, "settings to try for each solver and number of calls")
    tuning_samples: int = option(2000, "images of a trial")
    tuning_seed: int = option(9, "seed of their noise, and of the search")
    num_samples: int = option(5000, "images that what was found is measured by")
    eval_seed: int = option(0, "seed of their noise")
    batch_size: int = option(500, "images at once")
    mixed_precision: Literal["no", "bf16"] = option("no", "precision of the trials")
    output_dir: str = option("docs/benchmarks", "folder of solvers.json")
    runs_dir: str = option("runs/solvers", "folder of the trials")


class Tuning:
    """Teacher and spaces of one set."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.networks = hash_networks(Path(str(options.teacher)), Path(str(options.classifier)))
        self.teacher = SetTeacher(str(options.teacher), options.real_data, options.guidance_scale)
        self.clock = len(self.teacher.teacher.schedule)
        if odd := [calls for calls in options.calls if calls % self.teacher.guided.calls]:
            raise ValueError(f"--calls {odd}: a guided step is two network calls: give even numbers")
        schedule = self.teacher.teacher.schedule
        if options.polish and (schedule.is_flow or schedule.is_edm):
            raise ValueError("--polish true is for teachers of betas, not for rectified flows or EDM: leave it out")
        self.spaces = make_spaces(Path(str(options.classifier)), self.teacher.real[0])
        scenes = self.teacher.scenes
        self.measures: Any = scenes and scenes.measures(Path(str(options.classifier)))

    def draw(self, solver: str, calls: int, size: int, seed: int, **settings: Any) -> Tensor:
        """Images of a solver, shape (size, C, H, W)."""
        return self.teacher.draw(self.teacher.solver(solver, calls, **settings), size, self.options.batch_size, seed)

    def distances(self, images: Tensor) -> dict[str, float]:
        """Distances of images to the real ones, by the name of the space; infinite if an image is not finite.

        Of scenes also the share that is not right.
        """
        measures: dict[str, Callable[[Tensor], float]] = {space.name: space.distance for space in self.spaces}
        if self.measures is not None:
            measures[WRONG] = self.wrong
        finite = bool(images.isfinite().all())
        return {name: measure(images) if finite else math.inf for name, measure in measures.items()}

    def wrong(self, images: Tensor) -> float:
        """The share of the images that do not show the scene that was asked for, of none one half of an image."""
        right = self.measures.right(images, self.teacher.asked(len(images)))
        return max(1 - right, 0.5 / len(images))

    @cached_property
    def floor(self) -> dict[str, float]:
        """The distances of as many real images as a row has."""
        options = self.options
        return self.distances(
            self.teacher.draw(self.teacher.draw_real, options.num_samples, options.batch_size, options.eval_seed)
        )

    def score(self, solver: str, calls: int, trial: optuna.Trial) -> float:
        """What a trial is worth, see `solver_pages.score`."""
        guided = trial.suggest_int("guided_steps", 1, calls // 2) if self.options.guidance_interval else 0
        steps = calls - guided if guided else calls // self.teacher.guided.calls
        settings = suggest(trial, solver, steps, self.clock)
        if self.options.guidance_falls:
            settings["guidance_end"] = round(self.clock * trial.suggest_float("guidance_end", 0.1, 1.0))
        if guided:
            before = round((steps - guided) * trial.suggest_float("before", 0.0, 1.0))
            times = self.teacher.solver(solver, steps, unguided=True, **settings).times
            settings |= {"guided_steps": guided, "guidance_interval": interval_of(times, before, guided, self.clock)}
        with torch.autocast(
            self.teacher.teacher.device.type, torch.bfloat16, enabled=self.options.mixed_precision == "bf16"
        ):
            images = self.draw(solver, calls, self.options.tuning_samples, self.options.tuning_seed, **settings)
        found = self.distances(images.float())
        trial.set_user_attr("settings", settings)
        return score(found)

    def tune(self, solver: str, calls: int) -> Row:
        """The settings of the best trial, or the stock ones where they are better on the noise of `eval_seed`."""
        options, steps = self.options, calls // self.teacher.guided.calls
        study = optuna.create_study(
            study_name=f"{options.dataset}, {solver} at {calls}, {options.tuning_samples} images, {self.networks}"
            f", w={options.guidance_scale}{f', {WRONG}' if self.measures else ''}",
            storage=JournalStorage(JournalFileBackend(str(Path(options.runs_dir) / "trials.log"))),
            sampler=optuna.samplers.TPESampler(seed=options.tuning_seed, multivariate=True, group=True),
            load_if_exists=True,
        )
        rows, stock_settings = read_rows(Path(options.output_dir) / "solvers.json"), SOLVERS[solver][1]
        rows = [row for row in rows if not row["dataset"].endswith((FALLING, INTERVAL, POLISHED_SET))]
        if varies := options.guidance_falls or options.guidance_interval:  # starts from the set's constant guidance
            rows = [row for row in rows if options.dataset in (row["dataset"] + kind for kind in SUFFIXES.values())]
        others = [row["settings"] for row in rows if (row["solver"], row.get("steps", row["calls"])) == (solver, steps)]
        firsts = [as_trial(solver, found, self.clock) for found in others if found != stock_settings]
        if options.guidance_falls:
            firsts = [{**first, "guidance_end": end} for first in firsts for end in GUIDANCE_ENDS]
        if options.guidance_interval:
            guided = [(max(1, round(share * calls / 2)), before) for share, before in GUIDED_SHARES]
            differing = {(g, round((calls - 2 * g) * before)): (g, before) for g, before in guided}.values()
            firsts = [{**first, "guided_steps": g, "before": before} for first in firsts for g, before in differing]
        for first in [*firsts, *first_trials(solver)]:
            study.enqueue_trial(first, skip_if_exists=True)
        done = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))
        study.optimize(partial(self.score, solver, calls), max(options.trials - done, 0))
        settings = study.best_trial.user_attrs["settings"]
        given = (solver, calls, options.num_samples, options.eval_seed)
        stock, tuned = self.distances(self.draw(*given)), self.distances(self.draw(*given, **settings))
        if score(stock) < score(tuned) and not varies:  # stock guidance is constant
            settings, tuned = {}, stock
        steps = calls - settings["guided_steps"] if options.guidance_interval else steps
        return self._row(solver, calls, steps, {**stock_settings, **settings}, stock, tuned)

    def polish(self, solver: str, calls: int) -> Row:
        """The tuned solver, and what it becomes with all of `Polish`; `stock` has the distances of the former."""
        options, steps = self.options, calls // self.teacher.guided.calls
        before = {**self.tuned(solver, calls)["settings"]}
        start = Polish(self.teacher.solver(solver, calls, **before).times, self.clock)
        rest = {name: value for name, value in before.items() if not name.startswith("timestep")}

        def worth(point: Sequence[float]) -> float:
            moved = {**rest, **start.moved(point)}
            images = self.draw(solver, calls, options.tuning_samples, options.tuning_seed, **moved)
            return min(score(self.distances(images)), WORST)

        found = minimize(
            worth,
            start.first,
            method="COBYQA",
            options={"maxfev": options.trials, "initial_tr_radius": 0.5, "final_tr_radius": 0.01},
        )
        settings, given = {**rest, **start.moved(found.x)}, (solver, calls, options.num_samples, options.eval_seed)
        tuned, polished = (self.distances(self.draw(*given, **each)) for each in (before, settings))
        if score(tuned) < score(polished):
            settings, polished = {**rest, **start.moved([0.0] * start.size)}, tuned
        return self._row(solver, calls, steps, settings, tuned, polished)

    def tuned(self, solver: str, calls: int) -> Row:
        """The row of a tuned solver.

        Raises:
            ValueError: There is none.
        """
        options, path = self.options, Path(self.options.output_dir) / "solvers.json"
        name = str(options.dataset).removesuffix(POLISHED_SET)
        for row in read_rows(path):
            if key_of(row) == (name, calls, solver):
                return row
        raise ValueError(f"{path} has no {solver} of {name} at {calls}, where --polish begins: tune it first")

    def _row(
        self,
        solver: str,
        calls: int,
        steps: int,
        settings: dict[str, Any],
        stock: dict[str, float],
        tuned: dict[str, float],
    ) -> Row:
        options = self.options
        return {
            "dataset": options.dataset,
            "solver": solver,
            "calls": calls,
            "steps": steps,
            "scheduler": SOLVERS[solver][0].__name__,
            "settings": settings,
            "tuned": tuned,
            "stock": stock,
            "floor": self.floor,
            **{
                name: getattr(options, name)
                for name in (
                    *("num_samples", "eval_seed", "tuning_samples", "tuning_seed", "mixed_precision"),
                    "guidance_scale",
                )
            },
            "trials": options.trials,
            "networks": self.networks,
            "measured": measured_on(),
        }


@dataclass(frozen=True)
class Polish:
    """The settings of a `PolishedSolver` by numbers of size 1: 2 n + 3 of n timesteps, all 0 for the solver as it is.

    Two for each timestep, 0.1 of its logarithm and of that of what the network is told over it; 0.1 of the logarithm of
    the scale of the noise, 0.02 of that of the contrast, and 0.02 of the brightness. The search begins where the
    network is told times 6 % lower, as it is off the path towards noise, in 6 % more noise.
    """

    timesteps: Sequence[float]
    clock: int

    @property
    def size(self) -> int:
        return 2 * len(self.timesteps) + 3

    @property
    def first(self) -> list[float]:
        count = len(self.timesteps)
        return [0.0] * count + [-0.6] * count + [0.6, -0.5, -0.5]

    def moved(self, point: Sequence[float]) -> dict[str, Any]:
        """Settings of `SetTeacher.solver`."""
        point, count = [float(each) for each in point], len(self.timesteps)
        highest = self.clock - 1.0
        moved = [min(t * math.exp(0.1 * by), highest) for t, by in zip(self.timesteps, point[:count], strict=True)]
        times = sorted(moved, reverse=True)
        told = [min(t * math.exp(0.1 * by), highest) for t, by in zip(times, point[count : 2 * count], strict=True)]
        noise, contrast, brightness = point[2 * count :]
        return {
            "timesteps": [round(t, 2) for t in times],
            "polish": {
                "told": [round(t, 2) for t in told],
                "noise_scale": round(math.exp(0.1 * noise), 4),
                "contrast": round(math.exp(0.02 * contrast), 4),
                "brightness": round(0.02 * brightness, 4),
            },
        }


def first_trials(solver: str) -> list[dict[str, Any]]:
    """The stock grids of diffusers, and a few good ones."""
    grids: list[dict[str, Any]] = [] if solver == "iPNDM" else [{"grid": grid} for grid in GRIDS]
    power = [{"grid": "power", "start": start, "end": end, "power": power} for start, end, power in POWER_GRIDS]
    return [{**usual(solver), **grid} for grid in [*grids, *power]]


def as_trial(solver: str, settings: dict[str, Any], clock: int) -> dict[str, Any]:
    """The trial of nearly the settings of a row: `suggest` the other way about, so that a set starts from others."""
    names = [*CHOICES[solver], "final_sigmas_type"]
    chosen = {name: settings[name] for name in names if name in settings}
    if "timesteps" not in settings:
        return {**chosen, "grid": settings["timestep_spacing"]}
    steps = settings["timesteps"]
    first, last, intervals = steps[0], steps[-1], len(steps) - 1
    bent = {"power": math.log((steps[1] - last) / (first - last), 1 - 1 / intervals)} if intervals > 1 else {}
    return {**chosen, "grid": "power", "start": first / clock, "end": last / clock, **bent}


def usual(solver: str) -> dict[str, Any]:
    """What diffusers has where it is not told: of the settings that are tuned."""
    parameters = signature(SOLVERS[solver][0]).parameters
    names = [*CHOICES[solver], *(["final_sigmas_type"] if solver in FINAL else [])]
    return {name: parameters[name].default for name in names}


def suggest(trial: optuna.Trial, solver: str, steps: int, clock: int) -> dict[str, Any]:
    """Settings of a trial: those of the scheduler, and `timesteps` where the grid is not a stock one."""
    settings: dict[str, Any] = {name: trial.suggest_categorical(name, kinds) for name, kinds in CHOICES[solver].items()}
    if solver in FINAL:
        settings["final_sigmas_type"] = trial.suggest_categorical("final_sigmas_type", ["zero", "sigma_min"])
    grid = trial.suggest_categorical("grid", ["power"] if solver == "iPNDM" else ["power", *GRIDS])
    if grid != "power":
        return {**settings, "timestep_spacing": grid}
    start = trial.suggest_float("start", 0.2, 0.999)
    end = trial.suggest_float("end", 0.001, 0.2, log=True) if steps > 1 else start
    power = trial.suggest_float("power", 0.7, 3) if steps > 2 else 1.0
    first, last = (min(round(clock * share), clock - 1) for share in (start, end))
    if steps > first - last + 1:
        raise optuna.TrialPruned
    return {**settings, "timesteps": power_timesteps(steps, first, last, power)}


def interval_of(times: list[float], before: int, guided: int, clock: int) -> tuple[float, float]:
    """Ends of the interval that has the `guided` steps after the first `before`: halfway to the neighbouring steps."""
    borders = [clock, *(round((above + below) / 2, 1) for above, below in pairwise(times)), 0]
    return borders[before + guided], borders[before]


def key_of(row: Row) -> tuple[str, int, str]:
    """What a row is of."""
    return row["dataset"], row["calls"], row["solver"]


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Options], __doc__ or "", args)
    missing = [name for name in ("dataset", "teacher", "classifier") if not getattr(options, name)]
    if missing:
        raise ValueError(f"--{', --'.join(missing)} missing: give --config training/configs/solvers_digits.yaml")
    if str(options.dataset).endswith(WITHOUT) and options.guidance_scale != 1:
        raise ValueError(f"--dataset {options.dataset!r} needs --guidance_scale 1")
    for name in (chosen := [name for name in SUFFIXES if getattr(options, name)]):
        if len(chosen) > 1:
            raise ValueError(f"--{' true --'.join(chosen)} true: give one of them")
        if options.guidance_scale in (None, 1):
            raise ValueError(f"--{name} true has no effect without a --guidance_scale other than 1")
        if options.guidance_interval and min(options.calls) < 4:
            raise ValueError(f"--calls {min(options.calls)}: one guided step has no other beside it, give 4 or more")
        options.dataset = f"{options.dataset}{SUFFIXES[name]}"
    if options.polish:
        if options.guidance_falls or options.guidance_interval:
            raise ValueError("--polish true goes with constant guidance: leave out what varies it")
        options.dataset, options.solvers = f"{options.dataset}{POLISHED_SET}", ["UniPC"]
    if unknown := [solver for solver in options.solvers if solver not in CHOICES]:
        raise ValueError(f"--solvers {', '.join(unknown)} unknown: choose from {', '.join(CHOICES)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # of `group=`
    path, tuning = Path(options.output_dir) / "solvers.json", Tuning(options)
    for folder in (path.parent, Path(options.runs_dir)):
        folder.mkdir(parents=True, exist_ok=True)
    if any(row.get("networks") != tuning.networks for row in read_rows(path) if row["dataset"] == options.dataset):
        raise ValueError(
            f"{path} has rows of {options.dataset} of another teacher or classifier: name another --output_dir"
        )
    for calls in options.calls if options.polish else []:
        tuning.tuned("UniPC", calls)  # refused now, and not after the calls before it
    for calls in options.calls:
        for solver in options.solvers:
            if (options.dataset, calls, solver) not in map(key_of, read_rows(path)):
                row = tuning.polish(solver, calls) if options.polish else tuning.tune(solver, calls)
                with in_turn(path.parent):
                    write_rows(path, sorted([*read_rows(path), row], key=key_of))
                    write_page(path.parent)
                print(
                    f"{solver} at {calls}: stock {row['stock']}, tuned {row['tuned']} by {row['settings']}", flush=True
                )


if __name__ == "__main__":
    run_command(main)
