"""Data sets by name: the bundled digits, three official sets, and anybody's own .npz.

A data set NAME is the file DATA_DIR/NAME.npz with the arrays train_images, train_labels, test_images,
test_labels and, if wanted, label_names. For cifar10, cifar100 and mnist the file is made once, through
tensorflow-datasets; with the file there, that package is never imported.
"""

import io
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmetanas_jax.options import UsageError, brief, parse_path

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
BUNDLED = Path(__file__).with_name("digits.npz")  # see DIGITS.md
MOST_UNNAMED = 65_536  # classes of a file without label_names: a label above is rather an error than a class
MNIST_TRAIN = 50_000  # D-2: the paper splits MNIST 50,000 / 10,000; the last 10,000 training images go unused

_log = logging.getLogger(__name__)


class DataError(ValueError):
    """A data set that is missing, damaged or not what its name promises; the message is one line."""


class Dataset(NamedTuple):
    """Images and labels as numpy arrays, in the order of their file."""

    train_images: np.ndarray  # [n, h, w, c] uint8
    train_labels: np.ndarray  # [n] int32, 0 .. classes - 1
    test_images: np.ndarray  # [m, h, w, c] uint8
    test_labels: np.ndarray  # [m] int32
    label_names: tuple[str, ...]  # one per class


class Official(NamedTuple):
    """What is known of a published set, and the channel statistics it is usually normalised with."""

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


