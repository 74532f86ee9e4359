"""Signals that ask a run to stop: Ctrl-C (SIGINT), SIGTERM, as batch systems send it, and SIGHUP, of a closed terminal.

Imports nothing slow, so that a program can listen before it imports jax.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
HANGUP = getattr(signal, "SIGHUP", None)  # which Windows lacks
if HANGUP is not None:
    DEFAULTS[HANGUP] = signal.SIG_DFL
MESSAGE = b"stopping after this round; Ctrl-C again stops at once (back to the last checkpoint)\n"


class Interrupt:
    """What was asked so far. The first signal asks the run to stop after its round; a Ctrl-C after it stops at once.

    Another SIGTERM or SIGHUP does not: a terminal that is closed sends several, and who cannot wait has SIGKILL.
    """

    def __init__(self):
        self.signal: int | None = None
        self._terminals = [number for number in (1, 2) if os.isatty(number)]  # a closed one no longer says that it is

    def obey(self) -> None:
        """KeyboardInterrupt, holding the signal's number, if there was one."""
        if self.signal is not None:
            raise KeyboardInterrupt(self.signal)

    def ask(self, number: int, _) -> None:
        """The handler."""
        if number == HANGUP:  # every further line on the terminal would be an error
            for terminal in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        if self.signal is None:
            self.signal = int(number)
            with contextlib.suppress(OSError):
                os.write(2, MESSAGE)  # not print, which may be what was interrupted
        elif number == signal.SIGINT:
            raise KeyboardInterrupt(int(number))


_listening: Interrupt | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Listens to the signals whose effect nobody has changed; what is inside another one shares its Interrupt.

    A signal that is ignored (as SIGHUP under nohup) stays so, and elsewhere than in the main thread none can be heard.
    """
    global _listening
    if _listening is not None or threading.current_thread() is not threading.main_thread():
        yield _listening or Interrupt()
        return
    _listening = Interrupt()
    before = {number: signal.getsignal(number) for number in DEFAULTS}
    heard = [number for number, default in DEFAULTS.items() if before[number] is default]
    for number in heard:
        signal.signal(number, _listening.ask)
    try:
        yield _listening
    finally:
        _listening = None
        for number in heard:
            signal.signal(number, before[number])
