"""What both sides of a secure sum know: which sum it is, how many must take part, what is signed, and how lists travel.

One attempt at the sum of one round is a session. In it
    keys      a client that has its reply ready says its public keys, signed
    share     it is given everybody's keys; it sends everybody else two shares of secrets, sealed
    mask      it is given the shares that are for it; it sends its masked summand
    sign      it is told whose summands came; it signs that
    open      it is given the others' signatures; it sends one share of every client: of the secret that unmasks it, if
              its summand came, else of the secret that takes its pairwise masks off the others'
which is Figure 4 of Bonawitz et al., CCS 2017, with the consistency check against an active server.
"""

from typing import NamedTuple

import msgpack

from fedmetanas_jax.deploy import masks
from fedmetanas_jax.deploy.signatures import MOST_CERTIFICATE, MOST_SIGNATURE

LEAST = 3  # clients whose sum may be known: of two, either would know the other's change
MOST_PLACE = 1 << 31

PLACE = "place"
# The columns of the lists: places, and bytes of a size. Rows are in ascending order of their first column, a place.
KEYS = (PLACE, (MOST_CERTIFICATE,), masks.KEY, masks.KEY, masks.KEY, (MOST_SIGNATURE,))
SHARES = (PLACE, masks.SEALED)
SURVIVORS = (PLACE,)
SIGNATURES = (PLACE, (MOST_SIGNATURE,))


class Session(NamedTuple):
    """An attempt at the sum of a round."""

    run: str
    round: int
    attempt: int
    cohort: int  # config.cohort: at most so many take part
    message: str  # `message_of` what the client was sent to train with

    def name(self) -> bytes:
        """[32], in all that is derived or signed, so that it serves nowhere else."""
        return masks.digest(*(str(x).encode() for x in self))


class Keys(NamedTuple):
    """A row of KEYS: what a client says of itself."""

    place: int
    certificate: bytes
    cipher_key: bytes  # by which others seal shares for it
    mask_key: bytes  # by which others make the masks that they have with it
    commitment: bytes  # to the secret of the mask that is its own
    signature: bytes

    def text(self, session: Session) -> bytes:
        """What the signature is of."""
        return masks.digest(b"keys", session.name(), self.cipher_key, self.mask_key, self.commitment)


def message_of(plan: str, row: bytes | bytearray) -> str:
    """What stands for a program and the message to train with, so that clients that were sent others have no sum:
    in a sum of changes of different networks one of them can be made out.

    Pasquini, Francati, Ateniese: Eluding Secure Aggregation in Federated Learning via Model Inconsistency, CCS 2022.
    """
    return masks.digest(plan.encode(), bytes(row)).hex()


def threshold(cohort: int) -> int:
    """How many clients must take part in every exchange: floor(2 cohort / 3) + 1 (Bonawitz et al., Theorem 6.5).

    Fewer than a third of the cohort's clients, ceil(cohort / 3) - 1, can then do nothing with an active server. For two
    stories of who is in a sum it takes 2 threshold answers, of honest clients one each, of those others two.
    """
    return 2 * cohort // 3 + 1


def survivors_text(session: Session, keys: bytes, sharers: list[int], survivors: list[int]) -> bytes:
    """What a client signs before a sum is opened: all that it was told. keys: the list of keys as it came."""
    lists = (msgpack.packb(sharers), msgpack.packb(survivors))
    return masks.digest(b"survivors", session.name(), masks.digest(keys), *lists)


def pack(rows: list) -> bytes:
    """The list of rows, each a list of its columns."""
    return msgpack.packb([list(row) for row in rows])


def room(columns: tuple, rows: int) -> int:
    """Most bytes of a list of so many rows."""
    return 8 + rows * sum(8 if column == PLACE else 8 + _most(column) for column in columns)


def unpack(payload: bytes | bytearray, columns: tuple, most: int) -> list[list]:
    """The rows, ascending by place, at most so many. ValueError for anything else."""
    try:
        rows = msgpack.unpackb(bytes(payload))
    except Exception as error:  # damage shows as nearly any exception of msgpack, and of Python
        raise ValueError(f"a list that is no msgpack ({type(error).__name__})") from None
    if type(rows) is not list or len(rows) > most:
        raise ValueError("a list that is none, or too long")
    for row in rows:
        if type(row) is not list or len(row) != len(columns):
            raise ValueError("a list with a row that is none")
        if not all(_fits(x, column) for x, column in zip(row, columns, strict=True)):
            raise ValueError("a list with a column of another type or size")
    places = [row[0] for row in rows]
    if places != sorted(set(places)):
        raise ValueError("a list whose clients are not in order, or are there twice")
    return rows


def _fits(x, column) -> bool:
    if column == PLACE:
        return type(x) is int and 0 <= x < MOST_PLACE
    return type(x) is bytes and (len(x) == column if type(column) is int else len(x) <= column[0])


def _most(column) -> int:
    return column if type(column) is int else column[0]
