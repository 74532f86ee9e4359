"""Works through the runs of a study: takes one that nobody has, runs or resumes it, takes the next.

As many processes as one likes may do so, on any machines that share the folder. A run that fails is noted in
failed/ and does not stop the rest; a run whose files are damaged is set aside and begun anew. Seeds of a method share
their programs, and so do splits whose arrays have the same shapes: a process stays with a method while it can.
"""

import _thread
import json
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from fedmetanas_jax import build
from fedmetanas_jax.config import alike
from fedmetanas_jax.engine import records
from fedmetanas_jax.engine.checkpoint import CheckpointError
from fedmetanas_jax.engine.interrupt import Interrupt, interruptible
from fedmetanas_jax.engine.kept import Kept
from fedmetanas_jax.engine.records import RECORDS, InUseError, WorkdirError
from fedmetanas_jax.files import beside, write_json
from fedmetanas_jax.options import UsageError
from study.claims import Claims
from study.outcome import curve, outcome
from study.plan import Run

DEATHS = 5  # processes that may die on a run, as for want of memory, before it counts as failed
POLL = 2.0  # seconds between looks at what others do


class Study:
    """A folder of runs."""

    def __init__(self, path: Path):
        self.path = path
        self.claims = Claims(path / "claims")

    def workdir(self, run: Run) -> Path:
        """Where a run leaves its files."""
        return self.path / "runs" / run.name

    def failure(self, run: Run) -> dict | None:
        """Why a run failed: {"error", "host", "when", "traceback"}."""
        return _json(self.path / "failed" / f"{run.name}.json")

    def forgive(self, run: Run) -> None:
        """Lets a run that failed be tried again."""
        (self.path / "failed" / f"{run.name}.json").unlink(missing_ok=True)

    def finished(self, run: Run) -> dict | None:
        """Its outcome; None also where its files are damaged."""
        try:
            return outcome(run, self.workdir(run))
        except UsageError:
            return None

    def curve(self, run: Run) -> dict | None:
        """Its learning curve (outcome.curve) as far as it is; None where nothing was measured, or it is damaged."""
        try:
            found = curve(records.read(self.workdir(run) / records.RECORDS))
        except (OSError, ValueError, KeyError, TypeError, records.WorkdirError):
            return None
        return found if found["round"] else None

    def spent(self, run: Run) -> float | None:
        """Seconds, compiling and evaluating included, that processes worked on it, but for those that were killed."""
        return (_json(self.path / "spent" / f"{run.name}.json") or {}).get("seconds")

    def rounds(self, run: Run) -> int:
        """How far it is."""
        try:
            return (self.workdir(run) / RECORDS).read_bytes().count(b"\n")
        except OSError:
            return 0


class Done(NamedTuple):
    """What a call of `work` came to."""

    finished: list[str]
    failed: list[str]


def work(study: Study, runs: list[Run], data_dir: str | None, say: Callable[[str], None], wait: bool = True) -> Done:
    """Works until none of `runs` is left; with `wait` also until other processes have finished theirs.

    Raises KeyboardInterrupt, after Ctrl-C or SIGTERM, with the run at hand saved and free for others.
    """
    with interruptible() as interrupt:
        return _work(study, runs, data_dir, say, wait, interrupt)


def _work(study: Study, runs: list[Run], data_dir: str | None, say, wait: bool, interrupt: Interrupt) -> Done:
    last, finished, failed, said = None, [], [], False
    kept = Kept()
    done: set[str] = set()
    while True:
        interrupt.obey()  # also a signal that came when a run was as good as finished
        done |= {run.name for run in runs if run.name not in done and study.finished(run)}
        left = [run for run in runs if run.name not in done and not study.failure(run)]
        held = study.claims.held()
        free = [run for run in left if run.name not in held]
        busy = {alike(run.config) for run in left if run.name in held}
        # What this process has programs for; then what nobody is compiling at the moment.
        free.sort(key=lambda run: (alike(run.config) != last, alike(run.config) in busy))
        for run in free:
            with _taken(study, run, interrupt) as claim:
                if claim is None or study.finished(run) or study.failure(run):
                    continue
                say(f"--- {run.name} ({len(done)} of {len(runs)} done)")
                if alike(run.config) != last:
                    jax.clear_caches()  # what JAX itself keeps; a process has room for the code of few networks
                if _one(study, run, claim, data_dir, say, kept):
                    finished.append(run.name)
                elif study.failure(run):
                    failed.append(run.name)
            last, said = alike(run.config), False
            break
        else:
            if not left or not wait:
                return Done(finished, failed)
            if not said:
                say(f"waiting for {len(left)} runs that other processes have")
                said = True
            time.sleep(POLL)


class _taken:
    """`with` a claim, or None where somebody was faster."""

    def __init__(self, study: Study, run: Run, interrupt: Interrupt):
        self._interrupt = interrupt
        self._claim = study.claims.take(run.name, lost=lambda: _thread.interrupt_main(signal.SIGTERM))

    def __enter__(self):
        return self._claim

    def __exit__(self, *_) -> None:
        if self._claim is not None:
            self._claim.release()
            if self._claim.lost:  # that stopped the run, and is to stop nothing else
                self._interrupt.signal = None


def _one(study: Study, run: Run, claim, data_dir: str | None, say: Callable[[str], None], kept: Kept) -> bool:
    """Whether the run is finished; else it is noted as failed, or somebody else's now."""
    if claim.deaths >= DEATHS:
        _note(study, run, f"{claim.deaths} processes died on it; for want of memory?")
        return False
    try:
        for attempt in (1, 2):
            clock = time.perf_counter()
            try:
                build.run(run.config, task=run.name, workdir=study.workdir(run), data_dir=data_dir, kept=kept)
                break
            except InUseError as error:  # by a process whose claim is void, on a machine that cannot be asked
                say(f"{error}; leaving it alone")
                time.sleep(POLL)
                return False
            except (WorkdirError, CheckpointError) as error:
                if attempt == 2 or isinstance(error.__cause__, OSError) or not study.workdir(run).is_dir():
                    raise
                aside = beside(study.path / "set_aside" / run.name)
                aside.parent.mkdir(exist_ok=True)
                study.workdir(run).rename(aside)
                say(f"{' '.join(str(error).split())}; its files are in {aside} now, and it begins anew")
            finally:
                seconds = (study.spent(run) or 0.0) + time.perf_counter() - clock
                write_json(study.path / "spent" / f"{run.name}.json", {"seconds": seconds})
        outcome(run, study.workdir(run))  # what is finished can be read
        return True
    except (KeyboardInterrupt, BrokenPipeError):  # nobody reads what is said any more: not the run's doing
        if not claim.lost:
            raise
        say(f"{run.name} was taken over by another process while this one slept")
        return False
    except Exception as error:  # whatever it is, the other runs have a right to go on
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _note(study, run, said, "" if isinstance(error, build.FAILURES) else traceback.format_exc())
        say(f"{run.name} failed: {said}")
        return False


def _note(study: Study, run: Run, error: str, trace: str = "") -> None:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    said = {"error": error, "host": socket.gethostname(), "when": when, "traceback": trace}
    write_json(study.path / "failed" / f"{run.name}.json", said)


def _json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
