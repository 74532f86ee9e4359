"""Learning curves of a table's methods: server accuracy against time, mean and standard deviation over seeds.

Figures 3 and 4 of the paper are those of Tables 1 and 2.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from study.paper import label
from study.tables import Request
from study.worker import Study

# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
AXES = {"seconds": ("hours in rounds", 3600.0), "round": ("round", 1.0)}


def averaged(curves: Sequence[dict]) -> list[dict[str, np.ndarray]]:
    """Curves of several seeds (outcome.curve) -> one curve for every phase that has server accuracies, over the rounds
    that all of them evaluated: "round", "seconds", "mean", "std" (0 for a single seed)."""
    points = [
        {number: (phase, accuracy, seconds) for number, phase, accuracy, seconds in zip(
            curve["round"], curve["phase"], curve["server"], curve["seconds"], strict=True) if accuracy is not None}
        for curve in curves
    ]  # fmt: skip
    common = sorted(set.intersection(*(set(one) for one in points))) if points else []
    found = []
    for phase in sorted({points[0][number][0] for number in common}):
        rounds = [number for number in common if points[0][number][0] == phase]
        values = np.array([[one[number][1:] for number in rounds] for one in points])  # [seeds, rounds, 2]
        std = values[..., 0].std(0, ddof=1) if len(points) > 1 else np.zeros(len(rounds))
        mean, seconds = values.mean(0).T
        found.append({"round": np.array(rounds), "seconds": seconds, "mean": mean, "std": std})
    return found


def draw(study: Study, request: Request, title: str, path: Path) -> list[str]:
    """PATH.png and PATH.svg: a panel for every column, against time and against rounds -> the rows without a finished
    run, which are not in it. Where a method trained anew, its first training is dashed."""
    from matplotlib.figure import Figure

    runs, empty = request.runs(), []
    figure = Figure(figsize=(6 * len(request.columns), 8), layout="constrained")
    panels = figure.subplots(2, len(request.columns), squeeze=False)
    figure.suptitle(title)
    for place, column in enumerate(request.columns):
        for colour, row in zip(COLOURS * len(request.rows), request.rows, strict=False):
            found = [study.finished(runs[row, column, seed]) for seed in request.seeds]
            curves = [one["curve"] for one in found if one is not None]
            parts = averaged(curves)
            if not parts:
                empty.append(f"{row}, {column}")
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                how = {"color": colour, "label": f"{label(row)} (n = {len(curves)})" if last else None}
                for panel, (axis, (name, unit)) in zip(panels[:, place], AXES.items(), strict=True):
                    x, mean, std = part[axis] / unit, 100 * part["mean"], 100 * part["std"]
                    panel.plot(x, mean, linestyle="-" if last else "--", marker="." if len(x) < 3 else None, **how)
                    panel.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
                    panel.set(xlabel=name, ylabel="server accuracy, percent", title=column)
        for panel in panels[:, place]:
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=120)
    return empty
