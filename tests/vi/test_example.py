"""The first example of docs/inference/index.md is what a newcomer copies."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

PAGE = Path(__file__).parents[2] / "docs" / "inference" / "index.md"


@pytest.mark.slow
def test_it_runs_and_its_draws_have_the_moments_of_the_target(tmp_path, monkeypatch):
    plt.switch_backend("Agg")
    plt.close("all")  # figures of other tests
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)
    assert (tmp_path / "fit.png").stat().st_size > 5000
    x = names["inference"].sample(50_000)
    axis = torch.linspace(-5, 5, 401)
    grid = torch.cartesian_prod(axis, axis)
    mass = names["log_prob"](grid).softmax(0)
    for moment in (
        lambda x: x[:, 0] ** 2,
        lambda x: x[:, 1] ** 2,
        lambda x: x.norm(dim=1),
        lambda x: (x[:, 0] > 0).float(),
    ):
        torch.testing.assert_close(moment(x).mean(), (mass * moment(grid)).sum(), rtol=0.08, atol=0.03)
