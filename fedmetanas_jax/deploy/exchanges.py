"""The server's exchanges of a secure sum, one after another, until a sum comes of them."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from fedmetanas_jax.deploy import checks, masks, session, unmask
from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.gather import TICK, Gather, Gathered
from fedmetanas_jax.deploy.session import Keys, Session
from fedmetanas_jax.deploy.signatures import Authority
from fedmetanas_jax.deploy.unmask import Failed
from fedmetanas_jax.deploy.vector import Form, Vector

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two attempts


class Offer(NamedTuple):
    """A client that has its reply ready."""

    keys: Keys
    own: int  # the round of the state that it went on from


class Summed(NamedTuple):
    """What came of a round."""

    answers: dict[int, Offer]  # of the clients in the sum, in the order in which they were asked
    left_out: dict[int, str]
    total: Vector
    failed: list[str]  # what attempts failed of, before this one


class Exchanges:
    """Sums of one run's rounds. ask: (place, connection, what it owes, its room, attempt) asks it to train."""

    def __init__(self, gather: Gather, authority: Authority, cohort: int):
        self._gather, self._authority, self._cohort = gather, authority, cohort
        self._needed = session.threshold(cohort)

    def sum(
        self,
        round: int,
        order: Sequence[int],
        form: Form,
        message: str,
        ask: Callable,
        good: Callable[[Vector, int], str],
    ) -> Summed:
        """Asks until there is a sum that can be one.

        message: session.message_of what `ask` sends.
        good: (the sum, of how many) -> what it cannot be if everybody kept to the rules, or ''.
        """
        failed: list[str] = []
        while True:
            which = Session(self._gather.hub.run, round, len(failed) + 1, self._cohort, message)
            try:
                return self._attempt(which, order, form, ask, good)._replace(failed=failed)
            except _Short as error:
                failed.append(str(error))
                wait = min(FIRST_WAIT * 2 ** min(len(failed) - 1, 20), LONGEST_WAIT)
                self._gather.hub.say(f"round {round}, attempt {which.attempt}: no sum: {error}; again in {wait:.1f} s")
                self._tell(error.places, round, f"no sum came of it: {error}")
                self._pause(wait)

    def _attempt(self, which: Session, order: Sequence[int], form: Form, ask: Callable, good: Callable) -> Summed:
        round, hub, gather = which.round, self._gather.hub, self._gather
        there: dict[int, Connection] = {}

        def begin(place: int, connection: Connection) -> None:
            there[place] = connection
            check = partial(self._offer, which=which, place=place, name=connection.name, form=form)
            ask(place, connection, checks.Exchange("keys", round, check), which.attempt)

        quorum = max(gather.patience.quorum, self._needed)
        begun = gather.ask(round, order, self._cohort, quorum, begin)
        offers, out = dict(begun.answers), dict(begun.left_out)
        table = {place: offers[place].keys for place in sorted(offers)}
        places, keys = list(table), session.pack(list(table.values()))

        def exchange(kind: str, back: str, among: Sequence[int], room: int, payload: Callable, check: Callable) -> dict:
            """Asks each of these for a reply -> {place: it}."""

            def send(place: int, connection: Connection) -> None:
                wanted = checks.Exchange(back, round, partial(check, which=which, place=place))
                connection.ask(wanted, room, kind, payload(place), round=round, attempt=which.attempt)

            only = {place: there[place] for place in among}
            found: Gathered = gather.ask(round, list(among), len(among), len(among), send, only=only)
            lost = {place: found.left_out.get(place, "it was gone") for place in among if place not in found.answers}
            out.update({place: f"{reason} (after '{kind}')" for place, reason in lost.items()})
            if len(found.answers) < self._needed:
                names = ", ".join(f"{hub.roster.name(place)}: {out[place]}" for place in lost)
                short = f"'{back}' came of {len(found.answers)} clients, and a sum takes {self._needed}"
                raise _Short(f"{short} ({names})", places)
            return {place: found.answers[place] for place in sorted(found.answers)}

        size = session.room(session.SHARES, len(places))
        sent = exchange(
            "share", "shares", places, size, lambda place: keys,
            lambda message, which, place: unmask.shares(message, which, place, places),
        )  # fmt: skip
        sharers = list(sent)
        summands = exchange(
            "mask", "masked", sharers, form.size(),
            lambda to: session.pack([(place, sent[place][to]) for place in sharers if place != to]),
            lambda message, which, place: unmask.masked(message, which, form),
        )  # fmt: skip
        survivors = list(summands)
        if len(survivors) < quorum:
            raise _Short(f"{len(survivors)} summands came; the quorum is {quorum}", places)
        text = session.survivors_text(which, keys, sharers, survivors)
        listed = session.pack([(place,) for place in survivors])
        signed = exchange(
            "sign", "signed", survivors, 0, lambda place: listed,
            lambda message, which, place: unmask.signed(message, which, table[place].certificate, text),
        )  # fmt: skip
        given = exchange(
            "open", "opened", list(signed), masks.SECRET * len(sharers),
            lambda place: session.pack(list(signed.items())),
            lambda message, which, place: unmask.opened(message, which, sharers),
        )  # fmt: skip
        try:
            total = unmask.unmask(which, form, table, sharers, summands, given)
        except Failed as error:
            raise _Short(str(error), places) from None
        if wrong := good(total, len(survivors)):
            raise _Short(wrong, places)
        # Who was gone after its summand had come is in the sum all the same.
        out = {place: reason for place, reason in out.items() if place not in summands}
        self._tell([place for place in places if place in out], round, "the sum was made without it")
        return Summed({place: offers[place] for place in offers if place in summands}, out, total, [])

    def _offer(self, message: Any, which: Session, place: int, name: str, form: Form) -> Offer:
        return Offer(*unmask.keys(message, which, place, name, form, self._authority))

    def _tell(self, places: Sequence[int], round: int, reason: str) -> None:
        for place in places:
            if (connection := self._gather.hub.here.get(place)) is not None:
                connection.send("refused", round=round, reason=reason)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._gather.interrupt.signal is not None:
                self._gather.interrupt.obey()
            time.sleep(TICK)


class _Short(Exception):
    """An attempt that gives no sum; the places of who took part in it. One line."""

    def __init__(self, reason: str, places: Sequence[int]):
        super().__init__(reason)
        self.places = places
