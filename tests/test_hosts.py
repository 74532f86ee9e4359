"""One run over several processes of this machine: the same bits as one process, one workdir, one end for all."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hosts_bench
import jax
import numpy as np
import one_of_several
import pytest

from fedmetanas_jax import build
from fedmetanas_jax import main as cli
from fedmetanas_jax.config import Config
from fedmetanas_jax.engine import hosts
from fedmetanas_jax.engine.checkpoint import Checkpoints
from fedmetanas_jax.engine.mesh import clients_mesh
from fedmetanas_jax.options import UsageError

TESTS = Path(__file__).parent
MAIN = TESTS.parent / "experiments" / "main.py"
CLOCK = ("seconds", "compile_seconds", "event_stall_seconds", "compile_seconds_ahead")
METHODS = ("scaffold", "fedmetanas")
ENDS = 40  # seconds in which all are gone once one failed; 20 are promised, and this machine may be busy


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments, port: int, count: int = 2) -> list[subprocess.Popen]:
    """Processes of one device each that talk to each other on this machine alone."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
    env = os.environ | {"XLA_FLAGS": flags, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    how = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([sys.executable, *map(str, arguments(process))], **how) for process in range(count)]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each; none outlives this."""
    try:
        said = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, said, strict=True)]


def start_jobs(*jobs: dict) -> list[subprocess.Popen]:
    port = free_port()
    asked = {"port": port, "processes": 2, "jobs": jobs}
    return start(lambda process: [TESTS / "one_of_several.py", json.dumps(asked | {"process": process})], port)


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def records(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in CLOCK} for line in lines]


def alone(method: str, workdir: Path, **changed):
    """In this process, with as many devices as the two have together."""
    return one_of_several.run(method, workdir, mesh=clients_mesh(2), **changed)


def assert_same(workdir: Path, whole: tuple):
    """What is in the workdir is what a run of one process came to, bit for bit."""
    lines, state = whole
    assert records(workdir) == lines
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        step, _, saved = checkpoints.restore_newest(lambda meta: state, print)
    finally:
        checkpoints.close()
    assert step == one_of_several.ROUNDS
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(saved), jax.tree.leaves(state), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """{method: (records, state)} of one process."""

    @functools.cache
    def whole(method: str) -> tuple:
        workdir = tmp_path_factory.mktemp("alone")
        state = alone(method, workdir).state
        owns = jax.tree.map(lambda x: np.asarray(x)[: one_of_several.toy_federation.CLIENTS], state.owns)
        return records(workdir), jax.tree.map(np.asarray, state._replace(owns=owns))

    return whole


@pytest.fixture(scope="module")
def two(tmp_path_factory, wholes):
    """Both methods' runs by two processes; what they are compared with is computed meanwhile."""
    base = tmp_path_factory.mktemp("two")
    jobs = [{"method": method, "workdir": str(folder(base / method))} for method in METHODS]
    processes = start_jobs(*jobs)
    try:
        for method in METHODS:
            wholes(method)
    finally:
        ended = finish(processes)
    for status, _, err in ended:
        assert status == 0, err
    return base


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_bit_for_bit(two, wholes, method):
    lines, _ = wholes(method)
    assert [line["event"] for line in lines if "event" in line] == ["prune"] * (method == "fedmetanas")
    assert [line["round"] for line in lines if "server_accuracy" in line] == [1, 3, 6]
    assert ("local_accuracy_adapted" in lines[-1]) == (method == "scaffold")
    assert_same(two / method / "0", wholes(method))


def test_only_the_first_processs_workdir_holds_anything(two):
    for method in METHODS:
        assert {path.name for path in (two / method / "0").iterdir()} == {"records.jsonl", "checkpoints"}
        assert list((two / method / "1").iterdir()) == []


