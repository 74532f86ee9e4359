"""What a client holds: its own images, from its own file, padded as every client's are."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.config import Config
from fedmetanas_jax.core import Examples
from fedmetanas_jax.data.dataset import DataError
from fedmetanas_jax.data.sources import read_arrays
from fedmetanas_jax.deploy.terms import Terms

KEYS = ("train_images", "train_labels")
TEST = ("test_images", "test_labels")


def shapes(terms: Terms, config: Config, test: bool) -> Examples:
    """What every client's images have as shapes, [n, h, w, c]: n = config.train_size. test: whether with test images,
    of which there are config.test_size."""

    def rows(count: int) -> Examples:
        image = jax.ShapeDtypeStruct((count, *terms.image), jnp.uint8)
        return Examples(image, *(jax.ShapeDtypeStruct((count,), kind) for kind in (jnp.int32, jnp.float32)))

    return rows(config.train_size)._replace(test=rows(config.test_size) if test else None)


def load(path: Path, terms: Terms, config: Config, test: bool, least: int) -> tuple[Examples, list[str]]:
    """The rows of a client's file, and what is to be said of them: of more images than the server's config has room for
    the first ones are used. DataError for a file that does not suit the run.

    test: whether the method is given test images. least: training images without which a client cannot take part.
    """
    arrays, said = read_arrays(path), []
    found = [_rows(path, arrays, keys, terms, size, said) for keys, size in _wanted(config, test)]
    if (have := len(arrays["train_labels"])) < least:
        raise DataError(f"{path} has {have} training images, but {config.method} needs {least} of every client")
    return found[0]._replace(test=found[1] if test else None), said


def _wanted(config: Config, test: bool) -> list[tuple[tuple[str, str], int]]:
    return [(KEYS, config.train_size), *([(TEST, config.test_size)] if test else [])]


def _rows(path: Path, arrays: dict, keys: tuple[str, str], terms: Terms, size: int, said: list[str]) -> Examples:
    if missing := [key for key in keys if key not in arrays]:
        raise DataError(f"{path} lacks {', '.join(missing)}; this run needs {', '.join(keys)} of a client")
    images, labels = (arrays[key] for key in keys)
    if images.dtype != np.uint8 or list(images.shape[1:]) != terms.image or len(images) == 0:
        raise DataError(
            f"{path}: {keys[0]} is {images.dtype} {images.shape}; this run needs uint8 [n, "
            f"{', '.join(map(str, terms.image))}], not empty"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        raise DataError(f"{path}: {keys[1]} is {labels.dtype} {labels.shape}; it must be {len(images)} integers")
    if labels.min() < 0 or labels.max() >= terms.classes:
        raise DataError(
            f"{path}: labels run from {labels.min()} to {labels.max()}; the server's run has classes 0 to "
            f"{terms.classes - 1}"
        )
    if len(images) > size:
        name = "train_size" if keys == KEYS else "test_size"
        said.append(f"{path} has {len(images)} {keys[0]}; the first {size} are used (config.{name} of the server)")
        images, labels = images[:size], labels[:size]
    rows = np.resize(np.arange(len(labels)), size)
    weight = (np.arange(size) < len(labels)).astype(np.float32)
    return Examples(jnp.asarray(images[rows]), jnp.asarray(labels[rows], jnp.int32), jnp.asarray(weight))
