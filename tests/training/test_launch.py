"""What the launcher may ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from hsivi_diffusers.distillation import trainer

TRAINING = Path(__file__).parents[2] / "training"
CONFIGS = TRAINING / "accelerate_configs"


def launch_script(config, arguments, **environment):
    """Runs `accelerate launch` on train_hsivi.py."""
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={CONFIGS / config}"]
    subprocess.run(
        [*command, "--main_process_port=0", TRAINING / "train_hsivi.py", *arguments],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
        check=True,
        timeout=600,
    )


@pytest.mark.slow  # the launcher and both processes import everything; test_processes.py has two that are forked
def test_the_config_for_the_cpu_starts_two_processes(arguments, launch, tmp_path, differences):
    launch_script("cpu_two_processes.yaml", arguments(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == 2
    assert launch(tmp_path / "accumulated", gradient_accumulation_steps=2)[0] == [0]
    assert differences(tmp_path / "run", tmp_path / "accumulated") == []


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_plugins_for_a_single_model_are_refused(distil, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(trainer, "Accelerator", lambda **_: SimpleNamespace(distributed_type=kind))
    message = f"asks for {kind.value}, .* two are trained.*shard_base, mixed_precision bf16 and gradient_checkpointing"
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_know_each_other_are_refused(launch, tmp_path):
    """accelerate takes a process without a GPU for the only one, unless it is told to use the CPU."""
    environment = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    statuses, text = launch(tmp_path / "run", processes=2, environment=environment)
    if statuses == [0, 0]:  # older releases of accelerate are not mistaken
        assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == 2
        return
    assert statuses == [1, 1], text
    # By one at least: the other may lose it while they meet.
    assert "the launcher started 2 processes, and each was initialised as a single-process run" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_compiled_networks_train_and_resume(launch, tmp_path, preset):
    """With the backend that compiles nothing; the weights keep their names."""
    options = {"preset": preset, "max_train_steps": 3, "critic_updates": 1}
    folder, environment = tmp_path / "run", {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    stopped = {"kill": {"point": "SIGTERM", "step": 2}}
    statuses, text = launch(folder, environment=environment, **stopped, **options)
    assert set(statuses) == {75}, text
    statuses, text = launch(folder, environment=environment, resume_from_checkpoint="latest", **options)
    assert set(statuses) == {0}, text
    assert set(launch(tmp_path / "plain", **options)[0]) == {0}
    for name in ("pipeline/unet", "critic"):
        path = f"{name}/diffusion_pytorch_model.safetensors"
        got, wanted = (load_file(tmp_path / run / path) for run in ("run", "plain"))
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(got[key], tensor, rtol=0, atol=3e-3)
