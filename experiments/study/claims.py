"""Who works on which run: files in a folder, so that processes and machines need share nothing else.

A claim to RUN is the file RUN.1, which only one process can make; its owner touches it every few seconds. A claim
is void once its process is gone (seen at once on the same machine) or, of another machine, once it was not
touched for LEASE seconds by the clock of the folder's file system. Whoever finds it void makes RUN.2, which again
only one can make: the largest number holds, and it says how many have died on this run. No file is ever renamed, taken
over or written by two, so nothing depends on who looked first.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

LEASE, BEAT = 60.0, 5.0  # seconds


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine began, so that its number in other hands is told apart; "" where there is none,
    or no /proc."""
    return (_read(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""] * 20)[19]


def _here() -> str:
    """This machine since it was started, and, in a container, this container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return " ".join([socket.gethostname(), _read("/proc/sys/kernel/random/boot_id").strip(), space])


class Claim:
    """A run that is this process's until `release`, or the end of `with`."""

    def __init__(self, path: Path, number: int, lost: Callable[[], None]):
        """lost: called, in a thread, when somebody else has taken the run over, as after this machine slept."""
        self.path, self.deaths, self.lost = path, number - 1, False
        self._on_lost, self._over = lost, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        above = self.path.with_suffix(f".{self.deaths + 2}")
        while not self._over.wait(BEAT):
            try:
                os.utime(self.path)
                gone = above.exists()
            except FileNotFoundError:
                gone = True
            except OSError:  # a file system that is away for a moment
                continue
            if gone:
                self.lost = True
                self._on_lost()
                return

    def release(self) -> None:
        """Lets others have the run."""
        self._over.set()
        self._thread.join()
        if not self.lost:
            for number in range(1, self.deaths + 2):  # its own last: until then nobody else finds the run free
                self.path.with_suffix(f".{number}").unlink(missing_ok=True)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_) -> None:
        self.release()


class Claims:
    """The claims in a folder. Names of runs have no slash."""

    def __init__(self, folder: Path, lease: float = LEASE):
        self.folder, self.lease = folder, lease

    def take(self, run: str, lost: Callable[[], None] = lambda: None) -> Claim | None:
        """The run, if nobody has it. OSError where the folder cannot be written."""
        number = max(self._numbers(run), default=0)
        if number and self._alive(self.folder / f"{run}.{number}"):
            return None
        self.folder.mkdir(parents=True, exist_ok=True)  # only here: who looks at a study makes nothing
        path = self.folder / f"{run}.{number + 1}"
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(file, "w") as opened:
            pid = os.getpid()
            json.dump({"here": _here(), "pid": pid, "started": _started(pid), "since": time.time()}, opened)
        return Claim(path, number + 1, lost)

    def held(self) -> dict[str, dict]:
        """{run: {"host", "pid", "since", in seconds since 1970}} of all that are being worked on."""
        runs = {path.stem for path in self.folder.glob("*") if path.suffix[1:].isdigit()}
        found = {}
        for run in sorted(runs):
            path = self.folder / f"{run}.{max(self._numbers(run), default=0)}"
            if self._alive(path):
                said = self._said(path)
                found[run] = {"host": said.get("here", "").split(" ")[0], "pid": said.get("pid")}
                found[run]["since"] = said.get("since")
        return found

    def _numbers(self, run: str) -> list[int]:
        texts = [path.name[len(run) + 1 :] for path in self.folder.glob(f"{run}.*")]
        return [int(text) for text in texts if text.isdigit()]

    def _alive(self, path: Path) -> bool:
        said = self._said(path)
        try:
            if said.get("here") == _here():
                os.kill(said["pid"], 0)  # ProcessLookupError: it is gone
                return said["started"] == _started(said["pid"])
            return self._now() - path.stat().st_mtime < self.lease
        except (ProcessLookupError, FileNotFoundError):
            return False
        except PermissionError:  # another user's process
            return True

    @staticmethod
    def _said(path: Path) -> dict:
        """What its owner wrote; {} in the moment before, or where somebody has damaged it."""
        try:
            said = json.loads(path.read_text())
            return said if isinstance(said["pid"], int) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _now(self) -> float:
        """The file system's time: clocks of machines differ."""
        probe = self.folder / f".now.{socket.gethostname()}.{os.getpid()}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now
