"""Logits that a small network finds by what a cell reads: their numbers, their bounds, and how they enter networks."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_federation import SETTING
from toy_model import ask, examples, jit, unchanged
from toy_space import flat, toy_space

from fedmetanas_jax.algorithms.fedpnas import fedpnas
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.nasbench201 import nasbench201_space
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax, sample
from fedmetanas_jax.nas.logits import _regions, by_context, free, scores

SHAPE = {"shape": (16, 8, 1), "classes": 3, "mean": (0.5,), "std": (0.25,)}
SHORT = SETTING._replace(epochs=1, batch=4, augment=unchanged)
DATA = examples(16, 16)
CELLS = toy_space(classes=3, every_edge=True, parts=(1,))


@pytest.mark.parametrize(
    ("length", "parts", "rows"),
    [
        (4, 2, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        (2, 3, [[1, 0], [0.5, 0.5], [0, 1]]),
        (5, 2, [[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]]),
        (1, 3, [[1], [1], [1]]),
    ],
)
def test_regions_are_those_of_adaptive_average_pooling(length, parts, rows):
    np.testing.assert_allclose(_regions(length, parts), rows, rtol=1e-6)


def test_scores_by_hand():
    # Channels (1, 2) and (0, 4) at two pixels, kernel (1, -0.5), bias 0.25: 1 - 1 + 0.25 and 0 - 2 + 0.25, cut at 0.
    # The other input is 0 everywhere: 0.25 at both. Tanh comes before the mean over inputs.
    image = jnp.array([[1.0, 0.0], [2.0, 4.0]]).reshape(2, 1, 2, 1)
    sampler = {"kernel": jnp.array([1.0, -0.5]), "bias": jnp.float32(0.25)}
    found = scores(sampler, jnp.stack([image, jnp.zeros_like(image)]), 1, 2)
    np.testing.assert_allclose(found, [[np.tanh(0.25), (0 + np.tanh(0.25)) / 2]], rtol=1e-6)
    together = scores(sampler, jnp.stack([image, jnp.zeros_like(image)]), 1, 1)  # one region: (0.25 + 0) / 2 of one
    np.testing.assert_allclose(together, [[(np.tanh(0.125) + np.tanh(0.25)) / 2]], rtol=1e-6)


def test_no_operation_can_be_drawn_more_often_than_the_bound():
    key = jax.random.key(0)
    inputs = 100 * jax.random.normal(key, (2, 3, 8, 8, 5))
    sampler = {"kernel": 50 * jnp.ones(3), "bias": jnp.float32(9)}
    found = scores(sampler, inputs, 14, 8)
    assert found.shape == (14, 8)
    assert (found >= 0).all()
    assert (found <= 1).all()
    apart = jax.nn.softmax(jnp.eye(8)[0])  # one at 1, the others at 0: the most that can be
    np.testing.assert_allclose([apart[0], apart[1]], [np.e / (np.e + 7), 1 / (7 + np.e)], rtol=1e-6)
    largest = jax.nn.softmax(found).max()
    assert largest <= apart[0] < 0.2798


@pytest.mark.parametrize("every", [darts_space(**SHAPE, length=3, nodes=2, width=4, every_edge=True),
                                   nasbench201_space(**SHAPE, length=3, width=4), CELLS])  # fmt: skip
def test_a_mix_by_cell_is_a_mix_and_reads_what_the_space_says(every):
    space = every.resized(parts=tuple(range(1, every.cells)))
    graph = space.graph
    plan = [[list(range(len(graph.ops))) for _ in graph.edges] for _ in graph.cell_types]
    net = space.make(plan)
    params, stats = net.init(jax.random.key(0))
    shape = (5, 8, 8, 1) if every is CELLS else (5, *SHAPE["shape"])
    image = jax.random.randint(jax.random.key(1), shape, 0, 256).astype(jnp.uint8)
    mix = jax.random.uniform(jax.random.key(2), (len(graph.cell_types), len(graph.edges), len(graph.ops)))

    def by_cell(i, inputs):
        return mix[i], {f"read_{i}": inputs}

    def both(train):
        return net.apply(params, stats, image, mix, train), net.apply(params, stats, image, by_cell, train)

    (plain, moments), (same, more) = jit(lambda: both(True))()
    np.testing.assert_array_equal(plain, same)
    read = [more.pop(f"read_{i}") for i in range(space.cells)]
    jax.tree.map(np.testing.assert_array_equal, moments, more)
    assert [x.shape for x in read] == [(graph.inputs, *size, 5) for size in space.reads]
    if every is CELLS:
        (plain, _), (same, kept) = jit(lambda: both(False))()
        np.testing.assert_array_equal(plain, same)
        jax.tree.map(np.testing.assert_array_equal, kept, stats)


def test_what_enters_a_network_is_what_is_said_of_it_afterwards():
    graph, source = CELLS.graph, by_context(CELLS.graph, CELLS.reads)
    mask, key = masks.full(graph), jax.random.key(5)
    samplers, further = source.init(jax.random.key(0))
    assert set(further) == set(source.further) == {"scores_0", "scores_1"}
    assert source.macs == 2 * (6 + 6)

    @jit
    def ask_both(samplers, inputs):
        entered, weights_of = source.enter(samplers, lambda a: sample.hard_gumbel(graph, a, mask, 0.1, key))
        found = [entered(i, x) for i, x in enumerate(inputs)]
        moments = found[0][1] | found[1][1]
        return jnp.stack([row for row, _ in found]), weights_of(moments), source.of(samplers, moments)

    inputs = jax.random.normal(jax.random.key(1), (2, 2, 6, 1, 1, 4))
    rows, weights, alpha = ask_both(samplers, inputs)
    np.testing.assert_array_equal(rows, weights)
    np.testing.assert_array_equal(rows, sample.hard_gumbel(graph, alpha, mask, 0.1, key))
    assert (rows.sum(-1) == 1).all()
    other = ask_both(samplers, inputs.at[1].multiply(-1))[2]  # a cell's scores are its own
    np.testing.assert_array_equal(other.op[0], alpha.op[0])
    assert (other.op[1] != alpha.op[1]).any()


def test_free_logits_are_what_is_learnt():
    source = free(CELLS.graph)
    alpha, further = source.init(jax.random.key(3))
    assert further == {}
    assert source.of(alpha, {}) is alpha
    jax.tree.map(np.testing.assert_array_equal, alpha, relax.init_alpha(jax.random.key(3), CELLS.graph))
    entered, weights_of = source.enter(alpha, lambda a: 2 * a.op)
    np.testing.assert_array_equal(entered, 2 * alpha.op)
    assert weights_of({}) is entered


@pytest.mark.parametrize("space", [toy_space(every_edge=True), toy_space(parts=(1,)), CELLS._replace(reads=())])
def test_graphs_that_have_no_place_for_samplers_are_refused(space):
    reads = space.reads[:1] if space.graph.cell_types == ("normal", "reduce") else space.reads
    with pytest.raises(ValueError, match="samplers need a graph without pairs and with a type for each cell"):
        by_context(space.graph, reads)


@cache
def searched(batch: int = 4):
    """(FedPNAS by samplers, its server past the warm-up, a client's reply)."""
    setting, how = SHORT._replace(batch=batch), {"sampler": "context", "base_cells": 1, "travel": 60.0}
    phase = fedpnas(toy_space(classes=3), setting, task_lr=0.001, **how)[0]
    algorithm = phase.make(phase.enter(None, None, None)[0])
    server, own = algorithm.init(jax.random.key(1))
    server = server._replace(round=jnp.int32(30))
    return algorithm, server, jit(lambda *x: ask(algorithm, *x))(server, own, DATA, jax.random.key(0))


def test_samplers_learn_and_their_scores_are_statistics():
    algorithm, server, reply = searched()
    assert set(server.alpha) == {"cell_0", "cell_1"}
    assert all(flat(x).any() for x in jax.tree.leaves(reply.change["alpha"]))
    now = jax.tree.map(jnp.add, server.stats, reply.change["stats"])
    for name in ("scores_0", "scores_1"):
        assert ((now[name] > 0) & (now[name] < 1)).any()
    # Four steps at momentum 0.1 from 0: at most 1 - 0.9^4 of the scores, which are below 1.
    assert max(now["scores_0"].max(), now["scores_1"].max()) < 1 - 0.9**4
    # Of an image: stem, head, two samplers that read two inputs of six channels, and 36 for each dense layer drawn, of
    # which four steps of two passes see a whole number.
    macs = float(reply.metrics["macs"]) / (3 * float(reply.metrics["image_gradients"]))
    drawn = (macs - (64 * 6 + 6 * 3) - 2 * 2 * 6) / 36
    assert 0 < drawn < 10
    assert abs(8 * drawn - round(8 * drawn)) < 1e-2


def test_how_far_rows_are_padded_says_nothing():
    algorithm, server, reply = searched(16)  # one step, since Adam makes much of what programs of two shapes round
    longer = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), DATA)
    padded = jit(lambda *x: ask(algorithm, *x))(server, (), longer, jax.random.key(0))
    for part in ("params", "stats"):
        np.testing.assert_allclose(flat(reply.change[part]), flat(padded.change[part]), atol=1e-5)
    assert reply.metrics["macs"] == padded.metrics["macs"]


