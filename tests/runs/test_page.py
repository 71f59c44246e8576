"""The page of a run, and the log that its curves are drawn from."""

import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from hsivi_diffusers import HSIVIConfig, HSIVITrainer
from hsivi_diffusers.distillation import progress
from hsivi_diffusers.distillation.config import usual_options
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


VOID = {"meta", "img", "input"}
HOSTILE = "</script></title><script>alert(1)</script><img src=x onerror=alert(1)> \"' &"


class Document(HTMLParser):
    """The elements of a page in order, as (tag, attributes), each with the text in it, and the tags that are open."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append((tag, len(self.texts) - 1))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, number in self.open:
            self.texts[number] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [text for (name, _), text in zip(self.elements, self.texts, strict=True) if name == tag]

    def data(self):
        return json.loads(self.text("script")[0])


def page(folder, **usual):
    run_page.write_page(folder, usual)
    assert {path.name for path in folder.iterdir()} & {"index.html", "index.html.partial"} == {"index.html"}
    return (folder / "index.html").read_text()


def test_the_grids_are_in_order_and_are_told_contrast_and_diversity(folder):
    line = {"step": 90, "images/contrast": 1.234, "images/diversity": 0.5}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    told = {0: "", 90: "It has 1.23 times the teacher's contrast, 0.50 times its diversity.", 100: ""}
    grids = Document(page(folder)).data()["grids"]
    assert grids == [[step, f"samples/step-{step}.png", text] for step, text in told.items()]
    assert all((folder / source).is_file() for _, source, _ in grids)


def test_the_newest_grid_is_shown_without_the_script_and_its_first_row_is_called_the_teachers(folder):
    document = Document(page(folder))
    (image,) = document.attributes("img")
    assert image["src"] == "samples/step-100.png"
    assert image["alt"].startswith("Sample grid after 100 updates: the first of 4 rows is the teacher's")
    assert document.text("b") == ["teacher", "student"]
    assert "grid-template-rows: 1fr 3fr" in page(folder)
    (slider,) = document.attributes("input")
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "2", "2")


@pytest.mark.parametrize("steps", [(), (7,)])
def test_there_is_no_slider_where_there_is_nothing_to_choose(folder, steps):
    shutil.rmtree(folder / "samples")
    (folder / "samples").mkdir()
    for step in steps:
        (folder / "samples" / f"step-{step}.png").touch()
    document = Document(page(folder))
    assert [image["src"] for image in document.attributes("img")] == [f"samples/step-{step}.png" for step in steps]
    assert document.attributes("input") == []
    assert ("There is no sample grid yet." in document.text("p")) == (not steps)
    (folder / "options.json").write_text('{"validation_steps": 0}')
    assert ("This run draws no sample grids." in page(folder)) == (not steps)


def test_a_page_needs_no_other_file_than_those_of_the_run_and_all_that_is_operated_has_a_name(folder):
    text = page(folder)
    document = Document(text)
    for _, attributes in document.elements:
        for source in (attributes.get("src"), attributes.get("href")):
            assert source is None or not any(urlsplit(source)[:2])
    assert not re.search(r"https?:|@import|url\(|fetch\(", text)
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'find\("(\w+)"\)', text)) <= set(ids)
    assert all(image["alt"] for image in document.attributes("img"))
    assert all(slider["aria-label"] for slider in document.attributes("input"))
    assert all(document.text("button"))
    assert all("aria-label" in svg or "aria-hidden" in svg for svg in document.attributes("svg"))
    assert document.attributes("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in document.attributes("meta")
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("log", ["", json.dumps(LOSSES[0]) + "\n", '{"step": 1}\n{"step": 2}\n'])
def test_too_little_for_a_curve_is_left_out(folder, log):
    (folder / "log.jsonl").write_text(log)
    assert "Curves" not in Document(page(folder)).text("h2")


def test_text_of_the_run_is_shown_as_it_is(folder):
    plain = Document(page(folder)).elements
    run = folder.rename(folder.with_name("<img src=x>"))
    (run / "prompts.txt").write_text(f"{HOSTILE}\na dog\n")
    rows = [{"nfe": 4, "method": HOSTILE, "kid": 0.00123, "num_samples": 9}]
    (run / "report.json").write_text(json.dumps({"rows": rows, "measured": HOSTILE, "floor": {"kid": 0.001}}))
    (run / "pipeline" / "scheduler").mkdir(parents=True)
    scheduler = {"layer_timesteps": [HOSTILE, 0], "prediction_type": "epsilon"}
    (run / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    options = {**json.loads((run / "options.json").read_text()), HOSTILE: HOSTILE, "preset": HOSTILE}
    (run / "options.json").write_text(json.dumps(options))
    name = HOSTILE.replace("/", "")  # which separates a group from the names in it
    lines = [{"step": step, name: step, f"loss/{name}": step} for step in (5, 6)]
    with (run / "log.jsonl").open("a") as log:
        log.write("".join(f"\n{json.dumps(line)}" for line in [*lines, {"step": 6, "stopped": HOSTILE}]))
    document = Document(page(run))
    assert document.texts.count("<img src=x>") == 2  # the title and the first heading
    assert HOSTILE in document.text("li")
    assert HOSTILE in document.text("td")
    assert {"4", HOSTILE, "1.23"} <= set(document.text("td"))
    assert f"These differ from the preset {HOSTILE}:" in document.text("p")
    assert f"The network is called at the timesteps {HOSTILE}." in document.text("p")
    assert sum(name in svg.get("aria-label", "") for svg in document.attributes("svg")) == 2
    assert any(text.startswith(f"{name} 6") for text in document.text("li"))
    assert [len(document.attributes(tag)) for tag in ("script", "img")] == [2, 1]
    assert "<" not in document.text("script")[0]
    known = {name for _, attributes in plain for name in attributes}
    assert {name for _, attributes in document.elements for name in attributes} <= known


def test_only_what_differs_from_the_preset_is_shown_and_the_rest_is_folded(folder):
    config = HSIVIConfig(num_inference_steps=4, max_train_steps=30, learning_rate=2e-4, class_shares=[1.0] * 500)
    options = {"pretrained_teacher_model": "a/b", "revision": None, **config.record()}
    (folder / "options.json").write_text(json.dumps(options))
    text = page(folder, **usual_options(options))
    shown, folded = (
        Document(f"<table>{part}</table>") for part in re.findall('<table class="options">(.*?)</table>', text)
    )
    assert shown.text("td")[:2] == ["class_shares", f"{str([1.0] * 500)[:300]} ..."]
    assert shown.text("td")[2:] == ["learning_rate", "0.0002"]
    names = folded.text("td")[::2]
    assert sorted([*names, "class_shares", "learning_rate"]) == sorted(options)
    assert "mixed_precision" in names
    assert text.rindex("<details>") < text.index("<td>pretrained_teacher_model</td>") < text.rindex("</details>")
    (folder / "options.json").write_text(json.dumps({**options, "class_shares": None, "learning_rate": 1e-4}))
    assert "options but steps and updates have the values of the preset fast." in page(folder, **usual_options(options))


def test_the_commands_are_on_the_page_as_they_are_to_be_copied(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    run = folder.rename(folder.with_name("it's <b>my run"))
    document = Document(page(run))
    command = """hsivi distil --output_dir 'it'"'"'s <b>my run' --resume_from_checkpoint latest"""
    assert document.text("code") == [f"cd {folder.parent}", command]
    assert document.text("button") == ["Play", "Copy", "Copy"]
    assert {button["type"] for button in document.attributes("button")} == {"button"}


def test_it_tells_whether_the_training_has_ended(folder):
    assert "in 9 updates. The training has done 4 of them." in page(folder)
    assert '<meta http-equiv="refresh" content="30">' in page(folder)
    assert Document(page(folder)).data()["seconds"] == 30
    assert Document(page(folder)).attributes("progress") == [{"value": "4", "max": "9", "aria-label": "Updates"}]
    log = folder / "log.jsonl"
    log.write_text(log.read_text() + "\n" + json.dumps({"step": 4, "stopped": "the images are grey"}) + "\n")
    assert "in 9 updates. The training was stopped.</p>" in page(folder)
    assert '<p class="warning"><b>the images are grey</b></p>' in page(folder)
    assert Document(page(folder)).text("code")[-1].endswith(" --resume_from_checkpoint latest --validation_steps 0")
    assert "refresh" not in page(folder)
    assert Document(page(folder)).data()["seconds"] == 0
    cost = {"seconds": 61.2, "network_calls": 12345, "mixed_precision": "bf16"}
    (folder / "training.json").write_text(json.dumps(cost))
    assert "in 9 updates. It took 61 s, 12,345 network calls of one image each, in bf16." in page(folder)
    (folder / "options.json").write_text('{"num_inference_steps": [1], "max_train_steps": 1}')
    assert "<p>1 step, distilled from None in 1 update. It took 61 s" in page(folder)


def test_a_run_writes_its_page_and_a_resumed_one_logs_each_update_once(distil, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 1)
    monkeypatch.setattr(progress, "TEACHER_STEPS", 2)
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
    assert '[5, "samples/step-5.png", "It has ' in text


@pytest.mark.slow
def test_the_page_of_a_run_that_was_resumed_is_that_of_one_that_was_not(distil, tmp_path):
    options = {"checkpointing_steps": 2, "validation_steps": 2, "critic_updates": 1}
    run = distil(tmp_path / "run", **options)
    measured = r"It took [^<]*|<figcaption>Images per second.*?</figure>"
    written = re.sub(measured, "", (run / "index.html").read_text())
    assert "--learning_rate" not in written
    assert "All options but" not in written
    assert "<td>critic_learning_rate</td>" in written
    shutil.rmtree(run / "checkpoints" / "checkpoint-5")
    distil(run, resume_from_checkpoint="latest", **options)
    assert re.sub(measured, "", (run / "index.html").read_text()) == written


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
        ("report.json", '{"rows": 5}'),
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
