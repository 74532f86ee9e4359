"""The parent's part: worker processes, and letting them run in turn."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from timing.cases import Case, Variant

EXPERIMENTS = Path(__file__).parents[1]


class WorkerError(Exception):
    """A request that failed; the message is the reason to record."""


class OutOfTime(WorkerError):
    """A request that the time left did not suffice for."""


class Worker:
    """A worker process; leaves with its `with` block. `command` starts another program than `timing.worker`."""

    def __init__(self, side: str, command: list[str] | None = None):
        path = os.pathsep.join([str(EXPERIMENTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Caches of its own, empty: the first compile is cold.
        self.caches = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        environment = os.environ | {
            "PYTHONPATH": path,
            # A second process must find room on the device, so none takes most of it in advance.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_COMPILATION_CACHE_DIR": os.path.join(self.caches.name, "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(self.caches.name, "inductor"),
        }
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "timing.worker", side],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.caches.cleanup()

    def ask(self, request: dict, seconds: float) -> dict:
        """The reply. WorkerError if it is an error or the process ended; OutOfTime, and its end, after `seconds`."""
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._ended()) from None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            seconds = max(seconds, 0.0)
            if not selector.select(seconds):
                self.process.kill()
                raise OutOfTime(f"'{request['do']}' had not ended after {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(self._ended())
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _ended(self) -> str:
        status = self.process.wait()
        if status == -signal.SIGKILL:
            return "the worker was killed (SIGKILL), as when the machine is out of memory"
        return f"the worker ended with status {status}"


def measure(case: Case, seed: int, left: Callable[[], float], say: Callable[[str], None], start=Worker) -> list[dict]:
    """Times all variants of a case in turn -> for each {"status", and seconds and figures or a reason}.

    left: () -> seconds there are; whoever has been timed once is not timed again when they run out. status:
    "done", "failed" (would fail again), "out of time".
    """
    plain = case.work() | {"repeats": case.repeats}
    workers: list[Worker | None] = []
    results: list[dict] = []
    kept = 0.0  # seconds for one timing of what is built, which building more must leave
    try:
        for variant in case.variants:
            say(f"  building {variant.label}")
            worker = start(variant.side)
            workers.append(worker)
            results.append({"status": "done", "seconds": [], "loss": []})
            request = {"do": "build", "case": plain, "variant": variant._asdict(), "seed": seed}
            reply = _try(results[-1], lambda w=worker, r=request, k=kept: w.ask(r, left() - k), left)
            kept += 2 * reply["first_run_seconds"] if reply else 0
        for repeat in range(case.repeats):
            for worker, result in zip(workers, results, strict=True):
                if not _alive(result) or (repeat and left() < 2 * max(result["seconds"])):
                    continue
                _try(result, lambda w=worker, r=result: _run(w, r, left()), left)
            say(f"  {repeat + 1} of {case.repeats}: " + _last(case.variants, results))
        for worker, result in zip(workers, results, strict=True):
            if _alive(result):
                _try(result, lambda w=worker, r=result: r.update(w.ask({"do": "report"}, max(left(), 60))), left)
    finally:
        for worker in workers:
            worker.__exit__()
    return results


def _alive(result: dict) -> bool:
    return result["status"] == "done" and "cut_short" not in result


def _run(worker: Worker, result: dict, seconds: float) -> None:
    reply = worker.ask({"do": "run"}, seconds)
    result["seconds"].append(reply["seconds"])
    result["loss"].append(reply["loss"])


def _try(result: dict, work: Callable, left: Callable[[], float]):
    """work(), or None and in `result` why not."""
    allowed, start = left(), time.monotonic()
    try:
        return work()
    except OutOfTime as error:
        if result["seconds"]:  # it was timed; only the next timing did not fit
            result["cut_short"] = str(error)
        else:
            result |= {"status": "out of time", "reason": str(error), "allowed_seconds": round(allowed)}
    except WorkerError as error:
        took = time.monotonic() - start
        result |= {"status": "failed", "reason": str(error), "failed_after_seconds": round(took, 1)}
    return None


def _last(variants: tuple[Variant, ...], results: list[dict]) -> str:
    return ", ".join(
        f"{v.label} {r['seconds'][-1]:.3g} s" if r["seconds"] else f"{v.label} {r['status']}"
        for v, r in zip(variants, results, strict=True)
    )
