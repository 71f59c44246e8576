"""The examples of docs/inference/index.md are what a newcomer copies."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

PAGE = Path(__file__).parents[2] / "docs" / "inference" / "index.md"


def example(number):
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]


@pytest.mark.slow
def test_it_runs_and_its_draws_have_the_moments_of_the_target(tmp_path, monkeypatch):
    plt.switch_backend("Agg")
    plt.close("all")  # figures of other tests
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example(0), names)
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


@pytest.mark.slow
def test_named_parameters_have_the_moments_of_the_posterior():
    """Given mu and tau, the effects are N(mu, errors^2 + tau^2): two integrals are left."""
    names = {}
    exec(example(1), names)
    mu, log_tau = torch.cartesian_prod(torch.linspace(-30, 40, 701), torch.linspace(-9, 5, 701)).T
    sd = (names["errors"].square() + log_tau.exp()[:, None].square()).sqrt()
    prior = -0.5 * (mu / 5).square() - (log_tau.exp() / 5).square().log1p() + log_tau
    mass = (prior + torch.distributions.Normal(mu[:, None], sd).log_prob(names["effects"]).sum(1)).softmax(0)
    mean, log_mean = (mass * mu).sum(), (mass * log_tau).sum()
    samples = names["samples"]
    assert samples["eta"].shape == (4000, 8)
    assert float(samples["mu"].mean()) == pytest.approx(float(mean), abs=0.5)
    assert float(samples["mu"].std()) == pytest.approx(float((mass * (mu - mean).square()).sum().sqrt()), rel=0.15)
    assert float(samples["tau"].log().mean()) == pytest.approx(float(log_mean), abs=0.25)
    pytest.importorskip("arviz")
    exec(example(2), names)
    assert names["data"].sample_stats.attrs["pareto_k"] < 1
