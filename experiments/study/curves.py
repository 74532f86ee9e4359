"""Learning curves of a table's methods: server accuracy against time, mean and standard deviation over seeds.

Figures 3 and 4 of the paper are those of Tables 1 and 2.
"""

import csv
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmetanas_jax.files import write_text
from study.columns import head
from study.paper import label
from study.plan import Run
from study.tables import Request
from study.worker import Study

# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
WIDE = 60  # letters of the title over a panel


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


def draw(study: Study, request: Request, title: str, path: Path, unfinished: bool = False) -> list[str]:
    """PATH.png and .svg: a panel for every column, against time and against rounds; PATH.csv: every curve as numbers.

    Where a method trained anew, its first training is dashed. unfinished: every seed is a line of its own, as far as
    its run is; else lines are means over the seeds that are finished. Returns the rows of which nothing is drawn.
    """
    from matplotlib.figure import Figure

    runs, empty = request.runs(), []
    figure = Figure(figsize=(6 * len(request.columns), 8), layout="constrained")
    panels = figure.subplots(2, len(request.columns), squeeze=False)
    figure.suptitle(textwrap.fill(title, WIDE * len(request.columns)))
    numbers = []
    for place, column in enumerate(request.columns):
        drawn = []
        for colour, row in zip(COLOURS * len(request.rows), request.rows, strict=False):
            found = {seed: _curve(study, runs[row, column, seed], unfinished) for seed in request.seeds}
            curves = {seed: one for seed, one in found.items() if one and one["round"]}
            numbers += [(column, row, seed, one) for seed, one in curves.items()]
            lines = [averaged([one]) for one in curves.values()] if unfinished else [averaged(list(curves.values()))]
            lines = [parts for parts in lines if parts]
            if not lines:
                empty.append(f"{row}, {column}")
            reached = ", ".join(str(one["round"][-1]) for one in curves.values())
            named = f"{label(row)} (rounds {reached})" if unfinished else f"{label(row)} (n = {len(curves)})"
            drawn += [
                (part, colour, part is parts[-1], named if part is lines[0][-1] else None)
                for parts in lines
                for part in parts
            ]
        longest = max((part["seconds"][-1] for part, *_ in drawn), default=0.0)
        unit, name = next((pair for pair in UNITS if longest >= pair[0]), UNITS[-1])
        for panel, axis in zip(panels[:, place], ("seconds", "round"), strict=True):
            for part, colour, last, named in drawn:
                x, mean, std = part[axis] / (unit if axis == "seconds" else 1), 100 * part["mean"], 100 * part["std"]
                marker, line = "." if len(x) < 3 else None, "-" if last else "--"
                panel.plot(x, mean, color=colour, linestyle=line, marker=marker, label=named)
                panel.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
            panel.set(xlabel=f"{name} in rounds" if axis == "seconds" else axis, title=head(column))
            panel.set_ylabel("server accuracy, percent")
            panel.grid(alpha=0.3)
        if drawn:  # below the panels, where it covers no line
            panels[1, place].legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=120)
    write_text(path.with_suffix(".csv"), _text(numbers))
    return empty


def _curve(study: Study, run: Run, unfinished: bool) -> dict | None:
    if unfinished:
        return study.curve(run)
    found = study.finished(run)
    return found and found["curve"]


def _text(numbers: list[tuple]) -> str:
    """(column, row, seed, curve) -> a line for every evaluation; accuracies as fractions of 1, what was spent since the
    run began. Empty: not measured."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    names = ("round", "phase", "server", "local", "seconds", "image_gradients", "macs", "bytes")
    lines.writerow(["split", "method", "seed", *names])
    for column, row, seed, curve in numbers:
        lines.writerows([column, row, seed, *values] for values in zip(*(curve[name] for name in names), strict=True))
    return out.getvalue()