OFFICIAL = {
    "cifar10": Official(50_000, 10_000, (32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "cifar100": Official(
        50_000, 10_000, (32, 32, 3), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "mnist": Official(60_000, 10_000, (28, 28, 1), 10, (0.1307,), (0.3081,)),
}


def cache(name: str) -> Path:
    """~/.cache/fedmetanas_jax/NAME; where nobody has given the user a home, as in containers, the current folder stands
    for it. What is kept in it is said with its path."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path.cwd()
    return home / ".cache/fedmetanas_jax" / name


def data_dir(flag: str | None = None) -> Path:
    """The folder of data sets: `flag`, else $FEDMETANAS_DATA, else the cache's data. DataError for what can be no
    folder's name."""
    chosen = flag or os.environ.get("FEDMETANAS_DATA")
    if not chosen:
        return cache("data")
    try:
        return parse_path("data_dir" if flag else "FEDMETANAS_DATA", chosen)
    except UsageError as error:
        raise DataError(str(error)) from None


def load(name: str, data_dir: Path) -> Dataset:
    """The data set `name`: "digits", a key of OFFICIAL, or the stem of an .npz file in `data_dir`.

    An official set is prepared if its file is missing, and again if the file is damaged; one that can be read and
    holds something else is somebody's own, and stays. Of mnist only the first 50,000 training images are returned
    (D-2). Raises DataError where there is no sound data.
    """
    if Path(name).name != name or "\0" in name or len(os.fsencode(name)) > 250:  # with .npz, 255 is the most
        raise DataError(f"{brief(name)!r} is no data set's name: give the file's name without folder and .npz")
    path = Path(data_dir) / f"{name}.npz"
    there = os.path.exists(path)  # which, unlike Path.exists, raises nothing
    if there and not os.path.isfile(path):  # reading a pipe would never end
        raise DataError(f"{path} is no regular file, so there are no images in it")
    if name == "digits":
        if there:
            raise DataError(f"{path}: 'digits' is the bundled data set; give your own file another name")
        return _checked(str(BUNDLED), _read(BUNDLED), None)
    official = OFFICIAL.get(name)
    if official is None:
        if not there:
            known = sorted({"digits", *OFFICIAL, *_files(path.parent)})
            raise DataError(f"no data set {name!r}: there is no {path}; there are {', '.join(known)}")
        dataset = _checked(str(path), _read(path), None)
        for line in without_images(dataset):
            _log.warning("%s: %s", path, line)
        return dataset
    damage = ""
    if there:
        try:
            arrays = _read(path)
        except DataError as error:
            damage = f"{error}; "
            _log.warning("%s; making it again", error)
        else:
            try:
                return _as_used(name, _checked(str(path), arrays, official))
            except DataError as error:
                raise DataError(f"{error}; it stays as it is: give your own file another name") from None
    return _as_used(name, _make(name, path, official, damage))


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


def _files(folder: Path) -> list[str]:
    """Names of the .npz in the folder; none where it cannot be read."""
    try:
        return [path.stem for path in folder.glob("*.npz")]
    except OSError:
        return []


def mean_std(name: str, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of pixels in [0, 1], each of length c.

    The published values for official sets (methods section 3.5 for CIFAR-10), else those of the training
    images. Raises DataError for a channel without variation, which no normalisation could use.
    """
    if name in OFFICIAL:
        return OFFICIAL[name].mean, OFFICIAL[name].std
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in range(dataset.train_images.shape[-1]):
        count = np.bincount(dataset.train_images[..., channel].ravel(), minlength=256)
        mean.append(float(np.average(levels, weights=count)))
        std.append(float(np.sqrt(np.average((levels - mean[-1]) ** 2, weights=count))))
        if np.count_nonzero(count) == 1:
            raise DataError(f"{name}: channel {channel} is constant over train_images; leave it out")
    return tuple(mean), tuple(std)


def _as_used(name: str, dataset: Dataset) -> Dataset:
    if name != "mnist":
        return dataset
    return dataset._replace(
        train_images=dataset.train_images[:MNIST_TRAIN], train_labels=dataset.train_labels[:MNIST_TRAIN]
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that a data set is made of."""
    try:
        # ZipFile.read verifies each member's checksum before anything is parsed; np.load parses first.
        with zipfile.ZipFile(path) as file:
            members = [key for key in (*KEYS, "label_names") if f"{key}.npy" in file.namelist()]
            return {
                key: np.lib.format.read_array(io.BytesIO(file.read(f"{key}.npy")), allow_pickle=False)
                for key in members
            }
    except Exception as error:  # damage shows as nearly any exception of zipfile, zlib, numpy and the system
        raise DataError(f"{path} cannot be read ({_one_line(error)})") from error


def _checked(where: str, arrays: dict[str, np.ndarray], official: Official | None) -> Dataset:
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; it needs {', '.join(KEYS)}")
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            raise DataError(
                f"{where}: {split}_images is {images.dtype} {images.shape}; "
                "it must be uint8 [n, h, w, c], not empty"
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
    )


def _make(name: str, path: Path, official: Official, damage: str) -> Dataset:
    """Prepares an official set through tensorflow-datasets and keeps it as `path`."""
    archives = path.parent / "downloads" / name
    looked = f"{damage}no data for {name!r}: looked for {path} and for archives in {archives}"
    try:
        from fedmetanas_jax.data import prepare

        _log.warning("%s: preparing it once with tensorflow-datasets in %s", name, path.parent)
        arrays = prepare.arrays(name, path.parent)
        dataset = _checked(f"{name} as prepared in {path.parent / name}", arrays, official)
        write(path, arrays)
    except ImportError as error:
        raise DataError(
            f"{looked}; put the .npz there, or let tensorflow-datasets fetch it: "
            f"pip install 'fedmetanas_jax[data]' ({_one_line(error)})"
        ) from error
    except DataError as error:  # an archive, or what came of it, that is not the official one
        raise DataError(f"{damage}{error}") from error
    except Exception as error:  # of the http client, an archive or the file system: any means no data
        raise DataError(
            f"{looked}; put the .npz there, or give tensorflow-datasets a network or its archives "
            f"({_one_line(error)})"
        ) from error
    return dataset


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Makes an .npz. It is written under another name first, so that `path` is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip(": ")
    return text if len(text) <= 300 else f"{text[:300]} ..."
