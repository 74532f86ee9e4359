"""Laws of pruning: bits are only cleared, the best always stays, the end is one discrete network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax.core import Alpha, Mask
from fedmetanas_jax.models.plan import darts_graph
from fedmetanas_jax.nas import mask, relax

GRAPH, SMALL = darts_graph(4), darts_graph(2)
# Compiled once each: operation by operation the same tests take many times as long.
jit = partial(jax.jit, static_argnums=0)
mix, harden, best, live_edges = map(jit, (relax.mix, relax.harden, relax.best, mask.live_edges))
prune, terminal = mask.prune, mask.terminal


def random_alpha(seed: int, scale: float = 1.0) -> Alpha:
    random = np.random.default_rng(seed)
    return Alpha(*(jnp.array(scale * random.normal(size=x.shape), jnp.float32) for x in mask.full(GRAPH)))


def equal(a: Mask, b: Mask) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def two_nodes(pair_logits=(0.0, 0.0, 0.0)) -> Alpha:
    """Normal cell: pairs of node 1 as given; the reduction cell all zero."""
    op = jnp.zeros((2, 5, 8))
    return Alpha(op, jnp.zeros((2, 4)).at[0, 1:].set(jnp.array(pair_logits)))


def test_full_mask_counts_everything():
    full = mask.full(GRAPH)
    assert [int(n) for n in mask.alive(GRAPH, full)] == [224, 40]
    assert mask.full_plan(GRAPH) == [[list(range(8))] * 14] * 2


@pytest.mark.parametrize(("temperature", "threshold"), [(1.0, 0.01), (0.3, 0.05), (0.1, 0.01), (1.0, 0.999)])
def test_prune_only_clears_keeps_the_best_and_is_idempotent(temperature, threshold):
    alpha, alive = random_alpha(0, scale=2.0), mask.full(GRAPH)
    for _ in range(3):  # also from masks that are not full
        pruned = prune(GRAPH, alpha, alive, temperature, threshold)
        assert all(not np.any(after & ~before) for after, before in zip(pruned, alive, strict=True))
        live, winner = live_edges(GRAPH, pruned), best(GRAPH, alpha, alive)
        assert np.array_equal(pruned.pair & winner.pair, winner.pair)
        assert np.array_equal(pruned.op & winner.op, winner.op & live[..., None])
        assert np.array_equal(pruned.op.any(-1), live)
        assert equal(prune(GRAPH, alpha, pruned, temperature, threshold), pruned)
        alive, alpha = pruned, random_alpha(1)


def test_prune_compares_noise_free_weights_at_the_given_temperature():
    """Seven rivals weigh less than .01 each once they trail by 4.53 at T = 1, or by .453 at T = .1."""
    for gap, temperature, alive in [(4.5, 1.0, 8), (4.6, 1.0, 1), (0.45, 0.1, 8), (0.46, 0.1, 1)]:
        alpha = Alpha(jnp.zeros((2, 14, 8)).at[..., 3].set(gap), jnp.zeros((2, 20)))
        pruned = prune(GRAPH, alpha, mask.full(GRAPH), temperature, 0.01)
        assert np.all(pruned.op.sum(-1) == alive)
        assert np.all(pruned.op[..., 3])
        assert np.all(pruned.pair)


def test_an_edge_in_no_surviving_pair_is_dead():
    pruned = prune(SMALL, two_nodes((9.0, 0.0, 0.0)), mask.full(SMALL), 1.0, 0.01)
    assert pruned.pair[0].tolist() == [True, True, False, False]
    assert live_edges(SMALL, pruned).tolist() == [[True, True, True, True, False], [True] * 5]
    assert pruned.op[0].sum(-1).tolist() == [8, 8, 8, 8, 0]
    assert mask.plan_of(SMALL, pruned) == [[list(range(8))] * 4 + [[]], [list(range(8))] * 5]
    assert [int(n) for n in mask.alive(SMALL, pruned)] == [9 * 8, 6]


def test_prune_leaves_the_rest_of_the_function_alone():
    """What was cleared had weight below the threshold, so the mix moves by little more."""
    alpha, full = random_alpha(2), mask.full(GRAPH)
    pruned = prune(GRAPH, alpha, full, 0.2, 1e-4)
    assert mask.alive(GRAPH, pruned)[0] < 200
    before, after = (mix(GRAPH, alpha, alive, 0.2) for alive in (full, pruned))
    assert np.abs(before - after).max() < 0.01
    assert not np.any(np.asarray(after)[~pruned.op])


def test_terminal_keeps_one_operation_on_two_edges_of_every_node():
    end = terminal(GRAPH, random_alpha(3), mask.full(GRAPH))
    assert [int(n) for n in mask.alive(GRAPH, end)] == [16, 8]
    assert np.array_equal(end.op.sum(-1), live_edges(GRAPH, end))
    assert equal(terminal(GRAPH, random_alpha(4), end), end)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_hardened_mix_is_the_mix_of_the_terminal_mask(temperature):
    """So a network's accuracy before and after the last step of pruning is the same."""
    alpha = random_alpha(5)
    for alive in (mask.full(GRAPH), prune(GRAPH, alpha, mask.full(GRAPH), 0.2, 0.05)):
        end = terminal(GRAPH, alpha, alive)
        hard = harden(GRAPH, alpha, alive)
        np.testing.assert_array_equal(hard, mix(GRAPH, alpha, end, temperature))
        np.testing.assert_array_equal(hard, mix(GRAPH, alpha, end, temperature, jax.random.key(0)))
        np.testing.assert_array_equal(hard > 0, end.op)


