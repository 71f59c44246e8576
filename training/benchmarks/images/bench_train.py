"""Measures how much sooner the preset `fast` has the Frechet distance (FD) that the preset `paper` reaches.

    OMP_NUM_THREADS=1 python -m training.benchmarks.images.bench_train --output_dir runs/bench_train

For each number of layers T and each seed, in one process and one after the other:

1. the cost of a layer update, both presets in turns: seconds, and the rows that each network is called with;
2. one run of `paper`, measured at the marks --paper_seconds;
3. complete runs of `fast`, one for each of --fast_seconds, for its learning rate ends at 0.

The clock is CPU time of the process, which has one thread: on a free core that is wall-clock, and other work on the
machine does not change it; wall-clock is kept too. It runs during updates only, not while a sampler is measured.

Writes OUTPUT_DIR/bench.json, bench.md and bench.png. What bench.json holds is not run again, so a benchmark that was
stopped goes on by the same command.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from hsivi_diffusers import load_teacher
from hsivi_diffusers.distillation.config import PRESETS, check_options, parse_recipe
from hsivi_diffusers.distillation.trainer import Players, load_networks
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.figures import plt
from hsivi_diffusers.evaluation.images import load_images
from hsivi_diffusers.evaluation.metrics import Distances
from hsivi_diffusers.evaluation.pages import measured_on
from hsivi_diffusers.evaluation.solvers import make_student, sample
from hsivi_diffusers.folders import claim_output_dir, write_json, write_text
from hsivi_diffusers.options import changes, option, parse_options
from hsivi_diffusers.vi import Step

from ..stopwatch import Stopwatch

Record = dict[str, Any]
MOST_UPDATES = 1_000_000  # of a run that the clock ends
TURN = {"paper": 1, "fast": 10}  # layer updates of a turn
COLOURS = {"paper": "#1f77b4", "fast": "#d62728"}


@dataclass
class Benchmark:
    _argument_group_name = "benchmark"
    output_dir: str | None = option(None, "folder of the benchmark")
    pretrained_teacher_model: str = option("assets/digits_ddpm", "folder or repo id of a diffusers pipeline")
    feature_extractor: str = option("assets/digits_classifier", "folder of an ImageClassifier")
    num_layers: list[int] = option([5, 10], "T")
    seeds: list[int] = option([0, 1, 2], "of training")
    train_batch_size: int = option(64, "rows of an update")
    paper_seconds: list[float] = option(
        [40, 80, 120, 160, 200], "CPU time when `paper` is measured; it ends at the last"
    )
    fast_seconds: list[float] = option([2.5, 5, 10, 20, 40, 200], "CPU time of the runs of `fast`")
    turns: int = option(3, "turns for the cost of an update")
    num_samples: int = option(2000, "images for a distance")


def make_players(preset: str, num_layers: int, seed: int, steps: int, bench: Benchmark) -> Players:
    """What train_hsivi.py would train with this preset."""
    arguments = [
        *[f"--preset={preset}", f"--num_layers={num_layers}", f"--seed={seed}", f"--max_train_steps={steps}"],
        *["--pretrained_teacher_model", bench.pretrained_teacher_model, f"--train_batch_size={bench.train_batch_size}"],
    ]
    options = parse_recipe(__doc__ or "", arguments)
    check_options(options)
    set_seed(seed)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    return Players(load_networks(options, accelerator), options, accelerator)


def measure(players: Players, distances: Distances, bench: Benchmark) -> float:
    """FD of the averaged layers; the noise is the same each time."""
    student = make_student(players.make_pipeline())
    return distances(torch.cat(list(sample(student, bench.num_samples, 500, seed=0))))["fd"]


def compare_costs(num_layers: int, seed: int, distances: Distances, bench: Benchmark) -> Record:
    """Cost of a layer update of each preset, in turns, and the FD that each starts from.

    A first turn, in which `fast` fills its pool, is not counted.
    """
    made = {preset: make_players(preset, num_layers, seed, MOST_UPDATES, bench) for preset in TURN}
    steps = {preset: players.updates(0) for preset, players in made.items()}
    costs: Record = {}
    for preset, players in made.items():
        costs[preset] = {"untrained_fd": measure(players, distances, bench), "seconds": [], "cpu_seconds": []}
        take(steps[preset], TURN[preset])
    with ExitStack() as stack:
        rows = {preset: stack.enter_context(players.counting_rows()) for preset, players in made.items()}
        for _ in range(bench.turns):
            for preset, updates in TURN.items():
                watch = take(steps[preset], updates)
                costs[preset]["seconds"].append(watch.seconds / updates)
                costs[preset]["cpu_seconds"].append(watch.cpu_seconds / updates)
    for preset, players in made.items():
        batches = bench.turns * TURN[preset] * bench.train_batch_size
        calls = {name: number / batches for name, number in rows[preset].items()}
        # Every batch is one call of the student, and the layers share theirs with the first critic update.
        calls["simulated"] = calls["student"] - players.options.method.critic_updates
        costs[preset]["calls"] = calls
    return costs


def take(steps: Iterator[Step], updates: int) -> Stopwatch:
    """Does so many layer updates; returns the time they took."""
    with Stopwatch() as watch:
        for _ in range(updates):
            next(steps)
    return watch


def run(
    preset: str, max_steps: int, marks: list[float], num_layers: int, seed: int, distances: Distances, bench: Benchmark
) -> Record:
    """Trains to the last mark of CPU seconds, or to the end without marks; measures at each mark, and at the end.

    Only `paper` may be stopped by the clock: its learning rates do not depend on when it ends.
    """
    players = make_players(preset, num_layers, seed, max_steps, bench)
    watch, steps, points, left = Stopwatch(), players.updates(0), [], list(marks)
    for update in range(1, max_steps + 1):
        with watch:
            next(steps)
        if (left and watch.cpu_seconds >= left[0]) or update == max_steps:
            fd = measure(players, distances, bench)
            points.append({"updates": update, "seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds, "fd": fd})
            left = [mark for mark in left if mark > watch.cpu_seconds]
            if marks and not left:
                break
    return {"points": points}


def jobs(bench: Benchmark, distances: Distances, runs: dict[str, Record]) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Names of the parts, and what does them; the contenders take turns in being first."""
    for turn, seed in enumerate(bench.seeds):
        for num_layers in bench.num_layers:
            given, case = (num_layers, seed, distances, bench), case_name(num_layers, seed)
            yield f"{case}, costs", partial(compare_costs, *given)
            cost = statistics.median(runs[f"{case}, costs"]["fast"]["cpu_seconds"])
            contenders = [(f"{case}, paper", partial(run, "paper", MOST_UPDATES, sorted(bench.paper_seconds), *given))]
            for seconds in bench.fast_seconds:  # as many updates as should take these seconds
                steps = max(1, round(seconds / cost))
                contenders.append((f"{case}, fast {seconds:g} s", partial(run, "fast", steps, [], *given)))
            yield from contenders if turn % 2 == 0 else contenders[::-1]


