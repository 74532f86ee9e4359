"""The loop of a run: phases, rounds, evaluation, records, checkpoints.

A run is a list of phases (core.Phase). Between two of them the server's state passes through `enter`, which
may prune; the accuracies before and after are recorded with the round that ended the phase. What happens
when is a function of the round's number alone, so a resumed run does what an unbroken one does.
"""

import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from jax.sharding import Mesh

from fedmetanas_jax.core import Algorithm, FederatedData, Phase, RoundState
from fedmetanas_jax.engine import records, report
from fedmetanas_jax.engine.checkpoint import Checkpoints
from fedmetanas_jax.engine.course import Course
from fedmetanas_jax.engine.programs import Plan
from fedmetanas_jax.engine.progress import Progress


def run(
    phases: list[Phase],
    data: FederatedData,
    plan: Plan,
    *,
    workdir: Path,
    mesh: Mesh | None = None,
    stop_after: int | None = None,
    progress: Callable[[int, int], Progress] = Progress,
    go_on: str = "the same command",
) -> tuple[Algorithm, RoundState, dict] | None:
    """Runs or resumes the phases in `workdir`.

    Returns (last algorithm, last state, summary), or None where `stop_after` rounds of this call ended
    before the last one. Leaves records.jsonl and checkpoints/. Raises NonFiniteError, CheckpointError, and
    KeyboardInterrupt once Ctrl-C was obeyed.
    """
    log = workdir / "records.jsonl"
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints, _Interrupt() as interrupt:
        course = Course(phases, data, plan, mesh, checkpoints)
        notes: list[str] = []
        course.begin(notes.append)
        records.truncate(log, course.done)
        limit = plan.rounds if stop_after is None else min(plan.rounds, course.done + stop_after)
        with progress(plan.rounds, course.done) as show:
            for note in notes:
                show.say(note)
            course.programs.say = show.say
            while course.done < plan.rounds:
                if interrupt.asked or course.done >= limit:
                    course.save()
                    show.say(f"stopped after round {course.done} of {plan.rounds}; to go on: {go_on}")
                    if interrupt.asked:
                        raise KeyboardInterrupt
                    return None
                lines = course.advance(limit)
                course.evaluate(lines[-1])
                compiling = course.enter_next_phase(lines[-1], show.say)
                lines[0]["compile_seconds"] = compiling + course.programs.spent_compiling()
                for line in lines:
                    records.append(log, line)
                    show.round(line)
                if course.done == plan.rounds or course.done % plan.checkpoint_every == 0:
                    course.save()
    return course.algorithm, course.state, report.summarize(records.read(log))


class _Interrupt:
    """The first Ctrl-C asks the loop to stop after the round it is in; the second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # elsewhere than in the main thread there is none to set
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this round; Ctrl-C again stops at once (back to the last checkpoint)", file=sys.stderr)
