"""Teachers whose scheduler clips the clean image, as DDPMScheduler does by default: what is drawn of them clips too."""

import json
from inspect import signature

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler

from gaussian_teacher import GaussianTeacher
from hsivi_diffusers import HSIVIScheduler, load_teacher
from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation.pairs import follow_ode
from hsivi_diffusers.evaluation.report import OURS
from hsivi_diffusers.teachers.guidance import Guided
from hsivi_diffusers.teachers.levels import clock_of
from hsivi_diffusers.teachers.solvers import SOLVERS, make_scheduler, run_solver
from hsivi_diffusers.teachers.teacher import Teacher
from stock_teacher import train_stock
from tiny_unet import make_unet

GRID = [900, 600, 300, 40]
RANGE = 0.7
CLIPS = {"clip_sample": True, "clip_sample_range": RANGE}
THRESHOLD = {"thresholding": True, "sample_max_value": 2.0}
SAID = "% of the pixels of the teacher's images, in 20 steps, are outside [-1, 1]"


class Loud(GaussianTeacher):
    """Sees three times the contrast."""

    def clean(self, x, timestep):
        return 3 * super().clean(x, timestep)


class Clipped(Loud):
    """Clips by itself."""

    def clean(self, x, timestep):
        return super().clean(x, timestep).clamp(-RANGE, RANGE)


def solver_of(method, schedule):
    return make_scheduler(method, schedule, GRID if method not in ("DDPM", "DDIM, eta 1") else None)[0]


def draw(solver, network):
    call = Guided(Teacher(network, network.schedule, (1, 8, 8)))
    given = {"generator": torch.Generator().manual_seed(0)} if "generator" in signature(solver.step).parameters else {}
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return run_solver(call, solver, x, len(GRID), **given)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", ["DPM-Solver++", "DPM-Solver++ SDE", "UniPC", "DEIS", "SA-Solver"])
def test_a_solver_draws_what_it_would_of_a_network_that_clips(method, prediction_type):
    options = {"prediction_type": prediction_type, "clip_sample": False}
    plain, clips = DDPMScheduler(**options), DDPMScheduler(**options | CLIPS)

    def drawn(teacher, scheduler):
        network = teacher(HSIVIScheduler.from_config(plain.config))
        return draw(solver_of(method, HSIVIScheduler.from_config(dict(scheduler.config))), network)

    assert drawn(Loud, clips).abs().max() + 0.3 < drawn(Loud, plain).abs().max()
    torch.testing.assert_close(drawn(Loud, clips), drawn(Clipped, plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [CLIPS, THRESHOLD, {}])
@pytest.mark.parametrize(("method", "kind"), [("DDPM", DDPMScheduler), ("DDIM, eta 1", DDIMScheduler)])
def test_ddpm_and_ddim_clip_as_those_of_diffusers(method, kind, settings):
    stock = kind(**{"clip_sample": False} | settings)
    network = Loud(HSIVIScheduler())
    solver = solver_of(method, HSIVIScheduler.from_config(stock.config))
    assert torch.equal(draw(solver, network), draw(stock, network))


@pytest.mark.parametrize("settings", [{"clip_sample": True}, THRESHOLD])
@pytest.mark.parametrize("method", ["DPM-Solver++", "UniPC", "DEIS"])
def test_a_solver_that_is_saved_clips_by_itself(method, settings, tmp_path):
    """A threshold of at most 1, the usual `sample_max_value`, clips to [-1, 1]."""
    network = Loud(HSIVIScheduler())
    config = DDPMScheduler(**{"clip_sample": False} | settings).config
    ours, _ = make_scheduler(method, HSIVIScheduler.from_config(config))
    ours.save_pretrained(tmp_path)
    saved = type(ours).from_pretrained(tmp_path)
    torch.testing.assert_close(draw(ours, network), draw(saved, network), rtol=0, atol=1e-5)


def test_a_scheduler_that_tells_nothing_of_clipping_does_not_clip():
    """And the default of a solver's class counts for nothing."""
    schedule = load_teacher(DDPMPipeline(make_unet(), PNDMScheduler())).schedule
    for method in SOLVERS.keys() - clock_of(schedule).unsupported:
        assert not make_scheduler(method, schedule)[0].config.get("clip_sample")
    network = Loud(HSIVIScheduler())
    solvers = [solver_of(method, schedule) for method in ("DDPM", "DDIM, eta 1")]
    assert all(draw(solver, network).abs().max() > 1.3 for solver in solvers)


@pytest.mark.parametrize("clip_sample", [None, False, True])
def test_a_pipeline_in_memory_clips_as_it_does_when_it_is_loaded(tmp_path, clip_sample):
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler(**{} if clip_sample is None else {"clip_sample": clip_sample}))
    pipeline.save_pretrained(tmp_path)
    given, loaded = (load_teacher(each).schedule.config for each in (pipeline, tmp_path))
    assert given.clip_sample == loaded.clip_sample == (clip_sample is not False)
    private = {"_use_default_values", "_diffusers_version"}
    assert {k: v for k, v in given.items() if k not in private} == {k: v for k, v in loaded.items() if k not in private}


@pytest.fixture(scope="module")
def stock():
    """A teacher, the images of whose solvers are noise without clipping."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return train_stock(10)


@pytest.mark.parametrize("clips", [True, False])
def test_pairs_are_in_range_where_the_teacher_clips_and_else_a_run_says_so(
    make_state, distil, stock, tmp_path, capsys, clips
):
    pipeline = DDPMPipeline(stock.unet, DDPMScheduler(clip_sample=clips))
    state = make_state(pipeline, num_inference_steps=1, preset="one_call", num_pairs=16)
    outside = (follow_ode(state.bridge.guided, state.pairs(0).noise).abs() > 1.05).float().mean()
    assert outside == 0 if clips else outside > 0.5
    pipeline.save_pretrained(tmp_path / "teacher")
    distil(tmp_path / "run", pretrained_teacher_model=tmp_path / "teacher", max_train_steps=1, validation_steps=1)
    assert capsys.readouterr().out.count(SAID) == (not clips)


@pytest.mark.slow
def test_from_the_training_loop_of_diffusers_to_a_report_in_the_right_order(tmp_path):
    """A reference that was not clipped is noise, and so are the images of solvers: they would be ahead."""
    train_stock(200, sample_size=16, block_out_channels=(16, 16)).save_pretrained(tmp_path / "teacher")
    run = ["--output_dir", tmp_path / "run", "--pretrained_teacher_model", tmp_path / "teacher"]
    run += ["--num_inference_steps", 4, "--max_train_steps", 300, "--train_batch_size", 32]
    cli.main(["distil", *map(str, run)])
    images = ["--num_samples", 300, "--reference_samples", 300, "--solver_steps", 4]
    images += ["--ddim_steps", 0, "--ddpm_steps", 50]
    cli.main(["evaluate", "--run_dir", *map(str, [tmp_path / "run", *images])])
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    kid = {row["method"]: row["kid"] for row in rows}
    ddpm, student = kid.pop("DDPM"), kid.pop(OURS)
    assert 10 * ddpm < student < min(kid.values())
