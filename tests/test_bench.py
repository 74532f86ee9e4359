"""The timer: who runs when, what is recorded and resumed, what is counted; no assertion about any time."""

import itertools
import json
import sys

import bench
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from timing import alternate, cases, hlo, results, table
from timing.cases import Case, Variant

OURS, THEIRS = Variant("ours"), Variant("torch", channels_last=True)
SMALL = {"width": 4, "cells": 1, "nodes": 1, "batch": 2, "image": (8, 8, 3)}
CASE = Case("a case", 2, 3, 6, (OURS, THEIRS), repeats=2, **SMALL)
NOW = {"source": "abc", "jax": "1"}
FACTS = {"versions": NOW, "command": "python", "seed": 1, "copy_bytes_per_second": 10e9, "described": {}}


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

    def ask(self, request, seconds):
        self.asked.append((self.side, request["do"]))
        self.allowed.append(seconds)
        match self.replies.get((self.side, request["do"])):
            case BaseException() as error:
                raise error
            case dict() as reply:
                return reply
        if request["do"] == "run":
            return {"seconds": float(next(self.times)), "loss": 2.0}
        return {
            "describe": {"platform": "cpu", "device": "cpu", "copy_bytes_per_second": 10e9},
            "build": {"first_run_seconds": 20.0},
            "report": {"bytes_per_round": 6e9 if self.side == "ours" else None, "host_peak_bytes": 5e8},
        }[request["do"]]


@pytest.fixture
def worker(monkeypatch):
    """FakeWorker with nothing asked yet and nothing failing."""
    monkeypatch.setattr(FakeWorker, "asked", [])
    monkeypatch.setattr(FakeWorker, "allowed", [])
    monkeypatch.setattr(FakeWorker, "replies", {})
    return FakeWorker


def measured(worker, left=lambda: 100.0):
    return alternate.measure(CASE, 1, left, lambda text: None, worker)


# --- Who runs when ----------------------------------------------------------------------------------


def test_variants_run_in_turn(worker):
    found = measured(worker)
    assert [side for side, do in worker.asked if do == "run"] == ["ours", "torch", "ours", "torch"]
    assert [result["seconds"] for result in found] == [[1.0, 2.0]] * 2
    assert [side for side, do in worker.asked if do == "leave"] == ["ours", "torch"]


def test_building_leaves_time_to_run_what_is_built(worker):
    measured(worker)
    assert worker.allowed[:3] == [100, 60, 100]  # 100 s are left; two first runs of 20 s are kept back


def test_a_failure_is_recorded_and_the_others_go_on(worker):
    worker.replies["torch", "run"] = alternate.WorkerError("OutOfMemoryError: too large")
    ours, theirs = measured(worker)
    assert (ours["status"], len(ours["seconds"])) == ("done", 2)
    assert (theirs["status"], theirs["reason"]) == ("failed", "OutOfMemoryError: too large")


def test_what_was_timed_once_is_not_timed_again_when_time_runs_out(worker):
    ours, theirs = measured(worker, left=lambda: 1.5)
    assert (ours["seconds"], theirs["seconds"]) == ([1.0], [1.0])
    worker.replies["ours", "build"] = alternate.OutOfTime("'build' had not ended after 9 s")
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
    assert entry["round_seconds"] == {"median": 3.0, "min": 2.0, "q1": 2.5, "q3": 3.5, "n": 2}  # twice the tasks
    assert entry["round_is"] == "extrapolated from 3 of 6 tasks"
    assert entry["step_seconds"]["median"] == 1.5 / 12  # 2 clients, 3 tasks, a support and a query step
    assert entry["images_per_second"] == 12 * 2 / 1.5
    assert (entry["bytes_per_second"], entry["share_of_copy_bandwidth"]) == (4e9, 0.4)
    whole = results.derived(CASE._replace(round_tasks=3), entry)
    assert (whole["round_is"], whole["round_seconds"]["median"]) == ("measured", 1.5)


