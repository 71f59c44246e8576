"""Distils a pretrained diffusion UNet into T layers, without any training data.

    accelerate launch training/train_hsivi.py --config training/configs/digits_t5.yaml

Writes OUTPUT_DIR/pipeline (an HSIVIPipeline), OUTPUT_DIR/checkpoints and OUTPUT_DIR/training.json. Options come from
the preset, then the YAML file of --config, then the command line; --preset paper is the recipe of arXiv 2310.17153.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from hsivi_diffusers import (
    HSIVINoiseScale,
    HSIVIPipeline,
    HSIVIScheduler,
    TeacherBridge,
    UNetCritic,
    UNetLayers,
    load_teacher,
    push,
)
from hsivi_diffusers.hub import check_repo_id, claim
from hsivi_diffusers.vi import (
    Chain,
    CriticObjective,
    DivergenceError,
    KullbackLeibler,
    ScoreMatching,
    Step,
    fit,
    joint,
    make_chain,
)
from options import claim_output_dir, option, parse_options, write_text

PRESETS: dict[str, dict[str, Any]] = {
    # DDIM layers of eta 1, each diffused to a random level between its output and its input and scored there by the KL
    # gradient. The chain starts at 440, where the picture begins to show; the layers' learning rate falls to 0, the
    # critic's does not.
    "fast": {
        "kernel": "ddim",
        "noise_eta": 1.0,
        "timestep_spacing": "uniform",
        "start_timestep": 440,
        "objective": "KL",
        "scoring": "random",
        "layer_weight": "normalised",
        "critic_weight": "unit",
        "source": "pool",
        "critic_updates": 1,
        "noise_scale_type": "config",
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "critic_learning_rate": 1e-3,
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


@dataclass
class Teacher:
    _argument_group_name = "teacher"
    pretrained_teacher_model: str | None = option(None, "folder or repo id of a diffusers pipeline with a UNet2DModel")
    revision: str | None = option(None, "branch, tag or commit of the repo")


@dataclass
class Layers:
    _argument_group_name = "layers (the sampler)"
    num_layers: int = option(5, "T: network calls of the sampler")
    timestep_spacing: Literal["quadratic", "uniform"] = option("quadratic", "how the grid is spread over the clock")
    start_timestep: int | None = option(None, "tau_T, the timestep of the first call; the spacing's own by default")
    kernel: Literal["ddim", "renoise"] = option(
        "ddim", "noise of a layer: DDIM(eta), or fresh noise on the clean picture"
    )
    noise_eta: float = option(0.2, "eta of the ddim kernel, 0 to 1")
    noise_scale_type: Literal["config", "per_pixel"] = option(
        "config", "keep the noise scale at 1, or learn one per pixel"
    )


@dataclass
class Method:
    _argument_group_name = "method"
    preset: Literal["fast", "paper"] = option(
        "fast", "recipe; the options of --config and of the command line override it"
    )
    objective: Literal["SM", "KL"] = option("SM", "HSIVI-SM (score matching, the paper) or HSIVI-KL")
    alpha: float = option(0.5, "of SM: 0.5 is the paper, up to 1.2 the fused loss of score identity distillation")
    scoring: Literal["own", "random"] = option("own", "score a layer at its own level, or diffused to a random one")
    level_min: int = option(5, "lowest timestep of random levels")
    level_max: int = option(800, "highest timestep of random levels")
    layer_weight: Literal["unit", "sigma2", "normalised"] = option("unit", "weight of the layers' loss, in noise units")
    critic_weight: Literal["unit", "sigma2"] = option("unit", "weight of the critic's loss, in noise units")
    source: Literal["pool", "simulate"] = option("pool", "layer inputs from a pool of live chains, or from fresh ones")
    critic_updates: int = option(1, "critic updates for each layer update")


@dataclass
class Training:
    _argument_group_name = "training"
    seed: int = option(0, "seed of everything")
    max_train_steps: int = option(1000, "layer updates")
    train_batch_size: int = option(64, "rows of an update, per process")
    learning_rate: float = option(2e-4, "Adam's, of the layers")
    critic_learning_rate: float = option(5e-4, "Adam's, of the critic")
    noise_scale_learning_rate: float = option(1e-2, "Adam's, of the log noise scale")
    adam_beta1: float = option(0.0, "first-moment decay of both optimizers")
    adam_beta2: float = option(0.999, "second-moment decay of both optimizers")
    lr_scheduler: str = option("cosine", "of the layers, a name known to diffusers' get_scheduler")
    critic_lr_scheduler: str = option("constant_with_warmup", "of the critic")
    lr_warmup_steps: int = option(50, "layer updates of warm-up")
    ema_decay: float = option(0.995, "decay of the averaged layers, which are saved")


@dataclass
class Run:
    _argument_group_name = "run"
    output_dir: str | None = option(None, "folder of the run")
    overwrite_output_dir: bool = option(False, "start anew in a folder that is not empty, removing an earlier run")
    resume_from_checkpoint: str | None = option(None, "`latest`, or the path of a checkpoint")
    checkpointing_steps: int = option(500, "layer updates between checkpoints")
    checkpoints_total_limit: int = option(2, "checkpoints that are kept")
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


Options = tuple[Teacher, Layers, Method, Training, Run, Hub]


class Players:
    """The modules and optimizers of a run, prepared by accelerate."""

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        teacher, layer_options, method, training, *_ = options
        unet, schedule = load_teacher(str(teacher.pretrained_teacher_model), teacher.revision)
        scheduler = make_scheduler(schedule, layer_options)
        levels = (method.level_min, method.level_max)
        self.bridge = TeacherBridge(copy.deepcopy(unet), scheduler, levels)
        self.bridge.network.to(accelerator.device)
        noise_scale = HSIVINoiseScale(self.bridge.shape) if layer_options.noise_scale_type == "per_pixel" else None
        unet.requires_grad_(True).train()
        layers: nn.Module = UNetLayers(unet, scheduler, noise_scale)
        critic: nn.Module = UNetCritic(copy.deepcopy(unet), scheduler)
        betas = (training.adam_beta1, training.adam_beta2)
        groups: list[dict[str, Any]] = [{"params": unet.parameters(), "lr": training.learning_rate}]
        if noise_scale is not None:
            groups.append({"params": noise_scale.parameters(), "lr": training.noise_scale_learning_rate})
        layer_optimizer = torch.optim.Adam(groups, betas=betas)
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=training.critic_learning_rate, betas=betas)
        self.lr_schedulers = [
            get_scheduler(
                name,
                optimizer,
                num_warmup_steps=training.lr_warmup_steps,
                num_training_steps=training.max_train_steps,
            )
            for name, optimizer in (
                (training.lr_scheduler, layer_optimizer),
                (training.critic_lr_scheduler, critic_optimizer),
            )
        ]
        self.layers, self.critic, self.layer_optimizer, self.critic_optimizer = accelerator.prepare(
            layers, critic, layer_optimizer, critic_optimizer
        )
        self.student = accelerator.unwrap_model(self.layers)
        self.ema = EMAModel(self.student.parameters(), decay=training.ema_decay, use_ema_warmup=False)
        self.ema.to(accelerator.device)
        accelerator.register_for_checkpointing(self.ema, *self.lr_schedulers)


def make_scheduler(schedule: HSIVIScheduler, options: Layers) -> HSIVIScheduler:
    """The teacher's noise schedule with the grid and kernel of the student."""
    grid = HSIVIScheduler.make_layer_timesteps(
        options.num_layers, options.timestep_spacing, len(schedule), start=options.start_timestep
    )
    return HSIVIScheduler.from_config(
        schedule.config,
        layer_timesteps=grid,
        timestep_spacing=options.timestep_spacing,
        kernel=options.kernel,
        noise_eta=options.noise_eta,
        noise_scale_type=options.noise_scale_type,
        clip_sample=False,  # a clamp would stop the gradient of every pixel at black or white
        thresholding=False,
    )


