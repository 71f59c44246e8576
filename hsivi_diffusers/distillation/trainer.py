"""Teacher, student and critic of a run: loaded, prepared for the hardware, trained, and saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..evaluation.images import load_images, to_model_range
from ..folders import remove_folder, replace_folder
from ..modeling_hsivi import HSIVINoiseScale
from ..pipeline_hsivi import HSIVIPipeline
from ..scheduling_hsivi import HSIVIScheduler
from ..vi import (
    Adversarial,
    Chain,
    CriticObjective,
    DivergenceError,
    Guided,
    GuidedChain,
    KullbackLeibler,
    Objective,
    PairChain,
    Regression,
    ScoreMatching,
    Stage,
    Step,
    cosine,
    fit,
    joint,
    make_chain,
    step_generator,
)
from .bridge import SampleData, TeacherBridge, signal_timestep, usual_law
from .config import Layers, Method, Options
from .denoisers import load_teacher, sample_shape
from .pairs import TeacherPairs, coarse_loss
from .student import LayerNoiseScale, UNetCritic, UNetDiscriminator, UNetLayers, label_layers

MAX_OVERFLOWS = 50
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
NoiseScale = HSIVINoiseScale | LayerNoiseScale
LEVEL_SIGNAL = 0.312  # see signal_timestep; at timestep 800 of 8x8 grey pixels, 956 of 32x32


@dataclass
class Networks:
    """What a run starts from.

    Attributes:
        teacher: Frozen by the bridge.
        student: UNet of the layers.
        critic: UNet of the critic.
        scheduler: Schedule of the teacher, with the grid and kernel of the student.
        noise_scale: The learned noise scale, if any.
        data: Draws real pictures, if there are any.
    """

    teacher: UNet2DModel
    student: UNet2DModel
    critic: UNet2DModel
    scheduler: HSIVIScheduler
    noise_scale: NoiseScale | None
    data: SampleData | None = None


def load_networks(options: Options, accelerator: Accelerator) -> Networks:
    """Loads the teacher, student and critic from it or from the run of --init_from, and the pictures of --train_data.

    The teacher is only called, never trained, so it is kept in the precision of its calls.
    """
    teacher, schedule = load_teacher(str(options.teacher.pretrained_teacher_model), options.teacher.revision)
    networks = make_networks((teacher, copy.deepcopy(teacher), copy.deepcopy(teacher)), schedule, options)
    if options.teacher.init_from is not None:
        carry_over(networks, Path(options.teacher.init_from))
    if options.method.train_data is not None:
        networks.data = load_data(options.method.train_data, teacher)
    networks.teacher.to(accelerator.device, HALF.get(accelerator.mixed_precision))
    return networks


def load_data(name: str, teacher: UNet2DModel) -> SampleData:
    """Loads real pictures, to be drawn with replacement: of a conditional teacher those of the class that is asked for.

    Raises:
        ValueError: There are none, or the teacher takes others, or classes of which there is none.
    """
    channels, height, width = sample_shape(teacher)
    if channels not in (1, 3) or height != width:
        raise ValueError(
            f"--train_data {name}: the teacher's pictures of {channels} x {height} x {width} are not loaded: take a "
            "teacher of square pictures of 1 or 3 channels, or leave --train_data out"
        )
    pictures, labels = load_images(name, height, channels)
    classes = teacher.config.num_class_embeds
    if classes is not None and labels is None:
        raise ValueError(f"--train_data {name} tells no labels, and the teacher has {classes} classes: take other data")
    kinds = torch.zeros(len(pictures), dtype=torch.long) if classes is None or labels is None else labels
    counts = kinds.bincount(minlength=classes or 1)
    if classes is not None and (len(counts) > classes or bool((counts == 0).any())):
        raise ValueError(
            f"--train_data {name} has pictures of the classes {kinds.unique().tolist()}, and the teacher is for 0 to "
            f"{classes - 1}, each of which it needs: take the data of the teacher"
        )
    by_kind, first = kinds.argsort(stable=True), counts.cumsum(0) - counts

    def sample(size: int, condition: Tensor | None, generator: torch.Generator | None) -> Tensor:
        kind = torch.zeros(size, dtype=torch.long) if condition is None else condition.cpu()
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return to_model_range(pictures[by_kind[first[kind] + (uniform * counts[kind]).long()]])

    return sample


def make_networks(
    unets: tuple[UNet2DModel, UNet2DModel, UNet2DModel], schedule: HSIVIScheduler, options: Options
) -> Networks:
    """Teacher, student and critic with the grid of the student; the noise scale is 1."""
    scheduler = make_scheduler(schedule, options.layers, sample_shape(unets[0]))
    kind = options.layers.noise_scale_type
    noise_scale: NoiseScale | None = None
    if kind == "per_pixel":
        noise_scale = HSIVINoiseScale(sample_shape(unets[0]))
    elif kind != "config":
        noise_scale = LayerNoiseScale(1.0 if kind == "scalar" else [1.0] * sum(scheduler.depths))
    teacher, student, critic = unets
    if tells_layer(options):
        critic = label_layers(critic, sum(scheduler.depths))
    return Networks(teacher, student, critic, scheduler, noise_scale)


def tells_layer(options: Options) -> bool:
    """Whether layers are scored at the same levels, so that the critic must be told the layer to know its marginal."""
    layers, method = options.layers, options.method
    anywhere = (method.level_law or usual_law(layers.kernel)) == "uniform"
    return len(layers.num_layers) > 1 or (layers.num_layers[0] > 1 and method.scoring != "own" and anywhere)


def make_scheduler(schedule: HSIVIScheduler, options: Layers, shape: tuple[int, ...]) -> HSIVIScheduler:
    """The teacher's noise schedule with the grid, or the grids, and the kernel of a student of pictures of a shape."""
    start = options.start_timestep
    if start is None and options.start_noise is not None:
        start = signal_timestep(schedule, (shape[0], 1, 1), 1 / options.start_noise)
    elif start is None and options.start_signal is not None:
        start = signal_timestep(schedule, shape, options.start_signal)
    grids = [
        HSIVIScheduler.make_layer_timesteps(
            count,
            options.timestep_spacing,
            len(schedule),
            start=None if start is None else start + place * options.start_spacing,
        )
        for place, count in enumerate(options.num_layers)
    ]
    return HSIVIScheduler.from_config(
        schedule.config,
        layer_timesteps=grids,
        timestep_spacing=options.timestep_spacing,
        kernel=options.kernel,
        noise_eta=options.noise_eta,
        noise_scale_type="per_pixel" if options.noise_scale_type == "per_pixel" else "config",
        clip_sample=False,  # a clamp would stop the gradient of every pixel at black or white
        thresholding=False,
    )


