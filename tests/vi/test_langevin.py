import torch

from hsivi_diffusers.vi.langevin import langevin


def test_chains_never_call_the_score_at_what_is_not_finite_and_stay_where_it_is_infinite():
    def score(u):
        assert u.isfinite().all()
        return torch.where(u.abs() < 10, -u, -torch.inf * u.sign())

    start = torch.tensor([0.5, -2.0, 30.0])[:, None]
    ends, stein = langevin(score, start, 50, torch.Generator().manual_seed(0))
    assert bool((ends[:2] != start[:2]).all() and (ends[:2].abs() < 10).all())
    assert ends[2] == start[2]
    assert not stein[2].isfinite()
