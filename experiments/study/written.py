"""A table's document as Markdown, and as CSV with a line for every measured number."""

import csv
import io

from quality.tables import percent, table

from study.outcome import FIGURES
from study.page_text import head, overridden
from study.paper import TABLES

SECONDS = ("seconds", "seconds_compiling", "seconds_to_accuracy", "seconds_to_target")
OVER_CLIENTS = {"server": "local_std", "own": "own_std", "local": "local_std"}


def markdown(document: dict) -> str:
    """A part for every column; accuracies in percent, mean ± standard deviation over the seeds."""
    parts = [f"# Table {document['table']}. {document['title']}", document["about"]]
    if document["overrides"]:
        parts.append(f"**In these runs, other than said above: {overridden(document)}.**")
    for column in document["columns"]:
        cells = [cell for cell in document["cells"] if cell["column"] == column["key"]]
        parts += [f"## {column['head']}", table(*_rows(document, cells))]
    parts += _differences(document)
    parts += [
        "Accuracies in percent, ± standard deviation over seeds; drops in points. The paper's ± is probably the spread "
        "over clients, which stands apart here. Seconds are those in rounds, compiling apart; seconds to accuracy: "
        "until the mean of the last 20 rounds' evaluations comes within half a point of its final value (D-39), or to "
        "the mean final accuracy of the weakest method, where all seeds come that far. "
        '"-": there is no such figure, or no run of it is finished.',
        *_machines(document),
        f"`{document['command']}`",
    ]
    return "\n\n".join(parts) + "\n"


def _rows(document: dict, cells: list[dict]) -> tuple[list[str], list[list[str]]]:
    shown = document["figures"]
    paper = [name for name in shown if any(name in (cell["paper"] or {}) for cell in cells)]
    hours = any("hours" in (cell["paper"] or {}) for cell in cells)
    heads = ["method", "seeds", *(head(name) for name in shown), "± over clients", "seconds", "compiling"]
    target = next(column["target"] for column in document["columns"] if column["key"] == cells[0]["column"])
    heads += ["seconds to accuracy", f"to {percent(target)} %"]
    heads += ["image-gradients", "10^9 multiply-adds", "MB sent", "weights"]
    for name in paper:
        heads += [f"paper: {head(name)}", "ours less the paper's"]
    heads += ["paper: hours"] if hours else []
    labels = {row["row"]: row["label"] for row in document["rows"]}
    rows = []
    for cell in cells:
        figures, printed, differs = cell["figures"], cell["paper"] or {}, cell["difference"] or {}
        asked = len(cell["seeds"]) + len(cell["missing"])
        row = [labels[cell["row"]], f"{len(cell['seeds'])} of {asked}", *(_accuracy(figures[name]) for name in shown)]
        over = figures.get(OVER_CLIENTS.get(shown[0], ""))
        row += [percent(over and over["mean"]), *(_number(figures[name], ".0f") for name in SECONDS)]
        row += [_number(figures["image_gradients"], ".3g"), _number(figures["macs"], ".3g", 1e9)]
        row += [_number(figures["bytes"], ".3g", 1e6), _number(figures["parameters"], ",.0f")]
        for name in paper:
            std = f" ± {printed['std']:.2f}" if "std" in printed and name in printed else ""
            row += [f"{printed[name]:.2f}{std}" if name in printed else "-"]
            row += [f"{differs[name]:+.1f}" if name in differs else "-"]
        row += [f"{printed['hours']:g}" if "hours" in printed else "-"] if hours else []
        rows.append(row)
    return heads, rows


def _accuracy(found: dict | None) -> str:
    if found is None:
        return "-"
    return percent(found["mean"]) + ("" if found["std"] is None else f" ± {percent(found['std'])}")


def _number(found: dict | None, form: str, unit: float = 1.0) -> str:
    return "-" if found is None else format(found["mean"] / unit, form)


def _differences(document: dict) -> list[str]:
    if not document["pairs"]:
        return []
    labels = {row["row"]: row["label"] for row in document["rows"]}
    heads = {column["key"]: column["head"] for column in document["columns"]}
    figure = head(document["pairs"][0]["figure"])
    rows = [
        [
            heads[pair["column"]], f"{labels[pair['row']]} less {labels[pair['against']]}", str(pair["n"]),
            f"{100 * pair['mean']:+.1f}", _interval(pair), pair["verdict"],
        ]
        for pair in document["pairs"]
    ]  # fmt: skip
    columns = ["split", "difference", "seeds", f"{figure}, points", "95 % of bootstrap resamples", "verdict"]
    return [
        "## Differences, seeds paired",
        table(columns, rows),
        "Called better or worse only where the interval excludes zero and there are five seeds or more. Of five seeds "
        "such an interval is somewhat narrower than 95 %.",
    ]


def _interval(pair: dict) -> str:
    return "-" if pair["low"] is None else f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"


def _machines(document: dict) -> list[str]:
    said = ["{device} x {devices}, {cpus} CPUs, Python {python}, jax {jax}".format_map(v) for v in document["versions"]]
    return ["; ".join(dict.fromkeys(said)) + "."] if said else []


def text_csv(document: dict) -> str:
    """table, split, method, seed, figure, value; accuracies as fractions of 1. The paper's numbers have the seed
    "paper" and are in percent, as printed."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["table", "split", "method", "seed", "figure", "value"])
    for cell in document["cells"]:
        where = [document["table"], cell["column"], cell["row"]]
        for name in FIGURES:
            for seed, value in ((cell["figures"][name] or {}).get("values") or {}).items():
                lines.writerow([*where, seed, name, value])
        lines.writerows([*where, "paper", name, value] for name, value in (cell["paper"] or {}).items())
    return out.getvalue()


def title(number: int) -> str:
    """What a table is about, for lists."""
    return f"{number}  {TABLES[number].title}"
