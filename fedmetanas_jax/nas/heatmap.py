"""A picture of an architecture over a search: the weight of every operation on every edge, round by round.

A panel is an edge: the rows of panels are a cell's nodes, the columns what a node reads. Colour is the noise-free
weight, grey is what was pruned.
"""

import io
from pathlib import Path

import numpy as np

from fedmetanas_jax.core import Graph
from fedmetanas_jax.files import write_bytes
from fedmetanas_jax.nas.genotype import input_name
from fedmetanas_jax.nas.picture import colours

# All lengths are inches on the page, so that the size of a label is known before it is drawn.
ROW, GAP, NEXT = 0.14, 0.25, 0.55  # of an operation; between panels; from one cell to the next
LEFT, RIGHT, TOP = 1.15, 1.0, 0.75  # for the operations' names, for the colours' meaning, for the titles
PANELS, NARROW, WIDE = 9.6, 1.2, 2.6  # the panels of a row together, if one is then between narrow and wide
FONT = 7  # points
PRUNED = "#ececec"


def draw(graph: Graph, rounds: list[int], mix, path: str | Path, title: str) -> None:
    """Writes the picture as a PNG; arguments and errors as `figure_of`."""
    png = io.BytesIO()
    figure_of(graph, rounds, mix, title).savefig(png, format="png", dpi=130)
    write_bytes(path, png.getvalue())


def figure_of(graph: Graph, rounds: list[int], mix, title: str):
    """The picture as a matplotlib figure.

    mix [rounds, cell types, edges, ops] holds the weights after each of `rounds`, ascending; 0 = pruned. A column
    reaches from its round to the next. ValueError: `mix` has another shape, or holds no round.
    """
    from matplotlib.figure import Figure

    mix = np.asarray(mix, float)
    if not len(rounds) or mix.shape != (len(rounds), len(graph.cell_types), len(graph.edges), len(graph.ops)):
        raise ValueError(f"weights of {len(rounds)} rounds in the shape {mix.shape} are none of this graph")
    nodes, columns = (1 + max(end) for end in zip(*((j, i) for i, j in graph.edges), strict=True))
    wide, high = np.clip(PANELS / columns - GAP, NARROW, WIDE), ROW * len(graph.ops)
    cell = nodes * (high + GAP) + NEXT
    width, height = LEFT + columns * (wide + GAP) + RIGHT, TOP + len(graph.cell_types) * cell - 0.3
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=FONT + 4)
    image = None
    for t, name in enumerate(graph.cell_types):
        top = height - TOP - t * cell
        text = "cell" if name == "cell" else f"{name} cell"
        figure.text(0.15 / width, (top + 0.1) / height, text, fontsize=FONT + 2, weight="bold")
        for e, (i, j) in enumerate(graph.edges):
            x, y = LEFT + i * (wide + GAP), top - j * (high + GAP) - high
            axes = figure.add_axes((x / width, y / height, wide / width, high / height))
            image = _draw_edge(axes, graph, rounds, mix[:, t, e])
            axes.set_title(_edge(graph, i, j), fontsize=FONT, pad=2)
            if i == 0:
                axes.set_yticks(np.arange(len(graph.ops)) + 0.5, graph.ops)
                for label, colour in zip(axes.get_yticklabels(), colours(graph).values(), strict=True):
                    label.set_color(colour)
            axes.tick_params(labelbottom=j == nodes - 1, labelsize=FONT, length=2, pad=2)
            if j == nodes - 1:
                axes.set_xlabel("round", fontsize=FONT, labelpad=1)
    _legend(figure, image, width, height)
    return figure


def _edge(graph: Graph, i: int, j: int) -> str:
    start = input_name(graph, i)
    return rf"{start if i >= graph.inputs else f'${start}$'} $\to$ node {j}"


def _draw_edge(axes, graph: Graph, rounds: list[int], weight: np.ndarray):
    """One panel of weights [rounds, ops] -> its image."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    # The last column has no next round to reach to.
    borders = [*rounds, rounds[-1] + max(1, 0.02 * (rounds[-1] - rounds[0]))]
    shown = np.ma.masked_equal(weight.T, 0)
    # The root: most weights are small for most of a search, and what is decided there should be seen.
    norm, rows = PowerNorm(0.5, 0, 1), np.arange(len(graph.ops) + 1)
    image = axes.pcolormesh(borders, rows, shown, cmap="viridis", norm=norm)
    axes.set_facecolor(PRUNED)
    axes.set(xlim=(borders[0], borders[-1]), ylim=(len(graph.ops), 0))
    axes.hlines(rows[1:-1], borders[0], borders[-1], color="white", linewidth=0.4)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set_visible(False)
    return image


def _legend(figure, image, width: float, height: float) -> None:
    from matplotlib.patches import Patch

    x = width - RIGHT + 0.15
    axes = figure.add_axes((x / width, (height - TOP - 1.6) / height, 0.12 / width, 1.6 / height))
    bar = figure.colorbar(image, cax=axes, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", ".01", ".05", ".1", ".25", ".5", "1"])
    bar.ax.tick_params(labelsize=FONT, length=2)
    bar.ax.set_title("weight", fontsize=FONT, pad=4)
    bar.outline.set_visible(False)
    at = (x - 0.05) / width, (height - TOP - 1.7) / height
    figure.legend(handles=[Patch(color=PRUNED, label="pruned")], loc="upper left", bbox_to_anchor=at, frameon=False,
                  fontsize=FONT, handlelength=1, handleheight=1, borderpad=0)  # fmt: skip
