"""On which edges that leave a source an operation is alive, and where what they have of their own stands in its stack.

What the loops of `skipping` go by. Everything is by operation, and a row is found in an array and not in a number of
the program: what is computed alike of several operations is then one kernel, and compiled once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models.operations import Op
from fedmetanas_jax.models.plan import norm_names
from fedmetanas_jax.models.stages import Stage

ROW = np.uint32  # of what is never counted from the end: JAX need not look after that


class Mixes(NamedTuple):
    """A stage's mix by operation."""

    shared: dict[str, Array]  # [sources, nodes]
    own: dict[str, Array]  # [sources, slots]


def mixes_of(stage: Stage, mix: Array) -> Mixes:
    """Those of a mix [edges, ops]."""
    shared, own = jnp.where(stage.reaches, mix[stage.out], 0), mix[np.maximum(stage.slot, 0)]
    return Mixes(
        {op.name: shared[..., op.number] for op in stage.shared}, {op.name: own[..., op.number] for op in stage.own}
    )


class Step(NamedTuple):
    """What the loops over a source's edges go by, leading with [sources] where it stands for all of a stage."""

    start: Array  # [] the row of the source in what it is read from
    ends: Array  # [slots] the rows of the nodes that its edges end in
    mix: Mixes  # of the source
    # By operation without weights:
    offers: dict[str, Array]  # [] 1 or 0: whether any edge that leaves the source carries it alive
    out: dict[str, Array]  # [nodes] the rows of the edges to the nodes in its stack, where it has a norm
    # By operation with weights:
    rows: dict[str, Array]  # [slots] the rows of the edges in its stack
    slots: dict[str, Array]  # [slots] those that carry it alive, then the others
    counts: dict[str, Array]  # [] how many carry it alive


def steps(stage: Stage, rows: dict[str, np.ndarray], mix: Mixes) -> Step:
    """Those of a stage, one for each source."""
    offered = {op.name: stage.reaches[..., op.number] & (mix.shared[op.name] != 0) for op in stage.shared}
    normed = [op for op in stage.shared if norm_names(op.name, stage.stride)]
    alive = {op.name: stage.alive[..., op.number] & (mix.own[op.name] != 0) for op in stage.own}
    return Step(
        start=stage.start.astype(ROW),
        ends=stage.end.astype(ROW),
        mix=mix,
        offers={op: jnp.any(x, 1).astype(ROW) for op, x in offered.items()},
        out={op.name: rows[op.name][stage.out] for op in normed},
        rows={op.name: _rows(stage, op, rows) for op in stage.own},
        slots={op: jnp.argsort(~x, axis=1, stable=True).astype(ROW) for op, x in alive.items()},
        counts={op: jnp.sum(x, 1, dtype=ROW) for op, x in alive.items()},
    )


def _rows(stage: Stage, op: Op, rows: dict[str, np.ndarray]) -> np.ndarray:
    return np.where(stage.alive[..., op.number], rows[op.name][stage.slot], 0).astype(ROW)


def at(row: Array, rows: Tree) -> Tree:
    """Row `row` [] uint32 of every leaf."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, row, keepdims=False), rows)


def put(rows: Tree, row: Array, values: Tree) -> Tree:
    """The leaves with that row replaced. x.at[row] would be a scatter, which XLA:CPU takes a while to see through."""
    return jax.tree.map(lambda x, value: lax.dynamic_update_index_in_dim(x, value, row, 0), rows, values)


def add(rows: Tree, row: Array, values: Tree) -> Tree:
    """The leaves with the values added to that row."""
    return put(rows, row, jax.tree.map(jnp.add, at(row, rows), values))


def add_from(first: int, nodes: Array, y: Array) -> Array:
    """The nodes with y [nodes, ...] added from row `first` on."""
    return nodes + y if first == 0 else lax.dynamic_update_slice_in_dim(nodes, nodes[first:] + y, first, 0)
