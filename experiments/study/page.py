"""The page of a study: one file that needs no network, with its tables, curves, prune events, cells and runs.

What is drawn, page.js draws of the JSON in the page; without any script the tables, pictures and runs are there.
"""

import json
from pathlib import Path

from fedmetanas_jax.files import to_json
from study import columns, page_curves, page_pictures, page_tables
from study.page_text import ACCURACIES, COSTS, details, element, escape, head, number, table
from study.paper import label

HERE = Path(__file__).parent
LARGEST = 4_800_000  # bytes of the page, if pictures can keep it below
# Whatever a name in a study says, nothing is ever loaded from anywhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
NO_SCRIPT = "The curves and prune events are drawn by a script, which is off here; all else is on the page without it."
EMPTY = "No run is finished yet."
CURVES = (
    "The mean over the seeds, with a band of one standard deviation. A point is a round at which every seed was "
    "measured; where there is none, each seed has a line of its own. What is trained anew, as the network that FedNAS "
    "finds, is a line of its own. Costs are those of all rounds so far, of all clients; seconds are comparable only "
    "where the runs had the same machine. Arrow keys walk along the lines of a chart that has the focus."
)
EVENTS = "Each prune event: accuracy on the server's test images right before and right after, and operations alive."
CELLS = f"The cells that the searches found; of a method's seeds in a column the first {page_pictures.SEEDS}."
SPLITS = f"Training images of each class that each client has, of the first {page_pictures.SEEDS} seeds of a column."
SHORT = ("server", "local", "own")  # what the list of runs has of each
RUNS = "Every finished run: its figures, its config, and where it lies."


def html(title: str, tables: list[dict], runs: list[dict], facts: dict) -> str:
    """The page. tables: as tables.documents has them; runs: outcomes, with their "workdir"; facts: {"command", "made",
    "versions", "counts": {"done", "failed", "left"}}."""
    labels = {row["row"]: row["label"] for document in tables for row in document["rows"]}
    heads = {column["key"]: column["head"] for document in tables for column in document["columns"]}
    for run in runs:
        if run["row"] not in labels:  # a table that is not there any more
            labels[run["row"]] = label(run["row"])
        heads.setdefault(run["column"], columns.head(run["column"]))
    runs = sorted(runs, key=lambda run: ([*heads].index(run["column"]), [*labels].index(run["row"]), run["seed"]))
    groups = {
        heads[column]: page_curves.lines([run for run in runs if run["column"] == column], labels)
        for column in dict.fromkeys(run["column"] for run in runs)
    }
    data = _json(page_curves.drawn(runs, groups))
    made = {"tables": page_tables.sections(tables), "events": _events(runs, labels, heads)}
    made |= {"runs": _runs(runs, labels, heads), "versions": _versions(runs, facts)}
    pictures = page_pictures.Pictures(groups, LARGEST - len(data) - sum(map(len, made.values())))
    said = CELLS + (f" {pictures.left_out} pictures had no room on the page." if pictures.left_out else "")
    parts = [
        ("tables", "Tables", "", made["tables"]),
        ("curves", "Learning curves", CURVES, element("div", id="charts") if runs else ""),
        ("events", "Prune events", EVENTS, made["events"]),
        ("cells", "Cells found", said, pictures.cells),
        ("splits", "How the data were split", SPLITS, pictures.splits),
        ("runs", "Runs", RUNS, made["runs"]),
        ("versions", "Versions and hardware", "", made["versions"]),
    ]
    parts = [part for part in parts if part[-1]]
    links = element("nav", *(element("a", name, href=f"#{key}") for key, name, *_ in parts), aria_label="Parts")
    body = [
        element("header", element("h1", escape(title)), _counts(facts["counts"]), links),
        element("noscript", element("p", NO_SCRIPT, class_="warning")),
        "" if runs else element("p", EMPTY, class_="warning"),
        *(_part(*part) for part in parts),
        _footer(facts),
        element("div", id="tip", role="status", aria_live="polite", hidden=True),
        element("script", data, type="application/json", id="data"),
        element("script", _file("page.js")),
    ]
    top = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", escape(title)),
        element("link", rel="icon", href="data:,"),
        element("style", _file("page.css")),
    ]
    return "<!doctype html>\n" + element("html", element("head", *top), element("body", *body), lang="en") + "\n"


