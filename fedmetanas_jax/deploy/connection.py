"""One client's connection at the server: a receiver and a sender, and what the client owes."""

import queue
import threading
from collections.abc import Iterator

import grpc

from fedmetanas_jax.deploy import checks
from fedmetanas_jax.deploy.wire import FROM_CLIENT, Damaged, Message, Reader, frames

SILENCE = 30.0  # seconds in which a peer has to say hello


class Closed(Exception):
    """The server ends a connection. One line, which the client is told."""


class Connection:
    """What the server knows of a peer. Its methods may be called from any thread."""

    def __init__(self, context: grpc.ServicerContext):
        self.context = context
        self.name, self.place = "somebody", -1  # until its hello was found good
        self.plan = ""  # the program that it is ready for
        self.prepares = 0  # programs that it was told to make ready, and has not answered for
        # The reply that was asked for, or the round to be judged in.
        self.owes: checks.Wanted | checks.Exchange | int | None = None
        self.reader = Reader(FROM_CLIENT)
        self.sent = 0  # bytes
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        self._silent = threading.Timer(SILENCE, self._too_silent)
        self._silent.daemon = True

    def send(self, kind: str, payload: bytes = b"", **fields) -> None:
        """Has it sent when what is before it was."""
        self._out.put((kind, payload, fields))

    def prepare(self, phase: int, plan: str) -> None:
        """Has it compile a program, for which it says when it is ready."""
        self.prepares += 1
        self.send("prepare", phase=phase, plan=plan)

    def owed(self) -> str:
        """The kind of the reply that it owes, or ''."""
        if self.owes is None:
            return ""
        if isinstance(self.owes, checks.Exchange):
            return self.owes.kind
        return "judged" if isinstance(self.owes, int) else "update"

    def ask(
        self, wanted: checks.Wanted | checks.Exchange | int, room: int, kind: str, payload: bytes, **fields
    ) -> None:
        """Sends what calls for one reply, and lets that come, with a payload of at most `room` bytes."""
        self.owes = wanted
        self.reader.room = {self.owed(): room}
        self.send(kind, payload, **fields)

    def close(self, reason: str, final: bool) -> None:
        """Tells it why, and ends. final: its coming back would be in vain."""
        self.finish("closed", reason=reason, final=final)

    def finish(self, kind: str, **fields) -> None:
        """Sends a last message, and ends."""
        self.send(kind, **fields)
        self._out.put(None)

    def cancel(self) -> None:
        """Ends at once."""
        self._out.put(None)
        self.context.cancel()

    def outgoing(self) -> Iterator[bytes]:
        """The frames to send, for gRPC, until the connection ends."""
        if not self.context.add_callback(lambda: self._out.put(None)):
            return  # it has ended already
        while (letter := self._out.get()) is not None:
            kind, payload, fields = letter
            for frame in frames(kind, payload, **fields):
                self.sent += len(frame)
                yield frame

    def incoming(self, raw: Iterator[bytes]) -> Iterator[Message]:
        """Its messages, until it ends. Damaged, Closed: it is to be ended."""
        self._silent.start()
        try:
            for frame in raw:
                message = self.reader.feed(frame)
                if message is None:
                    continue
                self._silent.cancel()
                if (message.kind == "hello") != (self.place < 0):
                    raise Damaged(f"'{message.kind}' is not what comes now")
                yield message
        finally:
            self._silent.cancel()

    def _too_silent(self) -> None:
        self.close(f"no hello within {SILENCE:.0f} s", final=False)
