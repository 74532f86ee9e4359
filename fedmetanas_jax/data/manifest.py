"""The record that a run leaves of its partition, partition.json, from which another run can deal the same images.

It holds the rows themselves: what a random generator makes of a seed may change with its version.
"""

import hashlib
import json
import stat
from pathlib import Path

import numpy as np

from fedmetanas_jax.data.dataset import DataError, Dataset
from fedmetanas_jax.data.partition import Partition, histogram, label_distance, majority_accuracy
from fedmetanas_jax.options import UsageError, brief, parse_path

MOST = 2**30  # bytes of a file; 100 clients of 1,200 images have 700,000


def record(parts: Partition, train_labels: np.ndarray, test_labels: np.ndarray, classes: int, parameters: dict) -> dict:
    """What a run records of its partition: a dict of plain JSON values.

    `parameters` are recorded as given. Two partitions are equal where both SHA-256 are; with those of the labels,
    `read` knows that they are dealt from the same data.
    """
    counts = [histogram(parts.train, train_labels, classes), histogram(parts.test, test_labels, classes)]
    distance = label_distance(*counts)
    content = {
        "parameters": dict(parameters),
        "clients": len(parts.train),
        "majority_accuracy": majority_accuracy(*counts),
        "label_distance": {"mean": float(distance.mean()), "of_clients": distance.tolist()},
    }
    sides = (("train", parts.train, train_labels), ("test", parts.test, test_labels))
    for (name, rows, labels), count in zip(sides, counts, strict=True):
        content[name] = {
            "sizes": [len(own) for own in rows],
            "distinct": len(np.unique(np.concatenate(rows))),
            "histogram": count.tolist(),
            "sha256": _sha256(rows),
            "labels_sha256": _sha256([labels]),
            "rows": [" ".join(map(str, own.tolist())) for own in rows],  # a client a line
        }
    return content


def read(path: str, dataset: Dataset) -> Partition:
    """The partition that a run left as the file `path`; how it was dealt is what that run recorded as parameters.

    UsageError where there is no file to read; DataError where it holds no partition, a damaged one, or one of other
    images, as the labels show.
    """
    file = parse_path("config.partition", path)
    text = _text(path, file)
    try:
        content = json.loads(text)
        sides = [content["train"], content["test"]]
        of_rows, of_labels = ([side.get(key) for side in sides] for key in ("sha256", "labels_sha256"))
        if of_labels == [None, None]:
            raise DataError("it does not say which rows were dealt, as those of older versions do not")
        rows = [[_row(own) for own in side["rows"]] for side in sides]
        dealing = dict(content["parameters"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        why = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{file} is no partition that a run could deal out again: {brief(why, 200)}") from None
    for side, word, labels in ((0, "training", dataset.train_labels), (1, "test", dataset.test_labels)):
        if of_labels[side] != _sha256([labels]):
            raise DataError(f"{file} was dealt from other data: the {word} labels are not those of this data set")
        if of_rows[side] != _sha256(rows[side]):
            raise DataError(f"{file} is damaged: its {word} rows are not those that were dealt")
        _check(file, word, rows[side], len(labels))
    if len(rows[0]) != len(rows[1]):
        raise DataError(f"{file} is damaged: {len(rows[0])} clients have training rows, but {len(rows[1])} test rows")
    return Partition(*rows, dealing)


def _text(path: str, file: Path) -> str:
    try:
        about = file.stat()
        if stat.S_ISREG(about.st_mode) and about.st_size <= MOST:  # reading a pipe would never end
            return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"config.partition is {brief(path)!r}, but no file to read ({error.strerror})") from None
    except ValueError as error:  # no UTF-8, or a name with a zero byte
        raise DataError(f"{brief(path)!r} cannot be read ({error})") from None
    large = f"larger than {MOST} bytes"
    raise DataError(f"{file} is {large if stat.S_ISREG(about.st_mode) else 'no regular file'}, so it is no partition")


def _row(text: str) -> np.ndarray:
    return np.array([int(number) for number in text.split()], np.int64)


def _check(file: Path, word: str, rows: list[np.ndarray], images: int) -> None:
    """DataError for rows that no run deals out, whatever their hash is."""
    if not rows:
        raise DataError(f"{file} is damaged: it has no clients")
    for client, own in enumerate(rows):
        if not len(own):
            raise DataError(f"{file} is damaged: client {client} has no {word} rows")
        if own.min() < 0 or own.max() >= images:
            raise DataError(f"{file} is damaged: client {client} has {word} rows that are not from 0 to {images - 1}")


def _sha256(rows: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for own in rows:
        digest.update(np.array([len(own), *own], "<i8").tobytes())
    return digest.hexdigest()
