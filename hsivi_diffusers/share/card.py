"""The model card of a distilled sampler, from the pipeline and the folder of its run: usage, quality, training."""

import html
import math
import re
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..pipeline_hsivi import HSIVIPipeline, network_calls, one_of
from ..runs.measures import HALVES, MEASURES, REPORTED, format_cell
from ..runs.options import renamed
from ..runs.student_code import adapter_code, call_arguments, literal

# Metric types of the model-index.
DISTANCES = {
    "fd": "frechet_distance",
    "kid": "kid_x_1000",
    "pixel_fd": "pixel_frechet_distance",
    "swd": "sliced_wasserstein_distance",
}
# Options of the run that the card lists.
OPTIONS = (
    *("preset", "objective", "scoring", "guidance_scale", "lora_rank", "max_train_steps", "train_batch_size"),
    *("learning_rate", "critic_learning_rate", "num_pairs", "noise_cutoff", "seed"),
)
METHOD = (
    "hierarchical semi-implicit variational inference (HSIVI, [arXiv 2310.17153](https://arxiv.org/abs/2310.17153))"
)
CODE = """\
```python
{imports}

pipeline = {name}.from_pretrained("{repo_id}"{options})
images = pipeline({inputs}).images
```"""
USE = """\
With {package} (without it, use the code in this repository, below):

{installed}

{more}

{without}

{alone}

The number of steps is part of the sampler: {counts}."""
ADAPTER_USE = """\
With {package}:

```python
{code}
```

{guidance} Negative prompts have no effect. It can be combined with style LoRAs: give each an `adapter_name`, and select
them with `set_adapters`."""
EULER_USE = """\


Its layers have no noise, so the same images are drawn without the package, by the scheduler of diffusers:

```python
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float32)  # bfloat16 on a GPU
pipeline.load_lora_weights("{repo_id}")
pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift}, num_train_timesteps={num_train_timesteps})
sigmas = {sigmas}
images = pipeline(prompt="a prompt", num_inference_steps={steps}, sigmas=sigmas, {call}).images
```"""
WITHOUT = (
    "Without the package, with the code that is in this repository ({files}; read it first). If the repository is "
    "private, log in with `hf auth login` or set `HF_TOKEN`:"
)
SEEDED = """\
{guidance} If the images must be the same each time, call `torch.manual_seed` before: some pipelines pass no generator
to the steps."""
UNMEASURED = "Not measured yet."
EMBEDDED = "The network takes the guidance scale as an input: keep `{argument}`, that of the training."
GUIDED = "Guidance is in the weights, so keep `{argument}`: the pipeline would guide a second time."
UNGUIDED = "It was trained without guidance, so keep `{argument}`."


def is_ours(pipeline: DiffusionPipeline) -> bool:
    """Whether it is an `HSIVIPipeline`, of this package or of the code that travels with a repo."""
    return type(pipeline).__name__ == HSIVIPipeline.__name__


def make_card(
    pipeline: DiffusionPipeline,
    repo_id: str,
    run: dict[str, Any],
    base_model: str | None = None,
    license: str | None = None,
    fp16: bool = False,
    drawn: bool = False,
) -> ModelCard:
    """Makes the card of a pipeline.

    Args:
        pipeline: Its scheduler is an `HSIVIScheduler`.
        repo_id: Repo of the pipeline.
        run: Returned by `read_run`.
        base_model: Repo of the teacher.
        license: Identifier of the licence.
        fp16: Whether the repo has the weights in half precision, too.
        drawn: Whether samples.png was drawn by the pipeline, and is not the sample grid of the run.
    """
    counts, teacher = pipeline.scheduler.depths, _link(base_model)
    tag = "text-to-image" if hasattr(pipeline, "tokenizer") else "unconditional-image-generation"
    sections = [
        f"A sampler of **{network_calls(counts)}**, distilled from {teacher} without training data, by {METHOD}.",
        f"![Images drawn by this model, {network_calls(counts[-1:])} each](samples.png)" if drawn else _grid(run),
        f"## Use it\n\n{_usage(pipeline, repo_id, counts, fp16, run['training'])}",
    ]
    return _assemble(
        repo_id, pipeline.scheduler, run, sections, [], pipeline_tag=tag, license=license, base_model=base_model
    )


