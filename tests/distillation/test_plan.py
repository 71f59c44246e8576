import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation import plan, updates
from hsivi_diffusers.distillation.cards import CARDS
from hsivi_diffusers.distillation.config import HSIVIConfig
from tiny_flows import make_flux
from tiny_unet import make_unet, save_teacher
from training.benchmarks.images import make_teacher

ROOT = Path(__file__).parents[2]
# Plans a run, which is told first what the libraries need, and does it: in a process of its own.
PEAK = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from hsivi_diffusers.commands import cli
cli.plan(sys.argv[1:])
cli.distil([*sys.argv[1:], "--max_train_steps=2"])
# Not getrusage, which counts the memory of the process that started this one.
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", 1024 * int(peak))
"""

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def measure(teacher):
    """Measures a run with 2 layers and 4 rows, of two critic updates; settings by keyword."""

    def call(name=teacher, **settings):
        return plan.measure(str(name), None, make_config(**settings))

    return call


def make_config(**settings):
    return HSIVIConfig(**{"num_inference_steps": 2, "train_batch_size": 4, "critic_updates": 2, **settings})


@pytest.fixture(scope="module")
def measured(measure):
    return measure(critic_updates=1)


@pytest.fixture
def planned(arguments, tmp_path, capsys):
    """Runs `hsivi plan` and returns what it printed; the run would be in tmp_path / "run"."""

    def call(**settings):
        cli.plan(arguments(tmp_path / "run", **settings))
        return capsys.readouterr().out

    return call


def sizes_of(teacher):
    return [weight.numel() for weight in UNet2DModel.from_pretrained(teacher, subfolder="unet").parameters()]


def test_a_plan_is_of_the_levels_of_the_run(tmp_path, make_state):
    """They follow from the numbers of the schedule, which a tensor without values has not."""
    DDPMPipeline(make_unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path)
    planned = plan.make_hollow_state(str(tmp_path), None, make_config(), plan.Meter())
    run = make_state(tmp_path, lr_warmup_steps=50)
    assert planned.bridge.level_range == run.bridge.level_range
    assert planned.bridge.scheduler.config.layer_timesteps == run.bridge.scheduler.config.layer_timesteps


@pytest.fixture(scope="module")
def one_call(measure):
    """A run of one step, with pairs, in which the critic learns alone at first, and 20 times an update."""
    settings = {"preset": "paper", "noise_scale_type": "config", "critic_first": 2, "critic_updates": 20}
    return measure(num_inference_steps=1, num_pairs=100, **settings)


def test_a_sampler_of_one_call_has_its_moments_and_its_pairs(one_call, measured):
    assert one_call.memory["Adam's moments"] == measured.memory["Adam's moments"]
    assert one_call.memory["pairs"] == 100 * 2 * 64 * 4  # noise and end, of 8x8 floats
    assert "pairs" not in measured.memory


def test_what_stays_is_counted_exactly(measured, teacher):
    """float32: 4 bytes for a weight of each network and of the average, 8 for Adam's moments of both players."""
    sizes = sizes_of(teacher)
    weights, tensors = sum(sizes), len(sizes)
    for name in ("teacher", "student", "critic", "average of the student"):
        assert measured.memory[name] == 4 * weights
    assert measured.memory["Adam's moments"] == 2 * (8 * weights + 4 * tensors)  # and a step count for each tensor
    assert measured.memory["chains"] == 2 * 4 * (64 * 4 + 8)  # T B states of 8x8 floats and an index
    assert measured.parameters == {"teacher": weights, "trained of the student": weights}


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(measure, measured):
    def activations(**settings):
        return measure(critic_updates=1, **settings).memory["activations and gradients"]

    few, many = measured.memory["activations and gradients"], activations(train_batch_size=64)
    assert many > 8 * few
    assert activations(train_batch_size=64, gradient_checkpointing=True) < 0.9 * many


@pytest.mark.slow
def test_accumulation_takes_the_memory_of_one_batch(measure):
    one, four = (
        measure(objective="SM", scoring="random", train_batch_size=32, gradient_accumulation_steps=steps)
        for steps in (1, 4)
    )
    assert four.memory["activations and gradients"] < 1.1 * one.memory["activations and gradients"]
    assert four.calls == one.calls
    assert four.work.flops == pytest.approx(4 * one.work.flops, rel=0.01)


