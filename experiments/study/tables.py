"""A table of a study as a document: what was asked for, what is finished of it, the paper's numbers beside."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fedmetanas_jax.files import write_json
from fedmetanas_jax.options import UsageError
from study import columns as column_names
from study import plan
from study.outcome import FIGURES, distinct, seconds_to_accuracy
from study.paper import TABLES, label
from study.plan import Run
from study.scales import SCALES
from study.statistics import paired, spread
from study.worker import Study

AGAINST = "fedmetanas"  # with which the other rows of a table are compared


class Request(NamedTuple):
    """What a table is to have."""

    number: int  # of the paper's table
    scale: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    seeds: tuple[int, ...]
    overrides: dict  # fields of Config, for all runs
    command: str

    def runs(self) -> dict[tuple[str, str, int], Run]:
        """The run of every cell and seed. UsageError names what cannot be."""
        where = ((row, column, seed) for column in self.columns for row in self.rows for seed in self.seeds)
        return {cell: plan.run(SCALES[self.scale], *cell, self.overrides) for cell in where}


def keep(study: Path, request: Request) -> None:
    """Notes that the study has this table, for reports."""
    write_json(study / "tables" / f"{request.number}.json", request._asdict())


def requests(study: Path) -> list[Request]:
    """The tables that were asked for. UsageError where there is no study, or a file is damaged."""
    found = []
    for path in sorted((study / "tables").glob("*.json")):
        try:
            plain = json.loads(path.read_text())
            plain |= {name: tuple(plain[name]) for name in ("rows", "columns", "seeds")}
            plain["overrides"] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in plain["overrides"].items()
            }
            found.append(Request(**plain))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({error}); without it the table is left out") from None
    if not found:
        raise UsageError(f"{study} is no study: tables.py makes one (tables/*.json)")
    return found


def documents(study: Path) -> list[dict]:
    """`document` of every table that was asked for."""
    return [document(Study(study), request) for request in requests(study)]


def document(study: Study, request: Request) -> dict:
    """A table: {"table", "title", "scale", "about", "overrides", "columns", "figures", "rows", "cells", "pairs",
    "command", "versions"}; accuracies as fractions of 1, the paper's and the differences from it in percent."""
    table, runs = TABLES[request.number], request.runs()
    outcomes = {cell: study.finished(run) for cell, run in runs.items()}
    cells, targets = [], {}
    for column in request.columns:
        means = [
            spread({seed: one["figures"]["server"] for seed in request.seeds if (one := outcomes[row, column, seed])})
            for row in request.rows
        ]
        targets[column] = min((found["mean"] for found in means if found), default=None)
        for row in request.rows:
            found = {seed: outcomes[row, column, seed] for seed in request.seeds}
            printed = table.paper.get(row, {}).get(column)
            cells.append({"row": row, "column": column} | _cell(found, printed, targets[column]))
    versions = [found["versions"] for found in outcomes.values() if found is not None]
    return {
        "table": request.number,
        "title": table.title,
        "scale": request.scale,
        "about": SCALES[request.scale].about,
        "overrides": request.overrides,
        "columns": [
            {"key": column, "head": column_names.head(column), "target": targets[column]} for column in request.columns
        ],
        "figures": list(table.figures),
        "rows": [{"row": row, "label": label(row)} for row in request.rows],
        "cells": cells,
        "pairs": list(_pairs(cells, request, table.figures[0])),
        "command": request.command,
        "versions": distinct(versions),
    }


def _cell(found: dict[int, dict | None], paper: dict | None, target: float | None) -> dict:
    """target: what every row of the column reaches in the end; time to it is known where every seed comes that far."""
    done = {seed: one["figures"] for seed, one in found.items() if one is not None}
    figures = {name: spread({seed: one[name] for seed, one in done.items()}) for name in FIGURES}
    reached = {seed: target and seconds_to_accuracy(found[seed]["curve"], target) for seed in done}
    figures["seconds_to_target"] = None if None in reached.values() else spread(reached)
    differs = {
        name: 100 * figures[name]["mean"] - printed
        for name, printed in (paper or {}).items()
        if name in FIGURES and figures[name] is not None
    }
    missing = [seed for seed in found if seed not in done]
    return {"seeds": [*done], "missing": missing, "figures": figures, "paper": paper, "difference": differs or None}


def _pairs(cells: list[dict], request: Request, figure: str) -> Iterable[dict]:
    """Every row against FedMetaNAS, column by column, by the table's accuracy."""
    against = AGAINST if AGAINST in request.rows else request.rows[0]
    values = {
        (cell["row"], cell["column"]): (cell["figures"][figure] or {"values": {}})["values"] for cell in cells
    }
    for column in request.columns:
        for row in request.rows:
            difference = paired(values[against, column], values[row, column]) if row != against else None
            if difference is not None:
                yield {"column": column, "figure": figure, "row": against, "against": row} | difference
