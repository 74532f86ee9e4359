"""For faults.py: somebody who speaks the wire and means harm, and a network that is slow or gone."""

import json
import math
import queue
import socket
import threading
import time
from pathlib import Path

import grpc
import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from fedmetanas_jax.deploy import credentials, layout, share, terms, wire
from fedmetanas_jax.deploy.work import plan_digest
from fedmetanas_jax.engine.records import versions


class Rogue:
    """A client with a certificate, whose replies are wrong in one way.

    hello: fields of its greeting that are. frames: sent in place of a reply. announce: bytes of a payload that never
    comes. value: the norm of its change, or NaN. weight, run: of its reply; round: added to the round's number. flip:
    one bit of the payload after it was hashed.
    """

    def __init__(
        self, port: int, folder: Path, *, hello: dict | None = None, frames: list[bytes] = (), announce: int = 0,
        value: float = 0.0, weight: float = 1.0, run: str | None = None, round: int = 0, flip: bool = False,
        checks_date: bool = True,
    ):  # fmt: skip
        if checks_date:
            pair = credentials.read(folder, "client")
        else:
            pair = credentials.Pair(*((folder / name).read_bytes() for name in ("ca.pem", "client.pem", "client.key")))
        self._hello, self._frames, self._announce, self._flip = hello or {}, frames, announce, flip
        self._value, self._weight, self._run, self._round = value, weight, run, round
        self._channel = grpc.secure_channel(f"localhost:{port}", credentials.of_client(pair))
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        self._programs: dict[str, tuple] = {}

    def __enter__(self) -> "Rogue":
        return self

    def __exit__(self, *_) -> None:
        self._out.put(None)
        self._channel.close()

    def hello(self) -> str:
        """Greets -> what it was told, or gRPC's reason why not."""
        with self:
            return self.serve_until_refused(20.0)

    def serve_until_refused(self, seconds: float) -> str:
        """Takes part until somebody refuses -> the reason that it was told."""
        reader = wire.Reader(wire.FROM_SERVER)
        reader.room = {"train": 1 << 30, "judge": 1 << 30}
        about = versions()
        mine = {"protocol": wire.PROTOCOL, "version": about["fedmetanas_jax"], "jax": about["jax"]}
        self._send(wire.frames("hello", **{"run": "", "name": ""} | mine | self._hello))
        call = self._channel.stream_stream(wire.METHOD)(iter(self._out.get, None), timeout=seconds)
        try:
            for frame in call:
                message = reader.feed(frame)
                if message is None:
                    continue
                if message.kind in ("closed", "refused"):
                    return message.fields["reason"]
                self._obey(message)
            return "the connection ended without a word"
        except grpc.RpcError as error:
            return wire.plain(error.details() or str(error.code()))

    def _obey(self, message: wire.Message) -> None:
        fields = message.fields
        if message.kind == "welcome":
            self._terms = terms.read(fields["terms"])
            self._run = self._run or fields["run"]
        elif message.kind == "prepare":
            name = plan_digest(fields["phase"], fields["plan"])
            self._programs[name] = self._shapes(fields["phase"], fields["plan"])
            self._send(wire.frames("ready", phase=fields["phase"], plan=name))
        elif message.kind == "train":
            self._reply(fields)

    def _shapes(self, phase: int, plan: str):
        config = terms.config_of(self._terms)
        algorithm = terms.phases_of(self._terms, Path("."))[phase].make(json.loads(plan))
        server, own = jax.eval_shape(algorithm.init, jax.random.key(0))
        message = jax.eval_shape(lambda x: algorithm.send(x, jnp.int32(0), jax.random.key(0)), server)
        rows = share.shapes(self._terms, config, algorithm.reads_test)
        return jax.eval_shape(algorithm.client_update, message, own, rows, jax.random.key(0))

    def _reply(self, fields: dict) -> None:
        reply = self._programs[fields["plan"]]
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(reply.change))
        each = self._value if math.isnan(self._value) else self._value / math.sqrt(count)
        change = jax.tree.map(lambda x: np.full(x.shape, each, x.dtype), reply.change)
        parts = layout.of_reply(change, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), reply.report), None)
        about = {
            "run": self._run, "round": fields["round"] + self._round, "weight": self._weight, "own": 0,
            "metrics": {name: 1.0 for name in reply.metrics}, "layout": layout.digest(parts),
        }  # fmt: skip
        header, *chunks = wire.frames("update", layout.pack(parts), **about)
        if self._announce:
            header = msgpack.packb(msgpack.unpackb(header) | {"bytes": self._announce})
        if self._flip:
            chunks[0] = bytes([chunks[0][0] ^ 1]) + chunks[0][1:]
        self._send(self._frames or [header, *chunks])

    def _send(self, frames) -> None:
        for frame in frames:
            self._out.put(frame)


class Throttle:
    """A TCP proxy on a port of 127.0.0.1 that lets so many bytes a second through each way.

    While it is `gone` it swallows what it gets, of connections that begin meanwhile too, and ends none.
    """

    def __init__(self, target: int, rate: float = math.inf):
        self._target, self._rate, self._open = target, rate, True
        self.gone = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Throttle":
        return self

    def __exit__(self, *_) -> None:
        self._open = False
        self._listener.close()

    def _accept(self) -> None:
        while self._open:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                continue
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        piece = max(256, int(min(self._rate / 20, 1 << 16)))
        lost = False
        try:
            while self._open and (data := source.recv(piece)):
                lost = lost or self.gone  # a stream with a hole in it is of no use any more
                if not lost:
                    sink.sendall(data)
                    time.sleep(len(data) / self._rate)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                one.close()
