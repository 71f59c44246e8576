"""Targets: the user's own, densities on the plane with exact answers, Bayesian posteriors."""

from .target import DiffusibleTarget, IsotropicNormal, LogProbTarget, SampledTarget, ScoreTarget, Target, as_target

__all__ = [
    "DiffusibleTarget",
    "IsotropicNormal",
    "LogProbTarget",
    "SampledTarget",
    "ScoreTarget",
    "Target",
    "as_target",
]
