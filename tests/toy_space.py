"""A search space small enough to compile in a second: cells of dense layers on 8 x 8 images, with all its parts.

Two cells of two nodes; every edge may carry nothing, the identity, or a dense layer whose mean is subtracted.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from toy_model import PIXELS

from fedmetanas_jax.core import Graph, SearchSpace, Supernet
from fedmetanas_jax.models.space import cell_types, search_space

OPS = ("none", "identity", "dense")
EDGES = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 1))
PAIRS = ((0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 1, 2))
KINDS = ("normal", "reduce")


def toy_space(
    *, classes: int = 4, width: int = 6, every_edge: bool = False, parts: tuple[int, ...] = ()
) -> SearchSpace:
    names, types = cell_types(KINDS, parts)
    graph = Graph(names, OPS, 2, EDGES, () if every_edge else PAIRS, (0, 1))

    def stacks(plan) -> dict:
        return {f"cell_{i}": {"dense": [e for e, ops in enumerate(plan[t]) if 2 in ops]} for i, t in enumerate(types)}

    def make(plan, sampled=False) -> Supernet:
        rows = {cell: edges["dense"] for cell, edges in stacks(plan).items()}

        def init(key):
            keys = iter(jax.random.split(key, 2 * len(types) + 2))
            params = {"stem": 0.3 * jax.random.normal(next(keys), (PIXELS, width))}
            stats = {"stem_norm": {"mean": jnp.zeros(PIXELS)}}
            for cell, edges in rows.items():
                if edges:
                    params[cell] = {"dense": {"kernel": jax.random.normal(next(keys), (len(edges), width, width))}}
                    stats[cell] = {"dense": {"norm": {"mean": jnp.zeros((len(edges), width))}}}
            params |= {"head_kernel": 0.5 * jax.random.normal(next(keys), (width, classes))}
            return params | {"head_bias": jnp.zeros(classes)}, stats

        def apply(params, stats, image, mix, train):
            x = image.reshape(len(image), PIXELS).astype(jnp.float32) / 255
            found = {"stem_norm": {"mean": jnp.mean(x, axis=0)}}
            x = (x - jnp.where(train, found["stem_norm"]["mean"], stats["stem_norm"]["mean"])) @ params["stem"]
            for i, kind in enumerate(types):
                cell, states, means = f"cell_{i}", [x, x], []
                row, further = mix(i, jnp.stack([x, x]).mT[:, :, None, None]) if callable(mix) else (mix[kind], {})
                found |= further
                for node in (0, 1):
                    total = jnp.zeros_like(x)
                    for e in (e for e, (_, end) in enumerate(EDGES) if end == node):
                        source = states[EDGES[e][0]]
                        total = total + (1 in plan[kind][e]) * row[e, 1] * source
                        if e in rows[cell]:
                            n = rows[cell].index(e)
                            y = jnp.tanh(source) @ params[cell]["dense"]["kernel"][n]
                            means.append(jnp.mean(y, axis=0))
                            known = jnp.where(train, means[-1], stats[cell]["dense"]["norm"]["mean"][n])
                            total = total + row[e, 2] * (y - known)
                    states.append(total)
                if means:
                    found[cell] = {"dense": {"norm": {"mean": jnp.stack(means)}}}
                x = x + states[2] + states[3]
            return x @ params["head_kernel"] + params["head_bias"], stats if train is False else found

        macs = PIXELS * width + width * classes + width * width * sum(map(len, rows.values()))
        return Supernet(init, apply, 0.1, macs)

    resized = partial(toy_space, classes=classes, width=width, every_edge=every_edge, parts=parts)
    return search_space(graph, types, make, stacks, resized, ((width, 1, 1),) * len(types))


def everything(space: SearchSpace) -> list:
    """The plan of all its operations."""
    return [[list(range(len(OPS))) for _ in EDGES] for _ in space.graph.cell_types]


def flat(tree) -> np.ndarray:
    """All numbers of a tree in one array."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