def test_a_plan_lists_what_is_alive_on_live_edges():
    alpha = random_alpha(6)
    pruned = prune(GRAPH, alpha, mask.full(GRAPH), 0.3, 0.1)
    plan = mask.plan_of(GRAPH, pruned)
    want = np.zeros((2, 14, 8), bool)
    for t in range(2):
        for e, ops in enumerate(plan[t]):
            want[t, e, ops] = True
    np.testing.assert_array_equal(pruned.op, want)
    assert sum(len(ops) for cell in plan for ops in cell) == mask.alive(GRAPH, pruned)[0]
    assert all(type(k) is int for cell in plan for ops in cell for k in ops)


def test_counts_and_plan_ignore_operations_of_dead_edges():
    """A mask put together elsewhere may still carry them."""
    alive = mask.full(SMALL)
    alive = Mask(alive.op, alive.pair.at[0, 2:].set(False))
    assert mask.alive(SMALL, alive)[0] == 9 * 8
    assert mask.plan_of(SMALL, alive)[0][SMALL.edges.index((2, 1))] == []


def test_confidence_is_the_mean_largest_probability_of_live_edges():
    full = mask.full(SMALL)
    assert mask.confidence(SMALL, two_nodes(), full) == (pytest.approx(1 / 8), pytest.approx(1 / 8))
    alpha = two_nodes((9.0, 0.0, 0.0))
    alpha = Alpha(alpha.op.at[0, 0, 2].set(2.0), alpha.pair)  # e^2 / (e^2 + 7) = .5135
    pruned = prune(SMALL, alpha, full, 1.0, 0.01)
    both = pytest.approx((0.513523 + 8 / 8) / 9, rel=1e-5)
    assert mask.confidence(SMALL, alpha, pruned) == (both, both)
    assert mask.confidence(SMALL, alpha, terminal(SMALL, alpha, full)) == (1, 1)
    # An edge that pruning alone has decided raises the first and leaves the second.
    decided = pruned._replace(op=pruned.op.at[0, 1, 1:].set(False))
    every, undecided = mask.confidence(SMALL, alpha, decided)
    assert every == pytest.approx((0.513523 + 1 + 7 / 8) / 9, rel=1e-5)
    assert undecided == pytest.approx((0.513523 + 7 / 8) / 8, rel=1e-5)


