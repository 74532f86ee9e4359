"""All pictures of a run that are drawn from its records alone, so that a resumed run has the same ones."""

from pathlib import Path

import numpy as np

from fedmetanas_jax.core import Graph
from fedmetanas_jax.engine import curves
from fedmetanas_jax.nas import animation, heatmap


def draw(records: list[dict], graph: Graph | None, workdir: Path, title: str) -> None:
    """Leaves curves.png and, of a search of `graph`, search.png and, once its weights were recorded, alphas.png and
    cells.gif. None: the run does not search.

    ValueError: the records hold no number, or weights of another graph.
    """
    curves.draw(records, workdir / "curves.png", title)
    if graph is None:
        return
    curves.draw_search(records, workdir / "search.png", title)
    known = [record for record in records if "mix" in record]
    if known:
        mix = [record["mix"] for record in known]
        heatmap.draw(graph, [record["round"] for record in known], mix, workdir / "alphas.png", title)
        captions = [caption(record) for record in known]
        animation.draw(graph, mix, captions, workdir / "cells.gif", title)


def caption(record: dict) -> str:
    """'round 58, prune' and, in the next line, '8 operations on 8 edges, server accuracy 84.1%', as much of it as the
    record says."""
    alive = np.asarray(record["mix"]) > 0
    event = f", {record['event']}" if record.get("event") else ""
    accuracy = record.get("event_accuracy_after", record.get("server_accuracy"))
    known = "" if accuracy is None else f", server accuracy {accuracy:.1%}"
    return f"round {record['round']}{event}\n{alive.sum()} operations on {alive.any(-1).sum()} edges{known}"
