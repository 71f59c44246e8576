"""What a distillation is told: its options, the presets, and what of them cannot run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..hub import check_repo_id
from ..options import changes, flatten, option, parse_options
from .checkpoints import Output, check_output

PRESETS: dict[str, dict[str, Any]] = {
    # DDIM layers of eta 1, scored by the KL gradient at a random level between output and input: half of the rows
    # diffused to it, half on the way to it; pictures are clipped as when they are drawn. The chain starts where the
    # picture begins to show, at 440 of 8x8 pixels and 674 of 32x32, 750 in colour; both learning rates fall to 0.
    "fast": {
        "kernel": "ddim",
        "noise_eta": 1.0,
        "timestep_spacing": "uniform",
        "start_signal": 3.2,
        "clip_pictures": True,
        "objective": "KL",
        "scoring": "between",
        "layer_weight": "unit",
        "critic_weight": "unit",
        "source": "pool",
        "critic_updates": 1,
        "noise_scale_type": "config",
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "critic_learning_rate": 1e-3,
        "critic_lr_scheduler": "cosine",
    },
    # The recipe of the paper: DDIM layers of eta 0.2, each scored at its own level, 20 critic updates, fresh chains.
    "paper": {
        "kernel": "ddim",
        "noise_eta": 0.2,
        "timestep_spacing": "quadratic",
        "objective": "SM",
        "alpha": 0.5,
        "scoring": "own",
        "layer_weight": "sigma2",
        "critic_weight": "sigma2",
        "source": "simulate",
        "critic_updates": 20,
        "noise_scale_type": "per_pixel",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant_with_warmup",
        "critic_learning_rate": 1e-4,
    },
}
# What `fast` has in their place for a sampler of one call: regression on pairs of the teacher's ODE comes first, then
# the critic alone, and the layer moves slowly, for nothing but its inputs tells it what it has lost.
ONE_CALL: dict[str, Any] = {
    "start_signal": None,
    "start_noise": 2.5,
    "ode_pairs": 6400,
    "critic_first": 50,
    "critic_updates": 2,
    "learning_rate": 3e-5,
    "critic_learning_rate": 5e-4,
    "max_grad_norm": 20.0,
}


@dataclass
class Teacher:
    _argument_group_name = "teacher"
    pretrained_teacher_model: str | None = option(None, "folder or repo id of a diffusers pipeline with a UNet2DModel")
    revision: str | None = option(None, "branch, tag or commit of the repo")
    init_from: str | None = option(
        None, "folder of a finished run: layers, critic and noise scale start from its, on whatever grid"
    )


@dataclass
class Layers:
    _argument_group_name = "layers (the sampler)"
    num_layers: list[int] = option(
        [5], "T: network calls of the sampler; several, such as 1 2 4 8, train one student for all"
    )
    timestep_spacing: Literal["quadratic", "uniform"] = option("quadratic", "how the grid is spread over the clock")
    start_timestep: int | None = option(
        None,
        "tau_T, the timestep of the first call; by default that of --start_noise, or of --start_signal, or else the "
        "spacing's own",
    )
    start_signal: float | None = option(
        None, "start where sqrt(channels height width) alpha / sigma has fallen to this, and not at a timestep"
    )
    start_noise: float | None = option(
        None, "start where sigma / (sqrt(channels) alpha) has risen to this, whatever the size of the pictures"
    )
    start_spacing: int = option(
        0, "with several T, timesteps from the start of one grid to that of the next, by which the network tells them"
    )
    kernel: Literal["ddim", "renoise"] = option(
        "ddim", "noise of a layer: DDIM(eta), or fresh noise on the clean picture"
    )
    noise_eta: float = option(0.2, "eta of the ddim kernel, 0 to 1")
    noise_scale_type: Literal["config", "scalar", "per_layer", "per_pixel"] = option(
        "config", "keep the noise scale at 1, or learn one: a single number, one for each layer, or one for each pixel"
    )
    clip_pictures: bool = option(
        False, "clip the mean of the last layer to black and white in training too; its gradient passes"
    )

    @property
    def has_start(self) -> bool:
        """Whether anything but the spacing says where the first grid starts."""
        return any(start is not None for start in (self.start_timestep, self.start_signal, self.start_noise))

    def __post_init__(self) -> None:
        self.num_layers = sorted(self.num_layers)


@dataclass
class Method:
    _argument_group_name = "method"
    preset: Literal["fast", "paper"] = option(
        "fast",
        "recipe, whose settings are listed at the end; the options of --config and of the command line override it; "
        "with --num_layers 1 fast has some others, see docs/training.md",
    )
    objective: Literal["SM", "KL"] = option("SM", "HSIVI-SM (score matching, the paper) or HSIVI-KL")
    alpha: float = option(0.5, "of SM: 0.5 is the paper, up to 1.2 the fused loss of score identity distillation")
    scoring: Literal["own", "random", "between"] = option(
        "own",
        "score a layer at its own level, or diffused to a random one, or, a share of the rows, at a random one between "
        "its output and its input, of which it then keeps noise",
    )
    between_share: float = option(
        0.5, "of --scoring between: share of the rows below a layer's input, above 0, up to 1"
    )
    level_min: int = option(5, "lowest timestep of random levels")
    level_max: int | None = option(
        None, "highest timestep of random levels; by default where sqrt(channels height width) alpha / sigma is 0.312"
    )
    level_law: Literal["layer", "uniform"] | None = option(
        None,
        "random levels of a layer: between its output and input (ddim by default), or anywhere (renoise by default)",
    )
    level_power: float = option(1.0, "p > 0: levels are low + (high - low) u^p, u uniform; above 1 there is less noise")
    layer_weight: Literal["unit", "sigma2", "normalised"] = option("unit", "weight of the layers' loss, in noise units")
    critic_weight: Literal["unit", "sigma2"] = option("unit", "weight of the critic's loss, in noise units")
    teacher_share: float = option(
        0.0, "share of the teacher's score in the critic's target, from 0 to below 1; 0.5 is CoSIM"
    )
    source: Literal["pool", "simulate", "data"] = option(
        "pool", "layer inputs from a pool of live chains, from fresh ones, or from noised pictures of --train_data"
    )
    critic_updates: int = option(1, "critic updates for each layer update")
    ode_pairs: int = option(
        0,
        "pairs of noise and what a solver of the teacher makes of it, on which the layers are fitted before all else; "
        "0 is none",
    )
    ode_calls: int = option(8, "network calls of the solver for a pair")
    ode_steps: int = option(500, "updates of that fit")
    ode_learning_rate: float = option(5e-4, "Adam's in it; it falls to 0")
    ode_weight: float = option(
        0.005,
        "weight of the pairs in the loss of the layers that take noise, after it, in the units of their mean: of two "
        "layers about 0.02 is what 0.005 is of one, of four 0.15; it falls as the rate of the layers does",
    )
    ode_coarse: float = option(
        20.0, "what the coarse part of a miss, its means over 4 x 4 fields, counts in that on top; 0 is nothing"
    )
    train_data: str | None = option(
        None, "real pictures, for --source data and --adversarial_weight: `digits`, a folder, or a dataset's name"
    )
    adversarial_weight: float = option(
        0.0, "lambda of an adversarial term on the critic's features, against --train_data; 0 is none, try 0.001"
    )


@dataclass
class Training:
    _argument_group_name = "training"
    seed: int = option(0, "seed of everything")
    max_train_steps: int = option(1000, "layer updates")
    train_batch_size: int = option(64, "rows of an update, per process and accumulation step")
    learning_rate: float = option(2e-4, "Adam's, of the layers")
    critic_learning_rate: float = option(5e-4, "Adam's, of the critic")
    noise_scale_learning_rate: float = option(1e-2, "Adam's, of the log noise scale")
    adam_beta1: float = option(0.0, "first-moment decay of both optimizers")
    adam_beta2: float = option(0.999, "second-moment decay of both optimizers")
    lr_scheduler: str = option("cosine", "of the layers, a name known to diffusers' get_scheduler")
    critic_lr_scheduler: str = option("constant_with_warmup", "of the critic")
    lr_warmup_steps: int = option(50, "layer updates of warm-up")
    critic_first: int = option(0, "of the layer updates the first ones, in which the critic alone learns")
    max_grad_norm: float | None = option(None, "clip the gradient of either player to this norm")
    ema_decay: float = option(0.995, "decay of the averaged layers, which are saved")


@dataclass
class Hardware:
    _argument_group_name = "hardware"
    gradient_accumulation_steps: int = option(1, "batches of an update, one after the other, in each process")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the networks; that of `accelerate config` by default"
    )
    gradient_checkpointing: bool = option(False, "compute activations twice rather than keep them")
    allow_tf32: bool = option(False, "let matrix products of an Ampere GPU round their factors to TF32")


@dataclass
class Validation:
    _argument_group_name = "validation"
    validation_steps: int | None = option(None, "layer updates between sample grids of the averaged layers")
    validation_samples: int = option(500, "pictures drawn for the Frechet distance")
    validation_data: str | None = option(
        None, "real pictures to measure the distance to: `digits`, a folder, or a dataset's name; none by default"
    )
    feature_extractor: str = option("assets/digits_classifier", "folder of the ImageClassifier it is measured in")


@dataclass
class Run(Output):
    plan: bool = option(False, "say what the run would cost, and do not start it")
    report_to: str | None = option(None, "trackers of accelerate: tensorboard, wandb, comet_ml or all")
    logging_dir: str = option("logs", "folder of the trackers, inside output_dir")
    tracker_project_name: str = option("hsivi", "project name for the trackers")


@dataclass
class Hub:
    _argument_group_name = "hub"
    push_to_hub: bool = option(False, "push the pipeline to the Hub at the end")
    hub_model_id: str | None = option(None, "repo to push to: user/name or organisation/name")
    hub_token: str | None = option(None, "access token; that of `hf auth login` by default")
    hub_private_repo: bool = option(False, "make a new repo private")
    hub_exist_ok: bool = option(False, "add to a repo that holds files; replaces its weights and README.md")


GROUPS = (Teacher, Layers, Method, Training, Hardware, Validation, Run, Hub)


class Options(NamedTuple):
    """All options of a run, in the order of GROUPS."""

    teacher: Teacher
    layers: Layers
    method: Method
    training: Training
    hardware: Hardware
    validation: Validation
    run: Run
    hub: Hub


def parse_recipe(description: str, args: Sequence[str] | None = None) -> Options:
    """Reads the options; preset `fast` for one network call has the settings of ONE_CALL.

    A start that is named goes before theirs, and of a short run the critic has a sixth at most to learn alone. A run of
    --init_from has a layer and a critic that have learned already, so it takes neither pairs nor updates of the critic
    alone.
    """
    options = Options(*parse_options(GROUPS, description, PRESETS, args))
    if options.method.preset == "fast" and options.layers.num_layers == [1]:
        first = min(ONE_CALL["critic_first"], options.training.max_train_steps // 6)
        fast = {**PRESETS["fast"], **ONE_CALL, "start_noise": None, "critic_first": first}
        if options.teacher.init_from is not None:
            fast.update(ode_pairs=0, critic_first=0)
        options = Options(*parse_options(GROUPS, description, {**PRESETS, "fast": fast}, args))
        if not options.layers.has_start:
            options.layers.start_noise = ONE_CALL["start_noise"]
    return options


def chosen(options: Options) -> dict[str, Any]:
    """The options of layers, method and training that are not the defaults."""
    defaults = _defaults()
    return {name: value for name, value in flatten(options[1:4]).items() if value != defaults[name]}


def changes_of_chosen(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says in which options two of what `chosen` returned differ; nothing if in none."""
    return changes({**_defaults(), **before}, {**_defaults(), **now})


