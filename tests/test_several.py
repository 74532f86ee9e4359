"""Several processes at one study: each has cores and a label of its own, and what happens to one of them is no loss."""

import json
import multiprocessing
import os
import signal
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import toy_study
from study import several, worker
from toy_study import until

SLOW = partial(toy_study.run, pause=0.2)  # 0.8 seconds a run


def _member(number, of, study, *given):
    """The first one dies in the middle of its first run; the second one, which comes after it, says what cores it has.
    """

    def die(seconds):
        (study / "dying").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def run(*given, **how):
        if number == 1:
            toy_study.time = SimpleNamespace(sleep=die)
        elif hasattr(os, "sched_getaffinity"):
            (study / "cores.json").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
        toy_study.run(*given, **how)

    worker.build.run = run
    if number > 1:
        until((study / "dying").exists)
    several.member(number, of, study, *given)


def _slow_member(*given):
    worker.build.run = SLOW
    several.member(*given)


def _work(study, runs):
    several.work(study, runs, None, print, count=1, target=_slow_member)


def test_where_one_dies_the_others_do_its_run_too(tmp_path, capfd):
    runs, said = toy_study.runs(), []
    assert several.work(tmp_path, runs, None, said.append, count=2, target=_member) == 1
    assert said == ["process 1 of 2 was killed by SIGKILL"]
    study = worker.Study(tmp_path)
    assert all(study.finished(run) for run in runs)
    assert study.claims.held() == {}
    lines = capfd.readouterr().out.splitlines()
    assert lines
    assert {line[:4] for line in lines} == {"[1] ", "[2] "}
    if hasattr(os, "sched_getaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        assert json.loads((tmp_path / "cores.json").read_text()) == list(several.share(mine, 1, 2))


def test_a_signal_stops_all_with_their_runs_saved(tmp_path):
    runs, study = toy_study.runs(), worker.Study(tmp_path)

    def ask():
        until(study.claims.held)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(KeyboardInterrupt) as stop:
        _work(tmp_path, runs)
    assert stop.value.args == (signal.SIGTERM,)
    assert study.claims.held() == {}
    assert 0 < sum(bool(study.finished(run)) for run in runs) < len(runs)


def test_they_end_with_the_process_that_started_them(tmp_path):
    runs, study = toy_study.runs(), worker.Study(tmp_path)
    first = multiprocessing.get_context("spawn").Process(target=_work, args=(tmp_path, runs))
    first.start()
    until(study.claims.held)
    (held,) = study.claims.held().values()
    assert held["pid"] != first.pid
    first.kill()
    first.join()
    until(lambda: not _lives(held["pid"]))
    assert not all(study.finished(run) for run in runs)
    assert study.claims.held() == {}


@pytest.mark.parametrize(("cores", "of"), [([0, 1], 2), ([3, 5, 6, 7, 9], 2), (list(range(16)), 5), ([0, 1], 1)])
def test_every_core_is_one_processs(cores, of):
    shares = [several.share(cores, number, of) for number in range(of)]
    assert sum(map(list, shares), []) == cores
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_cores_share_them():
    assert [several.share([2, 4], number, 5) for number in range(5)] == [[2], [4], [2], [4], [2]]


def test_a_label_stands_before_whole_lines(tmp_path):
    with open(tmp_path / "out", "wb") as file:
        out = several.Labelled("[3] ", file.fileno())
        print("one", "two", file=out, flush=True)
        print("three\nfour ", end="", file=out, flush=True)
        print("five \N{PLUS-MINUS SIGN}", file=out)
    assert (tmp_path / "out").read_text() == "[3] one two\n[3] three\n[3] four five ±\n"
    assert not out.isatty()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
