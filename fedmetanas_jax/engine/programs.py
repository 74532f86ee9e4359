"""The compiled programs of one algorithm."""

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedmetanas_jax import tree
from fedmetanas_jax.core import Algorithm, Array, FederatedData, Net, RoundState
from fedmetanas_jax.engine import evaluate, hosts
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.engine.kept import Kept
from fedmetanas_jax.engine.mesh import ALL, OWN, devices_of, free_bytes, padded, told
from fedmetanas_jax.engine.round import make_round

NUMBERS = itertools.count()
EVALUATION = "evaluation"  # of the network that serves everybody or, where there is none, of clients' own
OF_CLIENTS = "evaluation of clients' networks"  # where these have another form
BY = "evaluation by bn_eval="  # and which: programs of `Programs.server_accuracy_by`


class Answers(NamedTuple):
    """What a network makes of some images."""

    correct: np.ndarray  # [q] bool
    loss: np.ndarray  # [q] float32, nats
    net: Net  # with the statistics that it had


class Programs:
    """The compiled programs of one algorithm; compiling is announced, and the seconds that a run waits for it are kept.

    `later` names those that will be needed after rounds: they are compiled in a thread, beside the round.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        conduct: Conduct,
        data: FederatedData,
        mesh: Mesh | None,
        hosted: bool,
        at_once: int | None,
        say: Callable,
        later: Sequence[str] = (),
        kept: Kept | None = None,
        of: str = "",
    ):
        """`at_once` is what was chosen for this algorithm before, None if nothing was. kept: programs, also of other
        runs; `of` says which algorithm of theirs this one is."""
        self.algorithm, self.conduct, self.data, self.mesh = algorithm, conduct, data, mesh
        self.hosted, self.say = hosted, say
        self._divides = evaluate.dividing(mesh, batch=conduct.eval_batch, bn_eval=conduct.bn_eval)
        self.at_once = conduct.at_once if conduct.at_once >= 0 else at_once
        self._number = next(NUMBERS)  # the same on all processes
        self.seconds = self.seconds_ahead = 0.0
        self.measured: Answers | None = None  # by `accuracies`, the last time
        self._compiled: dict = {}
        self._personal: dict[int, Callable] = {}  # by at_once, so that it is traced once
        self._kept, self._of = kept or Kept(), of
        self._later, self._begun, self._thread, self._first = later, {}, ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._traced: Future = Future()  # once the round is
        self.meanwhile: Callable = lambda: None  # done once: beside the first program's compiling, or before
        # Small, but operation by operation they would be compiled a hundred times over.
        self.global_model, self.discrete_model, self.report = (
            jax.jit(made) if made else None
            for made in (algorithm.global_model, algorithm.discrete_model, algorithm.report)
        )

    def __call__(self, name: str, *arguments):
        if name not in self._compiled:
            self.say(f"compiling the {name} (kept in {jax.config.jax_compilation_cache_dir} for the next run) ...")
            start = time.perf_counter()
            begun = self._begun.pop(name, None)
            if begun is not None:  # what is yet to be traced is Python, too, which does one thing at a time
                wait([self._traced, begun], return_when=FIRST_COMPLETED)
            self.meanwhile, meanwhile = lambda: None, self.meanwhile
            meanwhile()
            self._compiled[name] = self._compile(name, *arguments) if begun is None else begun.result()
            hosts.meet()  # so that waiting for a slower process counts as compiling and not as the round
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self.say(f"compiled the {name} in {seconds:.1f} s" + (", the rest of it meanwhile" if begun else ""))
        return self._compiled[name](*arguments)

    def compile_ahead(self, state: RoundState, names: Sequence[str]) -> None:
        """Compiles these programs before the first one is due; `state` may be its shapes."""
        start = time.perf_counter()
        for name in names:
            self._compiled[name] = self._prepared(name, state)
        self.seconds_ahead = time.perf_counter() - start

    def foresee(self, state: RoundState) -> None:
        """Has the round compiled in a thread, from the shapes of the first state, which is made meanwhile.

        Not where the number of clients that fit has yet to be found: several processes agree on that in their order.
        """
        if self.at_once is not None:
            self._begun["round"] = self._first.submit(self._prepared, "round", told(state, self.mesh, False))

    def _begin(self, state: RoundState) -> None:
        """Has what is needed later compiled in a thread: once the round is traced, since two threads that trace, which
        is Python, would wait for one another."""
        if not self._traced.done():
            self._traced.set_result(None)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        there = self._compiled.keys() | self._begun.keys()
        for name in self._later:
            known = name != "adaptation" or self.at_once is not None  # the round has yet to find how many fit
            if known and name not in there:
                self._begun[name] = self._thread.submit(self._prepared, name, told(state, self.mesh, self.hosted))
                if name == EVALUATION:
                    self._thread.submit(self._around_evaluation, told(state, self.mesh, self.hosted))

    def _around_evaluation(self, state: RoundState) -> None:
        """Compiles the small programs of an evaluation, seconds together. What is wrong is said when it is due."""
        for made in (self.global_model, self.discrete_model):
            if made is not None:
                made.lower(state.server).compile()  # jit finds it when it is called alike
        if self.conduct.bn_eval == "recalibrated":
            given = self.data, state.seed, jax.ShapeDtypeStruct((), jnp.int32)
            evaluate.draw.lower(*given, self.conduct.cohort, evaluate.CALIBRATION).compile()
        if self.global_model is not None:
            evaluate.local_summary.lower(jax.ShapeDtypeStruct(self.data.central.shape, bool), self.data).compile()

    def _prepared(self, name: str, state: RoundState):
        """The program, before what it will be given is there; of a state its shapes are enough."""
        return self._compile(name, *self._to_come(name, state))

    def _to_come(self, name: str, state: RoundState) -> tuple:
        """The shapes of what a program will be given, from those of a state."""

        def rows(count: int, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return self._shaped((count,), jnp.int32, spec)

        number = jax.ShapeDtypeStruct((), jnp.int32)
        if name == "round":
            return state, self.data, number
        clients = rows(self.portion() * devices_of(self.mesh), OWN)
        if name == "adaptation":
            return state, clients, self.data, number, number
        if self.algorithm.global_model is not None:
            net = jax.eval_shape(self.algorithm.global_model, state.server)
        else:
            net = jax.eval_shape(self._made("adaptation", self.at_once or 0), state, clients, self.data, number, number)
            net = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), net)
        net = jax.tree.map(lambda x: self._shaped(x.shape, x.dtype, ALL), net)
        spec = ALL if self._divides is None else OWN
        places = rows(padded(self._places(), self._divides), spec)
        recalibrates = self.conduct.bn_eval == "recalibrated"
        seen = evaluate.Drawn(rows(evaluate.CALIBRATION, spec), number) if recalibrates else None
        return net, self.data, places, number, seen

    def portion(self) -> int:
        """Clients of a device that `adaptation` makes the networks of at a time: as many as of a cohort, so that no
        more of these are there at once than a round has."""
        return -(-self.conduct.cohort // devices_of(self.mesh))

    def _shaped(self, shape: tuple[int, ...], dtype, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        where = None if self.mesh is None else NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def _compile(self, name: str, *arguments):
        wanted = self._of, name, self.at_once if name in ("round", "adaptation") else None, *tree.form(arguments)
        found = self._kept.get(wanted)
        if found is None:
            found = self._compile_anew(name, *arguments), self.at_once
            self._kept.put(wanted, found)
        elif name == "round":
            self.at_once = found[1]
            self._begin(arguments[0])
        return found[0]

    def _compile_anew(self, name: str, *arguments):
        if name == "round" and self.at_once is None:
            return self._compile_as_many_as_fit(*arguments)
        lowered = _lowered(self._made(name, self.at_once or 0), *arguments)
        if name == "round":
            self._begin(arguments[0])
        return lowered.compile()

    def _made(self, name: str, at_once: int) -> Callable:
        conduct, common = self.conduct, {"at_once": at_once, "mesh": self.mesh}
        sizes = {"batch": conduct.eval_batch, "bn_eval": conduct.bn_eval}
        if name == "round":
            shape = {"cohort_size": conduct.cohort, "block": conduct.block, "hosted": self.hosted}
            shape["aggregate"] = conduct.aggregate
            return make_round(self.algorithm, **shape, **common)
        if name in (EVALUATION, OF_CLIENTS):
            return evaluate.make_evaluate(self.algorithm, **sizes, mesh=self._divides)
        if name.startswith(BY):
            return evaluate.make_evaluate(self.algorithm, **sizes | {"bn_eval": name.removeprefix(BY)})
        if at_once not in self._personal:
            self._personal[at_once] = evaluate.make_personal(self.algorithm, **common)
        return self._personal[at_once]

    def _compile_as_many_as_fit(self, *arguments):
        """The round with all of a device's clients in one vmap or, where XLA says that this takes more than the
        memory that is free, with as many as its figure lets expect to fit."""
        devices = devices_of(self.mesh)
        clients = at_once = -(-self.conduct.cohort // devices)
        while True:
            lowered = _lowered(self._made("round", at_once), *arguments)
            self._begin(arguments[0])
            compiled = lowered.compile()
            needed, room = compiled.memory_analysis().temp_size_in_bytes, free_bytes()
            fits = room is None or needed <= room or at_once == 1
            fewer = at_once if fits else min(at_once - 1, max(1, int(at_once * room / needed)))
            fewer = hosts.least(fewer, f"at_once of programs {self._number}")
            if fewer == at_once:
                break
            at_once = fewer
        self.at_once = at_once
        free = "" if room is None else f" of {room / 1e9:.3g} GB free"
        self.say(f"{at_once} of a device's {clients} clients at once: {needed / 1e9:.3g} GB{free} (config.at_once)")
        return compiled

    def spent_compiling(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def accuracies(self, net: Net, state: RoundState) -> tuple[float, dict, float]:
        """(server accuracy, local accuracies without adaptation, loss) of one network for everybody, which is what was
        `measured` then, on each of the server's test images."""
        self.measured = self.answers(net, self.data.central, self.calibration(state))
        correct, loss, _ = self.measured
        local = evaluate.local_summary(correct, self.data)
        return float(np.mean(correct)), floats(local), float(np.mean(loss))

    def server_accuracy_by(self, bn_eval: str, net: Net, state: RoundState) -> float:
        """Of one network for everybody, by these statistics (see `evaluate`), whatever the run's own evaluations use.

        Where it is another program every device does the whole of it: this is asked once in a run.
        """
        if bn_eval == self.conduct.bn_eval:
            return self.accuracies(net, state)[0]
        if bn_eval == "running" and self.conduct.bn_eval == "recalibrated":
            seen = evaluate.none_of(self.calibration(state))
            return float(np.mean(self.answers(net, self.data.central, seen).correct))
        rows = np.asarray(self.data.central)
        seen = self._drawn(state, self.conduct.cohort, evaluate.CALIBRATION)
        found = self(f"{BY}{bn_eval}", net, self.data, rows, jnp.int32(len(rows)), seen)
        return float(np.mean(found.correct))

    def judges(self, state: RoundState) -> np.ndarray:
        """Rows of the pool that an event is judged by: training images drawn from all clients' in this round, no
        client's twice."""
        drawn = self._drawn(state, self.conduct.clients, evaluate.JUDGES)
        return drawn.rows[: int(drawn.distinct)]

    def calibration(self, state: RoundState) -> evaluate.Drawn | None:
        """What batch norm is recalibrated by after this round, dealt to the devices; None where it is not."""
        if self.conduct.bn_eval != "recalibrated":
            return None
        drawn = self._drawn(state, self.conduct.cohort, evaluate.CALIBRATION)
        return evaluate.divided_in_batches(drawn, self._divides, self.conduct.eval_batch)

    def answers(self, net: Net, rows: Array, seen: evaluate.Drawn | None, name: str = EVALUATION) -> Answers:
        """What the network makes of rows [q] of the pool, of which there are at most as many as the program takes.

        seen: of `calibration`; `none_of` it where the net's statistics are those of `Answers.net` already.
        """
        given = evaluate.divided(np.resize(rows, self._places()), self._divides)
        found = self(name, net, self.data, given, jnp.int32(len(rows)), seen)
        correct, loss = (evaluate.in_order(x, self._divides)[: len(rows)] for x in found[:2])
        return Answers(correct, loss, net if seen is None else net._replace(stats=found.stats))

    def _places(self) -> int:
        """Rows that the evaluation takes."""
        return max(len(self.data.central), evaluate.JUDGES)

    def _drawn(self, state: RoundState, clients: int, count: int) -> evaluate.Drawn:
        """Training images of the last round's cohort, were it of so many clients."""
        last = np.int32(max(int(state.round) - 1, 0))
        return jax.tree.map(np.asarray, evaluate.draw(self.data, state.seed, last, clients, count))


def floats(summary: dict) -> dict:
    """Arrays [] as Python numbers, fit for a record."""
    return {name: float(x) for name, x in summary.items()}


def _lowered(program: Callable, *arguments) -> jax.stages.Lowered:
    """The program, traced. That makes a million objects, most of which stay: Python's looking for garbage among them,
    again and again, would be a fifth of its time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return program.lower(*arguments)
    finally:
        if collects:
            gc.enable()