def test_a_signal_to_one_saves_and_stops_all_and_other_numbers_of_processes_go_on(tmp_path, wholes):
    """One process, then two until the second one is told to stop, then one."""
    workdir = folder(tmp_path / "0")
    assert alone("scaffold", workdir, stop_after=2) is None
    job = {"method": "scaffold", "workdir": str(tmp_path), "fault": ["term", 1, 3]}
    ended = finish(start_jobs(job))
    assert [status for status, *_ in ended] == [143, 143], ended
    assert "stopping after this round" in ended[1][2]
    done = len(records(workdir))
    assert 3 <= done <= 4  # the others hear of it before the next round, or the one after
    assert (workdir / "checkpoints" / str(done)).is_dir()
    alone("scaffold", workdir)
    assert_same(workdir, wholes("scaffold"))


@pytest.mark.parametrize(("kind", "line"), [("raise", "process 1 of 2 failed, so all end: ValueError: something is"),
                                            ("kill", "another process was lost, so all end (")])  # fmt: skip
def test_one_that_fails_ends_all_with_a_line(tmp_path, kind, line):
    processes = start_jobs({"method": "scaffold", "workdir": str(folder(tmp_path / kind)), "fault": [kind, 1, 2]})
    processes[1].wait(600)
    since = time.monotonic()
    (status, _, err), (other, _, reason) = finish(processes)
    assert time.monotonic() - since < ENDS
    assert status == 1
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
    assert other == (1 if kind == "raise" else -signal.SIGKILL)
    assert ("ValueError: something is wrong here" in reason) == (kind == "raise")
    assert len(records(tmp_path / kind / "0")) == 2  # of whose rounds the second has the checkpoint of the first


