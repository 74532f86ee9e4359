"""The loop of a run: phases, rounds, evaluation, records, checkpoints; the only place with a clock.

A run is a list of phases (core.Phase). Between two of them the server's state passes through `enter`, which
may prune; the accuracies before and after are recorded with the round that ended the phase. What happens
when is a function of the round's number alone, so a resumed run does what an unbroken one does.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmetanas_jax.core import Algorithm, FederatedData, Net, Phase, RoundState
from fedmetanas_jax.engine import evaluate, records, report
from fedmetanas_jax.engine.checkpoint import Checkpoints
from fedmetanas_jax.engine.mesh import put_data
from fedmetanas_jax.engine.progress import Progress
from fedmetanas_jax.engine.round import init_state, make_round, payload


class Plan(NamedTuple):
    """How a run goes about its rounds; the names are Config's."""

    rounds: int
    seed: int
    clients: int
    cohort: int
    at_once: int
    block: int
    bn_eval: str
    eval_batch: int
    eval_every: int
    adapt_every: int
    final_adapt: bool
    checkpoint_every: int


class Programs:
    """The compiled programs of one algorithm; compiling is announced, and its seconds are kept apart."""

    def __init__(self, algorithm: Algorithm, plan: Plan, data: FederatedData, mesh: Mesh | None, say: Callable):
        self.algorithm, self.plan, self.data, self.say = algorithm, plan, data, say
        self.seconds = 0.0
        common = {"seed": plan.seed, "at_once": plan.at_once, "mesh": mesh}
        sizes = {"batch": plan.eval_batch, "bn_eval": plan.bn_eval}
        self._jitted = {
            "round": make_round(algorithm, cohort_size=plan.cohort, block=plan.block, **common),
            "evaluation": evaluate.make_evaluate(algorithm, **sizes),
            "adaptation": evaluate.make_personal(algorithm, **sizes, **common),
        }
        self._compiled: dict = {}
        # Small, but operation by operation they would be compiled a hundred times over.
        self.global_model, self.discrete_model, self.report = (
            jax.jit(made) if made else None
            for made in (algorithm.global_model, algorithm.discrete_model, algorithm.report)
        )

    def __call__(self, name: str, *arguments):
        if name not in self._compiled:
            self.say(f"compiling the {name} (kept in JAX's cache for the next run) ...")
            start = time.perf_counter()
            self._compiled[name] = self._jitted[name].lower(*arguments).compile()
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self.say(f"compiled the {name} in {seconds:.1f} s")
        return self._compiled[name](*arguments)

    def spent_compiling(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def accuracies(self, net: Net, state: RoundState) -> tuple[float, dict, float]:
        """(server accuracy, local accuracies without adaptation, loss) of one network for everybody."""
        last = jnp.maximum(state.round - 1, 0)
        rows = None
        if self.plan.bn_eval == "recalibrated":
            rows = evaluate.calibration_rows(self.data, self.plan.seed, last, self.plan.cohort)
        correct, loss = self("evaluation", net, self.data, rows)
        local = evaluate.summary(evaluate.local_accuracy(correct, self.data))
        return float(evaluate.server_accuracy(correct)), _floats(local), float(loss)


class Course:
    """Where a run stands: its phase, that phase's programs, and the state between two rounds."""

    def __init__(
        self, phases: list[Phase], data: FederatedData, plan: Plan, mesh: Mesh | None, checkpoints: Checkpoints
    ):
        self.phases, self.plan, self.mesh, self.checkpoints = phases, plan, mesh, checkpoints
        self.data = put_data(data, mesh)
        self._made: dict[str, Algorithm] = {}

    def begin(self, say: Callable[[str], None]) -> None:
        """Restores the newest good checkpoint, or starts at round 0."""
        restored = self.checkpoints.restore_newest(self._template, say)
        if restored is None:
            self.phase, (self.shape, _) = 0, self.phases[0].enter(None)
            state = init_state(self._algorithm_of(0, self.shape), self.plan.seed, self.plan.clients)
        else:
            _, meta, state = restored
            self.phase, self.shape = meta["phase"], meta["plan"]
            say(f"resuming after round {int(state.round)} of {self.plan.rounds}")
        self.done = int(state.round)
        self.state = put_data(state, self.mesh)
        self._load_programs(say)

    def advance(self, limit: int) -> list[dict]:
        """Runs the rounds up to the next one after which the host has something to do -> their records."""
        start, stop = self.done, self._next_stop(limit)
        clock = time.perf_counter()
        self.state, metrics = self.programs("round", self.state, self.data, jnp.int32(stop))
        metrics = jax.tree.map(np.asarray, metrics)  # waits for the device
        seconds = (time.perf_counter() - clock - self.programs.seconds) / (stop - start)
        report.check_finite(metrics, start, stop, self.checkpoints.candidates())
        self.done = stop
        return report.lines(metrics, start, stop, seconds, self.phase, self.algorithm, self.bytes_a_client)

    def evaluate(self, line: dict) -> None:
        """Adds what is due after this round to its record."""
        plan = self.plan
        if _due(self.done, plan.eval_every, plan.rounds) and self.programs.global_model is not None:
            net = self.programs.global_model(self.state.server_state)
            server, local, loss = self.programs.accuracies(net, self.state)
            line |= {"server_accuracy": server, "local_accuracy": local, "server_loss": loss}
            if self.programs.discrete_model is not None:
                discrete = self.programs.discrete_model(self.state.server_state)
                # Once a single operation an edge is left the two are one network.
                same = bool(jnp.array_equal(discrete.mix, net.mix))
                line["server_accuracy_discrete"] = server if same else self.programs.accuracies(discrete, self.state)[0]
        if _due(self.done, plan.adapt_every, plan.rounds if plan.final_adapt else None):
            accuracy = self.programs("adaptation", self.state, self.data)
            line["local_accuracy_adapted"] = _floats(evaluate.summary(accuracy))

    def enter_next_phase(self, line: dict, say: Callable[[str], None]) -> float:
        """If the next phase starts here, enters it and records the accuracy on both sides of the step.

        Returns the seconds of compiling that the old phase's programs still had to account for.
        """
        if self.phase + 1 == len(self.phases) or self.phases[self.phase + 1].start != self.done:
            return 0.0
        before = after = line.get("server_accuracy") or self._server_accuracy()
        seconds = self.programs.spent_compiling()
        self.phase += 1
        self.shape, server_state = self.phases[self.phase].enter(self.state.server_state)
        self.state = put_data(self.state._replace(server_state=server_state), self.mesh)
        if self._algorithm_of(self.phase, self.shape) is not self.algorithm:
            self._load_programs(say)
            after = self._server_accuracy()
        line |= {"event": "prune", "event_accuracy_before": before, "event_accuracy_after": after}
        line |= {f"event_{name}": float(x) for name, x in self.programs.report(server_state).items()}
        say(f"pruned after round {self.done}: server accuracy {before:.4f} -> {after:.4f}")
        return seconds

    def save(self) -> None:
        """A checkpoint of this moment, unless there is one."""
        if self.done not in self.checkpoints.candidates():
            self.checkpoints.save(self.done, self.state, {"phase": self.phase, "plan": self.shape})

    def _algorithm_of(self, phase: int, shape) -> Algorithm:
        key = f"{id(self.phases[phase].make)} {json.dumps(shape)}"
        if key not in self._made:
            self._made[key] = self.phases[phase].make(shape)
        return self._made[key]

    def _template(self, meta: dict) -> RoundState:
        algorithm = self._algorithm_of(meta["phase"], meta["plan"])
        return jax.eval_shape(lambda: init_state(algorithm, self.plan.seed, self.plan.clients))

    def _load_programs(self, say: Callable[[str], None]) -> None:
        self.algorithm = self._algorithm_of(self.phase, self.shape)
        self.programs = Programs(self.algorithm, self.plan, self.data, self.mesh, say)
        self.bytes_a_client = payload(self.algorithm, self.state, self.data)

    def _server_accuracy(self) -> float:
        return self.programs.accuracies(self.programs.global_model(self.state.server_state), self.state)[0]

    def _next_stop(self, limit: int) -> int:
        plan, done = self.plan, self.done
        stops = [plan.rounds, limit, done + plan.block]
        for every in (plan.eval_every, plan.adapt_every, plan.checkpoint_every):
            if every:
                stops.append(done - done % every + every)
        stops += [phase.start for phase in self.phases]
        return min(stop for stop in stops if stop > done)


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


def _due(done: int, every: int, last: int | None) -> bool:
    return done == last or (every > 0 and done % every == 0)


def _floats(summary: dict) -> dict:
    return {name: float(x) for name, x in summary.items()}