def make_adapter_card(
    scheduler: Any,
    repo_id: str,
    run: dict[str, Any],
    base_model: str | None = None,
    license: str | None = None,
    comfyui: str | None = None,
) -> ModelCard:
    """Makes the card of a LoRA with its scheduler, which are loaded into a stock pipeline of the teacher.

    `comfyui` says how it is used there, if it can be; the others are those of `make_card`.
    """
    counts, training = scheduler.depths, run["training"]
    about = {"base": base_model or "REPO_OF_THE_TEACHER", "repo_id": repo_id, "steps": counts[-1]}
    about["call"] = ", ".join(call_arguments(training))
    code = adapter_code(literal(str(about["base"])), literal(repo_id), counts[-1], training)
    usage = ADAPTER_USE.format(package=_package(), code=code, guidance=_guidance(scheduler, training))
    if euler := training.get("euler"):
        usage += EULER_USE.format(**about, **euler)
    sections = [
        f"A LoRA for {_link(base_model)}, which draws in **{network_calls(counts)}**, distilled without images, by "
        f"{METHOD}.",
        _grid(run),
        f"## Use it\n\n{usage}",
        f"## Use it in ComfyUI\n\n{comfyui}" if comfyui else "",
    ]
    return _assemble(
        repo_id,
        scheduler,
        run,
        sections,
        ["lora"],
        pipeline_tag="text-to-image",
        license=license,
        base_model=base_model,
    )


def _assemble(
    repo_id: str, scheduler: Any, run: dict[str, Any], sections: list[str], tags: Sequence[str], **data: Any
) -> ModelCard:
    """Puts the metadata, some sections, and the sections of all cards together."""
    name = repo_id.split("/")[-1]
    tags = ["diffusers", "hsivi", "few-step", "distillation", "arxiv:2310.17153", *tags]
    results = _eval_results(run["report"])
    head = ModelCardData(library_name="diffusers", model_name=name, tags=tags, eval_results=results, **data)
    terms = " No licence was stated at the upload; terms of the teacher may apply to this model too."
    limits = (
        f"It draws with {network_calls(scheduler.depths)} only. It has the faults and biases of its teacher, and it "
        "can draw some kinds of images more often than the teacher does: look at many before you rely on their "
        f"frequencies. It has no content filter.{'' if data['license'] else terms}"
    )
    sections = [*sections, f"## Quality\n\n{_quality(run)}", f"## Training\n\n{_training(scheduler, run)}"]
    body = "\n\n".join(section for section in [f"# {name}", *sections, f"## Limits\n\n{limits}"] if section)
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n")


def gaps(card: str, of_run: bool) -> list[str]:
    """What the text of a card lacks, made with the folder of a run or without, and the remedy."""
    named = ModelCard(card).data.get("base_model")
    lacks = [] if named else ["the card does not name the teacher: if the Hub has it, give its repo by --base_model"]
    remedy = "run `hsivi evaluate` first" if of_run else "name the folder of an evaluated run by --run_dir"
    return [*lacks, *([f"the card has no measurements: {remedy}"] if UNMEASURED in card else [])]


def _link(base_model: str | None) -> str:
    return f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a pretrained diffusion model"


def _package() -> str:
    """The package, and how to install it, if its repository has an address."""
    address = ""
    with suppress(PackageNotFoundError):  # where it runs from a folder
        address = metadata("hsivi-diffusers")["Home-page"] or ""
    known = address and ".invalid/" not in address
    by = f' by `pip install "hsivi-diffusers @ git+{address}"`' if known else ""
    return f"the package `hsivi_diffusers` installed{by}"


def _guidance(scheduler: Any, training: dict[str, Any]) -> str:
    text = EMBEDDED if training.get("embeds_guidance") else GUIDED if scheduler.guidance_scales else UNGUIDED
    return text.format(argument=call_arguments(training)[0])


def _plain(text: Any) -> str:
    """Text of a file of the run as one line that Markdown and HTML show as it is, also in a cell of a table."""
    return html.escape(re.sub(r"([\\`*_\[\]#|])", r"\\\1", " ".join(str(text).split())), quote=False)


def _grid(run: dict[str, Any]) -> str:
    """The last sample grid of the run."""
    if "grid" not in run:
        return ""
    text = "First row: the teacher in many steps. Below: this model"
    figure = f"![{text}](samples.png)\n\n{text}; its first row starts from the teacher's noise."
    if prompts := run.get("prompts"):
        figure += f" The columns are of the prompts {', '.join(map(_plain, prompts))}, in turn."
    return figure


# ----- usage -----


