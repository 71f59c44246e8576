"""Hierarchical semi-implicit variational inference: the method itself, in torch only.

Reading order: `distributions`, `targets`, `bridges`, `layers`, `chains`, `pools`, `objectives`, `lower_bound`,
`regression`, `curricula`, `fitting`; then `networks`, `parameters` and `inference` for small targets, with `progress`
and `inference_data`; and the checks of a fit: `importance`, `diagnostics`, `langevin`, `masses`, `diagnosis`.
"""

from .bridges import Bridge, DiffusionBridge, GeometricBridge
from .chains import Chain, ChainBatch, SimulatedChain, draw_marginals, simulate
from .curricula import Plateau, Stage, cosine, joint, sequential
from .diagnosis import Diagnosis, diagnose
from .diagnostics import Finding
from .distributions import DiagonalGaussian
from .fitting import DivergenceError, Step, Update, fit, step_generator
from .importance import effective_sample_size, log_density, pareto_k
from .inference import Inference
from .layers import ConditionalLayers, IndependentLayers, SharedLayers
from .lower_bound import LowerBound
from .networks import GaussianMLP, ResidualMLP, ScoreMLP
from .objectives import CriticObjective, KullbackLeibler, LayerDraw, Objective, ScoreMatching, draw_layer
from .parameters import NamedTarget
from .pools import CohortChain, FrozenPoolChain, PoolChain, make_chain
from .regression import PairChain, PairMixingChain, Regression, WithPairs
from .targets import (
    DiffusibleTarget,
    IsotropicNormal,
    LogProbTarget,
    SampledTarget,
    ScoreTarget,
    Target,
    as_target,
)

__all__ = [
    "Bridge",
    "Chain",
    "ChainBatch",
    "CohortChain",
    "ConditionalLayers",
    "CriticObjective",
    "Diagnosis",
    "DiagonalGaussian",
    "DiffusibleTarget",
    "DiffusionBridge",
    "DivergenceError",
    "Finding",
    "FrozenPoolChain",
    "GaussianMLP",
    "GeometricBridge",
    "IndependentLayers",
    "Inference",
    "IsotropicNormal",
    "KullbackLeibler",
    "LayerDraw",
    "LogProbTarget",
    "LowerBound",
    "NamedTarget",
    "Objective",
    "PairChain",
    "PairMixingChain",
    "Plateau",
    "PoolChain",
    "Regression",
    "ResidualMLP",
    "SampledTarget",
    "ScoreMLP",
    "ScoreMatching",
    "ScoreTarget",
    "SharedLayers",
    "SimulatedChain",
    "Stage",
    "Step",
    "Target",
    "Update",
    "WithPairs",
    "as_target",
    "cosine",
    "diagnose",
    "draw_layer",
    "draw_marginals",
    "effective_sample_size",
    "fit",
    "joint",
    "log_density",
    "make_chain",
    "pareto_k",
    "sequential",
    "simulate",
    "step_generator",
]
