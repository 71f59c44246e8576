"""`training/benchmarks/images/benchmark.py`: rows, what they are refused for, and the cost of the baselines."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler
from hsivi_diffusers.commands.options import parse_options
from hsivi_diffusers.runs.checkpoints import Checkpoints
from hsivi_diffusers.runs.folders import LOCK
from hsivi_diffusers.teachers.solvers import make_student, sample
from short_run import call
from training.benchmarks.images import benchmark, benchmark_results, set_teacher, train_teacher, trainings
from training.benchmarks.images.benchmark_results import (
    CONSISTENCY,
    OURS,
    PAIRS,
    PROGRESSIVE,
    REAL,
    SOLVER,
    TEACHER,
    TEACHER_SDE,
    UNGUIDED,
)
from training.benchmarks.images.sets import EMOJI_FONT
from training.benchmarks.images.spaces import OF_CLASSIFIER

ROOT = Path(__file__).parents[2]
ONE_FOR_ALL = f"{OURS}, one for all"
SPACES = ["classifier", "MLP", "pixels"]
STUDENT = """
preset: fast
num_inference_steps: 1
num_pairs: 0
critic_first: 0
critic_updates: 1
max_train_steps: 2
train_batch_size: 8
lr_warmup_steps: 1
checkpointing_steps: 1
validation_steps: 0
"""
BASELINE = """
method: {}
train_data: digits
train_batch_size: 8
lr_warmup_steps: 1
"""


def tuned(dataset, solver, calls, settings, distance):
    return {
        **{"dataset": dataset, "solver": solver, "calls": calls, "settings": settings},
        "tuned": dict.fromkeys(SPACES, distance),
    }


SOLVERS = [
    tuned("digits", "UniPC", 2, {"solver_order": 2, "timesteps": [400, 140]}, 1.0),
    tuned("digits", "DEIS", 2, {"timesteps": [500, 100]}, 2.0),
    tuned("digits", "DDIM", 1, {"timestep_spacing": "trailing"}, 5.0),
    tuned("fashion", "DDIM", 1, {"timestep_spacing": "leading"}, 0.1),
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    student = folder / "student.yaml"
    student.write_text(STUDENT)
    for method in ("consistency", "progressive", "regression"):
        more = "num_pairs: 10\n" if method == "regression" else ""
        (folder / f"{method}.yaml").write_text(BASELINE.format(method) + more)
    (folder / "solvers.json").write_text(json.dumps({"rows": SOLVERS}))
    students = [str(student), f"{student} --num_inference_steps 2", f"{student} --num_inference_steps 1 2"]
    return [
        *["--dataset=digits", f"--teacher={ROOT / 'assets/digits_ddpm'}"],
        *[f"--classifier={ROOT / 'assets/digits_classifier'}", "--students", *students],
        *[f"--pairs={folder / 'regression.yaml'}", f"--progressive={folder / 'progressive.yaml'} --num_stages 1"],
        *[f"--consistency={folder / 'consistency.yaml'}", "--baseline_steps", "1", "2", "--seeds=0"],
        *[f"--solvers={folder / 'solvers.json'}", "--teacher_steps=3", "--num_samples=20", "--batch_size=15"],
        *[f"--output_dir={folder / 'docs'}", f"--runs_dir={folder / 'runs'}"],
    ]


@pytest.fixture(scope="module")
def folder(arguments):
    """Of the finished benchmark, without its pages."""
    with pytest.MonkeyPatch.context() as patched:  # one process: each of its own would import everything again
        patched.setattr(trainings, "call", call)
        patched.setattr(benchmark, "write_pages", lambda *folders: None)
        benchmark.main(arguments)
    folder = Path(arguments[-1].split("=")[1]).parent
    for checkpoints in folder.glob("runs/digits/*/checkpoints"):
        shutil.rmtree(checkpoints)  # which nothing here reads
    return folder


@pytest.fixture
def copied(folder, arguments, tmp_path):
    """A copy of the finished benchmark, and the arguments to go on in it."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", [text.replace(str(folder), str(tmp_path / "copy")) for text in arguments]