def test_a_variant_is_settled_until_versions_or_work_change(worker):
    document = recorded(worker)
    assert results.open_variants(document, CASE, NOW, 0) == ()
    assert results.open_variants(document, CASE, NOW | {"jax": "2"}, 0) == CASE.variants
    assert results.open_variants(document, CASE._replace(batch=4), NOW, 0) == CASE.variants
    more = CASE._replace(variants=(*CASE.variants, Variant("torch")))
    assert results.open_variants(document, more, NOW, 0) == (Variant("torch"),)


def test_out_of_time_is_tried_again_with_more_of_it(worker):
    worker.replies["torch", "build"] = alternate.OutOfTime("late")
    document = recorded(worker)
    assert results.open_variants(document, CASE, NOW, 100) == ()
    assert results.open_variants(document, CASE, NOW, 200) == (THEIRS,)


def test_a_new_result_takes_the_old_ones_place(worker):
    document = recorded(worker)
    results.put(document, CASE, OURS, {"status": "failed", "reason": "none"}, FACTS)
    assert [entry["status"] for entry in document["results"]] == ["done", "failed"]


def test_table_has_a_row_for_every_result_and_keeps_failures(worker, tmp_path):
    worker.replies["torch", "run"] = alternate.WorkerError("too large | by far")
    path = tmp_path / "x.json"
    results.save(path, recorded(worker))
    assert results.load(path, "m") == json.loads(path.read_text())
    rows = [line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("| a case")]
    assert len(rows) == 2
    assert "3 (2.5 to 3.5; 2), n=2" in rows[0]
    assert "4.0 (40 %)" in rows[0]
    assert "failed: too large \\| by far" in rows[1]
    assert {row.replace("\\|", "").count("|") for row in rows} == {len(table.HEAD) + 1}


def test_another_machines_record_is_left_alone(worker, tmp_path):
    path = tmp_path / "x.json"
    results.save(path, recorded(worker))
    with pytest.raises(results.ResultsError, match="timings of 'm', but this machine is 'n'"):
        results.load(path, "n")
    path.write_text("{")
    with pytest.raises(results.ResultsError, match="damaged"):
        results.load(path, "m")


# --- The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose one of --quick, --gpu and --tiny"),
        (["--quick", "--gpu"], "choose one of"),
        (["--quick", "5"], "unexpected argument '5'"),
        (["--quik"], "quik"),
        (["--quick", "--minutes=0"], "minutes is 0"),
        (["--quick", "--minutes=nan"], "minutes is nan"),
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
    asked = bench.parse(["bench.py", "--tiny", f"--out={tmp_path / 'x.json'}", "--only=a case"])
    assert bench.run(asked, worker) == 0
    assert bench.run(asked._replace(only=""), worker) == 0
    assert [side for side, do in worker.asked if do == "run"] == ["ours", "torch"] * 4
    assert "a case: already there" in capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [entry["case"]["name"] for entry in found] == ["a case", "a case", "another", "another"]


def test_gpu_sweep_without_one_is_a_bad_request(worker, tmp_path):
    with pytest.raises(bench.UsageError, match="wants an accelerator"):
        bench.run(bench.parse(["bench.py", "--gpu", f"--out={tmp_path / 'x.json'}"]), worker)


def test_a_case_that_fails_whole_is_a_failure(worker, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SWEEPS, "tiny", lambda: [CASE])
    for side in ("ours", "torch"):
        worker.replies[side, "build"] = alternate.WorkerError("no room")
    path = tmp_path / "x.json"
    with pytest.raises(alternate.WorkerError, match="no variant could be timed of: a case"):
        bench.run(bench.parse(["bench.py", "--tiny", f"--out={path}"]), worker)
    assert [entry["reason"] for entry in json.loads(path.read_text())["results"]] == ["no room"] * 2


def test_every_sweep_has_cases_of_distinct_work():
    for sweep in bench.SWEEPS.values():
        works = [json.dumps(case.work()) for case in sweep()]
        assert len(set(works)) == len(works)
        assert len({case.name for case in sweep()}) == len(works)
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