def carry_over(networks: Networks, run: Path) -> None:
    """Lets student, critic and noise scale start where a finished run ended, on another grid if need be.

    Raises:
        ValueError: The run had networks of another shape, or its noise scale does not fit the one of this run.
    """
    pipeline = HSIVIPipeline.from_pretrained(run / "pipeline")
    critic = UNet2DModel.from_pretrained(run / "critic")
    try:
        networks.student.load_state_dict(pipeline.unet.state_dict())
        networks.critic.load_state_dict(_fitting_labels(critic.state_dict(), networks, pipeline.scheduler))
    except RuntimeError as error:
        raise ValueError(
            f"--init_from {run} has networks of another shape than the teacher: give a run of the same teacher"
        ) from error
    if pipeline.unet_noise_scale is not None:
        if not isinstance(networks.noise_scale, HSIVINoiseScale):
            raise ValueError(f"--init_from {run} has a noise scale per pixel: pass --noise_scale_type per_pixel")
        networks.noise_scale.load_state_dict(pipeline.unet_noise_scale.state_dict())
    else:
        _carry_scales(networks, pipeline.scheduler)


def _fitting_labels(state: dict[str, Tensor], networks: Networks, before: HSIVIScheduler) -> dict[str, Tensor]:
    """The state of a critic that was told layers of other grids, or none: what it is told of them starts anew."""
    name, own = "class_embedding.weight", networks.critic.state_dict()
    if name not in own:
        return {key: value for key, value in state.items() if key != name}
    tells = networks.critic.config.num_class_embeds != networks.teacher.config.num_class_embeds
    same = not tells or before.trained_grids == networks.scheduler.trained_grids
    return state if same and name in state and state[name].shape == own[name].shape else {**state, name: own[name]}


