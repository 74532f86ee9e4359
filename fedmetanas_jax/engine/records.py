"""What a run writes in its workdir: one JSON line a round, and its claim to the folder.

Lines are appended and synced one at a time: a process killed at any moment leaves at most one torn last line.
"""

import fcntl
import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax

from fedmetanas_jax.files import to_json, write_json, write_text

CONFIG, LOCK = "config.json", ".lock"
PACKAGES = ("fedmetanas_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class WorkdirError(Exception):
    """The workdir cannot be used for this run. The message is one line for the user."""


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
            raise WorkdirError(f"{path}, line {number}, is not a JSON object; the file was altered")
    return records


def truncate(path: str | Path, rounds: int) -> list[dict]:
    """Keeps the records with record["round"] <= rounds, drops the others and a torn line; returns those."""
    kept = [record for record in read(path) if record["round"] <= rounds]
    write_text(path, "".join(to_json(record) + "\n" for record in kept))
    return kept


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


def claim(workdir: str | Path, config: dict, say: Callable[[str], None], may_change: frozenset[str] = frozenset()):
    """Makes `workdir` this run's own: an open file, to be kept (or used in `with`) while the run lasts.

    The first run writes config.json; a later one must have an equal config, but for the fields named in
    `may_change`, which say how a run is run and not what it is. What differs in those and in the versions is said,
    because then the last bits may differ too. The claim ends with the process, however that ends.

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
        _claim(workdir, lock, config, say, may_change)
    except BaseException:
        lock.close()
        raise
    return lock


def _claim(workdir: Path, lock, config: dict, say: Callable[[str], None], may_change: frozenset[str]) -> None:
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
    config, now = json.loads(to_json(config)), versions()
    path = workdir / CONFIG
    if not path.exists():
        try:
            write_json(path, {"config": config, "versions": now})
        except OSError as error:
            raise WorkdirError(f"cannot write in workdir {workdir}: {error.strerror}") from None
        return
    try:
        first = json.loads(path.read_text())
        same, other = ({name: x for name, x in c.items() if name not in may_change} for c in (first["config"], config))
        differs, how = _differences(same, other), _differences(first["config"], config)
        changed = _differences(first["versions"], now)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WorkdirError(f"{path} is damaged; put it back, or use another workdir") from None
    if differs:
        raise WorkdirError(
            f"workdir {workdir} belongs to a run of another config: {differs}; "
            "go on with that config, or use another workdir"
        )
    if how:
        say(f"goes on in another way than the run was begun: {how}")
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
