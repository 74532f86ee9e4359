"""What crosses the network: msgpack maps, and behind one of them, if it says so, its payload in chunks of 1 MB.

A frame is one gRPC message. Nothing here does I/O, trusts a size before it was compared with what may come, or makes
an object of anything but plain maps, lists, numbers and text.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack

PROTOCOL = 2  # since 2, what is pruned does not travel
METHOD = "/fedmetanas.Federation/Join"
CHUNK = 1 << 20  # bytes of a payload in one frame
HEADER = 1 << 18  # most bytes of a map; a plan of a large supernet has 10 kB
TEXT = 2000  # most characters of a text that a client sends
BYTES = 4096  # most of a field of bytes that a client sends: a certificate
LARGEST = CHUNK + 1024  # what gRPC itself is to take as one message

# field -> type, of every kind of message; a message has all of its fields and no others. Rounds are numbered from 1.
FROM_CLIENT: dict[str, dict[str, type]] = {
    "hello": {"protocol": int, "version": str, "jax": str, "run": str, "name": str},
    "ready": {"phase": int, "plan": str},
    "update": {"run": str, "round": int, "weight": float, "metrics": dict, "own": int, "layout": str},
    "judged": {"round": int, "before": int, "after": int, "count": int},
    "failed": {"round": int, "reason": str},
    # Secure sums, see session.py.
    "keys": {
        "run": str, "round": int, "attempt": int, "own": int, "layout": str, "certificate": bytes, "cipher_key": bytes,
        "mask_key": bytes, "commitment": bytes, "signature": bytes,
    },
    "shares": {"round": int, "attempt": int},
    "masked": {"round": int, "attempt": int, "layout": str},
    "signed": {"round": int, "attempt": int, "signature": bytes},
    "opened": {"round": int, "attempt": int},
}  # fmt: skip
FROM_SERVER: dict[str, dict[str, type]] = {
    "welcome": {"terms": dict, "run": str, "place": int, "name": str, "round": int},
    "prepare": {"phase": int, "plan": str},
    "train": {"round": int, "plan": str, "last": int, "anew": int, "layout": str},
    "judge": {"round": int, "plan": str, "layout": str},
    "taken": {"round": int},
    "refused": {"round": int, "reason": str},  # a reply; the connection stays
    "closed": {"reason": str, "final": bool},  # final: coming back would end the same way
    "done": {"rounds": int},
    "train_to_sum": {"round": int, "plan": str, "last": int, "anew": int, "layout": str, "attempt": int},
    "share": {"round": int, "attempt": int},
    "mask": {"round": int, "attempt": int},
    "sign": {"round": int, "attempt": int},
    "open": {"round": int, "attempt": int},
}
OF_SUMS = ("share", "mask", "sign", "open")  # what the server asks for once it has keys
WITH_PAYLOAD = ("update", "train", "judge", "shares", "masked", "opened", "train_to_sum", *OF_SUMS)
PAYLOAD = {"bytes": int, "sha256": str}


class Damaged(Exception):
    """What came is no message, or none that may come now; what follows it cannot be read. One line."""


class Message(NamedTuple):
    """A message that was received whole; its payload has the SHA-256 that it says it has."""

    kind: str
    fields: dict[str, Any]
    payload: bytes | bytearray = b""


def frames(kind: str, payload: bytes = b"", **fields) -> Iterator[bytes]:
    """The frames of a message."""
    header = {"kind": kind, **fields}
    if kind in WITH_PAYLOAD:
        header |= {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    yield msgpack.packb(header)
    for start in range(0, len(payload), CHUNK):
        yield payload[start : start + CHUNK]


class Reader:
    """Makes messages of the frames of one side.

    `room`: kind -> most bytes of a payload that may come now; whoever asks for one makes the room. `seen`: bytes of
    all frames so far.
    """

    def __init__(self, kinds: dict[str, dict[str, type]]):
        self._kinds = kinds
        self.room: dict[str, int] = {}
        self.seen = 0
        self._header: dict | None = None  # of the message whose payload is coming
        self._payload = bytearray()

    def feed(self, frame: bytes) -> Message | None:
        """The message that is whole with this frame, if one is. Damaged: see there; the reader is then of no more use.
        """
        self.seen += len(frame)
        if self._header is None:
            header = self._parse(frame)
            if header["kind"] not in WITH_PAYLOAD:
                return self._message(header)
            self._header = header
        elif not 0 < len(frame) <= CHUNK or len(self._payload) + len(frame) > self._header["bytes"]:
            raise Damaged(f"a chunk of {len(frame)} bytes where {self._missing()} are to come")
        else:
            self._payload += frame
        if self._missing():
            return None
        header, payload, self._header, self._payload = self._header, self._payload, None, bytearray()
        if hashlib.sha256(payload).hexdigest() != header["sha256"]:
            raise Damaged(f"the payload of '{header['kind']}' has not the SHA-256 that was sent with it")
        return self._message(header, payload)

    def _missing(self) -> int:
        return self._header["bytes"] - len(self._payload)

    def _message(self, header: dict, payload: bytes | bytearray = b"") -> Message:
        fields = {name: x for name, x in header.items() if name != "kind" and name not in PAYLOAD}
        return Message(header["kind"], fields, payload)

    def _parse(self, frame: bytes) -> dict:
        """The map, which is one of the kinds with exactly its fields."""
        if len(frame) > HEADER:
            raise Damaged(f"a map of {len(frame)} bytes; at most {HEADER} are allowed")
        try:
            header = msgpack.unpackb(frame, strict_map_key=True)
        except Exception as error:  # damage shows as nearly any exception of msgpack, and of Python
            raise Damaged(f"no msgpack ({type(error).__name__})") from None
        if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
            raise Damaged("no map with a 'kind'")
        kind = header["kind"]
        if kind not in self._kinds:
            raise Damaged(f"no message is called {plain(kind, 40)!r}; there are {', '.join(self._kinds)}")
        wanted = {"kind": str} | self._kinds[kind] | (PAYLOAD if kind in WITH_PAYLOAD else {})
        if header.keys() != wanted.keys():
            raise Damaged(f"'{kind}' has not the fields {', '.join(wanted)}")
        for name, of in wanted.items():
            if type(header[name]) is not of:
                raise Damaged(f"'{kind}': {name} is no {of.__name__}")
        if self._kinds is FROM_CLIENT and any(isinstance(x, str) and len(x) > TEXT for x in header.values()):
            raise Damaged(f"'{kind}' has a text of more than {TEXT} characters")
        if self._kinds is FROM_CLIENT and any(isinstance(x, bytes) and len(x) > BYTES for x in header.values()):
            raise Damaged(f"'{kind}' has a field of more than {BYTES} bytes")
        if kind in WITH_PAYLOAD and not 0 < header["bytes"] <= self.room.get(kind, 0):
            raise Damaged(f"'{kind}' announces {header['bytes']} bytes where {self.room.get(kind, 0)} may come")
        return header


def plain(text: str, most: int = 300) -> str:
    """What somebody else sent, as it can be shown: one line, printable, not long."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: most + 1])
    return shown if len(text) <= most else f"{shown[:most]}..."
