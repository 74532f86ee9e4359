"""The cryptography of secure sums: keys that two clients agree on, masks of them, and shares of secrets.

Bonawitz et al., CCS 2017, with the primitives of two kept libraries: X25519, HKDF-SHA256, ChaCha20 and
ChaCha20-Poly1305 of `cryptography`, Shamir's sharing of `pycryptodome`. That one shares 16 bytes at a time, so that is
what a secret has (128 bits, X25519's own strength), and keys are derived of it. Every key is used for one purpose, of
one client or pair, in one attempt at one round: all that is in the `about` it is derived for.
"""

import hashlib
import os

import msgpack
import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmetanas_jax.deploy.vector import Form, Vector

SECRET, KEY = 16, 32  # bytes of what is shared, and of a key
SEALED = 2 * SECRET + 16  # bytes of a sealed pair of shares: two, and the tag
ONCE = bytes(12)  # the nonce of a key that seals one message


def new_secret() -> bytes:
    """[SECRET] of the operating system's randomness."""
    return os.urandom(SECRET)


def derived(secret: bytes, *about: bytes | str | int) -> bytes:
    """A key, [KEY], of a secret and what it is for."""
    return HKDF(hashes.SHA256(), KEY, None, msgpack.packb(["fedmetanas secure sum", *about])).derive(secret)


def new_key() -> X25519PrivateKey:
    """A private key that nobody else will have."""
    return X25519PrivateKey.generate()


def private_of(secret: bytes, session: bytes) -> X25519PrivateKey:
    """The private key that a client's pairwise masks come from: who has its shared secret has its key."""
    return X25519PrivateKey.from_private_bytes(derived(secret, "mask key", session))


def public_of(key: X25519PrivateKey) -> bytes:
    """[KEY]"""
    return key.public_key().public_bytes_raw()


def commitment_of(secret: bytes, session: bytes) -> bytes:
    """[KEY], which binds to the secret and tells nothing of it: by it one knows what was rebuilt of shares."""
    return derived(secret, "commitment", session)


def agreed(mine: X25519PrivateKey, other: bytes, *about: bytes | str | int) -> bytes:
    """The key, [KEY], that two clients share. ValueError for a public key that is none."""
    return derived(mine.exchange(X25519PublicKey.from_public_bytes(other)), *about)


def pair_key(mine: X25519PrivateKey, other: bytes, session: bytes, one: int, two: int) -> bytes:
    """The key of the mask that the clients at these places add and subtract, the same from either side."""
    return agreed(mine, other, "pair", session, min(one, two), max(one, two))


def mask(key: bytes, form: Form) -> Vector:
    """The mask of a key, which must serve for this one alone: ChaCha20's stream."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(form.size()))
    return form.unpack(stream)


def self_key(secret: bytes, session: bytes) -> bytes:
    """The key of the mask that a client adds beside the pairwise ones."""
    return derived(secret, "self", session)


def seal(key: bytes, shares: bytes, session: bytes) -> bytes:
    """[SEALED] of two shares, for the one other client that has the key."""
    return ChaCha20Poly1305(key).encrypt(ONCE, shares, session)


def unseal(key: bytes, sealed: bytes, session: bytes) -> bytes:
    """The two shares. ValueError where they were not sealed by that key."""
    try:
        return ChaCha20Poly1305(key).decrypt(ONCE, sealed, session)
    except InvalidTag:
        raise ValueError("was not sealed for it, or was changed on the way") from None


def split(secret: bytes, needed: int, holders: int) -> list[bytes]:
    """A share, [SECRET], for every holder, of which any `needed` rebuild the secret and fewer tell nothing."""
    return [share for _, share in Shamir.split(needed, holders, secret)]


def rebuilt(shares: dict[int, bytes]) -> bytes:
    """The secret of shares {holder, from 0: share}; some other 16 bytes where they are wrong or too few."""
    return Shamir.combine([(holder + 1, share) for holder, share in shares.items()])


def digest(*parts: bytes) -> bytes:
    """SHA-256 of parts whose lengths count."""
    return hashlib.sha256(msgpack.packb(list(parts))).digest()


def blank(form: Form) -> Vector:
    """A sum of nobody's."""
    return Vector(np.zeros(form.words(), np.uint32), [0] * len(form.names))