def case_name(num_layers: int, seed: int) -> str:
    return f"T {num_layers}, seed {seed}"


def points_of(runs: dict[str, Record], num_layers: int, seed: int, preset: str) -> list[Record]:
    """The measurements of a preset, by time."""
    start = f"{case_name(num_layers, seed)}, {preset}"
    points = [point for name, record in runs.items() if name.startswith(start) for point in record["points"]]
    return sorted(points, key=lambda point: float(point["cpu_seconds"]))


def match(target: Record, fast: list[Record]) -> Record:
    """The run of `fast` that has the FD of a point of `paper`, and how much sooner.

    It is the shortest that is as good, as all longer ones are too: FD does not fall steadily, and luck is not counted.
    """
    reached = None
    for point in takewhile(lambda point: point["fd"] <= target["fd"], reversed(fast)):
        reached = point
    return {
        "target": target,
        "reached": reached,
        "speed_up": reached and target["cpu_seconds"] / reached["cpu_seconds"],
        "wall_speed_up": reached and target["seconds"] / reached["seconds"],
        "bound": reached is fast[0],
    }


def decide(runs: dict[str, Record], num_layers: int, seed: int) -> Record:
    """Who had what FD, and when: to the best of all marks of `paper`, to its end, and the longest run of `fast`."""
    paper = points_of(runs, num_layers, seed, "paper")
    fast = points_of(runs, num_layers, seed, "fast")
    costs = runs[f"{case_name(num_layers, seed)}, costs"]
    return {
        "untrained": {preset: costs[preset]["untrained_fd"] for preset in TURN},
        "best": match(min(paper, key=lambda point: float(point["fd"])), fast),
        "end": match(paper[-1], fast),
        "longest": fast[-1],
    }


