"""The server's connections to Flower's nodes, as the hub that a networked run has of its clients.

A node is sent one message and has to answer it before it is sent another. What a run tells it in between is kept until
something calls for an answer, so that a round costs a client one message.
"""

import secrets
import threading
import time
from collections.abc import Iterable
from queue import SimpleQueue

from flwr.app import Message
from flwr.serverapp import Grid

from fedmetanas_flower import records
from fedmetanas_flower.letter import LOST, RUN, Letter
from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.hub import Hub
from fedmetanas_jax.deploy.wire import frames, plain

LOOK = 2.0  # seconds between two looks at who is there
PULL = 0.3  # seconds between two looks for replies
SOON, AGAIN = 2.0, 20.0  # seconds until a node is asked again: whose worker began anew, and that failed otherwise
FAREWELL = 60.0  # most seconds until all were told that the run is done
IN_PASSING = ("welcome", "taken", "refused")  # what calls for no answer


class GridError(Exception):
    """Flower does not carry messages any more. One line."""


class Peer:
    """What a connection asks of gRPC's context. name: the only one that it may have, or None for the one it says."""

    def __init__(self, name: str | None):
        self._names = {} if name is None else {"x509_common_name": [name.encode()]}

    def auth_context(self) -> dict:
        """As gRPC's of a TLS connection."""
        return self._names


class NodeConnection(Connection):
    """A node's connection, from the message that begins a talk to the loss of the node."""

    def __init__(self, node: int, name: str | None):
        super().__init__(Peer(name))
        self.node, self.talk = node, secrets.token_hex(8)
        self.name = f"node {node}"
        self.message = ""  # the id of the one that it has to answer
        self.ended = self.heard = False
        self.arrived: SimpleQueue[bytes | None] = SimpleQueue()  # frames; None is the end
        self._letters: list[tuple] = []
        self._lock = threading.Lock()

    def send(self, kind: str, payload: bytes = b"", **fields) -> None:
        """Has it sent with what is before it."""
        with self._lock:
            self._letters.append((kind, payload, fields))

    def finish(self, kind: str, **fields) -> None:
        """Sends a last message, and ends."""
        self.send(kind, **fields)
        self.ended = True

    def cancel(self) -> None:
        """Ends at once."""
        with self._lock:
            self._letters.clear()
        self.ended = True

    def due(self) -> bool:
        """Whether something is to be sent now."""
        with self._lock:
            return any(kind not in IN_PASSING for kind, *_ in self._letters)

    def take(self) -> list[bytes]:
        """The frames of all that is to be sent."""
        with self._lock:
            letters, self._letters = self._letters, []
        found = [frame for kind, payload, fields in letters for frame in frames(kind, payload, **fields)]
        self.sent += sum(map(len, found))
        return found


