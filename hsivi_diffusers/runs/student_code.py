"""Python code that loads the student of a finished run and draws images, by the layout of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artifacts import ADAPTER, PROMPTS, read_json

CALL = {"guidance_scale": 1}  # of students of 0.2
ADAPTER_CODE = """\
import torch
from diffusers import DiffusionPipeline
from hsivi_diffusers import HSIVIScheduler

pipeline = DiffusionPipeline.from_pretrained({base}, torch_dtype=torch.float32)  # bfloat16 on a GPU
pipeline.load_lora_weights({weights})
pipeline.scheduler = HSIVIScheduler.from_pretrained({source}, subfolder="scheduler")
images = pipeline(prompt="a prompt", num_inference_steps={steps}, {call}).images"""
PIPELINE_CODE = """\
{imports}

pipeline = {name}.from_pretrained({source})
images = pipeline({inputs}).images"""
OWN_CODE = """\
from hsivi_diffusers.teachers.loading import load_student

student = load_student({source}, teacher)  # the Teacher of the run
images = student(batch_size=16).images"""


def literal(text: str) -> str:
    """A string as code, in double quotes where it has no quotes itself."""
    code = repr(text)
    return code if {'"', "'"} & set(text) else f'"{code[1:-1]}"'


def call_arguments(training: Mapping[str, Any]) -> list[str]:
    """Arguments of a stock pipeline beside prompts and steps, as code; that of guidance is the first."""
    call = training.get("call")
    named = {
        name: value
        for name, value in (call if call and isinstance(call, dict) else CALL).items()
        if name.isidentifier()
    }
    return [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}" for name, value in named.items()]


def step_counts(options: Mapping[str, Any]) -> list[int]:
    """The numbers of steps of a run, ascending; none in a damaged record."""
    counts = options.get("num_inference_steps")
    return sorted(count for count in (counts if isinstance(counts, list) else [counts]) if isinstance(count, int))


def adapter_code(base: str, source: str, steps: int, training: Mapping[str, Any], weight_name: str = "") -> str:
    """Code for a LoRA; `base`, its teacher, and `source`, its folder or repo, are string literals."""
    call = ", ".join(call_arguments(training))
    return ADAPTER_CODE.format(base=base, source=source, weights=source + weight_name, steps=steps, call=call)


def student_code(folder: Path, name: str, options: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Code for the pipeline in a folder, which the code calls `name`; of several step counts it takes the largest."""
    source, steps = literal(name), max(step_counts(options), default=1)
    if (folder / ADAPTER).is_file():
        base = training.get("base_model") or options.get("pretrained_teacher_model") or "REPO_OF_THE_TEACHER"
        revision = f", revision={literal(str(options['revision']))}" if options.get("revision") else ""
        weight_name = f", weight_name={literal(ADAPTER)}"  # without it a folder is not read offline
        return adapter_code(literal(str(base)) + revision, source, steps, training, weight_name)
    kind = str(read_json(folder / "model_index.json").get("_class_name"))
    if not kind.isidentifier() or kind == "None":
        return OWN_CODE.format(source=source)
    if kind.startswith("HSIVI"):
        imports, inputs = f"from hsivi_diffusers import {kind}", _inputs_of_pixels(folder, steps)
    else:
        imports = f"import hsivi_diffusers\nfrom diffusers import {kind}"
        prompt = 'prompt="a prompt"' if (folder.parent / PROMPTS).is_file() else "class_labels=[0]"
        inputs = ", ".join([prompt, f"num_inference_steps={steps}", *call_arguments(training)])
    return PIPELINE_CODE.format(imports=imports, name=kind, source=source, inputs=inputs)


def _inputs_of_pixels(folder: Path, steps: int) -> str:
    classes = read_json(folder / "unet" / "config.json").get("num_class_embeds")
    return f"batch_size=16, num_inference_steps={steps}" + ", class_labels=[0] * 16" * bool(classes)
