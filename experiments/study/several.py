"""Several processes of one machine at one study, each on its share of the cores.

The programs of small networks are thousands of short kernels. A process that has threads on all cores makes these wait
for cores that the process beside it needs; on a core of its own it has nothing to wait for.
"""

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from fedmetanas_jax import command
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.main import failures
from study.plan import Run

POLL = 0.5  # seconds between looks at a signal that came


def member(number: int, of: int, study: Path, runs: list[Run], data_dir: str | None, wait: bool) -> NoReturn:
    """What process `number`, from 1, `of` so many does. It ends with an exit status as of `command.exit_status`."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share(sorted(os.sched_getaffinity(0)), number - 1, of))
    sys.stdout = Labelled(f"[{number}] ")
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def answer() -> None:
        with interruptible():
            from study import worker  # which imports jax

            worker.work(worker.Study(study), runs, data_dir, print, wait=wait)

    sys.exit(command.exit_status(answer, failures))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def work(
    study: Path,
    runs: Sequence[Run],
    data_dir: str | None,
    say: Callable[[str], None],
    *,
    count: int,
    wait: bool = True,
    target: Callable = member,
) -> int:
    """`worker.work` by `count` processes, whose lines begin with their number -> how many did not end well.

    They stop, with their runs saved, when this one is asked to or is gone. Where one died the others go on, with its
    run, too. target: what each does, with `member`'s arguments.

    Raises KeyboardInterrupt as `worker.work`.
    """
    context = multiprocessing.get_context("spawn")  # jax has threads, which a fork would do without
    if not hasattr(os, "sched_setaffinity"):
        say("this system gives no process cores of its own: they share all of them")
    with interruptible() as interrupt:
        given = count, study, list(runs), data_dir, wait
        members = [context.Process(target=target, args=(number, *given)) for number in range(1, count + 1)]
        for one in members:
            one.start()
        try:
            while interrupt.signal is None and any(one.is_alive() for one in members):
                _join(members, POLL)
        finally:  # also at a second Ctrl-C, which a terminal has told the members, too
            for one in members:
                if one.is_alive():
                    one.terminate()
        _join(members)
        interrupt.obey()
    ends = {number: one.exitcode for number, one in enumerate(members, 1) if one.exitcode}
    for number, code in ends.items():
        how = f"ended with status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        say(f"process {number} of {count} {how}")
    return len(ends)


def _join(members: Sequence[BaseProcess], seconds: float | None = None) -> None:
    for one in members:
        if one.is_alive():
            one.join(seconds)


def share(cores: Sequence[int], number: int, of: int) -> Sequence[int]:
    """The cores of process `number`, from 0, `of` so many: neighbours; one for several where there are too few."""
    if of > len(cores):
        return [cores[number % len(cores)]]
    return cores[number * len(cores) // of : (number + 1) * len(cores) // of]


class Labelled(io.TextIOBase):
    """Standard output, whole lines at a time, each after a label: of several processes each line is one's own.

    No terminal, as bars of several processes would be drawn over one another.
    """

    def __init__(self, label: str, descriptor: int = 1):
        self._label, self._descriptor, self._begun = label, descriptor, ""

    def write(self, text: str) -> int:
        """Writes what is a line by now."""
        *lines, self._begun = (self._begun + text).split("\n")
        whole = "".join(f"{self._label}{line}\n" for line in lines).encode(errors="backslashreplace")
        while whole:
            whole = whole[os.write(self._descriptor, whole) :]
        return len(text)

    def fileno(self) -> int:
        """Of what it writes to."""
        return self._descriptor
