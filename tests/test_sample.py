"""Networks drawn from logits: how often, their gradients, what is left alone, what they cost."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_model import jit

from fedmetanas_jax import optimizers, tree
from fedmetanas_jax.core import Alpha, Graph, Mask
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax, sample

SHAPE = {"shape": (8, 8, 1), "classes": 3, "mean": (0.5,), "std": (0.25,)}
KEYS = jax.random.split(jax.random.key(0), 20000)


def one_edge(ops: int) -> tuple[Graph, Mask]:
    graph = Graph(("cell",), tuple(map(str, range(ops))), 1, ((0, 0),), (), (0,))
    return graph, masks.full(graph)


def logits(*row) -> Alpha:
    return Alpha(jnp.array([[row]], jnp.float32), jnp.zeros((1, 0)))


@cache
def space(**size):
    return darts_space(**SHAPE, width=4, length=3, nodes=2).resized(every_edge=True, **size)


@cache
def network(**size):
    """(params, stats, images) of the space above."""
    plan = masks.full_plan(space(**size).graph)
    params, stats = space(**size).make(plan).init(jax.random.key(1))
    return params, stats, jax.random.randint(jax.random.key(2), (4, 8, 8, 1), 0, 255).astype(jnp.uint8)


def test_draws_come_as_often_as_the_softmax_says():
    graph, mask = one_edge(4)
    mask = mask._replace(op=mask.op.at[0, 0, 3].set(False))
    alpha = logits(0.0, 1.0, -1.0, 9.0)
    drawn = jit(jax.vmap(lambda key: sample.draw(graph, alpha, mask, key).op))(KEYS)
    assert (drawn.sum(-1) == 1).all()
    share = np.asarray(relax.softmax(graph, alpha, mask, 1.0).op)[0, 0]
    error = np.sqrt(share * (1 - share) / len(KEYS))
    assert (abs(drawn.mean(0)[0, 0] - share) <= 4 * error).all()
    assert not drawn[..., 3].any()  # what is masked never comes


def test_a_pair_is_drawn_for_every_node_and_its_edges_alone_count():
    graph = darts_space(**SHAPE, width=4, length=1, nodes=2).graph
    alpha, mask = Alpha(jnp.zeros((2, 5, 8)), jnp.zeros((2, 4))), masks.full(graph)
    drawn = jax.vmap(lambda key: sample.draw(graph, alpha, mask, key))(KEYS[:300])
    mix = jax.vmap(lambda d: sample.drawn_mix(graph, d))(drawn)
    assert set(np.unique(mix)) == {0.0, 1.0}
    assert (mix.sum((2, 3)) == 4).all()  # two inputs of each of two nodes
    assert (mix[:, :, :2].sum((2, 3)) == 2).all()  # node 0 has a single pair
    assert {tuple(row) for row in np.asarray(mix.sum(-1))[:, 0, 2:].tolist()} == {(1, 1, 0), (1, 0, 1), (0, 1, 1)}


def of_quadratic(mix_of, alpha, target, outputs, key):
    """(drawn operation, gradient of (target - output)^2 / 2 in the logits) of one edge."""

    def loss(alpha):
        mix = mix_of(alpha, key)
        return (target - jnp.sum(mix * outputs)) ** 2 / 2, mix

    (_, mix), gradient = jax.value_and_grad(loss, has_aux=True)(alpha)
    return jnp.argmax(mix), gradient.op[0, 0]


def test_score_of_two_operations_by_hand():
    # Outputs 1 and 3, target 2, p = 1/2. Drawing 0: r = -1, so r (Z - p) = (-1/2, 1/2). Drawing 1: r = 3: (-3/2, 3/2).
    graph, mask = one_edge(2)
    run = jax.vmap(
        lambda key: of_quadratic(
            lambda a, k: sample.scored(graph, a, mask, k), logits(0, 0), 2.0, jnp.array([1.0, 3.0]), key
        )
    )
    drawn, gradient = jit(run)(KEYS)
    np.testing.assert_allclose(gradient[drawn == 0], np.tile([-0.5, 0.5], (int(sum(drawn == 0)), 1)), rtol=1e-6)
    np.testing.assert_allclose(gradient[drawn == 1], np.tile([-1.5, 1.5], (int(sum(drawn == 1)), 1)), rtol=1e-6)


def test_score_averages_to_the_enumerated_gradient_over_eight_operations():
    graph, mask = one_edge(8)
    outputs, alpha = jnp.arange(8.0), logits(*np.linspace(-1, 1, 8))
    run = jax.vmap(lambda key: of_quadratic(lambda a, k: sample.scored(graph, a, mask, k), alpha, 3.0, outputs, key)[1])
    found = np.asarray(jit(run)(KEYS))
    p = np.asarray(relax.softmax(graph, alpha, mask, 1.0).op)[0, 0]
    r = (np.asarray(outputs) - 3.0) * np.asarray(outputs)  # dL/dmix where k is drawn; of `none`, whose output is 0, 0
    error = found.std(0) / np.sqrt(len(KEYS))
    assert (abs(found.mean(0) - p * (r - np.sum(p * r))) <= 4 * error).all()


def test_value_of_a_drawn_mix_is_exactly_zero_or_one():
    graph = space().graph
    alpha, mask = relax.init_alpha(jax.random.key(3), graph), masks.full(graph)
    for mix_of in (sample.scored, lambda g, a, m, k: sample.hard_gumbel(g, a, m, 0.1, k)):
        mix = jax.vmap(lambda key, mix_of=mix_of: mix_of(graph, alpha, mask, key))(KEYS[:100])
        assert set(np.unique(mix)) == {0.0, 1.0}
        assert (mix.sum(-1) == 1).all()


def test_hard_gumbel_hands_on_the_gradient_of_the_weight_of_what_was_drawn():
    # Two operations, equal noise would give y = (1/2, 1/2): the row is r / tau y (Z - y) = r (2.5, -2.5) at tau = 0.1.
    graph, mask = one_edge(2)
    key, alpha = KEYS[0], logits(0.3, -0.2)
    noise = np.asarray(relax.noisy(alpha, key).op - alpha.op)[0, 0]
    balanced = logits(*(-noise))  # what is drawn on is then (0, 0)
    gradient = jax.grad(lambda a: jnp.sum(sample.hard_gumbel(graph, a, mask, 0.1, key)[0, 0] * jnp.array([2.0, 7.0])))
    found = gradient(balanced).op[0, 0]
    np.testing.assert_allclose(abs(found), [5.0, 5.0] if found[0] > 0 else [17.5, 17.5], rtol=1e-3)
    np.testing.assert_allclose(found.sum(), 0, atol=1e-4)

    def weight(a):  # at fixed noise, of what is drawn there
        z = jnp.argmax(a.op[0, 0] + noise)
        return jax.nn.softmax((a.op[0, 0] + noise) / 0.5)[z]

    got = jax.grad(lambda a: jnp.sum(sample.hard_gumbel(graph, a, mask, 0.5, key)))(alpha).op
    for k in range(2):
        step = jnp.zeros((1, 1, 2)).at[0, 0, k].set(1e-2)
        ends = [weight(alpha._replace(op=alpha.op + side * step)) for side in (1, -1)]
        np.testing.assert_allclose(got[0, 0, k], (ends[0] - ends[1]) / 2e-2, rtol=2e-2, atol=1e-4)


def test_skipping_what_is_not_drawn_changes_no_value_and_no_gradient():
    size = {"nodes": 1, "length": 1, "in_turn": True}  # a third of the time to compile
    params, stats, image = network(**size)
    graph = space(**size).graph
    plan = masks.full_plan(graph)
    alpha, mask = relax.init_alpha(jax.random.key(3), graph), masks.full(graph)
    found = []
    for sampled in (False, True):
        net = space(**size).make(plan, sampled)

        def loss(params, alpha, net=net):
            mix = sample.scored(graph, alpha, mask, jax.random.key(4))
            logits, moments = net.apply(params, stats, image, mix, True)
            return jnp.sum(logits**2), (mix, moments)

        found.append(jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, alpha))
    ((dense, (mix, dense_moments)), dense_gradients), ((value, (_, moments)), gradients) = found
    np.testing.assert_allclose(value, dense, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(dense_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    drawn = space(**size).spread(mix != 0, plan, moments, True)
    for here, a, b in zip(*map(jax.tree.leaves, (drawn, moments, dense_moments)), strict=True):
        here = np.broadcast_to(here, a.shape)
        np.testing.assert_allclose(np.where(here, a, 0), np.where(here, b, 0), atol=1e-5)
    here, found = (x["cell_0"]["sep_conv_3x3"]["norm"]["var"] for x in (drawn, moments))
    assert not np.asarray(found)[~np.asarray(here)[:, 0]].any()  # so nobody may average them
    assert not np.asarray(here).all()


def test_multiply_adds_of_operations_and_the_rest_add_up_to_every_network():
    graph = space().graph
    plan = masks.full_plan(graph)
    rest, each = sample.macs(space(), plan)
    assert rest + each.sum() == space().make(plan).macs
    mask = sample.draw(graph, relax.init_alpha(jax.random.key(0), graph), masks.full(graph), jax.random.key(1))
    assert rest + (np.asarray(mask.op) * each).sum() == space().make(masks.plan_of(graph, mask)).macs


def test_spread_gives_every_row_its_operations_value_and_the_rest_what_is_asked():
    params, stats, _ = network()
    graph = space().graph
    plan = masks.full_plan(graph)
    value = jnp.arange(2 * len(graph.edges) * 8, dtype=jnp.float32).reshape(2, -1, 8)
    found = space().spread(value, plan, params, -1.0)
    conv = graph.ops.index("sep_conv_5x5")
    np.testing.assert_array_equal(found["cell_0"]["sep_conv_5x5"]["pointwise_2"].ravel(), value[0, :, conv])
    np.testing.assert_array_equal(found["cell_1"]["sep_conv_5x5"]["depthwise"].ravel(), value[1, :, conv])
    assert found["cell_1"]["skip_connect"]["even"].shape == (4, 1, 1)  # on input edges alone
    assert found["stem"] == found["cell_0"]["preprocess_0"]["pointwise"] == found["head_bias"] == -1
    jax.tree.map(lambda f, x: np.broadcast_to(f, x.shape), found, params)
    jax.tree.map(lambda f, x: np.broadcast_to(f, x.shape), space().spread(value, plan, stats, 0.0), stats)


def test_optimizer_leaves_what_was_not_drawn_and_what_it_knows_of_it():
    inner = optimizers.sgd(0.1, momentum=0.9, weight_decay=0.1)
    optimizer = optimizers.drawn_alone(inner, lambda times: {"w": (times > 0)[:, None]})
    variables = {"w": jnp.ones((2, 3))}
    state, gradient = optimizer.init(variables), {"w": jnp.ones((2, 3))}
    times = [jnp.array([1, 1]), jnp.array([2, 0]), jnp.array([1, 1])]
    expected, trace = np.ones((2, 3)), np.zeros((2, 3))
    for here in times:
        updates, state = optimizer.update(optimizers.Sampled(gradient, here), state, variables)
        before = variables
        variables = optax.apply_updates(variables, updates)
        rows = np.asarray(here) > 0
        trace[rows] = 0.9 * trace[rows] + 1 + 0.1 * expected[rows]
        expected[rows] -= 0.1 * trace[rows]
        assert (variables["w"][~rows] == before["w"][~rows]).all()
        np.testing.assert_allclose(variables["w"], expected, rtol=1e-6)


def test_a_moving_average_of_equal_numbers_stays_to_the_bit():
    x = {"x": jax.random.normal(jax.random.key(0), (1000,))}
    assert (tree.lerp(x, x, 0.1)["x"] == x["x"]).all()


def test_a_space_in_parts_has_operations_of_its_own_in_each():
    parts = space(parts=(2,))
    assert parts.graph.cell_types == ("normal_0", "reduce_0", "reduce_2")
    assert parts.size == {"every_edge": True, "parts": (2,)}
    assert space(parts=(1, 2)).graph.cell_types == ("normal_0", "reduce_1", "reduce_2")
    params, stats, image = network()  # weights are laid out alike
    whole, cut = (s.make(masks.full_plan(s.graph)) for s in (space(), parts))
    assert cut.macs == whole.macs
    mix = jax.random.uniform(jax.random.key(5), (2, 5, 8))
    same = jit(cut.apply, static_argnums=4)(params, stats, image, mix[jnp.array([0, 1, 1])], False)[0]
    np.testing.assert_allclose(same, jit(whole.apply, static_argnums=4)(params, stats, image, mix, False)[0], rtol=1e-5)
    other = jit(cut.apply, static_argnums=4)(params, stats, image, mix[jnp.array([0, 1, 0])], False)[0]
    assert abs(other - same).max() > 1e-3
    with pytest.raises(ValueError, match="must be ascending cells from 1 to 2"):
        space().resized(parts=(3,))
