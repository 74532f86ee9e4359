"""The timer: who runs when, what is recorded and resumed; no assertion about any time."""

import itertools
import json
import os
import signal
import time

import bench
import numpy as np
import pytest
from timing import cases, results
from timing.cases import Case, Variant
from timing.workers import OutOfTime, Worker, WorkerError, measure

from fedmetanas_jax.options import UsageError

OURS, THEIRS = Variant("ours"), Variant("torch", channels_last=True)
SMALL = {"width": 4, "cells": 1, "nodes": 1, "batch": 2, "image": (8, 8, 3)}
CASE = Case("a case", 2, 3, 6, (OURS, THEIRS), repeats=2, **SMALL)
NOW = {"source": "abc", "jax": "1"}
FACTS = {"versions": NOW, "command": "python", "seed": 1}


class FakeWorker:
    """Answers as a worker does; `asked` notes who was asked for what, `replies` says what fails."""

    asked: list = []
    allowed: list = []  # seconds
    replies: dict = {}

    def __init__(self, side):
        self.side, self.times = side, itertools.count(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.asked.append((self.side, "leave"))

    def ask(self, seconds, request, *arguments):
        self.asked.append((self.side, request))
        self.allowed.append(seconds)
        if isinstance(error := self.replies.get((self.side, request)), BaseException):
            raise error
        return {
            "describe": {"backend": "cpu", "device": "cpu", "cpus": 2},
            "build": 20.0,
            "run": (float(next(self.times)), 2.0) if request == "run" else None,
            "report": {"compile_seconds_cold": 4.0, "trace_seconds_cold": 1.0, "host_peak_bytes": 5e8},
        }[request]


@pytest.fixture
def worker(monkeypatch):
    """FakeWorker with nothing asked yet and nothing failing."""
    monkeypatch.setattr(FakeWorker, "asked", [])
    monkeypatch.setattr(FakeWorker, "allowed", [])
    monkeypatch.setattr(FakeWorker, "replies", {})
    return FakeWorker


def measured(worker, left=lambda: 100.0):
    return measure([CASE], 1, left, lambda text: None, worker)[0]


# --- Who runs when ----------------------------------------------------------------------------------


def test_variants_run_in_turn(worker):
    found = measured(worker)
    assert [side for side, do in worker.asked if do == "run"] == ["ours", "torch", "ours", "torch"]
    assert [result["seconds"] for result in found] == [[1.0, 2.0]] * 2
    assert sorted(side for side, do in worker.asked if do == "leave") == ["ours", "torch"]


def test_building_leaves_time_to_run_what_is_built(worker):
    measured(worker)
    assert worker.allowed[:3] == [100, 60, 100]  # 100 s are left; two first runs of 20 s are kept back


def test_together_all_cases_are_built_before_the_first_one_runs(worker):
    other = CASE._replace(name="another", variants=(THEIRS,))
    worker.replies["ours", "build"] = WorkerError("no room")
    found = measure([CASE, other], 1, lambda: 100.0, lambda text: None, worker, together=True)
    asked = [do for _, do in worker.asked if do in ("build", "run")]
    assert asked == ["build"] * 3 + ["run"] * 4
    assert [[result["status"] for result in each] for each in found] == [["failed", "done"], ["done"]]


def test_a_failure_is_recorded_and_the_others_go_on(worker):
    worker.replies["torch", "run"] = WorkerError("OutOfMemoryError: too large")
    ours, theirs = measured(worker)
    assert (ours["status"], len(ours["seconds"])) == ("done", 2)
    assert (theirs["status"], theirs["reason"]) == ("failed", "OutOfMemoryError: too large")


def test_what_was_timed_once_is_not_timed_again_when_time_runs_out(worker):
    ours, theirs = measured(worker, left=lambda: 1.5)
    assert (ours["seconds"], theirs["seconds"]) == ([1.0], [1.0])
    worker.replies["ours", "build"] = OutOfTime("'build' had not ended after 9 s")
    ours, theirs = measured(worker)
    assert (ours["status"], ours["allowed_seconds"], theirs["status"]) == ("out of time", 100, "done")


# --- What is recorded and resumed ---------------------------------------------------------------------


def recorded(worker, variants=CASE.variants):
    document = {"hardware": "m", "results": []}
    for variant, result in zip(variants, measured(worker), strict=True):
        results.put(document, CASE, variant, result, FACTS)
    return document


def test_numbers_that_follow_from_the_seconds(worker):
    entry = recorded(worker)["results"][0]
    assert entry["round_seconds"] == {"median": 3.0, "min": 2.0, "n": 2}  # twice the tasks
    assert entry["round_is"] == "extrapolated from 3 of 6 tasks"
    assert entry["step_seconds"] == 1.5 / 12  # 2 clients, 3 tasks, a support and a query step
    assert entry["images_per_second"] == 12 * 2 / 1.5
    whole = results.derived(CASE._replace(round_tasks=3), entry["seconds"])
    assert (whole["round_is"], whole["round_seconds"]["median"]) == ("measured", 1.5)


def test_a_variant_is_settled_until_versions_or_work_change(worker):
    document = recorded(worker)
    assert results.open_variants(document, CASE, NOW, 0) == ()
    assert results.open_variants(document, CASE, NOW | {"jax": "2"}, 0) == CASE.variants
    assert results.open_variants(document, CASE._replace(batch=4), NOW, 0) == CASE.variants
    more = CASE._replace(variants=(*CASE.variants, Variant("torch")))
    assert results.open_variants(document, more, NOW, 0) == (Variant("torch"),)


def test_out_of_time_is_tried_again_with_more_of_it(worker):
    worker.replies["torch", "build"] = OutOfTime("late")
    document = recorded(worker)
    assert results.open_variants(document, CASE, NOW, 100) == ()
    assert results.open_variants(document, CASE, NOW, 200) == (THEIRS,)


def test_a_new_result_takes_the_old_ones_place(worker):
    document = recorded(worker)
    results.put(document, CASE, OURS, {"status": "failed", "reason": "none"}, FACTS)
    assert [entry["status"] for entry in document["results"]] == ["done", "failed"]


def test_table_has_a_row_for_every_result_and_keeps_failures(worker, tmp_path):
    worker.replies["torch", "run"] = WorkerError("too large | by far")
    path = tmp_path / "x.json"
    results.save(path, recorded(worker))
    assert results.load(path, "m") == json.loads(path.read_text())
    rows = [line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("| a case")]
    assert len(rows) == 2
    assert "| 3 (2), n=2 |" in rows[0]
    assert "| 4.0 / - | - / 0.50 |" in rows[0]
    assert "failed: too large \\| by far" in rows[1]
    assert {row.replace("\\|", "").count("|") for row in rows} == {len(results.HEAD) + 1}


def test_another_machines_record_is_left_alone(worker, tmp_path):
    path = tmp_path / "x.json"
    results.save(path, recorded(worker))
    with pytest.raises(UsageError, match="timings of 'm', but this machine is 'n'"):
        results.load(path, "n")
    path.write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        results.load(path, "m")


# --- The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose one of --quick, --gpu and --tiny"),
        (["--quick", "--gpu"], "choose one of"),
        (["--quick", "5"], "unexpected argument '5'"),
        (["--quik"], "no flag 'quik'; did you mean 'quick'"),
        (["--quick", "--repeats=0"], "repeats: '0' is not a whole number of at least 1"),
        (["--quick", "--minutes=0"], "minutes is 0"),
        (["--quick", "--minutes=nan"], "minutes: 'nan' is not a finite number"),
        (["--quick", "--out=table.md"], "must end in .json"),
        (["--quick", "--only=xyz"], "there are: supernet step"),
    ],
)
def test_a_bad_request_is_one_line_and_status_2(capsys, arguments, message):
    assert bench.main(["bench.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_second_call_times_nothing_again(worker, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SWEEPS, "tiny", lambda: [CASE, CASE._replace(name="another")])
    command = ["bench.py", "--tiny", f"--out={tmp_path / 'x.json'}"]
    bench.run(bench.parse([*command, "--only=a case"]), worker)
    bench.run(bench.parse(command), worker)
    assert [side for side, do in worker.asked if do == "run"] == ["ours", "torch"] * 4
    assert "a case: already there" in capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [entry["case"]["name"] for entry in found] == ["a case", "a case", "another", "another"]


def test_gpu_sweep_without_one_is_a_bad_request(worker, tmp_path):
    with pytest.raises(UsageError, match="wants an accelerator"):
        bench.run(bench.parse(["bench.py", "--gpu", f"--out={tmp_path / 'x.json'}"]), worker)


def test_a_case_that_fails_whole_is_a_failure(worker, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SWEEPS, "tiny", lambda: [CASE])
    for side in ("ours", "torch"):
        worker.replies[side, "build"] = WorkerError("no room")
    path = tmp_path / "x.json"
    with pytest.raises(WorkerError, match="no variant could be timed of: a case"):
        bench.run(bench.parse(["bench.py", "--tiny", f"--out={path}"]), worker)
    assert [entry["reason"] for entry in json.loads(path.read_text())["results"]] == ["no room"] * 2


def test_every_sweep_times_each_work_by_each_variant_once():
    for sweep in bench.SWEEPS.values():
        asked = [(json.dumps(case.work()), variant) for case in sweep() for variant in case.variants]
        assert len(set(asked)) == len(asked)
        assert all(case.variants for case in sweep())
        assert len({case.name for case in sweep()}) == len({work for work, _ in asked})
    asked = {(case.clients, case.dtype, case.plan) for case in cases.gpu()}
    assert asked >= set(itertools.product((1, 5, 20, 100), ("float32", "bfloat16"), ("full", "terminal")))


def test_terminal_plan_is_one_pair_a_node_and_one_operation_on_its_edges():
    case = CASE._replace(nodes=4, plan="terminal")
    plan, op, pair = cases.plan_and_mask(case, 3)
    assert [[len(ops) for ops in cell].count(1) for cell in plan] == [8, 8]
    assert [sum(len(ops) for ops in cell) for cell in plan] == [8, 8]
    assert pair.sum(1).tolist() == [4, 4]
    assert [[np.flatnonzero(edge).tolist() for edge in cell] for cell in op] == plan
    with pytest.raises(ValueError, match="no plan 'half'"):
        cases.plan_and_mask(case._replace(plan="half"), 3)


# --- Real workers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["ours", "torch"])
def test_a_worker_times_a_tiny_round_and_survives_a_bad_request(side):
    if side == "torch":
        pytest.importorskip("torch", reason="the rival needs PyTorch: pip install '.[bench]'")
    case = Case("tiny", 2, 1, 1, (), plan="terminal", **SMALL)
    with Worker(side) as worker:
        with pytest.raises(WorkerError, match="no plan 'half'"):
            worker.ask(300, "build", case._replace(plan="half"), Variant(side), 1, True)
        assert worker.ask(300, "build", case, Variant(side, at_once=2), 1, True) > 0
        ran = [worker.ask(300, "run") for _ in range(2)]
        assert all(np.isfinite(loss) and seconds > 0 for seconds, loss in ran)
        assert ran[0][1] != ran[1][1]  # it has learnt, or at least moved
        report = worker.ask(300, "report")
    assert report["host_peak_bytes"] > 1e7
    if side == "ours":
        assert 0 < report["compile_seconds_warm"] < report["compile_seconds_cold"]
    assert worker.process.exitcode == 0


def leave(side, connection, caches):
    connection.recv()
    os._exit(3)


def die(side, connection, caches):
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def hang(side, connection, caches):
    time.sleep(600)


@pytest.mark.parametrize(("work", "reason"), [(leave, "ended with status 3"), (die, "status -9, as when")])
def test_a_worker_that_dies_is_reported(work, reason):
    with Worker("ours", work) as worker, pytest.raises(WorkerError, match=reason):
        worker.ask(60, "run")


def test_a_worker_that_hangs_is_ended():
    with Worker("ours", hang) as worker, pytest.raises(OutOfTime, match="'run' had not ended after 0 s"):
        worker.ask(0.1, "run")
    assert not worker.process.is_alive()
