"""What the page's script draws: learning curves as means over seeds, and prune events."""

import json
import statistics
from collections.abc import Iterable

from fedmetanas_jax.config import MAY_CHANGE

AXES = ("round", "seconds", "macs", "bytes", "image_gradients")
MEASURES = ("server", "local")
EVENT = ("round", "before", "after", "ops_alive", "put_off")
DIGITS = 5  # significant ones that a picture needs


def drawn(runs: list[dict], groups: dict[str, dict[str, list[dict]]]) -> dict:
    """{"lines": [label], "charts": [{"head", "lines": [{"line": its place, "server": segments, "local": segments}]}],
    "events": [of each run]}. A line is a method and has its colour in every chart. groups: {head of a column: {label of
    a line: its runs}}."""
    names = dict.fromkeys(name for lines in groups.values() for name in lines)
    known = {name: place for place, name in enumerate(names)}
    charts = []
    for column, lines in groups.items():
        of = [{"line": known[name], **{one: segments(own, one) for one in MEASURES}} for name, own in lines.items()]
        charts.append({"head": column, "lines": of})
    events = [[[_short(event.get(name)) for name in EVENT] for event in run["events"]] for run in runs]
    return {"lines": [*names], "charts": charts, "events": events}


def lines(runs: list[dict], labels: dict[str, str]) -> dict[str, list[dict]]:
    """The runs of a column by the line they belong to. Those of a row are of one config but for the seed; where a row
    was asked for with several, as with another number of rounds, each is a line: the one of most runs is called as the
    row is, the others say in what they differ from it."""
    found: dict[str, list[dict]] = {}
    for row in dict.fromkeys(run["row"] for run in runs):
        variants: dict[str, list[dict]] = {}
        for run in runs:
            if run["row"] == row:
                variants.setdefault(json.dumps(_identity(run["config"]), sort_keys=True), []).append(run)
        main, *others = sorted(variants.values(), key=len, reverse=True)
        found.setdefault(labels.get(row, row), []).extend(main)
        was = _identity(main[0]["config"])
        for other in others:
            now = _identity(other[0]["config"])
            differ = (f"{name}={now.get(name)}" for name in was | now if was.get(name) != now.get(name))
            found.setdefault(", ".join([labels.get(row, row), *differ]), []).extend(other)
    return found


def _identity(config: dict) -> dict:
    fields = {name: value for name, value in config.items() if name not in MAY_CHANGE and name != "seed"}
    return fields | {f"options.{name}": value for name, value in (fields.pop("options", None) or {}).items()}


def segments(runs: list[dict], measure: str) -> list[dict]:
    """[{"seeds", "phase", "points": [[*AXES, mean, standard deviation of a sample, None of a single seed]]}].

    Points are the rounds at which every seed was measured: a mean over now these and now those seeds would jump. Where
    there is no such round, each seed is drawn by itself. What is trained anew, as by FedNAS, is a segment of its own.
    """
    measured = [(run["seed"], points) for run in runs if (points := dict(_points(run["curve"], measure)))]
    if not measured:
        return []
    common = set.intersection(*({*points} for _, points in measured))
    found = []
    for group in [measured] if common else [[one] for one in measured]:
        places = sorted(common or group[0][1])
        for phase in dict.fromkeys(phase for phase, _ in places):
            rows = [_mean([points[place] for _, points in group]) for place in places if place[0] == phase]
            found.append({"seeds": [seed for seed, _ in group], "phase": phase, "points": rows})
    return found


def _points(curve: dict, measure: str) -> Iterable[tuple[tuple[int, int], tuple]]:
    for phase, value, *axes in zip(*(curve[name] for name in ("phase", measure, *AXES)), strict=True):
        if value is not None:
            yield (phase, axes[0]), (*axes, value)


def _mean(points: list[tuple]) -> list[float | None]:
    *axes, values = zip(*points, strict=True)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return [*map(_short, map(statistics.fmean, axes)), _short(statistics.fmean(values)), _short(spread)]


def _short(value):
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    return int(value) if value == int(value) and abs(value) < 10**DIGITS else float(f"{value:.{DIGITS}g}")
