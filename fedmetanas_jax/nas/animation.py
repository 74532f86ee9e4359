"""The cells of a search as they thin out, as an animated GIF in the style of the picture of the result.

Every operation alive is an arrow, the wider and darker the larger its noise-free weight. The one that an edge ends with
is straight, and is named as soon as it is alone. Nodes stay where they are, out of the way of all edges.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmetanas_jax.core import Graph
from fedmetanas_jax.files import write_bytes
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.nas import picture

FRAMES = 60  # at most
SHOWN, LAST = 300, 4000  # milliseconds of a frame, and of the last one
DPI = 100
ABOVE, BELOW = 0.8, 0.55  # inches, for the headings and for the operations' names
SPREAD = 0.07  # inches between the arrows of an edge where they are farthest apart, but at most a
SLENDER = 0.045  # share of its length


def draw(graph: Graph, mix, captions: Sequence[str], path: str | Path, title: str) -> None:
    """Writes the GIF, whose last frame stays longest; arguments and errors as `frames`."""
    images = frames(graph, mix, captions, title)
    gif = io.BytesIO()
    times = [SHOWN] * (len(images) - 1) + [LAST]
    images[0].save(gif, format="GIF", save_all=True, append_images=images[1:], duration=times, loop=0)
    write_bytes(path, gif.getvalue())


def chosen(mix) -> list[int]:
    """The entries of `mix` that are shown: those which differ from the one before, and the last; of more than FRAMES
    as many, at equal distances."""
    mix = np.asarray(mix)
    moved = [n for n in range(len(mix)) if n in (0, len(mix) - 1) or np.any(mix[n] != mix[n - 1])]
    return [moved[n] for n in np.unique(np.linspace(0, len(moved) - 1, FRAMES).round().astype(int))]


def frames(graph: Graph, mix, captions: Sequence[str], title: str) -> list:
    """The frames as images of one palette.

    mix [moments, cell types, edges, ops] holds the weights, 0 = pruned; a caption of two lines stands above each. Not
    all are shown, see `chosen`. ValueError: `mix` has another shape, or holds no moment.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    mix = np.asarray(mix, float)
    if not len(mix) or mix.shape[1:] != (len(graph.cell_types), len(graph.edges), len(graph.ops)):
        raise ValueError(f"weights in the shape {mix.shape} are none of this graph")
    figure, heading, cells = _stage(graph, mix, title)
    canvas, images = FigureCanvasAgg(figure), []
    canvas.draw()  # but for what is animated: text is slow to draw, and most of it stays
    still = canvas.copy_from_bbox(figure.bbox)
    for n in chosen(mix):
        canvas.restore_region(still)
        heading.set_text(captions[n])
        figure.draw_artist(heading)
        for cell, weight in zip(cells, mix[n], strict=True):
            _show(cell, weight)
            for artist in (cell.lines, cell.heads, *cell.labels.values(), *cell.nodes):
                figure.draw_artist(artist)
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    # One palette, without dithering, so that what does not move does not change.
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette(graph).ravel().tolist())
    return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]