def point_cell(points: list[Record]) -> str:
    """FD, time and updates, or their means; no point at all is a FD that was not reached."""
    if not points:
        return "not reached"
    fd, seconds, updates = (statistics.mean(point[key] for point in points) for key in ("fd", "cpu_seconds", "updates"))
    return f"{fd:.2f}: {seconds:.1f} s, {updates:.0f}"


def match_cells(matches: list[Record]) -> list[str]:
    """Target, what reached it, and the speed-up, of one seed or in the mean over those that reached it."""
    done = [each for each in matches if each["reached"]]
    said = []
    if done:
        bound = ">= " if any(each["bound"] for each in done) else ""
        speed, wall = (statistics.mean(each[key] for each in done) for key in ("speed_up", "wall_speed_up"))
        said = [f"**{bound}{speed:.1f}** ({wall:.1f})"]
    if len(done) < len(matches):
        said.append(f"{len(done)} of {len(matches)} seeds")
    elif len(done) > 1:
        said.append(f"least {min(each['speed_up'] for each in done):.1f}")
    targets, reached = ([each[key] for each in group] for key, group in (("target", matches), ("reached", done)))
    return [point_cell(targets), point_cell(reached), ", ".join(said)]


def race_row(num_layers: int, label: str, found: list[Record]) -> str:
    """A line of one seed, or of the means over seeds."""
    untrained = [f"{statistics.mean(each['untrained'][preset] for each in found):.2f}" for preset in TURN]
    cells = [str(num_layers), label, *untrained]
    for target in ("best", "end"):
        cells += match_cells([each[target] for each in found])
    return f"| {' | '.join([*cells, point_cell([each['longest'] for each in found])])} |"


def race_table(runs: dict[str, Record], bench: Benchmark) -> list[str]:
    lines = [
        "| T | seed | untrained `paper` | untrained `fast` | `paper` at its best | `fast` as good | speed-up "
        "| `paper` at its end | `fast` as good | speed-up | longest run of `fast` |",
        "|---:|---|---:|---:|---|---|---|---|---|---|---|",
    ]
    for num_layers in bench.num_layers:
        found = [decide(runs, num_layers, seed) for seed in bench.seeds]
        lines += [race_row(num_layers, str(seed), [each]) for seed, each in zip(bench.seeds, found, strict=True)]
        lines.append(race_row(num_layers, "mean", found))
    return lines


