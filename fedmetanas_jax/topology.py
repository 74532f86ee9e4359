"""The graph of a DARTS cell and its numbering (Liu et al., ICLR 2019; methods sections 3.1 to 3.3).

Inputs 0 and 1 of a cell are the outputs of the two cells before it, input j + 2 is its own node j.
Node j reads inputs 0 .. j + 1; a pair of node j is two of them, and the pairs are what Eq. 8 sums over.
Cell type 0 is the normal cell, 1 the reduction cell.
"""

from itertools import combinations

import numpy as np

CELL_TYPES = ("normal", "reduce")
OPS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NONE = OPS.index("none")


def edge(j: int, i: int) -> int:
    """Number of the edge from input i to node j."""
    return j * (j + 3) // 2 + i


def edge_ends(nodes: int) -> list[tuple[int, int]]:
    """(input i, node j) of every edge, in order."""
    return [(i, j) for j in range(nodes) for i in range(j + 2)]


def num_edges(nodes: int) -> int:
    """Edges of a cell: 14 for 4 nodes."""
    return edge(nodes, 0)


def pairs(nodes: int) -> list[tuple[int, int, int]]:
    """(node j, input, input) of every pair in order: node by node, lexicographic; 20 for 4 nodes."""
    return [(j, *two) for j in range(nodes) for two in combinations(range(j + 2), 2)]


def num_nodes(num_pairs: int) -> int:
    """Nodes n of a cell with that many pairs, which are n(n + 1)(n + 2) / 6 = ((n + 1)^3 - (n + 1)) / 6."""
    return round((6 * num_pairs) ** (1 / 3)) - 1


def incidence(nodes: int) -> np.ndarray:
    """P [pairs, edges] float32: 1 where the pair contains the edge; every row holds two ones."""
    matrix = np.zeros((len(pairs(nodes)), num_edges(nodes)), np.float32)
    for row, (j, *inputs) in enumerate(pairs(nodes)):
        matrix[row, [edge(j, i) for i in inputs]] = 1
    return matrix


def pairs_of_node(nodes: int) -> np.ndarray:
    """[nodes, pairs] bool: whose pair it is."""
    return np.arange(nodes)[:, None] == np.array([j for j, *_ in pairs(nodes)])
