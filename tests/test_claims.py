"""Claims to runs: one owner at a time, whoever dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from study import claims
from study.claims import Claims


def test_a_run_has_one_owner_until_it_is_released(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.take("a-dir0.1") as claim:
        assert second.take("a-dir0.1") is None
        assert second.held().keys() == {"a-dir0.1"}
        with second.take("a-dir0.10") as other:  # whose name begins like it
            assert (claim.deaths, other.deaths) == (0, 0)
    assert list(tmp_path.iterdir()) == []
    assert second.take("a-dir0.1").deaths == 0


def test_who_looks_makes_nothing(tmp_path):
    looked = Claims(tmp_path / "mistyped")
    assert looked.held() == {}
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.parametrize("said", ["", "[]", '{"pid": "x"}', '{"here": 5}'])
def test_a_damaged_claim_is_void_by_its_age(said, tmp_path):
    path = tmp_path / "run.1"
    path.write_text(said)
    assert Claims(tmp_path).take("run") is None
    os.utime(path, (0, 0))
    assert Claims(tmp_path).take("run").deaths == 1


def _race(folder, start, won):
    start.wait()
    claim = Claims(folder).take("run")
    won.put(claim is not None)
    start.wait()  # nobody lets go before all have tried


def test_of_many_that_try_at_once_one_gets_it(tmp_path):
    context = multiprocessing.get_context("forkserver")  # of this process, jax may have threads
    for attempt in range(5):
        start, won = context.Barrier(8), context.Queue()
        racers = [context.Process(target=_race, args=(tmp_path / str(attempt), start, won)) for _ in range(8)]
        for racer in racers:
            racer.start()
        assert sorted(won.get(timeout=30) for _ in racers) == [False] * 7 + [True]
        for racer in racers:
            racer.join()


def test_the_run_of_a_killed_process_is_free_at_once_and_says_how_many_died(tmp_path):
    script = f"from pathlib import Path; from study.claims import Claims; Claims(Path({str(tmp_path)!r})).take('run')"
    script += "; print('taken', flush=True); import time; time.sleep(60)"
    for deaths in (1, 2):
        owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=_path())
        assert owner.stdout.readline() == b"taken\n"
        assert Claims(tmp_path).take("run") is None
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert len(list(tmp_path.glob("run.*"))) == deaths
    claim = Claims(tmp_path).take("run")
    assert claim.deaths == 2
    claim.release()
    assert list(tmp_path.iterdir()) == []


def _path() -> dict:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_process_number_in_other_hands_does_not_hold_a_run(tmp_path):
    said = {"here": claims._here(), "pid": os.getpid(), "started": "another time", "since": 0}
    (tmp_path / "run.1").write_text(json.dumps(said))
    assert Claims(tmp_path).take("run") is not None


@pytest.mark.parametrize(("age", "free"), [(50, False), (70, True)])
def test_another_machine_holds_a_run_as_long_as_it_shows_signs_of_life(age, free, tmp_path):
    path = tmp_path / "run.1"
    path.write_text(json.dumps({"here": "elsewhere", "pid": 1, "started": "", "since": 0}))
    os.utime(path, (time.time() - age,) * 2)
    claim = Claims(tmp_path, lease=60).take("run")
    assert (claim is not None) == free


def test_an_owner_touches_its_claim_and_learns_that_it_was_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.02)
    told = []
    claim = Claims(tmp_path).take("run", lost=lambda: told.append(True))
    os.utime(tmp_path / "run.1", (0, 0))
    assert _soon(lambda: (tmp_path / "run.1").stat().st_mtime > 0)
    (tmp_path / "run.2").write_text("{}")  # another's
    assert _soon(lambda: told == [True] and claim.lost)
    claim.release()
    assert {path.name for path in tmp_path.iterdir()} == {"run.1", "run.2"}  # the other's is not touched


def _soon(condition) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False