def test_entropy_is_a_share_of_what_the_undecided_edges_allow():
    full = mask.full(SMALL)
    assert mask.entropy(SMALL, two_nodes(), full) == pytest.approx(1)
    # Edge (0,0) of the normal cell: weights .513523 and 7 of .069497, so -sum p log p = 1.639332 of log 8 = 2.079442.
    alpha = two_nodes((9.0, 0.0, 0.0))
    alpha = Alpha(alpha.op.at[0, 0, 2].set(2.0), alpha.pair)
    assert mask.entropy(SMALL, alpha, full) == pytest.approx((1.639332 / 2.079442 + 9) / 10, rel=1e-5)
    # Of two operations that are left, .880797 and .119203: .365334 of log 2. Decided and dead edges do not count.
    pruned = prune(SMALL, alpha, full, 1.0, 0.01)  # without the last edge of the normal cell
    few = pruned._replace(op=pruned.op.at[0, 0].set(False).at[0, 0, 1:3].set(True).at[0, 1, 1:].set(False))
    assert mask.entropy(SMALL, alpha, few) == pytest.approx((0.365334 / 0.693147 + 7) / 8, rel=1e-5)
    assert mask.entropy(SMALL, alpha, terminal(SMALL, alpha, full)) == 0


def test_pruning_is_the_same_with_and_without_jit():
    alpha, full = random_alpha(7), mask.full(GRAPH)
    plain = mask.prune.__wrapped__(GRAPH, alpha, full, 0.2, 0.01)
    assert equal(prune(GRAPH, alpha, full, jnp.float32(0.2), 0.01), plain)


def test_without_pairs_every_edge_stays():
    """What a search of a graph such as NAS-Bench-201's prunes is operations alone."""
    graph = GRAPH._replace(cell_types=("cell",), pairs=())
    alpha, full = Alpha(random_alpha(8).op[:1], jnp.zeros((1, 0))), mask.full(graph)
    assert [int(n) for n in mask.alive(graph, full)] == [112, 0]
    pruned, end = prune(graph, alpha, full, 0.1, 0.05), terminal(graph, alpha, full)
    assert np.all(live_edges(graph, pruned))
    assert 14 < mask.alive(graph, pruned)[0] < 112
    assert np.all(end.op.sum(-1) == 1)
    np.testing.assert_array_equal(harden(graph, alpha, full), end.op)
    np.testing.assert_allclose(mix(graph, alpha, full, 1.0, jax.random.key(0)).sum(-1), 1, rtol=1e-6)


def test_thin_clears_the_smallest_weights_first_below_the_cap_and_never_the_largest():
    alpha, full = random_alpha(3), mask.full(GRAPH)
    weights, winner = jit(relax.softmax)(GRAPH, alpha, full, 1.0), best(GRAPH, alpha, full)
    some = mask.thin(GRAPH, alpha, full, 1.0, ops=150, pairs=40, cap=1.0)
    gone = np.asarray(full.op & ~some.op)
    assert (int(some.op.sum()), int(some.pair.sum())) == (150, 40)
    assert not np.any(gone & np.asarray(winner.op))
    stay = np.asarray(some.op & ~winner.op)
    assert np.max(np.asarray(weights.op)[gone]) <= np.min(np.asarray(weights.op)[stay])
    capped = mask.thin(GRAPH, alpha, full, 1.0, ops=0, pairs=0, cap=0.05)
    assert np.all(np.asarray(weights.op)[np.asarray(capped.op & ~winner.op)] >= 0.05)
    everything = mask.thin(GRAPH, alpha, full, 1.0, ops=0, pairs=0, cap=2.0)
    assert equal(everything, terminal(GRAPH, alpha, full))
    assert equal(mask.thin(GRAPH, alpha, some, 1.0, ops=150, pairs=40, cap=1.0), some)


def test_pairs_that_fall_take_their_edges_along():
    alpha, full = random_alpha(4), mask.full(SMALL)
    alpha = Alpha(alpha.op[:, :5], alpha.pair[:, :4])
    few = mask.thin(SMALL, alpha, full, 1.0, ops=80, pairs=4, cap=1.0)
    assert [int(x) for x in mask.alive(SMALL, few)] == [64, 4]  # node 1 keeps one pair: one edge of five is dead
    assert mask.sizes(SMALL) == ((80, 8), (8, 4))
    assert mask.sizes(GRAPH) == ((224, 40), (16, 8))
