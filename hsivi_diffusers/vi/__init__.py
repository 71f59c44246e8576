"""Hierarchical semi-implicit variational inference: the method itself, in torch only.

Reading order: `distributions`, `targets`, `bridges`, `layers`, `chains`, `objectives`, `curricula`, `fitting`; then
`networks` and `inference`, which put them together for small targets, and `diagnostics`.
"""

from .bridges import Bridge, DiffusionBridge, GeometricBridge
from .chains import (
    Chain,
    ChainBatch,
    DataChain,
    FrozenPoolChain,
    GuidedChain,
    PairChain,
    PoolChain,
    SimulatedChain,
    draw_marginals,
    make_chain,
    simulate,
)
from .curricula import Plateau, Stage, joint, sequential
from .diagnostics import Finding, diagnose
from .distributions import DiagonalGaussian
from .fitting import DivergenceError, Step, Update, fit, step_generator
from .inference import Inference
from .layers import ConditionalLayers, IndependentLayers, SharedLayers
from .networks import GaussianMLP, ResidualMLP, ScoreMLP
from .objectives import (
    Adversarial,
    CriticObjective,
    Guided,
    KullbackLeibler,
    LayerDraw,
    LowerBound,
    Objective,
    Regression,
    ScoreMatching,
    draw_layer,
)
from .targets import (
    DiffusibleTarget,
    FullNormal,
    GaussianMixture,
    IsotropicNormal,
    LogProbTarget,
    SampledTarget,
    ScoreTarget,
    Target,
    Whitened,
    as_target,
    laplace,
    moment_match,
)

__all__ = [
    "Adversarial",
    "Bridge",
    "Chain",
    "ChainBatch",
    "ConditionalLayers",
    "CriticObjective",
    "DataChain",
    "DiagonalGaussian",
    "DiffusibleTarget",
    "DiffusionBridge",
    "DivergenceError",
    "Finding",
    "FrozenPoolChain",
    "FullNormal",
    "GaussianMLP",
    "GaussianMixture",
    "GeometricBridge",
    "Guided",
    "GuidedChain",
    "IndependentLayers",
    "Inference",
    "IsotropicNormal",
    "KullbackLeibler",
    "LayerDraw",
    "LogProbTarget",
    "LowerBound",
    "Objective",
    "PairChain",
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
    "Whitened",
    "as_target",
    "diagnose",
    "draw_layer",
    "draw_marginals",
    "fit",
    "joint",
    "laplace",
    "make_chain",
    "moment_match",
    "sequential",
    "simulate",
    "step_generator",
]