@pytest.fixture
def no_pages(monkeypatch):
    """Keeps what was to be written: tables and figures take most of the time where nothing has to be sampled."""
    written = []
    monkeypatch.setattr(benchmark, "write_pages", lambda *folders: written.append(folders))
    return written


@pytest.fixture
def next_call(monkeypatch):
    """Runs the benchmark to the first program that it calls; returns it and its arguments."""

    def run(arguments):
        called = []

        def stop(program, given):
            called.append((program, given))
            raise SystemExit

        monkeypatch.setattr(trainings, "call", stop)
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        return called[0]

    return run


def never(*_):
    raise AssertionError("it was trained again")


def rows_of(folder):
    return benchmark_results.read_rows(folder / "docs" / "results.json")


def write_rows(folder, rows):
    (folder / "docs/results.json").write_text(json.dumps({"rows": rows}))


def forget(folder, method):
    """Removes the rows of a method, and returns them."""
    rows = rows_of(folder)
    write_rows(folder, [row for row in rows if row["method"] != method])
    return [row for row in rows if row["method"] == method]


# ----- rows -----


def keys_of(seeds, baseline_seeds=(0,)):
    costless = [(REAL, 0, None), (TEACHER, 3, None), (TEACHER_SDE, 3, None), (SOLVER, 1, None), (SOLVER, 2, None)]
    ours = [(OURS, nfe, seed) for nfe in (1, 2) for seed in seeds]
    ours += [(ONE_FOR_ALL, nfe, seed) for seed in seeds for nfe in (1, 2)]
    pairs = [(PAIRS, 1, seed) for seed in baseline_seeds]
    several = (PROGRESSIVE, CONSISTENCY)
    baselines = [(method, nfe, seed) for method in several for nfe in (1, 2) for seed in baseline_seeds]
    return [*costless, *ours, *pairs, *baselines]


def test_every_seed_of_students_and_baselines_has_a_row(arguments):
    (options,) = parse_options([benchmark.Options], "", [*arguments, "--seeds", "0", "3"])
    assert [entry.key for entry in benchmark.Comparison(options).entries()] == keys_of([0, 3])
    options.baseline_seeds = [3, 0]
    assert [entry.key for entry in benchmark.Comparison(options).entries()] == keys_of([0, 3], [3, 0])


def test_another_seed_is_added_without_images_in_the_figures(copied, monkeypatch, no_pages):
    folder, arguments = copied
    monkeypatch.setattr(trainings, "call", call)
    before, pictures = rows_of(folder), (folder / "runs/digits/pictures.safetensors").read_bytes()
    given = [text for text in arguments if not text.startswith(("--pairs", "--progressive", "--consistency"))]
    benchmark.main([*given, "--students", str(folder / "student.yaml"), "--seeds", "0", "1"])
    *kept, row = rows_of(folder)
    assert kept == before
    assert benchmark_results.key_of(row) == (OURS, 1, 1)
    record = json.loads((folder / "runs/digits/student_seed1/training.json").read_text())
    assert (row["train_seconds"], row["train_calls"]) == (record["seconds"], record["network_calls"])
    assert (folder / "runs/digits/pictures.safetensors").read_bytes() == pictures


def test_a_row_has_all_measures_in_three_spaces_and_what_its_training_cost(folder):
    rows = rows_of(folder)
    assert [benchmark_results.key_of(row) for row in rows] == keys_of([0])
    for row in rows:
        assert row.keys() >= {*OF_CLASSIFIER, "dataset", "eval_seed", "measured"}
        assert list(row["distances"]) == list(row["teacher_distances"]) == SPACES
        assert all(distance > 0 for kind in ("distances", "teacher_distances") for distance in row[kind].values())
        assert sum(row["class_shares"]) == pytest.approx(1)
        assert sum(row["real_class_shares"]) == pytest.approx(1)
        assert (row["num_samples"], row["batch_size"], row["teacher_steps"]) == (20, 15, 3)
        trained = row["train_seed"] is not None
        assert [row[name] is not None for name in ("recipe", "train_seconds", "train_calls")] == [trained] * 3
        assert (row["nearest"] == 0) == (row["method"] == REAL)  # whose images are real ones
    assert [(row["solver"], row["settings"]) for row in rows if row["method"] == SOLVER] == [
        ("DDIM", {"timestep_spacing": "trailing"}),
        ("UniPC", {"solver_order": 2, "timesteps": [400, 140]}),
    ]