def _defaults() -> dict[str, Any]:
    """Of the options of layers, method and training."""
    return flatten([group() for group in GROUPS[1:4]])


def complete(options: Options) -> None:
    """Fills in what the run of --init_from tells: the teacher it had.

    Raises:
        ValueError: That folder is no finished run.
    """
    teacher = options.teacher
    if teacher.init_from is None:
        return
    run = Path(teacher.init_from)
    missing = [name for name in ("pipeline", "critic", "options.json") if not (run / name).exists()]
    if missing:
        raise ValueError(f"--init_from {run} lacks {', '.join(missing)}: give the folder of a finished run")
    if teacher.pretrained_teacher_model is None:
        before = json.loads((run / "options.json").read_text())
        teacher.pretrained_teacher_model, teacher.revision = before["pretrained_teacher_model"], before["revision"]


def check_options(options: Options) -> None:
    """Refuses, before any work, what could not run."""
    teacher, layers, method, training, hardware, validation, run, hub = options
    if not teacher.pretrained_teacher_model:
        raise ValueError("--pretrained_teacher_model is missing: give a folder or repo id of a diffusers pipeline")
    if layers.kernel == "ddim" and layers.noise_eta == 0:
        raise ValueError("--noise_eta 0 leaves the layers no noise, and so no score to train on: give up to 1, say 0.2")
    if teacher.init_from and run.output_dir and Path(teacher.init_from).resolve() == Path(run.output_dir).resolve():
        raise ValueError(f"--init_from {teacher.init_from} is the --output_dir too: name another, or it would be lost")
    check_output(run)
    if validation.validation_data and not validation.validation_steps:
        raise ValueError("--validation_data is measured every --validation_steps: give that too, say 500")
    if validation.validation_samples < 2:
        raise ValueError(f"--validation_samples {validation.validation_samples}: a distance needs at least 2")
    if training.max_grad_norm is not None and not training.max_grad_norm > 0:
        raise ValueError(f"--max_grad_norm {training.max_grad_norm}: give a number above 0, or leave it out")
    check_layers(layers)
    check_start(layers)
    check_scoring(layers, method)
    check_method(method)
    check_unused(layers, method)
    check_pairs(layers, method)
    check_hub(hub)
    check_counts(options)


