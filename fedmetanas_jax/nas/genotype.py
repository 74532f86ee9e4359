"""The discrete architecture a search ends with, and its forms: JSON, text, mix, plan (methods section 3.4)."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Alpha, Array, Graph, Mask, Plan
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax

Cell = tuple[tuple[tuple[str, int], ...], ...]  # [nodes][inputs kept] -> (operation, input), inputs ascending
Genotype = dict[str, Cell]  # cell type -> which operation each node applies to which of its inputs


def of_mix(graph: Graph, mix) -> Genotype:
    """The genotype with the operations at which `mix` [cell types, edges, ops], 0 or 1, is 1."""
    return {
        cell_type: tuple(
            tuple((graph.ops[k], graph.edges[e][0]) for e in edges for k in np.flatnonzero(cell[e]))
            for edges in _edges_of_nodes(graph)
        )
        for cell_type, cell in zip(graph.cell_types, np.asarray(mix), strict=True)
    }


def darts_rule(graph: Graph, alpha: Alpha, mask: Mask) -> Genotype:
    """DARTS: per node the two inputs with the largest non-`none` weight, each with that operation.

    Weights are softmax(logits) at temperature 1 over what is alive; pair logits play no part, but inputs
    in no surviving pair are out. An input with `none` alone alive ranks below all others and keeps
    `none` if the node needs it. Ties go to the lowest index. In a graph without pairs a node keeps all its inputs.
    """
    weight = np.array(relax.softmax(graph, alpha, mask, 1.0).op)
    weight[~np.array(mask.op)] = -1
    none = graph.ops.index("none")
    weight[..., none] = -1
    op = np.where(weight.max(-1) >= 0, weight.argmax(-1), none)
    score = np.where(masks.live_edges(graph, mask), weight.max(-1), -2)
    mix = np.zeros(weight.shape, bool)
    for t in range(len(graph.cell_types)):
        for edges in _edges_of_nodes(graph):
            kept = sorted(edges, key=lambda e, t=t: -score[t, e])[: 2 if graph.pairs else None]
            mix[t, kept, op[t, kept]] = True
    return of_mix(graph, mix)


@partial(jax.jit, static_argnums=0)
def darts_mix(graph: Graph, logits: Array) -> Array:
    """[cell types, edges, ops], 0 or 1: the mix of `darts_rule`'s network while everything is alive, on the device.

    logits [cell types, edges, ops]. The graph may be of a search in which nodes summed all their inputs: what counts
    is whether this one has pairs.
    """
    none = jnp.arange(len(graph.ops)) == graph.ops.index("none")
    weight = jnp.where(none, -1.0, jax.nn.softmax(logits))
    score, end = jnp.max(weight, axis=-1), np.array([j for _, j in graph.edges])
    earlier = np.arange(len(end)) < np.arange(len(end))[:, None]
    ahead = (score[:, None] > score[..., None]) | ((score[:, None] == score[..., None]) & earlier)
    place = jnp.sum(ahead & (end == end[:, None]), axis=-1)  # of an edge among those of its node
    kept = place < (2 if graph.pairs else len(end))
    return jax.nn.one_hot(jnp.argmax(weight, axis=-1), len(graph.ops)) * kept[..., None]


def pair_rule(graph: Graph, alpha: Alpha, mask: Mask) -> Genotype:
    """MetaNAS: per node the pair with the largest logit, on each of its inputs the largest operation logit.

    `none` may win (D-34), on all inputs of a node too, so this is exactly the network that the terminal prune leaves;
    `to_text` says where it left nothing. Ties go to the lowest index.
    """
    return of_mix(graph, masks.terminal(graph, alpha, mask).op)


def check(graph: Graph, genotype: Genotype) -> None:
    """ValueError that names the first entry of the genotype that the graph does not have."""
    if set(genotype) != set(graph.cell_types):
        raise ValueError(f"the genotype has cells {', '.join(genotype)}, the network {', '.join(graph.cell_types)}")
    nodes = _edges_of_nodes(graph)
    for cell_type, cell in genotype.items():
        if len(cell) != len(nodes):
            raise ValueError(f"the genotype's {cell_type} cell has {len(cell)} nodes, the network's {len(nodes)}")
        for j, (node, edges) in enumerate(zip(cell, nodes, strict=True)):
            where, inputs = f"genotype, {cell_type} cell, node {j}", [graph.edges[e][0] for e in edges]
            for op, i in node:
                if op not in graph.ops:
                    raise ValueError(f"{where}: no operation {op!r}; there are {', '.join(graph.ops)}")
                if i not in inputs:
                    raise ValueError(f"{where}: no input {i!r}; there are {', '.join(map(str, inputs))}")
            kept = [i for _, i in node]
            if len(set(kept)) < len(kept):
                raise ValueError(f"{where}: an input occurs twice in {kept}; each carries one operation")


def to_mix(graph: Graph, genotype: Genotype) -> np.ndarray:
    """[cell types, edges, ops] float32, 1 where the genotype has the operation: what the supernet takes.

    ValueError as `check`.
    """
    check(graph, genotype)
    mix = np.zeros((len(graph.cell_types), len(graph.edges), len(graph.ops)), np.float32)
    for t, cell_type in enumerate(graph.cell_types):
        for j, node in enumerate(genotype[cell_type]):
            for op, i in node:
                mix[t, graph.edges.index((i, j)), graph.ops.index(op)] = 1
    return mix


def to_plan(graph: Graph, genotype: Genotype) -> Plan:
    """The program that computes this genotype alone, in the form of `mask.plan_of`; errors as `check`."""
    return plan_of_mix(to_mix(graph, genotype))


def plan_of_mix(mix) -> Plan:
    """The program that computes the operations alone at which `mix` [cell types, edges, ops] is not 0."""
    return [[np.flatnonzero(edge).tolist() for edge in cell] for cell in np.asarray(mix)]


def to_json(genotype: Genotype) -> str:
    """{cell type: [[[operation, input], ...] per node], ...} as one line."""
    return json.dumps(genotype)


def from_json(text: str) -> Genotype:
    """Inverse of `to_json`. Raises ValueError that names what is not in that form; see `check` for the rest."""
    try:
        cells = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the genotype is not JSON: {error}") from None
    if not isinstance(cells, dict) or not cells:
        raise ValueError("a genotype is {cell type: cell, ...}, each cell a list of nodes")
    for name, cell in cells.items():
        if not isinstance(cell, list) or not cell:
            raise ValueError(f"genotype, {name} cell: should be a list of at least one node, is {cell!r}")
    return {
        name: tuple(_node(f"genotype, {name} cell, node {j}", node) for j, node in enumerate(cell))
        for name, cell in cells.items()
    }


def _node(where: str, node) -> tuple[tuple[str, int], ...]:
    if not isinstance(node, list) or not node:
        raise ValueError(f"{where}: should be a list of [operation, input], is {node!r}")
    for entry in node:
        if not isinstance(entry, list) or [type(x) for x in entry] != [str, int]:
            raise ValueError(f"{where}: {entry!r} is not [operation, input]")
    return tuple((op, i) for op, i in sorted(node, key=lambda entry: entry[1]))


def _edges_of_nodes(graph: Graph) -> list[list[int]]:
    """Numbers of the edges that end in each node."""
    nodes = 1 + max(j for _, j in graph.edges)
    return [[e for e, (_, end) in enumerate(graph.edges) if end == j] for j in range(nodes)]


def input_name(graph: Graph, i: int) -> str:
    """c_{k-2} and c_{k-1} for the cells before, then the cell's own nodes: what papers write."""
    return f"c_{{k-{graph.inputs - i}}}" if i < graph.inputs else f"node {i - graph.inputs}"


def to_text(graph: Graph, genotype: Genotype) -> str:
    """A table for people: one row per kept input of every node of every cell; and a line on nodes without any input,
    if there are such.
    """
    rows = [("cell", "node", "input", "operation")]
    for name, cell in genotype.items():
        for j, node in enumerate(cell):
            rows += [(name, str(j), input_name(graph, i), op) for op, i in node]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if cut_off := _cut_off(graph, genotype):
        where = "; ".join(f"{name} {', '.join(map(str, nodes))}" for name, nodes in cut_off.items())
        lines.append(f"`none` keeps every image from the nodes {where}")
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _cut_off(graph: Graph, genotype: Genotype) -> dict[str, list[int]]:
    """Cell type -> its nodes whose inputs all carry `none`, or come from such nodes; only types that have some.

    Nothing forbids them: an operation on such an edge would have weights that the search did not choose, and the
    function would change that the network was trained to be. So they are named.
    """
    found = {}
    for name, cell in genotype.items():
        live = set(range(graph.inputs))
        for j, node in enumerate(cell):
            if any(op != "none" and i in live for op, i in node):
                live.add(graph.inputs + j)
        if dead := [j for j in range(len(cell)) if graph.inputs + j not in live]:
            found[name] = dead
    return found