def test_half_precision_halves_the_teacher_and_activations_and_shares_of_classes_cost_nothing(
    measure, measured, class_teacher
):
    """Here with a learned noise scale for each of 8x8 pixels."""
    settings = {"noise_scale_type": "per_pixel", "class_shares": [1.0, 2.0, 0.0], "critic_updates": 1}
    half = measure(class_teacher, mixed_precision="bf16", **settings)
    weights = sum(sizes_of(class_teacher))
    assert half.parameters == {"teacher": weights, "trained of the student": weights + 64}
    assert half.memory["teacher"] == 2 * weights
    assert half.memory["student"] == 4 * (weights + 64)
    assert half.memory["critic"] == 4 * weights
    assert half.memory["activations and gradients"] < measured.memory["activations and gradients"]
    assert (half.calls, half.work.flops) == (measured.calls, measured.work.flops)


@pytest.mark.slow
def test_gradient_checkpointing_takes_less_memory(tmp_path):
    make_flux(num_layers=1, num_single_layers=4).save_pretrained(tmp_path)
    given = {"prompts": ["a cat"], "guidance_scale": 3.0, "lora_rank": 2, "resolution": [64, 64], "critic_updates": 1}
    plain, less = (
        plan.measure(str(tmp_path), None, make_config(**given, gradient_checkpointing=each)) for each in (False, True)
    )
    key = "activations and gradients"
    assert less.memory[key] < 0.5 * plain.memory[key]
    assert less.work.flops > plain.work.flops  # of the second forward pass


DIGITS = "--config=training/configs/digits_t5.yaml"
LARGE = ["--config=training/configs/cifar10.yaml", "--lr_warmup_steps=0", "--train_batch_size=4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "arguments", "within"),
    [
        ("tiny", ["--num_inference_steps=2", "--train_batch_size=32", "--critic_updates=1"], 0.2),
        (None, [DIGITS, "--preset=fast"], 0.2),
        (None, [DIGITS, "--preset=paper"], 0.2),
        ("cifar10_32", [*LARGE, "--mixed_precision=no"], 0.15),
    ],
)
def test_the_peak_is_known(tmp_path, teacher, arguments, within):
    """Of small networks most of it are the libraries, of which a run touches more than a plan does."""
    folder = tmp_path / "teacher"
    if teacher == "tiny":
        save_teacher(folder, sample_size=32)
    elif teacher:
        make_teacher.main([f"--teacher={ROOT / 'training' / 'teachers' / teacher}", f"--output_dir={folder}"])
    given = [*arguments, f"--output_dir={tmp_path / 'run'}", "--validation_steps=0"]
    given += [f"--pretrained_teacher_model={folder}"] if teacher else []
    command = [sys.executable, "-c", PEAK, str(ROOT), *given]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    (planned,) = [float(line.split()[-1].replace(",", "")) for line in lines if "at the peak" in line]
    assert planned * plan.MIB == pytest.approx(int(lines[-1].split()[-1]), rel=within)


def test_calls_are_those_of_the_loop(one_call, measured):
    assert measured.calls == {"student": 1, "critic": 1, "teacher": 1}
    # The first critic update shares a batch with the update of the student.
    assert one_call.calls == {"student": 21 - 1, "critic": 21, "teacher": 1}


def test_steps_that_learn_from_pairs_alone_cost_no_call_of_teacher_and_critic(measure):
    four = measure(num_inference_steps=4, critic_updates=1)
    assert four.calls == {"student": 1, "critic": 0.75, "teacher": 0.75}
    assert four.fit_calls == (6400 * 10, 0)  # of a run of 1,000 updates
    assert four.memory["pairs"] == 6400 * 2 * 64 * 4
    several = measure(num_inference_steps=[1, 2, 4], critic_updates=1, train_batch_size=48)
    assert several.calls["student"] == 1 > several.calls["critic"] == several.calls["teacher"]
    assert several.fit_calls == (
        6400 * 16,
        updates.PAIR_STEPS * 48,
    )  # those of 1 and 2 steps lead to images, and are fitted first
    assert several.memory["pairs"] == 6400 * 4 * 64 * 4


def test_a_guided_pair_costs_twice_as_many_calls_of_the_same_network(measure, measured, one_call, class_teacher):
    """Those of four steps do not lead to the image, and take 10 calls instead of 15."""
    guided = measure(class_teacher, guidance_scale=3.0, num_inference_steps=4, num_pairs=100, critic_updates=1)
    assert (one_call.fit_calls[0], *guided.fit_calls) == (100 * 15, 100 * 2 * 10, 0)
    assert guided.call.flops == measured.call.flops


