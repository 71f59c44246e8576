import pytest
import torch

from hsivi_diffusers.vi import DiagonalGaussian, PoolChain, SimulatedChain, make_chain, simulate
from scenarios import DIMENSION, linear_layers, matching_bridge


class Recorded(DiagonalGaussian):
    """A law whose next draw is given, so that a pool and a simulation can share their noise."""

    def __init__(self, q, noise):
        super().__init__(q.mean, q.std)
        object.__setattr__(self, "noise", noise)

    def rsample(self, noise):
        return super().rsample(self.noise)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_simulate_follows_the_layers_down_to_the_one_asked_for():
    layers = linear_layers()
    x, noise = torch.randn(4, DIMENSION, dtype=torch.float64), torch.randn(3, 4, DIMENSION, dtype=torch.float64)
    x_2 = layers.scale[2] * x + layers.shift[2] + layers.std[2] * noise[2]
    x_1 = layers.scale[1] * x_2 + layers.shift[1] + layers.std[1] * noise[1]
    simulated = simulate(layers, x, torch.tensor([2, 1, 0, 0]), noise)
    torch.testing.assert_close(simulated[0], x[0])
    torch.testing.assert_close(simulated[1], x_2[1].detach())
    torch.testing.assert_close(simulated[2:], x_1[2:].detach())
    assert not simulated.requires_grad


def test_simulate_gives_each_row_its_condition():
    layers = linear_layers()
    x, noise = torch.zeros(2, DIMENSION, dtype=torch.float64), torch.zeros(3, 2, DIMENSION, dtype=torch.float64)
    condition = torch.tensor([0.0, 10.0], dtype=torch.float64)
    simulated = simulate(layers, x, torch.tensor([1, 1]), noise, condition)
    torch.testing.assert_close((simulated[1] - simulated[0]).detach(), torch.full((3,), 10.0, dtype=torch.float64))


@pytest.mark.parametrize("source", ["pool", "simulate"])
def test_layer_inputs_have_the_marginals_of_the_layers(source):
    layers, size = linear_layers(), 3000
    chain = make_chain(source, matching_bridge(layers).sample_base, 3, size)
    mean, variance = layers.marginals()
    random = generator()
    for _ in range(4):
        batch = chain.draw(layers, random)
        chain.advance(batch, layers(batch.x_next, batch.t), random)
    for t in range(3):
        rows = batch.x_next[batch.t == t]
        assert len(rows) > size / 3 * 0.8
        error = 5 * (variance[t + 1] / rows.numel()).sqrt()
        assert (rows.mean() - mean[t + 1]).abs() < error
        assert (rows.var() / variance[t + 1] - 1).abs() < 0.1


def test_given_the_same_noise_pool_and_simulation_give_identical_inputs_while_the_student_is_frozen():
    layers, size, steps = linear_layers(), 6, 30
    bases = torch.randn(steps, 3 * size, DIMENSION, dtype=torch.float64)
    noises = torch.randn(steps, 3, 3 * size, DIMENSION, dtype=torch.float64)
    life = torch.zeros(3 * size, dtype=torch.long)  # how often each chain of the pool was started
    pool = PoolChain(lambda n, _: torch.zeros(n, DIMENSION, dtype=torch.float64), 3, size)
    pool.draw(layers, generator())
    pool.x_next, pool.t = bases[0].clone(), torch.full((3 * size,), 2)  # known bases for the first lives

    for step in range(steps):
        batch = pool.draw(layers, generator(step))
        rows, lives = batch.index, life[batch.index]
        x, noise = bases[lives, rows], noises[lives, :, rows].transpose(0, 1)
        assert torch.equal(batch.x_next, simulate(layers, x, batch.t, noise))
        done = batch.t == 0
        life[rows[done]] += 1
        pool.sample_base = lambda n, _, rows=rows: bases[life[rows], rows]
        used = noises[lives, batch.t, rows]
        pool.advance(batch, Recorded(layers(batch.x_next, batch.t), used), generator(step))
    assert life.min() >= 1


def test_a_pool_moves_what_it_drew_by_one_layer_and_leaves_the_rest():
    layers = linear_layers()
    pool = PoolChain(matching_bridge(layers).sample_base, 3, 4)
    batch = pool.draw(layers, generator())
    before, depths = pool.x_next.clone(), pool.t.clone()
    calls = layers.calls
    pool.advance(batch, layers(batch.x_next, batch.t), generator(1))
    assert layers.calls == calls + 1
    others = torch.ones(12, dtype=torch.bool)
    others[batch.index] = False
    assert torch.equal(pool.x_next[others], before[others])
    assert torch.equal(pool.t[others], depths[others])
    assert torch.equal(pool.t[batch.index], (batch.t - 1) % 3)
    assert len(set(batch.index.tolist())) == 4


def test_a_pool_starts_with_as_many_chains_at_every_depth():
    pool = PoolChain(matching_bridge(linear_layers()).sample_base, 3, 4)
    pool.draw(linear_layers(), generator())
    assert torch.bincount(pool.t).tolist() == [4, 4, 4]


def labels(size, random):
    return torch.randint(100, (size,), generator=random).double()


def test_conditions_stay_with_their_chain_and_change_when_it_starts_again():
    layers = linear_layers()
    pool = make_chain("pool", matching_bridge(layers).sample_base, 3, 5, labels)
    assert isinstance(pool, PoolChain)
    random = generator()
    for _ in range(6):
        batch = pool.draw(layers, random)
        assert torch.equal(batch.condition, pool.condition[batch.index])
        before = pool.condition.clone()
        pool.advance(batch, layers(batch.x_next, batch.t, batch.condition), random)
        kept = torch.ones(15, dtype=torch.bool)
        kept[batch.index[batch.t == 0]] = False
        assert torch.equal(pool.condition[kept], before[kept])
    assert not torch.equal(pool.condition, labels(15, generator()))


def test_simulated_chains_draw_fresh_conditions():
    chain = make_chain("simulate", matching_bridge(linear_layers()).sample_base, 3, 5, labels)
    batch = chain.draw(linear_layers(), generator())
    assert batch.condition.shape == (5,)
    assert batch.index is None
    assert chain.state_dict() == {}


@pytest.mark.parametrize("sample_condition", [None, labels])
def test_a_restored_pool_goes_on_as_the_one_that_was_saved(sample_condition):
    layers = linear_layers()
    base = matching_bridge(layers).sample_base
    first = PoolChain(base, 3, 4, sample_condition)
    assert first.state_dict() == {}
    first.draw(layers, generator())
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = PoolChain(base, 3, 4, sample_condition)
    second.load_state_dict({})
    assert second.x_next is None
    second.load_state_dict(state)
    for pool in (first, second):
        batch = pool.draw(layers, generator(1))
        pool.advance(batch, layers(batch.x_next, batch.t, batch.condition), generator(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_advance_refuses_a_batch_of_another_source():
    layers = linear_layers()
    base = matching_bridge(layers).sample_base
    batch = SimulatedChain(base, 3, 4).draw(layers, generator())
    with pytest.raises(ValueError, match="batch that draw"):
        PoolChain(base, 3, 4).advance(batch, layers(batch.x_next, batch.t), generator())


def test_an_unknown_source_is_refused_by_name():
    with pytest.raises(ValueError, match="source='replay' is unknown: choose 'pool' or 'simulate'"):
        make_chain("replay", matching_bridge(linear_layers()).sample_base, 3, 4)
