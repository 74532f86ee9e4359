"""Images in class folders: which there are, and their pixels."""

import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fedmetanas_jax.data.dataset import DataError
from fedmetanas_jax.options import UsageError, brief

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
GRAY = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes without colours


class Picture(NamedTuple):
    """An image's file, and what its folders say of it."""

    path: Path
    label: str
    client: str | None  # None where folders are of classes alone
    split: str | None  # "train" or "test"; None where the folders leave that open


def listed(folder: Path, clients: bool) -> tuple[list[Picture], list[Path]]:
    """The images below `folder`, in the order of their paths, and the other files beside them.

    Names that begin with a dot are hidden, and not looked at. DataError for what is no CLASS/IMAGE, with clients
    CLIENT/CLASS/IMAGE, in itself or in the folders train and test.
    """
    inside = _folders(folder)
    split = {"train", "test"} <= {path.name for path in inside}
    if split and len(inside) > 2:
        more = ", ".join(path.name for path in inside if path.name not in ("train", "test"))
        raise DataError(f"{folder} is split into train and test, but holds more ({brief(more)}); move that away")
    found, others = [], []
    for part in inside if split else [folder]:
        for owner in _folders(part) if clients else [part]:
            for group in _folders(owner):
                pictures, rest = _in_class(group, clients)
                belongs = group.name, owner.name if clients else None, part.name if split else None
                found += [Picture(path, *belongs) for path in pictures]
                others += rest
    return found, others


def _folders(folder: Path) -> list[Path]:
    """The folders in it, at least one; their names are to be those of classes or clients."""
    there = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not there:
        raise DataError(f"{folder} holds no folders: images lie in FOLDER/CLASS, with --clients in FOLDER/CLIENT/CLASS")
    for path in there:
        if not path.name.isprintable():
            raise DataError(f"{folder} holds a folder with the name {ascii(path.name)}, which cannot be shown")
    return there


def _in_class(folder: Path, clients: bool) -> tuple[list[Path], list[Path]]:
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if deeper := [path for path in there if path.is_dir()]:
        hint = "" if clients else "; with --clients FOLDER holds clients, and these the classes"
        raise DataError(f"{folder} is a class, so it is to hold images, but it holds the folder {deeper[0].name}{hint}")
    images = [path for path in there if path.suffix.lower() in SUFFIXES]
    if not images and (there or not clients):  # a client may have a folder for a class that it has no images of
        hint = "; without --clients FOLDER holds the classes" if clients else ""
        raise DataError(f"{folder} is a class, but holds no images ({', '.join(SUFFIXES)}){hint}")
    return images, [path for path in there if path not in set(images)]


def pixels(found: list[Picture], size: int, gray: bool, failed: list[tuple[Path, str]]) -> np.ndarray:
    """The images as uint8 [n, size, size, 1 or 3]; 1 with `gray`, or where none has colours.

    What cannot be read is left out and put into `failed`, with the reason. UsageError where the memory of this machine
    could not hold them all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images that are large, or have odd extras, and can be read
        modes = {one.path: _mode(one.path) for one in found}
        channels = 1 if gray or all(mode in GRAY for mode in modes.values() if mode) else 3
        _check_memory((len(found), size, size, channels))
        images = []
        for one in found:
            try:
                images.append(_pixels(one.path, size, channels))
            except Exception as error:  # of broken files, decoders raise nearly anything
                failed.append((one.path, brief(" ".join(str(error).split()), 60) or type(error).__name__))
    return np.stack(images) if images else np.zeros((0, size, size, channels), np.uint8)


def _check_memory(shape: tuple[int, ...]) -> None:
    needed, there = 2 * math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # 2: a copy
    if needed > there:
        raise UsageError(
            f"{shape[0]} images of this size take {needed / 1e9:,.0f} GB, but this machine has {there / 1e9:,.0f} GB "
            f"of memory: make --size ({shape[1]}) smaller"
        )


def _mode(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return image.mode
    except Exception:  # said where its pixels are read
        return None


def _pixels(path: Path, size: int, channels: int) -> np.ndarray:
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ValueError("real numbers, of which nobody knows what is white")
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(size, size, channels)
