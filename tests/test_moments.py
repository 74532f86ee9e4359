"""Whose moments a whole network's batch norms go by, where that is a value (core.Model.apply)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.mobilenetv3 import mobilenetv3
from fedmetanas_jax.models.nasbench201 import nasbench201_space

TASK = {"shape": (8, 8, 1), "classes": 3, "mean": (0.5,), "std": (0.5,)}
SPACES = {
    "darts": lambda: darts_space(**TASK, width=2, length=1, nodes=1, way="side_by_side"),
    "nasbench201": lambda: nasbench201_space(**TASK, width=2, length=3),
}


def network(name):
    """A network, as a Model."""
    if name == "mobilenetv3":
        return mobilenetv3(**TASK, variant="tiny", dropout=0.5)
    space = SPACES[name]()
    # Pools and convolutions.
    edges = tuple(((3 * e + 1) % len(space.graph.ops),) for e in range(len(space.graph.edges)))
    return space.derive((edges,) * len(space.graph.cell_types))


@pytest.mark.parametrize("name", ["mobilenetv3", "darts", "nasbench201"])
def test_one_program_trains_and_evaluates(name):
    model = network(name)
    params, stats = jax.jit(model.init)(jax.random.key(0))
    stats = jax.tree.map(lambda x: x + 0.3, stats)
    image = jax.random.randint(jax.random.key(1), (6, 8, 8, 1), 0, 256).astype(jnp.uint8)
    either = jax.jit(lambda own: model.apply(params, stats, image, own, jax.random.key(2)))
    logits, moments = jax.jit(lambda: model.apply(params, stats, image, True))()
    for found, want in zip(either(True), (logits, moments), strict=True):  # without dropout, key or not
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, want)
    evaluated = jax.jit(lambda: model.apply(params, stats, image, False))()[0]
    assert not np.allclose(evaluated, logits, atol=1e-3)
    np.testing.assert_allclose(either(False)[0], evaluated, rtol=1e-4, atol=1e-5)
