"""`training/benchmarks/images/train_baseline.py`: the runs of all methods."""

import itertools
import json
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, LCMScheduler
from PIL import Image
from safetensors.torch import load_file

from gaussian_teacher import as_teacher
from hsivi_diffusers import HSIVIScheduler, load_teacher
from hsivi_diffusers.runs.checkpoints import Checkpoints
from hsivi_diffusers.runs.output import Output
from hsivi_diffusers.teachers.solvers import Solver
from slow import others_slow
from tiny_unet import make_unet
from training.benchmarks.images import consistency, regression, train_baseline, training_loop
from training.benchmarks.images.consistency import ConsistencyDistillation
from training.benchmarks.images.progressive import ProgressiveDistillation
from training.benchmarks.images.regression import PairRegression
from training.benchmarks.images.train_baseline import Training, learning_rate
from training.benchmarks.images.training_loop import TrainingLoop

ODD = {"learned": {"out_channels": 2}, "two": {"in_channels": 2, "out_channels": 2}, "wide": {"sample_size": (8, 16)}}


@pytest.fixture(scope="module")
def train(train_baseline):
    """Trains for 4 updates of 4 rows and keeps a checkpoint of each; a progressive distillation has two stages."""

    def run(*arguments):
        few = ["--num_inference_steps=2", "--num_stages=2"] if "--method=progressive" in arguments else []
        kept = ["--checkpointing_steps=1", "--checkpoints_total_limit=9"]
        return train_baseline(*few, "--max_train_steps=4", *kept, *arguments)

    return run


@pytest.fixture(scope="module")
def finish(train):
    """The folder of a run of a method, to be read."""
    return cache(lambda method: train(f"--method={method}"))


@pytest.fixture(scope="module")
def trained(finish):
    """A consistency model."""
    return finish("consistency")


every_method = pytest.mark.parametrize("method", ["consistency", "progressive", "regression"])


