"""A run that is killed, stopped, damaged or poisoned, through the command line and with real signals.

The runs are of the smallest search there is: one cell of one node. Their programs are compiled once and come
from the compilation cache afterwards. FEDMETANAS_TEST_KILLS=20 kills that often in place of three times.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

MAIN = Path(__file__).parents[1] / "experiments/main.py"
TINY = {
    "width": 2, "cells": 1, "nodes": 1, "clients": 4, "cohort": 2, "train_size": 32, "test_size": 16, "rounds": 12,
    "epochs": 1, "checkpoint_every": 2, "eval_every": 4, "batch": 8, "block": 2, "at_once": 1,
    "options.prune_from": 0.3, "options.prune_until": 0.5, "options.prune_events": 2, "options.prune_tolerance": "none",
}  # fmt: skip
KILLS = int(os.environ.get("FEDMETANAS_TEST_KILLS", "3"))  # two of them inside an event
INSIDE = """
import os, runpy, signal, sys
from fedmetanas_jax.engine import measure

survived, event = int(sys.argv.pop(1)), measure.event


def killed(*given):
    global survived
    if survived == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    survived -= 1
    return event(*given)


measure.event = killed
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(workdir: Path, *more: str, of: dict = TINY, **changed) -> list[str]:
    fields = [f"--config.{name}={value}" for name, value in (of | changed).items()]
    return [sys.executable, str(MAIN), f"--workdir={workdir}", *fields, *more]


def run(workdir: Path, *more: str, **changed) -> subprocess.CompletedProcess:
    return subprocess.run(command(workdir, *more, **changed), capture_output=True, text=True, timeout=900)


def finished(workdir: Path) -> tuple[list[dict], dict]:
    """What a run found out: its records without the clock, and every array of its network."""
    lines = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    clock = ("seconds", "compile_seconds", "event_stall_seconds", "compile_seconds_ahead")
    records = [{name: x for name, x in line.items() if name not in clock} for line in lines]
    with np.load(workdir / "network.npz") as file:
        return records, {name: file[name] for name in file.files}


