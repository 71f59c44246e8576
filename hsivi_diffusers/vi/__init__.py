"""Hierarchical semi-implicit variational inference: the method itself, in torch only.

Reading order: `distributions`, `bridges`, `layers`, `chains`, `objectives`, `curricula`, `fitting`.
"""

from .bridges import Bridge
from .chains import Chain, ChainBatch, PoolChain, SimulatedChain, make_chain, simulate
from .curricula import Stage, joint
from .diagnostics import Finding, diagnose
from .distributions import DiagonalGaussian
from .fitting import DivergenceError, Step, Update, fit
from .layers import ConditionalLayers
from .objectives import CriticObjective, KullbackLeibler, LayerDraw, ScoreMatching, draw_layer

__all__ = [
    "Bridge",
    "Chain",
    "ChainBatch",
    "ConditionalLayers",
    "CriticObjective",
    "DiagonalGaussian",
    "DivergenceError",
    "Finding",
    "KullbackLeibler",
    "LayerDraw",
    "PoolChain",
    "ScoreMatching",
    "SimulatedChain",
    "Stage",
    "Step",
    "Update",
    "diagnose",
    "draw_layer",
    "fit",
    "joint",
    "make_chain",
    "simulate",
]