def _usage(pipeline: DiffusionPipeline, repo_id: str, counts: list[int], fp16: bool, training: dict[str, Any]) -> str:
    """Code with the package, in a stock pipeline, and without the package; of several counts with the largest."""

    def code(name: str, inputs: str, imports: str, options: str = "") -> str:
        return CODE.format(name=name, inputs=inputs, imports=imports, options=options, repo_id=repo_id)

    steps, trust = f"num_inference_steps={counts[-1]}", ", trust_remote_code=True"
    if not is_ours(pipeline):
        takes_scale = "guidance_scale" in signature(pipeline.__call__).parameters
        call = call_arguments(training) if takes_scale or training.get("call") else []
        name, inputs = type(pipeline).__name__, _inputs(pipeline) + ", ".join([steps, *call])
        imports, files = f"from diffusers import {name}", "`scheduler/hsivi_diffusers.py`"
        installed = code(name, inputs, f"import hsivi_diffusers\n{imports}")
        alone, allowed = code(name, inputs, imports, trust), f"pass {one_of(counts)}, any other is refused"
        more = SEEDED.format(guidance=_guidance(pipeline.scheduler, training)) if takes_scale else ""
    else:
        scales = pipeline.scheduler.guidance_scales
        inputs = "batch_size=16" + f", {steps}" * (len(counts) > 1)
        inputs += f", class_labels=[i % {pipeline.num_classes} for i in range(16)]" if pipeline.num_classes else ""
        inputs += f", guidance_scale={scales[-1]}" if len(scales) > 1 else ""
        installed = code("HSIVIPipeline", inputs, "from hsivi_diffusers import HSIVIPipeline")
        files = "`pipeline.py`, and `hsivi_diffusers.py` in the folders of the components"
        options = f', custom_pipeline="{repo_id}"{trust}'
        alone = code("DiffusionPipeline", inputs, "from diffusers import DiffusionPipeline", options)
        allowed, more = f"{one_of(counts)}, and no other", _stock_usage(pipeline, code, steps, fp16)
    without = textwrap.fill(WITHOUT.format(files=files), 120)
    text = USE.format(package=_package(), installed=installed, more=more, without=without, alone=alone, counts=allowed)
    return re.sub("\n{3,}", "\n\n", text)


def _stock_usage(pipeline: HSIVIPipeline, code: Any, steps: str, fp16: bool) -> str:
    """How else an `HSIVIPipeline` is loaded with the package: in half precision, and in a stock pipeline."""
    text = "After `import hsivi_diffusers`, `DiffusionPipeline.from_pretrained` loads it as well."
    text += ' For half precision add `variant="fp16"` and `.to(torch.float16)`.' if fp16 else ""
    if pipeline.num_classes:
        return f"{text}\n\nA stock DDPMPipeline cannot draw with it, because it passes no class labels."
    if pipeline.unet_noise_scale is not None:
        return f"{text}\n\nA stock DDPMPipeline cannot draw with it, because it has no learned noise scale per pixel."
    if pipeline.scheduler.config.noise_cutoff is not None:
        return f"{text}\n\nA stock DDPMPipeline cannot draw with it, because it draws noise of all frequencies."
    imports = "import hsivi_diffusers\nfrom diffusers import DDPMPipeline"
    return f"{text}\n\nIn a pipeline of diffusers:\n\n{code('DDPMPipeline', f'batch_size=16, {steps}', imports)}"


def _inputs(pipeline: DiffusionPipeline) -> str:
    """The required arguments of a stock pipeline's call, as code; the reader fills in the names."""
    given = {"prompt": 'prompt="a prompt", '} if hasattr(pipeline, "tokenizer") else {}
    for name, parameter in signature(pipeline.__call__).parameters.items():
        wanted = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if name == "image" or wanted:
            given.setdefault(name, f"{name}=[0], " if name == "class_labels" else f"{name}={name}, ")
    return "".join(given.values())