def make_objective(method: Method, bridge: TeacherBridge) -> CriticObjective:
    """The objective with its weights in score units: sigma^2 times those in noise units.

    `normalised` is the per-sample weight of score identity distillation, see docs/math.md.
    """
    sigma_power = {"unit": 2.0, "sigma2": 4.0, "normalised": 0.0 if method.objective == "KL" else 2.0}
    normalised = method.layer_weight == "normalised"
    weights: dict[str, Any] = {
        "layer_weight": bridge.weight(sigma_power[method.layer_weight], alpha_power=-1.0 if normalised else 0.0),
        "critic_weight": bridge.weight(sigma_power[method.critic_weight]),
        "normalise": normalised,
    }
    return KullbackLeibler(**weights) if method.objective == "KL" else ScoreMatching(alpha=method.alpha, **weights)


def make_source(players: Players, method: Method, training: Training) -> Chain:
    classes = players.student.unet.config.num_class_embeds
    device = players.student.unet.device

    def sample_condition(size: int, generator: torch.Generator | None) -> torch.Tensor:
        return torch.randint(classes, (size,), generator=generator).to(device)

    return make_chain(
        method.source,
        players.bridge.sample_base,
        players.student.num_layers,
        training.train_batch_size,
        sample_condition if classes else None,
    )


