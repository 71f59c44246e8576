"""`hsivi evaluate`."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from hsivi_diffusers import HSIVIPipeline, load_teacher
from hsivi_diffusers.commands import evaluate
from hsivi_diffusers.evaluation import features, metrics, report
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.figures import draw_samples
from hsivi_diffusers.evaluation.images import load_images
from hsivi_diffusers.evaluation.metrics import Measures
from hsivi_diffusers.runs.measures import REPORTED
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.solvers import make_solver, make_student, sample
from hsivi_diffusers.teachers.teacher import Teacher
from short_run import contents
from tiny_unet import make_unet

SOLVERS = ["DDIM", "DPM-Solver++", "DPM-Solver++, few-step grid", "UniPC", "UniPC, few-step grid"]
KEYS = ["dataset", "method", "nfe", "grid", "train_seed", "eval_seed", "num_samples"]
KEYS += [*REPORTED, "kid_error", "kid_folds", "train_seconds"]


def arguments(run_dir, extractor):
    return [
        *[f"--run_dir={run_dir}", f"--feature_extractor={extractor}", "--feature_name=my own features"],
        *["--num_samples=24", "--batch_size=10", "--eval_seed=3", "--real_data=digits"],
    ]


@pytest.fixture
def run_copy(fast_run, tmp_path):
    """A finished run that may be written to."""
    return shutil.copytree(fast_run, tmp_path / "run")


def change(folder, **settings):
    """Changes options of a run."""
    path = folder / "options.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_compared():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metrics, "MOST", 200)
        yield


@pytest.fixture(scope="module")
def evaluated(several_run, extractor, printed, tmp_path_factory):
    """A tiny evaluation: folder, its report.json, the rows of images, and what was printed."""
    folder, shown = shutil.copytree(several_run, tmp_path_factory.mktemp("evaluated") / "several"), []
    options = ["--solver_steps", "2", "4", "--ddim_steps=3", "--ddpm_steps=5"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "draw_samples", lambda rows, *given: shown.append(rows) or draw_samples(rows, *given))
        text = printed(evaluate.main, [*arguments(folder, extractor), *options])
    return folder, json.loads((folder / "report.json").read_text()), shown[0], text


def test_every_method_and_count_has_its_row_with_the_keys_promised(evaluated):
    folder, content, *_ = evaluated
    assert content["features"] == "my own features"
    assert content["measured"].startswith("Measured on 20")
    methods = {*(("HSIVI", nfe) for nfe in (1, 2, 4)), *((name, nfe) for nfe in (2, 4) for name in SOLVERS)}
    rows = content["rows"]
    assert {(row["method"], row["nfe"]) for row in rows} == methods | {("DDIM, eta 1", 3), ("DDPM", 5)}
    assert len(rows) == len(methods) + 2
    training = json.loads((folder / "training.json").read_text())
    for row in rows:
        ours = row["method"] == "HSIVI"
        assert list(row) == KEYS
        assert (row["dataset"], row["num_samples"], row["eval_seed"]) == ("digits", 24, 3)
        assert row["train_seed"] == (0 if ours else None)
        assert row["train_seconds"] == (training["seconds"] if ours else None)


def test_rows_hold_the_distances_of_the_images(evaluated, teacher, extractor):
    folder, content, *_ = evaluated
    network = ImageClassifier.from_pretrained(extractor).eval()
    distances = Measures(network, load_images("digits", 8, 1)[0].float() / 255, [*REPORTED])
    loaded, student = load_teacher(str(teacher)), HSIVIPipeline.from_pretrained(folder / "pipeline")
    few, guided = clock_of(loaded.schedule).few_step_levels((1, 8, 8), 4), Guided(loaded)
    measured = {
        ("HSIVI", 1): make_student(student, loaded, 1),
        ("HSIVI", 4): make_student(student, loaded, 4),
        ("DPM-Solver++", 4): make_solver("DPM-Solver++", 4, guided),
        ("DPM-Solver++, few-step grid", 4): make_solver("DPM-Solver++", 4, guided, few),
        ("DDIM, eta 1", 3): make_solver("DDIM, eta 1", 3, guided),
    }
    for row in content["rows"]:
        if sampler := measured.pop((row["method"], row["nfe"]), None):
            wanted = distances(torch.cat([*sample(sampler, 24, 10, seed=3)]))
            assert {name: row[name] for name in REPORTED} == pytest.approx(wanted, rel=1e-6)
    assert measured == {}


def test_the_table_is_sorted_and_says_what_was_measured(evaluated, teacher):
    folder, content, *_ = evaluated
    text = (folder / "report.md").read_text()
    assert "Features: my own features." in text
    assert "preset `fast` for 5 updates" in text
    assert f"Teacher `{teacher}`. Reference: digits. HSIVI was trained" in text
    assert "|  | two halves of the reference | " in text
    assert "| 800, 200 |" in text
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    wanted = sorted(content["rows"], key=lambda row: (row["nfe"], row["fd"]))
    assert content["rows"] == wanted  # and so on the page
    assert [cell[0] for cell in cells] == [f"| {row['nfe']}" for row in wanted]
    assert [cell[1].strip("*") for cell in cells] == [row["method"] for row in wanted]
    assert [cell[2] for cell in cells] == [f"{row['fd']:.2f}" for row in wanted]


def test_three_lines_close_the_run_and_the_figures_open(evaluated):
    folder, content, shown, text = evaluated
    made, compares, following = text.splitlines()
    assert made == f"Wrote:  index.html, report.md, report.json, samples.png, curve.png in {folder}"
    rows = {(row["method"], row["nfe"]): row["fd"] for row in content["rows"]}
    parts = [f"FD {rows['HSIVI', 1]:.2f} at 1 network call"]
    for calls in (2, 4):
        others = {name: fd for (name, nfe), fd in rows.items() if nfe == calls and name != "HSIVI"}
        best = min(others, key=others.get)
        parts.append(f"FD {rows['HSIVI', calls]:.2f} at {calls} network calls")
        parts.append(f"best solver at as many calls: {best}, {others[best]:.2f}")
    assert compares == f"Result: {'; '.join(parts)}; with the most calls, 5: DDPM, {rows['DDPM', 5]:.2f}"
    assert following == f"Next:   open {folder / 'index.html'} in a browser"
    for name in ("samples.png", "curve.png"):
        with Image.open(folder / name) as image:
            assert image.format == "PNG"
            assert image.width >= 512
            assert len(image.convert("L").getcolors()) > 10
    two, four = ([f"{name} at {nfe}" for name in (*SOLVERS, "HSIVI")] for nfe in (2, 4))
    assert [label for label, _ in shown] == ["teacher, DDPM at 5", "HSIVI at 1", *two, *four, "reference"]
    assert {len(images) for _, images in shown} == {16}
    assert not [*folder.glob("*.partial")]


def test_a_solver_that_diverges_loses_no_row_and_one_that_fails_none_before_it(run_copy, extractor, monkeypatch):
    drawn = evaluate.draw

    def diverge(name, *given):
        if name == "UniPC, few-step grid at 2":
            raise KeyboardInterrupt
        images = drawn(name, *given)
        if name == "UniPC at 2":
            images[3] = torch.nan
        return images

    monkeypatch.setattr(evaluate, "draw", diverge)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*arguments(run_copy, extractor), "--solver_steps=2", "--ddim_steps=0", "--ddpm_steps=0"])
    rows = json.loads((run_copy / "report.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"HSIVI", *SOLVERS[:-1]}
    assert [(row["method"], row["not_finite"]) for row in rows if "fd" not in row] == [("UniPC", 1)]


def test_the_reference_is_the_teacher_from_other_noise(class_teacher):
    guided = Guided(load_teacher(str(class_teacher)))
    options = evaluate.Evaluation(reference_samples=8, reference_steps=3, batch_size=5, eval_seed=4)
    images, labels, name = evaluate.load_reference(options, guided, 3, options.batch_size)
    solver = make_solver("DPM-Solver++ SDE", 3, guided, timestep_spacing="trailing")
    own, other = (torch.cat([*sample(solver, 8, 5, seed, 3)]) for seed in (4, 5))
    assert torch.equal(images, other)
    assert not torch.equal(images, own)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert name == "teacher, DPM-Solver++ SDE at 3 steps"


def test_a_folder_of_images_is_named_by_its_last_part(teacher, tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cats" / "1.png")
    monkeypatch.chdir(tmp_path / "cats")
    guided = Guided(load_teacher(str(teacher)))
    for given in (str(tmp_path / "cats"), f"{tmp_path}/cats/", "."):
        *_, name = evaluate.load_reference(evaluate.Evaluation(real_data=given), guided, None, 100)
        assert name == "cats"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"real_data": "digits"}, "images are 1 x 8 x 16, and only square .*: leave --real_data out"),
        ({"reference_samples": 8, "reference_steps": 2}, "by DPM-Solver.* at 2 steps are not finite: give more --refe"),
    ],
)
def test_a_reference_that_nothing_can_be_compared_to_is_refused(teacher, options, message):
    guided = Guided(Teacher(make_unet(sample_size=(8, 16)), load_teacher(str(teacher)).schedule, (1, 8, 16)))
    torch.nn.init.constant_(guided.teacher.network.conv_out.bias, torch.nan)
    with pytest.raises(ValueError, match=message):
        evaluate.load_reference(evaluate.Evaluation(**options), guided, None, 100)


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(evaluate, "load_teacher", lambda *given: pytest.fail("the teacher was loaded"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run_dir="], "--run_dir is missing"),
        (["--run_dir=nowhere"], "'nowhere' lacks pipeline, options.json, training.json: give the folder of a finished"),
        (["--batch_size=0"], "batch_size=0: give a whole number from 1"),
        (["--num_samples=6"], "num_samples=6: give a whole number from 7"),
        (["--num_samples=1000000000000"], "num_samples=1000000000000: give a whole number from 7"),
        (["--reference_samples=6"], "reference_samples=6: give a whole number from 7"),
        (["--reference_steps=0"], "reference_steps=0: give a whole number from 1 to 1000"),
        (["--ddpm_steps=-1"], "ddpm_steps=-1: give a whole number from 0"),
        (["--ddim_steps=-1"], "ddim_steps=-1: give a whole number from 0"),
        (["--solver_steps", "2", "0"], r"solver_steps=\[2, 0\]: give a whole number from 1"),
        (["--eval_seed=-1"], "eval_seed=-1: give a whole number from 0"),
        (["--real_data=./nowhere"], "'./nowhere' is no folder here"),
        (["--feature_extractor=nowhere"], "feature_extractor='nowhere' holds no ImageClassifier"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(run_copy, unloaded, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main([f"--run_dir={run_copy}", *options])
    assert not (run_copy / "report.json").exists()


def test_a_missing_package_is_refused_before_anything_is_loaded(run_copy, monkeypatch, unloaded):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="^matplotlib missing: pip install"):
        evaluate.main([f"--run_dir={run_copy}"])


def test_a_report_elsewhere_leaves_the_run_as_it_is(run_copy, extractor, tmp_path, printed):
    before, folder = contents(run_copy), tmp_path / "new" / "report"
    few = ["--ddim_steps=0", "--ddpm_steps=0", "--solver_steps=2", f"--output_dir={folder}"]
    text = printed(evaluate.main, [*arguments(run_copy, extractor), *few])
    assert contents(run_copy) == before
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.json", "samples.png", "curve.png"}
    assert f"Wrote:  report.md, report.json, samples.png, curve.png in {folder}\n" in text
    assert text.endswith(f"Next:   read {folder / 'report.md'}\n")


def test_a_run_that_cannot_be_written_to_is_refused_before_anything_is_loaded(run_copy, unloaded, monkeypatch):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to: name another folder for the report by --output_dir"):
        evaluate.main([f"--run_dir={run_copy}"])


def test_a_run_whose_teacher_was_a_loaded_pipeline_asks_for_it(run_copy):
    with pytest.raises(ValueError, match="--teacher is missing: this run was given a loaded teacher, name the folder"):
        evaluate.main([f"--run_dir={change(run_copy, pretrained_teacher_model=None)}"])


def test_a_count_that_a_solver_cannot_draw_is_refused_before_images_are_drawn(run_copy, extractor, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *given: pytest.fail("images were drawn"))
    with pytest.raises(ValueError, match="2000"):
        evaluate.main([f"--run_dir={run_copy}", f"--feature_extractor={extractor}", "--ddpm_steps=2000"])


def test_the_teacher_is_that_of_the_run_with_its_revision_unless_named(run_copy, extractor, monkeypatch):
    change(run_copy, pretrained_teacher_model="somebody/teacher", revision="v2")
    asked = []

    def load(name, revision=None):
        asked.append((name, revision))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_teacher", load)
    for extra in ([], ["--teacher=other"]):
        with pytest.raises(KeyboardInterrupt):
            evaluate.main([*arguments(run_copy, extractor), *extra])
    assert asked == [("somebody/teacher", "v2"), ("other", None)]


class Means(torch.nn.Module):
    """Four features of any images: stands in for EfficientNet, without a head."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


def test_a_class_conditional_run_is_evaluated_without_further_options(class_run, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(class_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "EfficientNetFeatures", Means)
    quick = ["--num_samples=12", "--reference_samples=20", "--reference_steps=3", "--ddpm_steps=4", "--ddim_steps=0"]
    evaluate.main([f"--run_dir={folder}", *quick])
    content = json.loads((folder / "report.json").read_text())
    keys = [(row["method"], row["nfe"]) for row in content["rows"]]
    assert sorted(keys) == sorted([("HSIVI", 2), *[(name, nfe) for nfe in (2, 4) for name in SOLVERS], ("DDPM", 4)])
    assert content["reference"] == "teacher, DPM-Solver++ SDE at 3 steps"
    assert content["headline"] == "kid"
    assert [*content["floor"]] == [*REPORTED, "kid_error", "kid_folds"]
    text = (folder / "report.md").read_text()
    assert "| NFE | method | KID x 1000 |" in text
    kid, error = (1000 * content["floor"][name] for name in ("kid", "kid_error"))
    assert f"|  | two halves of the reference | {kid:.2f} ± {error:.2f} |" in text
    assert "Result: KID x 1000 " in capsys.readouterr().out