def weights(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def make_method(method, unet):
    teacher = as_teacher(unet, HSIVIScheduler())
    if method == "consistency":
        return ConsistencyDistillation(teacher)
    return ProgressiveDistillation(teacher, 2) if method == "progressive" else PairRegression(teacher, 9)


def run_for(distillation, training, folder):
    """Trains on ten images of noise."""
    images, output = torch.randn(10, 1, 8, 8), Output(str(folder))
    return train_baseline.train(distillation, images, None, training, output, Accelerator(), {})


@pytest.fixture
def clock(monkeypatch):
    """The clock here moves one second each time it is read: once at the start, once for each update."""
    ticks = itertools.count(100.0)
    monkeypatch.setattr(training_loop, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


# ----- what is saved -----


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_consistency_model_samples_in_diffusers_as_the_sampler_of_the_benchmark(trained, teacher, num_steps):
    pipeline = DiffusionPipeline.from_pretrained(trained / "pipeline")
    assert type(pipeline) is DDPMPipeline
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(3, torch.Generator().manual_seed(5), num_inference_steps=num_steps, output_type="np").images
    teacher = load_teacher(teacher)
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    sampler = Solver(scheduler, num_steps, teacher, partial(teacher.call, pipeline.unet))
    wanted = sampler(3, torch.Generator().manual_seed(5)).permute(0, 2, 3, 1)
    assert torch.equal(torch.from_numpy(images), wanted)
    assert images.std() > 0.05


def test_a_pipeline_is_there_whole_or_not_at_all(unet, tmp_path, monkeypatch):
    def write_half(pipeline, folder):
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        raise OSError("no space left")

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", write_half)
    with pytest.raises(OSError, match="no space left"):
        train_baseline.save(make_method("consistency", unet), tmp_path)
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("method", others_slow(["consistency", "progressive", "regression"], "regression"))
def test_a_run_in_half_precision_is_nearly_the_same_and_training_json_tells_it(
    train, finish, method, teacher, monkeypatch
):
    rows, make = [], train_baseline.make_distillation

    def counted(*given):
        made = make(*given)
        for network in {made.teacher.network, made.student, *made.parts.values()}:
            network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
        return made

    full = weights(finish(method))
    monkeypatch.setattr(train_baseline, "make_distillation", counted)
    folder = train(f"--method={method}", "--mixed_precision=bf16")
    half = weights(folder)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert 0 < max(float((half[name] - full[name]).abs().max()) for name in full) < 0.02
    record = json.loads((folder / "training.json").read_text())
    wanted = {"pretrained_teacher_model": str(teacher), "method": method, "seed": 0, "max_train_steps": 4}
    assert record.items() >= {**wanted, "train_batch_size": 4, "mixed_precision": "bf16"}.items()
    assert record["seconds"] > 0
    assert record["network_calls"] == sum(rows)


@every_method
def test_only_the_student_is_trained(unet, method):
    made = make_method(method, unet)
    made.loss(torch.randn(4, 1, 8, 8)).backward()
    assert all(parameter.grad is not None for parameter in made.student.parameters())
    others = [made.teacher.network, *(part for name, part in made.parts.items() if name == "target")]
    assert all(parameter.grad is None for other in others for parameter in other.parameters())


# ----- classes -----


@every_method
def test_the_loss_of_a_class_is_that_of_a_network_which_has_its_embedding_as_a_bias(method):
    classes = 1 if method == "regression" else 3  # its pairs take the classes in turn
    labelled = make_unet(num_class_embeds=classes)
    plain = make_unet()
    weights = labelled.state_dict()
    embedding = weights.pop("class_embedding.weight")[-1]
    plain.load_state_dict(weights)
    plain.time_embedding.linear_2.bias.data += embedding
    clean, losses = torch.rand(6, 1, 8, 8), []
    for unet, condition in [(labelled, torch.full((6,), classes - 1)), (plain, None)]:
        torch.manual_seed(4)
        losses.append(make_method(method, unet).loss(clean, condition))
    assert torch.isclose(*losses, rtol=1e-4)


def test_images_are_drawn_with_their_classes(unet, tmp_path, monkeypatch):
    distillation, seen = make_method("consistency", unet), []

    def loss(clean, condition):
        seen.append((clean[:, 0, 0, 0], condition))
        return distillation.student.conv_in.weight.sum()

    monkeypatch.setattr(distillation, "loss", loss)
    classes = torch.arange(10)
    images, training = classes[:, None, None, None] * torch.ones(10, 1, 8, 8), Training(max_train_steps=2)
    train_baseline.train(distillation, images, classes, training, Output(tmp_path), Accelerator(), {})
    assert len(seen) == 2
    assert all(torch.equal(values.long(), condition) and len(values.unique()) > 3 for values, condition in seen)


def test_a_teacher_with_classes_is_trained_from_images_of_these_classes(train, class_teacher, tmp_path):
    teacher = f"--pretrained_teacher_model={class_teacher}"
    with pytest.raises(ValueError, match="--train_data digits has 10 classes, and the teacher 3: give images of"):
        train(teacher)
    for name in range(3):
        (tmp_path / f"images/{name}").mkdir(parents=True)
        Image.new("L", (8, 8), 80 * name).save(tmp_path / f"images/{name}/0.png")
    folder = train(teacher, f"--train_data={tmp_path / 'images'}")
    assert DiffusionPipeline.from_pretrained(folder / "pipeline").unet.config.num_class_embeds == 3
    Image.new("L", (8, 8)).save(tmp_path / "images/0.png")  # not in a folder of a class
    with pytest.raises(ValueError, match="has no classes, and the teacher 3"):
        train(teacher, f"--train_data={tmp_path / 'images'}")


# ----- runs -----


def test_another_seed_is_another_run(train, trained, same_tensors):
    assert not same_tensors(weights(train("--seed=1")), weights(trained))


@pytest.mark.parametrize(
    ("method", "step"),
    others_slow(
        [("consistency", 2), ("regression", 2), *[("progressive", i) for i in (1, 2, 3)]],
        *(("regression", 2), ("progressive", 2)),
    ),
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    train, finish, tmp_path, monkeypatch, method, step, same_tensors
):
    """The second stage of a progressive distillation begins after 2 of 4 updates."""
    save = Checkpoints.save

    def interrupted(self, done, seconds):
        save(self, done, seconds)
        if done == step:
            raise KeyboardInterrupt

    arguments = [f"--method={method}", f"--output_dir={tmp_path}"]
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments)
    train(*arguments, "--resume_from_checkpoint=latest")
    assert same_tensors(weights(tmp_path), weights(finish(method)))


def test_pairs_that_a_run_makes_again_are_the_same_and_take_none_of_its_time(unet, tmp_path, monkeypatch):
    """Here pairs take 100 seconds, and an update one; in half precision."""
    made, now, make_pairs, descend, save = [], [0.0], regression.follow_ode, TrainingLoop.descend, Checkpoints.save

    def slow(seconds, function):
        def call(*given, **named):
            now[0] += seconds
            made.append(function(*given, **named))
            return made[-1]

        return call

    def interrupted(self, done, seconds):
        save(self, done, seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(training_loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(regression, "follow_ode", slow(100, make_pairs))
    monkeypatch.setattr(TrainingLoop, "descend", slow(1, descend))
    output = Output(str(tmp_path), checkpointing_steps=2)
    training = Training(method="regression", max_train_seconds=105.0, train_batch_size=2)
    training.mixed_precision = "bf16"

    def run():
        distillation = make_method("regression", unet)
        images = torch.zeros(10, 1, 8, 8)
        return train_baseline.train(distillation, images, None, training, output, Accelerator(), {})

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    output.resume_from_checkpoint = "latest"
    assert run() == (5, 105.0)
    assert now == [205.0]
    first, again = (each for each in made if each is not None)
    assert torch.equal(first, again)
    assert run() == (5, 105.0)  # it has ended, and needs no pairs
    assert now == [205.0]


def test_the_teacher_of_the_last_stage_is_the_student_of_the_one_before(finish, same_tensors):
    folders = [finish("progressive") / f"checkpoints/checkpoint-{step}" for step in (1, 2, 3, 4)]
    teachers = [load_file(folder / "teacher.safetensors") for folder in folders]
    student = load_file(folders[1] / "student.safetensors")
    assert [same_tensors(each, teachers[0]) for each in teachers] == [True, True, False, False]
    assert [same_tensors(each, student) for each in teachers] == [False, False, True, True]


def test_the_averaged_weights_are_saved(unet, tmp_path, monkeypatch):
    """The first update sets the average, the others enter it with 1 - decay."""
    visited = []

    class Recorded(training_loop.EMAModel):
        def step(self, parameters):
            visited.append(parameters[0].detach().clone())
            super().step(parameters)

    monkeypatch.setattr(training_loop, "EMAModel", Recorded)
    monkeypatch.setattr(train_baseline, "EMA_DECAY", 0.15)
    distillation = make_method("consistency", unet)
    run_for(distillation, Training(max_train_steps=3, train_batch_size=4, lr_warmup_steps=1), tmp_path)
    first, second, third = visited
    assert not torch.equal(first, second)
    saved = next(distillation.student.parameters())
    torch.testing.assert_close(saved, first.lerp(second, 0.85).lerp(third, 0.85), rtol=0, atol=1e-6)


# ----- the rate, and the end of a run -----


def test_the_learning_rate_warms_up_by_updates_and_falls_by_the_share_of_the_run_or_of_a_stage():
    training = Training(learning_rate=2.0, lr_warmup_steps=4)
    assert [learning_rate(step, 0.0, training) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert [round(learning_rate(9, share, training), 4) for share in (0.5, 0.75, 0.9999)] == [1.0, 0.2929, 0.0]
    staged = Training(method="progressive", num_stages=2, learning_rate=2.0, lr_warmup_steps=1)
    shares = (0.0, 0.25, 0.4999, 0.5, 0.75, 0.9999)
    assert [round(learning_rate(9, share, staged), 4) for share in shares] == 2 * [2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("method", "calls", "limit", "steps"),
    [
        *[("consistency", calls, 2.0, steps) for calls, steps in ((0, 2), (40, 5), (41, 6))],
        ("regression", 6, 1.0, 3),  # its pairs do not count, or the student would not learn
        ("consistency", 1_000_000, None, 4),  # whose updates are counted
    ],
)
def test_network_calls_of_updates_keep_a_run_going_when_its_time_is_over(
    unet, tmp_path, clock, method, calls, limit, steps
):
    """An update of 2 images has 8 calls; what is done is the share of time or of calls, whichever is less."""
    training = Training(method=method, max_train_steps=4, max_train_seconds=limit, min_network_calls=calls)
    training.train_batch_size = 2
    distillation, shares = make_method(method, unet), []
    distillation.begin_update = shares.append
    assert run_for(distillation, training, tmp_path) == (steps, float(steps))
    if limit and method == "consistency":
        assert shares == pytest.approx([min(done / 2, 8 * done / calls if calls else 1) for done in range(steps)])


def test_the_clock_ends_a_run_and_lets_the_learning_rate_fall(unet, tmp_path, monkeypatch, clock):
    rates = []
    monkeypatch.setattr(
        train_baseline, "learning_rate", lambda *given: rates.append(learning_rate(*given)) or rates[-1]
    )
    training = Training(max_train_steps=1, max_train_seconds=4.0, train_batch_size=2, learning_rate=1.0)
    training.lr_warmup_steps = 0
    assert run_for(make_method("consistency", unet), training, tmp_path) == (4, 4.0)
    assert rates == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


def test_a_loss_that_is_not_finite_stops_the_run(train, monkeypatch):
    monkeypatch.setattr(consistency, "distance", lambda *given: given[0].sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0: lower --learning_rate"):
        train()


# ----- refusals -----


ODD_SHAPE = "has a learned variance, or images of another shape"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pretrained_teacher_model=", "--pretrained_teacher_model is missing: give a folder or repo id"),
        ("--pretrained_teacher_model=./nowhere", "'./nowhere' is no folder here"),
        ("--pretrained_teacher_model=learned", ODD_SHAPE),
        ("--pretrained_teacher_model=two", ODD_SHAPE),
        ("--pretrained_teacher_model=wide", ODD_SHAPE),
        ("--num_stages=0", "--num_stages 0 has no effect with --method consistency: it belongs to progressive"),
        ("--num_pairs=7", "--num_pairs 7 has no effect with --method consistency: it belongs to regression"),
        ("--lora_rank=2", "--lora_rank 2 has no effect with --method consistency"),
        ("--method=progressive --num_inference_steps=0", "--num_inference_steps 0: give a number of at least 1"),
        ("--method=progressive --num_stages=0", "--num_stages 0: give a number of at least 1"),
        ("--method=regression --num_pairs=0", "--num_pairs 0: give a number of at least 1"),
    ],
)
def test_what_cannot_run_is_refused(train, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if message == ODD_SHAPE:
        name = arguments.split("=")[1]
        DDPMPipeline(unet=make_unet(**ODD[name]), scheduler=DDPMScheduler()).save_pretrained(name)
    with pytest.raises(ValueError, match=message):
        train(*arguments.split())


def test_a_filled_output_folder_is_refused_before_work_unless_overwritten(trained, train, overwrite):
    folder = overwrite(train, train_baseline, "load_teacher")
    assert weights(folder).keys() == weights(trained).keys()
