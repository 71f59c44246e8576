"""The page of a run, and the log that its curves are drawn from."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from hsivi_diffusers import HSIVIConfig, HSIVITrainer
from hsivi_diffusers.distillation import progress
from hsivi_diffusers.runs import page as run_page
from hsivi_diffusers.runs.artifacts import sample_grids
from short_run import SETTINGS

LOSSES = [{"step": step, "loss/student": 10.0 / step, "loss/critic": 100.0} for step in (1, 2, 4)]


@pytest.fixture
def folder(tmp_path):
    """A run that has not ended, with all that a page can show of it."""
    options = {"pretrained_teacher_model": "assets/<b>x", "num_inference_steps": [4], "max_train_steps": 9, "seed": 3}
    (tmp_path / "options.json").write_text(json.dumps(options))
    (tmp_path / "samples").mkdir()
    for step in (0, 90, 100):
        (tmp_path / "samples" / f"step-{step}.png").touch()
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOSSES) + '{"step": 5, "lo')
    return tmp_path


def page(folder):
    run_page.write_page(folder)
    return (folder / "index.html").read_text()


def test_the_grids_are_in_order_and_are_told_contrast_and_diversity(folder):
    line = {"step": 90, "images/contrast": 1.234, "images/diversity": 0.5}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    grids = json.loads(re.search(r"const grids = (.*), at = ", page(folder))[1])
    told = {0: "", 90: ", 1.23 times the teacher's contrast, 0.50 its diversity", 100: ""}
    assert grids == [[step, f"samples/step-{step}.png", text] for step, text in told.items()]


def test_a_curve_has_a_point_for_each_line_that_is_whole(folder):
    student, critic = re.findall(r'polyline points="([^"]*)"', page(folder))
    assert student == "160.0,124.8 320.0,162.4 640.0,200.0"  # log(100 / y) / log(100 / 2.5) of 200 pixels
    assert critic == "160.0,0.0 320.0,0.0 640.0,0.0"


@pytest.mark.parametrize("log", ["", json.dumps(LOSSES[0]) + "\n", '{"step": 1}\n{"step": 2}\n'])
def test_too_little_for_a_curve_is_left_out(folder, log):
    (folder / "log.jsonl").write_text(log)
    assert "<svg" not in page(folder)


def test_losses_that_are_not_numbers_have_no_point(folder):
    line = {"step": 5, "loss/student": float("nan"), "loss/critic": float("nan")}
    with (folder / "log.jsonl").open("a") as log:
        log.write(f"\n{json.dumps(line)}\n")
    assert len(re.findall(r'polyline points="([^"]*)"', page(folder))[0].split()) == 3


def test_text_of_the_run_is_shown_as_it_is(folder):
    (folder / "prompts.txt").write_text("a <script>alert(1)</script>\na dog\n")
    rows = [{"nfe": 4, "method": "<i>HSIVI", "kid": 0.00123, "num_samples": 9}]
    (folder / "report.json").write_text(json.dumps({"rows": rows, "measured": "<u>today"}))
    (folder / "pipeline" / "scheduler").mkdir(parents=True)
    scheduler = {"layer_timesteps": ["<img src=x onerror=alert(1)>", 0], "prediction_type": "epsilon"}
    (folder / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    text = page(folder)
    for mark in ("<b>x", "<script>alert", "<i>HSIVI", "<u>", "<img src=x"):
        assert mark not in text
    assert "<li>a &lt;script&gt;alert(1)&lt;/script&gt;</li>" in text
    assert "<td>4</td><td>&lt;i&gt;HSIVI</td><td>1.23</td>" in text
    assert "<tr><td>seed</td><td>3</td></tr>" in text


def test_it_tells_whether_the_training_has_ended(folder):
    assert "in 9 updates. The training has done 4 of them." in page(folder)
    assert '<meta http-equiv="refresh" content="30">' in page(folder)
    log = folder / "log.jsonl"
    log.write_text(log.read_text() + "\n" + json.dumps({"step": 4, "stopped": "the images are grey"}) + "\n")
    assert "in 9 updates. The training was stopped.</p>\n<p><b>the images are grey</b></p>" in page(folder)
    assert "refresh" not in page(folder)
    cost = {"seconds": 61.2, "network_calls": 12345, "mixed_precision": "bf16"}
    (folder / "training.json").write_text(json.dumps(cost))
    assert "in 9 updates. It took 61 s, 12,345 network calls, in bf16." in page(folder)


def test_a_run_writes_its_page_and_a_resumed_one_logs_each_update_once(distil, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 1)
    options = {"checkpointing_steps": 3, "validation_steps": 5, "critic_updates": 1}
    run = distil(tmp_path / "run", **options)
    shutil.rmtree(run / "checkpoints" / "checkpoint-5")
    distil(run, resume_from_checkpoint="latest", **options)
    log = run_page.read_log(run)
    updates = [line for line in log if "loss/student" in line]
    assert [line["step"] for line in updates] == [1, 2, 3, 4, 5]
    assert all(line["loss/critic"] > 0 for line in updates)
    speeds = {line["step"]: line["images_per_second"] for line in updates if "images_per_second" in line}
    assert sorted(speeds) == [2, 3, 5]  # the clock starts after the first update
    assert min(speeds.values()) > 0
    grids = [line for line in log if "loss/student" not in line]
    assert [line["step"] for line in grids] == [0, 3, 5]  # it was resumed after 3
    assert all(line["images/contrast"] > 0 and line["images/diversity"] > 0 for line in grids)
    text = (run / "index.html").read_text()
    assert "It took" in text
    assert '[5, "samples/step-5.png", ", ' in text


def test_other_files_among_the_grids_and_damaged_lines_of_the_log_do_no_harm(folder):
    for name in ("step-9-zoom.png", "step-.png", "step-x.png"):
        (folder / "samples" / name).touch()
    (folder / "log.jsonl").write_text('\x00\x00\n\n{"step": "one"}\n[1]\n' + (folder / "log.jsonl").read_text())
    assert list(sample_grids(folder)) == [0, 90, 100]
    assert [line["step"] for line in run_page.read_log(folder)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", "{"),
        ("report.json", '{"rows": [1, {"nfe": 1}], "floor": 3}'),
        ("report.json", '{"rows": [{"nfe": 1, "method": "x", "fd": "<b>"}], "floor": {"fd": null}}'),
        ("training.json", '{"seconds": "x"}'),
        ("training.json", '{"network_calls": 3}'),
        ("options.json", "[1]"),
        ("prompts.txt", "\ud800"),
        ("log.jsonl", '{"step": 0, "images/contrast": "x", "loss/student": 1}\n{"step": 0, "loss/student": "<b>"}'),
        ("log.jsonl", '{"step": 0, "images/contrast": 1, "loss/student": 1}\n{"step": 0, "loss/student": 2}'),
        ("pipeline/scheduler/scheduler_config.json", '{"layer_timesteps": "<b>"}'),
        ("pipeline/scheduler/scheduler_config.json", '{"layer_timesteps": [[5, 0], 3]}'),
    ],
)
def test_a_page_is_written_of_damaged_files_too(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content, errors="surrogatepass")
    text = page(folder)
    assert "<h2>Options" in text
    assert "<b>x" not in text


def test_a_callback_may_return_any_number_and_any_name(teacher, tmp_path):
    numbers = {"one": np.float32(2.5), "two": torch.tensor(2.5), "three": 2.5}
    config = HSIVIConfig(**{**SETTINGS, "max_train_steps": 2}, output_dir=tmp_path / "run")
    HSIVITrainer(teacher, config, callbacks=[lambda trainer, step: {**numbers, "step": 7}]).train()
    log = run_page.read_log(tmp_path / "run")
    assert [[line[name] for name in ("step", *numbers)] for line in log] == [[1, 2.5, 2.5, 2.5], [2, 2.5, 2.5, 2.5]]


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(distil, fast_run, tmp_path):
    run = shutil.copytree(fast_run, tmp_path / "run")
    for name in ("pipeline", "critic", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "training.json").unlink()
    (run / "samples").mkdir()
    (run / "samples" / "step-0.png").touch()
    for name in ("index.html", "log.jsonl"):
        assert (run / name).is_file()
        (run / f"{name}.partial").touch()
    distil(run)
    assert (run / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("grid", "told"), [([440, 220, 0], "440, 220"), ([[500, 0], [440, 220, 0]], "500; 440, 220"), (None, None)]
)
def test_the_page_says_at_which_timesteps_the_network_is_called(folder, grid, told):
    (folder / "pipeline" / "scheduler").mkdir(parents=True)
    config = folder / "pipeline" / "scheduler" / "scheduler_config.json"
    for kind, name in (("epsilon", "timesteps"), ("flow_prediction", "levels")):
        config.write_text(json.dumps({"layer_timesteps": grid, "prediction_type": kind}))
        found = re.search(rf"called at the {name} (.*)\.</p>", page(folder))
        assert (found and found[1]) == told