# --- What is counted ------------------------------------------------------------------------------------


def test_traffic_is_xlas_own_count_where_there_is_no_loop():
    compiled = jax.jit(lambda x, w: jnp.sort(x @ w, axis=0)).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile()
    moved = hlo.traffic(compiled.as_text())
    assert moved.bytes == compiled.cost_analysis()["bytes accessed"]
    assert moved.kernels >= 2


def test_traffic_of_a_loop_grows_with_its_trips():
    def moved(trips):
        run = jax.jit(lambda x: jax.lax.fori_loop(0, trips, lambda _, x: jnp.sort(x @ x, axis=0), x))
        return hlo.traffic(run.lower(jnp.ones((64, 64))).compile().as_text())

    five, ten, fifteen = moved(5), moved(10), moved(15)
    assert ten.bytes - five.bytes == fifteen.bytes - ten.bytes > 5 * 3 * 64 * 64 * 4
    assert ten.kernels - five.kernels == fifteen.kernels - ten.kernels >= 10
    assert ten.unknown_loops == 0


def test_conditionals_in_a_loop_count_every_time():
    def step(_, x):
        return jax.lax.cond(x.sum() > 0, lambda x: jnp.sort(x), lambda x: jnp.sort(-x), x)

    run = jax.jit(lambda x: jax.lax.fori_loop(0, 7, step, x))
    assert hlo.traffic(run.lower(jnp.ones(64)).compile().as_text()).conditionals == 7


def test_traffic_of_a_loop_without_known_trips_says_so():
    run = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: jnp.sort(x - 1), x))
    assert hlo.traffic(run.lower(jnp.ones(64)).compile().as_text()).unknown_loops == 1


def test_sizes_of_hlo_types():
    assert hlo.size_of("f32[2,3]{1,0}") == 24
    assert hlo.size_of("(bf16[4]{0}, pred[], s32[2,0])") == 9
    assert hlo.size_of("f8e4m3fn[16]") == 16


# --- Real workers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["ours", "torch"])
def test_a_worker_times_a_tiny_round_and_survives_a_bad_request(side):
    if side == "torch":
        pytest.importorskip("torch", reason="the rival needs PyTorch: pip install '.[bench]'")
    case = Case("tiny", 2, 1, 1, (), plan="terminal", **SMALL)
    variant = Variant(side, at_once=2)
    with alternate.Worker(side) as worker:
        request = {"do": "build", "case": case.work(), "variant": variant._asdict(), "seed": 1}
        with pytest.raises(alternate.WorkerError, match="no plan 'half'"):
            worker.ask(request | {"case": case.work() | {"plan": "half"}}, 300)
        assert worker.ask(request, 300)["first_run_seconds"] > 0
        ran = [worker.ask({"do": "run"}, 300) for _ in range(2)]
        assert all(np.isfinite(reply["loss"]) and reply["seconds"] > 0 for reply in ran)
        assert ran[0]["loss"] != ran[1]["loss"]  # it has learnt, or at least moved
        report = worker.ask({"do": "report"}, 300)
    assert report["host_peak_bytes"] > 1e7
    assert (report["bytes_per_round"] or 0) > 0 or side == "torch"
    assert worker.process.returncode == 0


def test_a_worker_that_dies_or_hangs_is_reported():
    def python(code):
        return alternate.Worker("ours", [sys.executable, "-c", code])

    with python("import os; input(); os._exit(3)") as worker:
        with pytest.raises(alternate.WorkerError, match="ended with status 3"):
            worker.ask({"do": "run"}, 60)
    with python("import os; input(); os.kill(os.getpid(), 9)") as worker:
        with pytest.raises(alternate.WorkerError, match="SIGKILL"):
            worker.ask({"do": "run"}, 60)
    with python("import time; time.sleep(600)") as worker:
        with pytest.raises(alternate.OutOfTime, match="'run' had not ended after 0 s"):
            worker.ask({"do": "run"}, 0.1)