def test_the_command_line_leaves_one_run(tmp_path):
    """And what is said is said once."""
    image, label = np.zeros((64, 8, 8, 1), np.uint8), np.arange(64) % 4
    image[:, 0, 0, 0] = label
    np.savez(tmp_path / "mine.npz", train_images=image, train_labels=label, test_images=image, test_labels=label)
    fields = {
        "dataset": "mine", "method": "fedavg", "network": TESTS / "one_cell.json", "width": 2, "cells": 1, "nodes": 1,
        "clients": 2, "cohort": 2, "rounds": 1, "train_size": 8, "test_size": 8, "epochs": 1, "batch": 8, "augment": "",
        "final_adapt": "false", "devices": 0,
    }  # fmt: skip
    port = free_port()
    common = [MAIN, f"--data_dir={tmp_path}", f"--coordinator=127.0.0.1:{port}", "--processes=2", "--heartbeat=600"]
    common += [f"--config.{name}={value}" for name, value in fields.items()]

    def arguments(process: int) -> list:
        return [*common, f"--process={process}", f"--workdir={tmp_path / str(process)}"]

    ended = finish(start(arguments, port))
    assert [status for status, *_ in ended] == [0, 0], ended
    left = {path.name for path in (tmp_path / "0").iterdir()}
    assert left >= {"config.json", "partition.json", "records.jsonl", "checkpoints", "network.npz", "result.json"}
    assert not (tmp_path / "1").exists()
    assert f"all of it is in {tmp_path / '0'}" in ended[0][1]
    assert not [line for line in ended[1][1].splitlines() if not line.startswith("[Gloo]")]
    assert [err for *_, err in ended] == ["", ""]
    # A process that finds other data is refused, and so are all.
    (tmp_path / "elsewhere").mkdir()
    again, wrong = free_port(), [f"--data_dir={tmp_path / 'elsewhere'}"]
    moved = [f"--coordinator=127.0.0.1:{again}"]
    ended = finish(start(lambda process: [*arguments(process), *moved, *wrong * process], again))
    assert [status for status, *_ in ended] == [1, 1], ended
    assert ended[0][2].startswith("error: process 1 of 2 failed, so all end: DataError: no data set 'mine'")
    assert [err.count("\n") for *_, err in ended] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster"], "config.devices is -1; a run over several processes uses all devices of all of them"),
        (["--cluster", "--config.devices=2"], "config.devices is 2; a run over several processes"),
        (["--processes=2"], "--processes and --process need --coordinator=HOST:PORT"),
        (["--cluster", "--process=0"], "--processes and --process need --coordinator=HOST:PORT"),
        (["--coordinator=node7", "--processes=2", "--process=0"], "coordinator is 'node7'; it must be HOST:PORT"),
        (["--coordinator=node7:99999", "--processes=2", "--process=0"], "it must be HOST:PORT"),
        (["--coordinator=node7:8476", "--processes=2"], "--coordinator needs --processes=N and --process=I"),
        (
            ["--coordinator=node7:8476", "--processes=2", "--process=2"],
            "process is 2; of 2 processes it is from 0",
        ),
        (["--coordinator=node7:8476", "--processes=0", "--process=0"], "processes: '0' is not a whole number of at"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_starts(arguments, message):
    with pytest.raises(UsageError) as caught:
        cli.parse(["main.py", *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_alone_each_function_hands_back_what_it_is_given():
    tree = {"a": jax.numpy.arange(3), "b": np.float32(-0.0)}
    assert (hosts.several(), hosts.leader()) == (False, True)
    assert hosts.agreed(tree) is tree
    assert hosts.gathered(tree) is tree
    assert hosts.here(tree) is tree
    assert hosts.everyones(5) == [5]
    assert [hosts.least(number, "room") for number in (7, None)] == [7, None]
    assert [hosts.heard(number) for number in (None, 15)] == [None, 15]
    with pytest.raises(KeyboardInterrupt) as caught:
        hosts.obey(15)
    assert caught.value.args == (15,)


def test_processes_that_were_asked_for_different_things_are_refused(monkeypatch):
    def others(mine):
        return [mine, mine | {"config": mine["config"] | {"at_once": 4}, "versions": {}}]

    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "everyones", others)
    with pytest.raises(UsageError, match="process 1 is of another run than process 0 .*config.at_once was -1, is 4"):
        build._check_processes(Config(), {"data": {}}, None)
    monkeypatch.setattr(hosts, "everyones", lambda mine: [mine] * 3)
    build._check_processes(Config(), {"data": {}}, None)


def test_devices_of_several_processes_are_all_of_them(monkeypatch):
    monkeypatch.setattr(hosts, "several", lambda: True)
    with pytest.raises(ValueError, match="devices=2: a run of several processes uses all devices of all"):
        clients_mesh(2)
    assert clients_mesh(0).size == 4


def test_a_port_that_is_taken_is_a_line(monkeypatch):
    from fedmetanas_jax.engine.together import _listening

    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"cannot listen at {address}: Address already in use"):
            _listening(address)
    assert _listening(address) == address  # that of the machine alone
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"127.0.0.1:{free_port()}")
    assert _listening("node7:8476") == os.environ["JAX_COORDINATOR_BIND_ADDRESS"]


def test_the_table_of_the_bench_by_hand():
    def row(seconds, pruned, same):
        return {"seconds": seconds, "seconds_pruned": pruned, "seconds_compiling": 9.6, "wall_seconds": 30.2} | same

    runs = {"1 x 2": row([2.0, 1.0, 3.0], [0.5], {"same_as": ["1 x 2", "2 x 1"]}),
            "2 x 1": row([4.0], [], {"same_as": ["1 x 2", "2 x 1"]})}  # fmt: skip
    figures = {
        "machine": {"cpus": 2, "processor": "toy"},
        "load_at_the_end": 1.0,
        "minutes": 3.0,
        "command": "python x",
    }
    lines = hosts_bench.markdown(figures | {"runs": {"scaffold": runs}}).splitlines()
    assert lines[4] == "| 1 x 2 | 2 (1 to 3) | 0.5 (0.5 to 0.5) | 10 | 30 | 2 x 1 |"
    assert lines[5] == "| 2 x 1 | 4 (4 to 4) |  | 10 | 30 | 1 x 2 |"
    with pytest.raises(UsageError, match="no run 'scafold'; did you mean 'scaffold'"):
        hosts_bench.parse(["hosts_bench.py", "--only=scafold"])
