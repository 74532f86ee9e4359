"""How a ClientApp, which is a process for one message, reaches its client's worker, which stays: a Unix socket.

It lies in a folder that only this user can enter. What crosses it is one JSON map and then frames, both ways. Imports
neither jax nor flwr.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection  # only its framing is used: send_bytes and recv_bytes, no pickle
from pathlib import Path
from typing import NamedTuple

from fedmetanas_flower.letter import LOST, RUN, Letter

LOG = "worker.log"  # in the client's workdir
START = 180.0  # seconds for a worker to begin to listen: it imports jax, and looks for devices
NODE_CONFIG = "--node-config 'data=\"mine.npz\" workdir=\"mine\" name=\"me\"'"


class DoorError(Exception):
    """The worker cannot be reached, or will not answer. One line, for this machine alone: it may name files."""


class Node(NamedTuple):
    """What the SuperNode's owner decided; of what comes from elsewhere only the run's name has a part in it."""

    data: Path  # the client's images
    workdir: Path  # where its state of this run is kept
    name: str

    @classmethod
    def of(cls, config: dict, node_id: int, run: str) -> "Node":
        """DoorError for a node config that lacks something."""
        for key in ("data", "workdir"):
            if not isinstance(config.get(key), str) or not config[key]:
                raise DoorError(f"the SuperNode has no '{key}': start it with {NODE_CONFIG}")
        name = config.get("name", f"node-{node_id}")
        if not isinstance(name, str) or not name:
            raise DoorError(f"the SuperNode's name is {name!r}; it must be a text, as in {NODE_CONFIG}")
        data, workdir = (Path(config[key]).expanduser().absolute() for key in ("data", "workdir"))
        return cls(data, workdir / run[:RUN], name)


def ask(node: Node, letter: Letter) -> Letter:
    """The worker's answer to a letter; a worker is started where there is none. DoorError: there is no answer."""
    with _reach(node) as line:
        try:
            send(line, {"talk": letter.talk, "data": str(node.data), "name": node.name}, letter.frames)
            about, frames = receive(line)
        except (OSError, EOFError):
            print(f"the worker of {node.workdir} ended: {_last_line(node.workdir)}", flush=True)
            return letter._replace(frames=[], trouble=LOST)
    if about["why"]:
        raise DoorError(about["why"])
    return letter._replace(frames=frames, trouble=about["trouble"])


def send(line: Connection, about: dict, frames: Sequence[bytes]) -> None:
    """OSError: the other side is gone."""
    line.send_bytes(json.dumps(about | {"frames": len(frames)}).encode())
    for frame in frames:
        line.send_bytes(frame)


def receive(line: Connection) -> tuple[dict, list[bytes]]:
    """What `send` sent. OSError, EOFError: the other side is gone."""
    about = json.loads(line.recv_bytes())
    return about, [line.recv_bytes() for _ in range(about.pop("frames"))]


@contextlib.contextmanager
def listening(workdir: Path) -> Iterator[socket.socket]:
    """The worker's end. Whoever calls this holds the claim to the workdir, so that a socket that is there is a dead
    worker's."""
    path = _socket(workdir)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _socket(workdir: Path) -> Path:
    """Not in the workdir itself: the path of a socket can have no more than about 100 bytes."""
    folder = Path(tempfile.gettempdir()) / f"fedmetanas-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise DoorError(f"{folder} is not a folder that only this user can enter; remove it")
    return folder / f"{hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:20]}.sock"


def _reach(node: Node) -> Connection:
    path = _socket(node.workdir)
    if (line := _connect(path)) is not None:
        return line
    try:
        node.workdir.mkdir(parents=True, exist_ok=True)
        lock = open(node.workdir / ".starting", "a")
    except OSError as error:
        raise DoorError(f"cannot write in workdir {node.workdir}: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two messages at once, one starts a worker
        if (line := _connect(path)) is not None:
            return line
        worker, end = _start(node), time.monotonic() + START
        while time.monotonic() < end:
            if (line := _connect(path)) is not None:
                return line
            if worker.poll() is not None:
                raise DoorError(f"the worker of {node.workdir} does not start: {_last_line(node.workdir)}")
            time.sleep(0.05)
        worker.kill()
        raise DoorError(f"the worker of {node.workdir} did not listen within {START:g} s; its log is {LOG} there")


def _connect(path: Path) -> Connection | None:
    """None: nobody listens, though a dead worker may have left the file."""
    caller = socket.socket(socket.AF_UNIX)
    try:
        caller.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        caller.close()
        return None
    except OSError as error:
        caller.close()
        raise DoorError(f"cannot use the socket {path}: {error}") from None
    return Connection(caller.detach())


def _start(node: Node) -> subprocess.Popen:
    """A worker that outlives this process, and the SuperNode."""
    here = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    flags = [f"--data={node.data}", f"--workdir={node.workdir}"]
    with open(node.workdir / LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedmetanas_flower.worker", *flags],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )  # fmt: skip


def _last_line(workdir: Path) -> str:
    try:
        lines = (workdir / LOG).read_text(errors="replace").split("\n")
    except OSError:
        lines = []
    return next((line for line in reversed(lines) if line.strip()), f"{LOG} says nothing")