def check_layers(layers: Layers) -> None:
    """Refuses step counts that are none, or named twice, and a noise scale that has no meaning for several."""
    counts = layers.num_layers
    given = f"--num_layers {' '.join(map(str, counts))}"
    if not counts or len(set(counts)) < len(counts):
        raise ValueError(f"{given}: give one number of network calls, or several that differ, such as 1 2 4 8")
    if len(counts) > 1 and layers.noise_scale_type == "per_layer":
        raise ValueError(
            f"--noise_scale_type per_layer goes with one number of layers, and {given} has {len(counts)}: use scalar "
            "or per_pixel"
        )


def check_start(layers: Layers) -> None:
    """Refuses a start that is none, and one for each grid without a first."""
    for name, value, fast in [("start_signal", layers.start_signal, 3.2), ("start_noise", layers.start_noise, 2.5)]:
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value}: give a number above 0; that of preset fast is {fast}")
    if layers.start_spacing and (not layers.has_start or layers.start_spacing < 0):
        raise ValueError(
            f"--start_spacing {layers.start_spacing}: give 0 or more, and with it --start_timestep, --start_signal or "
            "--start_noise, where the first grid starts"
        )


def check_scoring(layers: Layers, method: Method) -> None:
    """Refuses scoring that does not go with the layers or the objective."""
    if method.scoring == "between" and layers.kernel != "ddim":
        raise ValueError(
            f"--scoring between with --kernel {layers.kernel}: such a layer keeps no noise of its input, so there is "
            "nothing between: use --kernel ddim, or --scoring random"
        )
    if method.scoring == "between" and method.objective != "KL":
        raise ValueError(
            f"--scoring between with --objective {method.objective}: its rows have a law that is theirs at the optimum "
            "alone, which the KL gradient bears and score matching does not: use --objective KL, or --scoring random"
        )
    if method.between_share == 1 and layers.noise_scale_type != "config":
        raise ValueError(
            f"--between_share 1 with --noise_scale_type {layers.noise_scale_type}: rows between the ends of a layer "
            "have no gradient for its noise scale, so leave it some others, say 0.5, or use --noise_scale_type config"
        )
    if method.scoring == "random" and layers.noise_scale_type != "config" and layers.kernel == "renoise":
        raise ValueError(
            "--scoring random with --kernel renoise cannot learn a noise scale, for the law of the scored picture does "
            "not depend on it: use --noise_scale_type config"
        )


