"""A picture of a run's records: accuracies, loss, operations alive, temperature, over the rounds.

Prune events are vertical lines; on the accuracies an arrow leads from just before to just after.
"""

import io
from pathlib import Path

from fedmetanas_jax.files import write_bytes

ACCURACIES = (
    ("server", "server_accuracy", None, "#0072B2", "-"),
    ("server, pruned to one operation", "server_accuracy_discrete", None, "#0072B2", ":"),
    ("local, before adaptation", "local_accuracy", "mean", "#D55E00", "--"),
    ("local, after adaptation", "local_accuracy_adapted", "mean", "#D55E00", "-"),
    ("local, adapted, worst tenth", "local_accuracy_adapted", "worst_tenth", "#E69F00", ":"),
)
LOSS = (("training loss", "loss", None, "#009E73", "-"),)
ALIVE = (("operations", "ops_alive", None, "#0072B2", "-"), ("pairs", "pairs_alive", None, "#CC79A7", "--"))
RELAXATION = (
    ("temperature", "temperature", None, "#D55E00", "-"),
    ("largest alpha probability, mean", "alpha_max", None, "#0072B2", "--"),
    ("the same of undecided edges", "alpha_max_undecided", None, "#0072B2", ":"),
)
PANELS = (  # y axis, its series (label, key, entry of the key's dict, colour, line), factor, relative height
    ("accuracy (%)", ACCURACIES, 100, 2),
    ("loss", LOSS, 1, 1.2),
    ("alive", ALIVE, 1, 1),
    ("relaxation", RELAXATION, 1, 1),
)


def draw(records: list[dict], path: str | Path, title: str) -> None:
    """Writes the learning curves of `records` as a PNG; a panel without any number is left out.

    Accuracies in the records are fractions of 1. ValueError: `records` holds no number to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed once a run
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [p for p in PANELS if any(_points(records, key, entry)[0] for _, key, entry, _, _ in p[1])]
    if not panels:
        raise ValueError(f"nothing to draw in {path}: none of {len(records)} records holds a number")
    events = [record for record in records if record.get("event")]
    heights = [height for *_, height in panels]
    figure = Figure(figsize=(8, 1 + 1.7 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (label, series, factor, _) in zip(axes, panels, strict=True):
        for name, key, entry, colour, line in series:
            rounds, values = _points(records, key, entry)
            if rounds:
                values = [factor * value for value in values]
                style = {"color": colour, "linestyle": line, "linewidth": 1.4, "markersize": 3}
                style["marker"] = "o" if len(rounds) <= 30 else None  # one evaluation alone is no line
                style["drawstyle"] = "steps-post" if series is ALIVE else "default"
                axis.plot(rounds, values, label=name, **style)
        for event in events:
            axis.axvline(event["round"], color="0.55", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        axis.set_ylabel(label)
        axis.grid(axis="y", color="0.9", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for event in events:
        _drop(axes[0], event)
    if events:
        names = ", ".join(dict.fromkeys(str(event["event"]) for event in events))
        axes[0].plot([], [], color="0.55", linewidth=0.8, linestyle=(0, (2, 2)), label=f"event: {names}")
    for axis in axes:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    axes[-1].set_xlabel("round")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    figure.suptitle(title, fontsize=11)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())


def _drop(axis, event: dict) -> None:
    before, after = event.get("event_accuracy_before"), event.get("event_accuracy_after")
    if before is None or after is None or axis.get_ylabel() != PANELS[0][0]:
        return
    start, end = ((event["round"], 100 * accuracy) for accuracy in (before, after))
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1})


def _points(records: list[dict], key: str, entry: str | None) -> tuple[list, list]:
    """Rounds and values where the record has a number."""
    points = []
    for record in records:
        value = record.get(key)
        if entry is not None and value is not None:
            value = value.get(entry)
        if value is not None:
            points.append((record["round"], value))
    return [r for r, _ in points], [v for _, v in points]
