"""What a run shows of itself."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.utils import make_image_grid
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hsivi_diffusers import HSIVIPipeline, load_teacher
from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation import progress
from hsivi_diffusers.distillation.pairs import follow_ode
from hsivi_diffusers.distillation.updates import run_updates
from hsivi_diffusers.runs.page import read_log
from hsivi_diffusers.teachers.guidance import Guided
from tiny_unet import make_unet

SIZE = 512  # pixels of a side of a grid, at least
PAPER = {"preset": "paper", "critic_updates": 1, "train_batch_size": 6}


@pytest.fixture(scope="module", autouse=True)
def few_teacher_steps():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(progress, "TEACHER_STEPS", 3)
        yield


@pytest.fixture(scope="module")
def shown(distil, tmp_path_factory):
    """A run that logs every step, and draws grids as it does without being told when."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(progress, "EVERY", 1)
        folder = tmp_path_factory.mktemp("runs") / "shown"
        return distil(folder, report_to="tensorboard", validation_steps=2, **PAPER)


@pytest.fixture(scope="module")
def events(shown):
    accumulator = EventAccumulator(str(shown / "logs" / "hsivi"), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def read(path):
    with Image.open(path) as grid:
        return np.asarray(grid.convert("L"))


def tiles(grid, size=8):
    """The rows of a grid of images of `size` pixels, each magnified by copying its pixels, with a line after each."""
    factor = grid.shape[1] // (progress.COLUMNS * (size + 1))
    small = grid[::factor, ::factor]
    assert np.array_equal(small.repeat(factor, 0).repeat(factor, 1), grid)
    cells = small.reshape(progress.ROWS, size + 1, progress.COLUMNS, size + 1)
    assert set(cells[:, size].flat) | set(cells[..., size].flat) == {128}
    return list(cells[:, :size, :, :size].reshape(progress.ROWS, size, progress.COLUMNS * size))


def drawn(images):
    """A row of images as it is in a grid."""
    pil = HSIVIPipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
    return np.asarray(make_image_grid(pil, 1, len(pil)).convert("L"))


def test_the_trackers_are_told_losses_norms_rates_and_scales(events):
    tags = {
        *(f"{kind}/{player}" for kind in ("loss", "grad_norm", "learning_rate") for player in ("student", "critic")),
        *(f"critic_loss/layer_{t}" for t in (0, 1)),
        *(f"noise_scale/{name}" for name in ("min", "mean", "max")),
        "images_per_second",
    }
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags:
        assert all(np.isfinite(event.value) for event in events.Scalars(tag))
    for tag in ("loss/student", "grad_norm/critic", "noise_scale/mean"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("images_per_second")] == [2, 3, 4, 5]
    rates = [event.value for event in events.Scalars("learning_rate/critic")]
    assert rates == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4])
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))
    low, mean, high = (events.Scalars(f"noise_scale/{name}")[-1].value for name in ("min", "mean", "max"))
    assert low < mean < high


