"""A cell written out source by source: what is alike on the edges that leave one source is computed side by side.

What is dead is not there, so a pruned plan is a smaller program without loops or conditionals.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Array, Graph, Tree


class Source(NamedTuple):
    """An input of the cell and the live edges that leave it."""

    number: int
    edges: list[int]  # ascending
    ends: list[int]  # the nodes they end in
    on: dict[str, list[int]]  # live operation -> which of `edges`, by place, carry it
    own: list[str]  # live operations with weights
    shared: list[str]  # live operations without

    def carriers(self, op: str) -> list[int]:
        """The edges that carry the operation."""
        return [self.edges[n] for n in self.on[op]]


def sources(graph: Graph, plan, weighs: Callable) -> list[Source]:
    """Those of a cell, in an order in which each is complete when it is read; weighs(operation, input) -> bool."""
    none, found = graph.ops.index("none"), []
    for i in sorted({i for i, _ in graph.edges}):
        edges = [e for e, (start, _) in enumerate(graph.edges) if start == i and {*plan[e]} - {none}]
        on = {op: [n for n, e in enumerate(edges) if k in plan[e]] for k, op in enumerate(graph.ops) if k != none}
        on = {op: places for op, places in on.items() if places}
        own, shared = ([op for op in on if weighs(op, i) == having] for having in (True, False))
        if edges:
            found.append(Source(i, edges, [graph.edges[e][1] for e in edges], on, own, shared))
    return found


def visit_all(
    found: list[Source], stacks: dict[str, list[int]], visit: Callable, inputs: list[Array], empty: list[Array],
    weights: Tree, stats: Tree, mix: Array, train: bool,
) -> tuple[list[Array], Tree]:  # fmt: skip
    """(nodes, moments) of a cell from its inputs; `empty` are the nodes that nothing reaches.

    weights, stats and moments: {op: {name: leaves [edges of its stack, ...]}}, mix [edges, ops].
    visit(source, x, weights {op: {name: [carriers, ...]}}, known, mix [edges, ops]) -> (y [edges, ...], {op: {name:
    moments [carriers, C]}}). `known` is None in training; else it holds moments to normalise by, [carriers, C], and
    of operations without weights [edges, C], carried or not.
    """
    given: list[dict] = [{} for _ in found]
    for op, named in weights.items():
        here = [n for n, source in enumerate(found) if op in source.own]
        groups = tuple(tuple(map(stacks[op].index, found[n].carriers(op))) for n in here)
        for name, x in named.items() if here else ():
            for n, part in zip(here, groups_of(x, groups), strict=True):
                given[n].setdefault(op, {})[name] = part
    states: list = [*inputs, *[None] * len(empty)]
    complete = [*inputs, *empty]
    moments = []
    for source, weights_here in zip(found, given, strict=True):
        known = None if train else {}
        for op in stats.keys() & source.on.keys() if not train else ():
            edges = source.carriers(op) if op in source.own else source.edges
            at = np.array([stacks[op].index(e) if e in stacks[op] else 0 for e in edges])
            known[op] = jax.tree.map(lambda x, at=at: x[at], stats[op])
        y, seen = visit(source, complete[source.number], weights_here, known, mix[np.array(source.edges)])
        for n, end in enumerate(source.ends):
            j = end + len(inputs)
            states[j] = complete[j] = y[n] if states[j] is None else states[j] + y[n]
        moments += [(op, np.array(source.carriers(op)), here) for op, here in seen.items()]
    return complete[len(inputs) :], in_edge_order(moments)


def in_edge_order(parts: list[tuple[str, np.ndarray, Tree]]) -> Tree:
    """{op: {name: moments [edges, C]}} of a cell from (op, edges, moments of those edges), where any were found."""
    found: dict = {}
    for op, edges, moments in parts:
        if jax.tree.leaves(moments):
            found.setdefault(op, []).append((edges, moments))
    joined = {}
    for op, here in found.items():
        order = np.argsort(np.concatenate([edges for edges, _ in here]))
        joined[op] = jax.tree.map(lambda *m, order=order: jnp.concatenate(m)[order], *[moments for _, moments in here])
    return joined


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def groups_of(x: Array, groups: tuple[tuple[int, ...], ...]) -> tuple[Array, ...]:
    """The rows of x, each in one group. Its gradient is a selection, where the automatic one would be scatters."""
    return tuple(x[np.array(rows)] for rows in groups)


def _groups_backward(groups, _, grads):
    return (jnp.concatenate(grads)[np.argsort(np.concatenate(groups))],)


groups_of.defvjp(lambda x, groups: (groups_of(x, groups), None), _groups_backward)