# ----- quality -----


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that name their method, NFE and number of samples."""
    return [row for row in report.get("rows") or [] if {"method", "nfe", "num_samples"} <= row.keys()]


def _measured(row: dict[str, Any], metric: str) -> bool:
    return isinstance(row.get(metric), int | float) and math.isfinite(row[metric])


def _metric_name(metric: str, report: dict[str, Any]) -> str:
    features = report.get("features") if metric in ("fd", "kid") else None
    return f"{MEASURES[metric].head}, {features}" if features else MEASURES[metric].head


def _eval_results(report: dict[str, Any]) -> list[EvalResult] | None:
    """The measured rows of this model, for the model-index."""
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=str(row["dataset"]),
            dataset_name=str(row["dataset"]),
            metric_type=kind,
            metric_name=f"{_metric_name(metric, report)}, {network_calls([row['nfe']])}, {row['num_samples']} images",
            metric_value=round(MEASURES[metric].factor * row[metric], 4),
        )
        for row in _rows(report)
        if row["method"] == "HSIVI" and row.get("dataset")
        for metric, kind in DISTANCES.items()
        if _measured(row, metric)
    ]
    return results or None


def _quality(run: dict[str, Any]) -> str:
    """A table of the report, by NFE and then by its headline, which is the first measure, with notes and figures."""
    report = run["report"]
    rows = _rows(report)
    if not rows:
        return UNMEASURED
    headline = report["headline"] if report.get("headline") in REPORTED else "fd"
    others = [metric for metric in REPORTED if metric != headline and any(_measured(row, metric) for row in rows)]
    metrics = [headline, *others]

    def line(row: dict[str, Any]) -> list[str]:
        method = "**HSIVI, this model**" if row["method"] == "HSIVI" else _plain(row["method"])
        values = [format_cell(metric, row, "-") for metric in metrics]
        return [_plain(row["nfe"]), method, *values, _plain(row["num_samples"])]

    rows.sort(key=lambda row: (row["nfe"], row[headline] if _measured(row, headline) else math.inf))
    if isinstance(report.get("floor"), dict):
        rows.insert(0, {"nfe": "", "method": HALVES, "num_samples": "", **report["floor"]})
    heads = ["NFE", "method", *(_plain(_metric_name(metric, report)) for metric in metrics), "images"]
    first, *lines = (f"| {' | '.join(cells)} |" for cells in [heads, *map(line, rows)])
    notes = (
        "NFE: network calls per image; FD: Frechet distance; SWD: sliced Wasserstein distance. Lower is better, except "
        "for precision, recall and coverage. All methods sample the same teacher from the same noise, and are compared "
        f"to {_plain(report.get('reference') or 'the reference')}."
    )
    notes += " FD of pixels: of up to 64 of their principal components." if "pixel_fd" in metrics else ""
    notes += " A KID below 0 is measurement noise." if "kid" in metrics else ""
    notes += " The number after ± is the standard error of KID." if any("kid_error" in row for row in rows) else ""
    notes += f" {_plain(report['measured'])}" if report.get("measured") else ""
    figures = {"samples": "![Rows of images of each method](comparison.png)", "curve": "![The curve](curve.png)"}
    table = "\n".join([first, f"|---:|---|{'---:|' * (len(heads) - 2)}", *lines])
    return "\n\n".join([table, notes, *(figure for name, figure in figures.items() if name in run)])


# ----- training -----


def _training(scheduler: Any, run: dict[str, Any]) -> str:
    options, training = run["options"], run["training"]
    noise = "layers that add new noise to the clean image"
    if scheduler.config.kernel == "ddim":
        noise = f"DDIM layers of eta {scheduler.config.noise_eta:g}"
    grids = [scheduler.levels.time(torch.tensor(grid[:-1])).tolist() for grid in scheduler.trained_grids]
    times = [f"[{', '.join(f'{time:g}' for time in grid)}]" for grid in grids]
    text = (
        f"{network_calls(scheduler.depths).capitalize()} at the timesteps {one_of(times)}, {noise}. Each is a "
        "conditional distribution, trained so that its marginal matches the data at a noise level, whose score the "
        "teacher gives. No images were used."
    )
    if options.get("num_pairs"):
        text += " Pairs of noise and the point to which the teacher's ODE leads it taught the first one."
    if start := training.get("start"):
        text += f" The student started from {_plain(start)}, which may have used some; its licence applies here, too."
    if scales := scheduler.guidance_scales:
        decays = renamed(options).get("decay_guidance") and not training.get("embeds_guidance")
        less = ", decreased with noise during training," if decays else ""
        chosen = one_of([f"{w:g}" for w in scales])
        text += f" Classifier-free guidance of scale {chosen}{less} is distilled into the weights."
    settings = ", ".join(f"{name} {_plain(options[name])}" for name in OPTIONS if options.get(name) is not None)
    if settings:
        text += f"\n\nTrained by hsivi_diffusers: {settings}."
    if training.get("processes") and training.get("seconds"):
        several, peak = training["processes"] > 1, training.get("peak_memory_mib")
        memory = f", and at most {peak:,} MiB of memory{' in the first' * several}" if peak else ""
        text += f" It took {training['seconds']:.0f} s in {training['processes']} process{'es' * several}{memory}."
    return text
