"""The model card of a distilled sampler, from the pipeline and the folder of its run: how to use it, how good it is."""

import html
import math
import re
import textwrap
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..pipeline_hsivi import HSIVIPipeline, network_calls, one_of
from ..runs.measures import HALVES, MEASURES, REPORTED, written

DISTANCES = {
    "fd": "frechet_distance",
    "kid": "kid_x_1000",
    "pixel_fd": "pixel_frechet_distance",
    "swd": "sliced_wasserstein_distance",
}  # of the model-index
# The options of a run that a reader of its card wants to know.
TOLD = (
    "preset",
    "objective",
    "scoring",
    "guidance_scale",
    "lora_rank",
    "max_train_steps",
    "train_batch_size",
    "learning_rate",
    "critic_learning_rate",
    "seed",
)

BY = (
    "by hierarchical semi-implicit variational inference (HSIVI, [arXiv 2310.17153](https://arxiv.org/abs/2310.17153))."
)
CODE = """\
```python
{imports}

pipeline = {name}.from_pretrained("{repo_id}"{options})
images = pipeline({inputs}).images
```"""

USE = """\
With the package `hsivi_diffusers` installed (without it, use the code in this repository, below):

{installed}

{more}{without}

{alone}

The number of steps is part of the sampler: {counts}."""

ADAPTER_USE = """\
```python
import torch
from diffusers import DiffusionPipeline
from hsivi_diffusers import HSIVIScheduler

pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float32)  # float16 on a GPU
pipeline.load_lora_weights("{repo_id}")
pipeline.scheduler = HSIVIScheduler.from_pretrained("{repo_id}", subfolder="scheduler")
images = pipeline("a prompt", num_inference_steps={steps}, guidance_scale=1).images
```

{guides} Negative prompts have no effect at `guidance_scale=1`. LoRAs of a style go along with it: give each an
`adapter_name` and choose by `set_adapters`."""

WITHOUT = (
    "Without the package, with the code that is in this repository ({files}; read it first). If the repository is "
    "private, log in with `hf auth login` or set `HF_TOKEN`:"
)

MORE = """\
After `import hsivi_diffusers`, `DiffusionPipeline.from_pretrained` loads it as well.{half}

{stock}

"""


GUIDES = """\
{why} If the images must be the same each time, call `torch.manual_seed` before, for some pipelines pass no generator to
the steps.

"""
TWICE = "Guidance is in the weights: a larger `guidance_scale` would guide a second time."
NEVER = "It was trained without guidance, so keep `guidance_scale=1`."


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
    """Writes the card from what `read_run` returned; `fp16` and `drawn` tell of half precision and of samples.png."""
    counts = pipeline.scheduler.depths
    tag = "text-to-image" if hasattr(pipeline, "tokenizer") else "unconditional-image-generation"
    data = {"pipeline_tag": tag, "license": license, "base_model": base_model}
    data_used = "with" if run["options"].get("train_data") else "without"  # an earlier version could use some
    sections = [
        f"A sampler of **{network_calls(counts)}**, distilled from {_link(base_model)} {data_used} training data, {BY}",
        f"![Images drawn by this model, {network_calls(counts[-1:])} each](samples.png)" if drawn else _grid(run),
        f"## Use it\n\n{_usage(pipeline, repo_id, counts, fp16)}",
    ]
    results = _eval_results(run["report"])
    return _write(repo_id, pipeline.scheduler, run, sections, (), eval_results=results, **data)


def make_adapter_card(
    scheduler: Any, repo_id: str, run: dict[str, Any], base_model: str | None = None, license: str | None = None
) -> ModelCard:
    """Writes the card of a LoRA file with its scheduler, which are loaded into a stock pipeline of the teacher."""
    counts, guides = scheduler.depths, TWICE if scheduler.guidance_scales else NEVER
    names = {"base": base_model or "REPO_OF_THE_TEACHER", "repo_id": repo_id, "steps": counts[-1], "guides": guides}
    sections = [
        f"A LoRA with which {_link(base_model)} draws in **{network_calls(counts)}**, distilled without images, {BY}",
        _grid(run),
        f"## Use it\n\n{ADAPTER_USE.format(**names)}",
    ]
    data = {"pipeline_tag": "text-to-image", "license": license, "base_model": base_model}
    return _write(repo_id, scheduler, run, sections, ["lora"], eval_results=_eval_results(run["report"]), **data)


def _grid(run: dict[str, Any]) -> str:
    """The sample grid that a run drew at its end."""
    if "grid" not in run:
        return ""
    figure = "![First row: the teacher in many steps. Below: this model](samples.png)"
    text = "First row: the teacher in many steps. Below: this model, from the same noise."
    if prompts := run.get("prompts"):
        text += f" The columns are of the prompts {', '.join(_plain(prompt) for prompt in prompts)}, in turn."
    return f"{figure}\n\n{text}"