def assert_same(one: Path, other: Path):
    for picture in ("curves.png", "search.png", "alphas.png", "cells.gif"):
        assert (one / picture).read_bytes() == (other / picture).read_bytes()
    (records, arrays), (expected, weights) = finished(one), finished(other)
    assert records == expected
    assert arrays.keys() == weights.keys()
    for name in weights:
        np.testing.assert_array_equal(arrays[name], weights[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def paused(unbroken, tmp_path_factory) -> Path:
    """A run that was asked to stop after round 7, to be copied before it goes on."""
    workdir = tmp_path_factory.mktemp("paused") / "run"
    done = run(workdir, "--stop_after=7")
    assert done.returncode == 0, done.stderr
    assert "stopped after round 7 of 12; to go on: " in done.stdout
    return workdir


def test_what_a_run_leaves(unbroken):
    records, _ = finished(unbroken)
    assert [line["round"] for line in records] == list(range(1, 13))
    assert [line["round"] for line in records if line.get("event") == "prune"] == [4, 6]
    assert [line["round"] for line in records if "server_accuracy" in line] == [1, 4, 8, 12]
    assert records[-1]["server_accuracy"] == records[-1]["server_accuracy_discrete"]
    assert records[-1]["ops_alive"] == 4  # two edges of one node, in both cell types
    assert records[-1]["bytes_up"] < records[0]["bytes_up"]
    assert records[-1]["macs"] < records[0]["macs"]
    assert set(records[-1]["local_accuracy_adapted"]) == {"mean", "std", "worst_tenth"}
    left = {path.name for path in unbroken.iterdir()}
    assert left >= {
        "config.json", "partition.json", "partition.png", "records.jsonl", "checkpoints", "curves.png",
        "search.png", "alphas.png", "cells.gif", "genotype.json", "genotype.txt", "cells.png", "network.npz",
        "result.json",
    }  # fmt: skip
    result = json.loads((unbroken / "result.json").read_text())
    assert result["server_accuracy"] == pytest.approx(result["network_accuracy"], abs=1e-6)
    assert result["network_largest_loss_difference"] < 1e-4
    assert result["versions"]["jax"]


def test_the_network_is_usable_in_three_lines(unbroken):
    from fedmetanas_jax.data.sources import load as load_data
    from fedmetanas_jax.network import load

    images = load_data("digits", Path("unused")).test_images
    network = load(unbroken / "network.npz")
    labels = network.predict(images)
    assert labels.shape == (360,)
    right = np.mean(labels == load_data("digits", Path("unused")).test_labels)
    assert right == pytest.approx(finished(unbroken)[0][-1]["server_accuracy"], abs=1e-6)


def kill_at(workdir: Path, delay: float, *, of_rounds: bool) -> bool:
    """Starts the run and kills it `delay` seconds after its start, or after its first round -> was it in time?"""
    process = subprocess.Popen(command(workdir), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while of_rounds and (line := process.stdout.readline()) and not line.startswith("round "):
        pass
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.kill()  # SIGKILL
    process.communicate()
    return process.returncode == -signal.SIGKILL


def test_kill_9_at_random_moments_changes_nothing(unbroken, tmp_path):
    """KILLS kills: most among the rounds, where checkpoints and records are written, some on the way there, and two in
    events, between the change of the server and its record."""
    for survived in range(2):  # the first event is done again, for its round was not saved; the second one kills
        start, inside = time.monotonic(), [sys.executable, "-c", INSIDE, str(survived), *command(tmp_path / "run")[1:]]
        assert subprocess.run(inside, capture_output=True, timeout=900).returncode == -signal.SIGKILL
        seen = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
        assert sum("event" in line for line in seen) == survived
    seconds = time.monotonic() - start  # of the second one, whose programs are in the cache
    moments = random.Random(0)
    killed = finished_first = 0
    while killed < KILLS - 2:
        assert finished_first < KILLS, "too fast to be killed"
        among_rounds = killed % 4 != 0
        delay = moments.uniform(0, 2.0 if among_rounds else 0.7 * seconds)
        if kill_at(tmp_path / "run", delay, of_rounds=among_rounds):
            killed += 1
        else:  # finished before it could be killed: once more from the beginning
            assert_same(tmp_path / "run", unbroken)
            (tmp_path / "run").rename(tmp_path / f"finished {finished_first}")
            finished_first += 1
    done = run(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", unbroken)


# What runs in a shell's background, under nohup or under pytest-xdist is deaf to signals, and so would the child be.
def test_a_pause_and_a_damaged_checkpoint_change_nothing(unbroken, paused, tmp_path):
    shutil.copytree(paused, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "7"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    done = run(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "checkpoint 7 is damaged" in done.stdout
    assert "using checkpoint 6" in done.stdout
    assert_same(tmp_path / "run", unbroken)


def test_another_config_is_refused(unbroken):
    before = (unbroken / "records.jsonl").read_bytes()
    done = run(unbroken, seed=9)
    assert done.returncode == 1
    assert "seed was 1, is 9" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (unbroken / "records.jsonl").read_bytes() == before


def test_what_says_how_a_run_is_run_may_change_and_is_said(unbroken, paused, tmp_path):
    shutil.copytree(paused, tmp_path / "run")
    done = run(tmp_path / "run", eval_every=3, checkpoint_every=3, block=1)
    assert done.returncode == 0, done.stderr
    assert "block was 2, is 1" in done.stdout
    assert "eval_every was 4, is 3" in done.stdout
    (records, arrays), (expected, weights) = finished(tmp_path / "run"), finished(unbroken)
    assert [line["round"] for line in records if "server_accuracy" in line] == [1, 4, 9, 12]
    assert [line["loss"] for line in records] == [line["loss"] for line in expected]
    for name in weights:
        np.testing.assert_array_equal(arrays[name], weights[name], err_msg=name)
