"""Students of flow transformers: from runs that are killed, over a Hub, to the stock pipeline of a fresh process."""

import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hsivi_diffusers import push
from hsivi_diffusers.teachers.loading import kind_of, load_student
from hub_server import Hub, run_clients, signed_in
from short_run import contents
from tiny_flows import FLOWS, make_flow, size_of
from tiny_text import PROMPTS

pytestmark = pytest.mark.slow

OPTIONS = {"guidance_scale": 3.0, "lora_rank": 2, "learning_rate": 0.1, "lr_warmup_steps": 0, "critic_updates": 1}
OPTIONS |= {"train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
WITHOUT_PACKAGE = "import sys\nsys.modules['hsivi_diffusers'] = None\n"


@pytest.fixture(scope="module", params=FLOWS)
def flow(request, tmp_path_factory):
    """A family: the folder of its teacher, and the options of its runs."""
    folder = tmp_path_factory.mktemp(request.param)
    (pipeline := make_flow(request.param)).save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {"pretrained_teacher_model": folder / "teacher", "prompts": folder / "prompts.txt"}
    options |= {"resolution": (*size_of(pipeline),), **OPTIONS}
    return SimpleNamespace(kind=request.param, folder=folder, options=options)


@pytest.fixture(scope="module")
def students(flow, distil):
    """The folders of two runs, whose layers have no noise, and noise."""
    return [distil(flow.folder / f"eta-{eta}", **flow.options, noise_eta=eta) for eta in (0, 1)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_ends_with_the_same_bits(flow, students, launch, tmp_path, differences, processes):
    """In one process, or in two with one of its two batches each."""
    options = {**flow.options, "noise_eta": 0, "gradient_accumulation_steps": 2 // processes}
    kill = {"point": "SIGKILL", "step": 3, "rank": processes - 1}
    statuses, text = launch(tmp_path / "run", processes=processes, kill=kill, **options)
    assert statuses[-1] == -signal.SIGKILL, text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    statuses, text = launch(tmp_path / "run", processes=processes, resume_from_checkpoint="latest", **options)
    assert statuses == [0] * processes, text
    assert differences(tmp_path / "run", students[0]) == []


def test_in_a_fresh_process_the_code_of_the_card_draws_the_images_of_the_run(flow, students, tmp_path):
    """With our scheduler, and at eta 0 with that of diffusers and without the package."""
    codes, wanted = [], []
    with Hub() as hub:
        hub.add_repo("bob/teacher", {str(name): data for name, data in contents(flow.folder / "teacher").items()})
        for student in students:
            name = f"alice/{student.name}"
            with signed_in(hub, tmp_path / "home"):
                push(student / "pipeline", name, run_dir=student, base_model="bob/teacher")
            card = hub.repos[name].branches["main"].files["README.md"].decode()
            blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
            codes += [*blocks[:1], *(WITHOUT_PACKAGE + block for block in blocks[1:])]
            wanted += [draw(student)] * len(blocks)
        assert len(codes) == 3
        seed, save = "\ntorch.manual_seed(0)\nimages = ", "import numpy\nnumpy.save('{}', images[0])\n"
        codes = [code.replace("\nimages = ", seed) + save.format(place) for place, code in enumerate(codes)]
        for process in run_clients(codes, hub, tmp_path / "apart"):
            assert process.returncode == 0, process.stderr
    drawn = [np.load(tmp_path / "apart" / f"{place}.npy").astype(int) for place in range(3)]
    assert drawn[0].shape == (*size_of(make_flow(flow.kind)), 3)
    for one, other, tolerance in zip(drawn, wanted, (0, 1, 0), strict=True):
        assert np.abs(one - other).max() <= tolerance
    assert np.abs(drawn[0] - drawn[2]).max() > 1


def draw(student):
    """An image of a run, by the pipeline that `hsivi sample` loads; at eta 0 that command draws the same one."""
    pipeline = load_student(student / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    kind, text = kind_of(pipeline), "a prompt"
    given = {"prompt": text, "num_inference_steps": 2, **kind.call_arguments(pipeline.scheduler)}
    torch.manual_seed(0)
    image = np.array(pipeline(**given).images[0]).astype(int)
    if pipeline.scheduler.config.noise_eta == 0:
        (ours,) = kind.draw(pipeline, [text], [torch.Generator().manual_seed(0)])
        assert np.abs(image - np.array(ours)).max() <= 1
    pipeline.unload_lora_weights()
    torch.manual_seed(0)
    assert (image != np.array(pipeline(**given).images[0])).any()  # with AuraFlow's few words by little
    return image
