"""Where a run stands between two rounds, and the steps from one such place to the next."""

import json
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmetanas_jax import tree
from fedmetanas_jax.core import Algorithm, FederatedData, Net, Phase, RoundState, Tree
from fedmetanas_jax.engine import client_states, hosts, identity, measure, report
from fedmetanas_jax.engine.accountant import Account
from fedmetanas_jax.engine.ahead import Ahead
from fedmetanas_jax.engine.checkpoint import Checkpoints
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.engine.kept import Kept
from fedmetanas_jax.engine.measure import Candidate
from fedmetanas_jax.engine.mesh import devices_of, put_data
from fedmetanas_jax.engine.programs import Programs
from fedmetanas_jax.engine.round import cohort, everyones, init_state, state_shapes, stream_key
from fedmetanas_jax.engine.shared_checkpoints import SharedCheckpoints
from fedmetanas_jax.engine.timetable import Timetable, falls_due

SAVED = ("phase", "plan", "at_once", "entered", "put_off")  # of a Course, beside its state and what a program costs


class Served(NamedTuple):
    """The network that a run leaves, as it was measured."""

    net: Net  # with the statistics that it was measured with
    loss: np.ndarray  # [q] of each of the server's test images, nats
    plan: object  # of the algorithm that it is of


class Course(Timetable):
    """Where a run stands: its phase, the plan and the programs of that, and the state between two rounds."""

    def __init__(
        self,
        phases: list[Phase],
        data: FederatedData,
        conduct: Conduct,
        mesh: Mesh | None,
        checkpoints: Checkpoints | SharedCheckpoints,
        run: dict,
        kept: Kept | None = None,
    ):
        """kept: the programs of runs that differ from this one in seed or split alone."""
        super().__init__(phases, conduct)
        self.mesh, self.checkpoints = mesh, checkpoints
        self.run = run  # its identity, which every checkpoint notes
        self.data = put_data(data, mesh)
        self._ahead, self._kept = Ahead(), kept or Kept()
        self.at_once = None  # as chosen for this phase before the run was broken off: another choice, other bits
        self.lost = 0  # replies that were left out so far for not being finite
        self._served: Served | None = None
        self.records: str | None = None  # digest of the records up to the checkpoint that was restored
        noise = conduct.aggregate.noise
        self.account = None if noise is None else Account(noise, conduct.clients, conduct.cohort)

    def begin(self, say: Callable[[str], None]) -> bool:
        """Restores the newest good checkpoint -> whether there was one; else a new run is at hand, to `start`.

        CheckpointError: there are checkpoints, but none is good, or that one is another run's.
        """
        restored = self.checkpoints.restore_newest(self._template, say)
        if restored is None:
            self.phase, (self.plan, _) = 0, self.phases[0].enter(None, None, self._phase_key(0))
            self._place_owns(self._algorithm_of(0, self.plan), say)
            self.done = 0
            self._load_programs(say)
            return False
        _, meta, state = restored
        for name in SAVED:
            setattr(self, name, meta[name])
        self.worth.restore(meta)
        self.records = meta.get("records")
        self._place_owns(self._algorithm_of(self.phase, self.plan), say)
        say(f"resuming after round {int(state.round)} of {self.conduct.rounds}")
        self.state = state if self.hosted else client_states.divided(state, self.conduct.clients, self.mesh)
        self.done = int(state.round)
        self._load_programs(say)
        self._move_on({}, say, resumed=True)
        return True

    def start(self) -> None:
        """Makes the state before round 0."""
        self._foresee_round()
        self.state = init_state(self.algorithm, self.conduct.seed, self.conduct.clients, self.mesh, self.hosted)
        self._move_on({}, self.programs.say)

    def _foresee_round(self) -> None:
        """Has the round compiled while the first state is made."""
        if not self.hosted:
            self.programs.foresee(state_shapes(self.programs.algorithm, self.conduct.clients, self.mesh))

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
        saved, allowed = self.checkpoints.candidates(), self.conduct.aggregate.allowed
        self.lost = report.check_finite(metrics, start, stop, saved, self.lost, allowed)
        self.done = stop
        lines = report.lines(metrics, start, stop, seconds, self.phase, self.algorithm)
        self.worth.add(lines)
        if self.account is not None:
            self.account.add([line["noised_parts"] for line in lines])
        return lines

    def evaluate(self, line: dict) -> None:
        """Adds what is due after this round to its record."""
        conduct = self.conduct
        if self._measures():
            line |= measure.networks(self.programs, self.state)
            self._served = self._measured()
            if self.account is not None:
                line |= self.account.spent(self.done)
        if falls_due(self.done, conduct.adapt_every, conduct.rounds if conduct.final_adapt else None):
            self._prepare_to_adapt(line)
            line |= measure.adapted(self.programs, self.state)

    def _prepare_to_adapt(self, line: dict) -> None:
        """At the end of a run whose last rounds were left to a supernet's program, moves to the discrete network's: the
        supernet's for adapting takes longest of all to compile."""
        if self.done == self.conduct.rounds:
            clock = time.perf_counter()
            before = self._move_on(line, self.programs.say)
            self.programs.seconds += before + time.perf_counter() - clock

    def served(self) -> Served | None:
        """At the end: the network that serves everybody, pruned where the method prunes; None where there is none."""
        if self._served is None and self.programs.measured is None:  # a run that had ended before
            measure.networks(self.programs, self.state)
        return self._served or self._measured()

    def _measured(self) -> Served | None:
        measured = self.programs.measured
        return None if measured is None else Served(measured.net, measured.loss, self.plan)

    def cost(self, before: Candidate, after: Candidate) -> float:
        """Accuracy on clients' training images that is lost from the one network to the other."""
        return before.training_accuracy() - after.training_accuracy()

    def enter_next_phase(self, line: dict, say: Callable[[str], None]) -> float:
        """If the next phase, or a smaller program, is due here, enters it and records what that did.

        Returns the seconds of compiling that the old programs still had to account for.
        """
        if self.done != self._due():
            return self._move_on(line, say)
        self._settle(self.state.server)
        phase, key = self.phases[self.phase + 1], self._phase_key(self.phase + 1)
        if phase.ends:
            line |= measure.ended(self.programs, self.state, phase.ends, line)
        old, new = Candidate(self.programs, self.state, self.state.server), None
        before = line.get("server_accuracy") or old.server_accuracy()
        seconds, clock = self.programs.spent_compiling(), time.perf_counter()
        plan, server = phase.enter(self.state.server, self.plan, key)
        if server is None:
            server, _ = jax.jit(self._algorithm_of(self.phase + 1, plan).init)(key)
        if phase.shared is not None and self._shares():
            plan, server = phase.shared(server, plan)
        if phase.tolerance is not None:
            new = Candidate(self.programs, self.state, server)
            cost = 0.0 if new.net is None else self.cost(old, new)
            line["event_cost_on_training_images"] = cost
            if cost > phase.tolerance:
                return seconds + self._wait(phase, cost, line, say)
        self.phase, self.entered, self.plan, self.at_once, self.put_off = self.phase + 1, self.done, plan, None, None
        self.worth.stays = self._stays(server)
        self._enter(server, line, say)
        stalled = time.perf_counter() - clock
        # By the program that is there, as a smaller one is yet to be compiled. Weights that start anew have none.
        after = None
        if not phase.ends:
            same = new is not None and new.programs is self.programs
            new = new if same else Candidate(self.programs, self.state, self.state.server)
            after = new.server_accuracy()
        clock = time.perf_counter() - stalled
        seconds += self._move_on(line, say)
        line["event_stall_seconds"] = time.perf_counter() - clock  # beside the compiling that was not done ahead
        line |= measure.event(self.programs, self.state, phase.event, before, after)
        accuracy = "" if before is None or after is None else f": server accuracy {before:.4f} -> {after:.4f}"
        say(f"{phase.event} after round {self.done}{accuracy}")
        return seconds

    def _wait(self, phase: Phase, cost: float, line: dict, say: Callable[[str], None]) -> float:
        """Puts a phase off: the next one comes in its place or, where it is the last, it is tried again later."""
        if self.phase + 2 < len(self.phases):
            self.phase, self.entered = self.phase + 1, self.done
        else:
            self.put_off = self.done + max(1, self.conduct.rounds // 50)
        line["event_put_off"] = phase.event
        until = self._due()
        say(
            f"{phase.event} after round {self.done} is put off until round {until}: it would cost {cost:.4f} of the "
            f"accuracy on training images, and may cost {phase.tolerance:g}"
        )
        return self._move_on(line, say)

    def save(self, records: str | None = None) -> None:
        """A checkpoint of this moment, unless there is one. What clients keep is saved once a client.

        records: digest of the records so far.
        NonFiniteError: the server is not finite, and the checkpoint before stays the newest one.
        """
        saved = self.checkpoints.candidates()
        if self.done not in saved:
            report.check_server(self.state.server, self.done, saved)
            meta = {name: getattr(self, name) for name in SAVED} | self.worth.saved()
            meta |= {"at_once": self.programs.at_once, "run": self.run, "records": records}
            owns = jax.tree.map(lambda x: x[: self.conduct.clients], hosts.gathered(self.state.owns))
            self.checkpoints.save(self.done, self.state._replace(owns=owns), meta)

    def _move_on(self, line: dict, say: Callable[[str], None], resumed: bool = False) -> float:
        """Moves to the smallest program that the server calls for, if that is due; else has it compiled meanwhile.

        It is due `compile_ahead` rounds after the event that called for it, unless the next phase comes before, or at
        the end (`_stays`): a function of the round's number, so that a resumed run does what an unbroken one does. It
        is decided there and then; only a run that was resumed with a shorter wait, past its last event, catches up.
        """
        phase, due = self.phases[self.phase], self._smaller_from()
        late = resumed and self._is_last()
        if due is None or not (self.done in (self.entered, due) or (resumed and self.done < due) or late):
            return 0.0
        plan = phase.smaller(self.state.server)
        if json.dumps(plan) == json.dumps(self.plan) or not self._pays(plan):
            return 0.0
        if self.done < due:
            if names := self._at(due):
                given = self._algorithm_of(self.phase, plan), self.conduct, self.data, self.mesh, self.hosted
                self._ahead.compile(*given, names, due, say)
            return 0.0
        seconds = self.programs.spent_compiling()
        server, self.plan = phase.carry(self.state.server, self.plan, plan), plan
        self._enter(server, line, say)
        return seconds

    def _enter(self, server: Tree, line: dict, say: Callable[[str], None]) -> None:
        """Goes on with this server under self.plan; clients start anew where what they keep has another form."""
        self.state = self.state._replace(server=put_data(server, self.mesh))
        algorithm = self._algorithm_of(self.phase, self.plan)
        if algorithm is self.algorithm:
            return
        self.worth.begin()
        wanted = jax.eval_shape(algorithm.init, jax.random.key(0))[1]
        if tree.form(wanted) != tree.form(jax.eval_shape(lambda x: tree.take(x, 0), self.state.owns)):
            self._place_owns(algorithm, say)
            own = jax.jit(algorithm.init)(self._phase_key(self.phase))[1]
            fresh = self.state._replace(owns=everyones(own, self.conduct.clients))
            self.state = client_states.put_fresh(fresh, self.conduct.clients, self.mesh, self.hosted)
            say(f"what clients keep has another form from round {self.done + 1} on: all start anew")
        self._load_programs(say)
        line["compile_seconds_ahead"] = self.programs.seconds_ahead

    def _phase_key(self, phase: int):
        return stream_key(self.conduct.seed, "phase", phase)

    def _template(self, meta: dict) -> RoundState:
        identity.check(meta.get("run"), self.run, self.checkpoints.directory)
        algorithm = self._algorithm_of(meta["phase"], meta["plan"])
        self._place_owns(algorithm, lambda text: None)
        return state_shapes(algorithm, self.conduct.clients, None, self.hosted)

    def _place_owns(self, algorithm: Algorithm, say: Callable[[str], None]) -> None:
        nbytes = tree.nbytes(state_shapes(algorithm, self.conduct.clients, self.mesh).owns)
        devices = devices_of(self.mesh)
        self.hosted, where = client_states.place(self.conduct.client_states, nbytes, devices)
        if nbytes:
            say(where)
        if self.hosted:  # the host has something to do after every round
            self.conduct = self.conduct._replace(block=1)

    def _round_with_hosted_states(self) -> dict:
        conduct, everyone = self.conduct, self.state.owns
        chosen = np.asarray(cohort(self.state.seed, self.state.round, conduct.clients, conduct.cohort))
        given = self.state._replace(owns=put_data(tree.take(everyone, chosen), self.mesh))
        after, metrics = self.programs("round", given, self.data, jnp.int32(self.done + 1))
        client_states.put_on_host(everyone, chosen, after.owns)
        self.state = after._replace(owns=everyone)
        return metrics

    def _load_programs(self, say: Callable[[str], None]) -> None:
        self.algorithm = self._algorithm_of(self.phase, self.plan)
        self.programs = self._ahead.take(self.algorithm)
        if self.programs is None:
            given = self.conduct, self.data, self.mesh, self.hosted, self.at_once
            of = json.dumps([self.phase, self.plan])
            self.programs = Programs(self.algorithm, *given, say, self._later(), self._kept, of)
