import pytest
import torch

from hsivi_diffusers.vi.chains import SimulatedChain, draw_marginals, simulate
from hsivi_diffusers.vi.distributions import DiagonalGaussian
from hsivi_diffusers.vi.pools import CohortChain, FrozenPoolChain, PoolChain, make_chain
from hsivi_diffusers.vi.regression import PairChain, PairMixingChain
from scenarios import DIMENSION, LinearLayers, linear_layers, matching_bridge


class Recorded(DiagonalGaussian):
    """A law whose next draw is given, so that a pool and a simulation can share their noise."""

    def __init__(self, q, noise):
        super().__init__(q.mean, q.std)
        object.__setattr__(self, "noise", noise)

    def rsample(self, noise):
        return super().rsample(self.noise)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
        assert len(rows.unique()) == size
        assert torch.equal(batch.x_next, simulate(layers, x, batch.t, noise))
        done = batch.t == 0
        life[rows[done]] += 1
        pool.sample_base = lambda n, _, rows=rows: bases[life[rows], rows]
        used = noises[lives, batch.t, rows]
        pool.advance(batch, Recorded(layers(batch.x_next, batch.t), used), generator(step))
    assert life.min() >= 1


def check_law(rows, mean, variance):
    """Of the moments of rows, to four standard errors."""
    mean, variance = float(mean), float(variance)
    assert float(rows.mean()) == pytest.approx(mean, abs=4 * (variance / rows.numel()) ** 0.5)
    assert float(rows.var()) == pytest.approx(variance, rel=4 * (2 / rows.numel()) ** 0.5)


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


# ----- a cohort at a time -----


def test_a_cohort_is_one_layer_with_its_marginal_and_all_layers_have_their_turn():
    layers, size = linear_layers(), 1000
    chain = CohortChain(matching_bridge(layers).sample_base, 3, size)
    mean, variance = (moment.detach() for moment in layers.marginals())
    random, seen, visits = generator(), {}, torch.zeros(3)
    for _ in range(60):
        batch = chain.draw(layers, random)
        assert len(batch.t.unique()) == 1
        assert len(batch.index.unique()) == len(batch.x_next) == size
        visits[batch.t[0]] += 1
        seen[int(batch.t[0])] = batch.x_next
        chain.advance(batch, layers(batch.x_next, batch.t), random)
    assert bool((visits >= 10).all())
    for t, rows in seen.items():
        check_law(rows, mean[t + 1], variance[t + 1])


# ----- several hierarchies -----

DEPTHS = [1, 2, 4]
FIRST = torch.tensor([0, 2, 2, 6, 6, 6, 6])  # the layer that a chain of each layer starts with
LAST = torch.tensor([0, 1, 1, 3, 3, 3, 3])


def several_hierarchies():
    """Linear layers of three hierarchies, and mean and variance of the input of each layer."""
    scale, shift = [0.3, 0.8, -0.7, 0.9, 0.5, -1.2, 0.6], [2.0, 0.3, 1.0, -1.5, 0.4, 0.8, -0.6]
    std = [0.5, 0.4, 0.9, 0.3, 0.7, 0.5, 1.1]
    moments = []
    for first, last in ((0, 0), (2, 1), (6, 3)):
        mean, variance = LinearLayers(*(each[last : first + 1] for each in (scale, shift, std))).marginals()
        moments += zip(mean[1:].tolist(), variance[1:].tolist(), strict=True)
    return LinearLayers(scale, shift, std), moments


