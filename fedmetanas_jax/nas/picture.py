"""A picture of a genotype: its cells side by side, top to bottom, every kept operation a labelled arrow."""

from itertools import cycle, product
from pathlib import Path

import numpy as np

from fedmetanas_jax.core import Graph
from fedmetanas_jax.nas.genotype import Cell, Genotype, input_name

# Of the operations in order: Okabe and Ito's palette, which the colour-blind tell apart; its light tones darkened for
# use as text.
PALETTE = ("#8a8a8a", "#b8860b", "#7a6a00", "#222222", "#0072b2", "#b0578d", "#009e73", "#d55e00")
INNER, OUTER = "#d7e9f7", "#f0ead8"  # of nodes, of what goes in and out

# All lengths are inches on the page, so that the size of a label is known before it is drawn.
WIDTH, ROW, MARGIN = 4.4, 1.05, 0.45  # of a cell; from row to row; above and below
FONT = 9  # points
COLUMNS = np.linspace(-1.6, 1.6, 9)  # where a node may stand in its row
ALONG = np.linspace(0.25, 0.75, 11)  # where on its arrow a label may stand
RADIUS = 0.19  # of a node


def draw(graph: Graph, genotype: Genotype, path: str | Path) -> None:
    """Writes the picture; the ending of `path` is the format (.png, .pdf, .svg).

    `none` is a dashed arrow. Pale lines lead to the cell's output c_k from the nodes it is made of.
    """
    figure_of(graph, genotype).savefig(path, dpi=200)


def figure_of(graph: Graph, genotype: Genotype):
    """The picture as a matplotlib figure."""
    from matplotlib.figure import Figure  # slow to import, and needed once a run

    height = height_of(max(map(len, genotype.values())))
    figure = Figure(figsize=(len(genotype) * WIDTH, height), facecolor="white")
    for column, (name, cell) in enumerate(genotype.items()):
        axes = figure.add_axes((column / len(genotype), 0, 1 / len(genotype), 1))
        empty_cell(axes, name, height)
        _draw_cell(axes, graph, cell)
    return figure


def height_of(nodes: int) -> float:
    """Inches that a cell of so many nodes takes, its name included."""
    return ROW * (nodes + 1) + 2 * MARGIN + 0.2


def colours(graph: Graph) -> dict[str, str]:
    """{operation: its colour} in every picture."""
    return dict(zip(graph.ops, cycle(PALETTE), strict=False))


def empty_cell(axes, name: str, height: float) -> None:
    """Prepares axes `height` inches high for a cell of the type `name`, and writes that above it."""
    axes.set(xlim=(-WIDTH / 2, WIDTH / 2), ylim=(MARGIN - height, MARGIN))
    axes.axis("off")
    title = "Cell" if name == "cell" else f"{name.capitalize()} cell"
    axes.text(0, 0.15, title, ha="center", fontsize=FONT + 2, weight="bold")


def draw_nodes(axes, graph: Graph, place: np.ndarray) -> list:
    """Inputs, nodes and output at their places [inputs + nodes + 1, 2], and what the output is made of -> the
    matplotlib texts of the former."""
    last, texts = len(place) - 1, []
    for start in _output(graph):
        _arrow(axes, place[start], place[last], color="#d0d0d0", linewidth=1, zorder=1)
    for number, (x, y) in enumerate(place):
        inner = graph.inputs <= number < last
        name = f"{number - graph.inputs}" if inner else f"${'c_k' if number == last else input_name(graph, number)}$"
        box = {"boxstyle": "circle,pad=0.4" if inner else "round,pad=0.4", "edgecolor": "#444444"}
        box["facecolor"] = INNER if inner else OUTER
        texts.append(axes.text(x, y, name, ha="center", va="center", fontsize=FONT + 2, bbox=box, zorder=4))
    return texts


def draw_label(axes, x: float, y: float, op: str, colour: str):
    """The name of an operation on its arrow -> the matplotlib text."""
    box = {"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"}
    return axes.text(x, y, op, color=colour, fontsize=FONT, ha="center", va="center", bbox=box, zorder=3)


def _draw_cell(axes, graph: Graph, cell: Cell) -> None:
    colour = colours(graph)
    place, labels = layout(graph, cell)
    for (op, i, j), (x, y) in zip(_arrows(graph, cell), labels, strict=True):
        line = "--" if op == "none" else "-"
        _arrow(axes, place[i], place[j], color=colour[op], linewidth=1.5, linestyle=line, zorder=2)
        draw_label(axes, x, y, op, colour[op])
    draw_nodes(axes, graph, place)