def test_the_speed_is_that_of_the_updates_after_the_first_with_which_the_pairs_come(make_state, tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def updates(state):
        for step in run_updates(state, 0):
            seconds[0] += 2.0 if step.step else 1000.0
            yield step

    made = make_state(output_dir=tmp_path)
    list(progress.Progress(made).watch(updates(made), 0, lambda step: {}))
    assert [line["images_per_second"] for line in read_log(tmp_path)] == [4 / 2.0]


@pytest.mark.parametrize("validation_steps", [0, 2])
def test_resuming_a_finished_run_leaves_its_last_grid_in_the_log(distil, shown, tmp_path, validation_steps):
    folder = shutil.copytree(shown, tmp_path / "run")
    distil(folder, resume_from_checkpoint="latest", validation_steps=validation_steps, **PAPER)
    assert read_log(folder) == read_log(shown)
    assert "images/diversity" in read_log(folder)[-1]


def test_grids_go_to_the_tracker_and_to_files_at_the_start_in_between_and_at_the_end(events, shown):
    assert events.Tags()["images"]
    names = {path.name for path in (shown / "samples").iterdir()}
    assert names == {f"step-{step}.png" for step in (0, 2, 4, 5)}
    for name in names:
        grid = read(shown / "samples" / name)
        assert grid.shape[1] >= SIZE
        assert grid.std() > 0


def test_each_grid_is_printed_with_its_contrast_and_diversity(distil, tmp_path, capsys):
    run = distil(tmp_path / "run", max_train_steps=2, critic_updates=1, validation_steps=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "times its diversity" in line]
    ratios = [[line[name] for name in progress.RATIOS] for line in read_log(run) if "images/contrast" in line]
    assert lines == [
        f"after {step} update{'s' * (step != 1)}: {contrast:.2f} times the teacher's contrast, "
        f"{diversity:.2f} times its diversity, {run / 'samples' / f'step-{step}.png'}"
        for step, (contrast, diversity) in enumerate(ratios)
    ]
    assert len(lines) == 3


def test_a_tenth_of_the_run_lies_between_two_grids(make_state, tmp_path, monkeypatch):
    drawn_at = []
    monkeypatch.setattr(progress.Progress, "draw", lambda self, step: drawn_at.append(step))
    made = make_state(max_train_steps=21, validation_steps=None, output_dir=tmp_path)
    step = next(run_updates(made, 0))
    list(progress.Progress(made).watch((replace(step, step=number) for number in range(21)), 0, lambda step: {}))
    assert drawn_at == [*range(0, 21, 2), 21]


def test_the_first_row_is_the_teachers_and_the_last_grid_is_of_the_pipeline(shown, teacher):
    first, last = (tiles(read(shown / "samples" / f"step-{step}.png")) for step in (0, 5))
    pipeline = HSIVIPipeline.from_pretrained(shown / "pipeline")
    noise = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = follow_ode(Guided(load_teacher(teacher)), noise, num_steps=progress.TEACHER_STEPS).squeeze(1)
    assert np.array_equal(first[0], drawn(images.clamp(-1, 1) / 2 + 0.5))
    assert np.array_equal(first[0], last[0])
    images = pipeline(24, torch.Generator().manual_seed(0), output_type="pt").images
    for row in range(3):
        assert np.array_equal(last[row + 1], drawn(images[8 * row : 8 * row + 8]))
        assert not np.array_equal(last[row + 1], first[row + 1])


def test_drawing_changes_no_bit_of_the_result_and_is_no_call_of_the_training(distil, shown, tmp_path, differences):
    """The teacher's row would be 24 calls more each time."""
    plain = distil(tmp_path / "run", **PAPER)
    assert differences(plain, shown) == []
    resumed = shutil.copytree(shown, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "checkpoint-5")
    (resumed / "training.json").unlink()
    distil(resumed, resume_from_checkpoint="latest", validation_steps=2, **PAPER)
    calls = [json.loads((run / "training.json").read_text())["network_calls"] for run in (plain, shown, resumed)]
    assert calls == [calls[0]] * 3


def test_losses_are_read_from_the_device_only_where_they_are_shown(make_state, tmp_path, monkeypatch):
    """The running losses are those of all updates."""
    monkeypatch.setattr(progress, "EVERY", 3)
    made = make_state(max_train_steps=7, output_dir=tmp_path)
    read, losses, shown = [], [], progress.Progress(made)
    item, tolist = torch.Tensor.item, torch.Tensor.tolist
    steps = list(run_updates(made, 0))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: read.append(None) or item(self))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(None) or tolist(self))
    counts = []
    for step in shown.watch(iter(steps), 0, lambda step: {}):
        counts.append(len(read))
        losses.append((item(step.layers.loss.mean()), item(step.critic.loss.mean())))
    reads = [after > before for before, after in itertools.pairwise([0, *counts])]
    assert reads == [False, False, True, False, False, True, True]
    for place, name in enumerate(("student", "critic")):
        running = losses[0][place]
        for loss in losses:
            running = 0.95 * running + 0.05 * loss[place]
        assert shown.running[name] == pytest.approx(running)


def test_a_class_conditional_student_is_drawn_in_all_classes_the_same_in_each_row(distil, class_teacher, tmp_path):
    settings = {"validation_steps": 1, "max_train_steps": 1, "critic_updates": 1, "num_inference_steps": (1, 2)}
    folder = distil(tmp_path / "run", pretrained_teacher_model=class_teacher, **settings)
    rows = tiles(read(folder / "samples" / "step-1.png"))
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")  # of several step counts the largest
    labels = [0, 1, 2, 0, 1, 2, 0, 1] * 3
    images = pipeline(24, torch.Generator().manual_seed(0), 2, class_labels=labels, output_type="pt").images
    for row in range(3):
        assert np.array_equal(rows[row + 1], drawn(images[8 * row : 8 * row + 8]))


def test_a_teacher_of_a_short_clock_is_drawn_in_fewer_steps(distil, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "TEACHER_STEPS", 20)
    teacher = DDPMPipeline(unet=make_unet(), scheduler=DDPMScheduler(num_train_timesteps=16))
    teacher.save_pretrained(tmp_path / "teacher")
    settings = {"max_train_steps": 1, "start_timestep": 12, "validation_steps": 1}
    folder = distil(tmp_path / "run", pretrained_teacher_model=tmp_path / "teacher", **settings)
    assert (folder / "samples" / "step-1.png").exists()


