"""Where a run stands between two rounds, and the steps from one such place to the next."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmetanas_jax import tree
from fedmetanas_jax.core import Algorithm, FederatedData, Phase, RoundState
from fedmetanas_jax.engine import client_states, evaluate, report
from fedmetanas_jax.engine.checkpoint import Checkpoints
from fedmetanas_jax.engine.mesh import OWN, padded, placed, put_data, put_state
from fedmetanas_jax.engine.programs import Plan, Programs, floats
from fedmetanas_jax.engine.round import cohort, init_state, payload, state_shapes


class Course:
    """Where a run stands: its phase, that phase's programs, and the state between two rounds."""

    def __init__(
        self, phases: list[Phase], data: FederatedData, plan: Plan, mesh: Mesh | None, checkpoints: Checkpoints
    ):
        self.phases, self.plan, self.mesh, self.checkpoints = phases, plan, mesh, checkpoints
        self.data = put_data(data, mesh)
        self._made: dict[str, Algorithm] = {}
        self._compiler, self._ahead = ThreadPoolExecutor(1), None
        self.at_once = None  # as chosen for this phase before the run was broken off: another choice, other bits

    def begin(self, say: Callable[[str], None]) -> None:
        """Restores the newest good checkpoint, or starts at round 0."""
        restored = self.checkpoints.restore_newest(self._template, say)
        if restored is None:
            self.phase, (self.shape, _) = 0, self.phases[0].enter(None, None)
            algorithm = self._algorithm_of(0, self.shape)
            self._place_client_states(algorithm, say)
            self.state = init_state(algorithm, self.plan.seed, self.plan.clients, self.mesh, self.hosted)
        else:
            _, meta, state = restored
            self.phase, self.shape, self.at_once = meta["phase"], meta["plan"], meta["at_once"]
            self._place_client_states(self._algorithm_of(self.phase, self.shape), say)
            say(f"resuming after round {int(state.round)} of {self.plan.rounds}")
            self.state = state if self.hosted else put_state(state, self.mesh)
        self.done = int(self.state.round)
        self._load_programs(say)
        self._look_ahead(say)

    def advance(self, limit: int) -> list[dict]:
        """Runs the rounds up to the next one after which the host has something to do -> their records."""
        start, stop = self.done, self._next_stop(limit)
        clock = time.perf_counter()
        if self.hosted:
            metrics = self._round_with_hosted_states()
        else:
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
            depths = evaluate.depths(self.data, plan.batch, plan.epochs)
            found = {steps: floats(evaluate.summary(self._personal(steps))) for steps in {*depths.values()}}
            line["local_accuracy_by_depth"] = {name: found[steps] for name, steps in depths.items()}
            # What the method itself gives its clients.
            line["local_accuracy_adapted"] = found[depths[self.algorithm.depth]]

    def enter_next_phase(self, line: dict, say: Callable[[str], None]) -> float:
        """If the next phase starts here, enters it and records the accuracy on both sides of the step.

        Returns the seconds of compiling that the old phase's programs still had to account for.
        """
        if self.phase + 1 == len(self.phases) or self.phases[self.phase + 1].start != self.done:
            return 0.0
        before = line.get("server_accuracy") or self._server_accuracy()
        seconds = self.programs.spent_compiling()
        self.phase += 1
        self.at_once = None
        phase, clock = self.phases[self.phase], time.perf_counter()
        self.shape, server_state = phase.enter(self.state.server_state, self.shape)
        self.state = self.state._replace(server_state=put_data(server_state, self.mesh))
        if self._algorithm_of(self.phase, self.shape) is not self.algorithm:
            self._load_programs(say)
            line["compile_seconds_ahead"] = self.programs.seconds_ahead
        line["event_stall_seconds"] = time.perf_counter() - clock  # beside the compiling that was not done ahead
        after = self._server_accuracy()
        line |= {"event": phase.event, "event_accuracy_before": before, "event_accuracy_after": after}
        line |= {f"event_{name}": float(x) for name, x in self.programs.report(server_state).items()}
        say(f"{phase.event} after round {self.done}: server accuracy {before:.4f} -> {after:.4f}")
        self._look_ahead(say)
        return seconds

    def _look_ahead(self, say: Callable[[str], None]) -> None:
        """If the next phase's program is known already, starts compiling it beside the rounds that still run."""
        self._ahead = None
        following = self.phases[self.phase + 1 : self.phase + 2]
        if not following or following[0].foresee is None:
            return
        shape = following[0].foresee(self.state.server_state)
        algorithm = self._algorithm_of(self.phase + 1, shape)
        if algorithm is self.algorithm:
            return
        programs = Programs(algorithm, self.plan, self.data, self.mesh, self.hosted, None, say)
        state = state_shapes(algorithm, self.plan.clients, self.mesh, self.hosted)
        if self.hosted:
            chosen = np.arange(self.plan.cohort)
            state = state._replace(client_states=jax.eval_shape(tree.take, state.client_states, chosen))
        say(f"compiling the program of round {following[0].start} meanwhile")
        self._ahead = programs, self._compiler.submit(programs.compile_ahead, placed(state, self.mesh, self.hosted))

    def save(self) -> None:
        """A checkpoint of this moment, unless there is one."""
        if self.done not in self.checkpoints.candidates():
            meta = {"phase": self.phase, "plan": self.shape, "at_once": self.programs.at_once}
            self.checkpoints.save(self.done, self.state, meta)

    def _algorithm_of(self, phase: int, shape) -> Algorithm:
        key = f"{id(self.phases[phase].make)} {json.dumps(shape)}"
        if key not in self._made:
            self._made[key] = self.phases[phase].make(shape)
        return self._made[key]

    def _template(self, meta: dict) -> RoundState:
        algorithm = self._algorithm_of(meta["phase"], meta["plan"])
        self._place_client_states(algorithm, lambda text: None)
        return state_shapes(algorithm, self.plan.clients, self.mesh, self.hosted)

    def _place_client_states(self, algorithm: Algorithm, say: Callable[[str], None]) -> None:
        plan = self.plan
        nbytes = tree.nbytes(state_shapes(algorithm, plan.clients, self.mesh).client_states)
        devices = 1 if self.mesh is None else self.mesh.size
        self.hosted, where = client_states.place(plan.client_states, nbytes, devices)
        if nbytes:
            say(where)
        if self.hosted:  # the host has something to do after every round
            self.plan = plan._replace(block=1)

    def _round_with_hosted_states(self) -> dict:
        chosen = np.asarray(cohort(self.state.seed, self.state.round, self.plan.clients, self.plan.cohort))
        everyone = self.state.client_states
        given = self.state._replace(client_states=put_data(tree.take(everyone, chosen), self.mesh))
        after, metrics = self.programs("round", given, self.data, jnp.int32(self.done + 1))
        client_states.put_on_host(everyone, chosen, after.client_states)
        self.state = after._replace(client_states=everyone)
        return metrics

    def _personal(self, steps: int) -> np.ndarray:
        """[clients]: every client's accuracy with its own network after so many personalising steps."""
        clients, mesh = self.plan.clients, self.mesh
        # What is on the host comes in portions of about a cohort, the last one filled up.
        portion = padded(self.plan.cohort if self.hosted else clients, mesh)
        found = []
        for start in range(0, clients, portion):
            rows = np.arange(start, start + portion, dtype=np.int32)
            state = self.state
            if self.hosted:
                own = put_data(tree.take(state.client_states, rows % clients), mesh, OWN)
                state = state._replace(client_states=own)
            ids = put_data(rows % clients, mesh, OWN)
            found.append(np.asarray(self.programs("adaptation", state, ids, self.data, jnp.int32(steps))))
        return np.concatenate(found)[:clients]

    def _load_programs(self, say: Callable[[str], None]) -> None:
        self.algorithm = self._algorithm_of(self.phase, self.shape)
        if self._ahead is not None and self._ahead[0].algorithm is self.algorithm:
            self.programs, compiling = self._ahead
            compiling.result()  # waits, and raises what went wrong there
        else:
            given = self.plan, self.data, self.mesh, self.hosted, self.at_once
            self.programs = Programs(self.algorithm, *given, say)
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


def _due(done: int, every: int, last: int | None) -> bool:
    return done == last or (every > 0 and done % every == 0)
