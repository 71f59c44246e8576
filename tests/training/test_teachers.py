"""`training/teachers` and `make_teacher.py`: the shapes of published teachers. No weights are loaded."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIScheduler, TeacherBridge, load_teacher
from tiny_unet import make_unet
from training.benchmarks.images import make_teacher

TRAINING = Path(__file__).parents[2] / "training"


@pytest.mark.parametrize(
    ("name", "parameters", "size", "outputs", "clock", "attends"),
    [
        ("cifar10_32", 35_746_307, 32, 3, 1000, {16}),
        ("celeba_64", 78_700_803, 64, 3, 1000, {16}),
        ("imagenet_64", 121_575_942, 64, 6, 4000, {16, 8}),
        ("church_256", 113_673_219, 256, 3, 1000, {16}),
    ],
)
def test_a_folder_holds_a_pipeline_of_the_published_shape_without_weights(
    name, parameters, size, outputs, clock, attends
):
    folder = TRAINING / "teachers" / name
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"}
    assert DDPMPipeline.load_config(folder)["_class_name"] == "DDPMPipeline"
    with torch.device("meta"):
        unet = UNet2DModel.from_config(UNet2DModel.load_config(folder, subfolder="unet"))
        sample = unet(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long)).sample
    assert sample.shape == (1, outputs, size, size)
    assert unet.num_parameters() == parameters
    assert f"{parameters:,}" in (TRAINING / "teachers" / "README.md").read_text()
    assert len(HSIVIScheduler.from_config(DDPMScheduler.load_config(folder, subfolder="scheduler"))) == clock
    levels = unet.config.down_block_types
    assert {size >> level for level, block in enumerate(levels) if block.startswith("Attn")} == attends
    assert list(unet.config.up_block_types) == [block.replace("Down", "Up") for block in reversed(levels)]


# ----- make_teacher.py -----


@pytest.fixture
def empty_teacher(tmp_path):
    """Saves the configs of a tiny teacher, and returns the folder; options are those of its UNet."""

    def save(clock=1000, **options):
        make_unet(**options).save_config(tmp_path / "empty" / "unet")
        DDPMScheduler(num_train_timesteps=clock).save_config(tmp_path / "empty" / "scheduler")
        return tmp_path / "empty"

    return save


def make(folder, output_dir):
    make_teacher.main([f"--teacher={folder}", f"--output_dir={output_dir}"])
    return load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("clock", "options"),
    [(1000, {}), (40, {"time_embedding_type": "learned", "num_train_timesteps": 40, "out_channels": 2})],
)
def test_a_made_teacher_is_accepted_as_one(empty_teacher, tmp_path, clock, options):
    make(empty_teacher(clock, **options), tmp_path / "made")
    teacher = load_teacher(str(tmp_path / "made"))
    assert teacher.network.num_parameters() == make_unet(**options).num_parameters()
    scheduler = HSIVIScheduler.from_config(teacher.schedule.config, layer_timesteps=[30, 10, 0])
    bridge = TeacherBridge(teacher, scheduler, (5, 35))
    score = bridge.score(bridge.sample_base(2), torch.tensor([5, 35]))
    assert score.shape == (2, 1, 8, 8)
    assert score.isfinite().all()


def test_the_weights_are_the_same_each_time(empty_teacher, tmp_path, same_tensors):
    folder = empty_teacher()
    assert same_tensors(make(folder, tmp_path / "first"), make(folder, tmp_path / "again"))


@pytest.mark.parametrize("missing", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_folder_without_configs_is_refused_before_work(empty_teacher, tmp_path, missing):
    folder = empty_teacher()
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"has no config of a {missing.split('/')[0]}.*give a folder or repo id"):
        make(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_another_network_and_a_filled_output_folder_are_refused(empty_teacher, dit_teacher, tmp_path):
    with pytest.raises(ValueError, match="has a DiTTransformer2DModel: give one with a UNet2DModel"):
        make(dit_teacher, tmp_path / "made")
    folder = empty_teacher()
    with pytest.raises(ValueError, match="is not empty"):
        make(folder, folder)


def test_help(check_help):
    check_help(make_teacher.main, "teacher")
