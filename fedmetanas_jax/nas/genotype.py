"""The discrete architecture a search ends with, and its forms: JSON, text, mix (methods section 3.4)."""

import json
from typing import NamedTuple

import numpy as np

from fedmetanas_jax.core import Alpha, Mask
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax
from fedmetanas_jax.topology import CELL_TYPES, NONE, OPS, edge, num_edges, num_nodes

Cell = tuple[tuple[tuple[str, int], ...], ...]  # [nodes][inputs kept] -> (operation, input), inputs ascending


class Genotype(NamedTuple):
    """Which operation each node applies to which of its inputs, in both cell types."""

    normal: Cell
    reduce: Cell


def darts_rule(alpha: Alpha, mask: Mask) -> Genotype:
    """DARTS: per node the two inputs with the largest non-`none` weight, each with that operation.

    Weights are softmax(logits) at temperature 1 over what is alive; pair logits play no part, but inputs
    in no surviving pair are out. An input with `none` alone alive ranks below all others and keeps
    `none` if the node needs it. Ties go to the lowest index.
    """
    weight = np.array(relax.softmax(alpha, mask, 1.0).op)
    op_alive, live = np.array(mask.op), np.array(masks.live_edges(mask))
    weight[~op_alive] = -1
    weight[..., NONE] = -1
    op = np.where(weight.max(-1) >= 0, weight.argmax(-1), NONE)
    score = np.where(live, weight.max(-1), -2)
    cells = []
    for t in range(len(CELL_TYPES)):
        chosen = []
        for j in range(num_nodes(mask.pair.shape[-1])):
            inputs = np.argsort(-score[t, edge(j, 0) : edge(j + 1, 0)], kind="stable")[:2]
            chosen.append(tuple((OPS[op[t, edge(j, i)]], int(i)) for i in sorted(inputs)))
        cells.append(tuple(chosen))
    return Genotype(*cells)


def pair_rule(alpha: Alpha, mask: Mask) -> Genotype:
    """MetaNAS: per node the pair with the largest logit, on each of its inputs the largest operation logit.

    `none` may win (D-34), so this is exactly the network that the terminal prune leaves. Ties go to the
    lowest index.
    """
    cells = masks.keep(masks.terminal(alpha, mask))
    nodes = num_nodes(mask.pair.shape[-1])
    return Genotype(
        *(
            tuple(tuple((OPS[k], i) for i in range(j + 2) for k in cell[edge(j, i)]) for j in range(nodes))
            for cell in cells
        )
    )


def to_mix(genotype: Genotype, nodes: int) -> np.ndarray:
    """[2, edges, ops] float32, 1 where the genotype has the operation: what the supernet takes.

    Raises ValueError if the genotype's cells do not have `nodes` nodes.
    """
    if len(genotype.normal) != nodes:
        raise ValueError(f"the genotype's cells have {len(genotype.normal)} nodes, the network's {nodes}")
    mix = np.zeros((len(CELL_TYPES), num_edges(nodes), len(OPS)), np.float32)
    for t, cell in enumerate(genotype):
        for j, node in enumerate(cell):
            for op, i in node:
                mix[t, edge(j, i), OPS.index(op)] = 1
    return mix


def to_keep(genotype: Genotype, nodes: int) -> masks.Keep:
    """The program that computes this genotype alone, in the form of `mask.keep`; errors as `to_mix`."""
    return [[np.flatnonzero(edge).tolist() for edge in cell] for cell in to_mix(genotype, nodes)]


def to_json(genotype: Genotype) -> str:
    """{"normal": [[[operation, input], ...] per node], "reduce": ...} as one line."""
    return json.dumps(genotype._asdict())


def from_json(text: str) -> Genotype:
    """Inverse of `to_json`. Raises ValueError that names the entry which is not an architecture."""
    try:
        cells = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the genotype is not JSON: {error}") from None
    if not isinstance(cells, dict) or set(cells) != set(CELL_TYPES):
        raise ValueError('a genotype is {"normal": cell, "reduce": cell}, each cell a list of nodes')
    genotype = Genotype(**{name: _cell(name, cells[name]) for name in CELL_TYPES})
    normal, reduce = map(len, genotype)
    if normal != reduce:
        raise ValueError(f"genotype: normal has {normal} nodes, reduce {reduce}; the same number is needed")
    return genotype


def _cell(name: str, cell) -> Cell:
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"genotype, {name} cell: should be a list of at least one node, is {cell!r}")
    return tuple(_node(f"genotype, {name} cell, node {j}", j, node) for j, node in enumerate(cell))


def _node(where: str, j: int, node) -> tuple[tuple[str, int], ...]:
    if not isinstance(node, list) or not node:
        raise ValueError(f"{where}: should be a list of [operation, input], is {node!r}")
    for entry in node:
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"{where}: {entry!r} is not [operation, input]")
        op, i = entry
        if op not in OPS:
            raise ValueError(f"{where}: no operation {op!r}; there are {', '.join(OPS)}")
        if type(i) is not int or not 0 <= i <= j + 1:
            raise ValueError(f"{where}: no input {i!r}; there are 0 to {j + 1}")
    inputs = [i for _, i in node]
    if len(set(inputs)) < len(inputs):
        raise ValueError(f"{where}: an input occurs twice in {inputs}; each carries one operation")
    return tuple((op, i) for op, i in sorted(node, key=lambda entry: entry[1]))


def input_name(i: int) -> str:
    """c_{k-2} and c_{k-1} for the two cells before, then the cell's own nodes: what papers write."""
    return f"c_{{k-{2 - i}}}" if i < 2 else f"node {i - 2}"


def to_text(genotype: Genotype) -> str:
    """A table for people: one row per kept input of every node of both cells."""
    rows = [("cell", "node", "input", "operation")]
    for name, cell in zip(CELL_TYPES, genotype, strict=True):
        for j, node in enumerate(cell):
            rows += [(name, str(j), input_name(i), op) for op, i in node]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
