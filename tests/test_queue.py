"""Four processes at one study, two of them killed, a run damaged: the tables are as without any of it."""

import json
import multiprocessing
import os
import signal
import time
from functools import partial

import toy_study
from study import plan, worker
from study.tables import Request, document

ROWS = ("fedavg", "fedrep", "perfedrlnas")


def _work(path, runs):
    worker.build.run = partial(toy_study.run, pause=0.03)
    worker.work(worker.Study(path), runs, None, lambda text: None)


def _table(path, request) -> str:
    made = document(worker.Study(path), request)
    return json.dumps(made, sort_keys=True)


def test_a_study_that_was_disturbed_has_the_tables_of_one_that_was_not(tmp_path):
    request = Request(1, "minutes", ROWS, ("digits:dir0.1",), (1, 2, 3, 4), {"rounds": 4}, "")
    runs = list(request.runs().values())
    context = multiprocessing.get_context("forkserver")  # forked before jax has threads, and imported once
    context.set_forkserver_preload(["test_queue"])
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    _work(calm, runs)

    plan.write(disturbed, runs)
    workers = [context.Process(target=_work, args=(disturbed, runs)) for _ in range(4)]
    for one in workers:
        one.start()
    study = worker.Study(disturbed)
    for victim in workers[:2]:
        while victim.pid not in {held["pid"] for held in study.claims.held().values()} and victim.is_alive():
            time.sleep(0.005)  # in the middle of a run
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    assert not {held["pid"] for held in study.claims.held().values()} & {victim.pid for victim in workers[:2]}
    for one in workers[2:]:
        one.join(60)
        assert one.exitcode == 0
    damaged = study.workdir(runs[5]) / "result.json"
    damaged.write_text(damaged.read_text()[:40])
    assert study.finished(runs[5]) is None
    _work(disturbed, runs)
    assert _table(disturbed, request) == _table(calm, request)
    assert study.claims.held() == {}
