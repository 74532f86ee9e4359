"""In which order a DARTS cell is computed: its stages, decided before any array exists.

A stage is a scan over sources (inputs of the cell), each with the edges that leave it. Sources come in
order: node j gets its last contribution from input j + 1 and is input j + 2 itself, so it is complete when
it is read.
"""

from typing import NamedTuple

import numpy as np

from fedmetanas_jax.models.operations import Keep, Op, op_shapes, stack
from fedmetanas_jax.topology import NONE, OPS, edge, edge_ends


class Stage(NamedTuple):
    """Sources that are read alike and the live edges that leave them; hashable, so static under jit."""

    keep: Keep
    nodes: int
    reduce: bool
    stride: int
    shift: int  # input i of the cell is row i - shift of the array that sources are read from
    first: int  # row of node 0 in the array of nodes
    sources: tuple[int, ...]  # ascending
    slots: tuple[tuple[int, ...], ...]  # [sources, slots] the edges with weights that leave them; -1 = none
    shared: tuple[Op, ...]  # operations without weights
    own: tuple[Op, ...]  # operations with weights

    @property
    def full(self) -> bool:
        """Whether every slot holds an edge."""
        return all(e >= 0 for row in self.slots for e in row)

    def rows(self, op: int, edges: np.ndarray) -> np.ndarray:
        """Rows of edges in the stacked weights and moments of `op`; -1 where it is dead."""
        place = {e: n for n, e in enumerate(stack(self.keep, op, self.nodes, self.reduce)[0])}
        return np.vectorize(lambda e: place.get(e, -1), otypes=[int])(edges)


def stages(keep: Keep, nodes: int, reduce: bool) -> list[Stage]:
    """A normal cell is one stage; a reduction cell one that halves its inputs and one between its nodes."""
    ends = edge_ends(nodes)
    live = [e for e in range(len(ends)) if any(k != NONE for k in keep[e])]
    common = {"keep": keep, "nodes": nodes, "reduce": reduce}
    if reduce:
        parts = [
            ([e for e in live if ends[e][0] < 2], {"stride": 2, "shift": 0, "first": 0}),
            ([e for e in live if ends[e][0] >= 2], {"stride": 1, "shift": 2, "first": 0}),
        ]
    else:
        parts = [(live, {"stride": 1, "shift": 0, "first": 2})]
    found = []
    for edges, numbers in parts:
        with_weights = {k for k, op in enumerate(OPS) if op_shapes(op, 2, numbers["stride"])}
        of_source = [[e for e in edges if ends[e][0] == i] for i in sorted({ends[e][0] for e in edges})]
        if of_source:
            found.append(_stage(of_source, with_weights, common | numbers))
    return found


def _stage(of_source: list[list[int]], with_weights: set[int], numbers: dict) -> Stage:
    """The stage of these sources, each given as the list of its live edges."""
    keep, ends = numbers["keep"], edge_ends(numbers["nodes"])
    slots = [[e for e in leaving if with_weights & {*keep[e]}] for leaving in of_source]
    used = [e for row in slots for e in row]
    longest = max(map(len, slots))
    shared, own = [], []
    for k in range(1, len(OPS)):
        offered = [any(k in keep[e] for e in leaving) for leaving in of_source]
        if k not in with_weights and any(offered):
            shared.append(Op(k, all(offered)))
        if k in with_weights and any(k in keep[e] for e in used):
            own.append(Op(k, all(k in keep[e] for e in used)))
    return Stage(
        **numbers,
        sources=tuple(ends[leaving[0]][0] for leaving in of_source),
        slots=tuple((*row, *[-1] * (longest - len(row))) for row in slots),
        shared=tuple(shared),
        own=tuple(own),
    )


class Table(NamedTuple):
    """A stage as arrays: what each step of its scan reads."""

    start: np.ndarray  # [sources] rows of the sources
    out: np.ndarray  # [sources, nodes] the edge from a source to a node
    reaches: np.ndarray  # [sources, nodes, ops] bool: that edge exists and carries the operation
    offers: np.ndarray  # [sources, ops] bool: on some edge
    slot: np.ndarray  # [sources, slots] edges with weights
    end: np.ndarray  # [sources, slots] rows of the nodes they end in
    alive: np.ndarray  # [sources, slots, ops] bool


def tabulate(stage: Stage) -> Table:
    """The arrays of a stage; where a slot or an edge does not exist stands edge 0, alive nowhere."""
    ends = edge_ends(stage.nodes)
    carried = np.array([[k in ops for k in range(len(OPS))] for ops in stage.keep])
    exists = np.array([[i < j + 2 for j in range(stage.nodes)] for i in stage.sources])
    out = np.array([[edge(j, i) if i < j + 2 else 0 for j in range(stage.nodes)] for i in stage.sources])
    reaches = carried[out] & exists[..., None]
    slots = np.array(stage.slots, int)
    slot = np.maximum(slots, 0)
    return Table(
        start=np.array(stage.sources) - stage.shift,
        out=out,
        reaches=reaches,
        offers=reaches.any(1),
        slot=slot,
        end=np.array([j for _, j in ends])[slot] + stage.first,
        alive=carried[slot] & (slots >= 0)[..., None],
    )
