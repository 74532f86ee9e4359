"""Between the stacks a network keeps, one row an edge, and what a stage of a cell reads and returns, step by step."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import operations
from fedmetanas_jax.models.schedule import Stage, tabulate
from fedmetanas_jax.topology import OPS, edge_ends


class Given(NamedTuple):
    """What the steps of a stage are given, leading with [sources] and, for convolutions, [slots]."""

    shared_mix: Array  # [sources, nodes, ops]
    mix: Array  # [sources, slots, ops]
    weights: Tree  # {op: {name: [sources, slots, ...]}}
    shared_stats: Tree  # {op: {"norm": moments [sources, nodes, C]}}; empty in training
    stats: Tree  # {op: {name: moments [sources, slots, C]}}; empty in training


def lay_out(stage: Stage, weights: Tree, stats: Tree, mix: Array, train: bool) -> Given:
    """A cell's stacked weights, moments and mix, laid out for the scan."""
    table = tabulate(stage)
    rows = {OPS[op.number]: stage.rows(op.number, np.array(stage.slots, int)) for op in stage.own}
    shared_stats, own_stats = {}, {}
    if not train:
        # In evaluation every edge is normalised by its own moments, which need not agree within a source.
        reached = {OPS[op.number]: stage.rows(op.number, table.out) for op in stage.shared}
        for found, places in ((shared_stats, reached), (own_stats, rows)):
            for op, place in places.items():
                if operations.has_norm(op, stage.stride):
                    found[op] = jax.tree.map(lambda x, place=place: x[np.maximum(place, 0)], stats[op])
    return Given(
        shared_mix=jnp.where(table.reaches, mix[table.out], 0),
        mix=mix[table.slot],
        weights={
            op: jax.tree.map(lambda x, place=place: placed(x, tuple(map(tuple, place.tolist()))), weights[op])
            for op, place in rows.items()
        },
        shared_stats=shared_stats,
        stats=own_stats,
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def placed(x: Array, rows: tuple[tuple[int, ...], ...]) -> Array:
    """x [n, ...] laid out as [sources, slots, ...]; rows [sources, slots] name each row at most once, -1 none.

    Its gradient is a selection too, where the automatic one would be a scatter.
    """
    return x[np.maximum(np.array(rows, int), 0)]


def _placed_backward(rows, like, g):
    rows = np.array(rows, int).ravel()
    g = g.reshape(-1, *g.shape[2:])
    back = np.full(len(like), len(rows))  # the row of zeros, for what stands nowhere
    back[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    return (jnp.concatenate([g, jnp.zeros_like(g[:1])])[back],)


placed.defvjp(lambda x, rows: (placed(x, rows), np.empty((len(x), 0))), _placed_backward)


def by_edge(stage: Stage, moments: tuple) -> dict:
    """{op: (edges, moments [edges, C])} of a stage, whose own moments lead with sources or with slots."""
    parts = {}
    ends = edge_ends(stage.nodes)
    for op, found in moments[0].items():
        edges = [e for e in range(len(ends)) if OPS.index(op) in stage.keep[e] and ends[e][0] in stage.sources]
        at = np.array([stage.sources.index(ends[e][0]) for e in edges])
        parts[op] = edges, jax.tree.map(lambda x, at=at: x[at], found)
    slots = np.array(stage.slots, int)
    for op, found in moments[1].items():
        here = [(e, place) for place, e in np.ndenumerate(slots) if e >= 0 and OPS.index(op) in stage.keep[e]]
        at = tuple(np.array([place for _, place in here]).T)
        parts[op] = [e for e, _ in here], jax.tree.map(lambda x, at=at: x[at], found)
    return {op: part for op, part in parts.items() if jax.tree.leaves(part[1])}


def in_edge_order(parts: list) -> Tree:
    """Moments of a cell's stages, joined and put into the order of the edges."""
    order = np.argsort(np.concatenate([edges for edges, _ in parts]))
    return jax.tree.map(lambda *m: jnp.concatenate(m)[order], *[part for _, part in parts])
