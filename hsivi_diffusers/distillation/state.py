"""The state of a run: networks, optimizers, averages and chains, prepared for the hardware."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..runs.folders import remove_folder, replace_folder
from ..runs.state_dicts import TrainedWeights, load_tensors, save_tensors
from ..scheduling_hsivi import HSIVIScheduler
from ..teachers.adapters import has_adapter
from ..teachers.levels import clock_of
from ..vi import Chain, CriticObjective, DivergenceError, PairMixingChain, make_chain, step_generator
from .config import HSIVIConfig
from .game import StudentCritic, StudentLayers, TeacherBridge
from .networks import Networks
from .pairs import (
    PAIR_CALLS,
    PAIR_SHARE,
    InterruptedRunError,
    TeacherPairs,
    end_levels,
    follow_ode,
    layers_by_pairs,
    pair_levels,
    read_ends,
    write_ends,
)
from .sharding import leave_to_fsdp

PAIRS = "pairs"  # folder of a run
NOISE_SCALE_LEARNING_RATE = 1e-2


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a module that are trained; of one with an adapter these are the adapter's."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def make_trained(network: nn.Module) -> None:
    """Unfreezes the weights of a network, of one with an adapter those of the adapter."""
    if not has_adapter(network):
        network.requires_grad_(True)
    for weight in trained(network):
        weight.data = weight.data.contiguous()  # a checkpoint keeps moments in this order


def between_share(config: HSIVIConfig) -> float:
    """Share of the rows that are scored between the ends of their layer: of layers without noise all of them."""
    return 0.0 if config.scoring != "between" else 0.5 if config.noise_eta else 1.0


def adam_of(config: HSIVIConfig) -> Callable[..., torch.optim.Optimizer]:
    """Adam, with moments of 8 bits (arXiv 2110.02861) if `use_8bit_adam`.

    Raises:
        ValueError: That needs bitsandbytes.
    """
    if not config.use_8bit_adam:  # with the loss scaling of fp16 a fused one cannot say that it skipped an update
        return partial(torch.optim.Adam, fused=None if config.precision == "fp16" else True)
    try:
        from bitsandbytes.optim import Adam8bit  # needed for nothing else
    except ImportError as error:
        raise ValueError(
            "use_8bit_adam=True needs bitsandbytes: run `pip install 'bitsandbytes>=0.50'`, or start a run without it"
        ) from error
    return Adam8bit


def check_number_of_shares(config: HSIVIConfig, classes: int) -> None:
    """Refuses, with ValueError, shares for another number of classes than the teacher has."""
    shares = config.class_shares
    if shares is not None and len(shares) != classes:
        remedy = "give as many" if classes else "leave it out"
        raise ValueError(f"class_shares has {len(shares)} numbers, and the teacher {classes} classes: {remedy}")


def check_pairs(config: HSIVIConfig, scheduler: HSIVIScheduler) -> None:
    """Refuses, with ValueError, pairs of a schedule with fewer timesteps than their solver takes steps."""
    try:
        _ = pair_levels(scheduler, end_levels(scheduler)) if config.num_pairs else []
    except ValueError as error:
        raise ValueError(
            f"num_pairs={config.num_pairs}: a pair takes {PAIR_CALLS} solver steps, and the teacher's schedule has "
            "fewer timesteps: set num_pairs=0"
        ) from error


class TrainingState:
    """The modules, optimizers and chains of a run, prepared by accelerate; the networks are trained in place."""

    def __init__(
        self,
        networks: Networks,
        config: HSIVIConfig,
        accelerator: Accelerator,
        identity: dict[str, str] | None = None,
        objective: CriticObjective | None = None,
    ) -> None:
        self.config, self.accelerator, self.identity = config, accelerator, identity or {}
        self.objective = objective
        self.teacher, scheduler = networks.teacher, networks.scheduler
        outputs = scheduler.output_level(torch.arange(sum(scheduler.depths)))
        highest = clock_of(scheduler).highest_level(self.teacher.shape, outputs)
        if config.level_min > highest:
            raise ValueError(f"level_min={config.level_min}: give a timestep up to {highest}, the highest in training")
        levels = config.level_min, highest
        self.bridge = TeacherBridge(self.teacher, scheduler, levels, between_share(config), config.decay_guidance)
        if config.scoring != "own":
            self.bridge.check_levels()
        check_pairs(config, scheduler)
        check_number_of_shares(config, self.bridge.num_classes)
        if config.gradient_checkpointing:
            for network in (self.teacher.network, networks.student, networks.critic):
                if not hasattr(network, "enable_gradient_checkpointing"):
                    raise ValueError(f"gradient_checkpointing=True: a {self.teacher.name} has none: leave it out")
                network.enable_gradient_checkpointing()
        for network in (networks.student, networks.critic):
            make_trained(network)
        clips = config.objective == "KL" and self.teacher.clips  # the paper's objective knows no clipping
        self.student = StudentLayers(networks.student.train(), self.teacher, scheduler, networks.noise_scale, clips)
        self.critic_network = networks.critic
        num_layers = self.bridge.num_layers if len(config.depths) > 1 else 0
        critic = StudentCritic(networks.critic.train(), self.teacher, scheduler, num_layers)
        layer_optimizer, critic_optimizer = self._make_optimizers(networks)
        if config.shard_base:
            for module in (self.student, critic):
                leave_to_fsdp(module)
        self.layers, self.critic, self.layer_optimizer, self.critic_optimizer = accelerator.prepare(
            self.student, critic, layer_optimizer, critic_optimizer
        )
        self.ema = EMAModel(trained(self.student), decay=config.ema_decay, use_ema_warmup=False, foreach=True)
        self.ema.to(accelerator.device)
        self.parts = {
            "layers": TrainedWeights(self.student),
            "critic": TrainedWeights(critic),
            "layer_optimizer": self.layer_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "layer_schedule": self.lr_schedulers[0],
            "critic_schedule": self.lr_schedulers[1],
            "average": self.ema,
        }
        self.called: dict[str, int] = {}  # see `counting_rows`
        self.pairs: Callable[[int], TeacherPairs] = cache(self._make_pairs)  # made or read when first used
        self.chains = [self.make_chain(index) for index in range(config.gradient_accumulation_steps)]

    def _make_optimizers(self, networks: Networks) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        config = self.config
        betas = (config.adam_beta1, 0.999)
        groups: list[dict[str, Any]] = [{"params": trained(networks.student), "lr": config.learning_rate}]
        if networks.noise_scale is not None:
            groups.append({"params": networks.noise_scale.parameters(), "lr": NOISE_SCALE_LEARNING_RATE})
        adam = adam_of(config)
        optimizers = (
            adam(groups, betas=betas),
            adam(trained(networks.critic), lr=config.critic_learning_rate, betas=betas),
        )
        name, warmup = config.lr_scheduler, config.lr_warmup_steps
        steps = (config.max_train_steps - config.critic_first, config.max_train_steps)
        self.lr_schedulers = [
            get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=number)
            for optimizer, number in zip(optimizers, steps, strict=True)
        ]
        return optimizers

    def make_chain(self, index: int) -> Chain:
        """The chain of a micro-batch, at its start."""
        chain = make_chain(
            "simulate" if self.config.scoring == "own" else "pool",
            self.bridge.sample_base,
            self.student.scheduler.depths,
            self.config.train_batch_size,
            self.sample_condition,
        )
        if not self.config.num_pairs:
            return chain
        alone = layers_by_pairs(chain.depths)
        return PairMixingChain(chain, partial(self.sample_pairs, index), alone, PAIR_SHARE)

    def sample_pairs(
        self, index: int, t: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draws from the pairs of a micro-batch, see `TeacherPairs.sample`."""
        return self.pairs(index).sample(t, generator)

    @property
    def sample_condition(self) -> Callable[[int, torch.Generator | None], Tensor] | None:
        """Draws conditions, class labels or see `guidance`, (size, generator) -> (size,); None without classes."""
        if not self.bridge.num_classes:
            return None
        scales, shares, device = len(self.bridge.scales), self.config.class_shares, self.teacher.device
        if shares is None:
            rows = self.bridge.num_classes * scales
            return lambda size, generator: torch.randint(rows, (size,), generator=generator).to(device)

        weights = torch.tensor(shares, dtype=torch.float)

        def draw(size: int, generator: torch.Generator | None) -> Tensor:
            classes = torch.multinomial(weights, size, replacement=True, generator=generator)
            return (classes * scales + torch.randint(scales, (size,), generator=generator)).to(device)

        return draw

    def _make_pairs(self, index: int) -> TeacherPairs:
        """The share of the pairs of one micro-batch; those that were made before are in the output folder."""
        config, number = self.config, self.pairs_per_micro_batch
        generator = step_generator(config.seed, self.first_micro_batch + index, -1)
        draw = self.sample_condition
        condition = None if draw is None else draw(number, generator)
        noise = torch.randn(number, *self.bridge.shape, generator=generator)  # of all pairs: too many for a GPU
        ends = end_levels(self.bridge.scheduler)
        settings = {name: value for name, value in config.settings().items() if name != "noise_cutoff"}
        path, about = self._pairs_path(index), json.dumps([self.identity, settings, number, ends], default=str)
        made = None if path is None else read_ends(path, about)
        # As many in all processes, so that each asks as often whether to stop.
        known = min(gather_object([0 if made is None else len(made)]))
        try:
            ended = follow_ode(
                self.bridge.guided,
                noise,
                condition,
                ends,
                batch_size=config.train_batch_size,
                show=self.accelerator.is_main_process,
                made=None if made is None else made[:known],
                stop=self.accelerator.check_trigger,
            )
        except InterruptedRunError as error:
            if path is not None:
                write_ends(path, error.args[0], about)
            raise
        if path is not None and len(ended) > known:
            write_ends(path, ended, about)
        condition = None if condition is None else condition.cpu()
        clips, device = self.teacher.clips, self.teacher.device
        return TeacherPairs(self.bridge.scheduler, noise, ended, condition, clips, device)

    def _pairs_path(self, index: int) -> Path | None:
        folder = self.config.output_dir
        return None if folder is None else Path(folder) / PAIRS / f"{self.first_micro_batch + index}.safetensors"

    @property
    def pairs_per_micro_batch(self) -> int:
        """Pairs of each micro-batch: at least one, if there are any."""
        pairs = self.config.num_pairs
        return max(1, pairs // self.micro_batches) if pairs else 0

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
        networks = {"student": self.student.network, "critic": self.critic_network, "teacher": self.teacher.network}
        rows = self.called = dict.fromkeys(networks, 0)

        def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module is networks[name]:  # and no copy of it, which has the hook too
                rows[name] += len(inputs[0])

        handles = [each.register_forward_pre_hook(partial(add, name)) for name, each in networks.items()]
        try:
            yield rows
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def counting_paused(self) -> Iterator[None]:
        """Lets calls within it not count as those of the training."""
        before = dict(self.called)
        try:
            yield
        finally:
            self.called.update(before)

    def make_pipeline(self) -> Any:
        """The averaged layers as a pipeline of their own, on the device of the run."""
        if self.config.shard_base:
            raise ValueError(
                "no process of a run with shard_base=True has the whole student: load OUTPUT_DIR/pipeline at the end"
            )
        with self.averaging():
            student = copy.deepcopy(self.student)  # no weight of the run is in it
        if self.config.gradient_checkpointing:
            student.network.disable_gradient_checkpointing()
        return self.teacher.student_pipeline(student.network, student.scheduler, student.noise_scale)

    @contextmanager
    def averaging(self) -> Iterator[StudentLayers]:
        """Lends the layers with the averaged weights, in evaluation mode; their calls are not counted."""
        self._swap_average()
        try:
            with self.counting_paused():
                yield self.student.eval()
        finally:
            self._swap_average()
            self.student.train()

    def _swap_average(self) -> None:
        """Exchanges the trained weights and their averages, in place: `EMAModel` would copy through main memory."""
        for average, weight in zip(self.ema.shadow_params, trained(self.student), strict=True):
            average.data, weight.data = weight.data, average.data

    def check_finite(self, step: int) -> None:
        """Raises DivergenceError if a weight is not finite after this number of updates."""
        weights = {"the layers": trained(self.layers), "the critic": trained(self.critic)}
        for name, parameters in {**weights, "the average": self.ema.shadow_params}.items():
            if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
                raise DivergenceError(f"a weight of {name}", step - 1, range(self.student.num_layers))

    def save_state(self, folder: Path) -> None:
        """Writes the chains of this process into a checkpoint."""
        for path, chain in zip(self._chain_paths(folder), self.chains, strict=True):
            save_tensors(chain.state_dict(), path)

    def load_state(self, folder: Path) -> None:
        """Restores the chains of this process, and moves the averages from the CPU."""
        self.ema.to(self.accelerator.device)
        for path, chain in zip(self._chain_paths(folder), self.chains, strict=True):
            chain.load_state_dict(load_tensors(path))

    def _chain_paths(self, folder: Path) -> list[Path]:
        return [folder / f"chains-{self.first_micro_batch + index}.safetensors" for index in range(len(self.chains))]

    def save(self, output_dir: Path) -> None:
        """Saves the averaged layers as OUTPUT_DIR/pipeline, and the critic, for --init_from, as OUTPUT_DIR/critic."""
        for name, save in (
            ("pipeline", self._save_student),
            ("critic", partial(self.teacher.save, self.critic_network)),
        ):
            unfinished = output_dir / f"{name}.partial"
            remove_folder(unfinished)  # of a run that was killed here, and was perhaps another
            save(unfinished)
            replace_folder(unfinished, output_dir / name)

    def _save_student(self, folder: Path) -> None:
        with self.averaging() as student:
            self.teacher.save_student(student.network, student.scheduler, student.noise_scale, folder)