@pytest.mark.parametrize(
    ("method", "config", "words", "cost"),
    [
        (PAIRS, "regression", [], (50.5, 10)),
        (PROGRESSIVE, "progressive", ["--num_stages", "1", "--num_inference_steps", "1"], (50.5, 10)),
        (CONSISTENCY, "consistency", [], (50.5, 900)),  # of several numbers of calls: the most seconds and most calls
    ],
)
def test_a_baseline_is_given_the_cost_that_the_rows_of_the_student_tell(copied, next_call, method, config, words, cost):
    folder, arguments = copied
    forget(folder, method)
    shutil.rmtree(folder / "runs")
    costs = {(OURS, 1): (50.5, 10), (OURS, 2): (40.5, 900), (ONE_FOR_ALL, 1): (99.5, 9999)}
    rows = rows_of(folder)
    for row in rows:
        row["train_seconds"], row["train_calls"] = costs.get((row["method"], row["nfe"]), (None, None))
    write_rows(folder, rows)
    program, given = next_call(arguments)
    assert program == "training.benchmarks.images.train_baseline"
    assert given[1 : 2 + len(words)] == [str(folder / f"{config}.yaml"), *words]
    limits = [f"--max_train_seconds={cost[0]}", f"--min_network_calls={cost[1]}"]
    assert given[-4:] == [*limits, "--resume_from_checkpoint", "latest"]


def test_a_baseline_keeps_the_seed_that_it_has(copied):
    """A model of several numbers of steps has one, for those that lack, too."""
    folder, arguments = copied
    rows = [row for row in rows_of(folder) if (row["method"], row["nfe"]) != (CONSISTENCY, 2)]
    changed = [{**row, "train_seed": 3} if row["method"] in (PAIRS, CONSISTENCY) else row for row in rows]
    write_rows(folder, [*changed, *({**row, "train_seed": 3} for row in rows if row["method"] == OURS)])
    (options,) = parse_options([benchmark.Options], "", [*arguments, "--seeds", "0", "3"])
    keys = [entry.key for entry in benchmark.Comparison(options).entries()]
    assert [seed for method, _, seed in keys if method == PAIRS] == [3]
    assert {seed for method, _, seed in keys if method == PROGRESSIVE} == {0}
    assert [key for key in keys if key[0] == CONSISTENCY] == [(CONSISTENCY, 1, 3), (CONSISTENCY, 2, 3)]


# ----- what is there is kept -----


def test_nothing_is_trained_or_drawn_for_rows_that_are_there(copied, monkeypatch, no_pages):
    folder, arguments = copied
    monkeypatch.setattr(trainings, "call", never)
    monkeypatch.setattr(set_teacher, "sample", never)
    shutil.rmtree(folder / "runs")
    before = rows_of(folder)
    benchmark.main(arguments)
    for method in (PAIRS, PROGRESSIVE, CONSISTENCY):  # those that are not named are left out
        forget(folder, method)
    benchmark.main([text for text in arguments if not text.startswith(("--pairs", "--progressive", "--consistency"))])
    assert rows_of(folder) == [row for row in before if row["method"] not in (PAIRS, PROGRESSIVE, CONSISTENCY)]


