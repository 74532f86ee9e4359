"""The loop of a run: phases, rounds, evaluation, records, checkpoints.

A run is a list of phases (core.Phase). Between two of them the server's state passes through `enter`, which
may prune; the accuracies before and after are recorded with the round that ended the phase. What happens
when is a function of the round's number alone, so a resumed run does what an unbroken one does.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from fedmetanas_jax.core import Algorithm, FederatedData, Phase, RoundState
from fedmetanas_jax.engine import hosts, records, report
from fedmetanas_jax.engine.checkpoint import Checkpoints
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.engine.course import Course, Served
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.engine.progress import Progress
from fedmetanas_jax.engine.shared_checkpoints import SharedCheckpoints
from fedmetanas_jax.engine.sinks import NONE, Sinks


class Outcome(NamedTuple):
    """Where a finished run ended."""

    algorithm: Algorithm
    plan: object  # the last algorithm's; JSON
    state: RoundState
    summary: dict  # {} on other processes than the first one
    served: Served | None  # what it leaves; None where there is no network for everybody


def run(
    phases: list[Phase],
    data: FederatedData,
    conduct: Conduct,
    *,
    workdir: Path,
    mesh: Mesh | None = None,
    stop_after: int | None = None,
    progress: Callable[[int, int, list[dict]], Progress] = Progress,
    go_on: str = "the same command",
    identity: dict | None = None,
    accepted: Callable[[], None] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
    sinks: Sinks = NONE,
    make_course: Callable[..., Course] = Course,
) -> Outcome | None:
    """Runs or resumes the phases in `workdir`.

    identity: of this run, for its checkpoints (see `identity.of`). accepted: called once nothing speaks against the run
    any more, before its first round. meanwhile: called while that is compiled or, of a resumed run,
    before, for what takes its time.
    sinks: where else the records go; whoever made them ends them.
    make_course: what does the rounds, with Course's arguments; another one may have them done elsewhere.
    Returns None where `stop_after` rounds of this call ended before the last one.
    Leaves records.jsonl and checkpoints/. Raises NonFiniteError, CheckpointError, WorkdirError where the records do
    not fit the checkpoint, OSError, and KeyboardInterrupt once Ctrl-C (or another signal) was obeyed.
    """
    log, leads = workdir / records.RECORDS, hosts.leader()
    with closing(_checkpoints(workdir / "checkpoints")) as checkpoints, interruptible() as interrupt:
        course = make_course(phases, data, conduct, mesh, checkpoints, identity or {})
        notes: list[str] = []
        resumed = course.begin(notes.append)
        past = records.resume(log, course.done, course.records) if resumed and leads else []
        accepted()
        if leads and not resumed:
            records.set_aside(log, notes.append)
        if not resumed:
            course.start()
        start = course.done
        course.lost = hosts.agreed(sum(len(line.get("dropped", ())) for line in past))
        if course.account is not None:
            course.account.add(hosts.agreed([line["noised_parts"] for line in past]))
        limit = conduct.rounds if stop_after is None else min(conduct.rounds, course.done + stop_after)
        written = records.Digest(past)
        with progress(conduct.rounds, course.done, past) as show:
            for note in notes:
                show.say(note)
            course.programs.say, course.programs.meanwhile = show.say, meanwhile
            sinks.begin(past, show.say)
            while course.done < conduct.rounds:
                if hosts.heard(interrupt.signal) is not None or course.done >= limit:
                    if course.done > start:  # else there is nothing new to save
                        course.save(written.text())
                    show.say(f"stopped after round {course.done} of {conduct.rounds}; to go on: {go_on}")
                    hosts.obey(interrupt.signal)
                    return None
                lines = course.advance(limit)
                # It would be begun anew, without the rounds before.
                if leads and course.done > len(lines) and not log.exists():
                    raise records.WorkdirError(f"{log} was removed while the run wrote it; {records.ADVICE}")
                for line in lines:
                    if "dropped" in line:
                        show.say(dropped(line, course.account is not None))
                course.evaluate(lines[-1])
                compiling = course.enter_next_phase(lines[-1], show.say)
                lines[0]["compile_seconds"] = compiling + course.programs.spent_compiling()
                for line in lines if leads else ():
                    records.append(log, line)
                    written.add(line)
                    show.round(line)
                    sinks.record(line)
                if course.done == conduct.rounds or course.done % conduct.checkpoint_every == 0:
                    course.save(written.text())
    # Once more as strictly as on resuming: in a long run somebody may have moved the file away.
    summary = report.summarize(records.resume(log, conduct.rounds, written.text())) if leads else {}
    served = course.served()
    if served is not None:
        served = served._replace(net=hosts.here(served.net))
    return Outcome(course.algorithm, course.plan, hosts.here(course.state), summary, served)


def _checkpoints(directory: Path) -> Checkpoints | SharedCheckpoints:
    if not hosts.several():
        return Checkpoints(directory)
    return SharedCheckpoints(Checkpoints(directory) if hosts.leader() else None, directory)


def dropped(line: dict, noise: bool = False) -> str:
    """What is said of a round in which replies were left out; `noise`: the server moves all the same."""
    left, whole = line["dropped"], len(line["dropped"]) == len(line["cohort"])
    who = f"client{'s' if len(left) > 1 else ''} {', '.join(map(str, left))}"
    stays = "; nobody is left, so " + ("it is noise alone" if noise else "the server stays as it was") if whole else ""
    return f"round {line['round']}: left out {who}, whose reply was not finite{stays}"