def bases(size, random):
    return torch.randn(size, DIMENSION, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("source", ["pool", "simulate"])
def test_inputs_have_the_marginals_of_their_own_hierarchy_in_equal_parts(source):
    layers, moments = several_hierarchies()
    size, random = 6000, generator()
    chain = make_chain(source, bases, DEPTHS, size)
    for _ in range(8):
        batch = chain.draw(layers, random)
        chain.advance(batch, layers(batch.x_next, batch.t), random)
    for depth, last in zip(DEPTHS, (0, 1, 3), strict=True):
        for t in range(last, last + depth):
            rows, (mean, variance) = batch.x_next[batch.t == t], moments[t]
            assert len(rows) == pytest.approx(size / 3 / depth, abs=5 * (size / 3 / depth) ** 0.5)
            check_law(rows, mean, variance)


def test_simulate_starts_each_row_at_the_top_of_its_hierarchy_and_gives_it_its_condition():
    layers, _ = several_hierarchies()
    x, noise = bases(7, generator()), torch.randn(7, 7, DIMENSION, dtype=torch.float64)
    condition = torch.arange(7, dtype=torch.float64)
    simulated = simulate(layers, x, torch.arange(7), noise, condition, first=FIRST)
    for t, first in enumerate(FIRST.tolist()):
        wanted = x[t]
        for above in range(first, t, -1):
            shift = layers.shift[above] + condition[t]
            wanted = layers.scale[above] * wanted + shift + layers.std[above] * noise[above, t]
        torch.testing.assert_close(simulated[t], wanted.detach())
    assert not simulated.requires_grad


def test_a_chain_stays_in_its_hierarchy_and_starts_again_at_its_top():
    """A pool starts with equal parts at every depth."""
    layers, _ = several_hierarchies()
    pool, random = PoolChain(bases, DEPTHS, 6), generator()
    pool.draw(layers, random)
    assert torch.bincount(pool.t).tolist() == [8, 4, 4, 2, 2, 2, 2]
    hierarchy, ended = FIRST[pool.t], torch.zeros(7)
    for step in range(60):
        batch = pool.draw(layers, random)
        fresh = bases(6, generator(step))
        pool.advance(batch, layers(batch.x_next, batch.t), generator(step))
        done = batch.t == LAST[batch.t]
        assert torch.equal(pool.t[batch.index], torch.where(done, FIRST[batch.t], batch.t - 1))
        assert torch.equal(pool.x_next[batch.index[done]], fresh[done])
        assert torch.equal(FIRST[pool.t], hierarchy)
        ended += torch.bincount(batch.t[done], minlength=7)
    assert ended.nonzero().flatten().tolist() == [0, 1, 3]
    assert ended.sum() > 100


def test_fresh_chains_of_several_hierarchies_cost_no_call_above_the_top():
    layers, _ = several_hierarchies()
    SimulatedChain(bases, DEPTHS, 200).draw(layers, generator())
    assert layers.calls == max(DEPTHS) - 1


@pytest.mark.parametrize("sample_condition", [None, labels])
def test_a_restored_pool_of_several_hierarchies_goes_on_as_the_one_that_was_saved(sample_condition):
    layers, _ = several_hierarchies()
    first, second = (PoolChain(bases, DEPTHS, 4, sample_condition) for _ in range(2))
    first.draw(layers, generator())
    state, kept = ({name: tensor.clone() for name, tensor in first.state_dict().items()} for _ in range(2))
    second.load_state_dict(state)
    for step in range(1, 20):
        for pool in (first, second):
            batch = pool.draw(layers, generator(step))
            pool.advance(batch, layers(batch.x_next, batch.t, batch.condition), generator(-step))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        assert torch.equal(state[name], kept[name])


# ----- layer by layer -----


def one_layer(t):
    return torch.eye(3)[t]


def frozen_pool(layers, size=50, num_states=4000, sample_condition=None):
    base = matching_bridge(layers).sample_base
    chain = FrozenPoolChain(base, 3, size, sample_condition)
    chain.num_states = num_states
    return chain


def test_the_first_layer_is_given_fresh_draws_of_the_base():
    layers = linear_layers()
    chain = frozen_pool(layers)
    batch = chain.draw(layers, generator(4), one_layer(2))
    assert torch.equal(batch.x_next, chain.sample_base(50, generator(4)))
    assert batch.t.tolist() == [2] * 50
    assert chain.state_dict() == {}
    assert layers.calls == 0


def test_a_frozen_pool_has_the_law_of_the_marginal_above_the_layer_that_learns():
    layers = linear_layers()
    chain = frozen_pool(layers, num_states=20_000)
    mean, variance = (moment.detach() for moment in layers.marginals())
    for t in (2, 1, 0):
        chain.draw(layers, generator(t), one_layer(t))
        if t < 2:
            check_law(chain.x_next, mean[t + 1], variance[t + 1])
    assert not chain.x_next.requires_grad


def test_a_batch_is_of_rows_of_the_pool_which_moves_when_the_next_layer_learns():
    layers = linear_layers()
    chain = frozen_pool(layers)
    chain.draw(layers, generator(0), one_layer(1))
    pool, calls = chain.x_next.clone(), layers.calls
    batches = [chain.draw(layers, generator(seed), one_layer(1)) for seed in (1, 2)]
    for batch in batches:
        assert bool((batch.x_next[:, None] == pool[None]).all(2).any(1).all())
    assert not torch.equal(batches[0].x_next, batches[1].x_next)
    assert torch.equal(chain.x_next, pool)
    assert layers.calls == calls
    chain.draw(layers, generator(3), one_layer(0))
    assert layers.calls == calls + 1
    assert not torch.equal(chain.x_next, pool)


def test_conditions_go_down_with_a_frozen_pool():
    layers = LinearLayers(scale=[1.0, 1.0, 1.0], shift=[0.0, 0.0, 0.0], std=[1e-3, 1e-3, 1e-3])
    chain = FrozenPoolChain(lambda size, _: torch.zeros(size, DIMENSION).double(), 3, 50, labels)
    chain.num_states = 200
    batch = chain.draw(layers, generator(), one_layer(0))
    torch.testing.assert_close(batch.x_next.mean(1), 2 * batch.condition, rtol=0, atol=0.1)
    assert len(batch.condition.unique()) > 10


@pytest.mark.parametrize("sample_condition", [None, labels])
def test_a_restored_frozen_pool_goes_on_as_the_one_that_was_saved(sample_condition):
    layers = linear_layers()
    first, second = (frozen_pool(layers, sample_condition=sample_condition) for _ in range(2))
    first.draw(layers, generator(), one_layer(1))
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for t in (1, 0):
        batches = [chain.draw(layers, generator(t + 1), one_layer(t)) for chain in (first, second)]
        assert torch.equal(batches[0].x_next, batches[1].x_next)
        if sample_condition is not None:
            assert torch.equal(batches[0].condition, batches[1].condition)


# ----- what all of them share -----


@pytest.mark.parametrize("kind", [PoolChain, FrozenPoolChain])
def test_the_state_before_the_first_draw_may_be_restored_later(kind):
    layers = linear_layers()
    chain = kind(matching_bridge(layers).sample_base, 3, 4)
    state = chain.state_dict()
    drawn = [chain.draw(layers, generator(), one_layer(1)).x_next for _ in range(2)]
    chain.load_state_dict(state)
    drawn.append(chain.draw(layers, generator(), one_layer(2)).x_next)
    fresh = kind(matching_bridge(layers).sample_base, 3, 4)
    assert torch.equal(drawn[2], fresh.draw(layers, generator(), one_layer(2)).x_next)


@pytest.mark.parametrize("sample_condition", [None, labels])
def test_with_one_layer_all_chains_draw_the_same_fresh_bases(sample_condition):
    layers = LinearLayers(scale=[0.5], shift=[1.0], std=[0.3])
    kinds = (SimulatedChain, PoolChain, CohortChain, FrozenPoolChain)
    chains = [kind(matching_bridge(layers).sample_base, 1, 6, sample_condition) for kind in kinds]
    assert chains[0].state_dict() == {}
    for step in range(3):
        random = [generator(step) for _ in chains]
        batches = [chain.draw(layers, of, torch.ones(1)) for chain, of in zip(chains, random, strict=True)]
        for chain, of, batch in zip(chains, random, batches, strict=True):
            chain.advance(batch, layers(batch.x_next, batch.t, batch.condition), of)
            assert torch.equal(batch.x_next, batches[0].x_next)
            assert batch.t.tolist() == [0] * 6
            assert (batch.condition is None) == (sample_condition is None)
            assert sample_condition is None or torch.equal(batch.condition, batches[0].condition)
            assert torch.equal(of.get_state(), random[0].get_state())


def drawn_by_another(chain):
    layers = linear_layers()
    batch = SimulatedChain(bases, 3, 4).draw(layers, generator())
    chain.advance(batch, layers(batch.x_next, batch.t), generator())


def draw_upwards(chain):
    for t in (0, 1):
        chain.draw(linear_layers(), generator(), one_layer(t))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: drawn_by_another(PoolChain(bases, 3, 4)), "batch that draw"),
        (lambda: CohortChain(bases, [2, 3], 4), r"num_layers=\[2, 3\]: a CohortChain has one hierarchy"),
        (lambda: make_chain("replay", bases, 3, 4), "source='replay' is unknown: choose 'pool' or 'simulate'"),
        (lambda: draw_upwards(frozen_pool(linear_layers())), r"layers \[1\] are to learn, the pool is at layer 0"),
        *(
            (lambda beta=beta: frozen_pool(linear_layers()).draw(None, None, beta), "trains one layer after the other")
            for beta in (None, torch.ones(3), torch.zeros(3))
        ),
    ],
)
def test_what_a_chain_cannot_do_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


