"""A client: one process for the whole run, which comes back by itself when the connection or the server is gone."""

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc

from fedmetanas_jax import build
from fedmetanas_jax.config import Config
from fedmetanas_jax.data.dataset import DataError
from fedmetanas_jax.deploy import credentials, terms
from fedmetanas_jax.deploy.wire import (
    FROM_SERVER,
    LARGEST,
    METHOD,
    OF_SUMS,
    PROTOCOL,
    TEXT,
    Damaged,
    Message,
    Reader,
    frames,
    plain,
)
from fedmetanas_jax.deploy.work import Worker, WorkError
from fedmetanas_jax.engine.claim import claim
from fedmetanas_jax.engine.records import WorkdirError, versions
from fedmetanas_jax.files import to_json, write_text
from fedmetanas_jax.options import UsageError

if TYPE_CHECKING:
    from fedmetanas_jax.deploy.turn import Turns

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two tries to reach the server
# What gRPC says where the server's certificate is to blame; and where the server ended the connection before a word was
# said, as it does for a certificate of another CA or one that has expired.
OF_THE_SERVER, UNHEARD = ("certificate", "handshake", "ssl_error", "hostname"), ("socket closed", "reset by peer")
RUN = "run.txt"  # in the workdir: which run it is of


class JoinError(Exception):
    """The server will not have this client, now or later. One line."""


class Asked(NamedTuple):
    """What a command line asks for."""

    server: str  # host:port
    data: Path  # the client's own .npz
    workdir: Path
    certs: Path | None  # None: without TLS
    name: str = ""  # without TLS alone
    give_up: float = 3600.0  # seconds without a server after which the client ends
    only_secure: bool = False  # whether to take no part in a run whose server would see this client's changes


def join(asked: Asked, say: Callable[[str], None]) -> None:
    """Takes part until the run is done. Raises one of FAILURES, or KeyboardInterrupt."""
    host = asked.server.rpartition(":")[0].strip("[]")
    pair = None
    if asked.certs is None:
        credentials.check_loopback(host)
        say("without TLS: anybody on this machine can read and forge what is sent")
    else:
        pair = credentials.read(asked.certs, "client")
    if not asked.data.is_file():  # said now, and not when a server has long waited for this client
        raise DataError(f"{asked.data}, this client's images, is no file")
    build.prepare_jax(Config())
    with claim(asked.workdir, {"data": str(asked.data.absolute())}, say, frozenset({"data"})) as claimed:
        claimed.write()
        client, wait, heard = Client(asked, say, pair), FIRST_WAIT, time.monotonic()
        while True:
            try:
                with _channel(asked.server, pair) as channel:
                    client.session(channel)
                return
            except grpc.RpcError as error:
                if client.heard:
                    client.heard, wait, heard = False, FIRST_WAIT, time.monotonic()
                else:
                    wait = min(2 * wait, LONGEST_WAIT)
                text = plain(error.details() or str(error.code()))
                hint = "" if pair is None else _hint(text.lower())
                why = f"no connection to {asked.server} ({text}){hint}"
                if time.monotonic() - heard > asked.give_up:
                    raise JoinError(f"{why}; given up after {asked.give_up:g} s (--give_up)") from None
                say(f"{why}; trying again in {wait:.1f} s")
            except Back as error:
                heard = time.monotonic()
                say(f"the server closed the connection: {error}; trying again in {wait:.1f} s")
            time.sleep(wait * random.uniform(0.8, 1.2))  # or all would come at the same moment


def _hint(text: str) -> str:
    if any(word in text for word in OF_THE_SERVER):
        return "; the server's certificate is not accepted here: is it of the CA in ca.pem, and for this host's name?"
    if any(word in text for word in UNHEARD):
        return "; if the server runs, it does not accept this client's certificate: is it of the server's CA?"
    return ""


class Back(Exception):
    """The server closed the connection, and coming back may help. One line."""


