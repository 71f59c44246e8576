"""The state of a run: networks, optimizers, averages and chains, prepared for the hardware, and their updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..folders import remove_folder, replace_folder
from ..pipeline_hsivi import HSIVIPipeline
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
    fit,
    joint,
    make_chain,
    step_generator,
)
from .bridge import TeacherBridge, signal_timestep
from .config import HSIVIConfig
from .denoisers import sample_shape
from .networks import Networks, tells_layer
from .pairs import TeacherPairs, coarse_loss
from .student import UNetCritic, UNetDiscriminator, UNetLayers

MAX_OVERFLOWS = 50
NOISE_SCALE_LEARNING_RATE = 1e-2
BETWEEN_SHARE = 0.5  # of the rows that are scored between the ends of their layer, with scoring="between"
COARSE_WEIGHT = 20.0  # of the means over 4 x 4 fields in the loss of the pairs, see Guided
LEVEL_SIGNAL = 0.312  # see signal_timestep; at timestep 800 of 8x8 grey pixels, 956 of 32x32


def make_objective(config: HSIVIConfig, bridge: TeacherBridge) -> CriticObjective:
    """Returns the objective with its weights in score units: sigma^2 times those in noise units."""
    weight = bridge.weight({"unit": 2.0, "sigma2": 4.0}[config.loss_weight])
    weights: dict[str, Any] = {
        "layer_weight": weight,
        "critic_weight": weight,
        "teacher_share": config.trials.teacher_share,
    }
    kl = config.objective == "KL"
    objective: CriticObjective = KullbackLeibler(**weights) if kl else ScoreMatching(**weights)
    if config.trials.adversarial_weight:
        objective = Adversarial(objective, config.trials.adversarial_weight)
    return Guided(objective, config.pair_weight, coarse_loss(COARSE_WEIGHT)) if guides(config) else objective


def guides(config: HSIVIConfig) -> bool:
    """Whether the pairs have a weight in the loss after the fit to them, too."""
    return bool(config.num_pairs and config.pair_weight)


class PreemptionError(Exception):
    """The machine is to be taken away before the first update, when there is nothing to save."""


class TrainingState:
    """The modules, optimizers and chains of a run, prepared by accelerate.

    Args:
        networks: Where they start from; they are trained in place.
        config: Of the run.
        accelerator: Of the process.
    """

    def __init__(self, networks: Networks, config: HSIVIConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.fingerprint = networks.fingerprint
        self.bridge = TeacherBridge(
            networks.teacher,
            networks.scheduler,
            (config.level_min, signal_timestep(networks.scheduler, sample_shape(networks.teacher), LEVEL_SIGNAL)),
            level_power=config.trials.level_power,
            data=networks.data,
            between_share=BETWEEN_SHARE if config.scoring == "between" else 0.0,
        )
        if config.gradient_checkpointing:
            for unet in (networks.teacher, networks.student, networks.critic):
                unet.enable_gradient_checkpointing()
        self.student = UNetLayers(
            networks.student.requires_grad_(True).train(),
            networks.scheduler,
            networks.noise_scale,
            config.clip_images,
        )
        self.critic_unet = networks.critic
        kind = UNetDiscriminator if config.trials.adversarial_weight else UNetCritic
        told = self.bridge.num_layers if tells_layer(config) else 0
        critic: nn.Module = kind(networks.critic.requires_grad_(True).train(), networks.scheduler, told)
        layer_optimizer, critic_optimizer = self._make_optimizers(networks)
        self.layers, self.critic, self.layer_optimizer, self.critic_optimizer = accelerator.prepare(
            self.student, critic, layer_optimizer, critic_optimizer
        )
        self.ema = EMAModel(self.student.parameters(), decay=config.ema_decay, use_ema_warmup=False)
        self.ema.to(accelerator.device)
        self.parts = {
            "layers": self.student,
            "critic": critic,
            "layer_optimizer": self.layer_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "layer_schedule": self.lr_schedulers[0],
            "critic_schedule": self.lr_schedulers[1],
            "average": self.ema,
        }
        self.pairs = cache(self._make_pairs)  # made when first asked for, and anew by a resumed run
        self.chains = [self._make_chain(place) for place in range(config.gradient_accumulation_steps)]

    def _make_optimizers(self, networks: Networks) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        config = self.config
        betas = (config.adam_beta1, 0.999)
        groups: list[dict[str, Any]] = [{"params": networks.student.parameters(), "lr": config.learning_rate}]
        if networks.noise_scale is not None:
            groups.append({"params": networks.noise_scale.parameters(), "lr": NOISE_SCALE_LEARNING_RATE})
        optimizers = (
            torch.optim.Adam(groups, betas=betas),
            torch.optim.Adam(networks.critic.parameters(), lr=config.critic_learning_rate, betas=betas),
        )
        names, warmup = (config.lr_scheduler, config.critic_lr_scheduler), config.lr_warmup_steps
        steps = (config.max_train_steps - config.critic_first, config.max_train_steps)
        self.lr_schedulers = [
            get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=number)
            for name, optimizer, number in zip(names, optimizers, steps, strict=True)
        ]
        return optimizers

    def _make_chain(self, place: int) -> Chain:
        chain = make_chain(
            self.config.source,
            self.bridge.sample_base,
            self.student.scheduler.depths,
            self.config.train_batch_size,
            self._sample_condition if self.student.unet.config.num_class_embeds else None,
            self.bridge.sample_input,
        )
        return GuidedChain(chain, partial(self._sample_pairs, place)) if guides(self.config) else chain

    def _sample_pairs(
        self, place: int, t: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.pairs(place).sample(t, generator)

    def _sample_condition(self, size: int, generator: torch.Generator | None) -> Tensor:
        unet = self.student.unet
        return torch.randint(unet.config.num_class_embeds, (size,), generator=generator).to(unet.device)

    def _make_pairs(self, place: int) -> TeacherPairs:
        """The share of the pairs of one micro-batch."""
        config, number = self.config, self.pairs_per_micro_batch
        self.accelerator.print(f"making {number} pairs of {config.pair_calls} calls of the teacher")
        generator = step_generator(config.seed, self.first_micro_batch + place, -1)
        condition = self._sample_condition(number, generator) if self.student.unet.config.num_class_embeds else None
        return TeacherPairs(
            self.bridge.network.unet,
            self.student.scheduler,
            torch.randn(number, *self.bridge.shape, generator=generator),  # of all pairs: too many for a GPU
            condition,
            config.pair_calls,
            config.train_batch_size,
        )

    @property
    def pairs_per_micro_batch(self) -> int:
        """Pairs of each micro-batch: at least one, if there are any."""
        pairs = self.config.num_pairs
        return max(1, pairs // self.micro_batches) if pairs else 0

    @property
    def pair_calls(self) -> tuple[int, int]:
        """Network calls, in all processes, that make the pairs, and that fit the layers to them."""
        pairs = self.pairs_per_micro_batch * self.micro_batches
        return pairs * self.config.pair_calls, self.config.pair_steps * self.rows if pairs else 0

    @property
    def micro_batches(self) -> int:
        """Chains in all processes."""
        return self.accelerator.num_processes * len(self.chains)

    @property
    def first_micro_batch(self) -> int:
        """Number of this process's first chain among those of all."""
        return self.accelerator.process_index * len(self.chains)

    @property
    def rows(self) -> int:
        """Rows of an update, in all micro-batches."""
        return self.micro_batches * self.config.train_batch_size

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
        config = self.config
        if config.num_pairs and start_step == 0:
            self._regress()
        objective = make_objective(config, self.bridge)
        steps = self._fit(
            objective,
            self.chains,
            joint(self.student.num_layers, config.max_train_steps, critic_first=config.critic_first),
            critic=self.critic,
            critic_optimizer=self.critic_optimizer,
            critic_updates=config.critic_updates,
            scoring="own" if config.scoring == "own" else "random",
            start_step=start_step,
        )
        optimizers, overflows = (self.layer_optimizer, self.critic_optimizer), 0
        self._relax(objective)
        for step in steps:
            skipped = [optimizer.step_was_skipped for optimizer in optimizers]  # by the loss scaling of fp16
            overflows = overflows + 1 if any(skipped) else 0
            if overflows == MAX_OVERFLOWS:
                raise DivergenceError("the gradient", step.step, sorted(set(step.layers.t.tolist())))
            still = step.step < config.critic_first
            for lr_scheduler, skip in zip(self.lr_schedulers, (skipped[0] or still, skipped[1]), strict=True):
                if not skip:
                    lr_scheduler.step()
            self.ema.step(self.student.parameters())
            self._relax(objective)
            yield step

    def _relax(self, objective: Objective) -> None:
        """Lets the weight of the pairs fall as the layers' rate does, so that the solver's faults do not stay."""
        if isinstance(objective, Guided):
            (rate, *_), first = self.lr_schedulers[0].get_last_lr(), self.config.learning_rate
            objective.weight = self.config.pair_weight * rate / first

    def _fit(
        self,
        objective: Objective,
        chains: list[Chain],
        curriculum: list[Stage],
        critic: nn.Module | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """`vi.fit` of the layers, with the settings that are the same whatever they are fitted by."""
        accelerator, config = self.accelerator, self.config
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm

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
            seed=config.seed,
            rank=accelerator.process_index,
            backward=accelerator.backward,
            no_sync=accelerator.no_sync,
            clip_grad_norm=clip_grad_norm,
            skips_overflows=accelerator.scaler is not None,
            **settings,
        )

    def _regress(self) -> None:
        """Fits the layers to the pairs, by their optimizer at a rate that falls to 0; then it starts anew."""
        config, group = self.config, self.layer_optimizer.param_groups[0]
        rows, depths = self.config.train_batch_size, self.student.scheduler.depths
        chains: list[Chain] = [
            PairChain(partial(self._sample_pairs, place), depths, rows) for place in range(len(self.chains))
        ]
        rate, steps = group["lr"], self._fit(Regression(), chains, joint(sum(depths), config.pair_steps))
        for step in tqdm(range(config.pair_steps), "regress", disable=not self.accelerator.is_main_process):
            group["lr"] = config.pair_learning_rate * (1 + math.cos(math.pi * step / config.pair_steps)) / 2
            try:
                next(steps)
            except DivergenceError as error:
                subject = f"the loss of the fit to pairs, of pair_learning_rate={config.pair_learning_rate},"
                raise DivergenceError(subject, error.step, error.layers) from error
            if self.accelerator.check_trigger():
                raise PreemptionError
        if not guides(config):
            self.pairs.cache_clear()
        group["lr"] = rate
        self.layer_optimizer.state.clear()
        for average, parameter in zip(self.ema.shadow_params, self.student.parameters(), strict=True):
            average.copy_(parameter.detach())

    def make_pipeline(self) -> HSIVIPipeline:
        """The averaged layers as a pipeline of their own, on the device of the run."""
        student: UNetLayers = copy.deepcopy(self.student)
        self.ema.copy_to(student.parameters())
        student.unet.disable_gradient_checkpointing()
        return HSIVIPipeline(
            unet=student.unet.eval(), scheduler=student.scheduler, unet_noise_scale=student.noise_scale
        )

    def check_finite(self, step: int) -> None:
        """Raises DivergenceError if a weight is not finite after so many updates."""
        weights = {"the layers": self.layers.parameters(), "the critic": self.critic.parameters()}
        for name, parameters in {**weights, "the average": self.ema.shadow_params}.items():
            if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
                raise DivergenceError(f"a weight of {name}", step - 1, range(self.student.num_layers))

    def save_state(self, folder: Path) -> None:
        """Writes the chains of this process into a checkpoint."""
        for path, chain in zip(self._chain_paths(folder), self.chains, strict=True):
            save_file(chain.state_dict(), path)

    def load_state(self, folder: Path) -> None:
        """Restores the chains of this process, and moves the averages from the CPU."""
        self.ema.to(self.accelerator.device)
        for path, chain in zip(self._chain_paths(folder), self.chains, strict=True):
            chain.load_state_dict(load_file(path))

    def _chain_paths(self, folder: Path) -> list[Path]:
        return [folder / f"chains-{self.first_micro_batch + place}.safetensors" for place in range(len(self.chains))]

    def save(self, output_dir: Path) -> None:
        """Saves the averaged layers as OUTPUT_DIR/pipeline, and the critic, for --init_from, as OUTPUT_DIR/critic."""
        for name, part in (("pipeline", self.make_pipeline()), ("critic", self.critic_unet)):
            partial = output_dir / f"{name}.partial"
            remove_folder(partial)  # of a run that was killed here, and was perhaps another
            part.save_pretrained(partial)
            replace_folder(partial, output_dir / name)