def _carry_scales(networks: Networks, before: HSIVIScheduler) -> None:
    """Takes over the numbers of a config: those of the layers interpolated, in log scale, at their output timesteps.

    Raises:
        ValueError: The layers have numbers of their own, and this run several grids and no scale to learn.
    """
    scale = before.config.noise_scale
    if isinstance(scale, list):
        old, new = (each.output_timestep(torch.arange(sum(each.depths))) for each in (before, networks.scheduler))
        values = np.exp(np.interp(new, old, np.log(scale))).tolist()
    else:
        values = [float(scale)] * sum(networks.scheduler.depths)
    mean = math.exp(sum(map(math.log, values)) / len(values))
    if isinstance(networks.noise_scale, HSIVINoiseScale):
        nn.init.constant_(networks.noise_scale.log_scale, math.log(mean))
    elif networks.noise_scale is None:
        if isinstance(scale, list) and len(networks.scheduler.depths) > 1:
            raise ValueError(
                "the run of --init_from has a noise scale for each layer, and with several --num_layers there is one "
                "for all: pass --noise_scale_type scalar, which starts at their mean"
            )
        fixed = values if isinstance(scale, list) else scale
        networks.scheduler = HSIVIScheduler.from_config(networks.scheduler.config, noise_scale=fixed)
    else:
        per_layer = networks.noise_scale.log_scale.ndim == 1
        networks.noise_scale = LayerNoiseScale(values if per_layer else mean)


def level_range(method: Method, networks: Networks) -> tuple[int, int]:
    """Lowest and highest timestep of random levels."""
    if method.level_max is not None:
        return method.level_min, method.level_max
    return method.level_min, signal_timestep(networks.scheduler, sample_shape(networks.teacher), LEVEL_SIGNAL)


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
        "teacher_share": method.teacher_share,
    }
    kl, alpha = method.objective == "KL", method.alpha
    objective: CriticObjective = KullbackLeibler(**weights) if kl else ScoreMatching(alpha=alpha, **weights)
    if method.adversarial_weight:
        objective = Adversarial(objective, method.adversarial_weight)
    return Guided(objective, method.ode_weight, coarse_loss(method.ode_coarse)) if guides(method) else objective


def guides(method: Method) -> bool:
    """Whether the pairs are made use of after the fit, too."""
    return bool(method.ode_pairs and method.ode_weight)


class PreemptionError(Exception):
    """The machine is to be taken away before the first update, when there is nothing to save."""