def check_method(method: Method) -> None:
    """Refuses numbers out of their range, and real pictures that are missing or that nothing would use."""
    for name, value, good, advice in [
        ("alpha", method.alpha, 0.5 <= method.alpha <= 1.2, "0.5, which is the paper, up to 1.2"),
        ("between_share", method.between_share, 0 < method.between_share <= 1, "a number above 0 and up to 1"),
        ("teacher_share", method.teacher_share, 0 <= method.teacher_share < 1, "a number from 0 to below 1"),
        ("level_power", method.level_power, method.level_power > 0, "a number above 0; 1 is uniform"),
        ("adversarial_weight", method.adversarial_weight, method.adversarial_weight >= 0, "a number from 0 on"),
    ]:
        if not good:
            raise ValueError(f"--{name} {value}: give {advice}")
    uses = [f"--source {method.source}"] if method.source == "data" else []
    uses += [f"--adversarial_weight {method.adversarial_weight}"] if method.adversarial_weight else []
    if uses and not method.train_data:
        raise ValueError(f"{' and '.join(uses)} needs real pictures: name them by --train_data")
    if method.train_data and not uses:
        raise ValueError(
            f"--train_data {method.train_data} would not be used: pass --source data or --adversarial_weight too, or "
            "leave it out"
        )


