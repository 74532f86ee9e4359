"""Files that are written whole or not at all: the one way this project puts anything on the disk.

A file is written under another name, synced and renamed: a process killed at any moment leaves the old file or
the new one, and no reader ever finds a part.
"""

import json
import os
from pathlib import Path


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces the file, making its folder where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value, indent: int | None = 2) -> None:
    """`write_text` of a JSON-able value, for people to read. ValueError for NaN and infinities: JSON has none."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")