def _part(key: str, name: str, about: str, inside: str) -> str:
    said = element("p", escape(about), class_="note") if about else ""
    return element("section", element("h2", name), said, inside, id=key)


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _json(value) -> str:
    """JSON that ends no script element and begins no comment."""
    return to_json(value).replace("<", "\\u003c")


def _counts(counts: dict) -> str:
    said = (f"{counts[name]} {word}" for name, word in (("done", "done"), ("failed", "failed"), ("left", "left")))
    return element("p", "Runs: ", ", ".join(said), class_="counts")


def _events(runs: list[dict], labels: dict[str, str], heads: dict[str, str]) -> str:
    """A place for the events of each run that has any; the script fills it when it is opened."""
    parts, column = [], None
    for place, run in enumerate(runs):
        if run["events"]:
            if run["column"] != column:
                column = run["column"]
                parts.append(element("h3", escape(heads[column])))
            parts.append(details(escape(_of_events(run, labels)), data_run=str(place)))
    return "".join(parts)


def _of_events(run: dict, labels: dict[str, str]) -> str:
    done = [event for event in run["events"] if not event["put_off"]]
    drops = [event["before"] - event["after"] for event in done if None not in (event["before"], event["after"])]
    said = f"{labels[run['row']]}, seed {run['seed']}: {len(done)} event{'s' * (len(done) != 1)}"
    said += f", {len(run['events']) - len(done)} put off" if len(done) < len(run["events"]) else ""
    return said + (f", largest loss {max(0.0, *drops) * 100:.1f} points" if drops else "")


def _runs(runs: list[dict], labels: dict[str, str], heads: dict[str, str]) -> str:
    parts, column = [], None
    for run in runs:
        if run["column"] != column:
            column = run["column"]
            parts.append(element("h3", escape(heads[column])))
        known = {name: run["figures"].get(name) for name in (*ACCURACIES, *COSTS)}
        shown = ((name, number(name, value)) for name, value in known.items() if value is not None)
        rows = [[escape(head(name)), text + " %" * (name in ACCURACIES)] for name, text in shown]
        short = [f"{name} {number(name, known[name])} %" for name in SHORT if known[name] is not None]
        summary = f"{labels[run['row']]}, seed {run['seed']}" + (f": {', '.join(short)}" if short else "")
        config = element("pre", escape(json.dumps(run["config"], indent=2)))
        place = element("p", "In ", element("code", escape(run["workdir"])), class_="command")
        figures = table(f"Figures of {run['name']}", ["figure", "value"], rows)
        parts.append(details(escape(summary), figures, config, place))
    return "".join(parts)


def _versions(runs: list[dict], facts: dict) -> str:
    """Every set of versions and hardware that runs had, with how many had it; and those that made the page."""
    sets: dict[str, int] = {}
    for run in runs:
        text = json.dumps(run["versions"], sort_keys=True)
        sets[text] = sets.get(text, 0) + 1
    found = [(f"{count} run{'s' * (count != 1)}", json.loads(text)) for text, count in sets.items()]
    found.append(("this page", facts["versions"]))
    names = dict.fromkeys(name for _, versions in found for name in versions)
    rows = [[escape(name), *(escape(str(versions.get(name, "-"))) for _, versions in found)] for name in names]
    return table("Versions", ["", *(escape(who) for who, _ in found)], rows) if rows else ""


def _footer(facts: dict) -> str:
    return element(
        "footer", element("p", "Made ", escape(facts["made"]), " by ", element("code", escape(facts["command"])))
    )