def test_contrast_and_diversity_scale_with_the_images_and_images_that_are_all_the_same_have_no_diversity():
    row = torch.randn(progress.COLUMNS, 1, 4, 4)
    for factor in (0.5, 2.0):
        ratios = progress.beside_teacher(torch.cat([row, *(factor * row,) * (progress.ROWS - 1)]))
        assert ratios == pytest.approx({"images/contrast": factor, "images/diversity": factor}, rel=0.02)
    ratios = progress.beside_teacher(torch.cat([row, torch.randn(1, 1, 4, 4).repeat(24, 1, 1, 1)]))
    assert ratios["images/diversity"] == 0
    assert ratios["images/contrast"] > 0.3


COLLAPSED = {"max_train_steps": 11, "checkpointing_steps": 100, "critic_updates": 1, "critic_learning_rate": 0.01}


@pytest.fixture
def judge(make_state, tmp_path):
    """Judges grids of a run of 10 updates, one after the other, by their contrast and diversity."""

    def call(*grids):
        watched = progress.Progress(make_state(max_train_steps=10, output_dir=tmp_path))
        for step, ratios in enumerate(grids, start=1):
            watched._judge(step, list(ratios))

    return call


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((1.0, 1.0), None),
        ((0.7, 1.4), None),
        ((0.5, 1.0), "0.50 times the contrast of the teacher's, and 0.67 to 1.5 is usual"),
        ((1.0, 1.6), "1.60 times the diversity of the teacher's, and"),
        ((5.0, 0.2), "5.00 times the contrast and 0.20 times the diversity of the teacher's, and"),
    ],
)
def test_a_run_warns_of_that_which_is_out_of_range(judge, capsys, ratios, said):
    judge(ratios, (1.0, 1.0), ratios)  # it is said once
    lines = [line for line in capsys.readouterr().out.splitlines() if "of the teacher's" in line]
    assert len(lines) == bool(said)
    assert not said or lines[0].startswith(f"after 1 update the images have {said}")


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((5.0, 1.6), "5.00 times the contrast and 1.60 times the diversity"),
        ((1.2, 0.1), "1.20 times the contrast and 0.10 times the diversity"),
    ],
)
def test_a_run_is_stopped_with_both_measures_each_with_its_own_value(judge, tmp_path, ratios, said):
    text = f"after 2 updates the images have {said} of the teacher's, as at the grid before, and the run was stopped"
    with pytest.raises(progress.CollapsedRunError, match=text):
        judge(ratios, ratios)
    assert read_log(tmp_path)[-1]["stopped"].startswith(text)
    judge(ratios, (1.0, 1.0), ratios)  # not in a row


def test_a_run_whose_images_have_collapsed_in_two_grids_is_stopped_and_goes_on_without_grids_to_the_same_bits(
    distil, tmp_path, monkeypatch, arguments, differences
):
    """After the first tenth, before which the student is the teacher still."""
    black = torch.zeros((progress.ROWS - 1) * progress.COLUMNS, 1, 8, 8)
    monkeypatch.setattr(progress.Progress, "_draw_student", lambda self, size: black)
    run, samples = tmp_path / "run", tmp_path / "run" / "samples"
    with pytest.raises(SystemExit) as exit:
        cli.main(["distil", *arguments(run, validation_steps=1, **COLLAPSED)])
    said = exit.value.code
    found = "after 3 updates the images have 0.00 times the contrast and 0.00 times the diversity of the teacher's"
    assert said.startswith(f"error: {found}, as at the grid before, and the run was stopped: look at {samples},")
    rates = "--learning_rate 0.0001 (preset fast: 0.0001) and --critic_learning_rate 0.01 (preset fast: 0.001)"
    assert f"; start anew with other rates than {rates}, or, to go on all the same, continue with" in said
    assert said.endswith("--validation_steps 0 and --resume_from_checkpoint latest")
    assert "and the run was stopped" in (run / "index.html").read_text()
    assert sorted(path.name for path in samples.iterdir()) == [f"step-{step}.png" for step in range(4)]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-3"]
    distil(run, resume_from_checkpoint="latest", validation_steps=0, **COLLAPSED)
    assert differences(run, distil(tmp_path / "other", validation_steps=0, **COLLAPSED)) == []
    assert "the run was stopped" not in (run / "index.html").read_text()


def test_all_processes_of_a_collapsed_run_stop(launch, tmp_path):
    """Only the first has drawn."""
    kill = {"point": "collapse", "step": 0}
    statuses, text = launch(tmp_path / "run", processes=2, kill=kill, validation_steps=1, **COLLAPSED)
    assert statuses == [1, 1], text
    assert text.count("after 3 updates the images have 0.00 times the contrast") == 2
    assert text.count("after 2 updates the images have 0.00 times the contrast") == 1  # the warning
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-3"]