def check_unused(layers: Layers, method: Method) -> None:
    """Refuses options of levels, grids and sources that the others leave nothing to do."""
    names = ("level_law", "level_power", "level_min", "level_max")
    levels = [f"--{name} {value}" for name in names if (value := getattr(method, name)) != getattr(Method(), name)]
    if levels and method.scoring == "own":
        raise ValueError(
            f"{' and '.join(levels)} would not be used: --scoring own has no random levels. Either pass --scoring "
            "random or between too, or leave out what is of levels"
        )
    if method.alpha != 0.5 and method.objective != "SM":
        raise ValueError(
            f"--alpha {method.alpha} would not be used: --objective is {method.objective}, and it is of SM: "
            "pass --objective SM too, or leave it out"
        )
    if method.between_share != 0.5 and method.scoring != "between":
        raise ValueError(
            f"--between_share {method.between_share} would not be used: --scoring {method.scoring}: pass --scoring "
            "between too, or leave it out"
        )
    if layers.start_spacing and len(layers.num_layers) == 1:
        raise ValueError(
            f"--start_spacing {layers.start_spacing} would not be used: --num_layers {layers.num_layers[0]} has one "
            "grid: give several, such as 1 2 4 8, or leave it out"
        )
    if method.source == "data" and layers.num_layers == [1] and not method.adversarial_weight:
        raise ValueError(
            "--source data would not be used: the one layer of --num_layers 1 starts from noise. Either pass several "
            "--num_layers, or --adversarial_weight, or leave out --source and --train_data"
        )


def check_pairs(layers: Layers, method: Method) -> None:
    """Refuses numbers of pairs that are none, and those that nothing would use."""
    numbers = {name: getattr(method, name) for name in ("ode_calls", "ode_steps", "ode_learning_rate")}
    weights = {"ode_weight": method.ode_weight, "ode_coarse": method.ode_coarse}
    for name, value in [("ode_pairs", method.ode_pairs), *weights.items()]:
        if not value >= 0:
            raise ValueError(f"--{name} {value}: give a number from 0 on")
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"--{name} {value}: give a number above 0")
    if method.ode_pairs and layers.noise_scale_type != "config":
        raise ValueError(
            f"--noise_scale_type {layers.noise_scale_type} has nothing to learn from pairs, whose ends have no noise: "
            "leave it out, or pass --ode_pairs 0"
        )
    if method.ode_pairs and not method.ode_weight and method.ode_coarse != Method().ode_coarse:
        raise ValueError(
            f"--ode_coarse {method.ode_coarse} is of the loss that --ode_weight 0 leaves out: leave it out, too"
        )
    used = {**numbers, **weights}
    changed = [f"--{name} {value}" for name, value in used.items() if value != getattr(Method(), name)]
    if changed and not method.ode_pairs:
        raise ValueError(f"{' and '.join(changed)} would not be used: pass --ode_pairs too, say 6400, or leave it out")


def check_counts(options: Options) -> None:
    """Refuses what must be a number of at least 1."""
    _, layers, method, training, hardware, validation, _, _ = options
    for name, value in [
        ("num_layers", min(layers.num_layers)),
        ("critic_updates", method.critic_updates),
        ("max_train_steps", training.max_train_steps),
        ("train_batch_size", training.train_batch_size),
        ("gradient_accumulation_steps", hardware.gradient_accumulation_steps),
        ("validation_steps", 1 if validation.validation_steps is None else validation.validation_steps),
    ]:
        if value < 1:
            raise ValueError(f"--{name} {value}: give a number of at least 1")
    if not 0 <= training.critic_first < training.max_train_steps:
        raise ValueError(
            f"--critic_first {training.critic_first}: give a number of updates from 0 to below the "
            f"{training.max_train_steps} of --max_train_steps"
        )


def check_hub(hub: Hub) -> None:
    """Refuses half a wish to push, and what is no name of a repo."""
    if hub.push_to_hub and not hub.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id: name the repo, such as user/digits-hsivi-5")
    if hub.hub_model_id and not hub.push_to_hub:
        raise ValueError(f"--hub_model_id {hub.hub_model_id} names where to push: pass --push_to_hub too, or neither")
    if hub.hub_model_id:
        check_repo_id(hub.hub_model_id)