@pytest.mark.slow
def test_further_critic_updates_are_counted_without_being_run(measure):
    one, two, five = (measure(preset="paper", num_inference_steps=1, critic_updates=updates) for updates in (1, 2, 5))
    assert five.work == pytest.approx([a + 4 * (b - a) for a, b in zip(one.work, two.work, strict=True)], rel=0.02)


def test_what_is_written_is_as_large_as_said(distil, measured, tmp_path):
    run = distil(tmp_path / "run")

    def size(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".pkl"))

    for folder, part in (("pipeline", "pipeline"), ("critic", "critic"), ("checkpoints", "2 checkpoints")):
        said = measured.written[part]
        assert said < size(run / folder) < 1.6 * said  # the network is so small that the headers of files count


def test_the_speed_is_taken_from_a_real_network(teacher):
    speed, clock = plan.seconds_per_flop(plan.make_teacher(str(teacher), None, make_config()), make_config(), flops=1e7)
    assert 1e-13 < speed < 1e-6
    assert clock == "CPU time of this process measured alone, 1 thread(s)"


def copy_configs(teacher, folder, flat=False):
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        copy = folder / (Path(name).name if flat else name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((teacher / name).read_bytes())
    return folder


def test_a_plan_by_the_first_process_needs_no_weights_and_writes_nothing(planned, teacher, tmp_path, monkeypatch):
    """Here of a student of several counts, with all its chains."""
    costs, measure = [], plan.measure
    monkeypatch.setattr(plan, "measure", lambda *given: costs.append(measure(*given)) or costs[0])
    given = {"pretrained_teacher_model": copy_configs(teacher, tmp_path / "teacher"), "max_train_steps": 2}
    for rank in ("1", "0"):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        text = planned(**given, num_inference_steps=(4, 1, 2), num_pairs=0)
        assert bool(text) == (rank == "0")
    assert not (tmp_path / "run").exists()
    assert costs[0].memory["chains"] == 4 * 4 * (64 * 4 + 8)  # max(T) B states of 8x8 floats and an index
    assert "1, 2, 4 steps, preset fast: 2 updates of 4 rows\n" in text
    assert "student 2.0, critic 2.0, teacher 1.0" in text  # two critic updates, the first on the answer for the layers
    for part in ("memory of a process", "Adam's moments", "in all, at the peak", "GFLOP", "2 checkpoints"):
        assert part in text
    assert "of the N processes" not in text
    assert "by the speed of one network (CPU time of this process measured alone, 1 thread(s))" in text


def test_a_plan_for_a_card_says_its_time_its_price_and_what_is_assumed(planned, teacher, monkeypatch):
    monkeypatch.setattr(plan, "seconds_per_flop", None)  # nothing is timed
    given = {
        "pretrained_teacher_model": teacher,
        "max_train_steps": 1000,
        "num_inference_steps": 1,
        "num_pairs": 8,
    }
    text = planned(**given, card="h100", price_per_hour=36)
    (line,) = (line for line in text.split("\n") if line.startswith("H100: about "))
    seconds, total, price = re.fullmatch(
        r"H100: about (.+) s an update and (.+) s for all; all costs (.+) at 36 an hour", line
    ).groups()
    assert float(total) == pytest.approx(1000 * float(seconds), rel=0.5)
    assert float(price) >= float(total) / 100  # with that of the pairs
    assert "before them about" in text
    assert (
        "(assumed: 40% of 67 TFLOP/s, without TF32, 70% of 3,350 GB/s, and at least 10 microseconds for each of" in text
    )
    assert re.search(r"\d MiB of its 81,920 are planned: it fits", text)
    parts = {what: float(size.replace(",", "")) for what, size in re.findall(r"^  (\S.*?)  +([\d,.]+)$", text, re.M)}
    main, device = (parts[f"of that {where}"] for where in ("in main memory", "on the device"))
    assert main == pytest.approx(parts["libraries"] + parts["pairs"], abs=0.2)
    assert main + device == pytest.approx(parts["in all, at the peak"], abs=0.2)
    for wrong, message in (
        ({"card": "T4", "mixed_precision": "bf16"}, "card='T4' is slow in bf16: give mixed_precision fp16"),
        ({"price_per_hour": 2}, "price_per_hour=2.0: give a price from 0 on, and the card"),
        ({"card": "H100", "price_per_hour": -1}, "price_per_hour=-1.0: give a price from 0 on"),
        ({"card": "H100", "price_per_hour": "nan"}, "price_per_hour=nan: give a price from 0 on"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(**given, **wrong)


@pytest.mark.parametrize(
    ("gib", "verdict"), [(19, "it fits"), (22, "it may not fit: take"), (25, "it does not fit: take")]
)
def test_whether_a_card_has_room_is_said(measured, gib, verdict):
    cost = replace(measured, memory={"teacher": gib * 2**30, "libraries": 2**40})
    *_, line = plan._card_lines("L4", CARDS["L4"], None, make_config(), cost)
    assert line.startswith(f"  {1024 * gib:,} MiB of its 24,576 are planned: {verdict}")
    assert "planned" not in plan._card_lines("L4", CARDS["L4"], None, make_config(shard_base=True), cost)[-1]


def test_attention_is_counted_on_the_cpu_too():
    with plan.Meter() as meter:
        query = torch.empty(2, 4, 16, 8, requires_grad=True)
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        forward = meter.flops
        out.sum().backward()
    assert forward == 2 * 2 * (2 * 4 * 16 * 16 * 8)  # two products of 2 operations a term
    assert meter.flops == 3.5 * forward


def test_the_meter_counts_what_is_read_and_written_and_no_views():
    meter = plan.Meter()
    with meter:
        one = torch.empty(100, 100)
        begin = meter.traffic, meter.operations
        two = one.t() + one  # reads two, and writes one
        two += one
        two[:10]
    assert meter.traffic - begin[0] == (3 + 3) * 40_000
    assert meter.operations - begin[1] == 2


def test_a_plan_says_what_processes_share(planned, measured, text_teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measure", lambda *given: measured)  # of other networks, which takes less time
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat")
    given = {"pretrained_teacher_model": text_teachers("sd"), "prompts": prompts, "guidance_scale": 3.0, "lora_rank": 2}
    text = planned(**given, shard_base="true")
    assert "an update calls for each row: student 1.0, critic 1.0, teacher 1.0;" in text
    assert "leaves 1/N of the teacher in each of the N processes" in text


def test_the_configs_of_a_teacher_may_lie_in_one_folder(teacher, tmp_path):
    """As those of google/ddpm-*."""
    teachers = [
        plan.make_teacher(str(copy_configs(teacher, tmp_path / str(flat), flat)), None, make_config())
        for flat in (0, 1)
    ]
    one, other = ({name: weight.shape for name, weight in each.network.state_dict().items()} for each in teachers)
    assert one == other
    assert teachers[0].schedule.config == teachers[1].schedule.config


def test_a_teacher_without_configs_is_refused(planned, tmp_path):
    with pytest.raises(ValueError, match="has no config of a unet.*give a folder or repo id"):
        planned(pretrained_teacher_model=tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json' is not a valid JSON file"):
        planned(pretrained_teacher_model=tmp_path)


class Record(TorchDispatchMode):
    """What operations made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            self.made.append((func, [(x.shape, x.stride(), x.dtype) for x in plan._tensors(result)]))
        return result


def test_tensors_without_values_become_what_real_ones_become():
    """The second time from what is known; copies of gradients depend on the order in memory that convolutions take."""

    def record(network):
        with Record() as record:
            for _ in range(2):
                network(torch.randn(2, 1, 8, 8), 5).sample.square().mean().backward()
        return record.made

    real, hollow = make_unet(), make_unet().to("meta")
    with plan.Meter() as meter:
        plan._make_hollow([hollow])
        made = record(hollow)
    assert made == record(real)
    assert 0 < len(meter.known) < len(made) / 2


def test_the_meter_forgets_what_is_gone():
    meter = plan.Meter()
    with meter:
        one = torch.empty(100, 100)
        two = one + 1
        view = two[:10]
        assert meter.now == 2 * 40_000
        del two
        assert meter.now == 2 * 40_000
        del view, one
        assert (meter.now, meter.peak) == (0, 2 * 40_000)
        assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]


def test_a_plan_says_what_the_pairs_cost():
    (line,) = plan._fit_line(make_config(num_inference_steps=1, num_pairs=8), (8 * 15, 500 * 4), seconds=1.0)
    # A backward pass is two calls: 8 pairs of 15 calls, and 500 updates of 4 rows
    assert (
        line == "before them about 102 min for 8 pairs in 120 calls of the teacher and 500 updates of the layers alone"
    )
    (line,) = plan._fit_line(make_config(num_inference_steps=4, num_pairs=8), (8 * 10, 0), seconds=1.0)
    assert line == "before them about 80 s for 8 pairs in 80 calls of the teacher"
