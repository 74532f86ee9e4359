"""Data sets by name: the bundled digits, three official sets, and anybody's own .npz.

A data set NAME is the file DATA_DIR/NAME.npz with the arrays train_images, train_labels, test_images,
test_labels and, if wanted, label_names, and train_client and test_client, which say whose every image is
(docs/data.md). For cifar10, cifar100 and mnist the file is made once, through tensorflow-datasets; with the file there,
that package is never imported.
"""

import io
import logging
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from fedmetanas_jax.data.dataset import CLIENTS, KEYS, DataError, Dataset, Official, checked, without_images
from fedmetanas_jax.options import UsageError, brief, parse_path

BUNDLED = Path(__file__).with_name("digits.npz")  # see DIGITS.md
MNIST_TRAIN = 50_000  # D-2: the paper splits MNIST 50,000 / 10,000; the last 10,000 training images go unused

_log = logging.getLogger(__name__)


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
    check_name(name)
    path = Path(data_dir) / f"{name}.npz"
    there = os.path.exists(path)  # which, unlike Path.exists, raises nothing
    if there and not os.path.isfile(path):  # reading a pipe would never end
        raise DataError(f"{path} is no regular file, so there are no images in it")
    if name == "digits":
        if there:
            raise DataError(f"{path}: 'digits' is the bundled data set; give your own file another name")
        return checked(str(BUNDLED), read_arrays(BUNDLED), None)
    official = OFFICIAL.get(name)
    if official is None:
        if not there:
            known = sorted({"digits", *OFFICIAL, *_files(path.parent)})
            raise DataError(f"no data set {name!r}: there is no {path}; there are {', '.join(known)}")
        dataset = checked(str(path), read_arrays(path), None)
        for line in without_images(dataset):
            _log.warning("%s: %s", path, line)
        return dataset
    damage = ""
    if there:
        try:
            arrays = read_arrays(path)
        except DataError as error:
            damage = f"{error}; "
            _log.warning("%s; making it again", error)
        else:
            try:
                return _as_used(name, checked(str(path), arrays, official))
            except DataError as error:
                raise DataError(f"{error}; it stays as it is: give your own file another name") from None
    return _as_used(name, _make(name, path, official, damage))


def check_name(name: str) -> None:
    """DataError for what is no file's name."""
    most = 250  # bytes, and 255 with .npz
    if not name or Path(name).name != name or "\0" in name or len(os.fsencode(name)) > most:
        raise DataError(f"{brief(name)!r} is no data set's name: give the file's name without folder and .npz")


def _files(folder: Path) -> list[str]:
    """Names of the .npz in the folder; none where it cannot be read."""
    try:
        return [path.stem for path in folder.glob("*.npz")]
    except OSError:
        return []


def mean_std(name: str, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of pixels in [0, 1], each of length c.

    The published values for official sets (methods section 3.5 for CIFAR-10), else those of the training
    images, or what the data set says they are. Raises DataError for a channel without variation, which no
    normalisation could use.
    """
    if dataset.channels is not None:
        return dataset.channels
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
    first = {key: getattr(dataset, key) for key in ("train_images", "train_labels", "train_client")}
    return dataset._replace(**{key: array[:MNIST_TRAIN] for key, array in first.items() if array is not None})


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that a data set is made of, as far as they are there. DataError for one that cannot be
    read."""
    try:
        # ZipFile.read verifies each member's checksum before anything is parsed; np.load parses first.
        with zipfile.ZipFile(path) as file:
            members = [key for key in (*KEYS, *CLIENTS, "label_names") if f"{key}.npy" in file.namelist()]
            return {
                key: np.lib.format.read_array(io.BytesIO(file.read(f"{key}.npy")), allow_pickle=False)
                for key in members
            }
    except Exception as error:  # damage shows as nearly any exception of zipfile, zlib, numpy and the system
        raise DataError(f"{path} cannot be read ({_one_line(error)})") from error


def _make(name: str, path: Path, official: Official, damage: str) -> Dataset:
    """Prepares an official set through tensorflow-datasets and keeps it as `path`."""
    archives = path.parent / "downloads" / name
    looked = f"{damage}no data for {name!r}: looked for {path} and for archives in {archives}"
    try:
        from fedmetanas_jax.data import prepare

        _log.warning("%s: preparing it once with tensorflow-datasets in %s", name, path.parent)
        arrays = prepare.arrays(name, path.parent)
        dataset = checked(f"{name} as prepared in {path.parent / name}", arrays, official)
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