class Client:
    """What a client says and does, whatever carries it."""

    def __init__(self, asked: Asked, say: Callable[[str], None], pair: credentials.Pair | None = None):
        """pair: its certificate, for secure sums."""
        self._asked, self._say, self._pair = asked, say, pair
        self._worker: Worker | None = None
        self._turns: Turns | None = None  # of a run with secure sums
        self._place = -1  # of that worker
        path = asked.workdir / RUN
        self._run = path.read_text().strip() if path.exists() else ""
        self.heard = False  # whether the server has answered on the last connection

    def session(self, channel: grpc.Channel) -> None:
        """One connection, to the end of the run. grpc.RpcError: it broke; Back: the server closed it."""
        self.heard = False
        out: queue.SimpleQueue = queue.SimpleQueue()
        call = channel.stream_stream(METHOD)(_outgoing(out))
        reader = Reader(FROM_SERVER)
        # The first answer is small; nothing but a server that is stuck takes long for it.
        timer = threading.Timer(30.0, lambda: None if self.heard else call.cancel())
        timer.daemon = True
        timer.start()
        self.hello(out, self._asked.name)
        try:
            for frame in call:
                self.heard = True
                message = reader.feed(frame)
                if message is not None and self.obey(message, out, reader):
                    return
            raise Back("without a word")
        except Damaged as error:
            raise JoinError(f"the server sends what is no message of this version: {error}") from None
        finally:
            timer.cancel()
            out.put(None)
            call.cancel()

    def hello(self, out: queue.SimpleQueue, name: str) -> None:
        """Says who this is; to be answered by a welcome."""
        about = versions()
        hello = {"protocol": PROTOCOL, "version": about["fedmetanas_jax"], "jax": about["jax"]}
        self._send(out, "hello", **hello, run=self._run, name=name)

    def _send(self, out: queue.SimpleQueue, kind: str, payload: bytes = b"", **fields) -> None:
        out.put((kind, payload, fields))

    def obey(self, message: Message, out: queue.SimpleQueue, reader: Reader) -> bool:
        """Does what the server asks for -> whether the run is done. Answers are put in `out`: (kind, payload, fields).

        Damaged: the message may not come now. Back: the server closed the connection. JoinError, UsageError, DataError:
        the client can take no part.
        """
        kind, fields = message.kind, message.fields
        if kind == "welcome":
            self._begin(fields)
        elif kind == "closed":
            reason = plain(fields["reason"])
            if fields["final"]:
                raise JoinError(f"the server refuses this client: {reason}")
            raise Back(reason)
        elif kind == "done":
            self._say(f"the run is done after {fields['rounds']} rounds")
            return True
        elif kind == "taken":
            self._say(f"round {fields['round']}: taken")
        elif kind == "refused":
            self._say(f"round {fields['round']}: the server did not take the reply: {plain(fields['reason'])}")
        elif self._worker is None:
            raise Damaged(f"'{kind}' before 'welcome'")
        elif kind == "prepare":
            clock = time.perf_counter()
            name = self._worker.prepare(fields["phase"], fields["plan"])
            seconds = time.perf_counter() - clock
            if seconds > 1:
                self._say(f"compiled the program of phase {fields['phase']} in {seconds:.1f} s")
            # A new connection has a reader that knows of no room yet.
            size = self._worker.room(name)
            reader.room = {"train": size} if self._turns is None else self._turns.room(size)
            if self._turns is None and self._worker.has_global_model(name):
                reader.room["judge"] = self._worker.room_to_judge(name)
            self._send(out, "ready", phase=fields["phase"], plan=name)
        else:
            self._work(kind, fields, message.payload, out)
        for line in self._worker.said if self._worker else ():
            self._say(line)
        if self._worker:
            self._worker.said.clear()
        return False

    def _work(self, kind: str, fields: dict, payload, out: queue.SimpleQueue) -> None:
        fields, round = dict(fields), fields["round"]
        try:
            if kind in OF_SUMS:
                out.put(self._turns.answer(kind, **fields, payload=payload))
                return
            where = {"plan": fields.pop("plan"), "layout_of": fields.pop("layout")}
            if kind == "train":
                done = self._worker.train(payload, **where, **fields)
                self._send(out, "update", done.row, **done.fields)
            elif kind == "train_to_sum":
                attempt = fields.pop("attempt")
                ready = self._worker.train_to_sum(payload, **where, **fields)
                out.put(self._turns.begin(ready, round, attempt, where["plan"], payload))
            else:
                self._send(out, "judged", round=round, **self._worker.judge(payload, **where))
        except (WorkError, ValueError, OSError, KeyError) as error:
            # The server is not told where this client's files are.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
            self._say(f"round {round}: no reply: {reason}{where}")
            self._send(out, "failed", round=round, reason=plain(reason, TEXT - 10))

    def _begin(self, fields: dict) -> None:
        agreed = terms.read(fields["terms"])
        run = terms.run_of(agreed)
        if run != fields["run"]:
            raise JoinError("the server's terms are not those of the run that it names")
        if self._run not in ("", run):
            raise JoinError(f"{self._asked.workdir} is of another run than the server's; use another workdir")
        if self._run != run:
            write_text(self._asked.workdir / RUN, run + "\n")
            write_text(self._asked.workdir / "terms.json", to_json(agreed._asdict(), 2) + "\n")
            self._run = run
        self._say(f"joined as {plain(fields['name'])}, place {fields['place']}, before round {fields['round']}")
        if self._place != fields["place"]:  # of a server that began the run anew it may be another one
            self._worker = Worker(agreed, fields["place"], self._asked.data, self._asked.workdir)
            self._place = fields["place"]
            self._turns = self._secure(run, fields["place"])

    def _secure(self, run: str, place: int) -> "Turns | None":
        if self._worker.secure is None:
            if self._asked.only_secure:
                raise JoinError("the server would see this client's changes: config.aggregate has no secure sums")
            return None
        try:
            from fedmetanas_jax.deploy.turn import Turns
        except ModuleNotFoundError as error:
            raise UsageError(f"secure sums need the extra: pip install 'fedmetanas_jax[deploy]' ({error})") from None
        config = self._worker.config
        self._say(f"the server is to see sums of {config.cohort} clients' changes and no single one")
        return Turns(self._pair, self._asked.workdir, run, place, config.cohort, self._worker.phases)


def _outgoing(out: queue.SimpleQueue) -> Iterator[bytes]:
    while (letter := out.get()) is not None:
        kind, payload, fields = letter
        yield from frames(kind, payload, **fields)


def _channel(server: str, pair: credentials.Pair | None) -> grpc.Channel:
    options = [*credentials.OPTIONS, ("grpc.max_receive_message_length", LARGEST)]
    if pair is None:
        return grpc.insecure_channel(server, options)
    return grpc.secure_channel(server, credentials.of_client(pair), options)


FAILURES = (UsageError, DataError, JoinError, WorkdirError, OSError)  # that a user can cause or meet
