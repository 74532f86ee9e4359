"""In which order `scan` computes a DARTS cell: its stages, decided before any array exists, and what they read.

A stage is a scan over sources (inputs of the cell), each with the edges that leave it. Sources come in
order: node j gets its last contribution from input j + 1 and is input j + 2 itself, so it is complete when
it is read.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models.operations import Op
from fedmetanas_jax.models.plan import NONE, OPS, CellPlan, carried, edge_ends, num_nodes, op_shapes


class Stage(NamedTuple):
    """Sources that are read alike and the live edges that leave them, as arrays for the steps of a scan."""

    stride: int
    first: int  # row of node 0 in the array of nodes
    start: np.ndarray  # [sources] rows of the sources in the array that they are read from, ascending
    out: np.ndarray  # [sources, nodes] the edge from a source to a node; where there is none, edge 0
    reaches: np.ndarray  # [sources, nodes, ops] bool: that edge exists and carries the operation
    slot: np.ndarray  # [sources, slots] the edges with weights that leave a source; -1 = none
    end: np.ndarray  # [sources, slots] rows of the nodes they end in
    alive: np.ndarray  # [sources, slots, ops] bool: the edge exists and carries the operation
    shared: tuple[Op, ...]  # operations without weights
    own: tuple[Op, ...]  # operations with weights


def stages(plan: CellPlan, reduce: bool) -> list[Stage]:
    """A normal cell is one stage; a reduction cell one that halves its inputs and one between its nodes."""
    inputs = range(num_nodes(plan) + 1)
    if not reduce:
        return _stage(plan, inputs, stride=1, first=2)
    return _stage(plan, inputs[:2], stride=2, first=0) + _stage(plan, inputs[2:], stride=1, first=0)


def _stage(plan: CellPlan, inputs: range, stride: int, first: int) -> list[Stage]:
    """The stage of these sources, if any edge that leaves them is alive."""
    nodes = num_nodes(plan)
    ends, has = edge_ends(nodes), carried(plan)
    weighs = np.array([bool(op_shapes(op, 2, stride)) for op in OPS])
    leaving = {i: [e for e, (start, _) in enumerate(ends) if start == i and {*plan[e]} - {NONE}] for i in inputs}
    leaving = {i: edges for i, edges in leaving.items() if edges}
    if not leaving:
        return []
    rows = [[e for e in edges if np.any(has[e] & weighs)] for edges in leaving.values()]
    slot = np.full((len(rows), max(map(len, rows))), -1)
    for row, edges in zip(slot, rows, strict=True):
        row[: len(edges)] = edges
    exists = np.array([[i < j + 2 for j in range(nodes)] for i in leaving])
    out = np.array([[ends.index((i, j)) if i < j + 2 else 0 for j in range(nodes)] for i in leaving])
    reaches = has[out] & exists[..., None]
    offers, used = reaches.any(1), has[slot[slot >= 0]]
    found = Stage(
        stride=stride,
        first=first,
        start=np.array(list(leaving)) - inputs[0],
        out=out,
        reaches=reaches,
        slot=slot,
        end=np.array([j for _, j in ends])[slot] + first,
        alive=has[slot] & (slot >= 0)[..., None],
        shared=tuple(Op(k, offers[:, k].all()) for k in np.flatnonzero(offers.any(0) & ~weighs) if k != NONE),
        own=tuple(Op(k, used[:, k].all()) for k in np.flatnonzero(used.any(0) & weighs)),
    )
    return [found]


def no_nodes(inputs: Array, nodes: int, reduce: bool) -> Array:
    """The nodes of a cell before anything is added to them, after the inputs where these have their size."""
    _, channels, height, width, batch = inputs.shape
    if reduce:
        return jnp.zeros((nodes, channels, height // 2, width // 2, batch), inputs.dtype)
    return jnp.concatenate([inputs, jnp.zeros((nodes, *inputs.shape[1:]), inputs.dtype)])


class Given(NamedTuple):
    """What the steps of a stage are given, leading with [sources] and, for convolutions, [slots]."""

    shared_mix: Array  # [sources, nodes, ops]
    mix: Array  # [sources, slots, ops]
    weights: Tree  # {op: {name: [sources, slots, ...]}}
    shared_stats: Tree  # {op: {"norm": moments [sources, nodes, C]}}; empty in training
    stats: Tree  # {op: {name: moments [sources, slots, C]}}; empty in training


def lay_out(stage: Stage, rows: dict[str, np.ndarray], weights: Tree, stats: Tree, mix: Array, train: bool) -> Given:
    """A cell's stacked weights, moments and mix, laid out for the scan; `rows` those of `plan.stack_rows`.

    In evaluation every edge is normalised by its own moments, which need not agree within a source.
    """

    def of_slots(op: Op, x: Array) -> Array:
        places = np.where(stage.alive[..., op.number], rows[op.name][stage.slot], -1)
        return at_slots(x, tuple(map(tuple, places.tolist())))

    def moments(ops: tuple[Op, ...], edges: np.ndarray) -> Tree:
        here = {op.name: rows[op.name][edges] for op in ops if not train and op.name in stats}
        return {op: jax.tree.map(lambda x, place=place: x[place], stats[op]) for op, place in here.items()}

    return Given(
        shared_mix=jnp.where(stage.reaches, mix[stage.out], 0),
        mix=mix[np.maximum(stage.slot, 0)],
        weights={op.name: jax.tree.map(partial(of_slots, op), weights[op.name]) for op in stage.own},
        shared_stats=moments(stage.shared, stage.out),
        stats=moments(stage.own, np.maximum(stage.slot, 0)),
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_slots(x: Array, rows: tuple[tuple[int, ...], ...]) -> Array:
    """x [n, ...] laid out as [sources, slots, ...]; rows [sources, slots] name each row at most once, -1 none.

    Its gradient is a selection too, where the automatic one would be a scatter.
    """
    return x[np.maximum(np.array(rows, int), 0)]


def _at_slots_backward(rows, like, g):
    rows = np.array(rows, int).ravel()
    g = g.reshape(-1, *g.shape[2:])
    back = np.full(len(like), len(rows))  # the row of zeros, for what stands nowhere
    back[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    return (jnp.concatenate([g, jnp.zeros_like(g[:1])])[back],)


at_slots.defvjp(lambda x, rows: (at_slots(x, rows), np.empty((len(x), 0))), _at_slots_backward)


def by_edge(stage: Stage, shared: Tree, own: Tree) -> list[tuple[str, np.ndarray, Tree]]:
    """(operation, edges, moments [edges, C]) of a stage's moments, [sources, C] shared and [sources, slots, C] own."""
    found = []
    for op in stage.shared:
        at = np.nonzero(stage.reaches[..., op.number])
        found.append((op.name, stage.out[at], jax.tree.map(lambda x, at=at: x[at[0]], shared[op.name])))
    for op in stage.own:
        at = np.nonzero(stage.alive[..., op.number])
        found.append((op.name, stage.slot[at], jax.tree.map(lambda x, at=at: x[at], own[op.name])))
    return found
