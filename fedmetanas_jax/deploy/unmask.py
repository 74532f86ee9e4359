"""The server's side of a secure sum, as functions: what it believes of each reply, and how a sum is unmasked."""

from collections.abc import Mapping, Sequence

from fedmetanas_jax.deploy import masks, session, signatures, vector
from fedmetanas_jax.deploy.checks import Refused
from fedmetanas_jax.deploy.session import Keys, Session
from fedmetanas_jax.deploy.signatures import Authority, Unproven
from fedmetanas_jax.deploy.vector import Form, Vector
from fedmetanas_jax.deploy.wire import Message


class Failed(Exception):
    """This attempt at a sum gives none. One line."""


def keys(message: Message, which: Session, place: int, name: str, form: Form, authority: Authority) -> tuple[Keys, int]:
    """(a client's keys, the round of the state that it went on from). Refused: other clients would not take them."""
    fields = message.fields
    check_session(fields, which)
    if fields["run"] != which.run:
        raise Refused("it is of another run (another config)")
    if fields["layout"] != form.digest():
        raise Refused("what it adds has another layout than this run's program makes")
    if not 0 <= fields["own"] < which.round:
        raise Refused(f"it goes on from round {fields['own']}, which is not before round {which.round}")
    found = Keys(place, *(fields[column] for column in Keys._fields[1:]))
    try:
        session.unpack(session.pack([found]), session.KEYS, 1)
        owner = authority.name(found.certificate)
        signatures.check(found.certificate, found.signature, found.text(which))
    except (ValueError, Unproven) as error:
        raise Refused(f"its keys are not taken: {error}") from None
    if owner != name:
        raise Refused("its keys come with another client's certificate")
    return found, fields["own"]


def shares(message: Message, which: Session, place: int, places: Sequence[int]) -> dict[int, bytes]:
    """{for whom: a sealed pair of shares}, for everybody else's."""
    check_session(message.fields, which)
    try:
        rows = session.unpack(message.payload, session.SHARES, len(places))
    except ValueError as error:
        raise Refused(f"it sends {error}") from None
    if [to for to, _ in rows] != [to for to in places if to != place]:
        raise Refused("it has not made a share for each of the others")
    return dict(rows)


def masked(message: Message, which: Session, form: Form) -> Vector:
    """What it adds, with its masks. Nothing can be said of it but its size."""
    check_session(message.fields, which)
    if message.fields["layout"] != form.digest():
        raise Refused("what it adds has another layout than this run's program makes")
    try:
        return form.unpack(message.payload)
    except ValueError as error:
        raise Refused(str(error)) from None


def signed(message: Message, which: Session, certificate: bytes, text: bytes) -> bytes:
    """Its signature under who is in the sum."""
    check_session(message.fields, which)
    try:
        signatures.check(certificate, message.fields["signature"], text)
    except Unproven:
        raise Refused("its signature under who is in the sum does not hold") from None
    return message.fields["signature"]


def opened(message: Message, which: Session, sharers: Sequence[int]) -> dict[int, bytes]:
    """{of whom: a share of one of its secrets}"""
    check_session(message.fields, which)
    size = masks.SECRET
    if len(message.payload) != size * len(sharers):
        raise Refused(f"it sends {len(message.payload)} bytes of shares where there are {size * len(sharers)}")
    return {place: bytes(message.payload[size * n : size * (n + 1)]) for n, place in enumerate(sharers)}


def check_session(fields: Mapping, which: Session) -> None:
    """Refused: it belongs to another sum."""
    if (fields["round"], fields["attempt"]) != (which.round, which.attempt):
        of = f"round {fields['round']}, attempt {fields['attempt']}"
        raise Refused(f"it is of {of}; round {which.round}, attempt {which.attempt} was asked for")


def unmask(
    which: Session,
    form: Form,
    table: Mapping[int, Keys],
    sharers: Sequence[int],
    summands: Mapping[int, Vector],
    given: Mapping[int, Mapping[int, bytes]],
) -> Vector:
    """The sum of what the clients of `summands` added, which are used up. given: {by whom: {of whom: a share}}.

    Failed, with the place of whose secret it is, where shares do not make what was committed to.
    """
    name, places = which.name(), sorted(table)
    holders = sorted(given)[: session.threshold(which.cohort)]
    total = masks.blank(form)
    for place in sharers:
        secret = masks.rebuilt({places.index(holder): given[holder][place] for holder in holders})
        if place in summands:
            if masks.commitment_of(secret, name) != table[place].commitment:
                raise Failed(_unfit(place))
            vector.add(total, summands[place], 1)
            vector.add(total, masks.mask(masks.self_key(secret, name), form), -1)
            continue
        # It is gone: the others' masks with it do not cancel.
        private = masks.private_of(secret, name)
        if masks.public_of(private) != table[place].mask_key:
            raise Failed(_unfit(place))
        for other in summands:
            key = masks.pair_key(private, table[other].mask_key, name, place, other)
            vector.add(total, masks.mask(key, form), -1 if other < place else 1)
    return total


def _unfit(place: int) -> str:
    return f"the shares of client {place}'s secret make another one"