class Players:
    """The modules, optimizers and chains of a run, prepared by accelerate.

    Args:
        networks: Where they start from; they are trained in place.
        options: Of the run.
        accelerator: Of the process.
    """

    def __init__(self, networks: Networks, options: Options, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        method, training = options.method, options.training
        self.bridge = TeacherBridge(
            networks.teacher,
            networks.scheduler,
            level_range(method, networks),
            method.level_law,
            method.level_power,
            networks.data,
            between_share=method.between_share if method.scoring == "between" else 0.0,
        )
        if options.hardware.gradient_checkpointing:
            for unet in (networks.teacher, networks.student, networks.critic):
                unet.enable_gradient_checkpointing()
        self.student = UNetLayers(
            networks.student.requires_grad_(True).train(),
            networks.scheduler,
            networks.noise_scale,
            options.layers.clip_pictures,
        )
        self.critic_unet = networks.critic
        kind = UNetDiscriminator if method.adversarial_weight else UNetCritic
        told = self.bridge.num_layers if tells_layer(options) else 0
        critic: nn.Module = kind(networks.critic.requires_grad_(True).train(), networks.scheduler, told)
        layer_optimizer, critic_optimizer = self._make_optimizers(networks)
        self.layers, self.critic, self.layer_optimizer, self.critic_optimizer = accelerator.prepare(
            self.student, critic, layer_optimizer, critic_optimizer
        )
        self.ema = EMAModel(self.student.parameters(), decay=training.ema_decay, use_ema_warmup=False)
        self.ema.to(accelerator.device)
        accelerator.register_for_checkpointing(self.ema, *self.lr_schedulers)
        self.pairs = cache(self._make_pairs)  # made when first asked for, and anew by a resumed run
        self.chains = [self._make_chain(place) for place in range(options.hardware.gradient_accumulation_steps)]

    def _make_optimizers(self, networks: Networks) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        training = self.options.training
        betas = (training.adam_beta1, training.adam_beta2)
        groups: list[dict[str, Any]] = [{"params": networks.student.parameters(), "lr": training.learning_rate}]
        if networks.noise_scale is not None:
            groups.append({"params": networks.noise_scale.parameters(), "lr": training.noise_scale_learning_rate})
        optimizers = (
            torch.optim.Adam(groups, betas=betas),
            torch.optim.Adam(networks.critic.parameters(), lr=training.critic_learning_rate, betas=betas),
        )
        names, warmup = (training.lr_scheduler, training.critic_lr_scheduler), training.lr_warmup_steps
        steps = (training.max_train_steps - training.critic_first, training.max_train_steps)
        self.lr_schedulers = [
            get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=number)
            for name, optimizer, number in zip(names, optimizers, steps, strict=True)
        ]
        return optimizers

    def _make_chain(self, place: int) -> Chain:
        chain = make_chain(
            self.options.method.source,
            self.bridge.sample_base,
            self.student.scheduler.depths,
            self.options.training.train_batch_size,
            self._sample_condition if self.student.unet.config.num_class_embeds else None,
            self.bridge.sample_input,
        )
        return GuidedChain(chain, partial(self._sample_pairs, place)) if guides(self.options.method) else chain

    def _sample_pairs(
        self, place: int, t: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.pairs(place).sample(t, generator)

    def _sample_condition(self, size: int, generator: torch.Generator | None) -> Tensor:
        unet = self.student.unet
        return torch.randint(unet.config.num_class_embeds, (size,), generator=generator).to(unet.device)

    def _make_pairs(self, place: int) -> TeacherPairs:
        """The share of the pairs of one shard."""
        method, training = self.options.method, self.options.training
        number = self.pairs_per_shard
        self.accelerator.print(f"making {number} pairs of {method.ode_calls} calls of the teacher")
        generator = step_generator(training.seed, self.first_shard + place, -1)
        condition = self._sample_condition(number, generator) if self.student.unet.config.num_class_embeds else None
        return TeacherPairs(
            self.bridge.network.unet,
            self.student.scheduler,
            torch.randn(number, *self.bridge.shape, generator=generator),  # of all pairs: too many for a GPU
            condition,
            method.ode_calls,
            training.train_batch_size,
        )

    @property
    def pairs_per_shard(self) -> int:
        """Pairs of each shard: at least one, if there are any."""
        pairs = self.options.method.ode_pairs
        return max(1, pairs // self.shards) if pairs else 0

    @property
    def pair_calls(self) -> tuple[int, int]:
        """Network calls, in all processes, that make the pairs, and that fit the layers to them."""
        method, pairs = self.options.method, self.pairs_per_shard * self.shards
        return pairs * method.ode_calls, method.ode_steps * self.rows if pairs else 0

    @property
    def shards(self) -> int:
        """Chains in all processes."""
        return self.accelerator.num_processes * len(self.chains)

    @property
    def first_shard(self) -> int:
        """Number of this process's first chain among those of all."""
        return self.accelerator.process_index * len(self.chains)

    @property
    def rows(self) -> int:
        """Rows of an update, in all shards."""
        return self.shards * self.options.training.train_batch_size

    @contextmanager
    def counting_rows(self) -> Iterator[dict[str, int]]:
        """Counts the rows that student, critic and teacher are called with, in this process."""
        networks = {"student": self.student.unet, "critic": self.critic_unet, "teacher": self.bridge.network.unet}
        rows = dict.fromkeys(networks, 0)

        def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module is networks[name]:  # and no copy of it, which has the hook too
                rows[name] += len(inputs[0])

        handles = [each.register_forward_pre_hook(partial(add, name)) for name, each in networks.items()]
        yield rows
        for handle in handles:
            handle.remove()

    def updates(self, start_step: int) -> Iterator[Step]:
        """Trains from a step on; learning rates and the average of the weights have moved when a step is yielded.

        Raises:
            DivergenceError: A loss is not finite, or under fp16 the gradients overflowed 50 times in a row.
            PreemptionError: SIGTERM came before the first update.
        """
        method, training = self.options.method, self.options.training
        if method.ode_pairs and start_step == 0:
            self._regress()
        objective = make_objective(method, self.bridge)
        steps = self._fit(
            objective,
            self.chains,
            joint(self.student.num_layers, training.max_train_steps, critic_first=training.critic_first),
            critic=self.critic,
            critic_optimizer=self.critic_optimizer,
            critic_updates=method.critic_updates,
            scoring="own" if method.scoring == "own" else "random",
            start_step=start_step,
        )
        optimizers, overflows = (self.layer_optimizer, self.critic_optimizer), 0
        self._relax(objective)
        for step in steps:
            skipped = [optimizer.step_was_skipped for optimizer in optimizers]  # by the loss scaling of fp16
            overflows = overflows + 1 if any(skipped) else 0
            if overflows == MAX_OVERFLOWS:
                raise DivergenceError("the gradient", step.step, sorted(set(step.layers.t.tolist())))
            still = step.step < training.critic_first
            for lr_scheduler, skip in zip(self.lr_schedulers, (skipped[0] or still, skipped[1]), strict=True):
                if not skip:
                    lr_scheduler.step()
            self.ema.step(self.student.parameters())
            self._relax(objective)
            yield step

    def _relax(self, objective: Objective) -> None:
        """Lets the weight of the pairs fall as the layers' rate does, so that the solver's faults do not stay."""
        if isinstance(objective, Guided):
            (rate, *_), first = self.lr_schedulers[0].get_last_lr(), self.options.training.learning_rate
            objective.weight = self.options.method.ode_weight * rate / first

    def _fit(
        self,
        objective: Objective,
        chains: list[Chain],
        curriculum: list[Stage],
        critic: nn.Module | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """`vi.fit` of the layers, with the settings that are the same whatever they are fitted by."""
        accelerator, training = self.accelerator, self.options.training
        limit = math.inf if training.max_grad_norm is None else training.max_grad_norm

        def clip_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
            return accelerator.clip_grad_norm_(list(parameters), limit)

        return fit(
            self.layers,
            critic,
            self.bridge,
            objective,
            chains,
            curriculum,
            layer_optimizer=self.layer_optimizer,
            seed=training.seed,
            rank=accelerator.process_index,
            backward=accelerator.backward,
            no_sync=accelerator.no_sync,
            clip_grad_norm=clip_grad_norm,
            skips_overflows=accelerator.scaler is not None,
            **settings,
        )

    def _regress(self) -> None:
        """Fits the layers to the pairs, by their optimizer at a rate that falls to 0; then it starts anew."""
        method, group = self.options.method, self.layer_optimizer.param_groups[0]
        rows, depths = self.options.training.train_batch_size, self.student.scheduler.depths
        chains: list[Chain] = [
            PairChain(partial(self._sample_pairs, place), depths, rows) for place in range(len(self.chains))
        ]
        rate, steps = group["lr"], self._fit(Regression(), chains, joint(sum(depths), method.ode_steps))
        for step in tqdm(range(method.ode_steps), "regress", disable=not self.accelerator.is_main_process):
            group["lr"] = method.ode_learning_rate * cosine(step / method.ode_steps)
            try:
                next(steps)
            except DivergenceError as error:
                subject = f"the loss of the fit to pairs, of --ode_learning_rate {method.ode_learning_rate},"
                raise DivergenceError(subject, error.step, error.layers) from error
            if self.accelerator.check_trigger():
                raise PreemptionError
        if not guides(method):
            self.pairs.cache_clear()
        group["lr"] = rate
        self.layer_optimizer.state.clear()
        for average, parameter in zip(self.ema.shadow_params, self.student.parameters(), strict=True):
            average.copy_(parameter.detach())

    def make_pipeline(self) -> HSIVIPipeline:
        """The averaged layers as a pipeline of their own, on the device of the run."""
        student: UNetLayers = copy.deepcopy(self.student)
        self.ema.copy_to(student.parameters())
        scheduler, scale = student.scheduler, student.noise_scale
        if isinstance(scale, LayerNoiseScale):
            scheduler, scale = HSIVIScheduler.from_config(scheduler.config, noise_scale=scale.tolist()), None
        student.unet.disable_gradient_checkpointing()
        return HSIVIPipeline(unet=student.unet.eval(), scheduler=scheduler, unet_noise_scale=scale)

    def check_finite(self, step: int) -> None:
        """Raises DivergenceError if a weight is not finite after so many updates."""
        weights = {"the layers": self.layers.parameters(), "the critic": self.critic.parameters()}
        for name, parameters in {**weights, "the average": self.ema.shadow_params}.items():
            if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
                raise DivergenceError(f"a weight of {name}", step - 1, range(self.student.num_layers))

    def save_state(self, folder: Path) -> None:
        """Writes the chains of this process into a checkpoint, of which accelerate has saved the rest."""
        for path, chain in zip(self._chain_paths(folder), self.chains, strict=True):
            save_file(chain.state_dict(), path)

    def load_state(self, folder: Path) -> None:
        """Restores the chains of this process, and moves the averages from the CPU, where accelerate loads them."""
        self.ema.to(self.accelerator.device)
        for path, chain in zip(self._chain_paths(folder), self.chains, strict=True):
            chain.load_state_dict(load_file(path))

    def _chain_paths(self, folder: Path) -> list[Path]:
        return [folder / f"chains-{self.first_shard + place}.safetensors" for place in range(len(self.chains))]

    def save(self, output_dir: Path) -> None:
        """Saves the averaged layers as OUTPUT_DIR/pipeline, and the critic, for --init_from, as OUTPUT_DIR/critic."""
        for name, part in (("pipeline", self.make_pipeline()), ("critic", self.critic_unet)):
            partial = output_dir / f"{name}.partial"
            remove_folder(partial)  # of a run that was killed here, and was perhaps another
            part.save_pretrained(partial)
            replace_folder(partial, output_dir / name)
