"""Other places where a run can be watched: TensorBoard, Weights & Biases, MLflow. Imports no jax.

Each has a thread of its own, so that a server that hangs costs the run no time, and whatever a sink raises ends the
sink and not the run. records.jsonl stays the truth: WORKDIR/sinks/NAME.json notes the last round that a sink has, and
the same command sends it what it lacks, also of a run that is finished.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmetanas_jax.engine.sink_kinds import KINDS, Run, Sink, numbers, one_line
from fedmetanas_jax.files import write_json

WAIT, WAIT_STOPPED = 30.0, 5.0  # most seconds in which sinks can send what is left, of a run that is done or stopped


class _Sender(threading.Thread):
    """Sends to one sink what the sink lacks, in the background."""

    def __init__(self, name: str, sink: Sink, note: Path, past: Sequence[dict]):
        super().__init__(name=name, daemon=True)
        self._sink, self._note, self._past = sink, note, past
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self.said: queue.SimpleQueue = queue.SimpleQueue()
        self.has, self.works, self.summary = 0, True, None
        self._identity: str | None = None  # of the run over there, once it was begun

    def run(self) -> None:
        """The thread."""
        try:
            self._send()
        except Exception as error:
            why = f"{type(error).__name__}: {one_line(error)}"
            self.said.put(f"{self.name} failed and lacks what comes after round {self.has} ({why}); the run goes on")
            with contextlib.suppress(OSError):  # which may be what failed
                self._keep()
        self.works = False

    def put(self, line: dict | None) -> None:
        """A round's record; None is the end."""
        self._queue.put(line if line is None else (line["round"], numbers(line)))

    def _send(self) -> None:
        kept = {}
        if self._past:  # else it is a run that starts anew, whatever was in the workdir
            with contextlib.suppress(OSError, ValueError):  # without the note everything is sent to a new run
                kept = json.loads(self._note.read_text())
        if kept.get("ended"):
            return
        self.has = kept.get("round", 0)
        self._identity, where = self._sink.begin(kept.get("run"), self.has + 1)
        self.said.put(f"{self.name}: {where}")
        for line in self._past:
            self._record(line["round"], numbers(line))
        while (item := self._queue.get()) is not None:
            self._record(*item)
        self._sink.end(self.summary)
        self._keep(self.summary is not None)

    def _record(self, number: int, found: dict[str, float]) -> None:
        if number > self.has:  # rounds that are done again since the last checkpoint have the same numbers
            self._sink.record(number, {name: value for name, value in found.items() if name != "round"})
            self.has = number
            if self._queue.empty():
                self._keep()

    def _keep(self, ended: bool = False) -> None:
        if self._identity is not None:
            write_json(self._note, {"run": self._identity, "round": self.has, "ended": ended})


class Sinks:
    """The sinks of a run; `with Sinks(...) as sinks:` sends what is left at its end, and waits for that, not for ever.

    SinkError: one cannot be had. `names` are keys of KINDS. Nothing is sent before `begin`.
    """

    def __init__(self, names: Sequence[str] = (), run: Run | None = None):
        self._run = run
        self._sinks = {name: KINDS[name](run) for name in dict.fromkeys(names)}
        self._senders: list[_Sender] = []
        self._say: Callable[[str], None] = print

    def begin(self, past: Sequence[dict], say: Callable[[str], None]) -> None:
        """The records of the rounds that are done; [] of a run that starts."""
        self._say = say
        for name, sink in self._sinks.items():
            self._senders.append(_Sender(name, sink, self._run.workdir / "sinks" / f"{name}.json", list(past)))
            self._senders[-1].start()

    def record(self, line: dict) -> None:
        """A round's record, as it was written down."""
        for sender in self._senders:
            self._tell(sender)
            if sender.works:
                sender.put(line)

    def end(self, summary: dict) -> None:
        """The run is done; this is what it came to."""
        for sender in self._senders:
            sender.summary = dict(summary)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind, *_) -> None:
        for sender in self._senders:
            sender.put(None)
        latest = time.monotonic() + (WAIT if kind is None else WAIT_STOPPED)
        for sender in self._senders:
            sender.join(max(0.0, latest - time.monotonic()))
            self._tell(sender)
            if sender.is_alive():
                self._say(f"{sender.name} does not answer and lacks what comes after round {sender.has}")

    def _tell(self, sender: _Sender) -> None:
        while not sender.said.empty():
            self._say(sender.said.get())


NONE = Sinks()