def _palette(graph: Graph) -> np.ndarray:
    """[colours, 3] uint8, at most 256: the shades that lines and letters on white and on the nodes are drawn in."""
    from matplotlib.colors import to_rgb

    ops = picture.colours(graph).values()
    pairs = [(c, "white", 190 // len(ops)) for c in ops]
    pairs += [("black", "white", 32), ("black", picture.INNER, 16), ("black", picture.OUTER, 16)]
    shades = [np.linspace(to_rgb(one), to_rgb(other), count) for one, other, count in pairs]
    shades = np.round(255 * np.concatenate(shades))
    # Pillow looks for the nearest in coarse steps, and would take what is almost white for white.
    shades = np.vstack([shades[shades.min(axis=1) < 240], [255, 255, 255]])
    return np.unique(shades, axis=0).astype(np.uint8)


class _Cell(NamedTuple):
    """What a frame changes of a cell."""

    curves: np.ndarray  # [edges, ops, points, 2] inches
    colours: np.ndarray  # [ops, 3]
    dashes: list  # [ops] of the lines
    lines: object  # matplotlib's LineCollection
    heads: object  # its PolyCollection
    labels: dict  # edge -> its text
    nodes: list  # texts


def _stage(graph: Graph, mix: np.ndarray, title: str) -> tuple:
    """Everything that stays from frame to frame -> (figure, the text of its heading, cells)."""
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colour = picture.colours(graph)
    left = genotypes.of_mix(graph, (_ranks(mix) == 0) & (mix[-1] > 0))
    high = picture.height_of(1 + max(j for _, j in graph.edges))
    height, cells = high + ABOVE + BELOW, []
    figure = Figure(figsize=(len(left) * picture.WIDTH, height), dpi=DPI, facecolor="white")
    figure.text(0.5, 1 - 0.15 / height, title, ha="center", va="center", fontsize=picture.FONT, color="#444444")
    heading = figure.text(0.5, 1 - 0.5 / height, "", ha="center", va="center", fontsize=picture.FONT + 1, animated=True)
    for t, (name, cell) in enumerate(left.items()):
        axes = figure.add_axes((t / len(left), BELOW / height, 1 / len(left), high / height))
        picture.empty_cell(axes, name, high)
        place, spots = picture.layout(graph, _every_edge(graph, cell))
        nodes = picture.draw_nodes(axes, graph, place)
        lines, heads = LineCollection([], capstyle="butt"), PolyCollection([], linewidth=0)
        axes.add_collection(lines, autolim=False)
        axes.add_collection(heads, autolim=False)
        ops = [op for node in _every_edge(graph, cell) for op, _ in node]
        named = [(e, op, spot) for e, (op, spot) in enumerate(zip(ops, spots, strict=True)) if op]
        labels = {e: picture.draw_label(axes, *spot, op, colour[op]) for e, op, spot in named}
        rgb = np.array([to_rgb(c) for c in colour.values()])
        dashes = [(0, (4, 2)) if op == "none" else "-" for op in graph.ops]
        for artist in (lines, heads, *labels.values(), *nodes):
            artist.set_animated(True)
        cells.append(_Cell(_curves(graph, place, _ranks(mix)[t]), rgb, dashes, lines, heads, labels, nodes))
    entries = [Line2D([], [], color=c, linewidth=3, label=op) for op, c in colour.items()]
    close = {"columnspacing": 1.2, "handlelength": 1.5, "frameon": False, "fontsize": picture.FONT}
    figure.legend(handles=entries, loc="lower center", ncols=-(-len(entries) // 2), **close)
    return figure, heading, cells


def _every_edge(graph: Graph, cell: genotypes.Cell) -> genotypes.Cell:
    """The cell with an operation without a name on each edge that it lacks, so that nodes stand out of their way."""
    kept = [{i: op for op, i in node} for node in cell]
    return tuple(tuple((kept[j].get(i, ""), i) for i, end in graph.edges if end == j) for j in range(len(cell)))


def _ranks(mix: np.ndarray) -> np.ndarray:
    """[cell types, edges, ops], on which side of its edge an operation runs, and how far: 0 for the one that weighs
    most in the end, then -1, 1, -2, ... by their weight in the end or, of those pruned before, in all."""
    order = np.argsort(-mix[-1] - 1e-6 * mix.mean(0), axis=-1, kind="stable")
    number = np.argsort(order, axis=-1)
    return (number + 1) // 2 * np.where(number % 2, -1, 1)


def _curves(graph: Graph, place: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """[edges, ops, points, 2]: parabolas from node to node, fanned out by their ranks [edges, ops]."""
    start, end = (place[list(n)] for n in zip(*((i, j + graph.inputs) for i, j in graph.edges), strict=True))
    length = np.linalg.norm(end - start, axis=-1, keepdims=True)
    along = (end - start) / length
    start, end = start + picture.RADIUS * along, end - picture.RADIUS * along
    across = np.stack([-along[:, 1], along[:, 0]], -1)
    t = np.linspace(0, 1, 17)[:, None]
    straight = start[:, None] * (1 - t) + end[:, None] * t  # [edges, points, 2]
    bend = 4 * t * (1 - t) * (np.minimum(SPREAD, SLENDER * length) * across)[:, None]
    return straight[:, None] + ranks[..., None, None] * bend[:, None]


def _show(cell: _Cell, weight: np.ndarray) -> None:
    """Shows a cell with these weights [edges, ops]."""
    edge, op = np.nonzero(weight)
    w, curves = weight[edge, op], cell.curves[edge, op].copy()
    colours = np.column_stack([cell.colours[op], 0.3 + 0.7 * np.sqrt(np.minimum(w, 1))])
    tip = curves[:, -1].copy()
    along = tip - curves[:, -3]
    along /= np.linalg.norm(along, axis=-1, keepdims=True)
    across = np.stack([-along[:, 1], along[:, 0]], -1)
    long, wide = (0.06 + 0.1 * w)[:, None] * along, (0.02 + 0.045 * w)[:, None] * across
    curves[:, -1] = tip - 0.9 * long
    cell.lines.set(segments=curves, linewidths=0.7 + 1.8 * w, colors=colours)
    cell.lines.set_linestyles([cell.dashes[k] for k in op])
    cell.heads.set(verts=np.stack([tip, tip - long + wide, tip - long - wide], 1), facecolors=colours)
    for e, label in cell.labels.items():
        label.set_visible(np.count_nonzero(weight[e]) == 1)
