"""Networks for small targets: residual MLPs with a level as input, for layers and critics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .distributions import DiagonalGaussian


class ResidualMLP(nn.Module):
    """in -> width, then depth - 1 residual blocks h + linear(silu(h)), -> out; a level in [0, 1] may be added to h.

    With `levels` the network takes a level, as the cosines cos(pi k level), k = 1..16; depth >= 1 is the number of
    hidden layers.

    Raises:
        ValueError: A size is not positive.
    """

    NUM_COSINES = 16
    FIRST_GAIN = 3.0  # of the first layer's initial weights: edges and gaps of a density are learnt sooner

    def __init__(self, inputs: int, outputs: int, width: int = 128, depth: int = 3, levels: bool = False) -> None:
        super().__init__()
        if min(inputs, outputs, width, depth) < 1:
            raise ValueError(f"inputs={inputs}, outputs={outputs}, width={width}, depth={depth}: all must be 1 or more")
        self.first = nn.Linear(inputs, width)
        self.level = nn.Linear(self.NUM_COSINES, width, bias=False) if levels else None
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, outputs)
        with torch.no_grad():
            for parameter in self.first.parameters():
                parameter.mul_(self.FIRST_GAIN)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """Returns the answer, shape (B, outputs), to x of shape (B, inputs) and levels, if any, of shape (B,)."""
        if (level is None) != (self.level is None):
            raise ValueError("a network made with levels=True takes a level, and no other does")
        h = self.first(x)
        if self.level is not None and level is not None:
            k = torch.arange(1, self.NUM_COSINES + 1, device=x.device)
            h = h + self.level((math.pi * k * level.to(x)[:, None]).cos())
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        answer: Tensor = self.last(nn.functional.silu(h))
        return answer


class GaussianMLP(nn.Module):
    """A layer: x -> N(A x + net(x), std^2), A = I and net nearly 0 at the start, x in up to 10,000 dimensions.

    A std > 0 is learned for each coordinate of each layer, from `initial_std`. With num_layers = T the network is
    shared by T layers.

    Raises:
        ValueError: A number is out of its range.
    """

    MAX_DIMENSION = 10_000

    def __init__(
        self, dimension: int, width: int = 128, depth: int = 3, initial_std: float = 0.5, num_layers: int | None = None
    ) -> None:
        super().__init__()
        if dimension > self.MAX_DIMENSION:
            raise ValueError(
                f"dimension={dimension}: the default layers have a d x d matrix each, for d up to 10,000; give layers "
                "of your own"
            )
        if not initial_std > 0:
            raise ValueError(f"initial_std={initial_std}: give a number > 0")
        self.num_layers = num_layers
        self.network = ResidualMLP(dimension, dimension, width, depth, levels=num_layers is not None)
        self.skip = nn.Parameter(torch.eye(dimension))
        self.log_std = nn.Parameter(torch.full((num_layers or 1, dimension), math.log(initial_std)))
        with torch.no_grad():
            self.network.last.weight.mul_(0.1)
            self.network.last.bias.zero_()

    def forward(self, x_next: Tensor, t: Tensor | None = None) -> DiagonalGaussian:
        """Returns q(. | x_next), of shape (B, d); t is the layer of each row of a shared network."""
        if (t is None) != (self.num_layers is None):
            raise ValueError(
                "give num_layers=T to a network that layers share, and leave it out for a network of one layer"
            )
        level = None if t is None or self.num_layers is None else t / self.num_layers
        log_std = self.log_std[0] if level is None else self.log_std[t]
        mean = x_next @ self.skip.T + self.network(x_next, level)
        return DiagonalGaussian(mean=mean, std=log_std.exp().expand_as(mean))


class ScoreMLP(nn.Module):
    """A critic, or the score network of a diffusion bridge: (x, level) -> -x + net(x, level), net near 0 at first."""

    def __init__(self, dimension: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.network = ResidualMLP(dimension, dimension, width, depth, levels=True)
        with torch.no_grad():
            self.network.last.weight.mul_(0.1)
            self.network.last.bias.zero_()

    def forward(self, x: Tensor, level: Tensor, condition: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Returns the score, shape (B, d), for x of shape (B, d) and levels in [0, 1] of shape (B,); ignores t."""
        score: Tensor = self.network(x, level) - x
        return score
