"""Targets: the user's own, densities on the plane with exact answers, Bayesian posteriors."""

from .plane import Banana, Checkerboard, GaussianMixture, circles, cross, ring, swiss_roll
from .posteriors import ConditionedDiffusion, LogisticRegression, RareEvents
from .target import DiffusibleTarget, IsotropicNormal, LogProbTarget, SampledTarget, ScoreTarget, Target, as_target
from .whitened import FullNormal, Whitened, laplace, moment_match

__all__ = [
    "Banana",
    "Checkerboard",
    "ConditionedDiffusion",
    "DiffusibleTarget",
    "FullNormal",
    "GaussianMixture",
    "IsotropicNormal",
    "LogProbTarget",
    "LogisticRegression",
    "RareEvents",
    "SampledTarget",
    "ScoreTarget",
    "Target",
    "Whitened",
    "as_target",
    "circles",
    "cross",
    "laplace",
    "moment_match",
    "ring",
    "swiss_roll",
]
