"""A run that is asked to stop, that comes to no numbers, or that is asked for what cannot be, by the command line.

Most runs are of the smallest training there is, by FedAvg and of one cell, which a process traces quickest.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from served_run import ONE_CELL
from test_interruption import TINY, command, run

MINE = {name: value for name, value in TINY.items() if not name.startswith("options.")} | {
    "method": "fedavg", "network": ONE_CELL, "dataset": "mine", "train_size": 16, "rounds": 4000,
}  # fmt: skip
HEAR = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def replace_images(folder: Path, shift: int = 0) -> str:
    """The flag for runs of MINE on these images."""
    image, label = np.zeros((256, 8, 8, 1), np.uint8), np.arange(256) % 4
    image[:, 0, 0, 0] = label + shift
    split = {"train_images": image, "train_labels": label, "test_images": image, "test_labels": label}
    np.savez(folder / "mine.npz", **split)
    return f"--data_dir={folder}"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda x: str(x)
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, status):
    process = subprocess.Popen(
        [sys.executable, "-c", HEAR, *command(tmp_path / "run", replace_images(tmp_path), of=MINE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("round "):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == status
    assert "to go on: " in out
    assert "stopping after this round" in err
    assert (tmp_path / "run" / "curves.png").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_signal_on_the_way_to_the_first_round_leaves_nothing(tmp_path):
    """It is heard from before jax is loaded, and there is no round to wait for."""
    late = "import os, runpy, signal, sys\nsys.argv.pop(0)\nsys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
    late += "from fedmetanas_jax.data import sources\nload = sources.load\n"
    late += "sources.load = lambda *given: os.kill(os.getpid(), signal.SIGTERM) or load(*given)\n"
    late += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    inside = [sys.executable, "-c", HEAR, sys.executable, "-c", late, *command(tmp_path / "run")[1:]]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_none_stop_the_run_and_leave_the_folder_free(tmp_path):
    given = replace_images(tmp_path)
    done = run(tmp_path / "run", given, of=MINE, lr=1e30, clip=0)
    assert done.returncode == 1
    assert "round " in done.stderr
    assert "client " in done.stderr
    assert "not finite" in done.stderr
    assert "can be tried in the same workdir" in done.stderr
    assert done.stderr.count("\n") == 1
    again = run(tmp_path / "run", given, "--stop_after=1", of=MINE)
    assert again.returncode == 0, again.stderr
    assert "lr was 1e+30, is " in again.stdout


def test_what_a_run_goes_on_with_must_be_what_it_began_with(tmp_path):
    """Its images, its config where config.json is gone, its records; and a folder that cannot be written is a line."""
    workdir, given = tmp_path / "run", replace_images(tmp_path)
    assert run(workdir, given, "--stop_after=2", of=MINE).returncode == 0
    replace_images(tmp_path, 1)
    refused = {"the images are not the same": MINE}
    (workdir / "config.json").rename(tmp_path / "config.json")
    for _ in range(2):
        for message, asked in refused.items():
            done = run(workdir, given, of=asked)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert message in done.stderr
            assert not (workdir / "config.json").exists()
        replace_images(tmp_path)
        refused = {"seed was 1, is 9": MINE | {"seed": 9}}
    log = workdir / "records.jsonl"
    log.rename(tmp_path / "records.jsonl")
    log.mkdir()
    done = run(workdir, given, of=MINE)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"Is a directory: {log}" in done.stderr
    log.rmdir()
    (tmp_path / "records.jsonl").rename(log)
    done = run(workdir, given, "--stop_after=1", of=MINE)
    assert done.returncode == 0, done.stderr
    assert "resuming after round 2" in done.stdout
    assert (workdir / "config.json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 20}, "config.batch can be at most 16"),
        ({"dataset": "nowhere"}, "no data set 'nowhere'"),
        ({"dataset": "odd", "cells": 3}, "multiples of 4; they are 6 x 6"),
        ({"options.threshold": 2}, "threshold is 2.0; it must be from 0 to below 1"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, changed, message):
    image, label = np.zeros((64, 6, 6, 1), np.uint8), np.arange(64) % 4
    image[:, 0, 0, 0] = label
    np.savez(tmp_path / "odd.npz", train_images=image, train_labels=label, test_images=image, test_labels=label)
    done = run(tmp_path / "run", f"--data_dir={tmp_path}", **changed)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()  # the request put right finds it free