def test_a_stopped_benchmark_measures_only_what_is_missing_by_what_is_trained(copied, monkeypatch, no_pages):
    """After the images of the teacher, which start from other noise than the rows."""
    folder, arguments = copied
    lost = [*forget(folder, SOLVER), *forget(folder, ONE_FOR_ALL), *forget(folder, PROGRESSIVE)]
    kept = [{**lost[0], "dataset": "other"}, *rows_of(folder)]
    write_rows(folder, kept)
    drawn = []

    def recorded(sampler, *given):
        drawn.append((sampler, given[2]))
        return sample(sampler, *given)

    monkeypatch.setattr(set_teacher, "sample", recorded)
    monkeypatch.setattr(trainings, "call", never)
    benchmark.main(arguments)
    assert [seed for _, seed in drawn] == [1, *[0] * 6]
    assert [solver.num_steps for solver, _ in drawn[:3]] == [3, 1, 2]
    assert [type(solver.scheduler) for solver, _ in drawn[1:3]] == [HSIVIScheduler, UniPCMultistepScheduler]
    rows = rows_of(folder)
    assert rows[: len(kept)] == kept
    for name in ("method", "nfe", "train_seed", "distances", "teacher_distances", "recall"):
        assert [row[name] for row in rows[len(kept) :]] == [row[name] for row in lost]