# ----- draws from the whole hierarchy -----


def test_each_marginal_is_drawn_from_the_one_above():
    layers = linear_layers()
    x = matching_bridge(layers).sample_base(5, generator())
    draws = draw_marginals(layers, x, generator(1))
    assert draws[3] is x
    random = generator(1)
    for t in (2, 1, 0):
        noise = torch.randn(5, DIMENSION, generator=random, dtype=torch.float64)
        expected = layers.scale[t] * draws[t + 1] + layers.shift[t] + layers.std[t] * noise
        torch.testing.assert_close(draws[t], expected.detach())


# ----- pairs -----


def sample_pairs(t, generator):
    x = torch.randn(len(t), DIMENSION, generator=generator)
    return x, (2 + t[:, None]) * x, torch.arange(len(t))


@pytest.mark.parametrize(("num_layers", "shares"), [(1, [1]), (3, [0, 0, 1]), ([1, 2], [1 / 2, 0, 1 / 2])])
def test_a_pair_chain_draws_the_layers_that_take_the_base_with_the_ends_of_their_pairs(num_layers, shares):
    chain = PairChain(sample_pairs, num_layers, 3000)
    batch = chain.draw(None, generator())
    assert (batch.t.bincount() / 3000).tolist() == pytest.approx(shares, abs=0.04)
    assert torch.equal(batch.end, (2 + batch.t[:, None]) * batch.x_next)
    assert batch.condition.tolist() == list(range(3000))
    assert chain.state_dict() == {}


