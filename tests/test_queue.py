"""Four processes at one study, two of them killed, a run damaged: the tables are as without any of it."""

import json
import multiprocessing
import os
import signal
from functools import partial

import toy_study
from study import plan, worker
from study.tables import Request, document
from toy_study import until

ROWS = ("fedavg", "fedrep", "perfedrlnas")


RUN = partial(toy_study.run, pause=0.02)
SLOW = partial(toy_study.run, pause=60)  # of those that will be killed, in the middle of a run


def _work(path, runs):
    worker.work(worker.Study(path), runs, None, lambda text: None)


def _work_apart(path, runs, run):
    worker.build.run = run  # of a process of its own
    _work(path, runs)


def _table(path, request) -> str:
    made = document(worker.Study(path), request)
    return json.dumps(made, sort_keys=True)


def test_a_study_that_was_disturbed_has_the_tables_of_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(worker.build, "run", RUN)
    request = Request(1, "minutes", ROWS, ("digits:dir0.1",), (1, 2, 3, 4), {"rounds": 4}, "")
    runs = list(request.runs().values())
    context = multiprocessing.get_context("forkserver")  # forked before jax has threads, and imported once
    context.set_forkserver_preload(["test_queue"])
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    _work(calm, runs)

    plan.write(disturbed, runs)
    victims, others = (
        [context.Process(target=_work_apart, args=(disturbed, runs, run)) for _ in range(2)] for run in (SLOW, RUN)
    )
    for one in victims:
        one.start()
    study = worker.Study(disturbed)
    until(lambda: {held["pid"] for held in study.claims.held().values()} == {victim.pid for victim in victims})
    taken = [run for run in runs if run.name in study.claims.held()]
    until(lambda: all(study.rounds(run) for run in taken))
    for one in others:
        one.start()
    until(lambda: len(study.claims.held()) > 2 or any(study.finished(run) for run in runs))
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    assert not {held["pid"] for held in study.claims.held().values()} & {victim.pid for victim in victims}
    for one in others:
        one.join(60)
        assert one.exitcode == 0
    damaged = study.workdir(runs[5]) / "result.json"
    damaged.write_text(damaged.read_text()[:40])
    assert study.finished(runs[5]) is None
    _work(disturbed, runs)
    assert _table(disturbed, request) == _table(calm, request)
    assert study.claims.held() == {}
