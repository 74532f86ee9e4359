"""A finished run as the figures that tables, pictures and the page show of it."""

import json
from collections.abc import Iterable
from pathlib import Path

from fedmetanas_jax.config import MAY_CHANGE, from_dict, to_dict
from fedmetanas_jax.engine import records
from fedmetanas_jax.engine.identity import fixed
from fedmetanas_jax.files import to_json
from fedmetanas_jax.options import UsageError
from study.plan import Run

# Every figure a run has: its place in result.json, or None where `outcome` finds it.
FIGURES = {
    "server": "server_accuracy",
    "local": "local_accuracy.mean",
    "local_std": "local_accuracy.std",
    "own": "local_accuracy_adapted.mean",
    "own_std": "local_accuracy_adapted.std",
    "majority": "majority_class_local_accuracy",
    "before": None,  # server accuracy right before the network became discrete
    "after": None,  # and right after it, without retraining
    "prune_drop": None,  # all that pruning cost: the sum over its events
    "largest_drop": None,  # the most that one event cost
    "cut_at_once": None,  # what one cut of the whole supernet would have cost, when it was last evaluated uncut
    "seconds": "seconds_in_rounds",
    "seconds_compiling": "seconds_compiling",
    "image_gradients": "image_gradients",
    "macs": "macs",
    "bytes": None,  # sent, up and down
    "parameters": "network_parameters",
    "seconds_to_accuracy": None,
}
WITHIN, WINDOW = 0.005, 20  # D-39: half a point, 20 rounds


def outcome(run: Run, workdir: Path) -> dict | None:
    """The figures of a run that is finished, None of one that is not. UsageError where its files are damaged.

    {"name", "row", "column", "seed", "figures": {name of FIGURES: number or None}, "curve", "events", "genotype",
    "config", "versions"}.
    """
    if not (workdir / "result.json").exists():
        return None
    try:
        known = json.loads((workdir / "config.json").read_text())
        result = json.loads((workdir / "result.json").read_text())
        lines = records.read(workdir / records.RECORDS)
        same = fixed(known["config"], MAY_CHANGE) == fixed(json.loads(to_json(to_dict(run.config))), MAY_CHANGE)
        if not same:
            raise ValueError("it is of another config")
        if [line["round"] for line in lines] != list(range(1, from_dict(known["config"]).rounds + 1)):
            raise ValueError(f"{records.RECORDS} does not have every round once")
        if result.get("records_sha256", records.digest(lines)) != records.digest(lines):  # older runs have none
            raise ValueError(f"{records.RECORDS} was altered after the run")
        figures = {name: _at(result, place) for name, place in FIGURES.items()}
        figures |= pruning(result, lines) | {"bytes": result["bytes_up"] + result["bytes_down"]}
        found = curve(lines)
        figures["seconds_to_accuracy"] = seconds_to_accuracy(found)
        genotype = workdir / "genotype.json"
        return {
            "name": run.name,
            "row": run.row,
            "column": run.column,
            "seed": run.config.seed,
            "figures": figures,
            "curve": found,
            "events": events(lines),
            "genotype": json.loads(genotype.read_text()) if genotype.exists() else None,
            "config": known["config"],
            "versions": result["versions"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, records.WorkdirError) as error:
        raise UsageError(f"{workdir} is damaged: {error}") from None


def _at(result: dict, place: str | None):
    for name in place.split(".") if place else ():
        result = None if result is None else result.get(name)
    return result if place else None


def curve(lines: list[dict]) -> dict[str, list]:
    """What was measured at each evaluation, and what the rounds up to it had cost. A value that was not measured is
    None. "phase" tells apart what was trained anew (FedNAS)."""
    names = ("round", "phase", "server", "local", "seconds", "image_gradients", "macs", "bytes")
    found: dict[str, list] = {name: [] for name in names}
    spent = dict.fromkeys(("seconds", "image_gradients", "macs", "bytes"), 0.0)
    phase = 0
    for line in lines:
        for name in ("seconds", "image_gradients", "macs"):
            spent[name] += line[name]
        spent["bytes"] += line["bytes_up"] + line["bytes_down"]
        local = line.get("local_accuracy")
        if local is not None or "server_accuracy" in line:
            row = {"round": line["round"], "phase": phase, "server": line.get("server_accuracy")}
            row |= {"local": local and local["mean"]} | spent
            for name in names:
                found[name].append(row[name])
        phase += "ended" in line
    return found


def events(lines: list[dict]) -> list[dict]:
    """The prune events: round, server accuracy before and after, operations alive before; those put off have
    "put_off"."""
    found = []
    for line in lines:
        if "event" in line and line.get("event_accuracy_after") is not None:
            row = {"round": line["round"], "ops_alive": line.get("event_ops_alive"), "put_off": False}
            found.append(row | {name: line[f"event_accuracy_{name}"] for name in ("before", "after")})
        elif "event_put_off" in line:
            found.append({"round": line["round"], "ops_alive": line.get("ops_alive"), "put_off": True})
    return found


def pruning(result: dict, lines: list[dict]) -> dict[str, float | None]:
    """Table 3 of a run. Of FedNAS: its supernet, cut at once. Of a search that prunes little by little: the last event,
    the sum and the largest drop of all of them, and what cutting at once would have cost: server accuracy less that of
    the network of the best pairs and operations, at the last evaluation before the first event."""
    if search := result.get("search"):
        before, after = search.get("server_accuracy"), search.get("server_accuracy_discrete")
        drop = None if None in (before, after) else before - after
        return {"before": before, "after": after, "prune_drop": drop, "largest_drop": drop, "cut_at_once": drop}
    done = [event for event in events(lines) if not event["put_off"] and event["before"] is not None]
    if not done:
        return {}
    drops = [event["before"] - event["after"] for event in done]
    uncut = [line for line in lines if line["round"] <= done[0]["round"] and "server_accuracy_discrete" in line]
    cut = uncut[-1]["server_accuracy"] - uncut[-1]["server_accuracy_discrete"] if uncut else None
    last = {"before": done[-1]["before"], "after": done[-1]["after"]}
    return last | {"prune_drop": sum(drops), "largest_drop": max(drops), "cut_at_once": cut}


def seconds_to_accuracy(curve: dict[str, list], target: float | None = None) -> float | None:
    """Seconds in rounds until the mean of the evaluations of the last 20 rounds comes within half a point of what it
    is in the end (D-39), or to the target. None where it never does. Of a method that trains anew, within its last
    training."""
    last = max(curve["phase"], default=0)
    points = [
        (number, accuracy, seconds)
        for number, phase, accuracy, seconds in zip(
            *(curve[name] for name in ("round", "phase", "server", "seconds")), strict=True
        )
        if accuracy is not None and phase == last
    ]
    means = []
    for number, _, seconds in points:
        near = [accuracy for other, accuracy, _ in points if number - WINDOW < other <= number]
        means.append((sum(near) / len(near), seconds))
    wanted = target if target is not None or not means else means[-1][0] - WITHIN
    return next((seconds for mean, seconds in means if mean >= wanted), None)


def distinct(versions: Iterable[dict]) -> list[dict]:
    """The versions and hardware that runs had, each once: a table may be written by another machine than made them."""
    return [json.loads(text) for text in sorted({json.dumps(one, sort_keys=True) for one in versions})]
