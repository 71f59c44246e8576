import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from hsivi_diffusers.distillation import plan
from hsivi_diffusers.distillation.config import parse_recipe
from hsivi_diffusers.distillation.trainer import Players, load_networks
from tiny_unet import make_unet
from training.benchmarks.images import make_teacher

ROOT = Path(__file__).parents[2]
PEAK = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from hsivi_diffusers.distillation import run as train_hsivi
train_hsivi.main(sys.argv[1:])
# Not getrusage, which counts the memory of the process that started this one.
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", 1024 * int(peak))
"""


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="session")
def options(arguments):
    """The options of a run that is only planned."""

    def make(**settings):
        return parse_recipe("", arguments("nowhere", **settings))

    return make


@pytest.fixture(scope="session")
def measured(options):
    return plan.measure(options(preset="fast", critic_updates=1))


def weights_of(teacher):
    unet = UNet2DModel.from_pretrained(teacher, subfolder="unet")
    return sum(parameter.numel() for parameter in unet.parameters())


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_a_plan_is_of_the_levels_of_the_run(options, tmp_path, monkeypatch, beta_schedule):
    """They follow from the numbers of the schedule, which a fake tensor has not."""
    DDPMPipeline(make_unet(), DDPMScheduler(beta_schedule=beta_schedule)).save_pretrained(tmp_path)
    planned = []
    monkeypatch.setattr(plan, "Players", lambda *given: planned.append(Players(*given)) or planned[0])
    asked = options(preset="fast", pretrained_teacher_model=tmp_path)
    plan.measure(asked)
    run = Players(load_networks(asked, Accelerator(cpu=True)), asked, Accelerator(cpu=True))
    assert planned[0].bridge.level_range == run.bridge.level_range
    assert planned[0].bridge.scheduler.config.layer_timesteps == run.bridge.scheduler.config.layer_timesteps


# ----- memory -----


def test_a_sampler_of_one_call_has_its_moments_and_its_pairs(options, measured):
    settings = {"num_layers": 1, "ode_pairs": 100, "critic_first": 2}
    one = plan.measure(options(preset="fast", **settings)).memory
    assert one["Adam's moments"] == measured.memory["Adam's moments"]
    assert one["pairs"] == 100 * 2 * 64 * 4  # noise and end, of 8x8 floats
    assert "pairs" not in measured.memory


def test_what_stays_is_counted_exactly(measured, teacher):
    """float32: 4 bytes for a weight of each network and of the average, 8 for Adam's moments of both players."""
    weights = weights_of(teacher)
    for name in ("teacher", "student", "critic", "average of the student"):
        assert measured.memory[name] == 4 * weights
    tensors = sum(1 for _ in UNet2DModel.from_pretrained(teacher, subfolder="unet").parameters())
    assert measured.memory["Adam's moments"] == 2 * (8 * weights + 4 * tensors)  # and a step count for each tensor
    assert measured.memory["chains"] == 2 * 4 * (64 * 4 + 8)  # T B states of 8x8 floats and an index
    assert measured.parameters == {"each network": weights, "student, with its noise scale": weights}


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(options, measured):
    def activations(**settings):
        return plan.measure(options(preset="fast", critic_updates=1, **settings)).memory["activations and gradients"]

    few, many = measured.memory["activations and gradients"], activations(train_batch_size=64)
    assert many > 8 * few
    assert activations(train_batch_size=64, gradient_checkpointing=True) < 0.9 * many


@pytest.mark.slow
def test_accumulation_takes_the_memory_of_one_batch(options):
    one, four = (
        plan.measure(options(objective="SM", train_batch_size=32, gradient_accumulation_steps=steps))
        for steps in (1, 4)
    )
    assert four.memory["activations and gradients"] < 1.1 * one.memory["activations and gradients"]
    assert four.calls == one.calls
    assert four.flops == pytest.approx(4 * one.flops, rel=0.01)


def test_half_precision_halves_the_teacher_alone(options, measured):
    half = plan.measure(options(preset="fast", critic_updates=1, mixed_precision="bf16"))
    assert half.memory["teacher"] == measured.memory["teacher"] / 2
    assert half.memory["student"] == measured.memory["student"]
    assert half.memory["activations and gradients"] < measured.memory["activations and gradients"]


def peak_of_a_run(*arguments):
    """Bytes that a process which trains had at its peak."""
    command = [sys.executable, "-c", PEAK, str(ROOT), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.split()[-1])


