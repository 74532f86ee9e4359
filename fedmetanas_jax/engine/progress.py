"""What a run shows while it works: a bar on a terminal, plain lines anywhere else.

Record keys read here, all optional but `round`: seconds, loss, server_accuracy, local_accuracy,
local_accuracy_adapted, ops_alive, event, event_put_off. Accuracies are fractions of 1.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

RECENT = 20  # rounds whose mean length gives the time left; pruning makes later rounds shorter
BAR = 12  # columns
NEEDLESS = ("rate", "loss", "ops")  # what the bar goes without where it is too wide for the terminal, in this order
QUIET = 5.0  # seconds without a plain line after which the next round has one


class Progress:
    """`with Progress(total_rounds, start) as progress:` then `round(record)` after every round.

    `start` is the number of rounds done before, `past` their records; `plain=None` asks the stream whether it is a
    terminal. `clock` gives seconds and says only when a plain line is due.
    """

    def __init__(
        self,
        total_rounds: int,
        start: int,
        past: Sequence[dict] = (),
        *,
        stream: TextIO | None = None,
        plain: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._start, self._clock = total_rounds, start, clock
        self._stream = sys.stdout if stream is None else stream
        self._plain = not self._stream.isatty() if plain is None else plain
        self._recent = deque(maxlen=RECENT)
        self._said = -QUIET
        self._accuracy = self._event = ""
        for record in past:
            self._remember(record)

    def __enter__(self) -> "Progress":
        if not self._plain:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                progress.BarColumn(bar_width=BAR),
                progress.TextColumn("{task.fields[status]}", markup=False),
                console=Console(file=self._stream, force_terminal=True),
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._start, status="")
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if not self._plain:
            self._bar.stop()

    def say(self, message: str) -> None:
        """One line of text, above the bar."""
        if self._plain:
            print(message, file=self._stream, flush=True)
        else:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def round(self, record: dict) -> None:
        """Shows a round's record: always on the bar; as a plain line if it is evaluated, has an event, is
        the last, or none was printed for QUIET seconds."""
        done = record["round"]
        if record.get("seconds") is not None:
            self._recent.append(record["seconds"])
        accuracies = _accuracies(record)
        if not self._plain:
            self._remember(record)
            self._bar.update(self._task, completed=done, status=self._status(record))
            return
        now, event = self._clock(), _event(record)
        if accuracies or event or done >= self._total or now - self._said >= QUIET:
            self._said = now
            events = [event] if event else []
            numbers = self._numbers(record).values()
            self.say("  ".join([f"round {done}/{self._total}", *events, *accuracies, *numbers]))

    def _remember(self, record: dict) -> None:
        """The last accuracy and the last event stay on the bar."""
        self._accuracy = next(iter(_accuracies(record)), self._accuracy)
        self._event = _event(record, f" {record['round']}") or self._event

    def _status(self, record: dict) -> str:
        """What stands beside the bar, as much as there is room for. 80 columns have room for one accuracy."""
        numbers = self._numbers(record)
        left = numbers.pop("left", "")
        parts = {"accuracy": self._accuracy, **numbers, "event": self._event, "left": left}
        room = self._bar.console.width - BAR - len(f"{self._total}/{self._total}") - 2
        for name in NEEDLESS:
            if len(_joined(parts)) > room:
                parts.pop(name, None)
        return _joined(parts)

    def _numbers(self, record: dict) -> dict[str, str]:
        parts = {}
        if record.get("loss") is not None:
            parts["loss"] = f"loss {record['loss']:.3f}"
        if record.get("ops_alive") is not None:
            parts["ops"] = f"ops {record['ops_alive']:.0f}"
        if self._recent:
            seconds = sum(self._recent) / len(self._recent)
            parts["rate"] = f"{_seconds(seconds)}/round"
            if record["round"] < self._total:
                parts["left"] = f"{_duration(seconds * (self._total - record['round']))} left"
        return parts


def _joined(parts: dict[str, str]) -> str:
    return "  ".join(part for part in parts.values() if part)


def _event(record: dict, when: str = "") -> str:
    """'prune 58', or 'prune 58 put off'; '' where nothing happened."""
    if record.get("event"):
        return f"{record['event']}{when}"
    return f"{record['event_put_off']}{when} put off" if record.get("event_put_off") else ""


def _accuracies(record: dict) -> list[str]:
    """['acc 71.3%', 'local 40.1>66.0%'], as much of it as was evaluated; '>' is the adaptation."""
    parts = []
    if record.get("server_accuracy") is not None:
        parts.append(f"acc {record['server_accuracy']:.1%}")
    means = [(record.get(key) or {}).get("mean") for key in ("local_accuracy", "local_accuracy_adapted")]
    means = [f"{100 * mean:.1f}" for mean in means if mean is not None]
    if means:
        parts.append(f"local {'>'.join(means)}%")
    return parts


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}s" if seconds < 10 else f"{seconds:.0f}s"


def _duration(seconds: float) -> str:
    """'1:02:03', '2:03' or '3s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest}s"
