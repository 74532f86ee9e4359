"""What a run writes in its workdir: one JSON line a round, small files whole or not at all, and its claim.

A file is either written under another name and renamed, or appended to one fsynced line at a time: a
process killed at any moment leaves complete files and at most one torn last line.
"""

import fcntl
import json
import math
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

CONFIG, LOCK = "config.json", ".lock"
PACKAGES = ("fedmetanas_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class WorkdirError(Exception):
    """The workdir cannot be used for this run. The message is one line for the user."""


def append(path: str | Path, record: dict) -> None:
    """Adds one line; on return it is on the disk. A record that was torn before must be truncated first."""
    with open(path, "ab") as file:
        file.write(_dumps(record).encode() + b"\n")
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
            raise WorkdirError(f"{path}, line {number}, is not a JSON object; the file was altered")
    return records


def truncate(path: str | Path, rounds: int) -> list[dict]:
    """Keeps the records with record["round"] <= rounds, drops the others and a torn line; returns those."""
    kept = [record for record in read(path) if record["round"] <= rounds]
    write_text(path, "".join(_dumps(record) + "\n" for record in kept))
    return kept


def write_json(path: str | Path, value) -> None:
    """Writes a JSON file for people to read; NaN and infinities become null, as in records."""
    write_text(path, _dumps(value, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Replaces a text file: a reader finds the old one or the new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces a file: a reader finds the old one or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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


def claim(workdir: str | Path, config: dict, say: Callable[[str], None]):
    """Makes `workdir` this run's own: an open file, to be kept (or used in `with`) while the run lasts.

    The first run writes config.json; a later one must have an equal config. What differs in the versions
    is said, because then the bits may differ too. The claim ends with the process, however that ends.

    WorkdirError: `workdir` is a file, cannot be written, is in use, or belongs to another config.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / LOCK, "a+")
    except FileExistsError:
        raise WorkdirError(f"workdir {workdir} is a file; it must be a directory") from None
    except OSError as error:
        raise WorkdirError(f"cannot write in workdir {workdir}: {error.strerror}") from None
    try:
        _claim(workdir, lock, config, say)
    except BaseException:
        lock.close()
        raise
    return lock


def _claim(workdir: Path, lock, config: dict, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise WorkdirError(f"workdir {workdir} is in use by another run (process {owner})") from None
    except OSError as error:
        raise WorkdirError(f"cannot lock workdir {workdir}: {error.strerror}") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    config, now = json.loads(_dumps(config)), versions()
    path = workdir / CONFIG
    if not path.exists():
        try:
            write_json(path, {"config": config, "versions": now})
        except OSError as error:
            raise WorkdirError(f"cannot write in workdir {workdir}: {error.strerror}") from None
        return
    try:
        first = json.loads(path.read_text())
        differs = _differences(first["config"], config)
        changed = _differences(first["versions"], now)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WorkdirError(f"{path} is damaged; put it back, or use another workdir") from None
    if differs:
        raise WorkdirError(
            f"workdir {workdir} belongs to a run of another config: {differs}; "
            "go on with that config, or use another workdir"
        )
    if changed:
        say(f"the run in {workdir} was begun elsewhere ({changed}): its numbers may differ in the last bits")


def _differences(old: dict, new: dict) -> str:
    """'seed was 0, is 1; options.M was absent, is 3', or '' where the two are equal."""
    old, new = dict(_flat(old)), dict(_flat(new))
    pairs = {name: (_spell(old, name), _spell(new, name)) for name in old | new}
    return "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in pairs.items() if was != now)


def _spell(values: dict, name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"


def _flat(values: dict, prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"  # such as this package, run from its source folder


def _dumps(value, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value):
    """Arrays and numpy numbers as Python's own; what JSON has no number for as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