def _link(base_model: str | None) -> str:
    return f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a pretrained diffusion model"


def _write(
    repo_id: str, scheduler: Any, run: dict[str, Any], sections: list[str], tags: Sequence[str], **data: Any
) -> ModelCard:
    """Writes a card: its metadata, the sections given, and those that all cards have."""
    name = repo_id.split("/")[-1]
    tags = ["diffusers", "hsivi", "few-step", "distillation", "arxiv:2310.17153", *tags]
    head = ModelCardData(library_name="diffusers", model_name=name, tags=tags, **data)
    last = [
        f"## Quality\n\n{_quality(run)}",
        f"## Training\n\n{_training(scheduler, run)}",
        f"## Limits\n\n{_limits(scheduler.depths, data['license'])}",
    ]
    body = "\n\n".join(section for section in [f"# {name}", *sections, *last] if section)
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n")


def _headline(report: dict[str, Any]) -> str:
    """The measure that a report is about."""
    return report["headline"] if report.get("headline") in REPORTED else "fd"


def _metric_name(metric: str, report: dict[str, Any]) -> str:
    features = report.get("features") if metric in ("fd", "kid") else None
    return f"{MEASURES[metric].head}, {features}" if features else MEASURES[metric].head


def _measured(row: dict[str, Any], metric: str) -> bool:
    return isinstance(row.get(metric), int | float) and math.isfinite(row[metric])


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that name their method, NFE and number of samples."""
    return [row for row in report.get("rows") or [] if {"method", "nfe", "num_samples"} <= row.keys()]


def _plain(text: Any) -> str:
    """Text of a file of the run as one line that Markdown and HTML show as it is, also in a cell of a table."""
    return html.escape(re.sub(r"([\\`*_\[\]#|])", r"\\\1", " ".join(str(text).split())), quote=False)


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


def _usage(pipeline: DiffusionPipeline, repo_id: str, counts: list[int], fp16: bool) -> str:
    """Snippets: with the package, in a stock pipeline, without the package; of several counts with the largest."""

    def code(name: str, inputs: str, imports: str, options: str = "") -> str:
        return CODE.format(name=name, inputs=inputs, imports=imports, options=options, repo_id=repo_id)

    steps = f"num_inference_steps={counts[-1]}"
    if not is_ours(pipeline):
        guides = "guidance_scale" in signature(pipeline.__call__).parameters
        name, inputs = type(pipeline).__name__, f"{_inputs(pipeline)}{steps}{', guidance_scale=1' * guides}"
        imports = f"from diffusers import {name}"
        return USE.format(
            installed=code(name, inputs, f"import hsivi_diffusers\n{imports}"),
            more=GUIDES.format(why=TWICE if pipeline.scheduler.guidance_scales else NEVER) if guides else "",
            without=textwrap.fill(WITHOUT.format(files="`scheduler/hsivi_diffusers.py`"), 120),
            alone=code(name, inputs, imports, ", trust_remote_code=True"),
            counts=f"pass {one_of(counts)}, any other is refused",
        )
    classes = pipeline.num_classes
    inputs = "batch_size=16" + (f", {steps}" if len(counts) > 1 else "")
    inputs += f", class_labels=[i % {classes} for i in range(16)]" if classes else ""
    scales = pipeline.scheduler.guidance_scales
    inputs += f", guidance_scale={scales[-1]}" if len(scales) > 1 else ""
    imports = "import hsivi_diffusers\nfrom diffusers import DDPMPipeline"
    stock = f"In a pipeline of diffusers:\n\n{code('DDPMPipeline', f'batch_size=16, {steps}', imports)}"
    if classes:
        stock = "A stock DDPMPipeline cannot draw with it, for it passes no class labels."
    elif pipeline.unet_noise_scale is not None:
        stock = "A stock DDPMPipeline cannot draw with it, for it does not know the learned noise scale, one per pixel."
    files = "`pipeline.py`, and `hsivi_diffusers.py` in the folders of the components"
    half = ' For half precision add `variant="fp16"` and `.to(torch.float16)`.' if fp16 else ""
    return USE.format(
        installed=code("HSIVIPipeline", inputs, "from hsivi_diffusers import HSIVIPipeline"),
        more=MORE.format(half=half, stock=stock),
        without=textwrap.fill(WITHOUT.format(files=files), 120),
        alone=code(
            "DiffusionPipeline",
            inputs,
            "from diffusers import DiffusionPipeline",
            f', custom_pipeline="{repo_id}", trust_remote_code=True',
        ),
        counts=f"{one_of(counts)}, and no other",
    )


def _inputs(pipeline: DiffusionPipeline) -> str:
    """What a call of the stock pipeline needs, as code; the reader fills in the names."""
    given = {"prompt": '"a prompt", '} if hasattr(pipeline, "tokenizer") else {}
    for name, parameter in signature(pipeline.__call__).parameters.items():
        wanted = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if name == "image" or wanted:
            given.setdefault(name, f"{name}=[0], " if name == "class_labels" else f"{name}={name}, ")
    return "".join(given.values())


def _quality(run: dict[str, Any]) -> str:
    report = run["report"]
    rows, headline = _rows(report), _headline(report)
    if not rows:
        return "Not measured yet."
    notes = [
        "NFE: network calls for one image; FD: Frechet distance; SWD: sliced Wasserstein distance. Lower is better, "
        "but for precision, recall and coverage. All methods sample the same teacher from the same noise, and are "
        f"compared to {_plain(report.get('reference') or 'the reference')}.",
        "FD of pixels: of up to 64 of their principal components." if any("pixel_fd" in row for row in rows) else "",
        "A KID below 0 is noise of the measurement." if headline == "kid" else "",
        _plain(report.get("measured") or ""),
    ]
    figures = {"samples": "![Rows of images of each method](comparison.png)", "curve": "![The curve](curve.png)"}
    parts = [_quality_table(rows, report), " ".join(note for note in notes if note)]
    return "\n\n".join([*parts, *(line for name, line in figures.items() if name in run)])


def _quality_table(rows: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """By network calls, then by the headline, which comes first of what was measured."""
    headline = _headline(report)
    others = [metric for metric in REPORTED if metric != headline and any(_measured(row, metric) for row in rows)]

    def place(row: dict[str, Any]) -> tuple[Any, float]:
        return row["nfe"], row[headline] if _measured(row, headline) else math.inf

    def line(row: dict[str, Any]) -> list[str]:
        method = "**HSIVI, this model**" if row["method"] == "HSIVI" else _plain(row["method"])
        distances = [written(metric, row[metric]) if _measured(row, metric) else "-" for metric in (headline, *others)]
        return [_plain(row["nfe"]), method, *distances, _plain(row["num_samples"])]

    heads = ["NFE", "method", *(_plain(_metric_name(metric, report)) for metric in (headline, *others)), "images"]
    measured = [*map(line, sorted(rows, key=place))]
    if floor := report.get("floor"):
        found = floor if isinstance(floor, dict) else {headline: floor}  # one number in reports of before
        measured = [line({"nfe": "", "method": HALVES, "num_samples": "", **found}), *measured]
    first, *lines = (f"| {' | '.join(cells)} |" for cells in [heads, *measured])
    return "\n".join([first, f"|---:|---|{'---:|' * (len(heads) - 2)}", *lines])


def _training(scheduler: Any, run: dict[str, Any]) -> str:
    config, options, training = scheduler.config, run["options"], run["training"]
    noise = f"DDIM layers of eta {config.noise_eta}"
    if config.kernel != "ddim":
        noise = "layers that add new noise to the clean image"
    calls, grids = network_calls(scheduler.depths), scheduler.trained_grids
    data = "Real images of its training data were used too." if options.get("train_data") else "No images were used."
    times = [scheduler.levels.time(torch.tensor(grid[:-1])).tolist() for grid in grids]
    text = (
        f"{calls.capitalize()} at the timesteps {one_of(times)}, {noise}. Each is a "
        "conditional distribution, trained so that its marginal matches the data at a noise level, which the score of "
        f"the teacher knows. {data}"
    )
    if scales := scheduler.guidance_scales:
        less = ", in training weaker the more noise there is" if options.get("guidance_falls") else ""
        text += f" It has taken in classifier-free guidance of scale {one_of(scales)}{less}, at no further call."
    settings = ", ".join(f"{name} {_plain(options[name])}" for name in TOLD if options.get(name) is not None)
    if settings:
        text += f"\n\nTrained by hsivi_diffusers: {settings}."
    if training.get("processes") and training.get("seconds"):
        processes = f"{training['processes']} process{'es' * (training['processes'] > 1)}"
        where, peak = " in the first" * (training["processes"] > 1), training.get("peak_memory_mib")
        memory = f", and at most {peak:,} MiB of memory{where}" if peak else ""
        text += f" It took {training['seconds']:.0f} s in {processes}{memory}."
    return text


def _limits(counts: list[int], license: str | None) -> str:
    terms = "" if license else " No licence was stated at the upload; terms of the teacher may apply to this model too."
    return (
        f"It draws with {network_calls(counts)} only. It has the faults and biases of its teacher, and it can draw "
        "some kinds of images more often than the teacher does: look at many before you rely on their frequencies. It "
        f"has no content filter.{terms}"
    )
