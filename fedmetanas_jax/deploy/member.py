"""A client's part in one secure sum. It believes the server nothing that other clients did not sign.

Made anew for every attempt, with secrets of its own that never leave memory. Its steps come in order, each once, and
after one that failed there is none: what a server could gain by asking for one of them twice, or for both kinds of
share of one client, it cannot ask for.
"""

import contextlib
from collections.abc import Iterator, Sequence

from fedmetanas_jax.deploy import masks, session, signatures, vector
from fedmetanas_jax.deploy.opened import Opened
from fedmetanas_jax.deploy.session import Keys, Session
from fedmetanas_jax.deploy.signatures import Authority, Signer, Unproven
from fedmetanas_jax.deploy.vector import Form, Vector
from fedmetanas_jax.deploy.work import WorkError

STEPS = ("keys", "share", "mask", "sign", "open")


class Distrust(WorkError):
    """What the server asks for would tell it more than a sum, or is no sound part of one. One line."""


class Member:
    """One attempt. The methods are STEPS; each takes what the server sent, and gives what is to be sent back.

    They raise Distrust, after which this attempt is over for the client.
    """

    def __init__(
        self,
        which: Session,
        place: int,
        signer: Signer,
        authority: Authority,
        opened: Opened,
        form: Form,
        summand: Vector,
    ):
        self._session, self._place, self._signer, self._authority = which, place, signer, authority
        self._name, self._needed = which.name(), session.threshold(which.cohort)
        self._opened, self._form, self._summand = opened, form, summand
        self._next = STEPS
        self._self, self._pairs = masks.new_secret(), masks.new_secret()
        self._cipher_key = masks.new_key()
        self._mask_key = masks.private_of(self._pairs, self._name)

    def keys(self) -> Keys:
        """What others are to know of it; the place is the server's to say."""
        with self._step("keys"):
            commitment = masks.commitment_of(self._self, self._name)
            public = masks.public_of(self._cipher_key), masks.public_of(self._mask_key), commitment
            mine = Keys(self._place, self._signer.certificate, *public, b"")
            self._mine = mine._replace(signature=self._signer.sign(mine.text(self._session)))
            return self._mine

    def share(self, payload: bytes | bytearray) -> bytes:
        """Everybody's keys -> shares of its two secrets for everybody else, sealed."""
        with self._step("share"):
            rows = [Keys(*row) for row in self._list(payload, session.KEYS)]
            self._others = {row.place: row for row in rows}
            if self._others.get(self._place) != self._mine:
                raise Distrust("the list of keys has not this client's own")
            self._enough(self._others, "keys")
            self._names = {row.place: self._proven(row) for row in rows}
            for what, values in (
                ("name", list(self._names.values())),
                ("key", [key for row in rows for key in (row.cipher_key, row.mask_key)]),
            ):
                if len(set(values)) < len(values):
                    raise Distrust(f"the list of keys has a {what} twice")
            self._table = bytes(payload)
            # The places of the list are the shares' numbers.
            splits = [masks.split(secret, self._needed, len(rows)) for secret in (self._pairs, self._self)]
            self._shares, sent = {}, []
            for number, row in enumerate(rows):
                both = splits[0][number] + splits[1][number]
                if row.place == self._place:
                    self._shares[self._place] = both
                else:
                    sent.append((row.place, masks.seal(self._sealing(self._place, row.place), both, self._name)))
            return session.pack(sent)

    def mask(self, payload: bytes | bytearray) -> bytes:
        """The shares that are for it -> its masked summand."""
        with self._step("mask"):
            rows = self._list(payload, session.SHARES)
            if strangers := [place for place, _ in rows if place not in self._others or place == self._place]:
                raise Distrust(f"it is given a share of client {strangers[0]}, who has no part in this sum")
            for place, sealed in rows:
                try:
                    self._shares[place] = masks.unseal(self._sealing(place, self._place), sealed, self._name)
                except ValueError as error:
                    raise Distrust(f"the share that {self._names[place]} made for it {error}") from None
            self._sharers = sorted(self._shares)
            self._enough(self._sharers, "shares")
            masked, self._summand = self._summand, None
            vector.add(masked, masks.mask(masks.self_key(self._self, self._name), self._form), 1)
            for place in self._sharers:
                if place != self._place:
                    key = self._pair_key(place)
                    vector.add(masked, masks.mask(key, self._form), 1 if self._place < place else -1)
            return vector.pack(masked)

    def sign(self, payload: bytes | bytearray) -> bytes:
        """Whose summands came -> its signature under that."""
        with self._step("sign"):
            self._survivors = [place for (place,) in self._list(payload, session.SURVIVORS)]
            self._enough(self._survivors, "summands")
            if self._place not in self._survivors or not set(self._survivors) <= set(self._sharers):
                raise Distrust("those whose summands are said to be there are not among those it made its masks with")
            names = [self._names[place] for place in self._survivors]
            if before := self._opened.other(self._session.round, names):
                raise Distrust(before)
            self._text = session.survivors_text(self._session, self._table, self._sharers, self._survivors)
            return self._signer.sign(self._text)

    def open(self, payload: bytes | bytearray) -> bytes:
        """The signatures of others -> of every client that shared, one share. OSError: it could not be noted."""
        with self._step("open"):
            rows = self._list(payload, session.SIGNATURES)
            self._enough(rows, "signatures")
            for place, signature in rows:
                if place not in self._survivors:
                    raise Distrust(f"there is a signature of client {place}, whose summand did not come")
                try:
                    signatures.check(self._others[place].certificate, signature, self._text)
                except Unproven:
                    reason = "did not sign what this client was told of the sum; it may have been told something else"
                    raise Distrust(f"{self._names[place]} {reason}") from None
            self._opened.note(self._session.round, [self._names[place] for place in self._survivors])
            pairs, alone = slice(0, masks.SECRET), slice(masks.SECRET, None)
            which = {place: alone if place in self._survivors else pairs for place in self._sharers}
            found = b"".join(self._shares[place][which[place]] for place in self._sharers)
            self._shares, self._self, self._pairs = {}, b"", b""
            return found

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        rest, self._next = self._next, ()
        if rest[:1] != (name,):
            raise Distrust(f"'{name}' is not what comes now")
        yield
        self._next = rest[1:]

    def _list(self, payload: bytes | bytearray, columns: tuple) -> list[list]:
        try:
            return session.unpack(payload, columns, self._session.cohort)
        except ValueError as error:
            raise Distrust(f"the server sends {error}") from None

    def _enough(self, there: Sequence, what: str) -> None:
        if len(there) < self._needed:
            of = f"{self._needed} of a cohort of {self._session.cohort}"
            raise Distrust(f"there are {what} of {len(there)} clients; a sum takes those of {of}")

    def _proven(self, keys: Keys) -> str:
        """The name of who has these keys."""
        try:
            name = self._authority.name(keys.certificate)
        except Unproven as error:
            raise Distrust(f"the certificate of client {keys.place} {error}") from None
        try:
            signatures.check(keys.certificate, keys.signature, keys.text(self._session))
        except Unproven as error:
            why = f"it {error}, or was sent another model to train"
            raise Distrust(f"the keys that are said to be {name}'s are not: {why}") from None
        return name

    def _sealing(self, sender: int, to: int) -> bytes:
        other = self._others[to if sender == self._place else sender]
        try:
            return masks.agreed(self._cipher_key, other.cipher_key, "shares", self._name, sender, to)
        except ValueError:
            raise Distrust("there is a key in the list that is none") from None

    def _pair_key(self, place: int) -> bytes:
        mine = self._mask_key, self._others[place].mask_key
        try:
            return masks.pair_key(*mine, self._name, self._place, place)
        except ValueError:
            raise Distrust(f"the key of {self._names[place]} is none") from None
