"""How the processes of a run come together, and how one's failure ends all of them.

A failure is noted in the store of engine/hosts.py, where a thread of every process looks once a second. Who is killed
without a word is missed by the next exchange between devices, or by JAX's heartbeat, which then ends the others.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax

from fedmetanas_jax.engine.hosts import HostError, known, leader, meet, state
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.options import UsageError

START = 300.0  # seconds in which all processes must have come
LOOK = 1.0  # seconds between looks at what others noted
GRACE = 5.0  # seconds in which a process can end by itself once another failed; the first waits twice as long
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "Connection")  # in what JAX says where another process is gone
SHOW_CURSOR = b"\x1b[?25h"  # which a bar hides


class Place(NamedTuple):
    """Where a process stands among those of its run; None: the launcher's variables say it."""

    coordinator: str | None = None  # HOST:PORT at which the first process listens
    processes: int | None = None
    process: int | None = None
    heartbeat: int = 100  # seconds without a sign of life after which a process counts as dead


def together(place: Place, action: Callable[[], None], answered: Callable[[Callable[[], None]], int]) -> int:
    """Joins the other processes, does the action and leaves them -> the exit status.

    answered: (action) -> the exit status, after it said what there is to say. After a failure this does not return:
    the process ends, since Python's way out would wait for the others. UsageError, HostError: they cannot be joined.
    """
    _join(place)
    if not leader():
        sys.stdout = open(os.devnull, "w")  # what is done is said once
    ending, left = threading.Event(), threading.Event()
    watching = threading.Thread(target=_watch, args=(ending,), daemon=True)
    watching.start()

    def noted() -> None:
        stop = None
        try:
            try:
                action()
            except KeyboardInterrupt as error:
                if not known.stopping:
                    raise
                stop = error
            meet()  # the first process may have something left to do, and fail at it
        except BaseException as error:
            ending.set()
            if (theirs := _blamed(error)) is not None:
                raise theirs from None
            _note(error)
            raise
        ending.set()
        left.set()
        if stop is not None:
            raise stop

    try:
        status = answered(noted)
    except BaseException:
        traceback.print_exc()
        status = 1
    if not left.is_set():
        _end(status)
    watching.join()  # which needs what is shut down now
    jax.distributed.shutdown()
    return status


def _join(place: Place) -> None:
    """Joins the others."""
    # Its handler would keep SIGTERM from this package's.
    jax.config.update("jax_enable_preemption_service", False)
    how = {"heartbeat_timeout_seconds": place.heartbeat, "initialization_timeout": int(START) + 60}
    if place.coordinator is not None:
        how |= {"coordinator_address": place.coordinator, "num_processes": place.processes}
        how |= {"process_id": place.process, "cluster_detection_method": "deactivate"}
        if place.process == 0:
            how["coordinator_bind_address"] = _listening(place.coordinator)
    problem: list[BaseException] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(**how)
        except BaseException as error:
            problem.append(error)

    # In a thread, because it hears no signal, and ends the process with a page of addresses where the others stay away.
    thread, begun = threading.Thread(target=initialize, daemon=True), time.monotonic()
    thread.start()
    with interruptible() as interrupt:
        while thread.is_alive() and interrupt.signal is None and time.monotonic() - begun < START:
            thread.join(0.1)
    if thread.is_alive():
        if interrupt.signal is None:
            where = f" at {place.coordinator}" if place.coordinator else ""
            line = f"error: not all processes of the run came together{where} within {START:.0f} s"
            print(line, file=sys.stderr, flush=True)
        os._exit(1 if interrupt.signal is None else 128 + interrupt.signal)
    if problem:
        if place.coordinator is None and isinstance(problem[0], ValueError):
            raise UsageError(
                "--cluster: no launcher that JAX knows started this process (Slurm, Open MPI, a TPU pod, Kubernetes); "
                "give --coordinator=HOST:PORT --processes=N --process=I"
            )
        raise HostError(f"the processes cannot come together: {_line(problem[0])}")


def _listening(coordinator: str) -> str | None:
    """The address that the first process listens at; None is JAX's choice, every interface. UsageError where it cannot,
    since JAX would end the process without a word."""
    host, _, port = coordinator.rpartition(":")
    at = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if at is None and host in ("localhost", "127.0.0.1", "[::1]"):
        at = coordinator  # nobody else is to reach it
    host, _, port = (at or f":{port}").rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--coordinator: the first process cannot listen at {host}:{port}: {why}") from None
    return at


def _watch(ending: threading.Event) -> None:
    """The thread that looks for others' failures, and ends the process where its own work does not."""
    latest = None
    while not ending.wait(LOOK):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX itself ends a process whose coordinator is gone
            known.failed = known.failed or _noted()
        if known.failed is None:
            continue
        latest = latest or time.monotonic() + GRACE
        if time.monotonic() > latest and not ending.is_set():
            for terminal in filter(os.isatty, (1, 2)):
                os.write(terminal, SHOW_CURSOR)
            os.write(2, f"error: {known.failed}\n".encode())
            _end(1)


def _note(error: BaseException) -> None:
    """Tells the others that this process failed."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        key = f"fedmetanas_jax/failed/{state().process_id}"
        state().client.key_value_set(key, _line(error), allow_overwrite=True)


def _noted() -> str | None:
    """What another process noted, as a line."""
    for key, line in state().client.key_value_dir_get("fedmetanas_jax/failed/"):
        process = int(key.rpartition("/")[2])
        if process != state().process_id:
            return f"process {process} of {state().num_processes} failed, so all end: {line}"
    return None


def _blamed(error: BaseException) -> HostError | None:
    """The HostError that another process's end is to this one; None: the error is its own."""
    if isinstance(error, HostError):
        return error
    # JAX raises it as ValueError, too, where a result is read.
    if not (isinstance(error, jax.errors.JaxRuntimeError | ValueError) and any(word in str(error) for word in LOST)):
        return None
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if (line := _noted()) is not None:
            return HostError(line)
    return HostError(
        f"another process was lost, so all end ({_line(error)}); the same command on all of them goes on from the last "
        "checkpoint"
    )


def _end(status: int) -> None:
    """Ends this process. The first one waits until the others have read why, since the store is its own."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        state().client.key_value_set(f"fedmetanas_jax/ended/{state().process_id}", "1", allow_overwrite=True)
        latest = time.monotonic() + 2 * GRACE
        while leader() and time.monotonic() < latest:
            if len(state().client.key_value_dir_get("fedmetanas_jax/ended/")) == state().num_processes:
                break
            time.sleep(0.1)
    os._exit(status)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
