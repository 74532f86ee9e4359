"""A sum of a few clients in one process, with certificates of a real CA, for the tests of secure sums."""

from datetime import UTC, datetime, timedelta
from functools import cache

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmetanas_jax.deploy import session, unmask, vector
from fedmetanas_jax.deploy.credentials import Pair
from fedmetanas_jax.deploy.member import Member
from fedmetanas_jax.deploy.opened import Opened
from fedmetanas_jax.deploy.session import Session
from fedmetanas_jax.deploy.signatures import Authority, Signer
from fedmetanas_jax.deploy.vector import Form, Vector

RUN = "ab" * 32
PLAN, ROW = "the program", b"the message"
MESSAGE = session.message_of(PLAN, ROW)
FORM = Form({"params": np.zeros((40, 5), np.float32), "alpha": np.zeros(6, np.float32)}, ("rows", "loss", "clipped"))


def certificate(name: str, key, issuer: str, issuer_key, *extensions, days: float = 1.0) -> bytes:
    """PEM; a negative number of days makes one that has expired."""
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer))
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=days))
    for extension in extensions:
        builder = builder.add_extension(extension, False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@cache
def ca_key(name: str = "ca"):
    return ec.generate_private_key(ec.SECP256R1())


@cache
def ca(name: str = "ca") -> bytes:
    """A CA's own certificate."""
    return certificate(name, ca_key(name), name, ca_key(name), x509.BasicConstraints(ca=True, path_length=0))


@cache
def pair(name: str, authority: str = "ca", use=ExtendedKeyUsageOID.CLIENT_AUTH, days: float = 1.0, key=None) -> Pair:
    """A client's certificate and key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    signed = certificate(name, key, authority, ca_key(authority), x509.ExtendedKeyUsage([use]), days=days)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(ca(), signed, private)


def summand(seed: int, form: Form = FORM) -> Vector:
    """Some numbers, as small as those of a sum that does not wrap."""
    rng = np.random.default_rng(seed)
    narrow = rng.integers(-(2**20), 2**20, form.words()).astype(np.int32).view(np.uint32)
    return Vector(narrow, [int(x) % vector.MODULUS for x in rng.integers(-1000, 1000, len(form.names))])


def plain_sum(places, form: Form = FORM) -> Vector:
    total = Vector(np.zeros(form.words(), np.uint32), [0] * len(form.names))
    for place in places:
        vector.add(total, summand(place, form), 1)
    return total


class Sum:
    """One attempt of `clients`, whose summands are `summand(place)`; the steps of an honest server, one by one."""

    def __init__(self, folder, clients: int, round: int = 1, attempt: int = 1, cohort: int = 0, form: Form = FORM):
        self.which, self.form = Session(RUN, round, attempt, cohort or clients, MESSAGE), form
        self.members = {place: self.member(folder, place) for place in range(clients)}

    def member(self, folder, place: int, added: Vector | None = None) -> Member:
        name = f"client-{place}"
        given = Signer(pair(name)), Authority(ca()), Opened(folder / f"{name}.json"), self.form
        return Member(self.which, place, *given, added or summand(place, self.form))

    def meet(self) -> None:
        """Keys, and the shares that everybody makes."""
        self.table = {place: member.keys() for place, member in self.members.items()}
        self.keys = session.pack(list(self.table.values()))
        self.shares = {place: self.shared(place) for place in self.members}

    def shared(self, place: int, keys: bytes | None = None) -> dict[int, bytes]:
        payload = self.members[place].share(keys or self.keys)
        return dict(session.unpack(payload, session.SHARES, self.which.cohort))

    def for_client(self, to: int, sharers) -> bytes:
        return session.pack([(place, self.shares[place][to]) for place in sharers if place != to])

    def mask(self, sharers) -> None:
        self.sharers = list(sharers)
        self.masked = {
            place: self.form.unpack(self.members[place].mask(self.for_client(place, self.sharers)))
            for place in self.sharers
        }

    def sign(self, survivors) -> None:
        self.survivors = list(survivors)
        listed = session.pack([(place,) for place in self.survivors])
        self.signed = [(place, self.members[place].sign(listed)) for place in self.survivors]

    def open(self, openers) -> Vector:
        given = {}
        for place in openers:
            row = self.members[place].open(session.pack(self.signed))
            given[place] = {of: row[16 * n : 16 * n + 16] for n, of in enumerate(self.sharers)}
        summands = {place: self.masked[place] for place in self.survivors}
        return unmask.unmask(self.which, self.form, self.table, self.sharers, summands, given)
