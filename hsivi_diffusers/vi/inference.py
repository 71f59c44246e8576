"""Inference on small targets: networks, chain, curriculum, optimizers and learning rates with good defaults."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .bridges import Bridge
from .chains import Chain, draw_marginals
from .curricula import Plateau, Stage, cosine, joint, sequential
from .diagnosis import Diagnosis, diagnose
from .fitting import Step, fit, step_generator
from .importance import FEWEST, effective_sample_size, log_density, pareto_k
from .inference_data import inference_data, load_arviz
from .layers import ConditionalLayers, IndependentLayers, SharedLayers
from .lower_bound import LowerBound
from .networks import GaussianMLP, ScoreMLP
from .objectives import CriticObjective, KullbackLeibler, Objective, ScoreMatching
from .parameters import NamedTarget
from .pools import CohortChain, FrozenPoolChain, PoolChain
from .progress import with_bar

Training = Literal["sequential", "joint"]
Constrain = Callable[[Tensor], Mapping[str, Tensor]]
NUM_PROBES = 256  # draws of the base at which the target is checked before training
MAX_GRAD_NORM = 10.0  # of both players
OBJECTIVES: dict[str, Callable[[], Objective]] = {"LB": LowerBound, "SM": ScoreMatching, "KL": KullbackLeibler}


class Inference:
    """Fits a hierarchy of T Gaussian layers to a bridge, and draws from it.

    Args:
        bridge: From the base to the target, with T layers.
        objective: "LB" (`LowerBound`), "SM" (`ScoreMatching`) or "KL" (`KullbackLeibler`), or an `Objective`.
        training: "joint", all layers at once with a shared network; or "sequential", layer by layer with a network for
            each.
        num_steps: Layer updates in all; sequential training gives each layer an equal part.
        batch_size: B.
        layers: The sampler; residual MLPs by default.
        critic: For objectives with a critic; a residual MLP by default.
        width: Width of the default networks.
        depth: Hidden layers of the default networks.
        learning_rate: Of the layers, falling to 5 % by a cosine over each stage; 4e-3 by default, and 1e-3 for
            `ScoreMatching`, which diverges sooner.
        critic_learning_rate: Of the critic, constant.
        critic_updates: Critic updates per layer update.
        plateau: Ends a stage whose loss has stopped falling.
        seed: Seed of parameters and draws.

    Attributes:
        next_step: Number of the step that `steps` continues with.

    Raises:
        ValueError: An argument is unknown, out of range or does not fit the others, or the target is not finite at
            draws of the base.
    """

    def __init__(
        self,
        bridge: Bridge,
        objective: str | Objective = "LB",
        training: Training = "joint",
        *,
        num_steps: int = 8000,
        batch_size: int = 256,
        layers: ConditionalLayers | None = None,
        critic: nn.Module | None = None,
        width: int = 64,
        depth: int = 3,
        learning_rate: float | None = None,
        critic_learning_rate: float = 4e-3,
        critic_updates: int = 1,
        plateau: Plateau | None = None,
        seed: int = 0,
    ) -> None:
        self.bridge, self.training, self.seed = bridge, training, seed
        self.objective = _make_objective(objective)
        _check_players(bridge, training, self.objective, layers, critic)
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size}: give 2 rows or more")
        self.curriculum, self.chain = _make_training(training, bridge, self.objective, num_steps, batch_size)
        if plateau is not None and isinstance(self.objective, LowerBound) and self.objective.surrogate:
            raise ValueError("a plateau needs a loss that can be compared: that of LowerBound(surrogate=True) cannot")
        self.critic_updates, self.plateau = critic_updates, plateau
        self.next_step = 0
        self._settings = {
            "bridge": type(bridge).__name__,
            "num_layers": bridge.num_layers,
            "objective": type(self.objective).__name__,
            "training": training,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "width": width,
            "depth": depth,
            "learning_rate": learning_rate,
            "critic_learning_rate": critic_learning_rate,
            "critic_updates": critic_updates,
            "plateau": plateau is not None,
            "seed": seed,
        }
        base = bridge.sample_base(NUM_PROBES, torch.Generator())
        _check_target(bridge, base)
        dimension = base.shape[1]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            self.layers = layers or _make_layers(training, bridge.num_layers, dimension, width, depth).to(base)
            self.critic = None
            if isinstance(self.objective, CriticObjective):
                self.critic = critic or ScoreMLP(dimension, width, depth).to(base)
        usual = 1e-3 if isinstance(self.objective, ScoreMatching) else 4e-3
        self.learning_rate = usual if learning_rate is None else learning_rate
        self.layer_optimizer = torch.optim.Adam(self.layers.parameters(), lr=self.learning_rate, fused=True)
        self.critic_optimizer = None
        if self.critic is not None:
            self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=critic_learning_rate, fused=True)

    def steps(self) -> Iterator[Step]:
        """Trains from `next_step` to the end; yields after each step. It may be left and called again."""
        self._set_rate(self.next_step)
        for step in fit(
            self.layers,
            self.critic,
            self.bridge,
            self.objective,
            self.chain,
            self.curriculum,
            layer_optimizer=self.layer_optimizer,
            critic_optimizer=self.critic_optimizer,
            critic_updates=self.critic_updates,
            seed=self.seed,
            start_step=self.next_step,
            clip_grad_norm=lambda parameters: nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM),
            stop_stage=self._stop_stage,
        ):
            self.next_step = step.next_step
            self._set_rate(step.next_step)
            yield step

    def run(self, progress: bool = True) -> None:
        """Trains to the end, in a terminal or a notebook with a progress bar, if tqdm is installed."""
        total = sum(stage.num_steps for stage in self.curriculum)
        for _ in with_bar(self.steps(), self.next_step, total) if progress else self.steps():
            pass

    def marginals(self, size: int, seed: int = 0) -> list[Tensor]:
        """Draws [x_0, ..., x_T], each of shape (size, d): x_0 from the fitted law, x_t from q_t, x_T from the base.

        Raises:
            ValueError: size < 0.
        """
        if size < 0:
            raise ValueError(f"size={size}: give a number of draws from 0 on")
        generator = torch.Generator().manual_seed(seed)
        return draw_marginals(self.layers, self.bridge.sample_base(size, generator), generator)

    def sample(self, size: int, seed: int = 0) -> Tensor:
        """Draws from the fitted law, shape (size, d); one seed gives the same draws."""
        return self.marginals(size, seed)[0]

    def log_prob(self, x: Tensor, num_inputs: int = 4096, seed: int = 0) -> Tensor:
        """Estimates log q(x) of the fitted law, shape (N,), at x of shape (N, d): a lower bound in expectation.

        It becomes tight as the number of inputs of layer 0 grows; see `importance.log_density`. For a `NamedTarget` x
        is without constraints: `target.unconstrain(samples)`.

        Raises:
            ValueError: x has another shape, or num_inputs < 1.
        """
        return log_density(self.layers, self.bridge, x, num_inputs, step_generator(seed, -1, 0))

    @torch.no_grad()
    def to_arviz(self, size: int = 1000, seed: int = 0, constrain: Constrain | None = None) -> Any:
        """Returns `sample(size, seed)` as an `arviz.InferenceData`: pip install "hsivi-diffusers[inference]".

        The draws are independent and stand as one chain: their effective sample size is `size` in all coordinates, and
        R-hat tells nothing about the fit. Judge it by its importance weights w = p / q, and by `diagnose`.

        The group `posterior` has the variables. If the log-density of the target is known, `sample_stats` has at each
        draw x in R^d `lp`, log p(x) + constant, and `log_q`, the estimate of `log_prob`; and as attributes `pareto_k`,
        below 0.7 for a good fit, and `importance_ess`, from 1 to `size`, of the weights (see `importance`). The noise
        of `log_q` makes both look worse than they are, mostly where layer 0 is narrow.

        Args:
            size: Number of draws, >= 25.
            seed: Of the draws.
            constrain: x of shape (N, d) -> variables of shape (N, ...) by their names, for draws of whitened targets;
                by default the parameters of a `NamedTarget`, and of another target "x".

        Raises:
            ImportError: arviz is missing.
            ValueError: There are fewer than 25 draws.
        """
        load_arviz()  # now, not after the draws
        if size < FEWEST:
            raise ValueError(f"size={size}: give {FEWEST} draws or more")
        target = getattr(self.bridge, "target", None)
        if constrain is None:
            constrain = target.constrain if isinstance(target, NamedTarget) else lambda x: {"x": x}
        x = self.sample(size, seed)
        statistics: dict[str, Tensor] = {}
        attributes: dict[str, float] = {}
        lp: Tensor | None = None
        with suppress(NotImplementedError):  # only the score is known
            lp = self.bridge.log_prob(x, self.bridge.level(torch.zeros(size, dtype=torch.long, device=x.device)))
        if lp is not None:
            statistics = {"lp": lp, "log_q": self.log_prob(x, seed=seed)}
            log_weights = lp - statistics["log_q"]
            attributes = {"pareto_k": pareto_k(log_weights), "importance_ess": effective_sample_size(log_weights)}
        return inference_data(constrain(x), statistics, attributes)

    def diagnose(self, seed: int = 0) -> Diagnosis:
        """Checks the fit, see `diagnosis.diagnose`; each finding has a message with the remedy."""
        return diagnose(
            self.layers,
            self.bridge,
            critic=self.critic,
            critic_layers=[0] if self.training == "sequential" else None,
            objective=self.objective,
            generator=torch.Generator().manual_seed(seed),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of all that a resumed run needs to repeat an uninterrupted one."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return copy.deepcopy({**state, "settings": self._settings, "next_step": self.next_step})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: It is the state of a fit with other settings, or no state of a fit.
        """
        before = state.get("settings", {})
        if other := [
            f"{name}: {before.get(name)} -> {now}" for name, now in self._settings.items() if before.get(name) != now
        ]:
            raise ValueError(
                f"this is the state of another fit ({'; '.join(other)}): make the Inference as it was made"
            )
        if missing := [name for name in (*self._parts(), "next_step") if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: give what state_dict() of a fit returned")
        for name, part in self._parts().items():
            part.load_state_dict(copy.deepcopy(state[name]))  # an optimizer continues with the tensors that it is given
        self.next_step = int(state["next_step"])

    def _parts(self) -> dict[str, Any]:
        names = ("layers", "critic", "layer_optimizer", "critic_optimizer", "chain", "plateau")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _stop_stage(self, step: Step) -> bool:
        if self.plateau is None:
            return False
        stop = self.plateau(float(step.layers.loss.mean()))
        if step.next_step % self.curriculum[0].num_steps == 0:
            self.plateau.reset()
        return stop

    def _set_rate(self, step: int) -> None:
        length = self.curriculum[0].num_steps
        for group in self.layer_optimizer.param_groups:
            group["lr"] = self.learning_rate * cosine(step % length / length, end=0.05)


def _check_players(
    bridge: Bridge, training: str, objective: Objective, layers: ConditionalLayers | None, critic: nn.Module | None
) -> None:
    if layers is not None and layers.num_layers != bridge.num_layers:
        raise ValueError(f"layers has {layers.num_layers} layers, and the bridge {bridge.num_layers}: give both one T")
    if isinstance(layers, SharedLayers) and training == "sequential" and bridge.num_layers > 1:
        raise ValueError(
            "SharedLayers cannot be trained one after the other, for each would undo the one before: take "
            'training="joint", or IndependentLayers'
        )
    if critic is not None and not isinstance(objective, CriticObjective):
        raise ValueError(f"{type(objective).__name__} has no critic: leave it out, or take another objective")


def _check_target(bridge: Bridge, x: Tensor) -> None:
    """Refuses a target that is not finite at draws x of the base."""
    level = bridge.level(torch.zeros(len(x), dtype=torch.long, device=x.device))
    values = {"score": bridge.score(x, level).flatten(1).sum(1)}
    with suppress(NotImplementedError):
        values["log-density"] = bridge.log_prob(x, level)
    for name, value in values.items():
        if bad := int((~value.isfinite()).sum()):
            raise ValueError(
                f"the target's {name} is not finite at {bad} of {len(x)} draws of the base: a target has a density > 0 "
                "on all of R^d; transform its support to R^d, by exp or sigmoid, and add log |det| of the map"
            )


def _make_objective(objective: str | Objective) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is unknown: choose {', '.join(OBJECTIVES)}, or give an Objective")
    return OBJECTIVES[objective]()


def _make_training(
    training: Training, bridge: Bridge, objective: Objective, num_steps: int, batch_size: int
) -> tuple[list[Stage], Chain]:
    num_layers = bridge.num_layers
    if num_steps < num_layers:
        raise ValueError(f"num_steps={num_steps}: give at least one update for each of the {num_layers} layers")
    if training == "sequential":
        frozen = FrozenPoolChain(bridge.sample_base, num_layers, batch_size)
        return sequential(num_layers, num_steps // num_layers), frozen
    if training == "joint":
        kind = CohortChain if isinstance(objective, LowerBound) else PoolChain
        return joint(num_layers, num_steps), kind(bridge.sample_base, num_layers, batch_size)
    raise ValueError(f"training={training!r} is unknown: choose 'sequential' or 'joint'")


def _make_layers(training: Training, num_layers: int, dimension: int, width: int, depth: int) -> ConditionalLayers:
    if training == "joint":
        return SharedLayers(GaussianMLP(dimension, width, depth, num_layers=num_layers), num_layers)
    return IndependentLayers([GaussianMLP(dimension, width, depth) for _ in range(num_layers)])