class Checkpoints:
    """Folders OUTPUT_DIR/checkpoints/checkpoint-STEP, each complete or absent."""

    def __init__(self, output_dir: Path, run: Run, accelerator: Accelerator, players: Players, chain: Chain) -> None:
        self.folder = output_dir / "checkpoints"
        self.run, self.accelerator, self.players, self.chain = run, accelerator, players, chain

    def save(self, step: int, seconds: float) -> None:
        """Saves the state after `step` updates, under its final name only when it is all written."""
        for module in (self.players.layers, self.players.critic):
            if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
                raise DivergenceError("weights", step, range(self.players.student.num_layers))
        final, partial = self.folder / f"checkpoint-{step}", self.folder / f"partial-{step}"
        self.accelerator.save_state(str(partial))
        save_file(self.chain.state_dict(), partial / f"chains-{self.accelerator.process_index}.safetensors")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / "progress.json").write_text(json.dumps({"step": step, "seconds": seconds}))
            replace_folder(partial, final)
            for old in self.list()[: -self.run.checkpoints_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [path.parent for path in self.folder.glob("checkpoint-*/progress.json") if not path.parent.suffix]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def load(self) -> tuple[int, float]:
        """Restores what --resume_from_checkpoint names; returns updates done and seconds spent."""
        name = self.run.resume_from_checkpoint
        if name is None or (name == "latest" and not self.list()):
            return 0, 0.0
        path = self.list()[-1] if name == "latest" else Path(name)
        if not (path / "progress.json").is_file():
            raise ValueError(
                f"--resume_from_checkpoint {path} holds no checkpoint: name one of {self.folder}, or latest"
            )
        self.accelerator.load_state(str(path))
        self.players.ema.to(self.accelerator.device)  # accelerate loads it to the CPU
        self.chain.load_state_dict(load_file(path / f"chains-{self.accelerator.process_index}.safetensors"))
        progress = json.loads((path / "progress.json").read_text())
        return progress["step"], progress["seconds"]


def replace_folder(new: Path, old: Path) -> None:
    """Puts a finished folder in the place of another, so that a reader finds the one or the other."""
    retired = old.with_name(f"{old.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        os.replace(old, retired)
    os.replace(new, old)
    shutil.rmtree(retired, ignore_errors=True)


def check_options(options: Options) -> None:
    """Refuses, before any work, what could not run."""
    teacher, layers, method, training, run, hub = options
    if not teacher.pretrained_teacher_model:
        raise ValueError("--pretrained_teacher_model is missing: give a folder or repo id of a diffusers pipeline")
    if method.scoring == "random" and layers.noise_scale_type == "per_pixel" and layers.kernel == "renoise":
        raise ValueError(
            "--scoring random with --kernel renoise cannot learn a noise scale, for the law of the scored picture does "
            "not depend on it: use --noise_scale_type config"
        )
    if layers.kernel == "ddim" and layers.noise_eta == 0:
        raise ValueError("--noise_eta 0 leaves the layers no noise, and so no score to train on: give up to 1, say 0.2")
    check_hub(hub)
    for name, value in [
        ("num_layers", layers.num_layers),
        ("critic_updates", method.critic_updates),
        ("max_train_steps", training.max_train_steps),
        ("train_batch_size", training.train_batch_size),
        ("checkpointing_steps", run.checkpointing_steps),
        ("checkpoints_total_limit", run.checkpoints_total_limit),
    ]:
        if value < 1:
            raise ValueError(f"--{name} {value}: give a number of at least 1")


def check_hub(hub: Hub) -> None:
    """Refuses half a wish to push, and what is no name of a repo."""
    if hub.push_to_hub and not hub.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id: name the repo, such as user/digits-hsivi-5")
    if hub.hub_model_id and not hub.push_to_hub:
        raise ValueError(f"--hub_model_id {hub.hub_model_id} names where to push: pass --push_to_hub too, or neither")
    if hub.hub_model_id:
        check_repo_id(hub.hub_model_id)


def start_run(output_dir: Path, options: Options, resume: bool) -> None:
    """Records the options of a run, or checks that a resumed run has the same."""
    path = output_dir / "options.json"
    now = {key: value for group in options[:4] for key, value in asdict(group).items()}
    if resume and path.is_file():
        before = json.loads(path.read_text())
        changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"{output_dir} holds a run with other options ({'; '.join(changed)}): name another --output_dir, or "
                "start anew with --overwrite_output_dir and without --resume_from_checkpoint"
            )
        return
    if not resume:
        for name in ("checkpoints", "pipeline"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for name in ("training.json", "report.json", "report.md", "samples.png", "curve.png"):  # of an earlier run
            (output_dir / name).unlink(missing_ok=True)
    write_json(path, now)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def save_pipeline(output_dir: Path, players: Players) -> None:
    """Saves the averaged layers as OUTPUT_DIR/pipeline."""
    student: UNetLayers = copy.deepcopy(players.student)
    players.ema.copy_to(student.parameters())
    pipeline = HSIVIPipeline(
        unet=student.unet.eval(), scheduler=student.scheduler, unet_noise_scale=student.noise_scale
    )
    partial = output_dir / "pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    replace_folder(partial, output_dir / "pipeline")


def summarise(options: Options, seconds: float, processes: int) -> dict[str, Any]:
    """What training.json says: the cost, and the repo of the teacher if it came from the Hub."""
    teacher = str(options[0].pretrained_teacher_model)
    return {"seconds": seconds, "processes": processes, "base_model": None if Path(teacher).exists() else teacher}


def push_pipeline(output_dir: Path, hub: Hub) -> None:
    """Pushes OUTPUT_DIR/pipeline with its card."""
    try:
        url = push(
            HSIVIPipeline.from_pretrained(output_dir / "pipeline"),
            str(hub.hub_model_id),
            run_dir=output_dir,
            exist_ok=hub.hub_exist_ok,
            private=hub.hub_private_repo or None,
            token=hub.hub_token,
        )
    except Exception as error:
        error.add_note(
            f"The training is done and its pipeline is in {output_dir / 'pipeline'}: push it with python "
            f"training/push_to_hub.py --run_dir {output_dir} --hub_model_id {hub.hub_model_id}"
        )
        raise
    print(f"pushed to {url}")


def show_progress(steps: Iterator[Step], start: int, total: int, accelerator: Accelerator) -> Iterator[Step]:
    """Passes the steps on, with a bar of running losses and a line to the trackers every 20 steps."""
    running: dict[str, float] = {}
    with tqdm(total=total, initial=start, desc="distil", disable=not accelerator.is_main_process) as bar:
        for step in steps:
            yield step
            losses = {"layer_loss": step.layer_loss.mean().item(), "critic_loss": step.critic_loss.mean().item()}
            running = {name: 0.95 * running.get(name, loss) + 0.05 * loss for name, loss in losses.items()}
            if (step.step + 1) % 20 == 0 or step.step + 1 == total:
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in running.items()}, refresh=False)
                accelerator.log(losses, step=step.step)
            bar.update()


