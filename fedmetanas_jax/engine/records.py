"""What a run writes down in its workdir: one JSON line a round.

Lines are appended and synced one at a time: a process killed at any moment leaves at most one torn last line.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import jax

from fedmetanas_jax.files import beside, to_json, write_text

RECORDS = "records.jsonl"
ADVICE = "put the file back from a copy, or start over in another workdir"
PACKAGES = ("fedmetanas_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class WorkdirError(Exception):
    """The workdir cannot be used for this run. The message is one line for the user."""


class InUseError(WorkdirError):
    """Another process is at work in it."""


def append(path: str | Path, record: dict) -> None:
    """Adds one line; on return it is on the disk. A record that was torn before must be truncated first."""
    with open(path, "ab") as file:
        file.write(to_json(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: str | Path) -> list[dict]:
    """All records, in order; [] if there is no file. A torn last line is left out.

    WorkdirError: a line before the last is not a JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise WorkdirError(f"{path}, line {number}, is not a JSON object: the file was altered; {ADVICE}")
    return records


class Digest:
    """SHA-256 of records, one after another, however they are spaced in their file."""

    def __init__(self, lines: Sequence[dict] = ()):
        self._hashed = hashlib.sha256()
        for line in lines:
            self.add(line)

    def add(self, line: dict) -> None:
        """Takes in one more record."""
        self._hashed.update(to_json(line).encode() + b"\n")

    def text(self) -> str:
        """Of all so far, in hexadecimal digits."""
        return self._hashed.hexdigest()


def digest(lines: Sequence[dict]) -> str:
    """Of these records."""
    return Digest(lines).text()


def resume(path: str | Path, done: int, sha256: str | None = None) -> list[dict]:
    """The records of rounds 1 .. `done`, one line each, in order; what comes after them is cut off.

    sha256: their digest when the checkpoint of round `done` was saved; None where none was kept.
    WorkdirError: they are not all there, or not those, so that they do not fit the checkpoint.
    """
    kept = read(path)[:done]
    for number, record in enumerate(kept, 1):
        if record.get("round") != number:
            found = f"is of round {record['round']}" if "round" in record else "names no round"
            raise WorkdirError(f"{path}, line {number}, {found}, where round {number} belongs; {ADVICE}")
    if len(kept) < done:
        raise WorkdirError(f"{path} ends after line {len(kept)}, but the checkpoint is of round {done}; {ADVICE}")
    if sha256 is not None and digest(kept) != sha256:
        raise WorkdirError(f"{path} was altered: rounds 1 to {done} are not as they were written; {ADVICE}")
    write_text(path, "".join(to_json(record) + "\n" for record in kept))
    return kept


def set_aside(path: str | Path, say: Callable[[str], None]) -> None:
    """Makes room for the records of a run that starts at round 0, and says so.

    Refusing would stop every run that was killed before its first checkpoint until somebody looked after it; but if
    checkpoints were lost, what they had come to stands in these lines alone.
    """
    path = Path(path)
    if path.exists() and path.stat().st_size:
        moved = beside(path)
        path.rename(moved)
        say(f"there are records but no checkpoint: starting at round 0; moved the records to {moved}")


def versions() -> dict:
    """What a run's numbers depend on beside its config: packages, Python, and the devices in use."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpus": os.cpu_count(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"  # such as this package, run from its source folder
