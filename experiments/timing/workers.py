"""Each variant in a process of its own, so that all of a case run in turn while each keeps what it compiled, and each
one's peak memory is its own.

What a worker is asked, one thing after another:

    describe                     -> dict of facts about the machine and the side
    build, case, variant, seed, warm -> seconds of its first run
    run                          -> (seconds, loss)
    report                       -> dict of compile seconds and peak memory
"""

import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import product
from multiprocessing.connection import Connection

from timing.cases import Case

SIDES = {"ours": "timing.ours", "torch": "timing.rival"}  # modules that have `describe` and a class `Side`


class WorkerError(Exception):
    """A request that failed; the message is the reason to record."""


class OutOfTime(WorkerError):
    """A request that the time left did not suffice for."""


class Worker:
    """The parent's end: starts the process, which leaves with the `with` block. work: done there, if not `serve`."""

    def __init__(self, side: str, work: Callable | None = None):
        # Caches of its own, empty: the first compile is cold.
        self.caches = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work or serve, args=(side, theirs, self.caches.name))
        self.process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.connection.close()
        self.process.join(10 if error is None else 0)
        self.process.kill()
        self.process.join()
        self.caches.cleanup()

    def ask(self, seconds: float, request: str, *arguments):
        """The answer. WorkerError if the request or the process failed; OutOfTime, and its end, after `seconds`."""
        seconds = max(seconds, 0.0)
        try:
            self.connection.send((request, arguments))
            if not self.connection.poll(seconds):
                self.process.kill()
                raise OutOfTime(f"'{request}' had not ended after {seconds:.0f} s")
            error, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            memory = ", as when the machine is out of memory" if self.process.exitcode == -signal.SIGKILL else ""
            raise WorkerError(f"the worker ended with status {self.process.exitcode}{memory}") from None
        if error is not None:
            raise WorkerError(error)
        return answer


def serve(side: str, connection: Connection, caches: str) -> None:
    """The process's end: answers every request with (error or None, answer), until the parent closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ |= {
        # A second process must find room on the device, so none takes most of it in advance.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(caches, "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
    }
    built = None
    with suppress(EOFError):
        while True:
            request, arguments = connection.recv()
            try:
                module = importlib.import_module(SIDES[side])
                match request:
                    case "describe":
                        answer = module.describe()
                    case "build":
                        built = module.Side(*arguments)
                        answer = built.figures["first_run_seconds"]
                    case "run":
                        answer = built.run()
                    case "report":
                        answer = built.report() | {"host_peak_bytes": host_peak()}
                reply = None, answer
            except Exception as error:  # whatever it is, the parent records it
                reply = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", None
            connection.send(reply)


def host_peak() -> int:
    """Bytes: the largest resident set of this process so far, compiling included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(
    cases: list[Case], seed: int, left: Callable[[], float], say: Callable[[str], None], start=Worker, together=False
) -> list[list[dict]]:
    """Times all variants of each case in turn -> for each case and variant {"status", and seconds and figures or a
    reason}.

    left: () -> seconds there are; whoever has been timed once is not timed again when they run out. together: all are
    built at the same time, and compiled once: what that took is then not each one's own. status: "done", "failed"
    (would fail again), "out of time".
    """
    jobs = [(case, variant) for case in cases for variant in case.variants]
    workers: dict[int, Worker] = {}  # those that have neither failed nor run out of time, by their job's place
    results = [{"status": "done", "seconds": [], "loss": []} for _ in jobs]

    def ask(place: int, seconds: float, request: str, *arguments):
        """The answer, or None and in the job's result why there is none."""
        allowed, result = round(left()), results[place]
        try:
            return workers[place].ask(seconds, request, *arguments)
        except WorkerError as error:
            late = isinstance(error, OutOfTime)
            if late and result["seconds"]:  # it was timed; only the next timing did not fit
                result["cut_short"] = str(error)
            else:
                status = "out of time" if late else "failed"
                result |= {"status": status, "reason": str(error), "allowed_seconds": allowed}
            del workers[place]

    def build(place: int, kept: float) -> float:
        case, variant = jobs[place]
        say(f"  building {variant.label}")
        return ask(place, left() - kept, "build", case, variant, seed, not together) or 0

    with ExitStack() as stack:
        if together:
            for place, (_, variant) in enumerate(jobs):
                workers[place] = stack.enter_context(start(variant.side))
            with ThreadPoolExecutor(len(jobs)) as pool:
                list(pool.map(build, range(len(jobs)), [0.0] * len(jobs)))
        else:
            kept = 0.0  # seconds for one timing of what is built, which building more must leave
            for place, (_, variant) in enumerate(jobs):
                workers[place] = stack.enter_context(start(variant.side))
                kept += 2 * build(place, kept)
        for case in cases:
            mine = [place for place, (whose, _) in enumerate(jobs) if whose is case]
            for repeat, place in product(range(case.repeats), mine):
                seconds, label = results[place]["seconds"], jobs[place][1].label
                if (
                    place in workers
                    and not (seconds and left() < 2 * max(seconds))
                    and (ran := ask(place, left(), "run"))
                ):
                    for name, value in zip(("seconds", "loss"), ran, strict=True):
                        results[place][name].append(value)
                    say(f"  {repeat + 1} of {case.repeats}: {label} {ran[0]:.3g} s")
        for place in list(workers):
            results[place] |= ask(place, max(left(), 60), "report") or {}
    found = iter(results)
    return [[next(found) for _ in case.variants] for case in cases]