def train(
    players: Players, chain: Chain, checkpoints: Checkpoints, options: Options, accelerator: Accelerator
) -> float:
    """Runs the updates that are left; returns the seconds of all."""
    _, _, method, training, run, _ = options
    start, spent = checkpoints.load()
    steps = fit(
        players.layers,
        players.critic,
        players.bridge,
        make_objective(method, players.bridge),
        chain,
        joint(players.student.num_layers, training.max_train_steps),
        layer_optimizer=players.layer_optimizer,
        critic_optimizer=players.critic_optimizer,
        critic_updates=method.critic_updates,
        scoring=method.scoring,
        seed=training.seed,
        rank=accelerator.process_index,
        start_step=start,
        backward=accelerator.backward,
    )
    clock = time.perf_counter()
    try:
        for step in show_progress(steps, start, training.max_train_steps, accelerator):
            for lr_scheduler in players.lr_schedulers:
                lr_scheduler.step()
            players.ema.step(players.student.parameters())
            done = step.step + 1
            if done % run.checkpointing_steps == 0 or done == training.max_train_steps:
                checkpoints.save(done, spent + time.perf_counter() - clock)
    except DivergenceError as error:
        kept = checkpoints.list()
        place = f"the last good checkpoint is {kept[-1]}" if kept else "there was no checkpoint yet"
        raise SystemExit(f"{error}; {place}") from error
    return spent + time.perf_counter() - clock


