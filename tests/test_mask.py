"""Laws of pruning: bits are only cleared, the best always stays, the end is one discrete network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax import topology
from fedmetanas_jax.core import Alpha, Mask
from fedmetanas_jax.nas import mask, relax

NODES = 4
# Compiled once each: operation by operation the same tests take many times as long.
mix, harden, best = (jax.jit(f) for f in (relax.mix, relax.harden, relax.best))
prune, terminal, live_edges = (jax.jit(f) for f in (mask.prune, mask.terminal, mask.live_edges))


def random_alpha(seed: int, scale: float = 1.0) -> Alpha:
    random = np.random.default_rng(seed)
    return Alpha(*(jnp.array(scale * random.normal(size=x.shape), jnp.float32) for x in mask.full(NODES)))


def equal(a: Mask, b: Mask) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def two_nodes(pair_logits=(0.0, 0.0, 0.0)) -> Alpha:
    """Normal cell: pairs of node 1 as given; the reduction cell all zero."""
    op = jnp.zeros((2, 5, 8))
    return Alpha(op, jnp.zeros((2, 4)).at[0, 1:].set(jnp.array(pair_logits)))


def test_full_mask_counts_everything():
    full = mask.full(NODES)
    assert [int(n) for n in mask.alive(full)] == [224, 40]
    assert mask.full_keep(NODES) == [[list(range(8))] * 14] * 2


@pytest.mark.parametrize(("temperature", "threshold"), [(1.0, 0.01), (0.3, 0.05), (0.1, 0.01), (1.0, 0.999)])
def test_prune_only_clears_keeps_the_best_and_is_idempotent(temperature, threshold):
    alpha, alive = random_alpha(0, scale=2.0), mask.full(NODES)
    for _ in range(3):  # also from masks that are not full
        pruned = prune(alpha, alive, temperature, threshold)
        assert all(not np.any(after & ~before) for after, before in zip(pruned, alive, strict=True))
        live, winner = live_edges(pruned), best(alpha, alive)
        assert np.array_equal(pruned.pair & winner.pair, winner.pair)
        assert np.array_equal(pruned.op & winner.op, winner.op & live[..., None])
        assert np.array_equal(pruned.op.any(-1), live)
        assert equal(prune(alpha, pruned, temperature, threshold), pruned)
        alive, alpha = pruned, random_alpha(1)


def test_prune_compares_noise_free_weights_at_the_given_temperature():
    """Seven rivals weigh less than .01 each once they trail by 4.53 at T = 1, or by .453 at T = .1."""
    for gap, temperature, alive in [(4.5, 1.0, 8), (4.6, 1.0, 1), (0.45, 0.1, 8), (0.46, 0.1, 1)]:
        alpha = Alpha(jnp.zeros((2, 14, 8)).at[..., 3].set(gap), jnp.zeros((2, 20)))
        pruned = prune(alpha, mask.full(NODES), temperature, 0.01)
        assert np.all(pruned.op.sum(-1) == alive)
        assert np.all(pruned.op[..., 3])
        assert np.all(pruned.pair)


def test_an_edge_in_no_surviving_pair_is_dead():
    pruned = prune(two_nodes((9.0, 0.0, 0.0)), mask.full(2), 1.0, 0.01)
    assert pruned.pair[0].tolist() == [True, True, False, False]
    assert live_edges(pruned).tolist() == [[True, True, True, True, False], [True] * 5]
    assert pruned.op[0].sum(-1).tolist() == [8, 8, 8, 8, 0]
    assert mask.keep(pruned) == [[list(range(8))] * 4 + [[]], [list(range(8))] * 5]
    assert [int(n) for n in mask.alive(pruned)] == [9 * 8, 6]


def test_prune_leaves_the_rest_of_the_function_alone():
    """What was cleared had weight below the threshold, so the mix moves by little more."""
    alpha, full = random_alpha(2), mask.full(NODES)
    pruned = prune(alpha, full, 0.2, 1e-4)
    assert mask.alive(pruned)[0] < 200
    before, after = (mix(alpha, alive, 0.2) for alive in (full, pruned))
    assert np.abs(before - after).max() < 0.01
    assert not np.any(np.asarray(after)[~pruned.op])


def test_terminal_keeps_one_operation_on_two_edges_of_every_node():
    end = terminal(random_alpha(3), mask.full(NODES))
    assert [int(n) for n in mask.alive(end)] == [16, 8]
    assert np.array_equal(end.op.sum(-1), live_edges(end))
    assert equal(terminal(random_alpha(4), end), end)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_hardened_mix_is_the_mix_of_the_terminal_mask(temperature):
    """So a network's accuracy before and after the last step of pruning is the same."""
    alpha = random_alpha(5)
    for alive in (mask.full(NODES), prune(alpha, mask.full(NODES), 0.2, 0.05)):
        end = terminal(alpha, alive)
        hard = harden(alpha, alive)
        np.testing.assert_array_equal(hard, mix(alpha, end, temperature))
        np.testing.assert_array_equal(hard, mix(alpha, end, temperature, jax.random.key(0)))
        np.testing.assert_array_equal(hard > 0, end.op)


def test_keep_lists_what_is_alive_on_live_edges():
    alpha = random_alpha(6)
    pruned = prune(alpha, mask.full(NODES), 0.3, 0.1)
    keep = mask.keep(pruned)
    want = np.zeros((2, 14, 8), bool)
    for t in range(2):
        for e, ops in enumerate(keep[t]):
            want[t, e, ops] = True
    np.testing.assert_array_equal(pruned.op, want)
    assert sum(len(ops) for cell in keep for ops in cell) == mask.alive(pruned)[0]
    assert all(type(k) is int for cell in keep for ops in cell for k in ops)


def test_counts_and_keep_ignore_operations_of_dead_edges():
    """A mask put together elsewhere may still carry them."""
    alive = mask.full(2)
    alive = Mask(alive.op, alive.pair.at[0, 2:].set(False))
    assert mask.alive(alive)[0] == 9 * 8
    assert mask.keep(alive)[0][topology.edge(1, 2)] == []


def test_confidence_is_the_mean_largest_probability_of_live_edges():
    full = mask.full(2)
    assert mask.confidence(two_nodes(), full) == pytest.approx(1 / 8)
    alpha = two_nodes((9.0, 0.0, 0.0))
    alpha = Alpha(alpha.op.at[0, 0, 2].set(2.0), alpha.pair)  # e^2 / (e^2 + 7) = .5135
    pruned = prune(alpha, full, 1.0, 0.01)
    assert mask.confidence(alpha, pruned) == pytest.approx((0.513523 + 8 / 8) / 9, rel=1e-5)
    assert mask.confidence(alpha, terminal(alpha, full)) == 1


def test_pruning_is_the_same_with_and_without_jit():
    alpha, full = random_alpha(7), mask.full(NODES)
    assert equal(prune(alpha, full, jnp.float32(0.2), 0.01), mask.prune(alpha, full, 0.2, 0.01))
