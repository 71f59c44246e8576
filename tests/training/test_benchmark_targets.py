import math

import pytest
import torch

from training.benchmarks.inference.benchmark_targets import REFERENCES, TARGETS, load_reference, make_target


@pytest.mark.parametrize("name", TARGETS)
def test_every_name_makes_a_target_with_scores_in_single_precision(name):
    target = make_target(name)
    x = torch.randn(4, target.dimension)
    assert target.log_prob(x).shape == (4,)
    assert target.score(x).shape == x.shape
    assert target.score(x).dtype == torch.float32


def test_features_of_the_regression_are_standardised_with_an_intercept():
    target = make_target("logistic_regression")
    assert target.features.shape == (569, 31)
    torch.testing.assert_close(target.features[:, :-1].mean(0), torch.zeros(30), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.features[:, :-1].std(0, correction=0), torch.ones(30))
    assert (target.features[:, -1] == 1).all()
    assert int(target.labels.sum()) == 357


@pytest.mark.parametrize("name", ["logistic_regression", "conditioned_diffusion", "rare_events"])
def test_a_reference_has_chains_that_agree_and_draws_of_its_moments_and_of_its_target(name):
    """E[score] = 0 and E[score (x - mean)^T] = -I, within the error of 2,000 draws that are nearly independent."""
    reference, target = load_reference(name), make_target(name)
    dimension, metadata = target.dimension, reference.metadata
    assert float(metadata["max_rhat"]) < 1.01
    assert float(metadata["min_ess"]) > 4000
    assert float(metadata["covariance_floor"]) < 0.1
    assert metadata["divergences"] == "0"
    assert reference.draws.shape == (2000, dimension)
    assert reference.mean.shape == (dimension,)
    assert reference.covariance.shape == reference.covariance_1.shape == (dimension, dimension)
    assert (REFERENCES / f"{name}.safetensors").stat().st_size < 1_000_000
    std, root = reference.covariance.diagonal().sqrt(), math.sqrt(len(reference.draws))
    assert ((reference.draws.mean(0) - reference.mean) / std).abs().max() < 5 / root
    assert (reference.draws.T.cov() - reference.covariance).norm() / reference.covariance.norm() < 0.3
    assert ((reference.mean_1 + reference.mean_2) / 2 - reference.mean).abs().max() < 1e-4
    draws = reference.draws.double()
    score = target.score(draws)
    assert (score.mean(0).abs() / score.std(0) * root).max() < 5
    products = score * (draws - reference.mean)
    assert ((products.mean(0) + 1).abs() / products.std(0) * root).max() < 5


def test_rare_events_agree_with_quadrature():
    """Given mu the rates are independent: means and variances of their marginals by sums over two grids."""
    target, reference = make_target("rare_events"), load_reference("rare_events")
    mu = torch.linspace(-16, 12, 141, dtype=torch.float64)
    x = torch.linspace(-24, 12, 361, dtype=torch.float64)
    likelihood = target.counts[:, None] * x - target.exposures[:, None] * x.exp()
    joint = likelihood[:, None] - 0.5 * (x - mu[:, None]).square() / 3**2
    of_mu = (joint.logsumexp(2).sum(0) - 0.5 * mu.square() / 3**2).softmax(0)
    marginals = torch.einsum("m,nmx->nx", of_mu, joint.softmax(2))
    mean = torch.cat([marginals @ x, (of_mu @ mu)[None]])
    variance = torch.cat([marginals @ x.square(), (of_mu @ mu.square())[None]]) - mean.square()
    std = variance.sqrt()
    assert ((reference.mean - mean).abs() / std).max() < 0.03
    assert (reference.covariance.diagonal() / variance - 1).abs().max() < 0.05


@pytest.fixture
def make_references():
    pytest.importorskip("pyro")
    from training.benchmarks.inference import make_references

    return make_references


def test_a_reference_is_made(make_references, tmp_path, monkeypatch):
    for name, number in {"NUM_CHAINS": 2, "NUM_DRAWS": 20, "NUM_WARMUP": 10, "NUM_KEPT": 8}.items():
        monkeypatch.setattr(make_references, name, number)
    flags = ["--targets", "rare_events"]
    make_references.main([*flags, f"--output_dir={tmp_path}"])
    reference = load_reference("rare_events", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rare_events.safetensors"]
    assert reference.draws.shape == (8, 10)
    assert reference.metadata["num_draws"] == "20"
    with pytest.raises(ValueError, match="is not empty: name another folder"):
        make_references.main([*flags, f"--output_dir={tmp_path}"])
    make_references.main([*flags, f"--output_dir={tmp_path}", "--overwrite_output_dir", "true"])
    assert torch.equal(load_reference("rare_events", tmp_path).draws, reference.draws)


def test_moments_and_quality_of_chains_are_those_of_their_draws(make_references):
    chains = torch.randn(4, 500, 3, dtype=torch.float64)
    chains[2:] += 0.5
    reference = make_references.summarise(chains)
    halves = chains.reshape(2, 1000, 3)
    torch.testing.assert_close(reference.covariance, chains.reshape(-1, 3).T.cov())
    torch.testing.assert_close(torch.stack([reference.mean_1, reference.mean_2]), halves.mean(1))
    torch.testing.assert_close(reference.covariance_2, halves[1].T.cov())
    assert float(reference.metadata["max_rhat"]) > 1.02
    assert 0.4 < float(reference.metadata["mean_floor"]) < 0.6
    assert reference.draws.shape == (2000, 3)