def test_the_network_is_the_likeliest_by_mean_score_and_carries_no_scores():
    algorithm, server, _ = searched()
    net = algorithm.global_model(server)
    assert set(net.stats) == {"stem_norm", "cell_0", "cell_1"}
    told = jax.random.uniform(jax.random.key(4), (5, 3)).at[:, 0].set(2.0)  # `none` is no candidate
    server = server._replace(stats=server.stats | {"scores_1": told})
    mix = np.asarray(algorithm.global_model(server).mix)
    np.testing.assert_array_equal(mix[1], np.eye(3)[1 + np.argmax(told[:, 1:], -1)])
    np.testing.assert_array_equal(mix, algorithm.discrete_model(server).mix)
    _, moments = algorithm.forward(net, DATA.image, True)  # what a recalibration puts in their place
    assert jax.tree.structure(moments) == jax.tree.structure(net.stats)
    # At first all scores are 0, so of the two operations alive beside `none` each weighs a half.
    assert float(algorithm.report(searched()[1])["alpha_max"]) == 0.5


def test_adapting_leaves_the_base_its_samplers_and_its_operations():
    algorithm, server, reply = searched()
    moved = {part: jax.tree.map(jnp.add, getattr(server, part), x) for part, x in reply.change.items()}
    server = server._replace(**moved)
    start, net = algorithm.global_model(server), jit(algorithm.personalize)(server, (), DATA, jax.random.key(0), 16)
    for before, now in ((server.params, net.params), (start.stats, net.stats)):
        for name in before:
            base = name in ("stem", "stem_norm", "cell_0")
            assert np.array_equal(flat(before[name]), flat(now[name])) == base, name
    np.testing.assert_array_equal(net.mix[0], start.mix[0])
    assert set(net.stats) == {"stem_norm", "cell_0", "cell_1"}


def test_a_network_of_one_cell_has_free_logits_only():
    space = darts_space(**SHAPE, width=4, length=1, nodes=1)
    with pytest.raises(ValueError, match="sampler is context; it must be free for a network of one cell"):
        fedpnas(space, SETTING, sampler="context")