@pytest.mark.parametrize("num_layers", [1, 3, [1, 2]])
def test_pairs_are_mixed_in_where_a_chain_starts_and_nowhere_else(num_layers):
    """The layers add 1 to their input, so that a state of the pool shows the pair that its chain began with."""

    def shift(x_next, t, condition):
        return DiagonalGaussian(x_next + 1, torch.zeros(()))

    def sample_pairs(t, generator):
        return torch.full((len(t), DIMENSION), 100.0), (7.0 + t[:, None]).expand(-1, DIMENSION), 5 + t

    pool = PoolChain(bases, num_layers, 8, lambda size, generator: torch.full((size,), -1))
    chain, source = PairMixingChain(pool, sample_pairs), generator()
    for _ in range(60):
        batch = chain.draw(shift, source)
        chain.advance(batch, shift(batch.x_next, batch.t, None), source)
    first = chain.first[batch.t]
    starts = batch.t == first
    assert bool(starts.all()) is (num_layers == 1)
    assert torch.equal(batch.x_next, (100.0 + (first - batch.t)[:, None]).expand(-1, DIMENSION).to(batch.x_next))
    assert torch.equal(batch.end[starts], (7.0 + first[starts, None]).expand(-1, DIMENSION))
    assert batch.end[~starts].isnan().all()
    assert torch.equal(batch.condition, 5 + first)
    assert chain.state_dict().keys() == pool.state_dict().keys()


@pytest.mark.parametrize(("depths", "alone"), [([1], []), ([1, 3], [3]), ([1, 3], [])])
def test_a_share_of_the_rows_has_pairs_and_the_others_keep_fresh_draws(depths, alone):
    def sample_pairs(t, generator):
        return torch.full((len(t), DIMENSION), 100.0), torch.full((len(t), DIMENSION), 7.0), 5 + t

    inner = SimulatedChain(bases, depths, 4000, lambda size, generator: torch.full((size,), -1))
    chain = PairMixingChain(inner, sample_pairs, alone, 0.25)
    batch = chain.draw(lambda x_next, t, condition: DiagonalGaussian(x_next, torch.zeros(())), generator())
    paired = ~batch.end.isnan().any(1)
    starts, by_pairs = batch.t == chain.first[batch.t], torch.isin(batch.t, torch.tensor(alone))
    assert not paired[~starts].any()
    assert paired[by_pairs].all()
    assert paired[starts & ~by_pairs].float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(batch.x_next == 100, paired[:, None].expand(-1, DIMENSION))
    assert torch.equal(batch.condition, torch.where(paired, 5 + chain.first[batch.t], -1))
