"""The course of a run whose rounds are done by clients elsewhere: phases, events, records and checkpoints are the
simulation's own, and so is what the server makes of the replies."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import tree
from fedmetanas_jax.core import Aggregate, Algorithm, Phase, Tree
from fedmetanas_jax.deploy import layout
from fedmetanas_jax.deploy.checks import Answer, Exchange, Wanted
from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.gather import Gather, Gathered
from fedmetanas_jax.engine import measure, records, report
from fedmetanas_jax.engine.course import Course
from fedmetanas_jax.engine.measure import Candidate
from fedmetanas_jax.engine.round import cohort, learn, stream_key


class DeployedCourse(Course):
    """Course, with `advance` over the network. The server has no client's images and no client's state."""

    def __init__(self, phases: list[Phase], *given, gather: Gather, log: Path, examples: Callable, max_norm: float):
        """given: Course's other arguments. log: the run's records, which say who has a state of which round.
        examples: (whether with test images) -> the shapes of a client's images."""
        self.gather, self._log = gather, log
        self._examples, self._max_norm = examples, max_norm
        self._most_rows = examples(False).label.shape[0]
        self._sizes: dict[int, tuple[int, int]] = {}  # bytes up and down, of whom was asked
        self._traffic: dict[int, tuple[Connection, int]] = {}  # and the bytes that had come before the round
        self._of_clients = [phase.make for phase in phases]
        made = {make: _stateless(make) for make in self._of_clients}  # phases that share theirs go on sharing it
        super().__init__([phase._replace(make=made[phase.make]) for phase in phases], *given)
        self._full: dict[str, Algorithm] = {}
        self.last = [0] * self.conduct.clients  # the round whose state each client goes on from
        self.anew = 0  # the phase in which clients' states began anew

    def begin(self, say: Callable[[str], None]) -> bool:
        """As Course's; the records say who keeps what."""
        restored = super().begin(say)
        for line in records.read(self._log)[: self.done] if restored else ():
            self._remember(line)
        self.gather.hub.round = self.done + 1
        return restored

    def advance(self, limit: int) -> list[dict]:
        """One round -> its record."""
        del limit
        round, clock = self.done + 1, time.perf_counter()
        self.gather.hub.round = round
        everyone = self._order()
        hub = self.gather.hub
        self._traffic = {}
        down = {place: connection.sent for place, connection in hub.here.items()}
        found = self._gathered(round, everyone)
        moved, weight, more = self._learn(found, everyone)
        self.state = self.state._replace(round=jnp.int32(round), server=moved)
        self.done = round
        seconds = time.perf_counter() - clock
        line = self._line(found, weight, more, seconds)
        names = {place: hub.roster.name(place) for place in {*found.answers, *found.left_out}}
        line["taken"] = [k for k, w in zip(found.answers, weight, strict=True) if w > 0]
        line["names"] = [names[k] for k in line["cohort"]]
        if found.left_out:
            line["left_out"] = {names[k]: reason for k, reason in found.left_out.items()}
        if lost := [hub.roster.name(k) for k, a in found.answers.items() if self._form[1] and a.own != self.last[k]]:
            line["lost_their_state"] = lost
        line |= hub.noted()
        if self.gather.joined:
            line["joined"], self.gather.joined = self.gather.joined, []
        line["wire_up"] = sum(c.reader.seen - seen for c, seen in self._traffic.values())
        line["wire_down"] = sum(c.sent - down.get(k, 0) for k, (c, _) in self._traffic.items())
        self._remember(line)
        for place in found.answers:
            if (connection := hub.here.get(place)) is not None:
                if place in line["taken"]:
                    connection.send("taken", round=round)
                else:
                    connection.send("refused", round=round, reason="the aggregate left it out")
        self.worth.add([line])
        return [line]

    def _foresee_round(self) -> None:
        """Nothing: clients compile it."""

    def evaluate(self, line: dict) -> None:
        """What can be said without clients' images: of the server's own test set."""
        if self._measures():
            line |= measure.networks(self.programs, self.state)
            line.pop("local_accuracy", None)

    def enter_next_phase(self, line: dict, say: Callable[[str], None]) -> float:
        """As Course's, without local accuracies."""
        seconds = super().enter_next_phase(line, say)
        line.pop("local_accuracy", None)
        return seconds

    def cost(self, before: Candidate, after: Candidate) -> float:
        """Clients count how many of their own training images the two networks answer."""
        nets = [layout.Part(jax.device_get(x.net)) for x in (before, after)]
        row, round = layout.pack(nets), self.done
        fields = {"round": round, "plan": self.gather.plan, "layout": layout.digest(nets)}

        def send(place: int, connection: Connection) -> None:
            connection.ask(round, 0, "judge", row, **fields)

        everyone = self.gather.members()
        found = self.gather.ask(round, everyone, len(everyone), self.gather.patience.quorum, send, "judged").answers
        total = sum(x["count"] for x in found.values())
        return sum(x["before"] - x["after"] for x in found.values()) / total

    def _order(self) -> list[int]:
        """All places, in the order in which this round asks them; the first ones are the simulation's cohort."""
        clients = self.conduct.clients
        return np.asarray(cohort(self.state.seed, self.state.round, clients, clients)).tolist()

    def _gathered(self, round: int, everyone: list[int]) -> Gathered:
        """The replies of a round."""

        def send(place: int, connection: Connection) -> None:
            self._send(place, connection, round)

        return self.gather.ask(round, everyone, self.conduct.cohort, self.gather.patience.quorum, send)

    def _send(
        self, place: int, connection: Connection, round: int, owes: Exchange | None = None, kind="train", **more
    ) -> None:
        """Asks a client for its reply; `owes`: what it is to answer, if not the reply itself."""
        if self._traffic.get(place, (None, 0))[0] is not connection:
            self._traffic[place] = connection, connection.reader.seen
        message = jax.device_get(self._message(self.state.server, jnp.int32(place), self.state.seed, self.state.round))
        given = self._given(message)
        parts = layout.of_message(message, given)
        wanted = self._wanted._replace(round=round, given=given if owes is None else None)  # sums are of whole changes
        fields = {"round": round, "plan": self.gather.plan, "last": self.last[place], "anew": self.anew}
        fields["layout"] = self._message_layout
        self._sizes[place] = layout.size(wanted.parts()), layout.size(parts)
        room, row = layout.size(wanted.parts()) if owes is None else 0, layout.pack(parts)
        self._sends(row)
        connection.ask(owes or wanted, room, kind, row, **fields, **more)

    def _given(self, message: Tree) -> dict | None:
        """What of a message a client is given; None: everything."""
        return None if self._held is None else jax.device_get(self._held(message))

    def _sends(self, row: bytes) -> None:
        """Looks at what is to be sent. UsageError where it may not be."""

    def _learn(self, found: Gathered, everyone: list[int]) -> tuple[Tree, np.ndarray, dict]:
        """The server after these replies, what each one weighed, and the aggregate's metrics.

        Who is missing of a whole cohort counts as left out: a change of 0 at weight 0, as in simulation.
        """
        answers: dict[int, Answer] = found.answers
        replies, size = list(answers.values()), self.conduct.cohort
        nothing = jax.tree.map(np.zeros_like, replies[0])
        replies += [nothing] * (size - len(replies))
        change, report_, weight = (
            jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *(getattr(reply, name) for reply in replies))
            for name in ("change", "report", "weight")
        )
        given = self.state.server, self._asked(answers, everyone), change, weight, report_
        moved, taken, more = self._learning(*given, self.state.seed, self.state.round)
        heard, more = len(answers), jax.device_get(more)
        more = {name: x[:heard] if np.ndim(x) else x for name, x in more.items()}
        return moved, np.asarray(taken)[:heard], more

    def _asked(self, answers: dict, everyone: list[int]) -> jax.Array:
        """A whole cohort, those who answered first."""
        clients = [*answers, *(place for place in everyone if place not in answers)]
        return jnp.asarray(clients[: self.conduct.cohort], jnp.int32)

    def _line(self, heard: Gathered, weight: np.ndarray, more: dict, seconds: float) -> dict:
        """A round's record, made as a simulated one's of what the clients measured."""
        answers: dict[int, Answer] = heard.answers
        replies = list(answers.values())
        clients = np.array(list(answers), np.int32)
        found = {name: np.stack([a.metrics[name] for a in replies]) for name in replies[0].metrics}
        up, down = np.array([self._sizes[place] for place in answers]).T
        sent = {"bytes_up": up, "bytes_down": down}
        rows = np.array([a.weight for a in replies], np.float64)  # what the server knows of their images
        about = {"client": clients, "rows": rows, "finite": np.ones(len(replies), bool)}
        return self._recorded(about | sent | found | more, seconds)

    def _recorded(self, measured: dict, seconds: float) -> dict:
        """The record of what was measured, [client] or []."""
        reported = {name: np.asarray(x) for name, x in self.programs.report(self.state.server).items()}
        metrics = {name: np.asarray(x)[None] for name, x in (measured | reported).items()}
        saved = self.checkpoints.candidates()
        report.check_finite(metrics, self.done - 1, self.done, saved, 0, 0)
        return report.lines(metrics, self.done - 1, self.done, seconds, self.phase, self.algorithm)[0]

    def _remember(self, line: dict) -> None:
        for place in line["taken"]:
            self.last[place] = line["round"]
        if "clients_anew" in line:
            self.last, self.anew = [0] * self.conduct.clients, line["clients_anew"]

    def _enter(self, server: Tree, line: dict, say: Callable[[str], None]) -> None:
        before = self._form
        super()._enter(server, line, say)
        if self._form != before:
            line["clients_anew"] = self.phase
            self._remember({"taken": []} | line)
            say(f"what clients keep has another form from round {self.done + 1} on: all start anew")

    def _load_programs(self, say: Callable[[str], None]) -> None:
        super()._load_programs(say)
        algorithm, aggregate = self._client_algorithm(), self._aggregate()
        server, own = jax.eval_shape(algorithm.init, jax.random.key(0))
        message = jax.eval_shape(lambda x: algorithm.send(x, jnp.int32(0), jax.random.key(0)), server)
        self._form = tree.form(own)
        rows = self._examples(algorithm.reads_test)
        reply = jax.eval_shape(algorithm.client_update, message, own, rows, jax.random.key(0))
        digest = layout.digest(layout.of_reply(reply.change, reply.report, None))
        of_reply = reply.change, reply.report, None, digest, frozenset(reply.metrics)
        self._wanted = Wanted(self.gather.hub.run, 0, *of_reply, float(self._most_rows), self._max_norm)
        self._message_layout = layout.digest(layout.of_message(message, None))
        self._held = jax.jit(algorithm.held) if algorithm.held else None

        @jax.jit
        def message_of(server, client, seed, round):
            return algorithm.send(server, client, stream_key(seed, "send", round, client))

        @jax.jit
        def learning(*given):  # behind the fences that a simulated round has, or XLA would round otherwise
            server, clients, change, weight, report, seed, round = jax.lax.optimization_barrier(given)
            return learn(algorithm, aggregate, server, clients, change, weight, report, seed, round)

        self._message, self._learning = message_of, learning
        if self.done < self.conduct.rounds:  # after the last one nobody needs a program
            self.gather.prepare(self.phase, json.dumps(self.plan))

    def _aggregate(self) -> Aggregate:
        """What the server does with what it receives."""
        return self.conduct.aggregate

    def _client_algorithm(self) -> Algorithm:
        """The phase's algorithm as clients have it."""
        key = f"{self.phase} {json.dumps(self.plan)}"
        if key not in self._full:
            self._full[key] = self._of_clients[self.phase](self.plan)
        return self._full[key]


def _stateless(make: Callable) -> Callable:
    """The same programs for a server, which keeps no client's state."""

    def made(plan) -> Algorithm:
        algorithm = make(plan)
        return algorithm._replace(init=lambda key: (algorithm.init(key)[0], ()))

    return made
