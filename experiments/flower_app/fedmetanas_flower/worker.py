"""A client's worker: one process that lives from message to message, with its images, its state and what it compiled.

A ClientApp starts it when it is needed; by hand it is

    PYTHONPATH=experiments/flower_app python -m fedmetanas_flower.worker --data=mine.npz --workdir=mine/RUN

where RUN are the 16 characters by which the server calls its run.

It ends when the run is done, when the server refuses it, or when nothing came for --give_up seconds. Exit status as
join.py's.
"""

import contextlib
import queue
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from fedmetanas_flower import door
from fedmetanas_flower.letter import LOST, TROUBLE
from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.environment import jax_variables
from fedmetanas_jax.options import UsageError, parse_path

with jax_variables():
    from fedmetanas_jax import build
    from fedmetanas_jax.config import Config
    from fedmetanas_jax.data.dataset import DataError
    from fedmetanas_jax.deploy.client import FAILURES, Asked, Back, Client, JoinError
    from fedmetanas_jax.deploy.wire import FROM_SERVER, Damaged, Reader, frames
    from fedmetanas_jax.engine.claim import claim

FLAGS = {
    "data": Flag(str, None, "this client's images, an .npz file"),
    "workdir": Flag(str, None, "where its own state is kept: a folder in the SuperNode's workdir, called as the run"),
    "give_up": Flag(float, 3600.0, "seconds without a message after which it ends, with status 1", least=1),
    "help": command.HELP,
}
SILENCE = 60.0  # seconds for a caller to say what it wants


class Talks:
    """The client's side of one talk after the other. Each begins anew; what was compiled stays."""

    def __init__(self, asked: Asked, say: Callable[[str], None]):
        self._client, self._data, self._say = Client(asked, say), asked.data, say
        self._talk, self._reader = "", Reader(FROM_SERVER)
        self.done = False

    def answer(self, about: dict, given: list[bytes]) -> tuple[dict, list[bytes]]:
        """What goes back to whoever called: {"trouble", "why"}, frames. Raises one of FAILURES where the client can
        take no part."""
        if about["data"] != str(self._data):
            why = f"this client's worker was started with {self._data}, not with {about['data']}; end it first"
            return {"trouble": TROUBLE, "why": why}, []
        out: queue.SimpleQueue = queue.SimpleQueue()
        if not given:
            self._talk, self._reader = about["talk"], Reader(FROM_SERVER)
            self._client.hello(out, about["name"])
        elif about["talk"] != self._talk:
            return {"trouble": LOST, "why": ""}, []
        try:
            for frame in given:
                message = self._reader.feed(frame)
                if message is not None:
                    self.done |= self._client.obey(message, out, self._reader)
        except Damaged as error:
            raise JoinError(f"the server sends what is no message of this version: {error}") from None
        except Back as error:
            self._talk = ""
            self._say(f"the server ended the talk: {error}")
        found = []
        while not out.empty():
            kind, payload, fields = out.get()
            found += frames(kind, payload, **fields)
        return {"trouble": "", "why": ""}, found


def work(asked: Asked, say: Callable[[str], None]) -> None:
    """Answers until the run is done. Raises one of FAILURES, or DoorError."""
    if not asked.data.is_file():
        raise DataError(f"{asked.data}, this client's images, is no file")
    build.prepare_jax(Config())
    with claim(asked.workdir, {"data": str(asked.data)}, say, frozenset({"data"})) as claimed:
        claimed.write()
        talks = Talks(asked, say)
        with door.listening(asked.workdir) as listener:
            listener.settimeout(asked.give_up)
            while not talks.done:
                try:
                    caller, _ = listener.accept()
                except TimeoutError:
                    raise JoinError(f"no message for {asked.give_up:g} s; given up (--give_up)") from None
                with Connection(caller.detach()) as line:
                    _serve(line, talks, say)


def _serve(line: Connection, talks: Talks, say: Callable[[str], None]) -> None:
    """One message and its answer. A caller that is gone changes nothing: the server asks again."""
    try:
        if not line.poll(SILENCE):
            return say("a ClientApp said nothing; it is left")
        about, given = door.receive(line)
    except (OSError, EOFError, ValueError):
        return say("a ClientApp ended before it had said what it wants")
    try:
        answered, found = talks.answer(about, given)
    except FAILURES as error:
        with contextlib.suppress(OSError):
            door.send(line, {"trouble": TROUBLE, "why": str(error)}, [])
        raise
    try:
        door.send(line, answered, found)
    except OSError:
        say("a ClientApp ended before it had its answer; the server will ask again")


def parse(argv: list[str]) -> dict:
    """argv[0] is the program. UsageError for what makes no sense."""
    values = command.read(argv, FLAGS)
    for name in () if values["help"] else ("data", "workdir"):
        if not values[name]:
            raise UsageError(f"--{name} is missing: {FLAGS[name].help}")
        values[name] = parse_path(name, values[name]).absolute()
    return values


def act(values: dict, argv: list[str]) -> None:
    """Answers, until the run is done."""
    del argv
    asked = Asked("", Path(values["data"]), Path(values["workdir"]), None, give_up=values["give_up"])
    work(asked, partial(print, flush=True))


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    return command.run(argv, parse, act, __doc__, FLAGS, lambda: (*FAILURES, door.DoorError))


if __name__ == "__main__":
    command.leave(main(sys.argv))
