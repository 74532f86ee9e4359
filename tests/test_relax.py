"""Laws of the relaxation: Eq. 1 and Eq. 8, with and without noise, temperature and masks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax.core import Alpha, Mask
from fedmetanas_jax.models.plan import darts_graph, num_nodes
from fedmetanas_jax.nas import mask, relax

NODES = 4
GRAPH = darts_graph(NODES)
FIRST = [0, 2, 5, 9, 14]  # the first edge of every node
KEY = jax.random.key(7)
# Compiled once each: operation by operation the same tests take many times as long.
functions = relax.softmax, relax.mix, relax.harden, relax.best, relax.edge_weight
softmax, mix, harden, best, edge_weight = (partial(jax.jit(f, static_argnums=0), GRAPH) for f in functions)


def random_alpha(seed: int) -> Alpha:
    random = np.random.default_rng(seed)
    return Alpha(*(jnp.array(random.normal(size=x.shape), jnp.float32) for x in mask.full(GRAPH)))


def random_mask(seed: int) -> Mask:
    """A mask with rows of operations that are wholly dead and never a node without a pair."""
    random = np.random.default_rng(seed)
    full = mask.full(GRAPH)
    op = random.random(full.op.shape) < 0.6
    op[0, 3] = op[1, 9] = False
    pair = random.random(full.pair.shape) < 0.5
    pair[:, [j * (j + 1) * (j + 2) // 6 for j in range(NODES)]] = True
    return Mask(jnp.array(op), jnp.array(pair))


def sum_per_node(edge_values) -> np.ndarray:
    """[2, edges] -> [2, nodes]."""
    return np.add.reduceat(np.asarray(edge_values), FIRST[:-1], axis=1)


def random_loss(alpha, alive, temperature, key, seed=0):
    factor = jax.random.normal(jax.random.key(seed), alive.op.shape)
    return jnp.sum(factor * relax.mix(GRAPH, alpha, alive, temperature, key))


gradient_of_loss = jax.jit(jax.grad(random_loss))


def test_graph_of_four_nodes():
    assert [GRAPH.edges.index((0, j)) for j in range(4)] + [len(GRAPH.edges)] == FIRST
    assert darts_graph(2).pairs == ((0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 1, 2))
    assert relax.pairs_of_node(GRAPH).sum(1).tolist() == [1, 3, 6, 10]
    assert relax.incidence(darts_graph(2))[0].tolist() == [1, 1, 0, 0, 0]
    assert relax.incidence(darts_graph(2))[1:, 2:].tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("nodes", range(1, 12))
def test_number_of_nodes_is_read_from_the_number_of_edges(nodes):
    graph = darts_graph(nodes)
    assert num_nodes(((),) * len(graph.edges)) == nodes
    assert relax.incidence(graph).shape == (len(graph.pairs), len(graph.edges))


def test_initial_alphas_are_264_small_logits():
    alpha = relax.init_alpha(KEY, GRAPH)
    values = np.concatenate([x.ravel() for x in alpha])
    assert values.size == 264
    assert values.dtype == np.float32
    assert 0.8e-3 < values.std() < 1.2e-3


def test_start_is_uniform():
    alpha = jax.tree.map(jnp.zeros_like, relax.init_alpha(KEY, GRAPH))
    got = mix(alpha, mask.full(GRAPH), 1.0)
    for j in range(NODES):
        edges = slice(FIRST[j], FIRST[j + 1])
        np.testing.assert_allclose(got[:, edges], 2 / (j + 2) / 8, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("key", [None, KEY], ids=["noise-free", "gumbel"])
def test_a_nodes_edge_weights_sum_to_two(temperature, key):
    weights = softmax(random_alpha(0), random_mask(0), temperature, key)
    u = edge_weight(weights.pair)
    np.testing.assert_allclose(sum_per_node(u), 2, rtol=1e-5)
    np.testing.assert_allclose(u[:, :2], 1, rtol=1e-6)


def test_mix_is_equation_8_summed_over_pairs():
    alpha, temperature = random_alpha(1), 0.7
    output = np.random.default_rng(1).normal(size=(2, 14, 8, 5))  # o_k(x_i) of every edge, 5 numbers each
    a, b = (np.asarray(x, np.float64) / temperature for x in alpha)
    want = np.zeros((2, NODES, 5))
    for t in range(2):
        first_pair = 0
        for j in range(NODES):
            inputs = [(p, q) for p in range(j + 2) for q in range(p + 1, j + 2)]
            z = np.exp(b[t, first_pair : first_pair + len(inputs)])
            first_pair += len(inputs)
            for weight, pair in zip(z / z.sum(), inputs, strict=True):
                for i in pair:
                    row = np.exp(a[t, FIRST[j] + i])
                    want[t, j] += weight * (row / row.sum()) @ output[t, FIRST[j] + i]
    edges = np.einsum("teo,teod->ted", mix(alpha, mask.full(GRAPH), temperature), output)
    got = np.add.reduceat(edges, FIRST[:-1], axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", [None, KEY], ids=["noise-free", "gumbel"])
def test_a_constant_added_to_a_row_changes_nothing(key):
    alpha, alive = random_alpha(2), mask.full(GRAPH)
    node_of_pair = relax.pairs_of_node(GRAPH).argmax(0)
    moved = Alpha(alpha.op + jnp.arange(14.0)[:, None], alpha.pair + 3.0 * node_of_pair)
    want, got = (mix(x, alive, 0.5, key) for x in (alpha, moved))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", [None, KEY], ids=["noise-free", "gumbel"])
def test_gradients_of_a_row_sum_to_zero(key):
    gradient = gradient_of_loss(random_alpha(3), random_mask(3), 0.5, key)
    assert np.abs(gradient.op).max() > 1e-3
    np.testing.assert_allclose(gradient.op.sum(-1), 0, atol=1e-6)
    np.testing.assert_allclose(gradient.pair @ relax.pairs_of_node(GRAPH).T, 0, atol=1e-6)


def test_cold_samples_are_the_argmax_of_their_noise():
    alpha, alive = random_alpha(4), random_mask(4)
    warm, cold = (softmax(alpha, alive, t, KEY) for t in (1.0, 1e-4))
    one_hot = (warm.op == warm.op.max(-1, keepdims=True)) & alive.op
    np.testing.assert_allclose(cold.op, one_hot, atol=1e-6)
    np.testing.assert_allclose(cold.op.sum(-1), alive.op.any(-1), atol=1e-6)
    u = edge_weight(cold.pair)
    np.testing.assert_allclose(u, np.round(u), atol=1e-6)
    np.testing.assert_allclose(sum_per_node(u), 2, atol=1e-6)


@pytest.mark.parametrize("temperature", [2.0, 0.2])
def test_a_draw_picks_the_argmax_as_often_as_the_softmax_says(temperature):
    """Chi-square over all rows, for operations and for the pairs of the last node, at any temperature."""
    alpha, alive, draws = random_alpha(5), mask.full(GRAPH), 4000
    drawn = jax.jit(jax.vmap(partial(relax.softmax, GRAPH), (None, None, None, 0)))(
        alpha, alive, temperature, jax.random.split(KEY, draws)
    )
    expected = softmax(alpha, alive, 1.0)
    for samples, probability in [(drawn.op, expected.op), (drawn.pair[..., 10:], expected.pair[..., 10:])]:
        entries = probability.shape[-1]
        count = np.sum(np.asarray(samples).argmax(-1)[..., None] == np.arange(entries), axis=0)
        want = draws * np.asarray(probability, np.float64)
        statistic, freedom = np.sum((count - want) ** 2 / want), probability.size // entries * (entries - 1)
        assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("key", [None, KEY], ids=["noise-free", "gumbel"])
def test_masked_entries_have_no_weight_and_no_gradient(temperature, key):
    alpha, alive = random_alpha(6), random_mask(6)
    alpha = Alpha(alpha.op.at[0, 0].multiply(1e4), alpha.pair)  # however large its logits
    weights = softmax(alpha, alive, temperature, key)
    gradient = gradient_of_loss(alpha, alive, temperature, key)
    for values in (weights, gradient):
        assert all(np.isfinite(x).all() for x in values)
        assert not np.any(np.asarray(values.op)[~alive.op])
        assert not np.any(np.asarray(values.pair)[~alive.pair])
    np.testing.assert_allclose(weights.op.sum(-1), alive.op.any(-1), rtol=1e-5)
    assert not alive.op[0, 3].any()  # the law was tried on a row with nothing alive


def test_no_nan_is_made_on_the_way():
    with jax.debug_nans(True):
        jax.grad(random_loss)(random_alpha(6), random_mask(6), 0.1, None)


def test_second_derivatives_are_finite():
    alpha, alive = random_alpha(7), random_mask(7)

    def norm(alpha):
        return sum(jnp.sum(g**2) for g in gradient_of_loss(alpha, alive, 0.5, None))

    second = jax.jit(jax.grad(norm))(alpha)
    assert all(np.isfinite(x).all() for x in second)
    assert not np.any(np.asarray(second.op)[~alive.op])


def test_a_draw_is_a_function_of_its_key_alone_also_in_a_batch():
    alpha, alive, keys = random_alpha(8), mask.full(GRAPH), jax.random.split(KEY, 3)
    batch = jax.jit(jax.vmap(lambda key: mix(alpha, alive, 0.3, key)))(keys)
    for got, key in zip(batch, keys, strict=True):
        np.testing.assert_allclose(got, mix(alpha, alive, 0.3, key), rtol=1e-4, atol=1e-6)
    assert np.abs(batch[0] - batch[1]).max() > 0.1


def test_hardened_mix_is_one_operation_on_two_edges_of_every_node():
    hard = np.asarray(harden(random_alpha(9), mask.full(GRAPH)))
    assert set(np.unique(hard)) == {0.0, 1.0}
    assert hard.sum(-1).max() == 1
    assert np.array_equal(sum_per_node(hard.sum(-1)), np.full((2, NODES), 2))


def test_hardened_mix_is_the_limit_of_the_soft_one():
    alpha, alive = random_alpha(10), mask.full(GRAPH)
    np.testing.assert_allclose(mix(alpha, alive, 1e-4), harden(alpha, alive), atol=1e-6)


def test_ties_go_to_the_lowest_alive_index():
    alpha = jax.tree.map(jnp.zeros_like, random_alpha(0))
    alive = mask.full(GRAPH)
    alive = Mask(alive.op.at[0, 1, :3].set(False), alive.pair.at[0, 1].set(False))
    winner = best(alpha, alive)
    assert winner.op.argmax(-1)[0, :3].tolist() == [0, 3, 0]
    assert np.flatnonzero(winner.pair[0]).tolist() == [0, 2, 4, 10]
    assert np.flatnonzero(winner.pair[1]).tolist() == [0, 1, 4, 10]