def cost_table(runs: dict[str, Record], bench: Benchmark) -> list[str]:
    lines = [
        "| T | preset | CPU s per layer update | wall-clock s | student, training | student, simulating | critic "
        "| teacher | network calls |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for num_layers in bench.num_layers:
        for preset in ("paper", "fast"):
            costs = [runs[f"{case_name(num_layers, seed)}, costs"][preset] for seed in bench.seeds]
            cpu, wall = (statistics.median(sum((c[k] for c in costs), [])) for k in ("cpu_seconds", "seconds"))
            calls = {name: statistics.mean(cost["calls"][name] for cost in costs) for name in costs[0]["calls"]}
            shares = [calls["student"] - calls["simulated"], *(calls[k] for k in ("simulated", "critic", "teacher"))]
            cells = [f"{cpu:.3f}", f"{wall:.3f}", *(f"{share:.1f}" for share in [*shares, sum(shares)])]
            lines.append(f"| {num_layers} | `{preset}` | {' | '.join(cells)} |")
    return lines


def report(runs: dict[str, Record], bench: Benchmark, measured: str) -> str:
    """The text of bench.md; docs/reproducing.md says how to read it."""
    head = f"Teacher `{bench.pretrained_teacher_model}`, {bench.train_batch_size} rows, {bench.num_samples:,} images."
    return "\n".join([head, "", *race_table(runs, bench), "", *cost_table(runs, bench), "", measured, ""])


def draw_race(runs: dict[str, Record], bench: Benchmark, path: Path) -> None:
    """Draws FD against seconds of training, both on log axes, for each T; a line is a seed, dotted is untrained."""
    figure, axes = plt.subplots(
        1, len(bench.num_layers), figsize=(4.8 * len(bench.num_layers), 4), squeeze=False, layout="constrained"
    )
    for num_layers, axis in zip(bench.num_layers, axes[0], strict=True):
        for preset, marker in (("paper", "o"), ("fast", "*")):
            for seed in bench.seeds:
                points = points_of(runs, num_layers, seed, preset)
                x, y = ([point[key] for point in points] for key in ("cpu_seconds", "fd"))
                label = f"preset {preset}" if seed == bench.seeds[0] else None
                axis.plot(x, y, marker=marker, color=COLOURS[preset], alpha=0.8, label=label)
            untrained = runs[f"{case_name(num_layers, bench.seeds[0])}, costs"][preset]["untrained_fd"]
            axis.axhline(untrained, color=COLOURS[preset], linestyle=":", alpha=0.7)
        axis.set(xscale="log", yscale="log", title=f"T = {num_layers}", xlabel="CPU seconds of training")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    axes[0][0].set_ylabel("FD, lower is better")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def load_runs(output_dir: Path, bench: Benchmark) -> Record:
    """What bench.json holds, or its beginning.

    Raises:
        ValueError: It is of a benchmark with other settings.
    """
    kept = {"output_dir", "num_layers", "seeds", "fast_seconds"}  # these only add parts
    settings = {key: value for key, value in asdict(bench).items() if key not in kept}
    settings |= {f"{name}: {key}": value for name, preset in PRESETS.items() for key, value in preset.items()}
    path = output_dir / "bench.json"
    if not path.is_file():
        return {"settings": settings, "measured": "", "runs": {}}
    state: Record = json.loads(path.read_text())
    if changed := changes(state.get("settings", {}), settings):
        raise ValueError(f"{path} has other settings ({changed}): name another --output_dir")
    return state


def check(bench: Benchmark) -> None:
    """Refuses what could not run."""
    for name in ("num_layers", "seeds", "paper_seconds", "fast_seconds"):
        if not getattr(bench, name) or (name != "seeds" and min(getattr(bench, name)) <= 0):
            raise ValueError(f"--{name} {getattr(bench, name)}: give at least one number, above 0")
    if bench.turns < 1 or bench.num_samples < 2:
        raise ValueError(f"--turns {bench.turns}, --num_samples {bench.num_samples}: give at least 1 and 2")


def main(args: list[str] | None = None) -> None:
    (bench,) = parse_options([Benchmark], __doc__ or "", args=args)
    check(bench)
    torch.set_num_threads(1)
    output_dir = claim_output_dir(bench.output_dir, (Path(bench.output_dir or "") / "bench.json").is_file())
    state = load_runs(output_dir, bench)
    unet, _ = load_teacher(bench.pretrained_teacher_model)
    real = load_images("digits", unet.config.sample_size, unet.config.in_channels)[0].float() / 255
    distances = Distances(ImageClassifier.from_pretrained(bench.feature_extractor).eval(), real)
    runs = state["runs"]
    total = len(bench.seeds) * len(bench.num_layers) * (2 + len(bench.fast_seconds))
    with tqdm(total=total, desc="parts") as progress:
        for name, work in jobs(bench, distances, runs):
            progress.set_postfix_str(name)
            if name not in runs:
                runs[name] = work()
                state["measured"] = measured_on()
                write_json(output_dir / "bench.json", state)
            progress.update()
    write_text(output_dir / "bench.md", report(runs, bench, state["measured"]))
    draw_race(runs, bench, output_dir / "bench.png")
    print(f"{output_dir / 'bench.md'} and bench.png are written")


if __name__ == "__main__":
    main()
