"""Whom the server asks, how long it waits for whom, and what it says meanwhile."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.hub import Event, Hub
from fedmetanas_jax.deploy.work import plan_digest
from fedmetanas_jax.engine.interrupt import Interrupt

STATES = ("ready", "working", "compiling", "late", "away")  # of a client
TICK = 0.1  # seconds between two looks at the clock


class Patience(NamedTuple):
    """How long the server waits, and for how many."""

    quorum: int  # replies without which a round does not end
    deadline: float  # seconds for a reply, or for a client to come (back)
    compiling: float  # seconds for a client to make a program ready
    every: float = 10.0  # seconds between two lines that say for whom the server waits


class Gathered(NamedTuple):
    """What came of asking."""

    answers: dict[int, Any]  # by place, in the order in which they were asked
    left_out: dict[int, str]  # who was asked in vain, and why


class Gather:
    """Who is there and ready, and who was asked."""

    def __init__(self, hub: Hub, patience: Patience, interrupt: Interrupt):
        self.hub, self.patience, self.interrupt = hub, patience, interrupt
        self.away: dict[int, str] = {}  # who is not asked until it comes or answers, and why
        self.joined: list[str] = []  # names, since the last record
        self.plan = ""  # the program that rounds need now
        self._program = (0, "")
        self._limit = patience.deadline  # seconds for a reply of the kind that is asked for
        self._asked: dict[int, Connection] = {}
        self._out: dict[int, tuple[str, float]] = {}
        self.answered: set[int] = set()
        self._only: Mapping[int, Connection] | None = None

    def prepare(self, phase: int, plan: str) -> None:
        """Has everybody compile this program, now or when they come."""
        self.plan, self._program = plan_digest(phase, plan), (phase, plan)
        for connection in self.hub.here.values():
            connection.prepare(phase, plan)

    def members(self) -> list[int]:
        """The clients that a round can count on."""
        return [place for place in self.hub.roster.places() if place not in self.away]

    def state_of(self, place: int) -> str:
        """One of STATES."""
        connection = self.hub.here.get(place)
        if connection is None:
            return "away"
        if place in self.away and connection.owes is not None:
            return "late"
        if connection.owes is not None:
            return "working"
        return "ready" if connection.plan == self.plan else "compiling"

    def ask(
        self,
        round: int,
        order: Sequence[int],
        size: int,
        quorum: int,
        send: Callable[[int, Connection], None],
        kind: str = "answer",
        only: Mapping[int, Connection] | None = None,
    ) -> Gathered:
        """Asks the first `size` members in `order`, and others in their stead where there would be fewer than `quorum`
        replies -> once that many are there and nothing more can come in time.

        send: (place, its connection) asks it for a reply, which comes as an event `kind`. KeyboardInterrupt: a signal
        came meanwhile.

        only: the clients that can answer, by the connections on which they can: who comes back cannot, nobody is asked
        in place of others, and it ends without the quorum where that cannot be reached.
        """
        self._asked, self._out, answers, self._only = {}, {}, {}, only
        # What two networks are judged by is compiled only when it is asked for.
        self._limit = self.patience.compiling if kind == "judged" else self.patience.deadline
        members = set(self.members())
        wanted = [place for place in order if place in members][:size]
        begun, said = dict.fromkeys(wanted, time.monotonic()), time.monotonic()
        while True:
            if self.interrupt.signal is not None:
                self.hub.say(f"stopped during round {round}, which the same command asks for again")
                self.interrupt.obey()
            self.answered = set(answers)
            for place in wanted:
                connection = self.hub.here.get(place)
                if only is not None and connection is not only[place] and place not in {**answers, **self._out}:
                    self._leave_out(place, self.hub.roster.name(place), "its connection was lost meanwhile", round)
                new = self._asked.get(place) is not connection and place not in answers and place not in self._out
                if new and connection is not None and connection.plan == self.plan and connection.owes is None:
                    send(place, connection)
                    self._asked[place], begun[place] = connection, time.monotonic()
            waiting = [place for place in wanted if place not in answers and place not in self._out]
            if not waiting and (len(answers) >= quorum or only is not None):
                return self._gathered(round, wanted, answers, size)
            if not waiting:
                more = self._others(order, wanted, quorum - len(answers))
                wanted += [place for place in more if place not in wanted]
                begun |= dict.fromkeys(more, time.monotonic())
            event = self.hub.poll(TICK)
            if event is not None:
                self._note(event, round, kind, wanted, answers, begun)
            self._give_up(round, waiting, answers, begun)
            if time.monotonic() - said > self.patience.every:
                said = time.monotonic()
                self.hub.say(self._waits(round, wanted, answers, quorum))

    def _gathered(self, round: int, wanted: list[int], answers: dict, size: int) -> Gathered:
        taken = [place for place in wanted if place in answers][:size]
        left = {place: self._out[place][0] for place in wanted if place in self._out and place not in answers}
        for place in answers.keys() - set(taken):  # it was late, and others were asked in its place
            left[place] = "others had taken its place"
            if (connection := self.hub.here.get(place)) is not None:
                connection.send("refused", round=round, reason=left[place])
        return Gathered({place: answers[place] for place in taken}, left)

    def _others(self, order: Sequence[int], wanted: list[int], missing: int) -> list[int]:
        """Whom to ask where the quorum is not reached: who is there and was not asked; else who came back, and who
        failed some time ago."""
        free = [p for p in order if p in self.hub.here and self.hub.here[p].owes is None]
        more = [place for place in free if place not in wanted][:missing]
        if more:
            return more
        now = time.monotonic()
        for place in free:
            again = self._asked.get(place) is not self.hub.here[place]
            if place in self._out and (again or now - self._out[place][1] > self.patience.deadline):
                del self._out[place]
                self._asked.pop(place, None)
                more.append(place)
        return more

    def _note(self, event: Event, round: int, kind: str, wanted: list[int], answers: dict, begun: dict) -> None:
        """Takes an event in."""
        connection, place, name, now = event.connection, event.connection.place, event.connection.name, time.monotonic()
        if event.kind == "joined":
            before = self.hub.here.get(place)
            self.hub.here[place] = connection
            if before is not None:
                before.close("a newer connection with the same name took its place", final=True)
            self.away.pop(place, None)
            self.joined.append(name)
            self.hub.say(f"{name} joined as client {place}")
            connection.prepare(*self._program)
            begun[place] = now
        elif event.kind == "gone":
            if self.hub.here.get(place) is not connection:
                return
            del self.hub.here[place]
            if self._asked.pop(place, None) is not None and place not in answers and place not in self._out:
                wait = "" if self._only else f"; round {round} waits {self.patience.deadline:g} s for it to come back"
                self.hub.say(f"{name} is gone{wait}")
            elif place not in wanted:
                self.hub.say(f"{name} is gone")
            begun[place] = now
        elif event.kind == "ready":
            connection.plan, begun[place] = event.value, now
        else:
            self._note_reply(event, round, kind, wanted, answers)

    def _note_reply(self, event: Event, round: int, kind: str, wanted: list[int], answers: dict) -> None:
        connection, place, name = event.connection, event.connection.place, event.connection.name
        was_away = self.away.pop(place, None)
        current = self._asked.get(place) is connection and place not in answers
        if event.kind == "failed" and current:
            self._leave_out(place, name, f"it could not: {event.value}", round)
        elif event.kind == "refused":
            of, reason = event.value
            connection.send("refused", round=of, reason=reason)
            self.hub.note(name, f"round {of}: {reason}")
            if current and of == round:
                self._out[place] = (reason, time.monotonic())
        elif event.kind == kind == "judged" and current and event.value["round"] == round:
            answers[place] = event.value
            self._out.pop(place, None)
        elif event.kind == kind == "answer" and current and event.value[0] == round:
            answers[place] = event.value[1]
            self._out.pop(place, None)
        elif was_away is not None or event.kind != "failed":
            reason = f"it came too late: the server is at round {round}"
            if event.kind == "answer":
                connection.send("refused", round=event.value[0], reason=reason)
            self.hub.say(f"{name} answered too late, and is asked again from the next round on")

    def _give_up(self, round: int, waiting: list[int], answers: dict, begun: dict) -> None:
        now, patience = time.monotonic(), self.patience
        for place in waiting:
            if place in answers or place in self._out:
                continue
            connection, limit = self.hub.here.get(place), patience.deadline
            if connection is None:
                reason = f"it was not there for {limit:g} s"
            elif self._asked.get(place) is connection:
                limit = self._limit
                reason = f"it did not answer within {limit:g} s"
            elif connection.owes is not None:
                reason = "it still owes an earlier reply"
            else:
                limit = patience.compiling
                reason = f"it had no program ready within {limit:g} s"
            if now - begun[place] > limit:
                self.away[place] = reason
                self._leave_out(place, self.hub.roster.name(place), reason, round)

    def _leave_out(self, place: int, name: str, reason: str, round: int) -> None:
        self._out[place] = (reason, time.monotonic())
        self.hub.say(f"round {round} leaves out {name}: {reason}")

    def _waits(self, round: int, wanted: list[int], answers: dict, quorum: int) -> str:
        waited = [place for place in wanted if place not in answers]
        why = {place: self._out[place][0] if place in self._out else self.state_of(place) for place in waited}
        names = [f"{self.hub.roster.name(place)} ({why[place]})" for place in waited]
        short = "" if len(answers) >= quorum else f"; the quorum is {quorum}: the round waits until it is reached"
        who = ", ".join(names) or "somebody to join"
        return f"round {round} has {len(answers)} of {len(wanted)} replies and waits for {who}{short}"
