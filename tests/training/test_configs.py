"""The configs of the repository: recipes for the programs, and of the launcher."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from hsivi_diffusers.commands import cli, evaluate
from hsivi_diffusers.commands.options import parse_options
from hsivi_diffusers.runs.options import differences, flatten
from hsivi_diffusers.runs.output import Output
from training.benchmarks.images import benchmark, lengths, train_baseline, train_classifier, train_teacher, tune_solvers
from training.benchmarks.scenes import train_reader, train_vae
from training.benchmarks.scenes import train_teacher as train_scene_teacher

TRAINING = Path(__file__).parents[2] / "training"
CONFIGS = TRAINING / "configs"
SETS = ("fashion", "emoji", "mnist")
STUDENTS = ("digits_t5", "digits_t1248", "fashion_t4", "emoji_t4", "mnist_t4", "scenes_t4")
TEACHER = [train_teacher.Data, train_teacher.Network, train_teacher.Training, Output]
BASELINE = [train_baseline.Teacher, train_baseline.Training, Output]
GROUPS = {
    **{f"{name}_teacher": TEACHER for name in ("digits", "digits_guided", "digits_flow", *SETS)},
    "scenes_lcm": BASELINE,
    **{f"scenes_{name}": [train_vae.Autoencoder, train_teacher.Training, Output] for name in ("vae", "decoder")},
    "lengths_digits": [lengths.Options],
    "lengths_fashion": [lengths.Options],
    "lengths_mnist": [lengths.Options],
    "scenes_teacher": [train_scene_teacher.Text, train_teacher.Training, Output],
    "scenes_reader": [train_reader.Training],
    "digits_evaluation": [evaluate.Evaluation],
    **{
        f"{name}_{method}": BASELINE
        for name in ("digits", *SETS)
        for method in ("consistency", "progressive", "regression")
    },
    **{f"{name}_classifier": [train_classifier.Data, train_classifier.Training] for name in SETS},
    **{f"solvers_{name}": [tune_solvers.Options] for name in ("digits", "guided", "flow", "text", *SETS)},
    **{f"benchmark_{name}": [benchmark.Options] for name in ("digits", "guided", "flow", "text", *SETS)},
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_config_parses_for_its_program(name):
    path = CONFIGS / f"{name}.yaml"
    options = flatten(parse_options(GROUPS[name], "", ["--config", str(path)]))
    assert differences(options, yaml.safe_load(path.read_text())) == ""


@pytest.mark.parametrize("name", STUDENTS)
def test_the_config_of_a_distillation_can_run_and_is_of_a_preset(name):
    path = CONFIGS / f"{name}.yaml"
    teacher, config, _ = cli.read_distillation(["--config", str(path)], "hsivi distil", "")
    written = yaml.safe_load(path.read_text())
    assert config.preset == ("latent" if config.prompts else "fast")
    counts = written.pop("num_inference_steps")
    assert config.depths == (counts if isinstance(counts, list) else [counts])
    if "guidance_scale" in written:
        assert config.scales == [written.pop("guidance_scale")]
    assert differences(flatten([teacher, config]), written) == ""


def test_no_config_is_left_untested():
    """Those of studies are tested in test_study.py, the recipes of published teachers in test_recipes.py."""
    elsewhere = {path.stem for path in CONFIGS.glob("study_*.yaml")}
    elsewhere |= {"cifar10", "celeba64", "imagenet64", "church256"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - elsewhere == {*GROUPS, *STUDENTS}
    names = {path.stem for path in (TRAINING / "accelerate_configs").iterdir()}
    assert names == {"one_gpu", "eight_gpus", "two_nodes", "cpu_two_processes"}


@pytest.mark.parametrize(
    ("name", "distributed", "machines", "processes", "precision", "cpu"),
    [
        ("one_gpu", DistributedType.NO, 1, 1, "bf16", False),
        ("eight_gpus", DistributedType.MULTI_GPU, 1, 8, "bf16", False),
        ("two_nodes", DistributedType.MULTI_GPU, 2, 16, "bf16", False),
        ("cpu_two_processes", DistributedType.MULTI_GPU, 1, 2, "no", True),
    ],
)
def test_accelerate_reads_the_configs_and_each_says_how_to_launch_it(
    name, distributed, machines, processes, precision, cpu
):
    path = TRAINING / "accelerate_configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == distributed
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert (config.mixed_precision, config.use_cpu) == (precision, cpu)
    head = path.read_text().split("compute_environment")[0].replace("\\\n# ", "")
    assert f"accelerate launch --config_file training/accelerate_configs/{path.name} " in head
    assert "training/train_hsivi.py --config RECIPE" in head
