"""Panels of numbers over the rounds of a run, one above the other, from its records.

Events are vertical lines, dashed and grey where one was entered, whole and red where one was put off.
"""

import io
from pathlib import Path
from typing import NamedTuple

from fedmetanas_jax.files import write_bytes

EVENTS = {"event": ("0.55", (0, (2, 2)), ""), "event_put_off": ("#D55E00", "-", " put off")}  # key: colour, line, word


class Series(NamedTuple):
    """A line, or marks, through the numbers of one key of the records."""

    label: str
    key: str
    colour: str
    line: str = "-"  # "" for marks alone
    entry: str | None = None  # of the key's dict
    among: str | None = None  # only the records that have this key
    marker: str | None = None  # None: dots where they are few, since one evaluation alone is no line


class Panel(NamedTuple):
    """Series that share a y axis."""

    label: str  # of the y axis
    series: tuple[Series, ...]
    factor: float = 1  # from the records' unit to the axis's
    height: float = 1  # relative to the other panels
    steps: bool = False  # whether a number holds until the next one
    arrows: bool = False  # from the server's accuracy just before an event to that just after


def draw(panels: tuple[Panel, ...], records: list[dict], path: str | Path, title: str) -> None:
    """Writes the panels as a PNG; one without any number is left out.

    ValueError: `records` holds no number to draw.
    """
    figure = figure_of(panels, records, title)
    if figure is None:
        raise ValueError(f"nothing to draw in {path}: none of {len(records)} records holds a number")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())


def figure_of(panels: tuple[Panel, ...], records: list[dict], title: str):
    """The panels as a matplotlib figure; None where the records hold no number to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed once a run
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [panel for panel in panels if any(_points(records, series)[0] for series in panel.series)]
    if not panels:
        return None
    heights = [panel.height for panel in panels]
    figure = Figure(figsize=(8, 1 + 1.7 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, records)
    for key, (colour, line, word) in EVENTS.items():
        names = ", ".join(dict.fromkeys(str(record[key]) for record in records if record.get(key)))
        if names:
            axes[0].plot([], [], color=colour, linewidth=0.8, linestyle=line, label=f"event: {names}{word}")
    for axis in axes:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    axes[-1].set_xlabel("round")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_panel(axis, panel: Panel, records: list[dict]) -> None:
    for series in panel.series:
        rounds, values = _points(records, series)
        if not rounds:
            continue
        style = {"color": series.colour, "linestyle": series.line, "linewidth": 1.4, "markersize": 3}
        style["marker"] = series.marker or ("o" if len(rounds) <= 30 else None)
        style["drawstyle"] = "steps-post" if panel.steps else "default"
        if series.marker:
            style["markersize"] = 5
        axis.plot(rounds, [panel.factor * value for value in values], label=series.label, **style)
    for key, (colour, line, _) in EVENTS.items():
        for record in records:
            if record.get(key):
                axis.axvline(record["round"], color=colour, linewidth=0.8, linestyle=line, zorder=0)
    if panel.arrows:
        for record in records:
            _arrow(axis, record, panel.factor)
    axis.set_ylabel(panel.label)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _arrow(axis, event: dict, factor: float) -> None:
    before, after = event.get("event_accuracy_before"), event.get("event_accuracy_after")
    if before is None or after is None:
        return
    start, end = ((event["round"], factor * accuracy) for accuracy in (before, after))
    axis.plot(*start, "o", color="black", markersize=2.5, zorder=4)
    if before != after:
        how = {"arrowstyle": "-|>", "mutation_scale": 6, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", end, start, arrowprops=how | {"color": "black", "linewidth": 1}, zorder=4)


def _points(records: list[dict], series: Series) -> tuple[list, list]:
    """Rounds and values where the record has a number."""
    points = []
    for record in records:
        value = record.get(series.key)
        if series.entry is not None and value is not None:
            value = value.get(series.entry)
        if value is not None and (series.among is None or record.get(series.among)):
            points.append((record["round"], value))
    return [r for r, _ in points], [v for _, v in points]
