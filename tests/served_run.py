"""For the tests of networked runs: small federations, and how their runs are compared with simulated ones."""

import json
import os
from pathlib import Path

import numpy as np

COMMON = {
    "width": 2, "cells": 1, "nodes": 1, "train_size": 32, "test_size": 16, "rounds": 10, "epochs": 1,
    "checkpoint_every": 1, "eval_every": 5, "batch": 8, "block": 1, "at_once": 1, "devices": 1, "bn_eval": "running",
    "final_adapt": "false",
}  # fmt: skip
PRUNING = {
    "options.prune_from": 0.3, "options.prune_until": 0.5, "options.prune_events": 2, "options.prune_tolerance": "none",
}  # fmt: skip
# What SCAFFOLD trains here: every process of a run traces its network anew, which a MobileNetV3 makes long.
ONE_CELL = Path(__file__).parent / "one_cell.json"
METHODS = ["scaffold", "fedmetanas", *filter(None, os.environ.get("FEDMETANAS_TEST_METHODS", "").split(","))]
PATIENCE = "--deadline=600"  # who is missed would change the bits, however slow the machine is
# Of the records: what hangs on the clock, and what one side cannot know.
CLOCK = ("seconds", "compile_seconds", "event_stall_seconds", "compile_seconds_ahead")
SERVERS = ("taken", "names", "joined", "wire_up", "wire_down", "refused")
SIMULATIONS = ("local_accuracy",)


def fields(method: str, **changed) -> dict:
    """Of the Config, by name; methods that prune softly go through two events."""
    options = PRUNING if method in ("fedmetanas", "metafedpnas", "metaperfedrlnas") else {}
    options = {"network": str(ONE_CELL)} if method == "scaffold" else options
    return COMMON | {"method": method} | options | changed


def finished(workdir: Path, without: tuple[str, ...]) -> tuple[list[dict], dict]:
    """The records, without the clock and these fields, and every array of the network."""
    lines = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    records = [{name: x for name, x in line.items() if name not in (*CLOCK, *without)} for line in lines]
    with np.load(workdir / "network.npz") as file:
        return records, {name: file[name] for name in file.files}


def assert_simulated(served: Path, simulated: Path, *without: str) -> list[dict]:
    """The networked run is the simulated one to the bit, but for fields that it alone can have -> its records."""
    records, arrays = finished(served, (*SERVERS, *without))
    expected, weights = finished(simulated, SIMULATIONS)
    assert records == expected
    assert arrays.keys() == weights.keys()
    for name in weights:
        np.testing.assert_array_equal(arrays[name], weights[name], err_msg=name)
    return records