def main(args: list[str] | None = None) -> None:
    options: Options = parse_options([Teacher, Layers, Method, Training, Run, Hub], __doc__ or "", PRESETS, args)
    _, _, method, training, run, hub = options
    check_options(options)
    accelerator = Accelerator(log_with=run.report_to, project_dir=str(Path(run.output_dir or ".") / run.logging_dir))
    set_seed(training.seed)
    players = Players(options, accelerator)
    chain = make_source(players, method, training)
    output_dir = Path(run.output_dir or "")
    if accelerator.is_main_process:
        claim_output_dir(run.output_dir, run.overwrite_output_dir or run.resume_from_checkpoint is not None)
        if hub.push_to_hub:  # now, for a name or token that is refused should cost no training, and no earlier run
            claim(
                str(hub.hub_model_id),
                exist_ok=hub.hub_exist_ok,
                private=hub.hub_private_repo or None,
                token=hub.hub_token,
            )
        start_run(output_dir, options, resume=run.resume_from_checkpoint is not None)
    accelerator.wait_for_everyone()
    if run.report_to:
        accelerator.init_trackers(run.tracker_project_name)

    seconds = train(players, chain, Checkpoints(output_dir, run, accelerator, players, chain), options, accelerator)
    if accelerator.is_main_process:
        save_pipeline(output_dir, players)
        write_json(output_dir / "training.json", summarise(options, seconds, accelerator.num_processes))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        print(f"the pipeline is in {output_dir / 'pipeline'}: measure it with evaluate.py, draw with sample.py")
    if accelerator.is_main_process and hub.push_to_hub:  # last, for the others would not wait long enough
        push_pipeline(output_dir, hub)


if __name__ == "__main__":
    main()
