"""The compiled programs of one algorithm, and how a run goes about its rounds."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fedmetanas_jax.core import Aggregate, Algorithm, Array, FederatedData, Net, RoundState
from fedmetanas_jax.engine import evaluate
from fedmetanas_jax.engine.mesh import OWN, free_bytes, padded, put_data
from fedmetanas_jax.engine.round import MEAN, make_round


class Conduct(NamedTuple):
    """How a run goes about its rounds; the names are Config's."""

    rounds: int
    seed: int
    clients: int
    cohort: int
    batch: int
    epochs: int
    at_once: int  # -1: as many as the device's memory allows
    block: int
    compile_ahead: int
    client_states: str
    bn_eval: str
    eval_batch: int
    eval_every: int
    adapt_every: int
    final_adapt: bool
    checkpoint_every: int
    aggregate: Aggregate = MEAN


class Programs:
    """The compiled programs of one algorithm; compiling is announced, and its seconds are kept apart."""

    def __init__(
        self,
        algorithm: Algorithm,
        conduct: Conduct,
        data: FederatedData,
        mesh: Mesh | None,
        hosted: bool,
        at_once: int | None,
        say: Callable,
    ):
        """`at_once` is what was chosen for this algorithm before, None if nothing was."""
        self.algorithm, self.conduct, self.data, self.mesh = algorithm, conduct, data, mesh
        self.hosted, self.say = hosted, say
        self.at_once = conduct.at_once if conduct.at_once >= 0 else at_once
        self.seconds = self.seconds_ahead = 0.0
        self._compiled: dict = {}
        # Small, but operation by operation they would be compiled a hundred times over.
        self.global_model, self.discrete_model, self.report = (
            jax.jit(made) if made else None
            for made in (algorithm.global_model, algorithm.discrete_model, algorithm.report)
        )

    def __call__(self, name: str, *arguments):
        if name not in self._compiled:
            self.say(f"compiling the {name} (kept in {jax.config.jax_compilation_cache_dir} for the next run) ...")
            seconds = self._compile(name, *arguments)
            self.seconds += seconds
            self.say(f"compiled the {name} in {seconds:.1f} s")
        return self._compiled[name](*arguments)

    def compile_ahead(self, state: RoundState) -> None:
        """Compiles what a round and an evaluation need before the first one is due; `state` may be its shapes."""
        self.seconds_ahead = self._compile("round", state, self.data, jax.ShapeDtypeStruct((), jnp.int32))
        if self.algorithm.global_model is None:
            return
        calibration = None
        if self.conduct.bn_eval == "recalibrated":
            calibration = self._rows_to_come(evaluate.CALIBRATION)
        net = jax.eval_shape(self.algorithm.global_model, state.server)
        given = self._rows_to_come(self._places()), jax.ShapeDtypeStruct((), jnp.int32)
        self.seconds_ahead += self._compile("evaluation", net, self.data, *given, calibration)

    def _compile(self, name: str, *arguments) -> float:
        start = time.perf_counter()
        if name == "round" and self.at_once is None:
            self._compiled[name] = self._compile_as_many_as_fit(*arguments)
        else:
            self._compiled[name] = self._made(name, self.at_once or 0).lower(*arguments).compile()
        return time.perf_counter() - start

    def _made(self, name: str, at_once: int) -> Callable:
        conduct, common = self.conduct, {"at_once": at_once, "mesh": self.mesh}
        sizes = {"batch": conduct.eval_batch, "bn_eval": conduct.bn_eval}
        if name == "round":
            shape = {"cohort_size": conduct.cohort, "block": conduct.block, "hosted": self.hosted}
            shape["aggregate"] = conduct.aggregate
            return make_round(self.algorithm, **shape, **common)
        if name == "evaluation":
            return evaluate.make_evaluate(self.algorithm, **sizes, mesh=self.mesh)
        return evaluate.make_personal(self.algorithm, **sizes, **common)

    def _compile_as_many_as_fit(self, *arguments):
        """The round with all of a device's clients in one vmap or, where XLA says that this takes more than the
        memory that is free, with as many as its figure lets expect to fit."""
        devices = 1 if self.mesh is None else self.mesh.size
        clients = at_once = -(-self.conduct.cohort // devices)
        while True:
            compiled = self._made("round", at_once).lower(*arguments).compile()
            needed, room = compiled.memory_analysis().temp_size_in_bytes, free_bytes()
            if room is None or needed <= room or at_once == 1:
                break
            at_once = min(at_once - 1, max(1, int(at_once * room / needed)))
        self.at_once = at_once
        free = "" if room is None else f" of {room / 1e9:.3g} GB free"
        self.say(f"{at_once} of a device's {clients} clients at once: {needed / 1e9:.3g} GB{free} (config.at_once)")
        return compiled

    def spent_compiling(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def accuracies(self, net: Net, state: RoundState) -> tuple[float, dict, float]:
        """(server accuracy, local accuracies without adaptation, loss) of one network for everybody."""
        correct, loss = self._answers(net, state, self.data.central)
        local = evaluate.summary(evaluate.local_accuracy(jnp.asarray(correct), self.data))
        return float(np.mean(correct)), floats(local), float(np.mean(loss))

    def training_accuracy(self, net: Net, state: RoundState) -> float:
        """Of training images drawn from all clients' in this round, by the same program."""
        rows = self._drawn(state, self.conduct.clients, evaluate.JUDGES)
        return float(np.mean(self._answers(net, state, rows)[0]))

    def calibration(self, state: RoundState) -> np.ndarray | None:
        """Rows of the pool by which batch norm is recalibrated; None where it is not."""
        if self.conduct.bn_eval != "recalibrated":
            return None
        return self._drawn(state, self.conduct.cohort, evaluate.CALIBRATION)

    def _answers(self, net: Net, state: RoundState, rows: Array) -> evaluate.Correct:
        """What the network makes of rows [q] of the pool, of which there are at most as many as the program takes."""
        calibration = self.calibration(state)
        if calibration is not None:
            calibration = put_data(np.resize(calibration, padded(len(calibration), self.mesh)), self.mesh, OWN)
        given = evaluate.divided(np.resize(rows, self._places()), self.mesh)
        found = self("evaluation", net, self.data, given, jnp.int32(len(rows)), calibration)
        return evaluate.Correct(*(evaluate.in_order(x, self.mesh)[: len(rows)] for x in found))

    def _rows_to_come(self, count: int) -> jax.ShapeDtypeStruct:
        where = None if self.mesh is None else NamedSharding(self.mesh, OWN)
        return jax.ShapeDtypeStruct((padded(count, self.mesh),), jnp.int32, sharding=where)

    def _places(self) -> int:
        """Rows that the evaluation takes."""
        return max(len(self.data.central), evaluate.JUDGES)

    def _drawn(self, state: RoundState, clients: int, count: int) -> np.ndarray:
        """[count] rows of training images of the last round's cohort, were it of so many clients."""
        last = jnp.maximum(state.round - 1, 0)
        return np.asarray(evaluate.calibration_rows(self.data, state.seed, last, clients, count))


def floats(summary: dict) -> dict:
    """Arrays [] as Python numbers, fit for a record."""
    return {name: float(x) for name, x in summary.items()}
