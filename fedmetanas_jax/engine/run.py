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
    stopping = _Interrupt()
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints, stopping:
        made: dict[str, Algorithm] = {}

        def algorithm_of(phase: int, shape) -> Algorithm:
            key = f"{id(phases[phase].make)} {json.dumps(shape)}"
            if key not in made:
                made[key] = phases[phase].make(shape)
            return made[key]

        def template(meta: dict):
            algorithm = algorithm_of(meta["phase"], meta["plan"])
            return jax.eval_shape(lambda: init_state(algorithm, plan.seed, plan.clients))

        notes: list[str] = []
        restored = checkpoints.restore_newest(template, notes.append)
        if restored is None:
            phase, (shape, _) = 0, phases[0].enter(None)
            algorithm = algorithm_of(0, shape)
            state = init_state(algorithm, plan.seed, plan.clients)
        else:
            _, meta, state = restored
            phase, shape = meta["phase"], meta["plan"]
            algorithm = algorithm_of(phase, shape)
            notes.append(f"resuming after round {int(state.round)} of {plan.rounds}")
        done = first = int(state.round)
        records.truncate(log, done)
        state, data = put_data((state, data), mesh)

        with progress(plan.rounds, done) as show:
            for note in notes:
                show.say(note)
            programs = Programs(algorithm, plan, data, mesh, show.say)
            bytes_a_client = payload(algorithm, state, data)
            while done < plan.rounds:
                if stopping.asked or (stop_after is not None and done - first >= stop_after):
                    _save(checkpoints, done, state, phase, shape)
                    show.say(f"stopped after round {done} of {plan.rounds}; to go on: {go_on}")
                    if stopping.asked:
                        raise KeyboardInterrupt
                    return None
                limit = plan.rounds if stop_after is None else first + stop_after
                stop = _next_stop(done, plan, phases, phase, limit)
                programs.say = show.say
                start = time.perf_counter()
                state, metrics = programs("round", state, data, jnp.int32(stop))
                metrics = jax.tree.map(np.asarray, metrics)  # waits for the device
                compiling = programs.spent_compiling()
                seconds = (time.perf_counter() - start - compiling) / (stop - done)
                lines = report.lines(metrics, done, stop, seconds, phase, algorithm, bytes_a_client)
                report.check_finite(metrics, done, stop, checkpoints.candidates())
                done = stop

                last = lines[-1]
                if _due(done, plan.eval_every, plan.rounds):
                    _evaluate(programs, state, last)
                if _due(done, plan.adapt_every, plan.rounds if plan.final_adapt else None):
                    accuracy = programs("adaptation", state, data)
                    last["local_accuracy_adapted"] = _floats(evaluate.summary(accuracy))
                if phase + 1 < len(phases) and phases[phase + 1].start == done:
                    before = last.get("server_accuracy")
                    before = _server_accuracy(programs, state) if before is None else before
                    compiling += programs.spent_compiling()
                    phase += 1
                    shape, server_state = phases[phase].enter(state.server_state)
                    next_algorithm = algorithm_of(phase, shape)
                    state = put_data(state._replace(server_state=server_state), mesh)
                    after = before
                    if next_algorithm is not algorithm:
                        algorithm = next_algorithm
                        programs = Programs(algorithm, plan, data, mesh, show.say)
                        bytes_a_client = payload(algorithm, state, data)
                        after = _server_accuracy(programs, state)
                    last |= {"event": "prune", "event_accuracy_before": before, "event_accuracy_after": after}
                    last |= {f"event_{name}": float(x) for name, x in algorithm.report(server_state).items()}
                    show.say(f"pruned after round {done}: server accuracy {before:.4f} -> {after:.4f}")
                lines[0]["compile_seconds"] = compiling + programs.spent_compiling()
                for line in lines:
                    records.append(log, line)
                    show.round(line)
                if done == plan.rounds or done % plan.checkpoint_every == 0:
                    _save(checkpoints, done, state, phase, shape)
    return algorithm, state, report.summarize(records.read(log))


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


def _next_stop(done: int, plan: Plan, phases: list[Phase], phase: int, limit: int) -> int:
    """The round up to which nothing needs the host."""
    stops = [plan.rounds, limit, done + plan.block]
    for every in (plan.eval_every, plan.adapt_every, plan.checkpoint_every):
        if every:
            stops.append(done - done % every + every)
    if phase + 1 < len(phases):
        stops.append(phases[phase + 1].start)
    return min(stop for stop in stops if stop > done)


def _due(done: int, every: int, last: int | None) -> bool:
    return done == last or (every > 0 and done % every == 0)


def _evaluate(programs: Programs, state: RoundState, line: dict) -> None:
    algorithm, server_state = programs.algorithm, state.server_state
    if algorithm.global_model is None:
        return
    net = algorithm.global_model(server_state)
    line["server_accuracy"], line["local_accuracy"], line["server_loss"] = programs.accuracies(net, state)
    if algorithm.discrete_model is not None:
        discrete = algorithm.discrete_model(server_state)
        same = bool(jnp.array_equal(discrete.mix, net.mix))  # so they are once a single operation an edge is left
        line["server_accuracy_discrete"] = line["server_accuracy"] if same else programs.accuracies(discrete, state)[0]


def _server_accuracy(programs: Programs, state: RoundState) -> float:
    return programs.accuracies(programs.algorithm.global_model(state.server_state), state)[0]


def _save(checkpoints: Checkpoints, done: int, state: RoundState, phase: int, shape) -> None:
    if done not in checkpoints.candidates():
        checkpoints.save(done, state, {"phase": phase, "plan": shape})


def _floats(summary: dict) -> dict:
    return {name: float(x) for name, x in summary.items()}
