"""A network drawn at random and trained by FedAvg: the draw is uniform, the training is FedAvg's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_federation import SETTING, SHAPE, federation
from toy_model import ask, jit

from fedmetanas_jax import tree
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fedrandom import draw, fedrandom
from fedmetanas_jax.core import Graph, Plan
from fedmetanas_jax.engine.round import train_examples
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.nasbench201 import GRAPH as NASBENCH201
from fedmetanas_jax.models.plan import darts_graph
from fedmetanas_jax.nas import mask as masks

SPACE = darts_space(**SHAPE, width=4, length=1, nodes=2)
NOTHING = [[[0], [0], [0], [0], []]] * 2  # `none` on every edge, a draw like any other
LARGEST = {2: 13.8, 4: 18.5, 7: 24.3}  # chi-squared of so many degrees of freedom exceeds it once in a thousand


def chi_squared(counts: np.ndarray) -> float:
    return float(np.sum((counts - counts.mean()) ** 2) / counts.mean())


def plans_of(graph: Graph, count: int) -> list[Plan]:
    return [draw(graph, jax.random.key(seed)) for seed in range(count)]


@pytest.mark.parametrize("graph", [darts_graph(2), NASBENCH201], ids=["darts", "nasbench201"])
def test_every_network_is_equally_likely(graph):
    plans = plans_of(graph, 400)
    for cell in range(len(graph.cell_types)):
        ops = [k for plan in plans for edge in plan[cell] for k in edge]
        live = 4 if graph.pairs else len(graph.edges)  # two edges for each of two nodes
        assert len(ops) == 400 * live
        assert chi_squared(np.bincount(ops, minlength=len(graph.ops))) < LARGEST[len(graph.ops) - 1]
        if graph.pairs:  # node 1 has three pairs of inputs, that is three ways to leave one of its edges out
            left_out = [[not edge for edge in plan[cell][2:]].index(True) for plan in plans]
            assert chi_squared(np.bincount(left_out, minlength=3)) < LARGEST[2]
    if len(graph.cell_types) > 1:  # cell types are drawn apart
        assert np.mean([plan[0] == plan[1] for plan in plans]) < 0.01


def test_what_is_drawn_is_what_a_terminal_event_can_leave():
    for plan in [*plans_of(SPACE.graph, 20), masks.full_plan(SPACE.graph)]:
        mask = masks.of_plan(SPACE.graph, plan)
        assert masks.plan_of(SPACE.graph, mask) == plan
    full = masks.full(SPACE.graph)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, mask, full)))
    drawn = masks.of_plan(SPACE.graph, draw(SPACE.graph, jax.random.key(1)))
    assert tuple(map(int, masks.alive(SPACE.graph, drawn))) == masks.sizes(SPACE.graph)[1]


def test_the_architecture_seed_alone_decides_where_it_is_given():
    def drawn(run_seed: int, **options):
        phases = fedrandom(SPACE, SETTING, **options)
        assert len(phases) == 1
        return phases[0].enter(None, None, jax.random.key(run_seed))[0]

    assert drawn(1) == draw(SPACE.graph, jax.random.key(1)) != drawn(2)
    assert drawn(1, architecture_seed=5) == drawn(2, architecture_seed=5) == draw(SPACE.graph, jax.random.key(5))
    with pytest.raises(ValueError, match="architecture_seed is -1; it must be none, or 0 to"):
        drawn(1, architecture_seed=-1)


def test_it_is_fedavg_of_that_network():
    space, setting = darts_space(**SHAPE, width=4, length=1, nodes=1), SETTING._replace(clip=5.0)
    plan = [[[0], [0]], [[4], [1]]]  # in its only cell a convolution and a pooling, which compile quickly
    algorithm, fixed = fedrandom(space, setting)[0].make(plan), fedavg(space.derive(plan), setting)
    assert algorithm.macs == fixed.macs < space.make(masks.full_plan(space.graph)).macs
    server, _ = algorithm.init(jax.random.key(1))
    start = fixed.init(jax.random.key(2))[0]._replace(params=server.params, stats=server.stats)
    rows, key = train_examples(federation(), 0), jax.random.key(4)
    found = jit(lambda *x: ask(algorithm, *x))(server, (), rows, key)
    wanted = jit(lambda *x: ask(fixed, *x))(start, (), rows, key)
    assert not any(np.any(x) for x in jax.tree.leaves(found.change.pop("alpha")))
    assert tree.global_norm(wanted.change["params"]) > 0.01
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found.change, wanted.change)
    assert found.metrics["image_gradients"] == wanted.metrics["image_gradients"]


def test_a_network_of_nothing_is_a_network():
    algorithm = fedrandom(SPACE, SETTING)[0].make(NOTHING)
    server, _ = algorithm.init(jax.random.key(1))
    logits, _ = algorithm.forward(algorithm.global_model(server), jnp.zeros((3, 8, 8, 1), jnp.uint8), True)
    assert np.isfinite(logits).all()
    assert np.ptp(logits, axis=0).max() == 0  # the same for every image
