"""`share/comfyui.py`: the folder that `hsivi export` writes, and what a push of a LoRA adds for ComfyUI."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hsivi_diffusers import HSIVIScheduler, push
from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.share import comfyui
from hsivi_diffusers.share.comfyui import WORKFLOW, export, read_workflow
from hsivi_diffusers.teachers.adapters import UNET, add_adapter, save_adapter
from hsivi_diffusers.teachers.comfyui import find_workflow
from hsivi_diffusers.teachers.loading import load_teacher
from short_run import contents
from tiny_text import make_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run with adapters leaves of Stable Diffusion, without its training."""
    folder, teacher = tmp_path_factory.mktemp("runs") / "sd4", load_teacher(make_text("sd"))
    scheduler = HSIVIScheduler.from_config(teacher.schedule.config, layer_timesteps=[899, 500, 0], noise_eta=1.0)
    save_adapter(add_adapter(teacher.network, teacher.adapter, 2), folder / "pipeline", UNET, "hash")
    scheduler.save_pretrained(folder / "pipeline" / "scheduler")
    record = {"base_model": "bob/teacher", "comfyui": find_workflow(teacher, scheduler)}
    (folder / "training.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def training(run):
    return json.loads((run / "training.json").read_text())


def test_an_exported_folder_has_the_lora_its_workflow_and_what_to_do(run, training, tmp_path):
    lora = export(run / "pipeline", training, "sd4_2_steps", tmp_path / "new" / "comfyui")
    assert lora == tmp_path / "new" / "comfyui" / "sd4_2_steps.safetensors"
    assert {path.name for path in lora.parent.iterdir()} == {lora.name, WORKFLOW, "README.md"}
    assert [*lora.parent.parent.iterdir()] == [lora.parent]
    assert lora.read_bytes() == (run / "pipeline" / ADAPTER).read_bytes()
    assert all(name.startswith("lora_unet_") for name in load_file(lora))
    nodes = json.loads((lora.parent / WORKFLOW).read_text())
    assert all(isinstance(node["class_type"], str) for node in nodes.values())  # by this its window tells the format
    (loader,) = (node for node in nodes.values() if node["class_type"] == "LoraLoaderModelOnly")
    assert loader["inputs"]["lora_name"] == lora.name
    text = (lora.parent / "README.md").read_text()
    assert f"Save `{lora.name}` as `models/loras/{lora.name}`" in text
    assert "Choose the files of bob/teacher in the nodes" in text
    assert "| `SamplerEulerAncestral` | eta `1.0`, s_noise `1.0` |" in text
    assert "| `SamplerCustom` | cfg `1.0`, add_noise `false` |" in text
    first, steps = re.findall(r"\| `ManualSigmas` titled `.*` \| sigmas `(.*)` \|", text)
    assert float(first) > float(steps.split(", ")[0]) > 1
    assert steps.endswith(", 0.0")


def test_only_an_empty_folder_is_written_to_and_a_failure_leaves_nothing(run, training, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name in ("mine", "file"):
        with pytest.raises(ValueError, match=f"--output_dir {tmp_path / name} is not an empty folder: name a new one"):
            export(run / "pipeline", training, "sd4", tmp_path / name)

    def fail(*given):
        raise OSError("no space left on device")

    monkeypatch.setattr(comfyui, "save_workflow", fail)
    with pytest.raises(OSError, match="no space"):
        export(run / "pipeline", training, "sd4", tmp_path / "new")
    assert contents(tmp_path) == before
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert export(run / "pipeline", training, "sd4", tmp_path / "empty").is_file()


def test_a_student_without_a_workflow_is_refused_with_the_reason(run, tmp_path):
    refused = {"comfyui": {"refused": "noise_eta=1 of a rectified flow: distil with --noise_eta 0"}}
    with pytest.raises(ValueError, match="this student has no workflow of ComfyUI: noise_eta=1 of a rectified flow"):
        export(run / "pipeline", refused, "sd4", tmp_path / "new")
    with pytest.raises(ValueError, match="of an earlier version: remove that file, and resume the run"):
        read_workflow(run / "pipeline", {"seconds": 1.0}, "sd4.safetensors")
    assert [*tmp_path.iterdir()] == []


def test_a_lora_with_names_that_comfyui_does_not_read_is_refused_and_pushed_without(run, training, logged_in, tmp_path):
    folder = shutil.copytree(run, tmp_path / "odd")
    weights = load_file(folder / "pipeline" / ADAPTER)
    save_file({**weights, "unet.new.lora_A.weight": torch.ones(1)}, folder / "pipeline" / ADAPTER)
    with pytest.raises(ValueError, match="names it would not read, among them that of unet.new.lora_A.weight"):
        export(folder / "pipeline", training, "sd4", tmp_path / "new")
    push(folder / "pipeline", "alice/odd", run_dir=folder)
    assert WORKFLOW not in logged_in.repos["alice/odd"].branches["main"].files


def test_a_push_of_a_lora_has_the_workflow_and_its_settings_in_the_card(run, logged_in):
    logged_in.add_repo("bob/teacher", {})
    push(run / "pipeline", "alice/four-steps", run_dir=run)
    files = logged_in.repos["alice/four-steps"].branches["main"].files
    nodes = json.loads(files[WORKFLOW])
    assert nodes == read_workflow(
        run / "pipeline", json.loads((run / "training.json").read_text()), "four-steps.safetensors"
    )
    text = ModelCard(files["README.md"].decode()).text
    section = text.split("## Use it in ComfyUI\n")[1].split("\n## ")[0]
    assert f"Save `{ADAPTER}` as `models/loras/four-steps.safetensors`" in section
    (steps,) = (n["inputs"]["sigmas"] for n in nodes.values() if "student" in n.get("_meta", {}).get("title", ""))
    assert f"| sigmas `{steps}` |" in section


@pytest.mark.parametrize("training", [{}, {"comfyui": {"refused": "its noise"}}])
def test_a_push_of_other_students_goes_on_without(run, logged_in, tmp_path, training):
    folder = shutil.copytree(run, tmp_path / "other")
    (folder / "training.json").write_text(json.dumps(training))
    push(folder / "pipeline", "alice/other", run_dir=folder)
    files = logged_in.repos["alice/other"].branches["main"].files
    assert WORKFLOW not in files
    assert ADAPTER in files
    assert "ComfyUI" not in files["README.md"].decode()
