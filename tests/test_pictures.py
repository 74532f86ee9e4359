"""The pictures of a run: what their panels, images and frames hold, for both search spaces and for older records."""

import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from PIL import Image

from fedmetanas_jax import pictures
from fedmetanas_jax.data import picture as partition_picture
from fedmetanas_jax.engine import curves, panels
from fedmetanas_jax.models.nasbench201 import GRAPH as NASBENCH201
from fedmetanas_jax.models.plan import darts_graph
from fedmetanas_jax.nas import animation, heatmap

SMALL = darts_graph(2)
GRAPHS = pytest.mark.parametrize("graph", [SMALL, darts_graph(4), NASBENCH201], ids=["2 nodes", "4 nodes", "cell"])


def thinning(graph, moments: int) -> np.ndarray:
    """[moments, cell types, edges, ops]: weights that grow on the first operation, half of the others pruned in the
    middle, all in the end."""
    share = np.linspace(0, 1, moments)
    mix = np.zeros((moments, len(graph.cell_types), len(graph.edges), len(graph.ops)))
    mix[:] = ((1 - share) / len(graph.ops))[:, None, None, None]
    mix[(moments - 1) // 2 :, ..., len(graph.ops) // 2 :] = 0
    mix[..., 0] = 0.5 + 0.5 * share[:, None, None]
    mix[-1, ..., 1:] = 0
    return mix


def a_search(graph=SMALL) -> list[dict]:
    """Records of 8 rounds: evaluated in every second one, an event after 3, one put off after 5."""
    records = [
        {"round": n, "loss": 1 / n, "temperature": 1 / n, "ops_alive": 80.0, "pairs_alive": 8.0, "alpha_entropy": 0.9}
        for n in range(1, 9)
    ]
    for record, mix in zip(records[1::2], thinning(graph, 4).tolist(), strict=True):
        record |= {"server_accuracy": record["round"] / 10, "mix": mix, "local_accuracy": {"mean": 0.5}}
    cost = "event_cost_on_training_images"
    records[2] |= {"event": "prune", "event_accuracy_before": 0.5, "event_accuracy_after": 0.4, cost: 0.001}
    records[2]["mix"] = records[3]["mix"]
    records[4] |= {"event_put_off": "prune", cost: 0.02}
    return records


def drawn(axes) -> dict:
    """{label: (rounds, values)} of the lines that the legend names."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_curves_have_a_panel_for_every_kind_of_number_there_is(tmp_path):
    loss = [{"round": n, "loss": 1 / n, "server_accuracy": None} for n in (1, 2, 4)]
    (axes,) = panels.figure_of(curves.CURVES, loss, "loss alone").axes
    assert drawn(axes) == {"training loss": ([1, 2, 4], [1, 0.5, 0.25])}
    accuracy, _ = panels.figure_of(curves.CURVES, a_search(), "both").axes
    shown = drawn(accuracy)
    assert shown["server"] == ([2, 4, 6, 8], pytest.approx([20, 40, 60, 80]))
    assert shown["local, before adaptation"] == ([2, 4, 6, 8], [50] * 4)
    assert {"event: prune", "event: prune put off"} <= shown.keys()
    curves.draw(loss, tmp_path / "loss.png", "loss alone")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert Image.open(tmp_path / "loss.png").format == "PNG"


def test_names_of_labels_are_text_and_no_formulas(tmp_path):
    names = (r"$\frac$", "$", "über {x}", "猫", "", "a\nb", "x" * 100, "кот")
    shown = [r"$\frac$", "$", "über {x}", "label 3", "label 4", "label 5", f"{'x' * 20}...", "кот"]
    figure = partition_picture.figure_of(np.ones((3, len(names))), names)
    axes, _ = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == shown
    with warnings.catch_warnings(action="error"):  # of what the font lacks, and of no room
        FigureCanvasAgg(figure).draw()
    (height,) = axes.get_window_extent().bounds[3:]
    assert height > 20
    partition_picture.draw(np.ones((3, 40)), tuple(map(str, range(40))), tmp_path / "many.svg")
    assert "label" not in (tmp_path / "many.svg").read_text()


def test_curves_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        curves.draw([{"round": 1, "loss": None}], tmp_path / "x.png", "none")


def test_a_search_shows_what_events_did_and_which_were_put_off():
    figure = panels.figure_of(curves.SEARCH, curves.with_events(a_search()), "search")
    accuracy, alive, alphas, temperature, cost = figure.axes
    assert drawn(accuracy)["server"] == ([2, 3, 4, 6, 8], pytest.approx([20, 50, 40, 60, 80]))
    (arrow,) = (x for x in accuracy.texts if isinstance(x, Annotation))
    assert (arrow.xyann, arrow.xy) == ((3, 50), (3, 40))
    assert drawn(alive)["pairs"] == (list(range(1, 9)), [8] * 8)
    assert list(drawn(alphas)) == ["entropy: undecided (1 = nothing known)"]
    assert drawn(temperature)["temperature"][1][1] == 0.5
    assert drawn(cost) == {"event": ([3], pytest.approx([0.1])), "event put off": ([5], pytest.approx([2]))}
    for axes in figure.axes:  # a line through each panel for either
        upright = [line for line in axes.get_lines() if list(line.get_ydata()) == [0, 1] and len(line.get_xdata()) == 2]
        assert [line.get_xdata()[0] for line in upright] == [3, 5]


@GRAPHS
def test_a_heat_map_has_a_panel_for_every_edge_and_a_cell_for_every_weight(graph):
    mix = thinning(graph, 4)
    figure = heatmap.figure_of(graph, [2, 4, 5, 8], mix, "weights")
    *edges, _ = figure.axes  # the last one is what the colours mean
    assert len(edges) == len(graph.cell_types) * len(graph.edges)
    for axes, weight in zip(edges, np.moveaxis(mix, 0, -1).reshape(-1, len(graph.ops), 4), strict=True):
        (image,) = (x for x in axes.collections if x.get_array() is not None)
        shown = image.get_array()
        np.testing.assert_array_equal(shown.filled(0), weight)
        np.testing.assert_array_equal(np.ma.getmaskarray(shown), weight == 0)
        assert image.get_coordinates()[0, :, 0].tolist() == pytest.approx([2, 4, 5, 8, 9])
    assert [label.get_text() for label in edges[0].get_yticklabels()] == list(graph.ops)
    start, end = graph.edges[-1]
    assert edges[-1].get_title() == rf"node {start - graph.inputs} $\to$ node {end}"


@GRAPHS
def test_no_words_of_a_heat_map_overlap(graph):
    figure = heatmap.figure_of(graph, [10, 500, 990, 1000], thinning(graph, 4), "task, method, seed 1")
    FigureCanvasAgg(figure).draw()
    # Without the rounds, among which are some that are not drawn.
    words = [x for x in figure.findobj(Text) if x.get_visible() and x.get_text().strip("0123456789")]
    boxes = [x.get_window_extent().padded(-1) for x in words]
    pairs = [(n, m) for n in range(len(words)) for m in range(n) if boxes[n].overlaps(boxes[m])]
    assert not [(words[n].get_text(), words[m].get_text()) for n, m in pairs]


def test_weights_of_another_graph_are_refused():
    mix = thinning(NASBENCH201, 3)
    for refused in (mix, mix[:0]):
        with pytest.raises(ValueError, match="none of this graph"):
            heatmap.figure_of(SMALL, [1, 2, 3], refused, "t")
        with pytest.raises(ValueError, match="none of this graph"):
            animation.frames(SMALL, refused, ["a", "b", "c"], "t")


def gif(path) -> tuple[list[np.ndarray], list[int]]:
    """Frames [height, width, 3] and their milliseconds, as a viewer sees them."""
    image, frames, times = Image.open(path), [], []
    for n in range(image.n_frames):
        image.seek(n)
        frames.append(np.asarray(image.convert("RGB")).astype(int))
        times.append(image.info["duration"])
    return frames, times


@GRAPHS
def test_cells_thin_out_frame_by_frame(tmp_path, graph):
    mix = thinning(graph, 5)
    animation.draw(graph, mix, [f"round {n}\n" for n in range(5)], tmp_path / "cells.gif", "title")
    frames, times = gif(tmp_path / "cells.gif")
    assert times == [animation.SHOWN] * 4 + [animation.LAST]
    assert all(frame.shape == frames[0].shape for frame in frames)
    ink = [np.sum(np.any(frame < 250, axis=-1)) for frame in frames]
    assert ink[0] > ink[2]  # half of the operations
    assert all(np.array_equal(frame[0, 0], [255, 255, 255]) for frame in frames)
    # Nodes stay where they are, and hide what passes behind them.
    node = np.all(np.abs(frames[-1] - [0xD7, 0xE9, 0xF7]) < 8, axis=-1)
    assert node.sum() > 300 * len(graph.cell_types) * len({j for _, j in graph.edges})
    for frame in frames:
        assert np.all(frame[node] == frames[-1][node])


def test_what_is_left_is_named_and_straight():
    mix = thinning(SMALL, 3)
    figure, _, cells = animation._stage(SMALL, mix, "title")
    for cell, names in zip(cells, (mix[0, 0], mix[-1, 0]), strict=True):
        animation._show(cell, names)
    shown = [[label.get_text() for label in cell.labels.values() if label.get_visible()] for cell in cells]
    assert shown == [[], ["none"] * 5]
    assert len(cells[0].lines.get_segments()) == 40
    assert len(cells[1].lines.get_segments()) == len(cells[1].heads.get_paths()) == 5
    ends = cells[1].curves[:, 0]  # [edges, points, 2]
    middle = (ends[:, 0] + ends[:, -1]) / 2
    np.testing.assert_allclose(ends[:, 8], middle, atol=1e-6)
    wide = cells[0].lines.get_linewidths()
    assert wide[0] > wide[1]  # weights .5 and .125


def test_only_what_moves_is_a_frame_and_long_runs_have_no_more_than_short_ones():
    mix = thinning(SMALL, 4)
    assert animation.chosen(mix[[0, 0, 1, 2, 2, 3, 3, 3]]) == [0, 2, 3, 5, 7]
    assert animation.chosen(mix[:1]) == [0]
    many = animation.chosen(np.arange(500.0))
    assert (many[0], many[-1], len(many)) == (0, 499, animation.FRAMES)


def test_a_search_leaves_all_pictures_and_older_records_leave_fewer(tmp_path):
    records = a_search()
    pictures.draw(records, SMALL, tmp_path / "new", "title")
    left = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert left.keys() == {"curves.png", "search.png", "alphas.png", "cells.gif"}
    assert left["cells.gif"] < 200_000
    assert len(gif(tmp_path / "new" / "cells.gif")[0]) == 4  # of 5, since the event left what the evaluation found
    older = [{key: x for key, x in r.items() if key not in ("mix", "alpha_entropy")} for r in records]
    pictures.draw(older, SMALL, tmp_path / "old", "title")
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["curves.png", "search.png"]
    pictures.draw(older, None, tmp_path / "no search", "title")
    assert [path.name for path in (tmp_path / "no search").iterdir()] == ["curves.png"]


def test_a_caption_says_what_the_record_knows():
    record = a_search()[2]
    assert pictures.caption(record) == "round 3, prune\n40 operations on 10 edges, server accuracy 40.0%"
    assert pictures.caption({"round": 9, "mix": thinning(SMALL, 2)[-1]}) == "round 9\n10 operations on 10 edges"
