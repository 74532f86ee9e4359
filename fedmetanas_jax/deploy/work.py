"""What a client computes: the server's programs on its own rows, each compiled once."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import tree
from fedmetanas_jax.config import Config
from fedmetanas_jax.core import Algorithm, Examples, Tree
from fedmetanas_jax.deploy import layout, share, terms, vector
from fedmetanas_jax.deploy.states import States
from fedmetanas_jax.engine import aggregate, secure
from fedmetanas_jax.engine.evaluate import Drawn, answers
from fedmetanas_jax.engine.round import apart, client_key, init_state, stream_key


class WorkError(Exception):
    """A reply that the client itself holds back. One line."""


class Program(NamedTuple):
    """An algorithm as this client runs it."""

    algorithm: Algorithm
    message: Tree  # shapes
    own: Tree  # shapes
    update: object  # compiled client_update
    held: object  # the algorithm's, jitted
    encode: object  # compiled secure.encode, where clients add up
    form: vector.Form | None  # of what they add up


class Done(NamedTuple):
    """A reply as it is sent."""

    row: bytes
    fields: dict


class Ready(NamedTuple):
    """A reply that is to go into a sum: what of it is sent as it is, and what is not."""

    fields: dict
    form: vector.Form
    summand: vector.Vector


class Worker:
    """One client's part in a run."""

    def __init__(self, agreed: terms.Terms, place: int, data: Path, workdir: Path):
        """UsageError, DataError: the run cannot be made here, or the client's file does not suit it."""
        self.config: Config = terms.config_of(agreed)
        self.phases, self._place, self._run = terms.phases_of(agreed, workdir), place, terms.run_of(agreed)
        self._terms, self._file = agreed, data
        try:
            stages = aggregate.parse(self.config.aggregate)
        except ValueError as error:
            raise terms.UsageError(f"config.{error}") from None
        # config.train_size is the most images that a client can have here.
        self.secure = secure.within(stages, self.config.train_size).secure
        self._states = States(workdir / "states")
        self._programs: dict[str, Program] = {}
        self._rows: dict[bool, Examples] = {}
        self._judges: dict = {}
        self.said: list[str] = []

    def prepare(self, phase: int, plan: str) -> str:
        """Compiles the program of this phase and plan, unless it is there -> the plan's digest. UsageError for a phase
        that is none."""
        if not 0 <= phase < len(self.phases):
            raise terms.UsageError(f"the server speaks of phase {phase}; the run has {len(self.phases)}")
        name = plan_digest(phase, plan)
        if name not in self._programs:
            algorithm = self.phases[phase].make(json.loads(plan))
            rows = self._examples(algorithm)
            server, own = jax.eval_shape(algorithm.init, jax.random.key(0))
            message = jax.eval_shape(lambda x: algorithm.send(x, jnp.int32(0), jax.random.key(0)), server)
            update, given = jax.jit(apart(algorithm.client_update)), (message, own, rows, jax.random.key(0))
            with one_at_a_time():
                update = update.lower(*given).compile()
            held = jax.jit(algorithm.held) if algorithm.held else None
            self._programs[name] = Program(algorithm, message, own, update, held, *self._adding(algorithm, *given))
            # What is small is compiled now as well: the time for a reply counts from when it is asked for.
            self._own(self._programs[name], 0, 0)
            self._key(1)
        return name

    def room(self, plan: str) -> int:
        """Most bytes of a message of this program."""
        return layout.size([layout.Part(self._programs[plan].message)])

    def room_to_judge(self, plan: str) -> int:
        """Bytes of the two networks that are compared."""
        return layout.size(self._networks(plan))

    def has_global_model(self, plan: str) -> bool:
        """Whether there can be two networks to compare."""
        return self._programs[plan].algorithm.global_model is not None

    def train(self, row: bytes | bytearray, *, round: int, plan: str, last: int, anew: int, layout_of: str) -> Done:
        """The reply to a message; what the client keeps is on its disk when this returns.

        last: the round whose state is to be gone on from; 0: the client's first turn since the states began `anew`, in
        this phase. WorkError: the reply is none to send. ValueError: the message is not what this program is sent.
        OSError: the disk is full.
        """
        reply, given, found = self._reply(row, round, plan, last, anew, layout_of)
        parts = layout.of_reply(reply.change, reply.report, given)
        fields = {
            "run": self._run,
            "round": round,
            "weight": float(reply.weight),
            "metrics": {name: float(x) for name, x in reply.metrics.items()},
            "own": found,
            "layout": layout.digest(layout.of_reply(reply.change, reply.report, None)),
        }
        return Done(layout.pack(parts), fields)

    def train_to_sum(
        self, row: bytes | bytearray, *, round: int, plan: str, last: int, anew: int, layout_of: str
    ) -> Ready:
        """As `train`, of a run with secure sums."""
        reply, _, found = self._reply(row, round, plan, last, anew, layout_of)
        program = self._programs[plan]
        summand, clipped = jax.tree.map(np.asarray, program.encode(reply.change, reply.weight))
        figures = program.form.names, float(reply.weight), reply.metrics, float(clipped), self.config.cohort
        fields = {"run": self._run, "round": round, "own": found, "layout": program.form.digest()}
        return Ready(fields, program.form, program.form.of(summand, vector.figures(*figures)))

    def _reply(self, row: bytes | bytearray, round: int, plan: str, last: int, anew: int, layout_of: str) -> tuple:
        """(reply, what of it travels, the round that it went on from)"""
        program = self._programs[plan]
        if layout_of != layout.digest(layout.of_message(program.message, None)):
            raise ValueError("the message has another layout than this client's program")
        message, given = layout.to_message(row, program.message, program.algorithm, program.held)
        own, found = self._own(program, last, anew)
        rows = self._examples(program.algorithm)
        reply = program.update(jax.tree.map(jnp.asarray, message), own, rows, self._key(round))
        reply = jax.tree.map(np.asarray, reply)
        if not _finite(reply):
            raise WorkError("its reply, or what it would keep, is not finite")
        if jax.tree.leaves(reply.own):
            self._states.save(round, reply.own)
        return reply, given, found

    def _adding(self, algorithm: Algorithm, *given) -> tuple:
        """The program that makes integers of a change, and what they are like; nothing where changes are sent."""
        if self.secure is None:
            return None, None
        reply = jax.eval_shape(algorithm.client_update, *given)
        secure.check_method(algorithm, reply.report)
        encode = jax.jit(lambda change, weight: secure.encode(self.secure, change, weight, self.config.cohort))
        with one_at_a_time():
            encode = encode.lower(reply.change, reply.weight).compile()
        return encode, vector.form(reply.change, reply.metrics)

    def judge(self, row: bytes | bytearray, *, plan: str, layout_of: str) -> dict:
        """How many of its training images two networks answer, before and after an event. ValueError as `train`."""
        parts = self._networks(plan)
        if layout_of != layout.digest(parts):
            raise ValueError("the networks have another layout than this client's program")
        algorithm = self._programs[plan].algorithm
        rows = self._examples(algorithm)
        size = jnp.int32(np.sum(np.asarray(rows.weight) > 0))
        if plan not in self._judges:
            self._judges[plan] = jax.jit(self._judging(algorithm))
        with one_at_a_time():
            counts = [self._judges[plan](net, rows, size) for net in layout.unpack(row, parts)]
        return {"before": int(counts[0]), "after": int(counts[1]), "count": int(size)}

    def _judging(self, algorithm: Algorithm):
        batch, how = self.config.eval_batch, self.config.bn_eval

        def count(net, rows: Examples, size):
            places = jnp.arange(rows.label.size)
            seen = Drawn(places, size)  # this client's own images, since it has no others
            correct, *_ = answers(algorithm.forward, net, rows, places, size, batch, how, seen)
            return jnp.sum(correct & (places < size))

        return count

    def _networks(self, plan: str) -> list[layout.Part]:
        algorithm = self._programs[plan].algorithm
        if algorithm.global_model is None:
            raise ValueError("this method has no network that serves everybody, so there is none to judge")
        net = jax.eval_shape(lambda key: algorithm.global_model(algorithm.init(key)[0]), jax.random.key(0))
        return [layout.Part(net), layout.Part(net)]

    def _key(self, round: int):
        return client_key(jnp.uint32(self.config.seed), jnp.int32(round - 1), jnp.int32(self._place))

    def _own(self, program: Program, last: int, anew: int) -> tuple[Tree, int]:
        """The state to go on from, and the round that it is of."""
        if not jax.tree.leaves(program.own):
            return program.own, last
        if last:
            kept = self._states.load(last, program.own)
            if kept is not None:
                return kept, last
            self.said.append(f"what this client kept of round {last} is not there: it starts anew")
        # By the very programs of a simulated run, since another program may round otherwise.
        if anew:
            return jax.jit(program.algorithm.init)(stream_key(self.config.seed, "phase", anew))[1], 0
        first = init_state(program.algorithm, self.config.seed, 1)
        return tree.take(first.owns, 0), 0

    def _examples(self, algorithm: Algorithm) -> Examples:
        test = algorithm.reads_test
        if test not in self._rows:
            least = algorithm.least_rows
            self._rows[test], said = share.load(self._file, self._terms, self.config, test, least)
            self.said += said
        return self._rows[test]


def plan_digest(phase: int, plan: str) -> str:
    """What a program is called."""
    return f"{phase}-{hashlib.sha256(plan.encode()).hexdigest()}"


def _finite(found: Tree) -> bool:
    leaves = (x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.inexact))
    return all(np.all(np.isfinite(x)) for x in leaves)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """While this process compiles, others with the same compilation cache wait, and then find it there."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".compiling", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
