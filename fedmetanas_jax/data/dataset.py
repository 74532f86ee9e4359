"""What a data set is: arrays that fit together, or one line that says which do not."""

from typing import NamedTuple

import numpy as np

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
CLIENTS = ("train_client", "test_client")
MOST_UNNAMED = 65_536  # classes of a file without label_names: a label above is rather an error than a class


class DataError(ValueError):
    """A data set that is missing, damaged or not what its name promises; the message is one line."""


class Dataset(NamedTuple):
    """Images and labels as numpy arrays, in the order of their file."""

    train_images: np.ndarray  # [n, h, w, c] uint8
    train_labels: np.ndarray  # [n] int32, 0 .. classes - 1
    test_images: np.ndarray  # [m, h, w, c] uint8
    test_labels: np.ndarray  # [m] int32
    label_names: tuple[str, ...]  # one per class
    train_client: np.ndarray | None = None  # [n] integers or strings, whose an image is; None where no file says it
    test_client: np.ndarray | None = None  # [m]
    channels: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and deviation of each, where somebody
    #   who has more images says what they are


class Official(NamedTuple):
    """What is known of a published set, and the channel statistics it is usually normalised with."""

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def checked(where: str, arrays: dict[str, np.ndarray], official: Official | None) -> Dataset:
    """The arrays of the file `where` as a data set, which is to be this official one, if any. DataError says what is
    off."""
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; it needs {', '.join(KEYS)}")
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            raise DataError(
                f"{where}: {split}_images is {images.dtype} {images.shape}; it must be uint8 [n, h, w, c], not empty"
            )
        if images.shape[1] in (1, 3, 4) and images.shape[3] > 4:
            raise DataError(
                f"{where}: {split}_images {images.shape} look as if channels came first; they must be [n, h, w, c]: "
                "numpy.moveaxis(images, 1, -1) makes them so"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
            raise DataError(f"{where}: {split}_labels is {labels.dtype} {labels.shape}, not integer [n]")
        if len(images) != len(labels):
            raise DataError(f"{where}: {len(images)} {split}_images but {len(labels)} {split}_labels")
    train_labels, test_labels = arrays["train_labels"], arrays["test_labels"]
    shapes = [arrays[f"{split}_images"].shape[1:] for split in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise DataError(f"{where}: train_images are {shapes[0]} each but test_images {shapes[1]}")
    lowest = min(int(train_labels.min()), int(test_labels.min()))
    highest = max(int(train_labels.max()), int(test_labels.max()))
    if "label_names" not in arrays and highest >= MOST_UNNAMED:
        raise DataError(
            f"{where}: labels run from {lowest} to {highest}; without label_names they can be at most "
            f"{MOST_UNNAMED - 1}"
        )
    names = arrays.get("label_names", np.array([str(label) for label in range(max(highest, 0) + 1)]))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(f"{where}: label_names is {names.dtype} {names.shape}; it must be strings [classes]")
    if lowest < 0 or highest >= len(names):
        raise DataError(
            f"{where}: labels run from {lowest} to {highest}; {len(names)} names allow 0 to {len(names) - 1}"
        )
    if official is not None:
        found = (len(train_labels), len(test_labels), shapes[0], len(names))
        if found != official[:4]:
            raise DataError(
                f"{where} is not the official set: train, test, shape, classes are {found}; "
                f"they should be {official[:4]}"
            )
    return Dataset(
        arrays["train_images"],
        train_labels.astype(np.int32),
        arrays["test_images"],
        test_labels.astype(np.int32),
        tuple(str(name) for name in names),
        *_clients(where, arrays),
    )


def _clients(where: str, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """train_client and test_client, if they are there. DataError unless they say of every image whose it is."""
    given = [key for key in CLIENTS if key in arrays]
    if len(given) == 1:
        other = next(key for key in CLIENTS if key not in given)
        raise DataError(f"{where} has {given[0]} but no {other}; it needs both, or neither")
    for key in given:
        ids, images = arrays[key], len(arrays[key.replace("client", "labels")])
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.dtype.kind == "U"):
            raise DataError(f"{where}: {key} is {ids.dtype} {ids.shape}; it must be integers or strings [n]")
        if len(ids) != images:
            raise DataError(f"{where}: {images} {key.replace('client', 'images')} but {len(ids)} {key}")
    if len({arrays[key].dtype.kind == "U" for key in given}) > 1:
        kinds = " but ".join(f"{key} is {arrays[key].dtype}" for key in given)
        raise DataError(f"{where}: {kinds}; both must be integers, or both strings")
    return [arrays[key] if arrays[key].dtype.kind == "U" else arrays[key].astype(np.int64) for key in given]


def without_images(dataset: Dataset) -> list[str]:
    """One line for each split that lacks images of some classes; the network has outputs for these all the same. One
    more where nothing but labels that are counted from 1 speaks for a class 0."""
    lines, classes = [], len(dataset.label_names)
    first = min(dataset.train_labels.min(), dataset.test_labels.min())
    if first > 0 and dataset.label_names == tuple(map(str, range(classes))):
        lines.append(
            f"labels are {first} to {classes - 1}, and 0 is a class too; subtract {first} from them unless it is meant "
            "to be one"
        )
    for split, labels in (("training", dataset.train_labels), ("test", dataset.test_labels)):
        empty = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
        if len(empty):
            names = [(str(label), dataset.label_names[label]) for label in empty[:10]]
            named = ", ".join(label if name == label else f"{label} ({name})" for label, name in names)
            more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
            lines.append(f"no {split} images of label {named}{more}; the network gets {classes} classes all the same")
    return lines