def planned_peak(*arguments):
    """What --plan prints, in bytes."""
    command = [sys.executable, str(ROOT / "training" / "train_hsivi.py"), "--plan=true", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    (line,) = [line for line in done.stdout.splitlines() if "at the peak" in line]
    return float(line.split()[-1].replace(",", "")) * plan.MIB


@pytest.mark.parametrize("preset", ["fast", pytest.param("paper", marks=pytest.mark.slow)])
def test_the_peak_of_the_digits_run_is_known_within_20_percent(tmp_path, preset):
    """Most of it are the libraries, of which a run touches more than a plan does, and more on some machines."""
    arguments = ["--config=training/configs/digits_t5.yaml", f"--preset={preset}", f"--output_dir={tmp_path / 'run'}"]
    real = peak_of_a_run(*arguments, "--max_train_steps=2")
    assert planned_peak(*arguments[:2]) == pytest.approx(real, rel=0.2)


@pytest.mark.slow
def test_the_peak_of_a_32x32_unet_is_known_within_15_percent(tmp_path):
    teacher = tmp_path / "teacher"
    make_teacher.main([f"--teacher={ROOT / 'training' / 'teachers' / 'cifar10_32'}", f"--output_dir={teacher}"])
    arguments = [
        "--config=training/configs/cifar10_t5_fast.yaml",
        f"--pretrained_teacher_model={teacher}",
        "--train_batch_size=4",
        "--mixed_precision=no",
    ]
    real = peak_of_a_run(*arguments, "--max_train_steps=2", f"--output_dir={tmp_path / 'run'}")
    assert planned_peak(*arguments) == pytest.approx(real, rel=0.15)


# ----- calls, time, what is written -----


def test_calls_are_those_of_the_loop(measured, options):
    assert measured.calls == {"student": 1, "critic": 1, "teacher": 1}
    paper = plan.measure(options(preset="paper", num_layers=1, critic_updates=20))
    assert paper.calls == {"student": 21 - 1, "critic": 21, "teacher": 1}  # the first critic update shares a batch


@pytest.mark.slow
def test_further_critic_updates_are_counted_without_being_run(options):
    settings = {"preset": "paper", "num_layers": 1}
    one, two, five = (plan.measure(options(**settings, critic_updates=updates)) for updates in (1, 2, 5))
    assert five.flops == pytest.approx(one.flops + 4 * (two.flops - one.flops))


def test_what_is_written_is_as_large_as_said(fast_run, options):
    cost = plan.measure(options(preset="fast"))

    def size(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".pkl"))

    for folder, part in (("pipeline", "pipeline"), ("critic", "critic"), ("checkpoints", "2 checkpoints")):
        said = cost.written[part]
        assert said < size(fast_run / folder) < 1.6 * said  # the network is so small that the headers of files count


def test_the_speed_is_taken_from_a_real_network(options):
    speed, device = plan.seconds_per_flop(options())
    assert 1e-13 < speed < 1e-6
    assert device == "cpu, 1 thread(s)"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")]
)
def test_durations(seconds, text):
    assert plan._duration(seconds) == text


# ----- the option -----


@pytest.mark.parametrize("flat", [False, True])
def test_a_plan_needs_no_weights_and_writes_nothing(distil, teacher, tmp_path, capsys, flat):
    """From configs alone; the repos google/ddpm-* have them all in one folder."""
    names = {"unet/config.json": "config.json", "scheduler/scheduler_config.json": "scheduler_config.json"}
    for name, flat_name in names.items():
        copy = tmp_path / "teacher" / (flat_name if flat else name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((teacher / name).read_bytes())
    distil(tmp_path / "run", "--plan=true", pretrained_teacher_model=tmp_path / "teacher", preset="fast")
    text = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "T = 2, preset fast: 5 updates of 4 rows in 1 process(es)" in text
    assert "student 2.0, critic 2.0, teacher 1.0" in text  # two critic updates, the first on the answer for the layers
    for part in ("parameters", "Adam's moments", "in all, at the peak", "GFLOP", "in all on cpu", "2 checkpoints"):
        assert part in text


@pytest.mark.parametrize("settings", [{"noise_scale_type": "scalar"}, {"noise_scale_type": "per_layer"}, {}])
def test_every_noise_scale_and_class_conditional_teachers_can_be_planned(options, class_teacher, settings):
    cost = plan.measure(options(pretrained_teacher_model=class_teacher, **settings))
    numbers = {"scalar": 1, "per_layer": 2}.get(settings.get("noise_scale_type"), 0)
    assert cost.parameters["student, with its noise scale"] - cost.parameters["each network"] == numbers
    assert math.isfinite(cost.flops)


def test_a_student_of_several_counts_is_planned_with_all_its_chains(distil, options, tmp_path, capsys):
    cost = plan.measure(options(preset="fast", critic_updates=1, num_layers=(1, 2, 4)))
    assert cost.memory["chains"] == 4 * 4 * (64 * 4 + 8)  # max(T) B states of 8x8 floats and an index
    assert cost.calls == {"student": 1, "critic": 1, "teacher": 1}
    distil(tmp_path / "run", "--plan=true", num_layers=(4, 2, 1))
    assert "T = 1, 2, 4, preset fast: 5 updates" in capsys.readouterr().out


def test_of_several_processes_the_first_plans(distil, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    distil(tmp_path / "run", "--plan=true")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    distil(tmp_path / "run", "--plan=true")
    text = capsys.readouterr().out
    assert "5 updates of 8 rows in 2 process(es)" in text
    assert "gradient buckets of data parallelism" in text


def test_a_teacher_without_configs_is_refused(distil, tmp_path):
    with pytest.raises(ValueError, match="has no config of a unet.*give a folder or repo id"):
        distil(tmp_path / "run", "--plan=true", pretrained_teacher_model=tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    with pytest.raises(ValueError, match="has a unet of type UNet2DConditionModel"):
        distil(tmp_path / "run", "--plan=true", pretrained_teacher_model=tmp_path)


def test_the_meter_forgets_what_is_gone():
    meter = plan.Meter()
    with plan.FakeTensorMode(allow_non_fake_inputs=True), meter:
        one = torch.empty(100, 100)
        two = one + 1
        view = two[:10]
        assert meter.now == 2 * 40_000
        del two
        assert meter.now == 2 * 40_000
        del view, one
        assert (meter.now, meter.peak) == (0, 2 * 40_000)
        assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]


def test_the_precision_is_that_of_the_launcher_unless_the_options_say_one(options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert plan.precision_of(options()) == "bf16"
    assert plan.precision_of(options(mixed_precision="no")) == "no"
