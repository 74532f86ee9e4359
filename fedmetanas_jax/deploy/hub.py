"""The server's connections: who is there, who may come, and what they send, as one row of events for the run."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc

from fedmetanas_jax.deploy import checks, credentials
from fedmetanas_jax.deploy.connection import Connection
from fedmetanas_jax.deploy.roster import NotRegistered, Roster
from fedmetanas_jax.deploy.terms import Terms
from fedmetanas_jax.deploy.wire import LARGEST, METHOD, PROTOCOL, Damaged, Message, plain
from fedmetanas_jax.engine.records import versions
from fedmetanas_jax.options import UsageError

MOST_REFUSALS = 100  # that are kept for a round's record; more of them are counted


class Event(NamedTuple):
    """Something that a client did."""

    kind: str  # joined, ready, answer, judged, failed, refused, gone
    connection: Connection
    value: Any = None


class Hub:
    """Listens from `listen` to `close`. Events come from the connections' threads; all else is the run's thread's."""

    def __init__(self, terms: Terms, run: str, roster: Roster, say: Callable[[str], None]):
        self._terms, self.run, self.roster, self.say = terms, run, roster, say
        self.here: dict[int, Connection] = {}
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.round = 1  # the one that is under way
        self.refusals: list[dict] = []  # since they were last taken
        self.lost_refusals = 0
        self._lock = threading.Lock()
        self._most_rows = terms.config["train_size"]
        self._versions = versions()
        self._server: grpc.Server | None = None

    def listen(self, host: str, port: int, clients: int, pair: credentials.Pair | None) -> int:
        """-> the port, which of port 0 is any that is free. UsageError where it cannot be had."""
        connections = 2 * clients + 8  # one that is gone holds its thread until that is noticed
        options = [*credentials.OPTIONS, ("grpc.max_receive_message_length", LARGEST), ("grpc.so_reuseport", 0)]
        server = grpc.server(
            ThreadPoolExecutor(connections), options=options, maximum_concurrent_rpcs=connections
        )
        service, method = METHOD.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._join)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        where = f"{host}:{port}"
        try:
            if pair is None:
                port = server.add_insecure_port(where)
            else:
                port = server.add_secure_port(where, credentials.of_server(pair))
        except RuntimeError:
            raise UsageError(f"cannot listen on {where}: it is in use, or not this machine's") from None
        self._server = server
        server.start()
        self.say(f"listening on {host}:{port} for {clients} clients")
        return port

    def close(self, kind: str, **fields) -> None:
        """Tells everybody, and ends."""
        for connection in list(self.here.values()):
            connection.finish(kind, **fields)
        if self._server is not None:
            self._server.stop(2.0).wait(5.0)

    def poll(self, seconds: float) -> Event | None:
        """The next event, if one comes within that time."""
        try:
            return self.events.get(timeout=seconds)
        except queue.Empty:
            return None

    def note(self, name: str, reason: str) -> None:
        """A refusal: said, and kept for the round's record."""
        self.say(f"refused {name}: {reason}")
        with self._lock:
            if len(self.refusals) < MOST_REFUSALS:
                self.refusals.append({"client": name, "reason": reason})
            else:
                self.lost_refusals += 1

    def noted(self) -> dict:
        """The entries of a round's record that say who was refused since the last one."""
        with self._lock:
            found, more = self.refusals, self.lost_refusals
            self.refusals, self.lost_refusals = [], 0
        return ({"refused": found} if found else {}) | ({"refused_more": more} if more else {})

    def _join(self, raw, context):
        connection = Connection(context)
        connection.name = plain(credentials.name_of(context) or connection.name, 64)
        threading.Thread(target=self._receive, args=(connection, raw), daemon=True).start()
        yield from connection.outgoing()

    def _receive(self, connection: Connection, raw) -> None:
        try:
            for message in connection.incoming(raw):
                if message.kind == "hello":
                    self._welcome(connection, message)
                    if connection.place < 0:
                        break
                else:
                    self.events.put(self._event(connection, message))
        except (Damaged, Unasked) as error:
            self.note(connection.name, str(error))
            connection.close(str(error), final=True)
        except grpc.RpcError:
            pass
        except Exception as error:  # gRPC raises a bare Exception in a reader whose call was cancelled
            if str(error):
                self.note(connection.name, f"{type(error).__name__}: {plain(str(error))}")
            connection.cancel()
        if connection.place >= 0:
            self.events.put(Event("gone", connection))

    def _welcome(self, connection: Connection, message: Message) -> None:
        fields = message.fields
        name = credentials.name_of(connection.context)
        connection.name = name = plain(fields["name"] if name is None else name, 64)
        reason = self._unwelcome(fields, name)
        if reason:
            self.note(name, reason)
            connection.close(reason, final=True)
            return
        try:
            place = self.roster.place(name)
        except (NotRegistered, UsageError) as error:
            self.note(name, str(error))
            connection.close(str(error), final=True)
            return
        if fields["jax"] != self._versions["jax"]:
            self.say(f"{name} computes with jax {plain(fields['jax'], 20)}, this server with {self._versions['jax']}")
        connection.place = place
        terms = {"terms": self._terms._asdict(), "run": self.run, "place": place, "name": name, "round": self.round}
        connection.send("welcome", **terms)
        self.events.put(Event("joined", connection))

    def _unwelcome(self, fields: dict, name: str) -> str:
        if fields["protocol"] != PROTOCOL:
            return f"it speaks protocol {fields['protocol']}, this server {PROTOCOL}"
        mine = self._versions["fedmetanas_jax"]
        if fields["version"] != mine:
            return f"it has version {plain(fields['version'], 40)} of fedmetanas_jax, this server {mine}"
        if fields["run"] not in ("", self.run):
            return "its workdir is of another run (another config)"
        return "" if name else "it has no name (--name)"

    def _event(self, connection: Connection, message: Message) -> Event:
        kind, owed = message.kind, connection.owes
        if kind == "ready" and connection.prepares > 0:
            connection.prepares -= 1
            return Event("ready", connection, message.fields["plan"])
        if owed is None or kind not in ("failed", connection.owed()):
            raise Unasked(f"'{kind}' was not asked for")
        connection.owes, connection.reader.room = None, {}
        if kind == "failed":
            return Event("failed", connection, plain(message.fields["reason"]))
        round = owed if isinstance(owed, int) else owed.round
        try:
            if kind == "judged":
                return Event("judged", connection, checks.judged(message.fields, round, self._most_rows))
            if isinstance(owed, checks.Exchange):
                return Event("answer", connection, (round, owed.check(message)))
            return Event("answer", connection, (round, checks.reply(message, owed)))
        except checks.Refused as error:
            return Event("refused", connection, (round, str(error)))


class Unasked(Exception):
    """A message that may not come now. One line."""