def test_images_of_what_is_shown_are_kept_beside_the_trainings(folder):
    """So the figures are drawn anew where nothing has to be sampled."""
    kept = load_file(folder / "runs/digits/pictures.safetensors")
    several = [
        f"{method} at {nfe}" for method in (SOLVER, OURS, ONE_FOR_ALL, PROGRESSIVE, CONSISTENCY) for nfe in (1, 2)
    ]
    assert set(kept) == {"real", f"{TEACHER} at 3", f"{TEACHER_SDE} at 3", f"{PAIRS} at 1", *several}
    run = folder / "runs/digits/student_num_inference_steps_2_seed0/pipeline"
    drawn = torch.cat([*sample(make_student(HSIVIPipeline.from_pretrained(run), None, 2), 20, 15, 0)])[
        : benchmark.SHOWN
    ]
    torch.testing.assert_close(kept[f"{OURS} at 2"] / 255, drawn, atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *[(name, ()) for name in ("digits", "fashion", "mnist", "emoji", "flow", "guided")],
        *[("guided", (f"--guidance_scale={w}", f"--dataset=w={w}")) for w in (1, 4)],
        pytest.param(
            *("text", ()),
            marks=[pytest.mark.slow, pytest.mark.skipif(not EMOJI_FONT.is_file(), reason="needs its font")],
        ),
    ],
)
def test_the_rows_of_the_repository_are_those_of_its_configs(name, more, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["--config", f"training/configs/benchmark_{name}.yaml", f"--runs_dir={tmp_path}", *more]
    (options,) = parse_options([benchmark.Options], "", given)
    comparison = benchmark.Comparison(options)
    entries = {entry.key: entry for entry in comparison.entries()}
    results = benchmark_results.Results(Path(options.output_dir), tmp_path, options.dataset)
    settings, told = ({key: getattr(entry, kind) for key, entry in entries.items()} for kind in ("settings", "told"))
    assert {key for key, _ in results.keys(settings, told, comparison.drawn)} == entries.keys()


# ----- other noise -----


def stop_at(number, monkeypatch):
    """Interrupts the benchmark at so many draws, once; returns the seeds of those that are made."""
    drawn = []

    def draw(sampler, *settings):
        drawn.append(settings[2])
        if len(drawn) == number:
            raise KeyboardInterrupt
        return sample(sampler, *settings)

    monkeypatch.setattr(set_teacher, "sample", draw)
    return drawn


def test_each_seed_of_the_noise_has_a_row_and_a_benchmark_stopped_between_them_continues(copied, monkeypatch, no_pages):
    folder, arguments = copied
    monkeypatch.setattr(trainings, "call", never)
    before, pictures = rows_of(folder), (folder / "runs/digits/pictures.safetensors").read_bytes()
    given = [text for text in arguments if not text.startswith(("--progressive", "--consistency"))]
    given += ["--students", str(folder / "student.yaml"), "--baseline_steps=1", "--eval_seeds", "0", "6", "5"]
    keys = [(REAL, 0), (TEACHER, 3), (TEACHER_SDE, 3), (SOLVER, 1), (SOLVER, 2), (OURS, 1), (PAIRS, 1)]
    drawn = stop_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(given)
    assert drawn == [1, 6, 5]  # first the teacher's images, which rows are compared with
    benchmark.main(given)
    rows = rows_of(folder)
    assert rows[: len(before)] == before
    new = rows[len(before) :]
    assert [(row["method"], row["nfe"]) for row in new] == [key for key in keys for _ in range(2)]
    assert [row["eval_seed"] for row in new] == [6, 5] * len(keys)
    distances = [row["distances"]["classifier"] for row in new]
    assert all(one != other for one, other in zip(distances[::2], distances[1::2], strict=True))
    assert len(drawn) == 3 + 1 + 2 * len(keys) - 1
    assert (folder / "runs/digits/pictures.safetensors").read_bytes() == pictures


# ----- refusals -----


def with_rows(method, **more):
    def edit(folder):
        write_rows(folder, [{**row, **more} if row["method"] == method else row for row in rows_of(folder)])

    return edit


def with_recipe(folder):
    rows = [{**row, "recipe": row["recipe"] and {**row["recipe"], "critic_updates": 3}} for row in rows_of(folder)]
    write_rows(folder, rows)


def with_config(name, *forgotten):
    def edit(folder):
        (folder / f"{name}.yaml").write_text((folder / f"{name}.yaml").read_text() + "learning_rate: 0.5\n")
        for method in forgotten:
            forget(folder, method)

    return edit


def with_training(method, run, **more):
    def edit(folder):
        forget(folder, method)
        path = folder / "runs/digits" / run / "training.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))

    return edit


def with_images(folder):
    forget(folder, SOLVER)
    (folder / "real").mkdir()
    Image.new("L", (8, 8)).save(folder / "real/one.png")


def with_solvers(*rows, pages=True):
    def edit(folder):
        (folder / "solvers.json").write_text(json.dumps({"rows": rows}))
        if not pages:
            shutil.rmtree(folder / "docs")

    return edit


def without_calls(folder):
    forget(folder, PROGRESSIVE)
    with_rows(OURS, train_calls=None)(folder)


UNKNOWN_SOLVER = with_solvers(tuned("digits", "DPM", 2, {}, 1.0), pages=False)
OPTIONS = r"with other options.*learning_rate: .* -> 0.5"
OTHER_NETWORKS = "of other images or networks .networks: x -> .*: name another --output_dir"
COST = "consistency_seed0 was not given the cost of what it is compared with"
OTHER_TEACHER = "was trained of another teacher than .* is now: name another"


@pytest.mark.parametrize(
    ("edit", "given", "message"),
    [
        (None, "--batch_size=10", r"of other images or networks \(batch_size: 15 -> 10\): name"),
        (None, "--eval_seeds=2", r"has rows of the noise seeds \[0\], and --eval_seeds has not: remove them, or name"),
        (None, "--teacher_steps=4", r"of other images or networks \(teacher_steps: 3 -> 4\): name"),
        (with_rows(REAL, networks="x"), "", f"real images .* {OTHER_NETWORKS}"),
        (with_solvers(*SOLVERS[1:]), "", "tuned solver at 2 of other settings .*solver: UniPC -> DEIS;"),
        (UNKNOWN_SOLVER, "", "method 'DPM' is unknown: choose one of 'DDPM', 'DDIM',"),
        (None, "--solvers=nowhere.json", "--solvers nowhere.json is missing: name a file that tune_solvers.py"),
        (with_config("student"), "", "HSIVI at 1, seed 0, of other .*learning_rate: .* -> 0.5.: remove"),
        (with_recipe, "", "than --students have now .critic_updates: 3 -> 1.: remove that row"),
        (with_config("student", OURS, ONE_FOR_ALL), "", f"was trained {OPTIONS}.*--runs_dir"),
        (with_config("progressive"), "", "progressive distillation at 1 of other settings.*learning_rate': 0.5"),
        (
            with_config("consistency", CONSISTENCY),
            "",
            f"consistency_seed0 was trained {OPTIONS}.: remove it and its rows",
        ),
        (with_training(CONSISTENCY, "consistency_seed0", max_train_seconds=1000), "", COST),
        (with_training(CONSISTENCY, "consistency_seed0", min_network_calls=1000), "", COST),
        (with_training(OURS, "student_seed0", teacher_sha256="x"), "", f"student_seed0 {OTHER_TEACHER}"),
        (with_training(CONSISTENCY, "consistency_seed0", teacher_sha256="x"), "", f"consistency_seed0 {OTHER_TEACHER}"),
        (without_calls, "", r"the network calls of HSIVI at \[1\], seed 0, are not known"),
        (None, "--baseline_steps 1 3", r"--baseline_steps has \[3\], and --students none of so many"),
        (None, "--baseline_seeds 0 5", r"--baseline_seeds has \[5\], and --seeds has not"),
        (None, ["--students", "STUDENT --max_train_steps 0"], "max_train_steps=0: give a number of at least 1"),
        (None, ["--students", "STUDENT", "STUDENT --learning_rate 0.1"], "--students have HSIVI at 1 more than once"),
        (with_images, "--real_data=FOLDER/real", "real has no labels: give a set with classes"),
        (None, "--eval_seeds 0 1", r"--eval_seeds has 1, the noise of the teacher's images: name others"),
        (None, "--teacher=FOLDER/none", "is missing: give the config of training.benchmarks.images.train_teacher"),
        (None, "--dataset= --classifier=", "--dataset, --classifier missing: give --config training/conf"),
        (None, "--teacher=", "--teacher missing: give --config training/configs/benchmark_digits.yaml"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_training(
    request, folder, arguments, monkeypatch, edit, given, message
):
    monkeypatch.setattr(trainings, "call", never)
    if edit:
        folder, arguments = request.getfixturevalue("copied")
        edit(folder)
    before = rows_of(folder)
    given = given.split() if isinstance(given, str) else given
    given = [word.replace("STUDENT", str(folder / "student.yaml")).replace("FOLDER", str(folder)) for word in given]
    with pytest.raises(ValueError, match=message):
        benchmark.main([*arguments, *given])
    assert rows_of(folder) == before


def test_a_row_that_two_processes_measured_is_there_once(copied):
    folder, _ = copied
    before = rows_of(folder)
    benchmark_results.Results(folder / "docs", folder / "runs", "digits").add({**before[0], "num_samples": 7})
    assert len(rows_of(folder)) == len(before)
    assert [row["num_samples"] for row in rows_of(folder)].count(7) == 1


def test_a_student_may_be_given_options_besides_its_config(copied, next_call):
    folder, arguments = copied
    student = f"{folder / 'student.yaml'} --num_inference_steps 3 --noise_eta 0.5"
    place = arguments.index("--students") + 3
    program, words = next_call([*arguments[:place], student, *arguments[place:]])
    assert (program, words[2:6]) == (trainings.DISTIL, ["--num_inference_steps", "3", "--noise_eta", "0.5"])
    assert words[words.index("--output_dir") + 1].endswith("digits/student_num_inference_steps_3_noise_eta_0.5_seed0")


def test_a_teacher_with_classes_draws_all_of_them_equally(class_teacher):
    teacher = set_teacher.SetTeacher(str(class_teacher), "digits")
    drawn = teacher.draw(lambda size, generator, labels: labels, 7, 4, 0)
    assert drawn.tolist() == teacher.asked(7).tolist() == [0, 1, 2, 0, 1, 2, 0]


# ----- parts -----


def test_a_failed_training_ends_the_benchmark(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("import sys\nassert sys.argv[1] == 'distil'\nsys.exit(2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="failing distil --config none.yaml ended with status 2"):
        trainings.call("failing distil", ["--config", "none.yaml"])


def test_a_teacher_that_was_stopped_goes_on(tmp_path, monkeypatch):
    config = tmp_path / "teacher.yaml"
    config.write_text("block_out_channels: [8, 16]\nmax_train_steps: 3\ntrain_batch_size: 4\ncheckpointing_steps: 1\n")
    make = partial(trainings.make, tmp_path / "teacher", "train_teacher.py", str(config), *trainings.RESUME)
    saved, save = [], Checkpoints.save

    def stop_once(self, step, seconds):
        save(self, step, seconds)
        saved.append(step)
        if saved == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop_once)
    monkeypatch.setattr(trainings, "call", lambda program, given: train_teacher.main(given))
    with pytest.raises(KeyboardInterrupt):
        make()
    assert not (tmp_path / "teacher").exists()
    make()
    assert saved == [1, 2, 3]
    names = {path.name for path in (tmp_path / "teacher").iterdir()}
    assert names - {LOCK} == {"model_index.json", "options.json", "scheduler", "unet"}


# ----- guidance -----


INTERVAL = {"timesteps": [400, 200, 60], "guided_steps": 2, "guidance_interval": [130.0, 1000]}


@pytest.fixture
def guided(arguments, tmp_path):
    """A benchmark of the guided digits teacher: 1 call by ours, 4 by a solver of 2 steps."""
    student = next(text for text in arguments if text.endswith("student.yaml"))
    rows = [
        tuned("digits", "UniPC", 4, {"timesteps": [400, 140]}, 1.0),
        tuned("digits falling", "UniPC", 4, {"timesteps": [400, 140], "guidance_end": 150}, 0.9),
        tuned("digits interval", "UniPC", 5, INTERVAL, 0.9),
        tuned("digits without guidance", "UniPC", 3, {"timesteps": [400, 200, 60]}, 2.0),
    ]
    (tmp_path / "solvers.json").write_text(json.dumps({"rows": rows}))
    return [
        *["--dataset=digits", f"--teacher={ROOT / 'assets/digits_guided_ddpm'}", "--guidance_scale=2"],
        *[f"--classifier={ROOT / 'assets/digits_classifier'}", f"--students={student}", "--seeds=0"],
        *[f"--solvers={tmp_path / 'solvers.json'}", "--teacher_steps=6", "--num_samples=80", "--batch_size=80"],
        *[f"--output_dir={tmp_path / 'docs'}", f"--runs_dir={tmp_path / 'runs'}"],
    ]


def test_a_guided_benchmark_draws_all_classes_and_counts_two_calls_a_step(guided, tmp_path, monkeypatch, no_pages):
    monkeypatch.setattr(trainings, "call", call)
    benchmark.main(guided)
    rows = {(row["method"], row["nfe"]): row for row in rows_of(tmp_path)}
    solvers = {(SOLVER, 4), (SOLVER, 5), (UNGUIDED, 3)}
    assert rows.keys() == {(REAL, 0), (TEACHER, 6), (TEACHER_SDE, 6), (OURS, 1)} | solvers
    assert rows[SOLVER, 4]["settings"] == {"timesteps": [400, 140], "guidance_end": 150}  # the better one
    assert all(row["guidance_scale"] == 2 for row in rows.values())
    assert rows[REAL, 0]["accuracy"] > 0.95
    assert rows[REAL, 0]["class_shares"] == pytest.approx([0.1] * 10, abs=0.03)
    assert rows[OURS, 1]["accuracy"] < rows[SOLVER, 4]["accuracy"]
    (run,) = (tmp_path / "runs" / "digits").glob("student*")
    assert HSIVIPipeline.from_pretrained(run / "pipeline").scheduler.config.guidance_scale == 2


@pytest.mark.parametrize(
    ("scale", "more", "place", "words"),
    [
        (1.0, "", "digits", ["1.0", "--class_shares", *["1.0"] * 10, "0.0"]),  # not on the label "no class"
        (2.0, " --guidance_scale 2.0 4.0", "scales_of_digits_guided_ddpm", ["2.0", "4.0"]),  # shared by benchmarks
    ],
)
def test_a_student_is_trained_on_the_scales_and_classes_of(arguments, tmp_path, monkeypatch, scale, more, place, words):
    student, called = next(text for text in arguments if text.endswith("student.yaml")) + more, []
    monkeypatch.setattr(trainings, "call", lambda *given: called.append(given) or exit())
    made = trainings.Trainings(tmp_path / "digits", str(ROOT / "assets/digits_guided_ddpm"), scale)
    with pytest.raises(SystemExit):
        made.student(student, 0, made.settings(student, 0))
    ((program, given),) = called
    assert (program, given[-1 - len(words) :]) == (trainings.DISTIL, ["--guidance_scale", *words])
    assert Path(given[given.index("--output_dir") + 1]).parent == tmp_path / place


def test_a_student_may_start_from_another_of_the_same_seed_and_has_the_cost_of_both(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "call", call)
    student = next(text for text in arguments if text.endswith("student.yaml"))
    made = trainings.Trainings(tmp_path / "digits", str(ROOT / "assets/digits_ddpm"), None)
    two, folders, costs = f"{student} --num_inference_steps 2", [], []
    again = f"{student} --init_from {{runs}}/student_num_inference_steps_2_seed{{seed}}"
    wanted = made.settings(again, 3)  # before there is a run to start from
    for config in (two, again):
        folder, cost = made.student(config, 3, made.settings(config, 3))
        folders.append(folder)
        costs.append(cost)
    assert [folder.name for folder in folders] == ["student_num_inference_steps_2_seed3", "student_seed3"]
    assert wanted.init_from == str(folders[0])
    own = json.loads((folders[1] / "training.json").read_text())
    for name in ("seconds", "network_calls"):
        assert costs[1][name] == own[name] + costs[0][name]


def test_an_unguided_solver_is_that_of_the_teacher_without_guidance():
    guided, plain = (set_teacher.SetTeacher(str(ROOT / "assets/digits_guided_ddpm"), "digits", w) for w in (2.0, 1.0))
    settings = {"timesteps": [400, 200, 60]}
    images = guided.draw(guided.solver("UniPC", 3, unguided=True, **settings), 20, 20, 0)
    assert images.equal(plain.draw(plain.solver("UniPC", 3, **settings), 20, 20, 0))
    with pytest.raises(ValueError, match="3 network calls: a guided step has two"):
        guided.solver("UniPC", 3, **settings)


def test_a_solver_that_is_guided_in_an_interval_has_more_steps():
    teacher = set_teacher.SetTeacher(str(ROOT / "assets/digits_guided_ddpm"), "digits", 2.0)
    seen = []
    teacher.teacher.network.register_forward_hook(lambda *_: seen.append(1))

    def draw(calls, **settings):
        seen.clear()
        images = teacher.draw(teacher.solver("UniPC", calls, **settings), 20, 20, 0)
        assert len(seen) == calls
        return images

    grid = {"timesteps": INTERVAL["timesteps"]}
    whole, some = draw(6, **grid, guided_steps=3, guidance_interval=[0, 1000]), draw(5, **INTERVAL)
    none = draw(3, **grid, guided_steps=0, guidance_interval=[500, 1000])
    assert whole.equal(draw(6, **grid))
    assert none.equal(draw(3, **grid, unguided=True))
    assert not some.equal(whole)
    assert not some.equal(none)
    with pytest.raises(ValueError, match="has 2 steps: give guided_steps=2"):
        teacher.solver("UniPC", 4, **{**INTERVAL, "guided_steps": 1})
    with pytest.raises(ValueError, match="of a teacher of EDM, or without guidance: leave it out"):
        teacher.solver("UniPC", 5, unguided=True, **INTERVAL)


@pytest.mark.parametrize(
    ("scale", "more", "message"),
    [
        ("2", ["--progressive=FOLDER/progressive.yaml"], "progressive distillation know no guidance"),
        ("", ["--teacher_steps=3", "--num_samples=90"], r"no images of the classes \[10\] of .* --guidance_scale 1"),
        ("2", ["--num_samples=60"], "--num_samples 60: give 70 or more, 7 of each class"),
        (
            "2",
            ["--students=FOLDER/student.yaml --guidance_scale 1 4"],
            r"scale \[.*\], and the benchmark 2.0: leave it out",
        ),
    ],
)
def test_what_cannot_be_guided_is_refused_before_anything_is_drawn(
    guided, arguments, monkeypatch, scale, more, message
):
    monkeypatch.setattr(set_teacher, "sample", never)
    folder = str(Path(arguments[-1].split("=")[1]).parent)
    given = [text for text in guided if scale or not text.startswith("--guidance_scale")]
    with pytest.raises(ValueError, match=message):
        benchmark.main([*given, *(word.replace("FOLDER", folder) for word in more)])
