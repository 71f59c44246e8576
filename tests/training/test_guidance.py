"""Classifier-free guidance that a student takes in: the teacher's score, runs, the pipeline."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from hsivi_diffusers import HSIVIConfig, HSIVIPipeline, HSIVIScheduler, HSIVITrainer, TeacherBridge
from hsivi_diffusers.commands import cli, evaluate
from hsivi_diffusers.distillation.config import read_settings
from hsivi_diffusers.distillation.networks import carry_over, make_networks
from hsivi_diffusers.distillation.pairs import TeacherPairs
from hsivi_diffusers.distillation.progress import Progress
from hsivi_diffusers.runs.output import seal
from hsivi_diffusers.share.card import make_card
from hsivi_diffusers.teachers.guidance import GuidedNetwork, guided
from short_run import SETTINGS
from tiny_unet import make_unet

GRID = [440, 220, 10]
NONE = 3  # the last of four labels


@pytest.fixture
def teacher():
    return make_unet(num_class_embeds=4).eval().requires_grad_(False)


def bridge_of(teacher, scales, **options):
    return TeacherBridge(teacher, HSIVIScheduler(layer_timesteps=GRID, noise_eta=1.0, guidance_scale=scales), **options)


@pytest.mark.parametrize("scales", [3.0, [1.0, 2.0, 5.0]])
def test_a_guided_network_is_the_class_and_what_it_has_more_than_none(teacher, scales):
    listed = scales if isinstance(scales, list) else [scales]
    network, x = GuidedNetwork(teacher, listed), torch.randn(6, 1, 8, 8)
    classes, place = torch.tensor([0, 1, 2, 2, 1, 0]), torch.arange(6) % len(listed)
    time = torch.full((6,), 300)
    of_class, of_none = (teacher(x, time, class_labels=label).sample for label in (classes, torch.full((6,), NONE)))
    w = torch.tensor(listed)[place].reshape(6, 1, 1, 1)
    guided = network(x, time, class_labels=classes * len(listed) + place).sample
    torch.testing.assert_close(guided, of_none + w * (of_class - of_none))


@pytest.mark.parametrize("scales", [1.0, 3.0, [1.0, 2.0, 5.0]])
def test_the_score_of_the_bridge_is_that_of_the_guided_network(teacher, scales):
    bridge = bridge_of(teacher, scales, guidance_falls=True)
    x, level = torch.randn(6, 1, 8, 8), torch.tensor([10, 100, 300, 500, 700, 800])
    condition = torch.arange(6) % (3 * len(bridge.scales))
    told = GuidedNetwork(teacher, bridge.scales, GRID[0])(x, level, class_labels=condition).sample
    _, sigma = bridge.scheduler.alpha_sigma(level, x)
    torch.testing.assert_close(bridge.score(x, level, condition), -told / sigma, rtol=1e-3, atol=1e-4)
    assert bridge.num_classes == 3


@pytest.mark.parametrize("together", [False, True])
def test_guidance_that_falls_is_whole_at_no_noise_and_none_from_its_end_on(teacher, together):
    x, condition, scales = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), [1.0, 3.0]
    falling = GuidedNetwork(teacher, scales, end=400)
    for time, share in ((0, 1.0), (100, 0.75), (300, 0.25), (400, 0.0), (900, 0.0)):
        told = torch.tensor(time) if together else torch.full((4,), time)
        wanted = GuidedNetwork(teacher, [1 + share * (w - 1) for w in scales])(x, told, class_labels=condition).sample
        torch.testing.assert_close(falling(x, told, class_labels=condition).sample, wanted)


def test_the_guidance_of_a_bridge_ends_where_its_highest_grid_starts(teacher):
    scheduler = HSIVIScheduler(layer_timesteps=[[200, 10], [440, 220, 10]], noise_eta=1.0, guidance_scale=3.0)
    guided, constant = (TeacherBridge(teacher, scheduler, guidance_falls=falls) for falls in (True, False))
    assert (guided.guidance_end, constant.guidance_end) == (440, None)
    x, condition = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    for levels, scale in (((440, 700), 1.0), ((220, 220), 2.0), ((330, 330), 1.5)):
        level = torch.tensor(levels)
        told = GuidedNetwork(teacher, [scale])(x, level, class_labels=condition).sample
        torch.testing.assert_close(
            guided.score(x, level, condition), -told / scheduler.alpha_sigma(level, x)[1], rtol=1e-3, atol=1e-4
        )


def test_the_end_of_guidance_is_a_time_of_the_network(teacher):
    scheduler = HSIVIScheduler(
        layer_timesteps=[999, 500, 10], prediction_type="flow_prediction", shift=3.0, guidance_scale=3.0, noise_eta=1.0
    )
    bridge, x, level = (
        TeacherBridge(teacher, scheduler, guidance_falls=True),
        torch.randn(2, 1, 8, 8),
        torch.tensor([500]),
    )
    assert bridge.guidance_end == 1000
    sigma = scheduler.alpha_sigma(level, x)[1].item()
    wanted, found = GuidedNetwork(teacher, [3 - 2 * sigma]), bridge.network.unet
    told = 1000 * torch.tensor([sigma, sigma]), torch.tensor([0, 2])
    torch.testing.assert_close(found(x, *told).sample, wanted(x, *told).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_is_computed_in_single_precision(teacher, dtype):
    class Two(nn.Module):
        """1 for the class, 0 for none."""

        config = teacher.config

        def forward(self, x, time, class_labels):
            return UNet2DOutput((class_labels != NONE).to(x)[:, None, None, None].expand(x.shape))

    x = torch.zeros(1, 1, 8, 8, dtype=dtype)
    found = GuidedNetwork(Two(), [7.5], end=440)(x, torch.tensor([323]), torch.tensor([0])).sample
    assert found.dtype == dtype
    assert found[0, 0, 0, 0] == torch.tensor(1 + 6.5 * (1 - 323 / 440)).to(dtype)


@pytest.mark.parametrize("falls", [True, False])
def test_pairs_and_the_row_of_the_teacher_have_the_guidance_of_the_training(pipeline, tmp_path, falls, monkeypatch):
    ends = []
    made = TeacherPairs.__init__
    monkeypatch.setattr(
        TeacherPairs, "__init__", lambda self, unet, *a, **k: ends.append(unet.end) or made(self, unet, *a, **k)
    )
    more = {"num_pairs": 8, "pair_steps": 2, "num_inference_steps": 1, "validation_steps": 5, "guidance_falls": falls}
    trainer = train(pipeline, tmp_path / "run", guidance_scale=3.0, **more)
    (start, *_) = trainer.pipeline.scheduler.trained_grids[0]
    assert set(ends) == {start if falls else None}
    assert len(ends) == 2
    assert read_settings(tmp_path / "run" / "options.json")["guidance_falls"] == falls


def test_a_run_of_before_goes_on_with_constant_guidance(pipeline, tmp_path):
    run = tmp_path / "run"
    pipeline.save_pretrained(tmp_path / "teacher")
    options = {**SETTINGS, "guidance_scale": 3.0, "guidance_falls": False, "output_dir": str(run)}
    HSIVITrainer(str(tmp_path / "teacher"), HSIVIConfig(**options)).train()
    record, (*_, checkpoint) = run / "options.json", sorted((run / "checkpoints").iterdir())
    told = json.loads(record.read_text())
    assert told.pop("guidance_falls") is False
    record.write_text(json.dumps(told))
    assert str(checkpoint).endswith(str(SETTINGS["max_train_steps"]))
    cli.main(["distil", f"--output_dir={run}", "--resume_from_checkpoint=latest"])
    with pytest.raises(SystemExit):
        cli.main(["distil", f"--output_dir={run}", "--resume_from_checkpoint=latest", "--guidance_falls=true"])


@pytest.mark.parametrize(("scale", "falls"), [([3.0], False), (3.0, False), ([1.0], True), (1, True), (None, True)])
def test_the_guidance_of_a_run_that_does_not_tell_did_not_fall(tmp_path, scale, falls):
    (tmp_path / "options.json").write_text(json.dumps({"num_inference_steps": [2], "guidance_scale": scale}))
    assert read_settings(tmp_path / "options.json")["guidance_falls"] == falls


@pytest.mark.parametrize("scale", [None, 1.0])
def test_constant_guidance_without_guidance_is_refused(tmp_path, scale):
    config = HSIVIConfig(guidance_scale=scale, guidance_falls=False, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="guidance_falls=False has no effect without a guidance_scale other than 1"):
        config.check()


@pytest.mark.parametrize(("scales", "calls"), [(None, 1), (1.0, 1), (3.0, 2), ([1.0, 3.0], 2)])
def test_a_guided_score_is_two_calls_of_the_teacher(teacher, scales, calls):
    seen = []
    teacher.register_forward_hook(lambda *_: seen.append(1))
    bridge_of(teacher, scales).score(torch.randn(2, 1, 8, 8), torch.tensor([10, 100]), torch.tensor([0, 1]))
    assert len(seen) == calls


def test_a_student_of_several_scales_starts_as_the_teacher_farther_from_no_class_the_larger_the_scale(teacher):
    config = HSIVIConfig(num_inference_steps=2, guidance_scale=[5.0, 1.0])
    networks = make_networks((teacher, teacher, teacher), HSIVIScheduler(), config)
    assert networks.scheduler.config.guidance_scale == [1.0, 5.0]
    x, classes = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, NONE])
    farther, old = copy.deepcopy(teacher), teacher.class_embedding.weight
    farther.class_embedding.weight = nn.Parameter(old[NONE] + 2 * (old - old[NONE]))
    for network in (networks.student, networks.critic):
        for place, same in enumerate((teacher, farther)):
            wanted = same(x, 100, class_labels=classes).sample
            torch.testing.assert_close(network(x, 100, class_labels=2 * classes + place).sample, wanted)


# ----- a run -----


@pytest.fixture
def pipeline():
    return DDPMPipeline(unet=make_unet(num_class_embeds=4), scheduler=DDPMScheduler())


def train(pipeline, folder, **options):
    trainer = HSIVITrainer(pipeline, HSIVIConfig(**{**SETTINGS, **options}, output_dir=str(folder)))
    trainer.train()
    return trainer


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("scales", [3.0, [1.0, 3.0]])
def test_a_guided_student_is_trained_saved_and_told_its_scale(pipeline, tmp_path, steps, scales):
    pairs = {"num_pairs": 8, "pair_steps": 2} if steps == 1 else {}
    train(pipeline, tmp_path / "run", num_inference_steps=steps, guidance_scale=scales, validation_steps=2, **pairs)
    student = HSIVIPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert (student.num_classes, student.scheduler.config.guidance_scale) == (3, scales)

    def draw(**given):
        generator = torch.Generator().manual_seed(0)
        return student(3, generator, class_labels=[0, 1, 2], output_type="np", **given).images

    assert draw(guidance_scale=3).shape == (3, 8, 8, 1)
    several = isinstance(scales, list)
    assert (draw() == draw(guidance_scale=3)).all() != several
    with pytest.raises(
        ValueError, match=r"guidance_scale=2: this sampler was trained with guidance of scale (1.0 or )?3"
    ):
        draw(guidance_scale=2)
    with pytest.raises(ValueError, match="the classes of this unet are 0 to 2"):
        student(1, class_labels=[3])


def test_classes_are_trained_by_their_shares(pipeline, tmp_path):
    config = HSIVIConfig(
        **SETTINGS, guidance_scale=[1.0, 3.0], class_shares=[2, 0, 1], output_dir=str(tmp_path / "run")
    )
    state = HSIVITrainer(pipeline, config).state
    drawn = state.sample_condition(6000, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=6) / len(drawn)  # of class * 2 + scale
    assert counts.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 6, 1 / 6], abs=0.02)
    assert Progress(state)._conditions.tolist() == [0, 4] * 4


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([1.0, 1.0], "class_shares has 2 numbers, and the teacher 3 classes: give as many"),
        ([0.0, 0.0, 0.0], "class_shares=.* give a number from 0 on for each class, not all 0"),
        ([1.0, -1.0, 1.0], "class_shares=.* give a number from 0 on for each class"),
    ],
)
def test_shares_that_are_not_those_of_the_classes_are_refused(pipeline, tmp_path, shares, message):
    with pytest.raises(ValueError, match=message):
        train(pipeline, tmp_path / "run", guidance_scale=2.0, class_shares=shares)


def test_a_guided_run_resumes_to_the_same_bits(pipeline, tmp_path, same_tensors):
    whole = train(pipeline, tmp_path / "whole", guidance_scale=[1.0, 3.0])
    config = HSIVIConfig(**SETTINGS, guidance_scale=[1.0, 3.0], output_dir=str(tmp_path / "stopped"))

    def stop(trainer, step):
        if step.step == 2:
            raise RuntimeError("stop")

    stopped = HSIVITrainer(pipeline, config, callbacks=[stop])
    with pytest.raises(RuntimeError, match="stop"):
        stopped.train()
    trainer = HSIVITrainer(pipeline, config)
    trainer.train(resume_from_checkpoint="latest")
    assert same_tensors(trainer.pipeline.unet.state_dict(), whole.pipeline.unet.state_dict())


@pytest.mark.parametrize(("recorded", "given"), [([2.0], 2.0), ([3.0, 1.0], [1.0, 3.0])])
def test_a_run_that_recorded_its_scales_in_another_form_resumes(pipeline, tmp_path, recorded, given):
    run = tmp_path / "run"
    config = HSIVIConfig(**SETTINGS, guidance_scale=given, output_dir=str(run))
    HSIVITrainer(pipeline, config).train()
    shutil.rmtree(run / "checkpoints" / "checkpoint-5")
    progress = run / "checkpoints" / "checkpoint-4" / "progress.json"
    told = json.loads(progress.read_text())
    told["identity"]["guidance_scale"] = recorded
    for name in ("sha256", "files"):
        del told[name]
    progress.write_text(json.dumps(seal(progress.parent, told)))
    record = run / "options.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "guidance_scale": recorded}))
    HSIVITrainer(pipeline, config).train("latest")
    assert json.loads(record.read_text())["guidance_scale"] == given


@pytest.mark.parametrize("pair_weight", [0.0, 0.005])
def test_the_calls_of_a_resumed_guided_run_with_pairs_are_those_of_a_whole_one(pipeline, tmp_path, pair_weight):
    options = {**SETTINGS, "guidance_scale": 3.0, "num_pairs": 8, "pair_steps": 2, "pair_weight": pair_weight}
    config = HSIVIConfig(**options, output_dir=str(tmp_path / "run"))
    whole = HSIVITrainer(pipeline, config).train()["network_calls"]
    (tmp_path / "run" / "training.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-5")
    assert HSIVITrainer(pipeline, config).train("latest")["network_calls"] == pytest.approx(whole, abs=4)


def test_guidance_needs_a_label_for_no_class(tmp_path):
    pipeline = DDPMPipeline(unet=make_unet(), scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match="guidance_scale was given, and the teacher has no class labels"):
        train(pipeline, tmp_path / "run", guidance_scale=2.0)


@pytest.mark.parametrize("scales", [-1.0, [], [2.0, 2.0], "three", float("inf")])
def test_bad_scales_are_refused(scales):
    with pytest.raises(ValueError, match="guidance_scale=.*: give a number of at least 0, 1 for none"):
        HSIVIScheduler(guidance_scale=scales)


def test_a_sampler_without_guidance_takes_no_scale(unet):
    student = HSIVIPipeline(unet=unet, scheduler=HSIVIScheduler(layer_timesteps=GRID))
    with pytest.raises(ValueError, match="guidance_scale=3.0: this sampler was trained with no guidance: leave"):
        student(guidance_scale=3.0)


def test_what_several_scales_were_told_is_not_taken_for_others(pipeline, tmp_path):
    train(pipeline, tmp_path / "first", guidance_scale=[1.0, 3.0])
    for other in ([1.0, 7.0], 3.0, None):
        with pytest.raises(ValueError, match=r"was trained with guidance_scale=\[1.0, 3.0\], and the new run has"):
            train(pipeline, tmp_path / "other", guidance_scale=other, init_from=str(tmp_path / "first"))
    networks = make_networks(
        (pipeline.unet, pipeline.unet, pipeline.unet),
        HSIVIScheduler(),
        HSIVIConfig(num_inference_steps=1, guidance_scale=[1.0, 3.0]),
    )
    carry_over(networks, tmp_path / "first")
    saved = UNet2DModel.from_pretrained(tmp_path / "first" / "critic")
    assert torch.equal(networks.critic.class_embedding.weight, saved.class_embedding.weight)


def test_the_card_tells_the_scales(pipeline, tmp_path):
    student = train(pipeline, tmp_path / "run", guidance_scale=[1.0, 3.0])
    run = {"options": {"guidance_falls": True}, "training": {}, "report": {}}
    text = make_card(student.pipeline, "user/name", run).text
    assert "guidance of scale 1.0 or 3.0, decreased with noise during training, is distilled" in text
    text = make_card(student.pipeline, "user/name", {**run, "options": {}}).text
    assert "Classifier-free guidance of scale 1.0 or 3.0 is distilled into the weights." in text
    assert "guidance_scale=3.0" in text


def test_a_guided_student_is_measured_against_guided_solvers_of_two_calls_a_step(pipeline, tmp_path, extractor):
    pipeline.save_pretrained(tmp_path / "teacher")
    options = {**SETTINGS, "guidance_scale": 3.0, "output_dir": str(tmp_path / "run")}
    HSIVITrainer(str(tmp_path / "teacher"), HSIVIConfig(**options)).train()
    sizes = ["--num_samples=20", "--reference_samples=20", "--reference_steps=2", "--ddpm_steps=3", "--ddim_steps=0"]
    evaluate.main([f"--run_dir={tmp_path / 'run'}", f"--feature_extractor={extractor}", *sizes, "--solver_steps=2"])
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert {(row["method"], row["nfe"]) for row in rows} >= {("HSIVI", 2), ("DDIM", 4), ("UniPC", 4), ("DDPM", 6)}
    assert next(row["grid"] for row in rows if row["method"] == "HSIVI").endswith("; guidance 3.0")
    assert {row["nfe"] for row in rows if row["method"] == "DDIM"} == {4}


def test_solvers_are_compared_at_the_calls_of_the_student(teacher):
    student = HSIVIPipeline(teacher, HSIVIScheduler(layer_timesteps=[600, 400, 200, 100, 0], guidance_scale=[1.0, 3.0]))
    for scale, calls in ((3.0, 2), (None, 1)):
        options = evaluate.Evaluation(guidance_scale=scale, ddpm_steps=0, ddim_steps=0)
        network = guided(teacher, [evaluate.scale_of(options, student)])
        rows = list(evaluate.make_samplers(options, student, network, DDPMScheduler().config))
        assert {nfe for method, nfe, *_ in rows if method == "DDIM"} == {4, 8}
        assert {solver.num_steps * calls for _, _, solver, _ in rows[1:]} == {4, 8}


def test_the_command_samples_with_the_scale_asked_for(pipeline, tmp_path, capsys):
    student = train(pipeline, tmp_path / "run", guidance_scale=[1.0, 3.0]).pipeline
    nn.init.normal_(student.unet.class_embedding.weight, std=5.0)  # so that what it is told shows
    student.save_pretrained(tmp_path / "student")
    common = ["sample", f"--pipeline={tmp_path / 'student'}", "--num_samples=3"]
    cli.main([*common, f"--output_dir={tmp_path / 'low'}"])
    cli.main([*common, f"--output_dir={tmp_path / 'high'}", "--guidance_scale=3"])
    low, high = ((tmp_path / name / "00000.png").read_bytes() for name in ("low", "high"))
    assert low != high
    with pytest.raises(SystemExit):
        cli.main([*common, f"--output_dir={tmp_path / 'none'}", "--guidance_scale=2"])
    assert "guidance_scale=2.0: this sampler was trained with guidance of scale 1.0 or 3.0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
