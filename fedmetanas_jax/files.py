"""Files that are written whole or not at all: the one way this project puts anything on the disk.

A file is written under another name, synced and renamed: a process killed at any moment leaves the old file or
the new one, and no reader ever finds a part.
"""

import itertools
import json
import math
import os
from pathlib import Path


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces the file, making its folder where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:  # a part of a file on a full disk only takes room
        unfinished.unlink(missing_ok=True)
        raise


def beside(path: str | Path) -> Path:
    """Where something can be moved out of the way: the first of PATH.1, PATH.2, ... that is not there."""
    path = Path(path)
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(free for free in numbered if not free.exists())


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value, indent: int | None = 2) -> None:
    """`write_text` of `to_json`."""
    write_text(path, to_json(value, indent) + "\n")


def to_json(value, indent: int | None = None) -> str:
    """JSON of a value; arrays as lists, NaN and infinities, for which JSON has no number, as null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array, or a number of one
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
