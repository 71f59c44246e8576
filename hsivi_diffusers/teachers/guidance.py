"""Classifier-free guidance of the teacher (Ho and Salimans 2022, arXiv 2207.12598), distilled into the student.

The last row of a teacher's conditions is "no class", of a text-to-image model the negative prompt. With w the guidance
scale, 1 for none, the guided teacher has the score S_none + w (S_c - S_none). A condition of a sample is class * G + g,
with g the number of its scale among the G that are trained. The critic is not guided.

No single distribution has these guided scores at every noise level: guidance should weaken with noise. So the scale may
decrease with noise (arXiv 2404.13040), or be w in an interval of times alone (arXiv 2404.07724).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .teacher import Teacher


class Guided:
    """The teacher as bridge and solvers call it: with guidance each call is two of its network.

    Args:
        teacher: Its last condition is "no class", if there is guidance.
        scales: w of each g; [1] for no guidance.
        end: Time of the network at which no guidance is left: the scale is 1 + (w - 1) max(1 - p / p_end, 0), with p
            the time, or of EDM its level. Without it the scale is w at all times.
        interval: Lowest and highest time of the network at which there is guidance, by default all; at others a call
            is one of the network.

    Attributes:
        calls: Network calls of a call with guidance, 2; or 1 without, or where the networks take the scale as an input.
    """

    def __init__(
        self,
        teacher: Teacher,
        scales: Sequence[float] = (1.0,),
        end: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        self.teacher, self.scales, self.end, self.interval = teacher, [*scales], end, interval
        self._end = None if end is None else self._position(end).item()
        self.calls = 1 if teacher.embeds_guidance or self.scales == [1] else 2
        teacher.set_guidance(self.scales[0])  # of the student and the critic, too

    def __call__(self, x: Tensor, time: Any, condition: Tensor | None = None) -> Tensor:
        """Returns the prediction at x, (B, C, H, W), and times of the network; conditions have the shape (B,)."""
        teacher = self.teacher
        if self.calls == 1:
            teacher.set_guidance(self.scales[0])
            return teacher.call(teacher.network, x, time, condition)
        if condition is None:
            raise ValueError("a guided teacher needs conditions: give one for each row")
        number = len(self.scales)
        w = torch.tensor(self.scales, device=x.device)[condition.to(x.device) % number]
        if self.interval is not None:
            guides = self.guides(time).to(x.device)
            if not guides.any():
                return teacher.call(teacher.network, x, time, condition // number)
            w = torch.where(guides, w, 1.0)
        if self._end is not None:
            w = 1 + (w - 1) * (1 - self._position(time).to(x.device).float() / self._end).clamp_min(0)
        none = torch.full_like(condition, teacher.num_rows - 1)
        of_class, of_none = (teacher.call(teacher.network, x, time, each) for each in (condition // number, none))
        return teacher.guide(of_class, of_none, w.to(x).reshape(-1, *[1] * (x.ndim - 1)))

    def guides(self, time: Any) -> Tensor:
        """Returns whether times of the network are in the interval."""
        low, high = self.interval or (-math.inf, math.inf)
        times = torch.as_tensor(time)
        return (low <= times) & (times <= high)

    def _position(self, time: Any) -> Tensor:
        return self.teacher.schedule.levels.position(torch.as_tensor(time))