class FlowerHub(Hub):
    """A Hub whose connections are a grid's nodes. One thread has the grid; every node that answers has another."""

    def __init__(self, *given, grid: Grid, by_node: bool):
        """given: Hub's arguments. by_node: clients are called by their node's id, whatever they say."""
        super().__init__(*given)
        self._grid, self._by_node = grid, by_node
        self._nodes: dict[int, NodeConnection] = {}
        self._asked: dict[str, NodeConnection] = {}  # by message
        self._not_before: dict[int, float] = {}
        self._next_look = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._until: float | None = None  # of the farewell
        self._failure: Exception | None = None

    def listen(self, host: str, port: int, clients: int, pair: None) -> int:
        """Begins to look for nodes; where Flower's SuperLink listens is its own matter."""
        self._thread.start()
        self.say(f"run {self.run[:RUN]} looks for {clients} clients among Flower's nodes")
        return port

    def poll(self, seconds: float):
        """As Hub's. GridError."""
        if self._failure is not None:
            why = plain(f"{type(self._failure).__name__}: {self._failure}")
            raise GridError(f"Flower carries no more messages ({why}); the same run config goes on with this run")
        return super().poll(seconds)

    def close(self, kind: str, **fields) -> None:
        """Tells everybody that the run is done. Of a server that only stops nobody need know: the next one begins
        talks of its own."""
        if kind == "done":
            for connection in list(self._nodes.values()):
                connection.finish(kind, **fields)
            self._until = time.monotonic() + FAREWELL
        else:
            self._until = 0.0
        self._thread.join(self._until - time.monotonic() if self._until else PULL)

    def _run(self) -> None:
        try:
            while self._until is None or (self._to_tell() and time.monotonic() < self._until):
                if self._until is None:
                    self._look()
                self._send()
                self._pull()
                time.sleep(PULL)
        except Exception as error:  # of whatever kind, the run's thread is to hear of it
            self._failure = error

    def _to_tell(self) -> bool:
        return any(connection.heard for connection in self._nodes.values())

    def _look(self) -> None:
        """Who came, and who is gone."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK
        there = set(self._grid.get_node_ids())
        for connection in [c for node, c in self._nodes.items() if node not in there]:
            self._lose(connection, "its node is no longer there", 0.0)
        for node in there - self._nodes.keys():
            if self._not_before.get(node, 0.0) <= now:
                self._nodes[node] = NodeConnection(node, f"node-{node}" if self._by_node else None)
                self._push(self._nodes[node])

    def _send(self) -> None:
        for connection in list(self._nodes.values()):
            if connection.message:
                continue
            if connection.due():
                self._push(connection)
            elif connection.ended:
                self._lose(connection, "", AGAIN)

    def _push(self, connection: NodeConnection) -> None:
        letter = Letter(self.run, connection.talk, connection.take())
        message = Message(records.pack(letter), connection.node, "train", group_id=str(self.round))
        ids = list(self._grid.push_messages([message]))
        if not ids or not ids[0]:
            return self._lose(connection, "Flower took no message for it", AGAIN)
        connection.message = ids[0]
        self._asked[ids[0]] = connection

    def _pull(self) -> None:
        if not self._asked:
            return
        for reply in self._grid.pull_messages(list(self._asked)):
            connection = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if connection is not None:
                connection.message = ""
                self._take(connection, reply)

    def _take(self, connection: NodeConnection, reply: Message) -> None:
        if reply.has_error():
            return self._lose(connection, f"Flower has no answer of it: {plain(reply.error.reason)}", AGAIN)
        try:
            letter = records.unpack(reply.content)
        except records.NoLetter as error:
            self.note(connection.name, str(error))
            return self._lose(connection, "", AGAIN)
        if connection.ended:
            return None if connection.due() else self._lose(connection, "", AGAIN)
        if letter.talk != connection.talk or not letter.frames:
            reason = plain(letter.trouble) or "it answered nothing"
            return self._lose(connection, reason, SOON if letter.trouble == LOST else AGAIN)
        if not connection.heard:
            connection.heard = True
            arrived: Iterable[bytes] = iter(connection.arrived.get, None)
            threading.Thread(target=self._receive, args=(connection, arrived), daemon=True).start()
        for frame in letter.frames:
            connection.arrived.put(frame)

    def _lose(self, connection: NodeConnection, reason: str, wait: float) -> None:
        if reason:
            self.say(f"{connection.name}: {reason}")
        connection.ended = True
        connection.arrived.put(None)  # its thread says so to the run
        self._asked.pop(connection.message, None)
        del self._nodes[connection.node]
        self._not_before[connection.node] = time.monotonic() + wait

    def _welcome(self, connection: NodeConnection, message) -> None:
        """As Hub's, but nobody takes the name of a client that is there."""
        name = plain(message.fields["name"], 64)
        others = [c for c in list(self._nodes.values()) if c is not connection and c.place >= 0 and c.name == name]
        if others and not self._by_node:
            reason = f"'{name}' is node {others[0].node}, which is there"
            self.note(connection.name, reason)
            return connection.close(reason, final=True)
        super()._welcome(connection, message)
