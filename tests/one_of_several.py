"""One process of a run over several, for test_hosts.py: the toy federation by methods of the package.

    python one_of_several.py '{"port": 8476, "processes": 2, "process": 0, "jobs": [...]}'

A job is {"method", "workdir", "fault": [kind, process, round] or null, and changes of the conduct}. The process that a
fault names meets it once it has done that round: "raise", "term" (SIGTERM) or "kill" (SIGKILL).
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / "experiments")]

import toy
import toy_federation

from fedmetanas_jax import command
from fedmetanas_jax.engine import hosts, together
from fedmetanas_jax.engine.course import Course
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.engine.mesh import clients_mesh

ROUNDS = 6
SETTING = toy_federation.SETTING._replace(rounds=ROUNDS, epochs=1)
PRUNING = {"prune_from": 0.4, "prune_until": 0.4, "prune_events": 1, "prune_tolerance": None}


def run(method: str, workdir: Path, fault=None, **changed):
    """The job, by this process alone or as its part of several's work."""

    class Faulty(Course):
        def advance(self, limit):
            lines = super().advance(limit)
            if fault and fault[1:] == [hosts.state().process_id, self.done]:
                if fault[0] == "raise":
                    raise ValueError("something is wrong here")
                os.kill(os.getpid(), signal.SIGTERM if fault[0] == "term" else signal.SIGKILL)
            return lines

    options = {"real": False, **PRUNING} if method == "fedmetanas" else {}
    phases = toy_federation.phases(method, SETTING, **options)
    how = {"clients": toy_federation.CLIENTS, "cohort": toy_federation.COHORT, "rounds": ROUNDS, "eval_every": 3}
    how |= {"mesh": clients_mesh(0), "make_course": Faulty, "final_adapt": method == "scaffold"} | changed
    return toy.run(phases, toy_federation.federation(), workdir, [], **how)


def main(asked: dict) -> int:
    """Does the jobs one after another -> the exit status."""

    def action():
        for job in asked["jobs"]:
            run(**job | {"workdir": Path(job["workdir"]) / str(asked["process"])})

    for number in (signal.SIGINT, signal.SIGTERM):  # to which a test's children may be deaf
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    together.GRACE = 2.0  # a test waits for it
    place = together.Place(f"127.0.0.1:{asked['port']}", asked["processes"], asked["process"], heartbeat=600)

    def answered(action):
        return command.exit_status(action, lambda: (hosts.HostError,))

    with interruptible():
        return command.exit_status(lambda: together.together(place, action, answered))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
