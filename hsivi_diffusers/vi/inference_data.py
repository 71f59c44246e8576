"""Draws of a sampler as a dataset of ArviZ, an optional dependency."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor


def load_arviz() -> Any:
    """Returns the module arviz.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return import_module("arviz")  # not a dependency: the method needs torch alone
    except ImportError as error:
        raise ImportError('to_arviz needs arviz, which is missing: pip install "hsivi-diffusers[inference]"') from error


def inference_data(
    samples: Mapping[str, Tensor], statistics: Mapping[str, Tensor], attributes: Mapping[str, object]
) -> Any:
    """Returns an `arviz.InferenceData` of independent draws, as one chain.

    Args:
        samples: The variables of the group `posterior`, tensors of shape (N, ...).
        statistics: The variables of the group `sample_stats`, tensors of shape (N,).
        attributes: Of `sample_stats`.
    """
    groups = [{name: value.cpu().numpy()[None] for name, value in of.items()} for of in (samples, statistics)]
    library = {"inference_library": "hsivi_diffusers"}
    return load_arviz().from_dict(
        posterior=groups[0],
        sample_stats=groups[1] or None,
        posterior_attrs=library,
        sample_stats_attrs=library | dict(attributes),
    )
