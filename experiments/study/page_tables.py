"""The tables of a study on its page: what was measured, the paper's numbers beside, and the paired differences."""

from study.page_text import (
    ACCURACIES,
    COSTS,
    NOTHING,
    details,
    element,
    escape,
    head,
    number,
    overridden,
    quantity,
    scrolling,
    seeds,
    signed,
    table,
)  # fmt: skip

VERDICTS = {"better": "▲", "worse": "▼", "open": "○", "too few seeds": "·"}
PAIRED = (
    "Both methods of a difference had the same splits and the same cohorts, seed by seed. 95 % of bootstrap resamples "
    "of the seeds lie in the interval. Better or worse is said only where it excludes zero and there are five seeds."
)
FEW = 12  # so many differences stand open
WIDE, HIGH = 160, 18  # of the picture of an interval


def sections(documents: list[dict]) -> str:
    """A section for every table document."""
    return "".join(map(_section, documents))


def _section(document: dict) -> str:
    name = f"Table {document['table']}"
    title = element("h3", escape(f"{name}. {document['title']}"))
    said = f"Scale {document['scale']}: {document['about']}"
    if document["overrides"]:
        said += f" In these runs, other than said here: {overridden(document)}."
    about = element("p", escape(said), class_="about")
    costs = details("What it cost", _grid(document, list(COSTS), f"{name}, costs", paper=False))
    command = element("p", "Made by ", element("code", escape(document["command"])), class_="command")
    main = _grid(document, document["figures"], name, paper=True)
    return element("section", title, about, main, _pairs(document), costs, command, id=f"table-{document['table']}")


def _grid(document: dict, figures: list[str], label: str, paper: bool) -> str:
    """Methods down; columns, and in each its figures, across."""
    cells = {(cell["row"], cell["column"]): cell for cell in document["cells"]}
    top = [element("th", "method", scope="col", rowspan="2")]
    low, rows = [], []
    for column in document["columns"]:
        top.append(element("th", escape(column["head"]), scope="colgroup", colspan=len(figures) + 1, class_="group"))
        low.append(element("th", "seeds", scope="col", class_="first"))
        low += [element("th", escape(head(figure)), scope="col") for figure in figures]
    for row in document["rows"]:
        line = [element("th", escape(row["label"]), scope="row")]
        for column in document["columns"]:
            cell = cells.get((row["row"], column["key"]))
            line.append(_seeds(cell))
            line += [_cell(cell, figure, paper) for figure in figures]
        rows.append(element("tr", *line))
    heads = element("thead", element("tr", *top), element("tr", *low))
    return scrolling(label, element("table", heads, element("tbody", *rows), class_="grid"))


def _seeds(cell: dict | None) -> str:
    if cell is None:
        return element("td", NOTHING, class_="first")
    there, missing = len(cell["seeds"]), cell["missing"]
    said = f"{there} of {there + len(missing)}" if missing else str(there)
    tip = seeds(cell["seeds"]) if there else "nothing is finished"
    tip += f"; missing: {', '.join(map(str, missing))}" if missing else ""
    return element("td", _tip(said, tip, stop=True), class_="first part" if missing else "first")


def _tip(said: str, tip: str, stop: bool = False) -> str:
    """Text with more to say, to the mouse, the finger and, by title, without any script. stop: also where the keyboard
    stops; not at every number, for those of each seed are with the runs."""
    return element("span", escape(said), title=tip, tabindex="0" if stop else None, class_="tip")


def _cell(cell: dict | None, figure: str, paper: bool) -> str:
    found = (cell or {"figures": {}})["figures"].get(figure)
    said = NOTHING
    if found is not None:
        said = number(figure, found["mean"]) + ("" if found["std"] is None else f" ± {number(figure, found['std'])}")
        said = _tip(said, "; ".join(f"seed {seed}: {number(figure, value)}" for seed, value in found["values"].items()))
    return element("td", said, _printed(cell, figure) if paper else "")


def _printed(cell: dict | None, figure: str) -> str:
    """The paper's number, and by how many points ours is more."""
    printed = (cell or {}).get("paper") or {}
    if figure not in printed:
        return ""
    said = f"paper {printed[figure]:.2f}" + (f" ± {printed['std']:.2f}" if "std" in printed else "")
    differs = (cell.get("difference") or {}).get(figure)
    more = [f"ours {signed(differs)}"] if differs is not None else []
    more += [f"paper {printed['hours']:g} h"] if "hours" in printed else []
    return "".join(element("small", escape(line)) for line in (said, "; ".join(more)) if line)


def _pairs(document: dict) -> str:
    pairs = document["pairs"]
    if not pairs:
        return ""
    names = {row["row"]: row["label"] for row in document["rows"]}
    names |= {column["key"]: column["head"] for column in document["columns"]}
    names |= {pair["figure"]: head(pair["figure"]) for pair in pairs}
    split = [key for key in ("column", "figure") if len({pair[key] for pair in pairs}) > 1]  # else in the summary
    ends = [pair[end] for pair in pairs for end in ("mean", "low", "high") if pair[end] is not None]
    scale = max([0.001, *map(abs, ends)])
    rows = []
    for pair in pairs:
        name = {key: escape(names.get(pair[key], pair[key])) for key in ("row", "against", "column", "figure")}
        ends = [pair["low"], pair["high"]]
        interval = NOTHING if None in ends else " to ".join(_points(pair["figure"], end) for end in ends)
        verdict = f"{VERDICTS.get(pair['verdict'], '')} {pair['verdict']}"
        rows.append([
            f"{name['row']} less {name['against']}", *(name[key] for key in split), str(pair["n"]),
            _points(pair["figure"], pair["mean"]), interval, _interval(pair, scale),
            element("span", escape(verdict), class_=f"verdict {_kind(pair)}"),
        ])  # fmt: skip
    heads = ["difference", *split, "seeds", "points", "95 % interval", "around zero", "verdict"]
    what = "" if "figure" in split else f" ({names[pairs[0]['figure']]})"
    note = element("p", escape(PAIRED), class_="note")
    grid = table(f"Table {document['table']}, differences", heads, rows)
    return details(escape(f"Differences{what}, seeds paired: {len(pairs)}"), note, grid, open=len(pairs) <= FEW)


def _kind(pair: dict) -> str:
    return pair["verdict"] if pair["verdict"] in ("better", "worse") else "open"


def _points(figure: str, value: float) -> str:
    return signed(100 * value) if figure in ACCURACIES else quantity(value, COSTS.get(figure, ("", ""))[1])


def _interval(pair: dict, scale: float) -> str:
    """The interval as a bar across zero; all of a table's on one scale."""

    def x(value: float) -> float:
        return round(WIDE / 2 + value / scale * (WIDE / 2 - 6), 1)

    bar = ""
    if None not in (pair["low"], pair["high"]):
        bar = f'<line x1="{x(pair["low"])}" x2="{x(pair["high"])}" y1="9" y2="9" class="bar"/>'
    dot = f'<circle cx="{x(pair["mean"])}" cy="9" r="4"/>'
    zero = f'<line x1="{WIDE / 2}" x2="{WIDE / 2}" y1="0" y2="{HIGH}" class="zero"/>'
    about = f'class="interval {_kind(pair)}" width="{WIDE}" height="{HIGH}" aria-hidden="true"'
    return f"<svg {about}>{zero}{bar}{dot}</svg>"
