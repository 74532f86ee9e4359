"""From arrays and a partition to what the engine runs on: one pool on the device, and rows of it."""

import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import FederatedData
from fedmetanas_jax.data.dataset import Dataset
from fedmetanas_jax.data.partition import Partition


def federate(dataset: Dataset, parts: Partition, least: tuple[int, int] = (0, 0)) -> FederatedData:
    """The pool is all training images, then all test images, as uint8; every client's rows point into it.

    Clients may share images, so rows cost far less than copies: 0.5 MB for 100 clients of 1,200 images.
    Clients with fewer rows than the longest, or than `least` (of training and test rows), repeat their own from the
    start; `train_size`, `test_size` tell. With the same lengths two federations run the same compiled programs.
    """
    offset = len(dataset.train_images)
    pool = offset + len(dataset.test_images)
    return FederatedData(
        image=jnp.asarray(np.concatenate([dataset.train_images, dataset.test_images])),
        label=jnp.asarray(np.concatenate([dataset.train_labels, dataset.test_labels]), jnp.int32),
        train=_padded(parts.train, 0, least[0]),
        train_size=jnp.asarray([len(rows) for rows in parts.train], jnp.int32),
        test=_padded(parts.test, offset, least[1]),
        test_size=jnp.asarray([len(rows) for rows in parts.test], jnp.int32),
        central=jnp.arange(offset, pool, dtype=jnp.int32),
    )


def lengths(parts: Partition, asked: tuple[int, int], sized: bool, batch: int) -> tuple[int, int]:
    """The lengths, of training and test rows, of arrays that are as long for every seed, or nearly always, and where
    clients have at most 16 and 4 batches for every split: runs then share their compiled programs. What is past a
    client's rows costs nothing.

    asked: how many images of each a client was to have at most; 0 where nobody said.
    sized: whether clients were dealt as many as was asked for. Where they have what they have, under label skew and of
      their own, arrays have as many batches as the next power of two.
    """
    found = []
    for rows, most, fewest in zip((parts.train, parts.test), asked, (16, 4), strict=True):
        longest = max(map(len, rows))
        power_of_two = batch << (-(-longest // batch) - 1).bit_length()
        found.append(max(fewest * batch, max(longest, most) if sized else power_of_two))
    return tuple(found)


def _padded(rows: list[np.ndarray], offset: int, least: int):
    longest = max(least, *(len(own) for own in rows))
    return jnp.asarray(np.stack([np.resize(own, longest) for own in rows]) + offset, jnp.int32)
