"""`hsivi export`: of a run of the command, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from hsivi_diffusers.commands import cli
from hsivi_diffusers.runs.artifacts import ADAPTER
from tiny_flows import make_flow, size_of
from tiny_text import PROMPTS


@pytest.fixture(scope="module")
def run(distil, text_teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {"pretrained_teacher_model": text_teachers("sd"), "prompts": folder / "prompts.txt"}
    options |= {"guidance_scale": 2.0, "lora_rank": 2, "train_batch_size": 2, "start_timestep": 899}
    return distil(folder / "sd2", **options, max_train_steps=1, critic_updates=1, lr_warmup_steps=0)


@pytest.fixture
def refused(capsys):
    """Runs `hsivi export`, which must end with exit status 2, and returns the line that it printed."""

    def call(*given):
        with pytest.raises(SystemExit) as exit:
            cli.main(["export", *map(str, given)])
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


def test_a_run_is_exported_for_comfyui(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["export", f"--run_dir={run}", "--format=comfyui", "--output_dir=comfyui"])
    lora = Path("comfyui", "sd2_2_steps.safetensors")  # as it was asked for
    assert f"copy {lora} to models/loras of ComfyUI" in capsys.readouterr().out
    assert lora.read_bytes() == (run / "pipeline" / ADAPTER).read_bytes()
    nodes = json.loads((tmp_path / "comfyui" / "workflow.json").read_text())
    given = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert given["LoraLoaderModelOnly"]["lora_name"] == lora.name
    assert given["EmptyLatentImage"] == {"width": 16, "height": 16, "batch_size": 1}
    assert given["SamplerEulerAncestral"]["eta"] == 1.0
    assert given["ManualSigmas"]["sigmas"].count(", ") == 2


def test_what_cannot_be_exported_is_one_line(run, fast_run, tmp_path, refused):
    output = f"--output_dir={tmp_path / 'new'}"
    assert "--run_dir is missing: name a folder" in refused(output)
    assert "--output_dir is missing: name a folder" in refused(f"--run_dir={run}")
    assert "invalid choice: 'a1111'" in refused(f"--run_dir={run}", output, "--format=a1111")
    assert "holds no finished run" in refused(f"--run_dir={tmp_path}", output)
    text = refused(f"--run_dir={fast_run}", output)
    assert f"{fast_run / 'pipeline'} holds a whole pipeline and no LoRA, which ComfyUI does not load" in text
    assert "is not an empty folder: name a new one" in refused(f"--run_dir={run}", f"--output_dir={run}")
    other = shutil.copytree(run, tmp_path / "other")
    record = json.loads((run / "training.json").read_text())
    (other / "training.json").write_text(json.dumps({**record, "comfyui": {"refused": "noise_eta=1: distil anew"}}))
    assert "this student has no workflow of ComfyUI: noise_eta=1: distil anew" in refused(f"--run_dir={other}", output)
    (other / "pipeline" / ADAPTER).write_bytes(b"half")
    assert f"{ADAPTER} is damaged" in refused(f"--run_dir={other}", output)
    assert not (tmp_path / "new").exists()


def test_a_record_of_an_earlier_version_is_written_again_by_resuming(run, tmp_path, refused):
    other = shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "training.json").read_text())
    (other / "training.json").write_text(json.dumps({k: v for k, v in record.items() if k != "comfyui"}))
    text = refused(f"--run_dir={other}", f"--output_dir={tmp_path / 'new'}")
    assert (
        "remove that file, and resume the run (hsivi distil --output_dir RUN --resume_from_checkpoint latest)" in text
    )
    (other / "training.json").unlink()
    cli.main(["distil", f"--output_dir={other}", "--resume_from_checkpoint=latest"])
    assert json.loads((other / "training.json").read_text())["comfyui"] == record["comfyui"]


@pytest.mark.parametrize("eta", [0, 1])
def test_a_training_says_at_once_whether_its_student_cannot_be_exported(distil, tmp_path, capsys, eta):
    (flow := make_flow("sd3")).save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {"pretrained_teacher_model": tmp_path / "teacher", "prompts": tmp_path / "prompts.txt", "lora_rank": 2}
    options |= {"resolution": (*size_of(flow),), "guidance_scale": 2.0, "noise_eta": eta}
    distil(tmp_path / "run", **options, train_batch_size=2, max_train_steps=1, critic_updates=1, lr_warmup_steps=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "comfyui" in line]
    assert len(lines) == eta
    assert all("will refuse this student" in line and "distil with --noise_eta 0" in line for line in lines)
