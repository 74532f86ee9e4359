"""A client's turns in a run with secure sums: what it sends the server for each thing that it is asked for."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fedmetanas_jax.core import Phase
from fedmetanas_jax.deploy import session
from fedmetanas_jax.deploy.credentials import Pair
from fedmetanas_jax.deploy.member import Distrust, Member
from fedmetanas_jax.deploy.opened import Opened
from fedmetanas_jax.deploy.session import Session
from fedmetanas_jax.deploy.signatures import Authority, Signer
from fedmetanas_jax.deploy.work import Ready
from fedmetanas_jax.options import UsageError

OPENED = "opened.json"  # in the workdir


class Letter(NamedTuple):
    """What is to be sent."""

    kind: str
    payload: bytes
    fields: dict


class Turns:
    """Of one client in one run."""

    def __init__(
        self, pair: Pair | None, workdir: Path, run: str, place: int, cohort: int, phases: Sequence[Phase]
    ):
        """UsageError for a client without a certificate that others can check, and as `check`."""
        check(cohort, pair is not None, phases)
        self._signer, self._authority = Signer(pair), Authority(pair.ca)
        self._opened = Opened(workdir / OPENED)
        self._run, self._place, self._cohort = run, place, cohort
        self._member: Member | None = None
        self._turn, self._layout = (0, 0), ""  # round and attempt of it, and what it adds to

    def room(self, size: int) -> dict[str, int]:
        """Most bytes of what may come; `size`: of the message to train with."""
        lists = {"share": session.KEYS, "mask": session.SHARES, "sign": session.SURVIVORS, "open": session.SIGNATURES}
        return {"train_to_sum": size} | {kind: session.room(of, self._cohort) for kind, of in lists.items()}

    def begin(self, ready: Ready, round: int, attempt: int, plan: str, row: bytes | bytearray) -> Letter:
        """Its part in a new sum; an earlier one is over. plan, row: the program and the message that it trained with.
        """
        which = Session(self._run, round, attempt, self._cohort, session.message_of(plan, row))
        given = self._signer, self._authority, self._opened, ready.form, ready.summand
        self._member, self._turn = Member(which, self._place, *given), (round, attempt)
        self._layout = ready.fields["layout"]
        keys = self._member.keys()._asdict()
        del keys["place"]
        return Letter("keys", b"", ready.fields | {"attempt": attempt} | keys)

    def answer(self, kind: str, round: int, attempt: int, payload: bytes | bytearray) -> Letter:
        """The next step of the sum that was begun. Distrust: this client takes no further part in it."""
        member, self._member = self._member, None
        if member is None or (round, attempt) != self._turn:
            raise Distrust("this client has no part in that sum")
        about = {"round": round, "attempt": attempt}
        steps: dict[str, Callable[[], Letter]] = {
            "share": lambda: Letter("shares", member.share(payload), about),
            "mask": lambda: Letter("masked", member.mask(payload), about | {"layout": self._layout}),
            "sign": lambda: Letter("signed", b"", about | {"signature": member.sign(payload)}),
            "open": lambda: Letter("opened", member.open(payload), about),
        }
        letter = steps[kind]()
        self._member = None if kind == "open" else member
        return letter


def check(cohort: int, certificates: bool, phases: Sequence[Phase]) -> None:
    """UsageError where a networked run can have no secure sums."""
    if not certificates:
        raise UsageError(
            "config.aggregate has secure, which rests on clients' certificates: it needs serve.py and join.py with "
            "--certs"
        )
    if cohort < session.LEAST:
        raise UsageError(
            f"config.cohort is {cohort}; with secure in config.aggregate it must be at least {session.LEAST}, since of "
            "two clients either would know the other's change"
        )
    if any(phase.tolerance is not None for phase in phases):
        raise UsageError(
            "config.options.prune_tolerance has clients say one by one how many of their images a network answers; "
            "with secure in config.aggregate it must be none"
        )
