"""Images in folders, a folder a class, as a data set for --config.dataset=NAME.

    python experiments/prepare.py photos birds                   # photos/CLASS/*.jpg -> DATA_DIR/birds.npz
    python experiments/prepare.py photos birds --size=64 --test_share=0.1
    python experiments/prepare.py photos birds --clients         # photos/CLIENT/CLASS/*.jpg

Where FOLDER holds the two folders train and test, these are the split, and classes (or clients) lie in them. Else a
share of the images is kept for tests: of every class or, with --clients, of every client. Images become gray if all of
them are, else RGB; they are turned as their EXIF says and squeezed to SIZE x SIZE; white is put behind transparent
ones. An existing NAME.npz is never overwritten. Exit status as main.py's.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from folders import Picture, listed, pixels

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.data import sources
from fedmetanas_jax.options import UsageError, parse_path

MOST_SIZE = 1024
SHOWN = 5  # files named in one line
FLAGS = {
    "folder": Flag(str, None, "of the images; may also be the first argument, without --folder="),
    "name": Flag(str, None, "of the data set; may also be the second argument, without --name="),
    "size": Flag(int, 32, "height and width that images are brought to; divisible by 4 for the networks here", least=4),
    "test_share": Flag(float, None, "of the images, kept for tests; default 0.2, where FOLDER is not split already"),
    "seed": Flag(int, 1, "of which images are kept for tests", least=0),
    "clients": Flag(bool, False, "the folders in FOLDER are clients and hold the classes: CLIENT/CLASS"),
    "gray": Flag(bool, False, "make gray what has colours"),
    "skip_unreadable": Flag(bool, False, "leave out images that cannot be read, instead of refusing them all"),
    "data_dir": Flag(str, None, "where NAME.npz goes; else $FEDMETANAS_DATA, else ~/.cache/fedmetanas_jax/data"),
    "help": command.HELP,
}
say = partial(print, flush=True)


class Asked(NamedTuple):
    """What a command line asks for."""

    folder: Path
    path: Path  # of the data set
    values: dict  # of all flags


def parse(argv: list[str]) -> Asked | None:
    """argv[0] is the program -> None for --help. UsageError for what makes no sense."""
    values = command.read(command.named(argv, "folder", "name"), FLAGS)
    if values["help"]:
        return None
    if values["folder"] is None or values["name"] is None:
        raise UsageError("which images, and what are they to be called? prepare.py FOLDER NAME")
    if values["size"] > MOST_SIZE:
        raise UsageError(f"size is {values['size']}; it must be at most {MOST_SIZE}")
    if values["test_share"] is not None and not 0 < values["test_share"] < 1:
        raise UsageError(f"test_share is {values['test_share']}; it must be above 0 and below 1")
    folder, name = parse_path("folder", values["folder"]), values["name"]
    if not folder.is_dir():
        raise UsageError(f"folder is '{folder}', which is no folder")
    try:
        sources.check_name(name)
    except sources.DataError as error:
        raise UsageError(str(error)) from None
    if name == "digits" or name in sources.OFFICIAL:
        raise UsageError(f"name is '{name}', which is a published data set's: give your images another one")
    path = sources.data_dir(values["data_dir"]) / f"{name}.npz"
    if path.exists():
        raise UsageError(f"there is a {path} already; it stays as it is: choose another name, or remove it yourself")
    return Asked(folder, path, values)


def prepare(asked: Asked) -> None:
    """Writes the data set. DataError for folders without sound images, UsageError for what does not suit them."""
    values = asked.values
    found, others = listed(asked.folder, clients=values["clients"])
    if not found:
        raise sources.DataError(f"{asked.folder} holds no images")
    if others:
        say(f"left out what is no image by its name: {_some(others)}")
    split = found[0].split is not None
    if split and values["test_share"] is not None:
        raise UsageError(f"{asked.folder} is split into train and test already: leave --test_share out")
    found, images = _read(asked, found)
    test = np.array([one.split == "test" for one in found])
    if not split:
        test = kept(found, 0.2 if values["test_share"] is None else values["test_share"], values["seed"])
    arrays = to_arrays(found, images, test)
    sources.write(asked.path, arrays)
    n, m = len(arrays["train_labels"]), len(arrays["test_labels"])
    shape = " x ".join(map(str, images.shape[1:]))
    say(f"wrote {asked.path}: {n} training and {m} test images ({shape}) of {len(arrays['label_names'])} classes")
    flags = [f"--config.dataset={asked.path.stem}"]
    if values["clients"]:
        clients = len(np.intersect1d(arrays["train_client"], arrays["test_client"]))
        say(f"{clients} clients have training and test images")
        flags += ["--config.partition=natural", f"--config.clients={clients}"]
    say(f"to use it: {' '.join(flags)}")


def _read(asked: Asked, found: list[Picture]) -> tuple[list[Picture], np.ndarray]:
    """The images that can be read, with their pixels [n, size, size, channels]."""
    values, failed = asked.values, []
    images = pixels(found, values["size"], values["gray"], failed)
    if failed:
        of = f"{len(failed)} of {len(found)} images cannot be read: {_some(failed)}"
        if not values["skip_unreadable"] or len(failed) == len(found):
            raise sources.DataError(f"{of}; --skip_unreadable leaves such images out")
        say(f"left out {of}")
        lost = {path for path, _ in failed}
        found = [one for one in found if one.path not in lost]
    return found, images


def kept(found: list[Picture], share: float, seed: int) -> np.ndarray:
    """[n] bool, which are for tests: of every client or, without them, of every class `share`, rounded, but at least
    one and not all of them. The only image of a class or client is for training."""
    groups = np.array([one.label if one.client is None else one.client for one in found])
    test = np.zeros(len(found), bool)
    for number, group in enumerate(np.unique(groups)):
        rows = np.random.default_rng([seed, number]).permutation(np.flatnonzero(groups == group))
        test[rows[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
    return test


def to_arrays(found: list[Picture], images: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the file. DataError for a split that is empty."""
    names = sorted({one.label for one in found})
    columns = {"images": images, "labels": np.array([names.index(one.label) for one in found], np.int32)}
    if found[0].client is not None:
        columns["client"] = np.array([one.client for one in found])
    for split, here in (("training", ~test), ("test", test)):
        if not here.any():
            raise sources.DataError(f"of {len(found)} images none are {split} images")
    sides = {"train": ~test, "test": test}
    arrays = {f"{side}_{name}": column[here] for side, here in sides.items() for name, column in columns.items()}
    return arrays | {"label_names": np.array(names)}


def _some(files: list) -> str:
    """'a.png (truncated), b.png and 3 more'"""
    shown = [f"{file[0]} ({file[1]})" if isinstance(file, tuple) else str(file) for file in files[:SHOWN]]
    return ", ".join(shown) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = parse(argv)
        if asked is None:
            say(command.help_text(__doc__, FLAGS))
        else:
            prepare(asked)

    return command.exit_status(answer, lambda: (sources.DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