def _arrow(axes, start, end, **line) -> None:
    from matplotlib.patches import FancyArrowPatch

    gap = 72 * RADIUS
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=gap, shrinkB=gap, **line))


def _arrows(graph: Graph, cell: Cell) -> list[tuple[str, int, int]]:
    """(operation, start, end) with the inputs numbered 0, 1, ..., then the nodes, and c_k last."""
    return [(op, i, j + graph.inputs) for j, node in enumerate(cell) for op, i in node]


def _output(graph: Graph) -> list[int]:
    """What c_k is made of, in the same numbers."""
    return [graph.inputs + j for j in graph.output]


def layout(graph: Graph, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Places of inputs, nodes and output [inputs + nodes + 1, 2], and of the labels [arrows, 2].

    An operation "" is an arrow without a label, which matters less. A node keeps to the row of its number. From two
    zigzags, one node at a time moves to the column that crowds the cell least, until none moves; the better end of the
    two is taken.
    """
    nodes, inputs = len(cell), graph.inputs
    rows = -ROW * np.array([*[0] * inputs, *range(1, nodes + 2)], float) - 0.2
    found = []
    outer = np.linspace(-1.2, 1.2, inputs) if inputs > 1 else [0.0]
    for side in (-1, 1):
        columns = np.array([*outer, *(0.8 * side * (-1) ** j for j in range(nodes)), 0.0])
        cost, moved = np.inf, True
        while moved:
            moved = False
            for number, x in product(range(inputs, inputs + nodes), COLUMNS):
                trial = columns.copy()
                trial[number] = x
                trial_cost, _ = _crowding(graph, cell, np.stack([trial, rows], 1))
                if trial_cost < cost - 1e-9:
                    columns, cost, moved = trial, trial_cost, True
        found.append((cost, side, np.stack([columns, rows], 1)))
    place = min(found, key=lambda f: f[:2])[2]
    return place, _crowding(graph, cell, place)[1]


def _crowding(graph: Graph, cell: Cell, place: np.ndarray) -> tuple[float, np.ndarray]:
    """A penalty for what makes a drawing hard to read, and the best place of every label [arrows, 2]."""
    last, labelled = len(place) - 1, _arrows(graph, cell)
    ends = np.array([(i, j) for _, i, j in labelled] + [(n, last) for n in _output(graph)])
    importance = np.array([1.0 if op else 0.4 for op, *_ in labelled] + [0.3] * len(_output(graph)))
    start, end = place[ends[:, 0]], place[ends[:, 1]]
    t = np.linspace(0, 1, 33)[:, None]
    points = start[:, None] * (1 - t) + end[:, None] * t  # [arrows, 33, 2]

    # An arrow that passes a node as if it ended there.
    distance = np.linalg.norm(points[:, :, None] - place, axis=-1).min(1)  # [arrows, places]
    own = np.any(np.arange(last + 1)[:, None] == ends[:, None], axis=-1)
    passing = np.where(own, 0, np.maximum(0, 2 * RADIUS - distance))
    cost = 30 * np.sum(importance @ passing) + 0.1 * np.sum(importance @ np.linalg.norm(start - end, axis=1))

    # Arrows that cross, or run so close as to look like one: by |a - b|^2 = a^2 + b^2 - 2 ab.
    inner = points[:, 5:-5].reshape(-1, 2)
    square = np.sum(inner**2, axis=1)
    close = square[:, None] + square - 2 * inner @ inner.T < 0.1**2
    count = close.reshape(len(ends), 23, len(ends), 23).sum((1, 3))
    np.fill_diagonal(count, 0)
    cost += 0.15 * importance @ count @ importance

    half = np.array([[0.037 * len(op) + 0.06, 0.11] for op, *_ in labelled])
    centres = np.zeros((0, 2))
    for n in range(len(labelled)):
        here = start[n] * (1 - ALONG[:, None]) + end[n] * ALONG[:, None]  # [places, 2]
        over_points = np.all(np.abs(here[:, None, None] - points) < half[n], axis=-1).sum(2)
        over_points[:, n] = 0
        over_nodes = np.all(np.abs(here[:, None] - place) < half[n] + RADIUS, axis=-1).sum(1)
        over_labels = np.all(np.abs(here[:, None] - centres) < half[n] + half[:n], axis=-1).sum(1)
        outside = np.abs(here[:, 0]) + half[n, 0] > WIDTH / 2
        crowd = over_points @ importance + 8 * over_nodes + 20 * over_labels + 50 * outside
        crowd += np.abs(ALONG - 0.5)
        cost += crowd.min()
        centres = np.vstack([centres, here[crowd.argmin()]])
    return float(cost), centres
