"""A server and clients as processes of their own, over loopback with TLS: what happens to them changes no bit.

FEDMETANAS_TEST_CLIENTS=6 takes six client processes in place of three, FEDMETANAS_TEST_METHODS=fedprox,fednas these
methods as well.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
pytest.importorskip("cryptography", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")

from trial import Trial

CLIENTS = int(os.environ.get("FEDMETANAS_TEST_CLIENTS", "3"))
COMMON = {
    "width": 2, "cells": 1, "nodes": 1, "clients": CLIENTS, "cohort": CLIENTS - CLIENTS // 3, "train_size": 32,
    "test_size": 16, "rounds": 10, "epochs": 1, "checkpoint_every": 1, "eval_every": 5, "batch": 8, "block": 1,
    "at_once": 1, "bn_eval": "running", "final_adapt": "false",
}  # fmt: skip
PRUNING = {
    "options.prune_from": 0.3, "options.prune_until": 0.5, "options.prune_events": 2, "options.prune_tolerance": "none",
}  # fmt: skip
METHODS = ["scaffold", "fedmetanas", *filter(None, os.environ.get("FEDMETANAS_TEST_METHODS", "").split(","))]
PATIENCE = "--deadline=600"  # who is missed would change the bits, however slow the machine is
# Of the records: what hangs on the clock, and what one side cannot know.
CLOCK = ("seconds", "compile_seconds", "event_stall_seconds", "compile_seconds_ahead")
SERVERS = ("taken", "names", "joined", "wire_up", "wire_down", "refused")
SIMULATIONS = ("local_accuracy",)


def finished(workdir: Path, without: tuple[str, ...]) -> tuple[list[dict], dict]:
    lines = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    records = [{name: x for name, x in line.items() if name not in (*CLOCK, *without)} for line in lines]
    with np.load(workdir / "network.npz") as file:
        return records, {name: file[name] for name in file.files}


@pytest.mark.parametrize("method", METHODS)
def test_with_a_server_and_a_client_killed_it_is_the_simulated_run(method, tmp_path):
    options = PRUNING if method in ("fedmetanas", "metafedpnas", "metaperfedrlnas") else {}
    with Trial(tmp_path, COMMON | {"method": method} | options, CLIENTS) as trial:
        trial.finish("main", *trial.fields, f"--workdir={tmp_path / 'simulated'}")
        trial.make_shares()
        trial.serve(PATIENCE)
        for client in range(CLIENTS):
            trial.join(client)
        trial.until_round(2)
        trial.kill("server")
        trial.serve(PATIENCE)
        trial.until_round(5)
        trial.kill("client-1")
        trial.join(1)
        trial.until_done()
        assert "resuming after round " in trial.log("server")
        assert "client-1 is gone" in trial.log("server")
        assert "trying again in" in trial.log("client-0")
        assert not any("left_out" in line for line in trial.records())
        (records, arrays), (expected, weights) = (
            finished(trial.workdir, SERVERS), finished(tmp_path / "simulated", SIMULATIONS)
        )  # fmt: skip
    assert records == expected
    assert arrays.keys() == weights.keys()
    for name in weights:
        np.testing.assert_array_equal(arrays[name], weights[name], err_msg=name)
