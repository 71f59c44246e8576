"""A student for ComfyUI: the workflow of its run, the section of its card, and a folder with LoRA and workflow."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..runs.artifacts import ADAPTER
from ..runs.folders import check_empty, replace_folder
from ..runs.state_dicts import naming_damage_of
from ..teachers.adapters import UNET

WORKFLOW = "workflow.json"
NO_WORKFLOW = "this student has no workflow of ComfyUI"
LORA = "lora_name"  # the input of a node that names the file of the student
# Inputs of nodes that a workflow of the user's own must have too.
SETTINGS = {
    "LoraLoaderModelOnly": ("strength_model",),
    "ModelSamplingDiscrete": ("sampling",),
    "T5TokenizerOptions": ("min_length",),
    "FluxGuidance": ("guidance",),
    "EmptyLatentImage": ("width", "height"),
    "EmptySD3LatentImage": ("width", "height"),
    "ManualSigmas": ("sigmas",),
    "KSamplerSelect": ("sampler_name",),
    "SamplerEulerAncestral": ("eta", "s_noise"),
    "SamplerCustom": ("cfg", "add_noise"),
}
SECTION = """\
`{workflow}` draws with it. All its nodes come with ComfyUI (`ManualSigmas` since the end of 2025).

1. Save `{source}` as `models/loras/{lora}`.
2. Open `{workflow}`: drag it into the window.
3. Choose the files of {teacher} in the nodes whose titles ask for it, write the prompt, and run it.

The student was trained for these settings, which a workflow of your own needs too; with another `cfg` ComfyUI would
guide on top of it:

| node | settings |
|---|---|
{rows}

Sampler and sigmas were checked against those of diffusers; ComfyUI itself was not run."""


def read_workflow(adapter: Path, training: dict[str, Any], lora: str) -> dict[str, Any]:
    """Returns the nodes of a workflow that loads a LoRA, by the record of its run.

    Args:
        adapter: Folder of the LoRA.
        training: The record training.json of its run.
        lora: Name of its file there.

    Raises:
        ValueError: There is none.
    """
    found = training.get("comfyui") or {
        "refused": "its training.json is of an earlier version: remove that file, and resume the run (hsivi distil "
        "--output_dir RUN --resume_from_checkpoint latest), which writes it again"
    }
    if "refused" in found:
        raise ValueError(f"{NO_WORKFLOW}: {found['refused']}")
    path = adapter / ADAPTER
    with naming_damage_of(path), safe_open(path, framework="pt") as file:
        odd = [name for name in file.keys() if name.startswith(f"{UNET}.")]  # noqa: SIM118  # it is no mapping
    if odd:
        raise ValueError(
            f"{NO_WORKFLOW}: its LoRA has modules whose names it would not read, among them that of {odd[0]}"
        )
    return {
        number: {**node, "inputs": {**node["inputs"], LORA: lora}} if LORA in node["inputs"] else node
        for number, node in found["nodes"].items()
    }


def workflow_text(nodes: dict[str, Any], source: str, base_model: str | None) -> str:
    """Returns how to use a workflow, as Markdown.

    Args:
        nodes: Returned by `read_workflow`.
        source: File of the LoRA, as it is called beside the workflow.
        base_model: Repo of the teacher.
    """
    (lora,) = (node["inputs"][LORA] for node in nodes.values() if LORA in node["inputs"])
    rows = [_row(node) for node in nodes.values() if node["class_type"] in SETTINGS]
    teacher = base_model or "the teacher"
    return SECTION.format(workflow=WORKFLOW, source=source, lora=lora, teacher=teacher, rows="\n".join(rows))


def _row(node: dict[str, Any]) -> str:
    name, title = _code(node["class_type"]), node.get("_meta", {}).get("title")
    settings = [f"{key} {_code(node['inputs'][key])}" for key in SETTINGS[node["class_type"]]]
    return f"| {f'{name} titled {_code(title)}' if title else name} | {', '.join(settings)} |"


def _code(value: Any) -> str:
    """A text of the file, or a number as JSON, as code in a table of Markdown."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "`" + re.sub(r"[`|\s]+", " ", text) + "`"


def save_workflow(nodes: dict[str, Any], folder: Path) -> None:
    """Writes workflow.json into a folder."""
    (folder / WORKFLOW).write_text(json.dumps(nodes, indent=2) + "\n", encoding="utf-8")


def export(adapter: Path, training: dict[str, Any], name: str, output_dir: Path) -> Path:
    """Writes the folder for ComfyUI: the LoRA under a name of its own, workflow.json, and README.md.

    Args:
        adapter: Folder of the LoRA and its scheduler, RUN/pipeline.
        training: The record training.json of its run.
        name: Of the LoRA's file, without its ending.
        output_dir: A new or empty folder.

    Returns:
        The file of the LoRA.

    Raises:
        ValueError: There is no workflow for such a student, or the folder is not empty.
    """
    lora = f"{name}.safetensors"
    nodes = read_workflow(adapter, training, lora)
    check_empty(output_dir)
    whole = output_dir.absolute()
    whole.parent.mkdir(parents=True, exist_ok=True)
    partial = whole.with_name(f".{whole.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        shutil.copyfile(adapter / ADAPTER, partial / lora)
        save_workflow(nodes, partial)
        text = f"# {name} in ComfyUI\n\n{workflow_text(nodes, lora, training.get('base_model'))}\n"
        (partial / "README.md").write_text(text, encoding="utf-8")
        replace_folder(partial, whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output_dir / lora
