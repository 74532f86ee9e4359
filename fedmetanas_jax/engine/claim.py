"""A run's claim to its workdir: one process at a time and, from the first checkpoint on, one config."""

import json
import os
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # of Windows; said where a workdir is to be locked
    fcntl = None

from fedmetanas_jax.engine import checkpoint
from fedmetanas_jax.engine.identity import differences, fixed
from fedmetanas_jax.engine.records import RECORDS, InUseError, WorkdirError, versions
from fedmetanas_jax.files import beside, to_json, write_json

CONFIG, LOCK, RESULT, CHECKPOINTS = "config.json", ".lock", "result.json", "checkpoints"
WRITTEN = (RECORDS, RESULT, "network.npz", "partition.json")  # what a run would overwrite without having read it


class Claim:
    """A workdir that is held by this process until `close`, or the end of `with`, or of the process."""

    def __init__(self, path: Path, lock, content: dict | None, keeps_old: bool):
        self._path, self._lock, self._content, self._keeps_old = path, lock, content, keeps_old
        self.written = False

    def write(self) -> None:
        """Leaves config.json where it must be written: only when nothing can be refused any more, so that a refused
        request binds nobody."""
        if self._keeps_old:
            self._path.rename(beside(self._path))
        if self._content is not None:
            write_json(self._path, self._content)
        self.written = True

    def close(self) -> None:
        """Lets others have the workdir."""
        self._lock.close()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def claim(
    workdir: str | Path, config: dict, say: Callable[[str], None], may_change: frozenset[str] = frozenset()
) -> Claim:
    """Makes `workdir` this run's own while the claim is held.

    A run that has a checkpoint is gone on with by an equal config only, but for the fields named in `may_change`,
    which say how a run is run and not what it is. What differs in those and in the versions is said, because then the
    last bits may differ too. Where no checkpoint was reached, any config may begin anew.

    WorkdirError: `workdir` is a file, cannot be written, is in use (InUseError), belongs to another config, or has
    files that are no run's that could go on; or the system has no locks.
    """
    if fcntl is None:
        raise WorkdirError("Linux and macOS only: this system has no fcntl, with which a run locks its workdir")
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / LOCK, "a+")
    except FileExistsError:
        raise WorkdirError(f"workdir {workdir} is a file; it must be a directory") from None
    except OSError as error:
        raise WorkdirError(f"cannot write in workdir {workdir}: {error.strerror}") from None
    try:
        _hold(workdir, lock)
        return _claim(workdir, lock, json.loads(to_json(config)), say, may_change)
    except BaseException:
        lock.close()
        raise


def _hold(workdir: Path, lock) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise InUseError(f"workdir {workdir} is in use by another run (process {owner})") from None
    except OSError as error:
        raise WorkdirError(f"cannot lock workdir {workdir}: {error.strerror}") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()


def _claim(workdir: Path, lock, config: dict, say: Callable[[str], None], may_change: frozenset[str]) -> Claim:
    path, now, saved = workdir / CONFIG, versions(), checkpoint.steps(workdir / CHECKPOINTS)
    content = {"config": config, "versions": now}
    if not path.exists():
        foreign = [name for name in WRITTEN if (workdir / name).exists()]
        if foreign and not saved:  # checkpoints know themselves whose they are
            raise WorkdirError(
                f"workdir {workdir} holds {', '.join(foreign)} but no {CONFIG}, so no run that could go on, and they "
                "would be overwritten; move them away, or use another workdir"
            )
        return Claim(path, lock, content, keeps_old=False)
    try:
        first = json.loads(path.read_text())
        differs = differences(fixed(first["config"], may_change), fixed(config, may_change))
        how, changed = differences(first["config"], config), differences(first["versions"], now)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WorkdirError(f"{path} is damaged; put it back, or use another workdir") from None
    if differs and (saved or (workdir / RESULT).exists()):
        raise WorkdirError(
            f"workdir {workdir} belongs to a run of another config: {differs}; "
            "go on with that config, or use another workdir"
        )
    if not saved and (workdir / RESULT).exists():
        raise WorkdirError(
            f"the run in workdir {workdir} is finished, but its checkpoints are gone; use another workdir to run it "
            f"again, or remove {RESULT}"
        )
    if not saved:
        if differs:
            say(f"nothing was saved of the run of another config that was begun here: {differs}; beginning anew")
        records = workdir / RECORDS
        # The records will be moved out of the way, and without their config nobody would know what they are of.
        return Claim(path, lock, content, keeps_old=bool(differs) and records.exists() and records.stat().st_size > 0)
    if how:
        say(f"goes on in another way than the run was begun: {how}")
    if changed:
        say(f"the run in {workdir} was begun elsewhere ({changed}): its numbers may differ in the last bits")
    return Claim(path, lock, None, keeps_old=False)
